//! What a host does about guests that no engine carries any more: after a restart of its agent, when a VMM plugs in anew, when
//! a source asks. From what the journal says, what the VMM says, and what the other host answered, to what is to be done.
//! It does nothing itself and waits for nothing: the agent does, and so does the simulation (`tests/sim`).
//!
//! A guest is never resumed on a guess: only where this host never released it, or where the destination has durably given
//! it up, or where it was committed to this host.

use crate::commit::{self, DestinationVerdict, JournalRecord, JournalRecordKind, SourceVerdict};
use crate::identity::{Generation, MigrationId};
use crate::source::ending::MAY_HAVE_RUN;
use crate::wire::message::{ReleasedAnswer, VerdictAnswer};
use std::time::Duration;

/// First and longest wait between two questions to the other host; each is twice as long as the one before.
pub const ASK_INTERVAL: (Duration, Duration) = (Duration::from_millis(100), Duration::from_secs(5));
/// How long a VMM may take to plug in after a restart of the agent, before it is looked for.
pub const REPLUG_MAX: Duration = Duration::from_secs(5);
/// How long a VMM that lives takes at most until it has plugged in at an agent that has started: its longest pause between two
/// attempts, and a little.
pub const PLUG_IN_MAX: Duration = Duration::from_millis(1500);
/// Between two tries of what must not be given up: a record that is owed, a guest that is to run on.
pub const RETRY: Duration = Duration::from_secs(1);

/// What a VMM says of itself, as far as it matters whose its guest is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Plugged {
    /// The guest runs.
    Running,
    /// It ran here, or was committed to this host, and stands still.
    Paused,
    /// It came in and was loaded, and has never run here.
    Loaded,
    /// It is coming in: nothing of it is whole.
    Incoming,
}

impl Plugged {
    /// Whether the guest was committed to this host, if it came here by the attempt in question.
    #[must_use]
    pub fn is_taken(self) -> bool {
        matches!(self, Plugged::Running | Plugged::Paused)
    }
}

/// A record to be written, of the attempt in question.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Note {
    /// What it says.
    pub kind: JournalRecordKind,
    /// Why.
    pub words: &'static str,
}

impl Note {
    /// The record, as one of the attempt and guest of `of`.
    #[must_use]
    pub fn of(self, of: &JournalRecord) -> JournalRecord {
        JournalRecord { kind: self.kind, words: self.words.into(), ..of.clone() }
    }
}

const fn note(kind: JournalRecordKind, words: &'static str) -> Note {
    Note { kind, words }
}

/// What is to be done at the agent's start about one attempt that its journal has left open.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum AtStart {
    /// It is settled by this record.
    Settle(Note),
    /// Source: the destination is asked until it answers; see [`answered`].
    Ask,
    /// Destination: the source is asked until it answers, and its word is waited for; see [`out_of_patience`] and [`asked`].
    Wait,
    /// Nothing.
    Nothing,
}

/// What is to be done at the agent's start about the attempt `(migration, generation)`.
#[must_use]
pub fn at_start(records: &[JournalRecord], migration: MigrationId, generation: Generation) -> AtStart {
    match commit::source_verdict(records, migration, generation) {
        SourceVerdict::GuestIsOurs => {
            AtStart::Settle(note(JournalRecordKind::Aborted, "the agent was restarted before the commit; the guest stays here"))
        }
        SourceVerdict::AskDestination => AtStart::Ask,
        SourceVerdict::Gone | SourceVerdict::NoRecord => match commit::destination_verdict(records, migration, generation) {
            DestinationVerdict::Undecided => AtStart::Wait,
            _ => AtStart::Nothing,
        },
    }
}

/// What a source in doubt does with the destination's answer.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Answered {
    /// The guest runs there: note it, end its VMM here.
    Gone(Note),
    /// The guest is this host's again: note it, let it run on.
    GivenBack(Note),
    /// Ask again, for this reason.
    Again(&'static str),
}

