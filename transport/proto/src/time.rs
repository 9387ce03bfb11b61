//! Time as the engine sees it: nanoseconds since a moment that the caller chose, always passed in.
//! Not a clock: nothing in this crate reads one.

use std::time::Duration;

/// A moment, in nanoseconds since the caller's own epoch (the start of its process, or of a simulation).
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub struct Instant(pub u64);

impl Instant {
    /// The caller's epoch.
    pub const ZERO: Instant = Instant(0);

    /// The moment `wait` later; saturates at the end of time instead of wrapping.
    #[must_use]
    pub fn after(self, wait: Duration) -> Instant {
        let ns = u64::try_from(wait.as_nanos()).unwrap_or(u64::MAX);
        Instant(self.0.saturating_add(ns))
    }

    /// How long ago `earlier` was; zero if it lies ahead.
    #[must_use]
    pub fn since(self, earlier: Instant) -> Duration {
        Duration::from_nanos(self.0.saturating_sub(earlier.0))
    }
}
