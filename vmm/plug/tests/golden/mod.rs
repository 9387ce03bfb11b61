//! Every request and every answer of the plug with its bytes, for the tests of the messages and of hostile lengths.
#![allow(dead_code, unreachable_pub, missing_docs, clippy::unwrap_used)]

use limosa_plug::description::Machine;
use limosa_plug::message::{Answer, Kind, Request, StateSize, VmStatus};
use limosa_plug::state::VmState;
use limosa_proto::cpu::{CpuProfile, Leaf};
use limosa_proto::identity::VmId;
use limosa_proto::memory::{Gpa, MemoryMap, Region};
use limosa_proto::wire::message::{DiskDescription, ImageFormat, NicDescription, VmDescription};

fn cpu() -> CpuProfile {
    let leaf = Leaf { function: 7, index: 1, eax: 2, ebx: 3, ecx: 4, edx: 0x2000_0000 };
    CpuProfile { leaves: vec![leaf], msrs: vec![(0x10a, 0x2b)], tsc_khz: 0x20_0b20, tsc_scaling: true }
}

pub fn description() -> VmDescription {
    VmDescription {
        id: VmId([0x11; 16]),
        name: "web".to_owned(),
        vcpus: 2,
        memory: MemoryMap::new(vec![
            Region { gpa: Gpa(0), bytes: 0x20_0000, page_bytes: 4096 },
            Region { gpa: Gpa(1 << 32), bytes: 0x40_0000, page_bytes: 0x20_0000 },
        ])
        .unwrap(),
        nics: vec![NicDescription {
            mac: [0x52, 0x54, 0, 1, 2, 3],
            network: "lan".to_owned(),
            mtu: 1500,
            vlan: Some(7),
            addresses: vec!["10.0.0.5".parse().unwrap(), "fd00::5".parse().unwrap()],
        }],
        disks: vec![DiskDescription {
            path: "/vm/a".to_owned(),
            format: ImageFormat::Qcow2,
            readonly: true,
            bytes: 0x4000_0000,
            serial: "s0".to_owned(),
            token: [0; 32],
        }],
        vmm: "limosa".to_owned(),
        records: vec![(1, 2), (0x102, 1)],
        config: b"cfg".to_vec(),
        cpu: cpu(),
    }
}

/// The description of `description()`, as docs/PLUG.md lays it out.
const DESCRIPTION: &str = concat!(
    "11111111111111111111111111111111",
    "02000000",
    "0200",
    "0100",
    "0200",
    "0300",
    "0600",
    "0100",
    "03000000",
    "0100",
    "0100",
    "0000000000000000",
    "0000200000000000",
    "0010000000000000",
    "0000000001000000",
    "0000400000000000",
    "0000200000000000",
    "525400010203",
    "dc05",
    "0700",
    "0300",
    "0200",
    "0000",
    "6c616e",
    "04000000",
    "0a000005000000000000000000000000",
    "06000000",
    "fd000000000000000000000000000005",
    "0000004000000000",
    "02",
    "01",
    "0500",
    "0200",
    "0000",
    "2f766d2f61",
    "7330",
    "0100",
    "0200",
    "0201",
    "0100",
    "776562",
    "6c696d6f7361",
    "636667",
    "200b2000",
    "01",
    "000000",
    "07000000",
    "01000000",
    "02000000",
    "03000000",
    "04000000",
    "00000020",
    "0a010000",
    "00000000",
    "2b00000000000000",
);

/// Every request: kind, body.
pub fn requests() -> Vec<(Request, u16, String)> {
    let bridges = vec![("lan".to_owned(), "br0".to_owned())];
    let prepare = format!("{DESCRIPTION}{}", concat!("0100", "0000", "0300", "0300", "6c616e", "627230"));
    let none = String::new;
    vec![
        (Request::Describe, 0x10, none()),
        (Request::Prepare(Box::new(description()), bridges), 0x11, prepare),
        (Request::Track(true), 0x12, "01000000".to_owned()),
        (Request::FetchDirty, 0x13, none()),
        (Request::Pause, 0x14, none()),
        (Request::Save, 0x15, none()),
        (Request::Load(StateSize { count: 3, bytes: 0x1234 }), 0x16, "03000000000000003412000000000000".to_owned()),
        (Request::Resume, 0x17, none()),
        (Request::Throttle(99), 0x18, "63000000".to_owned()),
        (Request::Release, 0x19, none()),
        (Request::Discard, 0x1a, none()),
        (Request::Shutdown, 0x1b, none()),
        (Request::Status, 0x1c, none()),
        (Request::Yield, 0x1d, none()),
        (Request::Hold, 0x1e, none()),
    ]
}

/// Every answer: to which request, body.
pub fn answers() -> Vec<(Answer, Kind, String)> {
    let machine = || Answer::Machine(Box::new(Machine { description: description(), offsets: vec![0, 0x20_0000] }));
    let machine_bytes = || format!("{DESCRIPTION}00000000000000000000200000000000");
    let took = || Answer::Took { us: 0x0102 };
    let took_bytes = || "0201000000000000".to_owned();
    let status = VmStatus { state: VmState::Loaded, tracking: true, throttle_percent: 30, held: true };
    let mut all = vec![
        (machine(), Kind::Describe, machine_bytes()),
        (machine(), Kind::Prepare, machine_bytes()),
        (Answer::State(StateSize { count: 1, bytes: 20 }), Kind::Save, "01000000000000001400000000000000".to_owned()),
        (Answer::Status(status), Kind::Status, "05011e0100000000".to_owned()),
    ];
    let timed = [Kind::FetchDirty, Kind::Pause, Kind::Load, Kind::Resume, Kind::Yield, Kind::Hold];
    all.extend(timed.map(|kind| (took(), kind, took_bytes())));
    let done = [Kind::Track, Kind::Throttle, Kind::Release, Kind::Discard, Kind::Shutdown];
    all.extend(done.map(|kind| (Answer::Done, kind, String::new())));
    all
}
