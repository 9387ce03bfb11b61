//! An agent in a lab machine, and the commands that are given to it; its guests' serial lines and VMMs. What is tested with it is
//! the test's affair.

use crate::command::tail;
use crate::linux::{LinuxBeat, LinuxGuest, complaints, image, last_beat};
use crate::operator::Operator;
use crate::process::{limosa_bin, wait_for};
use crate::roce::{Machine, Running, Task};
use anyhow::{Context, Result, bail, ensure};
use serde_json::Value;
use std::time::Duration;

/// Where the agent has its state and its sockets, in the machine.
pub const RUN: &str = "/run/limosa-test";
const SHORT: Duration = Duration::from_secs(60);
/// A migration in the lab, with everything else emulated beside it.
const MIGRATION: Duration = Duration::from_secs(240);
/// A boot of Debian's kernel in a guest of an emulated machine, on a busy machine.
const BOOT: Duration = Duration::from_secs(300);

/// The operator's key, in the machine.
pub const OPERATOR_KEY: &str = "/run/limosa-operator.key";

/// The operator whom the lab's agents trust, with the key put into this machine: the same one in all machines.
///
/// # Errors
/// The machine is lost.
pub fn operator_in(machine: &Machine) -> Result<Operator> {
    let operator = Operator::kept()?;
    machine.write_file(OPERATOR_KEY, &std::fs::read(&operator.key)?)?;
    machine.shell(&format!("chmod 600 {OPERATOR_KEY}"), SHORT)?;
    Ok(operator)
}

/// What a command of `limosa` did.
#[derive(Debug, Clone)]
pub struct Answer {
    /// Its exit code.
    pub code: i32,
    /// What it printed on standard output.
    pub text: String,
    /// What it printed on standard error.
    pub errors: String,
}

impl Answer {
    /// Fails unless it ended with this code and printed all these words.
    ///
    /// # Errors
    /// It did not; with what it printed.
    pub fn expect(&self, code: i32, words: &[&str]) -> Result<()> {
        let all = format!("{}\n{}", self.text, self.errors);
        ensure!(self.code == code, "exit {} instead of {code}:\n{all}", self.code);
        let lacking = words.iter().find(|words| !all.contains(**words));
        lacking.map_or(Ok(()), |words| bail!("{words:?} is not in\n{all}"))
    }
}

/// An agent in a lab machine. It ends with this value.
#[derive(Debug)]
pub struct Station<'a> {
    /// The machine.
    pub machine: &'a Machine,
    _agent: Running,
}

impl<'a> Station<'a> {
    /// Starts an agent that lets the lab's machines in, trusts their Ethernet as a fabric and has the network "lan" on br0;
    /// `more` is further configuration.
    ///
    /// # Errors
    /// It does not answer; with its log.
    pub fn start(machine: &'a Machine, more: &str) -> Result<Station<'a>> {
        machine.shell(&format!("mkdir -p {RUN}"), SHORT)?;
        let config = format!(
            "[agent]\nname = \"{name}\"\nlisten = [\"{ip}:13560\"]\nstate_dir = \"{RUN}/state\"\nrun_dir = \"{RUN}/run\"\n\
             [allow]\npeers = [\"10.77.0.0/24\"]\n[rdma]\ntrusted_fabric = [\"10.77.0.0/24\"]\n\
             [[network]]\nname = \"lan\"\nbridge = \"br0\"\n{rule}{more}",
            rule = operator_in(machine)?.rule("rig"),
            name = machine.name,
            ip = machine.ip,
        );
        machine.write_file(&format!("{RUN}/agent.toml"), config.as_bytes())?;
        let line = format!("exec {} agent --config {RUN}/agent.toml >>{RUN}/agent.log 2>&1", limosa_bin()?.display());
        let agent = machine.task(&["sh", "-c", &line]).limit(Duration::from_secs(3600)).spawn()?;
        let station = Station { machine, _agent: agent };
        let answers = wait_for(SHORT, "the agent's first answer", || {
            Ok(station.limosa(&["--json", "vm", "list"]).is_ok_and(|answer| answer.code == 0).then_some(()))
        });
        answers.with_context(|| format!("log of {}:\n{}", machine.name, station.log()))?;
        Ok(station)
    }

    /// Both of a lab, trusting each other.
    ///
    /// # Errors
    /// See [`Station::start`].
    pub fn pair(alpha: &'a Machine, beta: &'a Machine, more: [&str; 2]) -> Result<[Station<'a>; 2]> {
        let [more_alpha, more_beta] = more;
        let (alpha, beta) = (Station::start(alpha, more_alpha)?, Station::start(beta, more_beta)?);
        alpha.trust(&beta)?;
        beta.trust(&alpha)?;
        Ok([alpha, beta])
    }

    /// The agent's log.
    pub fn log(&self) -> String {
        self.read(&format!("{RUN}/agent.log"))
    }

    /// A file of the machine as text, empty when it is not there.
    pub fn read(&self, path: &str) -> String {
        self.machine.read_file(path).map(|bytes| String::from_utf8_lossy(&bytes).into_owned()).unwrap_or_default()
    }

    fn task(&self, words: &[&str]) -> Result<Task<'_>> {
        let binary = limosa_bin()?.display().to_string();
        let run_dir = format!("{RUN}/run");
        let words = [&[binary.as_str(), "--run-dir", &run_dir, "--key", OPERATOR_KEY], words].concat();
        Ok(self.machine.task(&words).limit(MIGRATION))
    }

