//! A snapshot's file: written beside its name and renamed when it is whole and on the disk; read with every promise checked.
//! It knows no guest and no VMM.

use limosa_proto::snapshot::{HEAD_BYTES, Piece, Reader, SECTION_BYTES, SavedGuest, SnapshotError, Writer};
use std::fs::{File, OpenOptions};
use std::io::{self, BufReader, Read as _, Write as _};
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::{Path, PathBuf};

/// Bytes read at once.
const READ_BYTES: usize = 1 << 20;

/// What went wrong with `path`, in words for a person.
fn words(path: &Path, doing: &str, error: &io::Error) -> String {
    let advice = match error.kind() {
        io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => "; the disk is full: make room, or name a file elsewhere",
        io::ErrorKind::PermissionDenied | io::ErrorKind::ReadOnlyFilesystem => {
            "; the agent may not write there: name a file elsewhere"
        }
        io::ErrorKind::NotFound => "; there is no such file or folder on this host",
        _ => "",
    };
    format!("{doing} {}: {error}{advice}", path.display())
}

/// A snapshot that is being written; unless it is finished it leaves nothing behind.
#[derive(Debug)]
pub(super) struct Output {
    path: PathBuf,
    part: PathBuf,
    file: File,
    finished: bool,
    /// Bytes written.
    pub(super) bytes: u64,
    pub(super) writer: Writer,
}

impl Output {
    /// Begins a file that shall become `path`; nobody but its owner may read it.
    ///
    /// # Errors
    /// `path` is there, or no file can be made beside it.
    pub(super) fn create(path: &Path) -> Result<Output, String> {
        let name = path.file_name().ok_or_else(|| format!("{} names no file", path.display()))?;
        if path.symlink_metadata().is_ok() {
            return Err(format!("{} is there already and is not overwritten: name another file, or remove it", path.display()));
        }
        let mut hidden = std::ffi::OsString::from(".");
        hidden.push(name);
        hidden.push(format!(".{}.part", std::process::id()));
        let part = path.with_file_name(hidden);
        let file = OpenOptions::new().write(true).create_new(true).mode(0o600).open(&part);
        let file = file.map_err(|error| words(path, "creating", &error))?;
        let mut output = Output { path: path.to_owned(), part, file, finished: false, bytes: 0, writer: Writer::default() };
        output.put(&Writer::head())?;
        Ok(output)
    }

    /// Writes the next bytes.
    ///
    /// # Errors
    /// In words; above all that the disk is full.
    pub(super) fn put(&mut self, bytes: &[u8]) -> Result<(), String> {
        self.file.write_all(bytes).map_err(|error| words(&self.path, "writing", &error))?;
        self.bytes += bytes.len() as u64;
        Ok(())
    }

    /// Ends the file; when this returns it has its name and survives a power cut.
    ///
    /// # Errors
    /// In words; then it is gone.
    pub(super) fn finish(&mut self) -> Result<(), String> {
        let end = std::mem::take(&mut self.writer).end();
        self.put(&end)?;
        self.file.sync_all().map_err(|error| words(&self.path, "syncing", &error))?;
        std::fs::rename(&self.part, &self.path).map_err(|error| words(&self.path, "renaming", &error))?;
        self.finished = true;
        let folder = self.path.parent().unwrap_or(Path::new("/"));
        File::open(folder).and_then(|folder| folder.sync_all()).map_err(|error| words(folder, "syncing", &error))
    }
}

impl Drop for Output {
    fn drop(&mut self) {
        if !self.finished
            && let Err(error) = std::fs::remove_file(&self.part)
        {
            tracing::warn!(file = %self.part.display(), %error, "an unfinished snapshot cannot be removed");
        }
    }
}

/// A snapshot that is read, once from its begin to its end.
#[derive(Debug)]
pub(super) struct Input {
    path: PathBuf,
    file: BufReader<File>,
    /// Bytes of the file.
    pub(super) bytes: u64,
    /// Bytes that were not read yet.
    left: u64,
    reader: Reader,
    body: Vec<u8>,
}

