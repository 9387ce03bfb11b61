//! The allow-list: from which addresses a connection is looked at at all, and which of its rules says so. Default deny; no
//! rule that forbids. Names of hosts and interfaces are looked up by [`Names`] when a list is made, and never again.

use crate::error::Misuse;
use ipnetwork::IpNetwork;
use std::fmt;
use std::net::{IpAddr, SocketAddr};

/// Networks from which hosts may connect.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct AllowList {
    networks: Vec<IpNetwork>,
    /// Each network as it was written.
    written: Vec<Written>,
    /// How many texts there were, those that say the same again included.
    texts: usize,
}

#[derive(Debug, Clone, PartialEq, Eq)]
struct Written {
    text: String,
    /// From 1.
    position: usize,
    /// The interface that a link-local network is on, by its number.
    zone: Option<u32>,
}

/// What a rule may name beside addresses.
pub trait Names {
    /// The addresses of a host; none: the rule allows nobody.
    ///
    /// # Errors
    /// In words.
    fn addresses(&self, host: &str) -> Result<Vec<IpAddr>, String>;
    /// The number of an interface of this host.
    ///
    /// # Errors
    /// In words.
    fn zone(&self, interface: &str) -> Result<u32, String>;
}

/// Nothing is looked up.
#[derive(Debug, Clone, Copy, Default)]
pub struct NoNames;

impl Names for NoNames {
    fn addresses(&self, _: &str) -> Result<Vec<IpAddr>, String> {
        Err("names are not looked up here".into())
    }

    fn zone(&self, _: &str) -> Result<u32, String> {
        Err("interfaces are not looked up here".into())
    }
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
    /// The number of the interface that it holds for; none: any.
    pub zone: Option<u32>,
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

impl Rule<'_> {
    /// Whether it names `address`, which came by the interface number `zone` (0: not known).
    #[must_use]
    pub fn fits(&self, address: IpAddr, zone: u32) -> bool {
        self.zone.is_none_or(|own| own == zone) && self.network.contains(address.to_canonical())
    }
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
        AllowList::resolved(texts, &NoNames)
    }

    /// As [`AllowList::new`], and beside networks names of hosts, and link-local networks on one interface: `fe80::%eth0/10`.
    ///
    /// # Errors
    /// Names the text that is none of it.
    pub fn resolved<T: AsRef<str>>(texts: &[T], names: &dyn Names) -> Result<(AllowList, Vec<String>), Misuse> {
        let (mut list, mut warnings) = (AllowList::default(), Vec::new());
        for text in texts {
            list.texts += 1;
            let text = text.as_ref().trim();
            let wrong = |words: String| Misuse::Network { text: text.chars().take(80).collect(), words };
            for (given, zone) in read(text, names).map_err(wrong)? {
                let given = canonical(given).map_err(|error| wrong(error.to_string()))?;
                let network = IpNetwork::new(given.network(), given.prefix()).map_err(|error| wrong(error.to_string()))?;
                if network != given {
                    warnings.push(format!("\"{text}\" has bits beyond its prefix; it is read as the network {network}"));
                }
                let written = Written { text: text.to_owned(), position: list.texts, zone };
                list.put(network, written);
            }
        }
        Ok((list, warnings))
    }

    fn put(&mut self, network: IpNetwork, written: Written) {
        if !self.rules().any(|rule| rule.network == network && rule.zone == written.zone) {
            self.networks.push(network);
            self.written.push(written);
        }
    }

    /// The rules of both, those of `more` behind.
    #[must_use]
    pub fn and(&self, more: &AllowList) -> AllowList {
        let mut both = self.clone();
        for (network, written) in more.networks.iter().zip(&more.written) {
            both.put(*network, Written { position: self.texts + written.position, ..written.clone() });
        }
        both.texts += more.texts;
        both
    }

    /// Whether `address` may connect, and by which rule. An IPv4-mapped IPv6 address is its IPv4 address. Rules for one
    /// interface allow it not: [`AllowList::decide_at`] does.
    #[must_use]
    pub fn decide(&self, address: IpAddr) -> Decision<'_> {
        self.decide_at(address, 0)
    }

    /// The same of an address that came by the interface number `zone`; 0: not known.
    #[must_use]
    pub fn decide_at(&self, address: IpAddr, zone: u32) -> Decision<'_> {
        let address = address.to_canonical();
        let rule = self.rules().find(|rule| rule.fits(address, zone));
        Decision { address, allowed: rule.is_some(), rule, rules: self.networks.len() }
    }

    /// The same of the address of a connection, whose zone is known to the kernel.
    #[must_use]
    pub fn decide_socket(&self, address: SocketAddr) -> Decision<'_> {
        self.decide_at(address.ip(), zone_of(address))
    }

    /// The rules in the order in which they were written, without those that say the same network again. A name is as many as
    /// it has addresses.
    pub fn rules(&self) -> impl Iterator<Item = Rule<'_>> {
        let rule = |(network, written): (&IpNetwork, &'_ Written)| (*network, written.position, written.zone);
        let texts = self.written.iter().map(|written| written.text.as_str());
        let rest = self.networks.iter().zip(&self.written).map(rule);
        rest.zip(texts).map(|((network, position, zone), text)| Rule { position, text, network, zone })
    }

    /// The networks, without host bits, in the order they were given.
    #[must_use]
    pub fn networks(&self) -> &[IpNetwork] {
        &self.networks
    }

    /// How many texts it was made of.
    #[must_use]
    pub fn texts(&self) -> usize {
        self.texts
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

/// The number of the interface that a link-local address is on; 0: none.
#[must_use]
pub fn zone_of(address: SocketAddr) -> u32 {
    match address {
        SocketAddr::V6(v6) => v6.scope_id(),
        SocketAddr::V4(_) => 0,
    }
}

/// The networks that a rule's text means.
fn read(text: &str, names: &dyn Names) -> Result<Vec<(IpNetwork, Option<u32>)>, String> {
    if let Some((address, rest)) = text.split_once('%') {
        let (zone, prefix) = rest.split_once('/').map_or((rest, None), |(zone, prefix)| (zone, Some(prefix)));
        let plain = prefix.map_or_else(|| address.to_owned(), |prefix| format!("{address}/{prefix}"));
        let network: IpNetwork = plain.parse().map_err(|error: ipnetwork::IpNetworkError| error.to_string())?;
        if !matches!(network.ip(), IpAddr::V6(v6) if v6.is_unicast_link_local()) {
            return Err("only link-local IPv6 addresses have a zone".into());
        }
        if !plain_zone(zone) {
            return Err("its zone is no interface".into());
        }
        return Ok(vec![(network, Some(names.zone(zone)?))]);
    }
    match text.parse::<IpNetwork>() {
        Ok(network) => Ok(vec![(network, None)]),
        Err(_) if is_name(text) => Ok(names.addresses(text)?.into_iter().map(|address| (address.into(), None)).collect()),
        Err(error) => Err(error.to_string()),
    }
}

/// Whether a text may be a host's name: it has a letter, and nothing that no name has.
fn is_name(text: &str) -> bool {
    let fine = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '.' | '_');
    (1..=253).contains(&text.len()) && text.chars().all(fine) && text.contains(|c: char| c.is_ascii_alphabetic())
}

