//! Lanes and the control channel over QUIC streams. A lane's thread blocks on its stream; pages are copied once into buffers
//! that quinn sends from, and once out of the packets that arrived. Whose stream it is was decided before.

use crate::lanes::{LaneCloser, LaneReceiver, LaneSender};
use crate::pages::{Pages, Pieces};
use bytes::Bytes;
use limosa_proto::memory::PageRange;
use quinn::{ConnectionError, ReadError, RecvStream, SendStream, VarInt, WriteError};
use std::future::Future;
use std::io;
use std::pin::Pin;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::task::{Context, Poll};
use std::time::Duration;
use tokio::io::AsyncWrite;
use tokio::runtime::Handle;
use tokio::sync::watch;

/// How long what was written last may take to be acknowledged after nobody needs its connection any more.
const LINGER_MAX: Duration = Duration::from_secs(1);
/// Bytes handed to quinn at once. It searches what is not acknowledged piece by piece for each packet, so pieces are large.
const BUFFER_BYTES: usize = 1 << 20;
/// Buffers kept for the next pages; more are given back to the system.
const SPARE_MAX: usize = 16;
/// Pieces of packets that are taken from quinn at once.
const PIECES: usize = 64;
/// Why a stream ends before its time.
pub(super) const CUT: VarInt = VarInt::from_u32(1);

/// Keeps a connection until what was written on `stream` has arrived, or a moment has passed.
fn linger(mut stream: SendStream) -> impl Future<Output = ()> {
    // One that was stopped or lost has nothing more to say.
    let _ = stream.finish();
    async move {
        let _ = tokio::time::timeout(LINGER_MAX, stream.stopped()).await;
    }
}

/// How many streams of a connection are in use; what holds one counts.
#[derive(Debug, Clone, Default)]
pub(super) struct Uses(Arc<AtomicUsize>);

impl Uses {
    pub(super) fn count(&self) -> usize {
        self.0.load(Ordering::Relaxed)
    }

    pub(super) fn one_more(&self) -> Use {
        self.0.fetch_add(1, Ordering::Relaxed);
        Use(self.0.clone())
    }
}

/// One stream that is in use.
#[derive(Debug)]
pub(super) struct Use(Arc<AtomicUsize>);

impl Drop for Use {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}

/// The writing half of a control channel. Shutting it down sends what is left, and keeps the connection so long.
#[derive(Debug)]
pub(super) struct ControlWrite {
    stream: Option<SendStream>,
    in_use: Option<Use>,
}

impl ControlWrite {
    pub(super) fn new(stream: SendStream, in_use: Option<Use>) -> ControlWrite {
        ControlWrite { stream: Some(stream), in_use }
    }
}

impl AsyncWrite for ControlWrite {
    fn poll_write(mut self: Pin<&mut Self>, context: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        match &mut self.stream {
            Some(stream) => Pin::new(stream).poll_write(context, bytes).map_err(write_error),
            None => Poll::Ready(Err(io::ErrorKind::BrokenPipe.into())),
        }
    }

    fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        if let Some(stream) = self.stream.take() {
            let (in_use, lingering) = (self.in_use.take(), linger(stream));
            tokio::spawn(async move {
                lingering.await;
                drop(in_use);
            });
        }
        Poll::Ready(Ok(()))
    }
}

fn lost(error: ConnectionError) -> io::Error {
    let kind = match &error {
        ConnectionError::TimedOut => io::ErrorKind::TimedOut,
        _ => io::ErrorKind::ConnectionReset,
    };
    io::Error::new(kind, error)
}

fn write_error(error: WriteError) -> io::Error {
    match error {
        WriteError::ConnectionLost(error) => lost(error),
        WriteError::Stopped(_) => io::Error::new(io::ErrorKind::BrokenPipe, error),
        error => error.into(),
    }
}

pub(super) fn read_error(error: ReadError) -> io::Error {
    match error {
        ReadError::ConnectionLost(error) => lost(error),
        ReadError::Reset(_) => io::Error::new(io::ErrorKind::ConnectionReset, error),
        error => error.into(),
    }
}

