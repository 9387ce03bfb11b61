//! What the benchmark and its two ends say to each other: one JSON line an order on an end's standard input, one JSON line an answer
//! on its standard output. An end is this program, started by the benchmark, here or in a machine of the lab.

use crate::common::machine::Machine;
use crate::common::record::Sample;
use crate::hosts::Spent;
use crate::memory::Mix;
use serde::{Deserialize, Serialize};
use std::net::{IpAddr, SocketAddr};

/// What an end is told to do.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) enum Order {
    /// First: who it is. Answered by `Ready` at a destination, by `Done` at a source.
    Begin(Begin),
    /// Source: fill the guest's memory.
    Fill { bytes: u64, mix: Mix },
    /// Source: move it. Answered by `Moved`.
    Migrate(Migrate),
    /// Source: quinn's own bulk transfer. Answered by `Moved`.
    Bulk { to: Bulk, streams: u16, bytes: u64 },
    /// Destination: what the last migration cost, and what arrived. Answered by `Arrived`.
    Look,
    /// Remember the CPU time until now.
    Mark,
    /// CPU time since `Mark`. Answered by `Cost`.
    Since,
    /// Start a program, and wait until it listens on `port` (TCP) where one is given.
    Start { words: Vec<String>, port: Option<u16> },
    /// Wait for it. Answered by `Ended`.
    Wait { seconds: u64 },
}

/// What an end must know.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct Begin {
    /// A key of this run alone, as PKCS#8; both ends have it.
    pub(crate) key: Vec<u8>,
    /// The destination's address.
    pub(crate) address: IpAddr,
    /// In words, for the record.
    pub(crate) kind: String,
    /// The interface that is measured.
    pub(crate) interface: String,
    /// Networks that are said to be trusted, where RDMA is measured.
    pub(crate) trusted_fabric: Vec<String>,
    /// UDP payload of quinn's tuned bulk transfer.
    pub(crate) bulk_mtu: u16,
}

/// One migration without a guest.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct Migrate {
    pub(crate) link: Way,
    pub(crate) lanes: u16,
    pub(crate) generation: u64,
    pub(crate) frame_bytes: u64,
    /// Where control goes to: TCP, or UDP for QUIC.
    pub(crate) to: SocketAddr,
    /// Where queue pairs go to.
    pub(crate) fabric: Option<SocketAddr>,
    /// QUIC connections.
    pub(crate) connections: u16,
}

/// How pages travel.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) enum Way {
    TcpPlaintext,
    TcpTls,
    Quic,
    /// With the keyed hash of pages or without.
    Rdma {
        check: bool,
    },
}

/// A destination of quinn's own.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct Bulk {
    pub(crate) address: SocketAddr,
    pub(crate) certificate: Vec<u8>,
    /// UDP payload; stock settings where there is none.
    pub(crate) mtu: Option<u16>,
}

/// What an end has done.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) enum Answer {
    Ready(Box<Ready>),
    Done,
    /// Memory was filled; its sum.
    Filled {
        sum: u64,
    },
    Moved(Sample),
    Arrived {
        sum: u64,
        spent: Spent,
        registering: Option<f64>,
    },
    Cost(Spent),
    Ended {
        status: Option<i32>,
        stdout: String,
        stderr: String,
        spent: Spent,
    },
    /// It could not be done, in words.
    Failed(String),
}

/// An end that takes orders, and where a destination listens.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct Ready {
    pub(crate) machine: Machine,
    pub(crate) tcp: Option<SocketAddr>,
    pub(crate) quic: Option<SocketAddr>,
    /// Or why not.
    pub(crate) rdma: Result<SocketAddr, String>,
    /// The device of that address: its name and the index of the GID.
    pub(crate) device: Option<(String, u32)>,
    pub(crate) tuned: Option<Bulk>,
    pub(crate) stock: Option<Bulk>,
}
