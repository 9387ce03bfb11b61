//! Deaths and what comes after: agents, VMMs and hosts that die, agents that start again and settle what their journal has
//! left open. The decisions are `limosa_proto::recovery`'s; here they are carried out as `limosa-agent` does (`settle`, `vms`).

use crate::checker::Mutant;
use crate::faults::Step;
use crate::guest::VM;
use crate::host::shown;
use crate::link::{Key, Owner};
use crate::world::{Agent, Asking, Engine, Entry, EntryState, Item, Operation, Owed, Told, Waiting, World, host_id};
use limosa_proto::commit::{self, DestinationVerdict, JournalRecord, JournalRecordKind, SourceVerdict};
use limosa_proto::event::{DestinationAction, DestinationEvent, Side, SourceAction, SourceEvent};
use limosa_proto::journal::{self, Compaction, Journal, JournalError};
use limosa_proto::recovery::{
    self, ASK_INTERVAL, Answered, Asked, AtStart, Ended, Fate, GuestHere, Note, OutOfPatience, Plugged, REPLUG_MAX, RETRY,
};
use limosa_proto::state::DestinationState;
use limosa_proto::wire::message::{Message, VerdictAnswer};
use std::collections::BTreeMap;
use std::time::Duration;

/// How long an agent is away.
const AGENT_AWAY_US: (u64, u64) = (100_000, 8_000_000);
const HOST_AWAY_US: (u64, u64) = (5_000_000, 40_000_000);
/// How long after that a VMM takes to plug in.
const PLUG_IN_US: (u64, u64) = (20_000, 1_100_000);
const PLUG_IN_LATE_US: (u64, u64) = (1_100_000, 9_000_000);
/// How long one question may take.
pub(crate) const VERDICT_MAX: Duration = Duration::from_secs(10);
const READY_MAX: Duration = Duration::from_secs(30);
const WAIT_INTERVAL: Duration = Duration::from_millis(500);
/// Small, so that journals are rewritten in many worlds.
const COMPACTION: Compaction = Compaction { above_bytes: 700, settled_kept: 4 };
/// Where nothing but the latest is remembered.
const FORGETFUL: Compaction = Compaction { above_bytes: 200, settled_kept: 0 };

impl World {
    pub(crate) fn start_agent(&mut self, host: usize) {
        if self.hosts[host].agent.is_some() {
            return;
        }
        self.hosts[host].up = true;
        self.point(Step::Start, false, host, (host + 1) % self.hosts.len());
        self.strike_all();
        if !self.hosts[host].up {
            return;
        }
        let compaction = if self.mutant == Some(Mutant::UnknownIsDiscarded) { FORGETFUL } else { COMPACTION };
        let opened = Journal::open(self.hosts[host].disk.clone(), compaction);
        self.serial += 1;
        let incarnation = self.serial;
        let journal = match opened {
            Ok((journal, warnings)) => {
                self.log(|| {
                    format!("host {host}: agent {incarnation} starts; {} records; {warnings:?}", journal.records().len())
                });
                journal
            }
            Err(error @ JournalError::Damaged { .. }) => return self.fail(format!("host {host}: {error}")),
            Err(error) => {
                self.log(|| format!("host {host}: the agent cannot start: {error}"));
                // A journal that killed its writer while it was opened.
                let _ = self.hosts[host].disk.take_death();
                return self.after(Duration::from_secs(5), Item::AgentStarts { host });
            }
        };
        let (sessions, asks, waits) = (BTreeMap::new(), BTreeMap::new(), BTreeMap::new());
        let (owed, started) = (Vec::new(), self.now);
        self.hosts[host].agent = Some(Agent { incarnation, journal, entry: None, sessions, asks, waits, owed, started });
        self.settle_all(host);
        for vmm in 0..self.guest.vmms.len() {
            if self.guest.vmms[vmm].lives && self.guest.vmms[vmm].host == host {
                // On a host that is overloaded, or whose VMM stands still, it takes longer than is waited for.
                let (from, to) = if self.random.percent(10) { PLUG_IN_LATE_US } else { PLUG_IN_US };
                let wait = self.random.micros(from, to);
                self.after(wait, Item::PlugIn { vmm, host, incarnation });
            }
        }
        self.strike_all();
        self.point(Step::Start, true, host, (host + 1) % self.hosts.len());
    }

