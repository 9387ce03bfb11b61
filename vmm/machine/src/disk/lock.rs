//! The lock on an image, by which two processes or hosts never use one at once. Not what is in the image: `image.rs`.
//!
//! Locks belong to an open file description (F_OFD_SETLK): they end with it, however its process ends, and NFS carries
//! them to its server. The bytes are QEMU's: from byte 100 a byte for each thing that a user does with the image, from
//! byte 200 a byte for each thing that it wants nobody else to do. QEMU locks its bytes for reading and then looks whether
//! anyone has the opposite ones. A writer here takes all of them at once for writing, so that no QEMU can take any, and
//! there is no moment between locking and looking. A reader here takes the same bytes as a QEMU that only reads.

use std::fs::File;
use std::os::unix::fs::MetadataExt as _;
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::fcntl::{FcntlArg, fcntl};

/// All of QEMU's bytes.
const ALL: (i64, i64) = (100, 200);
/// What a reader does: read contents that are consistent.
const READS: (i64, i64) = (100, 1);
/// What a reader wants nobody to do: write (201), resize (203).
const NO_WRITER: [(i64, i64); 2] = [(201, 1), (203, 1)];
/// What a writer does (101 to 103), and "nobody else may read" (200).
const WRITERS: [(i64, i64); 2] = [(101, 3), (200, 1)];
/// How often a lock that somebody has is tried again.
const RETRY_INTERVAL: Duration = Duration::from_millis(10);
/// Most open files that are looked through for who has a lock.
const SEARCH_MAX: usize = 200_000;

fn range(kind: i32, (start, bytes): (i64, i64)) -> libc::flock {
    libc::flock {
        l_type: kind as libc::c_short,
        l_whence: libc::SEEK_SET as libc::c_short,
        l_start: start,
        l_len: bytes,
        l_pid: 0,
    }
}

fn set(file: &File, kind: i32, bytes: (i64, i64)) -> Result<(), Errno> {
    fcntl(file, FcntlArg::F_OFD_SETLK(&range(kind, bytes))).map(drop)
}

/// Whether somebody else has one of these bytes, in whatever way.
fn taken(file: &File, bytes: (i64, i64)) -> Result<bool, Errno> {
    let mut lock = range(libc::F_WRLCK, bytes);
    fcntl(file, FcntlArg::F_OFD_GETLK(&mut lock))?;
    Ok(i32::from(lock.l_type) != libc::F_UNLCK)
}

/// One try: true if the lock is ours now.
fn try_take(file: &File, readonly: bool) -> Result<bool, Errno> {
    let busy = |result: Result<(), Errno>| match result {
        Ok(()) => Ok(true),
        Err(Errno::EAGAIN | Errno::EACCES) => Ok(false),
        Err(other) => Err(other),
    };
    if !readonly {
        return busy(set(file, libc::F_WRLCK, ALL));
    }
    for bytes in [READS].into_iter().chain(NO_WRITER) {
        if !busy(set(file, libc::F_RDLCK, bytes))? {
            give_up(file)?;
            return Ok(false);
        }
    }
    for bytes in WRITERS {
        if taken(file, bytes)? {
            give_up(file)?;
            return Ok(false);
        }
    }
    Ok(true)
}

/// Takes the lock, for reading only or for writing, trying for up to `patience`. Having it already is fine. False: somebody
/// else has it, and nothing is held.
pub(crate) fn take(file: &File, readonly: bool, patience: Duration) -> Result<bool, Errno> {
    let until = Instant::now() + patience;
    loop {
        if try_take(file, readonly)? {
            return Ok(true);
        }
        if Instant::now() >= until {
            return Ok(false);
        }
        std::thread::sleep(RETRY_INTERVAL);
    }
}

/// Gives the lock up. Not having it is fine.
pub(crate) fn give_up(file: &File) -> Result<(), Errno> {
    set(file, libc::F_UNLCK, ALL)
}

