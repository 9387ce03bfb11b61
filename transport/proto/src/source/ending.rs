//! The source's ways to end: aborted, committed, in doubt, given back.

use super::{Core, Course, HostTask, Side, SourceAction, SourceEvent, SourceOutcome, State};
use crate::commit::JournalRecordKind;
use crate::state::SourceState;
use crate::time::Instant;
use crate::wire::code::Code;
use crate::wire::limits::{WORDS_BYTES_MAX, fit};
use crate::wire::message::{Message, Refusal, VerdictAnswer};

/// What a source in doubt says of that answer.
pub(crate) const MAY_HAVE_RUN: &str = "the destination's VMM is gone and the guest may have run there: what is here may be old, and only a \
                                       person can decide to go on from it";

/// Given up; the guest is being resumed if it was stopped, and the journal written.
#[derive(Debug, Clone, Hash)]
pub(super) struct Aborting {
    outcome: SourceOutcome,
    resuming: bool,
    writing: bool,
    until: Instant,
}

/// Released, and nobody answers.
#[derive(Debug, Clone, Hash)]
pub(super) struct Doubt {
    released: bool,
    words: String,
    since: Instant,
}

/// The destination has discarded: `aborted` is written, then the guest resumed.
#[derive(Debug, Clone, Hash)]
pub(super) struct GivingBack {
    words: String,
    resuming: bool,
    until: Instant,
}

/// The guest runs there.
#[derive(Debug, Clone, Hash)]
pub(super) struct Committed {
    writing: bool,
    listening: bool,
    until: Instant,
}

/// Gives up before the commit point, coming from `state`.
pub(super) fn abort(core: &mut Core, state: &SourceState, code: Code, words: &str, by: Side) -> State {
    let words = fit(words, WORDS_BYTES_MAX);
    let resuming = state.is_stopped() && !core.guest_ended && core.config.course != Course::Paused;
    if resuming {
        core.act(SourceAction::Resume);
    }
    if by == Side::Source {
        core.send(Message::Abort { code, words: words.clone() });
    }
    close(core, &words);
    let until = core.now.after(core.config.deadlines.finish);
    core.deadline = Some(until);
    let outcome = SourceOutcome::Aborted { code, words, by, guest_runs: !core.guest_ended };
    State::Aborting(Aborting { outcome, resuming, writing: true, until })
}

/// The destination refused; nothing was begun.
pub(super) fn refused(core: &mut Core, refusal: Refusal) -> State {
    close(core, &refusal.words());
    let until = core.now.after(core.config.deadlines.finish);
    core.deadline = Some(until);
    State::Aborting(Aborting { outcome: SourceOutcome::Refused(refusal), resuming: false, writing: true, until })
}

fn close(core: &mut Core, words: &str) {
    if core.tracking {
        core.act(SourceAction::StopTracking);
        core.tracking = false;
    }
    core.journal(JournalRecordKind::Aborted, words);
    core.close_link();
}

impl Aborting {
    pub(super) fn on(mut self, core: &mut Core, event: SourceEvent) -> State {
        match event {
            SourceEvent::Journaled(_) => self.writing = false,
            SourceEvent::Resumed => self.resuming = false,
            SourceEvent::HostFailed { task: HostTask::Journal(JournalRecordKind::Aborted), words } => {
                core.warn(format!("writing the abort into the journal failed: {words}"));
                self.writing = false;
            }
            SourceEvent::HostFailed { task: HostTask::Resume, words } => {
                core.warn(format!("resuming the guest failed: {words}"));
                core.deadline = Some(self.until.min(core.now.after(core.config.deadlines.retry)));
            }
            SourceEvent::Timer if core.now >= self.until => return self.give_up(core),
            SourceEvent::Timer => {
                if self.resuming {
                    core.act(SourceAction::Resume);
                }
                core.deadline = Some(self.until);
            }
            _ => {}
        }
        if self.resuming || self.writing {
            return State::Aborting(self);
        }
        core.done(self.outcome)
    }

    fn give_up(mut self, core: &mut Core) -> State {
        if let SourceOutcome::Aborted { words, guest_runs, .. } = &mut self.outcome
            && self.resuming
        {
            *guest_runs = false;
            words.push_str("; and the guest could not be resumed here");
        }
        if self.writing {
            core.warn("writing the abort into the journal took too long".to_owned());
        }
        core.done(self.outcome)
    }
}

/// Nobody knows what became of the guest: asks the destination. `released` is what it is told.
pub(super) fn doubt(core: &mut Core, words: String, released: bool) -> State {
    let words = fit(&words, WORDS_BYTES_MAX);
    core.progress.doubt = Some(words.clone());
    core.close_link();
    let doubt = Doubt { released, words, since: core.now };
    doubt.ask(core);
    State::InDoubt(doubt)
}

impl Doubt {
    fn ask(&self, core: &mut Core) {
        core.act(SourceAction::Settle { released: self.released });
        // No answer at all, not even a failure: ask anew.
        core.patience(core.config.peer_silence_max);
    }

    fn wait(self, core: &mut Core, words: &str) -> State {
        core.progress.doubt = Some(fit(&format!("{}; {words}", self.words), WORDS_BYTES_MAX));
        core.patience(core.config.deadlines.retry);
        State::InDoubt(self)
    }

