//! The CPU that a guest sees: what KVM supports or the machine's owner chose of it, with each vCPU's own number in it. Which
//! features a guest gets is not decided here.

use kvm_bindings::{KVM_CPUID_FLAG_SIGNIFCANT_INDEX, KVM_MAX_CPUID_ENTRIES, kvm_cpuid_entry2};
use kvm_ioctls::VcpuFd;

use crate::kvm::Capabilities;

const ECX1_X2APIC: u32 = 1 << 21;
const ECX1_TSC_DEADLINE: u32 = 1 << 24;
const ECX1_HYPERVISOR: u32 = 1 << 31;
const EDX1_HYPERTHREADS: u32 = 1 << 28;

/// The CPUID of a vCPU as KVM holds it. Kernels before 6.3 do not say how many entries they filled: the rest is zeros, which
/// would read as leaf 0 over and over.
pub(crate) fn of_vcpu(fd: &VcpuFd) -> Result<Vec<kvm_cpuid_entry2>, kvm_ioctls::Error> {
    Ok(filled(fd.get_cpuid2(KVM_MAX_CPUID_ENTRIES)?.as_slice()))
}

fn filled(entries: &[kvm_cpuid_entry2]) -> Vec<kvm_cpuid_entry2> {
    let last = entries.iter().rposition(|entry| *entry != kvm_cpuid_entry2::default());
    entries.get(..last.map_or(0, |last| last + 1)).unwrap_or_default().to_vec()
}

/// What KVM supports, with the features that it makes by itself and does not list everywhere.
pub(crate) fn offered_cpuid(supported: &[kvm_cpuid_entry2], caps: &Capabilities) -> Vec<kvm_cpuid_entry2> {
    let mut cpuid = supported.to_vec();
    for entry in cpuid.iter_mut().filter(|entry| entry.function == 1) {
        entry.ecx |= ECX1_HYPERVISOR | ECX1_X2APIC;
        entry.ecx = if caps.tsc_deadline { entry.ecx | ECX1_TSC_DEADLINE } else { entry.ecx & !ECX1_TSC_DEADLINE };
    }
    cpuid
}

/// The CPUID of vCPU `id` of `vcpus`, made of what all of them share: one package, a core for each vCPU, no hyperthreads.
pub(crate) fn guest_cpuid(shared: &[kvm_cpuid_entry2], id: u32, vcpus: u32) -> Vec<kvm_cpuid_entry2> {
    let cores = vcpus.min(255);
    let id_bits = u32::BITS - vcpus.saturating_sub(1).leading_zeros();
    let mut cpuid = shared.to_vec();
    for entry in &mut cpuid {
        match entry.function {
            1 => {
                entry.ebx = entry.ebx & 0xffff | (id & 0xff) << 24 | cores << 16;
                entry.edx = if vcpus > 1 { entry.edx | EDX1_HYPERTHREADS } else { entry.edx & !EDX1_HYPERTHREADS };
            }
            // Caches: cores in the package, and who shares: level 3 all of them, the others each its own.
            4 if entry.eax & 0x1f != 0 => {
                let sharing = if entry.eax >> 5 & 7 == 3 { cores.saturating_sub(1) } else { 0 };
                entry.eax = entry.eax & 0x3fff | sharing.min(0xfff) << 14 | cores.saturating_sub(1).min(63) << 26;
            }
            0xb | 0x1f => topology(entry, id, vcpus, id_bits),
            0x8000_0008 => entry.ecx = entry.ecx & !0xf0ff | cores.saturating_sub(1) | id_bits.min(8) << 12,
            // AMD: extended APIC id, one thread a core.
            0x8000_001e => {
                entry.eax = id;
                entry.ebx = id & 0xff;
                entry.ecx = 0;
            }
            _ => {}
        }
    }
    cpuid
}

/// Leaves 0xb and 0x1f: a level of threads (one), a level of cores (all), then none.
fn topology(entry: &mut kvm_cpuid_entry2, id: u32, vcpus: u32, id_bits: u32) {
    entry.flags |= KVM_CPUID_FLAG_SIGNIFCANT_INDEX;
    let (shift, count, level) = match entry.index {
        0 => (0, 1, 1),
        1 => (id_bits, vcpus, 2),
        _ => (0, 0, 0),
    };
    entry.eax = shift;
    entry.ebx = count;
    entry.ecx = entry.index | level << 8;
    entry.edx = id;
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::print_stdout)]
    use super::*;
    use crate::kvm;

    #[test]
    fn what_an_old_kernel_left_empty_is_no_leaf() {
        let leaf = |function| kvm_cpuid_entry2 { function, eax: 1, ..Default::default() };
        let empty = kvm_cpuid_entry2::default();
        assert_eq!(filled(&[leaf(0), empty, leaf(7), empty, empty]), [leaf(0), empty, leaf(7)]);
        assert_eq!(filled(&[empty, empty]), []);
    }

    #[test]
    fn each_vcpu_has_its_own_number() {
        let Ok(supported) = kvm::supported_cpuid() else {
            assert!(std::env::var_os("LIMOSA_DEMAND_ALL").is_none(), "KVM is demanded");
            println!("skipped: no /dev/kvm");
            return;
        };
        let kvm = kvm::open().unwrap();
        let caps = Capabilities::read(&kvm, &kvm.create_vm().unwrap());
        for id in [0, 3, 5] {
            let cpuid = guest_cpuid(&offered_cpuid(&supported, &caps), id, 6);
            let leaf = cpuid.iter().find(|entry| entry.function == 1).unwrap();
            assert_eq!((leaf.ebx >> 24, leaf.ebx >> 16 & 0xff), (id, 6));
            assert_ne!(leaf.ecx & ECX1_HYPERVISOR, 0);
            for entry in cpuid.iter().filter(|entry| entry.function == 0xb) {
                assert_eq!(entry.edx, id);
            }
        }
    }
}
