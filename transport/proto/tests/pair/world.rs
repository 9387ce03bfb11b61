//! Two engines, two hosts, a network and a guest that writes, all of it simulated: time jumps from event to event.
//! It watches the promises while it runs: never two running guests, `Done` once and last, memory equal at the resume.
#![allow(clippy::unwrap_used, clippy::panic)]

use limosa_proto::bitmap::PageSet;
use limosa_proto::commit::{self, DestinationVerdict, JournalRecord, JournalRecordKind, SourceVerdict};
use limosa_proto::destination::{
    Destination, DestinationAction, DestinationConfig, DestinationEvent, DestinationOutcome, HostTask, Side,
};
use limosa_proto::identity::{Generation, HostId, MigrationId, VmId};
use limosa_proto::memory::{Gpa, MemoryMap, PageRange, Region};
use limosa_proto::record::Record;
use limosa_proto::source::{RoundSent, Source, SourceAction, SourceConfig, SourceEvent, SourceOutcome};
use limosa_proto::time::Instant;
use limosa_proto::wire::frame::LaneToken;
use limosa_proto::wire::message::{Message, NicDescription, Refusal, VmDescription};
use std::collections::BTreeMap;
use std::time::Duration;

pub(crate) const MS: Duration = Duration::from_millis(1);
const LATENCY: Duration = Duration::from_micros(500);

/// What goes wrong, before a certain step.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) enum Fault {
    /// The network is cut for a while; both sides notice at once.
    Cut,
    /// The network is cut for a while; nobody is told.
    SilentCut,
    /// The lanes stop moving; the control channel lives.
    LanesStall,
    Cancel(Side),
    /// The next thing that the host is asked fails; `true`: it was done all the same.
    HostFails(Side, bool),
    /// The next thing that the host is asked is never answered.
    HostStalls(Side),
    /// The agent dies and comes back a while later; the VMM lives. `true`: what it was writing is durable.
    Crash(Side, bool),
}

enum Item {
    ToSource(SourceEvent),
    ToDestination(DestinationEvent),
    /// A message on connection `.1`.
    Carry(Side, u64, Message),
    /// The end of connection `.1`, as the other side sees it.
    Closed(Side, u64),
    Source(SourceAction),
    Destination(DestinationAction),
    Round {
        round: u32,
        pages: Vec<(u64, u64)>,
        sent: RoundSent,
    },
    Restart(Side),
}

pub(crate) struct World {
    pub(crate) now: Instant,
    queue: BTreeMap<(Instant, u64), Item>,
    seq: u64,
    pub(crate) source: Option<Source>,
    pub(crate) destination: Option<Destination>,
    pub(crate) config: SourceConfig,
    pub(crate) destination_config: DestinationConfig,
    pub(crate) journals: [Vec<JournalRecord>; 2],
    pub(crate) running: [bool; 2],
    memory: Vec<u64>,
    incoming: Option<Vec<u64>>,
    dirty: PageSet,
    tracking: bool,
    pub(crate) writes_per_ms: u64,
    /// Pages among which the guest writes.
    pub(crate) working_set: u64,
    pub(crate) pages_per_ms: u64,
    written: u64,
    rest: u64,
    random: u64,
    connection: u64,
    open: [bool; 2],
    lanes_stalled: bool,
    cut_until: Instant,
    host_free: [Instant; 2],
    fail_next: Option<(Side, bool)>,
    stall_next: Option<Side>,
    pub(crate) fault: Option<(u64, Fault)>,
    /// Further faults, by step.
    pub(crate) more_faults: BTreeMap<u64, Fault>,
    pub(crate) steps: u64,
    /// Where to stop looking, before that step.
    pub(crate) stop_at: Option<u64>,
    pub(crate) refusal: Option<Refusal>,
    pub(crate) outcome: Option<SourceOutcome>,
    pub(crate) arrival: Option<DestinationOutcome>,
    pub(crate) log: Vec<String>,
    resumed_there: bool,
    discarded: bool,
}

fn index(side: Side) -> usize {
    usize::from(side == Side::Destination)
}

fn other(side: Side) -> Side {
    if side == Side::Source { Side::Destination } else { Side::Source }
}

pub(crate) fn map() -> MemoryMap {
    let region = |gpa, pages: u64| Region { gpa: Gpa(gpa), bytes: pages * 4096, page_bytes: 4096 };
    MemoryMap::new(vec![region(0, 100), region(1 << 32, 3000)]).unwrap()
}

