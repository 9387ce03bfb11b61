//! Snapshots: a guest into a file and out of it, by the same records and the same plug as a migration. Each is a job.
//! The bytes are `limosa_proto::snapshot`'s. No disk is saved, and nothing is sent anywhere.

mod file;
pub(crate) mod restore;
pub(crate) mod save;

use crate::api::{Direction, JobInfo, JobProgress};
use crate::jobs::Jobs;
use limosa_proto::identity::{Generation, VmId};
use std::path::Path;
use std::time::{Duration, Instant};

/// How often a job's progress is told.
const TELL_INTERVAL: Duration = Duration::from_millis(100);

/// A job that saves or restores `vm`.
fn job(id: u64, direction: Direction, vm: &str, vm_id: VmId, generation: Generation, file: &Path) -> JobInfo {
    let job = JobInfo::begun(id, direction, vm, &vm_id.to_string(), file.display().to_string());
    JobInfo { generation: generation.0, ..job }
}

/// Tells how far a job is, and not too often.
struct Telling<'a> {
    jobs: &'a Jobs,
    id: u64,
    began: Instant,
    told: Option<Instant>,
    progress: JobProgress,
}

impl<'a> Telling<'a> {
    fn new(jobs: &'a Jobs, id: u64, phase: &str, memory_bytes: u64) -> Telling<'a> {
        let progress =
            JobProgress { phase: phase.to_owned(), memory_bytes, bytes_remaining: memory_bytes, ..JobProgress::default() };
        Telling { jobs, id, began: Instant::now(), told: None, progress }
    }

    /// `done` bytes of the whole are through, for which `file_bytes` are in the file.
    fn tell(&mut self, done: u64, file_bytes: u64) {
        if self.told.is_some_and(|told| told.elapsed() < TELL_INTERVAL) {
            return;
        }
        self.told = Some(Instant::now());
        let rate = file_bytes as f64 / self.began.elapsed().as_secs_f64().max(1e-3);
        self.progress.bytes_remaining = self.progress.memory_bytes.saturating_sub(done);
        self.progress.bytes_on_wire = file_bytes;
        self.progress.rate_bytes_per_s = rate as u64;
        self.jobs.progress(self.id, self.progress.clone());
    }
}
