//! The machine behind the plug: each request of the agent becomes calls of `limosa_machine`.
//! The socket and the order of requests are `limosa_plug`'s; what a machine is made of is in `build`.

use super::build;
use super::console::Console;
use super::cpu::{GuestCpu, Host};
use super::sandbox;
use limosa_agent::vm_config::{DiskConfig, Serial, VmConfig};
use limosa_machine::{Machine, MachineEvent, StateRecord};
use limosa_plug::{DirtyBitmap, EventSender, Vmm, VmmDescription, VmmEvent};
use limosa_proto::identity::VmId;
use limosa_proto::memory::{MemoryMap, PAGES_PER_WORD};
use limosa_proto::record::Record;
use limosa_proto::wire::message::{DiskDescription, VmDescription};
use std::path::Path;
use std::sync::{Arc, Weak};
use std::time::Duration;

/// How often the watcher of a machine's events looks whether the machine is still there.
const WATCH_INTERVAL: Duration = Duration::from_millis(500);

/// A machine with what the agent is told about it.
pub(super) struct Running {
    pub(super) machine: Arc<Machine>,
    pub(super) description: VmDescription,
}

/// The VMM as the plug sees it; without a machine until an incoming one is prepared.
pub(super) struct Plugged {
    running: Option<Running>,
    /// What KVM offers here, where a guest is coming in.
    host: Option<Host>,
    events: EventSender,
    /// For the machine that is expected.
    console: Option<Console>,
    fenced: bool,
}

impl Running {
    /// Builds the machine of `config`, behind its fences; it neither boots nor runs yet.
    pub(super) fn build(
        config: &VmConfig,
        id: VmId,
        text: &str,
        bridges: &[(String, String)],
        populate: bool,
        cpu: GuestCpu,
        (console, fenced): (Option<Console>, bool),
    ) -> Result<Running, String> {
        if fenced {
            sandbox::restrict_files(&build::files(config)?)?;
        }
        let machine = Arc::new(build::machine(config, id, bridges, populate, &cpu, console.as_ref())?);
        let description = build::describe(&machine, config, id, text, &cpu.profile)?;
        if let Some(console) = console {
            console.serve(Arc::downgrade(&machine)).map_err(|e| format!("no thread for the console: {e}"))?;
        }
        if fenced {
            sandbox::restrict_calls()?;
        }
        Ok(Running { machine, description })
    }

    fn described(&self) -> Result<VmmDescription, String> {
        Ok(VmmDescription { description: self.description.clone(), memory: build::memory(&self.machine)? })
    }
}

impl Plugged {
    /// For a machine that runs already, or for one that comes from another host.
    /// `console` and whether it is fenced in are for the latter.
    pub(super) fn new(running: Option<Running>, events: EventSender, (console, fenced): (Option<Console>, bool)) -> Plugged {
        let plugged = Plugged { running, host: None, events, console, fenced };
        if let Some(running) = &plugged.running {
            plugged.watch(&running.machine);
        }
        plugged
    }

    fn running(&self) -> Result<&Running, String> {
        self.running.as_ref().ok_or_else(|| "there is no machine yet".into())
    }

    fn machine(&self) -> Result<&Machine, String> {
        self.running().map(|running| running.machine.as_ref())
    }

    /// Tells the agent when the guest stops by itself.
    fn watch(&self, machine: &Arc<Machine>) {
        let (machine, events) = (Arc::downgrade(machine), self.events.clone());
        let watch = move || {
            if let Some(words) = stopped(&machine) {
                events.send(VmmEvent::GuestStopped(words));
            }
        };
        if let Err(error) = std::thread::Builder::new().name("events".into()).spawn(watch) {
            tracing::warn!(%error, "the guest's end will not be noticed: no thread");
        }
    }
}

