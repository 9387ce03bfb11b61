//! The addresses (GIDs) of RDMA ports as the kernel shows them under `/sys/class/infiniband`. Only reading of small files: what
//! a device itself can answer is asked of the device.

use crate::inventory::{GidKind, GidReport};
use std::fs;
use std::net::{IpAddr, Ipv6Addr};
use std::path::{Path, PathBuf};

pub(crate) const ROOT: &str = "/sys/class/infiniband";

/// The GIDs of all ports of a device. Those that are not set are left out.
pub(crate) fn gids(root: &Path, device: &str) -> impl Iterator<Item = GidReport> + use<> {
    let ports = numbers(&root.join(device).join("ports"));
    let root = root.to_owned();
    let device = device.to_owned();
    ports.into_iter().filter_map(|port| u8::try_from(port).ok()).flat_map(move |port| port_gids(&root, &device, port))
}

/// The GIDs of one port, in the order of their indices.
pub(crate) fn port_gids(root: &Path, device: &str, port: u8) -> Vec<GidReport> {
    let port = root.join(device).join("ports").join(port.to_string());
    numbers(&port.join("gids")).into_iter().filter_map(|index| gid(&port, index)).collect()
}

/// The GID of one port at `index`: tables have up to 1024 entries, so that reading all of one takes its time.
pub(crate) fn port_gid(root: &Path, device: &str, port: u8, index: u32) -> Option<GidReport> {
    gid(&root.join(device).join("ports").join(port.to_string()), index)
}

fn gid(port: &Path, index: u32) -> Option<GidReport> {
    let read = |path: PathBuf| fs::read_to_string(path).ok().map(|text| text.trim().to_owned());
    let address: Ipv6Addr = read(port.join("gids").join(index.to_string()))?.parse().ok()?;
    if address.is_unspecified() {
        return None;
    }
    let attributes = port.join("gid_attrs");
    // The kernel answers EINVAL for the kind of an entry that is not in use.
    let kind = match read(attributes.join("types").join(index.to_string()))?.as_str() {
        "RoCE v2" => GidKind::RoceV2,
        "IB/RoCE v1" if read(port.join("link_layer")).as_deref() == Some("Ethernet") => GidKind::RoceV1,
        _ => GidKind::InfiniBand,
    };
    let interface = read(attributes.join("ndevs").join(index.to_string()));
    Some(GidReport { index, gid: address, kind, interface })
}

/// The entries of a folder that are numbers, in order.
fn numbers(folder: &Path) -> Vec<u32> {
    let entries = fs::read_dir(folder).into_iter().flatten().flatten();
    let mut numbers: Vec<u32> = entries.filter_map(|entry| entry.file_name().to_str()?.parse().ok()).collect();
    numbers.sort_unstable();
    numbers
}

impl GidReport {
    /// The IP address that a RoCE GID stands for: an IPv4 address is there as an IPv4-mapped one.
    pub fn address(&self) -> IpAddr {
        IpAddr::V6(self.gid).to_canonical()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn write(path: &Path, text: &str) {
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, text).unwrap();
    }

    #[test]
    fn gids_are_read_with_kind_and_interface_and_unset_ones_left_out() {
        let root = tempfile::tempdir().unwrap();
        let port = root.path().join("mlx5_0/ports/1");
        write(&port.join("link_layer"), "Ethernet\n");
        let entries = [
            (0, "fe80:0000:0000:0000:0000:0000:0000:0001", Some("IB/RoCE v1")),
            (10, "0000:0000:0000:0000:0000:ffff:0a4d:0001", Some("RoCE v2")),
            (2, "0000:0000:0000:0000:0000:0000:0000:0000", None),
            (3, "fe80:0000:0000:0000:0000:0000:0000:0002", None),
        ];
        for (index, gid, kind) in entries {
            write(&port.join(format!("gids/{index}")), gid);
            if let Some(kind) = kind {
                write(&port.join(format!("gid_attrs/types/{index}")), kind);
                write(&port.join(format!("gid_attrs/ndevs/{index}")), "eth7\n");
            }
        }
        let found: Vec<GidReport> = gids(root.path(), "mlx5_0").collect();
        assert_eq!(found.iter().map(|gid| gid.index).collect::<Vec<_>>(), [0, 10]);
        assert_eq!(found[0].kind, GidKind::RoceV1);
        assert_eq!((found[1].kind, found[1].interface.as_deref()), (GidKind::RoceV2, Some("eth7")));
        assert_eq!(found[1].address(), "10.77.0.1".parse::<IpAddr>().unwrap());
        assert_eq!(port_gid(root.path(), "mlx5_0", 1, 10).as_ref(), found.get(1));
        assert_eq!(port_gid(root.path(), "mlx5_0", 1, 2), None);
    }

    #[test]
    fn a_device_that_is_not_there_has_no_gids() {
        assert_eq!(gids(Path::new("/nowhere"), "rxe0").count(), 0);
    }
}
