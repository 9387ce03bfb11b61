//! What commands and the agent say to each other: one request a connection, a stream of lines of JSON back.
//! The types are shared by both ends; the serving end is in `serve`, what is done in `actions`.

use crate::allow_api::{AllowAnswer, AllowRequest};
use limosa_proto::cpu::CpuProfile;
use limosa_proto::report::{LinkTried, Report};
use limosa_proto::wire::message::Reason;
use serde::{Deserialize, Serialize};
use std::io::{BufRead as _, BufReader, Read as _, Write as _};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::Duration;

/// Longest request line in bytes.
pub const REQUEST_BYTES_MAX: u64 = 64 << 10;
/// Longest line of an answer in bytes.
const ANSWER_BYTES_MAX: u64 = 4 << 20;

/// Exit codes of commands: an interface.
pub mod exit {
    /// Done.
    pub const DONE: u8 = 0;
    /// Refused, nothing changed.
    pub const REFUSED: u8 = 1;
    /// Wrong usage or configuration.
    pub const USAGE: u8 = 2;
    /// Aborted; the guest runs on at the source.
    pub const ABORTED: u8 = 3;
    /// In doubt.
    pub const IN_DOUBT: u8 = 4;
}

/// What a command asks of the agent.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Request {
    /// Start the guest of a configuration file (absolute path).
    VmStart {
        /// The file.
        config: PathBuf,
    },
    /// All guests.
    VmList,
    /// One guest.
    VmShow {
        /// Its name.
        vm: String,
    },
    /// Stop a guest.
    VmStop {
        /// Its name.
        vm: String,
    },
    /// Pause a guest until it is resumed, whatever becomes of the agent.
    VmPause {
        /// Its name.
        vm: String,
    },
    /// Let a paused guest run on.
    VmResume {
        /// Its name.
        vm: String,
    },
    /// Save a guest into a file; answers with progress until it ends.
    VmSave {
        /// Its name.
        vm: String,
        /// The file (absolute path); it must not be there.
        file: PathBuf,
        /// Whether it runs on afterwards; otherwise it is stopped.
        keep_running: bool,
    },
    /// Start the guest of such a file; answers with progress until it ends.
    VmRestore {
        /// The file (absolute path).
        file: PathBuf,
        /// Whether it stays paused.
        paused: bool,
    },
    /// Who this host is.
    HostId,
    /// Who this host is, and which links it has.
    HostShow,
    /// Which CPU this host gives to guests.
    HostCpu,
    /// Ask for the key of whoever answers at an address, once; nothing is trusted by it.
    HostAsk {
        /// As for a trusted host.
        address: String,
    },
    /// Trust a host.
    HostTrust(HostInfo),
    /// Trust all of these hosts, or none.
    HostTrustAll(Vec<HostInfo>),
    /// Refuse a key for good, or forget that.
    HostRevoke {
        /// The key's id, or a trusted host's name.
        which: String,
        /// Forget it.
        undo: bool,
    },
    /// The keys that are revoked.
    HostRevoked,
    /// A signed statement about a host's new key.
    HostStatement {
        /// One line.
        text: String,
    },
    /// Begin to replace this host's own key; answers with the statement for the others.
    HostRotate {
        /// How long the old key is good beside the new one, in seconds.
        overlap: u64,
    },
    /// Take the new key now.
    HostRotateFinish,
    /// About the allow-lists.
    Allow(AllowRequest),
    /// The trusted hosts.
    HostList,
    /// Trust a host no more.
    HostRemove {
        /// Its name.
        name: String,
    },
    /// Whom a ticket for a move has to name.
    Parties {
        /// The guest's name.
        vm: String,
        /// The destination's name.
        to: String,
    },
    /// Move a guest; answers with progress until it ends.
    Migrate(MigrateRequest),
    /// Every reason that would stop a migration; nothing is begun.
    Check(MigrateRequest),
    /// All jobs; with `watch` again and again until none runs.
    Jobs {
        /// Whether to go on until no job runs.
        watch: bool,
    },
    /// One job; with `watch` progress until it ends.
    Job {
        /// Its number.
        id: u64,
        /// Whether to go on until it ends.
        watch: bool,
    },
    /// Stop a job.
    Cancel {
        /// Its number.
        id: u64,
    },
    /// What is known about whom a guest belongs to, and an operator's decision.
    Verdict {
        /// The job's number.
        id: u64,
        /// The decision, if there is one.
        #[serde(default)]
        decide: Option<Decide>,
    },
    /// Tell the network where a guest is, once more.
    Announce {
        /// The guest's name.
        vm: String,
    },
}