/// What a source in doubt does with `answer`.
#[must_use]
pub fn answered(answer: VerdictAnswer) -> Answered {
    match answer {
        VerdictAnswer::Running => Answered::Gone(note(JournalRecordKind::Running, "the destination says so")),
        VerdictAnswer::Discarded => Answered::GivenBack(note(JournalRecordKind::Aborted, "the destination has given it up")),
        VerdictAnswer::Pending => Answered::Again("the destination has not decided yet; it is asked again"),
        VerdictAnswer::Unknown => {
            Answered::Again("the destination has no record of this migration, which proves nothing; it is asked again")
        }
        VerdictAnswer::MayHaveRun => Answered::Again(MAY_HAVE_RUN),
    }
}

/// Whether the attempt of `of` is the latest of its guest here; `records` are those of the guest. What is heard of an older one
/// says nothing of a VMM that is here now.
#[must_use]
pub fn is_latest(records: &[JournalRecord], of: &JournalRecord) -> bool {
    !records.iter().any(|record| record.vm == of.vm && record.generation > of.generation)
}

/// How an engine ended, as far as its attempt has to be settled in the journal.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Ended {
    /// Source: the guest runs at the destination.
    Gone,
    /// Source: the guest stays.
    Stayed,
    /// Destination: the guest runs here.
    Came,
    /// Destination: it was given up, and has surely never run here.
    GivenUp,
}

/// The record that is still owed when an engine has ended that could not write it; `records` are those of its attempt. It is
/// tried until it is durable: an attempt that stays open would be asked about after a restart, when the guest may have moved on.
#[must_use]
pub fn owed(records: &[JournalRecord], ended: Ended) -> Option<Note> {
    let settled = |record: &JournalRecord| {
        matches!(record.kind, JournalRecordKind::Running | JournalRecordKind::Discarded | JournalRecordKind::Aborted)
    };
    if records.is_empty() || records.iter().any(settled) {
        return None;
    }
    let words = "written late: the journal could not be written when it happened";
    Some(match ended {
        Ended::Gone | Ended::Came => note(JournalRecordKind::Running, words),
        Ended::Stayed => note(JournalRecordKind::Aborted, words),
        Ended::GivenUp => note(JournalRecordKind::Discarded, words),
    })
}

/// What is to be noted before a guest leaves this host: that it came. Else a source that is still in doubt about the attempt by
/// which it came would find no VMM here any more, and nobody who knows. `records` are those of the guest.
#[must_use]
pub fn before_it_leaves(records: &[JournalRecord]) -> Vec<(JournalRecord, Note)> {
    let ready = records.iter().filter(|record| record.kind == JournalRecordKind::Ready);
    let open = ready.filter(|record| {
        commit::destination_verdict(records, record.migration, record.generation) == DestinationVerdict::Undecided
            && is_latest(records, record)
    });
    open.map(|record| (record.clone(), note(JournalRecordKind::Running, "it came by this attempt, and leaves now"))).collect()
}

/// How long an agent that started `since_start` ago still waits before it lets a guest in that is not here and was: by its
/// `records`, or by a process that was noted for it and `lives`. Its VMM may not have plugged in yet.
#[must_use]
pub fn wait_before_admitting(records: &[JournalRecord], lives: bool, since_start: Duration) -> Duration {
    let was_here = lives || !records.is_empty();
    if was_here { PLUG_IN_MAX.saturating_sub(since_start) } else { Duration::ZERO }
}

/// What becomes of the guest of a VMM that has plugged in.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Fate {
    /// It is left as it is.
    Left,
    /// It is this host's: it runs on, unless its operator holds it.
    Own,
    /// Its VMM ends. `ran`: the guest has run in it, and lives elsewhere now; else it never came.
    End {
        /// Whether the VMM is told to release its guest, or to discard it.
        ran: bool,
    },
    /// It stands still until the destination has said whose it is, and gives up what only one host may hold: the destination
    /// may be waiting for that.
    Doubt,
}

/// What is to be done about a VMM that has plugged in and that nobody waited for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PluggedIn {
    /// What is written first, about the attempt of this record.
    pub note: Option<(JournalRecord, Note)>,
    /// What becomes of its guest.
    pub fate: Fate,
}

