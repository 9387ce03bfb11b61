//! Tests of the disk, whose driver is the test.
#![allow(clippy::unwrap_used, clippy::panic, clippy::indexing_slicing)]
use super::*;
use crate::devices::worker::tests::{BUFFERS, Rig, base};
use crate::disk::DiskConfig;
use crate::event::MachineEvent;
use proptest::prelude::*;
use std::path::Path;

const DISK_BYTES: u64 = 8 << 20;
const DATA: u64 = BUFFERS + 0x1000;
const STATUS: u64 = BUFFERS + 0x800;

fn disk(dir: &Path, readonly: bool) -> Arc<Disk> {
    let path = dir.join("disk.raw");
    std::fs::File::options().write(true).create(true).truncate(false).open(&path).unwrap().set_len(DISK_BYTES).unwrap();
    let format = Some(DiskFormat::Raw);
    Arc::new(Disk::open(DiskConfig { path, format, readonly, serial: "disk-7".into(), resolved: false }).unwrap())
}

fn rig(disk: &Arc<Disk>) -> Option<Rig> {
    let rig = Rig::new(Box::new(Block::new(Arc::clone(disk))))?;
    rig.device.may_resume().unwrap();
    rig.device.resume();
    Some(rig)
}

/// Offers one request as the `slot`-th; data is at `DATA`.
fn offer(rig: &Rig, slot: u16, kind: u32, sector: u64, data: u32, writable: bool) {
    rig.write(BUFFERS, &[&kind.to_le_bytes()[..], &[0; 4], &sector.to_le_bytes()].concat());
    rig.write(STATUS, &[0xee]);
    rig.describe(0, 0, BUFFERS, 16, false, Some(if data > 0 { 1 } else { 2 }));
    rig.describe(0, 1, DATA, data, writable, Some(2));
    rig.describe(0, 2, STATUS, 1, true, None);
    rig.offer(0, slot, 0);
}

/// A request's status, and how many bytes the device says it wrote.
fn ask(rig: &Rig, slot: u16, kind: u32, sector: u64, data: u32, writable: bool) -> (u8, u32) {
    offer(rig, slot, kind, sector, data, writable);
    rig.wait_used(0, slot + 1);
    (rig.read(STATUS, 1)[0], rig.used_element(0, u64::from(slot) % 8)[1])
}

#[test]
fn requests_reach_the_image() {
    let dir = tempfile::tempdir().unwrap();
    let disk = disk(dir.path(), false);
    let Some(rig) = rig(&disk) else { return };
    rig.write(DATA, &[5; 8192]);
    assert_eq!(ask(&rig, 0, 1, 16, 8192, false), (0, 1));
    assert_eq!(ask(&rig, 1, 4, 0, 0, false), (0, 1));
    rig.write(DATA, &[0; 8192]);
    assert_eq!(ask(&rig, 2, 0, 15, 1024, true), (0, 1025));
    assert_eq!((rig.read(DATA, 512), rig.read(DATA + 512, 512)), (vec![0; 512], vec![5; 512]));
    assert_eq!(ask(&rig, 3, 8, 0, 20, true), (0, 21));
    assert_eq!(rig.read(DATA, 20), *b"disk-7\0\0\0\0\0\0\0\0\0\0\0\0\0\0");
    let range = |sector: u64, sectors: u32| [&sector.to_le_bytes()[..], &sectors.to_le_bytes()[..], &[0; 4]].concat();
    rig.write(DATA, &range(17, 1));
    assert_eq!(ask(&rig, 4, 13, 0, 16, false), (0, 1));
    rig.write(DATA, &range(24, 8));
    assert_eq!(ask(&rig, 5, 11, 0, 16, false), (0, 1));
    assert_eq!(ask(&rig, 6, 0, DISK_BYTES / 512, 512, true), (1, 1), "beyond the end");
    assert_eq!(ask(&rig, 7, 99, 0, 512, true), (2, 1), "no such request");
    assert_eq!(ask(&rig, 8, 0, 16, 1024, true), (0, 1025));
    assert_eq!((rig.read(DATA, 512), rig.read(DATA + 512, 512)), (vec![5; 512], vec![0; 512]));
    assert_eq!(rig.read_register(0x100), (DISK_BYTES / 512) as u32);
    let file = std::fs::read(dir.path().join("disk.raw")).unwrap();
    assert_eq!((file[16 * 512], file[17 * 512], file[18 * 512]), (5, 0, 5));
}

