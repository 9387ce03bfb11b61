//! One guest of this host: its VMM's process and connection, and what it is doing.
//! All guests together, and how they come and go, are in `vms`.

use crate::api::VmInfo;
use crate::jobs::unix_ms;
use crate::process::{self, Process};
use limosa_announce::Watch;
use limosa_link::Cancel;
use limosa_plug::PlugConnection;
use limosa_proto::identity::VmId;
use limosa_proto::wire::limits::ADDRESSES_MAX;
use limosa_proto::wire::message::{NicDescription, VerdictAnswer, VmDescription};
use std::net::IpAddr;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// What a guest is doing, as far as the agent knows.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum VmState {
    /// It runs.
    Running,
    /// It stands still and waits for a decision: nobody may resume it before it is settled whose it is.
    Paused,
    /// It is this host's, and stands still because its operator wants it.
    Held,
    /// It is being received.
    Incoming,
    /// Its VMM has ended, or is about to.
    Gone,
}

/// A guest.
#[derive(Debug)]
pub(crate) struct Vm {
    pub(crate) id: VmId,
    pub(crate) name: String,
    inner: Mutex<Inner>,
    plugged: Condvar,
}

#[derive(Debug)]
struct Inner {
    state: VmState,
    connection: Option<Arc<PlugConnection>>,
    /// Number of the connection, so that news of an old one are told from those of the newest.
    serial: u64,
    /// The VMM: process id, and when it was born.
    pid: u32,
    born: Option<u64>,
    /// Set where this very agent started it.
    process: Option<Process>,
    /// The socket of its serial line; gone when the VMM is.
    console: Option<PathBuf>,
    since_unix_ms: u64,
    /// As the VMM describes it.
    description: Option<VmDescription>,
    /// The addresses of each NIC that are learned on its port, or were on another host.
    learned: Vec<Learned>,
    /// What a migration wants to have cancelled when the VMM is lost.
    lost: Option<Cancel>,
    claimed: Option<&'static str>,
    /// Whether the guest may have run in this VMM, or was committed to it.
    may_have_run: bool,
    /// Ends the announcing that is under way.
    announcing: Option<Arc<AtomicBool>>,
    /// What an operator has decided while a driver is in doubt about it, durably, and in which words.
    decided: Option<(VerdictAnswer, String)>,
}

