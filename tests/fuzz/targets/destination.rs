//! The destination's whole state machine: any events in any order, with time that jumps. As `source`.

use super::Taken;
use super::source::{jump, task, vm};
use limosa_proto::commit::JournalRecordKind;
use limosa_proto::destination::{Destination, DestinationAction, DestinationConfig, DestinationEvent};
use limosa_proto::identity::{Generation, HostId, MigrationId};
use limosa_proto::record::Record;
use limosa_proto::time::Instant;
use limosa_proto::wire::code::Code;
use limosa_proto::wire::frame::LaneToken;
use limosa_proto::wire::message::{Hello, Message, Reached, Refusal, VerdictAnswer};
use std::collections::VecDeque;

/// Timers that may come before a silent world has ended.
const SILENT_TIMERS_MAX: usize = 2_000;

/// What was asked of the host, and what was heard.
#[derive(Default)]
struct Watch {
    asked: VecDeque<DestinationAction>,
    ready: bool,
    committed: bool,
    taken: bool,
    discarding: bool,
    discarded: bool,
    runs: bool,
    done: bool,
}

impl Watch {
    fn heard(&mut self, event: &DestinationEvent) {
        match event {
            DestinationEvent::Journaled(JournalRecordKind::Ready) => self.ready = true,
            DestinationEvent::Journaled(JournalRecordKind::Discarded) => self.discarded = true,
            DestinationEvent::Message(Message::Commit | Message::VerdictAsk { released: true }) => self.committed = true,
            DestinationEvent::Resumed => self.runs = true,
            _ => {}
        }
    }

    fn takes(&mut self, action: DestinationAction) {
        assert!(!self.done, "{action:?} after the end");
        match &action {
            DestinationAction::Send(message) => {
                let body = message.emit().expect("what is sent fits");
                assert!(Message::parse(message.kind(), &body).is_ok(), "{message:?} cannot be read");
                match message {
                    Message::Ready(_) => assert!(self.ready, "Ready before it is durable"),
                    Message::Running(_) | Message::Verdict(VerdictAnswer::Running) => assert!(self.taken && self.runs),
                    Message::Verdict(VerdictAnswer::Discarded) => assert!(self.discarded && !self.taken),
                    _ => {}
                }
            }
            DestinationAction::Journal(record) => match record.kind {
                JournalRecordKind::Discarded => {
                    assert!(!self.taken, "discarded after it was resumed");
                    self.discarding = true;
                }
                JournalRecordKind::Running => assert!(self.taken && self.runs),
                _ => {}
            },
            DestinationAction::Resume | DestinationAction::Hold => {
                assert!(self.ready && self.committed && !self.discarding, "resumed without a commit, or after discarded");
                self.taken = true;
            }
            DestinationAction::Announce => assert!(self.taken && self.runs, "announced before it runs"),
            DestinationAction::Discard => assert!(!self.taken, "thrown away after it was resumed"),
            DestinationAction::Done(_) => self.done = true,
            _ => {}
        }
        self.asked.push_back(action);
    }

    /// The good answer to what was asked first.
    fn answer(&mut self) -> Option<DestinationEvent> {
        Some(match self.asked.pop_front()? {
            DestinationAction::Check(_) => DestinationEvent::Admitted,
            DestinationAction::Prepare { .. } => DestinationEvent::Prepared { populated_ms: 0 },
            DestinationAction::AcceptLanes { .. } => DestinationEvent::LanesJoined,
            DestinationAction::Load { .. } => DestinationEvent::Loaded,
            DestinationAction::Journal(record) => DestinationEvent::Journaled(record.kind),
            DestinationAction::Resume | DestinationAction::Hold => DestinationEvent::Resumed,
            DestinationAction::Announce => announced(1),
            _ => return None,
        })
    }
}

fn announced(lines: u8) -> DestinationEvent {
    let announcements = vec!["x".repeat(usize::from(lines)); usize::from(lines)];
    DestinationEvent::Announced { announcements, cpu_us: u64::MAX, reached: Reached::default() }
}

