//! Both machines against their tables: each is brought into every state, every event is fed there, and what happens
//! is written down. Also that the graphs in docs/PROTOCOL.md are the tables'.
// The documentation is read and, on demand, written here.
#![allow(clippy::unwrap_used, clippy::panic, clippy::disallowed_methods)]

use limosa_proto::bitmap::PageSet;
use limosa_proto::commit::JournalRecordKind as Kind;
use limosa_proto::destination::{Destination, DestinationAction, DestinationConfig, DestinationEvent, HostTask};
use limosa_proto::identity::{Generation, HostId, MigrationId, VmId};
use limosa_proto::memory::{Gpa, MemoryMap, Region};
use limosa_proto::source::{Course, RoundSent, Source, SourceAction, SourceConfig, SourceEvent};
use limosa_proto::state::{
    DestinationInput, DestinationState, Rule, SourceInput, SourceState, destination_dot, destination_rule, source_dot,
    source_rule,
};
use limosa_proto::time::Instant;
use limosa_proto::wire::code::Code;
use limosa_proto::wire::frame::LaneToken;
use limosa_proto::wire::message::{Accept, Hello, Message, Reached, Refusal, VerdictAnswer, VmDescription};
use std::time::Duration;

fn vm() -> VmDescription {
    let memory = MemoryMap::new(vec![Region { gpa: Gpa(0), bytes: 64 * 4096, page_bytes: 4096 }]).unwrap();
    VmDescription {
        id: VmId([5; 16]),
        name: "guest".to_owned(),
        vcpus: 1,
        memory,
        nics: vec![],
        disks: vec![],
        vmm: "limosa".to_owned(),
        records: vec![],
        config: vec![],
        cpu: Default::default(),
    }
}

fn now() -> Instant {
    Instant::ZERO.after(Duration::from_millis(1))
}

fn dirty() -> SourceEvent {
    SourceEvent::Dirty(PageSet::empty(&vm().memory))
}

fn sent(round: u32) -> SourceEvent {
    SourceEvent::PagesSent(RoundSent { round, pages: 64, zero_pages: 0, bytes_on_wire: 1 << 18 })
}

fn accept() -> Message {
    let token = LaneToken([9; 32]);
    Message::Accept(Accept {
        version: 1,
        lanes: 1,
        plaintext_lanes: false,
        page_check: true,
        token,
        keepalive_ms: 1,
        destination_build: String::new(),
    })
}

/// Whether a guest that goes like this ever comes into `state`.
fn reaches(course: Course, state: SourceState) -> bool {
    match state {
        SourceState::Tracking | SourceState::Precopy => course == Course::Precopy,
        SourceState::Stopping => course != Course::Paused,
        _ => true,
    }
}

/// The way to each state, beginning at the state before it.
fn source_path(course: Course, state: SourceState) -> (Option<SourceState>, Vec<SourceEvent>) {
    use SourceState as S;
    let message = SourceEvent::Message;
    let whole = course != Course::Precopy;
    let last = if whole { 1 } else { 2 };
    match state {
        S::Stopping if whole => (Some(S::OpeningLanes), vec![SourceEvent::LanesOpen]),
        S::Saving if course == Course::Paused => (Some(S::OpeningLanes), vec![SourceEvent::LanesOpen]),
        S::LastRound if whole => (Some(S::Saving), vec![SourceEvent::Saved(vec![])]),
        S::Aborting if course == Course::Paused => (Some(S::Saving), vec![SourceEvent::Cancel("please".to_owned())]),
        S::Done if course == Course::Paused => (Some(S::Aborting), vec![SourceEvent::Journaled(Kind::Aborted)]),
        S::Starting => (None, vec![]),
        S::Preamble => (Some(S::Starting), vec![SourceEvent::Journaled(Kind::Started)]),
        S::Preparing => (Some(S::Preamble), vec![message(accept())]),
        S::OpeningLanes => (Some(S::Preparing), vec![message(Message::Prepared { populated_ms: 1 })]),
        S::Tracking => (Some(S::OpeningLanes), vec![SourceEvent::LanesOpen]),
        S::Precopy => (Some(S::Tracking), vec![SourceEvent::TrackingStarted]),
        S::Stopping => (Some(S::Precopy), vec![sent(1), message(Message::RoundDone { round: 1 }), dirty()]),
        S::Saving => (Some(S::Stopping), vec![SourceEvent::Paused]),
        S::LastRound => (Some(S::Saving), vec![SourceEvent::Saved(vec![]), dirty()]),
        S::Finalizing => (Some(S::LastRound), vec![sent(last)]),
        S::Releasing => {
            (Some(S::Finalizing), vec![message(Message::RoundDone { round: last }), message(Message::Ready(Default::default()))])
        }
        S::Committing => (Some(S::Releasing), vec![SourceEvent::Journaled(Kind::Released)]),
        S::InDoubt => (Some(S::Committing), vec![SourceEvent::LinkLost("gone".to_owned())]),
        S::GivingBack => (Some(S::InDoubt), vec![SourceEvent::Verdict(VerdictAnswer::Discarded)]),
        S::Committed => (Some(S::Committing), vec![message(Message::Running(Default::default()))]),
        S::Aborting => (Some(S::Stopping), vec![SourceEvent::Cancel("please".to_owned())]),
        S::Done => (Some(S::Aborting), vec![SourceEvent::Resumed, SourceEvent::Journaled(Kind::Aborted)]),
    }
}

