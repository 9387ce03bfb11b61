//! The unsolicited neighbour advertisement (RFC 4861, section 7.2.6) and the solicitation without a sender, each with its IPv6
//! header. Not neighbour discovery.

use std::net::Ipv6Addr;

use smoltcp::phy::ChecksumCapabilities;
use smoltcp::wire::{
    EthernetAddress, EthernetProtocol, Icmpv6Packet, Icmpv6Repr, IpProtocol, Ipv6Packet, Ipv6Repr, NdiscNeighborFlags, NdiscRepr,
    RawHardwareAddress,
};

use crate::frame::Body;

/// All nodes on the link, and the MAC that this group has on Ethernet (RFC 2464).
const ALL_NODES: Ipv6Addr = Ipv6Addr::new(0xff02, 0, 0, 0, 0, 0, 0, 1);
const ALL_NODES_MAC: EthernetAddress = EthernetAddress([0x33, 0x33, 0, 0, 0, 1]);

/// Receivers drop neighbour discovery with any other hop limit: it would have crossed a router.
const HOP_LIMIT: u8 = 255;

/// "`address` is at `mac`, forget what you knew", from the address itself to all nodes.
pub(crate) fn advert(mac: EthernetAddress, address: Ipv6Addr, router: bool) -> Body {
    let role = if router { NdiscNeighborFlags::ROUTER } else { NdiscNeighborFlags::empty() };
    let icmp = Icmpv6Repr::Ndisc(NdiscRepr::NeighborAdvert {
        flags: NdiscNeighborFlags::OVERRIDE | role,
        target_addr: address,
        lladdr: Some(RawHardwareAddress::from(mac)),
    });
    body(ALL_NODES_MAC, address, ALL_NODES, &icmp)
}

/// "Who has `address`?", in the form of duplicate address detection: whoever has it says so to all nodes. Nobody's tables
/// change by it. `to` may be the MAC of the one who should have it (RFC 6085).
pub(crate) fn probe(to: Option<EthernetAddress>, address: Ipv6Addr) -> Body {
    let icmp = Icmpv6Repr::Ndisc(NdiscRepr::NeighborSolicit { target_addr: address, lladdr: None });
    let [.., a, b, c] = address.octets();
    // The group of all nodes whose address ends like this one, and its MAC.
    let [ab, bc] = [u16::from(a), u16::from_be_bytes([b, c])];
    let group = Ipv6Addr::new(0xff02, 0, 0, 0, 0, 1, 0xff00 | ab, bc);
    body(to.unwrap_or(EthernetAddress([0x33, 0x33, 0xff, a, b, c])), Ipv6Addr::UNSPECIFIED, group, &icmp)
}

fn body(to: EthernetAddress, from: Ipv6Addr, group: Ipv6Addr, icmp: &Icmpv6Repr<'_>) -> Body {
    let ip = Ipv6Repr {
        src_addr: from,
        dst_addr: group,
        next_header: IpProtocol::Icmpv6,
        payload_len: icmp.buffer_len(),
        hop_limit: HOP_LIMIT,
    };
    let mut bytes = vec![0; ip.buffer_len() + icmp.buffer_len()];
    let mut packet = Ipv6Packet::new_unchecked(&mut bytes[..]);
    ip.emit(&mut packet);
    let mut inner = Icmpv6Packet::new_unchecked(packet.payload_mut());
    icmp.emit(&from, &group, &mut inner, &ChecksumCapabilities::default());
    Body { to, ethertype: EthernetProtocol::Ipv6, bytes }
}