/// What ends a blocked call from another thread.
#[derive(Debug)]
struct Stop {
    handle: Handle,
    told: watch::Sender<bool>,
    heard: watch::Receiver<bool>,
}

impl Stop {
    /// Must be called within a tokio runtime.
    fn new() -> Stop {
        let (told, heard) = watch::channel(false);
        Stop { handle: Handle::current(), told, heard }
    }

    fn closer(&self) -> LaneCloser {
        let told = self.told.clone();
        LaneCloser::new(move || {
            told.send_replace(true);
        })
    }

    /// Blocks this thread, which must not be one of the runtime's, until `work` is done or the lane is closed.
    fn block_on<T>(&mut self, work: impl Future<Output = io::Result<T>>) -> io::Result<T> {
        let heard = &mut self.heard;
        self.handle.block_on(async {
            tokio::select! {
                biased;
                _ = heard.wait_for(|stop| *stop) => Err(io::ErrorKind::ConnectionAborted.into()),
                done = work => done,
            }
        })
    }
}

/// Buffers that come back when quinn has no more use for them.
type Spare = Arc<Mutex<Vec<Box<[u8]>>>>;

/// A buffer on loan to quinn.
struct Lent {
    buffer: Box<[u8]>,
    filled: usize,
    spare: Spare,
}

impl AsRef<[u8]> for Lent {
    fn as_ref(&self) -> &[u8] {
        self.buffer.get(..self.filled).unwrap_or_default()
    }
}

impl Drop for Lent {
    fn drop(&mut self) {
        let mut spare = self.spare.lock().unwrap_or_else(PoisonError::into_inner);
        if spare.len() < SPARE_MAX {
            spare.push(std::mem::take(&mut self.buffer));
        }
    }
}

/// The sending end of a lane.
pub(super) struct QuicSender {
    stream: Option<SendStream>,
    stop: Stop,
    spare: Spare,
    bytes: u64,
}

impl QuicSender {
    /// Must be called within a tokio runtime.
    pub(super) fn new(stream: SendStream) -> QuicSender {
        QuicSender { stream: Some(stream), stop: Stop::new(), spare: Spare::default(), bytes: 0 }
    }

    fn send(&mut self, bytes: Bytes) -> io::Result<()> {
        let length = bytes.len() as u64;
        let stream = self.stream.as_mut().ok_or(io::ErrorKind::BrokenPipe)?;
        self.stop.block_on(async { stream.write_chunk(bytes).await.map_err(write_error) })?;
        self.bytes += length;
        Ok(())
    }

    /// A buffer of which the first `filled` bytes will be sent, once `fill` has written them.
    fn lend(&self, filled: usize, fill: impl FnOnce(&mut [u8])) -> Bytes {
        let spare = self.spare.lock().unwrap_or_else(PoisonError::into_inner).pop();
        let mut buffer = spare.unwrap_or_else(|| vec![0; BUFFER_BYTES].into_boxed_slice());
        let filled = filled.min(buffer.len());
        fill(buffer.get_mut(..filled).unwrap_or_default());
        Bytes::from_owner(Lent { buffer, filled, spare: self.spare.clone() })
    }
}

impl LaneSender for QuicSender {
    fn head(&mut self, head: &[u8]) -> io::Result<()> {
        self.send(Bytes::copy_from_slice(head))
    }

    fn pages(&mut self, head: &[u8], pages: &dyn Pages, runs: &[PageRange]) -> io::Result<()> {
        self.head(head)?;
        let mut left = runs.iter().map(|run| run.bytes()).sum::<u64>();
        let mut pieces = Pieces::new(runs);
        while left > 0 {
            let here = usize::try_from(left).unwrap_or(BUFFER_BYTES).min(BUFFER_BYTES);
            let bytes = self.lend(here, |mut out| {
                while !out.is_empty() {
                    let Some((range, offset, length)) = pieces.next(out.len()).filter(|piece| piece.2 > 0) else { break };
                    let (now, rest) = std::mem::take(&mut out).split_at_mut(length);
                    pages.read(range, offset, now);
                    out = rest;
                }
            });
            self.send(bytes)?;
            left -= here as u64;
        }
        Ok(())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }

    fn finish(&mut self) -> io::Result<()> {
        if let Some(stream) = self.stream.take() {
            self.stop.handle.spawn(linger(stream));
        }
        Ok(())
    }

    fn closer(&self) -> io::Result<LaneCloser> {
        Ok(self.stop.closer())
    }

    fn bytes_on_wire(&self) -> u64 {
        self.bytes
    }
}

impl Drop for QuicSender {
    fn drop(&mut self) {
        if let Some(stream) = &mut self.stream {
            // Dropped as it is it would end as if all had been said.
            let _ = stream.reset(CUT);
        }
    }
}

/// The receiving end of a lane.
pub(super) struct QuicReceiver {
    stream: RecvStream,
    answer: Option<SendStream>,
    stop: Stop,
    /// Pieces that arrived, the first `arrived` of them good, from `next` on not used yet.
    pieces: Box<[Bytes]>,
    next: usize,
    arrived: usize,
    bytes: u64,
    _in_use: Use,
}

impl QuicReceiver {
    /// Must be called within a tokio runtime.
    pub(super) fn new(stream: RecvStream, answer: SendStream, in_use: Use) -> QuicReceiver {
        let pieces = vec![Bytes::new(); PIECES].into_boxed_slice();
        QuicReceiver { stream, answer: Some(answer), stop: Stop::new(), pieces, next: 0, arrived: 0, bytes: 0, _in_use: in_use }
    }

    /// Up to `most` bytes of what comes next, at least one.
    fn take(&mut self, most: usize) -> io::Result<Bytes> {
        loop {
            if let Some(piece) = self.pieces.get_mut(self.next).filter(|_| self.next < self.arrived) {
                if piece.len() > most {
                    return Ok(piece.split_to(most));
                }
                self.next += 1;
                let piece = std::mem::take(piece);
                if piece.is_empty() {
                    continue;
                }
                return Ok(piece);
            }
            let (stream, pieces) = (&mut self.stream, &mut self.pieces);
            let read = self.stop.block_on(async { stream.read_chunks(pieces).await.map_err(read_error) })?;
            (self.next, self.arrived) = (0, read.ok_or(io::ErrorKind::UnexpectedEof)?);
        }
    }
}

impl LaneReceiver for QuicReceiver {
    fn head(&mut self, mut out: &mut [u8]) -> io::Result<()> {
        while !out.is_empty() {
            let part = self.take(out.len())?;
            let (now, rest) = std::mem::take(&mut out).split_at_mut(part.len());
            now.copy_from_slice(&part);
            out = rest;
            self.bytes += part.len() as u64;
        }
        Ok(())
    }

    fn pages(&mut self, pages: &dyn Pages, runs: &[PageRange]) -> io::Result<()> {
        let mut pieces = Pieces::new(runs);
        while let Some((range, mut offset, mut length)) = pieces.next(usize::MAX) {
            while length > 0 {
                let part = self.take(length)?;
                pages.write(range, offset, &part);
                offset += part.len() as u64;
                length -= part.len();
                self.bytes += part.len() as u64;
            }
        }
        Ok(())
    }

    /// Leaves by itself: this may be called where nothing may block.
    fn acknowledge(&mut self, bytes: &[u8]) -> io::Result<()> {
        let mut answer = self.answer.take().ok_or(io::ErrorKind::BrokenPipe)?;
        let bytes = Bytes::copy_from_slice(bytes);
        self.stop.handle.spawn(async move {
            // A source that is gone needs no answer.
            if answer.write_chunk(bytes).await.is_ok() {
                linger(answer).await;
            }
        });
        Ok(())
    }

    fn closer(&self) -> io::Result<LaneCloser> {
        Ok(self.stop.closer())
    }

    fn bytes_on_wire(&self) -> u64 {
        self.bytes
    }
}
