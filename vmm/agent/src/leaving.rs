//! A guest's way out: the choice of a link, one attempt after the other until pages move, and the job's end.
//! What is chosen is decided by `limosa_link::choose`; each attempt is carried out by `limosa_link`'s driver.

use crate::agent::Agent;
use crate::api::{ApiError, JobProgress, JobState, MigrateRequest, Plan};
use crate::check::advice;
use crate::hosts::Host;
use crate::jobs::Ending;
use crate::links;
use crate::networks;
use crate::outgoing::{KeptFrames, Prepared, Sending, resolve};
use crate::pages::GuestPages;
use crate::settle;
use crate::tickets;
use crate::vm::{Vm, VmState};
use limosa_link::choose::{Candidate, Choice, Found, NoLink, Protection, Wanted, choose, look, may_fall_back};
use limosa_link::failpoints::{self, Point};
use limosa_link::{Cancel, LaneSettings, Link, run_source_over};
use limosa_proto::event::{Course, Deadlines, Side, SourceConfig, SourceOutcome};
use limosa_proto::identity::{Generation, MigrationId};
use limosa_proto::memory::PAGE_BYTES;
use limosa_proto::precopy::{NoConvergence, PrecopyPolicy};
use limosa_proto::progress::Progress;
use limosa_proto::recovery::Ended;
use limosa_proto::report::{LinkTried, Measured, Report};
use limosa_proto::state::SourceState;
use limosa_proto::ticket::TicketBytes;
use limosa_proto::wire::code::Code;
use limosa_proto::wire::message::{Refusal, VmDescription};
use std::sync::{Arc, PoisonError};
use std::time::{Duration, Instant};
use tokio::sync::watch;

/// How long a VMM may take to end after its guest has left.
const LEAVE_MAX: Duration = Duration::from_secs(5);
/// How long a destination may take to forget an attempt that failed, and how often it is asked meanwhile.
const FORGET_MAX: Duration = Duration::from_secs(5);
const FORGET_INTERVAL: Duration = Duration::from_millis(200);

/// What would be done, to which host, and over which link: that, or why there is none.
pub(crate) struct Planned {
    pub(crate) plan: Plan,
    pub(crate) host: Host,
    pub(crate) link: Result<Arc<dyn Link>, NoLink>,
}

/// What would be done, and over which links; nothing is begun.
///
/// # Errors
/// Why it could not be done.
pub(crate) async fn plan(agent: &Arc<Agent>, request: MigrateRequest) -> Result<Plan, ApiError> {
    let Planned { plan, link, .. } = planned(agent, request).await?;
    link.map(|_| plan).map_err(|none| ApiError::refused(none.code.id(), none.words))
}

/// The plan as far as there is one; nothing is begun.
///
/// # Errors
/// No such guest or host, or a request that makes no sense.
pub(crate) async fn planned(agent: &Arc<Agent>, request: MigrateRequest) -> Result<Planned, ApiError> {
    let resolving = Arc::clone(agent);
    let resolved = tokio::task::spawn_blocking(move || resolve(&resolving, &request)).await;
    let (mut plan, host, wanted) = resolved.map_err(|e| ApiError::refused("internal", e.to_string()))??;
    let (found, choice) = chosen(agent, &host, wanted, plan.plaintext).await;
    let choice = match choice {
        Ok(choice) => choice,
        Err(none) => return Ok(Planned { plan, host, link: Err(none) }),
    };
    let first = choice.current();
    if let Some(first) = first {
        plan.link = first.kind.name().to_owned();
        plan.encrypted = !first.plaintext;
    }
    let link = first.and_then(|first| found.link(first.kind));
    plan.links = choice.candidates().iter().map(|one| one.kind.name().to_owned()).collect();
    plan.link_reason = choice.reason().to_owned();
    plan.links_tried = choice.tried().to_vec();
    let link = link.ok_or_else(|| NoLink {
        code: Code::Internal,
        words: "the link that was chosen was not opened".to_owned(),
        tried: Vec::new(),
    });
    Ok(Planned { plan, host, link })
}