    /// Settles what the journal has left open.
    fn settle_all(&mut self, host: usize) {
        let unsettled = self.hosts[host].agent.as_ref().unwrap().journal.unsettled();
        for (migration, generation) in unsettled {
            let Some(agent) = &self.hosts[host].agent else { return };
            let records = agent.journal.of(migration, generation);
            let Some(record) = records.last().cloned() else { continue };
            let mut found = recovery::at_start(&records, migration, generation);
            if self.mutant == Some(Mutant::RestartForgetsReleased) && found == AtStart::Ask {
                found = AtStart::Settle(Note { kind: JournalRecordKind::Aborted, words: "forgotten" });
            }
            self.log(|| format!("host {host}: at the start, generation {}: {found:?}", generation.0));
            match found {
                AtStart::Settle(note) => {
                    if self.write(host, &note.of(&record)).is_err() {
                        self.owe(host, Owed::Record((migration, generation), Ended::Stayed));
                    }
                }
                AtStart::Ask => {
                    self.serial += 1;
                    let (ask, incarnation) = (self.serial, self.incarnation(host).unwrap());
                    let asking = Asking { record, wait: ASK_INTERVAL.0, asked: 0 };
                    self.hosts[host].agent.as_mut().unwrap().asks.insert(ask, asking);
                    self.after(Duration::ZERO, Item::Ask { host, incarnation, ask });
                }
                AtStart::Wait => {
                    if self.hosts[host].lost_loaded {
                        self.may_be_in_doubt = true;
                    }
                    self.begin_wait(host, record, READY_MAX.max(REPLUG_MAX), false);
                }
                AtStart::Nothing => {}
            }
        }
    }

    fn begin_wait(&mut self, host: usize, record: JournalRecord, patience: Duration, again: bool) {
        self.serial += 1;
        let (wait, incarnation) = (self.serial, self.incarnation(host).unwrap());
        let until = self.now.after(patience);
        let waiting = Waiting { record, until, again, interval: ASK_INTERVAL.0, asked: 0, said: None };
        self.hosts[host].agent.as_mut().unwrap().waits.insert(wait, waiting);
        self.after(WAIT_INTERVAL, Item::Wait { host, incarnation, wait });
        if !again {
            self.after(Duration::ZERO, Item::AskSource { host, incarnation, wait });
        }
    }

    /// The engine gave a guest up and could not write so: the agent decides again, as long as its VMM is there.
    pub(crate) fn decide_again(&mut self, host: usize, key: Key, peer: usize) {
        let (migration, generation) = key;
        let (kind, words) = (JournalRecordKind::Ready, String::new());
        let record = JournalRecord { kind, migration, generation, vm: VM, peer: host_id(peer), words };
        self.begin_wait(host, record, Duration::ZERO, true);
    }

    /// Puts on record that a guest came here, before it leaves.
    pub(crate) fn is_on_record(&mut self, host: usize) -> bool {
        let records = self.hosts[host].agent.as_ref().unwrap().journal.of_guest(VM);
        recovery::before_it_leaves(&records).into_iter().all(|(of, came)| self.write(host, &came.of(&of)).is_ok())
    }

    /// Does what an ended engine has left to be done, now or later.
    pub(crate) fn owe(&mut self, host: usize, owed: Owed) {
        let Some(agent) = &mut self.hosts[host].agent else { return };
        if let Owed::Record(key, ended) = owed
            && recovery::owed(&agent.journal.of(key.0, key.1), ended).is_none()
        {
            return;
        }
        if !agent.owed.contains(&owed) {
            agent.owed.push(owed.clone());
            let incarnation = agent.incarnation;
            self.after(RETRY, Item::Retry { host, incarnation, owed });
        }
    }

