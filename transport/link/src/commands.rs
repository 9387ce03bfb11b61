//! An operator's command to an agent on another machine: the bytes of the agent's API, sealed, over the port that guests come
//! by. Who may do what, and what the bytes mean, is the agent's business; here is the channel, and who is at its other end.

use crate::connect::{ConnectError, TcpLink};
use crate::control::{Control, ControlError, Early, Plain};
use crate::key::HostKey;
use crate::secure::{Opener, PLAIN_BYTES_MAX, Sealer};
use crate::sessions::{FIRST_WORDS_MAX, say};
use crate::tls::TrustedHosts;
use limosa_proto::identity::HostId;
use limosa_proto::wire::code::Code;
use limosa_proto::wire::message::{Message, Refusal};
use std::net::SocketAddr;
use std::time::Duration;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _, DuplexStream, ReadHalf, WriteHalf};
use tokio::net::TcpStream;
use tokio::net::tcp::{OwnedReadHalf, OwnedWriteHalf};
use tokio::sync::oneshot;

/// Bytes that wait in each direction for a slow end; more wait with whoever makes them.
const BUFFER_BYTES: usize = 32 << 10;
/// A peer that acknowledges nothing for this long is lost.
const SILENCE_MAX: Duration = Duration::from_secs(15);

/// How long the reason is waited for why nothing can be said any more.
const ALERT_MAX: Duration = Duration::from_secs(1);

/// Who would like to command this host.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Caller {
    /// The key that was proved.
    pub id: HostId,
    /// Whether it is an operator's. Otherwise it is a host's, and a host commands nothing.
    pub operator: bool,
    /// From where.
    pub address: SocketAddr,
}

/// A channel of plain bytes whose other end is sealed. Dropping the stream closes the connection, after what was written has
/// been sent.
#[derive(Debug)]
pub struct CommandChannel {
    /// What the other side says, and what is said to it.
    pub stream: DuplexStream,
    /// Why the other side is gone, once it is.
    pub ended: oneshot::Receiver<ControlError>,
}

/// A channel over a connection whose handshake is done.
pub(crate) fn channel(stream: TcpStream, (sealer, opener): (Sealer, Opener), early: Early) -> CommandChannel {
    let (read, write) = stream.into_split();
    let (near, far) = tokio::io::duplex(BUFFER_BYTES);
    let (from, to) = tokio::io::split(far);
    let plain = Plain { read, opener: Some(opener), sealed: early.sealed, opened: early.opened };
    let (why, ended) = oneshot::channel();
    tokio::spawn(async move {
        let error = tokio::select! {
            error = open_all(plain, to) => error,
            () = async {
                if !seal_all(from, write, sealer).await {
                    // Why nothing can be said any more may be on its way: an alert.
                    tokio::time::sleep(ALERT_MAX).await;
                }
            } => ControlError::Closed,
        };
        // Nobody may be left to ask.
        let _ = why.send(error);
    });
    CommandChannel { stream: near, ended }
}

async fn open_all(mut plain: Plain<OwnedReadHalf>, mut to: WriteHalf<DuplexStream>) -> ControlError {
    loop {
        if let Err(error) = plain.fill(1).await {
            return error;
        }
        if to.write_all(&plain.opened).await.is_err() {
            // Nobody listens any more, and something may still be on its way out: that is for the other direction to end.
            std::future::pending::<()>().await;
        }
        plain.opened.clear();
    }
}

/// Until the stream is closed on this side; false if the other side takes nothing any more.
async fn seal_all(mut from: ReadHalf<DuplexStream>, mut write: OwnedWriteHalf, mut sealer: Sealer) -> bool {
    let (mut plain, mut sealed) = (vec![0; PLAIN_BYTES_MAX], Vec::new());
    while let Ok(count @ 1..) = from.read(&mut plain).await {
        let part = plain.get(..count).unwrap_or_default();
        sealed.clear();
        if sealer.seal(&mut sealed, part.len(), |inside| inside.copy_from_slice(part)).is_err()
            || write.write_all(&sealed).await.is_err()
        {
            return false;
        }
    }
    sealed.clear();
    if sealer.close(&mut sealed).is_ok() {
        let _ = write.write_all(&sealed).await;
    }
    let _ = write.shutdown().await;
    true
}

/// Tells whoever shows an operator's key and begins to send a guest that this is a host's part.
pub(crate) async fn no_guest(mut control: Control) {
    let Ok(Ok((header, _))) = tokio::time::timeout(FIRST_WORDS_MAX, control.receive()).await else { return };
    let words = format!(
        "the key {} is an operator's here: it may command this host (`limosa --host`), and sends no guest; a guest comes from a host, with the host's own key",
        control.peer()
    );
    tracing::warn!(operator = %control.peer(), "an operator's key was used to send a guest, and was refused");
    say(&control, header.migration, header.generation, &Message::Refuse(Refusal::one(Code::NotAHost, words)));
}

/// Opens a channel to the agent at `address` ("host:port"), which must have the key `agent`; `key` is shown.
///
/// # Errors
/// It cannot be reached, has another key, or does not let us in. That it does not know `key` shows when it is read from.
pub async fn command(address: String, agent: HostId, key: HostKey) -> Result<CommandChannel, ConnectError> {
    let link = TcpLink::new(address, agent, key, TrustedHosts::new([agent]), SILENCE_MAX);
    let (stream, secured) = link.secured(false).await?;
    Ok(channel(stream, (secured.sealer, secured.opener), Early { opened: Vec::new(), sealed: secured.early }))
}
