//! `limosa check`: asks the agent whether a guest could move, and shows every reason why not or what it would take.

use super::{Context, Ended, order, strange};
use crate::args::CheckArgs;
use crate::output;
use limosa_agent::api::{Answer, CheckReport, Estimate, MigrateRequest, Request, exit};
use limosa_proto::ticket::Action;

pub(crate) fn run(context: &Context, args: CheckArgs) -> Ended {
    let link = args.link.map(|link| link.name().to_owned());
    let ticket = order::ticket(context, (&args.vm, &args.to), Action::Check, link.as_deref(), args.ticket.as_deref())?;
    let ticket = ticket.map(|ticket| ticket.text());
    let request = MigrateRequest { vm: args.vm, to: args.to, link, ticket, ..MigrateRequest::default() };
    let report = match context.ask(&Request::Check(request))? {
        Answer::Check(report) => report,
        other => return Err(strange(&other)),
    };
    if context.json {
        output::json(&report);
    } else {
        output::table(&rows(&report));
    }
    if !report.ok && !context.json {
        output::note(format!("limosa: {} cannot move to {} as things are; nothing was changed", report.vm, report.to.name));
    }
    Ok(if report.ok { exit::DONE } else { exit::REFUSED })
}

fn rows(report: &CheckReport) -> Vec<Vec<String>> {
    let row = |name: &str, value: String| vec![name.to_owned(), value];
    if !report.ok {
        let mut rows: Vec<_> = report.reasons.iter().map(|reason| row(&reason.id, reason.words.clone())).collect();
        rows.extend(report.advice.iter().map(|advice| row("advice", advice.clone())));
        return rows;
    }
    let mut rows = vec![row("ok", format!("{} can move to {} at {}", report.vm, report.to.name, report.to.address))];
    if let Some(plan) = &report.plan {
        let protection = output::protection(&plan.link, plan.encrypted);
        rows.push(row("link", format!("{}, {protection}: {}", plan.link, plan.link_reason)));
    }
    rows.extend(report.estimate.iter().flat_map(estimate_rows));
    rows
}

fn estimate_rows(estimate: &Estimate) -> Vec<Vec<String>> {
    let speed = match (estimate.bytes_per_s, estimate.seconds) {
        (Some(rate), Some(seconds)) => {
            format!(", {seconds:.1} s at the {}/s of a short probe if all of it is sent once", output::bytes(rate as u64))
        }
        _ => String::new(),
    };
    vec![
        vec!["memory".into(), format!("{}{speed}", output::bytes(estimate.memory_bytes))],
        vec!["downtime".into(), format!("{} ms are aimed at", estimate.downtime_target_ms)],
    ]
}

#[cfg(test)]
mod tests {
    use super::*;
    use limosa_agent::api::HostInfo;
    use limosa_proto::wire::message::Reason;

    #[test]
    fn every_reason_has_its_line() {
        let reason = |id: &str, words: &str| Reason { id: id.into(), words: words.into() };
        let report = CheckReport {
            vm: "web".into(),
            to: HostInfo { name: "beta".into(), id: String::new(), address: "10.0.0.2:13560".into() },
            ok: false,
            reasons: vec![reason("cpu-feature", "no avx2"), reason("network-missing", "no lan")],
            advice: Some("start it elsewhere".into()),
            plan: None,
            estimate: None,
        };
        let shown = rows(&report);
        assert_eq!(shown.iter().filter_map(|row| row.first()).collect::<Vec<_>>(), ["cpu-feature", "network-missing", "advice"]);
        let estimate =
            Estimate { memory_bytes: 1 << 30, bytes_per_s: Some(1073741824.0), seconds: Some(1.0), downtime_target_ms: 50 };
        let report = CheckReport { ok: true, reasons: vec![], advice: None, estimate: Some(estimate), ..report };
        let text: Vec<String> = rows(&report).into_iter().map(|row| row.join(" ")).collect();
        assert_eq!(text.len(), 3);
        assert!(text.iter().any(|line| line.contains("1.0 GiB, 1.0 s at the 1.0 GiB/s")), "{text:?}");
    }
}
