//! Two hosts, what is on its way between them, and what may still go wrong: one state of the model. The engines in it are the
//! real ones, and so are the rules by which an agent settles what a crash has left open. It says what a host is, not what can
//! happen to it: that is `steps`.

use limosa_proto::commit::{JournalRecord, JournalRecordKind};
use limosa_proto::destination::{Deadlines, Destination, DestinationConfig};
use limosa_proto::identity::{Generation, HostId, MigrationId, VmId};
use limosa_proto::memory::{Gpa, MemoryMap, Region};
use limosa_proto::recovery::Ended;
use limosa_proto::source::{Course, Source, SourceConfig};
use limosa_proto::time::Instant;
use limosa_proto::wire::frame::LaneToken;
use limosa_proto::wire::message::{ReleasedAnswer, VerdictAnswer, VmDescription};
use std::fmt;
use std::hash::{Hash, Hasher};
use std::sync::Arc;
use std::time::Duration;

pub(crate) const MIGRATION: MigrationId = MigrationId([7; 16]);
const VM: VmId = VmId([5; 16]);
/// The moments at which timers come: short patience, long patience, and after long patience has begun at the end of one.
pub(crate) const MOMENTS: [Instant; 3] = [Instant(1), Instant(1_000), Instant(2_000)];
const SHORT: Duration = Duration::from_nanos(1);
const LONG: Duration = Duration::from_nanos(100);
/// Longer than anything here lasts: silence is a lost link, and that comes as a step of its own.
const NEVER: Duration = Duration::from_nanos(1_000_000);

#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(crate) enum Side {
    Source,
    Destination,
}

impl fmt::Display for Side {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(if *self == Side::Source { "source" } else { "destination" })
    }
}

/// What is said, as far as it matters for the commit.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(crate) enum Word {
    Ready,
    Commit,
    Running,
    Finished,
    Abort,
    Ask { released: bool },
    Answer(VerdictAnswer),
    AskReleased,
    Said(ReleasedAnswer),
}

/// A message on its way. The link keeps no order.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(crate) struct Packet {
    pub(crate) to: Side,
    pub(crate) generation: u64,
    pub(crate) word: Word,
}

/// What a host does next, one after the other. A crash of the agent forgets them.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) enum Task {
    /// For the engine of this generation: a record.
    Journal { kind: JournalRecordKind, generation: u64 },
    /// For the engine: the guest's state is loaded.
    Load { generation: u64 },
    /// For the engine: the guest runs.
    Resume { generation: u64 },
    /// For the engine: the network is told.
    Announce { generation: u64 },
    /// For the engine: the guest lives elsewhere, or never came; its VMM ends.
    End,
    /// The agent's own: a record; whether it could be written changes nothing.
    Note { kind: JournalRecordKind, generation: u64, tell: Option<VerdictAnswer> },
    /// The agent's own, of a source that has heard a verdict: a record, and then the guest runs on (`back`), or its VMM ends. If
    /// it cannot be written, it asks again; unless the guest is to run on in a VMM that is there.
    Settle { kind: JournalRecordKind, generation: u64, back: bool },
    /// The agent's own: the guest runs; if it does, `running` is noted, and the source told.
    TakeUp { generation: u64 },
    /// The agent's own: `discarded`, and only if that is durable the VMM ends. The source is told, if it asked.
    Discard { generation: u64, tell: bool },
    /// The agent's own: the record that an engine could not write, again and again.
    Owe { generation: u64, ended: Ended },
    /// The agent's own: the guest is this host's and runs on.
    Own,
    /// The agent's own: the VMM ends.
    Drop,
    /// The agent's own, of a source: `aborted`, if it is not settled otherwise, and then it says Never.
    Promise { generation: u64 },
}

/// What a VMM does with the guest.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) enum Vmm {
    /// There is none.
    Gone,
    /// The guest runs, as the attempt of this generation left it.
    Runs(u64),
    /// It stands still where it ran.
    Stands,
    /// It is coming in by this generation. Its VMM ends with its agent.
    Coming(u64),
    /// It came in by this generation, and has not run here.
    Loaded(u64),
}

