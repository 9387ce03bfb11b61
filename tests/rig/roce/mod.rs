//! The soft-RoCE lab: two machines, alpha and beta, under QEMU's own processor emulation, with Debian's kernel on the outer
//! machine's own root. Each has soft-RoCE on a shared Ethernet, KVM (nested SVM) and netem, and runs the binaries that were
//! just built. Not fast: about a fiftieth of the outer machine, so that its figures compare only with each other.
//!
//! A lab is made and held by a process of its own, the keeper (`keeper`), that ends with whoever asked for it. Commands get
//! in by a control network that nobody inside sees (`wire`, `inside`, `machine`). The lab's command is `tests/rig/bin/lab.rs`.

pub mod inside;
pub mod keeper;
pub mod kernel;
pub mod machine;
pub mod station;
pub mod wire;

pub use keeper::{Event, Ready};
pub use machine::{Machine, Output, Running, Task};
pub use station::{Answer, Station};

use crate::process::{self, wait_for};
use crate::{Host, netns};
use anyhow::{Context, Result, bail, ensure};
use serde::{Deserialize, Serialize};
use std::fs::File;
use std::io::{BufRead, BufReader, Write};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, Command, Stdio};
use std::time::Duration;

/// The usual processor. Without XSAVE: QEMU's emulation of SVM (7.2) does not tell KVM when a guest sets XCR0, so that KVM would
/// run it with another one, and it would die of that sooner or later.
pub const CPU_MODEL: &str = "max,-xsave";

/// How a lab is made.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Spec {
    /// Memory of each machine in MiB.
    pub memory_mib: u32,
    /// Processors of each machine.
    pub cpus: u32,
    /// QEMU's model of the processors of alpha and of beta (`-cpu`).
    pub cpu_models: [String; 2],
    /// The lab ends by itself after so many seconds.
    pub limit_seconds: u64,
    /// Where the folder with its logs is made.
    pub folder: PathBuf,
    /// A file that says while the lab is up where it is.
    pub register: Option<PathBuf>,
}

impl Spec {
    /// Two machines of one processor and 3 GiB, for at most half an hour.
    ///
    /// # Errors
    /// There is no target folder.
    pub fn new() -> Result<Spec> {
        let folder = runs_folder()?;
        let cpu_models = [CPU_MODEL.to_owned(), CPU_MODEL.to_owned()];
        Ok(Spec { memory_mib: 3072, cpus: 1, cpu_models, limit_seconds: 1800, folder, register: None })
    }
}

/// Where labs leave their logs: `target/PROFILE/lab-runs`.
///
/// # Errors
/// There is no target folder.
pub fn runs_folder() -> Result<PathBuf> {
    Ok(lab_bin()?.parent().context("the lab's program lies in a folder")?.join("lab-runs"))
}

/// The program that keeps labs: this one if it is it, LIMOSA_LAB_BIN, or `lab` beside this test, built when it is not there.
///
/// # Errors
/// It is not there and cannot be built.
pub fn lab_bin() -> Result<PathBuf> {
    if let Some(path) = std::env::var_os("LIMOSA_LAB_BIN") {
        return Ok(PathBuf::from(path));
    }
    let own = std::env::current_exe().context("this program's own path")?;
    if own.file_name().is_some_and(|name| name == "lab") {
        return Ok(own);
    }
    let path = process::target_dir()?.join("lab");
    if path.exists() { Ok(path) } else { process::cargo_build(&["-p", "rig", "--bin", "lab"], "lab") }
}

/// What this machine lacks for a lab of machines, in words; nothing when all is there.
pub fn missing() -> Option<String> {
    if !nix::unistd::geteuid().is_root() {
        return Some("the soft-RoCE lab needs root (TAPs, namespaces, and the root as the machines see it)".into());
    }
    let programs = [
        ("qemu-system-x86_64", "qemu-system-x86"),
        ("busybox", "busybox-static"),
        ("cpio", "cpio"),
        ("ip", "iproute2"),
        ("rdma", "iproute2"),
        ("modprobe", "kmod"),
        ("setpriv", "util-linux"),
    ];
    let lacking = programs.into_iter().find(|(program, _)| !Host::has(program));
    if let Some((program, package)) = lacking {
        return Some(format!("the soft-RoCE lab needs {program} (apt-get install {package})"));
    }
    if !Path::new("/dev/net/tun").exists() {
        return Some("the soft-RoCE lab needs /dev/net/tun".into());
    }
    kernel::missing()
}

