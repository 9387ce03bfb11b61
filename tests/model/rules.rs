//! What hosts do: the actions of the engines, carried out one task after the other, and what `limosa_proto::recovery` says of
//! everything that no engine carries. The faults that are planted to see that the model finds them are here, marked by
//! [`Planted`]; without one, no rule is this file's own.

use crate::steps::{How, failed, tell_destination, tell_source};
use crate::world::{Carried, Host, MIGRATION, Side, Task, Vmm, Word, World, destination_config, record, source_config};
use limosa_proto::commit::{self, JournalRecordKind};
use limosa_proto::destination::{Destination, DestinationAction, DestinationEvent, DestinationOutcome};
use limosa_proto::error::Coded as _;
use limosa_proto::event::HostTask;
use limosa_proto::identity::Generation;
use limosa_proto::recovery::{self, Answered, Asked, AtStart, Ended, Fate, GuestHere, OutOfPatience, Plugged};
use limosa_proto::release;
use limosa_proto::source::{RoundSent, Source, SourceAction, SourceEvent, SourceOutcome};
use limosa_proto::time::Instant;
use limosa_proto::wire::code::Code;
use limosa_proto::wire::frame::ControlHeader;
use limosa_proto::wire::message::{DestinationReport, Message, Reached, ReadyTimes, ReleasedAnswer, RunningTimes, VerdictAnswer};
use std::sync::Arc;

/// A fault in the rules.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Planted {
    /// A source that loses the link after it has said Commit lets the guest run on.
    ResumeOnLostLink,
    /// A source that loses the link after it has said Commit takes that for success.
    EofIsSuccess,
    /// `released` is said to be durable before it is.
    ReleaseWithoutSync,
    /// `discarded` is said to be durable before it is.
    DiscardWithoutSync,
    /// A destination takes words of another generation.
    AnyGeneration,
    /// "I have not decided" is taken for "I have given it up".
    UndecidedIsDiscarded,
    /// A destination that is restarted lets a guest run that was ready.
    ReadyIsEnough,
    /// The network is told as soon as the destination is ready.
    TellWhenReady,
    /// A source says that it never released what an engine of it may be about to release.
    NeverIsNoPromise,
    /// A destination gives up what its source says it has released.
    ReleasedIsNever,
}

/// The fault in them, if any.
pub(crate) type Rules = Option<Planted>;

const SOURCE: Side = Side::Source;

pub(crate) fn message(word: Word) -> Message {
    match word {
        Word::Ready => Message::Ready(ReadyTimes::default()),
        Word::Commit => Message::Commit,
        Word::Running => Message::Running(RunningTimes::default()),
        Word::Finished => Message::Finished(DestinationReport::default()),
        Word::Abort => Message::Abort { code: Code::Cancelled, words: String::new() },
        Word::Ask { released } => Message::VerdictAsk { released },
        Word::Answer(answer) => Message::Verdict(answer),
        Word::AskReleased => Message::ReleasedAsk,
        Word::Said(answer) => Message::Released(answer),
    }
}

/// The word that `message` is, if the commit has to do with it.
fn word(message: &Message) -> Option<Word> {
    match message {
        Message::Ready(_) => Some(Word::Ready),
        Message::Commit => Some(Word::Commit),
        Message::Running(_) => Some(Word::Running),
        Message::Finished(_) => Some(Word::Finished),
        Message::Abort { .. } => Some(Word::Abort),
        Message::Verdict(answer) => Some(Word::Answer(*answer)),
        _ => None,
    }
}

/// What a driver does about the generation in a message's header.
pub(crate) fn expects(rules: Rules, ours: u64, theirs: u64) -> Result<(), (Code, String)> {
    if rules == Some(Planted::AnyGeneration) {
        return Ok(());
    }
    let generation = Generation(theirs);
    let header = ControlHeader { version: 1, kind: 1, length: 0, crc: 0, migration: MIGRATION, generation };
    header.expect(MIGRATION, Generation(ours)).map_err(|error| (error.code(), String::new()))
}

/// An attempt begins where nothing is under way, and where the destination has no guest of that name.
pub(crate) fn may_begin(world: &World) -> bool {
    let attempts = world.left.attempts > 0;
    attempts && world.is_settled() && matches!((world.source.vmm, world.destination.vmm), (Vmm::Runs(_), Vmm::Gone))
}

