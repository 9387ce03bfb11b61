//! Tests of the network card as its driver and its TAP see it, without a guest. The TAP is one end of a socket pair, or real.
#![allow(clippy::unwrap_used, clippy::panic, clippy::indexing_slicing)]
use super::*;
use crate::devices::worker::tests::{BUFFERS, Rig, base};
use crate::memory::take_vmm_writes;
use nix::sys::socket::{AddressFamily, MsgFlags, SockFlag, SockType, recv, send, socketpair};
use nix::sys::time::{TimeVal, TimeValLike};
use std::os::fd::OwnedFd;
use std::time::Duration;
use vm_memory::GuestMemoryBackend;

const RX: u64 = RECEIVE as u64;
const TX: u64 = TRANSMIT as u64;
const CTRL: u64 = CONTROL as u64;

/// A card whose TAP is a socket, and the wire's end of that.
fn rig(features: u64) -> Option<(Rig, OwnedFd)> {
    let (ours, wire) = socketpair(AddressFamily::Unix, SockType::SeqPacket, None, SockFlag::SOCK_CLOEXEC).unwrap();
    let second = TimeVal::seconds(5);
    nix::sys::socket::setsockopt(&wire, nix::sys::socket::sockopt::ReceiveTimeout, &second).unwrap();
    let tap = Tap::from_fd(ours, "net0").unwrap();
    let rig = Rig::new(Box::new(Net::new([2, 0, 0, 0, 0, 1], 1500, tap, true)))?;
    rig.set_up(features | 1 << 32);
    Some((rig, wire))
}

fn put(wire: &OwnedFd, frame: &[u8]) {
    send(wire.as_raw_fd(), frame, MsgFlags::empty()).unwrap();
}

fn get(wire: &OwnedFd) -> Vec<u8> {
    let mut frame = vec![0; FRAME_BYTES_MAX];
    let bytes = recv(wire.as_raw_fd(), &mut frame, MsgFlags::empty()).unwrap();
    frame.truncate(bytes);
    frame
}

#[test]
fn frames_pass_both_ways_and_pages_are_dirty() {
    let Some((rig, wire)) = rig(FEATURE_MAC) else { return };
    let ram = rig.ram().guest();
    rig.device.resume();
    rig.describe(RX, 2, BUFFERS, 12, true, Some(3));
    rig.describe(RX, 3, BUFFERS + 0x5000, 2000, true, None);
    rig.offer(RX, 0, 2);
    take_vmm_writes(ram.iter().next().unwrap());
    let frame: Vec<u8> = (0..112).collect();
    put(&wire, &frame);
    rig.wait_used(RX, 1);
    assert_eq!(rig.used_element(RX, 0), [2, 112]);
    assert_eq!(rig.read(BUFFERS, 12), [0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1, 0]);
    assert_eq!(rig.read(BUFFERS + 0x5000, 100), frame[12..]);
    let words = take_vmm_writes(ram.iter().next().unwrap());
    assert_eq!((words[0], words[4]), (1 << 3, 1 | 1 << 5), "used ring and both buffers");

    // What others say in the guest's name is not for it.
    rig.describe(RX, 0, BUFFERS, 2000, true, None);
    rig.offer(RX, 1, 0);
    put(&wire, &[&[0; 12][..], &[0xff; 6], &[2, 0, 0, 0, 0, 1], &[0; 50]].concat());
    put(&wire, &[9; 90]);
    rig.wait_used(RX, 2);
    assert_eq!(rig.used_element(RX, 1), [0, 90]);

    rig.write(BUFFERS, &[0xff; 12]);
    rig.describe(TX, 0, BUFFERS, 12, false, Some(1));
    rig.describe(TX, 1, BUFFERS + 0x5000, 100, false, None);
    rig.offer(TX, 0, 0);
    let got = get(&wire);
    assert_eq!(got[..12], [0; 12], "the guest's header is not believed");
    assert_eq!(got[12..], frame[12..]);
    rig.wait_used(TX, 1);
}

