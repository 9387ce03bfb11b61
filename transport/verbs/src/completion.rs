//! What became of work requests: completions, their statuses in words, and the list of requests that are under way, which holds
//! the memory regions that they name.

use crate::region::MemoryRegion;
use rdma_sys::{ibv_wc, ibv_wc_status};
use std::collections::VecDeque;
use std::fmt;
use std::sync::Arc;
use thiserror::Error;

/// Set in the number of a work request that the device sees if it is a receive.
const RECEIVE: u64 = 1 << 63;
/// `IBV_WC_WITH_IMM` of libibverbs.
const WITH_IMMEDIATE: u32 = 2;

/// What was asked for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Verb {
    /// RDMA WRITE: the peer does not notice.
    Write,
    /// RDMA WRITE with immediate data: uses up a receive of the peer.
    WriteImmediate,
    /// SEND: uses up a receive of the peer.
    Send,
    /// A receive.
    Receive,
}

impl fmt::Display for Verb {
    fn fmt(&self, to: &mut fmt::Formatter<'_>) -> fmt::Result {
        to.write_str(match self {
            Verb::Write => "RDMA write",
            Verb::WriteImmediate => "RDMA write with immediate data",
            Verb::Send => "send",
            Verb::Receive => "receive",
        })
    }
}

/// How a work request ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Status {
    /// Well.
    Success,
    /// The message was longer than the memory to receive it, or than a message may be.
    LocalLength,
    /// The queue pair is broken on this side.
    LocalOperation,
    /// The local memory is not registered for this.
    LocalProtection,
    /// The queue pair was in error already; the first request that failed says why.
    Flushed,
    /// The peer answered nonsense.
    BadResponse,
    /// The peer wrote with immediate data to memory that is not registered for it.
    LocalAccess,
    /// The peer found the request invalid: a message longer than its receive, for one.
    RemoteInvalidRequest,
    /// The remote key is stale or wrong, or the place is outside of its region.
    RemoteAccess,
    /// The peer could not carry it out.
    RemoteOperation,
    /// The peer did not answer.
    RetryExceeded,
    /// The peer had posted no receive, for too long.
    ReceiverNotReady,
    /// The peer gave up.
    RemoteAborted,
    /// The device failed.
    Fatal,
    /// The peer's answer came too late.
    ResponseTimeout,
    /// Another status of libibverbs.
    Other(u32),
}

impl Status {
    fn of(status: ibv_wc_status::Type) -> Status {
        match status {
            ibv_wc_status::IBV_WC_SUCCESS => Status::Success,
            ibv_wc_status::IBV_WC_LOC_LEN_ERR => Status::LocalLength,
            ibv_wc_status::IBV_WC_LOC_QP_OP_ERR => Status::LocalOperation,
            ibv_wc_status::IBV_WC_LOC_PROT_ERR => Status::LocalProtection,
            ibv_wc_status::IBV_WC_WR_FLUSH_ERR => Status::Flushed,
            ibv_wc_status::IBV_WC_BAD_RESP_ERR => Status::BadResponse,
            ibv_wc_status::IBV_WC_LOC_ACCESS_ERR => Status::LocalAccess,
            ibv_wc_status::IBV_WC_REM_INV_REQ_ERR => Status::RemoteInvalidRequest,
            ibv_wc_status::IBV_WC_REM_ACCESS_ERR => Status::RemoteAccess,
            ibv_wc_status::IBV_WC_REM_OP_ERR => Status::RemoteOperation,
            ibv_wc_status::IBV_WC_RETRY_EXC_ERR => Status::RetryExceeded,
            ibv_wc_status::IBV_WC_RNR_RETRY_EXC_ERR => Status::ReceiverNotReady,
            ibv_wc_status::IBV_WC_REM_ABORT_ERR => Status::RemoteAborted,
            ibv_wc_status::IBV_WC_FATAL_ERR => Status::Fatal,
            ibv_wc_status::IBV_WC_RESP_TIMEOUT_ERR => Status::ResponseTimeout,
            other => Status::Other(other),
        }
    }
}

