//! The source from its first word until the guest is to be stopped: preamble, lanes, rounds.

use super::{Core, Course, RoundSent, Side, SourceAction, SourceEvent, State, check_setting, ending, handover};
use crate::bitmap::PageSet;
use crate::memory::PAGE_BYTES;
use crate::precopy::Decision;
use crate::progress::RoundProgress;
use crate::time::Instant;
use crate::wire::code::Code;
use crate::wire::frame::LaneToken;
use crate::wire::message::{Accept, Hello, Message};
use crate::wire::version;
use std::time::Duration;

/// What the destination granted.
#[derive(Debug, Clone, Hash)]
pub(super) struct Granted {
    lanes: u16,
    plaintext: bool,
    page_check: bool,
    token: LaneToken,
}

/// Rounds while the guest runs.
#[derive(Debug, Clone, Hash)]
pub(super) struct Rounds {
    round: u32,
    step: Step,
}

#[derive(Debug, Clone, Hash)]
enum Step {
    /// Pages are on their way.
    Sending,
    /// The round is sent; what did the guest write meanwhile?
    Fetching { sent: RoundSent, took: Duration, at: Instant },
    /// The guest shall be stopped, and the destination has not got the whole round yet: what is in flight would
    /// lengthen the downtime, and the true rate is not known before it is there.
    Draining { sent: RoundSent, dirty: PageSet },
    /// It has; what did the guest write meanwhile, beside `dirty`?
    Topping { dirty: PageSet },
}

fn ms_saturating(duration: Duration) -> u32 {
    u32::try_from(duration.as_millis()).unwrap_or(u32::MAX)
}

/// `started` is durable.
pub(super) fn starting(core: &mut Core) -> State {
    let config = &core.config;
    let hello = Hello {
        versions: version::offer(),
        vm: config.vm.clone(),
        lanes: config.lanes,
        plaintext_lanes: config.plaintext_lanes,
        link: config.link.clone(),
        page_check: config.page_check,
        downtime_target_ms: ms_saturating(config.policy.downtime_target),
        downtime_ms_max: ms_saturating(config.policy.downtime_max),
        keepalive_ms: ms_saturating(config.keepalive),
        source_build: config.build.clone(),
    };
    if let Some(ticket) = core.config.ticket.clone() {
        core.send(Message::Ticket(ticket));
    }
    core.send(Message::Hello(Box::new(hello)));
    core.patience(core.config.deadlines.answer);
    State::Preamble
}

/// The destination answers Hello.
pub(super) fn preamble(core: &mut Core, event: SourceEvent) -> State {
    match event {
        SourceEvent::Message(Message::Accept(accept)) => match granted(core, &accept) {
            Ok(granted) => {
                (core.progress.lanes, core.progress.plaintext_lanes) = (granted.lanes, granted.plaintext);
                core.patience(core.config.deadlines.prepare);
                State::Preparing(granted)
            }
            Err(words) => State::Preamble.fail(core, Code::Violation, words, Side::Source),
        },
        SourceEvent::Message(Message::Refuse(refusal)) => ending::refused(core, refusal),
        _ => State::Preamble,
    }
}

/// Nothing may be granted that was not asked for.
fn granted(core: &Core, accept: &Accept) -> Result<Granted, String> {
    let known = version::choose(&[accept.version]).is_some();
    check_setting(known, "version", accept.version, "one that was offered")
        .and(check_setting((1..=core.config.lanes).contains(&accept.lanes), "lanes", accept.lanes, "1 to what was asked for"))
        .and(check_setting(
            core.config.plaintext_lanes || !accept.plaintext_lanes,
            "plaintext_lanes",
            accept.plaintext_lanes,
            "false, as it was not asked for",
        ))
        .map_err(|error| format!("the destination's Accept: {error}"))?;
    let Accept { lanes, plaintext_lanes: plaintext, page_check, token, .. } = *accept;
    // More of it than was asked for costs time and harms nobody; less would be a downgrade.
    check_setting(page_check || !core.config.page_check, "page_check", page_check, "true, as it was asked for")
        .map_err(|error| format!("the destination's Accept: {error}"))?;
    Ok(Granted { lanes, plaintext, page_check, token })
}

