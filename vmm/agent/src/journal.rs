//! The journal: what this host promised about whom a guest belongs to, durable before it is acted upon.
//! One line a record, each with a CRC-32; synced to the disk before [`Journal::append`] returns. What the records
//! mean is decided in `limosa_proto::commit`; here they are only kept.

use limosa_proto::commit::{self, JournalRecord, JournalRecordKind};
use limosa_proto::identity::{Generation, MigrationId, VmId};
use nix::fcntl::{Flock, FlockArg};
use serde::{Deserialize, Serialize};
use std::collections::{BTreeMap, HashSet};
use std::fs::{File, OpenOptions};
use std::io::{Read as _, Seek as _, SeekFrom, Write as _};
use std::path::{Path, PathBuf};

/// Version of the line format, in the first record.
const FORMAT: u32 = 1;
/// Name of the file in the agent's state directory.
pub const FILE_NAME: &str = "journal";
/// Beyond this size the journal is rewritten when it is opened, without what can no longer matter.
const COMPACT_BYTES: usize = 4 << 20;
/// Settled migrations whose outcome is remembered through a rewrite, so that a late question gets its answer.
const SETTLED_KEPT: usize = 5_000;
/// Largest journal that is read: far beyond what compaction leaves.
const FILE_BYTES_MAX: u64 = 256 << 20;

/// Why the journal cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum JournalError {
    /// A file operation failed.
    #[error("journal {file}: {doing}: {cause}", file = file.display())]
    Io {
        /// The journal's file.
        file: PathBuf,
        /// What was being done.
        doing: &'static str,
        /// What the system said.
        cause: std::io::Error,
    },
    /// Another agent writes it.
    #[error("journal {file} is in use: another agent runs with this state directory", file = .0.display())]
    Locked(PathBuf),
    /// Damage that is no torn tail.
    #[error(
        "journal {file} is damaged at byte {offset} ({words}) and goes on after that; it is not safe to guess whom a guest \
         belongs to: restore the file, or remove it when no guest of this host was being migrated",
        file = file.display()
    )]
    Damaged {
        /// The journal's file.
        file: PathBuf,
        /// Where the bad line begins.
        offset: usize,
        /// What is wrong with it.
        words: String,
    },
    /// An earlier write failed and could not be undone.
    #[error("journal {file} cannot be written since an earlier error; restart the agent once the disk is well", file = .0.display())]
    Broken(PathBuf),
}

/// The open journal; the only writer, by a lock on the file.
#[derive(Debug)]
pub struct Journal {
    path: PathBuf,
    file: Flock<File>,
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

impl Journal {
    /// Opens the journal in `directory`, or begins one. Gives what should be said about it too: a torn tail, which a
    /// crash in the middle of a write leaves, is cut off.
    ///
    /// # Errors
    /// No access, another writer, or damage before the tail.
    pub fn open(directory: &Path) -> Result<(Journal, Vec<String>), JournalError> {
        let path = directory.join(FILE_NAME);
        let io = |doing, cause| JournalError::Io { file: path.clone(), doing, cause };
        let file = OpenOptions::new().read(true).write(true).create(true).truncate(false).open(&path);
        let file = file.map_err(|e| io("opening", e))?;
        let mut file = Flock::lock(file, FlockArg::LockExclusiveNonblock).map_err(|_| JournalError::Locked(path.clone()))?;
        let size = file.metadata().map_err(|e| io("reading its size", e))?.len();
        if size > FILE_BYTES_MAX {
            return Err(io("reading", std::io::Error::other(format!("{size} bytes are more than can be right"))));
        }
        let mut bytes = Vec::new();
        file.read_to_end(&mut bytes).map_err(|e| io("reading", e))?;
        let read = read_lines(&bytes).map_err(|(offset, words)| JournalError::Damaged { file: path.clone(), offset, words })?;
        let mut warnings = Vec::new();
        if read.good < bytes.len() {
            let torn = bytes.len() - read.good;
            warnings.push(format!("journal {}: the last {torn} bytes were torn by a crash and are cut off", path.display()));
        }
        let mut journal = Journal { path, file, length: read.good as u64, broken: false, records: read.records };
        journal.cut()?;
        if journal.length == 0 {
            journal.write(&line_of(&Head { limosa_journal: FORMAT }))?;
        }
        if bytes.len() > COMPACT_BYTES {
            journal.compact()?;
        }
        sync_directory(directory).map_err(|cause| journal.io("syncing its directory", cause))?;
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
            return Err(JournalError::Broken(self.path.clone()));
        }
        if let Err(error) = self.write(&line_of(&Line::from_record(record))) {
            // A half-written line must not be followed by a good one.
            self.broken = self.cut().is_err();
            return Err(error);
        }
        self.records.push(record.clone());
        Ok(())
    }

