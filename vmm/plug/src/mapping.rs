//! A shared mapping of a memfd: copying in and out of memory that others write at the same time, and the zero scan.
//! It knows no page numbers and no regions; `memory.rs` and `dirty.rs` do.
//!
//! Soundness rule of this module: a [`Mapping`] covers `bytes` bytes of a file that is sealed against shrinking, so
//! every access inside it is backed for as long as the `Mapping` lives, and every access goes through
//! [`Mapping::at`], which checks the range. The bytes are shared with a running guest: no reference to them is ever
//! made, they are only copied, compared or handed to the kernel by raw pointer, and every value is valid for `u8`.
//! The one exception is [`Mapping::words`], where everyone uses atomics. A copy may be torn by a write of the guest;
//! that is sound for bytes, and right because such a page is dirty and is sent again.

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::ptr::{self, NonNull};
use std::sync::atomic::AtomicU64;

/// `MADV_POPULATE_WRITE` of Linux 5.14.
const MADV_POPULATE_WRITE: libc::c_int = 23;
/// Bytes that the zero scan reads between two tests.
const SCAN_BYTES: usize = 256;

/// One shared, writable mapping of a memfd.
#[derive(Debug)]
pub(crate) struct Mapping {
    base: NonNull<u8>,
    bytes: usize,
}

// SAFETY: a mapping belongs to the process and not to a thread; the module's rule makes concurrent access sound.
unsafe impl Send for Mapping {}
// SAFETY: as above.
unsafe impl Sync for Mapping {}

impl Mapping {
    /// Maps `bytes` bytes from `offset`. The file must have passed `memfd::check` for `offset + bytes`.
    pub(crate) fn new(fd: BorrowedFd<'_>, offset: u64, bytes: u64) -> io::Result<Mapping> {
        let invalid = || io::Error::from(io::ErrorKind::InvalidInput);
        let length = usize::try_from(bytes).ok().filter(|length| *length > 0).ok_or_else(invalid)?;
        let offset = i64::try_from(offset).map_err(|_| invalid())?;
        let protection = libc::PROT_READ | libc::PROT_WRITE;
        // SAFETY: a fresh mapping at an address of the kernel's choice touches nothing that exists.
        let base = unsafe { libc::mmap(ptr::null_mut(), length, protection, libc::MAP_SHARED, fd.as_raw_fd(), offset) };
        if base == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        let base = NonNull::new(base.cast::<u8>()).ok_or_else(invalid)?;
        Ok(Mapping { base, bytes: length })
    }

    /// Advises the kernel about the whole mapping; advice that it does not know is passed over.
    pub(crate) fn advise(&self, advice: libc::c_int) {
        // SAFETY: the range is this mapping; the advice used here (dump, huge pages) changes no contents.
        let _ = unsafe { libc::madvise(self.base.as_ptr().cast(), self.bytes, advice) };
    }

    /// The address of byte `offset`, of which at least `length` bytes follow in the mapping.
    pub(crate) fn at(&self, offset: u64, length: u64) -> Option<*mut u8> {
        let (start, length) = (usize::try_from(offset).ok()?, usize::try_from(length).ok()?);
        if start.checked_add(length)? > self.bytes {
            return None;
        }
        // SAFETY: `start` is inside the mapping, as was just checked.
        Some(unsafe { self.base.as_ptr().add(start) })
    }

    /// Copies out of the mapping. False, and nothing is copied, if the range is not inside.
    pub(crate) fn read(&self, offset: u64, out: &mut [u8]) -> bool {
        let Some(from) = self.at(offset, out.len() as u64) else { return false };
        // SAFETY: `from` has out.len() bytes by `at`; `out` is our own memory, so they do not overlap.
        unsafe { ptr::copy_nonoverlapping(from, out.as_mut_ptr(), out.len()) };
        true
    }

    /// Copies into the mapping. False, and nothing is copied, if the range is not inside.
    pub(crate) fn write(&self, offset: u64, data: &[u8]) -> bool {
        let Some(to) = self.at(offset, data.len() as u64) else { return false };
        // SAFETY: `to` has data.len() bytes by `at`; `data` is our own memory, so they do not overlap.
        unsafe { ptr::copy_nonoverlapping(data.as_ptr(), to, data.len()) };
        true
    }

    /// Fills with zeros. False, and nothing is done, if the range is not inside.
    pub(crate) fn zero(&self, offset: u64, length: u64) -> bool {
        let Some(to) = self.at(offset, length) else { return false };
        // SAFETY: `to` has `length` bytes by `at`.
        unsafe { ptr::write_bytes(to, 0, length as usize) };
        true
    }

