//! Which addresses a guest uses, learned from the frames on its port. Pure: frames in, addresses out; the socket is in `watch`.
//!
//! Only what claims an address counts: ARP, neighbour discovery and DHCP. The source of an ordinary packet proves nothing,
//! because a guest that routes sends packets with anybody's. A guest may claim any address, as it may on its network anyway;
//! what is bounded is how many: [`LEARNED_MAX`].

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use smoltcp::phy::ChecksumCapabilities;
use smoltcp::wire::{
    ArpPacket, ArpRepr, DhcpMessageType, DhcpPacket, DhcpRepr, EthernetAddress, EthernetFrame, EthernetProtocol, Icmpv6Packet,
    Icmpv6Repr, IpProtocol, Ipv4Packet, Ipv6Packet, NdiscRepr, UdpPacket,
};

use crate::nic::can_announce;

/// The most addresses that are learned of one card; the one that was not seen for longest makes room.
pub const LEARNED_MAX: usize = 16;

const DHCP_SERVER_PORT: u16 = 67;
const DHCP_CLIENT_PORT: u16 = 68;
/// Neighbour discovery with any other hop limit has crossed a router, and nobody believes it.
const HOP_LIMIT: u8 = 255;

/// Which way a frame passes the guest's port.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Way {
    /// The guest sent it.
    FromGuest,
    /// It goes to the guest.
    ToGuest,
}

/// What a frame says of one address.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Claim {
    /// The guest has it.
    Has(IpAddr),
    /// The guest does not have it: it gave it back, or another machine says that it has it.
    Lost(IpAddr),
}

/// The addresses of one card, as far as they were seen.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Learned {
    /// The one seen last is the last.
    addresses: Vec<IpAddr>,
}

impl Learned {
    /// Begins with addresses that were learned elsewhere, the one seen last first.
    pub fn new(known: &[IpAddr]) -> Learned {
        let mut learned = Learned::default();
        for address in known.iter().rev() {
            learned.apply(Claim::Has(*address));
        }
        learned
    }

    /// Takes a frame of the card with `mac`.
    pub fn frame(&mut self, mac: [u8; 6], way: Way, frame: &[u8]) {
        if let Some(claim) = claim(mac, way, frame) {
            self.apply(claim);
        }
    }

    fn apply(&mut self, claim: Claim) {
        let (Claim::Has(address) | Claim::Lost(address)) = claim;
        let address = address.to_canonical();
        self.addresses.retain(|known| *known != address);
        if matches!(claim, Claim::Has(_)) && can_announce(&address) {
            self.addresses.push(address);
        }
        if self.addresses.len() > LEARNED_MAX {
            self.addresses.remove(0);
        }
    }

    /// The addresses, the one seen last first.
    pub fn addresses(&self) -> Vec<IpAddr> {
        self.addresses.iter().rev().copied().collect()
    }
}

/// What a frame says of an address of the card with `mac`; nothing in nearly all frames, whatever their bytes are.
pub fn claim(mac: [u8; 6], way: Way, frame: &[u8]) -> Option<Claim> {
    let ethernet = EthernetFrame::new_checked(frame).ok()?;
    let own = ethernet.src_addr() == EthernetAddress(mac);
    // What the guest sends with another source is of a machine behind it; what comes to it with its own is this host's
    // announcement of it.
    let from_guest = way == Way::FromGuest;
    if from_guest != own {
        return None;
    }
    match ethernet.ethertype() {
        EthernetProtocol::Arp => arp(mac, from_guest, ethernet.payload()),
        EthernetProtocol::Ipv6 => neighbour(from_guest, ethernet.payload()),
        EthernetProtocol::Ipv4 => dhcp(mac, from_guest, ethernet.payload()),
        _ => None,
    }
}

