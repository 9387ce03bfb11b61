//! One seed is one world: two or three hosts, their agents, the guest, the network, an operator, and what goes wrong. Time
//! jumps from event to event. What an agent does with its engines is in `agent`, after a restart in `recover`.

use crate::checker::{End, Mutant};
use crate::disk::{Death, SimDisk};
use crate::faults::{At, Fault, POINTS, Planned, Point, Random, Step, Way, plan};
use crate::guest::Guest;
use crate::link::{End as ConnectionEnd, Key, Net, Owner};
use limosa_proto::commit::JournalRecord;
use limosa_proto::destination::Destination;
use limosa_proto::event::{
    DestinationAction, DestinationEvent, DestinationOutcome, Side, SourceAction, SourceEvent, SourceOutcome,
};
use limosa_proto::identity::{Generation, HostId};
use limosa_proto::journal::Journal;
use limosa_proto::recovery::Ended;
use limosa_proto::source::Source;
use limosa_proto::time::Instant;
use limosa_proto::wire::frame::LaneToken;
use limosa_proto::wire::message::{Message, ReleasedAnswer, VerdictAnswer};
use std::collections::{BTreeMap, VecDeque};
use std::time::Duration;

/// The engines' clocks begin here, so that they can jump back.
const BEGIN: Instant = Instant(1_000_000_000_000_000);
/// Faults and new migrations for so long at most; then everything heals.
const ACTIVE_MAX: Duration = Duration::from_secs(240);
/// How long it may take until all is settled after that.
const SETTLE_MAX: Duration = Duration::from_secs(900);
/// How long the migration after the faults may take.
const LAST_MAX: Duration = Duration::from_secs(120);
const STEPS_MAX: u64 = 400_000;

/// What is going to happen.
#[derive(Debug, Clone)]
pub(crate) enum Item {
    Deliver {
        connection: usize,
        to: usize,
        message: Message,
    },
    Closed {
        connection: usize,
        to: usize,
    },
    /// A migration's connection is there, or not.
    Connected {
        host: usize,
        incarnation: u64,
        begun: Begun,
    },
    /// The first operation of a session is carried out.
    Operation {
        host: usize,
        incarnation: u64,
        session: u64,
    },
    /// Pages are read at the source by a lane.
    LaneRead {
        lanes: usize,
        lane: usize,
        round: u32,
        pages: Vec<usize>,
        barrier: bool,
    },
    /// They, or a barrier, arrive.
    LaneWrite {
        lanes: usize,
        lane: usize,
        round: u32,
        values: Vec<(usize, u64)>,
        barrier: bool,
    },
    /// A lane's failure has waited long enough.
    LaneFailed {
        host: usize,
        incarnation: u64,
        session: u64,
    },
    /// Something for a session's engine.
    Tell {
        host: usize,
        incarnation: u64,
        session: u64,
        event: Told,
    },
    /// No verdict came on this connection.
    VerdictLate {
        host: usize,
        incarnation: u64,
        owner: Owner,
    },
    AgentStarts {
        host: usize,
    },
    PlugIn {
        vmm: usize,
        host: usize,
        incarnation: u64,
    },
    Ask {
        host: usize,
        incarnation: u64,
        ask: u64,
    },
    Wait {
        host: usize,
        incarnation: u64,
        wait: u64,
    },
    AskSource {
        host: usize,
        incarnation: u64,
        wait: u64,
    },
    Retry {
        host: usize,
        incarnation: u64,
        owed: Owed,
    },
    Operator,
    /// Time passes.
    Nothing,
}

/// A migration that waits for its connection.
#[derive(Debug, Clone)]
pub(crate) struct Begun {
    pub(crate) key: Key,
    pub(crate) to: usize,
    pub(crate) course: limosa_proto::event::Course,
    pub(crate) target: u64,
}

#[derive(Debug, Clone)]
pub(crate) enum Told {
    Source(SourceEvent),
    Destination(DestinationEvent),
}