/// Waits until the guest has stopped; why, in words. None if the machine is gone before.
pub(super) fn stopped(machine: &Weak<Machine>) -> Option<String> {
    loop {
        let machine = machine.upgrade()?;
        match machine.events().recv_timeout(WATCH_INTERVAL) {
            None => {}
            Some(MachineEvent::DeviceBroken { device, reason }) => {
                tracing::warn!(device, reason, "a device of the guest is broken")
            }
            Some(MachineEvent::Reset { .. }) => return Some("the guest asked for a reset".into()),
            Some(MachineEvent::Shutdown { reason, .. }) => return Some(format!("the guest shut down: {reason}")),
            Some(MachineEvent::Halted { vcpu }) => return Some(format!("vCPU {vcpu} halted for ever")),
            Some(MachineEvent::Failed { vcpu, reason }) => return Some(format!("vCPU {vcpu} failed: {reason}")),
        }
    }
}

/// The configuration that came with a guest from another host.
///
/// Paths of the source's file system mean nothing here and are not obeyed: a peer must not choose which file of this
/// host the serial line is written to. It goes to the VMM's log. Disks are those of the description: the agent has resolved
/// their paths, and found that they lie in folders from which this host takes images.
fn incoming_config(vm: &VmDescription) -> Result<(VmConfig, String), String> {
    let text = String::from_utf8(vm.config.clone()).map_err(|_| "the guest's configuration is no text")?;
    let mut config = VmConfig::parse(Path::new("the source's configuration"), &text).map_err(|e| e.to_string())?;
    if let Serial::File(_) = config.serial {
        config.serial = Serial::Stdout;
    }
    if config.name != vm.name || config.vcpus != vm.vcpus || config.memory != vm.memory.bytes() {
        return Err("the guest's configuration contradicts its description".into());
    }
    if config.disks.len() != vm.disks.len() {
        return Err("the guest's configuration contradicts its description: it has another number of disks".into());
    }
    let disk = |disk: &DiskDescription| DiskConfig {
        path: disk.path.clone().into(),
        format: Some(disk.format),
        readonly: disk.readonly,
        serial: disk.serial.clone(),
        resolved: true,
    };
    config.disks = vm.disks.iter().map(disk).collect();
    Ok((config, text))
}

/// Same regions at the same addresses; the pages behind may differ in size.
fn same_shape(ours: &MemoryMap, theirs: &MemoryMap) -> bool {
    let shape = |map: &MemoryMap| map.regions().iter().map(|region| (region.gpa, region.bytes)).collect::<Vec<_>>();
    shape(ours) == shape(theirs)
}

impl Vmm for Plugged {
    fn describe(&mut self) -> Result<VmmDescription, String> {
        self.running()?.described()
    }

    fn prepare(&mut self, description: &VmDescription, bridges: &[(String, String)]) -> Result<VmmDescription, String> {
        let (config, text) = incoming_config(description)?;
        // The agent populates the memory through its own mapping, when its configuration says so.
        let host = Host::ask()?;
        let cpu = host.arriving(&description.cpu)?;
        let expected = (self.console.take(), self.fenced);
        let running = Running::build(&config, description.id, &text, bridges, false, cpu, expected)?;
        if !same_shape(&running.description.memory, &description.memory) {
            return Err("this VMM lays memory out in another way than the source's".into());
        }
        if let Some((ours, theirs)) =
            running.description.disks.iter().zip(&description.disks).find(|(ours, theirs)| ours.bytes != theirs.bytes)
        {
            return Err(format!("disk {} has {} bytes here and {} at the source", ours.path, ours.bytes, theirs.bytes));
        }
        let described = running.described()?;
        self.watch(&running.machine);
        (self.running, self.host) = (Some(running), Some(host));
        Ok(described)
    }

    fn track(&mut self, on: bool) -> Result<(), String> {
        let machine = self.machine()?;
        let done = if on { machine.start_dirty_tracking() } else { machine.stop_dirty_tracking() };
        done.map_err(|e| build::words(&e))
    }

    fn fetch_dirty(&mut self, into: &DirtyBitmap) -> Result<(), String> {
        let running = self.running()?;
        let map = &running.description.memory;
        let mut fetched = |region: usize, first: usize, words: &[u64]| {
            let base = map.first_page(region).unwrap_or(u64::MAX) / PAGES_PER_WORD;
            let base = usize::try_from(base).unwrap_or(usize::MAX).saturating_add(first);
            for (index, bits) in words.iter().enumerate() {
                into.or(base.saturating_add(index), *bits);
            }
        };
        running.machine.fetch_dirty(&mut fetched).map_err(|e| build::words(&e))
    }

