//! The announcer: sends the rounds of a schedule and reports what it did. It blocks its thread, keeps no thread of its
//! own, and does not decide when a guest may be announced.

use std::fmt;
use std::thread;
use std::time::{Duration, Instant};

use tracing::{debug, warn};

use crate::schedule::{Due, Schedule};
use crate::socket::{OpenError, PacketSocket};
use crate::{Nic, fdb, frames, mac_words};

/// The longest that a cancelled announcement goes on sleeping.
const CANCEL_DELAY_MAX: Duration = Duration::from_millis(100);

/// What one round did for one card.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Sent {
    /// The round, counted from 0.
    pub round: usize,
    /// The guest's MAC.
    pub mac: [u8; 6],
    /// The interface by which the frames left.
    pub interface: String,
    /// Since the first round began; zero from [`Announcer::announce`].
    pub after: Duration,
    /// The frames that left, in order, in words.
    pub frames: Vec<String>,
    /// What the local bridge was told, in words; `None` if it was told nothing.
    pub bridge: Option<String>,
    /// What went wrong, each with where and what to do. The rest was done nevertheless.
    pub errors: Vec<String>,
}

impl fmt::Display for Sent {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (mac, after_ms) = (mac_words(self.mac), self.after.as_millis());
        write!(f, "round {} after {after_ms} ms: {mac}, {} frames on {}", self.round, self.frames.len(), self.interface)?;
        if let Some(bridge) = &self.bridge {
            write!(f, ", {bridge}")?;
        }
        match self.errors.as_slice() {
            [] => Ok(()),
            errors => write!(f, "; errors: {}", errors.join("; ")),
        }
    }
}

/// How a whole announcement ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Outcome {
    /// Rounds begun.
    pub rounds: usize,
    /// Frames sent in all.
    pub frames: usize,
    /// Errors reported in all.
    pub errors: usize,
    /// It was stopped before its last round.
    pub cancelled: bool,
}

/// Sends announcements from the network namespace in which it was opened; use it on a thread of that namespace.
#[derive(Debug)]
pub struct Announcer {
    socket: PacketSocket,
}

impl Announcer {
    /// Opens the packet socket. Cheap; but better before the migration than in its downtime, so that a missing
    /// permission is known while the guest can still stay where it is.
    ///
    /// # Errors
    /// No CAP_NET_RAW, or no packet sockets on this host.
    pub fn open() -> Result<Announcer, OpenError> {
        PacketSocket::open().map(|socket| Announcer { socket })
    }

    /// One round for one card: first the local bridge's entry, then the frames. What fails is in the result's
    /// `errors`, and the rest is done.
    pub fn announce(&self, nic: &Nic, round: usize) -> Sent {
        let mut sent = Sent {
            round,
            mac: nic.mac,
            interface: nic.interface.clone(),
            after: Duration::ZERO,
            frames: Vec::new(),
            bridge: None,
            errors: nic.problems(),
        };
        if nic.problem_of_card().is_none() {
            self.tell_bridge(nic, &mut sent);
            self.send_frames(nic, &mut sent);
        }
        if sent.errors.is_empty() {
            debug!(round, %sent, "announced");
        } else {
            warn!(round, %sent, "announced with errors");
        }
        sent
    }

    fn tell_bridge(&self, nic: &Nic, sent: &mut Sent) {
        let Some(port) = &nic.port else { return };
        match fdb::learn(nic.mac, port) {
            Ok(words) => sent.bridge = Some(words),
            Err(error) => {
                let mac = mac_words(nic.mac);
                sent.errors.push(format!("bridge of port {port}, which should have {mac}: {error}"));
            }
        }
    }

    fn send_frames(&self, nic: &Nic, sent: &mut Sent) {
        let name = &nic.interface;
        let interface = match self.socket.interface(name) {
            Ok(interface) => interface,
            Err(error) => return sent.errors.push(format!("interface {name:?}: {error}")),
        };
        for frame in frames(nic) {
            match self.socket.send(interface, &frame.bytes) {
                Ok(()) => sent.frames.push(frame.words),
                Err(error) => sent.errors.push(format!("{} on interface {name}: {error}", frame.words)),
            }
        }
    }

    /// Performs a whole schedule for all cards of a guest, and returns when it is over or `cancelled` says so (asked
    /// before each round and every 100 ms in between). `on_sent` gets the result for each card and round.
    pub fn run(&self, nics: &[Nic], schedule: &Schedule, cancelled: impl Fn() -> bool, mut on_sent: impl FnMut(Sent)) -> Outcome {
        let start = Instant::now();
        let mut rounds = schedule.start(start);
        let mut outcome = Outcome { rounds: 0, frames: 0, errors: 0, cancelled: false };
        loop {
            let due = rounds.next(Instant::now());
            if due != Due::Done && cancelled() {
                outcome.cancelled = true;
                return outcome;
            }
            match due {
                Due::Done => return outcome,
                Due::Wait(wait) => thread::sleep(wait.min(CANCEL_DELAY_MAX)),
                Due::Round(round) => {
                    outcome.rounds += 1;
                    for nic in nics {
                        let after = start.elapsed();
                        let sent = Sent { after, ..self.announce(nic, round) };
                        outcome.frames += sent.frames.len();
                        outcome.errors += sent.errors.len();
                        on_sent(sent);
                    }
                }
            }
        }
    }
}
