//! A set of pages as a bitmap: what a round has to send, what the guest has written since.
//! One bit a page, numbered as in [`MemoryMap`]. Not shared memory: `vmm/plug` has that.

use crate::memory::{MemoryMap, PAGES_PER_WORD, PageRange};

/// A set of page numbers below a fixed bound.
#[derive(Clone, PartialEq, Eq, Hash, Default)]
pub struct PageSet {
    words: Vec<u64>,
}

impl std::fmt::Debug for PageSet {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "PageSet({} of {})", self.count(), self.words.len() as u64 * PAGES_PER_WORD)
    }
}

impl PageSet {
    /// The empty set over the numbers of `map`.
    #[must_use]
    pub fn empty(map: &MemoryMap) -> PageSet {
        PageSet { words: vec![0; usize::try_from(map.numbers() / PAGES_PER_WORD).unwrap_or(usize::MAX)] }
    }

    /// Every page of `map`.
    #[must_use]
    pub fn full(map: &MemoryMap) -> PageSet {
        let mut set = PageSet::empty(map);
        for index in 0..map.regions().len() {
            if let Some(range) = map.region_range(index) {
                set.insert(range);
            }
        }
        set
    }

    /// A set from bitmap words, the lowest bit of the first word being page 0.
    #[must_use]
    pub fn from_words(words: Vec<u64>) -> PageSet {
        PageSet { words }
    }

    /// The bitmap's words.
    #[must_use]
    pub fn words(&self) -> &[u64] {
        &self.words
    }

    /// The bitmap's words, to be filled in place.
    pub fn words_mut(&mut self) -> &mut [u64] {
        &mut self.words
    }

    /// How many pages are in the set.
    #[must_use]
    pub fn count(&self) -> u64 {
        self.words.iter().map(|word| u64::from(word.count_ones())).sum()
    }

    /// Whether there is no page in the set.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.words.iter().all(|word| *word == 0)
    }

    /// Whether `page` is in the set.
    #[must_use]
    pub fn contains(&self, page: u64) -> bool {
        let word = usize::try_from(page / PAGES_PER_WORD).ok().and_then(|index| self.words.get(index));
        word.is_some_and(|word| word >> (page % PAGES_PER_WORD) & 1 == 1)
    }

    /// Adds the pages of `range`; numbers beyond the bound are left out.
    pub fn insert(&mut self, range: PageRange) {
        self.masks(range, |word, mask| *word |= mask);
    }

    /// Takes the pages of `range` out.
    pub fn remove(&mut self, range: PageRange) {
        self.masks(range, |word, mask| *word &= !mask);
    }

    /// Adds every page of `other`.
    pub fn union(&mut self, other: &PageSet) {
        for (word, more) in self.words.iter_mut().zip(&other.words) {
            *word |= more;
        }
    }

    /// Takes every page of `other` out.
    pub fn subtract(&mut self, other: &PageSet) {
        for (word, less) in self.words.iter_mut().zip(&other.words) {
            *word &= !less;
        }
    }

    /// Empties this set and returns what was in it.
    #[must_use]
    pub fn take(&mut self) -> PageSet {
        let words = vec![0; self.words.len()];
        PageSet { words: std::mem::replace(&mut self.words, words) }
    }

    /// The runs of consecutive page numbers, rising. Numbers run on from a region of a whole number of words into the
    /// next, so a run can cross from one region into another: whoever needs memory that lies together cuts it there.
    #[must_use]
    pub fn runs(&self) -> Runs<'_> {
        Runs { words: &self.words, next: 0 }
    }

    fn masks(&mut self, range: PageRange, mut apply: impl FnMut(&mut u64, u64)) {
        let end = range.end().min(self.words.len() as u64 * PAGES_PER_WORD);
        let mut page = range.first;
        while page < end {
            let (index, bit) = (page / PAGES_PER_WORD, page % PAGES_PER_WORD);
            let here = (PAGES_PER_WORD - bit).min(end - page);
            let mask = if here == PAGES_PER_WORD { u64::MAX } else { ((1 << here) - 1) << bit };
            if let Some(word) = usize::try_from(index).ok().and_then(|index| self.words.get_mut(index)) {
                apply(word, mask);
            }
            page += here;
        }
    }
}

/// Iterator of [`PageSet::runs`].
#[derive(Debug, Clone)]
pub struct Runs<'a> {
    words: &'a [u64],
    next: u64,
}

impl Runs<'_> {
    /// First number at or after `from` whose bit, flipped by `flip`, is set; the bound if there is none.
    fn seek(&self, from: u64, flip: u64) -> u64 {
        let bound = self.words.len() as u64 * PAGES_PER_WORD;
        let mut page = from;
        while page < bound {
            let Some(word) = usize::try_from(page / PAGES_PER_WORD).ok().and_then(|index| self.words.get(index)) else { break };
            let rest = (word ^ flip) >> (page % PAGES_PER_WORD);
            if rest != 0 {
                return page + u64::from(rest.trailing_zeros());
            }
            page = (page / PAGES_PER_WORD + 1) * PAGES_PER_WORD;
        }
        bound
    }
}

impl Iterator for Runs<'_> {
    type Item = PageRange;
    fn next(&mut self) -> Option<PageRange> {
        let bound = self.words.len() as u64 * PAGES_PER_WORD;
        let first = self.seek(self.next, 0);
        if first >= bound {
            self.next = bound;
            return None;
        }
        let end = self.seek(first, u64::MAX);
        self.next = end;
        Some(PageRange { first, count: end - first })
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use crate::memory::{Gpa, Region};
    use proptest::prelude::*;

    fn map() -> MemoryMap {
        let region = |gpa, pages: u64| Region { gpa: Gpa(gpa), bytes: pages * 4096, page_bytes: 4096 };
        MemoryMap::new(vec![region(0, 100), region(1 << 32, 300)]).unwrap()
    }

    #[test]
    fn full_has_only_pages_that_exist() {
        let set = PageSet::full(&map());
        assert_eq!(set.count(), 400);
        assert_eq!(set.runs().collect::<Vec<_>>(), [PageRange { first: 0, count: 100 }, PageRange { first: 128, count: 300 }]);
        assert!(!set.contains(100) && set.contains(128) && !set.contains(u64::MAX));
    }

    proptest! {
        #[test]
        fn agrees_with_a_plain_set(ranges in proptest::collection::vec((0_u64..512, 1_u64..200, any::<bool>()), 0..40)) {
            let mut set = PageSet::empty(&map());
            let mut plain = std::collections::BTreeSet::new();
            for (first, count, add) in ranges {
                let range = PageRange { first, count };
                for page in first..(first + count).min(448) {
                    if add { plain.insert(page); } else { plain.remove(&page); }
                }
                if add { set.insert(range) } else { set.remove(range) }
            }
            prop_assert_eq!(set.count(), plain.len() as u64);
            let from_runs: Vec<u64> = set.runs().flat_map(|run| run.first..run.end()).collect();
            prop_assert_eq!(from_runs, plain.into_iter().collect::<Vec<_>>());
            let before = set.clone();
            let taken = set.take();
            prop_assert!(set.is_empty() && taken == before);
        }
    }
}
