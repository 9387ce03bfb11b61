//! What must hold at every moment and at the end of a world, and the planted faults that show that it is checked.
//! It changes nothing.

use crate::guest::VM;
use crate::link::Key;
use crate::world::{Entry, World};
use limosa_proto::commit::{JournalRecord, JournalRecordKind};
use limosa_proto::recovery::Plugged;

/// Rules that somebody broke on purpose, in the adapter between the engine and the simulated host.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Mutant {
    /// Commit could not be sent, so the guest is resumed.
    ResumesWhenSendFails,
    /// A record is said to be durable and was never synced.
    ForgetsSync,
    /// A rewritten journal's name is never synced.
    ForgetsNames,
    /// A rewrite keeps only what is settled.
    CompactionForgetsOpen,
    /// Lanes of an older generation may still write.
    AcceptsOldLanes,
    /// The end of the connection after Commit counts as Running.
    EofIsSuccess,
    /// The destination says that it discarded before that is durable.
    DiscardsBeforeDurable,
    /// A VMM that is gone is taken for one that never ran.
    GoneIsDiscarded,
    /// The pages that were written while the state was saved are not sent.
    DropsOwedPages,
    /// What an attempt that failed has sent is not sent again.
    SkipsWhatWasSent,
    /// The network is told when the guest is loaded.
    AnnouncesWhenLoaded,
    /// A destination that knows nothing is taken for one that discarded.
    UnknownIsDiscarded,
    /// A destination counts its own attempts only.
    ReusesGenerations,
    /// Ready is said before it is durable.
    ReadyBeforeDurable,
    /// Released is taken for durable though its write failed.
    FailedWriteIsDurable,
    /// A Commit is obeyed after Discarded.
    CommitAfterDiscarded,
    /// A restarted agent resumes what it released.
    RestartForgetsReleased,
    /// A round counts as arrived when its first lane is through.
    FirstLaneIsTheRound,
    /// A source says that it never released what it may be about to.
    NeverIsNoPromise,
    /// A source that knows nothing is taken for one that never released.
    UnknownIsNever,
    /// A destination gives a guest up that its source says it has released.
    ReleasedIsNever,
}

impl Mutant {
    pub(crate) const ALL: &'static [Mutant] = &[
        Mutant::ResumesWhenSendFails,
        Mutant::ForgetsSync,
        Mutant::ForgetsNames,
        Mutant::CompactionForgetsOpen,
        Mutant::AcceptsOldLanes,
        Mutant::EofIsSuccess,
        Mutant::DiscardsBeforeDurable,
        Mutant::GoneIsDiscarded,
        Mutant::DropsOwedPages,
        Mutant::SkipsWhatWasSent,
        Mutant::AnnouncesWhenLoaded,
        Mutant::UnknownIsDiscarded,
        Mutant::ReusesGenerations,
        Mutant::ReadyBeforeDurable,
        Mutant::FailedWriteIsDurable,
        Mutant::CommitAfterDiscarded,
        Mutant::RestartForgetsReleased,
        Mutant::FirstLaneIsTheRound,
        Mutant::NeverIsNoPromise,
        Mutant::UnknownIsNever,
        Mutant::ReleasedIsNever,
    ];
}

/// The most events, connections and journal bytes of one world: far above what any seed needs.
const QUEUE_MAX: usize = 2_000;
const CONNECTIONS_MAX: usize = 4_000;
const JOURNAL_BYTES_MAX: usize = 64 << 10;
const WARNINGS_MAX: usize = 32;

fn has(records: &[JournalRecord], key: Key, kind: JournalRecordKind) -> bool {
    records.iter().any(|record| (record.migration, record.generation) == key && record.kind == kind)
}

impl World {
    /// Whether `kind` of this attempt would survive a power cut of `host` now.
    fn durable(&self, host: usize, key: Key, kind: JournalRecordKind) -> bool {
        has(&self.hosts[host].disk.durable(), key, kind)
    }

