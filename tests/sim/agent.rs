//! What an agent does: it carries out what the engines decide, as `limosa-link`'s driver and `limosa-agent` do, on the
//! simulated host. What the host does is in `host`, what comes after a restart in `recover`, how pages move in `lanes`.

use crate::checker::Mutant;
use crate::faults::Step;
use crate::guest::description;
use crate::host::{is_infallible, shown, step_and_task};
use crate::link::{Key, Owner};
use crate::world::{Begun, Engine, EntryState, Item, Operation, Outcome, Owed, Session, Told, World, host_id};
use limosa_proto::destination::Destination;
use limosa_proto::event::{
    Course, DestinationAction, DestinationConfig, DestinationEvent, DestinationOutcome, HostTask, Side, SourceAction,
    SourceConfig, SourceEvent, SourceOutcome,
};
use limosa_proto::identity::MigrationId;
use limosa_proto::recovery::{Ended, Plugged};
use limosa_proto::source::Source;
use limosa_proto::state::SourceState;
use limosa_proto::wire::frame::LaneToken;
use limosa_proto::wire::message::{Message, VerdictAnswer};
use std::collections::VecDeque;
use std::time::Duration;

/// How long a connection may take to be made.
const CONNECT_MAX: Duration = Duration::from_secs(3);
/// What hangs is answered after this time.
const HANGS: Duration = Duration::from_secs(12);

fn step_of(message: &Message) -> Option<Step> {
    Some(match message {
        Message::Hello(_) => Step::HelloSent,
        Message::Accept(_) => Step::AcceptSent,
        Message::Prepared { .. } => Step::PreparedSent,
        Message::RoundDone { .. } => Step::RoundDoneSent,
        Message::RecordsEnd { .. } => Step::RecordsEndSent,
        Message::Ready(_) => Step::ReadySent,
        Message::Commit => Step::CommitSent,
        Message::Running(_) => Step::RunningSent,
        Message::Finished(_) => Step::FinishedSent,
        Message::Abort { .. } => Step::AbortSent,
        Message::VerdictAsk { .. } => Step::VerdictAskSent,
        Message::Verdict(_) => Step::VerdictSent,
        Message::ReleasedAsk => Step::ReleasedAskSent,
        Message::Released(_) => Step::ReleasedSent,
        _ => return None,
    })
}

impl World {
    /// A host whose guest may be migrated, paused or resumed now.
    pub(crate) fn idle_owner(&self) -> Option<usize> {
        let idle = |host: &crate::world::Host| {
            host.agent.as_ref().and_then(|agent| agent.entry.as_ref()).is_some_and(|entry| {
                let known = matches!(entry.state, EntryState::Running | EntryState::Held);
                known && entry.claim.is_none() && entry.plugged.is_some()
            })
        };
        self.hosts.iter().position(idle)
    }

    /// `limosa vm pause` or `limosa vm resume`.
    pub(crate) fn pause_or_resume(&mut self, host: usize) {
        let Some(entry) = self.hosts[host].agent.as_ref().and_then(|agent| agent.entry.clone()) else { return };
        let Some(vmm) = entry.plugged else { return };
        self.log(|| format!("the operator of host {host} pauses or resumes the guest"));
        let state = if entry.is_held() {
            if let Err(words) = self.run_here(host, vmm) {
                return self.log(|| format!("the guest cannot be resumed: {words}"));
            }
            EntryState::Running
        } else {
            if self.guest.hold(vmm).is_err() {
                return;
            }
            EntryState::Held
        };
        self.set_state(host, state);
    }

    /// The VMM is told to run the guest, or to have it and hold it.
    pub(crate) fn note_order(&mut self, host: usize) {
        if let Some(entry) = self.hosts[host].agent.as_mut().and_then(|agent| agent.entry.as_mut()) {
            entry.may_have_run = true;
        }
    }

    pub(crate) fn set_state(&mut self, host: usize, state: EntryState) {
        if let Some(entry) = self.hosts[host].agent.as_mut().and_then(|agent| agent.entry.as_mut()) {
            entry.state = state;
        }
    }

    /// Resumes the guest of `vmm`; that it runs already is fine.
    pub(crate) fn run_here(&mut self, host: usize, vmm: usize) -> Result<(), String> {
        if self.guest.vmms[vmm].state == Plugged::Running {
            return Ok(());
        }
        if self.guest.vmms[vmm].state == Plugged::Paused {
            self.check_taken_back(host);
        }
        self.log(|| format!("host {host}: VMM {vmm} is let run"));
        self.note_order(host);
        self.guest.run(vmm)
    }