pub(crate) fn vm() -> VmDescription {
    VmDescription {
        id: VmId([5; 16]),
        name: "guest".to_owned(),
        vcpus: 2,
        memory: map(),
        nics: vec![NicDescription {
            mac: [2, 0, 0, 0, 0, 1],
            network: "lan".to_owned(),
            mtu: 1500,
            vlan: None,
            addresses: vec!["10.0.0.7".parse().unwrap(), "fd00::7".parse().unwrap()],
        }],
        disks: vec![],
        vmm: "limosa".to_owned(),
        records: vec![(1, 1), (2, 1)],
        config: b"vcpus = 2".to_vec(),
    }
}

impl World {
    pub(crate) fn new() -> World {
        let (migration, generation) = (MigrationId([7; 16]), Generation(1));
        let mut config = SourceConfig::new(migration, generation, HostId([2; 32]), vm());
        config.policy.downtime_target = Duration::from_millis(10);
        let destination_config = DestinationConfig::new(migration, generation, HostId([1; 32]), LaneToken([9; 32]));
        let numbers = usize::try_from(map().numbers()).unwrap();
        let mut world = World {
            now: Instant::ZERO,
            queue: BTreeMap::new(),
            seq: 0,
            source: None,
            destination: None,
            config,
            destination_config,
            journals: [Vec::new(), Vec::new()],
            running: [true, false],
            memory: (0..numbers as u64).collect(),
            incoming: None,
            dirty: PageSet::empty(&map()),
            tracking: false,
            writes_per_ms: 20,
            working_set: 300,
            pages_per_ms: 50,
            written: 0,
            rest: 0,
            random: 0x9E37_79B9_7F4A_7C15,
            connection: 0,
            open: [false; 2],
            lanes_stalled: false,
            cut_until: Instant::ZERO,
            host_free: [Instant::ZERO; 2],
            fail_next: None,
            stall_next: None,
            fault: None,
            more_faults: BTreeMap::new(),
            steps: 0,
            stop_at: None,
            refusal: None,
            outcome: None,
            arrival: None,
            log: Vec::new(),
            resumed_there: false,
            discarded: false,
        };
        world.connect();
        world
    }

    /// Begins a migration between the hosts as they are now; the guest must run at the source.
    pub(crate) fn begin(&mut self) {
        assert_eq!(self.running, [true, false]);
        let generation = commit::next_generation(&self.journals.concat(), vm().id);
        (self.config.generation, self.destination_config.generation) = (generation, generation);
        (self.outcome, self.arrival, self.incoming) = (None, None, None);
        (self.resumed_there, self.discarded, self.lanes_stalled) = (false, false, false);
        (self.fail_next, self.stall_next, self.fault) = (None, None, None);
        self.more_faults.clear();
        self.queue.clear();
        self.host_free = [self.now; 2];
        self.connect();
        self.source = Some(Source::new(self.now, self.config.clone()).unwrap());
        self.destination = Some(Destination::new(self.now, self.destination_config.clone()).unwrap());
    }

    fn connect(&mut self) {
        self.connection += 1;
        self.open = [true; 2];
    }

    fn at(&mut self, time: Instant, item: Item) {
        self.seq += 1;
        self.queue.insert((time, self.seq), item);
    }

    fn after(&mut self, wait: Duration, item: Item) {
        self.at(self.now.after(wait), item);
    }

    fn is_over(&self) -> bool {
        let source = self.outcome.is_some() && self.source.as_ref().is_none_or(Source::is_done);
        let destination = self.destination.as_ref().is_none_or(Destination::is_done);
        source && destination && !self.queue.values().any(|item| matches!(item, Item::Restart(_)))
    }

    /// Runs until both sides are done; fails when that takes too long.
    pub(crate) fn run(&mut self) {
        self.drain();
        let bound = self.now.after(Duration::from_secs(600));
        while !self.is_over() && self.stop_at.is_none_or(|stop| self.steps < stop) {
            let next = self.queue.keys().next().map(|(time, _)| *time);
            let timers =
                [self.source.as_ref().and_then(Source::timeout), self.destination.as_ref().and_then(Destination::timeout)];
            let Some(time) = timers.into_iter().flatten().chain(next).min() else { panic!("nothing will ever happen: {self:?}") };
            assert!(time < bound, "it takes for ever: {self:?}");
            self.pass(time);
            if let Some((step, fault)) = self.fault
                && step == self.steps
            {
                self.fault = None;
                self.inject(fault);
            }
            if let Some(fault) = self.more_faults.remove(&self.steps) {
                self.inject(fault);
            }
            self.steps += 1;
            if next == Some(time) {
                let (_, item) = self.queue.pop_first().unwrap();
                self.perform(item);
            } else {
                self.tell_source(SourceEvent::Timer);
                self.tell_destination(DestinationEvent::Timer);
            }
            self.drain();
            assert!(self.running != [true, true], "the guest runs twice: {self:?}");
        }
    }

