//! What a restart, or a lost link, has left open: whom does each guest belong to? Answered from the journal, from
//! what the VMMs say when they plug in anew, and by asking the other host.
//!
//! What is to be done is decided by `limosa_proto::recovery`; here it is carried out.

use crate::agent::Agent;
use crate::api::{Direction, JobInfo, JobState};
use crate::asking;
use crate::jobs::Ending;
use crate::links;
use crate::noted;
use crate::outgoing::give_up_disks;
use crate::pausing::{take_up, tell};
use crate::vm::{Vm, VmState};
use limosa_link::ask_verdict;
use limosa_link::driver::VerdictError;
use limosa_link::failpoints::{self, Point};
use limosa_plug::VmState as Plugged;
use limosa_proto::commit::{self, DestinationVerdict, JournalRecord, JournalRecordKind, SourceVerdict};
use limosa_proto::identity::{Generation, HostId, MigrationId, VmId};
use limosa_proto::journal::JournalError;
use limosa_proto::recovery::{
    self, ASK_INTERVAL, Answered, Asked, AtStart, Ended, Fate, GuestHere, Note, OutOfPatience, Plugged as Says, REPLUG_MAX, RETRY,
};
use limosa_proto::wire::message::{ReleasedAnswer, VerdictAnswer};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// How long a VMM may take to end.
const END_MAX: Duration = Duration::from_secs(2);

/// One decision about guests at a time: an answer to a source and the end of a guest's time must not cross.
static DECIDING: Mutex<()> = Mutex::new(());

fn deciding() -> MutexGuard<'static, ()> {
    DECIDING.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Settles everything that the journal has left open. Called once, at the start, within the runtime.
pub(crate) fn begin(agent: &Arc<Agent>) {
    failpoints::pass(Some(Point::SourceRecoveryBegins));
    noted::forget_ended(agent);
    let unsettled = agent.journal().unsettled();
    for (migration, generation) in unsettled {
        let records = agent.journal().of(migration, generation);
        let Some(last) = records.last().cloned() else { continue };
        match recovery::at_start(&records, migration, generation) {
            AtStart::Settle(settled) => {
                if !note(agent, &last, settled) {
                    owe(agent, migration, generation, Ended::Stayed);
                }
            }
            AtStart::Ask => {
                let job = doubtful_job(agent, &last, Direction::Outgoing);
                tokio::spawn(ask(Arc::clone(agent), job, last));
            }
            AtStart::Wait => {
                let job = doubtful_job(agent, &last, Direction::Incoming);
                let ready = Arc::new(Ready { job, record: last, heard: Mutex::default() });
                tokio::spawn(asking::ask(Arc::clone(agent), Arc::clone(&ready)));
                let agent = Arc::clone(agent);
                tokio::task::spawn_blocking(move || wait_for_word(&agent, &ready));
            }
            AtStart::Nothing => {}
        }
    }
}

/// Destination: a guest that was to come, and of which no engine knows any more.
pub(crate) struct Ready {
    pub(crate) job: u64,
    pub(crate) record: JournalRecord,
    heard: Mutex<Heard>,
}

/// What the source last answered.
#[derive(Default, Clone)]
struct Heard {
    said: Option<ReleasedAnswer>,
    words: String,
}

