//! By which addresses two hosts meet: those of this host on which migrations are accepted, and of a destination with several
//! addresses the one that is reached from the best of ours. What the list says is decided in `limosa_proto::here`.

use limosa_proto::here::HereList;
use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, UdpSocket};
use std::sync::{Arc, PoisonError, RwLock};

/// Addresses of one destination that are looked at.
const ADDRESSES_MAX: usize = 16;

/// This host's addresses that migrations may use. Clones are the same list; it changes while connections come and go.
#[derive(Debug, Clone, Default)]
pub struct Here(Arc<RwLock<HereList>>);

impl PartialEq for Here {
    fn eq(&self, other: &Here) -> bool {
        self.list() == other.list()
    }
}

impl Eq for Here {}

impl Here {
    /// This list.
    #[must_use]
    pub fn new(list: HereList) -> Here {
        Here(Arc::new(RwLock::new(list)))
    }

    /// Puts `list` in place of what was there.
    pub fn replace(&self, list: HereList) {
        *self.0.write().unwrap_or_else(PoisonError::into_inner) = list;
    }

    /// The list as it is now.
    #[must_use]
    pub fn list(&self) -> HereList {
        self.0.read().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Whether a connection may have this end here. Where the address is not known, only a list that is not set allows it.
    #[must_use]
    pub fn admits(&self, local: Option<SocketAddr>) -> bool {
        let list = self.0.read().unwrap_or_else(PoisonError::into_inner);
        local.map_or(!list.is_set(), |local| list.decide(local).allowed)
    }

    /// How soon an address of this host is taken, the smallest first; none: it is not taken at all.
    #[must_use]
    pub fn priority(&self, local: IpAddr) -> Option<u16> {
        let list = self.0.read().unwrap_or_else(PoisonError::into_inner);
        let decision = list.decide(SocketAddr::new(local, 0));
        decision.allowed.then_some(decision.priority)
    }
}

/// One way to a destination.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Way {
    pub(crate) to: SocketAddr,
    /// The address of ours that it must leave from; none: whichever the system takes.
    pub(crate) from: Option<IpAddr>,
}

/// Why there is no way.
#[derive(Debug)]
pub(crate) enum NoWay {
    /// The destination has no address.
    Resolve(io::Error),
    /// Every way leaves from an address of this host that migrations may not use; this is one.
    Forbidden(IpAddr),
}

/// The ways to `destination`, "host:port" or several with commas between, best first.
pub(crate) async fn ways(destination: &str, here: &Here) -> Result<Vec<Way>, NoWay> {
    let (mut found, mut failed): (Vec<SocketAddr>, Option<io::Error>) = (Vec::new(), None);
    for one in destination.split(',') {
        match tokio::net::lookup_host(one.trim()).await {
            Ok(addresses) => addresses.for_each(|address| {
                if !found.contains(&address) && found.len() < ADDRESSES_MAX {
                    found.push(address);
                }
            }),
            Err(error) => failed = Some(error),
        }
    }
    if found.is_empty() {
        return Err(NoWay::Resolve(failed.unwrap_or_else(|| io::ErrorKind::AddrNotAvailable.into())));
    }
    sorted(&found, here, &source_of)
}

/// In the order of `here`, each with the address that it leaves from. `source_of` tells our address on the way to another.
fn sorted(to: &[SocketAddr], here: &Here, source_of: &dyn Fn(SocketAddr) -> Option<IpAddr>) -> Result<Vec<Way>, NoWay> {
    if !here.list().is_set() {
        return Ok(to.iter().map(|to| Way { to: *to, from: None }).collect());
    }
    let (mut ways, mut forbidden) = (Vec::new(), None);
    for to in to {
        // Where there is no route, trying it says so best.
        let Some(from) = source_of(*to) else {
            ways.push((u16::MAX, Way { to: *to, from: None }));
            continue;
        };
        match here.priority(from) {
            Some(priority) => ways.push((priority, Way { to: *to, from: Some(from) })),
            None => forbidden = Some(from),
        }
    }
    ways.sort_by_key(|(priority, _)| *priority);
    match (ways.is_empty(), forbidden) {
        (true, Some(from)) => Err(NoWay::Forbidden(from)),
        _ => Ok(ways.into_iter().map(|(_, way)| way).collect()),
    }
}

/// The address that we have when we speak to `to`; none: there is no route. Connecting a datagram socket sends nothing.
#[must_use]
pub fn source_of(to: SocketAddr) -> Option<IpAddr> {
    let any: SocketAddr = if to.is_ipv4() { (Ipv4Addr::UNSPECIFIED, 0).into() } else { (Ipv6Addr::UNSPECIFIED, 0).into() };
    let socket = UdpSocket::bind(any).ok()?;
    socket.connect(to).ok()?;
    socket.local_addr().ok().map(|address| address.ip())
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use limosa_proto::allow::NoNames;

    fn here(rules: &[(&str, u16)]) -> Here {
        Here::new(HereList::new(rules, &NoNames).unwrap().0)
    }

    fn order(here: &Here) -> Result<Vec<String>, NoWay> {
        // 10.1.x is left from 10.1.0.1, 10.2.x from 10.2.0.1; to 10.3.x there is no route.
        let source = |to: SocketAddr| match to.ip() {
            IpAddr::V4(v4) if v4.octets()[1] < 3 => Some(IpAddr::V4(Ipv4Addr::new(10, v4.octets()[1], 0, 1))),
            _ => None,
        };
        let to: Vec<SocketAddr> = ["10.1.0.9:1", "10.2.0.9:1", "10.3.0.9:1"].map(|text| text.parse().unwrap()).to_vec();
        sorted(&to, here, &source).map(|ways| ways.iter().map(|way| way.to.ip().to_string()).collect())
    }

    #[test]
    fn the_dedicated_network_comes_first_and_a_forbidden_one_not_at_all() {
        assert_eq!(order(&Here::default()).unwrap(), ["10.1.0.9", "10.2.0.9", "10.3.0.9"]);
        assert_eq!(order(&here(&[("10.2.0.0/16", 1), ("10.1.0.0/16", 9)])).unwrap(), ["10.2.0.9", "10.1.0.9", "10.3.0.9"]);
        assert_eq!(order(&here(&[("10.1.0.0/16", 9)])).unwrap(), ["10.1.0.9", "10.3.0.9"]);
        let none = here(&[("10.9.0.0/16", 9)]);
        assert!(matches!(
            sorted(&["10.1.0.9:1".parse().unwrap()], &none, &|_| "10.1.0.1".parse().ok()),
            Err(NoWay::Forbidden(_))
        ));
    }

    #[test]
    fn an_end_that_is_not_known_is_admitted_only_where_no_list_is_set() {
        let list = here(&[("10.1.0.0/16", 9)]);
        assert!(Here::default().admits(None) && !list.admits(None));
        assert!(list.admits("10.1.0.1:5".parse().ok()) && !list.admits("10.2.0.1:5".parse().ok()));
    }

    #[tokio::test]
    async fn a_destination_may_have_several_addresses() {
        let ways = ways("127.0.0.1:5, 127.0.0.2:6,127.0.0.1:5", &Here::default()).await.unwrap();
        assert_eq!(ways.iter().map(|way| way.to.to_string()).collect::<Vec<_>>(), ["127.0.0.1:5", "127.0.0.2:6"]);
    }
}
