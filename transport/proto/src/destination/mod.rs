//! The destination's half of the engine: takes events and the time, gives actions. What each state does is in
//! `receiving` (until everything is loaded) and `ending` (ready, running, discarded).
//! It receives no page, opens no socket and writes no journal.

mod ending;
mod receiving;

pub use crate::event::{Deadlines, DestinationAction, DestinationConfig, DestinationEvent, DestinationOutcome, HostTask, Side};

use crate::commit::{JournalRecord, JournalRecordKind};
use crate::error::Misuse;
use crate::identity::VmId;
use crate::keepalive::Keepalive;
use crate::state::{DestinationInput, DestinationState, Rule, destination_rule};
use crate::time::Instant;
use crate::wire::code::Code;
use crate::wire::frame::LaneToken;
use crate::wire::limits::{LANES_MAX, WORDS_BYTES_MAX, fit};
use crate::wire::message::{DestinationReport, Message};
use std::collections::VecDeque;
use std::hash::{Hash, Hasher};
use std::time::Duration;

/// The destination's half, for one incoming migration.
#[derive(Debug, Clone, Hash)]
pub struct Destination {
    core: Core,
    state: State,
}

/// A state and what it owns.
#[derive(Debug, Clone, Hash)]
enum State {
    Listening,
    Checking(receiving::Asked),
    Preparing(receiving::Asked),
    Noting(receiving::Noting),
    Joining(receiving::Receiving),
    Receiving(receiving::Receiving),
    Loading(receiving::Loading),
    Ready,
    Resuming(ending::Resuming),
    Running(ending::Running),
    Discarding(ending::Discarding),
    Done,
}

/// What every state has.
#[derive(Debug, Clone)]
struct Core {
    config: DestinationConfig,
    now: Instant,
    started: Instant,
    actions: VecDeque<DestinationAction>,
    keepalive: Keepalive,
    /// When the state's patience ends.
    deadline: Option<Instant>,
    /// Whose guest; known from Hello on.
    vm: VmId,
    /// Bytes of its memory.
    memory_bytes: u64,
    /// Whether the guest stands still and is to do so here.
    paused: bool,
    /// Whether a VMM was asked for, so that there is something to throw away.
    prepared: bool,
    /// Whether the source asked for a verdict: then that is what it is told, and nothing else.
    asked: bool,
    report: DestinationReport,
    warnings: Vec<String>,
}

/// What decides how it goes on, as in the source's core. The report and the warnings are for people alone.
impl Hash for Core {
    fn hash<H: Hasher>(&self, state: &mut H) {
        let Core {
            config: _,
            now: _,
            started: _,
            actions,
            keepalive,
            deadline,
            vm,
            memory_bytes,
            paused,
            prepared,
            asked,
            report: _,
            warnings: _,
        } = self;
        (actions.len(), keepalive, deadline, vm, memory_bytes, paused, prepared, asked).hash(state);
    }
}

/// Warnings kept; more are dropped.
const WARNINGS_MAX: usize = 32;

impl Destination {
    /// Waits for Hello.
    ///
    /// # Errors
    /// A setting is out of range.
    pub fn new(now: Instant, config: DestinationConfig) -> Result<Destination, Misuse> {
        let (interval, silence) = (config.keepalive, config.peer_silence_max);
        let wrong = |setting, found: String, wants| Err(Misuse::Setting { setting, found, wants });
        if !(1..=LANES_MAX).contains(&config.lanes_max) {
            return wrong("lanes_max", config.lanes_max.to_string(), "1 to 16");
        }
        if interval.is_zero() || silence <= interval {
            return wrong("peer_silence_max", format!("{silence:?}"), "longer than keepalive, which is more than zero");
        }
        let mut core = Core {
            now,
            started: now,
            actions: VecDeque::new(),
            keepalive: Keepalive::new(now, interval, silence),
            deadline: None,
            vm: VmId([0; 16]),
            memory_bytes: 0,
            paused: false,
            prepared: false,
            asked: false,
            report: DestinationReport::default(),
            warnings: Vec::new(),
            config,
        };
        core.patience(core.config.deadlines.answer);
        Ok(Destination { core, state: State::Listening })
    }

