//! SOCK_SEQPACKET with descriptors: one message is one datagram with at most [`DESCRIPTORS_MAX`] descriptors.
//! It does not know what the messages mean.
//!
//! Soundness rule of this module: a descriptor number that the kernel delivered by SCM_RIGHTS belongs to nobody else
//! in this process, so it is made an `OwnedFd` at once, each exactly one time.

use crate::message::{DESCRIPTORS_MAX, MESSAGE_BYTES_MAX};
use nix::sys::socket::{self as sys, AddressFamily, ControlMessage, MsgFlags, SockFlag, SockType, UnixAddr, sockopt};
use nix::sys::time::TimeVal;
use std::io::{self, IoSlice};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::path::Path;
use std::time::Duration;

/// Room for one message of the largest size and a little more, so that a larger one is seen to be larger.
const BUFFER_BYTES: usize = MESSAGE_BYTES_MAX + 1;
/// Room for a control message with 253 descriptors, the most that Linux delivers at once.
const CONTROL_WORDS: usize = 132;
/// How long the other side may leave its receive queue full.
const SEND_MS_MAX: i64 = 5_000;

/// What came by one receive.
#[derive(Debug)]
pub(crate) enum Received {
    /// A datagram.
    Message { bytes: Vec<u8>, fds: Vec<OwnedFd> },
    /// A datagram that broke a limit: as much of it as was kept, and why.
    TooLarge { bytes: Vec<u8>, words: &'static str },
    /// The other side is gone.
    End,
}

/// Room for one message. Whoever receives many keeps one: a new one for each means new memory from the system each time.
#[derive(Debug)]
pub(crate) struct Buffer(Vec<u8>);

impl Buffer {
    pub(crate) fn new() -> Buffer {
        Buffer(vec![0; BUFFER_BYTES])
    }
}

/// A connected or listening SEQPACKET socket.
#[derive(Debug)]
pub(crate) struct Socket {
    fd: OwnedFd,
}

impl Socket {
    fn new() -> io::Result<Socket> {
        let fd = sys::socket(AddressFamily::Unix, SockType::SeqPacket, SockFlag::SOCK_CLOEXEC, None)?;
        Socket::configured(fd)
    }

    /// No send may block for ever, and the largest message must fit the send buffer whatever the system's default is.
    fn configured(fd: OwnedFd) -> io::Result<Socket> {
        sys::setsockopt(&fd, sockopt::SendTimeout, &TimeVal::new(SEND_MS_MAX / 1000, 0))?;
        if sys::getsockopt(&fd, sockopt::SndBuf)? < MESSAGE_BYTES_MAX + 4096 {
            sys::setsockopt(&fd, sockopt::SndBuf, &(MESSAGE_BYTES_MAX * 5 / 4))?;
        }
        Ok(Socket { fd })
    }

    /// Connects to a listener.
    pub(crate) fn connect(path: &Path) -> io::Result<Socket> {
        let socket = Socket::new()?;
        sys::connect(socket.fd.as_raw_fd(), &UnixAddr::new(path)?)?;
        Ok(socket)
    }

    /// Listens at a path that does not exist yet.
    pub(crate) fn listen(path: &Path) -> io::Result<Socket> {
        let socket = Socket::new()?;
        sys::bind(socket.fd.as_raw_fd(), &UnixAddr::new(path)?)?;
        sys::listen(&socket.fd, sys::Backlog::new(64)?)?;
        Ok(socket)
    }

    /// Takes a connection that is waiting.
    pub(crate) fn accept(&self) -> io::Result<Socket> {
        let fd = sys::accept4(self.fd.as_raw_fd(), SockFlag::SOCK_CLOEXEC)?;
        // SAFETY: the kernel just made this descriptor for us.
        Socket::configured(unsafe { OwnedFd::from_raw_fd(fd) })
    }

    /// Two connected ends.
    #[cfg(test)]
    pub(crate) fn pair() -> io::Result<(Socket, Socket)> {
        let (one, other) = sys::socketpair(AddressFamily::Unix, SockType::SeqPacket, None, SockFlag::SOCK_CLOEXEC)?;
        Ok((Socket::configured(one)?, Socket::configured(other)?))
    }

    /// Process and user at the other end, as the kernel knows them.
    pub(crate) fn peer(&self) -> io::Result<(i32, u32)> {
        let credentials = sys::getsockopt(&self.fd, sockopt::PeerCredentials)?;
        Ok((credentials.pid(), credentials.uid()))
    }

