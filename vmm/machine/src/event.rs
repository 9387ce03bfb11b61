//! What a machine tells its owner: the guest reset, shut down or broke. Not progress, nor logs.

use std::collections::VecDeque;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use nix::sys::eventfd::{EfdFlags, EventFd};

/// Events kept for an owner who does not listen; a guest cannot make the queue grow beyond.
const QUEUED_MAX: usize = 256;

/// Something that the owner should know of.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum MachineEvent {
    /// The guest asked to be reset (keyboard controller, port 0x64). That vCPU does not run on.
    Reset {
        /// The vCPU that asked.
        vcpu: u32,
    },
    /// The guest shut down: a triple fault, or a shutdown event of KVM. That vCPU does not run on.
    Shutdown {
        /// The vCPU that did.
        vcpu: u32,
        /// The KVM exit in words.
        reason: String,
    },
    /// A vCPU halted with nothing to wake it. That vCPU does not run on.
    Halted {
        /// The vCPU that halted.
        vcpu: u32,
    },
    /// KVM cannot run a vCPU any more: an error of this host or of KVM, or code that it cannot run.
    Failed {
        /// The vCPU that failed.
        vcpu: u32,
        /// The KVM exit in words.
        reason: String,
    },
    /// A device stopped: its driver broke the rules, or its TAP is gone. The guest runs on.
    DeviceBroken {
        /// The device, as `net0`.
        device: String,
        /// What happened.
        reason: String,
    },
}

/// The queue of events, which an owner can wait on, or poll by its descriptor.
#[derive(Debug)]
pub struct Events {
    queue: Mutex<VecDeque<MachineEvent>>,
    arrived: Condvar,
    wake: EventFd,
}

impl Events {
    pub(crate) fn new() -> nix::Result<Self> {
        let wake = EventFd::from_flags(EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK)?;
        Ok(Self { queue: Mutex::default(), arrived: Condvar::new(), wake })
    }

    fn lock(&self) -> MutexGuard<'_, VecDeque<MachineEvent>> {
        self.queue.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn push(&self, event: MachineEvent) {
        tracing::debug!(?event, "machine event");
        let mut queue = self.lock();
        if queue.len() < QUEUED_MAX {
            queue.push_back(event);
        }
        self.arrived.notify_all();
        // A full counter is readable all the same, so a refused write changes nothing.
        let _ = self.wake.write(1);
    }

    /// The next event, if there is one.
    pub fn try_recv(&self) -> Option<MachineEvent> {
        let mut queue = self.lock();
        let event = queue.pop_front();
        if queue.is_empty() {
            let _ = self.wake.read();
        }
        event
    }

    /// The next event, or `None` when none came within `timeout`.
    pub fn recv_timeout(&self, timeout: Duration) -> Option<MachineEvent> {
        let deadline = Instant::now() + timeout;
        loop {
            if let Some(event) = self.try_recv() {
                return Some(event);
            }
            let left = deadline.checked_duration_since(Instant::now())?;
            let queue = self.lock();
            if queue.is_empty() {
                drop(self.arrived.wait_timeout(queue, left).unwrap_or_else(PoisonError::into_inner));
            }
        }
    }
}

impl AsFd for Events {
    /// Readable while events are queued: for `poll` and the like.
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.wake.as_fd()
    }
}