impl fmt::Display for Status {
    fn fmt(&self, to: &mut fmt::Formatter<'_>) -> fmt::Result {
        to.write_str(match self {
            Status::Success => "done",
            Status::LocalLength => "a message was longer than the memory that was to receive it",
            Status::LocalOperation => "the queue pair is broken on this side",
            Status::LocalProtection => "the local memory is not registered for this",
            Status::Flushed => "not done: the queue pair was in error already, or was closed",
            Status::BadResponse => "the peer's device answered with what makes no sense",
            Status::LocalAccess => "the peer wrote to memory that is not registered for that",
            Status::RemoteInvalidRequest => "the peer's device found the request invalid (longer than the memory to receive it?)",
            Status::RemoteAccess => "the peer's device denied the access: the key is no longer valid, or the place is outside of its memory",
            Status::RemoteOperation => "the peer's device could not carry it out",
            Status::RetryExceeded => {
                "the peer did not answer, however often it was tried (transport retry count exceeded): is the link up, is the \
                 path MTU the same on both hosts, does the fabric pass RoCE (UDP port 4791)?"
            }
            Status::ReceiverNotReady => {
                "the peer had posted no receive for too long (RNR retry count exceeded): it is stuck, or its receive depth is too small"
            }
            Status::RemoteAborted => "the peer's device gave up",
            Status::Fatal => "the RDMA device failed: see the kernel's log",
            Status::ResponseTimeout => "the peer's answer came too late",
            Status::Other(number) => return write!(to, "failed with status {number} of libibverbs"),
        })
    }
}

/// One work request that is over.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Completion {
    /// The number that it was posted with.
    pub id: u64,
    /// What it was.
    pub verb: Verb,
    /// How it ended.
    pub status: Status,
    /// For a receive that succeeded: how many bytes came; for one by a write with immediate data: how many were written.
    pub bytes: u32,
    /// For a receive that succeeded: the immediate data, if some came.
    pub immediate: Option<u32>,
    /// The device's own number for an error.
    pub vendor_error: u32,
}

impl Completion {
    /// Whether it ended well.
    ///
    /// # Errors
    /// How it ended, in words.
    pub fn ok(&self) -> Result<(), CompletionError> {
        let Completion { id, verb, status, vendor_error, .. } = *self;
        if status == Status::Success { Ok(()) } else { Err(CompletionError { id, verb, status, vendor_error }) }
    }
}

/// A work request that failed. The queue pair is in error then, and does no more work.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Error)]
#[error("{verb}: {status} (work request {id}, device's code {vendor_error:#x})")]
pub struct CompletionError {
    /// The number that it was posted with.
    pub id: u64,
    /// What it was.
    pub verb: Verb,
    /// How it ended.
    pub status: Status,
    /// The device's own number for the error.
    pub vendor_error: u32,
}

/// A work request under way.
#[derive(Debug)]
pub(crate) struct Request {
    pub(crate) id: u64,
    pub(crate) verb: Verb,
    /// Whether the caller wants to know that it ended well.
    pub(crate) asked: bool,
    /// The memory that it names.
    #[allow(dead_code, reason = "held, never read: it keeps the memory registered")]
    pub(crate) region: Option<Arc<MemoryRegion>>,
}

/// The work requests of one direction that are under way, oldest first: they end in this order.
#[derive(Debug)]
pub(crate) struct Outstanding {
    list: VecDeque<Request>,
    /// The number of the oldest.
    first: u64,
    depth: usize,
    mark: u64,
}

impl Outstanding {
    pub(crate) fn sends(depth: u32) -> Outstanding {
        Outstanding { list: VecDeque::with_capacity(depth as usize), first: 0, depth: depth as usize, mark: 0 }
    }

    pub(crate) fn receives(depth: u32) -> Outstanding {
        Outstanding { mark: RECEIVE, ..Outstanding::sends(depth) }
    }

    pub(crate) fn room(&self) -> usize {
        self.depth.saturating_sub(self.list.len())
    }

    /// The number for the device of the request that will be pushed after `ahead` others.
    pub(crate) fn number(&self, ahead: usize) -> u64 {
        // Counting to 2^63 takes longer than any machine lasts.
        self.mark | (self.first + self.list.len() as u64 + ahead as u64)
    }

    pub(crate) fn push(&mut self, request: Request) {
        self.list.push_back(request);
    }

    /// Ends the request of that number, and those before it that nobody reports.
    fn end(&mut self, number: u64) -> Option<Request> {
        let ahead = number.checked_sub(self.first)?;
        if ahead >= self.list.len() as u64 {
            return None;
        }
        for _ in 0..ahead {
            self.list.pop_front();
        }
        self.first = number + 1;
        self.list.pop_front()
    }

    /// Holds the memory of all for ever: for when the device cannot be stopped from using it.
    pub(crate) fn leak(&mut self) {
        self.list.drain(..).for_each(std::mem::forget);
    }
}

