//! The demo's two hosts: network namespaces, a switch between them, an agent in each; and their end.
//! Everything has the demo's process id in its name, is known here before it exists, and is gone after
//! [`Lab::clean`], which may run at any time and more than once. What is tried in the lab is not its business.

use limosa_agent::api::{ApiError, Exchange, HostInfo, Request};
use limosa_agent::operator::OperatorKey;
use std::fs;
use std::io;
use std::net::Ipv4Addr;
use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// Network of the demo; nothing of it leaves its namespaces.
pub(crate) const SWITCH_ADDRESS: Ipv4Addr = Ipv4Addr::new(10, 13, 56, 254);
/// Where the agents listen.
const PORT: u16 = limosa_agent::config::DEFAULT_PORT;

/// One of the two hosts.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Host {
    Alpha,
    Beta,
}

impl Host {
    pub(crate) const BOTH: [Host; 2] = [Host::Alpha, Host::Beta];

    pub(crate) fn name(self) -> &'static str {
        match self {
            Host::Alpha => "alpha",
            Host::Beta => "beta",
        }
    }

    fn letter(self) -> char {
        if self == Host::Alpha { 'a' } else { 'b' }
    }

    fn address(self) -> Ipv4Addr {
        Ipv4Addr::new(10, 13, 56, if self == Host::Alpha { 1 } else { 2 })
    }

    /// The port of the switch that the host is plugged into.
    pub(crate) fn switch_port(self) -> String {
        format!("to-{}", self.name())
    }
}

/// The lab; clones are the same one.
#[derive(Clone)]
pub(crate) struct Lab {
    directory: PathBuf,
    prefix: String,
    inner: Arc<Mutex<Inner>>,
}

#[derive(Default)]
struct Inner {
    closed: bool,
    namespaces: Vec<String>,
    agents: Vec<(Host, Child)>,
}

impl Lab {
    /// A lab of which nothing exists yet except its directory.
    pub(crate) fn new() -> io::Result<Lab> {
        let prefix = format!("limosa-demo-{}", std::process::id());
        let base = if Path::new("/run").is_dir() { PathBuf::from("/run") } else { std::env::temp_dir() };
        let directory = base.join(&prefix);
        fs::create_dir(&directory).map_err(|e| said(&format!("making {}", directory.display()), &e))?;
        Ok(Lab { directory, prefix, inner: Arc::default() })
    }

    /// Where everything of the demo lies.
    pub(crate) fn directory(&self) -> &Path {
        &self.directory
    }

    /// Name of the switch's namespace.
    pub(crate) fn switch(&self) -> String {
        format!("{}-s", self.prefix)
    }

    fn namespace(&self, host: Host) -> String {
        format!("{}-{}", self.prefix, host.letter())
    }

    /// A host's API socket.
    pub(crate) fn api(&self, host: Host) -> PathBuf {
        self.directory.join(host.name()).join("api.sock")
    }

    /// A host's state directory.
    pub(crate) fn state(&self, host: Host) -> PathBuf {
        self.directory.join(host.name()).join("state")
    }

    /// The key of the demo's operator, which signs the ticket for the move.
    pub(crate) fn operator(&self) -> Result<OperatorKey, ApiError> {
        let key = OperatorKey::open(&self.directory.join("operator.key"));
        key.map_err(|e| ApiError::refused("operator-key", e.to_string()))
    }

    fn log(&self, host: Host) -> PathBuf {
        self.directory.join(format!("{}.log", host.name()))
    }

    /// Makes the namespaces, the switch and the cables.
    pub(crate) fn build_network(&self) -> io::Result<()> {
        let switch = self.switch();
        for name in [switch.clone(), self.namespace(Host::Alpha), self.namespace(Host::Beta)] {
            self.open()?.namespaces.push(name.clone());
            self.ip(&["netns", "add", &name])?;
            self.ip(&["-n", &name, "link", "set", "lo", "up"])?;
        }
        self.bridge(&switch, "switch", SWITCH_ADDRESS)?;
        for host in Host::BOTH {
            let (name, port) = (self.namespace(host), host.switch_port());
            self.bridge(&name, "br0", host.address())?;
            self.ip(&["link", "add", "uplink", "netns", &name, "type", "veth", "peer", "name", &port, "netns", &switch])?;
            self.ip(&["-n", &name, "link", "set", "uplink", "master", "br0", "up"])?;
            self.ip(&["-n", &switch, "link", "set", &port, "master", "switch", "up"])?;
        }
        Ok(())
    }

