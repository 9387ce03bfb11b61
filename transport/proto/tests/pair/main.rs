//! Both halves of the engine against each other, in a world with jumped time: what holds whatever fails.
//! No socket and no KVM here; the link's tests and the end-to-end tests have those.
#![allow(clippy::unwrap_used, clippy::panic)]

mod world;

use limosa_proto::commit::JournalRecordKind;
use limosa_proto::destination::{DestinationEvent, DestinationOutcome, Side};
use limosa_proto::precopy::NoConvergence;
use limosa_proto::report::{Measured, Outcome, Report};
use limosa_proto::source::{Course, RoundSent, SourceEvent, SourceOutcome};
use limosa_proto::state::{DestinationState, SourceState};
use limosa_proto::wire::code::Code;
use limosa_proto::wire::frame::LaneToken;
use limosa_proto::wire::message::{Accept, Message, Refusal};
use limosa_proto::wire::offer::{Keys, KeysAsk};
use std::collections::BTreeSet;
use std::time::Duration;
use world::{Fault, MS, World};

/// Every way in which a guest goes: what holds whatever fails holds for each.
const COURSES: [Course; 3] = [Course::Precopy, Course::Quick, Course::Paused];

fn good() -> World {
    going(Course::Precopy)
}

fn going(course: Course) -> World {
    let mut world = World::new();
    world.config.course = course;
    world.begin();
    world
}

/// A sweep with fewer steps has missed some of the way.
fn steps_min(course: Course) -> u64 {
    if course == Course::Precopy { 30 } else { 20 }
}

/// Runs with `fault` before step 0, 1, 2, … until the run is over before the fault, and looks at each end.
fn at_every_step(fault: Fault, mut check: impl FnMut(u64, &World)) {
    for course in COURSES {
        let mut hit = 0;
        for step in 0.. {
            let mut world = going(course);
            world.fault = Some((step, fault));
            world.run();
            if world.fault.is_some() {
                assert!(step > steps_min(course), "{course:?}: only {step} steps");
                break;
            }
            hit += 1;
            check(step, &world);
            one_runs(step, &world);
            next_one_works(world);
        }
        assert!(hit > steps_min(course), "{course:?}: only {hit} steps were hit");
    }
}

/// Exactly one guest runs, and the outcome says which.
fn one_runs(step: u64, world: &World) {
    let outcome = world.outcome.as_ref().unwrap();
    let expected = match outcome {
        SourceOutcome::Committed => [false, true],
        SourceOutcome::Aborted { guest_runs: true, .. } | SourceOutcome::Refused(_) => [true, false],
        other => panic!("step {step}: {other:?}: {world:?}"),
    };
    assert_eq!(world.running, expected, "step {step}: {outcome:?}: {world:?}");
    if *outcome == SourceOutcome::Committed {
        let kinds: Vec<_> = world.journals[0].iter().map(|record| record.kind).collect();
        assert!(kinds.contains(&JournalRecordKind::Released), "step {step}: {kinds:?}");
    }
}

/// Every failure test ends with a migration that succeeds.
fn next_one_works(mut world: World) {
    if world.running == [false, true] {
        return;
    }
    world.pass_quietly();
    world.begin();
    world.run();
    assert_eq!(world.outcome, Some(SourceOutcome::Committed), "{world:?}");
    assert_eq!(world.arrival, Some(DestinationOutcome::Running), "{world:?}");
}

