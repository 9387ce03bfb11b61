//! Which MAC addresses the bridges of this host have on which port, read from their forwarding tables by netlink. It changes
//! nothing; `fdb` does.
//!
//! One request, and a dump of messages of which each is checked before it is read; layouts as in `fdb`.

use std::os::fd::AsRawFd;

use nix::errno::Errno;
use nix::sys::socket::{MsgFlags, NetlinkAddr, recv, sendto};
use thiserror::Error;

use crate::fdb;

const HEADER_BYTES: usize = 16;
const NEIGHBOUR_BYTES: usize = 12;
const RTM_NEWNEIGH: u16 = 28;
const RTM_GETNEIGH: u16 = 30;
const NLMSG_ERROR: u16 = 2;
const NLMSG_DONE: u16 = 3;
/// NLM_F_REQUEST, NLM_F_DUMP.
const FLAGS: u16 = 0x0001 | 0x0300;
const AF_BRIDGE: u8 = 7;
const NUD_NOARP: u16 = 0x40;
const NUD_PERMANENT: u16 = 0x80;
const NDA_LLADDR: u16 = 2;
const NDA_MASTER: u16 = 9;
/// The most entries that are read; a bridge with more is not one of a host.
const ENTRIES_MAX: usize = 1 << 20;
/// The kernel never sends larger pieces of a dump.
const PIECE_BYTES_MAX: usize = 64 << 10;

/// How an entry came into the table.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Hold {
    /// Learned from a frame; it ages.
    Learned,
    /// Put there by somebody.
    Static,
    /// An address of this host.
    Own,
}

/// One entry.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Station {
    /// Whose.
    pub mac: [u8; 6],
    /// Index of the port.
    pub port: u32,
    /// Index of the bridge.
    pub bridge: u32,
    /// How it came there.
    pub hold: Hold,
}

