//! What the simulated host does when an engine asks for it: VMM, journal, table of guests, as `limosa-agent`'s `SourceHost` and
//! `DestinationHost` do it. Who asks, and when, is `agent`'s.

use crate::checker::Mutant;
use crate::faults::Step;
use crate::world::{Entry, EntryState, Operation, Told, World};
use limosa_proto::commit::{JournalRecord, JournalRecordKind};
use limosa_proto::event::{DestinationAction, DestinationEvent, HostTask, SourceAction, SourceEvent};
use limosa_proto::record::Record;
use limosa_proto::recovery::Plugged;
use limosa_proto::wire::code::Code;
use limosa_proto::wire::message::{Reached, Refusal};

/// What an operation gives.
pub(crate) enum Answer {
    Done,
    Dirty(limosa_proto::bitmap::PageSet),
    /// The guest's name is taken.
    Taken,
}

/// An action in few words, for the trace.
pub(crate) fn shown(operation: &Operation) -> String {
    use limosa_proto::wire::message::Message;
    let say = |message: &Message| match message {
        Message::VerdictAsk { .. } | Message::Verdict(_) | Message::RoundDone { .. } | Message::RecordsEnd { .. } => {
            format!("says {message:?}")
        }
        Message::Abort { words, .. } => format!("says Abort: {words}"),
        message => format!("says {}", message.name()),
    };
    let write = |record: &JournalRecord| format!("writes {:?}", record.kind);
    match operation {
        Operation::Source(action) => match action {
            SourceAction::Send(message) => say(message),
            SourceAction::Journal(record) => write(record),
            SourceAction::OpenLanes { lanes, .. } => format!("opens {lanes} lanes"),
            SourceAction::SendPages { round, pages, last } => {
                format!("sends round {round}, {} pages, last {last}", pages.count())
            }
            action => format!("{action:?}"),
        },
        Operation::Destination(action) => match action {
            DestinationAction::Send(message) => say(message),
            DestinationAction::Journal(record) => write(record),
            DestinationAction::Check(_) => "checks".to_owned(),
            DestinationAction::Load { paused, .. } => format!("loads the state, paused {paused}"),
            action => format!("{action:?}"),
        },
    }
}

/// What an operation is called, as a fault point and as a task.
pub(crate) fn step_and_task(operation: &Operation) -> (Step, HostTask) {
    use JournalRecordKind as K;
    match operation {
        Operation::Source(action) => match action {
            SourceAction::StartTracking => (Step::StartTracking, HostTask::Tracking),
            SourceAction::StopTracking => (Step::StopTracking, HostTask::Tracking),
            SourceAction::FetchDirty => (Step::FetchDirty, HostTask::FetchDirty),
            SourceAction::Pause => (Step::Pause, HostTask::Pause),
            SourceAction::Save => (Step::Save, HostTask::Save),
            SourceAction::Resume => (Step::SourceResume, HostTask::Resume),
            SourceAction::Journal(record) => {
                let step = match record.kind {
                    K::Started => Step::Started,
                    K::Released => Step::Released,
                    K::Running => Step::SourceRunning,
                    _ => Step::Aborted,
                };
                (step, HostTask::Journal(record.kind))
            }
            _ => (Step::Release, HostTask::Release),
        },
        Operation::Destination(action) => match action {
            DestinationAction::Check(_) => (Step::Check, HostTask::Check),
            DestinationAction::Prepare { .. } => (Step::Prepare, HostTask::Prepare),
            DestinationAction::Load { .. } => (Step::Load, HostTask::Load),
            DestinationAction::Resume | DestinationAction::Hold => (Step::DestinationResume, HostTask::Resume),
            DestinationAction::Announce => (Step::Announce, HostTask::Announce),
            DestinationAction::Journal(record) => {
                let step = match record.kind {
                    K::Ready => Step::Ready,
                    K::Running => Step::DestinationRunning,
                    _ => Step::Discarded,
                };
                (step, HostTask::Journal(record.kind))
            }
            _ => (Step::Discard, HostTask::Discard),
        },
    }
}

/// To let a VMM go always succeeds: it is killed if it does not listen.
pub(crate) fn is_infallible(task: HostTask) -> bool {
    matches!(task, HostTask::Discard | HostTask::Release)
}

