//! The journal: what a host promised about whom a guest belongs to, durable before it is acted upon. Its bytes, one line a
//! record, each with a CRC-32; and its rules: what a failed write leaves, what a crash may tear, what a rewrite may leave out.
//! It opens no file: a [`Disk`] is the file, the agent's real one or a simulation's. What records mean is decided in [`crate::commit`].

use crate::commit::{self, JournalRecord, JournalRecordKind};
use crate::identity::{Generation, MigrationId, VmId};
use crate::lines::{self, Damage};
use serde::{Deserialize, Serialize};
use std::collections::{BTreeMap, BTreeSet};
use std::io;

/// Version of the line format, in the first record.
pub const FORMAT: u32 = 1;
/// Largest journal that is to be read: far beyond what a rewrite leaves.
pub const BYTES_MAX: u64 = 256 << 20;
/// Words of a record that are kept, in characters.
const WORDS_CHARS_MAX: usize = 500;

/// The file under a journal, held by one writer, and the directory that names it. An error says that nothing is known of
/// what was asked: it may be done, half done, or not done.
pub trait Disk {
    /// What the file is called, for words.
    fn name(&self) -> String;
    /// Everything that is in it; an error beyond [`BYTES_MAX`].
    ///
    /// # Errors
    /// The system's.
    fn read(&mut self) -> io::Result<Vec<u8>>;
    /// Writes behind the last byte. Not durable before [`Disk::sync`].
    ///
    /// # Errors
    /// The system's; some of the bytes may be there.
    fn append(&mut self, bytes: &[u8]) -> io::Result<()>;
    /// When it returns, the file as it is survives a power cut.
    ///
    /// # Errors
    /// The system's.
    fn sync(&mut self) -> io::Result<()>;
    /// Takes away everything behind the first `length` bytes. Not durable before [`Disk::sync`].
    ///
    /// # Errors
    /// The system's.
    fn cut(&mut self, length: u64) -> io::Result<()>;
    /// Writes another file, beside this one, and makes its contents durable. It has no part in anything yet.
    ///
    /// # Errors
    /// The system's.
    fn write_beside(&mut self, bytes: &[u8]) -> io::Result<()>;
    /// Gives the file beside this one's name, and goes on with it. Durable after [`Disk::sync_names`]; before, a power cut
    /// leaves the one or the other.
    ///
    /// # Errors
    /// The system's.
    fn put_in_place(&mut self) -> io::Result<()>;
    /// Makes the names in the directory durable.
    ///
    /// # Errors
    /// The system's.
    fn sync_names(&mut self) -> io::Result<()>;
}

/// Why the journal cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum JournalError {
    /// A file operation failed.
    #[error("journal {file}: {doing}: {cause}")]
    Io {
        /// The journal's file.
        file: String,
        /// What was being done.
        doing: &'static str,
        /// What the system said.
        cause: io::Error,
    },
    /// Another agent writes it. Said by whoever opens the file.
    #[error("journal {0} is in use: another agent runs with this state directory")]
    Locked(String),
    /// Damage that is no torn tail.
    #[error(
        "journal {file} cannot be read from byte {offset} on ({words}) and goes on after that; it is not safe to guess whom a \
         guest belongs to: restore the file, run the version that wrote it, or remove it when no guest of this host was being \
         migrated"
    )]
    Damaged {
        /// The journal's file.
        file: String,
        /// Where the bad line begins.
        offset: usize,
        /// What is wrong with it.
        words: String,
    },
    /// The attempt has ended, and what ended is never released.
    #[error("journal {0}: this attempt has ended, and what has ended is never released")]
    Ended(String),
    /// An earlier write failed and could not be undone.
    #[error("journal {0} cannot be written since an earlier error; restart the agent once the disk is well")]
    Broken(String),
}

/// When the journal is rewritten, and what a rewrite keeps.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Compaction {
    /// Beyond this size, in bytes, it is rewritten when it is opened, without what can no longer matter.
    pub above_bytes: usize,
    /// Settled migrations whose outcome is remembered through a rewrite, so that a late question gets its answer.
    pub settled_kept: usize,
}

impl Default for Compaction {
    fn default() -> Compaction {
        Compaction { above_bytes: 4 << 20, settled_kept: 5_000 }
    }
}

