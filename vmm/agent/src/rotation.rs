//! This host's own new key: made beside the old one, announced by a statement that both have signed, and taken when the overlap
//! ends or a person says so. What other hosts do with the statement is `hosts`'.

use crate::agent::Agent;
use crate::api::{Answer, ApiError};
use crate::durable::replace_file;
use crate::jobs::unix_ms;
use crate::journal::sync_directory;
use limosa_link::HostKey;
use limosa_proto::identity::HostId;
use limosa_proto::statement::{Statement, Succession};
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

/// The shortest and the longest overlap, in seconds.
const OVERLAP_S: std::ops::RangeInclusive<u64> = 1..=90 * 86_400;
/// The new key is taken this part of the overlap before its end, but no more than [`LEAD_MAX_S`]: other hosts' clocks go on their
/// own, and they refuse the old key when it ends.
const LEAD_PART: u64 = 10;
const LEAD_MAX_S: u64 = 600;
/// How often it is looked whether the time has come.
const LOOK: Duration = Duration::from_secs(1);

/// A rotation that has begun.
struct Pending {
    text: String,
    said: Succession,
    /// When the new key is taken, in seconds since 1970.
    switch: u64,
}

fn files(directory: &Path) -> (PathBuf, PathBuf, PathBuf) {
    (directory.join("host.key"), directory.join("host.key.next"), directory.join("host.rotation"))
}

fn refused(words: impl Into<String>) -> ApiError {
    ApiError::refused("rotation", words)
}

fn failed(file: &Path) -> impl Fn(io::Error) -> ApiError + '_ {
    move |error| refused(format!("{}: {error}", file.display()))
}

/// The rotation that has begun, if one has.
fn pending(directory: &Path) -> Result<Option<Pending>, ApiError> {
    let (_, next, file) = files(directory);
    let whole = match std::fs::read_to_string(&file) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        read => read.map_err(failed(&file))?,
    };
    if !next.exists() {
        // The new key was taken, and a crash came before this file was removed.
        std::fs::remove_file(&file).map_err(failed(&file))?;
        return Ok(None);
    }
    let mut lines = whole.lines();
    let (text, switch) = (lines.next().unwrap_or_default(), lines.next().and_then(|line| line.parse().ok()));
    match (Statement::parse(text, None), switch) {
        (Ok(Statement::Succession(said)), Some(switch)) => Ok(Some(Pending { text: text.to_owned(), said, switch })),
        (Err(error), _) => Err(refused(format!("{}: {error}", file.display()))),
        _ => Err(refused(format!("{} is damaged", file.display()))),
    }
}

/// Begins a rotation with an overlap of so many seconds, or gives the statement of the one that has begun.
///
/// # Errors
/// The overlap is too short or too long, or a file cannot be written.
pub(crate) fn begin(agent: &Agent, overlap: u64) -> Result<Answer, ApiError> {
    let directory = &agent.config.state_dir;
    if let Some(pending) = pending(directory)? {
        return Ok(Answer::Lines(vec![pending.text]));
    }
    if !OVERLAP_S.contains(&overlap) {
        return Err(ApiError::usage("overlap", "an overlap is from one second to 90 days"));
    }
    let (_, next, file) = files(directory);
    // Of a rotation that a crash ended before its statement was there; nobody can know that key.
    match std::fs::remove_file(&next) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(failed(&next)(error)),
        _ => {}
    }
    let bad = |error: limosa_link::HostKeyError| refused(error.to_string());
    let new = HostKey::generate().map_err(bad)?;
    new.save(&next).map_err(bad)?;
    let now = unix_ms() / 1000;
    let said = Succession { old: agent.key.id(), new: new.id(), until: now + overlap };
    let signatures = (agent.key.sign(&said.to_sign()).map_err(bad)?, new.sign(&said.to_sign()).map_err(bad)?);
    let text = said.text(&signatures.0, &signatures.1);
    let switch = said.until - (overlap / LEAD_PART).min(LEAD_MAX_S);
    replace_file(&file, format!("{text}\n{switch}\n").as_bytes()).map_err(failed(&file))?;
    tracing::warn!(old = %said.old, new = %said.new, until = said.until, "this host's key is being replaced");
    Ok(Answer::Lines(vec![text]))
}

/// Whether `id` is the key that this host is about to take: hosts that were told know it by that.
pub(crate) fn is_next(agent: &Agent, id: HostId) -> bool {
    pending(&agent.config.state_dir).is_ok_and(|pending| pending.is_some_and(|pending| pending.said.new == id))
}

/// Takes the new key now.
///
/// # Errors
/// No rotation has begun, or a file cannot be written.
pub(crate) fn finish(agent: &Agent) -> Result<Answer, ApiError> {
    let directory = &agent.config.state_dir;
    let (key, next, file) = files(directory);
    let Some(pending) = pending(directory)? else {
        return Err(refused("no rotation has begun: `limosa host rotate` begins one"));
    };
    let new = HostKey::load(&next).map_err(|e| refused(e.to_string()))?;
    if new.id() != pending.said.new {
        return Err(refused(format!("{} is not the key of the statement in {}", next.display(), file.display())));
    }
    // The old key is gone with this; whoever knows the statement knows who the new one is.
    std::fs::rename(&next, &key).map_err(failed(&key))?;
    sync_directory(directory).map_err(failed(&key))?;
    agent.key.become_key(&new);
    std::fs::remove_file(&file).map_err(failed(&file))?;
    tracing::warn!(id = %new.id(), "this host has its new key");
    Ok(Answer::Done(format!("this host's key is {} from now on", new.id())))
}

/// Takes the new key when its time has come.
pub(crate) fn watch(agent: &Arc<Agent>) {
    let agent = Arc::clone(agent);
    tokio::spawn(async move {
        let mut look = tokio::time::interval(LOOK);
        while !agent.is_stopping() {
            look.tick().await;
            let due = match pending(&agent.config.state_dir) {
                Ok(pending) => pending.is_some_and(|pending| pending.switch <= unix_ms() / 1000),
                Err(error) => {
                    tracing::error!(%error, "the new key of this host cannot be taken");
                    return;
                }
            };
            if due && let Err(error) = finish(&agent) {
                tracing::error!(%error, "the new key of this host cannot be taken");
                return;
            }
        }
    });
}
