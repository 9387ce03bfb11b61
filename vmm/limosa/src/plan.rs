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
    let switch = |on: bool, off: bool| if on || off { Some(on) } else { None };
    Ok(MigrateRequest {
        vm: args.vm.clone(),
        to: args.to.clone(),
        link: args.link.map(|link| link.name().to_owned()),
        page_check: switch(args.page_check, args.no_page_check),
        lanes: args.lanes,
        plaintext: switch(args.plaintext, args.no_plaintext),
        downtime_target_ms: args.downtime.map(ms),
        downtime_ms_max: args.downtime_max.map(ms),
        on_no_convergence: args.on_no_convergence.clone(),
        bandwidth: args.bandwidth,
        quick: switch(args.quick, args.no_quick),
        plan_only: args.print_plan,
        ticket: None,
    })
}

/// The plan, and the command that carries out exactly it.
pub(crate) fn show(plan: &Plan) {
    let protection = output::protection(&plan.link, plan.encrypted);
    let plural = if plan.lanes == 1 { "" } else { "s" };
    let mut rows = vec![
        ("guest", format!("{} ({}, {})", plan.vm, output::bytes(plan.memory_bytes), plan.vm_id)),
        ("to", format!("{} at {}", plan.to.name, plan.to.address)),
        ("link", format!("{}, {} lane{plural}, {protection}", plan.link, plan.lanes)),
        ("  why", plan.link_reason.clone()),
    ];
    if plan.links.len() > 1 {
        rows.push(("  in this order", plan.links.join(", ")));
    }
    rows.extend(plan.links_tried.iter().map(|one| ("  looked at", output::tried(one))));
    if plan.link == "rdma" && !plan.page_check {
        rows.push(("page check", "off, unless the destination demands it".into()));
    }
    match (plan.paused, plan.quick) {
        (true, _) => rows.push(("downtime", "none: it is paused, and stays so there until `limosa vm resume`".into())),
        (false, true) => rows.push(("downtime", "quick: it stands still until all of its memory is there".into())),
        (false, false) => rows.extend([
            ("downtime", format!("{} ms aimed at, {} ms at most", plan.downtime_target_ms, plan.downtime_ms_max)),
            ("no convergence", plan.on_no_convergence.clone()),
        ]),
    }
    rows.extend([
        ("bandwidth", if plan.bandwidth == 0 { "no limit".into() } else { format!("{}/s", output::bytes(plan.bandwidth)) }),
        ("command", command(plan)),
    ]);
    output::table(&rows.into_iter().map(|(name, value)| vec![name.to_string(), value]).collect::<Vec<_>>());
}

/// The command line that says everything of `plan`.
fn command(plan: &Plan) -> String {
    let protection = match plan.plaintext {
        Some(true) => " --plaintext",
        Some(false) => " --no-plaintext",
        None => "",
    };
    format!(
        "limosa migrate {} --to {} --link {} --lanes {}{protection} {} --downtime {}ms --downtime-max {}ms \
         --on-no-convergence {} --bandwidth {} {}",
        plan.vm,
        plan.to.name,
        plan.link_wanted,
        plan.lanes,
        if plan.page_check { "--page-check" } else { "--no-page-check" },
        plan.downtime_target_ms,
        plan.downtime_ms_max,
        plan.on_no_convergence,
        plan.bandwidth,
        if plan.quick { "--quick" } else { "--no-quick" }
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
            link_wanted: "quic".into(),
            link: "quic".into(),
            link_reason: String::new(),
            links: vec!["quic".into()],
            links_tried: Vec::new(),
            plaintext: Some(false),
            encrypted: true,
            page_check: false,
            lanes: 2,
            quick: true,
            paused: false,
            downtime_target_ms: 50,
            downtime_ms_max: 2000,
            on_no_convergence: "abort".into(),
            bandwidth: 1000,
        };
        let typed = request(&command(&plan)).unwrap();
        assert_eq!((typed.lanes, typed.plaintext, typed.bandwidth), (Some(2), Some(false), Some(1000)));
        assert_eq!((typed.link.as_deref(), typed.page_check, typed.quick), (Some("quic"), Some(false), Some(true)));
        let typed = request(&command(&Plan { plaintext: None, ..plan })).unwrap();
        assert_eq!(typed.plaintext, None, "what was left open stays open");
        assert_eq!((typed.downtime_target_ms, typed.downtime_ms_max), (Some(50), Some(2000)));
        assert_eq!(typed.on_no_convergence.as_deref(), Some("abort"));
    }
}
