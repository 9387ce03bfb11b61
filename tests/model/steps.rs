//! What can happen next in a world, and what then becomes of it: messages that come or do not, what hosts do and fail to do,
//! timers, crashes and restarts. It decides nothing that an engine or `recovery` decides.

use crate::rules::{self, Rules};
use crate::world::{Carried, Host, MOMENTS, Packet, Side, Task, Vmm, Word, World};
use limosa_proto::commit::JournalRecordKind;
use limosa_proto::destination::{Destination, DestinationEvent};
use limosa_proto::event::HostTask;
use limosa_proto::recovery::Ended;
use limosa_proto::source::{Source, SourceEvent};
use limosa_proto::time::Instant;
use limosa_proto::wire::message::VerdictAnswer;
use std::fmt;
use std::sync::Arc;

/// How a host's task goes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum How {
    Done,
    /// It is not done, and that is said.
    Failed,
    /// It is done, and said to have failed.
    DoneAndFailed,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Step {
    /// A migration is begun and comes as far as the commit: everything is sent and loaded.
    Begin,
    Deliver(Packet),
    /// It comes, and will come again.
    Duplicate(Packet),
    Lose(Packet),
    /// The link is lost, as this side sees it, or the answer to its question.
    LinkLost(Side),
    Task(Side, How),
    Timer(Side),
    Cancel(Side),
    /// The agent dies, or the whole host; what it was writing is durable, or not, and what its VMM was loading is loaded, or not.
    Crash {
        side: Side,
        whole: bool,
        durable: bool,
    },
    Restart(Side),
    PlugIn(Side),
    /// The source asks about what a restart has left open.
    Ask,
    /// The destination asks the source about what a restart has left open.
    AskSource,
    /// The destination's patience with what a restart has left open ends.
    GiveUp,
}

impl fmt::Display for Step {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let packet =
            |f: &mut fmt::Formatter<'_>, packet: &Packet| write!(f, "{:?} {} to {}", packet.word, packet.generation, packet.to);
        match self {
            Step::Begin => f.write_str("begin"),
            Step::Deliver(what) => packet(f, what),
            Step::Duplicate(what) => packet(f, what).and_then(|()| f.write_str(" and again")),
            Step::Lose(what) => packet(f, what).and_then(|()| f.write_str(" is lost")),
            Step::LinkLost(side) => write!(f, "{side} loses the link"),
            Step::Task(side, How::Done) => write!(f, "{side} does it"),
            Step::Task(side, how) => write!(f, "{side} {how:?}"),
            Step::Timer(side) => write!(f, "{side} has waited"),
            Step::Cancel(side) => write!(f, "{side} cancels"),
            Step::Crash { side, whole, durable } => {
                let what = if *whole { "loses power" } else { "crashes" };
                write!(f, "{side} {what}{}", if *durable { " when it has written" } else { "" })
            }
            Step::Restart(side) => write!(f, "{side} restarts"),
            Step::PlugIn(side) => write!(f, "{side}'s VMM plugs in"),
            Step::Ask => f.write_str("source asks"),
            Step::AskSource => f.write_str("destination asks"),
            Step::GiveUp => f.write_str("destination gives up"),
        }
    }
}

/// Whether `step` is what happens when nothing goes wrong any more.
pub(crate) fn is_calm(world: &World, step: Step) -> bool {
    match step {
        Step::Deliver(_) | Step::Task(_, How::Done) | Step::Timer(_) | Step::Restart(_) | Step::PlugIn(_) => true,
        Step::Ask | Step::AskSource | Step::GiveUp => true,
        Step::LinkLost(side) => nobody_answers(world, side),
        _ => false,
    }
}

/// Whether what `side` waits for cannot come any more, so that it will notice.
fn nobody_answers(world: &World, side: Side) -> bool {
    if side == Side::Destination && world.destination.asked {
        let on_its_way = world.network.iter().any(|packet| matches!(packet.word, Word::AskReleased | Word::Said(_)));
        let writes = world.source.lives && world.source.tasks.iter().any(|task| matches!(task, Task::Promise { .. }));
        return !on_its_way && !writes;
    }
    let asking = world.source.carried.as_ref().is_some_and(|carried| carried.asks) || world.source.asked;
    if side == Side::Source && asking {
        let on_its_way =
            world.network.iter().any(|packet| matches!((packet.to, packet.word), (_, Word::Ask { .. } | Word::Answer(_))));
        let decides = world.destination.lives && (!world.destination.tasks.is_empty() || world.destination.carried.is_some());
        return !on_its_way && !decides;
    }
    match side {
        Side::Source => {
            let ours = world.source.carried.as_ref().map(|carried| carried.generation);
            !world.destination.carried.as_ref().is_some_and(|carried| carried.linked && Some(carried.generation) == ours)
        }
        Side::Destination => {
            let ours = world.destination.carried.as_ref().map(|carried| carried.generation);
            let linked = |c: &Carried<Source>| (c.linked || c.asks) && Some(c.generation) == ours;
            !world.source.carried.as_ref().is_some_and(linked) && !world.source.asked
        }
    }
}