    /// Runs a command of limosa to its end.
    ///
    /// # Errors
    /// The machine is lost.
    pub fn limosa(&self, words: &[&str]) -> Result<Answer> {
        let output = self.task(words)?.run()?;
        Ok(Answer { code: output.status(), text: output.text(), errors: output.errors() })
    }

    /// Starts a command of limosa beside the caller.
    ///
    /// # Errors
    /// The machine is lost.
    pub fn spawn(&self, words: &[&str]) -> Result<Running> {
        self.task(words)?.spawn()
    }

    /// Runs a command that must succeed, and gives its JSON.
    ///
    /// # Errors
    /// It does not; with the end of the agent's log.
    pub fn ask(&self, words: &[&str]) -> Result<Value> {
        let answer = self.limosa(&[&["--json"], words].concat())?;
        answer.expect(0, &[]).with_context(|| format!("{} {words:?}\n{}", self.machine.name, tail(&self.log(), 30)))?;
        Ok(serde_json::from_str(&answer.text)?)
    }

    fn trust(&self, other: &Station<'_>) -> Result<()> {
        let id = other.ask(&["host", "id"])?;
        let id = id["id"].as_str().context("the host's id")?;
        let address = format!("{}:13560", other.machine.ip);
        self.limosa(&["host", "trust", &other.machine.name, id, &address])?.expect(0, &[])
    }

    /// Starts a Linux guest; it boots on.
    ///
    /// # Errors
    /// It is refused.
    pub fn start_linux(&self, guest: &LinuxGuest) -> Result<()> {
        self.start_text(&guest.name, &guest.text(&image::images(guest.debian)?))?.expect(0, &[])
    }

    /// Starts a guest from this configuration, and gives what was said.
    ///
    /// # Errors
    /// The machine is lost.
    pub fn start_text(&self, name: &str, text: &str) -> Result<Answer> {
        let path = format!("{RUN}/{name}.toml");
        self.machine.write_file(&path, text.as_bytes())?;
        self.limosa(&["vm", "start", &path])
    }

    /// Waits until a Linux guest's program works.
    ///
    /// # Errors
    /// It does not come up, or complains: with its console.
    pub fn wait_linux(&self, guest: &str) -> Result<LinuxBeat> {
        let beat = wait_for(BOOT, "the Linux guest's first heartbeat", || {
            let serial = self.serial(guest);
            ensure!(complaints(&serial).is_empty(), "{guest} complains: {:#?}", complaints(&serial));
            ensure!(!self.vmms(guest)?.is_empty(), "the VMM of {guest} ended");
            std::thread::sleep(Duration::from_secs(1));
            Ok(last_beat(&serial))
        });
        beat.with_context(|| self.what_was_said(guest))
    }