    /// The guest is this host's and could not be resumed.
    pub(crate) fn keep_taking_up(&mut self, host: usize) {
        self.set_state(host, EntryState::Paused);
        self.owe(host, Owed::TakeUp);
    }

    pub(crate) fn retry(&mut self, host: usize, incarnation: u64, owed: &Owed) {
        let Some(agent) = self.agent(host, incarnation) else { return };
        let done = match owed {
            Owed::Record(key, ended) => {
                let records = agent.journal.of(key.0, key.1);
                match (recovery::owed(&records, *ended), records.last().cloned()) {
                    (Some(note), Some(last)) => self.write(host, &note.of(&last)).is_ok(),
                    _ => true,
                }
            }
            Owed::TakeUp => match agent.entry.as_ref().map(|entry| (entry.state, entry.plugged, entry.process)) {
                Some((EntryState::Paused, Some(vmm), _)) => self.take_up(host, vmm).is_ok(),
                Some((EntryState::Paused, None, Some(vmm))) => !self.guest.vmms[vmm].lives,
                _ => true,
            },
        };
        let Some(agent) = self.agent(host, incarnation) else { return };
        if done {
            agent.owed.retain(|other| other != owed);
        } else {
            self.after(RETRY, Item::Retry { host, incarnation, owed: owed.clone() });
        }
    }

    /// How long a check waits for a VMM of the guest that may be about to plug in.
    pub(crate) fn wait_for_its_vmm(&self, host: usize) -> Duration {
        let agent = self.hosts[host].agent.as_ref().unwrap();
        if agent.entry.is_some() {
            return Duration::ZERO;
        }
        let lives = self.noted_lives(host);
        recovery::wait_before_admitting(&agent.journal.of_guest(VM), lives, self.now.since(agent.started))
    }

    pub(crate) fn kill_agent(&mut self, host: usize) {
        if self.hosts[host].agent.is_none() {
            return;
        }
        self.log(|| format!("host {host}: the agent dies"));
        self.half_done(host);
        self.forget_agent(host);
        for connection in 0..self.net.connections.len() {
            for end in 0..2 {
                if self.net.connections[connection].ends[end].host == host {
                    // The kernel closes it.
                    self.close(connection, end);
                }
            }
        }
        let (from, to) = AGENT_AWAY_US;
        let away = self.random.micros(from, to);
        self.after(away, Item::AgentStarts { host });
    }

    /// What a dying agent was doing may be done, all or in part: VMMs carry out what they have read, a file keeps what was
    /// written.
    fn half_done(&mut self, host: usize) {
        let sessions: Vec<u64> = self.hosts[host].agent.as_ref().unwrap().sessions.keys().copied().collect();
        for number in sessions {
            let Some(operation) = self.session(host, number).and_then(|session| session.operations.front().cloned()) else {
                continue;
            };
            let record = match &operation {
                Operation::Source(SourceAction::Journal(record)) | Operation::Destination(DestinationAction::Journal(record)) => {
                    Some(record.clone())
                }
                _ => None,
            };
            if !self.random.percent(50) {
                continue;
            }
            self.log(|| format!("host {host}: what it was doing is done, or half: {}", shown(&operation)));
            match record {
                Some(record) => {
                    let head = journal::emit(&[]).len();
                    let line = journal::emit(std::slice::from_ref(&record));
                    self.hosts[host].disk.die_writing(&line[head..]);
                }
                None => drop(self.effect(host, number, &operation)),
            }
        }
    }

    fn forget_agent(&mut self, host: usize) {
        self.hosts[host].agent = None;
        for vmm in 0..self.guest.vmms.len() {
            if self.guest.vmms[vmm].lives && self.guest.vmms[vmm].host == host {
                self.guest.agent_lost(vmm);
            }
        }
        for lanes in 0..self.net.lanes.len() {
            let (source, destination) = (self.net.lanes[lanes].source, self.net.lanes[lanes].destination);
            if source.0 == host {
                self.lane_breaks_at(destination.0, destination.1);
            } else if destination.0 == host {
                self.lane_breaks_at(source.0, source.1);
            }
        }
    }

