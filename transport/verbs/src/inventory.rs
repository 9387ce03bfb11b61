//! What this host has for RDMA, for people and for JSON: devices, ports, addresses, or why there is none. It opens devices to
//! ask them and closes them again; it makes nothing on them.

use crate::device::{self, DeviceLimits, OnDemand, Opened};
use crate::error::NoRdma;
use crate::library::Library;
use crate::manager;
use crate::sysfs;
use rdma_sys::{ibv_mtu, ibv_port_attr, ibv_port_state};
use serde::Serialize;
use std::fmt;
use std::io;
use std::mem;
use std::net::Ipv6Addr;
use std::path::Path;

/// `IBV_LINK_LAYER_…` of libibverbs.
const LINK_LAYER_INFINIBAND: u8 = 1;
const LINK_LAYER_ETHERNET: u8 = 2;

/// What there is.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Inventory {
    /// The devices that could be asked.
    pub devices: Vec<DeviceReport>,
    /// Why there is no RDMA, or why a device could not be asked, in words; empty if all is well.
    pub problems: Vec<String>,
}

/// A device.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct DeviceReport {
    /// Its name: `mlx5_0`, `rxe0`.
    pub name: String,
    /// Its number, as `ibv_devinfo` writes it.
    pub guid: String,
    /// What it can do at most.
    pub limits: DeviceLimits,
    /// Whether memory must be pinned.
    pub on_demand: OnDemand,
    /// Its ports.
    pub ports: Vec<PortReport>,
}

/// A port.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct PortReport {
    /// From 1.
    pub number: u8,
    /// Whether it can be used.
    pub state: PortState,
    /// What it is plugged into.
    pub link_layer: LinkLayer,
    /// Bytes of a packet's payload at most, as things are.
    pub mtu_active: u32,
    /// Bytes of a packet's payload at most, if the interface's MTU were large enough.
    pub mtu_max: u32,
    /// Its addresses.
    pub gids: Vec<GidReport>,
}

/// The state of a port.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum PortState {
    /// No link.
    Down,
    /// Link, and no address yet.
    Initializing,
    /// Link, and not yet active.
    Armed,
    /// Usable.
    Active,
    /// Another state.
    Other,
}

/// What a port is plugged into.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum LinkLayer {
    /// InfiniBand.
    InfiniBand,
    /// Ethernet: RoCE.
    Ethernet,
    /// Not said.
    Other,
}

/// An address of a port.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct GidReport {
    /// Its place in the port's table.
    pub index: u32,
    /// The address.
    pub gid: Ipv6Addr,
    /// How packets to it are framed.
    pub kind: GidKind,
    /// The network interface that it belongs to.
    pub interface: Option<String>,
}

/// How packets are framed. Both sides of a connection must use the same.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum GidKind {
    /// InfiniBand.
    InfiniBand,
    /// RoCE version 1: Ethernet frames, never routed.
    RoceV1,
    /// RoCE version 2: UDP port 4791.
    RoceV2,
}

impl Inventory {
    /// Looks. It never fails: what cannot be had is said in [`Inventory::problems`].
    pub fn take() -> Inventory {
        let mut inventory = Inventory { devices: Vec::new(), problems: Vec::new() };
        let listed = Library::load().and_then(|library| Ok((library, device::list(library)?)));
        let (library, listed) = match listed {
            Ok(both) => both,
            Err(error) => {
                inventory.problems.push(error.to_string());
                return inventory;
            }
        };
        for device in listed {
            match report(library, &device.name) {
                Ok(report) => inventory.devices.push(report),
                Err(error) => inventory.problems.push(error.to_string()),
            }
        }
        if let Err(error) = manager::check(library) {
            inventory.problems.push(error.to_string());
        }
        inventory
    }
}

fn report(library: &'static Library, name: &str) -> Result<DeviceReport, NoRdma> {
    let (listed, opened) = device::open(library, name)?;
    let failed = |call| move |error| NoRdma::Device { device: name.to_owned(), call, error };
    let (limits, on_demand) = opened.limits().map_err(failed("ibv_query_device"))?;
    let ports = (1..=limits.ports).map(|number| port(&opened, name, number)).collect::<Result<_, _>>();
    let ports = ports.map_err(failed("ibv_query_port"))?;
    Ok(DeviceReport { guid: guid(listed.guid), name: listed.name, limits, on_demand, ports })
}

fn guid(guid: u64) -> String {
    let [a, b, c, d] = [guid >> 48, guid >> 32, guid >> 16, guid].map(|part| part & 0xffff);
    format!("{a:04x}:{b:04x}:{c:04x}:{d:04x}")
}

