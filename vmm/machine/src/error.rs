//! Why a machine could not be built, saved or loaded: one enum an operation. The parts' own errors are with the parts.

use crate::dirty::DirtyError;
use crate::disk::DiskError;
use crate::kvm::KvmError;
use crate::memory::MemoryError;
use crate::state::RecordError;
use crate::tap::TapError;
use crate::vcpu_state::VcpuStateError;

/// Why a machine could not be built.
#[derive(Debug, thiserror::Error)]
pub enum BuildError {
    /// This host's KVM cannot be used.
    #[error(transparent)]
    Kvm(#[from] KvmError),
    /// The guest's memory could not be made.
    #[error(transparent)]
    Memory(#[from] MemoryError),
    /// The guest's memory could not be given to KVM.
    #[error(transparent)]
    Memslot(#[from] DirtyError),
    /// A TAP could not be opened.
    #[error(transparent)]
    Tap(#[from] TapError),
    /// A disk cannot be used.
    #[error(transparent)]
    Disk(#[from] DiskError),
    /// A number in the configuration is out of bounds.
    #[error("{what} is {given}, but must be from {min} to {max}")]
    Config {
        /// The setting.
        what: &'static str,
        /// What was given.
        given: u64,
        /// The least.
        min: u64,
        /// The most.
        max: u64,
    },
    /// A multicast address was given to a network card.
    #[error("network card {0} has a multicast MAC address: the lowest bit of its first byte must be 0")]
    Mac(usize),
    /// A step that should not fail did.
    #[error("{what} failed: {source}")]
    Step {
        /// The step.
        what: &'static str,
        /// The error of the kernel.
        source: std::io::Error,
    },
}

/// Why a machine's state could not be saved.
#[derive(Debug, thiserror::Error)]
pub enum SaveError {
    /// The machine runs.
    #[error("the machine runs: pause it first")]
    Running,
    /// The machine has no state.
    #[error("the machine was neither booted nor loaded: there is nothing to save")]
    Empty,
    /// A vCPU reset, shut down or failed.
    #[error(
        "vCPU {0} has ended (reset, shutdown or failure, see the machine's events): there is nothing to go on with elsewhere"
    )]
    Ended(u32),
    /// A vCPU's state could not be read.
    #[error(transparent)]
    Vcpu(#[from] VcpuStateError),
    /// A chip's state could not be read.
    #[error("{what} failed: {source}")]
    Kvm {
        /// The ioctl.
        what: &'static str,
        /// The error of the kernel.
        source: kvm_ioctls::Error,
    },
    /// A record could not be made.
    #[error(transparent)]
    Record(#[from] RecordError),
    /// What the guest wrote could not be brought to a disk.
    #[error(transparent)]
    Disk(#[from] DiskError),
}

/// Why a state could not be loaded. The machine is of no use afterwards: build a new one.
#[derive(Debug, thiserror::Error)]
pub enum LoadError {
    /// The machine was booted, loaded or run.
    #[error("only a new machine can be loaded: this one was booted or loaded before")]
    NotFresh,
    /// The source's machine is built differently.
    #[error("the source's machine has {given}, this one {here}")]
    Board {
        /// What the source has.
        given: String,
        /// What this machine has.
        here: String,
    },
    /// Records are missing, left over or malformed.
    #[error(transparent)]
    Record(#[from] RecordError),
    /// A vCPU did not take its state.
    #[error(transparent)]
    Vcpu(#[from] VcpuStateError),
    /// A chip did not take its state.
    #[error("{what} failed: {source}")]
    Kvm {
        /// The ioctl.
        what: &'static str,
        /// The error of the kernel.
        source: kvm_ioctls::Error,
    },
    /// A device did not take its state.
    #[error("device {device}: {reason}")]
    Device {
        /// The device.
        device: String,
        /// Why.
        reason: String,
    },
}

/// An access to guest memory that is not all in RAM.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{bytes} bytes at guest physical address {gpa:#x} are not all in RAM")]
pub struct AccessError {
    /// Where the access began.
    pub gpa: u64,
    /// Its length.
    pub bytes: usize,
}
