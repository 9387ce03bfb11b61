//! The QUIC link's source side: connections to one destination, made when they are needed, and streams on them. What arrives at
//! the other end is `accept.rs`.

use super::lane::{ControlWrite, QuicSender};
use super::settings::{self, QuicSettings};
use super::socket::{self, Socket};
use super::{NAME, PROTOCOL};
use crate::connect::our_address;
use crate::control::Early;
use crate::key::HostKey;
use crate::lanes::LaneSender;
use crate::sessions::{LANE_ANSWER_BYTES, parse_lane_answer};
use crate::tls::{self, ALERT_ACCESS_DENIED, TlsError, TrustedHosts};
use crate::ways::{Here, Way, ways};
use crate::{Answer, Capabilities, ConnectError, Control, LaneMemory, Link};
use limosa_proto::identity::HostId;
use limosa_proto::wire::frame::LanePreamble;
use limosa_proto::wire::limits::LANES_MAX;
use quinn::crypto::rustls::QuicClientConfig;
use quinn::{ClientConfig, Connection, ConnectionError, Endpoint, RecvStream, SendStream, TokioRuntime, TransportErrorCode};
use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::Mutex;

/// Opening a lane on a connection that is there takes no longer than this.
const STEP_MAX: Duration = Duration::from_secs(5);

/// QUIC to one destination.
#[derive(Debug)]
pub struct QuicLink {
    destination: String,
    expected: HostId,
    key: HostKey,
    trusted: TrustedHosts,
    silence_max: Duration,
    settings: QuicSettings,
    here: Here,
    /// The first carries control.
    connections: Vec<Mutex<Option<Connected>>>,
}

/// A connection and the socket it goes through.
#[derive(Debug, Clone)]
struct Connected {
    endpoint: Endpoint,
    connection: Connection,
    way: Way,
}

/// A fresh bidirectional stream.
type Stream = (SendStream, RecvStream);

/// What a connection knows about its path.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct QuicPath {
    /// Best estimate of the round trip.
    pub round_trip: Duration,
    /// UDP payload in bytes of the packets that are sent.
    pub mtu: u16,
    /// Bytes that may be under way.
    pub congestion_window: u64,
    /// Packets sent.
    pub sent_packets: u64,
    /// Packets of them that are held to be lost.
    pub lost_packets: u64,
    /// Bytes of UDP payload sent.
    pub sent_bytes: u64,
}

impl QuicLink {
    /// A link to `destination` ("host:port"), which must have the key `expected`; we show `key`. A peer from which nothing is
    /// heard for `silence_max`, and a quarter more, is lost.
    #[must_use]
    pub fn new(
        destination: String,
        expected: HostId,
        key: HostKey,
        trusted: TrustedHosts,
        silence_max: Duration,
        settings: QuicSettings,
    ) -> QuicLink {
        let connections = (0..settings.connection_count()).map(|_| Mutex::new(None)).collect();
        QuicLink { destination, expected, key, trusted, silence_max, settings, here: Here::default(), connections }
    }

    /// The same from addresses of this host that `here` names.
    #[must_use]
    pub fn with_here(self, here: Here) -> QuicLink {
        QuicLink { here, ..self }
    }

    /// Goes on from the address `address` of this host: every connection gets a new socket there. The destination looks the
    /// address up on its allow-list; where it is not there, the connections are silent from now on.
    ///
    /// # Errors
    /// No socket can be opened there. Some connections may have moved.
    pub async fn rebind(&self, address: IpAddr) -> io::Result<()> {
        for connection in &self.connections {
            if let Some(connected) = &*connection.lock().await {
                let socket = socket::open(SocketAddr::new(address, 0), &self.settings)?;
                connected.endpoint.rebind_abstract(Socket::new(socket, None)?)?;
            }
        }
        Ok(())
    }

    /// What each open connection knows about its path, the one of the control channel first.
    pub async fn paths(&self) -> Vec<QuicPath> {
        let mut paths = Vec::new();
        for connection in &self.connections {
            if let Some(connected) = &*connection.lock().await {
                let stats = connected.connection.stats();
                paths.push(QuicPath {
                    round_trip: stats.path.rtt,
                    mtu: stats.path.current_mtu,
                    congestion_window: stats.path.cwnd,
                    sent_packets: stats.path.sent_packets,
                    lost_packets: stats.path.lost_packets,
                    sent_bytes: stats.udp_tx.bytes,
                });
            }
        }
        paths
    }

