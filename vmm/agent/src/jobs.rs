//! Jobs: the migrations of this host, those at work in memory, finished ones also as files.
//! A job carries out nothing; `outgoing` and `incoming` do and keep it up to date.

use crate::api::{Direction, JobInfo, JobProgress, JobState};
use crate::cutting::Other;
use limosa_link::Cancel;
use limosa_proto::identity::{Generation, MigrationId, VmId};
use limosa_proto::report::Report;
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::{SystemTime, UNIX_EPOCH};
use tokio::sync::watch;

/// Finished jobs that are remembered.
pub const KEPT_MAX: usize = 200;

/// Told of each job that ends or comes into doubt, with the bytes that were on the wire.
type OnEnd = Box<dyn Fn(&JobInfo, u64) + Send + Sync>;

/// All jobs; cheap to clone.
#[derive(Clone)]
pub struct Jobs {
    inner: Arc<Mutex<Table>>,
    changed: watch::Sender<u64>,
    on_end: Arc<OnceLock<OnEnd>>,
}

impl std::fmt::Debug for Jobs {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Jobs({})", self.lock().jobs.len())
    }
}

#[derive(Debug)]
struct Table {
    directory: PathBuf,
    next: u64,
    jobs: BTreeMap<u64, Entry>,
}

#[derive(Debug)]
struct Entry {
    info: JobInfo,
    cancel: Cancel,
    /// With whom it is, while it may be cut off from him.
    other: Option<Other>,
    /// Held by whoever asks the other host about it.
    asking: Arc<tokio::sync::Mutex<()>>,
    /// The last end that was told.
    told: Option<JobState>,
}

impl Entry {
    fn new(info: JobInfo, cancel: Cancel) -> Entry {
        Entry { info, cancel, other: None, asking: Arc::default(), told: None }
    }
}

/// How a job came to its end, or into doubt.
#[derive(Debug, Clone)]
pub struct Ending {
    /// The state.
    pub state: JobState,
    /// Why, in words.
    pub words: String,
    /// A word for machines when it did not succeed.
    pub code: Option<String>,
    /// What it came to.
    pub report: Option<Report>,
}

/// Milliseconds since 1970.
#[must_use]
pub(crate) fn unix_ms() -> u64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    u64::try_from(since.as_millis()).unwrap_or(u64::MAX)
}

impl Jobs {
    /// The jobs kept in `directory`, which is made if it is absent. Files that are no jobs are left alone.
    ///
    /// # Errors
    /// The directory cannot be made or read.
    pub fn open(directory: &Path) -> std::io::Result<Jobs> {
        std::fs::create_dir_all(directory)?;
        let mut jobs = BTreeMap::new();
        for file in std::fs::read_dir(directory)? {
            let path = file?.path();
            let info = std::fs::read(&path).ok().and_then(|bytes| serde_json::from_slice::<JobInfo>(&bytes).ok());
            if let Some(info) = info {
                jobs.insert(info.id, Entry::new(info, Cancel::new()));
            }
        }
        let next = jobs.last_key_value().map_or(1, |(last, _)| last + 1);
        let table = Table { directory: directory.to_path_buf(), next, jobs };
        Ok(Jobs { inner: Arc::new(Mutex::new(table)), changed: watch::Sender::new(0), on_end: Arc::default() })
    }

    /// Has `told` hear of each job that ends or comes into doubt.
    pub(crate) fn on_end(&self, told: impl Fn(&JobInfo, u64) + Send + Sync + 'static) {
        // Said once, when the agent is made.
        let _ = self.on_end.set(Box::new(told));
    }

    /// Begins a job; gives its number and what cancels it.
    pub fn begin(&self, make: impl FnOnce(u64) -> JobInfo) -> (u64, Cancel) {
        let mut table = self.lock();
        let id = table.next;
        table.next += 1;
        let cancel = Cancel::new();
        table.jobs.insert(id, Entry::new(make(id), cancel.clone()));
        drop(table);
        self.tell();
        (id, cancel)
    }

    /// Notes how far a job is.
    pub fn progress(&self, id: u64, progress: JobProgress) {
        if let Some(entry) = self.lock().jobs.get_mut(&id) {
            entry.info.progress = Some(progress);
        }
        self.tell();
    }

