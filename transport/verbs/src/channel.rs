//! The connection manager's event channels and identifiers: one call each, and events copied out and given back at once. What
//! events mean is in `manager.rs`.
//!
//! Soundness: an identifier holds the channel that its events come by, and no queue pair is ever attached to it, so librdmacm
//! touches none. Destroying an identifier waits until its events were given back, which every reader does before it returns.

use crate::device::is_denied;
use crate::error::NoRdma;
use crate::faults::set_nonblocking;
use crate::library::Library;
use nix::sys::socket::{SockaddrLike as _, SockaddrStorage};
use rdma_sys::{
    ibv_qp_attr, rdma_addr, rdma_cm_event, rdma_cm_event_type, rdma_cm_id, rdma_conn_param, rdma_event_channel, rdma_port_space,
};
use std::ffi::c_int;
use std::io;
use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr, SocketAddrV4, SocketAddrV6};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::Path;
use std::ptr::{self, NonNull};
use std::sync::{Arc, OnceLock};
use tokio::io::unix::AsyncFd;

const DEVICE_FILE: &str = "/dev/infiniband/rdma_cm";

/// A channel of connection events.
#[derive(Debug)]
pub(crate) struct Channel {
    raw: NonNull<rdma_event_channel>,
    library: &'static Library,
    /// For waiting in tokio; made at the first wait.
    readable: OnceLock<AsyncFd<OwnedFd>>,
}

// SAFETY: librdmacm may be called from any thread, and the object is destroyed once, by drop.
unsafe impl Send for Channel {}
// SAFETY: as above: events may be taken from several threads at once, each gets its own.
unsafe impl Sync for Channel {}

/// An event, copied out.
#[derive(Debug)]
pub(crate) struct Event {
    pub(crate) kind: rdma_cm_event_type::Type,
    pub(crate) status: c_int,
    pub(crate) private_data: Vec<u8>,
    /// For a connect request: the identifier that it made, still on the listener's channel.
    pub(crate) request: Option<Id>,
}

impl Channel {
    pub(crate) fn new(library: &'static Library) -> Result<Arc<Channel>, NoRdma> {
        // SAFETY: no precondition.
        let raw = unsafe { (library.manager.rdma_create_event_channel)() };
        let Some(raw) = NonNull::new(raw) else {
            return Err(no_channel(io::Error::last_os_error()));
        };
        let channel = Channel { raw, library, readable: OnceLock::new() };
        set_nonblocking(channel.as_fd()).map_err(no_channel)?;
        Ok(Arc::new(channel))
    }

    /// The next event, if one waits.
    pub(crate) fn next(self: &Arc<Channel>) -> io::Result<Option<Event>> {
        let mut raw: *mut rdma_cm_event = ptr::null_mut();
        // SAFETY: the channel lives and does not block, and the result has room.
        if unsafe { (self.library.manager.rdma_get_cm_event)(self.raw.as_ptr(), &raw mut raw) } != 0 {
            let error = io::Error::last_os_error();
            return match error.kind() {
                io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted => Ok(None),
                _ => Err(error),
            };
        }
        // SAFETY: the call succeeded, and the event is given back below, after this borrow.
        let event = self.copied(unsafe { &*raw });
        // SAFETY: the event came from rdma_get_cm_event and is given back once.
        if unsafe { (self.library.manager.rdma_ack_cm_event)(raw) } != 0 {
            tracing::warn!(error = %io::Error::last_os_error(), "an event of the RDMA connection manager cannot be given back");
        }
        Ok(Some(event))
    }

    fn copied(self: &Arc<Channel>, event: &rdma_cm_event) -> Event {
        let is_request = event.event == rdma_cm_event_type::RDMA_CM_EVENT_CONNECT_REQUEST;
        let request = NonNull::new(event.id).filter(|_| is_request);
        let request = request.map(|raw| Id { raw, channel: Arc::clone(self), library: self.library });
        // SAFETY: identifiers are of the TCP port space, whose events carry this arm; the library clears events it makes.
        let connection: &rdma_conn_param = unsafe { &event.param.conn };
        let has_data = matches!(
            event.event,
            rdma_cm_event_type::RDMA_CM_EVENT_CONNECT_REQUEST
                | rdma_cm_event_type::RDMA_CM_EVENT_CONNECT_RESPONSE
                | rdma_cm_event_type::RDMA_CM_EVENT_REJECTED
        );
        let length = usize::from(connection.private_data_len);
        let private_data = if has_data && !connection.private_data.is_null() {
            // SAFETY: for these events the library points to so many bytes of the event, which is not given back yet.
            unsafe { std::slice::from_raw_parts(connection.private_data.cast::<u8>(), length) }.to_vec()
        } else {
            Vec::new()
        };
        Event { kind: event.event, status: event.status, private_data, request }
    }

