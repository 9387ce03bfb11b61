//! The VMM's end of the plug: connect, say hello, answer, and connect again when the agent is lost.
//! It knows nothing of KVM: what a request does to the guest is the [`Vmm`] that it is given.
//!
//! A guest that runs when the agent is lost runs on. One that is paused stays paused until an agent says otherwise:
//! nothing in here resumes it. An incoming VMM that holds no device state yet ends, since its migration died with the
//! agent; one that is loaded waits, since its guest may live nowhere else.

use crate::description::Machine;
use crate::dirty::DirtyBitmap;
use crate::error::ServeError;
use crate::memfd;
use crate::message::{
    self as wire, ANSWER, Answer, COMPLAINT, Header, Hello, Kind, Malformed, Request, Role, Status, Token, VERSION, VmStatus,
};
use crate::records;
use crate::socket::{Buffer, Received, Socket, wait_any};
use crate::state::{VmState, permit};
use limosa_proto::identity::VmId;
use limosa_proto::memory::MemoryMap;
use limosa_proto::record::Record;
use limosa_proto::wire::message::VmDescription;
use nix::sys::eventfd::{EfdFlags, EventFd};
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::mpsc;
use std::time::{Duration, Instant};

/// First and last pause between attempts to connect.
const BACKOFF_MS: (u64, u64) = (50, 1_000);
/// How long an agent has to answer Hello.
const WELCOME_TIME_MAX: Duration = Duration::from_secs(5);

/// What a VMM tells about its guest.
#[derive(Debug)]
pub struct VmmDescription {
    /// The guest. Its shape never changes while the VMM lives.
    pub description: VmDescription,
    /// For each memory region its memfd, sealed with `F_SEAL_SHRINK` ([`memfd::seal`]), and at which byte of it the
    /// region begins.
    pub memory: Vec<(OwnedFd, u64)>,
}

/// What a VMM does when it is asked. [`serve`] calls a method only in a state in which it makes sense (see
/// [`permit`]), one after the other. An `Err` is words for the operator; the state is then as before the call.
#[allow(clippy::missing_errors_doc, reason = "said once for all of them above")]
pub trait Vmm: Send {
    /// What the guest is, with its memory.
    fn describe(&mut self) -> Result<VmmDescription, String>;
    /// Incoming: build this machine, not running. `bridges` names this host's bridge for each network.
    fn prepare(&mut self, description: &VmDescription, bridges: &[(String, String)]) -> Result<VmmDescription, String>;
    /// Dirty tracking on or off. Every write after it went on must be found by a later `fetch_dirty`.
    fn track(&mut self, on: bool) -> Result<(), String>;
    /// Sets the bits of the pages written since the last call (or since tracking began), by the guest or by the VMM
    /// itself. More is allowed, fewer never.
    fn fetch_dirty(&mut self, into: &DirtyBitmap) -> Result<(), String>;
    /// Stops the guest. When it returns nothing writes guest memory, the VMM's own devices included.
    fn pause(&mut self) -> Result<(), String>;
    /// Device state of the paused guest. May write guest memory, if the next `fetch_dirty` says so.
    fn save(&mut self) -> Result<Vec<Record>, String>;
    /// Incoming: takes all of the device state. Must refuse what it does not know.
    fn load(&mut self, state: Vec<Record>) -> Result<(), String>;
    /// Gives up what only one host may hold, such as locks on images, with everything flushed: the guest is about to run
    /// elsewhere. Having given up already is fine. `resume` takes it again first, or fails. As it stands: nothing is held.
    fn give_up(&mut self) -> Result<(), String> {
        Ok(())
    }
    /// Takes what [`Vmm::give_up`] gives up, without letting the guest run: it has arrived here paused. As it stands: nothing
    /// is held.
    fn take(&mut self) -> Result<(), String> {
        Ok(())
    }
    /// Lets the guest run; holds again what [`Vmm::give_up`] gave up before it does.
    fn resume(&mut self) -> Result<(), String>;
    /// Slows the guest down by so many per cent. `Err` means that it is not offered.
    fn throttle(&mut self, percent: u8) -> Result<(), String>;
    /// The guest lives elsewhere: never run it again. [`serve`] ends next.
    fn release(&mut self) -> Result<(), String>;
    /// The guest does not come. [`serve`] ends next.
    fn discard(&mut self) -> Result<(), String>;
    /// Stop the guest. [`serve`] ends next.
    fn shutdown(&mut self) -> Result<(), String>;
}

