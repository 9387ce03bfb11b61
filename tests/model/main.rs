//! The commit, model-checked: every interleaving of messages, losses, crashes, restarts and timers for two hosts, with the real
//! engines and the real rules of recovery in every state. It has no pages, no sockets and no disk: what those do to the commit
//! is `tests/sim`'s.
#![allow(clippy::expect_used, clippy::print_stdout)]

mod rules;
mod steps;
mod world;

use rules::{Planted, Rules};
use stateright::{Checker, HasDiscoveries, Model, Property};
use std::collections::HashSet;
use std::sync::{Mutex, PoisonError};
use steps::Step;
use world::{Left, Vmm, World, fingerprint};

const NONE_LOST: &str = "none lost: from every state the guest comes to run on one host";

struct Commit {
    rules: Rules,
    left: Left,
    /// States from which it was seen that the guest comes to run.
    good: Mutex<HashSet<u64>>,
}

impl Model for Commit {
    type State = World;
    type Action = Step;

    fn init_states(&self) -> Vec<World> {
        vec![World::new(self.left)]
    }

    fn actions(&self, world: &World, steps: &mut Vec<Step>) {
        steps::possible(world, steps);
    }

    fn next_state(&self, world: &World, step: Step) -> Option<World> {
        steps::take(self.rules, world, step)
    }

    fn properties(&self) -> Vec<Property<Commit>> {
        use limosa_proto::commit::JournalRecordKind::{Discarded, Released};
        vec![
            Property::always("never two owners", |_, world: &World| world.owners() <= 1),
            Property::always(NONE_LOST, Commit::none_is_lost),
            Property::always("what was released is not resumed at the source without discarded", |_, world: &World| {
                let released = world.source.journal.iter().filter(|(kind, _)| *kind == Released);
                let mut given_back = released.map(|(_, generation)| world.destination.has(Discarded, *generation));
                !matches!(world.source.vmm, Vmm::Runs(_)) || given_back.all(|given| given)
            }),
            Property::always("a discarded generation does not run at the destination", |_, world: &World| {
                match world.destination.vmm {
                    Vmm::Runs(generation) => !world.destination.has(Discarded, generation),
                    _ => true,
                }
            }),
            Property::always("nothing runs at the destination before released is durable", |_, world: &World| {
                world.facts.ran.is_none_or(|generation| world.source.has(Released, generation))
            }),
            Property::always("a word of another generation commits nothing", |_, world: &World| !world.facts.strange_word),
            Property::always("what a source says it never released is never released", |_, world: &World| {
                !world.facts.promise_broken
            }),
            Property::always("nothing is announced before it runs", |_, world: &World| !world.facts.told_early),
            Property::always("no resume from old memory once it may have run", |_, world: &World| !world.facts.old_memory),
        ]
    }
}

/// Steps without a fault within which everything has to be over.
const CALM_STEPS_MAX: usize = 300;

impl Commit {
    /// When nothing fails any more, the guest comes to run on exactly one host. What one state has shown need not be shown
    /// by those on its way again.
    fn none_is_lost(&self, world: &World) -> bool {
        let good = |print| self.good.lock().unwrap_or_else(PoisonError::into_inner).contains(&print);
        let mut seen = Vec::new();
        let mut world = world.clone();
        let mut waited = 0;
        for _ in 0..CALM_STEPS_MAX {
            let print = fingerprint(&world);
            let ends = world.is_settled() && world.owners() == 1 || world.is_lost();
            seen.push(print);
            if ends || good(print) {
                self.good.lock().unwrap_or_else(PoisonError::into_inner).extend(seen);
                return true;
            }
            let Some(next) = self.calm(&world, &mut waited) else { return false };
            world = next;
        }
        false
    }

    /// One step without a fault. What waits for a timer waits until nothing else can happen, and each timer gets its turn.
    /// `waited`: how often that was before.
    fn calm(&self, world: &World, waited: &mut usize) -> Option<World> {
        let mut steps = Vec::new();
        steps::possible(world, &mut steps);
        steps.retain(|step| steps::is_calm(world, *step));
        let slow = |step: &Step| matches!(step, Step::Timer(_) | Step::Ask | Step::AskSource | Step::GiveUp | Step::LinkLost(_));
        let quick = steps.iter().copied().filter(|step| !slow(step)).find_map(|step| steps::take(self.rules, world, step));
        if quick.is_some() {
            return quick;
        }
        let slow: Vec<World> = steps.into_iter().filter_map(|step| steps::take(self.rules, world, step)).collect();
        let count = slow.len();
        *waited += 1;
        slow.into_iter().nth(waited.checked_rem(count)?)
    }
}