    fn pause(&mut self) -> Result<(), String> {
        self.machine()?.pause().map_err(|e| build::words(&e))
    }

    fn save(&mut self) -> Result<Vec<Record>, String> {
        let records = self.machine()?.save().map_err(|e| build::words(&e))?;
        let record = |StateRecord { kind, version, instance, bytes }| Record { kind, version, instance, bytes };
        Ok(records.into_iter().map(record).collect())
    }

    fn load(&mut self, state: Vec<Record>) -> Result<(), String> {
        let record = |Record { kind, version, instance, bytes }| StateRecord { kind, version, instance, bytes };
        let records: Vec<StateRecord> = state.into_iter().map(record).collect();
        if let Some(host) = &self.host {
            host.check_saved(&records)?;
        }
        self.machine()?.load(records).map_err(|e| build::words(&e))
    }

    fn take(&mut self) -> Result<(), String> {
        self.machine()?.take_disks().map_err(|e| build::words(&e))
    }

    fn give_up(&mut self) -> Result<(), String> {
        self.machine()?.give_up_disks().map_err(|e| build::words(&e))
    }

    fn resume(&mut self) -> Result<(), String> {
        self.machine()?.resume().map_err(|e| build::words(&e))
    }

    fn throttle(&mut self, _percent: u8) -> Result<(), String> {
        Err("this VMM does not slow vCPUs down".into())
    }

    fn release(&mut self) -> Result<(), String> {
        // The machine is paused and never resumed; the process ends after the answer.
        Ok(())
    }

    fn discard(&mut self) -> Result<(), String> {
        Ok(())
    }

    fn shutdown(&mut self) -> Result<(), String> {
        match self.machine() {
            Ok(machine) => machine.pause().map_err(|e| build::words(&e)),
            Err(_) => Ok(()),
        }
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use limosa_proto::memory::{Gpa, Region};

    fn description(config: &str) -> VmDescription {
        let memory = MemoryMap::new(vec![Region { gpa: Gpa(0), bytes: 64 << 20, page_bytes: 4096 }]).unwrap();
        let config = config.as_bytes().to_vec();
        VmDescription {
            id: VmId([1; 16]),
            name: "web".into(),
            vcpus: 1,
            memory,
            nics: vec![],
            disks: vec![],
            vmm: "limosa".into(),
            records: vec![],
            config,
            cpu: Default::default(),
        }
    }

    #[test]
    fn a_peer_chooses_no_file_here() {
        let text = "name = \"web\"\nmemory = \"64M\"\nkernel = \"/x\"\nserial = \"/etc/passwd\"\n";
        let (config, _) = incoming_config(&description(text)).unwrap();
        assert_eq!(config.serial, Serial::Stdout);
    }

    #[test]
    fn disks_are_those_that_the_agent_has_resolved() {
        let text = "name = \"web\"\nmemory = \"64M\"\nkernel = \"/x\"\n[[disk]]\npath = \"/etc/shadow\"\nformat = \"raw\"\n";
        let mut vm = description(text);
        assert!(incoming_config(&vm).unwrap_err().contains("another number of disks"));
        vm.disks.push(DiskDescription {
            path: "/srv/vm/web.qcow2".into(),
            format: limosa_proto::wire::message::ImageFormat::Qcow2,
            readonly: true,
            bytes: 1 << 20,
            serial: "s".into(),
            token: [0; 32],
        });
        let (config, _) = incoming_config(&vm).unwrap();
        let disk = &config.disks[0];
        assert_eq!((disk.path.to_str(), disk.readonly, disk.resolved), (Some("/srv/vm/web.qcow2"), true, true));
    }

    #[test]
    fn a_configuration_must_fit_its_description() {
        for text in
            ["name = \"other\"\nmemory = \"64M\"\nkernel = \"/x\"\n", "name = \"web\"\nmemory = \"32M\"\nkernel = \"/x\"\n", "\0"]
        {
            assert!(incoming_config(&description(text)).is_err(), "{text}");
        }
    }
}
