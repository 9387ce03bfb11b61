//! The source from the order to stop the guest until the destination says that it runs.
//! Everything here is inside the downtime.

use super::{Core, Course, Deadlines, HostTask, Side, SourceAction, SourceEvent, State, ending};
use crate::bitmap::PageSet;
use crate::commit::JournalRecordKind;
use crate::progress::DowntimeParts;
use crate::record::{RECORD_BYTES_MAX, RECORDS_MAX, Record, STATE_BYTES_MAX};
use crate::time::Instant;
use crate::wire::code::Code;
use crate::wire::message::{Message, ReadyTimes, RunningTimes};
use std::time::Duration;

/// The guest is being paused.
#[derive(Debug, Clone, Hash)]
pub(super) struct Stopping {
    round: u32,
    owed: PageSet,
    pause: Instant,
}

/// Its state is being saved; then the last dirty pages are read, because saving can write memory.
#[derive(Debug, Clone, Hash)]
pub(super) struct Saving {
    round: u32,
    owed: PageSet,
    pause: Instant,
    paused: Instant,
    saved: Option<(Instant, Vec<Record>)>,
}

/// The last round and the commit.
#[derive(Debug, Clone, Hash)]
pub(super) struct Handover {
    round: u32,
    pause: Instant,
    paused: Instant,
    saved: Instant,
    ready: Instant,
    times: ReadyTimes,
}

/// `released` is being written.
#[derive(Debug, Clone, Hash)]
pub(super) struct Releasing {
    handover: Handover,
    /// Why Commit cannot be sent on this link any more.
    lost: Option<String>,
}

/// Stops the guest after round `round`, with these pages owed.
pub(super) fn stop(core: &mut Core, round: u32, owed: PageSet) -> State {
    core.act(SourceAction::Pause);
    // One deadline for everything until `released`: this is for how long the guest may stand still.
    core.patience(core.config.deadlines.stopped);
    State::Stopping(Stopping { round, owed, pause: core.now })
}

/// The guest stands still already: all of its memory is owed.
pub(super) fn stands_still(core: &mut Core, owed: PageSet) -> State {
    core.act(SourceAction::Save);
    core.patience(core.config.deadlines.stopped);
    State::Saving(Saving { round: 0, owed, pause: core.now, paused: core.now, saved: None })
}

impl Stopping {
    /// It stands still.
    pub(super) fn on(self, core: &mut Core) -> State {
        core.act(SourceAction::Save);
        let Stopping { round, owed, pause } = self;
        State::Saving(Saving { round, owed, pause, paused: core.now, saved: None })
    }
}

fn check_records(records: &[Record]) -> Result<u64, String> {
    let bytes: usize = records.iter().map(|record| record.bytes.len()).sum();
    if records.len() > RECORDS_MAX || bytes > STATE_BYTES_MAX {
        let count = records.len();
        return Err(format!(
            "its state is {count} records of {bytes} bytes; at most {RECORDS_MAX} of {STATE_BYTES_MAX} are sent"
        ));
    }
    match records.iter().find(|record| record.bytes.len() > RECORD_BYTES_MAX) {
        Some(record) => Err(format!("{record:?} is larger than {RECORD_BYTES_MAX} bytes")),
        None => Ok(bytes as u64),
    }
}

impl Saving {
    pub(super) fn on(self, core: &mut Core, event: SourceEvent) -> State {
        match (event, self.saved) {
            // Everything is sent after the save, so what it wrote is among it.
            (SourceEvent::Saved(records), None) if core.is_whole() => {
                let Saving { round, owed, pause, paused, .. } = self;
                Handover::new(round, pause, paused, core.now).begin(core, owed, records)
            }
            (SourceEvent::Saved(records), None) => {
                core.act(SourceAction::FetchDirty);
                State::Saving(Saving { saved: Some((core.now, records)), ..self })
            }
            (SourceEvent::Dirty(dirty), Some((saved, records))) => {
                let Saving { round, mut owed, pause, paused, .. } = self;
                owed.union(&dirty);
                Handover::new(round, pause, paused, saved).begin(core, owed, records)
            }
            (_, saved) => {
                let words = "dirty pages or device state came that were not asked for".to_owned();
                State::Saving(Saving { saved, ..self }).fail(core, Code::Internal, words, Side::Source)
            }
        }
    }
}

impl Handover {
    /// What comes after round `round`.
    fn new(round: u32, pause: Instant, paused: Instant, saved: Instant) -> Handover {
        Handover { round: round.saturating_add(1), pause, paused, saved, ready: saved, times: ReadyTimes::default() }
    }

    /// The last pages on the lanes and the state on the control channel, side by side.
    fn begin(self, core: &mut Core, owed: PageSet, records: Vec<Record>) -> State {
        let bytes = match check_records(&records) {
            Ok(bytes) => bytes,
            Err(words) => return State::LastRound(self).fail(core, Code::VmmFailed, words, Side::Source),
        };
        if core.is_whole() {
            // All of the memory takes its time: as in pre-copy, only a round that does not move is given up.
            core.patience(core.round_patience(owed.count()));
        }
        core.send_round(self.round, owed, true);
        let count = u32::try_from(records.len()).unwrap_or(u32::MAX);
        for record in records {
            core.send(Message::Record(record));
        }
        let paused = core.config.course == Course::Paused;
        core.send(Message::RecordsEnd { count, bytes, last_round: self.round, paused });
        State::LastRound(self)
    }

