//! What crosses the plug's socket: kinds, header, bodies, versions, limits. All numbers are little-endian.
//! No socket and no descriptor is touched here; `description.rs` has the one large body.

use crate::description::{self, Machine};
use crate::state::VmState;
use limosa_proto::identity::VmId;
use limosa_proto::memory::REGIONS_MAX;
use limosa_proto::record::{RECORDS_MAX, STATE_BYTES_MAX};
use limosa_proto::wire::limits::{NAME_BYTES_MAX, WORDS_BYTES_MAX};
use limosa_proto::wire::message::VmDescription;
use std::fmt;

/// First four bytes of every message.
pub const MAGIC: [u8; 4] = *b"LPLG";
/// The one version of the plug that this crate speaks.
pub const VERSION: u16 = 1;
/// Bytes of the header: magic, kind, status, length of the body, request id.
pub const HEADER_BYTES: usize = 16;
/// Largest message, header included: below the default send buffer of a Linux UNIX socket (208 KiB).
pub const MESSAGE_BYTES_MAX: usize = 192 * 1024;
/// Most descriptors with one message: one per memory region and the dirty bitmap.
pub const DESCRIPTORS_MAX: usize = REGIONS_MAX + 1;
/// Most entries of the map from networks to bridges.
pub const BRIDGES_MAX: usize = 64;
/// Highest throttle in per cent.
pub const THROTTLE_PERCENT_MAX: u8 = 99;
/// Set in the kind of an answer.
pub const ANSWER: u16 = 0x8000;
/// The kind of an answer to bytes whose kind could not even be read.
pub const COMPLAINT: u16 = 0xffff;
/// Bytes before each record in the memfd that carries device state.
pub const RECORD_HEADER_BYTES: usize = 16;
/// Most bytes of the memfd that carries device state.
pub const STATE_FILE_BYTES_MAX: u64 = (STATE_BYTES_MAX + RECORDS_MAX * RECORD_HEADER_BYTES) as u64;

/// Bytes that are no message of the plug.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{what}: {why}")]
pub struct Malformed {
    /// Which part.
    pub what: &'static str,
    /// What is wrong with it.
    pub why: String,
}

impl Malformed {
    pub(crate) fn new(what: &'static str, why: impl Into<String>) -> Malformed {
        Malformed { what, why: why.into() }
    }
}

