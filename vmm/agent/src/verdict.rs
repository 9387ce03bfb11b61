//! `limosa verdict`: the facts of both sides about one migration and, as a last resort, an operator's decision about a guest in
//! doubt, written down with who and why. What follows from facts without a person is `settle`'s and `limosa_proto::recovery`'s.

use crate::agent::Agent;
use crate::api::{ApiError, Decide, Direction, JobInfo, JobState, VerdictInfo, Whose};
use crate::asking;
use crate::noted;
use crate::settle;
use crate::vm::{Vm, VmState};
use limosa_plug::VmState as Plugged;
use limosa_proto::commit::{self, JournalRecord, JournalRecordKind};
use limosa_proto::identity::{Generation, MigrationId};
use limosa_proto::wire::message::{ReleasedAnswer, VerdictAnswer};
use std::sync::Arc;
use std::time::Duration;

/// How long the other host may take to answer; a question under way is waited for as long.
const ASK_MAX: Duration = Duration::from_secs(5);
/// How long a decision may take until it is carried out.
const CARRY_OUT_MAX: Duration = Duration::from_secs(20);

/// What the other host said, or why it could not be asked.
enum Said {
    /// The destination, to a source.
    Destination(Result<VerdictAnswer, String>),
    /// The source, to a destination.
    Source(Result<ReleasedAnswer, String>),
}

/// One migration of this host, with what its journal says.
struct Case {
    info: JobInfo,
    records: Vec<JournalRecord>,
    vm: Option<Arc<Vm>>,
    /// Whether the process of a VMM that is not known here lives, as far as was noted.
    lives: bool,
}

/// What is known; `decide` is the operator's decision, and `who` it is.
///
/// # Errors
/// There is no such job, or the decision is refused.
pub(crate) async fn verdict(agent: &Arc<Agent>, id: u64, decide: Option<Decide>, who: &str) -> Result<VerdictInfo, ApiError> {
    let case = Case::of(agent, id)?;
    if let Some(decide) = &decide {
        admissible(&case.info, decide)?;
    }
    // Nobody else asks the destination meanwhile: to ask it is as good as Commit.
    let asking = agent.jobs.asking(id);
    let _alone = tokio::time::timeout(ASK_MAX * 2, asking.lock_owned()).await;
    let case = Case::of(agent, id)?;
    let said = match case.doubtful() {
        Some(record) => Some(ask(agent, &case.info, record).await),
        None => None,
    };
    if let Some(decide) = decide {
        // It may have been settled while this waited.
        admissible(&Case::of(agent, id)?.info, &decide)?;
        let words = format!("decided by {who}: {}", decide.reason.trim());
        refuse(&case, said.as_ref(), &decide)?;
        tracing::warn!(job = id, vm = case.info.vm, whose = ?decide.whose, words, "an operator decides about a guest in doubt");
        carry_out(agent, &case, &decide, words).await?;
        return Ok(Case::of(agent, id)?.told(said.as_ref()));
    }
    Ok(case.told(said.as_ref()))
}

/// Whether it is a decision about a guest in doubt, with a reason.
fn admissible(info: &JobInfo, decide: &Decide) -> Result<(), ApiError> {
    if decide.reason.trim().is_empty() {
        return Err(ApiError::usage("reason", "a decision is written down with its reason: --reason WORDS".to_owned()));
    }
    if info.state != JobState::InDoubt {
        let state = serde_json::to_string(&info.state).unwrap_or_default();
        let words = format!("job {} is {}, not in doubt: there is nothing to decide", info.id, state.trim_matches('"'));
        return Err(ApiError::refused("not-in-doubt", words));
    }
    Ok(())
}

async fn ask(agent: &Arc<Agent>, info: &JobInfo, record: &JournalRecord) -> Said {
    let late = |who: &str| format!("the {who} did not answer within {} s", ASK_MAX.as_secs());
    if info.direction == Direction::Outgoing {
        let said = tokio::time::timeout(ASK_MAX, settle::given_up_and_asked(agent, record)).await;
        return Said::Destination(said.unwrap_or_else(|_| Err(late("destination"))));
    }
    let said = tokio::time::timeout(ASK_MAX, asking::released(agent, record)).await;
    Said::Source(said.unwrap_or_else(|_| Err(late("source"))))
}

