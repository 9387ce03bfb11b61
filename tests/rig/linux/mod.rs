//! Stock Linux guests: Debian's own kernel, its own modules, busybox, and one program of ours (`tests/guest/linux`) whose memory,
//! blocks, files and TCP streams can be proven right, and which says each second how it is. What runs them is the caller's affair.

pub mod disk;
pub mod image;
pub mod outside;
pub mod share;

pub use image::{Debian, Images};

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::net::Ipv4Addr;
use std::path::Path;

/// A line of shell that lets memfds have transparent huge pages, for guests with `thp = true`.
pub const HUGE_PAGES_FOR_MEMFDS: &str = "echo advise >/sys/kernel/mm/transparent_hugepage/shmem_enabled";

/// Which of the two files of one kernel a guest boots.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum KernelFile {
    /// As distributed.
    BzImage,
    /// The ELF in it, which has a PVH entry; no decompression at boot.
    Pvh,
}

/// A disk of a guest.
#[derive(Debug, Clone)]
pub struct Disk {
    /// The image, as the hosts see it.
    pub path: String,
    /// "raw" or "qcow2".
    pub format: &'static str,
}

/// A guest to be started.
#[derive(Debug, Clone)]
pub struct LinuxGuest {
    /// Its name, unique on a host.
    pub name: String,
    /// Its number: makes its MAC and its addresses.
    pub number: u8,
    /// Whose kernel it boots.
    pub debian: Debian,
    /// Which file of it.
    pub kernel: KernelFile,
    /// Memory in MiB.
    pub memory_mib: u32,
    /// How many vCPUs.
    pub vcpus: u32,
    /// The network of its NIC; none when empty.
    pub network: String,
    /// Its disks, /dev/vda first.
    pub disks: Vec<Disk>,
    /// Further lines of its configuration, before its sections.
    pub settings: String,
    /// Tasks of the program inside, and other words of the kernel's command line.
    pub words: Vec<String>,
}

impl LinuxGuest {
    /// A guest of 256 MiB with one vCPU and a NIC, that rewrites 4 MiB of its memory.
    pub fn new(name: &str, number: u8) -> LinuxGuest {
        LinuxGuest {
            name: name.to_owned(),
            number,
            debian: Debian::Bookworm,
            kernel: KernelFile::Pvh,
            memory_mib: 256,
            vcpus: 1,
            network: "lan".into(),
            disks: Vec::new(),
            settings: String::new(),
            words: vec!["lt.mem=4".into()],
        }
    }

    /// Booting this Debian's kernel.
    #[must_use]
    pub fn debian(mut self, debian: Debian) -> LinuxGuest {
        self.debian = debian;
        self
    }

    /// Booting this file.
    #[must_use]
    pub fn kernel(mut self, kernel: KernelFile) -> LinuxGuest {
        self.kernel = kernel;
        self
    }

    /// With so many vCPUs.
    #[must_use]
    pub fn vcpus(mut self, vcpus: u32) -> LinuxGuest {
        self.vcpus = vcpus;
        self
    }

    /// With a further disk.
    #[must_use]
    pub fn disk(mut self, path: &str, format: &'static str) -> LinuxGuest {
        self.disks.push(Disk { path: path.to_owned(), format });
        self
    }

    /// With a further task or word, such as `lt.disk=/dev/vda`.
    #[must_use]
    pub fn word(mut self, word: &str) -> LinuxGuest {
        self.words.push(word.to_owned());
        self
    }

    /// With a further line of configuration.
    #[must_use]
    pub fn setting(mut self, line: &str) -> LinuxGuest {
        let _ = writeln!(self.settings, "{line}");
        self
    }

    /// Its MAC address: the capture's filter knows the first four bytes.
    pub fn mac(&self) -> String {
        format!("52:54:00:77:01:{:02x}", self.number)
    }

    /// The same, as frames have it.
    pub fn mac_bytes(&self) -> [u8; 6] {
        [0x52, 0x54, 0, 0x77, 1, self.number]
    }

    /// Its IPv4 address, on the guests' Ethernet.
    pub fn ip(&self) -> Ipv4Addr {
        Ipv4Addr::new(10, 78, 0, 100u8.saturating_add(self.number))
    }

    /// Its IPv6 address there.
    pub fn ip6(&self) -> String {
        format!("fd78::{:x}", 0x100 + u16::from(self.number))
    }

    /// Its kernel's command line.
    pub fn cmdline(&self) -> String {
        let mut cmdline = "console=ttyS0 loglevel=5 panic=-1 mitigations=off".to_owned();
        if !self.network.is_empty() {
            let _ = write!(cmdline, " lt.ip={}/24 lt.ip6={}/64", self.ip(), self.ip6());
        }
        for word in &self.words {
            let _ = write!(cmdline, " {word}");
        }
        cmdline
    }

    /// The configuration of its VM.
    pub fn text(&self, images: &Images) -> String {
        let kernel = match self.kernel {
            KernelFile::BzImage => &images.bzimage,
            KernelFile::Pvh => &images.pvh,
        };
        let cmdline = self.cmdline();
        let mut text = self.head(kernel, &images.initramfs, &cmdline);
        if !self.network.is_empty() {
            let (mac, network, ip, ip6) = (self.mac(), &self.network, self.ip(), self.ip6());
            let _ = write!(text, "\n[[nic]]\nmac = \"{mac}\"\nnetwork = \"{network}\"\naddresses = [\"{ip}\", \"{ip6}\"]\n");
        }
        for disk in &self.disks {
            let _ = write!(text, "\n[[disk]]\npath = \"{}\"\nformat = \"{}\"\n", disk.path, disk.format);
        }
        text
    }

