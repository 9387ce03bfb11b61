//! A KVM machine as a library: vCPUs, memory, dirty tracking, devices, boot.
//!
//! A [`Machine`] is built from a [`MachineConfig`] with everything that costs time (memory, vCPU threads, TAPs). Then it is
//! either booted, or its memory is filled from elsewhere through the memfds of its regions and its state is loaded.
//!
//! ```no_run
//! use limosa_machine::{BootConfig, Machine, MachineConfig, MemoryConfig, SerialSink};
//!
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! let config = |sink| MachineConfig { serial: sink, ..MachineConfig::new(1, MemoryConfig::new(64 << 20)) };
//! let source = Machine::new(config(SerialSink::Writer(Box::new(std::io::stdout()))))?;
//! source.boot(&BootConfig { kernel: "guest.elf".into(), initramfs: None, cmdline: String::new() })?;
//! source.resume()?;
//! source.start_dirty_tracking()?;
//! // ... copy memory, fetch dirty pages, copy those ...
//! source.pause()?;
//! let records = source.save()?;
//! // ... the last dirty pages, after the save ...
//! let destination = Machine::new(config(SerialSink::Null))?;
//! destination.load(records)?;
//! destination.resume()?;
//! # Ok(())
//! # }
//! ```
//!
//! Threads of vCPUs are interrupted by the signal SIGRTMIN, whose handler this library sets and which it needs for itself.

mod boot;
mod bus;
mod clock;
mod config;
mod cpu;
mod devices;
mod dirty;
mod disk;
mod error;
mod event;
mod irq;
mod kvm;
mod machine;
mod memory;
mod state;
mod tap;
mod vcpu;
mod vcpu_state;

pub use boot::{BootConfig, BootError};
pub use config::{MachineConfig, NicConfig, TapConfig};
pub use devices::serial::SerialSink;
pub use dirty::DirtyError;
pub use disk::image::{disk_is_free, look_at_disk};
pub use disk::{DiskConfig, DiskError, DiskFormat, DiskInfo};
pub use error::{AccessError, BuildError, LoadError, SaveError};
pub use event::{Events, MachineEvent};
pub use kvm::{Capabilities, KvmError, supported_cpuid};
pub use kvm_bindings::kvm_cpuid_entry2 as CpuidEntry;
pub use machine::Machine;
pub use memory::{MemoryConfig, MemoryError, PAGE_BYTES, PageSize, Populate, RegionInfo};
pub use state::{Kind, RecordError, StateRecord};
pub use tap::{Tap, TapError};
pub use vcpu::RunError;
pub use vcpu_state::VcpuStateError;
