//! The TCP port: who is let in, in this order: address, key, first words. Every step is bounded in time and bytes.
//! What is let in goes to the table of sessions.

use crate::Control;
use crate::control::{Early, Plain};
use crate::driver::Cancel;
use crate::host::Peer;
use crate::key::HostKey;
use crate::refusals::{self, Port, Why};
use crate::sessions::Sessions;
use crate::tcp::{PlainReceiver, SecureReceiver, set_up, set_up_lane};
use crate::tls::{self, Secured, TlsError, TrustedHosts};
use crate::ways::Here;
use limosa_proto::allow::AllowList;
use limosa_proto::wire::frame::{LANE_MAGIC, LANE_PREAMBLE_BYTES, LanePreamble};
use socket2::{Domain, Protocol, SockRef, Socket, Type};
use std::collections::VecDeque;
use std::io;
use std::net::SocketAddr;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, PoisonError, RwLock};
use std::time::{Duration, Instant};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::oneshot;

/// The TLS alert (`internal_error`) that a connection gets which has to make room for a newer one.
pub(crate) const ALERT_CROWDED: u8 = 80;
/// First byte of a TLS handshake record.
const TLS_HANDSHAKE: u8 = 22;
/// Connections that the kernel may hold for us.
const BACKLOG: i32 = 256;
/// Time a refused peer has to read why.
const FAREWELL: Duration = Duration::from_secs(1);

/// Settings of the port.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ListenerSettings {
    /// Whether lanes without TLS are let in at all.
    pub plaintext_lanes: bool,
    /// Most connections whose peer is not known yet; the oldest makes room.
    pub unauthenticated_max: usize,
    /// How long a peer has from its connection to its first words.
    pub handshake_max: Duration,
    /// A peer that acknowledges nothing for this long is lost.
    pub peer_silence_max: Duration,
    /// The addresses of this host that take migrations.
    pub here: Here,
}

impl Default for ListenerSettings {
    fn default() -> ListenerSettings {
        ListenerSettings {
            plaintext_lanes: false,
            unauthenticated_max: 64,
            handshake_max: Duration::from_secs(5),
            peer_silence_max: limosa_proto::event::PEER_SILENCE_MAX,
            here: Here::default(),
        }
    }
}

/// What came to the port so far.
#[derive(Debug, Default)]
pub struct ListenerCounters {
    /// Closed unread because the address is not on the allow-list.
    pub not_allowed: AtomicU64,
    /// Closed because of the key or a broken handshake.
    pub not_trusted: AtomicU64,
    /// Closed because a newer one needed the room, or because time was up.
    pub crowded_out: AtomicU64,
}

/// The open port.
#[derive(Debug)]
pub struct Listener {
    listener: TcpListener,
    gate: Arc<Gate>,
    allow: Arc<RwLock<AllowList>>,
}

#[derive(Debug)]
struct Gate {
    settings: ListenerSettings,
    key: HostKey,
    trusted: TrustedHosts,
    counters: Arc<ListenerCounters>,
}

/// Says something at most once a second, and how often it was not said.
#[derive(Default)]
pub(crate) struct Sparing {
    last: Option<Instant>,
    unsaid: u64,
}

impl Sparing {
    pub(crate) fn say(&mut self, words: impl FnOnce(u64)) {
        if self.last.is_some_and(|last| last.elapsed() < Duration::from_secs(1)) {
            self.unsaid += 1;
            return;
        }
        words(self.unsaid);
        *self = Sparing { last: Some(Instant::now()), unsaid: 0 };
    }
}

impl Listener {
    /// Opens the port `address`. `allow` and `trusted` are looked at anew for each connection. Must be called within a
    /// tokio runtime.
    ///
    /// # Errors
    /// What the system says, mostly that the port is taken.
    pub fn bind(
        address: SocketAddr,
        settings: ListenerSettings,
        key: HostKey,
        trusted: TrustedHosts,
        allow: Arc<RwLock<AllowList>>,
    ) -> io::Result<Listener> {
        let socket = Socket::new(Domain::for_address(address), Type::STREAM, Some(Protocol::TCP))?;
        socket.set_reuse_address(true)?;
        socket.set_nonblocking(true)?;
        socket.bind(&address.into())?;
        socket.listen(BACKLOG)?;
        let listener = TcpListener::from_std(socket.into())?;
        let gate = Arc::new(Gate { settings, key, trusted, counters: Arc::default() });
        Ok(Listener { listener, gate, allow })
    }

