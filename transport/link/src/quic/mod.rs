//! The QUIC link (quinn, rustls): one UDP port; control and lanes are bidirectional streams, told apart by their first bytes
//! as on TCP. Mutual TLS 1.3 with the same pinned raw keys as TCP; no 0-RTT, no resumption. `connect` is the source's
//! side, `accept` the destination's, `lane` the streams, `socket` what lies under quinn. What lanes carry is not known here.

mod accept;
mod connect;
mod lane;
mod settings;
mod socket;

pub use accept::QuicListener;
pub use connect::{QuicLink, QuicPath};
pub use settings::{Congestion, QuicSettings};

use quinn::VarInt;
use std::sync::atomic::AtomicU64;

/// What both sides say they speak (ALPN).
const PROTOCOL: &[u8] = b"limosa/1";
/// The name in the handshake. It means nothing: keys are pinned.
const NAME: &str = "limosa";
/// Closes a connection on which nothing has gone on for long, or whose new address is not allowed.
const LEFT: VarInt = VarInt::from_u32(2);

/// What came to the UDP port so far.
#[derive(Debug, Default)]
pub struct QuicCounters {
    /// First packets that were answered by Retry: the address had to be shown to be real first.
    pub retried: AtomicU64,
    /// Refused before any handshake because the address, shown to be real, is not on the allow-list.
    pub refused_not_allowed: AtomicU64,
    /// Handshakes that were begun: each costs a key exchange and a signature.
    pub handshakes_begun: AtomicU64,
    /// Closed because of the key: it is not trusted, or there is none.
    pub not_trusted: AtomicU64,
    /// Closed because the handshake was none.
    pub broken: AtomicU64,
    /// Closed because a newer one needed the room, or because there were too many.
    pub crowded_out: AtomicU64,
    /// Closed because time was up.
    pub too_slow: AtomicU64,
    /// Peers that have not said who they are, now.
    pub waiting: AtomicU64,
    /// Received batches dropped before they could reach a connection, because their address is not on the allow-list.
    pub dropped_not_allowed: AtomicU64,
    /// How often a connection went on from another address of its peer.
    pub address_changes: AtomicU64,
}