/// As far as the commit all goes well: what fails there leaves the guest where it is, and `proto`'s own tests have it.
pub(crate) fn begin(rules: Rules, world: &mut World) {
    world.left.attempts -= 1;
    let generation = commit::next_generation(&world.source.records(), record(JournalRecordKind::Started, 0).vm).0;
    let source = Source::new(Instant::ZERO, source_config(generation)).expect("the settings are good");
    let destination = Destination::new(Instant::ZERO, destination_config(generation)).expect("the settings are good");
    world.source.carried = Some(Carried { engine: Arc::new(source), generation, linked: true, asks: false });
    world.destination.carried = Some(Carried { engine: Arc::new(destination), generation, linked: true, asks: false });
    let mut said = vec![(SOURCE, None)];
    while let Some((to, what)) = said.pop() {
        match (to, what) {
            (Side::Source, what) => {
                let Some(carried) = &mut world.source.carried else { return };
                let engine = Arc::make_mut(&mut carried.engine);
                what.into_iter().for_each(|what| engine.handle(Instant::ZERO, SourceEvent::Message(what)));
                while let Some(action) = engine.poll() {
                    let answer = match action {
                        SourceAction::Send(message) => {
                            said.insert(0, (Side::Destination, Some(message)));
                            continue;
                        }
                        SourceAction::Journal(record) => {
                            world.source.journal.push((record.kind, generation));
                            SourceEvent::Journaled(record.kind)
                        }
                        SourceAction::OpenLanes { .. } => {
                            ready_lanes(world.destination.carried.as_mut());
                            SourceEvent::LanesOpen
                        }
                        SourceAction::Pause => {
                            world.source.vmm = Vmm::Stands;
                            SourceEvent::Paused
                        }
                        SourceAction::Save => SourceEvent::Saved(vec![]),
                        SourceAction::SendPages { round, .. } => {
                            let arrived = DestinationEvent::RoundArrived { round, pages: 1, zero_pages: 0, bytes: 4096 };
                            let Some(carried) = &mut world.destination.carried else { return };
                            Arc::make_mut(&mut carried.engine).handle(Instant::ZERO, arrived);
                            SourceEvent::PagesSent(RoundSent { round, pages: 1, zero_pages: 0, bytes_on_wire: 4096 })
                        }
                        _ => continue,
                    };
                    engine.handle(Instant::ZERO, answer);
                }
            }
            (Side::Destination, what) => {
                let Some(carried) = &mut world.destination.carried else { return };
                let engine = Arc::make_mut(&mut carried.engine);
                what.into_iter().for_each(|what| engine.handle(Instant::ZERO, DestinationEvent::Message(what)));
            }
        }
        receive(rules, world, generation, &mut said);
    }
}

fn ready_lanes(carried: Option<&mut Carried<Destination>>) {
    if let Some(carried) = carried {
        Arc::make_mut(&mut carried.engine).handle(Instant::ZERO, DestinationEvent::LanesJoined);
    }
}

/// The destination as far as the guest's state, which is to be loaded.
fn receive(rules: Rules, world: &mut World, generation: u64, said: &mut Vec<(Side, Option<Message>)>) {
    while let Some(action) = world.destination.carried.as_mut().and_then(|carried| Arc::make_mut(&mut carried.engine).poll()) {
        let answer = match action {
            DestinationAction::Send(message) => {
                said.insert(0, (SOURCE, Some(message)));
                continue;
            }
            DestinationAction::Check(_) => DestinationEvent::Admitted,
            DestinationAction::Prepare { .. } => {
                world.destination.vmm = Vmm::Coming(generation);
                DestinationEvent::Prepared { populated_ms: 0 }
            }
            DestinationAction::Journal(record) => {
                world.destination.journal.push((record.kind, generation));
                DestinationEvent::Journaled(record.kind)
            }
            action => {
                destination_action(rules, world, action);
                continue;
            }
        };
        let Some(carried) = &mut world.destination.carried else { return };
        Arc::make_mut(&mut carried.engine).handle(Instant::ZERO, answer);
    }
}