/// What a host is asked by a migration.
#[derive(Debug, Clone)]
pub(crate) enum Operation {
    Source(SourceAction),
    Destination(DestinationAction),
}

pub(crate) enum Engine {
    Source(Box<Source>),
    Destination(Box<Destination>),
}

#[derive(Debug, Clone)]
pub(crate) enum Outcome {
    Source(SourceOutcome),
    Destination(DestinationOutcome),
}

/// A migration at one of its hosts.
pub(crate) struct Session {
    pub(crate) key: Key,
    pub(crate) peer: usize,
    pub(crate) engine: Engine,
    pub(crate) connection: Option<(usize, usize)>,
    pub(crate) lanes: Option<usize>,
    pub(crate) gate: Option<LaneToken>,
    pub(crate) vmm: Option<usize>,
    pub(crate) launched: bool,
    pub(crate) operations: VecDeque<Operation>,
    pub(crate) outcome: Option<Outcome>,
    pub(crate) asked: u32,
    /// How the next operation goes wrong: it hangs first or not, and is done or not.
    pub(crate) fate: Option<(bool, bool)>,
}

impl Session {
    pub(crate) fn side(&self) -> Side {
        if matches!(self.engine, Engine::Source(_)) { Side::Source } else { Side::Destination }
    }

    pub(crate) fn warnings(&self) -> usize {
        match &self.engine {
            Engine::Source(source) => source.progress().warnings.len(),
            Engine::Destination(destination) => destination.warnings().len(),
        }
    }

