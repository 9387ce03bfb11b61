//! Checks of what is not let in: lanes that show the wrong thing, frames beyond their limits, keys that were not due. After each of
//! them a good migration.

use crate::raw::{RawLane, RawSource, hello, page};
use crate::subject::{NotApplicable, Plan, REGIONS, Subject, Trial, not_applicable};
use crate::toy::{Call, Fault, Sender, ToySettings};
use limosa_link::ConnectError;
use limosa_proto::identity::{Generation, MigrationId};
use limosa_proto::memory::PageRange;
use limosa_proto::state::DestinationState;
use limosa_proto::wire::code::Code;
use limosa_proto::wire::frame::{LANE_HEADER_BYTES, LaneFrameKind, LaneHeader, LanePreamble, LaneToken, emit_runs};
use limosa_proto::wire::limits::{FRAME_BYTES_MAX, LANES_MAX, RUNS_PER_FRAME_MAX};
use limosa_proto::wire::message::Message;
use limosa_proto::wire::offer::KeysAsk;
use std::sync::Arc;
use std::time::Duration;
use tokio::task::{JoinSet, spawn_blocking};

/// Lets `preamble` be seen; what is answered to it.
async fn shown<S: Subject>(trial: &Trial<S>, raw: &RawSource, preamble: LanePreamble) -> Result<(), ConnectError> {
    raw.show(preamble, trial.sender.guest.memory.clone()).await.map(drop)
}

fn assert_refused(answer: Result<(), ConnectError>, code: Code, what: &str) {
    match answer {
        Err(error) => assert_eq!(error.code(), code, "{what}: {error}"),
        Ok(()) => panic!("{what} was let in"),
    }
}