/// Looks for links and puts them in order.
async fn chosen(agent: &Arc<Agent>, host: &Host, wanted: Wanted, plaintext: Option<bool>) -> (Found, Result<Choice, NoLink>) {
    let (asking, to) = (Arc::clone(agent), host.clone());
    // Devices are opened for it.
    let reach = tokio::task::spawn_blocking(move || links::reach(&asking, &to, wanted)).await;
    let found = match reach {
        Ok(reach) => look(&reach, wanted).await,
        Err(error) => {
            tracing::error!(%error, "looking for links failed");
            Found::default()
        }
    };
    let protection = match plaintext {
        Some(true) => Protection::PlainText,
        Some(false) => Protection::Encrypted,
        None => Protection::EncryptedOrTrusted,
    };
    let choice = choose(wanted, protection, &found.seen);
    (found, choice)
}

/// Carries a migration out, from the choice of its link to the end of its job.
pub(crate) async fn carry_out(
    agent: Arc<Agent>,
    id: u64,
    prepared: Prepared,
    (migration, generation): (MigrationId, Generation),
    cancel: Cancel,
) {
    let Prepared { plan, host, wanted, claim, pages, description, marks, ticket } = prepared;
    failpoints::pass(Some(Point::SourceBegins));
    let (vm, to) = (Arc::clone(claim.vm()), host.name.clone());
    vm.on_lost(Some(cancel.clone()));
    vm.end_announcing();
    let kept = KeptFrames::default();
    let mut leaving = Leaving { agent, id, plan, host, vm, pages, description, migration, generation, cancel, kept, ticket };
    let (outcome, report) = leaving.leave(wanted).await;
    let Leaving { agent, vm, kept, migration, generation, .. } = leaving;
    // Whatever came of it, nobody looks for them any more. Before the job ends, so that who waits for it finds none.
    let _ = tokio::task::spawn_blocking(move || drop(marks)).await;
    let mut ending = ending(&outcome, report);
    if let SourceOutcome::Refused(refusal) = &outcome
        && let Some(words) = advice(&refusal.reasons, &agent.config.name, &to)
    {
        ending.words = format!("{}; {words}", ending.words);
    }
    if let Some((_, words)) = vm.decided() {
        ending.words = words;
    }
    tracing::info!(job = id, vm = vm.name, state = ?ending.state, words = ending.words, "the migration has ended");
    match &outcome {
        SourceOutcome::Committed => settle::owe(&agent, migration, generation, Ended::Gone),
        SourceOutcome::Aborted { .. } | SourceOutcome::Refused(_) => settle::owe(&agent, migration, generation, Ended::Stayed),
        SourceOutcome::InDoubt { .. } => {}
    }
    let finishing = Arc::clone(&agent);
    let finish = move || {
        match outcome {
            SourceOutcome::Committed => {
                // The destination has announced the guest once by now, so they find the way.
                send_on(&vm.name, &kept);
                failpoints::pass(Some(Point::SourceEndsVmm));
                let told = vm.connection().map(|connection| connection.release());
                if let Some(Err(error)) = told {
                    tracing::debug!(vm = vm.name, %error, "the VMM did not take the order to end; it is ended");
                }
                vm.end_within(LEAVE_MAX);
                finishing.vms.remove(vm.id);
            }
            SourceOutcome::InDoubt { .. } => vm.set_state(VmState::Paused),
            SourceOutcome::Aborted { guest_runs: false, .. } if !vm.has_ended() => settle::keep_taking_up(&vm),
            SourceOutcome::Aborted { .. } | SourceOutcome::Refused(_) => {}
        }
        drop(claim);
    };
    // A VMM that takes long to end must not hold up the threads that answer others.
    let _ = tokio::task::spawn_blocking(finish).await;
    failpoints::pass(Some(Point::SourceEnds));
    agent.jobs.end(id, ending);
}

/// Sends what came to the guest's ports here on to where it is now.
fn send_on(vm: &str, kept: &KeptFrames) {
    for port in kept.lock().unwrap_or_else(PoisonError::into_inner).drain(..) {
        let bridge = port.bridge().to_owned();
        let Some(own) = networks::own_mac(&bridge) else { continue };
        let frames = port.send_on(own);
        tracing::info!(vm, bridge, frames, "frames that came for the guest in its pause were sent on");
    }
}

/// One guest on its way out.
struct Leaving {
    agent: Arc<Agent>,
    id: u64,
    plan: Plan,
    host: Host,
    vm: Arc<Vm>,
    pages: Arc<GuestPages>,
    description: VmDescription,
    migration: MigrationId,
    /// Of the attempt that is made.
    generation: Generation,
    cancel: Cancel,
    kept: KeptFrames,
    ticket: Option<TicketBytes>,
}