macro_rules! kinds {
    ($($(#[$doc:meta])* $name:ident = $number:literal,)*) => {
        /// What a message is.
        #[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
        #[repr(u16)]
        pub enum Kind { $($(#[$doc])* $name = $number,)* }

        impl Kind {
            /// The kind of this number on the wire, without the answer bit.
            #[must_use]
            pub fn from_number(number: u16) -> Option<Kind> {
                match number { $($number => Some(Kind::$name),)* _ => None }
            }

            /// Its name.
            #[must_use]
            pub fn words(self) -> &'static str {
                match self { $(Kind::$name => stringify!($name),)* }
            }
        }
    };
}

kinds! {
    /// VMM to agent, first of all: who it is.
    Hello = 0x0001,
    /// Agent to VMM: let in.
    Welcome = 0x0002,
    /// Agent to VMM: not let in, in words.
    Reject = 0x0003,
    /// Say what the guest is; the answer brings its memfds and the dirty bitmap.
    Describe = 0x0010,
    /// Incoming: build this machine, answer like Describe.
    Prepare = 0x0011,
    /// Dirty tracking on or off.
    Track = 0x0012,
    /// Bring the dirty bits into the shared bitmap.
    FetchDirty = 0x0013,
    /// Stop the guest: when answered, nothing writes its memory any more.
    Pause = 0x0014,
    /// Give device state.
    Save = 0x0015,
    /// Take device state.
    Load = 0x0016,
    /// Let the guest run.
    Resume = 0x0017,
    /// Slow the guest down.
    Throttle = 0x0018,
    /// The guest lives elsewhere: exit without ever running it again.
    Release = 0x0019,
    /// Incoming: the guest does not come: exit.
    Discard = 0x001a,
    /// Stop the guest and exit.
    Shutdown = 0x001b,
    /// What is the state.
    Status = 0x001c,
    /// Give up what only one host may hold, such as locks on images: the guest is about to run elsewhere.
    Yield = 0x001d,
    /// Event, VMM to agent: the guest stopped by itself.
    GuestStopped = 0x4001,
}

impl Kind {
    /// Every request that an agent may send, by number.
    pub const REQUESTS: [Kind; 14] = [
        Kind::Describe,
        Kind::Prepare,
        Kind::Track,
        Kind::FetchDirty,
        Kind::Pause,
        Kind::Save,
        Kind::Load,
        Kind::Resume,
        Kind::Throttle,
        Kind::Release,
        Kind::Discard,
        Kind::Shutdown,
        Kind::Status,
        Kind::Yield,
    ];
}

/// How a request ended, in the header of its answer.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[repr(u16)]
pub enum Status {
    /// Done; the body is the answer's.
    Done = 0,
    /// The VMM does not know this kind of request.
    UnknownKind = 1,
    /// The request's bytes or descriptors are not as they must be.
    Malformed = 2,
    /// The request does not fit the VMM's state.
    WrongState = 3,
    /// The VMM knows the request and does not offer it.
    Unsupported = 4,
    /// It was tried and failed.
    Failed = 5,
}

impl Status {
    /// The status of this number; unknown ones are failures.
    #[must_use]
    pub fn from_number(number: u16) -> Status {
        match number {
            0 => Status::Done,
            1 => Status::UnknownKind,
            2 => Status::Malformed,
            3 => Status::WrongState,
            4 => Status::Unsupported,
            _ => Status::Failed,
        }
    }
}

impl fmt::Display for Status {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Status::Done => "done",
            Status::UnknownKind => "unknown request",
            Status::Malformed => "malformed request",
            Status::WrongState => "wrong state",
            Status::Unsupported => "unsupported",
            Status::Failed => "failed",
        })
    }
}

/// The 16 bytes before every body.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Header {
    /// A [`Kind`], with [`ANSWER`] set in answers; or [`COMPLAINT`].
    pub kind: u16,
    /// A [`Status`] in answers, otherwise 0.
    pub status: u16,
    /// Bytes of the body; header and body are one datagram, so this must agree with its size.
    pub length: u32,
    /// Chosen by who asks, repeated in the answer; 0 in greetings and events.
    pub request: u32,
}

impl Header {
    /// Splits one datagram into header and body.
    ///
    /// # Errors
    /// Too short, wrong magic, or a length that is not the datagram's.
    pub fn parse(datagram: &[u8]) -> Result<(Header, &[u8]), Malformed> {
        let mut fields = Fields::new("header", datagram);
        if fields.array::<4>()? != MAGIC {
            return Err(Malformed::new("header", "it does not begin with LPLG"));
        }
        let header = Header { kind: fields.u16()?, status: fields.u16()?, length: fields.u32()?, request: fields.u32()? };
        let body = fields.rest();
        if u64::from(header.length) != body.len() as u64 {
            let why = format!("it announces {} bytes of body and {} came", header.length, body.len());
            return Err(Malformed::new("header", why));
        }
        Ok((header, body))
    }

    /// The request id of bytes that may be anything, for a complaint about them.
    #[must_use]
    pub fn request_of(datagram: &[u8]) -> u32 {
        datagram.get(12..16).and_then(|bytes| bytes.try_into().ok()).map_or(0, u32::from_le_bytes)
    }
}

