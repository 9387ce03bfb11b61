//! The UDP port: who is let in, in this order: an address that is real (Retry), the allow-list, the key, first words. Every step is
//! bounded in time and bytes. What is let in goes to the table of sessions.

use super::lane::{ControlWrite, QuicReceiver, Uses, read_error};
use super::settings::{self, QuicSettings};
use super::socket::{self, Gate, Socket};
use super::{LEFT, PROTOCOL, QuicCounters};
use crate::accept::{IN_VAIN, ListenerSettings};
use crate::control::{Control, Early};
use crate::driver::Cancel;
use crate::host::Peer;
use crate::key::{HostKey, SPKI_PREFIX};
use crate::refusals::{self, Port, Why};
use crate::room::{Shares, Sparing, SparingByAddress, Trials, Waiting};
use crate::sessions::{FIRST_WORDS_MAX, Sessions};
use crate::tls::{self, TlsError, TrustedHosts, Verifier};
use limosa_proto::allow::AllowList;
use limosa_proto::identity::HostId;
use limosa_proto::wire::frame::{LANE_MAGIC, LANE_PREAMBLE_BYTES, LanePreamble};
use limosa_proto::wire::limits::LANES_MAX;
use quinn::crypto::rustls::QuicServerConfig;
use quinn::{Connecting, Connection, Endpoint, Incoming, RecvStream, SendStream, ServerConfig, TokioRuntime};
use quinn::{ReadExactError, ValidationTokenConfig, VarInt};
use rustls::pki_types::CertificateDer;
use std::io;
use std::net::SocketAddr;
use std::sync::atomic::Ordering;
use std::sync::{Arc, RwLock};
use std::time::{Duration, Instant};
use tokio::sync::oneshot;

/// Streams that a peer may have open on one connection: lanes, control, and one to spare.
const STREAMS_MAX: u32 = LANES_MAX as u32 + 2;
/// Connections that may be open at once, all peers together.
const CONNECTIONS_MAX: usize = 256;
/// Connections that one known host may have: another's are not crowded out by them.
const CONNECTIONS_OF_ONE_MAX: usize = CONNECTIONS_MAX / 4;
/// First packets that wait to be looked at.
const INCOMING_MAX: usize = 64;
/// Bytes held for all peers together whose first packet waits.
const INCOMING_BYTES_MAX: u64 = 64 << 10;
/// How often a connection is looked at: whether its peer has moved, whether anything goes on.
const LOOK: Duration = Duration::from_millis(100);

/// The open UDP port.
#[derive(Debug)]
pub struct QuicListener {
    endpoint: Endpoint,
    door: Arc<Door>,
}

/// What every new connection meets.
#[derive(Debug)]
struct Door {
    settings: ListenerSettings,
    quic: QuicSettings,
    base: ServerConfig,
    key: HostKey,
    trusted: TrustedHosts,
    gate: Gate,
    shares: Shares,
    trials: Trials,
    log: SparingByAddress,
}

impl QuicListener {
    /// Opens the UDP port `address`. `allow` and `trusted` are looked at anew for each connection, `allow` also for each packet.
    /// Must be called within a tokio runtime. Of `settings`, `plaintext_lanes` means nothing here.
    ///
    /// # Errors
    /// What the system says, mostly that the port is taken; that the host key cannot be used.
    pub fn bind(
        address: SocketAddr,
        settings: ListenerSettings,
        quic: QuicSettings,
        key: HostKey,
        trusted: TrustedHosts,
        allow: Arc<RwLock<AllowList>>,
    ) -> io::Result<QuicListener> {
        let counters = Arc::<QuicCounters>::default();
        let (here, port) = (settings.here.clone(), address);
        let gate = || Gate { allow: allow.clone(), here: here.clone(), port, counters: counters.clone() };
        let (crypto, _) = crypto(&key, &trusted).map_err(io::Error::other)?;
        let mut base = ServerConfig::with_crypto(crypto);
        // No tokens for later: an address shows anew each time that it is real.
        let mut tokens = ValidationTokenConfig::default();
        tokens.sent(0);
        base.transport_config(Arc::new(quic.of_destination(settings.peer_silence_max)))
            .migration(quic.address_change)
            .retry_token_lifetime(settings.handshake_max)
            .validation_token_config(tokens)
            .max_incoming(INCOMING_MAX)
            .incoming_buffer_size(INCOMING_BYTES_MAX / 4)
            .incoming_buffer_size_total(INCOMING_BYTES_MAX);
        let socket = Socket::new(socket::open(address, &quic)?, Some(gate()))?;
        let runtime = Arc::new(TokioRuntime);
        let endpoint = Endpoint::new_with_abstract_socket(settings::endpoint(), Some(base.clone()), socket, runtime)?;
        let trials = Trials::new(settings.trials_at_once, settings.trial_each);
        let door = Arc::new(Door {
            settings,
            quic,
            base,
            key,
            trusted,
            gate: gate(),
            shares: Shares::new(CONNECTIONS_OF_ONE_MAX),
            trials,
            log: SparingByAddress::default(),
        });
        Ok(QuicListener { endpoint, door })
    }

