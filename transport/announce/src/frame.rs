//! Ethernet frames: what surrounds each announcement (header, tag, padding), and the list of them. Not the bodies:
//! those are in `arp`, `ndisc` and `rarp`.

use std::fmt;
use std::net::IpAddr;

use smoltcp::wire::{EthernetAddress, EthernetFrame, EthernetProtocol, EthernetRepr};

use crate::{Nic, arp, mac_words, ndisc, rarp};

/// Bytes of the shortest Ethernet frame, the checksum apart. A tagged frame is 4 longer, so that it is still long
/// enough for the switch that takes the tag off.
pub const FRAME_BYTES_MIN: usize = 60;

const ETHERNET_HEADER_BYTES: usize = 14;
const ETHERTYPE_OFFSET: usize = 12;
const ETHERTYPE_VLAN: u16 = 0x8100;

/// What a frame says, and about which address.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum FrameKind {
    /// Gratuitous ARP in request form (RFC 5227's announcement; what Linux, BSD and most switches expect).
    ArpRequest(std::net::Ipv4Addr),
    /// Gratuitous ARP in reply form, for the neighbours that ignore the request form.
    ArpReply(std::net::Ipv4Addr),
    /// Unsolicited neighbour advertisement with the override flag (RFC 4861, section 7.2.6).
    NeighborAdvert(std::net::Ipv6Addr),
    /// Reverse ARP request: teaches switches the port of a MAC whose addresses nobody knows.
    Rarp,
}

/// One frame, ready to be sent.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Frame {
    /// What it says.
    pub kind: FrameKind,
    /// The whole frame from the destination's MAC on, without the checksum; at least [`FRAME_BYTES_MIN`].
    pub bytes: Vec<u8>,
    /// The same for people: `gratuitous ARP request 10.0.0.5 from 52:54:00:12:34:56 vlan 7`.
    pub words: String,
}

impl fmt::Display for Frame {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.words)
    }
}

/// The frames of one round, in the order in which they are sent: RARP first, because it alone moves the guest's
/// port in every switch, then per address the ARP request, the ARP reply, or the neighbour advertisement.
///
/// Addresses that [`Nic::problems`] names are left out; a card with a bad MAC or VLAN gives no frame.
pub fn frames(nic: &Nic) -> Vec<Frame> {
    if nic.problem_of_card().is_some() {
        return Vec::new();
    }
    let mac = EthernetAddress(nic.mac);
    let mut list = vec![frame(nic, FrameKind::Rarp, rarp::request(mac))];
    for address in nic.announceable() {
        match address {
            IpAddr::V4(v4) => {
                list.push(frame(nic, FrameKind::ArpRequest(v4), arp::request(mac, v4)));
                list.push(frame(nic, FrameKind::ArpReply(v4), arp::reply(mac, v4)));
            }
            IpAddr::V6(v6) => {
                list.push(frame(nic, FrameKind::NeighborAdvert(v6), ndisc::advert(mac, v6, nic.ipv6_router)));
            }
        }
    }
    list
}

/// What a body needs around it.
pub(crate) struct Body {
    pub(crate) to: EthernetAddress,
    pub(crate) ethertype: EthernetProtocol,
    pub(crate) bytes: Vec<u8>,
}

fn frame(nic: &Nic, kind: FrameKind, body: Body) -> Frame {
    Frame { kind, bytes: whole(EthernetAddress(nic.mac), nic.vlan, &body), words: words(nic, kind) }
}

/// A body with its header, tag and padding.
pub(crate) fn whole(from: EthernetAddress, vlan: Option<u16>, body: &Body) -> Vec<u8> {
    let header = EthernetRepr { src_addr: from, dst_addr: body.to, ethertype: body.ethertype };
    let mut bytes = vec![0; ETHERNET_HEADER_BYTES];
    header.emit(&mut EthernetFrame::new_unchecked(&mut bytes));
    bytes.extend_from_slice(&body.bytes);
    bytes.resize(bytes.len().max(FRAME_BYTES_MIN), 0);
    if let Some(vlan) = vlan {
        // Priority 0, not drop-eligible; `problem_of_card` has checked the 12 bits.
        let [e0, e1] = ETHERTYPE_VLAN.to_be_bytes();
        let [v0, v1] = vlan.to_be_bytes();
        bytes.splice(ETHERTYPE_OFFSET..ETHERTYPE_OFFSET, [e0, e1, v0, v1]);
    }
    bytes
}

fn words(nic: &Nic, kind: FrameKind) -> String {
    let mac = mac_words(nic.mac);
    let what = match kind {
        FrameKind::ArpRequest(address) => format!("gratuitous ARP request {address} from {mac}"),
        FrameKind::ArpReply(address) => format!("gratuitous ARP reply {address} from {mac}"),
        FrameKind::NeighborAdvert(address) => format!("unsolicited neighbour advertisement {address} from {mac}"),
        FrameKind::Rarp => format!("RARP request from {mac}"),
    };
    match nic.vlan {
        Some(vlan) => format!("{what} vlan {vlan}"),
        None => what,
    }
}
