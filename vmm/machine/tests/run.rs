//! Promises on running: boot, pause, resume, what a guest's end looks like. On this host's KVM.
#![allow(clippy::unwrap_used, clippy::panic, clippy::print_stdout)]

mod rig;

use std::io::Write;
use std::sync::mpsc;
use std::time::{Duration, Instant};

use limosa_machine::{Machine, MachineEvent, RunError, SaveError, SerialSink};
use rig::{BAD, CLOCKWORK, COUNTER, IDLE, SMP, TICKS, booted, config, has_kvm, wait_until, word};

struct Channel(mpsc::Sender<Vec<u8>>);

impl Write for Channel {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        self.0.send(bytes.to_vec()).map_err(|_| std::io::ErrorKind::BrokenPipe)?;
        Ok(bytes.len())
    }
    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

#[test]
fn a_guest_boots_speaks_ticks_and_pauses() {
    if !has_kvm() {
        return;
    }
    let (sender, receiver) = mpsc::channel();
    let mut config = config(1, 16);
    config.serial = SerialSink::Writer(Box::new(Channel(sender)));
    let machine = booted(CLOCKWORK, config);
    assert!(!machine.is_running());
    machine.resume().unwrap();
    assert_eq!(receiver.recv_timeout(Duration::from_secs(20)).unwrap(), b"R");
    wait_until(&machine, "timer interrupts", || word(&machine, TICKS) >= 5);
    machine.pause().unwrap();
    let counter = word(&machine, COUNTER);
    std::thread::sleep(Duration::from_millis(50));
    assert_eq!(word(&machine, COUNTER), counter, "a paused guest does not count");
    machine.resume().unwrap();
    wait_until(&machine, "counting on", || word(&machine, COUNTER) > counter);
    assert_eq!(word(&machine, BAD), 0);
    machine.stop();
}

#[test]
fn many_vcpus_pause_and_resume_200_times() {
    if !has_kvm() {
        return;
    }
    let machine = booted(SMP, config(4, 16));
    machine.resume().unwrap();
    let counters = || [0, 64, 128, 192].map(|offset| word(&machine, COUNTER + offset));
    wait_until(&machine, "all vCPUs count", || counters().iter().all(|counter| *counter > 0));
    let mut pauses = Vec::new();
    for round in 0..200 {
        let seen = counters();
        wait_until(&machine, "running again", || counters() != seen);
        let start = Instant::now();
        machine.pause().unwrap();
        pauses.push(start.elapsed());
        let still = counters();
        if round % 20 == 0 {
            std::thread::sleep(Duration::from_millis(2));
            assert_eq!(counters(), still, "paused vCPUs do not count");
        }
        machine.resume().unwrap();
        machine.resume().unwrap();
    }
    let before = counters();
    wait_until(&machine, "all count on", || counters().iter().zip(before).all(|(now, then)| *now > then));
    pauses.sort();
    println!("pause of 4 busy vCPUs: median {:?}, longest {:?}", pauses[100], pauses[199]);
}

#[test]
fn an_idle_guest_pauses_within_a_millisecond() {
    if !has_kvm() {
        return;
    }
    let machine = booted(IDLE, config(1, 16));
    machine.resume().unwrap();
    std::thread::sleep(Duration::from_millis(50));
    let mut pauses: Vec<_> = (0..51)
        .map(|_| {
            let start = Instant::now();
            machine.pause().unwrap();
            let taken = start.elapsed();
            machine.resume().unwrap();
            std::thread::sleep(Duration::from_millis(1));
            taken
        })
        .collect();
    pauses.sort();
    println!("pause of an idle vCPU: median {:?}, longest {:?}", pauses[25], pauses[50]);
    assert!(pauses[25] < Duration::from_millis(1), "{pauses:?}");
}

#[test]
fn a_guests_end_is_told_in_words() {
    if !has_kvm() {
        return;
    }
    let reset = booted(".code32\nmov $0xfe, %al\nout %al, $0x64\n1: jmp 1b\n", config(1, 16));
    reset.resume().unwrap();
    let event = reset.events().recv_timeout(Duration::from_secs(10));
    assert_eq!(event, Some(MachineEvent::Reset { vcpu: 0 }));
    reset.pause().unwrap();
    assert!(matches!(reset.save(), Err(SaveError::Ended(0))));

    let fault = booted(".code32\nlidt none\nud2\nnone: .word 0\n.long 0\n", config(1, 16));
    fault.resume().unwrap();
    let event = fault.events().recv_timeout(Duration::from_secs(10)).unwrap();
    assert!(matches!(&event, MachineEvent::Shutdown { vcpu: 0, reason } if reason.contains("triple fault")), "{event:?}");
    assert_eq!(fault.events().try_recv(), None);
}

#[test]
fn nothing_runs_before_boot() {
    if !has_kvm() {
        return;
    }
    let machine = Machine::new(config(2, 16)).unwrap();
    assert!(matches!(machine.resume(), Err(RunError::Empty)));
    assert!(matches!(machine.save(), Err(SaveError::Empty)));
    machine.pause().unwrap();
    assert!(Machine::new(config(0, 16)).is_err());
    assert!(Machine::new(config(1_000_000, 16)).is_err());
}
