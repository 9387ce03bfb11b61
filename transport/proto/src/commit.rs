//! The commit: what each side writes down, and what its journal says afterwards about who has the guest.
//! It writes no file; the agent does, and says `Journaled` when a record is durable.

use crate::identity::{Generation, HostId, MigrationId, VmId};
use crate::wire::message::VerdictAnswer;
use serde::{Deserialize, Serialize};

/// What a journal record says.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub enum JournalRecordKind {
    /// Source: this generation was begun.
    Started,
    /// Destination: the guest's VMM is made, and nothing has come yet. Written before the guest is paused: from here on a
    /// Commit may be accepted, once everything is here and loaded.
    Ready,
    /// Source: the guest is given away. The one commit point.
    Released,
    /// Either: the guest runs at the destination.
    Running,
    /// Destination: this generation's Commit will never be accepted.
    Discarded,
    /// Source: the guest stays here.
    Aborted,
}

/// One line of a host's journal.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct JournalRecord {
    /// What happened.
    pub kind: JournalRecordKind,
    /// In which migration.
    pub migration: MigrationId,
    /// In which attempt.
    pub generation: Generation,
    /// Whose guest.
    pub vm: VmId,
    /// The other host.
    pub peer: HostId,
    /// Why, for people; empty where nothing is to be said.
    pub words: String,
}

/// What a source's journal says about one generation.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum SourceVerdict {
    /// Nothing is written about it.
    NoRecord,
    /// It was never released, or was given back: the guest may run here.
    GuestIsOurs,
    /// It was released and nothing is known since: ask the destination, do not resume.
    AskDestination,
    /// It runs at the destination: never resume here.
    Gone,
}

/// What a destination's journal says about one generation.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum DestinationVerdict {
    /// Nothing is written about it: it was never ready.
    NoRecord,
    /// Ready and neither running nor discarded by the journal. If its VMM still waits, it may still be committed or
    /// discarded; if its VMM runs the guest, write `Running`; if its VMM is gone, the guest may have run here, and nothing is
    /// written: only a person can decide.
    Undecided,
    /// It runs here, or did: the source must never resume.
    Running,
    /// It was given up durably: the guest is the source's.
    Discarded,
}

fn kinds(
    records: &[JournalRecord],
    migration: MigrationId,
    generation: Generation,
) -> impl DoubleEndedIterator<Item = JournalRecordKind> {
    records.iter().filter(move |record| record.migration == migration && record.generation == generation).map(|r| r.kind)
}

/// What the journal of a source says about `(migration, generation)`. Only records of that pair count, and the
/// last one that decides wins.
#[must_use]
pub fn source_verdict(records: &[JournalRecord], migration: MigrationId, generation: Generation) -> SourceVerdict {
    kinds(records, migration, generation)
        .filter_map(|kind| match kind {
            JournalRecordKind::Started | JournalRecordKind::Aborted => Some(SourceVerdict::GuestIsOurs),
            JournalRecordKind::Released => Some(SourceVerdict::AskDestination),
            JournalRecordKind::Running => Some(SourceVerdict::Gone),
            JournalRecordKind::Ready | JournalRecordKind::Discarded => None,
        })
        .next_back()
        .unwrap_or(SourceVerdict::NoRecord)
}

/// What the journal of a destination says about `(migration, generation)`.
///
/// `Running` and `Discarded` exclude each other; should a journal hold both, `Running` wins, because a guest that
/// ran here must never be given back.
#[must_use]
pub fn destination_verdict(records: &[JournalRecord], migration: MigrationId, generation: Generation) -> DestinationVerdict {
    let mut verdict = DestinationVerdict::NoRecord;
    for kind in kinds(records, migration, generation) {
        verdict = match (kind, verdict) {
            (JournalRecordKind::Running, _) | (_, DestinationVerdict::Running) => DestinationVerdict::Running,
            (JournalRecordKind::Discarded, _) | (_, DestinationVerdict::Discarded) => DestinationVerdict::Discarded,
            (JournalRecordKind::Ready, _) => DestinationVerdict::Undecided,
            (_, before) => before,
        };
    }
    verdict
}