fn source_in(course: Course, state: SourceState) -> Source {
    let (before, events) = source_path(course, state);
    let mut source = match before {
        Some(before) => source_in(course, before),
        None => {
            let config = SourceConfig::new(MigrationId([7; 16]), Generation(1), HostId([2; 32]), vm());
            let config = SourceConfig { course, ..config };
            Source::new(Instant::ZERO, config).unwrap()
        }
    };
    for event in events {
        source.handle(now(), event);
    }
    assert_eq!(source.state(), state);
    while source.poll().is_some() {}
    source
}

fn source_event(input: SourceInput) -> SourceEvent {
    use SourceInput as I;
    let message = SourceEvent::Message;
    match input {
        I::Accept => message(accept()),
        I::Refuse => message(Message::Refuse(Refusal::one(Code::Busy, "busy"))),
        I::Prepared => message(Message::Prepared { populated_ms: 1 }),
        I::RoundDone => message(Message::RoundDone { round: 1 }),
        I::Ready => message(Message::Ready(Default::default())),
        I::Running => message(Message::Running(Default::default())),
        I::Finished => message(Message::Finished(Default::default())),
        I::Abort => message(Message::Abort { code: Code::Cancelled, words: "no more".to_owned() }),
        I::Strange => message(Message::Commit),
        I::Deadline => SourceEvent::Timer,
        I::LanesOpen => SourceEvent::LanesOpen,
        I::TrackingStarted => SourceEvent::TrackingStarted,
        I::Moving => SourceEvent::Moving(RoundSent::default()),
        I::PagesSent => sent(1),
        I::Dirty => dirty(),
        I::Paused => SourceEvent::Paused,
        I::Saved => SourceEvent::Saved(vec![]),
        I::JournaledStarted => SourceEvent::Journaled(Kind::Started),
        I::JournaledReleased => SourceEvent::Journaled(Kind::Released),
        I::JournaledRunning => SourceEvent::Journaled(Kind::Running),
        I::JournaledAborted => SourceEvent::Journaled(Kind::Aborted),
        I::Resumed => SourceEvent::Resumed,
        I::LinkLost => SourceEvent::LinkLost("gone".to_owned()),
        I::PeerFault => SourceEvent::PeerFault { code: Code::Malformed, words: "garbage".to_owned() },
        I::HostFailed => SourceEvent::HostFailed { task: HostTask::Journal(Kind::Released), words: "disk full".to_owned() },
        I::Cancel => SourceEvent::Cancel("please".to_owned()),
        I::Verdict => SourceEvent::Verdict(VerdictAnswer::Running),
    }
}

