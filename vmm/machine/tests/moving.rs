//! Promises on save and load: a guest goes on elsewhere where it was. On this host's KVM, both machines in this process.
#![allow(clippy::unwrap_used, clippy::panic, clippy::print_stdout, clippy::indexing_slicing)]

mod rig;

use std::time::{Duration, Instant};

use limosa_machine::{LoadError, Machine, RecordError, StateRecord};
use rig::{BAD, CLOCKWORK, COUNTER, SMP, TICKS, booted, config, fill, has_kvm, memory, wait_until, word};

/// How long the steps of one move took.
#[derive(Default)]
struct Times {
    pause: Vec<Duration>,
    save: Vec<Duration>,
    load: Vec<Duration>,
    resume: Vec<Duration>,
}

impl Times {
    fn timed<T>(list: &mut Vec<Duration>, step: impl FnOnce() -> T) -> T {
        let start = Instant::now();
        let value = step();
        list.push(start.elapsed());
        value
    }

    fn tell(&mut self, what: &str) {
        let lists =
            [("pause", &mut self.pause), ("save", &mut self.save), ("load", &mut self.load), ("resume", &mut self.resume)];
        for (step, list) in lists {
            list.sort();
            println!("{what}: {step} median {:?}, longest {:?}", list[list.len() / 2], list[list.len() - 1]);
        }
    }

    fn move_to(&mut self, source: Machine, destination: Machine) -> Machine {
        Self::timed(&mut self.pause, || source.pause()).unwrap();
        let records: Vec<StateRecord> = Self::timed(&mut self.save, || source.save()).unwrap();
        fill(&destination, &memory(&source));
        source.stop();
        Self::timed(&mut self.load, || destination.load(records)).unwrap();
        Self::timed(&mut self.resume, || destination.resume()).unwrap();
        destination
    }
}

#[test]
fn a_guest_counts_on_through_100_moves() {
    if !has_kvm() {
        return;
    }
    let mut machine = booted(CLOCKWORK, config(1, 16));
    machine.resume().unwrap();
    let mut times = Times::default();
    for trip in 0..100 {
        let (counter, ticks) = (word(&machine, COUNTER), word(&machine, TICKS));
        wait_until(&machine, "counting and ticking on", || {
            assert_eq!(word(&machine, BAD), 0, "the guest saw a mismatch on trip {trip}");
            word(&machine, COUNTER) > counter + 20 && word(&machine, TICKS) > ticks
        });
        machine = times.move_to(machine, Machine::new(config(1, 16)).unwrap());
        assert!(word(&machine, COUNTER) > counter);
    }
    times.tell("1 vCPU");
}

#[test]
fn four_vcpus_count_on_through_20_moves() {
    if !has_kvm() {
        return;
    }
    let counters = |machine: &Machine| [0, 64, 128, 192].map(|offset| word(machine, COUNTER + offset));
    let mut machine = booted(SMP, config(4, 16));
    machine.resume().unwrap();
    wait_until(&machine, "all vCPUs count", || counters(&machine).iter().all(|counter| *counter > 0));
    let mut times = Times::default();
    for _ in 0..20 {
        let before = counters(&machine);
        machine = times.move_to(machine, Machine::new(config(4, 16)).unwrap());
        wait_until(&machine, "all count on", || counters(&machine).iter().zip(before).all(|(now, then)| *now > then));
        assert!(counters(&machine).iter().zip(before).all(|(now, then)| now.wrapping_sub(then) < 1 << 30));
    }
    times.tell("4 vCPUs");
}

#[test]
fn a_save_that_comes_to_nothing_does_no_harm() {
    if !has_kvm() {
        return;
    }
    let machine = booted(CLOCKWORK, config(1, 16));
    machine.resume().unwrap();
    for _ in 0..20 {
        let ticks = word(&machine, TICKS);
        wait_until(&machine, "ticking on", || word(&machine, TICKS) > ticks);
        machine.pause().unwrap();
        let first = machine.save().unwrap();
        let again = machine.save().unwrap();
        assert_eq!(first.len(), again.len());
        machine.resume().unwrap();
    }
    assert_eq!(word(&machine, BAD), 0);
}

#[test]
fn records_that_do_not_fit_are_refused() {
    if !has_kvm() {
        return;
    }
    let source = booted(CLOCKWORK, config(1, 16));
    source.resume().unwrap();
    source.pause().unwrap();
    let records = source.save().unwrap();
    let load = |records: Vec<StateRecord>| Machine::new(config(1, 16)).unwrap().load(records);
    assert!(load(records.clone()).is_ok());
    let two = Machine::new(config(2, 16)).unwrap();
    assert!(matches!(two.load(records.clone()), Err(LoadError::Board { .. })));
    assert!(matches!(two.load(Vec::new()), Err(LoadError::Record(_))), "nothing was touched, so it may be tried again");
    assert!(two.resume().is_err(), "a machine that was refused its state does not run");
    let mut cut = records.clone();
    cut.last_mut().unwrap().bytes.clear();
    let spoilt = Machine::new(config(1, 16)).unwrap();
    assert!(spoilt.load(cut).is_err());
    assert!(matches!(spoilt.load(records.clone()), Err(LoadError::NotFresh)), "half a state is never loaded over");
    assert!(spoilt.resume().is_err(), "a machine whose load failed does not run");
    for index in 0..records.len() {
        let mut fewer = records.clone();
        let gone = fewer.remove(index);
        assert!(matches!(load(fewer), Err(LoadError::Record(RecordError::Missing { .. }))), "without {}", gone.kind);
        let mut cut = records.clone();
        cut[index].bytes.pop();
        assert!(matches!(load(cut), Err(LoadError::Record(RecordError::Body { .. }))), "{} cut short", gone.kind);
    }
    let mut more = records.clone();
    more.push(StateRecord { instance: 7, ..records[1].clone() });
    assert!(matches!(load(more), Err(LoadError::Record(RecordError::LeftOver(_)))));
}
