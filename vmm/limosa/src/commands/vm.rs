//! `limosa vm start|list|show|stop|pause|resume|save|restore`: guests on this host.

use super::{Context, Ended, absolute, strange};
use crate::args::VmCommand;
use crate::output;
use limosa_agent::api::{Answer, Direction, JobInfo, JobState, Request, VmInfo, exit};

pub(crate) fn run(context: &Context, command: VmCommand) -> Ended {
    let local = match &command {
        VmCommand::Start { .. } => Some("vm start"),
        VmCommand::Console { .. } => Some("vm console"),
        VmCommand::Save { .. } => Some("vm save"),
        VmCommand::Restore { .. } => Some("vm restore"),
        _ => None,
    };
    local.map_or(Ok(()), |what| context.here_only(what))?;
    let request = match command {
        VmCommand::Start { config } => Request::VmStart { config: absolute(&config)? },
        VmCommand::List => Request::VmList,
        VmCommand::Show { vm } => Request::VmShow { vm },
        VmCommand::Console { vm } => return super::console::run(context, vm),
        VmCommand::Stop { vm } => return context.ask_done(&Request::VmStop { vm }),
        VmCommand::Pause { vm } => return context.ask_done(&Request::VmPause { vm }),
        VmCommand::Resume { vm } => return context.ask_done(&Request::VmResume { vm }),
        VmCommand::Save { vm, to, keep_running, .. } => {
            return snapshot(context, &Request::VmSave { vm, file: absolute(&to)?, keep_running });
        }
        VmCommand::Restore { file, paused, .. } => {
            return snapshot(context, &Request::VmRestore { file: absolute(&file)?, paused });
        }
    };
    match context.ask(&request)? {
        Answer::Vm(vm) if context.json => output::json(&vm),
        Answer::Vm(vm) => show(&vm),
        Answer::Vms(vms) if context.json => output::json(&vms),
        Answer::Vms(vms) => list(&vms),
        other => return Err(strange(&other)),
    }
    Ok(exit::DONE)
}

/// Saves or restores, and shows how it goes.
fn snapshot(context: &Context, request: &Request) -> Ended {
    let mut progress = output::Progress::new(context.json);
    let answer = context.ask_with(request, |job| progress.show(job));
    progress.done();
    let job = match answer? {
        Answer::Job(job) => job,
        other => return Err(strange(&other)),
    };
    if context.json {
        output::json(&flat(&job));
    } else if let Some(snapshot) = &job.snapshot {
        let (vm, file, size) = (&job.vm, &job.peer, output::bytes(snapshot.file_bytes));
        let place = if job.direction == Direction::Saving { "is saved in" } else { "is restored from" };
        let (guest, seconds) = (&snapshot.guest, snapshot.total_ms / 1000.0);
        output::line(format!("{vm} {place} {file} ({size}, {} pages, {seconds:.1} s); here: {guest}", snapshot.pages));
    }
    if job.state != JobState::Done {
        output::note(format!("limosa: {}: {}", job.vm, output::ending(&job)));
    }
    Ok(job.state.exit())
}

/// What was written or read with the job's own fields beside it, as machines get it.
fn flat(job: &JobInfo) -> serde_json::Value {
    let of_its_own = [("ok", (job.state == JobState::Done).into()), ("file", job.peer.clone().into())];
    output::with_job(&job.snapshot, job, of_its_own)
}

fn show(vm: &VmInfo) {
    let mut rows = vec![
        vec!["name".into(), vm.name.clone()],
        vec!["id".into(), vm.id.clone()],
        vec!["state".into(), vm.state.clone()],
        vec!["memory".into(), output::bytes(vm.memory_bytes)],
        vec!["vCPUs".into(), vm.vcpus.to_string()],
        vec!["process".into(), vm.pid.to_string()],
    ];
    rows.extend(vm.nics.iter().map(|nic| vec!["NIC".into(), nic.clone()]));
    output::table(&rows);
}

fn list(vms: &[VmInfo]) {
    let mut rows = vec![["NAME", "STATE", "MEMORY", "VCPUS", "PROCESS"].map(String::from).to_vec()];
    let row = |vm: &VmInfo| {
        vec![vm.name.clone(), vm.state.clone(), output::bytes(vm.memory_bytes), vm.vcpus.to_string(), vm.pid.to_string()]
    };
    rows.extend(vms.iter().map(row));
    output::table(&rows);
}
