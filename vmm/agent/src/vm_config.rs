//! A guest's configuration file: name, memory, vCPUs, what it boots, its NICs.
//! It is read by the VMM, by the agent for the name, and on the destination from the text that travels with the
//! guest. It opens nothing: whether the kernel or a bridge exists is found out by who needs it.

use crate::checked::{ConfigError, Problems, Section, read_text};
use crate::config::{NAME_WANTS, plain_name};
use limosa_proto::cpu::LEVELS;
use limosa_proto::identity::VmId;
use limosa_proto::wire::limits::{DISKS_MAX, PATH_BYTES_MAX, SERIAL_BYTES_MAX};
use limosa_proto::wire::message::ImageFormat;
use limosa_proto::wire::message::NicDescription;
use std::net::IpAddr;
use std::path::{Path, PathBuf};

/// Where the guest's serial line goes.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub enum Serial {
    /// To the VMM's standard output, which the agent keeps in a log file.
    #[default]
    Stdout,
    /// Appended to a file.
    File(PathBuf),
    /// Nowhere.
    Off,
}

/// One network interface of a guest.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NicConfig {
    /// Its MAC address; it never changes.
    pub mac: [u8; 6],
    /// The network it is on, by the name that all hosts know.
    pub network: String,
    /// Addresses that the guest uses, for the announcements after a move.
    pub addresses: Vec<IpAddr>,
    /// VLAN tag of the guest's frames on the bridge, if any.
    pub vlan: Option<u16>,
    /// Largest packet in bytes, without the Ethernet header.
    pub mtu: u16,
    /// Whether the guest may leave checksums and segmentation to the host.
    pub offload: bool,
}

/// One disk of a guest.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DiskConfig {
    /// Its image.
    pub path: PathBuf,
    /// The image's format; none: qcow2 if it is one, and refused otherwise.
    pub format: Option<ImageFormat>,
    /// Whether the guest may only read it.
    pub readonly: bool,
    /// The serial number that the guest sees; may be empty.
    pub serial: String,
    /// The path was named by another host, and has been resolved by this one's agent: no symbolic link is followed in it.
    pub resolved: bool,
}

impl NicConfig {
    /// The NIC as it is described to the agent and to other hosts.
    #[must_use]
    pub fn describe(&self) -> NicDescription {
        let (mac, network, mtu) = (self.mac, self.network.clone(), self.mtu);
        NicDescription { mac, network, mtu, vlan: self.vlan, addresses: self.addresses.clone() }
    }
}

/// Which of its host's CPU a guest sees.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub enum CpuMode {
    /// All of it: it moves to hosts that have as much.
    #[default]
    Host,
    /// A level of the x86-64 psABI, 1 to 4, and no more.
    Baseline(usize),
    /// What all these hosts have.
    Common(Vec<String>),
    /// The least that a 64-bit guest boots with.
    Minimum,
}

/// Hosts that a guest's CPU may be common to.
const COMMON_HOSTS_MAX: usize = 32;

impl CpuMode {
    /// The name of its level; empty where it has none.
    #[must_use]
    pub fn level_name(&self) -> &'static str {
        match self {
            CpuMode::Baseline(level) => level.checked_sub(1).and_then(|level| LEVELS.get(level)).copied().unwrap_or_default(),
            _ => "",
        }
    }
}

impl std::str::FromStr for CpuMode {
    type Err = ();
    fn from_str(text: &str) -> Result<CpuMode, ()> {
        match (text, text.strip_prefix("baseline:")) {
            ("host", _) => Ok(CpuMode::Host),
            ("minimum", _) => Ok(CpuMode::Minimum),
            (_, Some(name)) => LEVELS.iter().position(|level| *level == name).map(|index| CpuMode::Baseline(index + 1)).ok_or(()),
            _ => Err(()),
        }
    }
}

