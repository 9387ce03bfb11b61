//! Promises on dirty tracking: a copy kept by it is the guest's memory. On this host's KVM.
#![allow(clippy::unwrap_used, clippy::panic, clippy::indexing_slicing)]

mod rig;

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use limosa_machine::{DirtyError, Machine};
use rig::{CLOCKWORK, COUNTER, booted, config, has_kvm, memory, wait_until, word};

const PAGE: usize = 4096;

/// Copies the pages that are dirty; returns how many.
fn copy_dirty(machine: &Machine, copy: &mut [Vec<u8>]) -> u64 {
    let starts: Vec<u64> = machine.regions().iter().map(|region| region.gpa).collect();
    let mut pages = Vec::new();
    let mut collect = |region: usize, first: usize, words: &[u64]| {
        for (index, word) in words.iter().enumerate() {
            let bits = (0..64).filter(|bit| word >> bit & 1 == 1);
            pages.extend(bits.map(|bit| (region, (first + index) * 64 + bit)));
        }
    };
    machine.fetch_dirty(&mut collect).unwrap();
    for (region, page) in &pages {
        let at = page * PAGE;
        machine.read_memory(starts[*region] + at as u64, &mut copy[*region][at..at + PAGE]).unwrap();
    }
    pages.len() as u64
}

#[test]
fn a_copy_kept_by_dirty_pages_is_the_memory() {
    if !has_kvm() {
        return;
    }
    let machine = booted(CLOCKWORK, config(1, 32));
    machine.resume().unwrap();
    wait_until(&machine, "the guest counts", || word(&machine, COUNTER) > 100);
    machine.start_dirty_tracking().unwrap();
    machine.start_dirty_tracking().unwrap();
    let mut copy = memory(&machine);
    for round in 0..20 {
        std::thread::sleep(Duration::from_millis(20));
        machine.write_memory((24 << 20) + round * 4096 + 4000, &[round as u8 + 1; 200]).unwrap();
        let pages = copy_dirty(&machine, &mut copy);
        assert!((2..2000).contains(&pages), "{pages} pages in round {round}: neither none nor all");
    }
    machine.pause().unwrap();
    machine.save().unwrap();
    copy_dirty(&machine, &mut copy);
    for (region, (kept, now)) in copy.iter().zip(memory(&machine)).enumerate() {
        let stale = kept.chunks(PAGE).zip(now.chunks(PAGE)).position(|(kept, now)| kept != now);
        assert_eq!(stale, None, "first stale page of region {region}");
    }
    assert_eq!(copy_dirty(&machine, &mut copy), 0, "nothing is written while paused");
}

#[test]
fn tracking_can_be_stopped_and_started_again() {
    if !has_kvm() {
        return;
    }
    let machine = booted(CLOCKWORK, config(1, 16));
    assert!(matches!(machine.fetch_dirty(&mut |_, _, _| {}), Err(DirtyError::Off)));
    machine.resume().unwrap();
    for _ in 0..5 {
        machine.start_dirty_tracking().unwrap();
        let mut copy = memory(&machine);
        std::thread::sleep(Duration::from_millis(10));
        assert!(copy_dirty(&machine, &mut copy) > 0);
        machine.pause().unwrap();
        copy_dirty(&machine, &mut copy);
        assert!(copy == memory(&machine));
        machine.stop_dirty_tracking().unwrap();
        machine.resume().unwrap();
    }
}

#[test]
fn writes_of_the_vmm_are_dirty_and_bitmaps_are_checked() {
    if !has_kvm() {
        return;
    }
    let machine = Machine::new(config(1, 16)).unwrap();
    machine.write_memory(0x1000, &[1]).unwrap();
    machine.start_dirty_tracking().unwrap();
    machine.write_memory(70 * 4096 - 1, &[1, 2]).unwrap();
    let bitmap: Vec<AtomicU64> = (0..64).map(|_| AtomicU64::new(0)).collect();
    assert!(matches!(machine.fetch_dirty_into(&[]), Err(DirtyError::Bitmap { .. })));
    assert!(matches!(machine.fetch_dirty_into(&[&bitmap[..63]]), Err(DirtyError::Bitmap { .. })));
    bitmap[0].store(1, Ordering::Relaxed);
    assert_eq!(machine.fetch_dirty_into(&[&bitmap]).unwrap(), 2);
    let words: Vec<u64> = bitmap.iter().map(|word| word.load(Ordering::Relaxed)).take(3).collect();
    assert_eq!(words, [1, 0b11 << 5, 0]);
    assert_eq!(machine.fetch_dirty_into(&[&bitmap]).unwrap(), 0);
    assert!(machine.write_memory((16 << 20) - 1, &[0; 2]).is_err());
}

#[test]
fn memory_beyond_the_device_hole_is_a_region_of_its_own() {
    if !has_kvm() {
        return;
    }
    let machine = Machine::new(config(1, 5 << 10)).unwrap();
    let regions: Vec<_> = machine.regions().iter().map(|region| (region.gpa, region.bytes)).collect();
    assert_eq!(regions, [(0, 3 << 30), (4 << 30, 2 << 30)]);
    machine.start_dirty_tracking().unwrap();
    machine.write_memory((4 << 30) + (1 << 30) + 5 * 4096, b"high").unwrap();
    machine.write_memory((3 << 30) - 1, b"l").unwrap();
    assert!(machine.write_memory((3 << 30) - 1, b"lo").is_err(), "the hole is no memory");
    let mut found = Vec::new();
    let mut collect = |region: usize, first: usize, words: &[u64]| {
        let dirty = words.iter().enumerate().filter(|(_, word)| **word != 0);
        found.extend(dirty.map(|(index, word)| (region, first + index, *word)));
    };
    machine.fetch_dirty(&mut collect).unwrap();
    assert_eq!(found, [(0, (3 << 30) / 4096 / 64 - 1, 1 << 63), (1, (1 << 30) / 4096 / 64, 1 << 5)]);
}
