//! The control channel: messages of the engine over an ordered byte stream, sealed or (in one process) not.
//! Two tasks: one parses what arrives, one writes what is queued, several messages at once. It does not know their order.

use crate::secure::{self, Opened, Opener, PLAIN_BYTES_MAX, RecordError, Sealer};
use limosa_proto::error::WireError;
use limosa_proto::identity::{Generation, HostId, MigrationId};
use limosa_proto::wire::frame::{CONTROL_HEADER_BYTES, ControlHeader};
use limosa_proto::wire::message::Message;
use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use tokio::io::{AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _};
use tokio::sync::mpsc;
use tokio::task::JoinHandle;

/// Messages parsed ahead of the driver; more wait in the socket.
const RECEIVED_MAX: usize = 8;
/// Bytes that may wait to be sent: all records of the largest guest, and then some.
const QUEUED_BYTES_MAX: usize = limosa_proto::record::STATE_BYTES_MAX + (8 << 20);
/// Bytes that one write takes from the queue.
const WRITE_BYTES: usize = 256 << 10;

/// Why a control channel ended.
#[derive(Debug, Clone, thiserror::Error)]
pub enum ControlError {
    /// The other side closed it.
    #[error("the other side closed the control channel")]
    Closed,
    /// The other side refused our key, after its own was accepted.
    #[error("the other side does not trust our host key")]
    KeyRefused,
    /// The stream failed.
    #[error("the control channel was cut: {0}")]
    Io(Arc<io::Error>),
    /// What arrived is not sealed as it should be.
    #[error("control channel: {0}")]
    Record(#[from] RecordError),
    /// What arrived is no message.
    #[error("control channel: {0}")]
    Wire(#[from] WireError),
    /// We have too much to say to a peer that does not read.
    #[error("the other side does not read: {0} bytes wait to be sent")]
    Stuck(usize),
    /// A message of ours is too large.
    #[error("{0}")]
    TooLarge(String),
}

impl From<io::Error> for ControlError {
    fn from(error: io::Error) -> ControlError {
        match error.kind() {
            io::ErrorKind::UnexpectedEof => ControlError::Closed,
            _ => ControlError::Io(Arc::new(error)),
        }
    }
}

/// One end of a control channel. Dropping it closes it, after what was queued has been sent.
#[derive(Debug)]
pub struct Control {
    peer: HostId,
    queue: mpsc::UnboundedSender<Vec<u8>>,
    queued: Arc<AtomicUsize>,
    received: mpsc::Receiver<Result<(ControlHeader, Message), ControlError>>,
    reader: JoinHandle<()>,
}

/// The bytes that came with a handshake: opened ones, and sealed ones behind them.
#[derive(Debug, Default)]
pub(crate) struct Early {
    pub(crate) opened: Vec<u8>,
    pub(crate) sealed: Vec<u8>,
}

impl Control {
    /// A channel over `read` and `write`, whose other end is `peer`.
    pub(crate) fn new(
        peer: HostId,
        read: impl AsyncRead + Send + Unpin + 'static,
        write: impl AsyncWrite + Send + Unpin + 'static,
        seal: Option<(Sealer, Opener)>,
        early: Early,
    ) -> Control {
        let (queue, waiting) = mpsc::unbounded_channel();
        let (into, received) = mpsc::channel(RECEIVED_MAX);
        let queued = Arc::new(AtomicUsize::new(0));
        let (sealer, opener) = seal.unzip();
        tokio::spawn(write_all(write, waiting, queued.clone(), sealer));
        let mut plain = Plain { read, opener, sealed: early.sealed, opened: early.opened };
        let reader = tokio::spawn(async move {
            loop {
                let message = plain.message().await;
                let last = message.is_err();
                if into.send(message).await.is_err() || last {
                    return;
                }
            }
        });
        Control { peer, queue, queued, received, reader }
    }

    /// Who is at the other end.
    #[must_use]
    pub fn peer(&self) -> HostId {
        self.peer
    }

    /// Queues a message; it leaves at once unless the peer does not read.
    ///
    /// # Errors
    /// The message is too large, or too much waits already. A stream that is broken shows in [`Control::receive`].
    pub fn send(&self, migration: MigrationId, generation: Generation, message: &Message) -> Result<(), ControlError> {
        let frame = message.frame(migration, generation).map_err(|error| ControlError::TooLarge(error.to_string()))?;
        let waiting = self.queued.fetch_add(frame.len(), Ordering::Relaxed);
        if waiting > QUEUED_BYTES_MAX {
            return Err(ControlError::Stuck(waiting));
        }
        // The writer is gone when the stream is broken, and then the reader says so.
        let _ = self.queue.send(frame);
        Ok(())
    }

    /// The next message. Safe to cancel.
    ///
    /// # Errors
    /// The channel ended; the same again afterwards.
    pub async fn receive(&mut self) -> Result<(ControlHeader, Message), ControlError> {
        self.received.recv().await.unwrap_or(Err(ControlError::Closed))
    }
}

impl Drop for Control {
    fn drop(&mut self) {
        self.reader.abort();
    }
}

async fn write_all(
    mut write: impl AsyncWrite + Unpin,
    mut waiting: mpsc::UnboundedReceiver<Vec<u8>>,
    queued: Arc<AtomicUsize>,
    mut sealer: Option<Sealer>,
) {
    let mut plain = Vec::new();
    let mut sealed = Vec::new();
    while let Some(first) = waiting.recv().await {
        plain.clear();
        plain.extend_from_slice(&first);
        while plain.len() < WRITE_BYTES {
            match waiting.try_recv() {
                Ok(next) => plain.extend_from_slice(&next),
                Err(_) => break,
            }
        }
        let out = match &mut sealer {
            None => &plain,
            Some(sealer) => {
                sealed.clear();
                for part in plain.chunks(PLAIN_BYTES_MAX) {
                    if sealer.seal(&mut sealed, part.len(), |inside| inside.copy_from_slice(part)).is_err() {
                        return;
                    }
                }
                &sealed
            }
        };
        if write.write_all(out).await.is_err() || write.flush().await.is_err() {
            return;
        }
        queued.fetch_sub(plain.len(), Ordering::Relaxed);
    }
    if let Some(sealer) = &mut sealer {
        sealed.clear();
        if sealer.close(&mut sealed).is_ok() {
            let _ = write.write_all(&sealed).await;
        }
    }
    let _ = write.shutdown().await;
}

/// Plaintext out of a stream that may be sealed. Also used by the accept gate before it knows what is coming.
pub(crate) struct Plain<R> {
    pub(crate) read: R,
    pub(crate) opener: Option<Opener>,
    pub(crate) sealed: Vec<u8>,
    pub(crate) opened: Vec<u8>,
}

impl<R: AsyncRead + Unpin> Plain<R> {
    /// Waits until at least `bytes` bytes of plaintext are there.
    pub(crate) async fn fill(&mut self, bytes: usize) -> Result<(), ControlError> {
        while self.opened.len() < bytes {
            let Some(opener) = &mut self.opener else {
                if self.read.read_buf(&mut self.opened).await? == 0 {
                    return Err(ControlError::Closed);
                }
                continue;
            };
            if self.sealed.len() >= secure::HEADER_BYTES {
                let whole = secure::plausible(&self.sealed)?;
                if let Some(record) = self.sealed.get_mut(..whole) {
                    match opener.open(record) {
                        Ok(Opened::Data(inside)) => self.opened.extend_from_slice(record.get(inside).unwrap_or_default()),
                        Ok(Opened::Nothing) => {}
                        Ok(Opened::End) => return Err(ControlError::Closed),
                        Err(RecordError::Alert(crate::tls::ALERT_ACCESS_DENIED)) => return Err(ControlError::KeyRefused),
                        Err(error) => return Err(error.into()),
                    }
                    self.sealed.drain(..whole);
                    continue;
                }
            }
            if self.read.read_buf(&mut self.sealed).await? == 0 {
                return Err(ControlError::Closed);
            }
        }
        Ok(())
    }

    async fn message(&mut self) -> Result<(ControlHeader, Message), ControlError> {
        self.fill(CONTROL_HEADER_BYTES).await?;
        let head: [u8; CONTROL_HEADER_BYTES] =
            self.opened.get(..CONTROL_HEADER_BYTES).and_then(|head| head.try_into().ok()).ok_or(ControlError::Closed)?;
        let header = ControlHeader::parse(&head).map_err(WireError::from)?;
        let whole = CONTROL_HEADER_BYTES + header.length as usize;
        self.fill(whole).await?;
        let body = self.opened.get(CONTROL_HEADER_BYTES..whole).unwrap_or_default();
        header.check_body(body).map_err(WireError::from)?;
        let message = Message::parse(header.kind, body).map_err(WireError::from)?;
        self.opened.drain(..whole);
        Ok((header, message))
    }
}
