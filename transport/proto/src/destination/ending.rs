//! The destination from `ready` to its end: committed and running, or discarded.
//! Two rules hold it together: no `Resume` after `Journal(Discarded)`, and no `Journal(Discarded)` after `Resume`.

use super::{Core, DestinationAction, DestinationEvent, DestinationOutcome, HostTask, Side, State};
use crate::commit::JournalRecordKind;
use crate::time::Instant;
use crate::wire::code::Code;
use crate::wire::limits::{ANNOUNCEMENTS_MAX, WORDS_BYTES_MAX, fit};
use crate::wire::message::{Message, Reached, RunningTimes, VerdictAnswer};
use std::time::Duration;

/// Committed: the guest is being resumed.
#[derive(Debug, Clone, Hash)]
pub(super) struct Resuming {
    since: Instant,
    until: Instant,
    words: String,
}

/// The guest runs here.
#[derive(Debug, Clone, Hash)]
pub(super) struct Running {
    announcing: bool,
    writing: bool,
    until: Instant,
}

/// `discarded` is being written.
#[derive(Debug, Clone, Hash)]
pub(super) struct Discarding {
    code: Code,
    words: String,
    by: Side,
    until: Instant,
    /// Whether Ready was said.
    ready: bool,
}

pub(super) fn us(duration: Duration) -> u64 {
    u64::try_from(duration.as_micros()).unwrap_or(u64::MAX)
}

/// Ready: Commit comes, or the word of a source in doubt, or nothing.
pub(super) fn ready(core: &mut Core, event: DestinationEvent) -> State {
    match event {
        // A source asks like this only after `released` is durable, which is all that Commit says.
        DestinationEvent::Message(Message::Commit | Message::VerdictAsk { released: true }) => {
            take(core);
            let until = core.now.after(core.config.deadlines.finish);
            core.deadline = Some(until);
            State::Resuming(Resuming { since: core.now, until, words: String::new() })
        }
        // A lost link changes nothing: the deadline that began with Ready goes on.
        _ => State::Ready,
    }
}

/// The guest is this host's: it runs, or stands still if that is what its operator wants.
fn take(core: &mut Core) {
    core.act(if core.paused { DestinationAction::Hold } else { DestinationAction::Resume });
}

impl Resuming {
    pub(super) fn on(mut self, core: &mut Core, event: DestinationEvent) -> State {
        match event {
            DestinationEvent::Resumed => return self.running(core),
            DestinationEvent::HostFailed { task: HostTask::Resume, words } => {
                core.warn(format!("resuming the guest failed: {words}"));
                self.words = words;
                core.deadline = Some(self.until.min(core.now.after(core.config.deadlines.retry)));
            }
            DestinationEvent::HostFailed { task, words } => core.warn(format!("{task} failed: {words}")),
            DestinationEvent::Timer if core.now >= self.until => return self.stuck(core),
            DestinationEvent::Timer => {
                take(core);
                core.deadline = Some(self.until);
            }
            _ => {}
        }
        State::Resuming(self)
    }

    /// The guest runs. The source hears it first, then the network, then the journal.
    fn running(self, core: &mut Core) -> State {
        if core.asked {
            core.send(Message::Verdict(VerdictAnswer::Running));
        } else {
            core.send(Message::Running(RunningTimes { resume_us: us(core.now.since(self.since)) }));
        }
        core.act(DestinationAction::Announce);
        core.journal(JournalRecordKind::Running, "");
        let until = core.now.after(core.config.deadlines.finish);
        core.deadline = Some(until);
        State::Running(Running { announcing: true, writing: true, until })
    }

    /// The VMM was told to resume, so the guest must never be given back: nobody knows that it did not run.
    fn stuck(self, core: &mut Core) -> State {
        let why = if self.words.is_empty() { "the VMM does not answer" } else { &self.words };
        let words = fit(&format!("the guest was committed to this host and could not be resumed: {why}"), WORDS_BYTES_MAX);
        core.send(Message::Abort { code: Code::VmmFailed, words: words.clone() });
        core.close_link();
        core.done(DestinationOutcome::Stuck { words })
    }
}

