//! A virtio network card between a guest and a TAP. Not the registers (`transport.rs`) nor the rings (`queue.rs`).
//!
//! One thread a card moves frames both ways; it takes the card's lock for each turn and never blocks under it. While the
//! machine is paused the thread is parked, so guest memory and TAP are left alone. Frames wait in the TAP meanwhile.

use std::io::{ErrorKind, Read, Write};
use std::os::fd::AsRawFd;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use kvm_ioctls::{IoEventAddress, VmFd};
use vm_memory::{Bytes, GuestAddress};
use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};
use vmm_sys_util::eventfd::EventFd;

use super::queue::QueueError;
use super::transport::{INTERRUPT_USED, QUEUE_NOTIFY, Request, Transport, TransportError};
use crate::event::{Events, MachineEvent};
use crate::memory::Ram;
use crate::tap::{Tap, VNET_HEADER_BYTES};

const DEVICE_ID: u32 = 1;
const FEATURE_MTU: u64 = 1 << 3;
const FEATURE_MAC: u64 = 1 << 5;
const FEATURE_STATUS: u64 = 1 << 16;
const RECEIVE: usize = 0;
const TRANSMIT: usize = 1;
/// Frames moved in each direction before other work, and a pause, have their turn.
const TURN_FRAMES_MAX: usize = 64;
/// The largest frame with its header: no offloads, so an MTU of 65,535, Ethernet and VLAN headers are the most.
const FRAME_BYTES_MAX: usize = VNET_HEADER_BYTES + 65_535 + 22;
const FRAME_BYTES_MIN: usize = VNET_HEADER_BYTES + 14;
const PAUSE_MAX: Duration = Duration::from_secs(2);

/// What a card is made of.
#[derive(Debug)]
pub(crate) struct NetParts {
    pub(crate) index: usize,
    pub(crate) mac: [u8; 6],
    pub(crate) mtu: u16,
    pub(crate) tap: Tap,
    pub(crate) irq: u32,
    pub(crate) mmio: u64,
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

/// A network card.
#[derive(Debug)]
pub(crate) struct NetDevice {
    name: String,
    ram: Arc<Ram>,
    transport: Mutex<Transport>,
    tap: Tap,
    interrupt: EventFd,
    /// Wakes the thread: chains were offered, or the machine pauses or ends.
    wake: EventFd,
    /// KVM signals these for a notification of queue 0 and 1, without an exit to this process.
    notify: [EventFd; 2],
    gate: Mutex<Gate>,
    gate_changed: Condvar,
    events: Arc<Events>,
}

impl NetDevice {
    /// Makes a card and binds its interrupt and its queues' notifications in `vm`.
    pub(crate) fn new(vm: &VmFd, ram: Arc<Ram>, parts: NetParts, events: Arc<Events>) -> std::io::Result<Self> {
        let event_fd = || EventFd::new(libc::EFD_NONBLOCK | libc::EFD_CLOEXEC);
        let interrupt = event_fd()?;
        vm.register_irqfd(&interrupt, parts.irq).map_err(std::io::Error::from)?;
        let notify = [event_fd()?, event_fd()?];
        for (queue, fd) in (0_u32..).zip(&notify) {
            vm.register_ioevent(fd, &IoEventAddress::Mmio(parts.mmio + QUEUE_NOTIFY), queue).map_err(std::io::Error::from)?;
        }
        let mut config = parts.mac.to_vec();
        // Link up; one pair of queues; the MTU.
        config.extend([1, 0, 1, 0]);
        config.extend(parts.mtu.to_le_bytes());
        let features = FEATURE_MAC | FEATURE_MTU | FEATURE_STATUS;
        Ok(Self {
            name: format!("net{}", parts.index),
            ram,
            transport: Mutex::new(Transport::new(DEVICE_ID, features, config, 2)),
            tap: parts.tap,
            interrupt,
            wake: event_fd()?,
            notify,
            gate: Mutex::new(Gate { target: Target::Parked, parked: false }),
            gate_changed: Condvar::new(),
            events,
        })
    }

    fn transport(&self) -> MutexGuard<'_, Transport> {
        self.transport.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn gate(&self) -> MutexGuard<'_, Gate> {
        self.gate.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn mmio_read(&self, offset: u64, data: &mut [u8]) {
        self.transport().read(offset, data);
    }

    pub(crate) fn mmio_write(&self, offset: u64, data: &[u8]) {
        let mut transport = self.transport();
        match transport.write(self.ram.guest(), offset, data) {
            Request::None => return,
            Request::Broken(reason) => self.break_down(&mut transport, reason),
            Request::Notify(_) | Request::Changed => {}
        }
        drop(transport);
        self.wake();
    }

    /// What wakes the thread, the TAP apart.
    fn wakers(&self) -> [&EventFd; 3] {
        let [receive, transmit] = &self.notify;
        [&self.wake, receive, transmit]
    }

    fn wake(&self) {
        // A full counter wakes all the same.
        let _ = self.wake.write(1);
    }