/// Header and body as one datagram.
#[must_use]
pub fn emit(kind: u16, status: Status, request: u32, body: &[u8]) -> Vec<u8> {
    let mut out = Vec::with_capacity(HEADER_BYTES + body.len());
    out.extend(MAGIC);
    out.extend(kind.to_le_bytes());
    out.extend((status as u16).to_le_bytes());
    out.extend(u32::try_from(body.len()).unwrap_or(u32::MAX).to_le_bytes());
    out.extend(request.to_le_bytes());
    out.extend(body);
    out
}

/// Words fit to be sent or logged: at most [`WORDS_BYTES_MAX`] bytes, no control characters.
#[must_use]
pub fn tidy_words(words: &str) -> String {
    let plain = words.chars().map(|c| if c.is_control() { ' ' } else { c });
    plain
        .scan(0, |length, c| {
            *length += c.len_utf8();
            (*length <= WORDS_BYTES_MAX).then_some(c)
        })
        .collect()
}

/// What a VMM says it is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[repr(u8)]
pub enum Role {
    /// It has a guest.
    Running = 1,
    /// It waits for a guest to come.
    Incoming = 2,
}

/// A secret that an agent gives to a VMM that it starts, so that it knows it again; zeros if there is none.
#[derive(Clone, Copy, PartialEq, Eq, Default)]
pub struct Token(pub [u8; 16]);

impl fmt::Debug for Token {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Token(..)")
    }
}

/// A VMM's first message on every connection.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Hello {
    /// Lowest version of the plug that it speaks.
    pub version_min: u16,
    /// Highest version of the plug that it speaks.
    pub version_max: u16,
    /// Whether it has a guest or waits for one.
    pub role: Role,
    /// What it is doing.
    pub state: VmState,
    /// Its process id, as it sees it.
    pub pid: u32,
    /// Its guest; zeros while it waits for one.
    pub id: VmId,
    /// What the agent gave it when it started it.
    pub token: Token,
    /// Its guest's name, at most 256 bytes; empty while it waits for one.
    pub name: String,
}

impl Hello {
    /// The whole datagram.
    ///
    /// # Errors
    /// A name that is too long.
    pub fn emit(&self) -> Result<Vec<u8>, Malformed> {
        let mut body = Vec::with_capacity(48 + self.name.len());
        body.extend(self.version_min.to_le_bytes());
        body.extend(self.version_max.to_le_bytes());
        body.extend([self.role as u8, self.state as u8]);
        body.extend(name_length("name of the VM", &self.name)?.to_le_bytes());
        body.extend(self.pid.to_le_bytes());
        body.extend([0; 4]);
        body.extend(self.id.0);
        body.extend(self.token.0);
        body.extend(self.name.as_bytes());
        Ok(emit(Kind::Hello as u16, Status::Done, 0, &body))
    }

    /// Reads the body.
    ///
    /// # Errors
    /// What is wrong with it.
    pub fn parse(body: &[u8]) -> Result<Hello, Malformed> {
        let mut fields = Fields::new("Hello", body);
        let (version_min, version_max) = (fields.u16()?, fields.u16()?);
        let role = match fields.u8()? {
            1 => Role::Running,
            2 => Role::Incoming,
            other => return Err(Malformed::new("Hello", format!("there is no role {other}"))),
        };
        let state = fields.u8()?;
        let state = VmState::from_number(state).ok_or_else(|| Malformed::new("Hello", format!("there is no state {state}")))?;
        if state.is_incoming() != (role == Role::Incoming) {
            return Err(Malformed::new("Hello", "its role and its state contradict each other"));
        }
        let length = fields.u16()?;
        let pid = fields.u32()?;
        fields.zeros(4)?;
        let (id, token) = (VmId(fields.array()?), Token(fields.array()?));
        let name = fields.name(length)?;
        fields.end()?;
        Ok(Hello { version_min, version_max, role, state, pid, id, token, name })
    }
}

/// Size of the device state in a memfd that comes along.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct StateSize {
    /// How many records.
    pub count: u32,
    /// Bytes of the memfd that hold them.
    pub bytes: u64,
}