    pub(crate) fn cut_power(&mut self, host: usize) {
        self.log(|| format!("host {host}: the power goes"));
        let was_up = std::mem::replace(&mut self.hosts[host].up, false);
        self.vmms_die(host);
        if self.hosts[host].agent.is_some() {
            let pending = self.hosts[host].agent.as_ref().unwrap().sessions.values().find_map(|session| {
                session.operations.front().and_then(|operation| match operation {
                    Operation::Source(SourceAction::Journal(record))
                    | Operation::Destination(DestinationAction::Journal(record)) => Some(record.clone()),
                    _ => None,
                })
            });
            if let Some(record) = pending {
                let head = journal::emit(&[]).len();
                self.hosts[host].disk.die_writing(&journal::emit(&[record])[head..]);
            }
        }
        self.forget_agent(host);
        self.hosts[host].disk.power_cut();
        if self.random.percent(50) {
            self.hosts[host].process_file = None;
        }
        if was_up {
            let (from, to) = HOST_AWAY_US;
            let away = self.random.micros(from, to);
            self.queue.retain(|_, item| !matches!(item, Item::AgentStarts { host: other } if *other == host));
            self.after(away, Item::AgentStarts { host });
        }
    }

    /// The VMMs of a host die with their guests; its agent notices.
    pub(crate) fn kill_vmms(&mut self, host: usize) {
        self.log(|| format!("host {host}: its VMMs die"));
        self.vmms_die(host);
        self.notice_ends(host);
    }

    fn vmms_die(&mut self, host: usize) {
        // An engine that has not ordered it to run gives it up durably.
        let decides =
            self.hosts[host].agent.iter().flat_map(|agent| agent.sessions.values()).any(
                |session| matches!(&session.engine, Engine::Destination(engine) if engine.state() <= DestinationState::Ready),
            );
        for vmm in 0..self.guest.vmms.len() {
            if !self.guest.vmms[vmm].lives || self.guest.vmms[vmm].host != host {
                continue;
            }
            match self.guest.vmms[vmm].state {
                Plugged::Running | Plugged::Paused => (self.may_be_none, self.may_be_in_doubt) = (true, true),
                Plugged::Loaded => {
                    self.hosts[host].lost_loaded = true;
                    self.may_be_in_doubt |= !decides;
                }
                Plugged::Incoming => {}
            }
            self.guest.end(vmm);
        }
    }

    /// An agent notices that a VMM has ended: whoever needs it is told.
    fn notice_ends(&mut self, host: usize) {
        let Some(entry) = self.hosts[host].agent.as_mut().and_then(|agent| agent.entry.as_mut()) else { return };
        let gone = entry.plugged.is_some_and(|vmm| !self.guest.vmms[vmm].lives);
        if !gone {
            return;
        }
        entry.plugged = None;
        if let Some(number) = entry.claim {
            let words = "the VMM is lost".to_owned();
            let told = match self.session(host, number).map(|session| session.side()) {
                Some(Side::Source) => Told::Source(SourceEvent::Cancel(words)),
                Some(Side::Destination) => Told::Destination(DestinationEvent::Cancel(words)),
                None => return,
            };
            self.tell(host, number, told);
        }
        self.reap(host);
    }

    /// Takes a guest out of the table whose VMM has ended and that nobody needs.
    pub(crate) fn reap(&mut self, host: usize) {
        let Some(agent) = &mut self.hosts[host].agent else { return };
        let Some(entry) = &agent.entry else { return };
        let ended = entry.process.is_some_and(|vmm| !self.guest.vmms[vmm].lives);
        if !ended || entry.claim.is_some() {
            return;
        }
        let may_have_run = entry.may_have_run;
        agent.entry = None;
        if may_have_run {
            return;
        }
        let records = agent.journal.of_guest(VM);
        if let Some((of, note)) = recovery::vmm_ended_unrun(&records)
            && self.write(host, &note.of(&of)).is_err()
        {
            self.owe(host, Owed::Record((of.migration, of.generation), Ended::GivenUp));
        }
    }