/// The bytes of a packet's payload that a port takes, as things are.
pub(crate) fn port_mtu(opened: &Opened, number: u8) -> io::Result<u32> {
    Ok(mtu_bytes(attributes(opened, number)?.active_mtu))
}

fn attributes(opened: &Opened, number: u8) -> io::Result<ibv_port_attr> {
    // SAFETY: a plain C struct of numbers, for which zeros are a valid value.
    let mut attributes: ibv_port_attr = unsafe { mem::zeroed() };
    let code = match opened.extended(|operations| operations.query_port) {
        // SAFETY: the context is open, and the answer has room for the size that is named.
        Some(question) => unsafe { question(opened.raw(), number, &raw mut attributes, size_of::<ibv_port_attr>()) },
        None => {
            let question = opened.library().verbs.ibv_query_port;
            // SAFETY: as above; the old question writes the beginning of the same struct, as `ibv_query_port` of the header has it.
            unsafe { question(opened.raw(), number, (&raw mut attributes).cast()) }
        }
    };
    if code == 0 { Ok(attributes) } else { Err(io::Error::from_raw_os_error(code)) }
}

fn port(opened: &Opened, device: &str, number: u8) -> io::Result<PortReport> {
    let attributes = attributes(opened, number)?;
    Ok(PortReport {
        number,
        state: state(attributes.state),
        link_layer: match attributes.link_layer {
            LINK_LAYER_INFINIBAND => LinkLayer::InfiniBand,
            LINK_LAYER_ETHERNET => LinkLayer::Ethernet,
            _ => LinkLayer::Other,
        },
        mtu_active: mtu_bytes(attributes.active_mtu),
        mtu_max: mtu_bytes(attributes.max_mtu),
        gids: sysfs::port_gids(Path::new(sysfs::ROOT), device, number),
    })
}

fn state(state: ibv_port_state::Type) -> PortState {
    match state {
        ibv_port_state::IBV_PORT_DOWN => PortState::Down,
        ibv_port_state::IBV_PORT_INIT => PortState::Initializing,
        ibv_port_state::IBV_PORT_ARMED => PortState::Armed,
        ibv_port_state::IBV_PORT_ACTIVE => PortState::Active,
        _ => PortState::Other,
    }
}

/// The bytes that a verb's number for an MTU stands for; 0 for one that is not known.
pub(crate) fn mtu_bytes(mtu: ibv_mtu::Type) -> u32 {
    match mtu {
        ibv_mtu::IBV_MTU_256 => 256,
        ibv_mtu::IBV_MTU_512 => 512,
        ibv_mtu::IBV_MTU_1024 => 1024,
        ibv_mtu::IBV_MTU_2048 => 2048,
        ibv_mtu::IBV_MTU_4096 => 4096,
        _ => 0,
    }
}

impl fmt::Display for PortState {
    fn fmt(&self, to: &mut fmt::Formatter<'_>) -> fmt::Result {
        to.write_str(match self {
            PortState::Down => "down",
            PortState::Initializing => "initializing",
            PortState::Armed => "armed",
            PortState::Active => "active",
            PortState::Other => "in an unknown state",
        })
    }
}

impl fmt::Display for LinkLayer {
    fn fmt(&self, to: &mut fmt::Formatter<'_>) -> fmt::Result {
        to.write_str(match self {
            LinkLayer::InfiniBand => "InfiniBand",
            LinkLayer::Ethernet => "Ethernet",
            LinkLayer::Other => "unknown",
        })
    }
}

impl fmt::Display for GidKind {
    fn fmt(&self, to: &mut fmt::Formatter<'_>) -> fmt::Result {
        to.write_str(match self {
            GidKind::InfiniBand => "InfiniBand",
            GidKind::RoceV1 => "RoCE v1",
            GidKind::RoceV2 => "RoCE v2",
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn taking_stock_never_fails_and_always_says_something() {
        let inventory = Inventory::take();
        assert!(!inventory.devices.is_empty() || !inventory.problems.is_empty(), "{inventory:?}");
    }

    #[test]
    fn guids_are_written_as_the_tools_write_them() {
        assert_eq!(guid(0x5054_00ff_fe12_3456), "5054:00ff:fe12:3456");
    }

    #[test]
    fn mtus_are_bytes() {
        assert_eq!((mtu_bytes(1), mtu_bytes(5), mtu_bytes(9)), (256, 4096, 0));
    }
}
