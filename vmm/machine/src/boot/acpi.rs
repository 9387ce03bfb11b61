//! ACPI tables: CPUs and the IOAPIC (MADT), devices (DSDT), how to switch off and reset (FADT). Not what the devices do.
//!
//! The tables describe hardware-reduced ACPI: no power management timer, no fixed events, no SCI. Kernels then take
//! interrupts from the IOAPIC alone, and find the virtio devices by the id LNRO0005 without a word on their command line.

use acpi_tables::aml::{Device, EISAName, IO, Interrupt, Memory32Fixed, Name, Package, Path, ResourceTemplate, Scope};
use acpi_tables::fadt::{FADTBuilder, Flags};
use acpi_tables::gas::{AccessSize, AddressSpace, GAS};
use acpi_tables::rsdp::Rsdp;
use acpi_tables::sdt::Sdt;
use acpi_tables::xsdt::XSDT;
use acpi_tables::{Aml, AmlSink as _};
use vm_memory::{Bytes, GuestAddress};

use super::{BootError, HIGH_START, no_room};
use crate::bus::{KEYBOARD_COMMAND, KEYBOARD_RESET, MMIO_BYTES, SLEEP_PORT};
use crate::devices::serial::{SERIAL_IRQ, SERIAL_PORT};
use crate::devices::worker::place;
use crate::memory::GuestRam;

/// Where firmware of PCs has its ROM, and where kernels look for the root pointer.
pub(super) const RSDP: u64 = 0xe_0000;
const OEM: [u8; 6] = *b"LIMOSA";
const OEM_TABLE: [u8; 8] = *b"LIMOSAVM";
const LAPIC_ADDRESS: u32 = 0xfee0_0000;
const IOAPIC_ADDRESS: u32 = 0xfec0_0000;
/// APIC ids below this fit the xAPIC entries of the MADT; 255 means all of them.
const XAPIC_IDS: u32 = 255;
/// FADT, boot architecture: no VGA to be probed, no CMOS clock.
const BOOT_ARCHITECTURE: u16 = 1 << 2 | 1 << 5;
/// The value of `_S5_` that the guest puts into the sleep control register.
const SLEEP_TYPE_OFF: u8 = 5;

/// Writes all tables; kernels find them at [`RSDP`].
pub(super) fn write(ram: &GuestRam, vcpus: u32, devices: usize) -> Result<(), BootError> {
    let mut next = RSDP + 64;
    let mut put = |table: &[u8]| {
        let at = next;
        next = (at + table.len() as u64).next_multiple_of(16);
        if next > HIGH_START {
            return Err(no_room("the ACPI tables")(()));
        }
        ram.write_slice(table, GuestAddress(at)).map_err(no_room("the ACPI tables"))?;
        Ok(at)
    };
    let dsdt = put(dsdt(devices).as_slice())?;
    let fadt = put(&bytes(&fadt(dsdt)))?;
    let madt = put(madt(vcpus).as_slice())?;
    let mut xsdt = XSDT::new(OEM, OEM_TABLE, 1);
    xsdt.add_entry(fadt);
    xsdt.add_entry(madt);
    let xsdt = put(&bytes(&xsdt))?;
    ram.write_slice(&bytes(&Rsdp::new(OEM, xsdt)), GuestAddress(RSDP)).map_err(no_room("the ACPI tables"))
}

fn bytes(table: &dyn Aml) -> Vec<u8> {
    let mut bytes = Vec::new();
    table.to_aml_bytes(&mut bytes);
    bytes
}

fn fadt(dsdt: u64) -> impl Aml {
    let port = |port: u16| GAS::new(AddressSpace::SystemIo, 8, 0, AccessSize::ByteAccess, u64::from(port));
    let mut fadt = FADTBuilder::new(OEM, OEM_TABLE, 1)
        .dsdt_64(dsdt)
        .flag(Flags::HwReducedAcpi)
        .flag(Flags::ResetRegSup)
        .flag(Flags::PwrButton)
        .flag(Flags::SlpButton)
        .flag(Flags::Headless);
    fadt.iapc_boot_arch = BOOT_ARCHITECTURE.into();
    fadt.reset_reg = port(KEYBOARD_COMMAND);
    fadt.reset_value = KEYBOARD_RESET;
    fadt.sleep_control_reg = port(SLEEP_PORT);
    fadt.sleep_status_reg = port(SLEEP_PORT + 1);
    fadt.finalize()
}

/// The table of interrupt controllers.
fn madt(vcpus: u32) -> Sdt {
    let mut madt = Sdt::new(*b"APIC", 36, 5, OEM, OEM_TABLE, 1);
    madt.dword(LAPIC_ADDRESS);
    // There are PICs too, which a hardware-reduced kernel leaves alone.
    madt.dword(1);
    for id in 0..vcpus {
        if let Some(id) = u8::try_from(id).ok().filter(|id| u32::from(*id) < XAPIC_IDS) {
            madt.vec(&[0, 8, id, id, 1, 0, 0, 0]);
        } else {
            // Type 9: x2APIC id, flags, processor's number.
            madt.vec(&[9, 16, 0, 0]);
            madt.dword(id);
            madt.dword(1);
            madt.dword(id);
        }
    }
    madt.vec(&[1, 12, 0, 0]);
    madt.dword(IOAPIC_ADDRESS);
    madt.dword(0);
    // KVM wires the timer, ISA interrupt 0, to input 2 of the IOAPIC.
    madt.vec(&[2, 10, 0, 0, 2, 0, 0, 0, 0, 0]);
    // The NMI is on LINT1 of all processors.
    madt.vec(&[4, 6, 0xff, 0, 0, 1]);
    madt.update_checksum();
    madt
}