fn source_action(action: &SourceAction) -> String {
    match action {
        SourceAction::Send(message) => format!("Send({})", message.name()),
        SourceAction::Journal(record) => format!("Journal({:?})", record.kind),
        SourceAction::SendPages { round, last, .. } => format!("SendPages({round}{})", if *last { ", last" } else { "" }),
        SourceAction::Done(outcome) => format!("Done({})", first_word(outcome)),
        other => first_word(other),
    }
}

fn not_keepalive(action: &String) -> bool {
    action != "Send(Keepalive)"
}

fn first_word(of: &impl std::fmt::Debug) -> String {
    format!("{of:?}").split([' ', '(']).next().unwrap_or_default().to_owned()
}

#[test]
fn the_source_does_what_its_table_says() {
    for (course, name) in [(Course::Precopy, "source"), (Course::Quick, "source_quick"), (Course::Paused, "source_paused")] {
        insta::assert_snapshot!(name, source_table(course));
    }
}

fn source_table(course: Course) -> String {
    let mut text = String::new();
    for state in SourceState::ALL.iter().filter(|state| reaches(course, **state)) {
        for input in SourceInput::ALL {
            let mut source = source_in(course, *state);
            let time = if *input == SourceInput::Deadline { late() } else { now() };
            // The link lives: it is the state's own patience that ends.
            source.handle(time, SourceEvent::Message(Message::KeepaliveAck { nonce: 0 }));
            source.handle(time, source_event(*input));
            let after = source.state();
            let actions: Vec<String> =
                std::iter::from_fn(|| source.poll()).map(|action| source_action(&action)).filter(not_keepalive).collect();
            let rule = source_rule(*state, *input);
            match rule {
                Rule::Ignored => {
                    assert!(after == *state && actions.is_empty(), "{state} + {input}: {after} {actions:?}");
                    continue;
                }
                Rule::Next(to) | Rule::Violation(to) | Rule::Misuse(to) => {
                    assert!(to.contains(&after), "{state} + {input}: {after}")
                }
            }
            let kind = if matches!(rule, Rule::Violation(_)) {
                " (violation)"
            } else if matches!(rule, Rule::Misuse(_)) {
                " (misuse)"
            } else {
                ""
            };
            if input_of(&source_event(*input)) != *input {
                panic!("{input} is not what its event is");
            }
            text += &format!("{state} + {input}{kind} -> {after}: {}\n", actions.join(" "));
            promises(course, *state, after, &actions);
        }
    }
    text
}

fn input_of(event: &SourceEvent) -> SourceInput {
    SourceInput::of(event)
}

/// A moment after every deadline.
fn late() -> Instant {
    now().after(Duration::from_secs(3600))
}

/// What must hold for every transition of the source.
fn promises(course: Course, before: SourceState, after: SourceState, actions: &[String]) {
    let has = |what: &str| actions.iter().any(|action| action == what);
    let released = (SourceState::Releasing..=SourceState::InDoubt).contains(&before) || before == SourceState::Committed;
    assert!(!(released && has("Resume")), "{before} -> {after}: {actions:?}");
    assert!(!has("Send(Commit)") || before == SourceState::Releasing, "{before} -> {after}: {actions:?}");
    assert!(
        !has("Release") || matches!(before, SourceState::Committing | SourceState::InDoubt),
        "{before} -> {after}: {actions:?}"
    );
    if course == Course::Paused {
        let touches = ["Pause", "Resume", "StartTracking", "StopTracking"];
        assert!(!touches.iter().any(|touch| has(touch)), "{before} -> {after}: its operator's guest is left alone: {actions:?}");
    }
    if course == Course::Quick {
        assert!(!has("StartTracking") && !has("FetchDirty"), "{before} -> {after}: {actions:?}");
    }
    if course != Course::Paused && before.is_revocable() && before.is_stopped() && after == SourceState::Aborting {
        assert_eq!(actions[0], "Resume", "{before}: the guest comes first");
    }
    let done = actions.iter().position(|action| action.starts_with("Done"));
    assert_eq!(done.is_some(), after == SourceState::Done && before != SourceState::Done);
    assert!(done.is_none_or(|at| at + 1 == actions.len()), "Done is last: {actions:?}");
}

