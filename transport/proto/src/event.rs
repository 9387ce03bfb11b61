//! What goes into the two halves of the engine and what comes out: settings, events, actions, outcomes.
//! Types only; [`crate::source`] and [`crate::destination`] act on them.

use crate::bitmap::PageSet;
use crate::commit::{JournalRecord, JournalRecordKind};
use crate::identity::{Generation, HostId, MigrationId};
use crate::precopy::PrecopyPolicy;
use crate::record::Record;
use crate::ticket::TicketBytes;
use crate::wire::code::Code;
use crate::wire::frame::LaneToken;
use crate::wire::limits::LANES_MAX;
use crate::wire::message::{Message, Reached, Refusal, VerdictAnswer, VmDescription};
use std::fmt;
use std::time::Duration;

/// One of the two hosts.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Side {
    /// Where the guest runs before.
    Source,
    /// Where it shall run.
    Destination,
}

/// What the driver or the host was asked to do when it failed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum HostTask {
    /// `OpenLanes` or `AcceptLanes`.
    Lanes,
    /// `StartTracking` or `StopTracking`.
    Tracking,
    /// `FetchDirty`.
    FetchDirty,
    /// `SendPages`, or receiving them; also a lane that was lost before it was done.
    Pages,
    /// `Pause`.
    Pause,
    /// `Save`.
    Save,
    /// `Journal` of such a record. Whether it is durable is not known.
    Journal(JournalRecordKind),
    /// `Resume`.
    Resume,
    /// `Release`.
    Release,
    /// `Check`: looking failed; a refusal is an event of its own.
    Check,
    /// `Prepare`.
    Prepare,
    /// `Load`.
    Load,
    /// `Announce`.
    Announce,
    /// `Discard`.
    Discard,
    /// The guest itself ended or crashed, whatever was being done.
    Guest,
}

impl fmt::Display for HostTask {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            HostTask::Lanes => "opening lanes",
            HostTask::Tracking => "tracking dirty pages",
            HostTask::FetchDirty => "fetching dirty pages",
            HostTask::Pages => "moving pages",
            HostTask::Pause => "pausing the guest",
            HostTask::Save => "saving device state",
            HostTask::Journal(_) => "writing the journal",
            HostTask::Resume => "resuming the guest",
            HostTask::Release => "stopping the VMM",
            HostTask::Check => "checking what this host has",
            HostTask::Prepare => "preparing the VMM",
            HostTask::Load => "loading device state",
            HostTask::Announce => "announcing the guest",
            HostTask::Discard => "discarding the incoming VMM",
            HostTask::Guest => "running the guest",
        })
    }
}

/// How long each phase may take. After that the phase is given up, as its state allows.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Deadlines {
    /// The peer's answer to Hello, and the destination's own check.
    pub answer: Duration,
    /// Building the VMM and its memory at the destination.
    pub prepare: Duration,
    /// Opening all lanes.
    pub lanes: Duration,
    /// One thing asked of the own host: tracking, fetching, pausing, saving, loading, the journal.
    pub host: Duration,
    /// A round without any progress. Where progress is not told (`Moving`, `Arriving`), a round has this plus one
    /// second for each MiB of it.
    pub stall: Duration,
    /// Source: how long the guest may stand still before `released`; then it is resumed here.
    pub stopped: Duration,
    /// Destination: how long it stays ready without a Commit, before it discards durably.
    pub ready: Duration,
    /// Source: the answer to Commit; then it is in doubt and asks.
    pub commit: Duration,
    /// Both: what is left to be said and written after the guest runs, or after an abort.
    pub finish: Duration,
    /// Between two tries of what must not be given up: asking for a verdict, resuming, writing a record.
    pub retry: Duration,
}

impl Default for Deadlines {
    fn default() -> Deadlines {
        Deadlines {
            answer: Duration::from_secs(10),
            prepare: Duration::from_secs(300),
            lanes: Duration::from_secs(10),
            host: Duration::from_secs(10),
            stall: Duration::from_secs(30),
            stopped: Duration::from_secs(10),
            ready: Duration::from_secs(30),
            commit: Duration::from_secs(5),
            finish: Duration::from_secs(10),
            retry: Duration::from_secs(1),
        }
    }
}

