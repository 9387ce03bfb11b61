//! The guest's paravirtual clock: saved, and set so that it goes on and never back. Not the TSC, which is a vCPU's.

use std::time::{SystemTime, UNIX_EPOCH};

use kvm_bindings::{KVM_CLOCK_REALTIME, kvm_clock_data};
use kvm_ioctls::VmFd;
use serde::{Deserialize, Serialize};

/// A guest's clock is moved on by at most this for the time it was away: one hour. More is a host whose clock is wrong.
const ELAPSED_NS_MAX: u64 = 3_600_000_000_000;

/// The clock's record, version 1.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct ClockRecord {
    /// The guest's clock at the save, in ns; `None` where the host's KVM cannot tell.
    clock_ns: Option<u64>,
    /// The host's real time at the save, in ns since 1970, taken with the clock.
    realtime_ns: u64,
}

fn realtime_ns() -> u64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    u64::try_from(since.as_nanos()).unwrap_or(u64::MAX)
}

/// Reads the clock of a paused machine. `flags` are what KVM_CAP_ADJUST_CLOCK offers, `None` where it is absent.
pub(crate) fn save(vm: &VmFd, flags: Option<u32>) -> Result<ClockRecord, kvm_ioctls::Error> {
    if flags.is_none() {
        return Ok(ClockRecord { clock_ns: None, realtime_ns: realtime_ns() });
    }
    let data = vm.get_clock()?;
    let realtime_ns = if data.flags & KVM_CLOCK_REALTIME != 0 { data.realtime } else { realtime_ns() };
    Ok(ClockRecord { clock_ns: Some(data.clock), realtime_ns })
}

impl ClockRecord {
    /// Nanoseconds since the save by the hosts' real time; 0 if this host's clock is behind.
    pub(crate) fn elapsed_ns(&self) -> u64 {
        elapsed(self.realtime_ns, realtime_ns())
    }
}

fn elapsed(then_ns: u64, now_ns: u64) -> u64 {
    let gone = now_ns.saturating_sub(then_ns);
    if gone > ELAPSED_NS_MAX {
        tracing::warn!(gone, "the hosts' clocks disagree by more than an hour; the guest's clock goes on from where it was");
        return 0;
    }
    gone
}

/// Sets the clock of a machine that never ran to where it was saved, moved on by the time since.
///
/// KVM does the moving itself where it knows KVM_CLOCK_REALTIME, so the time that this call takes counts too.
pub(crate) fn load(vm: &VmFd, offered: Option<u32>, record: &ClockRecord) -> Result<(), kvm_ioctls::Error> {
    let (Some(clock), Some(offered)) = (record.clock_ns, offered) else {
        tracing::warn!("no paravirtual clock on one of the hosts; the guest's starts anew");
        return Ok(());
    };
    let elapsed_ns = record.elapsed_ns();
    let data = if offered & KVM_CLOCK_REALTIME != 0 && elapsed_ns != 0 {
        kvm_clock_data { clock, flags: KVM_CLOCK_REALTIME, realtime: record.realtime_ns, ..Default::default() }
    } else {
        kvm_clock_data { clock: clock.saturating_add(elapsed_ns), ..Default::default() }
    };
    vm.set_clock(&data)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn time_never_runs_back() {
        assert_eq!(elapsed(1_000, 5_000), 4_000);
        assert_eq!(elapsed(5_000, 1_000), 0);
        assert_eq!(elapsed(0, u64::MAX), 0);
    }
}
