//! The agent's end of the plug: the listener, and one connection per VMM with a method per request.
//! Blocking, for plain threads or `spawn_blocking`; when to ask what is the agent's business.

use crate::description::Machine;
use crate::dirty::DirtyBitmap;
use crate::error::PlugError;
use crate::memory::{GuestMemory, HugePages, MemoryError};
use crate::message::{
    self as wire, ANSWER, Answer, COMPLAINT, Header, Hello, Kind, Malformed, Request, Status, VERSION, VmStatus,
};
use crate::records;
use crate::socket::{Buffer, Received, Socket};
use limosa_proto::bitmap::PageSet;
use limosa_proto::record::Record;
use limosa_proto::wire::message::VmDescription;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::sync::mpsc::{self, RecvTimeoutError, SyncSender};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

/// How long a VMM has for its Hello.
const HELLO_TIME_MAX: Duration = Duration::from_secs(5);

/// How long a VMM has to answer a request of `kind`.
#[must_use]
pub fn answer_time_max(kind: Kind) -> Duration {
    Duration::from_secs(match kind {
        // May allocate all of the guest's memory.
        Kind::Prepare => 120,
        Kind::Load | Kind::Save | Kind::Shutdown | Kind::Yield => 30,
        _ => 10,
    })
}

/// What happens on a connection without having been asked for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum PlugEvent {
    /// The guest stopped by itself, in the VMM's words. The VMM ends next.
    GuestStopped(String),
    /// The connection is gone; the last event of every connection that the agent did not drop.
    Lost {
        /// Whether the VMM had been asked to exit.
        expected: bool,
        /// How it was noticed.
        words: String,
    },
}

/// Where VMMs plug in: a socket with mode 0600.
#[derive(Debug)]
pub struct PlugListener {
    socket: Socket,
    path: PathBuf,
}

impl PlugListener {
    /// Listens at `path`. A socket that a dead agent left there is replaced; the socket is never open to others, not
    /// even for a moment.
    ///
    /// # Errors
    /// `AddrInUse` if another agent answers there; otherwise the system's.
    pub fn bind(path: &Path) -> Result<PlugListener, PlugError> {
        let doing = "listening for VMMs";
        if Socket::connect(path).is_ok() {
            let words = format!("another agent listens at {}", path.display());
            return Err(PlugError::Io { doing, source: io::Error::new(io::ErrorKind::AddrInUse, words) });
        }
        let mut fresh = path.as_os_str().to_owned();
        fresh.push(format!(".{}", std::process::id()));
        let fresh = PathBuf::from(fresh);
        let made = remove_if_there(&fresh).and_then(|()| Socket::listen(&fresh)).and_then(|socket| {
            // Nobody knows the name yet; the socket takes its real one when its mode is right.
            std::fs::set_permissions(&fresh, std::fs::Permissions::from_mode(0o600))?;
            std::fs::rename(&fresh, path)?;
            Ok(socket)
        });
        let socket = made.inspect_err(|_| drop(remove_if_there(&fresh))).map_err(PlugError::io(doing))?;
        Ok(PlugListener { socket, path: path.to_owned() })
    }

    /// Waits up to `time` for a VMM to connect; `None` if none did.
    ///
    /// # Errors
    /// [`PlugError::NotAllowed`] for a process that is neither root's nor the agent's user's (its connection is
    /// closed); otherwise the system's. The listener can be used on after either.
    pub fn accept(&self, time: Duration) -> Result<Option<PlugPeer>, PlugError> {
        let doing = "accepting a VMM";
        if !self.socket.wait(time).map_err(PlugError::io(doing))? {
            return Ok(None);
        }
        let socket = self.socket.accept().map_err(PlugError::io(doing))?;
        let (pid, uid) = socket.peer().map_err(PlugError::io(doing))?;
        let own = nix::unistd::geteuid().as_raw();
        if uid != 0 && uid != own {
            return Err(PlugError::NotAllowed { pid, uid, own });
        }
        Ok(Some(PlugPeer { socket, pid }))
    }

    /// Where it listens.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }
}

impl Drop for PlugListener {
    fn drop(&mut self) {
        let _ = remove_if_there(&self.path);
    }
}

fn remove_if_there(path: &Path) -> io::Result<()> {
    match std::fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        _ => Ok(()),
    }
}

/// A VMM that has connected and is neither let in nor turned away yet.
#[derive(Debug)]
pub struct PlugPeer {
    socket: Socket,
    pid: i32,
}

impl PlugPeer {
    /// Its process, as the kernel knows it.
    #[must_use]
    pub fn pid(&self) -> i32 {
        self.pid
    }

