//! `limosa allow list|test`: what the allow-list in a configuration file says. It asks no agent: one that runs has the list
//! that was in the file when it started.

use super::{Context, Ended};
use crate::args::AllowCommand;
use crate::output;
use limosa_agent::api::{ApiError, exit};
use limosa_agent::config::Config;
use limosa_proto::allow::{self, Rule};
use std::path::Path;

pub(crate) fn run(context: &Context, command: AllowCommand) -> Ended {
    match command {
        AllowCommand::List { config } => list(context, &read(config.config.as_deref())?),
        AllowCommand::Test { address, config } => test(context, &read(config.config.as_deref())?, &address),
    }
}

fn read(file: Option<&Path>) -> Result<Config, ApiError> {
    let config = Config::load(file).map_err(|e| ApiError::usage("configuration", e.to_string()))?;
    config.warnings.iter().for_each(|warning| output::note(format!("limosa: warning: {warning}")));
    Ok(config)
}

fn as_json(rule: &Rule<'_>) -> serde_json::Value {
    serde_json::json!({ "position": rule.position, "rule": rule.text, "network": rule.network.to_string() })
}

fn list(context: &Context, config: &Config) -> Ended {
    if context.json {
        output::json(&config.allow.rules().map(|rule| as_json(&rule)).collect::<Vec<_>>());
        return Ok(exit::DONE);
    }
    let mut rows = vec![["RULE", "AS WRITTEN", "NETWORK"].map(String::from).to_vec()];
    rows.extend(config.allow.rules().map(|r| vec![r.position.to_string(), r.text.to_owned(), r.network.to_string()]));
    output::table(&rows);
    if config.allow.networks().is_empty() {
        output::note("limosa: the list is empty: no host may connect");
    }
    Ok(exit::DONE)
}

fn test(context: &Context, config: &Config, address: &str) -> Ended {
    let address = allow::parse_address(address).map_err(|e| ApiError::usage("address", e.to_string()))?;
    let decision = config.allow.decide(address);
    if context.json {
        let rule = decision.rule.as_ref().map(as_json);
        let words = decision.to_string();
        output::json(&serde_json::json!({
            "address": decision.address, "allowed": decision.allowed, "rule": rule, "rules": decision.rules, "words": words,
        }));
    } else {
        output::line(decision.to_string());
    }
    Ok(if decision.allowed { exit::DONE } else { exit::REFUSED })
}
