//! The multiprocessor table (Intel MP specification 1.4): tells a kernel its CPUs, IOAPIC and interrupts without ACPI.

use vm_memory::{Bytes, GuestAddress};

use super::{BootError, HIGH_START, LOW_END, no_room};
use crate::memory::GuestRam;

const LAPIC_ADDRESS: u32 = 0xfee0_0000;
const IOAPIC_ADDRESS: u32 = 0xfec0_0000;
const APIC_VERSION: u8 = 0x14;
const BUS_ISA: u8 = 0;
/// APIC ids of the table have 8 bits and 255 means all; kernels learn of no more CPUs this way.
const CPUS_MAX: u32 = 254;
const ISA_IRQS: u8 = 24;
/// The table ends here at the latest: there is a page of ROM space above, which real PCs use likewise.
const TABLE_END: u64 = HIGH_START;

/// Makes the bytes sum to zero, as both structures must.
fn balance(bytes: &mut [u8], at: usize) {
    let sum = bytes.iter().fold(0_u8, |sum, byte| sum.wrapping_add(*byte));
    if let Some(checksum) = bytes.get_mut(at) {
        *checksum = checksum.wrapping_sub(sum);
    }
}

/// The floating pointer, and the table right after it.
fn table(vcpus: u32) -> Vec<u8> {
    let cpus = u8::try_from(vcpus.min(CPUS_MAX)).unwrap_or(u8::MAX);
    let ioapic_id = cpus;
    let mut entries = Vec::new();
    let mut count = 0_u16;
    for id in 0..cpus {
        let flags = 1 | u8::from(id == 0) << 1;
        entries.extend([0, id, APIC_VERSION, flags]);
        // Family 6 and features FPU, APIC: kernels ask CPUID itself.
        entries.extend([0, 6, 0, 0, 1, 2, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0]);
        count += 1;
    }
    entries.extend([1, BUS_ISA]);
    entries.extend(*b"ISA   ");
    entries.extend([2, ioapic_id, APIC_VERSION, 1]);
    entries.extend(IOAPIC_ADDRESS.to_le_bytes());
    count += 2;
    for irq in 0..ISA_IRQS {
        // KVM wires the timer, ISA interrupt 0, to input 2 of the IOAPIC; input 2 itself is the PICs' cascade.
        let input = if irq == 0 { 2 } else { irq };
        if irq != 2 {
            entries.extend([3, 0, 0, 0, BUS_ISA, irq, ioapic_id, input]);
            count += 1;
        }
    }
    entries.extend([4, 3, 0, 0, BUS_ISA, 0, 0, 0]);
    entries.extend([4, 1, 0, 0, BUS_ISA, 0, 255, 1]);
    count += 2;
    let mut header = b"PCMP".to_vec();
    header.extend(u16::try_from(44 + entries.len()).unwrap_or(u16::MAX).to_le_bytes());
    header.extend([4, 0]);
    header.extend(*b"LIMOSA  VMM         ");
    header.extend([0; 6]);
    header.extend(count.to_le_bytes());
    header.extend(LAPIC_ADDRESS.to_le_bytes());
    header.extend([0; 4]);
    header.extend(entries);
    balance(&mut header, 7);
    let mut floating = b"_MP_".to_vec();
    floating.extend((LOW_END as u32 + 16).to_le_bytes());
    floating.extend([1, 4, 0, 0, 0, 0, 0, 0]);
    balance(&mut floating, 10);
    floating.extend(header);
    floating
}

/// Writes the table where kernels look for it: at the end of conventional memory.
pub(super) fn write(ram: &GuestRam, vcpus: u32) -> Result<(), BootError> {
    let bytes = table(vcpus);
    if LOW_END + bytes.len() as u64 > TABLE_END {
        return Err(BootError::NoRoom { what: "the multiprocessor table", hint: "" });
    }
    ram.write_slice(&bytes, GuestAddress(LOW_END)).map_err(no_room("the multiprocessor table"))
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::indexing_slicing)]
    use super::*;

    #[test]
    fn the_table_is_what_its_header_says() {
        for vcpus in [1, 4, 254, 1000] {
            let bytes = table(vcpus);
            let (floating, header) = bytes.split_at(16);
            let sum = |bytes: &[u8]| bytes.iter().fold(0_u8, |sum, byte| sum.wrapping_add(*byte));
            assert_eq!((sum(floating), sum(header)), (0, 0));
            assert_eq!(u16::from_le_bytes([header[4], header[5]]) as usize, header.len());
            let mut at = 44;
            let mut count = 0;
            while at < header.len() {
                at += if header[at] == 0 { 20 } else { 8 };
                count += 1;
            }
            assert_eq!((at, u16::from_le_bytes([header[34], header[35]])), (header.len(), count));
        }
    }
}