/// Why the tables could not be read.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Error)]
pub enum StationsError {
    /// The kernel refused or did not answer.
    #[error("reading the bridges' tables failed: {0}")]
    Netlink(#[from] Errno),
    /// Its answer is no dump.
    #[error("the kernel's answer of {0} bytes is no table of a bridge")]
    BadAnswer(usize),
}

/// The entries of all bridges of this network namespace.
///
/// # Errors
/// The kernel refuses, does not answer in a second, or answers with something else.
pub fn stations() -> Result<Vec<Station>, StationsError> {
    let netlink = fdb::open()?;
    sendto(netlink.as_raw_fd(), &request(), &NetlinkAddr::new(0, 0), MsgFlags::empty())?;
    let (mut all, mut piece) = (Vec::new(), vec![0; PIECE_BYTES_MAX]);
    loop {
        let bytes = recv(netlink.as_raw_fd(), &mut piece, MsgFlags::empty())?;
        let done = read(piece.get(..bytes).unwrap_or_default(), &mut all)?;
        if done || all.len() >= ENTRIES_MAX {
            return Ok(all);
        }
    }
}

/// nlmsghdr and ndmsg.
fn request() -> Vec<u8> {
    let mut bytes = Vec::with_capacity(HEADER_BYTES + NEIGHBOUR_BYTES);
    bytes.extend(((HEADER_BYTES + NEIGHBOUR_BYTES) as u32).to_ne_bytes());
    bytes.extend(RTM_GETNEIGH.to_ne_bytes());
    bytes.extend(FLAGS.to_ne_bytes());
    bytes.extend(1u32.to_ne_bytes()); // sequence number: one socket has one request
    bytes.extend(0u32.to_ne_bytes()); // port id: the kernel
    bytes.extend([AF_BRIDGE; 1]);
    bytes.resize(HEADER_BYTES + NEIGHBOUR_BYTES, 0);
    bytes
}

fn field<const N: usize>(bytes: &[u8], at: usize) -> Option<[u8; N]> {
    bytes.get(at..at.checked_add(N)?)?.try_into().ok()
}

/// Takes the messages of one piece of a dump; whether it was the last.
fn read(mut piece: &[u8], into: &mut Vec<Station>) -> Result<bool, StationsError> {
    let bad = StationsError::BadAnswer(piece.len());
    while !piece.is_empty() {
        let length = field(piece, 0).map(u32::from_ne_bytes).and_then(|n| usize::try_from(n).ok()).ok_or(bad)?;
        let kind = field(piece, 4).map(u16::from_ne_bytes).ok_or(bad)?;
        let message = piece.get(HEADER_BYTES..length).ok_or(bad)?;
        match kind {
            NLMSG_DONE => return Ok(true),
            NLMSG_ERROR => {
                let code = field(message, 0).map(i32::from_ne_bytes).ok_or(bad)?;
                return Err(StationsError::Netlink(Errno::from_raw(code.wrapping_neg())));
            }
            RTM_NEWNEIGH => into.extend(station(message)),
            _ => {}
        }
        piece = piece.get(length.next_multiple_of(4)..).unwrap_or_default();
    }
    Ok(false)
}

/// One entry; none for those of another family, and those that no bridge has.
fn station(message: &[u8]) -> Option<Station> {
    if message.first() != Some(&AF_BRIDGE) {
        return None;
    }
    let port = field(message, 4).map(u32::from_ne_bytes)?;
    let state = field(message, 8).map(u16::from_ne_bytes)?;
    let (mut mac, mut bridge) = (None, None);
    let mut attributes = message.get(NEIGHBOUR_BYTES..)?;
    while let (Some(length), Some(kind)) = (field(attributes, 0).map(u16::from_ne_bytes), field(attributes, 2)) {
        let length = usize::from(length);
        let value = attributes.get(4..length)?;
        match u16::from_ne_bytes(kind) {
            NDA_LLADDR => mac = value.try_into().ok(),
            NDA_MASTER => bridge = field(value, 0).map(u32::from_ne_bytes),
            _ => {}
        }
        attributes = attributes.get(length.next_multiple_of(4)..).unwrap_or_default();
    }
    let hold = match state {
        state if state & NUD_PERMANENT != 0 => Hold::Own,
        state if state & NUD_NOARP != 0 => Hold::Static,
        _ => Hold::Learned,
    };
    Some(Station { mac: mac?, port, bridge: bridge?, hold })
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn message(kind: u16, body: &[u8]) -> Vec<u8> {
        let mut bytes = ((HEADER_BYTES + body.len()) as u32).to_ne_bytes().to_vec();
        bytes.extend(kind.to_ne_bytes());
        bytes.resize(HEADER_BYTES, 0);
        bytes.extend(body);
        bytes.resize(bytes.len().next_multiple_of(4), 0);
        bytes
    }

    fn entry(state: u16) -> Vec<u8> {
        let mut body = vec![AF_BRIDGE, 0, 0, 0, 5, 0, 0, 0];
        body.extend(state.to_ne_bytes());
        body.extend([0, 0]);
        body.extend([10, 0, 2, 0, 2, 0, 0, 0, 0, 9, 0, 0]);
        body.extend([8, 0, 9, 0, 3, 0, 0, 0]);
        message(RTM_NEWNEIGH, &body)
    }

    #[test]
    #[cfg(target_endian = "little")]
    fn a_dump_is_read_to_its_end() {
        let mut all = Vec::new();
        let piece = [entry(0x02), entry(0x40), entry(0x80)].concat();
        assert_eq!(read(&piece, &mut all), Ok(false));
        let holds: Vec<Hold> = all.iter().map(|station| station.hold).collect();
        assert_eq!(holds, [Hold::Learned, Hold::Static, Hold::Own]);
        assert_eq!((all[0].mac, all[0].port, all[0].bridge), ([2, 0, 0, 0, 0, 9], 5, 3));
        assert_eq!(read(&message(NLMSG_DONE, &[0; 4]), &mut all), Ok(true));
        let refused = message(NLMSG_ERROR, &(-1i32).to_ne_bytes());
        assert_eq!(read(&refused, &mut all), Err(StationsError::Netlink(Errno::EPERM)));
        assert_eq!(read(&[40, 0, 0, 0, 28, 0], &mut all), Err(StationsError::BadAnswer(6)));
    }

    #[test]
    fn the_tables_of_this_host_can_be_read() {
        stations().unwrap();
    }

    proptest! {
        #[test]
        fn any_bytes_are_judged(bytes in prop::collection::vec(any::<u8>(), 0..200), body in prop::collection::vec(any::<u8>(), 0..80)) {
            let mut all = Vec::new();
            let _ = read(&bytes, &mut all);
            let _ = read(&message(RTM_NEWNEIGH, &body), &mut all);
        }
    }
}