impl Ready {
    fn heard(&self) -> MutexGuard<'_, Heard> {
        self.heard.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn doubtful_job(agent: &Agent, record: &JournalRecord, direction: Direction) -> u64 {
    let vm = record.vm.to_string();
    let name = agent.vms.with_id(record.vm).map_or_else(|| vm.clone(), |known| known.name.clone());
    let words = if direction == Direction::Incoming {
        "the agent was restarted before it was on record that the guest runs here"
    } else {
        "the agent was restarted in the middle of the commit"
    };
    let (id, _) = agent.jobs.begin(|id| JobInfo {
        state: JobState::InDoubt,
        words: words.into(),
        ..JobInfo::begun(id, direction, &name, &vm, agent.hosts.shown(record.peer)).of(record.migration, record.generation)
    });
    id
}

/// Writes `what` about the attempt of `of`; whether it is durable.
fn note(agent: &Agent, of: &JournalRecord, what: Note) -> bool {
    agent.write(&what.of(of)).is_ok()
}

/// The destination's job of a decided attempt, where its engine has ended in doubt.
fn close(agent: &Agent, of: &JournalRecord, what: Note) {
    let (migration, generation) = (of.migration.to_string(), of.generation.0);
    let state = if what.kind == JournalRecordKind::Running { JobState::Done } else { JobState::Aborted };
    for job in agent.jobs.all() {
        if job.state == JobState::InDoubt && job.migration == migration && job.generation == generation {
            agent.jobs.end(job.id, ending(state, what.words));
        }
    }
}

/// Source: asks the destination again and again until it says whose the guest is.
async fn ask(agent: Arc<Agent>, job: u64, released: JournalRecord) {
    let mut wait = ASK_INTERVAL.0;
    loop {
        let alone = agent.jobs.asking(job).lock_owned().await;
        let records = agent.journal().of(released.migration, released.generation);
        match commit::source_verdict(&records, released.migration, released.generation) {
            SourceVerdict::AskDestination => {}
            // An operator has decided meanwhile.
            _ if agent.jobs.get(job).is_none_or(|info| info.state.ended()) => return,
            // Its VMM has plugged in, and runs it.
            SourceVerdict::GuestIsOurs => return agent.jobs.end(job, ending(JobState::Aborted, "the guest runs on here")),
            SourceVerdict::Gone | SourceVerdict::NoRecord => {}
        }
        failpoints::pass(Some(Point::SourceRecoveryAsks));
        let answer = given_up_and_asked(&agent, &released).await;
        failpoints::pass(answer.is_ok().then_some(Point::SourceRecoveryHears));
        let words = match answer.map(recovery::answered) {
            Ok(Answered::Gone(settled)) => {
                let here = is_here(&agent, &released);
                if !note(&agent, &released, settled) {
                    // Asked again: a VMM that plugs in meanwhile finds no word on its guest.
                    drop(alone);
                    tokio::time::sleep(wait).await;
                    continue;
                }
                failpoints::pass(Some(Point::SourceRecoveryWritten));
                if here {
                    let (gone, vm) = (Arc::clone(&agent), released.vm);
                    let _ = tokio::task::spawn_blocking(move || end_vm(&gone, vm, true)).await;
                }
                return agent.jobs.end(job, ending(JobState::Done, "the guest runs at the destination"));
            }
            Ok(Answered::GivenBack(settled)) => {
                let here = is_here(&agent, &released);
                if !note(&agent, &released, settled) {
                    if agent.vms.with_id(released.vm).is_none() {
                        drop(alone);
                        tokio::time::sleep(wait).await;
                        continue;
                    }
                    // The destination's word is durable and enough.
                    owe(&agent, released.migration, released.generation, Ended::Stayed);
                }
                let (back, vm) = (Arc::clone(&agent), released.vm);
                let words = if here {
                    tokio::task::spawn_blocking(move || give_back(&back, vm)).await.unwrap_or_default()
                } else {
                    "the destination has given it up, and it has moved on since".to_owned()
                };
                return agent.jobs.end(job, ending(JobState::Aborted, &words));
            }
            Ok(Answered::Again(words)) => words.to_owned(),
            Err(words) => words,
        };
        agent.jobs.update(job, |info| info.words = words);
        drop(alone);
        tokio::time::sleep(wait).await;
        wait = (wait * 2).min(ASK_INTERVAL.1);
    }
}

/// Whether what is heard of this attempt says something of the VMM that is here now.
fn is_here(agent: &Agent, attempt: &JournalRecord) -> bool {
    let claimed = agent.vms.with_id(attempt.vm).is_some_and(|vm| vm.is_claimed());
    !claimed && recovery::is_latest(agent.journal().records(), attempt)
}

/// To ask is as good as Commit, so what only one host may hold is given up first; a VMM that is not plugged in has either
/// ended, and holds nothing, or is asked to when it comes back.
pub(crate) async fn given_up_and_asked(agent: &Arc<Agent>, released: &JournalRecord) -> Result<VerdictAnswer, String> {
    if let Some(vm) = agent.vms.with_id(released.vm).filter(|vm| vm.connection().is_some()) {
        let given = tokio::task::spawn_blocking(move || give_up_disks(&vm)).await;
        let given = given.map_err(|e| e.to_string())?;
        given.map_err(|e| format!("the VMM here does not give the guest's disks up, so the destination is not asked: {e}"))?;
    }
    verdict_of(agent, released).await
}

async fn verdict_of(agent: &Agent, released: &JournalRecord) -> Result<VerdictAnswer, String> {
    let (migration, generation) = (released.migration, released.generation);
    let (tcp, quic) = links::to_ask(agent, "destination", released.peer)?;
    let asked = ask_verdict(&tcp, migration, generation, true).await;
    if matches!(asked, Err(VerdictError::Connect(_)))
        && let Some(quic) = quic
        && let Ok(answer) = ask_verdict(&quic, migration, generation, true).await
    {
        return Ok(answer);
    }
    asked.map_err(|e| e.to_string())
}

fn ending(state: JobState, words: &str) -> Ending {
    Ending { state, words: words.into(), code: None, report: None }
}

/// The guest lives elsewhere: its VMM here ends.
fn end_vm(agent: &Agent, id: VmId, release: bool) {
    let Some(vm) = agent.vms.with_id(id) else { return };
    if let Some(connection) = vm.connection() {
        let told = if release { connection.release() } else { connection.discard() };
        if let Err(error) = told {
            tracing::debug!(vm = vm.name, %error, "a VMM did not take the order to end; it is ended");
        }
    }
    vm.end_within(END_MAX);
    agent.vms.remove(id);
}

/// The guest is ours again: it runs on here.
fn give_back(agent: &Agent, id: VmId) -> String {
    match agent.vms.with_id(id) {
        None => "the guest is this host's again, and its VMM has not plugged in; it is resumed when it does".into(),
        Some(vm) => match take_up(&vm, REPLUG_MAX) {
            Ok(()) if vm.state() == VmState::Held => "the guest is here, paused as its operator left it".into(),
            Ok(()) => "the guest runs on here".into(),
            Err(error) => {
                keep_taking_up(&vm);
                format!("the guest is this host's again, and could not be resumed; it is tried again and again: {error}")
            }
        },
    }
}

/// An operator has decided about a guest that no driver carries; `record` is his decision, and durable. Blocking.
pub(crate) fn decided(agent: &Agent, job: u64, record: &JournalRecord, here: bool) {
    let _one = deciding();
    let words = if here { give_back(agent, record.vm) } else { "the guest is not this host's".to_owned() };
    if !here {
        end_vm(agent, record.vm, record.kind == JournalRecordKind::Running);
    } else if let Some(vm) = agent.vms.with_id(record.vm).filter(|_| record.kind == JournalRecordKind::Running) {
        // It came here, and nobody was told.
        tell(agent, &vm);
    }
    noted::forget(agent, record.vm);
    let state = if record.kind == JournalRecordKind::Running { JobState::Done } else { JobState::Aborted };
    agent.jobs.end(job, ending(state, &format!("{}; {words}", record.words)));
}

/// A VMM that nobody expected has plugged in: what is to be done with its guest?
pub(crate) fn plugged_in(agent: &Arc<Agent>, vm: &Arc<Vm>, state: Plugged) {
    failpoints::pass(Some(Point::DestinationRecoveryPluggedIn));
    let one = deciding();
    let records = agent.journal().of_guest(vm.id);
    let found = recovery::plugged_in(&records, says(state));
    if let Some((of, running)) = &found.note {
        note(agent, of, *running);
    }
    let came = found.note.is_some();
    match found.fate {
        Fate::Left => {}
        Fate::Own => own(vm),
        Fate::End { ran } => end_vm(agent, vm.id, ran),
        Fate::Doubt => {
            // It may take long, and decides nothing.
            drop(one);
            tracing::warn!(vm = vm.name, "the guest is in doubt and stays paused");
            if let Err(error) = give_up_disks(vm) {
                tracing::error!(vm = vm.name, %error, "the VMM does not give the guest's disks up");
            }
            return;
        }
    }
    drop(one);
    // The agent ended before it was on record that the guest came: the network may not have been told either.
    if came && vm.state() == VmState::Running {
        tell(agent, vm);
    }
}

/// A VMM that nobody uses has ended. Where the guest surely never ran in it, a source that has released it gets it back.
pub(crate) fn vmm_ended(agent: &Arc<Agent>, vm: &Vm) {
    let _one = deciding();
    if vm.may_have_run() {
        return;
    }
    let records = agent.journal().of_guest(vm.id);
    let Some((of, given_up)) = recovery::vmm_ended_unrun(&records) else { return };
    tracing::warn!(vm = vm.name, "the VMM ended before the guest ran here: the guest is given up");
    if note(agent, &of, given_up) {
        close(agent, &of, given_up);
    } else {
        // Only this agent knows: it is written as soon as it can be.
        owe(agent, of.migration, of.generation, Ended::GivenUp);
    }
    noted::forget(agent, vm.id);
}

/// What a VMM says, in the words of the rules.
fn says(state: Plugged) -> Says {
    match state {
        Plugged::Running => Says::Running,
        Plugged::Paused => Says::Paused,
        Plugged::Loaded => Says::Loaded,
        Plugged::Waiting | Plugged::Prepared => Says::Incoming,
    }
}

/// What the VMM says of itself now, if it can be asked.
fn state_of(vm: &Vm) -> Option<Says> {
    vm.connection().and_then(|connection| connection.status().ok()).map(|status| says(status.state))
}

/// A guest that stands still is this host's: it runs on, unless its operator holds it.
fn own(vm: &Arc<Vm>) {
    match take_up(vm, Duration::ZERO) {
        Ok(()) if vm.state() == VmState::Held => {
            tracing::info!(vm = vm.name, "the guest is this host's; its operator has paused it")
        }
        Ok(()) => tracing::info!(vm = vm.name, "the guest was paused and is this host's; it runs on"),
        Err(error) => {
            tracing::error!(vm = vm.name, %error, "the guest is this host's and could not be resumed; it is tried again and again");
            keep_taking_up(vm);
        }
    }
}

/// A guest that is this host's and could not be resumed is tried again until it runs or is held, or its VMM has ended.
pub(crate) fn keep_taking_up(vm: &Arc<Vm>) {
    // Nobody else takes a guest in this state.
    vm.set_state(VmState::Paused);
    let guest = Arc::clone(vm);
    let work = move || {
        while guest.state() == VmState::Paused && !guest.has_ended() {
            std::thread::sleep(RETRY);
            if guest.state() == VmState::Paused && take_up(&guest, Duration::ZERO).is_ok() {
                tracing::info!(vm = guest.name, "the guest runs on, or stands still as its operator left it");
            }
        }
    };
    if let Err(error) = std::thread::Builder::new().name("take-up".into()).spawn(work) {
        tracing::error!(vm = vm.name, %error, "no thread to resume the guest");
    }
}

/// An engine has ended: what it could not write is tried until it is durable, or the agent ends.
pub(crate) fn owe(agent: &Arc<Agent>, migration: MigrationId, generation: Generation, ended: Ended) {
    let (agent, records) = (Arc::clone(agent), agent.journal().of(migration, generation));
    let (Some(last), Some(owed)) = (records.last().cloned(), recovery::owed(&records, ended)) else { return };
    let work = move || {
        loop {
            std::thread::sleep(RETRY);
            if agent.is_stopping() || recovery::owed(&agent.journal().of(migration, generation), ended).is_none() {
                return;
            }
            note(&agent, &last, owed);
        }
    };
    if let Err(error) = std::thread::Builder::new().name("owed".into()).spawn(work) {
        tracing::error!(%migration, %error, "no thread to write the journal");
    }
}

/// Puts on record that a guest came here, before it leaves.
pub(crate) fn before_it_leaves(agent: &Agent, vm: VmId) -> Result<(), JournalError> {
    let records = agent.journal().of_guest(vm);
    recovery::before_it_leaves(&records).into_iter().try_for_each(|(of, came)| agent.write(&came.of(&of)))
}

/// Destination: the engine gave a guest up and could not write so. As long as its VMM is there it can be decided again.
pub(crate) fn decide_again(agent: &Arc<Agent>, job: u64, vm: VmId, migration: MigrationId, generation: Generation) {
    let agent = Arc::clone(agent);
    tokio::task::spawn_blocking(move || {
        while !agent.is_stopping() {
            std::thread::sleep(RETRY);
            if agent.vms.with_id(vm).is_some_and(|vm| vm.is_claimed()) {
                continue;
            }
            let records = agent.journal().of(migration, generation);
            // The VMM that is here now came by a later attempt.
            let over = records.last().is_some_and(|last| !recovery::is_latest(agent.journal().records(), last));
            match commit::destination_verdict(&records, migration, generation) {
                DestinationVerdict::Running => return,
                DestinationVerdict::NoRecord | DestinationVerdict::Discarded if over => return,
                DestinationVerdict::Undecided => {
                    records.iter().take(1).for_each(|ready| give_up(&agent, job, ready, &Heard::default()))
                }
                // What was not taken back may be found by the next agent, which then needs the VMM.
                DestinationVerdict::NoRecord if agent.journal().is_broken() => {}
                DestinationVerdict::NoRecord | DestinationVerdict::Discarded => return end_vm(&agent, vm, false),
            }
        }
    });
}

/// Destination: a source asks about a migration that no driver carries any more.
pub(crate) fn verdict(
    agent: &Arc<Agent>,
    peer: HostId,
    migration: MigrationId,
    generation: Generation,
    released: bool,
) -> VerdictAnswer {
    failpoints::pass(Some(Point::DestinationRecoveryAsked));
    let _one = deciding();
    let mut records = agent.journal().of(migration, generation);
    // It may have a new key since.
    let trusted = agent.hosts.trusted();
    records.retain(|record| trusted.same_host(record.peer, peer));
    let ready = records.last();
    // A VMM that is here speaks for the latest attempt alone.
    let latest = ready.is_some_and(|ready| recovery::is_latest(agent.journal().records(), ready));
    let ready_vm = ready.filter(|_| latest);
    // One that has ended says nothing; `vmm_ended` does.
    let vm = ready_vm.and_then(|ready| agent.vms.with_id(ready.vm)).filter(|vm| vm.is_claimed() || !vm.has_ended());
    let here = |vm: &Arc<Vm>| {
        let claimed = vm.is_claimed();
        GuestHere { claimed, plugged: if claimed { None } else { state_of(vm) } }
    };
    // A VMM that lives and is not plugged in yet does not say.
    let silent = || ready_vm.filter(|ready| noted::lives(agent, ready.vm)).map(|_| GuestHere { claimed: false, plugged: None });
    let guest = vm.as_ref().map(here).or_else(silent);
    let mut asked = recovery::asked(&records, migration, generation, released, guest);
    if agent.journal().is_broken() {
        asked = recovery::asked_while_broken(asked, guest);
    }
    match (asked, ready, &vm) {
        (Asked::Answer(answer), _, _) => {
            if answer == VerdictAnswer::Unknown {
                let (peer, generation) = (agent.hosts.shown(peer), generation.0);
                tracing::warn!(peer, %migration, generation, "asked for a verdict on an attempt of which nothing is known with it");
            }
            answer
        }
        (Asked::TakeUp(taken), Some(ready), Some(vm)) => {
            if let Err(error) = take_up(vm, REPLUG_MAX) {
                tracing::error!(vm = vm.name, %error, "a committed guest could not be resumed");
                return VerdictAnswer::Pending;
            }
            failpoints::pass(Some(Point::DestinationRecoveryTookUp));
            if !note(agent, ready, taken) {
                owe(agent, migration, generation, Ended::Came);
            }
            failpoints::pass(Some(Point::DestinationRecoveryWritten));
            close(agent, ready, taken);
            if vm.state() == VmState::Running {
                tell(agent, vm);
            }
            VerdictAnswer::Running
        }
        (Asked::Discard(given_up), Some(ready), _) if note(agent, ready, given_up) => {
            if latest {
                end_vm(agent, ready.vm, false);
            }
            close(agent, ready, given_up);
            VerdictAnswer::Discarded
        }
        _ => VerdictAnswer::Pending,
    }
}

/// Destination: waits for the source's word on a guest that was ready when the agent ended; then gives it up for good.
fn wait_for_word(agent: &Agent, waiting: &Ready) {
    let Ready { job, record: ready, .. } = waiting;
    let job = *job;
    failpoints::pass(Some(Point::DestinationRecoveryWaits));
    let until = Instant::now() + agent.config.migration.ready_max.max(REPLUG_MAX);
    loop {
        std::thread::sleep(Duration::from_millis(100));
        if agent.is_stopping() {
            return;
        }
        let records = agent.journal().of(ready.migration, ready.generation);
        match commit::destination_verdict(&records, ready.migration, ready.generation) {
            _ if agent.jobs.get(job).is_none_or(|info| info.state.ended()) => return,
            DestinationVerdict::Running => return agent.jobs.end(job, ending(JobState::Done, "the guest runs here")),
            DestinationVerdict::Discarded => {
                return agent.jobs.end(job, ending(JobState::Aborted, "the guest was given up here"));
            }
            DestinationVerdict::Undecided | DestinationVerdict::NoRecord => {}
        }
        if Instant::now() > until {
            let heard = waiting.heard().clone();
            give_up(agent, job, ready, &heard);
        }
    }
}

/// Destination: the source was asked whether it ever released the guest.
pub(crate) fn source_said(agent: &Agent, ready: &Ready, said: Result<ReleasedAnswer, String>) {
    let words = match &said {
        Ok(answer) => format!("the source says: {}", asking::words(*answer)),
        Err(words) => format!("the source cannot be asked: {words}"),
    };
    let said = said.ok();
    let heard = {
        let mut heard = ready.heard();
        // What was released stays so until it is given back; a source that is silent since has not taken it back.
        *heard = Heard { said: said.or(heard.said), words: words.clone() };
        heard.clone()
    };
    if said == Some(ReleasedAnswer::Never) {
        return give_up(agent, ready.job, &ready.record, &heard);
    }
    agent.jobs.update(ready.job, |info| {
        if info.state == JobState::InDoubt {
            info.words = words;
        }
    });
}

/// The source's word has not come in time, or it says Never: the guest is given up durably, unless it may be running here.
fn give_up(agent: &Agent, job: u64, ready: &JournalRecord, heard: &Heard) {
    let _one = deciding();
    let records = agent.journal().of(ready.migration, ready.generation);
    let vm = agent.vms.with_id(ready.vm);
    // A VMM that is here speaks for the latest attempt alone.
    let latest = recovery::is_latest(agent.journal().records(), ready);
    if latest && vm.as_ref().is_some_and(|vm| vm.is_claimed()) {
        // Another attempt is about to have this guest, and its driver decides.
        return;
    }
    let vm = vm.filter(|_| latest);
    let plugged = vm.as_ref().is_some_and(|vm| vm.connection().is_some());
    let (says, lives) = (vm.as_ref().and_then(|vm| state_of(vm)), latest && noted::lives(agent, ready.vm));
    match recovery::out_of_patience(&records, ready.migration, ready.generation, plugged, says, lives, heard.said) {
        OutOfPatience::Settled => {}
        OutOfPatience::Wait(words) | OutOfPatience::MayHaveRun(words) => {
            let words = if heard.words.is_empty() { words.to_owned() } else { format!("{words}; {}", heard.words) };
            agent.jobs.update(job, |info| info.words = words);
        }
        OutOfPatience::Running(taken) => drop(note(agent, ready, taken)),
        OutOfPatience::Discard(given_up) => {
            failpoints::pass(Some(Point::DestinationRecoveryGivesUp));
            if note(agent, ready, given_up) {
                failpoints::pass(Some(Point::DestinationRecoveryGivenUp));
                if latest {
                    end_vm(agent, ready.vm, false);
                    noted::forget(agent, ready.vm);
                }
            }
        }
    }
}
