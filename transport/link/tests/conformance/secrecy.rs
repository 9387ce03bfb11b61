//! The check of what can be read on the way: nothing where encryption is claimed, and everything where it is not, which shows that
//! the check can see.

use crate::subject::{Plan, Subject, Trial, not_applicable};
use crate::toy::{STATE, ToyMemory};

/// Words that every filled page of the guest has.
const SECRET: &[u8; 32] = b"the guest's own secret, 32 bytes";

fn contains(all: &[u8], wanted: &[u8]) -> bool {
    all.windows(wanted.len()).any(|window| window == wanted)
}

pub async fn what_is_said_to_be_encrypted_is<S: Subject>() {
    let memory = ToyMemory::regions(&[64, 33]);
    let words: Vec<u64> = SECRET.chunks(8).map(|word| u64::from_le_bytes(word.try_into().unwrap())).collect();
    for page in 0..64 {
        memory.poke_page(page, |word| words[word as usize % words.len()]);
    }
    let trial = Trial::<S>::new(Plan { memory, ..Plan::default() }).await;
    let wire = trial.wire().await;
    if let Err(reason) = wire.record() {
        return not_applicable::<S>("what can be read on the way", reason);
    }
    let (outcome, report) = trial.migrate_over(wire.link()).await;
    trial.assert_moved(&outcome);
    trial.settle().await;
    assert_eq!(report.encrypted, S::ENCRYPTED);
    let (control, lanes) = wire.recorded();
    assert_eq!(contains(&control, STATE), !S::CONTROL_ENCRYPTED, "records on the control channel");
    let (pages, beside) = (contains(&lanes, SECRET), contains(&control, SECRET));
    assert!(!beside, "a page on the control channel");
    // Where pages are written directly, only what goes beside them is seen here.
    assert_eq!(pages, !S::ENCRYPTED && !S::DIRECT, "pages on the lanes");
    let token = format!("{:?}", report);
    assert!(!token.contains("the guest's own secret"));
    if !S::DIRECT {
        assert!(control.len() + lanes.len() > 64 * 4096, "only {} bytes were seen", control.len() + lanes.len());
    }
}
