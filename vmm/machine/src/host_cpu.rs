//! The CPU that this host's KVM can give to guests, in raw numbers, and the CPUID that a saved vCPU had. What a guest gets of it,
//! and how CPUs compare, is decided by who builds the machine.

use kvm_bindings::{CpuId, Msrs, kvm_cpuid_entry2, kvm_msr_entry};
use kvm_ioctls::{Kvm, VcpuFd};

use crate::cpu;
use crate::kvm::{self, Capabilities, KvmError};
use crate::state::{Kind, RecordError, StateRecord};

/// MSRs that tell a guest what its CPU can do, beside CPUID: ARCH_CAPABILITIES.
const FEATURE_MSRS: [u32; 1] = [0x10a];

/// What KVM can give to guests here.
#[derive(Clone, Debug)]
pub struct HostCpu {
    /// CPUID as the only vCPU of a machine sees it that was given all of it. It may be more than KVM says that it supports: where
    /// guests run without hardware virtualisation (PVM), KVM shows them what the CPU has, whatever it was told.
    pub cpuid: Vec<kvm_cpuid_entry2>,
    /// Feature MSRs with the values that a new vCPU has.
    pub msrs: Vec<(u32, u64)>,
    /// The frequency at which a guest's time stamp counter runs, in kHz; 0: KVM does not tell.
    pub tsc_khz: u32,
    /// Whether a guest's counter can be let run at another frequency.
    pub tsc_scaling: bool,
    /// The most vCPUs of one machine.
    pub vcpus_max: u32,
    /// More vCPUs than this share physical CPUs.
    pub vcpus_recommended: u32,
}

/// Asks KVM. It makes a VM for a moment, since some answers are a vCPU's.
///
/// # Errors
/// When `/dev/kvm` does not open, lacks what a machine needs, or does not make a VM.
pub fn host_cpu() -> Result<HostCpu, KvmError> {
    let kvm = kvm::open()?;
    let failed = |what| move |source| KvmError::Ioctl { what, source };
    let vm = kvm.create_vm().map_err(failed("KVM_CREATE_VM"))?;
    let caps = Capabilities::read(&kvm, &vm);
    let vcpu = vm.create_vcpu(0).map_err(failed("KVM_CREATE_VCPU"))?;
    let offered = cpu::offered_cpuid(&kvm::supported_cpuid_of(&kvm)?, &caps);
    Ok(HostCpu {
        cpuid: shown(&vcpu, &cpu::guest_cpuid(&offered, 0, 1))?,
        msrs: feature_msrs(&kvm),
        tsc_khz: if caps.tsc_khz { vcpu.get_tsc_khz().unwrap_or(0) } else { 0 },
        tsc_scaling: caps.tsc_control,
        vcpus_max: caps.vcpus_max,
        vcpus_recommended: u32::try_from(kvm.get_nr_vcpus()).unwrap_or(u32::MAX),
    })
}

/// What a vCPU shows that was given `cpuid`.
fn shown(vcpu: &VcpuFd, cpuid: &[kvm_cpuid_entry2]) -> Result<Vec<kvm_cpuid_entry2>, KvmError> {
    let failed = |what| move |source| KvmError::Ioctl { what, source };
    let too_many = |_| KvmError::Ioctl { what: "arranging CPUID", source: kvm_ioctls::Error::new(libc::E2BIG) };
    vcpu.set_cpuid2(&CpuId::from_entries(cpuid).map_err(too_many)?).map_err(failed("KVM_SET_CPUID2"))?;
    cpu::of_vcpu(vcpu).map_err(failed("KVM_GET_CPUID2"))
}

/// The feature MSRs that this KVM knows; one that it cannot read is left out.
fn feature_msrs(kvm: &Kvm) -> Vec<(u32, u64)> {
    let Ok(known) = kvm.get_msr_feature_index_list() else { return Vec::new() };
    let known = FEATURE_MSRS.into_iter().filter(|index| known.as_slice().contains(index));
    let read = |index| {
        let mut msrs = Msrs::from_entries(&[kvm_msr_entry { index, ..Default::default() }]).ok()?;
        let count = kvm.get_msrs(&mut msrs).ok()?;
        msrs.as_slice().first().filter(|_| count == 1).map(|entry| (index, entry.data))
    };
    known.filter_map(read).collect()
}

/// The CPUID in a vCPU's record; `None` for records of other kinds.
///
/// # Errors
/// When the record is not what its kind says.
pub fn saved_cpuid(record: &StateRecord) -> Result<Option<Vec<kvm_cpuid_entry2>>, RecordError> {
    if record.kind != Kind::Vcpu as u16 {
        return Ok(None);
    }
    // It is the record's first field, and the rest is read once only: by who loads it.
    let read: Result<(Vec<kvm_cpuid_entry2>, _), _> = postcard::take_from_bytes(&record.bytes);
    let unreadable = |error: postcard::Error| RecordError::Body {
        kind: "vcpu",
        instance: record.instance,
        what: "read",
        reason: error.to_string(),
    };
    read.map(|(cpuid, _)| Some(cpuid)).map_err(unreadable)
}
