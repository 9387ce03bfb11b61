//! Hosts that fail, hang and are cancelled, at each call: the guest runs on exactly one host, both sides end, and the next
//! migration works. What happens on the way between the hosts is the conformance suite's, over every kind of link.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod toy;

use limosa_proto::commit::JournalRecordKind as Kind;
use limosa_proto::event::{Side, SourceOutcome};
use limosa_proto::wire::code::Code;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;
use toy::{Call, Fault, Guest, Sender, Toy, ToyMemory, ToySettings, assert_moved, assert_stayed};

fn sender() -> Sender {
    let memory = ToyMemory::new(512);
    memory.fill(|page| page % 3 == 0);
    let mut sender = Sender::new(Guest::start(memory, Duration::from_millis(1)));
    sender.tune = Box::new(|config| {
        config.deadlines.retry = Duration::from_millis(100);
        config.deadlines.host = Duration::from_secs(2);
    });
    sender
}

async fn next_is_good(sender: &mut Sender, toy: &Toy) {
    toy.settle().await;
    sender.saw.faults.0.lock().unwrap().clear();
    toy.saw.faults.0.lock().unwrap().clear();
    sender.cancel = limosa_link::Cancel::new();
    sender.settings.bandwidth_bytes_per_s = 0;
    let (outcome, _) = sender.migrate(toy).await;
    assert_moved(sender, toy, &outcome);
    toy.settle().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_source_host_that_fails_at_each_call() {
    for call in [Call::Track, Call::Fetch, Call::Pause, Call::Save, Call::Journal(Kind::Started)] {
        for fault in [Fault::Fail, Fault::Panic] {
            let toy = Toy::start(ToySettings::default()).await;
            let mut sender = sender();
            sender.befriend(&toy);
            sender.saw.faults.add(call, fault);
            let (outcome, _) = sender.migrate(&toy).await;
            assert_stayed(&sender, &toy, &outcome);
            match outcome {
                SourceOutcome::Aborted { by: Side::Source, guest_runs: true, words, .. } => {
                    assert!(words.contains("told to fail") || words.contains("panicked"), "{words}")
                }
                other => panic!("{call:?}: {other:?}"),
            }
            next_is_good(&mut sender, &toy).await;
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_destination_host_that_fails_at_each_call() {
    for call in [Call::Prepare, Call::Load, Call::Journal(Kind::Ready)] {
        for fault in [Fault::Fail, Fault::Panic] {
            let toy = Toy::start(ToySettings::default()).await;
            let mut sender = sender();
            sender.befriend(&toy);
            toy.saw.faults.add(call, fault);
            let (outcome, _) = sender.migrate(&toy).await;
            assert_stayed(&sender, &toy, &outcome);
            match outcome {
                SourceOutcome::Aborted { by: Side::Destination, words, .. } => {
                    assert!(words.contains("told to fail") || words.contains("panicked"), "{words}");
                }
                other => panic!("{call:?}: {other:?}"),
            }
            toy.settle().await;
            assert_eq!(toy.saw.discarded.load(Ordering::SeqCst), 1, "{call:?}");
            next_is_good(&mut sender, &toy).await;
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_cancel_is_answered_in_each_phase() {
    for call in [Call::Track, Call::Fetch, Call::Pause, Call::Save] {
        let toy = Toy::start(ToySettings::default()).await;
        let mut sender = sender();
        sender.befriend(&toy);
        let cancel = sender.cancel.clone();
        sender.saw.faults.add(
            call,
            Fault::Then(Arc::new(move || {
                cancel.cancel("an operator changed his mind");
                std::thread::sleep(Duration::from_millis(50));
            })),
        );
        let (outcome, _) = sender.migrate(&toy).await;
        assert_stayed(&sender, &toy, &outcome);
        assert!(
            matches!(&outcome, SourceOutcome::Aborted { code: Code::Cancelled, words, by: Side::Source, .. } if words.contains("changed his mind")),
            "{outcome:?}"
        );
        next_is_good(&mut sender, &toy).await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_host_that_hangs_does_not_hang_the_migration() {
    let toy = Toy::start(ToySettings::default()).await;
    let sender = sender();
    sender.befriend(&toy);
    sender.saw.faults.add(Call::Fetch, Fault::Then(Arc::new(|| std::thread::sleep(Duration::from_secs(4)))));
    let begun = std::time::Instant::now();
    let (outcome, _) = sender.migrate(&toy).await;
    assert_stayed(&sender, &toy, &outcome);
    assert!(begun.elapsed() < Duration::from_secs(12), "{:?}", begun.elapsed());
    toy.settle().await;
}
