//! A completion queue with the channel that says when something is in it. One queue pair owns it, so that what was taken from
//! it also sets free what its work requests held. It does not wait: `wait.rs` does.

use crate::counters::{Kind, Tally};
use crate::device::Context;
use crate::error::CreateError;
use crate::faults::{Notice, set_nonblocking};
use rdma_sys::{ibv_comp_channel, ibv_cq, ibv_wc};
use std::ffi::c_int;
use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::ptr::{self, NonNull};
use std::sync::Arc;

/// Events are acknowledged in lots: each acknowledgement takes a lock.
const ACKNOWLEDGE_AT: u32 = 64;

#[derive(Debug)]
struct CompletionChannel {
    raw: NonNull<ibv_comp_channel>,
    context: Arc<Context>,
}

impl CompletionChannel {
    fn new(context: &Arc<Context>) -> Result<CompletionChannel, CreateError> {
        // SAFETY: the context is open as long as its handle lives.
        let raw = unsafe { (context.library().verbs.ibv_create_comp_channel)(context.raw()) };
        let Some(raw) = NonNull::new(raw) else {
            return Err(CreateError::of(context.name(), "ibv_create_comp_channel", io::Error::last_os_error()));
        };
        let channel = CompletionChannel { raw, context: Arc::clone(context) };
        set_nonblocking(channel.as_fd()).map_err(|error| CreateError::of(context.name(), "fcntl", error))?;
        Ok(channel)
    }
}

impl AsFd for CompletionChannel {
    fn as_fd(&self) -> BorrowedFd<'_> {
        // SAFETY: the channel lives as long as its handle.
        let number = unsafe { (*self.raw.as_ptr()).fd };
        // SAFETY: the descriptor is open as long as the channel is.
        unsafe { BorrowedFd::borrow_raw(number) }
    }
}

impl Drop for CompletionChannel {
    fn drop(&mut self) {
        // SAFETY: the queue that used it was destroyed before (the order of `CompletionQueue`'s fields); it is not used after.
        let code = unsafe { (self.context.library().verbs.ibv_destroy_comp_channel)(self.raw.as_ptr()) };
        if code != 0 {
            tracing::warn!(error = %io::Error::from_raw_os_error(code), "a completion channel cannot be destroyed");
        }
    }
}

/// The C object, destroyed before the channel.
#[derive(Debug)]
struct RawQueue {
    raw: NonNull<ibv_cq>,
    /// Events that were taken and not yet acknowledged; destroying waits for all.
    taken: u32,
    context: Arc<Context>,
    _tally: Tally,
}

impl RawQueue {
    fn acknowledge(&mut self) {
        if self.taken > 0 {
            // SAFETY: the queue lives, and so many events of it were taken and not acknowledged.
            unsafe { (self.context.library().verbs.ibv_ack_cq_events)(self.raw.as_ptr(), self.taken) };
            self.taken = 0;
        }
    }
}

impl Drop for RawQueue {
    fn drop(&mut self) {
        self.context.faults().forget(self.raw.addr().get());
        self.acknowledge();
        // SAFETY: the queue pair that used it was destroyed before (the order in `QueuePair`); it is not used after.
        let code = unsafe { (self.context.library().verbs.ibv_destroy_cq)(self.raw.as_ptr()) };
        if code != 0 {
            tracing::warn!(error = %io::Error::from_raw_os_error(code), "a completion queue cannot be destroyed");
        }
    }
}

/// A completion queue.
#[derive(Debug)]
pub(crate) struct CompletionQueue {
    queue: RawQueue,
    channel: CompletionChannel,
}

// SAFETY: libibverbs may be called from any thread, and the objects are destroyed once, by drop.
unsafe impl Send for CompletionQueue {}
// SAFETY: as above; what changes the handle's own numbers needs `&mut`.
unsafe impl Sync for CompletionQueue {}

impl CompletionQueue {
    /// Makes one with room for `entries`; an overrun is told to `notice`.
    pub(crate) fn new(context: &Arc<Context>, entries: u32, notice: &Arc<Notice>) -> Result<CompletionQueue, CreateError> {
        let limit = context.limits().queue_entries_max;
        let (Ok(count), true) = (c_int::try_from(entries), u64::from(entries) <= limit) else {
            let what = "the number of completion queue entries (send and receive depth together)";
            let device = context.name().to_owned();
            return Err(CreateError::OverLimit { device, what, asked: entries.into(), limit });
        };
        let channel = CompletionChannel::new(context)?;
        let create = context.library().verbs.ibv_create_cq;
        // SAFETY: context and channel live; the queue is destroyed before both. No pointer of ours is handed over.
        let raw = unsafe { create(context.raw(), count, ptr::null_mut(), channel.raw.as_ptr(), 0) };
        let Some(raw) = NonNull::new(raw) else {
            return Err(CreateError::of(context.name(), "ibv_create_cq", io::Error::last_os_error()));
        };
        context.faults().tell(raw.addr().get(), notice);
        let queue = RawQueue { raw, taken: 0, context: Arc::clone(context), _tally: Tally::new(Kind::Queue) };
        Ok(CompletionQueue { queue, channel })
    }

    pub(crate) fn raw(&self) -> *mut ibv_cq {
        self.queue.raw.as_ptr()
    }

    /// Takes completions out, as many as there are and fit; says how many.
    pub(crate) fn poll(&mut self, into: &mut [ibv_wc]) -> io::Result<usize> {
        let room = i32::try_from(into.len()).unwrap_or(i32::MAX);
        // SAFETY: the queue lives, and `into` has room for so many.
        let count = unsafe { rdma_sys::ibv_poll_cq(self.raw(), room, into.as_mut_ptr()) };
        usize::try_from(count).map_err(|_| io::Error::other(format!("ibv_poll_cq gave {count}")))
    }

    /// Asks for an event when the next completion comes. What came before is not told: poll again after this.
    pub(crate) fn arm(&mut self) -> io::Result<()> {
        // SAFETY: the queue lives.
        let code = unsafe { rdma_sys::ibv_req_notify_cq(self.raw(), 0) };
        if code == 0 { Ok(()) } else { Err(io::Error::from_raw_os_error(code)) }
    }

    /// Takes all events that wait in the channel.
    pub(crate) fn take_events(&mut self) -> io::Result<()> {
        loop {
            let mut queue = ptr::null_mut();
            let mut nothing = ptr::null_mut();
            let get = self.queue.context.library().verbs.ibv_get_cq_event;
            // SAFETY: the channel lives, does not block, and belongs to this queue alone; both results have room.
            if unsafe { get(self.channel.raw.as_ptr(), &raw mut queue, &raw mut nothing) } != 0 {
                let error = io::Error::last_os_error();
                return match error.kind() {
                    io::ErrorKind::WouldBlock => Ok(()),
                    io::ErrorKind::Interrupted => continue,
                    _ => Err(error),
                };
            }
            self.queue.taken += 1;
            if self.queue.taken >= ACKNOWLEDGE_AT {
                self.queue.acknowledge();
            }
        }
    }
}

impl AsFd for CompletionQueue {
    /// Readable when an event waits.
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.channel.as_fd()
    }
}
