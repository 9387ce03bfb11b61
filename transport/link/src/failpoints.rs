//! Fail points: the named places in the course of a migration at which a test stops, ends or delays this process, or has what
//! comes next fail. They are there with the feature `failpoints`, which no release build takes; elsewhere [`at`] is nothing.
//!
//! A test arms a point by a file of its name in the folder that LIMOSA_FAILPOINTS names: `stop` (the whole process, until
//! SIGCONT), `kill`, `fail`, `sleep MS`. It acts once: whoever reaches it renames the file to `NAME.reached` first.

use crate::host::HostError;
use limosa_proto::wire::message::Message;

#[cfg(all(feature = "failpoints", not(debug_assertions)))]
compile_error!("fail points are for tests: a release build must not have them");

macro_rules! points {
    ($($point:ident $name:literal)+) => {
        /// A fail point. Their order is about that of a migration, the source's before the destination's.
        #[allow(missing_docs)]
        #[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
        pub enum Point { $($point),+ }

        impl Point {
            /// Every one.
            pub const ALL: &'static [Point] = &[$(Point::$point),+];

            /// Its name, and its file's.
            #[must_use]
            pub fn name(self) -> &'static str {
                match self { $(Point::$point => $name),+ }
            }
        }
    };
}

points! {
    SourceBegins "source-begins"
    SourceSaysHello "source-says-hello"
    SourceHearsAccept "source-hears-accept"
    SourceStartedUnwritten "source-started-unwritten"
    SourceStartedWritten "source-started-written"
    SourceHearsPrepared "source-hears-prepared"
    SourceLanesOpen "source-lanes-open"
    SourceTracking "source-tracking"
    SourceRoundSent "source-round-sent"
    SourceHearsRoundDone "source-hears-round-done"
    SourceFetching "source-fetching"
    SourcePausing "source-pausing"
    SourcePaused "source-paused"
    SourceSaving "source-saving"
    SourceSaved "source-saved"
    SourceSaysRecordsEnd "source-says-records-end"
    SourceHearsReady "source-hears-ready"
    SourceReleasedUnwritten "source-released-unwritten"
    SourceReleasedWritten "source-released-written"
    SourceDisksGivenUp "source-disks-given-up"
    SourceSaysCommit "source-says-commit"
    SourceSaidCommit "source-said-commit"
    SourceHearsRunning "source-hears-running"
    SourceReleasing "source-releasing"
    SourceRunningUnwritten "source-running-unwritten"
    SourceRunningWritten "source-running-written"
    SourceHearsFinished "source-hears-finished"
    SourceEndsVmm "source-ends-vmm"
    SourceEnds "source-ends"
    SourceSaysAbort "source-says-abort"
    SourceAbortedUnwritten "source-aborted-unwritten"
    SourceAbortedWritten "source-aborted-written"
    SourceResuming "source-resuming"
    SourceResumed "source-resumed"
    SourceAsks "source-asks"
    SourceHearsVerdict "source-hears-verdict"
    SourceRecoveryBegins "source-recovery-begins"
    SourceRecoveryAsks "source-recovery-asks"
    SourceRecoveryHears "source-recovery-hears"
    SourceRecoveryWritten "source-recovery-written"
    DestinationHearsHello "destination-hears-hello"
    DestinationChecking "destination-checking"
    DestinationPreparing "destination-preparing"
    DestinationLaunched "destination-launched"
    DestinationPrepared "destination-prepared"
    DestinationReadyUnwritten "destination-ready-unwritten"
    DestinationReadyWritten "destination-ready-written"
    DestinationLanesJoined "destination-lanes-joined"
    DestinationRoundArrived "destination-round-arrived"
    DestinationLoading "destination-loading"
    DestinationLoaded "destination-loaded"
    DestinationSaysReady "destination-says-ready"
    DestinationHearsCommit "destination-hears-commit"
    DestinationResuming "destination-resuming"
    DestinationResumed "destination-resumed"
    DestinationSaysRunning "destination-says-running"
    DestinationAnnouncing "destination-announcing"
    DestinationAnnounced "destination-announced"
    DestinationRunningUnwritten "destination-running-unwritten"
    DestinationRunningWritten "destination-running-written"
    DestinationSaysFinished "destination-says-finished"
    DestinationHearsVerdictAsk "destination-hears-verdict-ask"
    DestinationDiscardedUnwritten "destination-discarded-unwritten"
    DestinationDiscardedWritten "destination-discarded-written"
    DestinationDiscarding "destination-discarding"
    DestinationDiscarded "destination-discarded"
    DestinationSaysVerdict "destination-says-verdict"
    DestinationRecoveryPluggedIn "destination-recovery-plugged-in"
    DestinationRecoveryWaits "destination-recovery-waits"
    DestinationRecoveryAsks "destination-recovery-asks"
    DestinationRecoveryHears "destination-recovery-hears"
    DestinationRecoveryAsked "destination-recovery-asked"
    DestinationRecoveryTookUp "destination-recovery-took-up"
    DestinationRecoveryWritten "destination-recovery-written"
    DestinationRecoveryGivesUp "destination-recovery-gives-up"
    DestinationRecoveryGivenUp "destination-recovery-given-up"
}