    /// `limosa migrate`.
    pub(crate) fn begin(&mut self, host: usize, to: Option<usize>) {
        let count = self.hosts.len();
        let to = to.unwrap_or_else(|| (host + 1 + self.random.index(count - 1)) % count);
        if !self.is_on_record(host) {
            return self.count("refused: the journal cannot be written");
        }
        self.report.migrations += 1;
        let mut migration = [0; 16];
        migration[..8].copy_from_slice(&self.report.migrations.to_le_bytes());
        let key = (MigrationId(migration), self.next_generation(host));
        let incarnation = self.incarnation(host).unwrap();
        self.serial += 1;
        let claim = self.serial;
        let quick = self.random.percent(20);
        let entry = self.hosts[host].agent.as_mut().and_then(|agent| agent.entry.as_mut()).unwrap();
        let course = if entry.is_held() {
            Course::Paused
        } else if quick {
            Course::Quick
        } else {
            Course::Precopy
        };
        entry.claim = Some(claim);
        self.log(|| format!("host {host}: migrate to host {to}, {course:?}, generation {}", key.1.0));
        let begun = Begun { key, to, course, target: claim };
        let blocked = self.net.blocked(host, to, self.now).or(self.net.blocked(to, host, self.now)).is_some();
        let wait = if blocked { CONNECT_MAX } else { self.net.travel(host, to, self.now) * 2 };
        self.after(wait.min(CONNECT_MAX), Item::Connected { host, incarnation, begun });
    }

    pub(crate) fn can_reach(&self, host: usize, to: usize) -> bool {
        let open = |a, b| self.net.blocked(a, b, self.now).is_none();
        self.hosts[to].agent.is_some() && open(host, to) && open(to, host)
    }

    /// The first channel of a migration is there, or cannot be had.
    pub(crate) fn connected(&mut self, host: usize, incarnation: u64, begun: &Begun) {
        if self.incarnation(host) != Some(incarnation) {
            return;
        }
        let Begun { key, to, course, target } = begun.clone();
        if !self.can_reach(host, to) {
            self.count("refused: not reached");
            return self.unclaim(host, target);
        }
        let mut config = SourceConfig::new(key.0, key.1, host_id(to), description());
        config.course = course;
        config.lanes = u16::try_from(1 + self.random.below(3)).unwrap();
        config.policy.downtime_target = Duration::from_millis(10);
        let there = self.incarnation(to).unwrap();
        let ends = (self.end_at(host, incarnation, Owner::Session(target)), self.end_at(to, there, Owner::Nobody));
        let connection = self.net.connect(key, ends.0, ends.1);
        let engine = Engine::Source(Box::new(Source::new(self.local(host), config).unwrap()));
        let vmm = self.hosts[host].agent.as_ref().and_then(|agent| agent.entry.as_ref()).and_then(|entry| entry.plugged);
        let session = new_session(key, to, engine, (connection, 0), vmm);
        self.agent(host, incarnation).unwrap().sessions.insert(target, session);
    }

    pub(crate) fn unclaim(&mut self, host: usize, claim: u64) {
        if let Some(entry) = self.hosts[host].agent.as_mut().and_then(|agent| agent.entry.as_mut())
            && entry.claim == Some(claim)
        {
            entry.claim = None;
        }
    }

    /// Something for an engine.
    pub(crate) fn tell(&mut self, host: usize, session: u64, event: Told) {
        let now = self.local(host);
        if self.mutant.is_some() {
            self.twist(host, session, &event);
        }
        let Some(session) = self.session(host, session) else { return };
        match (&mut session.engine, event) {
            (Engine::Source(source), Told::Source(event)) => source.handle(now, event),
            (Engine::Destination(destination), Told::Destination(event)) => destination.handle(now, event),
            _ => {}
        }
    }

