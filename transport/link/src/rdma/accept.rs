//! Where lanes come in by RDMA: who may, in this order: the address, the trusted fabric, the proof that the lane belongs to a
//! migration that is open. Before all three hold nothing is made for it: no queue pair, no memory region, no domain.
//!
//! The address is what the connect request says. On a fabric where addresses can be forged the proof still decides: it needs
//! the lane's token, which the destination told the source, whom it knows by its key, over the encrypted control channel.

use super::buffers::Buffers;
use super::fabric::{Migration, RdmaFabric};
use super::message::Seal;
use super::receiver::RdmaReceiver;
use super::request::{LaneRequest, derive, emit_refusal};
use super::{ANSWER_BYTES, ANSWERS, MESSAGE_BYTES, NAME, RdmaError, RdmaRegistered, RdmaSettings, STEP_MAX, VERSION};
use crate::direct::{Exposure, Fabric};
use crate::driver::Cancel;
use crate::refusals::{self, Port, Why};
use crate::room::Sparing;
use crate::sessions::Sessions;
use limosa_proto::allow::AllowList;
use limosa_proto::wire::code::Code;
use limosa_proto::wire::frame::{LanePreamble, LaneToken};
use limosa_verbs::{ConnectRequest, Handshake, Listener, Prepared, ProtectionDomain, Receive};
use std::net::SocketAddr;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, PoisonError, RwLock};
use std::time::Duration;
use tokio::sync::Semaphore;

/// Connect requests that the kernel may hold for us.
const BACKLOG: u32 = 64;
/// Lanes that may be on their way in at once.
const PENDING_MAX: usize = 64;

/// What came to the port so far.
#[derive(Debug, Default)]
pub struct RdmaCounters {
    /// Refused because the address is not on the allow-list, or not inside the trusted fabric.
    pub refused_not_allowed: AtomicU64,
    /// Refused because no migration that is open knows the lane, or because it is one too many.
    pub refused_unknown: AtomicU64,
    /// Lanes that got a queue pair.
    pub let_in: AtomicU64,
    /// What registering the memory of incoming guests took.
    pub registered: RdmaRegistered,
}

/// The open port.
#[derive(Debug)]
pub struct RdmaListener {
    listener: Listener,
    gate: Arc<Gate>,
}

#[derive(Debug)]
struct Gate {
    settings: RdmaSettings,
    allow: Arc<RwLock<AllowList>>,
    fabric: RdmaFabric,
    counters: Arc<RdmaCounters>,
}

impl RdmaListener {
    /// Opens the port `address` of the RDMA connection manager; an unspecified address is all devices'. `allow` is looked at
    /// anew for each lane. Must be called within a tokio runtime.
    ///
    /// # Errors
    /// See [`RdmaError`].
    pub fn bind(address: SocketAddr, settings: RdmaSettings, allow: Arc<RwLock<AllowList>>) -> Result<RdmaListener, RdmaError> {
        if settings.trusted_fabric.networks().is_empty() {
            return Err(RdmaError::NoTrustedFabric);
        }
        if !address.ip().is_unspecified() && !settings.trusts(address.ip()) {
            return Err(RdmaError::NotTrusted { address: address.ip(), networks: settings.trusted_words() });
        }
        let listener = Listener::bind(address, BACKLOG)?;
        let counters = Arc::<RdmaCounters>::default();
        let fabric = RdmaFabric::new(&settings, counters.clone());
        Ok(RdmaListener { listener, gate: Arc::new(Gate { settings, allow, fabric, counters }) })
    }

    /// Where it listens, with the port that the system chose where 0 was asked for.
    #[must_use]
    pub fn local_address(&self) -> SocketAddr {
        self.listener.address()
    }

    /// What opens guest memory to sources, for [`Sessions::with_fabric`].
    #[must_use]
    pub fn fabric(&self) -> Arc<dyn Fabric> {
        Arc::new(self.gate.fabric.clone())
    }

    /// What came to the port so far.
    #[must_use]
    pub fn counters(&self) -> Arc<RdmaCounters> {
        self.gate.counters.clone()
    }

