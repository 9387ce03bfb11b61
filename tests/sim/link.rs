//! The simulated network: control channels that deliver in order or break, and lanes that overtake each other. Loss is
//! what a transport makes of it, a delay; a cut is a time in which nothing comes through one way or both.

use crate::faults::Random;
use limosa_proto::identity::{Generation, MigrationId};
use limosa_proto::time::Instant;
use limosa_proto::wire::frame::LaneToken;
use std::collections::BTreeMap;
use std::time::Duration;

/// One attempt.
pub(crate) type Key = (MigrationId, Generation);

/// A packet that is lost is sent again after this time, and twice that, and so on.
const RESEND: Duration = Duration::from_millis(200);

/// Whose an end of a connection is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Owner {
    /// A migration's engine.
    Session(u64),
    /// An engine in doubt that asks for the verdict, for the n-th time.
    Settle(u64, u32),
    /// A restarted agent that does.
    Ask(u64, u32),
    /// A restarted destination that asks whether it was released: one of its waits, for the n-th time.
    Released(u64, u32),
    /// The accepting end, before the first message; and an end that only answered.
    Nobody,
}

#[derive(Debug, Clone, Copy)]
pub(crate) struct End {
    pub(crate) host: usize,
    pub(crate) incarnation: u64,
    pub(crate) owner: Owner,
    pub(crate) open: bool,
}

/// A control channel. The first end is the one that connected.
#[derive(Debug, Clone)]
pub(crate) struct Connection {
    pub(crate) key: Key,
    pub(crate) ends: [End; 2],
    last: [Instant; 2],
}

/// The lanes of one attempt.
#[derive(Debug, Clone)]
pub(crate) struct Lanes {
    pub(crate) key: Key,
    pub(crate) token: LaneToken,
    pub(crate) source: (usize, u64),
    pub(crate) destination: (usize, u64),
    pub(crate) moving: bool,
    /// When the last frame of each lane arrives.
    pub(crate) last: Vec<Instant>,
    /// Lanes whose barrier of the round has come.
    pub(crate) barriers: BTreeMap<u32, u64>,
}

/// All of it.
#[derive(Debug)]
pub(crate) struct Net {
    cuts: Vec<(usize, usize, Instant)>,
    pub(crate) connections: Vec<Connection>,
    pub(crate) lanes: Vec<Lanes>,
    latency_us: u64,
    jitter_us: u64,
    loss_percent: u64,
    random: Random,
}

impl Net {
    pub(crate) fn new(mut random: Random) -> Net {
        let latency_us = random.of(&[50, 300, 2_000, 20_000]);
        let jitter_us = random.of(&[10, 500, 10_000]);
        let loss_percent = random.of(&[0, 0, 1, 5]);
        Net { cuts: vec![], connections: vec![], lanes: vec![], latency_us, jitter_us, loss_percent, random }
    }

    /// Nothing goes from one host to the other until then.
    pub(crate) fn cut(&mut self, from: usize, to: usize, until: Instant) {
        self.cuts.push((from, to, until));
    }

    pub(crate) fn heal(&mut self) {
        self.cuts.clear();
    }

    /// Until when nothing goes from one host to the other.
    pub(crate) fn blocked(&self, from: usize, to: usize, now: Instant) -> Option<Instant> {
        let fits = |cut: &&(usize, usize, Instant)| (cut.0, cut.1) == (from, to) && cut.2 > now;
        self.cuts.iter().filter(fits).map(|cut| cut.2).max()
    }

    /// How long something takes from host to host that is sent now.
    pub(crate) fn travel(&mut self, from: usize, to: usize, now: Instant) -> Duration {
        let mut takes = self.random.micros(self.latency_us, self.latency_us + self.jitter_us);
        let mut resend = RESEND;
        while self.random.percent(self.loss_percent) && resend < RESEND * 16 {
            takes += resend;
            resend *= 2;
        }
        // When it heals nobody knows at once: the next try may be far away.
        let late = self.random.micros(200_000, 4_000_000);
        takes + self.blocked(from, to, now).map_or(Duration::ZERO, |until| until.since(now) + late)
    }

    /// A connection between two agents; whether it can be made now is the caller's to know.
    pub(crate) fn connect(&mut self, key: Key, from: End, to: End) -> usize {
        self.connections.push(Connection { key, ends: [from, to], last: [Instant::ZERO; 2] });
        self.connections.len() - 1
    }

    /// When what is sent now from this end arrives at the other: behind everything before it.
    pub(crate) fn arrival(&mut self, connection: usize, from: usize, now: Instant) -> Instant {
        let [a, b] = self.connections[connection].ends.map(|end| end.host);
        let (here, there) = if from == 0 { (a, b) } else { (b, a) };
        let at = now.after(self.travel(here, there, now));
        let last = &mut self.connections[connection].last[from];
        *last = at.max(last.after(Duration::from_nanos(1)));
        *last
    }

    /// When a frame arrives that lane `lane` of `lanes` sends now: behind that lane's last, whatever the others do.
    pub(crate) fn lane_arrival(&mut self, lanes: usize, lane: usize, now: Instant) -> Instant {
        let (from, to) = (self.lanes[lanes].source.0, self.lanes[lanes].destination.0);
        let at = now.after(self.travel(from, to, now));
        let last = &mut self.lanes[lanes].last[lane];
        *last = at.max(last.after(Duration::from_nanos(1)));
        *last
    }
}
