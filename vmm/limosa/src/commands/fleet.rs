//! `limosa fleet id|sign`: a fleet's key and the statements that are made with it. It asks no agent.

use super::{Context, Ended};
use crate::args_who::{FleetCommand, FleetKeyFile};
use crate::output;
use limosa_agent::api::{ApiError, exit};
use limosa_agent::fleet::FleetKey;
use std::time::{SystemTime, UNIX_EPOCH};

pub(crate) fn run(context: &Context, command: FleetCommand) -> Ended {
    let (name, line) = match command {
        FleetCommand::Id { key } => {
            let new = !key.key.exists();
            let id = open(&key)?.id();
            if new {
                output::note(format!("limosa: a new key was made: {}; keep it off the fleet's hosts", key.key.display()));
            }
            ("id", id.to_string())
        }
        FleetCommand::Sign { name, id, address, life, key } => {
            if !key.key.exists() {
                let words = format!("{} is not there; `limosa fleet id --key` makes a key", key.key.display());
                return Err(ApiError::usage("fleet-key", words));
            }
            let until = SystemTime::now().checked_add(life).and_then(|time| time.duration_since(UNIX_EPOCH).ok());
            let until = until.ok_or_else(|| ApiError::usage("life", "no calendar has that date"))?.as_secs();
            let line = open(&key)?.member(&name, id, &address, until);
            ("statement", line.map_err(|words| ApiError::usage("fleet", words))?)
        }
    };
    if context.json {
        output::json(&serde_json::json!({ name: line }));
    } else {
        output::line(line);
    }
    Ok(exit::DONE)
}

fn open(key: &FleetKeyFile) -> Result<FleetKey, ApiError> {
    FleetKey::open(&key.key).map_err(|e| ApiError::usage("fleet-key", e.to_string()))
}