/// A migration as the command asked for it; what is absent is taken from the agent's configuration.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct MigrateRequest {
    /// The guest's name.
    pub vm: String,
    /// The destination's name.
    pub to: String,
    /// "auto", "tcp", "quic" or "rdma".
    pub link: Option<String>,
    /// Whether pages are checked by a keyed hash on links without encryption.
    pub page_check: Option<bool>,
    /// 1 to 16.
    pub lanes: Option<u16>,
    /// Whether guest memory may cross the network in plain text. False: nor over a fabric that is declared trusted.
    pub plaintext: Option<bool>,
    /// Pause that pre-copy aims at.
    pub downtime_target_ms: Option<u64>,
    /// Longest pause.
    pub downtime_ms_max: Option<u64>,
    /// "longer-downtime" or "abort".
    pub on_no_convergence: Option<String>,
    /// Most bytes a second; 0: no limit.
    pub bandwidth: Option<u64>,
    /// Whether the guest is paused first and sent at once.
    pub quick: Option<bool>,
    /// Only say what would be done.
    pub plan_only: bool,
    /// An operator's ticket for it, as text.
    pub ticket: Option<String>,
}

/// Whom a ticket for a move has to name, by the word of the host that is asked.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Parties {
    /// The guest's name.
    pub vm: String,
    /// The guest's identity.
    pub vm_id: String,
    /// The host that is asked.
    pub source: HostInfo,
    /// The host that it would go to.
    pub destination: HostInfo,
}

/// A migration with everything resolved, as it is going to be done.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Plan {
    /// The guest's name.
    pub vm: String,
    /// The guest's identity.
    pub vm_id: String,
    /// Its memory.
    pub memory_bytes: u64,
    /// The destination.
    pub to: HostInfo,
    /// The link that was asked for: "auto", "tcp", "quic" or "rdma".
    pub link_wanted: String,
    /// The link that is tried first: "tcp".
    pub link: String,
    /// Why.
    pub link_reason: String,
    /// The links that are tried one after the other if the first fails before pages move, itself included.
    pub links: Vec<String>,
    /// What was learnt of every link.
    pub links_tried: Vec<LinkTried>,
    /// What was asked for or configured; none: encrypted, or over a fabric that both hosts declare trusted.
    pub plaintext: Option<bool>,
    /// Whether guest memory is encrypted on the first link.
    pub encrypted: bool,
    /// Whether pages are checked by a keyed hash where the link does not encrypt.
    pub page_check: bool,
    /// Number of lanes.
    pub lanes: u16,
    /// Whether the guest is paused first and sent at once.
    pub quick: bool,
    /// Whether its operator has paused it: it goes at once, and stays so.
    pub paused: bool,
    /// Pause that pre-copy aims at.
    pub downtime_target_ms: u64,
    /// Longest pause.
    pub downtime_ms_max: u64,
    /// "longer-downtime" or "abort".
    pub on_no_convergence: String,
    /// Most bytes a second; 0: no limit.
    pub bandwidth: u64,
}

/// A guest, as the agent knows it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct VmInfo {
    /// Its name.
    pub name: String,
    /// Its identity.
    pub id: String,
    /// "running", "paused" (by its operator), "in doubt", "incoming", or what is being done with it: "migrating", "saving".
    pub state: String,
    /// Process id of its VMM.
    pub pid: u32,
    /// When it was plugged in, in milliseconds since 1970.
    pub since_unix_ms: u64,
    /// Its memory.
    pub memory_bytes: u64,
    /// Its virtual CPUs.
    pub vcpus: u32,
    /// Its NICs in words: MAC, network, addresses.
    pub nics: Vec<String>,
    /// The socket of its serial line, if its VMM has one.
    #[serde(default)]
    pub console: Option<PathBuf>,
}

