//! One lab machine as tests and the lab's command see it: commands run in it to their end or beside the caller, files go in
//! and come out, all bytes exactly. How the machine came to be is in `keeper`.

use crate::netns;
use crate::process;
use crate::roce::wire::{self, End, Kind, Request, Terminal};
use anyhow::{Context, Result, bail, ensure};
use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use serde::{Deserialize, Serialize};
use std::net::{Ipv4Addr, Ipv6Addr, Shutdown, SocketAddr, TcpStream};
use std::os::fd::AsFd;
use std::path::PathBuf;
use std::sync::{Arc, Condvar, Mutex, MutexGuard};
use std::time::{Duration, Instant};

/// How long a machine may take to accept a connection.
const CONNECT: Duration = Duration::from_secs(10);
/// How much longer than a command's own limit its end may take to arrive.
const GRACE: Duration = Duration::from_secs(15);
/// What is kept of a command's output.
const OUTPUT_BYTES_MAX: usize = 64 << 20;

/// A lab machine: its addresses, and the way to it.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Machine {
    /// Its host name: alpha or beta.
    pub name: String,
    /// Its IPv4 address on the lab's Ethernet (`v0`, /24).
    pub ip: Ipv4Addr,
    /// Its IPv6 address there (/64).
    pub ip6: Ipv6Addr,
    /// Its MAC address there.
    pub mac: String,
    /// The bridge's port that it hangs on, in the lab's namespace.
    pub port: String,
    /// The port of the guests' Ethernet that its bridge `br0` hangs on, likewise.
    pub guest_port: String,
    /// What its kernel and its set-up said.
    pub console: PathBuf,
    /// Its QEMU on the outer machine.
    pub qemu: u32,
    /// The namespace on the outer machine.
    pub(super) netns: String,
    /// Its address on the control network.
    pub(super) control: Ipv4Addr,
}

/// What a command did.
#[derive(Debug, Clone)]
pub struct Output {
    /// How it ended.
    pub end: End,
    /// Standard output.
    pub stdout: Vec<u8>,
    /// Standard error.
    pub stderr: Vec<u8>,
    what: String,
}

impl Output {
    /// Whether the exit code is 0.
    pub fn ok(&self) -> bool {
        self.end.status() == 0
    }

    /// The exit code as a shell has it (see [`End::status`]).
    pub fn status(&self) -> i32 {
        self.end.status()
    }

    /// Standard output as text, without the white space around it.
    pub fn text(&self) -> String {
        String::from_utf8_lossy(&self.stdout).trim().to_owned()
    }

    /// Standard error as text, without the white space around it.
    pub fn errors(&self) -> String {
        String::from_utf8_lossy(&self.stderr).trim().to_owned()
    }

    /// Fails, with all that was printed, unless the exit code is 0.
    ///
    /// # Errors
    /// The exit code is another.
    pub fn expect_ok(self) -> Result<Output> {
        let status = self.status();
        let late = if self.end.timed_out { " (its time was over)" } else { "" };
        ensure!(self.ok(), "{}: exit {status}{late}\nstdout: {}\nstderr: {}", self.what, self.text(), self.errors());
        Ok(self)
    }
}

/// A command to run in a machine.
#[derive(Debug, Clone)]
pub struct Task<'a> {
    machine: &'a Machine,
    request: Request,
}

impl<'a> Task<'a> {
    /// Sets a variable of its environment.
    #[must_use]
    pub fn env(mut self, name: &str, value: &str) -> Self {
        self.request.environment.push((name.to_owned(), value.to_owned()));
        self
    }

    /// Sets its working folder.
    #[must_use]
    pub fn folder(mut self, path: &str) -> Self {
        self.request.folder = Some(path.to_owned());
        self
    }

    /// Ends it (SIGTERM, then SIGKILL to its process group) after this time.
    #[must_use]
    pub fn limit(mut self, limit: Duration) -> Self {
        self.request.limit_ms = Some(u64::try_from(limit.as_millis()).unwrap_or(u64::MAX));
        self
    }

    /// Makes the machine look again at the outer machine's files: for labs that live longer than a build.
    #[must_use]
    pub fn fresh(mut self) -> Self {
        self.request.fresh = true;
        self
    }

    /// Gives it a terminal.
    #[must_use]
    pub fn terminal(mut self, rows: u16, columns: u16) -> Self {
        self.request.terminal = Some(Terminal { rows, columns });
        self
    }

