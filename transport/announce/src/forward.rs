//! Frames for a guest that reach its old port while it stands still and after it has left: kept, and sent on to where it is
//! now. So a ping that comes in the pause is answered late and not lost. Not a buffer without bounds: what the socket of a
//! port has no room for is lost, as in any switch.
//!
//! A frame is sent on with this host's own MAC as its source: with its first sender's, every switch on the way would believe
//! that this host is that sender. Who gets an IP packet does not look at it. So only IP is sent on, and only what was
//! for this guest alone; ARP and neighbour discovery are asked again by whoever needs them.

use nix::errno::Errno;

use crate::Nic;
use crate::socket::{ListenError, PacketSocket};

/// Frames that are sent on of one port.
const FRAMES_MAX: usize = 1024;
/// Bytes of frames that are kept for one port, as the kernel counts them.
const KEPT_BYTES: usize = 1 << 20;
/// The longest frame: 9,000 bytes of MTU, Ethernet and VLAN headers, and some room.
const FRAME_BYTES_MAX: usize = 9216;
const HEADER_BYTES: usize = 14;
const IPV4: [u8; 2] = [0x08, 0x00];
const IPV6: [u8; 2] = [0x86, 0xdd];
const VLAN: [u8; 2] = [0x81, 0x00];

/// What comes to one port from now on.
#[derive(Debug)]
pub struct Kept {
    socket: PacketSocket,
    nic: Nic,
}

impl Kept {
    /// Begins to keep what comes to the port of `nic`; `None` if it has no port on this host.
    ///
    /// # Errors
    /// The port is gone, or packet sockets are not permitted.
    pub fn begin(nic: &Nic) -> Result<Option<Kept>, ListenError> {
        let Some(port) = &nic.port else { return Ok(None) };
        let socket = PacketSocket::hear_all(port, KEPT_BYTES)?;
        Ok(Some(Kept { socket, nic: nic.clone() }))
    }

    /// The bridge by which they are sent on.
    pub fn bridge(&self) -> &str {
        &self.nic.interface
    }

    /// Sends on what has come until now, by the card's bridge, and keeps no more. `own` is this host's MAC there. Returns how
    /// many frames left.
    pub fn send_on(self, own: [u8; 6]) -> usize {
        let Ok(bridge) = self.socket.interface(&self.nic.interface) else { return 0 };
        let mut buffer = vec![0; FRAME_BYTES_MAX];
        let (mut sent, mut trouble) = (0, 0);
        for _ in 0..FRAMES_MAX {
            let (bytes, to_guest) = match self.socket.receive(&mut buffer) {
                Ok(heard) => heard,
                // That the port has gone meanwhile is said once, and what had come before is there all the same.
                Err(Errno::EAGAIN) => break,
                Err(_) if trouble < 2 => {
                    trouble += 1;
                    continue;
                }
                Err(_) => break,
            };
            let frame = buffer.get(..bytes).filter(|_| to_guest).and_then(|frame| readdressed(frame, &self.nic, own));
            if frame.is_some_and(|frame| self.socket.send(bridge, &frame).is_ok()) {
                sent += 1;
            }
        }
        sent
    }
}

/// The frame as it is sent on; `None` if it is not for this card alone, no IP, or too long to be a frame.
fn readdressed(frame: &[u8], nic: &Nic, own: [u8; 6]) -> Option<Vec<u8>> {
    let (header, packet) = frame.split_at_checked(HEADER_BYTES)?;
    let (addresses, kind) = header.split_at_checked(12)?;
    if !addresses.starts_with(&nic.mac) || (kind != IPV4 && kind != IPV6) || frame.len() >= FRAME_BYTES_MAX {
        return None;
    }
    let mut readdressed = nic.mac.to_vec();
    readdressed.extend(own);
    if let Some(vlan) = nic.vlan {
        readdressed.extend(VLAN);
        readdressed.extend(vlan.to_be_bytes());
    }
    readdressed.extend(kind);
    readdressed.extend(packet);
    Some(readdressed)
}

#[cfg(test)]
mod tests {
    use super::*;

    const OWN: [u8; 6] = [2, 0, 0, 0, 0, 9];

    fn nic(vlan: Option<u16>) -> Nic {
        Nic { mac: [2, 0, 0, 0, 0, 1], vlan, ..Nic::default() }
    }

    fn frame(to: u8, kind: [u8; 2]) -> Vec<u8> {
        [&[2, 0, 0, 0, 0, to, 2, 0, 0, 0, 0, 7][..], &kind, &[0x45; 50]].concat()
    }

    #[test]
    fn only_ip_for_the_guest_is_sent_on_and_as_from_this_host() {
        let sent = readdressed(&frame(1, IPV4), &nic(None), OWN).unwrap_or_default();
        assert_eq!(sent, [&[2, 0, 0, 0, 0, 1, 2, 0, 0, 0, 0, 9, 8, 0][..], &[0x45; 50]].concat());
        let tagged = readdressed(&frame(1, IPV6), &nic(Some(100)), OWN).unwrap_or_default();
        assert_eq!(tagged.get(12..18), Some(&[0x81, 0, 0, 100, 0x86, 0xdd][..]));
        for other in [frame(2, IPV4), frame(1, [0x08, 0x06]), frame(0xff, IPV4), vec![2; 13], vec![], vec![2; 9300]] {
            assert_eq!(readdressed(&other, &nic(None), OWN), None);
        }
    }
}
