//! From what was typed to what the agent is asked, and the resolved plan as people read it.
//! What is absent on the command line is filled in by the agent, from its configuration.

use crate::args::MigrateArgs;
use crate::output;
use limosa_agent::api::{ApiError, MigrateRequest, Plan};
use std::time::Duration;

/// The request for `limosa migrate`.
pub(crate) fn migrate_request(args: &MigrateArgs) -> Result<MigrateRequest, ApiError> {
    if args.downtime.zip(args.downtime_max).is_some_and(|(target, most)| target > most) {
        return Err(ApiError::usage("downtime", "--downtime is longer than --downtime-max"));
    }
    let ms = |duration: Duration| u64::try_from(duration.as_millis()).unwrap_or(u64::MAX);
    let plaintext = match (args.plaintext, args.no_plaintext) {
        (true, _) => Some(true),
        (_, true) => Some(false),
        _ => None,
    };
    Ok(MigrateRequest {
        vm: args.vm.clone(),
        to: args.to.clone(),
        lanes: args.lanes,
        plaintext,
        downtime_target_ms: args.downtime.map(ms),
        downtime_ms_max: args.downtime_max.map(ms),
        on_no_convergence: args.on_no_convergence.clone(),
        bandwidth: args.bandwidth,
        plan_only: args.print_plan,
    })
}

/// The plan, and the command that carries out exactly it.
pub(crate) fn show(plan: &Plan) {
    let rows = [
        ("guest", format!("{} ({}, {})", plan.vm, output::bytes(plan.memory_bytes), plan.vm_id)),
        ("to", format!("{} at {}", plan.to.name, plan.to.address)),
        ("link", format!("{}, {} lanes, {}", plan.link, plan.lanes, if plan.encrypted { "encrypted" } else { "PLAIN TEXT" })),
        ("downtime", format!("{} ms aimed at, {} ms at most", plan.downtime_target_ms, plan.downtime_ms_max)),
        ("no convergence", plan.on_no_convergence.clone()),
        ("bandwidth", if plan.bandwidth == 0 { "no limit".into() } else { format!("{}/s", output::bytes(plan.bandwidth)) }),
        ("command", command(plan)),
    ];
    output::table(&rows.map(|(name, value)| vec![name.to_string(), value]));
}

/// The command line that says everything of `plan`.
fn command(plan: &Plan) -> String {
    format!(
        "limosa migrate {} --to {} --lanes {} {} --downtime {}ms --downtime-max {}ms --on-no-convergence {} --bandwidth {}",
        plan.vm,
        plan.to.name,
        plan.lanes,
        if plan.encrypted { "--no-plaintext" } else { "--plaintext" },
        plan.downtime_target_ms,
        plan.downtime_ms_max,
        plan.on_no_convergence,
        plan.bandwidth
    )
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use crate::args::{Cli, Command};
    use clap::Parser as _;
    use limosa_agent::api::HostInfo;

    fn request(line: &str) -> Result<MigrateRequest, ApiError> {
        let Command::Migrate(args) = Cli::try_parse_from(line.split_whitespace()).unwrap().command else { unreachable!() };
        migrate_request(&args)
    }

    #[test]
    fn what_is_not_typed_is_left_to_the_agent() {
        let typed = request("limosa migrate web --to beta").unwrap();
        assert_eq!(typed, MigrateRequest { vm: "web".into(), to: "beta".into(), ..MigrateRequest::default() });
        let error = request("limosa migrate web --to beta --downtime 3s --downtime-max 1s").unwrap_err();
        assert_eq!(error.exit, 2);
    }

    #[test]
    fn the_plans_command_says_it_all() {
        let to = HostInfo { name: "beta".into(), id: String::new(), address: "10.0.0.2:13560".into() };
        let plan = Plan {
            vm: "web".into(),
            vm_id: String::new(),
            memory_bytes: 1 << 30,
            to,
            link: "tcp".into(),
            encrypted: true,
            lanes: 2,
            downtime_target_ms: 50,
            downtime_ms_max: 2000,
            on_no_convergence: "abort".into(),
            bandwidth: 1000,
        };
        let typed = request(&command(&plan)).unwrap();
        assert_eq!((typed.lanes, typed.plaintext, typed.bandwidth), (Some(2), Some(false), Some(1000)));
        assert_eq!((typed.downtime_target_ms, typed.downtime_ms_max), (Some(50), Some(2000)));
        assert_eq!(typed.on_no_convergence.as_deref(), Some("abort"));
    }
}
