//! Checks under harm: the way is cut at any byte, in each phase, at the commit; the other side falls silent. The guest runs on exactly
//! one host, both sides end by themselves, nothing is left behind, and the next migration succeeds.

use crate::moving::moving;
use crate::subject::{Direction, Plan, Stream, Subject, Trial, Wire, not_applicable};
use crate::toy::{Call, Fault, ToySettings, kinds};
use limosa_proto::commit::JournalRecordKind as Kind;
use limosa_proto::event::SourceOutcome;
use limosa_proto::state::SourceState;
use limosa_proto::wire::code::Code;
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::Semaphore;
use tokio::task::JoinSet;

/// Migrations under way at once; most of them wait.
const AT_ONCE: usize = 12;
/// Silence must have ended everything by then; far beyond the deadlines that end it.
const END_MAX: Duration = Duration::from_secs(30);

/// What the rest of the suite stands on: a way that can be harmed as far as the link claims.
pub async fn the_way_can_be_harmed<S: Subject>() {
    let trial = Trial::<S>::hasty().await;
    let wire = trial.wire().await;
    assert!(wire.cut_after(Stream::Control, Direction::ToDestination, u64::MAX).is_ok(), "no way to cut it at a byte");
    assert!(wire.record().is_ok() || !S::CONTROL_ENCRYPTED, "encryption is claimed and cannot be looked at");
    let (outcome, report) = trial.migrate_over(wire.link()).await;
    trial.assert_moved(&outcome);
    assert_eq!(report.link, S::NAME);
    assert!(
        wire.carried(Stream::Control, Direction::ToDestination) > 0 && wire.carried(Stream::Control, Direction::ToSource) > 0
    );
    trial.settle().await;
}

async fn hasty<S: Subject>(ready: Duration) -> Trial<S> {
    let settings = ToySettings { ready: ready * S::SLOWNESS, ..ToySettings::default() };
    Trial::new(Plan { hasty: true, settings, ..Plan::default() }).await
}

/// One migration whose `stream` is cut after `bytes`, and what must be true whatever came of it.
async fn one_cut<S: Subject>(stream: Stream, direction: Direction, bytes: u64) {
    let mut trial = hasty::<S>(Duration::from_millis(800)).await;
    let wire = trial.wire().await;
    wire.cut_after(stream, direction, bytes).unwrap();
    let (outcome, _) = trial.migrate_over(wire.link()).await;
    match outcome {
        // Cut when nothing more had to be said, or settled by a verdict: it is itself the migration that succeeds.
        SourceOutcome::Committed => {
            trial.assert_moved(&outcome);
            trial.settle().await;
        }
        SourceOutcome::Aborted { guest_runs: true, .. } | SourceOutcome::Refused(_) => {
            trial.assert_stayed(&outcome);
            drop(wire);
            trial.next_is_good().await;
        }
        other => panic!("{stream:?} cut after {bytes} bytes {direction:?}: {other:?}"),
    }
}

/// Points at which to cut a stream of `whole` bytes: its first bytes, where headers and handshakes are, then evenly.
fn points(whole: u64, count: u64) -> Vec<u64> {
    let mut points = vec![0, 1, 39, 40, 71];
    points.extend((0..count).map(|number| whole * (2 * number + 1) / (2 * count)));
    points.push(whole.saturating_sub(1));
    points.retain(|point| *point < whole);
    points.sort_unstable();
    points.dedup();
    points
}

async fn cut_everywhere<S: Subject>(streams: &[(Stream, Direction, u64)]) {
    let trial = hasty::<S>(Duration::from_secs(5)).await;
    let wire = trial.wire().await;
    let (outcome, _) = trial.migrate_over(wire.link()).await;
    trial.assert_moved(&outcome);
    trial.settle().await;
    let (gate, mut cuts) = (Arc::new(Semaphore::new(AT_ONCE / S::SLOWNESS as usize)), JoinSet::new());
    for (stream, direction, count) in streams {
        if let Err(reason) = wire.cut_after(*stream, *direction, u64::MAX) {
            not_applicable::<S>(&format!("a cut of {stream:?}"), reason);
            continue;
        }
        let whole = wire.carried(*stream, *direction);
        assert!(whole > 0, "nothing went {direction:?} on {stream:?}");
        for point in points(whole, *count) {
            let (gate, stream, direction) = (gate.clone(), *stream, *direction);
            cuts.spawn(async move {
                let _turn = gate.acquire().await.unwrap();
                one_cut::<S>(stream, direction, point).await;
            });
        }
    }
    while let Some(cut) = cuts.join_next().await {
        cut.unwrap();
    }
}

