//! A virtio balloon, mostly for free page reporting: pages that the guest says are free are given back to the host, and so
//! need not travel. Not a policy: nobody asks the guest for memory.
//!
//! A page is given back by making a hole in its memfd; whoever touches it next gets a page of zeros. While dirty pages are
//! tracked nothing is given back: links may have pinned the pages that they send, and a hole would part them from the guest's.

use super::queue::{Chain, QueueError};
use super::worker::{Backend, Model, Shared, Turn};
use crate::memory::PAGE_BYTES;

const DEVICE_ID: u32 = 5;
const FEATURE_DEFLATE_ON_OOM: u64 = 1 << 2;
const FEATURE_REPORTING: u64 = 1 << 5;
const INFLATE: usize = 0;
const DEFLATE: usize = 1;
/// The driver leaves out the queues of features that are not offered.
const REPORTING: usize = 2;
/// Chains taken in one turn: a report has at most 32 ranges, each of some MiB.
const TURN_CHAINS_MAX: usize = 4;
/// Page numbers in one chain of the inflate queue: Linux sends 256.
const NUMBERS_BYTES_MAX: usize = 4 * 1024;

/// The balloon.
#[derive(Debug)]
pub(crate) struct Balloon;

impl Balloon {
    /// The guest says that it does not need these pages.
    fn free(shared: &Shared, queue: usize, chain: &Chain) -> Result<(), QueueError> {
        match queue {
            REPORTING => {
                for segment in chain.segments.iter().filter(|segment| segment.writable) {
                    shared.backing().give_back(segment.address, u64::from(segment.bytes));
                }
            }
            INFLATE => {
                let mut numbers = [0; NUMBERS_BYTES_MAX];
                let bytes = chain.read(shared.ram(), &mut numbers)?.unwrap_or(0);
                for number in numbers.get(..bytes).unwrap_or_default().chunks_exact(4) {
                    let number = number.iter().rev().fold(0_u64, |value, byte| value << 8 | u64::from(*byte));
                    shared.backing().give_back(number * PAGE_BYTES, PAGE_BYTES);
                }
            }
            // Deflating needs nothing: a page comes back when it is touched.
            _ => {}
        }
        Ok(())
    }
}

impl Backend for Balloon {
    fn model(&self) -> Model {
        // Pages wanted (none), and pages in the balloon, which the driver tells.
        Model {
            device_id: DEVICE_ID,
            features: FEATURE_DEFLATE_ON_OOM | FEATURE_REPORTING,
            config: vec![0; 8],
            config_writable: 4..8,
            queues: 3,
        }
    }

    fn turn(&mut self, shared: &Shared) -> Result<Turn, QueueError> {
        let mut more = false;
        for index in [INFLATE, DEFLATE, REPORTING] {
            for done in 0..=TURN_CHAINS_MAX {
                // The registers' lock is not held while holes are made: that takes long for the host's memory manager.
                let (chain, resets) = {
                    let mut transport = shared.transport();
                    let resets = transport.resets();
                    let Some(queue) = transport.queues.get_mut(index) else { break };
                    if done == TURN_CHAINS_MAX {
                        more |= queue.has_chain(shared.ram())?;
                        break;
                    }
                    let Some(chain) = queue.pop(shared.ram())? else { break };
                    (chain, resets)
                };
                Self::free(shared, index, &chain)?;
                let mut transport = shared.transport();
                if transport.resets() != resets {
                    return Ok(Turn::More);
                }
                if let Some(queue) = transport.queues.get_mut(index) {
                    queue.push_used(shared.ram(), chain.head, 0)?;
                }
                shared.interrupt_for_used(&mut transport, index..index + 1);
            }
        }
        Ok(if more { Turn::More } else { Turn::Idle })
    }

    fn takes_config(&self, ours: &[u8], theirs: &[u8]) -> bool {
        ours.len() == theirs.len()
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::panic)]
    use super::*;
    use crate::devices::worker::tests::{BUFFERS, Rig};

    #[test]
    fn free_pages_become_holes_unless_pages_are_tracked() {
        let Some(rig) = Rig::new(Box::new(Balloon)) else { return };
        rig.device.resume();
        let free = BUFFERS + 0x8_0000;
        let mut slot = 0;
        let mut report = |at: u64, bytes: u32| {
            rig.write(free, &[7; 8192]);
            rig.describe(2, 0, at, bytes, true, None);
            rig.offer(2, slot, 0);
            slot += 1;
            rig.wait_used(2, slot);
            (rig.read(free, 1)[0], rig.read(free + 4096, 1)[0])
        };
        assert_eq!(report(free, 8192), (0, 0));
        assert_eq!(report(free, 4096), (0, 7));
        assert_eq!(report(free + 1, 8191), (7, 0), "only whole pages");
        rig.ram().hold_back(true);
        assert_eq!(report(free, 8192), (7, 7), "not while pages are tracked");
        rig.ram().hold_back(false);
        assert_eq!(report(free, 8192), (0, 0));
        rig.write(BUFFERS, &[(free >> 12).to_le_bytes()[0], (free >> 12).to_le_bytes()[1], 0, 0, 0xff, 0xff, 0xff, 0xff]);
        rig.write(free, &[7; 4096]);
        rig.describe(0, 0, BUFFERS, 8, false, None);
        rig.offer(0, 0, 0);
        rig.wait_used(0, 1);
        assert_eq!(rig.read(free, 1), [0], "and a number beyond memory does no harm");
    }
}