/// What is to be done about a VMM that has plugged in in this state; `records` are those of its guest, oldest first. The
/// latest attempt decides.
#[must_use]
pub fn plugged_in(records: &[JournalRecord], state: Plugged) -> PluggedIn {
    let only = |fate| PluggedIn { note: None, fate };
    let Some(last) = records.iter().max_by_key(|record| record.generation) else {
        return only(match state {
            Plugged::Paused => Fate::Own,
            // It came in, and `ready` was never written: the source has never heard of it and runs the guest.
            Plugged::Loaded => Fate::End { ran: false },
            Plugged::Running | Plugged::Incoming => Fate::Left,
        });
    };
    let (migration, generation) = (last.migration, last.generation);
    let of_last = |record: &&JournalRecord| record.migration == migration && record.generation == generation;
    let left = records.iter().filter(of_last).any(|r| matches!(r.kind, JournalRecordKind::Started | JournalRecordKind::Released));
    let noted = |kind, words, fate| PluggedIn { note: Some((last.clone(), note(kind, words))), fate };
    if left {
        return only(match (commit::source_verdict(records, migration, generation), state) {
            (SourceVerdict::AskDestination, Plugged::Running) => {
                // It stood still when it was released: only the destination's word has let it run on.
                return noted(JournalRecordKind::Aborted, "its VMM runs it: it was given back", Fate::Left);
            }
            (SourceVerdict::AskDestination, _) => Fate::Doubt,
            (SourceVerdict::Gone, _) => Fate::End { ran: true },
            (SourceVerdict::GuestIsOurs | SourceVerdict::NoRecord, Plugged::Paused) => Fate::Own,
            // Its restore ended with the agent, and nothing of it was promised.
            (SourceVerdict::GuestIsOurs | SourceVerdict::NoRecord, Plugged::Loaded) => Fate::End { ran: false },
            (SourceVerdict::GuestIsOurs | SourceVerdict::NoRecord, Plugged::Running | Plugged::Incoming) => Fate::Left,
        });
    }
    match (commit::destination_verdict(records, migration, generation), state) {
        (DestinationVerdict::Undecided, Plugged::Running) => noted(JournalRecordKind::Running, "its VMM runs it", Fate::Left),
        // Only a commit takes a guest out of the state in which it was loaded.
        (DestinationVerdict::Undecided, Plugged::Paused) => noted(JournalRecordKind::Running, "its VMM has taken it", Fate::Own),
        (DestinationVerdict::Running, Plugged::Paused | Plugged::Loaded) | (DestinationVerdict::NoRecord, Plugged::Paused) => {
            only(Fate::Own)
        }
        (DestinationVerdict::Discarded | DestinationVerdict::NoRecord, Plugged::Loaded) => only(Fate::End { ran: false }),
        _ => only(Fate::Left),
    }
}

/// What is to be noted when a VMM has ended in which the guest surely never ran and to which it was not committed; `records`
/// are those of its guest, oldest first. The latest attempt decides: where its word is awaited, the guest is given up, so that a
/// source that has released it gets it back whole. Where it may have run, nothing here can say so.
#[must_use]
pub fn vmm_ended_unrun(records: &[JournalRecord]) -> Option<(JournalRecord, Note)> {
    let last = records.iter().max_by_key(|record| record.generation)?;
    let open = commit::destination_verdict(records, last.migration, last.generation) == DestinationVerdict::Undecided;
    let words = "its VMM ended before the guest ran here";
    open.then(|| (last.clone(), note(JournalRecordKind::Discarded, words)))
}

/// A guest at this host, as the one who asks about it is told.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct GuestHere {
    /// Whether something is under way with it: then that decides.
    pub claimed: bool,
    /// What its VMM says; `None`: it is not plugged in, or does not say.
    pub plugged: Option<Plugged>,
}

/// What a destination does about a source's question that no engine answers.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Asked {
    /// It says this.
    Answer(VerdictAnswer),
    /// It lets the guest run, or be held: if that succeeds it notes this and says that it runs, else that it is undecided.
    TakeUp(Note),
    /// It notes this: if that is durable the VMM ends, and it says that the guest was given up, else that it is undecided.
    Discard(Note),
}

