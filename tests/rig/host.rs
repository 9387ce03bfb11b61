//! One host of a lab: a namespace with a bridge, an agent, and the guests that were started on it.
//! What the command prints is taken as its JSON; nothing here looks into an agent's memory or files but its logs.

use crate::command::finish;
use crate::netns::{Netns, run};
use crate::operator::Operator;
use crate::process::{self, Process, limosa_bin, wait_for};
use crate::spec::beat_of;

pub use crate::command::{Output, Running, limosa, read_text, tail};
pub use crate::spec::{Beat, GuestSpec};

use anyhow::{Context, Result, bail, ensure};
use serde_json::Value;
use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::fs::File;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

/// How long anything may take that is no migration.
pub const PATIENCE: Duration = Duration::from_secs(20);
/// The agents' port.
pub const PORT: u16 = 13560;

/// What an agent is configured with; the default lets every host of the lab in, and guests leave by TCP: what a probe finds
/// faster is no business of tests that ask for something else.
#[derive(Debug, Clone)]
pub struct AgentConfig {
    /// CIDRs of `[allow]`.
    pub peers: Vec<String>,
    /// Other keys of `[allow]`, as TOML writes their values.
    pub allow: BTreeMap<String, String>,
    /// `[[network]]` name and bridge.
    pub networks: Vec<(String, String)>,
    /// Keys of each `[[network]]` beside these.
    pub network: BTreeMap<String, String>,
    /// Keys of `[migration]`, as TOML writes their values.
    pub migration: BTreeMap<String, String>,
    /// Where it listens, as TOML has it; none: on the host's own address.
    pub listen: Option<String>,
    /// Keys of `[agent]` beside the ones that the rig sets.
    pub agent: BTreeMap<String, String>,
    /// Keys of `[quic]`.
    pub quic: BTreeMap<String, String>,
    /// Keys of `[rdma]`.
    pub rdma: BTreeMap<String, String>,
    /// Keys of `[trust]`.
    pub trust: BTreeMap<String, String>,
    /// Keys of `[storage]`.
    pub storage: BTreeMap<String, String>,
    /// A folder that the agent and its VMMs see at the place of another: (which, where).
    pub bind: Option<(PathBuf, PathBuf)>,
    /// Keys of `[cpu]`.
    pub cpu: BTreeMap<String, String>,
    /// Keys of `[tickets]`.
    pub tickets: BTreeMap<String, String>,
    /// `[[operator]]` tables in place of the lab's operator, who may do everything.
    pub operators: Option<String>,
    /// Keys of `[metrics]`.
    pub metrics: BTreeMap<String, String>,
    /// The program, where it is not the binary under test; then it looks for fail points too.
    pub binary: Option<PathBuf>,
}

impl Default for AgentConfig {
    fn default() -> AgentConfig {
        AgentConfig {
            peers: vec!["10.77.0.0/24".into()],
            allow: BTreeMap::new(),
            networks: vec![("lan".into(), "br0".into())],
            network: BTreeMap::new(),
            migration: BTreeMap::from([("link".into(), "\"tcp\"".into())]),
            listen: None,
            agent: BTreeMap::new(),
            quic: BTreeMap::new(),
            rdma: BTreeMap::new(),
            trust: BTreeMap::new(),
            storage: BTreeMap::new(),
            bind: None,
            cpu: BTreeMap::new(),
            tickets: BTreeMap::new(),
            operators: None,
            metrics: BTreeMap::new(),
            binary: None,
        }
    }
}

impl AgentConfig {
    /// Sets one key of `[migration]`.
    pub fn migration(mut self, key: &str, value: impl ToString) -> AgentConfig {
        self.migration.insert(key.to_owned(), value.to_string());
        self
    }

    /// Sets the link by which guests leave: "auto", "tcp", "quic" or "rdma".
    pub fn link(self, link: &str) -> AgentConfig {
        self.migration("link", format!("{link:?}"))
    }

    /// Sets one key of `[quic]`.
    pub fn quic(mut self, key: &str, value: impl ToString) -> AgentConfig {
        self.quic.insert(key.to_owned(), value.to_string());
        self
    }

    /// Sets one key of `[rdma]`.
    pub fn rdma(mut self, key: &str, value: impl ToString) -> AgentConfig {
        self.rdma.insert(key.to_owned(), value.to_string());
        self
    }

    /// Sets one key of `[trust]`.
    pub fn trust(mut self, key: &str, value: impl ToString) -> AgentConfig {
        self.trust.insert(key.to_owned(), value.to_string());
        self
    }

