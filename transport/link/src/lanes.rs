//! Lanes: what one is (two traits), what is counted, the bandwidth cap. A lane is a byte stream on a blocking thread that
//! carries frames of pages one way, from source to destination. The threads are in `sending.rs` and `receiving.rs`.

use crate::pages::Pages;
use limosa_proto::memory::PageRange;
use limosa_proto::wire::offer::MemoryKey;
use std::io;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

/// Lanes that threads of this process work on.
static OPEN: AtomicUsize = AtomicUsize::new(0);

/// How many lanes are open in this process now, in both directions.
#[must_use]
pub fn open_now() -> usize {
    OPEN.load(Ordering::Relaxed)
}

/// Counts as an open lane for as long as it lives.
pub(crate) struct CountedOpen(());

impl CountedOpen {
    pub(crate) fn new() -> CountedOpen {
        OPEN.fetch_add(1, Ordering::Relaxed);
        CountedOpen(())
    }
}

impl Drop for CountedOpen {
    fn drop(&mut self) {
        OPEN.fetch_sub(1, Ordering::Relaxed);
    }
}

/// The sending end of one lane. Calls block; [`LaneCloser::close`] ends them.
pub trait LaneSender: Send {
    /// Sends a frame that carries no pages.
    ///
    /// # Errors
    /// What the stream says.
    fn head(&mut self, head: &[u8]) -> io::Result<()>;

    /// Sends `head` and then the pages of `runs`.
    ///
    /// # Errors
    /// What the stream says.
    fn pages(&mut self, head: &[u8], pages: &dyn Pages, runs: &[PageRange]) -> io::Result<()>;

    /// Sends what is held back; the barrier of a round has just been sent. A lane that writes memory directly returns when
    /// every lane of the destination has reached the barrier ([`LaneReceiver::passed`]): until then the next round must not begin.
    ///
    /// # Errors
    /// What the stream says.
    fn flush(&mut self) -> io::Result<()>;

    /// Says that nothing more comes.
    ///
    /// # Errors
    /// What the stream says.
    fn finish(&mut self) -> io::Result<()>;

    /// A handle that ends the lane from another thread.
    ///
    /// # Errors
    /// No descriptor left.
    fn closer(&self) -> io::Result<LaneCloser>;

    /// Bytes sent so far, as the transport below sees them (with TLS, without TCP's own headers).
    fn bytes_on_wire(&self) -> u64;
}

/// The receiving end of one lane.
pub trait LaneReceiver: Send {
    /// Fills `out` with the next bytes. The end of the stream is `UnexpectedEof`.
    ///
    /// # Errors
    /// What the stream says.
    fn head(&mut self, out: &mut [u8]) -> io::Result<()>;

    /// Puts the next bytes into the pages of `runs`.
    ///
    /// # Errors
    /// What the stream says.
    fn pages(&mut self, pages: &dyn Pages, runs: &[PageRange]) -> io::Result<()>;

    /// Every lane has reached the barrier of `round`, and everything of that round is in place.
    ///
    /// # Errors
    /// What the stream says.
    fn passed(&mut self, _round: u32) -> io::Result<()> {
        Ok(())
    }

    /// Tells the source whether the lane was let in, once, before anything else goes this way.
    ///
    /// # Errors
    /// What the stream says.
    fn acknowledge(&mut self, bytes: &[u8]) -> io::Result<()>;

    /// A handle that ends the lane from another thread.
    ///
    /// # Errors
    /// No descriptor left.
    fn closer(&self) -> io::Result<LaneCloser>;

    /// Bytes received so far.
    fn bytes_on_wire(&self) -> u64;
}

/// Ends a lane from another thread: its blocked call returns at once.
pub struct LaneCloser(Box<dyn Fn() + Send + Sync>);

impl LaneCloser {
    /// A closer that calls `close`.
    pub fn new(close: impl Fn() + Send + Sync + 'static) -> LaneCloser {
        LaneCloser(Box::new(close))
    }

    /// Ends the lane; more than once does no harm.
    pub fn close(&self) {
        (self.0)();
    }
}

impl std::fmt::Debug for LaneCloser {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("LaneCloser")
    }
}

/// What the lanes of one migration have done so far, readable while they work.
#[derive(Debug, Default)]
pub struct LaneCounters {
    /// Pages whose contents were moved.
    pub pages: AtomicU64,
    /// Pages named as zero.
    pub zero_pages: AtomicU64,
    /// Bytes, headers and TLS included, without TCP's own headers.
    pub bytes_on_wire: AtomicU64,
    /// CPU time of the lanes' threads in nanoseconds; brought up to date at each round's end.
    pub cpu_ns: AtomicU64,
}

