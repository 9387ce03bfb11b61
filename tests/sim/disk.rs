//! A simulated disk under the real journal: what was written and not synced is lost or torn when the power goes, syncs and
//! cuts fail, a rename may come undone. Only the agent's journal file is on it.

use crate::checker::Mutant;
use crate::faults::{Misfortune, Random};
use limosa_proto::commit::JournalRecord;
use limosa_proto::journal::{self, Disk};
use std::cell::RefCell;
use std::io;
use std::rc::Rc;

/// How a journal's write killed its writer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Death {
    Agent,
    Host,
}

/// What outlives an agent: the file as a reader sees it, and as it would be after a power cut.
#[derive(Debug)]
struct Platter {
    seen: Vec<u8>,
    durable: Vec<u8>,
    /// The file of the same name before a rename that is not durable yet.
    before_rename: Option<Vec<u8>>,
    beside: Vec<u8>,
    misfortune: Option<Misfortune>,
    cut_fails: bool,
    death: Option<Death>,
    random: Random,
    mutant: Option<Mutant>,
}

/// A handle to the disk; the agent's journal owns one, and the host another.
#[derive(Debug, Clone)]
pub(crate) struct SimDisk(Rc<RefCell<Platter>>);

fn failed(what: &str) -> io::Error {
    io::Error::other(format!("simulated: {what}"))
}

impl SimDisk {
    pub(crate) fn new(random: Random, mutant: Option<Mutant>) -> SimDisk {
        SimDisk(Rc::new(RefCell::new(Platter {
            seen: Vec::new(),
            durable: Vec::new(),
            before_rename: None,
            beside: Vec::new(),
            misfortune: None,
            cut_fails: false,
            death: None,
            random,
            mutant,
        })))
    }

    /// A disk on which a journal with these records lies.
    pub(crate) fn holding(records: &[JournalRecord]) -> SimDisk {
        let disk = SimDisk::new(Random::new(0), None);
        let bytes = journal::emit(records);
        (disk.0.borrow_mut().seen, disk.0.borrow_mut().durable) = (bytes.clone(), bytes);
        disk
    }

    /// Strikes at the next write.
    pub(crate) fn arm(&self, misfortune: Misfortune) {
        self.0.borrow_mut().misfortune = Some(misfortune);
    }

    /// From now on nothing fails.
    pub(crate) fn heal(&self) {
        let mut platter = self.0.borrow_mut();
        (platter.misfortune, platter.cut_fails) = (None, false);
    }

    /// Whether the last write killed its writer; told once.
    pub(crate) fn take_death(&self) -> Option<Death> {
        self.0.borrow_mut().death.take()
    }

    /// The writer is dead: what it was about to append may have been written, all or in part.
    pub(crate) fn die_writing(&self, line: &[u8]) {
        let mut platter = self.0.borrow_mut();
        let length = line.len();
        let kept = match platter.random.below(3) {
            0 => 0,
            1 => length,
            _ => platter.random.index(length + 1),
        };
        platter.seen.extend_from_slice(&line[..kept]);
    }

    /// The power goes: what was not synced is gone, there, or torn.
    pub(crate) fn power_cut(&self) {
        let mut platter = self.0.borrow_mut();
        if let Some(before) = platter.before_rename.take()
            && platter.random.percent(50)
        {
            platter.durable = before;
        }
        let durable = platter.durable.len();
        if platter.seen.len() > durable && platter.seen.starts_with(&platter.durable) {
            let tail = platter.seen[durable..].to_vec();
            let kept = platter.random.index(tail.len() + 1);
            let torn = platter.random.percent(30);
            let mut tail = tail[..kept].to_vec();
            if torn && let Some(byte) = tail.last_mut() {
                // A sector that was never written.
                *byte = 0;
            }
            platter.durable.extend(tail);
        }
        platter.seen = platter.durable.clone();
        (platter.death, platter.misfortune, platter.cut_fails) = (None, None, false);
    }

