//! What the network is told when a guest has moved: frames at the switch, their content and order, and never before the commit.
#![allow(clippy::panic, clippy::unwrap_used, clippy::expect_used, missing_docs, unreachable_pub)]

use rig::capture::Frame;
use rig::process::wait_for;
use rig::{AgentConfig, Context, GuestSpec, Result, ensure, with_lab};
use smoltcp::wire::{
    ArpOperation, ArpPacket, ArpRepr, EthernetAddress, EthernetFrame, EthernetProtocol, Icmpv6Packet, Icmpv6Repr, IpAddress,
    Ipv6Packet, NdiscRepr,
};
use std::time::{Duration, Instant};

const RARP: u16 = 0x8035;
/// The schedule of these tests, in ms after the frame before; the first goes out at once.
const SCHEDULE: &str = "[50, 100, 150]";

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
            ensure!(packet.hop_limit() == 255, "hop limit {}", packet.hop_limit());
            let (from, to) = (packet.src_addr(), packet.dst_addr());
            let icmp = Icmpv6Packet::new_checked(packet.payload()).context("ICMPv6")?;
            let checked = &smoltcp::phy::ChecksumCapabilities::default();
            match Icmpv6Repr::parse(&from, &to, &icmp, checked).context("ICMPv6")? {
                Icmpv6Repr::Ndisc(NdiscRepr::NeighborAdvert { target_addr, lladdr, flags }) => {
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

fn mac_of(guest: &GuestSpec) -> [u8; 6] {
    [0x52, 0x54, 0, 0x77, 0, guest.number]
}

/// The announcements that came in at a port of the switch, in order.
fn announced(frames: &[Frame], guest: &GuestSpec, port: &str) -> Result<Vec<(Instant, String)>> {
    let mut found = Vec::new();
    for frame in frames.iter().filter(|f| f.interface == port && !f.outgoing) {
        if let Some(words) = words_of(frame, mac_of(guest))? {
            ensure!(frame.bytes.len() >= 60, "a frame of {} bytes", frame.bytes.len());
            found.push((frame.at, words));
        }
    }
    Ok(found)
}

#[test]
fn the_network_is_told_after_the_commit_and_by_the_schedule() {
    with_lab(AgentConfig::default().migration("announce_schedule_ms", SCHEDULE), |lab| {
        let guest = GuestSpec::new("web", 1);
        lab.guest(&guest)?;
        let probe = lab.probe(&guest)?;
        let capture = lab.capture()?;
        wait_for(Duration::from_secs(10), "answers", || Ok((probe.received() >= 10).then_some(())))?;
        let report = lab.a.migrate_well("web", &lab.b, &["--bandwidth", "30MB/s"])?;
        std::thread::sleep(Duration::from_millis(1000));
        let frames = capture.frames();
        ensure!(announced(&frames, &guest, "p-a")?.is_empty(), "the source announced");
        let seen = announced(&frames, &guest, "p-b")?;
        let round = [
            format!("request {}", guest.ip()),
            format!("reply {}", guest.ip()),
            format!("na {}", guest.ip6()),
            "rarp".to_owned(),
        ];
        let words: Vec<&str> = seen.iter().map(|(_, words)| words.as_str()).collect();
        ensure!(words.len() == 4 * round.len(), "four rounds of {round:?} were wanted: {words:?}");
        for chunk in words.chunks(round.len()) {
            ensure!(round.iter().all(|w| chunk.contains(&w.as_str())), "a round without one of {round:?}: {chunk:?}");
        }
        let starts: Vec<f64> =
            seen.iter().step_by(round.len()).map(|(at, _)| at.duration_since(seen[0].0).as_secs_f64() * 1e3).collect();
        for (start, due) in starts.iter().zip([0.0, 50.0, 150.0, 300.0]) {
            ensure!((due - 5.0..due + 80.0).contains(start), "rounds at {starts:?} ms");
        }
        // Nothing of the guest comes from the source once the destination has spoken for it.
        let from_source = frames.iter().filter(|f| f.interface == "p-a" && !f.outgoing && f.sender() == Some(mac_of(&guest)));
        let last_at_source = from_source.map(|f| f.at).max().context("the guest was never heard at the source")?;
        ensure!(seen[0].0 > last_at_source, "the destination announced {:?} too early", last_at_source - seen[0].0);
        let listed = report["announcements"].to_string();
        for words in ["ARP", "RARP", &guest.ip().to_string(), &guest.ip6()] {
            ensure!(listed.contains(words), "{words} is not in the report: {listed}");
        }
        lab.guest_is_on(&guest, &lab.b, &lab.a)
    });
}

#[test]
fn the_switch_learns_the_new_port() {
    with_lab(AgentConfig::default(), |lab| {
        let guest = GuestSpec::new("web", 1);
        lab.guest(&guest)?;
        ensure!(lab.port_of(&guest)?.as_deref() == Some("p-a"), "before: {:?}", lab.port_of(&guest)?);
        // Nobody talks to the guest: only the announcements can move its address.
        lab.a.migrate_well("web", &lab.b, &[])?;
        let moved = || Ok((lab.port_of(&guest)?.as_deref() == Some("p-b")).then_some(()));
        wait_for(Duration::from_secs(1), "the MAC on p-b", moved)?;
        let tap = lab.b.netns.taps()?;
        let local = rig::net::fdb_port(&lab.b.netns, "br0", &guest.mac())?;
        ensure!(local.as_ref() == tap.first(), "b's own bridge has it on {local:?}, the TAP is {tap:?}");
        lab.guest_is_on(&guest, &lab.b, &lab.a)
    });
}

#[test]
fn a_migration_that_fails_announces_nothing() {
    with_lab(AgentConfig::default(), |lab| {
        let guest = GuestSpec::new("web", 1).dirty("max", "64M");
        lab.guest(&guest)?;
        let capture = lab.capture()?;
        let options = ["--bandwidth", "60MB/s", "--downtime", "10ms", "--on-no-convergence", "abort"];
        lab.a.migrate("web", &lab.b, &options)?.expect_code(3)?;
        std::thread::sleep(Duration::from_millis(600));
        let frames = capture.frames();
        ensure!(announced(&frames, &guest, "p-b")?.is_empty(), "announced at b: {:?}", announced(&frames, &guest, "p-b")?);
        let from_b = frames.iter().filter(|f| f.interface == "p-b" && !f.outgoing && f.sender() == Some(mac_of(&guest)));
        ensure!(from_b.count() == 0, "b sent frames with the guest's address");
        lab.unharmed(&guest)
    });
}

#[test]
fn announce_repeats_it() {
    with_lab(AgentConfig::default(), |lab| {
        let guest = GuestSpec::new("web", 1);
        lab.guest(&guest)?;
        lab.a.migrate_well("web", &lab.b, &[])?;
        std::thread::sleep(Duration::from_millis(1600));
        let capture = lab.capture()?;
        let output = lab.b.limosa(&["--json", "announce", "web"])?.expect_code(0)?;
        ensure!(output.all().contains(&guest.ip().to_string()), "{output:?}");
        let seen = || Ok(announced(&capture.frames(), &guest, "p-b")?.iter().any(|(_, w)| w == "rarp").then_some(()));
        wait_for(Duration::from_secs(3), "the announcement at the switch", seen)?;
        lab.a.limosa(&["announce", "web"])?.expect_code(1)?;
        lab.guest_is_on(&guest, &lab.b, &lab.a)
    });
}