    /// The address it has, with the port that the system chose where 0 was asked for.
    ///
    /// # Errors
    /// What the system says.
    pub fn local_address(&self) -> io::Result<SocketAddr> {
        self.listener.local_addr()
    }

    /// What came to the port so far.
    #[must_use]
    pub fn counters(&self) -> Arc<ListenerCounters> {
        self.gate.counters.clone()
    }

    /// Lets in what may come in, until `stop` is cancelled; then the port is closed and open migrations go on.
    pub async fn serve(self, sessions: Sessions, stop: Cancel) {
        let mut waiting: VecDeque<(tokio::task::JoinHandle<()>, oneshot::Sender<()>)> = VecDeque::new();
        let mut log = Sparing { last: None, unsaid: 0 };
        loop {
            let (stream, from) = tokio::select! {
                biased;
                _ = stop.cancelled() => return,
                accepted = self.listener.accept() => match accepted {
                    Ok(accepted) => accepted,
                    Err(error) => {
                        // No descriptors left, mostly; they come back.
                        log.say(|_| tracing::warn!(%error, "a connection could not be accepted"));
                        tokio::time::sleep(Duration::from_millis(50)).await;
                        continue;
                    }
                },
            };
            if let Err((why, words)) = self.allowed(from, stream.local_addr().ok()) {
                refusals::count(Port::Tcp, why);
                self.gate.counters.not_allowed.fetch_add(1, Ordering::Relaxed);
                log.say(|unsaid| tracing::warn!(%from, unsaid, "a connection was closed unread: {words}"));
                // With a reset, so that the other side can tell this from a port that is closed later.
                let _ = SockRef::from(&stream).set_linger(Some(Duration::ZERO));
                continue;
            }
            waiting.retain(|(task, _)| !task.is_finished());
            if waiting.len() >= self.gate.settings.unauthenticated_max
                && let Some((_, leave)) = waiting.pop_front()
            {
                drop(leave);
                refusals::count(Port::Tcp, Why::Crowded);
                self.gate.counters.crowded_out.fetch_add(1, Ordering::Relaxed);
            }
            let (stay, leave) = oneshot::channel();
            let task = tokio::spawn(self.gate.clone().meet(stream, from, sessions.clone(), leave));
            waiting.push_back((task, stay));
        }
    }

    fn allowed(&self, from: SocketAddr, local: Option<SocketAddr>) -> Result<(), (Why, &'static str)> {
        if !self.allow.read().unwrap_or_else(PoisonError::into_inner).decide_socket(from).allowed {
            return Err((Why::PeerAddress, "its address is not on the allow-list"));
        }
        if !self.gate.settings.here.admits(local) {
            return Err((Why::OwnAddress, "it came to an address of this host that takes no migrations (allow.here)"));
        }
        Ok(())
    }
}

impl Gate {
    /// Meets one connection: until it is known, until its time is up, or until a newer one needs its room.
    async fn meet(self: Arc<Self>, mut stream: TcpStream, from: SocketAddr, sessions: Sessions, leave: oneshot::Receiver<()>) {
        if set_up(&SockRef::from(&stream), self.settings.peer_silence_max).is_err() {
            return;
        }
        let known = tokio::select! {
            biased;
            known = tokio::time::timeout(self.settings.handshake_max, self.know(&mut stream)) => known,
            _ = leave => {
                let _ = stream.try_write(&[21, 3, 3, 0, 2, 2, ALERT_CROWDED]);
                return;
            }
        };
        match known {
            Ok(Ok(known)) => {
                if let Err(error) = hand_over(known, stream, from, &sessions) {
                    tracing::info!(%from, %error, "a connection ended while it was let in");
                }
            }
            Ok(Err(error)) => {
                refusals::count(Port::Tcp, error.why());
                self.counters.not_trusted.fetch_add(1, Ordering::Relaxed);
                tracing::warn!(%from, %error, "a connection was refused");
                let _ = tokio::time::timeout(FAREWELL, farewell(stream)).await;
            }
            Err(_) => {
                refusals::count(Port::Tcp, Why::Crowded);
                self.counters.crowded_out.fetch_add(1, Ordering::Relaxed);
                tracing::info!(%from, "a connection did not say who it is in time");
            }
        }
    }