    fn break_down(&self, transport: &mut Transport, reason: &str) {
        transport.set_broken();
        let _ = self.interrupt.write(1);
        self.events.push(MachineEvent::DeviceBroken { device: self.name.clone(), reason: reason.to_owned() });
    }

    /// The record of a parked card.
    pub(crate) fn save(&self) -> Transport {
        self.transport().clone()
    }

    /// Takes over a saved card.
    pub(crate) fn load(&self, record: Transport) -> Result<(), TransportError> {
        self.transport().load(self.ram.guest(), record)
    }

    /// After a load: an interrupt that was on its way at the save is raised again; one too many does no harm.
    pub(crate) fn raise_again(&self) {
        if self.transport().has_interrupt() {
            let _ = self.interrupt.write(1);
        }
    }

    /// Starts the thread, parked.
    pub(crate) fn start(self: &Arc<Self>) -> std::io::Result<NetThread> {
        let device = Arc::clone(self);
        let thread = std::thread::Builder::new().name(self.name.clone()).spawn(move || match Mover::new(&device) {
            Ok(mut mover) => mover.run(),
            Err(error) => tracing::error!(device = device.name, %error, "network card does not run"),
        })?;
        Ok(NetThread { device: Arc::clone(self), thread: Some(thread) })
    }

    fn set_target(&self, target: Target) {
        let mut gate = self.gate();
        if gate.target != Target::Quit {
            gate.target = target;
        }
        self.gate_changed.notify_all();
        drop(gate);
        self.wake();
    }

    /// Lets frames pass.
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

    pub(crate) fn name(&self) -> &str {
        &self.name
    }
}

/// A card's thread; it ends when this is dropped.
#[derive(Debug)]
pub(crate) struct NetThread {
    device: Arc<NetDevice>,
    thread: Option<JoinHandle<()>>,
}

impl Drop for NetThread {
    fn drop(&mut self) {
        self.device.set_target(Target::Quit);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

/// How a direction stands after its turn.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Turn {
    /// Nothing more to do until somebody wakes the thread.
    Idle,
    /// Chains are there; frames are not.
    WantsFrames,
    /// More is waiting.
    More,
}

/// What runs on a card's thread.
struct Mover<'a> {
    device: &'a NetDevice,
    epoll: Epoll,
    frame: Vec<u8>,
    tap_usable: bool,
    tap_watched: bool,
}

/// Marks the TAP among what is waited for.
const TAP_TOKEN: u64 = u64::MAX;

impl<'a> Mover<'a> {
    fn new(device: &'a NetDevice) -> std::io::Result<Self> {
        let epoll = Epoll::new()?;
        for fd in device.wakers() {
            epoll.ctl(ControlOperation::Add, fd.as_raw_fd(), EpollEvent::new(EventSet::IN, 0))?;
        }
        Ok(Self { device, epoll, frame: vec![0; FRAME_BYTES_MAX], tap_usable: true, tap_watched: false })
    }

