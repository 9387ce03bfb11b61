//! The guest's disks as files of this host: what is configured, what can go wrong. The lock is in `lock.rs`, reading and
//! writing in `image.rs`; the guest's side is `devices/block.rs`.

pub(crate) mod image;
pub(crate) mod lock;

use std::path::PathBuf;

/// How an image is laid out in its file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DiskFormat {
    /// The file is the disk.
    Raw,
    /// QEMU's format, versions 2 and 3, in one file: no backing file, no external data file, no encryption.
    Qcow2,
}

impl std::fmt::Display for DiskFormat {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Raw => "raw",
            Self::Qcow2 => "qcow2",
        })
    }
}

/// A disk.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DiskConfig {
    /// The image: a file, or a block device of this host.
    pub path: PathBuf,
    /// Its format; none: qcow2 if it begins like one, and refused otherwise.
    pub format: Option<DiskFormat>,
    /// The guest may not write it; several guests may then share it.
    pub readonly: bool,
    /// What the guest reads as the disk's serial number, at most 20 bytes.
    pub serial: String,
    /// The path may have no symbolic link in it: for a path that another host named and this one has resolved.
    pub resolved: bool,
}

/// What an image is, as looked at without its lock.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DiskInfo {
    /// Its format.
    pub format: DiskFormat,
    /// Size of the disk that the guest sees, in bytes.
    pub bytes: u64,
}

/// Why an image cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum DiskError {
    /// It cannot be opened.
    #[error("disk {path}: it cannot be opened for {purpose}: {source}")]
    Open {
        /// The image.
        path: PathBuf,
        /// "reading" or "reading and writing".
        purpose: &'static str,
        /// What the system says.
        source: std::io::Error,
    },
    /// It is neither a file nor a block device.
    #[error("disk {0}: it is neither a file nor a block device")]
    Kind(PathBuf),
    /// No format was given, and the contents do not tell it.
    #[error(
        "disk {0}: no format is given and it is no qcow2 image; say format = \"raw\" if it is raw (that is never guessed: a \
         guest could write a qcow2 header into a raw disk and have other files of this host opened)"
    )]
    NoFormat(PathBuf),
    /// The contents contradict the format that was given, or cannot be understood.
    #[error("disk {path}: it is no {format} image that can be used: {reason}")]
    Format {
        /// The image.
        path: PathBuf,
        /// The format that was given or found.
        format: DiskFormat,
        /// What is wrong with it.
        reason: String,
    },
    /// It is smaller than a sector.
    #[error("disk {0}: it has less than one sector of 512 bytes")]
    Empty(PathBuf),
    /// It has another size than before.
    #[error("disk {path}: it had {was} bytes and has {is} now; its size must not change under a guest")]
    Size {
        /// The image.
        path: PathBuf,
        /// Bytes before.
        was: u64,
        /// Bytes now.
        is: u64,
    },
    /// Somebody else uses it.
    #[error("disk {path}: it is locked by {holder}")]
    Locked {
        /// The image.
        path: PathBuf,
        /// Who, as far as this host can tell.
        holder: String,
    },
    /// Its file system has no locks.
    #[error("disk {path}: it cannot be locked: {source}; does its file system have locks (NFS: lockd, or version 4)?")]
    Lock {
        /// The image.
        path: PathBuf,
        /// What the system says.
        source: std::io::Error,
    },
    /// It was used without its lock.
    #[error("disk {0}: it was given up to another host and is not used here")]
    GivenUp(PathBuf),
    /// The serial number is too long.
    #[error("disk {path}: the serial \"{serial}\" has more than 20 bytes")]
    Serial {
        /// The image.
        path: PathBuf,
        /// What was given.
        serial: String,
    },
    /// Reading, writing or flushing failed.
    #[error("disk {path}: {what} failed: {source}")]
    Io {
        /// The image.
        path: PathBuf,
        /// What was tried.
        what: &'static str,
        /// What the system says.
        source: std::io::Error,
    },
}