/// The sender of an ARP packet has its address, whether it asks, answers or announces. A probe (RFC 5227) has no sender.
fn arp(mac: [u8; 6], from_guest: bool, bytes: &[u8]) -> Option<Claim> {
    let ArpRepr::EthernetIpv4 { source_hardware_addr, source_protocol_addr, .. } =
        ArpRepr::parse(&ArpPacket::new_checked(bytes).ok()?).ok()?
    else {
        return None;
    };
    let address = known(source_protocol_addr)?;
    match (from_guest, source_hardware_addr == EthernetAddress(mac)) {
        (true, true) => Some(Claim::Has(address)),
        (false, false) => Some(Claim::Lost(address)),
        // One who speaks for another: nothing is believed.
        _ => None,
    }
}

fn known(address: Ipv4Addr) -> Option<IpAddr> {
    (!address.is_unspecified()).then_some(IpAddr::V4(address))
}

/// Neighbour discovery: the sender has its address, and the target of an advertisement; who asks without an address of its own
/// (duplicate address detection) is about to have the target.
fn neighbour(from_guest: bool, bytes: &[u8]) -> Option<Claim> {
    let ip = Ipv6Packet::new_checked(bytes).ok()?;
    if ip.next_header() != IpProtocol::Icmpv6 || ip.hop_limit() != HOP_LIMIT {
        return None;
    }
    let (from, to) = (ip.src_addr(), ip.dst_addr());
    let icmp = Icmpv6Packet::new_checked(ip.payload()).ok()?;
    let Icmpv6Repr::Ndisc(ndisc) = Icmpv6Repr::parse(&from, &to, &icmp, &ChecksumCapabilities::ignored()).ok()? else {
        return None;
    };
    let sender = (from != Ipv6Addr::UNSPECIFIED).then_some(IpAddr::V6(from));
    match (ndisc, from_guest) {
        (NdiscRepr::NeighborAdvert { target_addr, .. }, true) => Some(Claim::Has(IpAddr::V6(target_addr))),
        (NdiscRepr::NeighborAdvert { target_addr, .. }, false) => Some(Claim::Lost(IpAddr::V6(target_addr))),
        (NdiscRepr::NeighborSolicit { target_addr, .. }, true) => Some(Claim::Has(sender.unwrap_or(IpAddr::V6(target_addr)))),
        (NdiscRepr::RouterSolicit { .. } | NdiscRepr::RouterAdvert { .. }, true) => sender.map(Claim::Has),
        _ => None,
    }
}

/// DHCP: the server's acknowledgement, the client's renewal, and what it gives back. A first request is a wish only: the
/// acknowledgement, or the guest's ARP, follows.
fn dhcp(mac: [u8; 6], from_guest: bool, bytes: &[u8]) -> Option<Claim> {
    let ip = Ipv4Packet::new_checked(bytes).ok()?;
    if ip.next_header() != IpProtocol::Udp || ip.frag_offset() != 0 || ip.more_frags() {
        return None;
    }
    let udp = UdpPacket::new_checked(ip.payload()).ok()?;
    let ports = if from_guest { (DHCP_CLIENT_PORT, DHCP_SERVER_PORT) } else { (DHCP_SERVER_PORT, DHCP_CLIENT_PORT) };
    if (udp.src_port(), udp.dst_port()) != ports {
        return None;
    }
    let packet = DhcpPacket::new_checked(udp.payload()).ok()?;
    let dhcp = DhcpRepr::parse(&packet).ok()?;
    if dhcp.client_hardware_address != EthernetAddress(mac) {
        return None;
    }
    match (dhcp.message_type, from_guest) {
        (DhcpMessageType::Ack, false) => known(dhcp.your_ip).map(Claim::Has),
        (DhcpMessageType::Request, true) => known(dhcp.client_ip).map(Claim::Has),
        (DhcpMessageType::Release, true) => known(dhcp.client_ip).map(Claim::Lost),
        (DhcpMessageType::Decline, true) => dhcp.requested_ip.and_then(known).map(Claim::Lost),
        _ => None,
    }
}