    /// The address it has, with the port that the system chose where 0 was asked for.
    ///
    /// # Errors
    /// What the system says.
    pub fn local_address(&self) -> io::Result<SocketAddr> {
        self.endpoint.local_addr()
    }

    /// What came to the port so far.
    #[must_use]
    pub fn counters(&self) -> Arc<QuicCounters> {
        self.door.gate.counters.clone()
    }

    /// Lets in what may come in, until `stop` is cancelled; then nothing new is answered and open migrations go on. The port
    /// is given back when the last of their connections has ended.
    pub async fn serve(self, sessions: Sessions, stop: Cancel) {
        let set = &self.door.settings;
        let mut waiting = Waiting::new(set.unauthenticated_max, set.unauthenticated_of_one_max);
        let mut log = Sparing::default();
        loop {
            let incoming = tokio::select! {
                biased;
                _ = stop.cancelled() => return self.endpoint.set_server_config(None),
                incoming = self.endpoint.accept() => match incoming {
                    Some(incoming) => incoming,
                    None => return,
                },
            };
            let Some(incoming) = self.door.real(incoming) else { continue };
            let from = incoming.remote_address().ip();
            if waiting.make_room(from) {
                refusals::count(Port::Quic, Why::Crowded);
                self.door.gate.counters.crowded_out.fetch_add(1, Ordering::Relaxed);
            }
            if self.endpoint.open_connections() >= CONNECTIONS_MAX {
                refusals::count(Port::Quic, Why::Crowded);
                self.door.gate.counters.crowded_out.fetch_add(1, Ordering::Relaxed);
                log.say(|unsaid| tracing::warn!(unsaid, "a connection was closed: there are {CONNECTIONS_MAX} already"));
                // Let in and dropped, it is told so; refused, it would think that its address is not allowed.
                drop(incoming.accept());
                continue;
            }
            let (stay, leave) = oneshot::channel();
            let (door, sessions) = (self.door.clone(), sessions.clone());
            let task = tokio::spawn(async move {
                let counters = door.gate.counters.clone();
                counters.waiting.fetch_add(1, Ordering::Relaxed);
                door.meet(incoming, sessions, leave).await;
                counters.waiting.fetch_sub(1, Ordering::Relaxed);
            });
            waiting.add(from, task, stay);
        }
    }
}

/// The TLS side of one handshake, and who will have seen the peer's key.
fn crypto(key: &HostKey, trusted: &TrustedHosts) -> Result<(Arc<QuicServerConfig>, Arc<Verifier>), TlsError> {
    let (mut config, verifier) = tls::config_for_source(key, trusted)?;
    config.alpn_protocols = vec![PROTOCOL.to_vec()];
    let config = QuicServerConfig::try_from(config).map_err(|error| rustls::Error::General(error.to_string()))?;
    Ok((Arc::new(config), verifier))
}

/// The key that the peer has proved to hold.
fn peer_of(connection: &Connection) -> Option<HostId> {
    let keys = connection.peer_identity()?.downcast::<Vec<CertificateDer<'static>>>().ok()?;
    let key = keys.first()?.strip_prefix(&SPKI_PREFIX)?;
    key.try_into().ok().map(HostId)
}

impl Door {
    /// Lets through what comes from an address that is real and allowed. Nothing is kept for what does not.
    fn real(&self, incoming: Incoming) -> Option<Incoming> {
        let (from, counters) = (incoming.remote_address(), &self.gate.counters);
        if !incoming.remote_address_validated() {
            counters.retried.fetch_add(1, Ordering::Relaxed);
            // It can always be retried where its address is not validated; if not, it is refused by being dropped.
            let _ = incoming.retry();
            return None;
        }
        if let Err(why) = self.gate.decide(from, incoming.local_ip()) {
            refusals::count(Port::Quic, why);
            counters.refused_not_allowed.fetch_add(1, Ordering::Relaxed);
            let words = words_of(why);
            self.log.say(from.ip(), |unsaid| tracing::warn!(%from, unsaid, "a connection was refused: {words}"));
            incoming.refuse();
            return None;
        }
        if !self.trials.begin(from.ip()) {
            refusals::count(Port::Quic, Why::Crowded);
            counters.crowded_out.fetch_add(1, Ordering::Relaxed);
            self.log.say(from.ip(), |unsaid| tracing::warn!(%from, unsaid, "a connection was not answered: {IN_VAIN}"));
            // Unanswered: one that means well says it again within a second.
            incoming.ignore();
            return None;
        }
        Some(incoming)
    }

