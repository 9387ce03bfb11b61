//! Memory files: making sealed ones, and checking those that come from the other side before they are mapped or read.
//! Nothing is mapped here.
//!
//! A file that its owner can shrink makes every process that has it mapped fault (SIGBUS) at will, and reading from
//! anything that is no memory file may block for ever. So only memfds with `F_SEAL_SHRINK` are taken from the other side.

use nix::fcntl::{FcntlArg, SealFlag, fcntl};
use nix::sys::memfd::{MFdFlags, memfd_create};
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

/// Makes a memfd of `bytes` bytes of zeros (none of them allocated yet) that can neither shrink nor grow.
///
/// # Errors
/// The system's.
pub fn create(name: &str, bytes: u64) -> io::Result<OwnedFd> {
    let fd = memfd_create(name, MFdFlags::MFD_CLOEXEC | MFdFlags::MFD_ALLOW_SEALING)?;
    let length = i64::try_from(bytes).map_err(|_| io::Error::from(io::ErrorKind::InvalidInput))?;
    nix::unistd::ftruncate(&fd, length)?;
    seal(fd.as_fd())?;
    Ok(fd)
}

/// Puts the seals on a memfd that the other side will ask for: its size is final.
///
/// # Errors
/// The system's; `EPERM` or `EINVAL` if it was made without `MFD_ALLOW_SEALING`.
pub fn seal(fd: BorrowedFd<'_>) -> io::Result<()> {
    fcntl(fd, FcntlArg::F_ADD_SEALS(SealFlag::F_SEAL_SHRINK | SealFlag::F_SEAL_GROW))?;
    Ok(())
}

/// Checks that `fd` is a memfd that cannot shrink and has at least `bytes` bytes.
///
/// # Errors
/// Says which of these it is not.
pub fn check(fd: BorrowedFd<'_>, bytes: u64) -> io::Result<()> {
    let refuse = |words: String| Err(io::Error::new(io::ErrorKind::InvalidInput, words));
    let Ok(seals) = fcntl(fd, FcntlArg::F_GET_SEALS) else {
        return refuse("the descriptor is no memfd".to_owned());
    };
    if !SealFlag::from_bits_retain(seals).contains(SealFlag::F_SEAL_SHRINK) {
        return refuse("the memfd can shrink under its reader: seal it with F_SEAL_SHRINK first".to_owned());
    }
    let has = u64::try_from(nix::sys::stat::fstat(fd)?.st_size).unwrap_or(0);
    if has < bytes {
        return refuse(format!("the memfd has {has} bytes and {bytes} are needed"));
    }
    Ok(())
}

/// Size of the pages behind a memfd that passed [`check`]: 4096, or a huge page's.
///
/// # Errors
/// The system's.
pub fn page_bytes(fd: BorrowedFd<'_>) -> io::Result<u64> {
    let stat = nix::sys::statfs::fstatfs(fd)?;
    if stat.filesystem_type() == nix::sys::statfs::HUGETLBFS_MAGIC {
        return Ok(u64::try_from(stat.block_size()).unwrap_or(4096).max(4096));
    }
    Ok(4096)
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn only_sealed_memfds_of_the_right_size_pass() {
        let good = create("limosa-test", 8192).unwrap();
        check(good.as_fd(), 8192).unwrap();
        assert_eq!(page_bytes(good.as_fd()).unwrap(), 4096);
        let words = |fd: BorrowedFd<'_>, bytes| check(fd, bytes).unwrap_err().to_string();
        assert_eq!(words(good.as_fd(), 8193), "the memfd has 8192 bytes and 8193 are needed");
        let loose = memfd_create("limosa-test", MFdFlags::MFD_CLOEXEC | MFdFlags::MFD_ALLOW_SEALING).unwrap();
        assert!(words(loose.as_fd(), 0).contains("F_SEAL_SHRINK"));
        let (pipe, _other) = nix::unistd::pipe().unwrap();
        assert_eq!(words(pipe.as_fd(), 0), "the descriptor is no memfd");
        assert!(nix::unistd::ftruncate(&good, 4096).is_err());
    }
}
