//! A guest as a test wants it, and what it says of itself on its serial line. How it is started is in `host`.

use std::collections::BTreeMap;
use std::net::{IpAddr, Ipv4Addr};
use std::path::Path;

/// A guest to be started.
#[derive(Debug, Clone)]
pub struct GuestSpec {
    /// Its name, unique on a host.
    pub name: String,
    /// Its number in the lab: makes its MAC and its address.
    pub number: u8,
    /// Memory, as the configuration writes it.
    pub memory: String,
    /// Working set.
    pub ws: String,
    /// Bytes a second that it dirties, or "max".
    pub dirty: String,
    /// Memory filled at start, so that it is not zero.
    pub fill: String,
    /// How many vCPUs.
    pub vcpus: u32,
    /// The network of its NIC.
    pub network: String,
    /// More of its configuration, as the file has it: `[[disk]]` sections.
    pub sections: String,
}

impl GuestSpec {
    /// An idle guest of 128 MiB.
    pub fn new(name: &str, number: u8) -> GuestSpec {
        GuestSpec {
            name: name.to_owned(),
            number,
            memory: "128M".into(),
            ws: "16M".into(),
            dirty: "1M".into(),
            fill: "16M".into(),
            vcpus: 1,
            network: "lan".into(),
            sections: String::new(),
        }
    }

    /// With this dirty rate (bytes a second) in a working set of this size.
    pub fn dirty(mut self, rate: &str, ws: &str) -> GuestSpec {
        (self.dirty, self.ws) = (rate.to_owned(), ws.to_owned());
        self
    }

    /// With so much memory, of which so much is filled.
    pub fn memory(mut self, memory: &str, fill: &str) -> GuestSpec {
        (self.memory, self.fill) = (memory.to_owned(), fill.to_owned());
        self
    }

    /// On this network.
    pub fn network(mut self, network: &str) -> GuestSpec {
        self.network = network.to_owned();
        self
    }

    /// With a disk on this image, of this format ("raw", "qcow2").
    pub fn disk(mut self, image: &Path, format: &str) -> GuestSpec {
        self.sections += &format!("\n[[disk]]\npath = {image:?}\nformat = \"{format}\"\n");
        self
    }

    /// Its MAC address: the capture's filter knows the first four bytes.
    pub fn mac(&self) -> String {
        format!("52:54:00:77:00:{:02x}", self.number)
    }

    /// Its IPv4 address.
    pub fn ip(&self) -> IpAddr {
        IpAddr::V4(Ipv4Addr::new(10, 77, 0, 100 + self.number))
    }

    /// The IPv6 address that is announced for it (the guest itself speaks IPv4 only).
    pub fn ip6(&self) -> String {
        format!("fd00:77::{:x}", 100 + u16::from(self.number))
    }

    /// The configuration of its VM.
    pub fn text(&self, kernel: &Path) -> String {
        let cmdline = format!(
            "ws={} dirty={} fill={} ip={} heartbeat=50 virtio_mmio.device=4K@0xd0000000:5",
            self.ws,
            self.dirty,
            self.fill,
            self.ip()
        );
        format!(
            "name = \"{}\"\nmemory = \"{}\"\nvcpus = {}\nkernel = \"{}\"\ncmdline = \"{cmdline}\"\nserial = \"stdout\"\n\n\
             [[nic]]\nmac = \"{}\"\nnetwork = \"{}\"\naddresses = [\"{}\", \"{}\"]\n{}",
            self.name,
            self.memory,
            self.vcpus,
            kernel.display(),
            self.mac(),
            self.network,
            self.ip(),
            self.ip6(),
            self.sections
        )
    }
}

/// The figures of one heartbeat of a guest.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Beat {
    /// Number of the heartbeat.
    pub n: u64,
    /// Pages written since the guest's boot.
    pub written: u64,
    /// Sum of all counters as the guest keeps it.
    pub sum: u64,
    /// Whole walks over the working set that found nothing.
    pub verified: u64,
    /// Pages that were not what was left in them.
    pub errors: u64,
    /// Times that a clock went backwards.
    pub backwards: u64,
    /// The guest's own largest pause since its boot, in microseconds.
    pub gap_us_max: u64,
}

/// The figures in a line of the serial log, if it is a whole heartbeat.
pub fn beat_of(line: &str) -> Option<Beat> {
    let fields = line.strip_prefix("limosa-guest heartbeat ")?;
    let fields: BTreeMap<&str, u64> =
        fields.split_whitespace().filter_map(|f| f.split_once('=')).filter_map(|(k, v)| Some((k, v.parse().ok()?))).collect();
    let get = |key: &str| fields.get(key).copied();
    Some(Beat {
        n: get("n")?,
        written: get("written")?,
        sum: get("sum")?,
        verified: get("verified")?,
        errors: get("errors")?,
        backwards: get("backwards").unwrap_or(0),
        gap_us_max: get("gap_us_max").unwrap_or(0),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_heartbeat_line_is_read_and_a_torn_one_is_not() {
        let line = "limosa-guest heartbeat n=7 up_us=9 gap_us=1 gap_us_max=44 written=512 sum=4608 passes=0 verified=3 errors=0 bad=0x0 rx=0 tx=0 backwards=0 kvmclock_ns=5";
        let beat = Beat { n: 7, written: 512, sum: 4608, verified: 3, errors: 0, backwards: 0, gap_us_max: 44 };
        assert_eq!(beat_of(line), Some(beat));
        assert_eq!(beat_of("limosa-guest heartbeat n=7 written=5"), None);
        assert_eq!(beat_of("limosa-guest ready version=1"), None);
    }
}
