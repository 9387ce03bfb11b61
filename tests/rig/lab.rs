//! A lab: hosts in namespaces of their own, a switch between them, a third machine that watches, and the proof that nothing is
//! left of a migration or of the lab itself. What the hosts do is in `host`.

use crate::capture::Capture;
use crate::command::tail;
use crate::host::{AgentConfig, Host, PATIENCE};
use crate::net::{GuestProbe, fdb_port};
use crate::netns::{self, Netns, run};
use crate::process::{self, wait_for};
use crate::spec::GuestSpec;
use anyhow::{Context, Result, bail, ensure};
use std::net::Ipv4Addr;
use std::path::PathBuf;

/// The name of the switch's bridge in its namespace.
pub const SWITCH: &str = "sw0";

/// Two hosts and the network between them.
#[derive(Debug)]
pub struct Lab {
    /// The first host: where guests start in most tests.
    pub a: Host,
    /// The second.
    pub b: Host,
    /// The switch: ports `p-a`, `p-b` and `p-watch` on [`SWITCH`].
    pub switch: Netns,
    /// A third machine on the network, 10.77.0.9.
    pub watch: Netns,
    name: String,
    dir: Option<tempfile::TempDir>,
}

/// What this machine lacks for a lab, in words; nothing when all is there.
pub fn missing() -> Option<String> {
    if !nix::unistd::geteuid().is_root() {
        return Some("a lab of network namespaces needs root".into());
    }
    if std::fs::OpenOptions::new().read(true).write(true).open("/dev/kvm").is_err() {
        return Some("/dev/kvm cannot be opened".into());
    }
    ["ip", "bridge"].into_iter().find(|program| !Host::has(program)).map(|program| format!("{program} (iproute2) is missing"))
}

/// Runs a test in a lab of two hosts with agents that trust each other; skips where that is impossible. After a success it
/// holds that nothing is left of the lab; after a failure it prints the logs.
///
/// # Panics
/// When the test fails: that is its way to say so.
#[allow(clippy::panic)]
pub fn with_lab(config: AgentConfig, test: impl FnOnce(&mut Lab) -> Result<()>) {
    with_bare_lab(|lab| {
        lab.start_agents(config)?;
        test(lab)
    });
}

/// Like [`with_lab`], but with no agent running yet.
///
/// # Panics
/// When the test fails: that is its way to say so.
#[allow(clippy::panic, clippy::print_stderr)]
pub fn with_bare_lab(test: impl FnOnce(&mut Lab) -> Result<()>) {
    if let Some(reason) = missing() {
        crate::skip(&reason);
        return;
    }
    let result = Lab::two_hosts().and_then(|mut lab| {
        let result = test(&mut lab);
        if result.is_err() {
            lab.print_logs();
        }
        let end = lab.end();
        result.and(end)
    });
    if let Err(error) = result {
        panic!("{error:#}");
    }
}

/// A namespace with a cable to the switch.
fn plug_in(switch: &Netns, lab: &str, letter: &str, (inner, port): (&str, &str), mac: u8) -> Result<Netns> {
    let netns = Netns::create(&format!("{lab}-{letter}"))?;
    switch.ip(&format!("link add {port} type veth peer name {inner} netns {}", netns.name()))?;
    // As a real card has it: below the fe:... of TAPs, so that the bridge keeps this address for good.
    netns.ip(&format!("link set {inner} address 02:00:00:77:00:0{mac:x}"))?;
    switch.ip(&format!("link set {port} master {SWITCH}"))?;
    switch.ip(&format!("link set {port} up"))?;
    Ok(netns)
}

impl Lab {
    /// Makes the namespaces, the switch and the hosts' bridges.
    pub fn two_hosts() -> Result<Lab> {
        netns::sweep();
        let name = netns::unique_name();
        let dir = tempfile::Builder::new().prefix(&format!("{name}-")).tempdir().context("a folder for the lab")?;
        let switch = Netns::create(&format!("{name}-s"))?;
        switch.ip(&format!("link add {SWITCH} type bridge stp_state 0 forward_delay 0 mcast_snooping 0"))?;
        switch.ip(&format!("link set {SWITCH} up"))?;
        let plug_in = |letter: &str, inner: &str, port: &str, mac: u8| plug_in(&switch, &name, letter, (inner, port), mac);
        let a = Host::new("a", plug_in("a", "up0", "p-a", 0xa)?, Ipv4Addr::new(10, 77, 0, 1), dir.path().join("a"))?;
        let b = Host::new("b", plug_in("b", "up0", "p-b", 0xb)?, Ipv4Addr::new(10, 77, 0, 2), dir.path().join("b"))?;
        let watch = plug_in("w", "eth0", "p-watch", 0xc)?;
        watch.ip("link set eth0 up")?;
        watch.ip("addr add 10.77.0.9/24 dev eth0")?;
        Ok(Lab { a, b, switch, watch, name, dir: Some(dir) })
    }

