//! The agent's end of the API: a UNIX socket, one request a connection, lines of JSON back. What comes from other machines is
//! answered in the same way (`desk`). What is done with a request is in `actions`; the types are in `api`.

use crate::agent::Agent;
use crate::api::{ApiError, REQUEST_BYTES_MAX, Request, Response};
use crate::audit::Who;
use crate::desk::Remote;
use crate::{actions, verdict};
use std::io;
use std::os::unix::fs::PermissionsExt as _;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;
use tokio::io::{AsyncBufReadExt as _, AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _, BufReader};
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::{Semaphore, mpsc};

/// A request must have come within this time after the connection.
const REQUEST_MAX: Duration = Duration::from_secs(10);
/// A reader that takes nothing for this long is gone.
const WRITE_MAX: Duration = Duration::from_secs(30);
/// Commands that are answered at once.
const CONNECTIONS_MAX: usize = 64;
/// Lines that wait for a slow reader; the next ones wait with the one who makes them.
const LINES_MAX: usize = 16;

/// Where an action puts its answer's lines.
#[derive(Debug, Clone)]
pub(crate) struct Replies(mpsc::Sender<Response>);

impl Replies {
    /// Sends a line; false once the command has gone away.
    pub(crate) async fn send(&self, response: Response) -> bool {
        self.0.send(response).await.is_ok()
    }

    /// Waits until the command has gone away.
    pub(crate) async fn gone(&self) {
        self.0.closed().await;
    }
}

/// Binds the API's socket, for root and the agent's own user only.
///
/// # Errors
/// The path cannot be bound.
pub(crate) fn bind(path: &Path) -> io::Result<UnixListener> {
    // A socket that a crashed agent left behind; a living agent holds the journal's lock, so this is not its socket.
    match std::fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
        _ => {}
    }
    let listener = UnixListener::bind(path)?;
    std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o600))?;
    Ok(listener)
}

/// Answers commands for ever.
pub(crate) async fn serve(agent: Arc<Agent>, listener: UnixListener) {
    let places = Arc::new(Semaphore::new(CONNECTIONS_MAX));
    loop {
        let Ok(place) = Arc::clone(&places).acquire_owned().await else { return };
        match listener.accept().await {
            Ok((stream, _)) => {
                let agent = Arc::clone(&agent);
                tokio::spawn(async move {
                    answer(agent, stream).await;
                    drop(place);
                });
            }
            Err(error) => {
                tracing::warn!(%error, "a command could not be let in");
                // Out of descriptors, mostly: trying again at once would only burn time.
                tokio::time::sleep(Duration::from_millis(100)).await;
            }
        }
    }
}

async fn answer(agent: Arc<Agent>, stream: UnixStream) {
    let user = stream.peer_cred().map(|cred| cred.uid());
    let allowed = user.as_ref().is_ok_and(|uid| *uid == 0 || *uid == nix::unistd::geteuid().as_raw());
    let (read, mut write) = stream.into_split();
    if !allowed {
        agent.metrics.refused("user");
        let words = format!("user {user:?} may not command this agent");
        return last(&mut write, Response::Error(ApiError::refused("not-allowed", words))).await;
    }
    converse(agent, read, write, &Who::local(&verdict::who(user.ok())), None).await;
}

/// Takes one request of `who` and answers it; an operator's only as far as its rules go.
pub(crate) async fn converse(
    agent: Arc<Agent>,
    read: impl AsyncRead + Unpin,
    mut write: impl AsyncWrite + Unpin,
    who: &Who,
    operator: Option<Remote>,
) {
    let mut read = BufReader::new(read);
    let request = match tokio::time::timeout(REQUEST_MAX, request(&mut read)).await {
        Ok(Ok(request)) => request,
        Ok(Err(error)) => return last(&mut write, Response::Error(error)).await,
        Err(_) => return,
    };
    if let Some(Err(error)) = operator.as_ref().map(|operator| operator.permits(&request)) {
        agent.metrics.refused("operator");
        if let Some(order) = agent.audit.order(&request, who) {
            order.answered(&Err(error.clone()));
        }
        return last(&mut write, Response::Error(error)).await;
    }
    let (sender, receiver) = mpsc::channel(LINES_MAX);
    let work = async {
        let replies = Replies(sender);
        let response = match actions::act(&agent, request, &replies, who).await {
            Ok(answer) => Response::Result(answer),
            Err(error) => Response::Error(error),
        };
        replies.send(response).await;
    };
    tokio::join!(work, write_lines(receiver, write, read, operator));
}

async fn request(read: &mut BufReader<impl AsyncRead + Unpin>) -> Result<Request, ApiError> {
    let mut line = Vec::new();
    let bad = |words: String| ApiError::usage("request", words);
    let count = read.take(REQUEST_BYTES_MAX).read_until(b'\n', &mut line).await.map_err(|e| bad(e.to_string()))?;
    if line.last() != Some(&b'\n') {
        return Err(bad(format!("a request is one line of at most {REQUEST_BYTES_MAX} bytes; {count} came without an end")));
    }
    serde_json::from_slice(&line).map_err(|e| bad(format!("this is no request: {e}")))
}

/// Writes lines until there are no more or the reader is gone.
async fn write_lines(
    mut lines: mpsc::Receiver<Response>,
    mut write: impl AsyncWrite + Unpin,
    mut read: BufReader<impl AsyncRead + Unpin>,
    operator: Option<Remote>,
) {
    let mut rest = [0_u8; 64];
    loop {
        tokio::select! {
            line = lines.recv() => match line {
                Some(line) => {
                    let shown = operator.as_ref().map_or(Ok(Some(line.clone())), |operator| operator.shown(line));
                    let sent = match shown {
                        Ok(Some(line)) => put(&mut write, &line).await,
                        Ok(None) => true,
                        Err(error) => return last(&mut write, Response::Error(error)).await,
                    };
                    if !sent {
                        return;
                    }
                }
                None => return,
            },
            // Nothing more is to come from a command: bytes are ignored, an end means that it went away.
            count = read.read(&mut rest) => if !matches!(count, Ok(1..)) {
                return;
            },
        }
    }
}

async fn put(write: &mut (impl AsyncWrite + Unpin), response: &Response) -> bool {
    let Ok(mut line) = serde_json::to_vec(response) else { return false };
    line.push(b'\n');
    matches!(tokio::time::timeout(WRITE_MAX, write.write_all(&line)).await, Ok(Ok(())))
}

pub(crate) async fn last(write: &mut (impl AsyncWrite + Unpin), response: Response) {
    put(write, &response).await;
}
