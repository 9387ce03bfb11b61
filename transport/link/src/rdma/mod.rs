//! The RDMA link: lanes are queue pairs (RC) by which the source writes straight from its guest's memory into the destination's.
//! Control is another link's, always encrypted; it carries the keys of the destination's memory, chunk by chunk.
//!
//! What passes over a queue pair is not encrypted, so both hosts must declare the fabric trusted, and pages are checked by a
//! keyed hash as they arrive. `connect` and `accept` let lanes in, `sender` and `receiver` are the lanes, `memory` is the
//! guest's memory at the source, `fabric` at the destination, `message` what lanes say besides pages, `check` the hash.
//! No unsafe and no call of libibverbs is here: those are `transport/verbs`.

mod accept;
mod buffers;
mod check;
mod connect;
mod fabric;
mod here;
mod memory;
mod message;
mod receiver;
mod request;
mod sender;
mod work;

pub use accept::{RdmaCounters, RdmaListener};
pub use connect::RdmaLink;
pub use here::{addresses, devices};
/// What a device is and has, for `limosa host show`.
pub use limosa_verbs::DeviceReport as DeviceInfo;
/// What of the devices this process holds, and has ever made.
pub use limosa_verbs::counters;
pub use limosa_verbs::{GidKind, GidReport, LinkLayer, PortReport, PortState};
pub use work::{RdmaRegistered, RdmaWork};

use crate::ways::Here;
use limosa_proto::allow::AllowList;
use limosa_verbs::{CompletionError, ListenError, PairSettings, PostError, Status, WaitError};
use std::io;
use std::net::IpAddr;
use std::time::Duration;

/// The link's name, in reports, offers and Hello.
pub const NAME: &str = "rdma";
/// Version of what is said on lanes.
const VERSION: u8 = 1;
/// A step of opening a lane that takes longer than this has failed.
const STEP_MAX: Duration = Duration::from_secs(5);
/// A blocked wait looks around this often; a closed lane ends it at once.
const LOOK_AROUND: Duration = Duration::from_secs(1);
/// Bytes of one write at most: a larger one gains nothing and holds up the others.
const WRITE_BYTES_MAX: u64 = 2 << 20;
/// Bytes of one message with heads, seal included. The heads of 8 MiB of pages fit, whatever their runs.
const MESSAGE_BYTES: u32 = 64 << 10;
/// Messages that the source prepares at most before the first of them has arrived.
const MESSAGES_AHEAD: u32 = 8;
/// Bytes of one message towards the source, and how many of them may be under way.
const ANSWER_BYTES: u32 = 128;
const ANSWERS: u32 = 16;
/// How long the source's device pauses where the destination has no receive ready, which credits rule out: 10.24 ms in the
/// notation of the InfiniBand specification.
const NOT_READY_TIMER: u8 = 20;

/// Settings of the RDMA link. Both hosts need `trusted_fabric`; everything else is each host's own affair.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RdmaSettings {
    /// Networks whose hosts and switches may see and change guest memory in passing: RDMA is not encrypted. Only addresses in
    /// them, this host's own included, are used. None: no RDMA.
    pub trusted_fabric: AllowList,
    /// Whether guest memory is left unpinned where the device has on-demand paging; without that it is pinned all the same.
    pub on_demand: bool,
    /// The addresses of this host that take migrations.
    pub here: Here,
    /// Work requests that a lane may have under way: 16 to 16384. A run of pages is at least one.
    pub send_depth: u32,
    /// Messages that a destination can take per lane before it has looked at any, each 64 KiB: 4 to 1024.
    pub head_buffers: u32,
    /// Page bytes handed to the device at once, with one ring of its doorbell; a round's end does not wait for it.
    pub batch_bytes: u64,
    /// Page bytes that a lane has under way before it waits.
    pub window_bytes: u64,
    /// Chunks of 16 MiB whose keys are asked for before they are needed: 0 to 64. The destination registers them meanwhile.
    pub chunks_ahead: u32,
}

impl Default for RdmaSettings {
    fn default() -> RdmaSettings {
        RdmaSettings {
            trusted_fabric: AllowList::default(),
            on_demand: false,
            here: Here::default(),
            send_depth: 1024,
            head_buffers: 16,
            batch_bytes: 16 << 20,
            window_bytes: 32 << 20,
            chunks_ahead: 4,
        }
    }
}

impl RdmaSettings {
    fn trusts(&self, address: IpAddr) -> bool {
        self.trusted_fabric.decide(address).allowed
    }

    fn trusted_words(&self) -> String {
        let networks: Vec<String> = self.trusted_fabric.networks().iter().map(ToString::to_string).collect();
        if networks.is_empty() { "empty".to_owned() } else { networks.join(", ") }
    }

    /// A lane's queue pair at its source.
    fn source_pair(&self) -> PairSettings {
        PairSettings { send_depth: self.depth(), receive_depth: ANSWERS, ..PairSettings::default() }
    }

    /// A lane's queue pair at its destination.
    fn destination_pair(&self) -> PairSettings {
        PairSettings {
            send_depth: ANSWERS,
            receive_depth: self.buffers(),
            remote_write: true,
            minimal_rnr_timer: NOT_READY_TIMER,
            ..PairSettings::default()
        }
    }

    fn depth(&self) -> u32 {
        self.send_depth.clamp(16, 16_384)
    }

    fn buffers(&self) -> u32 {
        self.head_buffers.clamp(4, 1024)
    }
}

/// Why RDMA is not to be had here.
#[derive(Debug, thiserror::Error)]
pub enum RdmaError {
    /// Nobody said that the fabric is trusted.
    #[error(
        "RDMA is off: no network is declared trusted; RDMA is not encrypted, so name those that are: trusted_fabric = [\"10.0.0.0/24\"]"
    )]
    NoTrustedFabric,
    /// The address to listen on is not in a trusted network.
    #[error("RDMA cannot be offered on {address}: it is not inside trusted_fabric ({networks})")]
    NotTrusted {
        /// The address.
        address: IpAddr,
        /// The trusted networks.
        networks: String,
    },
    /// The port could not be opened, or there is no device.
    #[error(transparent)]
    Listen(#[from] ListenError),
}

/// A failed wait as the drivers know failures. `gone` is what a peer that has gone means here.
fn waited(error: WaitError, gone: io::ErrorKind) -> io::Error {
    match error {
        WaitError::TimedOut(_) => io::ErrorKind::TimedOut.into(),
        WaitError::Closed => io::ErrorKind::ConnectionAborted.into(),
        WaitError::Disconnected => gone.into(),
        other => io::Error::other(other),
    }
}

/// A failed work request: one that was flushed only tells that its queue pair ended.
fn completed(error: CompletionError, gone: io::ErrorKind) -> io::Error {
    if error.status == Status::Flushed { gone.into() } else { io::Error::other(error) }
}

fn posted(error: PostError) -> io::Error {
    io::Error::other(error)
}