/// How a guest goes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Course {
    /// Rounds while it runs, then a short pause.
    #[default]
    Precopy,
    /// It is paused first, then everything goes in one round: the shortest total time and the longest downtime.
    Quick,
    /// It stands still already because its operator wants it, and does so at the destination: as `Quick`, but nobody
    /// pauses it and nobody resumes it, wherever it ends.
    Paused,
}

/// Settings of a source.
#[derive(Debug, Clone, PartialEq)]
pub struct SourceConfig {
    /// This migration's identity.
    pub migration: MigrationId,
    /// This attempt's number.
    pub generation: Generation,
    /// The destination's identity, for the journal.
    pub peer: HostId,
    /// The guest.
    pub vm: VmDescription,
    /// Lanes to ask for, 1 to 16.
    pub lanes: u16,
    /// Whether to ask for lanes without TLS.
    pub plaintext_lanes: bool,
    /// The name of the link that the lanes go over, told to the destination.
    pub link: String,
    /// Whether to ask for a keyed hash of pages on links without encryption.
    pub page_check: bool,
    /// Whether it goes in rounds, at once, or stands still.
    pub course: Course,
    /// When to stop the guest, and when to give up. Only pre-copy asks it.
    pub policy: PrecopyPolicy,
    /// How often to send when there is nothing to say.
    pub keepalive: Duration,
    /// A peer that is silent for longer is lost.
    pub peer_silence_max: Duration,
    /// How long each phase may take.
    pub deadlines: Deadlines,
    /// After how long in doubt the engine ends with [`SourceOutcome::InDoubt`]; `None`: it asks for ever.
    pub in_doubt_max: Option<Duration>,
    /// Program and version, told to the destination.
    pub build: String,
    /// An operator's word that it may, shown before anything else.
    pub ticket: Option<TicketBytes>,
}

impl SourceConfig {
    /// Usual settings for moving `vm`.
    #[must_use]
    pub fn new(migration: MigrationId, generation: Generation, peer: HostId, vm: VmDescription) -> SourceConfig {
        SourceConfig {
            migration,
            generation,
            peer,
            vm,
            lanes: 2,
            plaintext_lanes: false,
            link: "tcp".to_owned(),
            page_check: true,
            course: Course::Precopy,
            policy: PrecopyPolicy::default(),
            keepalive: KEEPALIVE,
            peer_silence_max: PEER_SILENCE_MAX,
            deadlines: Deadlines::default(),
            in_doubt_max: None,
            build: concat!("limosa ", env!("CARGO_PKG_VERSION")).to_owned(),
            ticket: None,
        }
    }
}

/// Default of how often to send when there is nothing to say.
pub const KEEPALIVE: Duration = Duration::from_secs(2);
/// Default of how long a peer may be silent: five keepalives.
pub const PEER_SILENCE_MAX: Duration = Duration::from_secs(10);

/// Settings of a destination for one incoming migration.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DestinationConfig {
    /// Which migration, from the header of the first message.
    pub migration: MigrationId,
    /// Which attempt, from the same header.
    pub generation: Generation,
    /// The source's identity, for the journal.
    pub peer: HostId,
    /// What every lane must show: 32 bytes of good randomness.
    pub token: LaneToken,
    /// The largest guest memory to accept, in bytes.
    pub memory_bytes_max: u64,
    /// The most lanes to grant, 1 to 16.
    pub lanes_max: u16,
    /// Whether lanes without TLS may be granted.
    pub plaintext_allowed: bool,
    /// Whether to demand a keyed hash of pages on links without encryption, even where the source does not ask for it.
    pub page_check: bool,
    /// How often to send when there is nothing to say.
    pub keepalive: Duration,
    /// A peer that is silent for longer is lost.
    pub peer_silence_max: Duration,
    /// How long each phase may take.
    pub deadlines: Deadlines,
    /// Program and version, told to the source.
    pub build: String,
}

impl DestinationConfig {
    /// Usual settings.
    #[must_use]
    pub fn new(migration: MigrationId, generation: Generation, peer: HostId, token: LaneToken) -> DestinationConfig {
        DestinationConfig {
            migration,
            generation,
            peer,
            token,
            memory_bytes_max: crate::memory::MEMORY_BYTES_MAX,
            lanes_max: LANES_MAX,
            plaintext_allowed: false,
            page_check: true,
            keepalive: KEEPALIVE,
            peer_silence_max: PEER_SILENCE_MAX,
            deadlines: Deadlines::default(),
            build: concat!("limosa ", env!("CARGO_PKG_VERSION")).to_owned(),
        }
    }
}

