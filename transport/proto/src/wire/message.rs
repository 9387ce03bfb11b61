//! Messages of the control channel: what they carry, how their bodies are parsed and emitted.
//! Bodies are postcard; every list and text in them is bounded while it is decoded, and bytes left over are an error.

use super::code::Code;
use super::frame::{CONTROL_HEADER_BYTES, ControlHeader, LaneToken};
use super::limits::{
    ADDRESSES_MAX, ANNOUNCEMENTS_MAX, CONFIG_BYTES_MAX, DISKS_MAX, LINKS_MAX, MESSAGE_BYTES_MAX, NAME_BYTES_MAX, NICS_MAX,
    PATH_BYTES_MAX, PROBE_BYTES_MAX, REASONS_MAX, RECORD_KINDS_MAX, SERIAL_BYTES_MAX, VERSIONS_MAX, WORDS_BYTES_MAX, bytes,
    emit_bytes, list, text,
};
use super::offer::{Keys, KeysAsk, LinkOffer};
use super::version::VERSION_FIRST;
use crate::cpu::CpuProfile;
use crate::error::{Malformed, Misuse};
use crate::identity::{Generation, MigrationId, VmId};
use crate::memory::{MemoryMap, REGIONS_MAX, Region};
use crate::record::{RECORD_BYTES_MAX, Record};
use crate::ticket::TicketBytes;
use serde::de::{DeserializeOwned, Error};
use serde::{Deserialize, Deserializer, Serialize};
use std::net::IpAddr;

/// One network interface of a guest.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct NicDescription {
    /// Its MAC address; it moves with the guest.
    pub mac: [u8; 6],
    /// Name of the network it is on, as both hosts' configurations call it.
    #[serde(deserialize_with = "text::<_, NAME_BYTES_MAX>")]
    pub network: String,
    /// Its MTU in bytes.
    pub mtu: u16,
    /// The VLAN it is tagged with.
    pub vlan: Option<u16>,
    /// Addresses known to be the guest's, to be announced.
    #[serde(deserialize_with = "list::<_, _, ADDRESSES_MAX>")]
    pub addresses: Vec<IpAddr>,
}

/// How an image is laid out in its file.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum ImageFormat {
    /// The file is the disk.
    Raw,
    /// QEMU's format.
    Qcow2,
}

impl std::fmt::Display for ImageFormat {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(if *self == ImageFormat::Raw { "raw" } else { "qcow2" })
    }
}

/// One disk of a guest, on storage that both hosts see.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct DiskDescription {
    /// The image: an absolute path, the same on both hosts.
    #[serde(deserialize_with = "text::<_, PATH_BYTES_MAX>")]
    pub path: String,
    /// Its format.
    pub format: ImageFormat,
    /// Whether the guest may only read it.
    pub readonly: bool,
    /// Size of the disk that the guest sees, in bytes.
    pub bytes: u64,
    /// The serial number that the guest sees.
    #[serde(deserialize_with = "text::<_, SERIAL_BYTES_MAX>")]
    pub serial: String,
    /// What the source wrote into a file beside the image, so that the destination can tell that it has the same file and
    /// not just the same path. Zeros: nothing.
    pub token: [u8; 32],
}

/// A guest as its destination must know it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct VmDescription {
    /// Its identity.
    pub id: VmId,
    /// Its name, unique on a host.
    #[serde(deserialize_with = "text::<_, NAME_BYTES_MAX>")]
    pub name: String,
    /// How many virtual CPUs.
    pub vcpus: u32,
    /// The shape of its memory.
    #[serde(deserialize_with = "memory")]
    pub memory: MemoryMap,
    /// Its network interfaces.
    #[serde(deserialize_with = "list::<_, _, NICS_MAX>")]
    pub nics: Vec<NicDescription>,
    /// Its disks.
    #[serde(deserialize_with = "list::<_, _, DISKS_MAX>")]
    pub disks: Vec<DiskDescription>,
    /// The kind of VMM that runs it, for example "limosa".
    #[serde(deserialize_with = "text::<_, NAME_BYTES_MAX>")]
    pub vmm: String,
    /// Kinds of record that its state has, each with its version.
    #[serde(deserialize_with = "list::<_, _, RECORD_KINDS_MAX>")]
    pub records: Vec<(u16, u16)>,
    /// What only the destination's VMM understands.
    #[serde(serialize_with = "emit_bytes", deserialize_with = "bytes::<_, CONFIG_BYTES_MAX>")]
    pub config: Vec<u8>,
    /// The CPU that it sees; empty from a VMM that says nothing of it.
    pub cpu: CpuProfile,
}

