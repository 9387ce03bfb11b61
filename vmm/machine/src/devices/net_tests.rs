//! Tests of the network card as its driver and its TAP see it, without a guest. The TAP is one end of a socket pair.
#![allow(clippy::unwrap_used, clippy::panic, clippy::indexing_slicing, clippy::print_stdout)]
use super::*;
use crate::devices::queue::tests::describe;
use crate::devices::transport::tests::set_up;
use crate::memory::{MemoryConfig, take_vmm_writes};
use nix::sys::socket::{AddressFamily, MsgFlags, SockFlag, SockType, recv, send, socketpair};
use nix::sys::time::{TimeVal, TimeValLike};
use std::os::fd::{AsRawFd, OwnedFd};
use vm_memory::GuestMemoryBackend;

/// Bases of the queues, as `set_up` places them: descriptors, then the rings, 4 KiB each.
const RX: u64 = 0x1000;
const TX: u64 = 0x5000;
const BUFFERS: u64 = 0x10_0000;

struct Rig {
    device: Arc<NetDevice>,
    _thread: NetThread,
    ram: Arc<Ram>,
    wire: OwnedFd,
    events: Arc<Events>,
}

fn rig() -> Option<Rig> {
    let Ok(kvm) = kvm_ioctls::Kvm::new() else {
        assert!(std::env::var_os("LIMOSA_DEMAND_ALL").is_none_or(|value| value != "1"), "KVM is demanded");
        println!("skipped: no /dev/kvm");
        return None;
    };
    let vm = kvm.create_vm().unwrap();
    vm.create_irq_chip().unwrap();
    let ram = Arc::new(Ram::new(&MemoryConfig::new(4 << 20)).unwrap());
    let (ours, wire) = socketpair(AddressFamily::Unix, SockType::SeqPacket, None, SockFlag::SOCK_CLOEXEC).unwrap();
    let second = TimeVal::seconds(5);
    nix::sys::socket::setsockopt(&wire, nix::sys::socket::sockopt::ReceiveTimeout, &second).unwrap();
    let tap = Tap::from_fd(ours, "net0").unwrap();
    let events = Arc::new(Events::new().unwrap());
    let parts = NetParts { index: 0, mac: [2, 0, 0, 0, 0, 1], mtu: 1500, tap, irq: 5, mmio: 0xd000_0000 };
    let device = Arc::new(NetDevice::new(&vm, Arc::clone(&ram), parts, Arc::clone(&events)).unwrap());
    let thread = device.start().unwrap();
    set_up(&mut |offset, value| device.mmio_write(offset, &value.to_le_bytes()));
    Some(Rig { device, _thread: thread, ram, wire, events })
}

impl Rig {
    fn offer(&self, queue: u64, slot: u16, head: u16) {
        let ram = self.ram.guest();
        let avail = queue + 0x1000;
        ram.write_obj(head, GuestAddress(avail + 4 + 2 * u64::from(slot % 8))).unwrap();
        ram.write_obj(slot.wrapping_add(1), GuestAddress(avail + 2)).unwrap();
        let number = u32::from(queue == TX);
        self.device.mmio_write(QUEUE_NOTIFY, &number.to_le_bytes());
    }

    fn used(&self, queue: u64) -> u16 {
        self.ram.guest().read_obj(GuestAddress(queue + 0x2002)).unwrap()
    }

    fn wait_used(&self, queue: u64, index: u16) {
        let deadline = Instant::now() + Duration::from_secs(5);
        while self.used(queue) != index {
            assert!(Instant::now() < deadline, "used index is {}, not {index}", self.used(queue));
            std::thread::sleep(Duration::from_micros(100));
        }
    }

    fn send(&self, frame: &[u8]) {
        send(self.wire.as_raw_fd(), frame, MsgFlags::empty()).unwrap();
    }

    fn status(&self) -> u32 {
        let mut data = [0; 4];
        self.device.mmio_read(0x70, &mut data);
        u32::from_le_bytes(data)
    }
}

