//! What a machine is made of. Not what it boots: that is a `BootConfig`.

use std::os::fd::OwnedFd;

use kvm_bindings::kvm_cpuid_entry2 as CpuidEntry;

use crate::devices::serial::SerialSink;
use crate::memory::MemoryConfig;

/// A machine. Source and destination must agree on everything that the guest can see.
#[derive(Debug)]
pub struct MachineConfig {
    /// How many vCPUs, from 1 to what KVM can do.
    pub vcpus: u32,
    /// The guest's memory.
    pub memory: MemoryConfig,
    /// Network cards, at most 19, in the order in which the guest finds them.
    pub nics: Vec<NicConfig>,
    /// Where serial output goes.
    pub serial: SerialSink,
    /// The CPUID that all vCPUs share, each with its own number put in; `None`: all that KVM offers.
    pub cpuid: Option<Vec<CpuidEntry>>,
    /// Feature MSRs that are not to have the value that KVM gives them.
    pub feature_msrs: Vec<(u32, u64)>,
}

impl MachineConfig {
    /// A machine without network, whose serial output is dropped.
    pub fn new(vcpus: u32, memory: MemoryConfig) -> Self {
        Self { vcpus, memory, nics: Vec::new(), serial: SerialSink::Null, cpuid: None, feature_msrs: Vec::new() }
    }
}

/// A network card.
#[derive(Debug)]
pub struct NicConfig {
    /// Its address, which the guest sees; unicast.
    pub mac: [u8; 6],
    /// What is behind it on this host.
    pub tap: TapConfig,
    /// The MTU in bytes, which the guest is told; at least 68.
    pub mtu: u16,
}

/// The host's side of a network card.
#[derive(Debug)]
pub enum TapConfig {
    /// Make or open the TAP of this name, and put it on a bridge. It is gone when the machine is, unless persistent.
    Name {
        /// The interface's name, at most 15 bytes.
        name: String,
        /// The bridge to join, which must exist in this network namespace.
        bridge: Option<String>,
    },
    /// An open TAP (IFF_TAP, IFF_NO_PI, IFF_VNET_HDR), or a packet socket pair that carries frames behind 12 bytes of
    /// virtio-net header.
    Fd(OwnedFd),
}
