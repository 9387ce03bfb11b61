//! A machine: built, booted or loaded, run, paused, saved. Not its parts, each of which has a file.

use std::sync::atomic::AtomicU64;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use kvm_bindings::CpuId;
use kvm_ioctls::{Kvm, VmFd};
use serde::{Deserialize, Serialize};
use vm_memory::{Bytes, GuestAddress};
use vmm_sys_util::eventfd::EventFd;

use crate::boot::{self, BootConfig, BootError};
use crate::bus::{Bus, MMIO_DEVICES_MAX};
use crate::config::{MachineConfig, NicConfig, TapConfig};
use crate::devices::balloon::Balloon;
use crate::devices::block::Block;
use crate::devices::net::Net;
use crate::devices::rng::Rng;
use crate::devices::serial::{SERIAL_IRQ, Serial};
use crate::devices::worker::{Backend, DeviceThread, PAUSE_MAX, VirtioDevice};
use crate::dirty::{DirtyError, DirtyTracker};
use crate::disk::DiskInfo;
use crate::disk::image::Disk;
use crate::error::{AccessError, BuildError, LoadError, SaveError};
use crate::event::Events;
use crate::kvm::{self, Capabilities};
use crate::memory::{MemoryConfig, MemoryError, Ram, RegionInfo};
use crate::state::{Kind, Records, StateRecord, record};
use crate::tap::Tap;
use crate::vcpu::{RunError, Vcpu, VcpuSet};
use crate::vcpu_state::{self, VcpuRecord};
use crate::{clock, cpu, irq};

/// Three pages below the firmware's place, which Intel CPUs need for real mode.
const TSS_ADDRESS: usize = 0xfffb_d000;
const IDENTITY_MAP_ADDRESS: u64 = 0xfffb_c000;
const MTU_MIN: u16 = 68;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Phase {
    /// Built, with nothing to run.
    Fresh,
    /// A load failed half-way.
    Spoilt,
    /// Booted or loaded, not yet run.
    Ready {
        loaded: bool,
    },
    Running,
    Paused,
}

/// What a machine is made of, version 2 of its record: checked before anything is loaded.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct Board {
    vcpus: u32,
    /// `(gpa, bytes)` of each region.
    memory: Vec<(u64, u64)>,
    /// Kind of record of the virtio device in each slot.
    devices: Vec<u16>,
}

impl std::fmt::Display for Board {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let name = |kind: &u16| Kind::from_number(*kind).map_or("unknown", Kind::name);
        let devices: Vec<&str> = self.devices.iter().map(name).collect();
        write!(f, "{} vCPUs, memory {:x?} (address, bytes) and the devices [{}]", self.vcpus, self.memory, devices.join(", "))
    }
}

/// A KVM machine. It ends, with all its threads and TAPs, when it is dropped.
#[derive(Debug)]
pub struct Machine {
    // Dropped in this order: whoever runs first, what they use last.
    vcpus: VcpuSet,
    device_threads: Vec<DeviceThread>,
    bus: Arc<Bus>,
    disks: Vec<Arc<Disk>>,
    dirty: DirtyTracker,
    ram: Arc<Ram>,
    vm: Arc<VmFd>,
    caps: Capabilities,
    msrs: Vec<u32>,
    events: Arc<Events>,
    phase: Mutex<Phase>,
}

fn failed(what: &'static str) -> impl Fn(kvm_ioctls::Error) -> BuildError {
    move |error| BuildError::Step { what, source: error.into() }
}

fn failed_io(what: &'static str) -> impl Fn(std::io::Error) -> BuildError {
    move |source| BuildError::Step { what, source }
}

fn check(what: &'static str, given: u64, min: u64, max: u64) -> Result<(), BuildError> {
    if (min..=max).contains(&given) { Ok(()) } else { Err(BuildError::Config { what, given, min, max }) }
}

fn check_nics(nics: &[NicConfig]) -> Result<(), BuildError> {
    for (index, nic) in nics.iter().enumerate() {
        check("a network card's MTU", u64::from(nic.mtu), u64::from(MTU_MIN), u64::from(u16::MAX))?;
        if nic.mac[0] & 1 == 1 {
            return Err(BuildError::Mac(index));
        }
    }
    Ok(())
}

