//! What this host has for RDMA: its devices, and the addresses by which others may reach it, or why there are none, in words.

use super::{DeviceInfo, RdmaError, RdmaSettings};
use limosa_proto::wire::limits::ADDRESSES_MAX;
use limosa_proto::wire::offer::LinkAddress;
use limosa_verbs::{GidKind, GidReport, Inventory, PortReport, PortState};
use nix::ifaddrs::getifaddrs;
use std::net::IpAddr;

/// The RDMA devices of this host.
///
/// # Errors
/// Why there is none, in words that say what to do.
pub fn devices() -> Result<Vec<DeviceInfo>, String> {
    let inventory = Inventory::take();
    if inventory.devices.is_empty() { Err(said(&inventory.problems)) } else { Ok(inventory.devices) }
}

fn said(problems: &[String]) -> String {
    if problems.is_empty() { "this host has no RDMA device".to_owned() } else { problems.join("; ") }
}

/// The addresses by which this host can be reached over RDMA: of ports that are active, inside the trusted fabric; with the
/// path MTU of the port in bytes.
///
/// # Errors
/// Why there is none, in words that say what to do.
pub fn addresses(settings: &RdmaSettings) -> Result<Vec<LinkAddress>, String> {
    if settings.trusted_fabric.networks().is_empty() {
        return Err(RdmaError::NoTrustedFabric.to_string());
    }
    let inventory = Inventory::take();
    let of_interface = |interface: &str| addresses_of(interface);
    usable(&inventory, settings, &of_interface)
}

fn usable(
    inventory: &Inventory,
    settings: &RdmaSettings,
    of_interface: &dyn Fn(&str) -> Vec<IpAddr>,
) -> Result<Vec<LinkAddress>, String> {
    let (mut found, mut reasons): (Vec<LinkAddress>, Vec<String>) = (Vec::new(), inventory.problems.clone());
    for device in &inventory.devices {
        for port in &device.ports {
            let name = format!("port {} of {}", port.number, device.name);
            match of_port(port, of_interface) {
                Err(why) => reasons.push(format!("{name} {why}")),
                Ok(addresses) => {
                    let (trusted, other): (Vec<IpAddr>, Vec<IpAddr>) =
                        addresses.into_iter().partition(|address| settings.trusts(*address));
                    if trusted.is_empty() {
                        let other: Vec<String> = other.iter().map(ToString::to_string).collect();
                        reasons.push(format!(
                            "{name} has {}, which trusted_fabric ({}) does not name",
                            other.join(", "),
                            settings.trusted_words()
                        ));
                    }
                    let mtu = u16::try_from(port.mtu_active).ok();
                    for address in trusted {
                        if !found.iter().any(|one| one.address == address) {
                            found.push(LinkAddress { address, mtu });
                        }
                    }
                }
            }
        }
    }
    found.truncate(ADDRESSES_MAX);
    if found.is_empty() { Err(said(&reasons)) } else { Ok(found) }
}

/// The addresses of one port, at least one, or what is wrong with it.
fn of_port(port: &PortReport, of_interface: &dyn Fn(&str) -> Vec<IpAddr>) -> Result<Vec<IpAddr>, String> {
    if port.state != PortState::Active {
        let down = "is not active: set its network interface up (ip link set dev INTERFACE up) and look at the cable";
        return Err(down.to_owned());
    }
    let usable = |gid: &&GidReport| gid.kind != GidKind::RoceV1;
    if !port.gids.is_empty() && !port.gids.iter().any(|gid| usable(&gid)) {
        return Err("has only GIDs of the wrong kind (RoCE version 1): give its interface an address, and RoCE version 2 \
                    (cma_roce_mode -d DEVICE -p PORT -m 2)"
            .to_owned());
    }
    let mut addresses = Vec::new();
    for gid in port.gids.iter().filter(usable) {
        match gid.kind {
            // A GID of RoCE is an IP address; one of InfiniBand is not, and its interface has them (IPoIB).
            GidKind::RoceV2 => addresses.push(IpAddr::V6(gid.gid).to_canonical()),
            _ => addresses.extend(gid.interface.as_deref().map(of_interface).unwrap_or_default()),
        }
    }
    addresses.retain(|address| !matches!(address, IpAddr::V6(address) if address.is_unicast_link_local()));
    addresses.sort_unstable();
    addresses.dedup();
    if addresses.is_empty() {
        return Err("has no IP address: give its interface one (ip address add …)".to_owned());
    }
    Ok(addresses)
}