/// The open journal.
#[derive(Debug)]
pub struct Journal<D> {
    disk: D,
    /// Where the last good line ends.
    length: u64,
    broken: bool,
    records: Vec<JournalRecord>,
}

#[derive(Serialize, Deserialize)]
struct Head {
    limosa_journal: u32,
}

/// A record as its line holds it.
#[derive(Serialize, Deserialize)]
struct Line {
    kind: String,
    migration: String,
    generation: u64,
    vm: String,
    peer: String,
    words: String,
}

const KINDS: [(JournalRecordKind, &str); 6] = [
    (JournalRecordKind::Started, "started"),
    (JournalRecordKind::Ready, "ready"),
    (JournalRecordKind::Released, "released"),
    (JournalRecordKind::Running, "running"),
    (JournalRecordKind::Discarded, "discarded"),
    (JournalRecordKind::Aborted, "aborted"),
];

fn settles(kind: JournalRecordKind) -> bool {
    matches!(kind, JournalRecordKind::Running | JournalRecordKind::Discarded | JournalRecordKind::Aborted)
}

impl<D: Disk> Journal<D> {
    /// Takes up the journal on `disk`, or begins one. Gives what should be said about it too: a torn tail, which a crash in
    /// the middle of a write leaves, is cut off.
    ///
    /// # Errors
    /// No access, or damage before the tail.
    pub fn open(mut disk: D, compaction: Compaction) -> Result<(Journal<D>, Vec<String>), JournalError> {
        let file = disk.name();
        let bytes = disk.read().map_err(|cause| JournalError::Io { file: file.clone(), doing: "reading", cause })?;
        let read =
            read(&bytes).map_err(|Damage { offset, words }| JournalError::Damaged { file: file.clone(), offset, words })?;
        let mut warnings = Vec::new();
        if read.good < bytes.len() {
            let torn = bytes.len() - read.good;
            warnings.push(format!("journal {file}: the last {torn} bytes were torn by a crash and are cut off"));
        }
        let mut journal = Journal { disk, length: read.good as u64, broken: false, records: read.records };
        journal.cut()?;
        if journal.length == 0 {
            journal.write(&line_of(&Head { limosa_journal: FORMAT }))?;
        }
        if bytes.len() > compaction.above_bytes {
            journal.compact(compaction.settled_kept)?;
        }
        journal.disk.sync_names().map_err(|cause| journal.io("syncing its directory", cause))?;
        Ok((journal, warnings))
    }

    /// Every record, oldest first.
    #[must_use]
    pub fn records(&self) -> &[JournalRecord] {
        &self.records
    }

    /// The records of one attempt, oldest first.
    #[must_use]
    pub fn of(&self, migration: MigrationId, generation: Generation) -> Vec<JournalRecord> {
        let fits = |record: &&JournalRecord| record.migration == migration && record.generation == generation;
        self.records.iter().filter(fits).cloned().collect()
    }

    /// The records of one guest, oldest first.
    #[must_use]
    pub fn of_guest(&self, vm: VmId) -> Vec<JournalRecord> {
        self.records.iter().filter(|record| record.vm == vm).cloned().collect()
    }

    /// The generation that the next attempt to move `vm` has to carry.
    #[must_use]
    pub fn next_generation(&self, vm: VmId) -> Generation {
        commit::next_generation(&self.records, vm)
    }

    /// The attempts that have begun and have no end, oldest first.
    #[must_use]
    pub fn unsettled(&self) -> Vec<(MigrationId, Generation)> {
        let mut open: Vec<(MigrationId, Generation)> = Vec::new();
        for record in &self.records {
            let key = (record.migration, record.generation);
            if settles(record.kind) {
                open.retain(|other| *other != key);
            } else if !open.contains(&key) {
                open.push(key);
            }
        }
        open
    }

    /// Adds a record. When it returns, the record survives a power cut.
    ///
    /// # Errors
    /// The record may or may not be durable then; it is taken back where possible.
    pub fn append(&mut self, record: &JournalRecord) -> Result<(), JournalError> {
        if self.broken {
            return Err(JournalError::Broken(self.disk.name()));
        }
        if !commit::may_follow(&self.records, record) {
            return Err(JournalError::Ended(self.disk.name()));
        }
        if let Err(error) = self.write(&line_of(&Line::from_record(record))) {
            // A half-written line must not be followed by a good one.
            self.broken = self.cut().is_err();
            return Err(error);
        }
        self.records.push(record.clone());
        Ok(())
    }

