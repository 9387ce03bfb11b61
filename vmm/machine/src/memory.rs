//! Guest memory: memfd regions that the VMM maps and can hand to others. Not memslots, nor the dirty log.
//!
//! Soundness: all access by the VMM goes through vm-memory's volatile slices, which check bounds; the guest and
//! other processes write the same pages at any time, so nothing here ever makes a Rust reference into them.
//! The mappings live as long as the `Ram`, and the KVM VM that was given them is dropped first or keeps it alive.

use std::fs::File;
use std::num::NonZeroUsize;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::{Arc, Mutex, PoisonError};

use nix::fcntl::{FallocateFlags, FcntlArg, SealFlag, fallocate, fcntl};
use nix::sys::memfd::{MFdFlags, memfd_create};
use nix::sys::mman::{MmapAdvise, madvise};
use vm_memory::bitmap::AtomicBitmap;
use vm_memory::{
    Address, FileOffset, GuestAddress, GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion, GuestRegionMmap, MmapRegion,
};

/// The unit of dirty tracking and the base page size, in bytes.
pub const PAGE_BYTES: u64 = 4096;
/// RAM below this address is the first region; devices lie between it and 4 GiB.
pub(crate) const LOW_RAM_END: u64 = 3 << 30;
/// RAM that does not fit below goes here.
pub(crate) const HIGH_RAM_START: u64 = 4 << 30;
/// 16 TiB: more than any host has, little enough that no sum overflows.
const RAM_BYTES_MAX: u64 = 16 << 40;
/// A machine has at least 2 MiB: kernels are loaded at 1 MiB.
const RAM_BYTES_MIN: u64 = 2 << 20;
const HUGE_BYTES: u64 = 2 << 20;

/// Guest memory as vm-memory sees it; writes of the VMM mark the bitmap.
pub(crate) type GuestRam = GuestMemoryMmap<AtomicBitmap>;

/// The size of the pages that back guest memory on this host.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PageSize {
    /// 4 KiB pages of a memfd.
    Base,
    /// 2 MiB pages of hugetlbfs; they must have been reserved by the operator.
    Huge2M,
}

impl PageSize {
    /// Bytes in one page.
    pub fn bytes(self) -> u64 {
        match self {
            Self::Base => PAGE_BYTES,
            Self::Huge2M => HUGE_BYTES,
        }
    }
}

/// When guest memory gets its pages.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Populate {
    /// At first touch; or by [`crate::Machine::populate`] at a time that suits.
    No,
    /// While the machine is built.
    Now,
}

/// The guest's memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MemoryConfig {
    /// Size in bytes, a multiple of the page size, at least 2 MiB.
    pub bytes: u64,
    /// What backs it.
    pub page_size: PageSize,
    /// When pages are made.
    pub populate: Populate,
    /// Ask for transparent huge pages. Measure before use: on some hosts they make first touch five times dearer.
    pub thp: bool,
}

impl MemoryConfig {
    /// `bytes` of memory on base pages, populated at first touch, without transparent huge pages.
    pub fn new(bytes: u64) -> Self {
        Self { bytes, page_size: PageSize::Base, populate: Populate::No, thp: false }
    }
}

/// Why guest memory could not be made.
#[derive(Debug, thiserror::Error)]
pub enum MemoryError {
    /// The size is no multiple of the page size, or out of bounds.
    #[error("guest memory of {bytes} bytes is refused: it must be a multiple of {page_bytes}, from 2 MiB to 16 TiB")]
    Size {
        /// What was asked for.
        bytes: u64,
        /// What it must be a multiple of.
        page_bytes: u64,
    },
    /// The kernel refused the memory.
    #[error("{what} for guest memory region {region} failed: {reason}{hint}")]
    Refused {
        /// The step that failed.
        what: &'static str,
        /// Index of the region.
        region: usize,
        /// What the kernel said.
        reason: String,
        /// What to do about it.
        hint: &'static str,
    },
}

