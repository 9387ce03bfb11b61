//! What a machine is made of. Not what it boots: that is a `BootConfig`.

use std::os::fd::OwnedFd;

use crate::devices::serial::SerialSink;
use crate::disk::DiskConfig;
use crate::memory::MemoryConfig;

/// A machine. Source and destination must agree on everything that the guest can see.
#[derive(Debug)]
pub struct MachineConfig {
    /// How many vCPUs, from 1 to what KVM can do.
    pub vcpus: u32,
    /// The guest's memory.
    pub memory: MemoryConfig,
    /// Network cards, in the order in which the guest finds them. With all other devices at most 19.
    pub nics: Vec<NicConfig>,
    /// Disks, in the order in which the guest finds them, behind the network cards. Their locks are taken when the machine
    /// first runs, and each time it does after it gave them up.
    pub disks: Vec<DiskConfig>,
    /// A source of random bytes.
    pub rng: bool,
    /// A balloon, through which the guest reports pages that it does not use, so that they need not travel.
    pub balloon: bool,
    /// Where serial output goes.
    pub serial: SerialSink,
}

impl MachineConfig {
    /// A machine without virtio devices, whose serial output is dropped.
    pub fn new(vcpus: u32, memory: MemoryConfig) -> Self {
        Self { vcpus, memory, nics: Vec::new(), disks: Vec::new(), rng: false, balloon: false, serial: SerialSink::Null }
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
    /// Whether checksums and segmentation may be left to the host, where the TAP can do that.
    pub offload: bool,
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
