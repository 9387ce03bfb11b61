//! The bytes of each frame: golden ones written by hand from the RFCs, and read back by smoltcp for any card.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use limosa_announce::{FrameKind, Nic, frames};
use proptest::prelude::*;
use smoltcp::phy::ChecksumCapabilities;
use smoltcp::wire::{
    ArpOperation, ArpPacket, ArpRepr, EthernetAddress, EthernetFrame, EthernetProtocol, Icmpv6Packet, Icmpv6Repr, Ipv6Packet,
    NdiscNeighborFlags, NdiscRepr,
};

const MAC: [u8; 6] = [0x52, 0x54, 0x00, 0x12, 0x34, 0x56];

fn nic() -> Nic {
    let addresses = vec!["10.0.0.5".parse().unwrap(), "fd00::5".parse().unwrap()];
    Nic { mac: MAC, addresses, interface: "br0".into(), ..Nic::default() }
}

fn unhex(text: &str) -> Vec<u8> {
    let digits: Vec<u8> = text.chars().filter_map(|c| c.to_digit(16)).map(|d| d as u8).collect();
    digits.chunks(2).map(|pair| pair[0] << 4 | pair[1]).collect()
}

fn padded(text: &str, bytes: usize) -> Vec<u8> {
    let mut frame = unhex(text);
    frame.resize(bytes, 0);
    frame
}

const RARP: &str = "ffffffffffff 525400123456 8035 0001 0800 06 04 0003 525400123456 00000000 525400123456 00000000";
const ARP_REQUEST: &str = "ffffffffffff 525400123456 0806 0001 0800 06 04 0001 525400123456 0a000005 000000000000 0a000005";
const ARP_REPLY: &str = "ffffffffffff 525400123456 0806 0001 0800 06 04 0002 525400123456 0a000005 ffffffffffff 0a000005";
const ADVERT: &str = "333300000001 525400123456 86dd 60000000 0020 3a ff \
    fd000000000000000000000000000005 ff020000000000000000000000000001 \
    88 00 CHECKSUM 20000000 fd000000000000000000000000000005 02 01 525400123456";
/// Computed apart from this program, by RFC 4443's pseudo-header.
const ADVERT_CHECKSUM: &str = "d5d7";

#[test]
fn golden_frames_in_order_and_padded() {
    let list = frames(&nic());
    let advert = ADVERT.replace("CHECKSUM", ADVERT_CHECKSUM);
    let golden = [padded(RARP, 60), padded(ARP_REQUEST, 60), padded(ARP_REPLY, 60), unhex(&advert)];
    assert_eq!(list.iter().map(|f| f.bytes.clone()).collect::<Vec<_>>(), golden);
    assert_eq!(golden[3].len(), 86);
    let words: Vec<&str> = list.iter().map(|f| f.words.as_str()).collect();
    assert_eq!(
        words,
        [
            "RARP request from 52:54:00:12:34:56",
            "gratuitous ARP request 10.0.0.5 from 52:54:00:12:34:56",
            "gratuitous ARP reply 10.0.0.5 from 52:54:00:12:34:56",
            "unsolicited neighbour advertisement fd00::5 from 52:54:00:12:34:56",
        ]
    );
}

#[test]
fn tagged_frames_are_the_untagged_ones_with_four_bytes_more() {
    let tagged = frames(&Nic { vlan: Some(0xabc), ..nic() });
    for (tagged, plain) in tagged.iter().zip(frames(&nic())) {
        assert_eq!(tagged.bytes[12..16], [0x81, 0x00, 0x0a, 0xbc]);
        assert_eq!([&tagged.bytes[..12], &tagged.bytes[16..]].concat(), plain.bytes);
        assert!(tagged.bytes.len() >= 64, "still long enough without its tag");
        assert_eq!(tagged.words, format!("{} vlan 2748", plain.words));
    }
    assert_eq!(tagged.len(), 4);
}

#[test]
fn nothing_wrong_is_announced() {
    for bad in [Nic { mac: [0; 6], ..nic() }, Nic { mac: [0xff; 6], ..nic() }, Nic { vlan: Some(4095), ..nic() }] {
        assert_eq!(frames(&bad), []);
        assert_eq!(bad.problems().len(), 1);
    }
    let unknown = frames(&Nic { addresses: vec![], ..nic() });
    assert_eq!(unknown.iter().map(|f| f.kind).collect::<Vec<_>>(), [FrameKind::Rarp]);
    let mapped = Nic { addresses: vec!["::ffff:10.0.0.5".parse().unwrap()], ..nic() };
    assert_eq!(frames(&mapped)[1].kind, FrameKind::ArpRequest(Ipv4Addr::new(10, 0, 0, 5)));
}