impl World {
    /// What the engine hears of an operation.
    pub(crate) fn answer(&mut self, operation: Operation, task: HostTask, done: Result<Answer, String>) -> Option<Told> {
        let lies = self.mutant == Some(Mutant::FailedWriteIsDurable) && matches!(task, HostTask::Journal(_));
        match operation {
            Operation::Source(action) => {
                let failed = |words| SourceEvent::HostFailed { task, words };
                let event = match (action, done) {
                    (SourceAction::Journal(record), Err(_)) if lies => SourceEvent::Journaled(record.kind),
                    (_, Err(words)) => failed(words),
                    (SourceAction::StartTracking, _) => SourceEvent::TrackingStarted,
                    (SourceAction::FetchDirty, Ok(Answer::Dirty(pages))) => SourceEvent::Dirty(pages),
                    (SourceAction::Pause, _) => SourceEvent::Paused,
                    (SourceAction::Save, _) => {
                        SourceEvent::Saved(vec![Record { kind: 1, version: 1, instance: 0, bytes: vec![1, 2, 3] }])
                    }
                    (SourceAction::Journal(record), _) => SourceEvent::Journaled(record.kind),
                    (SourceAction::Resume, _) => SourceEvent::Resumed,
                    _ => return None,
                };
                Some(Told::Source(event))
            }
            Operation::Destination(action) => {
                let event = match (action, done) {
                    (DestinationAction::Check(_), Ok(Answer::Taken)) => {
                        DestinationEvent::Refuse(Refusal::one(Code::NameTaken, "it is here already"))
                    }
                    (DestinationAction::Journal(record), Err(_)) if lies => DestinationEvent::Journaled(record.kind),
                    (_, Err(words)) => DestinationEvent::HostFailed { task, words },
                    (DestinationAction::Check(_), _) => DestinationEvent::Admitted,
                    (DestinationAction::Prepare { .. }, _) => DestinationEvent::Prepared { populated_ms: 0 },
                    (DestinationAction::Load { .. }, _) => DestinationEvent::Loaded,
                    (DestinationAction::Journal(record), _) => DestinationEvent::Journaled(record.kind),
                    (DestinationAction::Resume | DestinationAction::Hold, _) => DestinationEvent::Resumed,
                    (DestinationAction::Announce, _) => {
                        DestinationEvent::Announced { announcements: vec![], cpu_us: 0, reached: Reached::default() }
                    }
                    _ => return None,
                };
                Some(Told::Destination(event))
            }
        }
    }

    /// Does what is asked of the host.
    pub(crate) fn effect(&mut self, host: usize, number: u64, operation: &Operation) -> Result<Answer, String> {
        match operation {
            Operation::Source(action) => self.effect_source(host, number, action),
            Operation::Destination(action) => self.effect_destination(host, number, action),
        }
    }

    /// The VMM that a session's guest is plugged in by.
    fn plugged(&self, host: usize) -> Result<usize, String> {
        let entry = self.hosts[host].agent.as_ref().and_then(|agent| agent.entry.as_ref());
        entry.and_then(|entry| entry.plugged).ok_or_else(|| "the VMM is not plugged in".to_owned())
    }

    fn effect_source(&mut self, host: usize, number: u64, action: &SourceAction) -> Result<Answer, String> {
        let vmm = self.plugged(host);
        match action {
            SourceAction::Journal(record) => return self.journal(host, number, record),
            SourceAction::Release => {}
            SourceAction::StartTracking => self.guest.track(vmm?, true),
            SourceAction::StopTracking => self.guest.track(vmm?, false),
            SourceAction::FetchDirty => {
                let vmm = vmm?;
                let dirty = self.guest.fetch_dirty(vmm)?;
                if self.mutant == Some(Mutant::DropsOwedPages) && self.guest.vmms[vmm].state == Plugged::Paused {
                    return Ok(Answer::Dirty(limosa_proto::bitmap::PageSet::empty(&crate::guest::map())));
                }
                return Ok(Answer::Dirty(dirty));
            }
            SourceAction::Pause => self.guest.pause(vmm?)?,
            SourceAction::Save => self.guest.save(vmm?)?,
            SourceAction::Resume => {
                self.run_here(host, vmm?)?;
                self.set_state(host, EntryState::Running);
            }
            _ => {}
        }
        Ok(Answer::Done)
    }