    pub(super) fn on(self, core: &mut Core, event: SourceEvent) -> State {
        match event {
            SourceEvent::Message(Message::Running(_)) | SourceEvent::Verdict(VerdictAnswer::Running) => {
                core.progress.doubt = None;
                committed(core, false)
            }
            SourceEvent::Verdict(VerdictAnswer::Discarded) => {
                core.progress.doubt = None;
                give_back(core, format!("{}; the destination has discarded the guest and gives it back", self.words))
            }
            SourceEvent::Verdict(VerdictAnswer::Pending) => self.wait(core, "the destination is not done with it yet"),
            SourceEvent::Verdict(VerdictAnswer::Unknown) => self.wait(
                core,
                "the destination has no record of this migration, which proves nothing: look there whether the guest runs",
            ),
            SourceEvent::Verdict(VerdictAnswer::MayHaveRun) => self.wait(core, MAY_HAVE_RUN),
            SourceEvent::LinkLost(words) => self.wait(core, &format!("the destination cannot be asked: {words}")),
            SourceEvent::Timer => {
                if core.config.in_doubt_max.is_some_and(|most| core.now >= self.since.after(most)) {
                    let words = core.progress.doubt.clone().unwrap_or(self.words);
                    return core.done(SourceOutcome::InDoubt { words });
                }
                self.ask(core);
                State::InDoubt(self)
            }
            _ => State::InDoubt(self),
        }
    }
}

fn give_back(core: &mut Core, words: String) -> State {
    let words = fit(&words, WORDS_BYTES_MAX);
    core.journal(JournalRecordKind::Aborted, &words);
    let until = core.now.after(core.config.deadlines.finish);
    core.deadline = Some(until);
    State::GivingBack(GivingBack { words, resuming: false, until })
}

impl GivingBack {
    pub(super) fn on(mut self, core: &mut Core, event: SourceEvent) -> State {
        match event {
            SourceEvent::Journaled(_) => return self.back(core),
            // The destination's word is durable and enough: after a restart it would be asked and say it again.
            SourceEvent::HostFailed { task: HostTask::Journal(JournalRecordKind::Aborted), words } => {
                core.warn(format!("writing the abort into the journal failed: {words}"));
                return self.back(core);
            }
            SourceEvent::HostFailed { task: HostTask::Resume, words } => {
                core.warn(format!("resuming the guest failed: {words}"));
                core.deadline = Some(self.until.min(core.now.after(core.config.deadlines.retry)));
            }
            SourceEvent::Resumed if self.resuming => return self.end(core, true),
            SourceEvent::Timer if core.now >= self.until && self.resuming => return self.end(core, false),
            SourceEvent::Timer => {
                // The journal does not answer, or resuming failed: it is tried until `until`, and then once more.
                self.until = self.until.max(core.now.after(core.config.deadlines.retry));
                self.resuming = false;
                return self.back(core);
            }
            _ => {}
        }
        State::GivingBack(self)
    }

    /// The guest is this host's again: it runs on, or stands still as its operator left it.
    fn back(mut self, core: &mut Core) -> State {
        if core.config.course == Course::Paused {
            return self.end(core, true);
        }
        self.resume(core);
        State::GivingBack(self)
    }

    fn resume(&mut self, core: &mut Core) {
        if self.resuming {
            return;
        }
        self.resuming = true;
        core.act(SourceAction::Resume);
        if core.tracking {
            core.act(SourceAction::StopTracking);
            core.tracking = false;
        }
        core.deadline = Some(self.until);
    }

    fn end(self, core: &mut Core, guest_runs: bool) -> State {
        let words = self.words;
        core.done(SourceOutcome::Aborted { code: Code::LinkLost, words, by: Side::Destination, guest_runs })
    }
}

/// The guest runs there: its VMM here must go. `linked`: the destination's report is still to come.
pub(super) fn committed(core: &mut Core, linked: bool) -> State {
    core.act(SourceAction::Release);
    core.tracking = false;
    core.journal(JournalRecordKind::Running, "");
    let until = core.now.after(core.config.deadlines.finish);
    core.deadline = Some(until);
    State::Committed(Committed { writing: true, listening: linked, until })
}

impl Committed {
    pub(super) fn on(mut self, core: &mut Core, event: SourceEvent) -> State {
        match event {
            SourceEvent::Journaled(_) => self.writing = false,
            SourceEvent::Message(Message::Finished(report)) => {
                core.progress.destination = Some(report);
                self.listening = false;
            }
            SourceEvent::LinkLost(words)
            | SourceEvent::PeerFault { words, .. }
            | SourceEvent::Message(Message::Abort { words, .. }) => {
                if self.listening {
                    core.warn(format!("the destination's report is missing: {words}"));
                }
                self.listening = false;
            }
            SourceEvent::HostFailed { task, words } => {
                core.warn(format!("{task} failed: {words}"));
                if task == HostTask::Journal(JournalRecordKind::Running) {
                    core.deadline = Some(self.until.min(core.now.after(core.config.deadlines.retry)));
                }
            }
            // A quick destination runs the guest before the lanes' last word is heard here; the report still wants it.
            SourceEvent::PagesSent(sent) if core.progress.rounds.last().is_none_or(|last| last.round < sent.round) => {
                core.record_round(sent, core.now.since(core.round_since), 0);
                core.progress.pages_remaining = 0;
            }
            SourceEvent::Timer if core.now < self.until => {
                core.journal(JournalRecordKind::Running, "");
                core.deadline = Some(self.until);
            }
            SourceEvent::Timer => {
                core.warn("the end was not confirmed in time by everyone; the guest runs at the destination".to_owned());
                (self.writing, self.listening) = (false, false);
            }
            _ => {}
        }
        if self.writing || self.listening {
            return State::Committed(self);
        }
        if core.keepalive.linked() {
            core.close_link();
        }
        core.done(SourceOutcome::Committed)
    }
}
