//! A guest's description as it crosses the plug: fixed structs and counted arrays that a C program can walk.
//! What the fields mean is said by `limosa_proto`; this is only their layout and their limits.

use crate::message::{BRIDGES_MAX, Fields, Malformed, name_length, text_length};
use limosa_proto::identity::VmId;
use limosa_proto::memory::{Gpa, MemoryMap, PAGE_BYTES, REGIONS_MAX, Region};
use limosa_proto::wire::limits::{
    ADDRESSES_MAX, CONFIG_BYTES_MAX, DISKS_MAX, NICS_MAX, PATH_BYTES_MAX, RECORD_KINDS_MAX, SERIAL_BYTES_MAX, VCPUS_MAX,
};
use limosa_proto::wire::message::{DiskDescription, ImageFormat, NicDescription, VmDescription};
use std::net::IpAddr;

/// Stands for "no VLAN".
const VLAN_NONE: u16 = 0xffff;

/// What Describe and Prepare are answered with, memfds apart.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Machine {
    /// The guest.
    pub description: VmDescription,
    /// For each memory region, at which byte of its memfd it begins; a multiple of its page size.
    pub offsets: Vec<u64>,
}

impl Machine {
    pub(crate) fn emit(&self, out: &mut Vec<u8>) -> Result<(), Malformed> {
        emit(&self.description, out)?;
        for offset in &self.offsets {
            out.extend(offset.to_le_bytes());
        }
        Ok(())
    }

    pub(crate) fn parse(fields: &mut Fields<'_>) -> Result<Machine, Malformed> {
        let description = parse(fields)?;
        let offsets = description.memory.regions().iter().map(|_| fields.u64()).collect::<Result<Vec<u64>, _>>()?;
        if offsets.iter().any(|offset| !offset.is_multiple_of(PAGE_BYTES)) {
            return Err(fields.wrong("an offset into a memfd is not a multiple of 4096"));
        }
        Ok(Machine { description, offsets })
    }
}

fn bounded(what: &'static str, count: usize, most: usize) -> Result<u16, Malformed> {
    match u16::try_from(count) {
        Ok(number) if count <= most => Ok(number),
        _ => Err(Malformed::new(what, format!("{count}; at most {most} are carried"))),
    }
}

/// Appends the description.
pub(crate) fn emit(vm: &VmDescription, out: &mut Vec<u8>) -> Result<(), Malformed> {
    if vm.config.len() > CONFIG_BYTES_MAX {
        let why = format!("{} bytes; at most {CONFIG_BYTES_MAX} are carried", vm.config.len());
        return Err(Malformed::new("the VMM's configuration", why));
    }
    out.extend(vm.id.0);
    out.extend(vm.vcpus.to_le_bytes());
    out.extend(bounded("memory regions", vm.memory.regions().len(), REGIONS_MAX)?.to_le_bytes());
    out.extend(bounded("NICs", vm.nics.len(), NICS_MAX)?.to_le_bytes());
    out.extend(bounded("kinds of record", vm.records.len(), RECORD_KINDS_MAX)?.to_le_bytes());
    out.extend(name_length("name of the VM", &vm.name)?.to_le_bytes());
    out.extend(name_length("kind of VMM", &vm.vmm)?.to_le_bytes());
    out.extend(bounded("disks", vm.disks.len(), DISKS_MAX)?.to_le_bytes());
    out.extend((vm.config.len() as u32).to_le_bytes());
    out.extend([0; 4]);
    for region in vm.memory.regions() {
        out.extend(region.gpa.0.to_le_bytes());
        out.extend(region.bytes.to_le_bytes());
        out.extend(region.page_bytes.to_le_bytes());
    }
    for nic in &vm.nics {
        emit_nic(nic, out)?;
    }
    for disk in &vm.disks {
        emit_disk(disk, out)?;
    }
    for (kind, version) in &vm.records {
        out.extend(kind.to_le_bytes());
        out.extend(version.to_le_bytes());
    }
    out.extend(vm.name.as_bytes());
    out.extend(vm.vmm.as_bytes());
    out.extend(&vm.config);
    Ok(())
}