/// What a VMM says about itself.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct VmStatus {
    /// What it is doing.
    pub state: VmState,
    /// Whether dirty tracking is on.
    pub tracking: bool,
    /// By how many per cent the guest is slowed down.
    pub throttle_percent: u8,
}

/// What the agent asks.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Request {
    /// [`Kind::Describe`].
    Describe,
    /// [`Kind::Prepare`]: the machine to build, and which bridge each network is on this host.
    Prepare(Box<VmDescription>, Vec<(String, String)>),
    /// [`Kind::Track`].
    Track(bool),
    /// [`Kind::FetchDirty`].
    FetchDirty,
    /// [`Kind::Pause`].
    Pause,
    /// [`Kind::Save`].
    Save,
    /// [`Kind::Load`]; the records come in a memfd.
    Load(StateSize),
    /// [`Kind::Resume`].
    Resume,
    /// [`Kind::Throttle`]: 0 to 99 per cent.
    Throttle(u8),
    /// [`Kind::Release`].
    Release,
    /// [`Kind::Discard`].
    Discard,
    /// [`Kind::Shutdown`].
    Shutdown,
    /// [`Kind::Status`].
    Status,
    /// [`Kind::Yield`].
    Yield,
}

impl Request {
    /// What kind it is.
    #[must_use]
    pub fn kind(&self) -> Kind {
        match self {
            Request::Describe => Kind::Describe,
            Request::Prepare(..) => Kind::Prepare,
            Request::Track(_) => Kind::Track,
            Request::FetchDirty => Kind::FetchDirty,
            Request::Pause => Kind::Pause,
            Request::Save => Kind::Save,
            Request::Load(_) => Kind::Load,
            Request::Resume => Kind::Resume,
            Request::Throttle(_) => Kind::Throttle,
            Request::Release => Kind::Release,
            Request::Discard => Kind::Discard,
            Request::Shutdown => Kind::Shutdown,
            Request::Status => Kind::Status,
            Request::Yield => Kind::Yield,
        }
    }

    /// The whole datagram.
    ///
    /// # Errors
    /// A description that is larger than the plug carries.
    pub fn emit(&self, request: u32) -> Result<Vec<u8>, Malformed> {
        let mut body = Vec::new();
        match self {
            Request::Prepare(vm, bridges) => {
                description::emit(vm, &mut body)?;
                description::emit_bridges(bridges, &mut body)?;
            }
            Request::Track(on) => body.extend(u32::from(*on).to_le_bytes()),
            Request::Throttle(percent) => body.extend(u32::from(*percent).to_le_bytes()),
            Request::Load(size) => emit_state_size(*size, &mut body),
            _ => {}
        }
        fits(self.kind().words(), &body)?;
        Ok(emit(self.kind() as u16, Status::Done, request, &body))
    }

    /// Reads the body of a request of `kind`.
    ///
    /// # Errors
    /// What is wrong with it; also a kind that is no request.
    pub fn parse(kind: Kind, body: &[u8]) -> Result<Request, Malformed> {
        let mut fields = Fields::new(kind.words(), body);
        let request = match kind {
            Kind::Describe => Request::Describe,
            Kind::Prepare => {
                Request::Prepare(Box::new(description::parse(&mut fields)?), description::parse_bridges(&mut fields)?)
            }
            Kind::Track => Request::Track(fields.up_to(1)? == 1),
            Kind::FetchDirty => Request::FetchDirty,
            Kind::Pause => Request::Pause,
            Kind::Save => Request::Save,
            Kind::Load => Request::Load(parse_state_size(&mut fields)?),
            Kind::Resume => Request::Resume,
            Kind::Throttle => Request::Throttle(fields.up_to(THROTTLE_PERCENT_MAX)?),
            Kind::Release => Request::Release,
            Kind::Discard => Request::Discard,
            Kind::Shutdown => Request::Shutdown,
            Kind::Status => Request::Status,
            Kind::Yield => Request::Yield,
            _ => return Err(Malformed::new("request", format!("{} is no request", kind.words()))),
        };
        fields.end()?;
        Ok(request)
    }
}