fn plain_zone(zone: &str) -> bool {
    let plain = |c: char| !c.is_whitespace() && !c.is_control() && !matches!(c, '/' | '%');
    (1..=15).contains(&zone.len()) && zone.chars().all(plain)
}

/// An address as people write it, with a zone too if it is a link-local IPv6 address: `fe80::1%eth0`; the zone is the second
/// value.
///
/// # Errors
/// Names the text that is no address.
pub fn parse_zoned(text: &str) -> Result<(IpAddr, Option<&str>), Misuse> {
    let text = text.trim();
    let wrong = |words: &str| Misuse::Address { text: text.chars().take(80).collect(), words: words.into() };
    let (address, zone) = text.split_once('%').map_or((text, None), |(address, zone)| (address, Some(zone)));
    let address: IpAddr = address.parse().map_err(|_| wrong("names are not looked up, and a port is no part of it"))?;
    let Some(zone) = zone else { return Ok((address, None)) };
    if !matches!(address, IpAddr::V6(v6) if v6.is_unicast_link_local()) {
        return Err(wrong("only link-local IPv6 addresses have a zone"));
    }
    if plain_zone(zone) { Ok((address, Some(zone))) } else { Err(wrong("its zone is no interface")) }
}

/// The same without its zone.
///
/// # Errors
/// Names the text that is no address.
pub fn parse_address(text: &str) -> Result<IpAddr, Misuse> {
    parse_zoned(text).map(|(address, _)| address)
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

    /// "both" has two addresses, "gone" none, "eth0" is the interface 7.
    struct Book;

    impl Names for Book {
        fn addresses(&self, host: &str) -> Result<Vec<IpAddr>, String> {
            match host {
                "both" => Ok(vec!["192.0.2.1".parse().unwrap(), "2001:db8::1".parse().unwrap()]),
                "gone" => Ok(Vec::new()),
                other => Err(format!("{other} has no address")),
            }
        }

        fn zone(&self, interface: &str) -> Result<u32, String> {
            if interface == "eth0" { Ok(7) } else { Err(format!("there is no interface {interface}")) }
        }
    }

    #[test]
    fn names_are_their_addresses_and_zones_their_interface() {
        let (list, _) = AllowList::resolved(&["gone", "both", "fe80::%eth0/10", "fe80::5%eth0"], &Book).unwrap();
        let rule = |text: &str, zone| list.decide_at(text.parse().unwrap(), zone).rule.map(|rule| (rule.position, rule.text));
        assert_eq!((rule("192.0.2.1", 0), rule("2001:db8::1", 3)), (Some((2, "both")), Some((2, "both"))));
        assert_eq!(rule("fe80::5", 7), Some((3, "fe80::%eth0/10")));
        // Another interface, or one that is not known, is not eth0.
        assert_eq!((rule("fe80::5", 8), rule("fe80::5", 0), rule("192.0.2.2", 0)), (None, None, None));
        let socket = |zone| SocketAddr::V6(std::net::SocketAddrV6::new("fe80::5".parse().unwrap(), 1, 0, zone));
        assert!(list.decide_socket(socket(7)).allowed && !list.decide_socket(socket(8)).allowed);
        for (text, words) in [
            ("nobody", "nobody has no address"),
            ("fe80::%eth1/10", "no interface eth1"),
            ("10.0.0.0%eth0/8", "only link-local"),
            ("fe80::1%", "no interface"),
            ("10.0.0.256", "invalid"),
            ("a b", "invalid"),
        ] {
            let error = AllowList::resolved(&[text], &Book).unwrap_err().to_string();
            assert!(error.contains(words), "{text}: {error}");
        }
    }

    #[test]
    fn two_lists_are_one_with_the_places_behind_each_other() {
        let (first, _) = AllowList::new(&["10.0.0.0/8", "10.0.0.0/8"]).unwrap();
        let (second, _) = AllowList::new(&["10.0.0.0/8", "192.0.2.0/24"]).unwrap();
        let both = first.and(&second);
        assert_eq!(both.decide("192.0.2.9".parse().unwrap()).rule.unwrap().position, 4);
        assert_eq!((both.networks().len(), both.texts()), (2, 4));
        assert_eq!(AllowList::default().and(&first), first);
    }
}
