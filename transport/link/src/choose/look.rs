//! Finds out which links there are to one destination: asks it over TCP (or QUIC, where TCP is blocked), measures both one after
//! the other, and compares RDMA addresses. Bounded in time and bytes. It decides nothing.

use super::{LinkKind, Obstacle, Seen, Wanted};
use crate::connect::our_address;
use crate::control::ControlError;
use crate::key::HostKey;
use crate::probe::{ProbeError, Probed, probe};
use crate::quic::{QuicLink, QuicSettings};
use crate::tls::TrustedHosts;
use crate::ways::Here;
use crate::{Link, TcpLink};
use limosa_proto::allow::AllowList;
use limosa_proto::identity::HostId;
use limosa_proto::wire::code::Code;
use limosa_proto::wire::offer::{LinkAddress, LinkOffer};
use std::fmt;
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;

/// How long QUIC may take to answer where there is something else: with the probe of TCP before it, a fall-back is decided
/// within 3 s.
const QUIC_CONNECT_MAX: Duration = Duration::from_millis(1500);
/// The same with all questions and padding.
const QUIC_ASK_MAX: Duration = Duration::from_millis(2500);

/// Makes an RDMA link of its control channel's link and an address of the destination's device.
pub type MakeRdma = Arc<dyn Fn(Arc<dyn Link>, SocketAddr) -> Arc<dyn Link> + Send + Sync>;

/// What this host has for RDMA.
#[derive(Clone)]
pub struct OwnRdma {
    /// Its addresses, each within the trusted fabric.
    pub addresses: Vec<LinkAddress>,
    /// Networks that are declared trusted here.
    pub trusted_fabric: AllowList,
    /// Makes the link.
    pub make: MakeRdma,
}

impl fmt::Debug for OwnRdma {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("OwnRdma").field("addresses", &self.addresses).finish_non_exhaustive()
    }
}

/// One destination, and what this host has to reach it by.
#[derive(Debug, Clone)]
pub struct Reach {
    /// "host:port" of the destination's agent.
    pub destination: String,
    /// The key that it must have.
    pub expected: HostId,
    /// Our key.
    pub key: HostKey,
    /// Hosts that are trusted here.
    pub trusted: TrustedHosts,
    /// A peer that is silent for longer is lost.
    pub silence_max: Duration,
    /// This host's addresses that migrations may use.
    pub here: Here,
    /// Settings of QUIC, or why this host does not use it.
    pub quic: Result<QuicSettings, String>,
    /// This host's RDMA, or why there is none.
    pub rdma: Result<OwnRdma, String>,
}

/// What was found out.
#[derive(Default)]
pub struct Found {
    /// Each link that was looked at.
    pub seen: Vec<Seen>,
    links: Vec<(LinkKind, Arc<dyn Link>)>,
}

impl fmt::Debug for Found {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Found").field("seen", &self.seen).finish_non_exhaustive()
    }
}

impl Found {
    /// The link itself; one that has been asked already is open and is used again.
    #[must_use]
    pub fn link(&self, kind: LinkKind) -> Option<Arc<dyn Link>> {
        self.links.iter().find(|(of, _)| *of == kind).map(|(_, link)| Arc::clone(link))
    }

    fn keep(&mut self, seen: Seen, link: Option<Arc<dyn Link>>) {
        self.links.extend(link.map(|link| (seen.kind, link)));
        self.seen.push(seen);
    }
}

/// Looks for the links that `wanted` may mean. Where nothing is to be chosen, nothing is measured.
pub async fn look(reach: &Reach, wanted: Wanted) -> Found {
    let mut found = Found::default();
    match wanted {
        // It is there or not: trying it tells.
        Wanted::Only(LinkKind::Tcp) => found.keep(Seen::usable(LinkKind::Tcp), Some(reach.tcp())),
        Wanted::Only(LinkKind::Quic) => reach.only_quic(&mut found).await,
        Wanted::Only(LinkKind::Rdma) => reach.only_rdma(&mut found).await,
        Wanted::Auto => reach.all(&mut found).await,
    }
    found
}

impl Reach {
    fn tcp(&self) -> Arc<dyn Link> {
        let Reach { destination, expected, key, trusted, silence_max, here, .. } = self.clone();
        Arc::new(TcpLink::new(destination, expected, key, trusted, silence_max).with_here(here))
    }