#[test]
fn a_guest_moves() {
    let mut world = good();
    world.run();
    assert_eq!(world.outcome, Some(SourceOutcome::Committed));
    assert_eq!(world.arrival, Some(DestinationOutcome::Running));
    assert_eq!(world.running, [false, true]);
    let source = world.source.as_ref().unwrap();
    let progress = source.progress();
    assert!(progress.rounds.len() >= 3, "two rounds, as long as the rest melts, and the last one: {:?}", progress.rounds);
    let first = progress.rounds.first().unwrap();
    assert_eq!((first.pages, first.round), (3100, 1));
    assert!(first.dirty_after > 200, "{first:?}");
    let parts = progress.downtime.unwrap();
    assert!(parts.pause >= MS && parts.state >= 2 * MS && parts.resume >= MS && parts.commit >= 2 * MS, "{parts:?}");
    assert!(parts.total() < 30 * MS, "{parts:?}");
    let measured = Measured {
        link: "tcp".to_owned(),
        page_check: None,
        source_cpu_seconds: 0.5,
        verified: Some(true),
        network_gap_ms: None,
    };
    let report = Report::new(progress, world.outcome.as_ref().unwrap(), measured);
    assert!(report.ok && report.encrypted && report.outcome == Outcome::Committed);
    assert_eq!((report.lanes, report.announcements.as_slice()), (2, ["arp on lan".to_owned()].as_slice()));
    let parts = report.downtime_parts_ms.unwrap();
    let sum = parts.pause + parts.last_round + parts.state + parts.commit + parts.resume;
    assert!((sum - report.downtime_ms.unwrap()).abs() < 0.001);
    let gap = report.network_gap_ms.unwrap() - report.downtime_ms.unwrap();
    assert!((gap - 0.7).abs() < 0.001 && report.network_gap_by.as_deref() == Some("ARP probe"), "{report:?}");
    let json = serde_json::to_string(&report).unwrap();
    let again: Report = serde_json::from_str(&json).unwrap();
    assert_eq!((again.outcome, again.rounds, &again.announcements), (report.outcome, 4, &report.announcements));
    let kinds: Vec<_> =
        world.journals.iter().map(|journal| journal.iter().map(|record| record.kind).collect::<Vec<_>>()).collect();
    use JournalRecordKind::{Ready, Released, Running, Started};
    assert_eq!(kinds, [vec![Started, Released, Running], vec![Ready, Running]]);
}

#[test]
fn a_quick_guest_goes_in_one_round_and_stands_still_for_all_of_it() {
    let mut world = going(Course::Quick);
    // It writes faster than its memory can be sent and is allowed no downtime at all: neither matters.
    world.writes_per_ms = 300;
    world.config.policy.on_no_convergence = NoConvergence::Abort;
    world.config.policy.downtime_max = MS;
    world.config.policy.downtime_target = MS;
    world.run();
    assert_eq!(world.outcome, Some(SourceOutcome::Committed), "{world:?}");
    let progress = world.source.as_ref().unwrap().progress();
    assert_eq!(progress.rounds.iter().map(|round| (round.round, round.pages)).collect::<Vec<_>>(), [(1, 3100)]);
    let parts = progress.downtime.unwrap();
    assert!(parts.last_round >= 60 * MS && parts.total() < progress.total, "{parts:?}");
    assert!(report(&world).quick && !report(&world).paused);
}

#[test]
fn a_quick_guest_may_stand_still_for_as_long_as_its_memory_moves() {
    let mut world = World::new();
    world.config.course = Course::Quick;
    // 31 s for its memory: far beyond what a guest may stand still for that goes in rounds.
    world.pages_per_ms = 1;
    world.page_factor = 10;
    world.begin();
    world.run();
    assert_eq!(world.outcome, Some(SourceOutcome::Committed), "{world:?}");
    assert!(world.source.as_ref().unwrap().progress().downtime.unwrap().total() > Duration::from_secs(30));
}

#[test]
fn a_paused_guest_moves_and_nobody_resumes_it() {
    let mut world = going(Course::Paused);
    world.run();
    assert_eq!((&world.outcome, &world.arrival), (&Some(SourceOutcome::Committed), &Some(DestinationOutcome::Running)));
    let report = report(&world);
    assert!(report.ok && report.paused && !report.guest_runs && report.downtime_ms.is_none(), "{report:?}");
    use JournalRecordKind::{Ready, Released, Running, Started};
    let kinds: Vec<Vec<_>> = world.journals.iter().map(|journal| journal.iter().map(|record| record.kind).collect()).collect();
    assert_eq!(kinds, [vec![Started, Released, Running], vec![Ready, Running]], "its owner is settled like any guest's");
}

fn report(world: &World) -> Report {
    let progress = world.source.as_ref().unwrap().progress();
    let measured =
        Measured { link: "tcp".to_owned(), page_check: None, source_cpu_seconds: 0.0, verified: None, network_gap_ms: None };
    Report::new(progress, world.outcome.as_ref().unwrap(), measured)
}

