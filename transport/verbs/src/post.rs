//! Work requests: what can be posted to a queue pair, checked here, and handed to the device as one list and one doorbell.
//!
//! Soundness: the lists hold pointers into themselves and to inline bytes that the caller lends; they are made and used
//! within one call. What a request names of registered memory is held by `Outstanding` until the request is over.

use crate::completion::{Outstanding, Request, Verb};
use crate::domain::ProtectionDomain;
use crate::region::{MemoryRegion, OutOfBounds, RemoteKey};
use rdma_sys::{ibv_qp, ibv_recv_wr, ibv_send_flags, ibv_send_wr, ibv_sge, ibv_wr_opcode, rdma_t};
use std::io;
use std::mem;
use std::ptr::{self, NonNull};
use std::sync::Arc;
use thiserror::Error;

/// A part of a memory region.
#[derive(Debug, Clone, Copy)]
pub struct Piece<'a> {
    /// The region; it is held until the request is over.
    pub region: &'a Arc<MemoryRegion>,
    /// From the region's first byte.
    pub offset: u64,
    /// Length.
    pub bytes: u32,
}

/// What is sent.
#[derive(Debug, Clone, Copy)]
pub enum Payload<'a> {
    /// Registered memory; it must not change until the request is over, or nobody knows which bytes went.
    Region(Piece<'a>),
    /// Bytes that are copied while posting: at most as many as [`crate::QueuePair::inline_max`] says.
    Inline(&'a [u8]),
    /// Nothing: for immediate data alone.
    Nothing,
}

/// An RDMA WRITE.
#[derive(Debug, Clone, Copy)]
pub struct Write<'a> {
    /// What is written.
    pub payload: Payload<'a>,
    /// Where to.
    pub to: RemoteKey,
    /// Told to the peer, which must have posted a receive for it.
    pub immediate: Option<u32>,
    /// Whether its success is reported; a failure always is.
    pub signalled: bool,
    /// Comes back in the completion.
    pub id: u64,
}

/// A SEND.
#[derive(Debug, Clone, Copy)]
pub struct Send<'a> {
    /// What is sent.
    pub payload: Payload<'a>,
    /// Told to the peer besides.
    pub immediate: Option<u32>,
    /// Whether its success is reported; a failure always is.
    pub signalled: bool,
    /// Comes back in the completion.
    pub id: u64,
}

/// One of a list of work requests that the device is told of at once; they are carried out in this order.
#[derive(Debug, Clone, Copy)]
pub enum Work<'a> {
    /// An RDMA WRITE.
    Write(Write<'a>),
    /// A SEND: it arrives after the writes before it.
    Send(Send<'a>),
}

/// A receive: each takes one message, or the immediate data of one write.
#[derive(Debug, Clone, Copy)]
pub struct Receive<'a> {
    /// Where the message goes; nothing is enough for immediate data of writes.
    pub into: Option<Piece<'a>>,
    /// Comes back in the completion.
    pub id: u64,
}

/// Why a list of work requests was not posted. What was posted before the bad one is under way, see `posted`.
#[derive(Debug, Error)]
#[error("{verb} {index} of {count}: {kind}")]
pub struct PostError {
    /// What was to be posted.
    pub verb: Verb,
    /// The bad one's place in the list.
    pub index: usize,
    /// The length of the list.
    pub count: usize,
    /// How many from the list's beginning are under way.
    pub posted: usize,
    /// What is wrong.
    pub kind: PostErrorKind,
}

/// What is wrong with a work request.
#[derive(Debug, Error)]
pub enum PostErrorKind {
    /// More than fit; nothing was posted.
    #[error("the queue has room for {room} work requests only: take completions first")]
    Full {
        /// How many fit now.
        room: usize,
    },
    /// Outside of its region; nothing was posted.
    #[error(transparent)]
    OutOfBounds(#[from] OutOfBounds),
    /// Too many bytes to copy; nothing was posted.
    #[error("{bytes} bytes are too many to go inline, at most {limit}")]
    InlineTooLong {
        /// As given.
        bytes: usize,
        /// The queue pair's limit.
        limit: u32,
    },
    /// The region is of another protection domain; nothing was posted.
    #[error("the memory region belongs to another protection domain")]
    ForeignRegion,
    /// A receive into memory that the device may not write; nothing was posted.
    #[error("the memory region was registered without local_write")]
    NotWritable,
    /// The device refused.
    #[error("the device refused it: {0}")]
    Refused(io::Error),
}

/// Room for lists of work requests, used again and again.
pub(crate) struct Lists {
    sends: Vec<ibv_send_wr>,
    receives: Vec<ibv_recv_wr>,
    pieces: Vec<ibv_sge>,
}

/// What posting looks at.
pub(crate) struct Poster<'a> {
    pub(crate) raw: NonNull<ibv_qp>,
    pub(crate) domain: &'a Arc<ProtectionDomain>,
    pub(crate) inline_max: u32,
    pub(crate) lists: &'a mut Lists,
    pub(crate) outstanding: &'a mut Outstanding,
}

