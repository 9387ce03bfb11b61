//! The destination from Hello until the guest's state is loaded.

use super::ending::us;
use super::{Core, DestinationAction, DestinationEvent, DestinationOutcome, Side, State};
use crate::commit::JournalRecordKind;
use crate::record::{RECORDS_MAX, Record, STATE_BYTES_MAX};
use crate::time::Instant;
use crate::wire::code::Code;
use crate::wire::limits::ROUNDS_MAX;
use crate::wire::message::{Accept, Hello, Message, ReadyTimes, Refusal};
use crate::wire::version;
use std::time::Duration;

/// What the source asked for and what it is granted.
#[derive(Debug, Clone, Hash)]
pub(super) struct Asked {
    version: u16,
    lanes: u16,
    plaintext: bool,
    page_check: bool,
}

/// Rounds and records so far.
#[derive(Debug, Clone, Hash, Default)]
pub(super) struct Receiving {
    rounds: u32,
    records: Vec<Record>,
    record_bytes: usize,
    /// The last round's number, once RecordsEnd came.
    last: Option<u32>,
}

/// `ready` is being written, long before the guest is paused: that the journal is durable costs no downtime.
#[derive(Debug, Clone, Hash)]
pub(super) struct Noting {
    asked: Asked,
    populated_ms: u32,
}

/// The VMM loads the state.
#[derive(Debug, Clone, Hash)]
pub(super) struct Loading {
    since: Instant,
}

/// Hello came, and nothing else can come here.
pub(super) fn listening(core: &mut Core, event: DestinationEvent) -> State {
    let DestinationEvent::Message(Message::Hello(hello)) = event else { return State::Listening };
    core.vm = hello.vm.id;
    core.memory_bytes = hello.vm.memory.bytes();
    match grant(core, &hello) {
        Ok(asked) => {
            core.act(DestinationAction::Check(Box::new(hello.vm)));
            core.patience(core.config.deadlines.answer);
            State::Checking(asked)
        }
        Err(refusal) => refuse(core, refusal),
    }
}

fn grant(core: &Core, hello: &Hello) -> Result<Asked, Refusal> {
    let Some(version) = version::choose(&hello.versions) else {
        let (theirs, ours) = (&hello.versions, version::offer());
        let words = format!(
            "the source ({}) speaks the versions {theirs:?} of the protocol, the destination {ours:?}",
            hello.source_build
        );
        return Err(Refusal::one(Code::Version, words));
    };
    if hello.plaintext_lanes && !core.config.plaintext_allowed {
        let words = "lanes without TLS were asked for; the destination's settings do not allow them";
        return Err(Refusal::one(Code::PlaintextRefused, words));
    }
    if core.memory_bytes > core.config.memory_bytes_max {
        let (wants, most) = (core.memory_bytes >> 20, core.config.memory_bytes_max >> 20);
        return Err(Refusal::one(
            Code::NoRoom,
            format!("the guest has {wants} MiB of memory; the destination takes at most {most} MiB"),
        ));
    }
    let lanes = hello.lanes.clamp(1, core.config.lanes_max);
    let page_check = hello.page_check || core.config.page_check;
    Ok(Asked { version, lanes, plaintext: hello.plaintext_lanes, page_check })
}

fn refuse(core: &mut Core, refusal: Refusal) -> State {
    core.send(Message::Refuse(refusal.clone()));
    core.close_link();
    core.done(DestinationOutcome::Refused(refusal))
}

impl Asked {
    /// The host looked at the guest.
    pub(super) fn on_checked(self, core: &mut Core, event: DestinationEvent) -> State {
        if let DestinationEvent::Refuse(refusal) = event {
            return refuse(core, refusal);
        }
        core.send(Message::Accept(Accept {
            version: self.version,
            lanes: self.lanes,
            plaintext_lanes: self.plaintext,
            page_check: self.page_check,
            token: core.config.token,
            keepalive_ms: u32::try_from(core.config.keepalive.as_millis()).unwrap_or(u32::MAX),
            destination_build: core.config.build.clone(),
        }));
        core.prepared = true;
        core.act(DestinationAction::Prepare { page_check: self.page_check });
        core.patience(core.config.deadlines.prepare);
        State::Preparing(self)
    }

    /// The VMM is there.
    pub(super) fn on_prepared(self, core: &mut Core, event: DestinationEvent) -> State {
        let DestinationEvent::Prepared { populated_ms } = event else { return State::Preparing(self) };
        core.journal(JournalRecordKind::Ready, "");
        core.patience(core.config.deadlines.host);
        State::Noting(Noting { asked: self, populated_ms })
    }
}

