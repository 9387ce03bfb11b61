//! The guest's memory at the source as its device sees it: registered chunk by chunk, read only, when pages of a chunk are sent
//! for the first time. Chunks that the guest never touched are not registered. Shared by the lanes of one migration.

use super::RdmaSettings;
use super::work::RdmaWork;
use crate::direct::{LaneMemory, RemoteKeys};
use limosa_proto::memory::{MemoryMap, PageRange};
use limosa_proto::wire::offer::{CHUNK_BYTES, chunks};
use limosa_verbs::{Access, Context, Mapping, MemoryRegion, ProtectionDomain, RemoteKey};
use nix::errno::Errno;
use nix::unistd::{Whence, lseek};
use std::io;
use std::os::fd::BorrowedFd;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

/// How many chunks are looked at for one that holds something.
const LOOK_AHEAD: u32 = 64;

/// Where a page lies.
#[derive(Debug, Clone, Copy)]
pub(super) struct Place {
    pub(super) chunk: u32,
    /// Byte offset in the chunk.
    pub(super) offset: u64,
    /// Bytes from there to the chunk's end.
    pub(super) left: u64,
}

/// A chunk that can be written from here to there.
#[derive(Debug, Clone)]
pub(super) struct Way {
    pub(super) from: Arc<MemoryRegion>,
    pub(super) to: RemoteKey,
}

/// One region of guest memory.
struct Part {
    mapping: Arc<Mapping>,
    first_chunk: u32,
}

/// The memory of one guest that is being sent.
pub(super) struct SourceMemory {
    domain: Arc<ProtectionDomain>,
    memory: LaneMemory,
    parts: Vec<Part>,
    /// By chunk: there once it was needed.
    ways: Vec<Mutex<Option<Way>>>,
    on_demand: bool,
    chunks_ahead: u32,
    work: Arc<RdmaWork>,
}

impl std::fmt::Debug for SourceMemory {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "SourceMemory({} chunks)", self.ways.len())
    }
}

/// A mapping of each region of guest memory, made by the device's own hand, so that it lives as long as the device needs it.
pub(super) fn map_region(pages: &dyn crate::Pages, index: usize) -> Result<Arc<Mapping>, String> {
    let region = pages.memory_map().regions().get(index).ok_or_else(|| format!("there is no memory region {index}"))?;
    let (file, offset) = pages.file(index).ok_or_else(|| {
        format!(
            "memory region {index} of the guest is on no memory file, so that no RDMA device can have it: use memfds, or link tcp"
        )
    })?;
    let mapping = Mapping::of_file(file, offset, region.bytes);
    let mapping = mapping.map_err(|error| format!("memory region {index} of the guest: {error}"))?;
    if pages.huge_pages() {
        mapping.ask_for_huge_pages();
    }
    Ok(mapping)
}

impl SourceMemory {
    /// Maps all of it on `device`; registers nothing yet.
    pub(super) fn new(
        device: &str,
        memory: LaneMemory,
        settings: &RdmaSettings,
        work: Arc<RdmaWork>,
    ) -> Result<SourceMemory, String> {
        let context = Context::open(device).map_err(|error| error.to_string())?;
        let on_demand = settings.on_demand && context.on_demand().reliable;
        let domain = ProtectionDomain::new(&context).map_err(|error| error.to_string())?;
        let map = memory.pages.memory_map();
        let mut parts = Vec::new();
        let mut first_chunk = 0_u32;
        for (index, region) in map.regions().iter().enumerate() {
            parts.push(Part { mapping: map_region(&*memory.pages, index)?, first_chunk });
            let count = u32::try_from(region.bytes.div_ceil(CHUNK_BYTES)).unwrap_or(u32::MAX);
            first_chunk = first_chunk.saturating_add(count);
        }
        let ways = chunks(map).map(|_| Mutex::new(None)).collect();
        let chunks_ahead = settings.chunks_ahead.min(LOOK_AHEAD);
        Ok(SourceMemory { domain, memory, parts, ways, on_demand, chunks_ahead, work })
    }

    pub(super) fn work(&self) -> &RdmaWork {
        &self.work
    }

    pub(super) fn domain(&self) -> &Arc<ProtectionDomain> {
        &self.domain
    }

    fn map(&self) -> &MemoryMap {
        self.memory.pages.memory_map()
    }

    fn keys(&self) -> &RemoteKeys {
        &self.memory.keys
    }