impl Leaving {
    /// Tries link after link until pages have begun to move, or there is no other.
    async fn leave(&mut self, wanted: Wanted) -> (SourceOutcome, Report) {
        let phase = "choosing a link".to_owned();
        self.agent.jobs.progress(self.id, JobProgress { phase, memory_bytes: self.plan.memory_bytes, ..JobProgress::default() });
        let (found, choice) = tokio::select! {
            biased;
            words = self.cancel.cancelled() => {
                let outcome = SourceOutcome::Aborted { code: Code::Cancelled, words, by: Side::Source, guest_runs: true };
                return self.nothing(outcome, Vec::new());
            }
            chosen = chosen(&self.agent, &self.host, wanted, self.plan.plaintext) => chosen,
        };
        let mut choice = match choice {
            Ok(choice) => choice,
            Err(NoLink { code, words, tried }) => {
                return self.nothing(SourceOutcome::Refused(Refusal::one(code, words)), tried);
            }
        };
        let mut forgetting: Option<Instant> = None;
        loop {
            let current = choice.current().cloned();
            let Some((candidate, link)) = current.and_then(|one| found.link(one.kind).map(|link| (one, link))) else {
                let words = "a link that was chosen is not there";
                return self.nothing(SourceOutcome::Refused(Refusal::one(Code::Internal, words)), choice.tried().to_vec());
            };
            self.tell(&candidate, &choice);
            let (outcome, mut report, begun) = self.attempt(&candidate, link).await;
            let echo = forgetting.is_some_and(|until| Instant::now() < until) && is_echo(&outcome);
            if echo && !self.cancel.is_cancelled() {
                tokio::time::sleep(FORGET_INTERVAL).await;
                self.again();
                continue;
            }
            let failed = may_fall_back(candidate.kind, &outcome, begun).filter(|_| !self.cancel.is_cancelled());
            if let Some(words) = failed {
                tracing::warn!(job = self.id, link = %candidate.kind, words, "the link failed before the first round");
                if choice.fall_back(&words).is_some() {
                    forgetting = Some(Instant::now() + FORGET_MAX);
                    self.again();
                    continue;
                }
            }
            report.link_reason = choice.reason().to_owned();
            report.links_tried = choice.tried().to_vec();
            return (outcome, report);
        }
    }

    /// Says which link is tried now, and why.
    fn tell(&self, candidate: &Candidate, choice: &Choice) {
        let words = format!("over {}: {}", candidate.kind, choice.reason());
        tracing::info!(job = self.id, vm = self.vm.name, words, "the guest leaves");
        self.agent.jobs.update(self.id, |info| info.words = words);
    }

    /// The next attempt is another one to both hosts.
    fn again(&mut self) {
        let next = self.agent.journal().next_generation(self.description.id);
        // One that was refused before its first record is not in the journal.
        self.generation = next.max(Generation(self.generation.0.saturating_add(1)));
        let generation = self.generation.0;
        self.agent.jobs.update(self.id, |info| info.generation = generation);
    }

    /// One attempt over one link; also whether its first round began.
    async fn attempt(&self, candidate: &Candidate, link: Arc<dyn Link>) -> (SourceOutcome, Report, bool) {
        let config = self.config(candidate);
        let lanes = LaneSettings { bandwidth_bytes_per_s: self.plan.bandwidth, ..LaneSettings::default() };
        let (progress, seen) = watch::channel(Progress::new(self.description.memory.bytes()));
        let last = seen.clone();
        let showing = tokio::spawn(show(Arc::clone(&self.agent), self.id, seen));
        let sending = Box::new(Sending::new(&self.agent, &self.vm, &self.pages, &self.kept));
        let (outcome, report) = run_source_over(link, config, lanes, false, sending, self.cancel.clone(), progress).await;
        // The last progress has been sent by now, and the sender is gone.
        let _ = showing.await;
        let begun = last.borrow().round > 0;
        (outcome, report, begun)
    }

