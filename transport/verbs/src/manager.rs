//! Making connections: a listener and its connect requests on the destination, resolving on the source, and the handshake of
//! both. It runs in tokio; every step has a deadline. Who may connect is decided by the caller, who sees a request's address
//! before anything is made for it.
//!
//! Private data travels as one length byte and the data: the connection manager itself pads it with zeros.

use crate::channel::{Channel, Event, Id, Words};
use crate::device;
use crate::domain::ProtectionDomain;
use crate::error::{ConnectError, ListenError, NoRdma, PrepareError};
use crate::library::Library;
use crate::pair::{PairSettings, QueuePair};
use crate::post::{PostError, Receive};
use rdma_sys::rdma_cm_event_type;
use std::io;
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;
use tokio::time::Instant;

/// Most bytes of private data that the connecting side gives: InfiniBand has 92, of which the IP addresses take 36 and the length 1.
pub const PRIVATE_DATA_CONNECT_MAX: usize = 55;
/// Most bytes of private data that the accepting side gives.
pub const PRIVATE_DATA_ACCEPT_MAX: usize = 195;
/// Most bytes of private data of a refusal.
pub const PRIVATE_DATA_REJECT_MAX: usize = 147;

/// Reasons of a refusal by number (InfiniBand specification, volume 1, 12.6.7.2).
const REJECTED_NO_SUCH_SERVICE: i32 = 8;
const REJECTED_BY_CONSUMER: i32 = 28;

/// What is said while connecting.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Handshake {
    /// For the other side: at most [`PRIVATE_DATA_CONNECT_MAX`] or [`PRIVATE_DATA_ACCEPT_MAX`] bytes.
    pub private_data: Vec<u8>,
    /// How often a packet that is not acknowledged is sent again, 0 to 7; then [`crate::Status::RetryExceeded`].
    pub retry_count: u8,
    /// How often a message that found no receive posted is sent again, 0 to 6, or 7 for ever; then [`crate::Status::ReceiverNotReady`].
    pub rnr_retry_count: u8,
    /// How long an acknowledgement is waited for: 4.096 µs times 2 to this power, 1 to 31; `None` leaves it to the connection
    /// manager, which takes 2 s and more on Ethernet. Devices may take up to four times as long.
    pub ack_timeout: Option<u8>,
}

impl Default for Handshake {
    /// No private data; a dead path is noticed after 5 to 25 s, a stuck receiver after half a second or, with a longer
    /// [`PairSettings::minimal_rnr_timer`] at the peer, six times that.
    fn default() -> Handshake {
        Handshake { private_data: Vec::new(), retry_count: 5, rnr_retry_count: 6, ack_timeout: Some(18) }
    }
}

/// Whether connections can be made here.
pub(crate) fn check(library: &'static Library) -> Result<(), NoRdma> {
    Channel::new(library).map(|_| ())
}

/// Where connections arrive. One is enough for all devices of a host.
#[derive(Debug)]
pub struct Listener {
    id: Id,
    library: &'static Library,
    address: SocketAddr,
}

impl Listener {
    /// Listens on an address and port; an unspecified address stands for all devices, also ones that come later. `backlog`
    /// connect requests at most wait in the kernel to be taken.
    ///
    /// # Errors
    /// No RDMA here, or the address cannot be had.
    pub fn bind(address: SocketAddr, backlog: u32) -> Result<Listener, ListenError> {
        let library = Library::load()?;
        // Asked first: without devices librdmacm's words are poor.
        device::list(library)?;
        let failed = |call| move |error| ListenError::Bind { address, call, error };
        let mut id = Id::new(library, Channel::new(library)?).map_err(failed("rdma_create_id"))?;
        id.bind(address).map_err(failed("rdma_bind_addr"))?;
        id.listen(backlog).map_err(failed("rdma_listen"))?;
        let address = id.local().unwrap_or(address);
        Ok(Listener { id, library, address })
    }

    /// Where it listens; with the port that was given if 0 was asked for.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// Waits for the next connect request. Nothing is lost if the future is dropped.
    ///
    /// # Errors
    /// The event channel broke.
    pub async fn next(&mut self) -> Result<ConnectRequest, ListenError> {
        loop {
            let event = self.id.channel().wait().await?;
            let Event { request: Some(id), private_data, .. } = event else {
                tracing::debug!(event = event.kind, "event of an RDMA listener");
                continue;
            };
            let (Some(peer), Some(device)) = (id.peer(), id.device()) else {
                tracing::debug!("a connect request without an IP address or a device");
                continue;
            };
            return Ok(ConnectRequest { private_data: unwrapped(&private_data), id, peer, device, library: self.library });
        }
    }
}

