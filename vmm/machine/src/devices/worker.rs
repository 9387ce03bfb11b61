//! A virtio device on its transport, with a thread of its own. Not what the device does: that is its `Backend`.
//!
//! The thread takes turns: in each it looks at the queues, moves what can be moved, and then waits for a notification or
//! for input. While the machine is paused the thread is parked between two turns, so nothing is half done, and guest
//! memory and the host's side are left alone. Registers have a lock of their own, which no backend may hold while it blocks.

use std::fmt::Debug;
use std::ops::Range;
use std::os::fd::{AsRawFd, RawFd};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use kvm_ioctls::{IoEventAddress, VmFd};
use serde::{Deserialize, Serialize};
use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};
use vmm_sys_util::eventfd::EventFd;

use super::queue::QueueError;
use super::transport::{INTERRUPT_CONFIG, INTERRUPT_USED, QUEUE_NOTIFY, Request, Transport, TransportError};
use crate::bus::{MMIO_BASE, MMIO_BYTES, MMIO_IRQ_BASE};
use crate::event::{Events, MachineEvent};
use crate::memory::{GuestRam, Ram};
use crate::state::Kind;

/// How long a turn may last when the machine is to pause: the slowest is one request to a disk.
pub(crate) const PAUSE_MAX: Duration = Duration::from_secs(2);

/// What the driver sees of a device before it does anything.
#[derive(Clone, Debug)]
pub(crate) struct Model {
    /// The virtio specification's number for this kind of device.
    pub(crate) device_id: u32,
    /// The features offered, VERSION_1 apart.
    pub(crate) features: u64,
    /// The configuration space.
    pub(crate) config: Vec<u8>,
    /// The bytes of it that the driver may write.
    pub(crate) config_writable: Range<usize>,
    /// How many queues.
    pub(crate) queues: usize,
}

/// What a device's thread does after a turn.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Turn {
    /// Nothing more to do until the driver notifies.
    Idle,
    /// Until the driver notifies or [`Backend::input`] is readable.
    WantsInput,
    /// More is waiting: take the next turn after a look at pause and notifications.
    More,
}

/// What a kind of device does. All calls come one at a time.
pub(crate) trait Backend: Debug + Send {
    /// What the driver sees.
    fn model(&self) -> Model;

    /// Moves what can be moved, but not for long: a pause waits for it. The driver's breach of the rules is an error.
    fn turn(&mut self, shared: &Shared) -> Result<Turn, QueueError>;

    /// What wakes the thread beside the driver.
    fn input(&self) -> Option<RawFd> {
        None
    }

    /// The input ended or cannot be waited for; it is not waited for any more.
    fn input_lost(&mut self, _shared: &Shared, _reason: &str) {}

    /// The machine runs on at a new host: what a save cannot hold is to be made good.
    fn arrived(&mut self, _shared: &Shared) {}

    /// The machine is about to run: first, again, or here for the first time.
    ///
    /// # Errors
    /// In words: the machine must not run then.
    fn resuming(&mut self, _shared: &Shared) -> Result<(), String> {
        Ok(())
    }

    /// The part of the state that is not in the registers. The device is parked, and may run on afterwards.
    fn save(&mut self, _shared: &Shared) -> Vec<u8> {
        Vec::new()
    }

    /// Takes over what [`Backend::save`] gave.
    ///
    /// # Errors
    /// In words.
    fn load(&mut self, bytes: &[u8]) -> Result<(), String> {
        if bytes.is_empty() { Ok(()) } else { Err(format!("{} bytes of state that this device does not have", bytes.len())) }
    }

    /// Whether a saved configuration space may be taken over by this device.
    fn takes_config(&self, ours: &[u8], theirs: &[u8]) -> bool {
        ours == theirs
    }
}

/// A device's record, version 1 (network cards: 2): its registers and what its backend added.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct VirtioRecord {
    pub(crate) transport: Transport,
    pub(crate) extra: Vec<u8>,
}

/// The part of a device that its backend works with.
#[derive(Debug)]
pub(crate) struct Shared {
    name: String,
    ram: Arc<Ram>,
    transport: Mutex<Transport>,
    interrupt: EventFd,
    events: Arc<Events>,
}

