//! Pre-copy: how fast pages go, how fast the guest writes them, when to stop it, when to give up.
//! It sends nothing; [`crate::source`] asks it after every round.

use crate::memory::PAGE_BYTES;
use std::time::Duration;

/// What to do when the guest writes faster than its memory can be sent.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum NoConvergence {
    /// Stop it anyway if the downtime stays below [`PrecopyPolicy::downtime_max`]; else abort.
    LongerDowntime,
    /// Abort; the guest runs on at the source.
    Abort,
}

/// When to stop the guest, and when to give up.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct PrecopyPolicy {
    /// The downtime to aim at.
    pub downtime_target: Duration,
    /// The downtime to accept if the target cannot be met.
    pub downtime_max: Duration,
    /// What to do then.
    pub on_no_convergence: NoConvergence,
    /// Rounds before the last one, at most.
    pub rounds_max: u32,
    /// Time of all rounds together, at most.
    pub total_max: Option<Duration>,
    /// What a hand-over takes beside the pages: pausing, device state, two journals, two round trips.
    pub fixed_part: Duration,
}

impl Default for PrecopyPolicy {
    fn default() -> PrecopyPolicy {
        PrecopyPolicy {
            downtime_target: Duration::from_millis(50),
            downtime_max: Duration::from_secs(2),
            on_no_convergence: NoConvergence::LongerDowntime,
            rounds_max: 30,
            total_max: None,
            fixed_part: Duration::from_millis(5),
        }
    }
}

/// Rounds over which the dirty pages must have shrunk.
const SHRINK_ROUNDS: usize = 3;
/// By how much, in percent, for pre-copy to be worth going on with.
const SHRINK_PERCENT: u64 = 10;
/// A round with fewer bytes on the wire says nothing about the rate: it is all latency.
const SAMPLE_BYTES_MIN: u64 = 256 << 10;
/// The rate to assume as long as nothing was measured: one gigabit a second, in bytes.
const RATE_ASSUMED: u64 = 125_000_000;

/// What to do after a round.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Decision {
    /// Another round.
    Again,
    /// Stop the guest; the downtime to expect.
    Stop(Duration),
    /// Abort: why, in words.
    GiveUp(String),
}

/// What was measured so far.
#[derive(Debug, Clone, Hash)]
pub struct Precopy {
    policy: PrecopyPolicy,
    rate: Option<u64>,
    dirty_rate: u64,
    dirty: Vec<u64>,
}

impl Precopy {
    /// Nothing was measured yet.
    #[must_use]
    pub fn new(policy: PrecopyPolicy) -> Precopy {
        Precopy { policy, rate: None, dirty_rate: 0, dirty: Vec::new() }
    }

    /// `bytes` went over the wire in `took`. Called again for the same round when a truer time is known.
    pub fn measure(&mut self, bytes: u64, took: Duration) {
        if bytes >= SAMPLE_BYTES_MIN && !took.is_zero() {
            let rate = u128::from(bytes) * 1_000_000_000 / took.as_nanos();
            self.rate = Some(u64::try_from(rate).unwrap_or(u64::MAX).max(1));
        }
    }

    /// After a round, `dirty` pages had been written within `took`.
    pub fn round(&mut self, dirty: u64, took: Duration) {
        self.dirty.push(dirty);
        let rate = u128::from(dirty) * 1_000_000_000 / took.as_nanos().max(1);
        self.dirty_rate = u64::try_from(rate).unwrap_or(u64::MAX);
    }

    /// Bytes a second on the wire, as last measured.
    #[must_use]
    pub fn rate_bytes_per_s(&self) -> Option<u64> {
        self.rate
    }

    /// Pages that the guest wrote in a second during the last round. A page written twice counts once, so the
    /// longer the round, the lower this is.
    #[must_use]
    pub fn dirty_rate_pages_per_s(&self) -> u64 {
        self.dirty_rate
    }