/// As a guest's file has it.
impl std::fmt::Display for CpuMode {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            CpuMode::Host => f.write_str("\"host\""),
            CpuMode::Minimum => f.write_str("\"minimum\""),
            CpuMode::Baseline(_) => write!(f, "\"baseline:{}\"", self.level_name()),
            CpuMode::Common(hosts) => write!(f, "{{ common = {hosts:?} }}"),
        }
    }
}

/// A guest, as its file describes it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct VmConfig {
    /// Its name, unique on a host.
    pub name: String,
    /// Memory in bytes, a multiple of 4 KiB.
    pub memory: u64,
    /// Whether memory is backed by 2 MiB huge pages (hugetlbfs).
    pub huge_pages: bool,
    /// Whether transparent huge pages are asked for.
    pub thp: bool,
    /// Whether all memory is populated at start.
    pub populate: bool,
    /// Number of virtual CPUs.
    pub vcpus: u32,
    /// Which of its host's CPU it sees; decided at its start, for life.
    pub cpu: CpuMode,
    /// Kernel image: PVH ELF or bzImage.
    pub kernel: PathBuf,
    /// Initial RAM disk.
    pub initramfs: Option<PathBuf>,
    /// Kernel command line.
    pub cmdline: String,
    /// Where the serial line goes.
    pub serial: Serial,
    /// Network interfaces, in order.
    pub nics: Vec<NicConfig>,
    /// Disks, in order.
    pub disks: Vec<DiskConfig>,
    /// Whether it has a source of random bytes.
    pub rng: bool,
    /// Whether it has a balloon, through which it reports free pages.
    pub balloon: bool,
}

impl VmConfig {
    /// Reads and validates `file`; relative paths in it are relative to its directory.
    ///
    /// # Errors
    /// Every problem of the file, with its line.
    pub fn load(file: &Path) -> Result<(VmConfig, String), ConfigError> {
        let text = read_text(file)?;
        let mut config = VmConfig::parse(file, &text)?;
        let beside = |path: &PathBuf| file.parent().unwrap_or(Path::new("/")).join(path);
        config.kernel = beside(&config.kernel);
        config.initramfs = config.initramfs.as_ref().map(beside);
        if let Serial::File(path) = &config.serial {
            config.serial = Serial::File(beside(path));
        }
        for disk in &mut config.disks {
            disk.path = beside(&disk.path);
        }
        Ok((config, text))
    }

    /// Validates the text of `file`.
    ///
    /// # Errors
    /// Every problem of the text, with its line.
    pub fn parse(file: &Path, text: &str) -> Result<VmConfig, ConfigError> {
        let problems = Problems::new(file, text);
        let table = problems.root();
        let config = table.as_ref().and_then(|table| read(Section::root(table, &problems)));
        drop(table);
        problems.finish(config)
    }
}

/// Name of the TAP device of NIC `index` of guest `id`: the VMM makes it, the agent announces through it.
#[must_use]
pub fn tap_name(id: VmId, index: usize) -> String {
    let text: String = id.to_string().chars().take(9).collect();
    format!("lim{text}.{index}")
}

/// What the agent tells a VMM of a network: its bridge, and behind a colon its VLAN there if it has one, as in "br0:100". No
/// interface has a colon in its name.
///
/// # Errors
/// What is behind the colon is no VLAN.
pub fn bridge_and_vlan(text: &str) -> Result<(&str, Option<u16>), String> {
    let Some((bridge, vlan)) = text.split_once(':') else { return Ok((text, None)) };
    match vlan.parse() {
        Ok(number @ 1..=4094) => Ok((bridge, Some(number))),
        _ => Err(format!("{text:?} has no VLAN behind the colon: it should be a number from 1 to 4094, as in \"br0:100\"")),
    }
}