    /// A third host "c" on the same network, with no agent yet. It belongs to the test, which ends its agent.
    pub fn third_host(&self) -> Result<Host> {
        let dir = self.dir.as_ref().context("the lab's folder")?.path().join("c");
        let netns = plug_in(&self.switch, &self.name, "c", ("up0", "p-c"), 0xd)?;
        Host::new("c", netns, Ipv4Addr::new(10, 77, 0, 3), dir)
    }

    /// An operator's machine with a cable to one host and to nothing else: it is 10.88.0.9, the host 10.88.0.1 on that cable, and
    /// there is no route to the network of the guests. Also a folder for what the operator keeps.
    pub fn operators_machine(&self, host: &Host) -> Result<(Netns, PathBuf)> {
        let netns = Netns::create(&format!("{}-o", self.name))?;
        host.ip(&format!("link add admin type veth peer name eth0 netns {}", netns.name()))?;
        for words in ["addr add 10.88.0.1/24 dev admin", "link set admin up"] {
            host.ip(words)?;
        }
        for words in ["addr add 10.88.0.9/24 dev eth0", "link set eth0 up"] {
            netns.ip(words)?;
        }
        let folder = self.dir.as_ref().context("the lab's folder")?.path().join("operator");
        std::fs::create_dir_all(&folder)?;
        Ok((netns, folder))
    }

    /// Starts both agents alike and makes them trust each other.
    pub fn start_agents(&mut self, config: AgentConfig) -> Result<()> {
        self.start_agents_with(config.clone(), config)
    }

    /// Starts both agents, each with its own configuration, and makes them trust each other.
    pub fn start_agents_with(&mut self, a: AgentConfig, b: AgentConfig) -> Result<()> {
        self.a.start_agent(a)?;
        self.b.start_agent(b)?;
        self.a.trust(&self.b)?;
        self.b.trust(&self.a)
    }

    /// A guest that runs on the first host and answers the network.
    pub fn guest(&self, spec: &GuestSpec) -> Result<()> {
        self.a.start_guest(spec)?;
        self.wait_reachable(spec)
    }

    /// Waits until the guest answers the watcher.
    pub fn wait_reachable(&self, spec: &GuestSpec) -> Result<()> {
        let probe = GuestProbe::start(&self.watch, spec.ip())?;
        wait_for(PATIENCE, &format!("an echo of {} ({})", spec.name, spec.ip()), || Ok((probe.received() >= 3).then_some(())))
    }

    /// Asks a guest from the third machine, every 10 ms.
    pub fn probe(&self, spec: &GuestSpec) -> Result<GuestProbe> {
        GuestProbe::start(&self.watch, spec.ip())
    }

    /// Captures on every port of the switch.
    pub fn capture(&self) -> Result<Capture> {
        Capture::start(self.switch.name())
    }

    /// The switch's port on which a guest's MAC was learnt.
    pub fn port_of(&self, spec: &GuestSpec) -> Result<Option<String>> {
        fdb_port(&self.switch, SWITCH, &spec.mac())
    }

    /// Fails unless the guest lives on exactly this host, is plugged there only, and answers the network from there.
    pub fn guest_is_on(&self, spec: &GuestSpec, host: &Host, other: &Host) -> Result<()> {
        host.guest_lives(&spec.name)?;
        self.wait_reachable(spec)?;
        host.wait_knows(&spec.name, true)?;
        other.wait_knows(&spec.name, false)?;
        self.settled(host, 1)?;
        self.settled(other, 0)
    }

    /// Waits until a host has just what so many guests need: VMMs, TAPs, and no guest memory held by the agent of a guest
    /// that is not there.
    pub fn settled(&self, host: &Host, guests: usize) -> Result<()> {
        let mut seen = String::new();
        let found = wait_for(PATIENCE, "leftovers to go", || {
            let (vmms, taps) = (host.vmms(None).len(), host.netns.taps()?.len());
            let memfds = host.agent_pid().map_or(0, process::memfds);
            seen = format!("{vmms} VMMs, {taps} TAPs, {memfds} memfds in the agent");
            Ok((vmms == guests && taps == guests && (guests > 0 || memfds == 0)).then_some(()))
        });
        found.with_context(|| format!("{} shall hold {guests} guests and holds {seen}", host.name))
    }