/// The source's first message.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Hello {
    /// Versions of the protocol that it speaks.
    #[serde(deserialize_with = "list::<_, _, VERSIONS_MAX>")]
    pub versions: Vec<u16>,
    /// The guest.
    pub vm: VmDescription,
    /// How many lanes it would like.
    pub lanes: u16,
    /// Whether it would like them without TLS.
    pub plaintext_lanes: bool,
    /// The link that its lanes will come over: "tcp", "quic", "rdma".
    #[serde(deserialize_with = "text::<_, NAME_BYTES_MAX>")]
    pub link: String,
    /// Whether it would like pages checked by a keyed hash, where the link's lanes are not encrypted and can do so.
    pub page_check: bool,
    /// The downtime it aims at, in milliseconds.
    pub downtime_target_ms: u32,
    /// The downtime it would still accept, in milliseconds.
    pub downtime_ms_max: u32,
    /// How often it sends when it has nothing to say, in milliseconds.
    pub keepalive_ms: u32,
    /// Its program and version, for the log.
    #[serde(deserialize_with = "text::<_, NAME_BYTES_MAX>")]
    pub source_build: String,
}

/// The destination takes the guest.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Accept {
    /// The version from now on.
    pub version: u16,
    /// How many lanes to open: at most as many as were asked for.
    pub lanes: u16,
    /// Whether they are without TLS; never unless it was asked for.
    pub plaintext_lanes: bool,
    /// Whether pages are checked by a keyed hash: if either side would like it.
    pub page_check: bool,
    /// What every lane must show.
    pub token: LaneToken,
    /// How often the destination sends when it has nothing to say, in milliseconds.
    pub keepalive_ms: u32,
    /// Its program and version, for the log.
    #[serde(deserialize_with = "text::<_, NAME_BYTES_MAX>")]
    pub destination_build: String,
}

/// One reason why a guest cannot be taken.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Reason {
    /// A stable id for machines, for example "network-missing".
    #[serde(deserialize_with = "text::<_, NAME_BYTES_MAX>")]
    pub id: String,
    /// What is wanted and what is there, for people.
    #[serde(deserialize_with = "text::<_, WORDS_BYTES_MAX>")]
    pub words: String,
}

/// The destination does not take the guest. Nothing was changed.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Refusal {
    /// The first reason as a number.
    pub code: Code,
    /// Every reason that was found.
    #[serde(deserialize_with = "list::<_, _, REASONS_MAX>")]
    pub reasons: Vec<Reason>,
}

impl Refusal {
    /// A refusal for one reason, whose id is the code's.
    #[must_use]
    pub fn one(code: Code, words: impl Into<String>) -> Refusal {
        let words = super::limits::fit(&words.into(), WORDS_BYTES_MAX);
        Refusal { code, reasons: vec![Reason { id: code.id().to_owned(), words }] }
    }

    /// The words of all reasons.
    #[must_use]
    pub fn words(&self) -> String {
        if self.reasons.is_empty() { self.code.to_string() } else { crate::error::words(&self.reasons) }
    }
}

/// Where the destination's time went until it was ready.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default, Serialize, Deserialize)]
pub struct ReadyTimes {
    /// Loading the state into the VMM, in microseconds.
    pub load_us: u64,
}

/// Where the destination's time went after the commit.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct RunningTimes {
    /// Resuming the guest, in microseconds.
    pub resume_us: u64,
}

