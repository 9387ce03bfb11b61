//! Booting: loads a kernel and makes the first vCPU ready to enter it. Not firmware: there is none.
//!
//! Two kinds of image, told apart by content: an ELF with a Xen PVH note, and a Linux bzImage by its 32-bit protocol. Both
//! are entered in 32-bit protected mode without paging, on flat segments.

mod acpi;
mod bzimage;
mod mptable;
mod pvh;

use std::fs::File;
use std::io::{Read, Seek, SeekFrom};
use std::path::{Path, PathBuf};

use kvm_bindings::{kvm_regs, kvm_segment};
use kvm_ioctls::VcpuFd;
use vm_memory::{Address, Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryRegion};

use crate::memory::{GuestRam, LOW_RAM_END};

const GDT: u64 = 0x500;
const BOOT_DATA: u64 = 0x7000;
const CMDLINE: u64 = 0x2_0000;
/// RAM for the kernel begins here; below lie our tables, and what PCs keep there.
const HIGH_START: u64 = 0x10_0000;
/// Conventional memory ends here; the multiprocessor table follows.
const LOW_END: u64 = 0x9_fc00;
/// Without its final NUL: a page, which is twice what Linux takes.
const CMDLINE_BYTES_MAX: usize = 4095;
const CODE_SELECTOR: u16 = 0x10;
const DATA_SELECTOR: u16 = 0x18;
const CR0_PROTECTED: u64 = 1;
const MEMORY_RAM: u32 = 1;
const MEMORY_RESERVED: u32 = 2;

/// What to boot.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BootConfig {
    /// A 64-bit ELF with a PVH entry, or a bzImage.
    pub kernel: PathBuf,
    /// An initial RAM file system.
    pub initramfs: Option<PathBuf>,
    /// The kernel's command line, as it is: the machine's devices are in its ACPI tables.
    pub cmdline: String,
}

/// Why a kernel could not be booted.
#[derive(Debug, thiserror::Error)]
pub enum BootError {
    /// The machine has run, or holds a loaded state.
    #[error("the machine was already booted or loaded: make a new one")]
    NotFresh,
    /// A file could not be read.
    #[error("cannot read {what} {path}: {source}")]
    File {
        /// "kernel" or "initramfs".
        what: &'static str,
        /// The file.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// The kernel is of no known kind.
    #[error("{path} is no kernel that can be booted: {reason}")]
    Image {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        reason: String,
    },
    /// The command line is too long, or has a NUL.
    #[error("the command line has {given} bytes, over the limit of {limit}, or has a NUL in it: {cmdline:?}")]
    Cmdline {
        /// The whole command line.
        cmdline: String,
        /// Its bytes.
        given: usize,
        /// How many this kernel takes.
        limit: usize,
    },
    /// Something does not fit into guest memory.
    #[error("{what} does not fit into guest memory{hint}")]
    NoRoom {
        /// What does not fit.
        what: &'static str,
        /// What to do about it.
        hint: &'static str,
    },
    /// KVM refused the first vCPU's registers.
    #[error("{what} failed: {source}")]
    Kvm {
        /// The ioctl.
        what: &'static str,
        /// The error of the kernel.
        source: kvm_ioctls::Error,
    },
}

/// Where the first vCPU starts, and what its registers point to.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Entry {
    address: u64,
    /// PVH: the start info.
    ebx: u64,
    /// Linux: the boot parameters.
    esi: u64,
}

/// A piece of the memory map as kernels are told it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct MapEntry {
    address: u64,
    bytes: u64,
    kind: u32,
}

/// Where something was put in guest memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Placed {
    address: u64,
    bytes: u64,
}

fn no_room<E>(what: &'static str) -> impl FnOnce(E) -> BootError {
    move |_| BootError::NoRoom { what, hint: "" }
}

/// Loads kernel, initramfs and tables into `ram`, and sets the first vCPU's registers.
pub(crate) fn boot(ram: &GuestRam, first: &VcpuFd, vcpus: u32, devices: usize, config: &BootConfig) -> Result<(), BootError> {
    let entry = load(ram, vcpus, devices, config)?;
    set_registers(first, entry)
}

fn load(ram: &GuestRam, vcpus: u32, devices: usize, config: &BootConfig) -> Result<Entry, BootError> {
    let (path, cmdline) = (&config.kernel, config.cmdline.trim());
    let unreadable = |source| BootError::File { what: "kernel", path: path.clone(), source };
    let mut file = File::open(path).map_err(unreadable)?;
    let mut head = Vec::new();
    file.by_ref().take(0x206).read_to_end(&mut head).map_err(unreadable)?;
    file.seek(SeekFrom::Start(0)).map_err(unreadable)?;
    write_gdt(ram)?;
    mptable::write(ram, vcpus)?;
    acpi::write(ram, vcpus, devices)?;
    let initramfs = config.initramfs.as_deref();
    if head.starts_with(b"\x7fELF") {
        pvh::load(ram, path, &mut file, initramfs, cmdline)
    } else if head.get(0x202..0x206) == Some(b"HdrS") {
        bzimage::load(ram, path, &mut file, initramfs, cmdline)
    } else {
        let reason = "neither an ELF (PVH) nor a bzImage; a vmlinuz of another architecture, or a compressed vmlinux?";
        Err(BootError::Image { path: path.clone(), reason: reason.to_owned() })
    }
}