    /// The connections of a host are gone, and the other ends do not hear of it.
    pub(crate) fn forget_connections(&mut self, host: usize) {
        for connection in 0..self.net.connections.len() {
            for to in 0..2 {
                if self.net.connections[connection].ends[to].host == host {
                    self.after(Duration::ZERO, Item::Closed { connection, to });
                }
            }
        }
    }

    /// The process of a VMM is ended by its agent.
    pub(crate) fn end_vmm(&mut self, vmm: usize) {
        self.log(|| format!("VMM {vmm} ends"));
        if self.guest.runner() == Some(vmm) {
            let host = self.guest.vmms[vmm].host;
            self.fail(format!("the agent of host {host} ended a VMM whose guest runs"));
        }
        self.guest.end(vmm);
    }

    /// The guest lives elsewhere: its VMM here ends.
    pub(crate) fn end_here(&mut self, host: usize) {
        let Some(entry) = self.hosts[host].agent.as_mut().and_then(|agent| agent.entry.take()) else { return };
        if let Some(vmm) = entry.process.filter(|vmm| self.guest.vmms[*vmm].lives) {
            self.end_vmm(vmm);
        }
    }

    /// A VMM that has lost its agent is back.
    pub(crate) fn plug_in(&mut self, vmm: usize, host: usize, incarnation: u64) {
        if self.incarnation(host) != Some(incarnation) || !self.guest.vmms[vmm].lives {
            return;
        }
        let peer = (host + 1) % self.hosts.len();
        self.point(Step::PlugIn, false, host, peer);
        self.strike_all();
        let Some(agent) = self.agent(host, incarnation) else { return };
        let known = agent.entry.clone();
        if known.as_ref().is_some_and(|entry| entry.plugged.is_some()) {
            // Turned away: another process has plugged in for this guest. It tries again.
            return self.after(Duration::from_secs(1), Item::PlugIn { vmm, host, incarnation });
        }
        let state = self.guest.vmms[vmm].state;
        let claimed = known.and_then(|entry| entry.claim);
        let shown = if state == Plugged::Running { EntryState::Running } else { EntryState::Paused };
        self.guest.vmms[vmm].agent = Some(incarnation);
        let agent = self.agent(host, incarnation).unwrap();
        match &mut agent.entry {
            Some(entry) => (entry.plugged, entry.process) = (Some(vmm), Some(vmm)),
            None => {
                let (plugged, process) = (Some(vmm), Some(vmm));
                agent.entry = Some(Entry { plugged, process, state: shown, claim: None, may_have_run: true });
            }
        }
        if let Some(entry) = agent.entry.as_mut().filter(|_| state == Plugged::Loaded) {
            entry.may_have_run = false;
        }
        if claimed.is_none() {
            self.set_state(host, shown);
            self.decide_plugged_in(host, vmm, state);
        }
        self.point(Step::PlugIn, true, host, peer);
    }

    fn decide_plugged_in(&mut self, host: usize, vmm: usize, state: Plugged) {
        let records = self.hosts[host].agent.as_ref().unwrap().journal.of_guest(VM);
        let found = recovery::plugged_in(&records, state);
        self.log(|| format!("host {host}: VMM {vmm} plugs in, {state:?}: {found:?}"));
        if let Some((of, note)) = &found.note {
            let _ = self.write(host, &note.of(of));
        }
        match found.fate {
            Fate::Left => {}
            Fate::Own => {
                if self.take_up(host, vmm).is_err() {
                    self.keep_taking_up(host);
                }
            }
            Fate::End { .. } => self.end_here(host),
            Fate::Doubt => drop(self.guest.give_up(vmm)),
        }
    }