/// What the device said of a request: `None` if nobody wants to know, or if it is none of ours.
pub(crate) fn ended(entry: &ibv_wc, sends: &mut Outstanding, receives: &mut Outstanding) -> Option<Completion> {
    let is_receive = entry.wr_id & RECEIVE != 0;
    let direction = if is_receive { receives } else { sends };
    let request = direction.end(entry.wr_id & !RECEIVE)?;
    let status = Status::of(entry.status);
    if status == Status::Success && !request.asked {
        return None;
    }
    let arrived = is_receive && status == Status::Success;
    let immediate = (arrived && entry.wc_flags & WITH_IMMEDIATE != 0).then(|| {
        // SAFETY: the flag says that the device set the number; either reading of it is a u32.
        u32::from_be(unsafe { entry.imm_data_invalidated_rkey_union.imm_data })
    });
    let bytes = if arrived { entry.byte_len } else { 0 };
    Some(Completion { id: request.id, verb: request.verb, status, bytes, immediate, vendor_error: entry.vendor_err })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn entry(number: u64, status: ibv_wc_status::Type) -> ibv_wc {
        // SAFETY: a plain C struct of numbers, for which zeros are a valid value.
        let mut entry: ibv_wc = unsafe { std::mem::zeroed() };
        entry.wr_id = number;
        entry.status = status;
        entry
    }

    fn write(id: u64, asked: bool) -> Request {
        Request { id, verb: Verb::Write, asked, region: None }
    }

    #[test]
    fn one_signalled_completion_ends_all_before_it() {
        let (mut sends, mut receives) = (Outstanding::sends(4), Outstanding::receives(1));
        for id in 10..14 {
            assert_eq!(sends.number(0), id - 10);
            sends.push(write(id, id == 12));
        }
        assert_eq!(sends.room(), 0);
        let ended = ended(&entry(2, ibv_wc_status::IBV_WC_SUCCESS), &mut sends, &mut receives).unwrap();
        assert_eq!((ended.id, ended.status, sends.room()), (12, Status::Success, 3));
        assert_eq!(sends.number(0), 4);
    }

    #[test]
    fn success_that_nobody_asked_for_is_silent_and_failure_is_not() {
        let (mut sends, mut receives) = (Outstanding::sends(2), Outstanding::receives(1));
        sends.push(write(1, false));
        sends.push(write(2, false));
        assert_eq!(ended(&entry(0, ibv_wc_status::IBV_WC_SUCCESS), &mut sends, &mut receives), None);
        let failed = ended(&entry(1, ibv_wc_status::IBV_WC_REM_ACCESS_ERR), &mut sends, &mut receives).unwrap();
        let words = failed.ok().unwrap_err().to_string();
        assert!(words.contains("RDMA write") && words.contains("no longer valid"), "{words}");
    }

    #[test]
    fn a_completion_of_nobody_changes_nothing() {
        let (mut sends, mut receives) = (Outstanding::sends(2), Outstanding::receives(1));
        sends.push(write(1, true));
        for number in [1, 7, u64::MAX, RECEIVE] {
            assert_eq!(ended(&entry(number, ibv_wc_status::IBV_WC_SUCCESS), &mut sends, &mut receives), None);
        }
        assert_eq!((sends.room(), receives.room()), (1, 1));
    }

    #[test]
    fn a_receive_gives_bytes_and_immediate_data() {
        let (mut sends, mut receives) = (Outstanding::sends(1), Outstanding::receives(2));
        for id in [5, 6] {
            receives.push(Request { id, verb: Verb::Receive, asked: true, region: None });
        }
        let mut arrived = entry(RECEIVE, ibv_wc_status::IBV_WC_SUCCESS);
        arrived.byte_len = 40;
        let ended_one = ended(&arrived, &mut sends, &mut receives).unwrap();
        assert_eq!((ended_one.id, ended_one.bytes, ended_one.immediate), (5, 40, None));
        arrived.wr_id = RECEIVE | 1;
        arrived.wc_flags = WITH_IMMEDIATE;
        arrived.imm_data_invalidated_rkey_union.imm_data = 77_u32.to_be();
        assert_eq!(ended(&arrived, &mut sends, &mut receives).unwrap().immediate, Some(77));
    }

    #[test]
    fn every_status_has_its_own_words() {
        let words: std::collections::HashSet<String> = (0..24).map(|number| Status::of(number).to_string()).collect();
        assert_eq!(words.len(), 24);
        assert!(Status::of(ibv_wc_status::IBV_WC_RNR_RETRY_EXC_ERR).to_string().contains("RNR retry"));
        assert!(Status::of(ibv_wc_status::IBV_WC_RETRY_EXC_ERR).to_string().contains("retry count exceeded"));
    }
}
