//! The links of this host: what listens for guests that come, what is offered to a source that asks, and what a guest that
//! leaves may be sent over. Which of them is taken is decided by `limosa_link::choose`.

use crate::agent::Agent;
use crate::api::{ApiError, HostReport, LinkInfo, RdmaDevice};
use crate::hosts::Host;
use crate::metrics::Door;
use limosa_link::choose::{OwnRdma, Reach, Wanted};
use limosa_link::quic::{QuicLink, QuicListener};
use limosa_link::sessions::Sessions;
use limosa_link::{Cancel, Fabric, Hosting, Listener, ListenerSettings, TcpLink};
use limosa_proto::allow::AllowList;
use limosa_proto::identity::HostId;
use limosa_proto::wire::code::Code;
use limosa_proto::wire::limits::{WORDS_BYTES_MAX, fit};
use limosa_proto::wire::message::Refusal;
use limosa_proto::wire::offer::{LinkAddress, LinkOffer};
use std::sync::{Arc, OnceLock, RwLock};

#[cfg(feature = "rdma")]
use limosa_link::rdma::{self, RdmaLink, RdmaListener, RdmaSettings};

/// What listens, or why not; known once the agent runs.
#[derive(Debug, Default)]
pub(crate) struct Links {
    quic: OnceLock<Result<(), String>>,
    /// The port of lanes.
    rdma: OnceLock<Result<u16, String>>,
}

const NOT_YET: &str = "the agent is starting";

impl Links {
    fn quic(&self) -> Result<(), String> {
        self.quic.get().cloned().unwrap_or_else(|| Err(NOT_YET.into()))
    }

    fn rdma(&self) -> Result<u16, String> {
        self.rdma.get().cloned().unwrap_or_else(|| Err(NOT_YET.into()))
    }
}

/// Opens all ports; gives the table of what comes in. Only TCP must be there: a host without the others says why, and goes on.
///
/// # Errors
/// A TCP port cannot be opened.
pub(crate) fn listen(agent: &Arc<Agent>, hosting: Arc<dyn Hosting>, stop: &Cancel) -> Result<Sessions, ApiError> {
    let (allow, lists) = (agent.rules.allow(), agent.rules.lists());
    if lists.peers.networks().is_empty() {
        tracing::warn!("the allow-list is empty: no host can send a guest here");
    }
    if agent.config.tickets.required && agent.operators.all().is_empty() {
        tracing::warn!("no [[operator]] is named: no guest can come, for want of a ticket that counts here");
    }
    if lists.here.is_set() && lists.here.rules().next().is_none() {
        tracing::warn!("no address of this host takes migrations: the list of them is set and empty");
    }
    let (rdma, fabric) = match bind_rdma(agent, &allow) {
        Ok((listening, port, fabric)) => {
            tracing::info!(port, "guests may come over RDMA");
            (Ok((listening, port)), Some(fabric))
        }
        Err(words) => {
            tracing::info!("no RDMA here: {words}");
            (Err(words), None)
        }
    };
    let sessions = Sessions::with_fabric(hosting, agent.config.migration.incoming_max, fabric);
    let _ = agent.links.rdma.set(rdma.map(|(listening, port)| {
        listening.serve(sessions.clone(), stop.clone());
        port
    }));
    for address in &agent.config.listen {
        let (key, trusted) = (agent.key.clone(), agent.hosts.trusted());
        let listener = Listener::bind(*address, settings(agent), key, trusted, Arc::clone(&allow));
        let listener = listener.map_err(|e| ApiError::refused("listen", format!("agent.listen: {address}: {e}")))?;
        let listener = listener.with_operators(agent.operators.keys());
        agent.metrics.watch(Door::Tcp(listener.counters()));
        tokio::spawn(listener.serve(sessions.clone(), stop.clone()));
    }
    let quic = bind_quic(agent, &allow).map(|listeners| {
        for listener in listeners {
            agent.metrics.watch(Door::Quic(listener.counters()));
            tokio::spawn(listener.serve(sessions.clone(), stop.clone()));
        }
    });
    if let Err(words) = &quic {
        tracing::info!("no QUIC here: {words}");
    }
    let _ = agent.links.quic.set(quic);
    Ok(sessions)
}

