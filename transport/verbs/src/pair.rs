//! Queue pairs: settings, states, posting, closing. Completions are waited for in `wait.rs`; connections are made in `manager.rs`.
//!
//! Soundness: the device may use the memory of requests under way until the queue pair is destroyed. So `QueuePair`'s drop
//! destroys it first; only then do its fields let go of regions, completion queue and domain. A [`Closer`] reaches the queue
//! pair only under the lock by which it is destroyed.

use crate::channel::{Id, readable};
use crate::completion::{Completion, Outstanding, Verb};
use crate::counters::{Kind, Tally};
use crate::domain::ProtectionDomain;
use crate::error::CreateError;
use crate::faults::Notice;
use crate::inventory::{GidReport, mtu_bytes};
use crate::library::Library;
use crate::post::{Lists, PostError, Poster, Receive, Send, Sending, Work, Write};
use crate::queue::CompletionQueue;
use crate::sysfs;
use crate::wait::{Ended, Waker};
use rdma_sys::{ibv_access_flags, ibv_qp, ibv_qp_attr, ibv_qp_attr_mask, ibv_qp_init_attr, ibv_qp_state, ibv_qp_type, ibv_wc};
use std::ffi::c_int;
use std::fmt;
use std::io;
use std::mem;
use std::net::SocketAddr;
use std::os::fd::AsFd as _;
use std::path::Path;
use std::ptr::{self, NonNull};
use std::sync::{Arc, Mutex, PoisonError};

/// Completions that are taken from the device at once.
const COMPLETIONS_AT_ONCE: usize = 32;

/// How a queue pair is made.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PairSettings {
    /// Writes and sends that may be under way.
    pub send_depth: u32,
    /// Receives that may be posted.
    pub receive_depth: u32,
    /// Bytes that a send or write may carry inline.
    pub inline_max: u32,
    /// Whether the peer may write: on the destination only.
    pub remote_write: bool,
    /// How long the peer is told to wait when it finds no receive posted: a number of the InfiniBand specification, from
    /// 1 (10 µs) over 12 (640 µs) and 26 (82 ms) to 31 (492 ms); 0 is 655 ms.
    pub minimal_rnr_timer: u8,
}

impl Default for PairSettings {
    fn default() -> PairSettings {
        PairSettings { send_depth: 256, receive_depth: 64, inline_max: 64, remote_write: false, minimal_rnr_timer: 26 }
    }
}

/// What was posted since the queue pair was made.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Posted {
    /// Writes, with immediate data or without.
    pub writes: u64,
    /// Sends.
    pub sends: u64,
    /// Receives.
    pub receives: u64,
    /// Bytes of writes and sends.
    pub bytes: u64,
    /// Times that the device was told to send: one for each list, however long.
    pub doorbells: u64,
}

/// The C object behind the lock by which it is destroyed.
#[derive(Debug)]
struct Handle {
    raw: Mutex<Option<NonNull<ibv_qp>>>,
    library: &'static Library,
    notice: Arc<Notice>,
}

// SAFETY: libibverbs may be called from any thread, and the object is destroyed once, by whoever takes it out of the lock.
unsafe impl std::marker::Send for Handle {}
// SAFETY: as above: the pointer is reached under the lock only.
unsafe impl Sync for Handle {}

impl Handle {
    fn close(&self) {
        let raw = self.raw.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(raw) = *raw {
            // SAFETY: a plain C struct of numbers, for which zeros are a valid value.
            let mut attributes: ibv_qp_attr = unsafe { mem::zeroed() };
            attributes.qp_state = ibv_qp_state::IBV_QPS_ERR;
            let mask = ibv_qp_attr_mask::IBV_QP_STATE.0 as c_int;
            // SAFETY: the queue pair lives: it is destroyed under the lock that is held.
            let code = unsafe { (self.library.verbs.ibv_modify_qp)(raw.as_ptr(), &raw mut attributes, mask) };
            if code != 0 {
                let error = io::Error::from_raw_os_error(code);
                tracing::debug!(%error, "a queue pair cannot be put into the error state");
            }
        }
        drop(raw);
        self.notice.close();
    }

    fn destroy(&self) -> io::Result<()> {
        let Some(raw) = self.raw.lock().unwrap_or_else(PoisonError::into_inner).take() else { return Ok(()) };
        // SAFETY: just taken out, so nobody else reaches it; its owner does not use it after.
        let code = unsafe { (self.library.verbs.ibv_destroy_qp)(raw.as_ptr()) };
        if code == 0 { Ok(()) } else { Err(io::Error::from_raw_os_error(code)) }
    }
}