    /// In which chunk `page` lies.
    pub(super) fn place(&self, page: u64) -> io::Result<Place> {
        let no_page = || io::Error::new(io::ErrorKind::InvalidInput, format!("the guest has no page {page}"));
        let (index, offset) = self.map().locate(PageRange { first: page, count: 1 }).ok_or_else(no_page)?;
        let (part, region) = self.parts.get(index).zip(self.map().regions().get(index)).ok_or_else(no_page)?;
        let number = u32::try_from(offset / CHUNK_BYTES).map_err(|_| no_page())?;
        let begin = offset - offset % CHUNK_BYTES;
        let bytes = (region.bytes - begin).min(CHUNK_BYTES);
        Ok(Place { chunk: part.first_chunk.saturating_add(number), offset: offset - begin, left: bytes - (offset - begin) })
    }

    /// The region and the byte in it where `chunk` begins, and its length.
    fn chunk(&self, chunk: u32) -> Option<(usize, u64, u64)> {
        let index = self.parts.partition_point(|part| part.first_chunk <= chunk).checked_sub(1)?;
        let begin = u64::from(chunk - self.parts.get(index)?.first_chunk) * CHUNK_BYTES;
        let left = self.map().regions().get(index)?.bytes.checked_sub(begin)?;
        (left > 0).then_some((index, begin, left.min(CHUNK_BYTES)))
    }

    fn way_slot(&self, chunk: u32) -> Option<MutexGuard<'_, Option<Way>>> {
        let slot = self.ways.get(usize::try_from(chunk).ok()?)?;
        Some(slot.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// Registers `chunk` and waits for the destination's key, both if that was not done before.
    pub(super) fn way(&self, chunk: u32) -> io::Result<Way> {
        let no_chunk = || io::Error::new(io::ErrorKind::InvalidInput, format!("the guest has no chunk {chunk} of memory"));
        // Other lanes that need this chunk wait for it here.
        let mut slot = self.way_slot(chunk).ok_or_else(no_chunk)?;
        if let Some(way) = &*slot {
            return Ok(way.clone());
        }
        let (index, begin, bytes) = self.chunk(chunk).ok_or_else(no_chunk)?;
        let mapping = &self.parts.get(index).ok_or_else(no_chunk)?.mapping;
        let access = Access { on_demand: self.on_demand, ..Access::default() };
        let begun = Instant::now();
        let from = MemoryRegion::register(&self.domain, mapping, begin..begin + bytes, access)
            .map_err(|error| io::Error::other(register_words(chunk, self.ways.len(), self.map().bytes(), &error)))?;
        self.work.registered.count(bytes, begun);
        let key = self.keys().wait(chunk, &self.ahead(chunk))?;
        let way = Way { from, to: RemoteKey { address: key.address, rkey: key.rkey } };
        *slot = Some(way.clone());
        Ok(way)
    }

    /// The next chunks after `chunk` that hold something: soon a lane needs their keys.
    fn ahead(&self, chunk: u32) -> Vec<u32> {
        let next = (1..=LOOK_AHEAD).map_while(|step| chunk.checked_add(step));
        next.filter(|chunk| self.holds_something(*chunk)).take(self.chunks_ahead as usize).collect()
    }

    fn holds_something(&self, chunk: u32) -> bool {
        let Some((index, begin, bytes)) = self.chunk(chunk) else { return false };
        self.memory.pages.file(index).is_some_and(|(file, offset)| has_data(file, offset.saturating_add(begin), bytes))
    }
}

/// Whether any of `bytes` from `offset` on was ever written, as far as the file can tell.
fn has_data(file: BorrowedFd<'_>, offset: u64, bytes: u64) -> bool {
    let Ok(from) = i64::try_from(offset) else { return false };
    match lseek(file, from, Whence::SeekData) {
        Ok(data) => u64::try_from(data).is_ok_and(|data| data < offset.saturating_add(bytes)),
        // Nothing but a hole up to the end.
        Err(Errno::ENXIO) => false,
        // A file system that cannot tell.
        Err(_) => true,
    }
}

/// Words for a registration that failed.
pub(super) fn register_words(chunk: u32, chunks: usize, guest: u64, error: &limosa_verbs::RegisterError) -> String {
    let mib = guest.div_ceil(1 << 20);
    let all = if let limosa_verbs::RegisterError::MemlockTooLow { .. } = error {
        format!(" (all of this guest's memory is {mib} MiB)")
    } else {
        String::new()
    };
    format!("chunk {chunk} of {chunks} of guest memory could not be registered: {error}{all}")
}
