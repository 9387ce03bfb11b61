//! Processes that tests start, stop and kill, always by their process id, and the one binary that they start.
//! It has no idea what the processes do.

use anyhow::{Context, Result, bail, ensure};
use nix::fcntl::{Flock, FlockArg};
use nix::sys::signal::Signal;
use nix::unistd::Pid;
use std::fs::{File, OpenOptions};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::OnceLock;
use std::time::{Duration, Instant};

/// Waits until a question has an answer; the words say for what.
pub fn wait_for<T>(limit: Duration, what: &str, mut ask: impl FnMut() -> Result<Option<T>>) -> Result<T> {
    let start = Instant::now();
    loop {
        if let Some(answer) = ask()? {
            return Ok(answer);
        }
        if start.elapsed() > limit {
            bail!("waited {:.1} s in vain for {what}", limit.as_secs_f64());
        }
        std::thread::sleep(Duration::from_millis(10));
    }
}

/// Every process id of this machine.
pub fn all() -> Vec<u32> {
    let Ok(entries) = std::fs::read_dir("/proc") else {
        return Vec::new();
    };
    entries.flatten().filter_map(|e| e.file_name().to_str().and_then(|name| name.parse().ok())).collect()
}

/// Whether a process is there and no zombie.
pub fn alive(pid: u32) -> bool {
    match std::fs::read_to_string(format!("/proc/{pid}/stat")) {
        Ok(stat) => !stat.rsplit(')').next().is_some_and(|rest| rest.trim_start().starts_with('Z')),
        Err(_) => false,
    }
}

/// Whether a process has closed all that it had open: its first thread is a zombie before the others have ended.
pub fn is_over(pid: u32) -> bool {
    let threads = std::fs::read_dir(format!("/proc/{pid}/task")).map_or(0, Iterator::count);
    !alive(pid) && threads <= 1
}

/// Whether a process stands still by SIGSTOP.
pub fn is_stopped(pid: u32) -> bool {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    stat.rsplit(')').next().is_some_and(|rest| rest.trim_start().starts_with('T'))
}

/// The words of a process's command line.
pub fn words(pid: u32) -> Vec<String> {
    let bytes = std::fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
    let parts = bytes.split(|b| *b == 0).filter(|part| !part.is_empty());
    parts.map(|part| String::from_utf8_lossy(part).into_owned()).collect()
}

/// How many memory files (memfd) a process holds open or mapped.
pub fn memfds(pid: u32) -> usize {
    let Ok(entries) = std::fs::read_dir(format!("/proc/{pid}/fd")) else {
        return 0;
    };
    let open = entries.flatten().filter_map(|e| std::fs::read_link(e.path()).ok());
    let open = open.filter(|target| target.to_string_lossy().starts_with("/memfd:")).count();
    let maps = std::fs::read_to_string(format!("/proc/{pid}/maps")).unwrap_or_default();
    open + maps.lines().filter(|line| line.contains("/memfd:")).count()
}

/// Kibibytes of memory that a process has: its own ("RssAnon"), or all that is mapped and there ("VmRSS").
pub fn memory_kib(pid: u32, field: &str) -> Result<u64> {
    let text = std::fs::read_to_string(format!("/proc/{pid}/status"))?;
    let line = text.lines().find_map(|line| line.strip_prefix(field)?.strip_prefix(':'));
    let number = line.and_then(|line| line.split_whitespace().next()).with_context(|| format!("{field} of {pid}"))?;
    Ok(number.parse()?)
}

/// Ends a process at once, as `kill -9` does.
pub fn kill(pid: u32) {
    signal(pid, Signal::SIGKILL);
}

/// Sends a signal; a process that is gone is no error.
pub fn signal(pid: u32, signal: Signal) {
    if let Ok(raw) = i32::try_from(pid) {
        let _ = nix::sys::signal::kill(Pid::from_raw(raw), signal);
    }
}

