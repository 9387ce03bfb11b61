//! The journal's file: opened, locked for one writer, synced together with its directory.
//! What is in it, what a torn tail is and what a rewrite leaves out is `limosa_proto::journal`'s.

use limosa_proto::journal::{BYTES_MAX, Compaction, Disk, JournalError};
use nix::fcntl::{Flock, FlockArg};
use prometheus_client::metrics::histogram::Histogram;
use std::fs::{File, OpenOptions};
use std::io::{self, Read as _, Seek as _, SeekFrom, Write as _};
use std::path::{Path, PathBuf};
use std::time::Instant;

/// Name of the file in the agent's state directory.
pub const FILE_NAME: &str = "journal";

/// The journal of this host.
pub type Journal = limosa_proto::journal::Journal<JournalFile>;

/// Opens the journal in `directory`, or begins one; this is the only writer then, by a lock on the file. Gives what should
/// be said about it too. How long its disk takes is noted in `sync_seconds`.
///
/// # Errors
/// No access, another writer, or damage before the tail.
pub(crate) fn open(directory: &Path, sync_seconds: Histogram) -> Result<(Journal, Vec<String>), JournalError> {
    Journal::open(JournalFile::open(directory, sync_seconds)?, Compaction::default())
}

/// The open and locked file.
#[derive(Debug)]
pub struct JournalFile {
    directory: PathBuf,
    file: Flock<File>,
    /// The one that is to take its place.
    beside: Option<Flock<File>>,
    sync_seconds: Histogram,
}

impl JournalFile {
    fn open(directory: &Path, sync_seconds: Histogram) -> Result<JournalFile, JournalError> {
        let path = directory.join(FILE_NAME);
        let name = path.display().to_string();
        let file = OpenOptions::new().read(true).write(true).create(true).truncate(false).open(&path);
        let file = file.map_err(|cause| JournalError::Io { file: name.clone(), doing: "opening", cause })?;
        let file = Flock::lock(file, FlockArg::LockExclusiveNonblock).map_err(|_| JournalError::Locked(name))?;
        Ok(JournalFile { directory: directory.to_owned(), file, beside: None, sync_seconds })
    }

    fn path(&self) -> PathBuf {
        self.directory.join(FILE_NAME)
    }

    fn path_beside(&self) -> PathBuf {
        self.path().with_extension("new")
    }
}

impl Disk for JournalFile {
    fn name(&self) -> String {
        self.path().display().to_string()
    }

    fn read(&mut self) -> io::Result<Vec<u8>> {
        let size = self.file.metadata()?.len();
        if size > BYTES_MAX {
            return Err(io::Error::other(format!("{size} bytes are more than can be right")));
        }
        let mut bytes = Vec::new();
        self.file.read_to_end(&mut bytes)?;
        Ok(bytes)
    }

    fn append(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.file.write_all(bytes)
    }

    fn sync(&mut self) -> io::Result<()> {
        let begun = Instant::now();
        let synced = self.file.sync_all();
        self.sync_seconds.observe(begun.elapsed().as_secs_f64());
        synced
    }

    fn cut(&mut self, length: u64) -> io::Result<()> {
        self.file.set_len(length)?;
        self.file.seek(SeekFrom::Start(length)).map(drop)
    }

    fn write_beside(&mut self, bytes: &[u8]) -> io::Result<()> {
        let file = OpenOptions::new().read(true).write(true).create(true).truncate(true).open(self.path_beside())?;
        let mut file = Flock::lock(file, FlockArg::LockExclusiveNonblock).map_err(|(_, errno)| io::Error::from(errno))?;
        file.write_all(bytes)?;
        file.sync_all()?;
        self.beside = Some(file);
        Ok(())
    }

    fn put_in_place(&mut self) -> io::Result<()> {
        let beside = self.beside.take().ok_or_else(|| io::Error::other("nothing was written beside it"))?;
        std::fs::rename(self.path_beside(), self.path())?;
        self.file = beside;
        Ok(())
    }

    fn sync_names(&mut self) -> io::Result<()> {
        sync_directory(&self.directory)
    }
}

/// Makes names in `directory` durable.
pub(crate) fn sync_directory(directory: &Path) -> io::Result<()> {
    File::open(directory)?.sync_all()
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use limosa_proto::commit::{JournalRecord, JournalRecordKind};
    use limosa_proto::identity::{Generation, HostId, MigrationId, VmId};

    fn sync_seconds() -> Histogram {
        Histogram::new([1.0])
    }

    fn open(directory: &Path) -> Result<(Journal, Vec<String>), JournalError> {
        super::open(directory, sync_seconds())
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

    #[test]
    fn records_survive_and_a_torn_tail_is_cut_off() {
        let dir = tempfile::tempdir().unwrap();
        let (mut journal, warnings) = open(dir.path()).unwrap();
        assert!(warnings.is_empty());
        journal.append(&record(JournalRecordKind::Started, 1, 1)).unwrap();
        journal.append(&record(JournalRecordKind::Aborted, 1, 1)).unwrap();
        drop(journal);
        let (journal, warnings) = open(dir.path()).unwrap();
        assert!(warnings.is_empty());
        assert_eq!((journal.records().len(), journal.records()[0].words.as_str()), (2, "why\nnot"));
        drop(journal);
        let path = dir.path().join(FILE_NAME);
        let whole = std::fs::read(&path).unwrap();
        std::fs::write(&path, &whole[..whole.len() - 3]).unwrap();
        let (mut journal, warnings) = open(dir.path()).unwrap();
        assert_eq!((journal.records().len(), warnings.len()), (1, 1), "{warnings:?}");
        journal.append(&record(JournalRecordKind::Ready, 3, 1)).unwrap();
        drop(journal);
        assert_eq!(open(dir.path()).unwrap().0.records().len(), 2);
    }

    #[test]
    fn there_is_one_writer() {
        let dir = tempfile::tempdir().unwrap();
        let first = open(dir.path()).unwrap();
        assert!(matches!(open(dir.path()), Err(JournalError::Locked(_))));
        drop(first);
        assert!(open(dir.path()).is_ok());
    }

    #[test]
    fn a_rewrite_takes_the_files_place_and_is_written_on() {
        let dir = tempfile::tempdir().unwrap();
        let (mut journal, _) = open(dir.path()).unwrap();
        for generation in 1..=40 {
            journal.append(&record(JournalRecordKind::Started, 1, generation)).unwrap();
            journal.append(&record(JournalRecordKind::Aborted, 1, generation)).unwrap();
        }
        drop(journal);
        let compaction = Compaction { above_bytes: 1000, settled_kept: 3 };
        let (mut journal, _) = Journal::open(JournalFile::open(dir.path(), sync_seconds()).unwrap(), compaction).unwrap();
        assert_eq!(journal.records().len(), 6);
        journal.append(&record(JournalRecordKind::Started, 2, 41)).unwrap();
        assert!(matches!(open(dir.path()), Err(JournalError::Locked(_))), "the new file is locked too");
        drop(journal);
        assert_eq!(open(dir.path()).unwrap().0.records().len(), 7);
        let names: Vec<_> = std::fs::read_dir(dir.path()).unwrap().map(|entry| entry.unwrap().file_name()).collect();
        assert_eq!(names, [FILE_NAME]);
    }

    #[test]
    fn a_disk_that_takes_nothing_is_said() {
        let dir = tempfile::tempdir().unwrap();
        std::fs::create_dir(dir.path().join(FILE_NAME)).unwrap();
        let error = open(dir.path()).unwrap_err().to_string();
        assert!(error.contains("opening") && error.contains(FILE_NAME), "{error}");
    }
}
