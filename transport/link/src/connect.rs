//! The TCP link's source side: reaching a destination, in words when it does not work.
//! What arrives at the other end is `accept.rs`; the lanes' bytes are `tcp.rs`.

use crate::control::{ControlError, Early, Plain};
use crate::key::HostKey;
use crate::lanes::LaneSender;
use crate::sessions::{LANE_ANSWER_BYTES, parse_lane_answer};
use crate::tcp::{PlainSender, SecureSender, set_up, set_up_lane};
use crate::tls::{self, ALERT_ACCESS_DENIED, TlsError, TrustedHosts};
use crate::ways::{Here, NoWay, Way, source_of, ways};
use crate::{Answer, Capabilities, Control, LaneMemory, Link};
use limosa_proto::identity::HostId;
use limosa_proto::wire::code::Code;
use limosa_proto::wire::frame::LanePreamble;
use limosa_proto::wire::limits::LANES_MAX;
use socket2::{SockRef, Socket};
use std::future::Future;
use std::io;
use std::net::{IpAddr, SocketAddr};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;

/// A step of reaching a destination that takes longer than this has failed.
const STEP_MAX: Duration = Duration::from_secs(5);
/// How long one that had to make room waits before it knocks again.
const CROWDED_WAIT: Duration = Duration::from_millis(30);

/// Why a destination could not be reached, or let us not in. Nothing was changed anywhere.
#[derive(Debug, thiserror::Error)]
pub enum ConnectError {
    /// The name has no address.
    #[error("destination {destination} has no address: {error}")]
    Resolve {
        /// Whom we asked for.
        destination: String,
        /// What the system said.
        error: io::Error,
    },
    /// Nobody answers there.
    #[error("destination {destination} cannot be reached: {error}; is `limosa agent` running there?")]
    Unreachable {
        /// Whom we asked for.
        destination: String,
        /// What the system said.
        error: io::Error,
    },
    /// It closed the connection before it said a word: our address is not on its allow-list.
    #[error("destination {destination} does not allow {address} (our address); it must be on its allow-list")]
    NotAllowed {
        /// Whom we asked for.
        destination: String,
        /// Our address.
        address: String,
    },
    /// No way to it leaves from an address of ours that migrations may use.
    #[error(
        "destination {destination} would be reached from {address}, and that address of this host takes no migrations: `limosa allow add --here {address}` here"
    )]
    OwnAddress {
        /// Whom we asked for.
        destination: String,
        /// Our address.
        address: IpAddr,
    },
    /// It does not trust our key.
    #[error("destination {destination} does not trust our key {id}: `limosa host trust {id}` there")]
    KeyRefused {
        /// Whom we asked for.
        destination: String,
        /// Our key.
        id: HostId,
    },
    /// It is busy with too many others.
    #[error("destination {destination} has too many unfinished connections; try again")]
    Crowded {
        /// Whom we asked for.
        destination: String,
    },
    /// The handshake failed.
    #[error("destination {destination}: {error}")]
    Tls {
        /// Whom we asked for.
        destination: String,
        /// Why.
        error: TlsError,
    },
    /// It let a lane not in.
    #[error("destination {destination} refused lane {lane}: {code}")]
    LaneRefused {
        /// Whom we asked for.
        destination: String,
        /// Which lane.
        lane: u16,
        /// What it said.
        code: Code,
    },
    /// A device or the fabric between the hosts let a lane not through.
    #[error("destination {destination}: lane {lane} cannot be opened: {words}")]
    Fabric {
        /// Whom we asked for.
        destination: String,
        /// Which lane.
        lane: u16,
        /// The code that the report gets.
        code: Code,
        /// What failed, and what to do about it.
        words: String,
    },
    /// The connection failed on the way.
    #[error("destination {destination}: the connection failed while {doing}: {error}")]
    Io {
        /// Whom we asked for.
        destination: String,
        /// What was being done.
        doing: &'static str,
        /// What the system said.
        error: io::Error,
    },
    /// It took too long.
    #[error("destination {destination} did not answer within {} s while {doing}", .after.as_secs())]
    Timeout {
        /// Whom we asked for.
        destination: String,
        /// What was being done.
        doing: &'static str,
        /// The deadline.
        after: Duration,
    },
}

impl ConnectError {
    /// The code that the report gets.
    #[must_use]
    pub fn code(&self) -> Code {
        match self {
            ConnectError::NotAllowed { .. } | ConnectError::OwnAddress { .. } => Code::NotAllowed,
            ConnectError::KeyRefused { .. } => Code::UnknownHost,
            ConnectError::Tls { error, .. } => match error {
                TlsError::DestinationUntrusted(_)
                | TlsError::DestinationOther { .. }
                | TlsError::Revoked(_)
                | TlsError::Expired(_)
                | TlsError::NoHostKey => Code::UnknownHost,
                _ => Code::LinkLost,
            },
            ConnectError::LaneRefused { code, .. } | ConnectError::Fabric { code, .. } => *code,
            ConnectError::Crowded { .. } => Code::Busy,
            ConnectError::Timeout { .. } => Code::Timeout,
            ConnectError::Resolve { .. } | ConnectError::Unreachable { .. } | ConnectError::Io { .. } => Code::LinkLost,
        }
    }
}

