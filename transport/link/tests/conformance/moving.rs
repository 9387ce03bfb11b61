//! Checks of whole migrations: every feature works over every kind of link.

use crate::subject::{Plan, REGIONS, Subject, Trial, silence};
use crate::toy::{Call, Fault, ToyMemory, ToySettings};
use limosa_link::Populate;
use limosa_proto::commit::JournalRecordKind as Kind;
use limosa_proto::event::{Side, SourceOutcome};
use limosa_proto::memory::PAGE_BYTES;
use limosa_proto::progress::Progress;
use limosa_proto::report::Report;
use limosa_proto::state::SourceState;
use limosa_proto::wire::code::Code;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

/// Bytes of pages that a report says were sent.
fn page_bytes(report: &Report) -> u64 {
    report.round_list.iter().map(|round| round.pages).sum::<u64>() * PAGE_BYTES
}

fn assert_report<S: Subject>(trial: &Trial<S>, report: &Report, lanes: u16) {
    assert!(report.ok && report.rounds >= 2 && report.guest_runs, "{report:?}");
    assert_eq!((report.link.as_str(), report.encrypted, report.lanes), (S::NAME, S::ENCRYPTED, lanes));
    let (moved, all) = (page_bytes(report), REGIONS.iter().sum::<u64>());
    assert!(report.bytes_on_wire > moved && report.bytes_on_wire < moved + moved / 10 + 20_000, "{report:?}");
    // A third of the pages is zero in the beginning; each write of the guest may end that for one of them.
    let least = (all / 3).saturating_sub(trial.sender.guest.writes.load(Ordering::SeqCst) + 1);
    assert!(report.zero_pages >= least, "{} zero pages of {all}", report.zero_pages);
    assert!(report.downtime_ms.unwrap() < 5000.0, "{report:?}");
    assert!(report.cpu_seconds.source > 0.0 && report.cpu_seconds.destination > 0.0, "{report:?}");
    assert_eq!(report.announcements, ["toy: 1 frame"]);
    assert_eq!(report.page_check, S::DIRECT.then_some(true));
}

/// A guest that writes moves whole: each page is compared when it is committed.
pub async fn a_whole_migration<S: Subject>() {
    let trial = Trial::<S>::new(Plan { pause_between: Duration::from_micros(300), ..Plan::default() }).await;
    trial.load_like_a_vmm();
    let (outcome, report) = trial.migrate().await;
    trial.assert_moved(&outcome);
    trial.settle().await;
    assert_report(&trial, &report, 2);
    assert_eq!(trial.toy().saw.announced.load(Ordering::SeqCst), 1);
}

pub async fn one_to_sixteen_lanes<S: Subject>() {
    for lanes in [1, 3, 8, 16] {
        let mut trial = Trial::<S>::new(Plan::default()).await;
        trial.sender.lanes = lanes;
        trial.load_like_a_vmm();
        let (outcome, report) = trial.migrate().await;
        trial.assert_moved(&outcome);
        trial.settle().await;
        assert_report(&trial, &report, lanes);
    }
}

/// What is zero does not travel, whether it was ever touched or not.
pub async fn zeros_cost_nothing<S: Subject>() {
    let memory = ToyMemory::regions(&[1 << 14, 777, 1 << 13]);
    for page in 0..512 {
        memory.poke_page(page * 3, |_| 0);
    }
    for page in 100..108 {
        memory.poke_page(page, |word| word + 1);
    }
    let settings = ToySettings { populate: Populate::No, ..ToySettings::default() };
    let plan = Plan { memory, pause_between: Duration::from_secs(60), settings, hasty: false };
    let trial = Trial::<S>::new(plan).await;
    let (outcome, report) = trial.migrate().await;
    trial.assert_moved(&outcome);
    trial.settle().await;
    // The eight pages, what saving writes and the guest's first write; twice, should they be written again.
    assert!(page_bytes(&report) <= 20 * PAGE_BYTES, "{report:?}");
    assert!(report.bytes_on_wire < 20 * PAGE_BYTES + 300_000, "{} bytes for empty memory", report.bytes_on_wire);
    assert!(report.zero_pages >= (1 << 14) + 777 + (1 << 13) - 20);
    assert_eq!(trial.toy().saw.memory.lock().unwrap().as_ref().unwrap().populated.load(Ordering::SeqCst), 0);
}

/// A page sent as data in one round and as zero in a later one is zero there; and the cap holds meanwhile.
pub async fn the_cap_holds_and_zeros_replace_data<S: Subject>() {
    const CAP: u64 = 6_000_000;
    let plan = Plan { pause_between: Duration::from_micros(200), ..Plan::default() };
    let mut trial = Trial::<S>::new(plan).await;
    trial.sender.settings.bandwidth_bytes_per_s = CAP;
    let (outcome, report) = trial.migrate().await;
    trial.assert_moved(&outcome);
    trial.settle().await;
    let later = report.round_list.iter().skip(1).map(|round| round.zero_pages).sum::<u64>();
    assert!(later > 0, "no page became zero: {:?}", report.round_list);
    // A lower bound: the bytes cannot have left sooner. 50 ms may be made up for, and each lane's last frame is not waited for.
    let first = report.round_list[0];
    let free = CAP / 20 + 2 * trial.sender.settings.frame_bytes;
    let least = (first.pages * PAGE_BYTES).saturating_sub(free) as f64 * 1000.0 / CAP as f64;
    assert!(least > 100.0 && first.ms >= least, "{} bytes in {} ms", first.pages * PAGE_BYTES, first.ms);
}

