//! The guest's serial line on a UNIX socket: whoever connects sees what the guest writes, and types to it.
//! Not the serial port itself, nor the terminal: that is `commands/console`.
//!
//! Whoever reads slowly loses output, and who stops reading is let go: a console must hold up neither the guest nor its log.

use limosa_machine::Machine;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use std::collections::VecDeque;
use std::io::{self, ErrorKind, Read as _, Write};
use std::os::fd::AsFd as _;
use std::os::unix::fs::PermissionsExt as _;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::time::Duration;

/// Who may look at the same time.
const CLIENTS_MAX: usize = 4;
/// What somebody who connects is shown of what was before.
const SHOWN_BYTES: usize = 4096;
/// How often it is looked whether the machine is still there.
const LOOK_MS: u16 = 500;
/// How long typed bytes wait for the guest to read those before.
const TYPED_WAIT: Duration = Duration::from_millis(5);
/// How often at most, before they are thrown away: a guest that reads nothing must not hold a thread for ever.
const TYPED_TRIES: u32 = 2000;

/// The socket and who is connected.
#[derive(Debug)]
pub(super) struct Console {
    listener: UnixListener,
    state: Arc<Mutex<State>>,
}

#[derive(Debug, Default)]
struct State {
    last: VecDeque<u8>,
    /// Who is connected, each with a number.
    clients: Vec<(u64, UnixStream)>,
    number: u64,
}

fn lock(state: &Mutex<State>) -> MutexGuard<'_, State> {
    state.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Console {
    /// Listens at `path`, for this user only. A socket that nobody listens at any more is replaced.
    pub(super) fn listen(path: &Path) -> io::Result<Console> {
        if UnixStream::connect(path).is_err() {
            // There may be none.
            let _ = std::fs::remove_file(path);
        }
        let listener = UnixListener::bind(path)?;
        std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o600))?;
        Ok(Console { listener, state: Arc::default() })
    }

    /// What the guest writes goes to `log` and to everybody who is connected.
    pub(super) fn tee(&self, log: Box<dyn Write + Send>) -> Tee {
        Tee { log, state: Arc::clone(&self.state) }
    }

    /// Lets people in, and what they type goes to the guest, until the machine is gone.
    pub(super) fn serve(self, machine: Weak<Machine>) -> io::Result<()> {
        let accept = move || {
            for client in self.listener.incoming() {
                if machine.strong_count() == 0 {
                    return;
                }
                match client.and_then(|client| welcome(&self.state, &client).map(|number| (client, number))) {
                    Ok((client, number)) => {
                        let (machine, state) = (Weak::clone(&machine), Arc::clone(&self.state));
                        let read = move || {
                            carry(&client, &machine);
                            lock(&state).clients.retain(|(other, _)| *other != number);
                        };
                        if let Err(error) = std::thread::Builder::new().name("typing".into()).spawn(read) {
                            tracing::warn!(%error, "nobody can type at the console: no thread");
                        }
                    }
                    Err(error) => {
                        tracing::debug!(%error, "somebody could not be let in at the console");
                        std::thread::sleep(Duration::from_millis(20));
                    }
                }
            }
        };
        std::thread::Builder::new().name("console".into()).spawn(accept).map(drop)
    }
}

/// Shows a newcomer what was written last, and keeps it among those who are shown more; gives its number.
fn welcome(state: &Mutex<State>, client: &UnixStream) -> io::Result<u64> {
    let mut state = lock(state);
    if state.clients.len() >= CLIENTS_MAX {
        return Err(io::Error::other(format!("{CLIENTS_MAX} are connected already")));
    }
    let mut shown = client.try_clone()?;
    // A write must not wait under the lock, which the guest's output takes too. Reads are by another descriptor of the same
    // socket, which does not wait either, so they poll.
    shown.set_nonblocking(true)?;
    let (first, second) = state.last.as_slices();
    shown.write_all(first)?;
    shown.write_all(second)?;
    state.number += 1;
    let number = state.number;
    state.clients.push((number, shown));
    Ok(number)
}

/// Carries what somebody types to the guest until they leave.
fn carry(client: &UnixStream, machine: &Weak<Machine>) {
    let mut typed = [0; 256];
    loop {
        let mut fds = [PollFd::new(client.as_fd(), PollFlags::POLLIN)];
        if poll(&mut fds, PollTimeout::from(LOOK_MS)) == Ok(0) && machine.strong_count() > 0 {
            continue;
        }
        let bytes = match (&*client).read(&mut typed) {
            Ok(0) => break,
            Ok(bytes) => bytes,
            Err(error) if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::Interrupted) => continue,
            Err(_) => break,
        };
        let mut rest = typed.get(..bytes).unwrap_or_default();
        for _ in 0..TYPED_TRIES {
            let Some(machine) = machine.upgrade() else { break };
            rest = rest.get(machine.serial_input(rest)..).unwrap_or_default();
            if rest.is_empty() {
                break;
            }
            drop(machine);
            std::thread::sleep(TYPED_WAIT);
        }
        if machine.strong_count() == 0 {
            break;
        }
    }
}

/// Writes to the log and to everybody who is connected.
pub(super) struct Tee {
    log: Box<dyn Write + Send>,
    state: Arc<Mutex<State>>,
}

impl Write for Tee {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let written = self.log.write(bytes)?;
        let bytes = bytes.get(..written).unwrap_or_default();
        let mut state = lock(&self.state);
        state.last.extend(bytes);
        let over = state.last.len().saturating_sub(SHOWN_BYTES);
        state.last.drain(..over);
        // A part that finds no room is lost, and whoever has gone is let go.
        state.clients.retain_mut(|(_, client)| match client.write_all(bytes) {
            Ok(()) => true,
            Err(error) => error.kind() == ErrorKind::WouldBlock,
        });
        Ok(written)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.log.flush()
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn output_is_shown_to_many_and_held_up_by_none() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("console");
        let console = Console::listen(&path).unwrap();
        let mut tee = console.tee(Box::new(Vec::new()));
        tee.write_all(&[b'x'; 5000]).unwrap();
        tee.write_all(b"before ").unwrap();
        let join = || {
            let client = UnixStream::connect(&path).unwrap();
            let (accepted, _) = console.listener.accept().unwrap();
            welcome(&console.state, &accepted).map(|_| client)
        };
        let (mut first, _silent) = (join().unwrap(), join().unwrap());
        tee.write_all(b"after").unwrap();
        let mut shown = vec![0; SHOWN_BYTES + 5];
        first.read_exact(&mut shown).unwrap();
        assert!(shown.starts_with(b"xxx") && shown.ends_with(b"before after"));
        // One who reads nothing: output goes on.
        tee.write_all(&vec![b'y'; 4 << 20]).unwrap();
        drop(first);
        tee.write_all(b"z").unwrap();
        tee.write_all(b"z").unwrap();
        assert!(lock(&console.state).clients.len() <= 1);
        let (_third, _fourth, _fifth) = (join().unwrap(), join().unwrap(), join().unwrap());
        assert!(join().is_err(), "no more than {CLIENTS_MAX}");
        assert!(Console::listen(&path).is_err(), "the path is taken");
    }
}