#[test]
fn nothing_passes_while_parked_and_all_of_it_afterwards() {
    let Some((rig, wire)) = rig(FEATURE_MAC) else { return };
    for round in 0..50_u16 {
        rig.describe(RX, 0, BUFFERS, 2000, true, None);
        rig.describe(TX, 0, BUFFERS + 0x5000, 60, false, None);
        rig.device.begin_pause();
        assert!(rig.device.wait_parked());
        put(&wire, &[7; 80]);
        rig.offer(RX, round, 0);
        rig.offer(TX, round, 0);
        std::thread::sleep(Duration::from_micros(300));
        assert_eq!((rig.used(RX), rig.used(TX)), (round, round), "a parked card leaves memory alone");
        rig.move_to_itself();
        rig.wait_used(RX, round + 1);
        rig.wait_used(TX, round + 1);
        assert_eq!(get(&wire).len(), 60);
    }
}

#[test]
fn a_driver_that_breaks_the_rules_stops_its_card_only() {
    let Some((rig, wire)) = rig(FEATURE_MAC) else { return };
    rig.device.resume();
    let hostile: [&dyn Fn(); 4] = [
        &|| rig.describe(TX, 0, 0xffff_ffff_ffff_fff0, 64, false, None),
        &|| rig.describe(TX, 0, BUFFERS, 64, false, Some(0)),
        &|| rig.describe(TX, 0, BUFFERS, 64, false, Some(99)),
        &|| rig.write(base(TX) + 0x1002, &999_u16.to_le_bytes()),
    ];
    for (round, set) in hostile.iter().enumerate() {
        for queue in [RX, TX] {
            rig.write(base(queue) + 0x1000, &[0; 0x40]);
            rig.write(base(queue) + 0x2000, &[0; 0x40]);
        }
        set();
        if round == 3 {
            rig.device.mmio_write(0x50, &1_u32.to_le_bytes());
        } else {
            rig.offer(TX, 0, 0);
        }
        let event = rig.events.recv_timeout(Duration::from_secs(5));
        assert!(matches!(event, Some(crate::event::MachineEvent::DeviceBroken { .. })), "round {round}: {event:?}");
        assert_eq!(rig.read_register(0x70) & 64, 64, "the driver is told that the device needs a reset");
        rig.device.mmio_write(0x70, &0_u32.to_le_bytes());
        rig.write(base(TX) + 0x1000, &[0; 0x40]);
        rig.set_up(FEATURE_MAC | 1 << 32);
        assert_eq!(rig.read_register(0x70), 15, "and can do that");
    }
    // Oversized and tiny frames are dropped; the queue goes on.
    for (round, bytes) in [(0, 70_000), (1, 20), (2, 60)] {
        rig.describe(TX, 0, BUFFERS, bytes, false, None);
        rig.offer(TX, round, 0);
        rig.wait_used(TX, round + 1);
    }
    assert_eq!(get(&wire).len(), 60, "only the good frame was sent");
    // A frame larger than its buffer is dropped, not cut, and touches nothing beyond the buffer.
    rig.describe(RX, 0, BUFFERS + 0x8000, 50, true, None);
    rig.offer(RX, 0, 0);
    put(&wire, &[7; 100]);
    rig.wait_used(RX, 1);
    assert_eq!(rig.used_element(RX, 0), [0, 0]);
    assert_eq!(rig.read(BUFFERS + 0x8000 + 50, 1), [0]);
}

#[test]
fn a_frame_takes_as_many_buffers_as_it_needs_or_waits_and_moves() {
    let Some((rig, wire)) = rig(FEATURE_MAC | FEATURE_MRG_RXBUF) else { return };
    rig.device.resume();
    let frame: Vec<u8> = (0..4000_u32).map(|index| index as u8).collect();
    for head in 0..3 {
        rig.describe(RX, head, BUFFERS + 0x2000 * u64::from(head), 1500, true, None);
    }
    rig.offer(RX, 0, 0);
    put(&wire, &frame);
    // One buffer is not enough: the frame waits, here and wherever the guest goes.
    std::thread::sleep(Duration::from_millis(20));
    assert_eq!(rig.used(RX), 0);
    rig.move_to_itself();
    rig.offer(RX, 1, 1);
    rig.offer(RX, 2, 2);
    rig.wait_used(RX, 3);
    let used: Vec<_> = (0..3).map(|slot| rig.used_element(RX, slot)).collect();
    assert_eq!(used, [[0, 1500], [1, 1500], [2, 1000]]);
    assert_eq!(rig.read(BUFFERS + 10, 2), [3, 0], "the header says how many buffers");
    let mut got = rig.read(BUFFERS, 1500);
    got.extend(rig.read(BUFFERS + 0x2000, 1500));
    got.extend(rig.read(BUFFERS + 0x4000, 1000));
    assert_eq!(got[12..], frame[12..]);
    // A frame that all buffers of the queue could not hold is lost, and the queue goes on.
    for (slot, head) in (3..11).zip(0..8) {
        rig.describe(RX, head, BUFFERS + 0x2000 * u64::from(head), 100, true, None);
        rig.offer(RX, slot, head);
    }
    put(&wire, &frame);
    rig.wait_used(RX, 11);
    rig.describe(RX, 0, BUFFERS, 1500, true, None);
    rig.offer(RX, 11, 0);
    put(&wire, &frame[..60]);
    rig.wait_used(RX, 12);
    assert_eq!(rig.used_element(RX, 3), [0, 60]);
}

