//! A split virtqueue, seen from the device. Not the registers that set it up: those are in `transport.rs`.
//!
//! The rings are in guest memory and the guest may write anything at any time: every index is taken modulo the size,
//! chains end after as many descriptors as the queue has, and every access to memory is checked by vm-memory.

use std::sync::atomic::{Ordering, fence};

use serde::{Deserialize, Serialize};
use vm_memory::{Address as _, Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryRegion as _};

use crate::memory::GuestRam;

/// The most descriptors of a queue.
pub(crate) const QUEUE_SIZE_MAX: u16 = 256;

const DESCRIPTOR_NEXT: u16 = 1;
const DESCRIPTOR_WRITE: u16 = 2;
const DESCRIPTOR_INDIRECT: u16 = 4;
const DESCRIPTOR_BYTES: u64 = 16;
const AVAIL_NO_INTERRUPT: u16 = 1;

/// How a driver broke the rules of the queue.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub(crate) enum QueueError {
    #[error("a ring or descriptor at {0:#x} is not in guest memory")]
    Memory(u64),
    #[error("queue size {0} is not a power of two up to 256")]
    Size(u16),
    #[error("ring address {0:#x} is not aligned")]
    Alignment(u64),
    #[error("the driver offers {0} chains at once, more than the queue has")]
    Overrun(u16),
    #[error("descriptor {0} is beyond the queue")]
    Index(u16),
    #[error("a chain has more descriptors than the queue")]
    Loop,
    #[error("descriptor flags {0:#x} were not negotiated")]
    Flags(u16),
    #[error("a chain is longer than 4 GiB or leaves the address space")]
    Length,
    #[error("a request has no room for its header or its status")]
    Room,
}

/// A piece of a chain.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Segment {
    pub(crate) address: u64,
    pub(crate) bytes: u32,
    pub(crate) writable: bool,
}

/// A chain of descriptors taken from the queue, to be given back.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Chain {
    pub(crate) head: u16,
    pub(crate) segments: Vec<Segment>,
}

impl Chain {
    /// Copies what the driver offers to be read into `into`; how many bytes that were, or none if there is no room for them.
    pub(crate) fn read(&self, ram: &GuestRam, into: &mut [u8]) -> Result<Option<usize>, QueueError> {
        let mut bytes = 0_usize;
        for segment in self.segments.iter().filter(|segment| !segment.writable) {
            let end = bytes.saturating_add(segment.bytes as usize);
            let Some(part) = into.get_mut(bytes..end) else { return Ok(None) };
            ram.read_slice(part, GuestAddress(segment.address)).map_err(memory(segment.address))?;
            bytes = end;
        }
        Ok(Some(bytes))
    }

    /// Copies as much of `from` as there is room for to where the driver lets the device write; how many bytes that were.
    pub(crate) fn write(&self, ram: &GuestRam, from: &[u8]) -> Result<usize, QueueError> {
        let mut rest = from;
        for segment in self.segments.iter().filter(|segment| segment.writable) {
            let (part, left) = rest.split_at(rest.len().min(segment.bytes as usize));
            ram.write_slice(part, GuestAddress(segment.address)).map_err(memory(segment.address))?;
            rest = left;
        }
        Ok(from.len() - rest.len())
    }

    /// How many bytes the device may write.
    pub(crate) fn room(&self) -> usize {
        // The sum of a chain is checked to be below 4 GiB.
        self.segments.iter().filter(|segment| segment.writable).map(|segment| segment.bytes as usize).sum()
    }
}

/// A queue: as set up, and how far the device is. All of it is saved.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Queue {
    pub(crate) size: u16,
    pub(crate) ready: bool,
    pub(crate) descriptors: u64,
    pub(crate) avail: u64,
    pub(crate) used: u64,
    next_avail: u16,
    next_used: u16,
}

fn memory<E>(address: u64) -> impl FnOnce(E) -> QueueError {
    move |_| QueueError::Memory(address)
}

