//! Which pages of guest memory were written: the log of KVM and the writes of the VMM, merged. Not the policy of rounds.

mod log;

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use kvm_ioctls::VmFd;
use vm_memory::GuestMemoryBackend;

use crate::memory::{self, Ram};
use log::DirtyLog;

/// Why dirty pages could not be tracked or read.
#[derive(Debug, thiserror::Error)]
pub enum DirtyError {
    /// Tracking was not started.
    #[error("dirty tracking is off: call start_dirty_tracking first")]
    Off,
    /// The caller's bitmaps do not fit the machine's regions.
    #[error("bitmap {region} has {given} words, but the region needs {needed}")]
    Bitmap {
        /// Index of the region, or the number of regions if bitmaps are missing.
        region: usize,
        /// Words given.
        given: usize,
        /// Words needed.
        needed: usize,
    },
    /// KVM refused.
    #[error("{what} for memory slot {slot} failed: {source}")]
    Kvm {
        /// The ioctl.
        what: &'static str,
        /// The memslot, which is the region's index.
        slot: u32,
        /// The error of the kernel.
        source: kvm_ioctls::Error,
    },
}

/// The tracker of one machine.
///
/// Whoever fetches owns the bits: a page that was reported is not reported again until it is written again.
#[derive(Debug)]
pub(crate) struct DirtyTracker {
    ram: Arc<Ram>,
    log: DirtyLog,
    on: Mutex<bool>,
}

impl DirtyTracker {
    /// Maps `ram` into `vm` as memslots, and readies the log. `manual` are the flags of KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2.
    pub(crate) fn new(vm: Arc<VmFd>, ram: Arc<Ram>, manual: u32) -> Result<Self, DirtyError> {
        let log = DirtyLog::new(vm, Arc::clone(&ram), manual)?;
        Ok(Self { ram, log, on: Mutex::new(false) })
    }

    fn lock(&self) -> MutexGuard<'_, bool> {
        self.on.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Pages written after this returns are reported by `fetch`. Idempotent: a second start forgets nothing.
    pub(crate) fn start(&self) -> Result<(), DirtyError> {
        let mut on = self.lock();
        if *on {
            return Ok(());
        }
        // Links pin the pages that they send: from now on no page is replaced by a hole.
        self.ram.hold_back(true);
        for region in self.ram.guest().iter() {
            memory::take_vmm_writes(region);
        }
        self.log.start().inspect_err(|_| self.ram.hold_back(false))?;
        *on = true;
        Ok(())
    }

    /// Stops tracking. Changes memslots, which stalls vCPUs for a moment: not for the time of a downtime.
    pub(crate) fn stop(&self) -> Result<(), DirtyError> {
        let mut on = self.lock();
        if *on {
            self.log.stop()?;
            self.ram.hold_back(false);
            *on = false;
        }
        Ok(())
    }

    /// Calls `sink` with the words of each region that may have dirty pages: `(region, first word, words)`.
    pub(crate) fn fetch(&self, sink: &mut dyn FnMut(usize, usize, &[u64])) -> Result<(), DirtyError> {
        let on = self.lock();
        if !*on {
            return Err(DirtyError::Off);
        }
        for (index, region) in self.ram.guest().iter().enumerate() {
            // A failure leaves this region's VMM writes in their bitmap and KVM's in its log: nothing is lost.
            let mut words = self.log.fetch(index)?;
            for (word, ours) in words.iter_mut().zip(memory::take_vmm_writes(region)) {
                *word |= ours;
            }
            sink(index, 0, &words);
        }
        Ok(())
    }

    /// ORs the dirty pages into `bitmaps`, one for each region, a word for 64 pages. Returns how many pages were dirty.
    pub(crate) fn fetch_into(&self, bitmaps: &[&[AtomicU64]]) -> Result<u64, DirtyError> {
        let regions = self.ram.regions();
        if bitmaps.len() != regions.len() {
            return Err(DirtyError::Bitmap { region: regions.len(), given: bitmaps.len(), needed: regions.len() });
        }
        for (index, (region, bitmap)) in regions.iter().zip(bitmaps).enumerate() {
            let needed = usize::try_from(region.bytes.div_ceil(memory::PAGE_BYTES * 64)).unwrap_or(usize::MAX);
            if bitmap.len() < needed {
                return Err(DirtyError::Bitmap { region: index, given: bitmap.len(), needed });
            }
        }
        let mut pages = 0;
        self.fetch(&mut |index, first, words| {
            let Some(bitmap) = bitmaps.get(index).and_then(|bitmap| bitmap.get(first..)) else { return };
            for (shared, word) in bitmap.iter().zip(words).filter(|(_, word)| **word != 0) {
                shared.fetch_or(*word, Ordering::AcqRel);
                pages += u64::from(word.count_ones());
            }
        })?;
        Ok(pages)
    }
}