    /// Lets lanes in that may come in, until `stop` is cancelled; then the port is closed and open lanes go on.
    pub async fn serve(mut self, sessions: Sessions, stop: Cancel) {
        let room = Arc::new(Semaphore::new(PENDING_MAX));
        let mut log = Sparing::default();
        loop {
            let request = tokio::select! {
                biased;
                _ = stop.cancelled() => return,
                request = self.listener.next() => request,
            };
            let request = match request {
                Ok(request) => request,
                Err(error) => {
                    log.say(|unsaid| tracing::warn!(%error, unsaid, "an RDMA connect request could not be taken"));
                    tokio::time::sleep(Duration::from_millis(50)).await;
                    continue;
                }
            };
            let asked = self.gate.admit(&request);
            match (asked, room.clone().try_acquire_owned()) {
                (Ok((asked, migration)), Ok(permit)) => {
                    let (gate, sessions) = (self.gate.clone(), sessions.clone());
                    tokio::spawn(async move {
                        gate.let_in(request, asked, migration, sessions).await;
                        drop(permit);
                    });
                }
                (Ok(_), Err(_)) => request.reject(&emit_refusal(Code::Busy, "too many lanes are on their way in")),
                (Err((code, words)), _) => {
                    let from = request.peer();
                    log.say(|unsaid| tracing::warn!(%from, %code, words, unsaid, "a lane was refused before anything was made for it"));
                    request.reject(&emit_refusal(code, &words));
                }
            }
        }
    }
}

impl Gate {
    /// Decides about a connect request by what it says alone.
    fn admit(&self, request: &ConnectRequest) -> Result<(LaneRequest, Arc<Migration>), (Code, String)> {
        let refused = |counter: &AtomicU64, why, code, words: String| {
            refusals::count(Port::Rdma, why);
            counter.fetch_add(1, Ordering::Relaxed);
            Err((code, words))
        };
        let peer = request.peer().ip();
        if !self.allow.read().unwrap_or_else(PoisonError::into_inner).decide_socket(request.peer()).allowed {
            let words = format!("{peer} is not on the allow-list");
            return refused(&self.counters.refused_not_allowed, Why::PeerAddress, Code::NotAllowed, words);
        }
        if !self.settings.here.admits(request.local()) {
            let to = request.local().map_or_else(|| "an unknown address".to_owned(), |local| local.ip().to_string());
            let words = format!("{to} of the destination takes no migrations (allow.here there)");
            return refused(&self.counters.refused_not_allowed, Why::OwnAddress, Code::NotAllowed, words);
        }
        let ends = [Some(peer), request.local().map(|local| local.ip())];
        if let Some(end) = ends.into_iter().flatten().find(|end| !self.settings.trusts(*end)) {
            let words = format!("{end} is not inside trusted_fabric ({})", self.settings.trusted_words());
            return refused(&self.counters.refused_not_allowed, Why::Fabric, Code::PlaintextRefused, words);
        }
        let unknown = &self.counters.refused_unknown;
        match LaneRequest::parse(request.private_data()) {
            None => refused(unknown, Why::Handshake, Code::Malformed, "that is no lane of Limosa".to_owned()),
            Some(asked) if asked.version != VERSION => refused(
                unknown,
                Why::Handshake,
                Code::Version,
                format!("lanes of version {VERSION} are spoken here, not {}", asked.version),
            ),
            Some(asked) => match self.fabric.find(&asked) {
                Some(migration) => Ok((asked, migration)),
                None => refused(unknown, Why::Unknown, Code::Violation, "no such migration waits for lanes".to_owned()),
            },
        }
    }

