//! The guests of this host: starting and stopping them, letting their VMMs plug in, noticing their end.
//! One guest is a `vm::Vm`. Moving guests is `outgoing` and `incoming`; what a restart finds is settled by `settle`.

use crate::agent::Agent;
use crate::api::{ApiError, VmInfo};
use crate::process::Process;
use crate::settle;
use crate::vm::{Claim, Vm, VmState};
use crate::vm_config::VmConfig;
use limosa_plug::{Hello, PlugConnection, PlugEvent, PlugListener, PlugPeer, Role, Token, VmState as Plugged};
use limosa_proto::identity::VmId;
use limosa_proto::wire::message::VmDescription;
use ring::rand::SecureRandom as _;
use std::collections::{BTreeSet, HashMap};
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{self, RecvTimeoutError, Sender};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// How long a VMM may take from its start until it has plugged in; populating memory takes most of it.
const START_MAX: Duration = Duration::from_secs(300);
/// How often ended VMMs are looked for.
const REAP_INTERVAL: Duration = Duration::from_millis(200);
/// How long a guest's VMM may take to end after it was told to.
const STOP_MAX: Duration = Duration::from_secs(5);

/// The table of guests.
#[derive(Debug, Default)]
pub(crate) struct Vms {
    table: Mutex<Table>,
    serial: AtomicU64,
}

#[derive(Debug, Default)]
struct Table {
    guests: Vec<Arc<Vm>>,
    /// Names of guests that are being started.
    starting: BTreeSet<String>,
    /// VMMs that this agent has started and that have not plugged in yet.
    expected: HashMap<[u8; 16], Sender<Arrived>>,
}

/// A VMM that was expected has plugged in.
#[derive(Debug)]
pub(crate) struct Arrived {
    pub(crate) connection: Arc<PlugConnection>,
    pub(crate) serial: u64,
    hello: Hello,
}

/// A name held for a guest that is being started.
struct Starting<'a>(&'a Vms, String);

impl Drop for Starting<'_> {
    fn drop(&mut self) {
        self.0.lock().starting.remove(&self.1);
    }
}

impl Vms {
    fn lock(&self) -> MutexGuard<'_, Table> {
        self.table.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// All guests, by name.
    pub(crate) fn list(&self) -> Vec<VmInfo> {
        let mut all: Vec<VmInfo> = self.lock().guests.iter().map(|vm| vm.info()).collect();
        all.sort_by(|a, b| a.name.cmp(&b.name));
        all
    }

    /// Names and identities that are taken.
    pub(crate) fn taken(&self) -> (Vec<String>, Vec<VmId>) {
        let table = self.lock();
        let names = table.guests.iter().map(|vm| vm.name.clone()).chain(table.starting.iter().cloned());
        (names.collect(), table.guests.iter().map(|vm| vm.id).collect())
    }

    pub(crate) fn show(&self, name: &str) -> Result<VmInfo, ApiError> {
        self.named(name).map(|vm| vm.info())
    }

    pub(crate) fn named(&self, name: &str) -> Result<Arc<Vm>, ApiError> {
        let found = self.lock().guests.iter().find(|vm| vm.name == name).cloned();
        found
            .ok_or_else(|| ApiError::refused("no-vm", format!("no guest is called \"{name}\" here; `limosa vm list` shows them")))
    }

    pub(crate) fn with_id(&self, id: VmId) -> Option<Arc<Vm>> {
        self.lock().guests.iter().find(|vm| vm.id == id).cloned()
    }

    /// A guest that runs here, with what is to be announced of it.
    pub(crate) fn announceable(&self, name: &str) -> Result<VmDescription, ApiError> {
        let vm = self.named(name)?;
        let refuse = |words: &str| ApiError::refused("not-running", format!("{name} {words}"));
        if vm.state() != VmState::Running {
            return Err(refuse("does not run here, so where it is must not be announced from here"));
        }
        vm.description().ok_or_else(|| refuse("has not described itself yet"))
    }