    /// Lets every cut heal.
    pub(crate) fn pass_quietly(&mut self) {
        self.pass(self.now.after(Duration::from_secs(60)));
    }

    /// Time passes and the guest writes.
    fn pass(&mut self, time: Instant) {
        let time = time.max(self.now);
        let ns = u64::try_from(time.since(self.now).as_nanos()).unwrap();
        self.now = time;
        if !self.running[0] {
            return;
        }
        self.rest += ns.min(1_000_000_000) * self.writes_per_ms;
        let writes = self.rest / 1_000_000;
        self.rest %= 1_000_000;
        for _ in 0..writes {
            self.random ^= self.random << 13;
            self.random ^= self.random >> 7;
            self.random ^= self.random << 17;
            // The working set lies in the second region, which begins at 128.
            self.write(128 + self.random % self.working_set);
        }
    }

    fn write(&mut self, page: u64) {
        self.written += 1;
        self.memory[usize::try_from(page).unwrap()] = 1_000_000 + self.written;
        if self.tracking {
            self.dirty.insert(PageRange { first: page, count: 1 });
        }
    }

    fn tell_source(&mut self, event: SourceEvent) {
        if let Some(source) = &mut self.source {
            source.handle(self.now, event);
        }
    }

    fn tell_destination(&mut self, event: DestinationEvent) {
        if let Some(destination) = &mut self.destination {
            destination.handle(self.now, event);
        }
    }

    fn tell_lost(&mut self, side: Side, words: &str) {
        match side {
            Side::Source => self.tell_source(SourceEvent::LinkLost(words.to_owned())),
            Side::Destination => self.tell_destination(DestinationEvent::LinkLost(words.to_owned())),
        }
    }

    fn inject(&mut self, fault: Fault) {
        self.log.push(format!("{:?} fault {fault:?}", self.now));
        match fault {
            Fault::Cut | Fault::SilentCut => {
                self.connection += 1;
                self.open = [false; 2];
                self.lanes_stalled = true;
                self.cut_until = self.now.after(Duration::from_secs(15));
                if fault == Fault::Cut {
                    self.tell_lost(Side::Source, "cut");
                    self.tell_lost(Side::Destination, "cut");
                }
            }
            Fault::LanesStall => self.lanes_stalled = true,
            Fault::Cancel(Side::Source) => self.tell_source(SourceEvent::Cancel("cancelled".to_owned())),
            Fault::Cancel(Side::Destination) => self.tell_destination(DestinationEvent::Cancel("cancelled".to_owned())),
            Fault::HostFails(side, done) => self.fail_next = Some((side, done)),
            Fault::HostStalls(side) => self.stall_next = Some(side),
            Fault::Crash(side, durable) => self.crash(side, durable),
        }
        self.drain();
    }

    fn crash(&mut self, side: Side, durable: bool) {
        let living =
            if side == Side::Source { self.outcome.is_none() } else { self.destination.as_ref().is_some_and(|d| !d.is_done()) };
        if !living {
            return;
        }
        let record = self.queue.values().find_map(|item| match item {
            Item::Source(SourceAction::Journal(record)) if side == Side::Source => Some(record.clone()),
            Item::Destination(DestinationAction::Journal(record)) if side == Side::Destination => Some(record.clone()),
            _ => None,
        });
        self.journals[index(side)].extend(record.filter(|_| durable));
        self.queue.retain(|_, item| match item {
            Item::ToSource(_) | Item::Source(..) => side != Side::Source,
            Item::ToDestination(_) | Item::Destination(..) => side != Side::Destination,
            Item::Round { .. } => false,
            _ => true,
        });
        match side {
            Side::Source => self.source = None,
            Side::Destination => self.destination = None,
        }
        let connection = self.connection;
        self.after(LATENCY, Item::Closed(other(side), connection));
        self.open = [false; 2];
        self.after(Duration::from_secs(5), Item::Restart(side));
    }