    fn quic(&self, settings: QuicSettings, offer: Option<&LinkOffer>) -> Arc<dyn Link> {
        let Reach { destination, expected, key, trusted, silence_max, here, .. } = self.clone();
        let at_port = |one: &str| match (one.rsplit_once(':'), offer.and_then(|offer| offer.port)) {
            (Some((host, _)), Some(port)) => format!("{host}:{port}"),
            _ => one.to_owned(),
        };
        let destination = destination.split(',').map(at_port).collect::<Vec<_>>().join(",");
        Arc::new(QuicLink::new(destination, expected, key, trusted, silence_max, settings).with_here(here))
    }

    /// The port of the destination's agent.
    fn port(&self) -> u16 {
        self.destination.rsplit_once(':').and_then(|(_, port)| port.parse().ok()).unwrap_or(0)
    }

    async fn only_quic(&self, found: &mut Found) {
        let settings = match &self.quic {
            Ok(settings) => *settings,
            Err(words) => return found.keep(Seen::not(LinkKind::Quic, here(words)), None),
        };
        let link = self.quic(settings, None);
        match probe(&*link, false).await {
            Ok(probed) => match offered(Some(&probed.offers), LinkKind::Quic) {
                Ok(_) => found.keep(measured(LinkKind::Quic, &probed), Some(link)),
                Err(obstacle) => found.keep(Seen::not(LinkKind::Quic, obstacle), None),
            },
            Err(error) => {
                let mut obstacle = obstacle(&error);
                // The destination itself may know why nothing answers there.
                if !is_final(obstacle.code)
                    && let Ok(probed) = probe(&*self.tcp(), false).await
                {
                    obstacle = match offered(Some(&probed.offers), LinkKind::Quic) {
                        Err(theirs) => theirs,
                        Ok(_) => blocked(&error),
                    };
                }
                found.keep(Seen::not(LinkKind::Quic, obstacle), None);
            }
        }
    }

    async fn only_rdma(&self, found: &mut Found) {
        let own = match &self.rdma {
            Ok(own) => own,
            Err(words) => return found.keep(Seen::not(LinkKind::Rdma, here(words)), None),
        };
        let mut control = self.tcp();
        let mut asked = probe(&*control, false).await;
        if let (Err(error), Ok(settings)) = (&asked, &self.quic)
            && !is_final(error.code())
        {
            let other = self.quic(*settings, None);
            if let Ok(probed) = ask_quic(&*other, false).await {
                (control, asked) = (other, Ok(probed));
            }
        }
        match asked {
            Ok(probed) => self.keep_rdma(found, own, Some(&probed.offers), &control),
            Err(error) => found.keep(Seen::not(LinkKind::Rdma, obstacle(&error)), None),
        }
    }

    async fn all(&self, found: &mut Found) {
        let tcp = self.tcp();
        let asked = probe(&*tcp, true).await;
        let mut offers = asked.as_ref().ok().map(|probed| probed.offers.clone());
        let usable = match &asked {
            Ok(probed) => Ok(measured(LinkKind::Tcp, probed)),
            // One that answers something else can do what every host could at first: TCP.
            Err(ProbeError::Answer { .. }) => Ok(Seen::usable(LinkKind::Tcp)),
            Err(error) => Err(obstacle(error)),
        };
        match usable {
            Ok(seen) => found.keep(seen, Some(Arc::clone(&tcp))),
            Err(obstacle) => {
                let end = is_final(obstacle.code);
                found.keep(Seen::not(LinkKind::Tcp, obstacle), None);
                if end {
                    return;
                }
            }
        }
        let reached = found.link(LinkKind::Tcp).is_some();
        let (seen, link, told) = self.measure_quic(offers.as_deref(), reached).await;
        found.keep(seen, link);
        offers = offers.or(told);
        let control = found.link(LinkKind::Tcp).or_else(|| found.link(LinkKind::Quic));
        match (&self.rdma, control) {
            (Err(words), _) => found.keep(Seen::not(LinkKind::Rdma, here(words)), None),
            (Ok(_), None) => {
                let words = "the destination could not be asked for its RDMA addresses";
                found.keep(Seen::not(LinkKind::Rdma, Obstacle::unavailable(words)), None);
            }
            (Ok(own), Some(control)) => self.keep_rdma(found, own, offers.as_deref(), &control),
        }
    }