/// What the lanes did in one round so far.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub struct RoundSent {
    /// Which round.
    pub round: u32,
    /// Pages whose bytes were sent.
    pub pages: u64,
    /// Pages sent as "all zero", or left out in the first round because they were never touched.
    pub zero_pages: u64,
    /// Bytes on the wire, headers included.
    pub bytes_on_wire: u64,
}

/// What happened at the source.
#[derive(Debug, Clone, PartialEq)]
pub enum SourceEvent {
    /// A message came.
    Message(Message),
    /// The moment of [`crate::source::Source::timeout`] has come. Harmless when it has not.
    Timer,
    /// Every lane is open.
    LanesOpen,
    /// From now on no write of the guest is missed.
    TrackingStarted,
    /// The lanes make progress in the current round; optional, at any pace.
    Moving(RoundSent),
    /// All pages of the round and its barriers were handed to every lane's socket.
    PagesSent(RoundSent),
    /// Pages written since tracking started or since the last fetch; they are clean now.
    Dirty(PageSet),
    /// The guest stands still and nothing writes its memory.
    Paused,
    /// Its state.
    Saved(Vec<Record>),
    /// A record of this kind is durable.
    Journaled(JournalRecordKind),
    /// The guest runs on here.
    Resumed,
    /// The control channel was lost, in words. A lost lane is `HostFailed` of [`HostTask::Pages`], so that the peer can be
    /// told why.
    LinkLost(String),
    /// The peer sent bytes that are no message, or lane frames that break the protocol; see [`crate::error::Coded`].
    PeerFault {
        /// The error's code.
        code: Code,
        /// The error's words.
        words: String,
    },
    /// The host or the driver could not do what it was asked.
    HostFailed {
        /// What it was doing.
        task: HostTask,
        /// Why it failed.
        words: String,
    },
    /// Someone asks for the migration to be cancelled, and why.
    Cancel(String),
    /// The answer to `Settle`.
    Verdict(VerdictAnswer),
}

/// What the source's driver has to do next.
#[derive(Debug, Clone, PartialEq)]
pub enum SourceAction {
    /// Send this on the control channel.
    Send(Message),
    /// Open lanes; answer `LanesOpen`.
    OpenLanes {
        /// How many.
        lanes: u16,
        /// Without TLS.
        plaintext: bool,
        /// With a keyed hash of pages, where the link can do so.
        page_check: bool,
        /// What each must show.
        token: LaneToken,
    },
    /// Note every write of the guest; answer `TrackingStarted`.
    StartTracking,
    /// Answer `Dirty`.
    FetchDirty,
    /// Send these pages, then a barrier, on the lanes; answer `PagesSent`. After the last round, end the lanes.
    SendPages {
        /// Which round, from 1.
        round: u32,
        /// Which pages; may be none.
        pages: PageSet,
        /// Whether it is the last one.
        last: bool,
    },
    /// Pause the guest; answer `Paused`.
    Pause,
    /// Save its state; answer `Saved`.
    Save,
    /// Make this durable; answer `Journaled`.
    Journal(JournalRecord),
    /// Let the guest run on here; answer `Resumed`.
    Resume,
    /// Stop noting writes; no answer.
    StopTracking,
    /// Connect to the destination anew and send `VerdictAsk` with this flag; answer `Verdict` or `LinkLost`. Comes again
    /// and again until there is a verdict.
    Settle {
        /// The flag of [`Message::VerdictAsk`].
        released: bool,
    },
    /// The guest runs there: stop the VMM here, without ever running it again. No answer.
    Release,
    /// Send what is queued, then close the control channel and the lanes.
    CloseLink,
    /// The end; nothing follows.
    Done(SourceOutcome),
}

/// How a migration ended for its source.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub enum SourceOutcome {
    /// The guest runs at the destination.
    Committed,
    /// The guest stays here.
    Aborted {
        /// Why, as a number.
        code: Code,
        /// Why, in words.
        words: String,
        /// Who gave up.
        by: Side,
        /// Whether it is as it was before: false when it was paused for this and could not be resumed, or has ended. A guest
        /// that its operator had paused stands still as before.
        guest_runs: bool,
    },
    /// The destination refused; nothing was changed.
    Refused(Refusal),
    /// Released, and the destination could not be asked in [`SourceConfig::in_doubt_max`]. The guest stands still here.
    InDoubt {
        /// What is known.
        words: String,
    },
}