    /// After a failed or refused migration: the guest runs on at `home`, nothing is left at `other`, and the next migration works.
    pub fn unharmed(&mut self, spec: &GuestSpec) -> Result<()> {
        self.guest_is_on(spec, &self.a, &self.b).context("after the failure the guest must run on at the source")?;
        self.good_migration(spec)
    }

    /// Fails if a heartbeat was said twice: a guest that ran on two hosts, or again from an old state, counts the same numbers.
    pub fn never_two(&self, guest: &str) -> Result<()> {
        let mut seen = std::collections::BTreeSet::new();
        for host in [&self.a, &self.b] {
            for beat in host.beats(guest) {
                ensure!(seen.insert(beat.n), "heartbeat {} of {guest} was said twice: it ran twice", beat.n);
            }
        }
        ensure!(seen.len() > 3, "no heartbeats to judge by");
        Ok(())
    }

    /// A migration from the first to the second host that must succeed, with the guest verified there.
    pub fn good_migration(&self, spec: &GuestSpec) -> Result<()> {
        let after = || "the migration that ends this test".to_owned();
        self.a.migrate_well(&spec.name, &self.b, &[]).with_context(after)?;
        self.guest_is_on(spec, &self.b, &self.a).with_context(after)?;
        self.b.guest_verified(&spec.name, 1).with_context(after)?;
        Ok(())
    }

    /// Where the logs are.
    #[allow(clippy::print_stderr)]
    fn print_logs(&self) {
        for host in [&self.a, &self.b] {
            eprintln!("==== agent of {}\n{}", host.name, tail(&host.agent_log(), 60));
            let Ok(entries) = std::fs::read_dir(host.state_dir().join("vm")) else {
                continue;
            };
            for entry in entries.flatten() {
                eprintln!(
                    "==== {}: {}\n{}",
                    host.name,
                    entry.path().display(),
                    tail(&crate::command::read_text(&entry.path()), 6)
                );
            }
        }
    }

    /// Stops the guests and the agents as an operator does, and holds that nothing at all is left.
    pub fn end(mut self) -> Result<()> {
        let mut problems = Vec::new();
        for host in [&mut self.a, &mut self.b] {
            // A test that failed may have left them standing still, and nobody would ever answer.
            for pid in host.netns.processes() {
                process::signal(pid, nix::sys::signal::Signal::SIGCONT);
            }
            if host.agent_pid().is_err() {
                continue;
            }
            for guest in host.guests()? {
                host.limosa(&["vm", "stop", &guest])?.expect_code(0)?;
            }
            if host.stop_agent()?.code() != Some(0) {
                problems.push(format!("the agent of {} did not stop cleanly", host.name));
            }
        }
        problems.extend(self.leftovers());
        let name = self.name.clone();
        let dir = self.dir.take();
        drop(self);
        drop(dir);
        problems.extend(netns::named(&name).into_iter().map(|n| format!("namespace {n}")));
        if problems.is_empty() { Ok(()) } else { bail!("left over: {}", problems.join(", ")) }
    }

    /// What is there that should not be when no guest and no agent run: processes, TAPs, shared memory, sockets.
    pub fn leftovers(&self) -> Vec<String> {
        let mut found = Vec::new();
        for host in [&self.a, &self.b] {
            let gone =
                wait_for(PATIENCE, "", || Ok((host.netns.processes().is_empty() && host.netns.taps()?.is_empty()).then_some(())));
            if gone.is_err() {
                let pids = host.netns.processes();
                found.extend(
                    pids.into_iter().map(|pid| format!("process {pid} on {}: {}", host.name, process::words(pid).join(" "))),
                );
                found.extend(host.netns.taps().unwrap_or_default().into_iter().map(|tap| format!("TAP {tap} on {}", host.name)));
            }
            let sockets = std::fs::read_dir(host.run_dir()).into_iter().flatten().flatten();
            found.extend(sockets.map(|entry| format!("{}", entry.path().display())));
        }
        let shared = std::fs::read_dir("/dev/shm").into_iter().flatten().flatten();
        // limosa-guest-* is the memory of a QEMU that the guest's own test runs beside this one.
        let ours = |name: &str| name.contains("limosa") && !name.starts_with("limosa-guest-");
        let shared = shared.filter(|entry| ours(&entry.file_name().to_string_lossy()));
        found.extend(shared.map(|entry| format!("{}", entry.path().display())));
        found
    }

