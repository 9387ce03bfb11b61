//! The agent as a process: sockets, threads, signals, and a clean end.
//! What it does all day is in the other files.

use crate::agent::Agent;
use crate::api::{ApiError, Direction};
use crate::config::Config;
use crate::incoming::Reception;
use crate::{disks, links, metrics, reload, rotation, serve, settle, vms};
use limosa_link::Cancel;
use limosa_plug::PlugListener;
use std::sync::Arc;
use std::time::Duration;
use tokio::signal::unix::{SignalKind, signal};

/// How long migrations may take to abort when the agent ends.
const STOP_MAX: Duration = Duration::from_secs(20);

/// Runs the agent until SIGTERM or SIGINT. Guests go on without it; migrations that are not committed are aborted.
///
/// # Errors
/// What could not be opened, in words; exit code 2 for bad files of the operator, 1 for the rest.
pub fn run(config: Config) -> Result<(), ApiError> {
    let (agent, warnings) = Agent::open(config)?;
    warnings.iter().for_each(|words| tracing::warn!("{words}"));
    disks::sweep(&agent.config.state_dir);
    let agent = Arc::new(agent);
    let failed = |doing: &str, error: &dyn std::fmt::Display| ApiError::refused("agent", format!("{doing}: {error}"));
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build();
    let runtime = runtime.map_err(|e| failed("starting the runtime", &e))?;
    let plugs = PlugListener::bind(&agent.config.plug_socket()).map_err(|e| failed("the plug's socket", &e))?;
    let plugging = Arc::clone(&agent);
    let plugs = std::thread::Builder::new().name("plugs".into()).spawn(move || vms::serve(&plugging, &plugs));
    let plugs = plugs.map_err(|e| failed("starting a thread", &e))?;
    let done = runtime.block_on(live(&agent));
    agent.stop();
    runtime.shutdown_timeout(Duration::from_secs(2));
    // It looks five times a second whether the agent stops; then it takes its socket away.
    let _ = plugs.join();
    let _ = std::fs::remove_file(agent.config.api_socket());
    tracing::info!("the agent has ended");
    done
}

async fn live(agent: &Arc<Agent>) -> Result<(), ApiError> {
    let failed = |doing: String, error: std::io::Error| ApiError::refused("agent", format!("{doing}: {error}"));
    let api_socket = agent.config.api_socket();
    let api = serve::bind(&api_socket).map_err(|e| failed(api_socket.display().to_string(), e))?;
    let mut terminate = signal(SignalKind::terminate()).map_err(|e| failed("SIGTERM".into(), e))?;
    let mut interrupt = signal(SignalKind::interrupt()).map_err(|e| failed("SIGINT".into(), e))?;
    reload::on_hangup(agent)?;
    rotation::watch(agent);
    let stop = Cancel::new();
    let sessions = links::listen(agent, Arc::new(Reception(Arc::clone(agent))), &stop)?;
    agent.metrics.watch_sessions(sessions.clone());
    settle::begin(agent);
    if let Some(address) = agent.config.metrics {
        let listener =
            tokio::net::TcpListener::bind(address).await.map_err(|e| failed(format!("metrics.listen: {address}"), e))?;
        tokio::spawn(metrics::serve(Arc::clone(agent), listener));
    }
    tokio::spawn(serve::serve(Arc::clone(agent), api));
    tracing::info!(name = agent.config.name, id = %agent.key.id(), "the agent runs");
    // Without systemd there is nobody to tell, and that is fine.
    let _ = sd_notify::notify(false, &[sd_notify::NotifyState::Ready]);
    tokio::select! {
        _ = terminate.recv() => {}
        _ = interrupt.recv() => {}
    }
    tracing::info!("the agent stops: migrations that are not committed are aborted, guests go on");
    let _ = sd_notify::notify(false, &[sd_notify::NotifyState::Stopping]);
    agent.stop();
    stop.cancel("the agent is stopping");
    agent.jobs.cancel_all("the agent is stopping");
    let ended = async {
        sessions.idle().await;
        let mut changed = agent.jobs.watch();
        let ours = [Direction::Outgoing, Direction::Saving, Direction::Restoring];
        while ours.iter().any(|direction| agent.jobs.running(*direction) > 0) {
            if changed.changed().await.is_err() {
                break;
            }
        }
    };
    if tokio::time::timeout(STOP_MAX, ended).await.is_err() {
        tracing::warn!("a migration did not end in time; the journal settles it at the next start");
    }
    Ok(())
}