/// What the source's engine wants done.
pub(crate) fn source_action(rules: Rules, world: &mut World, action: SourceAction) {
    let Some(carried) = &mut world.source.carried else { return };
    let generation = carried.generation;
    match action {
        SourceAction::Send(message) => {
            if let Some(word) = word(&message) {
                world.send(Side::Destination, generation, word);
            }
        }
        SourceAction::Settle { released } => {
            carried.asks = true;
            world.send(Side::Destination, generation, Word::Ask { released });
        }
        SourceAction::CloseLink => carried.linked = false,
        SourceAction::Journal(record) if early(rules, Planted::ReleaseWithoutSync, record.kind) => {
            world.source.tasks.push(Task::Note { kind: record.kind, generation, tell: None });
            tell_source(rules, world, SourceEvent::Journaled(record.kind));
        }
        SourceAction::Journal(record) => world.source.tasks.push(Task::Journal { kind: record.kind, generation }),
        SourceAction::Resume => world.source.tasks.push(Task::Resume { generation }),
        SourceAction::Release => world.source.tasks.push(Task::End),
        SourceAction::Done(outcome) => {
            world.source.carried = None;
            let ended = if outcome == SourceOutcome::Committed { Ended::Gone } else { Ended::Stayed };
            world.source.tasks.push(Task::Owe { generation, ended });
        }
        _ => {}
    }
}

/// Whether this record is said to be durable before it is.
fn early(rules: Rules, planted: Planted, kind: JournalRecordKind) -> bool {
    let which = if planted == Planted::ReleaseWithoutSync { JournalRecordKind::Released } else { JournalRecordKind::Discarded };
    rules == Some(planted) && kind == which
}

/// What the destination's engine wants done.
pub(crate) fn destination_action(rules: Rules, world: &mut World, action: DestinationAction) {
    let Some(carried) = &mut world.destination.carried else { return };
    let generation = carried.generation;
    match action {
        DestinationAction::Send(message) => {
            if let Some(word) = word(&message) {
                world.send(SOURCE, generation, word);
                if word == Word::Ready && rules == Some(Planted::TellWhenReady) {
                    world.destination.tasks.push(Task::Announce { generation });
                }
            }
        }
        DestinationAction::CloseLink => carried.linked = false,
        DestinationAction::Journal(record) if early(rules, Planted::DiscardWithoutSync, record.kind) => {
            world.destination.tasks.push(Task::Note { kind: record.kind, generation, tell: None });
            tell_destination(rules, world, DestinationEvent::Journaled(record.kind));
        }
        DestinationAction::Journal(record) => world.destination.tasks.push(Task::Journal { kind: record.kind, generation }),
        DestinationAction::Load { .. } => world.destination.tasks.push(Task::Load { generation }),
        DestinationAction::Resume => world.destination.tasks.push(Task::Resume { generation }),
        DestinationAction::Announce => world.destination.tasks.push(Task::Announce { generation }),
        DestinationAction::Discard => world.destination.tasks.push(Task::End),
        DestinationAction::Done(outcome) => {
            world.destination.carried = None;
            match outcome {
                DestinationOutcome::Running => world.destination.tasks.push(Task::Owe { generation, ended: Ended::Came }),
                // As after a restart: it is decided again as long as the VMM is there.
                DestinationOutcome::Discarded { left: true, .. } => world.destination.open = Some(generation),
                DestinationOutcome::Discarded { durable: false, .. } => {
                    world.destination.tasks.push(Task::Owe { generation, ended: Ended::GivenUp });
                }
                _ => {}
            }
        }
        _ => {}
    }
}

/// The guest runs at the source.
fn run_at_source(world: &mut World) -> bool {
    if world.source.vmm == Vmm::Gone {
        return false;
    }
    world.source.vmm = Vmm::Runs(0);
    world.facts.old_memory |= world.facts.ran.is_some();
    true
}

/// The guest runs at the destination.
fn run_at_destination(world: &mut World) -> bool {
    let (Vmm::Loaded(generation) | Vmm::Runs(generation)) = world.destination.vmm else { return false };
    world.destination.vmm = Vmm::Runs(generation);
    world.facts.ran = Some(generation);
    true
}

fn told(world: &mut World) {
    world.facts.told_early |= !matches!(world.destination.vmm, Vmm::Runs(_)) && !world.facts.destination_lost;
}