/// Ends a queue pair from any thread. It does not keep it alive.
#[derive(Debug, Clone)]
pub struct Closer(Arc<Handle>);

impl Closer {
    /// Puts the queue pair into the error state: what is under way is flushed, nothing more is accepted, the peer's writes fail,
    /// and waits end with [`crate::WaitError::Closed`]. Does nothing if the queue pair is gone.
    pub fn close(&self) {
        self.0.close();
    }
}

/// A connected queue pair, with its completion queue and its end of the connection. Dropping it ends the connection.
pub struct QueuePair {
    handle: Arc<Handle>,
    raw: NonNull<ibv_qp>,
    pub(crate) id: Id,
    pub(crate) sends: Outstanding,
    pub(crate) receives: Outstanding,
    lists: Lists,
    pub(crate) waker: Option<Waker>,
    pub(crate) queue: CompletionQueue,
    pub(crate) entries: Vec<ibv_wc>,
    pub(crate) found: Vec<Completion>,
    pub(crate) notice: Arc<Notice>,
    pub(crate) ended: Option<Ended>,
    domain: Arc<ProtectionDomain>,
    settings: PairSettings,
    posted: Posted,
    /// Sends since the last one that the device reports.
    silent: usize,
    path: PathReport,
    pub(crate) peer: SocketAddr,
    pub(crate) peer_data: Vec<u8>,
    connected: bool,
    _tally: Tally,
}

/// What the connection managers agreed on.
#[derive(Debug, Clone, Copy, Default)]
struct PathReport {
    mtu_bytes: u32,
    port: u8,
    gid_index: u8,
}

// SAFETY: libibverbs may be called from any thread; the raw pointers in the lists are used only within the call that sets them.
unsafe impl std::marker::Send for QueuePair {}
// SAFETY: what `&self` reaches is numbers, and calls that the libraries guard.
unsafe impl Sync for QueuePair {}

impl fmt::Debug for QueuePair {
    fn fmt(&self, to: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut shown = to.debug_struct("QueuePair");
        shown.field("number", &self.number()).field("peer", &self.peer).field("posted", &self.posted).finish_non_exhaustive()
    }
}

impl QueuePair {
    /// Makes one for a connection that is on its way.
    pub(crate) fn new(
        domain: &Arc<ProtectionDomain>,
        id: Id,
        peer: SocketAddr,
        settings: &PairSettings,
    ) -> Result<QueuePair, CreateError> {
        let context = domain.context();
        let failed = |call| move |error| CreateError::of(context.name(), call, error);
        check_depth(context.name(), "the send depth", settings.send_depth, context.limits().work_requests_max)?;
        check_depth(context.name(), "the receive depth", settings.receive_depth, context.limits().work_requests_max)?;
        let notice = Arc::new(Notice::new().map_err(failed("eventfd"))?);
        // Room for all that can be under way in both directions: the queue cannot overrun.
        let entries = settings.send_depth.saturating_add(settings.receive_depth);
        let queue = CompletionQueue::new(context, entries, &notice)?;
        let mut attributes = attributes(settings, &queue);
        let library = context.library();
        // SAFETY: domain and completion queue live, and the queue pair is destroyed before them; the attributes have room.
        let raw = unsafe { (library.verbs.ibv_create_qp)(domain.raw(), &raw mut attributes) };
        let raw = NonNull::new(raw).ok_or_else(|| failed("ibv_create_qp")(io::Error::last_os_error()))?;
        context.faults().tell(raw.addr().get(), &notice);
        // SAFETY: a plain C struct of numbers, for which zeros are a valid value.
        let entry = || unsafe { mem::zeroed::<ibv_wc>() };
        Ok(QueuePair {
            handle: Arc::new(Handle { raw: Mutex::new(Some(raw)), library, notice: Arc::clone(&notice) }),
            raw,
            id,
            sends: Outstanding::sends(settings.send_depth),
            receives: Outstanding::receives(settings.receive_depth),
            lists: Lists::new(),
            waker: None,
            queue,
            entries: std::iter::repeat_with(entry).take(COMPLETIONS_AT_ONCE).collect(),
            found: Vec::with_capacity(COMPLETIONS_AT_ONCE),
            notice,
            ended: None,
            domain: Arc::clone(domain),
            settings: PairSettings { inline_max: attributes.cap.max_inline_data, ..*settings },
            posted: Posted::default(),
            silent: 0,
            path: PathReport::default(),
            peer,
            peer_data: Vec::new(),
            connected: false,
            _tally: Tally::new(Kind::Pair),
        })
    }