/// An engine and the attempt that it carries.
#[derive(Clone, Hash)]
pub(crate) struct Carried<E> {
    pub(crate) engine: Arc<E>,
    pub(crate) generation: u64,
    /// Whether it has a link, or waits for the answer to a question (source).
    pub(crate) linked: bool,
    pub(crate) asks: bool,
}

#[derive(Clone, Hash)]
pub(crate) struct Host<E> {
    /// The agent lives.
    pub(crate) lives: bool,
    /// The VMM has plugged in since the agent's start.
    pub(crate) plugged: bool,
    pub(crate) vmm: Vmm,
    /// Durable.
    pub(crate) journal: Vec<(JournalRecordKind, u64)>,
    pub(crate) carried: Option<Carried<E>>,
    pub(crate) tasks: Vec<Task>,
    /// After a restart: the source asks about this attempt, or the destination waits for word of it.
    pub(crate) open: Option<u64>,
    /// The question is on its way.
    pub(crate) asked: bool,
    /// What the source last said to the destination, if that was anything to go by.
    pub(crate) said: Option<ReleasedAnswer>,
    /// What the source has said that it never released.
    pub(crate) never: Option<u64>,
}

impl<E> Host<E> {
    pub(crate) fn has(&self, kind: JournalRecordKind, generation: u64) -> bool {
        self.journal.contains(&(kind, generation))
    }

    /// The journal, as its readers know it.
    pub(crate) fn records(&self) -> Vec<JournalRecord> {
        self.journal.iter().map(|(kind, generation)| record(*kind, *generation)).collect()
    }
}

pub(crate) fn record(kind: JournalRecordKind, generation: u64) -> JournalRecord {
    let (generation, peer) = (Generation(generation), HostId([3; 32]));
    JournalRecord { kind, migration: MIGRATION, generation, vm: VM, peer, words: String::new() }
}

/// What may still go wrong, and how often.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) struct Left {
    /// Crashes of source and destination.
    pub(crate) crashes: [u8; 2],
    /// How many of them may take the whole host.
    pub(crate) power: u8,
    pub(crate) duplicates: u8,
    pub(crate) losses: u8,
    pub(crate) cuts: u8,
    pub(crate) cancels: u8,
    /// Tasks that fail, done or not.
    pub(crate) failures: u8,
    /// Further attempts.
    pub(crate) attempts: u8,
    /// Whether a destination's question, and its answer, are on their way like other words; else a source that lives is asked and
    /// answers in one step.
    pub(crate) far: bool,
}

/// What cannot be read off the state any more.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub(crate) struct Facts {
    /// The last generation by which the guest ran at the destination.
    pub(crate) ran: Option<u64>,
    /// The source let memory run that is older than what ran at the destination.
    pub(crate) old_memory: bool,
    /// The network was told of the guest at the destination before it ran there.
    pub(crate) told_early: bool,
    /// A word of another generation made the destination take a guest.
    pub(crate) strange_word: bool,
    /// A power cut took the source's guest when it ran nowhere else.
    pub(crate) source_lost: bool,
    /// A power cut took the destination's guest when it ran, or was ready to.
    pub(crate) destination_lost: bool,
    /// The source released what it had said that it never would, or said so of what it had released.
    pub(crate) promise_broken: bool,
}

#[allow(clippy::derived_hash_with_manual_eq, reason = "two are equal when their hashes are: what the search goes by")]
#[derive(Clone, Hash)]
pub(crate) struct World {
    pub(crate) source: Host<Source>,
    pub(crate) destination: Host<Destination>,
    /// Ordered, none twice.
    pub(crate) network: Vec<Packet>,
    pub(crate) left: Left,
    pub(crate) facts: Facts,
}

impl PartialEq for World {
    fn eq(&self, other: &World) -> bool {
        fingerprint(self) == fingerprint(other)
    }
}

pub(crate) fn fingerprint(world: &World) -> u64 {
    let mut hasher = std::hash::DefaultHasher::new();
    world.hash(&mut hasher);
    hasher.finish()
}

impl World {
    /// Before the first attempt: the guest runs at the source.
    pub(crate) fn new(left: Left) -> World {
        fn host<E>(vmm: Vmm) -> Host<E> {
            let (journal, tasks) = (Vec::new(), Vec::new());
            Host {
                lives: true,
                plugged: true,
                vmm,
                journal,
                carried: None,
                tasks,
                open: None,
                asked: false,
                said: None,
                never: None,
            }
        }
        let (source, destination) = (host(Vmm::Runs(0)), host(Vmm::Gone));
        World { source, destination, network: Vec::new(), left, facts: Facts::default() }
    }

