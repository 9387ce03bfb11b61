//! Lanes over a stream socket, with blocking calls on the lane's own thread: plain ones, whose pages go straight between
//! socket and guest memory, and TLS ones, whose pages are copied once. Also the settings of TCP sockets.
//! It knows frames only as a head and pages; `lanes.rs` says what is in them.

use crate::lanes::{LaneCloser, LaneReceiver, LaneSender};
use crate::pages::{Pages, Pieces};
use crate::secure::{self, Opened, Opener, PLAIN_BYTES_MAX, RecordError, Sealer};
use limosa_proto::memory::PageRange;
use socket2::{SockRef, Socket, TcpKeepalive};
use std::io::{self, Read as _, Write as _};
use std::net::Shutdown;
use std::ops::Range;
use std::os::fd::AsFd;
use std::time::Duration;

/// Bytes that may wait in a lane's send buffer (the kernel doubles it). What waits is read again by the destination's copy or by
/// the network card: 1 MiB stays in a core's cache, 4 MiB do not and cost 6 % on loopback. 2 MiB in flight are 10 Gbit/s at
/// 1.6 ms; longer paths take more lanes. The receive buffer is left to the kernel, which sizes it to the path.
const LANE_SEND_BYTES: usize = 1 << 20;
/// Sealed bytes handed to the kernel at once: large enough that calls do not count, small enough for a core's cache.
const SEALED_WRITE_BYTES: usize = 256 << 10;
/// Room for received records.
const RECEIVE_BYTES: usize = 512 << 10;
/// What is read ahead behind a frame's pages: the next frame's header and its first run.
const AHEAD_BYTES: usize = 48 + 12;

/// Settings that every TCP socket of a migration has: no waiting to fill a segment, and an end to a silent peer.
pub(crate) fn set_up(socket: &SockRef<'_>, silence_max: Duration) -> io::Result<()> {
    socket.set_tcp_nodelay(true)?;
    socket.set_tcp_keepalive(
        &TcpKeepalive::new().with_time(Duration::from_secs(5)).with_interval(Duration::from_secs(2)).with_retries(3),
    )?;
    socket.set_tcp_user_timeout(Some(silence_max))
}

/// A lane's send buffer. Only who may exceed the system's bound sets it; for others the kernel's own growing is better
/// than what the bound would leave.
pub(crate) fn set_up_lane(socket: &impl AsFd) {
    use nix::sys::socket::{setsockopt, sockopt};
    let _ = setsockopt(socket, sockopt::SndBufForce, &LANE_SEND_BYTES);
}

fn closer(socket: &Socket) -> io::Result<LaneCloser> {
    let socket = socket.try_clone()?;
    Ok(LaneCloser::new(move || {
        // A socket that is closed already is as closed as it can be.
        let _ = socket.shutdown(Shutdown::Both);
    }))
}

fn again(error: &io::Error) -> bool {
    error.kind() == io::ErrorKind::Interrupted
}

/// The sending end of a plaintext lane.
pub(crate) struct PlainSender {
    socket: Socket,
    bytes: u64,
}

impl PlainSender {
    pub(crate) fn new(socket: Socket) -> PlainSender {
        PlainSender { socket, bytes: 0 }
    }
}

impl LaneSender for PlainSender {
    fn head(&mut self, head: &[u8]) -> io::Result<()> {
        self.socket.write_all(head)?;
        self.bytes += head.len() as u64;
        Ok(())
    }

    fn pages(&mut self, head: &[u8], pages: &dyn Pages, runs: &[PageRange]) -> io::Result<()> {
        let whole = head.len() as u64 + runs.iter().map(|run| run.bytes()).sum::<u64>();
        let mut done = 0;
        while done < whole {
            match pages.gather(self.socket.as_fd(), head, runs, done, false) {
                Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
                Ok(sent) => done += sent as u64,
                Err(error) if again(&error) => {}
                Err(error) => return Err(error),
            }
        }
        self.bytes += whole;
        Ok(())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }

    fn finish(&mut self) -> io::Result<()> {
        self.socket.shutdown(Shutdown::Write)
    }

    fn closer(&self) -> io::Result<LaneCloser> {
        closer(&self.socket)
    }

    fn bytes_on_wire(&self) -> u64 {
        self.bytes
    }
}

