//! The allow-list: from which addresses a connection is looked at at all, and which of its rules says so. Default deny; no
//! name, no rule that forbids.

use crate::error::Misuse;
use ipnetwork::IpNetwork;
use std::fmt;
use std::net::IpAddr;

/// Networks from which hosts may connect.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct AllowList {
    networks: Vec<IpNetwork>,
    /// Each network as it was written, and at which place.
    written: Vec<(String, usize)>,
}

/// The rule that decided.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Rule<'t> {
    /// Its place in the list as it was written, from 1.
    pub position: usize,
    /// As it was written.
    pub text: &'t str,
    /// What it is read as.
    pub network: IpNetwork,
}

/// What the list says about an address.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Decision<'t> {
    /// The address as it was compared: IPv4 where it was IPv4-mapped.
    pub address: IpAddr,
    /// Whether it may connect.
    pub allowed: bool,
    /// The first rule that allows it; `None` where none does.
    pub rule: Option<Rule<'t>>,
    /// How many rules there are.
    pub rules: usize,
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
        let (mut list, mut warnings) = (AllowList::default(), Vec::new());
        for (index, text) in texts.iter().enumerate() {
            let text = text.as_ref().trim();
            let wrong = |words: String| Misuse::Network { text: text.chars().take(80).collect(), words };
            let given = canonical(text.parse().map_err(|error: ipnetwork::IpNetworkError| wrong(error.to_string()))?);
            let given = given.map_err(|error| wrong(error.to_string()))?;
            let network = IpNetwork::new(given.network(), given.prefix()).map_err(|error| wrong(error.to_string()))?;
            if network != given {
                warnings.push(format!("\"{text}\" has bits beyond its prefix; it is read as the network {network}"));
            }
            if !list.networks.contains(&network) {
                list.networks.push(network);
                list.written.push((text.to_owned(), index + 1));
            }
        }
        Ok((list, warnings))
    }

    /// Whether `address` may connect, and by which rule. An IPv4-mapped IPv6 address is its IPv4 address.
    #[must_use]
    pub fn decide(&self, address: IpAddr) -> Decision<'_> {
        let address = address.to_canonical();
        let rule = self.rules().find(|rule| rule.network.contains(address));
        Decision { address, allowed: rule.is_some(), rule, rules: self.networks.len() }
    }

    /// The rules in the order in which they were written, without those that say the same network again.
    pub fn rules(&self) -> impl Iterator<Item = Rule<'_>> {
        let written = self.written.iter().map(|(text, position)| (text.as_str(), *position));
        self.networks.iter().zip(written).map(|(network, (text, position))| Rule { position, text, network: *network })
    }

    /// The networks, without host bits, in the order they were given.
    #[must_use]
    pub fn networks(&self) -> &[IpNetwork] {
        &self.networks
    }
}

impl fmt::Display for Decision<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match (self.rule, self.rules) {
            (Some(Rule { position, text, .. }), _) => write!(f, "{} is allowed by rule {position}, \"{text}\"", self.address),
            (None, 0) => write!(f, "{} is not allowed: the list is empty, and it allows only whom it names", self.address),
            (None, 1) => write!(f, "{} is not allowed: the one rule does not name it", self.address),
            (None, rules) => write!(f, "{} is not allowed: none of the {rules} rules names it", self.address),
        }
    }
}

/// An address as people write it, with a zone too if it is a link-local IPv6 address: `fe80::1%eth0`. Rules know no zones,
/// and neither do addresses of connections when they are held against the list.
///
/// # Errors
/// Names the text that is no address.
pub fn parse_address(text: &str) -> Result<IpAddr, Misuse> {
    let text = text.trim();
    let wrong = |words: &str| Misuse::Address { text: text.chars().take(80).collect(), words: words.into() };
    let (address, zone) = text.split_once('%').map_or((text, None), |(address, zone)| (address, Some(zone)));
    let address: IpAddr = address.parse().map_err(|_| wrong("names are not looked up, and a port is no part of it"))?;
    let Some(zone) = zone else { return Ok(address) };
    if !matches!(address, IpAddr::V6(v6) if v6.is_unicast_link_local()) {
        return Err(wrong("only link-local IPv6 addresses have a zone"));
    }
    let plain = |c: char| !c.is_whitespace() && !c.is_control() && !matches!(c, '/' | '%');
    if (1..=15).contains(&zone.len()) && zone.chars().all(plain) { Ok(address) } else { Err(wrong("its zone is no interface")) }
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
        assert_eq!(decision.rule.unwrap().network.to_string(), "10.20.0.0/16");
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

    #[test]
    fn the_rule_that_decides_is_told_as_it_was_written() {
        let (list, _) =
            AllowList::new(&["192.0.2.1", "10.20.3.4/16", "10.20.0.0/16", "::ffff:10.0.0.0/104", "fe80::/10"]).unwrap();
        let told = |address: &str| list.decide(parse_address(address).unwrap()).to_string();
        assert_eq!(told("::ffff:10.20.9.9"), "10.20.9.9 is allowed by rule 2, \"10.20.3.4/16\"");
        // The third says the second's network again and decides nothing; places stay those of the file.
        assert_eq!(told("10.9.9.9"), "10.9.9.9 is allowed by rule 4, \"::ffff:10.0.0.0/104\"");
        assert_eq!(told("fe80::1%eth0"), "fe80::1 is allowed by rule 5, \"fe80::/10\"");
        assert_eq!(told("192.0.2.2"), "192.0.2.2 is not allowed: none of the 4 rules names it");
        let positions: Vec<usize> = list.rules().map(|rule| rule.position).collect();
        assert_eq!(positions, [1, 2, 4, 5]);
        assert!(AllowList::default().decide("::1".parse().unwrap()).to_string().contains("the list is empty"));
    }

    #[test]
    fn addresses_are_addresses() {
        for (text, words) in [
            ("hosta", "names are not looked up"),
            ("10.0.0.1:13560", "a port is no part"),
            ("[::1]:5", "a port"),
            ("10.0.0.1%eth0", "only link-local"),
            ("2001:db8::1%eth0", "only link-local"),
            ("fe80::1%", "no interface"),
            ("fe80::1%a%b", "no interface"),
            ("fe80::1%an-interface-that-is-far-too-long", "no interface"),
            ("10.0.0.0/8", "names are not"),
            ("010.0.0.1", "names are not"),
            ("", "names are not"),
        ] {
            let error = parse_address(text).unwrap_err().to_string();
            assert!(error.contains(words), "{text}: {error}");
        }
        assert_eq!(parse_address(" ::FFFF:10.0.0.1 ").unwrap().to_canonical().to_string(), "10.0.0.1");
        assert!(AllowList::new(&["fe80::1%eth0"]).is_err() && AllowList::new(&["fe80::%eth0/10"]).is_err());
    }
}
