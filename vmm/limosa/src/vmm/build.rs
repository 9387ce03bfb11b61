//! From a guest's configuration to a machine: NICs with their bridges, the serial line's sink, memory.
//! It boots nothing and answers nobody; `plugged` does.

use super::console::Console;
use super::sandbox::{self, Files};
use limosa_agent::vm_config::{DiskConfig, NicConfig, Serial, VmConfig, tap_name};
use limosa_machine::{
    BootConfig, DiskConfig as MachineDisk, DiskFormat, DiskInfo, Kind, Machine, MachineConfig, MemoryConfig,
    NicConfig as MachineNic, PageSize, Populate, SerialSink, TapConfig,
};
use limosa_proto::identity::VmId;
use limosa_proto::memory::{Gpa, MemoryMap, Region};
use limosa_proto::wire::limits::PATH_BYTES_MAX;
use limosa_proto::wire::message::{DiskDescription, ImageFormat, NicDescription, VmDescription};
use std::fs::{File, OpenOptions};
use std::io::{self, Write};
use std::os::fd::{AsFd as _, OwnedFd};

/// Kind of this VMM, as compatibility is judged by.
pub(super) const VMM_KIND: &str = "limosa";
/// A guest's serial log is emptied when it has grown to this size, so that a chatty guest does not fill the disk.
const LOG_BYTES_MAX: u64 = 64 << 20;

/// The files that a VMM of this guest opens.
pub(super) fn files(config: &VmConfig) -> Result<Files, String> {
    let mut files = Files::of_a_machine();
    files.read.extend(std::iter::once(config.kernel.clone()).chain(config.initramfs.clone()));
    if let Serial::File(path) = &config.serial {
        files.write.push(sandbox::touched(path)?);
    }
    for disk in &config.disks {
        let list = if disk.readonly { &mut files.read } else { &mut files.write };
        list.push(disk.path.clone());
    }
    Ok(files)
}

/// Whether a guest can be started on its disks. Asked before the fences are up: from behind them nobody can be named who has
/// an image locked.
pub(super) fn check_disks(config: &VmConfig) -> Result<(), String> {
    config.disks.iter().try_for_each(|one| limosa_machine::disk_is_free(&disk(one))).map_err(|e| words(&e))
}

/// Builds the machine; `bridges` says which bridge each network has on this host, or is none where the VMM runs
/// without an agent and its NICs may stay unplugged.
pub(super) fn machine(
    config: &VmConfig,
    id: VmId,
    bridges: &[(String, String)],
    populate: bool,
    console: Option<&Console>,
) -> Result<Machine, String> {
    let mut nics = Vec::new();
    for (index, nic) in config.nics.iter().enumerate() {
        let bridge = bridge_of(nic, bridges)?;
        let tap = TapConfig::Name { name: tap_name(id, index), bridge };
        nics.push(MachineNic { mac: nic.mac, tap, mtu: nic.mtu, offload: nic.offload });
    }
    let memory = MemoryConfig {
        page_size: if config.huge_pages { PageSize::Huge2M } else { PageSize::Base },
        populate: if populate { Populate::Now } else { Populate::No },
        thp: config.thp,
        ..MemoryConfig::new(config.memory)
    };
    let serial = serial(&config.serial, console).map_err(|e| format!("the serial line's file cannot be opened: {e}"))?;
    let (rng, balloon) = (config.rng, config.balloon);
    let disks = config.disks.iter().map(disk).collect();
    let machine = MachineConfig { nics, disks, rng, balloon, serial, ..MachineConfig::new(config.vcpus, memory) };
    Machine::new(machine).map_err(|e| words(&e))
}

fn disk(disk: &DiskConfig) -> MachineDisk {
    let format = disk.format.map(|format| if format == ImageFormat::Raw { DiskFormat::Raw } else { DiskFormat::Qcow2 });
    let DiskConfig { path, readonly, serial, resolved, .. } = disk.clone();
    MachineDisk { path, format, readonly, serial, resolved }
}

fn bridge_of(nic: &NicConfig, bridges: &[(String, String)]) -> Result<Option<String>, String> {
    match bridges.iter().find(|(network, _)| *network == nic.network) {
        Some((_, bridge)) => Ok(Some(bridge.clone())),
        None if bridges.is_empty() => Ok(None),
        None => {
            let known: Vec<&str> = bridges.iter().map(|(network, _)| network.as_str()).collect();
            Err(format!("network \"{}\" is not known on this host; known: {}", nic.network, known.join(", ")))
        }
    }
}

/// Loads what the guest boots.
pub(super) fn boot(machine: &Machine, config: &VmConfig) -> Result<(), String> {
    let boot = BootConfig { kernel: config.kernel.clone(), initramfs: config.initramfs.clone(), cmdline: config.cmdline.clone() };
    machine.boot(&boot).map_err(|e| words(&e))
}