    /// Waits up to five seconds for the Hello. Call it on a thread of its own, or a silent VMM keeps others waiting.
    /// A VMM of another version is turned away here.
    ///
    /// # Errors
    /// None came, it is malformed, or its version is not ours.
    pub fn hello(&self) -> Result<Hello, PlugError> {
        let doing = "greeting a VMM";
        if !self.socket.wait(HELLO_TIME_MAX).map_err(PlugError::io(doing))? {
            return Err(PlugError::Deadline { doing, waited_ms: HELLO_TIME_MAX.as_millis() });
        }
        let hello = match self.socket.receive().map_err(PlugError::io(doing))? {
            Received::End => return Err(PlugError::Lost { doing, sent: false, words: "it left without a word".to_owned() }),
            Received::TooLarge { words, .. } => Err(Malformed::new("Hello", words)),
            Received::Message { bytes, .. } => parse_hello(&bytes),
        };
        let hello = hello.inspect_err(|error| self.say_no(&error.to_string())).map_err(PlugError::malformed(doing))?;
        if hello.version_min > VERSION || hello.version_max < VERSION {
            let (min, max) = (hello.version_min, hello.version_max);
            let error = PlugError::Version { min, max, own: VERSION };
            self.say_no(&error.to_string());
            return Err(error);
        }
        Ok(hello)
    }

    /// Turns the VMM away; it is told why.
    pub fn reject(self, words: &str) {
        self.say_no(words);
    }

    fn say_no(&self, words: &str) {
        let words = wire::tidy_words(words);
        let _ = self.socket.send(&wire::emit(Kind::Reject as u16, Status::Done, 0, words.as_bytes()), &[]);
    }

    /// Lets the VMM in. From now on a thread reads its messages; it calls `on_event`, which must not block for long
    /// and must not wait for an answer of this connection.
    ///
    /// # Errors
    /// The VMM is gone already.
    pub fn welcome(self, on_event: impl FnMut(PlugEvent) + Send + 'static) -> Result<PlugConnection, PlugError> {
        let doing = "greeting a VMM";
        let mut body = VERSION.to_le_bytes().to_vec();
        body.extend([0; 6]);
        let welcome = wire::emit(Kind::Welcome as u16, Status::Done, 0, &body);
        self.socket.send(&welcome, &[]).map_err(PlugError::io(doing))?;
        let link = Arc::new(Link { socket: self.socket, waiting: Mutex::new(Waiting::default()) });
        let reader = Arc::clone(&link);
        let name = format!("plug-{}", self.pid);
        std::thread::Builder::new().name(name).spawn(move || reader.read(on_event)).map_err(PlugError::io(doing))?;
        Ok(PlugConnection { link, pid: self.pid, next: Mutex::new(1), dirty: Mutex::new(None) })
    }
}

fn parse_hello(datagram: &[u8]) -> Result<Hello, Malformed> {
    let (header, body) = Header::parse(datagram)?;
    if Kind::from_number(header.kind) != Some(Kind::Hello) {
        return Err(Malformed::new("Hello", format!("the first message has kind {:#06x}", header.kind)));
    }
    Hello::parse(body)
}

/// An answer as it came.
#[derive(Debug)]
pub(crate) struct Reply {
    pub(crate) header: Header,
    pub(crate) body: Vec<u8>,
    pub(crate) fds: Vec<OwnedFd>,
}

/// What the connection and its reading thread share.
#[derive(Debug)]
struct Link {
    socket: Socket,
    waiting: Mutex<Waiting>,
}

#[derive(Debug, Default)]
struct Waiting {
    /// The request that is being answered, and who waits for it.
    request: Option<(u32, SyncSender<Reply>)>,
    /// The VMM has been asked to exit.
    leaving: bool,
    /// The agent has dropped the connection.
    dropped: bool,
    /// Why nothing can be asked any more.
    lost: Option<String>,
}

