//! The agent inside a lab machine: it takes commands from outside, one connection each, runs them, and carries their streams.
//! It is no part of Limosa, and it trusts whoever reaches it: only the lab's own control network does.
//!
//! The control network card lives in a network namespace of its own inside the machine. So neither netem on the lab's
//! Ethernet nor anything that a test does to the machine's network can cut the tester off, and nobody inside sees the card.

use crate::netns::run;
use crate::roce::wire::{self, End, Kind, Request, Terminal};
use anyhow::{Context, Result, bail};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::pty::{Winsize, openpty};
use nix::sched::CloneFlags;
use nix::sys::signal::{Signal, killpg};
use nix::unistd::Pid;
use std::fs::File;
use std::io::{ErrorKind, Read, Write};
use std::net::{Ipv4Addr, Shutdown, TcpListener, TcpStream};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{self, SyncSender, TrySendError};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

/// The name of the control network card at the machine's start.
pub const CONTROL_CARD: &str = "control0";
/// What a command ended by its time limit gets to tidy up before it is killed.
const GRACE: Duration = Duration::from_secs(2);
/// How long a stream of an ended command may be silent before it counts as complete though somebody still holds it open.
const SILENCE_MS: u16 = 30;

/// Takes commands for ever.
///
/// # Errors
/// The control network cannot be set up.
pub fn serve(address: Ipv4Addr) -> Result<()> {
    let (say_thread, thread_of_listener) = mpsc::channel();
    let (say_moved, moved) = mpsc::channel();
    let (hand_over, connections) = mpsc::channel::<TcpStream>();
    let listener = std::thread::spawn(move || -> Result<()> {
        nix::sched::unshare(CloneFlags::CLONE_NEWNET).context("a network namespace for the control card")?;
        say_thread.send(nix::unistd::gettid())?;
        moved.recv()?;
        run("ip", &["addr", "add", &format!("{address}/30"), "dev", CONTROL_CARD])?;
        run("ip", &["link", "set", CONTROL_CARD, "up"])?;
        let listener = TcpListener::bind((address, wire::PORT)).context("listening on the control network")?;
        for connection in listener.incoming() {
            hand_over.send(connection?)?;
        }
        Ok(())
    });
    if let Ok(thread) = thread_of_listener.recv() {
        run("ip", &["link", "set", CONTROL_CARD, "netns", &thread.to_string()])?;
        say_moved.send(())?;
    }
    // Threads inherit the network of the thread that starts them: commands must start here, not in the listener.
    for connection in connections {
        std::thread::spawn(move || {
            // An error here is a connection that broke; the other end knows.
            let _ = converse(&connection);
            let _ = connection.shutdown(Shutdown::Both);
        });
    }
    match listener.join() {
        Ok(result) => result.context("the control network ended"),
        Err(_) => bail!("the control network's thread panicked"),
    }
}

/// The connection's writing half, shared by the threads that carry streams.
#[derive(Clone)]
struct Out(Arc<Mutex<TcpStream>>);

impl Out {
    fn send(&self, kind: Kind, payload: &[u8]) -> Result<()> {
        let Ok(mut stream) = self.0.lock() else { bail!("a thread of this connection panicked") };
        wire::write_frame(&mut *stream, kind, payload)
    }
}

fn converse(connection: &TcpStream) -> Result<()> {
    connection.set_nodelay(true)?;
    let out = Out(Arc::new(Mutex::new(connection.try_clone()?)));
    let mut from = connection.try_clone()?;
    let Some((Kind::Request, payload)) = wire::read_frame(&mut from)? else { bail!("no request") };
    let request: Request = serde_json::from_slice(&payload)?;
    if request.fresh {
        // The outer machine's files are cached as if nobody wrote to them. Somebody does: cargo.
        nix::unistd::sync();
        let _ = std::fs::write("/proc/sys/vm/drop_caches", "3");
    }
    match Running::start(&request) {
        Ok(running) => running.carry(&request, from, &out),
        Err(error) => out.send(Kind::Failed, format!("{error:#}").as_bytes()),
    }
}