impl Queue {
    /// Whether size and rings are such that the device can use the queue.
    pub(crate) fn check(&self, ram: &GuestRam) -> Result<(), QueueError> {
        if !self.size.is_power_of_two() || self.size > QUEUE_SIZE_MAX {
            return Err(QueueError::Size(self.size));
        }
        let entries = u64::from(self.size);
        let rings = [
            (self.descriptors, entries * DESCRIPTOR_BYTES, 16),
            (self.avail, 6 + 2 * entries, 2),
            (self.used, 6 + 8 * entries, 4),
        ];
        for (address, bytes, alignment) in rings {
            if address % alignment != 0 {
                return Err(QueueError::Alignment(address));
            }
            let end = address.checked_add(bytes).ok_or(QueueError::Memory(address))?;
            // In one region: so no ring straddles the hole, and each index below is a single aligned access.
            let region = ram.find_region(GuestAddress(address)).ok_or(QueueError::Memory(address))?;
            if end - 1 > region.last_addr().raw_value() {
                return Err(QueueError::Memory(address));
            }
        }
        Ok(())
    }

    fn avail_index(&self, ram: &GuestRam) -> Result<u16, QueueError> {
        let index =
            u16::from_le(ram.load(GuestAddress(self.avail.wrapping_add(2)), Ordering::Acquire).map_err(memory(self.avail))?);
        let waiting = index.wrapping_sub(self.next_avail);
        if waiting > self.size { Err(QueueError::Overrun(waiting)) } else { Ok(index) }
    }

    /// Whether the driver offers a chain.
    pub(crate) fn has_chain(&self, ram: &GuestRam) -> Result<bool, QueueError> {
        Ok(self.ready && self.avail_index(ram)? != self.next_avail)
    }

    /// The next chain that the driver offers.
    pub(crate) fn pop(&mut self, ram: &GuestRam) -> Result<Option<Chain>, QueueError> {
        if !self.has_chain(ram)? {
            return Ok(None);
        }
        let slot = self.avail.wrapping_add(4 + 2 * u64::from(self.next_avail % self.size));
        let head = u16::from_le(ram.read_obj(GuestAddress(slot)).map_err(memory(slot))?);
        let segments = self.segments(ram, head)?;
        self.next_avail = self.next_avail.wrapping_add(1);
        Ok(Some(Chain { head, segments }))
    }

    fn segments(&self, ram: &GuestRam, head: u16) -> Result<Vec<Segment>, QueueError> {
        let mut segments = Vec::new();
        let mut index = head;
        let mut total = 0_u32;
        loop {
            if index >= self.size {
                return Err(QueueError::Index(index));
            }
            if segments.len() >= usize::from(self.size) {
                return Err(QueueError::Loop);
            }
            let at = self.descriptors.wrapping_add(DESCRIPTOR_BYTES * u64::from(index));
            let raw: [u8; 16] = ram.read_obj(GuestAddress(at)).map_err(memory(at))?;
            let [a0, a1, a2, a3, a4, a5, a6, a7, l0, l1, l2, l3, f0, f1, n0, n1] = raw;
            let address = u64::from_le_bytes([a0, a1, a2, a3, a4, a5, a6, a7]);
            let bytes = u32::from_le_bytes([l0, l1, l2, l3]);
            let flags = u16::from_le_bytes([f0, f1]);
            if flags & DESCRIPTOR_INDIRECT != 0 || flags & !(DESCRIPTOR_NEXT | DESCRIPTOR_WRITE) != 0 {
                return Err(QueueError::Flags(flags));
            }
            total = total.checked_add(bytes).ok_or(QueueError::Length)?;
            if !ram.check_range(GuestAddress(address), bytes as usize) {
                return Err(QueueError::Memory(address));
            }
            segments.push(Segment { address, bytes, writable: flags & DESCRIPTOR_WRITE != 0 });
            if flags & DESCRIPTOR_NEXT == 0 {
                return Ok(segments);
            }
            index = u16::from_le_bytes([n0, n1]);
        }
    }

