//! The shape of guest memory: regions, and pages numbered from zero across all of them.
//! It holds no memory and maps nothing; `vmm/plug` does.

use serde::{Deserialize, Serialize};

/// Bytes in one page of the protocol. Larger backing pages are moved as runs of these.
pub const PAGE_BYTES: u64 = 4096;
/// Pages that one word of a dirty bitmap stands for.
pub const PAGES_PER_WORD: u64 = 64;
/// Regions one guest may have. Real machines have 2 to 10; the bound keeps a peer's list small.
pub const REGIONS_MAX: usize = 64;
/// Largest guest memory: 16 TiB. Its dirty bitmap is 512 MiB, the most that an agent may be asked to hold.
pub const MEMORY_BYTES_MAX: u64 = 16 << 40;

/// A guest physical address in bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct Gpa(pub u64);

/// One contiguous piece of guest RAM.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Region {
    /// Where the guest sees its first byte; a multiple of 4 KiB.
    pub gpa: Gpa,
    /// Length in bytes; a multiple of 4 KiB, not zero.
    pub bytes: u64,
    /// Size of the pages that back it on its host: 4096 or a larger power of two.
    pub page_bytes: u64,
}

/// Consecutive pages, numbered as in [`MemoryMap`]; never across the end of a region once validated.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct PageRange {
    /// Number of the first page.
    pub first: u64,
    /// How many pages; at least 1.
    pub count: u64,
}

impl PageRange {
    /// The number after the last page.
    #[must_use]
    pub fn end(self) -> u64 {
        self.first.saturating_add(self.count)
    }

    /// Length in bytes.
    #[must_use]
    pub fn bytes(self) -> u64 {
        self.count.saturating_mul(PAGE_BYTES)
    }
}

/// Why a list of regions is not a guest's memory.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum MapError {
    /// No region at all, or too many.
    #[error("a guest has 1 to {REGIONS_MAX} memory regions, not {0}")]
    Count(usize),
    /// A region that is empty, unaligned or beyond the address space.
    #[error("memory region {index} ({bytes} bytes at {gpa:#x}) must be a whole number of 4 KiB pages inside 52 bits of address")]
    Shape {
        /// Which region, from zero.
        index: usize,
        /// Its first address.
        gpa: u64,
        /// Its length.
        bytes: u64,
    },
    /// A backing page size that is no power of two of at least 4 KiB.
    #[error("memory region {index} has backing pages of {page_bytes} bytes; a power of two from 4096 is needed")]
    PageSize {
        /// Which region, from zero.
        index: usize,
        /// What it said.
        page_bytes: u64,
    },
    /// Regions that are not in rising order or that share addresses.
    #[error("memory region {index} begins before the end of the one before it")]
    Overlap {
        /// Which region, from zero.
        index: usize,
    },
    /// More memory than the protocol carries.
    #[error("guest memory is larger than {MEMORY_BYTES_MAX} bytes")]
    TooLarge,
}

/// The regions of a guest, validated: in rising order, apart, page-aligned, bounded.
///
/// Pages are numbered from zero through all regions in order. Each region begins at a number that is a
/// multiple of 64, so that its bits in a dirty bitmap begin with a fresh word; the numbers between the end of a
/// region and the start of the next name no page.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(try_from = "Vec<Region>", into = "Vec<Region>")]
pub struct MemoryMap {
    regions: Vec<Region>,
    firsts: Vec<u64>,
    numbers: u64,
    pages: u64,
}

impl MemoryMap {
    /// Validates `regions`.
    ///
    /// # Errors
    /// Says which region breaks which rule.
    pub fn new(regions: Vec<Region>) -> Result<MemoryMap, MapError> {
        if regions.is_empty() || regions.len() > REGIONS_MAX {
            return Err(MapError::Count(regions.len()));
        }
        let (mut end_before, mut numbers, mut pages) = (0_u64, 0_u64, 0_u64);
        let mut firsts = Vec::with_capacity(regions.len());
        for (index, region) in regions.iter().enumerate() {
            let Region { gpa: Gpa(gpa), bytes, page_bytes } = *region;
            let shape = MapError::Shape { index, gpa, bytes };
            let end = gpa.checked_add(bytes).filter(|end| *end <= 1 << 52).ok_or(shape.clone())?;
            if bytes == 0 || bytes % PAGE_BYTES != 0 || gpa % PAGE_BYTES != 0 {
                return Err(shape);
            }
            if page_bytes < PAGE_BYTES || !page_bytes.is_power_of_two() {
                return Err(MapError::PageSize { index, page_bytes });
            }
            if gpa < end_before {
                return Err(MapError::Overlap { index });
            }
            end_before = end;
            firsts.push(numbers);
            let here = bytes / PAGE_BYTES;
            pages += here;
            numbers += here.next_multiple_of(PAGES_PER_WORD);
            if pages > MEMORY_BYTES_MAX / PAGE_BYTES {
                return Err(MapError::TooLarge);
            }
        }
        Ok(MemoryMap { regions, firsts, numbers, pages })
    }