impl Granted {
    /// The destination has its VMM.
    pub(super) fn on(self, core: &mut Core, _prepared: SourceEvent) -> State {
        core.progress.prepare = Some(core.progress.total);
        let Granted { lanes, plaintext, page_check, token } = self;
        core.act(SourceAction::OpenLanes { lanes, plaintext, page_check, token });
        core.patience(core.config.deadlines.lanes);
        State::OpeningLanes
    }
}

/// Where nothing goes ahead of the pause, everything is owed after it, and no write has to be noted.
pub(super) fn lanes_open(core: &mut Core) -> State {
    let all = || PageSet::full(&core.config.vm.memory);
    match core.config.course {
        Course::Precopy => {}
        Course::Quick => {
            let all = all();
            return handover::stop(core, 0, all);
        }
        Course::Paused => {
            let all = all();
            return handover::stands_still(core, all);
        }
    }
    core.tracking = true;
    core.act(SourceAction::StartTracking);
    core.patience(core.config.deadlines.host);
    State::Tracking
}

pub(super) fn tracking_started(core: &mut Core) -> State {
    core.rounds_since = core.now;
    Rounds::begin(core, 1, PageSet::full(&core.config.vm.memory))
}

impl Rounds {
    fn begin(core: &mut Core, round: u32, pages: PageSet) -> State {
        core.patience(core.round_patience(pages.count()));
        core.send_round(round, pages, false);
        State::Precopy(Rounds { round, step: Step::Sending })
    }

    pub(super) fn on(self, core: &mut Core, event: SourceEvent) -> State {
        match event {
            SourceEvent::Moving(sent) => {
                if matches!(self.step, Step::Sending) {
                    core.moving(sent);
                }
                State::Precopy(self)
            }
            SourceEvent::PagesSent(sent) => self.sent(core, sent),
            SourceEvent::Message(Message::RoundDone { round }) => self.arrived(core, round),
            SourceEvent::Dirty(dirty) => self.dirty(core, dirty),
            _ => State::Precopy(self),
        }
    }

    fn sent(self, core: &mut Core, sent: RoundSent) -> State {
        if !matches!(self.step, Step::Sending) || sent.round != self.round {
            let words = format!("the lanes say that round {} was sent while round {} is", sent.round, self.round);
            return State::Precopy(self).fail(core, Code::Internal, words, Side::Source);
        }
        let took = core.now.since(core.round_since);
        core.precopy.measure(sent.bytes_on_wire, took);
        core.progress.pages_remaining = 0;
        core.act(SourceAction::FetchDirty);
        core.patience(core.config.deadlines.host);
        State::Precopy(Rounds { step: Step::Fetching { sent, took, at: core.now }, ..self })
    }

    fn arrived(self, core: &mut Core, round: u32) -> State {
        if let Err(words) = core.round_arrived(round, self.round) {
            return State::Precopy(self).fail(core, Code::Violation, words, Side::Source);
        }
        let took = core.now.since(core.round_since);
        match self.step {
            Step::Draining { sent, dirty } if round == self.round => {
                core.precopy.measure(sent.bytes_on_wire, took);
                core.act(SourceAction::FetchDirty);
                core.patience(core.config.deadlines.host);
                State::Precopy(Rounds { step: Step::Topping { dirty }, ..self })
            }
            Step::Fetching { sent, .. } if round == self.round => {
                core.precopy.measure(sent.bytes_on_wire, took);
                State::Precopy(self)
            }
            _ => State::Precopy(self),
        }
    }

    fn dirty(self, core: &mut Core, mut more: PageSet) -> State {
        match self.step {
            Step::Fetching { sent, took, at } => {
                core.record_round(sent, took, more.count());
                core.precopy.round(more.count(), took + core.now.since(at));
                Rounds::decide(core, self.round, more, Some(sent))
            }
            Step::Topping { dirty } => {
                more.union(&dirty);
                Rounds::decide(core, self.round, more, None)
            }
            Step::Sending | Step::Draining { .. } => {
                let words = "dirty pages came that were not asked for".to_owned();
                State::Precopy(self).fail(core, Code::Internal, words, Side::Source)
            }
        }
    }