impl Vm {
    /// A guest without a connection yet.
    pub(crate) fn new(id: VmId, name: String, state: VmState) -> Arc<Vm> {
        let inner = Inner {
            state,
            connection: None,
            serial: 0,
            pid: 0,
            born: None,
            process: None,
            console: None,
            since_unix_ms: unix_ms(),
            description: None,
            learned: Vec::new(),
            lost: None,
            claimed: None,
            may_have_run: state != VmState::Incoming,
            announcing: None,
            decided: None,
        };
        Arc::new(Vm { id, name, inner: Mutex::new(inner), plugged: Condvar::new() })
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The VMM has plugged in, for the first time or anew.
    pub(crate) fn plug(&self, connection: Arc<PlugConnection>, serial: u64) {
        let mut inner = self.lock();
        inner.pid = u32::try_from(connection.pid()).unwrap_or(0);
        inner.born = process::birth(inner.pid);
        inner.connection = Some(connection);
        inner.serial = serial;
        self.plugged.notify_all();
    }

    /// The connection `serial` is gone; a migration that needs it is told.
    pub(crate) fn unplug(&self, serial: u64, words: &str) {
        let mut inner = self.lock();
        if inner.serial == serial {
            inner.connection = None;
            if let Some(cancel) = &inner.lost {
                cancel.cancel(format!("the VMM of {} is lost: {words}", self.name));
            }
        }
    }

    /// Whether `serial` is the newest connection's number.
    pub(crate) fn has_serial(&self, serial: u64) -> bool {
        self.lock().serial == serial
    }

    /// The connection, if there is one.
    pub(crate) fn connection(&self) -> Option<Arc<PlugConnection>> {
        self.lock().connection.clone()
    }

    /// The connection, waiting up to `patience` for a VMM that is plugging in anew.
    pub(crate) fn connection_within(&self, patience: Duration) -> Result<Arc<PlugConnection>, String> {
        let until = Instant::now() + patience;
        let mut inner = self.lock();
        loop {
            let left = until.saturating_duration_since(Instant::now());
            match &inner.connection {
                Some(connection) => return Ok(Arc::clone(connection)),
                None if left.is_zero() || inner.state == VmState::Gone => {
                    return Err(format!("the VMM of {} (process {}) is not plugged in", self.name, inner.pid));
                }
                None => inner = self.plugged.wait_timeout(inner, left).unwrap_or_else(PoisonError::into_inner).0,
            }
        }
    }

    pub(crate) fn state(&self) -> VmState {
        self.lock().state
    }

    pub(crate) fn set_state(&self, state: VmState) {
        self.lock().state = state;
    }

    pub(crate) fn set_process(&self, process: Process) {
        let mut inner = self.lock();
        inner.pid = process.pid();
        inner.born = process::birth(inner.pid);
        inner.process = Some(process);
    }

    /// Where the VMM makes the socket of the serial line.
    pub(crate) fn set_console(&self, path: PathBuf) {
        self.lock().console = Some(path);
    }

    /// The guest as its VMM describes it, and behind the addresses of each NIC those that were learned.
    pub(crate) fn description(&self) -> Option<VmDescription> {
        let inner = self.lock();
        inner.description.clone().map(|description| with_learned(description, &inner.learned))
    }

    /// Whether it has disks, or may have some that its VMM has not described.
    pub(crate) fn may_have_disks(&self) -> bool {
        self.lock().description.as_ref().is_none_or(|description| !description.disks.is_empty())
    }

    /// A description that the VMM has just given, likewise.
    pub(crate) fn with_learned(&self, description: VmDescription) -> VmDescription {
        with_learned(description, &self.lock().learned)
    }

    /// Whether its addresses are being learned.
    pub(crate) fn is_learning(&self) -> bool {
        !self.lock().learned.is_empty()
    }

    /// What is learned of each NIC's addresses, from now on.
    pub(crate) fn set_learned(&self, learned: Vec<Learned>) {
        self.lock().learned = learned;
    }

    pub(crate) fn set_description(&self, description: VmDescription) {
        self.lock().description = Some(description);
    }

    /// It is being announced, until `end` is set.
    pub(crate) fn announces(&self, end: Arc<AtomicBool>) {
        self.lock().announcing = Some(end);
    }

    /// It may not be here for long: what would still be announced of it would be said against its next host.
    pub(crate) fn end_announcing(&self) {
        if let Some(end) = self.lock().announcing.take() {
            end.store(true, Ordering::Release);
        }
    }

    /// An operator has decided, and it is durable.
    pub(crate) fn decide(&self, answer: VerdictAnswer, words: String) {
        self.lock().decided = Some((answer, words));
    }

    /// What an operator has decided.
    pub(crate) fn decided(&self) -> Option<(VerdictAnswer, String)> {
        self.lock().decided.clone()
    }

    /// Whether the guest may have run in this VMM, or was committed to it: for ever yes, once it may.
    pub(crate) fn may_have_run(&self) -> bool {
        self.lock().may_have_run
    }

    pub(crate) fn set_may_have_run(&self, may: bool) {
        self.lock().may_have_run = may;
    }

    /// `cancel` is cancelled when the VMM is lost; none: nobody needs to know.
    pub(crate) fn on_lost(&self, cancel: Option<Cancel>) {
        self.lock().lost = cancel;
    }

    /// CPU seconds that the VMM has used apart from running the guest.
    pub(crate) fn cpu_seconds(&self) -> f64 {
        process::overhead_seconds(self.lock().pid)
    }

    /// Whether the VMM's process has ended.
    pub(crate) fn has_ended(&self) -> bool {
        let mut inner = self.lock();
        let (pid, born) = (inner.pid, inner.born);
        match &mut inner.process {
            Some(process) => process.ended().is_some(),
            None => pid == 0 || born.is_none() || process::birth(pid) != born,
        }
    }

    /// Waits until the VMM's process has ended by itself; ends it after `patience`.
    pub(crate) fn end_within(&self, patience: Duration) {
        let until = Instant::now() + patience;
        while !self.has_ended() && Instant::now() < until {
            std::thread::sleep(Duration::from_millis(2));
        }
        let mut inner = self.lock();
        inner.state = VmState::Gone;
        inner.connection = None;
        let (pid, born) = (inner.pid, inner.born);
        match &mut inner.process {
            Some(process) => process.end_after(Duration::ZERO),
            None => {
                if let Some(born) = born {
                    process::kill_born(pid, born);
                }
            }
        }
        if let Some(path) = inner.console.take() {
            // A VMM that ended by itself has removed it.
            let _ = std::fs::remove_file(path);
        }
        self.plugged.notify_all();
    }

    /// Takes the guest for one purpose; nobody else may meanwhile.
    pub(crate) fn claim(self: &Arc<Vm>, purpose: &'static str) -> Result<Claim, String> {
        let mut inner = self.lock();
        if let Some(other) = inner.claimed {
            return Err(format!("{} is {other}; `limosa jobs` shows more", self.name));
        }
        inner.claimed = Some(purpose);
        Ok(Claim(Arc::clone(self)))
    }

    /// Whether somebody has claimed it.
    pub(crate) fn is_claimed(&self) -> bool {
        self.lock().claimed.is_some()
    }

    /// What commands are told.
    pub(crate) fn info(&self) -> VmInfo {
        let description = self.description();
        let inner = self.lock();
        let state = match (inner.state, inner.claimed) {
            (VmState::Gone, _) => "gone",
            (VmState::Incoming, _) => "incoming",
            (_, Some(purpose)) => purpose,
            (VmState::Paused, None) => "in doubt",
            (VmState::Held, None) => "paused",
            (VmState::Running, None) if inner.connection.is_none() => "running, not plugged in",
            (VmState::Running, None) => "running",
        };
        let description = description.as_ref();
        VmInfo {
            name: self.name.clone(),
            id: self.id.to_string(),
            state: state.into(),
            pid: inner.pid,
            since_unix_ms: inner.since_unix_ms,
            memory_bytes: description.map_or(0, |vm| vm.memory.bytes()),
            vcpus: description.map_or(0, |vm| vm.vcpus),
            nics: description.map_or_else(Vec::new, |vm| vm.nics.iter().map(nic_words).collect()),
            console: inner.console.clone().filter(|path| path.exists()),
        }
    }
}

fn nic_words(nic: &NicDescription) -> String {
    let addresses: Vec<String> = nic.addresses.iter().map(ToString::to_string).collect();
    let vlan = nic.vlan.map_or(String::new(), |vlan| format!(", VLAN {vlan}"));
    format!("{} on {}{vlan}, {}", limosa_announce::mac_words(nic.mac), nic.network, addresses.join(" "))
}

fn with_learned(mut description: VmDescription, learned: &[Learned]) -> VmDescription {
    for (nic, learned) in description.nics.iter_mut().zip(learned) {
        let more: Vec<IpAddr> = learned.addresses().into_iter().filter(|address| !nic.addresses.contains(address)).collect();
        nic.addresses.extend(more);
        nic.addresses.truncate(ADDRESSES_MAX);
    }
    description
}

/// The addresses of one NIC beside the configured ones.
#[derive(Debug)]
pub(crate) enum Learned {
    /// Its port is watched.
    Watched(Watch),
    /// Its port is not watched: what is known from another host.
    Known(Vec<IpAddr>),
}

impl Learned {
    fn addresses(&self) -> Vec<IpAddr> {
        match self {
            Learned::Watched(watch) => watch.addresses(),
            Learned::Known(known) => known.clone(),
        }
    }
}

/// A guest taken for one purpose; given back when dropped.
#[derive(Debug)]
pub(crate) struct Claim(Arc<Vm>);

impl Claim {
    pub(crate) fn vm(&self) -> &Arc<Vm> {
        &self.0
    }
}

impl Drop for Claim {
    fn drop(&mut self) {
        let mut inner = self.0.lock();
        inner.claimed = None;
        inner.lost = None;
        inner.decided = None;
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn learned_addresses_come_behind_the_configured_ones() {
        let address = |last: u8| IpAddr::from([10, 0, 0, last]);
        let nic = |first| NicDescription {
            mac: [2, 0, 0, 0, 0, first],
            network: "lan".into(),
            mtu: 1500,
            vlan: None,
            addresses: vec![address(first)],
        };
        let vm = Vm::new(VmId([1; 16]), "web".into(), VmState::Running);
        let memory = limosa_proto::memory::Region { gpa: limosa_proto::memory::Gpa(0), bytes: 4096, page_bytes: 4096 };
        let memory = limosa_proto::memory::MemoryMap::new(vec![memory]).unwrap();
        let (nics, name, vmm) = (vec![nic(1), nic(2)], "web".into(), "limosa".into());
        vm.set_description(VmDescription {
            id: vm.id,
            name,
            vcpus: 1,
            memory,
            nics,
            disks: vec![],
            vmm,
            records: vec![],
            config: vec![],
            cpu: Default::default(),
        });
        let addresses = |vm: &Vm| vm.description().unwrap().nics.into_iter().map(|nic| nic.addresses).collect::<Vec<_>>();
        assert_eq!(addresses(&vm), [vec![address(1)], vec![address(2)]]);
        vm.set_learned(vec![Learned::Known(vec![]), Learned::Known(vec![address(9), address(2)])]);
        assert_eq!(addresses(&vm), [vec![address(1)], vec![address(2), address(9)]]);
        assert!(vm.info().nics[1].ends_with("10.0.0.2 10.0.0.9"), "{:?}", vm.info().nics);
        let many = (0..=255).map(address).collect();
        vm.set_learned(vec![Learned::Known(many)]);
        assert_eq!(addresses(&vm)[0].len(), ADDRESSES_MAX, "more cannot travel");
    }

    #[test]
    fn a_guest_is_claimed_once() {
        let vm = Vm::new(VmId([1; 16]), "web".into(), VmState::Running);
        let claim = vm.claim("migrating").unwrap();
        assert_eq!(vm.info().state, "migrating");
        assert!(vm.claim("stopping").unwrap_err().contains("web is migrating"));
        drop(claim);
        assert!(vm.claim("stopping").is_ok());
        assert!(vm.connection_within(Duration::from_millis(1)).is_err());
        assert!(vm.has_ended());
    }
}