    fn bridge(&self, namespace: &str, name: &str, address: Ipv4Addr) -> io::Result<()> {
        // Without forward_delay 0 a port forwards nothing for its first seconds.
        // An address of its own: else it takes that of its lowest port, and changes it when ports come and go.
        let mac = format!("02:00:00:13:56:{:02x}", address.octets()[3]);
        let words =
            ["-n", namespace, "link", "add", name, "address", &mac, "type", "bridge", "stp_state", "0", "forward_delay", "0"];
        self.ip(&words)?;
        self.ip(&["-n", namespace, "address", "add", &format!("{address}/24"), "dev", name])?;
        self.ip(&["-n", namespace, "link", "set", name, "up"])
    }

    /// Starts an agent on each host and makes them trust each other.
    pub(crate) fn start_agents(&self, extra: &str) -> io::Result<()> {
        let mut ids = Vec::new();
        for host in Host::BOTH {
            self.start_agent(host, extra)?;
        }
        for host in Host::BOTH {
            ids.push((host, self.wait_for_agent(host)?));
        }
        for (host, id) in &ids {
            for other in Host::BOTH.into_iter().filter(|other| other != host) {
                let address = format!("{}:{PORT}", host.address());
                let info = HostInfo { name: host.name().into(), id: id.clone(), address };
                let done =
                    Exchange::ask(&self.api(other), &Request::HostTrust(info)).and_then(|exchange| exchange.finish(|_| {}));
                done.map_err(io::Error::other)?;
            }
        }
        Ok(())
    }

    fn start_agent(&self, host: Host, extra: &str) -> io::Result<()> {
        let directory = self.directory.join(host.name());
        fs::create_dir_all(directory.join("state"))?;
        let file = directory.join("agent.toml");
        let text = format!(
            "[agent]\nname = \"{name}\"\nlisten = [\"{address}:{PORT}\"]\nstate_dir = \"{own}/state\"\nrun_dir = \"{own}\"\n\
             [allow]\npeers = [\"10.13.56.0/24\"]\n[[network]]\nname = \"lan\"\nbridge = \"br0\"\n\
             [[operator]]\nname = \"demo\"\nkey = \"{operator}\"\nvms = [\"*\"]\nactions = [\"migrate\"]\n[migration]\n{extra}",
            operator = self.operator().map_err(io::Error::other)?.id(),
            name = host.name(),
            address = host.address(),
            own = directory.display(),
        );
        fs::write(&file, text)?;
        let log = fs::File::create(self.log(host))?;
        let mut command = Command::new("ip");
        command.args(["netns", "exec", &self.namespace(host)]).arg(std::env::current_exe()?);
        command.arg("agent").arg("--config").arg(&file);
        // A group of its own, or Ctrl-C on the terminal would reach it before the demo has cleaned up.
        command.stdin(Stdio::null()).stdout(log.try_clone()?).stderr(log).process_group(0);
        let mut inner = self.open()?;
        let child = command.spawn().map_err(|e| said("starting an agent", &e))?;
        inner.agents.push((host, child));
        Ok(())
    }