impl Running {
    pub(super) fn on(mut self, core: &mut Core, event: DestinationEvent) -> State {
        match event {
            DestinationEvent::Announced { announcements, cpu_us, reached } => {
                self.announcing = false;
                core.report.cpu_us = cpu_us;
                core.report.reached = Reached { words: fit(&reached.words, WORDS_BYTES_MAX), ..reached };
                core.report.announcements =
                    announcements.iter().take(ANNOUNCEMENTS_MAX).map(|line| fit(line, WORDS_BYTES_MAX)).collect();
                while core.report.announcements.iter().map(|line| line.len() + 3).sum::<usize>() > crate::record::RECORD_BYTES_MAX
                {
                    core.report.announcements.pop();
                }
            }
            DestinationEvent::Journaled(_) => self.writing = false,
            DestinationEvent::Message(Message::VerdictAsk { .. }) => core.send(Message::Verdict(VerdictAnswer::Running)),
            DestinationEvent::HostFailed { task, words } => {
                core.warn(format!("{task} failed: {words}"));
                match task {
                    HostTask::Announce => self.announcing = false,
                    HostTask::Journal(JournalRecordKind::Running) => {
                        core.deadline = Some(self.until.min(core.now.after(core.config.deadlines.retry)));
                    }
                    _ => {}
                }
            }
            DestinationEvent::Timer if core.now < self.until => {
                core.journal(JournalRecordKind::Running, "");
                core.deadline = Some(self.until);
            }
            DestinationEvent::Timer => {
                core.warn("the announcements or the journal took too long; the guest runs here".to_owned());
                (self.announcing, self.writing) = (false, false);
            }
            _ => {}
        }
        if self.announcing || self.writing {
            return State::Running(self);
        }
        if !core.asked {
            core.send(Message::Finished(core.report.clone()));
        }
        if core.keepalive.linked() {
            core.close_link();
        }
        core.done(DestinationOutcome::Running)
    }
}

/// Gives up before `ready` was written: nothing was promised to anyone.
pub(super) fn drop_unready(core: &mut Core, code: Code, words: &str, by: Side) -> State {
    let words = fit(words, WORDS_BYTES_MAX);
    if core.prepared {
        core.act(DestinationAction::Discard);
    }
    if by == Side::Destination {
        core.send(Message::Abort { code, words: words.clone() });
    }
    core.close_link();
    core.done(DestinationOutcome::Discarded { code, words, by, durable: false, left: false })
}

/// Gives up when `ready` may be durable, or the source asks for a verdict: first the journal says so, then the VMM
/// goes, then the source hears it. Commit has no effect any more. `ready`: whether Ready was said.
pub(super) fn discard(core: &mut Core, code: Code, words: &str, by: Side, ready: bool) -> State {
    let words = fit(words, WORDS_BYTES_MAX);
    core.journal(JournalRecordKind::Discarded, &words);
    let until = core.now.after(core.config.deadlines.finish);
    core.deadline = Some(until);
    State::Discarding(Discarding { code, words, by, until, ready })
}

impl Discarding {
    pub(super) fn on(self, core: &mut Core, event: DestinationEvent) -> State {
        match event {
            DestinationEvent::Journaled(_) => return self.end(core, true),
            DestinationEvent::HostFailed { task: HostTask::Journal(JournalRecordKind::Discarded), words } => {
                core.warn(format!("writing the discard into the journal failed: {words}"));
                core.deadline = Some(self.until.min(core.now.after(core.config.deadlines.retry)));
            }
            DestinationEvent::Timer if core.now >= self.until => return self.end(core, false),
            DestinationEvent::Timer => {
                core.journal(JournalRecordKind::Discarded, &self.words);
                core.deadline = Some(self.until);
            }
            _ => {}
        }
        State::Discarding(self)
    }

    fn end(self, core: &mut Core, durable: bool) -> State {
        // Where `ready` is found after a restart and this is not, only the VMM can show that the guest never ran; but a source
        // that was never told Ready has released nothing and says so, and the VMM's memory is free at once.
        let left = core.prepared && !durable && self.ready;
        if core.prepared && !left {
            core.act(DestinationAction::Discard);
        }
        if core.asked {
            core.send(Message::Verdict(if durable { VerdictAnswer::Discarded } else { VerdictAnswer::Pending }));
        } else if self.by == Side::Destination {
            core.send(Message::Abort { code: self.code, words: self.words.clone() });
        }
        core.close_link();
        let Discarding { code, words, by, .. } = self;
        core.done(DestinationOutcome::Discarded { code, words, by, durable, left })
    }
}