    /// Starts it and returns at once; it dies with the answer.
    ///
    /// # Errors
    /// The machine cannot be reached, or the program cannot be started.
    pub fn spawn(self) -> Result<Running> {
        let words = self.request.words.join(" ");
        let what = format!("{}: {words}", self.machine.name);
        let mut conversation = self.converse()?;
        let (shared, limit) = (Arc::new(Shared::default()), conversation.limit);
        let stream = conversation.stream.try_clone()?;
        let theirs = Arc::clone(&shared);
        std::thread::spawn(move || {
            let end = conversation.listen(|kind, bytes| theirs.add(kind, bytes));
            theirs.finish(end.map_err(|error| format!("{error:#}")));
        });
        Ok(Running { stream, shared, what, limit })
    }

    /// Runs it to its end.
    ///
    /// # Errors
    /// The machine cannot be reached or is lost, or the program cannot be started. A bad exit code is not an error.
    pub fn run(self) -> Result<Output> {
        self.run_with_input(&[])
    }

    /// Runs it to its end with these bytes as its standard input.
    ///
    /// # Errors
    /// See [`Task::run`].
    pub fn run_with_input(self, input: &[u8]) -> Result<Output> {
        let mut running = self.spawn()?;
        // A command that ends before it has read everything is no error here.
        let _ = running.write(input).and_then(|()| running.close_input());
        let limit = running.limit.unwrap_or(Duration::from_secs(u64::from(u32::MAX)));
        running.wait(limit)
    }

    /// Starts it, for a caller that carries the streams itself.
    ///
    /// # Errors
    /// See [`Task::spawn`].
    pub fn converse(self) -> Result<Conversation> {
        let mut stream = self.machine.connect()?;
        wire::write_frame(&mut stream, Kind::Request, &serde_json::to_vec(&self.request)?)?;
        let limit = self.request.limit_ms.map(|ms| Duration::from_millis(ms) + GRACE);
        match self.machine.hear(&mut stream)? {
            (Kind::Started, _) => {}
            (Kind::Failed, why) => bail!("{}: {}", self.machine.name, String::from_utf8_lossy(&why)),
            (kind, _) => bail!("{} answered a request with {kind:?}", self.machine.name),
        }
        Ok(Conversation { stream, machine: self.machine.clone(), limit })
    }
}

/// A command's connection.
#[derive(Debug)]
pub struct Conversation {
    stream: TcpStream,
    machine: Machine,
    limit: Option<Duration>,
}

impl Conversation {
    /// The half for what goes in; may be used beside [`Conversation::listen`].
    ///
    /// # Errors
    /// No more descriptors.
    pub fn input(&self) -> Result<Input> {
        Ok(Input(self.stream.try_clone()?))
    }

    /// Hands over the output as it comes (stdout or stderr), until the command's end.
    ///
    /// # Errors
    /// The machine is lost.
    pub fn listen(&mut self, mut take: impl FnMut(Kind, &[u8])) -> Result<End> {
        loop {
            match self.machine.hear(&mut self.stream)? {
                (kind @ (Kind::Stdout | Kind::Stderr), bytes) => take(kind, &bytes),
                (Kind::End, end) => return serde_json::from_slice(&end).context("how a command ended"),
                (kind, _) => bail!("{} sent {kind:?} out of order", self.machine.name),
            }
        }
    }
}

/// The half of a conversation that goes in.
#[derive(Debug)]
pub struct Input(TcpStream);

impl Input {
    /// Bytes for the command's standard input.
    ///
    /// # Errors
    /// The machine is lost, or the command has ended.
    pub fn write(&mut self, bytes: &[u8]) -> Result<()> {
        bytes.chunks(wire::PAYLOAD_BYTES_MAX).try_for_each(|chunk| wire::write_frame(&mut self.0, Kind::Input, chunk))
    }

    /// The end of its standard input.
    ///
    /// # Errors
    /// See [`Input::write`].
    pub fn close(&mut self) -> Result<()> {
        wire::write_frame(&mut self.0, Kind::InputEnd, &[])
    }

    /// Tells it the terminal's new size.
    ///
    /// # Errors
    /// See [`Input::write`].
    pub fn resize(&mut self, rows: u16, columns: u16) -> Result<()> {
        let ([r0, r1], [c0, c1]) = (rows.to_le_bytes(), columns.to_le_bytes());
        wire::write_frame(&mut self.0, Kind::Signal, &[0, r0, r1, c0, c1])
    }
}

/// What a running command has said so far.
#[derive(Debug, Default)]
struct Shared {
    said: Mutex<Said>,
    news: Condvar,
}

