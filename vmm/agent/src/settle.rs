//! What a restart, or a lost link, has left open: whom does each guest belong to? Answered from the journal, from
//! what the VMMs say when they plug in anew, and by asking the other host.
//!
//! The rules are `limosa_proto::commit`'s. A guest is never resumed here on a guess: only where this host never
//! released it, or where the destination has durably given it up.

use crate::agent::Agent;
use crate::api::{Direction, JobInfo, JobState};
use crate::incoming;
use crate::jobs::{Ending, unix_ms};
use crate::outgoing::{give_up_disks, resume};
use crate::process::birth;
use crate::vm::Vm;
use limosa_link::driver::VerdictError;
use limosa_link::quic::QuicLink;
use limosa_link::{TcpLink, ask_verdict};
use limosa_plug::VmState as Plugged;
use limosa_proto::commit::{self, DestinationVerdict, JournalRecord, JournalRecordKind, SourceVerdict};
use limosa_proto::identity::{Generation, HostId, MigrationId, VmId};
use limosa_proto::wire::message::VerdictAnswer;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// First and longest wait between two questions to a destination.
const ASK_INTERVAL: (Duration, Duration) = (Duration::from_millis(100), Duration::from_secs(5));
/// How long a VMM may take to plug in after a restart of the agent, before it is looked for.
const REPLUG_MAX: Duration = Duration::from_secs(5);
/// How long a VMM may take to end.
const END_MAX: Duration = Duration::from_secs(2);

/// One decision about guests at a time: an answer to a source and the end of a guest's time must not cross.
static DECIDING: Mutex<()> = Mutex::new(());

fn deciding() -> MutexGuard<'static, ()> {
    DECIDING.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Settles everything that the journal has left open. Called once, at the start, within the runtime.
pub(crate) fn begin(agent: &Arc<Agent>) {
    let unsettled = agent.journal().unsettled();
    for (migration, generation) in unsettled {
        let records = agent.journal().of(migration, generation);
        let Some(last) = records.last().cloned() else { continue };
        match commit::source_verdict(&records, migration, generation) {
            SourceVerdict::GuestIsOurs => {
                let words = "the agent was restarted before the commit; the guest stays here";
                note(agent, &last, JournalRecordKind::Aborted, words);
            }
            SourceVerdict::AskDestination => {
                let job = doubtful_job(agent, &last, Direction::Outgoing);
                tokio::spawn(ask(Arc::clone(agent), job, last));
            }
            SourceVerdict::Gone | SourceVerdict::NoRecord => {
                if commit::destination_verdict(&records, migration, generation) == DestinationVerdict::Undecided {
                    let job = doubtful_job(agent, &last, Direction::Incoming);
                    let agent = Arc::clone(agent);
                    tokio::task::spawn_blocking(move || wait_for_word(&agent, job, &last));
                }
            }
        }
    }
}

fn doubtful_job(agent: &Agent, record: &JournalRecord, direction: Direction) -> u64 {
    let (id, _) = agent.jobs.begin(|id| JobInfo {
        id,
        direction,
        vm: record.vm.to_string(),
        vm_id: record.vm.to_string(),
        peer: agent.hosts.shown(record.peer),
        migration: record.migration.to_string(),
        generation: record.generation.0,
        state: JobState::InDoubt,
        began_unix_ms: unix_ms(),
        ended_unix_ms: None,
        progress: None,
        report: None,
        announcements: Vec::new(),
        words: "the agent was restarted in the middle of the commit".into(),
        code: None,
    });
    id
}

fn note(agent: &Agent, of: &JournalRecord, kind: JournalRecordKind, words: &str) -> bool {
    let record = JournalRecord { kind, words: words.into(), ..of.clone() };
    agent.write(&record).is_ok()
}

/// Source: asks the destination again and again until it says whose the guest is.
async fn ask(agent: Arc<Agent>, job: u64, released: JournalRecord) {
    let mut wait = ASK_INTERVAL.0;
    loop {
        let words = match given_up_and_asked(&agent, &released).await {
            Ok(VerdictAnswer::Running) => {
                note(&agent, &released, JournalRecordKind::Running, "the destination says so");
                let (gone, vm) = (Arc::clone(&agent), released.vm);
                let _ = tokio::task::spawn_blocking(move || end_vm(&gone, vm, true)).await;
                return agent.jobs.end(job, ending(JobState::Done, "the guest runs at the destination"));
            }
            Ok(VerdictAnswer::Discarded) => {
                note(&agent, &released, JournalRecordKind::Aborted, "the destination has given it up");
                let (back, vm) = (Arc::clone(&agent), released.vm);
                let words = tokio::task::spawn_blocking(move || give_back(&back, vm)).await.unwrap_or_default();
                return agent.jobs.end(job, ending(JobState::Aborted, &words));
            }
            Ok(VerdictAnswer::Pending) => "the destination has not decided yet; it is asked again".to_string(),
            Ok(_) => "the destination has no record of this migration, which proves nothing; it is asked again".to_string(),
            Err(words) => words,
        };
        agent.jobs.update(job, |info| info.words = words);
        tokio::time::sleep(wait).await;
        wait = (wait * 2).min(ASK_INTERVAL.1);
    }
}