    /// Puts the last `chains` that were taken back, as if they had not been.
    pub(crate) fn put_back(&mut self, chains: u16) {
        self.next_avail = self.next_avail.wrapping_sub(chains);
    }

    /// Gives a chain back, with so many bytes written to it.
    pub(crate) fn push_used(&mut self, ram: &GuestRam, head: u16, written: u32) -> Result<(), QueueError> {
        self.push_all_used(ram, &[(head, written)])
    }

    /// Gives chains back, each with so many bytes written to it; the driver sees all of them at once.
    pub(crate) fn push_all_used(&mut self, ram: &GuestRam, chains: &[(u16, u32)]) -> Result<(), QueueError> {
        for (head, written) in chains {
            let slot = self.used.wrapping_add(4 + 8 * u64::from(self.next_used % self.size.max(1)));
            let element = u64::from(*head) | u64::from(*written) << 32;
            ram.write_obj(element.to_le(), GuestAddress(slot)).map_err(memory(slot))?;
            self.next_used = self.next_used.wrapping_add(1);
        }
        // Release: the driver sees the elements, and the data in them, before the index.
        ram.store(self.next_used.to_le(), GuestAddress(self.used.wrapping_add(2)), Ordering::Release).map_err(memory(self.used))
    }

    /// Whether the driver wants to be interrupted for what was given back.
    pub(crate) fn wants_interrupt(&self, ram: &GuestRam) -> Result<bool, QueueError> {
        // The index that was stored must be visible before the driver's flag is read, or both sides may wait.
        fence(Ordering::SeqCst);
        let flags = u16::from_le(ram.load(GuestAddress(self.avail), Ordering::Acquire).map_err(memory(self.avail))?);
        Ok(flags & AVAIL_NO_INTERRUPT == 0)
    }
}

#[cfg(test)]
pub(crate) mod tests {
    #![allow(clippy::unwrap_used, clippy::panic)]
    use super::*;
    use crate::memory::{MemoryConfig, Ram};
    use proptest::prelude::*;

    const DESCRIPTORS: u64 = 0x1000;
    const AVAIL: u64 = 0x2000;
    const USED: u64 = 0x3000;

    fn ram() -> Ram {
        Ram::new(&MemoryConfig::new(4 << 20)).unwrap()
    }

    fn queue(size: u16) -> Queue {
        Queue { size, ready: true, descriptors: DESCRIPTORS, avail: AVAIL, used: USED, ..Default::default() }
    }

    pub(crate) fn describe(ram: &GuestRam, table: u64, index: u16, address: u64, bytes: u32, flags: u16, next: u16) {
        let at = table + 16 * u64::from(index);
        ram.write_obj(address, GuestAddress(at)).unwrap();
        ram.write_obj(bytes, GuestAddress(at + 8)).unwrap();
        ram.write_obj(flags, GuestAddress(at + 12)).unwrap();
        ram.write_obj(next, GuestAddress(at + 14)).unwrap();
    }

    fn offer(ram: &GuestRam, heads: &[u16]) {
        for (slot, head) in (0..).zip(heads) {
            ram.write_obj(*head, GuestAddress(AVAIL + 4 + 2 * slot)).unwrap();
        }
        ram.write_obj(heads.len() as u16, GuestAddress(AVAIL + 2)).unwrap();
    }

    #[test]
    fn a_chain_is_taken_and_given_back() {
        let ram = ram();
        let ram = ram.guest();
        let mut queue = queue(8);
        queue.check(ram).unwrap();
        assert_eq!(queue.pop(ram), Ok(None));
        describe(ram, DESCRIPTORS, 3, 0x10_0000, 12, DESCRIPTOR_NEXT, 5);
        describe(ram, DESCRIPTORS, 5, 0x20_0000, 100, DESCRIPTOR_WRITE, 0);
        offer(ram, &[3]);
        let chain = queue.pop(ram).unwrap().unwrap();
        let expected = [
            Segment { address: 0x10_0000, bytes: 12, writable: false },
            Segment { address: 0x20_0000, bytes: 100, writable: true },
        ];
        assert_eq!((chain.head, chain.segments.as_slice()), (3, expected.as_slice()));
        assert_eq!(queue.pop(ram), Ok(None));
        queue.push_used(ram, 3, 77).unwrap();
        assert_eq!(ram.read_obj::<u16>(GuestAddress(USED + 2)).unwrap(), 1);
        assert_eq!(ram.read_obj::<[u32; 2]>(GuestAddress(USED + 4)).unwrap(), [3, 77]);
        assert_eq!(queue.wants_interrupt(ram), Ok(true));
        ram.write_obj(1_u16, GuestAddress(AVAIL)).unwrap();
        assert_eq!(queue.wants_interrupt(ram), Ok(false));
    }