/// What a destination does about a question for `(migration, generation)`. `records` are those of the attempt with the host
/// that asks; `released` is what it says; `guest` is the guest here, `None` if it has no VMM: none is plugged in, and the
/// process that was made for it is gone.
#[must_use]
pub fn asked(
    records: &[JournalRecord],
    migration: MigrationId,
    generation: Generation,
    released: bool,
    guest: Option<GuestHere>,
) -> Asked {
    let answer = commit::answer(records, migration, generation);
    if answer != VerdictAnswer::Pending {
        return Asked::Answer(answer);
    }
    let asked_back = note(JournalRecordKind::Discarded, "the source asked for it back");
    let Some(guest) = guest else {
        // A source that asks like this has not said Commit and never will, so the guest did not run here.
        return if released { Asked::Answer(VerdictAnswer::MayHaveRun) } else { Asked::Discard(asked_back) };
    };
    if guest.claimed {
        // Its driver has not ended yet and decides.
        return Asked::Answer(VerdictAnswer::Pending);
    }
    if guest.plugged == Some(Plugged::Incoming) {
        // `ready` is written before the memory comes. Whatever the source says of Commit, this guest never came whole.
        return Asked::Discard(asked_back);
    }
    if released || guest.plugged.is_some_and(Plugged::is_taken) {
        return Asked::TakeUp(note(JournalRecordKind::Running, "the source in doubt released it"));
    }
    if guest.plugged.is_none() {
        // The question may be old, and a later one may have made it run: nothing is given up before its VMM says that it does not.
        return Asked::Answer(VerdictAnswer::Pending);
    }
    Asked::Discard(asked_back)
}

/// What becomes of that where the journal is broken: a record that could not be taken back, above all `discarded`, may be found
/// by the next agent. So a guest that has not been taken is not let run; one that was is this host's all the same.
#[must_use]
pub fn asked_while_broken(asked: Asked, guest: Option<GuestHere>) -> Asked {
    let taken = guest.and_then(|guest| guest.plugged).is_some_and(Plugged::is_taken);
    match asked {
        Asked::TakeUp(_) if !taken => Asked::Answer(VerdictAnswer::Pending),
        asked => asked,
    }
}

