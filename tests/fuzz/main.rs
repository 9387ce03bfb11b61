//! The fuzz targets for a second each, in the usual run of tests: what is kept in `tests/fuzz/corpus`, and random changes of
//! it by a printed seed. It knows no coverage; `make fuzz` does (libFuzzer, the same targets).
//!
//! `LIMOSA_FUZZ_SECONDS` is how long each target runs (default 1), `LIMOSA_FUZZ_SEED` repeats a run.
#![allow(clippy::expect_used, clippy::panic, clippy::print_stdout)]

mod targets;

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};
use targets::{TARGETS, Target};

/// Longest input that is made, in bytes.
const BYTES_MAX: usize = 4_096;
/// What is kept in git, all together.
const CORPUS_BYTES_MAX: u64 = 1 << 20;
const INTERESTING: [u64; 9] = [0, 1, 0x7f, 0x80, 0xff, 0xffff, 0x7fff_ffff, u32::MAX as u64, u64::MAX];

fn folder(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fuzz/corpus").join(name)
}

fn corpus(name: &str) -> Vec<Vec<u8>> {
    let entries = std::fs::read_dir(folder(name)).into_iter().flatten().flatten();
    let mut files: Vec<PathBuf> = entries.map(|entry| entry.path()).collect();
    files.sort();
    files.iter().map(|file| std::fs::read(file).expect("a file of the corpus")).collect()
}

/// xorshift64*.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_F491_4F6C_DD1D)
    }

    fn below(&mut self, bound: usize) -> usize {
        usize::try_from(self.next() % (bound.max(1) as u64)).unwrap_or(0)
    }

    /// One to eight changes.
    fn change(&mut self, corpus: &[Vec<u8>]) -> Vec<u8> {
        let mut input = corpus.get(self.below(corpus.len())).cloned().unwrap_or_default();
        for _ in 0..=self.below(8) {
            let at = self.below(input.len() + 1);
            match self.below(6) {
                0 => input.insert(at, self.next().to_le_bytes()[0]),
                1 => input.truncate(at),
                2 => {
                    let end = (at + self.below(9)).min(input.len());
                    input.drain(at..end);
                }
                3 => {
                    let other = corpus.get(self.below(corpus.len())).cloned().unwrap_or_default();
                    input.truncate(at);
                    input.extend_from_slice(other.get(self.below(other.len())..).unwrap_or_default());
                }
                4 => {
                    let value = INTERESTING.get(self.below(INTERESTING.len())).copied().unwrap_or(0).to_le_bytes();
                    let width = 1 << self.below(4);
                    for (to, from) in input.iter_mut().skip(at).take(width).zip(value) {
                        *to = from;
                    }
                }
                _ => {
                    if let Some(byte) = input.get_mut(at) {
                        *byte ^= 1 << self.below(8);
                    }
                }
            }
        }
        input.truncate(BYTES_MAX);
        input
    }
}

/// Runs `target`; a panic is told with the input that made it.
fn attempt(name: &str, seed: u64, target: Target, input: &[u8]) {
    if std::panic::catch_unwind(|| target(input)).is_err() {
        let hex: String = input.iter().map(|byte| format!("{byte:02x}")).collect();
        panic!("{name} fails with {hex} (seed {seed}); `LIMOSA_FUZZ_SEED={seed}` repeats the run");
    }
}

fn run(name: &str) {
    let target = TARGETS.iter().find(|(known, _)| *known == name).expect("a target of that name").1;
    let number = |variable| std::env::var(variable).ok().and_then(|text| text.parse::<u64>().ok());
    let clock = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).map_or(1, |since| since.subsec_nanos().into());
    let seed = number("LIMOSA_FUZZ_SEED").unwrap_or(clock).max(1);
    let time = Duration::from_secs(number("LIMOSA_FUZZ_SECONDS").unwrap_or(1));
    let kept = corpus(name);
    assert!(!kept.is_empty(), "nothing is kept for {name}: {}", folder(name).display());
    kept.iter().for_each(|input| attempt(name, seed, target, input));
    let (began, mut random, mut count) = (Instant::now(), Random(seed), kept.len());
    while began.elapsed() < time {
        let input = random.change(&kept);
        attempt(name, seed, target, &input);
        count += 1;
    }
    println!("{name}: {count} executions, {} of them kept inputs, seed {seed}", kept.len());
}

#[test]
fn any_bytes_as_control() {
    run("control");
}

#[test]
fn any_bytes_as_a_message() {
    run("message");
}

#[test]
fn any_bytes_as_a_lane() {
    run("lane");
}

#[test]
fn any_bytes_as_a_journal() {
    run("journal");
}

#[test]
fn any_bytes_as_a_snapshot() {
    run("snapshot");
}

#[test]
fn any_bytes_as_datagrams_of_the_plug() {
    run("plug");
}

#[test]
fn any_bytes_as_frames() {
    run("learn");
}

#[test]
fn any_bytes_as_text() {
    run("text");
}

#[test]
fn any_datagrams_for_both_ends_of_the_plug() {
    run("plug-ends");
}

#[test]
fn any_events_for_the_source() {
    run("source");
}

#[test]
fn any_events_for_the_destination() {
    run("destination");
}

#[test]
fn every_target_is_run() {
    let this = include_str!("main.rs");
    for (name, _) in TARGETS {
        assert!(this.contains(&format!("run(\"{name}\");")), "{name} has no test");
    }
}

#[test]
fn the_corpus_is_small() {
    let files = TARGETS.iter().flat_map(|(name, _)| corpus(name));
    let bytes: u64 = files.map(|input| input.len() as u64).sum();
    assert!(bytes <= CORPUS_BYTES_MAX, "{bytes} bytes are kept");
}
