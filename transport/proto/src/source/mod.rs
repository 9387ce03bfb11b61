//! The source's half of the engine: takes events and the time, gives actions. What each state does is in
//! `rounds` (until the guest is stopped), `handover` (until it is committed) and `ending` (doubt and clean-up).
//! It moves no page, opens no socket and writes no journal.

pub(crate) mod ending;
mod handover;
mod rounds;

pub use crate::event::{Course, Deadlines, HostTask, RoundSent, Side, SourceAction, SourceConfig, SourceEvent, SourceOutcome};

use crate::bitmap::PageSet;
use crate::commit::{JournalRecord, JournalRecordKind};
use crate::error::Misuse;
use crate::keepalive::Keepalive;
use crate::precopy::Precopy;
use crate::progress::Progress;
use crate::state::{Rule, SourceInput, SourceState, source_rule};
use crate::time::Instant;
use crate::wire::code::Code;
use crate::wire::limits::{LANES_MAX, ROUNDS_MAX, WORDS_BYTES_MAX, fit};
use crate::wire::message::Message;
use std::collections::VecDeque;
use std::hash::{Hash, Hasher};
use std::time::Duration;

/// The source's half.
#[derive(Debug, Clone, Hash)]
pub struct Source {
    core: Core,
    state: State,
}

/// A state and what it owns.
#[derive(Debug, Clone, Hash)]
enum State {
    Starting,
    Preamble,
    Preparing(rounds::Granted),
    OpeningLanes,
    Tracking,
    Precopy(rounds::Rounds),
    Stopping(handover::Stopping),
    Saving(handover::Saving),
    LastRound(handover::Handover),
    Finalizing(handover::Handover),
    Releasing(handover::Releasing),
    Committing(handover::Handover),
    InDoubt(ending::Doubt),
    GivingBack(ending::GivingBack),
    Committed(ending::Committed),
    Aborting(ending::Aborting),
    Done,
}

/// What every state has.
#[derive(Debug, Clone)]
struct Core {
    config: SourceConfig,
    now: Instant,
    started: Instant,
    actions: VecDeque<SourceAction>,
    progress: Progress,
    keepalive: Keepalive,
    /// When the state's patience ends.
    deadline: Option<Instant>,
    /// Whether dirty tracking was asked for.
    tracking: bool,
    /// Whether the guest itself ended, so that there is nothing left to resume.
    guest_ended: bool,
    /// When the current round began.
    round_since: Instant,
    /// When the first round began.
    rounds_since: Instant,
    /// The last round that the destination has whole.
    round_done: u32,
    precopy: Precopy,
}

/// What decides how it goes on, for tools that tell states apart: of one configuration, engines that hash alike do alike, as
/// long as what they gave was polled.
impl Hash for Core {
    fn hash<H: Hasher>(&self, state: &mut H) {
        // Every field is named, so that a new one is not forgotten. The configuration never changes, `now` is set by the next
        // event, and when it all began counts for the report alone.
        let Core {
            config: _,
            now: _,
            started: _,
            actions,
            progress,
            keepalive,
            deadline,
            tracking,
            guest_ended,
            round_since,
            rounds_since,
            round_done,
            precopy,
        } = self;
        // Of what is reported, this is what the engine itself looks at.
        let rounds = progress.rounds.last().map(|last| last.round);
        (progress.state, rounds, progress.pages_remaining, progress.round_pages, actions.len()).hash(state);
        (keepalive, deadline, tracking, guest_ended, round_since, rounds_since, round_done, precopy).hash(state);
    }
}

/// Warnings kept for the report; more are dropped.
const WARNINGS_MAX: usize = 32;

impl Source {
    /// Begins to move a guest: the first actions are there at once.
    ///
    /// # Errors
    /// A setting is out of range.
    pub fn new(now: Instant, config: SourceConfig) -> Result<Source, Misuse> {
        let mut core = Core::new(now, config)?;
        core.journal(JournalRecordKind::Started, "");
        core.patience(core.config.deadlines.host);
        Ok(Source { core, state: State::Starting })
    }