    /// What an agent does when it comes back: asks its journal.
    fn restart(&mut self, side: Side) {
        let (migration, generation) = (self.config.migration, self.config.generation);
        let journal = &self.journals[index(side)];
        match side {
            Side::Source => match commit::source_verdict(journal, migration, generation) {
                SourceVerdict::NoRecord | SourceVerdict::GuestIsOurs => {
                    self.start_here();
                    let code = limosa_proto::wire::code::Code::Shutdown;
                    let words = "restarted".to_owned();
                    self.outcome = Some(SourceOutcome::Aborted { code, words, by: Side::Source, guest_runs: true });
                }
                SourceVerdict::Gone => self.outcome = Some(SourceOutcome::Committed),
                SourceVerdict::AskDestination => self.source = Some(Source::in_doubt(self.now, self.config.clone()).unwrap()),
            },
            Side::Destination => {
                let verdict = commit::destination_verdict(journal, migration, generation);
                let mut record = |kind| {
                    let vm = vm().id;
                    let peer = HostId([1; 32]);
                    self.journals[1].push(JournalRecord { kind, migration, generation, vm, peer, words: String::new() });
                };
                match (verdict, self.running[1]) {
                    (DestinationVerdict::Undecided, true) => record(JournalRecordKind::Running),
                    (DestinationVerdict::Undecided, false) => {
                        record(JournalRecordKind::Discarded);
                        self.discarded = true;
                        self.incoming = None;
                    }
                    _ => {}
                }
            }
        }
    }

    fn start_here(&mut self) {
        assert!(!self.resumed_there, "given back after it ran there: {self:?}");
        self.running[0] = true;
    }

    fn drain(&mut self) {
        loop {
            let source = self.source.as_mut().and_then(Source::poll);
            let destination = self.destination.as_mut().and_then(Destination::poll);
            if source.is_none() && destination.is_none() {
                return;
            }
            if let Some(action) = source {
                self.log.push(format!("{:?} source {action:?}", self.now));
                assert!(self.outcome.is_none(), "something after Done: {self:?}");
                self.start_source(action);
            }
            if let Some(action) = destination {
                self.log.push(format!("{:?} destination {action:?}", self.now));
                assert!(self.arrival.is_none(), "something after Done: {self:?}");
                self.start_destination(action);
            }
        }
    }

    fn send(&mut self, from: Side, message: Message) {
        // Through bytes, as on a wire.
        let body = message.emit().unwrap();
        let message = Message::parse(message.kind(), &body).unwrap();
        if self.open[index(from)] {
            let connection = self.connection;
            self.after(LATENCY, Item::Carry(other(from), connection, message));
        }
    }

    fn close(&mut self, from: Side) {
        if self.open[index(from)] {
            self.open[index(from)] = false;
            let connection = self.connection;
            self.after(LATENCY, Item::Closed(other(from), connection));
        }
    }

    /// Whether the host never answers what it is asked next.
    fn stalls(&mut self, side: Side) -> bool {
        let stalls = self.stall_next == Some(side);
        if stalls {
            self.stall_next = None;
        }
        stalls
    }

    fn host_time(&mut self, side: Side) -> Instant {
        let free = self.host_free[index(side)].max(self.now).after(MS);
        self.host_free[index(side)] = free;
        free
    }

    fn start_source(&mut self, action: SourceAction) {
        match action {
            SourceAction::Send(message) => self.send(Side::Source, message),
            SourceAction::CloseLink => self.close(Side::Source),
            SourceAction::Done(outcome) => self.outcome = Some(outcome),
            SourceAction::OpenLanes { token, .. } => {
                assert_eq!(token, LaneToken([9; 32]));
                self.after(LATENCY * 2, Item::ToDestination(DestinationEvent::LanesJoined));
                self.after(LATENCY * 3, Item::ToSource(SourceEvent::LanesOpen));
            }
            SourceAction::SendPages { round, pages, .. } => self.start_round(round, &pages),
            SourceAction::Settle { released } => self.settle(released),
            action => {
                if self.stalls(Side::Source) {
                    return;
                }
                let time = self.host_time(Side::Source);
                self.at(time, Item::Source(action));
            }
        }
    }

