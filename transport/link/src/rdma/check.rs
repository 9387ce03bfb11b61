//! The page check: a keyed hash of every page, told by the source, compared at the destination with what is in its memory.
//!
//! SipHash-2-4, 64 bits, with a key of 128 bits that only the two hosts know. Who wants to pass a changed page off has one
//! guess in 2^64, and a wrong one aborts the migration. It is chosen for its cost without vector instructions: see
//! `docs/BENCHMARKS.md`. A page that the guest writes while it travels may not fit its hash; it is dirty then, is sent again
//! in a later round, and the later hash clears it.

use limosa_proto::memory::{MemoryMap, PAGE_BYTES, PAGES_PER_WORD, PageRange};
use siphasher::sip::SipHasher24;
use std::hash::Hasher as _;
use std::sync::atomic::{AtomicU64, Ordering};

/// Bytes of one page.
pub(super) const PAGE: usize = PAGE_BYTES as usize;
/// Bytes of one hash.
pub(super) const HASH_BYTES: usize = 8;

/// The key of one attempt of one migration.
#[derive(Clone)]
pub(super) struct PageKey(SipHasher24);

impl std::fmt::Debug for PageKey {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("PageKey(…)")
    }
}

impl PageKey {
    /// The first half of `key`.
    pub(super) fn new(key: &[u8; 32]) -> PageKey {
        let mut half = [0; 16];
        half.iter_mut().zip(key).for_each(|(to, from)| *to = *from);
        PageKey(SipHasher24::new_with_key(&half))
    }

    /// The hash of `page` with these contents in `round`.
    pub(super) fn hash(&self, page: u64, round: u32, bytes: &[u8; PAGE]) -> [u8; HASH_BYTES] {
        let mut hasher = self.0;
        hasher.write(&page.to_le_bytes());
        hasher.write(&u64::from(round).to_le_bytes());
        hasher.write(bytes);
        hasher.finish().to_le_bytes()
    }
}

/// The pages whose last hash did not fit, shared by the lanes without a lock. One bit a page.
#[derive(Debug)]
pub(super) struct Suspects(Vec<AtomicU64>);

impl Suspects {
    pub(super) fn new(map: &MemoryMap) -> Suspects {
        let words = usize::try_from(map.numbers() / PAGES_PER_WORD).unwrap_or(0);
        Suspects(std::iter::repeat_with(AtomicU64::default).take(words).collect())
    }

    /// Notes whether `page` is what it should be.
    pub(super) fn note(&self, page: u64, good: bool) {
        let Some(word) = usize::try_from(page / PAGES_PER_WORD).ok().and_then(|index| self.0.get(index)) else { return };
        let bit = 1 << (page % PAGES_PER_WORD);
        if !good {
            word.fetch_or(bit, Ordering::Relaxed);
        } else if word.load(Ordering::Relaxed) & bit != 0 {
            word.fetch_and(!bit, Ordering::Relaxed);
        }
    }

    /// Clears `range`: its pages were made zero here, so nothing on the way can have changed them.
    pub(super) fn clear(&self, range: PageRange) {
        let end = range.end().min((self.0.len() as u64).saturating_mul(PAGES_PER_WORD));
        let mut page = range.first;
        while page < end {
            let here = (PAGES_PER_WORD - page % PAGES_PER_WORD).min(end - page);
            let mask = if here == PAGES_PER_WORD { u64::MAX } else { ((1 << here) - 1) << (page % PAGES_PER_WORD) };
            if let Some(word) = usize::try_from(page / PAGES_PER_WORD).ok().and_then(|index| self.0.get(index))
                && word.load(Ordering::Relaxed) & mask != 0
            {
                word.fetch_and(!mask, Ordering::Relaxed);
            }
            page += here;
        }
    }

    /// How many there are, and the first one's number.
    pub(super) fn found(&self) -> Option<(u64, u64)> {
        let words = || self.0.iter().map(|word| word.load(Ordering::Relaxed)).zip(0_u64..);
        let (word, index) = words().find(|(word, _)| *word != 0)?;
        let pages = words().map(|(word, _)| u64::from(word.count_ones())).sum();
        Some((pages, index * PAGES_PER_WORD + u64::from(word.trailing_zeros())))
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use limosa_proto::memory::{Gpa, Region};

    #[test]
    fn a_hash_depends_on_all_that_it_is_of() {
        let (key, other) = (PageKey::new(&[1; 32]), PageKey::new(&[2; 32]));
        let mut bytes = [5; PAGE];
        let hash = key.hash(7, 1, &bytes);
        assert_eq!(hash, key.hash(7, 1, &bytes));
        assert!(hash != key.hash(8, 1, &bytes) && hash != key.hash(7, 2, &bytes) && hash != other.hash(7, 1, &bytes));
        for bit in 0..PAGE * 8 {
            bytes[bit / 8] ^= 1 << (bit % 8);
            assert_ne!(hash, key.hash(7, 1, &bytes), "bit {bit}");
            bytes[bit / 8] ^= 1 << (bit % 8);
        }
    }

    #[test]
    fn suspects_are_cleared_by_a_good_hash_or_by_zero() {
        let region = Region { gpa: Gpa(0), bytes: 300 * PAGE_BYTES, page_bytes: 4096 };
        let suspects = Suspects::new(&MemoryMap::new(vec![region]).unwrap());
        assert_eq!(suspects.found(), None);
        for page in [3, 63, 64, 200, 299, 100_000] {
            suspects.note(page, false);
        }
        assert_eq!(suspects.found(), Some((5, 3)));
        suspects.note(3, true);
        suspects.clear(PageRange { first: 60, count: 100 });
        assert_eq!(suspects.found(), Some((2, 200)));
        suspects.clear(PageRange { first: 0, count: u64::MAX });
        assert_eq!(suspects.found(), None);
    }
}
