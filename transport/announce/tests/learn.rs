//! What is learned from frames: by hand-made ones, and that no bytes at all do harm.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::net::IpAddr;

use limosa_announce::{Claim, LEARNED_MAX, Learned, Nic, Way, claim, frames};
use proptest::prelude::*;

const MAC: [u8; 6] = [0x52, 0x54, 0x00, 0x12, 0x34, 0x56];
const OURS: &str = "525400123456";
const OTHER: &str = "525400999999";

fn unhex(text: &str) -> Vec<u8> {
    let digits: Vec<u8> = text.chars().filter_map(|c| c.to_digit(16)).map(|d| d as u8).collect();
    digits.chunks(2).map(|pair| pair[0] << 4 | pair[1]).collect()
}

fn ip(text: &str) -> IpAddr {
    text.parse().unwrap()
}

/// ARP from `mac` with this operation, sender and target.
fn arp(mac: &str, operation: u16, sender: &str, target: &str) -> Vec<u8> {
    let address = |text: &str| text.parse::<std::net::Ipv4Addr>().unwrap().octets().map(|b| format!("{b:02x}")).concat();
    let (sender, target) = (address(sender), address(target));
    unhex(&format!("ffffffffffff {mac} 0806 0001 0800 06 04 {operation:04x} {mac} {sender} 000000000000 {target}"))
}

/// ICMPv6 from `mac` and `source` of this type, with a body of a reserved word, a target and options; the checksum is left out.
fn nd(mac: &str, hops: u8, source: &str, kind: u8, rest: &str) -> Vec<u8> {
    let address = |text: &str| text.parse::<std::net::Ipv6Addr>().unwrap().octets().map(|b| format!("{b:02x}")).concat();
    let rest: String = rest.split(' ').map(|word| if word.contains("::") { address(word) } else { word.to_owned() }).collect();
    let (length, source, group) = (4 + rest.len() / 2, address(source), address("ff02::1"));
    unhex(&format!("333300000001 {mac} 86dd 60000000 {length:04x} 3a {hops:02x} {source} {group} {kind:02x} 00 0000 {rest}"))
}

/// DHCP over UDP from `mac`: operation 1 asks, 2 answers.
fn dhcp(mac: &str, operation: u8, message: u8, client: &str, ciaddr: &str, yiaddr: &str, options: &str) -> Vec<u8> {
    let address = |text: &str| text.parse::<std::net::Ipv4Addr>().unwrap().octets().map(|b| format!("{b:02x}")).concat();
    let (ports, zeros) = (if operation == 1 { "0044 0043" } else { "0043 0044" }, "00".repeat(10 + 64 + 128));
    let bootp = format!(
        "{operation:02x} 01 06 00 deadbeef 0000 0000 {} {} 00000000 00000000 {client} {zeros} 63825363 35 01 {message:02x} {options} ff",
        address(ciaddr),
        address(yiaddr)
    );
    let length = 8 + unhex(&bootp).len();
    let header = format!("45 00 {:04x} 0000 0000 40 11 0000 00000000 ffffffff {ports} {length:04x} 0000", 20 + length);
    unhex(&format!("ffffffffffff {mac} 0800 {header} {bootp}"))
}

#[test]
fn arp_tells_who_has_an_address() {
    let has = |frame: &[u8]| claim(MAC, Way::FromGuest, frame);
    for operation in [1, 2] {
        assert_eq!(has(&arp(OURS, operation, "10.0.0.5", "10.0.0.1")), Some(Claim::Has(ip("10.0.0.5"))));
        assert_eq!(has(&arp(OURS, operation, "10.0.0.5", "10.0.0.5")), Some(Claim::Has(ip("10.0.0.5"))), "gratuitous");
    }
    assert_eq!(has(&arp(OURS, 1, "0.0.0.0", "10.0.0.5")), None, "a probe claims nothing yet");
    assert_eq!(has(&arp(OTHER, 1, "10.0.0.5", "10.0.0.1")), None, "a machine behind the guest");
    let mut lent = arp(OURS, 2, "10.0.0.5", "10.0.0.1");
    lent[22..28].copy_from_slice(&unhex(OTHER));
    assert_eq!(has(&lent), None, "the guest speaks for another");
    let coming = |frame: &[u8]| claim(MAC, Way::ToGuest, frame);
    assert_eq!(coming(&arp(OTHER, 1, "10.0.0.5", "10.0.0.5")), Some(Claim::Lost(ip("10.0.0.5"))), "another one has it");
    for frame in frames(&Nic { mac: MAC, addresses: vec![ip("10.0.0.5"), ip("fd00::5")], ..Nic::default() }) {
        assert_eq!(coming(&frame.bytes), None, "this host's own announcement: {}", frame.words);
    }
}

#[test]
fn neighbour_discovery_tells_who_has_an_address() {
    let has = |frame: &[u8]| claim(MAC, Way::FromGuest, frame);
    let option = format!("0101 {OURS}");
    let target = format!("0101 {OURS}").replace("0101", "0201");
    assert_eq!(has(&nd(OURS, 255, "::", 135, "00000000 fd00::5")), Some(Claim::Has(ip("fd00::5"))), "before it uses it");
    let asks = nd(OURS, 255, "fe80::5", 135, &format!("00000000 fd00::1 {option}"));
    assert_eq!(has(&asks), Some(Claim::Has(ip("fe80::5"))), "who asks has an address, and a link-local one is one");
    let advert = nd(OURS, 255, "fe80::5", 136, &format!("20000000 fd00::5 {target}"));
    assert_eq!(has(&advert), Some(Claim::Has(ip("fd00::5"))));
    assert_eq!(has(&nd(OURS, 255, "fe80::5", 133, "00000000")), Some(Claim::Has(ip("fe80::5"))), "a router is asked for");
    assert_eq!(has(&nd(OURS, 64, "fe80::5", 136, "20000000 fd00::5")), None, "it came through a router");
    assert_eq!(has(&nd(OURS, 255, "fd00::5", 128, "00010001")), None, "an echo request is a packet like any other");
    assert_eq!(has(&nd(OTHER, 255, "fe80::9", 136, "20000000 fd00::5")), None);
    let other = nd(OTHER, 255, "fe80::9", 136, "20000000 fd00::5");
    assert_eq!(claim(MAC, Way::ToGuest, &other), Some(Claim::Lost(ip("fd00::5"))));
}

