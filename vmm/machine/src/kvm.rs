//! The KVM of this host: opening it and what it offers. Not a machine: that is `machine.rs`.
//!
//! No unsafe code is needed here: kvm-ioctls wraps what is asked.

use kvm_bindings::{
    KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2, KVM_DIRTY_LOG_INITIALLY_SET, KVM_DIRTY_LOG_MANUAL_PROTECT_ENABLE, KVM_MAX_CPUID_ENTRIES,
    kvm_cpuid_entry2,
};
use kvm_ioctls::{Cap, Kvm, VmFd};

/// Why `/dev/kvm` cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum KvmError {
    /// `/dev/kvm` did not open.
    #[error("cannot open /dev/kvm: {0}; is KVM enabled, and may this user use it?")]
    Open(kvm_ioctls::Error),
    /// The API version is not the stable one.
    #[error("KVM API version is {0}, but 12 is needed: this kernel is too old")]
    Version(i32),
    /// A capability that the machine cannot do without.
    #[error("this host's KVM lacks {0}, which is needed to {1}")]
    Missing(&'static str, &'static str),
    /// A question to KVM failed.
    #[error("{what} failed: {source}")]
    Ioctl {
        /// What was asked.
        what: &'static str,
        /// The error of the kernel.
        source: kvm_ioctls::Error,
    },
}

/// What this host's KVM offers beyond the necessary. Absence of any of these is never fatal.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Capabilities {
    /// The most vCPUs of one machine.
    pub vcpus_max: u32,
    /// Size in bytes of the XSAVE area by KVM_GET_XSAVE2; 4096 where only KVM_GET_XSAVE is offered.
    pub xsave_bytes: u32,
    /// KVM_GET_XSAVE2 is offered.
    pub xsave2: bool,
    /// Extended control registers can be read and set.
    pub xcrs: bool,
    /// Debug registers can be read and set.
    pub debug_registers: bool,
    /// Pending events of a vCPU can be read and set.
    pub vcpu_events: bool,
    /// The guest's TSC frequency can be read.
    pub tsc_khz: bool,
    /// The guest's TSC frequency can be set.
    pub tsc_control: bool,
    /// The LAPIC timer's TSC deadline mode.
    pub tsc_deadline: bool,
    /// KVM_GET_CLOCK and KVM_SET_CLOCK, and which flags they know (KVM_CLOCK_REALTIME and others).
    pub clock_flags: Option<u32>,
    /// A guest can be told that it was stopped, so that its watchdog does not bark.
    pub clock_control: bool,
    /// Flags of KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2; 0 where it is absent.
    pub manual_dirty_log: u32,
}

impl Capabilities {
    /// Asks the VM descriptor (some answers, as XSAVE2's, depend on the VM).
    pub(crate) fn read(kvm: &Kvm, vm: &VmFd) -> Self {
        let xsave2 = vm.check_extension_int(Cap::Xsave2);
        let adjust = vm.check_extension_int(Cap::AdjustClock);
        let manual = vm.check_extension_raw(u64::from(KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2));
        let known = (KVM_DIRTY_LOG_MANUAL_PROTECT_ENABLE | KVM_DIRTY_LOG_INITIALLY_SET) & u32::try_from(manual).unwrap_or(0);
        Self {
            vcpus_max: u32::try_from(kvm.get_max_vcpus()).unwrap_or(u32::MAX),
            xsave_bytes: u32::try_from(xsave2).unwrap_or(0).max(4096),
            xsave2: xsave2 > 0,
            xcrs: vm.check_extension(Cap::Xcrs),
            debug_registers: vm.check_extension(Cap::Debugregs),
            vcpu_events: vm.check_extension(Cap::VcpuEvents),
            tsc_khz: vm.check_extension(Cap::GetTscKhz),
            tsc_control: vm.check_extension(Cap::TscControl),
            tsc_deadline: vm.check_extension(Cap::TscDeadlineTimer),
            clock_flags: (adjust > 0).then(|| u32::try_from(adjust).unwrap_or(0)),
            clock_control: vm.check_extension(Cap::KvmclockCtrl),
            manual_dirty_log: if known & KVM_DIRTY_LOG_MANUAL_PROTECT_ENABLE == 0 { 0 } else { known },
        }
    }
}

/// Opens `/dev/kvm` and checks what a machine cannot do without.
pub(crate) fn open() -> Result<Kvm, KvmError> {
    let kvm = Kvm::new().map_err(KvmError::Open)?;
    let version = kvm.get_api_version();
    if version != 12 {
        return Err(KvmError::Version(version));
    }
    let needed = [
        (Cap::UserMemory, "KVM_CAP_USER_MEMORY", "give the guest memory"),
        (Cap::Irqchip, "KVM_CAP_IRQCHIP", "have interrupt controllers in the kernel"),
        (Cap::Pit2, "KVM_CAP_PIT2", "have a timer in the kernel"),
        (Cap::PitState2, "KVM_CAP_PIT_STATE2", "move the timer to another host"),
        (Cap::SetTssAddr, "KVM_CAP_SET_TSS_ADDR", "run real-mode code on Intel CPUs"),
        (Cap::ImmediateExit, "KVM_CAP_IMMEDIATE_EXIT", "pause a vCPU without a race"),
        (Cap::Irqfd, "KVM_CAP_IRQFD", "interrupt the guest"),
        (Cap::Ioeventfd, "KVM_CAP_IOEVENTFD", "hear of the guest's network queues"),
        (Cap::ExtCpuid, "KVM_CAP_EXT_CPUID", "give the guest a CPU model"),
        (Cap::MpState, "KVM_CAP_MP_STATE", "move halted vCPUs to another host"),
        (Cap::Xsave, "KVM_CAP_XSAVE", "move FPU registers to another host"),
    ];
    for (cap, name, purpose) in needed {
        if !kvm.check_extension(cap) {
            return Err(KvmError::Missing(name, purpose));
        }
    }
    Ok(kvm)
}

/// The CPUID leaves that this host's KVM can give a guest: the raw material of a CPU profile.
///
/// # Errors
/// When `/dev/kvm` does not open, or lacks what a machine needs.
pub fn supported_cpuid() -> Result<Vec<kvm_cpuid_entry2>, KvmError> {
    supported_cpuid_of(&open()?)
}

/// [`supported_cpuid`] for an open KVM.
pub(crate) fn supported_cpuid_of(kvm: &Kvm) -> Result<Vec<kvm_cpuid_entry2>, KvmError> {
    let cpuid = kvm
        .get_supported_cpuid(KVM_MAX_CPUID_ENTRIES)
        .map_err(|source| KvmError::Ioctl { what: "KVM_GET_SUPPORTED_CPUID", source })?;
    Ok(cpuid.as_slice().to_vec())
}

/// The MSRs that KVM says belong to a guest's state.
pub(crate) fn msr_indices(kvm: &Kvm) -> Result<Vec<u32>, KvmError> {
    let list = kvm.get_msr_index_list().map_err(|source| KvmError::Ioctl { what: "KVM_GET_MSR_INDEX_LIST", source })?;
    Ok(list.as_slice().to_vec())
}
