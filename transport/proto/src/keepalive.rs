//! Keeping a quiet link known to be alive: when to say something, and when the other side was silent for too long.

use crate::time::Instant;
use std::time::Duration;

/// Watches one control channel.
#[derive(Debug, Clone, Hash)]
pub(crate) struct Keepalive {
    interval: Duration,
    silence_max: Duration,
    sent: Instant,
    heard: Instant,
    nonce: u64,
    linked: bool,
}

impl Keepalive {
    pub(crate) fn new(now: Instant, interval: Duration, silence_max: Duration) -> Keepalive {
        Keepalive { interval, silence_max, sent: now, heard: now, nonce: 0, linked: true }
    }

    /// Whether there is a link to speak on.
    pub(crate) fn linked(&self) -> bool {
        self.linked
    }

    /// The link is gone; nothing is due any more.
    pub(crate) fn lose(&mut self) {
        self.linked = false;
    }

    /// There is a link again.
    pub(crate) fn relink(&mut self, now: Instant) {
        (self.linked, self.sent, self.heard) = (true, now, now);
    }

    /// Something was sent.
    pub(crate) fn sent(&mut self, now: Instant) {
        self.sent = now;
    }

    /// Something came.
    pub(crate) fn heard(&mut self, now: Instant) {
        self.heard = now;
    }

    /// The nonce to send now, if nothing was sent for an interval.
    pub(crate) fn due(&mut self, now: Instant) -> Option<u64> {
        if !self.linked || now < self.sent.after(self.interval) {
            return None;
        }
        self.nonce = self.nonce.wrapping_add(1);
        self.sent = now;
        Some(self.nonce)
    }

    /// How long the peer was silent, if that is too long.
    pub(crate) fn lost(&self, now: Instant) -> Option<Duration> {
        (self.linked && now >= self.heard.after(self.silence_max)).then(|| now.since(self.heard))
    }

    /// When to look again.
    pub(crate) fn timeout(&self) -> Option<Instant> {
        self.linked.then(|| self.sent.after(self.interval).min(self.heard.after(self.silence_max)))
    }
}