/// The VM with its chips and its memory.
fn create_vm(
    kvm: &Kvm,
    memory: &MemoryConfig,
    fewer: fn(Capabilities) -> Capabilities,
) -> Result<(Arc<VmFd>, Capabilities, Arc<Ram>, DirtyTracker), BuildError> {
    let vm = Arc::new(kvm.create_vm().map_err(failed("KVM_CREATE_VM"))?);
    let caps = fewer(Capabilities::read(kvm, &vm));
    vm.set_identity_map_address(IDENTITY_MAP_ADDRESS).map_err(failed("KVM_SET_IDENTITY_MAP_ADDR"))?;
    vm.set_tss_address(TSS_ADDRESS).map_err(failed("KVM_SET_TSS_ADDR"))?;
    irq::create(&vm).map_err(failed("creating interrupt controllers and timer"))?;
    let ram = Arc::new(Ram::new(memory)?);
    let dirty = DirtyTracker::new(Arc::clone(&vm), Arc::clone(&ram), caps.manual_dirty_log)?;
    Ok((vm, caps, ram, dirty))
}

fn create_vcpus(kvm: &Kvm, vm: &VmFd, config: &MachineConfig, caps: &Capabilities) -> Result<Vec<Arc<Vcpu>>, BuildError> {
    let shared = match &config.cpuid {
        Some(chosen) => chosen.clone(),
        None => cpu::offered_cpuid(&kvm::supported_cpuid_of(kvm)?, caps),
    };
    let (mut vcpus, count) = (Vec::new(), config.vcpus);
    for id in 0..count {
        let fd = vm.create_vcpu(u64::from(id)).map_err(failed("KVM_CREATE_VCPU"))?;
        let entries = cpu::guest_cpuid(&shared, id, count);
        let cpuid = CpuId::from_entries(&entries)
            .map_err(|error| BuildError::Step { what: "arranging CPUID", source: std::io::Error::other(format!("{error:?}")) })?;
        fd.set_cpuid2(&cpuid).map_err(failed("KVM_SET_CPUID2"))?;
        vcpu_state::set_feature_msrs(&fd, &config.feature_msrs).map_err(failed_io("setting feature MSRs"))?;
        vcpus.push(Arc::new(Vcpu::new(id, fd)));
    }
    Ok(vcpus)
}

fn create_nic(index: usize, nic: NicConfig) -> Result<Net, BuildError> {
    let tap = match nic.tap {
        TapConfig::Name { name, bridge, vlan } => Tap::open(&name, bridge.as_deref(), vlan, nic.mtu)?,
        TapConfig::Fd(fd) => Tap::from_fd(fd, &format!("net{index}"))?,
    };
    tap.pass_over(nic.mac);
    Ok(Net::new(nic.mac, nic.mtu, tap, nic.offload))
}

/// A virtio device with kind and instance of its record.
type Made = (Kind, u32, Box<dyn Backend>);

/// The virtio devices of a machine, in the order of their slots.
fn create_backends(config: &mut MachineConfig, disks: &[Arc<Disk>]) -> Result<Vec<Made>, BuildError> {
    let mut backends: Vec<Made> = Vec::new();
    for (index, nic) in std::mem::take(&mut config.nics).into_iter().enumerate() {
        backends.push((Kind::Net, index as u32, Box::new(create_nic(index, nic)?)));
    }
    for (index, disk) in (0..).zip(disks) {
        backends.push((Kind::Block, index, Box::new(Block::new(Arc::clone(disk)))));
    }
    if config.rng {
        backends.push((Kind::Rng, 0, Box::new(Rng::new().map_err(failed_io("opening /dev/urandom"))?)));
    }
    if config.balloon {
        backends.push((Kind::Balloon, 0, Box::new(Balloon)));
    }
    Ok(backends)
}

