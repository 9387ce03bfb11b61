//! The state of a vCPU: saved and restored in one place, in one order. Not its thread: that is `vcpu.rs`.
//!
//! Order of a save, all on a vCPU whose KVM_RUN returned EINTR (so no I/O is half done):
//!  1. KVM_GET_MP_STATE first: it may act on a pending INIT or SIPI, and so change registers and events.
//!  2. KVM_GET_REGS, KVM_GET_SREGS.
//!  3. KVM_GET_XSAVE2 (or KVM_GET_XSAVE), KVM_GET_XCRS, KVM_GET_DEBUGREGS.
//!  4. KVM_GET_LAPIC.
//!  5. KVM_GET_MSRS, after the LAPIC: an expired TSC deadline reads as 0 while its interrupt is still pending.
//!  6. KVM_GET_VCPU_EVENTS last: everything above may have queued one.
//!
//! Order of a restore, on a vCPU that never ran:
//!  1. KVM_SET_CPUID2: what later values are checked against. KVM_SET_TSC_KHZ where offered: before any TSC value.
//!  2. KVM_SET_MP_STATE: before registers, since for a reset vCPU it would overwrite them.
//!  3. KVM_SET_REGS, KVM_SET_SREGS: the APIC base is in the latter, and the LAPIC needs it.
//!  4. KVM_SET_XCRS before KVM_SET_XSAVE: the area may use components that XCR0 enables. KVM_SET_DEBUGREGS.
//!  5. KVM_SET_LAPIC: the timer's mode must be known before the deadline.
//!  6. KVM_SET_MSRS with the TSC first, then all others, then the TSC deadline.
//!  7. KVM_SET_VCPU_EVENTS last: so that nothing above loses a pending exception, NMI or interrupt.

use kvm_bindings::{
    CpuId, KVM_MAX_CPUID_ENTRIES, KVM_MAX_MSR_ENTRIES, Msrs, kvm_cpuid_entry2, kvm_debugregs, kvm_lapic_state, kvm_mp_state,
    kvm_msr_entry, kvm_regs, kvm_sregs, kvm_vcpu_events, kvm_xcrs,
};
use kvm_ioctls::VcpuFd;
use serde::{Deserialize, Serialize};

use crate::cpu;
use crate::kvm::Capabilities;
use crate::vcpu;

pub(crate) const MSR_TSC: u32 = 0x10;
const MSR_TSC_DEADLINE: u32 = 0x6e0;
const LAPIC_LVT_TIMER: usize = 0x320;
/// Words of the largest XSAVE area that is believed: AMX needs 11 KiB.
const XSAVE_WORDS_MAX: usize = 16 << 10;

/// An MSR that a guest would notice if it were not restored: it is an error if the destination refuses it.
fn matters(index: u32) -> bool {
    matches!(index,
        0x10 | 0x174..=0x176 | 0x277            // TSC, SYSENTER, PAT
        | 0xc000_0080..=0xc000_0084             // EFER, STAR, LSTAR, CSTAR, SFMASK
        | 0xc000_0100..=0xc000_0103             // FS and GS base, kernel GS base, TSC_AUX
        | 0x4b56_4d00..=0x4b56_4d01             // kvmclock
        | 0x11 | 0x12                           // kvmclock, old numbers
    )
}

/// Why a vCPU could not be saved or loaded.
#[derive(Debug, thiserror::Error)]
pub enum VcpuStateError {
    /// KVM refused a part of the state.
    #[error("vCPU {vcpu}: {what} failed: {source}")]
    Kvm {
        /// The vCPU.
        vcpu: u32,
        /// The ioctl.
        what: &'static str,
        /// The error of the kernel.
        source: kvm_ioctls::Error,
    },
    /// An MSR that the guest relies on cannot be set on this host.
    #[error("vCPU {vcpu}: this host refuses MSR {index:#x} = {value:#x}, which the guest relies on")]
    Msr {
        /// The vCPU.
        vcpu: u32,
        /// The MSR's number.
        index: u32,
        /// The source's value.
        value: u64,
    },
    /// The record holds what no vCPU has.
    #[error("vCPU {vcpu}: the record has {given} {what}, over the limit of {limit}")]
    Limit {
        /// The vCPU.
        vcpu: u32,
        /// What is too many.
        what: &'static str,
        /// How many were given.
        given: usize,
        /// How many are allowed.
        limit: usize,
    },
    /// The record has state that this host's KVM cannot take.
    #[error("vCPU {vcpu}: the source saved {what}, which this host's KVM does not offer")]
    Lacking {
        /// The vCPU.
        vcpu: u32,
        /// What is missing.
        what: &'static str,
    },
}