#[test]
fn an_idle_guest_needs_one_round() {
    let mut world = good();
    world.writes_per_ms = 0;
    world.run();
    let rounds = world.source.as_ref().unwrap().progress().rounds.clone();
    assert_eq!(rounds.iter().map(|round| round.pages).collect::<Vec<_>>(), [3100, 1], "the one page that saving wrote");
}

#[test]
fn a_guest_that_writes_too_fast_is_stopped_or_left() {
    for (policy, downtime_max) in
        [(NoConvergence::LongerDowntime, 2000), (NoConvergence::LongerDowntime, 30), (NoConvergence::Abort, 2000)]
    {
        let mut world = World::new();
        (world.writes_per_ms, world.working_set) = (300, 2500);
        world.config.policy.on_no_convergence = policy;
        world.config.policy.downtime_max = Duration::from_millis(downtime_max);
        world.begin();
        world.run();
        let rounds = world.source.as_ref().unwrap().progress().rounds.len();
        assert!((4..=6).contains(&rounds), "{rounds}");
        match (&world.outcome, policy, downtime_max) {
            (Some(SourceOutcome::Committed), NoConvergence::LongerDowntime, 2000) => {}
            (Some(SourceOutcome::Aborted { code: Code::NotConverging, words, .. }), _, 30)
            | (Some(SourceOutcome::Aborted { code: Code::NotConverging, words, .. }), NoConvergence::Abort, _) => {
                assert!(words.contains("faster than its memory can be sent"), "{words}");
                world.writes_per_ms = 20;
                world.working_set = 300;
                next_one_works(world);
            }
            other => panic!("{other:?}: {world:?}"),
        }
    }
}

#[test]
fn a_cut_at_every_step() {
    let mut ends = BTreeSet::new();
    at_every_step(Fault::Cut, |_, world| {
        ends.insert(matches!(world.outcome, Some(SourceOutcome::Committed)));
    });
    assert_eq!(ends.len(), 2, "some cuts abort, some come after the commit");
}

#[test]
fn a_silent_cut_at_every_step() {
    at_every_step(Fault::SilentCut, |_, _| {});
}

#[test]
fn a_stall_of_the_lanes_at_every_step() {
    at_every_step(Fault::LanesStall, |_, _| {});
}

#[test]
fn a_cancel_at_every_step() {
    for side in [Side::Source, Side::Destination] {
        let mut cancelled = 0;
        at_every_step(Fault::Cancel(side), |_, world| {
            if let Some(SourceOutcome::Aborted { code, by, .. }) = &world.outcome {
                // A destination that discards after Ready is found out about by asking: the link is lost to the source.
                assert!(*code == Code::Cancelled || side == Side::Destination && *code == Code::LinkLost, "{world:?}");
                assert!(*by == side || *code == Code::LinkLost, "{world:?}");
                cancelled += 1;
            }
        });
        assert!(cancelled > 30, "{side:?}: {cancelled}");
    }
}

#[test]
fn a_failing_host_at_every_step() {
    for side in [Side::Source, Side::Destination] {
        for done in [false, true] {
            at_every_step(Fault::HostFails(side, done), |_, _| {});
        }
    }
}

#[test]
fn a_host_that_never_answers_is_bounded() {
    // What must be asked again is asked again, so that even an answer that is lost ends well.
    let sides = [Side::Source, Side::Destination];
    for (course, side) in COURSES.into_iter().flat_map(|course| sides.map(|side| (course, side))) {
        for step in 0..200 {
            let mut world = World::new();
            world.config.course = course;
            world.config.in_doubt_max = Some(Duration::from_secs(120));
            world.begin();
            world.fault = Some((step, Fault::HostStalls(side)));
            world.run();
            if world.fault.is_some() {
                assert!(step > steps_min(course));
                break;
            }
            let runs: usize = world.running.iter().map(|running| usize::from(*running)).sum();
            let stuck = matches!(world.arrival, Some(DestinationOutcome::Stuck { .. }));
            let said = matches!(world.outcome, Some(SourceOutcome::Aborted { guest_runs: false, .. }));
            // A VMM that was told to resume and does not answer may run: then, and only then, doubt stays.
            assert_eq!(matches!(world.outcome, Some(SourceOutcome::InDoubt { .. })), stuck, "step {step}: {world:?}");
            assert!(runs == 1 || stuck || said, "step {step}: {world:?}");
        }
    }
}

