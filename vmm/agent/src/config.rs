//! The agent's configuration: what may be set, its defaults, and the reading of the file.
//! How TOML is read and how problems are shown is in `checked`; the guest's own file is in `vm_config`.

use crate::checked::{ConfigError, Problems, Section, read_text};
use crate::operators::{self, Operator};
use crate::tickets;
use limosa_link::choose::{LinkKind, Wanted};
use limosa_link::pages::Populate;
use limosa_link::quic::{Congestion, QuicSettings};
use limosa_proto::allow::AllowList;
use limosa_proto::cpu;
use limosa_proto::here::HereList;
use limosa_proto::identity::FleetId;
use limosa_proto::precopy::NoConvergence;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::path::{Path, PathBuf};
use std::time::Duration;

/// Where the configuration is when no other file is named.
pub const DEFAULT_FILE: &str = "/etc/limosa/agent.toml";
/// The agent's port, for kilometres flown.
pub const DEFAULT_PORT: u16 = 13_560;
/// Where sockets are when no other directory is named.
pub const DEFAULT_RUN_DIR: &str = "/run/limosa";
/// Where keys, journal and jobs are when no other directory is named.
pub const DEFAULT_STATE_DIR: &str = "/var/lib/limosa";

/// A network that guests on this host may be on.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Network {
    /// The name that VM configurations use; the same on every host.
    pub name: String,
    /// The bridge of this host that it is reached through.
    pub bridge: String,
    /// The VLAN of the bridge that its guests are in, if any.
    pub vlan: Option<u16>,
    /// Whether guests' addresses are learned from what they say on it.
    pub learn: bool,
    /// Largest packet in bytes, without the Ethernet header.
    pub mtu: u16,
}

/// How guests are moved, unless a command says otherwise.
#[derive(Debug, Clone)]
pub struct Migration {
    /// The pause that pre-copy aims at.
    pub downtime_target: Duration,
    /// The longest pause that is accepted.
    pub downtime_max: Duration,
    /// What happens when the guest dirties memory faster than it can be sent.
    pub on_no_convergence: NoConvergence,
    /// Which link an outgoing migration goes over.
    pub link: Wanted,
    /// Whether pages are checked by a keyed hash on links without encryption.
    pub page_check: bool,
    /// Lanes of an outgoing migration; none: chosen from the machine.
    pub lanes: Option<u16>,
    /// Whether guest memory may cross the network in plain text.
    pub plaintext_lanes: bool,
    /// Most bytes a second of an outgoing migration; 0: no limit.
    pub bandwidth: u64,
    /// When an incoming guest's memory is populated.
    pub populate: Populate,
    /// Waits between the announcement rounds that follow the first.
    pub announce_schedule: Vec<Duration>,
    /// How often each side says that it is alive.
    pub keepalive: Duration,
    /// How long the other side may be silent.
    pub silence_max: Duration,
    /// How long a guest that is ready here waits for its source's word before it is discarded.
    pub ready_max: Duration,
    /// Most incoming migrations at once.
    pub incoming_max: usize,
    /// Most outgoing migrations at once.
    pub outgoing_max: usize,
}

/// The QUIC link of this host.
#[derive(Debug, Clone)]
pub struct Quic {
    /// Whether guests may come and go over it.
    pub enabled: bool,
    /// How.
    pub settings: QuicSettings,
}

/// The RDMA link of this host.
#[derive(Debug, Clone)]
pub struct Rdma {
    /// Whether guests may come and go over it, where there is a device.
    pub enabled: bool,
    /// Networks whose hosts and switches may see guest memory in passing; none: no RDMA.
    pub trusted_fabric: AllowList,
    /// Whether guest memory is left unpinned where the device can do with that.
    pub on_demand: bool,
}

/// Storage that this host shares with others.
#[derive(Debug, Clone, Default)]
pub struct Storage {
    /// Folders in which images of guests that come from other hosts may lie; none: only guests without disks come.
    pub shared: Vec<PathBuf>,
    /// Whether guests come although this host does not see the locks that others have on images, as on a file system whose
    /// locks hold on each host for itself.
    pub local_locks: bool,
}