/// Refuses what contradicts a known fact, and what rests on none.
fn refuse(case: &Case, said: Option<&Said>, decide: &Decide) -> Result<(), ApiError> {
    let contradicts = |words: &str| Err(ApiError::refused("contradicts", words.to_owned()));
    let plugged = case.plugged();
    match (decide.whose, said) {
        (Whose::Here, Some(Said::Destination(Ok(VerdictAnswer::Running)))) => {
            return contradicts("the destination says that the guest runs there");
        }
        (Whose::Gone, Some(Said::Destination(Ok(VerdictAnswer::Discarded)))) => {
            return contradicts("the destination has given the guest up for good: it is this host's");
        }
        (Whose::Here, Some(Said::Destination(Ok(VerdictAnswer::Pending)))) => {
            return contradicts(
                "the destination still holds the guest and may yet run it; `limosa verdict` there with `--decide gone`",
            );
        }
        (Whose::Gone, Some(Said::Destination(Ok(VerdictAnswer::Pending)))) => {
            return contradicts(
                "the destination still holds the guest and has not run it; `limosa verdict` there with `--decide here`",
            );
        }
        (Whose::Here, Some(Said::Source(Ok(ReleasedAnswer::Never)))) => {
            return contradicts("the source says that it never released the guest: it is the source's");
        }
        (Whose::Gone, Some(Said::Source(_)) | None) if matches!(plugged, Some(Plugged::Running | Plugged::Paused)) => {
            return contradicts("the guest's VMM here has taken it: it is this host's");
        }
        _ => {}
    }
    if decide.whose == Whose::Here && case.vm.as_ref().is_none_or(|vm| vm.has_ended()) {
        let words = if case.lives {
            "the guest's VMM on this host lives and has not plugged in yet: try again in a moment"
        } else {
            "the guest's VMM on this host has ended: there is nothing to run here; `--decide gone` ends the doubt"
        };
        return Err(ApiError::refused("no-vmm", words.to_owned()));
    }
    let known = matches!(
        (decide.whose, said),
        (Whose::Here, Some(Said::Destination(Ok(VerdictAnswer::Discarded))))
            | (Whose::Gone, Some(Said::Destination(Ok(VerdictAnswer::Running))) | Some(Said::Source(Ok(ReleasedAnswer::Never))))
    );
    if known || decide.looked {
        return Ok(());
    }
    let why = match said {
        Some(Said::Destination(Ok(VerdictAnswer::MayHaveRun))) => {
            "the destination cannot tell whether the guest ran there".to_owned()
        }
        Some(Said::Destination(Ok(_))) => "the destination has no record of this migration".to_owned(),
        Some(Said::Source(Ok(answer))) => format!("the source says: {}", asking::words(*answer)),
        Some(Said::Destination(Err(words)) | Said::Source(Err(words))) => words.clone(),
        None => "the other host was not asked".to_owned(),
    };
    let words = format!(
        "{why}: only a person can know what the other host does. Look there, make sure of it (for `here`: that it does not run \
         the guest and never will), and say so with --i-have-looked-at-the-other-host"
    );
    Err(ApiError::refused("not-known", words))
}

/// Writes the decision down and does what follows.
async fn carry_out(agent: &Arc<Agent>, case: &Case, decide: &Decide, words: String) -> Result<(), ApiError> {
    let failed = |words: String| ApiError::refused("journal", words);
    let of = case.records.last().cloned().ok_or_else(|| failed("this host's journal has no record of it".into()))?;
    let outgoing = case.info.direction == Direction::Outgoing;
    let (kind, answer) = match (outgoing, decide.whose) {
        (true, Whose::Here) => (JournalRecordKind::Aborted, VerdictAnswer::Discarded),
        (true, Whose::Gone) | (false, Whose::Here) => (JournalRecordKind::Running, VerdictAnswer::Running),
        (false, Whose::Gone) => (JournalRecordKind::Discarded, VerdictAnswer::Discarded),
    };
    let record = JournalRecord { kind, words: words.clone(), ..of };
    let (deciding, vm, id) = (Arc::clone(agent), case.vm.clone(), case.info.id);
    let here = decide.whose == Whose::Here;
    let done = tokio::task::spawn_blocking(move || {
        let open = |records: &[JournalRecord]| is_open(records, outgoing);
        if !deciding.write_if(&record, open).map_err(|error| failed(error.to_string()))? {
            let words = "it was settled at this very moment; `limosa verdict` says how".to_owned();
            return Err(ApiError::refused("not-in-doubt", words));
        }
        match vm {
            // A driver carries it still, and asks before it asks the destination again.
            Some(vm) if vm.is_claimed() => vm.decide(answer, words),
            _ => settle::decided(&deciding, id, &record, here),
        }
        Ok(())
    });
    done.await.map_err(|e| failed(e.to_string()))??;
    let mut changed = agent.jobs.watch();
    let ended = async {
        while agent.jobs.get(id).is_some_and(|job| job.state == JobState::InDoubt) && changed.changed().await.is_ok() {}
    };
    // It is written down; that it takes long changes nothing about it.
    let _ = tokio::time::timeout(CARRY_OUT_MAX, ended).await;
    Ok(())
}

/// Whether an attempt is undecided by the journal.
fn is_open(records: &[JournalRecord], outgoing: bool) -> bool {
    let Some(last) = records.last() else { return false };
    if !outgoing {
        let verdict = commit::destination_verdict(records, last.migration, last.generation);
        return verdict == commit::DestinationVerdict::Undecided;
    }
    // Where `released` could not be written the source is in doubt all the same.
    matches!(last.kind, JournalRecordKind::Started | JournalRecordKind::Released)
}

