//! Asking a destination which links it offers, and learning how fast its control channel is: round trip and a short run of
//! padding. Nothing is decided here; `choose` does that.

use crate::control::ControlError;
use crate::{ConnectError, Control, Link};
use limosa_proto::identity::{Generation, MigrationId};
use limosa_proto::wire::code::Code;
use limosa_proto::wire::limits::PROBE_BYTES_MAX;
use limosa_proto::wire::message::Message;
use limosa_proto::wire::offer::LinkOffer;
use std::time::{Duration, Instant};

/// Padding that one asking source may send, and how long it may take over it: the most that a probe costs a host.
const PADDING_BYTES_MAX: u64 = 64 << 20;
const ASKING_MAX: Duration = Duration::from_secs(10);
/// Round trips that are measured; the fastest counts.
const ROUND_TRIPS: usize = 5;
/// Padding of the throughput probe, when the last of it is sent at the latest, and how long what is under way is waited for then.
const PADDING_BYTES: u64 = 8 << 20;
const PADDING_TIME_MAX: Duration = Duration::from_millis(300);
const PADDING_DRAIN_MAX: Duration = Duration::from_millis(500);
/// Padding that is not acknowledged yet, at first and at most: it doubles as on a path that is not known, so that a slow one is
/// not filled with what takes seconds to drain.
const PADDING_AHEAD: (u64, u64) = (PROBE_BYTES_MAX as u64, 4 << 20);
/// A destination that answers slower than this does not answer.
const ANSWER_MAX: Duration = Duration::from_secs(3);

/// What a destination offers, and how fast the channel was on which it said so.
#[derive(Debug, Clone, PartialEq)]
pub struct Probed {
    /// Its links; empty from a host that does not choose.
    pub offers: Vec<LinkOffer>,
    /// The fastest of a few round trips.
    pub round_trip: Duration,
    /// Bytes of padding that came to the other side in a second.
    pub bytes_per_s: f64,
}

/// Why a destination could not be asked.
#[derive(Debug, thiserror::Error)]
pub enum ProbeError {
    /// It could not be reached.
    #[error(transparent)]
    Connect(#[from] ConnectError),
    /// The channel ended.
    #[error("destination {destination}, asked for its links: {error}")]
    Control {
        /// Whom we asked.
        destination: String,
        /// Why.
        error: ControlError,
    },
    /// It said something else.
    #[error("destination {destination}, asked for its links, {words}")]
    Answer {
        /// Whom we asked.
        destination: String,
        /// What it did.
        words: String,
    },
    /// It said nothing in time.
    #[error("destination {destination}, asked for its links, did not answer within {} s", ANSWER_MAX.as_secs())]
    Silent {
        /// Whom we asked.
        destination: String,
    },
}

impl ProbeError {
    /// The code that the report gets.
    #[must_use]
    pub fn code(&self) -> Code {
        match self {
            ProbeError::Connect(error) => error.code(),
            ProbeError::Control { error: ControlError::KeyRefused, .. } => Code::UnknownHost,
            ProbeError::Control { .. } => Code::LinkLost,
            ProbeError::Answer { .. } => Code::Violation,
            ProbeError::Silent { .. } => Code::Timeout,
        }
    }
}

const NOBODY: (MigrationId, Generation) = (MigrationId([0; 16]), Generation(0));

/// Asks the destination of `link` for its links, and measures the channel: with `padding`, its throughput too.
///
/// # Errors
/// It cannot be reached, or does not answer.
pub async fn probe(link: &dyn Link, padding: bool) -> Result<Probed, ProbeError> {
    let mut control = link.control().await?;
    let mut asking = Asking { control: &mut control, destination: link.destination() };
    let mut round_trip = Duration::MAX;
    asking.send(&Message::LinksAsk)?;
    let offers = match asking.answer().await? {
        Message::Links(offers) => offers,
        other => return Err(asking.strange(&other)),
    };
    for _ in 0..ROUND_TRIPS {
        let begun = Instant::now();
        asking.send(&Message::Probe(Vec::new()))?;
        asking.acknowledged().await?;
        round_trip = round_trip.min(begun.elapsed());
    }
    let bytes_per_s = if padding { asking.throughput().await? } else { 0.0 };
    Ok(Probed { offers, round_trip, bytes_per_s })
}

struct Asking<'a> {
    control: &'a mut Control,
    destination: String,
}

impl Asking<'_> {
    fn send(&self, message: &Message) -> Result<(), ProbeError> {
        self.control.send(NOBODY.0, NOBODY.1, message).map_err(|error| self.lost(error))
    }

    fn lost(&self, error: ControlError) -> ProbeError {
        ProbeError::Control { destination: self.destination.clone(), error }
    }

    fn strange(&self, message: &Message) -> ProbeError {
        let words = match message {
            Message::Abort { words, .. } => format!("said: {words}"),
            other => format!("answered {}", other.name()),
        };
        ProbeError::Answer { destination: self.destination.clone(), words }
    }

    async fn answer(&mut self) -> Result<Message, ProbeError> {
        match tokio::time::timeout(ANSWER_MAX, self.control.receive()).await {
            Ok(Ok((_, message))) => Ok(message),
            Ok(Err(error)) => Err(self.lost(error)),
            Err(_) => Err(ProbeError::Silent { destination: self.destination.clone() }),
        }
    }

    async fn acknowledged(&mut self) -> Result<u64, ProbeError> {
        match self.answer().await? {
            Message::ProbeAck { bytes } => Ok(bytes),
            other => Err(self.strange(&other)),
        }
    }

    /// Keeps padding under way until there is enough of it or time is up. What is still under way on a slow path is not waited
    /// for: what has arrived tells how slow it is.
    async fn throughput(&mut self) -> Result<f64, ProbeError> {
        let padding = Message::Probe(vec![0x5A; PROBE_BYTES_MAX]);
        let (mut sent, mut arrived) = (0_u64, 0_u64);
        let begun = Instant::now();
        loop {
            let enough = sent >= PADDING_BYTES || begun.elapsed() >= PADDING_TIME_MAX;
            let ahead = arrived.clamp(PADDING_AHEAD.0, PADDING_AHEAD.1);
            if !enough && sent - arrived < ahead {
                self.send(&padding)?;
                sent += PROBE_BYTES_MAX as u64;
                continue;
            }
            let left = (PADDING_TIME_MAX + PADDING_DRAIN_MAX).saturating_sub(begun.elapsed());
            let rate = |arrived: u64| arrived as f64 / begun.elapsed().as_secs_f64().max(1e-6);
            match tokio::time::timeout(left, self.acknowledged()).await {
                Ok(acknowledged) => arrived = acknowledged?.min(sent),
                Err(_) => return Ok(rate(arrived)),
            }
            if enough && arrived >= sent {
                return Ok(rate(arrived));
            }
        }
    }
}

/// The destination's side: gives its offers, then counts padding until the source has enough.
pub(crate) async fn answer(mut control: Control, migration: MigrationId, generation: Generation, offers: Vec<LinkOffer>) {
    let mut bytes = 0_u64;
    let work = async {
        control.send(migration, generation, &Message::Links(offers))?;
        while let (_, Message::Probe(padding)) = control.receive().await? {
            bytes = bytes.saturating_add(padding.len() as u64);
            if bytes > PADDING_BYTES_MAX {
                break;
            }
            control.send(migration, generation, &Message::ProbeAck { bytes })?;
        }
        Ok::<(), ControlError>(())
    };
    // However it ends, it was only a question.
    let _ = tokio::time::timeout(ASKING_MAX, work).await;
}
