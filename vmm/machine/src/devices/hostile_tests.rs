//! Hostile guests: whatever is written to registers, rings and descriptors of any device, it neither panics nor hangs, and it
//! can always be paused, saved and reset. Random, by seed; a second a
//! device in the usual run, `LIMOSA_FUZZ_SECONDS` for longer (`make fuzz`). A failure prints its seed, `LIMOSA_FUZZ_SEED` repeats it.
#![allow(clippy::unwrap_used, clippy::panic, clippy::indexing_slicing, clippy::print_stdout)]
use super::balloon::Balloon;
use super::block::Block;
use super::net::Net;
use super::rng::Rng;
use super::worker::Backend;
use super::worker::tests::{Rig, base};
use crate::disk::image::Disk;
use crate::disk::{DiskConfig, DiskFormat};
use crate::tap::Tap;
use nix::sys::socket::{AddressFamily, MsgFlags, SockFlag, SockType, send, socketpair};
use std::os::fd::{AsRawFd as _, OwnedFd};
use std::time::{Duration, Instant};

/// xorshift: what is drawn must be the same on every machine.
struct Dice(u64);

impl Dice {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }

    fn below(&mut self, limit: u64) -> u64 {
        self.next() % limit
    }

    fn one_of<T: Copy>(&mut self, list: &[T]) -> T {
        list[self.below(list.len() as u64) as usize]
    }

    /// An address: mostly in memory (4 MiB), at times at its edges, or anywhere.
    fn address(&mut self) -> u64 {
        match self.below(8) {
            0 => self.next(),
            1 => (4 << 20) - self.below(64),
            2 => self.below(64),
            3 => base(self.below(3)) + self.below(0x3000),
            _ => 0x10_0000 + self.below(0x20_0000),
        }
    }

    fn length(&mut self) -> u32 {
        match self.below(6) {
            0 => self.next() as u32,
            1 => self.one_of(&[0, 1, 11, 12, 16, 17, 512, 4096, 65_535, 65_536, 0x7fff_ffff, u32::MAX]),
            _ => self.below(3000) as u32,
        }
    }
}

/// One thing that a hostile driver does.
fn act(dice: &mut Dice, rig: &Rig, queues: u64) {
    let queue = dice.below(queues);
    match dice.below(12) {
        0..4 => {
            let flags = if dice.below(10) == 0 { dice.next() as u16 } else { dice.below(4) as u16 };
            let next = if dice.below(10) == 0 { dice.next() as u16 } else { dice.below(8) as u16 };
            let at = base(queue) + 16 * dice.below(8);
            let mut descriptor = dice.address().to_le_bytes().to_vec();
            descriptor.extend(dice.length().to_le_bytes());
            descriptor.extend(flags.to_le_bytes());
            descriptor.extend(next.to_le_bytes());
            rig.write(at, &descriptor);
        }
        // What a request to a disk looks like, among other things.
        4 => {
            let mut header = (dice.below(16) as u32).to_le_bytes().to_vec();
            header.extend([0; 4]);
            header.extend(dice.one_of(&[0, 1, 7, 8, u64::MAX, u64::MAX / 512, dice.0]).to_le_bytes());
            rig.write(0x10_0000 + dice.below(0x20_0000), &header);
        }
        5..8 => {
            let slot = dice.below(8) as u16;
            rig.write(base(queue) + 0x1004 + 2 * u64::from(slot), &(dice.below(10) as u16).to_le_bytes());
            let index = if dice.below(20) == 0 { dice.next() as u16 } else { rig.used(queue).wrapping_add(dice.below(8) as u16) };
            rig.write(base(queue) + 0x1002, &index.to_le_bytes());
        }
        8 | 9 => rig.device.mmio_write(0x50, &(dice.below(5) as u32).to_le_bytes()),
        10 => {
            let offset =
                dice.one_of(&[0x14, 0x20, 0x24, 0x30, 0x38, 0x44, 0x64, 0x70, 0x80, 0x84, 0x90, 0x94, 0xa0, 0xa4, 0xfc, 0x100]);
            let value = if dice.below(2) == 0 { dice.next() as u32 } else { dice.below(16) as u32 };
            let bytes = dice.one_of(&[1, 2, 4, 4, 4, 4, 8]);
            rig.device.mmio_write(offset + dice.below(3), &u64::from(value).to_le_bytes()[..bytes]);
        }
        _ => {
            let mut data = [0; 8];
            let offset = dice.below(0x1100);
            rig.device.mmio_read(offset, &mut data[..1 << dice.below(4)]);
        }
    }
}

