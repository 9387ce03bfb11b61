//! A restarted destination asks its source whether a guest that was to come was ever released, and a source answers: as
//! `limosa-agent`'s `asking` does, by the rules of `limosa_proto::release`. What follows from the answer is `recover`'s.

use crate::checker::Mutant;
use crate::faults::Step;
use crate::link::{Key, Owner};
use crate::recover::VERDICT_MAX;
use crate::world::{Item, World, host_id};
use limosa_proto::commit::{self, DestinationVerdict};
use limosa_proto::event::Side;
use limosa_proto::recovery::ASK_INTERVAL;
use limosa_proto::release::{self, Asked};
use limosa_proto::wire::message::{Message, ReleasedAnswer};
use std::time::Duration;

impl World {
    /// A restarted destination asks its source.
    pub(crate) fn ask_source(&mut self, host: usize, incarnation: u64, wait: u64) {
        let Some(agent) = self.agent(host, incarnation) else { return };
        let Some(waiting) = agent.waits.get_mut(&wait) else { return };
        waiting.asked += 1;
        let (record, asked) = (waiting.record.clone(), waiting.asked);
        let key = (record.migration, record.generation);
        if commit::destination_verdict(&agent.journal.of(key.0, key.1), key.0, key.1) != DestinationVerdict::Undecided {
            return;
        }
        let peer = self.index_of(record.peer);
        self.point(Step::AskSource, false, host, peer);
        self.strike_all();
        if self.incarnation(host) != Some(incarnation) {
            return;
        }
        let owner = Owner::Released(wait, asked);
        if !self.can_reach(host, peer) {
            return self.after(Duration::from_secs(3), Item::VerdictLate { host, incarnation, owner });
        }
        let there = self.incarnation(peer).unwrap();
        let connect = |world: &mut World, owner| {
            let ends = (world.end_at(host, incarnation, owner), world.end_at(peer, there, Owner::Nobody));
            world.net.connect(key, ends.0, ends.1)
        };
        let connection = connect(self, owner);
        self.send_on(connection, 0, Message::ReleasedAsk, host, peer);
        self.after(VERDICT_MAX, Item::VerdictLate { host, incarnation, owner });
        if self.random.percent(20) {
            // A question of before arrives once more, and nobody hears the answer.
            let again = connect(self, Owner::Nobody);
            let late = self.random.micros(0, 20_000_000);
            self.after(late, Item::Deliver { connection: again, to: 1, message: Message::ReleasedAsk });
        }
    }

    /// A destination asks on a new connection.
    pub(crate) fn asked_whether_released(&mut self, host: usize, connection: usize, key: Key) {
        let peer = self.net.connections[connection].ends[0].host;
        let answer = self.released(host, peer, key);
        if answer == ReleasedAnswer::Never {
            self.check_never(host, key);
        }
        self.log(|| format!("host {host} is asked whether it released generation {}: {answer:?}", key.1.0));
        self.send_on(connection, 1, Message::Released(answer), host, peer);
        self.close(connection, 1);
    }

    fn released(&mut self, host: usize, peer: usize, key: Key) -> ReleasedAnswer {
        let agent = self.hosts[host].agent.as_ref().unwrap();
        let mut records = agent.journal.of(key.0, key.1);
        records.retain(|record| record.peer == host_id(peer));
        let carried = agent.sessions.values().any(|session| session.key == key && session.side() == Side::Source);
        match (self.mutant, release::asked(&records, key.0, key.1, carried)) {
            // As if its journal were lost.
            (Some(Mutant::UnknownIsNever), _) => ReleasedAnswer::Unknown,
            (Some(Mutant::NeverIsNoPromise), Asked::Promise(_) | Asked::Answer(ReleasedAnswer::Open)) => ReleasedAnswer::Never,
            (_, Asked::Answer(answer)) => answer,
            (_, Asked::Promise(never)) => match records.last() {
                Some(last) if self.write(host, &never.of(last)).is_ok() => ReleasedAnswer::Never,
                _ => ReleasedAnswer::Open,
            },
        }
    }

    /// What a restarted destination does with the answer, or without one.
    pub(crate) fn source_said(&mut self, host: usize, incarnation: u64, wait: u64, asked: u32, answer: Option<ReleasedAnswer>) {
        let answer = match (self.mutant, answer) {
            (Some(Mutant::UnknownIsNever), Some(ReleasedAnswer::Unknown)) => Some(ReleasedAnswer::Never),
            (Some(Mutant::ReleasedIsNever), Some(ReleasedAnswer::Released)) => Some(ReleasedAnswer::Never),
            (_, answer) => answer,
        };
        let Some(waiting) = self.agent(host, incarnation).and_then(|agent| agent.waits.get_mut(&wait)) else { return };
        if waiting.asked != asked {
            return;
        }
        // One answer to each question.
        waiting.asked += 1;
        waiting.said = answer.or(waiting.said);
        let (interval, peer) = (waiting.interval, waiting.record.peer);
        waiting.interval = (interval * 2).min(ASK_INTERVAL.1);
        self.after(interval, Item::AskSource { host, incarnation, wait });
        if answer == Some(ReleasedAnswer::Never) {
            self.out_of_patience(host, incarnation, wait);
        }
        let peer = self.index_of(peer);
        self.point(Step::AskSource, true, host, peer);
    }
}
