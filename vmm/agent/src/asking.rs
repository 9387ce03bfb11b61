//! A destination's question to its source, whether a guest that was to come was ever released: asked after a restart until the guest
//! is settled, and answered. What an answer means is decided by `limosa_proto::{release, recovery}`, and carried out by `settle`;
//! a source's own question, what became of a guest that it released, is `settle`'s too.

use crate::agent::Agent;
use crate::api::Direction;
use crate::links;
use crate::settle::{self, Ready};
use limosa_link::failpoints::{self, Point};
use limosa_link::{AskError, ask_released};
use limosa_proto::commit::{self, DestinationVerdict, JournalRecord};
use limosa_proto::identity::{Generation, HostId, MigrationId};
use limosa_proto::recovery::ASK_INTERVAL;
use limosa_proto::release::{self, Asked};
use limosa_proto::wire::message::ReleasedAnswer;
use std::sync::Arc;

/// An answer in words.
pub(crate) fn words(answer: ReleasedAnswer) -> &'static str {
    match answer {
        ReleasedAnswer::Never => "it never released the guest, and never will: the guest is the source's",
        ReleasedAnswer::Released => "it released the guest to this host",
        ReleasedAnswer::Open => "it has not decided yet whether to release the guest",
        _ => "it has no record of this migration, which proves nothing",
    }
}

/// Destination: asks the source again and again, until the attempt is settled.
pub(crate) async fn ask(agent: Arc<Agent>, ready: Arc<Ready>) {
    let mut wait = ASK_INTERVAL.0;
    loop {
        let alone = agent.jobs.asking(ready.job).lock_owned().await;
        let (migration, generation) = (ready.record.migration, ready.record.generation);
        let records = agent.journal().of(migration, generation);
        let settled = commit::destination_verdict(&records, migration, generation) != DestinationVerdict::Undecided;
        if settled || agent.is_stopping() || agent.jobs.get(ready.job).is_none_or(|job| job.state.ended()) {
            return;
        }
        failpoints::pass(Some(Point::DestinationRecoveryAsks));
        let said = released(&agent, &ready.record).await;
        failpoints::pass(said.is_ok().then_some(Point::DestinationRecoveryHears));
        let (hearing, heard) = (Arc::clone(&agent), Arc::clone(&ready));
        let _ = tokio::task::spawn_blocking(move || settle::source_said(&hearing, &heard, said)).await;
        drop(alone);
        tokio::time::sleep(wait).await;
        wait = (wait * 2).min(ASK_INTERVAL.1);
    }
}

/// Destination: what the source says, or why it cannot be asked.
pub(crate) async fn released(agent: &Agent, ready: &JournalRecord) -> Result<ReleasedAnswer, String> {
    let (tcp, quic) = links::to_ask(agent, "source", ready.peer)?;
    let asked = ask_released(&tcp, ready.migration, ready.generation).await;
    if matches!(asked, Err(AskError::Connect(_)))
        && let Some(quic) = quic
        && let Ok(answer) = ask_released(&quic, ready.migration, ready.generation).await
    {
        return Ok(answer);
    }
    asked.map_err(|e| e.to_string())
}

/// Source: a destination asks.
pub(crate) fn answer(agent: &Agent, peer: HostId, migration: MigrationId, generation: Generation) -> ReleasedAnswer {
    let with_peer = |mut records: Vec<JournalRecord>| {
        records.retain(|record| agent.hosts.trusted().same_host(record.peer, peer));
        records
    };
    // An engine's job is there before its first record, and until its last.
    let carried = agent.jobs.all().iter().any(|job| {
        let this = job.migration == migration.to_string() && job.generation == generation.0;
        job.direction == Direction::Outgoing && !job.state.ended() && this
    });
    let records = with_peer(agent.journal().of(migration, generation));
    let answer = match (release::asked(&records, migration, generation, carried), records.last()) {
        (Asked::Answer(answer), _) => answer,
        (Asked::Promise(never), Some(last)) => {
            match agent.write_if(&never.of(last), |records| release::is_unsettled(records, migration, generation)) {
                Ok(true) => ReleasedAnswer::Never,
                // Something else was written at this moment, or nothing could be: the next question finds out.
                Ok(false) | Err(_) => ReleasedAnswer::Open,
            }
        }
        (Asked::Promise(_), None) => ReleasedAnswer::Unknown,
    };
    let (peer, generation) = (agent.hosts.shown(peer), generation.0);
    if answer == ReleasedAnswer::Unknown {
        tracing::warn!(peer, %migration, generation, "asked whether a guest was released by an attempt of which nothing is known with it");
    } else {
        tracing::info!(peer, %migration, generation, ?answer, "a destination asked whether its guest was released");
    }
    answer
}
