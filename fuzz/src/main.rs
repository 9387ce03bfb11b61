//! One target of `tests/fuzz` under libFuzzer, the one that `LIMOSA_FUZZ_TARGET` names. What the targets are is not here.
#![no_main]
#![allow(clippy::expect_used)]

#[path = "../../tests/fuzz/targets/mod.rs"]
mod targets;

use std::sync::OnceLock;
use targets::{TARGETS, Target};

static CHOSEN: OnceLock<Target> = OnceLock::new();

fn chosen() -> Target {
    let name = std::env::var("LIMOSA_FUZZ_TARGET").unwrap_or_default();
    TARGETS.iter().find(|(known, _)| *known == name).expect("LIMOSA_FUZZ_TARGET names no target").1
}

libfuzzer_sys::fuzz_target!(|data: &[u8]| {
    CHOSEN.get_or_init(chosen)(data);
});
