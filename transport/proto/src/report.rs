//! The report of one migration, as people and machines get it. Made of [`Progress`] and of what the driver measured.

use crate::event::{Course, Side, SourceOutcome};
use crate::progress::{Progress, RoundProgress};
use crate::wire::code::Code;
use crate::wire::message::Reached;
use serde::{Deserialize, Serialize};
use std::time::Duration;

/// How a migration ended, as one word.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Outcome {
    /// The guest runs at the destination.
    Committed,
    /// Refused by the destination; nothing was changed.
    Refused,
    /// The guest stays at the source.
    Aborted,
    /// Nobody knows yet; the guest stands still at the source.
    InDoubt,
}

/// CPU seconds that a migration took, on each host.
#[derive(Debug, Clone, Copy, PartialEq, Default, Serialize, Deserialize)]
pub struct CpuSeconds {
    /// At the source.
    pub source: f64,
    /// At the destination.
    pub destination: f64,
}

/// Where the downtime went, in milliseconds; the parts add up to it.
#[derive(Debug, Clone, Copy, PartialEq, Default, Serialize, Deserialize)]
pub struct DowntimePartsMs {
    /// Pausing the guest.
    pub pause: f64,
    /// Sending its last pages.
    pub last_round: f64,
    /// Saving and loading device state.
    pub state: f64,
    /// The journals and messages of the commit.
    pub commit: f64,
    /// Resuming the guest.
    pub resume: f64,
}

/// What the engine cannot know.
#[derive(Debug, Clone, PartialEq)]
pub struct Measured {
    /// Kind of link: "tcp".
    pub link: String,
    /// Whether pages were checked by a keyed hash; `None` where the link needs no such check.
    pub page_check: Option<bool>,
    /// CPU seconds of the source: agent and VMM.
    pub source_cpu_seconds: f64,
    /// Whether the guest's own check passed, where somebody asked it.
    pub verified: Option<bool>,
    /// The longest time without an answer from the guest, where somebody measured it.
    pub network_gap_ms: Option<f64>,
}

/// A link that was looked at before a migration, or tried for it.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct LinkTried {
    /// Its name.
    pub link: String,
    /// What came of it, in words: why it was taken, or why not.
    pub words: String,
    /// Its round trip in microseconds, where it was measured.
    pub round_trip_us: Option<f64>,
    /// What a short probe reached in bytes per second, where it was made.
    pub probe_bytes_per_s: Option<f64>,
}

/// The report of one migration. Times are in milliseconds, sizes in bytes.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Report {
    /// Whether the guest runs at the destination.
    pub ok: bool,
    /// Whether the guest's own check passed; null where nobody asked it.
    pub verified: Option<bool>,
    /// How it ended.
    pub outcome: Outcome,
    /// Why it did not succeed, as an id.
    pub code: Option<String>,
    /// Why it did not succeed, in words: the other side's where the other side gave up.
    pub words: Option<String>,
    /// Who gave up.
    pub by: Option<Side>,
    /// Whether the guest is known to run somewhere.
    pub guest_runs: bool,
    /// Whether its operator had paused it: it stood still all along and does so still, so there is no downtime.
    #[serde(default)]
    pub paused: bool,
    /// Whether it was paused first and then sent at once.
    #[serde(default)]
    pub quick: bool,
    /// Kind of link.
    pub link: String,
    /// Why this link; empty where nobody chose.
    pub link_reason: String,
    /// The links that were looked at or tried, in order.
    pub links_tried: Vec<LinkTried>,
    /// Whether pages were checked by a keyed hash; null where the link needs no such check.
    pub page_check: Option<bool>,
    /// Whether pages went through TLS.
    pub encrypted: bool,
    /// How many lanes.
    pub lanes: u16,
    /// Bytes of guest memory.
    pub memory_bytes: u64,
    /// Bytes sent for pages, headers included.
    pub bytes_on_wire: u64,
    /// How many rounds, the last one included.
    pub rounds: u32,
    /// Each round.
    pub round_list: Vec<RoundProgress>,
    /// Pages that were sent as "all zero".
    pub zero_pages: u64,
    /// From the start to the end.
    pub total_ms: f64,
    /// From the start until the destination was prepared.
    pub prepare_ms: Option<f64>,
    /// How long the guest stood still, as an upper bound.
    pub downtime_ms: Option<f64>,
    /// Where that went.
    pub downtime_parts_ms: Option<DowntimePartsMs>,
    /// The longest time without an answer from the guest, as an upper bound: the downtime and the time from the resume until
    /// the guest's first answer, unless somebody measured it from outside.
    pub network_gap_ms: Option<f64>,
    /// How that was measured; null where it was not.
    pub network_gap_by: Option<String>,
    /// What was announced in the first round, one line each.
    pub announcements: Vec<String>,
    /// CPU seconds on both hosts.
    pub cpu_seconds: CpuSeconds,
    /// CPU seconds of both hosts for each GiB of guest memory.
    pub cpu_seconds_per_gib: f64,
    /// Guest memory that arrived for each second of sending rounds.
    pub goodput_bytes_per_s: f64,
    /// Things that went wrong and did not matter enough to abort.
    pub warnings: Vec<String>,
}

