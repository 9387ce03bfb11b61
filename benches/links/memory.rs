//! Guest memory without a guest: a memfd, filled as a mix says, seen by the lanes as [`Pages`]. It is what an agent has of a
//! VMM's memory.

use anyhow::{Context, Result};
use limosa_link::Pages;
use limosa_plug::memfd;
use limosa_plug::memory::GuestMemory;
use limosa_proto::memory::{Gpa, MemoryMap, PAGE_BYTES, PageRange, Region};
use serde::{Deserialize, Serialize};
use std::io;
use std::os::fd::BorrowedFd;

/// Bytes written or read at a time.
const PIECE_BYTES: usize = 1 << 20;

/// What pages hold.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum Mix {
    /// Nothing that could be compressed.
    Random,
    /// Words, as logs and pages of text have them.
    Text,
    /// Zeros that are there: each page was touched.
    Zero,
}

impl Mix {
    /// Its name in tables.
    pub(crate) fn name(self) -> &'static str {
        match self {
            Mix::Random => "random",
            Mix::Text => "text",
            Mix::Zero => "zero",
        }
    }
}

/// The memory of one guest that is none.
pub(crate) struct Memory(GuestMemory);

impl Memory {
    /// Fresh memory of this shape, every page zero and not there yet.
    pub(crate) fn new(map: &MemoryMap) -> Result<Memory> {
        let file = memfd::create("bench", map.bytes()).context("no memory")?;
        let memory = GuestMemory::map(map.clone(), vec![(file, 0)]).map_err(|error| anyhow::anyhow!("no memory: {error}"))?;
        Ok(Memory(memory))
    }

    /// The shape of so many bytes.
    pub(crate) fn shape(bytes: u64) -> Result<MemoryMap> {
        MemoryMap::new(vec![Region { gpa: Gpa(0), bytes, page_bytes: PAGE_BYTES }])
            .map_err(|error| anyhow::anyhow!("{bytes} bytes are no guest's memory: {error}"))
    }

    fn whole(&self) -> Result<PageRange> {
        self.memory_map().region_range(0).context("memory without a region")
    }

    fn pieces(&self) -> Result<impl Iterator<Item = (PageRange, u64)>> {
        let whole = self.whole()?;
        Ok((0..whole.bytes()).step_by(PIECE_BYTES).map(move |offset| (whole, offset)))
    }

    /// Gives every page real memory.
    pub(crate) fn populate_all(&self) -> Result<()> {
        let whole = self.whole()?;
        let (half, rest) = (whole.count / 2, whole.count - whole.count / 2);
        let halves = [PageRange { first: 0, count: half }, PageRange { first: half, count: rest }];
        std::thread::scope(|scope| {
            let threads = halves.map(|part| scope.spawn(move || if part.count > 0 { self.populate(part) } else { Ok(()) }));
            for thread in threads {
                thread.join().map_err(|_| anyhow::anyhow!("populating panicked"))??;
            }
            Ok(())
        })
    }

    /// Writes every page as `mix` says.
    pub(crate) fn fill(&self, mix: Mix) -> Result<()> {
        self.populate_all()?;
        let mut noise = Noise(0x1234_5678_9abc_def1);
        let mut piece = vec![0_u8; PIECE_BYTES];
        for (whole, offset) in self.pieces()? {
            match mix {
                Mix::Random => noise.bytes(&mut piece),
                Mix::Text => noise.words(&mut piece),
                Mix::Zero => {}
            }
            let bytes = usize::try_from(whole.bytes() - offset).unwrap_or(PIECE_BYTES).min(PIECE_BYTES);
            self.write(whole, offset, piece.get(..bytes).unwrap_or_default());
        }
        Ok(())
    }

    /// A sum of all of it, by which two memories are compared.
    pub(crate) fn sum(&self) -> Result<u64> {
        let mut piece = vec![0_u8; PIECE_BYTES];
        let mut sum = 0_u64;
        for (whole, offset) in self.pieces()? {
            let bytes = usize::try_from(whole.bytes() - offset).unwrap_or(PIECE_BYTES).min(PIECE_BYTES);
            let piece = piece.get_mut(..bytes).unwrap_or_default();
            self.read(whole, offset, piece);
            for word in piece.as_chunks::<8>().0 {
                sum = sum.rotate_left(5) ^ u64::from_le_bytes(*word);
            }
        }
        Ok(sum)
    }
}

/// Marsaglia's xorshift: the same bytes each time.
struct Noise(u64);

impl Noise {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }

    fn bytes(&mut self, out: &mut [u8]) {
        for word in out.as_chunks_mut::<8>().0 {
            *word = self.next().to_le_bytes();
        }
    }

    /// Words of a small vocabulary with numbers between them.
    fn words(&mut self, out: &mut [u8]) {
        const VOCABULARY: [&str; 8] = ["guest", "source", "page", "the", "arrived", "at", "error=", "round"];
        let mut text = String::with_capacity(out.len() + 64);
        while text.len() < out.len() {
            let draw = self.next();
            let word = usize::try_from(draw % 8).ok().and_then(|at| VOCABULARY.get(at)).unwrap_or(&"page");
            text.push_str(word);
            text.push(' ');
            if draw & 0x700 == 0 {
                text.push_str(&(draw >> 48).to_string());
                text.push('\n');
            }
        }
        out.copy_from_slice(text.as_bytes().get(..out.len()).unwrap_or_default());
    }
}

impl Pages for Memory {
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
