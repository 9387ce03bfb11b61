//! Checks of links that write memory directly, with the toy device that can be told to fail: its failures arrive in its words, pages
//! that the fabric changed are never committed, keys die with the migration.

use crate::direct::Direct;
use crate::subject::{Plan, Trial};
use crate::toy::ToyMemory;
use limosa_proto::event::{Side, SourceOutcome};
use limosa_proto::state::SourceState;
use limosa_proto::wire::code::Code;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

async fn trial() -> Trial<Direct> {
    Trial::new(Plan::default()).await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_chunk_that_cannot_be_opened() {
    for chunk in 0..4 {
        let mut trial = trial().await;
        trial.subject.device.refuse(Some(chunk));
        let (outcome, _) = trial.migrate().await;
        trial.assert_stayed(&outcome);
        match &outcome {
            SourceOutcome::Aborted { by: Side::Destination, words, guest_runs: true, .. } => {
                assert!(words.contains(&format!("did not take chunk {chunk} in: told to fail")), "{words}");
            }
            other => panic!("{other:?}"),
        }
        trial.settle().await;
        trial.subject.device.refuse(None);
        trial.next_is_good().await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_page_that_changed_on_the_way_is_not_committed() {
    let mut trial = trial().await;
    // Nobody but the migration writes it: the guest stands still.
    trial.sender.guest.set_running(false);
    trial.subject.device.flip(Some(70));
    let (outcome, report) = trial.migrate().await;
    match &outcome {
        SourceOutcome::Aborted { code: Code::PageCheck, by: Side::Destination, words, guest_runs: true } => {
            assert!(words.contains("1 pages did not arrive") && words.contains("page 70"), "{words}");
        }
        other => panic!("{other:?}"),
    }
    trial.assert_stayed(&outcome);
    assert_eq!((report.code.as_deref(), report.page_check), (Some("page-check"), Some(true)));
    assert!(!trial.toy().saw.running.load(Ordering::SeqCst));
    trial.settle().await;
    trial.subject.device.flip(None);
    let report = trial.next_is_good().await;
    assert_eq!(report.page_check, Some(true));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_page_check_is_left_out_if_both_sides_want_that() {
    for (source, destination) in [(false, true), (true, false), (false, false)] {
        let mut plan = Plan::default();
        plan.settings.tune = Arc::new(move |config| config.page_check = destination);
        let mut trial = Trial::<Direct>::new(plan).await;
        trial.sender.tune = Box::new(move |config| config.page_check = source);
        let (outcome, report) = trial.migrate().await;
        trial.assert_moved(&outcome);
        trial.settle().await;
        assert_eq!(report.page_check, Some(source || destination));
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn memory_without_contents_is_never_opened() {
    let memory = ToyMemory::regions(&[64, 64, 64, 64, 64]);
    memory.poke_page(130, |_| 5);
    let trial = Trial::<Direct>::new(Plan { memory, pause_between: Duration::from_secs(60), ..Plan::default() }).await;
    let (outcome, _) = trial.migrate().await;
    trial.assert_moved(&outcome);
    trial.settle().await;
    // The page's chunk, the first one (saving writes there, and the guest), and one ahead of each.
    let opened = trial.subject.device.opened();
    assert!(opened <= 4, "{opened} of 5 chunks were opened");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_key_is_worth_nothing_after_the_end() {
    let trial = trial().await;
    let (outcome, _) = trial.migrate().await;
    trial.assert_moved(&outcome);
    trial.settle().await;
    let opened = trial.subject.device.opened();
    assert!(opened > 0);
    for rkey in 1..=opened as u32 {
        let error = trial.subject.device.write(rkey, 0x7000_0000, &[1; 8]).unwrap_err().to_string();
        assert!(error.contains("no such key"), "{error}");
    }
}

/// A source whose lanes wait for a key is dropped: that must not wait for the key. On a runtime of its own, which can be left behind.
#[test]
fn a_source_that_vanishes_while_it_waits_for_a_key() {
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap();
    let ended = runtime.block_on(async {
        let trial = Arc::new(trial().await);
        let device = trial.subject.device.clone();
        device.stall(true);
        let migrating = tokio::spawn({
            let trial = trial.clone();
            async move { drop(trial.migrate().await) }
        });
        let state = || trial.sender.progress.borrow().state;
        while state() != SourceState::Precopy {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        tokio::time::sleep(Duration::from_millis(100)).await;
        migrating.abort();
        tokio::time::timeout(Duration::from_secs(10), migrating).await.map_err(|_| "its lanes still wait for a key")?.ok();
        device.stall(false);
        let mut trial = Arc::into_inner(trial).ok_or("the migration was not dropped")?;
        trial.next_is_good().await;
        Ok::<_, &str>(())
    });
    runtime.shutdown_background();
    ended.unwrap();
}
