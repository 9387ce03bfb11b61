//! A toy's guest memory: a memfd that is only read and written by system calls, so that it needs no mapping of its own and a device
//! that maps it sees the same bytes. It knows which pages were written, and which were ever touched.

use limosa_link::Pages;
use limosa_proto::bitmap::PageSet;
use limosa_proto::memory::{Gpa, MemoryMap, PAGE_BYTES, PageRange, Region};
use nix::fcntl::{FcntlArg, SealFlag, fcntl};
use nix::sys::memfd::{MFdFlags, memfd_create};
use nix::sys::socket::{MsgFlags, recv, send};
use std::fs::File;
use std::io;
use std::os::fd::{AsFd as _, AsRawFd as _, BorrowedFd};
use std::os::unix::fs::FileExt as _;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex};

pub const WORDS_PER_PAGE: usize = PAGE_BYTES as usize / 8;
/// Bytes that one system call of a toy moves at most: odd, so that pages are cut anywhere.
const CALL_BYTES: usize = 100_000;

/// Holds back whoever passes while it is closed: a receiver that does not keep up, a device that takes its time.
#[derive(Default)]
pub struct Hold {
    closed: Mutex<bool>,
    opened: Condvar,
}

impl Hold {
    pub fn set(&self, closed: bool) {
        *self.closed.lock().unwrap() = closed;
        self.opened.notify_all();
    }
    pub fn pass(&self) {
        let closed = self.closed.lock().unwrap();
        drop(self.opened.wait_while(closed, |closed| *closed).unwrap());
    }
}

/// Guest memory that may be read and written from anywhere at any time.
pub struct ToyMemory {
    pub map: MemoryMap,
    file: File,
    dirty: Vec<AtomicU64>,
    /// Pages that were ever touched: the others are holes.
    touched: Vec<AtomicBool>,
    pub populated: AtomicU64,
    pub hold: Arc<Hold>,
}

impl ToyMemory {
    /// Two regions of `pages / 2` pages each; numbers go on from one to the next where that is a multiple of 64.
    pub fn new(pages: u64) -> Arc<ToyMemory> {
        let half = pages / 2;
        ToyMemory::regions(&[half, pages - half])
    }

    /// Regions of so many pages each, apart from each other.
    pub fn regions(pages: &[u64]) -> Arc<ToyMemory> {
        let region = |(index, pages): (usize, &u64)| Region {
            gpa: Gpa((index as u64) << 32),
            bytes: pages * PAGE_BYTES,
            page_bytes: 4096,
        };
        ToyMemory::of(MemoryMap::new(pages.iter().enumerate().map(region).collect()).unwrap())
    }

    pub fn of(map: MemoryMap) -> Arc<ToyMemory> {
        ToyMemory::held(map, Arc::default())
    }

    /// Memory that can be written only while `hold` is open.
    pub fn held(map: MemoryMap, hold: Arc<Hold>) -> Arc<ToyMemory> {
        let numbers = map.numbers() as usize;
        let fd = memfd_create(c"toy", MFdFlags::MFD_CLOEXEC | MFdFlags::MFD_ALLOW_SEALING).unwrap();
        let file = File::from(fd);
        file.set_len(map.numbers() * PAGE_BYTES).unwrap();
        fcntl(file.as_fd(), FcntlArg::F_ADD_SEALS(SealFlag::F_SEAL_SHRINK)).unwrap();
        Arc::new(ToyMemory {
            file,
            dirty: std::iter::repeat_with(AtomicU64::default).take(numbers / 64).collect(),
            touched: std::iter::repeat_with(AtomicBool::default).take(numbers).collect(),
            populated: AtomicU64::new(0),
            map,
            hold,
        })
    }

    fn put(&self, at: u64, bytes: &[u8]) {
        self.file.write_all_at(bytes, at).unwrap();
    }

    fn get(&self, at: u64, bytes: &mut [u8]) {
        self.file.read_exact_at(bytes, at).unwrap();
    }

    fn touch(&self, page: u64) {
        self.touched[page as usize].store(true, Ordering::SeqCst);
        self.dirty[page as usize / 64].fetch_or(1 << (page % 64), Ordering::SeqCst);
    }

    /// Writes as the guest does.
    pub fn poke(&self, page: u64, word: usize, value: u64) {
        self.put(page * PAGE_BYTES + word as u64 * 8, &value.to_le_bytes());
        self.touch(page);
    }

    pub fn peek(&self, page: u64, word: usize) -> u64 {
        let mut bytes = [0; 8];
        self.get(page * PAGE_BYTES + word as u64 * 8, &mut bytes);
        u64::from_le_bytes(bytes)
    }

    /// Writes a whole page as the guest does.
    pub fn poke_page(&self, page: u64, word: impl Fn(u64) -> u64) {
        let bytes: Vec<u8> = (0..WORDS_PER_PAGE as u64).flat_map(|number| word(number).to_le_bytes()).collect();
        self.put(page * PAGE_BYTES, &bytes);
        self.touch(page);
    }

