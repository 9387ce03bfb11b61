//! The PVH way of booting: an ELF whose Xen note names a 32-bit entry, and a start info that tells the rest.

use std::fs::File;
use std::path::Path;

use linux_loader::loader::elf::{Elf, PvhBootCapability};
use linux_loader::loader::{KernelLoader, KernelLoaderResult};
use vm_memory::{Bytes, GuestAddress};

use super::{BOOT_DATA, BootError, CMDLINE, CMDLINE_BYTES_MAX, Entry, acpi, memory_map, no_room, place_initramfs, write_cmdline};
use crate::memory::GuestRam;

const START_INFO: u64 = BOOT_DATA;
const MODULE_LIST: u64 = BOOT_DATA + 0x100;
const MEMORY_MAP: u64 = BOOT_DATA + 0x200;
const MAGIC: u32 = 0x336e_c578;
const VERSION: u32 = 1;

/// Loads the ELF and writes the start info; returns where to enter.
pub(super) fn load(
    ram: &GuestRam,
    path: &Path,
    file: &mut File,
    initramfs: Option<&Path>,
    cmdline: &str,
) -> Result<Entry, BootError> {
    let refused = |reason: String| BootError::Image { path: path.to_owned(), reason };
    let KernelLoaderResult { kernel_end, pvh_boot_cap, .. } =
        Elf::load(ram, None, file, None).map_err(|error| refused(format!("{error} (a 64-bit little-endian ELF is needed)")))?;
    let PvhBootCapability::PvhEntryPresent(entry) = pvh_boot_cap else {
        return Err(refused("its ELF has no PVH entry (Xen note 18); Linux has one with CONFIG_PVH=y".to_owned()));
    };
    write_cmdline(ram, cmdline, CMDLINE_BYTES_MAX)?;
    let module = place_initramfs(ram, initramfs, kernel_end, u64::MAX)?;
    let map = memory_map(ram);
    let mut info = Vec::new();
    // As in xen/include/public/arch-x86/hvm/start_info.h: magic, version, flags, modules, four addresses, the map's length.
    for word in [MAGIC, VERSION, 0, u32::from(module.is_some())] {
        info.extend(word.to_le_bytes());
    }
    for address in [if module.is_some() { MODULE_LIST } else { 0 }, CMDLINE, acpi::RSDP, MEMORY_MAP] {
        info.extend(address.to_le_bytes());
    }
    info.extend((map.len() as u64).to_le_bytes());
    ram.write_slice(&info, GuestAddress(START_INFO)).map_err(no_room("the start info"))?;
    if let Some(module) = module {
        let entry = [module.address, module.bytes, 0, 0].map(u64::to_le_bytes).concat();
        ram.write_slice(&entry, GuestAddress(MODULE_LIST)).map_err(no_room("the module list"))?;
    }
    let table: Vec<u8> =
        map.iter().flat_map(|piece| [piece.address, piece.bytes, u64::from(piece.kind)].map(u64::to_le_bytes).concat()).collect();
    ram.write_slice(&table, GuestAddress(MEMORY_MAP)).map_err(no_room("the memory map"))?;
    Ok(Entry { address: entry.0, ebx: START_INFO, esi: 0 })
}