impl Machine {
    /// Builds a machine: KVM VM, memory, vCPUs with their threads, devices with their TAPs. Nothing runs yet.
    ///
    /// # Errors
    /// When a number is out of bounds, or when KVM, the memory or a TAP cannot be had.
    pub fn new(config: MachineConfig) -> Result<Self, BuildError> {
        Self::with_fewer(config, |caps| caps)
    }

    /// [`Self::new`] on a host that offers less than this one.
    fn with_fewer(mut config: MachineConfig, fewer: fn(Capabilities) -> Capabilities) -> Result<Self, BuildError> {
        check_nics(&config.nics)?;
        let count = config.nics.len() + config.disks.len() + usize::from(config.rng) + usize::from(config.balloon);
        check("the number of virtio devices", count as u64, 0, MMIO_DEVICES_MAX as u64)?;
        let kvm = kvm::open()?;
        let (vm, caps, ram, dirty) = create_vm(&kvm, &config.memory, fewer)?;
        check("the number of vCPUs", u64::from(config.vcpus), 1, u64::from(caps.vcpus_max))?;
        let vcpus = create_vcpus(&kvm, &vm, &config, &caps)?;
        let msrs = match vcpus.first() {
            Some(first) => {
                let readable = vcpu_state::read_msrs(&first.fd(), &kvm::msr_indices(&kvm)?);
                readable.map_err(failed("KVM_GET_MSRS"))?.into_iter().map(|(index, _)| index).collect()
            }
            None => Vec::new(),
        };
        let events = Arc::new(Events::new().map_err(|error| failed_io("making an eventfd")(error.into()))?);
        let interrupt = EventFd::new(libc::EFD_NONBLOCK | libc::EFD_CLOEXEC).map_err(failed_io("making an eventfd"))?;
        vm.register_irqfd(&interrupt, SERIAL_IRQ).map_err(failed("KVM_IRQFD"))?;
        let disks = std::mem::take(&mut config.disks).into_iter().map(|disk| Disk::open(disk).map(Arc::new));
        let disks = disks.collect::<Result<Vec<_>, _>>()?;
        let mut devices = Vec::new();
        for (slot, (kind, instance, backend)) in create_backends(&mut config, &disks)?.into_iter().enumerate() {
            let device = VirtioDevice::new(&vm, Arc::clone(&ram), Arc::clone(&events), slot, (kind, instance), backend);
            devices.push(Arc::new(device.map_err(failed_io("binding a virtio device to KVM"))?));
        }
        let device_threads = devices.iter().map(VirtioDevice::start).collect::<Result<_, _>>();
        let device_threads = device_threads.map_err(failed_io("starting a device's thread"))?;
        let serial = Arc::new(Serial::new(config.serial, interrupt).map_err(failed_io("starting the serial port"))?);
        let bus = Arc::new(Bus { serial, devices });
        let vcpus = VcpuSet::start(vcpus, &bus, &events).map_err(failed_io("starting vCPU threads"))?;
        Ok(Self { vcpus, device_threads, bus, disks, dirty, ram, vm, caps, msrs, events, phase: Mutex::new(Phase::Fresh) })
    }

    fn phase(&self) -> MutexGuard<'_, Phase> {
        self.phase.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Loads a kernel and readies the first vCPU to enter it; [`Self::resume`] lets it run.
    ///
    /// # Errors
    /// When the machine is not new, the files are no kernel or initramfs, or do not fit into memory.
    pub fn boot(&self, config: &BootConfig) -> Result<(), BootError> {
        let mut phase = self.phase();
        let (Phase::Fresh, Some(first)) = (*phase, self.vcpus.vcpus().first()) else { return Err(BootError::NotFresh) };
        let count = self.vcpus.vcpus().len() as u32;
        boot::boot(self.ram.guest(), &first.fd(), count, self.bus.devices.len(), config)?;
        *phase = Phase::Ready { loaded: false };
        Ok(())
    }