/// What the VMM answers when a request is done.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Answer {
    /// To Track, Throttle, Release, Discard, Shutdown.
    Done,
    /// To FetchDirty, Pause, Load, Resume, Yield: how long it took.
    Took {
        /// Microseconds.
        us: u64,
    },
    /// To Describe and Prepare; the memfds come along.
    Machine(Box<Machine>),
    /// To Save; the records come in a memfd.
    State(StateSize),
    /// To Status.
    Status(VmStatus),
}

impl Answer {
    /// The whole datagram.
    ///
    /// # Errors
    /// A description that is larger than the plug carries.
    pub fn emit(&self, kind: Kind, request: u32) -> Result<Vec<u8>, Malformed> {
        let mut body = Vec::new();
        match self {
            Answer::Done => {}
            Answer::Took { us } => body.extend(us.to_le_bytes()),
            Answer::Machine(machine) => machine.emit(&mut body)?,
            Answer::State(size) => emit_state_size(*size, &mut body),
            Answer::Status(status) => {
                body.extend([status.state as u8, u8::from(status.tracking), status.throttle_percent, 0, 0, 0, 0, 0]);
            }
        }
        fits(kind.words(), &body)?;
        Ok(emit(kind as u16 | ANSWER, Status::Done, request, &body))
    }

    /// Reads the body of a good answer to a request of `kind`.
    ///
    /// # Errors
    /// What is wrong with it.
    pub fn parse(kind: Kind, body: &[u8]) -> Result<Answer, Malformed> {
        let mut fields = Fields::new(kind.words(), body);
        let answer = match kind {
            Kind::FetchDirty | Kind::Pause | Kind::Load | Kind::Resume | Kind::Yield => Answer::Took { us: fields.u64()? },
            Kind::Describe | Kind::Prepare => Answer::Machine(Box::new(Machine::parse(&mut fields)?)),
            Kind::Save => Answer::State(parse_state_size(&mut fields)?),
            Kind::Status => {
                let state = fields.u8()?;
                let state = VmState::from_number(state).ok_or_else(|| fields.wrong(format!("there is no state {state}")))?;
                let tracking = fields.u8()? != 0;
                let throttle_percent = fields.u8()?;
                fields.zeros(5)?;
                Answer::Status(VmStatus { state, tracking, throttle_percent })
            }
            _ => Answer::Done,
        };
        fields.end()?;
        Ok(answer)
    }
}

fn fits(what: &'static str, body: &[u8]) -> Result<(), Malformed> {
    if HEADER_BYTES + body.len() <= MESSAGE_BYTES_MAX {
        return Ok(());
    }
    Err(Malformed::new(what, format!("a message of {} bytes is larger than the plug carries ({MESSAGE_BYTES_MAX})", body.len())))
}

fn emit_state_size(size: StateSize, body: &mut Vec<u8>) {
    body.extend(size.count.to_le_bytes());
    body.extend([0; 4]);
    body.extend(size.bytes.to_le_bytes());
}

fn parse_state_size(fields: &mut Fields<'_>) -> Result<StateSize, Malformed> {
    let count = fields.u32()?;
    fields.zeros(4)?;
    let bytes = fields.u64()?;
    if count as usize > RECORDS_MAX || bytes > STATE_FILE_BYTES_MAX {
        let why = format!("{count} records in {bytes} bytes; at most {RECORDS_MAX} in {STATE_FILE_BYTES_MAX} are carried");
        return Err(fields.wrong(why));
    }
    Ok(StateSize { count, bytes })
}

pub(crate) fn name_length(what: &'static str, name: &str) -> Result<u16, Malformed> {
    text_length(what, name, NAME_BYTES_MAX)
}