/// A host that is trusted, or this one.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct HostInfo {
    /// Its name.
    pub name: String,
    /// Its identity: 52 letters and digits.
    pub id: String,
    /// Where its agent listens: `address:port` or `name:port`, several with commas between.
    pub address: String,
}

/// This host, as others meet it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct HostReport {
    /// Its name.
    pub name: String,
    /// Its identity.
    pub id: String,
    /// Where its agent listens.
    pub addresses: Vec<String>,
    /// Its links.
    pub links: Vec<LinkInfo>,
    /// Its RDMA devices, usable or not.
    pub rdma_devices: Vec<RdmaDevice>,
}

/// The CPU that this host gives to guests.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct HostCpuReport {
    /// The host's name.
    pub name: String,
    /// What the vendor calls it.
    pub brand: String,
    /// "GenuineIntel", "AuthenticAMD".
    pub vendor: String,
    /// Family, as /proc/cpuinfo has it.
    pub family: u32,
    /// Model.
    pub model: u32,
    /// Stepping.
    pub stepping: u32,
    /// The level of the x86-64 psABI that it reaches: "x86-64-v3".
    pub level: Option<String>,
    /// Its features, as /proc/cpuinfo of a guest has them.
    pub features: Vec<String>,
    /// Features that it has and keeps back (`[cpu] hide`), with what is built on them.
    pub hidden: Vec<String>,
    /// Bytes of the XSAVE area.
    pub xsave_bytes: u32,
    /// What is in it.
    pub xsave_components: Vec<String>,
    /// Frequency of the time stamp counter in kHz; 0: not known.
    pub tsc_khz: u32,
    /// Whether a guest's may run at another.
    pub tsc_scaling: bool,
    /// Most vCPUs of one guest.
    pub vcpus_max: u32,
    /// CPUs of the host.
    pub cpus: u32,
    /// All of it, as it is compared.
    pub profile: CpuProfile,
}

/// Whether a guest could move.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct CheckReport {
    /// The guest's name.
    pub vm: String,
    /// The destination.
    pub to: HostInfo,
    /// Whether it could.
    pub ok: bool,
    /// Every reason why not.
    pub reasons: Vec<Reason>,
    /// What would have helped, where that is known.
    pub advice: Option<String>,
    /// How it would be done; none if there is no link.
    pub plan: Option<Box<Plan>>,
    /// What it would take; none if it cannot be done.
    pub estimate: Option<Estimate>,
}

/// What a migration is expected to take, before it is begun.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Estimate {
    /// The guest's memory; what it never touched or left zero is not sent.
    pub memory_bytes: u64,
    /// Bytes a second by a short probe, or the limit that is set; none: not measured.
    pub bytes_per_s: Option<f64>,
    /// Seconds to send all memory once at that speed. A guest that writes needs longer.
    pub seconds: Option<f64>,
    /// The pause that is aimed at.
    pub downtime_target_ms: u64,
}

/// A link of a host.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct LinkInfo {
    /// "tcp", "quic" or "rdma".
    pub link: String,
    /// Whether guests may come over it.
    pub available: bool,
    /// Why not, or what is worth saying about it.
    pub words: String,
    /// Its addresses, where they are not the agent's, with the payload of one packet in bytes: `10.0.0.1 (MTU 4096)`.
    pub addresses: Vec<String>,
}

/// An RDMA device.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct RdmaDevice {
    /// Its name: `mlx5_0`, `rxe0`.
    pub name: String,
    /// Its number.
    pub guid: String,
    /// Whether memory may stay unpinned.
    pub on_demand: bool,
    /// Its ports.
    pub ports: Vec<RdmaPort>,
}

