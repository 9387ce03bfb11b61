//! A destination's question, the other way round: was this attempt ever released? What the source answers, from its journal and
//! from whether an engine carries the attempt, and what must be durable before it says so. What the destination then does is
//! [`crate::recovery::out_of_patience`]'s. It sends nothing and writes nothing.
//!
//! `Never` is a promise. It is said when `aborted` is durable, and [`commit::may_follow`] keeps `released` from being written
//! after that: whoever holds the journal cannot break it, not an engine that hangs either.

use crate::commit::{self, JournalRecord, JournalRecordKind, SourceVerdict};
use crate::identity::{Generation, MigrationId};
use crate::recovery::Note;
use crate::wire::message::ReleasedAnswer;

/// What a source does about a destination's question.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Asked {
    /// It says this.
    Answer(ReleasedAnswer),
    /// It writes this, if [`is_unsettled`] still holds then: if that is durable it says Never, else Open.
    Promise(Note),
}

/// What a source does about a question for `(migration, generation)`. `records` are those of the attempt with the host that
/// asks; `carried`: an engine here still carries it, and may be about to release.
#[must_use]
pub fn asked(records: &[JournalRecord], migration: MigrationId, generation: Generation, carried: bool) -> Asked {
    match commit::source_verdict(records, migration, generation) {
        SourceVerdict::NoRecord => Asked::Answer(ReleasedAnswer::Unknown),
        SourceVerdict::AskDestination | SourceVerdict::Gone => Asked::Answer(ReleasedAnswer::Released),
        SourceVerdict::GuestIsOurs if !is_unsettled(records, migration, generation) => Asked::Answer(ReleasedAnswer::Never),
        SourceVerdict::GuestIsOurs if carried => Asked::Answer(ReleasedAnswer::Open),
        SourceVerdict::GuestIsOurs => Asked::Promise(Note {
            kind: JournalRecordKind::Aborted,
            words: "the destination asked, and it was never released: it never will be",
        }),
    }
}

/// Whether the records of this attempt say that it was begun, and nothing else.
#[must_use]
pub fn is_unsettled(records: &[JournalRecord], migration: MigrationId, generation: Generation) -> bool {
    let mut of_it = records.iter().filter(|record| record.migration == migration && record.generation == generation).peekable();
    of_it.peek().is_some() && of_it.all(|record| record.kind == JournalRecordKind::Started)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::identity::{HostId, VmId};
    use JournalRecordKind::{Aborted, Ready, Released, Running, Started};

    const MIGRATION: MigrationId = MigrationId([1; 16]);

    fn asked_of(kinds: &[JournalRecordKind], carried: bool) -> Asked {
        let record = |kind: &JournalRecordKind| JournalRecord {
            kind: *kind,
            migration: MIGRATION,
            generation: Generation(7),
            vm: VmId([2; 16]),
            peer: HostId([3; 32]),
            words: String::new(),
        };
        // Records of another attempt must never count.
        let stranger = JournalRecord { generation: Generation(6), ..record(&Aborted) };
        let records: Vec<_> = kinds.iter().map(record).chain([stranger]).collect();
        asked(&records, MIGRATION, Generation(7), carried)
    }

    /// The whole table: what the journal says, with and without an engine.
    #[test]
    fn never_is_said_when_it_is_a_promise() {
        for carried in [true, false] {
            assert_eq!(asked_of(&[], carried), Asked::Answer(ReleasedAnswer::Unknown));
            assert_eq!(asked_of(&[Ready], carried), Asked::Answer(ReleasedAnswer::Unknown), "it is no source of that");
            assert_eq!(asked_of(&[Started, Released], carried), Asked::Answer(ReleasedAnswer::Released));
            assert_eq!(asked_of(&[Started, Released, Running], carried), Asked::Answer(ReleasedAnswer::Released));
            assert_eq!(asked_of(&[Started, Aborted], carried), Asked::Answer(ReleasedAnswer::Never));
            assert_eq!(asked_of(&[Started, Released, Aborted], carried), Asked::Answer(ReleasedAnswer::Never), "given back");
        }
        assert_eq!(asked_of(&[Started], true), Asked::Answer(ReleasedAnswer::Open), "it may be about to release");
        assert!(matches!(asked_of(&[Started], false), Asked::Promise(Note { kind: Aborted, .. })));
    }
}
