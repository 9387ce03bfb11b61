//! The allow-list against a matcher written apart from it, bit by bit: 250 addresses a list, around every rule's edges.
#![allow(clippy::unwrap_used, missing_docs)]

use limosa_proto::allow::{AllowList, Names, NoNames};
use limosa_proto::here::HereList;
use proptest::prelude::*;
use proptest::strategy::ValueTree as _;
use proptest::test_runner::RngAlgorithm;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, SocketAddrV6};

/// Addresses that each list is asked about, at the least.
const ADDRESSES: usize = 250;

/// A rule as it is written: an address, perhaps with host bits, and a prefix if there is one.
#[derive(Debug, Clone, Copy)]
struct Written {
    address: IpAddr,
    prefix: Option<u8>,
}

impl Written {
    fn text(self) -> String {
        self.prefix.map_or(self.address.to_string(), |prefix| format!("{}/{prefix}", self.address))
    }

    fn length(self) -> u8 {
        self.prefix.unwrap_or(if self.address.is_ipv4() { 32 } else { 128 })
    }

    /// The reference: an address is a string of bits with its family before it, and IPv4-mapped ones are of IPv4's.
    fn fits(self, address: IpAddr) -> bool {
        let (mut rule, mut count) = (bits(self.address), usize::from(self.length()));
        if self.address.is_ipv6() && count >= 96 && is_mapped(&rule) {
            rule = rule[96..].to_vec();
            count -= 96;
        }
        let mut asked = bits(address);
        if address.is_ipv6() && is_mapped(&asked) {
            asked = asked[96..].to_vec();
        }
        rule.len() == asked.len() && rule.iter().zip(&asked).take(count).all(|(a, b)| a == b)
    }
}

fn bits(address: IpAddr) -> Vec<bool> {
    let octets = match address {
        IpAddr::V4(v4) => v4.octets().to_vec(),
        IpAddr::V6(v6) => v6.octets().to_vec(),
    };
    octets.iter().flat_map(|octet| (0..8).rev().map(move |bit| octet >> bit & 1 == 1)).collect()
}

fn is_mapped(bits: &[bool]) -> bool {
    bits[..80].iter().all(|bit| !bit) && bits[80..96].iter().all(|bit| *bit)
}

fn address() -> impl Strategy<Value = IpAddr> {
    prop_oneof![
        any::<u32>().prop_map(|v4| IpAddr::V4(v4.into())),
        // Few bits set, so that rules overlap.
        (0..4u32, 0..4u32).prop_map(|(a, b)| IpAddr::V4((a << 24 | b).into())),
        any::<u128>().prop_map(|v6| IpAddr::V6(v6.into())),
        any::<u32>().prop_map(|v4| IpAddr::V6(Ipv4Addr::from(v4).to_ipv6_mapped())),
        any::<u32>().prop_map(|v4| IpAddr::V6(Ipv6Addr::from(u128::from(v4)))),
        any::<u64>().prop_map(|low| IpAddr::V6(Ipv6Addr::from(0xfe80 << 112 | u128::from(low)))),
    ]
}

fn rule() -> impl Strategy<Value = Written> {
    (address(), any::<Option<u8>>()).prop_map(|(address, prefix)| {
        let most = if address.is_ipv4() { 32 } else { 128 };
        Written { address, prefix: prefix.map(|prefix| prefix % (most + 1)) }
    })
}

/// The address with its bit `at` (from the left) turned.
fn turned(address: IpAddr, at: u8) -> IpAddr {
    match address {
        IpAddr::V4(v4) => IpAddr::V4(Ipv4Addr::from(u32::from(v4) ^ (1 << (31 - at.min(31))))),
        IpAddr::V6(v6) => IpAddr::V6(Ipv6Addr::from(u128::from(v6) ^ (1 << (127 - at.min(127))))),
    }
}