    /// Something happened.
    pub fn handle(&mut self, now: Instant, event: DestinationEvent) {
        if self.is_done() {
            return;
        }
        self.core.now = now;
        let Some(event) = self.core.sift(event) else { return };
        let before = self.state();
        let input = DestinationInput::of(&event);
        let rule = destination_rule(before, input);
        let state = std::mem::replace(&mut self.state, State::Done);
        self.state = match rule {
            Rule::Ignored => state,
            Rule::Next(_) => state.step(&mut self.core, event),
            Rule::Violation(_) => {
                let what = if let DestinationEvent::Message(message) = &event { message.name() } else { "something" };
                let words = format!("the source sent {what} in the state {before}, where it has no place");
                state.fail(&mut self.core, Code::Violation, words, Side::Destination)
            }
            Rule::Misuse(_) => {
                let words = format!("this host answered {input} in the state {before}, where it was not asked");
                state.fail(&mut self.core, Code::Internal, words, Side::Destination)
            }
        };
        let after = self.state();
        debug_assert!(
            match rule {
                Rule::Ignored => after == before,
                Rule::Next(to) | Rule::Violation(to) | Rule::Misuse(to) => to.contains(&after),
            },
            "{before} + {input} led to {after}, which the table does not have"
        );
    }

    /// The next thing to do, until there is none.
    pub fn poll(&mut self) -> Option<DestinationAction> {
        self.core.actions.pop_front()
    }

    /// When to call [`Destination::handle`] with [`DestinationEvent::Timer`], if nothing else happens before.
    #[must_use]
    pub fn timeout(&self) -> Option<Instant> {
        if self.is_done() {
            return None;
        }
        [self.core.deadline, self.core.keepalive.timeout()].into_iter().flatten().min()
    }

    /// The state.
    #[must_use]
    pub fn state(&self) -> DestinationState {
        self.state.name()
    }

    /// What every lane must show.
    #[must_use]
    pub fn token(&self) -> LaneToken {
        self.core.config.token
    }

    /// What came so far.
    #[must_use]
    pub fn report(&self) -> &DestinationReport {
        &self.core.report
    }

    /// Things that went wrong and did not matter enough to end it, in words.
    #[must_use]
    pub fn warnings(&self) -> &[String] {
        &self.core.warnings
    }

    /// Whether `Done` was given, or waits to be polled.
    #[must_use]
    pub fn is_done(&self) -> bool {
        matches!(self.state, State::Done)
    }

    /// Whether a cancel would be obeyed now.
    ///
    /// # Errors
    /// Says why it would not.
    pub fn cancellable(&self) -> Result<(), String> {
        match self.state() {
            DestinationState::Resuming => Err("the guest is committed to this host and being resumed".to_owned()),
            DestinationState::Running => Err("the guest runs here already".to_owned()),
            DestinationState::Discarding => Err("it is being given up already".to_owned()),
            DestinationState::Done => Err("it is over already".to_owned()),
            _ => Ok(()),
        }
    }
}

impl Core {
    /// Takes keepalives and timers that mean nothing to the states; turns silence into a lost link.
    fn sift(&mut self, event: DestinationEvent) -> Option<DestinationEvent> {
        match event {
            DestinationEvent::Message(message) => {
                self.keepalive.heard(self.now);
                match message {
                    Message::Keepalive { nonce } => {
                        self.send(Message::KeepaliveAck { nonce });
                        None
                    }
                    // Keys are the link's business; the driver has seen them.
                    Message::KeepaliveAck { .. } | Message::KeysAsk(_) => None,
                    Message::VerdictAsk { .. } => {
                        // It comes on a connection of its own, which is the link now.
                        self.keepalive.relink(self.now);
                        self.asked = true;
                        Some(DestinationEvent::Message(message))
                    }
                    other => Some(DestinationEvent::Message(other)),
                }
            }
            DestinationEvent::Timer => self.timer(),
            DestinationEvent::LinkLost(words) => {
                self.keepalive.lose();
                Some(DestinationEvent::LinkLost(words))
            }
            other => Some(other),
        }
    }

    fn timer(&mut self) -> Option<DestinationEvent> {
        if let Some(silence) = self.keepalive.lost(self.now) {
            self.keepalive.lose();
            return Some(DestinationEvent::LinkLost(format!("nothing was heard from the source for {} s", silence.as_secs())));
        }
        if let Some(nonce) = self.keepalive.due(self.now) {
            self.send(Message::Keepalive { nonce });
        }
        self.deadline.filter(|deadline| *deadline <= self.now)?;
        self.deadline = None;
        Some(DestinationEvent::Timer)
    }

    fn act(&mut self, action: DestinationAction) {
        self.actions.push_back(action);
    }

    /// Sends `message`, unless there is no link any more.
    fn send(&mut self, message: Message) {
        if self.keepalive.linked() {
            self.keepalive.sent(self.now);
            self.act(DestinationAction::Send(message));
        }
    }

    fn journal(&mut self, kind: JournalRecordKind, words: &str) {
        let (migration, generation, vm, peer) = (self.config.migration, self.config.generation, self.vm, self.config.peer);
        let words = fit(words, WORDS_BYTES_MAX);
        self.act(DestinationAction::Journal(JournalRecord { kind, migration, generation, vm, peer, words }));
    }

