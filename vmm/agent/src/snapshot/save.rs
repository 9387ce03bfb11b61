//! `limosa vm save`: the guest stands still, its state and memory go into a file, then it is stopped, or runs on.
//! Whatever fails, the guest is as it was before and no file is left.

use super::file::Output;
use super::{Telling, job};
use crate::agent::Agent;
use crate::api::{ApiError, Direction, JobState, SnapshotInfo};
use crate::jobs::{Ending, unix_ms};
use crate::outgoing::resume;
use crate::vm::{Claim, VmState};
use limosa_link::Cancel;
use limosa_plug::{GuestMemory, HugePages, PlugConnection};
use limosa_proto::memory::{PAGE_BYTES, PageRange};
use limosa_proto::snapshot::{PAGES_PER_SECTION_MAX, RUNS_PER_SECTION_MAX, SavedGuest};
use limosa_proto::wire::message::VmDescription;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

/// How long a VMM that has lost its connection may take to come back before the save is given up.
const REPLUG_MAX: Duration = Duration::from_secs(3);
/// How long a stopped guest's VMM may take to end.
const STOP_MAX: Duration = Duration::from_secs(5);

/// Everything that a save needs.
struct Saving {
    claim: Claim,
    connection: Arc<PlugConnection>,
    description: VmDescription,
    memory: GuestMemory,
    output: Output,
    path: PathBuf,
    keep_running: bool,
}

/// Begins to save a guest; gives the job's number.
pub(crate) async fn begin(agent: &Arc<Agent>, vm: String, file: PathBuf, keep_running: bool) -> Result<u64, ApiError> {
    if agent.is_stopping() {
        return Err(ApiError::refused("shutdown", "the agent is stopping"));
    }
    let preparing = Arc::clone(agent);
    let prepared = tokio::task::spawn_blocking(move || prepare(&preparing, &vm, &file, keep_running)).await;
    let saving = prepared.map_err(|error| ApiError::refused("internal", error.to_string()))??;
    let (name, vm_id) = (saving.claim.vm().name.clone(), saving.description.id);
    let generation = agent.journal().next_generation(vm_id);
    let (id, cancel) = agent.jobs.begin(|id| job(id, Direction::Saving, &name, vm_id, generation, &saving.path));
    saving.claim.vm().on_lost(Some(cancel.clone()));
    tracing::info!(job = id, vm = name, file = %saving.path.display(), "a guest is being saved");
    let agent = Arc::clone(agent);
    let guest = SavedGuest {
        generation: generation.0,
        saved_unix_ms: unix_ms(),
        build: concat!("limosa ", env!("CARGO_PKG_VERSION")).to_owned(),
        vm: saving.description.clone(),
    };
    tokio::task::spawn_blocking(move || {
        let (ending, info) = carry_out(&agent, id, saving, &guest, &cancel);
        tracing::info!(job = id, state = ?ending.state, words = ending.words, "saving has ended");
        agent.jobs.update(id, |job| job.snapshot = info);
        agent.jobs.end(id, ending);
    });
    Ok(id)
}

fn prepare(agent: &Agent, vm: &str, path: &Path, keep_running: bool) -> Result<Saving, ApiError> {
    let claim = agent.vms.claim(vm, "saving")?;
    let failed = |words: String| ApiError::refused("vmm-failed", words);
    let connection = claim.vm().connection_within(REPLUG_MAX).map_err(failed)?;
    let described = connection.describe().map_err(|error| failed(error.to_string()))?;
    let description = described.description.clone();
    let memory = described.map(HugePages::Never).map_err(|error| failed(error.to_string()))?;
    let output = Output::create(path).map_err(|words| ApiError::refused("file", words))?;
    Ok(Saving { claim, connection, description, memory, output, path: path.to_owned(), keep_running })
}