/// A work request of the sending side, whichever it is.
pub(crate) struct Sending<'a> {
    pub(crate) verb: Verb,
    payload: Payload<'a>,
    to: Option<RemoteKey>,
    immediate: Option<u32>,
    signalled: bool,
    id: u64,
}

impl<'a> From<&Write<'a>> for Sending<'a> {
    fn from(write: &Write<'a>) -> Sending<'a> {
        let Write { payload, to, immediate, signalled, id } = *write;
        let verb = if immediate.is_some() { Verb::WriteImmediate } else { Verb::Write };
        Sending { verb, payload, to: Some(to), immediate, signalled, id }
    }
}

impl<'a> From<&Work<'a>> for Sending<'a> {
    fn from(work: &Work<'a>) -> Sending<'a> {
        match work {
            Work::Write(write) => write.into(),
            Work::Send(send) => send.into(),
        }
    }
}

impl<'a> From<&Send<'a>> for Sending<'a> {
    fn from(send: &Send<'a>) -> Sending<'a> {
        let Send { payload, immediate, signalled, id } = *send;
        Sending { verb: Verb::Send, payload, to: None, immediate, signalled, id }
    }
}

impl Sending<'_> {
    fn opcode(&self) -> ibv_wr_opcode::Type {
        match (self.to.is_some(), self.immediate.is_some()) {
            (true, false) => ibv_wr_opcode::IBV_WR_RDMA_WRITE,
            (true, true) => ibv_wr_opcode::IBV_WR_RDMA_WRITE_WITH_IMM,
            (false, false) => ibv_wr_opcode::IBV_WR_SEND,
            (false, true) => ibv_wr_opcode::IBV_WR_SEND_WITH_IMM,
        }
    }

    pub(crate) fn bytes(&self) -> u64 {
        match self.payload {
            Payload::Region(piece) => u64::from(piece.bytes),
            Payload::Inline(bytes) => bytes.len() as u64,
            Payload::Nothing => 0,
        }
    }
}

impl Lists {
    pub(crate) fn new() -> Lists {
        Lists { sends: Vec::new(), receives: Vec::new(), pieces: Vec::new() }
    }
}