/// To ask is as good as Commit, so what only one host may hold is given up first; a VMM that is not plugged in has either
/// ended, and holds nothing, or is asked to when it comes back.
async fn given_up_and_asked(agent: &Arc<Agent>, released: &JournalRecord) -> Result<VerdictAnswer, String> {
    if let Some(vm) = agent.vms.with_id(released.vm).filter(|vm| vm.connection().is_some()) {
        let given = tokio::task::spawn_blocking(move || give_up_disks(&vm)).await;
        let given = given.map_err(|e| e.to_string())?;
        given.map_err(|e| format!("the VMM here does not give the guest's disks up, so the destination is not asked: {e}"))?;
    }
    verdict_of(agent, released).await
}

async fn verdict_of(agent: &Agent, released: &JournalRecord) -> Result<VerdictAnswer, String> {
    let host = agent.hosts.with_id(released.peer);
    let host =
        host.ok_or_else(|| format!("the destination {} is not trusted here any more: `limosa host trust` it", released.peer))?;
    let (silence, key, trusted) = (agent.config.migration.silence_max, agent.key.clone(), agent.hosts.trusted());
    let (migration, generation) = (released.migration, released.generation);
    let link = TcpLink::new(host.address.clone(), host.id, key.clone(), trusted.clone(), silence);
    let asked = ask_verdict(&link, migration, generation, true).await;
    // The guest may have left by QUIC because TCP is blocked.
    if matches!(asked, Err(VerdictError::Connect(_))) && agent.config.quic.enabled {
        let link = QuicLink::new(host.address, host.id, key, trusted, silence, agent.config.quic.settings);
        if let Ok(answer) = ask_verdict(&link, migration, generation, true).await {
            return Ok(answer);
        }
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
        Some(vm) => match resume(&vm, REPLUG_MAX) {
            Ok(()) => "the guest runs on here".into(),
            Err(error) => format!("the guest is this host's again, and could not be resumed: {error}"),
        },
    }
}

/// A VMM that nobody expected has plugged in: what is to be done with its guest?
pub(crate) fn plugged_in(agent: &Arc<Agent>, vm: &Arc<Vm>, state: Plugged) {
    let records: Vec<JournalRecord> = agent.journal().records().iter().filter(|record| record.vm == vm.id).cloned().collect();
    let Some(last) = records.iter().max_by_key(|record| record.generation) else {
        match state {
            Plugged::Paused => own(vm),
            // It came in, and `ready` was never written: the source has never heard of it and runs the guest.
            Plugged::Loaded => end_vm(agent, vm.id, false),
            _ => {}
        }
        return;
    };
    let (migration, generation) = (last.migration, last.generation);
    let of_last = |record: &&JournalRecord| record.migration == migration && record.generation == generation;
    let left = records.iter().filter(of_last).any(|r| matches!(r.kind, JournalRecordKind::Started | JournalRecordKind::Released));
    if left {
        match commit::source_verdict(&records, migration, generation) {
            SourceVerdict::AskDestination => {
                tracing::warn!(vm = vm.name, "the guest is in doubt and stays paused");
                // The destination may be waiting for its disks by now.
                if let Err(error) = give_up_disks(vm) {
                    tracing::error!(vm = vm.name, %error, "the VMM does not give the guest's disks up");
                }
            }
            SourceVerdict::Gone => end_vm(agent, vm.id, true),
            SourceVerdict::GuestIsOurs | SourceVerdict::NoRecord if state == Plugged::Paused => own(vm),
            SourceVerdict::GuestIsOurs | SourceVerdict::NoRecord => {}
        }
        return;
    }
    let _one = deciding();
    match (commit::destination_verdict(&records, migration, generation), state) {
        (DestinationVerdict::Undecided, Plugged::Running) => {
            note(agent, last, JournalRecordKind::Running, "its VMM runs it");
        }
        (DestinationVerdict::Running, Plugged::Paused | Plugged::Loaded) | (DestinationVerdict::NoRecord, Plugged::Paused) => {
            own(vm)
        }
        (DestinationVerdict::Discarded | DestinationVerdict::NoRecord, Plugged::Loaded) => end_vm(agent, vm.id, false),
        _ => {}
    }
}

fn own(vm: &Vm) {
    match resume(vm, Duration::ZERO) {
        Ok(()) => tracing::info!(vm = vm.name, "the guest was paused and is this host's; it runs on"),
        Err(error) => tracing::error!(vm = vm.name, %error, "the guest is this host's and could not be resumed"),
    }
}

