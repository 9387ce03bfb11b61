//! A guest's memory as the agent maps it: pages go between it and a socket without a copy in between.
//! When a page is moved, and whether it is right, is the engine's business.
//!
//! Soundness rule of this module: the iovecs handed to the kernel point either into live slices of the caller or at
//! ranges that `Mapping::at` has checked, and they do not outlive the call that they are made for. No reference to
//! guest memory is made: the guest may write it at any time, which tears a page that is then dirty and sent again.

use crate::mapping::Mapping;
use crate::memfd;
use limosa_proto::memory::{MemoryMap, PAGE_BYTES, PageRange};
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};

/// Most pieces of one system call (`IOV_MAX` of Linux).
const PIECES_MAX: usize = 1024;

/// What to tell the kernel about huge pages behind the agent's mapping.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum HugePages {
    /// Never build them here: on some hosts the first touch of one costs 4 ms.
    #[default]
    Never,
    /// Leave it to the host's setting.
    Host,
    /// Ask for them.
    Ask,
}

/// Why a VMM's memory could not be mapped.
#[derive(Debug, thiserror::Error)]
pub enum MemoryError {
    /// As many descriptors as regions are needed.
    #[error("{fds} memfds came for {regions} memory regions")]
    Count {
        /// How many came.
        fds: usize,
        /// How many regions there are.
        regions: usize,
    },
    /// One region's memfd is not what was described.
    #[error("memory region {index}: {source}")]
    Region {
        /// Which, from zero.
        index: usize,
        /// What is wrong.
        source: io::Error,
    },
}

/// All memory of one guest, mapped shared and writable. `Send + Sync`: lanes use it side by side.
#[derive(Debug)]
pub struct GuestMemory {
    map: MemoryMap,
    regions: Vec<MappedRegion>,
    huge: HugePages,
}

#[derive(Debug)]
struct MappedRegion {
    mapping: Mapping,
    fd: OwnedFd,
    offset: u64,
}

impl GuestMemory {
    /// Maps every region from its memfd at the byte offset given with it, without huge pages of the agent's making.
    ///
    /// # Errors
    /// A memfd that is none, is not sealed with `F_SEAL_SHRINK`, is too small, or does not fit its page size.
    pub fn map(map: MemoryMap, fds: Vec<(OwnedFd, u64)>) -> Result<GuestMemory, MemoryError> {
        GuestMemory::map_with(map, fds, HugePages::Never)
    }

    /// The same, with a choice about transparent huge pages.
    ///
    /// # Errors
    /// As [`GuestMemory::map`].
    pub fn map_with(map: MemoryMap, fds: Vec<(OwnedFd, u64)>, huge: HugePages) -> Result<GuestMemory, MemoryError> {
        if fds.len() != map.regions().len() {
            return Err(MemoryError::Count { fds: fds.len(), regions: map.regions().len() });
        }
        let mut regions = Vec::with_capacity(fds.len());
        for (index, ((fd, offset), region)) in fds.into_iter().zip(map.regions()).enumerate() {
            let mapped = map_region(fd, offset, region.bytes, huge);
            regions.push(mapped.map_err(|source| MemoryError::Region { index, source })?);
        }
        Ok(GuestMemory { map, regions, huge })
    }

    /// The shape of the memory.
    #[must_use]
    pub fn memory_map(&self) -> &MemoryMap {
        &self.map
    }

    /// The memfd behind region `index`, and the byte offset of the region in it. It is sealed against shrinking.
    #[must_use]
    pub fn file(&self, index: usize) -> Option<(BorrowedFd<'_>, u64)> {
        self.regions.get(index).map(|region| (region.fd.as_fd(), region.offset))
    }

    /// What it was mapped with.
    #[must_use]
    pub fn huge_pages(&self) -> HugePages {
        self.huge
    }

    /// Sends the rest of `head` and then of the pages of `runs` by one `sendmsg`.
    ///
    /// `done` is how many bytes of head and pages together were sent before. Returns how many more were; 0 only if
    /// nothing was left. `more` says that other bytes follow soon (`MSG_MORE`).
    ///
    /// # Errors
    /// `InvalidInput` if a run is no range of this memory; otherwise the socket's.
    pub fn gather(&self, socket: BorrowedFd<'_>, head: &[u8], runs: &[PageRange], done: u64, more: bool) -> io::Result<usize> {
        let mut pieces = Pieces::new(done);
        pieces.push(head.as_ptr().cast_mut(), head.len() as u64);
        self.pieces(runs, &mut pieces)?;
        if pieces.list.is_empty() {
            return Ok(0);
        }
        let header = pieces.header();
        let flags = libc::MSG_NOSIGNAL | if more { libc::MSG_MORE } else { 0 };
        // SAFETY: by the module's rule; sendmsg only reads through the pieces, so the cast of `head` is harmless.
        uninterrupted(|| unsafe { libc::sendmsg(socket.as_raw_fd(), &raw const header, flags) })
    }