fn message(taken: &mut Taken<'_>) -> Option<Message> {
    Some(match taken.u8()? % 10 {
        0 => {
            let (lanes, plaintext_lanes) = (u16::from(taken.u8()?), false);
            Message::Hello(Box::new(Hello {
                versions: limosa_proto::wire::version::offer(),
                vm: vm(),
                lanes,
                plaintext_lanes,
                link: "tcp".into(),
                page_check: true,
                downtime_target_ms: 1,
                downtime_ms_max: 1,
                keepalive_ms: 1,
                source_build: String::new(),
            }))
        }
        1 => Message::Record(Record { kind: 1, version: 1, instance: 0, bytes: taken.chunk().to_vec() }),
        2 => Message::RecordsEnd {
            count: u32::from(taken.u8()?),
            bytes: u64::from(taken.u8()?),
            last_round: u32::from(taken.u8()?),
            paused: taken.u8()? % 2 == 1,
        },
        3 => Message::Commit,
        4 => Message::VerdictAsk { released: taken.u8()? % 2 == 1 },
        5 => Message::Abort { code: Code::Cancelled, words: "enough".into() },
        6 => Message::Keepalive { nonce: 1 },
        7 => Message::Prepared { populated_ms: 1 },
        _ => {
            let kind = u16::from(taken.u8()?);
            Message::parse(kind, taken.chunk()).ok()?
        }
    })
}

fn event(watch: &mut Watch, taken: &mut Taken<'_>, number: u8) -> Option<DestinationEvent> {
    use JournalRecordKind::{Discarded, Ready, Running};
    Some(match number % 32 {
        0..=7 => watch.answer()?,
        8..=17 => DestinationEvent::Message(message(taken)?),
        18 | 19 => {
            let (round, pages) = (u32::from(taken.u8()?), u64::from(taken.u8()?) << 50);
            DestinationEvent::RoundArrived { round, pages, zero_pages: pages, bytes: u64::MAX }
        }
        20 => DestinationEvent::LinkLost("lost".into()),
        21 => DestinationEvent::PeerFault { code: Code::Malformed, words: "nonsense".into() },
        22 => DestinationEvent::HostFailed { task: task(taken.u8()?), words: "no".into() },
        23 => DestinationEvent::Cancel("enough".into()),
        24 => DestinationEvent::Journaled(*[Ready, Running, Discarded].get(usize::from(taken.u8()? % 3))?),
        25 => DestinationEvent::Refuse(Refusal::one(Code::NoRoom, "no")),
        26 => DestinationEvent::Arriving,
        27 => DestinationEvent::Resumed,
        28 => announced(taken.u8()?),
        29 => DestinationEvent::HostFailed { task: limosa_proto::event::HostTask::Journal(Discarded), words: "no".into() },
        30 => DestinationEvent::LanesJoined,
        _ => DestinationEvent::Timer,
    })
}

/// One byte an event with the time before it, and what that event needs.
pub(super) fn destination(data: &[u8]) {
    let mut taken = Taken(data);
    let config = DestinationConfig::new(MigrationId([1; 16]), Generation(1), HostId([1; 32]), LaneToken([9; 32]));
    let mut now = Instant::ZERO;
    let mut engine = Destination::new(now, config).expect("the settings are good");
    let mut watch = Watch::default();
    let drain = |engine: &mut Destination, watch: &mut Watch| {
        while let Some(action) = engine.poll() {
            watch.takes(action);
        }
        assert_eq!(engine.is_done(), watch.done);
        assert!(engine.is_done() || engine.timeout().is_some(), "{} has no deadline", engine.state());
    };
    drain(&mut engine, &mut watch);
    while let Some(number) = taken.u8() {
        let Some(event) = event(&mut watch, &mut taken, number) else { continue };
        now = now.after(jump(number));
        if !engine.is_done() {
            watch.heard(&event);
        }
        engine.handle(now, event);
        drain(&mut engine, &mut watch);
    }
    for _ in 0..SILENT_TIMERS_MAX {
        let Some(timeout) = engine.timeout() else { return };
        now = now.max(timeout);
        engine.handle(now, DestinationEvent::Timer);
        drain(&mut engine, &mut watch);
    }
    panic!("in silence the destination stays in {} for ever", engine.state());
}