    /// Goes on with a guest of which the journal says only that it was released: asks the destination.
    ///
    /// # Errors
    /// A setting is out of range.
    pub fn in_doubt(now: Instant, config: SourceConfig) -> Result<Source, Misuse> {
        let mut core = Core::new(now, config)?;
        core.keepalive.lose();
        let words = "the agent was restarted after the guest was released".to_owned();
        let state = ending::doubt(&mut core, words, true);
        core.progress.state = state.name();
        Ok(Source { core, state })
    }

    /// Something happened.
    pub fn handle(&mut self, now: Instant, event: SourceEvent) {
        if self.is_done() {
            return;
        }
        self.core.now = now;
        self.core.progress.total = now.since(self.core.started);
        let Some(event) = self.core.sift(event) else { return };
        let before = self.state.name();
        let input = SourceInput::of(&event);
        let rule = source_rule(before, input);
        let state = std::mem::replace(&mut self.state, State::Done);
        self.state = match rule {
            Rule::Ignored => state,
            Rule::Next(_) => state.step(&mut self.core, event),
            Rule::Violation(_) => {
                let words = format!("the destination sent {} in the state {before}, where it has no place", words_of(&event));
                state.fail(&mut self.core, Code::Violation, words, Side::Source)
            }
            Rule::Misuse(_) => {
                let words = format!("this host answered {input} in the state {before}, where it was not asked");
                state.fail(&mut self.core, Code::Internal, words, Side::Source)
            }
        };
        let after = self.state.name();
        debug_assert!(
            match rule {
                Rule::Ignored => after == before,
                Rule::Next(to) | Rule::Violation(to) | Rule::Misuse(to) => to.contains(&after),
            },
            "{before} + {input} led to {after}, which the table does not have"
        );
        self.core.progress.state = after;
    }

    /// The next thing to do, until there is none.
    pub fn poll(&mut self) -> Option<SourceAction> {
        self.core.actions.pop_front()
    }

    /// When to call [`Source::handle`] with [`SourceEvent::Timer`], if nothing else happens before.
    #[must_use]
    pub fn timeout(&self) -> Option<Instant> {
        if self.is_done() {
            return None;
        }
        [self.core.deadline, self.core.keepalive.timeout()].into_iter().flatten().min()
    }

    /// The state.
    #[must_use]
    pub fn state(&self) -> SourceState {
        self.state.name()
    }

    /// What is known so far.
    #[must_use]
    pub fn progress(&self) -> &Progress {
        &self.core.progress
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
        let state = self.state();
        if state.is_revocable() {
            return Ok(());
        }
        Err(match state {
            SourceState::Releasing | SourceState::Committing => {
                "the guest is being handed over: it is released, and only the destination can say what became of it"
            }
            SourceState::InDoubt => "the guest was released and the destination does not answer: its verdict is awaited",
            SourceState::GivingBack | SourceState::Aborting => "it is being given up already",
            SourceState::Committed => "the guest runs at the destination already",
            _ => "it is over already",
        }
        .to_owned())
    }
}

fn words_of(event: &SourceEvent) -> &'static str {
    match event {
        SourceEvent::Message(message) => message.name(),
        _ => "something",
    }
}

fn check_setting(good: bool, setting: &'static str, found: impl ToString, wants: &'static str) -> Result<(), Misuse> {
    if good { Ok(()) } else { Err(Misuse::Setting { setting, found: found.to_string(), wants }) }
}

impl Core {
    fn new(now: Instant, config: SourceConfig) -> Result<Core, Misuse> {
        check_setting((1..=LANES_MAX).contains(&config.lanes), "lanes", config.lanes, "1 to 16")?;
        let rounds = config.policy.rounds_max;
        check_setting((1..ROUNDS_MAX).contains(&rounds), "rounds_max", rounds, "1 to 9999")?;
        let (interval, silence) = (config.keepalive, config.peer_silence_max);
        check_setting(!interval.is_zero(), "keepalive", 0, "more than zero")?;
        check_setting(silence > interval, "peer_silence_max", format!("{silence:?}"), "longer than keepalive")?;
        let progress = Progress { course: config.course, ..Progress::new(config.vm.memory.bytes()) };
        Ok(Core {
            now,
            started: now,
            actions: VecDeque::new(),
            progress,
            keepalive: Keepalive::new(now, interval, silence),
            deadline: None,
            tracking: false,
            guest_ended: false,
            round_since: now,
            rounds_since: now,
            round_done: 0,
            precopy: Precopy::new(config.policy.clone()),
            config,
        })
    }

