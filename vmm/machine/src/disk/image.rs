//! One disk's image: opened, locked, read and written, given up and taken back. What the formats are made of is the `imago`
//! crate's; what a guest asks for is `devices/block.rs`'s.
//!
//! The file is opened once, and stays open. Everything that is read of it to be kept (qcow2's tables) is read after the lock
//! was taken, and is gone before the lock is: whoever has had the lock meanwhile may have changed all of it. Taking a lock
//! is also the moment at which NFS looks at the file anew.

use std::fs::File;
use std::io::{Error, ErrorKind};
use std::os::unix::fs::{FileExt as _, FileTypeExt as _, OpenOptionsExt as _};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use imago::file::File as Storage;
use imago::qcow2::Qcow2;
use imago::raw::Raw;
use imago::{DenyImplicitOpenGate, FormatAccess, FormatDriverBuilder as _};
use nix::fcntl::{AT_FDCWD, OFlag, OpenHow, ResolveFlag, openat2};

use super::{DiskConfig, DiskError, DiskFormat, DiskInfo, lock};

/// The unit of virtio-blk, in bytes.
pub(crate) const SECTOR_BYTES: u64 = 512;
const QCOW2_MAGIC: [u8; 4] = *b"QFI\xfb";
/// Where a qcow2 header says how it is encrypted, as a big-endian word.
const QCOW2_CRYPT: std::ops::Range<usize> = 32..36;
const SERIAL_BYTES_MAX: usize = 20;
/// Zeros that are written at a time where the file system has no better way.
const ZEROS: [u8; 64 << 10] = [0; 64 << 10];

/// A disk's image, shared by its device and by the machine that takes its lock and gives it up.
pub(crate) struct Disk {
    config: DiskConfig,
    info: DiskInfo,
    file: File,
    /// There while the lock is held.
    access: Mutex<Option<FormatAccess<Storage>>>,
    syncing: AtomicBool,
}

impl std::fmt::Debug for Disk {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Disk").field("config", &self.config).field("info", &self.info).finish_non_exhaustive()
    }
}

/// Looks at an image without locking or changing it.
///
/// # Errors
/// When a guest could not use it; that somebody else has its lock is no reason.
pub fn look_at_disk(config: &DiskConfig) -> Result<DiskInfo, DiskError> {
    Disk::open(config.clone()).map(|disk| disk.info)
}

/// Whether nobody has an image locked, so that a guest can be started on it.
///
/// # Errors
/// When somebody has, and who; also when a guest could not use it for another reason.
pub fn disk_is_free(config: &DiskConfig) -> Result<(), DiskError> {
    // The lock goes with it.
    Disk::open(config.clone())?.take(Duration::ZERO)
}

fn open_file(config: &DiskConfig) -> Result<File, DiskError> {
    let purpose = if config.readonly { "reading" } else { "reading and writing" };
    let failed = |source| DiskError::Open { path: config.path.clone(), purpose, source };
    // Not to hang on a pipe that somebody put there; it means nothing for files and block devices.
    let flags = OFlag::O_NONBLOCK | OFlag::O_CLOEXEC;
    let file = if config.resolved {
        let access = if config.readonly { OFlag::O_RDONLY } else { OFlag::O_RDWR };
        let how = OpenHow::new().flags(flags | access).resolve(ResolveFlag::RESOLVE_NO_SYMLINKS);
        File::from(openat2(AT_FDCWD, &config.path, how).map_err(|errno| failed(errno.into()))?)
    } else {
        let mut options = File::options();
        options.read(true).write(!config.readonly).custom_flags(flags.bits());
        options.open(&config.path).map_err(failed)?
    };
    let kind = file.metadata().map_err(failed)?.file_type();
    if kind.is_file() || kind.is_block_device() { Ok(file) } else { Err(DiskError::Kind(config.path.clone())) }
}

