//! Tests of a machine on hosts that offer less than this one does.
#![allow(clippy::unwrap_used, clippy::panic, clippy::indexing_slicing, clippy::print_stdout)]
use super::*;
use crate::boot::tests::{elf, file};
use kvm_bindings::{KVM_DIRTY_LOG_INITIALLY_SET, KVM_DIRTY_LOG_MANUAL_PROTECT_ENABLE};
use std::time::{Duration, Instant};

/// Sets its LAPIC up, adds one to a word of each of 256 pages from 2 MiB on, then halts; entry is at byte 4.
const WALK: &[u8] = &[
    0x90, 0x90, 0x90, 0x90, // entry is at 4
    0xc7, 0x05, 0xf0, 0x00, 0xe0, 0xfe, 0xff, 0x01, 0x00, 0x00, // mov dword [0xfee000f0], 0x1ff: spurious vector, on
    0xbf, 0x00, 0x00, 0x20, 0x00, // mov edi, 2 MiB
    0xb9, 0x00, 0x01, 0x00, 0x00, // mov ecx, 256
    0xff, 0x07, // inc dword [edi]
    0x81, 0xc7, 0x00, 0x10, 0x00, 0x00, // add edi, 4096
    0x49, // dec ecx
    0x75, 0xf5, // jnz inc
    0xf4, // hlt
    0xeb, 0xfd, // jmp hlt
];

fn has_kvm() -> bool {
    let present = std::path::Path::new("/dev/kvm").exists();
    if !present {
        assert!(std::env::var_os("LIMOSA_DEMAND_ALL").is_none_or(|value| value != "1"), "KVM is demanded");
        println!("skipped: no /dev/kvm");
    }
    present
}

fn machine(fewer: fn(Capabilities) -> Capabilities) -> Machine {
    Machine::with_fewer(MachineConfig::new(1, MemoryConfig::new(16 << 20)), fewer).unwrap()
}

fn boot_walk(machine: &Machine) {
    let kernel = file(&elf(WALK, true));
    let config = BootConfig { kernel: kernel.path().to_owned(), initramfs: None, cmdline: String::new() };
    machine.boot(&config).unwrap();
}

fn wait_walked(machine: &Machine) {
    let deadline = Instant::now() + Duration::from_secs(10);
    let mut last = [0; 4];
    while last != [1, 0, 0, 0] {
        assert!(Instant::now() < deadline, "{:?}", machine.events().try_recv());
        std::thread::sleep(Duration::from_micros(200));
        machine.read_memory((2 << 20) + 255 * 4096, &mut last).unwrap();
    }
}

#[test]
fn each_kind_of_dirty_log_reports_what_was_written_and_little_else() {
    if !has_kvm() {
        return;
    }
    let offers: [fn(Capabilities) -> Capabilities; 3] = [
        |caps| Capabilities { manual_dirty_log: 0, ..caps },
        |caps| Capabilities { manual_dirty_log: caps.manual_dirty_log & KVM_DIRTY_LOG_MANUAL_PROTECT_ENABLE, ..caps },
        |caps| caps,
    ];
    let walked: Vec<u64> = (0..64).map(|word| if (8..12).contains(&word) { u64::MAX } else { 0 }).collect();
    for offer in offers {
        let machine = machine(offer);
        println!("manual dirty log flags {} (2 is {KVM_DIRTY_LOG_INITIALLY_SET:?})", machine.caps.manual_dirty_log);
        boot_walk(&machine);
        machine.start_dirty_tracking().unwrap();
        machine.resume().unwrap();
        wait_walked(&machine);
        let fetch = || {
            let mut all = Vec::new();
            machine.fetch_dirty(&mut |_, _, words| all.extend_from_slice(words)).unwrap();
            all
        };
        let fetched = fetch();
        assert!(walked.iter().zip(&fetched).all(|(walked, fetched)| walked & !fetched == 0), "{fetched:x?}");
        // Nested paging makes a page writable, and dirty, when it is first read or run: here the page with the code.
        let more: u32 = walked.iter().zip(&fetched).map(|(walked, fetched)| (fetched & !walked).count_ones()).sum();
        assert!(more <= 2, "{fetched:x?}");
        assert_eq!(fetch(), vec![0; 64]);
    }
}