fn read(mut root: Section<'_, '_>) -> Option<VmConfig> {
    let name = root.string("name");
    match &name {
        None => root.problem("name", "is missing", NAME_WANTS),
        Some(name) if !plain_name(name) => root.problem("name", format_args!("is {name:?}"), NAME_WANTS),
        Some(_) => {}
    }
    let kernel = root.string("kernel").map(PathBuf::from);
    if kernel.is_none() {
        root.problem("kernel", "is missing", "it should be the path of a PVH ELF or a bzImage");
    }
    let huge_pages = root.one_of("page_size", &["4K", "2M"]) == Some(1);
    let memory = root.size("memory");
    let granule = if huge_pages { 2 << 20 } else { 4096 };
    match memory {
        None => root.problem("memory", "is missing", "it should be a size such as \"2G\""),
        Some(bytes) if !(1 << 20..=16 << 40).contains(&bytes) || bytes % granule != 0 => {
            let wants = format!("it should be from 1M to 16T, a multiple of {granule} bytes");
            root.problem("memory", format_args!("is {bytes} bytes"), wants);
        }
        Some(_) => {}
    }
    let serial = root.string("serial").map_or(Serial::Stdout, |text| match text.as_str() {
        "stdout" => Serial::Stdout,
        "off" => Serial::Off,
        path => Serial::File(path.into()),
    });
    let thp = root.boolean("thp").unwrap_or(false);
    let populate = root.boolean("populate").unwrap_or(false);
    let vcpus = root.integer("vcpus", 1..=1024).and_then(|number| u32::try_from(number).ok()).unwrap_or(1);
    let cpu = read_cpu(&mut root);
    let initramfs = root.string("initramfs").map(PathBuf::from);
    let cmdline = root.string("cmdline").unwrap_or_default();
    if cmdline.len() > 2000 || cmdline.contains('\0') {
        root.problem("cmdline", format_args!("has {} bytes", cmdline.len()), "it should have at most 2000 bytes and no NUL");
    }
    let nics = read_nics(root.sections("nic"));
    let disks = read_disks(root.sections("disk"));
    let rng = root.boolean("rng").unwrap_or(true);
    let balloon = root.boolean("balloon").unwrap_or(true);
    root.close();
    Some(VmConfig {
        name: name?,
        memory: memory?,
        huge_pages,
        thp,
        populate,
        vcpus,
        cpu,
        kernel: kernel?,
        initramfs,
        cmdline,
        serial,
        nics,
        disks,
        rng,
        balloon,
    })
}

fn read_cpu(root: &mut Section<'_, '_>) -> CpuMode {
    const WANTS: &str = "\"host\", \"minimum\", \"baseline:x86-64-v1\" (to v4) or { common = [\"HOST\", …] } with names that `limosa host list` shows";
    if !root.is_table("cpu") {
        return root.parsed::<CpuMode>("cpu", WANTS).unwrap_or_default();
    }
    let Some(mut section) = root.section("cpu") else { return CpuMode::default() };
    let hosts = section.strings("common").unwrap_or_default();
    if hosts.is_empty() || hosts.len() > COMMON_HOSTS_MAX {
        section.problem("common", format_args!("has {} hosts", hosts.len()), format!("it should have 1 to {COMMON_HOSTS_MAX}"));
    }
    for bad in hosts.iter().filter(|name| !plain_name(name)) {
        section.problem("common", format_args!("has {bad:?}"), NAME_WANTS);
    }
    section.close();
    CpuMode::Common(hosts)
}