/// The devices, and the sleep state "off".
fn dsdt(devices: usize) -> Sdt {
    let mut body = Vec::new();
    let zero = 0_u8;
    Name::new(Path::new("_S5_"), &Package::new(vec![&SLEEP_TYPE_OFF, &zero])).to_aml_bytes(&mut body);
    serial_device(&mut body);
    for slot in 0..devices {
        virtio_device(slot, &mut body);
    }
    let mut dsdt = Sdt::new(*b"DSDT", 36, 6, OEM, OEM_TABLE, 1);
    dsdt.append_slice(&body);
    dsdt.update_checksum();
    dsdt
}

fn serial_device(out: &mut Vec<u8>) {
    let (interrupt, ports) = (Interrupt::new(true, true, false, false, SERIAL_IRQ), IO::new(SERIAL_PORT, SERIAL_PORT, 0, 8));
    let (id, uid) = (Name::new(Path::new("_HID"), &EISAName::new("PNP0501")), Name::new(Path::new("_UID"), &0_u8));
    let resources = Name::new(Path::new("_CRS"), &ResourceTemplate::new(vec![&interrupt, &ports]));
    let device = Device::new(Path::new("COM1"), vec![&id, &uid, &resources]);
    Scope::new(Path::new("_SB_"), vec![&device]).to_aml_bytes(out);
}

fn virtio_device(slot: usize, out: &mut Vec<u8>) {
    let (mmio, irq) = place(slot);
    let name = format!("V{slot:03}");
    let id = Name::new(Path::new("_HID"), &"LNRO0005");
    let uid = Name::new(Path::new("_UID"), &u8::try_from(slot).unwrap_or(u8::MAX));
    let coherent = Name::new(Path::new("_CCA"), &1_u8);
    // The device hole is below 4 GiB.
    let registers = Memory32Fixed::new(true, u32::try_from(mmio).unwrap_or(u32::MAX), MMIO_BYTES as u32);
    let interrupt = Interrupt::new(true, true, false, false, irq);
    let resources = Name::new(Path::new("_CRS"), &ResourceTemplate::new(vec![&registers, &interrupt]));
    let device = Device::new(Path::new(&name), vec![&id, &uid, &coherent, &resources]);
    Scope::new(Path::new("_SB_"), vec![&device]).to_aml_bytes(out);
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::panic, clippy::indexing_slicing)]
    use super::*;
    use crate::memory::{MemoryConfig, Ram};

    fn sum(bytes: &[u8]) -> u8 {
        bytes.iter().fold(0, |sum, byte| sum.wrapping_add(*byte))
    }

    fn read(ram: &GuestRam, at: u64, bytes: usize) -> Vec<u8> {
        let mut read = vec![0; bytes];
        ram.read_slice(&mut read, GuestAddress(at)).unwrap();
        read
    }

    fn table(ram: &GuestRam, at: u64) -> Vec<u8> {
        let length = u32::from_le_bytes(read(ram, at + 4, 4).try_into().unwrap());
        let table = read(ram, at, length as usize);
        assert_eq!(sum(&table), 0, "checksum of {}", String::from_utf8_lossy(&table[..4]));
        table
    }

    #[test]
    fn a_kernel_finds_every_table() {
        let ram = Ram::new(&MemoryConfig::new(4 << 20)).unwrap();
        let ram = ram.guest();
        write(ram, 300, 19).unwrap();
        let rsdp = read(ram, RSDP, 36);
        assert_eq!((&rsdp[..8], sum(&rsdp[..20]), sum(&rsdp)), (&b"RSD PTR "[..], 0, 0));
        let xsdt = table(ram, u64::from_le_bytes(rsdp[24..32].try_into().unwrap()));
        let tables: Vec<Vec<u8>> =
            xsdt[36..].chunks(8).map(|at| table(ram, u64::from_le_bytes(at.try_into().unwrap()))).collect();
        assert_eq!((&tables[0][..4], &tables[1][..4]), (&b"FACP"[..], &b"APIC"[..]));
        let dsdt = table(ram, u64::from_le_bytes(tables[0][140..148].try_into().unwrap()));
        assert_eq!(&dsdt[..4], b"DSDT");
        let count = |needle: &[u8]| dsdt.windows(needle.len()).filter(|bytes| *bytes == needle).count();
        assert_eq!((count(b"LNRO0005"), count(b"COM1"), count(b"_S5_")), (19, 1, 1));
        // 255 xAPIC entries, 45 of x2APIC, IOAPIC, override, NMI.
        assert_eq!(tables[1].len(), 44 + 255 * 8 + 45 * 16 + 12 + 10 + 6);
    }
}
