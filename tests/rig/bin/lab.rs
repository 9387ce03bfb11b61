//! The lab's command: boots two machines with soft-RoCE, runs commands in them, opens a shell in one, keeps them for later
//! and takes them away (`make lab`, `lab-shell`, `lab-up`, `lab-down`). How the lab is built is in `rig::roce`; this is
//! what a person sees of it.
#![forbid(unsafe_code)]
#![allow(clippy::print_stdout, clippy::print_stderr, reason = "it talks to a person")]

use clap::{Parser, Subcommand};
use nix::sys::signal::{SigSet, Signal};
use nix::sys::termios::{self, SetArg, Termios};
use rig::roce::keeper::Held;
use rig::roce::machine::{Input, Task};
use rig::roce::wire::{End, Kind};
use rig::roce::{Machine, Machines, Progress, Ready, Spec, inside, keeper};
use rig::{Context, Result, bail, ensure};
use std::io::{IsTerminal, Read, Write};
use std::net::Ipv4Addr;
use std::path::PathBuf;
use std::process::{Command, ExitCode, Stdio};
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::time::{Duration, Instant, SystemTime};

/// How long a lab that a person works in lives at most.
const UP_SECONDS: u64 = 6 * 3600;
/// Which variables of the caller a command in the lab gets.
const PASSED_ON: [&str; 4] = ["RUST_", "LIMOSA_", "CARGO_TERM_", "NO_COLOR"];

/// Two machines with soft-RoCE, KVM and netem on this one.
#[derive(Debug, Parser)]
#[command(name = "lab", max_term_width = 110)]
struct Arguments {
    /// Name of the lab that lab up keeps; labs with different names live beside each other
    #[arg(long, default_value = "main", global = true)]
    lab: String,
    /// Memory of each machine that is made, in MiB
    #[arg(long, default_value_t = 3072, value_parser = clap::value_parser!(u32).range(512..), global = true)]
    memory: u32,
    /// Processors of each machine that is made
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..=16), global = true)]
    cpus: u32,
    #[command(subcommand)]
    what: What,
}

impl Arguments {
    fn spec(&self) -> Result<Spec> {
        Ok(Spec { memory_mib: self.memory, cpus: self.cpus, ..Spec::new()? })
    }
}

#[derive(Debug, Subcommand)]
enum What {
    /// Run a line of bash on both machines, or on one; in the lab that is up, else in one made for it
    Run {
        /// alpha or beta; both when it is not said
        #[arg(long)]
        host: Option<String>,
        /// Seconds after which the command is ended
        #[arg(long, default_value_t = 900)]
        limit: u64,
        /// Make a lab of its own also when one is up
        #[arg(long)]
        new: bool,
        /// The line
        #[arg(required = true, trailing_var_arg = true, allow_hyphen_values = true)]
        line: Vec<String>,
    },
    /// Open a shell in one machine
    Shell {
        /// alpha or beta
        #[arg(long, default_value = "alpha")]
        host: String,
    },
    /// Make a lab that stays
    Up,
    /// End the lab that stays
    Down,
    /// Say whether a lab is up, and where
    Status,
    #[command(hide = true)]
    Keep,
    #[command(hide = true)]
    Inside {
        /// Address on the control network
        address: Ipv4Addr,
    },
}

/// The keeper of the lab that this process made; 0 when there is none. The signals' thread ends it.
static KEEPER: AtomicU32 = AtomicU32::new(0);
static INTERRUPTED: AtomicBool = AtomicBool::new(false);
/// The terminal as it was before the shell took it.
static TERMINAL: Mutex<Option<Termios>> = Mutex::new(None);

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    let result = match &arguments.what {
        What::Keep => keeper::keep().map(|()| 0),
        What::Inside { address } => inside::serve(*address).map(|()| 0),
        _ => watch_signals().and_then(|()| obey(&arguments)),
    };
    give_terminal_back();
    match result {
        Ok(status) => ExitCode::from(u8::try_from(status).unwrap_or(255)),
        Err(_) if INTERRUPTED.load(Ordering::Acquire) => {
            eprintln!("lab: interrupted; the lab is gone");
            ExitCode::from(130)
        }
        Err(error) => {
            eprintln!("lab: {error:#}");
            ExitCode::from(1)
        }
    }
}