/// A port of an RDMA device.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct RdmaPort {
    /// From 1.
    pub number: u8,
    /// "active", "down" and so on.
    pub state: String,
    /// "Ethernet" or "InfiniBand".
    pub link_layer: String,
    /// Bytes of a packet's payload, as things are.
    pub mtu_active: u32,
    /// Bytes of a packet's payload at most.
    pub mtu_max: u32,
    /// Its addresses.
    pub gids: Vec<RdmaGid>,
}

/// An address of a port.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct RdmaGid {
    /// Its place in the port's table.
    pub index: u32,
    /// The address.
    pub gid: String,
    /// "RoCE v2", "RoCE v1" or "InfiniBand".
    pub kind: String,
    /// The network interface that it belongs to.
    pub interface: Option<String>,
}

/// Which way a guest went.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Direction {
    /// From this host.
    Outgoing,
    /// To this host.
    Incoming,
    /// Into a file.
    Saving,
    /// Out of a file.
    Restoring,
}

/// How a job stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum JobState {
    /// At work.
    Running,
    /// The guest runs at the destination.
    Done,
    /// Nothing was changed.
    Refused,
    /// The guest runs on at the source.
    Aborted,
    /// It is not known whose the guest is until the hosts can talk again.
    InDoubt,
}

impl JobState {
    /// The exit code of a command that waited for the job.
    #[must_use]
    pub fn exit(self) -> u8 {
        match self {
            JobState::Running | JobState::Done => exit::DONE,
            JobState::Refused => exit::REFUSED,
            JobState::Aborted => exit::ABORTED,
            JobState::InDoubt => exit::IN_DOUBT,
        }
    }

    /// Whether the job has come to its end.
    #[must_use]
    pub fn ended(self) -> bool {
        matches!(self, JobState::Done | JobState::Refused | JobState::Aborted)
    }
}

/// How far a migration is.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct JobProgress {
    /// What it is doing, as the protocol names it.
    pub phase: String,
    /// Whether the guest may have been given away already: nothing is cancelled any more.
    pub committing: bool,
    /// Round of pre-copy, from 1.
    pub round: u32,
    /// Bytes that are still to be sent in this round.
    pub bytes_remaining: u64,
    /// The guest's memory.
    pub memory_bytes: u64,
    /// Bytes sent until now.
    pub bytes_on_wire: u64,
    /// Bytes a second.
    pub rate_bytes_per_s: u64,
    /// Bytes a second that the guest dirties.
    pub dirty_bytes_per_s: u64,
    /// Milliseconds until the end, if that can be told.
    pub estimate_ms: Option<u64>,
}

/// A job.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct JobInfo {
    /// Its number on this host.
    pub id: u64,
    /// Which way.
    pub direction: Direction,
    /// The guest's name.
    pub vm: String,
    /// The guest's identity.
    pub vm_id: String,
    /// The other host's name, or its identity; of a snapshot its file.
    pub peer: String,
    /// The migration's identity.
    pub migration: String,
    /// Which attempt at moving this guest.
    pub generation: u64,
    /// How it stands.
    pub state: JobState,
    /// When it began, in milliseconds since 1970.
    pub began_unix_ms: u64,
    /// When it ended.
    pub ended_unix_ms: Option<u64>,
    /// How far it is, while it runs.
    pub progress: Option<JobProgress>,
    /// What it came to.
    pub report: Option<Report>,
    /// What left on which interface when the guest had come; incoming jobs only.
    #[serde(default)]
    pub announcements: Vec<String>,
    /// What was written or read, of saving and restoring.
    #[serde(default)]
    pub snapshot: Option<SnapshotInfo>,
    /// Why it ended so, in words.
    pub words: String,
    /// A word for machines when it did not succeed: "not-allowed", "no-room" and so on.
    pub code: Option<String>,
}

/// A snapshot, as it was written or read.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct SnapshotInfo {
    /// Bytes of the file.
    pub file_bytes: u64,
    /// Bytes of the guest's memory.
    pub memory_bytes: u64,
    /// Pages in the file; all others are zero.
    pub pages: u64,
    /// Records of device state.
    pub records: u64,
    /// From the start to the end.
    pub total_ms: f64,
    /// How long the guest stood still for it; none where it stood still anyhow, or was stopped.
    pub paused_ms: Option<f64>,
    /// What the guest does here now: "runs", "paused" or "stopped".
    pub guest: String,
}