    /// Reads until it is clear who it is and what for.
    async fn know(&self, stream: &mut TcpStream) -> Result<Known, TlsError> {
        let mut first = [0];
        if stream.peek(&mut first).await? == 0 {
            return Err(TlsError::Silent);
        }
        if first != [TLS_HANDSHAKE] {
            return self.plaintext(stream).await;
        }
        let Secured { peer, sealer, opener, early } = tls::accept(stream, &self.key, &self.trusted).await?;
        let mut plain = Plain { read: stream, opener: Some(opener), sealed: early, opened: Vec::new() };
        plain.fill(LANE_MAGIC.to_le_bytes().len()).await.map_err(first_words)?;
        let lane = plain.opened.starts_with(&LANE_MAGIC.to_le_bytes());
        let mut preamble = None;
        if lane {
            plain.fill(LANE_PREAMBLE_BYTES).await.map_err(first_words)?;
            preamble = Some(parse_preamble(&plain.opened)?);
            plain.opened.drain(..LANE_PREAMBLE_BYTES);
        }
        let Plain { opener, sealed, opened, .. } = plain;
        let opener = opener.ok_or(TlsError::Closed)?;
        Ok(Known::Secure(Box::new((Secured { peer, sealer, opener, early: sealed }, opened, preamble))))
    }

    async fn plaintext(&self, stream: &mut TcpStream) -> Result<Known, TlsError> {
        if !self.settings.plaintext_lanes {
            return Err(TlsError::Io(io::Error::new(
                io::ErrorKind::InvalidData,
                "it does not begin with TLS, and plaintext lanes are off here",
            )));
        }
        let mut bytes = [0; LANE_PREAMBLE_BYTES];
        stream.read_exact(&mut bytes).await?;
        Ok(Known::Plaintext(parse_preamble(&bytes)?))
    }
}

/// What a connection turned out to be: a plaintext lane, or a sealed one with what was read of it.
enum Known {
    Plaintext(LanePreamble),
    Secure(Box<(Secured, Vec<u8>, Option<LanePreamble>)>),
}

fn first_words(error: crate::control::ControlError) -> TlsError {
    TlsError::Io(io::Error::other(error))
}

fn parse_preamble(bytes: &[u8]) -> Result<LanePreamble, TlsError> {
    let wrong = |words: String| TlsError::Io(io::Error::new(io::ErrorKind::InvalidData, words));
    let bytes = bytes.first_chunk::<LANE_PREAMBLE_BYTES>().ok_or_else(|| wrong("a short lane preamble".into()))?;
    LanePreamble::parse(bytes).map_err(|error| wrong(error.to_string()))
}

fn hand_over(known: Known, stream: TcpStream, from: SocketAddr, sessions: &Sessions) -> io::Result<()> {
    let blocking = |stream: TcpStream| -> io::Result<Socket> {
        set_up_lane(&stream);
        let stream = stream.into_std()?;
        stream.set_nonblocking(false)?;
        Ok(Socket::from(stream))
    };
    match known {
        Known::Plaintext(preamble) => sessions.lane("tcp", &preamble, None, Box::new(PlainReceiver::new(blocking(stream)?))),
        Known::Secure(secure) => {
            let (Secured { peer, sealer, opener, early }, opened, preamble) = *secure;
            match preamble {
                Some(preamble) => {
                    let lane = SecureReceiver::new(blocking(stream)?, sealer, opener, &opened, &early);
                    sessions.lane("tcp", &preamble, Some(peer), Box::new(lane))
                }
                None => {
                    let local = stream.local_addr().ok();
                    let (read, write) = stream.into_split();
                    let control = Control::new(peer, read, write, Some((sealer, opener)), Early { opened, sealed: early });
                    sessions.control(Peer { id: peer, address: Some(from), local }, control);
                    Ok(())
                }
            }
        }
    }
}

/// Lets a refused peer read the alert: closing with its words unread would reset the connection under it.
async fn farewell(mut stream: TcpStream) {
    let _ = stream.shutdown().await;
    let (mut sink, mut left) = ([0; 1024], tls::UNAUTHENTICATED_BYTES_MAX);
    while let Ok(read @ 1..) = stream.read(&mut sink).await {
        left = left.saturating_sub(read);
        if left == 0 {
            return;
        }
    }
}