#[derive(Debug, Default)]
struct Said {
    stdout: Vec<u8>,
    stderr: Vec<u8>,
    end: Option<Result<End, String>>,
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, Said> {
        self.said.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
    }

    fn add(&self, kind: Kind, bytes: &[u8]) {
        let mut said = self.lock();
        let kept = if kind == Kind::Stdout { &mut said.stdout } else { &mut said.stderr };
        if kept.len() + bytes.len() <= OUTPUT_BYTES_MAX {
            kept.extend_from_slice(bytes);
        } else {
            said.end = Some(Err(format!("it printed more than {} MiB", OUTPUT_BYTES_MAX >> 20)));
        }
        self.news.notify_all();
    }

    fn finish(&self, end: Result<End, String>) {
        self.lock().end.get_or_insert(end);
        self.news.notify_all();
    }
}

/// A command that runs beside the caller. Dropping it kills it.
#[derive(Debug)]
pub struct Running {
    stream: TcpStream,
    shared: Arc<Shared>,
    what: String,
    limit: Option<Duration>,
}

impl Running {
    /// Bytes for its standard input.
    ///
    /// # Errors
    /// The machine is lost, or the command has ended.
    pub fn write(&mut self, bytes: &[u8]) -> Result<()> {
        Input(self.stream.try_clone()?).write(bytes)
    }

    /// The end of its standard input.
    ///
    /// # Errors
    /// See [`Running::write`].
    pub fn close_input(&mut self) -> Result<()> {
        Input(self.stream.try_clone()?).close()
    }

    /// Sends a signal to its process group.
    ///
    /// # Errors
    /// The machine is lost.
    pub fn signal(&mut self, signal: nix::sys::signal::Signal) -> Result<()> {
        wire::write_frame(&mut self.stream, Kind::Signal, &[u8::try_from(signal as i32)?])
    }

    /// `kill -9`, and waits for its end.
    ///
    /// # Errors
    /// The machine is lost.
    pub fn kill(&mut self) -> Result<Output> {
        self.signal(nix::sys::signal::Signal::SIGKILL)?;
        self.wait(GRACE)
    }

    /// What it printed so far: standard output and standard error.
    pub fn printed(&self) -> (String, String) {
        let said = self.shared.lock();
        (String::from_utf8_lossy(&said.stdout).into_owned(), String::from_utf8_lossy(&said.stderr).into_owned())
    }

    /// Whether it has ended (or its machine is lost).
    pub fn ended(&self) -> bool {
        self.shared.lock().end.is_some()
    }

    /// Waits until it has printed these words on either stream.
    ///
    /// # Errors
    /// It ended, or the time was over, before it printed them; with what it did print.
    pub fn wait_for_words(&self, words: &str, limit: Duration) -> Result<()> {
        let seen = |said: &Said| [&said.stdout, &said.stderr].iter().any(|bytes| String::from_utf8_lossy(bytes).contains(words));
        let said = self.wait_until(limit, |said| seen(said) || said.end.is_some());
        ensure!(seen(&said), "{}: {words:?} never came, but\n{}", self.what, String::from_utf8_lossy(&said.stdout));
        Ok(())
    }

    /// Waits for its end.
    ///
    /// # Errors
    /// It still runs after that time, or its machine is lost; with what it printed.
    pub fn wait(&mut self, limit: Duration) -> Result<Output> {
        let said = self.wait_until(limit, |said| said.end.is_some());
        let printed = || format!("{}{}", String::from_utf8_lossy(&said.stdout), String::from_utf8_lossy(&said.stderr));
        let end = match &said.end {
            Some(Ok(end)) => *end,
            Some(Err(error)) => bail!("{}: {error}; it printed:\n{}", self.what, printed()),
            None => bail!("{}: still runs after {} s; it printed:\n{}", self.what, limit.as_secs(), printed()),
        };
        Ok(Output { end, stdout: said.stdout.clone(), stderr: said.stderr.clone(), what: self.what.clone() })
    }

    fn wait_until(&self, limit: Duration, done: impl Fn(&Said) -> bool) -> MutexGuard<'_, Said> {
        let until = Instant::now() + limit;
        let mut said = self.shared.lock();
        while !done(&said) {
            let left = until.saturating_duration_since(Instant::now());
            if left.is_zero() {
                break;
            }
            said = match self.shared.news.wait_timeout(said, left) {
                Ok((said, _)) => said,
                Err(poisoned) => poisoned.into_inner().0,
            };
        }
        said
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        // The agent inside kills the process group of a command whose connection ends.
        let _ = self.stream.shutdown(Shutdown::Both);
    }
}