#[test]
fn a_crash_of_an_agent_at_every_step() {
    for side in [Side::Source, Side::Destination] {
        for durable in [false, true] {
            at_every_step(Fault::Crash(side, durable), |_, _| {});
        }
    }
}

#[test]
fn many_faults_in_one_migration() {
    let kinds = [
        Fault::Cut,
        Fault::SilentCut,
        Fault::LanesStall,
        Fault::Cancel(Side::Source),
        Fault::Cancel(Side::Destination),
        Fault::HostFails(Side::Source, false),
        Fault::HostFails(Side::Source, true),
        Fault::HostFails(Side::Destination, false),
        Fault::HostFails(Side::Destination, true),
        Fault::Crash(Side::Source, false),
        Fault::Crash(Side::Source, true),
        Fault::Crash(Side::Destination, false),
        Fault::Crash(Side::Destination, true),
    ];
    let mut random = 1_u64;
    let mut next = |below: u64| {
        random = random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (random >> 33) % below
    };
    let mut committed = 0;
    for seed in 0..3000 {
        let course = COURSES[usize::try_from(next(3)).unwrap()];
        let mut world = going(course);
        // Most faults where it hurts: around the hand-over, which is in the last third of some 90 steps, or 28 without rounds.
        let (late, steps) = if course == Course::Precopy { (40, 100) } else { (8, 32) };
        let from = if next(3) == 0 { 0 } else { late };
        for _ in 0..2 + next(4) {
            world.more_faults.insert(from + next(steps - from), kinds[usize::try_from(next(13)).unwrap()]);
        }
        world.log.push(format!("seed {seed}: {:?}", world.more_faults));
        world.run();
        one_runs(seed, &world);
        committed += u32::from(world.outcome == Some(SourceOutcome::Committed));
        next_one_works(world);
    }
    assert!((100..2900).contains(&committed), "{committed} were committed");
}

/// Runs until the source is in `state`.
fn until(state: SourceState) -> World {
    for step in 0.. {
        let mut world = good();
        world.stop_at = Some(step);
        world.run();
        if world.source.as_ref().unwrap().state() == state {
            return world;
        }
        assert!(step < 300, "{state} is never reached");
    }
    unreachable!()
}

#[test]
fn a_cancel_is_answered_in_every_state() {
    for state in SourceState::ALL {
        if matches!(state, SourceState::InDoubt | SourceState::GivingBack | SourceState::Aborting | SourceState::Done) {
            continue;
        }
        let world = until(*state);
        let answer = world.source.as_ref().unwrap().cancellable();
        assert_eq!(answer.is_ok(), state.is_revocable(), "{state}: {answer:?}");
        assert!(answer.is_ok() || answer.unwrap_err().len() > 20);
    }
}

#[test]
fn a_released_guest_never_comes_back_by_itself() {
    let mut world = until(SourceState::Committing);
    world.stop_at = None;
    // The destination forgets everything: it says Unknown, for ever.
    world.destination = None;
    world.journals[1].clear();
    world.config.in_doubt_max = None;
    let now = world.now;
    let source = world.source.as_mut().unwrap();
    source.handle(now, SourceEvent::LinkLost("gone".to_owned()));
    for second in 1..10_000 {
        let later = now.after(Duration::from_secs(second));
        source.handle(later, SourceEvent::Verdict(limosa_proto::wire::message::VerdictAnswer::Unknown));
        source.handle(later, SourceEvent::Cancel("please".to_owned()));
        source.handle(later, SourceEvent::Message(Message::Abort { code: Code::Internal, words: String::new() }));
        source.handle(later, SourceEvent::Timer);
        while let Some(action) = source.poll() {
            assert!(!matches!(action, limosa_proto::source::SourceAction::Resume), "{action:?}");
        }
        assert_eq!(source.state(), SourceState::InDoubt);
    }
    assert!(source.progress().doubt.as_ref().unwrap().contains("proves nothing"));
}