    /// Lets a guest that is this host's be as its operator wants it.
    fn take_up(&mut self, host: usize, vmm: usize) -> Result<(), String> {
        if self.guest.vmms[vmm].held {
            self.note_order(host);
            self.guest.hold(vmm)?;
            self.set_state(host, EntryState::Held);
        } else {
            self.run_here(host, vmm)?;
            self.set_state(host, EntryState::Running);
        }
        Ok(())
    }

    /// A restarted source asks its destination.
    pub(crate) fn ask(&mut self, host: usize, incarnation: u64, ask: u64) {
        let Some(agent) = self.agent(host, incarnation) else { return };
        let Some(asking) = agent.asks.get_mut(&ask) else { return };
        asking.asked += 1;
        let (record, asked) = (asking.record.clone(), asking.asked);
        let records = agent.journal.of(record.migration, record.generation);
        if commit::source_verdict(&records, record.migration, record.generation) == SourceVerdict::GuestIsOurs {
            return self.forget_ask(host, ask);
        }
        let plugged = agent.entry.as_ref().and_then(|entry| entry.plugged);
        if let Some(vmm) = plugged
            && let Err(words) = self.guest.give_up(vmm)
        {
            self.log(|| format!("host {host}: the destination is not asked: {words}"));
            return self.ask_answered(host, ask, None);
        }
        let Some(agent) = self.agent(host, incarnation) else { return };
        agent.asks.get_mut(&ask).unwrap().asked = asked;
        let peer = self.index_of(record.peer);
        self.point(Step::Ask, false, host, peer);
        self.strike_all();
        if self.incarnation(host) == Some(incarnation) {
            self.ask_for_verdict(host, peer, (record.migration, record.generation), true, Owner::Ask(ask, asked));
        }
    }

    /// Opens a connection and asks; sometimes a question of before arrives once more, and nobody hears the answer.
    pub(crate) fn ask_for_verdict(&mut self, host: usize, peer: usize, key: Key, released: bool, owner: Owner) {
        let incarnation = self.incarnation(host).unwrap();
        if !self.can_reach(host, peer) {
            let lost = Item::VerdictLate { host, incarnation, owner };
            return self.after(Duration::from_secs(3), lost);
        }
        let there = self.incarnation(peer).unwrap();
        let ends = (self.end_at(host, incarnation, owner), self.end_at(peer, there, Owner::Nobody));
        let connection = self.net.connect(key, ends.0, ends.1);
        self.send_on(connection, 0, Message::VerdictAsk { released }, host, peer);
        self.after(VERDICT_MAX, Item::VerdictLate { host, incarnation, owner });
        if self.random.percent(20) {
            let ends = (self.end_at(host, incarnation, Owner::Nobody), self.end_at(peer, there, Owner::Nobody));
            let again = self.net.connect(key, ends.0, ends.1);
            let wait = self.random.micros(0, 20_000_000);
            self.after(wait, Item::Deliver { connection: again, to: 1, message: Message::VerdictAsk { released } });
        }
    }