pub(crate) fn source_task(rules: Rules, world: &mut World, how: How) {
    if world.source.tasks.is_empty() {
        return;
    }
    let task = world.source.tasks.remove(0);
    let done = how != How::Failed;
    let event = match task {
        Task::Journal { kind, generation } => {
            let may = commit::may_follow(&world.source.records(), &record(kind, generation));
            world.source.journal.extend((done && may).then_some((kind, generation)));
            world.facts.promise_broken |=
                kind == JournalRecordKind::Released && world.source.never == Some(generation) && done && may;
            let failing = (how != How::Done || !may).then(|| failed(HostTask::Journal(kind)));
            Some((generation, failing, SourceEvent::Journaled(kind)))
        }
        Task::Resume { generation } => {
            let runs = done && run_at_source(world);
            let failing = (!runs || how != How::Done).then(|| failed(HostTask::Resume));
            Some((generation, failing, SourceEvent::Resumed))
        }
        Task::Note { kind, generation, .. } => {
            world.source.journal.extend(done.then_some((kind, generation)));
            None
        }
        Task::Settle { kind, generation, back } => {
            settle(world, (kind, generation), back, how);
            None
        }
        Task::Owe { generation, ended } => {
            owe(&mut world.source, generation, ended, how);
            None
        }
        Task::Promise { generation } => {
            promise(world, generation, how);
            None
        }
        // A VMM that has not plugged in yet is not known; when it does, the journal says what becomes of it.
        Task::Own if world.source.plugged => {
            if !(done && run_at_source(world)) && world.source.vmm != Vmm::Gone {
                // It is tried again.
                world.source.tasks.push(Task::Own);
            }
            None
        }
        Task::End | Task::Drop if world.source.plugged => {
            world.source.vmm = Vmm::Gone;
            None
        }
        _ => None,
    };
    let Some((generation, failing, answer)) = event else { return };
    let stands = matches!(failing, Some((HostTask::Resume, _)));
    if world.source.carried.as_ref().is_some_and(|carried| carried.generation == generation) {
        let event = failing.map_or(answer, |(task, words)| SourceEvent::HostFailed { task, words });
        tell_source(rules, world, event);
    } else if stands && world.source.vmm == Vmm::Stands {
        // The engine has given it up, the agent has not.
        world.source.tasks.push(Task::Own);
    }
}

pub(crate) fn destination_task(rules: Rules, world: &mut World, how: How) {
    if world.destination.tasks.is_empty() {
        return;
    }
    let task = world.destination.tasks.remove(0);
    let done = how != How::Failed;
    let event = match task {
        Task::Journal { kind, generation } => {
            world.destination.journal.extend(done.then_some((kind, generation)));
            let failing = (how != How::Done).then(|| failed(HostTask::Journal(kind)));
            Some((generation, failing, DestinationEvent::Journaled(kind)))
        }
        Task::Resume { generation } => {
            let runs = done && run_at_destination(world);
            let failing = (!runs || how != How::Done).then(|| failed(HostTask::Resume));
            Some((generation, failing, DestinationEvent::Resumed))
        }
        Task::Load { generation } => {
            let loaded = done && world.destination.vmm == Vmm::Coming(generation);
            if loaded {
                world.destination.vmm = Vmm::Loaded(generation);
            }
            let failing = (!loaded || how != How::Done).then(|| failed(HostTask::Load));
            Some((generation, failing, DestinationEvent::Loaded))
        }
        Task::Announce { generation } => {
            told(world);
            let announced = DestinationEvent::Announced { announcements: vec![], cpu_us: 0, reached: Reached::default() };
            Some((generation, (how != How::Done).then(|| failed(HostTask::Announce)), announced))
        }
        task => {
            own_task(world, task, how);
            None
        }
    };
    let Some((generation, failing, answer)) = event else { return };
    if world.destination.carried.as_ref().is_some_and(|carried| carried.generation == generation) {
        let event = failing.map_or(answer, |(task, words)| DestinationEvent::HostFailed { task, words });
        tell_destination(rules, world, event);
    }
}

