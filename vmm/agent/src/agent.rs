//! What all parts of the agent share: configuration, key, trusted hosts, journal, jobs, guests.
//! It starts nothing; `run` does.

use crate::api::ApiError;
use crate::audit::Audit;
use crate::config::Config;
use crate::cpu::Learnt;
use crate::hosts::{Hosts, own_key};
use crate::jobs::Jobs;
use crate::journal::{self, Journal};
use crate::links::Links;
use crate::metrics::Metrics;
use crate::operators::Operators;
use crate::rules::Rules;
use crate::tickets::Tickets;
use crate::vms::Vms;
use limosa_link::HostKey;
use limosa_proto::commit::JournalRecord;
use limosa_proto::journal::JournalError;
use std::fs::DirBuilder;
use std::os::unix::fs::DirBuilderExt as _;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// A journal's disk with less room than this takes no migration: some hundred records.
const ROOM_BYTES_MIN: u64 = 64 << 10;

/// Why the journal cannot be used, and what to do about it.
fn journal_words(error: &JournalError) -> String {
    let remedy = match error {
        JournalError::Io { cause, .. } => match cause.kind() {
            std::io::ErrorKind::StorageFull | std::io::ErrorKind::QuotaExceeded => "; its disk is full: free some space there",
            std::io::ErrorKind::ReadOnlyFilesystem => "; its disk is read-only: make it writable (`mount -o remount,rw`)",
            _ => "; the agent does not run without it",
        },
        _ => "",
    };
    format!("{error}{remedy}")
}

/// The agent's parts.
#[derive(Debug)]
pub(crate) struct Agent {
    pub(crate) config: Config,
    pub(crate) key: HostKey,
    pub(crate) hosts: Hosts,
    pub(crate) rules: Rules,
    journal: Mutex<Journal>,
    pub(crate) jobs: Jobs,
    pub(crate) vms: Vms,
    pub(crate) links: Links,
    pub(crate) operators: Operators,
    pub(crate) tickets: Tickets,
    pub(crate) cpu: Learnt,
    pub(crate) audit: Arc<Audit>,
    pub(crate) metrics: Arc<Metrics>,
    stopping: AtomicBool,
    started: Instant,
}

impl Agent {
    /// Opens everything in the state directory. Gives what should be said about it too.
    ///
    /// # Errors
    /// What cannot be opened, in words.
    pub(crate) fn open(config: Config) -> Result<(Agent, Vec<String>), ApiError> {
        let refused = |words: String| ApiError::refused("state", words);
        let directory = |path: &Path, mode: u32| {
            // Only what is made here gets a mode: a directory that was there has its owner's.
            let made = if path.is_dir() { Ok(()) } else { DirBuilder::new().recursive(true).mode(mode).create(path) };
            made.map_err(|e| refused(format!("{}: {e}", path.display())))
        };
        directory(&config.state_dir, 0o700)?;
        directory(&config.state_dir.join("vm"), 0o700)?;
        directory(&config.run_dir, 0o755)?;
        let (audit, metrics) = (Arc::new(Audit::open(&config.state_dir)), Arc::new(Metrics::new()));
        let (journal, mut warnings) =
            journal::open(&config.state_dir, metrics.journal_sync()).map_err(|e| refused(journal_words(&e)))?;
        let key = own_key(&config.state_dir).map_err(|e| refused(e.to_string()))?;
        let hosts = Hosts::open(&config.state_dir).map_err(|e| ApiError::usage("hosts", e.to_string()))?;
        // A file that is not there yet keeps no agent from its start: it only trusts fewer.
        let nobody = |e| vec![format!("the fleet's statements are not read, and nobody is trusted by them: {e}")];
        warnings.extend(hosts.read_statements(&config.trust).unwrap_or_else(nobody));
        let (rules, said) = Rules::open(&config).map_err(|e| ApiError::usage("rule", e.to_string()))?;
        warnings.extend(said);
        let operators = Operators::new(config.operators.clone());
        if let Some(both) = operators.both(hosts.all().into_iter().map(|host| host.id).chain([key.id()])) {
            let words = format!(
                "the key of operator {} is a host's: an operator needs a key of its own (`limosa operator id`)",
                both.name
            );
            return Err(ApiError::usage("operators", words));
        }
        let tickets = Tickets::open(&config.state_dir);
        let jobs = config.state_dir.join("jobs");
        let jobs = Jobs::open(&jobs).map_err(|e| refused(format!("{}: {e}", jobs.display())))?;
        let (log, counters) = (Arc::clone(&audit), Arc::clone(&metrics));
        jobs.on_end(move |job, bytes| {
            log.ended(job);
            counters.ended(job, bytes);
        });
        let (journal, vms, stopping) = (Mutex::new(journal), Vms::default(), AtomicBool::new(false));
        let (links, cpu, started) = (Links::default(), Learnt::default(), Instant::now());
        #[rustfmt::skip]
        let agent = Agent { config, key, hosts, rules, journal, jobs, vms, links, operators, tickets, cpu, audit, metrics, stopping, started };
        Ok((agent, warnings))
    }