/// After anything, the device still does what an operator needs: pausing, saving, loading, and a reset by the guest.
fn still_sound(rig: &Rig, dice: &mut Dice, seed: u64) {
    rig.device.begin_pause();
    assert!(rig.device.wait_parked(), "seed {seed}: the device does not pause");
    let mut saved = postcard::to_allocvec(&rig.device.save()).unwrap();
    if dice.below(2) == 0 {
        // A peer's record with a changed byte: refused or taken, but nothing worse.
        let at = dice.below(saved.len() as u64) as usize;
        saved[at] ^= 1 << dice.below(8);
    }
    if let Ok(record) = postcard::from_bytes(&saved) {
        let _ = rig.device.load(record);
    }
    rig.device.arrived();
    while rig.events.try_recv().is_some() {}
    rig.set_up(if dice.below(4) == 0 { dice.next() | 1 << 32 } else { u64::MAX });
    rig.device.resume();
}

fn seconds() -> Duration {
    let seconds = std::env::var("LIMOSA_FUZZ_SECONDS").ok().and_then(|text| text.parse().ok());
    Duration::from_secs(seconds.unwrap_or(1))
}

fn first_seed() -> u64 {
    let given = std::env::var("LIMOSA_FUZZ_SEED").ok().and_then(|text| text.parse().ok());
    // Another one in each run: what one run misses, the next may find, and says its seed.
    given.unwrap_or_else(|| u64::from(std::process::id()) << 32 | 1)
}

/// Runs for the usual time; `feed` gives the device work from the host's side.
fn torment(name: &str, backend: Box<dyn Backend>, mut feed: impl FnMut(&mut Dice)) {
    let queues = backend.model().queues as u64;
    let Some(rig) = Rig::new(backend) else { return };
    let until = Instant::now() + seconds();
    let (mut seed, mut acts) = (first_seed(), 0_u64);
    println!("{name}: from seed {seed}");
    rig.device.resume();
    while Instant::now() < until {
        let mut dice = Dice(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1);
        for _ in 0..200 {
            act(&mut dice, &rig, queues);
            if dice.below(20) == 0 {
                feed(&mut dice);
            }
            acts += 1;
        }
        still_sound(&rig, &mut dice, seed);
        seed += 1;
    }
    println!("{name}: {acts} acts, up to seed {seed}");
    assert!(acts >= 200);
}

fn wire() -> (Tap, OwnedFd) {
    let (ours, wire) = socketpair(AddressFamily::Unix, SockType::SeqPacket, None, SockFlag::SOCK_CLOEXEC).unwrap();
    (Tap::from_fd(ours, "net0").unwrap(), wire)
}

#[test]
fn a_network_card_survives_any_driver() {
    let (tap, wire) = wire();
    torment("net", Box::new(Net::new([2, 0, 0, 0, 0, 1], 1500, tap, true)), move |dice| {
        let bytes = dice.one_of(&[1, 12, 26, 60, 1500, 9000, 65_000]);
        let _ = send(wire.as_raw_fd(), &vec![7; bytes], MsgFlags::MSG_DONTWAIT);
        let mut frame = vec![0; 70_000];
        let _ = nix::sys::socket::recv(wire.as_raw_fd(), &mut frame, MsgFlags::MSG_DONTWAIT);
    });
}

#[test]
fn a_disk_survives_any_driver() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("disk.raw");
    std::fs::File::create(&path).unwrap().set_len(8 * 512).unwrap();
    let format = Some(DiskFormat::Raw);
    let disk = Disk::open(DiskConfig { path: path.clone(), format, readonly: false, serial: "s".into(), resolved: false });
    let disk = std::sync::Arc::new(disk.unwrap());
    disk.take(Duration::ZERO).unwrap();
    torment("disk", Box::new(Block::new(disk)), |_| {});
    assert_eq!(std::fs::metadata(&path).unwrap().len(), 8 * 512, "nothing grows");
}

#[test]
fn a_random_source_survives_any_driver() {
    torment("rng", Box::new(Rng::new().unwrap()), |_| {});
}

#[test]
fn a_balloon_survives_any_driver() {
    torment("balloon", Box::new(Balloon), |_| {});
}
