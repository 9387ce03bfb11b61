//! Fail points of an agent, armed and seen from outside (`transport/link/src/failpoints.rs`), and the binary that has them.
//! It knows no point by name; the tests do.

use crate::host::{AgentConfig, Host, PATIENCE};
use crate::process::{self, target_dir, wait_for};
use anyhow::{Context, Result, ensure};
use std::path::PathBuf;

/// The folder of a host's armed points.
pub(crate) fn folder(host: &Host) -> PathBuf {
    host.file("failpoints")
}

/// `limosa-failpoints`, built from the sources as they are now. It is never a release build: those have no fail points.
pub fn binary() -> Result<PathBuf> {
    // Whatever this test's own profile is.
    let target = target_dir()?.parent().context("target/PROFILE")?.join("debug");
    let _lock = process::lock("rig-build")?;
    let mut command = process::cargo();
    // Of the whole workspace, as `make test` has built it before: nothing is compiled within a test's time.
    command.args(["build", "--workspace", "--features", "limosa/failpoints", "--bin", "limosa-failpoints"]);
    let output = command.output().context("cannot start cargo")?;
    ensure!(output.status.success(), "no limosa-failpoints:\n{}", String::from_utf8_lossy(&output.stderr));
    Ok(target.join("limosa-failpoints"))
}

impl AgentConfig {
    /// The agent and its VMMs are this binary, and not the one under test.
    pub fn binary(mut self, binary: PathBuf) -> AgentConfig {
        self.binary = Some(binary);
        self
    }
}

impl Host {
    /// Arms a point: the next time that the agent reaches it, it does this once: "stop", "kill", "fail", "sleep MS".
    pub fn arm(&self, point: &str, action: &str) -> Result<()> {
        std::fs::create_dir_all(folder(self))?;
        // The agent may be looking at this very moment: whole, or not there.
        let beside = folder(self).join("new");
        std::fs::write(&beside, action)?;
        Ok(std::fs::rename(beside, folder(self).join(point))?)
    }

    /// No point is armed any more, and none was reached.
    pub fn disarm(&self) -> Result<()> {
        match std::fs::remove_dir_all(folder(self)) {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => Err(error.into()),
            _ => Ok(()),
        }
    }

    /// Whether the agent has come to a point that was armed.
    pub fn has_reached(&self, point: &str) -> bool {
        folder(self).join(format!("{point}.reached")).exists()
    }

    /// Waits until the agent stands still at a point that was armed with "stop".
    pub fn wait_stopped(&self, point: &str) -> Result<()> {
        let pid = self.agent_pid()?;
        let found = wait_for(PATIENCE, &format!("{} to stop at {point}", self.name), || {
            Ok((self.has_reached(point) && process::is_stopped(pid)).then_some(()))
        });
        found.with_context(|| format!("the agent's log: {}", crate::command::tail(&self.agent_log(), 20)))
    }
}