/// Somebody wants to connect. Nothing was made for him yet: no queue pair, no memory region. Dropping it refuses.
#[derive(Debug)]
pub struct ConnectRequest {
    id: Id,
    peer: SocketAddr,
    device: String,
    private_data: Vec<u8>,
    library: &'static Library,
}

impl ConnectRequest {
    /// Who, as the request says: on a trusted fabric, that is.
    pub fn peer(&self) -> SocketAddr {
        self.peer
    }

    /// The address that was asked for.
    pub fn local(&self) -> Option<SocketAddr> {
        self.id.local()
    }

    /// The name of the device by which the request came.
    pub fn device(&self) -> &str {
        &self.device
    }

    /// What the other side says; empty if it is none of ours.
    pub fn private_data(&self) -> &[u8] {
        &self.private_data
    }

    /// Refuses, with at most [`PRIVATE_DATA_REJECT_MAX`] bytes that say why; more are cut off.
    pub fn reject(mut self, private_data: &[u8]) {
        let private_data = private_data.get(..PRIVATE_DATA_REJECT_MAX).unwrap_or(private_data);
        if let Err(error) = self.id.reject(&wrapped(private_data)) {
            tracing::debug!(peer = %self.peer, %error, "a connect request cannot be refused");
        }
    }

    /// Makes a queue pair for it.
    ///
    /// # Errors
    /// See [`PrepareError`]; the request is then refused.
    pub fn prepare(mut self, domain: &Arc<ProtectionDomain>, settings: &PairSettings) -> Result<Prepared, PrepareError> {
        same_device(&self.device, domain)?;
        let failed = |call| move |error| PrepareError::Manager { call, error };
        let channel = Channel::new(self.library).map_err(|error| failed("rdma_create_event_channel")(io::Error::other(error)))?;
        self.id.migrate(channel).map_err(failed("rdma_migrate_id"))?;
        Prepared::new(self.id, self.peer, domain, settings, Role::Destination)
    }
}

/// A destination that was found: by which device and from which address it is reached.
#[derive(Debug)]
pub struct Resolved {
    id: Id,
    peer: SocketAddr,
    device: String,
}

impl Resolved {
    /// Looks for the device, the address and the route to `destination`; `source` chooses one of several addresses of this host.
    ///
    /// # Errors
    /// See [`ConnectError`].
    pub async fn resolve(destination: SocketAddr, source: Option<IpAddr>, timeout: Duration) -> Result<Resolved, ConnectError> {
        let library = Library::load()?;
        device::list(library)?;
        let steps = Steps { peer: destination, begun: Instant::now(), timeout };
        let mut id = Id::new(library, Channel::new(library)?).map_err(steps.failed("rdma_create_id"))?;
        let source = source.map(|address| SocketAddr::new(address, 0));
        let step = "looking for its address";
        id.resolve_address(source, destination, steps.left_ms()).map_err(|error| steps.unreachable(step, error))?;
        steps.wait(id.channel(), rdma_cm_event_type::RDMA_CM_EVENT_ADDR_RESOLVED, step).await?;
        let step = "looking for the route";
        id.resolve_route(steps.left_ms()).map_err(|error| steps.unreachable(step, error))?;
        steps.wait(id.channel(), rdma_cm_event_type::RDMA_CM_EVENT_ROUTE_RESOLVED, step).await?;
        let device = id.device().ok_or_else(|| steps.failed("rdma_resolve_addr")(io::ErrorKind::NotFound.into()))?;
        Ok(Resolved { id, peer: destination, device })
    }

    /// The name of the device that reaches it.
    pub fn device(&self) -> &str {
        &self.device
    }

    /// The address that it is reached from.
    pub fn local(&self) -> Option<SocketAddr> {
        self.id.local()
    }

    /// Makes a queue pair for the connection.
    ///
    /// # Errors
    /// See [`PrepareError`].
    pub fn prepare(self, domain: &Arc<ProtectionDomain>, settings: &PairSettings) -> Result<Prepared, PrepareError> {
        same_device(&self.device, domain)?;
        Prepared::new(self.id, self.peer, domain, settings, Role::Source)
    }
}

#[derive(Debug, Clone, Copy)]
enum Role {
    Source,
    Destination,
}

/// A queue pair that is not connected yet: receives can be posted.
#[derive(Debug)]
pub struct Prepared {
    pair: QueuePair,
    role: Role,
}

impl Prepared {
    fn new(
        id: Id,
        peer: SocketAddr,
        domain: &Arc<ProtectionDomain>,
        settings: &PairSettings,
        role: Role,
    ) -> Result<Prepared, PrepareError> {
        let mut pair = QueuePair::new(domain, id, peer, settings)?;
        let failed = |error| PrepareError::Manager { call: "initialising the queue pair", error };
        pair.make_initialized().map_err(failed)?;
        Ok(Prepared { pair, role })
    }