impl Case {
    fn of(agent: &Agent, id: u64) -> Result<Case, ApiError> {
        let none = || ApiError::refused("no-job", format!("there is no job {id}; `limosa jobs` lists them"));
        let info = agent.jobs.get(id).ok_or_else(none)?;
        if info.direction == Direction::Saving {
            return Err(ApiError::refused("no-journal", format!("job {id} moved no guest: it saved {}", info.vm)));
        }
        let (migration, generation) = info.attempt().map_err(|e| ApiError::refused("no-journal", format!("job {id}: {e}")))?;
        let records = agent.journal().of(migration, generation);
        let id = info.vm_id.parse().ok();
        let vm = id.and_then(|id| agent.vms.with_id(id));
        let lives = vm.is_none() && id.is_some_and(|id| noted::lives(agent, id));
        Ok(Case { info, records, vm, lives })
    }

    /// The last record of this host, where it is in doubt.
    fn doubtful(&self) -> Option<&JournalRecord> {
        self.records.last().filter(|_| self.info.state == JobState::InDoubt)
    }

    fn plugged(&self) -> Option<Plugged> {
        let connection = self.vm.as_ref()?.connection()?;
        connection.status().ok().map(|status| status.state)
    }

    fn told(&self, said: Option<&Said>) -> VerdictInfo {
        let journal =
            self.records.iter().map(|record| format!("{:?} {}", record.kind, record.words).trim().to_string()).collect();
        let vmm = match (&self.vm, self.plugged()) {
            (None, _) if self.lives => "the guest's VMM here lives and has not plugged in yet".to_owned(),
            (None, _) => "this host has no VMM of the guest".to_owned(),
            (Some(vm), _) if vm.has_ended() => "the guest's VMM here has ended".to_owned(),
            (Some(_), Some(state)) => format!("the guest's VMM here says: {}", state.words()),
            (Some(vm), None) if vm.state() == VmState::Gone => "the guest's VMM here has ended".to_owned(),
            (Some(_), None) => "the guest's VMM here lives and does not answer".to_owned(),
        };
        let other = match said {
            None => "not asked: nothing is in doubt".to_owned(),
            Some(Said::Source(Ok(answer))) => format!("the source says: {}", asking::words(*answer)),
            Some(Said::Source(Err(words))) => format!("the source cannot be asked: {words}"),
            Some(Said::Destination(Ok(VerdictAnswer::Running))) => "the destination says: it runs there".to_owned(),
            Some(Said::Destination(Ok(VerdictAnswer::Discarded))) => "the destination says: given up there for good".to_owned(),
            Some(Said::Destination(Ok(VerdictAnswer::Pending))) => "the destination says: not decided there".to_owned(),
            Some(Said::Destination(Ok(VerdictAnswer::MayHaveRun))) => {
                "the destination says: it may have run there, and its VMM is gone".to_owned()
            }
            Some(Said::Destination(Ok(_))) => "the destination has no record of it, which proves nothing".to_owned(),
            Some(Said::Destination(Err(words))) => format!("the destination cannot be asked: {words}"),
        };
        VerdictInfo { job: self.info.id, state: self.info.state, journal, other, vmm, words: self.words().to_owned() }
    }

    /// What follows from this host's journal.
    fn words(&self) -> &'static str {
        let Ok((migration, generation)) = self.info.attempt() else { return "nothing is known" };
        if self.info.direction != Direction::Outgoing {
            return match commit::destination_verdict(&self.records, migration, generation) {
                commit::DestinationVerdict::NoRecord => "this host never promised to run the guest: it is the source's",
                commit::DestinationVerdict::Undecided => {
                    "the guest was to come here: its VMM, or the source's word, decides whether it did; the source is asked again and again"
                }
                commit::DestinationVerdict::Running => "the guest is this host's",
                commit::DestinationVerdict::Discarded => "this host gave the guest up for good: it is the source's",
            };
        }
        match commit::source_verdict(&self.records, migration, generation) {
            commit::SourceVerdict::NoRecord => "nothing was promised: the guest is this host's",
            commit::SourceVerdict::GuestIsOurs => "the guest is this host's",
            commit::SourceVerdict::AskDestination => {
                "the guest was released and the destination has not answered since: this host asks it again and again and does \
                 not run the guest meanwhile"
            }
            commit::SourceVerdict::Gone => "the guest runs at the destination",
        }
    }
}

impl JobInfo {
    /// Which attempt it is.
    fn attempt(&self) -> Result<(MigrationId, Generation), String> {
        let migration = self.migration.parse().map_err(|e| format!("{e}"))?;
        Ok((migration, Generation(self.generation)))
    }
}

/// Who is at the other end of the API's socket, in words.
pub(crate) fn who(uid: Option<u32>) -> String {
    let Some(uid) = uid else { return "someone unknown".to_owned() };
    let user = nix::unistd::User::from_uid(nix::unistd::Uid::from_raw(uid)).ok().flatten();
    user.map_or_else(|| format!("user {uid}"), |user| format!("{} (user {uid})", user.name))
}