fn obey(arguments: &Arguments) -> Result<i32> {
    if let Some(reason) = rig::roce::missing() {
        bail!("{reason}");
    }
    let place = Place::of(&arguments.lab)?;
    match &arguments.what {
        What::Run { host, limit, new, line } => {
            let job = Job { host: host.clone(), limit: Duration::from_secs(*limit), line: line.join(" ") };
            match place.running()?.filter(|_| !new) {
                Some(ready) => {
                    eprintln!("lab: in the lab {:?} that is up (make lab-down ends it)", arguments.lab);
                    job.run(&ready.machines, true)
                }
                None => {
                    let spec = arguments.spec()?;
                    let spec = Spec { limit_seconds: spec.limit_seconds.max(limit.saturating_add(300)), ..spec };
                    in_new_lab(&spec, |machines| job.run(machines, false))
                }
            }
        }
        What::Shell { host } => match place.running()? {
            Some(ready) => shell(pick(&ready.machines, host)?),
            None => {
                let spec = Spec { limit_seconds: UP_SECONDS, ..arguments.spec()? };
                in_new_lab(&spec, |machines| shell(pick(machines, host)?))
            }
        },
        What::Up => place.up(&arguments.lab, arguments.spec()?),
        What::Down => place.down(&arguments.lab),
        What::Status => place.status(&arguments.lab),
        What::Keep | What::Inside { .. } => Ok(0),
    }
}

fn pick<'a>(machines: &'a [Machine], name: &str) -> Result<&'a Machine> {
    machines.iter().find(|m| m.name == name).with_context(|| format!("there is no machine {name:?}: alpha or beta"))
}

/// Prints each step of the boot with the time since the start.
fn boot(spec: &Spec) -> Result<Machines> {
    let start = Instant::now();
    let step = |text: &str| eprintln!("lab: {:5.1} s  {text}", start.elapsed().as_secs_f64());
    step("making a lab");
    let machines = Machines::boot_with(spec, |progress| match progress {
        Progress::Keeper(pid) => KEEPER.store(pid, Ordering::Release),
        Progress::Step(text) => step(text),
    })?;
    for problem in &machines.ready().problems {
        eprintln!("lab: warning: {problem}");
    }
    Ok(machines)
}

/// Makes a lab, works in it, and takes it away; keeps the logs when the work fails.
fn in_new_lab(spec: &Spec, work: impl FnOnce(&[Machine]) -> Result<i32>) -> Result<i32> {
    let mut machines = boot(spec)?;
    let result = work(&machines.ready().machines);
    if !matches!(result, Ok(0)) && !INTERRUPTED.load(Ordering::Acquire) {
        machines.keep_logs();
        eprintln!("lab: the machines' consoles are kept in {}", machines.ready().folder.display());
    }
    machines.end()?;
    result
}

/// Ends everything on Ctrl-C and its like. Signals wait for this thread alone; no other is ever cut short.
fn watch_signals() -> Result<()> {
    let signals = SigSet::from_iter([Signal::SIGINT, Signal::SIGTERM, Signal::SIGHUP]);
    signals.thread_block().context("blocking signals")?;
    // Only the shell waits for this one; blocked everywhere, it reaches nobody else.
    SigSet::from_iter([Signal::SIGWINCH]).thread_block().context("blocking signals")?;
    std::thread::spawn(move || {
        while let Ok(signal) = signals.wait() {
            INTERRUPTED.store(true, Ordering::Release);
            give_terminal_back();
            match KEEPER.load(Ordering::Acquire) {
                // A command in a lab that stays dies with its connection.
                0 => std::process::exit(128 + signal as i32),
                // The main thread sees the lab go, and says so.
                keeper => rig::process::signal(keeper, Signal::SIGTERM),
            }
        }
    });
    Ok(())
}

/// Where a lab that stays is noted.
struct Place(PathBuf);

impl Place {
    fn of(lab: &str) -> Result<Place> {
        ensure!(lab.chars().all(|c| c.is_ascii_alphanumeric() || c == '-'), "a lab's name has letters, digits and dashes");
        let folder = rig::roce::runs_folder()?;
        std::fs::create_dir_all(&folder).with_context(|| format!("{}", folder.display()))?;
        Ok(Place(folder.join(format!("up-{lab}.json"))))
    }

    /// The lab that is up here, if one is.
    fn running(&self) -> Result<Option<Ready>> {
        if !self.held().is_some_and(|held| held.is_up()) {
            return Ok(None);
        }
        let ready = std::fs::read(&self.0).map_err(rig::Error::from).and_then(|bytes| Ok(serde_json::from_slice(&bytes)?));
        ready.map(Some).context("the lab that is up was made by another build of this program: end it (make lab-down)")
    }

    fn held(&self) -> Option<Held> {
        Held::read(&self.0)
    }

    fn up(&self, lab: &str, spec: Spec) -> Result<i32> {
        if self.running()?.is_some() {
            return self.status(lab);
        }
        let spec = Spec { limit_seconds: UP_SECONDS, register: Some(self.0.clone()), ..spec };
        let ready = boot(&spec)?.leave()?;
        eprintln!("lab: {lab:?} is up for {} h at most; make lab CMD='…' uses it, make lab-down ends it", UP_SECONDS / 3600);
        println!("{}", ready.name);
        Ok(0)
    }