/// The receiving end of a plaintext lane.
pub(crate) struct PlainReceiver {
    socket: Socket,
    /// Read ahead and not yet used: never any byte of a page, since a frame with pages has a header and a run at least.
    ahead: Vec<u8>,
    bytes: u64,
}

impl PlainReceiver {
    pub(crate) fn new(socket: Socket) -> PlainReceiver {
        PlainReceiver { socket, ahead: Vec::new(), bytes: 0 }
    }
}

impl LaneReceiver for PlainReceiver {
    fn head(&mut self, out: &mut [u8]) -> io::Result<()> {
        let ready = self.ahead.len().min(out.len());
        let (now, rest) = out.split_at_mut(ready);
        for (to, from) in now.iter_mut().zip(self.ahead.drain(..ready)) {
            *to = from;
        }
        self.bytes += rest.len() as u64;
        if rest.is_empty() { Ok(()) } else { self.socket.read_exact(rest) }
    }

    fn pages(&mut self, pages: &dyn Pages, runs: &[PageRange]) -> io::Result<()> {
        let whole = runs.iter().map(|run| run.bytes()).sum::<u64>();
        if !self.ahead.is_empty() {
            return Err(io::Error::new(io::ErrorKind::InvalidData, "a frame's pages were read as a header"));
        }
        let mut done = 0;
        let mut tail = [0; AHEAD_BYTES];
        while done < whole {
            match pages.scatter(self.socket.as_fd(), runs, done, &mut tail) {
                Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
                Ok(received) => done += received as u64,
                Err(error) if again(&error) => {}
                Err(error) => return Err(error),
            }
        }
        let more = usize::try_from(done - whole).unwrap_or(0).min(AHEAD_BYTES);
        self.ahead.extend_from_slice(tail.get(..more).unwrap_or_default());
        self.bytes += done;
        Ok(())
    }

    fn acknowledge(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.socket.write_all(bytes)
    }

    fn closer(&self) -> io::Result<LaneCloser> {
        closer(&self.socket)
    }

    fn bytes_on_wire(&self) -> u64 {
        self.bytes
    }
}

/// The sending end of a TLS lane.
pub(crate) struct SecureSender {
    socket: Socket,
    sealer: Sealer,
    out: Vec<u8>,
    bytes: u64,
}

impl SecureSender {
    pub(crate) fn new(socket: Socket, sealer: Sealer) -> SecureSender {
        SecureSender { socket, sealer, out: Vec::with_capacity(SEALED_WRITE_BYTES + secure::RECORD_BYTES_MAX), bytes: 0 }
    }

    fn write_if(&mut self, from: usize) -> io::Result<()> {
        if self.out.len() >= from && !self.out.is_empty() {
            self.socket.write_all(&self.out)?;
            self.bytes += self.out.len() as u64;
            self.out.clear();
        }
        Ok(())
    }
}

impl LaneSender for SecureSender {
    fn head(&mut self, head: &[u8]) -> io::Result<()> {
        for part in head.chunks(PLAIN_BYTES_MAX) {
            self.sealer.seal(&mut self.out, part.len(), |plain| plain.copy_from_slice(part))?;
        }
        self.write_if(SEALED_WRITE_BYTES)
    }

    fn pages(&mut self, head: &[u8], pages: &dyn Pages, runs: &[PageRange]) -> io::Result<()> {
        self.head(head)?;
        let mut left = runs.iter().map(|run| run.bytes()).sum::<u64>();
        let mut pieces = Pieces::new(runs);
        while left > 0 {
            let here = usize::try_from(left).unwrap_or(PLAIN_BYTES_MAX).min(PLAIN_BYTES_MAX);
            self.sealer.seal(&mut self.out, here, |mut plain| {
                while let Some((range, offset, length)) = pieces.next(plain.len()).filter(|piece| piece.2 > 0) {
                    let (now, rest) = std::mem::take(&mut plain).split_at_mut(length);
                    pages.read(range, offset, now);
                    plain = rest;
                    if plain.is_empty() {
                        break;
                    }
                }
            })?;
            left -= here as u64;
            self.write_if(SEALED_WRITE_BYTES)?;
        }
        Ok(())
    }

    fn flush(&mut self) -> io::Result<()> {
        self.write_if(0)
    }

    fn finish(&mut self) -> io::Result<()> {
        self.sealer.close(&mut self.out)?;
        self.flush()?;
        self.socket.shutdown(Shutdown::Write)
    }