/// A thread that panicked while it held the lock left plain data behind, which is whole at every moment.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Link {
    fn read(&self, mut on_event: impl FnMut(PlugEvent)) {
        let mut buffer = Buffer::new();
        let words = loop {
            match self.socket.receive_into(&mut buffer) {
                Ok(Received::Message { bytes, fds }) => match self.take(&bytes, fds) {
                    Ok(Some(event)) => on_event(event),
                    Ok(None) => {}
                    Err(error) => break format!("it sent a malformed message: {error}"),
                },
                Ok(Received::TooLarge { words, .. }) => break words.to_owned(),
                Ok(Received::End) => break "it closed the connection or ended".to_owned(),
                Err(error) => break error.to_string(),
            }
        };
        self.socket.shut();
        let (expected, dropped) = {
            let mut waiting = lock(&self.waiting);
            waiting.lost = Some(words.clone());
            // Dropping the sender wakes who waits for an answer.
            waiting.request = None;
            (waiting.leaving, waiting.dropped)
        };
        if !dropped {
            on_event(PlugEvent::Lost { expected, words });
        }
    }

    /// Hands an answer to who waits for it; returns an event.
    fn take(&self, datagram: &[u8], fds: Vec<OwnedFd>) -> Result<Option<PlugEvent>, Malformed> {
        let (header, body) = Header::parse(datagram)?;
        if Kind::from_number(header.kind) == Some(Kind::GuestStopped) {
            return Ok(Some(PlugEvent::GuestStopped(wire::words_of(body))));
        }
        if header.kind & ANSWER == 0 {
            return Err(Malformed::new("event", format!("there is no event of kind {:#06x}", header.kind)));
        }
        let mut waiting = lock(&self.waiting);
        match waiting.request.take_if(|(request, _)| *request == header.request) {
            // One message fits, and only one is ever sent, so this cannot block.
            Some((_, sender)) => drop(sender.try_send(Reply { header, body: body.to_vec(), fds })),
            None => tracing::debug!(request = header.request, "an answer came too late or was not asked for"),
        }
        Ok(None)
    }
}

/// What a VMM says about its guest, with its descriptors.
#[derive(Debug)]
pub struct Described {
    /// The guest.
    pub description: VmDescription,
    /// One memfd per memory region, and at which byte of it the region begins.
    pub memory: Vec<(OwnedFd, u64)>,
}

impl Described {
    /// Maps the guest's memory.
    ///
    /// # Errors
    /// A memfd that is not as it must be.
    pub fn map(self, huge: HugePages) -> Result<GuestMemory, MemoryError> {
        GuestMemory::map_with(self.description.memory, self.memory, huge)
    }
}

/// The agent's end of one VMM. Every method sends one request and waits for its answer, up to
/// [`answer_time_max`]; requests of several threads go one after the other. Dropping it closes the connection: a
/// running guest then runs on and its VMM connects again, a paused one stays paused and its VMM connects again.
#[derive(Debug)]
pub struct PlugConnection {
    link: Arc<Link>,
    pid: i32,
    /// Id of the next request; locked for as long as one is under way.
    next: Mutex<u32>,
    dirty: Mutex<Option<Arc<DirtyBitmap>>>,
}

impl PlugConnection {
    /// The VMM's process, as the kernel knows it.
    #[must_use]
    pub fn pid(&self) -> i32 {
        self.pid
    }

    /// Whether nothing can be asked any more.
    #[must_use]
    pub fn is_lost(&self) -> bool {
        lock(&self.link.waiting).lost.is_some()
    }

    /// What the guest is.
    ///
    /// # Errors
    /// As every request: refused, too late, lost, or a malformed answer.
    pub fn describe(&self) -> Result<Described, PlugError> {
        self.machine("describing the guest", &Request::Describe)
    }

    /// Has an incoming VMM build this machine. `bridges` names this host's bridge for each network of the guest.
    ///
    /// # Errors
    /// As every request. A VMM that answers with another shape of memory than was asked for is refused here.
    pub fn prepare(&self, description: &VmDescription, bridges: &[(String, String)]) -> Result<Described, PlugError> {
        let doing = "preparing the incoming guest";
        let described = self.machine(doing, &Request::Prepare(Box::new(description.clone()), bridges.to_vec()))?;
        // Page numbers must mean the same on both hosts; the size of the pages behind may differ.
        let shape = |vm: &VmDescription| vm.memory.regions().iter().map(|region| (region.gpa, region.bytes)).collect::<Vec<_>>();
        if shape(&described.description) != shape(description) || described.description.id != description.id {
            let source = Malformed::new("Prepare", "the VMM built another machine than it was asked to");
            return Err(PlugError::Malformed { doing, source });
        }
        Ok(described)
    }

    /// Dirty tracking on or off. When it goes on, the bitmap is empty and every write from then on is found.
    ///
    /// # Errors
    /// As every request.
    pub fn track(&self, on: bool) -> Result<(), PlugError> {
        self.call(if on { "starting dirty tracking" } else { "stopping dirty tracking" }, &Request::Track(on)).map(drop)
    }

    /// The pages written since the last call (or since tracking began). They are the caller's from now on: the VMM
    /// will not name them again unless they are written again.
    ///
    /// # Errors
    /// As every request; also if the guest was never described on this connection.
    pub fn fetch_dirty(&self) -> Result<PageSet, PlugError> {
        let doing = "fetching dirty pages";
        let bitmap = lock(&self.dirty).clone();
        let missing = || PlugError::Io { doing, source: io::Error::other("the guest was not described on this connection") };
        let bitmap = bitmap.ok_or_else(missing)?;
        self.call(doing, &Request::FetchDirty)?;
        Ok(bitmap.take())
    }