/// Everything that the source and the destination tell while they work adds up.
pub async fn progress_is_told<S: Subject>() {
    let mut trial = Trial::<S>::new(Plan { pause_between: Duration::from_millis(20), ..Plan::default() }).await;
    trial.sender.settings.bandwidth_bytes_per_s = 2_500_000;
    trial.load_like_a_vmm();
    let mut told = trial.sender.progress.subscribe();
    let listening = tokio::spawn(async move {
        let mut all: Vec<Progress> = Vec::new();
        while told.changed().await.is_ok() {
            all.push(told.borrow_and_update().clone());
            if all.last().is_some_and(|last| last.downtime.is_some() && last.state == SourceState::Done) {
                break;
            }
        }
        all
    });
    let (outcome, report) = trial.migrate().await;
    trial.assert_moved(&outcome);
    trial.settle().await;
    let all = tokio::time::timeout(Duration::from_secs(10), listening).await.unwrap().unwrap();
    let within = |progress: &&Progress| progress.pages_remaining > 0 && progress.pages_remaining < progress.round_pages;
    assert!(all.iter().filter(|progress| progress.round == 1).filter(within).count() >= 2, "nothing was told within round 1");
    assert!(all.windows(2).all(|pair| pair[0].round <= pair[1].round && pair[0].bytes_on_wire <= pair[1].bytes_on_wire));
    let last = all.last().unwrap();
    assert_eq!((last.rounds.len() as u32, last.bytes_on_wire), (report.rounds, report.bytes_on_wire));
    let seen = *trial.toy().seen.lock().unwrap().as_ref().unwrap().borrow();
    let zeros = report.round_list.iter().map(|round| round.zero_pages).sum::<u64>();
    assert_eq!((seen.rounds, seen.pages * PAGE_BYTES, seen.zero_pages), (report.rounds, page_bytes(&report), zeros));
    assert!(seen.bytes_on_wire >= page_bytes(&report), "{seen:?}");
}

/// Waits until pages move.
pub async fn moving<S: Subject>(trial: &Trial<S>) {
    let bytes = || trial.toy().seen.lock().unwrap().as_ref().map_or(0, |seen| seen.borrow().bytes_on_wire);
    while bytes() == 0 {
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}

pub async fn a_cancel_from_either_side<S: Subject>() {
    for side in [Side::Source, Side::Destination] {
        let mut trial = Trial::<S>::new(Plan::default()).await;
        trial.sender.settings.bandwidth_bytes_per_s = 300_000;
        let cancelling = async {
            moving(&trial).await;
            match side {
                Side::Source => trial.sender.cancel.cancel("an operator changed his mind"),
                Side::Destination => trial.toy().cancel.lock().unwrap().cancel("an operator changed his mind"),
            }
        };
        let ((outcome, report), ()) = tokio::join!(trial.migrate(), cancelling);
        trial.assert_stayed(&outcome);
        match &outcome {
            SourceOutcome::Aborted { code: Code::Cancelled, words, by, guest_runs: true } if *by == side => {
                assert!(words.contains("changed his mind"), "{words}");
            }
            other => panic!("{side:?}: {other:?}"),
        }
        assert_eq!(report.link, S::NAME);
        trial.next_is_good().await;
    }
}

/// Lanes and control that have nothing to carry for longer than silence is borne stay open: keepalives go. Before the first word
/// none may go, since a destination hears Hello first.
pub async fn idle_channels_stay_open<S: Subject>() {
    let idling = |call: Call, here: bool, idle: Duration| async move {
        let trial = Trial::<S>::hasty().await;
        let faults = if here { &trial.sender.saw.faults } else { &trial.toy().saw.faults };
        let first = AtomicBool::new(true);
        let slow = move || {
            if first.swap(false, Ordering::SeqCst) {
                std::thread::sleep(idle);
            }
        };
        faults.add(call, Fault::Then(Arc::new(slow)));
        let (outcome, report) = trial.migrate().await;
        trial.assert_moved(&outcome);
        trial.settle().await;
        assert!(report.total_ms >= idle.as_secs_f64() * 1e3, "{report:?}");
    };
    let (long, short) = (silence::<S>() + Duration::from_millis(1500), silence::<S>() / 2);
    // Before the first word; between two rounds, when lanes wait; at the end, when everything does.
    let started = Call::Journal(Kind::Started);
    tokio::join!(idling(started, true, short), idling(Call::Fetch, true, long), idling(Call::Load, false, long));
}

/// A source that is gone in mid-round leaves nothing at the destination, and no thread here.
pub async fn a_source_that_vanishes<S: Subject>() {
    let mut trial = Trial::<S>::new(Plan::default()).await;
    trial.sender.settings.bandwidth_bytes_per_s = 300_000;
    tokio::select! {
        ended = trial.migrate() => panic!("it ended before it could vanish: {:?}", ended.0),
        () = moving(&trial) => {}
    }
    trial.settle().await;
    assert_eq!((trial.toy().saw.discarded.load(Ordering::SeqCst), trial.toy().sessions.open()), (1, 0));
    assert!(trial.sender.guest.is_running());
    trial.next_is_good().await;
}
