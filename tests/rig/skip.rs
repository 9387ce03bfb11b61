//! Saying that a test cannot run here. Not a way to leave tests out: where everything must run, it fails them.

use std::fs::OpenOptions;
use std::io::Write as _;

/// File to which every skip appends a line, so that `make test` can count them truthfully.
pub const SKIP_LOG: &str = "LIMOSA_SKIP_LOG";
/// Set to 1 on machines that have all that the tests need: there a skip is a failure.
pub const DEMAND_ALL: &str = "LIMOSA_DEMAND_ALL";

/// Set in machines of the lab for the tests that need them.
#[allow(dead_code, reason = "as the functions that use it")]
pub const IN_LAB: &str = "LIMOSA_IN_LAB";

/// Reports that the calling test cannot run here for want of rights, devices or programs; the test returns right after.
///
/// Prints `skipped: REASON` and appends `PROCESS TEST: REASON` to the file that `LIMOSA_SKIP_LOG` names.
///
/// # Panics
/// If `LIMOSA_DEMAND_ALL=1`: this machine was said to have everything.
#[allow(clippy::panic)]
pub fn skip(reason: &str) {
    if std::env::var(DEMAND_ALL).is_ok_and(|value| value == "1") {
        panic!("skipped: {reason} (and {DEMAND_ALL}=1 allows no skips)");
    }
    note(reason);
}

/// The same for what no build machine has and a machine of the lab does: `tests/lab_rdma.rs` runs the calling test there, and
/// fails if it is skipped there. Counted apart.
///
/// # Panics
/// In the lab, which sets `LIMOSA_DEMAND_ALL=1` and `LIMOSA_IN_LAB=1`.
#[allow(dead_code, clippy::panic, reason = "most tests that include this file by its path need no lab")]
pub fn skip_for_the_lab(reason: &str) {
    assert!(std::env::var_os(IN_LAB).is_none(), "skipped in the lab itself: {reason}");
    note(&format!("runs in the lab: {reason}"));
}

#[allow(clippy::panic, clippy::print_stdout)]
fn note(reason: &str) {
    println!("skipped: {reason}");
    let Some(path) = std::env::var_os(SKIP_LOG) else { return };
    let thread = std::thread::current();
    let line = format!("{} {}: {}\n", std::process::id(), thread.name().unwrap_or("a test"), reason.replace('\n', " "));
    // One write of one line in append mode: lines of tests that run at once do not mix.
    let written = OpenOptions::new().create(true).append(true).open(&path).and_then(|mut file| file.write_all(line.as_bytes()));
    if let Err(error) = written {
        panic!("cannot note the skipped test in {}: {error}", path.display());
    }
}
