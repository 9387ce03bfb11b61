//! `limosa operator id`: the operator's key, made at its first use. It asks no agent.

use super::{Context, Ended};
use crate::args::{KeyFile, OperatorCommand};
use crate::output;
use limosa_agent::api::{ApiError, exit};
use limosa_agent::operator::OperatorKey;
use std::path::PathBuf;

pub(crate) fn run(context: &Context, command: OperatorCommand) -> Ended {
    let OperatorCommand::Id { key } = command;
    let path = path_of(&key)?;
    let new = !path.exists();
    let key = OperatorKey::open(&path).map_err(|e| ApiError::usage("operator-key", e.to_string()))?;
    if new {
        output::note(format!("limosa: a new key was made: {}; whoever has that file is you", path.display()));
    }
    if context.json {
        output::json(&serde_json::json!({ "id": key.id().to_string(), "key": path }));
    } else {
        // Only the id: it is meant to be pasted.
        output::line(key.id().to_string());
    }
    Ok(exit::DONE)
}

/// Where the operator's key is.
pub(crate) fn path_of(key: &KeyFile) -> Result<PathBuf, ApiError> {
    if let Some(path) = &key.key {
        return Ok(path.clone());
    }
    let from = |name: &str| std::env::var_os(name).map(PathBuf::from).filter(|path| path.is_absolute());
    let directory = from("XDG_CONFIG_HOME").or_else(|| from("HOME").map(|home| home.join(".config")));
    let directory = directory
        .ok_or_else(|| ApiError::usage("operator-key", "neither HOME nor XDG_CONFIG_HOME is set: name the key by --key FILE"))?;
    Ok(directory.join("limosa/operator.key"))
}