/// Saves the guest and brings it to what it shall be then.
fn carry_out(agent: &Agent, id: u64, mut saving: Saving, guest: &SavedGuest, cancel: &Cancel) -> (Ending, Option<SnapshotInfo>) {
    let began = Instant::now();
    let vm = Arc::clone(saving.claim.vm());
    let held = vm.state() == VmState::Held;
    let end = |state, words: String, code: Option<&str>| Ending { state, words, code: code.map(str::to_owned), report: None };
    let paused = if held { Ok(()) } else { saving.connection.pause().map(drop).map_err(|error| error.to_string()) };
    let paused_since = Instant::now();
    let written = paused.and_then(|()| write(agent, id, &mut saving, guest, cancel));
    let stays = held || written.is_err() || saving.keep_running;
    let back = if stays && !held { resume(&vm, REPLUG_MAX).map_err(|error| error.to_string()) } else { Ok(()) };
    let paused_ms = (stays && !held).then(|| paused_since.elapsed().as_secs_f64() * 1e3);
    let file_bytes = saving.output.bytes;
    let path = saving.path.clone();
    let keep = saving.keep_running;
    // A half file and guest memory go with what is left of `saving`: before the job's end is told.
    let Saving { claim, connection, .. } = saving;
    let (records, pages) = match (written, back) {
        (Ok(counts), Ok(())) => counts,
        (Ok(_), Err(words)) => {
            let words = format!("{} is whole, and the guest could NOT be resumed: {words}; look after its VMM", path.display());
            return (end(JobState::Aborted, words, Some("vmm-failed")), None);
        }
        (Err(words), Ok(())) => {
            let code = if cancel.is_cancelled() { "cancelled" } else { "file" };
            return (end(JobState::Aborted, words, Some(code)), None);
        }
        (Err(words), Err(more)) => {
            let words = format!("{words}; and the guest could NOT be resumed: {more}; look after its VMM");
            return (end(JobState::Aborted, words, Some("vmm-failed")), None);
        }
    };
    let guest_now = match (keep, held) {
        (true, true) => "paused",
        (true, false) => "runs",
        (false, _) => {
            vm.on_lost(None);
            if let Err(error) = connection.shutdown() {
                tracing::warn!(vm = vm.name, %error, "the VMM did not take the order to stop; it is ended");
            }
            vm.end_within(STOP_MAX);
            agent.vms.remove(vm.id);
            "stopped"
        }
    };
    drop(claim);
    let info = SnapshotInfo {
        file_bytes,
        memory_bytes: guest.vm.memory.bytes(),
        pages,
        records,
        total_ms: began.elapsed().as_secs_f64() * 1e3,
        paused_ms: paused_ms.filter(|_| keep),
        guest: guest_now.to_owned(),
    };
    (end(JobState::Done, String::new(), None), Some(info))
}

/// Writes all of the paused guest; gives the number of records and of pages.
fn write(agent: &Agent, id: u64, saving: &mut Saving, guest: &SavedGuest, cancel: &Cancel) -> Result<(u64, u64), String> {
    let records = saving.connection.save().map_err(|error| error.to_string())?;
    let output = &mut saving.output;
    let section = output.writer.guest(guest).map_err(|error| error.to_string())?;
    output.put(&section)?;
    for record in &records {
        let section = output.writer.record(record).map_err(|error| error.to_string())?;
        output.put(&section)?;
    }
    let telling = Telling::new(&agent.jobs, id, "saving", guest.vm.memory.bytes());
    let mut pages =
        Pages { memory: &saving.memory, output, cancel, telling, runs: Vec::new(), waiting: 0, written: 0, section: Vec::new() };
    let map = guest.vm.memory.clone();
    let mut passed = 0;
    for region in (0..map.regions().len()).filter_map(|index| map.region_range(index)) {
        for extent in pages.memory.data_extents(region) {
            pages.extent(extent, passed + (extent.first - region.first) * PAGE_BYTES)?;
        }
        passed += region.bytes();
    }
    pages.flush()?;
    let written = pages.written;
    saving.output.finish()?;
    Ok((records.len() as u64, written))
}

/// Memory on its way into the file.
struct Pages<'a> {
    memory: &'a GuestMemory,
    output: &'a mut Output,
    cancel: &'a Cancel,
    telling: Telling<'a>,
    /// Runs of the next section.
    runs: Vec<PageRange>,
    /// Their pages.
    waiting: u64,
    written: u64,
    section: Vec<u8>,
}

impl Pages<'_> {
    /// Takes what is not zero of a range that may have memory behind it, which begins `passed` bytes into the guest's.
    fn extent(&mut self, extent: PageRange, passed: u64) -> Result<(), String> {
        for first in (extent.first..extent.end()).step_by(PAGES_PER_SECTION_MAX as usize) {
            let part = PageRange { first, count: PAGES_PER_SECTION_MAX.min(extent.end() - first) };
            let mut found = Vec::new();
            self.memory.scan(part, &mut |run, zero| {
                if !zero {
                    found.push(run);
                }
            });
            for run in found {
                self.take(run)?;
            }
            self.telling.tell(passed + (part.end() - extent.first) * PAGE_BYTES, self.output.bytes);
        }
        Ok(())
    }

    fn take(&mut self, mut run: PageRange) -> Result<(), String> {
        loop {
            if self.waiting >= PAGES_PER_SECTION_MAX || self.runs.len() >= RUNS_PER_SECTION_MAX {
                self.flush()?;
            }
            let count = run.count.min(PAGES_PER_SECTION_MAX - self.waiting);
            self.runs.push(PageRange { first: run.first, count });
            self.waiting += count;
            if count == run.count {
                return Ok(());
            }
            run = PageRange { first: run.first + count, count: run.count - count };
        }
    }

    fn flush(&mut self) -> Result<(), String> {
        if self.cancel.is_cancelled() {
            return Err("it was cancelled, or its VMM was lost; no file is left".to_owned());
        }
        if self.runs.is_empty() {
            return Ok(());
        }
        let memory = self.memory;
        self.output.writer.pages(&mut self.section, &self.runs, |run, bytes| memory.read(run, 0, bytes));
        self.output.put(&self.section)?;
        self.written += self.waiting;
        self.waiting = 0;
        self.runs.clear();
        Ok(())
    }
}