/// Reaches `point`.
///
/// # Errors
/// A test wants what comes next to fail.
#[cfg(feature = "failpoints")]
pub fn at(point: Point) -> Result<(), HostError> {
    use nix::sys::signal::{Signal, raise};
    let Some(folder) = std::env::var_os("LIMOSA_FAILPOINTS").map(std::path::PathBuf::from) else { return Ok(()) };
    let armed = folder.join(point.name());
    let Ok(action) = std::fs::read_to_string(&armed) else { return Ok(()) };
    if std::fs::rename(&armed, armed.with_extension("reached")).is_err() {
        return Ok(());
    }
    tracing::warn!(point = point.name(), action = action.trim(), "a fail point");
    let words: Vec<&str> = action.split_whitespace().collect();
    match words.as_slice() {
        // To this thread: it goes no step further before the whole process stands still.
        ["stop"] => raise(Signal::SIGSTOP).map_err(|e| HostError::new(e.to_string())),
        ["kill"] => raise(Signal::SIGKILL).map_err(|e| HostError::new(e.to_string())),
        ["sleep", ms] => {
            std::thread::sleep(std::time::Duration::from_millis(ms.parse().unwrap_or(0)));
            Ok(())
        }
        ["fail"] => Err(HostError::new(format!("a test wants this to fail ({})", point.name()))),
        other => Err(HostError::new(format!("the fail point {} has no action {other:?}", point.name()))),
    }
}

/// Reaches a point: nothing, in this build.
///
/// # Errors
/// Never.
#[cfg(not(feature = "failpoints"))]
#[inline(always)]
pub fn at(_point: Point) -> Result<(), HostError> {
    Ok(())
}

/// Reaches a point at which nothing can fail.
#[inline]
pub fn pass(point: Option<Point>) {
    // What it answers is for those who can fail.
    let _ = point.map(at);
}

/// The point before the source says this.
pub(crate) fn source_says(message: &Message) -> Option<Point> {
    Some(match message {
        Message::Hello(_) => Point::SourceSaysHello,
        Message::RecordsEnd { .. } => Point::SourceSaysRecordsEnd,
        Message::Commit => Point::SourceSaysCommit,
        Message::Abort { .. } => Point::SourceSaysAbort,
        _ => return None,
    })
}

/// The point when the source has heard this, before it does anything about it.
pub(crate) fn source_hears(message: &Message) -> Option<Point> {
    Some(match message {
        Message::Accept(_) => Point::SourceHearsAccept,
        Message::Prepared { .. } => Point::SourceHearsPrepared,
        Message::RoundDone { .. } => Point::SourceHearsRoundDone,
        Message::Ready(_) => Point::SourceHearsReady,
        Message::Running(_) => Point::SourceHearsRunning,
        Message::Finished(_) => Point::SourceHearsFinished,
        _ => return None,
    })
}

/// The point before the destination says this.
pub(crate) fn destination_says(message: &Message) -> Option<Point> {
    Some(match message {
        Message::Ready(_) => Point::DestinationSaysReady,
        Message::Running(_) => Point::DestinationSaysRunning,
        Message::Finished(_) => Point::DestinationSaysFinished,
        Message::Verdict(_) => Point::DestinationSaysVerdict,
        _ => return None,
    })
}

/// The point when the destination has heard this, before it does anything about it.
pub(crate) fn destination_hears(message: &Message) -> Option<Point> {
    Some(match message {
        Message::Hello(_) => Point::DestinationHearsHello,
        Message::Commit => Point::DestinationHearsCommit,
        Message::VerdictAsk { .. } => Point::DestinationHearsVerdictAsk,
        _ => return None,
    })
}