    /// Takes a guest that runs here for one purpose.
    pub(crate) fn claim(&self, name: &str, purpose: &'static str) -> Result<Claim, ApiError> {
        let vm = self.named(name)?;
        match vm.state() {
            VmState::Running => vm.claim(purpose).map_err(|words| ApiError::refused("busy", words)),
            VmState::Paused => {
                Err(ApiError::refused("paused", format!("{name} is paused and in doubt; `limosa jobs` shows why")))
            }
            VmState::Incoming => Err(ApiError::refused("busy", format!("{name} is still coming in"))),
            VmState::Gone => Err(ApiError::refused("gone", format!("{name}'s VMM has just ended"))),
        }
    }

    /// Puts a guest into the table; refused if its name or identity is there.
    pub(crate) fn insert(&self, vm: &Arc<Vm>) -> Result<(), String> {
        let mut table = self.lock();
        let taken = table.guests.iter().any(|other| other.name == vm.name || other.id == vm.id);
        if taken || table.starting.contains(&vm.name) {
            return Err(format!("a guest called \"{}\" is on this host already", vm.name));
        }
        table.guests.push(Arc::clone(vm));
        Ok(())
    }

    /// Takes a guest out of the table.
    pub(crate) fn remove(&self, id: VmId) {
        self.lock().guests.retain(|vm| vm.id != id);
    }

    /// Starts the guest of `file` and waits until its VMM has plugged in.
    pub(crate) fn start(&self, agent: &Arc<Agent>, file: &Path) -> Result<VmInfo, ApiError> {
        let (config, _) = VmConfig::load(file).map_err(|e| ApiError::usage("configuration", e.to_string()))?;
        let starting = self.hold(&config.name)?;
        for nic in &config.nics {
            if agent.config.network(&nic.network).is_none() {
                let known: Vec<&str> = agent.config.networks.iter().map(|network| network.name.as_str()).collect();
                let words = format!(
                    "{}: network \"{}\" is not known on this host; known: {}",
                    config.name,
                    nic.network,
                    known.join(", ")
                );
                return Err(ApiError::refused("network-missing", words));
            }
        }
        let mut arguments = vec!["--config".to_string(), file.display().to_string()];
        for (network, bridge) in agent.config.bridges() {
            arguments.extend(["--bridge".into(), format!("{network}={bridge}")]);
        }
        let (process, arrived) =
            self.launch(agent, &config.name, arguments, START_MAX).map_err(|words| ApiError::refused("vmm-failed", words))?;
        let vm = Vm::new(arrived.hello.id, config.name.clone(), VmState::Running);
        vm.set_process(process);
        vm.set_console(agent.config.console_socket(&config.name));
        vm.plug(Arc::clone(&arrived.connection), arrived.serial);
        drop(starting);
        let described = arrived.connection.describe().map_err(|e| ApiError::refused("vmm-failed", e.to_string()));
        let inserted = described.and_then(|described| {
            vm.set_description(described.description);
            self.insert(&vm).map_err(|words| ApiError::refused("name-taken", words))
        });
        inserted.inspect_err(|_| vm.end_within(Duration::ZERO))?;
        Ok(vm.info())
    }