    /// QUIC as it was seen, and what the destination said of its links over it. `reached`: TCP was.
    async fn measure_quic(
        &self,
        offers: Option<&[LinkOffer]>,
        reached: bool,
    ) -> (Seen, Option<Arc<dyn Link>>, Option<Vec<LinkOffer>>) {
        let not = |obstacle| (Seen::not(LinkKind::Quic, obstacle), None, None);
        let settings = match &self.quic {
            Ok(settings) => QuicSettings { connect_max: settings.connect_max.min(QUIC_CONNECT_MAX), ..*settings },
            Err(words) => return not(here(words)),
        };
        let offer = match offered(offers, LinkKind::Quic) {
            Ok(offer) => offer,
            // Without TCP nobody has said yet what there is.
            Err(_) if !reached => None,
            Err(obstacle) => return not(obstacle),
        };
        let link = self.quic(settings, offer);
        match ask_quic(&*link, true).await {
            Ok(probed) => (measured(LinkKind::Quic, &probed), Some(link), Some(probed.offers)),
            Err(Some(error)) if reached => not(blocked(&error)),
            Err(Some(error)) => not(obstacle(&error)),
            Err(None) => {
                let words = format!(
                    "destination {} answers by QUIC and took more than {} ms over a short probe",
                    self.destination,
                    QUIC_ASK_MAX.as_millis()
                );
                not(Obstacle { code: Code::Timeout, words })
            }
        }
    }

    fn keep_rdma(&self, found: &mut Found, own: &OwnRdma, offers: Option<&[LinkOffer]>, control: &Arc<dyn Link>) {
        let source_of = |to: SocketAddr| our_address(to).parse().ok();
        let way = offered(offers, LinkKind::Rdma).and_then(|offer| match offer {
            Some(offer) => rdma_way(own, offer, offer.port.unwrap_or_else(|| self.port()), &source_of),
            None => Err(Obstacle::unavailable("the destination does not say that it has RDMA")),
        });
        match way {
            Ok(destination) => found.keep(Seen::usable(LinkKind::Rdma), Some((own.make)(Arc::clone(control), destination))),
            Err(obstacle) => found.keep(Seen::not(LinkKind::Rdma, obstacle), None),
        }
    }
}

/// What the destination says about a link; `None` where it says nothing at all.
fn offered(offers: Option<&[LinkOffer]>, kind: LinkKind) -> Result<Option<&LinkOffer>, Obstacle> {
    let offers = match offers {
        None | Some([]) if kind == LinkKind::Tcp => return Ok(None),
        None | Some([]) => return Err(Obstacle::unavailable(format!("the destination does not say whether it has {kind}"))),
        Some(offers) => offers,
    };
    match offers.iter().find(|offer| offer.link == kind.name()) {
        Some(offer) if offer.available => Ok(Some(offer)),
        Some(offer) => Err(Obstacle::unavailable(format!("the destination does not offer it: {}", offer.words))),
        None => Err(Obstacle::unavailable(format!("the destination does not know {kind}"))),
    }
}

fn here(words: &str) -> Obstacle {
    Obstacle::unavailable(format!("not on this host: {words}"))
}

fn obstacle(error: &ProbeError) -> Obstacle {
    let words = match error {
        ProbeError::Control { destination, error: ControlError::KeyRefused } => format!(
            "destination {destination} does not trust our key: `limosa host trust` it there (`limosa host id` shows it here)"
        ),
        other => other.to_string(),
    };
    Obstacle { code: error.code(), words }
}

/// Whether this is the host's answer, and no other link would get another one.
fn is_final(code: Code) -> bool {
    matches!(code, Code::NotAllowed | Code::UnknownHost)
}

fn measured(kind: LinkKind, probed: &Probed) -> Seen {
    let bytes_per_s = (probed.bytes_per_s > 0.0).then_some(probed.bytes_per_s);
    Seen { round_trip: Some(probed.round_trip), bytes_per_s, ..Seen::usable(kind) }
}

/// The obstacle where the destination has QUIC, as it said over TCP.
fn blocked(error: &ProbeError) -> Obstacle {
    let mut obstacle = obstacle(error);
    if matches!(error, ProbeError::Connect(_)) && matches!(obstacle.code, Code::Timeout | Code::LinkLost) {
        obstacle.words.push_str("; the destination has it, so something on the way blocks UDP");
    }
    obstacle
}

/// Asks by QUIC; the error is `None` where there were answers, and too slow ones.
async fn ask_quic(link: &dyn Link, padding: bool) -> Result<Probed, Option<ProbeError>> {
    match tokio::time::timeout(QUIC_ASK_MAX, probe(link, padding)).await {
        Ok(probed) => probed.map_err(Some),
        Err(_) => Err(None),
    }
}

