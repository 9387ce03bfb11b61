//! An operator's side of a command to an agent on another machine: which agent it is, and the way to it. The agent's side is
//! `desk`; the channel is `limosa_link::commands`. An agent that is not known is never spoken to: its key is shown, once, and
//! the operator decides.

use crate::api::{ApiError, Exchange, HostInfo, Request, Response};
use crate::hosts::{Hosts, HostsError, bad_address, with_port};
use crate::operator::OperatorKey;
use limosa_link::commands::command;
use limosa_link::control::ControlError;
use limosa_link::tls::TlsError;
use limosa_link::{CommandChannel, ConnectError, Here, HostKey, ask_key};
use limosa_proto::identity::HostId;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::mpsc;
use tokio::io::AsyncWriteExt as _;
use tokio::runtime::Runtime;

/// An agent on another machine.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Remote {
    /// As the operator calls it.
    pub name: String,
    /// Where it listens.
    pub address: String,
    /// Its key.
    pub id: HostId,
}

fn runtime() -> Result<Runtime, ApiError> {
    let made = tokio::runtime::Builder::new_current_thread().enable_all().build();
    made.map_err(|e| ApiError::refused("internal", format!("starting the runtime: {e}")))
}

/// The hosts that an operator knows: the file `hosts.toml` in `directory`.
///
/// # Errors
/// Every problem of the file.
pub fn known(directory: &Path) -> Result<Hosts, ApiError> {
    Hosts::open(directory).map_err(|e| ApiError::usage("known-hosts", e.to_string()))
}

/// Makes a host known, or changes what is known of it; `directory` is made for it.
///
/// # Errors
/// What cannot be, in words.
pub fn trust(directory: &Path, info: &HostInfo) -> Result<String, ApiError> {
    use std::os::unix::fs::DirBuilderExt as _;
    let made = std::fs::DirBuilder::new().recursive(true).mode(0o700).create(directory);
    made.map_err(|e| ApiError::usage("known-hosts", format!("{}: {e}", directory.display())))?;
    let refused = |error: HostsError| ApiError::refused("known-hosts", error.to_string());
    let host = known(directory)?.trust(info).map_err(refused)?;
    Ok(format!("{} at {} is known", host.name, host.address))
}

/// Forgets a host.
///
/// # Errors
/// It is not known, or the file cannot be written.
pub fn forget(directory: &Path, name: &str) -> Result<String, ApiError> {
    let refused = |error: HostsError| ApiError::refused("known-hosts", error.to_string());
    known(directory)?.remove(name).map_err(refused)?;
    Ok(format!("{name} is forgotten"))
}

impl Remote {
    /// The agent called `host` in the known hosts of `directory`, or at that address if `id` says whose key it is to have.
    ///
    /// # Errors
    /// It is not known; with the key that it shows, and what to do.
    pub fn find(directory: &Path, host: &str, id: Option<HostId>, key: &OperatorKey) -> Result<Remote, ApiError> {
        let known = known(directory)?;
        if let Some(found) = known.named(host) {
            if let Some(id) = id.filter(|id| *id != found.id) {
                let words = format!("{host} is known with the key {}, and --host-id is {id}", found.id);
                return Err(ApiError::usage("host-key", words));
            }
            return Ok(Remote { name: found.name, address: found.address, id: found.id });
        }
        let address = with_port(host).ok_or_else(|| ApiError::usage("host", bad_address(host)))?;
        let same = known.all().into_iter().find(|one| one.address == address);
        if let Some(id) = id.or_else(|| same.map(|one| one.id)) {
            return Ok(Remote { name: host.to_owned(), address, id });
        }
        let found = runtime()?.block_on(ask_key(&address, key.key(), Here::default())).map_err(|e| words(host, key.key(), &e))?;
        let words = format!(
            "the agent at {address} is not known here, and nothing was said to it. It shows the key\n    {found}\nIf `limosa host id` on that host prints the same, make it known: `limosa operator trust NAME {found} {address}`, or say --host-id {found}"
        );
        Err(ApiError::usage("host-unknown", words))
    }

    /// Sends `request` to it, with the operator's key.
    ///
    /// # Errors
    /// It cannot be reached, is another one, or does not know the key: in words.
    pub fn ask(&self, key: &OperatorKey, request: &Request) -> Result<Exchange, ApiError> {
        Exchange::over(self.connect(key)?, request)
    }

