//! The source's whole state machine: any events in any order, with time that jumps. Whatever comes, its promises hold, every
//! state has a deadline, and it comes to an end when nothing more is heard.

use super::Taken;
use limosa_proto::bitmap::PageSet;
use limosa_proto::commit::JournalRecordKind;
use limosa_proto::event::HostTask;
use limosa_proto::identity::{Generation, HostId, MigrationId, VmId};
use limosa_proto::memory::{Gpa, MemoryMap, Region};
use limosa_proto::source::{Course, RoundSent, Source, SourceAction, SourceConfig, SourceEvent};
use limosa_proto::time::Instant;
use limosa_proto::wire::code::Code;
use limosa_proto::wire::frame::LaneToken;
use limosa_proto::wire::message::{
    Accept, DestinationReport, Message, ReadyTimes, Refusal, RunningTimes, VerdictAnswer, VmDescription,
};
use std::collections::VecDeque;
use std::time::Duration;

/// Timers that may come before a silent world has ended: an engine in doubt asks once a second, for a minute.
const SILENT_TIMERS_MAX: usize = 2_000;

pub(super) fn vm() -> VmDescription {
    let region = Region { gpa: Gpa(0), bytes: 64 * 4096, page_bytes: 4096 };
    VmDescription {
        id: VmId([1; 16]),
        name: "guest".into(),
        vcpus: 1,
        memory: MemoryMap::new(vec![region]).expect("one region is a memory"),
        nics: vec![],
        disks: vec![],
        vmm: String::new(),
        records: vec![],
        config: vec![],
        cpu: Default::default(),
    }
}

/// What was asked of the host, and what was heard.
#[derive(Default)]
struct Watch {
    asked: VecDeque<SourceAction>,
    doubt: bool,
    released_asked: bool,
    released: bool,
    discarded: bool,
    runs_there: bool,
    done: bool,
}

impl Watch {
    fn heard(&mut self, event: &SourceEvent) {
        match event {
            SourceEvent::Journaled(JournalRecordKind::Released) => self.released = true,
            SourceEvent::Verdict(VerdictAnswer::Discarded) | SourceEvent::Message(Message::Verdict(VerdictAnswer::Discarded)) => {
                self.discarded = true;
            }
            SourceEvent::Verdict(VerdictAnswer::Running)
            | SourceEvent::Message(Message::Running(_) | Message::Verdict(VerdictAnswer::Running)) => self.runs_there = true,
            _ => {}
        }
    }

    fn takes(&mut self, action: SourceAction) {
        assert!(!self.done, "{action:?} after the end");
        let may_be_ours = !self.released_asked && !self.doubt || self.discarded;
        match &action {
            SourceAction::Send(message) => {
                let body = message.emit().expect("what is sent fits");
                assert!(Message::parse(message.kind(), &body).is_ok(), "{message:?} cannot be read");
                assert!(!matches!(message, Message::Commit) || self.released, "Commit before released is durable");
            }
            SourceAction::Journal(record) => match record.kind {
                JournalRecordKind::Released => self.released_asked = true,
                JournalRecordKind::Aborted => assert!(may_be_ours, "aborted after it was released"),
                JournalRecordKind::Running => assert!(self.runs_there, "nobody said that it runs there"),
                _ => {}
            },
            SourceAction::Resume => assert!(may_be_ours, "resumed after it was released"),
            SourceAction::Release => assert!(self.runs_there, "given up before it runs there"),
            SourceAction::Settle { released } => assert!(!released || self.released || self.doubt, "asks as if it were released"),
            SourceAction::SendPages { pages, .. } => assert!(pages.count() <= 64),
            SourceAction::Done(_) => self.done = true,
            _ => {}
        }
        self.asked.push_back(action);
    }

    /// The good answer to what was asked first.
    fn answer(&mut self) -> Option<SourceEvent> {
        Some(match self.asked.pop_front()? {
            SourceAction::OpenLanes { .. } => SourceEvent::LanesOpen,
            SourceAction::StartTracking => SourceEvent::TrackingStarted,
            SourceAction::FetchDirty => SourceEvent::Dirty(PageSet::empty(&vm().memory)),
            SourceAction::SendPages { round, pages, .. } => {
                let pages = pages.count();
                SourceEvent::PagesSent(RoundSent { round, pages, zero_pages: 0, bytes_on_wire: pages * 4096 })
            }
            SourceAction::Pause => SourceEvent::Paused,
            SourceAction::Save => SourceEvent::Saved(vec![]),
            SourceAction::Journal(record) => SourceEvent::Journaled(record.kind),
            SourceAction::Resume => SourceEvent::Resumed,
            _ => return None,
        })
    }
}

const KINDS: [JournalRecordKind; 4] =
    [JournalRecordKind::Started, JournalRecordKind::Released, JournalRecordKind::Running, JournalRecordKind::Aborted];