    /// Lets the machine run: for the first time, or on. Does nothing if it runs.
    ///
    /// # Errors
    /// When it was neither booted nor loaded, or when a device cannot work here; then it can be tried again.
    pub fn resume(&self) -> Result<(), RunError> {
        let mut phase = self.phase();
        match *phase {
            Phase::Fresh | Phase::Spoilt => return Err(RunError::Empty),
            Phase::Running => return Ok(()),
            Phase::Ready { .. } | Phase::Paused => {}
        }
        self.ask_devices()?;
        if *phase == (Phase::Ready { loaded: true }) {
            self.mend_after_load();
        }
        // Devices first: busy vCPUs may take this thread's CPU for some milliseconds.
        self.bus.devices.iter().for_each(|device| device.resume());
        self.vcpus.resume();
        *phase = Phase::Running;
        Ok(())
    }

    /// What a save cannot hold: interrupts that were on their way from a device, and that the guest was stopped.
    fn mend_after_load(&self) {
        self.bus.serial.raise_again();
        self.bus.devices.iter().for_each(|device| device.arrived());
        if self.caps.clock_control {
            for vcpu in self.vcpus.vcpus() {
                // Refused while the guest has no paravirtual clock, and then there is nothing to say.
                let _ = vcpu.fd().kvmclock_ctrl();
            }
        }
    }

    /// Stops all vCPUs and devices. When this returns, nothing runs and nothing writes guest memory.
    ///
    /// # Errors
    /// When a vCPU or a device does not stop in time; then the machine is let run on.
    pub fn pause(&self) -> Result<(), RunError> {
        let mut phase = self.phase();
        if *phase != Phase::Running {
            return Ok(());
        }
        self.bus.devices.iter().for_each(|device| device.begin_pause());
        let stuck = |name: &str| RunError::Stuck { what: format!("device {name}"), ms: PAUSE_MAX.as_millis() as u64 };
        let paused = self.vcpus.pause().and_then(|()| match self.bus.devices.iter().find(|device| !device.wait_parked()) {
            Some(device) => Err(stuck(device.name())),
            None => Ok(()),
        });
        match paused {
            Ok(()) => *phase = Phase::Paused,
            Err(_) => {
                self.vcpus.resume();
                self.bus.devices.iter().for_each(|device| device.resume());
            }
        }
        paused
    }

    /// Whether vCPUs may run (between [`Self::resume`] and [`Self::pause`]).
    pub fn is_running(&self) -> bool {
        *self.phase() == Phase::Running
    }

    /// What happened to the guest or its devices.
    pub fn events(&self) -> &Events {
        &self.events
    }

    /// What this host's KVM offers.
    pub fn capabilities(&self) -> Capabilities {
        self.caps
    }

