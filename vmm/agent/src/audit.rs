//! The audit log: who ordered what, from where, with which ticket, who came with which guest, and how each ended. A file of JSON
//! lines that is only ever appended to. It is no journal: nothing is decided by it, and an agent whose audit log cannot be
//! written goes on, loudly. A file that was moved away (logrotate) is noticed at the next line, and a new one is begun.

use crate::api::{Answer, ApiError, JobInfo, JobState, Request};
use crate::jobs::Jobs;
use limosa_proto::ticket::Ticket;
use ring::rand::SecureRandom as _;
use serde::Serialize;
use std::collections::HashMap;
use std::fs::{File, OpenOptions};
use std::io::{self, Write as _};
use std::os::unix::fs::{MetadataExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant, SystemTime};

/// Name of the file in the agent's state directory.
pub(crate) const FILE_NAME: &str = "audit.log";
/// How often it is said at most that lines are lost.
const LOUD_INTERVAL: Duration = Duration::from_secs(10);
/// Jobs whose orders are remembered; an agent has far fewer at work.
const ATTEMPTS_MAX: usize = 10_000;

/// Who gave an order, and from where.
#[derive(Debug, Clone, Default)]
pub(crate) struct Who {
    /// In words: "root (user 0)", an operator's name.
    pub(crate) by: String,
    /// An operator's id, where it was one.
    pub(crate) operator: Option<String>,
    /// Where the order came from: "api.sock", or an address.
    pub(crate) from: String,
}

impl Who {
    /// Somebody on this host.
    pub(crate) fn local(by: &str) -> Who {
        Who { by: by.to_owned(), operator: None, from: "api.sock".to_owned() }
    }
}

/// What a line says; what it does not know is left out.
#[derive(Debug, Clone, Default, Serialize)]
pub(crate) struct Line {
    #[serde(skip_serializing_if = "String::is_empty")]
    pub(crate) at: String,
    #[serde(skip_serializing_if = "String::is_empty")]
    pub(crate) id: String,
    pub(crate) event: &'static str,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) order: Option<&'static str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) by: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) operator: Option<String>,
    /// The nonce of the ticket that was shown.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) ticket: Option<String>,
    /// The other host's id.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) host: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) from: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) to: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) link: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) vm: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) vm_id: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) file: Option<String>,
    /// What else was asked, in words.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) what: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) migration: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) generation: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) job: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) outcome: Option<&'static str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) code: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) words: Option<String>,
}

/// The log.
#[derive(Debug)]
pub(crate) struct Audit {
    path: PathBuf,
    file: Mutex<Option<File>>,
    /// The lines' id of each job at work.
    attempts: Mutex<HashMap<u64, String>>,
    lost: AtomicU64,
    loud: Mutex<Option<Instant>>,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

fn fresh_id() -> String {
    let mut id = [0_u8; 8];
    // Without randomness the lines are still told apart by their time.
    let _ = ring::rand::SystemRandom::new().fill(&mut id);
    id.iter().map(|byte| format!("{byte:02x}")).collect()
}

fn open(path: &Path) -> io::Result<File> {
    OpenOptions::new().append(true).create(true).mode(0o600).open(path)
}

impl Audit {
    /// The log in `directory`; it is opened at once, so that one that cannot be written is known at the start.
    pub(crate) fn open(directory: &Path) -> Audit {
        let path = directory.join(FILE_NAME);
        let audit =
            Audit { path, file: Mutex::default(), attempts: Mutex::default(), lost: AtomicU64::new(0), loud: Mutex::default() };
        match open(&audit.path) {
            Ok(file) => *lock(&audit.file) = Some(file),
            Err(error) => audit.say_lost(&error),
        }
        audit
    }

    /// Lines that could not be written.
    pub(crate) fn lost(&self) -> u64 {
        self.lost.load(Ordering::Relaxed)
    }

    /// An order that is about to be carried out; none if the request changes nothing.
    pub(crate) fn order(&self, request: &Request, who: &Who) -> Option<Order<'_>> {
        let mut line = told(request)?;
        line.by = Some(who.by.clone());
        line.operator.clone_from(&who.operator);
        line.from = Some(who.from.clone());
        let id = fresh_id();
        self.write(&id, line);
        Some(Order { audit: self, id, job: AtomicU64::new(0) })
    }

    /// A guest that another host would like to send: as job `job`, or refused at once.
    pub(crate) fn incoming(&self, job: Option<u64>, line: Line) -> String {
        let id = fresh_id();
        self.write(&id, Line { event: "incoming", job, ..line });
        if let Some(job) = job {
            self.remember(job, &id);
        }
        id
    }