#[test]
fn a_pause_waits_for_the_request_in_hand_and_the_rest_waits_in_the_ring() {
    let dir = tempfile::tempdir().unwrap();
    let disk = disk(dir.path(), false);
    let Some(rig) = rig(&disk) else { return };
    assert_eq!(ask(&rig, 0, 0, 0, 512, true), (0, 513));
    rig.device.begin_pause();
    assert!(rig.device.wait_parked());
    disk.give_up().unwrap();
    rig.write(DATA, &[9; 512]);
    offer(&rig, 1, 1, 3, 512, false);
    std::thread::sleep(Duration::from_millis(20));
    assert_eq!((rig.used(0), rig.read(STATUS, 1)), (1, vec![0xee]), "nothing is done while paused");
    // Another host has the image, and this one must not go on.
    let other = self::disk(dir.path(), false);
    other.take(Duration::ZERO).unwrap();
    other.write(&[7; 512], 2 * 512).unwrap();
    let words = rig.device.may_resume().unwrap_err();
    assert!(words.contains("is locked by process"), "{words}");
    other.give_up().unwrap();
    rig.device.may_resume().unwrap();
    rig.move_to_itself();
    rig.wait_used(0, 2);
    assert_eq!(rig.read(STATUS, 1), [0]);
    assert_eq!(ask(&rig, 2, 0, 2, 1024, true), (0, 1025));
    assert_eq!((rig.read(DATA, 512), rig.read(DATA + 512, 512)), (vec![7; 512], vec![9; 512]));
}

#[test]
fn an_image_in_trouble_is_told_of_and_the_guest_gets_an_error() {
    let dir = tempfile::tempdir().unwrap();
    let disk = disk(dir.path(), false);
    let Some(rig) = rig(&disk) else { return };
    disk.give_up().unwrap();
    for slot in 0..5 {
        assert_eq!(ask(&rig, slot, 1, 0, 512, false), (1, 1));
    }
    let Some(MachineEvent::DeviceBroken { reason, .. }) = rig.events.try_recv() else { panic!("no event") };
    assert!(reason.contains("it was given up to another host"), "{reason}");
    assert_eq!(rig.events.try_recv(), None, "once a second is enough");
    disk.take(Duration::ZERO).unwrap();
    assert_eq!(ask(&rig, 5, 1, 0, 512, false), (0, 1));
}

#[test]
fn a_disk_that_is_only_read_says_so_and_is_not_written() {
    let dir = tempfile::tempdir().unwrap();
    drop(disk(dir.path(), false));
    let disk = disk(dir.path(), true);
    let Some(rig) = rig(&disk) else { return };
    rig.write(DATA, &[1; 512]);
    for (slot, kind) in [(0, 1), (1, 11), (2, 13)] {
        assert_eq!(ask(&rig, slot, kind, 0, 512, false), (1, 1));
    }
    assert_eq!(ask(&rig, 3, 0, 0, 512, true), (0, 513));
    assert_eq!(ask(&rig, 4, 4, 0, 0, false), (0, 1));
    assert_ne!(rig.read_register(0x10) & FEATURE_RO as u32, 0);
    assert_eq!(std::fs::read(dir.path().join("disk.raw")).unwrap()[..512], [0; 512]);
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 60, failure_persistence: None, ..ProptestConfig::default() })]
    /// Whatever is in ring, descriptors and headers: no panic, and the device works after a reset.
    #[test]
    fn any_ring_and_header_are_survived(
        table in proptest::collection::vec(any::<u8>(), 128),
        plausible in proptest::collection::vec((0_u64..4, 0_u32..3000, 0_u16..4, 0_u16..9), 8),
        header in proptest::collection::vec(0_u8..14, 16),
        heads in proptest::collection::vec(0_u16..9, 8),
    ) {
        let dir = tempfile::tempdir().unwrap();
        let disk = disk(dir.path(), false);
        let Some(rig) = rig(&disk) else { return Ok(()) };
        for noise in [false, true] {
            rig.write(BUFFERS, &header);
            for (index, (page, bytes, flags, next)) in (0..).zip(&plausible) {
                rig.describe(0, index, BUFFERS + page * 0x1000, *bytes, flags & 2 != 0, Some(*next).filter(|_| flags & 1 != 0));
            }
            if noise {
                rig.write(base(0), &table);
            }
            for (slot, head) in (0..).zip(&heads) {
                rig.offer(0, slot, *head);
            }
            rig.device.begin_pause();
            prop_assert!(rig.device.wait_parked());
            rig.set_up(u64::MAX);
            rig.write(base(0) + 0x1002, &[0; 2]);
            rig.write(base(0) + 0x2002, &[0; 2]);
            rig.device.resume();
            prop_assert_eq!(ask(&rig, 0, 0, 0, 512, true), (0, 513));
        }
    }
}