#[test]
fn doubt_ends_when_it_is_bounded() {
    let mut world = World::new();
    world.config.in_doubt_max = Some(Duration::from_secs(60));
    let mut source = limosa_proto::source::Source::in_doubt(world.now, world.config.clone()).unwrap();
    let mut asked = 0;
    while let Some(time) = source.timeout() {
        source.handle(time, SourceEvent::Timer);
        while let Some(action) = source.poll() {
            asked += usize::from(matches!(action, limosa_proto::source::SourceAction::Settle { released: true }));
            if let limosa_proto::source::SourceAction::Done(outcome) = action {
                assert!(matches!(outcome, SourceOutcome::InDoubt { .. }), "{outcome:?}");
            }
        }
        source.handle(time, SourceEvent::LinkLost("no route".to_owned()));
    }
    assert!(source.is_done() && asked > 20, "{asked}");
}

#[test]
fn a_refusal_is_told_in_words() {
    let mut world = good();
    world.refusal = Some(Refusal::one(Code::NetworkMissing, "the guest is on \"lan\"; the destination has: none"));
    world.run();
    let Some(SourceOutcome::Refused(refusal)) = &world.outcome else { panic!("{world:?}") };
    assert_eq!(refusal.words(), "the guest is on \"lan\"; the destination has: none");
    assert!(matches!(world.arrival, Some(DestinationOutcome::Refused(_))));
    assert_eq!(world.running, [true, false]);
    world.refusal = None;
    next_one_works(world);
}

#[test]
fn plaintext_needs_both_and_versions_and_room_are_refused() {
    let mut world = World::new();
    world.config.plaintext_lanes = true;
    world.begin();
    world.run();
    assert!(matches!(&world.outcome, Some(SourceOutcome::Refused(r)) if r.code == Code::PlaintextRefused), "{world:?}");
    world.destination_config.plaintext_allowed = true;
    world.begin();
    world.run();
    assert!(world.source.as_ref().unwrap().progress().plaintext_lanes);
    let mut world = World::new();
    world.destination_config.plaintext_allowed = true;
    world.begin();
    world.run();
    assert!(!world.source.as_ref().unwrap().progress().plaintext_lanes, "never unless it was asked for");
    let mut world = World::new();
    world.destination_config.memory_bytes_max = 1 << 20;
    world.begin();
    world.run();
    assert!(matches!(&world.outcome, Some(SourceOutcome::Refused(r)) if r.code == Code::NoRoom), "{world:?}");
}

#[test]
fn pages_are_checked_if_either_side_would_like_it() {
    let asks = |world: &mut World| {
        world.begin();
        world.run();
        assert!(matches!(world.outcome, Some(SourceOutcome::Committed)), "{world:?}");
        world.log.iter().any(|line| line.contains("OpenLanes") && line.contains("page_check: true"))
    };
    for (source, destination) in [(true, false), (false, true), (true, true), (false, false)] {
        let mut world = World::new();
        (world.config.page_check, world.destination_config.page_check) = (source, destination);
        assert_eq!(asks(&mut world), source || destination, "{source} {destination}");
    }
}

#[test]
fn a_check_that_was_asked_for_cannot_be_refused_quietly() {
    let mut world = until(SourceState::Preamble);
    world.stop_at = None;
    let accept = Accept {
        version: 1,
        lanes: 1,
        plaintext_lanes: false,
        page_check: false,
        token: LaneToken([0; 32]),
        keepalive_ms: 2000,
        destination_build: String::new(),
    };
    let now = world.now;
    world.source.as_mut().unwrap().handle(now, SourceEvent::Message(Message::Accept(accept)));
    world.run();
    let Some(SourceOutcome::Aborted { code, words, guest_runs: true, .. }) = &world.outcome else { panic!("{world:?}") };
    assert!(*code == Code::Violation && words.contains("page_check"), "{words}");
}