    /// Allocates every page of the range without changing its contents.
    pub(crate) fn populate(&self, offset: u64, length: u64) -> io::Result<()> {
        let Some(start) = self.at(offset, length) else { return Err(io::ErrorKind::InvalidInput.into()) };
        loop {
            // SAFETY: the range is inside the mapping by `at`, and populating changes no contents.
            if unsafe { libc::madvise(start.cast(), length as usize, MADV_POPULATE_WRITE) } == 0 {
                return Ok(());
            }
            let error = io::Error::last_os_error();
            if !matches!(error.raw_os_error(), Some(libc::EINTR | libc::EAGAIN)) {
                return Err(error);
            }
        }
    }

    /// Whether `length` bytes, a multiple of 256, are all zero. False if the range is not inside.
    pub(crate) fn is_zero(&self, offset: u64, length: u64) -> bool {
        let Some(start) = self.at(offset, length) else { return false };
        let length = length as usize;
        if !length.is_multiple_of(SCAN_BYTES) {
            return false;
        }
        #[cfg(target_arch = "x86_64")]
        if std::arch::is_x86_feature_detected!("avx2") {
            // SAFETY: AVX2 is there, as was just asked; the range is inside the mapping and a multiple of 256.
            return unsafe { is_zero_avx2(start, length) };
        }
        // SAFETY: the range is inside the mapping and a multiple of 256.
        unsafe { is_zero_plain(start, length) }
    }

    /// The mapping as atomic words, for memory that everyone treats so.
    pub(crate) fn words(&self) -> &[AtomicU64] {
        // SAFETY: the base is page-aligned, the length is inside the mapping, every bit pattern is a valid u64, and
        // the mapping lives as long as the borrow. Other processes use atomic operations on it (docs/PLUG.md); one
        // that does not can spoil the values, which are checked, and nothing else.
        unsafe { std::slice::from_raw_parts(self.base.as_ptr().cast::<AtomicU64>(), self.bytes / 8) }
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: this is exactly what `new` mapped, and nothing that borrows it outlives it.
        let _ = unsafe { libc::munmap(self.base.as_ptr().cast(), self.bytes) };
    }
}

/// # Safety
/// `start` must have `length` readable bytes, a multiple of 256.
unsafe fn is_zero_plain(start: *const u8, length: usize) -> bool {
    let mut offset = 0;
    while offset < length {
        let mut any = 0_u64;
        for word in 0..SCAN_BYTES / 8 {
            // SAFETY: inside the range that the caller vouches for.
            let at = unsafe { start.add(offset + word * 8) };
            // SAFETY: readable, and `read_unaligned` asks for no alignment.
            any |= unsafe { at.cast::<u64>().read_unaligned() };
        }
        if any != 0 {
            return false;
        }
        offset += SCAN_BYTES;
    }
    true
}

/// # Safety
/// The processor must have AVX2, and `start` must have `length` readable bytes, a multiple of 256.
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2")]
unsafe fn is_zero_avx2(start: *const u8, length: usize) -> bool {
    use std::arch::x86_64::{__m256i, _mm256_loadu_si256, _mm256_or_si256, _mm256_setzero_si256, _mm256_testz_si256};
    let mut offset = 0;
    while offset < length {
        let mut any = _mm256_setzero_si256();
        for vector in 0..SCAN_BYTES / 32 {
            // SAFETY: inside the range that the caller vouches for.
            let at = unsafe { start.add(offset + vector * 32) };
            // SAFETY: 32 readable bytes, and an unaligned load.
            any = _mm256_or_si256(any, unsafe { _mm256_loadu_si256(at.cast::<__m256i>()) });
        }
        if _mm256_testz_si256(any, any) == 0 {
            return false;
        }
        offset += SCAN_BYTES;
    }
    true
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use crate::memfd;
    use std::os::fd::AsFd;

    #[test]
    fn nothing_outside_the_mapping_is_reached() {
        let fd = memfd::create("limosa-test", 8192).unwrap();
        let mapping = Mapping::new(fd.as_fd(), 4096, 4096).unwrap();
        assert!(mapping.write(4090, &[1; 6]) && !mapping.write(4090, &[1; 7]) && !mapping.write(u64::MAX, &[1]));
        assert!(!mapping.read(u64::MAX - 2, &mut [0; 8]) && !mapping.zero(0, 4097) && !mapping.is_zero(4096, 256));
        assert!(mapping.populate(4096, 4096).is_err());
        assert!(Mapping::new(fd.as_fd(), 0, 0).is_err());
    }

    #[test]
    fn one_bit_anywhere_is_not_zero() {
        let fd = memfd::create("limosa-test", 4096).unwrap();
        let mapping = Mapping::new(fd.as_fd(), 0, 4096).unwrap();
        let start = mapping.at(0, 4096).unwrap();
        assert!(mapping.is_zero(0, 4096));
        for byte in 0..4096 {
            mapping.write(byte, &[1 << (byte % 8)]);
            // SAFETY: the whole mapping.
            let plain = unsafe { is_zero_plain(start, 4096) };
            assert!(!mapping.is_zero(0, 4096) && !plain, "byte {byte}");
            mapping.zero(byte, 1);
        }
        assert!(mapping.is_zero(0, 4096));
    }
}
