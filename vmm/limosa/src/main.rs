//! `limosa`, the binary: see `lib.rs`.
#![forbid(unsafe_code)]

fn main() -> std::process::ExitCode {
    limosa::main()
}