/// A command that was started, and the outer ends of its streams.
struct Running {
    child: Child,
    group: Pid,
    input: Option<File>,
    outputs: Vec<(Kind, File)>,
    terminal: Option<String>,
}

impl Running {
    fn start(request: &Request) -> Result<Running> {
        let Some((program, arguments)) = request.words.split_first() else { bail!("no command") };
        let mut command = match request.terminal {
            // Its own session with the terminal as the controlling one.
            Some(_) => {
                let mut command = Command::new("setsid");
                command.arg("--ctty").arg(program);
                command
            }
            None => {
                let mut command = Command::new(program);
                command.process_group(0);
                command
            }
        };
        command.args(arguments).envs(request.environment.iter().cloned());
        command.current_dir(request.folder.as_deref().unwrap_or("/"));
        match request.terminal {
            Some(size) => Running::on_a_terminal(command, size),
            None => Running::on_pipes(command),
        }
        .with_context(|| format!("cannot start {program}"))
    }

    fn on_pipes(mut command: Command) -> Result<Running> {
        let mut child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn()?;
        let input = child.stdin.take().map(|pipe| File::from(OwnedFd::from(pipe)));
        let stdout = child.stdout.take().map(|pipe| (Kind::Stdout, File::from(OwnedFd::from(pipe))));
        let stderr = child.stderr.take().map(|pipe| (Kind::Stderr, File::from(OwnedFd::from(pipe))));
        let group = Pid::from_raw(i32::try_from(child.id())?);
        Ok(Running { child, group, input, outputs: stdout.into_iter().chain(stderr).collect(), terminal: None })
    }

    fn on_a_terminal(mut command: Command, size: Terminal) -> Result<Running> {
        let size = Winsize { ws_row: size.rows, ws_col: size.columns, ws_xpixel: 0, ws_ypixel: 0 };
        let pair = openpty(Some(&size), None).context("a terminal")?;
        let name = std::fs::read_link(format!("/proc/self/fd/{}", std::os::fd::AsRawFd::as_raw_fd(&pair.slave)))?;
        command.stdin(pair.slave.try_clone()?).stdout(pair.slave.try_clone()?).stderr(pair.slave);
        let child = command.spawn()?;
        // The command's own copies of the terminal's ends would keep it open.
        drop(command);
        let group = Pid::from_raw(i32::try_from(child.id())?);
        let input = Some(File::from(pair.master.try_clone()?));
        let outputs = vec![(Kind::Stdout, File::from(pair.master))];
        Ok(Running { child, group, input, outputs, terminal: Some(name.to_string_lossy().into_owned()) })
    }

    /// Carries the streams until the command has ended and all that it wrote is on its way.
    fn carry(mut self, request: &Request, from: TcpStream, out: &Out) -> Result<()> {
        out.send(Kind::Started, self.group.to_string().as_bytes())?;
        let ended = Arc::new(AtomicBool::new(false));
        let (group, input, terminal) = (self.group, self.input.take(), self.terminal.take());
        let over = Arc::clone(&ended);
        std::thread::spawn(move || obey(from, group, input, terminal.as_deref(), &over));
        let mut pumps = Vec::new();
        for (kind, stream) in self.outputs.drain(..) {
            let (out, ended) = (out.clone(), Arc::clone(&ended));
            pumps.push(std::thread::spawn(move || pump(stream, kind, &out, &ended)));
        }
        let end = wait(&mut self.child, group, request.limit_ms.map(Duration::from_millis))?;
        ended.store(true, Ordering::Release);
        for pump in pumps {
            let _ = pump.join();
        }
        out.send(Kind::End, &serde_json::to_vec(&end)?)
    }
}

/// Waits for the end; when the time is over, first asks the whole process group to end and then kills it.
fn wait(child: &mut Child, group: Pid, limit: Option<Duration>) -> Result<End> {
    let start = Instant::now();
    let over = |extra| limit.is_some_and(|limit| start.elapsed() > limit + extra);
    let mut timed_out = false;
    let mut pause = Duration::from_millis(1);
    loop {
        if let Some(status) = child.try_wait()? {
            return Ok(End { code: status.code(), signal: status.signal(), timed_out });
        }
        if over(GRACE) {
            let _ = killpg(group, Signal::SIGKILL);
        } else if over(Duration::ZERO) && !timed_out {
            timed_out = true;
            let _ = killpg(group, Signal::SIGTERM);
        }
        std::thread::sleep(pause);
        pause = (pause * 2).min(Duration::from_millis(20));
    }
}