/// Whether the guest answered the network at the destination.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Default, Serialize, Deserialize)]
pub struct Reached {
    /// From its resume until its first answer, in microseconds; none: it was not heard.
    pub after_us: Option<u64>,
    /// How it was asked, or why there is no answer; empty where nobody asked.
    #[serde(deserialize_with = "text::<_, WORDS_BYTES_MAX>")]
    pub words: String,
}

/// What the destination has to tell for the report.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Default, Serialize, Deserialize)]
pub struct DestinationReport {
    /// CPU time of agent and VMM for this migration, in microseconds.
    pub cpu_us: u64,
    /// Pages whose bytes arrived.
    pub pages: u64,
    /// Pages that arrived as "all zero".
    pub zero_pages: u64,
    /// Page bytes received.
    pub bytes: u64,
    /// What the first round of announcements sent, one line each.
    #[serde(deserialize_with = "lines")]
    pub announcements: Vec<String>,
    /// Whether the guest answered the network.
    pub reached: Reached,
}

/// The destination's word on a generation that its source is in doubt about.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[non_exhaustive]
pub enum VerdictAnswer {
    /// The guest runs at the destination, or did.
    Running,
    /// The destination durably gave it up and will never accept its Commit: the guest is the source's.
    Discarded,
    /// Ready, and neither: ask again.
    Pending,
    /// The destination has no record of this migration and generation. That proves nothing.
    Unknown,
    /// It was ready, its VMM is gone, and nobody can say whether the guest ran there: the source must not resume what may be
    /// older than what the guest has done since.
    MayHaveRun,
}

/// The source's word on a generation that its destination is in doubt about.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[non_exhaustive]
pub enum ReleasedAnswer {
    /// It was never released and never will be, or the destination has given it back: the guest is the source's.
    Never,
    /// It was released: the destination must not give it up on this word.
    Released,
    /// Neither: ask again.
    Open,
    /// The source has no record of this migration and generation with this destination. That proves nothing.
    Unknown,
}

/// A message of the control channel.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub enum Message {
    /// Source: this guest, please.
    Hello(Box<Hello>),
    /// Destination: yes.
    Accept(Accept),
    /// Destination: no.
    Refuse(Refusal),
    /// Destination: the VMM is there, memory is mapped, lanes may be opened.
    Prepared {
        /// Time spent on the VMM and its memory, in milliseconds.
        populated_ms: u32,
    },
    /// Destination: every page of this round is in place.
    RoundDone {
        /// Which round, from 1.
        round: u32,
    },
    /// Source: a piece of device state.
    Record(Record),
    /// Source: that was all of it.
    RecordsEnd {
        /// How many records.
        count: u32,
        /// Bytes of their bodies together.
        bytes: u64,
        /// The number of the last round: with it and the records, everything is there.
        last_round: u32,
        /// Whether the guest stands still because its operator wants it, and is to do so at the destination.
        paused: bool,
    },
    /// Destination: everything is loaded and `ready` is durable.
    Ready(ReadyTimes),
    /// Source: `released` is durable; the guest is yours.
    Commit,
    /// Destination: the guest runs here.
    Running(RunningTimes),
    /// Destination: its part of the report.
    Finished(DestinationReport),
    /// Either: no further.
    Abort {
        /// Why, as a number.
        code: Code,
        /// Why, in words.
        words: String,
    },
    /// Either: are you there?
    Keepalive {
        /// Comes back in the answer.
        nonce: u64,
    },
    /// Either: yes.
    KeepaliveAck {
        /// Of the question.
        nonce: u64,
    },
    /// Source, first on a new connection: what became of it?
    VerdictAsk {
        /// True: `released` is durable, and this is as good as Commit. False: it never said Commit, never will, and asks
        /// for the guest back.
        released: bool,
    },
    /// Destination: this.
    Verdict(VerdictAnswer),
    /// Source: the keys of these chunks of memory, please. For links that write memory directly.
    KeysAsk(KeysAsk),
    /// Destination: these.
    Keys(Keys),
    /// Source, first on a new connection: which links do you offer me?
    LinksAsk,
    /// Destination: these.
    Links(Vec<LinkOffer>),
    /// Source, on a connection that began with LinksAsk: padding, to learn how fast it comes.
    Probe(Vec<u8>),
    /// Destination: so many bytes of padding have come so far.
    ProbeAck {
        /// The bytes.
        bytes: u64,
    },
    /// Either, first on a new connection: which CPU can you give to guests?
    CpuAsk,
    /// In answer: this one; empty from a host that cannot tell.
    Cpu(CpuProfile),
    /// Source, first on a new connection: could this guest come? Nothing is changed by it.
    CheckAsk(Box<VmDescription>),
    /// Destination: not for these reasons; none if it could.
    Checked(Vec<Reason>),
    /// Destination, first on a new connection to the source: was it released?
    ReleasedAsk,
    /// Source: this.
    Released(ReleasedAnswer),
    /// Source, first on a new connection, before Hello or CheckAsk: an operator's word that it may.
    Ticket(TicketBytes),
}

