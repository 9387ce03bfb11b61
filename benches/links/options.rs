//! What the benchmark is asked for on its command line.

use crate::memory::Mix;
use clap::{Parser, ValueEnum};
use std::net::IpAddr;
use std::path::PathBuf;

/// Raw lanes of each link against the ceiling of the same path, in one run.
#[derive(Debug, Clone, Parser)]
#[command(name = "links")]
pub(crate) struct Options {
    /// Links to measure; without it tcp-plaintext, tcp and quic, in the lab rdma
    #[arg(long, value_enum, value_delimiter = ',')]
    pub(crate) link: Vec<LinkName>,
    /// Numbers of lanes
    #[arg(long, value_delimiter = ',', default_values_t = [1, 2, 4, 8], value_parser = clap::value_parser!(u16).range(1..=16))]
    pub(crate) lanes: Vec<u16>,
    /// What the pages hold
    #[arg(long, value_enum, value_delimiter = ',', default_values_t = [Mix::Random, Mix::Text, Mix::Zero])]
    pub(crate) mix: Vec<Mix>,
    /// Guest memory in GiB
    #[arg(long, conflicts_with = "mib")]
    pub(crate) gib: Option<u64>,
    /// Guest memory in MiB; without it 1024, in the lab 64
    #[arg(long)]
    pub(crate) mib: Option<u64>,
    /// How often everything is measured, interleaved
    #[arg(long, default_value_t = 3)]
    pub(crate) runs: u32,
    /// The destination's address; on loopback a network namespace is made for the run
    #[arg(long)]
    pub(crate) address: Option<IpAddr>,
    /// Measure between the two machines of the soft-RoCE lab
    #[arg(long, conflicts_with = "address")]
    pub(crate) lab: bool,
    /// Page bytes in one frame, and bytes of a message of ib_write_bw and async-rdma
    #[arg(long, default_value_t = 1 << 20)]
    pub(crate) message: u64,
    /// Messages under way for ib_write_bw and async-rdma; a lane has 32 MiB under way
    #[arg(long, default_value_t = 32)]
    pub(crate) depth: u32,
    /// UDP payload of quinn's tuned bulk transfer
    #[arg(long, default_value_t = 8952, value_parser = clap::value_parser!(u16).range(1200..16000))]
    pub(crate) bulk_mtu: u16,
    /// Streams of quinn's bulk transfers
    #[arg(long, default_value_t = 1)]
    pub(crate) bulk_streams: u16,
    /// Connections that QUIC's lanes are spread over
    #[arg(long, default_value_t = 1)]
    pub(crate) connections: u16,
    /// Write every sample, and the machine's description, into this file
    #[arg(long)]
    pub(crate) json: Option<PathBuf>,
    /// Measure nothing: draw the plot of this file and write its table into docs/BENCHMARKS.md
    #[arg(long, conflicts_with_all = ["json", "lab"])]
    pub(crate) render: Option<PathBuf>,
    /// Be one of the two ends (the benchmark starts them itself)
    #[arg(long, hide = true)]
    pub(crate) end: Option<Side>,
    /// Given by `cargo bench`
    #[arg(long, hide = true)]
    pub(crate) bench: bool,
}

/// A link as it is asked for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum LinkName {
    TcpPlaintext,
    Tcp,
    Quic,
    Rdma,
}

/// Which end.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum Side {
    Source,
    Destination,
}

impl Options {
    /// Bytes of guest memory.
    pub(crate) fn bytes(&self) -> u64 {
        let mib = self.gib.map(|gib| gib << 10).or(self.mib).unwrap_or(if self.lab { 64 } else { 1024 });
        mib.max(1) << 20
    }

    /// The links that were asked for, or those that make sense here.
    pub(crate) fn links(&self) -> Vec<LinkName> {
        match self.link.as_slice() {
            [] if self.lab => vec![LinkName::Rdma],
            [] => vec![LinkName::TcpPlaintext, LinkName::Tcp, LinkName::Quic],
            asked => asked.to_vec(),
        }
    }

    /// The destination's address.
    pub(crate) fn destination(&self) -> IpAddr {
        let usual = if self.lab { [10, 77, 0, 2] } else { [127, 0, 0, 1] };
        self.address.unwrap_or_else(|| usual.into())
    }
}