    /// Waits for the next event, in tokio. Nothing is lost if the future is dropped.
    pub(crate) async fn wait(self: &Arc<Channel>) -> io::Result<Event> {
        loop {
            if let Some(event) = self.next()? {
                return Ok(event);
            }
            let mut ready = self.readable()?.readable().await?;
            // Cleared before looking again: what comes after that makes it ready anew.
            ready.clear_ready();
        }
    }

    pub(crate) fn readable(&self) -> io::Result<&AsyncFd<OwnedFd>> {
        if let Some(readable) = self.readable.get() {
            return Ok(readable);
        }
        let made = readable(self.as_fd())?;
        Ok(self.readable.get_or_init(|| made))
    }
}

/// A descriptor for tokio to wait on. A copy of its own, so that the library closes only its own.
pub(crate) fn readable(descriptor: BorrowedFd<'_>) -> io::Result<AsyncFd<OwnedFd>> {
    let copy = descriptor.try_clone_to_owned()?;
    // Without this `AsyncFd` would panic.
    tokio::runtime::Handle::try_current().map_err(io::Error::other)?;
    // SAFETY: an owned descriptor is always the same one, and is open until the `AsyncFd` that owns it is dropped.
    Ok(unsafe { AsyncFd::register_with_interest(copy, tokio::io::Interest::READABLE) }?)
}

impl AsFd for Channel {
    fn as_fd(&self) -> BorrowedFd<'_> {
        // SAFETY: the channel lives as long as its handle.
        let number = unsafe { (*self.raw.as_ptr()).fd };
        // SAFETY: the descriptor is open as long as the channel is.
        unsafe { BorrowedFd::borrow_raw(number) }
    }
}

impl Drop for Channel {
    fn drop(&mut self) {
        // SAFETY: every identifier on it held it, so none is left; it is not used after.
        unsafe { (self.library.manager.rdma_destroy_event_channel)(self.raw.as_ptr()) };
    }
}

fn no_channel(error: io::Error) -> NoRdma {
    match error.raw_os_error() {
        Some(libc::EACCES | libc::EPERM) => NoRdma::NotPermitted { path: DEVICE_FILE.into() },
        _ if is_denied(Path::new(DEVICE_FILE)) => NoRdma::NotPermitted { path: DEVICE_FILE.into() },
        Some(libc::ENODEV | libc::ENOENT | libc::ENXIO) => NoRdma::NoConnectionManager,
        _ => NoRdma::Device { device: "this host".to_owned(), call: "rdma_create_event_channel", error },
    }
}

/// What is said to the other side's connection manager.
#[derive(Debug)]
pub(crate) struct Words<'a> {
    pub(crate) data: &'a [u8],
    pub(crate) retry_count: u8,
    pub(crate) rnr_retry_count: u8,
    pub(crate) pair_number: u32,
}

impl Words<'_> {
    /// In the library's form; it points to the data.
    fn parameters(&self) -> io::Result<rdma_conn_param> {
        Ok(rdma_conn_param {
            private_data: self.data.as_ptr().cast(),
            private_data_len: u8::try_from(self.data.len()).map_err(|_| io::ErrorKind::InvalidInput)?,
            // Nobody reads remotely.
            responder_resources: 0,
            initiator_depth: 0,
            flow_control: 1,
            retry_count: self.retry_count,
            rnr_retry_count: self.rnr_retry_count,
            srq: 0,
            qp_num: self.pair_number,
        })
    }
}

/// An identifier of the connection manager: a listener, or one end of a connection.
#[derive(Debug)]
pub(crate) struct Id {
    raw: NonNull<rdma_cm_id>,
    channel: Arc<Channel>,
    library: &'static Library,
}

// SAFETY: librdmacm may be called from any thread, and the object is destroyed once, by drop.
unsafe impl Send for Id {}
// SAFETY: as above; what changes the identifier needs `&mut` here, or is a call that the library guards.
unsafe impl Sync for Id {}

