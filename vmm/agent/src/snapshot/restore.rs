//! `limosa vm restore`: all of the file is judged first, then a VMM is made for its guest, filled, loaded, and let run.
//! Until the guest is this host's by the journal, whatever fails leaves nothing.

use super::file::Input;
use super::{Telling, job};
use crate::agent::Agent;
use crate::api::{ApiError, Direction, JobState, SnapshotInfo};
use crate::config::{NAME_WANTS, plain_name};
use crate::disks;
use crate::incoming::offer;
use crate::jobs::{Ending, unix_ms};
use crate::noted;
use crate::pages::huge_pages;
use crate::pausing::{hold, take_up, tell};
use crate::vm::{Claim, Vm, VmState};
use limosa_link::Cancel;
use limosa_plug::GuestMemory;
use limosa_proto::commit::{JournalRecord, JournalRecordKind};
use limosa_proto::compat;
use limosa_proto::identity::{Generation, MigrationId};
use limosa_proto::record::Record;
use limosa_proto::snapshot::{Piece, SavedGuest};
use ring::rand::SecureRandom as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

/// How long the VMM may take until it has plugged in; it has no machine yet.
const LAUNCH_MAX: Duration = Duration::from_secs(20);
/// How long it may take to end after it was told to.
const DISCARD_MAX: Duration = Duration::from_millis(500);
/// Room for that many attempts to move a guest between two of its restores, and per second between them.
const GENERATIONS_PER_SECOND: u64 = 1 << 20;

/// A guest that is being restored.
struct Restoring {
    claim: Claim,
    guest: SavedGuest,
    path: PathBuf,
    paused: bool,
    generation: Generation,
    migration: MigrationId,
}

/// Begins to restore the guest of a file; gives the job's number.
pub(crate) async fn begin(agent: &Arc<Agent>, file: PathBuf, paused: bool) -> Result<u64, ApiError> {
    if agent.is_stopping() {
        return Err(ApiError::refused("shutdown", "the agent is stopping"));
    }
    let preparing = Arc::clone(agent);
    let prepared = tokio::task::spawn_blocking(move || prepare(&preparing, &file, paused)).await;
    let restoring = prepared.map_err(|error| ApiError::refused("internal", error.to_string()))??;
    let (vm, generation) = (&restoring.guest.vm, restoring.generation);
    let (id, cancel) = agent.jobs.begin(|id| job(id, Direction::Restoring, &vm.name, vm.id, generation, &restoring.path));
    agent.jobs.update(id, |job| job.migration = restoring.migration.to_string());
    restoring.claim.vm().on_lost(Some(cancel.clone()));
    tracing::info!(job = id, vm = vm.name, file = %restoring.path.display(), "a guest is being restored");
    let agent = Arc::clone(agent);
    tokio::task::spawn_blocking(move || {
        let (ending, info) = carry_out(&agent, id, restoring, &cancel);
        tracing::info!(job = id, state = ?ending.state, words = ending.words, "restoring has ended");
        agent.jobs.update(id, |job| job.snapshot = info);
        agent.jobs.end(id, ending);
    });
    Ok(id)
}

/// Looks who is in the file and takes its name; nothing else is made.
fn prepare(agent: &Agent, path: &Path, paused: bool) -> Result<Restoring, ApiError> {
    let refused = |words: String| ApiError::refused("snapshot", words);
    let (_, guest) = Input::open(path).map_err(refused)?;
    let vm = &guest.vm;
    if !plain_name(&vm.name) {
        return Err(refused(format!("the guest's name {:?} is none here: {NAME_WANTS}", vm.name)));
    }
    if let Some(refusal) = compat::refusal(compat::check(vm, &offer(agent))) {
        return Err(ApiError::refused(refusal.code.id(), refusal.words()));
    }
    let mut migration = [0; 16];
    let random = ring::rand::SystemRandom::new().fill(&mut migration);
    random.map_err(|_| ApiError::refused("internal", "the system gives no random numbers"))?;
    let incoming = Vm::new(vm.id, vm.name.clone(), VmState::Incoming);
    incoming.set_description(vm.clone());
    let claim = incoming.claim("restoring").map_err(|words| ApiError::refused("busy", words))?;
    agent.vms.insert(&incoming).map_err(|(code, words)| ApiError::refused(code.id(), words))?;
    let generation = generation(agent.journal().next_generation(vm.id), guest.generation, unix_ms());
    let path = path.to_owned();
    Ok(Restoring { claim, guest, path, paused, generation, migration: MigrationId(migration) })
}

/// A restored guest begins a line of generations that is later than every other of it on whatever host: other hosts'
/// journals cannot be asked, so it goes by the clock.
fn generation(next: Generation, saved: u64, now_ms: u64) -> Generation {
    Generation(next.0.max(saved).max((now_ms / 1000).saturating_mul(GENERATIONS_PER_SECOND)))
}

fn carry_out(agent: &Agent, id: u64, restoring: Restoring, cancel: &Cancel) -> (Ending, Option<SnapshotInfo>) {
    let began = Instant::now();
    let made = judge(agent, id, &restoring, cancel).and_then(|found| {
        make(agent, id, &restoring, found.records, cancel)?;
        Ok((found.file_bytes, found.pages, found.count))
    });
    let vm = Arc::clone(restoring.claim.vm());
    vm.on_lost(None);
    let (file_bytes, pages, records) = match made {
        Ok(counts) => counts,
        Err(words) => {
            discard(agent, &vm);
            let code = if cancel.is_cancelled() { "cancelled" } else { "snapshot" };
            return (Ending { state: JobState::Refused, words, code: Some(code.to_owned()), report: None }, None);
        }
    };
    let runs = vm.state() == VmState::Running;
    drop(restoring.claim);
    if runs {
        let lines = tell(agent, &vm);
        agent.jobs.update(id, |job| job.announcements = lines);
    }
    let info = SnapshotInfo {
        file_bytes,
        memory_bytes: restoring.guest.vm.memory.bytes(),
        pages,
        records,
        total_ms: began.elapsed().as_secs_f64() * 1e3,
        paused_ms: None,
        guest: if runs { "runs" } else { "paused" }.to_owned(),
    };
    (Ending { state: JobState::Done, words: String::new(), code: None, report: None }, Some(info))
}

