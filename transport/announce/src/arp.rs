//! ARP bodies: gratuitous ones in request and in reply form, and the probe (RFC 826, RFC 5227). Not an ARP implementation.

use std::net::Ipv4Addr;

use smoltcp::wire::{ArpOperation, ArpPacket, ArpRepr, EthernetAddress, EthernetProtocol};

use crate::frame::Body;

/// "Who has `address`? Tell `address`": to everybody, the target's MAC left zero as RFC 5227 wants it.
pub(crate) fn request(mac: EthernetAddress, address: Ipv4Addr) -> Body {
    body(mac, address, ArpOperation::Request, EthernetAddress([0; 6]))
}

/// "`address` is at `mac`", to everybody and to nobody in particular.
pub(crate) fn reply(mac: EthernetAddress, address: Ipv4Addr) -> Body {
    body(mac, address, ArpOperation::Reply, EthernetAddress::BROADCAST)
}

/// "Who has `address`?", asked by `from`, who has no address: nobody's tables change by it.
pub(crate) fn probe(from: EthernetAddress, to: EthernetAddress, address: Ipv4Addr) -> Body {
    let none = EthernetAddress([0; 6]);
    emit(
        to,
        &ArpRepr::EthernetIpv4 {
            operation: ArpOperation::Request,
            source_hardware_addr: from,
            source_protocol_addr: Ipv4Addr::UNSPECIFIED,
            target_hardware_addr: none,
            target_protocol_addr: address,
        },
    )
}

fn body(mac: EthernetAddress, address: Ipv4Addr, operation: ArpOperation, target: EthernetAddress) -> Body {
    let repr = ArpRepr::EthernetIpv4 {
        operation,
        source_hardware_addr: mac,
        source_protocol_addr: address,
        target_hardware_addr: target,
        target_protocol_addr: address,
    };
    emit(EthernetAddress::BROADCAST, &repr)
}

fn emit(to: EthernetAddress, repr: &ArpRepr) -> Body {
    let mut bytes = vec![0; repr.buffer_len()];
    repr.emit(&mut ArpPacket::new_unchecked(&mut bytes));
    Body { to, ethertype: EthernetProtocol::Arp, bytes }
}