impl Id {
    pub(crate) fn new(library: &'static Library, channel: Arc<Channel>) -> io::Result<Id> {
        let mut raw: *mut rdma_cm_id = ptr::null_mut();
        let create = library.manager.rdma_create_id;
        // SAFETY: the channel lives, the result has room, and no pointer of ours is handed over.
        let code = unsafe { create(channel.raw.as_ptr(), &raw mut raw, ptr::null_mut(), rdma_port_space::RDMA_PS_TCP) };
        done(code)?;
        let raw = NonNull::new(raw).ok_or_else(|| io::Error::other("rdma_create_id gave nothing"))?;
        Ok(Id { raw, channel, library })
    }

    pub(crate) fn channel(&self) -> &Arc<Channel> {
        &self.channel
    }

    pub(crate) fn bind(&mut self, address: SocketAddr) -> io::Result<()> {
        let mut address = SockaddrStorage::from(address);
        // SAFETY: the identifier lives, and the address is a whole one of its family, which is read only.
        done(unsafe { (self.library.manager.rdma_bind_addr)(self.raw.as_ptr(), pointer(&mut address)) })
    }

    pub(crate) fn listen(&mut self, backlog: u32) -> io::Result<()> {
        let backlog = c_int::try_from(backlog).unwrap_or(c_int::MAX);
        // SAFETY: the identifier lives.
        done(unsafe { (self.library.manager.rdma_listen)(self.raw.as_ptr(), backlog) })
    }

    /// Begins to look for the device and the address to use.
    pub(crate) fn resolve_address(&mut self, from: Option<SocketAddr>, to: SocketAddr, timeout_ms: c_int) -> io::Result<()> {
        let mut from = from.map(SockaddrStorage::from);
        let mut to = SockaddrStorage::from(to);
        let from = from.as_mut().map_or(ptr::null_mut(), pointer);
        // SAFETY: the identifier lives, and both addresses are whole ones of their family, which are read only.
        done(unsafe { (self.library.manager.rdma_resolve_addr)(self.raw.as_ptr(), from, pointer(&mut to), timeout_ms) })
    }

    pub(crate) fn resolve_route(&mut self, timeout_ms: c_int) -> io::Result<()> {
        // SAFETY: the identifier lives.
        done(unsafe { (self.library.manager.rdma_resolve_route)(self.raw.as_ptr(), timeout_ms) })
    }

    /// Fills in what a queue pair needs to get into the state that `attributes` names; gives the mask of what was set.
    pub(crate) fn attributes(&self, attributes: &mut ibv_qp_attr) -> io::Result<c_int> {
        let mut mask = 0;
        // SAFETY: the identifier lives, and both results have room.
        done(unsafe { (self.library.manager.rdma_init_qp_attr)(self.raw.as_ptr(), attributes, &raw mut mask) })?;
        Ok(mask)
    }

    pub(crate) fn connect(&mut self, words: &Words<'_>) -> io::Result<()> {
        let mut parameters = words.parameters()?;
        // SAFETY: the identifier lives; the parameters point to the data that `words` borrows, which is copied by the call.
        done(unsafe { (self.library.manager.rdma_connect)(self.raw.as_ptr(), &raw mut parameters) })
    }

    pub(crate) fn establish(&mut self) -> io::Result<()> {
        // SAFETY: the identifier lives.
        done(unsafe { (self.library.manager.rdma_establish)(self.raw.as_ptr()) })
    }

    pub(crate) fn accept(&mut self, words: &Words<'_>) -> io::Result<()> {
        let mut parameters = words.parameters()?;
        // SAFETY: the identifier lives; the parameters point to the data that `words` borrows, which is copied by the call.
        done(unsafe { (self.library.manager.rdma_accept)(self.raw.as_ptr(), &raw mut parameters) })
    }

    pub(crate) fn reject(&mut self, private_data: &[u8]) -> io::Result<()> {
        let length = u8::try_from(private_data.len()).map_err(|_| io::ErrorKind::InvalidInput)?;
        // SAFETY: the identifier lives, and the data has so many bytes.
        done(unsafe { (self.library.manager.rdma_reject)(self.raw.as_ptr(), private_data.as_ptr().cast(), length) })
    }

    pub(crate) fn disconnect(&self) -> io::Result<()> {
        // SAFETY: the identifier lives.
        done(unsafe { (self.library.manager.rdma_disconnect)(self.raw.as_ptr()) })
    }

    /// Gives it a channel of its own, with the events that wait for it.
    pub(crate) fn migrate(&mut self, channel: Arc<Channel>) -> io::Result<()> {
        // SAFETY: the identifier and the channel live; every event of the identifier was given back.
        done(unsafe { (self.library.manager.rdma_migrate_id)(self.raw.as_ptr(), channel.raw.as_ptr()) })?;
        self.channel = channel;
        Ok(())
    }

