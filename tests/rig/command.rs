//! Commands of `limosa` as a test runs them: to their end, or beside the test; what they printed and how they ended.

use crate::process::{Process, limosa_bin};
use anyhow::{Context, Result, ensure};
use serde_json::Value;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

/// What a command did.
#[derive(Debug, Clone)]
pub struct Output {
    /// Its exit code; -1 when a signal ended it.
    pub code: i32,
    /// Standard output.
    pub stdout: String,
    /// Standard error.
    pub stderr: String,
    /// The words it was started with.
    pub words: String,
}

impl Output {
    /// Standard output as JSON: the whole of it, else its last line.
    pub fn json(&self) -> Result<Value> {
        let text = self.stdout.trim();
        let last = text.lines().next_back().unwrap_or_default();
        serde_json::from_str(text).or_else(|_| serde_json::from_str(last)).with_context(|| format!("no JSON: {self:?}"))
    }

    /// Fails, with everything that was printed, when the code is another.
    pub fn expect_code(self, code: i32) -> Result<Output> {
        ensure!(
            self.code == code,
            "limosa {}: exit {} instead of {code}\nstdout: {}\nstderr: {}",
            self.words,
            self.code,
            self.stdout.trim(),
            self.stderr.trim()
        );
        Ok(self)
    }

    /// Everything that was printed.
    pub fn all(&self) -> String {
        format!("{}\n{}", self.stdout, self.stderr)
    }

    /// Fails when the words were not printed on either stream.
    pub fn expect_words(self, words: &str) -> Result<Output> {
        ensure!(self.all().contains(words), "limosa {}: {words:?} is not in\n{}", self.words, self.all());
        Ok(self)
    }
}

/// A command that still runs.
#[derive(Debug)]
pub struct Running {
    pub(crate) process: Process,
    pub(crate) stdout: PathBuf,
    pub(crate) stderr: PathBuf,
    pub(crate) words: String,
}

impl Running {
    /// Its process id.
    pub fn pid(&self) -> u32 {
        self.process.pid()
    }

    /// `kill -9`.
    pub fn kill(&mut self) -> Result<()> {
        self.process.kill()
    }

    /// Sends it a signal.
    pub fn signal(&self, which: nix::sys::signal::Signal) {
        self.process.signal(which);
    }

    /// What it printed so far (stdout, stderr).
    pub fn printed(&self) -> (String, String) {
        (read_text(&self.stdout), read_text(&self.stderr))
    }

    /// Whether it has ended.
    pub fn ended(&mut self) -> Result<bool> {
        Ok(self.process.ended()?.is_some())
    }

    /// Waits for its end.
    pub fn wait(&mut self, limit: Duration) -> Result<Output> {
        let status = self.process.wait(limit).with_context(|| format!("{:?}", self.printed()))?;
        let (stdout, stderr) = self.printed();
        Ok(Output { code: status.code().unwrap_or(-1), stdout, stderr, words: self.words.clone() })
    }
}

/// Runs the binary outside of any lab.
pub fn limosa(args: &[&str]) -> Result<Output> {
    finish(Command::new(limosa_bin()?), args)
}

pub(crate) fn finish(mut command: Command, args: &[&str]) -> Result<Output> {
    let output = command.args(args).stdin(Stdio::null()).output().context("cannot start limosa")?;
    Ok(Output {
        code: output.status.code().unwrap_or(-1),
        stdout: String::from_utf8_lossy(&output.stdout).into_owned(),
        stderr: String::from_utf8_lossy(&output.stderr).into_owned(),
        words: args.join(" "),
    })
}

/// A file as text, empty when it is not there.
pub fn read_text(path: &Path) -> String {
    std::fs::read(path).map(|bytes| String::from_utf8_lossy(&bytes).into_owned()).unwrap_or_default()
}

/// The last lines of a text.
pub fn tail(text: &str, lines: usize) -> String {
    let all: Vec<&str> = text.lines().collect();
    all.get(all.len().saturating_sub(lines)..).unwrap_or_default().join("\n")
}
