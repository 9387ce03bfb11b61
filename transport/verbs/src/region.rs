//! Memory that a device may use: mappings, and their registration as memory regions. It knows memory files and bytes, no guests.
//!
//! Soundness: a mapping's bytes may change at any time (a device, a guest, another process writes them), so they are never
//! borrowed: they are copied, word by word, with volatile accesses inside bounds that were checked. A mapping of a file needs
//! the file to be sealed against shrinking, or an access could end the process. A region keeps its mapping.

use crate::counters::{Kind, Tally};
use crate::domain::ProtectionDomain;
use nix::fcntl::{FcntlArg, SealFlag, fcntl};
use nix::sys::mman::{MapFlags, MmapAdvise, ProtFlags, madvise, mmap, mmap_anonymous, munmap};
use nix::sys::resource::{Resource, getrlimit};
use nix::sys::stat::fstat;
use nix::sys::statfs::{FsType, fstatfs};
use rdma_sys::ibv_mr;
use std::ffi::{c_int, c_void};
use std::fmt;
use std::io;
use std::num::NonZeroUsize;
use std::ops::Range;
use std::os::fd::BorrowedFd;
use std::ptr::NonNull;
use std::sync::Arc;
use thiserror::Error;

const ACCESS_LOCAL_WRITE: u32 = 1;
const ACCESS_REMOTE_WRITE: u32 = 1 << 1;
const ACCESS_ON_DEMAND: u32 = 1 << 6;
const ACCESS_RELAXED_ORDERING: u32 = 1 << 20;
/// The bit of CAP_IPC_LOCK, which is not held to the limit of locked memory.
const CAP_IPC_LOCK: u32 = 14;
const PAGE: u64 = 4096;
const HUGETLBFS_MAGIC: FsType = FsType(0x9584_58f6);

/// Why there is no mapping.
#[derive(Debug, Error)]
pub enum MapError {
    /// The file can shrink, which would end this process at the next access.
    #[error("the file is no memfd that is sealed with F_SEAL_SHRINK, so it cannot be mapped for RDMA")]
    NotSealed,
    /// The file is smaller.
    #[error("the file has {file} bytes, but {bytes} bytes from {offset} on were to be mapped")]
    TooShort {
        /// Bytes of the file.
        file: u64,
        /// Where the mapping should begin.
        offset: u64,
        /// How long it should be.
        bytes: u64,
    },
    /// Not whole pages of the file.
    #[error("offset {offset} and length {bytes} of a mapping must be whole pages of {page} bytes, at least one")]
    NotWholePages {
        /// Where the mapping should begin.
        offset: u64,
        /// How long it should be.
        bytes: u64,
        /// Bytes of a page of this file.
        page: u64,
    },
    /// The system refused.
    #[error("mapping memory for RDMA failed: {call}: {error}")]
    Io {
        /// The call that failed.
        call: &'static str,
        /// What it said.
        error: io::Error,
    },
}

/// An access outside a mapping or a region.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Error)]
#[error("{bytes} bytes at {offset} are outside of {size} bytes of memory")]
pub struct OutOfBounds {
    /// First byte.
    pub offset: u64,
    /// How many.
    pub bytes: u64,
    /// Bytes that there are.
    pub size: u64,
}

/// Memory of this process that may be registered with a device. Unmapped when nobody holds it any more.
pub struct Mapping {
    start: NonNull<c_void>,
    bytes: usize,
}

// SAFETY: the memory is not tied to a thread.
unsafe impl Send for Mapping {}
// SAFETY: the bytes are accessed by volatile copies only, never by reference; concurrent ones give mixed bytes, as with a device.
unsafe impl Sync for Mapping {}

impl fmt::Debug for Mapping {
    fn fmt(&self, to: &mut fmt::Formatter<'_>) -> fmt::Result {
        // Not where: addresses do not belong into logs.
        to.debug_struct("Mapping").field("bytes", &self.bytes).finish_non_exhaustive()
    }
}

