//! Guest memory as the lanes see it: the `Pages` trait, walks over sets and runs of pages, what has arrived, population.
//! It maps no memory and makes no system call of its own; the implementor does.

use limosa_proto::memory::{MemoryMap, PAGE_BYTES, PAGES_PER_WORD, PageRange};
use std::io;
use std::os::fd::BorrowedFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

/// The memory of one guest. Every range handed in lies within the map; a range that does not must not crash.
///
/// The guest may write while pages are read: a torn page is dirty again and is sent again.
pub trait Pages: Send + Sync + 'static {
    /// The shape of the memory.
    fn memory_map(&self) -> &MemoryMap;

    /// One `sendmsg` of what is left of `head` followed by the pages of `runs`, the first `done` bytes of that stream
    /// (head first) having been sent already. `more` says that more follows at once (MSG_MORE). Returns bytes sent.
    ///
    /// # Errors
    /// What the socket says.
    fn gather(&self, socket: BorrowedFd<'_>, head: &[u8], runs: &[PageRange], done: u64, more: bool) -> io::Result<usize>;

    /// One `recvmsg` into the pages of `runs`, of which the first `done` bytes are there already, and what is left over
    /// into `tail`. Returns bytes received (pages first); 0 is the end of the stream.
    ///
    /// # Errors
    /// What the socket says.
    fn scatter(&self, socket: BorrowedFd<'_>, runs: &[PageRange], done: u64, tail: &mut [u8]) -> io::Result<usize>;

    /// Copies from byte `offset` of `range` into `out`.
    fn read(&self, range: PageRange, offset: u64, out: &mut [u8]);

    /// Copies `data` to byte `offset` of `range`.
    fn write(&self, range: PageRange, offset: u64, data: &[u8]);

    /// Names every page of `range` once, in order, as runs that are all zero (`true`) or not.
    fn scan(&self, range: PageRange, found: &mut dyn FnMut(PageRange, bool));

    /// Makes `range` read as zeros. Never by giving the memory back: a device that writes it directly would go on writing the
    /// old pages.
    fn zero(&self, range: PageRange);

    /// The parts of `range` that may hold anything but zeros; pages never touched are left out, without touching them. Asked
    /// once for each region.
    fn data_extents(&self, range: PageRange) -> Vec<PageRange>;

    /// The file behind region `index` and the offset of the region's first byte in it, for devices that map it themselves;
    /// `None` where there is none. The file must not shrink.
    fn file(&self, _index: usize) -> Option<(BorrowedFd<'_>, u64)> {
        None
    }

    /// Whether whoever maps that file shall ask the kernel for huge pages: who touches a page first decides how large it is.
    fn huge_pages(&self) -> bool {
        false
    }

    /// Gives every page of `range` real memory, contents unchanged.
    ///
    /// # Errors
    /// No memory, mostly.
    fn populate(&self, range: PageRange) -> io::Result<()>;
}

/// When the destination's memory is given real pages. First touch costs 3 to 5 µs a page, more than the network.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Populate {
    /// All of it before the first page is asked for: the longest preparation, the shortest rounds; zero pages cost memory too.
    Before,
    /// By a thread of its own that runs beside the first round, from the far end towards the lanes.
    #[default]
    Beside,
    /// Not at all: the lanes pay for the first touch; zero pages cost no memory.
    No,
}

impl std::str::FromStr for Populate {
    type Err = String;
    fn from_str(text: &str) -> Result<Populate, String> {
        match text {
            "before" => Ok(Populate::Before),
            "beside" => Ok(Populate::Beside),
            "no" => Ok(Populate::No),
            other => Err(format!("\"{other}\" is no way to populate memory; \"before\", \"beside\" or \"no\" is")),
        }
    }
}

/// Takes pages of `words` (a bitmap) from `cursor` on as runs into `out`, at most `pages` pages and `runs` runs, and moves
/// the cursor behind them. Nothing in `out` afterwards means that the set is used up.
pub(crate) fn next_runs(words: &[u64], cursor: &mut u64, pages: u64, runs: usize, out: &mut Vec<PageRange>) {
    out.clear();
    let mut left = pages;
    while left > 0 && out.len() < runs {
        let Some(first) = seek(words, *cursor, 0) else {
            *cursor = (words.len() as u64).saturating_mul(PAGES_PER_WORD);
            return;
        };
        let bound = (words.len() as u64).saturating_mul(PAGES_PER_WORD);
        let end = seek_until(words, first, u64::MAX, first.saturating_add(left))
            .unwrap_or(bound)
            .min(first.saturating_add(left))
            .min(bound);
        let count = end - first;
        out.push(PageRange { first, count });
        left -= count;
        *cursor = end;
    }
}