/// Who has the lock that `file` cannot have, in words: a process of this host that can be seen, or "another host".
pub(crate) fn holder(file: &File) -> String {
    // The agent's fence keeps processes that it did not start from being looked at.
    let unseen = "a process that cannot be seen from here (`fuser` as root names it), or another host";
    let Ok(meta) = file.metadata() else { return unseen.into() };
    let mut looked = 0;
    let pids = std::fs::read_dir("/proc").into_iter().flatten().flatten();
    let pids = pids.filter_map(|entry| entry.file_name().to_str()?.parse::<u32>().ok());
    for pid in pids {
        let files = std::fs::read_dir(format!("/proc/{pid}/fdinfo")).into_iter().flatten().flatten();
        for file in files {
            looked += 1;
            if looked > SEARCH_MAX {
                return unseen.into();
            }
            let text = std::fs::read_to_string(file.path()).unwrap_or_default();
            if text.lines().any(|line| names_image(line, meta.ino())) {
                let name = std::fs::read_to_string(format!("/proc/{pid}/comm")).unwrap_or_default();
                return format!("process {pid} ({})", name.trim());
            }
        }
    }
    unseen.into()
}

/// Whether a line of an fdinfo says that this open file has one of QEMU's bytes of the file with this inode locked, such
/// as `lock: 1: OFDLCK  ADVISORY  WRITE -1 08:01:4711 100 299`.
fn names_image(line: &str, inode: u64) -> bool {
    let Some(lock) = line.strip_prefix("lock:") else { return false };
    let words: Vec<&str> = lock.split_whitespace().collect();
    let [_, _, _, _, _, file, start, end] = words.as_slice() else { return false };
    let number = |text: &str| text.parse::<u64>().unwrap_or(u64::MAX);
    let (first, last) = (ALL.0.unsigned_abs(), (ALL.0 + ALL.1).unsigned_abs());
    file.rsplit(':').next().map(number) == Some(inode) && number(start) < last && number(end) >= first
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::panic)]
    use super::*;
    use std::fs::OpenOptions;

    fn open(path: &std::path::Path) -> File {
        OpenOptions::new().read(true).write(true).create(true).truncate(false).open(path).unwrap()
    }

    #[test]
    fn one_writer_or_many_readers() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("image");
        let [one, other, third] = [open(&path), open(&path), open(&path)];
        let now = Duration::ZERO;
        assert_eq!(take(&one, false, now), Ok(true));
        assert_eq!(take(&one, false, now), Ok(true), "having it already is fine");
        assert_eq!(take(&other, false, now), Ok(false));
        assert_eq!(take(&other, true, now), Ok(false));
        let who = holder(&other);
        assert!(who.contains(&format!("process {}", std::process::id())), "{who}");
        give_up(&one).unwrap();
        assert_eq!(take(&other, true, now), Ok(true));
        assert_eq!(take(&third, true, now), Ok(true));
        assert_eq!(take(&one, false, now), Ok(false));
        give_up(&third).unwrap();
        drop(other);
        assert_eq!(take(&one, false, now), Ok(true), "a lock ends with its open file");
        assert_eq!(
            holder(&open(&dir.path().join("free"))),
            "a process that cannot be seen from here (`fuser` as root names it), or another host"
        );
    }

    #[test]
    fn a_lock_that_comes_free_in_time_is_taken() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("image");
        let (one, other) = (open(&path), open(&path));
        assert_eq!(take(&one, false, Duration::ZERO), Ok(true));
        let freeing = std::thread::spawn(move || {
            std::thread::sleep(Duration::from_millis(100));
            drop(one);
        });
        assert_eq!(take(&other, false, Duration::from_secs(10)), Ok(true));
        freeing.join().unwrap();
    }

    #[test]
    fn lines_about_other_locks_do_not_count() {
        let line = "lock:\t1: OFDLCK  ADVISORY  WRITE -1 08:01:4711 100 299";
        assert!(names_image(line, 4711) && !names_image(line, 4712));
        assert!(names_image("lock:\t1: OFDLCK  ADVISORY  READ -1 08:01:4711 201 201", 4711));
        assert!(!names_image("lock:\t1: FLOCK  ADVISORY  WRITE 12 08:01:4711 0 EOF", 4712));
        assert!(!names_image("pos:\t0", 4711) && !names_image("lock:\t1: x", 1));
        assert!(!names_image("lock:\t1: OFDLCK  ADVISORY  WRITE -1 08:01:4711 400 499", 4711));
    }
}