    /// Meets one connection: until its key is known, until its time is up, or until a newer one needs its room.
    async fn meet(self: Arc<Self>, incoming: Incoming, sessions: Sessions, leave: oneshot::Receiver<()>) {
        let (from, counters) = (incoming.remote_address(), &self.gate.counters);
        counters.handshakes_begun.fetch_add(1, Ordering::Relaxed);
        let (connecting, verifier) = match self.begin(incoming) {
            Ok(begun) => begun,
            Err(error) => {
                refusals::count(Port::Quic, Why::Handshake);
                counters.broken.fetch_add(1, Ordering::Relaxed);
                return tracing::warn!(%from, %error, "a connection was refused");
            }
        };
        let known = tokio::select! {
            biased;
            known = tokio::time::timeout(self.settings.handshake_max, connecting) => known,
            _ = leave => return,
        };
        let connection = match known {
            Ok(Ok(connection)) => connection,
            Ok(Err(error)) => {
                let untrusted = verifier.seen().filter(|found| !self.trusted.contains(*found));
                let untrusted = untrusted.map(|found| TlsError::of(&self.trusted, found, TlsError::SourceUntrusted));
                refusals::count(Port::Quic, untrusted.as_ref().map_or(Why::Handshake, TlsError::why));
                let counter = if untrusted.is_some() { &counters.not_trusted } else { &counters.broken };
                counter.fetch_add(1, Ordering::Relaxed);
                let error = untrusted.map_or_else(|| error.to_string(), |error| error.to_string());
                return self.log.say(from.ip(), |unsaid| tracing::warn!(%from, %error, unsaid, "a connection was refused"));
            }
            Err(_) => {
                refusals::count(Port::Quic, Why::Slow);
                counters.too_slow.fetch_add(1, Ordering::Relaxed);
                let words = "a connection did not say who it is in time";
                return self.log.say(from.ip(), |unsaid| tracing::info!(%from, unsaid, words));
            }
        };
        let Some(peer) = peer_of(&connection) else {
            refusals::count(Port::Quic, Why::Key);
            counters.not_trusted.fetch_add(1, Ordering::Relaxed);
            return tracing::warn!(%from, "a connection was refused: its peer showed no host key");
        };
        let Some(share) = self.shares.take(peer) else {
            refusals::count(Port::Quic, Why::Crowded);
            counters.crowded_out.fetch_add(1, Ordering::Relaxed);
            self.log.say(
                from.ip(),
                |unsaid| tracing::warn!(%from, %peer, unsaid, "a connection was closed: this host has many already"),
            );
            return connection.close(LEFT, b"there are too many connections of this host");
        };
        self.trials.give_back(from.ip());
        // From here on it may hold what lanes need.
        connection.set_receive_window(self.quic.receive_window(STREAMS_MAX));
        connection.set_max_concurrent_bi_streams(VarInt::from_u32(STREAMS_MAX));
        tokio::spawn(async move {
            self.keep(connection, peer, sessions).await;
            drop(share);
        });
    }

    fn begin(&self, incoming: Incoming) -> Result<(Connecting, Arc<Verifier>), String> {
        let (crypto, verifier) = crypto(&self.key, &self.trusted).map_err(|error| error.to_string())?;
        let mut config = self.base.clone();
        config.crypto = crypto;
        let connecting = incoming.accept_with(Arc::new(config)).map_err(|error| error.to_string())?;
        Ok((connecting, verifier))
    }

