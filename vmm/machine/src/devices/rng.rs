//! A virtio source of random bytes: those of the host's kernel. Not a generator of its own.

use std::fs::File;
use std::io::Read;

use super::queue::QueueError;
use super::worker::{Backend, Model, Shared, Turn};

const DEVICE_ID: u32 = 4;
/// Bytes given for one chain at most: a driver asks for 64 at a time, and whoever asks for more gets some.
const CHAIN_BYTES_MAX: usize = 4096;
/// Chains answered in one turn.
const TURN_CHAINS_MAX: usize = 16;

/// The source.
#[derive(Debug)]
pub(crate) struct Rng {
    random: File,
}

impl Rng {
    /// Opens the kernel's source.
    pub(crate) fn new() -> std::io::Result<Self> {
        Ok(Self { random: File::open("/dev/urandom")? })
    }
}

impl Backend for Rng {
    fn model(&self) -> Model {
        Model { device_id: DEVICE_ID, features: 0, config: Vec::new(), config_writable: 0..0, queues: 1 }
    }

    fn turn(&mut self, shared: &Shared) -> Result<Turn, QueueError> {
        let ram = shared.ram();
        let mut transport = shared.transport();
        let mut bytes = [0; CHAIN_BYTES_MAX];
        let mut turn = Turn::More;
        let mut moved = false;
        for _ in 0..TURN_CHAINS_MAX {
            let Some(queue) = transport.queues.first_mut() else { return Ok(Turn::Idle) };
            let Some(chain) = queue.pop(ram)? else {
                turn = Turn::Idle;
                break;
            };
            let part = bytes.get_mut(..chain.room().min(CHAIN_BYTES_MAX)).unwrap_or_default();
            let written = match self.random.read_exact(part) {
                Ok(()) => chain.write(ram, part)?,
                Err(_) => 0,
            };
            queue.push_used(ram, chain.head, u32::try_from(written).unwrap_or(0))?;
            moved = true;
        }
        if moved {
            shared.interrupt_for_used(&mut transport, 0..1);
        }
        Ok(turn)
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::panic)]
    use super::*;
    use crate::devices::worker::tests::{BUFFERS, Rig};

    #[test]
    fn bytes_are_given_and_not_too_many() {
        let Some(rig) = Rig::new(Box::new(Rng::new().unwrap())) else { return };
        rig.device.resume();
        rig.describe(0, 0, BUFFERS, 64, true, None);
        rig.describe(0, 1, BUFFERS + 0x1000, 70_000, true, None);
        rig.describe(0, 2, BUFFERS, 64, false, None);
        for (slot, head) in [(0, 0), (1, 1), (2, 2)] {
            rig.offer(0, slot, head);
        }
        rig.wait_used(0, 3);
        assert_eq!([rig.used_element(0, 0), rig.used_element(0, 1), rig.used_element(0, 2)], [[0, 64], [1, 4096], [2, 0]]);
        assert_ne!(rig.read(BUFFERS, 64), vec![0; 64]);
    }
}