    /// A stream to it. What it carries is sealed by a thread that lives as long as the stream does.
    fn connect(&self, key: &OperatorKey) -> Result<UnixStream, ApiError> {
        let failed = |e: std::io::Error| ApiError::refused("internal", format!("a stream to the agent: {e}"));
        let (near, far) = UnixStream::pair().map_err(failed)?;
        far.set_nonblocking(true).map_err(failed)?;
        let runtime = runtime()?;
        let (say, said) = mpsc::channel();
        let (remote, key) = (self.clone(), key.key().clone());
        let carry = move || {
            runtime.block_on(async move {
                let opened = command(remote.address.clone(), remote.id, key.clone()).await;
                let opened = opened.map_err(|error| words(&remote.name, &key, &error)).and_then(|channel| {
                    let far = tokio::net::UnixStream::from_std(far);
                    Ok((channel, far.map_err(|e| ApiError::refused("internal", e.to_string()))?))
                });
                match opened {
                    Ok((channel, far)) => {
                        let _ = say.send(Ok(()));
                        carry(&remote.name, &key, channel, far).await;
                    }
                    Err(error) => drop(say.send(Err(error))),
                }
            });
        };
        std::thread::Builder::new().name("remote".into()).spawn(carry).map_err(failed)?;
        said.recv().map_err(|_| ApiError::refused("internal", "the way to the agent has gone"))??;
        Ok(near)
    }
}

/// Carries bytes both ways until one side has gone. An agent that says nothing at all is answered for, with the reason.
async fn carry(name: &str, key: &HostKey, channel: CommandChannel, far: tokio::net::UnixStream) {
    let (mut read, mut write) = tokio::io::split(channel.stream);
    let (mut asks, mut hears) = far.into_split();
    let say = async {
        // What cannot be said any more has a reason, which is heard.
        if tokio::io::copy(&mut asks, &mut write).await.is_err() {
            std::future::pending::<()>().await;
        }
    };
    let heard = tokio::select! {
        heard = tokio::io::copy(&mut read, &mut hears) => heard.unwrap_or(1),
        // The command has ended; it hears nothing any more.
        () = say => return,
    };
    if heard == 0
        && let Some(error) = silence(name, key, channel.ended.await.ok())
        && let Ok(mut line) = serde_json::to_vec(&Response::Error(error))
    {
        line.push(b'\n');
        let _ = hears.write_all(&line).await;
    }
    // The command may not have said anything yet, and would take a closed stream for a failure of its own before it reads.
    let _ = hears.shutdown().await;
    let _ = tokio::io::copy(&mut asks, &mut tokio::io::sink()).await;
}

/// Why an agent said nothing at all.
fn silence(name: &str, key: &HostKey, ended: Option<ControlError>) -> Option<ApiError> {
    Some(match ended? {
        ControlError::KeyRefused => key_refused(name, key),
        error => ApiError::refused("agent-lost", format!("the agent of {name} said nothing: {error}")),
    })
}

fn key_refused(name: &str, key: &HostKey) -> ApiError {
    let words = format!(
        "the agent of {name} does not know your key {id}: name it there as an [[operator]] with key = \"{id}\" in agent.toml, and `limosa allow reload` there",
        id = key.id()
    );
    ApiError::refused("operator-unknown", words)
}

/// Why an agent could not be reached, for an operator.
fn words(name: &str, key: &HostKey, error: &ConnectError) -> ApiError {
    match error {
        ConnectError::KeyRefused { .. } => key_refused(name, key),
        ConnectError::NotAllowed { address, .. } => {
            let words = format!("the agent of {name} does not allow {address} (our address): add it to [allow] peers there");
            ApiError::refused("not-allowed", words)
        }
        ConnectError::Tls { error: TlsError::DestinationOther { expected, found }, .. } => {
            let words = format!(
                "whoever answers for {name} has the key {found}, and {expected} is known: it is another machine, or the agent has a new key. Nothing was said to it. Only if `limosa host id` on that host prints {found}: `limosa operator trust {name} {found} ADDRESS`"
            );
            ApiError::refused("host-key", words)
        }
        ConnectError::Tls { error, .. } => ApiError::refused("no-agent", format!("the agent of {name}: {error}")),
        ConnectError::Crowded { .. } => {
            ApiError::refused("busy", format!("the agent of {name} has too many unfinished connections; try again"))
        }
        other => ApiError::refused("no-agent", format!("the agent of {name} cannot be reached: {other}")),
    }
}