    /// What a restarted source does with the answer, or without one.
    pub(crate) fn ask_answered(&mut self, host: usize, ask: u64, answer: Option<VerdictAnswer>) {
        let incarnation = self.incarnation(host).unwrap();
        let Some(asking) = self.hosts[host].agent.as_mut().unwrap().asks.get_mut(&ask) else { return };
        let (record, wait) = (asking.record.clone(), asking.wait);
        let answered = answer.map(recovery::answered);
        self.log(|| format!("host {host}: asked about generation {}: {answered:?}", record.generation.0));
        match answered {
            Some(Answered::Gone(note)) => {
                let here = self.is_here(host, &record);
                if self.write(host, &note.of(&record)).is_err() {
                    return self.after(wait, Item::Ask { host, incarnation, ask });
                }
                self.forget_ask(host, ask);
                if here {
                    self.end_here(host);
                }
            }
            Some(Answered::GivenBack(note)) => {
                let here = self.is_here(host, &record);
                let entry = self.hosts[host].agent.as_ref().and_then(|agent| agent.entry.as_ref());
                let plugged = entry.and_then(|entry| entry.plugged);
                if self.write(host, &note.of(&record)).is_err() {
                    if plugged.is_none() {
                        return self.after(wait, Item::Ask { host, incarnation, ask });
                    }
                    // The destination's word is durable and enough.
                    self.owe(host, Owed::Record((record.migration, record.generation), Ended::Stayed));
                }
                self.forget_ask(host, ask);
                if let Some(vmm) = plugged.filter(|_| here)
                    && self.take_up(host, vmm).is_err()
                {
                    self.keep_taking_up(host);
                }
            }
            Some(Answered::Again(_)) | None => {
                let asking = self.hosts[host].agent.as_mut().unwrap().asks.get_mut(&ask).unwrap();
                asking.wait = (wait * 2).min(ASK_INTERVAL.1);
                return self.after(wait, Item::Ask { host, incarnation, ask });
            }
        }
        let peer = self.index_of(record.peer);
        self.point(Step::Ask, true, host, peer);
    }

    /// Whether what is heard of this attempt says something of the VMM that is here now.
    fn is_here(&self, host: usize, attempt: &JournalRecord) -> bool {
        let agent = self.hosts[host].agent.as_ref().unwrap();
        let claimed = agent.entry.as_ref().is_some_and(|entry| entry.claim.is_some());
        !claimed && recovery::is_latest(agent.journal.records(), attempt)
    }

    fn forget_ask(&mut self, host: usize, ask: u64) {
        self.hosts[host].agent.as_mut().unwrap().asks.remove(&ask);
    }

    /// A source asks on a new connection.
    pub(crate) fn asked_for(&mut self, host: usize, connection: usize, key: Key, released: bool) {
        let peer = self.net.connections[connection].ends[0].host;
        if let Some(number) = self.session_of(host, key) {
            // It is that migration's control channel from now on.
            self.net.connections[connection].ends[1].owner = Owner::Session(number);
            if let Some((old, end)) = self.session(host, number).and_then(|session| session.connection.replace((connection, 1))) {
                self.net.connections[old].ends[end].open = false;
            }
            return self.tell(host, number, Told::Destination(DestinationEvent::Message(Message::VerdictAsk { released })));
        }
        let answer = self.verdict(host, peer, key, released);
        self.log(|| format!("host {host} is asked about generation {} (released {released}): {answer:?}", key.1.0));
        self.send_on(connection, 1, Message::Verdict(answer), host, peer);
        self.close(connection, 1);
    }

    /// The answer of an agent whose engine for this attempt is gone.
    fn verdict(&mut self, host: usize, peer: usize, key: Key, released: bool) -> VerdictAnswer {
        let agent = self.hosts[host].agent.as_ref().unwrap();
        let mut records = agent.journal.of(key.0, key.1);
        records.retain(|record| record.peer == host_id(peer));
        // A VMM that is here speaks for the latest attempt alone.
        let latest = records.last().is_some_and(|last| recovery::is_latest(agent.journal.records(), last));
        let entry = agent.entry.clone().filter(|_| latest);
        let lives = latest && self.noted_lives(host);
        let silent = lives.then_some(GuestHere { claimed: false, plugged: None });
        let here = entry.as_ref().map(|entry| GuestHere {
            claimed: entry.claim.is_some(),
            plugged: entry.plugged.map(|vmm| self.guest.vmms[vmm].state),
        });
        let here = here.or(silent);
        let plugged = entry.and_then(|entry| entry.plugged);
        let mut asked = recovery::asked(&records, key.0, key.1, released, here);
        if agent.journal.is_broken() {
            asked = recovery::asked_while_broken(asked, here);
        }
        if self.mutant == Some(Mutant::GoneIsDiscarded) && asked == Asked::Answer(VerdictAnswer::MayHaveRun) {
            asked = Asked::Discard(Note { kind: JournalRecordKind::Discarded, words: "its VMM is gone" });
        }
        match (asked, records.last(), plugged) {
            (Asked::Answer(answer), ..) => answer,
            (Asked::TakeUp(note), Some(ready), Some(vmm)) => {
                self.check_committed(host, peer, key);
                if let Err(words) = self.take_up(host, vmm) {
                    self.log(|| format!("host {host}: a committed guest could not be resumed: {words}"));
                    return VerdictAnswer::Pending;
                }
                if self.write(host, &note.of(ready)).is_err() {
                    self.owe(host, Owed::Record(key, Ended::Came));
                }
                VerdictAnswer::Running
            }
            (Asked::Discard(note), Some(ready), _) if self.write(host, &note.of(ready)).is_ok() => {
                if latest {
                    self.end_here(host);
                }
                VerdictAnswer::Discarded
            }
            _ => VerdictAnswer::Pending,
        }
    }

