//! The allow-list: from which addresses a connection is looked at at all. Default deny; no name, no rule that forbids.

use crate::error::Misuse;
use ipnetwork::IpNetwork;
use std::net::IpAddr;

/// Networks from which hosts may connect.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct AllowList {
    networks: Vec<IpNetwork>,
}

/// What the list says about an address.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Decision {
    /// Whether it may connect.
    pub allowed: bool,
    /// The network that allows it; `None` where none does.
    pub rule: Option<IpNetwork>,
}

impl AllowList {
    /// A list of networks in CIDR notation; an address alone is a network of one. An empty list allows nobody.
    ///
    /// IPv4-mapped IPv6 networks become IPv4. Bits beyond the prefix are dropped, and each time that is said in a
    /// warning, the second value.
    ///
    /// # Errors
    /// Names the text that is no network.
    pub fn new<T: AsRef<str>>(texts: &[T]) -> Result<(AllowList, Vec<String>), Misuse> {
        let (mut networks, mut warnings) = (Vec::new(), Vec::new());
        for text in texts {
            let text = text.as_ref().trim();
            let wrong = |words: String| Misuse::Network { text: text.chars().take(80).collect(), words };
            let given = canonical(text.parse().map_err(|error: ipnetwork::IpNetworkError| wrong(error.to_string()))?);
            let given = given.map_err(|error| wrong(error.to_string()))?;
            let network = IpNetwork::new(given.network(), given.prefix()).map_err(|error| wrong(error.to_string()))?;
            if network != given {
                warnings.push(format!("\"{text}\" has bits beyond its prefix; it is read as the network {network}"));
            }
            if !networks.contains(&network) {
                networks.push(network);
            }
        }
        Ok((AllowList { networks }, warnings))
    }

    /// Whether `address` may connect, and by which rule. An IPv4-mapped IPv6 address is its IPv4 address.
    #[must_use]
    pub fn decide(&self, address: IpAddr) -> Decision {
        let address = address.to_canonical();
        let rule = self.networks.iter().copied().find(|network| network.contains(address));
        Decision { allowed: rule.is_some(), rule }
    }

    /// The networks, without host bits, in the order they were given.
    #[must_use]
    pub fn networks(&self) -> &[IpNetwork] {
        &self.networks
    }
}

/// An IPv4-mapped IPv6 network as the IPv4 network that it is.
fn canonical(network: IpNetwork) -> Result<IpNetwork, ipnetwork::IpNetworkError> {
    match (network.ip().to_canonical(), network.prefix().checked_sub(96)) {
        (IpAddr::V4(address), Some(prefix)) if network.is_ipv6() => IpNetwork::new(IpAddr::V4(address), prefix),
        _ => Ok(network),
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    fn allowed(list: &[&str], address: &str) -> bool {
        AllowList::new(list).unwrap().0.decide(address.parse().unwrap()).allowed
    }

    #[test]
    fn nobody_is_allowed_by_default() {
        assert!(!allowed(&[], "127.0.0.1"));
        assert!(!allowed(&[], "::1"));
        assert!(!AllowList::default().decide("10.0.0.1".parse().unwrap()).allowed);
    }

    #[test]
    fn networks_of_both_families() {
        let list = ["10.20.0.0/16", "192.0.2.7", "2001:db8::/32"];
        for good in ["10.20.3.4", "::ffff:10.20.3.4", "192.0.2.7", "2001:db8:9::1"] {
            assert!(allowed(&list, good), "{good}");
        }
        for bad in ["10.21.0.1", "::ffff:10.21.0.1", "192.0.2.8", "2001:db9::1", "::10.20.3.4"] {
            assert!(!allowed(&list, bad), "{bad}");
        }
        let (list, _) = AllowList::new(&list).unwrap();
        let decision = list.decide("10.20.3.4".parse().unwrap());
        assert_eq!(decision.rule.unwrap().to_string(), "10.20.0.0/16");
    }

    #[test]
    fn mapped_networks_are_ipv4() {
        assert!(allowed(&["::ffff:10.20.0.0/112"], "10.20.3.4"));
        assert!(!allowed(&["::ffff:10.20.0.0/112"], "10.21.3.4"));
        // A network around all mapped addresses is IPv6 and has no IPv4 in it.
        assert!(!allowed(&["::/0"], "10.20.3.4"));
        assert!(allowed(&["::ffff:0:0/96"], "10.20.3.4"));
    }

    #[test]
    fn host_bits_are_dropped_and_said() {
        let (list, warnings) = AllowList::new(&["10.20.3.4/16", "10.20.0.0/16"]).unwrap();
        assert_eq!(list.networks().len(), 1);
        assert_eq!(warnings, ["\"10.20.3.4/16\" has bits beyond its prefix; it is read as the network 10.20.0.0/16"]);
    }

    #[test]
    fn nonsense_is_named() {
        let error = AllowList::new(&["10.20.0.0/16", "10.20.0.0/33"]).unwrap_err().to_string();
        assert!(error.contains("\"10.20.0.0/33\""), "{error}");
        assert!(AllowList::new(&["everyone"]).is_err());
        assert!(AllowList::new(&[""]).is_err());
    }
}