/// A vCPU's record, version 1. What a host does not offer is `None`.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct VcpuRecord {
    pub(crate) cpuid: Vec<kvm_cpuid_entry2>,
    pub(crate) tsc_khz: Option<u32>,
    mp_state: kvm_mp_state,
    pub(crate) regs: kvm_regs,
    sregs: kvm_sregs,
    xsave: Vec<u32>,
    xcrs: Option<kvm_xcrs>,
    debugregs: Option<kvm_debugregs>,
    lapic: kvm_lapic_state,
    pub(crate) msrs: Vec<(u32, u64)>,
    events: Option<kvm_vcpu_events>,
}

/// How to turn an ioctl's error into ours.
fn refused(vcpu: u32, what: &'static str) -> impl Fn(kvm_ioctls::Error) -> VcpuStateError {
    move |source| VcpuStateError::Kvm { vcpu, what, source }
}

/// Reads the state of a paused vCPU; the order's reasons are at the top.
pub(crate) fn save(id: u32, fd: &VcpuFd, caps: &Capabilities, msrs: &[u32]) -> Result<VcpuRecord, VcpuStateError> {
    let mp_state = fd.get_mp_state().map_err(refused(id, "KVM_GET_MP_STATE"))?;
    let regs = fd.get_regs().map_err(refused(id, "KVM_GET_REGS"))?;
    let sregs = fd.get_sregs().map_err(refused(id, "KVM_GET_SREGS"))?;
    let xsave = vcpu::xsave(fd, caps.xsave2, caps.xsave_bytes).map_err(refused(id, "KVM_GET_XSAVE"))?;
    let xcrs = optional(caps.xcrs, || fd.get_xcrs()).map_err(refused(id, "KVM_GET_XCRS"))?;
    let debugregs = optional(caps.debug_registers, || fd.get_debug_regs()).map_err(refused(id, "KVM_GET_DEBUGREGS"))?;
    let lapic = fd.get_lapic().map_err(refused(id, "KVM_GET_LAPIC"))?;
    let mut msrs = read_msrs(fd, msrs).map_err(refused(id, "KVM_GET_MSRS"))?;
    mend_deadline(&lapic, &mut msrs);
    let events = optional(caps.vcpu_events, || fd.get_vcpu_events()).map_err(refused(id, "KVM_GET_VCPU_EVENTS"))?;
    let cpuid = cpu::of_vcpu(fd).map_err(refused(id, "KVM_GET_CPUID2"))?;
    let tsc_khz = if caps.tsc_khz { fd.get_tsc_khz().ok().filter(|khz| *khz != 0) } else { None };
    Ok(VcpuRecord { cpuid, tsc_khz, mp_state, regs, sregs, xsave, xcrs, debugregs, lapic, msrs, events })
}

fn optional<T>(offered: bool, get: impl FnOnce() -> Result<T, kvm_ioctls::Error>) -> Result<Option<T>, kvm_ioctls::Error> {
    if offered { get().map(Some) } else { Ok(None) }
}

/// Sets the state of a vCPU that never ran; the order's reasons are at the top.
///
/// `elapsed_ns` is how long ago the state was saved: the TSC counts on from there.
pub(crate) fn load(
    id: u32,
    fd: &VcpuFd,
    caps: &Capabilities,
    record: &VcpuRecord,
    elapsed_ns: u64,
) -> Result<(), VcpuStateError> {
    check(id, caps, record)?;
    let cpuid = CpuId::from_entries(&record.cpuid).map_err(|_| VcpuStateError::Limit {
        vcpu: id,
        what: "CPUID entries",
        given: record.cpuid.len(),
        limit: KVM_MAX_CPUID_ENTRIES,
    })?;
    fd.set_cpuid2(&cpuid).map_err(refused(id, "KVM_SET_CPUID2"))?;
    set_tsc_khz(id, fd, caps, record.tsc_khz);
    fd.set_mp_state(record.mp_state).map_err(refused(id, "KVM_SET_MP_STATE"))?;
    fd.set_regs(&record.regs).map_err(refused(id, "KVM_SET_REGS"))?;
    fd.set_sregs(&record.sregs).map_err(refused(id, "KVM_SET_SREGS"))?;
    if let Some(xcrs) = &record.xcrs {
        fd.set_xcrs(xcrs).map_err(refused(id, "KVM_SET_XCRS"))?;
    }
    vcpu::set_xsave(fd, &record.xsave, caps.xsave_bytes).map_err(refused(id, "KVM_SET_XSAVE"))?;
    if let Some(debugregs) = &record.debugregs {
        fd.set_debug_regs(debugregs).map_err(refused(id, "KVM_SET_DEBUGREGS"))?;
    }
    fd.set_lapic(&record.lapic).map_err(refused(id, "KVM_SET_LAPIC"))?;
    write_msrs(id, fd, &in_order(record, elapsed_ns))?;
    if let Some(events) = &record.events {
        fd.set_vcpu_events(events).map_err(refused(id, "KVM_SET_VCPU_EVENTS"))?;
    }
    Ok(())
}

