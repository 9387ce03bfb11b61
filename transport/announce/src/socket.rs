//! The packet socket by which finished frames leave an interface. It sends only: it is bound to no protocol, so the
//! kernel queues nothing for it.
//!
//! Soundness: the one unsafe block passes two pointers to `sendto`, each made from a live local or borrowed value,
//! with the length of that very value; the kernel reads both and keeps neither.

use std::os::fd::{AsRawFd, OwnedFd};

use nix::errno::Errno;
use nix::net::if_::if_nametoindex;
use nix::sys::socket::{AddressFamily, SockFlag, SockType, socket};
use thiserror::Error;

/// Why there is no announcer.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Error)]
pub enum OpenError {
    /// The process lacks CAP_NET_RAW.
    #[error("announcing a guest needs a packet socket, and this process may not have one: give it CAP_NET_RAW")]
    NotPermitted,
    /// Anything else.
    #[error("cannot open a packet socket to announce guests: {0}")]
    Other(Errno),
}

/// Why a frame did not leave.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Error)]
pub(crate) enum SendError {
    #[error("there is no such interface on this host")]
    NoSuchInterface,
    #[error("the interface is down: set it up (ip link set INTERFACE up)")]
    Down,
    #[error("sending failed: {0}")]
    Other(Errno),
    #[error("only {0} bytes of the frame were taken")]
    Short(usize),
}

/// A socket that sends whole Ethernet frames on any interface of the network namespace in which it was opened.
#[derive(Debug)]
pub(crate) struct PacketSocket {
    fd: OwnedFd,
}

/// An interface that existed when it was looked up.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Interface {
    index: i32,
}

impl PacketSocket {
    pub(crate) fn open() -> Result<PacketSocket, OpenError> {
        // Non-blocking: a full queue is an error in the report, not a thread that hangs.
        let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
        match socket(AddressFamily::Packet, SockType::Raw, flags, None) {
            Ok(fd) => Ok(PacketSocket { fd }),
            Err(Errno::EPERM | Errno::EACCES) => Err(OpenError::NotPermitted),
            Err(other) => Err(OpenError::Other(other)),
        }
    }

    /// Looks an interface up by name. Done anew for each round: an interface can go and come back with another index.
    pub(crate) fn interface(&self, name: &str) -> Result<Interface, SendError> {
        let index = if_nametoindex(name).map_err(|_| SendError::NoSuchInterface)?;
        let index = i32::try_from(index).map_err(|_| SendError::NoSuchInterface)?;
        Ok(Interface { index })
    }

    /// Sends one frame.
    pub(crate) fn send(&self, interface: Interface, frame: &[u8]) -> Result<(), SendError> {
        let to = libc::sockaddr_ll {
            sll_family: libc::AF_PACKET as u16,
            sll_protocol: 0,
            sll_ifindex: interface.index,
            sll_hatype: 0,
            sll_pkttype: 0,
            sll_halen: 0,
            sll_addr: [0; 8],
        };
        // SAFETY: `frame` is readable for `frame.len()` bytes and `to` is a sockaddr_ll of the size given; both
        // outlive the call, and the kernel only reads them. The descriptor is open as long as `self` is.
        let sent = unsafe {
            libc::sendto(
                self.fd.as_raw_fd(),
                frame.as_ptr().cast(),
                frame.len(),
                0,
                (&raw const to).cast(),
                size_of::<libc::sockaddr_ll>() as libc::socklen_t,
            )
        };
        match usize::try_from(sent) {
            Ok(bytes) if bytes == frame.len() => Ok(()),
            Ok(bytes) => Err(SendError::Short(bytes)),
            Err(_) => Err(match Errno::last() {
                Errno::ENETDOWN => SendError::Down,
                Errno::ENXIO | Errno::ENODEV => SendError::NoSuchInterface,
                other => SendError::Other(other),
            }),
        }
    }
}