/// The source does as the destination has said.
fn settle(world: &mut World, note: (JournalRecordKind, u64), back: bool, how: How) {
    let host = &mut world.source;
    host.journal.extend((how != How::Failed).then_some(note));
    host.asked = false;
    let known = host.plugged && host.vmm != Vmm::Gone;
    if how != How::Done && !(back && known) {
        return;
    }
    host.open = None;
    if how != How::Done {
        host.tasks.push(Task::Owe { generation: note.1, ended: Ended::Stayed });
    }
    let latest = recovery::is_latest(&host.records(), &record(note.0, note.1));
    if known && latest {
        host.tasks.push(if back { Task::Own } else { Task::Drop });
    }
}

/// What an engine could not write is tried until it is durable.
fn owe<E>(host: &mut Host<E>, generation: u64, ended: Ended, how: How) {
    let of_it: Vec<_> = host.records().into_iter().filter(|record| record.generation.0 == generation).collect();
    let Some(note) = recovery::owed(&of_it, ended) else { return };
    host.journal.extend((how != How::Failed).then_some((note.kind, generation)));
    if how != How::Done {
        host.tasks.push(Task::Owe { generation, ended });
    }
}

/// What the destination's agent does by itself.
fn own_task(world: &mut World, task: Task, how: How) {
    let done = how != How::Failed;
    match task {
        Task::Note { kind, generation, tell } => {
            world.destination.journal.extend(done.then_some((kind, generation)));
            tell.into_iter().for_each(|answer| world.send(SOURCE, generation, Word::Answer(answer)));
        }
        Task::TakeUp { generation } => {
            if done && run_at_destination(world) && how == How::Done {
                told(world);
                let note = Task::Note { kind: JournalRecordKind::Running, generation, tell: Some(VerdictAnswer::Running) };
                world.destination.tasks.insert(0, note);
            } else {
                world.send(SOURCE, generation, Word::Answer(VerdictAnswer::Pending));
            }
        }
        Task::Discard { generation, tell } => {
            world.destination.journal.extend(done.then_some((JournalRecordKind::Discarded, generation)));
            if how == How::Done {
                world.destination.tasks.insert(0, Task::Drop);
            }
            if tell {
                let answer = if how == How::Done { VerdictAnswer::Discarded } else { VerdictAnswer::Pending };
                world.send(SOURCE, generation, Word::Answer(answer));
            }
        }
        Task::Owe { generation, ended } => owe(&mut world.destination, generation, ended, how),
        #[allow(clippy::collapsible_match, reason = "a guard that runs the guest would be read over")]
        Task::Own => {
            if !(done && run_at_destination(world)) && world.destination.vmm != Vmm::Gone {
                world.destination.tasks.push(Task::Own);
            }
        }
        // As at the source: one that has not plugged in is not known, and the journal says what becomes of it.
        Task::End | Task::Drop if world.destination.plugged => world.destination.vmm = Vmm::Gone,
        _ => {}
    }
}

/// What is planted in the source's way with a lost link.
pub(crate) fn source_lost(rules: Rules, world: &mut World) {
    use limosa_proto::state::SourceState::Committing;
    if world.source.carried.as_ref().is_none_or(|carried| carried.engine.state() != Committing) {
        return;
    }
    match rules {
        Some(Planted::ResumeOnLostLink) => world.source.tasks.push(Task::Own),
        Some(Planted::EofIsSuccess) => tell_source(rules, world, SourceEvent::Message(message(Word::Running))),
        _ => {}
    }
}

pub(crate) fn heard(rules: Rules, answer: VerdictAnswer) -> VerdictAnswer {
    match (rules, answer) {
        (Some(Planted::UndecidedIsDiscarded), VerdictAnswer::Pending | VerdictAnswer::Unknown) => VerdictAnswer::Discarded,
        _ => answer,
    }
}

fn says(vmm: Vmm) -> Option<Plugged> {
    match vmm {
        Vmm::Gone => None,
        Vmm::Runs(_) => Some(Plugged::Running),
        Vmm::Stands => Some(Plugged::Paused),
        Vmm::Coming(_) => Some(Plugged::Incoming),
        Vmm::Loaded(_) => Some(Plugged::Loaded),
    }
}

