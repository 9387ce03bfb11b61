//! `limosa migrate`: asks the agent to move a guest and shows how it goes.

use super::{Context, Ended, order, strange};
use crate::args::MigrateArgs;
use crate::{output, plan};
use limosa_agent::api::{Answer, JobInfo, JobState, Request};
use limosa_proto::ticket::Action;

pub(crate) fn run(context: &Context, args: &MigrateArgs) -> Ended {
    let mut request = plan::migrate_request(args)?;
    if !request.plan_only {
        let (order, link) = ((request.vm.as_str(), request.to.as_str()), request.link.as_deref());
        let ticket = order::ticket(context, order, Action::Migrate, link, args.ticket.as_deref())?;
        if let Some(ticket) = ticket.as_ref().filter(|_| args.print_ticket) {
            output::note(format!("ticket: {}", ticket.text()));
        }
        request.ticket = ticket.map(|ticket| ticket.text());
    }
    let mut progress = output::Progress::new(context.json);
    let (mut told, mut words) = (false, String::new());
    let answer = context.ask_with(&Request::Migrate(request), |job| {
        if !told && !context.json {
            let limosa = context.itself();
            output::note(format!("job {0}: if this command ends, the migration goes on; `{limosa} cancel {0}` stops it", job.id));
            told = true;
        }
        // Which link is tried now, and what became of the one before.
        if job.words != words && !context.json {
            words.clone_from(&job.words);
            output::note(&words);
        }
        progress.show(job);
    });
    progress.done();
    match answer? {
        Answer::Plan(plan) if context.json => output::json(&*plan),
        Answer::Plan(plan) => plan::show(&plan),
        Answer::Job(job) => return Ok(show(context, &job)),
        other => return Err(strange(&other)),
    }
    Ok(0)
}

/// Shows a job's end; gives the exit code.
fn show(context: &Context, job: &JobInfo) -> u8 {
    if context.json {
        output::json(&flat(job));
    } else {
        if job.state == JobState::Done {
            let paused = job.report.as_ref().is_some_and(|report| report.paused);
            output::line(format!("{} {} {}", job.vm, if paused { "is paused on" } else { "runs on" }, job.peer));
        }
        let rows: Vec<_> = job.report.iter().flat_map(output::report_rows).map(|(name, value)| vec![name, value]).collect();
        if job.state == JobState::Done {
            output::table(&rows);
        }
    }
    if job.state != JobState::Done {
        output::note(format!("limosa: {}: {}", job.vm, output::ending(job)));
    }
    job.state.exit()
}

/// The report with the job's own fields beside its own, as machines get it.
pub(crate) fn flat(job: &JobInfo) -> serde_json::Value {
    // Only a job without a report is judged here: a report says itself whether all was well.
    let ok = job.report.is_none().then_some(("ok", (job.state == JobState::Done).into()));
    output::with_job(&job.report, job, ok.into_iter().chain([("to", job.peer.clone().into())]))
}