fn seek(words: &[u64], from: u64, flip: u64) -> Option<u64> {
    seek_until(words, from, flip, u64::MAX)
}

/// First number at or after `from` whose bit, flipped, is set; the search may stop at `until`.
fn seek_until(words: &[u64], from: u64, flip: u64, until: u64) -> Option<u64> {
    let mut page = from;
    while page < until {
        let word = usize::try_from(page / PAGES_PER_WORD).ok().and_then(|index| words.get(index))?;
        let rest = (word ^ flip) >> (page % PAGES_PER_WORD);
        if rest != 0 {
            return Some(page + u64::from(rest.trailing_zeros()));
        }
        page = (page / PAGES_PER_WORD + 1) * PAGES_PER_WORD;
    }
    Some(until)
}

/// Cuts `run` where a region of `map` ends: numbers go on through regions, memory does not.
pub(crate) fn by_region(map: &MemoryMap, run: PageRange, mut each: impl FnMut(PageRange)) {
    if map.locate(run).is_some() {
        return each(run);
    }
    for index in 0..map.regions().len() {
        let Some(region) = map.region_range(index) else { continue };
        let (first, end) = (run.first.max(region.first), run.end().min(region.end()));
        if first < end {
            each(PageRange { first, count: end - first });
        }
    }
}

/// Appends `run` to `runs`, joining it with the last where they touch.
pub(crate) fn push_run(runs: &mut Vec<PageRange>, run: PageRange) {
    match runs.last_mut() {
        Some(last) if last.end() == run.first => last.count += run.count,
        _ => runs.push(run),
    }
}

/// Walks the bytes of `runs` in pieces, so that a stream can be cut anywhere.
pub(crate) struct Pieces<'a> {
    runs: &'a [PageRange],
    offset: u64,
}

impl<'a> Pieces<'a> {
    pub(crate) fn new(runs: &'a [PageRange]) -> Pieces<'a> {
        Pieces { runs, offset: 0 }
    }

    /// The next piece of at most `bytes` bytes: range, byte offset in it, length. `None` at the end.
    pub(crate) fn next(&mut self, bytes: usize) -> Option<(PageRange, u64, usize)> {
        let range = *self.runs.first()?;
        let left = range.bytes() - self.offset;
        let here = left.min(bytes as u64);
        let piece = (range, self.offset, usize::try_from(here).unwrap_or(bytes));
        self.offset += here;
        if self.offset == range.bytes() {
            self.runs = self.runs.split_first().map_or(&[], |(_, rest)| rest);
            self.offset = 0;
        }
        Some(piece)
    }

    pub(crate) fn is_done(&self) -> bool {
        self.runs.is_empty()
    }
}

/// Which pages have arrived on any lane, shared by the lanes without a lock. One bit a page.
#[derive(Debug)]
pub(crate) struct Arrived {
    words: Vec<AtomicU64>,
}

impl Arrived {
    pub(crate) fn new(map: &MemoryMap) -> Arrived {
        let words = usize::try_from(map.numbers() / PAGES_PER_WORD).unwrap_or(0);
        Arrived { words: std::iter::repeat_with(AtomicU64::default).take(words).collect() }
    }

    pub(crate) fn insert(&self, range: PageRange) {
        self.masks(range, |word, mask| {
            word.fetch_or(mask, Ordering::Relaxed);
        });
    }

    /// The pages of `range` that are in the set, as runs.
    pub(crate) fn within(&self, range: PageRange, mut found: impl FnMut(PageRange)) {
        let mut runs: Vec<PageRange> = Vec::new();
        let mut page = range.first;
        self.masks(range, |word, mask| {
            let mut bits = word.load(Ordering::Relaxed) & mask;
            let base = page / PAGES_PER_WORD * PAGES_PER_WORD;
            while bits != 0 {
                let from = bits.trailing_zeros();
                let count = (bits >> from).trailing_ones();
                push_run(&mut runs, PageRange { first: base + u64::from(from), count: u64::from(count) });
                let mask = if count == 64 { u64::MAX } else { ((1 << count) - 1) << from };
                bits &= !mask;
            }
            page = base + PAGES_PER_WORD;
        });
        runs.into_iter().for_each(&mut found);
    }

    /// The pages of `range` that are not in the set, as runs.
    pub(crate) fn missing(&self, range: PageRange) -> Vec<PageRange> {
        let (mut runs, mut next) = (Vec::new(), range.first);
        let gap = |first: u64, end: u64| (first < end).then_some(PageRange { first, count: end.saturating_sub(first) });
        self.within(range, |run| {
            runs.extend(gap(next, run.first));
            next = run.end();
        });
        runs.extend(gap(next, range.end()));
        runs
    }