/// The attempts that an agent finds open in its journal.
fn unsettled<E>(host: &Host<E>) -> Vec<u64> {
    use JournalRecordKind::{Aborted, Discarded, Running};
    let mut open = Vec::new();
    for (kind, generation) in &host.journal {
        open.retain(|other| other != generation);
        if !matches!(kind, Running | Discarded | Aborted) {
            open.push(*generation);
        }
    }
    open
}

/// The agent comes back.
pub(crate) fn restart(world: &mut World, side: Side) {
    fn begin<E>(host: &mut Host<E>) {
        (host.lives, host.plugged) = (true, host.vmm == Vmm::Gone);
        for generation in unsettled(host) {
            match recovery::at_start(&host.records(), MIGRATION, Generation(generation)) {
                AtStart::Settle(note) => host.tasks.push(Task::Note { kind: note.kind, generation, tell: None }),
                AtStart::Ask | AtStart::Wait => host.open = Some(generation),
                AtStart::Nothing => {}
            }
        }
    }
    match side {
        Side::Source => begin(&mut world.source),
        Side::Destination => begin(&mut world.destination),
    }
}

/// The VMM finds its agent again.
pub(crate) fn plug_in(rules: Rules, world: &mut World, side: Side) {
    fn plug<E>(host: &mut Host<E>) {
        host.plugged = true;
        let Some(state) = says(host.vmm) else { return };
        let found = recovery::plugged_in(&host.records(), state);
        if let Some((of, note)) = found.note {
            host.tasks.push(Task::Note { kind: note.kind, generation: of.generation.0, tell: None });
        }
        match found.fate {
            Fate::Own => host.tasks.push(Task::Own),
            Fate::End { .. } => host.tasks.push(Task::Drop),
            Fate::Left | Fate::Doubt => {}
        }
    }
    match side {
        Side::Source => plug(&mut world.source),
        Side::Destination => {
            plug(&mut world.destination);
            if rules == Some(Planted::ReadyIsEnough) && matches!(world.destination.vmm, Vmm::Loaded(_)) {
                world.destination.tasks.push(Task::Own);
            }
        }
    }
}

/// A source asks, and no engine carries the attempt.
pub(crate) fn asked(world: &mut World, generation: u64, released: bool) {
    let host = &mut world.destination;
    let claimed = host.carried.is_some() || !host.tasks.is_empty();
    // A VMM that lives and is not plugged in yet does not say.
    let here = says(host.vmm).map(|says| GuestHere { claimed, plugged: Some(says).filter(|_| host.plugged && !claimed) });
    let known = host.plugged && host.vmm != Vmm::Gone;
    match recovery::asked(&host.records(), MIGRATION, Generation(generation), released, here) {
        Asked::Answer(answer) => world.send(SOURCE, generation, Word::Answer(answer)),
        Asked::TakeUp(_) if known => host.tasks.push(Task::TakeUp { generation }),
        Asked::TakeUp(_) => world.send(SOURCE, generation, Word::Answer(VerdictAnswer::Pending)),
        Asked::Discard(_) => host.tasks.push(Task::Discard { generation, tell: true }),
    }
}

/// The agent that asks after a restart hears this.
pub(crate) fn answered(rules: Rules, world: &mut World, generation: u64, answer: VerdictAnswer) {
    let host = &mut world.source;
    let (note, back) = match recovery::answered(heard(rules, answer)) {
        Answered::Gone(note) => (note, false),
        Answered::GivenBack(note) => (note, true),
        Answered::Again(_) => {
            host.asked = false;
            return;
        }
    };
    let settle = Task::Settle { kind: note.kind, generation, back };
    if !host.tasks.contains(&settle) {
        host.tasks.push(settle);
    }
}

/// The source writes that an attempt is over which it never released, and says so.
fn promise(world: &mut World, generation: u64, how: How) {
    let fits = release::is_unsettled(&world.source.records(), MIGRATION, Generation(generation));
    world.source.journal.extend((fits && how != How::Failed).then_some((JournalRecordKind::Aborted, generation)));
    say(world, generation, if fits && how == How::Done { ReleasedAnswer::Never } else { ReleasedAnswer::Open });
}

/// The source answers a destination.
fn say(world: &mut World, generation: u64, answer: ReleasedAnswer) {
    if answer == ReleasedAnswer::Never {
        let journal = &world.source.journal;
        let last = |kind| journal.iter().rposition(|record| *record == (kind, generation));
        world.facts.promise_broken |= last(JournalRecordKind::Released) > last(JournalRecordKind::Aborted);
        world.source.never = Some(generation);
    }
    world.send(Side::Destination, generation, Word::Said(answer));
}