    /// How long it takes to send `pages`, at the measured rate.
    #[must_use]
    pub fn time_for(&self, pages: u64) -> Duration {
        let ns = u128::from(pages) * u128::from(PAGE_BYTES) * 1_000_000_000 / u128::from(self.rate.unwrap_or(RATE_ASSUMED));
        Duration::from_nanos(u64::try_from(ns).unwrap_or(u64::MAX))
    }

    /// Downtime to expect if the guest were stopped with `dirty` pages to send.
    #[must_use]
    pub fn downtime(&self, dirty: u64) -> Duration {
        self.time_for(dirty).saturating_add(self.policy.fixed_part)
    }

    /// What to do with `dirty` pages after round `round`, `elapsed` after the first round began.
    #[must_use]
    pub fn decide(&self, round: u32, dirty: u64, elapsed: Duration) -> Decision {
        let downtime = self.downtime(dirty);
        let rounds_over = round >= self.policy.rounds_max;
        let time_over = self.policy.total_max.is_some_and(|most| elapsed >= most);
        if dirty == 0 || downtime <= self.policy.downtime_target {
            let again = !rounds_over && !time_over && self.is_melting(dirty);
            return if again { Decision::Again } else { Decision::Stop(downtime) };
        }
        let why = if rounds_over {
            format!("{round} rounds were not enough")
        } else if time_over {
            format!("{} s were not enough", elapsed.as_secs())
        } else if self.stagnant() {
            format!("the dirty pages did not shrink by {SHRINK_PERCENT} % over {SHRINK_ROUNDS} rounds")
        } else {
            return Decision::Again;
        };
        let (allowed, lasting) = match self.policy.on_no_convergence {
            NoConvergence::LongerDowntime => (self.policy.downtime_max, "at most allowed"),
            NoConvergence::Abort => (self.policy.downtime_target, "the target, and the policy is to abort"),
        };
        if downtime <= allowed {
            return Decision::Stop(downtime);
        }
        let mib = |bytes: u64| bytes >> 20;
        Decision::GiveUp(format!(
            "the guest writes faster than its memory can be sent: {why}; it writes {} MiB/s, the link carries {} MiB/s, \
             stopping it now would take {} ms where {} ms are {lasting}",
            mib(self.dirty_rate.saturating_mul(PAGE_BYTES)),
            mib(self.rate.unwrap_or(RATE_ASSUMED)),
            downtime.as_millis(),
            allowed.as_millis(),
        ))
    }

    /// Whether another round, which then takes no longer than the downtime aimed at, would spare the guest a good part of it: what is
    /// dirty is at most half of what it was, and takes long beside the rest of a hand-over. So a guest that the target would let be
    /// stopped at once is stopped for less; each such round halves what is left, so they are few.
    fn is_melting(&self, dirty: u64) -> bool {
        let halved = self.dirty.iter().nth_back(1).is_none_or(|before| dirty <= before / 2);
        halved && self.time_for(dirty) > self.policy.fixed_part / 2
    }

