//! KVM's dirty log: memslots with their flag, get and clear. Not the merge with the VMM's own writes.
//!
//! Soundness: a memslot points at a mapping that `Ram` owns; the log holds the `Ram` and the VM, and a slot is never
//! given a larger size than the mapping. The bitmap given to KVM_CLEAR_DIRTY_LOG has a bit for every page named.

use std::sync::Arc;

use kvm_bindings::{
    KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2, KVM_DIRTY_LOG_INITIALLY_SET, KVM_MEM_LOG_DIRTY_PAGES, KVMIO, kvm_clear_dirty_log,
    kvm_clear_dirty_log__bindgen_ty_1, kvm_enable_cap, kvm_userspace_memory_region,
};
use kvm_ioctls::VmFd;
use vm_memory::{Address, GuestMemoryBackend, GuestMemoryRegion};
use vmm_sys_util::ioctl::ioctl_with_ref;
use vmm_sys_util::ioctl_iowr_nr;

use super::DirtyError;
use crate::memory::{PAGE_BYTES, Ram};

ioctl_iowr_nr!(KVM_CLEAR_DIRTY_LOG, KVMIO, 0xc0, kvm_clear_dirty_log);

/// Pages cleared by one ioctl: 64 MiB. KVM holds its MMU lock for a clear, and vCPUs that fault wait for that lock.
const CLEAR_PAGES_MAX: u64 = 16_384;

/// The memslots and their log.
#[derive(Debug)]
pub(super) struct DirtyLog {
    vm: Arc<VmFd>,
    ram: Arc<Ram>,
    /// Flags in force: 0 is the plain log, whose GET also clears and protects.
    manual: u32,
}

impl DirtyLog {
    pub(super) fn new(vm: Arc<VmFd>, ram: Arc<Ram>, offered: u32) -> Result<Self, DirtyError> {
        let mut log = Self { vm, ram, manual: 0 };
        if offered != 0 {
            let mut cap = kvm_enable_cap { cap: KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2, ..Default::default() };
            cap.args[0] = u64::from(offered);
            match log.vm.enable_cap(&cap) {
                Ok(()) => log.manual = offered,
                Err(error) => tracing::warn!(%error, "manual dirty log protection refused; using the plain dirty log"),
            }
        }
        log.set_flags(0)?;
        Ok(log)
    }

    /// Turns the log on, and makes sure that each page is protected, so that a write from now on is seen.
    pub(super) fn start(&self) -> Result<(), DirtyError> {
        self.set_flags(KVM_MEM_LOG_DIRTY_PAGES)?;
        if self.manual & KVM_DIRTY_LOG_INITIALLY_SET != 0 {
            // Every bit is set and no page is protected yet. The caller sends all pages in its first round anyway, so
            // these bits say nothing; clearing them, in chunks, is what protects the pages. A write before the clear
            // happened before start returned, and so before the caller read the page.
            for (slot, pages) in self.slots() {
                let ones = vec![u64::MAX; words_of(pages.min(CLEAR_PAGES_MAX))];
                let mut first = 0;
                while first < pages {
                    let count = (pages - first).min(CLEAR_PAGES_MAX);
                    self.clear(slot, first, count, ones.get(..words_of(count)).unwrap_or(&ones))?;
                    first += count;
                }
            }
        }
        Ok(())
    }

    pub(super) fn stop(&self) -> Result<(), DirtyError> {
        self.set_flags(0)
    }

    /// The dirty pages of region `index` since the last fetch; their bits are cleared and the pages protected again.
    pub(super) fn fetch(&self, index: usize) -> Result<Vec<u64>, DirtyError> {
        let Some((slot, pages)) = self.slots().into_iter().nth(index) else { return Ok(Vec::new()) };
        let bytes = usize::try_from(pages * PAGE_BYTES).unwrap_or(usize::MAX);
        let words =
            self.vm.get_dirty_log(slot, bytes).map_err(|source| DirtyError::Kvm { what: "KVM_GET_DIRTY_LOG", slot, source })?;
        if self.manual == 0 {
            return Ok(words);
        }
        let chunk_words = words_of(CLEAR_PAGES_MAX);
        for (index, chunk) in words.chunks(chunk_words).enumerate() {
            let first = index as u64 * CLEAR_PAGES_MAX;
            if first < pages && chunk.iter().any(|word| *word != 0) {
                // Exactly the bits that were read are cleared: a page written since then keeps its new bit.
                // A refusal loses nothing: the bits stay set and the pages are reported once more.
                if let Err(error) = self.clear(slot, first, (pages - first).min(CLEAR_PAGES_MAX), chunk) {
                    tracing::warn!(%error, first, "dirty bits not cleared; their pages will be reported again");
                }
            }
        }
        Ok(words)
    }

    /// `(slot, pages)` of every region.
    fn slots(&self) -> Vec<(u32, u64)> {
        (0..).zip(self.ram.guest().iter().map(|region| region.len() / PAGE_BYTES)).collect()
    }

    fn set_flags(&self, flags: u32) -> Result<(), DirtyError> {
        for (slot, region) in (0..).zip(self.ram.guest().iter()) {
            let memslot = kvm_userspace_memory_region {
                slot,
                flags,
                guest_phys_addr: region.start_addr().raw_value(),
                memory_size: region.len(),
                userspace_addr: region.as_ptr() as u64,
            };
            // SAFETY: the range is a mapping of exactly this size, which lives as long as the VM (both are held here).
            let done = unsafe { self.vm.set_user_memory_region(memslot) };
            done.map_err(|source| DirtyError::Kvm { what: "KVM_SET_USER_MEMORY_REGION", slot, source })?;
        }
        Ok(())
    }

    fn clear(&self, slot: u32, first_page: u64, pages: u64, bitmap: &[u64]) -> Result<(), DirtyError> {
        let refused = |source| DirtyError::Kvm { what: "KVM_CLEAR_DIRTY_LOG", slot, source };
        if bitmap.len() < words_of(pages) {
            return Err(refused(kvm_ioctls::Error::new(libc::EINVAL)));
        }
        let request = kvm_clear_dirty_log {
            slot,
            num_pages: u32::try_from(pages).map_err(|_| refused(kvm_ioctls::Error::new(libc::EINVAL)))?,
            first_page,
            __bindgen_anon_1: kvm_clear_dirty_log__bindgen_ty_1 { dirty_bitmap: bitmap.as_ptr().cast_mut().cast() },
        };
        // SAFETY: the kernel only reads the bitmap, which has a bit for each of `pages` (checked above).
        let result = unsafe { ioctl_with_ref(self.vm.as_ref(), KVM_CLEAR_DIRTY_LOG(), &request) };
        if result < 0 { Err(refused(kvm_ioctls::Error::last())) } else { Ok(()) }
    }
}

/// Words of 64 bits for so many pages.
fn words_of(pages: u64) -> usize {
    usize::try_from(pages.div_ceil(64)).unwrap_or(usize::MAX)
}