/// What a destination without a living engine answers to `VerdictAsk`, by its journal alone.
#[must_use]
pub fn answer(records: &[JournalRecord], migration: MigrationId, generation: Generation) -> VerdictAnswer {
    match destination_verdict(records, migration, generation) {
        DestinationVerdict::NoRecord => VerdictAnswer::Unknown,
        DestinationVerdict::Undecided => VerdictAnswer::Pending,
        DestinationVerdict::Running => VerdictAnswer::Running,
        DestinationVerdict::Discarded => VerdictAnswer::Discarded,
    }
}

/// Whether `record` may be written behind `records`: an attempt that has ended is never released. So what a source has said of
/// an end stays true, whatever it was about to do.
#[must_use]
pub fn may_follow(records: &[JournalRecord], record: &JournalRecord) -> bool {
    use JournalRecordKind::{Aborted, Discarded, Released, Running};
    let mut before = kinds(records, record.migration, record.generation);
    record.kind != Released || !before.any(|kind| matches!(kind, Aborted | Running | Discarded))
}

/// The next generation to use for `vm`: one more than any that the journal knows.
#[must_use]
pub fn next_generation(records: &[JournalRecord], vm: VmId) -> Generation {
    let last = records.iter().filter(|record| record.vm == vm).map(|record| record.generation.0).max();
    Generation(last.unwrap_or(0).saturating_add(1))
}

#[cfg(test)]
mod tests {
    use super::*;
    use JournalRecordKind::{Aborted, Discarded, Ready, Released, Running, Started};

    const MIGRATION: MigrationId = MigrationId([1; 16]);

    fn journal(kinds: &[JournalRecordKind]) -> Vec<JournalRecord> {
        let record = |kind, generation| JournalRecord {
            kind,
            migration: MIGRATION,
            generation: Generation(generation),
            vm: VmId([2; 16]),
            peer: HostId([3; 32]),
            words: String::new(),
        };
        // Records of another generation must never count.
        let strangers = [record(Running, 6), record(Discarded, 8)];
        kinds.iter().map(|kind| record(*kind, 7)).chain(strangers).collect()
    }

    #[test]
    fn the_sources_journal_decides() {
        let said = |kinds: &[_]| source_verdict(&journal(kinds), MIGRATION, Generation(7));
        assert_eq!(said(&[]), SourceVerdict::NoRecord);
        assert_eq!(said(&[Started]), SourceVerdict::GuestIsOurs);
        assert_eq!(said(&[Started, Aborted]), SourceVerdict::GuestIsOurs);
        assert_eq!(said(&[Started, Released]), SourceVerdict::AskDestination);
        assert_eq!(said(&[Started, Released, Running]), SourceVerdict::Gone);
        assert_eq!(said(&[Started, Released, Aborted]), SourceVerdict::GuestIsOurs);
    }

    #[test]
    fn the_destinations_journal_answers() {
        let said = |kinds: &[_]| answer(&journal(kinds), MIGRATION, Generation(7));
        assert_eq!(said(&[]), VerdictAnswer::Unknown);
        assert_eq!(said(&[Ready]), VerdictAnswer::Pending);
        assert_eq!(said(&[Ready, Running]), VerdictAnswer::Running);
        assert_eq!(said(&[Ready, Discarded]), VerdictAnswer::Discarded);
        assert_eq!(said(&[Discarded]), VerdictAnswer::Discarded);
        assert_eq!(said(&[Ready, Discarded, Running]), VerdictAnswer::Running, "a guest that ran is never given back");
        assert_eq!(said(&[Ready, Discarded, Ready]), VerdictAnswer::Discarded);
    }

    #[test]
    fn what_has_ended_is_never_released() {
        let may = |kinds: &[_], kind| may_follow(&journal(kinds), &JournalRecord { kind, ..journal(&[kind]).swap_remove(0) });
        assert!(may(&[Started], Released) && may(&[], Released));
        for end in [Aborted, Running, Discarded] {
            assert!(!may(&[Started, end], Released), "{end:?}");
            assert!(may(&[Started, Released], end), "{end:?}");
        }
        let stranger = JournalRecord { generation: Generation(9), ..journal(&[Released]).swap_remove(0) };
        assert!(may_follow(&journal(&[Started, Aborted]), &stranger), "another attempt");
    }

    #[test]
    fn generations_rise() {
        assert_eq!(next_generation(&journal(&[Started]), VmId([2; 16])), Generation(9));
        assert_eq!(next_generation(&journal(&[Started]), VmId([9; 16])), Generation(1));
    }
}