/// What the file has, once all of it was read.
struct Found {
    records: Vec<Record>,
    count: u64,
    pages: u64,
    file_bytes: u64,
}

/// Reads the whole file, so that one that is damaged or cut off is refused before a VMM is made for it.
fn judge(agent: &Agent, id: u64, restoring: &Restoring, cancel: &Cancel) -> Result<Found, String> {
    let (mut input, guest) = Input::open(&restoring.path)?;
    if guest != restoring.guest {
        return Err(format!("{} has changed meanwhile", restoring.path.display()));
    }
    let mut telling = Telling::new(&agent.jobs, id, "checking", input.bytes);
    let (mut records, mut pages) = (Vec::new(), 0);
    while let Some(piece) = input.next()? {
        match piece {
            Piece::Record(record) => records.push(record),
            Piece::Pages(runs, _) => pages += runs.iter().map(|run| run.count).sum::<u64>(),
            Piece::Guest(_) | Piece::End => {}
        }
        telling.tell(input.done(), input.done());
        go_on(cancel)?;
    }
    Ok(Found { count: records.len() as u64, records, pages, file_bytes: input.bytes })
}

fn go_on(cancel: &Cancel) -> Result<(), String> {
    if cancel.is_cancelled() { Err("it was cancelled, or its VMM was lost; nothing was changed".to_owned()) } else { Ok(()) }
}

/// Makes the VMM, fills and loads it, and lets it run or holds it.
fn make(agent: &Agent, id: u64, restoring: &Restoring, records: Vec<Record>, cancel: &Cancel) -> Result<(), String> {
    let (vm, described) = (restoring.claim.vm(), &restoring.guest.vm);
    let (process, arrived) = agent.vms.launch(agent, &described.name, vec!["--incoming".into()], LAUNCH_MAX)?;
    noted::remember(agent, described.id, process.pid());
    vm.set_process(process);
    vm.set_console(agent.config.console_socket(&described.name));
    let connection = arrived.connection;
    vm.plug(Arc::clone(&connection), arrived.serial);
    // A file names images as a peer does: only those in shared folders are opened.
    let mut own = described.clone();
    disks::put_saved_paths(&agent.config.storage, &mut own)?;
    let made = connection.prepare(&own, &agent.config.bridges()).map_err(|error| error.to_string())?;
    agent.vms.learn(&agent.config, vm, &described.nics);
    let memory = made.map(huge_pages(described)).map_err(|error| error.to_string())?;
    fill(agent, id, restoring, &memory, cancel)?;
    if restoring.paused {
        hold(vm, Duration::ZERO).map_err(|error| error.to_string())?;
    }
    connection.load(&records).map_err(|error| error.to_string())?;
    go_on(cancel)?;
    // From here on a restarted agent knows that the guest is this host's, whatever older records say.
    let record = JournalRecord {
        kind: JournalRecordKind::Running,
        migration: restoring.migration,
        generation: restoring.generation,
        vm: described.id,
        peer: agent.key.id(),
        words: format!("restored from {}", restoring.path.display()),
    };
    agent.write(&record).map_err(|error| error.to_string())?;
    take_up(vm, Duration::ZERO).map_err(|error| error.to_string())
}

/// Puts the file's pages into fresh memory, in which all others are zero.
fn fill(agent: &Agent, id: u64, restoring: &Restoring, memory: &GuestMemory, cancel: &Cancel) -> Result<(), String> {
    let (mut input, _) = Input::open(&restoring.path)?;
    let mut telling = Telling::new(&agent.jobs, id, "restoring", input.bytes);
    while let Some(piece) = input.next()? {
        if let Piece::Pages(runs, data) = piece {
            let mut bytes = input.bytes_from(data);
            for run in runs {
                let Some((pages, rest)) = bytes.split_at_checked(usize::try_from(run.bytes()).unwrap_or(usize::MAX)) else {
                    return Err(format!("{} has changed meanwhile", restoring.path.display()));
                };
                if memory.memory_map().locate(run).is_none() {
                    return Err("the VMM made memory of another shape than the guest's".to_owned());
                }
                memory.write(run, 0, pages);
                bytes = rest;
            }
        }
        telling.tell(input.done(), input.done());
        go_on(cancel)?;
    }
    Ok(())
}

/// Ends what was made for a guest that is not restored.
fn discard(agent: &Agent, vm: &Arc<Vm>) {
    if let Some(connection) = vm.connection()
        && let Err(error) = connection.discard()
    {
        tracing::debug!(vm = vm.name, %error, "the incoming VMM did not take the order to end; it is ended");
    }
    vm.end_within(DISCARD_MAX);
    agent.vms.remove(vm.id);
    noted::forget(agent, vm.id);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_restored_guest_is_later_than_all_that_was_before() {
        let now_ms = 1_800_000_000_000;
        let line = generation(Generation(5), 9, now_ms);
        assert!(line.0 > 1_000_000 && line.0 < 1 << 53, "{line:?}: JSON carries it");
        assert!(generation(Generation(5), 9, now_ms + 1000).0 >= line.0 + GENERATIONS_PER_SECOND);
        assert_eq!(generation(Generation(5), 9, 0), Generation(9), "a clock that is wrong takes nothing back");
    }
}
