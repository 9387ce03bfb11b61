//! What the agent does with each request of a command. Thin: guests are in `vms`, moves in `outgoing`, and so on.

use crate::agent::Agent;
use crate::api::{Answer, ApiError, HostInfo, JobInfo, JobState, Request, Response};
use crate::audit::{Order, Who};
use crate::hosts::Host;
use crate::serve::Replies;
use crate::{
    announcing, check, cpu, leaving, links, operators, outgoing, pausing, rotation, snapshot, tickets, trusting, verdict,
};
use limosa_announce::Announcer;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

/// How often a watcher hears of a job at most.
const WATCH_INTERVAL: Duration = Duration::from_millis(100);

/// How long a cancel waits for its effect.
const CANCEL_MAX: Duration = Duration::from_secs(1);

/// Carries out `request` of `who`; an order goes on record, and how it ended.
pub(crate) async fn act(agent: &Arc<Agent>, request: Request, replies: &Replies, who: &Who) -> Result<Answer, ApiError> {
    let order = agent.audit.order(&request, who);
    let answer = carry_out(agent, request, replies, &who.by, order.as_ref()).await;
    if let Some(order) = &order {
        order.answered(&answer);
    }
    answer
}

async fn carry_out(
    agent: &Arc<Agent>,
    request: Request,
    replies: &Replies,
    who: &str,
    order: Option<&Order<'_>>,
) -> Result<Answer, ApiError> {
    let follow = async |id: u64| {
        if let Some(order) = order {
            order.begun(&agent.jobs, id);
        }
        follow(agent, id, replies).await
    };
    match request {
        Request::VmStart { config } => start(agent, config, replies).await,
        Request::VmList => blocking(agent, |agent| Ok(Answer::Vms(agent.vms.list()))).await,
        Request::VmShow { vm } => blocking(agent, move |agent| agent.vms.show(&vm).map(Answer::Vm)).await,
        Request::VmStop { vm } => {
            blocking(agent, move |agent| {
                agent.vms.stop(&vm)?;
                Ok(Answer::Done(format!("{vm} is stopped")))
            })
            .await
        }
        Request::VmPause { vm } => blocking(agent, move |agent| pausing::pause(agent, &vm).map(Answer::Done)).await,
        Request::VmResume { vm } => blocking(agent, move |agent| pausing::run_on(agent, &vm).map(Answer::Done)).await,
        Request::VmSave { vm, file, keep_running } => {
            let id = snapshot::save::begin(agent, vm, file, keep_running).await?;
            follow(id).await
        }
        Request::VmRestore { file, paused } => {
            let id = snapshot::restore::begin(agent, file, paused).await?;
            follow(id).await
        }
        Request::HostId => Ok(Answer::Host(own(agent))),
        Request::HostShow => blocking(agent, |agent| Ok(Answer::HostShow(Box::new(links::show(agent))))).await,
        Request::HostCpu => blocking(agent, |agent| Ok(Answer::HostCpu(Box::new(cpu::report(agent)?)))).await,
        Request::HostList => Ok(Answer::Hosts(agent.hosts.all().into_iter().map(Host::info).collect())),
        Request::HostAsk { address } => trusting::ask(agent, &address).await,
        Request::HostTrust(info) => blocking(agent, move |agent| trusting::trust(agent, &[info])).await,
        Request::HostTrustAll(all) => blocking(agent, move |agent| trusting::trust_all(agent, &all)).await,
        Request::HostRemove { name } => blocking(agent, move |agent| trusting::remove(agent, &name)).await,
        Request::HostRevoke { which, undo } => blocking(agent, move |agent| trusting::revoke(agent, &which, undo)).await,
        Request::HostStatement { text } => blocking(agent, move |agent| trusting::statement(agent, &text)).await,
        Request::HostRotate { overlap } => blocking(agent, move |agent| rotation::begin(agent, overlap)).await,
        Request::HostRotateFinish => blocking(agent, |agent| rotation::finish(agent)).await,
        Request::HostRevoked => Ok(Answer::Lines(agent.hosts.revoked().iter().map(ToString::to_string).collect())),
        Request::Allow(request) => blocking(agent, move |agent| trusting::allow(agent, request)).await,
        Request::Parties { vm, to } => {
            blocking(agent, move |agent| tickets::parties(agent, &vm, &to).map(|found| Answer::Parties(Box::new(found)))).await
        }
        Request::Migrate(request) => {
            if request.plan_only {
                return leaving::plan(agent, request).await.map(|plan| Answer::Plan(Box::new(plan)));
            }
            let id = outgoing::begin(agent, request).await?;
            follow(id).await
        }
        Request::Check(request) => Ok(Answer::Check(Box::new(check::check(agent, request).await?))),
        Request::Jobs { watch: false } => Ok(Answer::Jobs(agent.jobs.all())),
        Request::Jobs { watch: true } => watch_all(agent, replies).await,
        Request::Job { id, watch: false } => job(agent, id).map(|job| Answer::Job(Box::new(job))),
        Request::Job { id, watch: true } => self::follow(agent, id, replies).await,
        Request::Cancel { id } => cancel(agent, id).await.map(Answer::Done),
        Request::Verdict { id, decide } => verdict::verdict(agent, id, decide, who).await.map(Answer::Verdict),
        Request::Announce { vm } => blocking(agent, move |agent| announce(agent, &vm)).await,
    }
}