impl Shared {
    /// The device's name in logs and events, as `net0`.
    pub(crate) fn name(&self) -> &str {
        &self.name
    }

    /// Guest memory.
    pub(crate) fn ram(&self) -> &GuestRam {
        self.ram.guest()
    }

    /// Guest memory with what is behind it.
    pub(crate) fn backing(&self) -> &Ram {
        &self.ram
    }

    /// The registers and queues. vCPUs wait for this lock: never block while it is held.
    pub(crate) fn transport(&self) -> MutexGuard<'_, Transport> {
        self.transport.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Chains were given back in one of `queues`: interrupts the guest if its driver wants that.
    pub(crate) fn interrupt_for_used(&self, transport: &mut Transport, queues: Range<usize>) {
        let ram = self.ram.guest();
        let live = transport.queues.get(queues).unwrap_or_default().iter().filter(|queue| queue.ready);
        // One interrupt serves all queues, so it is raised if the driver wants it for any of them.
        if live.map(|queue| queue.wants_interrupt(ram)).any(|wants| wants.unwrap_or(true)) {
            transport.set_interrupt(INTERRUPT_USED);
            let _ = self.interrupt.write(1);
        }
    }

    /// Changes bytes of the configuration space and tells the driver.
    pub(crate) fn change_config(&self, at: usize, bytes: &[u8]) {
        let mut transport = self.transport();
        transport.change_config(at, bytes);
        transport.set_interrupt(INTERRUPT_CONFIG);
        let _ = self.interrupt.write(1);
    }

    /// Tells the machine's owner of trouble with the host's side of the device.
    pub(crate) fn trouble(&self, reason: &str) {
        self.events.push(MachineEvent::DeviceBroken { device: self.name.clone(), reason: reason.to_owned() });
    }

