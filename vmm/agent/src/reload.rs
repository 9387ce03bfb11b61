//! Reading the configuration again without a restart: SIGHUP, and `limosa allow reload`. Only who may is taken from it: the
//! allow-lists, the fleet's statements, the operators. A bad
//! file is refused in words, and everything stays as it was.

use crate::agent::Agent;
use crate::api::ApiError;
use crate::config::Config;
use crate::cutting;
use crate::operators::Operators;
use std::sync::Arc;
use tokio::signal::unix::{SignalKind, signal};

/// Takes the allow-lists from the configuration as it is now. May block.
///
/// # Errors
/// The file is bad, or a name in it cannot be looked up: nothing is changed.
pub(crate) fn reload(agent: &Agent) -> Result<String, ApiError> {
    let kept = "; what was read before stays";
    let refused = |words: String| ApiError::usage("configuration", format!("{words}{kept}"));
    let next = Config::load(agent.config.file.as_deref()).map_err(|e| refused(e.to_string()))?;
    if let Some(words) = next.unresolved.first() {
        return Err(refused(words.clone()));
    }
    let hosts = agent.hosts.all().into_iter().map(|host| host.id).chain([agent.key.id()]);
    if let Some(both) = Operators::new(next.operators.clone()).both(hosts) {
        return Err(refused(format!("the key of operator {} is a host's: an operator needs a key of its own", both.name)));
    }
    // A bad one of the two changes neither: rules are read whole before they are taken, and statements are read first.
    let warnings = agent.hosts.read_statements(&next.trust).map_err(|e| refused(e.to_string()))?;
    warnings.iter().for_each(|words| tracing::warn!("{words}"));
    let before = agent.rules.reload(&next).map_err(|e| ApiError { words: format!("{}{kept}", e.words), ..e })?;
    agent.operators.replace(next.operators.clone());
    let cut = cutting::cut(agent, Some(&before));
    let more = if others(&next) == others(&agent.config) {
        String::new()
    } else {
        "; other settings have changed too, which the agent takes at its next start".to_owned()
    };
    let lists = agent.rules.lists();
    let here = if lists.here.is_set() { lists.here.rules().count().to_string() } else { "no".to_owned() };
    let peers = lists.peers.networks().len();
    let operators = next.operators.len();
    Ok(format!(
        "who may was read again: {peers} rules for peers, {here} for this host's addresses, {operators} operators{cut}{more}"
    ))
}

/// Everything that is not taken, to be compared.
fn others(config: &Config) -> String {
    let usual = Config::default();
    let (allow, here, trust, vmm_command) = (usual.allow, usual.here, usual.trust, usual.vmm_command);
    let (warnings, unresolved, operators) = (Vec::new(), Vec::new(), Vec::new());
    format!("{:?}", Config { allow, here, trust, vmm_command, warnings, unresolved, operators, ..config.clone() })
}

/// Reloads whenever the process gets SIGHUP.
///
/// # Errors
/// The signal cannot be heard.
pub(crate) fn on_hangup(agent: &Arc<Agent>) -> Result<(), ApiError> {
    let mut hangup = signal(SignalKind::hangup()).map_err(|e| ApiError::refused("agent", format!("SIGHUP: {e}")))?;
    let agent = Arc::clone(agent);
    tokio::spawn(async move {
        while hangup.recv().await.is_some() {
            let reloading = Arc::clone(&agent);
            match tokio::task::spawn_blocking(move || reload(&reloading)).await {
                Ok(Ok(words)) => tracing::info!("SIGHUP: {words}"),
                Ok(Err(error)) => tracing::error!("SIGHUP: {error}"),
                Err(error) => tracing::error!(%error, "SIGHUP: reading the configuration failed inside"),
            }
        }
    });
    Ok(())
}