    /// Whether an earlier write failed and could not be taken back: nothing is written any more.
    #[must_use]
    pub fn is_broken(&self) -> bool {
        self.broken
    }

    /// What it lies on.
    #[must_use]
    pub fn disk(&self) -> &D {
        &self.disk
    }

    fn io(&self, doing: &'static str, cause: io::Error) -> JournalError {
        JournalError::Io { file: self.disk.name(), doing, cause }
    }

    fn write(&mut self, line: &[u8]) -> Result<(), JournalError> {
        self.disk.append(line).map_err(|cause| self.io("writing", cause))?;
        self.disk.sync().map_err(|cause| self.io("syncing", cause))?;
        self.length += line.len() as u64;
        Ok(())
    }

    /// Back to the end of the last good record.
    fn cut(&mut self) -> Result<(), JournalError> {
        self.disk.cut(self.length).map_err(|cause| self.io("cutting its tail", cause))?;
        self.disk.sync().map_err(|cause| self.io("syncing", cause))
    }

    /// Writes the journal anew without the steps of settled migrations and without very old ones.
    fn compact(&mut self, settled_kept: usize) -> Result<(), JournalError> {
        self.records = compacted(&self.records, settled_kept);
        let bytes = emit(&self.records);
        self.disk.write_beside(&bytes).map_err(|cause| self.io("rewriting", cause))?;
        self.disk.put_in_place().map_err(|cause| self.io("replacing", cause))?;
        self.length = bytes.len() as u64;
        Ok(())
    }
}

/// What has to survive: attempts without an end, the last settled ones, the highest generation of each VM.
fn compacted(records: &[JournalRecord], settled_kept: usize) -> Vec<JournalRecord> {
    let key = |record: &JournalRecord| (record.migration, record.generation);
    let ended: BTreeSet<_> = records.iter().filter(|record| settles(record.kind)).map(key).collect();
    let mut late: BTreeSet<_> = BTreeSet::new();
    let mut highest: BTreeMap<VmId, Generation> = BTreeMap::new();
    for record in records.iter().rev() {
        if late.len() < settled_kept && ended.contains(&key(record)) {
            late.insert(key(record));
        }
        let best = highest.entry(record.vm).or_insert(record.generation);
        *best = record.generation.max(*best);
    }
    let matters = |record: &&JournalRecord| {
        !ended.contains(&key(record)) || late.contains(&key(record)) || highest.get(&record.vm) == Some(&record.generation)
    };
    records.iter().filter(matters).cloned().collect()
}

impl Line {
    fn from_record(record: &JournalRecord) -> Line {
        let kind = KINDS.iter().find(|(kind, _)| *kind == record.kind).map_or("", |(_, word)| word);
        Line {
            kind: kind.into(),
            migration: record.migration.to_string(),
            generation: record.generation.0,
            vm: record.vm.to_string(),
            peer: record.peer.to_string(),
            words: record.words.chars().take(WORDS_CHARS_MAX).collect(),
        }
    }

    fn into_record(self) -> Result<JournalRecord, String> {
        let kind = KINDS.iter().find(|(_, word)| *word == self.kind);
        Ok(JournalRecord {
            kind: kind.map(|(kind, _)| *kind).ok_or(format!("unknown kind {:?}", self.kind))?,
            migration: self.migration.parse().map_err(|e| format!("{e}"))?,
            generation: Generation(self.generation),
            vm: self.vm.parse().map_err(|e| format!("{e}"))?,
            peer: self.peer.parse().map_err(|e| format!("{e}"))?,
            words: self.words,
        })
    }
}

fn line_of(value: &impl Serialize) -> Vec<u8> {
    // Strings and numbers always serialise, line feeds in them as "\n"; an empty body would be no record when read.
    lines::line_of(&serde_json::to_string(value).unwrap_or_default())
}

/// A whole journal with these records.
#[must_use]
pub fn emit(records: &[JournalRecord]) -> Vec<u8> {
    let mut bytes = line_of(&Head { limosa_journal: FORMAT });
    records.iter().for_each(|record| bytes.extend(line_of(&Line::from_record(record))));
    bytes
}

/// What is in a journal's bytes.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Found {
    /// Its records, oldest first.
    pub records: Vec<JournalRecord>,
    /// Bytes up to the end of the last good line. What is behind them was torn by a crash.
    pub good: usize,
}