impl Machine {
    /// A command, to be refined and then run.
    pub fn task(&self, words: &[&str]) -> Task<'_> {
        let words = words.iter().map(|word| (*word).to_owned()).collect();
        Task { machine: self, request: Request { words, ..Request::default() } }
    }

    /// Runs a command to its end, at most so long.
    ///
    /// # Errors
    /// The machine cannot be reached or is lost, or the program cannot be started. A bad exit code is not an error.
    pub fn run(&self, words: &[&str], limit: Duration) -> Result<Output> {
        self.task(words).limit(limit).run()
    }

    /// Runs a line of shell (bash) to its end, at most so long; a bad exit code is an error here.
    ///
    /// # Errors
    /// The machine cannot be reached or is lost, or the exit code is not 0.
    pub fn shell(&self, line: &str, limit: Duration) -> Result<Output> {
        self.run(&["bash", "-c", line], limit)?.expect_ok()
    }

    /// Starts a command and returns at once; it dies with the answer.
    ///
    /// # Errors
    /// The machine cannot be reached, or the program cannot be started.
    pub fn spawn(&self, words: &[&str]) -> Result<Running> {
        self.task(words).spawn()
    }

    /// Writes a file in the machine (never on the outer one), with the folders above it.
    ///
    /// # Errors
    /// The machine cannot be reached, or the file cannot be written there.
    pub fn write_file(&self, path: &str, bytes: &[u8]) -> Result<()> {
        let script = r#"mkdir -p "$(dirname "$1")" && cat > "$1""#;
        self.task(&["sh", "-c", script, "sh", path]).limit(Duration::from_secs(120)).run_with_input(bytes)?.expect_ok()?;
        Ok(())
    }

    /// Reads a file as the machine sees it.
    ///
    /// # Errors
    /// The machine cannot be reached, or there is no such file.
    pub fn read_file(&self, path: &str) -> Result<Vec<u8>> {
        Ok(self.run(&["cat", path], Duration::from_secs(120))?.expect_ok()?.stdout)
    }

    /// Pulls the plug: the machine is off at once and for good, as a host that lost its power.
    ///
    /// # Errors
    /// The machine cannot be reached.
    pub fn crash(&self) -> Result<()> {
        let _plug = self.spawn(&["sh", "-c", "echo b > /proc/sysrq-trigger"])?;
        process::wait_for(GRACE, &format!("the end of {}", self.name), || Ok((!self.is_on()).then_some(())))
    }

    /// Whether it still runs.
    pub fn is_on(&self) -> bool {
        // A process id is used again after a time; the console's path is in no other process's words.
        let console = self.console.display().to_string();
        process::alive(self.qemu) && process::words(self.qemu).iter().any(|word| word.contains(&console))
    }

    /// A connection to the agent inside.
    pub(super) fn connect(&self) -> Result<TcpStream> {
        let address = SocketAddr::from((self.control, wire::PORT));
        let stream = std::thread::scope(|scope| {
            let connecting = scope.spawn(|| {
                netns::enter(&self.netns)?;
                Ok(TcpStream::connect_timeout(&address, CONNECT)?)
            });
            connecting.join().unwrap_or_else(|_| bail!("the connecting thread panicked"))
        });
        let stream = stream.with_context(|| format!("{} cannot be reached", self.name))?;
        stream.set_nodelay(true)?;
        // Within a frame nothing is slow: all of it is on its way.
        stream.set_read_timeout(Some(GRACE))?;
        Ok(stream)
    }

    fn hear(&self, stream: &mut TcpStream) -> Result<(Kind, Vec<u8>)> {
        let lost = || format!("{} is lost; its console is in {}", self.name, self.console.display());
        loop {
            let mut fds = [PollFd::new(stream.as_fd(), PollFlags::POLLIN)];
            match poll(&mut fds, PollTimeout::from(500u16)) {
                // A machine whose QEMU was killed sends no farewell.
                Ok(0) if !self.is_on() => {
                    // Who still waits to send it something wakes up.
                    let _ = stream.shutdown(Shutdown::Both);
                    bail!("{}", lost());
                }
                Ok(0) | Err(Errno::EINTR) => {}
                Ok(_) => break,
                Err(error) => return Err(error).with_context(lost),
            }
        }
        wire::read_frame(stream).and_then(|frame| frame.context("the connection ended")).with_context(lost)
    }
}