/// The token is between the agents: it does not cross the plug.
fn emit_disk(disk: &DiskDescription, out: &mut Vec<u8>) -> Result<(), Malformed> {
    out.extend(disk.bytes.to_le_bytes());
    out.extend([if disk.format == ImageFormat::Raw { 1 } else { 2 }, u8::from(disk.readonly)]);
    out.extend(text_length("path of a disk", &disk.path, PATH_BYTES_MAX)?.to_le_bytes());
    out.extend(text_length("serial of a disk", &disk.serial, SERIAL_BYTES_MAX)?.to_le_bytes());
    out.extend([0; 2]);
    out.extend(disk.path.as_bytes());
    out.extend(disk.serial.as_bytes());
    Ok(())
}

fn emit_nic(nic: &NicDescription, out: &mut Vec<u8>) -> Result<(), Malformed> {
    out.extend(nic.mac);
    out.extend(nic.mtu.to_le_bytes());
    out.extend(nic.vlan.unwrap_or(VLAN_NONE).to_le_bytes());
    out.extend(name_length("name of a network", &nic.network)?.to_le_bytes());
    out.extend(bounded("addresses of a NIC", nic.addresses.len(), ADDRESSES_MAX)?.to_le_bytes());
    out.extend([0; 2]);
    out.extend(nic.network.as_bytes());
    for address in &nic.addresses {
        let (family, bytes) = match address {
            IpAddr::V4(v4) => {
                let mut bytes = [0; 16];
                for (to, from) in bytes.iter_mut().zip(v4.octets()) {
                    *to = from;
                }
                (4, bytes)
            }
            IpAddr::V6(v6) => (6, v6.octets()),
        };
        out.extend([family, 0, 0, 0]);
        out.extend(bytes);
    }
    Ok(())
}

/// Takes a description off the front of `fields`.
pub(crate) fn parse(fields: &mut Fields<'_>) -> Result<VmDescription, Malformed> {
    let id = VmId(fields.array()?);
    let vcpus = fields.u32()?;
    let [regions, nics, records] = [fields.u16()?, fields.u16()?, fields.u16()?].map(usize::from);
    let (name_length, vmm_length) = (fields.u16()?, fields.u16()?);
    let disks = usize::from(fields.u16()?);
    let config_length = fields.u32()? as usize;
    fields.zeros(4)?;
    let over = regions > REGIONS_MAX || nics > NICS_MAX || disks > DISKS_MAX || records > RECORD_KINDS_MAX;
    if over || config_length > CONFIG_BYTES_MAX {
        return Err(fields.wrong(format!(
            "{regions} regions, {nics} NICs, {disks} disks, {records} kinds of record, {config_length} bytes of configuration; \
             at most {REGIONS_MAX}, {NICS_MAX}, {DISKS_MAX}, {RECORD_KINDS_MAX} and {CONFIG_BYTES_MAX} are carried"
        )));
    }
    if vcpus == 0 || vcpus > VCPUS_MAX {
        return Err(fields.wrong(format!("{vcpus} vCPUs; a guest has 1 to {VCPUS_MAX}")));
    }
    let mut shape = Vec::with_capacity(regions);
    for _ in 0..regions {
        shape.push(Region { gpa: Gpa(fields.u64()?), bytes: fields.u64()?, page_bytes: fields.u64()? });
    }
    let memory = MemoryMap::new(shape).map_err(|error| fields.wrong(error.to_string()))?;
    let nics = (0..nics).map(|_| parse_nic(fields)).collect::<Result<Vec<_>, _>>()?;
    let disks = (0..disks).map(|_| parse_disk(fields)).collect::<Result<Vec<_>, _>>()?;
    let records = (0..records).map(|_| Ok((fields.u16()?, fields.u16()?))).collect::<Result<Vec<_>, Malformed>>()?;
    let name = fields.name(name_length)?;
    let vmm = fields.name(vmm_length)?;
    let config = fields.bytes(config_length)?.to_vec();
    Ok(VmDescription { id, name, vcpus, memory, nics, disks, vmm, records, config })
}