    /// Lets images of incoming guests lie in this folder.
    pub fn shares(mut self, folder: &Path) -> AgentConfig {
        self.storage.insert("shared".into(), format!("[{folder:?}]"));
        self
    }

    /// Has the agent and its VMMs see the folder `which` at the place of the folder `at`.
    pub fn sees(mut self, which: &Path, at: &Path) -> AgentConfig {
        self.bind = Some((which.to_owned(), at.to_owned()));
        self
    }

    /// Serves metrics at this address.
    pub fn metrics(mut self, listen: &str) -> AgentConfig {
        self.metrics.insert("listen".to_owned(), format!("{listen:?}"));
        self
    }

    /// Keeps CPU features back from guests.
    pub fn hide(mut self, features: &[&str]) -> AgentConfig {
        self.cpu.insert("hide".to_owned(), format!("{features:?}"));
        self
    }

    /// Sets one key of `[tickets]`.
    pub fn tickets(mut self, key: &str, value: impl ToString) -> AgentConfig {
        self.tickets.insert(key.to_owned(), value.to_string());
        self
    }

    /// Sets the operators, as TOML: [`Operator::rule`](crate::operator::Operator::rule) makes one.
    pub fn operators(mut self, tables: impl Into<String>) -> AgentConfig {
        self.operators = Some(tables.into());
        self
    }

    /// Has the agent listen on every address of the host.
    pub fn listens_everywhere(mut self) -> AgentConfig {
        self.listen = Some(format!("[\"0.0.0.0:{PORT}\"]"));
        self
    }

    /// Sets the allow-list.
    pub fn peers(mut self, peers: &[&str]) -> AgentConfig {
        self.peers = peers.iter().map(|p| (*p).to_owned()).collect();
        self
    }

    /// Sets another key of `[allow]`.
    pub fn allow(mut self, key: &str, value: impl ToString) -> AgentConfig {
        self.allow.insert(key.to_owned(), value.to_string());
        self
    }

    /// Sets the networks.
    pub fn networks(mut self, networks: &[(&str, &str)]) -> AgentConfig {
        self.networks = networks.iter().map(|(n, b)| ((*n).to_owned(), (*b).to_owned())).collect();
        self
    }

    /// Sets one key of every `[[network]]`.
    pub fn network(mut self, key: &str, value: impl ToString) -> AgentConfig {
        self.network.insert(key.to_owned(), value.to_string());
        self
    }

    fn text(&self, host: &Host) -> Result<String> {
        let mut text = String::new();
        let listen = self.listen.clone().unwrap_or_else(|| format!("{:?}", [host.address().to_string()]));
        writeln!(text, "[agent]\nname = \"{}\"\nlisten = {listen}", host.name)?;
        writeln!(text, "state_dir = \"{}\"\nrun_dir = \"{}\"", host.state_dir().display(), host.run_dir().display())?;
        for (key, value) in &self.agent {
            writeln!(text, "{key} = {value}")?;
        }
        writeln!(text, "\n[allow]\npeers = {:?}", self.peers)?;
        for (key, value) in &self.allow {
            writeln!(text, "{key} = {value}")?;
        }
        for (name, bridge) in &self.networks {
            writeln!(text, "\n[[network]]\nname = \"{name}\"\nbridge = \"{bridge}\"")?;
            for (key, value) in &self.network {
                writeln!(text, "{key} = {value}")?;
            }
        }
        let sections = [
            ("migration", &self.migration),
            ("quic", &self.quic),
            ("rdma", &self.rdma),
            ("trust", &self.trust),
            ("storage", &self.storage),
            ("cpu", &self.cpu),
            ("tickets", &self.tickets),
            ("metrics", &self.metrics),
        ];
        text.push_str(&self.operators.clone().unwrap_or_else(|| host.operator.rule("rig")));
        for (name, section) in sections {
            writeln!(text, "\n[{name}]")?;
            for (key, value) in section {
                writeln!(text, "{key} = {value}")?;
            }
        }
        Ok(text)
    }
}

/// One host.
#[derive(Debug)]
pub struct Host {
    /// Its name in the lab, and the agent's.
    pub name: String,
    /// Its namespace.
    pub netns: Netns,
    /// Its address on br0.
    pub ip: Ipv4Addr,
    /// The lab's operator, whose key the commands sign with.
    pub operator: Operator,
    dir: PathBuf,
    config: AgentConfig,
    agent: Option<Process>,
    commands: std::sync::atomic::AtomicU32,
}