impl Mapping {
    /// Maps `bytes` of a memory file from `offset` on, shared and writable; both are multiples of the file's page size.
    ///
    /// # Errors
    /// See [`MapError`]. The file must be a memfd with `F_SEAL_SHRINK`.
    pub fn of_file(fd: BorrowedFd<'_>, offset: u64, bytes: u64) -> Result<Arc<Mapping>, MapError> {
        let seals = fcntl(fd, FcntlArg::F_GET_SEALS).map(SealFlag::from_bits_retain);
        if !seals.is_ok_and(|seals| seals.contains(SealFlag::F_SEAL_SHRINK)) {
            return Err(MapError::NotSealed);
        }
        let stat = fstat(fd).map_err(|error| MapError::Io { call: "fstat", error: error.into() })?;
        let file = u64::try_from(stat.st_size).unwrap_or(0);
        let page = page_bytes(fd).map_err(|error| MapError::Io { call: "fstatfs", error: error.into() })?;
        if bytes == 0 || !offset.is_multiple_of(page) || !bytes.is_multiple_of(page) {
            return Err(MapError::NotWholePages { offset, bytes, page });
        }
        if offset.checked_add(bytes).is_none_or(|end| end > file) {
            return Err(MapError::TooShort { file, offset, bytes });
        }
        let too_short = MapError::TooShort { file, offset, bytes };
        let (Some(length), Ok(from)) = (usize::try_from(bytes).ok().and_then(NonZeroUsize::new), i64::try_from(offset)) else {
            return Err(too_short);
        };
        let access = ProtFlags::PROT_READ | ProtFlags::PROT_WRITE;
        // SAFETY: a new mapping at an address that the kernel chooses takes no memory from anybody.
        let start = unsafe { mmap(None, length, access, MapFlags::MAP_SHARED, fd, from) };
        let start = start.map_err(|error| MapError::Io { call: "mmap", error: error.into() })?;
        // It is guest memory, and stays out of core dumps. A kernel that cannot do that maps it all the same.
        // SAFETY: the range is the mapping that was just made, and the advice changes none of its contents.
        let _ = unsafe { madvise(start, length.get(), MmapAdvise::MADV_DONTDUMP) };
        Ok(Arc::new(Mapping { start, bytes: length.get() }))
    }

    /// Asks the kernel for huge pages where this mapping is the first to touch a page, as a registration is that takes fresh memory in.
    /// Advice: a kernel that has none, or is told not to, gives small ones.
    pub fn ask_for_huge_pages(&self) {
        // SAFETY: the range is this mapping, and the advice changes none of its contents.
        if let Err(error) = unsafe { madvise(self.start, self.bytes, MmapAdvise::MADV_HUGEPAGE) } {
            tracing::debug!(%error, "no huge pages behind memory for RDMA");
        }
    }

    /// Maps new memory of at least `bytes`, filled with zeros: for messages.
    ///
    /// # Errors
    /// [`MapError::NotWholePages`] for no bytes, [`MapError::Io`].
    pub fn anonymous(bytes: u64) -> Result<Arc<Mapping>, MapError> {
        let whole = bytes.checked_next_multiple_of(PAGE).and_then(|bytes| usize::try_from(bytes).ok());
        let Some(length) = whole.and_then(NonZeroUsize::new) else {
            return Err(MapError::NotWholePages { offset: 0, bytes, page: PAGE });
        };
        let access = ProtFlags::PROT_READ | ProtFlags::PROT_WRITE;
        // Shared, so that a child process of this one gets no copy on write, which would part the device from the CPU.
        // SAFETY: a new mapping at an address that the kernel chooses takes no memory from anybody.
        let start = unsafe { mmap_anonymous(None, length, access, MapFlags::MAP_SHARED) };
        let start = start.map_err(|error| MapError::Io { call: "mmap", error: error.into() })?;
        Ok(Arc::new(Mapping { start, bytes: length.get() }))
    }