/// Refuses what this host's KVM cannot take, before anything is changed.
fn check(id: u32, caps: &Capabilities, record: &VcpuRecord) -> Result<(), VcpuStateError> {
    let limits = [
        ("CPUID entries", record.cpuid.len(), KVM_MAX_CPUID_ENTRIES),
        ("MSRs", record.msrs.len(), 4 * KVM_MAX_MSR_ENTRIES),
        ("words of XSAVE area", record.xsave.len(), XSAVE_WORDS_MAX),
        ("extended control registers", record.xcrs.map_or(0, |xcrs| xcrs.nr_xcrs as usize), 16),
    ];
    for (what, given, limit) in limits {
        if given > limit {
            return Err(VcpuStateError::Limit { vcpu: id, what, given, limit });
        }
    }
    // Debug registers and events are at rest on most guests, but a guest that uses them must not lose them.
    let lacking = [
        ("extended control registers", record.xcrs.is_some() && !caps.xcrs),
        ("debug registers", record.debugregs.is_some_and(|regs| regs.dr7 & 0xff != 0) && !caps.debug_registers),
        ("pending events", record.events.is_some() && !caps.vcpu_events),
    ];
    match lacking.into_iter().find(|(_, lacks)| *lacks) {
        Some((what, _)) => Err(VcpuStateError::Lacking { vcpu: id, what }),
        None => Ok(()),
    }
}

/// Gives the guest the source's TSC frequency where this host can; elsewhere kvmclock still keeps time.
fn set_tsc_khz(id: u32, fd: &VcpuFd, caps: &Capabilities, wanted: Option<u32>) {
    let (Some(wanted), true) = (wanted, caps.tsc_khz) else { return };
    let here = fd.get_tsc_khz().unwrap_or(0);
    // KVM's own tolerance: 250 ppm.
    if u64::from(here.abs_diff(wanted)) * 4000 <= u64::from(wanted) {
        return;
    }
    let outcome = if caps.tsc_control { fd.set_tsc_khz(wanted) } else { Err(kvm_ioctls::Error::new(libc::ENOTSUP)) };
    if let Err(error) = outcome {
        tracing::warn!(vcpu = id, here, wanted, %error, "this host cannot run the TSC at the source's frequency (kHz)");
    }
}

/// The MSRs of a record in the order in which they must be set, with the TSC moved on.
fn in_order(record: &VcpuRecord, elapsed_ns: u64) -> Vec<(u32, u64)> {
    let ticks = u128::from(elapsed_ns) * u128::from(record.tsc_khz.unwrap_or(0)) / 1_000_000;
    let ticks = u64::try_from(ticks).unwrap_or(0);
    let mut msrs: Vec<_> = record
        .msrs
        .iter()
        .map(|&(index, value)| (index, if index == MSR_TSC { value.wrapping_add(ticks) } else { value }))
        .collect();
    msrs.sort_by_key(|(index, _)| match *index {
        MSR_TSC => 0,
        MSR_TSC_DEADLINE => 2,
        _ => 1,
    });
    msrs
}

/// An armed deadline timer that expired reads as 0 although the guest has not had its interrupt: let it expire again.
fn mend_deadline(lapic: &kvm_lapic_state, msrs: &mut [(u32, u64)]) {
    let lvt = lapic.regs.get(LAPIC_LVT_TIMER..LAPIC_LVT_TIMER + 4).unwrap_or(&[]);
    let lvt = lvt.iter().rev().fold(0_u32, |value, byte| value << 8 | u32::from(*byte as u8));
    let deadline_mode = lvt >> 17 & 3 == 2;
    let masked = lvt >> 16 & 1 == 1;
    let tsc = msrs.iter().find(|(index, _)| *index == MSR_TSC).map(|(_, value)| *value);
    let (Some(tsc), true, false) = (tsc, deadline_mode, masked) else { return };
    for (_, value) in msrs.iter_mut().filter(|(index, value)| *index == MSR_TSC_DEADLINE && *value == 0) {
        *value = tsc;
    }
}