#[test]
fn what_waits_in_the_tap_moves_with_the_guest_in_order() {
    let Some((rig, wire)) = rig(FEATURE_MAC | FEATURE_MRG_RXBUF) else { return };
    rig.device.begin_pause();
    assert!(rig.device.wait_parked());
    for number in 0..5_u8 {
        put(&wire, &[number; 60 + 4]);
    }
    let saved = postcard::to_allocvec(&rig.device.save()).unwrap();
    // The TAP is empty now: all of it is in the record, and in the device, should the guest stay.
    rig.device.load(postcard::from_bytes(&saved).unwrap()).unwrap();
    put(&wire, &[5; 64]);
    for slot in 0..6 {
        rig.describe(RX, slot, BUFFERS + 0x1000 * u64::from(slot), 1500, true, None);
        rig.offer(RX, slot, slot);
    }
    rig.device.resume();
    rig.wait_used(RX, 6);
    let got: Vec<u8> = (0..6).map(|slot| rig.read(BUFFERS + 0x1000 * slot + 20, 1)[0]).collect();
    assert_eq!(got, [0, 1, 2, 3, 4, 5]);
}

#[test]
fn a_guest_that_arrived_is_asked_to_announce_itself_until_it_says_so() {
    let Some((rig, _wire)) = rig(FEATURE_CTRL_VQ | FEATURE_GUEST_ANNOUNCE | FEATURE_STATUS) else { return };
    rig.device.resume();
    let status = || {
        let mut status = [0; 2];
        rig.device.mmio_read(0x106, &mut status);
        status
    };
    assert_eq!(status(), [1, 0]);
    let generation = rig.read_register(0xfc);
    rig.move_to_itself();
    assert_eq!((status(), rig.read_register(0x60) & 2), ([3, 0], 2), "link up, announce; the configuration changed");
    assert_ne!(rig.read_register(0xfc), generation);
    for (round, (command, answer)) in [([9, 9], 1), ([3, 0], 0)].into_iter().enumerate() {
        rig.write(BUFFERS, &command);
        rig.describe(CTRL, 0, BUFFERS, 2, false, Some(1));
        rig.describe(CTRL, 1, BUFFERS + 0x100, 1, true, None);
        rig.offer(CTRL, round as u16, 0);
        rig.wait_used(CTRL, round as u16 + 1);
        assert_eq!(rig.read(BUFFERS + 0x100, 1), [answer]);
    }
    assert_eq!(status(), [1, 0]);
    // A driver that did not choose the feature is not asked.
    rig.set_up(FEATURE_STATUS | 1 << 32);
    rig.move_to_itself();
    assert_eq!(status(), [1, 0]);
}

#[test]
fn a_state_that_no_card_has_is_refused() {
    let Some((rig, _wire)) = rig(FEATURE_MAC) else { return };
    let extra = |waiting| postcard::to_allocvec(&Extra { waiting }).unwrap();
    let long = extra(vec![vec![0; FRAME_BYTES_MAX + 1]]);
    for bytes in [vec![], vec![5, 1, 2], long, extra(vec![vec![0; 60]; WAITING_MAX + 2]), extra(vec![vec![0; 9]])] {
        let mut record = rig.device.save();
        record.extra = bytes;
        assert!(rig.device.load(record).is_err());
    }
}