    fn down(&self, lab: &str) -> Result<i32> {
        let Some(held) = self.held().filter(Held::is_up) else {
            eprintln!("lab: no lab {lab:?} is up");
            return Ok(0);
        };
        rig::process::signal(held.keeper, Signal::SIGTERM);
        let gone = || Ok((!rig::process::alive(held.keeper)).then_some(()));
        rig::process::wait_for(Duration::from_secs(20), "the keeper's end", gone)?;
        let left = rig::roce::leftovers(&held.name, held.keeper);
        ensure!(left.is_empty(), "left over of the lab: {}", left.join(", "));
        eprintln!("lab: {lab:?} is gone");
        Ok(0)
    }

    fn status(&self, lab: &str) -> Result<i32> {
        let Some(ready) = self.running()? else {
            println!("no lab {lab:?} is up (make lab-up)");
            return Ok(1);
        };
        let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH)?.as_secs();
        println!("lab {lab:?}: up for {} min, namespace {}, keeper {}", (now - ready.since) / 60, ready.name, ready.keeper);
        for machine in &ready.machines {
            println!("  {:<6} {} {}  console {}", machine.name, machine.ip, machine.ip6, machine.console.display());
        }
        Ok(0)
    }
}

/// A line for one machine or both.
struct Job {
    host: Option<String>,
    limit: Duration,
    line: String,
}

impl Job {
    /// Runs it; the worst exit status.
    fn run(&self, machines: &[Machine], fresh: bool) -> Result<i32> {
        let start = Instant::now();
        let status = match &self.host {
            Some(host) => self.on_one(pick(machines, host)?, fresh)?,
            None => self.on_all(machines, fresh)?,
        };
        if status != 0 {
            eprintln!("lab: exit {status} after {:.1} s", start.elapsed().as_secs_f64());
        }
        Ok(status)
    }

    fn task<'a>(&self, machine: &'a Machine, fresh: bool) -> Result<Task<'a>> {
        let task = with_surroundings(machine.task(&["bash", "-c", &self.line]))?.limit(self.limit);
        Ok(if fresh { task.fresh() } else { task })
    }

    /// One machine: its bytes are ours, also those of standard input.
    fn on_one(&self, machine: &Machine, fresh: bool) -> Result<i32> {
        let mut conversation = self.task(machine, fresh)?.converse()?;
        let mut input = conversation.input()?;
        if std::io::stdin().is_terminal() {
            input.close()?;
        } else {
            std::thread::spawn(move || carry_input(&mut input));
        }
        let end = conversation.listen(print_raw)?;
        Ok(self.judge(machine, end))
    }

    /// Both machines at once: every line says whose it is.
    fn on_all(&self, machines: &[Machine], fresh: bool) -> Result<i32> {
        let statuses = std::thread::scope(|scope| {
            let run = |(number, machine): (usize, &'_ Machine)| -> Result<i32> {
                let mut conversation = self.task(machine, fresh)?.converse()?;
                conversation.input()?.close()?;
                let (mut out, mut errors) = (Lines::new(&machine.name, number), Lines::new(&machine.name, number));
                let end = conversation.listen(|kind, bytes| match kind {
                    Kind::Stderr => errors.add(bytes, &mut std::io::stderr()),
                    _ => out.add(bytes, &mut std::io::stdout()),
                })?;
                out.finish(&mut std::io::stdout());
                errors.finish(&mut std::io::stderr());
                Ok(self.judge(machine, end))
            };
            let threads: Vec<_> = machines.iter().enumerate().map(|pair| scope.spawn(move || run(pair))).collect();
            let joined = threads.into_iter().map(|thread| thread.join().unwrap_or_else(|_| bail!("a thread panicked")));
            joined.collect::<Vec<_>>()
        });
        let mut worst = 0;
        for status in statuses {
            worst = worst.max(status?);
        }
        Ok(worst)
    }

    fn judge(&self, machine: &Machine, end: End) -> i32 {
        if end.timed_out {
            eprintln!("lab: {}: ended, for {} s were over (LIMIT=seconds gives more)", machine.name, self.limit.as_secs());
        }
        end.status()
    }
}

