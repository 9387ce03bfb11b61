//! What a device tells of its own accord: that a queue overran, a queue pair died, or the device itself. A thread for each
//! open device waits for that and passes it to whom it concerns. Errors of work requests come as completions, not here.

use crate::bell::Bell;
use crate::library::Library;
use nix::errno::Errno;
use nix::fcntl::{FcntlArg, OFlag, fcntl};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use rdma_sys::{ibv_async_event, ibv_context, ibv_event_type};
use std::collections::HashMap;
use std::fmt;
use std::io;
use std::mem;
use std::os::fd::{AsFd, BorrowedFd};
use std::ptr::NonNull;
use std::sync::atomic::{AtomicBool, AtomicU8, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;

/// What happened to a queue pair outside its work requests. It does no work after that.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fault {
    /// The completion queue overran: completions are lost.
    QueueOverrun,
    /// The device gave the queue pair up.
    PairFatal,
    /// The peer asked for what the transport does not allow.
    PairRequest,
    /// The peer asked for what the queue pair does not allow.
    PairAccess,
    /// The device failed.
    DeviceFatal,
}

impl fmt::Display for Fault {
    fn fmt(&self, to: &mut fmt::Formatter<'_>) -> fmt::Result {
        to.write_str(match self {
            Fault::QueueOverrun => {
                "the completion queue overran and completions are lost: this is an error of Limosa or of the device's driver"
            }
            Fault::PairFatal => "the device gave the queue pair up (IBV_EVENT_QP_FATAL): see the kernel's log",
            Fault::PairRequest => "the peer sent what the transport does not allow (IBV_EVENT_QP_REQ_ERR)",
            Fault::PairAccess => "the peer sent what this queue pair does not allow (IBV_EVENT_QP_ACCESS_ERR)",
            Fault::DeviceFatal => "the RDMA device failed (IBV_EVENT_DEVICE_FATAL): see the kernel's log",
        })
    }
}

impl Fault {
    const ALL: [Fault; 5] = [Fault::QueueOverrun, Fault::PairFatal, Fault::PairRequest, Fault::PairAccess, Fault::DeviceFatal];

    fn of_event(event: ibv_event_type::Type) -> Option<Fault> {
        match event {
            ibv_event_type::IBV_EVENT_CQ_ERR => Some(Fault::QueueOverrun),
            ibv_event_type::IBV_EVENT_QP_FATAL => Some(Fault::PairFatal),
            ibv_event_type::IBV_EVENT_QP_REQ_ERR => Some(Fault::PairRequest),
            ibv_event_type::IBV_EVENT_QP_ACCESS_ERR => Some(Fault::PairAccess),
            ibv_event_type::IBV_EVENT_DEVICE_FATAL => Some(Fault::DeviceFatal),
            // A port that goes down and comes back is what the retries of a queue pair are for.
            _ => None,
        }
    }
}

/// What a queue pair's waits look at besides its completions.
#[derive(Debug)]
pub(crate) struct Notice {
    pub(crate) bell: Bell,
    closed: AtomicBool,
    /// 0 or one more than the place in `Fault::ALL`.
    fault: AtomicU8,
}

impl Notice {
    pub(crate) fn new() -> io::Result<Notice> {
        Ok(Notice { bell: Bell::new()?, closed: AtomicBool::new(false), fault: AtomicU8::new(0) })
    }

    pub(crate) fn close(&self) {
        self.closed.store(true, Ordering::SeqCst);
        self.bell.ring();
    }

    pub(crate) fn is_closed(&self) -> bool {
        self.closed.load(Ordering::SeqCst)
    }

    pub(crate) fn fault(&self) -> Option<Fault> {
        fault(&self.fault)
    }

    fn set_fault(&self, fault: Fault) {
        set_fault(&self.fault, fault);
        self.bell.ring();
    }
}

fn fault(cell: &AtomicU8) -> Option<Fault> {
    let place = usize::from(cell.load(Ordering::SeqCst)).checked_sub(1)?;
    Fault::ALL.get(place).copied()
}

/// The first fault stays: what follows is its consequence.
fn set_fault(cell: &AtomicU8, fault: Fault) {
    let place = Fault::ALL.iter().position(|one| *one == fault).and_then(|place| u8::try_from(place + 1).ok());
    let _ = cell.compare_exchange(0, place.unwrap_or(0), Ordering::SeqCst, Ordering::SeqCst);
}

/// Who is told of what, on one device.
#[derive(Debug, Default)]
pub(crate) struct Faults {
    /// By the address of the queue pair or the completion queue, which is compared and never followed.
    concerned: Mutex<HashMap<usize, Arc<Notice>>>,
    device: AtomicU8,
}

impl Faults {
    /// Passes what happens to the object at `address` on, until [`Faults::forget`].
    pub(crate) fn tell(&self, address: usize, notice: &Arc<Notice>) {
        self.concerned().insert(address, Arc::clone(notice));
        if let Some(fault) = self.of_device() {
            notice.set_fault(fault);
        }
    }

    /// To be called before the object is destroyed: its address may be given to another.
    pub(crate) fn forget(&self, address: usize) {
        self.concerned().remove(&address);
    }

    pub(crate) fn of_device(&self) -> Option<Fault> {
        fault(&self.device)
    }

    fn concerned(&self) -> MutexGuard<'_, HashMap<usize, Arc<Notice>>> {
        self.concerned.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn pass_on(&self, fault: Fault, address: usize) {
        if fault == Fault::DeviceFatal {
            set_fault(&self.device, fault);
            self.concerned().values().for_each(|notice| notice.set_fault(fault));
        } else if let Some(notice) = self.concerned().get(&address) {
            notice.set_fault(fault);
        }
    }
}

