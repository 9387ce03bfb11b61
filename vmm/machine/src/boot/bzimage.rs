//! Linux's way of booting: a bzImage by its 32-bit boot protocol, with boot parameters in the zero page.

use std::fs::File;
use std::path::Path;

use linux_loader::loader::bootparam::{boot_params, setup_header};
use linux_loader::loader::{BzImage, KernelLoader};
use vm_memory::{Bytes, GuestAddress};

use super::{BOOT_DATA, BootError, CMDLINE, Entry, HIGH_START, acpi, memory_map, no_room, place_initramfs, write_cmdline};
use crate::memory::GuestRam;

/// The 32-bit protocol with `initrd_addr_max` and `cmdline_size` is of 2.06; older kernels are of 2007.
const PROTOCOL_MIN: u16 = 0x0206;
const LOADER_UNKNOWN: u8 = 0xff;
const LOADFLAGS_CAN_USE_HEAP: u8 = 0x80;
/// Where the zero page has the memory map, and how many entries it has room for.
const MAP_OFFSET: u64 = 0x2d0;
const MAP_COUNT_OFFSET: u64 = 0x1e8;

/// Loads the protected-mode kernel and writes the zero page; returns where to enter.
pub(super) fn load(
    ram: &GuestRam,
    path: &Path,
    file: &mut File,
    initramfs: Option<&Path>,
    cmdline: &str,
) -> Result<Entry, BootError> {
    let refused = |reason: String| BootError::Image { path: path.to_owned(), reason };
    let loaded = BzImage::load(ram, None, file, Some(GuestAddress(HIGH_START))).map_err(|error| refused(error.to_string()))?;
    let mut header = loaded.setup_header.ok_or_else(|| refused("it has no setup header".to_owned()))?;
    let version = header.version;
    if version < PROTOCOL_MIN {
        return Err(refused(format!("boot protocol {}.{:02} is too old, 2.06 is needed", version >> 8, version & 0xff)));
    }
    let limit = match header.cmdline_size {
        0 => 255,
        bytes => bytes as usize,
    };
    write_cmdline(ram, cmdline, limit)?;
    // The kernel unpacks itself into what it says; the initramfs must stay clear of that.
    let unpacked = u64::from(header.init_size).saturating_add(header.pref_address.max(HIGH_START));
    let module =
        place_initramfs(ram, initramfs, loaded.kernel_end.max(unpacked), u64::from(header.initrd_addr_max).saturating_add(1))?;
    header.type_of_loader = LOADER_UNKNOWN;
    header.loadflags &= !LOADFLAGS_CAN_USE_HEAP;
    header.cmd_line_ptr = CMDLINE as u32;
    if let Some(module) = module {
        // Low RAM ends below 3 GiB, so both fit.
        header.ramdisk_image = u32::try_from(module.address).map_err(no_room("the initramfs"))?;
        header.ramdisk_size = u32::try_from(module.bytes).map_err(no_room("the initramfs"))?;
    }
    write_zero_page(ram, header)?;
    Ok(Entry { address: loaded.kernel_load.0, ebx: 0, esi: BOOT_DATA })
}

fn write_zero_page(ram: &GuestRam, hdr: setup_header) -> Result<(), BootError> {
    let params = boot_params { hdr, acpi_rsdp_addr: acpi::RSDP, ..Default::default() };
    ram.write_obj(params, GuestAddress(BOOT_DATA)).map_err(no_room("the zero page"))?;
    let map = memory_map(ram);
    let mut table = Vec::new();
    for piece in &map {
        table.extend(piece.address.to_le_bytes());
        table.extend(piece.bytes.to_le_bytes());
        table.extend(piece.kind.to_le_bytes());
    }
    ram.write_slice(&table, GuestAddress(BOOT_DATA + MAP_OFFSET)).map_err(no_room("the memory map"))?;
    let count = u8::try_from(map.len()).map_err(no_room("the memory map"))?;
    ram.write_obj(count, GuestAddress(BOOT_DATA + MAP_COUNT_OFFSET)).map_err(no_room("the memory map"))
}