    /// What a planted fault makes of an event before the engine has it.
    fn twist(&mut self, host: usize, number: u64, event: &Told) {
        let now = self.local(host);
        let Some(session) = self.session(host, number) else { return };
        let (vmm, lost) = (session.vmm, matches!(event, Told::Source(SourceEvent::LinkLost(_))));
        let committing = matches!(&session.engine, Engine::Source(source) if source.state() == SourceState::Committing);
        let discarding = matches!(&session.engine, Engine::Destination(engine)
            if matches!(engine.state(), limosa_proto::state::DestinationState::Discarding));
        let commit = matches!(event, Told::Destination(DestinationEvent::Message(Message::Commit)));
        match self.mutant {
            Some(Mutant::ResumesWhenSendFails) if lost && committing => {
                let _ = vmm.map(|vmm| self.guest.run(vmm));
            }
            Some(Mutant::EofIsSuccess) if lost && committing => {
                if let Some(Session { engine: Engine::Source(source), .. }) = self.session(host, number) {
                    source.handle(now, SourceEvent::Message(Message::Running(Default::default())));
                }
            }
            Some(Mutant::CommitAfterDiscarded) if commit && discarding => {
                let _ = vmm.map(|vmm| self.guest.run(vmm));
            }
            _ => {}
        }
    }

    /// Carries out everything that the engines want.
    pub(crate) fn drain(&mut self) {
        for host in 0..self.hosts.len() {
            let sessions: Vec<u64> = self.hosts[host].agent.iter().flat_map(|agent| agent.sessions.keys().copied()).collect();
            for number in sessions {
                while let Some(operation) = self.poll(host, number) {
                    match operation {
                        Operation::Source(action) => self.apply_source(host, number, action),
                        Operation::Destination(action) => self.apply_destination(host, number, action),
                    }
                }
            }
        }
    }

    fn poll(&mut self, host: usize, number: u64) -> Option<Operation> {
        match &mut self.session(host, number)?.engine {
            Engine::Source(source) => source.poll().map(Operation::Source),
            Engine::Destination(destination) => destination.poll().map(Operation::Destination),
        }
    }

    /// Words for the trace, if there is one.
    fn traced_words(&self, operation: impl FnOnce() -> Operation) -> String {
        if self.traced { shown(&operation()) } else { String::new() }
    }

    fn apply_source(&mut self, host: usize, number: u64, action: SourceAction) {
        let words = self.traced_words(|| Operation::Source(action.clone()));
        self.log(|| format!("host {host} source {words}"));
        match action {
            SourceAction::Send(message) => self.send(host, number, message),
            SourceAction::CloseLink => self.close_link(host, number),
            SourceAction::OpenLanes { lanes, token, .. } => self.open_lanes(host, number, lanes, token),
            SourceAction::SendPages { round, pages, last } => self.send_round(host, number, round, &pages, last),
            SourceAction::Settle { released } => self.settle(host, number, released),
            SourceAction::Done(outcome) => self.ended(host, number, Outcome::Source(outcome)),
            action => self.enqueue(host, number, Operation::Source(action)),
        }
    }

    fn apply_destination(&mut self, host: usize, number: u64, action: DestinationAction) {
        let words = self.traced_words(|| Operation::Destination(action.clone()));
        self.log(|| format!("host {host} destination {words}"));
        match action {
            DestinationAction::Send(message) => self.send(host, number, message),
            DestinationAction::CloseLink => self.close_link(host, number),
            DestinationAction::AcceptLanes { token, .. } => {
                if let Some(session) = self.session(host, number) {
                    session.gate = Some(token);
                }
            }
            DestinationAction::Done(outcome) => self.ended(host, number, Outcome::Destination(outcome)),
            action => {
                if self.mutant == Some(Mutant::AnnouncesWhenLoaded) && matches!(action, DestinationAction::Load { .. }) {
                    self.enqueue(host, number, Operation::Destination(action));
                    return self.enqueue(host, number, Operation::Destination(DestinationAction::Announce));
                }
                self.enqueue(host, number, Operation::Destination(action));
            }
        }
    }

    fn send(&mut self, host: usize, number: u64, message: Message) {
        let Some(session) = self.session(host, number) else { return };
        let (Some((connection, from)), peer) = (session.connection, session.peer) else { return };
        self.send_on(connection, from, message, host, peer);
    }

    pub(crate) fn send_on(&mut self, connection: usize, from: usize, message: Message, here: usize, there: usize) {
        // Through bytes, as on a wire.
        let body = message.emit().unwrap();
        let message = Message::parse(message.kind(), &body).unwrap();
        if let Some(step) = step_of(&message) {
            self.point(step, false, here, there);
        }
        let at = self.net.arrival(connection, from, self.now);
        self.at(at, Item::Deliver { connection, to: 1 - from, message });
    }