    fn io(&self, doing: &'static str, cause: std::io::Error) -> JournalError {
        JournalError::Io { file: self.path.clone(), doing, cause }
    }

    fn write(&mut self, line: &[u8]) -> Result<(), JournalError> {
        self.file.write_all(line).map_err(|e| self.io("writing", e))?;
        self.file.sync_all().map_err(|e| self.io("syncing", e))?;
        self.length += line.len() as u64;
        Ok(())
    }

    /// Back to the end of the last good record.
    fn cut(&mut self) -> Result<(), JournalError> {
        let length = self.length;
        self.file.set_len(length).map_err(|e| self.io("cutting its tail", e))?;
        self.file.seek(SeekFrom::Start(length)).map_err(|e| self.io("seeking", e))?;
        self.file.sync_all().map_err(|e| self.io("syncing", e))
    }

    /// Writes the journal anew without the steps of settled migrations and without very old ones.
    fn compact(&mut self) -> Result<(), JournalError> {
        self.records = compacted(&self.records);
        let mut bytes = line_of(&Head { limosa_journal: FORMAT });
        self.records.iter().for_each(|record| bytes.extend(line_of(&Line::from_record(record))));
        let beside = self.path.with_extension("new");
        let file = OpenOptions::new().read(true).write(true).create(true).truncate(true).open(&beside);
        let file = file.map_err(|e| self.io("rewriting", e))?;
        let mut file = Flock::lock(file, FlockArg::LockExclusiveNonblock).map_err(|_| JournalError::Locked(beside.clone()))?;
        file.write_all(&bytes).and_then(|()| file.sync_all()).map_err(|e| self.io("rewriting", e))?;
        std::fs::rename(&beside, &self.path).map_err(|e| self.io("replacing", e))?;
        self.file = file;
        self.length = bytes.len() as u64;
        Ok(())
    }
}