fn ms(duration: Duration) -> f64 {
    duration.as_secs_f64() * 1e3
}

impl Report {
    /// The report of a migration that ended with `outcome`.
    #[must_use]
    pub fn new(progress: &Progress, outcome: &SourceOutcome, measured: Measured) -> Report {
        let (kind, code, words, by, guest_runs) = describe(outcome);
        let destination = progress.destination.clone().unwrap_or_default();
        let cpu_seconds = CpuSeconds { source: measured.source_cpu_seconds, destination: destination.cpu_us as f64 / 1e6 };
        let gib = progress.memory_bytes as f64 / f64::from(1 << 30);
        let sent: u64 = progress.rounds.iter().map(|round| round.pages + round.zero_pages).sum();
        let sending_ms: f64 = progress.rounds.iter().map(|round| round.ms).sum();
        let downtime = progress.downtime;
        let (network_gap_ms, network_gap_by, gap_warning) = network_gap(progress, &destination.reached, measured.network_gap_ms);
        let mut warnings = progress.warnings.clone();
        warnings.extend(gap_warning);
        Report {
            ok: kind == Outcome::Committed,
            verified: measured.verified,
            outcome: kind,
            code: code.map(|code| code.to_string()),
            words,
            by,
            guest_runs: guest_runs && progress.course != Course::Paused,
            paused: progress.course == Course::Paused,
            quick: progress.course == Course::Quick,
            link: measured.link,
            link_reason: String::new(),
            links_tried: Vec::new(),
            page_check: measured.page_check,
            encrypted: !progress.plaintext_lanes,
            lanes: progress.lanes,
            memory_bytes: progress.memory_bytes,
            bytes_on_wire: progress.bytes_on_wire,
            rounds: u32::try_from(progress.rounds.len()).unwrap_or(u32::MAX),
            round_list: progress.rounds.clone(),
            zero_pages: progress.rounds.iter().map(|round| round.zero_pages).sum(),
            total_ms: ms(progress.total),
            prepare_ms: progress.prepare.map(ms),
            downtime_ms: downtime.map(|parts| ms(parts.total())),
            downtime_parts_ms: downtime.map(|parts| DowntimePartsMs {
                pause: ms(parts.pause),
                last_round: ms(parts.last_round),
                state: ms(parts.state),
                commit: ms(parts.commit),
                resume: ms(parts.resume),
            }),
            network_gap_ms,
            network_gap_by,
            announcements: destination.announcements,
            cpu_seconds,
            cpu_seconds_per_gib: if gib > 0.0 { (cpu_seconds.source + cpu_seconds.destination) / gib } else { 0.0 },
            goodput_bytes_per_s: if sending_ms > 0.0 {
                (sent * crate::memory::PAGE_BYTES) as f64 / (sending_ms / 1e3)
            } else {
                0.0
            },
            warnings,
        }
    }
}

/// How long the guest did not answer, how that is known, and a warning where it is not although somebody asked.
fn network_gap(
    progress: &Progress,
    reached: &Reached,
    measured_ms: Option<f64>,
) -> (Option<f64>, Option<String>, Option<String>) {
    if measured_ms.is_some() {
        return (measured_ms, None, None);
    }
    let how = (!reached.words.is_empty()).then(|| reached.words.clone());
    match (progress.downtime, reached.after_us) {
        // The destination's word: it never counts for more than the time in which it must lie.
        (Some(parts), Some(us)) => (Some(ms(parts.total() + Duration::from_micros(us).min(progress.total))), how, None),
        (_, None) => (None, None, how.map(|why| format!("the network gap is not known: {why}"))),
        (None, Some(_)) => (None, None, None),
    }
}

fn describe(outcome: &SourceOutcome) -> (Outcome, Option<Code>, Option<String>, Option<Side>, bool) {
    match outcome {
        SourceOutcome::Committed => (Outcome::Committed, None, None, None, true),
        SourceOutcome::Aborted { code, words, by, guest_runs } => {
            (Outcome::Aborted, Some(*code), Some(words.clone()), Some(*by), *guest_runs)
        }
        SourceOutcome::Refused(refusal) => {
            (Outcome::Refused, Some(refusal.code), Some(refusal.words()), Some(Side::Destination), true)
        }
        SourceOutcome::InDoubt { words } => (Outcome::InDoubt, None, Some(words.clone()), None, false),
    }
}