    fn hold(&self, name: &str) -> Result<Starting<'_>, ApiError> {
        let mut table = self.lock();
        if table.guests.iter().any(|vm| vm.name == name) || !table.starting.insert(name.to_string()) {
            return Err(ApiError::refused("name-taken", format!("a guest called \"{name}\" is on this host already")));
        }
        Ok(Starting(self, name.to_string()))
    }

    /// Starts a VMM and waits until it has plugged in; on failure it is ended, and its last words are the error's.
    pub(crate) fn launch(
        &self,
        agent: &Agent,
        name: &str,
        mut arguments: Vec<String>,
        patience: Duration,
    ) -> Result<(Process, Arrived), String> {
        let mut token = [0; 16];
        ring::rand::SystemRandom::new().fill(&mut token).map_err(|_| "the system gives no random numbers")?;
        arguments.extend(["--plug".into(), agent.config.plug_socket().display().to_string()]);
        arguments.extend(["--token".into(), VmId(token).to_string()]);
        let console = agent.config.console_socket(name);
        arguments.extend(["--console".into(), console.display().to_string()]);
        let (sender, arrivals) = mpsc::channel();
        self.lock().expected.insert(token, sender);
        let logs = agent.config.state_dir.join("vm");
        let waited = Process::start(&agent.config.vmm_command, &arguments, &logs, name)
            .map_err(|e| format!("the VMM of {name} cannot be started: {e}"))
            .and_then(|mut process| match wait_for(&mut process, &arrivals, patience) {
                Ok(arrived) => Ok((process, arrived)),
                Err(words) => {
                    process.end_after(Duration::ZERO);
                    // It may not have come to making it.
                    let _ = std::fs::remove_file(&console);
                    let said = last_words(&logs.join(format!("{name}.vmm.log")));
                    Err(format!("the VMM of {name} {words}{said}"))
                }
            });
        self.lock().expected.remove(&token);
        waited
    }

    /// Stops a guest and waits until its VMM has ended.
    pub(crate) fn stop(&self, name: &str) -> Result<(), ApiError> {
        let claim = self.claim(name, "stopping")?;
        let vm = claim.vm();
        if let Some(connection) = vm.connection()
            && let Err(error) = connection.shutdown()
        {
            tracing::warn!(vm = name, %error, "the VMM did not take the order to stop; it is ended");
        }
        vm.end_within(STOP_MAX);
        self.remove(vm.id);
        Ok(())
    }

    /// Takes ended VMMs out of the table.
    fn reap(&self) {
        let guests = self.lock().guests.clone();
        for vm in guests.into_iter().filter(|vm| vm.state() != VmState::Incoming && vm.has_ended()) {
            if vm.is_claimed() {
                // Whoever claimed it notices by the lost connection and needs it until then.
                continue;
            }
            tracing::info!(vm = vm.name, "the VMM has ended");
            vm.end_within(Duration::ZERO);
            self.remove(vm.id);
        }
    }

    fn event(&self, serial: u64, event: &PlugEvent) {
        let vm = self.lock().guests.iter().find(|vm| vm.has_serial(serial)).cloned();
        let Some(vm) = vm else { return };
        match event {
            PlugEvent::GuestStopped(words) => {
                tracing::info!(vm = vm.name, words, "the guest has stopped");
                vm.unplug(serial, words);
            }
            PlugEvent::Lost { expected, words } => {
                if !expected {
                    tracing::warn!(vm = vm.name, words, "the VMM's connection is lost");
                }
                vm.unplug(serial, words);
            }
        }
    }
}

fn wait_for(process: &mut Process, arrivals: &mpsc::Receiver<Arrived>, patience: Duration) -> Result<Arrived, String> {
    let until = Instant::now() + patience;
    loop {
        match arrivals.recv_timeout(Duration::from_millis(5)) {
            Ok(arrived) => return Ok(arrived),
            Err(RecvTimeoutError::Disconnected) => return Err("was turned away".into()),
            Err(RecvTimeoutError::Timeout) => {}
        }
        if let Some(how) = process.ended() {
            return Err(format!("ended at once ({how})"));
        }
        if Instant::now() > until {
            return Err(format!("did not plug in within {} s", patience.as_secs()));
        }
    }
}

/// The end of a log, to be put behind an error.
fn last_words(log: &Path) -> String {
    let bytes = std::fs::read(log).unwrap_or_default();
    let text = String::from_utf8_lossy(bytes.get(bytes.len().saturating_sub(2000)..).unwrap_or_default()).into_owned();
    let last = text.lines().rev().find(|line| !line.trim().is_empty());
    last.map_or(String::new(), |line| format!(": {}", line.trim_start_matches("limosa: ")))
}

/// Lets VMMs plug in, until the agent stops. Blocking; for a thread of its own.
pub(crate) fn serve(agent: &Arc<Agent>, listener: &PlugListener) {
    while !agent.is_stopping() {
        match listener.accept(REAP_INTERVAL) {
            Ok(Some(peer)) => {
                let agent = Arc::clone(agent);
                let greet = move || greet(&agent, peer);
                if let Err(error) = std::thread::Builder::new().name("greet".into()).spawn(greet) {
                    tracing::warn!(%error, "a VMM cannot be greeted: no thread");
                }
            }
            Ok(None) => {}
            Err(error) => {
                tracing::warn!(%error, "a VMM could not be let in");
                std::thread::sleep(Duration::from_millis(50));
            }
        }
        agent.vms.reap();
    }
}