fn write_cmdline(ram: &GuestRam, cmdline: &str, limit: usize) -> Result<(), BootError> {
    let limit = limit.min(CMDLINE_BYTES_MAX);
    if cmdline.len() > limit || cmdline.contains('\0') {
        return Err(BootError::Cmdline { cmdline: cmdline.to_owned(), given: cmdline.len(), limit });
    }
    let mut bytes = cmdline.as_bytes().to_vec();
    bytes.push(0);
    ram.write_slice(&bytes, GuestAddress(CMDLINE)).map_err(no_room("the command line"))
}

/// Puts the initramfs at the top of low RAM: out of the way of a kernel that unpacks itself.
fn place_initramfs(ram: &GuestRam, path: Option<&Path>, after: u64, limit: u64) -> Result<Option<Placed>, BootError> {
    let Some(path) = path else { return Ok(None) };
    let unreadable = |source| BootError::File { what: "initramfs", path: path.to_owned(), source };
    let mut file = File::open(path).map_err(unreadable)?;
    let bytes = file.metadata().map_err(unreadable)?.len();
    let top = low_ram_bytes(ram).min(limit);
    let full = || BootError::NoRoom { what: "the initramfs", hint: "; give the machine more memory" };
    let address = top.checked_sub(bytes).ok_or_else(full)? & !0xfff;
    if address < after {
        return Err(full());
    }
    let size = usize::try_from(bytes).map_err(no_room("the initramfs"))?;
    ram.read_exact_volatile_from(GuestAddress(address), &mut file, size)
        .map_err(|error| unreadable(std::io::Error::other(error)))?;
    Ok(Some(Placed { address, bytes }))
}

/// Bytes of RAM below the device hole.
fn low_ram_bytes(ram: &GuestRam) -> u64 {
    ram.iter().map(|region| region.last_addr().raw_value() + 1).filter(|end| *end <= LOW_RAM_END).max().unwrap_or(0)
}

/// The memory map: conventional memory, tables and ROM, RAM from 1 MiB, RAM from 4 GiB.
fn memory_map(ram: &GuestRam) -> Vec<MapEntry> {
    let mut map = vec![
        MapEntry { address: 0, bytes: LOW_END, kind: MEMORY_RAM },
        MapEntry { address: LOW_END, bytes: HIGH_START - LOW_END, kind: MEMORY_RESERVED },
    ];
    for region in ram.iter() {
        let start = region.start_addr().raw_value().max(HIGH_START);
        let end = region.last_addr().raw_value() + 1;
        if end > start {
            map.push(MapEntry { address: start, bytes: end - start, kind: MEMORY_RAM });
        }
    }
    map
}

/// Flat 4 GiB segments: code at 0x10 and data at 0x18, as Linux's boot protocol wants them.
fn write_gdt(ram: &GuestRam) -> Result<(), BootError> {
    let table: [u64; 4] = [0, 0, 0x00cf_9b00_0000_ffff, 0x00cf_9300_0000_ffff];
    for (address, descriptor) in (GDT..).step_by(8).zip(table) {
        ram.write_obj(descriptor, GuestAddress(address)).map_err(no_room("the GDT"))?;
    }
    Ok(())
}

fn segment(selector: u16, type_: u8) -> kvm_segment {
    kvm_segment { base: 0, limit: 0xffff_ffff, selector, type_, present: 1, db: 1, s: 1, g: 1, ..Default::default() }
}

fn set_registers(vcpu: &VcpuFd, entry: Entry) -> Result<(), BootError> {
    let mut sregs = vcpu.get_sregs().map_err(|source| BootError::Kvm { what: "KVM_GET_SREGS", source })?;
    let data = segment(DATA_SELECTOR, 3);
    sregs.cs = segment(CODE_SELECTOR, 11);
    (sregs.ds, sregs.es, sregs.fs, sregs.gs, sregs.ss) = (data, data, data, data, data);
    sregs.tr = kvm_segment { limit: 0x67, type_: 11, present: 1, ..Default::default() };
    sregs.gdt.base = GDT;
    sregs.gdt.limit = 31;
    sregs.cr0 |= CR0_PROTECTED;
    sregs.cr4 = 0;
    sregs.efer = 0;
    vcpu.set_sregs(&sregs).map_err(|source| BootError::Kvm { what: "KVM_SET_SREGS", source })?;
    let regs = kvm_regs { rflags: 2, rip: entry.address, rbx: entry.ebx, rsi: entry.esi, ..Default::default() };
    vcpu.set_regs(&regs).map_err(|source| BootError::Kvm { what: "KVM_SET_REGS", source })
}

#[cfg(test)]
pub(crate) mod tests;