impl NoWay {
    /// As the link says it.
    pub(crate) fn error(self, destination: String) -> ConnectError {
        match self {
            NoWay::Resolve(error) => ConnectError::Resolve { destination, error },
            NoWay::Forbidden(address) => ConnectError::OwnAddress { destination, address },
        }
    }
}

/// TCP to one destination.
#[derive(Debug)]
pub struct TcpLink {
    destination: String,
    expected: HostId,
    key: HostKey,
    trusted: TrustedHosts,
    silence_max: Duration,
    /// Congestion control of the lanes; the system's where none is named.
    congestion: Option<String>,
    here: Here,
    /// The way that was answered: lanes go where the control channel went.
    answered: Mutex<Option<Way>>,
}

impl TcpLink {
    /// A link to `destination` ("host:port"), which must have the key `expected`; we show `key`. A peer that acknowledges
    /// nothing for `silence_max` is lost.
    #[must_use]
    pub fn new(destination: String, expected: HostId, key: HostKey, trusted: TrustedHosts, silence_max: Duration) -> TcpLink {
        TcpLink {
            destination,
            expected,
            key,
            trusted,
            silence_max,
            congestion: None,
            here: Here::default(),
            answered: Mutex::new(None),
        }
    }

    /// The same with another congestion control for its lanes ("cubic", "bbr") than the system's.
    #[must_use]
    pub fn with_congestion(self, name: impl Into<String>) -> TcpLink {
        TcpLink { congestion: Some(name.into()), ..self }
    }

    /// The same from addresses of this host that `here` names.
    #[must_use]
    pub fn with_here(self, here: Here) -> TcpLink {
        TcpLink { here, ..self }
    }