/// CPU time that the calling thread has used.
pub(crate) fn thread_cpu() -> Duration {
    nix::time::clock_gettime(nix::time::ClockId::CLOCK_THREAD_CPUTIME_ID).map(Duration::from).unwrap_or_default()
}

/// Adds the CPU time of its thread to a counter, as often as asked and when dropped.
pub(crate) struct CpuMeter<'a> {
    into: &'a AtomicU64,
    counted: Duration,
}

impl<'a> CpuMeter<'a> {
    pub(crate) fn new(into: &'a AtomicU64) -> CpuMeter<'a> {
        CpuMeter { into, counted: thread_cpu() }
    }

    pub(crate) fn count(&mut self) {
        let now = thread_cpu();
        let ns = now.saturating_sub(self.counted).as_nanos();
        self.into.fetch_add(u64::try_from(ns).unwrap_or(u64::MAX), Ordering::Relaxed);
        self.counted = now;
    }
}

impl Drop for CpuMeter<'_> {
    fn drop(&mut self) {
        self.count();
    }
}

/// How long a lane sleeps at most before it looks whether it should stop.
const NAP: Duration = Duration::from_millis(20);
/// How far behind the cap may be made up for: a burst of at most 50 ms.
const BURST: Duration = Duration::from_millis(50);

/// The bandwidth cap, shared by all lanes of a migration.
#[derive(Debug)]
pub(crate) struct Cap {
    bytes_per_s: u64,
    /// When the next byte may leave.
    next: Mutex<Instant>,
}

impl Cap {
    /// 0 is no cap.
    pub(crate) fn new(bytes_per_s: u64) -> Cap {
        Cap { bytes_per_s, next: Mutex::new(Instant::now()) }
    }

    /// Waits until `bytes` bytes may leave; false if `stop` was set meanwhile.
    pub(crate) fn wait(&self, bytes: u64, stop: &AtomicBool) -> bool {
        if self.bytes_per_s == 0 {
            return true;
        }
        let cost = Duration::from_secs_f64(bytes as f64 / self.bytes_per_s as f64);
        let at = {
            let mut next = self.next.lock().unwrap_or_else(PoisonError::into_inner);
            let now = Instant::now();
            let at = (*next).max(now.checked_sub(BURST).unwrap_or(now));
            *next = at + cost;
            at
        };
        loop {
            if stop.load(Ordering::Relaxed) {
                return false;
            }
            let left = at.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return true;
            }
            std::thread::sleep(left.min(NAP));
        }
    }
}

/// What lanes tell their driver.
#[derive(Debug)]
pub(crate) enum LaneEvent {
    /// Every lane has sent, or received, all of a round.
    Round(RoundCounts),
    /// A chunk of memory was opened to the source, or could not be.
    Opened(Result<MemoryKey, String>),
    /// A lane ended before its time.
    Failed {
        /// Which lane.
        lane: u16,
        /// Why, in words.
        words: String,
    },
}

/// One round over all lanes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct RoundCounts {
    pub(crate) round: u32,
    pub(crate) pages: u64,
    pub(crate) zero_pages: u64,
    pub(crate) bytes_on_wire: u64,
}

/// Takes events out of lane threads.
pub(crate) type LaneEvents = tokio::sync::mpsc::UnboundedSender<LaneEvent>;

/// Names an I/O error of a lane.
pub(crate) fn lane_words(lane: u16, doing: &str, error: &io::Error) -> String {
    match error.kind() {
        io::ErrorKind::UnexpectedEof => format!("lane {lane} was closed by the other side while {doing}"),
        io::ErrorKind::ConnectionReset | io::ErrorKind::BrokenPipe => format!("lane {lane} was cut while {doing}"),
        io::ErrorKind::TimedOut => format!("lane {lane}: the other side is silent ({doing})"),
        _ => format!("lane {lane} failed while {doing}: {error}"),
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn the_cap_holds_over_threads() {
        let cap = Cap::new(10_000_000);
        let stop = AtomicBool::new(false);
        let begun = Instant::now();
        std::thread::scope(|scope| {
            for _ in 0..2 {
                scope.spawn(|| (0..10).for_each(|_| assert!(cap.wait(100_000, &stop))));
            }
        });
        let took = begun.elapsed();
        assert!(took >= Duration::from_millis(130) && took < Duration::from_millis(600), "{took:?}");
    }

    #[test]
    fn a_stop_ends_the_wait() {
        let cap = Cap::new(1);
        assert!(cap.wait(1000, &AtomicBool::new(false)));
        assert!(!cap.wait(1, &AtomicBool::new(true)));
    }
}
