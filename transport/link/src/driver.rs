//! The driver's face: how a source's migration is started, cancelled and asked about. `source.rs` and `destination.rs` are
//! the two loops; `limosa-proto` decides.

use crate::control::ControlError;
use crate::host::SourceHost;
use crate::key::HostKey;
use crate::lanes::thread_cpu;
use crate::tls::TrustedHosts;
use crate::{ConnectError, LaneSettings, Link, TcpLink, source};
use limosa_proto::event::{SourceConfig, SourceOutcome};
use limosa_proto::identity::{Generation, HostId, MigrationId};
use limosa_proto::progress::Progress;
use limosa_proto::report::Report;
use limosa_proto::time::Instant;
use limosa_proto::wire::frame::LaneToken;
use limosa_proto::wire::message::{Message, VerdictAnswer};
use ring::rand::SecureRandom as _;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, LazyLock};
use std::time::Duration;
use tokio::sync::watch;

/// How long a destination may take to answer a source in doubt; it may have to resume the guest first.
const VERDICT_MAX: Duration = Duration::from_secs(10);

/// The engine's time: nanoseconds since the process first asked.
pub(crate) fn now() -> Instant {
    Instant(u64::try_from(EPOCH.elapsed().as_nanos()).unwrap_or(u64::MAX))
}

/// How long from now to a moment of the engine.
pub(crate) fn until(moment: Instant) -> Duration {
    moment.since(now())
}

static EPOCH: LazyLock<std::time::Instant> = LazyLock::new(std::time::Instant::now);

/// A token for [`DestinationConfig`](limosa_proto::event::DestinationConfig): 32 random bytes.
///
/// # Errors
/// The system gives no random numbers.
pub fn fresh_token() -> std::io::Result<LaneToken> {
    let mut bytes = [0; 32];
    ring::rand::SystemRandom::new().fill(&mut bytes).map_err(|_| std::io::Error::other("the system gives no random numbers"))?;
    Ok(LaneToken(bytes))
}

/// Cancels something, from anywhere, once; the first words count. Clones are the same.
#[derive(Debug, Clone)]
pub struct Cancel(watch::Sender<Option<String>>);

impl Default for Cancel {
    fn default() -> Cancel {
        Cancel::new()
    }
}

impl Cancel {
    /// Not cancelled yet.
    #[must_use]
    pub fn new() -> Cancel {
        Cancel(watch::Sender::new(None))
    }

    /// Cancels it, and says why.
    pub fn cancel(&self, words: impl Into<String>) {
        self.0.send_if_modified(|old| {
            let first = old.is_none();
            old.get_or_insert(words.into());
            first
        });
    }

    /// Waits until it is cancelled; the words.
    pub async fn cancelled(&self) -> String {
        let mut words = self.0.subscribe();
        // The sender is `self`, so the wait cannot fail; if it ever did, nobody could cancel any more.
        let words = words.wait_for(Option::is_some).await.ok().and_then(|words| words.clone());
        match words {
            Some(words) => words,
            None => std::future::pending().await,
        }
    }

    /// Whether it was cancelled.
    #[must_use]
    pub fn is_cancelled(&self) -> bool {
        self.0.borrow().is_some()
    }
}

/// Where to send a guest over TCP, and how.
#[derive(Debug, Clone)]
pub struct SourceOptions {
    /// "host:port" of the destination's agent.
    pub destination: String,
    /// The key that it must have; the engine's `config.peer`.
    pub expected: HostId,
    /// Our key.
    pub key: HostKey,
    /// Hosts that are trusted here; the destination must be one.
    pub trusted: TrustedHosts,
    /// The engine's settings: lanes, plaintext, policy, deadlines.
    pub config: SourceConfig,
    /// Frame size and bandwidth cap.
    pub lanes: LaneSettings,
    /// After a restart, with `released` in the journal and no end: nothing is moved, the destination is asked for its
    /// verdict until it gives one.
    pub in_doubt: bool,
}

/// Moves the guest of `host` over TCP; returns when it is decided where the guest is. `progress` always holds the latest.
///
/// That the destination cannot be reached or does not let us in is an outcome (`Refused`): nothing was changed.
pub async fn run_source(
    options: SourceOptions,
    host: Box<dyn SourceHost>,
    cancel: Cancel,
    progress: watch::Sender<Progress>,
) -> (SourceOutcome, Report) {
    let SourceOptions { destination, expected, key, trusted, config, lanes, in_doubt } = options;
    let link = TcpLink::new(destination, expected, key, trusted, config.peer_silence_max);
    run_source_over(Arc::new(link), config, lanes, in_doubt, host, cancel, progress).await
}

/// As [`run_source`], over any link.
pub async fn run_source_over(
    link: Arc<dyn Link>,
    config: SourceConfig,
    lanes: LaneSettings,
    in_doubt: bool,
    host: Box<dyn SourceHost>,
    cancel: Cancel,
    progress: watch::Sender<Progress>,
) -> (SourceOutcome, Report) {
    source::run(link, config, lanes, in_doubt, host, cancel, progress).await
}

/// Why there is no verdict.
#[derive(Debug, thiserror::Error)]
pub enum VerdictError {
    /// The destination could not be reached.
    #[error(transparent)]
    Connect(#[from] ConnectError),
    /// The channel ended before the answer.
    #[error("destination {destination} did not answer for migration {migration}: {error}")]
    Control {
        /// Whom we asked.
        destination: String,
        /// About what.
        migration: MigrationId,
        /// Why.
        error: ControlError,
    },
    /// Another answer than a verdict, or none in time.
    #[error("destination {destination} gave no verdict on migration {migration}: {words}")]
    Answer {
        /// Whom we asked.
        destination: String,
        /// About what.
        migration: MigrationId,
        /// What came instead.
        words: String,
    },
}

/// Asks a destination once what became of a migration. `released` says that `released` is in our journal, which is as good
/// as Commit; false asks for the guest back.
///
/// # Errors
/// There is no answer; that proves nothing.
pub async fn ask_verdict(
    link: &dyn Link,
    migration: MigrationId,
    generation: Generation,
    released: bool,
) -> Result<VerdictAnswer, VerdictError> {
    let lost = |error| VerdictError::Control { destination: link.destination(), migration, error };
    let other = |words: String| VerdictError::Answer { destination: link.destination(), migration, words };
    let mut control = link.control().await?;
    control.send(migration, generation, &Message::VerdictAsk { released }).map_err(lost)?;
    let answer = async {
        loop {
            match control.receive().await.map_err(lost)? {
                (header, Message::Verdict(answer)) => {
                    header.expect(migration, generation).map_err(|error| other(error.to_string()))?;
                    return Ok(answer);
                }
                (_, Message::Abort { words, .. }) => return Err(other(words)),
                // The guest may be resumed for us right now; what is said about that comes on this channel too.
                _ => {}
            }
        }
    };
    match tokio::time::timeout(VERDICT_MAX, answer).await {
        Ok(answer) => answer,
        Err(_) => Err(other(format!("nothing came within {} s", VERDICT_MAX.as_secs()))),
    }
}

/// Counts the CPU time of a stretch without a wait into `cpu_ns`: tasks change threads only where they wait.
pub(crate) fn counted<T>(cpu_ns: &AtomicU64, work: impl FnOnce() -> T) -> T {
    let before = thread_cpu();
    let value = work();
    let ns = u64::try_from(thread_cpu().saturating_sub(before).as_nanos()).unwrap_or(0);
    cpu_ns.fetch_add(ns, Ordering::Relaxed);
    value
}
