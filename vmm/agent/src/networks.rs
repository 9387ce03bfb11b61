//! What this host's networks offer to a guest's NICs: bridges, their MTU and VLANs, and who has which MAC address. Read anew for
//! each question, from sysfs and the bridges' tables. It changes nothing; whether a guest fits is `limosa_proto::compat`'s.

use crate::config::{Config, Network};
use limosa_announce::{Hold, Station, mac_words, stations};
use limosa_proto::compat::{MacHolder, NetworkOffer};
use nix::net::if_::if_indextoname;
use std::collections::HashMap;
use std::fs;
use std::path::{Path, PathBuf};

fn about(interface: &str) -> PathBuf {
    Path::new("/sys/class/net").join(interface)
}

fn number(path: &Path) -> Option<u32> {
    fs::read_to_string(path).ok().and_then(|text| text.trim().parse().ok())
}

fn is_tap(interface: &str) -> bool {
    about(interface).join("tun_flags").exists()
}

/// The networks that the configuration names, as they are now.
pub(crate) fn offers(config: &Config) -> Vec<NetworkOffer> {
    config.networks.iter().map(offer).collect()
}

fn offer(network: &Network) -> NetworkOffer {
    let (name, bridge) = (network.name.clone(), network.bridge.clone());
    let there = about(&bridge).join("bridge");
    let vlans = number(&there.join("vlan_filtering")) == Some(1);
    let broken = match network.vlan {
        _ if !there.is_dir() => Some(format!("its bridge {bridge} does not exist; bridges there: {}", bridges())),
        Some(vlan) if !vlans => Some(format!("it is VLAN {vlan} of the bridge {bridge}, which does not filter VLANs")),
        _ => None,
    };
    NetworkOffer { name, mtu: network.mtu, bridge_mtu: bridge_mtu(&bridge), bridge, vlans, broken }
}

/// The bridges of this host, for people.
fn bridges() -> String {
    let mut all: Vec<String> = interfaces().into_iter().filter(|name| about(name).join("bridge").is_dir()).collect();
    all.sort();
    if all.is_empty() { "none".to_owned() } else { all.join(", ") }
}

/// Names of all interfaces.
fn interfaces() -> Vec<String> {
    let all = fs::read_dir("/sys/class/net").into_iter().flatten().flatten();
    all.map(|one| one.file_name().to_string_lossy().into_owned()).collect()
}

/// The MTU that a bridge has for its guests; none where it has no ports and takes that of the first.
///
/// The kernel lowers a bridge to its smallest port. Where that is the TAP of a guest with a small MTU, the others lose nothing
/// by it, and what counts is what leads elsewhere.
fn bridge_mtu(bridge: &str) -> Option<u32> {
    let own = number(&about(bridge).join("mtu"))?;
    let ports = fs::read_dir(about(bridge).join("brif")).ok()?.flatten();
    let ports: Vec<(bool, u32)> = ports
        .map(|port| port.file_name().to_string_lossy().into_owned())
        .filter_map(|port| Some((is_tap(&port), number(&about(&port).join("mtu"))?)))
        .collect();
    if ports.iter().any(|(tap, mtu)| *tap && *mtu == own) {
        return ports.iter().filter(|(tap, _)| !tap).map(|(_, mtu)| *mtu).min();
    }
    (!ports.is_empty()).then_some(own)
}

/// Who has which MAC address on this host: its interfaces, and what the bridges know on TAPs. Behind any other port may be a
/// network: a MAC there is that of a machine elsewhere, such as the guest that wants to come, and no conflict. A static entry
/// proves no more than a learned one, for the kernel moves it to where the MAC was heard last.
pub(crate) fn mac_holders() -> Vec<MacHolder> {
    let mut holders = Vec::new();
    for name in interfaces() {
        let text = fs::read_to_string(about(&name).join("address")).unwrap_or_default();
        if let Some(mac) = mac_of(text.trim()) {
            holders.push(MacHolder { mac, who: format!("the interface {name}") });
        }
    }
    match stations() {
        Ok(all) => holders.extend(behind_taps(&all)),
        Err(error) => tracing::warn!(%error, "who has a MAC address behind the bridges' ports is not known"),
    }
    holders
}

fn behind_taps(all: &[Station]) -> Vec<MacHolder> {
    // The name of each port that is a TAP.
    let mut ports: HashMap<u32, Option<String>> = HashMap::new();
    let mut holders: Vec<MacHolder> = Vec::new();
    for station in all.iter().filter(|station| station.hold != Hold::Own) {
        let port = ports.entry(station.port).or_insert_with(|| {
            let name = if_indextoname(station.port).map(|name| name.to_string_lossy().into_owned()).unwrap_or_default();
            is_tap(&name).then_some(name)
        });
        let Some(port) = port else { continue };
        // A table has an entry for each VLAN.
        if holders.last().is_none_or(|last| last.mac != station.mac) {
            holders.push(MacHolder { mac: station.mac, who: format!("who is behind the TAP {port}") });
        }
    }
    holders
}

/// The MAC of an interface of this host.
pub(crate) fn own_mac(interface: &str) -> Option<[u8; 6]> {
    mac_of(std::fs::read_to_string(format!("/sys/class/net/{interface}/address")).ok()?.trim())
}

/// A MAC address in the kernel's words; none for zeros and for addresses of another kind.
fn mac_of(text: &str) -> Option<[u8; 6]> {
    let bytes: Vec<u8> = text.split(':').map(|byte| u8::from_str_radix(byte, 16)).collect::<Result<_, _>>().ok()?;
    let mac: [u8; 6] = bytes.try_into().ok()?;
    (mac != [0; 6] && mac_words(mac) == text).then_some(mac)
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn addresses_are_read_and_loopback_has_none() {
        assert_eq!(mac_of("52:54:00:12:34:56"), Some([0x52, 0x54, 0, 0x12, 0x34, 0x56]));
        for text in ["00:00:00:00:00:00", "", "52:54:00:12:34", "52:54:00:12:34:56:78", "zz:54:00:12:34:56", "5:54:00:12:34:56"] {
            assert_eq!(mac_of(text), None, "{text}");
        }
    }

    #[test]
    fn a_bridge_that_is_not_there_is_broken() {
        let network = Network { name: "lan".into(), bridge: "no-such-bridge".into(), vlan: Some(7), learn: true, mtu: 1500 };
        let offer = offer(&network);
        assert_eq!((offer.bridge_mtu, offer.vlans), (None, false));
        assert!(offer.broken.unwrap().contains("no-such-bridge does not exist; bridges there: "));
    }

    #[test]
    fn interfaces_hold_their_addresses() {
        // Where this test runs there is at least one holder, or no interface with an address.
        let addressed = interfaces()
            .into_iter()
            .any(|name| mac_of(fs::read_to_string(about(&name).join("address")).unwrap_or_default().trim()).is_some());
        assert_eq!(mac_holders().iter().any(|holder| holder.who.starts_with("the interface")), addressed);
    }
}
