//! How often somebody was refused, by link and by reason: one place for all of them, for whoever shows figures. It decides
//! nothing, and knows nobody's address.

use std::sync::atomic::{AtomicU64, Ordering};

/// Where somebody knocked.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Port {
    /// TCP.
    Tcp,
    /// UDP.
    Quic,
    /// The connection manager of RDMA.
    Rdma,
}

/// Why somebody was refused.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Why {
    /// The address is not on the allow-list of peers.
    PeerAddress,
    /// The address of this host is not one that takes migrations.
    OwnAddress,
    /// A packet of an open connection came from, or to, such an address, and was dropped.
    Packet,
    /// The key is not trusted, or there is none.
    Key,
    /// The key is revoked.
    Revoked,
    /// The key was trusted for a time that is over.
    Expired,
    /// The handshake or the first words were none.
    Handshake,
    /// A newer one needed the room.
    Crowded,
    /// It did not say in time who it is.
    Slow,
    /// The end of an RDMA lane is not within the trusted fabric.
    Fabric,
    /// No migration knows the RDMA lane.
    Unknown,
    /// An open connection asked for something new when its host was no more trusted or allowed.
    Withdrawn,
}

impl Port {
    const ALL: [Port; 3] = [Port::Tcp, Port::Quic, Port::Rdma];

    /// Its label.
    #[must_use]
    pub fn label(self) -> &'static str {
        match self {
            Port::Tcp => "tcp",
            Port::Quic => "quic",
            Port::Rdma => "rdma",
        }
    }
}

impl Why {
    const ALL: [Why; 12] = [
        Why::PeerAddress,
        Why::OwnAddress,
        Why::Packet,
        Why::Key,
        Why::Revoked,
        Why::Expired,
        Why::Handshake,
        Why::Crowded,
        Why::Slow,
        Why::Fabric,
        Why::Unknown,
        Why::Withdrawn,
    ];

    /// Its label.
    #[must_use]
    pub fn label(self) -> &'static str {
        match self {
            Why::PeerAddress => "peer-address",
            Why::OwnAddress => "own-address",
            Why::Packet => "packet",
            Why::Key => "key",
            Why::Revoked => "revoked",
            Why::Expired => "expired",
            Why::Handshake => "handshake",
            Why::Crowded => "crowded",
            Why::Slow => "slow",
            Why::Fabric => "fabric",
            Why::Unknown => "unknown",
            Why::Withdrawn => "withdrawn",
        }
    }
}

static COUNTS: [[AtomicU64; Why::ALL.len()]; Port::ALL.len()] =
    [const { [const { AtomicU64::new(0) }; Why::ALL.len()] }; Port::ALL.len()];

fn cell(port: Port, why: Why) -> Option<&'static AtomicU64> {
    COUNTS.get(port as usize)?.get(why as usize)
}

/// Counts one refusal.
pub fn count(port: Port, why: Why) {
    if let Some(cell) = cell(port, why) {
        cell.fetch_add(1, Ordering::Relaxed);
    }
}

/// How often there was this one, since the process began.
#[must_use]
pub fn of(port: Port, why: Why) -> u64 {
    cell(port, why).map_or(0, |cell| cell.load(Ordering::Relaxed))
}

/// All of them, those that never were too: label of the port, label of the reason, how often.
pub fn all() -> impl Iterator<Item = (&'static str, &'static str, u64)> {
    Port::ALL.into_iter().flat_map(|port| Why::ALL.into_iter().map(move |why| (port.label(), why.label(), of(port, why))))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::BTreeSet;

    #[test]
    fn each_reason_is_counted_for_itself() {
        let before = (of(Port::Rdma, Why::Unknown), of(Port::Rdma, Why::Fabric));
        count(Port::Rdma, Why::Unknown);
        assert_eq!((of(Port::Rdma, Why::Unknown), of(Port::Rdma, Why::Fabric)), (before.0 + 1, before.1));
        let labels: BTreeSet<(&str, &str)> = all().map(|(port, why, _)| (port, why)).collect();
        assert_eq!(labels.len(), 36, "two have the same label, or one is missing in ALL");
        assert!(Port::ALL.iter().enumerate().all(|(at, port)| *port as usize == at));
        assert!(Why::ALL.iter().enumerate().all(|(at, why)| *why as usize == at));
    }
}