    /// Its length.
    pub fn bytes(&self) -> u64 {
        self.bytes as u64
    }

    /// Copies bytes out. While a device or a guest writes them, the copy may be of any mixture of old and new.
    ///
    /// # Errors
    /// [`OutOfBounds`]; then nothing was copied.
    pub fn read_at(&self, offset: u64, into: &mut [u8]) -> Result<(), OutOfBounds> {
        let mut from = self.at(offset, into.len() as u64)?;
        let (words, rest) = into.as_chunks_mut::<8>();
        for word in words {
            // SAFETY: `at` checked that these eight bytes are in the mapping; an unaligned read of plain bytes.
            *word = unsafe { from.cast::<[u8; 8]>().read_volatile() };
            // SAFETY: still in the mapping, or one past its end.
            from = unsafe { from.add(8) };
        }
        for byte in rest {
            // SAFETY: as above, for one byte.
            *byte = unsafe { from.read_volatile() };
            // SAFETY: still in the mapping, or one past its end.
            from = unsafe { from.add(1) };
        }
        Ok(())
    }

    /// Copies bytes in.
    ///
    /// # Errors
    /// [`OutOfBounds`]; then nothing was copied.
    pub fn write_at(&self, offset: u64, from: &[u8]) -> Result<(), OutOfBounds> {
        let mut into = self.at(offset, from.len() as u64)?;
        let (words, rest) = from.as_chunks::<8>();
        for word in words {
            // SAFETY: `at` checked that these eight bytes are in the mapping; an unaligned write of plain bytes.
            unsafe { into.cast::<[u8; 8]>().write_volatile(*word) };
            // SAFETY: still in the mapping, or one past its end.
            into = unsafe { into.add(8) };
        }
        for byte in rest {
            // SAFETY: as above, for one byte.
            unsafe { into.write_volatile(*byte) };
            // SAFETY: still in the mapping, or one past its end.
            into = unsafe { into.add(1) };
        }
        Ok(())
    }

    fn at(&self, offset: u64, bytes: u64) -> Result<NonNull<u8>, OutOfBounds> {
        check(offset, bytes, self.bytes())?;
        // SAFETY: just checked to be in the mapping, whose length is a usize.
        Ok(unsafe { self.start.cast::<u8>().add(offset as usize) })
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: the mapping is ours, every region over it was deregistered (each holds the mapping), nothing borrows its bytes.
        if let Err(error) = unsafe { munmap(self.start, self.bytes) } {
            tracing::warn!(%error, "memory for RDMA cannot be unmapped");
        }
    }
}

/// A memfd of huge pages lies in hugetlbfs, whose block is such a page. (The block size of the file itself says less: it is
/// that of a huge page also where the kernel merely may use one.)
fn page_bytes(fd: BorrowedFd<'_>) -> nix::Result<u64> {
    let system = fstatfs(fd)?;
    let huge = system.filesystem_type() == HUGETLBFS_MAGIC;
    Ok(if huge { u64::try_from(system.block_size()).unwrap_or(PAGE) } else { PAGE })
}

fn check(offset: u64, bytes: u64, size: u64) -> Result<(), OutOfBounds> {
    match offset.checked_add(bytes) {
        Some(end) if end <= size => Ok(()),
        _ => Err(OutOfBounds { offset, bytes, size }),
    }
}

/// What may be done with a region. Nothing set is enough to send and write from it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Access {
    /// This host's device may write: needed to receive into it.
    pub local_write: bool,
    /// The peer may write; implies `local_write`. Nobody may ever read: no region can be registered for that.
    pub remote_write: bool,
    /// The memory is not pinned; the device must have on-demand paging.
    pub on_demand: bool,
    /// The device may order its writes as it likes; completions still come after them. Ignored where it is not known.
    pub relaxed_ordering: bool,
}

impl Access {
    pub(crate) fn writable(self) -> bool {
        self.local_write || self.remote_write
    }