    /// From now on, the state waits this long.
    fn patience(&mut self, wait: Duration) {
        self.deadline = Some(self.now.after(wait));
    }

    fn close_link(&mut self) {
        self.keepalive.lose();
        self.act(DestinationAction::CloseLink);
    }

    fn warn(&mut self, words: String) {
        if self.warnings.len() < WARNINGS_MAX {
            self.warnings.push(fit(&words, WORDS_BYTES_MAX));
        }
    }

    fn done(&mut self, outcome: DestinationOutcome) -> State {
        self.deadline = None;
        self.act(DestinationAction::Done(outcome));
        State::Done
    }
}

impl State {
    fn name(&self) -> DestinationState {
        match self {
            State::Listening => DestinationState::Listening,
            State::Checking(_) => DestinationState::Checking,
            State::Preparing(_) => DestinationState::Preparing,
            State::Noting(_) => DestinationState::Noting,
            State::Joining(_) => DestinationState::Joining,
            State::Receiving(_) => DestinationState::Receiving,
            State::Loading(_) => DestinationState::Loading,
            State::Ready => DestinationState::Ready,
            State::Resuming(_) => DestinationState::Resuming,
            State::Running(_) => DestinationState::Running,
            State::Discarding(_) => DestinationState::Discarding,
            State::Done => DestinationState::Done,
        }
    }

    fn step(self, core: &mut Core, event: DestinationEvent) -> State {
        let name = self.name();
        let is_open = name < DestinationState::Resuming;
        // Once ready, a lost link is no failure, for the source may come back with its word; and lanes are done with.
        let lost = matches!(
            event,
            DestinationEvent::LinkLost(_) | DestinationEvent::HostFailed { task: HostTask::Pages | HostTask::Lanes, .. }
        );
        let waits = name == DestinationState::Ready && lost;
        if is_open
            && !waits
            && let Some((code, words, by)) = failure(name, core, &event)
        {
            return self.fail(core, code, words, by);
        }
        match self {
            State::Listening => receiving::listening(core, event),
            State::Checking(asked) => asked.on_checked(core, event),
            State::Preparing(asked) => asked.on_prepared(core, event),
            State::Noting(noting) => noting.on(core),
            State::Joining(receiving) => receiving.on_joining(core, event),
            State::Receiving(receiving) => receiving.on(core, event),
            State::Loading(loading) => loading.on(core),
            State::Ready => ending::ready(core, event),
            State::Resuming(resuming) => resuming.on(core, event),
            State::Running(running) => running.on(core, event),
            State::Discarding(discarding) => discarding.on(core, event),
            State::Done => State::Done,
        }
    }

    /// Gives up; from `Noting` on only with the journal's word.
    fn fail(self, core: &mut Core, code: Code, words: String, by: Side) -> State {
        let name = self.name();
        if name >= DestinationState::Noting || core.asked && name != DestinationState::Listening {
            ending::discard(core, code, &words, by, name == DestinationState::Ready)
        } else {
            ending::drop_unready(core, code, &words, by)
        }
    }
}

/// What ends every state before the commit, as code, words and who gave up.
fn failure(state: DestinationState, core: &Core, event: &DestinationEvent) -> Option<(Code, String, Side)> {
    Some(match event {
        DestinationEvent::Message(Message::Abort { code, words }) => (*code, words.clone(), Side::Source),
        DestinationEvent::Message(Message::VerdictAsk { released }) if state != DestinationState::Ready || !released => {
            let words = "the source lost the link and asks what became of its guest, which was not committed".to_owned();
            (Code::LinkLost, words, Side::Source)
        }
        DestinationEvent::LinkLost(words) => (Code::LinkLost, words.clone(), Side::Destination),
        DestinationEvent::PeerFault { code, words } => (*code, words.clone(), Side::Destination),
        DestinationEvent::HostFailed { task, words } => {
            (crate::source::code_of(*task), format!("{task} failed: {words}"), Side::Destination)
        }
        DestinationEvent::Cancel(words) => (Code::Cancelled, words.clone(), Side::Destination),
        DestinationEvent::Timer => {
            let seconds = core.now.since(core.started).as_secs();
            (Code::Timeout, format!("{} took too long, {seconds} s after the start", waits_for(state)), Side::Destination)
        }
        _ => return None,
    })
}

fn waits_for(state: DestinationState) -> &'static str {
    match state {
        DestinationState::Listening => "the source's first message",
        DestinationState::Checking => "looking at what this host has",
        DestinationState::Preparing => "preparing the VMM",
        DestinationState::Noting => "writing the journal",
        DestinationState::Joining => "opening the lanes",
        DestinationState::Receiving => "the next round",
        DestinationState::Loading => "loading the guest's state",
        _ => "the source's Commit",
    }
}