const NONE: Left =
    Left { crashes: [0, 0], power: 0, duplicates: 0, losses: 0, cuts: 0, cancels: 0, failures: 0, attempts: 1, far: false };

/// Everything that can go wrong in a hand-over, in as many combinations as can be looked at in a minute.
const WORLDS: [(&str, Left); 6] = [
    ("two crashes of each agent, a link that loses and doubles", Left { crashes: [2, 2], duplicates: 1, losses: 1, ..NONE }),
    (
        "a crash of each agent, a link that loses and is cut, a cancel",
        Left { crashes: [1, 1], losses: 1, cuts: 1, cancels: 1, ..NONE },
    ),
    ("a crash of each agent, hosts that fail", Left { crashes: [1, 1], cuts: 1, failures: 1, ..NONE }),
    ("a power cut and up to two crashes of each agent", Left { crashes: [2, 2], power: 1, ..NONE }),
    (
        "a power cut and a crash of each agent, questions of both sides on their way",
        Left { crashes: [1, 1], power: 1, far: true, ..NONE },
    ),
    ("a second attempt, while words of the first are on their way", Left { duplicates: 1, cuts: 1, attempts: 2, ..NONE }),
];

/// Looks at everything, or until one of `enough` does not hold.
fn explore(rules: Rules, left: Left, enough: &[&'static str]) -> impl Checker<Commit> {
    let model = Commit { rules, left, good: Mutex::default() };
    let enough = HasDiscoveries::AnyOf(enough.iter().copied().collect());
    model.checker().threads(2).finish_when(enough).spawn_bfs().join()
}

/// A path as one line.
fn line(path: &stateright::Path<World, Step>) -> String {
    let steps: Vec<String> = path.clone().into_actions().iter().map(ToString::to_string).collect();
    steps.join(", ")
}

#[test]
fn one_host_runs_the_guest_whatever_happens() {
    let names: Vec<&str> =
        Commit { rules: None, left: NONE, good: Mutex::default() }.properties().iter().map(|property| property.name).collect();
    let (mut all, mut unique) = (0, 0);
    for (name, left) in WORLDS {
        let began = std::time::Instant::now();
        let checker = explore(None, left, &names);
        let took = began.elapsed().as_secs_f64();
        let (states, different, depth) = (checker.state_count(), checker.unique_state_count(), checker.max_depth());
        println!("{name}: {states} states, {different} of them different, depth {depth}, {took:.1} s");
        (all, unique) = (all + states, unique + different);
        let broken = checker.discoveries();
        for (property, path) in &broken {
            println!("  broken: {property}: {}", line(path));
            for (world, step) in path.clone().into_vec() {
                println!("  {world:?}\n    {}", step.map_or_else(String::new, |step| step.to_string()));
            }
        }
        assert!(broken.is_empty(), "{name}: {} properties do not hold", broken.len());
        assert!(different > 100_000, "{name}: only {different} states: the model does not see what it should");
    }
    names.iter().for_each(|name| println!("holds in every state: {name}"));
    println!("{all} states, {unique} of them different, in {} worlds", WORLDS.len());
}

/// The model can fail: each fault is found, and by the property that speaks of it.
#[test]
fn planted_faults_are_found() {
    let crash = Left { crashes: [1, 1], ..NONE };
    let faults = [
        (Planted::ResumeOnLostLink, Left { cuts: 1, ..NONE }, "what was released is not resumed at the source without discarded"),
        (Planted::EofIsSuccess, Left { cuts: 1, losses: 1, ..NONE }, NONE_LOST),
        (Planted::ReleaseWithoutSync, crash, "nothing runs at the destination before released is durable"),
        (Planted::DiscardWithoutSync, crash, "what was released is not resumed at the source without discarded"),
        (Planted::AnyGeneration, Left { cuts: 1, attempts: 2, ..NONE }, "a word of another generation commits nothing"),
        (Planted::UndecidedIsDiscarded, crash, "what was released is not resumed at the source without discarded"),
        (Planted::ReadyIsEnough, crash, "nothing runs at the destination before released is durable"),
        (Planted::TellWhenReady, NONE, "nothing is announced before it runs"),
        (Planted::NeverIsNoPromise, crash, "what a source says it never released is never released"),
        (Planted::ReleasedIsNever, Left { power: 1, ..crash }, "no resume from old memory once it may have run"),
    ];
    for (fault, left, property) in faults {
        let found = explore(Some(fault), left, &[property]).discoveries();
        let path = found.get(property);
        assert!(path.is_some(), "{fault:?} does not break \"{property}\" but {:?}", found.keys());
        path.iter().for_each(|path| println!("{fault:?} breaks \"{property}\": {}", line(path)));
    }
}