    fn timeout(&self) -> Option<Instant> {
        match &self.engine {
            Engine::Source(source) => source.timeout(),
            Engine::Destination(destination) => destination.timeout(),
        }
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum EntryState {
    Running,
    Paused,
    Held,
    Incoming,
}

/// The guest in an agent's table.
#[derive(Debug, Clone)]
pub(crate) struct Entry {
    pub(crate) plugged: Option<usize>,
    pub(crate) process: Option<usize>,
    pub(crate) state: EntryState,
    pub(crate) claim: Option<u64>,
    /// Whether its VMM was told to run it, or came back so.
    pub(crate) may_have_run: bool,
}

impl Entry {
    pub(crate) fn is_held(&self) -> bool {
        self.state == EntryState::Held
    }
}

/// A question that a restarted agent asks until it is answered.
pub(crate) struct Asking {
    pub(crate) record: JournalRecord,
    pub(crate) wait: Duration,
    pub(crate) asked: u32,
}

/// A guest that was ready and waits for the source's word.
pub(crate) struct Waiting {
    pub(crate) record: JournalRecord,
    pub(crate) until: Instant,
    /// Whether this very agent gave it up and could not write so.
    pub(crate) again: bool,
    /// How long until the source is asked again, how often it was, and what it last said.
    pub(crate) interval: Duration,
    pub(crate) asked: u32,
    pub(crate) said: Option<ReleasedAnswer>,
}

/// Something that an agent does not give up: tried until it is done.
#[derive(Debug, Clone, PartialEq)]
pub(crate) enum Owed {
    /// A record.
    Record(Key, Ended),
    /// The guest is this host's and could not be resumed.
    TakeUp,
}

pub(crate) struct Agent {
    pub(crate) incarnation: u64,
    pub(crate) journal: Journal<SimDisk>,
    pub(crate) entry: Option<Entry>,
    pub(crate) sessions: BTreeMap<u64, Session>,
    pub(crate) asks: BTreeMap<u64, Asking>,
    pub(crate) waits: BTreeMap<u64, Waiting>,
    pub(crate) owed: Vec<Owed>,
    pub(crate) started: Instant,
}

pub(crate) struct Host {
    pub(crate) up: bool,
    pub(crate) agent: Option<Agent>,
    pub(crate) disk: SimDisk,
    /// The incoming VMM's process as noted for a restarted agent.
    pub(crate) process_file: Option<usize>,
    /// Whether a VMM with a guest that was loaded has died here by a fault.
    pub(crate) lost_loaded: bool,
    frozen_until: Instant,
    clock_ns: i64,
}

/// What came of a seed.
#[derive(Debug, Clone)]
pub(crate) struct Report {
    pub(crate) failure: Option<String>,
    pub(crate) end: Option<End>,
    pub(crate) outcomes: BTreeMap<&'static str, u64>,
    pub(crate) migrations: u64,
    pub(crate) reached: Vec<u64>,
    pub(crate) struck: Vec<u64>,
    pub(crate) trace: Vec<String>,
}

pub(crate) struct World {
    pub(crate) now: Instant,
    pub(crate) queue: BTreeMap<(Instant, u64), Item>,
    pub(crate) serial: u64,
    pub(crate) random: Random,
    pub(crate) hosts: Vec<Host>,
    pub(crate) guest: Guest,
    pub(crate) net: Net,
    pub(crate) mutant: Option<Mutant>,
    pub(crate) pages_per_ms: u64,
    /// The guest may be gone, or nobody may be able to say where it is: the faults took it.
    pub(crate) may_be_none: bool,
    pub(crate) may_be_in_doubt: bool,
    /// What a host has promised never to release.
    pub(crate) never: Vec<(usize, Key)>,
    pub(crate) quiet: bool,
    healed_at: Instant,
    pub(crate) report: Report,
    plan: Vec<Planned>,
    strikes: Vec<(Fault, usize, usize)>,
    wanted: u64,
    pub(crate) traced: bool,
}

pub(crate) fn host_id(host: usize) -> HostId {
    HostId([u8::try_from(host).unwrap() + 1; 32])
}

impl World {
    pub(crate) fn new(seed: u64, mutant: Option<Mutant>, traced: bool) -> World {
        let mut random = Random::new(seed);
        let count = if random.percent(40) { 3 } else { 2 };
        let plan = plan(&mut random);
        let has_disk = random.percent(30);
        let writes_per_ms = random.of(&[0, 2, 20]);
        let host = |random: &mut Random| Host {
            up: true,
            agent: None,
            disk: SimDisk::new(Random::new(random.next()), mutant),
            process_file: None,
            lost_loaded: false,
            frozen_until: Instant::ZERO,
            clock_ns: 0,
        };
        let mut hosts: Vec<Host> = (0..count).map(|_| host(&mut random)).collect();
        // The first VMM of all.
        hosts[0].process_file = Some(0);
        let net = Net::new(Random::new(random.next()));
        let report = Report {
            failure: None,
            end: None,
            outcomes: BTreeMap::new(),
            migrations: 0,
            reached: vec![0; POINTS],
            struck: vec![0; POINTS],
            trace: Vec::new(),
        };
        let mut world = World {
            now: BEGIN,
            queue: BTreeMap::new(),
            serial: 0,
            pages_per_ms: random.of(&[20, 100, 400]),
            wanted: 1 + random.of(&[0, 1, 2, 2, 5]),
            random,
            hosts,
            guest: Guest::new(has_disk, writes_per_ms),
            net,
            mutant,
            may_be_none: false,
            may_be_in_doubt: false,
            never: Vec::new(),
            quiet: false,
            healed_at: BEGIN,
            report,
            plan,
            strikes: Vec::new(),
            traced,
        };
        for planned in world.plan.clone() {
            world.log(|| format!("plan: {} (time {}): {:?}", planned.point, planned.nth, planned.fault));
        }
        (0..count).for_each(|host| world.start_agent(host));
        world.after(Duration::from_secs(2), Item::Operator);
        world
    }

    /// Runs it to its end.
    pub(crate) fn run(mut self) -> Report {
        let until = self.now.after(ACTIVE_MAX);
        let busy = |world: &World| world.wanted > 0 || !world.is_at_rest();
        self.go_on(until, busy);
        self.heal();
        let until = self.now.after(SETTLE_MAX);
        self.go_on(until, |world| !world.is_at_rest());
        // What is on its way arrives, and who has not noticed yet does.
        let soon = self.now.after(Duration::from_secs(15));
        self.after(Duration::from_secs(15), Item::Nothing);
        self.go_on(soon, |_| true);
        self.go_on(until, |world| !world.is_at_rest());
        if self.report.failure.is_none() && !self.is_at_rest() {
            let words = self.what_is_open();
            self.fail(format!("time is not bounded: {} s after all was healed there is still {words}", SETTLE_MAX.as_secs()));
        }
        if self.report.failure.is_none() {
            let end = self.check_at_rest();
            self.report.end = Some(end);
            if end == End::Whole && self.report.failure.is_none() {
                self.migrate_once_more();
            }
        }
        self.report
    }

    /// The migration after the faults, to the same or to another host: it must be whole.
    fn migrate_once_more(&mut self) {
        let committed = |world: &World| world.report.outcomes.get("committed").copied().unwrap_or(0);
        let before = committed(self);
        let Some(from) = self.idle_owner() else { return self.fail("the guest's agent does not let it migrate".to_owned()) };
        self.begin(from, None);
        let until = self.now.after(LAST_MAX);
        self.go_on(until, |world| !world.is_idle());
        if self.report.failure.is_none() && committed(self) != before + 1 {
            let outcomes = self.report.outcomes.clone();
            self.fail(format!("the migration after the faults did not succeed: {outcomes:?}"));
        }
        if self.report.failure.is_none() && self.check_at_rest() != End::Whole {
            self.fail("the guest is not whole after the migration after the faults".to_owned());
        }
    }

    fn go_on(&mut self, until: Instant, wanted: impl Fn(&World) -> bool) {
        let mut steps = 0;
        while self.report.failure.is_none() && wanted(self) {
            let next = self.queue.keys().next().map(|(time, _)| *time);
            let timer = self.next_timer();
            let Some(time) = [next, timer].into_iter().flatten().min().filter(|time| *time <= until) else { return };
            steps += 1;
            if steps > STEPS_MAX {
                return self.fail(format!("time is not bounded: {STEPS_MAX} steps"));
            }
            self.guest.pass(u64::try_from(time.max(self.now).since(self.now).as_nanos()).unwrap());
            self.now = time.max(self.now);
            if next == Some(time) {
                let (_, item) = self.queue.pop_first().unwrap();
                self.perform(item);
            } else {
                self.ring_timers();
            }
            self.drain();
            self.strike_all();
            self.check_always();
        }
    }

    pub(crate) fn fail(&mut self, words: String) {
        self.log(|| format!("WRONG: {words}"));
        self.report.failure.get_or_insert(words);
    }

    pub(crate) fn log(&mut self, line: impl FnOnce() -> String) {
        if self.traced {
            let ms = self.now.since(BEGIN).as_secs_f64() * 1e3;
            self.report.trace.push(format!("{ms:12.3} ms  {}", line()));
        }
    }

    pub(crate) fn at(&mut self, time: Instant, item: Item) {
        self.serial += 1;
        self.queue.insert((time, self.serial), item);
    }

    pub(crate) fn after(&mut self, wait: Duration, item: Item) {
        self.at(self.now.after(wait), item);
    }

    /// The time as this host's agent sees it.
    pub(crate) fn local(&self, host: usize) -> Instant {
        Instant(self.now.0.saturating_add_signed(self.hosts[host].clock_ns))
    }

    pub(crate) fn index_of(&self, id: HostId) -> usize {
        usize::from(id.0[0]) - 1
    }

    pub(crate) fn agent(&mut self, host: usize, incarnation: u64) -> Option<&mut Agent> {
        self.hosts[host].agent.as_mut().filter(|agent| agent.incarnation == incarnation)
    }

    pub(crate) fn incarnation(&self, host: usize) -> Option<u64> {
        self.hosts[host].agent.as_ref().map(|agent| agent.incarnation)
    }

    pub(crate) fn session(&mut self, host: usize, session: u64) -> Option<&mut Session> {
        self.hosts[host].agent.as_mut().and_then(|agent| agent.sessions.get_mut(&session))
    }

    fn next_timer(&self) -> Option<Instant> {
        let of_host = |host: &Host| {
            let timeouts = host.agent.iter().flat_map(|agent| agent.sessions.values().filter_map(Session::timeout));
            let first = timeouts.min()?;
            Some(Instant(first.0.saturating_add_signed(-host.clock_ns)).max(host.frozen_until))
        };
        self.hosts.iter().filter_map(of_host).min().map(|time| time.max(self.now))
    }

    fn ring_timers(&mut self) {
        for host in 0..self.hosts.len() {
            if self.hosts[host].frozen_until > self.now {
                continue;
            }
            let now = self.local(host);
            let Some(agent) = &self.hosts[host].agent else { continue };
            let due = agent.sessions.iter().filter(|(_, session)| session.timeout().is_some_and(|time| time <= now));
            let due: Vec<(u64, Side)> = due.map(|(number, session)| (*number, session.side())).collect();
            for (session, side) in due {
                self.tell(
                    host,
                    session,
                    match side {
                        Side::Source => Told::Source(SourceEvent::Timer),
                        Side::Destination => Told::Destination(DestinationEvent::Timer),
                    },
                );
            }
        }
    }

    /// The host whose agent has to be awake for it.
    fn host_of(&self, item: &Item) -> Option<usize> {
        Some(match item {
            Item::Deliver { connection, to, .. } | Item::Closed { connection, to } => {
                self.net.connections[*connection].ends[*to].host
            }
            Item::Connected { host, .. }
            | Item::Operation { host, .. }
            | Item::LaneFailed { host, .. }
            | Item::Tell { host, .. }
            | Item::VerdictLate { host, .. }
            | Item::PlugIn { host, .. }
            | Item::Ask { host, .. }
            | Item::Wait { host, .. }
            | Item::AskSource { host, .. }
            | Item::Retry { host, .. } => *host,
            Item::LaneRead { lanes, .. } => self.net.lanes[*lanes].source.0,
            Item::LaneWrite { lanes, .. } => self.net.lanes[*lanes].destination.0,
            Item::AgentStarts { .. } | Item::Operator | Item::Nothing => return None,
        })
    }

    fn perform(&mut self, item: Item) {
        if let Some(until) = self.host_of(&item).map(|host| self.hosts[host].frozen_until)
            && until > self.now
        {
            return self.at(until, item);
        }
        match item {
            Item::Deliver { connection, to, message } => self.deliver(connection, to, message),
            Item::Closed { connection, to } => self.closed(connection, to),
            Item::Connected { host, incarnation, begun } => self.connected(host, incarnation, &begun),
            Item::Operation { host, incarnation, session } => self.operate(host, incarnation, session),
            Item::LaneRead { lanes, lane, round, pages, barrier } => self.lane_read(lanes, lane, round, &pages, barrier),
            Item::LaneWrite { lanes, lane, round, values, barrier } => self.lane_write(lanes, lane, round, &values, barrier),
            Item::LaneFailed { host, incarnation, session } => self.lane_failed(host, incarnation, session),
            Item::Tell { host, incarnation, session, event } => {
                if self.incarnation(host) == Some(incarnation) {
                    self.tell(host, session, event);
                }
            }
            Item::VerdictLate { host, incarnation, owner } => self.verdict_came(host, incarnation, owner, None),
            Item::AgentStarts { host } => self.start_agent(host),
            Item::PlugIn { vmm, host, incarnation } => self.plug_in(vmm, host, incarnation),
            Item::Ask { host, incarnation, ask } => self.ask(host, incarnation, ask),
            Item::Wait { host, incarnation, wait } => self.wait_on(host, incarnation, wait),
            Item::AskSource { host, incarnation, wait } => self.ask_source(host, incarnation, wait),
            Item::Retry { host, incarnation, owed } => self.retry(host, incarnation, &owed),
            Item::Operator => self.operator(),
            Item::Nothing => {}
        }
    }

    /// Marks that a point was reached, and strikes what was planned for it.
    pub(crate) fn point(&mut self, step: Step, done: bool, here: usize, there: usize) {
        if self.quiet {
            return;
        }
        let number = Point { step, done }.number();
        self.report.reached[number] += 1;
        let mut struck = Vec::new();
        for planned in &mut self.plan {
            if planned.point.number() == number && planned.nth > 0 {
                planned.nth -= 1;
                if planned.nth == 0 {
                    struck.push(planned.fault);
                }
            }
        }
        for fault in struck {
            self.report.struck[number] += 1;
            self.log(|| format!("FAULT at {} on host {here}: {fault:?}", Point::numbered(number)));
            self.strikes.push((fault, here, there));
        }
    }

    /// Lets everything happen that has struck.
    pub(crate) fn strike_all(&mut self) {
        while let Some((fault, here, there)) = self.strikes.pop() {
            self.strike(fault, here, there);
        }
        for host in 0..self.hosts.len() {
            match self.hosts[host].disk.take_death() {
                Some(Death::Agent) => self.kill_agent(host),
                Some(Death::Host) => self.cut_power(host),
                None => {}
            }
        }
    }

    fn strike(&mut self, fault: Fault, here: usize, there: usize) {
        let host = |at| if at == At::Here { here } else { there };
        match fault {
            Fault::AgentDies(at) => self.kill_agent(host(at)),
            Fault::PowerCut(at) => self.cut_power(host(at)),
            Fault::VmmDies(at) => self.kill_vmms(host(at)),
            Fault::Cut { way, loud, seconds } => self.cut(here, there, way, loud, seconds),
            Fault::HalfOpen(at) => self.forget_connections(host(at)),
            Fault::Lanes { breaks } => self.hurt_lanes(here, there, breaks),
            Fault::HostFails { at, done } => self.doom(host(at), (false, done)),
            Fault::HostHangs { at, done } => self.doom(host(at), (true, done)),
            Fault::Disk(at, misfortune) => self.hosts[host(at)].disk.arm(misfortune),
            Fault::Cancel(at) => self.cancel(host(at), "somebody cancelled it"),
            Fault::Clock { at, seconds } => self.hosts[host(at)].clock_ns += seconds * 1_000_000_000,
            Fault::Freeze { at, seconds } => self.hosts[host(at)].frozen_until = self.now.after(Duration::from_secs(seconds)),
        }
    }

    fn doom(&mut self, host: usize, fate: (bool, bool)) {
        if let Some(agent) = &mut self.hosts[host].agent {
            agent.sessions.values_mut().for_each(|session| session.fate = Some(fate));
        }
    }

    fn cut(&mut self, here: usize, there: usize, way: Way, loud: bool, seconds: u64) {
        let until = self.now.after(Duration::from_secs(seconds));
        if way != Way::ToHere {
            self.net.cut(here, there, until);
        }
        if way != Way::FromHere {
            self.net.cut(there, here, until);
        }
        if !loud {
            return;
        }
        for connection in 0..self.net.connections.len() {
            let hosts = self.net.connections[connection].ends.map(|end| end.host);
            if hosts.contains(&here) && hosts.contains(&there) {
                (0..2).for_each(|to| self.after(Duration::ZERO, Item::Closed { connection, to }));
            }
        }
        self.hurt_lanes(here, there, true);
    }

    fn heal(&mut self) {
        self.log(|| "everything heals".to_owned());
        self.quiet = true;
        self.healed_at = self.now;
        self.plan.clear();
        self.net.heal();
        for host in 0..self.hosts.len() {
            self.hosts[host].frozen_until = Instant::ZERO;
            self.hosts[host].disk.heal();
            if let Some(agent) = &mut self.hosts[host].agent {
                agent.sessions.values_mut().for_each(|session| session.fate = None);
                // Its disk is well again; a journal that is broken needs the agent to be restarted.
                if agent.journal.is_broken() {
                    self.kill_agent(host);
                }
            }
        }
        for lanes in &mut self.net.lanes {
            lanes.moving = true;
        }
    }

    /// Whether everything that can settle by itself had time to.
    pub(crate) fn is_long_healed(&self) -> bool {
        self.quiet && self.now > self.healed_at.after(Duration::from_secs(180))
    }

    fn what_is_open(&self) -> String {
        let of_host = |(number, host): (usize, &Host)| {
            let Some(agent) = &host.agent else { return format!("host {number} has no agent") };
            let state = |session: &Session| match &session.engine {
                Engine::Source(source) => format!("source {}", source.state()),
                Engine::Destination(destination) => format!("destination {}", destination.state()),
            };
            let sessions: Vec<String> = agent.sessions.values().map(state).collect();
            let (asks, waits) = (agent.asks.len(), agent.waits.len());
            format!("host {number}: engines {sessions:?}, {asks} questions, {waits} waits, entry {:?}", agent.entry)
        };
        let hosts: Vec<String> = self.hosts.iter().enumerate().map(of_host).collect();
        let vmm = |vmm: &crate::guest::Vmm| format!("VMM on host {} {:?} at agent {:?}", vmm.host, vmm.state, vmm.agent);
        let vmms: Vec<String> = self.guest.vmms.iter().filter(|vmm| vmm.lives).map(vmm).collect();
        format!("{}; {}", hosts.join("; "), vmms.join("; "))
    }

    /// The operator looks for something to do.
    fn operator(&mut self) {
        if self.quiet || self.wanted == 0 {
            return;
        }
        let wait = self.random.micros(200_000, 6_000_000);
        self.after(wait, Item::Operator);
        let Some(host) = self.idle_owner() else {
            // Nobody may ever have it again.
            if self.may_be_none && self.guest.vmms.iter().all(|vmm| !vmm.lives) {
                self.wanted = 0;
            }
            return;
        };
        if self.random.percent(10) {
            return self.pause_or_resume(host);
        }
        self.wanted -= 1;
        self.begin(host, None);
    }

    /// An end of a connection at a living agent.
    pub(crate) fn end_at(&self, host: usize, incarnation: u64, owner: Owner) -> ConnectionEnd {
        ConnectionEnd { host, incarnation, owner, open: true }
    }

    pub(crate) fn count(&mut self, outcome: &'static str) {
        self.log(|| format!("outcome: {outcome}"));
        *self.report.outcomes.entry(outcome).or_default() += 1;
    }

    /// An answer of a destination, as somebody made it to be understood.
    pub(crate) fn understood(&self, answer: VerdictAnswer) -> VerdictAnswer {
        match (self.mutant, answer) {
            (Some(Mutant::UnknownIsDiscarded), VerdictAnswer::Unknown) => VerdictAnswer::Discarded,
            _ => answer,
        }
    }

    /// The generation of the next attempt.
    pub(crate) fn next_generation(&self, host: usize) -> Generation {
        let agent = self.hosts[host].agent.as_ref().unwrap();
        if self.mutant == Some(Mutant::ReusesGenerations) {
            let own = agent.journal.records().iter().filter(|r| r.kind == limosa_proto::commit::JournalRecordKind::Started);
            return Generation(own.count() as u64 + 1);
        }
        agent.journal.next_generation(crate::guest::VM)
    }
}