impl Host {
    /// A host with a bridge `br0` whose uplink `up0` exists already, with no agent yet.
    pub fn new(name: &str, netns: Netns, ip: Ipv4Addr, dir: PathBuf) -> Result<Host> {
        std::fs::create_dir_all(&dir)?;
        netns.ip("link add br0 type bridge stp_state 0 forward_delay 0 mcast_snooping 0")?;
        for words in ["link set up0 master br0", "link set up0 up", "link set br0 up"] {
            netns.ip(words)?;
        }
        netns.ip(&format!("addr add {ip}/24 dev br0"))?;
        let commands = std::sync::atomic::AtomicU32::new(0);
        let operator = Operator::in_folder(dir.parent().unwrap_or(&dir))?;
        Ok(Host { operator, name: name.to_owned(), netns, ip, dir, config: AgentConfig::default(), agent: None, commands })
    }

    /// The agent's address.
    pub fn address(&self) -> SocketAddr {
        SocketAddr::new(IpAddr::V4(self.ip), PORT)
    }

    /// The agent's state.
    pub fn state_dir(&self) -> PathBuf {
        self.dir.join("state")
    }

    /// The agent's sockets.
    pub fn run_dir(&self) -> PathBuf {
        self.dir.join("run")
    }

    /// A file of this host for the test's own use.
    pub fn file(&self, name: &str) -> PathBuf {
        self.dir.join(name)
    }

    /// What the agent logged (all its lives).
    pub fn agent_log(&self) -> String {
        read_text(&self.dir.join("agent.log"))
    }

    /// Starts the agent and waits until it answers.
    pub fn start_agent(&mut self, config: AgentConfig) -> Result<()> {
        self.launch_agent(config)?;
        self.wait_agent()
    }

    /// Writes the agent's configuration anew, which it takes when it is told to.
    pub fn rewrite_config(&mut self, config: AgentConfig) -> Result<()> {
        self.config = config;
        Ok(std::fs::write(self.file("agent.toml"), self.config.text(self)?)?)
    }

    /// Starts the agent and does not wait for it.
    pub fn launch_agent(&mut self, config: AgentConfig) -> Result<()> {
        self.config = config;
        let path = self.file("agent.toml");
        std::fs::write(&path, self.config.text(self)?)?;
        let log = File::options().create(true).append(true).open(self.dir.join("agent.log"))?;
        let binary = self.config.binary.clone().map_or_else(limosa_bin, Ok)?;
        let mut command = match &self.config.bind {
            None => self.netns.command(binary),
            Some((which, at)) => {
                // `ip netns exec` has made a mount namespace for it.
                let mut command = self.netns.command("sh");
                command.args(["-c", "mount --bind \"$1\" \"$2\" && shift 2 && exec \"$@\"", "sh"]).arg(which).arg(at);
                command.arg(binary);
                command
            }
        };
        if self.config.binary.is_some() {
            command.env("LIMOSA_FAILPOINTS", crate::points::folder(self));
        }
        command.arg("agent").arg("--config").arg(&path).stdout(log.try_clone()?).stderr(log);
        self.agent = Some(Process::start("limosa agent", &mut command)?);
        Ok(())
    }

    /// Waits until the agent that was launched answers.
    pub fn wait_agent(&mut self) -> Result<()> {
        let mut process = self.agent.take().with_context(|| format!("{} has no agent", self.name))?;
        let answer = wait_for(PATIENCE, "the agent's first answer", || {
            if let Some(status) = process.ended()? {
                bail!("the agent of {} ended with {status}:\n{}", self.name, self.agent_log());
            }
            let output = self.limosa(&["--json", "vm", "list"])?;
            Ok((output.code == 0).then_some(()))
        });
        answer.with_context(|| format!("log of {}:\n{}", self.name, self.agent_log()))?;
        self.agent = Some(process);
        Ok(())
    }

    /// As it was launched last.
    pub fn agent_config(&self) -> AgentConfig {
        self.config.clone()
    }

    /// Starts the agent again as it was.
    pub fn restart_agent(&mut self) -> Result<()> {
        self.start_agent(self.config.clone())
    }

    /// The agent's process id.
    pub fn agent_pid(&self) -> Result<u32> {
        Ok(self.agent.as_ref().with_context(|| format!("{} has no agent", self.name))?.pid())
    }

    /// Waits for the end of an agent that is to end by itself.
    pub fn wait_agent_ended(&mut self) -> Result<std::process::ExitStatus> {
        self.agent.take().with_context(|| format!("{} has no agent", self.name))?.wait(PATIENCE)
    }