fn settings(agent: &Agent) -> ListenerSettings {
    let set = &agent.config.migration;
    ListenerSettings {
        plaintext_lanes: set.plaintext_lanes,
        peer_silence_max: set.silence_max,
        here: agent.rules.here(),
        ..ListenerSettings::default()
    }
}

/// QUIC on every address of TCP's, so that a source finds it where it finds the agent.
fn bind_quic(agent: &Agent, allow: &Arc<RwLock<AllowList>>) -> Result<Vec<QuicListener>, String> {
    quic_enabled(agent)?;
    let bind = |address: &std::net::SocketAddr| {
        let (key, trusted) = (agent.key.clone(), agent.hosts.trusted());
        let listener = QuicListener::bind(*address, settings(agent), agent.config.quic.settings, key, trusted, Arc::clone(allow));
        listener.map_err(|e| format!("UDP port {address} cannot be opened: {e}"))
    };
    agent.config.listen.iter().map(bind).collect()
}

fn quic_enabled(agent: &Agent) -> Result<(), String> {
    if agent.config.quic.enabled { Ok(()) } else { Err("it is switched off (quic.enabled = false)".into()) }
}

/// An RDMA port that is open and not served yet.
struct RdmaListening {
    #[cfg(feature = "rdma")]
    listener: RdmaListener,
}

impl RdmaListening {
    fn serve(self, sessions: Sessions, stop: Cancel) {
        #[cfg(feature = "rdma")]
        tokio::spawn(self.listener.serve(sessions, stop));
        #[cfg(not(feature = "rdma"))]
        drop((sessions, stop));
    }
}

#[cfg(feature = "rdma")]
fn bind_rdma(agent: &Agent, allow: &Arc<RwLock<AllowList>>) -> Result<(RdmaListening, u16, Arc<dyn Fabric>), String> {
    use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
    let addresses = rdma_addresses(agent)?;
    let port = agent.config.listen.first().map_or(crate::config::DEFAULT_PORT, SocketAddr::port);
    // All devices': which addresses count is trusted_fabric's business. One of IPv6 takes IPv4 too.
    let any = if addresses.iter().all(|one| one.address.is_ipv4()) {
        IpAddr::V4(Ipv4Addr::UNSPECIFIED)
    } else {
        IpAddr::V6(Ipv6Addr::UNSPECIFIED)
    };
    let listener = RdmaListener::bind(SocketAddr::new(any, port), rdma_settings(agent), Arc::clone(allow));
    let listener = listener.map_err(|e| e.to_string())?;
    let (port, fabric) = (listener.local_address().port(), listener.fabric());
    Ok((RdmaListening { listener }, port, fabric))
}

#[cfg(not(feature = "rdma"))]
fn bind_rdma(agent: &Agent, _allow: &Arc<RwLock<AllowList>>) -> Result<(RdmaListening, u16, Arc<dyn Fabric>), String> {
    rdma_addresses(agent).and(Err(NO_FEATURE.into()))
}

#[cfg(feature = "rdma")]
fn rdma_settings(agent: &Agent) -> RdmaSettings {
    let set = &agent.config.rdma;
    RdmaSettings {
        trusted_fabric: set.trusted_fabric.clone(),
        on_demand: set.on_demand,
        here: agent.rules.here(),
        ..RdmaSettings::default()
    }
}

#[cfg(not(feature = "rdma"))]
const NO_FEATURE: &str = "this program was built without RDMA (feature \"rdma\")";

/// This host's addresses within the trusted fabric, or why there are none. Opens the devices for a moment.
fn rdma_addresses(agent: &Agent) -> Result<Vec<LinkAddress>, String> {
    if !agent.config.rdma.enabled {
        return Err("it is switched off (rdma.enabled = false)".into());
    }
    #[cfg(feature = "rdma")]
    return rdma::addresses(&rdma_settings(agent)).and_then(|found| here_first(agent, found));
    #[cfg(not(feature = "rdma"))]
    return Err(NO_FEATURE.into());
}