    pub(crate) fn io(&self, doing: &'static str) -> impl Fn(io::Error) -> ConnectError + '_ {
        move |error| ConnectError::Io { destination: self.destination.clone(), doing, error }
    }

    async fn within<T>(
        &self,
        doing: &'static str,
        work: impl Future<Output = Result<T, ConnectError>>,
    ) -> Result<T, ConnectError> {
        tokio::time::timeout(STEP_MAX, work)
            .await
            .unwrap_or_else(|_| Err(ConnectError::Timeout { destination: self.destination.clone(), doing, after: STEP_MAX }))
    }

    async fn stream(&self, lane: bool) -> Result<TcpStream, ConnectError> {
        let destination = || self.destination.clone();
        let known = *self.answered.lock().unwrap_or_else(PoisonError::into_inner);
        let ways = match known {
            Some(way) => vec![way],
            None => ways(&self.destination, &self.here).await.map_err(|none| none.error(destination()))?,
        };
        let mut last = io::Error::from(io::ErrorKind::AddrNotAvailable);
        let mut not_allowed = None;
        for way in ways {
            match self.stream_to(way, lane).await {
                Ok(stream) => {
                    *self.answered.lock().unwrap_or_else(PoisonError::into_inner) = Some(way);
                    return Ok(stream);
                }
                // The port accepted and closed before we even saw it open.
                Err(error) if error.kind() == io::ErrorKind::ConnectionReset => not_allowed = Some(our_address(way.to)),
                Err(error) => last = error,
            }
        }
        if let Some(address) = not_allowed {
            return Err(ConnectError::NotAllowed { destination: destination(), address });
        }
        Err(ConnectError::Unreachable { destination: destination(), error: last })
    }

    async fn stream_to(&self, Way { to: address, from }: Way, lane: bool) -> io::Result<TcpStream> {
        let socket = if address.is_ipv4() { tokio::net::TcpSocket::new_v4()? } else { tokio::net::TcpSocket::new_v6()? };
        set_up(&SockRef::from(&socket), self.silence_max)?;
        if lane {
            set_up_lane(&socket);
            if let Some(name) = &self.congestion {
                SockRef::from(&socket).set_tcp_congestion(name.as_bytes())?;
            }
        }
        if let Some(from) = from {
            // Whatever becomes of the routes, this is the address that is on the list.
            socket.bind(SocketAddr::new(from, 0))?;
        }
        match tokio::time::timeout(STEP_MAX, socket.connect(address)).await {
            Ok(stream) => stream,
            Err(_) => Err(io::ErrorKind::TimedOut.into()),
        }
    }

    async fn handshake(&self, stream: &mut TcpStream) -> Result<tls::Secured, ConnectError> {
        let address = stream.local_addr().map(|address| address.ip().to_string()).unwrap_or_default();
        let destination = || self.destination.clone();
        let work = async {
            tls::connect(stream, &self.key, &self.trusted, self.expected).await.map_err(|error| match error {
                TlsError::Silent => ConnectError::NotAllowed { destination: destination(), address },
                TlsError::Alert(ALERT_ACCESS_DENIED) => {
                    ConnectError::KeyRefused { destination: destination(), id: self.key.id() }
                }
                TlsError::Alert(crate::accept::ALERT_CROWDED) => ConnectError::Crowded { destination: destination() },
                error => ConnectError::Tls { destination: destination(), error },
            })
        };
        self.within("the TLS handshake", work).await
    }

    /// A connection and its handshake. Where others of our address crowd us out, again for as long as one step may take: the port has
    /// so many places a second, and none of them is kept from us.
    pub(crate) async fn secured(&self, lane: bool) -> Result<(TcpStream, tls::Secured), ConnectError> {
        let begun = Instant::now();
        loop {
            let mut stream = self.stream(lane).await?;
            match self.handshake(&mut stream).await {
                Err(ConnectError::Crowded { .. }) if begun.elapsed() < STEP_MAX => tokio::time::sleep(CROWDED_WAIT).await,
                met => return met.map(|secured| (stream, secured)),
            }
        }
    }

    async fn open_control(&self) -> Result<Control, ConnectError> {
        let (stream, secured) = self.secured(false).await?;
        let early = Early { opened: Vec::new(), sealed: secured.early };
        let (read, write) = stream.into_split();
        Ok(Control::new(secured.peer, read, write, Some((secured.sealer, secured.opener)), early))
    }

    async fn open_lane(&self, preamble: LanePreamble, plaintext: bool) -> Result<Box<dyn LaneSender>, ConnectError> {
        let (mut stream, secured) = if plaintext {
            (self.stream(true).await?, None)
        } else {
            let (stream, secured) = self.secured(true).await?;
            (stream, Some(secured))
        };
        let doing = "opening a lane";
        let (sealer, answer) = self.within(doing, self.ask_in(&mut stream, preamble, secured)).await?;
        if let Some(code) = parse_lane_answer(&answer) {
            return Err(ConnectError::LaneRefused { destination: self.destination.clone(), lane: preamble.lane, code });
        }
        let stream = stream.into_std().map_err(self.io(doing))?;
        stream.set_nonblocking(false).map_err(self.io(doing))?;
        let socket = Socket::from(stream);
        Ok(match sealer {
            Some(sealer) => Box::new(SecureSender::new(socket, sealer)),
            None => Box::new(PlainSender::new(socket)),
        })
    }

    /// Shows the preamble and reads the answer.
    async fn ask_in(
        &self,
        stream: &mut TcpStream,
        preamble: LanePreamble,
        secured: Option<tls::Secured>,
    ) -> Result<(Option<crate::secure::Sealer>, [u8; LANE_ANSWER_BYTES]), ConnectError> {
        let doing = "opening a lane";
        let bytes = preamble.emit();
        let mut answer = [0; LANE_ANSWER_BYTES];
        let Some(tls::Secured { mut sealer, opener, early, .. }) = secured else {
            stream.write_all(&bytes).await.map_err(self.io(doing))?;
            stream.read_exact(&mut answer).await.map_err(self.io(doing))?;
            return Ok((None, answer));
        };
        let mut sealed = Vec::new();
        sealer
            .seal(&mut sealed, bytes.len(), |plain| plain.copy_from_slice(&bytes))
            .map_err(|error| self.io(doing)(error.into()))?;
        stream.write_all(&sealed).await.map_err(self.io(doing))?;
        let mut plain = Plain { read: stream, opener: Some(opener), sealed: early, opened: Vec::new() };
        plain.fill(LANE_ANSWER_BYTES).await.map_err(|error| match error {
            ControlError::KeyRefused => ConnectError::KeyRefused { destination: self.destination.clone(), id: self.key.id() },
            other => self.io(doing)(io::Error::other(other)),
        })?;
        for (to, from) in answer.iter_mut().zip(&plain.opened) {
            *to = *from;
        }
        Ok((Some(sealer), answer))
    }
}

/// The address that we have when we speak to `to`, in words.
pub(crate) fn our_address(to: SocketAddr) -> String {
    source_of(to).map_or_else(|| "this host".to_owned(), |address| address.to_string())
}

impl Link for TcpLink {
    fn capabilities(&self) -> Capabilities {
        Capabilities { name: "tcp", secure_lanes: true, plaintext_lanes: true, page_check: false, lanes_max: LANES_MAX }
    }

    fn destination(&self) -> String {
        self.destination.clone()
    }

    fn control(&self) -> Answer<'_, Result<Control, ConnectError>> {
        Box::pin(self.open_control())
    }

    fn lane(
        &self,
        preamble: LanePreamble,
        plaintext: bool,
        _memory: &LaneMemory,
    ) -> Answer<'_, Result<Box<dyn LaneSender>, ConnectError>> {
        Box::pin(self.open_lane(preamble, plaintext))
    }
}