    /// Posts writes as one list: one doorbell, however many they are.
    ///
    /// # Errors
    /// See [`PostError`]: its `posted` says how many from the beginning are under way.
    pub fn post_writes(&mut self, writes: &[Write<'_>]) -> Result<(), PostError> {
        self.post_sending(&writes.iter().map(Sending::from).collect::<Vec<_>>())
    }

    /// Posts a send.
    ///
    /// # Errors
    /// See [`PostError`].
    pub fn post_send(&mut self, send: &Send<'_>) -> Result<(), PostError> {
        self.post_sending(&[Sending::from(send)])
    }

    /// Posts writes and sends as one list, with one doorbell; they are carried out in their order.
    ///
    /// # Errors
    /// See [`PostError`].
    pub fn post(&mut self, works: &[Work<'_>]) -> Result<(), PostError> {
        self.post_sending(&works.iter().map(Sending::from).collect::<Vec<_>>())
    }

    fn post_sending(&mut self, list: &[Sending<'_>]) -> Result<(), PostError> {
        if list.is_empty() {
            return Ok(());
        }
        let silent_max = (self.settings.send_depth as usize / 2).max(1);
        let (raw, inline_max) = (self.raw, self.settings.inline_max);
        let (domain, lists, outstanding) = (&self.domain, &mut self.lists, &mut self.sends);
        let result = Poster { raw, domain, inline_max, lists, outstanding }.send(list, &mut self.silent, silent_max);
        let went = result.as_ref().map_or_else(|error| error.posted, |()| list.len());
        for sending in list.iter().take(went) {
            let count = if sending.verb == Verb::Send { &mut self.posted.sends } else { &mut self.posted.writes };
            *count += 1;
            self.posted.bytes += sending.bytes();
        }
        self.posted.doorbells += u64::from(went > 0);
        result
    }

    /// Posts receives as one list.
    ///
    /// # Errors
    /// See [`PostError`].
    pub fn post_receives(&mut self, receives: &[Receive<'_>]) -> Result<(), PostError> {
        let (raw, inline_max) = (self.raw, self.settings.inline_max);
        let (domain, lists, outstanding) = (&self.domain, &mut self.lists, &mut self.receives);
        let result = Poster { raw, domain, inline_max, lists, outstanding }.receive(receives);
        let went = result.as_ref().map_or_else(|error| error.posted, |()| receives.len());
        self.posted.receives += went as u64;
        result
    }

    /// How many writes and sends can be posted now. Completions that are taken make room.
    pub fn room(&self) -> usize {
        self.sends.room()
    }

    /// How many receives can be posted now.
    pub fn receive_room(&self) -> usize {
        self.receives.room()
    }

    /// Bytes that can go inline: what the device gave, at least what was asked for.
    pub fn inline_max(&self) -> u32 {
        self.settings.inline_max
    }

    /// What was posted.
    pub fn posted(&self) -> Posted {
        self.posted
    }

    /// The queue pair's number on its device.
    pub fn number(&self) -> u32 {
        // SAFETY: the queue pair lives; the field is a number.
        unsafe { (*self.raw.as_ptr()).qp_num }
    }

    /// Bytes of a packet's payload that both connection managers agreed on.
    pub fn path_mtu(&self) -> u32 {
        self.path.mtu_bytes
    }

    /// Bytes of a packet's payload that this side's port takes.
    pub(crate) fn port_mtu(&self) -> io::Result<u32> {
        self.domain.context().port_mtu(self.path.port)
    }

    /// The address that its packets come from, with its kind (RoCE version), as the kernel shows it.
    pub fn gid(&self) -> Option<GidReport> {
        let device = self.domain.context().name();
        sysfs::port_gid(Path::new(sysfs::ROOT), device, self.path.port, self.path.gid_index.into())
    }

    /// The other end's address and port.
    pub fn peer(&self) -> SocketAddr {
        self.peer
    }

    /// This end's address and port.
    pub fn local(&self) -> Option<SocketAddr> {
        self.id.local()
    }

    /// The private data that the other end gave while connecting.
    pub fn peer_data(&self) -> &[u8] {
        &self.peer_data
    }

    /// The domain that it was made in.
    pub fn domain(&self) -> &Arc<ProtectionDomain> {
        &self.domain
    }

    /// What ends it from another thread.
    pub fn closer(&self) -> Closer {
        Closer(Arc::clone(&self.handle))
    }

    /// Tells the peer that the connection is over. What is under way is not waited for: take its completions first.
    pub fn disconnect(&mut self) {
        if mem::take(&mut self.connected)
            && let Err(error) = self.id.disconnect()
        {
            // The peer was faster, or is gone.
            tracing::debug!(peer = %self.peer, %error, "an RDMA connection cannot be disconnected");
        }
    }

    /// What tokio waits on; made at the first wait.
    pub(crate) fn wake_by(&mut self) -> io::Result<()> {
        if self.waker.is_none() {
            self.waker = Some(Waker { queue: readable(self.queue.as_fd())?, bell: readable(self.notice.bell.as_fd())? });
        }
        Ok(())
    }

    /// The first state, in which receives can be posted.
    pub(crate) fn make_initialized(&mut self) -> io::Result<()> {
        let access = if self.settings.remote_write { ibv_access_flags::IBV_ACCESS_REMOTE_WRITE.0 } else { 0 };
        self.modify(ibv_qp_state::IBV_QPS_INIT, |attributes, mask| {
            attributes.qp_access_flags = access;
            // What the connection manager would allow the peer is not asked for.
            *mask |= ibv_qp_attr_mask::IBV_QP_ACCESS_FLAGS.0 as c_int;
        })
    }

    /// The state in which the peer's packets are taken.
    pub(crate) fn make_receiving(&mut self) -> io::Result<()> {
        let timer = self.settings.minimal_rnr_timer;
        let port = self.id.port();
        let mut path = PathReport::default();
        self.modify(ibv_qp_state::IBV_QPS_RTR, |attributes, _| {
            attributes.min_rnr_timer = timer;
            let gid_index = attributes.ah_attr.grh.sgid_index;
            path = PathReport { mtu_bytes: mtu_bytes(attributes.path_mtu), port, gid_index };
        })?;
        self.path = path;
        Ok(())
    }

    /// The state in which it also sends.
    pub(crate) fn make_sending(&mut self, retry: u8, rnr_retry: u8, ack_timeout: Option<u8>) -> io::Result<()> {
        self.modify(ibv_qp_state::IBV_QPS_RTS, |attributes, _| {
            attributes.retry_cnt = retry;
            attributes.rnr_retry = rnr_retry;
            attributes.timeout = ack_timeout.unwrap_or(attributes.timeout);
        })
    }

    pub(crate) fn mark_connected(&mut self) {
        self.connected = true;
    }

    fn modify(&mut self, state: ibv_qp_state::Type, change: impl FnOnce(&mut ibv_qp_attr, &mut c_int)) -> io::Result<()> {
        // SAFETY: a plain C struct of numbers, for which zeros are a valid value.
        let mut attributes: ibv_qp_attr = unsafe { mem::zeroed() };
        attributes.qp_state = state;
        let mut mask = self.id.attributes(&mut attributes)?;
        change(&mut attributes, &mut mask);
        // SAFETY: the queue pair lives, and the attributes that the mask names are set.
        let code = unsafe { (self.handle.library.verbs.ibv_modify_qp)(self.raw.as_ptr(), &raw mut attributes, mask) };
        if code == 0 { Ok(()) } else { Err(io::Error::from_raw_os_error(code)) }
    }
}

impl Drop for QueuePair {
    fn drop(&mut self) {
        self.disconnect();
        self.domain.context().faults().forget(self.raw.addr().get());
        if let Err(error) = self.handle.destroy() {
            tracing::error!(%error, "a queue pair cannot be destroyed");
            // The device still has it in there: whoever asks who uses the domain must see it.
            mem::forget(Arc::clone(&self.domain));
            self.sends.leak();
            self.receives.leak();
        }
    }
}

fn check_depth(device: &str, what: &'static str, asked: u32, limit: u64) -> Result<(), CreateError> {
    if asked == 0 || u64::from(asked) > limit {
        return Err(CreateError::OverLimit { device: device.to_owned(), what, asked: asked.into(), limit });
    }
    Ok(())
}

fn attributes(settings: &PairSettings, queue: &CompletionQueue) -> ibv_qp_init_attr {
    // SAFETY: a plain C struct of numbers and pointers, for which zeros are a valid value.
    let mut attributes: ibv_qp_init_attr = unsafe { mem::zeroed() };
    attributes.qp_context = ptr::null_mut();
    attributes.send_cq = queue.raw();
    attributes.recv_cq = queue.raw();
    attributes.cap.max_send_wr = settings.send_depth;
    attributes.cap.max_recv_wr = settings.receive_depth;
    attributes.cap.max_send_sge = 1;
    attributes.cap.max_recv_sge = 1;
    attributes.cap.max_inline_data = settings.inline_max;
    attributes.qp_type = ibv_qp_type::IBV_QPT_RC;
    // Which requests are reported is said by each.
    attributes.sq_sig_all = 0;
    attributes
}