    fn bits(self) -> u32 {
        let all = [
            (self.writable(), ACCESS_LOCAL_WRITE),
            (self.remote_write, ACCESS_REMOTE_WRITE),
            (self.on_demand, ACCESS_ON_DEMAND),
            (self.relaxed_ordering, ACCESS_RELAXED_ORDERING),
        ];
        all.into_iter().filter(|(set, _)| *set).map(|(_, bit)| bit).sum()
    }
}

/// Why memory was not registered.
#[derive(Debug, Error)]
pub enum RegisterError {
    /// This process may not lock so much memory.
    #[error(
        "this process may lock {} of memory, {} are locked, and {} more are needed to register it with the RDMA device: \
         set LimitMEMLOCK=infinity in the service's unit, or the line `USER - memlock unlimited` in /etc/security/limits.d/limosa.conf",
        in_mib(*limit), in_mib(*pinned), in_mib(*needed)
    )]
    MemlockTooLow {
        /// Bytes that this process may lock.
        limit: u64,
        /// Bytes that are pinned already.
        pinned: u64,
        /// Bytes that were to be registered.
        needed: u64,
    },
    /// The device or the host has no more room.
    #[error("registering {0} bytes failed: the device or the host has not enough memory for it")]
    OutOfMemory(u64),
    /// The device has no on-demand paging for reliable connections.
    #[error("the RDMA device {0} has no on-demand paging: set it off")]
    OnDemandUnsupported(String),
    /// Not in the mapping.
    #[error("cannot register memory: {0}")]
    OutOfBounds(#[from] OutOfBounds),
    /// More than the device registers at once.
    #[error("{bytes} bytes are more than the RDMA device registers at once ({limit})")]
    TooLarge {
        /// As asked for.
        bytes: u64,
        /// As the device says.
        limit: u64,
    },
    /// Anything else.
    #[error("registering {bytes} bytes with the RDMA device {device} failed: {error}")]
    Failed {
        /// The device.
        device: String,
        /// As asked for.
        bytes: u64,
        /// What it said.
        error: io::Error,
    },
}

fn in_mib(bytes: u64) -> String {
    if bytes == u64::MAX { "any amount".to_owned() } else { format!("{} KiB", bytes.div_ceil(1024)) }
}

/// Why memory is still registered.
#[derive(Debug, Error)]
pub enum DeregisterError {
    /// Somebody else holds the region; it is deregistered when the last one lets go.
    #[error("the memory region is still held by {0} others (work requests that are under way, or handles)")]
    InUse(usize),
    /// The device refused.
    #[error("deregistering memory failed: {0}")]
    Failed(io::Error),
}

/// A place in the memory of the other side.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct RemoteKey {
    /// The address there.
    pub address: u64,
    /// The key.
    pub rkey: u32,
}

impl RemoteKey {
    /// The place `offset` bytes on; wraps around at the end of the address space, where no memory is.
    #[must_use]
    pub fn at(self, offset: u64) -> RemoteKey {
        RemoteKey { address: self.address.wrapping_add(offset), rkey: self.rkey }
    }
}

impl fmt::Debug for RemoteKey {
    fn fmt(&self, to: &mut fmt::Formatter<'_>) -> fmt::Result {
        // Who knows address and key can write: they do not belong into logs.
        to.write_str("RemoteKey(…)")
    }
}

/// Memory that is registered with a device, from a [`Mapping`], until the last holder lets go.
pub struct MemoryRegion {
    raw: NonNull<ibv_mr>,
    bytes: u64,
    access: Access,
    domain: Arc<ProtectionDomain>,
    mapping: Arc<Mapping>,
    tally: Option<Tally>,
}

// SAFETY: libibverbs may be called from any thread, and the object is destroyed once.
unsafe impl Send for MemoryRegion {}
// SAFETY: as above: nothing changes a region but its end.
unsafe impl Sync for MemoryRegion {}