/// One region of guest memory, as others may map it.
#[derive(Clone, Copy, Debug)]
pub struct RegionInfo<'a> {
    /// Guest physical address of the first byte.
    pub gpa: u64,
    /// Size in bytes, a multiple of 4 KiB.
    pub bytes: u64,
    /// Size of the pages behind it.
    pub page_size: PageSize,
    /// The memfd; map it shared.
    pub fd: BorrowedFd<'a>,
    /// Where the region starts in the memfd, in bytes.
    pub fd_offset: u64,
}

/// The guest's RAM.
#[derive(Debug)]
pub(crate) struct Ram {
    guest: GuestRam,
    files: Vec<Arc<File>>,
    page_size: PageSize,
    /// Pages that the guest does not need stay where they are.
    held_back: Mutex<bool>,
}

/// `(gpa, bytes)` of each region for a machine with so much memory.
pub(crate) fn layout(config: &MemoryConfig) -> Result<Vec<(u64, u64)>, MemoryError> {
    let page_bytes = config.page_size.bytes();
    if !config.bytes.is_multiple_of(page_bytes) || !(RAM_BYTES_MIN..=RAM_BYTES_MAX).contains(&config.bytes) {
        return Err(MemoryError::Size { bytes: config.bytes, page_bytes });
    }
    let low = config.bytes.min(LOW_RAM_END);
    let mut regions = vec![(0, low)];
    if config.bytes > low {
        regions.push((HIGH_RAM_START, config.bytes - low));
    }
    Ok(regions)
}

impl Ram {
    /// Makes and maps the regions of `config`.
    pub(crate) fn new(config: &MemoryConfig) -> Result<Self, MemoryError> {
        let mut regions = Vec::new();
        let mut files = Vec::new();
        for (index, (gpa, bytes)) in layout(config)?.into_iter().enumerate() {
            let file = Arc::new(make_memfd(index, bytes, config.page_size)?);
            regions.push(map(index, gpa, bytes, &file, config)?);
            files.push(file);
        }
        let guest = GuestRam::from_regions(regions).map_err(|error| refused("arranging regions", 0, &error, ""))?;
        let ram = Self { guest, files, page_size: config.page_size, held_back: Mutex::new(false) };
        if config.populate == Populate::Now {
            ram.populate()?;
        }
        Ok(ram)
    }

    /// The memory for reads and writes by the VMM.
    pub(crate) fn guest(&self) -> &GuestRam {
        &self.guest
    }

    /// The regions with their memfds, in order of address; a region's index is its memslot's number.
    pub(crate) fn regions(&self) -> Vec<RegionInfo<'_>> {
        let infos = self.guest.iter().zip(&self.files).map(|(region, file)| RegionInfo {
            gpa: region.start_addr().raw_value(),
            bytes: region.len(),
            page_size: self.page_size,
            fd: file.as_fd(),
            fd_offset: 0,
        });
        infos.collect()
    }

    /// Gives every page of guest memory its backing now, by several threads; contents stay as they are.
    pub(crate) fn populate(&self) -> Result<(), MemoryError> {
        let threads = std::thread::available_parallelism().map_or(1, NonZeroUsize::get).min(8);
        for (index, region) in self.guest.iter().enumerate() {
            let bytes = region.size();
            let share = bytes.div_ceil(threads).next_multiple_of(HUGE_BYTES as usize);
            let results: Vec<Result<(), MemoryError>> = std::thread::scope(|scope| {
                let starts = (0..bytes).step_by(share.max(1));
                let workers: Vec<_> = starts
                    .map(|start| scope.spawn(move || populate_part(index, region, start, share.min(bytes - start))))
                    .collect();
                workers.into_iter().map(|worker| worker.join().unwrap_or(Ok(()))).collect()
            });
            results.into_iter().collect::<Result<(), _>>()?;
        }
        Ok(())
    }
}