    /// What would be read after a power cut now, at the worst.
    pub(crate) fn durable(&self) -> Vec<JournalRecord> {
        let platter = self.0.borrow();
        let bytes = platter.before_rename.as_ref().unwrap_or(&platter.durable);
        journal::read(bytes).map(|found| found.records).unwrap_or_default()
    }

    /// How many bytes there are.
    pub(crate) fn bytes(&self) -> usize {
        self.0.borrow().seen.len()
    }
}

impl Disk for SimDisk {
    fn name(&self) -> String {
        "simulated".to_owned()
    }

    fn read(&mut self) -> io::Result<Vec<u8>> {
        Ok(self.0.borrow().seen.clone())
    }

    fn append(&mut self, bytes: &[u8]) -> io::Result<()> {
        let mut platter = self.0.borrow_mut();
        if platter.death.is_some() {
            return Err(failed("the writer is dead"));
        }
        let misfortune = platter.misfortune;
        if misfortune == Some(Misfortune::HalfWrite) {
            platter.misfortune = None;
            let half = platter.random.index(bytes.len());
            platter.seen.extend_from_slice(&bytes[..half]);
            return Err(failed("no space left"));
        }
        platter.seen.extend_from_slice(bytes);
        let death = match misfortune {
            Some(Misfortune::DieUnsynced) => Death::Agent,
            Some(Misfortune::PowerCutUnsynced) => Death::Host,
            _ => return Ok(()),
        };
        (platter.misfortune, platter.death) = (None, Some(death));
        Err(failed("killed"))
    }

    fn sync(&mut self) -> io::Result<()> {
        let mut platter = self.0.borrow_mut();
        if platter.death.is_some() {
            return Err(failed("the writer is dead"));
        }
        if platter.mutant == Some(Mutant::ForgetsSync) {
            return Ok(());
        }
        if let Some(Misfortune::SyncFails { durable } | Misfortune::SyncAndCutFail { durable }) = platter.misfortune {
            platter.cut_fails = matches!(platter.misfortune, Some(Misfortune::SyncAndCutFail { .. }));
            platter.misfortune = None;
            if durable {
                platter.durable = platter.seen.clone();
            }
            return Err(failed("input/output error"));
        }
        platter.durable = platter.seen.clone();
        Ok(())
    }

    fn cut(&mut self, length: u64) -> io::Result<()> {
        let mut platter = self.0.borrow_mut();
        if platter.death.is_some() || platter.cut_fails {
            return Err(failed("input/output error"));
        }
        platter.seen.truncate(usize::try_from(length).unwrap());
        Ok(())
    }

    fn write_beside(&mut self, bytes: &[u8]) -> io::Result<()> {
        let mut platter = self.0.borrow_mut();
        platter.beside = bytes.to_vec();
        if platter.mutant == Some(Mutant::CompactionForgetsOpen) {
            let records = journal::read(bytes).map(|found| found.records).unwrap_or_default();
            let ended = |of: &JournalRecord| {
                use limosa_proto::commit::JournalRecordKind::{Aborted, Discarded, Running};
                let same = |r: &&JournalRecord| (r.migration, r.generation) == (of.migration, of.generation);
                records.iter().filter(same).any(|r| matches!(r.kind, Aborted | Discarded | Running))
            };
            let kept: Vec<JournalRecord> = records.iter().filter(|record| ended(record)).cloned().collect();
            platter.beside = journal::emit(&kept);
        }
        Ok(())
    }

    fn put_in_place(&mut self) -> io::Result<()> {
        let mut platter = self.0.borrow_mut();
        let beside = std::mem::take(&mut platter.beside);
        let before = std::mem::replace(&mut platter.durable, beside.clone());
        platter.before_rename = Some(before);
        platter.seen = beside;
        Ok(())
    }

    fn sync_names(&mut self) -> io::Result<()> {
        let mut platter = self.0.borrow_mut();
        if platter.mutant != Some(Mutant::ForgetsNames) {
            platter.before_rename = None;
        }
        Ok(())
    }
}
