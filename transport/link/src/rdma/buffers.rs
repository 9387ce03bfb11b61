//! Registered memory for messages, in slots of one size. Which slot is whose is the caller's to know: one that was handed to the
//! device comes back when its work request is over.

use limosa_verbs::{Access, MapError, Mapping, MemoryRegion, Piece, ProtectionDomain, RegisterError};
use std::io;
use std::sync::Arc;

/// Why there is no memory for messages.
#[derive(Debug, thiserror::Error)]
pub(super) enum BuffersError {
    #[error(transparent)]
    Map(#[from] MapError),
    #[error("memory for the messages of a lane: {0}")]
    Register(#[from] RegisterError),
}

/// Slots for messages.
#[derive(Debug)]
pub(super) struct Buffers {
    mapping: Arc<Mapping>,
    region: Arc<MemoryRegion>,
    slot_bytes: u32,
    count: u32,
    free: Vec<u32>,
}

impl Buffers {
    /// `count` free slots of `slot_bytes`; `received` says that the device writes them.
    pub(super) fn new(
        domain: &Arc<ProtectionDomain>,
        count: u32,
        slot_bytes: u32,
        received: bool,
    ) -> Result<Buffers, BuffersError> {
        let bytes = u64::from(count) * u64::from(slot_bytes);
        let mapping = Mapping::anonymous(bytes)?;
        let access = Access { local_write: received, ..Access::default() };
        let region = MemoryRegion::register(domain, &mapping, 0..bytes, access)?;
        Ok(Buffers { mapping, region, slot_bytes, count, free: (0..count).rev().collect() })
    }

    pub(super) fn count(&self) -> u32 {
        self.count
    }

    pub(super) fn slot_bytes(&self) -> u32 {
        self.slot_bytes
    }

    pub(super) fn take(&mut self) -> Option<u32> {
        self.free.pop()
    }

    pub(super) fn give(&mut self, slot: u32) {
        self.free.push(slot);
    }

    fn at(&self, slot: u32) -> u64 {
        u64::from(slot) * u64::from(self.slot_bytes)
    }

    pub(super) fn piece(&self, slot: u32, bytes: u32) -> Piece<'_> {
        Piece { region: &self.region, offset: self.at(slot), bytes: bytes.min(self.slot_bytes) }
    }

    /// Puts `message` into `slot`; its length.
    pub(super) fn put(&self, slot: u32, message: &[u8]) -> io::Result<u32> {
        match u32::try_from(message.len()) {
            Ok(bytes) if bytes <= self.slot_bytes => {
                self.mapping.write_at(self.at(slot), message).map_err(io::Error::other)?;
                Ok(bytes)
            }
            _ => Err(io::Error::other(format!("a message of {} bytes is too long for a lane", message.len()))),
        }
    }

    /// Copies the first `bytes` of `slot` into `out`.
    pub(super) fn get(&self, slot: u32, bytes: u32, out: &mut Vec<u8>) -> io::Result<()> {
        out.clear();
        out.resize(bytes.min(self.slot_bytes) as usize, 0);
        self.mapping.read_at(self.at(slot), out).map_err(io::Error::other)
    }
}