    /// Takes keepalives and timers that mean nothing to the states; turns silence into a lost link.
    fn sift(&mut self, event: SourceEvent) -> Option<SourceEvent> {
        match event {
            SourceEvent::Message(message) => {
                self.keepalive.heard(self.now);
                match message {
                    Message::Keepalive { nonce } => {
                        self.send(Message::KeepaliveAck { nonce });
                        None
                    }
                    // Keys are the link's business; the driver has seen them.
                    Message::KeepaliveAck { .. } | Message::Keys(_) => None,
                    Message::Verdict(answer) => Some(SourceEvent::Verdict(answer)),
                    other => Some(SourceEvent::Message(other)),
                }
            }
            SourceEvent::Timer => self.timer(),
            SourceEvent::LinkLost(words) => {
                self.keepalive.lose();
                Some(SourceEvent::LinkLost(words))
            }
            SourceEvent::HostFailed { task, words } => {
                self.guest_ended |= task == HostTask::Guest;
                Some(SourceEvent::HostFailed { task, words })
            }
            other => Some(other),
        }
    }

    fn timer(&mut self) -> Option<SourceEvent> {
        if let Some(silence) = self.keepalive.lost(self.now) {
            self.keepalive.lose();
            return Some(SourceEvent::LinkLost(format!("nothing was heard from the destination for {} s", silence.as_secs())));
        }
        // Hello is the first thing that a destination hears.
        if let Some(nonce) = self.keepalive.due(self.now)
            && self.progress.state != SourceState::Starting
        {
            self.send(Message::Keepalive { nonce });
        }
        self.deadline.filter(|deadline| *deadline <= self.now)?;
        self.deadline = None;
        Some(SourceEvent::Timer)
    }

    fn act(&mut self, action: SourceAction) {
        self.actions.push_back(action);
    }

    /// Sends `message`, unless there is no link any more.
    fn send(&mut self, message: Message) {
        if self.keepalive.linked() {
            self.keepalive.sent(self.now);
            self.act(SourceAction::Send(message));
        }
    }

    fn journal(&mut self, kind: JournalRecordKind, words: &str) {
        let (migration, generation, vm, peer) =
            (self.config.migration, self.config.generation, self.config.vm.id, self.config.peer);
        let words = fit(words, WORDS_BYTES_MAX);
        self.act(SourceAction::Journal(JournalRecord { kind, migration, generation, vm, peer, words }));
    }

    /// From now on, the state waits this long.
    fn patience(&mut self, wait: Duration) {
        self.deadline = Some(self.now.after(wait));
    }

    fn close_link(&mut self) {
        self.keepalive.lose();
        self.act(SourceAction::CloseLink);
    }

    fn warn(&mut self, words: String) {
        if self.progress.warnings.len() < WARNINGS_MAX {
            self.progress.warnings.push(fit(&words, WORDS_BYTES_MAX));
        }
    }

    fn done(&mut self, outcome: SourceOutcome) -> State {
        self.deadline = None;
        self.act(SourceAction::Done(outcome));
        State::Done
    }

    fn send_round(&mut self, round: u32, pages: PageSet, last: bool) {
        let count = pages.count();
        self.round_since = self.now;
        (self.progress.round, self.progress.round_pages, self.progress.pages_remaining) = (round, count, count);
        self.act(SourceAction::SendPages { round, pages, last });
    }
}

