//! Links that write straight into the destination's memory: what a lane is told about both memories, how the source gets the
//! destination's keys chunk by chunk, and what a destination must have to give them (a [`Fabric`]). It knows no device; the
//! keys travel as messages of the control channel, which the two drivers pass on.

use crate::HostError;
use crate::lanes::{CpuMeter, LaneCounters, LaneEvent, LaneEvents};
use crate::pages::Pages;
use limosa_proto::identity::{Generation, MigrationId};
use limosa_proto::wire::frame::LaneToken;
use limosa_proto::wire::limits::KEYS_PER_MESSAGE_MAX;
use limosa_proto::wire::offer::{MemoryKey, chunks};
use std::collections::BTreeSet;
use std::io;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use tokio::sync::mpsc;

/// What a link is told when it opens the lanes of one migration; the same for all of them.
#[derive(Clone)]
pub struct LaneMemory {
    /// The guest's memory at the source.
    pub pages: Arc<dyn Pages>,
    /// The destination's keys, for links that write memory directly.
    pub keys: Arc<RemoteKeys>,
    /// Whether both sides agreed on a keyed hash of pages.
    pub page_check: bool,
}

impl std::fmt::Debug for LaneMemory {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "LaneMemory(page check {})", self.page_check)
    }
}

#[derive(Debug, Clone, Copy)]
enum KeyState {
    Unknown,
    Asked,
    Known(MemoryKey),
}

#[derive(Debug)]
struct Held {
    states: Vec<KeyState>,
    closed: bool,
}

/// The keys of the destination's memory as its source learns them: asked for when a lane needs them, a few ahead.
#[derive(Debug)]
pub struct RemoteKeys {
    held: Mutex<Held>,
    changed: Condvar,
    asks: mpsc::UnboundedSender<Vec<u32>>,
}

impl RemoteKeys {
    /// No key yet, for the memory of `pages`; what is asked for comes out of the receiver.
    #[must_use]
    pub fn new(pages: &dyn Pages) -> (RemoteKeys, mpsc::UnboundedReceiver<Vec<u32>>) {
        let states = chunks(pages.memory_map()).map(|_| KeyState::Unknown).collect();
        // Each chunk is asked for once, so the queue is bounded by their number.
        let (asks, asked) = mpsc::unbounded_channel();
        (RemoteKeys { held: Mutex::new(Held { states, closed: false }), changed: Condvar::new(), asks }, asked)
    }

    fn held(&self) -> MutexGuard<'_, Held> {
        self.held.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The key of `chunk`, and asks for those of `ahead` too; blocks until it is there.
    ///
    /// # Errors
    /// The migration ended meanwhile, or there is no such chunk.
    pub fn wait(&self, chunk: u32, ahead: &[u32]) -> io::Result<MemoryKey> {
        let mut held = self.held();
        let mut ask = Vec::new();
        for chunk in std::iter::once(chunk).chain(ahead.iter().copied()) {
            if let Some(state @ KeyState::Unknown) = usize::try_from(chunk).ok().and_then(|chunk| held.states.get_mut(chunk)) {
                *state = KeyState::Asked;
                ask.push(chunk);
            }
        }
        for part in ask.chunks(KEYS_PER_MESSAGE_MAX) {
            // A driver that ended has closed the keys.
            let _ = self.asks.send(part.to_vec());
        }
        loop {
            match usize::try_from(chunk).ok().and_then(|chunk| held.states.get(chunk)) {
                None => {
                    return Err(io::Error::new(
                        io::ErrorKind::InvalidInput,
                        format!("there is no chunk {chunk} of guest memory"),
                    ));
                }
                Some(KeyState::Known(key)) => return Ok(*key),
                Some(_) if held.closed => return Err(io::ErrorKind::Interrupted.into()),
                Some(_) => held = self.changed.wait(held).unwrap_or_else(PoisonError::into_inner),
            }
        }
    }

    /// Takes what the destination gave.
    ///
    /// # Errors
    /// A key that was not asked for, in words.
    pub fn insert(&self, keys: &[MemoryKey]) -> Result<(), String> {
        let mut held = self.held();
        for key in keys {
            match usize::try_from(key.chunk).ok().and_then(|chunk| held.states.get_mut(chunk)) {
                Some(state @ KeyState::Asked) => *state = KeyState::Known(*key),
                _ => return Err(format!("the destination gave a key of chunk {} of memory, which was not asked for", key.chunk)),
            }
        }
        drop(held);
        self.changed.notify_all();
        Ok(())
    }

    /// No key comes any more: whoever waits is let go.
    pub fn close(&self) {
        self.held().closed = true;
        self.changed.notify_all();
    }
}

/// What a destination must know to open a guest's memory to direct writes.
#[derive(Clone)]
pub struct Exposure {
    /// Which migration.
    pub migration: MigrationId,
    /// Which attempt.
    pub generation: Generation,
    /// What its lanes must know; the key of the page check is made of it.
    pub token: LaneToken,
    /// The guest's memory, fresh.
    pub pages: Arc<dyn Pages>,
    /// Whether pages are checked by a keyed hash.
    pub page_check: bool,
}