/// What [`Machines::boot_with`] tells.
#[derive(Debug, Clone, Copy)]
pub enum Progress<'a> {
    /// The process id of the keeper; SIGTERM to it ends the lab cleanly at any time.
    Keeper(u32),
    /// A step is done.
    Step(&'a str),
}

/// A lab that is up. Dropping it takes everything away.
#[derive(Debug)]
pub struct Machines {
    ready: Ready,
    keeper: Child,
    leash: Option<ChildStdin>,
}

impl Machines {
    /// Boots a lab and waits until both machines take commands: 10 to 30 seconds on two idle cores.
    ///
    /// # Errors
    /// What failed, with the end of the machine's console.
    pub fn boot(spec: &Spec) -> Result<Machines> {
        Machines::boot_with(spec, |_| {})
    }

    /// Likewise, and tells how it goes.
    ///
    /// # Errors
    /// See [`Machines::boot`].
    pub fn boot_with(spec: &Spec, mut tell: impl FnMut(Progress<'_>)) -> Result<Machines> {
        let mut command = Command::new(lab_bin()?);
        // A group of its own: what ends this process by the keyboard leaves the keeper the time to clean up.
        command.arg("keep").process_group(0).stdin(Stdio::piped()).stdout(Stdio::piped());
        // A keeper may outlive its caller: it must not hold the caller's standard error open.
        std::fs::create_dir_all(&spec.folder).with_context(|| format!("the labs' folder {}", spec.folder.display()))?;
        command.stderr(File::options().create(true).append(true).open(spec.folder.join("keeper.log"))?);
        let mut keeper = command.spawn().context("cannot start the lab's keeper")?;
        tell(Progress::Keeper(keeper.id()));
        let leash = keeper.stdin.take();
        let events = keeper.stdout.take().context("the keeper has no output")?;
        let (name, folder) = (String::new(), PathBuf::new());
        let nothing = Ready { keeper: 0, name, folder, machines: Vec::new(), since: 0, limit_seconds: 0, problems: Vec::new() };
        let mut machines = Machines { ready: nothing, keeper, leash };
        machines.tell_keeper(&serde_json::to_string(spec)?)?;
        for line in BufReader::new(events).lines() {
            match serde_json::from_str(&line?)? {
                Event::Step(text) => tell(Progress::Step(&text)),
                Event::Failed(why) => bail!("the lab did not come up: {why}"),
                Event::Ready(ready) => {
                    ensure!(ready.machines.len() == 2, "a lab of {} machines", ready.machines.len());
                    machines.ready = ready;
                    return Ok(machines);
                }
            }
        }
        bail!("the lab's keeper ended without a word")
    }

    /// The lab as its keeper describes it.
    pub fn ready(&self) -> &Ready {
        &self.ready
    }

    /// The first machine, 10.77.0.1.
    ///
    /// # Panics
    /// Never: there are two, or it did not boot.
    #[allow(clippy::indexing_slicing, reason = "boot_with makes sure of two")]
    pub fn alpha(&self) -> &Machine {
        &self.ready.machines[0]
    }

    /// The second machine, 10.77.0.2.
    ///
    /// # Panics
    /// Never: there are two, or it did not boot.
    #[allow(clippy::indexing_slicing, reason = "boot_with makes sure of two")]
    pub fn beta(&self) -> &Machine {
        &self.ready.machines[1]
    }

    /// Leaves the logs in their folder when the lab ends.
    pub fn keep_logs(&mut self) {
        let _ = self.tell_keeper("keep logs");
    }

    /// Likewise, and prints where they are and how they end.
    #[allow(clippy::print_stderr)]
    fn save_logs(&mut self) {
        self.keep_logs();
        for machine in &self.ready.machines {
            let console = crate::command::tail(&crate::command::read_text(&machine.console), 15);
            eprintln!("==== console of {} ({})\n{console}", machine.name, machine.console.display());
        }
    }

    /// Lets the lab live on without this process, until `lab down`; gives what is needed to find it.
    ///
    /// # Errors
    /// The keeper is gone.
    pub fn leave(mut self) -> Result<Ready> {
        self.tell_keeper("stay")?;
        self.leash = None;
        Ok(self.ready.clone())
    }

    /// Takes everything away, and holds that nothing is left.
    ///
    /// # Errors
    /// Something is left: what.
    pub fn end(mut self) -> Result<()> {
        self.close();
        let (name, keeper) = (self.ready.name.clone(), self.keeper.id());
        drop(self);
        let left = leftovers(&name, keeper);
        ensure!(left.is_empty(), "left over of the lab: {}", left.join(", "));
        Ok(())
    }

    fn tell_keeper(&mut self, word: &str) -> Result<()> {
        let leash = self.leash.as_mut().context("the keeper is gone")?;
        leash.write_all(format!("{word}\n").as_bytes()).and_then(|()| leash.flush()).context("the keeper is gone")
    }

    /// Lets the leash go and waits for the keeper.
    fn close(&mut self) {
        if self.leash.take().is_none() {
            return;
        }
        let ended = wait_for(Duration::from_secs(20), "the keeper's end", || Ok(self.keeper.try_wait()?));
        if !ended.is_ok_and(|status| status.success()) {
            let _ = self.keeper.kill();
            let _ = self.keeper.wait();
            netns::sweep();
        }
    }
}

impl Drop for Machines {
    fn drop(&mut self) {
        if std::thread::panicking() && self.leash.is_some() {
            self.save_logs();
        }
        self.close();
    }
}

/// What is there of a lab that should be gone: its namespace, QEMUs of its keeper.
pub fn leftovers(name: &str, keeper: u32) -> Vec<String> {
    let mut found: Vec<String> = netns::named(name).into_iter().map(|name| format!("namespace {name}")).collect();
    if process::alive(keeper) {
        found.push(format!("its keeper {keeper}"));
    }
    found.extend(qemus(name).into_iter().map(|pid| format!("QEMU {pid}")));
    found
}

/// The process ids of a lab's QEMUs.
pub fn qemus(name: &str) -> Vec<u32> {
    let mark = format!("/{name}/");
    let ours = |pid: &u32| {
        let words = process::words(*pid);
        words.iter().any(|word| word.contains("qemu-system")) && words.iter().any(|word| word.contains(&mark))
    };
    process::all().into_iter().filter(ours).collect()
}

/// Runs a test in a lab of machines, of which the tests of this target folder have one at a time; skips where that is
/// impossible. After a success it holds that nothing is left; after a failure it prints where the logs are.
///
/// # Panics
/// When the test fails: that is its way to say so.
pub fn with_machines(test: impl FnOnce(&Machines) -> Result<()>) {
    with_machines_like(Ok, test);
}

/// Likewise, with machines that are not the usual ones.
///
/// # Panics
/// When the test fails.
#[allow(clippy::panic)]
pub fn with_machines_like(change: impl FnOnce(Spec) -> Result<Spec>, test: impl FnOnce(&Machines) -> Result<()>) {
    if let Some(reason) = missing() {
        crate::skip(&reason);
        return;
    }
    let result = process::lock("rig-machines").and_then(|_lock| {
        let mut machines = Machines::boot(&change(Spec::new()?)?)?;
        let result = test(&machines);
        if result.is_err() {
            machines.save_logs();
        }
        result.and(machines.end())
    });
    if let Err(error) = result {
        panic!("{error:#}");
    }
}

/// Builds a test of a package and gives its program, to be run in a machine of the lab; `words` are further words for cargo.
///
/// # Errors
/// It does not build.
pub fn test_binary(package: &str, test: &str, words: &[&str]) -> Result<PathBuf> {
    let _lock = process::lock("rig-build")?;
    let mut command = process::cargo();
    // Of the whole workspace, so that it is built with the same features as by `make test`: nothing is compiled twice.
    command.args(["test", "--quiet", "--workspace", "--test", test, "--no-run", "--message-format=json"]).args(words);
    let output = command.output().context("cannot start cargo")?;
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    ensure!(output.status.success(), "the test {test} of {package}: {}", String::from_utf8_lossy(&output.stderr));
    let messages = text.lines().filter_map(|line| serde_json::from_str::<serde_json::Value>(line).ok());
    let of = |message: &serde_json::Value| message["package_id"].as_str().is_some_and(|id| id.contains(&package_folder(package)));
    let mut programs = messages.filter(|message| message["target"]["name"] == test && of(message));
    let program = programs.find_map(|message| Some(PathBuf::from(message["executable"].as_str()?)));
    program.with_context(|| format!("cargo built no program for the test {test} of {package}"))
}

/// How cargo's id of a workspace package names it: by its folder, which is the last part of its name; the root's by its own name too.
fn package_folder(package: &str) -> String {
    if package == "rig" {
        return "#rig@".into();
    }
    format!("/{}#", package.rsplit('-').next().unwrap_or(package))
}

/// A word as a shell takes it for one.
pub fn shell_quoted(word: &str) -> String {
    format!("'{}'", word.replace('\'', r"'\''"))
}
