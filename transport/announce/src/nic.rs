//! A guest's network card as the announcer sees it, and what can be wrong with one. Not a device: nothing is opened here.

use std::net::IpAddr;

/// The most addresses of one card that are announced. A card with more is announced for the first of them, and the
/// report says so: 64 addresses are already 129 frames a round.
pub const ADDRESSES_MAX: usize = 64;

/// A guest's network card, and where it hangs on this host.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Nic {
    /// The guest's MAC address.
    pub mac: [u8; 6],
    /// The 802.1Q tag that the frames carry, 1 to 4094. `None` where the bridge does not see tags.
    ///
    /// On a bridge with `vlan_filtering` the bridge device itself must be a member of this VLAN
    /// (`bridge vlan add dev br0 vid N self`), or the bridge drops the frames without saying so.
    pub vlan: Option<u16>,
    /// The guest's addresses. None at all is fine: the RARP frame still teaches the switches.
    pub addresses: Vec<IpAddr>,
    /// The interface by which the frames leave: the bridge that the guest's TAP is a port of.
    pub interface: String,
    /// The guest's TAP, a port of the bridge. `None` leaves the bridge's table alone.
    pub port: Option<String>,
    /// The guest is an IPv6 router. It must be said rightly: neighbours drop a router from their list of default
    /// routers if an advertisement of it says that it is none (RFC 4861, section 7.2.5).
    pub ipv6_router: bool,
}

impl Nic {
    /// What cannot be announced as it stands, in words; empty if all is well.
    ///
    /// A bad MAC or VLAN leaves nothing to announce; a bad address is left out and the others go on.
    pub fn problems(&self) -> Vec<String> {
        let mut problems = Vec::new();
        problems.extend(self.problem_of_card());
        let bad = self.addresses.iter().filter(|a| !can_announce(a));
        problems.extend(bad.map(|a| format!("{a} is no address of one host: it is not announced")));
        if self.addresses.len() > ADDRESSES_MAX {
            problems.push(format!(
                "{} has {} addresses: only the first {ADDRESSES_MAX} are announced",
                mac_words(self.mac),
                self.addresses.len()
            ));
        }
        problems
    }

    /// Why nothing of this card can be announced.
    pub(crate) fn problem_of_card(&self) -> Option<String> {
        if self.mac == [0; 6] || self.mac.first().is_some_and(|first| first & 1 == 1) {
            return Some(format!("{} is no MAC address of one card: nothing is announced", mac_words(self.mac)));
        }
        match self.vlan {
            Some(vlan) if !(1..=4094).contains(&vlan) => {
                Some(format!("VLAN {vlan} does not exist, only 1 to 4094 do: nothing is announced"))
            }
            _ => None,
        }
    }

    /// The addresses that can be announced, at most [`ADDRESSES_MAX`], IPv4-mapped ones as IPv4.
    pub(crate) fn announceable(&self) -> impl Iterator<Item = IpAddr> {
        self.addresses.iter().take(ADDRESSES_MAX).filter(|a| can_announce(a)).map(|a| a.to_canonical())
    }
}

pub(crate) fn can_announce(address: &IpAddr) -> bool {
    match address.to_canonical() {
        IpAddr::V4(v4) => !(v4.is_unspecified() || v4.is_loopback() || v4.is_multicast() || v4.is_broadcast()),
        IpAddr::V6(v6) => !(v6.is_unspecified() || v6.is_loopback() || v6.is_multicast()),
    }
}

/// A MAC address as people write it: `52:54:00:12:34:56`.
pub fn mac_words(mac: [u8; 6]) -> String {
    mac.map(|byte| format!("{byte:02x}")).join(":")
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn bad_cards_and_addresses_are_named() {
        let good = Nic { mac: [2, 0, 0, 0, 0, 1], addresses: vec![[10, 0, 0, 1].into()], ..Nic::default() };
        assert_eq!(good.problems(), Vec::<String>::new());
        let multicast = Nic { mac: [1, 0, 0x5e, 0, 0, 1], ..good.clone() };
        assert!(multicast.problems()[0].contains("01:00:5e:00:00:01"));
        assert!(Nic { mac: [0; 6], ..good.clone() }.problem_of_card().is_some());
        for vlan in [0, 4095, 65535] {
            assert!(Nic { vlan: Some(vlan), ..good.clone() }.problem_of_card().is_some());
        }
        for address in ["0.0.0.0", "127.0.0.1", "224.0.0.1", "255.255.255.255", "::", "::1", "ff02::1", "::ffff:127.0.0.1"] {
            let nic = Nic { addresses: vec![address.parse().unwrap()], ..good.clone() };
            assert_eq!(nic.problems().len(), 1, "{address}");
            assert_eq!(nic.announceable().count(), 0, "{address}");
        }
        let many = Nic { addresses: vec![[10, 0, 0, 1].into(); ADDRESSES_MAX + 1], ..good };
        assert_eq!((many.problems().len(), many.announceable().count()), (1, ADDRESSES_MAX));
    }
}