/// What an operator decides about a guest in doubt.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Decide {
    /// Whose the guest is.
    pub whose: Whose,
    /// Why; it is written down.
    pub reason: String,
    /// Whether the operator has made sure of what the other host does, which cannot be asked.
    #[serde(default)]
    pub looked: bool,
}

/// Whose a guest is, to the host that is told.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Whose {
    /// This host's: it runs here.
    Here,
    /// Not this host's: its VMM here ends.
    Gone,
}

/// What is known about a migration in doubt.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct VerdictInfo {
    /// The job.
    pub job: u64,
    /// How it stands.
    pub state: JobState,
    /// What this host's journal says, oldest first.
    pub journal: Vec<String>,
    /// What the other host says, if it can be asked now.
    pub other: String,
    /// What the guest's VMM on this host says.
    pub vmm: String,
    /// What follows from it.
    pub words: String,
}

/// The agent's answer.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Answer {
    /// A guest.
    Vm(VmInfo),
    /// Guests.
    Vms(Vec<VmInfo>),
    /// A host.
    Host(HostInfo),
    /// Hosts.
    Hosts(Vec<HostInfo>),
    /// This host with its links.
    HostShow(Box<HostReport>),
    /// This host's CPU.
    HostCpu(Box<HostCpuReport>),
    /// Whether a guest could move.
    Check(Box<CheckReport>),
    /// A job.
    Job(Box<JobInfo>),
    /// Jobs.
    Jobs(Vec<JobInfo>),
    /// A plan.
    Plan(Box<Plan>),
    /// Whom a ticket has to name.
    Parties(Box<Parties>),
    /// What left on which interface.
    Announced(Vec<String>),
    /// What is known.
    Verdict(VerdictInfo),
    /// Keys, or statements about them.
    Lines(Vec<String>),
    /// About the allow-lists.
    Allow(Box<AllowAnswer>),
    /// Something was done, in words.
    Done(String),
}

/// A request that was not done.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, thiserror::Error)]
#[error("{words}")]
pub struct ApiError {
    /// A word for machines.
    pub code: String,
    /// What, where, and what to do.
    pub words: String,
    /// What the command should exit with.
    pub exit: u8,
}

impl ApiError {
    /// A refusal: nothing was changed.
    pub fn refused(code: &str, words: impl Into<String>) -> ApiError {
        ApiError { code: code.into(), words: words.into(), exit: exit::REFUSED }
    }

    /// A request that makes no sense.
    pub fn usage(code: &str, words: impl Into<String>) -> ApiError {
        ApiError { code: code.into(), words: words.into(), exit: exit::USAGE }
    }
}

/// One line of the answer's stream; a result or an error is the last.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Response {
    /// How a job is doing.
    Progress(Box<JobInfo>),
    /// Something that should be known.
    Warning(String),
    /// The answer.
    Result(Answer),
    /// Why there is none.
    Error(ApiError),
}

/// One request and its answers, seen from the command.
#[derive(Debug)]
pub struct Exchange {
    stream: BufReader<UnixStream>,
}

impl Exchange {
    /// Connects to the agent at `socket` and sends `request`.
    ///
    /// # Errors
    /// No agent there, or no permission: in words.
    pub fn ask(socket: &Path, request: &Request) -> Result<Exchange, ApiError> {
        let error = |e: std::io::Error| {
            let hint = match e.kind() {
                std::io::ErrorKind::PermissionDenied => "run it as root",
                _ => "is `limosa agent` running? --run-dir names its directory",
            };
            ApiError::refused("no-agent", format!("the agent at {} cannot be reached: {e}; {hint}", socket.display()))
        };
        Exchange::over(UnixStream::connect(socket).map_err(error)?, request)
    }