    fn break_down(&self, transport: &mut Transport, reason: &str) {
        transport.set_broken();
        let _ = self.interrupt.write(1);
        self.trouble(reason);
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Target {
    Parked,
    Running,
    Quit,
}

#[derive(Debug)]
struct Gate {
    target: Target,
    parked: bool,
}

/// A virtio device.
#[derive(Debug)]
pub(crate) struct VirtioDevice {
    kind: Kind,
    instance: u32,
    shared: Shared,
    backend: Mutex<Box<dyn Backend>>,
    /// Wakes the thread: chains were offered, or the machine pauses or ends.
    wake: EventFd,
    /// KVM signals these for a notification of each queue, without an exit to this process.
    notify: Vec<EventFd>,
    gate: Mutex<Gate>,
    gate_changed: Condvar,
}

/// Where a device of the board is: the first is slot 0.
pub(crate) fn place(slot: usize) -> (u64, u32) {
    // At most 19 slots (checked by the machine), so neither sum leaves its range.
    (MMIO_BASE + slot as u64 * MMIO_BYTES, MMIO_IRQ_BASE + slot as u32)
}

impl VirtioDevice {
    /// Makes a device and binds its interrupt and its queues' notifications in `vm`.
    pub(crate) fn new(
        vm: &VmFd,
        ram: Arc<Ram>,
        events: Arc<Events>,
        slot: usize,
        (kind, instance): (Kind, u32),
        backend: Box<dyn Backend>,
    ) -> std::io::Result<Self> {
        let event_fd = || EventFd::new(libc::EFD_NONBLOCK | libc::EFD_CLOEXEC);
        let (mmio, irq) = place(slot);
        let interrupt = event_fd()?;
        vm.register_irqfd(&interrupt, irq).map_err(std::io::Error::from)?;
        let model = backend.model();
        let mut notify = Vec::new();
        for queue in (0_u32..).take(model.queues) {
            let fd = event_fd()?;
            vm.register_ioevent(&fd, &IoEventAddress::Mmio(mmio + QUEUE_NOTIFY), queue).map_err(std::io::Error::from)?;
            notify.push(fd);
        }
        let name = format!("{}{instance}", kind.name());
        Ok(Self {
            kind,
            instance,
            shared: Shared { name, ram, transport: Mutex::new(Transport::new(&model)), interrupt, events },
            backend: Mutex::new(backend),
            wake: event_fd()?,
            notify,
            gate: Mutex::new(Gate { target: Target::Parked, parked: false }),
            gate_changed: Condvar::new(),
        })
    }

    /// Kind and number of its record.
    pub(crate) fn record_id(&self) -> (Kind, u32) {
        (self.kind, self.instance)
    }

    pub(crate) fn name(&self) -> &str {
        &self.shared.name
    }

    fn gate(&self) -> MutexGuard<'_, Gate> {
        self.gate.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn backend(&self) -> MutexGuard<'_, Box<dyn Backend>> {
        self.backend.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn mmio_read(&self, offset: u64, data: &mut [u8]) {
        self.shared.transport().read(offset, data);
    }

    pub(crate) fn mmio_write(&self, offset: u64, data: &[u8]) {
        let mut transport = self.shared.transport();
        match transport.write(self.shared.ram(), offset, data) {
            Request::None => return,
            Request::Broken(reason) => self.shared.break_down(&mut transport, reason),
            Request::Changed => {
                drop(transport);
                self.wake();
                // A driver takes its memory back once a reset is written: the turn in hand, which may write it, ends first.
                drop(self.backend());
                return;
            }
            Request::Notify(_) => {}
        }
        drop(transport);
        self.wake();
    }

    /// What wakes the thread, the input apart.
    fn wakers(&self) -> impl Iterator<Item = &EventFd> {
        std::iter::once(&self.wake).chain(&self.notify)
    }

    fn wake(&self) {
        // A full counter wakes all the same.
        let _ = self.wake.write(1);
    }

    /// The record of a parked device.
    pub(crate) fn save(&self) -> VirtioRecord {
        VirtioRecord { transport: self.shared.transport().clone(), extra: self.backend().save(&self.shared) }
    }

    /// Takes over a saved device.
    pub(crate) fn load(&self, record: VirtioRecord) -> Result<(), TransportError> {
        let mut backend = self.backend();
        let takes = |ours: &[u8], theirs: &[u8]| backend.takes_config(ours, theirs);
        self.shared.transport().load(self.shared.ram(), record.transport, takes)?;
        backend.load(&record.extra).map_err(TransportError::Extra)
    }

    /// After a load: what was on its way at the save is made good. An interrupt too many does no harm.
    pub(crate) fn arrived(&self) {
        self.backend().arrived(&self.shared);
        if self.shared.transport().has_interrupt() {
            let _ = self.shared.interrupt.write(1);
        }
    }

    /// Asks the backend whether the machine may run.
    pub(crate) fn may_resume(&self) -> Result<(), String> {
        self.backend().resuming(&self.shared)
    }

    /// Starts the thread, parked.
    pub(crate) fn start(self: &Arc<Self>) -> std::io::Result<DeviceThread> {
        let device = Arc::clone(self);
        let thread = std::thread::Builder::new().name(self.shared.name.clone()).spawn(move || match Worker::new(&device) {
            Ok(mut worker) => worker.run(),
            Err(error) => tracing::error!(device = device.shared.name, %error, "the device does not run"),
        })?;
        Ok(DeviceThread { device: Arc::clone(self), thread: Some(thread) })
    }

    fn set_target(&self, target: Target) {
        let mut gate = self.gate();
        if gate.target != Target::Quit {
            gate.target = target;
        }
        // Whoever is woken with the lock held wakes for nothing: it takes this thread's CPU and then waits for the lock.
        drop(gate);
        self.gate_changed.notify_all();
        // A parked thread waits there, and looks at everything when it is let run.
        if target != Target::Running {
            self.wake();
        }
    }

    /// Lets the device work.
    pub(crate) fn resume(&self) {
        self.set_target(Target::Running);
    }

    /// Tells the thread to park; [`Self::wait_parked`] waits for it.
    pub(crate) fn begin_pause(&self) {
        self.set_target(Target::Parked);
    }

    /// False if the thread did not park in time.
    pub(crate) fn wait_parked(&self) -> bool {
        let deadline = Instant::now() + PAUSE_MAX;
        let mut gate = self.gate();
        while !gate.parked {
            let Some(left) = deadline.checked_duration_since(Instant::now()) else { return false };
            gate = self.gate_changed.wait_timeout(gate, left).unwrap_or_else(PoisonError::into_inner).0;
        }
        true
    }
}

/// A device's thread; it ends when this is dropped.
#[derive(Debug)]
pub(crate) struct DeviceThread {
    device: Arc<VirtioDevice>,
    thread: Option<JoinHandle<()>>,
}

impl Drop for DeviceThread {
    fn drop(&mut self) {
        self.device.set_target(Target::Quit);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

/// What runs on a device's thread.
struct Worker<'a> {
    device: &'a VirtioDevice,
    epoll: Epoll,
    input_usable: bool,
    input_watched: bool,
}

/// Marks the input among what is waited for.
const INPUT_TOKEN: u64 = u64::MAX;

impl<'a> Worker<'a> {
    fn new(device: &'a VirtioDevice) -> std::io::Result<Self> {
        let epoll = Epoll::new()?;
        for fd in device.wakers() {
            epoll.ctl(ControlOperation::Add, fd.as_raw_fd(), EpollEvent::new(EventSet::IN, 0))?;
        }
        Ok(Self { device, epoll, input_usable: true, input_watched: false })
    }

    fn run(&mut self) {
        while self.park() {
            // Looks at all queues first: notifications from before a pause or a move are not remembered.
            loop {
                let turn = self.turn();
                if self.device.gate().target != Target::Running {
                    break;
                }
                self.wait(turn);
            }
        }
    }

    /// Waits for leave to run; false when the thread shall end.
    fn park(&self) -> bool {
        let device = self.device;
        let mut gate = device.gate();
        gate.parked = true;
        device.gate_changed.notify_all();
        while gate.target == Target::Parked {
            gate = device.gate_changed.wait(gate).unwrap_or_else(PoisonError::into_inner);
        }
        gate.parked = false;
        gate.target == Target::Running
    }

    fn turn(&mut self) -> Turn {
        let shared = &self.device.shared;
        if !shared.transport().is_live() {
            return Turn::Idle;
        }
        self.device.backend().turn(shared).unwrap_or_else(|error| {
            shared.break_down(&mut shared.transport(), &error.to_string());
            Turn::Idle
        })
    }

    /// Waits for a notification, and for input if it is wanted; only looks if there is more to do.
    fn wait(&mut self, turn: Turn) {
        // A backend may have another input, or none any more, after a turn; it says so by losing it.
        let input = self.device.backend().input();
        let watch = turn == Turn::WantsInput && self.input_usable && input.is_some();
        if let Some(fd) = input.filter(|_| watch != self.input_watched) {
            // Taken out when unwanted: an input in trouble would otherwise wake this thread for ever.
            let operation = if watch { ControlOperation::Add } else { ControlOperation::Delete };
            match self.epoll.ctl(operation, fd, EpollEvent::new(EventSet::IN, INPUT_TOKEN)) {
                Ok(()) => self.input_watched = watch,
                Err(error) => self.lose_input(&format!("it cannot be waited for: {error}")),
            }
        }
        let mut ready = [EpollEvent::default(); 8];
        let Ok(count) = self.epoll.wait(if turn == Turn::More { 0 } else { -1 }, &mut ready) else { return };
        let input = ready.iter().take(count).find(|event| event.data() == INPUT_TOKEN);
        if input.is_some_and(|event| !event.event_set().contains(EventSet::IN)) {
            self.lose_input("it was removed");
        }
        for fd in self.device.wakers() {
            // Non-blocking: an error says that nothing was signalled.
            let _ = fd.read();
        }
    }

    fn lose_input(&mut self, reason: &str) {
        self.input_usable = false;
        self.device.backend().input_lost(&self.device.shared, reason);
    }
}

#[cfg(test)]
#[path = "worker_tests.rs"]
pub(crate) mod tests;