    fn masks(&self, range: PageRange, mut apply: impl FnMut(&AtomicU64, u64)) {
        let end = range.end().min(self.words.len() as u64 * PAGES_PER_WORD);
        let mut page = range.first;
        while page < end {
            let bit = page % PAGES_PER_WORD;
            let here = (PAGES_PER_WORD - bit).min(end - page);
            let mask = if here == PAGES_PER_WORD { u64::MAX } else { ((1 << here) - 1) << bit };
            if let Some(word) = usize::try_from(page / PAGES_PER_WORD).ok().and_then(|index| self.words.get(index)) {
                apply(word, mask);
            }
            page += here;
        }
    }
}

/// Pages that population takes at a time: 2 MiB, 6 to 10 ms of first touch, the longest that it can be late to stop.
const POPULATE_PAGES: u64 = (2 << 20) / PAGE_BYTES;

/// Populates all of `pages`, from the last page to the first: the lanes come from the front, so the two meet once and no
/// page is touched by both for long. Pages in `known` (written, or said to be zero) are left out. Stops when `stop` is set.
/// Returns how many pages it populated.
pub(crate) fn populate_all(pages: &Arc<dyn Pages>, known: &Arrived, stop: &AtomicBool) -> io::Result<u64> {
    let map = pages.memory_map();
    let mut populated = 0;
    for index in (0..map.regions().len()).rev() {
        let Some(region) = map.region_range(index) else { continue };
        let mut end = region.end();
        while end > region.first {
            if stop.load(Ordering::Relaxed) {
                return Ok(populated);
            }
            let first = end.saturating_sub(POPULATE_PAGES).max(region.first);
            let chunk = PageRange { first, count: end - first };
            for unknown in known.missing(chunk) {
                pages.populate(unknown)?;
                populated += unknown.count;
            }
            end = first;
        }
    }
    Ok(populated)
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use limosa_proto::bitmap::PageSet;
    use limosa_proto::memory::{Gpa, Region};

    fn map(pages: u64) -> MemoryMap {
        MemoryMap::new(vec![Region { gpa: Gpa(0), bytes: pages * PAGE_BYTES, page_bytes: 4096 }]).unwrap()
    }

    #[test]
    fn runs_are_taken_in_bounded_bites() {
        let map = map(1000);
        let mut set = PageSet::empty(&map);
        for range in [(3, 1), (60, 10), (130, 300), (999, 1)] {
            set.insert(PageRange { first: range.0, count: range.1 });
        }
        let (mut cursor, mut out, mut all) = (0, Vec::new(), Vec::new());
        loop {
            next_runs(set.words(), &mut cursor, 64, 2, &mut out);
            if out.is_empty() {
                break;
            }
            assert!(out.len() <= 2 && out.iter().map(|run| run.count).sum::<u64>() <= 64);
            all.extend(out.iter().flat_map(|run| run.first..run.end()));
        }
        assert_eq!(all, set.runs().flat_map(|run| run.first..run.end()).collect::<Vec<_>>());
    }

    #[test]
    fn a_full_last_word_ends() {
        let map = map(128);
        let (mut cursor, mut out) = (0, Vec::new());
        next_runs(PageSet::full(&map).words(), &mut cursor, 1 << 20, 256, &mut out);
        assert_eq!(out, [PageRange { first: 0, count: 128 }]);
        next_runs(PageSet::full(&map).words(), &mut cursor, 1 << 20, 256, &mut out);
        assert_eq!(out, []);
    }

    #[test]
    fn arrived_names_what_it_has() {
        let arrived = Arrived::new(&map(1000));
        arrived.insert(PageRange { first: 60, count: 140 });
        let mut found = Vec::new();
        arrived.within(PageRange { first: 0, count: 150 }, |run| found.push(run));
        assert_eq!(found, [PageRange { first: 60, count: 90 }]);
        arrived.insert(PageRange { first: 500, count: 1 });
        let missing = |first, count| {
            arrived.missing(PageRange { first, count }).iter().map(|run| (run.first, run.count)).collect::<Vec<_>>()
        };
        assert_eq!(missing(100, 100), []);
        assert_eq!(missing(100, 101), [(200, 1)]);
        assert_eq!(missing(0, 1000), [(0, 60), (200, 300), (501, 499)]);
        assert_eq!(missing(300, 10), [(300, 10)]);
    }

    #[test]
    fn pieces_cut_anywhere() {
        let runs = [PageRange { first: 5, count: 1 }, PageRange { first: 9, count: 2 }];
        let mut pieces = Pieces::new(&runs);
        let mut sum = 0;
        while let Some((range, offset, length)) = pieces.next(3000) {
            assert!(length > 0 && offset + length as u64 <= range.bytes());
            sum += length;
        }
        assert_eq!(sum, 3 * 4096);
    }
}