/// Everything that can happen in `world`.
pub(crate) fn possible(world: &World, steps: &mut Vec<Step>) {
    let left = world.left;
    for side in [Side::Source, Side::Destination] {
        let (lives, plugged, vmm, busy, writing, timer, linked) = glance(world, side);
        if !lives {
            steps.push(Step::Restart(side));
            continue;
        }
        if !plugged && vmm != Vmm::Gone {
            steps.push(Step::PlugIn(side));
        }
        if busy {
            steps.push(Step::Task(side, How::Done));
            if left.failures > 0 {
                steps.extend([Step::Task(side, How::Failed), Step::Task(side, How::DoneAndFailed)]);
            }
        }
        if timer.is_some() {
            steps.push(Step::Timer(side));
        }
        if linked && (left.cuts > 0 || nobody_answers(world, side)) {
            steps.push(Step::LinkLost(side));
        }
        let index = usize::from(side == Side::Destination);
        if left.crashes[index] > 0 {
            for whole in [false, true].into_iter().filter(|whole| !whole || left.power > 0) {
                steps.push(Step::Crash { side, whole, durable: false });
                if writing {
                    steps.push(Step::Crash { side, whole, durable: true });
                }
            }
        }
        let carried = if side == Side::Source { world.source.carried.is_some() } else { world.destination.carried.is_some() };
        if carried && left.cancels > 0 {
            steps.push(Step::Cancel(side));
        }
    }
    for packet in &world.network {
        steps.push(Step::Deliver(*packet));
        if left.duplicates > 0 {
            steps.push(Step::Duplicate(*packet));
        }
        if left.losses > 0 {
            steps.push(Step::Lose(*packet));
        }
    }
    if world.source.lives && world.source.open.is_some() && !world.source.asked {
        steps.push(Step::Ask);
    }
    if world.destination.lives && world.destination.open.is_some() && world.destination.tasks.is_empty() {
        steps.push(Step::GiveUp);
        if !world.destination.asked && (world.left.far || world.source.lives) {
            steps.push(Step::AskSource);
        }
    }
    if rules::may_begin(world) {
        steps.push(Step::Begin);
    }
}

/// What of a host matters for what can happen to it.
fn glance(world: &World, side: Side) -> (bool, bool, Vmm, bool, bool, Option<Instant>, bool) {
    fn moment(timeout: Option<Instant>) -> Option<Instant> {
        timeout.and_then(|timeout| MOMENTS.into_iter().find(|moment| *moment >= timeout))
    }
    let writes = |tasks: &[Task]| {
        let kinds = |task: &Task| {
            matches!(
                task,
                Task::Journal { .. }
                    | Task::Load { .. }
                    | Task::Note { .. }
                    | Task::Settle { .. }
                    | Task::Discard { .. }
                    | Task::Owe { .. }
                    | Task::Promise { .. }
            )
        };
        tasks.first().is_some_and(kinds)
    };
    match side {
        Side::Source => {
            let host = &world.source;
            let timer = host.carried.as_ref().and_then(|carried| moment(carried.engine.timeout()));
            let linked = host.asked || host.carried.as_ref().is_some_and(|carried| carried.linked || carried.asks);
            (host.lives, host.plugged, host.vmm, !host.tasks.is_empty(), writes(&host.tasks), timer, linked)
        }
        Side::Destination => {
            let host = &world.destination;
            let timer = host.carried.as_ref().and_then(|carried| moment(carried.engine.timeout()));
            let linked = host.asked || host.carried.as_ref().is_some_and(|carried| carried.linked);
            (host.lives, host.plugged, host.vmm, !host.tasks.is_empty(), writes(&host.tasks), timer, linked)
        }
    }
}

