//! Checks of what lanes promise each other: order, barriers, back-pressure, an end that delivers everything.

use crate::raw::{RawSource, hello, page};
use crate::subject::{Plan, Subject, Trial, not_applicable};
use crate::toy::{Call, Fault, STATE, ToyMemory, ToySettings};
use limosa_proto::identity::{Generation, MigrationId};
use limosa_proto::memory::{PAGE_BYTES, PageRange};
use limosa_proto::precopy::PrecopyPolicy;
use limosa_proto::record::Record;
use limosa_proto::wire::code::Code;
use limosa_proto::wire::message::Message;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;
use tokio::task::spawn_blocking;

/// Waits until `done`.
async fn until(what: &str, done: impl Fn() -> bool) {
    for _ in 0..1000 {
        if done() {
            return;
        }
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    panic!("{what} never came");
}

fn incoming<S: Subject>(trial: &Trial<S>) -> Arc<ToyMemory> {
    trial.toy().saw.memory.lock().unwrap().clone().unwrap()
}

fn rounds<S: Subject>(trial: &Trial<S>) -> u32 {
    trial.toy().seen.lock().unwrap().as_ref().map_or(0, |seen| seen.borrow().rounds)
}

fn like<S: Subject>(trial: &Trial<S>) -> Arc<ToyMemory> {
    ToyMemory::of(trial.sender.guest.memory.map.clone())
}

/// One lane says the same page three times, and once that it is zero: the last word counts, round for round.
pub async fn a_lane_keeps_its_order<S: Subject>() {
    let mut trial = Trial::<S>::new(Plan::default()).await;
    let raw = RawSource::prepared(&trial, 1).await;
    let pages = like(&trial);
    let mut lane = raw.lane(0, &pages).await;
    let ours = pages.clone();
    let lane = spawn_blocking(move || {
        for round in 1..=9 {
            // A page in the middle of a frame of many, so that the frames differ in size.
            ours.poke_page(5, |word| u64::from(round) << 32 | word);
            lane.send(round, &[PageRange { first: 0, count: u64::from(round) + 5 }]).unwrap();
            if round % 3 == 0 {
                lane.zero(round, &[page(5)]).unwrap();
            }
            lane.barrier(round).unwrap();
        }
        lane
    });
    let mut lane = lane.await.unwrap();
    until("the ninth round", || rounds(&trial) == 9).await;
    assert_eq!(incoming(&trial).peek(5, 7), 0, "a page that was said to be zero last has contents");
    assert_eq!(incoming(&trial).peek(4, 7), 0);
    pages.poke_page(5, |word| 10 << 32 | word);
    let lane = spawn_blocking(move || {
        lane.send(10, &[page(5)]).unwrap();
        lane.barrier(10).unwrap();
        lane
    });
    let lane = lane.await.unwrap();
    until("the tenth round", || rounds(&trial) == 10).await;
    assert_eq!(incoming(&trial).peek(5, 7), 10 << 32 | 7);
    drop((lane, raw));
    trial.next_is_good().await;
}

/// A page of round 2 on a quick lane never ends up below the same page of round 1 on a slow one.
pub async fn a_round_never_overtakes<S: Subject>() {
    let mut trial = Trial::<S>::new(Plan::default()).await;
    let raw = RawSource::prepared(&trial, 2).await;
    let (old, new) = (like(&trial), like(&trial));
    old.poke_page(3, |_| 1);
    new.poke_page(3, |_| 2);
    let (mut quick, mut slow) = (raw.lane(0, &new).await, raw.lane(1, &old).await);
    let quick = spawn_blocking(move || {
        quick.barrier(1).unwrap();
        quick.send(2, &[page(3)]).unwrap();
        quick.barrier(2).unwrap();
        quick
    });
    tokio::time::sleep(Duration::from_millis(200)).await;
    assert_eq!((incoming(&trial).peek(3, 0), rounds(&trial)), (0, 0), "round 2 began before round 1 was whole");
    let slow = spawn_blocking(move || {
        slow.send(1, &[page(3)]).unwrap();
        slow.barrier(1).unwrap();
        slow.barrier(2).unwrap();
        slow
    });
    let lanes = (quick.await.unwrap(), slow.await.unwrap());
    until("round 2", || rounds(&trial) == 2).await;
    assert_eq!(incoming(&trial).peek(3, 0), 2, "the page of round 1 came last");
    drop((lanes, raw));
    trial.next_is_good().await;
}

/// A guest that writes before each look at its dirty pages moves in many rounds over many lanes, and every page is its newest.
pub async fn many_rounds_over_many_lanes<S: Subject>() {
    let memory = ToyMemory::regions(&[64, 7]);
    memory.fill(|_| true);
    let plan = Plan { memory: memory.clone(), pause_between: Duration::from_secs(60), ..Plan::default() };
    let mut trial = Trial::<S>::new(plan).await;
    trial.sender.lanes = 6;
    trial.sender.settings.frame_bytes = 4096;
    trial.sender.tune = Box::new(|config| {
        // Never met: every round finds pages that were written meanwhile.
        let downtime_target = Duration::from_nanos(1);
        config.policy = PrecopyPolicy { downtime_target, rounds_max: 40, ..config.policy.clone() };
    });
    // Fewer each time, so that it is worth going on, and spread over all pages.
    let (fetches, guest) = (AtomicU64::new(0), trial.sender.guest.clone());
    let writes = move || {
        let fetch = fetches.fetch_add(1, Ordering::SeqCst);
        let pages = memory.pages();
        let some = pages.iter().cycle().skip(fetch as usize * 13).take(60_usize.saturating_sub(fetch as usize * 5));
        if guest.is_running() {
            some.for_each(|page| memory.poke(*page, 9, fetch << 32 | *page));
        }
    };
    trial.sender.saw.faults.add(Call::Fetch, Fault::Then(Arc::new(writes)));
    let (outcome, report) = trial.migrate().await;
    trial.assert_moved(&outcome);
    trial.sender.saw.faults.0.lock().unwrap().clear();
    trial.settle().await;
    assert!(report.rounds >= 10, "{report:?}");
}

/// A destination that takes nothing for a while: what is under way is bounded, and nothing is lost.
pub async fn a_slow_receiver_is_waited_for<S: Subject>() {
    let most = match S::UNDER_WAY_MAX {
        Ok(most) => most,
        Err(reason) => return not_applicable::<S>("a slow receiver", reason),
    };
    let pages = most / PAGE_BYTES + 4096;
    let memory = ToyMemory::regions(&[pages]);
    memory.fill(|_| true);
    let settings = ToySettings { populate: limosa_link::Populate::No, ..ToySettings::default() };
    let plan = Plan { memory, pause_between: Duration::from_millis(20), settings, ..Plan::default() };
    let mut trial = Trial::<S>::new(plan).await;
    trial.sender.lanes = 1;
    trial.toy().saw.hold.set(true);
    let told = trial.sender.progress.subscribe();
    let holding = async {
        let sent = || told.borrow().bytes_on_wire;
        let (mut before, mut same) = (0, 0);
        // Until nothing more leaves. For less than silence is borne: TCP takes a window closed for so long as silence.
        for _ in 0..60 {
            tokio::time::sleep(Duration::from_millis(100)).await;
            same = if sent() == before { same + 1 } else { 0 };
            before = sent();
            if same >= 10 {
                break;
            }
        }
        trial.toy().saw.hold.set(false);
        assert!(same >= 10, "bytes kept leaving for 6 s although nobody took them");
        before
    };
    let ((outcome, report), under_way) = tokio::join!(trial.migrate(), holding);
    trial.assert_moved(&outcome);
    trial.settle().await;
    assert!(under_way <= most, "{under_way} bytes were under way");
    assert!(report.bytes_on_wire > pages * PAGE_BYTES);
}

/// A source that says its last word and drops everything at once: all of it arrives, and is loaded.
pub async fn an_end_delivers_everything<S: Subject>() {
    let memory = ToyMemory::regions(&[1024, 512]);
    memory.fill(|_| true);
    let settings = ToySettings { ready: Duration::from_millis(300), ..ToySettings::default() };
    let mut trial = Trial::<S>::new(Plan { memory: memory.clone(), settings, ..Plan::default() }).await;
    trial.sender.guest.set_running(false);
    let mut raw = RawSource::prepared(&trial, 2).await;
    let mut ending = Vec::new();
    for (number, first) in [(0, 0), (1, 1024)] {
        let mut lane = raw.lane(number, &memory).await;
        ending.push(spawn_blocking(move || {
            for part in 0..4 {
                lane.send(1, &[PageRange { first: first + part * 128, count: 128 }]).unwrap();
            }
            lane.barrier(1).unwrap();
            lane.finish(1).unwrap();
        }));
    }
    for ending in ending {
        ending.await.unwrap();
    }
    raw.say_records((0..3).map(|instance| Record { kind: 1, version: 1, instance, bytes: STATE.to_vec() }).collect(), 1);
    loop {
        match raw.next().await {
            Ok(Message::RoundDone { round: 1 }) => {}
            Ok(Message::Ready(_)) => break,
            other => panic!("{other:?}"),
        }
    }
    let (ours, theirs) = (memory.snapshot(), incoming(&trial).snapshot());
    let sent = (0..512 * 4096).chain(1024 * 4096..1536 * 4096);
    assert!(sent.into_iter().all(|byte| ours[byte] == theirs[byte]), "not everything arrived");
    drop((raw, memory));
    // Never committed, it is discarded when the destination has waited long enough.
    trial.sender.guest.set_running(true);
    trial.next_is_good().await;
}

/// The last message before a control channel is dropped arrives.
pub async fn what_was_queued_is_said<S: Subject>() {
    let mut trial = Trial::<S>::new(Plan::default()).await;
    let control = trial.link().control().await.unwrap();
    let say = |message: &Message| control.send(MigrationId([5; 16]), Generation(1), message).unwrap();
    say(&Message::Hello(Box::new(hello(&trial, 1))));
    say(&Message::Abort { code: Code::Cancelled, words: "my last words".to_owned() });
    drop(control);
    let outcomes = || format!("{:?}", trial.toy().outcomes.lock().unwrap());
    until("the last message", || outcomes().contains("my last words")).await;
    trial.next_is_good().await;
}