    #[test]
    fn hostile_rings_are_refused() {
        let ram = ram();
        let ram = ram.guest();
        let popped = |index: u16, flags: u16, next: u16, address: u64, bytes: u32| {
            describe(ram, DESCRIPTORS, 0, address, bytes, flags, next);
            offer(ram, &[index]);
            queue(8).pop(ram)
        };
        assert_eq!(popped(8, 0, 0, 0, 1), Err(QueueError::Index(8)));
        assert_eq!(popped(0, DESCRIPTOR_NEXT, 0, 0, 1), Err(QueueError::Loop));
        assert_eq!(popped(0, DESCRIPTOR_NEXT, 0xffff, 0, 1), Err(QueueError::Index(0xffff)));
        assert_eq!(popped(0, DESCRIPTOR_INDIRECT, 0, 0, 1), Err(QueueError::Flags(4)));
        assert_eq!(popped(0, 0, 0, 4 << 20, 1), Err(QueueError::Memory(4 << 20)));
        assert_eq!(popped(0, 0, 0, u64::MAX, 2), Err(QueueError::Memory(u64::MAX)));
        assert_eq!(popped(0, 0, 0, (4 << 20) - 1, 2), Err(QueueError::Memory((4 << 20) - 1)));
        offer(ram, &[0; 9]);
        assert_eq!(queue(8).pop(ram), Err(QueueError::Overrun(9)));
        for size in [0, 3, 512] {
            assert_eq!(queue(size).check(ram), Err(QueueError::Size(size)));
        }
        let outside = Queue { used: (4 << 20) - 8, ..queue(8) };
        assert_eq!(outside.check(ram), Err(QueueError::Memory((4 << 20) - 8)));
        let last = Queue { descriptors: u64::MAX - 15, ..queue(8) };
        assert_eq!(last.check(ram), Err(QueueError::Memory(u64::MAX - 15)));
        assert_eq!(Queue { avail: 1, ..queue(8) }.check(ram), Err(QueueError::Alignment(1)));
    }

    proptest! {
        #![proptest_config(ProptestConfig { cases: 200, failure_persistence: None, ..ProptestConfig::default() })]
        /// Whatever is in the rings, the device neither panics nor takes more than the queue holds.
        #[test]
        fn any_ring_contents_are_survived(
            table in proptest::collection::vec(any::<u8>(), 128),
            small in proptest::collection::vec(0_u8..8, 128),
            avail in proptest::collection::vec(any::<u8>(), 22),
            index in 0_u16..12,
        ) {
            let ram = ram();
            let ram = ram.guest();
            for (contents, mask) in [(&table, 0xff), (&small, 0x03)] {
                ram.write_slice(contents, GuestAddress(DESCRIPTORS)).unwrap();
                let avail: Vec<u8> = avail.iter().map(|byte| byte & mask).collect();
                ram.write_slice(&avail, GuestAddress(AVAIL)).unwrap();
                ram.write_obj(index, GuestAddress(AVAIL + 2)).unwrap();
                let mut queue = queue(8);
                let mut taken = 0;
                while let Ok(Some(chain)) = queue.pop(ram) {
                    prop_assert!(!chain.segments.is_empty() && chain.segments.len() <= 8);
                    queue.push_used(ram, chain.head, 0).unwrap();
                    taken += 1;
                }
                prop_assert!(taken <= 8);
            }
        }
    }
}