/// The format that was given, if the contents do not contradict it, or the one that the contents show.
fn format_of(config: &DiskConfig, file: &File) -> Result<DiskFormat, DiskError> {
    let mut head = [0; QCOW2_CRYPT.end];
    let read = file.read_exact_at(&mut head, 0);
    let wrong = |reason: &str| DiskError::Format { path: config.path.clone(), format: DiskFormat::Qcow2, reason: reason.into() };
    let is_qcow2 = read.is_ok() && head.starts_with(&QCOW2_MAGIC);
    let format = match config.format {
        Some(format) => format,
        None if is_qcow2 => DiskFormat::Qcow2,
        None => return Err(DiskError::NoFormat(config.path.clone())),
    };
    if format == DiskFormat::Qcow2 && !is_qcow2 {
        return Err(wrong("it does not begin like one"));
    }
    if format == DiskFormat::Qcow2 && head.get(QCOW2_CRYPT).is_some_and(|method| method.iter().any(|byte| *byte != 0)) {
        return Err(wrong("it is encrypted"));
    }
    Ok(format)
}

/// Opens what is in the file; nothing beside the file is ever opened, whatever its header says.
fn open_format(config: &DiskConfig, format: DiskFormat, file: &File, write: bool) -> Result<FormatAccess<Storage>, DiskError> {
    let wrong = |reason: String| DiskError::Format { path: config.path.clone(), format, reason };
    let storage = file.try_clone().and_then(Storage::try_from).map_err(|error| wrong(error.to_string()))?;
    match format {
        DiskFormat::Raw => {
            let raw = Raw::open_image(storage, write).map_err(|error| wrong(error.to_string()))?;
            Ok(FormatAccess::new(raw))
        }
        DiskFormat::Qcow2 => {
            let builder = Qcow2::<Storage>::builder(storage).write(write);
            let qcow2 = builder.open(DenyImplicitOpenGate::default()).map_err(|error| match error.kind() {
                ErrorKind::PermissionDenied => wrong(
                    "it has a backing file or an external data file; `qemu-img convert -O qcow2` makes one image of them".into(),
                ),
                _ => wrong(error.to_string()),
            })?;
            Ok(FormatAccess::new(qcow2))
        }
    }
}

impl Disk {
    /// Opens an image and finds out what it is, without its lock: it can be used after [`Self::take`].
    pub(crate) fn open(config: DiskConfig) -> Result<Disk, DiskError> {
        if config.serial.len() > SERIAL_BYTES_MAX {
            return Err(DiskError::Serial { path: config.path, serial: config.serial });
        }
        let file = open_file(&config)?;
        let format = format_of(&config, &file)?;
        // For reading only, and dropped again: another host may be writing it.
        let bytes = open_format(&config, format, &file, false)?.size();
        if bytes < SECTOR_BYTES {
            return Err(DiskError::Empty(config.path));
        }
        let info = DiskInfo { format, bytes };
        Ok(Disk { config, info, file, access: Mutex::new(None), syncing: AtomicBool::new(false) })
    }

    pub(crate) fn info(&self) -> DiskInfo {
        self.info
    }

    pub(crate) fn config(&self) -> &DiskConfig {
        &self.config
    }

    /// Whole sectors of the disk.
    pub(crate) fn sectors(&self) -> u64 {
        self.info.bytes / SECTOR_BYTES
    }

    fn access(&self) -> MutexGuard<'_, Option<FormatAccess<Storage>>> {
        self.access.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes the lock, trying for up to `patience`, and opens the image anew. Does nothing if it has it.
    pub(crate) fn take(&self, patience: Duration) -> Result<(), DiskError> {
        let mut access = self.access();
        if access.is_some() {
            return Ok(());
        }
        let path = || self.config.path.clone();
        match lock::take(&self.file, self.config.readonly, patience) {
            Ok(true) => {}
            Ok(false) => return Err(DiskError::Locked { path: path(), holder: lock::holder(&self.file) }),
            Err(errno) => return Err(DiskError::Lock { path: path(), source: errno.into() }),
        }
        let opened = open_format(&self.config, self.info.format, &self.file, !self.config.readonly).and_then(|opened| {
            let (was, is) = (self.info.bytes, opened.size());
            if was == is { Ok(opened) } else { Err(DiskError::Size { path: path(), was, is }) }
        });
        match opened {
            Ok(opened) => *access = Some(opened),
            Err(error) => {
                self.unlock()?;
                return Err(error);
            }
        }
        Ok(())
    }

    fn unlock(&self) -> Result<(), DiskError> {
        lock::give_up(&self.file).map_err(|errno| DiskError::Lock { path: self.config.path.clone(), source: errno.into() })
    }

