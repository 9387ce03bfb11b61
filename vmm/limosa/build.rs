//! Builds the guest of `limosa demo` (tests/guest: freestanding C and assembly, needs gcc and binutils).
//! It builds nothing else.

use std::path::PathBuf;
use std::process::{Command, ExitCode};

fn main() -> ExitCode {
    let guest = PathBuf::from(std::env::var_os("CARGO_MANIFEST_DIR").unwrap_or_default()).join("../../tests/guest");
    let out = PathBuf::from(std::env::var_os("OUT_DIR").unwrap_or_default());
    let status = Command::new("sh").arg(guest.join("build.sh")).arg(&out).status();
    say(&format!("cargo::rerun-if-changed={}", guest.display()));
    match status {
        Ok(status) if status.success() && out.join("limosa-guest.elf").is_file() => ExitCode::SUCCESS,
        Ok(status) => {
            fail(&format!("tests/guest/build.sh ended with {status}; are gcc and binutils installed? `make setup` does it"))
        }
        Err(error) => fail(&format!("sh cannot be run: {error}")),
    }
}

fn fail(words: &str) -> ExitCode {
    say(&format!("cargo::error=the demo's guest was not built: {words}"));
    ExitCode::FAILURE
}

#[allow(clippy::print_stdout)] // cargo reads a build script's standard output
fn say(line: &str) {
    println!("{line}");
}