    pub(super) fn on_last_round(self, core: &mut Core, event: SourceEvent) -> State {
        match event {
            SourceEvent::PagesSent(sent) if sent.round != self.round => {
                let words = format!("the lanes say that round {} was sent, the last one is {}", sent.round, self.round);
                State::LastRound(self).fail(core, Code::Internal, words, Side::Source)
            }
            SourceEvent::PagesSent(sent) => {
                core.record_round(sent, core.now.since(core.round_since), 0);
                core.progress.pages_remaining = 0;
                if core.is_whole() {
                    let Deadlines { stall, stopped, .. } = core.config.deadlines;
                    core.patience(stall.saturating_add(stopped));
                }
                State::Finalizing(self)
            }
            other => self.waiting(core, other, State::LastRound),
        }
    }

    pub(super) fn on_finalizing(self, core: &mut Core, event: SourceEvent) -> State {
        self.waiting(core, event, State::Finalizing)
    }

    fn waiting(self, core: &mut Core, event: SourceEvent, back: fn(Handover) -> State) -> State {
        match event {
            SourceEvent::Moving(sent) => {
                core.moving(sent);
                back(self)
            }
            SourceEvent::Message(Message::RoundDone { round }) => match core.round_arrived(round, self.round) {
                Ok(()) => back(self),
                Err(words) => back(self).fail(core, Code::Violation, words, Side::Source),
            },
            SourceEvent::Message(Message::Ready(_)) if core.round_done != self.round => {
                let words = format!("the destination is ready without round {}", self.round);
                back(self).fail(core, Code::Violation, words, Side::Source)
            }
            SourceEvent::Message(Message::Ready(times)) => {
                core.journal(JournalRecordKind::Released, "");
                core.patience(core.config.deadlines.host);
                let handover = Handover { ready: core.now, times, ..self };
                State::Releasing(Releasing { handover, lost: None })
            }
            _ => back(self),
        }
    }

    pub(super) fn on_committing(self, core: &mut Core, event: SourceEvent) -> State {
        match event {
            SourceEvent::Message(Message::Running(times)) => {
                // A guest that stood still before and does so after has had no downtime.
                core.progress.downtime = (core.config.course != Course::Paused).then(|| self.parts(core.now, times));
                ending::committed(core, true)
            }
            SourceEvent::Message(Message::Abort { code, words }) => {
                ending::doubt(core, format!("after Commit the destination said {code}: {words}"), true)
            }
            SourceEvent::LinkLost(words) | SourceEvent::PeerFault { words, .. } => {
                ending::doubt(core, format!("after Commit: {words}"), true)
            }
            SourceEvent::Timer => ending::doubt(core, "after Commit the destination did not answer".to_owned(), true),
            other => {
                self.late(core, other);
                State::Committing(self)
            }
        }
    }

    /// What the lanes and the host have to say when it does not matter any more.
    fn late(&self, core: &mut Core, event: SourceEvent) {
        match event {
            SourceEvent::PagesSent(sent) if sent.round == self.round => {
                core.record_round(sent, core.now.since(core.round_since), 0);
                core.progress.pages_remaining = 0;
            }
            SourceEvent::HostFailed { task, words } => core.warn(format!("{task} failed: {words}")),
            _ => {}
        }
    }

    /// The parts add up to the time from the order to pause until now.
    fn parts(&self, now: Instant, running: RunningTimes) -> DowntimeParts {
        // The destination's own times are its word: they never count for more than the time in which they must lie.
        let us = |us: u64, most: Duration| Duration::from_micros(us).min(most);
        let sending = self.ready.since(self.saved);
        let load = us(self.times.load_us, sending);
        let committing = now.since(self.ready);
        let resume = us(running.resume_us, committing);
        DowntimeParts {
            pause: self.paused.since(self.pause),
            last_round: sending.saturating_sub(load),
            state: self.saved.since(self.paused) + load,
            commit: committing.saturating_sub(resume),
            resume,
        }
    }
}

impl Releasing {
    pub(super) fn on(self, core: &mut Core, event: SourceEvent) -> State {
        match event {
            SourceEvent::Journaled(JournalRecordKind::Released) => self.released(core),
            // Whether the record is durable is not known. Commit was not said, so the destination may still be asked
            // to give the guest back; but only its durable word does it, for a restart could find the record.
            SourceEvent::HostFailed { task: HostTask::Journal(_), words } => {
                ending::doubt(core, format!("writing the release into the journal failed: {words}"), false)
            }
            SourceEvent::Timer => ending::doubt(core, "writing the release into the journal took too long".to_owned(), false),
            SourceEvent::LinkLost(words) | SourceEvent::PeerFault { words, .. } => self.without_link(core, words),
            SourceEvent::Message(Message::Abort { code, words }) => {
                self.without_link(core, format!("the destination said {code}: {words}"))
            }
            other => {
                self.handover.late(core, other);
                State::Releasing(self)
            }
        }
    }

    fn released(self, core: &mut Core) -> State {
        match self.lost {
            None => {
                core.send(Message::Commit);
                core.patience(core.config.deadlines.commit);
                State::Committing(self.handover)
            }
            Some(words) => ending::doubt(core, words, true),
        }
    }

    /// The journal's answer is still to be waited for: only then is it known what to ask the destination.
    pub(super) fn without_link(self, _core: &mut Core, words: String) -> State {
        State::Releasing(Releasing { lost: Some(self.lost.unwrap_or(words)), ..self })
    }
}