pub async fn control_is_cut_at_any_byte<S: Subject>() {
    cut_everywhere::<S>(&[(Stream::Control, Direction::ToDestination, 12), (Stream::Control, Direction::ToSource, 8)]).await;
}

pub async fn lanes_are_cut_at_any_byte<S: Subject>() {
    cut_everywhere::<S>(&[
        (Stream::Lane(0), Direction::ToDestination, 12),
        (Stream::Lane(1), Direction::ToDestination, 3),
        (Stream::Lane(0), Direction::ToSource, 2),
    ])
    .await;
}

/// Everything is cut at once while a host does something, in each phase before the commit.
pub async fn everything_is_cut_in_each_phase<S: Subject>() {
    let at_source = [Call::Journal(Kind::Started), Call::Track, Call::Fetch, Call::Pause, Call::Save];
    let at_destination = [Call::Prepare, Call::Load, Call::Journal(Kind::Ready)];
    let (gate, mut cuts) = (Arc::new(Semaphore::new(AT_ONCE / S::SLOWNESS as usize)), JoinSet::new());
    for (call, here) in at_source.iter().map(|call| (*call, true)).chain(at_destination.iter().map(|call| (*call, false))) {
        let gate = gate.clone();
        cuts.spawn(async move {
            let _turn = gate.acquire().await.unwrap();
            let mut trial = hasty::<S>(Duration::from_millis(300)).await;
            let wire = trial.wire().await;
            let faults = if here { &trial.sender.saw.faults } else { &trial.toy().saw.faults };
            let cutter = wire.clone();
            faults.add(call, Fault::Then(Arc::new(move || cutter.cut())));
            let (outcome, _) = trial.migrate_over(wire.link()).await;
            trial.assert_stayed(&outcome);
            match &outcome {
                SourceOutcome::Aborted { code, guest_runs: true, .. } => {
                    assert_eq!(*code, Code::LinkLost, "{call:?}: {outcome:?}")
                }
                other => panic!("{call:?}: {other:?}"),
            }
            trial.next_is_good().await;
        });
    }
    while let Some(cut) = cuts.join_next().await {
        cut.unwrap();
    }
}

/// Cut while `released` is written: Commit never arrives, the source asks, and asking is as good as Commit.
pub async fn cut_at_the_commit_and_mended<S: Subject>() {
    let trial = hasty::<S>(Duration::from_secs(15)).await;
    let wire = trial.wire().await;
    let cutter = wire.clone();
    trial.sender.saw.faults.add(Call::Journal(Kind::Released), Fault::Then(Arc::new(move || cutter.cut())));
    let mut progress = trial.sender.progress.subscribe();
    let mending = async {
        progress.wait_for(|progress| progress.state == SourceState::InDoubt && progress.doubt.is_some()).await.unwrap();
        tokio::time::sleep(Duration::from_millis(300)).await;
        wire.mend();
    };
    let ((outcome, report), ()) = tokio::join!(trial.migrate_over(wire.link()), mending);
    trial.assert_moved(&outcome);
    assert!(report.ok);
    trial.settle().await;
    assert_eq!(kinds(&trial.sender.saw.journal), [Kind::Started, Kind::Released, Kind::Running]);
    assert_eq!(kinds(&trial.toy().saw.journal), [Kind::Ready, Kind::Running]);
}