    /// The regions of guest memory with their memfds. A region's index is its place in dirty bitmaps too.
    ///
    /// Whoever maps them should turn transparent huge pages off for the mapping, unless this machine has them on.
    pub fn regions(&self) -> Vec<RegionInfo<'_>> {
        self.ram.regions()
    }

    /// Gives every page of guest memory its backing now. Contents stay; the machine may run, or be filled meanwhile.
    ///
    /// # Errors
    /// When this host has not enough memory.
    pub fn populate(&self) -> Result<(), MemoryError> {
        self.ram.populate()
    }

    /// Reads guest memory.
    ///
    /// # Errors
    /// When the range is not all in RAM.
    pub fn read_memory(&self, gpa: u64, bytes: &mut [u8]) -> Result<(), AccessError> {
        let error = AccessError { gpa, bytes: bytes.len() };
        self.ram.guest().read_slice(bytes, GuestAddress(gpa)).map_err(|_| error)
    }

    /// Writes guest memory; the pages count as dirty.
    ///
    /// # Errors
    /// When the range is not all in RAM.
    pub fn write_memory(&self, gpa: u64, bytes: &[u8]) -> Result<(), AccessError> {
        let error = AccessError { gpa, bytes: bytes.len() };
        self.ram.guest().write_slice(bytes, GuestAddress(gpa)).map_err(|_| error)
    }

    /// From when this returns, every written page is reported by a later fetch: writes of vCPUs, of KVM, of devices and of
    /// [`Self::write_memory`]; not those of other processes through the memfds. The guest may run.
    ///
    /// # Errors
    /// When KVM refuses.
    pub fn start_dirty_tracking(&self) -> Result<(), DirtyError> {
        self.sync_disks();
        self.dirty.start()
    }

    /// Whoever tracks is about to stop the guest and to flush: the less there is to flush then, the better.
    fn sync_disks(&self) {
        self.disks.iter().for_each(Disk::sync_beside);
    }

    /// What the disks are, in the order in which they were configured.
    pub fn disks(&self) -> Vec<DiskInfo> {
        self.disks.iter().map(|disk| disk.info()).collect()
    }

    /// Takes the locks of all images, as [`Self::resume`] does, for a guest that is here and shall not run yet.
    ///
    /// # Errors
    /// When somebody else has one.
    pub fn take_disks(&self) -> Result<(), RunError> {
        let _phase = self.phase();
        self.ask_devices()
    }

    /// Whether each device can work here now.
    fn ask_devices(&self) -> Result<(), RunError> {
        self.bus.devices.iter().try_for_each(|device| {
            device.may_resume().map_err(|reason| RunError::Device { device: device.name().to_owned(), reason })
        })
    }

    /// Brings everything that the guest wrote to its images, and gives their locks up: another host may use them from
    /// now on. The machine must not run; [`Self::resume`] takes the locks again first, or fails.
    ///
    /// # Errors
    /// When the machine runs, or flushing fails; the locks that were not given up are still held.
    pub fn give_up_disks(&self) -> Result<(), SaveError> {
        let phase = self.phase();
        if *phase == Phase::Running {
            return Err(SaveError::Running);
        }
        Ok(self.disks.iter().try_for_each(|disk| disk.give_up())?)
    }

    /// Calls `sink` with `(region, first word, words)` for the pages written since the last fetch, or since the start. A word
    /// is 64 pages of 4 KiB, lowest bit first, counted from the region's start. Never reports too few pages, at times more.
    ///
    /// # Errors
    /// When tracking is off or KVM refuses; bits that were not handed over are not lost.
    pub fn fetch_dirty(&self, sink: &mut dyn FnMut(usize, usize, &[u64])) -> Result<(), DirtyError> {
        if self.is_running() {
            self.sync_disks();
        }
        self.dirty.fetch(sink)
    }

    /// As [`Self::fetch_dirty`], ORed into one bitmap for each region. Returns how many pages were reported.
    ///
    /// # Errors
    /// When bitmaps are missing or too small (nothing is fetched then), tracking is off or KVM refuses.
    pub fn fetch_dirty_into(&self, bitmaps: &[&[AtomicU64]]) -> Result<u64, DirtyError> {
        self.dirty.fetch_into(bitmaps)
    }

    /// Stops dirty tracking. It stalls vCPUs for a moment: not for the time of a downtime.
    ///
    /// # Errors
    /// When KVM refuses.
    pub fn stop_dirty_tracking(&self) -> Result<(), DirtyError> {
        self.dirty.stop()
    }

    /// Bytes for the guest to read from its serial port; returns how many had room (of 256).
    pub fn serial_input(&self, bytes: &[u8]) -> usize {
        self.bus.serial.input(bytes)
    }

    fn board(&self) -> Board {
        Board {
            vcpus: self.vcpus.vcpus().len() as u32,
            memory: self.ram.regions().iter().map(|region| (region.gpa, region.bytes)).collect(),
            devices: self.bus.devices.iter().map(|device| device.record_id().0 as u16).collect(),
        }
    }

    /// The state of vCPUs, chips and devices. Memory is not in it. Can be repeated; the machine stays paused.
    ///
    /// # Errors
    /// When the machine runs, has nothing to save, or KVM refuses.
    pub fn save(&self) -> Result<Vec<StateRecord>, SaveError> {
        let phase = self.phase();
        match *phase {
            Phase::Running => return Err(SaveError::Running),
            Phase::Fresh | Phase::Spoilt => return Err(SaveError::Empty),
            Phase::Ready { .. } | Phase::Paused => {}
        }
        let refused = |what| move |source| SaveError::Kvm { what, source };
        // Here, where a failure still harms nothing: nobody has been promised the guest yet.
        self.disks.iter().try_for_each(|disk| disk.flush())?;
        let mut records = vec![record(Kind::Board, 0, &self.board())?];
        for vcpu in self.vcpus.vcpus() {
            if vcpu.has_ended() {
                return Err(SaveError::Ended(vcpu.id));
            }
            let state = vcpu_state::save(vcpu.id, &vcpu.fd(), &self.caps, &self.msrs)?;
            records.push(record(Kind::Vcpu, vcpu.id, &state)?);
        }
        // The clock after the vCPUs: their TSCs are moved on by the time since the clock was read.
        let clock = clock::save(&self.vm, self.caps.clock_flags).map_err(refused("KVM_GET_CLOCK"))?;
        records.push(record(Kind::Clock, 0, &clock)?);
        let chips = irq::save_chips(&self.vm).map_err(refused("KVM_GET_IRQCHIP"))?;
        records.push(record(Kind::Irqchip, 0, &chips)?);
        let pit = irq::save_pit(&self.vm).map_err(refused("KVM_GET_PIT2"))?;
        records.push(record(Kind::Pit, 0, &pit)?);
        records.push(record(Kind::Serial, 0, &self.bus.serial.save())?);
        for device in &self.bus.devices {
            let (kind, instance) = device.record_id();
            records.push(record(kind, instance, &device.save())?);
        }
        Ok(records)
    }

    /// Loads the state that a source saved, into a new machine of the same make whose memory is filled already.
    ///
    /// # Errors
    /// When the machine is not new or of another make; when records are missing, left over, unknown or malformed; when KVM
    /// refuses a part that matters. The machine cannot be used after an error.
    pub fn load(&self, records: Vec<StateRecord>) -> Result<(), LoadError> {
        let mut phase = self.phase();
        if *phase != Phase::Fresh {
            return Err(LoadError::NotFresh);
        }
        let mut records = Records::new(records)?;
        let board: Board = records.take(Kind::Board, 0)?;
        if board != self.board() {
            return Err(LoadError::Board { given: board.to_string(), here: self.board().to_string() });
        }
        // Until here nothing has been touched: what is no state at all may be followed by one that is.
        *phase = Phase::Spoilt;
        self.load_parts(&mut records)?;
        records.finish()?;
        *phase = Phase::Ready { loaded: true };
        Ok(())
    }

    fn load_parts(&self, records: &mut Records) -> Result<(), LoadError> {
        let refused = |what| move |source| LoadError::Kvm { what, source };
        let clock: clock::ClockRecord = records.take(Kind::Clock, 0)?;
        let chips: irq::IrqchipRecord = records.take(Kind::Irqchip, 0)?;
        let pit: irq::PitRecord = records.take(Kind::Pit, 0)?;
        // Chips before LAPICs: setting them may raise a line, which the LAPIC's own state then settles.
        irq::load_chips(&self.vm, &chips).map_err(refused("KVM_SET_IRQCHIP"))?;
        irq::load_pit(&self.vm, &pit).map_err(refused("KVM_SET_PIT2"))?;
        // One figure for all, so that the TSCs of all vCPUs stay together.
        let elapsed_ns = clock.elapsed_ns();
        for vcpu in self.vcpus.vcpus() {
            let state: VcpuRecord = records.take(Kind::Vcpu, vcpu.id)?;
            vcpu_state::load(vcpu.id, &vcpu.fd(), &self.caps, &state, elapsed_ns)?;
        }
        // The clock after the TSCs, on which it is built.
        clock::load(&self.vm, self.caps.clock_flags, &clock).map_err(refused("KVM_SET_CLOCK"))?;
        self.bus.serial.load(records.take(Kind::Serial, 0)?);
        for device in &self.bus.devices {
            let (kind, instance) = device.record_id();
            let refused = |reason: String| LoadError::Device { device: device.name().to_owned(), reason };
            device.load(records.take(kind, instance)?).map_err(|error| refused(error.to_string()))?;
        }
        Ok(())
    }

    /// Ends the machine: threads, TAPs and memory are gone when this returns. Dropping does the same.
    pub fn stop(self) {
        tracing::debug!(devices = self.device_threads.len(), "machine stopped");
    }
}

#[cfg(test)]
#[path = "machine_tests.rs"]
mod tests;