impl Poster<'_> {
    /// Posts writes and sends as one list. `silent` counts work requests since the last one
    /// that the device reports, so that the queue always drains.
    pub(crate) fn send(&mut self, list: &[Sending<'_>], silent: &mut usize, silent_max: usize) -> Result<(), PostError> {
        let verb = |index: usize| list.get(index).map_or(Verb::Send, |sending| sending.verb);
        let fail = |index, kind| PostError { verb: verb(index), index, count: list.len(), posted: 0, kind };
        let room = self.outstanding.room();
        if list.len() > room {
            return Err(fail(room, PostErrorKind::Full { room }));
        }
        self.lists.sends.clear();
        self.lists.pieces.clear();
        let mut run = *silent;
        for (index, sending) in list.iter().enumerate() {
            let piece = self.payload(&sending.payload).map_err(|kind| fail(index, kind))?;
            run = if sending.signalled || run + 1 >= silent_max { 0 } else { run + 1 };
            let number = self.outstanding.number(index);
            self.lists.sends.push(send_request(sending, number, run == 0, piece.is_some()));
            self.lists.pieces.push(piece.unwrap_or(ibv_sge { addr: 0, length: 0, lkey: 0 }));
        }
        self.lists.chain_sends();
        let refused = self.lists.post_sends(self.raw);
        let posted = refused.as_ref().map_or(list.len(), |(index, _)| *index);
        for sending in list.iter().take(posted) {
            let region = match sending.payload {
                Payload::Region(piece) => Some(Arc::clone(piece.region)),
                _ => None,
            };
            self.outstanding.push(Request { id: sending.id, verb: sending.verb, asked: sending.signalled, region });
        }
        match refused {
            None => {
                *silent = run;
                Ok(())
            }
            Some((index, error)) => {
                // Perhaps none of those that went is reported: count from where it was.
                *silent += posted;
                Err(PostError { posted, ..fail(index, PostErrorKind::Refused(error)) })
            }
        }
    }

    /// Posts receives as one list.
    pub(crate) fn receive(&mut self, list: &[Receive<'_>]) -> Result<(), PostError> {
        let fail = |index, kind| PostError { verb: Verb::Receive, index, count: list.len(), posted: 0, kind };
        let room = self.outstanding.room();
        if list.len() > room {
            return Err(fail(room, PostErrorKind::Full { room }));
        }
        self.lists.receives.clear();
        self.lists.pieces.clear();
        for (index, receive) in list.iter().enumerate() {
            let piece = match &receive.into {
                Some(piece) if !piece.region.access().writable() => return Err(fail(index, PostErrorKind::NotWritable)),
                Some(piece) => Some(self.piece(piece).map_err(|kind| fail(index, kind))?),
                None => None,
            };
            let number = self.outstanding.number(index);
            let num_sge = i32::from(piece.is_some());
            self.lists.receives.push(ibv_recv_wr { wr_id: number, next: ptr::null_mut(), sg_list: ptr::null_mut(), num_sge });
            self.lists.pieces.push(piece.unwrap_or(ibv_sge { addr: 0, length: 0, lkey: 0 }));
        }
        self.lists.chain_receives();
        let refused = self.lists.post_receives(self.raw);
        let posted = refused.as_ref().map_or(list.len(), |(index, _)| *index);
        for receive in list.iter().take(posted) {
            let region = receive.into.as_ref().map(|piece| Arc::clone(piece.region));
            self.outstanding.push(Request { id: receive.id, verb: Verb::Receive, asked: true, region });
        }
        match refused {
            None => Ok(()),
            Some((index, error)) => {
                Err(PostError { verb: Verb::Receive, index, count: list.len(), posted, kind: PostErrorKind::Refused(error) })
            }
        }
    }

    fn payload(&self, payload: &Payload<'_>) -> Result<Option<ibv_sge>, PostErrorKind> {
        match payload {
            Payload::Region(piece) => self.piece(piece).map(Some),
            Payload::Inline(bytes) => match u32::try_from(bytes.len()) {
                Ok(0) => Ok(None),
                Ok(length) if length <= self.inline_max => {
                    Ok(Some(ibv_sge { addr: bytes.as_ptr().expose_provenance() as u64, length, lkey: 0 }))
                }
                _ => Err(PostErrorKind::InlineTooLong { bytes: bytes.len(), limit: self.inline_max }),
            },
            Payload::Nothing => Ok(None),
        }
    }

    fn piece(&self, piece: &Piece<'_>) -> Result<ibv_sge, PostErrorKind> {
        if !Arc::ptr_eq(piece.region.domain(), self.domain) {
            return Err(PostErrorKind::ForeignRegion);
        }
        let addr = piece.region.piece(piece.offset, piece.bytes.into())?;
        Ok(ibv_sge { addr, length: piece.bytes, lkey: piece.region.lkey() })
    }
}

fn send_request(sending: &Sending<'_>, number: u64, signalled: bool, has_piece: bool) -> ibv_send_wr {
    // SAFETY: a plain C struct of numbers, pointers and unions of them, for which zeros are a valid value.
    let mut request: ibv_send_wr = unsafe { mem::zeroed() };
    request.wr_id = number;
    request.num_sge = i32::from(has_piece);
    request.opcode = sending.opcode();
    let inline = matches!(sending.payload, Payload::Inline(_)) && has_piece;
    let flags = [(signalled, ibv_send_flags::IBV_SEND_SIGNALED), (inline, ibv_send_flags::IBV_SEND_INLINE)];
    request.send_flags = flags.into_iter().filter(|(set, _)| *set).map(|(_, flag)| flag.0).sum();
    if let Some(immediate) = sending.immediate {
        request.imm_data_invalidated_rkey_union.imm_data = immediate.to_be();
    }
    if let Some(to) = sending.to {
        request.wr.rdma = rdma_t { remote_addr: to.address, rkey: to.rkey };
    }
    request
}

impl Lists {
    /// Sets the pointers from each request to its piece and to the next. From here on the vectors are not touched.
    fn chain_sends(&mut self) {
        let mut next = ptr::null_mut();
        for (request, piece) in self.sends.iter_mut().zip(&mut self.pieces).rev() {
            request.sg_list = &raw mut *piece;
            request.next = next;
            next = &raw mut *request;
        }
    }

    fn chain_receives(&mut self) {
        let mut next = ptr::null_mut();
        for (request, piece) in self.receives.iter_mut().zip(&mut self.pieces).rev() {
            request.sg_list = &raw mut *piece;
            request.next = next;
            next = &raw mut *request;
        }
    }

    /// Hands the list to the device: the place of the one that was refused, if one was, and why.
    fn post_sends(&mut self, pair: NonNull<ibv_qp>) -> Option<(usize, io::Error)> {
        let first = self.sends.as_mut_ptr();
        if self.sends.is_empty() {
            return None;
        }
        let mut bad: *mut ibv_send_wr = ptr::null_mut();
        // SAFETY: the queue pair lives; the list and its pieces are linked within `self`, which is borrowed for the call; the
        // memory they name is registered or inline, and inline bytes are borrowed by the caller.
        let code = unsafe { rdma_sys::ibv_post_send(pair.as_ptr(), first, &raw mut bad) };
        (code != 0).then(|| (place(first, bad, self.sends.len()), refusal(code)))
    }

    fn post_receives(&mut self, pair: NonNull<ibv_qp>) -> Option<(usize, io::Error)> {
        let first = self.receives.as_mut_ptr();
        if self.receives.is_empty() {
            return None;
        }
        let mut bad: *mut ibv_recv_wr = ptr::null_mut();
        // SAFETY: as for sends.
        let code = unsafe { rdma_sys::ibv_post_recv(pair.as_ptr(), first, &raw mut bad) };
        (code != 0).then(|| (place(first, bad, self.receives.len()), refusal(code)))
    }
}

/// Providers answer with an errno, some with -1 and errno set.
fn refusal(code: i32) -> io::Error {
    if code < 0 { io::Error::last_os_error() } else { io::Error::from_raw_os_error(code) }
}

/// The place of `bad` in the list. If it is not in it, all are taken to be under way: their memory is held rather too long.
fn place<T>(first: *mut T, bad: *mut T, count: usize) -> usize {
    let place = bad.addr().checked_sub(first.addr()).map(|bytes| bytes / size_of::<T>());
    place.filter(|place| *place < count).unwrap_or(count)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn write(immediate: Option<u32>) -> Write<'static> {
        let to = RemoteKey { address: 0x1000, rkey: 9 };
        Write { payload: Payload::Inline(b"abc"), to, immediate, signalled: false, id: 1 }
    }

    #[test]
    fn a_request_says_what_it_is() {
        let request = send_request(&Sending::from(&write(Some(7))), 5, true, true);
        assert_eq!((request.wr_id, request.num_sge), (5, 1));
        assert_eq!(request.opcode, ibv_wr_opcode::IBV_WR_RDMA_WRITE_WITH_IMM);
        let both = ibv_send_flags::IBV_SEND_SIGNALED | ibv_send_flags::IBV_SEND_INLINE;
        assert_eq!(request.send_flags, both.0);
        // SAFETY: the union was set to this field.
        assert_eq!(unsafe { request.imm_data_invalidated_rkey_union.imm_data }, 7_u32.to_be());
        // SAFETY: the union was set to this field.
        let to = unsafe { request.wr.rdma };
        assert_eq!((to.remote_addr, to.rkey), (0x1000, 9));
        let plain = send_request(&Sending::from(&write(None)), 5, false, false);
        assert_eq!((plain.opcode, plain.send_flags, plain.num_sge), (ibv_wr_opcode::IBV_WR_RDMA_WRITE, 0, 0));
    }

    #[test]
    fn a_list_is_linked_to_its_end() {
        let mut lists = Lists::new();
        for number in 0..3 {
            lists.sends.push(send_request(&Sending::from(&write(None)), number, false, true));
            lists.pieces.push(ibv_sge { addr: number, length: 1, lkey: 0 });
        }
        lists.chain_sends();
        let base = lists.sends.as_ptr();
        let places: Vec<usize> = lists.sends.iter().map(|request| place(base.cast_mut(), request.next, 3)).collect();
        assert_eq!(places, [1, 2, 3], "3 stands for the end");
        assert!(lists.sends[2].next.is_null());
        for (request, piece) in lists.sends.iter().zip(&lists.pieces) {
            assert!(ptr::eq(request.sg_list, piece));
        }
    }

    #[test]
    fn the_bad_one_is_found_by_its_place() {
        let mut list = [0_u64; 4];
        let first = list.as_mut_ptr();
        assert_eq!(place(first, &raw mut list[2], 4), 2);
        assert_eq!(place(first, ptr::null_mut(), 4), 4, "all may be under way");
        assert_eq!(place(first, first.wrapping_add(9), 4), 4);
    }

    #[test]
    fn errors_name_verb_and_place() {
        let kind = PostErrorKind::Full { room: 3 };
        let error = PostError { verb: Verb::WriteImmediate, index: 3, count: 8, posted: 0, kind };
        let words = error.to_string();
        assert!(words.contains("RDMA write with immediate data 3 of 8") && words.contains("room for 3"), "{words}");
    }
}
