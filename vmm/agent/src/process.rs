//! VMM processes: starting them so that they outlive the agent, their CPU time, their end.
//! It knows nothing of what they run.

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::process::CommandExt as _;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

/// A process that this agent started.
#[derive(Debug)]
pub struct Process {
    child: Child,
}

impl Process {
    /// Starts `program`, in a process group of its own, with its output going to `NAME.log` and its errors to
    /// `NAME.vmm.log` in `logs`.
    ///
    /// # Errors
    /// The program or the log files cannot be opened.
    pub fn start(program: &[String], arguments: &[String], logs: &Path, name: &str) -> io::Result<Process> {
        let (first, rest) = program.split_first().ok_or_else(|| io::Error::other("no program for guests is configured"))?;
        let log = |suffix: &str| -> io::Result<File> {
            OpenOptions::new().create(true).append(true).open(logs.join(format!("{name}{suffix}")))
        };
        let mut command = Command::new(first);
        command.args(rest).args(arguments).stdin(Stdio::null()).stdout(log(".log")?).stderr(log(".vmm.log")?);
        // A group of its own: what ends the agent's terminal or service does not end the guest.
        command.process_group(0).current_dir("/");
        Ok(Process { child: command.spawn()? })
    }

    /// Its process id.
    #[must_use]
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Whether it has ended; how, in words.
    pub fn ended(&mut self) -> Option<String> {
        match self.child.try_wait() {
            Ok(None) => None,
            Ok(Some(status)) => Some(status.to_string()),
            Err(error) => Some(format!("it cannot be waited for: {error}")),
        }
    }

    /// Waits until it has ended by itself; ends it after `patience`.
    pub fn end_after(&mut self, patience: Duration) {
        let until = Instant::now() + patience;
        while Instant::now() < until {
            if self.ended().is_some() {
                return;
            }
            std::thread::sleep(Duration::from_millis(2));
        }
        // It may have ended meanwhile; then there is nothing to do.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// When process `pid` started, in clock ticks since boot: with the pid it names one process for ever.
#[must_use]
pub fn birth(pid: u32) -> Option<u64> {
    stat_field(pid, 19)
}

/// Ends process `pid` if it is still the one that was born at `birth`.
pub fn kill_born(pid: u32, born: u64) {
    if birth(pid) == Some(born)
        && let Ok(pid) = i32::try_from(pid)
    {
        let _ = kill(Pid::from_raw(pid), Signal::SIGKILL);
    }
}

/// CPU seconds that process `pid` has used, apart from the threads that run the guest (`vcpu…`); 0 if it is gone.
/// Threads that have ended are not counted: a VMM's live as long as it does.
#[must_use]
pub fn overhead_seconds(pid: u32) -> f64 {
    let Ok(tasks) = std::fs::read_dir(format!("/proc/{pid}/task")) else { return 0.0 };
    let mut ns = 0_u64;
    for task in tasks.flatten() {
        let read = |name: &str| std::fs::read_to_string(task.path().join(name)).unwrap_or_default();
        if read("comm").starts_with("vcpu") {
            continue;
        }
        let on_cpu = read("schedstat").split_whitespace().next().and_then(|first| first.parse::<u64>().ok());
        ns = ns.saturating_add(on_cpu.unwrap_or(0));
    }
    ns as f64 / 1e9
}

/// Field `index` of /proc/PID/stat, counted from the one after the process's name.
fn stat_field(pid: u32, index: usize) -> Option<u64> {
    let text = std::fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    let (_, fields) = text.rsplit_once(')')?;
    fields.split_whitespace().nth(index)?.parse().ok()
}

/// Free memory of this host in bytes, as the kernel estimates it.
#[must_use]
pub fn memory_available() -> u64 {
    let text = std::fs::read_to_string("/proc/meminfo").unwrap_or_default();
    let line = text.lines().find_map(|line| line.strip_prefix("MemAvailable:"));
    let kib = line.and_then(|rest| rest.split_whitespace().next()?.parse::<u64>().ok());
    kib.unwrap_or(0).saturating_mul(1024)
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    fn start(script: &str, dir: &Path) -> Process {
        Process::start(&["sh".into(), "-c".into()], &[script.into()], dir, "web").unwrap()
    }

    #[test]
    fn output_goes_to_files_and_the_end_is_seen() {
        let dir = tempfile::tempdir().unwrap();
        let mut process = start("echo out; echo err >&2", dir.path());
        process.end_after(Duration::from_secs(10));
        assert!(process.ended().unwrap().contains("exit status: 0"));
        assert_eq!(std::fs::read_to_string(dir.path().join("web.log")).unwrap(), "out\n");
        assert_eq!(std::fs::read_to_string(dir.path().join("web.vmm.log")).unwrap(), "err\n");
        assert!(Process::start(&[], &[], dir.path(), "web").is_err());
    }

    #[test]
    fn only_the_process_that_is_meant_is_ended() {
        let dir = tempfile::tempdir().unwrap();
        let mut process = start("sleep 30", dir.path());
        let born = birth(process.pid()).unwrap();
        kill_born(process.pid(), born + 1);
        assert!(process.ended().is_none());
        kill_born(process.pid(), born);
        process.end_after(Duration::from_secs(5));
        assert!(process.ended().unwrap().contains("signal: 9"));
        assert!(memory_available() > 0 && overhead_seconds(std::process::id()) > 0.0);
    }
}