impl fmt::Debug for MemoryRegion {
    fn fmt(&self, to: &mut fmt::Formatter<'_>) -> fmt::Result {
        to.debug_struct("MemoryRegion").field("bytes", &self.bytes).field("access", &self.access).finish_non_exhaustive()
    }
}

impl MemoryRegion {
    /// Registers the bytes `range` of a mapping. Without on-demand paging this touches and pins every page, which takes
    /// its time: not for a thread that others wait for.
    ///
    /// # Errors
    /// See [`RegisterError`]; then nothing is registered.
    pub fn register(
        domain: &Arc<ProtectionDomain>,
        mapping: &Arc<Mapping>,
        range: Range<u64>,
        access: Access,
    ) -> Result<Arc<MemoryRegion>, RegisterError> {
        let context = domain.context();
        let size = mapping.bytes();
        let bytes = range.end.checked_sub(range.start).filter(|bytes| *bytes > 0);
        let bytes = bytes.ok_or(OutOfBounds { offset: range.start, bytes: 0, size })?;
        let start = mapping.at(range.start, bytes)?;
        let limit = context.limits().region_bytes_max;
        if bytes > limit {
            return Err(RegisterError::TooLarge { bytes, limit });
        }
        if access.on_demand && !context.on_demand().reliable {
            return Err(RegisterError::OnDemandUnsupported(context.name().to_owned()));
        }
        let verbs = &context.library().verbs;
        // `at` found the bytes in the mapping, whose length is a usize.
        let (start, length) = (start.as_ptr().cast::<c_void>(), bytes as usize);
        let raw = if access.relaxed_ordering {
            let address = start.expose_provenance() as u64;
            // SAFETY: the domain lives, the bytes are mapped, and the region holds the mapping until it is deregistered.
            unsafe { (verbs.ibv_reg_mr_iova2)(domain.raw(), start, length, address, access.bits()) }
        } else {
            // SAFETY: as above.
            unsafe { (verbs.ibv_reg_mr)(domain.raw(), start, length, access.bits() as c_int) }
        };
        let Some(raw) = NonNull::new(raw) else {
            return Err(refused(context.name(), bytes, io::Error::last_os_error()));
        };
        let (domain, mapping) = (Arc::clone(domain), Arc::clone(mapping));
        Ok(Arc::new(MemoryRegion { raw, bytes, access, domain, mapping, tally: Some(Tally::new(Kind::Region)) }))
    }

    /// Deregisters the memory now, and says so if that cannot be: work requests under way hold their region.
    ///
    /// # Errors
    /// See [`DeregisterError`].
    pub fn deregister(region: Arc<MemoryRegion>) -> Result<(), DeregisterError> {
        let others = Arc::strong_count(&region).saturating_sub(1);
        let mut region = Arc::into_inner(region).ok_or(DeregisterError::InUse(others.max(1)))?;
        region.end().map_err(DeregisterError::Failed)
    }

    /// Its length.
    pub fn bytes(&self) -> u64 {
        self.bytes
    }

    /// What may be done with it.
    pub fn access(&self) -> Access {
        self.access
    }

    /// The memory.
    pub fn mapping(&self) -> &Arc<Mapping> {
        &self.mapping
    }

    /// The domain that it was registered in.
    pub fn domain(&self) -> &Arc<ProtectionDomain> {
        &self.domain
    }

    /// What the other side needs in order to write to its first byte.
    pub fn remote(&self) -> RemoteKey {
        // SAFETY: the region lives; the field is a number.
        let rkey = unsafe { (*self.raw.as_ptr()).rkey };
        RemoteKey { address: self.address(), rkey }
    }

    /// The key for work requests of this side.
    pub(crate) fn lkey(&self) -> u32 {
        // SAFETY: the region lives; the field is a number.
        unsafe { (*self.raw.as_ptr()).lkey }
    }