/// The folder of the profile that this test was built in (`target/debug`).
pub fn target_dir() -> Result<PathBuf> {
    let exe = std::env::current_exe().context("this test's own path")?;
    let dir = exe.parent().and_then(Path::parent).context("a test lies in target/PROFILE/deps")?;
    Ok(dir.to_owned())
}

/// Takes a lock that all test processes of this target folder share, for as long as the answer lives.
pub fn lock(name: &str) -> Result<Flock<File>> {
    let path = target_dir()?.join(format!("{name}.lock"));
    let file = OpenOptions::new().create(true).truncate(false).write(true).open(&path)?;
    Flock::lock(file, FlockArg::LockExclusive).map_err(|(_, errno)| anyhow::anyhow!("cannot lock {}: {errno}", path.display()))
}

/// Cargo, as a person would start it. What cargo itself tells a test of its package is taken away: build scripts that ask for those
/// names (`ring`'s) would run again, and all that stands on them would be built anew, for this test and then again for the next person.
pub(crate) fn cargo() -> Command {
    let mut command = Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    let ours = |name: &str| name.starts_with("CARGO_PKG_") || name.starts_with("CARGO_MANIFEST_") || name.starts_with("NEXTEST");
    std::env::vars_os().map(|(name, _)| name).filter(|name| name.to_str().is_some_and(ours)).for_each(|name| {
        command.env_remove(name);
    });
    command.current_dir(env!("CARGO_MANIFEST_DIR")).stdin(Stdio::null());
    command
}

/// Builds something of this workspace with cargo, in the profile of this test, and gives the file that came out.
pub fn cargo_build(words: &[&str], file: &str) -> Result<PathBuf> {
    let dir = target_dir()?;
    let _lock = lock("rig-build")?;
    let path = dir.join(file);
    let mut command = cargo();
    command.arg("build").args(words);
    if dir.ends_with("release") {
        command.arg("--release");
    }
    let output = command.output().context("cannot start cargo")?;
    ensure!(
        output.status.success() && path.exists(),
        "cargo build {} failed:\n{}",
        words.join(" "),
        String::from_utf8_lossy(&output.stderr)
    );
    Ok(path)
}

/// The binary under test: LIMOSA_BIN, or `limosa` beside this test's profile folder, built when it is not there.
pub fn limosa_bin() -> Result<PathBuf> {
    static BIN: OnceLock<PathBuf> = OnceLock::new();
    if let Some(path) = BIN.get() {
        return Ok(path.clone());
    }
    let path = match std::env::var_os("LIMOSA_BIN") {
        Some(path) => PathBuf::from(path),
        None => {
            let path = target_dir()?.join("limosa");
            if path.exists() { path } else { cargo_build(&["-p", "limosa"], "limosa")? }
        }
    };
    ensure!(path.exists(), "there is no binary at {}", path.display());
    Ok(BIN.get_or_init(|| path).clone())
}

/// A child process that is killed when it is dropped.
#[derive(Debug)]
pub struct Process {
    child: Child,
    what: String,
}

impl Process {
    /// Starts a command; standard input is closed, the rest is as the command says.
    pub fn start(what: &str, command: &mut Command) -> Result<Process> {
        let child = command.stdin(Stdio::null()).spawn().with_context(|| format!("cannot start {what}"))?;
        Ok(Process { child, what: what.to_owned() })
    }

    /// Its process id.
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Sends it a signal.
    pub fn signal(&self, which: Signal) {
        signal(self.pid(), which);
    }

    /// `kill -9`, and waits for its end.
    pub fn kill(&mut self) -> Result<()> {
        self.child.kill().ok();
        self.child.wait().with_context(|| format!("waiting for {}", self.what))?;
        Ok(())
    }

    /// How it ended, if it has.
    pub fn ended(&mut self) -> Result<Option<ExitStatus>> {
        Ok(self.child.try_wait()?)
    }

    /// Waits for its end.
    pub fn wait(&mut self, limit: Duration) -> Result<ExitStatus> {
        let what = format!("the end of {}", self.what);
        wait_for(limit, &what, || Ok(self.child.try_wait()?))
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
