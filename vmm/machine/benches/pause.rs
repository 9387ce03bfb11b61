//! How long pausing takes by number of vCPUs, idle and busy. Prints medians of interleaved samples as a table and as JSON
//! (`--json`). Not a test: on a host with fewer CPUs than vCPUs busy ones wait for each other, whoever stops them.
#![allow(clippy::unwrap_used, clippy::panic, clippy::print_stdout, missing_docs)]

#[path = "../tests/rig/mod.rs"]
mod rig;

use limosa_machine::{Machine, MachineConfig, MemoryConfig};
use rig::{COUNTER, IDLE, SMP, booted, wait_until, word};
use std::time::Instant;

const VCPUS: [u32; 4] = [1, 4, 16, 32];
const SAMPLES: usize = 101;

fn machine(source: &str, vcpus: u32) -> Machine {
    let machine = booted(source, MachineConfig::new(vcpus, MemoryConfig::new(16 << 20)));
    machine.resume().unwrap();
    machine
}

/// Microseconds of one pause.
fn sample(machine: &Machine) -> f64 {
    // Long enough for every vCPU to be in the guest again.
    std::thread::sleep(std::time::Duration::from_millis(3));
    let start = Instant::now();
    machine.pause().unwrap();
    let took = start.elapsed().as_secs_f64() * 1e6;
    machine.resume().unwrap();
    took
}

fn medians(machines: &[Machine]) -> Vec<f64> {
    let mut samples = vec![Vec::new(); machines.len()];
    for _ in 0..SAMPLES {
        for (machine, list) in machines.iter().zip(&mut samples) {
            list.push(sample(machine));
        }
    }
    let median = |mut list: Vec<f64>| {
        list.sort_by(f64::total_cmp);
        list[SAMPLES / 2]
    };
    samples.into_iter().map(median).collect()
}

fn main() {
    let idle = medians(&VCPUS.map(|vcpus| machine(IDLE, vcpus)));
    // Busy machines one after the other: together they would measure each other.
    let busy: Vec<f64> = VCPUS
        .iter()
        .map(|vcpus| {
            let machine = machine(SMP, *vcpus);
            let last = COUNTER + 64 * u64::from(vcpus - 1);
            wait_until(&machine, "all vCPUs count", || word(&machine, last) > 0);
            medians(&[machine])[0]
        })
        .collect();
    let cpus = std::thread::available_parallelism().map_or(0, std::num::NonZero::get);
    if std::env::args().any(|word| word == "--json") {
        println!("{{\"cpus\": {cpus}, \"vcpus\": {VCPUS:?}, \"idle_us\": {idle:?}, \"busy_us\": {busy:?}}}");
        return;
    }
    println!("pause of a machine, medians of {SAMPLES}, on {cpus} CPUs\nvCPUs  idle (µs)  busy (µs)");
    for ((vcpus, idle), busy) in VCPUS.iter().zip(&idle).zip(&busy) {
        println!("{vcpus:>5}  {idle:>9.0}  {busy:>9.0}");
    }
    println!("32 against 1: idle {:.1}x, busy {:.1}x", idle[3] / idle[0], busy[3] / busy[0]);
}
