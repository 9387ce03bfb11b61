//! VMM processes: starting them so that they outlive the agent, their CPU time, their end.
//! It knows nothing of what they run.

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use std::fs::{File, OpenOptions};
use std::io::{self, Read as _};
use std::os::unix::process::CommandExt as _;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::mpsc::{self, Receiver};
use std::time::{Duration, Instant};

/// Which of /proc/PID/stat's fields, from the one after the process's name, is when it started.
const BIRTH: usize = 19;

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

/// Runs `program` to its end and gives what it printed. It is ended when it prints more than `bytes_max` or takes longer than
/// `patience`. Blocks as long.
///
/// # Errors
/// Why there is nothing of it, in words; with its own last ones, if it had some.
pub fn output(program: &[String], arguments: &[String], bytes_max: u64, patience: Duration) -> Result<Vec<u8>, String> {
    let (first, rest) = program.split_first().ok_or("no program for guests is configured")?;
    let mut command = Command::new(first);
    command.args(rest).args(arguments).stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped()).current_dir("/");
    let mut child = command.spawn().map_err(|e| format!("{first} cannot be started: {e}"))?;
    let (printed, said) = (reader(child.stdout.take(), bytes_max), reader(child.stderr.take(), 4096));
    let mut process = Process { child };
    let until = Instant::now() + patience;
    let late = || format!("{first} did not end within {} s", patience.as_secs());
    // One that prints too much is read no further, and ends by that.
    let ended = loop {
        match process.ended() {
            Some(how) => break how,
            None if Instant::now() > until => {
                process.end_after(Duration::ZERO);
                return Err(late());
            }
            None => std::thread::sleep(Duration::from_millis(2)),
        }
    };
    // A process that it left behind may hold the pipes open: it is not waited for.
    let left = || until.saturating_duration_since(Instant::now()).max(Duration::from_millis(100));
    let printed = printed.recv_timeout(left()).map_err(|_| late())?;
    if printed.len() as u64 > bytes_max {
        return Err(format!("{first} printed more than {bytes_max} bytes"));
    }
    if !process.child.wait().is_ok_and(|status| status.success()) {
        let said = String::from_utf8_lossy(&said.recv_timeout(left()).unwrap_or_default()).into_owned();
        let last = said.lines().rev().find(|line| !line.trim().is_empty()).unwrap_or_default();
        return Err(format!("{first} ended with {ended}: {}", last.trim_start_matches("limosa: ")));
    }
    Ok(printed)
}

/// Reads one byte more than `bytes_max` at most, on a thread of its own.
fn reader(pipe: Option<impl io::Read + Send + 'static>, bytes_max: u64) -> Receiver<Vec<u8>> {
    let (sender, receiver) = mpsc::channel();
    std::thread::spawn(move || {
        let mut bytes = Vec::new();
        // What cannot be read is not there; how the process ended says more. Nobody may be waiting any more.
        let _ = pipe.map(|pipe| pipe.take(bytes_max + 1).read_to_end(&mut bytes));
        let _ = sender.send(bytes);
    });
    receiver
}

/// When process `pid` started, in clock ticks since boot: with the pid it names one process for ever.
#[must_use]
pub fn birth(pid: u32) -> Option<u64> {
    field(&stat_fields(pid)?, BIRTH)
}

/// Whether process `pid` is still the one that was born at `born`, and has not ended: one that nobody has waited for has.
#[must_use]
pub fn is_alive(pid: u32, born: u64) -> bool {
    let Some(fields) = stat_fields(pid) else { return false };
    let ended = fields.trim_start().starts_with(['Z', 'X']);
    !ended && field(&fields, BIRTH) == Some(born)
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

/// The fields of /proc/PID/stat from the one after the process's name.
fn stat_fields(pid: u32) -> Option<String> {
    let text = std::fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    text.rsplit_once(')').map(|(_, fields)| fields.to_owned())
}

/// One of them, which is a number.
fn field(fields: &str, index: usize) -> Option<u64> {
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
    fn what_a_program_prints_is_bounded() {
        let run =
            |script: &str, patience| output(&["sh".into(), "-c".into(), script.into()], &[], 10, Duration::from_millis(patience));
        assert_eq!(run("printf 0123456789", 10_000).unwrap(), b"0123456789");
        assert!(run("printf 0123456789a", 10_000).unwrap_err().contains("more than 10 bytes"));
        assert!(run("sleep 20", 100).unwrap_err().contains("did not end"));
        assert!(run("echo why >&2; exit 1", 10_000).unwrap_err().ends_with(": why"));
        assert!(output(&[], &[], 1, Duration::ZERO).is_err());
    }

    #[test]
    fn only_the_process_that_is_meant_is_ended() {
        let dir = tempfile::tempdir().unwrap();
        let mut process = start("sleep 30", dir.path());
        let born = birth(process.pid()).unwrap();
        kill_born(process.pid(), born + 1);
        assert!(process.ended().is_none());
        assert!(is_alive(process.pid(), born) && !is_alive(process.pid(), born + 1));
        kill_born(process.pid(), born);
        // Nobody has waited for it yet, and it has ended all the same.
        let until = Instant::now() + Duration::from_secs(5);
        while is_alive(process.pid(), born) && Instant::now() < until {
            std::thread::sleep(Duration::from_millis(2));
        }
        assert!(!is_alive(process.pid(), born) && birth(process.pid()) == Some(born));
        process.end_after(Duration::from_secs(5));
        assert!(process.ended().unwrap().contains("signal: 9"));
        assert!(memory_available() > 0 && overhead_seconds(std::process::id()) > 0.0);
    }
}
