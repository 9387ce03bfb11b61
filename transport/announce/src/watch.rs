//! Watching the ports of guests: one filtered packet socket for each, one thread for all, and what was learned of each guest.
//! What a frame means is `learn`'s. It sends nothing.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::os::fd::AsFd;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use nix::errno::Errno;
use nix::net::if_::if_nametoindex;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::eventfd::{EfdFlags, EventFd};
use thiserror::Error;
use tracing::debug;

use crate::learn::{Learned, Way};
use crate::socket::{FRAME_BYTES_MAX, ListenError, PacketSocket};

/// The most ports that one watcher watches.
pub const WATCHED_MAX: usize = 1024;

/// Frames read from one port before the others have their turn.
const FRAMES_MAX: usize = 64;
/// The pause after something was heard: a guest that floods its port costs no more than [`FRAMES_MAX`] frames in that time, and one
/// that has just come and is announced is not kept from its CPU.
const PAUSE: Duration = Duration::from_millis(50);

/// Why a port is not watched.
#[derive(Debug, Error)]
pub enum WatchError {
    /// The port cannot be heard.
    #[error("the addresses of the guest on {interface} are not learned: {error}")]
    Listen {
        /// The port.
        interface: String,
        /// Why.
        error: ListenError,
    },
    /// There are too many.
    #[error("the addresses of the guest on {0} are not learned: {WATCHED_MAX} guests' ports are watched already")]
    TooMany(String),
    /// The watcher could not begin.
    #[error("no guest's addresses are learned: {0}")]
    Begin(std::io::Error),
}

/// Watches ports of guests. The thread begins with the first port and ends with the watcher.
#[derive(Debug, Default)]
pub struct Watcher {
    shared: Mutex<Option<Arc<Shared>>>,
}

#[derive(Debug)]
struct Shared {
    table: Mutex<Table>,
    /// Written when the table has changed.
    changed: EventFd,
}

#[derive(Debug, Default)]
struct Table {
    ports: BTreeMap<u64, Port>,
    next: u64,
    ended: bool,
}

#[derive(Debug)]
struct Port {
    mac: [u8; 6],
    interface: String,
    index: u32,
    socket: Arc<PacketSocket>,
    learned: Learned,
    /// The interface is gone; what was learned stays until the watch ends.
    gone: bool,
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, Table> {
        self.table.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn wake(&self) {
        // It only fails when it is as full as can be, and then the thread wakes anyway.
        let _ = self.changed.write(1);
    }
}

impl Watcher {
    /// Begins to watch the port `interface` of the guest's card with `mac`; `known` are addresses that were learned
    /// elsewhere, the one seen last first. It ends when what is returned is dropped.
    ///
    /// # Errors
    /// The interface is not there, packet sockets are not permitted, or there are too many ports.
    pub fn watch(&self, interface: &str, mac: [u8; 6], known: &[IpAddr]) -> Result<Watch, WatchError> {
        let failed = |error| WatchError::Listen { interface: interface.to_owned(), error };
        let index = if_nametoindex(interface).map_err(|_| failed(ListenError::NoSuchInterface))?;
        let socket = Arc::new(PacketSocket::listen(interface).map_err(failed)?);
        let shared = self.shared().map_err(WatchError::Begin)?;
        let mut table = shared.lock();
        if table.ports.len() >= WATCHED_MAX {
            return Err(WatchError::TooMany(interface.to_owned()));
        }
        table.next += 1;
        let id = table.next;
        let learned = Learned::new(known);
        table.ports.insert(id, Port { mac, interface: interface.to_owned(), index, socket, learned, gone: false });
        drop(table);
        shared.wake();
        Ok(Watch { shared, id })
    }

    fn shared(&self) -> std::io::Result<Arc<Shared>> {
        let mut shared = self.shared.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(shared) = &*shared {
            return Ok(Arc::clone(shared));
        }
        let changed = EventFd::from_value_and_flags(0, EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK)?;
        let new = Arc::new(Shared { table: Mutex::default(), changed });
        let run = Arc::clone(&new);
        std::thread::Builder::new().name("learning".into()).spawn(move || hear(&run))?;
        Ok(Arc::clone(shared.insert(new)))
    }
}

impl Drop for Watcher {
    fn drop(&mut self) {
        if let Some(shared) = self.shared.get_mut().unwrap_or_else(PoisonError::into_inner) {
            shared.lock().ended = true;
            shared.wake();
        }
    }
}

/// A port that is watched, until this is dropped.
#[derive(Debug)]
pub struct Watch {
    shared: Arc<Shared>,
    id: u64,
}

impl Watch {
    /// The addresses learned of the card, the one seen last first.
    pub fn addresses(&self) -> Vec<IpAddr> {
        self.shared.lock().ports.get(&self.id).map_or_else(Vec::new, |port| port.learned.addresses())
    }
}

impl Drop for Watch {
    fn drop(&mut self) {
        self.shared.lock().ports.remove(&self.id);
        self.shared.wake();
    }
}

/// The thread: hears all ports until the watcher has ended.
fn hear(shared: &Shared) {
    loop {
        let sockets: Vec<(u64, Arc<PacketSocket>)> = {
            let table = shared.lock();
            if table.ended {
                return;
            }
            table.ports.iter().filter(|(_, port)| !port.gone).map(|(id, port)| (*id, Arc::clone(&port.socket))).collect()
        };
        let mut fds = vec![PollFd::new(shared.changed.as_fd(), PollFlags::POLLIN)];
        fds.extend(sockets.iter().map(|(_, socket)| PollFd::new(socket.as_fd(), PollFlags::POLLIN)));
        match poll(&mut fds, PollTimeout::NONE) {
            Ok(_) | Err(Errno::EINTR) => {}
            Err(error) => return debug!(%error, "guests' addresses are not learned any more"),
        }
        let (changed, rest) = fds.split_first().map_or((false, [].as_slice()), |(first, rest)| (has_events(first), rest));
        if changed {
            let _ = shared.changed.read();
        }
        let heard: Vec<&(u64, Arc<PacketSocket>)> =
            sockets.iter().zip(rest).filter(|(_, fd)| has_events(fd)).map(|(socket, _)| socket).collect();
        for (id, socket) in &heard {
            read(shared, *id, socket);
        }
        if !heard.is_empty() {
            std::thread::sleep(PAUSE);
        }
    }
}

fn has_events(fd: &PollFd<'_>) -> bool {
    fd.revents().is_some_and(|events| !events.is_empty())
}

fn read(shared: &Shared, id: u64, socket: &PacketSocket) {
    let mut buffer = [0; FRAME_BYTES_MAX];
    for _ in 0..FRAMES_MAX {
        let received = socket.receive(&mut buffer);
        let mut table = shared.lock();
        let Some(port) = table.ports.get_mut(&id) else { return };
        match received {
            Ok((bytes, outgoing)) => {
                let way = if outgoing { Way::ToGuest } else { Way::FromGuest };
                port.learned.frame(port.mac, way, buffer.get(..bytes).unwrap_or_default());
            }
            Err(Errno::EAGAIN) => return,
            Err(_) => {
                // Down for a moment is no harm; an interface that is gone never speaks again.
                port.gone = if_nametoindex(port.interface.as_str()) != Ok(port.index);
                return;
            }
        }
    }
}