/// The values of `indices`; those that this host refuses are left out.
pub(crate) fn read_msrs(fd: &VcpuFd, indices: &[u32]) -> Result<Vec<(u32, u64)>, kvm_ioctls::Error> {
    let mut values = Vec::with_capacity(indices.len());
    let mut rest = indices;
    while !rest.is_empty() {
        let (now, _) = rest.split_at(rest.len().min(KVM_MAX_MSR_ENTRIES));
        let entries: Vec<_> = now.iter().map(|&index| kvm_msr_entry { index, ..Default::default() }).collect();
        let mut msrs = Msrs::from_entries(&entries).map_err(|_| kvm_ioctls::Error::new(libc::ENOMEM))?;
        // KVM stops at the first one that it refuses, and says how many it did.
        let done = fd.get_msrs(&mut msrs)?.min(now.len());
        values.extend(msrs.as_slice().iter().take(done).map(|entry| (entry.index, entry.data)));
        let refused = usize::from(done < now.len());
        if let Some(index) = now.get(done) {
            tracing::debug!(index, "MSR not readable on this host");
        }
        rest = rest.get(done + refused..).unwrap_or(&[]);
    }
    Ok(values)
}

/// Sets feature MSRs of a vCPU that never ran. Each must be taken: a guest must not see more than it was meant to.
pub(crate) fn set_feature_msrs(fd: &VcpuFd, wanted: &[(u32, u64)]) -> std::io::Result<()> {
    for &(index, data) in wanted {
        let entry = kvm_msr_entry { index, data, ..Default::default() };
        let msrs = Msrs::from_entries(&[entry]).map_err(|_| std::io::Error::from_raw_os_error(libc::ENOMEM))?;
        if fd.set_msrs(&msrs).map_err(std::io::Error::from)? != 1 {
            return Err(std::io::Error::other(format!("this host's KVM refuses MSR {index:#x} = {data:#x}")));
        }
    }
    Ok(())
}

/// Sets MSRs in the order given. A refused one is an error only if the guest would notice.
fn write_msrs(id: u32, fd: &VcpuFd, wanted: &[(u32, u64)]) -> Result<(), VcpuStateError> {
    let mut rest = wanted;
    while !rest.is_empty() {
        let (now, _) = rest.split_at(rest.len().min(KVM_MAX_MSR_ENTRIES));
        let entries: Vec<_> = now.iter().map(|&(index, data)| kvm_msr_entry { index, data, ..Default::default() }).collect();
        let msrs = Msrs::from_entries(&entries).map_err(|_| refused(id, "KVM_SET_MSRS")(kvm_ioctls::Error::new(libc::ENOMEM)))?;
        let done = fd.set_msrs(&msrs).map_err(refused(id, "KVM_SET_MSRS"))?.min(now.len());
        if let Some(&(index, value)) = now.get(done) {
            let here = read_msrs(fd, &[index]).ok().and_then(|values| values.first().map(|(_, here)| *here));
            if here != Some(value) {
                if matters(index) {
                    return Err(VcpuStateError::Msr { vcpu: id, index, value });
                }
                tracing::warn!(
                    vcpu = id,
                    index,
                    value,
                    ?here,
                    "this host refuses an MSR of the source; the guest goes on without"
                );
            }
        }
        rest = rest.get(done + usize::from(done < now.len())..).unwrap_or(&[]);
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::panic)]
    use super::*;

    fn lapic(lvt: u32) -> kvm_lapic_state {
        let mut state = kvm_lapic_state::default();
        for (index, byte) in lvt.to_le_bytes().into_iter().enumerate() {
            state.regs[LAPIC_LVT_TIMER + index] = byte as std::os::raw::c_char;
        }
        state
    }

    #[test]
    fn expired_deadline_is_armed_again() {
        let zero = [(MSR_TSC, 500), (MSR_TSC_DEADLINE, 0)];
        let cases = [
            (2 << 17 | 0x20, zero, 500),
            (2 << 17 | 1 << 16, zero, 0),
            (1 << 17, zero, 0),
            (2 << 17, [(MSR_TSC, 500), (MSR_TSC_DEADLINE, 900)], 900),
        ];
        for (lvt, mut msrs, expected) in cases {
            mend_deadline(&lapic(lvt), &mut msrs);
            assert_eq!(msrs[1].1, expected, "{lvt:#x}");
        }
    }
}