    fn config(&self, candidate: &Candidate) -> SourceConfig {
        let (set, plan) = (&self.agent.config.migration, &self.plan);
        let downtime_max = Duration::from_millis(plan.downtime_ms_max);
        let no_convergence = if plan.on_no_convergence == "abort" { NoConvergence::Abort } else { NoConvergence::LongerDowntime };
        let usual = Deadlines::default();
        let course = match (plan.paused, plan.quick) {
            (true, _) => Course::Paused,
            (false, true) => Course::Quick,
            (false, false) => Course::Precopy,
        };
        SourceConfig {
            course,
            lanes: plan.lanes,
            plaintext_lanes: candidate.plaintext,
            page_check: plan.page_check,
            policy: PrecopyPolicy {
                downtime_target: Duration::from_millis(plan.downtime_target_ms),
                downtime_max,
                on_no_convergence: no_convergence,
                ..PrecopyPolicy::default()
            },
            keepalive: set.keepalive,
            peer_silence_max: set.silence_max,
            // A guest that may stand still for long must not be given up in the middle of it.
            deadlines: Deadlines { stopped: usual.stopped.max(downtime_max * 2), ..usual },
            ticket: self.ticket.clone(),
            ..SourceConfig::new(self.migration, self.generation, self.host.id, self.description.clone())
        }
    }

    /// The end of a migration of which no attempt was made.
    fn nothing(&self, outcome: SourceOutcome, tried: Vec<LinkTried>) -> (SourceOutcome, Report) {
        let measured =
            Measured { link: "none".to_owned(), page_check: None, source_cpu_seconds: 0.0, verified: None, network_gap_ms: None };
        let mut report = Report::new(&Progress::new(self.plan.memory_bytes), &outcome, measured);
        report.links_tried = tried;
        (outcome, report)
    }
}

/// Whether the destination may only not have cleared away what is left of the attempt before.
fn is_echo(outcome: &SourceOutcome) -> bool {
    matches!(outcome, SourceOutcome::Refused(refusal) if matches!(refusal.code, Code::NameTaken | Code::MacTaken | Code::Busy | Code::NoRoom))
}

/// Keeps the job up to date with the migration's progress.
async fn show(agent: Arc<Agent>, id: u64, mut seen: watch::Receiver<Progress>) {
    loop {
        let (progress, state, doubt) = {
            let progress = seen.borrow_and_update();
            (job_progress(&progress), progress.state, progress.doubt.clone())
        };
        agent.jobs.progress(id, progress);
        if state == SourceState::InDoubt {
            agent.jobs.update(id, |info| {
                info.state = JobState::InDoubt;
                info.words = doubt.unwrap_or_else(|| "the destination's answer is missing; it is asked again and again".into());
            });
        }
        if seen.changed().await.is_err() {
            return;
        }
    }
}

fn job_progress(progress: &Progress) -> JobProgress {
    JobProgress {
        phase: progress.state.to_string(),
        committing: progress.state.is_committing(),
        round: progress.round,
        bytes_remaining: progress.pages_remaining.saturating_mul(PAGE_BYTES),
        memory_bytes: progress.memory_bytes,
        bytes_on_wire: progress.bytes_on_wire,
        rate_bytes_per_s: progress.rate_bytes_per_s,
        dirty_bytes_per_s: progress.dirty_rate_pages_per_s.saturating_mul(PAGE_BYTES),
        estimate_ms: progress.estimate_ms,
    }
}

fn ending(outcome: &SourceOutcome, report: Report) -> Ending {
    let (state, words) = match outcome {
        SourceOutcome::Committed => (JobState::Done, String::new()),
        SourceOutcome::Refused(refusal) => (JobState::Refused, refusal.words()),
        SourceOutcome::Aborted { words, guest_runs: true, by: Side::Destination, .. } => {
            (JobState::Aborted, format!("the destination gave up: {words}"))
        }
        SourceOutcome::Aborted { words, guest_runs: true, .. } => (JobState::Aborted, words.clone()),
        SourceOutcome::Aborted { words, .. } => {
            (JobState::Aborted, format!("{words}; and the guest could NOT be resumed: look after its VMM on this host"))
        }
        SourceOutcome::InDoubt { words } => (JobState::InDoubt, words.clone()),
    };
    let code = match outcome {
        SourceOutcome::Refused(refusal) => Some(tickets::code_of(refusal)),
        _ => report.code.clone(),
    };
    Ending { state, words, code, report: Some(report) }
}
