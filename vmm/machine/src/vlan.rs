//! The VLAN of a TAP on its bridge: an access port, by netlink, as `bridge vlan` sets it. Only bridges that filter VLANs have
//! them. It opens no TAP; `tap` does.
//!
//! Short requests, each with one acknowledgement, and one dump; layouts of `linux/rtnetlink.h` and `linux/if_bridge.h`.

use std::fs;
use std::os::fd::{AsRawFd, OwnedFd};
use std::path::Path;

use nix::errno::Errno;
use nix::net::if_::if_nametoindex;
use nix::sys::socket::{
    AddressFamily, MsgFlags, NetlinkAddr, SockFlag, SockProtocol, SockType, recv, sendto, setsockopt, socket, sockopt,
};
use nix::sys::time::{TimeVal, TimeValLike};

const RTM_NEWLINK: u16 = 16;
const RTM_DELLINK: u16 = 17;
const RTM_GETLINK: u16 = 18;
const RTM_SETLINK: u16 = 19;
const NLMSG_ERROR: u16 = 2;
const NLMSG_DONE: u16 = 3;
/// NLM_F_REQUEST, NLM_F_ACK.
const FLAGS: u16 = 0x0001 | 0x0004;
/// NLM_F_REQUEST, NLM_F_DUMP.
const FLAGS_DUMP: u16 = 0x0001 | 0x0300;
const IFLA_EXT_MASK: u16 = 29;
/// With the VLANs of ports and bridges, each one by itself.
const RTEXT_FILTER_BRVLAN: u32 = 1 << 1;
/// Bits of an attribute's kind that say what it is made of.
const NLA_TYPE_MASK: u16 = 0x3fff;
/// nlmsghdr, and ifinfomsg behind it.
const HEADER_BYTES: usize = 16;
/// The kernel never sends larger pieces of a dump.
const PIECE_BYTES_MAX: usize = 64 << 10;
const AF_BRIDGE: u8 = 7;
const IFLA_AF_SPEC: u16 = 26;
const IFLA_BRIDGE_FLAGS: u16 = 0;
const IFLA_BRIDGE_VLAN_INFO: u16 = 2;
/// The bridge itself, not one of its ports.
const BRIDGE_FLAGS_SELF: u16 = 2;
const PVID: u16 = 1 << 1;
const UNTAGGED: u16 = 1 << 2;
/// The kernel answers at once; this is for a kernel that does not.
const ANSWER_MS_MAX: i64 = 1000;

/// Makes the port with the index `port` of `bridge` an access port of `vlan`: what comes from the guest is of that VLAN, what
/// goes to it has no tag, and it sees no other VLAN. The bridge itself becomes a member too, with tags, because this host
/// announces the guest from it.
pub(crate) fn join(bridge: &str, port: i32, vlan: u16) -> Result<(), String> {
    let about = Path::new("/sys/class/net").join(bridge).join("bridge");
    let number = |name: &str| fs::read_to_string(about.join(name)).ok().and_then(|text| text.trim().parse::<u16>().ok());
    if number("vlan_filtering") != Some(1) {
        return Err(format!(
            "the bridge {bridge} does not filter VLANs; `ip link set {bridge} type bridge vlan_filtering 1` makes it, or take the \
             VLAN out of the configuration"
        ));
    }
    let netlink = open().map_err(|e| format!("opening netlink failed: {e}"))?;
    let own = if_nametoindex(bridge).ok().and_then(|index| i32::try_from(index).ok()).ok_or("the bridge is gone")?;
    let usual = number("default_pvid").filter(|usual| *usual != 0 && *usual != vlan);
    // Its membership is never changed: without a tag it may be what this host itself is reached by.
    let member = is_member(&netlink, own, vlan).map_err(|e| format!("the VLANs of the bridge {bridge} cannot be read: {e}"))?;
    let wanted = [
        Some((RTM_SETLINK, port, Change { flags: 0, info: PVID | UNTAGGED, vlan })),
        usual.map(|usual| (RTM_DELLINK, port, Change { flags: 0, info: 0, vlan: usual })),
        (!member).then_some((RTM_SETLINK, own, Change { flags: BRIDGE_FLAGS_SELF, info: 0, vlan })),
    ];
    for (kind, index, change) in wanted.into_iter().flatten() {
        ask(&netlink, &message(kind, index, change))
            .map_err(|e| format!("netlink refused VLAN {} on interface {index}: {e}", change.vlan))?;
    }
    Ok(())
}

/// One VLAN of one interface.
#[derive(Clone, Copy)]
struct Change {
    flags: u16,
    info: u16,
    vlan: u16,
}

