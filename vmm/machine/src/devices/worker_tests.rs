//! A device without a guest: its driver is the test. Also tests of what all devices share.
#![allow(clippy::unwrap_used, clippy::panic, clippy::indexing_slicing, clippy::print_stdout)]
use super::*;
use crate::devices::queue::tests::describe;
use crate::memory::MemoryConfig;
use vm_memory::{Bytes, GuestAddress};

/// Memory for buffers, behind the queues.
pub(crate) const BUFFERS: u64 = 0x10_0000;

/// Where queue `index` is, as `Rig::set_up` places it: descriptors, then the rings, 4 KiB each.
pub(crate) fn base(index: u64) -> u64 {
    0x1000 + 0x4000 * index
}

/// A device of a VM that has no vCPU.
pub(crate) struct Rig {
    pub(crate) device: Arc<VirtioDevice>,
    _thread: DeviceThread,
    ram: Arc<Ram>,
    pub(crate) events: Arc<Events>,
}

impl Rig {
    /// None, said loudly, where there is no KVM.
    pub(crate) fn new(backend: Box<dyn Backend>) -> Option<Rig> {
        let Ok(kvm) = kvm_ioctls::Kvm::new() else {
            assert!(std::env::var_os("LIMOSA_DEMAND_ALL").is_none_or(|value| value != "1"), "KVM is demanded");
            println!("skipped: no /dev/kvm");
            return None;
        };
        let vm = kvm.create_vm().unwrap();
        vm.create_irq_chip().unwrap();
        let ram = Arc::new(Ram::new(&MemoryConfig::new(4 << 20)).unwrap());
        let events = Arc::new(Events::new().unwrap());
        let (ours, theirs) = (Arc::clone(&ram), Arc::clone(&events));
        let device = Arc::new(VirtioDevice::new(&vm, ours, theirs, 0, (Kind::Net, 0), backend).unwrap());
        let thread = device.start().unwrap();
        let rig = Rig { device, _thread: thread, ram, events };
        rig.set_up(u64::MAX);
        Some(rig)
    }

    fn register(&self, offset: u64, value: u32) {
        self.device.mmio_write(offset, &value.to_le_bytes());
    }

    /// What a driver does that accepts the features offered within `features`, with queues of eight.
    pub(crate) fn set_up(&self, features: u64) {
        let (offered, queues) = {
            let backend = self.device.backend();
            (backend.model().features | super::super::transport::FEATURE_VERSION_1, backend.model().queues as u64)
        };
        for value in [0, 1, 3] {
            self.register(0x70, value);
        }
        let chosen = offered & features;
        for (select, value) in [(0, chosen as u32), (1, (chosen >> 32) as u32)] {
            self.register(0x24, select);
            self.register(0x20, value);
        }
        self.register(0x70, 11);
        for queue in 0..queues {
            let base = base(queue) as u32;
            for (offset, value) in
                [(0x30, queue as u32), (0x38, 8), (0x80, base), (0x90, base + 0x1000), (0xa0, base + 0x2000), (0x44, 1)]
            {
                self.register(offset, value);
            }
        }
        self.register(0x70, 15);
    }

    pub(crate) fn ram(&self) -> &Ram {
        &self.ram
    }

    pub(crate) fn write(&self, at: u64, bytes: &[u8]) {
        self.ram.guest().write_slice(bytes, GuestAddress(at)).unwrap();
    }

    pub(crate) fn read(&self, at: u64, bytes: usize) -> Vec<u8> {
        let mut read = vec![0; bytes];
        self.ram.guest().read_slice(&mut read, GuestAddress(at)).unwrap();
        read
    }

    pub(crate) fn describe(&self, queue: u64, index: u16, at: u64, bytes: u32, writable: bool, next: Option<u16>) {
        let flags = u16::from(next.is_some()) | u16::from(writable) << 1;
        describe(self.ram.guest(), base(queue), index, at, bytes, flags, next.unwrap_or(0));
    }

    /// Offers the chain from `head` on as the `slot`-th of this queue, and notifies.
    pub(crate) fn offer(&self, queue: u64, slot: u16, head: u16) {
        let avail = base(queue) + 0x1000;
        self.write(avail + 4 + 2 * u64::from(slot % 8), &head.to_le_bytes());
        self.write(avail + 2, &slot.wrapping_add(1).to_le_bytes());
        self.register(QUEUE_NOTIFY, queue as u32);
    }

    pub(crate) fn used(&self, queue: u64) -> u16 {
        self.ram.guest().read_obj(GuestAddress(base(queue) + 0x2002)).unwrap()
    }

    /// Head and bytes written of the `slot`-th chain that was given back.
    pub(crate) fn used_element(&self, queue: u64, slot: u64) -> [u32; 2] {
        self.ram.guest().read_obj(GuestAddress(base(queue) + 0x2004 + 8 * slot)).unwrap()
    }

    pub(crate) fn wait_used(&self, queue: u64, index: u16) {
        let deadline = Instant::now() + Duration::from_secs(5);
        while self.used(queue) != index {
            assert!(Instant::now() < deadline, "used index is {}, not {index}", self.used(queue));
            std::thread::sleep(Duration::from_micros(100));
        }
    }

    /// A register as the driver reads it.
    pub(crate) fn read_register(&self, offset: u64) -> u32 {
        let mut data = [0; 4];
        self.device.mmio_read(offset, &mut data);
        u32::from_le_bytes(data)
    }

    /// Pauses, saves, loads what was saved into this very device, and lets it go on.
    pub(crate) fn move_to_itself(&self) {
        self.device.begin_pause();
        assert!(self.device.wait_parked());
        let saved = postcard::to_allocvec(&self.device.save()).unwrap();
        self.device.load(postcard::from_bytes(&saved).unwrap()).unwrap();
        self.device.arrived();
        self.device.resume();
    }
}