fn read_nics(sections: Vec<Section<'_, '_>>) -> Vec<NicConfig> {
    let mut nics: Vec<NicConfig> = Vec::new();
    for (index, mut section) in sections.into_iter().enumerate() {
        let mac = section.parsed::<Mac>("mac", "six bytes such as \"52:54:00:12:34:56\", not a group address");
        let network = section.string("network");
        if network.is_none() {
            section.problem("network", "is missing", "it should be the name of a network that the agent knows");
        }
        if mac.is_none() {
            section.problem("mac", "is missing or bad", "a NIC keeps its MAC for life: six bytes such as \"52:54:00:12:34:56\"");
        }
        if mac.as_ref().is_some_and(|mac| nics.iter().any(|nic| nic.mac == mac.0)) {
            section.problem("mac", "is used twice", "each NIC should have a MAC of its own");
        }
        if index >= 8 {
            section.problem("mac", "is on the ninth NIC", "a guest should have at most 8 NICs");
        }
        let wants = "an address such as \"10.0.0.5\" or \"fd00::5\"";
        let addresses = section.parsed_list::<IpAddr>("addresses", wants).unwrap_or_default();
        if addresses.len() > 16 {
            section.problem("addresses", format_args!("has {} addresses", addresses.len()), "at most 16 are announced");
        }
        let small = |number: u64| u16::try_from(number).ok();
        let vlan = section.integer("vlan", 1..=4094).and_then(small);
        let mtu = section.integer("mtu", 576..=65_535).and_then(small).unwrap_or(1500);
        let offload = section.boolean("offload").unwrap_or(true);
        section.close();
        if let (Some(mac), Some(network)) = (mac, network) {
            nics.push(NicConfig { mac: mac.0, network, addresses, vlan, mtu, offload });
        }
    }
    nics
}

fn read_disks(sections: Vec<Section<'_, '_>>) -> Vec<DiskConfig> {
    let mut disks: Vec<DiskConfig> = Vec::new();
    for (index, mut section) in sections.into_iter().enumerate() {
        let path = section.string("path").map(PathBuf::from);
        let wants = "it should be the path of an image, of at most 1024 characters";
        match &path {
            None => section.problem("path", "is missing", wants),
            // Room for the folder of the file, which relative paths are relative to.
            Some(path) if path.as_os_str().is_empty() || path.as_os_str().len() > PATH_BYTES_MAX => {
                section.problem("path", format_args!("has {} characters", path.as_os_str().len()), wants);
            }
            Some(path) if disks.iter().any(|disk| disk.path == *path) => {
                section.problem("path", "is used twice", "each disk should have an image of its own");
            }
            Some(_) => {}
        }
        let format = section.one_of("format", &["raw", "qcow2"]);
        let format = format.map(|index| if index == 0 { ImageFormat::Raw } else { ImageFormat::Qcow2 });
        let readonly = section.boolean("readonly").unwrap_or(false);
        let serial = section.string("serial").unwrap_or_default();
        if serial.len() > SERIAL_BYTES_MAX || serial.chars().any(char::is_control) {
            section.problem(
                "serial",
                format_args!("is {serial:?}"),
                "it should have at most 20 bytes, and no control characters",
            );
        }
        if index >= DISKS_MAX {
            section.problem("path", "is on the ninth disk", "a guest should have at most 8 disks");
        }
        section.close();
        disks.extend(path.map(|path| DiskConfig { path, format, readonly, serial, resolved: false }));
    }
    disks
}

/// A unicast MAC address as text.
struct Mac([u8; 6]);