pub(crate) fn text_length(what: &'static str, text: &str, most: usize) -> Result<u16, Malformed> {
    match u16::try_from(text.len()) {
        Ok(length) if text.len() <= most => Ok(length),
        _ => Err(Malformed::new(what, format!("{} bytes; at most {most} are carried", text.len()))),
    }
}

/// Reads fields off the front of a body; every read is checked.
#[derive(Debug)]
pub(crate) struct Fields<'a> {
    what: &'static str,
    rest: &'a [u8],
}

impl<'a> Fields<'a> {
    pub(crate) fn new(what: &'static str, rest: &'a [u8]) -> Fields<'a> {
        Fields { what, rest }
    }

    pub(crate) fn wrong(&self, why: impl Into<String>) -> Malformed {
        Malformed::new(self.what, why)
    }

    pub(crate) fn bytes(&mut self, count: usize) -> Result<&'a [u8], Malformed> {
        let (head, rest) = self.rest.split_at_checked(count).ok_or_else(|| self.wrong("it is too short"))?;
        self.rest = rest;
        Ok(head)
    }

    pub(crate) fn array<const N: usize>(&mut self) -> Result<[u8; N], Malformed> {
        let (head, rest) = self.rest.split_first_chunk::<N>().ok_or_else(|| self.wrong("it is too short"))?;
        self.rest = rest;
        Ok(*head)
    }

    pub(crate) fn u8(&mut self) -> Result<u8, Malformed> {
        self.array().map(u8::from_le_bytes)
    }

    pub(crate) fn u16(&mut self) -> Result<u16, Malformed> {
        self.array().map(u16::from_le_bytes)
    }

    pub(crate) fn u32(&mut self) -> Result<u32, Malformed> {
        self.array().map(u32::from_le_bytes)
    }

    pub(crate) fn u64(&mut self) -> Result<u64, Malformed> {
        self.array().map(u64::from_le_bytes)
    }

    /// A u32 that is at most `most`.
    fn up_to(&mut self, most: u8) -> Result<u8, Malformed> {
        let value = self.u32()?;
        u8::try_from(value).ok().filter(|value| *value <= most).ok_or_else(|| self.wrong(format!("{value} is over {most}")))
    }

    /// Reserved bytes, which must be zero so that a later version can give them a meaning.
    pub(crate) fn zeros(&mut self, count: usize) -> Result<(), Malformed> {
        if self.bytes(count)?.iter().any(|byte| *byte != 0) {
            return Err(self.wrong("reserved bytes are not zero"));
        }
        Ok(())
    }

    pub(crate) fn name(&mut self, length: u16) -> Result<String, Malformed> {
        self.text(length, NAME_BYTES_MAX)
    }

    /// Text of at most `most` bytes, without control characters.
    pub(crate) fn text(&mut self, length: u16, most: usize) -> Result<String, Malformed> {
        if usize::from(length) > most {
            return Err(self.wrong(format!("a name of {length} bytes; at most {most} are carried")));
        }
        let text = std::str::from_utf8(self.bytes(usize::from(length))?).map_err(|_| self.wrong("a name is not UTF-8"))?;
        if text.chars().any(char::is_control) {
            return Err(self.wrong("a name has control characters"));
        }
        Ok(text.to_owned())
    }

    pub(crate) fn rest(self) -> &'a [u8] {
        self.rest
    }

    pub(crate) fn end(&self) -> Result<(), Malformed> {
        if self.rest.is_empty() {
            return Ok(());
        }
        Err(self.wrong(format!("{} bytes too many", self.rest.len())))
    }
}

/// Words from the other side, whatever bytes they are.
#[must_use]
pub fn words_of(body: &[u8]) -> String {
    let body = body.get(..WORDS_BYTES_MAX).unwrap_or(body);
    tidy_words(&String::from_utf8_lossy(body))
}