/// Cancels a job, and says what that means where it is.
async fn cancel(agent: &Arc<Agent>, id: u64) -> Result<String, ApiError> {
    let refused = |words: String| ApiError::refused("cancel", words);
    let mut changed = agent.jobs.watch();
    agent.jobs.cancel(id, "cancelled by command").map_err(refused)?;
    let ended =
        async { while job(agent, id).is_ok_and(|info| info.state == JobState::Running) && changed.changed().await.is_ok() {} };
    // Before the commit it ends at once, whatever the other host does.
    let _ = tokio::time::timeout(CANCEL_MAX, ended).await;
    let info = job(agent, id)?;
    match info.state {
        JobState::Aborted | JobState::Refused => Ok(format!("job {id} is cancelled: {}", info.words)),
        JobState::Done => Err(refused(format!("job {id} was past its commit: it is done, and cannot be cancelled"))),
        JobState::InDoubt => {
            Err(refused(format!("job {id} is past its commit and in doubt: it ends when the hosts can talk again")))
        }
        JobState::Running if info.progress.as_ref().is_some_and(|progress| progress.committing) => Err(refused(format!(
            "job {id} is at its commit, which nobody can take back: either the guest runs at the destination, or it comes back by \
             itself; `limosa job {id} --watch` shows it"
        ))),
        JobState::Running => Ok(format!("job {id} is asked to stop; `limosa job {id} --watch` shows how it ends")),
    }
}

/// Starts a guest; what is odd about it is told meanwhile.
async fn start(agent: &Arc<Agent>, config: PathBuf, replies: &Replies) -> Result<Answer, ApiError> {
    let (sender, mut warnings) = tokio::sync::mpsc::unbounded_channel();
    let warn = move |words: String| {
        tracing::warn!("{words}");
        // A command that went away needs no warning.
        let _ = sender.send(words);
    };
    let started = blocking(agent, move |agent| agent.vms.start(agent, &config, warn).map(Answer::Vm));
    let tell = async {
        while let Some(words) = warnings.recv().await {
            replies.send(Response::Warning(words)).await;
        }
    };
    tokio::join!(started, tell).0
}

/// Runs what may block away from the threads that answer others.
async fn blocking(
    agent: &Arc<Agent>,
    work: impl FnOnce(&Arc<Agent>) -> Result<Answer, ApiError> + Send + 'static,
) -> Result<Answer, ApiError> {
    let agent = Arc::clone(agent);
    let done = tokio::task::spawn_blocking(move || work(&agent)).await;
    done.unwrap_or_else(|error| Err(ApiError::refused("internal", format!("the agent failed inside: {error}"))))
}

fn own(agent: &Agent) -> HostInfo {
    let listen: Vec<String> = agent.config.listen.iter().map(ToString::to_string).collect();
    HostInfo { name: agent.config.name.clone(), id: agent.key.id().to_string(), address: listen.join(", ") }
}

fn job(agent: &Agent, id: u64) -> Result<JobInfo, ApiError> {
    agent.jobs.get(id).ok_or_else(|| operators::no_job(id))
}

/// Sends a job's progress until it has ended or is in doubt; its last state is the answer.
async fn follow(agent: &Arc<Agent>, id: u64, replies: &Replies) -> Result<Answer, ApiError> {
    let mut changed = agent.jobs.watch();
    loop {
        changed.mark_unchanged();
        let info = job(agent, id)?;
        if info.state != JobState::Running {
            return Ok(Answer::Job(Box::new(info)));
        }
        if !replies.send(Response::Progress(Box::new(info))).await {
            return Err(ApiError::refused("gone", "the command went away"));
        }
        tokio::select! {
            _ = changed.changed() => {}
            () = replies.gone() => {}
        }
        // The end must be told at once; anything before it at most ten times a second.
        if job(agent, id)?.state == JobState::Running {
            let ended = async {
                while job(agent, id).is_ok_and(|info| info.state == JobState::Running) && changed.changed().await.is_ok() {}
            };
            let _ = tokio::time::timeout(WATCH_INTERVAL, ended).await;
        }
    }
}

/// Sends every running job's progress until none is at work.
async fn watch_all(agent: &Arc<Agent>, replies: &Replies) -> Result<Answer, ApiError> {
    loop {
        let jobs = agent.jobs.all();
        let running: Vec<&JobInfo> = jobs.iter().filter(|job| !job.state.ended()).collect();
        if running.is_empty() {
            return Ok(Answer::Jobs(jobs));
        }
        for job in running {
            if !replies.send(Response::Progress(Box::new(job.clone()))).await {
                return Err(ApiError::refused("gone", "the command went away"));
            }
        }
        tokio::time::sleep(WATCH_INTERVAL * 2).await;
    }
}

fn announce(agent: &Agent, vm: &str) -> Result<Answer, ApiError> {
    let description = agent.vms.announceable(vm)?;
    let nics = announcing::nics(&agent.config, &description);
    if nics.is_empty() {
        return Err(ApiError::refused("no-nic", format!("{vm} has no NIC on a network of this host")));
    }
    let announcer = Announcer::open().map_err(|e| ApiError::refused("announce", e.to_string()))?;
    Ok(Answer::Announced(nics.iter().flat_map(|nic| announcing::words(&announcer.announce(nic, 0))).collect()))
}