/// The CPU of this host, as far as guests may have it.
#[derive(Debug, Clone, Default)]
pub struct Cpu {
    /// Features that are kept back, by their names in /proc/cpuinfo.
    pub hide: Vec<String>,
    /// Most vCPUs of one guest; none: as many as KVM can.
    pub vcpus_max: Option<u32>,
}

/// Who vouches for hosts, beside those that a person has named.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct TrustConfig {
    /// The fleet's key; none: nobody.
    pub fleet: Option<FleetId>,
    /// The file with its statements, one a line; none: there are none.
    pub statements: Option<PathBuf>,
}

/// The whole configuration, validated.
#[derive(Debug, Clone)]
pub struct Config {
    /// This host's name, as shown to people.
    pub name: String,
    /// Where other hosts' agents reach this one.
    pub listen: Vec<SocketAddr>,
    /// Keys, journal, jobs, logs of guests.
    pub state_dir: PathBuf,
    /// Sockets.
    pub run_dir: PathBuf,
    /// The file it was read from; none: the default one.
    pub file: Option<PathBuf>,
    /// Which addresses may connect.
    pub allow: AllowList,
    /// Which addresses of this host take migrations.
    pub here: HereList,
    /// Who vouches for hosts.
    pub trust: TrustConfig,
    /// Names in rules that could not be looked up, in words.
    pub unresolved: Vec<String>,
    /// Networks by name.
    pub networks: Vec<Network>,
    /// How guests are moved.
    pub migration: Migration,
    /// Over QUIC.
    pub quic: Quic,
    /// Over RDMA.
    pub rdma: Rdma,
    /// Where images of incoming guests may lie.
    pub storage: Storage,
    /// The CPU that guests may have.
    pub cpu: Cpu,
    /// Whose commands from other machines are obeyed, and whose tickets count.
    pub operators: Vec<Operator>,
    /// How tickets are asked for.
    pub tickets: tickets::Settings,
    /// Where metrics are served; none: nowhere.
    pub metrics: Option<SocketAddr>,
    /// The program that runs a guest, with its first arguments; empty: `limosa vmm` of this very binary.
    pub vmm_command: Vec<String>,
    /// What is odd, but no error.
    pub warnings: Vec<String>,
}

impl Default for Migration {
    fn default() -> Migration {
        let ms = Duration::from_millis;
        Migration {
            downtime_target: ms(50),
            downtime_max: ms(2000),
            on_no_convergence: NoConvergence::LongerDowntime,
            link: Wanted::Auto,
            page_check: true,
            lanes: None,
            plaintext_lanes: false,
            bandwidth: 0,
            populate: Populate::Beside,
            announce_schedule: [50, 150, 250, 350, 450].map(ms).to_vec(),
            keepalive: ms(2000),
            silence_max: ms(10_000),
            ready_max: ms(30_000),
            incoming_max: 2,
            outgoing_max: 2,
        }
    }
}

impl Default for Quic {
    fn default() -> Quic {
        Quic { enabled: true, settings: QuicSettings::default() }
    }
}

impl Default for Rdma {
    fn default() -> Rdma {
        Rdma { enabled: true, trusted_fabric: AllowList::default(), on_demand: false }
    }
}

impl Default for Config {
    fn default() -> Config {
        Config {
            name: host_name(),
            listen: vec![SocketAddr::new(IpAddr::V4(Ipv4Addr::UNSPECIFIED), DEFAULT_PORT)],
            state_dir: DEFAULT_STATE_DIR.into(),
            run_dir: DEFAULT_RUN_DIR.into(),
            file: None,
            allow: AllowList::default(),
            here: HereList::default(),
            trust: TrustConfig::default(),
            unresolved: Vec::new(),
            networks: Vec::new(),
            migration: Migration::default(),
            quic: Quic::default(),
            rdma: Rdma::default(),
            storage: Storage::default(),
            cpu: Cpu::default(),
            operators: Vec::new(),
            tickets: tickets::Settings::default(),
            metrics: None,
            vmm_command: Vec::new(),
            warnings: Vec::new(),
        }
    }
}

