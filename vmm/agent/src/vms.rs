//! The guests of this host: starting and stopping them, letting their VMMs plug in, noticing their end.
//! One guest is a `vm::Vm`. Moving guests is `outgoing` and `incoming`; what a restart finds is settled by `settle`.

use crate::agent::Agent;
use crate::api::{ApiError, VmInfo};
use crate::config::Config;
use crate::cpu;
use crate::process::Process;
use crate::vm::{Claim, Learned, Vm, VmState};
use crate::vm_config::{NicConfig, VmConfig, tap_name};
use crate::{networks, noted, settle};
use limosa_announce::{LEARNED_MAX, Watcher};
use limosa_plug::{Hello, PlugConnection, PlugEvent, PlugListener, PlugPeer, Role, Token, VmState as Plugged};
use limosa_proto::compat::{self, HostOffer, MacHolder};
use limosa_proto::cpu::CpuProfile;
use limosa_proto::identity::VmId;
use limosa_proto::wire::code::Code;
use limosa_proto::wire::message::{NicDescription, VmDescription};
use ring::rand::SecureRandom as _;
use std::collections::{BTreeMap, HashMap};
use std::io;
use std::net::IpAddr;
use std::path::{Path, PathBuf};
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
    watcher: Watcher,
    serial: AtomicU64,
}

#[derive(Debug, Default)]
struct Table {
    guests: Vec<Arc<Vm>>,
    /// Names of guests that are being started, with the MAC addresses of their NICs.
    starting: BTreeMap<String, Vec<[u8; 6]>>,
    /// VMMs that this agent has started and that have not plugged in yet.
    expected: HashMap<[u8; 16], Sender<Arrived>>,
}

