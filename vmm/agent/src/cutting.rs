//! What a change of trust or of the lists does to migrations that run: those with a host that may not any more are asked to
//! stop. Before the commit that aborts them, and the guest runs on at its source; past it they end by the commit's rules.

use crate::agent::Agent;
use crate::allow_api::Lists;
use limosa_link::{Distrust, ways::source_of};
use limosa_proto::identity::HostId;
use std::net::{SocketAddr, ToSocketAddrs as _};

/// Who is at the other end of a job, and by which addresses.
#[derive(Debug, Clone)]
pub(crate) struct Other {
    pub(crate) id: HostId,
    pub(crate) ends: Ends,
}

/// The addresses of a migration's two ends.
#[derive(Debug, Clone)]
pub(crate) enum Ends {
    /// It came from there, to here.
    Incoming { peer: Option<SocketAddr>, local: Option<SocketAddr> },
    /// It leaves to one of these.
    Outgoing { to: Vec<SocketAddr> },
}

/// The addresses of a host, to be compared later. May block.
pub(crate) fn addresses(host: &str) -> Vec<SocketAddr> {
    host.split(',').filter_map(|one| one.trim().to_socket_addrs().ok()).flatten().collect()
}

/// Why a migration with `other` may not be now; `before` are the lists before a change, where there was one.
///
/// Who connects must be on the lists. To whom this host connects need not be: it was told to. But a rule that is taken back
/// ends what runs with the addresses that it named, both ways.
pub(crate) fn why_not(agent: &Agent, other: &Other, before: Option<&Lists>) -> Option<String> {
    let name = || agent.hosts.shown(other.id);
    match agent.hosts.trusted().why_not(other.id) {
        Some(Distrust::Revoked) => return Some(format!("the key of {} is revoked on {}", name(), agent.config.name)),
        Some(_) => return Some(format!("{} is not trusted on {} any more", name(), agent.config.name)),
        None => {}
    }
    let now = agent.rules.lists();
    let peer_words = |address: SocketAddr| {
        format!("the address {} of {} is not on the allow-list of {} any more", address.ip(), name(), agent.config.name)
    };
    let here_words =
        |address: std::net::IpAddr| format!("the address {address} of {} takes no migrations any more", agent.config.name);
    match &other.ends {
        Ends::Incoming { peer, local } => {
            let barred = peer.filter(|peer| !now.peers.decide_socket(*peer).allowed).map(peer_words);
            barred.or_else(|| local.filter(|local| !now.here.decide(*local).allowed).map(|local| here_words(local.ip())))
        }
        Ends::Outgoing { to } => {
            let before = before?;
            let lost = |to: &&SocketAddr| before.peers.decide_socket(**to).allowed && !now.peers.decide_socket(**to).allowed;
            to.iter().find(lost).map(|to| peer_words(*to)).or_else(|| {
                let ours = to.iter().filter_map(|to| source_of(*to)).map(|ip| SocketAddr::new(ip, 0));
                let mut lost = ours.filter(|ours| before.here.decide(*ours).allowed && !now.here.decide(*ours).allowed);
                lost.next().map(|ours| here_words(ours.ip()))
            })
        }
    }
}

/// Asks every migration to stop that may not be any more. Gives what is to be said about it, for behind other words.
pub(crate) fn cut(agent: &Agent, before: Option<&Lists>) -> String {
    let cut = agent.jobs.cut(|other| why_not(agent, other, before));
    for (id, words) in &cut {
        tracing::warn!(job = id, words, "a migration is cut");
    }
    let jobs: Vec<String> = cut.iter().map(|(id, _)| id.to_string()).collect();
    match jobs.as_slice() {
        [] => String::new(),
        [one] => format!("; job {one} is cut: {PAST}"),
        _ => format!("; jobs {} are cut: {PAST}", jobs.join(", ")),
    }
}

const PAST: &str = "before its commit the guest runs on at its source, past it the commit's rules decide";