/// Cut there for longer than the destination waits: it forbids itself the guest, and only that gives it back.
pub async fn cut_at_the_commit_for_too_long<S: Subject>() {
    let mut trial = hasty::<S>(Duration::from_millis(200)).await;
    let wire = trial.wire().await;
    let cutter = wire.clone();
    trial.sender.saw.faults.add(Call::Journal(Kind::Released), Fault::Then(Arc::new(move || cutter.cut())));
    let mut progress = trial.sender.progress.subscribe();
    let sessions = trial.toy().sessions.clone();
    let mending = async {
        progress.wait_for(|progress| progress.state == SourceState::InDoubt).await.unwrap();
        sessions.idle().await;
        wire.mend();
    };
    let ((outcome, _), ()) = tokio::join!(trial.migrate_over(wire.link()), mending);
    trial.assert_stayed(&outcome);
    assert_eq!(kinds(&trial.toy().saw.journal), [Kind::Ready, Kind::Discarded]);
    assert_eq!(kinds(&trial.sender.saw.journal), [Kind::Started, Kind::Released, Kind::Aborted]);
    trial.next_is_good().await;
}

/// Cut before Running is said: the destination has resumed the guest, the source asks and is told.
pub async fn cut_when_the_guest_runs_there<S: Subject>() {
    let trial = hasty::<S>(Duration::from_secs(5)).await;
    let wire = trial.wire().await;
    let cutter = wire.clone();
    let cut = move || {
        cutter.cut();
        cutter.mend();
    };
    trial.toy().saw.faults.add(Call::Resume, Fault::Then(Arc::new(cut)));
    let (outcome, _) = trial.migrate_over(wire.link()).await;
    trial.assert_moved(&outcome);
    trial.settle().await;
}

/// The other side falls silent and closes nothing: both sides end within a bound, and the guest runs at the source.
async fn silent<S: Subject>(trial: &mut Trial<S>, wire: Arc<dyn Wire>, freezing: impl Future<Output = ()>) {
    let migrating = tokio::time::timeout(END_MAX, trial.migrate_over(wire.link()));
    let (ended, ()) = tokio::join!(migrating, freezing);
    let (outcome, _) = ended.expect("a silent peer was waited for without end");
    trial.assert_stayed(&outcome);
    let ended = tokio::time::timeout(END_MAX, trial.settle()).await;
    ended.expect("the destination waited for a silent peer without end");
    wire.mend();
    trial.next_is_good().await;
}

pub async fn a_peer_that_falls_silent<S: Subject>() {
    let mid_round = async {
        let mut trial = Trial::<S>::hasty().await;
        trial.sender.settings.bandwidth_bytes_per_s = 300_000;
        let wire = trial.wire().await;
        let (seen, freezer) = (trial.toy().seen.clone(), wire.clone());
        let freezing = async move {
            while seen.lock().unwrap().as_ref().is_none_or(|seen| seen.borrow().bytes_on_wire == 0) {
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
            freezer.freeze();
        };
        silent(&mut trial, wire, freezing).await;
    };
    let preparing = async {
        let mut trial = Trial::<S>::hasty().await;
        let wire = trial.wire().await;
        let freezer = wire.clone();
        trial.toy().saw.faults.add(Call::Prepare, Fault::Then(Arc::new(move || freezer.freeze())));
        silent(&mut trial, wire, async {}).await;
    };
    let from_the_start = async {
        let mut trial = Trial::<S>::hasty().await;
        let wire = trial.wire().await;
        wire.freeze();
        silent(&mut trial, wire, async {}).await;
    };
    tokio::join!(mid_round, preparing, from_the_start);
}

/// The whole way is lost in mid-round, and with a lane that waits for the cap.
pub async fn everything_is_cut_in_mid_round<S: Subject>() {
    let mut trial = Trial::<S>::hasty().await;
    trial.sender.settings.bandwidth_bytes_per_s = 300_000;
    let wire = trial.wire().await;
    let cutting = async {
        moving(&trial).await;
        wire.cut();
    };
    let ((outcome, _), ()) = tokio::join!(trial.migrate_over(wire.link()), cutting);
    trial.assert_stayed(&outcome);
    assert!(matches!(outcome, SourceOutcome::Aborted { code: Code::LinkLost, guest_runs: true, .. }), "{outcome:?}");
    trial.next_is_good().await;
}
