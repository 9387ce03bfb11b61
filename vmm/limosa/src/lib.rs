//! The one program: the agent, the VMM, the demo and the commands. A library only so that a test build can carry it under
//! another name (`bin/limosa-failpoints.rs`); it reads the command line and hands on to `commands`, `vmm` and `demo`.
#![forbid(unsafe_code)]

mod args;
mod args_who;
mod commands;
mod demo;
mod fence;
mod output;
mod plan;
mod vmm;

use args::{Cli, Command, LogFormat};
use clap::Parser as _;
use commands::{Context, Ended};
use limosa_agent::api::Request;
use std::process::ExitCode;
use tracing_subscriber::EnvFilter;

/// The whole program, from its command line to its exit code.
#[must_use]
pub fn main() -> ExitCode {
    let cli = Cli::parse();
    let context = Context::new(&cli);
    start_logs(&cli);
    match run(&context, cli.command) {
        Ok(code) => ExitCode::from(code),
        Err(error) => {
            output::error(context.json, &error);
            ExitCode::from(error.exit)
        }
    }
}

fn run(context: &Context, command: Command) -> Ended {
    let local = match &command {
        Command::Agent { .. } => Some("agent"),
        Command::Vmm(_) => Some("vmm"),
        Command::Allow(_) => Some("allow"),
        Command::Demo(_) => Some("demo"),
        Command::Completions { .. } => Some("completions"),
        Command::Man { .. } => Some("man"),
        _ => None,
    };
    local.map_or(Ok(()), |what| context.here_only(what))?;
    match command {
        Command::Agent { config, check, no_sandbox, .. } => commands::agent::run(context, config.as_deref(), check, !no_sandbox),
        Command::Vmm(args) => vmm::run(&args),
        Command::Vm(command) => commands::vm::run(context, command),
        Command::Host(command) => commands::host::run(context, command),
        Command::Migrate(args) => commands::migrate::run(context, &args),
        Command::Check(args) => commands::check::run(context, args),
        Command::Jobs { watch, .. } => commands::jobs::list(context, watch),
        Command::Job { id, watch, .. } => commands::jobs::show(context, id, watch),
        Command::Cancel { id } => context.ask_done(&Request::Cancel { id }),
        Command::Verdict(args) => commands::jobs::verdict(context, args),
        Command::Announce { vm } => commands::announce::run(context, vm),
        Command::Allow(command) => commands::allow::run(context, command),
        Command::Fleet(command) => commands::fleet::run(context, command),
        Command::Operator(command) => commands::operator::run(context, command),
        Command::Ticket(command) => commands::ticket::run(context, command),
        Command::Demo(args) => demo::run(context, &args),
        Command::Completions { shell } => commands::manual::completions(shell),
        Command::Man { dir } => commands::manual::man(dir.as_deref()),
    }
}

/// Logs on standard error: the agent's and the VMM's from "info", a command's from "warn"; `LIMOSA_LOG` says otherwise.
fn start_logs(cli: &Cli) {
    let level = if matches!(cli.command, Command::Agent { .. } | Command::Vmm(_)) { "info" } else { "warn" };
    let filter = EnvFilter::try_from_env("LIMOSA_LOG").unwrap_or_else(|_| EnvFilter::new(level));
    let builder = tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr);
    // A second subscriber cannot be there: this is the only place that sets one.
    let _ = match cli.log_format {
        LogFormat::Text => builder.with_ansi(false).try_init(),
        LogFormat::Json => builder.json().try_init(),
    };
}
