//! The source's side: reaching the destination's device, opening lanes, and saying in words why not. Control is another link's.

use super::accept::lane_seals;
use super::buffers::Buffers;
use super::fabric::page_key;
use super::memory::SourceMemory;
use super::message::{Kind, SEAL_BYTES, number};
use super::request::{LaneRequest, parse_refusal};
use super::sender::{Agreed, Parts, RdmaSender};
use super::work::RdmaWork;
use super::{ANSWER_BYTES, ANSWERS, MESSAGE_BYTES, MESSAGES_AHEAD, NAME, RdmaSettings, STEP_MAX};
use crate::lanes::LaneSender;
use crate::sessions::{LANE_ANSWER_BYTES, parse_lane_answer};
use crate::{Answer, Capabilities, ConnectError, Control, LaneMemory, Link};
use limosa_proto::identity::{Generation, MigrationId};
use limosa_proto::wire::code::Code;
use limosa_proto::wire::frame::LanePreamble;
use limosa_proto::wire::limits::LANES_MAX;
use limosa_verbs::{ConnectError as VerbsError, GidKind, Handshake, Prepared, QueuePair, Receive, Resolved, Verb};
use std::net::SocketAddr;
use std::sync::{Arc, Weak};
use std::time::Duration;
use tokio::sync::Mutex;

/// How long finding the device and the route may take.
const RESOLVE_MAX: Duration = Duration::from_secs(2);
/// A destination that takes less than this in one message is none of ours.
const MESSAGE_BYTES_MIN: u32 = 1024;
/// The most credits that a destination may give.
const CREDITS_MAX: u32 = 1 << 16;

/// Which attempt, and its memory as long as a lane uses it.
type Known = (MigrationId, Generation, Weak<SourceMemory>);

/// RDMA to one destination.
pub struct RdmaLink {
    control: Arc<dyn Link>,
    destination: SocketAddr,
    settings: RdmaSettings,
    /// The memory that the lanes of one attempt share.
    known: Mutex<Vec<Known>>,
    work: Arc<RdmaWork>,
}

impl std::fmt::Debug for RdmaLink {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("RdmaLink").field("destination", &self.destination).finish_non_exhaustive()
    }
}

/// Why there is no lane: the code, and what to say.
type Refused = (Code, String);

fn unavailable(words: impl std::fmt::Display) -> Refused {
    (Code::LinkUnavailable, words.to_string())
}

impl RdmaLink {
    /// Lanes to `destination`, an address of an RDMA device and its port; control goes over `control`, which must be encrypted.
    #[must_use]
    pub fn new(control: Arc<dyn Link>, destination: SocketAddr, settings: RdmaSettings) -> RdmaLink {
        RdmaLink { control, destination, settings, known: Mutex::new(Vec::new()), work: Arc::default() }
    }

    /// What its lanes have asked of this host's device so far.
    #[must_use]
    pub fn work(&self) -> Arc<RdmaWork> {
        self.work.clone()
    }

    fn trusted(&self, end: SocketAddr, whose: &str) -> Result<(), Refused> {
        if self.settings.trusts(end.ip()) {
            return Ok(());
        }
        let words = format!(
            "{whose} address {} is not inside trusted_fabric ({}), and RDMA is not encrypted",
            end.ip(),
            self.settings.trusted_words()
        );
        Err((Code::PlaintextRefused, words))
    }

    /// The memory of this attempt, on `device`; made by the first lane that needs it.
    async fn memory(&self, device: &str, preamble: &LanePreamble, memory: &LaneMemory) -> Result<Arc<SourceMemory>, Refused> {
        let mut known = self.known.lock().await;
        known.retain(|(_, _, memory)| memory.strong_count() > 0);
        let this = |one: &&Known| one.0 == preamble.migration && one.1 == preamble.generation;
        if let Some(memory) = known.iter().find(this).and_then(|(_, _, memory)| memory.upgrade()) {
            return Ok(memory);
        }
        let (device, memory) = (device.to_owned(), memory.clone());
        let (settings, work) = (self.settings.clone(), self.work.clone());
        let made = tokio::task::spawn_blocking(move || SourceMemory::new(&device, memory, &settings, work)).await;
        let made = Arc::new(made.map_err(unavailable)?.map_err(unavailable)?);
        known.push((preamble.migration, preamble.generation, Arc::downgrade(&made)));
        Ok(made)
    }

    async fn open(&self, preamble: &LanePreamble, memory: &LaneMemory) -> Result<RdmaSender, Refused> {
        self.trusted(self.destination, "the destination's")?;
        let resolved = Resolved::resolve(self.destination, None, RESOLVE_MAX).await.map_err(verbs)?;
        if let Some(local) = resolved.local() {
            self.trusted(local, "this host's")?;
        }
        let page_check = memory.page_check;
        let memory = self.memory(resolved.device(), preamble, memory).await?;
        let (pair_settings, shared) = (self.settings.source_pair(), memory.clone());
        let prepared = tokio::task::spawn_blocking(move || -> Result<(Prepared, Buffers, Buffers), Refused> {
            let heads = Buffers::new(shared.domain(), MESSAGES_AHEAD, MESSAGE_BYTES, false).map_err(unavailable)?;
            let answers = Buffers::new(shared.domain(), ANSWERS, ANSWER_BYTES, true).map_err(unavailable)?;
            let mut prepared = resolved.prepare(shared.domain(), &pair_settings).map_err(unavailable)?;
            let receive = |slot: u32| Receive { into: Some(answers.piece(slot, answers.slot_bytes())), id: slot.into() };
            let receives: Vec<Receive<'_>> = (0..answers.count()).map(receive).collect();
            prepared.post_receives(&receives).map_err(unavailable)?;
            Ok((prepared, heads, answers))
        });
        let (prepared, heads, answers) = prepared.await.map_err(unavailable)??;
        let private_data = LaneRequest::new(preamble).emit();
        let pair = prepared.establish(&Handshake { private_data, ..Handshake::default() }, STEP_MAX).await.map_err(verbs)?;
        right_kind(&pair)?;
        let (out, into) = lane_seals(&preamble.token, preamble);
        let page_key = page_check.then(|| page_key(&preamble.token, preamble.migration, preamble.generation));
        let mut parts = Parts { pair, memory, page_key, heads, answers, out, into };
        let agreed = answer(&mut parts).await?;
        Ok(RdmaSender::new(parts, &self.settings, &agreed))
    }
}