/// The address, its neighbours at the rule's edge, and the same as IPv4 and IPv4-mapped.
fn around(rule: Written) -> Vec<IpAddr> {
    let length = rule.length();
    let near = [rule.address, turned(rule.address, length), turned(rule.address, length.saturating_sub(1))];
    let mapped = near.map(|address| match address {
        IpAddr::V4(v4) => IpAddr::V6(v4.to_ipv6_mapped()),
        IpAddr::V6(v6) => v6.to_ipv4_mapped().map_or(address, IpAddr::V4),
    });
    [near, mapped].concat()
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 128, ..ProptestConfig::default() })]

    #[test]
    fn the_list_decides_as_the_reference_does(
        rules in prop::collection::vec(rule(), 0..12),
        random in prop::collection::vec(address(), ADDRESSES..ADDRESSES + 50),
    ) {
        let texts: Vec<String> = rules.iter().map(|rule| rule.text()).collect();
        let (list, _) = AllowList::new(&texts).unwrap();
        for address in random.into_iter().chain(rules.iter().flat_map(|rule| around(*rule))) {
            let decision = list.decide(address);
            let first = rules.iter().position(|rule| rule.fits(address));
            prop_assert_eq!(decision.allowed, first.is_some(), "{} with {:?}", address, &texts);
            // The first rule that fits decides, and is told by its place and its text.
            let told = decision.rule.map(|rule| (rule.position, rule.text.to_owned()));
            prop_assert_eq!(told, first.map(|index| (index + 1, texts[index].clone())), "{} with {:?}", address, &texts);
            prop_assert_eq!(decision.address, address.to_canonical());
            // To a rule without a zone, that of a connection's address is nothing.
            if let IpAddr::V6(v6) = address {
                let socket = SocketAddr::V6(SocketAddrV6::new(v6, 13_560, 0, 7));
                prop_assert_eq!(list.decide_socket(socket), decision);
            }
        }
    }

    /// The list of this host's own addresses, with priorities: the smallest number decides, and then the first.
    #[test]
    fn the_list_of_this_host_decides_as_the_reference_does(
        rules in prop::collection::vec((rule(), 0..4_u16), 0..12),
        random in prop::collection::vec(address(), ADDRESSES..ADDRESSES + 50),
    ) {
        let texts: Vec<(String, u16)> = rules.iter().map(|(rule, priority)| (rule.text(), *priority)).collect();
        // A text that says the same network again decides nothing, whatever its priority: only the first of them is there.
        let first: Vec<usize> = (0..rules.len()).filter(|at| !rules[..*at].iter().any(|(early, _)| same(*early, rules[*at].0))).collect();
        let (half, rest) = texts.split_at(texts.len() / 2);
        let here = HereList::new(half, &NoNames).unwrap().0.and(&HereList::new(rest, &NoNames).unwrap().0);
        for address in random.into_iter().chain(rules.iter().flat_map(|(rule, _)| around(*rule))) {
            let best = first.iter().filter(|at| rules[**at].0.fits(address)).min_by_key(|at| (rules[**at].1, **at));
            let decision = here.decide(SocketAddr::new(address, 1));
            let told = decision.rule.map(|rule| (rule.position, decision.priority));
            prop_assert_eq!(told, best.map(|at| (at + 1, rules[*at].1)), "{} with {:?}", address, &texts);
            prop_assert_eq!(decision.allowed, best.is_some());
            prop_assert!(HereList::default().decide(SocketAddr::new(address, 1)).allowed);
        }
    }

    /// Rules for one interface beside rules for all.
    #[test]
    fn zones_decide_as_the_reference_does(
        rules in prop::collection::vec((any::<u16>(), 10..=128_u8, prop::option::of(1..4_u32)), 0..10),
        asked in prop::collection::vec((any::<u16>(), 0..5_u32), ADDRESSES..ADDRESSES + 50),
    ) {
        let local = |low: u16| Ipv6Addr::from(0xfe80 << 112 | u128::from(low));
        let texts: Vec<String> = rules.iter().map(|(low, prefix, zone)| {
            let zone = zone.map_or(String::new(), |zone| format!("%eth{zone}"));
            format!("{}{zone}/{prefix}", local(*low))
        }).collect();
        let (list, _) = AllowList::resolved(&texts, &Interfaces).unwrap();
        for (low, zone) in asked {
            let fits = |(own, prefix, on): &(u16, u8, Option<u32>)| {
                let written = Written { address: IpAddr::V6(local(*own)), prefix: Some(*prefix) };
                written.fits(IpAddr::V6(local(low))) && on.is_none_or(|on| on == zone)
            };
            let first = rules.iter().position(fits);
            let decision = list.decide_socket(SocketAddr::V6(SocketAddrV6::new(local(low), 1, 0, zone)));
            prop_assert_eq!(decision.rule.map(|rule| rule.position), first.map(|at| at + 1), "{}%{} with {:?}", local(low), zone, &texts);
        }
    }
}

/// "eth3" is the interface 3.
struct Interfaces;

impl Names for Interfaces {
    fn addresses(&self, host: &str) -> Result<Vec<IpAddr>, String> {
        Err(host.to_owned())
    }

    fn zone(&self, interface: &str) -> Result<u32, String> {
        interface.trim_start_matches("eth").parse().map_err(|_| interface.to_owned())
    }
}

/// Whether two rules name the same addresses, bit by bit. An IPv4-mapped address with less than 96 bits of prefix is a network of
/// IPv6's, which holds none of IPv4's, not even that address.
fn same(a: Written, b: Written) -> bool {
    let network = |rule: Written| {
        let (bits, length) = (bits(rule.address), usize::from(rule.length()));
        let from = if rule.address.is_ipv6() && length >= 96 && is_mapped(&bits) { 96 } else { 0 };
        (bits.len() - from, bits[from..length].to_vec())
    };
    network(a) == network(b)
}

/// Found by the comparison with the reference, which had it wrong.
#[test]
fn a_short_prefix_of_a_mapped_address_is_one_network_twice() {
    let twice = [("::ffff:0.0.0.0/92", 1), ("::ffff:0.0.0.0/92", 0)];
    let (here, _) = HereList::new(&twice, &NoNames).unwrap();
    assert_eq!(here.decide("[::fff1:0:1]:1".parse().unwrap()).priority, 1);
    assert!(!here.decide("0.0.0.0:1".parse().unwrap()).allowed);
}

/// The reference is not the same as saying yes or no to everything: both are common.
#[test]
fn the_comparison_sees_both_answers() {
    let mut runner = proptest::test_runner::TestRunner::new_with_rng(
        ProptestConfig::default(),
        proptest::test_runner::TestRng::deterministic_rng(RngAlgorithm::ChaCha),
    );
    let (mut yes, mut no) = (0, 0);
    for _ in 0..200 {
        let rule = rule().new_tree(&mut runner).unwrap().current();
        for address in around(rule) {
            if rule.fits(address) { yes += 1 } else { no += 1 }
        }
    }
    assert!(yes > 200 && no > 200, "{yes} {no}");
}
