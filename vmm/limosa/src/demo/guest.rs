//! The demo's guest: its image, its configuration, and what it says of itself over its serial line.
//! Not how it runs (`vmm`) nor where (`lab`).

use std::collections::HashMap;
use std::fs;
use std::io;
use std::net::Ipv4Addr;
use std::path::{Path, PathBuf};

/// The guest of tests/guest, built by build.rs.
const IMAGE: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/limosa-guest.elf"));
/// Its MAC address.
pub(crate) const MAC: &str = "52:54:00:13:56:05";
/// Its name.
pub(crate) const NAME: &str = "godwit";
/// Its address.
pub(crate) const ADDRESS: Ipv4Addr = Ipv4Addr::new(10, 13, 56, 5);
/// Smallest guest: its image, its tables and a working set.
pub(crate) const MEMORY_MIN: u64 = 32 << 20;

/// The guest's files in the demo's directory.
pub(crate) struct Guest {
    /// Where its serial line goes: the VMM's log on the one host, then on the other.
    serials: Vec<PathBuf>,
    /// Its configuration file.
    pub(crate) config: PathBuf,
}

/// What the guest said in its last heartbeat.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(crate) struct Heartbeat {
    /// Which heartbeat.
    pub(crate) number: u64,
    /// Pages written since it started.
    pub(crate) written: u64,
    /// How often it found its whole working set right.
    pub(crate) verified: u64,
    /// Pages that were not as it left them.
    pub(crate) errors: u64,
}

impl Guest {
    /// Writes image and configuration into `directory`. `dirty` is in bytes a second; `hosts` are the agents' state directories.
    pub(crate) fn write(directory: &Path, hosts: &[PathBuf], memory: u64, dirty: u64) -> io::Result<Guest> {
        let image = directory.join("guest.elf");
        fs::write(&image, IMAGE)?;
        let config = directory.join("guest.toml");
        fs::write(&config, config_text(&image, memory, dirty))?;
        let serials = hosts.iter().map(|state| state.join("vm").join(format!("{NAME}.log"))).collect();
        Ok(Guest { serials, config })
    }

    /// The newest heartbeat on the serial line.
    pub(crate) fn heartbeat(&self) -> Option<Heartbeat> {
        let newest = |text: String| {
            let whole = text.split_inclusive('\n').filter(|line| line.ends_with('\n'));
            whole.filter_map(parse_heartbeat).next_back()
        };
        self.serials().filter_map(newest).max_by_key(|heartbeat| heartbeat.number)
    }

    /// What it complained of, if it did.
    pub(crate) fn complaint(&self) -> Option<String> {
        let complaint = |line: &&str| line.contains("limosa-guest ERROR") || line.contains("limosa-guest FAILED");
        self.serials().find_map(|text| text.lines().find(complaint).map(str::to_string))
    }

    fn serials(&self) -> impl Iterator<Item = String> {
        let text = |path: &PathBuf| fs::read(path).ok().map(|bytes| String::from_utf8_lossy(&bytes).into_owned());
        self.serials.iter().filter_map(text)
    }
}

fn config_text(image: &Path, memory: u64, dirty: u64) -> String {
    let working_set = (memory / 8).clamp(4 << 20, 32 << 20) >> 12 << 12;
    format!(
        "name = \"{NAME}\"\nmemory = {memory}\nkernel = \"{}\"\n\
         cmdline = \"ip={ADDRESS} ws={working_set} fill=max dirty={dirty} heartbeat=100 virtio_mmio.device=4K@0xd0000000:5\"\n\
         [[nic]]\nmac = \"{MAC}\"\nnetwork = \"lan\"\naddresses = [\"{ADDRESS}\"]\n",
        image.display()
    )
}

/// `limosa-guest heartbeat n=12 … written=… verified=… errors=…`; none for any other line.
fn parse_heartbeat(line: &str) -> Option<Heartbeat> {
    let fields = line.trim().split_once("limosa-guest heartbeat ")?.1;
    let fields: HashMap<&str, &str> = fields.split_whitespace().filter_map(|field| field.split_once('=')).collect();
    let number = |name| fields.get(name).and_then(|value: &&str| value.parse().ok());
    Some(Heartbeat {
        number: number("n")?,
        written: number("written")?,
        verified: number("verified")?,
        errors: number("errors")?,
    })
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use limosa_agent::vm_config::VmConfig;

    #[test]
    fn the_configuration_is_valid() {
        let text = config_text(Path::new("/x/guest.elf"), 256 << 20, 1 << 20);
        let config = VmConfig::parse(Path::new("guest.toml"), &text).unwrap();
        assert_eq!((config.name.as_str(), config.memory), (NAME, 256 << 20));
        assert!(config.cmdline.contains("ws=33554432 fill=max dirty=1048576"), "{}", config.cmdline);
    }

    #[test]
    fn heartbeats_are_read() {
        let line = "limosa-guest heartbeat n=7 up_us=1 gap_us=2 written=300 sum=5 passes=1 verified=2 errors=0 bad=0x0 rx=1\n";
        assert_eq!(parse_heartbeat(line), Some(Heartbeat { number: 7, written: 300, verified: 2, errors: 0 }));
        assert_eq!(parse_heartbeat("limosa-guest heartbeat n=7 written="), None);
        assert_eq!(parse_heartbeat("limosa-guest ready version=1"), None);
        let dir = tempfile::tempdir().unwrap();
        let hosts = [dir.path().join("a"), dir.path().join("b")];
        let guest = Guest::write(dir.path(), &hosts, 64 << 20, 0).unwrap();
        assert_eq!(guest.heartbeat(), None);
        for (host, text) in
            hosts.iter().zip([line.to_string(), line.replace("n=7", "n=9") + "limosa-guest heartbeat n=10 written=1"])
        {
            fs::create_dir_all(host.join("vm")).unwrap();
            fs::write(host.join("vm/godwit.log"), text).unwrap();
        }
        // A half-written last line does not count; the newer host's line does.
        assert_eq!(guest.heartbeat().unwrap().number, 9);
        assert_eq!(guest.complaint(), None);
    }
}