impl Config {
    /// Reads and validates `file`. Without a file the default one is read, and if that is absent the defaults hold:
    /// an agent that accepts nobody.
    ///
    /// # Errors
    /// Every problem of the file, with its line.
    pub fn load(file: Option<&Path>) -> Result<Config, ConfigError> {
        let default = Path::new(DEFAULT_FILE);
        if file.is_none() && !default.exists() {
            return Ok(Config::default());
        }
        let given = file.map(Path::to_path_buf);
        let file = file.unwrap_or(default);
        Config::parse(file, &read_text(file)?).map(|config| Config { file: given, ..config })
    }

    /// Validates the text of `file`.
    ///
    /// # Errors
    /// Every problem of the text, with its line.
    pub fn parse(file: &Path, text: &str) -> Result<Config, ConfigError> {
        let problems = Problems::new(file, text);
        let table = problems.root();
        let config = table.as_ref().map(|table| {
            let mut root = Section::root(table, &problems);
            let mut config = Config::default();
            if let Some(section) = root.section("agent") {
                config.read_agent(section);
            }
            if let Some(section) = root.section("allow") {
                config.read_allow(section);
            }
            if let Some(mut section) = root.section("trust") {
                config.trust.fleet = section.parsed("fleet", "what `limosa fleet id` prints");
                config.trust.statements = section.string("statements").map(PathBuf::from);
                section.close();
            }
            config.read_networks(root.sections("network"));
            if let Some(section) = root.section("migration") {
                config.migration.read(section);
            }
            if let Some(section) = root.section("quic") {
                config.quic.read(section);
            }
            if let Some(section) = root.section("rdma") {
                config.read_rdma(section);
            }
            if let Some(section) = root.section("storage") {
                config.storage.read(section);
            }
            if let Some(section) = root.section("cpu") {
                config.cpu.read(section);
            }
            config.operators = operators::read(root.sections("operator"));
            if let Some(section) = root.section("tickets") {
                let warning = config.tickets.read(section);
                config.warnings.extend(warning);
            }
            if let Some(section) = root.section("metrics") {
                config.metrics = crate::metrics::read(section, &mut config.warnings);
            }
            if let Some(mut section) = root.section("vmm") {
                config.vmm_command = section.strings("command").unwrap_or_default();
                section.close();
            }
            root.close();
            config
        });
        drop(table);
        problems.finish(config)
    }

    /// The network called `name`.
    #[must_use]
    pub fn network(&self, name: &str) -> Option<&Network> {
        self.networks.iter().find(|network| network.name == name)
    }

    /// Names of networks and their bridges, as the plug wants them: "br0", or "br0:100" in VLAN 100.
    #[must_use]
    pub fn bridges(&self) -> Vec<(String, String)> {
        let vlan = |network: &Network| network.vlan.map_or(String::new(), |vlan| format!(":{vlan}"));
        self.networks.iter().map(|network| (network.name.clone(), format!("{}{}", network.bridge, vlan(network)))).collect()
    }

    /// The socket that commands talk to.
    #[must_use]
    pub fn api_socket(&self) -> PathBuf {
        self.run_dir.join("api.sock")
    }

    /// The socket that VMMs plug into.
    #[must_use]
    pub fn plug_socket(&self) -> PathBuf {
        self.run_dir.join("plug.sock")
    }

    /// The socket of the serial line of the guest called `name`. Short, because a socket's path must be.
    #[must_use]
    pub fn console_socket(&self, name: &str) -> PathBuf {
        self.run_dir.join(format!("c-{:08x}", crc32fast::hash(name.as_bytes())))
    }