/// Those that take migrations, in the order of their priority.
#[cfg(feature = "rdma")]
fn here_first(agent: &Agent, found: Vec<LinkAddress>) -> Result<Vec<LinkAddress>, String> {
    let here = agent.rules.here();
    let all = found.iter().map(|one| one.address.to_string()).collect::<Vec<_>>().join(", ");
    let mut fit: Vec<(u16, LinkAddress)> =
        found.into_iter().filter_map(|one| here.priority(one.address).map(|priority| (priority, one))).collect();
    fit.sort_by_key(|(priority, _)| *priority);
    if fit.is_empty() {
        return Err(format!("its RDMA addresses are {all}, and none of them takes migrations (allow.here)"));
    }
    Ok(fit.into_iter().map(|(_, one)| one).collect())
}

/// The same as [`rdma_addresses`] from a task: it takes as long as the devices take to answer.
fn rdma_addresses_now(agent: &Agent) -> Result<Vec<LinkAddress>, String> {
    tokio::task::block_in_place(|| rdma_addresses(agent))
}

/// The ways to ask another host about a migration that no driver carries any more, which was its `part` in it: TCP, and where the guest
/// may have gone by QUIC because TCP is blocked, that.
///
/// # Errors
/// It is not trusted any more.
pub(crate) fn to_ask(agent: &Agent, part: &str, peer: HostId) -> Result<(TcpLink, Option<QuicLink>), String> {
    let host = agent.hosts.with_id(peer);
    let host = host.ok_or_else(|| format!("the {part} {peer} is not trusted here any more: `limosa host trust` it"))?;
    let (silence, key, trusted) = (agent.config.migration.silence_max, agent.key.clone(), agent.hosts.trusted());
    let tcp = TcpLink::new(host.address.clone(), host.id, key.clone(), trusted.clone(), silence).with_here(agent.rules.here());
    let quic = agent.config.quic.enabled.then(|| {
        let link = QuicLink::new(host.address, host.id, key, trusted, silence, agent.config.quic.settings);
        link.with_here(agent.rules.here())
    });
    Ok((tcp, quic))
}

/// What a source that asks is told.
pub(crate) fn offers(agent: &Agent) -> Vec<LinkOffer> {
    let offer = |link: &str, said: Result<(Option<u16>, Vec<LinkAddress>), String>| {
        let available = said.is_ok();
        let (words, (port, addresses)) = match said {
            Ok(had) => (String::new(), had),
            Err(words) => (fit(&words, WORDS_BYTES_MAX), (None, Vec::new())),
        };
        LinkOffer { link: link.into(), available, words, port, addresses }
    };
    let rdma = agent.links.rdma().and_then(|port| rdma_addresses_now(agent).map(|addresses| (Some(port), addresses)));
    vec![
        offer("tcp", Ok((None, Vec::new()))),
        offer("quic", agent.links.quic().map(|()| (None, Vec::new()))),
        offer("rdma", rdma),
    ]
}

/// Whether a guest may come over `link`.
///
/// # Errors
/// Why not, as the source is told.
pub(crate) fn may_come_over(agent: &Agent, link: &str) -> Result<(), Refusal> {
    let has = match link {
        "tcp" => Ok(()),
        "quic" => agent.links.quic(),
        "rdma" => agent.links.rdma().and_then(|_| rdma_addresses_now(agent)).map(drop),
        other => Err(format!("it knows no such link: {:?}", other.chars().take(80).collect::<String>())),
    };
    has.map_err(|words| Refusal::one(Code::LinkUnavailable, format!("the destination does not offer {link}: {words}")))
}

/// How `host` may be reached by a link that `wanted` may mean. May block where RDMA may be one.
pub(crate) fn reach(agent: &Agent, host: &Host, wanted: Wanted) -> Reach {
    let looked = !matches!(wanted, Wanted::Only(kind) if kind.name() != "rdma");
    Reach {
        destination: host.address.clone(),
        expected: host.id,
        key: agent.key.clone(),
        trusted: agent.hosts.trusted(),
        silence_max: agent.config.migration.silence_max,
        here: agent.rules.here(),
        quic: quic_enabled(agent).map(|()| agent.config.quic.settings),
        rdma: if looked { own_rdma(agent) } else { Err("another link was asked for".into()) },
    }
}