    /// The address of `bytes` bytes from `offset` of the region on.
    pub(crate) fn piece(&self, offset: u64, bytes: u64) -> Result<u64, OutOfBounds> {
        check(offset, bytes, self.bytes)?;
        Ok(self.address() + offset)
    }

    fn address(&self) -> u64 {
        // SAFETY: the region lives; the field is a pointer, of which only the number is used.
        let start = unsafe { (*self.raw.as_ptr()).addr };
        start.addr() as u64
    }

    fn end(&mut self) -> io::Result<()> {
        // Taken: once it is gone, drop has nothing to do.
        let Some(_tally) = self.tally.take() else { return Ok(()) };
        // SAFETY: no work request names the region (each holds it), and `tally` says that it is the first time.
        let code = unsafe { (self.domain.context().library().verbs.ibv_dereg_mr)(self.raw.as_ptr()) };
        if code == 0 { Ok(()) } else { Err(io::Error::from_raw_os_error(code)) }
    }
}

impl Drop for MemoryRegion {
    fn drop(&mut self) {
        if let Err(error) = self.end() {
            tracing::error!(%error, "memory cannot be deregistered from an RDMA device");
            // The device may still reach it: better to keep the memory for ever than to hand it to somebody else.
            std::mem::forget(Arc::clone(&self.mapping));
        }
    }
}

fn refused(device: &str, bytes: u64, error: io::Error) -> RegisterError {
    match error.raw_os_error() {
        Some(libc::ENOMEM) => {
            let limit = getrlimit(Resource::RLIMIT_MEMLOCK).map_or(u64::MAX, |(soft, _)| soft);
            let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
            memlock(limit, &status, bytes).unwrap_or(RegisterError::OutOfMemory(bytes))
        }
        Some(libc::EOPNOTSUPP) => RegisterError::OnDemandUnsupported(device.to_owned()),
        _ => RegisterError::Failed { device: device.to_owned(), bytes, error },
    }
}

/// Whether it was the limit of locked memory, from what `/proc/self/status` says.
fn memlock(limit: u64, status: &str, needed: u64) -> Option<RegisterError> {
    let field = |name: &str| status.lines().find_map(|line| line.strip_prefix(name)).map(str::trim);
    let capabilities = field("CapEff:").and_then(|set| u64::from_str_radix(set, 16).ok()).unwrap_or(0);
    let pinned = field("VmPin:").and_then(|text| text.split(' ').next()?.parse::<u64>().ok()).unwrap_or(0) * 1024;
    let over = pinned.checked_add(needed).is_none_or(|sum| sum > limit);
    let bound = capabilities & (1 << CAP_IPC_LOCK) == 0;
    (bound && over).then_some(RegisterError::MemlockTooLow { limit, pinned, needed })
}

#[cfg(test)]
mod tests {
    use super::*;
    use nix::sys::memfd::{MFdFlags, memfd_create};
    use std::os::fd::{AsFd as _, OwnedFd};

    fn memfd(bytes: i64, seals: SealFlag) -> OwnedFd {
        let fd = memfd_create("limosa-test", MFdFlags::MFD_CLOEXEC | MFdFlags::MFD_ALLOW_SEALING).unwrap();
        nix::unistd::ftruncate(&fd, bytes).unwrap();
        fcntl(&fd, FcntlArg::F_ADD_SEALS(seals)).unwrap();
        fd
    }

    #[test]
    fn a_mapping_and_its_file_are_the_same_bytes() {
        let fd = memfd(3 * 4096, SealFlag::F_SEAL_SHRINK);
        let mapping = Mapping::of_file(fd.as_fd(), 4096, 8192).unwrap();
        let text = b"nineteen bytes long";
        mapping.write_at(4090, text).unwrap();
        let mut seen = [0; 19];
        assert_eq!(nix::sys::uio::pread(&fd, &mut seen, 4096 + 4090).unwrap(), 19);
        assert_eq!(&seen, text);
        let mut back = [0; 19];
        mapping.read_at(4090, &mut back).unwrap();
        assert_eq!(&back, text);
    }