    fn io(&self, doing: &'static str) -> impl Fn(io::Error) -> ConnectError + '_ {
        move |error| ConnectError::Io { destination: self.destination.clone(), doing, error }
    }

    fn timeout(&self, doing: &'static str, after: Duration) -> ConnectError {
        ConnectError::Timeout { destination: self.destination.clone(), doing, after }
    }

    /// Connects anew: to `known` where another connection has answered from there, or to the first address that answers. Also
    /// the connection's first stream.
    async fn connect(&self, known: Option<Way>) -> Result<(Connected, Stream), ConnectError> {
        let doing = "connecting by QUIC";
        let usable = |way: &Way| self.settings.source_address.is_none_or(|ours| ours.is_ipv4() == way.to.is_ipv4());
        let ways: Vec<Way> = match known {
            Some(way) => vec![way],
            None => match tokio::time::timeout(self.settings.connect_max, ways(&self.destination, &self.here)).await {
                Ok(found) => {
                    let found = found.map_err(|none| none.error(self.destination.clone()))?;
                    found.into_iter().filter(usable).collect()
                }
                Err(_) => return Err(self.timeout("looking its name up", self.settings.connect_max)),
            },
        };
        let share = self.settings.connect_max / u32::try_from(ways.len()).unwrap_or(1).max(1);
        let mut failed =
            ConnectError::Unreachable { destination: self.destination.clone(), error: io::ErrorKind::AddrNotAvailable.into() };
        for way in ways {
            match tokio::time::timeout(share, self.connect_to(way)).await {
                Ok(Ok(connected)) => return Ok(connected),
                Ok(Err(error)) => failed = error,
                Err(_) => failed = self.timeout(doing, self.settings.connect_max),
            }
        }
        Err(failed)
    }

    /// Returns when both sides know who the other is: the destination gives no stream before.
    async fn connect_to(&self, way: Way) -> Result<(Connected, Stream), ConnectError> {
        let unreachable = |error| ConnectError::Unreachable { destination: self.destination.clone(), error };
        let tls = |error| ConnectError::Tls { destination: self.destination.clone(), error };
        let address = way.to;
        let any: IpAddr = if address.is_ipv4() { Ipv4Addr::UNSPECIFIED.into() } else { Ipv6Addr::UNSPECIFIED.into() };
        let from = SocketAddr::new(self.settings.source_address.or(way.from).unwrap_or(any), 0);
        let socket = Socket::new(socket::open(from, &self.settings).map_err(unreachable)?, None).map_err(unreachable)?;
        let endpoint = Endpoint::new_with_abstract_socket(settings::endpoint(), None, socket, Arc::new(TokioRuntime))
            .map_err(unreachable)?;
        let (config, verifier) = tls::config_for_destination(&self.key, &self.trusted, self.expected).map_err(tls)?;
        let crypto = QuicClientConfig::try_from(with_protocol(config))
            .map_err(|error| tls(rustls::Error::General(error.to_string()).into()))?;
        let mut config = ClientConfig::new(Arc::new(crypto));
        let (route_mtu, sure) = socket::route_mtu(address);
        config.transport_config(Arc::new(self.settings.of_source(self.silence_max, route_mtu, sure)));
        let connecting = endpoint.connect_with(config, address, NAME).map_err(|error| unreachable(io::Error::other(error)))?;
        let failed = |error| self.refused(error, address, verifier.seen());
        let connection = connecting.await.map_err(failed)?;
        let stream = connection.open_bi().await.map_err(failed)?;
        connection.set_send_window(self.settings.send_window(connection.rtt()));
        Ok((Connected { endpoint, connection, way }, stream))
    }

    /// Why there is no connection, in the link's words. `seen` is the key that the destination showed.
    fn refused(&self, error: ConnectionError, address: SocketAddr, seen: Option<HostId>) -> ConnectError {
        let destination = self.destination.clone();
        let denied = TransportErrorCode::crypto(ALERT_ACCESS_DENIED);
        match &error {
            ConnectionError::ConnectionClosed(close) if close.error_code == TransportErrorCode::CONNECTION_REFUSED => {
                let address = self.settings.source_address.map_or_else(|| our_address(address), |ours| ours.to_string());
                ConnectError::NotAllowed { destination, address }
            }
            ConnectionError::ConnectionClosed(close) if close.error_code == denied => {
                ConnectError::KeyRefused { destination, id: self.key.id() }
            }
            // What a close by the application looks like before the handshake is over: it had to make room.
            ConnectionError::ConnectionClosed(close) if close.error_code == TransportErrorCode::APPLICATION_ERROR => {
                ConnectError::Crowded { destination }
            }
            ConnectionError::TransportError(wrong) if wrong.code == denied => {
                let error = match seen {
                    Some(found) if !self.trusted.same_host(found, self.expected) => {
                        TlsError::DestinationOther { expected: self.expected, found }
                    }
                    Some(found) => TlsError::of(&self.trusted, found, TlsError::DestinationUntrusted),
                    None => TlsError::NoHostKey,
                };
                ConnectError::Tls { destination, error }
            }
            ConnectionError::TimedOut => self.timeout("connecting by QUIC", self.settings.connect_max),
            _ => ConnectError::Io { destination, doing: "connecting by QUIC", error: error.into() },
        }
    }

    async fn open_control(&self) -> Result<Control, ConnectError> {
        let [first, ..] = self.connections.as_slice() else {
            return Err(self.io("connecting by QUIC")(io::ErrorKind::NotConnected.into()));
        };
        let mut first = first.lock().await;
        // A new one each time: whether the destination still answers is what a new control channel has to show.
        let (connected, (send, receive)) = self.connect(None).await?;
        *first = Some(connected);
        Ok(Control::new(self.expected, receive, ControlWrite::new(send, None), None, Early::default()))
    }

    /// A stream for a lane, on the connection that it belongs to.
    async fn stream(&self, lane: u16, doing: &'static str) -> Result<Stream, ConnectError> {
        let number = usize::from(lane) % self.connections.len().max(1);
        let answered = match self.connections.first() {
            Some(first) if number > 0 => first.lock().await.as_ref().map(|connected| connected.way),
            _ => None,
        };
        let Some(place) = self.connections.get(number) else {
            return Err(self.io(doing)(io::ErrorKind::NotConnected.into()));
        };
        let mut place = place.lock().await;
        let open = place.as_ref().map(|connected| &connected.connection).filter(|open| open.close_reason().is_none()).cloned();
        let Some(open) = open else {
            let (connected, stream) = self.connect(answered).await?;
            *place = Some(connected);
            return Ok(stream);
        };
        drop(place);
        match tokio::time::timeout(STEP_MAX, open.open_bi()).await {
            Ok(opened) => opened.map_err(|error| self.io(doing)(error.into())),
            Err(_) => Err(self.timeout(doing, STEP_MAX)),
        }
    }

    async fn open_lane(&self, preamble: LanePreamble) -> Result<Box<dyn LaneSender>, ConnectError> {
        let doing = "opening a lane";
        let (mut send, mut receive) = self.stream(preamble.lane, doing).await?;
        let ask = async {
            send.write_all(&preamble.emit()).await?;
            let mut answer = [0; LANE_ANSWER_BYTES];
            receive.read_exact(&mut answer).await.map_err(io::Error::other)?;
            Ok(answer)
        };
        let answer = match tokio::time::timeout(STEP_MAX, ask).await {
            Ok(answer) => answer.map_err(self.io(doing))?,
            Err(_) => return Err(self.timeout(doing, STEP_MAX)),
        };
        match parse_lane_answer(&answer) {
            Some(code) => Err(ConnectError::LaneRefused { destination: self.destination.clone(), lane: preamble.lane, code }),
            None => Ok(Box::new(QuicSender::new(send))),
        }
    }
}

/// `config` for QUIC alone.
fn with_protocol(mut config: rustls::ClientConfig) -> rustls::ClientConfig {
    config.alpn_protocols = vec![PROTOCOL.to_vec()];
    config
}

impl Link for QuicLink {
    fn capabilities(&self) -> Capabilities {
        Capabilities { name: "quic", secure_lanes: true, plaintext_lanes: false, page_check: false, lanes_max: LANES_MAX }
    }

    fn destination(&self) -> String {
        self.destination.clone()
    }

    fn control(&self) -> Answer<'_, Result<Control, ConnectError>> {
        Box::pin(self.open_control())
    }

    /// Always encrypted, whatever is asked for.
    fn lane(
        &self,
        preamble: LanePreamble,
        _plaintext: bool,
        _memory: &LaneMemory,
    ) -> Answer<'_, Result<Box<dyn LaneSender>, ConnectError>> {
        Box::pin(self.open_lane(preamble))
    }
}