    /// How what has `id` ended that never was a job.
    pub(crate) fn refused(&self, id: &str, code: &str, words: &str) {
        let (code, words) = (Some(code.to_owned()), Some(words.to_owned()));
        self.write(id, Line { event: "outcome", outcome: Some("refused"), code, words, ..Line::default() });
    }

    /// A job has come to its end, or into doubt. One that began before the agent's restart has no order here that is known.
    pub(crate) fn ended(&self, job: &JobInfo) {
        let id =
            if job.state.ended() { lock(&self.attempts).remove(&job.id) } else { lock(&self.attempts).get(&job.id).cloned() };
        self.write(&id.unwrap_or_else(|| "restarted".to_owned()), of_job("outcome", job));
    }

    fn remember(&self, job: u64, id: &str) {
        let mut attempts = lock(&self.attempts);
        if attempts.len() < ATTEMPTS_MAX {
            attempts.insert(job, id.to_owned());
        }
    }

    fn write(&self, id: &str, line: Line) {
        let at = humantime::format_rfc3339_millis(SystemTime::now()).to_string();
        let line = Line { at, id: id.to_owned(), ..line };
        let written = serde_json::to_vec(&line).map_err(io::Error::from).and_then(|mut bytes| {
            bytes.push(b'\n');
            self.append(&bytes)
        });
        if let Err(error) = written {
            self.say_lost(&error);
        }
    }

    /// One call a line, at the end of whatever file has the name now.
    fn append(&self, bytes: &[u8]) -> io::Result<()> {
        let mut file = lock(&self.file);
        let is_ours = |file: &File| {
            let (ours, named) = (file.metadata().ok()?, std::fs::metadata(&self.path).ok()?);
            (ours.dev() == named.dev() && ours.ino() == named.ino()).then_some(())
        };
        if file.as_ref().and_then(is_ours).is_none() {
            *file = Some(open(&self.path)?);
        }
        match file.as_mut() {
            Some(file) => file.write_all(bytes),
            None => Ok(()),
        }
    }

    fn say_lost(&self, error: &io::Error) {
        let lost = self.lost.fetch_add(1, Ordering::Relaxed) + 1;
        let mut loud = lock(&self.loud);
        if loud.is_none_or(|last| last.elapsed() >= LOUD_INTERVAL) {
            *loud = Some(Instant::now());
            tracing::error!(file = %self.path.display(), %error, lost, "THE AUDIT LOG CANNOT BE WRITTEN: orders are carried out that are not on record");
        }
    }
}

/// An order whose end has to be written.
#[derive(Debug)]
pub(crate) struct Order<'a> {
    audit: &'a Audit,
    id: String,
    /// The job that carries it out; 0 if there is none.
    job: AtomicU64,
}

impl Order<'_> {
    /// A job carries it out: the job's end is the order's, whoever waits for it.
    pub(crate) fn begun(&self, jobs: &Jobs, job: u64) {
        self.job.store(job, Ordering::Relaxed);
        let Some(info) = jobs.get(job) else { return };
        self.audit.write(&self.id, Line { outcome: None, code: None, words: None, ..of_job("begun", &info) });
        self.audit.remember(job, &self.id);
        // It may have ended before its order was known; who takes the order's id writes its end.
        if let Some(info) = jobs.get(job).filter(|info| info.state.ended())
            && lock(&self.audit.attempts).remove(&job).is_some()
        {
            self.audit.write(&self.id, of_job("outcome", &info));
        }
    }

    /// It was answered.
    pub(crate) fn answered(&self, answer: &Result<Answer, ApiError>) {
        if self.job.load(Ordering::Relaxed) != 0 {
            return;
        }
        match answer {
            Err(error) => self.audit.refused(&self.id, &error.code, &error.words),
            Ok(answer) => {
                let mut line = Line { event: "outcome", outcome: Some("done"), ..Line::default() };
                match answer {
                    Answer::Vm(vm) => (line.vm, line.vm_id) = (Some(vm.name.clone()), Some(vm.id.clone())),
                    Answer::Done(words) => line.words = Some(words.clone()),
                    Answer::Announced(lines) => line.words = Some(lines.join("; ")),
                    _ => {}
                }
                self.audit.write(&self.id, line);
            }
        }
    }
}