fn open() -> Result<OwnedFd, Errno> {
    let fd = socket(AddressFamily::Netlink, SockType::Raw, SockFlag::SOCK_CLOEXEC, SockProtocol::NetlinkRoute)?;
    setsockopt(&fd, sockopt::ReceiveTimeout, &TimeVal::milliseconds(ANSWER_MS_MAX))?;
    Ok(fd)
}

/// Whether the interface with the index `own` is in `vlan`.
fn is_member(netlink: &OwnedFd, own: i32, vlan: u16) -> Result<bool, Errno> {
    let mask = attribute(IFLA_EXT_MASK, &RTEXT_FILTER_BRVLAN.to_ne_bytes());
    sendto(netlink.as_raw_fd(), &framed(RTM_GETLINK, FLAGS_DUMP, 0, &mask), &NetlinkAddr::new(0, 0), MsgFlags::empty())?;
    let (mut piece, mut member) = (vec![0; PIECE_BYTES_MAX], false);
    loop {
        let bytes = recv(netlink.as_raw_fd(), &mut piece, MsgFlags::empty())?;
        let (found, done) = vlans_in(piece.get(..bytes).unwrap_or_default(), own, vlan)?;
        member |= found;
        if done {
            return Ok(member);
        }
    }
}

fn field<const N: usize>(bytes: &[u8], at: usize) -> Option<[u8; N]> {
    bytes.get(at..at.checked_add(N)?)?.try_into().ok()
}

/// Whether a piece of the dump has the VLAN of that interface, and whether it is the last.
fn vlans_in(mut piece: &[u8], own: i32, vlan: u16) -> Result<(bool, bool), Errno> {
    let mut found = false;
    while !piece.is_empty() {
        let length = field(piece, 0).and_then(|n| usize::try_from(u32::from_ne_bytes(n)).ok()).ok_or(Errno::EBADMSG)?;
        let kind = field(piece, 4).map(u16::from_ne_bytes).ok_or(Errno::EBADMSG)?;
        let body = piece.get(HEADER_BYTES..length).ok_or(Errno::EBADMSG)?;
        match kind {
            NLMSG_DONE => return Ok((found, true)),
            NLMSG_ERROR => {
                let code = field(body, 0).map(i32::from_ne_bytes).ok_or(Errno::EBADMSG)?;
                return Err(Errno::from_raw(code.wrapping_neg()));
            }
            RTM_NEWLINK if field(body, 4).map(i32::from_ne_bytes) == Some(own) => {
                let all = attributes(body.get(HEADER_BYTES..).unwrap_or_default());
                let infos = all.into_iter().filter(|(kind, _)| *kind == IFLA_AF_SPEC).flat_map(|(_, value)| attributes(value));
                found |= infos
                    .into_iter()
                    .any(|(kind, value)| kind == IFLA_BRIDGE_VLAN_INFO && field(value, 2).map(u16::from_ne_bytes) == Some(vlan));
            }
            _ => {}
        }
        piece = piece.get(length.next_multiple_of(4)..).unwrap_or_default();
    }
    Ok((found, false))
}

/// The attributes of a message, up to the first that is none.
fn attributes(mut bytes: &[u8]) -> Vec<(u16, &[u8])> {
    let mut all = Vec::new();
    while let (Some(length), Some(kind)) = (field(bytes, 0).map(u16::from_ne_bytes).map(usize::from), field(bytes, 2)) {
        let Some(value) = bytes.get(4..length) else { break };
        all.push((u16::from_ne_bytes(kind) & NLA_TYPE_MASK, value));
        bytes = bytes.get(length.next_multiple_of(4)..).unwrap_or_default();
    }
    all
}

/// What changes one VLAN of one interface: nested in one attribute the flags, if there are any, and the VLAN.
fn message(kind: u16, index: i32, change: Change) -> Vec<u8> {
    let mut inner = Vec::new();
    if change.flags != 0 {
        inner.extend(attribute(IFLA_BRIDGE_FLAGS, &change.flags.to_ne_bytes()));
    }
    let [i0, i1] = change.info.to_ne_bytes();
    let [v0, v1] = change.vlan.to_ne_bytes();
    inner.extend(attribute(IFLA_BRIDGE_VLAN_INFO, &[i0, i1, v0, v1]));
    framed(kind, FLAGS, index, &attribute(IFLA_AF_SPEC, &inner))
}