    /// Takes the streams of a known peer's connection until that ends, and watches its address.
    async fn keep(&self, connection: Connection, peer: HostId, sessions: Sessions) {
        let mut address = connection.remote_address();
        let uses = Uses::default();
        let mut used = Instant::now();
        let mut look = tokio::time::interval(LOOK);
        loop {
            tokio::select! {
                opened = connection.accept_bi() => match opened {
                    // What is open goes on to its end, by the rules of the migration that it belongs to.
                    Ok(_) if !self.admits(&connection, peer) => {
                        refusals::count(Port::Quic, Why::Withdrawn);
                        tracing::warn!(peer = %peer, from = %address, "a stream was refused: its host is not allowed or trusted any more");
                    }
                    Ok(stream) => {
                        used = Instant::now();
                        let local = self.gate.local(connection.local_ip());
                        let peer = Peer { id: peer, address: Some(address), local };
                        tokio::spawn(let_in(stream, peer, sessions.clone(), uses.clone()));
                    }
                    Err(error) => return tracing::debug!(peer = %peer, %error, "a connection ended"),
                },
                _ = look.tick() => {
                    if !self.same_address(&connection, peer, &mut address) {
                        return connection.close(LEFT, b"this address is not allowed");
                    }
                    if uses.count() > 0 {
                        used = Instant::now();
                    } else if !self.admits(&connection, peer) {
                        return connection.close(LEFT, b"this host is not allowed or trusted any more");
                    } else if used.elapsed() > self.settings.peer_silence_max {
                        return connection.close(LEFT, b"nothing goes on here");
                    }
                }
            }
        }
    }

    /// Whether a connection may still ask for something new.
    fn admits(&self, connection: &Connection, peer: HostId) -> bool {
        self.trusted.contains(peer) && self.gate.decide(connection.remote_address(), connection.local_ip()).is_ok()
    }

    /// Follows the peer's address; false if it is one that is not allowed. The socket has dropped what came from such a one, so
    /// this is the second door behind the first.
    fn same_address(&self, connection: &Connection, peer: HostId, address: &mut SocketAddr) -> bool {
        let now = connection.remote_address();
        if now == *address {
            return true;
        }
        let allowed = self.gate.decide(now, connection.local_ip()).is_ok();
        self.gate.counters.address_changes.fetch_add(1, Ordering::Relaxed);
        tracing::info!(peer = %peer, before = %address, %now, allowed, "the source goes on from another address");
        *address = now;
        allowed
    }
}

fn words_of(why: Why) -> &'static str {
    match why {
        Why::OwnAddress => "it came to an address of this host that takes no migrations (allow.here)",
        _ => "its address is not on the allow-list",
    }
}

/// Reads a stream's first words and hands it over.
async fn let_in(stream: (SendStream, RecvStream), peer: Peer, sessions: Sessions, uses: Uses) {
    let (send, mut receive) = stream;
    let in_use = uses.one_more();
    let words = match tokio::time::timeout(FIRST_WORDS_MAX, first_words(&mut receive)).await {
        Ok(Ok(words)) => words,
        Ok(Err(error)) => return tracing::info!(peer = %peer.id, %error, "a stream ended before its first words"),
        Err(_) => return tracing::info!(peer = %peer.id, "a stream said nothing"),
    };
    match words {
        FirstWords::Control(opened) => {
            let write = ControlWrite::new(send, Some(in_use));
            let control = Control::new(peer.id, receive, write, None, Early { opened: opened.to_vec(), sealed: Vec::new() });
            sessions.control(peer, control);
        }
        FirstWords::Lane(preamble) => {
            let lane = QuicReceiver::new(receive, send, in_use);
            if let Err(error) = sessions.lane("quic", &preamble, Some(peer.id), Box::new(lane)) {
                tracing::info!(peer = %peer.id, %error, "a lane ended while it was let in");
            }
        }
    }
}

/// What a stream turned out to be.
enum FirstWords {
    /// A control channel, and what was read of it.
    Control([u8; 4]),
    Lane(LanePreamble),
}

async fn first_words(receive: &mut RecvStream) -> io::Result<FirstWords> {
    let read = |error| match error {
        ReadExactError::FinishedEarly(_) => io::ErrorKind::UnexpectedEof.into(),
        ReadExactError::ReadError(error) => read_error(error),
    };
    let mut bytes = [0; LANE_PREAMBLE_BYTES];
    let (magic, rest) = bytes.split_at_mut(4);
    receive.read_exact(magic).await.map_err(read)?;
    if *magic != LANE_MAGIC.to_le_bytes() {
        let mut opened = [0; 4];
        opened.copy_from_slice(magic);
        return Ok(FirstWords::Control(opened));
    }
    receive.read_exact(rest).await.map_err(read)?;
    let preamble = LanePreamble::parse(&bytes).map_err(|error| io::Error::new(io::ErrorKind::InvalidData, error.to_string()))?;
    Ok(FirstWords::Lane(preamble))
}