/// Destination: a source asks about a migration that no driver carries any more.
pub(crate) fn verdict(
    agent: &Agent,
    peer: HostId,
    migration: MigrationId,
    generation: Generation,
    released: bool,
) -> VerdictAnswer {
    let _one = deciding();
    let mut records = agent.journal().of(migration, generation);
    records.retain(|record| record.peer == peer);
    let answer = commit::answer(&records, migration, generation);
    let (VerdictAnswer::Pending, Some(ready)) = (answer, records.last()) else { return answer };
    let Some(vm) = agent.vms.with_id(ready.vm) else { return VerdictAnswer::Pending };
    if vm.is_claimed() {
        // Its driver has not ended yet and decides.
        return VerdictAnswer::Pending;
    }
    if released || runs(&vm) {
        if let Err(error) = resume(&vm, REPLUG_MAX) {
            tracing::error!(vm = vm.name, %error, "a committed guest could not be resumed");
            return VerdictAnswer::Pending;
        }
        note(agent, ready, JournalRecordKind::Running, "the source in doubt released it");
        announce(agent, &vm);
        return VerdictAnswer::Running;
    }
    if note(agent, ready, JournalRecordKind::Discarded, "the source asked for it back") {
        end_vm(agent, vm.id, false);
        return VerdictAnswer::Discarded;
    }
    VerdictAnswer::Pending
}

fn runs(vm: &Vm) -> bool {
    vm.connection().and_then(|connection| connection.status().ok()).is_some_and(|status| status.state == Plugged::Running)
}

fn announce(agent: &Agent, vm: &Vm) {
    let Some(description) = vm.description() else { return };
    if let Err(error) = incoming::announce(agent, &description, Arc::default(), |_| {}) {
        tracing::warn!(vm = vm.name, %error, "the guest could not be announced; `limosa announce` repeats it");
    }
}

/// Destination: waits for the source's word on a guest that was ready when the agent ended; then gives it up for good.
fn wait_for_word(agent: &Agent, job: u64, ready: &JournalRecord) {
    let until = Instant::now() + agent.config.migration.ready_max.max(REPLUG_MAX);
    loop {
        std::thread::sleep(Duration::from_millis(100));
        if agent.is_stopping() {
            return;
        }
        let records = agent.journal().of(ready.migration, ready.generation);
        match commit::destination_verdict(&records, ready.migration, ready.generation) {
            DestinationVerdict::Running => return agent.jobs.end(job, ending(JobState::Done, "the guest runs here")),
            DestinationVerdict::Discarded => {
                return agent.jobs.end(job, ending(JobState::Aborted, "the guest was given up here"));
            }
            DestinationVerdict::Undecided | DestinationVerdict::NoRecord => {}
        }
        if Instant::now() > until {
            give_up(agent, job, ready);
        }
    }
}

/// The source's word has not come in time: the guest is given up durably, unless it may be running here.
fn give_up(agent: &Agent, job: u64, ready: &JournalRecord) {
    let _one = deciding();
    let records = agent.journal().of(ready.migration, ready.generation);
    if commit::destination_verdict(&records, ready.migration, ready.generation) != DestinationVerdict::Undecided {
        return;
    }
    let vm = agent.vms.with_id(ready.vm);
    let plugged = vm.as_ref().and_then(|vm| vm.connection());
    if plugged.is_none() && process_lives(agent, ready.vm) {
        // It may have been resumed just before the agent ended; nobody may say that it was not.
        agent.jobs.update(job, |info| {
            info.words = "the guest's VMM lives and does not plug in; nothing is decided before it does".into()
        });
        return;
    }
    if vm.as_ref().is_some_and(|vm| runs(vm)) {
        note(agent, ready, JournalRecordKind::Running, "its VMM runs it");
        return;
    }
    if note(agent, ready, JournalRecordKind::Discarded, "the source's word did not come in time") {
        end_vm(agent, ready.vm, false);
        forget_process(agent, ready.vm);
    }
}

fn process_file(agent: &Agent, vm: VmId) -> PathBuf {
    agent.config.state_dir.join("vm").join(format!("{vm}.process"))
}

/// Remembers which process an incoming guest's VMM is, so that a restarted agent can tell whether it lives.
pub(crate) fn remember_process(agent: &Agent, vm: VmId, pid: u32) {
    let written = std::fs::write(process_file(agent, vm), format!("{pid} {}", birth(pid).unwrap_or(0)));
    if let Err(error) = written {
        tracing::warn!(%vm, %error, "the VMM's process cannot be noted");
    }
}

/// The guest is settled: its process need not be remembered.
pub(crate) fn forget_process(agent: &Agent, vm: VmId) {
    // It may never have been noted.
    let _ = std::fs::remove_file(process_file(agent, vm));
}

fn process_lives(agent: &Agent, vm: VmId) -> bool {
    let text = std::fs::read_to_string(process_file(agent, vm)).unwrap_or_default();
    let mut fields = text.split_whitespace().map(str::parse::<u64>);
    let (Some(Ok(pid)), Some(Ok(born))) = (fields.next(), fields.next()) else { return false };
    u32::try_from(pid).is_ok_and(|pid| birth(pid) == Some(born))
}