    /// Sends one datagram; blocks for at most five seconds while the other side's queue is full.
    pub(crate) fn send(&self, bytes: &[u8], fds: &[BorrowedFd<'_>]) -> io::Result<()> {
        let raw: Vec<RawFd> = fds.iter().map(AsRawFd::as_raw_fd).collect();
        let control = [ControlMessage::ScmRights(&raw)];
        let control = if raw.is_empty() { &[][..] } else { &control[..] };
        loop {
            let sent = sys::sendmsg::<()>(self.fd.as_raw_fd(), &[IoSlice::new(bytes)], control, MsgFlags::MSG_NOSIGNAL, None);
            match sent {
                Err(nix::Error::EINTR) => {}
                Err(nix::Error::EAGAIN) => return Err(io::ErrorKind::TimedOut.into()),
                Err(error) => return Err(error.into()),
                Ok(_) => return Ok(()),
            }
        }
    }

    /// [`Socket::receive_into`] with a buffer for this one time.
    pub(crate) fn receive(&self) -> io::Result<Received> {
        self.receive_into(&mut Buffer::new())
    }

    /// Waits for one datagram, without a deadline: see [`Socket::wait`] and [`Socket::shut`].
    pub(crate) fn receive_into(&self, buffer: &mut Buffer) -> io::Result<Received> {
        let (length, flags, fds) = loop {
            match receive_once(self.fd.as_fd(), &mut buffer.0) {
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) if error.kind() == io::ErrorKind::ConnectionReset => return Ok(Received::End),
                other => break other?,
            }
        };
        // An empty datagram reads like an end. No message of the plug is empty, so whoever sends one has left.
        if length == 0 {
            return Ok(Received::End);
        }
        let bytes = buffer.0.get(..length.min(MESSAGE_BYTES_MAX)).unwrap_or_default().to_vec();
        if flags & libc::MSG_TRUNC != 0 || length > MESSAGE_BYTES_MAX {
            return Ok(Received::TooLarge { bytes, words: "the message is larger than 192 KiB" });
        }
        if flags & libc::MSG_CTRUNC != 0 || fds.len() > DESCRIPTORS_MAX {
            return Ok(Received::TooLarge { bytes, words: "the message has more descriptors than could be taken" });
        }
        Ok(Received::Message { bytes, fds })
    }

    /// Waits until something can be received, accepted or is at an end: true, or false when `time` has passed.
    pub(crate) fn wait(&self, time: Duration) -> io::Result<bool> {
        wait_any(&[self.fd.as_fd()], Some(time)).map(|ready| ready.contains(&true))
    }