    /// A source has been told that `released` is durable.
    pub(crate) fn check_released(&mut self, host: usize, peer: usize, key: Key) {
        if !self.durable(host, key, JournalRecordKind::Released) {
            self.fail(format!("released is not durable on host {host} when the engine is told so"));
        }
        if self.never.contains(&(host, key)) {
            self.fail(format!("host {host} released what it said that it never would"));
        }
        if !self.durable(peer, key, JournalRecordKind::Ready) {
            self.fail(format!("host {host} released the guest to host {peer}, where ready is not durable"));
        }
    }

    /// A source is about to say that it never released this, and never will.
    pub(crate) fn check_never(&mut self, host: usize, key: Key) {
        if !self.durable(host, key, JournalRecordKind::Aborted) {
            self.fail(format!("host {host} says that it never releases an attempt, and nothing durable keeps it from that"));
        }
        if !self.never.contains(&(host, key)) {
            self.never.push((host, key));
        }
    }

    /// A destination is about to let a guest run that was loaded.
    pub(crate) fn check_committed(&mut self, host: usize, peer: usize, key: Key) {
        if !self.durable(peer, key, JournalRecordKind::Released) {
            self.fail(format!("host {host} runs a guest that host {peer} has not durably released"));
        }
        if self.durable(host, key, JournalRecordKind::Discarded) && !self.durable(host, key, JournalRecordKind::Running) {
            self.fail(format!("host {host} runs a guest that it has durably discarded"));
        }
    }

    /// The network is about to be told that the guest is on `host`.
    pub(crate) fn check_announced(&mut self, host: usize, peer: usize, key: Key) {
        if !self.durable(peer, key, JournalRecordKind::Released) {
            self.fail(format!("host {host} announces a guest that host {peer} has not released"));
        }
    }

    /// A paused guest is about to run on where it was.
    pub(crate) fn check_taken_back(&mut self, host: usize) {
        let records = self.hosts[host].disk.durable();
        let Some(last) = records.iter().filter(|record| record.vm == VM).max_by_key(|record| record.generation) else { return };
        let key = (last.migration, last.generation);
        if !has(&records, key, JournalRecordKind::Released) {
            return;
        }
        if !self.durable(self.index_of(last.peer), key, JournalRecordKind::Discarded) {
            self.fail(format!("host {host} takes a guest back that it released and that nobody durably discarded"));
        }
    }

    /// After every event.
    pub(crate) fn check_always(&mut self) {
        if let Some(words) = self.guest.wrong.clone() {
            return self.fail(words);
        }
        if self.queue.len() > QUEUE_MAX || self.net.connections.len() > CONNECTIONS_MAX {
            let (queue, connections) = (self.queue.len(), self.net.connections.len());
            return self.fail(format!("memory is not bounded: {queue} events wait, {connections} connections were made"));
        }
        for host in 0..self.hosts.len() {
            let bytes = self.hosts[host].disk.bytes();
            if bytes > JOURNAL_BYTES_MAX {
                return self.fail(format!("memory is not bounded: the journal of host {host} has {bytes} bytes"));
            }
            let many = |agent: &crate::world::Agent| {
                agent.sessions.values().map(crate::world::Session::warnings).max().unwrap_or(0) > WARNINGS_MAX
                    || agent.sessions.len() > 40
                    || agent.asks.len() + agent.waits.len() > 60
            };
            if self.hosts[host].agent.as_ref().is_some_and(many) {
                return self.fail(format!("memory is not bounded: the agent of host {host} keeps too much"));
            }
        }
    }

    /// Whether nothing is under way any more anywhere.
    pub(crate) fn is_at_rest(&self) -> bool {
        let settled = |host: &crate::world::Host| {
            host.agent.as_ref().is_some_and(|agent| {
                let open = agent.asks.is_empty() && agent.waits.is_empty() && agent.owed.is_empty();
                let free = agent.entry.as_ref().is_none_or(|entry| entry.claim.is_none());
                let idle = open && agent.sessions.is_empty();
                free && idle || (self.may_be_in_doubt && self.is_long_healed())
            })
        };
        let plugged = self.guest.vmms.iter().all(|vmm| !vmm.lives || vmm.agent.is_some());
        self.hosts.iter().all(settled) && plugged
    }