    pub(crate) fn send(&mut self, to: Side, generation: u64, word: Word) {
        let packet = Packet { to, generation, word };
        if let Err(place) = self.network.binary_search(&packet) {
            self.network.insert(place, packet);
        }
    }

    /// How many hosts run the guest.
    pub(crate) fn owners(&self) -> usize {
        [self.source.vmm, self.destination.vmm].iter().filter(|vmm| matches!(vmm, Vmm::Runs(_))).count()
    }

    /// No host has the guest, and no host can: a power cut took the one that did. After the release it may have been the
    /// destination's, and then the source is in doubt until an operator decides.
    pub(crate) fn is_lost(&self) -> bool {
        let Facts { source_lost, destination_lost, ran, .. } = self.facts;
        let released = self.source.journal.iter().any(|(kind, _)| *kind == JournalRecordKind::Released);
        let lost = source_lost || destination_lost && (released || ran.is_some());
        lost && self.owners() == 0 && self.source.lives && self.destination.lives
    }

    /// Both agents live and nothing is under way or open; but what a power cut took from the destination may stay open there,
    /// for its operator, if the source has released it.
    pub(crate) fn is_settled(&self) -> bool {
        fn settled<E>(host: &Host<E>) -> bool {
            let here = host.plugged || host.vmm == Vmm::Gone;
            host.lives && here && host.carried.is_none() && host.tasks.is_empty()
        }
        let doubtful = |generation: u64| self.facts.destination_lost && self.source.has(JournalRecordKind::Released, generation);
        let open = self.source.open.is_some() || self.destination.open.is_some_and(|generation| !doubtful(generation));
        settled(&self.source) && settled(&self.destination) && !open
    }
}

fn deadlines() -> Deadlines {
    Deadlines {
        answer: SHORT,
        prepare: SHORT,
        lanes: SHORT,
        host: SHORT,
        stall: SHORT,
        stopped: SHORT,
        ready: SHORT,
        commit: SHORT,
        finish: LONG,
        retry: SHORT,
    }
}

/// One page of memory, which goes at once: how it gets there is not what is checked here.
pub(crate) fn source_config(generation: u64) -> SourceConfig {
    let memory = MemoryMap::new(vec![Region { gpa: Gpa(0), bytes: 4096, page_bytes: 4096 }]).expect("one page is a memory");
    let vm = VmDescription {
        id: VM,
        name: "guest".to_owned(),
        vcpus: 1,
        memory,
        nics: vec![],
        disks: vec![],
        vmm: String::new(),
        records: vec![],
        config: vec![],
        cpu: Default::default(),
    };
    let config = SourceConfig::new(MIGRATION, Generation(generation), HostId([2; 32]), vm);
    SourceConfig { course: Course::Quick, keepalive: NEVER, peer_silence_max: NEVER * 2, deadlines: deadlines(), ..config }
}

pub(crate) fn destination_config(generation: u64) -> DestinationConfig {
    let config = DestinationConfig::new(MIGRATION, Generation(generation), HostId([1; 32]), LaneToken([9; 32]));
    DestinationConfig { keepalive: NEVER, peer_silence_max: NEVER * 2, deadlines: deadlines(), ..config }
}

impl fmt::Debug for World {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let World { source, destination, network, left, facts } = self;
        let at =
            source.carried.as_ref().map(|carried| (carried.engine.state(), carried.generation, carried.linked, carried.asks));
        write!(f, "source {{ lives {} {:?} {:?} {at:?}", source.lives, source.vmm, source.journal)?;
        write!(f, " tasks {:?} open {:?} }} ", source.tasks, source.open)?;
        let at = destination.carried.as_ref().map(|carried| (carried.engine.state(), carried.generation, carried.linked));
        write!(f, "destination {{ lives {} {:?} {:?} {at:?}", destination.lives, destination.vmm, destination.journal)?;
        write!(f, " tasks {:?} open {:?} }} {network:?} {left:?} {facts:?}", destination.tasks, destination.open)
    }
}