/// Reads a journal's bytes, up to the torn tail if there is one.
///
/// # Errors
/// A bad line that good ones follow, or a first line that is none of a journal of this format.
pub fn read(bytes: &[u8]) -> Result<Found, Damage> {
    let lines = lines::read(bytes)?;
    if lines.bodies.is_empty() {
        // A whole first line that is not ours: another file.
        let whole = bytes.contains(&b'\n');
        return if whole {
            Err(Damage { offset: 0, words: "no line of it is a journal's".into() })
        } else {
            Ok(Found::default())
        };
    }
    let mut found = Found::default();
    for (index, (place, body)) in lines.bodies.into_iter().enumerate() {
        match parse_body(body, index == 0) {
            Ok(record) => {
                found.records.extend(record);
                found.good = place.end;
            }
            // Whole, with a good checksum, and no record: no crash leaves that, and a later version may.
            Err(words) => return Err(Damage { offset: place.start, words }),
        }
    }
    Ok(found)
}

fn parse_body(body: &str, first: bool) -> Result<Option<JournalRecord>, String> {
    if first {
        let head: Head = serde_json::from_str(body).map_err(|e| e.to_string())?;
        let good = head.limosa_journal == FORMAT;
        let other =
            || format!("its format is {}, this agent knows {FORMAT}: it was written by another version", head.limosa_journal);
        return if good { Ok(None) } else { Err(other()) };
    }
    let line: Line = serde_json::from_str(body).map_err(|e| e.to_string())?;
    line.into_record().map(Some)
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use crate::identity::HostId;

    /// A file in memory, whose calls fail from the given one on.
    #[derive(Debug, Default)]
    struct Memory {
        bytes: Vec<u8>,
        beside: Vec<u8>,
        calls: usize,
        fails: Vec<usize>,
    }

    impl Memory {
        fn call(&mut self) -> io::Result<()> {
            self.calls += 1;
            if self.fails.contains(&self.calls) { Err(io::Error::other("no")) } else { Ok(()) }
        }
    }

    impl Disk for Memory {
        fn name(&self) -> String {
            "memory".to_owned()
        }
        fn read(&mut self) -> io::Result<Vec<u8>> {
            Ok(self.bytes.clone())
        }
        fn append(&mut self, bytes: &[u8]) -> io::Result<()> {
            self.bytes.extend(bytes);
            self.call()
        }
        fn sync(&mut self) -> io::Result<()> {
            self.call()
        }
        fn cut(&mut self, length: u64) -> io::Result<()> {
            self.bytes.truncate(usize::try_from(length).unwrap());
            self.call()
        }
        fn write_beside(&mut self, bytes: &[u8]) -> io::Result<()> {
            self.beside = bytes.to_vec();
            self.call()
        }
        fn put_in_place(&mut self) -> io::Result<()> {
            self.bytes = std::mem::take(&mut self.beside);
            self.call()
        }
        fn sync_names(&mut self) -> io::Result<()> {
            self.call()
        }
    }

    fn record(kind: JournalRecordKind, migration: u8, generation: u64) -> JournalRecord {
        JournalRecord {
            kind,
            migration: MigrationId([migration; 16]),
            generation: Generation(generation),
            vm: VmId([7; 16]),
            peer: HostId([9; 32]),
            words: "why\nnot".into(),
        }
    }

    fn open(bytes: &[u8]) -> Result<(Journal<Memory>, Vec<String>), JournalError> {
        Journal::open(Memory { bytes: bytes.to_vec(), ..Memory::default() }, Compaction::default())
    }

    #[test]
    fn a_torn_tail_is_cut_at_every_length() {
        let (mut journal, warnings) = open(&[]).unwrap();
        assert!(warnings.is_empty());
        journal.append(&record(JournalRecordKind::Started, 1, 1)).unwrap();
        let one = journal.disk.bytes.len();
        journal.append(&record(JournalRecordKind::Aborted, 1, 1)).unwrap();
        let whole = journal.disk.bytes;
        for cut in one + 1..whole.len() {
            let (mut journal, warnings) = open(&whole[..cut]).unwrap();
            assert_eq!((journal.records().len(), warnings.len()), (1, 1), "cut at {cut}");
            journal.append(&record(JournalRecordKind::Ready, 3, 1)).unwrap();
            assert_eq!(open(&journal.disk.bytes).unwrap().0.records().len(), 2);
        }
    }

    #[test]
    fn damage_in_the_middle_is_refused() {
        let records = [record(JournalRecordKind::Started, 1, 1), record(JournalRecordKind::Released, 1, 1)];
        let (start, mut bytes) = (emit(&[]).len(), emit(&records));
        bytes[start + 20] ^= 1;
        let error = open(&bytes).unwrap_err();
        assert!(matches!(error, JournalError::Damaged { offset, .. } if offset == start), "{error}");
        assert!(matches!(open(b"something else\n"), Err(JournalError::Damaged { offset: 0, .. })));
    }

    #[test]
    fn another_format_is_refused_in_words() {
        let line = line_of(&Head { limosa_journal: FORMAT + 1 });
        let error = open(&line).unwrap_err().to_string();
        assert!(error.contains("its format is 2, this agent knows 1"), "{error}");
    }

    #[test]
    fn a_write_that_failed_is_taken_back_and_one_that_stays_breaks_the_journal() {
        // Opening is four calls: cut, sync, the head, its sync, the names; then a record's append and sync.
        for (fails, broken) in [(vec![6], false), (vec![7], false), (vec![7, 8], true), (vec![7, 9], true)] {
            let disk = Memory { fails: fails.clone(), ..Memory::default() };
            let (mut journal, _) = Journal::open(disk, Compaction::default()).unwrap();
            let head = journal.disk.bytes.clone();
            assert_eq!(journal.disk.calls, 5);
            journal.append(&record(JournalRecordKind::Released, 1, 1)).unwrap_err();
            assert_eq!((journal.records().len(), &journal.disk.bytes), (0, &head), "{fails:?}");
            let next = journal.append(&record(JournalRecordKind::Aborted, 1, 1));
            assert_eq!(matches!(next, Err(JournalError::Broken(_))), broken, "{fails:?}");
            assert_eq!(open(&journal.disk.bytes).unwrap().0.records().len(), usize::from(!broken));
        }
    }

    #[test]
    fn open_attempts_are_known() {
        let (mut journal, _) = open(&[]).unwrap();
        assert_eq!(journal.next_generation(VmId([7; 16])), Generation(1));
        for (kind, migration, generation) in [
            (JournalRecordKind::Started, 1, 1),
            (JournalRecordKind::Aborted, 1, 1),
            (JournalRecordKind::Started, 2, 2),
            (JournalRecordKind::Released, 2, 2),
        ] {
            journal.append(&record(kind, migration, generation)).unwrap();
        }
        assert_eq!(journal.unsettled(), [(MigrationId([2; 16]), Generation(2))]);
        assert_eq!(journal.of(MigrationId([2; 16]), Generation(2)).len(), 2);
        assert_eq!(journal.next_generation(VmId([7; 16])), Generation(3));
    }

    #[test]
    fn a_rewrite_keeps_what_matters() {
        let settled_kept = Compaction::default().settled_kept;
        let mut records = vec![JournalRecord { vm: VmId([8; 16]), ..record(JournalRecordKind::Started, 0, 9) }];
        records.push(JournalRecord { vm: VmId([8; 16]), ..record(JournalRecordKind::Aborted, 0, 9) });
        records.push(record(JournalRecordKind::Started, 100, 1));
        records.push(record(JournalRecordKind::Released, 100, 1));
        for number in 0..settled_kept as u64 + 20 {
            records.push(record(JournalRecordKind::Started, 1, number + 2));
            records.push(record(JournalRecordKind::Aborted, 1, number + 2));
        }
        // The other VM's highest generation, the open attempt, and the last settled ones with all their records.
        let matters = |kept: &[JournalRecord]| {
            assert_eq!(kept.len(), 2 + 2 + 2 * settled_kept);
            assert_eq!(kept.iter().filter(|r| r.migration == MigrationId([100; 16])).count(), 2);
            assert_eq!(commit::next_generation(kept, VmId([8; 16])), Generation(10));
        };
        let disk = Memory { bytes: emit(&records), ..Memory::default() };
        let (journal, _) = Journal::open(disk, Compaction { above_bytes: 1000, settled_kept }).unwrap();
        matters(journal.records());
        matters(open(&journal.disk.bytes).unwrap().0.records());
    }
}