impl Noting {
    /// `ready` is durable: from here on only the journal's word ends it.
    pub(super) fn on(self, core: &mut Core) -> State {
        let Noting { asked, populated_ms } = self;
        // Lanes must be welcome before the source is told to open them.
        let token = core.config.token;
        core.act(DestinationAction::AcceptLanes { lanes: asked.lanes, plaintext: asked.plaintext, token });
        core.send(Message::Prepared { populated_ms });
        core.patience(core.config.deadlines.lanes);
        State::Joining(Receiving::default())
    }
}

impl Core {
    /// How long until the next round must be whole, if progress is not told.
    fn round_patience(&mut self) {
        let slow = Duration::from_secs(self.memory_bytes >> 20);
        self.patience(self.config.deadlines.stall.saturating_add(slow));
    }
}

impl Receiving {
    /// Lanes are being opened; the control channel may be quicker than the last of them.
    pub(super) fn on_joining(mut self, core: &mut Core, event: DestinationEvent) -> State {
        let taken = match event {
            DestinationEvent::LanesJoined => {
                core.round_patience();
                return State::Receiving(self);
            }
            DestinationEvent::Message(Message::Record(record)) => self.record(record),
            DestinationEvent::Message(Message::RecordsEnd { count, bytes, last_round, paused }) => {
                core.paused = paused;
                self.end(count, bytes, last_round)
            }
            _ => Ok(()),
        };
        match taken {
            Ok(()) => State::Joining(self),
            Err(words) => State::Joining(self).fail(core, Code::Violation, words, Side::Destination),
        }
    }

    pub(super) fn on(mut self, core: &mut Core, event: DestinationEvent) -> State {
        let mut whole = None;
        let taken = match event {
            DestinationEvent::Arriving => {
                core.patience(core.config.deadlines.stall);
                return State::Receiving(self);
            }
            DestinationEvent::RoundArrived { round, pages, zero_pages, bytes } => {
                core.round_patience();
                whole = Some(round);
                core.report.pages = core.report.pages.saturating_add(pages);
                core.report.zero_pages = core.report.zero_pages.saturating_add(zero_pages);
                core.report.bytes = core.report.bytes.saturating_add(bytes);
                self.arrived(round)
            }
            DestinationEvent::Message(Message::Record(record)) => self.record(record),
            DestinationEvent::Message(Message::RecordsEnd { count, bytes, last_round, paused }) => {
                core.paused = paused;
                self.end(count, bytes, last_round)
            }
            _ => Ok(()),
        };
        if let Err(words) = taken {
            return State::Receiving(self).fail(core, Code::Violation, words, Side::Destination);
        }
        if let Some(round) = whole {
            core.send(Message::RoundDone { round });
        }
        if self.last != Some(self.rounds) {
            return State::Receiving(self);
        }
        core.act(DestinationAction::Load { records: self.records, paused: core.paused });
        core.patience(core.config.deadlines.host);
        State::Loading(Loading { since: core.now })
    }

    fn arrived(&mut self, round: u32) -> Result<(), String> {
        let expected = self.rounds.saturating_add(1);
        if round != expected || round > self.last.unwrap_or(ROUNDS_MAX) {
            return Err(format!("round {round} arrived where {expected} of at most {} is next", self.last.unwrap_or(ROUNDS_MAX)));
        }
        self.rounds = round;
        Ok(())
    }

    fn record(&mut self, record: Record) -> Result<(), String> {
        if self.last.is_some() {
            return Err("the source sent a record after their end".to_owned());
        }
        let bytes = self.record_bytes.saturating_add(record.bytes.len());
        if self.records.len() >= RECORDS_MAX || bytes > STATE_BYTES_MAX {
            return Err(format!("the guest's state is more than {RECORDS_MAX} records or {STATE_BYTES_MAX} bytes"));
        }
        self.record_bytes = bytes;
        self.records.push(record);
        Ok(())
    }

    fn end(&mut self, count: u32, bytes: u64, last_round: u32) -> Result<(), String> {
        let (records, record_bytes) = (self.records.len() as u64, self.record_bytes as u64);
        if u64::from(count) != records || bytes != record_bytes {
            return Err(format!("{records} records of {record_bytes} bytes came where the source says {count} of {bytes}"));
        }
        if self.last.is_some() || last_round < self.rounds || last_round == 0 || last_round > ROUNDS_MAX {
            return Err(format!("the source says that round {last_round} is the last, after {} rounds", self.rounds));
        }
        self.last = Some(last_round);
        Ok(())
    }
}

impl Loading {
    /// The state is in the VMM.
    pub(super) fn on(self, core: &mut Core) -> State {
        core.send(Message::Ready(ReadyTimes { load_us: us(core.now.since(self.since)) }));
        core.patience(core.config.deadlines.ready);
        State::Ready
    }
}