#[test]
fn dhcp_tells_who_has_an_address() {
    let has = |frame: &[u8]| claim(MAC, Way::FromGuest, frame);
    let coming = |frame: &[u8]| claim(MAC, Way::ToGuest, frame);
    let ack = dhcp(OTHER, 2, 5, OURS, "0.0.0.0", "10.0.0.5", "");
    assert_eq!(coming(&ack), Some(Claim::Has(ip("10.0.0.5"))));
    assert_eq!(has(&ack), None, "a guest is no server of its own");
    assert_eq!(coming(&dhcp(OTHER, 2, 5, OTHER, "0.0.0.0", "10.0.0.5", "")), None, "for another machine");
    assert_eq!(coming(&dhcp(OTHER, 2, 2, OURS, "0.0.0.0", "10.0.0.5", "")), None, "an offer is no acknowledgement");
    assert_eq!(has(&dhcp(OURS, 1, 3, OURS, "10.0.0.5", "0.0.0.0", "")), Some(Claim::Has(ip("10.0.0.5"))), "it renews");
    assert_eq!(has(&dhcp(OURS, 1, 3, OURS, "0.0.0.0", "0.0.0.0", "32 04 0a000005")), None, "a wish");
    assert_eq!(has(&dhcp(OURS, 1, 7, OURS, "10.0.0.5", "0.0.0.0", "")), Some(Claim::Lost(ip("10.0.0.5"))), "it gives back");
    let decline = dhcp(OURS, 1, 4, OURS, "0.0.0.0", "0.0.0.0", "32 04 0a000005");
    assert_eq!(has(&decline), Some(Claim::Lost(ip("10.0.0.5"))));
    let mut fragment = ack;
    fragment[21] = 1;
    assert_eq!(coming(&fragment), None);
}

#[test]
fn the_one_not_seen_for_longest_makes_room_and_what_is_lost_goes() {
    let mut learned = Learned::new(&[ip("10.0.9.2"), ip("10.0.9.1")]);
    assert_eq!(learned.addresses(), [ip("10.0.9.2"), ip("10.0.9.1")], "the one seen last is the first, as it was");
    let tell = |learned: &mut Learned, address: &str| learned.frame(MAC, Way::FromGuest, &arp(OURS, 1, address, "10.0.0.254"));
    tell(&mut learned, "10.0.9.1");
    for last in 1..LEARNED_MAX {
        tell(&mut learned, &format!("10.0.0.{last}"));
    }
    let known = learned.addresses();
    assert_eq!((known.len(), known[0]), (LEARNED_MAX, ip(&format!("10.0.0.{}", LEARNED_MAX - 1))));
    assert!(known.contains(&ip("10.0.9.1")) && !known.contains(&ip("10.0.9.2")), "{known:?}");
    learned.frame(MAC, Way::ToGuest, &arp(OTHER, 2, "10.0.9.1", "10.0.0.254"));
    assert!(!learned.addresses().contains(&ip("10.0.9.1")));
    for no_host in ["127.0.0.1", "224.0.0.1", "255.255.255.255"] {
        tell(&mut learned, no_host);
        assert!(!learned.addresses().contains(&ip(no_host)));
    }
}

proptest! {
    #[test]
    fn any_bytes_are_judged(bytes in prop::collection::vec(any::<u8>(), 0..400), to_guest in any::<bool>()) {
        let way = if to_guest { Way::ToGuest } else { Way::FromGuest };
        let _ = claim(MAC, way, &bytes);
    }

    #[test]
    fn good_frames_with_bytes_changed_cut_or_added_are_judged(
        which in 0usize..6, changes in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 0..8),
        length in 0usize..500, to_guest in any::<bool>(),
    ) {
        let mut frame = match which {
            0 => arp(OURS, 1, "10.0.0.5", "10.0.0.1"),
            1 => nd(OURS, 255, "::", 135, "00000000 fd00::5"),
            2 => nd(OURS, 255, "fe80::5", 134, "40000000 0000000000000000 0304 40c0 00000e10 00000e10 00000000 fd00::0"),
            3 => nd(OURS, 255, "fe80::5", 137, "00000000 fd00::5 fd00::6 0201 525400123456 0401 0000 00000000"),
            4 => dhcp(OURS, 1, 3, OURS, "10.0.0.5", "0.0.0.0", "3d 07 01 525400123456 37 03 010306"),
            _ => dhcp(OTHER, 2, 5, OURS, "0.0.0.0", "10.0.0.5", "06 08 0a000001 0a000002 33 04 00000e10"),
        };
        for (at, byte) in changes {
            let at = at.index(frame.len());
            frame[at] = byte;
        }
        frame.resize(length, 0);
        let way = if to_guest { Way::ToGuest } else { Way::FromGuest };
        let mut learned = Learned::default();
        learned.frame(MAC, way, &frame);
        prop_assert!(learned.addresses().len() <= 1);
    }
}