    fn closer(&self) -> io::Result<LaneCloser> {
        closer(&self.socket)
    }

    fn bytes_on_wire(&self) -> u64 {
        self.bytes
    }
}

/// The receiving end of a TLS lane: records are opened in place in one buffer.
pub(crate) struct SecureReceiver {
    socket: Socket,
    sealer: Sealer,
    opener: Opener,
    buffer: Vec<u8>,
    /// Received and not yet opened.
    sealed: Range<usize>,
    /// Opened and not yet used.
    plain: Range<usize>,
    bytes: u64,
}

impl SecureReceiver {
    /// `early` are sealed bytes and `opened` plaintext that arrived with the handshake.
    pub(crate) fn new(socket: Socket, sealer: Sealer, opener: Opener, opened: &[u8], early: &[u8]) -> SecureReceiver {
        let mut buffer = [opened, early].concat();
        let (plain, sealed) = (0..opened.len(), opened.len()..buffer.len());
        buffer.resize(RECEIVE_BYTES.max(buffer.len() + secure::RECORD_BYTES_MAX), 0);
        SecureReceiver { socket, sealer, opener, buffer, sealed, plain, bytes: 0 }
    }

    /// Opens records until there is plaintext.
    fn fill(&mut self) -> io::Result<()> {
        while self.plain.is_empty() {
            let waiting = self.buffer.get_mut(self.sealed.clone()).unwrap_or_default();
            if waiting.len() >= secure::HEADER_BYTES {
                let whole = secure::plausible(waiting)?;
                if let Some(record) = waiting.get_mut(..whole) {
                    let start = self.sealed.start;
                    match self.opener.open(record)? {
                        Opened::Data(inside) => self.plain = start + inside.start..start + inside.end,
                        Opened::Nothing => {}
                        Opened::End => return Err(io::ErrorKind::UnexpectedEof.into()),
                    }
                    self.sealed.start += whole;
                    continue;
                }
            }
            self.receive()?;
        }
        Ok(())
    }

    fn receive(&mut self) -> io::Result<()> {
        if self.sealed.is_empty() {
            self.sealed = 0..0;
        } else if self.buffer.len() - self.sealed.end < secure::RECORD_BYTES_MAX {
            self.buffer.copy_within(self.sealed.clone(), 0);
            self.sealed = 0..self.sealed.len();
        }
        loop {
            match self.socket.read(self.buffer.get_mut(self.sealed.end..).unwrap_or_default()) {
                Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
                Ok(received) => {
                    self.sealed.end += received;
                    self.bytes += received as u64;
                    return Ok(());
                }
                Err(error) if again(&error) => {}
                Err(error) => return Err(error),
            }
        }
    }

    /// Up to `bytes` bytes of plaintext, at least one.
    fn take(&mut self, bytes: usize) -> io::Result<&[u8]> {
        self.fill()?;
        let here = self.plain.len().min(bytes);
        let from = self.plain.start;
        self.plain.start += here;
        self.buffer.get(from..from + here).ok_or_else(|| RecordError::Malformed.into())
    }
}

impl LaneReceiver for SecureReceiver {
    fn head(&mut self, mut out: &mut [u8]) -> io::Result<()> {
        while !out.is_empty() {
            let part = self.take(out.len())?;
            let (now, rest) = std::mem::take(&mut out).split_at_mut(part.len());
            now.copy_from_slice(part);
            out = rest;
        }
        Ok(())
    }

    fn pages(&mut self, pages: &dyn Pages, runs: &[PageRange]) -> io::Result<()> {
        let mut pieces = Pieces::new(runs);
        self.fill()?;
        while let Some((range, offset, length)) = pieces.next(self.plain.len()) {
            let mut done = 0;
            while done < length {
                let part = self.take(length - done)?;
                pages.write(range, offset + done as u64, part);
                done += part.len();
            }
            if !pieces.is_done() {
                self.fill()?;
            }
        }
        Ok(())
    }

    fn acknowledge(&mut self, bytes: &[u8]) -> io::Result<()> {
        let mut out = Vec::new();
        self.sealer.seal(&mut out, bytes.len(), |plain| plain.copy_from_slice(bytes))?;
        self.socket.write_all(&out)
    }

    fn closer(&self) -> io::Result<LaneCloser> {
        closer(&self.socket)
    }

    fn bytes_on_wire(&self) -> u64 {
        self.bytes
    }
}