    /// `sent` is there as long as the destination may not have the whole round.
    fn decide(core: &mut Core, round: u32, dirty: PageSet, sent: Option<RoundSent>) -> State {
        let count = dirty.count();
        core.estimate(count);
        match core.precopy.decide(round, count, core.now.since(core.rounds_since)) {
            Decision::Again => Rounds::begin(core, round.saturating_add(1), dirty),
            Decision::Stop(_) => match sent {
                Some(sent) if core.round_done < round => {
                    core.patience(core.round_patience(sent.pages));
                    State::Precopy(Rounds { round, step: Step::Draining { sent, dirty } })
                }
                _ => handover::stop(core, round, dirty),
            },
            Decision::GiveUp(words) => {
                let here = State::Precopy(Rounds { round, step: Step::Topping { dirty } });
                here.fail(core, Code::NotConverging, words, Side::Source)
            }
        }
    }
}

impl Core {
    /// Whether the last round is the only one, and carries everything.
    pub(super) fn is_whole(&self) -> bool {
        self.config.course != Course::Precopy
    }

    /// How long a round of so many pages may take if its progress is not told.
    pub(super) fn round_patience(&self, pages: u64) -> Duration {
        let slow = Duration::from_secs(pages.saturating_mul(PAGE_BYTES) >> 20);
        self.config.deadlines.stall.saturating_add(slow)
    }

    pub(super) fn moving(&mut self, sent: RoundSent) {
        let gone = sent.pages.saturating_add(sent.zero_pages);
        let remaining = self.progress.round_pages.saturating_sub(gone);
        let long = match self.progress.state {
            super::SourceState::Precopy => true,
            super::SourceState::LastRound => self.is_whole(),
            _ => false,
        };
        if remaining < self.progress.pages_remaining && self.deadline.is_some() && long {
            self.patience(self.config.deadlines.stall);
        }
        self.progress.pages_remaining = remaining.min(self.progress.pages_remaining);
        self.progress.bytes_on_wire = self.bytes_of_rounds().saturating_add(sent.bytes_on_wire);
        self.precopy.measure(sent.bytes_on_wire, self.now.since(self.round_since));
        self.rates();
    }

    /// Notes that `round` is whole at the destination. They come in order, none twice, none early.
    pub(super) fn round_arrived(&mut self, round: u32, current: u32) -> Result<(), String> {
        if round != self.round_done.saturating_add(1) || round > current {
            let expected = self.round_done.saturating_add(1);
            return Err(format!("the destination says RoundDone({round}) where {expected} is next and {current} is being sent"));
        }
        self.round_done = round;
        Ok(())
    }

    pub(super) fn record_round(&mut self, sent: RoundSent, took: Duration, dirty_after: u64) {
        self.progress.rounds.push(RoundProgress {
            round: sent.round,
            pages: sent.pages,
            zero_pages: sent.zero_pages,
            bytes: sent.bytes_on_wire,
            ms: took.as_secs_f64() * 1e3,
            dirty_after,
        });
        self.progress.bytes_on_wire = self.bytes_of_rounds();
    }

    /// What the rounds that are over have sent.
    fn bytes_of_rounds(&self) -> u64 {
        self.progress.rounds.iter().fold(0, |sum, round| sum.saturating_add(round.bytes))
    }

    fn rates(&mut self) {
        let ms = |duration: Duration| u64::try_from(duration.as_millis()).unwrap_or(u64::MAX);
        self.progress.rate_bytes_per_s = self.precopy.rate_bytes_per_s().unwrap_or(0);
        self.progress.dirty_rate_pages_per_s = self.precopy.dirty_rate_pages_per_s();
        self.progress.estimate_ms = Some(ms(self.precopy.downtime(self.progress.pages_remaining)));
    }

    fn estimate(&mut self, dirty: u64) {
        self.progress.pages_remaining = dirty;
        self.rates();
        self.progress.downtime_estimate_ms = self.progress.estimate_ms;
    }
}