impl State {
    fn name(&self) -> SourceState {
        match self {
            State::Starting => SourceState::Starting,
            State::Preamble => SourceState::Preamble,
            State::Preparing(_) => SourceState::Preparing,
            State::OpeningLanes => SourceState::OpeningLanes,
            State::Tracking => SourceState::Tracking,
            State::Precopy(_) => SourceState::Precopy,
            State::Stopping(_) => SourceState::Stopping,
            State::Saving(_) => SourceState::Saving,
            State::LastRound(_) => SourceState::LastRound,
            State::Finalizing(_) => SourceState::Finalizing,
            State::Releasing(_) => SourceState::Releasing,
            State::Committing(_) => SourceState::Committing,
            State::InDoubt(_) => SourceState::InDoubt,
            State::GivingBack(_) => SourceState::GivingBack,
            State::Committed(_) => SourceState::Committed,
            State::Aborting(_) => SourceState::Aborting,
            State::Done => SourceState::Done,
        }
    }

    fn step(self, core: &mut Core, event: SourceEvent) -> State {
        if self.name().is_revocable()
            && let Some((code, words, by)) = failure(self.name(), core, &event)
        {
            return self.fail(core, code, words, by);
        }
        match self {
            State::Starting => rounds::starting(core),
            State::Preamble => rounds::preamble(core, event),
            State::Preparing(granted) => granted.on(core, event),
            State::OpeningLanes => rounds::lanes_open(core),
            State::Tracking => rounds::tracking_started(core),
            State::Precopy(rounds) => rounds.on(core, event),
            State::Stopping(stopping) => stopping.on(core),
            State::Saving(saving) => saving.on(core, event),
            State::LastRound(handover) => handover.on_last_round(core, event),
            State::Finalizing(handover) => handover.on_finalizing(core, event),
            State::Releasing(releasing) => releasing.on(core, event),
            State::Committing(handover) => handover.on_committing(core, event),
            State::InDoubt(doubt) => doubt.on(core, event),
            State::GivingBack(giving) => giving.on(core, event),
            State::Committed(committed) => committed.on(core, event),
            State::Aborting(aborting) => aborting.on(core, event),
            State::Done => State::Done,
        }
    }

    /// Gives up, as far as the state allows.
    fn fail(self, core: &mut Core, code: Code, words: String, by: Side) -> State {
        match self {
            State::Releasing(releasing) => releasing.without_link(core, words),
            State::Committing(_) => ending::doubt(core, words, true),
            revocable => ending::abort(core, &revocable.name(), code, &words, by),
        }
    }
}

/// What ends every revocable state, as code, words and who gave up.
fn failure(state: SourceState, core: &Core, event: &SourceEvent) -> Option<(Code, String, Side)> {
    Some(match event {
        SourceEvent::Message(Message::Abort { code, words }) => (*code, words.clone(), Side::Destination),
        SourceEvent::LinkLost(words) => (Code::LinkLost, words.clone(), Side::Source),
        SourceEvent::PeerFault { code, words } => (*code, words.clone(), Side::Source),
        SourceEvent::HostFailed { task, words } => (code_of(*task), format!("{task} failed: {words}"), Side::Source),
        SourceEvent::Cancel(words) => (Code::Cancelled, words.clone(), Side::Source),
        SourceEvent::Timer => {
            let what = waits_for(state);
            (Code::Timeout, format!("{what} took too long, {} s after the start", core.progress.total.as_secs()), Side::Source)
        }
        _ => return None,
    })
}

/// What a failed task is called on the wire.
pub(crate) fn code_of(task: HostTask) -> Code {
    match task {
        HostTask::Journal(_) => Code::Journal,
        HostTask::Lanes | HostTask::Pages => Code::LinkLost,
        HostTask::Announce => Code::Internal,
        _ => Code::VmmFailed,
    }
}

fn waits_for(state: SourceState) -> &'static str {
    match state {
        SourceState::Starting => "writing the journal",
        SourceState::Preamble => "the destination's answer",
        SourceState::Preparing => "preparing the destination",
        SourceState::OpeningLanes => "opening the lanes",
        SourceState::Tracking => "starting to track dirty pages",
        SourceState::Precopy => "a round",
        SourceState::Stopping => "pausing the guest",
        SourceState::Saving => "saving the guest's state",
        SourceState::LastRound => "the last round",
        _ => "loading the guest's state at the destination",
    }
}