    fn effect_destination(&mut self, host: usize, number: u64, action: &DestinationAction) -> Result<Answer, String> {
        match action {
            DestinationAction::Check(_) => {
                // One that lives and has not plugged in is not known, and its guest is not let in beside it.
                let silent = self.noted_lives(host);
                let agent = self.hosts[host].agent.as_mut().unwrap();
                if agent.entry.is_some() || silent {
                    return Ok(Answer::Taken);
                }
                agent.entry = Some(Entry {
                    plugged: None,
                    process: None,
                    state: EntryState::Incoming,
                    claim: Some(number),
                    may_have_run: false,
                });
            }
            DestinationAction::Prepare { .. } => {
                let vmm = self.guest.prepare(host);
                self.guest.vmms[vmm].agent = self.incarnation(host);
                self.hosts[host].process_file = Some(vmm);
                let session = self.session(host, number).unwrap();
                (session.vmm, session.launched) = (Some(vmm), true);
                if let Some(entry) = self.hosts[host].agent.as_mut().and_then(|agent| agent.entry.as_mut()) {
                    (entry.plugged, entry.process) = (Some(vmm), Some(vmm));
                }
            }
            DestinationAction::Load { paused, .. } => {
                let vmm = self.plugged(host)?;
                self.guest.load(vmm, *paused)?;
            }
            DestinationAction::Journal(record) => return self.journal(host, number, record),
            DestinationAction::Resume | DestinationAction::Hold => {
                let vmm = self.plugged(host)?;
                self.take(host, number, vmm, *action == DestinationAction::Hold)?;
            }
            DestinationAction::Announce => {
                let session = self.session(host, number).unwrap();
                let (peer, key) = (session.peer, session.key);
                self.check_announced(host, peer, key);
                self.unclaim(host, number);
            }
            DestinationAction::Discard => self.discard(host, number),
            _ => {}
        }
        Ok(Answer::Done)
    }

    /// The guest is committed to this host: it runs here, or is held.
    fn take(&mut self, host: usize, number: u64, vmm: usize, hold: bool) -> Result<(), String> {
        let session = self.session(host, number).unwrap();
        let (peer, key) = (session.peer, session.key);
        self.check_committed(host, peer, key);
        if hold {
            self.guest.hold(vmm)?;
            self.set_state(host, EntryState::Held);
        } else {
            self.run_here(host, vmm)?;
            self.set_state(host, EntryState::Running);
        }
        Ok(())
    }

    /// Ends the incoming VMM of a session that has not come.
    fn discard(&mut self, host: usize, number: u64) {
        let agent = self.hosts[host].agent.as_mut().unwrap();
        if agent.entry.as_ref().is_none_or(|entry| entry.claim != Some(number)) {
            return;
        }
        let process = agent.entry.take().and_then(|entry| entry.process);
        self.hosts[host].process_file = None;
        if let Some(vmm) = process {
            self.end_vmm(vmm);
        }
    }

    /// Writes a record, and does what goes with it.
    fn journal(&mut self, host: usize, number: u64, record: &JournalRecord) -> Result<Answer, String> {
        let early = match self.mutant {
            Some(Mutant::ReadyBeforeDurable) => record.kind == JournalRecordKind::Ready,
            Some(Mutant::DiscardsBeforeDurable) => record.kind == JournalRecordKind::Discarded,
            _ => false,
        };
        if early {
            return Ok(Answer::Done);
        }
        self.write(host, record)?;
        let Some(session) = self.session(host, number) else { return Ok(Answer::Done) };
        let (peer, key) = (session.peer, session.key);
        if record.kind == JournalRecordKind::Released {
            self.check_released(host, peer, key);
            // As in the agent: a VMM that does not give up what only one may hold keeps Commit from being said.
            match self.plugged(host) {
                Ok(vmm) => self.guest.give_up(vmm)?,
                Err(words) if self.process_lives(host) => return Err(words),
                Err(_) => {}
            }
        }
        Ok(Answer::Done)
    }

    /// Whether the VMM lives that was last made for the guest here, plugged in or not.
    pub(crate) fn noted_lives(&self, host: usize) -> bool {
        self.hosts[host].process_file.is_some_and(|vmm| self.guest.vmms[vmm].lives)
    }

    pub(crate) fn process_lives(&self, host: usize) -> bool {
        let entry = self.hosts[host].agent.as_ref().and_then(|agent| agent.entry.as_ref());
        entry.and_then(|entry| entry.process).is_some_and(|vmm| self.guest.vmms[vmm].lives)
    }

    pub(crate) fn write(&mut self, host: usize, record: &JournalRecord) -> Result<(), String> {
        let Some(agent) = &mut self.hosts[host].agent else { return Err("no agent".to_owned()) };
        let written = agent.journal.append(record).map_err(|error| error.to_string());
        self.log(|| format!("host {host}: journal {:?} generation {}: {written:?}", record.kind, record.generation.0));
        written
    }
}