fn addresses_of(interface: &str) -> Vec<IpAddr> {
    let Ok(all) = getifaddrs() else { return Vec::new() };
    all.filter(|one| one.interface_name == interface)
        .filter_map(|one| one.address)
        .filter_map(|address| {
            let v4 = address.as_sockaddr_in().map(|address| IpAddr::V4(address.ip()));
            v4.or_else(|| address.as_sockaddr_in6().map(|address| IpAddr::V6(address.ip())))
        })
        .collect()
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::panic)]
mod tests {
    use super::*;
    use limosa_proto::allow::AllowList;
    use limosa_verbs::{DeviceLimits, LinkLayer, OnDemand};

    fn port(state: PortState, gids: &[(&str, GidKind)]) -> PortReport {
        let gid = |(index, (gid, kind)): (u32, &(&str, GidKind))| GidReport {
            index,
            gid: gid.parse().unwrap(),
            kind: *kind,
            interface: Some("v0".into()),
        };
        let gids = (0..).zip(gids).map(gid).collect();
        PortReport { number: 1, state, link_layer: LinkLayer::Ethernet, mtu_active: 1024, mtu_max: 4096, gids }
    }

    fn usable_of(port: PortReport, trusted: &str) -> Result<Vec<LinkAddress>, String> {
        let limits = DeviceLimits {
            firmware: String::new(),
            ports: 1,
            regions_max: 1,
            region_bytes_max: 1,
            pairs_max: 1,
            work_requests_max: 1,
            queue_entries_max: 1,
        };
        let device =
            DeviceInfo { name: "rxe0".into(), guid: String::new(), limits, on_demand: OnDemand::default(), ports: vec![port] };
        let settings = RdmaSettings { trusted_fabric: AllowList::new(&[trusted]).unwrap().0, ..RdmaSettings::default() };
        let inventory = Inventory { devices: vec![device], problems: vec![] };
        usable(&inventory, &settings, &|_| vec!["10.9.9.9".parse().unwrap()])
    }

    #[test]
    fn trusted_addresses_of_active_ports_are_found() {
        let gids = [("fe80::1", GidKind::RoceV2), ("::ffff:10.77.0.1", GidKind::RoceV1), ("::ffff:10.77.0.1", GidKind::RoceV2)];
        let found = usable_of(port(PortState::Active, &gids), "10.77.0.0/24").unwrap();
        assert_eq!(found, [LinkAddress { address: "10.77.0.1".parse().unwrap(), mtu: Some(1024) }]);
    }

    #[test]
    fn an_infiniband_port_has_the_addresses_of_its_interface() {
        let found = usable_of(port(PortState::Active, &[("fe80::2", GidKind::InfiniBand)]), "10.9.0.0/16").unwrap();
        assert_eq!(found.first().unwrap().address, "10.9.9.9".parse::<IpAddr>().unwrap());
    }

    #[test]
    fn why_there_is_none_is_said() {
        let good = [("::ffff:10.77.0.1", GidKind::RoceV2)];
        let words = usable_of(port(PortState::Down, &good), "10.77.0.0/24").unwrap_err();
        assert!(words.contains("not active"), "{words}");
        let words = usable_of(port(PortState::Active, &good), "10.78.0.0/24").unwrap_err();
        assert!(words.contains("10.77.0.1") && words.contains("10.78.0.0/24"), "{words}");
        let words = usable_of(port(PortState::Active, &[("::ffff:10.77.0.1", GidKind::RoceV1)]), "10.77.0.0/24").unwrap_err();
        assert!(words.contains("wrong kind"), "{words}");
        let words = usable_of(port(PortState::Active, &[("fe80::1", GidKind::RoceV2)]), "10.77.0.0/24").unwrap_err();
        assert!(words.contains("no IP address"), "{words}");
    }

    #[test]
    fn without_a_trusted_fabric_there_is_no_rdma() {
        assert!(addresses(&RdmaSettings::default()).unwrap_err().contains("trusted_fabric"));
    }
}