    fn read_agent(&mut self, mut section: Section<'_, '_>) {
        if let Some(name) = section.string("name") {
            if !plain_name(&name) {
                section.problem("name", format_args!("is {name:?}"), NAME_WANTS);
            }
            self.name = name;
        }
        let wants = "addresses with a port, such as \"0.0.0.0:13560\" or \"[::]:13560\"";
        if let Some(listen) = section.parsed_list("listen", wants) {
            if listen.is_empty() {
                section.problem("listen", "is empty", "at least one address with a port is needed");
            }
            self.listen = listen;
        }
        for (key, slot) in [("state_dir", &mut self.state_dir), ("run_dir", &mut self.run_dir)] {
            let Some(path) = section.string(key).map(PathBuf::from) else { continue };
            if !path.is_absolute() {
                section.problem(key, format_args!("is {}", path.display()), "it should be an absolute path");
            }
            // sun_path holds 107 characters and "/plug.sock" is one of the names in it.
            if key == "run_dir" && path.as_os_str().len() > 90 {
                section.problem(key, "is too long for a socket's path", "it should have at most 90 characters");
            }
            *slot = path;
        }
        section.close();
    }

    fn read_rdma(&mut self, mut section: Section<'_, '_>) {
        self.rdma.enabled = section.boolean("enabled").unwrap_or(self.rdma.enabled);
        self.rdma.trusted_fabric = self.networks_of(&mut section, "trusted_fabric").unwrap_or_default();
        self.rdma.on_demand = section.boolean("on_demand").unwrap_or(self.rdma.on_demand);
        section.close();
    }

    /// A list of networks; every text that is none is a problem.
    fn networks_of(&mut self, section: &mut Section<'_, '_>, key: &'static str) -> Option<AllowList> {
        let texts = section.strings(key)?;
        let mut good = Vec::new();
        for text in &texts {
            match AllowList::new(&[text]) {
                Ok((_, warnings)) => {
                    self.warnings.extend(warnings);
                    good.push(text.clone());
                }
                Err(_) => {
                    let wants = "it should be an address or ADDRESS/PREFIX, such as \"10.0.0.0/24\" or \"fd00::/64\"";
                    section.problem(key, format_args!("has {text:?}"), wants);
                }
            }
        }
        AllowList::new(&good).ok().map(|(list, _)| list)
    }

    fn read_networks(&mut self, sections: Vec<Section<'_, '_>>) {
        for mut section in sections {
            let name = section.string("name");
            let bridge = section.string("bridge");
            let vlan = section.integer("vlan", 1..=4094).and_then(|vlan| u16::try_from(vlan).ok());
            let mtu = section.integer("mtu", 576..=65_535).and_then(|mtu| u16::try_from(mtu).ok()).unwrap_or(1500);
            let learn = section.boolean("learn").unwrap_or(true);
            if name.is_none() {
                section.problem("name", "is missing", "each [[network]] needs a name");
            }
            if bridge.is_none() {
                section.problem("bridge", "is missing", "each [[network]] needs the name of a bridge on this host");
            }
            if let Some(bridge) = bridge.as_ref().filter(|bridge| !interface_name(bridge)) {
                section.problem("bridge", format_args!("is {bridge:?}"), "it should be an interface name of 1 to 15 characters");
            }
            if let Some(name) = name.as_ref().filter(|name| !plain_name(name)) {
                section.problem("name", format_args!("is {name:?}"), NAME_WANTS);
            }
            if let Some(twice) = name.as_ref().filter(|name| self.network(name).is_some()) {
                section.problem(
                    "name",
                    format_args!("is {twice:?} for the second time"),
                    "each network should have a name of its own",
                );
            }
            section.close();
            if let (Some(name), Some(bridge)) = (name, bridge) {
                self.networks.push(Network { name, bridge, vlan, learn, mtu });
            }
        }
    }
}