impl Ram {
    /// Gives the whole pages within `bytes` from `gpa` on back to the host; they read as zeros until they are written. What
    /// is not all in one region of RAM is left alone, and so is everything while [`Self::hold_back`] says so.
    pub(crate) fn give_back(&self, gpa: u64, bytes: u64) {
        let held_back = self.held_back.lock().unwrap_or_else(PoisonError::into_inner);
        let page_bytes = self.page_size.bytes();
        let Some(end) = gpa.checked_add(bytes).filter(|_| !*held_back) else { return };
        for (region, file) in self.guest.iter().zip(&self.files) {
            let (first, bytes) = (region.start_addr().raw_value(), region.len());
            let Some(start) = gpa.checked_sub(first).filter(|start| *start < bytes && end - first <= bytes) else { continue };
            let (start, end) = (start.next_multiple_of(page_bytes), (end - first) / page_bytes * page_bytes);
            let (Ok(at), Ok(length)) = (i64::try_from(start), i64::try_from(end.saturating_sub(start))) else { return };
            if length == 0 {
                return;
            }
            let flags = FallocateFlags::FALLOC_FL_PUNCH_HOLE | FallocateFlags::FALLOC_FL_KEEP_SIZE;
            if let Err(error) = fallocate(file, flags, at, length) {
                tracing::debug!(gpa, bytes, %error, "free pages not given back");
            }
        }
    }

    /// From the return of this on, [`Self::give_back`] leaves pages where they are (`true`), or not any more (`false`).
    pub(crate) fn hold_back(&self, hold: bool) {
        *self.held_back.lock().unwrap_or_else(PoisonError::into_inner) = hold;
    }
}

fn refused(what: &'static str, region: usize, reason: &dyn std::fmt::Display, hint: &'static str) -> MemoryError {
    MemoryError::Refused { what, region, reason: reason.to_string(), hint }
}

fn make_memfd(index: usize, bytes: u64, page_size: PageSize) -> Result<File, MemoryError> {
    let (flags, hint) = match page_size {
        PageSize::Base => (MFdFlags::MFD_CLOEXEC, ""),
        PageSize::Huge2M => (
            MFdFlags::MFD_CLOEXEC | MFdFlags::MFD_HUGETLB | MFdFlags::MFD_HUGE_2MB,
            "; are enough 2 MiB pages reserved (/proc/sys/vm/nr_hugepages)?",
        ),
    };
    let flags = flags | MFdFlags::MFD_ALLOW_SEALING;
    let fd = memfd_create("limosa-guest-memory", flags).map_err(|error| refused("memfd_create", index, &error, hint))?;
    let file = File::from(fd);
    file.set_len(bytes).map_err(|error| refused("ftruncate", index, &error, hint))?;
    // Who maps this memory must never meet SIGBUS because its size changed; the plug takes no memfd without the seal.
    let seals = FcntlArg::F_ADD_SEALS(SealFlag::F_SEAL_SHRINK | SealFlag::F_SEAL_GROW);
    fcntl(&file, seals).map_err(|error| refused("sealing", index, &error, hint))?;
    Ok(file)
}

fn map(
    index: usize,
    gpa: u64,
    bytes: u64,
    file: &Arc<File>,
    config: &MemoryConfig,
) -> Result<GuestRegionMmap<AtomicBitmap>, MemoryError> {
    // Huge pages are reserved at mmap, so that a host that lacks them says so here and not by SIGBUS later.
    let (flags, hint) = match config.page_size {
        PageSize::Base => (libc::MAP_SHARED | libc::MAP_NORESERVE, ""),
        PageSize::Huge2M => (libc::MAP_SHARED, "; are enough 2 MiB pages reserved (/proc/sys/vm/nr_hugepages)?"),
    };
    let size = usize::try_from(bytes).map_err(|error| refused("mmap", index, &error, ""))?;
    let offset = FileOffset::from_arc(Arc::clone(file), 0);
    let region = MmapRegion::<AtomicBitmap>::build(Some(offset), size, libc::PROT_READ | libc::PROT_WRITE, flags)
        .map_err(|error| refused("mmap", index, &error, hint))?;
    let pointer = std::ptr::NonNull::new(region.as_ptr().cast()).ok_or_else(|| refused("mmap", index, &"null", ""))?;
    let mut advice = vec![MmapAdvise::MADV_DONTDUMP];
    if config.page_size == PageSize::Base {
        advice.push(if config.thp { MmapAdvise::MADV_HUGEPAGE } else { MmapAdvise::MADV_NOHUGEPAGE });
    }
    for advise in advice {
        // SAFETY: the range is exactly the mapping made above; none of these advices changes its contents.
        let done = unsafe { madvise(pointer, size, advise) };
        if let Err(error) = done {
            // A kernel without transparent huge pages refuses the advice, and then has nothing to turn off.
            tracing::debug!(?advise, %error, "advice about guest memory not taken");
        }
    }
    GuestRegionMmap::new(region, GuestAddress(gpa)).ok_or_else(|| refused("placing", index, &"address overflow", ""))
}