    /// Sends `request` over a stream that leads to an agent.
    ///
    /// # Errors
    /// The stream is broken.
    pub fn over(mut stream: UnixStream, request: &Request) -> Result<Exchange, ApiError> {
        let error = |e: std::io::Error| ApiError::refused("agent-lost", format!("the request could not be sent: {e}"));
        let mut line = serde_json::to_vec(request).map_err(|e| error(e.into()))?;
        line.push(b'\n');
        stream.set_write_timeout(Some(Duration::from_secs(10))).map_err(error)?;
        stream.write_all(&line).map_err(error)?;
        Ok(Exchange { stream: BufReader::new(stream) })
    }

    /// The next line of the answer; none when the agent has closed the stream.
    ///
    /// # Errors
    /// A broken connection, or something that is no answer.
    pub fn next_response(&mut self) -> Result<Option<Response>, ApiError> {
        let mut line = String::new();
        let read = (&mut self.stream).take(ANSWER_BYTES_MAX).read_line(&mut line);
        let count = read.map_err(|e| ApiError::refused("agent-lost", format!("the agent's answer broke off: {e}")))?;
        if count == 0 {
            return Ok(None);
        }
        let parsed = serde_json::from_str(&line);
        parsed.map(Some).map_err(|e| ApiError::refused("agent-strange", format!("the agent's answer makes no sense: {e}")))
    }

    /// Waits for the end of the answer; `on_progress` gets the lines before it.
    ///
    /// # Errors
    /// What the agent answered, or that the connection broke.
    pub fn finish(mut self, mut on_progress: impl FnMut(&Response)) -> Result<Answer, ApiError> {
        // Once something was begun, an agent that goes away leaves in doubt how it ends.
        let mut begun = false;
        let lost = |begun, words: &str| {
            let exit = if begun { exit::IN_DOUBT } else { exit::REFUSED };
            Err(ApiError { code: "agent-lost".into(), words: words.into(), exit })
        };
        loop {
            match self.next_response() {
                Ok(Some(Response::Result(answer))) => return Ok(answer),
                Ok(Some(Response::Error(error))) => return Err(error),
                Ok(Some(other)) => {
                    begun |= matches!(other, Response::Progress(_));
                    on_progress(&other);
                }
                Ok(None) => {
                    return lost(begun, "the agent went away before it answered; `limosa jobs` says more once it is back");
                }
                Err(error) => return lost(begun, &error.words),
            }
        }
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn requests_are_plain_json() {
        let text = serde_json::to_string(&Request::Cancel { id: 3 }).unwrap();
        assert_eq!(text, r#"{"cancel":{"id":3}}"#);
        assert!(matches!(serde_json::from_str(r#""vm_list""#).unwrap(), Request::VmList));
        let request: Request = serde_json::from_str(r#"{"migrate":{"vm":"web","to":"beta"}}"#).unwrap();
        assert!(matches!(request, Request::Migrate(m) if m.vm == "web" && m.lanes.is_none()));
        assert!(serde_json::from_str::<Request>(r#"{"format_disk":{}}"#).is_err());
    }

    #[test]
    fn a_stream_ends_with_its_result() {
        let dir = tempfile::tempdir().unwrap();
        let socket = dir.path().join("api.sock");
        let listener = std::os::unix::net::UnixListener::bind(&socket).unwrap();
        let serving = std::thread::spawn(move || {
            let (mut stream, _) = listener.accept().unwrap();
            let mut line = String::new();
            BufReader::new(stream.try_clone().unwrap()).read_line(&mut line).unwrap();
            for response in [Response::Warning("slow".into()), Response::Result(Answer::Done("well".into()))] {
                writeln!(stream, "{}", serde_json::to_string(&response).unwrap()).unwrap();
            }
            line
        });
        let mut seen = 0;
        let answer = Exchange::ask(&socket, &Request::VmList).unwrap().finish(|_| seen += 1).unwrap();
        assert!(matches!(answer, Answer::Done(words) if words == "well"));
        assert_eq!((serving.join().unwrap().as_str(), seen), ("\"vm_list\"\n", 1));
        let error = Exchange::ask(&dir.path().join("none"), &Request::VmList).unwrap_err();
        assert!(error.words.contains("is `limosa agent` running?"), "{error}");
    }
}