    /// Receives into the pages of `runs` and then into `tail` by one `recvmsg`.
    ///
    /// `done` is how many bytes of pages and tail together were received before. Returns how many more were; 0 means
    /// the end of the stream, or that nothing was left to receive.
    ///
    /// # Errors
    /// `InvalidInput` if a run is no range of this memory; otherwise the socket's.
    pub fn scatter(&self, socket: BorrowedFd<'_>, runs: &[PageRange], done: u64, tail: &mut [u8]) -> io::Result<usize> {
        let mut pieces = Pieces::new(done);
        self.pieces(runs, &mut pieces)?;
        pieces.push(tail.as_mut_ptr(), tail.len() as u64);
        if pieces.list.is_empty() {
            return Ok(0);
        }
        let mut header = pieces.header();
        // SAFETY: by the module's rule; `tail` is borrowed mutably for the whole call.
        uninterrupted(|| unsafe { libc::recvmsg(socket.as_raw_fd(), &raw mut header, libc::MSG_NOSIGNAL) })
    }

    /// Copies bytes out of `range`, beginning `offset` bytes into it. If that is not inside the range and the
    /// memory, `out` is filled with zeros.
    pub fn read(&self, range: PageRange, offset: u64, out: &mut [u8]) {
        let read = self.inside(range, offset, out.len()).is_some_and(|(region, at)| region.mapping.read(at, out));
        debug_assert!(read, "{range:?} + {offset} is not inside the guest's memory");
        if !read {
            out.fill(0);
        }
    }

    /// Copies bytes into `range`, beginning `offset` bytes into it. Nothing is written if that is not inside the
    /// range and the memory.
    pub fn write(&self, range: PageRange, offset: u64, data: &[u8]) {
        let written = self.inside(range, offset, data.len()).is_some_and(|(region, at)| region.mapping.write(at, data));
        debug_assert!(written, "{range:?} + {offset} is not inside the guest's memory");
    }

    /// Splits `range` into runs of pages that are all zero and runs that are not, in rising order.
    ///
    /// Reads through the mapping, which allocates pages that were never touched: ask [`GuestMemory::data_extents`]
    /// first. The guest may write meanwhile; a page that changed after it was looked at is dirty again.
    pub fn scan(&self, range: PageRange, found: &mut dyn FnMut(PageRange, bool)) {
        let Some((region, offset)) = self.located(range) else { return };
        let is_zero = |page: u64| region.mapping.is_zero(offset + page * PAGE_BYTES, PAGE_BYTES);
        let (mut start, mut zero) = (0, is_zero(0));
        for page in 1..range.count {
            let now = is_zero(page);
            if now != zero {
                found(PageRange { first: range.first + start, count: page - start }, zero);
                (start, zero) = (page, now);
            }
        }
        found(PageRange { first: range.first + start, count: range.count - start }, zero);
    }

    /// Whether `page` is all zero; false if there is no such page.
    #[must_use]
    pub fn is_zero(&self, page: u64) -> bool {
        let located = self.located(PageRange { first: page, count: 1 });
        located.is_some_and(|(region, offset)| region.mapping.is_zero(offset, PAGE_BYTES))
    }

    /// Makes `range` read as zeros. Pages that were never touched already do and stay unallocated.
    pub fn zero(&self, range: PageRange) {
        for extent in self.data_extents(range) {
            if let Some((region, offset)) = self.located(extent) {
                region.mapping.zero(offset, extent.bytes());
            }
        }
    }

