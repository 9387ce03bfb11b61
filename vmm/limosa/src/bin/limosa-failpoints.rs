//! `limosa` with fail points, for tests only (`tests/kills.rs`): a binary of its own, so that building it replaces no other.
#![forbid(unsafe_code)]

fn main() -> std::process::ExitCode {
    limosa::main()
}
