//! What is known about a migration while it goes on, as its source sees it: what progress bars and reports are made of.
//! It holds numbers and decides nothing.

use crate::event::Course;
use crate::state::SourceState;
use crate::wire::message::DestinationReport;
use serde::{Deserialize, Serialize};
use std::time::Duration;

/// One finished round.
#[derive(Debug, Clone, Copy, PartialEq, Default, Serialize, Deserialize)]
pub struct RoundProgress {
    /// Its number, from 1.
    pub round: u32,
    /// Pages whose bytes were sent.
    pub pages: u64,
    /// Pages sent as "all zero".
    pub zero_pages: u64,
    /// Bytes on the wire for it, headers included.
    pub bytes: u64,
    /// How long it took, in milliseconds.
    pub ms: f64,
    /// Pages that the guest had written again when it was over.
    pub dirty_after: u64,
}

/// Where the downtime went. The parts add up to the whole, from the order to pause until the source heard that
/// the guest runs; so it is an upper bound that includes one network round trip.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct DowntimeParts {
    /// From the order to pause until the guest stood still.
    pub pause: Duration,
    /// Sending the last pages, as far as it did not overlap with loading.
    pub last_round: Duration,
    /// Saving and loading device state.
    pub state: Duration,
    /// Both journals and the messages of the commit.
    pub commit: Duration,
    /// Resuming the guest.
    pub resume: Duration,
}

impl DowntimeParts {
    /// All parts together.
    #[must_use]
    pub fn total(&self) -> Duration {
        self.pause + self.last_round + self.state + self.commit + self.resume
    }
}

/// A migration as its source sees it now.
#[derive(Debug, Clone, PartialEq)]
pub struct Progress {
    /// The source's state.
    pub state: SourceState,
    /// How the guest goes.
    pub course: Course,
    /// The round that is being sent; 0 before the first.
    pub round: u32,
    /// Finished rounds, the last round included.
    pub rounds: Vec<RoundProgress>,
    /// Bytes of the guest's memory.
    pub memory_bytes: u64,
    /// Pages of the current round.
    pub round_pages: u64,
    /// Pages of the current round that are still to be sent.
    pub pages_remaining: u64,
    /// Bytes on the wire so far, over all rounds.
    pub bytes_on_wire: u64,
    /// Page bytes a second, as last measured; 0 before the first measurement.
    pub rate_bytes_per_s: u64,
    /// Pages that the guest writes in a second, as last measured.
    pub dirty_rate_pages_per_s: u64,
    /// Expected time until the guest runs at the destination, in milliseconds, if it can be said.
    pub estimate_ms: Option<u64>,
    /// Downtime to expect if the guest were stopped now, in milliseconds, if it can be said.
    pub downtime_estimate_ms: Option<u64>,
    /// Lanes that were agreed on; 0 before.
    pub lanes: u16,
    /// Whether lanes are without TLS, as agreed.
    pub plaintext_lanes: bool,
    /// Time from the start until the destination was prepared.
    pub prepare: Option<Duration>,
    /// Time from the start until the end, or until now.
    pub total: Duration,
    /// Where the downtime went, once it is over.
    pub downtime: Option<DowntimeParts>,
    /// What the destination had to tell at the end.
    pub destination: Option<DestinationReport>,
    /// Things that went wrong and did not matter enough to abort, in words.
    pub warnings: Vec<String>,
    /// Why the migration is in doubt, in words, if it is.
    pub doubt: Option<String>,
}

impl Progress {
    /// Nothing was done yet.
    #[must_use]
    pub fn new(memory_bytes: u64) -> Progress {
        Progress {
            state: SourceState::Starting,
            course: Course::Precopy,
            round: 0,
            rounds: Vec::new(),
            memory_bytes,
            round_pages: 0,
            pages_remaining: memory_bytes / crate::memory::PAGE_BYTES,
            bytes_on_wire: 0,
            rate_bytes_per_s: 0,
            dirty_rate_pages_per_s: 0,
            estimate_ms: None,
            downtime_estimate_ms: None,
            lanes: 0,
            plaintext_lanes: false,
            prepare: None,
            total: Duration::ZERO,
            downtime: None,
            destination: None,
            warnings: Vec::new(),
            doubt: None,
        }
    }
}