    /// Cuts or mends the cable between a host and the switch.
    pub fn cable(&self, port: &str, whole: bool) -> Result<()> {
        self.switch.ip(&format!("link set {port} {}", if whole { "up" } else { "down" }))?;
        Ok(())
    }

    /// Cuts or mends one way of the network: what `from` sends to `to` is lost, what comes back arrives.
    pub fn one_way(&self, from: &Host, to: &Host, whole: bool) -> Result<()> {
        // To an address that nobody has.
        let words = if whole { "del" } else { "replace" };
        let at = if whole { "" } else { "lladdr 02:00:00:77:ff:ff nud permanent" };
        from.ip(&format!("neigh {words} {} {at} dev br0", to.ip)).map(drop)
    }

    /// Every IP neighbour of the watcher, as text (for messages).
    pub fn neighbours(&self) -> Result<String> {
        run("ip", &["-n", self.watch.name(), "neigh", "show"])
    }
}

#[cfg(test)]
#[allow(clippy::expect_used, clippy::panic)]
mod tests {
    use super::*;
    use std::time::Duration;

    #[test]
    fn a_lab_is_made_joined_captured_and_gone_afterwards() {
        if let Some(reason) = missing() {
            crate::skip(&reason);
            return;
        }
        let name = {
            let lab = Lab::two_hosts().expect("a lab");
            let capture = lab.capture().expect("a capture");
            let echo = lab.b.netns.within(|| Ok(std::net::UdpSocket::bind("0.0.0.0:7")?)).expect("a socket on b");
            echo.set_read_timeout(Some(Duration::from_secs(3))).expect("a time-out");
            let probe = GuestProbe::start(&lab.watch, std::net::IpAddr::V4(lab.b.ip)).expect("a probe");
            let mut bytes = [0u8; 64];
            for _ in 0..20 {
                let (length, from) = echo.recv_from(&mut bytes).expect("a question of the probe");
                echo.send_to(&bytes[..length], from).expect("an answer");
            }
            std::thread::sleep(Duration::from_millis(100));
            let report = probe.finish().expect("a report");
            assert!(report.received >= 19 && report.sent > report.received, "{report:?}");
            assert!(report.largest_gap >= Duration::from_millis(80), "silence at the end is a gap: {report:?}");
            let arp = capture.frames().into_iter().filter(|f| f.ethertype() == Some(0x0806)).collect::<Vec<_>>();
            assert!(arp.iter().any(|f| f.interface == "p-watch" && !f.outgoing), "the watcher's ARP request was not seen");
            assert!(arp.iter().any(|f| f.interface == "p-b" && !f.outgoing), "its answer from b was not seen");
            let mac = lab.b.ip("link show br0").expect("br0");
            let mac = mac.split_whitespace().skip_while(|w| *w != "link/ether").nth(1).expect("a MAC").to_owned();
            assert_eq!(fdb_port(&lab.switch, SWITCH, &mac).expect("the table").as_deref(), Some("p-b"));
            let mut sleeper = process::Process::start("sleep", lab.a.netns.command("sleep").arg("100")).expect("a process");
            wait_for(PATIENCE, "sleep", || Ok((lab.a.netns.processes() == [sleeper.pid()]).then_some(()))).expect("seen");
            sleeper.kill().expect("ended");
            assert_eq!(lab.leftovers(), Vec::<String>::new());
            lab.name.clone()
        };
        assert_eq!(netns::named(&name), Vec::<String>::new());
    }

    #[test]
    fn a_panic_leaves_nothing() {
        if let Some(reason) = missing() {
            crate::skip(&reason);
            return;
        }
        let lab = Lab::two_hosts().expect("a lab");
        let name = lab.name.clone();
        let mut child = lab.a.netns.command("sleep").arg("100").spawn().expect("a process");
        let result = std::panic::catch_unwind(std::panic::AssertUnwindSafe(move || {
            let _lab = lab;
            panic!("as a failing test does");
        }));
        assert!(result.is_err());
        assert!(child.wait().expect("ended").code().is_none(), "the process inside was not killed");
        assert_eq!(netns::named(&name), Vec::<String>::new());
    }
}