    /// The numbers of all pages.
    pub fn pages(&self) -> Vec<u64> {
        PageSet::full(&self.map).runs().flat_map(|run| run.first..run.end()).collect()
    }

    /// Fills pages that `which` names.
    pub fn fill(&self, which: impl Fn(u64) -> bool) {
        for page in self.pages().into_iter().filter(|page| which(*page)) {
            self.poke_page(page, |word| page.wrapping_mul(0x9e37_79b9_7f4a_7c15) ^ word | 1);
        }
    }

    pub fn snapshot(&self) -> Vec<u8> {
        let mut all = vec![0; (self.map.numbers() * PAGE_BYTES) as usize];
        self.get(0, &mut all);
        all
    }

    /// From now on every write is noted.
    pub fn forget_dirty(&self) {
        self.dirty.iter().for_each(|word| word.store(0, Ordering::SeqCst));
    }

    pub fn take_dirty(&self) -> PageSet {
        PageSet::from_words(self.dirty.iter().map(|word| word.swap(0, Ordering::SeqCst)).collect())
    }

    fn bytes(&self, runs: &[PageRange], done: u64, max: usize) -> Vec<u8> {
        let mut out = Vec::new();
        let mut skip = done;
        for run in runs {
            assert!(self.map.locate(*run).is_some(), "a run outside of one region: {run:?}");
            if skip >= run.bytes() {
                skip -= run.bytes();
                continue;
            }
            let here = ((run.bytes() - skip) as usize).min(max - out.len());
            let from = out.len();
            out.resize(from + here, 0);
            self.read(*run, skip, &mut out[from..]);
            skip = 0;
            if out.len() == max {
                break;
            }
        }
        out
    }
}

impl Pages for ToyMemory {
    fn memory_map(&self) -> &MemoryMap {
        &self.map
    }
    fn gather(&self, socket: BorrowedFd<'_>, head: &[u8], runs: &[PageRange], done: u64, _more: bool) -> io::Result<usize> {
        let mut out = head.get(done as usize..).unwrap_or_default().to_vec();
        let max = CALL_BYTES.saturating_sub(out.len());
        out.extend(self.bytes(runs, done.saturating_sub(head.len() as u64), max));
        Ok(send(socket.as_raw_fd(), &out, MsgFlags::MSG_NOSIGNAL)?)
    }
    fn scatter(&self, socket: BorrowedFd<'_>, runs: &[PageRange], done: u64, tail: &mut [u8]) -> io::Result<usize> {
        let left = runs.iter().map(|run| run.bytes()).sum::<u64>() - done;
        let mut buffer = vec![0; (left as usize + tail.len()).min(CALL_BYTES)];
        let got = recv(socket.as_raw_fd(), &mut buffer, MsgFlags::empty())?;
        let mut data = &buffer[..got];
        let mut skip = done;
        for run in runs {
            if skip >= run.bytes() {
                skip -= run.bytes();
                continue;
            }
            let here = ((run.bytes() - skip) as usize).min(data.len());
            self.write(*run, skip, &data[..here]);
            data = &data[here..];
            skip = 0;
        }
        tail[..data.len()].copy_from_slice(data);
        Ok(got)
    }
    fn read(&self, range: PageRange, offset: u64, out: &mut [u8]) {
        self.get(range.first * PAGE_BYTES + offset, out);
    }
    fn write(&self, range: PageRange, offset: u64, data: &[u8]) {
        self.hold.pass();
        self.put(range.first * PAGE_BYTES + offset, data);
    }
    fn scan(&self, range: PageRange, found: &mut dyn FnMut(PageRange, bool)) {
        let mut bytes = [0; PAGE_BYTES as usize];
        for first in range.first..range.end() {
            self.get(first * PAGE_BYTES, &mut bytes);
            found(PageRange { first, count: 1 }, bytes == [0; PAGE_BYTES as usize]);
        }
    }
    fn zero(&self, range: PageRange) {
        self.put(range.first * PAGE_BYTES, &vec![0; range.bytes() as usize]);
    }
    fn data_extents(&self, range: PageRange) -> Vec<PageRange> {
        let touched = |page: &u64| self.touched[*page as usize].load(Ordering::SeqCst);
        (range.first..range.end()).filter(touched).map(|first| PageRange { first, count: 1 }).collect()
    }
    fn file(&self, index: usize) -> Option<(BorrowedFd<'_>, u64)> {
        Some((self.file.as_fd(), self.map.first_page(index)? * PAGE_BYTES))
    }
    fn populate(&self, range: PageRange) -> io::Result<()> {
        self.populated.fetch_add(range.count, Ordering::SeqCst);
        Ok(())
    }
}