#[cfg(feature = "rdma")]
fn own_rdma(agent: &Agent) -> Result<OwnRdma, String> {
    let (addresses, settings) = (rdma_addresses(agent)?, rdma_settings(agent));
    let trusted_fabric = settings.trusted_fabric.clone();
    let make: limosa_link::choose::MakeRdma =
        Arc::new(move |control, destination| Arc::new(RdmaLink::new(control, destination, settings.clone())));
    Ok(OwnRdma { addresses, trusted_fabric, make })
}

#[cfg(not(feature = "rdma"))]
fn own_rdma(agent: &Agent) -> Result<OwnRdma, String> {
    rdma_addresses(agent).and(Err(NO_FEATURE.into()))
}

/// This host, for `limosa host show`. May block.
pub(crate) fn show(agent: &Agent) -> HostReport {
    let info = |offer: LinkOffer| {
        let words = match (offer.link.as_str(), offer.available) {
            ("tcp", _) if agent.config.migration.plaintext_lanes => "TLS 1.3, or plain text where a source asks for it".into(),
            ("tcp" | "quic", true) => "TLS 1.3".into(),
            (_, true) => format!(
                "not encrypted, within the trusted fabric; pages are {}",
                if agent.config.migration.page_check {
                    "checked by a keyed hash"
                } else {
                    "NOT checked unless a source asks for it"
                }
            ),
            (_, false) => offer.words,
        };
        let address = |one: &LinkAddress| match one.mtu {
            Some(mtu) => format!("{} (MTU {mtu})", one.address),
            None => one.address.to_string(),
        };
        let addresses = offer.addresses.iter().map(address).collect();
        LinkInfo { link: offer.link, available: offer.available, words, addresses }
    };
    HostReport {
        name: agent.config.name.clone(),
        id: agent.key.id().to_string(),
        addresses: agent.config.listen.iter().map(ToString::to_string).collect(),
        links: offers(agent).into_iter().map(info).collect(),
        rdma_devices: devices(),
    }
}

#[cfg(feature = "rdma")]
fn devices() -> Vec<RdmaDevice> {
    use crate::api::{RdmaGid, RdmaPort};
    use rdma::{GidKind, LinkLayer, PortState};
    let gid = |gid: &rdma::GidReport| RdmaGid {
        index: gid.index,
        // Of RoCE it is an IP address, and an IPv4 one is better known as such.
        gid: gid.gid.to_canonical().to_string(),
        kind: match gid.kind {
            GidKind::InfiniBand => "InfiniBand".into(),
            GidKind::RoceV1 => "RoCE v1".into(),
            GidKind::RoceV2 => "RoCE v2".into(),
        },
        interface: gid.interface.clone(),
    };
    let port = |port: &rdma::PortReport| RdmaPort {
        number: port.number,
        state: match port.state {
            PortState::Down => "down".into(),
            PortState::Initializing => "initializing".into(),
            PortState::Armed => "armed".into(),
            PortState::Active => "active".into(),
            PortState::Other => "unknown".into(),
        },
        link_layer: match port.link_layer {
            LinkLayer::InfiniBand => "InfiniBand".into(),
            LinkLayer::Ethernet => "Ethernet".into(),
            LinkLayer::Other => "unknown".into(),
        },
        mtu_active: port.mtu_active,
        mtu_max: port.mtu_max,
        gids: port.gids.iter().map(gid).collect(),
    };
    let device = |device: rdma::DeviceInfo| RdmaDevice {
        ports: device.ports.iter().map(port).collect(),
        on_demand: device.on_demand.reliable,
        name: device.name,
        guid: device.guid,
    };
    // Why there are none is in the words of the link.
    rdma::devices().unwrap_or_default().into_iter().map(device).collect()
}

#[cfg(not(feature = "rdma"))]
fn devices() -> Vec<RdmaDevice> {
    Vec::new()
}