/// What becomes of `world`; `None`: nothing.
pub(crate) fn take(rules: Rules, world: &World, step: Step) -> Option<World> {
    let mut next = world.clone();
    let world = &mut next;
    match step {
        Step::Begin => rules::begin(rules, world),
        Step::Deliver(packet) => {
            world.network.retain(|other| *other != packet);
            deliver(rules, world, packet);
        }
        Step::Duplicate(packet) => {
            world.left.duplicates -= 1;
            deliver(rules, world, packet);
        }
        Step::Lose(packet) => {
            world.left.losses -= 1;
            world.network.retain(|other| *other != packet);
        }
        Step::LinkLost(side) => {
            if !nobody_answers(world, side) {
                world.left.cuts -= 1;
            }
            lose_link(rules, world, side);
        }
        Step::Task(side, how) => {
            world.left.failures -= u8::from(how != How::Done);
            match side {
                Side::Source => rules::source_task(rules, world, how),
                Side::Destination => rules::destination_task(rules, world, how),
            }
        }
        Step::Timer(side) => timer(rules, world, side),
        Step::Cancel(side) => {
            world.left.cancels -= 1;
            match side {
                Side::Source => tell_source(rules, world, SourceEvent::Cancel("cancelled".to_owned())),
                Side::Destination => tell_destination(rules, world, DestinationEvent::Cancel("cancelled".to_owned())),
            }
        }
        Step::Crash { side, whole, durable } => crash(world, side, whole, durable),
        Step::Restart(side) => rules::restart(world, side),
        Step::PlugIn(side) => rules::plug_in(rules, world, side),
        Step::Ask => {
            let generation = world.source.open?;
            world.source.asked = true;
            world.send(Side::Destination, generation, Word::Ask { released: true });
        }
        Step::AskSource => {
            let generation = world.destination.open?;
            if !world.left.far {
                return rules::asks_at_once(rules, world, generation).then_some(next);
            }
            world.destination.asked = true;
            world.send(Side::Source, generation, Word::AskReleased);
        }
        Step::GiveUp => rules::give_up(world)?,
    }
    Some(next)
}

pub(crate) fn tell_source(rules: Rules, world: &mut World, event: SourceEvent) {
    tell_source_at(rules, world, Instant::ZERO, event);
}

fn tell_source_at(rules: Rules, world: &mut World, now: Instant, event: SourceEvent) {
    let Some(carried) = &mut world.source.carried else { return };
    let engine = Arc::make_mut(&mut carried.engine);
    engine.handle(now, event);
    let mut actions = Vec::new();
    while let Some(action) = engine.poll() {
        actions.push(action);
    }
    actions.into_iter().for_each(|action| rules::source_action(rules, world, action));
}

pub(crate) fn tell_destination(rules: Rules, world: &mut World, event: DestinationEvent) {
    tell_destination_at(rules, world, Instant::ZERO, event);
}

fn tell_destination_at(rules: Rules, world: &mut World, now: Instant, event: DestinationEvent) {
    let Some(carried) = &mut world.destination.carried else { return };
    let engine: &mut Destination = Arc::make_mut(&mut carried.engine);
    engine.handle(now, event);
    let mut actions = Vec::new();
    while let Some(action) = engine.poll() {
        actions.push(action);
    }
    actions.into_iter().for_each(|action| rules::destination_action(rules, world, action));
}

fn timer(rules: Rules, world: &mut World, side: Side) {
    let (.., moment, _) = glance(world, side);
    let now = moment.unwrap_or(Instant::ZERO);
    match side {
        Side::Source => tell_source_at(rules, world, now, SourceEvent::Timer),
        Side::Destination => tell_destination_at(rules, world, now, DestinationEvent::Timer),
    }
}

fn lose_link(rules: Rules, world: &mut World, side: Side) {
    let lost = "lost".to_owned();
    match side {
        Side::Source => {
            world.source.asked = false;
            if let Some(carried) = &mut world.source.carried {
                (carried.linked, carried.asks) = (false, false);
            }
            rules::source_lost(rules, world);
            tell_source(rules, world, SourceEvent::LinkLost(lost));
        }
        Side::Destination => {
            world.destination.asked = false;
            if let Some(carried) = &mut world.destination.carried {
                carried.linked = false;
            }
            tell_destination(rules, world, DestinationEvent::LinkLost(lost));
        }
    }
}