/// What a destination does about a guest that was ready when the source's word has not come in time, or says Never.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum OutOfPatience {
    /// It is settled already.
    Settled,
    /// Nothing is decided before its VMM plugs in.
    Wait(&'static str),
    /// The guest is this host's: note it.
    Running(Note),
    /// It is given up: note it, and if that is durable end its VMM.
    Discard(Note),
    /// Its VMM is gone, and it may have run: nothing is noted, and nobody resumes it on a guess.
    MayHaveRun(&'static str),
}

/// What a destination does when the source's word on the attempt has not come in time, or at once when the source says Never.
/// `plugged`: there is a connection to the VMM; `says`: and it tells its state; `lives`: its process lives; `said`: what the source
/// last answered, if it did.
#[must_use]
pub fn out_of_patience(
    records: &[JournalRecord],
    migration: MigrationId,
    generation: Generation,
    plugged: bool,
    says: Option<Plugged>,
    lives: bool,
    said: Option<ReleasedAnswer>,
) -> OutOfPatience {
    if commit::destination_verdict(records, migration, generation) != DestinationVerdict::Undecided {
        return OutOfPatience::Settled;
    }
    if !plugged && lives {
        // It may have been resumed just before the agent ended; nobody may say that it was not.
        return OutOfPatience::Wait("the guest's VMM lives and does not plug in; nothing is decided before it does");
    }
    if plugged && says.is_none() {
        // What it was told before it may still do.
        return OutOfPatience::Wait("the guest's VMM does not answer; nothing is decided before it does");
    }
    if says.is_some_and(Plugged::is_taken) {
        return OutOfPatience::Running(note(JournalRecordKind::Running, "its VMM has taken it"));
    }
    if said == Some(ReleasedAnswer::Never) {
        // Commit was never said and never will be: the guest has not run here, whatever became of its VMM.
        return OutOfPatience::Discard(note(JournalRecordKind::Discarded, "the source says that it never released it"));
    }
    if !plugged {
        return OutOfPatience::MayHaveRun(match said {
            Some(ReleasedAnswer::Released) => {
                "the source has released the guest, and its VMM here is gone: whether it ran nobody can say, so only a person decides"
            }
            _ => {
                "the guest was to come here and its VMM is gone; whether it ran only the source may know, and it is asked again and again"
            }
        });
    }
    if said == Some(ReleasedAnswer::Released) {
        return OutOfPatience::Wait("the source has released the guest: it is not given up, and the source's word is waited for");
    }
    OutOfPatience::Discard(note(JournalRecordKind::Discarded, "the source's word did not come in time"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::identity::{HostId, VmId};
    use JournalRecordKind::{Aborted, Discarded, Ready, Released, Running, Started};

    const MIGRATION: MigrationId = MigrationId([1; 16]);

    fn journal(kinds: &[JournalRecordKind], generation: u64) -> Vec<JournalRecord> {
        let record = |kind: &JournalRecordKind| JournalRecord {
            kind: *kind,
            migration: MIGRATION,
            generation: Generation(generation),
            vm: VmId([2; 16]),
            peer: HostId([3; 32]),
            words: String::new(),
        };
        kinds.iter().map(record).collect()
    }

    #[test]
    fn a_start_settles_what_was_never_released_and_asks_about_the_rest() {
        let start = |kinds: &[_]| at_start(&journal(kinds, 7), MIGRATION, Generation(7));
        assert!(matches!(start(&[Started]), AtStart::Settle(Note { kind: Aborted, .. })));
        assert_eq!(start(&[Started, Released]), AtStart::Ask);
        assert_eq!(start(&[Ready]), AtStart::Wait);
        for settled in [&[][..], &[Started, Released, Running], &[Ready, Running], &[Ready, Discarded]] {
            assert_eq!(start(settled), AtStart::Nothing, "{settled:?}");
        }
    }

    #[test]
    fn only_a_durable_discard_gives_a_guest_back() {
        assert!(matches!(answered(VerdictAnswer::Discarded), Answered::GivenBack(Note { kind: Aborted, .. })));
        assert!(matches!(answered(VerdictAnswer::Running), Answered::Gone(Note { kind: Running, .. })));
        for proves_nothing in [VerdictAnswer::Pending, VerdictAnswer::Unknown, VerdictAnswer::MayHaveRun] {
            assert!(matches!(answered(proves_nothing), Answered::Again(_)), "{proves_nothing:?}");
        }
    }

    /// The whole table: what the latest attempt says, and what becomes of a guest in each state.
    #[test]
    fn the_fate_of_a_vmm_that_plugs_in() {
        let fates = |kinds: &[_]| {
            let states = [Plugged::Running, Plugged::Paused, Plugged::Loaded, Plugged::Incoming];
            states.map(|state| {
                // An older attempt must not count.
                let mut records = journal(&[Started, Released, Running], 6);
                records.extend(journal(kinds, 7));
                let records = if kinds.is_empty() { Vec::new() } else { records };
                let PluggedIn { note, fate } = plugged_in(&records, state);
                assert!(note.as_ref().is_none_or(|(of, _)| of.generation == Generation(7)));
                let fate = match fate {
                    Fate::Left => "left",
                    Fate::Own => "own",
                    Fate::End { ran: true } => "release",
                    Fate::End { ran: false } => "discard",
                    Fate::Doubt => "doubt",
                };
                note.map_or(fate.to_owned(), |(_, note)| format!("{:?}, {fate}", note.kind))
            })
        };
        assert_eq!(fates(&[]), ["left", "own", "discard", "left"]);
        assert_eq!(fates(&[Started]), ["left", "own", "discard", "left"]);
        assert_eq!(fates(&[Started, Released]), ["Aborted, left", "doubt", "doubt", "doubt"]);
        assert_eq!(fates(&[Started, Released, Running]), ["release", "release", "release", "release"]);
        assert_eq!(fates(&[Started, Released, Aborted]), ["left", "own", "discard", "left"]);
        assert_eq!(fates(&[Ready]), ["Running, left", "Running, own", "left", "left"]);
        assert_eq!(fates(&[Ready, Running]), ["left", "own", "own", "left"]);
        assert_eq!(fates(&[Ready, Discarded]), ["left", "left", "discard", "left"]);
    }

    #[test]
    fn a_question_is_answered_by_the_journal_and_decides_what_is_open() {
        let here = |claimed, plugged| Some(GuestHere { claimed, plugged });
        let asked = |kinds: &[_], released, guest| asked(&journal(kinds, 7), MIGRATION, Generation(7), released, guest);
        let loaded = here(false, Some(Plugged::Loaded));
        assert_eq!(asked(&[], true, loaded), Asked::Answer(VerdictAnswer::Unknown));
        assert_eq!(asked(&[Ready, Running], false, loaded), Asked::Answer(VerdictAnswer::Running));
        assert_eq!(asked(&[Ready, Discarded], true, loaded), Asked::Answer(VerdictAnswer::Discarded));
        assert_eq!(asked(&[Ready], true, None), Asked::Answer(VerdictAnswer::MayHaveRun));
        assert!(matches!(asked(&[Ready], false, None), Asked::Discard(_)), "Commit was never said");
        assert_eq!(asked(&[Ready], true, here(true, Some(Plugged::Loaded))), Asked::Answer(VerdictAnswer::Pending));
        assert!(matches!(asked(&[Ready], true, loaded), Asked::TakeUp(Note { kind: Running, .. })));
        assert!(matches!(asked(&[Ready], false, loaded), Asked::Discard(Note { kind: Discarded, .. })));
        for released in [false, true] {
            let asked = asked(&[Ready], released, here(false, Some(Plugged::Incoming)));
            assert!(matches!(asked, Asked::Discard(_)), "it never came whole");
        }
        let silent = here(false, None);
        assert_eq!(asked(&[Ready], false, silent), Asked::Answer(VerdictAnswer::Pending), "it may run for all that is known");
        for taken in [Plugged::Running, Plugged::Paused] {
            assert!(matches!(asked(&[Ready], false, here(false, Some(taken))), Asked::TakeUp(_)), "a guest that ran stays");
        }
    }

    #[test]
    fn a_broken_journal_lets_nothing_run_that_does_not_already() {
        let here = |plugged| Some(GuestHere { claimed: false, plugged: Some(plugged) });
        let broken = |plugged| {
            let asked = asked(&journal(&[Ready], 7), MIGRATION, Generation(7), true, here(plugged));
            asked_while_broken(asked, here(plugged))
        };
        assert_eq!(broken(Plugged::Loaded), Asked::Answer(VerdictAnswer::Pending));
        assert!(matches!(broken(Plugged::Running), Asked::TakeUp(_)));
    }

    #[test]
    fn a_guest_whose_vmm_ended_before_it_ran_is_given_up() {
        let ended = |kinds: &[_]| vmm_ended_unrun(&journal(kinds, 7)).map(|(of, note)| (of.generation.0, note.kind));
        assert_eq!(ended(&[Ready]), Some((7, Discarded)));
        for settled in [&[][..], &[Started], &[Started, Released], &[Ready, Running], &[Ready, Discarded]] {
            assert_eq!(ended(settled), None, "{settled:?}");
        }
    }

    #[test]
    fn what_could_not_be_written_is_owed() {
        let owed = |kinds: &[_], ended| owed(&journal(kinds, 7), ended).map(|note| note.kind);
        assert_eq!(owed(&[Started, Released], Ended::Gone), Some(Running));
        assert_eq!(owed(&[Started, Released], Ended::Stayed), Some(Aborted));
        assert_eq!(owed(&[Ready], Ended::Came), Some(Running));
        assert_eq!(owed(&[Ready], Ended::GivenUp), Some(Discarded));
        assert_eq!(owed(&[Ready, Running], Ended::GivenUp), None);
        assert_eq!(owed(&[], Ended::Stayed), None, "nothing was promised");
        assert_eq!(owed(&[Started, Released, Running], Ended::Gone), None);
    }

    #[test]
    fn a_guest_leaves_when_it_is_on_record_that_it_came() {
        let notes = |records: &[JournalRecord]| {
            let found = before_it_leaves(records);
            found.iter().map(|(of, note)| (of.generation.0, note.kind)).collect::<Vec<_>>()
        };
        assert_eq!(notes(&journal(&[Ready], 7)), [(7, Running)]);
        assert_eq!(notes(&journal(&[Ready, Running], 7)), []);
        assert_eq!(notes(&[journal(&[Ready], 6), journal(&[Ready], 7)].concat()), [(7, Running)], "by the latest");
    }

    #[test]
    fn an_older_attempt_says_nothing_of_a_guest_that_is_here() {
        let (old, new) = (journal(&[Started, Released], 6), journal(&[Ready], 7));
        let all = [old.clone(), new.clone()].concat();
        assert!(is_latest(&all, &new[0]) && is_latest(&old, &old[1]) && !is_latest(&all, &old[1]));
    }

    #[test]
    fn a_guest_of_before_is_let_in_when_its_vmm_had_time_to_plug_in() {
        let records = journal(&[Started, Released, Running], 7);
        assert_eq!(wait_before_admitting(&records, false, Duration::ZERO), PLUG_IN_MAX);
        assert_eq!(wait_before_admitting(&[], true, Duration::ZERO), PLUG_IN_MAX);
        assert_eq!(wait_before_admitting(&records, true, PLUG_IN_MAX), Duration::ZERO);
        assert_eq!(wait_before_admitting(&[], false, Duration::ZERO), Duration::ZERO);
    }

    #[test]
    fn what_may_run_is_not_given_up() {
        let late = |kinds: &[_], plugged, says, lives| {
            // Until the source says Never, or that it has released the guest, its word changes nothing.
            let found = [None, Some(ReleasedAnswer::Open), Some(ReleasedAnswer::Unknown)]
                .map(|said| said_late(kinds, plugged, says, lives, said));
            assert!(found[0] == found[1] && found[1] == found[2], "{found:?}");
            found[0]
        };
        assert_eq!(late(&[Ready, Running], false, None, false), OutOfPatience::Settled);
        assert!(matches!(late(&[Ready], false, None, true), OutOfPatience::Wait(_)));
        assert!(matches!(late(&[Ready], true, Some(Plugged::Running), true), OutOfPatience::Running(_)));
        assert!(matches!(late(&[Ready], true, Some(Plugged::Loaded), true), OutOfPatience::Discard(_)));
        assert!(matches!(late(&[Ready], true, None, true), OutOfPatience::Wait(_)));
        assert!(matches!(late(&[Ready], false, None, false), OutOfPatience::MayHaveRun(_)));
    }

    fn said_late(
        kinds: &[JournalRecordKind],
        plugged: bool,
        says: Option<Plugged>,
        lives: bool,
        said: Option<ReleasedAnswer>,
    ) -> OutOfPatience {
        out_of_patience(&journal(kinds, 7), MIGRATION, Generation(7), plugged, says, lives, said)
    }

    #[test]
    fn what_was_never_released_is_given_up_and_what_was_is_not() {
        let never = |kinds: &[_], plugged, says, lives| said_late(kinds, plugged, says, lives, Some(ReleasedAnswer::Never));
        assert!(matches!(never(&[Ready], false, None, false), OutOfPatience::Discard(Note { kind: Discarded, .. })));
        assert!(matches!(never(&[Ready], true, Some(Plugged::Loaded), true), OutOfPatience::Discard(_)));
        assert_eq!(never(&[Ready, Running], false, None, false), OutOfPatience::Settled);
        assert!(matches!(never(&[Ready], false, None, true), OutOfPatience::Wait(_)), "a VMM that lives may be heard yet");
        assert!(matches!(never(&[Ready], true, None, true), OutOfPatience::Wait(_)));
        // Against what its VMM shows, no word counts.
        assert!(matches!(never(&[Ready], true, Some(Plugged::Running), true), OutOfPatience::Running(_)));
        let released = |plugged, says| said_late(&[Ready], plugged, says, plugged, Some(ReleasedAnswer::Released));
        assert!(matches!(released(true, Some(Plugged::Loaded)), OutOfPatience::Wait(_)));
        assert!(matches!(released(false, None), OutOfPatience::MayHaveRun(_)));
    }
}
