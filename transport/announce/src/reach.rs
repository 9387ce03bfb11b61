//! Asking a guest whether it answers in its new place, from the bridge that its port is on, until it does. It changes nobody's
//! tables but the local bridge's, and tells nobody where the guest is: that is the announcer's.

use std::net::IpAddr;
use std::os::fd::AsFd;
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::ifaddrs::getifaddrs;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use smoltcp::wire::EthernetAddress;

use crate::frame::whole;
use crate::learn::{Claim, Way, claim};
use crate::socket::{FRAME_BYTES_MAX, PacketSocket};
use crate::{Nic, arp, fdb, ndisc};

/// The most addresses that are asked for side by side: any of them is an answer.
const ASKED_MAX: usize = 4;

/// The first answer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Reached {
    /// The address that answered.
    pub address: IpAddr,
    /// When it was heard.
    pub at: Instant,
}

/// First and longest time between two questions; each is twice the one before. A question that the guest does not take yet waits in
/// its port's queue and is answered when it does, so asking more often would measure nothing better: it would only give a guest that
/// has just been resumed hundreds of answers to send.
const PAUSE: (Duration, Duration) = (Duration::from_millis(10), Duration::from_millis(640));

/// How a question for `address` is called: "ARP probe of 10.0.0.5 from br0".
pub fn reach_words(nic: &Nic, address: IpAddr) -> String {
    let kind = if address.is_ipv4() { "ARP probe" } else { "neighbour solicitation" };
    let vlan = nic.vlan.map_or(String::new(), |vlan| format!(" in VLAN {vlan}"));
    format!("{kind} of {address} from {}{vlan}", nic.interface)
}

/// Asks for the card's first addresses until one answers or `patience` is over. Blocks its thread.
///
/// # Errors
/// In words: nothing to ask for, no answer in time, or the questions cannot be sent.
pub fn reach(nic: &Nic, patience: Duration) -> Result<Reached, String> {
    let (begun, name) = (Instant::now(), &nic.interface);
    let addresses: Vec<IpAddr> = nic.announceable().take(ASKED_MAX).collect();
    let Some(first) = addresses.first().filter(|_| nic.problem_of_card().is_none()) else {
        return Err("no address of the guest is known".to_owned());
    };
    let socket = PacketSocket::listen(name).map_err(|error| format!("interface {name:?}: {error}"))?;
    let questions = questions(nic, &addresses)?;
    if let Some(port) = &nic.port {
        // Or the bridge would send the question to where the guest used to be. The announcer says what is wrong with it.
        let _ = fdb::learn(nic.mac, port);
    }
    let (mut next, mut pause, mut sent) = (begun, PAUSE.0, Ok(()));
    loop {
        let now = Instant::now();
        let elapsed = now.duration_since(begun);
        if elapsed >= patience {
            let why = sent.err().map_or(String::new(), |error: String| format!("; {error}"));
            let words = reach_words(nic, *first);
            return Err(format!("no answer to {words} within {} ms{why}", patience.as_millis()));
        }
        if now >= next {
            sent = send(&socket, name, &questions);
            next = now + pause;
            pause = (pause * 2).min(PAUSE.1);
        }
        let wait = next.duration_since(now).min(patience - elapsed).as_millis();
        let wait = u16::try_from(wait).unwrap_or(u16::MAX).max(1);
        let mut fds = [PollFd::new(socket.as_fd(), PollFlags::POLLIN)];
        match poll(&mut fds, PollTimeout::from(wait)) {
            Ok(_) | Err(Errno::EINTR) => {}
            Err(error) => return Err(format!("waiting for an answer on {name} failed: {error}")),
        }
        if let Some(address) = heard(&socket, nic.mac, &addresses) {
            return Ok(Reached { address, at: Instant::now() });
        }
    }
}

/// One frame for each address, from the interface's own MAC. To the guest alone where its port is known, or else to all.
fn questions(nic: &Nic, addresses: &[IpAddr]) -> Result<Vec<Vec<u8>>, String> {
    let own = mac_of(&nic.interface).ok_or_else(|| format!("interface {:?} has no MAC address", nic.interface))?;
    let guest = nic.port.is_some().then_some(EthernetAddress(nic.mac));
    let body = |address: &IpAddr| match address {
        IpAddr::V4(v4) => arp::probe(own, guest.unwrap_or(EthernetAddress::BROADCAST), *v4),
        IpAddr::V6(v6) => ndisc::probe(guest, *v6),
    };
    Ok(addresses.iter().map(|address| whole(own, nic.vlan, &body(address))).collect())
}

fn mac_of(interface: &str) -> Option<EthernetAddress> {
    let all = getifaddrs().ok()?;
    let of_it = all.filter(|one| one.interface_name == interface);
    let mac = of_it.filter_map(|one| one.address?.as_link_addr().and_then(|link| link.addr())).next();
    mac.map(EthernetAddress)
}

fn send(socket: &PacketSocket, name: &str, questions: &[Vec<u8>]) -> Result<(), String> {
    let interface = socket.interface(name).map_err(|error| format!("interface {name:?}: {error}"))?;
    questions.iter().try_for_each(|frame| socket.send(interface, frame).map_err(|error| format!("interface {name:?}: {error}")))
}

/// The address that a frame of the guest claims, if it is one that was asked for.
fn heard(socket: &PacketSocket, mac: [u8; 6], addresses: &[IpAddr]) -> Option<IpAddr> {
    let mut buffer = [0; FRAME_BYTES_MAX];
    while let Ok((bytes, outgoing)) = socket.receive(&mut buffer) {
        let frame = buffer.get(..bytes).unwrap_or_default();
        // What this host sends is its own announcement, with the guest's MAC.
        let Some(Claim::Has(address)) = claim(mac, Way::FromGuest, frame).filter(|_| !outgoing) else { continue };
        if addresses.contains(&address) {
            return Some(address);
        }
    }
    None
}
