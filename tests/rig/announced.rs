//! What the frames of a capture announce about a guest, in words. Which of them should be there is the test's affair.

use crate::capture::Frame;
use anyhow::{Context, Result, ensure};
use smoltcp::wire::{
    ArpOperation, ArpPacket, ArpRepr, EthernetAddress, EthernetFrame, EthernetProtocol, Icmpv6Packet, Icmpv6Repr, IpAddress,
    IpProtocol, Ipv6Packet, NdiscRepr,
};
use std::time::Instant;

const RARP: u16 = 0x8035;

/// An announcement in words: "request 10.77.0.101", "reply 10.77.0.101", "na fd00:77::65", "rarp".
fn words_of(frame: &Frame, mac: [u8; 6]) -> Result<Option<String>> {
    let ethernet = EthernetFrame::new_checked(frame.bytes.as_slice()).context("a frame")?;
    if ethernet.src_addr() != EthernetAddress(mac) {
        return Ok(None);
    }
    Ok(match ethernet.ethertype() {
        EthernetProtocol::Arp => {
            let ArpRepr::EthernetIpv4 { operation, source_hardware_addr, source_protocol_addr, target_protocol_addr, .. } =
                ArpRepr::parse(&ArpPacket::new_checked(ethernet.payload()).context("ARP")?).context("ARP")?
            else {
                return Ok(None);
            };
            // The guest's own answers to questions are no announcements.
            if source_protocol_addr != target_protocol_addr {
                return Ok(None);
            }
            ensure!(source_hardware_addr == EthernetAddress(mac), "an announcement for another MAC");
            ensure!(ethernet.dst_addr().is_broadcast(), "a gratuitous ARP that is no broadcast");
            let kind = if operation == ArpOperation::Request { "request" } else { "reply" };
            Some(format!("{kind} {source_protocol_addr}"))
        }
        EthernetProtocol::Ipv6 => {
            let packet = Ipv6Packet::new_checked(ethernet.payload()).context("IPv6")?;
            if packet.next_header() != IpProtocol::Icmpv6 {
                return Ok(None);
            }
            let (from, to) = (packet.src_addr(), packet.dst_addr());
            let icmp = Icmpv6Packet::new_checked(packet.payload()).context("ICMPv6")?;
            let checked = &smoltcp::phy::ChecksumCapabilities::default();
            match Icmpv6Repr::parse(&from, &to, &icmp, checked).context("ICMPv6")? {
                Icmpv6Repr::Ndisc(NdiscRepr::NeighborAdvert { target_addr, lladdr, flags }) => {
                    // A guest's own answer to a question, or to nobody's when it finds itself alone with an address.
                    if !to.is_multicast() {
                        return Ok(None);
                    }
                    ensure!(packet.hop_limit() == 255, "hop limit {}", packet.hop_limit());
                    ensure!(flags.bits() & 0x20 != 0, "an NA that does not override");
                    ensure!(lladdr == Some(EthernetAddress(mac).into()), "an NA with {lladdr:?}");
                    Some(format!("na {}", IpAddress::Ipv6(target_addr)))
                }
                _ => None,
            }
        }
        EthernetProtocol::Unknown(RARP) => {
            ensure!(frame.bytes.get(20..22) == Some(&[0, 3]), "a RARP that is no request");
            ensure!(frame.bytes.get(22..28) == Some(&mac) && frame.bytes.get(32..38) == Some(&mac), "a RARP for another MAC");
            Some("rarp".into())
        }
        _ => None,
    })
}

/// One announcement.
#[derive(Debug, Clone)]
pub struct Announced {
    /// When it was seen.
    pub at: Instant,
    /// What it says: "request 10.77.0.101", "reply 10.77.0.101", "na fd00:77::65", "rarp".
    pub words: String,
    /// Bytes of the frame.
    pub length: usize,
}

/// What was announced for a MAC address by frames that came in at a port of the switch, in order; by its host or by the guest itself.
///
/// # Errors
/// A frame cannot be read, or announces what it must not.
pub fn announced(frames: &[Frame], mac: [u8; 6], port: &str) -> Result<Vec<Announced>> {
    let mut found = Vec::new();
    for frame in frames.iter().filter(|f| f.interface == port && !f.outgoing) {
        if let Some(words) = words_of(frame, mac)? {
            found.push(Announced { at: frame.at, words, length: frame.bytes.len() });
        }
    }
    Ok(found)
}