    fn close_link(&mut self, host: usize, number: u64) {
        let Some(session) = self.session(host, number) else { return };
        let (connection, lanes) = (session.connection.take(), session.lanes.take());
        if let Some((connection, from)) = connection {
            self.close(connection, from);
        }
        if let Some(lanes) = lanes {
            // The other side sees them end; what is on its way still comes.
            let (source, destination) = (self.net.lanes[lanes].source, self.net.lanes[lanes].destination);
            let other = if source == (host, number) { destination } else { source };
            self.lane_breaks_at(other.0, other.1);
        }
    }

    /// Closes one end: the other hears of it behind everything that was sent.
    pub(crate) fn close(&mut self, connection: usize, from: usize) {
        if std::mem::replace(&mut self.net.connections[connection].ends[from].open, false) {
            let at = self.net.arrival(connection, from, self.now);
            self.at(at, Item::Closed { connection, to: 1 - from });
        }
    }

    /// An end of a connection is gone.
    pub(crate) fn closed(&mut self, connection: usize, to: usize) {
        let end = self.net.connections[connection].ends[to];
        if !std::mem::replace(&mut self.net.connections[connection].ends[to].open, false)
            || self.incarnation(end.host) != Some(end.incarnation)
        {
            return;
        }
        match end.owner {
            Owner::Session(number) => {
                let Some(session) = self.session(end.host, number) else { return };
                if session.connection != Some((connection, to)) {
                    return;
                }
                session.connection = None;
                let words = "the connection was lost".to_owned();
                let told = match session.side() {
                    Side::Source => Told::Source(SourceEvent::LinkLost(words)),
                    Side::Destination => Told::Destination(DestinationEvent::LinkLost(words)),
                };
                self.tell(end.host, number, told);
            }
            owner @ (Owner::Settle(..) | Owner::Ask(..) | Owner::Released(..)) => {
                self.verdict_came(end.host, end.incarnation, owner, None);
            }
            Owner::Nobody => {}
        }
    }

    /// A message arrives.
    pub(crate) fn deliver(&mut self, connection: usize, to: usize, message: Message) {
        let Connected { host, owner, peer, key } = match self.receiver(connection, to) {
            Some(receiver) => receiver,
            None => return,
        };
        if let Some(step) = step_of(&message) {
            self.point(step, true, host, peer);
            self.strike_all();
            if self.receiver(connection, to).is_none() {
                return;
            }
        }
        match (owner, message) {
            (Owner::Session(number), message) => {
                let told = match self.session(host, number).map(|session| session.side()) {
                    Some(Side::Source) => Told::Source(SourceEvent::Message(message)),
                    Some(Side::Destination) => Told::Destination(DestinationEvent::Message(message)),
                    None => return,
                };
                self.tell(host, number, told);
            }
            (owner @ (Owner::Settle(..) | Owner::Ask(..)), Message::Verdict(answer)) => {
                let incarnation = self.net.connections[connection].ends[to].incarnation;
                self.verdict_came(host, incarnation, owner, Some(answer));
            }
            (Owner::Nobody, Message::Hello(hello)) => self.welcome(host, connection, key, Message::Hello(hello)),
            (Owner::Nobody, Message::VerdictAsk { released }) => self.asked_for(host, connection, key, released),
            (Owner::Nobody, Message::ReleasedAsk) => self.asked_whether_released(host, connection, key),
            (Owner::Released(wait, asked), Message::Released(answer)) => {
                let incarnation = self.net.connections[connection].ends[to].incarnation;
                self.source_said(host, incarnation, wait, asked, Some(answer));
            }
            _ => {}
        }
    }

    fn receiver(&mut self, connection: usize, to: usize) -> Option<Connected> {
        let all = &self.net.connections[connection];
        let (end, peer, key) = (all.ends[to], all.ends[1 - to].host, all.key);
        let alive = end.open && self.incarnation(end.host) == Some(end.incarnation);
        if !alive {
            // A host that lives says that nobody is there.
            if end.open && self.hosts[end.host].up {
                self.close(connection, to);
            }
            return None;
        }
        Some(Connected { host: end.host, owner: end.owner, peer, key })
    }