/// nlmsghdr (16 bytes), ifinfomsg (16), and the attributes.
fn framed(kind: u16, flags: u16, index: i32, attributes: &[u8]) -> Vec<u8> {
    let mut body = vec![AF_BRIDGE, 0, 0, 0];
    body.extend(index.to_ne_bytes());
    body.extend([0; 8]);
    body.extend(attributes);
    let mut bytes = ((16 + body.len()) as u32).to_ne_bytes().to_vec();
    bytes.extend(kind.to_ne_bytes());
    bytes.extend(flags.to_ne_bytes());
    bytes.extend(1u32.to_ne_bytes()); // sequence number: an answer is awaited before the next request
    bytes.extend(0u32.to_ne_bytes()); // port id: the kernel
    bytes.extend(body);
    bytes
}

/// A header with the length, the value, and padding to 4 bytes that the length does not count.
fn attribute(kind: u16, value: &[u8]) -> Vec<u8> {
    let mut bytes = ((4 + value.len()) as u16).to_ne_bytes().to_vec();
    bytes.extend(kind.to_ne_bytes());
    bytes.extend(value);
    bytes.resize(bytes.len().next_multiple_of(4), 0);
    bytes
}

/// Sends a request; its acknowledgement is NLMSG_ERROR with errno 0 after the header.
fn ask(netlink: &OwnedFd, request: &[u8]) -> Result<(), Errno> {
    sendto(netlink.as_raw_fd(), request, &NetlinkAddr::new(0, 0), MsgFlags::empty())?;
    let mut answer = [0; 512];
    let bytes = recv(netlink.as_raw_fd(), &mut answer, MsgFlags::empty())?;
    let answer = answer.get(..bytes).unwrap_or_default();
    let kind = answer.get(4..6).and_then(|b| b.try_into().ok()).map(u16::from_ne_bytes);
    let code = answer.get(16..20).and_then(|b| b.try_into().ok()).map(i32::from_ne_bytes);
    match (kind, code) {
        (Some(NLMSG_ERROR), Some(0)) => Ok(()),
        (Some(NLMSG_ERROR), Some(code)) => Err(Errno::from_raw(code.wrapping_neg())),
        _ => Err(Errno::EBADMSG),
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    #[cfg(target_endian = "little")]
    fn messages_are_what_bridge_vlan_sends() {
        // `bridge vlan add dev tap0 vid 100 pvid untagged`, tap0 being interface 5.
        let golden = [
            44, 0, 0, 0, 19, 0, 5, 0, 1, 0, 0, 0, 0, 0, 0, 0, // header
            7, 0, 0, 0, 5, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, // ifinfomsg
            12, 0, 26, 0, 8, 0, 2, 0, 6, 0, 100, 0, // IFLA_AF_SPEC with IFLA_BRIDGE_VLAN_INFO
        ];
        assert_eq!(message(RTM_SETLINK, 5, Change { flags: 0, info: PVID | UNTAGGED, vlan: 100 }), golden);
        // `bridge vlan add dev br0 vid 100 self` has the flags in front.
        let own = message(RTM_SETLINK, 5, Change { flags: BRIDGE_FLAGS_SELF, info: 0, vlan: 100 });
        assert_eq!(own.get(32..).unwrap(), [20, 0, 26, 0, 6, 0, 0, 0, 2, 0, 0, 0, 8, 0, 2, 0, 0, 0, 100, 0]);
    }

    #[test]
    fn members_are_found_and_hostile_dumps_are_judged() {
        let info = |vlan: u16| attribute(IFLA_BRIDGE_VLAN_INFO, &[[6, 0], vlan.to_ne_bytes()].concat());
        let nested = attribute(IFLA_AF_SPEC | 0x8000, &[info(1), info(100)].concat());
        let link = framed(RTM_NEWLINK, 0, 5, &[attribute(3, b"br0\0"), nested].concat());
        let done = framed(NLMSG_DONE, 0, 0, &[]);
        let all = [link.clone(), done].concat();
        assert_eq!(vlans_in(&all, 5, 100), Ok((true, true)));
        assert_eq!(vlans_in(&all, 5, 7), Ok((false, true)));
        assert_eq!(vlans_in(&all, 6, 100), Ok((false, true)), "another interface");
        assert_eq!(vlans_in(&link, 5, 1), Ok((true, false)));
        for length in 1..link.len() {
            assert!(vlans_in(link.get(..length).unwrap(), 5, 100).is_err(), "cut to {length}");
        }
        for at in 0..link.len() {
            let mut bent = link.clone();
            bent[at] ^= 0xff;
            let _ = vlans_in(&bent, 5, 100);
        }
    }

    #[test]
    fn a_bridge_that_is_not_there_filters_nothing() {
        let words = join("no-such-bridge", 1, 7).unwrap_err();
        assert!(words.contains("no-such-bridge does not filter VLANs"), "{words}");
    }
}
