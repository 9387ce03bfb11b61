//! Packet sockets: one by which finished frames leave an interface, and one that hears the few frames by which addresses are
//! learned. The sending one is bound to no protocol, so the kernel queues nothing for it; the hearing one has a filter before
//! it is bound, so that the kernel drops all else without waking anybody.
//!
//! Soundness: each unsafe block passes pointers to a system call that are made from live local or borrowed values, with the
//! length of that very value; the kernel reads them (the filter: copies it) and keeps none.

use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};

use nix::errno::Errno;
use nix::net::if_::if_nametoindex;
use nix::sys::socket::{AddressFamily, LinkAddr, SockFlag, SockType, recvfrom, setsockopt, socket, sockopt};
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

/// Why an interface cannot be heard.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Error)]
pub enum ListenError {
    /// There is no socket.
    #[error(transparent)]
    Open(#[from] OpenError),
    /// It is not there.
    #[error("there is no such interface on this host")]
    NoSuchInterface,
    /// Anything else.
    #[error("hearing the interface failed: {0}")]
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

/// Bytes of frames that wait to be read; what comes faster is dropped.
const RECEIVE_BYTES: usize = 64 << 10;

const ANY_PROTOCOL: u16 = (libc::ETH_P_ALL as u16).to_be();

/// ARP, neighbour discovery over IPv6, and DHCP over IPv4 that is in one piece: a program of classic BPF.
const FILTER: [libc::sock_filter; 19] = {
    const ACCEPT: u8 = 17;
    const REJECT: u8 = 18;
    [
        load(libc::BPF_H | libc::BPF_ABS, 12),
        jump(libc::BPF_JEQ, 0x0806, 1, ACCEPT, 2),
        jump(libc::BPF_JEQ, 0x86dd, 2, 3, 8),
        load(libc::BPF_B | libc::BPF_ABS, 20), // IPv6: the next header
        jump(libc::BPF_JEQ, 58, 4, 5, REJECT),
        load(libc::BPF_B | libc::BPF_ABS, 54), // ICMPv6: the type
        jump(libc::BPF_JGE, 133, 6, 7, REJECT),
        jump(libc::BPF_JGT, 137, 7, REJECT, ACCEPT),
        jump(libc::BPF_JEQ, 0x0800, 8, 9, REJECT),
        load(libc::BPF_B | libc::BPF_ABS, 23), // IPv4: the protocol
        jump(libc::BPF_JEQ, 17, 10, 11, REJECT),
        load(libc::BPF_H | libc::BPF_ABS, 20), // IPv4: the fragment's offset
        jump(libc::BPF_JSET, 0x1fff, 12, REJECT, 13),
        instruction(libc::BPF_LDX | libc::BPF_B | libc::BPF_MSH, 14, 0, 0), // IPv4: the header's length
        load(libc::BPF_H | libc::BPF_IND, 16),                              // UDP: the destination's port
        jump(libc::BPF_JEQ, 67, 15, ACCEPT, 16),
        jump(libc::BPF_JEQ, 68, 16, ACCEPT, REJECT),
        instruction(libc::BPF_RET | libc::BPF_K, FRAME_BYTES_MAX as u32, 0, 0),
        instruction(libc::BPF_RET | libc::BPF_K, 0, 0, 0),
    ]
};

/// No frame that is wanted is longer.
pub(crate) const FRAME_BYTES_MAX: usize = 2048;

const fn instruction(code: u32, k: u32, jt: u8, jf: u8) -> libc::sock_filter {
    libc::sock_filter { code: code as u16, jt, jf, k }
}

const fn load(from: u32, k: u32) -> libc::sock_filter {
    instruction(libc::BPF_LD | from, k, 0, 0)
}

/// A jump from instruction `here` to `yes` or to `no`, which lie behind it.
const fn jump(test: u32, k: u32, here: u8, yes: u8, no: u8) -> libc::sock_filter {
    instruction(libc::BPF_JMP | libc::BPF_K | test, k, yes - here - 1, no - here - 1)
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

    /// Hears the frames of one interface, both ways, by which addresses are learned.
    pub(crate) fn listen(interface: &str) -> Result<PacketSocket, ListenError> {
        let socket = PacketSocket::filtered()?;
        socket.bind(interface)?;
        Ok(socket)
    }

    /// Will hear such frames and no others, once it is bound to an interface.
    pub(crate) fn filtered() -> Result<PacketSocket, ListenError> {
        let socket = PacketSocket::open()?;
        setsockopt(&socket.fd, sockopt::RcvBuf, &RECEIVE_BYTES).map_err(ListenError::Other)?;
        let filter = libc::sock_fprog { len: FILTER.len() as u16, filter: FILTER.as_ptr().cast_mut() };
        // SAFETY: `filter` names FILTER with its length; the kernel copies the program and writes nothing. The descriptor is open.
        let done = unsafe {
            libc::setsockopt(
                socket.fd.as_raw_fd(),
                libc::SOL_SOCKET,
                libc::SO_ATTACH_FILTER,
                (&raw const filter).cast(),
                size_of::<libc::sock_fprog>() as libc::socklen_t,
            )
        };
        Errno::result(done).map_err(ListenError::Other)?;
        Ok(socket)
    }

    /// Hears every frame of one interface, both ways, as far as `bytes` hold them until they are read.
    pub(crate) fn hear_all(interface: &str, bytes: usize) -> Result<PacketSocket, ListenError> {
        let socket = PacketSocket::open()?;
        // Beyond the host's limit, where that is permitted; the limit itself is room for some hundred frames.
        if setsockopt(&socket.fd, sockopt::RcvBufForce, &bytes).is_err() {
            setsockopt(&socket.fd, sockopt::RcvBuf, &bytes).map_err(ListenError::Other)?;
        }
        socket.bind(interface)?;
        Ok(socket)
    }

    /// From now on it hears this interface.
    pub(crate) fn bind(&self, interface: &str) -> Result<(), ListenError> {
        let index = if_nametoindex(interface).map_err(|_| ListenError::NoSuchInterface)?;
        let on = address(i32::try_from(index).map_err(|_| ListenError::NoSuchInterface)?, ANY_PROTOCOL);
        // SAFETY: `on` is a sockaddr_ll of the size given, which the kernel reads; the descriptor is open.
        let done =
            unsafe { libc::bind(self.fd.as_raw_fd(), (&raw const on).cast(), size_of::<libc::sockaddr_ll>() as libc::socklen_t) };
        Errno::result(done).map(drop).map_err(ListenError::Other)
    }

    /// The next frame that was heard, if there is one: its bytes in the buffer, and whether this host sent it.
    pub(crate) fn receive(&self, buffer: &mut [u8]) -> Result<(usize, bool), Errno> {
        let (bytes, from) = recvfrom::<LinkAddr>(self.fd.as_raw_fd(), buffer)?;
        Ok((bytes.min(buffer.len()), from.is_some_and(|from| from.pkttype() == libc::PACKET_OUTGOING)))
    }

    /// Looks an interface up by name. Done anew for each round: an interface can go and come back with another index.
    pub(crate) fn interface(&self, name: &str) -> Result<Interface, SendError> {
        let index = if_nametoindex(name).map_err(|_| SendError::NoSuchInterface)?;
        let index = i32::try_from(index).map_err(|_| SendError::NoSuchInterface)?;
        Ok(Interface { index })
    }

    /// Sends one frame.
    pub(crate) fn send(&self, interface: Interface, frame: &[u8]) -> Result<(), SendError> {
        let to = address(interface.index, 0);
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

impl AsFd for PacketSocket {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

/// An interface's address for packet sockets.
fn address(index: i32, protocol: u16) -> libc::sockaddr_ll {
    libc::sockaddr_ll {
        sll_family: libc::AF_PACKET as u16,
        sll_protocol: protocol,
        sll_ifindex: index,
        sll_hatype: 0,
        sll_pkttype: 0,
        sll_halen: 0,
        sll_addr: [0; 8],
    }
}