/// The thread that waits for events of one device; it ends with the handle.
#[derive(Debug)]
pub(crate) struct Watcher {
    stop: Arc<Bell>,
    thread: Option<JoinHandle<()>>,
}

/// A context on its way to the thread that watches it.
struct Watched(NonNull<ibv_context>);

// SAFETY: libibverbs may be called from any thread; the context outlives the thread, which is joined before it is closed.
unsafe impl Send for Watched {}

impl Watcher {
    /// Starts to watch `context`, which must stay open until the watcher is dropped.
    pub(crate) fn start(library: &'static Library, context: NonNull<ibv_context>, faults: Arc<Faults>) -> io::Result<Watcher> {
        let stop = Arc::new(Bell::new()?);
        // SAFETY: the context is open.
        let number = unsafe { (*context.as_ptr()).async_fd };
        // SAFETY: the descriptor is open as long as the context is; the borrow ends with this function.
        let descriptor = unsafe { BorrowedFd::borrow_raw(number) };
        set_nonblocking(descriptor)?;
        let (watched, heard) = (Watched(context), Arc::clone(&stop));
        let watch = move || {
            let watched = watched;
            watch(library, watched.0, &faults, &heard);
        };
        let thread = std::thread::Builder::new().name("rdma events".to_owned()).spawn(watch)?;
        Ok(Watcher { stop, thread: Some(thread) })
    }
}

impl Drop for Watcher {
    fn drop(&mut self) {
        self.stop.ring();
        if let Some(thread) = self.thread.take()
            && thread.join().is_err()
        {
            tracing::warn!("the thread for events of an RDMA device ended badly");
        }
    }
}

pub(crate) fn set_nonblocking(descriptor: BorrowedFd<'_>) -> io::Result<()> {
    let flags = OFlag::from_bits_retain(fcntl(descriptor, FcntlArg::F_GETFL)?);
    fcntl(descriptor, FcntlArg::F_SETFL(flags | OFlag::O_NONBLOCK))?;
    Ok(())
}

fn watch(library: &'static Library, context: NonNull<ibv_context>, faults: &Faults, stop: &Bell) {
    // SAFETY: the context is open as long as this thread runs.
    let number = unsafe { (*context.as_ptr()).async_fd };
    // SAFETY: likewise its descriptor.
    let events = unsafe { BorrowedFd::borrow_raw(number) };
    loop {
        let mut both = [PollFd::new(events, PollFlags::POLLIN), PollFd::new(stop.as_fd(), PollFlags::POLLIN)];
        match poll(&mut both, PollTimeout::NONE) {
            Ok(_) => {}
            Err(Errno::EINTR) => continue,
            Err(error) => return tracing::warn!(%error, "events of an RDMA device cannot be waited for"),
        }
        let [event, stopped] = both.map(|one| one.revents().unwrap_or(PollFlags::empty()));
        if !stopped.is_empty() {
            return;
        }
        if event.intersects(PollFlags::POLLERR | PollFlags::POLLHUP | PollFlags::POLLNVAL) && !next(library, context, faults) {
            return faults.pass_on(Fault::DeviceFatal, 0);
        }
        while next(library, context, faults) {}
    }
}

/// Takes one event, if there is one, and passes it on.
fn next(library: &'static Library, context: NonNull<ibv_context>, faults: &Faults) -> bool {
    // SAFETY: a plain C struct of a number and a union of a number and pointers: zeros are a valid value.
    let mut event: ibv_async_event = unsafe { mem::zeroed() };
    // SAFETY: the context is open, its descriptor does not block, and the event has room.
    if unsafe { (library.verbs.ibv_get_async_event)(context.as_ptr(), &raw mut event) } != 0 {
        return false;
    }
    // SAFETY: every byte of the union was set, by zeros or by the call; the pointer is compared and never followed.
    let address = unsafe { event.element.cq }.addr();
    match Fault::of_event(event.event_type) {
        Some(fault) => faults.pass_on(fault, address),
        None => tracing::debug!(event = event.event_type, "event of an RDMA device"),
    }
    // SAFETY: the event came from ibv_get_async_event and is given back once.
    unsafe { (library.verbs.ibv_ack_async_event)(&raw mut event) };
    true
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_fault_reaches_whom_it_concerns_and_the_first_one_stays() {
        let faults = Faults::default();
        let (one, other) = (Arc::new(Notice::new().unwrap()), Arc::new(Notice::new().unwrap()));
        faults.tell(1, &one);
        faults.tell(2, &other);
        faults.pass_on(Fault::QueueOverrun, 1);
        faults.pass_on(Fault::PairFatal, 1);
        assert_eq!((one.fault(), other.fault()), (Some(Fault::QueueOverrun), None));
        assert_eq!(faults.of_device(), None);
    }

    #[test]
    fn a_forgotten_address_may_belong_to_another() {
        let faults = Faults::default();
        let notice = Arc::new(Notice::new().unwrap());
        faults.tell(1, &notice);
        faults.forget(1);
        faults.pass_on(Fault::PairFatal, 1);
        assert_eq!(notice.fault(), None);
    }

    #[test]
    fn the_end_of_a_device_concerns_all_also_those_that_come_later() {
        let faults = Faults::default();
        let (early, late) = (Arc::new(Notice::new().unwrap()), Arc::new(Notice::new().unwrap()));
        faults.tell(1, &early);
        faults.pass_on(Fault::DeviceFatal, 0);
        faults.tell(2, &late);
        assert_eq!((early.fault(), late.fault()), (Some(Fault::DeviceFatal), Some(Fault::DeviceFatal)));
        assert_eq!(faults.of_device(), Some(Fault::DeviceFatal));
    }

    #[test]
    fn every_fault_has_words() {
        for fault in Fault::ALL {
            assert!(fault.to_string().len() > 20, "{fault:?}");
        }
    }
}