    fn start_round(&mut self, round: u32, pages: &PageSet) {
        if self.lanes_stalled {
            return;
        }
        // The values as they are at the round's begin: the stalest that lanes could send.
        let values: Vec<(u64, u64)> = pages
            .runs()
            .flat_map(|run| run.first..run.end())
            .map(|page| (page, self.memory[usize::try_from(page).unwrap()]))
            .collect();
        let count = values.len() as u64;
        let sent = RoundSent { round, pages: count, zero_pages: 0, bytes_on_wire: count * 4096 };
        let took = Duration::from_nanos(count * 1_000_000 / self.pages_per_ms);
        self.after(took, Item::ToSource(SourceEvent::PagesSent(sent)));
        self.after(took + LATENCY, Item::Round { round, pages: values, sent });
    }

    fn settle(&mut self, released: bool) {
        if self.now < self.cut_until {
            self.after(LATENCY, Item::ToSource(SourceEvent::LinkLost("no route".to_owned())));
            return;
        }
        let restarting = self.queue.values().any(|item| matches!(item, Item::Restart(Side::Destination)));
        if restarting {
            self.after(LATENCY, Item::ToSource(SourceEvent::LinkLost("connection refused".to_owned())));
        } else if self.destination.as_ref().is_some_and(|destination| !destination.is_done()) {
            self.connect();
            self.send(Side::Source, Message::VerdictAsk { released });
        } else {
            let answer = commit::answer(&self.journals[1], self.config.migration, self.config.generation);
            self.after(LATENCY * 2, Item::ToSource(SourceEvent::Verdict(answer)));
        }
    }

    fn start_destination(&mut self, action: DestinationAction) {
        match action {
            DestinationAction::Send(message) => self.send(Side::Destination, message),
            DestinationAction::CloseLink => self.close(Side::Destination),
            DestinationAction::Done(outcome) => self.arrival = Some(outcome),
            DestinationAction::AcceptLanes { .. } => {}
            action => {
                if let DestinationAction::Journal(record) = &action
                    && record.kind == JournalRecordKind::Discarded
                {
                    assert!(!self.resumed_there, "discarded after it was resumed: {self:?}");
                    self.discarded = true;
                }
                if self.stalls(Side::Destination) {
                    return;
                }
                let time = self.host_time(Side::Destination);
                self.at(time, Item::Destination(action));
            }
        }
    }

    fn perform(&mut self, item: Item) {
        match item {
            Item::ToSource(event) => self.tell_source(event),
            Item::ToDestination(event) => self.tell_destination(event),
            Item::Carry(to, connection, message) => {
                if connection == self.connection {
                    match to {
                        Side::Source => self.tell_source(SourceEvent::Message(message)),
                        Side::Destination => self.tell_destination(DestinationEvent::Message(message)),
                    }
                }
            }
            Item::Closed(side, connection) => {
                if connection == self.connection && self.open[index(side)] {
                    self.open[index(side)] = false;
                    self.tell_lost(side, "closed by the other side");
                }
            }
            Item::Source(action) => self.do_source(action),
            Item::Destination(action) => self.do_destination(action),
            Item::Round { round, pages, sent } => {
                if self.lanes_stalled {
                    return;
                }
                if let Some(incoming) = &mut self.incoming {
                    for (page, value) in pages {
                        incoming[usize::try_from(page).unwrap()] = value;
                    }
                }
                let RoundSent { pages, zero_pages, bytes_on_wire: bytes, .. } = sent;
                self.tell_destination(DestinationEvent::RoundArrived { round, pages, zero_pages, bytes });
            }
            Item::Restart(side) => self.restart(side),
        }
    }

    fn fails(&mut self, side: Side) -> Option<bool> {
        let (failing, done) = self.fail_next?;
        (failing == side).then(|| {
            self.fail_next = None;
            done
        })
    }

    fn do_source(&mut self, action: SourceAction) {
        let failed = self.fails(Side::Source);
        if failed != Some(false) || matches!(action, SourceAction::Release | SourceAction::StopTracking) {
            self.effect_source(&action);
        }
        let task = match &action {
            SourceAction::StartTracking | SourceAction::StopTracking => HostTask::Tracking,
            SourceAction::FetchDirty => HostTask::FetchDirty,
            SourceAction::Pause => HostTask::Pause,
            SourceAction::Save => HostTask::Save,
            SourceAction::Journal(record) => HostTask::Journal(record.kind),
            SourceAction::Resume => HostTask::Resume,
            _ => HostTask::Release,
        };
        if failed.is_some() {
            self.tell_source(SourceEvent::HostFailed { task, words: "no".to_owned() });
            return;
        }
        match action {
            SourceAction::StartTracking => self.tell_source(SourceEvent::TrackingStarted),
            SourceAction::FetchDirty => {
                let dirty = self.dirty.take();
                self.tell_source(SourceEvent::Dirty(dirty));
            }
            SourceAction::Pause => self.tell_source(SourceEvent::Paused),
            SourceAction::Save => {
                // Saving a device writes guest memory.
                self.write(3);
                let record = Record { kind: 1, version: 1, instance: 0, bytes: vec![1, 2, 3] };
                self.tell_source(SourceEvent::Saved(vec![record.clone(), record]));
            }
            SourceAction::Journal(record) => self.tell_source(SourceEvent::Journaled(record.kind)),
            SourceAction::Resume => self.tell_source(SourceEvent::Resumed),
            _ => {}
        }
    }