    /// The journal, for reading.
    pub(crate) fn journal(&self) -> MutexGuard<'_, Journal> {
        self.journal.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Writes a record durably.
    pub(crate) fn write(&self, record: &JournalRecord) -> Result<(), JournalError> {
        self.write_if(record, |_| true).map(drop)
    }

    /// Writes a record durably if what the journal says of its attempt allows it: nobody writes between the look and the
    /// writing. Whether it was written.
    pub(crate) fn write_if(
        &self,
        record: &JournalRecord,
        fits: impl FnOnce(&[JournalRecord]) -> bool,
    ) -> Result<bool, JournalError> {
        let mut journal = self.journal();
        if !fits(&journal.of(record.migration, record.generation)) {
            return Ok(false);
        }
        let written = journal.append(record);
        drop(journal);
        match &written {
            Ok(()) => {
                tracing::info!(kind = ?record.kind, migration = %record.migration, generation = record.generation.0, vm = %record.vm, "journal")
            }
            Err(error) => tracing::error!(%error, kind = ?record.kind, "the journal could not be written"),
        }
        written.map(|()| true)
    }

    /// Whether a migration could be written down now: none is begun or let in that could not.
    ///
    /// # Errors
    /// Why not, in words.
    pub(crate) fn can_record(&self) -> Result<(), String> {
        let file = self.config.state_dir.join(journal::FILE_NAME);
        let unwritable = |why: &str| Err(format!("the journal {} cannot be written: {why}", file.display()));
        if self.journal().is_broken() {
            return unwritable("an earlier write failed and could not be undone; restart the agent once the disk is well");
        }
        let disk = nix::sys::statvfs::statvfs(&self.config.state_dir).map_err(|e| format!("{}: {e}", file.display()))?;
        if disk.flags().contains(nix::sys::statvfs::FsFlags::ST_RDONLY) {
            return unwritable("its disk is read-only; make it writable (`mount -o remount,rw`), and look at the kernel's log");
        }
        // Root may use what is kept back for it.
        let free = if nix::unistd::geteuid().is_root() { disk.blocks_free() } else { disk.blocks_available() };
        if free.saturating_mul(disk.fragment_size()) < ROOM_BYTES_MIN {
            return unwritable("its disk is full; free some space there");
        }
        Ok(())
    }

    /// How long ago it started.
    pub(crate) fn since_start(&self) -> Duration {
        self.started.elapsed()
    }

    /// Whether the agent is about to end.
    pub(crate) fn is_stopping(&self) -> bool {
        self.stopping.load(Ordering::Acquire)
    }

    /// From now on nothing new is begun.
    pub(crate) fn stop(&self) {
        self.stopping.store(true, Ordering::Release);
    }
}