    /// A destination waits for the source's word.
    pub(crate) fn wait_on(&mut self, host: usize, incarnation: u64, wait: u64) {
        let now = self.now;
        let Some(agent) = self.agent(host, incarnation) else { return };
        let Some(waiting) = agent.waits.get(&wait) else { return };
        let (record, until, again) = (waiting.record.clone(), waiting.until, waiting.again);
        let (migration, generation) = (record.migration, record.generation);
        let claimed = agent.entry.as_ref().is_some_and(|entry| entry.claim.is_some());
        match commit::destination_verdict(&agent.journal.of(migration, generation), migration, generation) {
            DestinationVerdict::Undecided => {}
            // What was not taken back may be found by the next agent, which then needs the VMM.
            DestinationVerdict::NoRecord if claimed || agent.journal.is_broken() => {
                return self.after(WAIT_INTERVAL, Item::Wait { host, incarnation, wait });
            }
            verdict => {
                let latest = recovery::is_latest(agent.journal.records(), &record);
                agent.waits.remove(&wait);
                if again && latest && verdict != DestinationVerdict::Running {
                    self.end_here(host);
                }
                return;
            }
        }
        self.after(WAIT_INTERVAL, Item::Wait { host, incarnation, wait });
        if now > until {
            self.out_of_patience(host, incarnation, wait);
        }
    }

    /// The source's word has not come, or it says Never.
    pub(crate) fn out_of_patience(&mut self, host: usize, incarnation: u64, wait: u64) {
        let Some(waiting) = self.agent(host, incarnation).and_then(|agent| agent.waits.get(&wait)) else { return };
        let (record, said) = (waiting.record.clone(), waiting.said);
        let (migration, generation) = (record.migration, record.generation);
        let peer = self.index_of(record.peer);
        self.point(Step::Patience, false, host, peer);
        self.strike_all();
        let Some(agent) = self.agent(host, incarnation) else { return };
        let latest = recovery::is_latest(agent.journal.records(), &record);
        if latest && agent.entry.as_ref().is_some_and(|entry| entry.claim.is_some()) {
            return;
        }
        let records = agent.journal.of(migration, generation);
        let plugged = agent.entry.as_ref().and_then(|entry| entry.plugged).filter(|_| latest);
        let lives = latest && self.noted_lives(host);
        let says = plugged.map(|vmm| self.guest.vmms[vmm].state);
        let found = recovery::out_of_patience(&records, migration, generation, plugged.is_some(), says, lives, said);
        self.log(|| format!("host {host}: open is generation {}, the source said {said:?}: {found:?}", generation.0));
        match found {
            OutOfPatience::Settled | OutOfPatience::Wait(_) | OutOfPatience::MayHaveRun(_) => {}
            OutOfPatience::Running(note) => drop(self.write(host, &note.of(&record))),
            OutOfPatience::Discard(note) => {
                if self.write(host, &note.of(&record)).is_ok() && latest {
                    self.end_here(host);
                    self.hosts[host].process_file = None;
                }
            }
        }
        self.point(Step::Patience, true, host, peer);
    }
}