#[test]
fn a_router_says_that_it_is_one() {
    let frame = frames(&Nic { ipv6_router: true, ..nic() }).pop().unwrap();
    assert_eq!(frame.bytes[14 + 40 + 4], 0xa0);
}

fn check_arp(body: &[u8], mac: [u8; 6], address: Ipv4Addr, wanted: ArpOperation) {
    let ArpRepr::EthernetIpv4 { operation, source_hardware_addr, source_protocol_addr, target_protocol_addr, .. } =
        ArpRepr::parse(&ArpPacket::new_checked(body).unwrap()).unwrap()
    else {
        panic!("not ARP for IPv4 over Ethernet");
    };
    assert_eq!((operation, source_hardware_addr), (wanted, EthernetAddress(mac)));
    assert_eq!((source_protocol_addr, target_protocol_addr), (address, address));
}

fn check_advert(body: &[u8], mac: [u8; 6], address: Ipv6Addr) {
    let ip = Ipv6Packet::new_checked(body).unwrap();
    assert_eq!((ip.hop_limit(), ip.src_addr()), (255, address));
    let packet = Icmpv6Packet::new_checked(ip.payload()).unwrap();
    // Fails on a wrong checksum.
    let repr = Icmpv6Repr::parse(&ip.src_addr(), &ip.dst_addr(), &packet, &ChecksumCapabilities::default()).unwrap();
    let Icmpv6Repr::Ndisc(NdiscRepr::NeighborAdvert { flags, target_addr, lladdr }) = repr else {
        panic!("not a neighbour advertisement");
    };
    assert_eq!((flags, target_addr), (NdiscNeighborFlags::OVERRIDE, address));
    assert_eq!(lladdr.unwrap().as_bytes(), mac);
}

proptest! {
    #[test]
    fn every_frame_of_every_card_reads_back(
        mut mac in any::<[u8; 6]>(),
        vlan in prop::option::of(1u16..=4094),
        addresses in prop::collection::vec(any::<IpAddr>(), 0..8),
    ) {
        mac[0] = mac[0] & 0xfe | 0x02;
        let nic = Nic { mac, vlan, addresses, ..Nic::default() };
        for frame in frames(&nic) {
            let least = if vlan.is_some() { 64 } else { 60 };
            prop_assert!(frame.bytes.len() >= least);
            let ethernet = EthernetFrame::new_checked(&frame.bytes[..]).unwrap();
            prop_assert_eq!(ethernet.src_addr(), EthernetAddress(mac));
            let (ethertype, body) = match vlan {
                None => (ethernet.ethertype(), ethernet.payload()),
                Some(vlan) => {
                    prop_assert_eq!(ethernet.ethertype(), EthernetProtocol::Unknown(0x8100));
                    let payload = ethernet.payload();
                    prop_assert_eq!(u16::from_be_bytes([payload[0], payload[1]]), vlan);
                    (EthernetProtocol::from(u16::from_be_bytes([payload[2], payload[3]])), &payload[4..])
                }
            };
            match frame.kind {
                FrameKind::ArpRequest(address) => {
                    prop_assert_eq!((ethertype, ethernet.dst_addr()), (EthernetProtocol::Arp, EthernetAddress::BROADCAST));
                    check_arp(body, mac, address, ArpOperation::Request);
                }
                FrameKind::ArpReply(address) => {
                    prop_assert_eq!((ethertype, ethernet.dst_addr()), (EthernetProtocol::Arp, EthernetAddress::BROADCAST));
                    check_arp(body, mac, address, ArpOperation::Reply);
                }
                FrameKind::NeighborAdvert(address) => {
                    prop_assert_eq!(ethertype, EthernetProtocol::Ipv6);
                    prop_assert_eq!(ethernet.dst_addr(), EthernetAddress([0x33, 0x33, 0, 0, 0, 1]));
                    check_advert(body, mac, address);
                }
                FrameKind::Rarp => {
                    prop_assert_eq!((ethertype, ethernet.dst_addr()), (EthernetProtocol::Unknown(0x8035), EthernetAddress::BROADCAST));
                    check_arp(body, mac, Ipv4Addr::UNSPECIFIED, ArpOperation::Unknown(3));
                }
            }
        }
    }
}
