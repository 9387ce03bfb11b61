//! When the rounds of an announcement are due. Pure: the time is an argument, nothing sleeps here.

use std::time::{Duration, Instant};

use thiserror::Error;

/// The most rounds of one schedule. More would be noise for the whole network and help nobody.
pub const ROUNDS_MAX: usize = 32;
/// The longest gap between two rounds.
pub const GAP_MAX: Duration = Duration::from_secs(10);

/// Why a list of gaps is no schedule.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub enum ScheduleError {
    /// Too many rounds.
    #[error("{rounds} rounds of announcements are too many: at most {ROUNDS_MAX}, the first of them included")]
    TooManyRounds {
        /// Rounds asked for.
        rounds: usize,
    },
    /// A gap is too long.
    #[error("the gap of {gap:?} before round {round} is too long: at most {GAP_MAX:?}")]
    GapTooLong {
        /// The round after the gap, counted from 0.
        round: usize,
        /// The gap asked for.
        gap: Duration,
    },
}

/// One round at once, then one after each gap.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Schedule {
    gaps: Vec<Duration>,
}

impl Default for Schedule {
    /// Six rounds, the last one 1.25 s after the first: gaps of 50, 150, 250, 350 and 450 ms, as QEMU has them by
    /// default. Short at first, since every lost millisecond is an outage; longer later, for what a busy switch lost.
    fn default() -> Schedule {
        Schedule { gaps: [50, 150, 250, 350, 450].map(Duration::from_millis).to_vec() }
    }
}

impl Schedule {
    /// A schedule of one round at once and one after each of `gaps`.
    ///
    /// # Errors
    /// More than [`ROUNDS_MAX`] rounds, or a gap over [`GAP_MAX`].
    pub fn new(gaps: Vec<Duration>) -> Result<Schedule, ScheduleError> {
        let rounds = gaps.len().saturating_add(1);
        if rounds > ROUNDS_MAX {
            return Err(ScheduleError::TooManyRounds { rounds });
        }
        if let Some((index, gap)) = gaps.iter().enumerate().find(|(_, gap)| **gap > GAP_MAX) {
            return Err(ScheduleError::GapTooLong { round: index + 1, gap: *gap });
        }
        Ok(Schedule { gaps })
    }

    /// How many rounds there are, the one at once included.
    pub fn rounds(&self) -> usize {
        self.gaps.len() + 1
    }

    /// From the first round to the last one.
    pub fn duration(&self) -> Duration {
        self.gaps.iter().sum()
    }

    /// Starts the schedule at `now`.
    pub fn start(&self, now: Instant) -> Rounds<'_> {
        Rounds { gaps: &self.gaps, round: 0, due: Some(now) }
    }
}

/// What is due.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Due {
    /// This round, counted from 0. It counts as done from now on.
    Round(usize),
    /// Nothing for so long.
    Wait(Duration),
    /// Nothing any more.
    Done,
}

/// A schedule under way.
#[derive(Debug, Clone)]
pub struct Rounds<'a> {
    gaps: &'a [Duration],
    round: usize,
    due: Option<Instant>,
}

impl Rounds<'_> {
    /// What is due at `now`. A round that is late is given at once and the gap to the next counts from then, so
    /// that a stall never ends in a burst.
    pub fn next(&mut self, now: Instant) -> Due {
        let Some(due) = self.due else { return Due::Done };
        if let Some(wait) = due.checked_duration_since(now).filter(|wait| !wait.is_zero()) {
            return Due::Wait(wait);
        }
        let round = self.round;
        self.due = self.gaps.get(round).map(|gap| now + *gap);
        self.round += 1;
        Due::Round(round)
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn default_is_at_once_and_five_more_in_1250_ms() {
        let schedule = Schedule::default();
        assert_eq!((schedule.rounds(), schedule.duration()), (6, Duration::from_millis(1250)));
        let start = Instant::now();
        let mut rounds = schedule.start(start);
        let mut at = Vec::new();
        let mut now = start;
        loop {
            match rounds.next(now) {
                Due::Round(n) => at.push((n, now.duration_since(start).as_millis())),
                Due::Wait(wait) => now += wait,
                Due::Done => break,
            }
        }
        assert_eq!(at, [(0, 0), (1, 50), (2, 200), (3, 450), (4, 800), (5, 1250)]);
        assert_eq!(rounds.next(now), Due::Done);
    }

    #[test]
    fn a_stall_delays_and_does_not_burst() {
        let schedule = Schedule::new(vec![Duration::from_millis(10); 2]).unwrap();
        let start = Instant::now();
        let mut rounds = schedule.start(start);
        assert_eq!(rounds.next(start), Due::Round(0));
        let late = start + Duration::from_secs(5);
        assert_eq!(rounds.next(late), Due::Round(1));
        assert_eq!(rounds.next(late), Due::Wait(Duration::from_millis(10)));
    }

    #[test]
    fn limits_are_exact() {
        assert!(Schedule::new(vec![GAP_MAX; ROUNDS_MAX - 1]).is_ok());
        let many = Schedule::new(vec![Duration::ZERO; ROUNDS_MAX]);
        assert_eq!(many, Err(ScheduleError::TooManyRounds { rounds: ROUNDS_MAX + 1 }));
        let gap = GAP_MAX + Duration::from_nanos(1);
        let long = Schedule::new(vec![Duration::ZERO, gap]);
        assert_eq!(long, Err(ScheduleError::GapTooLong { round: 2, gap }));
    }

    proptest! {
        #[test]
        fn every_round_comes_once_in_order_and_never_early(
            gaps in prop::collection::vec(0u64..10_000, 0..ROUNDS_MAX),
            steps in prop::collection::vec(0u64..5_000, 1..200),
        ) {
            let schedule = Schedule::new(gaps.iter().map(|ms| Duration::from_millis(*ms)).collect()).unwrap();
            let start = Instant::now();
            let (mut rounds, mut now, mut seen) = (schedule.start(start), start, Vec::new());
            for step in steps.iter().cycle().take(100_000) {
                match rounds.next(now) {
                    Due::Round(n) => seen.push((n, now)),
                    Due::Wait(wait) => now += wait.min(Duration::from_millis(*step + 1)),
                    Due::Done => break,
                }
            }
            prop_assert_eq!(seen.len(), schedule.rounds());
            for (pair, gap) in seen.windows(2).zip(&gaps) {
                prop_assert_eq!(pair[1].0, pair[0].0 + 1);
                prop_assert!(pair[1].1.duration_since(pair[0].1) >= Duration::from_millis(*gap));
            }
        }
    }
}