/// The guest as it is described to the agent and to the other host.
pub(super) fn describe(machine: &Machine, config: &VmConfig, id: VmId, text: &str) -> Result<VmDescription, String> {
    let region = |region: limosa_machine::RegionInfo<'_>| Region {
        gpa: Gpa(region.gpa),
        bytes: region.bytes,
        page_bytes: region.page_size.bytes(),
    };
    let memory = MemoryMap::new(machine.regions().into_iter().map(region).collect()).map_err(|e| e.to_string())?;
    let nic = |nic: &NicConfig| NicDescription {
        mac: nic.mac,
        network: nic.network.clone(),
        mtu: nic.mtu,
        vlan: nic.vlan,
        addresses: nic.addresses.clone(),
    };
    let disk = |(disk, info): (&DiskConfig, DiskInfo)| {
        let path = std::path::absolute(&disk.path).map_err(|e| format!("disk {}: {e}", disk.path.display()))?;
        let told = path.to_str().filter(|path| path.len() <= PATH_BYTES_MAX && !path.chars().any(char::is_control));
        let words = || format!("disk {}: its path is no plain text of at most {PATH_BYTES_MAX} bytes", path.display());
        let path = told.ok_or_else(words)?.to_owned();
        let format = if info.format == DiskFormat::Raw { ImageFormat::Raw } else { ImageFormat::Qcow2 };
        let (readonly, serial) = (disk.readonly, disk.serial.clone());
        Ok(DiskDescription { path, format, readonly, bytes: info.bytes, serial, token: [0; 32] })
    };
    let disks = config.disks.iter().zip(machine.disks()).map(disk).collect::<Result<Vec<_>, String>>()?;
    Ok(VmDescription {
        id,
        name: config.name.clone(),
        vcpus: config.vcpus,
        memory,
        nics: config.nics.iter().map(nic).collect(),
        disks,
        vmm: VMM_KIND.into(),
        records: Kind::all().collect(),
        config: text.as_bytes().to_vec(),
    })
}

/// Descriptors of the guest's memory, one a region, with the offset in each.
pub(super) fn memory(machine: &Machine) -> Result<Vec<(OwnedFd, u64)>, String> {
    let copy = |region: limosa_machine::RegionInfo<'_>| Ok((region.fd.try_clone_to_owned()?, region.fd_offset));
    machine
        .regions()
        .into_iter()
        .map(copy)
        .collect::<io::Result<_>>()
        .map_err(|e| format!("a memory descriptor cannot be copied: {e}"))
}

fn serial(serial: &Serial, console: Option<&Console>) -> io::Result<SerialSink> {
    let log: Box<dyn Write + Send> = match serial {
        Serial::Off if console.is_none() => return Ok(SerialSink::Null),
        Serial::Off => Box::new(io::sink()),
        Serial::Stdout => Box::new(Log::new(io::stdout().as_fd().try_clone_to_owned()?.into())),
        Serial::File(path) => Box::new(Log::new(OpenOptions::new().append(true).create(true).open(path)?)),
    };
    Ok(SerialSink::Writer(match console {
        Some(console) => Box::new(console.tee(log)),
        None => log,
    }))
}

/// A file that never grows beyond [`LOG_BYTES_MAX`]; anything that is no regular file is simply written to.
struct Log {
    file: File,
    /// Bytes in the file; none if it is no regular file.
    length: Option<u64>,
}

impl Log {
    fn new(file: File) -> Log {
        let length = file.metadata().ok().filter(std::fs::Metadata::is_file).map(|meta| meta.len());
        Log { file, length }
    }
}

impl Write for Log {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        if let Some(length) = &mut self.length {
            if *length > LOG_BYTES_MAX {
                self.file.set_len(0)?;
                *length = 0;
            }
            *length += bytes.len() as u64;
        }
        self.file.write(bytes)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.file.flush()
    }
}

/// An error with its causes, outermost first.
pub(super) fn words(error: &dyn std::error::Error) -> String {
    let mut words = error.to_string();
    let mut cause = error.source();
    while let Some(inner) = cause {
        let more = inner.to_string();
        if !words.contains(&more) {
            words = format!("{words}: {more}");
        }
        cause = inner.source();
    }
    words
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn a_log_stays_bounded() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("log");
        let mut log = Log::new(OpenOptions::new().append(true).create(true).open(&path).unwrap());
        log.file.set_len(LOG_BYTES_MAX + 1).unwrap();
        log.length = Some(LOG_BYTES_MAX + 1);
        log.write_all(b"news").unwrap();
        assert_eq!(std::fs::read(&path).unwrap(), b"news");
    }

    #[test]
    fn unknown_networks_are_named() {
        let nic = NicConfig { mac: [2; 6], network: "lan".into(), addresses: vec![], vlan: None, mtu: 1500, offload: true };
        assert_eq!(bridge_of(&nic, &[]), Ok(None));
        assert_eq!(bridge_of(&nic, &[("lan".into(), "br0".into())]), Ok(Some("br0".into())));
        let error = bridge_of(&nic, &[("wan".into(), "br1".into())]).unwrap_err();
        assert_eq!(error, "network \"lan\" is not known on this host; known: wan");
    }
}