fn greet(agent: &Arc<Agent>, peer: PlugPeer) {
    let pid = peer.pid();
    let hello = match peer.hello() {
        Ok(hello) => hello,
        Err(error) => return tracing::warn!(pid, %error, "a VMM said no proper hello"),
    };
    let vms = &agent.vms;
    let expected = vms.lock().expected.get(&hello.token.0).cloned().filter(|_| hello.token != Token::default());
    if let Some(sender) = expected {
        if let Some((connection, serial)) = welcome(agent, peer) {
            // The one who waits may have given up; the VMM is ended by then.
            let _ = sender.send(Arrived { connection, serial, hello });
        }
        return;
    }
    if hello.state == Plugged::Waiting || hello.state == Plugged::Prepared {
        return peer.reject("no guest is expected by this VMM: its migration is over");
    }
    let known = vms.with_id(hello.id);
    let vm = known.unwrap_or_else(|| Vm::new(hello.id, hello.name.clone(), VmState::Running));
    if vm.connection().is_some_and(|connection| !connection.is_lost()) {
        return peer.reject("this guest is plugged in already, by another process");
    }
    if vms.with_id(hello.id).is_none()
        && let Err(words) = vms.insert(&vm)
    {
        return peer.reject(&words);
    }
    let Some((connection, serial)) = welcome(agent, peer) else { return vms.remove(hello.id) };
    adopt(agent, &vm, connection, serial, &hello);
}

fn welcome(agent: &Arc<Agent>, peer: PlugPeer) -> Option<(Arc<PlugConnection>, u64)> {
    let serial = agent.vms.serial.fetch_add(1, Ordering::Relaxed) + 1;
    let (listener, pid) = (Arc::downgrade(agent), peer.pid());
    let on_event = move |event: PlugEvent| {
        if let Some(agent) = listener.upgrade() {
            agent.vms.event(serial, &event);
        }
    };
    match peer.welcome(on_event) {
        Ok(connection) => Some((Arc::new(connection), serial)),
        Err(error) => {
            tracing::warn!(pid, %error, "a VMM left while it was welcomed");
            None
        }
    }
}

/// A VMM that this agent did not start, or that has lost its connection, is back.
fn adopt(agent: &Arc<Agent>, vm: &Arc<Vm>, connection: Arc<PlugConnection>, serial: u64, hello: &Hello) {
    let description = connection.describe();
    vm.set_console(agent.config.console_socket(&vm.name));
    vm.plug(connection, serial);
    match description {
        Ok(described) => vm.set_description(described.description),
        Err(error) => tracing::warn!(vm = vm.name, %error, "the VMM does not describe its guest"),
    }
    let state = match (hello.role, hello.state) {
        (Role::Running, Plugged::Running) => VmState::Running,
        _ => VmState::Paused,
    };
    tracing::info!(vm = vm.name, id = %vm.id, pid = hello.pid, state = hello.state.words(), "a VMM has plugged in");
    if !vm.is_claimed() {
        vm.set_state(state);
        settle::plugged_in(agent, vm, hello.state);
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn names_and_identities_are_unique() {
        let vms = Vms::default();
        let vm = Vm::new(VmId([1; 16]), "web".into(), VmState::Running);
        vms.insert(&vm).unwrap();
        for (id, name) in [(1, "other"), (2, "web")] {
            assert!(vms.insert(&Vm::new(VmId([id; 16]), name.into(), VmState::Running)).is_err());
        }
        assert!(vms.hold("web").is_err());
        let held = vms.hold("new").unwrap();
        assert!(vms.insert(&Vm::new(VmId([3; 16]), "new".into(), VmState::Running)).is_err());
        assert!(vms.hold("new").is_err());
        drop(held);
        assert!(vms.hold("new").is_ok());
        assert_eq!(vms.named("none").unwrap_err().exit, 1);
        vms.remove(VmId([1; 16]));
        assert!(vms.list().is_empty());
    }

    #[test]
    fn last_words_are_found() {
        let dir = tempfile::tempdir().unwrap();
        let log = dir.path().join("log");
        assert_eq!(last_words(&log), "");
        std::fs::write(&log, "starting\nlimosa: no bridge\n\n").unwrap();
        assert_eq!(last_words(&log), ": no bridge");
    }
}