    /// Brings everything to the medium, forgets what was read, and gives the lock up. Does nothing without the lock. After
    /// an error the lock is still held.
    pub(crate) fn give_up(&self) -> Result<(), DiskError> {
        let mut access = self.access();
        let Some(open) = access.as_mut() else { return Ok(()) };
        if !self.config.readonly {
            flush(open).map_err(|source| self.failed("flushing", source))?;
        }
        // Before the lock goes: dropping writes what is left, which is nothing after a flush.
        *access = None;
        self.unlock()
    }

    /// Whether this process has the lock.
    pub(crate) fn is_held(&self) -> bool {
        self.access().is_some()
    }

    fn failed(&self, what: &'static str, source: Error) -> DiskError {
        DiskError::Io { path: self.config.path.clone(), what, source }
    }

    fn with<T>(
        &self,
        what: &'static str,
        work: impl FnOnce(&mut FormatAccess<Storage>) -> Result<T, Error>,
    ) -> Result<T, DiskError> {
        let mut access = self.access();
        let open = access.as_mut().ok_or_else(|| DiskError::GivenUp(self.config.path.clone()))?;
        work(open).map_err(|source| self.failed(what, source))
    }

    /// Reads from byte `offset` of the disk.
    pub(crate) fn read(&self, bytes: &mut [u8], offset: u64) -> Result<(), DiskError> {
        self.with("reading", |open| open.read(bytes, offset))
    }

    /// Writes at byte `offset` of the disk.
    pub(crate) fn write(&self, bytes: &[u8], offset: u64) -> Result<(), DiskError> {
        self.with("writing", |open| open.write(bytes, offset))
    }

    /// Brings everything written so far to the medium. Nothing to do for what is only read, or is given up.
    pub(crate) fn flush(&self) -> Result<(), DiskError> {
        if self.config.readonly || !self.is_held() {
            return Ok(());
        }
        self.with("flushing", |open| flush(open))
    }

    /// Gives the space of these bytes back, where that can be done; what they read as afterwards is not said.
    pub(crate) fn discard(&self, offset: u64, bytes: u64) -> Result<(), DiskError> {
        self.with("discarding", |open| match open.discard_to_any(offset, bytes) {
            Err(error) if error.kind() == ErrorKind::Unsupported => Ok(()),
            done => done,
        })
    }

    /// Makes these bytes zero, and gives their space back if `unmap`.
    pub(crate) fn zero(&self, offset: u64, bytes: u64, unmap: bool) -> Result<(), DiskError> {
        self.with("zeroing", |open| {
            let done = if unmap { open.discard_to_zero(offset, bytes) } else { open.write_zeroes(offset, bytes) };
            match done {
                Err(error) if error.kind() == ErrorKind::Unsupported => write_zeros(open, offset, bytes),
                done => done,
            }
        })
    }

    /// Has the host bring its cached part of the image to the medium, on a thread, while the guest runs: what is left for
    /// [`Self::give_up`], inside the downtime, is little then. A failure shows itself again there.
    pub(crate) fn sync_beside(self: &Arc<Self>) {
        if self.config.readonly || self.syncing.swap(true, Ordering::AcqRel) {
            return;
        }
        let disk = Arc::clone(self);
        let sync = move || {
            if let Err(error) = disk.file.sync_data() {
                tracing::warn!(disk = %disk.config.path.display(), %error, "the image could not be synced beside the guest");
            }
            disk.syncing.store(false, Ordering::Release);
        };
        if let Err(error) = std::thread::Builder::new().name("disk-sync".into()).spawn(sync) {
            tracing::debug!(%error, "no thread to sync an image");
            self.syncing.store(false, Ordering::Release);
        }
    }
}

fn flush(open: &FormatAccess<Storage>) -> Result<(), Error> {
    open.flush()?;
    open.sync()
}

fn write_zeros(open: &FormatAccess<Storage>, offset: u64, bytes: u64) -> Result<(), Error> {
    let mut done = 0;
    while done < bytes {
        let part = ZEROS.get(..usize::try_from(bytes - done).unwrap_or(ZEROS.len()).min(ZEROS.len())).unwrap_or(&ZEROS);
        open.write(part, offset + done)?;
        done += part.len() as u64;
    }
    Ok(())
}

#[cfg(test)]
#[path = "image_tests.rs"]
mod tests;