    /// A new migration comes in.
    fn welcome(&mut self, host: usize, connection: usize, key: Key, hello: Message) {
        let incarnation = self.incarnation(host).unwrap();
        let peer = self.net.connections[connection].ends[0].host;
        if self.session_of(host, key).is_some() {
            return self.close(connection, 1);
        }
        let token = LaneToken([u8::try_from(self.random.below(256)).unwrap(); 32]);
        let config = DestinationConfig::new(key.0, key.1, host_id(peer), token);
        let engine = Engine::Destination(Box::new(Destination::new(self.local(host), config).unwrap()));
        self.serial += 1;
        let number = self.serial;
        self.net.connections[connection].ends[1].owner = Owner::Session(number);
        let session = new_session(key, peer, engine, (connection, 1), None);
        self.agent(host, incarnation).unwrap().sessions.insert(number, session);
        self.tell(host, number, Told::Destination(DestinationEvent::Message(hello)));
    }

    /// The living destination's session of this attempt.
    pub(crate) fn session_of(&self, host: usize, key: Key) -> Option<u64> {
        let agent = self.hosts[host].agent.as_ref()?;
        let fits = |session: &Session| session.key == key && session.side() == Side::Destination;
        agent.sessions.iter().find(|(_, session)| fits(session)).map(|(number, _)| *number)
    }

    fn enqueue(&mut self, host: usize, number: u64, operation: Operation) {
        let Some(session) = self.session(host, number) else { return };
        session.operations.push_back(operation);
        if session.operations.len() == 1 {
            self.schedule(host, number);
        }
    }

    fn schedule(&mut self, host: usize, number: u64) {
        let takes = self.random.micros(100, 3_000);
        let Some(incarnation) = self.incarnation(host) else { return };
        let Some(session) = self.session(host, number) else { return };
        let Some(operation) = session.operations.front().cloned() else { return };
        let checks = matches!(operation, Operation::Destination(DestinationAction::Check(_)));
        let hangs = session.fate.is_some_and(|(hangs, _)| hangs) && !is_infallible(step_and_task(&operation).1);
        let peer = session.peer;
        self.point(step_and_task(&operation).0, false, host, peer);
        let waits = if checks { self.wait_for_its_vmm(host) } else { Duration::ZERO };
        self.after(waits + if hangs { HANGS } else { takes }, Item::Operation { host, incarnation, session: number });
    }

    /// The first waiting operation is carried out and answered.
    pub(crate) fn operate(&mut self, host: usize, incarnation: u64, number: u64) {
        if self.incarnation(host) != Some(incarnation) {
            return;
        }
        let Some(session) = self.session(host, number) else { return };
        let peer = session.peer;
        let Some(operation) = session.operations.pop_front() else { return };
        let (step, task) = step_and_task(&operation);
        // To let a VMM go always succeeds: it is killed if it does not listen.
        let fate = if is_infallible(task) { None } else { session.fate.take() };
        if task == HostTask::Resume {
            // Whatever comes of it, the order may have reached the VMM.
            self.note_order(host);
        }
        let done = match fate {
            Some((_, false)) => Err("simulated: it was not done".to_owned()),
            _ => self.effect(host, number, &operation),
        };
        let done = if fate.is_some() { Err("simulated: it failed".to_owned()) } else { done };
        self.strike_all();
        if self.incarnation(host) != Some(incarnation) {
            return;
        }
        self.point(step, true, host, peer);
        self.strike_all();
        if self.incarnation(host) != Some(incarnation) {
            return;
        }
        if let Err(words) = &done {
            self.log(|| format!("host {host}: {task} failed: {words}"));
        }
        let told = self.answer(operation, task, done);
        if let Some(told) = told {
            self.tell(host, number, told);
        }
        let more = self.session(host, number).is_some_and(|session| !session.operations.is_empty());
        if more {
            self.schedule(host, number);
        }
        self.finish(host, number);
    }

    fn ended(&mut self, host: usize, number: u64, outcome: Outcome) {
        if let Some(session) = self.session(host, number) {
            session.outcome = Some(outcome);
        }
        self.finish(host, number);
    }