    /// Changes what is known of a job.
    pub fn update(&self, id: u64, change: impl FnOnce(&mut JobInfo)) {
        if let Some(entry) = self.lock().jobs.get_mut(&id) {
            change(&mut entry.info);
        }
        self.tell();
    }

    /// The guest with this id is called so: jobs that an earlier agent's journal left know its id only.
    pub fn name(&self, vm: VmId, name: &str) {
        let vm = vm.to_string();
        for entry in self.lock().jobs.values_mut().filter(|entry| entry.info.vm == vm) {
            name.clone_into(&mut entry.info.vm);
        }
        self.tell();
    }

    /// Notes a job's end, or that it is in doubt, and keeps an ended one as a file.
    pub fn end(&self, id: u64, ending: Ending) {
        let mut table = self.lock();
        let mut told = None;
        if let Some(entry) = table.jobs.get_mut(&id) {
            let is_new = entry.told != Some(ending.state);
            entry.told = Some(ending.state);
            let info = &mut entry.info;
            info.state = ending.state;
            info.words = ending.words;
            info.code = ending.code;
            if ending.report.is_some() {
                info.report = ending.report;
            }
            let bytes = info.progress.as_ref().map_or(0, |progress| progress.bytes_on_wire);
            let bytes = info.report.as_ref().map_or(bytes, |report| report.bytes_on_wire);
            if ending.state.ended() {
                info.progress = None;
                info.ended_unix_ms = Some(unix_ms());
            }
            let info = info.clone();
            if ending.state.ended() {
                table.keep(&info);
            }
            told = is_new.then_some((info, bytes));
        }
        drop(table);
        self.tell();
        if let (Some((info, bytes)), Some(on_end)) = (told, self.on_end.get()) {
            on_end(&info, bytes);
        }
    }

    /// Asks a job to stop.
    ///
    /// # Errors
    /// Why it cannot, in words.
    pub fn cancel(&self, id: u64, words: &str) -> Result<(), String> {
        let table = self.lock();
        let entry = table.jobs.get(&id).ok_or_else(|| format!("there is no job {id}; `limosa jobs` lists them"))?;
        match entry.info.state {
            JobState::Running => {
                entry.cancel.cancel(words);
                Ok(())
            }
            JobState::InDoubt => Err(format!("job {id} is past its commit and in doubt: it ends when the hosts can talk again")),
            _ => Err(format!("job {id} has already ended: {}", entry.info.words)),
        }
    }

    /// Notes with whom a job is.
    pub(crate) fn with(&self, id: u64, other: Other) {
        if let Some(entry) = self.lock().jobs.get_mut(&id) {
            entry.other = Some(other);
        }
    }

    /// Asks every job at work to stop of which `why` gives words; those with the words.
    pub(crate) fn cut(&self, why: impl Fn(&Other) -> Option<String>) -> Vec<(u64, String)> {
        // Looked at apart from the lock: `why` takes others.
        let table = self.lock();
        let running = table.jobs.values().filter(|entry| entry.info.state == JobState::Running);
        let all: Vec<(u64, Other, Cancel)> =
            running.filter_map(|entry| Some((entry.info.id, entry.other.clone()?, entry.cancel.clone()))).collect();
        drop(table);
        let cut = |(id, other, cancel): (u64, Other, Cancel)| {
            let words = why(&other)?;
            cancel.cancel(words.clone());
            Some((id, words))
        };
        all.into_iter().filter_map(cut).collect()
    }

    /// Asks every job at work to stop.
    pub fn cancel_all(&self, words: &str) {
        for entry in self.lock().jobs.values().filter(|entry| entry.info.state == JobState::Running) {
            entry.cancel.cancel(words);
        }
    }

    /// Held by whoever asks the other host about a job: one at a time.
    #[must_use]
    pub fn asking(&self, id: u64) -> Arc<tokio::sync::Mutex<()>> {
        self.lock().jobs.get(&id).map(|entry| Arc::clone(&entry.asking)).unwrap_or_default()
    }

    /// One job.
    #[must_use]
    pub fn get(&self, id: u64) -> Option<JobInfo> {
        self.lock().jobs.get(&id).map(|entry| entry.info.clone())
    }

    /// All jobs, oldest first.
    #[must_use]
    pub fn all(&self) -> Vec<JobInfo> {
        self.lock().jobs.values().map(|entry| entry.info.clone()).collect()
    }