    /// The parts of `range` that have memory behind them. The rest was never touched and reads as zeros; reading it
    /// through the mapping would allocate it. Parts may be larger than what was touched where pages are huge.
    #[must_use]
    pub fn data_extents(&self, range: PageRange) -> Vec<PageRange> {
        let Some((region, offset)) = self.located(range) else { return Vec::new() };
        let base = region.offset + offset;
        let end = base + range.bytes();
        let mut extents: Vec<PageRange> = Vec::new();
        let mut at = base;
        while at < end {
            let data = match seek(region.fd.as_fd(), at, libc::SEEK_DATA) {
                Ok(data) if data >= at => data,
                Err(error) if error.raw_os_error() == Some(libc::ENXIO) => break,
                // A file system that cannot say: everything may be data.
                _ => at,
            };
            if data >= end {
                break;
            }
            let hole = seek(region.fd.as_fd(), data, libc::SEEK_HOLE).ok().filter(|hole| *hole > data).unwrap_or(end).min(end);
            let first = (data - base) / PAGE_BYTES;
            let count = (hole - base).div_ceil(PAGE_BYTES) - first;
            extents.push(PageRange { first: range.first + first, count });
            at = hole;
        }
        extents
    }

    /// Allocates every page of `range` without changing its contents (`MADV_POPULATE_WRITE`, Linux 5.14). It takes
    /// 3 to 5 µs for each 4 KiB page that was never touched, so call it for a few MiB at a time.
    ///
    /// # Errors
    /// `InvalidInput` if it is no range of this memory; otherwise the system's.
    pub fn populate(&self, range: PageRange) -> io::Result<()> {
        let (region, offset) = self.located(range).ok_or(io::ErrorKind::InvalidInput)?;
        region.mapping.populate(offset, range.bytes())
    }

    fn located(&self, range: PageRange) -> Option<(&MappedRegion, u64)> {
        let (index, offset) = self.map.locate(range)?;
        Some((self.regions.get(index)?, offset))
    }

    /// Where the `length` bytes at `offset` into `range` are, if they are inside it.
    fn inside(&self, range: PageRange, offset: u64, length: usize) -> Option<(&MappedRegion, u64)> {
        let end = offset.checked_add(length as u64)?;
        let (region, start) = self.located(range)?;
        (end <= range.bytes()).then_some((region, start + offset))
    }

    fn pieces(&self, runs: &[PageRange], pieces: &mut Pieces) -> io::Result<()> {
        for run in runs {
            if pieces.is_full() {
                break;
            }
            let at = self.located(*run).and_then(|(region, offset)| region.mapping.at(offset, run.bytes()));
            let start = at.ok_or_else(|| io::Error::new(io::ErrorKind::InvalidInput, "pages that the guest does not have"))?;
            pieces.push(start, run.bytes());
        }
        Ok(())
    }
}

fn map_region(fd: OwnedFd, offset: u64, bytes: u64, huge: HugePages) -> io::Result<MappedRegion> {
    let refuse = |words: &str| io::Error::new(io::ErrorKind::InvalidInput, words.to_owned());
    let end = offset.checked_add(bytes).ok_or_else(|| refuse("its end is beyond every file"))?;
    memfd::check(fd.as_fd(), end)?;
    let page = memfd::page_bytes(fd.as_fd())?;
    if !offset.is_multiple_of(page) || !bytes.is_multiple_of(page) {
        return Err(refuse("offset and length must be multiples of the memfd's page size"));
    }
    let mapping = Mapping::new(fd.as_fd(), offset, bytes)?;
    mapping.advise(libc::MADV_DONTDUMP);
    match huge {
        HugePages::Never => mapping.advise(libc::MADV_NOHUGEPAGE),
        HugePages::Ask => mapping.advise(libc::MADV_HUGEPAGE),
        HugePages::Host => {}
    }
    Ok(MappedRegion { mapping, fd, offset })
}

/// Does not use the file's position, which the VMM's descriptor shares: the answer is the return value.
fn seek(fd: BorrowedFd<'_>, from: u64, whence: libc::c_int) -> io::Result<u64> {
    let from = i64::try_from(from).map_err(|_| io::Error::from(io::ErrorKind::InvalidInput))?;
    // SAFETY: no memory is involved.
    let at = unsafe { libc::lseek(fd.as_raw_fd(), from, whence) };
    u64::try_from(at).map_err(|_| io::Error::last_os_error())
}

fn uninterrupted(mut call: impl FnMut() -> isize) -> io::Result<usize> {
    loop {
        if let Ok(bytes) = usize::try_from(call()) {
            return Ok(bytes);
        }
        let error = io::Error::last_os_error();
        if error.kind() != io::ErrorKind::Interrupted {
            return Err(error);
        }
    }
}

/// The list of pieces of one system call: what was done before is left out, neighbours are merged.
struct Pieces {
    skip: u64,
    list: Vec<libc::iovec>,
}