fn parse_disk(fields: &mut Fields<'_>) -> Result<DiskDescription, Malformed> {
    let bytes = fields.u64()?;
    let format = match fields.u8()? {
        1 => ImageFormat::Raw,
        2 => ImageFormat::Qcow2,
        other => return Err(fields.wrong(format!("a disk of format {other}; 1 (raw) and 2 (qcow2) are known"))),
    };
    let readonly = match fields.u8()? {
        0 => false,
        1 => true,
        other => return Err(fields.wrong(format!("whether a disk may be written is {other}, not 0 or 1"))),
    };
    let (path_length, serial_length) = (fields.u16()?, fields.u16()?);
    fields.zeros(2)?;
    let path = fields.text(path_length, PATH_BYTES_MAX)?;
    let serial = fields.text(serial_length, SERIAL_BYTES_MAX)?;
    Ok(DiskDescription { path, format, readonly, bytes, serial, token: [0; 32] })
}

fn parse_nic(fields: &mut Fields<'_>) -> Result<NicDescription, Malformed> {
    let mac = fields.array()?;
    let mtu = fields.u16()?;
    let vlan = match fields.u16()? {
        VLAN_NONE => None,
        tag @ 1..=4094 => Some(tag),
        other => return Err(fields.wrong(format!("there is no VLAN {other}"))),
    };
    let network_length = fields.u16()?;
    let addresses = usize::from(fields.u16()?);
    fields.zeros(2)?;
    if addresses > ADDRESSES_MAX {
        return Err(fields.wrong(format!("a NIC with {addresses} addresses; at most {ADDRESSES_MAX} are carried")));
    }
    let network = fields.name(network_length)?;
    let addresses = (0..addresses).map(|_| parse_address(fields)).collect::<Result<Vec<_>, _>>()?;
    Ok(NicDescription { mac, network, mtu, vlan, addresses })
}

fn parse_address(fields: &mut Fields<'_>) -> Result<IpAddr, Malformed> {
    let family = fields.u8()?;
    fields.zeros(3)?;
    match family {
        4 => {
            let octets: [u8; 4] = fields.array()?;
            fields.zeros(12)?;
            Ok(IpAddr::from(octets))
        }
        6 => Ok(IpAddr::from(fields.array::<16>()?)),
        other => Err(fields.wrong(format!("an address of family {other}; 4 and 6 are known"))),
    }
}

/// Appends the map from networks to bridges.
pub(crate) fn emit_bridges(bridges: &[(String, String)], out: &mut Vec<u8>) -> Result<(), Malformed> {
    out.extend(bounded("networks with a bridge", bridges.len(), BRIDGES_MAX)?.to_le_bytes());
    out.extend([0; 2]);
    for (network, bridge) in bridges {
        out.extend(name_length("name of a network", network)?.to_le_bytes());
        out.extend(name_length("name of a bridge", bridge)?.to_le_bytes());
        out.extend(network.as_bytes());
        out.extend(bridge.as_bytes());
    }
    Ok(())
}

/// Takes the map from networks to bridges off the front of `fields`.
pub(crate) fn parse_bridges(fields: &mut Fields<'_>) -> Result<Vec<(String, String)>, Malformed> {
    let count = usize::from(fields.u16()?);
    fields.zeros(2)?;
    if count > BRIDGES_MAX {
        return Err(fields.wrong(format!("{count} networks with a bridge; at most {BRIDGES_MAX} are carried")));
    }
    let mut bridges = Vec::with_capacity(count);
    for _ in 0..count {
        let (network, bridge) = (fields.u16()?, fields.u16()?);
        bridges.push((fields.name(network)?, fields.name(bridge)?));
    }
    Ok(bridges)
}