    /// Whether no migration is under way.
    pub(crate) fn is_idle(&self) -> bool {
        self.hosts.iter().all(|host| {
            let free = |agent: &crate::world::Agent| agent.entry.as_ref().is_none_or(|entry| entry.claim.is_none());
            host.agent.as_ref().is_some_and(|agent| agent.sessions.is_empty() && free(agent))
        })
    }

    /// At the end, when everything is healed and at rest: exactly one host has the guest and nothing else is left.
    pub(crate) fn check_at_rest(&mut self) -> End {
        let living: Vec<usize> = (0..self.guest.vmms.len()).filter(|vmm| self.guest.vmms[*vmm].lives).collect();
        let owned: Vec<usize> = living.iter().copied().filter(|vmm| self.owns(*vmm)).collect();
        let states: Vec<String> = living.iter().map(|vmm| self.shown(*vmm)).collect();
        self.check_doubts();
        match (owned.len(), living.len()) {
            (1, 1) => {}
            (0, 0) if self.may_be_none => return End::Lost,
            (0, _) if self.may_be_in_doubt => return End::Doubt,
            (0, _) => {
                self.fail(format!("lost for ever: hosts live and talk, and nobody has the guest; VMMs: {states:?}"));
                return End::Lost;
            }
            (1, _) => self.fail(format!("something is left over beside the guest; VMMs: {states:?}")),
            _ => self.fail(format!("two owners; VMMs: {states:?}")),
        }
        for host in 0..self.hosts.len() {
            let open = self.hosts[host].agent.as_ref().map_or(0, |agent| agent.journal.unsettled().len());
            if open > 0 && !self.may_be_in_doubt {
                self.fail(format!("{open} attempts are open for ever in the journal of host {host}"));
            }
        }
        End::Whole
    }

    /// At the end: a destination is in doubt only about what its source has released and was not given back.
    fn check_doubts(&mut self) {
        let waits = |host: usize| self.hosts[host].agent.iter().flat_map(|agent| agent.waits.values());
        let open: Vec<_> =
            (0..self.hosts.len()).flat_map(|host| waits(host).map(move |wait| (host, wait.record.clone()))).collect();
        for (host, record) in open {
            let key = (record.migration, record.generation);
            let records = self.hosts[self.index_of(record.peer)].disk.durable();
            // A rewrite leaves out what was settled long ago: of that the source knows nothing any more.
            let known = records.iter().any(|record| (record.migration, record.generation) == key);
            let released = has(&records, key, JournalRecordKind::Released) && !has(&records, key, JournalRecordKind::Aborted);
            if known && !released {
                self.fail(format!("host {host} is in doubt about generation {}, which its source knows", key.1.0));
            }
        }
    }

    /// Whether the guest of this VMM runs, or is held by its operator as its agent knows.
    pub(crate) fn owns(&self, vmm: usize) -> bool {
        let held = |vmm: usize| {
            let agent = self.hosts[self.guest.vmms[vmm].host].agent.as_ref();
            agent
                .and_then(|agent| agent.entry.as_ref())
                .is_some_and(|entry| entry.plugged == Some(vmm) && entry.is_held() && entry.claim.is_none())
        };
        match self.guest.vmms[vmm].state {
            Plugged::Running => true,
            Plugged::Paused => self.guest.vmms[vmm].held && held(vmm),
            Plugged::Loaded | Plugged::Incoming => false,
        }
    }

    fn shown(&self, vmm: usize) -> String {
        let one = &self.guest.vmms[vmm];
        let entry: Option<&Entry> = self.hosts[one.host].agent.as_ref().and_then(|agent| agent.entry.as_ref());
        format!("{vmm} on host {} is {:?} held {}, its agent says {entry:?}", one.host, one.state, one.held)
    }
}

/// How a world ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum End {
    /// One host has the guest.
    Whole,
    /// The guest died with its host or VMM.
    Lost,
    /// Its VMM at the destination died when it may have run: only an operator can say.
    Doubt,
}