fn destination_path(paused: bool, state: DestinationState) -> (Option<DestinationState>, Vec<DestinationEvent>) {
    use DestinationState as S;
    let arrived = |round| DestinationEvent::RoundArrived { round, pages: 1, zero_pages: 1, bytes: 4096 };
    match state {
        S::Listening => (None, vec![]),
        S::Checking => (Some(S::Listening), vec![destination_event(DestinationInput::Hello)]),
        S::Preparing => (Some(S::Checking), vec![DestinationEvent::Admitted]),
        S::Noting => (Some(S::Preparing), vec![DestinationEvent::Prepared { populated_ms: 1 }]),
        S::Joining => (Some(S::Noting), vec![DestinationEvent::Journaled(Kind::Ready)]),
        S::Receiving => (Some(S::Joining), vec![DestinationEvent::LanesJoined, arrived(1)]),
        S::Loading => (Some(S::Receiving), vec![arrived(2), records_end(paused)]),
        S::Ready => (Some(S::Loading), vec![DestinationEvent::Loaded]),
        S::Resuming => (Some(S::Ready), vec![DestinationEvent::Message(Message::Commit)]),
        S::Running => (Some(S::Resuming), vec![DestinationEvent::Resumed]),
        S::Discarding => (Some(S::Ready), vec![DestinationEvent::Cancel("please".to_owned())]),
        S::Done => (Some(S::Discarding), vec![DestinationEvent::Journaled(Kind::Discarded)]),
    }
}

fn records_end(paused: bool) -> DestinationEvent {
    DestinationEvent::Message(Message::RecordsEnd { count: 0, bytes: 0, last_round: 2, paused })
}

fn destination_in(paused: bool, state: DestinationState) -> Destination {
    let (before, events) = destination_path(paused, state);
    let mut destination = match before {
        Some(before) => destination_in(paused, before),
        None => {
            let config = DestinationConfig::new(MigrationId([7; 16]), Generation(1), HostId([1; 32]), LaneToken([9; 32]));
            Destination::new(Instant::ZERO, config).unwrap()
        }
    };
    for event in events {
        destination.handle(now(), event);
    }
    assert_eq!(destination.state(), state);
    while destination.poll().is_some() {}
    destination
}

fn destination_event(input: DestinationInput) -> DestinationEvent {
    use DestinationInput as I;
    let message = DestinationEvent::Message;
    match input {
        I::Hello => message(Message::Hello(Box::new(Hello {
            versions: vec![1],
            vm: vm(),
            lanes: 1,
            plaintext_lanes: false,
            link: "tcp".to_owned(),
            page_check: true,
            downtime_target_ms: 50,
            downtime_ms_max: 2000,
            keepalive_ms: 2000,
            source_build: String::new(),
        }))),
        I::Record => message(Message::Record(limosa_proto::record::Record { kind: 1, version: 1, instance: 0, bytes: vec![1] })),
        I::RecordsEnd => records_end(false),
        I::Commit => message(Message::Commit),
        I::VerdictAsk => message(Message::VerdictAsk { released: true }),
        I::Abort => message(Message::Abort { code: Code::Cancelled, words: "no more".to_owned() }),
        I::Strange => message(Message::Ready(Default::default())),
        I::Deadline => DestinationEvent::Timer,
        I::Admitted => DestinationEvent::Admitted,
        I::Refused => DestinationEvent::Refuse(Refusal::one(Code::Busy, "busy")),
        I::Prepared => DestinationEvent::Prepared { populated_ms: 1 },
        I::LanesJoined => DestinationEvent::LanesJoined,
        I::Arriving => DestinationEvent::Arriving,
        I::RoundArrived => DestinationEvent::RoundArrived { round: 2, pages: 1, zero_pages: 0, bytes: 4096 },
        I::Loaded => DestinationEvent::Loaded,
        I::JournaledReady => DestinationEvent::Journaled(Kind::Ready),
        I::JournaledRunning => DestinationEvent::Journaled(Kind::Running),
        I::JournaledDiscarded => DestinationEvent::Journaled(Kind::Discarded),
        I::Resumed => DestinationEvent::Resumed,
        I::Announced => DestinationEvent::Announced { announcements: vec![], cpu_us: 1, reached: Reached::default() },
        I::LinkLost => DestinationEvent::LinkLost("gone".to_owned()),
        I::PeerFault => DestinationEvent::PeerFault { code: Code::Malformed, words: "garbage".to_owned() },
        I::HostFailed => DestinationEvent::HostFailed { task: HostTask::Announce, words: "no bridge".to_owned() },
        I::Cancel => DestinationEvent::Cancel("please".to_owned()),
    }
}