    /// Stops the guest; returns how long the VMM took. When it returns nothing writes the guest's memory.
    ///
    /// # Errors
    /// As every request.
    pub fn pause(&self) -> Result<Duration, PlugError> {
        self.took("pausing the guest", &Request::Pause)
    }

    /// Device state of the paused guest. Saving may dirty pages: fetch dirty once more afterwards.
    ///
    /// # Errors
    /// As every request.
    pub fn save(&self) -> Result<Vec<Record>, PlugError> {
        let doing = "saving device state";
        let reply = self.ask(doing, &Request::Save, None)?;
        let Answer::State(size) = answer(doing, Kind::Save, &reply)? else { return Err(odd(doing)) };
        let fd = reply.fds.into_iter().next().ok_or_else(|| odd(doing))?;
        records::read(size, fd).map_err(|error| PlugError::Malformed { doing, source: Malformed::new("Save", error.to_string()) })
    }

    /// Gives device state to an incoming VMM; returns how long the VMM took.
    ///
    /// # Errors
    /// As every request; also state that is larger than the plug carries.
    pub fn load(&self, state: &[Record]) -> Result<Duration, PlugError> {
        let doing = "loading device state";
        let written = records::write(state);
        let (size, fd) = written.map_err(|error| PlugError::Io { doing, source: io::Error::other(error.to_string()) })?;
        took(doing, Kind::Load, &self.ask(doing, &Request::Load(size), Some(fd.as_fd()))?)
    }

    /// Has a paused VMM give up what only one host may hold, such as locks on images; returns how long it took. A VMM that
    /// does not know the request holds nothing of the kind.
    ///
    /// # Errors
    /// As every request. Then it may still hold them: the guest must not run elsewhere.
    pub fn give_up(&self) -> Result<Duration, PlugError> {
        match self.took("giving the guest's disks up", &Request::Yield) {
            Err(error) if error.is_unsupported() => Ok(Duration::ZERO),
            done => done,
        }
    }

    /// Lets the guest run; returns how long the VMM took.
    ///
    /// # Errors
    /// As every request.
    pub fn resume(&self) -> Result<Duration, PlugError> {
        self.took("resuming the guest", &Request::Resume)
    }

    /// The guest's operator has paused it: a running guest stops, a paused one stays so, a loaded one is taken over without
    /// running, one that is prepared will be held. The VMM remembers it until Resume; [`VmStatus::held`] tells.
    ///
    /// # Errors
    /// As every request.
    pub fn hold(&self) -> Result<Duration, PlugError> {
        self.took("holding the guest", &Request::Hold)
    }

    /// Slows the guest's vCPUs down by `percent` (0 to 99). A VMM may not offer it: [`PlugError::is_unsupported`].
    ///
    /// # Errors
    /// As every request.
    pub fn throttle(&self, percent: u8) -> Result<(), PlugError> {
        self.call("throttling the guest", &Request::Throttle(percent.min(wire::THROTTLE_PERCENT_MAX))).map(drop)
    }

    /// The guest lives elsewhere: the VMM exits without ever running it again.
    ///
    /// # Errors
    /// As every request.
    pub fn release(&self) -> Result<(), PlugError> {
        self.leave("releasing the guest", &Request::Release)
    }

    /// The guest does not come: the incoming VMM exits.
    ///
    /// # Errors
    /// As every request.
    pub fn discard(&self) -> Result<(), PlugError> {
        self.leave("discarding the incoming guest", &Request::Discard)
    }

    /// Stops the guest; the VMM exits.
    ///
    /// # Errors
    /// As every request.
    pub fn shutdown(&self) -> Result<(), PlugError> {
        self.leave("shutting the guest down", &Request::Shutdown)
    }

    /// What the VMM is doing.
    ///
    /// # Errors
    /// As every request.
    pub fn status(&self) -> Result<VmStatus, PlugError> {
        let doing = "asking for the VMM's status";
        match self.call(doing, &Request::Status)? {
            Answer::Status(status) => Ok(status),
            _ => Err(odd(doing)),
        }
    }

    fn leave(&self, doing: &'static str, request: &Request) -> Result<(), PlugError> {
        lock(&self.link.waiting).leaving = true;
        let left = self.call(doing, request);
        if left.is_err() {
            lock(&self.link.waiting).leaving = false;
        }
        left.map(drop)
    }