    /// `kill -9` of the agent.
    pub fn kill_agent(&mut self) -> Result<()> {
        self.agent.take().with_context(|| format!("{} has no agent", self.name))?.kill()
    }

    /// Stops the agent as an operator does, and waits for its end.
    pub fn stop_agent(&mut self) -> Result<std::process::ExitStatus> {
        let mut agent = self.agent.take().with_context(|| format!("{} has no agent", self.name))?;
        agent.signal(nix::sys::signal::Signal::SIGTERM);
        agent.wait(PATIENCE)
    }

    fn command(&self) -> Result<Command> {
        let mut command = self.netns.command(limosa_bin()?);
        command.arg("--run-dir").arg(self.run_dir()).env("LIMOSA_OPERATOR_KEY", &self.operator.key);
        Ok(command)
    }

    /// Runs a command of `limosa` against this host's agent.
    pub fn limosa(&self, args: &[&str]) -> Result<Output> {
        finish(self.command()?, args)
    }

    /// Runs a command that must succeed, and gives its JSON.
    pub fn ask(&self, args: &[&str]) -> Result<Value> {
        let mut words = vec!["--json"];
        words.extend(args);
        self.limosa(&words)?.expect_code(0)?.json()
    }

    /// Starts a command and leaves it running.
    pub fn start(&self, args: &[&str]) -> Result<Running> {
        let number = self.commands.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
        let (stdout, stderr) = (self.file(&format!("cmd{number}.out")), self.file(&format!("cmd{number}.err")));
        let mut command = self.command()?;
        command.args(args).stdout(File::create(&stdout)?).stderr(File::create(&stderr)?);
        let process = Process::start("a limosa command", &mut command)?;
        Ok(Running { process, stdout, stderr, words: args.join(" ") })
    }

    /// This host's id.
    pub fn id(&self) -> Result<String> {
        let answer = self.ask(&["host", "id"])?;
        let id = answer.get("id").and_then(Value::as_str).with_context(|| format!("host id: {answer}"))?;
        Ok(id.to_owned())
    }

    /// Makes another host trusted here, under its name.
    pub fn trust(&self, other: &Host) -> Result<()> {
        self.trust_id(&other.name, &other.id()?, &other.address().to_string())
    }

    /// Makes an id trusted here.
    pub fn trust_id(&self, name: &str, id: &str, address: &str) -> Result<()> {
        self.limosa(&["host", "trust", name, id, address])?.expect_code(0)?;
        Ok(())
    }

    /// Starts a guest and waits until it says that it is ready.
    pub fn start_guest(&self, spec: &GuestSpec) -> Result<()> {
        let kernel = crate::guest_images()?.elf;
        let path = self.file(&format!("{}.toml", spec.name));
        std::fs::write(&path, spec.text(&kernel))?;
        let path = path.to_string_lossy().into_owned();
        self.limosa(&["vm", "start", &path])?.expect_code(0)?;
        let ready = wait_for(PATIENCE, "the guest's ready line", || {
            Ok(self.serial(&spec.name).contains("limosa-guest ready").then_some(()))
        });
        ready.with_context(|| format!("serial of {}: {}", spec.name, self.serial(&spec.name)))
    }

    /// What a guest's VMM printed on this host: the guest's serial line among it.
    pub fn serial(&self, guest: &str) -> String {
        read_text(&self.state_dir().join("vm").join(format!("{guest}.log")))
    }

    /// The heartbeats of a guest that this host has seen.
    pub fn beats(&self, guest: &str) -> Vec<Beat> {
        let text = self.serial(guest);
        let whole = text.rfind('\n').and_then(|end| text.get(..end)).unwrap_or_default();
        whole.lines().filter_map(|line| beat_of(line.trim_end())).collect()
    }

    /// Fails unless the guest lives on this host now: new heartbeats, growing counters, whole walks, no error.
    pub fn guest_lives(&self, guest: &str) -> Result<Beat> {
        let before = self.beats(guest).last().cloned().unwrap_or_default();
        let after = wait_for(PATIENCE, "three new heartbeats", || {
            let last = self.beats(guest).last().cloned().unwrap_or_default();
            Ok((last.n >= before.n + 3).then_some(last))
        });
        let after = after.with_context(|| format!("{guest} on {}; agent: {}", self.name, tail(&self.agent_log(), 15)))?;
        ensure!(after.errors == 0, "the guest found {} bad pages: {}", after.errors, tail(&self.serial(guest), 20));
        ensure!(after.backwards == 0, "a clock went backwards {} times", after.backwards);
        ensure!(after.written >= before.written && after.sum >= before.sum, "counters fell: {before:?} {after:?}");
        Ok(after)
    }