pub(super) fn task(number: u8) -> HostTask {
    use HostTask as T;
    let kind = |number: u8| KINDS.get(usize::from(number % 4)).copied().unwrap_or(JournalRecordKind::Started);
    let tasks = [
        T::Lanes,
        T::Tracking,
        T::FetchDirty,
        T::Pages,
        T::Pause,
        T::Save,
        T::Resume,
        T::Release,
        T::Check,
        T::Prepare,
        T::Load,
        T::Announce,
        T::Discard,
        T::Guest,
    ];
    tasks.get(usize::from(number)).copied().unwrap_or(T::Journal(kind(number)))
}

/// What the destination says in answer, or at any time.
fn message(taken: &mut Taken<'_>) -> Option<Message> {
    let token = LaneToken([9; 32]);
    Some(match taken.u8()? % 13 {
        0 => Message::Accept(Accept {
            version: 1,
            lanes: 1,
            plaintext_lanes: false,
            page_check: true,
            token,
            keepalive_ms: 1,
            destination_build: String::new(),
        }),
        1 => Message::Prepared { populated_ms: 1 },
        2 => Message::RoundDone { round: u32::from(taken.u8()?) },
        3 => Message::Ready(ReadyTimes { load_us: u64::from(taken.u8()?) << 56 }),
        4 => Message::Running(RunningTimes { resume_us: u64::MAX }),
        5 => Message::Finished(DestinationReport::default()),
        6 => Message::Abort { code: Code::Cancelled, words: "x".repeat(usize::from(taken.u8()?) * 16) },
        7 => Message::Refuse(Refusal::one(Code::NoRoom, "no")),
        8 => Message::Verdict(verdict(taken.u8()?)),
        9 => Message::Keepalive { nonce: 1 },
        10 => Message::Commit,
        11 => Message::VerdictAsk { released: true },
        _ => {
            let kind = u16::from(taken.u8()?);
            Message::parse(kind, taken.chunk()).ok()?
        }
    })
}

fn verdict(number: u8) -> VerdictAnswer {
    let answers = [VerdictAnswer::Running, VerdictAnswer::Discarded, VerdictAnswer::Pending, VerdictAnswer::Unknown];
    answers.get(usize::from(number % 4)).copied().unwrap_or(VerdictAnswer::Unknown)
}

fn event(watch: &mut Watch, taken: &mut Taken<'_>, number: u8) -> Option<SourceEvent> {
    Some(match number % 32 {
        0..=7 => watch.answer()?,
        8..=19 => SourceEvent::Message(message(taken)?),
        20 => SourceEvent::LinkLost("lost".into()),
        21 => SourceEvent::PeerFault { code: Code::Malformed, words: "nonsense".into() },
        22 => SourceEvent::HostFailed { task: task(taken.u8()?), words: "no".into() },
        23 => SourceEvent::Cancel("enough".into()),
        24 => SourceEvent::Verdict(verdict(taken.u8()?)),
        25 => SourceEvent::Journaled(*KINDS.get(usize::from(taken.u8()? % 4))?),
        26 => {
            let mut pages = PageSet::empty(&vm().memory);
            pages.insert(limosa_proto::memory::PageRange { first: u64::from(taken.u8()? % 64), count: 1 });
            SourceEvent::Dirty(pages)
        }
        27 | 28 => {
            let (round, pages) = (u32::from(taken.u8()?), u64::from(taken.u8()?) << 50);
            let sent = RoundSent { round, pages, zero_pages: pages, bytes_on_wire: u64::MAX };
            if number % 32 == 27 { SourceEvent::PagesSent(sent) } else { SourceEvent::Moving(sent) }
        }
        29 => SourceEvent::Saved(vec![limosa_proto::record::Record {
            kind: 1,
            version: 1,
            instance: 0,
            bytes: taken.chunk().to_vec(),
        }]),
        30 => SourceEvent::Resumed,
        _ => SourceEvent::Timer,
    })
}

pub(super) fn jump(number: u8) -> Duration {
    [Duration::ZERO, Duration::from_millis(1), Duration::from_secs(1), Duration::from_secs(400)]
        .get(usize::from(number >> 6))
        .copied()
        .unwrap_or_default()
}

/// The first byte says how it begins; then one byte an event with the time before it, and what that event needs.
pub(super) fn source(data: &[u8]) {
    let mut taken = Taken(data);
    let Some(begins) = taken.u8() else { return };
    let mut config = SourceConfig::new(MigrationId([1; 16]), Generation(1), HostId([2; 32]), vm());
    let courses = [Course::Precopy, Course::Quick, Course::Paused];
    config.course = courses.get(usize::from(begins % 3)).copied().unwrap_or_default();
    config.in_doubt_max = Some(Duration::from_secs(60));
    let mut watch = Watch { doubt: begins & 0x80 != 0, ..Watch::default() };
    let mut now = Instant::ZERO;
    let engine = if watch.doubt { Source::in_doubt(now, config) } else { Source::new(now, config) };
    let mut engine = engine.expect("the settings are good");
    let drain = |engine: &mut Source, watch: &mut Watch| {
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
        engine.handle(now, SourceEvent::Timer);
        drain(&mut engine, &mut watch);
    }
    panic!("in silence the source stays in {} for ever", engine.state());
}