    fn machine(&self, doing: &'static str, request: &Request) -> Result<Described, PlugError> {
        let reply = self.ask(doing, request, None)?;
        let Answer::Machine(machine) = answer(doing, request.kind(), &reply)? else { return Err(odd(doing)) };
        let Machine { description, offsets } = *machine;
        let mut fds = reply.fds;
        let bitmap = fds.pop().filter(|_| fds.len() == offsets.len());
        let wrong = |why: String| PlugError::Malformed { doing, source: Malformed::new("descriptors", why) };
        let bitmap = bitmap.ok_or_else(|| wrong(format!("{} memory regions need one more memfds than that", offsets.len())))?;
        let bitmap = DirtyBitmap::open(bitmap, &description.memory).map_err(|error| wrong(format!("dirty bitmap: {error}")))?;
        *lock(&self.dirty) = Some(Arc::new(bitmap));
        Ok(Described { description, memory: fds.into_iter().zip(offsets).collect() })
    }

    fn took(&self, doing: &'static str, request: &Request) -> Result<Duration, PlugError> {
        took(doing, request.kind(), &self.ask(doing, request, None)?)
    }

    fn call(&self, doing: &'static str, request: &Request) -> Result<Answer, PlugError> {
        answer(doing, request.kind(), &self.ask(doing, request, None)?)
    }

    fn ask(&self, doing: &'static str, request: &Request, fd: Option<BorrowedFd<'_>>) -> Result<Reply, PlugError> {
        let emit = |id| request.emit(id).map_err(PlugError::malformed(doing));
        let fds: Vec<BorrowedFd<'_>> = fd.into_iter().collect();
        let reply = self.exchange(doing, emit, &fds, answer_time_max(request.kind()))?;
        if reply.header.kind != COMPLAINT && reply.header.kind != request.kind() as u16 | ANSWER {
            return Err(odd(doing));
        }
        match Status::from_number(reply.header.status) {
            Status::Done if reply.header.kind != COMPLAINT => Ok(reply),
            status => Err(PlugError::Refused { doing, status, words: wire::words_of(&reply.body) }),
        }
    }

    /// Sends one datagram, which may be anything, and waits for the answer to its request id.
    pub(crate) fn exchange(
        &self,
        doing: &'static str,
        emit: impl FnOnce(u32) -> Result<Vec<u8>, PlugError>,
        fds: &[BorrowedFd<'_>],
        time: Duration,
    ) -> Result<Reply, PlugError> {
        let mut next = lock(&self.next);
        let id = *next;
        *next = next.checked_add(1).unwrap_or(1);
        let datagram = emit(id)?;
        let (sender, receiver) = mpsc::sync_channel(1);
        {
            let mut waiting = lock(&self.link.waiting);
            if let Some(words) = &waiting.lost {
                return Err(PlugError::Lost { doing, sent: false, words: words.clone() });
            }
            waiting.request = Some((id, sender));
        }
        if let Err(error) = self.link.socket.send(&datagram, fds) {
            lock(&self.link.waiting).request = None;
            return Err(match error.kind() {
                io::ErrorKind::BrokenPipe | io::ErrorKind::ConnectionReset | io::ErrorKind::NotConnected => {
                    PlugError::Lost { doing, sent: false, words: error.to_string() }
                }
                _ => PlugError::Io { doing, source: error },
            });
        }
        receiver.recv_timeout(time).map_err(|error| {
            let mut waiting = lock(&self.link.waiting);
            waiting.request = None;
            match error {
                RecvTimeoutError::Timeout => PlugError::Deadline { doing, waited_ms: time.as_millis() },
                RecvTimeoutError::Disconnected => {
                    let words = waiting.lost.clone().unwrap_or_else(|| "it ended".to_owned());
                    PlugError::Lost { doing, sent: true, words }
                }
            }
        })
    }
}

impl Drop for PlugConnection {
    fn drop(&mut self) {
        lock(&self.link.waiting).dropped = true;
        self.link.socket.shut();
    }
}

fn odd(doing: &'static str) -> PlugError {
    PlugError::Malformed { doing, source: Malformed::new("answer", "it is not the answer to this request") }
}

fn answer(doing: &'static str, kind: Kind, reply: &Reply) -> Result<Answer, PlugError> {
    Answer::parse(kind, &reply.body).map_err(PlugError::malformed(doing))
}

fn took(doing: &'static str, kind: Kind, reply: &Reply) -> Result<Duration, PlugError> {
    match answer(doing, kind, reply)? {
        Answer::Took { us } => Ok(Duration::from_micros(us)),
        _ => Err(odd(doing)),
    }
}