/// What the rest of the VMM tells [`serve`].
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum VmmEvent {
    /// The guest stopped by itself, in words; the agent is told and `serve` ends.
    GuestStopped(String),
    /// End `serve` without telling anybody anything.
    Leave,
}

/// Sends events to [`serve`], from any thread.
#[derive(Debug, Clone)]
pub struct EventSender {
    sender: mpsc::Sender<VmmEvent>,
    wake: Arc<EventFd>,
}

impl EventSender {
    /// Sends one; it is lost if `serve` has ended.
    pub fn send(&self, event: VmmEvent) {
        if self.sender.send(event).is_ok() {
            let _ = self.wake.write(1);
        }
    }
}

/// Where [`serve`] gets its events from.
#[derive(Debug)]
pub struct EventReceiver {
    receiver: mpsc::Receiver<VmmEvent>,
    wake: Arc<EventFd>,
}

/// A channel for events to [`serve`].
///
/// # Errors
/// The system's: no descriptor left.
pub fn events() -> io::Result<(EventSender, EventReceiver)> {
    let wake = Arc::new(EventFd::from_flags(EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK)?);
    let (sender, receiver) = mpsc::channel();
    Ok((EventSender { sender, wake: Arc::clone(&wake) }, EventReceiver { receiver, wake }))
}

/// How a VMM plugs in.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ServeOptions {
    /// The agent's socket.
    pub socket: PathBuf,
    /// What the agent gave this VMM when it started it; zeros if it did not.
    pub token: Token,
    /// The guest; zeros for an incoming VMM.
    pub id: VmId,
    /// The guest's name; empty for an incoming VMM.
    pub name: String,
    /// `Running` or `Paused` for a VMM with a guest, `Waiting` for an incoming one.
    pub state: VmState,
    /// How long to try to reach an agent for the first time; `None`: for ever, the guest runs meanwhile.
    pub first_contact_time_max: Option<Duration>,
}

/// Why [`serve`] ended. After all of them the VMM exits.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Ended {
    /// The guest lives elsewhere.
    Released,
    /// The incoming guest does not come.
    Discarded,
    /// The agent had the guest stopped.
    Shutdown,
    /// The guest stopped by itself, in words.
    GuestStopped(String),
    /// [`VmmEvent::Leave`] came.
    Left,
    /// The agent turned this VMM away when it came for the first time, in its words.
    Rejected(String),
    /// No agent could be reached in time, or an incoming VMM without a guest lost its agent.
    NoAgent(String),
}

/// Plugs `vmm` in and answers the agent until there is a reason to end.
///
/// # Errors
/// Options that make no sense, or no descriptor left.
pub fn serve(options: &ServeOptions, vmm: &mut dyn Vmm, events: &EventReceiver) -> Result<Ended, ServeError> {
    if !matches!(options.state, VmState::Running | VmState::Paused | VmState::Waiting) {
        return Err(ServeError::Options(format!("a VMM does not begin in the state \"{}\"", options.state.words())));
    }
    wire::name_length("name of the VM", &options.name).map_err(|error| ServeError::Options(error.to_string()))?;
    let mut session = Session::new(options, vmm);
    let begun = Instant::now();
    let (mut greeted, mut backoff_ms) = (false, BACKOFF_MS.0);
    loop {
        let lost = match session.greet() {
            Ok(Greeting::Welcome(socket)) => {
                (greeted, backoff_ms) = (true, BACKOFF_MS.0);
                match session.answer_all(&socket, events) {
                    Ok(ended) => return Ok(ended),
                    Err(words) => {
                        tracing::warn!(%words, state = session.state.words(), "the agent is lost");
                        session.agent_lost();
                        words
                    }
                }
            }
            Ok(Greeting::Reject(words)) if !greeted => return Ok(Ended::Rejected(words)),
            Ok(Greeting::Reject(words)) => {
                tracing::warn!(%words, "the agent does not let this VMM in again");
                words
            }
            Err(error) => error.to_string(),
        };
        if greeted && matches!(session.state, VmState::Waiting | VmState::Prepared) {
            return Ok(Ended::NoAgent(lost));
        }
        if !greeted && options.first_contact_time_max.is_some_and(|most| begun.elapsed() >= most) {
            return Ok(Ended::NoAgent(lost));
        }
        if let Some(ended) = rest(events, Duration::from_millis(backoff_ms))? {
            return Ok(ended);
        }
        backoff_ms = (backoff_ms * 2).min(BACKOFF_MS.1);
    }
}