/// Migration, generation, token and number must be what was agreed, and a number joins once.
pub async fn a_lane_must_show_what_was_agreed<S: Subject>() {
    let mut trial = Trial::<S>::new(Plan::default()).await;
    let raw = RawSource::prepared(&trial, 2).await;
    let right = raw.preamble(0);
    let mut other_token = right.token;
    other_token.0[31] ^= 1;
    for (what, wrong) in [
        ("another migration", LanePreamble { migration: MigrationId([1; 16]), ..right }),
        ("a later generation", LanePreamble { generation: Generation(2), ..right }),
        ("no generation", LanePreamble { generation: Generation(0), ..right }),
        ("another token", LanePreamble { token: other_token, ..right }),
        ("an empty token", LanePreamble { token: LaneToken([0; 32]), ..right }),
        ("the first lane too many", LanePreamble { lane: 2, ..right }),
        ("the largest number of a lane", LanePreamble { lane: LANES_MAX - 1, ..right }),
    ] {
        assert_refused(shown(&trial, &raw, wrong).await, Code::Violation, what);
    }
    // Beyond what the preamble's own limits allow: answered or not, but never let in.
    for lane in [LANES_MAX, 32, 64, u16::MAX] {
        assert!(shown(&trial, &raw, LanePreamble { lane, ..right }).await.is_err(), "lane {lane}");
    }
    let first = raw.lane(0, &trial.sender.guest.memory).await;
    assert_refused(shown(&trial, &raw, right).await, Code::Violation, "lane 0 for the second time");
    let second = raw.lane(1, &trial.sender.guest.memory).await;
    let state = || trial.toy().seen.lock().unwrap().as_ref().unwrap().borrow().state;
    for _ in 0..500 {
        if state() == DestinationState::Receiving {
            break;
        }
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    assert_eq!(state(), DestinationState::Receiving, "the right lanes did not join");
    drop((first, second, raw));
    trial.next_is_good().await;
}

/// No lane before the destination is prepared, and none over another link than Hello named.
pub async fn a_lane_out_of_place<S: Subject>() {
    let mut trial = Trial::<S>::new(Plan::default()).await;
    let slow = Arc::new(|| std::thread::sleep(Duration::from_millis(400)));
    trial.toy().saw.faults.add(Call::Prepare, Fault::Then(slow));
    let mut raw = RawSource::begin(&trial, trial.link(), 1, hello(&trial, 1)).await;
    assert_refused(shown(&trial, &raw, raw.preamble(0)).await, Code::Violation, "a lane before its time");
    raw.wait_prepared().await;
    drop(raw.lane(0, &trial.sender.guest.memory).await);
    drop(raw);
    let elsewhere = limosa_proto::wire::message::Hello { link: "carrier-pigeon".to_owned(), ..hello(&trial, 1) };
    let mut raw = RawSource::begin(&trial, trial.link(), 2, elsewhere).await;
    raw.wait_prepared().await;
    assert_refused(shown(&trial, &raw, raw.preamble(0)).await, Code::Violation, "a lane of another link");
    drop(raw);
    trial.next_is_good().await;
}

/// A lane of another host, which is trusted too and knows the token.
pub async fn a_lane_of_another_host<S: Subject>() {
    if !S::LANES_KNOW_PEER {
        return not_applicable::<S>("a lane of another host", NotApplicable("a lane is known by its token alone"));
    }
    let mut trial = Trial::<S>::new(Plan::default()).await;
    let other = Sender::new(trial.sender.guest.clone());
    other.befriend(trial.toy());
    let mut raw = RawSource::prepared(&trial, 1).await;
    raw.link = trial.subject.link(&other);
    // Over a channel of its own, as the other host would; some links need one before a lane.
    let control = raw.link.control().await.unwrap();
    assert_refused(shown(&trial, &raw, raw.preamble(0)).await, Code::UnknownHost, "a lane of another host");
    drop((control, raw));
    trial.next_is_good().await;
}

/// More lanes than there may be are not granted.
pub async fn too_many_lanes<S: Subject>() {
    let mut trial = Trial::<S>::new(Plan::default()).await;
    let raw = RawSource::prepared(&trial, u16::MAX).await;
    assert_eq!(raw.accept.lanes, LANES_MAX);
    assert!(trial.link().capabilities().lanes_max <= LANES_MAX);
    drop(raw);
    trial.next_is_good().await;
}

/// Bytes of a frame with a table of `runs` and whatever header.
fn frame(header: LaneHeader, runs: &[PageRange]) -> Vec<u8> {
    let mut head = header.emit().to_vec();
    emit_runs(runs, &mut head);
    head
}

/// Frames that break a rule each, for a lane in round 1.
fn bad_frames(lane: &RawLane) -> Vec<(&'static str, Vec<u8>)> {
    use LaneFrameKind::{Barrier, Pages, Zero};
    let good = |kind, runs: &[PageRange]| lane.header(kind, 1, runs);
    let with = |runs: &[PageRange]| frame(good(Zero, runs), runs);
    let one = [page(0)];
    let last = REGIONS[0] - 1;
    let mut bad = vec![
        ("more bytes than a frame may have", frame(LaneHeader { bytes: FRAME_BYTES_MAX + 4096, ..good(Pages, &one) }, &one)),
        ("bytes that are no pages", frame(LaneHeader { bytes: 4095, ..good(Pages, &one) }, &one)),
        ("more bytes than runs", frame(LaneHeader { bytes: 8192, ..good(Pages, &one) }, &one)),
        ("zero pages with bytes", frame(LaneHeader { bytes: 4096, ..good(Zero, &one) }, &one)),
        ("pages without runs", frame(LaneHeader { bytes: 4096, ..good(Pages, &[]) }, &[])),
        ("a barrier with runs", frame(LaneHeader { runs: 1, ..good(Barrier, &[]) }, &one)),
        ("another migration", frame(LaneHeader { migration: MigrationId([9; 16]), ..good(Zero, &one) }, &one)),
        ("another generation", frame(LaneHeader { generation: Generation(7), ..good(Zero, &one) }, &one)),
        ("the next round", frame(LaneHeader { round: 2, ..good(Zero, &one) }, &one)),
        ("round 0", frame(LaneHeader { round: 0, ..good(Zero, &one) }, &one)),
        ("too many rounds", frame(LaneHeader { round: u32::MAX, ..good(Barrier, &[]) }, &[])),
        ("a run behind the memory", with(&[page(1 << 40)])),
        ("a run at the end of numbers", with(&[PageRange { first: u64::MAX, count: u64::from(u32::MAX) }])),
        ("a run across regions", with(&[PageRange { first: last, count: 2 }])),
        ("a run without pages", with(&[PageRange { first: 0, count: 0 }])),
        ("runs that fall", with(&[page(3), page(2)])),
        ("runs that overlap", with(&[PageRange { first: 1, count: 3 }, page(2)])),
        ("garbage", vec![0xA5; LANE_HEADER_BYTES]),
    ];
    let many: Vec<PageRange> = (0..=RUNS_PER_FRAME_MAX as u64).map(|number| page(number % 2)).collect();
    bad.push(("too many runs", with(&many)));
    // Bits of the magic, the kind, the flags and the reserved field.
    for bit in [3, 33, 41, 376] {
        let mut head = good(Barrier, &[]).emit();
        head[bit / 8] ^= 1 << (bit % 8);
        bad.push(("a header of which one bit is wrong", head.to_vec()));
    }
    bad
}

/// Each frame beyond a limit ends its migration in words, writes nothing, and the destination goes on.
pub async fn frames_are_held_to_their_limits<S: Subject>() {
    let settings = ToySettings { incoming_max: 64, ..ToySettings::default() };
    let trial = Arc::new(Trial::<S>::new(Plan { settings, ..Plan::default() }).await);
    let mut raw = RawSource::prepared(&trial, 1).await;
    let count = bad_frames(&raw.lane(0, &trial.sender.guest.memory).await).len();
    raw.say(Message::Abort { code: Code::Cancelled, words: "only looking".to_owned() });
    raw.end().await;
    drop(raw);
    let mut trials = JoinSet::new();
    for number in 0..count {
        let trial = trial.clone();
        trials.spawn(async move {
            let mut raw = RawSource::named(&trial, 1, number as u8 + 1).await;
            let mut lane = raw.lane(0, &trial.sender.guest.memory).await;
            let (what, head) = bad_frames(&lane).swap_remove(number);
            // The lane may be closed before all of it is out.
            let lane = spawn_blocking(move || (lane.lane.head(&head).and_then(|()| lane.lane.flush()).is_ok(), lane));
            let words = raw.end().await;
            assert!(words.contains("lane 0"), "{what}: {words}");
            drop((lane.await.unwrap(), raw));
        });
    }
    while let Some(ended) = trials.join_next().await {
        ended.unwrap();
    }
    trial.toy().settle().await;
    assert!(
        trial.toy().saw.memory.lock().unwrap().as_ref().unwrap().snapshot().iter().all(|byte| *byte == 0),
        "something was written"
    );
    Arc::into_inner(trial).unwrap().next_is_good().await;
}

/// A lane that is closed without its end is not an end.
pub async fn a_lane_that_just_closes<S: Subject>() {
    let mut trial = Trial::<S>::new(Plan::default()).await;
    let mut raw = RawSource::prepared(&trial, 2).await;
    let (first, second) = (raw.lane(0, &trial.sender.guest.memory).await, raw.lane(1, &trial.sender.guest.memory).await);
    first.lane.closer().unwrap().close();
    drop(first);
    let words = raw.end().await;
    assert!(words.contains("lane 0"), "{words}");
    drop((second, raw));
    trial.next_is_good().await;
}

/// Keys of memory are given only where the link needs them, once each, and only of memory that is there.
pub async fn keys_are_asked_for_once<S: Subject>() {
    let mut trial = Trial::<S>::new(Plan::default()).await;
    let asks: &[(&[u32], &str)] = if S::DIRECT {
        &[(&[0, 1, 0], "twice for the key of chunk 0"), (&[4], "chunk 4 of 4"), (&[u32::MAX], "of 4")]
    } else {
        &[(&[0], "on a link that needs none")]
    };
    for (number, (chunks, wants)) in asks.iter().enumerate() {
        let mut raw = RawSource::named(&trial, 1, number as u8 + 1).await;
        raw.say(Message::KeysAsk(KeysAsk { chunks: chunks.to_vec() }));
        let words = raw.end().await;
        assert!(words.contains(wants), "{words}");
        drop(raw);
        trial.settle().await;
    }
    trial.next_is_good().await;
}