    /// The regions, in order.
    #[must_use]
    pub fn regions(&self) -> &[Region] {
        &self.regions
    }

    /// Number of the first page of region `index`, if there is such a region.
    #[must_use]
    pub fn first_page(&self, index: usize) -> Option<u64> {
        self.firsts.get(index).copied()
    }

    /// The pages of region `index`, if there is such a region.
    #[must_use]
    pub fn region_range(&self, index: usize) -> Option<PageRange> {
        let first = self.first_page(index)?;
        let count = self.regions.get(index)?.bytes / PAGE_BYTES;
        Some(PageRange { first, count })
    }

    /// One more than the largest number a page can have: the length of a bitmap, a multiple of 64.
    #[must_use]
    pub fn numbers(&self) -> u64 {
        self.numbers
    }

    /// How many pages there are.
    #[must_use]
    pub fn pages(&self) -> u64 {
        self.pages
    }

    /// How many bytes of guest memory there are.
    #[must_use]
    pub fn bytes(&self) -> u64 {
        self.pages * PAGE_BYTES
    }

    /// In which region the whole of `range` lies, and at what byte offset in it; `None` if it is empty, crosses
    /// a region's end or names a page that does not exist.
    #[must_use]
    pub fn locate(&self, range: PageRange) -> Option<(usize, u64)> {
        if range.count == 0 {
            return None;
        }
        let index = self.firsts.partition_point(|first| *first <= range.first).checked_sub(1)?;
        let whole = self.region_range(index)?;
        let end = range.first.checked_add(range.count)?;
        (end <= whole.end()).then(|| (index, (range.first - whole.first) * PAGE_BYTES))
    }

    /// Where the guest sees page `page`, if there is such a page.
    #[must_use]
    pub fn gpa(&self, page: u64) -> Option<Gpa> {
        let (index, offset) = self.locate(PageRange { first: page, count: 1 })?;
        Some(Gpa(self.regions.get(index)?.gpa.0 + offset))
    }
}

impl TryFrom<Vec<Region>> for MemoryMap {
    type Error = MapError;
    fn try_from(regions: Vec<Region>) -> Result<Self, MapError> {
        MemoryMap::new(regions)
    }
}

impl From<MemoryMap> for Vec<Region> {
    fn from(map: MemoryMap) -> Vec<Region> {
        map.regions
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    fn region(gpa: u64, pages: u64) -> Region {
        Region { gpa: Gpa(gpa), bytes: pages * PAGE_BYTES, page_bytes: 4096 }
    }

    #[test]
    fn regions_begin_on_a_fresh_word() {
        let map = MemoryMap::new(vec![region(0, 3), region(1 << 32, 65)]).unwrap();
        assert_eq!((map.first_page(1), map.numbers(), map.pages()), (Some(64), 64 + 128, 68));
        assert_eq!(map.locate(PageRange { first: 2, count: 1 }), Some((0, 8192)));
        assert_eq!(map.locate(PageRange { first: 2, count: 2 }), None);
        assert_eq!(map.locate(PageRange { first: 3, count: 1 }), None);
        assert_eq!(map.gpa(65), Some(Gpa((1 << 32) + 4096)));
        assert_eq!(map.locate(PageRange { first: u64::MAX, count: u64::MAX }), None);
    }

    #[test]
    fn bad_maps_are_named() {
        assert_eq!(MemoryMap::new(vec![]), Err(MapError::Count(0)));
        assert!(matches!(MemoryMap::new(vec![region(0, 0)]), Err(MapError::Shape { index: 0, .. })));
        assert!(matches!(MemoryMap::new(vec![region(u64::MAX - 4095, 1)]), Err(MapError::Shape { .. })));
        assert_eq!(MemoryMap::new(vec![region(0, 2), region(4096, 1)]), Err(MapError::Overlap { index: 1 }));
        let odd = Region { page_bytes: 5000, ..region(0, 1) };
        assert_eq!(MemoryMap::new(vec![odd]), Err(MapError::PageSize { index: 0, page_bytes: 5000 }));
        assert_eq!(MemoryMap::new(vec![region(0, (MEMORY_BYTES_MAX / 4096) + 1)]), Err(MapError::TooLarge));
    }
}