/// Bodies that are no type of their own.
mod body {
    use super::{
        Code, Deserialize, LINKS_MAX, LinkOffer, PROBE_BYTES_MAX, REASONS_MAX, RECORD_BYTES_MAX, Reason, Serialize,
        WORDS_BYTES_MAX, bytes, emit_bytes, list, text,
    };

    #[derive(Serialize, Deserialize)]
    pub(super) struct End {
        pub(super) count: u32,
        pub(super) bytes: u64,
        pub(super) last_round: u32,
        pub(super) paused: bool,
    }

    #[derive(Serialize, Deserialize)]
    pub(super) struct Abort {
        pub(super) code: Code,
        #[serde(deserialize_with = "text::<_, WORDS_BYTES_MAX>")]
        pub(super) words: String,
    }

    /// A record whose bytes go as one piece.
    #[derive(Serialize, Deserialize)]
    #[serde(remote = "crate::record::Record")]
    pub(super) struct Record {
        kind: u16,
        version: u16,
        instance: u32,
        #[serde(serialize_with = "emit_bytes", deserialize_with = "bytes::<_, RECORD_BYTES_MAX>")]
        bytes: Vec<u8>,
    }

    /// The links that a host offers.
    #[derive(Serialize, Deserialize)]
    pub(super) struct Links(#[serde(deserialize_with = "list::<_, _, LINKS_MAX>")] pub(super) Vec<LinkOffer>);

    /// Reasons why not.
    #[derive(Serialize, Deserialize)]
    pub(super) struct Checked(#[serde(deserialize_with = "list::<_, _, REASONS_MAX>")] pub(super) Vec<Reason>);

    /// Padding that goes as one piece.
    #[derive(Serialize, Deserialize)]
    pub(super) struct Padding(
        #[serde(serialize_with = "emit_bytes", deserialize_with = "bytes::<_, PROBE_BYTES_MAX>")] pub(super) Vec<u8>,
    );

    #[derive(Serialize, Deserialize)]
    pub(super) struct Whole(#[serde(with = "Record")] pub(super) crate::record::Record);
}

fn memory<'de, D: Deserializer<'de>>(from: D) -> Result<MemoryMap, D::Error> {
    let regions = list::<_, Region, REGIONS_MAX>(from)?;
    MemoryMap::new(regions).map_err(D::Error::custom)
}

fn lines<'de, D: Deserializer<'de>>(from: D) -> Result<Vec<String>, D::Error> {
    #[derive(Deserialize)]
    struct Line(#[serde(deserialize_with = "text::<_, WORDS_BYTES_MAX>")] String);
    Ok(list::<_, Line, ANNOUNCEMENTS_MAX>(from)?.into_iter().map(|line| line.0).collect())
}

fn decode<T: DeserializeOwned>(what: &'static str, body: &[u8]) -> Result<T, Malformed> {
    let (value, rest) = postcard::take_from_bytes(body).map_err(|error| Malformed::Body { what, words: error.to_string() })?;
    if rest.is_empty() {
        return Ok(value);
    }
    Err(Malformed::Length { what, found: body.len() as u64, wanted: (body.len() - rest.len()) as u64 })
}

fn encode<T: Serialize>(what: &'static str, value: &T) -> Result<Vec<u8>, Misuse> {
    postcard::to_stdvec(value).map_err(|error| Misuse::Message { what, words: error.to_string() })
}

impl Message {
    /// Its kind in the header.
    #[must_use]
    pub fn kind(&self) -> u16 {
        match self {
            Message::Hello(_) => 1,
            Message::Accept(_) => 2,
            Message::Refuse(_) => 3,
            Message::Prepared { .. } => 4,
            Message::RoundDone { .. } => 5,
            Message::Record(_) => 6,
            Message::RecordsEnd { .. } => 7,
            Message::Ready(_) => 8,
            Message::Commit => 9,
            Message::Running(_) => 10,
            Message::Finished(_) => 11,
            Message::Abort { .. } => 12,
            Message::Keepalive { .. } => 13,
            Message::KeepaliveAck { .. } => 14,
            Message::VerdictAsk { .. } => 15,
            Message::Verdict(_) => 16,
            Message::KeysAsk(_) => 17,
            Message::Keys(_) => 18,
            Message::LinksAsk => 19,
            Message::Links(_) => 20,
            Message::Probe(_) => 21,
            Message::ProbeAck { .. } => 22,
            Message::CpuAsk => 23,
            Message::Cpu(_) => 24,
            Message::CheckAsk(_) => 25,
            Message::Checked(_) => 26,
            Message::ReleasedAsk => 27,
            Message::Released(_) => 28,
            Message::Ticket(_) => 29,
        }
    }

    /// Its name, for words and logs.
    #[must_use]
    pub fn name(&self) -> &'static str {
        Message::name_of(self.kind())
    }

    /// The name of a kind.
    #[must_use]
    pub fn name_of(kind: u16) -> &'static str {
        const NAMES: [&str; 30] = [
            "unknown",
            "Hello",
            "Accept",
            "Refuse",
            "Prepared",
            "RoundDone",
            "Record",
            "RecordsEnd",
            "Ready",
            "Commit",
            "Running",
            "Finished",
            "Abort",
            "Keepalive",
            "KeepaliveAck",
            "VerdictAsk",
            "Verdict",
            "KeysAsk",
            "Keys",
            "LinksAsk",
            "Links",
            "Probe",
            "ProbeAck",
            "CpuAsk",
            "Cpu",
            "CheckAsk",
            "Checked",
            "ReleasedAsk",
            "Released",
            "Ticket",
        ];
        NAMES.get(usize::from(kind)).copied().unwrap_or("unknown")
    }

    /// Parses the body of a message of `kind`.
    ///
    /// # Errors
    /// The kind is unknown, or the body does not decode, breaks a limit or has bytes left over.
    pub fn parse(kind: u16, body: &[u8]) -> Result<Message, Malformed> {
        let what = Message::name_of(kind);
        if body.len() > MESSAGE_BYTES_MAX {
            let (found, limit) = (body.len() as u64, MESSAGE_BYTES_MAX as u64);
            return Err(Malformed::TooLarge { what: "the length of a control message", found, limit });
        }
        Ok(match kind {
            1 => Message::Hello(Box::new(decode(what, body)?)),
            2 => Message::Accept(decode(what, body)?),
            3 => Message::Refuse(decode(what, body)?),
            4 => Message::Prepared { populated_ms: decode(what, body)? },
            5 => Message::RoundDone { round: decode(what, body)? },
            6 => Message::Record(decode::<body::Whole>(what, body)?.0),
            7 => {
                let body::End { count, bytes, last_round, paused } = decode(what, body)?;
                Message::RecordsEnd { count, bytes, last_round, paused }
            }
            8 => Message::Ready(decode(what, body)?),
            9 => decode(what, body).map(|()| Message::Commit)?,
            10 => Message::Running(decode(what, body)?),
            11 => Message::Finished(decode(what, body)?),
            12 => {
                let body::Abort { code, words } = decode(what, body)?;
                Message::Abort { code, words }
            }
            13 => Message::Keepalive { nonce: decode(what, body)? },
            14 => Message::KeepaliveAck { nonce: decode(what, body)? },
            15 => Message::VerdictAsk { released: decode(what, body)? },
            16 => Message::Verdict(decode(what, body)?),
            17 => Message::KeysAsk(decode(what, body)?),
            18 => Message::Keys(decode(what, body)?),
            19 => decode(what, body).map(|()| Message::LinksAsk)?,
            20 => Message::Links(decode::<body::Links>(what, body)?.0),
            21 => Message::Probe(decode::<body::Padding>(what, body)?.0),
            22 => Message::ProbeAck { bytes: decode(what, body)? },
            23 => decode(what, body).map(|()| Message::CpuAsk)?,
            24 => Message::Cpu(decode(what, body)?),
            25 => Message::CheckAsk(Box::new(decode(what, body)?)),
            26 => Message::Checked(decode::<body::Checked>(what, body)?.0),
            27 => decode(what, body).map(|()| Message::ReleasedAsk)?,
            28 => Message::Released(decode(what, body)?),
            29 => Message::Ticket(decode(what, body)?),
            other => return Err(Malformed::Value { what: "the kind of a control message", found: other.into() }),
        })
    }

    /// Its body.
    ///
    /// # Errors
    /// It does not fit the limits of a message.
    pub fn emit(&self) -> Result<Vec<u8>, Misuse> {
        let what = self.name();
        let body = match self {
            Message::Hello(body) => encode(what, body)?,
            Message::Accept(body) => encode(what, body)?,
            Message::Refuse(body) => encode(what, body)?,
            Message::Prepared { populated_ms } => encode(what, populated_ms)?,
            Message::RoundDone { round } => encode(what, round)?,
            Message::Record(body) => encode(what, &body::Whole(body.clone()))?,
            Message::RecordsEnd { count, bytes, last_round, paused } => {
                encode(what, &body::End { count: *count, bytes: *bytes, last_round: *last_round, paused: *paused })?
            }
            Message::Ready(body) => encode(what, body)?,
            Message::Commit | Message::LinksAsk | Message::CpuAsk | Message::ReleasedAsk => Vec::new(),
            Message::Running(body) => encode(what, body)?,
            Message::Finished(body) => encode(what, body)?,
            Message::Abort { code, words } => encode(what, &body::Abort { code: *code, words: words.clone() })?,
            Message::Keepalive { nonce } | Message::KeepaliveAck { nonce } => encode(what, nonce)?,
            Message::VerdictAsk { released } => encode(what, released)?,
            Message::Verdict(body) => encode(what, body)?,
            Message::KeysAsk(body) => encode(what, body)?,
            Message::Keys(body) => encode(what, body)?,
            Message::Links(offers) => encode(what, &body::Links(offers.clone()))?,
            Message::Probe(padding) => encode(what, &body::Padding(padding.clone()))?,
            Message::ProbeAck { bytes } => encode(what, bytes)?,
            Message::Cpu(profile) => encode(what, profile)?,
            Message::CheckAsk(vm) => encode(what, vm)?,
            Message::Checked(reasons) => encode(what, &body::Checked(reasons.clone()))?,
            Message::Released(answer) => encode(what, answer)?,
            Message::Ticket(bytes) => encode(what, bytes)?,
        };
        if body.len() > MESSAGE_BYTES_MAX {
            return Err(Misuse::Message { what, words: format!("{} bytes, at most {MESSAGE_BYTES_MAX} fit", body.len()) });
        }
        Ok(body)
    }

    /// Header and body, ready to be sent.
    ///
    /// # Errors
    /// It does not fit the limits of a message.
    pub fn frame(&self, migration: MigrationId, generation: Generation) -> Result<Vec<u8>, Misuse> {
        let body = self.emit()?;
        let length = u32::try_from(body.len()).unwrap_or(u32::MAX);
        let (kind, crc) = (self.kind(), crc32fast::hash(&body));
        let header = ControlHeader { version: VERSION_FIRST, kind, length, crc, migration, generation };
        let mut all = Vec::with_capacity(CONTROL_HEADER_BYTES + body.len());
        all.extend_from_slice(&header.emit());
        all.extend_from_slice(&body);
        Ok(all)
    }
}