    /// Makes the lane and hands it over.
    async fn let_in(self: Arc<Self>, request: ConnectRequest, asked: LaneRequest, migration: Arc<Migration>, sessions: Sessions) {
        let (from, lane) = (request.peer(), asked.lane);
        let exposure = migration.exposure();
        let Exposure { migration: id, generation, token, .. } = *exposure;
        let (of, gate) = (migration.clone(), self.clone());
        // Registers memory and makes a queue pair, which takes milliseconds.
        let made = tokio::task::spawn_blocking(move || gate.prepare(request, lane, &of)).await;
        let Ok(Some((prepared, heads, answers))) = made else { return };
        let pair = match prepared.establish(&Handshake::default(), STEP_MAX).await {
            Ok(pair) => pair,
            Err(error) => return tracing::warn!(%from, lane, %error, "a lane came to nothing"),
        };
        self.counters.let_in.fetch_add(1, Ordering::Relaxed);
        let seals = seals(&token, &asked, &migration);
        let receiver = RdmaReceiver::new(pair, migration, (heads, answers), seals);
        let preamble = LanePreamble { version: u16::from(VERSION), lane, migration: id, generation, token };
        // What refuses a lane waits until its answer has left.
        let handed = tokio::task::spawn_blocking(move || sessions.lane(NAME, &preamble, None, Box::new(receiver))).await;
        if let Ok(Err(error)) = handed {
            tracing::info!(%from, lane, %error, "a lane ended while it was let in");
        }
    }

    fn prepare(&self, request: ConnectRequest, lane: u16, migration: &Migration) -> Option<(Prepared, Buffers, Buffers)> {
        let from = request.peer();
        let domain = match migration.let_in(lane, request.device()) {
            Ok(domain) => domain,
            Err((code, words)) => {
                tracing::warn!(%from, lane, %code, words, "a lane was refused");
                if code == Code::Violation {
                    refusals::count(Port::Rdma, Why::Unknown);
                    self.counters.refused_unknown.fetch_add(1, Ordering::Relaxed);
                }
                request.reject(&emit_refusal(code, &words));
                return None;
            }
        };
        match self.buffers(&domain) {
            Ok((heads, answers)) => match self.pair(request, &domain, &heads) {
                Ok(prepared) => Some((prepared, heads, answers)),
                Err(words) => {
                    tracing::warn!(%from, lane, words, "a lane could not be made");
                    None
                }
            },
            Err(words) => {
                tracing::warn!(%from, lane, words, "a lane could not be made");
                request.reject(&emit_refusal(Code::LinkUnavailable, &words));
                None
            }
        }
    }

    fn buffers(&self, domain: &Arc<ProtectionDomain>) -> Result<(Buffers, Buffers), String> {
        let heads = Buffers::new(domain, self.settings.buffers(), MESSAGE_BYTES, true).map_err(|error| error.to_string())?;
        let answers = Buffers::new(domain, ANSWERS, ANSWER_BYTES, false).map_err(|error| error.to_string())?;
        Ok((heads, answers))
    }

    fn pair(&self, request: ConnectRequest, domain: &Arc<ProtectionDomain>, heads: &Buffers) -> Result<Prepared, String> {
        let mut prepared = request.prepare(domain, &self.settings.destination_pair()).map_err(|error| error.to_string())?;
        let receive = |slot: u32| Receive { into: Some(heads.piece(slot, heads.slot_bytes())), id: slot.into() };
        let receives: Vec<Receive<'_>> = (0..heads.count()).map(receive).collect();
        prepared.post_receives(&receives).map_err(|error| error.to_string())?;
        Ok(prepared)
    }
}

/// The seals of a lane: towards the destination, towards the source.
pub(super) fn lane_seals(token: &LaneToken, preamble: &LanePreamble) -> (Seal, Seal) {
    let of = |purpose| {
        let key = derive(token, purpose, (preamble.migration, preamble.generation), preamble.lane);
        Seal::new(&key, preamble.lane)
    };
    (of("limosa rdma towards the destination 1"), of("limosa rdma towards the source 1"))
}

fn seals(token: &LaneToken, asked: &LaneRequest, migration: &Migration) -> (Seal, Seal) {
    let Exposure { migration: id, generation, .. } = *migration.exposure();
    lane_seals(token, &LanePreamble { version: u16::from(VERSION), lane: asked.lane, migration: id, generation, token: *token })
}
