//! Whole migrations between toy hosts: over TCP (TLS and plaintext, 1, 2 and 8 lanes) and over the in-process link.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod toy;

use limosa_link::pair::PairLink;
use limosa_link::{Link, Populate};
use limosa_proto::event::SourceOutcome;
use limosa_proto::report::Report;
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

/// What every kind of link must do: move a guest that writes, whole, with several rounds and zeros left out.
async fn conforms(toy: &Toy, sender: &Sender, link: Arc<dyn Link>) -> Report {
    let name = link.capabilities().name;
    let (outcome, report) = sender.migrate_over(toy, link).await;
    assert_moved(sender, toy, &outcome);
    toy.settle().await;
    assert!(report.ok && report.link == name && report.rounds >= 2, "{report:?}");
    assert!(report.zero_pages >= PAGES / 4 - 200, "{} zero pages", report.zero_pages);
    assert!(
        report.downtime_ms.unwrap() < 2000.0 && report.cpu_seconds.source > 0.0 && report.cpu_seconds.destination > 0.0,
        "{report:?}"
    );
    assert_eq!(report.announcements, ["toy: 1 frame"]);
    assert_eq!(toy.saw.announced.load(Ordering::SeqCst), 1);
    report
}

async fn tcp(lanes: u16, plaintext: bool, populate: Populate) {
    let toy = Toy::start(ToySettings { populate, ..ToySettings::default() }).await;
    let mut sender = Sender::new(busy_guest());
    (sender.lanes, sender.plaintext) = (lanes, plaintext);
    sender.befriend(&toy);
    let report = conforms(&toy, &sender, sender.link(&toy)).await;
    assert_eq!((report.lanes, report.encrypted), (lanes, !plaintext));
    let moved = report.round_list.iter().map(|round| round.pages).sum::<u64>() * 4096;
    assert!(
        report.bytes_on_wire > moved && report.bytes_on_wire < moved + moved / 20 + 10_000,
        "{} for {moved}",
        report.bytes_on_wire
    );
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn one_plaintext_lane() {
    tcp(1, true, Populate::Beside).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn two_plaintext_lanes() {
    tcp(2, true, Populate::No).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn eight_plaintext_lanes() {
    tcp(8, true, Populate::Before).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn one_tls_lane() {
    tcp(1, false, Populate::Before).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn two_tls_lanes() {
    tcp(2, false, Populate::Beside).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn eight_tls_lanes() {
    tcp(8, false, Populate::No).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn in_one_process() {
    for lanes in [1, 3] {
        let toy = Toy::start(ToySettings::default()).await;
        let mut sender = Sender::new(busy_guest());
        (sender.lanes, sender.plaintext) = (lanes, true);
        let link = PairLink::new(toy.sessions.clone(), sender.key.id(), toy.key.id());
        conforms(&toy, &sender, Arc::new(link)).await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn regions_that_do_not_end_on_a_word() {
    let toy = Toy::start(ToySettings::default()).await;
    let memory = ToyMemory::new(2 * 333);
    memory.fill(|_| true);
    let sender = Sender::new(Guest::start(memory, Duration::from_millis(1)));
    sender.befriend(&toy);
    let (outcome, _) = sender.migrate(&toy).await;
    assert_moved(&sender, &toy, &outcome);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn memory_never_touched_costs_nothing() {
    let toy = Toy::start(ToySettings { populate: Populate::No, ..ToySettings::default() }).await;
    let sender = Sender::new(Guest::start(ToyMemory::new(1 << 15), Duration::from_secs(1)));
    sender.befriend(&toy);
    let (outcome, report) = sender.migrate(&toy).await;
    assert_moved(&sender, &toy, &outcome);
    assert!(report.bytes_on_wire < 400_000, "{} bytes for empty memory", report.bytes_on_wire);
    assert!(report.zero_pages >= (1 << 15) - 10);
    assert_eq!(toy.saw.memory.lock().unwrap().as_ref().unwrap().populated.load(Ordering::SeqCst), 0);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_page_that_becomes_zero_is_zero_there() {
    let toy = Toy::start(ToySettings::default()).await;
    let mut sender = Sender::new(busy_guest());
    // Slow enough that pages sent in the first round are zeroed by the guest in later ones.
    sender.settings.bandwidth_bytes_per_s = 20_000_000;
    sender.befriend(&toy);
    let (outcome, report) = sender.migrate(&toy).await;
    assert_moved(&sender, &toy, &outcome);
    let later = report.round_list.iter().skip(1).map(|round| round.zero_pages).sum::<u64>();
    assert!(later > 0, "no page became zero: {:?}", report.round_list);
    let rate = report.bytes_on_wire as f64 / (report.round_list.iter().map(|round| round.ms).sum::<f64>() / 1e3);
    assert!(rate < 30e6, "{rate} bytes/s over a cap of 20 MB/s");
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
