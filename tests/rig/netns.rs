//! Network namespaces with names of their own, everything that runs inside them, and their end.
//! A namespace that is dropped takes its processes, links and name with it, also when a test panics.
//! It knows nothing of hosts, agents or guests.

use crate::process;
use anyhow::{Context, Result, bail, ensure};
use nix::sched::CloneFlags;
use serde::Deserialize;
use std::fs::File;
use std::os::unix::fs::MetadataExt;
use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

/// What every namespace of the rig begins with; the process id of the test follows, so that a later run can sweep.
pub const PREFIX: &str = "lt";

/// A named network namespace that this process made.
#[derive(Debug)]
pub struct Netns {
    name: String,
    inode: u64,
}

/// One link as `ip -j -d link` shows it.
#[derive(Debug, Clone, Deserialize)]
pub struct Link {
    /// Index in its namespace.
    #[serde(default)]
    pub ifindex: u32,
    /// Name.
    pub ifname: String,
    /// The bridge that it is a port of.
    pub master: Option<String>,
    /// What it is.
    #[serde(default)]
    pub linkinfo: LinkInfo,
}

/// The kind of a link.
#[derive(Debug, Clone, Default, Deserialize)]
pub struct LinkInfo {
    /// "tun", "veth", "bridge", ...
    pub info_kind: Option<String>,
}

/// A name no other lab on this machine has: `lt<pid>-<counter>`.
pub fn unique_name() -> String {
    static COUNTER: AtomicU32 = AtomicU32::new(1);
    format!("{PREFIX}{}-{}", std::process::id(), COUNTER.fetch_add(1, Ordering::Relaxed))
}

/// Runs a program and gives its standard output; a failure carries its standard error.
pub fn run(program: &str, args: &[&str]) -> Result<String> {
    let output =
        Command::new(program).args(args).stdin(Stdio::null()).output().with_context(|| format!("cannot start {program}"))?;
    ensure!(
        output.status.success(),
        "{program} {}: {}: {}",
        args.join(" "),
        output.status,
        String::from_utf8_lossy(&output.stderr).trim()
    );
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

impl Netns {
    /// Makes a namespace and brings its loopback up.
    pub fn create(name: &str) -> Result<Netns> {
        run("ip", &["netns", "add", name])?;
        let inode = inode_of(name)?;
        let netns = Netns { name: name.to_owned(), inode };
        netns.ip("link set lo up")?;
        Ok(netns)
    }

    /// Its name, as `ip netns` shows it.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Runs `ip -n NAME WORDS` (words split at blanks).
    pub fn ip(&self, words: &str) -> Result<String> {
        let mut args = vec!["-n", self.name.as_str()];
        args.extend(words.split_whitespace());
        run("ip", &args)
    }

    /// A command that will run inside; `ip netns exec` replaces itself, so the child's pid is the program's.
    pub fn command(&self, program: impl AsRef<std::ffi::OsStr>) -> Command {
        let mut command = Command::new("ip");
        command.args(["netns", "exec", &self.name]).arg(program);
        command
    }

    /// Moves the calling thread into the namespace, for good. Only for threads made for that.
    pub fn enter(&self) -> Result<()> {
        enter(&self.name)
    }

    /// Runs a closure on a thread inside the namespace and waits for it.
    pub fn within<T: Send>(&self, work: impl FnOnce() -> Result<T> + Send) -> Result<T> {
        within(&self.name, work)
    }

    /// The links inside.
    pub fn links(&self) -> Result<Vec<Link>> {
        links_of(&self.name)
    }

    /// The TAPs inside, by name.
    pub fn taps(&self) -> Result<Vec<String>> {
        let links = self.links()?;
        Ok(links.into_iter().filter(|l| l.linkinfo.info_kind.as_deref() == Some("tun")).map(|l| l.ifname).collect())
    }

    /// The processes whose network namespace this is.
    pub fn processes(&self) -> Vec<u32> {
        processes_in(self.inode)
    }
}

impl Drop for Netns {
    fn drop(&mut self) {
        remove(&self.name, self.inode);
    }
}

fn path_of(name: &str) -> PathBuf {
    PathBuf::from("/run/netns").join(name)
}

fn inode_of(name: &str) -> Result<u64> {
    let path = path_of(name);
    Ok(std::fs::metadata(&path).with_context(|| format!("no namespace at {}", path.display()))?.ino())
}

/// The links inside the namespace of that name.
pub fn links_of(name: &str) -> Result<Vec<Link>> {
    let text = run("ip", &["-n", name, "-j", "-d", "link", "show"])?;
    serde_json::from_str(&text).with_context(|| format!("ip -j link in {name}"))
}

/// Runs a closure on a thread inside the namespace of that name and waits for it.
pub fn within<T: Send>(name: &str, work: impl FnOnce() -> Result<T> + Send) -> Result<T> {
    std::thread::scope(|scope| {
        let thread = scope.spawn(|| {
            enter(name)?;
            work()
        });
        thread.join().unwrap_or_else(|_| bail!("the thread inside {name} panicked"))
    })
}

/// Moves the calling thread into a named namespace, for good.
pub fn enter(name: &str) -> Result<()> {
    let file = File::open(path_of(name)).with_context(|| format!("no namespace {name}"))?;
    nix::sched::setns(&file, CloneFlags::CLONE_NEWNET).with_context(|| format!("cannot enter {name}"))
}

fn processes_in(inode: u64) -> Vec<u32> {
    let me = std::process::id();
    process::all()
        .into_iter()
        .filter(|pid| *pid != me)
        .filter(|pid| std::fs::metadata(format!("/proc/{pid}/ns/net")).is_ok_and(|m| m.ino() == inode))
        .collect()
}

/// Ends what runs in a namespace, then takes its name away. The kernel frees links and TAPs with the last user.
fn remove(name: &str, inode: u64) {
    for _ in 0..100 {
        let pids = processes_in(inode);
        if pids.is_empty() {
            break;
        }
        for pid in pids {
            process::kill(pid);
        }
        std::thread::sleep(Duration::from_millis(20));
    }
    let _ = run("ip", &["netns", "del", name]);
}

/// The namespaces of this machine whose names begin so.
pub fn named(prefix: &str) -> Vec<String> {
    let Ok(entries) = std::fs::read_dir("/run/netns") else {
        return Vec::new();
    };
    let names = entries.flatten().map(|e| e.file_name().to_string_lossy().into_owned());
    names.filter(|name| name.starts_with(prefix)).collect()
}

/// Removes what test processes left behind that were killed before they could clean up: their pid is gone.
pub fn sweep() {
    for name in named(PREFIX) {
        let Some(pid) = name.trim_start_matches(PREFIX).split('-').next().and_then(|p| p.parse::<u32>().ok()) else {
            continue;
        };
        if process::alive(pid) {
            continue;
        }
        if let Ok(inode) = inode_of(&name) {
            remove(&name, inode);
        }
    }
}
