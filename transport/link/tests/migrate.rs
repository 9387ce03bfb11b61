//! What the drivers do around a whole migration, whatever the link (here TCP): populating memory in each way, and how many may
//! come in at once. That every kind of link moves a guest whole is the conformance suite's.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod toy;

use limosa_link::Populate;
use limosa_proto::event::{Course, SourceOutcome};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;
use toy::{Guest, Sender, Toy, ToyMemory, ToySettings, assert_moved};

const PAGES: u64 = 2048;

fn busy_guest() -> Arc<Guest> {
    let memory = ToyMemory::new(PAGES);
    memory.fill(|page| page % 4 != 0);
    Guest::start(memory, Duration::from_micros(300))
}

/// Moves a guest over one lane; how many pages were populated.
async fn populated(guest: Arc<Guest>, populate: Populate) -> u64 {
    let toy = Toy::start(ToySettings { populate, ..ToySettings::default() }).await;
    let mut sender = Sender::new(guest);
    sender.tune = Box::new(|config| config.lanes = 1);
    sender.befriend(&toy);
    let (outcome, report) = sender.migrate(&toy).await;
    assert_moved(&sender, &toy, &outcome);
    toy.settle().await;
    assert!(report.ok && report.rounds >= 2, "{report:?}");
    toy.saw.memory.lock().unwrap().as_ref().unwrap().populated.load(Ordering::SeqCst)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn memory_is_populated_as_told() {
    assert_eq!(populated(busy_guest(), Populate::Before).await, PAGES);
    assert!(populated(busy_guest(), Populate::Beside).await <= PAGES);
    assert_eq!(populated(busy_guest(), Populate::No).await, 0);
}

/// What its source never touched costs a guest no memory where it arrives, although population starts at that end.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn free_memory_is_not_populated() {
    let memory = ToyMemory::new(PAGES);
    for page in 0..64 {
        memory.poke_page(page * 2, |word| page + word + 1);
    }
    let guest = Guest::start(memory, Duration::from_secs(60));
    assert!(populated(guest, Populate::Beside).await < 80, "64 pages and what saving writes are all that is in use");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_quick_guest_arrives_in_one_round() {
    let toy = Toy::start(ToySettings::default()).await;
    let mut sender = Sender::new(busy_guest());
    sender.tune = Box::new(|config| config.course = Course::Quick);
    sender.befriend(&toy);
    let (outcome, report) = sender.migrate(&toy).await;
    assert_moved(&sender, &toy, &outcome);
    assert!(report.quick && report.rounds == 1 && report.downtime_ms.is_some(), "{report:?}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_paused_guest_arrives_and_is_never_run() {
    let toy = Toy::start(ToySettings::default()).await;
    let mut sender = Sender::new(busy_guest());
    sender.guest.set_running(false);
    sender.tune = Box::new(|config| config.course = Course::Paused);
    sender.befriend(&toy);
    let (outcome, report) = sender.migrate(&toy).await;
    toy.settle().await;
    assert_eq!(outcome, SourceOutcome::Committed);
    assert!(report.ok && report.paused && report.downtime_ms.is_none() && report.announcements.is_empty(), "{report:?}");
    assert_eq!(*toy.saw.held.lock().unwrap(), ["told", "taken"], "it is told before it is loaded, and taken at the commit");
    assert!(!toy.saw.running.load(Ordering::SeqCst) && sender.saw.released.load(Ordering::SeqCst));
    assert!(*sender.saw.at_save.lock().unwrap() == *toy.saw.at_resume.lock().unwrap(), "memory differs");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn two_at_once_and_a_third_is_told_to_wait() {
    let toy = Arc::new(Toy::start(ToySettings::default()).await);
    let other = Arc::new(Toy::start(ToySettings::default()).await);
    let slow = || {
        let mut sender = Sender::new(busy_guest());
        sender.settings.bandwidth_bytes_per_s = 4_000_000;
        sender.befriend(&toy);
        sender
    };
    let cancel = limosa_link::Cancel::new();
    let mut running = Vec::new();
    for number in 0..2_u8 {
        let (mut sender, toy) = (slow(), toy.clone());
        sender.cancel = cancel.clone();
        sender.tune = Box::new(move |config| config.migration.0[0] = number);
        running.push(tokio::spawn(async move { sender.migrate(&toy).await.0 }));
    }
    while toy.sessions.open() < 2 {
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    let third = slow();
    let (outcome, _) = third.migrate(&toy).await;
    match &outcome {
        SourceOutcome::Refused(refusal) => assert!(refusal.words().contains("no more than 2"), "{}", refusal.words()),
        other => panic!("{other:?}"),
    }
    cancel.cancel("enough");
    for running in running {
        assert!(matches!(running.await.unwrap(), SourceOutcome::Aborted { .. }));
    }
    toy.settle().await;
    third.befriend(&other);
    let (outcome, _) = Sender { settings: Default::default(), ..third }.migrate(&other).await;
    assert_eq!(outcome, SourceOutcome::Committed);
}