    fn head(&self, kernel: &Path, initramfs: &Path, cmdline: &str) -> String {
        format!(
            "name = \"{}\"\nmemory = \"{}M\"\nvcpus = {}\nkernel = \"{}\"\ninitramfs = \"{}\"\ncmdline = \"{cmdline}\"\n\
             serial = \"stdout\"\n{}",
            self.name,
            self.memory_mib,
            self.vcpus,
            kernel.display(),
            initramfs.display(),
            self.settings
        )
    }
}

/// One heartbeat of the program inside.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct LinuxBeat(BTreeMap<String, u64>);

impl LinuxBeat {
    /// A figure by its name; 0 before the first heartbeat.
    pub fn get(&self, name: &str) -> u64 {
        self.0.get(name).copied().unwrap_or(0)
    }

    /// Its number; heartbeats count from 1.
    pub fn n(&self) -> u64 {
        self.get("n")
    }

    /// What is wrong by its figures; nothing when all is well.
    pub fn troubles(&self) -> Vec<String> {
        let bad = ["backwards", "mem_errors", "disk_errors", "files_errors", "stream_errors"];
        bad.into_iter().filter(|name| self.get(name) > 0).map(|name| format!("{name}={}", self.get(name))).collect()
    }
}

/// The figures in a line of the serial log, if it is a whole heartbeat.
pub fn linux_beat_of(line: &str) -> Option<LinuxBeat> {
    let fields = line.trim_end().strip_prefix("limosa-linux heartbeat ")?.split_whitespace();
    let fields: BTreeMap<String, u64> = fields
        .map(|field| field.split_once('=').and_then(|(key, value)| Some((key.to_owned(), value.parse().ok()?))))
        .collect::<Option<_>>()?;
    fields.contains_key("tcp_retransmits").then_some(LinuxBeat(fields))
}

/// The last whole heartbeat of a serial log.
pub fn last_beat(serial: &str) -> Option<LinuxBeat> {
    let whole = serial.rfind('\n').and_then(|end| serial.get(..end))?;
    whole.lines().rev().find_map(linux_beat_of)
}

/// Lines of a serial log that no healthy guest prints, whether its kernel or our program did.
pub fn complaints(serial: &str) -> Vec<String> {
    const MARKS: [&str; 19] = [
        "limosa-linux bad",
        "limosa-linux failed",
        "limosa-linux stream broke",
        "soft lockup",
        "hard LOCKUP",
        "clocksource: timekeeping watchdog",
        "Marking clocksource",
        "tsc: Marking TSC unstable",
        "rcu: INFO",
        "blocked for more than",
        "WARNING: CPU",
        "BUG:",
        "Oops",
        "Call Trace",
        "Kernel panic",
        "I/O error",
        "EXT4-fs error",
        "nobody cared",
        "transmit queue",
    ];
    serial.lines().filter(|line| MARKS.iter().any(|mark| line.contains(mark))).map(str::to_owned).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_heartbeat_is_read_and_a_torn_one_is_not() {
        let line = "limosa-linux heartbeat n=7 up_ms=9000 backwards=0 mem_errors=2 tcp_retransmits=0";
        let beat = linux_beat_of(line).unwrap();
        assert_eq!((beat.n(), beat.get("up_ms"), beat.get("absent")), (7, 9000, 0));
        assert_eq!(beat.troubles(), ["mem_errors=2"]);
        assert_eq!(linux_beat_of("limosa-linux heartbeat n=7 up_ms=9000"), None);
        assert_eq!(linux_beat_of("limosa-linux heartbeat n=7 up_[    3.1] kernel=0 tcp_retransmits=0"), None);
        assert_eq!(last_beat(&format!("{line}\nlimosa-linux heartbeat n=8 up")), Some(beat));
    }

    #[test]
    fn complaints_of_kernel_and_program_are_found() {
        let log =
            "[    1.0] Linux version\n[   40.1] watchdog: BUG: soft lockup - CPU#0 stuck\nlimosa-linux bad page 3: x\nall well\n";
        assert_eq!(complaints(log).len(), 2);
        assert!(complaints("[    0.1] PCI: System does not support PCI\nlimosa-linux ready kernel=6.1 cpus=2\n").is_empty());
    }

    #[test]
    fn the_configuration_names_what_the_guest_has() {
        let images = Images { bzimage: "/k/bz".into(), pvh: "/k/elf".into(), initramfs: "/k/cpio".into(), release: "6.1".into() };
        let guest = LinuxGuest::new("web", 3).disk("/srv/vm/a.img", "raw").setting("cpu = \"host\"").word("lt.disk=/dev/vda");
        let text = guest.text(&images);
        for part in [
            "kernel = \"/k/elf\"",
            "cpu = \"host\"\n",
            "lt.ip=10.78.0.103/24 lt.ip6=fd78::103/64 lt.mem=4 lt.disk=/dev/vda\"",
            "[[nic]]\nmac = \"52:54:00:77:01:03\"",
            "[[disk]]\npath = \"/srv/vm/a.img\"\nformat = \"raw\"",
        ] {
            assert!(text.contains(part), "{part}\nis not in\n{text}");
        }
    }
}