impl Input {
    /// Opens `path` and reads what guest it has.
    ///
    /// # Errors
    /// It cannot be read, or is no snapshot that this build restores: in words.
    pub(super) fn open(path: &Path) -> Result<(Input, SavedGuest), String> {
        let open = || {
            let file = File::open(path)?;
            let data = file.metadata()?;
            if data.is_file() { Ok((file, data.len())) } else { Err(io::Error::other("it is no file")) }
        };
        let (file, bytes) = open().map_err(|error| words(path, "opening", &error))?;
        let mut file = BufReader::with_capacity(READ_BYTES, file);
        let named = |error: SnapshotError| format!("{}: {error}", path.display());
        let mut head = [0; HEAD_BYTES];
        if bytes < HEAD_BYTES as u64 {
            return Err(named(SnapshotError::Magic));
        }
        file.read_exact(&mut head).map_err(|error| words(path, "reading", &error))?;
        let reader = Reader::head(&head).map_err(named)?;
        let left = bytes - HEAD_BYTES as u64;
        let mut input = Input { path: path.to_owned(), file, bytes, left, reader, body: Vec::new() };
        match input.next()? {
            Some(Piece::Guest(guest)) => Ok((input, *guest)),
            _ => Err(format!("{}: it has no guest", path.display())),
        }
    }

    /// Bytes read until now.
    pub(super) fn done(&self) -> u64 {
        self.bytes - self.left
    }

    /// The next piece; none when all of it has come.
    ///
    /// # Errors
    /// It cannot be read, is damaged or cut off: in words.
    pub(super) fn next(&mut self) -> Result<Option<Piece>, String> {
        let path = self.path.display().to_string();
        let named = |error: SnapshotError| format!("{path}: {error}");
        if self.reader.has_ended() {
            let rest = format!("{path}: it is damaged: {} bytes follow its end", self.left);
            return if self.left == 0 { Ok(None) } else { Err(rest) };
        }
        if self.left < SECTION_BYTES as u64 {
            return Err(named(self.reader.cut_off("the file ends there")));
        }
        let mut head = [0; SECTION_BYTES];
        self.file.read_exact(&mut head).map_err(|error| words(&self.path, "reading", &error))?;
        self.left -= SECTION_BYTES as u64;
        let section = self.reader.section(&head, self.left).map_err(named)?;
        self.body.resize(section.length, 0);
        self.file.read_exact(&mut self.body).map_err(|error| words(&self.path, "reading", &error))?;
        self.left -= section.length as u64;
        self.reader.body(section, &self.body).map(Some).map_err(named)
    }

    /// The bytes of the section that came last, from `at` on.
    pub(super) fn bytes_from(&self, at: usize) -> &[u8] {
        self.body.get(at..).unwrap_or_default()
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use std::os::unix::fs::PermissionsExt as _;

    #[test]
    fn an_unfinished_file_leaves_nothing_and_none_is_overwritten() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("web.snapshot");
        let mut output = Output::create(&path).unwrap();
        output.put(b"half").unwrap();
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 1);
        assert!(!path.exists(), "a half file must not have its name");
        drop(output);
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 0);
        let mut output = Output::create(&path).unwrap();
        output.finish().unwrap();
        drop(output);
        assert_eq!(std::fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
        assert!(Output::create(&path).unwrap_err().contains("not overwritten"));
        let nowhere = dir.path().join("none").join("web.snapshot");
        assert!(Output::create(&nowhere).unwrap_err().contains("no such file or folder"));
        // A snapshot without a guest is none.
        assert!(Input::open(&path).unwrap_err().contains("damaged in section 0"));
    }

    #[test]
    fn what_is_no_snapshot_is_said_to_be_none() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("notes");
        std::fs::write(&path, "a shopping list that is long enough").unwrap();
        assert!(Input::open(&path).unwrap_err().contains("no snapshot of limosa"));
        std::fs::write(&path, "short").unwrap();
        assert!(Input::open(&path).unwrap_err().contains("no snapshot of limosa"));
        assert!(Input::open(dir.path()).unwrap_err().contains("no file"));
        assert!(Input::open(&dir.path().join("none")).unwrap_err().contains("no such file"));
    }
}
