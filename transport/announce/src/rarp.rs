//! The RARP body (RFC 903) by which hypervisors announce a MAC. Nobody answers it: its use is its source address.

use std::net::Ipv4Addr;

use smoltcp::wire::{ArpOperation, ArpPacket, ArpRepr, EthernetAddress, EthernetProtocol};

use crate::frame::Body;

const ETHERTYPE_RARP: u16 = 0x8035;
const OPERATION_REQUEST_REVERSE: u16 = 3;

/// "Which address has `mac`?", asked by `mac` itself.
pub(crate) fn request(mac: EthernetAddress) -> Body {
    let repr = ArpRepr::EthernetIpv4 {
        operation: ArpOperation::Unknown(OPERATION_REQUEST_REVERSE),
        source_hardware_addr: mac,
        source_protocol_addr: Ipv4Addr::UNSPECIFIED,
        target_hardware_addr: mac,
        target_protocol_addr: Ipv4Addr::UNSPECIFIED,
    };
    let mut bytes = vec![0; repr.buffer_len()];
    repr.emit(&mut ArpPacket::new_unchecked(&mut bytes));
    Body { to: EthernetAddress::BROADCAST, ethertype: EthernetProtocol::Unknown(ETHERTYPE_RARP), bytes }
}
