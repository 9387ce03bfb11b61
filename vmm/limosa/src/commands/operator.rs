//! `limosa operator id|trust|hosts|forget`: the operator's key, made at its first use, and the hosts that the operator knows. It
//! asks no agent.

use super::{Context, Ended};
use crate::args::OperatorCommand;
use crate::output;
use limosa_agent::api::{ApiError, HostInfo, exit};
use limosa_agent::operator::OperatorKey;
use limosa_agent::remote;
use std::path::PathBuf;

pub(crate) fn run(context: &Context, command: OperatorCommand) -> Ended {
    context.here_only("operator")?;
    match command {
        OperatorCommand::Id => id(context),
        OperatorCommand::Trust { name, id, address } => {
            done(context, &remote::trust(&directory()?, &HostInfo { name, id, address })?)
        }
        OperatorCommand::Forget { name } => done(context, &remote::forget(&directory()?, &name)?),
        OperatorCommand::Hosts => hosts(context),
    }
}

fn done(context: &Context, words: &str) -> Ended {
    if context.json {
        output::json(&serde_json::json!({ "done": words }));
    } else {
        output::line(words);
    }
    Ok(exit::DONE)
}

fn hosts(context: &Context) -> Ended {
    let info = |host: limosa_agent::hosts::Host| HostInfo { name: host.name, id: host.id.to_string(), address: host.address };
    let hosts: Vec<HostInfo> = remote::known(&directory()?)?.all().into_iter().map(info).collect();
    if context.json {
        output::json(&hosts);
    } else {
        super::host::table(hosts);
    }
    Ok(exit::DONE)
}

fn id(context: &Context) -> Ended {
    let path = path_of(context)?;
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

/// Where an operator's files are: the key, and the known hosts.
pub(crate) fn directory() -> Result<PathBuf, ApiError> {
    let from = |name: &str| std::env::var_os(name).map(PathBuf::from).filter(|path| path.is_absolute());
    let directory = from("XDG_CONFIG_HOME").or_else(|| from("HOME").map(|home| home.join(".config")));
    let words =
        "neither HOME nor XDG_CONFIG_HOME is set: there is no place for an operator's key (--key FILE names one) and known hosts";
    Ok(directory.ok_or_else(|| ApiError::usage("operator-key", words))?.join("limosa"))
}

/// Where the operator's key is.
pub(crate) fn path_of(context: &Context) -> Result<PathBuf, ApiError> {
    match &context.key {
        Some(path) => Ok(path.clone()),
        None => Ok(directory()?.join("operator.key")),
    }
}