    /// Ends the connection for both sides, and wakes whoever waits on it.
    pub(crate) fn shut(&self) {
        let _ = sys::shutdown(self.fd.as_raw_fd(), sys::Shutdown::Both);
    }
}

impl AsFd for Socket {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

/// One recvmsg. By libc and not by nix, which drops the delivered descriptors (and leaks them) when some did not fit.
fn receive_once(fd: BorrowedFd<'_>, bytes: &mut [u8]) -> io::Result<(usize, libc::c_int, Vec<OwnedFd>)> {
    let mut control = [0_u64; CONTROL_WORDS];
    let mut part = libc::iovec { iov_base: bytes.as_mut_ptr().cast(), iov_len: bytes.len() };
    // SAFETY: msghdr is plain data, for which zeros are a valid value.
    let mut header: libc::msghdr = unsafe { std::mem::zeroed() };
    header.msg_iov = &raw mut part;
    header.msg_iovlen = 1;
    header.msg_control = control.as_mut_ptr().cast();
    header.msg_controllen = size_of_val(&control);
    // SAFETY: the header names two live buffers of ours with their sizes.
    let length = unsafe { libc::recvmsg(fd.as_raw_fd(), &raw mut header, libc::MSG_CMSG_CLOEXEC) };
    let length = usize::try_from(length).map_err(|_| io::Error::last_os_error())?;
    let mut fds = Vec::new();
    // SAFETY: the kernel has filled the header and its control buffer, which is aligned for cmsghdr.
    let mut next = unsafe { libc::CMSG_FIRSTHDR(&raw const header) };
    // SAFETY: a pointer of CMSG_FIRSTHDR or CMSG_NXTHDR is null or a whole cmsghdr inside the control buffer.
    while let Some(message) = unsafe { next.as_ref() } {
        if (message.cmsg_level, message.cmsg_type) == (libc::SOL_SOCKET, libc::SCM_RIGHTS) {
            // SAFETY: only arithmetic.
            let head = unsafe { libc::CMSG_LEN(0) } as usize;
            // SAFETY: the data follows the cmsghdr inside the control buffer.
            let data = unsafe { libc::CMSG_DATA(next) }.cast::<RawFd>();
            for index in 0..message.cmsg_len.saturating_sub(head) / size_of::<RawFd>() {
                // SAFETY: cmsg_len, written by the kernel, covers this number.
                let at = unsafe { data.add(index) };
                // SAFETY: readable as just said; it need not be aligned.
                let number = unsafe { at.read_unaligned() };
                // SAFETY: the kernel just delivered this descriptor, and this is the only place that takes it.
                fds.push(unsafe { OwnedFd::from_raw_fd(number) });
            }
        }
        // SAFETY: `next` is a cmsghdr of this header's control buffer.
        next = unsafe { libc::CMSG_NXTHDR(&raw const header, next) };
    }
    Ok((length, header.msg_flags, fds))
}

/// Waits until one of `fds` can be read, or `time` has passed; says which.
pub(crate) fn wait_any(fds: &[BorrowedFd<'_>], time: Option<Duration>) -> io::Result<Vec<bool>> {
    use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
    let deadline = time.map(|time| std::time::Instant::now() + time);
    loop {
        let mut polled: Vec<PollFd<'_>> = fds.iter().map(|fd| PollFd::new(*fd, PollFlags::POLLIN)).collect();
        let left = deadline.map(|deadline| deadline.saturating_duration_since(std::time::Instant::now()));
        // Rounded up, so that the last millisecond is not spent spinning.
        let timeout = left.map_or(PollTimeout::NONE, |left| {
            let ms = i32::try_from(left.as_millis() + u128::from(!left.is_zero())).unwrap_or(i32::MAX);
            PollTimeout::try_from(ms).unwrap_or(PollTimeout::MAX)
        });
        match poll(&mut polled, timeout) {
            Err(nix::Error::EINTR) => {}
            Err(error) => return Err(error.into()),
            Ok(_) => return Ok(polled.iter().map(|fd| fd.any().unwrap_or(true)).collect()),
        }
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::panic)]
mod tests {
    use super::*;
    use std::io::{Read as _, Write as _};

    #[test]
    fn descriptors_arrive_and_are_the_same_files() {
        let (one, other) = Socket::pair().unwrap();
        let (read, write) = nix::unistd::pipe().unwrap();
        one.send(b"hello", &[write.as_fd()]).unwrap();
        drop(write);
        let Received::Message { bytes, mut fds } = other.receive().unwrap() else { panic!("no message") };
        assert_eq!((bytes.as_slice(), fds.len()), (&b"hello"[..], 1));
        std::fs::File::from(fds.remove(0)).write_all(b"through").unwrap();
        let mut text = String::new();
        std::fs::File::from(read).read_to_string(&mut text).unwrap();
        assert_eq!(text, "through");
    }

    #[test]
    fn the_largest_message_passes_and_a_larger_one_is_seen() {
        let (one, other) = Socket::pair().unwrap();
        let file = crate::memfd::create("limosa-test", 1).unwrap();
        let fds = vec![file.as_fd(); DESCRIPTORS_MAX];
        one.send(&vec![1; MESSAGE_BYTES_MAX], &fds).unwrap();
        let Received::Message { bytes, fds } = other.receive().unwrap() else { panic!("no message") };
        assert_eq!((bytes.len(), fds.len()), (MESSAGE_BYTES_MAX, DESCRIPTORS_MAX));
        one.send(&vec![1; MESSAGE_BYTES_MAX + 100], &[]).unwrap();
        assert!(matches!(other.receive().unwrap(), Received::TooLarge { .. }));
        one.send(b"x", &vec![file.as_fd(); DESCRIPTORS_MAX + 4]).unwrap();
        assert!(matches!(other.receive().unwrap(), Received::TooLarge { .. }));
        drop(one);
        assert!(matches!(other.receive().unwrap(), Received::End));
    }

    #[test]
    fn a_wait_ends_in_time_and_a_shut_socket_wakes_its_reader() {
        let (one, other) = Socket::pair().unwrap();
        assert!(!one.wait(Duration::from_millis(20)).unwrap());
        std::thread::scope(|scope| {
            let reader = scope.spawn(|| other.receive().unwrap());
            std::thread::sleep(Duration::from_millis(20));
            other.shut();
            assert!(matches!(reader.join().unwrap(), Received::End));
        });
        assert!(one.send(b"x", &[]).is_err());
    }
}