/// What happened at the destination.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum DestinationEvent {
    /// A message came. A `VerdictAsk` comes on a connection of its own, which then is the link.
    Message(Message),
    /// The moment of [`crate::destination::Destination::timeout`] has come. Harmless when it has not.
    Timer,
    /// Answer to `Check`: the guest fits.
    Admitted,
    /// Answer to `Check`: it does not.
    Refuse(Refusal),
    /// The VMM is there, its memory mapped and populated as configured.
    Prepared {
        /// How long populating took, in milliseconds.
        populated_ms: u32,
    },
    /// Every lane that was agreed on is open.
    LanesJoined,
    /// The lanes make progress; optional, at any pace.
    Arriving,
    /// Every lane reached this round's barrier and all its pages are in place.
    RoundArrived {
        /// Which round.
        round: u32,
        /// Pages of it whose bytes came.
        pages: u64,
        /// Pages of it that came as "all zero".
        zero_pages: u64,
        /// Page bytes of it.
        bytes: u64,
    },
    /// The state is in the VMM.
    Loaded,
    /// A record of this kind is durable.
    Journaled(JournalRecordKind),
    /// The guest runs here, or is held here.
    Resumed,
    /// The first round of announcements left.
    Announced {
        /// What left, one line each.
        announcements: Vec<String>,
        /// CPU time of agent and VMM for this migration, in microseconds.
        cpu_us: u64,
        /// Whether the guest answered since.
        reached: Reached,
    },
    /// The control channel was lost, in words. A lost lane is `HostFailed` of [`HostTask::Pages`], so that the peer can be
    /// told why.
    LinkLost(String),
    /// The peer sent bytes that are no message, or lane frames that break the protocol; see [`crate::error::Coded`].
    PeerFault {
        /// The error's code.
        code: Code,
        /// The error's words.
        words: String,
    },
    /// The host or the driver could not do what it was asked.
    HostFailed {
        /// What it was doing.
        task: HostTask,
        /// Why it failed.
        words: String,
    },
    /// Someone asks for the migration to be cancelled, and why.
    Cancel(String),
}

/// What the destination's driver has to do next.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum DestinationAction {
    /// See whether this guest fits; answer `Admitted` or `Refuse`.
    Check(Box<VmDescription>),
    /// Send this on the control channel.
    Send(Message),
    /// Make the VMM for the checked guest; answer `Prepared`.
    Prepare {
        /// With a keyed hash of pages, where the link can do so.
        page_check: bool,
    },
    /// Accept this many lanes; answer `LanesJoined`.
    AcceptLanes {
        /// How many.
        lanes: u16,
        /// Without TLS.
        plaintext: bool,
        /// What each must show.
        token: LaneToken,
    },
    /// Load this state into the VMM; answer `Loaded`.
    Load {
        /// The state.
        records: Vec<Record>,
        /// Whether the guest stands still and is to do so here: to be remembered with it, before it is loaded.
        paused: bool,
    },
    /// Make this durable; answer `Journaled`.
    Journal(JournalRecord),
    /// Let the guest run; answer `Resumed`.
    Resume,
    /// In place of `Resume` for a guest that is to stand still: it is this host's from now on; answer `Resumed`.
    Hold,
    /// Tell the network where the guest is now; answer `Announced` after the first round. Of a guest that stands still
    /// nothing is told: it would not answer.
    Announce,
    /// Kill the incoming VMM and give back what it had; no answer.
    Discard,
    /// Send what is queued, then close the control channel and the lanes.
    CloseLink,
    /// The end; nothing follows.
    Done(DestinationOutcome),
}

/// How a migration ended for its destination.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum DestinationOutcome {
    /// The guest runs here.
    Running,
    /// The guest was refused; nothing was changed.
    Refused(Refusal),
    /// The incoming guest was thrown away.
    Discarded {
        /// Why, as a number.
        code: Code,
        /// Why, in words.
        words: String,
        /// Who gave up.
        by: Side,
        /// Whether the journal says so durably. Before `ready` that is not needed; after it, false means that the
        /// journal could not be written, and the agent owes the record.
        durable: bool,
        /// Whether the VMM is left as it is, because Ready was said and `discarded` is not durable: the agent has to decide again.
        left: bool,
    },
    /// Committed, and the VMM could not be brought to run the guest. It is on no host until someone acts.
    Stuck {
        /// Why.
        words: String,
    },
}