/// Waits between two attempts; an event ends it.
fn rest(events: &EventReceiver, time: Duration) -> Result<Option<Ended>, ServeError> {
    let end = Instant::now() + time;
    loop {
        match events.receiver.try_recv() {
            Ok(VmmEvent::GuestStopped(words)) => return Ok(Some(Ended::GuestStopped(words))),
            Ok(VmmEvent::Leave) => return Ok(Some(Ended::Left)),
            Err(_) => {}
        }
        let left = end.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Ok(None);
        }
        let ready = wait_any(&[events.wake.as_fd()], Some(left));
        ready.map_err(|source| ServeError::Io { doing: "waiting for events", source })?;
        let _ = events.wake.read();
    }
}

enum Greeting {
    Welcome(Socket),
    Reject(String),
}

/// An answer on its way: what it says, what goes along, and whether the VMM ends after it.
struct Outcome {
    answer: Answer,
    fds: Vec<OwnedFd>,
    ended: Option<Ended>,
}

type Refusal = (Status, String);
/// A datagram, the descriptors that go along, and whether the VMM ends after it.
type Sent = (Vec<u8>, Vec<OwnedFd>, Option<Ended>);

impl From<Answer> for Outcome {
    fn from(answer: Answer) -> Outcome {
        Outcome { answer, fds: Vec::new(), ended: None }
    }
}

struct Session<'a> {
    options: &'a ServeOptions,
    vmm: &'a mut dyn Vmm,
    state: VmState,
    tracking: bool,
    throttle_percent: u8,
    /// Whether the guest's operator has paused it. Only this process knows, whatever becomes of agents.
    held: bool,
    id: VmId,
    name: String,
    dirty: Option<DirtyBitmap>,
}

