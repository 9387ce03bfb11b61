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
/// its port's queue and is answered when it does, so asking more often, or for all addresses at once, would measure nothing better: it
/// would only give a guest that has just been resumed more to do before its first answer.
const PAUSE: (Duration, Duration) = (Duration::from_millis(10), Duration::from_millis(640));

/// How a question for `address` is called: "ARP probe of 10.0.0.5 from br0".
pub fn reach_words(nic: &Nic, address: IpAddr) -> String {
    let kind = if address.is_ipv4() { "ARP probe" } else { "neighbour solicitation" };
    let vlan = nic.vlan.map_or(String::new(), |vlan| format!(" in VLAN {vlan}"));
    format!("{kind} of {address} from {}{vlan}", nic.interface)
}

/// The questions to one card. Made ahead, so that nothing but asking is left to do once the guest runs.
#[derive(Debug)]
pub struct Questions {
    nic: Nic,
    /// An address, and the frame that asks for it: one each time, in turn.
    frames: Vec<(IpAddr, Vec<u8>)>,
    socket: PacketSocket,
}

impl Questions {
    /// Those for the card's first addresses.
    ///
    /// # Errors
    /// In words: nothing to ask for, no such interface, or no socket.
    pub fn prepare(nic: &Nic) -> Result<Questions, String> {
        let addresses: Vec<IpAddr> = nic.announceable().take(ASKED_MAX).collect();
        if addresses.is_empty() || nic.problem_of_card().is_some() {
            return Err("no address of the guest is known".to_owned());
        }
        let name = &nic.interface;
        let own = mac_of(name).ok_or_else(|| format!("interface {name:?} is not there, or has no MAC address"))?;
        let socket = PacketSocket::filtered().map_err(|error| format!("interface {name:?}: {error}"))?;
        let frames = addresses.iter().map(|address| (*address, question(nic, own, address))).collect();
        Ok(Questions { nic: nic.clone(), frames, socket })
    }

    /// The card.
    pub fn nic(&self) -> &Nic {
        &self.nic
    }

    /// Asks until one address answers or `patience` is over. Blocks its thread.
    ///
    /// # Errors
    /// In words: no answer in time, or the questions cannot be sent.
    pub fn ask(&self, patience: Duration) -> Result<Reached, String> {
        let Questions { nic, frames, socket } = self;
        let (begun, name) = (Instant::now(), &nic.interface);
        socket.bind(name).map_err(|error| format!("interface {name:?}: {error}"))?;
        if let Some(port) = &nic.port {
            // Or the bridge would send the question to where the guest used to be. The announcer says what is wrong with it.
            let _ = fdb::learn(nic.mac, port);
        }
        let mut turns = frames.iter().cycle();
        let (mut next, mut pause, mut sent) = (begun, PAUSE.0, Ok(()));
        loop {
            let now = Instant::now();
            let elapsed = now.duration_since(begun);
            if elapsed >= patience {
                let why = sent.err().map_or(String::new(), |error: String| format!("; {error}"));
                let words = frames.first().map_or(String::new(), |(first, _)| reach_words(nic, *first));
                return Err(format!("no answer to {words} within {} ms{why}", patience.as_millis()));
            }
            if now >= next {
                sent = turns.next().map_or(Ok(()), |(_, frame)| send(socket, name, frame));
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
            if let Some(address) = heard(socket, nic.mac, frames) {
                return Ok(Reached { address, at: Instant::now() });
            }
        }
    }
}

/// From the interface's own MAC; to the guest alone where its port is known, or else to all.
fn question(nic: &Nic, own: EthernetAddress, address: &IpAddr) -> Vec<u8> {
    let guest = nic.port.is_some().then_some(EthernetAddress(nic.mac));
    let body = match address {
        IpAddr::V4(v4) => arp::probe(own, guest.unwrap_or(EthernetAddress::BROADCAST), *v4),
        IpAddr::V6(v6) => ndisc::probe(guest, *v6),
    };
    whole(own, nic.vlan, &body)
}

fn mac_of(interface: &str) -> Option<EthernetAddress> {
    let all = getifaddrs().ok()?;
    let of_it = all.filter(|one| one.interface_name == interface);
    let mac = of_it.filter_map(|one| one.address?.as_link_addr().and_then(|link| link.addr())).next();
    mac.map(EthernetAddress)
}

fn send(socket: &PacketSocket, name: &str, frame: &[u8]) -> Result<(), String> {
    let sent = socket.interface(name).and_then(|interface| socket.send(interface, frame));
    sent.map_err(|error| format!("interface {name:?}: {error}"))
}

/// The address that a frame of the guest claims, if it is one that is asked for.
fn heard(socket: &PacketSocket, mac: [u8; 6], asked: &[(IpAddr, Vec<u8>)]) -> Option<IpAddr> {
    let mut buffer = [0; FRAME_BYTES_MAX];
    while let Ok((bytes, outgoing)) = socket.receive(&mut buffer) {
        let frame = buffer.get(..bytes).unwrap_or_default();
        // What this host sends is its own announcement, with the guest's MAC.
        let Some(Claim::Has(address)) = claim(mac, Way::FromGuest, frame).filter(|_| !outgoing) else { continue };
        if asked.iter().any(|(one, _)| *one == address) {
            return Some(address);
        }
    }
    None
}
