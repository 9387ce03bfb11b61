//! Links: how two hosts reach each other, and the driver that moves a guest over one.
//!
//! A [`Link`] gives one control channel (messages, [`control`]) and lanes (pages, [`lanes`]). What they carry and when is
//! decided by `limosa-proto`; the driver ([`run_source`], [`Listener`]) waits, asks and carries out. A new kind of link is a
//! file that implements [`Link`] and hands what arrives at the other end to [`sessions::Sessions`].
//!
//! It knows no VMM and no KVM: guest memory comes in as [`Pages`], everything else as [`SourceHost`] and [`DestinationHost`].
#![forbid(unsafe_code)]

pub mod accept;
pub mod ask;
mod ask_key;
pub mod choose;
pub mod commands;
pub mod connect;
pub mod control;
mod destination;
pub mod direct;
pub mod driver;
pub mod failpoints;
pub mod host;
mod hosted;
pub mod key;
pub mod lanes;
pub mod pages;
pub mod pair;
pub mod probe;
pub mod quic;
#[cfg(feature = "rdma")]
pub mod rdma;
mod receiving;
pub mod refusals;
mod room;
pub mod secure;
mod sending;
pub mod sessions;
mod source;
mod tcp;
pub mod tls;
pub mod trust;
pub mod ways;

pub use accept::{Listener, ListenerSettings};
pub use ask::{AskError, ask_check, ask_cpu, ask_released};
pub use ask_key::ask_key;
pub use commands::{Caller, CommandChannel};
pub use connect::{ConnectError, TcpLink};
pub use control::Control;
pub use direct::{Exposed, ExposedError, Exposure, Fabric, LaneMemory, RemoteKeys};
pub use driver::{Cancel, SourceOptions, ask_verdict, run_source, run_source_over};
pub use host::{DestinationHost, HostError, Hosting, Incoming, Peer, Reaching, SourceHost};
pub use key::{HostKey, HostKeyError};
pub use lanes::{LaneCloser, LaneCounters, LaneReceiver, LaneSender};
pub use pages::{Pages, Populate};
pub use trust::{Distrust, Trust, TrustedHosts};
pub use ways::Here;

use limosa_proto::wire::frame::LanePreamble;
use std::future::Future;
use std::pin::Pin;

/// A future of a [`Link`].
pub type Answer<'a, T> = Pin<Box<dyn Future<Output = T> + Send + 'a>>;

/// What a kind of link can do.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Capabilities {
    /// Its name, in reports and in Hello: "tcp", "pair".
    pub name: &'static str,
    /// Whether lanes can be encrypted.
    pub secure_lanes: bool,
    /// Whether lanes can go without encryption.
    pub plaintext_lanes: bool,
    /// Whether it can check pages by a keyed hash, as lanes without encryption that write memory directly must.
    pub page_check: bool,
    /// Most lanes.
    pub lanes_max: u16,
}

/// One way to reach one destination: the source's side.
pub trait Link: Send + Sync + 'static {
    /// What it can do.
    fn capabilities(&self) -> Capabilities;

    /// The destination in words, for errors.
    fn destination(&self) -> String;

    /// Opens a control channel; both ends know who the other is when it is there.
    fn control(&self) -> Answer<'_, Result<Control, ConnectError>>;

    /// Opens one lane and waits until the destination has let it in. `memory` is for links that read guest memory and write the
    /// destination's by themselves.
    fn lane(
        &self,
        preamble: LanePreamble,
        plaintext: bool,
        memory: &LaneMemory,
    ) -> Answer<'_, Result<Box<dyn LaneSender>, ConnectError>>;
}

/// How lanes send.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct LaneSettings {
    /// Page bytes in one frame at most; 4 KiB to 4 MiB.
    pub frame_bytes: u64,
    /// Cap over all lanes in bytes per second; 0 is none.
    pub bandwidth_bytes_per_s: u64,
}

impl Default for LaneSettings {
    fn default() -> LaneSettings {
        LaneSettings { frame_bytes: 1 << 20, bandwidth_bytes_per_s: 0 }
    }
}