/// The destination's address that can be reached from one of ours within the trusted fabric, with packets of one size on both
/// sides. `source_of` tells our address on the way to another.
fn rdma_way(
    own: &OwnRdma,
    offer: &LinkOffer,
    port: u16,
    source_of: &dyn Fn(SocketAddr) -> Option<IpAddr>,
) -> Result<SocketAddr, Obstacle> {
    let mut reasons = Vec::new();
    for theirs in &offer.addresses {
        let address = theirs.address.to_canonical();
        if !own.trusted_fabric.decide(address).allowed {
            reasons.push(format!("its address {address} is not inside this host's rdma.trusted_fabric"));
            continue;
        }
        let destination = SocketAddr::new(address, port);
        let source = source_of(destination).map(|source| source.to_canonical());
        let Some(ours) = own.addresses.iter().find(|ours| Some(ours.address.to_canonical()) == source) else {
            let known: Vec<String> = own.addresses.iter().map(|ours| ours.address.to_string()).collect();
            let leaves = source.map_or_else(|| "nowhere".to_owned(), |source| source.to_string());
            reasons.push(format!(
                "the way to {address} leaves this host from {leaves}, and its RDMA addresses are {}",
                known.join(", ")
            ));
            continue;
        };
        match (ours.mtu, theirs.mtu) {
            (Some(here), Some(there)) if here != there => reasons.push(format!(
                "the path MTU of {} here is {here} bytes and that of {address} there {there}: give both hosts' interfaces one MTU \
                 (ip link set dev INTERFACE mtu …)",
                ours.address
            )),
            _ => return Ok(destination),
        }
    }
    if reasons.is_empty() {
        reasons.push("the destination offers it without an address".to_owned());
    }
    Err(Obstacle::unavailable(reasons.join("; ")))
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    fn offer(link: &str, available: bool, addresses: &[(&str, u16)]) -> LinkOffer {
        let addresses =
            addresses.iter().map(|(text, mtu)| LinkAddress { address: text.parse().unwrap(), mtu: Some(*mtu) }).collect();
        LinkOffer { link: link.into(), available, words: "so it is".into(), port: None, addresses }
    }

    fn own() -> OwnRdma {
        let make: MakeRdma = Arc::new(|control, _| control);
        OwnRdma {
            addresses: offer("rdma", true, &[("10.77.0.1", 4096)]).addresses,
            trusted_fabric: AllowList::new(&["10.77.0.0/24"]).unwrap().0,
            make,
        }
    }

    fn way(addresses: &[(&str, u16)], source: &str) -> Result<SocketAddr, String> {
        let source = source.parse().ok();
        rdma_way(&own(), &offer("rdma", true, addresses), 13560, &|_| source).map_err(|obstacle| obstacle.words)
    }

    #[test]
    fn the_first_address_that_fits_is_taken() {
        let to = way(&[("10.78.0.2", 4096), ("::ffff:10.77.0.2", 4096)], "10.77.0.1").unwrap();
        assert_eq!(to, "10.77.0.2:13560".parse().unwrap());
    }

    #[test]
    fn why_no_address_fits_is_said_with_the_remedy() {
        let words = way(&[("10.78.0.2", 4096)], "10.77.0.1").unwrap_err();
        assert!(words.contains("10.78.0.2 is not inside this host's rdma.trusted_fabric"), "{words}");
        let words = way(&[("10.77.0.2", 1024)], "10.77.0.1").unwrap_err();
        assert!(words.contains("4096") && words.contains("1024") && words.contains("mtu"), "{words}");
        let words = way(&[("10.77.0.2", 4096)], "192.168.0.1").unwrap_err();
        assert!(words.contains("192.168.0.1") && words.contains("10.77.0.1"), "{words}");
        let words = way(&[], "10.77.0.1").unwrap_err();
        assert!(words.contains("without an address"), "{words}");
    }

    #[test]
    fn what_the_destination_does_not_offer_is_said_in_its_words() {
        let offers = [offer("tcp", true, &[]), offer("quic", false, &[])];
        assert!(offered(Some(&offers), LinkKind::Tcp).unwrap().is_some());
        assert!(offered(Some(&offers), LinkKind::Quic).unwrap_err().words.contains("so it is"));
        assert!(offered(Some(&offers), LinkKind::Rdma).unwrap_err().words.contains("does not know"));
        assert!(offered(None, LinkKind::Quic).unwrap_err().words.contains("does not say"));
        assert_eq!(offered(Some(&[]), LinkKind::Tcp).unwrap(), None);
    }
}
