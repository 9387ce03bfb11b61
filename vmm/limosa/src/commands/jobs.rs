//! `limosa jobs`, `job`, `cancel`, `verdict`: migrations of this host.

use super::{Context, Ended, strange};
use crate::args::{VerdictArgs, WhoseArg};
use crate::output;
use limosa_agent::api::{Answer, Decide, Direction, JobInfo, Request, Whose, exit};

pub(crate) fn list(context: &Context, watch: bool) -> Ended {
    let mut progress = output::Progress::new(context.json);
    let answer = context.ask_with(&Request::Jobs { watch }, |job| progress.show(job));
    progress.done();
    match answer? {
        Answer::Jobs(jobs) if context.json => output::json(&jobs),
        Answer::Jobs(jobs) => {
            let mut rows = vec![["JOB", "VM", "DIRECTION", "PEER", "STATE"].map(String::from).to_vec()];
            rows.extend(jobs.iter().map(row));
            output::table(&rows);
        }
        other => return Err(strange(&other)),
    }
    Ok(exit::DONE)
}

fn row(job: &JobInfo) -> Vec<String> {
    vec![job.id.to_string(), job.vm.clone(), direction(job).into(), job.peer.clone(), output::ending(job)]
}

fn direction(job: &JobInfo) -> &'static str {
    match job.direction {
        Direction::Outgoing => "outgoing",
        Direction::Incoming => "incoming",
        Direction::Saving => "saving",
        Direction::Restoring => "restoring",
    }
}

pub(crate) fn show(context: &Context, id: u64, watch: bool) -> Ended {
    let mut progress = output::Progress::new(context.json);
    let answer = context.ask_with(&Request::Job { id, watch }, |job| progress.show(job));
    progress.done();
    match answer? {
        Answer::Job(job) if context.json => output::json(&job),
        Answer::Job(job) => {
            let mut rows = vec![
                vec!["job".into(), job.id.to_string()],
                vec!["guest".into(), job.vm.clone()],
                vec![direction(&job).into(), job.peer.clone()],
                vec!["state".into(), output::ending(&job)],
            ];
            rows.extend(job.report.iter().flat_map(output::report_rows).map(|(name, value)| vec![name, value]));
            output::table(&rows);
        }
        other => return Err(strange(&other)),
    }
    Ok(exit::DONE)
}

pub(crate) fn verdict(context: &Context, args: VerdictArgs) -> Ended {
    let looked = args.i_have_looked_at_the_other_host;
    let decide = args.decide.map(|whose| Decide {
        whose: match whose {
            WhoseArg::Here => Whose::Here,
            WhoseArg::Gone => Whose::Gone,
        },
        reason: args.reason.unwrap_or_default(),
        looked,
    });
    match context.ask(&Request::Verdict { id: args.id, decide })? {
        Answer::Verdict(verdict) => {
            if context.json {
                output::json(&verdict);
            } else {
                verdict.journal.iter().for_each(output::line);
                output::line(&verdict.words);
                output::line(&verdict.vmm);
                output::line(&verdict.other);
            }
            Ok(verdict.state.exit())
        }
        other => Err(strange(&other)),
    }
}
