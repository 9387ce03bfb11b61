//! What the links need beyond the engine: which links a host offers, and the keys by which a source may write straight into the
//! destination's memory. Types and their limits only; `transport/link` acts on them, the engine never looks at them.

use super::limits::{ADDRESSES_MAX, KEYS_PER_MESSAGE_MAX, NAME_BYTES_MAX, WORDS_BYTES_MAX, list, text};
use crate::memory::{MemoryMap, PAGE_BYTES, PageRange};
use serde::{Deserialize, Serialize};
use std::net::IpAddr;

/// Guest memory is opened to direct writes in chunks of this many bytes: small enough that the first pages leave soon, large
/// enough that keys and registrations are few. A region's last chunk may be smaller.
pub const CHUNK_BYTES: u64 = 16 << 20;

/// What a destination says about one of its links.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct LinkOffer {
    /// Its name: "tcp", "quic", "rdma".
    #[serde(deserialize_with = "text::<_, NAME_BYTES_MAX>")]
    pub link: String,
    /// Whether the source that asks may use it now.
    pub available: bool,
    /// Why not, where it is not; otherwise what is worth saying about it.
    #[serde(deserialize_with = "text::<_, WORDS_BYTES_MAX>")]
    pub words: String,
    /// Its port, where it is not the port of the control channel.
    pub port: Option<u16>,
    /// Addresses of its own, where it has some: an RDMA device's may be others than the agent's.
    #[serde(deserialize_with = "list::<_, _, ADDRESSES_MAX>")]
    pub addresses: Vec<LinkAddress>,
}

/// An address of a link.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct LinkAddress {
    /// The address.
    pub address: IpAddr,
    /// The largest payload of one packet on its path in bytes (for RDMA the port's active path MTU), where that is known.
    pub mtu: Option<u16>,
}

/// By this a source may write into one chunk of the destination's memory, until the destination takes it back.
#[derive(Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct MemoryKey {
    /// Which chunk, see [`chunks`].
    pub chunk: u32,
    /// What the destination's device calls the chunk's first byte.
    pub address: u64,
    /// The device's key (rkey).
    pub rkey: u32,
}

impl std::fmt::Debug for MemoryKey {
    /// Whoever has address and key may write: neither belongs into a log.
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "MemoryKey(chunk {})", self.chunk)
    }
}

/// Body of [`super::message::Message::KeysAsk`].
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct KeysAsk {
    /// The chunks whose keys are wanted, in the order in which they are.
    #[serde(deserialize_with = "list::<_, _, KEYS_PER_MESSAGE_MAX>")]
    pub chunks: Vec<u32>,
}

/// Body of [`super::message::Message::Keys`].
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Keys {
    /// The keys.
    #[serde(deserialize_with = "list::<_, _, KEYS_PER_MESSAGE_MAX>")]
    pub keys: Vec<MemoryKey>,
}

/// The chunks of a guest's memory in order; a chunk's number is its place here. None crosses the end of a region.
pub fn chunks(map: &MemoryMap) -> impl Iterator<Item = PageRange> + '_ {
    const PAGES: u64 = CHUNK_BYTES / PAGE_BYTES;
    (0..map.regions().len()).filter_map(|index| map.region_range(index)).flat_map(|region| {
        (0..region.count.div_ceil(PAGES)).map(move |number| {
            let first = region.first + number * PAGES;
            PageRange { first, count: PAGES.min(region.end() - first) }
        })
    })
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use crate::memory::{Gpa, Region};

    #[test]
    fn chunks_cover_every_page_once_and_stay_in_their_region() {
        let region = |gpa, bytes| Region { gpa: Gpa(gpa), bytes, page_bytes: 4096 };
        let map =
            MemoryMap::new(vec![region(0, 4096), region(1 << 30, 2 * CHUNK_BYTES + 8192), region(1 << 32, CHUNK_BYTES)]).unwrap();
        let all: Vec<_> = chunks(&map).collect();
        assert_eq!(all.iter().map(|chunk| chunk.count).collect::<Vec<_>>(), [1, 4096, 4096, 2, 4096]);
        assert!(all.iter().all(|chunk| map.locate(*chunk).is_some()));
        assert_eq!(all.iter().map(|chunk| chunk.bytes()).sum::<u64>(), map.bytes());
    }

    #[test]
    fn a_key_is_not_shown() {
        assert_eq!(format!("{:?}", MemoryKey { chunk: 3, address: 77, rkey: 88 }), "MemoryKey(chunk 3)");
    }
}