impl Pieces {
    fn new(skip: u64) -> Pieces {
        Pieces { skip, list: Vec::with_capacity(32) }
    }

    fn is_full(&self) -> bool {
        self.list.len() >= PIECES_MAX
    }

    fn push(&mut self, start: *mut u8, bytes: u64) {
        let skip = self.skip.min(bytes);
        self.skip -= skip;
        let (skip, left) = (skip as usize, (bytes - skip) as usize);
        if left == 0 || self.is_full() {
            return;
        }
        let start = start.wrapping_add(skip);
        if let Some(last) = self.list.last_mut()
            && last.iov_base.cast::<u8>().wrapping_add(last.iov_len) == start
        {
            last.iov_len += left;
            return;
        }
        self.list.push(libc::iovec { iov_base: start.cast(), iov_len: left });
    }

    /// A message header over the list, which must outlive it.
    fn header(&mut self) -> libc::msghdr {
        // SAFETY: msghdr is plain data, for which zeros are a valid value.
        let mut header: libc::msghdr = unsafe { std::mem::zeroed() };
        header.msg_iov = self.list.as_mut_ptr();
        header.msg_iovlen = self.list.len();
        header
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use limosa_proto::memory::{Gpa, Region};
    use std::os::unix::net::UnixStream;

    fn guest(pages: &[u64]) -> GuestMemory {
        let region =
            |(index, pages): (usize, &u64)| Region { gpa: Gpa((index as u64) << 32), bytes: pages * 4096, page_bytes: 4096 };
        let map = MemoryMap::new(pages.iter().enumerate().map(region).collect()).unwrap();
        // All regions in one memfd, behind each other, as some VMMs have them.
        let fd = memfd::create("limosa-test", pages.iter().sum::<u64>() * 4096).unwrap();
        let offset = |index| pages.iter().take(index).sum::<u64>() * 4096;
        let fds = (0..pages.len()).map(|index| (fd.try_clone().unwrap(), offset(index)));
        GuestMemory::map(map, fds.collect()).unwrap()
    }

    fn range(first: u64, count: u64) -> PageRange {
        PageRange { first, count }
    }

    fn pattern(memory: &GuestMemory, pages: PageRange, seed: u8) {
        for page in pages.first..pages.end() {
            memory.write(range(page, 1), 0, &vec![(page as u8).wrapping_mul(31) ^ seed; 4096]);
        }
    }

    fn page(memory: &GuestMemory, page: u64) -> Vec<u8> {
        let mut bytes = vec![0; 4096];
        memory.read(range(page, 1), 0, &mut bytes);
        bytes
    }

    #[test]
    fn descriptors_that_do_not_fit_are_named() {
        let map = MemoryMap::new(vec![Region { gpa: Gpa(0), bytes: 8192, page_bytes: 4096 }]).unwrap();
        let words = |fds| GuestMemory::map(map.clone(), fds).unwrap_err().to_string();
        let fd = || memfd::create("limosa-test", 8192).unwrap();
        assert_eq!(words(vec![]), "0 memfds came for 1 memory regions");
        assert_eq!(words(vec![(fd(), 4096)]), "memory region 0: the memfd has 8192 bytes and 12288 are needed");
        assert!(words(vec![(fd(), u64::MAX)]).contains("beyond every file"));
        let odd = memfd::create("limosa-test", 16384).unwrap();
        assert!(words(vec![(odd, 100)]).contains("multiples"));
        let file = std::fs::File::open("/proc/self/exe").unwrap();
        assert_eq!(words(vec![(file.into(), 0)]), "memory region 0: the descriptor is no memfd");
    }

    /// Through a socket whose buffers are small, so that every call moves only a part.
    #[test]
    fn pages_cross_a_socket_in_any_pieces() {
        let (from, to) = (guest(&[100, 70]), guest(&[100, 70]));
        pattern(&from, range(0, 100), 1);
        pattern(&from, range(128, 70), 2);
        let runs = [range(1, 3), range(4, 90), range(99, 1), range(128, 1), range(130, 60)];
        let total: u64 = runs.iter().map(|run| run.bytes()).sum();
        let (source, destination) = UnixStream::pair().unwrap();
        let (head, mut tail) = (*b"head of the frame", *b"the next frame's header");
        std::thread::scope(|scope| {
            scope.spawn(|| {
                let (mut done, all) = (0, head.len() as u64 + total);
                while done < all {
                    done += from.gather(source.as_fd(), &head, &runs, done, done % 2 == 0).unwrap() as u64;
                }
                assert_eq!(from.gather(source.as_fd(), &head, &runs, done, false).unwrap(), 0);
                from.gather(source.as_fd(), b"The Next Frame's Header", &[], 0, false).unwrap();
            });
            let mut start = [0; 17];
            std::io::Read::read_exact(&mut &destination, &mut start).unwrap();
            assert_eq!(start, head);
            let (mut done, all) = (0, total + tail.len() as u64);
            while done < all {
                let moved = to.scatter(destination.as_fd(), &runs, done, &mut tail).unwrap();
                assert!(moved > 0);
                done += moved as u64;
            }
        });
        assert_eq!(&tail, b"The Next Frame's Header");
        for number in runs.iter().flat_map(|run| run.first..run.end()) {
            assert_eq!(page(&from, number), page(&to, number), "page {number}");
        }
        assert!(to.is_zero(0) && to.is_zero(94) && to.is_zero(129) && to.is_zero(190));
        drop(source);
        assert_eq!(to.scatter(destination.as_fd(), &runs, 0, &mut tail).unwrap(), 0);
    }

    #[test]
    fn more_runs_than_one_call_takes() {
        let from = guest(&[5000]);
        pattern(&from, range(0, 5000), 9);
        let to = guest(&[5000]);
        let runs: Vec<PageRange> = (0..2500).map(|index| range(index * 2, 1)).collect();
        let (source, destination) = UnixStream::pair().unwrap();
        std::thread::scope(|scope| {
            scope.spawn(|| {
                let mut done = 0;
                while done < 2500 * 4096 {
                    done += from.gather(source.as_fd(), &[], &runs, done, false).unwrap() as u64;
                }
            });
            let mut done = 0;
            while done < 2500 * 4096 {
                done += to.scatter(destination.as_fd(), &runs, done, &mut []).unwrap() as u64;
            }
        });
        assert!((0..5000).all(|number| page(&to, number) == if number % 2 == 0 { page(&from, number) } else { vec![0; 4096] }));
    }

    #[test]
    fn ranges_outside_the_memory_do_nothing() {
        let memory = guest(&[10, 10]);
        let (socket, _other) = UnixStream::pair().unwrap();
        for outside in [range(9, 2), range(10, 1), range(74, 1), range(u64::MAX, 1), range(0, u64::MAX), range(0, 0)] {
            assert!(memory.gather(socket.as_fd(), &[], &[outside], 0, false).is_err(), "{outside:?}");
            assert!(memory.scatter(socket.as_fd(), &[outside], 0, &mut []).is_err(), "{outside:?}");
            assert!(memory.populate(outside).is_err() && memory.data_extents(outside).is_empty());
            memory.scan(outside, &mut |found, _| assert_eq!(found, range(0, 0), "never called"));
            memory.zero(outside);
        }
    }

    #[test]
    fn scan_splits_into_runs() {
        let memory = guest(&[20]);
        for number in [3, 4, 9, 19] {
            memory.write(range(number, 1), 4095, &[1]);
        }
        let mut found = Vec::new();
        memory.scan(range(1, 19), &mut |run, zero| found.push((run.first, run.count, zero)));
        assert_eq!(found, [(1, 2, true), (3, 2, false), (5, 4, true), (9, 1, false), (10, 9, true), (19, 1, false)]);
    }

    #[test]
    fn untouched_pages_are_holes_until_they_are_populated() {
        let memory = guest(&[64, 256]);
        pattern(&memory, range(70, 3), 7);
        pattern(&memory, range(300, 1), 7);
        assert_eq!(memory.data_extents(range(64, 256)), [range(70, 3), range(300, 1)]);
        assert_eq!(memory.data_extents(range(71, 100)), [range(71, 2)]);
        assert_eq!(memory.data_extents(range(0, 64)), []);
        memory.zero(range(64, 256));
        assert!(memory.is_zero(70) && memory.is_zero(300));
        assert_eq!(memory.data_extents(range(64, 256)).iter().map(|run| run.count).sum::<u64>(), 4);
        pattern(&memory, range(71, 1), 7);
        memory.populate(range(64, 16)).unwrap();
        assert_eq!(memory.data_extents(range(64, 100)), [range(64, 16)]);
        assert!(memory.is_zero(70) && !memory.is_zero(71));
    }
}
