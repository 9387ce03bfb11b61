//! An operator of a lab: a key, made by the binary under test, and the rules that agents are given for it. What the rules mean
//! is the agents' business.

use crate::command::limosa;
use crate::process;
use anyhow::{Context, Result};
use std::path::{Path, PathBuf};

/// Everything that an operator can be allowed to do.
pub const ALL_ACTIONS: &[&str] =
    &["show", "migrate", "check", "cancel", "stop", "pause", "resume", "announce", "decide", "trust"];

/// An operator.
#[derive(Debug, Clone)]
pub struct Operator {
    /// The file of the key.
    pub key: PathBuf,
    /// The key's public half.
    pub id: String,
}

impl Operator {
    /// The operator whose key is in this folder; it is made if there is none.
    ///
    /// # Errors
    /// The binary does not make it.
    pub fn in_folder(folder: &Path) -> Result<Operator> {
        let key = folder.join("operator.key");
        let path = key.to_string_lossy().into_owned();
        let id = limosa(&["operator", "id", "--key", &path])?.expect_code(0).context("the lab's operator")?.stdout;
        Ok(Operator { id: id.trim().to_owned(), key })
    }

    /// One for machines that share no folder of a lab's: it lies beside what was built.
    ///
    /// # Errors
    /// See [`Operator::in_folder`].
    pub fn kept() -> Result<Operator> {
        let _lock = process::lock("rig-operator")?;
        Operator::in_folder(&process::target_dir()?.join("rig-operator"))
    }

    /// An `[[operator]]` that may do everything with every guest.
    pub fn rule(&self, name: &str) -> String {
        self.rule_for(name, &["*"], ALL_ACTIONS, &["*"])
    }

    /// An `[[operator]]` with these guests, actions and destinations.
    pub fn rule_for(&self, name: &str, vms: &[&str], actions: &[&str], destinations: &[&str]) -> String {
        format!(
            "\n[[operator]]\nname = \"{name}\"\nkey = \"{}\"\nvms = {vms:?}\nactions = {actions:?}\ndestinations = {destinations:?}\n",
            self.id
        )
    }
}