    fn stagnant(&self) -> bool {
        let Some((now, before)) = self.dirty.split_last() else { return false };
        let Some(then) = before.iter().nth_back(SHRINK_ROUNDS - 1) else { return false };
        u128::from(*now) * 100 > u128::from(*then) * u128::from(100 - SHRINK_PERCENT)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MS: Duration = Duration::from_millis(1);

    fn after(policy: PrecopyPolicy, dirty: &[u64]) -> Decision {
        let mut precopy = Precopy::new(policy);
        precopy.measure(1 << 30, Duration::from_secs(1));
        for pages in dirty {
            precopy.round(*pages, Duration::from_secs(1));
        }
        precopy.decide(dirty.len() as u32, dirty.last().copied().unwrap_or(0), Duration::from_secs(9))
    }

    #[test]
    fn it_stops_when_the_target_is_met() {
        // 11,520 pages of 4 KiB are 45 MiB: 44 ms at 1 GiB/s, and 5 ms on top.
        let stopped = after(PrecopyPolicy::default(), &[20_000, 11_520]);
        assert!(matches!(stopped, Decision::Stop(d) if d > 48 * MS && d < 50 * MS), "{stopped:?}");
        assert_eq!(after(PrecopyPolicy::default(), &[12_200, 12_100]), Decision::Again);
        let tight = PrecopyPolicy { downtime_target: MS, ..PrecopyPolicy::default() };
        assert_eq!(after(tight, &[0]), Decision::Stop(5 * MS), "with nothing to send there is nothing to wait for");
    }

    #[test]
    fn a_set_that_melts_away_is_let_melt_beyond_the_target() {
        let of = |dirty: &[u64]| after(PrecopyPolicy::default(), dirty);
        assert_eq!(of(&[11_520]), Decision::Again, "what was written during the whole first round says nothing of a short one");
        assert_eq!(of(&[40_000, 11_520]), Decision::Again);
        assert_eq!(of(&[40_000, 11_520, 5_760]), Decision::Again);
        assert!(matches!(of(&[40_000, 11_520, 5_761]), Decision::Stop(_)), "it melts no more");
        assert!(matches!(of(&[40_000, 650]), Decision::Stop(d) if d < 8 * MS), "the rest of the hand-over takes longer than it");
        let few = PrecopyPolicy { rounds_max: 1, ..PrecopyPolicy::default() };
        assert!(matches!(after(few, &[11_520]), Decision::Stop(_)));
        let short = PrecopyPolicy { total_max: Some(Duration::from_secs(9)), ..PrecopyPolicy::default() };
        assert!(matches!(after(short, &[11_520]), Decision::Stop(_)));
    }

    #[test]
    fn a_shrinking_set_goes_on_and_a_stagnant_one_does_not() {
        assert_eq!(after(PrecopyPolicy::default(), &[100_000, 97_000, 93_000, 89_000]), Decision::Again);
        assert!(matches!(after(PrecopyPolicy::default(), &[100_000, 97_000, 93_000, 91_000]), Decision::Stop(d) if d > 300 * MS));
        assert_eq!(after(PrecopyPolicy::default(), &[100_000, 97_000, 97_000]), Decision::Again, "three rounds are given");
        let abort = PrecopyPolicy { on_no_convergence: NoConvergence::Abort, ..PrecopyPolicy::default() };
        assert!(matches!(after(abort, &[100_000; 4]), Decision::GiveUp(_)));
    }

    #[test]
    fn giving_up_says_why() {
        let Decision::GiveUp(words) = after(PrecopyPolicy::default(), &[1 << 20; 4]) else { unreachable!() };
        assert!(words.contains("it writes 4096 MiB/s, the link carries 1024 MiB/s"), "{words}");
        assert!(words.contains("4005 ms where 2000 ms are at most allowed"), "{words}");
    }

    #[test]
    fn rounds_and_time_are_bounded() {
        let few = PrecopyPolicy { rounds_max: 2, on_no_convergence: NoConvergence::Abort, ..PrecopyPolicy::default() };
        assert_eq!(after(few.clone(), &[100_000]), Decision::Again);
        assert!(matches!(after(few, &[100_000, 50_000]), Decision::GiveUp(_)));
        let short = PrecopyPolicy { total_max: Some(Duration::from_secs(9)), ..PrecopyPolicy::default() };
        assert!(matches!(after(short, &[100_000]), Decision::Stop(_)));
    }

    #[test]
    fn small_rounds_say_nothing_about_the_rate() {
        let mut precopy = Precopy::new(PrecopyPolicy::default());
        precopy.measure(4096, Duration::from_secs(1));
        assert_eq!(precopy.rate_bytes_per_s(), None);
        precopy.measure(u64::MAX, Duration::from_nanos(1));
        assert_eq!(precopy.rate_bytes_per_s(), Some(u64::MAX));
        assert_eq!(precopy.time_for(u64::MAX), Duration::from_nanos(4_096_000_000_000));
    }
}