    /// Waits until a host's agent answers; gives the host's id.
    fn wait_for_agent(&self, host: Host) -> io::Result<String> {
        let until = Instant::now() + Duration::from_secs(15);
        loop {
            let answer = Exchange::ask(&self.api(host), &Request::HostId).and_then(|exchange| exchange.finish(|_| {}));
            if let Ok(limosa_agent::api::Answer::Host(info)) = answer {
                return Ok(info.id);
            }
            let ended = self
                .open()?
                .agents
                .iter_mut()
                .find(|(which, _)| *which == host)
                .and_then(|(_, child)| child.try_wait().ok().flatten());
            if ended.is_some() || Instant::now() > until {
                let log = fs::read_to_string(self.log(host)).unwrap_or_default();
                let tail = log.lines().rev().take(5).collect::<Vec<_>>();
                let tail = tail.into_iter().rev().collect::<Vec<_>>().join("\n");
                return Err(io::Error::other(format!("the agent of {} did not come up:\n{tail}", host.name())));
            }
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    /// Last lines of a host's log, for when something went wrong.
    pub(crate) fn log_tail(&self, host: Host) -> String {
        let log = fs::read_to_string(self.log(host)).unwrap_or_default();
        let lines: Vec<&str> = log.lines().collect();
        lines.get(lines.len().saturating_sub(8)..).unwrap_or_default().join("\n")
    }

    /// On which port of the switch `mac` is.
    pub(crate) fn switch_port_of(&self, mac: &str) -> Option<String> {
        let output = Command::new("bridge").args(["-n", &self.switch(), "-j", "fdb", "show", "br", "switch"]).output().ok()?;
        port_of(&output.stdout, mac)
    }

    /// Takes everything down. What is gone already is no error.
    pub(crate) fn clean(&self, keep_directory: bool) {
        let mut inner = self.inner.lock().unwrap_or_else(PoisonError::into_inner);
        inner.closed = true;
        for (_, child) in &mut inner.agents {
            signal(child.id(), nix::sys::signal::Signal::SIGTERM);
        }
        for (_, child) in &mut inner.agents {
            end(child);
        }
        inner.agents.clear();
        // Guests outlive their agents; these are ours, since their command line names our directory.
        let mine = format!("{}/", self.directory.display());
        for _ in 0..100 {
            let left = processes_naming(&mine);
            left.iter().for_each(|pid| signal(*pid, nix::sys::signal::Signal::SIGKILL));
            if left.is_empty() {
                break;
            }
            std::thread::sleep(Duration::from_millis(10));
        }
        for name in std::mem::take(&mut inner.namespaces) {
            let _ = run(Command::new("ip").args(["netns", "delete", &name]));
        }
        if !keep_directory {
            let _ = fs::remove_dir_all(&self.directory);
        }
    }

    /// The inner state, unless the lab has been cleaned already.
    fn open(&self) -> io::Result<MutexGuard<'_, Inner>> {
        let inner = self.inner.lock().unwrap_or_else(PoisonError::into_inner);
        if inner.closed { Err(io::Error::other("the demo was interrupted")) } else { Ok(inner) }
    }

    fn ip(&self, arguments: &[&str]) -> io::Result<()> {
        let _open = self.open()?;
        run(Command::new("ip").args(arguments))
    }
}

fn said(doing: &str, error: &io::Error) -> io::Error {
    io::Error::new(error.kind(), format!("{doing}: {error}"))
}

/// Runs a command to its end; its words are the error.
fn run(command: &mut Command) -> io::Result<()> {
    let output = command.stdin(Stdio::null()).output()?;
    if output.status.success() {
        return Ok(());
    }
    let shown: Vec<_> = command.get_args().map(|argument| argument.to_string_lossy()).collect();
    let words = String::from_utf8_lossy(&output.stderr).trim().to_string();
    Err(io::Error::other(format!("{} {}: {words}", command.get_program().to_string_lossy(), shown.join(" "))))
}

fn signal(pid: u32, signal: nix::sys::signal::Signal) {
    if let Ok(pid) = i32::try_from(pid) {
        // A process that has ended meanwhile is what is wanted.
        let _ = nix::sys::signal::kill(nix::unistd::Pid::from_raw(pid), signal);
    }
}

/// Waits for a process that was asked to end; ends it if it does not.
fn end(child: &mut Child) {
    let until = Instant::now() + Duration::from_secs(3);
    while Instant::now() < until {
        if !matches!(child.try_wait(), Ok(None)) {
            return;
        }
        std::thread::sleep(Duration::from_millis(10));
    }
    let _ = child.kill();
    let _ = child.wait();
}

/// Processes, apart from this one, whose command line has `text` in it.
fn processes_naming(text: &str) -> Vec<u32> {
    let Ok(entries) = fs::read_dir("/proc") else { return Vec::new() };
    let pids = entries.flatten().filter_map(|entry| entry.file_name().to_str()?.parse::<u32>().ok());
    let ours = |pid: &u32| {
        let line = fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
        String::from_utf8_lossy(&line).contains(text)
    };
    pids.filter(|pid| *pid != std::process::id()).filter(ours).collect()
}

/// The port of `mac` in the JSON of `bridge -j fdb show`.
fn port_of(json: &[u8], mac: &str) -> Option<String> {
    let entries: Vec<serde_json::Value> = serde_json::from_slice(json).ok()?;
    let ours =
        |entry: &&serde_json::Value| entry.get("mac").and_then(|m| m.as_str()).is_some_and(|m| m.eq_ignore_ascii_case(mac));
    entries.iter().find(ours)?.get("ifname")?.as_str().map(str::to_string)
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn the_table_of_a_bridge_is_read() {
        let json = br#"[{"mac":"33:33:00:00:00:01","ifname":"switch","flags":["self"],"state":"permanent"},
            {"mac":"52:54:00:13:56:05","ifname":"to-alpha","flags":[],"master":"switch","state":""}]"#;
        assert_eq!(port_of(json, "52:54:00:13:56:05").as_deref(), Some("to-alpha"));
        assert_eq!(port_of(json, "52:54:00:13:56:06"), None);
        assert_eq!(port_of(b"nonsense", "x"), None);
    }

    #[test]
    fn processes_are_found_by_their_command_line() {
        let unique = format!("limosa-demo-test-{}", std::process::id());
        let mut child = Command::new("sh").args(["-c", "read line", &unique]).stdin(Stdio::piped()).spawn().unwrap();
        let deadline = Instant::now() + Duration::from_secs(5);
        while processes_naming(&unique).is_empty() && Instant::now() < deadline {
            std::thread::sleep(Duration::from_millis(5));
        }
        assert_eq!(processes_naming(&unique), [child.id()]);
        child.kill().unwrap();
        child.wait().unwrap();
    }
}