    /// The other end's address and port.
    pub fn peer(&self) -> SocketAddr {
        self.pair.peer
    }

    /// Bytes that can go inline.
    pub fn inline_max(&self) -> u32 {
        self.pair.inline_max()
    }

    /// Posts receives, so that the peer finds them with its first message.
    ///
    /// # Errors
    /// See [`PostError`].
    pub fn post_receives(&mut self, receives: &[Receive<'_>]) -> Result<(), PostError> {
        self.pair.post_receives(receives)
    }

    /// Connects on the source, accepts on the destination, and waits until the other side has done its part.
    ///
    /// # Errors
    /// See [`ConnectError`]; everything that was made for the connection is gone then.
    pub async fn establish(mut self, handshake: &Handshake, timeout: Duration) -> Result<QueuePair, ConnectError> {
        let max = match self.role {
            Role::Source => PRIVATE_DATA_CONNECT_MAX,
            Role::Destination => PRIVATE_DATA_ACCEPT_MAX,
        };
        let bytes = handshake.private_data.len();
        if bytes > max {
            return Err(ConnectError::TooMuchPrivateData { bytes, max });
        }
        let steps = Steps { peer: self.pair.peer, begun: Instant::now(), timeout };
        match self.role {
            Role::Source => connect(&mut self.pair, handshake, &steps).await?,
            Role::Destination => accept(&mut self.pair, handshake, &steps).await?,
        }
        Ok(self.pair)
    }
}

async fn connect(pair: &mut QueuePair, handshake: &Handshake, steps: &Steps) -> Result<(), ConnectError> {
    let data = wrapped(&handshake.private_data);
    let words = words(pair, handshake, &data);
    pair.id.connect(&words).map_err(|error| steps.unreachable("connecting", error))?;
    let response = rdma_cm_event_type::RDMA_CM_EVENT_CONNECT_RESPONSE;
    let answer = steps.wait(pair.id.channel(), response, "waiting for its answer").await?;
    pair.peer_data = unwrapped(&answer.private_data);
    make_ready(pair, handshake, steps)?;
    pair.id.establish().map_err(steps.failed("rdma_establish"))?;
    pair.mark_connected();
    Ok(())
}

async fn accept(pair: &mut QueuePair, handshake: &Handshake, steps: &Steps) -> Result<(), ConnectError> {
    make_ready(pair, handshake, steps)?;
    let data = wrapped(&handshake.private_data);
    let words = words(pair, handshake, &data);
    pair.id.accept(&words).map_err(steps.failed("rdma_accept"))?;
    pair.mark_connected();
    let established = rdma_cm_event_type::RDMA_CM_EVENT_ESTABLISHED;
    steps.wait(pair.id.channel(), established, "waiting for its confirmation").await?;
    Ok(())
}

fn make_ready(pair: &mut QueuePair, handshake: &Handshake, steps: &Steps) -> Result<(), ConnectError> {
    let failed = |state| move |error| ConnectError::State { peer: steps.peer, state, error };
    let Handshake { retry_count, rnr_retry_count, ack_timeout, .. } = *handshake;
    pair.make_receiving().map_err(failed("ready to receive"))?;
    let agreed = pair.path_mtu();
    let here = pair.port_mtu().map_err(failed("ready to receive"))?;
    if agreed > here {
        return Err(ConnectError::MtuMismatch { peer: steps.peer, agreed, here });
    }
    pair.make_sending(retry_count.min(7), rnr_retry_count.min(7), ack_timeout).map_err(failed("ready to send"))
}

fn words<'a>(pair: &QueuePair, handshake: &Handshake, data: &'a [u8]) -> Words<'a> {
    let Handshake { retry_count, rnr_retry_count, .. } = *handshake;
    Words { data, retry_count: retry_count.min(7), rnr_retry_count: rnr_retry_count.min(7), pair_number: pair.number() }
}

fn wrapped(data: &[u8]) -> Vec<u8> {
    let length = u8::try_from(data.len()).unwrap_or(u8::MAX);
    let mut wrapped = vec![length];
    wrapped.extend_from_slice(data.get(..usize::from(length)).unwrap_or(data));
    wrapped
}

/// Nothing if it is not in our form.
fn unwrapped(data: &[u8]) -> Vec<u8> {
    let Some((length, rest)) = data.split_first() else { return Vec::new() };
    rest.get(..usize::from(*length)).unwrap_or_default().to_vec()
}

fn same_device(connection: &str, domain: &Arc<ProtectionDomain>) -> Result<(), PrepareError> {
    let domain = domain.context().name();
    if connection == domain {
        return Ok(());
    }
    Err(PrepareError::OtherDevice { connection: connection.to_owned(), domain: domain.to_owned() })
}

