//! Both transition tables as data: in which state which input leads where. The engine asks them before it acts, so
//! they are not a picture of it but a part of it. They say where, not what is done on the way.

use crate::commit::JournalRecordKind;
use crate::event::{DestinationEvent, SourceEvent};
use crate::wire::message::Message;
use serde::{Deserialize, Serialize};
use std::fmt::{self, Write};

/// What the table says about one state and one input.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Rule<S: 'static> {
    /// It is acted on, and leads to one of these.
    Next(&'static [S]),
    /// It comes too late or changes nothing.
    Ignored,
    /// The peer broke the protocol; leads to one of these.
    Violation(&'static [S]),
    /// The own host answered what was not asked; leads to one of these.
    Misuse(&'static [S]),
}

macro_rules! nouns {
    ($(#[doc = $doc:literal])+ $name:ident { $($(#[doc = $text:literal])+ $variant:ident,)+ }) => {
        $(#[doc = $doc])+
        #[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
        #[serde(rename_all = "kebab-case")]
        pub enum $name { $($(#[doc = $text])+ $variant,)+ }

        impl $name {
            /// All of them, in order.
            pub const ALL: &'static [$name] = &[$($name::$variant),+];

            /// Its name.
            #[must_use]
            pub fn name(self) -> &'static str {
                match self { $($name::$variant => stringify!($variant),)+ }
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(self.name())
            }
        }
    };
}

nouns! {
    /// State of a source.
    SourceState {
        /// `started` is being written.
        Starting,
        /// Hello is sent.
        Preamble,
        /// Accepted; the destination makes its VMM.
        Preparing,
        /// Lanes are being opened.
        OpeningLanes,
        /// Dirty tracking is being started.
        Tracking,
        /// Rounds while the guest runs.
        Precopy,
        /// The guest is being paused.
        Stopping,
        /// Its state is being saved, then the last dirty pages are read.
        Saving,
        /// The last pages and the records are on their way.
        LastRound,
        /// Everything is sent; the destination loads it.
        Finalizing,
        /// `released` is being written: from here on the guest is never resumed without the destination's word.
        Releasing,
        /// Commit is sent.
        Committing,
        /// It was released and the destination's answer is missing: it is being asked.
        InDoubt,
        /// The destination has discarded: the guest comes back.
        GivingBack,
        /// The guest runs at the destination.
        Committed,
        /// Given up before the commit point: the guest is resumed, if it was paused.
        Aborting,
        /// Over.
        Done,
    }
}

nouns! {
    /// State of a destination.
    DestinationState {
        /// Waits for Hello.
        Listening,
        /// The host looks whether the guest fits.
        Checking,
        /// The VMM is being made.
        Preparing,
        /// `ready` is being written.
        Noting,
        /// Lanes are being opened.
        Joining,
        /// Pages and records come in.
        Receiving,
        /// The VMM loads the state.
        Loading,
        /// Waits for Commit.
        Ready,
        /// Committed: the guest is being resumed.
        Resuming,
        /// The guest runs here; it is announced and written down.
        Running,
        /// `discarded` is being written.
        Discarding,
        /// Over.
        Done,
    }
}

nouns! {
    /// What a source's table tells apart in its events.
    SourceInput {
        /// The message Accept.
        Accept,
        /// The message Refuse.
        Refuse,
        /// The message Prepared.
        Prepared,
        /// The message RoundDone.
        RoundDone,
        /// The message Ready.
        Ready,
        /// The message Running.
        Running,
        /// The message Finished.
        Finished,
        /// The message Abort.
        Abort,
        /// A message that only a source sends.
        Strange,
        /// The state's deadline has passed.
        Deadline,
        /// Lanes are open.
        LanesOpen,
        /// Tracking has started.
        TrackingStarted,
        /// Pages are moving.
        Moving,
        /// A round was sent.
        PagesSent,
        /// Dirty pages.
        Dirty,
        /// The guest stands still.
        Paused,
        /// Its state.
        Saved,
        /// `started` is durable.
        JournaledStarted,
        /// `released` is durable.
        JournaledReleased,
        /// `running` is durable.
        JournaledRunning,
        /// `aborted` is durable.
        JournaledAborted,
        /// The guest runs here.
        Resumed,
        /// The link was lost.
        LinkLost,
        /// The peer sent what cannot be read.
        PeerFault,
        /// The host failed.
        HostFailed,
        /// Someone wants it cancelled.
        Cancel,
        /// The destination's verdict.
        Verdict,
    }
}

nouns! {
    /// What a destination's table tells apart in its events.
    DestinationInput {
        /// The message Hello.
        Hello,
        /// The message Record.
        Record,
        /// The message RecordsEnd.
        RecordsEnd,
        /// The message Commit.
        Commit,
        /// The message VerdictAsk.
        VerdictAsk,
        /// The message Abort.
        Abort,
        /// A message that only a destination sends.
        Strange,
        /// The state's deadline has passed.
        Deadline,
        /// The guest fits.
        Admitted,
        /// The guest does not fit.
        Refused,
        /// The VMM is there.
        Prepared,
        /// Lanes are open.
        LanesJoined,
        /// Pages are coming.
        Arriving,
        /// A round is complete.
        RoundArrived,
        /// The state is loaded.
        Loaded,
        /// `ready` is durable.
        JournaledReady,
        /// `running` is durable.
        JournaledRunning,
        /// `discarded` is durable.
        JournaledDiscarded,
        /// The guest runs here.
        Resumed,
        /// The first announcements left.
        Announced,
        /// The link was lost.
        LinkLost,
        /// The peer sent what cannot be read.
        PeerFault,
        /// The host failed.
        HostFailed,
        /// Someone wants it cancelled.
        Cancel,
    }
}

impl SourceInput {
    /// What `event` is to the table. Keepalives never come here.
    #[must_use]
    pub fn of(event: &SourceEvent) -> SourceInput {
        match event {
            SourceEvent::Message(message) => SourceInput::of_message(message),
            SourceEvent::Timer => SourceInput::Deadline,
            SourceEvent::LanesOpen => SourceInput::LanesOpen,
            SourceEvent::TrackingStarted => SourceInput::TrackingStarted,
            SourceEvent::Moving(_) => SourceInput::Moving,
            SourceEvent::PagesSent(_) => SourceInput::PagesSent,
            SourceEvent::Dirty(_) => SourceInput::Dirty,
            SourceEvent::Paused => SourceInput::Paused,
            SourceEvent::Saved(_) => SourceInput::Saved,
            SourceEvent::Journaled(kind) => match kind {
                JournalRecordKind::Released => SourceInput::JournaledReleased,
                JournalRecordKind::Running => SourceInput::JournaledRunning,
                JournalRecordKind::Aborted => SourceInput::JournaledAborted,
                _ => SourceInput::JournaledStarted,
            },
            SourceEvent::Resumed => SourceInput::Resumed,
            SourceEvent::LinkLost(_) => SourceInput::LinkLost,
            SourceEvent::PeerFault { .. } => SourceInput::PeerFault,
            SourceEvent::HostFailed { .. } => SourceInput::HostFailed,
            SourceEvent::Cancel(_) => SourceInput::Cancel,
            SourceEvent::Verdict(_) => SourceInput::Verdict,
        }
    }

    fn of_message(message: &Message) -> SourceInput {
        match message {
            Message::Accept(_) => SourceInput::Accept,
            Message::Refuse(_) => SourceInput::Refuse,
            Message::Prepared { .. } => SourceInput::Prepared,
            Message::RoundDone { .. } => SourceInput::RoundDone,
            Message::Ready(_) => SourceInput::Ready,
            Message::Running(_) => SourceInput::Running,
            Message::Finished(_) => SourceInput::Finished,
            Message::Abort { .. } => SourceInput::Abort,
            Message::Verdict(_) => SourceInput::Verdict,
            _ => SourceInput::Strange,
        }
    }

    fn is_message(self) -> bool {
        self <= SourceInput::Strange || self == SourceInput::Verdict
    }
}

impl DestinationInput {
    /// What `event` is to the table. Keepalives never come here.
    #[must_use]
    pub fn of(event: &DestinationEvent) -> DestinationInput {
        match event {
            DestinationEvent::Message(message) => match message {
                Message::Hello(_) => DestinationInput::Hello,
                Message::Record(_) => DestinationInput::Record,
                Message::RecordsEnd { .. } => DestinationInput::RecordsEnd,
                Message::Commit => DestinationInput::Commit,
                Message::VerdictAsk { .. } => DestinationInput::VerdictAsk,
                Message::Abort { .. } => DestinationInput::Abort,
                _ => DestinationInput::Strange,
            },
            DestinationEvent::Timer => DestinationInput::Deadline,
            DestinationEvent::Admitted => DestinationInput::Admitted,
            DestinationEvent::Refuse(_) => DestinationInput::Refused,
            DestinationEvent::Prepared { .. } => DestinationInput::Prepared,
            DestinationEvent::LanesJoined => DestinationInput::LanesJoined,
            DestinationEvent::Arriving => DestinationInput::Arriving,
            DestinationEvent::RoundArrived { .. } => DestinationInput::RoundArrived,
            DestinationEvent::Loaded => DestinationInput::Loaded,
            DestinationEvent::Journaled(kind) => match kind {
                JournalRecordKind::Running => DestinationInput::JournaledRunning,
                JournalRecordKind::Discarded => DestinationInput::JournaledDiscarded,
                _ => DestinationInput::JournaledReady,
            },
            DestinationEvent::Resumed => DestinationInput::Resumed,
            DestinationEvent::Announced { .. } => DestinationInput::Announced,
            DestinationEvent::LinkLost(_) => DestinationInput::LinkLost,
            DestinationEvent::PeerFault { .. } => DestinationInput::PeerFault,
            DestinationEvent::HostFailed { .. } => DestinationInput::HostFailed,
            DestinationEvent::Cancel(_) => DestinationInput::Cancel,
        }
    }

    fn is_message(self) -> bool {
        self <= DestinationInput::Strange
    }
}

impl SourceState {
    /// Whether the guest may still be taken back without asking anyone.
    #[must_use]
    pub fn is_revocable(self) -> bool {
        self < SourceState::Releasing
    }

    /// Whether the guest stands still in this state, or was told to.
    #[must_use]
    pub fn is_stopped(self) -> bool {
        (SourceState::Stopping..=SourceState::GivingBack).contains(&self)
    }

    /// Whether it may have given the guest away: a cancel has no effect any more.
    #[must_use]
    pub fn is_committing(self) -> bool {
        (SourceState::Releasing..=SourceState::Committed).contains(&self)
    }
}

/// The source's table: what each state waits for. What may happen anywhere is in [`source_rule`].
pub const SOURCE_TABLE: &[(SourceState, SourceInput, &[SourceState])] = {
    use SourceInput as I;
    use SourceState::{
        Aborting, Committed, Committing, Done, Finalizing, GivingBack, InDoubt, LastRound, OpeningLanes, Preamble, Precopy,
        Preparing, Releasing, Saving, Starting, Stopping, Tracking,
    };
    &[
        (Starting, I::JournaledStarted, &[Preamble]),
        (Preamble, I::Accept, &[Preparing, Aborting]),
        (Preamble, I::Refuse, &[Aborting]),
        (Preparing, I::Prepared, &[OpeningLanes]),
        (OpeningLanes, I::LanesOpen, &[Tracking, Stopping, Saving]),
        (Tracking, I::TrackingStarted, &[Precopy]),
        (Precopy, I::Moving, &[Precopy]),
        (Precopy, I::PagesSent, &[Precopy, Aborting]),
        (Precopy, I::RoundDone, &[Precopy, Aborting]),
        (Precopy, I::Dirty, &[Precopy, Stopping, Aborting]),
        (Stopping, I::Paused, &[Saving]),
        (Saving, I::Saved, &[Saving, LastRound, Aborting]),
        (Saving, I::Dirty, &[LastRound, Aborting]),
        (LastRound, I::Moving, &[LastRound]),
        (LastRound, I::PagesSent, &[Finalizing, Aborting]),
        (LastRound, I::RoundDone, &[LastRound, Aborting]),
        (LastRound, I::Ready, &[Releasing, Aborting]),
        (Finalizing, I::Moving, &[Finalizing]),
        (Finalizing, I::RoundDone, &[Finalizing, Aborting]),
        (Finalizing, I::Ready, &[Releasing, Aborting]),
        (Releasing, I::JournaledReleased, &[Committing, InDoubt]),
        (Releasing, I::PagesSent, &[Releasing]),
        (Releasing, I::HostFailed, &[Releasing, InDoubt]),
        (Releasing, I::Deadline, &[InDoubt]),
        (Releasing, I::LinkLost, &[Releasing]),
        (Releasing, I::PeerFault, &[Releasing]),
        (Releasing, I::Abort, &[Releasing]),
        (Committing, I::Running, &[Committed]),
        (Committing, I::PagesSent, &[Committing]),
        (Committing, I::HostFailed, &[Committing]),
        (Committing, I::Deadline, &[InDoubt]),
        (Committing, I::LinkLost, &[InDoubt]),
        (Committing, I::PeerFault, &[InDoubt]),
        (Committing, I::Abort, &[InDoubt]),
        (InDoubt, I::Verdict, &[Committed, GivingBack, InDoubt]),
        (InDoubt, I::Running, &[Committed]),
        (InDoubt, I::LinkLost, &[InDoubt]),
        (InDoubt, I::Deadline, &[InDoubt, Done]),
        (GivingBack, I::JournaledAborted, &[GivingBack, Done]),
        (GivingBack, I::Resumed, &[GivingBack, Done]),
        (GivingBack, I::HostFailed, &[GivingBack, Done]),
        (GivingBack, I::Deadline, &[GivingBack, Done]),
        (Committed, I::JournaledRunning, &[Committed, Done]),
        (Committed, I::Finished, &[Committed, Done]),
        (Committed, I::LinkLost, &[Committed, Done]),
        (Committed, I::PeerFault, &[Committed, Done]),
        (Committed, I::Abort, &[Committed, Done]),
        (Committed, I::PagesSent, &[Committed]),
        (Committed, I::HostFailed, &[Committed]),
        (Committed, I::Deadline, &[Committed, Done]),
        (Aborting, I::JournaledAborted, &[Aborting, Done]),
        (Aborting, I::Resumed, &[Aborting, Done]),
        (Aborting, I::HostFailed, &[Aborting, Done]),
        (Aborting, I::Deadline, &[Aborting, Done]),
    ]
};

/// The destination's table: what each state waits for. What may happen anywhere is in [`destination_rule`].
pub const DESTINATION_TABLE: &[(DestinationState, DestinationInput, &[DestinationState])] = {
    use DestinationInput as I;
    use DestinationState::{
        Checking, Discarding, Done, Joining, Listening, Loading, Noting, Preparing, Ready, Receiving, Resuming, Running,
    };
    &[
        (Listening, I::Hello, &[Checking, Done]),
        (Checking, I::Admitted, &[Preparing]),
        (Checking, I::Refused, &[Done]),
        (Preparing, I::Prepared, &[Noting]),
        (Noting, I::JournaledReady, &[Joining]),
        (Joining, I::LanesJoined, &[Receiving]),
        // A guest that goes at once sends its state as soon as its own end of the lanes is open.
        (Joining, I::Record, &[Joining, Discarding]),
        (Joining, I::RecordsEnd, &[Joining, Discarding]),
        (Receiving, I::Arriving, &[Receiving]),
        (Receiving, I::RoundArrived, &[Receiving, Loading, Discarding]),
        (Receiving, I::Record, &[Receiving, Discarding]),
        (Receiving, I::RecordsEnd, &[Receiving, Loading, Discarding]),
        (Loading, I::Loaded, &[Ready]),
        (Ready, I::Commit, &[Resuming]),
        (Ready, I::VerdictAsk, &[Resuming, Discarding]),
        (Ready, I::LinkLost, &[Ready]),
        (Ready, I::HostFailed, &[Ready, Discarding]),
        (Resuming, I::Resumed, &[Running]),
        (Resuming, I::VerdictAsk, &[Resuming]),
        (Resuming, I::LinkLost, &[Resuming]),
        (Resuming, I::HostFailed, &[Resuming]),
        (Resuming, I::Deadline, &[Resuming, Done]),
        (Running, I::Announced, &[Running, Done]),
        (Running, I::JournaledRunning, &[Running, Done]),
        (Running, I::VerdictAsk, &[Running]),
        (Running, I::LinkLost, &[Running]),
        (Running, I::HostFailed, &[Running, Done]),
        (Running, I::Deadline, &[Running, Done]),
        (Discarding, I::JournaledDiscarded, &[Done]),
        (Discarding, I::VerdictAsk, &[Discarding]),
        (Discarding, I::LinkLost, &[Discarding]),
        (Discarding, I::HostFailed, &[Discarding]),
        (Discarding, I::Deadline, &[Discarding, Done]),
    ]
};

fn row<S: PartialEq + Copy, I: PartialEq + Copy>(table: &[(S, I, &'static [S])], state: S, input: I) -> Option<&'static [S]> {
    table.iter().find(|(s, i, _)| *s == state && *i == input).map(|(_, _, next)| *next)
}

/// What the source does with `input` in `state`.
#[must_use]
pub fn source_rule(state: SourceState, input: SourceInput) -> Rule<SourceState> {
    use SourceInput as I;
    use SourceState as S;
    if let Some(next) = row(SOURCE_TABLE, state, input) {
        return Rule::Next(next);
    }
    if state.is_revocable() {
        return match input {
            I::Abort | I::Deadline | I::LinkLost | I::PeerFault | I::HostFailed | I::Cancel => Rule::Next(&[S::Aborting]),
            // Told by the lanes at their own pace, so it may come late.
            I::Moving => Rule::Ignored,
            _ if input.is_message() => Rule::Violation(&[S::Aborting]),
            _ => Rule::Misuse(&[S::Aborting]),
        };
    }
    match state {
        S::Releasing if input.is_message() && input != I::RoundDone => Rule::Violation(&[S::Releasing]),
        S::Committing if input.is_message() && input != I::RoundDone => Rule::Violation(&[S::InDoubt]),
        _ => Rule::Ignored,
    }
}

/// What the destination does with `input` in `state`.
#[must_use]
pub fn destination_rule(state: DestinationState, input: DestinationInput) -> Rule<DestinationState> {
    use DestinationInput as I;
    use DestinationState as S;
    if let Some(next) = row(DESTINATION_TABLE, state, input) {
        return Rule::Next(next);
    }
    let end: &'static [S] = match state {
        // Before `ready` nothing was promised; from `Noting` on the journal has to say that it is over.
        S::Listening | S::Checking | S::Preparing => &[S::Done],
        S::Noting | S::Joining | S::Receiving | S::Loading | S::Ready => &[S::Discarding],
        S::Resuming | S::Running | S::Discarding | S::Done => return Rule::Ignored,
    };
    match input {
        I::VerdictAsk if state == S::Listening => Rule::Violation(end),
        I::VerdictAsk => Rule::Next(&[S::Discarding]),
        I::Abort | I::Deadline | I::LinkLost | I::PeerFault | I::HostFailed | I::Cancel => Rule::Next(end),
        // Told by the lanes at their own pace, so it may come late.
        I::Arriving => Rule::Ignored,
        _ if input.is_message() => Rule::Violation(end),
        _ => Rule::Misuse(end),
    }
}

/// A table as a graph for `dot`: one edge for each pair of states, labelled with its inputs. Violations and misuse
/// lead where `LinkLost` leads and are left out.
fn dot<S, I>(name: &str, states: &[S], inputs: &[I], rule: impl Fn(S, I) -> Rule<S>) -> String
where
    S: Copy + PartialEq + fmt::Display + 'static,
    I: Copy + fmt::Display,
{
    let mut text = format!("digraph {name} {{\n    node [shape=box];\n");
    for from in states {
        for to in states {
            let leads = |input: &&I| matches!(rule(*from, **input), Rule::Next(next) if next.contains(to)) && from != to;
            let labels: Vec<String> = inputs.iter().filter(leads).map(ToString::to_string).collect();
            if !labels.is_empty() {
                let _ = writeln!(text, "    {from} -> {to} [label=\"{}\"];", labels.join("\\n"));
            }
        }
    }
    text.push_str("}\n");
    text
}

/// The source's table as a graph for `dot`.
#[must_use]
pub fn source_dot() -> String {
    dot("source", SourceState::ALL, SourceInput::ALL, source_rule)
}

/// The destination's table as a graph for `dot`.
#[must_use]
pub fn destination_dot() -> String {
    dot("destination", DestinationState::ALL, DestinationInput::ALL, destination_rule)
}
