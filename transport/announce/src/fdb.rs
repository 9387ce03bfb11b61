//! The entry "this MAC is on that port" in the local bridge's forwarding table, set by netlink. It reads no table and
//! removes nothing: the entry is dynamic, so it ages out and moves on like a learned one.
//!
//! One message of 40 bytes and one answer; the layouts are those of `linux/rtnetlink.h` and `linux/neighbour.h`.

use std::os::fd::{AsRawFd, OwnedFd};

use nix::errno::Errno;
use nix::net::if_::if_nametoindex;
use nix::sys::socket::{
    AddressFamily, MsgFlags, NetlinkAddr, SockFlag, SockProtocol, SockType, recv, sendto, setsockopt, socket, sockopt,
};
use nix::sys::time::{TimeVal, TimeValLike};
use thiserror::Error;

use crate::mac_words;

const MESSAGE_BYTES: usize = 40;
const RTM_NEWNEIGH: u16 = 28;
const NLMSG_ERROR: u16 = 2;
/// NLM_F_REQUEST, NLM_F_ACK, NLM_F_REPLACE, NLM_F_CREATE: as `bridge fdb replace` has them.
const FLAGS: u16 = 0x0001 | 0x0004 | 0x0100 | 0x0400;
const AF_BRIDGE: u8 = 7;
/// Dynamic: neither NUD_NOARP (static) nor NUD_PERMANENT (the bridge's own).
const NUD_REACHABLE: u16 = 0x02;
/// The table of the bridge that the port belongs to, not the port's own.
const NTF_MASTER: u8 = 0x04;
const NDA_LLADDR: u16 = 2;
/// The kernel answers at once; this is for a kernel that does not.
const ANSWER_MS_MAX: i64 = 1000;

/// Why the bridge's table was not changed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Error)]
pub(crate) enum FdbError {
    #[error("there is no such interface on this host")]
    NoSuchPort,
    #[error("it is not a port of a bridge: put it there first (ip link set PORT master BRIDGE)")]
    NotAPort,
    #[error("not permitted: the port must be up, with carrier and forwarding, and the agent needs CAP_NET_ADMIN")]
    NotPermitted,
    #[error("netlink failed: {0}")]
    Netlink(Errno),
    #[error("the kernel's answer of {0} bytes is no netlink acknowledgement")]
    BadAnswer(usize),
}

impl From<Errno> for FdbError {
    fn from(errno: Errno) -> FdbError {
        match errno {
            Errno::ENODEV => FdbError::NoSuchPort,
            Errno::EOPNOTSUPP | Errno::EINVAL => FdbError::NotAPort,
            Errno::EPERM | Errno::EACCES => FdbError::NotPermitted,
            other => FdbError::Netlink(other),
        }
    }
}

/// Puts `mac` on `port` in the table of the bridge that `port` belongs to, whatever port it was on before.
///
/// No VLAN is named: the kernel then adds the entry to VLAN 0 and to each VLAN of the port, which is right for
/// bridges with and without `vlan_filtering`.
pub(crate) fn learn(mac: [u8; 6], port: &str) -> Result<String, FdbError> {
    let index = if_nametoindex(port).map_err(|_| FdbError::NoSuchPort)?;
    let netlink = open()?;
    let request = message(mac, index);
    sendto(netlink.as_raw_fd(), &request, &NetlinkAddr::new(0, 0), MsgFlags::empty())?;
    let mut answer = [0; 512];
    let bytes = recv(netlink.as_raw_fd(), &mut answer, MsgFlags::empty())?;
    acknowledged(answer.get(..bytes).unwrap_or_default())?;
    Ok(format!("bridge port {port} has {}", mac_words(mac)))
}

pub(crate) fn open() -> Result<OwnedFd, Errno> {
    let fd = socket(AddressFamily::Netlink, SockType::Raw, SockFlag::SOCK_CLOEXEC, SockProtocol::NetlinkRoute)?;
    setsockopt(&fd, sockopt::ReceiveTimeout, &TimeVal::milliseconds(ANSWER_MS_MAX))?;
    Ok(fd)
}

