//! Guest memory as the lanes want it, over guest memory as the plug maps it. Nothing but the joint of the two.

use limosa_link::Pages;
use limosa_plug::GuestMemory;
use limosa_proto::memory::{MemoryMap, PageRange};
use std::io;
use std::os::fd::BorrowedFd;

/// A guest's memory, mapped.
#[derive(Debug)]
pub(crate) struct GuestPages(pub(crate) GuestMemory);

impl Pages for GuestPages {
    fn memory_map(&self) -> &MemoryMap {
        self.0.memory_map()
    }

    fn gather(&self, socket: BorrowedFd<'_>, head: &[u8], runs: &[PageRange], done: u64, more: bool) -> io::Result<usize> {
        self.0.gather(socket, head, runs, done, more)
    }

    fn scatter(&self, socket: BorrowedFd<'_>, runs: &[PageRange], done: u64, tail: &mut [u8]) -> io::Result<usize> {
        self.0.scatter(socket, runs, done, tail)
    }

    fn read(&self, range: PageRange, offset: u64, out: &mut [u8]) {
        self.0.read(range, offset, out);
    }

    fn write(&self, range: PageRange, offset: u64, data: &[u8]) {
        self.0.write(range, offset, data);
    }

    fn scan(&self, range: PageRange, found: &mut dyn FnMut(PageRange, bool)) {
        self.0.scan(range, found);
    }

    fn zero(&self, range: PageRange) {
        self.0.zero(range);
    }

    fn data_extents(&self, range: PageRange) -> Vec<PageRange> {
        self.0.data_extents(range)
    }

    fn file(&self, index: usize) -> Option<(BorrowedFd<'_>, u64)> {
        self.0.file(index)
    }

    fn populate(&self, range: PageRange) -> io::Result<()> {
        self.0.populate(range)
    }
}