/// The word of a job's state.
pub(crate) fn outcome(state: JobState) -> &'static str {
    match state {
        JobState::Running => "running",
        JobState::Done => "done",
        JobState::Refused => "refused",
        JobState::Aborted => "aborted",
        JobState::InDoubt => "in-doubt",
    }
}

fn of_job(event: &'static str, job: &JobInfo) -> Line {
    let some = |text: &str| (!text.is_empty()).then(|| text.to_owned());
    Line {
        event,
        vm: some(&job.vm),
        vm_id: some(&job.vm_id),
        to: some(&job.peer),
        migration: some(&job.migration),
        generation: Some(job.generation),
        job: Some(job.id),
        link: job.report.as_ref().map(|report| report.link.clone()),
        outcome: Some(outcome(job.state)),
        code: job.code.clone(),
        words: some(&job.words),
        ..Line::default()
    }
}

/// How a ticket is named on record: its nonce says nothing to whoever has not got it.
pub(crate) fn nonce(ticket: &Ticket) -> String {
    ticket.claims().nonce.0.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// What is asked for, if it changes anything.
fn told(request: &Request) -> Option<Line> {
    let order = |order: &'static str| Line { event: "order", order: Some(order), ..Line::default() };
    let of = |word: &'static str, name: &str| Line { vm: Some(name.to_owned()), ..order(word) };
    let file = |path: &Path| Some(path.display().to_string());
    Some(match request {
        Request::VmStart { config } => Line { file: file(config), ..order("vm-start") },
        Request::VmStop { vm } => of("vm-stop", vm),
        Request::VmPause { vm } => of("vm-pause", vm),
        Request::VmResume { vm } => of("vm-resume", vm),
        Request::VmSave { vm, file: path, keep_running } => {
            Line { file: file(path), what: keep_running.then(|| "keep running".to_owned()), ..of("vm-save", vm) }
        }
        Request::VmRestore { file: path, paused } => {
            Line { file: file(path), what: paused.then(|| "paused".to_owned()), ..order("vm-restore") }
        }
        Request::HostTrust(info) => Line {
            host: Some(info.id.clone()),
            to: Some(info.name.clone()),
            what: Some(info.address.clone()),
            ..order("host-trust")
        },
        Request::HostRemove { name } => Line { to: Some(name.clone()), ..order("host-remove") },
        Request::Migrate(asked) if !asked.plan_only => {
            let ticket = asked.ticket.as_deref().and_then(|text| Ticket::parse(text).ok());
            Line {
                to: Some(asked.to.clone()),
                link: asked.link.clone(),
                ticket: ticket.as_ref().map(nonce),
                ..of("migrate", &asked.vm)
            }
        }
        Request::HostTrustAll(all) => Line {
            what: Some(
                all.iter().map(|host| format!("{} {} {}", host.name, host.id, host.address)).collect::<Vec<_>>().join(", "),
            ),
            ..order("host-trust-all")
        },
        Request::HostRevoke { which, undo } => {
            Line { to: Some(which.clone()), ..order(if *undo { "host-unrevoke" } else { "host-revoke" }) }
        }
        Request::HostStatement { text } => Line { what: Some(text.clone()), ..order("host-statement") },
        Request::HostRotate { overlap } => Line { what: Some(format!("overlap {overlap} s")), ..order("host-rotate") },
        Request::HostRotateFinish => order("host-rotate-finish"),
        Request::Allow(asked) if asked.changes() => Line { what: serde_json::to_string(asked).ok(), ..order("allow") },
        Request::Cancel { id } => Line { job: Some(*id), ..order("cancel") },
        Request::Verdict { id, decide: Some(decide) } => {
            Line { job: Some(*id), what: serde_json::to_string(decide).ok(), ..order("verdict") }
        }
        Request::Announce { vm } => of("announce", vm),
        Request::VmList
        | Request::VmShow { .. }
        | Request::HostId
        | Request::HostShow
        | Request::HostCpu
        | Request::HostList
        | Request::HostAsk { .. }
        | Request::HostRevoked
        | Request::Allow(_)
        | Request::Parties { .. }
        | Request::Migrate(_)
        | Request::Check(_)
        | Request::Jobs { .. }
        | Request::Job { .. }
        | Request::Verdict { decide: None, .. } => return None,
    })
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use serde_json::Value;
    use std::os::unix::fs::PermissionsExt as _;

    fn lines(path: &Path) -> Vec<Value> {
        std::fs::read_to_string(path).unwrap().lines().map(|line| serde_json::from_str(line).unwrap()).collect()
    }

    fn stop(audit: &Audit, name: &str) {
        let order = audit.order(&Request::VmStop { vm: name.to_owned() }, &Who::local("root (user 0)")).unwrap();
        order.answered(&Ok(Answer::Done("stopped".into())));
    }

    #[test]
    fn an_order_has_two_lines_and_what_only_asks_has_none() {
        let dir = tempfile::tempdir().unwrap();
        let audit = Audit::open(dir.path());
        let path = dir.path().join(FILE_NAME);
        assert_eq!(std::fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
        assert!(audit.order(&Request::VmList, &Who::default()).is_none());
        assert!(audit.order(&Request::Verdict { id: 1, decide: None }, &Who::default()).is_none());
        // Whatever a name is made of, it is one line.
        stop(&audit, "we\nb\u{1b}[31m");
        let order = audit.order(&Request::Cancel { id: 7 }, &Who::local("ana")).unwrap();
        order.answered(&Err(ApiError::refused("cancel", "there is no job 7")));
        let all = lines(&path);
        assert_eq!(all.len(), 4);
        assert_eq!(
            (&all[0]["event"], &all[0]["order"], &all[0]["vm"]),
            (&"order".into(), &"vm-stop".into(), &"we\nb\u{1b}[31m".into())
        );
        assert_eq!((&all[0]["id"], &all[1]["outcome"]), (&all[1]["id"], &"done".into()));
        assert_eq!((&all[2]["id"], &all[3]["outcome"], &all[3]["code"]), (&all[3]["id"], &"refused".into(), &"cancel".into()));
        assert_ne!(all[0]["id"], all[2]["id"]);
    }

    #[test]
    fn a_file_that_was_moved_away_is_begun_anew() {
        let dir = tempfile::tempdir().unwrap();
        let audit = Audit::open(dir.path());
        let (path, moved) = (dir.path().join(FILE_NAME), dir.path().join("audit.log.1"));
        stop(&audit, "first");
        std::fs::rename(&path, &moved).unwrap();
        stop(&audit, "second");
        std::fs::remove_file(&path).unwrap();
        stop(&audit, "third");
        assert_eq!((lines(&moved).len(), lines(&path).len(), audit.lost()), (2, 2, 0));
        assert_eq!(lines(&path)[0]["vm"], "third");
        // Another agent's lines, or those of a life before, stay.
        stop(&Audit::open(dir.path()), "fourth");
        assert_eq!(lines(&path).len(), 4);
    }

    #[test]
    fn a_log_that_cannot_be_written_is_counted_and_stops_nothing() {
        let dir = tempfile::tempdir().unwrap();
        // A folder in its place: not even root can write that.
        std::fs::create_dir(dir.path().join(FILE_NAME)).unwrap();
        let audit = Audit::open(dir.path());
        stop(&audit, "web");
        assert_eq!(audit.lost(), 3);
        std::fs::remove_dir(dir.path().join(FILE_NAME)).unwrap();
        stop(&audit, "web");
        assert_eq!((audit.lost(), lines(&dir.path().join(FILE_NAME)).len()), (3, 2));
    }

    #[test]
    fn a_job_that_ended_at_once_is_told_once() {
        let dir = tempfile::tempdir().unwrap();
        let (audit, jobs) = (Audit::open(dir.path()), Jobs::open(&dir.path().join("jobs")).unwrap());
        let migrate = Request::Migrate(crate::api::MigrateRequest { vm: "web".into(), to: "beta".into(), ..Default::default() });
        let begin = || jobs.begin(|id| JobInfo::begun(id, crate::api::Direction::Outgoing, "web", "", "beta".into())).0;
        let end = |id| {
            let words = "so".to_owned();
            jobs.end(id, crate::jobs::Ending { state: JobState::Aborted, words, code: None, report: None });
            audit.ended(&jobs.get(id).unwrap());
        };
        let (before, after) = (begin(), begin());
        end(before);
        for job in [before, after] {
            let order = audit.order(&migrate, &Who::local("root")).unwrap();
            order.begun(&jobs, job);
            order.answered(&Err(ApiError::refused("gone", "the command went away")));
        }
        end(after);
        let all = lines(&dir.path().join(FILE_NAME));
        let outcomes = |id: &Value| all.iter().filter(|line| line["event"] == "outcome" && line["id"] == *id).count();
        let orders: Vec<&Value> = all.iter().filter(|line| line["event"] == "order").map(|line| &line["id"]).collect();
        assert_eq!(orders.iter().map(|id| outcomes(id)).collect::<Vec<_>>(), [1, 1], "{all:#?}");
    }
}