/// Does what the other end says until it goes; then the command goes too, with all of its process group.
fn obey(mut from: TcpStream, group: Pid, input: Option<File>, terminal: Option<&str>, ended: &AtomicBool) {
    let mut queue = input.map(feed);
    while let Ok(Some((kind, payload))) = wire::read_frame(&mut from) {
        match kind {
            Kind::Input => {
                if queue.as_ref().is_some_and(|queue| !hand_over(queue, payload, &from)) {
                    break;
                }
            }
            Kind::InputEnd => queue = None,
            Kind::Signal => signal(group, &payload, terminal),
            _ => break,
        }
    }
    if !ended.load(Ordering::Acquire) {
        let _ = killpg(group, Signal::SIGKILL);
    }
}

/// A thread that writes standard input: a command that does not read must not keep us from noticing that the other end went.
fn feed(mut input: File) -> SyncSender<Vec<u8>> {
    let (queue, pieces) = mpsc::sync_channel::<Vec<u8>>(4);
    std::thread::spawn(move || {
        // A command that reads no more is no error: what is left is thrown away.
        while pieces.recv().is_ok_and(|bytes| input.write_all(&bytes).is_ok()) {}
    });
    queue
}

/// Queues a piece of standard input when there is room; false when the other end goes before there is.
fn hand_over(queue: &SyncSender<Vec<u8>>, mut bytes: Vec<u8>, from: &TcpStream) -> bool {
    // POLLRDHUP, which nix does not name: the other end has shut down, whether or not all was read.
    let gone = PollFlags::from_bits_retain(0x2000) | PollFlags::POLLHUP | PollFlags::POLLERR;
    loop {
        bytes = match queue.try_send(bytes) {
            Ok(()) | Err(TrySendError::Disconnected(_)) => return true,
            Err(TrySendError::Full(bytes)) => bytes,
        };
        let mut fds = [PollFd::new(from.as_fd(), gone)];
        if poll(&mut fds, PollTimeout::from(10u8)).is_ok_and(|count| count > 0) {
            return false;
        }
    }
}

/// One byte is a signal for the process group; five are SIGWINCH with the new size of the terminal.
fn signal(group: Pid, payload: &[u8], terminal: Option<&str>) {
    match (payload, terminal) {
        ([number], _) => drop(Signal::try_from(i32::from(*number)).map(|signal| killpg(group, signal))),
        ([_, r0, r1, c0, c1], Some(terminal)) => {
            let (rows, columns) = (u16::from_le_bytes([*r0, *r1]), u16::from_le_bytes([*c0, *c1]));
            let _ = run("stty", &["-F", terminal, "rows", &rows.to_string(), "columns", &columns.to_string()]);
        }
        _ => {}
    }
}

/// Carries one stream until it ends, or until the command has ended and nothing more is in it: somebody whom the command
/// left in the background may hold it open for ever.
fn pump(mut stream: File, kind: Kind, out: &Out, ended: &AtomicBool) {
    let mut bytes = vec![0u8; 64 << 10];
    loop {
        // Asked before the look at the stream: what came before the end is in the stream by then.
        let last = ended.load(Ordering::Acquire);
        let mut fds = [PollFd::new(stream.as_fd(), PollFlags::POLLIN)];
        match poll(&mut fds, PollTimeout::from(SILENCE_MS)) {
            Ok(0) if last => return,
            Ok(0) | Err(nix::errno::Errno::EINTR) => continue,
            Ok(_) => {}
            Err(_) => return,
        }
        let length = match stream.read(&mut bytes) {
            // A terminal whose last user has gone reads as EIO.
            Ok(0) => return,
            Ok(length) => length,
            Err(error) if error.kind() == ErrorKind::Interrupted => continue,
            Err(_) => return,
        };
        if out.send(kind, bytes.get(..length).unwrap_or_default()).is_err() {
            return;
        }
    }
}