fn deliver(rules: Rules, world: &mut World, packet: Packet) {
    let Packet { to, generation, word } = packet;
    match (to, word) {
        (Side::Source, _) if !world.source.lives => {}
        (Side::Destination, _) if !world.destination.lives => {}
        (Side::Source, Word::Answer(answer)) => answered(rules, world, generation, answer),
        (Side::Source, Word::AskReleased) => rules::asked_whether_released(rules, world, generation),
        (Side::Destination, Word::Said(answer)) => rules::source_said(rules, world, generation, answer),
        (Side::Source, _) => {
            if let Some(event) = heard_by_source(world, generation, word) {
                tell_source(rules, world, event);
            }
        }
        (Side::Destination, Word::Ask { released }) => match &mut world.destination.carried {
            Some(carried) if carried.generation == generation => {
                carried.linked = true;
                tell_destination(rules, world, DestinationEvent::Message(rules::message(word)));
            }
            _ => rules::asked(world, generation, released),
        },
        (Side::Destination, _) => {
            let Some(carried) = world.destination.carried.as_ref().filter(|carried| carried.linked) else { return };
            let (ours, takes) = (carried.generation, taking(world));
            let event = match rules::expects(rules, ours, generation) {
                Ok(()) => DestinationEvent::Message(rules::message(word)),
                Err((code, words)) => DestinationEvent::PeerFault { code, words },
            };
            tell_destination(rules, world, event);
            world.facts.strange_word |= ours != generation && taking(world) > takes;
        }
    }
}

/// How many times the destination is about to let the guest run.
fn taking(world: &World) -> usize {
    world.destination.tasks.iter().filter(|task| matches!(task, Task::Resume { .. })).count()
}

fn heard_by_source(world: &World, generation: u64, word: Word) -> Option<SourceEvent> {
    let carried = world.source.carried.as_ref().filter(|carried| carried.linked)?;
    Some(match rules::expects(Rules::default(), carried.generation, generation) {
        Ok(()) => SourceEvent::Message(rules::message(word)),
        Err((code, words)) => SourceEvent::PeerFault { code, words },
    })
}

/// A verdict comes: to an engine, or to the agent that asks after a restart.
fn answered(rules: Rules, world: &mut World, generation: u64, answer: VerdictAnswer) {
    if world.source.open == Some(generation) && world.source.asked {
        return rules::answered(rules, world, generation, answer);
    }
    let Some(carried) = world.source.carried.as_mut().filter(|carried| carried.generation == generation) else { return };
    if carried.asks || carried.linked {
        carried.asks = false;
        tell_source(rules, world, SourceEvent::Message(rules::message(Word::Answer(rules::heard(rules, answer)))));
    }
}

fn crash(world: &mut World, side: Side, whole: bool, durable: bool) {
    world.left.crashes[usize::from(side == Side::Destination)] -= 1;
    world.left.power -= u8::from(whole);
    // Its connections end with a process: what was on its way to it comes nowhere, what it has sent may still come.
    world.network.retain(|packet| packet.to != side);
    match side {
        Side::Source => die(&mut world.source, durable),
        Side::Destination => {
            let loads = matches!(world.destination.tasks.first(), Some(Task::Load { .. }));
            die(&mut world.destination, durable);
            if let Vmm::Coming(generation) = world.destination.vmm {
                world.destination.vmm = if loads && durable { Vmm::Loaded(generation) } else { Vmm::Gone };
            }
        }
    }
    if whole {
        rules::power_cut(world, side);
    }
}

/// The agent is gone, and with it all that it had not written.
fn die<E>(host: &mut Host<E>, durable: bool) {
    let writing = match host.tasks.first() {
        Some(
            Task::Journal { kind, generation } | Task::Note { kind, generation, .. } | Task::Settle { kind, generation, .. },
        ) => Some((*kind, *generation)),
        Some(Task::Owe { generation, ended: Ended::Stayed }) => Some((JournalRecordKind::Aborted, *generation)),
        Some(Task::Owe { generation, ended: Ended::GivenUp }) => Some((JournalRecordKind::Discarded, *generation)),
        Some(Task::Owe { generation, .. }) => Some((JournalRecordKind::Running, *generation)),
        Some(Task::Promise { generation }) => Some((JournalRecordKind::Aborted, *generation)),
        Some(Task::Discard { generation, .. }) => Some((JournalRecordKind::Discarded, *generation)),
        _ => None,
    };
    host.journal.extend(writing.filter(|_| durable));
    (host.lives, host.plugged, host.carried, host.open, host.asked, host.said) = (false, false, None, None, false, None);
    host.tasks.clear();
}

/// What the host says of a task that failed.
pub(crate) fn failed(task: HostTask) -> (HostTask, String) {
    (task, "no".to_owned())
}