    /// Takes a session away whose engine has ended and whose host has done everything that it was asked.
    fn finish(&mut self, host: usize, number: u64) {
        let Some(session) = self.session(host, number) else { return };
        if session.outcome.is_none() || !session.operations.is_empty() {
            return;
        }
        let session = self.hosts[host].agent.as_mut().and_then(|agent| agent.sessions.remove(&number)).unwrap();
        match session.outcome.clone().unwrap() {
            Outcome::Source(outcome) => {
                self.count(match outcome {
                    SourceOutcome::Committed => "committed",
                    SourceOutcome::Refused(_) => "refused",
                    SourceOutcome::InDoubt { .. } => "in doubt",
                    SourceOutcome::Aborted { by: Side::Destination, .. } => "aborted by the destination",
                    SourceOutcome::Aborted { .. } => "aborted by the source",
                });
                match outcome {
                    SourceOutcome::Committed => {
                        self.owe(host, Owed::Record(session.key, Ended::Gone));
                        self.end_here(host);
                    }
                    SourceOutcome::Aborted { guest_runs, .. } => {
                        self.owe(host, Owed::Record(session.key, Ended::Stayed));
                        if !guest_runs && self.process_lives(host) {
                            self.keep_taking_up(host);
                        }
                    }
                    SourceOutcome::Refused(_) => self.owe(host, Owed::Record(session.key, Ended::Stayed)),
                    SourceOutcome::InDoubt { .. } => {}
                }
                self.unclaim(host, number);
            }
            Outcome::Destination(outcome) => {
                let agent = self.hosts[host].agent.as_mut().unwrap();
                if !session.launched && agent.entry.as_ref().is_some_and(|entry| entry.claim == Some(number)) {
                    agent.entry = None;
                }
                self.unclaim(host, number);
                self.arrived(host, &session, &outcome);
            }
        }
        self.reap(host);
    }

    fn arrived(&mut self, host: usize, session: &Session, outcome: &DestinationOutcome) {
        match outcome {
            DestinationOutcome::Discarded { left: true, .. } => self.decide_again(host, session.key, session.peer),
            DestinationOutcome::Discarded { durable: false, .. } => self.owe(host, Owed::Record(session.key, Ended::GivenUp)),
            DestinationOutcome::Running => self.owe(host, Owed::Record(session.key, Ended::Came)),
            _ => {}
        }
    }

    /// Cancels what is under way on a host.
    pub(crate) fn cancel(&mut self, host: usize, words: &str) {
        let sessions: Vec<(u64, Side)> = self.hosts[host]
            .agent
            .iter()
            .flat_map(|agent| agent.sessions.iter().map(|(number, session)| (*number, session.side())))
            .collect();
        for (number, side) in sessions {
            let words = words.to_owned();
            self.tell(
                host,
                number,
                match side {
                    Side::Source => Told::Source(SourceEvent::Cancel(words)),
                    Side::Destination => Told::Destination(DestinationEvent::Cancel(words)),
                },
            );
        }
    }

    /// What an engine in doubt asks for.
    fn settle(&mut self, host: usize, number: u64, released: bool) {
        let Some(session) = self.session(host, number) else { return };
        session.asked += 1;
        let (key, peer, asked) = (session.key, session.peer, session.asked);
        self.ask_for_verdict(host, peer, key, released, Owner::Settle(number, asked));
    }

    /// A verdict, or that none came.
    pub(crate) fn verdict_came(&mut self, host: usize, incarnation: u64, owner: Owner, answer: Option<VerdictAnswer>) {
        if self.incarnation(host) != Some(incarnation) {
            return;
        }
        let answer = answer.map(|answer| self.understood(answer));
        match owner {
            Owner::Settle(number, asked) => {
                if self.session(host, number).is_some_and(|session| session.asked == asked) {
                    if let Some(session) = self.session(host, number) {
                        // One answer to each question.
                        session.asked += 1;
                    }
                    let lost = SourceEvent::LinkLost("no verdict".to_owned());
                    self.tell(host, number, Told::Source(answer.map_or(lost, SourceEvent::Verdict)));
                }
            }
            Owner::Ask(ask, asked) => {
                let asking = self.agent(host, incarnation).and_then(|agent| agent.asks.get_mut(&ask));
                if let Some(asking) = asking.filter(|asking| asking.asked == asked) {
                    asking.asked += 1;
                    self.ask_answered(host, ask, answer);
                }
            }
            Owner::Released(wait, asked) => self.source_said(host, incarnation, wait, asked, None),
            Owner::Session(_) | Owner::Nobody => {}
        }
    }
}

/// Who has a living end of a connection.
struct Connected {
    host: usize,
    owner: Owner,
    peer: usize,
    key: Key,
}

fn new_session(key: Key, peer: usize, engine: Engine, connection: (usize, usize), vmm: Option<usize>) -> Session {
    Session {
        key,
        peer,
        engine,
        connection: Some(connection),
        lanes: None,
        gate: None,
        vmm,
        launched: false,
        operations: VecDeque::new(),
        outcome: None,
        asked: 0,
        fate: None,
    }
}