/// Both ends must frame packets alike, and RoCE version 1 is never routed.
fn right_kind(pair: &QueuePair) -> Result<(), Refused> {
    match pair.gid() {
        Some(gid) if gid.kind == GidKind::RoceV1 => Err(unavailable(format!(
            "the connection uses GID {} of the wrong kind (RoCE version 1): set the port's default to RoCE version 2 on both hosts \
             (cma_roce_mode -d DEVICE -p 1 -m 2)",
            gid.index
        ))),
        _ => Ok(()),
    }
}

/// Waits until the destination has let the lane in.
async fn answer(parts: &mut Parts) -> Result<Agreed, Refused> {
    let failed = |words: String| (Code::LinkLost, format!("waiting for the lane to be let in: {words}"));
    let deadline = tokio::time::Instant::now() + STEP_MAX;
    let arrived = loop {
        let left = deadline.saturating_duration_since(tokio::time::Instant::now());
        let done = parts.pair.completions(left).await.map_err(|error| failed(error.to_string()))?;
        if let Some(completion) = done.first() {
            completion.ok().map_err(|error| failed(error.to_string()))?;
            // Nothing was sent yet, and no more than one answer comes before something is.
            if completion.verb == Verb::Receive {
                break *completion;
            }
        }
    };
    let slot = u32::try_from(arrived.id).unwrap_or(u32::MAX);
    let mut message = Vec::new();
    parts.answers.get(slot, arrived.bytes, &mut message).map_err(|error| failed(error.to_string()))?;
    let (kind, body) = parts.into.open(&message).map_err(|error| failed(error.to_string()))?;
    let malformed = || (Code::Malformed, "the destination's answer to a lane makes no sense".to_owned());
    let (said, rest) = body.split_first_chunk::<LANE_ANSWER_BYTES>().ok_or_else(malformed)?;
    if let Some(code) = parse_lane_answer(said) {
        return Err((code, format!("it refused the lane: {code}")));
    }
    let (credits, rest) = number(rest).map_err(|_| malformed())?;
    let (message_bytes, _) = number(rest).map_err(|_| malformed())?;
    let sane = (1..=CREDITS_MAX).contains(&credits) && message_bytes >= MESSAGE_BYTES_MIN && SEAL_BYTES < 1024;
    if kind != Kind::Answer || !sane {
        return Err(malformed());
    }
    let into = Some(parts.answers.piece(slot, parts.answers.slot_bytes()));
    parts.pair.post_receives(&[Receive { into, id: arrived.id }]).map_err(unavailable)?;
    Ok(Agreed { credits, message_bytes })
}

/// Why no connection came to be, as far as this host can tell.
fn verbs(error: VerbsError) -> Refused {
    match &error {
        VerbsError::Rejected { private_data, .. } if private_data.is_empty() => {
            (Code::LinkUnavailable, format!("{error}: its log says why"))
        }
        VerbsError::Rejected { private_data, .. } => {
            let (code, words) = parse_refusal(private_data);
            (code, format!("it refused the lane: {words} ({code})"))
        }
        VerbsError::TimedOut { .. } => (Code::Timeout, error.to_string()),
        VerbsError::Unreachable { .. } | VerbsError::Disconnected(_) => (Code::LinkLost, error.to_string()),
        _ => (Code::LinkUnavailable, error.to_string()),
    }
}

impl Link for RdmaLink {
    fn capabilities(&self) -> Capabilities {
        Capabilities { name: NAME, secure_lanes: false, plaintext_lanes: true, page_check: true, lanes_max: LANES_MAX }
    }

    fn destination(&self) -> String {
        self.control.destination()
    }

    fn control(&self) -> Answer<'_, Result<Control, ConnectError>> {
        self.control.control()
    }

    fn lane(
        &self,
        preamble: LanePreamble,
        _plaintext: bool,
        memory: &LaneMemory,
    ) -> Answer<'_, Result<Box<dyn LaneSender>, ConnectError>> {
        let memory = memory.clone();
        Box::pin(async move {
            match self.open(&preamble, &memory).await {
                Ok(lane) => Ok(Box::new(lane) as Box<dyn LaneSender>),
                Err((code, words)) => Err(ConnectError::Fabric {
                    destination: format!("{} (RDMA {})", self.control.destination(), self.destination),
                    lane: preamble.lane,
                    code,
                    words,
                }),
            }
        })
    }
}