/// The steps of one connection: who it is with, and until when.
struct Steps {
    peer: SocketAddr,
    begun: Instant,
    timeout: Duration,
}

impl Steps {
    fn left_ms(&self) -> i32 {
        let left = self.timeout.saturating_sub(self.begun.elapsed());
        i32::try_from(left.as_millis()).unwrap_or(i32::MAX).max(1)
    }

    fn failed(&self, call: &'static str) -> impl Fn(io::Error) -> ConnectError + use<> {
        let peer = self.peer;
        move |error| ConnectError::Failed { peer, call, error }
    }

    fn unreachable(&self, step: &'static str, error: io::Error) -> ConnectError {
        let peer = self.peer;
        match error.raw_os_error() {
            Some(libc::ENODEV | libc::EADDRNOTAVAIL) => ConnectError::NoDeviceFor { peer, error },
            _ => ConnectError::Unreachable { peer, step, error },
        }
    }

    /// Waits for the event that ends a step well.
    async fn wait(
        &self,
        channel: &Arc<Channel>,
        wanted: rdma_cm_event_type::Type,
        step: &'static str,
    ) -> Result<Event, ConnectError> {
        let deadline = self.begun + self.timeout;
        let timed_out = |_| ConnectError::TimedOut { peer: self.peer, step, waited: self.timeout };
        loop {
            let event = tokio::time::timeout_at(deadline, channel.wait()).await.map_err(timed_out)?;
            let event = event.map_err(self.failed("rdma_get_cm_event"))?;
            if event.kind == wanted && event.status == 0 {
                return Ok(event);
            }
            if let Some(error) = self.bad(&event, step) {
                return Err(error);
            }
        }
    }

    /// What an event that was not wanted means; `None` if it can be passed over.
    fn bad(&self, event: &Event, step: &'static str) -> Option<ConnectError> {
        use rdma_cm_event_type as kind;
        let peer = self.peer;
        let said = || io::Error::from_raw_os_error(event.status.saturating_abs());
        match event.kind {
            kind::RDMA_CM_EVENT_REJECTED => Some(match event.status {
                REJECTED_NO_SUCH_SERVICE => ConnectError::NobodyListens(peer),
                REJECTED_BY_CONSUMER => ConnectError::Rejected { peer, private_data: unwrapped(&event.private_data) },
                reason => ConnectError::Refused { peer, reason },
            }),
            kind::RDMA_CM_EVENT_ADDR_ERROR
            | kind::RDMA_CM_EVENT_ROUTE_ERROR
            | kind::RDMA_CM_EVENT_UNREACHABLE
            | kind::RDMA_CM_EVENT_CONNECT_ERROR => Some(self.unreachable(step, said())),
            kind::RDMA_CM_EVENT_DISCONNECTED => Some(ConnectError::Disconnected(peer)),
            kind::RDMA_CM_EVENT_DEVICE_REMOVAL => Some(ConnectError::DeviceRemoved(peer)),
            _ if event.status != 0 => Some(self.unreachable(step, said())),
            _ => None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn private_data_survives_padding() {
        let mut wire = wrapped(b"token");
        wire.resize(56, 0);
        assert_eq!(unwrapped(&wire), b"token");
        assert_eq!(unwrapped(&[0; 56]), b"");
    }

    #[test]
    fn private_data_that_lies_is_none() {
        assert_eq!(unwrapped(&[]), b"");
        assert_eq!(unwrapped(&[200, 1, 2, 3]), b"");
    }

    #[test]
    fn what_was_not_wanted_is_said_in_words() {
        let steps = Steps { peer: "10.77.0.2:13560".parse().unwrap(), begun: Instant::now(), timeout: Duration::ZERO };
        let words = |kind, status| {
            let event = Event { kind, status, private_data: vec![2, 7, 7], request: None };
            steps.bad(&event, "connecting").map(|error| error.to_string())
        };
        use rdma_cm_event_type as kind;
        let refused = words(kind::RDMA_CM_EVENT_REJECTED, REJECTED_BY_CONSUMER).unwrap();
        assert!(refused.contains("refused") && refused.contains("2 bytes"), "{refused}");
        assert!(words(kind::RDMA_CM_EVENT_REJECTED, 8).unwrap().contains("nobody listens"));
        assert!(words(kind::RDMA_CM_EVENT_REJECTED, 26).unwrap().contains("MTU"));
        assert!(words(kind::RDMA_CM_EVENT_UNREACHABLE, -110).unwrap().contains("timed out"));
        assert!(words(kind::RDMA_CM_EVENT_ADDR_ERROR, -19).unwrap().contains("no RDMA device of this host reaches"));
        assert_eq!(words(kind::RDMA_CM_EVENT_TIMEWAIT_EXIT, 0), None);
    }
}
