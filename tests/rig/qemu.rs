//! QEMU as a measured peer: a process on each host of a lab, one guest, one migration over the lab's network, driven by QMP.
//! Not a test double: nothing of Limosa is involved here.

use crate::host::{Host, read_text};
use crate::process::{Process, wait_for};
use anyhow::{Context, Result, bail};
use serde_json::{Value, json};
use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::Duration;

/// How a QEMU is started and told to migrate.
#[derive(Debug, Clone)]
pub struct QemuSetup {
    /// The PVH guest.
    pub kernel: PathBuf,
    /// Its command line.
    pub cmdline: String,
    /// Guest memory in bytes.
    pub memory_bytes: u64,
    /// Whether the memory is allocated before the guest starts (both sides).
    pub preallocate: bool,
    /// `multifd` channels; 0 is the classic single stream.
    pub multifd_channels: u32,
    /// Goal for the downtime in milliseconds.
    pub downtime_ms: u64,
}

/// What one migration cost.
#[derive(Debug, Clone, Copy, Default)]
pub struct QemuResult {
    /// QEMU's own `total-time`.
    pub total_ms: f64,
    /// QEMU's own `downtime`.
    pub downtime_ms: f64,
    /// CPU seconds of the source process during the migration.
    pub cpu_source: f64,
    /// CPU seconds of the destination process during the migration.
    pub cpu_destination: f64,
    /// Bytes that QEMU says it sent.
    pub bytes: u64,
}

struct Qemu {
    process: Process,
    control: BufReader<UnixStream>,
    serial: PathBuf,
}

/// Nothing else listens in a lab's namespace but the agent.
const PORT: u16 = 4444;
const PATIENCE: Duration = Duration::from_secs(120);

impl Qemu {
    fn start(setup: &QemuSetup, host: &Host, folder: &Path, name: &str, incoming: bool) -> Result<Qemu> {
        let control = folder.join(format!("{name}.qmp"));
        let serial = folder.join(format!("{name}.serial"));
        let memory = format!(
            "memory-backend-memfd,id=ram,size={},share=on,prealloc={}",
            setup.memory_bytes,
            if setup.preallocate { "on" } else { "off" }
        );
        let mut command = host.netns.command("qemu-system-x86_64");
        command.args(["-accel", "kvm", "-cpu", "host", "-nodefaults", "-no-user-config", "-display", "none", "-smp", "1"]);
        command.args(["-machine", "q35,memory-backend=ram", "-object", &memory, "-m", &format!("{}M", setup.memory_bytes >> 20)]);
        command.arg("-kernel").arg(&setup.kernel).args(["-append", &setup.cmdline]);
        command.args(["-serial", &format!("file:{}", serial.display())]);
        command.args(["-qmp", &format!("unix:{},server=on,wait=off", control.display())]);
        if incoming {
            command.args(["-incoming", "defer"]);
        }
        let log = folder.join(format!("{name}.log"));
        command.stdout(Stdio::null()).stderr(std::fs::File::create(&log)?);
        let process = Process::start("qemu-system-x86_64", &mut command)?;
        let stream = wait_for(PATIENCE, "QEMU's QMP socket", || Ok(UnixStream::connect(&control).ok()));
        let stream = stream.with_context(|| format!("QEMU {name} said: {}", read_text(&log)))?;
        stream.set_read_timeout(Some(Duration::from_secs(60)))?;
        let mut qemu = Qemu { process, control: BufReader::new(stream), serial };
        let mut greeting = String::new();
        qemu.control.read_line(&mut greeting)?;
        qemu.ask("qmp_capabilities", json!({}))?;
        Ok(qemu)
    }

    fn ask(&mut self, command: &str, arguments: Value) -> Result<Value> {
        let line = format!("{}\n", json!({"execute": command, "arguments": arguments}));
        self.control.get_mut().write_all(line.as_bytes())?;
        loop {
            let mut answer = String::new();
            if self.control.read_line(&mut answer)? == 0 {
                bail!("QEMU closed its QMP socket at {command}");
            }
            let answer: Value = serde_json::from_str(&answer)?;
            if let Some(error) = answer.get("error") {
                bail!("QEMU refused {command}: {error}");
            }
            if let Some(value) = answer.get("return") {
                return Ok(value.clone());
            }
        }
    }

    fn configure(&mut self, setup: &QemuSetup) -> Result<()> {
        let mut parameters = json!({"downtime-limit": setup.downtime_ms, "max-bandwidth": 100_000_000_000_u64});
        if setup.multifd_channels > 0 {
            self.ask("migrate-set-capabilities", json!({"capabilities": [{"capability": "multifd", "state": true}]}))?;
            parameters["multifd-channels"] = json!(setup.multifd_channels);
        }
        self.ask("migrate-set-parameters", parameters)?;
        Ok(())
    }
}

/// CPU seconds that process `pid` has used so far, from `/proc`.
///
/// # Errors
/// The process is gone, or `/proc` is not there.
pub fn cpu_seconds(pid: u32) -> Result<f64> {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat"))?;
    let after = stat.rsplit_once(')').context("no name in /proc/PID/stat")?.1;
    let fields: Vec<&str> = after.split_whitespace().collect();
    let ticks: f64 = [11, 12].iter().filter_map(|at| fields.get(*at)?.parse::<f64>().ok()).sum();
    let hertz = nix::unistd::sysconf(nix::unistd::SysconfVar::CLK_TCK)?.context("no CLK_TCK")?;
    #[allow(clippy::cast_precision_loss, reason = "100 ticks a second")]
    Ok(ticks / hertz as f64)
}

/// Starts two QEMUs, waits until the guest says `ready`, migrates it once between the two hosts and measures.
///
/// # Errors
/// QEMU is missing, the guest does not come up, or the migration fails; says what QEMU said.
pub fn migrate(setup: &QemuSetup, from: &Host, to: &Host, ready: &str) -> Result<QemuResult> {
    let folder = tempfile::Builder::new().prefix("limosa-qemu-").tempdir()?;
    let mut source = Qemu::start(setup, from, folder.path(), "source", false)?;
    let serial = source.serial.clone();
    wait_for(PATIENCE, "the guest's ready line", || Ok(read_text(&serial).contains(ready).then_some(())))
        .with_context(|| format!("the guest in QEMU said: {}", read_text(&serial)))?;
    let mut destination = Qemu::start(setup, to, folder.path(), "destination", true)?;
    source.configure(setup)?;
    destination.configure(setup)?;
    let uri = format!("tcp:{}:{PORT}", to.ip);
    destination.ask("migrate-incoming", json!({"uri": uri}))?;
    let before = (cpu_seconds(source.process.pid())?, cpu_seconds(destination.process.pid())?);
    source.ask("migrate", json!({"uri": uri}))?;
    let info = loop {
        std::thread::sleep(Duration::from_millis(10));
        let info = source.ask("query-migrate", json!({}))?;
        match info["status"].as_str() {
            Some("completed") => break info,
            Some("failed" | "cancelled") => bail!("QEMU's migration failed: {info}"),
            _ => {}
        }
    };
    let after = (cpu_seconds(source.process.pid())?, cpu_seconds(destination.process.pid())?);
    Ok(QemuResult {
        total_ms: info["total-time"].as_f64().unwrap_or_default(),
        downtime_ms: info["downtime"].as_f64().unwrap_or_default(),
        cpu_source: after.0 - before.0,
        cpu_destination: after.1 - before.1,
        bytes: info["ram"]["transferred"].as_u64().unwrap_or_default(),
    })
}