    fn effect_source(&mut self, action: &SourceAction) {
        match action {
            SourceAction::StartTracking => {
                self.tracking = true;
                self.dirty = PageSet::empty(&map());
            }
            SourceAction::StopTracking => self.tracking = false,
            SourceAction::Pause => self.running[0] = false,
            SourceAction::Journal(record) => self.journals[0].push(record.clone()),
            SourceAction::Resume => self.start_here(),
            SourceAction::Release => assert!(!self.running[0], "released while it runs: {self:?}"),
            _ => {}
        }
    }

    fn do_destination(&mut self, action: DestinationAction) {
        let failed = self.fails(Side::Destination);
        if failed != Some(false) || action == DestinationAction::Discard {
            self.effect_destination(&action);
        }
        let task = match &action {
            DestinationAction::Check(_) => HostTask::Check,
            DestinationAction::Prepare { .. } => HostTask::Prepare,
            DestinationAction::Load(_) => HostTask::Load,
            DestinationAction::Journal(record) => HostTask::Journal(record.kind),
            DestinationAction::Resume => HostTask::Resume,
            DestinationAction::Announce => HostTask::Announce,
            _ => HostTask::Discard,
        };
        if failed.is_some() {
            self.tell_destination(DestinationEvent::HostFailed { task, words: "no".to_owned() });
            return;
        }
        self.tell_destination(match action {
            DestinationAction::Check(described) => {
                assert_eq!(*described, vm());
                self.refusal.clone().map_or(DestinationEvent::Admitted, DestinationEvent::Refuse)
            }
            DestinationAction::Prepare { .. } => DestinationEvent::Prepared { populated_ms: 1 },
            DestinationAction::Load(records) => {
                assert_eq!(records.len(), 2);
                DestinationEvent::Loaded
            }
            DestinationAction::Journal(record) => DestinationEvent::Journaled(record.kind),
            DestinationAction::Resume => DestinationEvent::Resumed,
            DestinationAction::Announce => {
                DestinationEvent::Announced { announcements: vec!["arp on lan".to_owned()], cpu_us: 5 }
            }
            _ => return,
        });
    }

    fn effect_destination(&mut self, action: &DestinationAction) {
        match action {
            DestinationAction::Prepare { .. } => self.incoming = Some(vec![0; self.memory.len()]),
            DestinationAction::Journal(record) => self.journals[1].push(record.clone()),
            DestinationAction::Resume => {
                assert!(!self.discarded, "resumed after it was discarded: {self:?}");
                assert!(!self.running[0], "resumed while it runs at the source: {self:?}");
                let incoming = self.incoming.as_ref().unwrap();
                for region in 0..map().regions().len() {
                    let range = map().region_range(region).unwrap();
                    for page in range.first..range.end() {
                        let page_index = usize::try_from(page).unwrap();
                        assert_eq!(incoming[page_index], self.memory[page_index], "page {page} differs: {self:?}");
                    }
                }
                self.running[1] = true;
                self.resumed_there = true;
            }
            DestinationAction::Announce => assert!(self.running[1], "announced before it ran: {self:?}"),
            DestinationAction::Discard => {
                assert!(!self.resumed_there, "thrown away while it runs: {self:?}");
                self.incoming = None;
            }
            _ => {}
        }
    }
}

impl std::fmt::Debug for World {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        writeln!(f, "at {:?}, running {:?}, source {:?}, destination {:?}", self.now, self.running, self.outcome, self.arrival)?;
        let states = (self.source.as_ref().map(Source::state), self.destination.as_ref().map(Destination::state));
        writeln!(f, "states {states:?}")?;
        let from = self.log.len().saturating_sub(60);
        self.log[from..].iter().try_for_each(|line| writeln!(f, "  {line}"))
    }
}