    /// Fails unless a Linux guest lives here now: new heartbeats since `before`, no complaint, no error, uptime going on.
    ///
    /// # Errors
    /// What is wrong, with the end of its console.
    pub fn linux_lives(&self, guest: &str, before: &LinuxBeat) -> Result<LinuxBeat> {
        let check = || {
            let after = wait_for(SHORT, "two new heartbeats", || {
                let last = last_beat(&self.serial(guest)).unwrap_or_default();
                std::thread::sleep(Duration::from_millis(200));
                Ok((last.n() >= before.n() + 2).then_some(last))
            })?;
            let complaints = complaints(&self.serial(guest));
            ensure!(complaints.is_empty(), "{complaints:#?}");
            ensure!(after.troubles().is_empty(), "{:?}", after.troubles());
            ensure!(after.get("up_ms") > before.get("up_ms"), "uptime fell: {before:?} {after:?}");
            Ok(after)
        };
        check().with_context(|| self.what_was_said(guest))
    }

    fn what_was_said(&self, guest: &str) -> String {
        let (serial, vmm, log) = (self.serial(guest), self.read(&format!("{RUN}/state/vm/{guest}.vmm.log")), self.log());
        let name = &self.machine.name;
        format!(
            "{guest} on {name}; its console:\n{}\nits VMM:\n{}\nthe agent:\n{}",
            tail(&serial, 25),
            tail(&vmm, 10),
            tail(&log, 25)
        )
    }

    /// A guest's serial line as this machine has it.
    pub fn serial(&self, guest: &str) -> String {
        self.read(&format!("{RUN}/state/vm/{guest}.log"))
    }

    /// The process ids of a guest's VMMs in the machine.
    ///
    /// # Errors
    /// The machine is lost.
    pub fn vmms(&self, guest: &str) -> Result<Vec<u32>> {
        // A VMM that takes a guest in is not told the name by its words; its output goes to a file of that name.
        let line = "for f in $(grep -lzx vmm /proc/[0-9]*/cmdline 2>/dev/null); do p=${f%/cmdline}; \
                    echo \"${p#/proc/} $(readlink $p/fd/1)\"; done";
        let text = self.machine.shell(line, SHORT)?.text();
        let log = format!("/vm/{guest}.log");
        let ours = text.lines().filter(|line| line.ends_with(&log));
        Ok(ours.filter_map(|line| line.split(' ').next()?.parse().ok()).collect())
    }

    /// `kill -9` of a guest's VMM.
    ///
    /// # Errors
    /// There is not exactly one.
    pub fn kill_vmm(&self, guest: &str) -> Result<()> {
        let pids = self.vmms(guest)?;
        let [pid] = pids.as_slice() else { bail!("{guest} has {} VMMs on {}", pids.len(), self.machine.name) };
        self.machine.shell(&format!("kill -9 {pid}"), SHORT)?;
        Ok(())
    }

    /// Migrates; the report, which must be good.
    ///
    /// # Errors
    /// It did not go well; with both agents' logs.
    pub fn migrate(&self, guest: &str, to: &Station<'_>, more: &[&str]) -> Result<Value> {
        let words = [&["migrate", guest, "--to", to.machine.name.as_str()], more].concat();
        let answer = self.ask(&words).with_context(|| format!("log of {}:\n{}", to.machine.name, tail(&to.log(), 25)))?;
        let report = answer.get("report").cloned().unwrap_or(answer);
        ensure!(report["ok"] == true, "{report}");
        Ok(report)
    }

    /// Starts a migration that is slow enough to be disturbed, and waits until its pages move.
    ///
    /// # Errors
    /// It ended before.
    pub fn migrate_slowly(&self, guest: &str, to: &Station<'_>, link: &str) -> Result<Running> {
        let to = to.machine.name.as_str();
        let moving = self.spawn(&["--json", "migrate", guest, "--to", to, "--link", link, "--bandwidth", "3MB/s"])?;
        wait_for(SHORT, "pre-copy", || {
            ensure!(!moving.ended(), "the migration ended already: {:?}", moving.printed());
            let jobs = self.ask(&["jobs"])?;
            let jobs = jobs.as_array().or_else(|| jobs["jobs"].as_array()).cloned().unwrap_or_default();
            let sent = |job: &Value| job.pointer("/progress/bytes_on_wire").and_then(Value::as_u64) > Some(0);
            Ok(jobs.iter().any(|job| job["state"] == "running" && sent(job)).then_some(()))
        })?;
        Ok(moving)
    }
}