impl Table {
    fn macs_taken(&self, except: &str) -> Vec<MacHolder> {
        let mut holders = Vec::new();
        for vm in self.guests.iter().filter(|vm| vm.name != except) {
            let nics = vm.description().map_or_else(Vec::new, |description| description.nics);
            holders.extend(nics.iter().map(|nic| MacHolder { mac: nic.mac, who: format!("the guest \"{}\"", vm.name) }));
        }
        for (name, macs) in self.starting.iter().filter(|(name, _)| *name != except) {
            let who = format!("the guest \"{name}\", which is being started");
            holders.extend(macs.iter().map(|mac| MacHolder { mac: *mac, who: who.clone() }));
        }
        holders
    }
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

/// The file by which a VMM learns what its guest's CPU is held to; it is gone when the VMM has read it.
struct Limit(PathBuf);

impl Limit {
    fn write(agent: &Agent, name: &str, limit: &CpuProfile) -> Result<Limit, ApiError> {
        let limit_file = Limit(agent.config.state_dir.join("vm").join(format!("{name}.cpu.json")));
        let text = serde_json::to_vec(limit).map_err(io::Error::from);
        let written = text.and_then(|text| std::fs::write(&limit_file.0, text));
        written.map_err(|e| ApiError::refused("state", format!("{}: {e}", limit_file.0.display())))?;
        Ok(limit_file)
    }
}

impl Drop for Limit {
    fn drop(&mut self) {
        // A file that stays harms nobody: the next start of this guest writes it anew.
        let _ = std::fs::remove_file(&self.0);
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
        let names = table.guests.iter().map(|vm| vm.name.clone()).chain(table.starting.keys().cloned());
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

    /// Takes a guest for one purpose that is this host's: it runs, or its operator has paused it.
    pub(crate) fn claim(&self, name: &str, purpose: &'static str) -> Result<Claim, ApiError> {
        let vm = self.named(name)?;
        self.free(&vm)?;
        vm.claim(purpose).map_err(|words| ApiError::refused("busy", words))
    }

    /// Whether a guest may be taken for something now.
    ///
    /// # Errors
    /// Why not.
    pub(crate) fn free(&self, vm: &Vm) -> Result<(), ApiError> {
        let name = &vm.name;
        match vm.state() {
            VmState::Running | VmState::Held if vm.is_claimed() => {
                Err(ApiError::refused("busy", format!("{name} is {}; `limosa jobs` shows more", vm.info().state)))
            }
            VmState::Running | VmState::Held => Ok(()),
            VmState::Paused => {
                Err(ApiError::refused("in-doubt", format!("{name} stands still and is in doubt; `limosa jobs` shows why")))
            }
            VmState::Incoming => Err(ApiError::refused("busy", format!("{name} is still coming in"))),
            VmState::Gone => Err(ApiError::refused("gone", format!("{name}'s VMM has just ended"))),
        }
    }

    /// MAC addresses of the guests that are here or being started, without those of the guest called `except`.
    pub(crate) fn macs_taken(&self, except: &str) -> Vec<MacHolder> {
        self.lock().macs_taken(except)
    }

    /// Puts a guest into the table; refused if its name, its identity or a MAC address of it is there.
    pub(crate) fn insert(&self, vm: &Arc<Vm>) -> Result<(), (Code, String)> {
        let mut table = self.lock();
        let taken = table.guests.iter().any(|other| other.name == vm.name || other.id == vm.id);
        if taken || table.starting.contains_key(&vm.name) {
            return Err((Code::NameTaken, format!("a guest called \"{}\" is on this host already", vm.name)));
        }
        let nics = vm.description().map_or_else(Vec::new, |description| description.nics);
        // Looked at before, but another guest may have come meanwhile.
        if let Some(holder) = table.macs_taken(&vm.name).iter().find(|holder| nics.iter().any(|nic| nic.mac == holder.mac)) {
            let mac = limosa_announce::mac_words(holder.mac);
            return Err((
                Code::MacTaken,
                format!("the MAC address {mac} of {} is taken on this host, by {}", vm.name, holder.who),
            ));
        }
        table.guests.push(Arc::clone(vm));
        Ok(())
    }

    /// Takes a guest out of the table; its ports are watched no more.
    pub(crate) fn remove(&self, id: VmId) {
        let gone: Vec<Arc<Vm>> = self.lock().guests.extract_if(.., |vm| vm.id == id).collect();
        gone.iter().for_each(|vm| vm.set_learned(Vec::new()));
    }

    /// Begins to learn the addresses of a guest that has described itself; `known` are its NICs as another host described
    /// them, with what that host had learned. A guest whose addresses are being learned goes on so.
    pub(crate) fn learn(&self, config: &Config, vm: &Vm, known: &[NicDescription]) {
        let Some(description) = vm.description().filter(|_| !vm.is_learning()) else { return };
        let learn = |(index, nic): (usize, &NicDescription)| {
            let there = known.get(index).map_or(&[][..], |nic| &nic.addresses);
            let more: Vec<IpAddr> =
                there.iter().copied().filter(|address| !nic.addresses.contains(address)).take(LEARNED_MAX).collect();
            if !config.network(&nic.network).is_some_and(|network| network.learn) {
                return Learned::Known(Vec::new());
            }
            match self.watcher.watch(&tap_name(vm.id, index), nic.mac, &more) {
                Ok(watch) => Learned::Watched(watch),
                Err(error) => {
                    // Another VMM than ours may call its TAP otherwise, or have none.
                    tracing::debug!(vm = vm.name, %error, "a port is not watched");
                    Learned::Known(more)
                }
            }
        };
        vm.set_learned(description.nics.iter().enumerate().map(learn).collect());
    }

    /// Starts the guest of `file` and waits until its VMM has plugged in. `warn` is told what is odd and no error.
    pub(crate) fn start(&self, agent: &Arc<Agent>, file: &Path, warn: impl Fn(String)) -> Result<VmInfo, ApiError> {
        let (config, _) = VmConfig::load(file).map_err(|e| ApiError::usage("configuration", e.to_string()))?;
        let starting = self.hold(&config.name, config.nics.iter().map(|nic| nic.mac).collect())?;
        self.check_nics(agent, &config)?;
        let mut arguments = vec!["--config".to_string(), file.display().to_string()];
        for (network, bridge) in agent.config.bridges() {
            arguments.extend(["--bridge".into(), format!("{network}={bridge}")]);
        }
        cpu::admit_vcpus(agent, &config)?.into_iter().for_each(warn);
        let limit = cpu::limit_for(agent, &config)?.map(|limit| Limit::write(agent, &config.name, &limit)).transpose()?;
        if let Some(Limit(path)) = &limit {
            arguments.extend(["--cpu-limit".into(), path.display().to_string()]);
        }
        let (process, arrived) =
            self.launch(agent, &config.name, arguments, START_MAX).map_err(|words| ApiError::refused("vmm-failed", words))?;
        let (vm, pid) = (Vm::new(arrived.hello.id, config.name.clone(), VmState::Running), process.pid());
        vm.set_process(process);
        vm.set_console(agent.config.console_socket(&config.name));
        vm.plug(Arc::clone(&arrived.connection), arrived.serial);
        drop(starting);
        let described = arrived.connection.describe().map_err(|e| ApiError::refused("vmm-failed", e.to_string()));
        let inserted = described.and_then(|described| {
            vm.set_description(described.description);
            self.insert(&vm).map_err(|(code, words)| ApiError::refused(code.id(), words))
        });
        inserted.inspect_err(|_| vm.end_within(Duration::ZERO))?;
        noted::remember(agent, vm.id, pid);
        self.learn(&agent.config, &vm, &[]);
        Ok(vm.info())
    }

    /// Whether the NICs of a guest that is to be started find here what they need.
    fn check_nics(&self, agent: &Agent, config: &VmConfig) -> Result<(), ApiError> {
        let nics: Vec<NicDescription> = config.nics.iter().map(NicConfig::describe).collect();
        let mut macs_taken = self.macs_taken(&config.name);
        macs_taken.extend(networks::mac_holders());
        let offer = HostOffer { networks: networks::offers(&agent.config), macs_taken, ..HostOffer::default() };
        let reasons = compat::nic_reasons(&nics, &offer, "this host");
        let Some(first) = reasons.first().map(|reason| reason.id.clone()) else { return Ok(()) };
        let words: Vec<String> = reasons.into_iter().map(|reason| reason.words).collect();
        Err(ApiError::refused(&first, format!("{}: {}", config.name, words.join("; "))))
    }

    fn hold(&self, name: &str, macs: Vec<[u8; 6]>) -> Result<Starting<'_>, ApiError> {
        let mut table = self.lock();
        if table.guests.iter().any(|vm| vm.name == name) || table.starting.contains_key(name) {
            return Err(ApiError::refused("name-taken", format!("a guest called \"{name}\" is on this host already")));
        }
        table.starting.insert(name.to_string(), macs);
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
    fn reap(&self, agent: &Arc<Agent>) {
        let guests = self.lock().guests.clone();
        for vm in guests.into_iter().filter(|vm| vm.has_ended()) {
            if vm.is_claimed() {
                // Whoever claimed it notices by the lost connection and needs it until then.
                continue;
            }
            tracing::info!(vm = vm.name, "the VMM has ended");
            settle::vmm_ended(agent, &vm);
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
        agent.vms.reap(agent);
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
        && let Err((_, words)) = vms.insert(&vm)
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
        Ok(described) => {
            vm.set_description(described.description);
            agent.vms.learn(&agent.config, vm, &[]);
        }
        Err(error) => tracing::warn!(vm = vm.name, %error, "the VMM does not describe its guest"),
    }
    let state = match (hello.role, hello.state) {
        (Role::Running, Plugged::Running) => VmState::Running,
        _ => VmState::Paused,
    };
    tracing::info!(vm = vm.name, id = %vm.id, pid = hello.pid, state = hello.state.words(), "a VMM has plugged in");
    agent.jobs.name(vm.id, &vm.name);
    if hello.state == Plugged::Loaded {
        vm.set_may_have_run(false);
    }
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
        assert!(vms.hold("web", vec![]).is_err());
        let held = vms.hold("new", vec![[2, 0, 0, 0, 0, 9]]).unwrap();
        let holder = vms.macs_taken("web").pop().unwrap();
        assert!(holder.mac == [2, 0, 0, 0, 0, 9] && holder.who.contains("\"new\""), "{holder:?}");
        assert_eq!(vms.macs_taken("new"), []);
        assert!(vms.insert(&Vm::new(VmId([3; 16]), "new".into(), VmState::Running)).is_err());
        assert!(vms.hold("new", vec![]).is_err());
        drop(held);
        assert!(vms.hold("new", vec![]).is_ok());
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
