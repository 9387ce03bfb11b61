//! What the link has asked of devices so far, for reports and benchmarks. Nothing decides by it.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Instant;

/// What the lanes of a link have asked of the source's device so far.
#[derive(Debug, Default)]
pub struct RdmaWork {
    /// Lists of work requests, each with one ring of the doorbell.
    pub doorbells: AtomicU64,
    /// Writes of guest memory.
    pub writes: AtomicU64,
    /// Bytes of them: pages and nothing else.
    pub write_bytes: AtomicU64,
    /// Messages with heads and hashes.
    pub messages: AtomicU64,
    /// What registering guest memory took.
    pub registered: RdmaRegistered,
}

/// Registration of guest memory.
#[derive(Debug, Default)]
pub struct RdmaRegistered {
    /// Chunks.
    pub chunks: AtomicU64,
    /// Their bytes.
    pub bytes: AtomicU64,
    /// How long it took, in nanoseconds; on as many threads as did it.
    pub ns: AtomicU64,
}

impl RdmaRegistered {
    /// Counts a registration of `bytes` that began at `begun`.
    pub(super) fn count(&self, bytes: u64, begun: Instant) {
        add(&self.chunks, 1);
        add(&self.bytes, bytes);
        add(&self.ns, u64::try_from(begun.elapsed().as_nanos()).unwrap_or(u64::MAX));
    }
}

pub(super) fn add(counter: &AtomicU64, count: u64) {
    counter.fetch_add(count, Ordering::Relaxed);
}