    /// The port of the device that the connection goes by.
    pub(crate) fn port(&self) -> u8 {
        // SAFETY: the identifier lives; the field is a number.
        unsafe { (*self.raw.as_ptr()).port_num }
    }

    /// The name of the device that the connection goes by; `None` before that is known.
    pub(crate) fn device(&self) -> Option<String> {
        // SAFETY: the identifier lives; the field is a pointer, set by the library or null.
        let context = NonNull::new(unsafe { (*self.raw.as_ptr()).verbs })?;
        // SAFETY: the library keeps the device of a bound identifier open; the field is a pointer.
        let device = unsafe { (*context.as_ptr()).device };
        (!device.is_null()).then(|| crate::device::name(self.library, device))
    }

    pub(crate) fn local(&self) -> Option<SocketAddr> {
        let addresses = self.addresses();
        // SAFETY: all arms of the union are addresses in storage of the largest, of which every byte was set.
        socket_address(unsafe { &addresses.src_addr_union.src_storage })
    }

    pub(crate) fn peer(&self) -> Option<SocketAddr> {
        let addresses = self.addresses();
        // SAFETY: as in `local`.
        socket_address(unsafe { &addresses.dst_addr_union.dst_storage })
    }

    fn addresses(&self) -> &rdma_addr {
        // SAFETY: the identifier lives; the library changes addresses in calls that take `&mut` here only.
        unsafe { &(*self.raw.as_ptr()).route.addr }
    }
}

impl Drop for Id {
    fn drop(&mut self) {
        // SAFETY: nothing is attached to it, its events were given back, and it is not used after.
        if unsafe { (self.library.manager.rdma_destroy_id)(self.raw.as_ptr()) } != 0 {
            tracing::warn!(error = %io::Error::last_os_error(), "an identifier of the RDMA connection manager cannot be destroyed");
        }
    }
}

fn done(code: c_int) -> io::Result<()> {
    if code == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

fn pointer(address: &mut SockaddrStorage) -> *mut libc::sockaddr {
    address.as_ptr().cast_mut().cast()
}

fn socket_address(storage: &libc::sockaddr_storage) -> Option<SocketAddr> {
    let start = ptr::from_ref(storage);
    match c_int::from(storage.ss_family) {
        libc::AF_INET => {
            // SAFETY: the storage is large enough and aligned for every kind of address, and the family says which.
            let v4 = unsafe { &*start.cast::<libc::sockaddr_in>() };
            let address = Ipv4Addr::from(u32::from_be(v4.sin_addr.s_addr));
            Some(SocketAddrV4::new(address, u16::from_be(v4.sin_port)).into())
        }
        libc::AF_INET6 => {
            // SAFETY: as above.
            let v6 = unsafe { &*start.cast::<libc::sockaddr_in6>() };
            let address = Ipv6Addr::from(v6.sin6_addr.s6_addr);
            Some(SocketAddrV6::new(address, u16::from_be(v6.sin6_port), v6.sin6_flowinfo, v6.sin6_scope_id).into())
        }
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_go_there_and_back() {
        for text in ["10.77.0.1:13560", "[fe80::1%3]:13560", "[::ffff:10.77.0.2]:1", "0.0.0.0:0"] {
            let address: SocketAddr = text.parse().unwrap();
            // SAFETY: plain numbers, for which zeros are a valid value.
            let mut storage: libc::sockaddr_storage = unsafe { std::mem::zeroed() };
            let from = SockaddrStorage::from(address);
            // SAFETY: the address is of the length that it says, which is at most that of the storage.
            unsafe { ptr::copy_nonoverlapping(from.as_ptr().cast::<u8>(), (&raw mut storage).cast(), from.len() as usize) };
            assert_eq!(socket_address(&storage), Some(address));
        }
    }

    #[test]
    fn no_family_is_no_address() {
        // SAFETY: plain numbers, for which zeros are a valid value.
        assert_eq!(socket_address(&unsafe { std::mem::zeroed() }), None);
    }

    #[test]
    fn a_missing_connection_manager_and_missing_rights_have_their_words() {
        let missing = no_channel(io::Error::from_raw_os_error(libc::ENODEV)).to_string();
        assert!(missing.contains("modprobe rdma_ucm"), "{missing}");
        let denied = no_channel(io::Error::from_raw_os_error(libc::EACCES)).to_string();
        assert!(denied.contains(DEVICE_FILE) && denied.contains("GROUP=\"rdma\""), "{denied}");
    }
}