/// nlmsghdr (16 bytes), ndmsg (12), one attribute (4 + 6, padded to 12); native byte order, as netlink has it.
fn message(mac: [u8; 6], index: u32) -> [u8; MESSAGE_BYTES] {
    let mut bytes = Vec::with_capacity(MESSAGE_BYTES);
    bytes.extend((MESSAGE_BYTES as u32).to_ne_bytes());
    bytes.extend(RTM_NEWNEIGH.to_ne_bytes());
    bytes.extend(FLAGS.to_ne_bytes());
    bytes.extend(1u32.to_ne_bytes()); // sequence number: one socket has one request
    bytes.extend(0u32.to_ne_bytes()); // port id: the kernel
    bytes.extend([AF_BRIDGE, 0, 0, 0]);
    bytes.extend(index.to_ne_bytes());
    bytes.extend(NUD_REACHABLE.to_ne_bytes());
    bytes.extend([NTF_MASTER, 0]);
    bytes.extend(10u16.to_ne_bytes());
    bytes.extend(NDA_LLADDR.to_ne_bytes());
    bytes.extend(mac);
    let mut message = [0; MESSAGE_BYTES];
    message.iter_mut().zip(bytes).for_each(|(to, from)| *to = from);
    message
}

/// An acknowledgement is NLMSG_ERROR with errno 0 after the header.
fn acknowledged(answer: &[u8]) -> Result<(), FdbError> {
    let bad = FdbError::BadAnswer(answer.len());
    let kind = answer.get(4..6).and_then(|b| b.try_into().ok()).map(u16::from_ne_bytes).ok_or(bad)?;
    let code = answer.get(16..20).and_then(|b| b.try_into().ok()).map(i32::from_ne_bytes).ok_or(bad)?;
    match (kind, code) {
        (NLMSG_ERROR, 0) => Ok(()),
        (NLMSG_ERROR, code) => Err(Errno::from_raw(code.wrapping_neg()).into()),
        _ => Err(bad),
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    #[cfg(target_endian = "little")]
    fn message_is_what_bridge_fdb_replace_sends() {
        // `bridge fdb replace 52:54:00:12:34:56 dev tap0 master dynamic`, tap0 being interface 0x1234, as strace shows it.
        let golden = [
            40, 0, 0, 0, 28, 0, 5, 5, 1, 0, 0, 0, 0, 0, 0, 0, // header
            7, 0, 0, 0, 0x34, 0x12, 0, 0, 2, 0, 4, 0, // ndmsg
            10, 0, 2, 0, 0x52, 0x54, 0, 0x12, 0x34, 0x56, 0, 0, // NDA_LLADDR
        ];
        assert_eq!(message([0x52, 0x54, 0, 0x12, 0x34, 0x56], 0x1234), golden);
    }

    #[test]
    fn answers_of_every_length_and_code_are_judged() {
        let answer = |kind: u16, code: i32| {
            let mut bytes = vec![0; 20];
            bytes[4..6].copy_from_slice(&kind.to_ne_bytes());
            bytes[16..20].copy_from_slice(&code.to_ne_bytes());
            bytes
        };
        assert_eq!(acknowledged(&answer(NLMSG_ERROR, 0)), Ok(()));
        assert_eq!(acknowledged(&answer(NLMSG_ERROR, -1)), Err(FdbError::NotPermitted));
        assert_eq!(acknowledged(&answer(NLMSG_ERROR, -19)), Err(FdbError::NoSuchPort));
        assert!(acknowledged(&answer(NLMSG_ERROR, i32::MIN)).is_err());
        assert_eq!(acknowledged(&answer(3, 0)), Err(FdbError::BadAnswer(20)));
        for short in 0..20 {
            assert!(acknowledged(&answer(NLMSG_ERROR, 0)[..short]).is_err());
        }
    }
}