fn populate_part(index: usize, region: &GuestRegionMmap<AtomicBitmap>, start: usize, bytes: usize) -> Result<(), MemoryError> {
    let base = region.as_ptr().wrapping_add(start);
    let pointer = std::ptr::NonNull::new(base.cast()).ok_or_else(|| refused("populating", index, &"null", ""))?;
    // SAFETY: `start + bytes` is within the region's mapping, and populating leaves contents as they are.
    let done = unsafe { madvise(pointer, bytes, MmapAdvise::MADV_POPULATE_WRITE) };
    done.map_err(|error| refused("populating", index, &error, "; is there enough free memory on this host?"))
}

/// Takes the pages that the VMM itself wrote since the last call, as words of 64 pages.
pub(crate) fn take_vmm_writes(region: &GuestRegionMmap<AtomicBitmap>) -> Vec<u64> {
    region.get_mmap().bitmap().get_and_reset()
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::panic)]
    use super::*;
    use vm_memory::Bytes;

    #[test]
    fn layout_leaves_the_device_hole() {
        let small = MemoryConfig::new(64 << 20);
        assert_eq!(layout(&small).unwrap(), vec![(0, 64 << 20)]);
        let large = MemoryConfig::new(5 << 30);
        assert_eq!(layout(&large).unwrap(), vec![(0, 3 << 30), (4 << 30, 2 << 30)]);
        for bytes in [0, 4096, (2 << 20) + 1, (16 << 40) + 4096] {
            assert!(layout(&MemoryConfig::new(bytes)).is_err(), "{bytes}");
        }
        let odd_huge = MemoryConfig { page_size: PageSize::Huge2M, ..MemoryConfig::new((4 << 20) + 4096) };
        assert!(layout(&odd_huge).is_err());
    }

    #[test]
    fn vmm_writes_are_seen_once() {
        let ram = Ram::new(&MemoryConfig::new(4 << 20)).unwrap();
        ram.guest().write_slice(&[1; 5000], GuestAddress(70 * 4096 + 4000)).unwrap();
        ram.guest().store(7_u16, GuestAddress(8), std::sync::atomic::Ordering::Release).unwrap();
        let region = ram.guest().iter().next().unwrap();
        let words = take_vmm_writes(region);
        assert_eq!(words.len(), 1024 / 64);
        assert_eq!((words[0], words[1]), (1, 0b111 << 6));
        assert!(take_vmm_writes(region).iter().all(|word| *word == 0));
    }

    #[test]
    fn populate_makes_pages_and_keeps_contents() {
        let ram = Ram::new(&MemoryConfig { populate: Populate::Now, ..MemoryConfig::new(8 << 20) }).unwrap();
        ram.guest().write_slice(b"kept", GuestAddress(5 << 20)).unwrap();
        ram.populate().unwrap();
        let mut back = [0; 4];
        ram.guest().read_slice(&mut back, GuestAddress(5 << 20)).unwrap();
        assert_eq!(&back, b"kept");
        let blocks = nix::sys::stat::fstat(&ram.files[0]).unwrap().st_blocks;
        assert_eq!(blocks * 512, 8 << 20);
    }
}