impl std::str::FromStr for Mac {
    type Err = ();
    fn from_str(text: &str) -> Result<Mac, ()> {
        let mut mac = [0; 6];
        let mut parts = text.split([':', '-']);
        for byte in &mut mac {
            let part = parts.next().filter(|part| part.len() == 2).ok_or(())?;
            *byte = u8::from_str_radix(part, 16).map_err(|_| ())?;
        }
        let group = mac.first().is_some_and(|first| first & 1 == 1);
        if parts.next().is_some() || group || mac == [0; 6] { Err(()) } else { Ok(Mac(mac)) }
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    const GOOD: &str = "name = \"web\"\nmemory = \"256M\"\nvcpus = 2\nkernel = \"guest.elf\"\ncmdline = \"ip=10.0.0.5\"\n\
                        serial = \"web.serial\"\n[[disk]]\npath = \"web.qcow2\"\n[[disk]]\npath = \"/iso/cd\"\n\
                        format = \"raw\"\nreadonly = true\nserial = \"cd\"\n[[nic]]\nmac = \"52:54:00:00:00:05\"\nnetwork = \"lan\"\naddresses = [\"10.0.0.5\", \"fd00::5\"]\n";

    #[test]
    fn a_whole_file_is_read() {
        let config = VmConfig::parse(Path::new("web.toml"), GOOD).unwrap();
        assert_eq!((config.memory, config.vcpus, config.nics.len()), (256 << 20, 2, 1));
        assert_eq!(config.nics[0].mac, [0x52, 0x54, 0, 0, 0, 5]);
        assert_eq!(config.serial, Serial::File("web.serial".into()));
        let disk = |path: &str, format, readonly, serial: &str| DiskConfig {
            path: path.into(),
            format,
            readonly,
            serial: serial.into(),
            resolved: false,
        };
        assert_eq!(config.disks, [disk("web.qcow2", None, false, ""), disk("/iso/cd", Some(ImageFormat::Raw), true, "cd")]);
    }

    #[test]
    fn paths_are_relative_to_the_file() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("web.toml");
        std::fs::write(&file, GOOD).unwrap();
        let (config, text) = VmConfig::load(&file).unwrap();
        assert_eq!((config.kernel, text.as_str()), (dir.path().join("guest.elf"), GOOD));
        assert_eq!(config.disks[0].path, dir.path().join("web.qcow2"));
        assert_eq!(config.disks[1].path, Path::new("/iso/cd"));
    }

    #[test]
    fn the_cpu_is_a_word_or_a_list_of_hosts() {
        let read = |cpu: &str| {
            let text = format!("name = \"web\"\nmemory = \"1G\"\nkernel = \"k\"\n{cpu}\n");
            VmConfig::parse(Path::new("v.toml"), &text).map(|config| config.cpu)
        };
        assert_eq!(read("").unwrap(), CpuMode::Host);
        for mode in [
            CpuMode::Host,
            CpuMode::Minimum,
            CpuMode::Baseline(1),
            CpuMode::Baseline(4),
            CpuMode::Common(vec!["alpha".into(), "beta".into()]),
        ] {
            assert_eq!(read(&format!("cpu = {mode}")).unwrap(), mode, "{mode}");
        }
        for (bad, words) in [
            ("cpu = \"baseline:v9\"", "v.toml:4: cpu is \"baseline:v9\"; it should be \"host\""),
            ("cpu = { common = [] }", "cpu.common has 0 hosts"),
            ("cpu = { common = [\"a b\"] }", "cpu.common has \"a b\""),
            ("cpu = { comon = [\"a\"] }", "did you mean \"common\"?"),
            ("cpu = 3", "cpu is 3"),
        ] {
            let error = read(bad).unwrap_err().to_string();
            assert!(error.contains(words), "{words}\nis not in\n{error}");
        }
    }

    #[test]
    fn problems_are_named() {
        let text = "name = \"../x\"\nmemory = \"3\"\nvcpuz = 3\n[[nic]]\nmac = \"01:00:00:00:00:00\"\n[[disk]]\nformat = \"vmdk\"\n\
                    serial = \"aaaaaaaaaaaaaaaaaaaaa\"\n[[disk]]\npath = \"a\"\n[[disk]]\npath = \"a\"\n";
        let error = VmConfig::parse(Path::new("v.toml"), text).unwrap_err().to_string();
        for part in [
            "v.toml:1: name is",
            "v.toml:2: memory is 3 bytes",
            "v.toml:3: unknown key \"vcpuz\"; did you mean \"vcpus\"?",
            "v.toml:5: nic.mac is",
            "nic.network is missing",
            "kernel is missing",
            "v.toml:7: disk.format is \"vmdk\"; it should be \"raw\" or \"qcow2\"",
            "v.toml:8: disk.serial is",
            "disk.path is missing",
            "v.toml:12: disk.path is used twice",
        ] {
            assert!(error.contains(part), "{part}\nis not in\n{error}");
        }
    }
}