impl<'a> Session<'a> {
    fn new(options: &'a ServeOptions, vmm: &'a mut dyn Vmm) -> Session<'a> {
        let (state, id, name) = (options.state, options.id, options.name.clone());
        Session { options, vmm, state, tracking: false, throttle_percent: 0, held: false, id, name, dirty: None }
    }

    fn greet(&self) -> io::Result<Greeting> {
        let socket = Socket::connect(&self.options.socket)?;
        let hello = Hello {
            version_min: VERSION,
            version_max: VERSION,
            role: if self.state.is_incoming() { Role::Incoming } else { Role::Running },
            state: self.state,
            pid: std::process::id(),
            id: self.id,
            token: self.options.token,
            name: self.name.clone(),
        };
        socket.send(&hello.emit().map_err(io::Error::other)?, &[])?;
        if !socket.wait(WELCOME_TIME_MAX)? {
            return Err(io::Error::new(io::ErrorKind::TimedOut, "the agent does not answer"));
        }
        let Received::Message { bytes, .. } = socket.receive()? else {
            return Err(io::Error::new(io::ErrorKind::ConnectionReset, "the agent closed the connection"));
        };
        let (header, body) = Header::parse(&bytes).map_err(io::Error::other)?;
        match Kind::from_number(header.kind) {
            Some(Kind::Welcome) if body.starts_with(&VERSION.to_le_bytes()) => Ok(Greeting::Welcome(socket)),
            Some(Kind::Reject) => Ok(Greeting::Reject(wire::words_of(body))),
            _ => Err(io::Error::other("the agent's first message is no greeting of this version")),
        }
    }

    /// Answers until the VMM is to end, or the agent is lost (`Err`, in words).
    fn answer_all(&mut self, socket: &Socket, events: &EventReceiver) -> Result<Ended, String> {
        let mut buffer = Buffer::new();
        loop {
            let ready = wait_any(&[socket.as_fd(), events.wake.as_fd()], None).map_err(|error| error.to_string())?;
            if ready.get(1) == Some(&true) {
                let _ = events.wake.read();
            }
            match events.receiver.try_recv() {
                Ok(VmmEvent::GuestStopped(words)) => {
                    let words = wire::tidy_words(&words);
                    // A lost agent sees that the VMM is gone; the guest has stopped either way.
                    let _ = socket.send(&wire::emit(Kind::GuestStopped as u16, Status::Done, 0, words.as_bytes()), &[]);
                    return Ok(Ended::GuestStopped(words));
                }
                Ok(VmmEvent::Leave) => return Ok(Ended::Left),
                Err(_) => {}
            }
            if ready.first() == Some(&true)
                && let Some(ended) = self.answer_one(socket, &mut buffer)?
            {
                return Ok(ended);
            }
        }
    }

    fn answer_one(&mut self, socket: &Socket, buffer: &mut Buffer) -> Result<Option<Ended>, String> {
        let (bytes, result) = match socket.receive_into(buffer).map_err(|error| error.to_string())? {
            Received::End => return Err("the agent closed the connection or ended".to_owned()),
            Received::TooLarge { bytes, words } => (bytes, Err((Status::Malformed, words.to_owned()))),
            Received::Message { bytes, fds } => {
                let result = self.carry_out(&bytes, fds);
                (bytes, result)
            }
        };
        // What has the header of a message is answered by kind, anything else by a complaint.
        let header = Header::parse(&bytes).ok().map(|(header, _)| header);
        let kind = header.map_or(COMPLAINT, |header| header.kind | ANSWER);
        let request = header.map_or_else(|| Header::request_of(&bytes), |header| header.request);
        let (datagram, fds, ended) = match result.and_then(|outcome| emit_outcome(outcome, kind, request)) {
            Ok(sent) => sent,
            Err((status, words)) => {
                tracing::debug!(kind, %status, %words, "a request was refused");
                (wire::emit(kind, status, request, wire::tidy_words(&words).as_bytes()), Vec::new(), None)
            }
        };
        let fds: Vec<BorrowedFd<'_>> = fds.iter().map(AsFd::as_fd).collect();
        let sent = socket.send(&datagram, &fds);
        match ended {
            // Told to end, it ends, whether or not the agent still hears it.
            Some(ended) => Ok(Some(ended)),
            None => sent.map(|()| None).map_err(|error| error.to_string()),
        }
    }

    fn carry_out(&mut self, bytes: &[u8], fds: Vec<OwnedFd>) -> Result<Outcome, Refusal> {
        let malformed = |error: Malformed| (Status::Malformed, error.to_string());
        let (header, body) = Header::parse(bytes).map_err(malformed)?;
        let kind = Kind::from_number(header.kind).filter(|kind| Kind::REQUESTS.contains(kind));
        let kind = kind.ok_or_else(|| (Status::UnknownKind, format!("there is no request of kind {:#06x}", header.kind)))?;
        let request = Request::parse(kind, body).map_err(malformed)?;
        let wanted = usize::from(kind == Kind::Load);
        if fds.len() != wanted {
            return Err((Status::Malformed, format!("{} came with {} descriptors, not {wanted}", kind.words(), fds.len())));
        }
        permit(kind, self.state, self.tracking).map_err(|words| (Status::WrongState, words))?;
        self.apply(request, fds)
    }

    fn apply(&mut self, request: Request, fds: Vec<OwnedFd>) -> Result<Outcome, Refusal> {
        let begun = Instant::now();
        let took = || Outcome::from(Answer::Took { us: u64::try_from(begun.elapsed().as_micros()).unwrap_or(u64::MAX) });
        match request {
            Request::Describe => {
                let described = self.vmm.describe().map_err(failed)?;
                self.machine(described)
            }
            Request::Prepare(description, bridges) => {
                let described = self.vmm.prepare(&description, &bridges).map_err(failed)?;
                let outcome = self.machine(described)?;
                (self.state, self.id, self.name) = (VmState::Prepared, description.id, description.name);
                Ok(outcome)
            }
            Request::Track(on) => self.track(on).map(|()| Answer::Done.into()),
            Request::FetchDirty => {
                let dirty = self.dirty.as_ref().ok_or_else(|| failed("there is no dirty bitmap".to_owned()))?;
                self.vmm.fetch_dirty(dirty).map_err(failed).map(|()| took())
            }
            Request::Pause => {
                self.vmm.pause().map_err(failed)?;
                self.state = VmState::Paused;
                Ok(took())
            }
            Request::Save => {
                let state = self.vmm.save().map_err(failed)?;
                let (size, fd) = records::write(&state).map_err(|error| failed(error.to_string()))?;
                Ok(Outcome { answer: Answer::State(size), fds: vec![fd], ended: None })
            }
            Request::Load(size) => {
                let fd = fds.into_iter().next().ok_or_else(|| failed("no descriptor".to_owned()))?;
                let state = records::read(size, fd).map_err(|error| (Status::Malformed, error.to_string()))?;
                self.vmm.load(state).map_err(failed)?;
                self.state = VmState::Loaded;
                Ok(took())
            }
            Request::Resume => {
                self.vmm.resume().map_err(failed)?;
                (self.state, self.held) = (VmState::Running, false);
                Ok(took())
            }
            Request::Yield => self.vmm.give_up().map_err(failed).map(|()| took()),
            Request::Throttle(percent) => {
                self.vmm.throttle(percent).map_err(|words| (Status::Unsupported, words))?;
                self.throttle_percent = percent;
                Ok(Answer::Done.into())
            }
            Request::Release => self.vmm.release().map_err(failed).map(|()| last(Ended::Released)),
            Request::Discard => self.vmm.discard().map_err(failed).map(|()| last(Ended::Discarded)),
            Request::Shutdown => self.vmm.shutdown().map_err(failed).map(|()| last(Ended::Shutdown)),
            Request::Status => {
                let (state, tracking, throttle_percent) = (self.state, self.tracking, self.throttle_percent);
                Ok(Answer::Status(VmStatus { state, tracking, throttle_percent, held: self.held }).into())
            }
            Request::Hold => self.hold().map(|()| took()),
        }
    }

    fn machine(&mut self, described: VmmDescription) -> Result<Outcome, Refusal> {
        let VmmDescription { description, memory } = described;
        check_memory(&description.memory, &memory).map_err(failed)?;
        let dirty = self.bitmap(&description.memory)?;
        let (mut fds, offsets): (Vec<OwnedFd>, Vec<u64>) = memory.into_iter().unzip();
        fds.push(dirty);
        Ok(Outcome { answer: Answer::Machine(Box::new(Machine { description, offsets })), fds, ended: None })
    }

    /// Another descriptor of the dirty bitmap, which is made when it is first needed.
    fn bitmap(&mut self, map: &MemoryMap) -> Result<OwnedFd, Refusal> {
        let made = match self.dirty.take() {
            Some(bitmap) => bitmap,
            None => DirtyBitmap::create(map).map_err(|error| failed(format!("dirty bitmap: {error}")))?,
        };
        let fd = made.fd().try_clone_to_owned().map_err(|error| failed(format!("dirty bitmap: {error}")));
        self.dirty = Some(made);
        fd
    }

    /// A guest that runs is paused; one that is loaded is taken over without having run; one that still comes will be held.
    fn hold(&mut self) -> Result<(), Refusal> {
        match self.state {
            VmState::Running => {
                self.vmm.pause().map_err(failed)?;
                self.state = VmState::Paused;
            }
            VmState::Loaded => {
                self.vmm.take().map_err(failed)?;
                self.state = VmState::Paused;
            }
            VmState::Paused | VmState::Waiting | VmState::Prepared => {}
        }
        self.held = true;
        Ok(())
    }

    fn track(&mut self, on: bool) -> Result<(), Refusal> {
        if on && self.dirty.is_none() {
            return Err((Status::WrongState, "Track needs the guest to have been described before".to_owned()));
        }
        if let Some(dirty) = &self.dirty {
            // Before tracking begins: a bit that is set from then on must stay.
            dirty.clear();
        }
        self.vmm.track(on).map_err(failed)?;
        self.tracking = on;
        Ok(())
    }

    /// What the lost agent had switched on goes off; whether the guest runs does not change.
    fn agent_lost(&mut self) {
        if self.tracking {
            match self.vmm.track(false) {
                Ok(()) => self.tracking = false,
                Err(words) => tracing::warn!(%words, "dirty tracking stays on"),
            }
        }
        if self.throttle_percent > 0 {
            match self.vmm.throttle(0) {
                Ok(()) => self.throttle_percent = 0,
                Err(words) => tracing::warn!(%words, "the guest stays throttled"),
            }
        }
    }
}