#[test]
fn frames_pass_both_ways_and_pages_are_dirty() {
    let Some(rig) = rig() else { return };
    let ram = rig.ram.guest();
    rig.device.resume();
    describe(ram, RX, 2, BUFFERS, 12, 3, 3);
    describe(ram, RX, 3, BUFFERS + 0x5000, 2000, 2, 0);
    rig.offer(RX, 0, 2);
    take_vmm_writes(ram.iter().next().unwrap());
    let frame: Vec<u8> = (0..112).collect();
    rig.send(&frame);
    rig.wait_used(RX, 1);
    assert_eq!(ram.read_obj::<[u32; 2]>(GuestAddress(RX + 0x2004)).unwrap(), [2, 112]);
    let mut header = [9; 12];
    ram.read_slice(&mut header, GuestAddress(BUFFERS)).unwrap();
    assert_eq!(header, [0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1, 0]);
    let mut body = [0; 100];
    ram.read_slice(&mut body, GuestAddress(BUFFERS + 0x5000)).unwrap();
    assert_eq!(body, frame[12..]);
    let words = take_vmm_writes(ram.iter().next().unwrap());
    assert_eq!((words[0], words[4]), (1 << 3, 1 | 1 << 5), "used ring and both buffers");

    ram.write_slice(&[0xff; 12], GuestAddress(BUFFERS)).unwrap();
    describe(ram, TX, 0, BUFFERS, 12, 1, 1);
    describe(ram, TX, 1, BUFFERS + 0x5000, 100, 0, 0);
    rig.offer(TX, 0, 0);
    let mut got = [0; 300];
    assert_eq!(recv(rig.wire.as_raw_fd(), &mut got, MsgFlags::empty()).unwrap(), 112);
    assert_eq!(got[..12], [0; 12], "the guest's header is not believed");
    assert_eq!(got[12..112], frame[12..]);
    rig.wait_used(TX, 1);
}

#[test]
fn nothing_passes_while_parked_and_all_of_it_afterwards() {
    let Some(rig) = rig() else { return };
    let ram = rig.ram.guest();
    for round in 0..50_u16 {
        describe(ram, RX, 0, BUFFERS, 2000, 2, 0);
        describe(ram, TX, 0, BUFFERS + 0x5000, 60, 0, 0);
        rig.device.begin_pause();
        assert!(rig.device.wait_parked());
        rig.send(&[7; 80]);
        rig.offer(RX, round, 0);
        rig.offer(TX, round, 0);
        std::thread::sleep(Duration::from_micros(300));
        assert_eq!((rig.used(RX), rig.used(TX)), (round, round), "a parked card leaves memory alone");
        let saved = rig.device.save();
        rig.device.load(postcard::from_bytes(&postcard::to_allocvec(&saved).unwrap()).unwrap()).unwrap();
        rig.device.resume();
        rig.wait_used(RX, round + 1);
        rig.wait_used(TX, round + 1);
        recv(rig.wire.as_raw_fd(), &mut [0; 100], MsgFlags::empty()).unwrap();
    }
}

#[test]
fn a_driver_that_breaks_the_rules_stops_its_card_only() {
    let Some(rig) = rig() else { return };
    let ram = rig.ram.guest();
    rig.device.resume();
    let hostile: [&dyn Fn(); 4] = [
        &|| describe(ram, TX, 0, 0xffff_ffff_ffff_fff0, 64, 0, 0),
        &|| describe(ram, TX, 0, BUFFERS, 64, 1, 0),
        &|| describe(ram, TX, 0, BUFFERS, 64, 4, 0),
        &|| ram.write_obj(999_u16, GuestAddress(TX + 0x1002)).unwrap(),
    ];
    for (round, set) in hostile.iter().enumerate() {
        let ring = [0_u8; 0x40];
        for base in [RX, TX] {
            ram.write_slice(&ring, GuestAddress(base + 0x1000)).unwrap();
            ram.write_slice(&ring, GuestAddress(base + 0x2000)).unwrap();
        }
        set();
        if round == 3 {
            rig.device.mmio_write(QUEUE_NOTIFY, &1_u32.to_le_bytes());
        } else {
            rig.offer(TX, 0, 0);
        }
        let event = rig.events.recv_timeout(Duration::from_secs(5));
        assert!(matches!(event, Some(MachineEvent::DeviceBroken { .. })), "round {round}: {event:?}");
        assert_eq!(rig.status() & 64, 64, "the driver is told that the device needs a reset");
        rig.device.mmio_write(0x70, &0_u32.to_le_bytes());
        ram.write_slice(&ring, GuestAddress(TX + 0x1000)).unwrap();
        set_up(&mut |offset, value| rig.device.mmio_write(offset, &value.to_le_bytes()));
        assert_eq!(rig.status(), 15, "and can do that");
    }
    // Oversized and tiny frames are dropped; the queue goes on.
    for (round, bytes) in [(0, 70_000), (1, 20), (2, 60)] {
        describe(ram, TX, 0, BUFFERS, bytes, 0, 0);
        rig.offer(TX, round, 0);
        rig.wait_used(TX, round + 1);
    }
    assert_eq!(recv(rig.wire.as_raw_fd(), &mut [0; 100], MsgFlags::empty()).unwrap(), 60, "only the good frame was sent");
    // A frame larger than its buffer is dropped, not cut, and touches nothing beyond the buffer.
    describe(ram, RX, 0, BUFFERS + 0x8000, 50, 2, 0);
    rig.offer(RX, 0, 0);
    rig.send(&[7; 100]);
    rig.wait_used(RX, 1);
    assert_eq!(ram.read_obj::<[u32; 2]>(GuestAddress(RX + 0x2004)).unwrap(), [0, 0]);
    assert_eq!(ram.read_obj::<u8>(GuestAddress(BUFFERS + 0x8000 + 50)).unwrap(), 0);
}