    fn run(&mut self) {
        while self.park() {
            // Looks at both queues first: notifications from before a pause or a move are not remembered.
            loop {
                let (receive, transmit) = self.turn();
                if self.device.gate().target != Target::Running {
                    break;
                }
                let busy = receive == Turn::More || transmit == Turn::More;
                self.wait(receive != Turn::Idle, busy);
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

    /// Waits for a notification, and for frames if they are wanted; only looks if `busy`.
    fn wait(&mut self, wants_frames: bool, busy: bool) {
        let watch = wants_frames && self.tap_usable;
        if watch != self.tap_watched {
            // Taken out when unwanted: a TAP in trouble would otherwise wake this thread for ever.
            let operation = if watch { ControlOperation::Add } else { ControlOperation::Delete };
            let tap = self.device.tap.file().as_raw_fd();
            match self.epoll.ctl(operation, tap, EpollEvent::new(EventSet::IN, TAP_TOKEN)) {
                Ok(()) => self.tap_watched = watch,
                Err(error) => self.lose_tap(&format!("its TAP cannot be waited for: {error}")),
            }
        }
        let mut ready = [EpollEvent::default(); 4];
        let Ok(count) = self.epoll.wait(if busy { 0 } else { -1 }, &mut ready) else { return };
        let tap = ready.iter().take(count).find(|event| event.data() == TAP_TOKEN);
        if tap.is_some_and(|event| !event.event_set().contains(EventSet::IN)) {
            self.lose_tap("its TAP was removed");
        }
        for fd in self.device.wakers() {
            // Non-blocking: an error says that nothing was signalled.
            let _ = fd.read();
        }
    }

    fn lose_tap(&mut self, reason: &str) {
        self.tap_usable = false;
        let device = self.device.name.clone();
        self.device.events.push(MachineEvent::DeviceBroken { device, reason: reason.to_owned() });
    }

    fn turn(&mut self) -> (Turn, Turn) {
        let device = self.device;
        let mut transport = device.transport();
        if !transport.is_live() {
            return (Turn::Idle, Turn::Idle);
        }
        let mut moved = false;
        let done = self
            .transmit(&mut transport, &mut moved)
            .and_then(|transmit| Ok((self.receive(&mut transport, &mut moved)?, transmit)));
        if moved {
            device.interrupt_for_used(&mut transport);
        }
        done.unwrap_or_else(|error| {
            device.break_down(&mut transport, &error.to_string());
            (Turn::Idle, Turn::Idle)
        })
    }

    /// Frames of the guest to the TAP. One that the TAP does not take, or that is none, is dropped, as on a wire.
    fn transmit(&mut self, transport: &mut Transport, moved: &mut bool) -> Result<Turn, QueueError> {
        let ram = self.device.ram.guest();
        let Some(queue) = transport.queues.get_mut(TRANSMIT) else { return Ok(Turn::Idle) };
        for _ in 0..TURN_FRAMES_MAX {
            let Some(chain) = queue.pop(ram)? else { return Ok(Turn::Idle) };
            let mut bytes = 0_usize;
            let mut fits = true;
            for segment in chain.segments.iter().filter(|segment| !segment.writable) {
                let part = bytes.checked_add(segment.bytes as usize).and_then(|end| self.frame.get_mut(bytes..end));
                let Some(part) = part else {
                    fits = false;
                    break;
                };
                ram.read_slice(part, GuestAddress(segment.address)).map_err(|_| QueueError::Memory(segment.address))?;
                bytes += segment.bytes as usize;
            }
            if fits && bytes >= FRAME_BYTES_MIN {
                self.send(bytes);
            }
            queue.push_used(ram, chain.head, 0)?;
            *moved = true;
        }
        Ok(Turn::More)
    }

    fn send(&mut self, bytes: usize) {
        let Some(frame) = self.frame.get_mut(..bytes) else { return };
        // No offloads were offered, so whatever the guest's header says, this frame is complete.
        frame.iter_mut().take(VNET_HEADER_BYTES).for_each(|byte| *byte = 0);
        if let Err(error) = self.device.tap.file().write(frame) {
            tracing::trace!(device = self.device.name, %error, "frame dropped");
        }
    }

    /// Frames of the TAP to the guest, as long as it offers buffers; others wait in the TAP.
    fn receive(&mut self, transport: &mut Transport, moved: &mut bool) -> Result<Turn, QueueError> {
        let ram = self.device.ram.guest();
        let Some(queue) = transport.queues.get_mut(RECEIVE) else { return Ok(Turn::Idle) };
        for _ in 0..TURN_FRAMES_MAX {
            if !queue.has_chain(ram)? || !self.tap_usable {
                return Ok(Turn::Idle);
            }
            let bytes = match self.device.tap.file().read(&mut self.frame) {
                Ok(bytes) if bytes >= FRAME_BYTES_MIN => bytes,
                Ok(0) => {
                    self.lose_tap("the other end of its TAP was closed");
                    return Ok(Turn::Idle);
                }
                Ok(_) => continue,
                Err(error) if error.kind() == ErrorKind::Interrupted => continue,
                Err(error) if error.kind() == ErrorKind::WouldBlock => return Ok(Turn::WantsFrames),
                Err(error) => {
                    self.lose_tap(&format!("its TAP cannot be read: {error}"));
                    return Ok(Turn::Idle);
                }
            };
            let Some(chain) = queue.pop(ram)? else { return Ok(Turn::Idle) };
            let frame = self.frame.get_mut(..bytes).unwrap_or(&mut []);
            // The kernel's header says what the host knows of checksums; without offloads it is plain, in one buffer.
            for (byte, value) in frame.iter_mut().zip([0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1, 0]) {
                *byte = value;
            }
            let mut rest: &[u8] = frame;
            for segment in chain.segments.iter().filter(|segment| segment.writable) {
                let (part, left) = rest.split_at(rest.len().min(segment.bytes as usize));
                ram.write_slice(part, GuestAddress(segment.address)).map_err(|_| QueueError::Memory(segment.address))?;
                rest = left;
            }
            // A frame that does not fit is lost, not cut; its buffer is given back empty.
            let written = if rest.is_empty() { u32::try_from(bytes).unwrap_or(0) } else { 0 };
            queue.push_used(ram, chain.head, written)?;
            *moved = true;
        }
        Ok(Turn::More)
    }
}

impl NetDevice {
    fn interrupt_for_used(&self, transport: &mut Transport) {
        let ram = self.ram.guest();
        let live = transport.queues.iter().filter(|queue| queue.ready);
        // One interrupt serves both queues, so it is raised if either side of the driver wants it.
        if live.map(|queue| queue.wants_interrupt(ram)).any(|wants| wants.unwrap_or(true)) {
            transport.set_interrupt(INTERRUPT_USED);
            let _ = self.interrupt.write(1);
        }
    }
}

#[cfg(test)]
#[path = "net_tests.rs"]
mod tests;