fn failed(words: String) -> Refusal {
    (Status::Failed, words)
}

fn last(ended: Ended) -> Outcome {
    Outcome { answer: Answer::Done, fds: Vec::new(), ended: Some(ended) }
}

/// A good answer as a datagram. Only requests with a known kind have one.
fn emit_outcome(outcome: Outcome, kind: u16, request: u32) -> Result<Sent, Refusal> {
    let kind = Kind::from_number(kind & !ANSWER).ok_or_else(|| failed("no kind".to_owned()))?;
    let datagram = outcome.answer.emit(kind, request).map_err(|error| failed(error.to_string()))?;
    Ok((datagram, outcome.fds, outcome.ended))
}

/// What the agent will check is checked here first, so that the author of a VMM is told where the mistake is.
fn check_memory(map: &MemoryMap, memory: &[(OwnedFd, u64)]) -> Result<(), String> {
    if memory.len() != map.regions().len() {
        return Err(format!("{} memfds for {} memory regions", memory.len(), map.regions().len()));
    }
    for (index, ((fd, offset), region)) in memory.iter().zip(map.regions()).enumerate() {
        let end = offset.checked_add(region.bytes).ok_or_else(|| format!("memory region {index} ends beyond every file"))?;
        memfd::check(fd.as_fd(), end).map_err(|error| format!("memory region {index}: {error}"))?;
    }
    Ok(())
}