fn destination_action(action: &DestinationAction) -> String {
    match action {
        DestinationAction::Send(message) => format!("Send({})", message.name()),
        DestinationAction::Journal(record) => format!("Journal({:?})", record.kind),
        DestinationAction::Done(outcome) => format!("Done({})", first_word(outcome)),
        other => first_word(other),
    }
}

#[test]
fn the_destination_does_what_its_table_says() {
    insta::assert_snapshot!("destination", destination_table(false));
    insta::assert_snapshot!("destination_paused", destination_table(true));
}

fn destination_table(paused: bool) -> String {
    let mut text = String::new();
    for state in DestinationState::ALL {
        for input in DestinationInput::ALL {
            let mut destination = destination_in(paused, *state);
            let time = if *input == DestinationInput::Deadline { late() } else { now() };
            destination.handle(time, DestinationEvent::Message(Message::KeepaliveAck { nonce: 0 }));
            let event = destination_event(*input);
            assert_eq!(DestinationInput::of(&event), *input);
            destination.handle(time, event);
            let after = destination.state();
            let actions: Vec<String> = std::iter::from_fn(|| destination.poll())
                .map(|action| destination_action(&action))
                .filter(not_keepalive)
                .collect();
            let rule = destination_rule(*state, *input);
            match rule {
                Rule::Ignored => {
                    assert!(after == *state && actions.is_empty(), "{state} + {input}: {after} {actions:?}");
                    continue;
                }
                Rule::Next(to) | Rule::Violation(to) | Rule::Misuse(to) => {
                    assert!(to.contains(&after), "{state} + {input}: {after}")
                }
            }
            let kind = if matches!(rule, Rule::Violation(_)) {
                " (violation)"
            } else if matches!(rule, Rule::Misuse(_)) {
                " (misuse)"
            } else {
                ""
            };
            text += &format!("{state} + {input}{kind} -> {after}: {}\n", actions.join(" "));
            let has = |what: &str| actions.iter().any(|action| action == what);
            let (takes, never) = if paused { ("Hold", "Resume") } else { ("Resume", "Hold") };
            assert!(!has(takes) || matches!(state, DestinationState::Ready | DestinationState::Resuming), "{state} + {input}");
            assert!(!has(never), "{state} + {input}: {actions:?}");
            let late = *state >= DestinationState::Resuming && *state != DestinationState::Discarding;
            assert!(!(late && (has("Journal(Discarded)") || has("Discard"))), "{state} + {input}: {actions:?}");
            assert!(!has("Announce") || *state == DestinationState::Resuming, "{state} + {input}: {actions:?}");
        }
    }
    text
}

/// With LIMOSA_UPDATE_DOCS=1 the graphs are written anew.
#[test]
fn the_graphs_in_the_documentation_are_the_tables() {
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../../docs/PROTOCOL.md");
    let before = std::fs::read_to_string(path).unwrap();
    let mut after = before.clone();
    for (name, dot) in [("source", source_dot()), ("destination", destination_dot())] {
        let begin = format!("```dot\ndigraph {name} {{");
        let from = after.find(&begin).unwrap_or_else(|| panic!("docs/PROTOCOL.md has no graph of the {name}"));
        let to = from + 6 + after[from + 6..].find("```").unwrap();
        after.replace_range(from..to, &format!("```dot\n{dot}"));
    }
    if std::env::var_os("LIMOSA_UPDATE_DOCS").is_some() {
        std::fs::write(path, &after).unwrap();
    } else {
        assert!(
            before == after,
            "the graphs in docs/PROTOCOL.md are old: LIMOSA_UPDATE_DOCS=1 cargo test -p limosa-proto --test table"
        );
    }
}