#[test]
fn a_destination_that_lies_is_aborted() {
    let lies = |state, message: Message| {
        let mut world = until(state);
        world.stop_at = None;
        let now = world.now;
        world.source.as_mut().unwrap().handle(now, SourceEvent::Message(message));
        world.run();
        let Some(SourceOutcome::Aborted { code, guest_runs, .. }) = world.outcome else { panic!("{world:?}") };
        assert_eq!((code, guest_runs, world.running), (Code::Violation, true, [true, false]));
    };
    lies(SourceState::Precopy, Message::RoundDone { round: 7 });
    lies(SourceState::Precopy, Message::Ready(Default::default()));
    lies(SourceState::LastRound, Message::Ready(Default::default()));
    lies(SourceState::LastRound, Message::Running(Default::default()));
    lies(SourceState::Finalizing, Message::Commit);
    lies(SourceState::Preparing, Message::Finished(Default::default()));
    lies(SourceState::Precopy, Message::KeysAsk(KeysAsk { chunks: vec![0] }));
    lies(SourceState::Precopy, Message::Links(vec![]));
    lies(SourceState::Precopy, Message::Checked(vec![]));
}

#[test]
fn a_source_that_lies_is_refused() {
    use limosa_proto::record::Record;
    let record = Record { kind: 1, version: 1, instance: 0, bytes: vec![0; 1 << 20] };
    let lies = |state, messages: Vec<Message>| {
        let mut world = until_there(state);
        world.stop_at = None;
        let now = world.now;
        for message in messages {
            world.destination.as_mut().unwrap().handle(now, DestinationEvent::Message(message));
        }
        world.run();
        let Some(DestinationOutcome::Discarded { code, .. }) = world.arrival else { panic!("{world:?}") };
        assert_eq!((code, world.running), (Code::Violation, [true, false]));
    };
    lies(DestinationState::Receiving, vec![Message::Commit]);
    lies(DestinationState::Receiving, vec![Message::Record(record.clone()); 65]);
    lies(DestinationState::Receiving, vec![Message::Record(Record { bytes: vec![], ..record }); 4097]);
    lies(DestinationState::Receiving, vec![Message::RecordsEnd { count: 1, bytes: 0, last_round: 9, paused: false }]);
    lies(DestinationState::Receiving, vec![Message::RecordsEnd { count: 0, bytes: 0, last_round: 0, paused: false }]);
    lies(DestinationState::Receiving, vec![Message::RecordsEnd { count: 0, bytes: 0, last_round: u32::MAX, paused: false }]);
    lies(DestinationState::Ready, vec![Message::RecordsEnd { count: 0, bytes: 0, last_round: 9, paused: false }]);
    lies(DestinationState::Preparing, vec![Message::Running(Default::default())]);
    lies(DestinationState::Receiving, vec![Message::Keys(Keys { keys: vec![] })]);
    lies(DestinationState::Receiving, vec![Message::LinksAsk]);
    lies(DestinationState::Receiving, vec![Message::Probe(vec![])]);
    lies(DestinationState::Receiving, vec![Message::CpuAsk]);
}

#[test]
fn a_destination_that_is_quicker_than_the_lanes_last_word_loses_no_round() {
    let mut world = until(SourceState::Committed);
    let source = world.source.as_mut().unwrap();
    let rounds = source.progress().rounds.len();
    let last = source.progress().rounds.last().unwrap().round;
    let late = |round| RoundSent { round, pages: 3, zero_pages: 0, bytes_on_wire: 12_345 };
    source.handle(world.now, SourceEvent::PagesSent(late(last)));
    assert_eq!(source.progress().rounds.len(), rounds, "a round that is known counts once");
    source.handle(world.now, SourceEvent::PagesSent(late(last + 1)));
    assert_eq!(source.progress().rounds.last().map(|round| (round.round, round.bytes)), Some((last + 1, 12_345)));
    assert_eq!(source.state(), SourceState::Committed);
}

fn until_there(state: DestinationState) -> World {
    for step in 0..300 {
        let mut world = good();
        world.stop_at = Some(step);
        world.run();
        if world.destination.as_ref().unwrap().state() == state {
            return world;
        }
    }
    panic!("{state} is never reached")
}

