//! What is measured: the cases of a run, each with how it is done and what it is compared with. Nothing is done here.

use crate::common::record::{Case, Kind};
use crate::memory::Mix;
use crate::options::{LinkName, Options};
use crate::orders::Way;

/// How one sample is taken.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Work {
    Iperf3,
    /// quinn's bulk transfer, tuned or as it comes.
    Quinn {
        tuned: bool,
    },
    IbWriteBw,
    AsyncRdma,
    Lanes {
        way: Way,
        lanes: u16,
        mix: Mix,
    },
}

/// A case and how it is done.
pub(crate) struct Planned {
    pub(crate) case: Case,
    pub(crate) work: Work,
}

fn plain(name: String, kind: Kind, work: Work, lanes: Option<u16>) -> Planned {
    let case = Case { series: name.clone(), name, kind, link: None, lanes, mix: None, ceiling: None, samples: Vec::new() };
    Planned { case, work }
}

fn message_words(options: &Options) -> String {
    let size = if options.message.is_multiple_of(1 << 20) {
        format!("{} MiB", options.message >> 20)
    } else {
        format!("{} KiB", options.message >> 10)
    };
    format!("{size} writes, {} under way", options.depth)
}

/// How the names of a link's ceilings begin.
fn ceiling(link: LinkName) -> &'static str {
    match link {
        LinkName::Tcp | LinkName::TcpPlaintext => "iperf3",
        LinkName::Quic => "quinn bulk",
        LinkName::Rdma => "ib_write_bw",
    }
}

/// What a link is compared with.
fn others(options: &Options, link: LinkName) -> Vec<Planned> {
    let streams = Some(options.bulk_streams);
    match link {
        LinkName::Tcp | LinkName::TcpPlaintext => {
            vec![plain("iperf3 -l 1M, one stream".into(), Kind::Ceiling, Work::Iperf3, Some(1))]
        }
        LinkName::Quic => vec![
            plain(format!("quinn bulk, tuned, MTU {}", options.bulk_mtu), Kind::Ceiling, Work::Quinn { tuned: true }, streams),
            plain("quinn bulk, stock settings".into(), Kind::Peer, Work::Quinn { tuned: false }, streams),
        ],
        LinkName::Rdma => {
            let words = message_words(options);
            vec![
                plain(format!("ib_write_bw, {words}"), Kind::Ceiling, Work::IbWriteBw, Some(1)),
                plain(format!("async-rdma 0.5.0, {words}"), Kind::Peer, Work::AsyncRdma, Some(1)),
            ]
        }
    }
}

/// The ways that a link has, and what they are called.
fn ways(link: LinkName) -> Vec<(Way, &'static str, &'static str)> {
    match link {
        LinkName::TcpPlaintext => vec![(Way::TcpPlaintext, "tcp", "tcp, plaintext")],
        LinkName::Tcp => vec![(Way::TcpTls, "tcp", "tcp, TLS")],
        LinkName::Quic => vec![(Way::Quic, "quic", "quic")],
        LinkName::Rdma => vec![
            (Way::Rdma { check: false }, "rdma", "rdma, no page check"),
            (Way::Rdma { check: true }, "rdma", "rdma, page check"),
        ],
    }
}

/// Everything of one run: ceilings and peers, then lanes mix by mix (filling memory takes its time).
pub(crate) fn plan(options: &Options) -> Vec<Planned> {
    let mut all: Vec<Planned> = Vec::new();
    for link in options.links() {
        for other in others(options, link) {
            if !all.iter().any(|planned| planned.case.name == other.case.name) {
                all.push(other);
            }
        }
    }
    for mix in &options.mix {
        for link in options.links() {
            let ceiling = ceiling(link);
            for (way, link, name) in ways(link) {
                for lanes in &options.lanes {
                    // Zero pages do not travel, so no ceiling of a path is theirs.
                    let ceiling = (*mix != Mix::Zero).then(|| ceiling.to_owned());
                    let case = Case {
                        name: name.to_owned(),
                        kind: Kind::Lanes,
                        series: name.to_owned(),
                        link: Some(link.to_owned()),
                        lanes: Some(*lanes),
                        mix: Some(mix.name().to_owned()),
                        ceiling,
                        samples: Vec::new(),
                    };
                    all.push(Planned { case, work: Work::Lanes { way, lanes: *lanes, mix: *mix } });
                }
            }
        }
    }
    all
}
