//! The TCP port: who is let in, in this order: address, key, first words. Every step is bounded in time and bytes.
//! What is let in goes to the table of sessions.

use crate::Control;
use crate::commands::{self, Caller};
use crate::control::{Early, Plain};
use crate::driver::Cancel;
use crate::host::Peer;
use crate::key::HostKey;
use crate::lanes::LaneReceiver as _;
use crate::refusals::{self, Port, Why};
use crate::room::{Sparing, SparingByAddress, Trials, Waiting};
use crate::sessions::{Sessions, emit_lane_answer};
use crate::tcp::{PlainReceiver, SecureReceiver, set_up, set_up_lane};
use crate::tls::{self, Secured, TlsError, TrustedHosts};
use crate::ways::Here;
use limosa_proto::allow::AllowList;
use limosa_proto::wire::code::Code;
use limosa_proto::wire::frame::{LANE_MAGIC, LANE_PREAMBLE_BYTES, LanePreamble};
use nix::libc::{MSG_MORE, MSG_TRUNC};
use socket2::{Domain, Protocol, SockRef, Socket, Type};
use std::io;
use std::mem::MaybeUninit;
use std::net::SocketAddr;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, PoisonError, RwLock};
use std::time::Duration;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::oneshot;

/// The TLS alert (`internal_error`) that a connection gets which has to make room for a newer one.
pub(crate) const ALERT_CROWDED: u8 = 80;
/// The same as it is said in clear: a fatal alert.
const CROWDED: [u8; 7] = [21, 3, 3, 0, 2, 2, ALERT_CROWDED];
/// Why an address may begin no more handshakes for now.
pub(crate) const IN_VAIN: &str = "its address has begun too many handshakes that came to nothing";
/// How long connections may gather once all that waited were turned away.
const TURNED_AWAY_PAUSE: Duration = Duration::from_millis(5);
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
    /// Most connections whose peer is not known yet; the oldest of the address that has most makes room.
    pub unauthenticated_max: usize,
    /// Most of them from one address (of IPv6: from one /64); its own oldest makes room.
    pub unauthenticated_of_one_max: usize,
    /// Most handshakes that come to nothing which one address may begin at once. Those of a known peer do not count.
    pub trials_at_once: u32,
    /// How soon it may begin another one after that.
    pub trial_each: Duration,
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
            unauthenticated_max: 128,
            // Two migrations may open their 16 lanes at once.
            unauthenticated_of_one_max: 36,
            trials_at_once: 128,
            // A hundred a second are 1 % or 2 % of a core.
            trial_each: Duration::from_millis(10),
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
    /// Closed because of the key: it is not trusted, or there is none.
    pub not_trusted: AtomicU64,
    /// Closed because the handshake or the first words were none.
    pub broken: AtomicU64,
    /// Closed because a newer one needed the room.
    pub crowded_out: AtomicU64,
    /// Closed because time was up.
    pub too_slow: AtomicU64,
    /// Peers that have not said who they are, now.
    pub waiting: AtomicU64,
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
    /// Keys of operators, in the form of host keys.
    operators: TrustedHosts,
    counters: Arc<ListenerCounters>,
    trials: Trials,
    log: SparingByAddress,
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
        let (operators, counters, log) = (TrustedHosts::default(), Arc::default(), SparingByAddress::default());
        let trials = Trials::new(settings.trials_at_once, settings.trial_each);
        let gate = Arc::new(Gate { settings, key, trusted, operators, counters, trials, log });
        Ok(Listener { listener, gate, allow })
    }

    /// The same, with operators who may command this host: their keys, which are of the same kind as hosts'. A key that is in
    /// both sets is a host's. Looked at anew for each connection. To be called before it serves.
    #[must_use]
    pub fn with_operators(mut self, operators: TrustedHosts) -> Listener {
        if let Some(gate) = Arc::get_mut(&mut self.gate) {
            gate.operators = operators;
        }
        self
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

    /// The next connection. Where the last one was `turned_away`, those that wait already are taken at once, and else there is a
    /// pause in which more come: a flood does not wake this host for each of its connections.
    async fn next(&self, turned_away: bool) -> io::Result<(TcpStream, SocketAddr)> {
        if turned_away {
            tokio::select! {
                biased;
                accepted = self.listener.accept() => return accepted,
                () = std::future::ready(()) => {}
            }
            tokio::time::sleep(TURNED_AWAY_PAUSE).await;
        }
        self.listener.accept().await
    }

    /// Lets in what may come in, until `stop` is cancelled; then the port is closed and open migrations go on.
    pub async fn serve(self, sessions: Sessions, stop: Cancel) {
        let set = &self.gate.settings;
        let mut waiting = Waiting::new(set.unauthenticated_max, set.unauthenticated_of_one_max);
        let (mut log, mut turned_away) = (Sparing::default(), false);
        loop {
            let (stream, from) = tokio::select! {
                biased;
                _ = stop.cancelled() => return,
                accepted = self.next(std::mem::take(&mut turned_away)) => match accepted {
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
                let gate = &self.gate;
                gate.log.say(from.ip(), |unsaid| tracing::warn!(%from, unsaid, "a connection was closed unread: {words}"));
                // With a reset, so that the other side can tell this from a port that is closed later.
                let _ = SockRef::from(&stream).set_linger(Some(Duration::ZERO));
                continue;
            }
            if !self.gate.trials.begin(from.ip()) {
                self.gate.crowded(&stream, from);
                turned_away = true;
                continue;
            }
            if waiting.make_room(from.ip()) {
                self.gate.count_crowded();
            }
            let (stay, leave) = oneshot::channel();
            let (gate, sessions) = (self.gate.clone(), sessions.clone());
            let task = tokio::spawn(async move {
                gate.counters.waiting.fetch_add(1, Ordering::Relaxed);
                gate.meet(stream, from, sessions, leave).await;
                gate.counters.waiting.fetch_sub(1, Ordering::Relaxed);
            });
            waiting.add(from.ip(), task, stay);
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
    /// One had to make room, or got none.
    fn count_crowded(&self) {
        refusals::count(Port::Tcp, Why::Crowded);
        self.counters.crowded_out.fetch_add(1, Ordering::Relaxed);
    }

    /// Turns one away whose address has begun too many handshakes in vain: nothing of it is read, and no task is made.
    fn crowded(&self, stream: &TcpStream, from: SocketAddr) {
        self.count_crowded();
        self.log.say(from.ip(), |unsaid| tracing::warn!(%from, unsaid, "a connection was turned away: {IN_VAIN}"));
        // Not by the runtime, which has not seen yet that it can be written to. What it has said is thrown away, since closing with that
        // unread would reset the connection under the alert; the alert leaves with the close in one packet.
        let socket = SockRef::from(stream);
        let _ = socket.recv_with_flags(&mut [MaybeUninit::uninit(); 4096], MSG_TRUNC);
        let _ = socket.send_with_flags(&CROWDED, MSG_MORE);
    }

    /// Meets one connection: until it is known, until its time is up, or until a newer one needs its room.
    async fn meet(&self, mut stream: TcpStream, from: SocketAddr, sessions: Sessions, leave: oneshot::Receiver<()>) {
        let known = tokio::select! {
            biased;
            known = tokio::time::timeout(self.settings.handshake_max, self.know(&mut stream)) => known,
            _ = leave => {
                let _ = stream.try_write(&CROWDED);
                return;
            }
        };
        match known {
            Ok(Ok(known)) => {
                // Anybody can say what a plaintext lane begins with.
                if matches!(known, Known::Secure(_)) {
                    self.trials.give_back(from.ip());
                }
                // Now that it goes on: what is over within seconds needs none of it.
                let set_up = set_up(&SockRef::from(&stream), self.settings.peer_silence_max);
                if let Err(error) = set_up.and_then(|()| hand_over(known, stream, from, &sessions)) {
                    tracing::info!(%from, %error, "a connection ended while it was let in");
                }
            }
            Ok(Err(error)) => {
                refusals::count(Port::Tcp, error.why());
                let counters = &self.counters;
                let counter = if error.is_of_the_key() { &counters.not_trusted } else { &counters.broken };
                counter.fetch_add(1, Ordering::Relaxed);
                self.log.say(from.ip(), |unsaid| tracing::warn!(%from, %error, unsaid, "a connection was refused"));
                let _ = tokio::time::timeout(FAREWELL, farewell(stream)).await;
            }
            Err(_) => {
                refusals::count(Port::Tcp, Why::Slow);
                self.counters.too_slow.fetch_add(1, Ordering::Relaxed);
                self.log.say(from.ip(), |unsaid| tracing::info!(%from, unsaid, "a connection did not say who it is in time"));
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
        let Secured { peer, sealer, opener, early } = tls::accept(stream, &self.key, &[&self.trusted, &self.operators]).await?;
        let operator = !self.trusted.contains(peer);
        let mut plain = Plain { read: stream, opener: Some(opener), sealed: early, opened: Vec::new() };
        plain.fill(LANE_MAGIC.to_le_bytes().len()).await.map_err(first_words)?;
        let mut said = said(&plain.opened);
        if plain.opened.starts_with(&LANE_MAGIC.to_le_bytes()) {
            plain.fill(LANE_PREAMBLE_BYTES).await.map_err(first_words)?;
            said = Said::Lane(parse_preamble(&plain.opened)?);
            plain.opened.drain(..LANE_PREAMBLE_BYTES);
        }
        let Plain { opener, sealed, opened, .. } = plain;
        let opener = opener.ok_or(TlsError::Closed)?;
        let secured = Secured { peer, sealer, opener, early: sealed };
        Ok(Known::Secure(Box::new(Secure { secured, opened, said, operator })))
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
    Secure(Box<Secure>),
}

/// A sealed connection, with what was read of it.
struct Secure {
    secured: Secured,
    opened: Vec<u8>,
    said: Said,
    /// Whether the key is an operator's; else it is a host's.
    operator: bool,
}

/// What a sealed connection began with.
enum Said {
    Lane(LanePreamble),
    Control,
    Command,
}

/// A control channel, unless it begins like JSON: the API's, which a message's magic cannot be taken for.
fn said(opened: &[u8]) -> Said {
    if matches!(opened.first(), Some(b'{' | b'"')) { Said::Command } else { Said::Control }
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
            let Secure { secured: Secured { peer, sealer, opener, early }, opened, said, operator } = *secure;
            match said {
                Said::Lane(_) if operator => {
                    let mut lane = SecureReceiver::new(blocking(stream)?, sealer, opener, &opened, &early);
                    lane.acknowledge(&emit_lane_answer(Some(Code::NotAHost)))
                }
                Said::Lane(preamble) => {
                    let lane = SecureReceiver::new(blocking(stream)?, sealer, opener, &opened, &early);
                    sessions.lane("tcp", &preamble, Some(peer), Box::new(lane))
                }
                Said::Control => {
                    let local = stream.local_addr().ok();
                    let (read, write) = stream.into_split();
                    let control = Control::new(peer, read, write, Some((sealer, opener)), Early { opened, sealed: early });
                    if operator {
                        tokio::spawn(commands::no_guest(control));
                    } else {
                        sessions.control(Peer { id: peer, address: Some(from), local }, control);
                    }
                    Ok(())
                }
                Said::Command => {
                    let channel = commands::channel(stream, (sealer, opener), Early { opened, sealed: early });
                    sessions.commands(Caller { id: peer, operator, address: from }, channel);
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