/// A link's device at a destination: opens the memory of incoming guests to direct writes.
pub trait Fabric: Send + Sync + 'static {
    /// The name of the link whose lanes need it: "rdma".
    fn link(&self) -> &'static str;

    /// Opens the memory of one migration, none of it yet. May block.
    ///
    /// # Errors
    /// In words.
    fn expose(&self, exposure: Exposure) -> Result<Box<dyn Exposed>, HostError>;
}

/// The memory of one incoming guest as a device sees it. Dropping it closes it and gives everything back.
pub trait Exposed: Send + Sync + 'static {
    /// Opens one chunk; blocks while the device takes it in.
    ///
    /// # Errors
    /// In words: which chunk, what the device said, what to do.
    fn open(&self, chunk: u32) -> Result<MemoryKey, HostError>;

    /// Closes the memory: when it returns, no write of the source can change it, and no key is given any more. Called after the lanes
    /// have ended, in the downtime: what takes time and can wait belongs into the drop. More than once does no harm.
    ///
    /// # Errors
    /// A page did not arrive as it was sent (with the number of such pages), or the device does not let go.
    fn close(&self) -> Result<(), ExposedError>;
}

/// Why a guest's memory is not what its source has.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ExposedError {
    /// Pages whose keyed hash is not the source's.
    #[error(
        "{pages} pages did not arrive as they were sent (the first is page {first}): the fabric changes data, or someone does"
    )]
    PageCheck {
        /// How many.
        pages: u64,
        /// The first one's number.
        first: u64,
    },
    /// The device failed.
    #[error("{0}")]
    Device(String),
}

/// Opens the chunks that a source asks for, one after the other, on a thread of its own: the lanes go on meanwhile.
pub(crate) struct Opener {
    exposed: Arc<dyn Exposed>,
    queue: Option<std::sync::mpsc::Sender<u32>>,
    thread: Option<JoinHandle<()>>,
    asked: Asked,
    all: usize,
}

impl Opener {
    /// Waits for chunks of `pages` to open; keys and failures go to `events`, CPU time to `counters`.
    pub(crate) fn start(
        exposed: Arc<dyn Exposed>,
        pages: &dyn Pages,
        counters: Arc<LaneCounters>,
        events: LaneEvents,
    ) -> io::Result<Opener> {
        let (queue, wanted) = std::sync::mpsc::channel();
        let device = exposed.clone();
        let thread = std::thread::Builder::new().name("open-memory".into()).spawn(move || {
            let mut meter = CpuMeter::new(&counters.cpu_ns);
            while let Ok(chunk) = wanted.recv() {
                let opened = device.open(chunk);
                meter.count();
                let failed = opened.is_err();
                let _ = events.send(LaneEvent::Opened(opened.map_err(|error| error.words)));
                if failed {
                    return;
                }
            }
        })?;
        let all = chunks(pages.memory_map()).count();
        Ok(Opener { exposed, queue: Some(queue), thread: Some(thread), asked: Asked::default(), all })
    }

    /// Opens `chunks` after those that were asked for before.
    ///
    /// # Errors
    /// A chunk that is not there, or was asked for already.
    pub(crate) fn open(&mut self, chunks: &[u32]) -> Result<(), String> {
        self.asked.note(chunks, self.all)?;
        for chunk in chunks {
            // The thread ends early only after a failure, which ends the migration.
            let _ = self.queue.as_ref().map(|queue| queue.send(*chunk));
        }
        Ok(())
    }

    /// Closes everything, after what is being opened; see [`Exposed::close`].
    pub(crate) fn close(&mut self) -> Result<(), ExposedError> {
        self.queue = None;
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
        self.exposed.close()
    }
}

/// Which chunks a source has asked for: each once.
#[derive(Debug, Default)]
pub(crate) struct Asked(BTreeSet<u32>);

impl Asked {
    /// Notes `chunks` of the `all` that there are.
    pub(crate) fn note(&mut self, chunks: &[u32], all: usize) -> Result<(), String> {
        for chunk in chunks {
            if usize::try_from(*chunk).map_or(true, |chunk| chunk >= all) {
                return Err(format!("the source asks for the key of chunk {chunk} of {all}"));
            }
            if !self.0.insert(*chunk) {
                return Err(format!("the source asks twice for the key of chunk {chunk}"));
            }
        }
        Ok(())
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn a_chunk_is_asked_for_once_and_must_exist() {
        let mut asked = Asked::default();
        asked.note(&[0, 2], 3).unwrap();
        assert!(asked.note(&[2], 3).unwrap_err().contains("twice"));
        assert!(asked.note(&[3], 3).unwrap_err().contains("of 3"));
    }
}
