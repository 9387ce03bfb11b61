//! `limosa allow list|test|add|remove|reload`: the two allow-lists. With `--config` what a file says; without, what the agent has.

use super::{Context, Ended, strange};
use crate::args_who::AllowCommand;
use crate::output;
use limosa_agent::allow_api::{AllowAnswer, AllowReport, AllowRequest, AllowVerdict, RuleInfo};
use limosa_agent::api::{Answer, ApiError, Request, exit};
use limosa_agent::config::Config;
use limosa_agent::rules::verdict;
use limosa_proto::here::PRIORITY_DEFAULT;
use std::path::Path;

pub(crate) fn run(context: &Context, command: AllowCommand) -> Ended {
    let change = |request| context.ask_done(&Request::Allow(request));
    match command {
        AllowCommand::List { config } => {
            let report = match &config.config {
                Some(file) => of_file(file)?,
                None => match ask(context, AllowRequest::List)? {
                    AllowAnswer::List(report) => report,
                    other @ AllowAnswer::Test(_) => return Err(strange(&Answer::Allow(Box::new(other)))),
                },
            };
            Ok(list(context, &report))
        }
        AllowCommand::Test { address, here, config } => {
            let told = match &config.config {
                Some(file) => verdict(&read(file)?.lists(), &address, here.here)?,
                None => match ask(context, AllowRequest::Test { address, here: here.here })? {
                    AllowAnswer::Test(told) => told,
                    other @ AllowAnswer::List(_) => return Err(strange(&Answer::Allow(Box::new(other)))),
                },
            };
            Ok(test(context, &told))
        }
        AllowCommand::Add { rule, here, priority } => {
            change(AllowRequest::Add { rule, here: here.here.then(|| priority.unwrap_or(PRIORITY_DEFAULT)) })
        }
        AllowCommand::Remove { rule, here } => change(AllowRequest::Remove { rule, here: here.here }),
        AllowCommand::Reload => change(AllowRequest::Reload),
    }
}

fn ask(context: &Context, request: AllowRequest) -> Result<AllowAnswer, ApiError> {
    match context.ask(&Request::Allow(request))? {
        Answer::Allow(answer) => Ok(*answer),
        other => Err(strange(&other)),
    }
}

fn read(file: &Path) -> Result<Config, ApiError> {
    let config = Config::load(Some(file)).map_err(|e| ApiError::usage("configuration", e.to_string()))?;
    config.warnings.iter().for_each(|warning| output::note(format!("limosa: warning: {warning}")));
    Ok(config)
}

fn of_file(file: &Path) -> Result<AllowReport, ApiError> {
    let config = read(file)?;
    Ok(config.lists().report(&config.listen))
}

fn rows(rules: &[RuleInfo], name: &str) -> Vec<Vec<String>> {
    let priority = |text: String| rules.iter().any(|rule| rule.priority.is_some()).then_some(text);
    let head = [
        Some(name.to_owned()),
        Some("AS WRITTEN".into()),
        Some("NETWORK".into()),
        priority("PRIORITY".into()),
        Some("FROM".into()),
    ];
    let mut rows = vec![head.into_iter().flatten().collect()];
    rows.extend(rules.iter().map(|rule| {
        let from = if rule.from == "command" { "limosa allow add".to_owned() } else { rule.from.clone() };
        let of = rule.priority.map(|number| number.to_string());
        [Some(rule.position.to_string()), Some(rule.rule.clone()), Some(rule.network.clone()), of, Some(from)]
            .into_iter()
            .flatten()
            .collect()
    }));
    rows
}

fn list(context: &Context, report: &AllowReport) -> u8 {
    if context.json {
        output::json(report);
        return exit::DONE;
    }
    output::table(&rows(&report.peers, "PEERS"));
    if report.peers.is_empty() {
        output::note("limosa: the list is empty: no host may connect");
    }
    match &report.here {
        Some(rules) if rules.is_empty() => {
            output::note("limosa: the list of this host's addresses is empty: none takes migrations")
        }
        Some(rules) => {
            output::line("");
            output::table(&rows(rules, "HERE"));
        }
        None => output::note(format!(
            "limosa: no list of this host's addresses is set: migrations come to all of {}",
            report.listen.join(", ")
        )),
    }
    exit::DONE
}

fn test(context: &Context, told: &AllowVerdict) -> u8 {
    if context.json {
        output::json(told);
    } else {
        output::line(&told.words);
    }
    if told.allowed { exit::DONE } else { exit::REFUSED }
}
