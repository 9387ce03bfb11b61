//! The dirty bitmap that a VMM and the agent share: the VMM sets bits, the agent takes them.
//! How the VMM learns what its guest wrote is not here.

use crate::mapping::Mapping;
use crate::memfd;
use limosa_proto::bitmap::PageSet;
use limosa_proto::memory::{MemoryMap, PAGES_PER_WORD};
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::atomic::{AtomicU64, Ordering};

/// One bit for each page number of a [`MemoryMap`], in a memfd mapped by both sides.
#[derive(Debug)]
pub struct DirtyBitmap {
    fd: OwnedFd,
    mapping: Mapping,
    words: usize,
    /// The words in which not every bit names a page, and which bits do.
    partial: Vec<(usize, u64)>,
}

/// Bytes of the bitmap of a guest.
#[must_use]
pub fn bitmap_bytes(map: &MemoryMap) -> u64 {
    map.numbers() / PAGES_PER_WORD * 8
}

impl DirtyBitmap {
    /// A new bitmap with no bit set: the VMM's side.
    ///
    /// # Errors
    /// The system's.
    pub fn create(map: &MemoryMap) -> io::Result<DirtyBitmap> {
        DirtyBitmap::open(memfd::create("limosa-dirty", bitmap_bytes(map))?, map)
    }

    /// Maps the bitmap that the other side made: the agent's side.
    ///
    /// # Errors
    /// No memfd sealed against shrinking, too small for `map`, or the system's.
    pub fn open(fd: OwnedFd, map: &MemoryMap) -> io::Result<DirtyBitmap> {
        let bytes = bitmap_bytes(map);
        memfd::check(fd.as_fd(), bytes)?;
        let mapping = Mapping::new(fd.as_fd(), 0, bytes)?;
        mapping.advise(libc::MADV_DONTDUMP);
        let last_word = |index| {
            let end = map.region_range(index)?.end();
            let bits = end % PAGES_PER_WORD;
            (bits != 0).then_some((usize::try_from(end / PAGES_PER_WORD).ok()?, (1_u64 << bits) - 1))
        };
        let partial = (0..map.regions().len()).filter_map(last_word).collect();
        Ok(DirtyBitmap { fd, mapping, words: usize::try_from(bytes / 8).unwrap_or(0), partial })
    }

    /// The memfd, to be sent to the other side.
    #[must_use]
    pub fn fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }

    /// The words; bit `n % 64` of word `n / 64` is page `n`.
    #[must_use]
    pub fn words(&self) -> &[AtomicU64] {
        let words = self.mapping.words();
        words.get(..self.words).unwrap_or(words)
    }

    /// Sets `bits` of word `index`; a word beyond the end is passed over.
    pub fn or(&self, index: usize, bits: u64) {
        if let Some(word) = self.words().get(index)
            && bits != 0
        {
            word.fetch_or(bits, Ordering::AcqRel);
        }
    }

    /// Sets the bit of `page`.
    pub fn set(&self, page: u64) {
        self.or(usize::try_from(page / PAGES_PER_WORD).unwrap_or(usize::MAX), 1 << (page % PAGES_PER_WORD));
    }

    /// Takes every bit out and returns the pages. Bits that name no page are dropped: a VMM may have set them.
    #[must_use]
    pub fn take(&self) -> PageSet {
        let take = |word: &AtomicU64| if word.load(Ordering::Relaxed) == 0 { 0 } else { word.swap(0, Ordering::AcqRel) };
        let mut words: Vec<u64> = self.words().iter().map(take).collect();
        for (index, mask) in &self.partial {
            if let Some(word) = words.get_mut(*index) {
                *word &= mask;
            }
        }
        PageSet::from_words(words)
    }

    /// Clears every bit.
    pub fn clear(&self) {
        for word in self.words() {
            if word.load(Ordering::Relaxed) != 0 {
                word.store(0, Ordering::Release);
            }
        }
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use limosa_proto::memory::{Gpa, PageRange, Region};

    fn map() -> MemoryMap {
        let region = |gpa, pages: u64| Region { gpa: Gpa(gpa), bytes: pages * 4096, page_bytes: 4096 };
        MemoryMap::new(vec![region(0, 3), region(1 << 32, 64), region(1 << 33, 65)]).unwrap()
    }

    #[test]
    fn what_one_side_sets_the_other_takes_once() {
        let map = map();
        let vmm = DirtyBitmap::create(&map).unwrap();
        let agent = DirtyBitmap::open(vmm.fd().try_clone_to_owned().unwrap(), &map).unwrap();
        vmm.set(1);
        vmm.set(127);
        vmm.or(3, 1);
        vmm.set(u64::MAX);
        let runs: Vec<PageRange> = agent.take().runs().collect();
        let expected = [(1, 1), (127, 1), (192, 1)].map(|(first, count)| PageRange { first, count });
        assert_eq!(runs, expected);
        assert!(agent.take().is_empty());
        vmm.set(2);
        vmm.clear();
        assert!(agent.take().is_empty());
    }

    #[test]
    fn bits_that_name_no_page_are_dropped() {
        let map = map();
        let bitmap = DirtyBitmap::create(&map).unwrap();
        for index in 0..4 {
            bitmap.or(index, u64::MAX);
        }
        assert_eq!(bitmap.take(), PageSet::full(&map));
    }

    #[test]
    fn a_bitmap_that_is_too_small_is_refused() {
        let small = memfd::create("limosa-test", 24).unwrap();
        assert!(DirtyBitmap::open(small, &map()).unwrap_err().to_string().contains("32 are needed"));
    }

    #[test]
    fn nothing_is_lost_between_setter_and_taker() {
        let map = MemoryMap::new(vec![Region { gpa: Gpa(0), bytes: 4096 * 4096, page_bytes: 4096 }]).unwrap();
        let bitmap = DirtyBitmap::create(&map).unwrap();
        let mut seen = PageSet::empty(&map);
        std::thread::scope(|scope| {
            let setter = scope.spawn(|| (0..4096).for_each(|page| bitmap.set(page)));
            while !setter.is_finished() {
                seen.union(&bitmap.take());
            }
        });
        seen.union(&bitmap.take());
        assert_eq!(seen.count(), 4096);
    }
}