    /// Waits until the guest has walked over its whole working set `walks` times more and found nothing.
    pub fn guest_verified(&self, guest: &str, walks: u64) -> Result<Beat> {
        let first = self.guest_lives(guest)?;
        wait_for(PATIENCE, "a whole walk over the working set", || {
            let last = self.beats(guest).last().cloned().unwrap_or_default();
            ensure!(last.errors == 0, "bad pages: {}", tail(&self.serial(guest), 20));
            Ok((last.verified >= first.verified + walks).then_some(last))
        })
    }

    /// The VMMs of this host: pids of `limosa vmm`, only the ones with the word when one is given.
    pub fn vmms(&self, word: Option<&str>) -> Vec<u32> {
        let is_vmm = |pid: &u32| {
            let words = process::words(*pid);
            words.get(1).is_some_and(|w| w == "vmm") && word.is_none_or(|word| words.iter().any(|w| w == word))
        };
        self.netns.processes().into_iter().filter(is_vmm).collect()
    }

    /// The guests that the agent knows, by name.
    pub fn guests(&self) -> Result<Vec<String>> {
        let answer = self.ask(&["vm", "list"])?;
        let list = answer.as_array().or_else(|| answer.get("vms").and_then(Value::as_array));
        let list = list.with_context(|| format!("vm list: {answer}"))?;
        Ok(list.iter().filter_map(|vm| vm.get("name").and_then(Value::as_str)).map(str::to_owned).collect())
    }

    /// Waits until the agent knows a guest, or knows it no more.
    pub fn wait_knows(&self, guest: &str, known: bool) -> Result<()> {
        let what = format!("the agent of {} to {} {guest}", self.name, if known { "know" } else { "forget" });
        wait_for(PATIENCE, &what, || Ok((self.guests()?.iter().any(|name| name == guest) == known).then_some(())))
    }

    /// The jobs that the agent knows.
    pub fn jobs(&self) -> Result<Vec<Value>> {
        let answer = self.ask(&["jobs"])?;
        let list = answer.as_array().or_else(|| answer.get("jobs").and_then(Value::as_array));
        Ok(list.with_context(|| format!("jobs: {answer}"))?.clone())
    }

    /// Migrates and waits for the end, whatever it is.
    pub fn migrate(&self, guest: &str, to: &Host, more: &[&str]) -> Result<Output> {
        let mut args = vec!["--json", "migrate", guest, "--to", to.name.as_str()];
        args.extend(more);
        let start = Instant::now();
        let output = self.start(&args)?.wait(Duration::from_secs(90))?;
        ensure!(start.elapsed() < Duration::from_secs(90), "the migration took {:?}", start.elapsed());
        Ok(output)
    }

    /// Migrates, must succeed, and gives the report.
    pub fn migrate_well(&self, guest: &str, to: &Host, more: &[&str]) -> Result<Value> {
        let output = self.migrate(guest, to, more)?;
        let logs = || format!("{}:\n{}\n{}:\n{}", self.name, tail(&self.agent_log(), 30), to.name, tail(&to.agent_log(), 30));
        let report = output.expect_code(0).with_context(logs)?.json()?;
        let report = report.get("report").cloned().unwrap_or(report);
        ensure!(report.get("ok") == Some(&Value::Bool(true)), "not ok: {report}");
        Ok(report)
    }

    /// Starts a migration that is slow enough to be disturbed and waits until its pages move.
    pub fn start_slow(&self, guest: &str, to: &Host, more: &[&str]) -> Result<Running> {
        let mut args = vec!["--json", "migrate", guest, "--to", to.name.as_str(), "--bandwidth", "8MB/s"];
        args.extend(more);
        let mut running = self.start(&args)?;
        wait_for(PATIENCE, "pre-copy", || {
            if running.ended()? {
                bail!("the migration ended already: {:?}", running.printed());
            }
            let sent = |job: &Value| job.pointer("/progress/bytes_on_wire").and_then(Value::as_u64);
            let moving = self.jobs()?.iter().any(|job| job["state"] == "running" && sent(job) > Some(0));
            Ok(moving.then_some(()))
        })?;
        // Into the middle of the round, away from its start.
        std::thread::sleep(Duration::from_millis(300));
        Ok(running)
    }

    /// Runs `ip` words inside.
    pub fn ip(&self, words: &str) -> Result<String> {
        self.netns.ip(words)
    }

    /// Whether a program such as `bridge` is there.
    pub fn has(program: &str) -> bool {
        run("which", &[program]).is_ok()
    }
}