#[test]
fn a_host_that_offers_less_saves_and_loads_less() {
    if !has_kvm() {
        return;
    }
    let fewest: fn(Capabilities) -> Capabilities = |caps| Capabilities {
        xsave2: false,
        xsave_bytes: 4096,
        xcrs: false,
        debug_registers: false,
        vcpu_events: false,
        tsc_khz: false,
        clock_flags: None,
        clock_control: false,
        manual_dirty_log: 0,
        ..caps
    };
    let all: fn(Capabilities) -> Capabilities = |caps| caps;
    for (from, to, works) in [(fewest, fewest, true), (fewest, all, true), (all, all, true), (all, fewest, false)] {
        let source = machine(from);
        boot_walk(&source);
        let records = source.save().unwrap();
        let destination = machine(to);
        let mut memory = vec![0; 16 << 20];
        source.read_memory(0, &mut memory).unwrap();
        destination.write_memory(0, &memory).unwrap();
        match destination.load(records) {
            Ok(()) => {
                assert!(works);
                destination.resume().unwrap();
                wait_walked(&destination);
            }
            Err(error) => {
                assert!(!works && matches!(error, LoadError::Vcpu(_)), "{error}");
                assert!(error.to_string().contains("does not offer"), "{error}");
            }
        }
    }
}

#[test]
fn a_state_survives_save_and_load_unchanged() {
    if !has_kvm() {
        return;
    }
    let source = machine(|caps| caps);
    boot_walk(&source);
    source.resume().unwrap();
    wait_walked(&source);
    source.pause().unwrap();
    let saved = source.save().unwrap();
    let destination = machine(|caps| caps);
    destination.load(saved.clone()).unwrap();
    let again = destination.save().unwrap();
    for (before, after) in saved.iter().zip(&again) {
        // The vCPU's TSC and the clock have moved on meanwhile; a vCPU is compared by its parts.
        if before.kind == Kind::Vcpu as u16 {
            let (mut before, _) = postcard::take_from_bytes::<VcpuRecord>(&before.bytes).unwrap();
            let (mut after, _) = postcard::take_from_bytes::<VcpuRecord>(&after.bytes).unwrap();
            // Those that count by themselves: the TSC, and Hyper-V's reference time.
            let moves = |index: u32| index == vcpu_state::MSR_TSC || index == 0x4000_0020;
            for (was, is) in before.msrs.iter().zip(&after.msrs).filter(|(was, _)| !moves(was.0)) {
                assert_eq!(was, is, "MSR {:#x}", was.0);
            }
            assert_eq!((before.regs, &before.cpuid), (after.regs, &after.cpuid));
            assert!(before.msrs.len() == after.msrs.len() && before.msrs.len() > 10);
            before.msrs.clear();
            after.msrs.clear();
            assert_eq!(postcard::to_allocvec(&before).unwrap(), postcard::to_allocvec(&after).unwrap(), "LAPIC, FPU and all");
        } else if before.kind != Kind::Clock as u16 && before.kind != Kind::Pit as u16 {
            assert_eq!(before, after);
        }
    }
}

#[test]
fn a_machine_can_be_shared_by_threads() {
    fn shared<T: Send + Sync>() {}
    shared::<Machine>();
    shared::<StateRecord>();
}

#[test]
fn images_are_held_by_whoever_runs_the_guest_and_by_nobody_after_they_were_given_up() {
    if !has_kvm() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("disk.raw");
    std::fs::write(&path, [0; 8192]).unwrap();
    let format = Some(crate::disk::DiskFormat::Raw);
    let disk = crate::disk::DiskConfig { path, format, readonly: false, serial: String::new(), resolved: false };
    let config = || MachineConfig { disks: vec![disk.clone()], ..MachineConfig::new(1, MemoryConfig::new(16 << 20)) };
    let (source, destination) = (Machine::new(config()).unwrap(), Machine::new(config()).unwrap());
    assert_eq!(source.disks(), [crate::disk::DiskInfo { format: crate::disk::DiskFormat::Raw, bytes: 8192 }]);
    boot_walk(&source);
    source.resume().unwrap();
    assert!(matches!(source.give_up_disks(), Err(SaveError::Running)));
    source.pause().unwrap();
    destination.load(source.save().unwrap()).unwrap();
    let locked = |machine: &Machine| {
        let error = machine.resume().unwrap_err().to_string();
        assert!(error.contains("disk0") && error.contains("is locked by process"), "{error}");
        assert!(!machine.is_running());
    };
    // Not given up: the destination must not run, however it is asked.
    locked(&destination);
    source.give_up_disks().unwrap();
    source.give_up_disks().unwrap();
    destination.resume().unwrap();
    // Given up and taken by another: the source must not run.
    locked(&source);
    // The destination ends, however: what it had is free, and the source may run on.
    drop(destination);
    source.resume().unwrap();
    source.pause().unwrap();
    assert!(source.disks[0].is_held());
}