    #[test]
    fn a_mapping_has_bounds() {
        let mapping = Mapping::anonymous(1).unwrap();
        assert_eq!(mapping.bytes(), 4096);
        mapping.write_at(4095, b"x").unwrap();
        assert_eq!(mapping.write_at(4095, b"xy"), Err(OutOfBounds { offset: 4095, bytes: 2, size: 4096 }));
        assert!(mapping.read_at(u64::MAX, &mut [0; 2]).is_err());
        mapping.read_at(4096, &mut []).unwrap();
        assert!(Mapping::anonymous(0).is_err() && Mapping::anonymous(u64::MAX).is_err());
    }

    #[test]
    fn only_sealed_files_of_enough_whole_pages_are_mapped() {
        let loose = memfd(8192, SealFlag::F_SEAL_GROW);
        assert!(matches!(Mapping::of_file(loose.as_fd(), 0, 4096), Err(MapError::NotSealed)));
        let null = std::fs::File::open("/dev/null").unwrap();
        assert!(matches!(Mapping::of_file(null.as_fd(), 0, 4096), Err(MapError::NotSealed)));
        let fd = memfd(8192, SealFlag::F_SEAL_SHRINK);
        let of = |offset, bytes| Mapping::of_file(fd.as_fd(), offset, bytes);
        assert!(matches!(of(4096, 8192), Err(MapError::TooShort { file: 8192, .. })));
        assert!(matches!(of(u64::MAX - 4095, 4096), Err(MapError::TooShort { .. })));
        assert!(matches!(of(100, 4096), Err(MapError::NotWholePages { .. })));
        assert!(matches!(of(0, 100), Err(MapError::NotWholePages { .. })));
        assert!(matches!(of(0, 0), Err(MapError::NotWholePages { .. })));
    }

    #[test]
    fn too_little_lockable_memory_is_said_with_all_numbers_and_the_line_to_set() {
        let status = "VmPeak:\t 100 kB\nVmPin:\t    4096 kB\nCapEff:\t0000000000000000\n";
        let error = memlock(8 << 20, status, 64 << 20).unwrap().to_string();
        for part in ["8192 KiB", "4096 KiB", "65536 KiB", "LimitMEMLOCK=infinity", "memlock unlimited"] {
            assert!(error.contains(part), "{part} is not in: {error}");
        }
    }

    #[test]
    fn the_limit_is_not_blamed_where_it_does_not_bind() {
        let free = "VmPin:\t0 kB\nCapEff:\t0000000000004000\n";
        assert!(memlock(8 << 20, free, 64 << 20).is_none(), "CAP_IPC_LOCK is above the limit");
        let bound = "VmPin:\t0 kB\nCapEff:\t0000000000000000\n";
        assert!(memlock(8 << 20, bound, 4 << 20).is_none(), "there was room");
        assert!(memlock(u64::MAX, bound, 4 << 20).is_none(), "there is no limit");
    }

    #[test]
    fn access_bits_are_those_of_the_header() {
        use rdma_sys::ibv_access_flags as flags;
        let remote = Access { remote_write: true, ..Access::default() };
        assert_eq!(remote.bits(), flags::IBV_ACCESS_LOCAL_WRITE.0 | flags::IBV_ACCESS_REMOTE_WRITE.0);
        let all = Access { local_write: true, remote_write: true, on_demand: true, relaxed_ordering: true };
        assert_eq!(all.bits(), remote.bits() | flags::IBV_ACCESS_ON_DEMAND.0 | flags::IBV_ACCESS_RELAXED_ORDERING.0);
        assert_eq!(Access::default().bits(), 0);
    }

    #[test]
    fn keys_are_not_shown() {
        let key = RemoteKey { address: 0x7f12_3456_7000, rkey: 4711 };
        assert_eq!(format!("{key:?}"), "RemoteKey(…)");
        assert_eq!(key.at(4096).address, 0x7f12_3456_8000);
    }
}