    /// How many are at work in this direction.
    #[must_use]
    pub fn running(&self, direction: Direction) -> usize {
        let at_work = |entry: &&Entry| entry.info.direction == direction && entry.info.state == JobState::Running;
        self.lock().jobs.values().filter(at_work).count()
    }

    /// Changes whenever a job does.
    #[must_use]
    pub fn watch(&self) -> watch::Receiver<u64> {
        self.changed.subscribe()
    }

    fn lock(&self) -> MutexGuard<'_, Table> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn tell(&self) {
        self.changed.send_modify(|count| *count = count.wrapping_add(1));
    }
}

impl Table {
    fn file(&self, id: u64) -> PathBuf {
        self.directory.join(format!("{id}.json"))
    }

    fn keep(&mut self, info: &JobInfo) {
        let path = self.file(info.id);
        let written = serde_json::to_vec_pretty(info).map_err(std::io::Error::from).and_then(|bytes| {
            let beside = path.with_extension("new");
            std::fs::write(&beside, bytes)?;
            std::fs::rename(&beside, &path)
        });
        if let Err(error) = written {
            tracing::warn!(job = info.id, file = %path.display(), %error, "a finished job could not be kept");
        }
        let ended: Vec<u64> = self.jobs.values().filter(|e| e.info.state.ended()).map(|e| e.info.id).collect();
        for old in ended.iter().take(ended.len().saturating_sub(KEPT_MAX)) {
            self.jobs.remove(old);
            // A file that is gone already is what is wanted.
            let _ = std::fs::remove_file(self.file(*old));
        }
    }
}

impl JobInfo {
    /// A job that begins now: it runs, and nothing is known of how it goes.
    pub(crate) fn begun(id: u64, direction: Direction, vm: &str, vm_id: &str, peer: String) -> JobInfo {
        JobInfo {
            id,
            direction,
            vm: vm.to_owned(),
            vm_id: vm_id.to_owned(),
            peer,
            migration: String::new(),
            generation: 0,
            state: JobState::Running,
            began_unix_ms: unix_ms(),
            ended_unix_ms: None,
            progress: None,
            report: None,
            announcements: Vec::new(),
            snapshot: None,
            words: String::new(),
            code: None,
        }
    }

    /// The same, of this attempt at moving the guest.
    pub(crate) fn of(mut self, migration: MigrationId, generation: Generation) -> JobInfo {
        self.migration = migration.to_string();
        self.generation = generation.0;
        self
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    fn info(id: u64) -> JobInfo {
        JobInfo { generation: 1, ..JobInfo::begun(id, Direction::Outgoing, "web", "", "beta".into()) }
    }

    fn ending(state: JobState) -> Ending {
        Ending { state, words: "so".into(), code: None, report: None }
    }

    #[test]
    fn finished_jobs_are_kept_and_bounded() {
        let dir = tempfile::tempdir().unwrap();
        let jobs = Jobs::open(dir.path()).unwrap();
        for _ in 0..KEPT_MAX + 5 {
            let (id, _cancel) = jobs.begin(info);
            jobs.end(id, ending(JobState::Done));
        }
        let (open, _cancel) = jobs.begin(info);
        drop(jobs);
        let jobs = Jobs::open(dir.path()).unwrap();
        assert_eq!(jobs.all().len(), KEPT_MAX);
        assert_eq!(jobs.all().first().unwrap().id, 6);
        assert!(jobs.get(open).is_none());
        assert!(jobs.begin(info).0 > 200);
    }

    #[test]
    fn a_cancel_arrives_only_while_it_helps() {
        let dir = tempfile::tempdir().unwrap();
        let jobs = Jobs::open(dir.path()).unwrap();
        let (id, cancel) = jobs.begin(info);
        assert_eq!(jobs.running(Direction::Outgoing), 1);
        jobs.cancel(id, "by hand").unwrap();
        assert!(cancel.is_cancelled());
        jobs.end(id, ending(JobState::InDoubt));
        assert!(jobs.cancel(id, "by hand").unwrap_err().contains("past its commit"));
        jobs.end(id, ending(JobState::Aborted));
        assert!(jobs.cancel(id, "by hand").unwrap_err().contains("already ended: so"));
        assert!(jobs.cancel(99, "by hand").is_err());
    }
}
