//! `limosa agent`: runs this host's agent in the foreground.

use super::{Context, Ended};
use crate::{fence, output};
use limosa_agent::api::{ApiError, exit};
use limosa_agent::config::Config;
use std::path::Path;

pub(crate) fn run(context: &Context, file: Option<&Path>, check: bool, fenced: bool) -> Ended {
    let mut config = Config::load(file).map_err(|e| ApiError::usage("configuration", e.to_string()))?;
    for warning in &config.warnings {
        output::note(format!("limosa: warning: {warning}"));
    }
    if check {
        if context.json {
            output::json(&serde_json::json!({ "ok": true, "warnings": config.warnings }));
        } else {
            output::line("the configuration is good");
        }
        return Ok(exit::DONE);
    }
    if config.vmm_command.is_empty() {
        let own = std::env::current_exe()
            .map_err(|e| ApiError::refused("own-path", format!("the path of this program is not known: {e}")))?;
        config.vmm_command = vec![own.display().to_string(), "vmm".into()];
    }
    if fenced {
        let own = [config.state_dir.clone(), config.run_dir.clone()];
        // What is not there yet cannot be named by a rule.
        own.iter().for_each(|folder| drop(std::fs::create_dir_all(folder)));
        fence::restrict(&own).map_err(|words| ApiError::refused("sandbox", words))?;
    }
    limosa_agent::run(config).map_err(|e| ApiError::refused("agent", e.to_string()))?;
    Ok(exit::DONE)
}