/// A destination asks whether this was released.
pub(crate) fn asked_whether_released(rules: Rules, world: &mut World, generation: u64) {
    let host = &world.source;
    let carried = host.carried.as_ref().is_some_and(|carried| carried.generation == generation);
    match (rules, release::asked(&host.records(), MIGRATION, Generation(generation), carried)) {
        (Some(Planted::NeverIsNoPromise), release::Asked::Answer(ReleasedAnswer::Open)) => {
            say(world, generation, ReleasedAnswer::Never);
        }
        (_, release::Asked::Answer(answer)) => say(world, generation, answer),
        (_, release::Asked::Promise(_)) => {
            let promise = Task::Promise { generation };
            if !world.source.tasks.contains(&promise) {
                world.source.tasks.push(promise);
            }
        }
    }
}

/// A destination asks and is answered in one step. Whether anything follows from it.
pub(crate) fn asks_at_once(rules: Rules, world: &mut World, generation: u64) -> bool {
    let (tasks, before) = (world.source.tasks.len(), crate::world::fingerprint(world));
    world.destination.asked = true;
    asked_whether_released(rules, world, generation);
    if world.source.tasks.len() > tasks && world.source.tasks.pop().is_some() {
        promise(world, generation, How::Done);
    }
    let said = world.network.iter().position(|packet| matches!(packet.word, Word::Said(_)));
    if let Some(place) = said
        && let Word::Said(answer) = world.network.remove(place).word
    {
        source_said(rules, world, generation, answer);
    }
    world.destination.asked = false;
    before != crate::world::fingerprint(world)
}

/// The destination hears from the source.
pub(crate) fn source_said(rules: Rules, world: &mut World, generation: u64, answer: ReleasedAnswer) {
    let host = &mut world.destination;
    if host.open != Some(generation) || !host.asked {
        return;
    }
    host.asked = false;
    match (rules, answer) {
        (_, ReleasedAnswer::Never) | (Some(Planted::ReleasedIsNever), ReleasedAnswer::Released) => {
            decide_open(world, Some(ReleasedAnswer::Never));
        }
        (_, ReleasedAnswer::Released) => host.said = Some(answer),
        _ => {}
    }
}

/// The destination has waited long enough for word of what a restart has left open.
pub(crate) fn give_up(world: &mut World) -> Option<()> {
    decide_open(world, world.destination.said)
}

fn decide_open(world: &mut World, said: Option<ReleasedAnswer>) -> Option<()> {
    let host = &mut world.destination;
    let generation = host.open?;
    let says = says(host.vmm);
    let (plugged, lives) = (host.plugged && says.is_some(), says.is_some());
    let says = says.filter(|_| plugged);
    match recovery::out_of_patience(&host.records(), MIGRATION, Generation(generation), plugged, says, lives, said) {
        OutOfPatience::Settled => {
            host.open = None;
            if !host.has(JournalRecordKind::Running, generation) {
                host.tasks.push(Task::Drop);
            }
        }
        OutOfPatience::Wait(_) | OutOfPatience::MayHaveRun(_) => return None,
        OutOfPatience::Running(note) => host.tasks.push(Task::Note { kind: note.kind, generation, tell: None }),
        OutOfPatience::Discard(_) => host.tasks.push(Task::Discard { generation, tell: false }),
    }
    Some(())
}

/// The whole host goes: what it had of the guest is gone, and that is no fault of the hand-over if it was the guest's host.
pub(crate) fn power_cut(world: &mut World, side: Side) {
    let ran = world.facts.ran.is_some();
    match side {
        Side::Source => {
            world.facts.source_lost |= world.source.vmm != Vmm::Gone && !ran;
            world.source.vmm = Vmm::Gone;
        }
        Side::Destination => {
            world.facts.destination_lost |= match world.destination.vmm {
                Vmm::Runs(_) => true,
                Vmm::Loaded(generation) => world.destination.has(JournalRecordKind::Ready, generation),
                _ => false,
            };
            world.destination.vmm = Vmm::Gone;
        }
    }
}