/// The caller's folder and the variables that matter.
fn with_surroundings(mut task: Task<'_>) -> Result<Task<'_>> {
    let folder = std::env::current_dir().context("the current folder")?;
    task = task.folder(&folder.display().to_string());
    for (name, value) in std::env::vars() {
        if PASSED_ON.iter().any(|start| name.starts_with(start)) && !name.starts_with("LIMOSA_LAB") {
            task = task.env(&name, &value);
        }
    }
    Ok(task)
}

fn carry_input(input: &mut Input) {
    let mut bytes = vec![0u8; 64 << 10];
    let mut stdin = std::io::stdin().lock();
    while let Ok(length) = stdin.read(&mut bytes) {
        let went = if length == 0 { input.close() } else { input.write(bytes.get(..length).unwrap_or_default()) };
        if length == 0 || went.is_err() {
            return;
        }
    }
}

fn print_raw(kind: Kind, bytes: &[u8]) {
    // A reader who has gone (`| head`) is no error of the command.
    let _ = if kind == Kind::Stderr {
        std::io::stderr().lock().write_all(bytes)
    } else {
        let mut out = std::io::stdout().lock();
        out.write_all(bytes).and_then(|()| out.flush())
    };
}

/// Whole lines of one stream of one machine, with its name before each.
struct Lines {
    prefix: String,
    begun: Vec<u8>,
}

impl Lines {
    fn new(name: &str, number: usize) -> Lines {
        let colours = std::io::stdout().is_terminal() && std::env::var_os("NO_COLOR").is_none();
        let colour = if number == 0 { 36 } else { 35 };
        let prefix = if colours { format!("\x1b[{colour}m{name:<5}\x1b[0m | ") } else { format!("{name:<5} | ") };
        Lines { prefix, begun: Vec::new() }
    }

    fn add(&mut self, bytes: &[u8], to: &mut impl Write) {
        self.begun.extend_from_slice(bytes);
        let Some(end) = self.begun.iter().rposition(|byte| *byte == b'\n') else { return };
        let rest = self.begun.split_off(end + 1);
        let whole = std::mem::replace(&mut self.begun, rest);
        let mut text = Vec::with_capacity(whole.len() * 2);
        for line in whole.split_inclusive(|byte| *byte == b'\n') {
            text.extend_from_slice(self.prefix.as_bytes());
            text.extend_from_slice(line);
        }
        // One write, so that lines of two machines do not mix.
        let _ = to.write_all(&text).and_then(|()| to.flush());
    }

    fn finish(&mut self, to: &mut impl Write) {
        if !self.begun.is_empty() {
            self.add(b"\n", to);
        }
    }
}

/// An interactive shell in one machine, on this terminal.
fn shell(machine: &Machine) -> Result<i32> {
    let stdin = std::io::stdin();
    ensure!(stdin.is_terminal(), "a shell needs a terminal; make lab CMD='…' does without");
    let (rows, columns) = terminal_size().unwrap_or((24, 80));
    // Bash's own start-up files take five seconds at this speed.
    let task = with_surroundings(machine.task(&["bash", "--norc", "-i"]))?.fresh().terminal(rows, columns);
    let terminal = std::env::var("TERM").unwrap_or_else(|_| "vt100".to_owned());
    let prompt = format!(r"\[\e[36m\]{}\[\e[0m\]:\w# ", machine.name);
    let task = task.env("TERM", &terminal).env("PS1", &prompt);
    let mut conversation = task.converse()?;
    eprintln!("lab: a shell on {} (exit or Ctrl-D leaves it)", machine.name);
    let before = termios::tcgetattr(&stdin).context("the terminal")?;
    let mut raw = before.clone();
    termios::cfmakeraw(&mut raw);
    *TERMINAL.lock().unwrap_or_else(|poisoned| poisoned.into_inner()) = Some(before);
    termios::tcsetattr(&stdin, SetArg::TCSANOW, &raw).context("the terminal")?;
    let mut keys = conversation.input()?;
    std::thread::spawn(move || carry_input(&mut keys));
    let sizes = conversation.input()?;
    std::thread::spawn(move || follow_size(sizes));
    let end = conversation.listen(print_raw);
    give_terminal_back();
    Ok(end?.status())
}

/// Tells the shell the size of this terminal whenever it changes.
fn follow_size(mut sizes: Input) {
    let change = SigSet::from_iter([Signal::SIGWINCH]);
    while change.wait().is_ok() {
        let went = terminal_size().map(|(rows, columns)| sizes.resize(rows, columns));
        if went.is_some_and(|went| went.is_err()) {
            return;
        }
    }
}

fn give_terminal_back() {
    if let Some(before) = TERMINAL.lock().unwrap_or_else(|poisoned| poisoned.into_inner()).take() {
        let _ = termios::tcsetattr(std::io::stdin(), SetArg::TCSADRAIN, &before);
    }
}

/// Lines and columns of this terminal.
fn terminal_size() -> Option<(u16, u16)> {
    let output = Command::new("stty").arg("size").stdin(Stdio::inherit()).output().ok()?;
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    let mut numbers = text.split_whitespace().filter_map(|word| word.parse().ok());
    Some((numbers.next()?, numbers.next()?))
}