impl Migration {
    fn read(&mut self, mut section: Section<'_, '_>) {
        let ms = Duration::from_millis;
        let durations: [(&'static str, std::ops::RangeInclusive<u64>, &mut Duration); 5] = [
            ("downtime_target_ms", 1..=60_000, &mut self.downtime_target),
            ("downtime_max_ms", 1..=600_000, &mut self.downtime_max),
            ("keepalive_ms", 50..=60_000, &mut self.keepalive),
            ("silence_max_ms", 200..=600_000, &mut self.silence_max),
            ("ready_ms_max", 100..=3_600_000, &mut self.ready_max),
        ];
        for (key, range, slot) in durations {
            *slot = section.integer(key, range).map_or(*slot, ms);
        }
        if self.downtime_target > self.downtime_max {
            section.problem("downtime_max_ms", "is less than downtime_target_ms", "it should be at least as long");
        }
        if self.silence_max < self.keepalive * 2 {
            section.problem("silence_max_ms", "is less than twice keepalive_ms", "a peer should be able to miss one keepalive");
        }
        if let Some(index) = section.one_of("on_no_convergence", &["longer-downtime", "abort"]) {
            self.on_no_convergence = if index == 0 { NoConvergence::LongerDowntime } else { NoConvergence::Abort };
        }
        if let Some(index) = section.one_of("populate", &["before", "beside", "no"]) {
            let all = [Populate::Before, Populate::Beside, Populate::No];
            self.populate = all.get(index).copied().unwrap_or(self.populate);
        }
        let links = [Wanted::Auto, Wanted::Only(LinkKind::Tcp), Wanted::Only(LinkKind::Quic), Wanted::Only(LinkKind::Rdma)];
        if let Some(index) = section.one_of("link", &["auto", "tcp", "quic", "rdma"]) {
            self.link = links.get(index).copied().unwrap_or(self.link);
        }
        self.page_check = section.boolean("page_check").unwrap_or(self.page_check);
        self.lanes = section.integer("lanes", 1..=16).and_then(|lanes| u16::try_from(lanes).ok());
        self.plaintext_lanes = section.boolean("plaintext_lanes").unwrap_or(self.plaintext_lanes);
        self.bandwidth = section.size("bandwidth").unwrap_or(self.bandwidth);
        for (key, slot) in [("incoming_max", &mut self.incoming_max), ("outgoing_max", &mut self.outgoing_max)] {
            *slot = section.integer(key, 0..=64).and_then(|most| usize::try_from(most).ok()).unwrap_or(*slot);
        }
        if let Some(list) = section.integers("announce_schedule_ms", 1..=10_000) {
            if list.len() > 32 {
                section.problem("announce_schedule_ms", format_args!("has {} rounds", list.len()), "at most 32 are sent");
            }
            self.announce_schedule = list.into_iter().map(ms).collect();
        }
        section.close();
    }
}

impl Storage {
    fn read(&mut self, mut section: Section<'_, '_>) {
        self.shared = section.strings("shared").unwrap_or_default().into_iter().map(PathBuf::from).collect();
        if let Some(path) = self.shared.iter().find(|path| !path.is_absolute() || path.parent().is_none()) {
            let wants = "each should be the absolute path of a folder that other hosts have too, such as \"/srv/vm\"";
            section.problem("shared", format_args!("has {path:?}"), wants);
        }
        self.local_locks = section.boolean("local_locks").unwrap_or(self.local_locks);
        section.close();
    }
}

impl Quic {
    fn read(&mut self, mut section: Section<'_, '_>) {
        let settings = &mut self.settings;
        self.enabled = section.boolean("enabled").unwrap_or(self.enabled);
        settings.address_change = section.boolean("address_change").unwrap_or(settings.address_change);
        if let Some(index) = section.one_of("congestion", &["cubic", "bbr", "newreno"]) {
            let all = [Congestion::Cubic, Congestion::Bbr, Congestion::NewReno];
            settings.congestion = all.get(index).copied().unwrap_or(settings.congestion);
        }
        let small = |number: Option<u64>| number.and_then(|number| u16::try_from(number).ok());
        settings.connections = small(section.integer("connections", 1..=16)).unwrap_or(settings.connections);
        settings.mtu_max = small(section.integer("mtu_max", 1200..=16_000)).unwrap_or(settings.mtu_max);
        section.close();
    }
}

impl Cpu {
    fn read(&mut self, mut section: Section<'_, '_>) {
        self.hide = section.strings("hide").unwrap_or_default();
        for name in &self.hide {
            if cpu::features_named(name).next().is_none() {
                section.problem(
                    "hide",
                    format_args!("has {name:?}"),
                    "each should be a CPU feature as /proc/cpuinfo calls it, such as \"avx512f\"",
                );
            } else if cpu::is_needed_by_every_guest(name) {
                section.problem("hide", format_args!("has {name:?}"), "no guest boots without it");
            }
        }
        self.vcpus_max = section.integer("vcpus_max", 1..=4096).and_then(|most| u32::try_from(most).ok());
        section.close();
    }
}

/// What a name should be.
pub(crate) const NAME_WANTS: &str = "it should be 1 to 63 letters, digits, '-', '_' or '.', beginning with a letter or digit";

/// Whether `name` may name a host, a guest or a network: it is used in file names and shown to people.
#[must_use]
pub(crate) fn plain_name(name: &str) -> bool {
    let fine = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.');
    (1..=63).contains(&name.len()) && name.chars().all(fine) && name.starts_with(|c: char| c.is_ascii_alphanumeric())
}

/// Whether `name` may name a network interface.
fn interface_name(name: &str) -> bool {
    (1..=15).contains(&name.len()) && !name.contains(|c: char| c.is_whitespace() || matches!(c, '/' | ':') || c.is_control())
}

fn host_name() -> String {
    let name = std::fs::read_to_string("/proc/sys/kernel/hostname").ok().map(|name| name.trim().to_string());
    name.filter(|name| plain_name(name)).unwrap_or_else(|| "this-host".into())
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    fn parse(text: &str) -> Result<Config, ConfigError> {
        Config::parse(Path::new("agent.toml"), text)
    }

    #[test]
    fn the_example_is_valid() {
        let config = parse(include_str!("../../../packaging/limosa.example.toml")).unwrap();
        assert_eq!(config.networks.len(), 1);
        assert_eq!(config.migration.downtime_target, Duration::from_millis(50));
    }

    #[test]
    fn networks_have_a_bridge_and_perhaps_a_vlan() {
        let text = "[[network]]\nname = \"lan\"\nbridge = \"br0\"\nvlan = 100\nlearn = false\n[[network]]\nname = \"wan\"\nbridge = \"br1\"\n";
        let config = parse(text).unwrap();
        let pair = |network: &str, bridge: &str| (network.to_owned(), bridge.to_owned());
        assert_eq!(config.bridges(), [pair("lan", "br0:100"), pair("wan", "br1")]);
        assert_eq!(config.networks.iter().map(|network| network.learn).collect::<Vec<_>>(), [false, true]);
        let error = parse("[[network]]\nname = \"lan\"\nbridge = \"br0:100\"\n").unwrap_err().to_string();
        assert!(error.contains("network.bridge is \"br0:100\""), "a VLAN has a key of its own: {error}");
    }

    #[test]
    fn every_problem_is_named_with_its_line() {
        let text = "[agent]\nlisten = [\"nowhere\"]\nnmae = \"x\"\n\n[migration]\nlanes = 40\ndowntime_target_ms = \"fast\"\n\
                    on_no_convergence = \"hope\"\n[allow]\npeers = [\"10.0.0.0/99\"]\n[[network]]\nname = \"lan\"\n";
        let error = parse(text).unwrap_err().to_string();
        for part in [
            "agent.toml:2: agent.listen has \"nowhere\"; it should be addresses with a port",
            "agent.toml:3: unknown key \"agent.nmae\"; did you mean \"name\"?",
            "agent.toml:6: migration.lanes is 40; it should be a whole number from 1 to 16",
            "agent.toml:7: migration.downtime_target_ms is \"fast\"",
            "agent.toml:8: migration.on_no_convergence is \"hope\"; it should be \"longer-downtime\" or \"abort\"",
            "agent.toml:10: allow.peers has \"10.0.0.0/99\"",
            "agent.toml:11: network.bridge is missing",
        ] {
            assert!(error.contains(part), "{part}\nis not in\n{error}");
        }
        assert_eq!(error.lines().count(), 7, "{error}");
    }

    #[test]
    fn links_are_set_and_checked() {
        let text = "[migration]\nlink = \"rdma\"\npage_check = false\n[quic]\nenabled = false\ncongestion = \"bbr\"\nconnections = 4\n\
                    [rdma]\ntrusted_fabric = [\"10.77.0.0/24\"]\non_demand = true\n";
        let config = parse(text).unwrap();
        assert_eq!((config.migration.link, config.migration.page_check), (Wanted::Only(LinkKind::Rdma), false));
        assert_eq!((config.quic.enabled, config.quic.settings.congestion), (false, Congestion::Bbr));
        assert!(config.rdma.on_demand && config.rdma.trusted_fabric.decide("10.77.0.9".parse().unwrap()).allowed);
        let usual = parse("").unwrap();
        assert_eq!((usual.migration.link, usual.migration.page_check, usual.quic.enabled), (Wanted::Auto, true, true));
        assert!(usual.rdma.trusted_fabric.networks().is_empty(), "no fabric is trusted unless somebody says so");
        let text = "[migration]\nlink = \"pigeon\"\n[quic]\nenable = true\nconnections = 17\n[rdma]\ntrusted_fabric = [\"all\"]\n\
                    trust = []\n";
        let error = parse(text).unwrap_err().to_string();
        for part in [
            "agent.toml:2: migration.link is \"pigeon\"; it should be \"auto\" or \"tcp\" or \"quic\" or \"rdma\"",
            "agent.toml:4: unknown key \"quic.enable\"; did you mean \"enabled\"?",
            "agent.toml:5: quic.connections is 17",
            "agent.toml:7: rdma.trusted_fabric has \"all\"",
            "agent.toml:8: unknown key \"rdma.trust\"",
        ] {
            assert!(error.contains(part), "{part}\nis not in\n{error}");
        }
        assert_eq!(error.lines().count(), 5, "{error}");
    }

    #[test]
    fn features_are_kept_back_by_name() {
        let config = parse("[cpu]\nhide = [\"avx2\", \"pku\"]\nvcpus_max = 8\n").unwrap();
        assert_eq!((config.cpu.hide.len(), config.cpu.vcpus_max), (2, Some(8)));
        let error = parse("[cpu]\nhide = [\"avx3\", \"lm\"]\nvcpus = 3\n").unwrap_err().to_string();
        for part in
            ["agent.toml:2: cpu.hide has \"avx3\"", "has \"lm\"; no guest boots without it", "3: unknown key \"cpu.vcpus\""]
        {
            assert!(error.contains(part), "{part}\nis not in\n{error}");
        }
    }

    #[test]
    fn broken_toml_has_a_line() {
        let error = parse("[agent]\nname = \n").unwrap_err();
        assert_eq!(error.problems.first().unwrap().line, 2, "{error}");
    }

    #[test]
    fn rules_between_keys_hold() {
        let error = parse("[migration]\ndowntime_target_ms = 5000\n").unwrap_err().to_string();
        assert!(error.contains("downtime_max_ms is less than downtime_target_ms"), "{error}");
        let error = parse("[[network]]\nname=\"a\"\nbridge=\"b\"\n[[network]]\nname=\"a\"\nbridge=\"this-is-far-too-long\"\n")
            .unwrap_err();
        assert_eq!(error.problems.len(), 2, "{error}");
    }

    #[test]
    fn nothing_is_allowed_by_default() {
        let config = parse("").unwrap();
        assert!(!config.allow.decide("10.0.0.1".parse().unwrap()).allowed);
    }
}