/// What has to survive: attempts without an end, the last settled ones, the highest generation of each VM.
fn compacted(records: &[JournalRecord]) -> Vec<JournalRecord> {
    let key = |record: &JournalRecord| (record.migration, record.generation);
    let ended: HashSet<_> = records.iter().filter(|record| settles(record.kind)).map(key).collect();
    let mut late: HashSet<_> = HashSet::new();
    let mut highest: BTreeMap<VmId, Generation> = BTreeMap::new();
    for record in records.iter().rev() {
        if late.len() < SETTLED_KEPT && ended.contains(&key(record)) {
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
            words: record.words.chars().take(500).collect(),
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
    // Strings and numbers always serialise; an empty body would be caught by its CRC when read.
    let body = serde_json::to_string(value).unwrap_or_default();
    format!("{:08x} {body}\n", crc32fast::hash(body.as_bytes())).into_bytes()
}

struct ReadLines {
    records: Vec<JournalRecord>,
    /// Bytes up to the end of the last good line.
    good: usize,
}

/// Reads lines up to the torn tail.
fn read_lines(bytes: &[u8]) -> Result<ReadLines, (usize, String)> {
    let mut read = ReadLines { records: Vec::new(), good: 0 };
    let mut offset = 0;
    let mut bad: Option<(usize, String)> = None;
    for line in bytes.split_inclusive(|byte| *byte == b'\n') {
        match body_of(line).and_then(|body| parse_body(body, offset == 0)) {
            // A good line after a bad one: that is no torn tail.
            Ok(_) if bad.is_some() => return Err(bad.unwrap_or_default()),
            Ok(record) => {
                read.records.extend(record);
                read.good = offset + line.len();
            }
            Err(words) => bad = bad.or(Some((offset, words))),
        }
        offset += line.len();
    }
    match bad {
        // A whole first line that is not ours: another file, or a format of the future.
        Some((0, words)) if bytes.contains(&b'\n') => Err((0, words)),
        _ => Ok(read),
    }
}

fn body_of(line: &[u8]) -> Result<&str, String> {
    let text = std::str::from_utf8(line).map_err(|_| "no text")?;
    let text = text.strip_suffix('\n').ok_or("its end is missing")?;
    let (crc, body) = text.split_once(' ').ok_or("no checksum")?;
    let crc = u32::from_str_radix(crc, 16).map_err(|_| "no checksum")?;
    if crc == crc32fast::hash(body.as_bytes()) { Ok(body) } else { Err("its checksum is wrong".into()) }
}

fn parse_body(body: &str, first: bool) -> Result<Option<JournalRecord>, String> {
    if first {
        let head: Head = serde_json::from_str(body).map_err(|e| e.to_string())?;
        let good = head.limosa_journal == FORMAT;
        return if good { Ok(None) } else { Err(format!("format {} is not known here", head.limosa_journal)) };
    }
    let line: Line = serde_json::from_str(body).map_err(|e| e.to_string())?;
    line.into_record().map(Some)
}

/// Makes names in `directory` durable.
pub(crate) fn sync_directory(directory: &Path) -> std::io::Result<()> {
    File::open(directory)?.sync_all()
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use limosa_proto::identity::HostId;

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

    #[test]
    fn records_survive_and_open_ones_are_known() {
        let dir = tempfile::tempdir().unwrap();
        let (mut journal, warnings) = Journal::open(dir.path()).unwrap();
        assert!(warnings.is_empty());
        assert_eq!(journal.next_generation(VmId([7; 16])), Generation(1));
        journal.append(&record(JournalRecordKind::Started, 1, 1)).unwrap();
        journal.append(&record(JournalRecordKind::Aborted, 1, 1)).unwrap();
        journal.append(&record(JournalRecordKind::Started, 2, 2)).unwrap();
        journal.append(&record(JournalRecordKind::Released, 2, 2)).unwrap();
        drop(journal);
        let (journal, warnings) = Journal::open(dir.path()).unwrap();
        assert!(warnings.is_empty());
        assert_eq!(journal.records().len(), 4);
        assert_eq!(journal.records()[0].words, "why\nnot");
        assert_eq!(journal.unsettled(), [(MigrationId([2; 16]), Generation(2))]);
        assert_eq!(journal.of(MigrationId([2; 16]), Generation(2)).len(), 2);
        assert_eq!(journal.next_generation(VmId([7; 16])), Generation(3));
    }

    #[test]
    fn a_torn_tail_is_cut_at_every_length() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join(FILE_NAME);
        let (mut journal, _) = Journal::open(dir.path()).unwrap();
        journal.append(&record(JournalRecordKind::Started, 1, 1)).unwrap();
        let one = std::fs::metadata(&path).unwrap().len();
        journal.append(&record(JournalRecordKind::Aborted, 1, 1)).unwrap();
        drop(journal);
        let whole = std::fs::read(&path).unwrap();
        for cut in usize::try_from(one).unwrap() + 1..whole.len() {
            std::fs::write(&path, &whole[..cut]).unwrap();
            let (mut journal, warnings) = Journal::open(dir.path()).unwrap();
            assert_eq!((journal.records().len(), warnings.len()), (1, 1), "cut at {cut}");
            journal.append(&record(JournalRecordKind::Ready, 3, 1)).unwrap();
            drop(journal);
            assert_eq!(Journal::open(dir.path()).unwrap().0.records().len(), 2);
        }
    }

    #[test]
    fn damage_in_the_middle_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join(FILE_NAME);
        let (mut journal, _) = Journal::open(dir.path()).unwrap();
        let start = usize::try_from(std::fs::metadata(&path).unwrap().len()).unwrap();
        journal.append(&record(JournalRecordKind::Started, 1, 1)).unwrap();
        journal.append(&record(JournalRecordKind::Released, 1, 1)).unwrap();
        drop(journal);
        let mut bytes = std::fs::read(&path).unwrap();
        bytes[start + 20] ^= 1;
        std::fs::write(&path, bytes).unwrap();
        let error = Journal::open(dir.path()).unwrap_err();
        assert!(matches!(error, JournalError::Damaged { offset, .. } if offset == start), "{error}");
        std::fs::write(&path, "something else\n").unwrap();
        assert!(matches!(Journal::open(dir.path()), Err(JournalError::Damaged { offset: 0, .. })));
    }

    #[test]
    fn there_is_one_writer() {
        let dir = tempfile::tempdir().unwrap();
        let first = Journal::open(dir.path()).unwrap();
        assert!(matches!(Journal::open(dir.path()), Err(JournalError::Locked(_))));
        drop(first);
        assert!(Journal::open(dir.path()).is_ok());
    }

    #[test]
    fn a_rewrite_keeps_what_matters() {
        let mut records = vec![JournalRecord { vm: VmId([8; 16]), ..record(JournalRecordKind::Started, 0, 9) }];
        records.push(JournalRecord { vm: VmId([8; 16]), ..record(JournalRecordKind::Aborted, 0, 9) });
        records.push(record(JournalRecordKind::Started, 100, 1));
        records.push(record(JournalRecordKind::Released, 100, 1));
        for number in 0..SETTLED_KEPT as u64 + 20 {
            records.push(record(JournalRecordKind::Started, 1, number + 2));
            records.push(record(JournalRecordKind::Aborted, 1, number + 2));
        }
        let kept = compacted(&records);
        // The other VM's highest generation, the open attempt, and the last settled ones with all their records.
        assert_eq!(kept.len(), 2 + 2 + 2 * SETTLED_KEPT);
        assert_eq!(kept.iter().filter(|r| r.migration == MigrationId([100; 16])).count(), 2);
        assert_eq!(commit::next_generation(&kept, VmId([8; 16])), Generation(10));
    }
}