#[test]
fn a_late_commit_is_not_accepted_after_discarded() {
    let mut world = until_there(DestinationState::Ready);
    let now = world.now.after(Duration::from_secs(31));
    let destination = world.destination.as_mut().unwrap();
    // Nothing is heard for longer than it waits.
    destination.handle(now, DestinationEvent::LinkLost("gone".to_owned()));
    destination.handle(now, DestinationEvent::Timer);
    assert_eq!(destination.state(), DestinationState::Discarding);
    destination.handle(now, DestinationEvent::Message(Message::Commit));
    destination.handle(now, DestinationEvent::Message(Message::VerdictAsk { released: true }));
    destination.handle(now, DestinationEvent::Journaled(JournalRecordKind::Discarded));
    let mut actions = Vec::new();
    while let Some(action) = destination.poll() {
        assert!(!matches!(action, limosa_proto::destination::DestinationAction::Resume));
        actions.push(format!("{action:?}"));
    }
    assert!(actions.iter().any(|action| action == "Send(Verdict(Discarded))"), "{actions:?}");
}

/// Found by `tests/sim` (seed 151): the journal broke, the VMM was thrown away, and the next agent found `ready` and nobody who
/// could say that the guest had never run.
#[test]
fn a_discard_that_is_not_durable_leaves_the_vmm_that_can_tell() {
    let gives_up = |state, why: DestinationEvent| {
        let mut world = until_there(state);
        let mut now = world.now;
        let destination = world.destination.as_mut().unwrap();
        destination.handle(now, why);
        assert_eq!(destination.state(), DestinationState::Discarding);
        let task = limosa_proto::destination::HostTask::Journal(JournalRecordKind::Discarded);
        let mut actions = Vec::new();
        while !destination.is_done() {
            destination.handle(now, DestinationEvent::HostFailed { task, words: "no space".to_owned() });
            now = destination.timeout().unwrap();
            destination.handle(now, DestinationEvent::Timer);
            actions.extend(std::iter::from_fn(|| destination.poll()));
        }
        let thrown_away = actions.contains(&limosa_proto::destination::DestinationAction::Discard);
        let Some(limosa_proto::destination::DestinationAction::Done(outcome)) = actions.pop() else { panic!("{actions:?}") };
        let DestinationOutcome::Discarded { durable: false, left, .. } = outcome else { panic!("{outcome:?}") };
        (thrown_away, left)
    };
    let cancel = || DestinationEvent::Cancel("please".to_owned());
    assert_eq!(gives_up(DestinationState::Ready, cancel()), (false, true));
    // Ready was not said yet, so there is nothing to tell that the source does not know.
    let asked = || DestinationEvent::Message(Message::VerdictAsk { released: false });
    assert_eq!(gives_up(DestinationState::Loading, cancel()), (true, false));
    assert_eq!(gives_up(DestinationState::Noting, cancel()), (true, false));
    assert_eq!(gives_up(DestinationState::Receiving, asked()), (true, false));
    assert_eq!(gives_up(DestinationState::Preparing, asked()), (true, false));
}

#[test]
fn a_guest_that_ends_is_not_said_to_run() {
    for state in [SourceState::Precopy, SourceState::Saving] {
        let mut world = until(state);
        let now = world.now;
        let source = world.source.as_mut().unwrap();
        let words = "it shut down".to_owned();
        source.handle(now, SourceEvent::HostFailed { task: limosa_proto::source::HostTask::Guest, words });
        source.handle(now, SourceEvent::Journaled(JournalRecordKind::Aborted));
        let actions: Vec<_> = std::iter::from_fn(|| source.poll()).collect();
        assert!(!actions.contains(&limosa_proto::source::SourceAction::Resume), "{actions:?}");
        let Some(limosa_proto::source::SourceAction::Done(SourceOutcome::Aborted { guest_runs, words, .. })) = actions.last()
        else {
            panic!("{actions:?}")
        };
        assert!(!guest_runs && words.contains("it shut down"), "{words}");
    }
}

#[test]
fn a_quiet_link_is_kept_alive() {
    let mut world = World::new();
    world.pages_per_ms = 1;
    world.writes_per_ms = 0;
    world.begin();
    // 3.1 s for the first round, and a keepalive every 2 s.
    world.run();
    assert_eq!(world.outcome, Some(SourceOutcome::Committed), "{world:?}");
    assert!(world.log.iter().any(|line| line.contains("Send(Keepalive {")), "{world:?}");
}
