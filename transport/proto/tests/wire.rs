//! The bytes on the wire: golden bytes for every header and message, limits, and that nothing a peer sends panics.
#![allow(clippy::unwrap_used, clippy::panic)]

use limosa_proto::cpu::{CpuProfile, Leaf};
use limosa_proto::error::{Coded, Malformed, Violation, WireError};
use limosa_proto::identity::{Generation, MigrationId, VmId};
use limosa_proto::memory::{Gpa, MemoryMap, PageRange, Region};
use limosa_proto::record::Record;
use limosa_proto::ticket::{BYTES_MAX, TicketBytes};
use limosa_proto::wire::code::Code;
use limosa_proto::wire::frame::{
    CONTROL_HEADER_BYTES, ControlHeader, LANE_HEADER_BYTES, LANE_PREAMBLE_BYTES, LaneFrameKind, LaneHeader, LanePreamble,
    LaneToken, emit_runs, parse_runs,
};
use limosa_proto::wire::limits::MESSAGE_BYTES_MAX;
use limosa_proto::wire::message::{
    Accept, DestinationReport, DiskDescription, Hello, ImageFormat, Message, NicDescription, Reached, ReadyTimes, Reason,
    Refusal, ReleasedAnswer, RunningTimes, VerdictAnswer, VmDescription,
};
use limosa_proto::wire::offer::{Keys, KeysAsk, LinkAddress, LinkOffer, MemoryKey};
use proptest::prelude::*;

const MIGRATION: MigrationId = MigrationId([0xA1; 16]);
const GENERATION: Generation = Generation(0x0102_0304_0506_0708);

fn hex(bytes: &[u8]) -> String {
    let lines: Vec<String> =
        bytes.chunks(32).map(|line| line.iter().map(|byte| format!("{byte:02x}")).collect::<Vec<_>>().join(" ")).collect();
    lines.join("\n")
}

fn map() -> MemoryMap {
    let region = |gpa, pages: u64| Region { gpa: Gpa(gpa), bytes: pages * 4096, page_bytes: 4096 };
    MemoryMap::new(vec![region(0, 100), region(1 << 32, 300)]).unwrap()
}

fn cpu() -> CpuProfile {
    let leaf = Leaf { function: 7, index: 0, eax: 1, ebx: 1 << 5, ecx: 0, edx: 1 << 29 };
    CpuProfile { leaves: vec![leaf], msrs: vec![(0x10a, 0x2B)], tsc_khz: 2_100_000, tsc_scaling: true }
}

fn hello() -> Hello {
    Hello {
        versions: vec![1],
        vm: VmDescription {
            id: VmId([5; 16]),
            name: "web".to_owned(),
            vcpus: 2,
            memory: map(),
            nics: vec![NicDescription {
                mac: [2, 0, 0, 0, 0, 1],
                network: "lan".to_owned(),
                mtu: 1500,
                vlan: Some(7),
                addresses: vec!["10.0.0.7".parse().unwrap(), "fd00::7".parse().unwrap()],
            }],
            disks: vec![DiskDescription {
                path: "/srv/vm/web.qcow2".to_owned(),
                format: ImageFormat::Qcow2,
                readonly: false,
                bytes: 8 << 30,
                serial: "web-0".to_owned(),
                token: [0x7e; 32],
            }],
            vmm: "limosa".to_owned(),
            records: vec![(1, 1), (300, 2)],
            config: vec![0xC0, 0xFF],
            cpu: cpu(),
        },
        lanes: 4,
        plaintext_lanes: true,
        link: "rdma".to_owned(),
        page_check: true,
        downtime_target_ms: 50,
        downtime_ms_max: 2000,
        keepalive_ms: 2000,
        source_build: "limosa 0.1".to_owned(),
    }
}

fn every_message() -> Vec<Message> {
    vec![
        Message::Hello(Box::new(hello())),
        Message::Accept(Accept {
            version: 1,
            lanes: 4,
            plaintext_lanes: true,
            page_check: true,
            token: LaneToken([9; 32]),
            keepalive_ms: 2000,
            destination_build: "limosa 0.1".to_owned(),
        }),
        Message::Refuse(Refusal {
            code: Code::Busy,
            reasons: vec![Reason { id: "busy".to_owned(), words: "2 of 2".to_owned() }],
        }),
        Message::Prepared { populated_ms: 300 },
        Message::RoundDone { round: 3 },
        Message::Record(Record { kind: 300, version: 1, instance: 2, bytes: vec![1, 2, 3] }),
        Message::RecordsEnd { count: 1, bytes: 3, last_round: 4, paused: true },
        Message::Ready(ReadyTimes { load_us: 900 }),
        Message::Commit,
        Message::Running(RunningTimes { resume_us: 200 }),
        Message::Finished(DestinationReport {
            cpu_us: 1000,
            pages: 2,
            zero_pages: 1,
            bytes: 8192,
            announcements: vec!["arp".to_owned()],
            reached: Reached { after_us: Some(700), words: "ARP probe of 10.0.0.5 from br0".to_owned() },
        }),
        Message::Abort { code: Code::Unknown(4711), words: "no".to_owned() },
        Message::Keepalive { nonce: 1 },
        Message::KeepaliveAck { nonce: 300 },
        Message::VerdictAsk { released: true },
        Message::Verdict(VerdictAnswer::Discarded),
        Message::KeysAsk(KeysAsk { chunks: vec![0, 300] }),
        Message::Keys(Keys { keys: vec![MemoryKey { chunk: 300, address: 1 << 40, rkey: 0xABCD }] }),
        Message::LinksAsk,
        Message::Links(vec![LinkOffer {
            link: "rdma".to_owned(),
            available: true,
            words: "rxe0".to_owned(),
            port: Some(13560),
            addresses: vec![LinkAddress { address: "10.77.0.2".parse().unwrap(), mtu: Some(1024) }],
        }]),
        Message::Probe(vec![0; 3]),
        Message::ProbeAck { bytes: 3 },
        Message::CpuAsk,
        Message::Cpu(cpu()),
        Message::CheckAsk(Box::new(hello().vm)),
        Message::Checked(vec![Reason { id: "cpu-feature".to_owned(), words: "avx2".to_owned() }]),
        Message::ReleasedAsk,
        Message::Released(ReleasedAnswer::Open),
        Message::Ticket(TicketBytes::of(vec![1, 2, 3])),
    ]
}

#[test]
fn every_message_has_its_golden_bytes() {
    let mut text = String::new();
    for message in every_message() {
        let all = message.frame(MIGRATION, GENERATION).unwrap();
        let (head, body) = all.split_first_chunk::<CONTROL_HEADER_BYTES>().unwrap();
        let header = ControlHeader::parse(head).unwrap();
        assert_eq!((header.kind, header.emit()), (message.kind(), *head));
        header.check_body(body).unwrap();
        header.expect(MIGRATION, GENERATION).unwrap();
        assert_eq!(Message::parse(header.kind, body).unwrap(), message);
        text += &format!("{} {}\n{}\n", message.kind(), message.name(), hex(body));
    }
    insta::assert_snapshot!("messages", text);
}

#[test]
fn every_header_has_its_golden_bytes() {
    let control =
        ControlHeader { version: 1, kind: 9, length: 0x1234, crc: 0xDEAD_BEEF, migration: MIGRATION, generation: GENERATION };
    let preamble = LanePreamble { version: 1, lane: 3, migration: MIGRATION, generation: GENERATION, token: LaneToken([9; 32]) };
    let pages = LaneHeader {
        kind: LaneFrameKind::Pages,
        runs: 2,
        round: 7,
        bytes: 5 * 4096,
        migration: MIGRATION,
        generation: GENERATION,
    };
    let barrier = LaneHeader { kind: LaneFrameKind::Barrier, runs: 0, bytes: 0, ..pages };
    let mut runs = Vec::new();
    emit_runs(&[PageRange { first: 3, count: 4 }, PageRange { first: 128, count: 1 }], &mut runs);
    let text = format!(
        "control\n{}\npreamble\n{}\npages\n{}\nruns\n{}\nbarrier\n{}\n",
        hex(&control.emit()),
        hex(&preamble.emit()),
        hex(&pages.emit()),
        hex(&runs),
        hex(&barrier.emit())
    );
    insta::assert_snapshot!("headers", text);
    assert_eq!(ControlHeader::parse(&control.emit()), Ok(control));
    assert_eq!(LanePreamble::parse(&preamble.emit()), Ok(preamble));
    assert_eq!(LaneHeader::parse(&pages.emit()), Ok(pages));
    assert_eq!(LaneHeader::parse(&barrier.emit()), Ok(barrier));
}

#[test]
fn a_changed_byte_is_noticed() {
    let all = Message::Commit.frame(MIGRATION, GENERATION).unwrap();
    let message = Message::Abort { code: Code::Busy, words: "busy".to_owned() };
    let whole = message.frame(MIGRATION, GENERATION).unwrap();
    let (head, body) = whole.split_first_chunk::<CONTROL_HEADER_BYTES>().unwrap();
    let header = ControlHeader::parse(head).unwrap();
    for at in 0..body.len() {
        let mut bad = body.to_vec();
        bad[at] ^= 1;
        assert!(matches!(header.check_body(&bad), Err(Malformed::Checksum { .. })), "{at}");
    }
    assert!(matches!(header.check_body(&body[1..]), Err(Malformed::Length { .. })));
    let mut head: [u8; CONTROL_HEADER_BYTES] = all.try_into().unwrap();
    head[0] = b'X';
    let error = ControlHeader::parse(&head).unwrap_err();
    assert!(matches!(error, Malformed::Magic { .. }) && error.code() == Code::Malformed);
    assert_eq!(Violation::Excess { what: "lanes", found: 2, limit: 1 }.code(), Code::Violation);
}

#[test]
fn strangers_are_known() {
    let header =
        LaneHeader { kind: LaneFrameKind::Barrier, runs: 0, round: 7, bytes: 0, migration: MIGRATION, generation: GENERATION };
    assert_eq!(header.expect(MIGRATION, GENERATION, 7), Ok(()));
    assert!(matches!(header.expect(MIGRATION, GENERATION, 8), Err(Violation::Mismatch { .. })));
    assert!(matches!(header.expect(MIGRATION, Generation(1), 7), Err(Violation::Stranger { .. })));
    assert!(matches!(header.expect(MigrationId([0; 16]), GENERATION, 7), Err(Violation::Stranger { .. })));
    assert!(format!("{:?}", LaneToken([9; 32])).chars().all(|c| c != '9'), "a token is never printed");
}

#[test]
fn limits_hold_while_decoding() {
    let mut big = hello();
    big.vm.config = vec![0; (64 << 10) + 1];
    let body = Message::Hello(Box::new(big)).emit().unwrap();
    let error = Message::parse(1, &body).unwrap_err();
    assert!(matches!(error, Malformed::Body { what: "Hello", .. }), "{error}");
    let mut many = hello();
    many.vm.nics = vec![many.vm.nics[0].clone(); 65];
    assert!(Message::parse(1, &Message::Hello(Box::new(many)).emit().unwrap()).is_err());
    let mut long = hello();
    long.vm.name = "x".repeat(257);
    assert!(Message::parse(1, &Message::Hello(Box::new(long)).emit().unwrap()).is_err());
    let mut listed = hello();
    listed.vm.records = vec![(1, 1); 257];
    assert!(Message::parse(1, &Message::Hello(Box::new(listed)).emit().unwrap()).is_err());
    let disks = |change: &dyn Fn(&mut VmDescription)| {
        let mut hello = hello();
        change(&mut hello.vm);
        Message::parse(1, &Message::Hello(Box::new(hello)).emit().unwrap())
    };
    assert!(disks(&|vm| vm.disks = vec![vm.disks[0].clone(); 8]).is_ok());
    assert!(disks(&|vm| vm.disks = vec![vm.disks[0].clone(); 9]).is_err());
    assert!(disks(&|vm| vm.disks[0].path = "x".repeat(1025)).is_err());
    assert!(disks(&|vm| vm.disks[0].serial = "x".repeat(21)).is_err());
    let mut leaves = hello();
    leaves.vm.cpu.leaves = vec![leaves.vm.cpu.leaves[0]; 257];
    assert!(Message::parse(1, &Message::Hello(Box::new(leaves)).emit().unwrap()).is_err());
    let msrs = CpuProfile { msrs: vec![(1, 1); 65], ..cpu() };
    assert!(Message::parse(24, &Message::Cpu(msrs).emit().unwrap()).is_err());
    let words = Message::Abort { code: Code::Busy, words: "x".repeat(1025) };
    assert!(Message::parse(12, &words.emit().unwrap()).is_err());
    let record = |bytes| Message::Record(Record { kind: 1, version: 1, instance: 0, bytes: vec![7; bytes] });
    let body = record(1 << 20).emit().unwrap();
    assert_eq!(Message::parse(6, &body).unwrap(), record(1 << 20), "the largest record fits");
    assert!(Message::parse(6, &record((1 << 20) + 1).emit().unwrap()).is_err());
    assert!(record(1 << 21).emit().is_err());
    let ticket = |bytes| Message::Ticket(TicketBytes::of(vec![1; bytes]));
    assert!(Message::parse(29, &ticket(BYTES_MAX).emit().unwrap()).is_ok());
    assert!(Message::parse(29, &ticket(BYTES_MAX + 1).emit().unwrap()).is_err());
    // A list that promises more than any message can hold is refused before anything is allocated for it.
    assert!(Message::parse(1, &[0xFF, 0xFF, 0xFF, 0xFF, 0x0F]).is_err());
}

#[test]
fn bytes_left_over_and_unknown_kinds_are_errors() {
    for message in every_message() {
        let mut body = message.emit().unwrap();
        body.push(0);
        assert!(Message::parse(message.kind(), &body).is_err(), "{}", message.name());
    }
    for kind in [0, 30, 65_535] {
        assert!(matches!(Message::parse(kind, &[]), Err(Malformed::Value { .. })), "{kind}");
    }
    assert!(matches!(Message::parse(9, &vec![0; MESSAGE_BYTES_MAX + 1]), Err(Malformed::TooLarge { .. })));
}

#[test]
fn bad_lane_headers_are_named() {
    let good =
        LaneHeader { kind: LaneFrameKind::Pages, runs: 1, round: 1, bytes: 4096, migration: MIGRATION, generation: GENERATION };
    let bad = [
        LaneHeader { runs: 0, ..good },
        LaneHeader { runs: 257, ..good },
        LaneHeader { round: 0, ..good },
        LaneHeader { round: 10_001, ..good },
        LaneHeader { bytes: 0, ..good },
        LaneHeader { bytes: 4097, ..good },
        LaneHeader { bytes: (4 << 20) + 4096, ..good },
        LaneHeader { kind: LaneFrameKind::Zero, ..good },
        LaneHeader { kind: LaneFrameKind::Barrier, bytes: 0, ..good },
        LaneHeader { kind: LaneFrameKind::End, runs: 0, ..good },
    ];
    for header in bad {
        assert!(LaneHeader::parse(&header.emit()).is_err(), "{header:?}");
    }
    for at in [4, 5, 44, 47] {
        let mut bytes = good.emit();
        bytes[at] = 0x55;
        assert!(LaneHeader::parse(&bytes).is_err(), "byte {at}");
    }
    let preamble = LanePreamble { version: 1, lane: 16, migration: MIGRATION, generation: GENERATION, token: LaneToken([0; 32]) };
    assert!(LanePreamble::parse(&preamble.emit()).is_err());
    assert!(LanePreamble::parse(&LanePreamble { version: 0, lane: 0, ..preamble }.emit()).is_err());
    let mut bytes = LanePreamble { lane: 0, ..preamble }.emit();
    bytes[LANE_PREAMBLE_BYTES - 1] = 1;
    assert!(LanePreamble::parse(&bytes).is_err());
}

#[test]
fn runs_must_lie_in_the_memory_and_rise() {
    let parse = |kind, runs: &[(u64, u64)], bytes: u64| {
        let runs: Vec<PageRange> = runs.iter().map(|(first, count)| PageRange { first: *first, count: *count }).collect();
        let mut table = Vec::new();
        emit_runs(&runs, &mut table);
        let header = LaneHeader {
            kind,
            runs: u16::try_from(runs.len()).unwrap(),
            round: 1,
            bytes,
            migration: MIGRATION,
            generation: GENERATION,
        };
        parse_runs(&table, &map(), &header)
    };
    use LaneFrameKind::{Pages, Zero};
    assert_eq!(parse(Pages, &[(0, 2), (128, 300)], 302 * 4096).unwrap().len(), 2);
    assert!(parse(Zero, &[(0, 100)], 0).is_ok());
    assert!(matches!(parse(Pages, &[(0, 2)], 4096), Err(WireError::Violation(Violation::Mismatch { .. }))));
    for runs in
        [[(2, 1), (1, 1)], [(0, 2), (1, 1)], [(99, 2), (128, 1)], [(100, 1), (128, 1)], [(0, 0), (1, 1)], [(0, 1), (428, 1)]]
    {
        assert!(matches!(parse(Zero, &runs, 0), Err(WireError::Malformed(Malformed::Run { .. }))), "{runs:?}");
    }
    assert!(parse(Zero, &[(u64::MAX, u64::from(u32::MAX))], 0).is_err());
    let header = LaneHeader { kind: Zero, runs: 2, round: 1, bytes: 0, migration: MIGRATION, generation: GENERATION };
    assert!(matches!(parse_runs(&[0; 12], &map(), &header), Err(WireError::Malformed(Malformed::Length { .. }))));
}

proptest! {
    #[test]
    fn no_bytes_panic(kind in 0_u16..28, body in proptest::collection::vec(any::<u8>(), 0..400)) {
        if let Ok(message) = Message::parse(kind, &body) {
            // What was understood is sent again as something that is understood the same.
            let again = message.emit().unwrap();
            prop_assert_eq!(Message::parse(kind, &again).unwrap(), message);
        }
    }

    #[test]
    fn a_spoilt_message_does_not_panic(which in 0_usize..26, at in any::<prop::sample::Index>(), value in any::<u8>(), cut in any::<bool>()) {
        let message = &every_message()[which];
        let mut body = message.emit().unwrap();
        if !body.is_empty() {
            let at = at.index(body.len());
            body[at] = value;
            if cut { body.truncate(at); }
        }
        let _ = Message::parse(message.kind(), &body);
    }

    #[test]
    fn headers_go_there_and_back(bytes in proptest::collection::vec(any::<u8>(), 72..=72), fix in any::<bool>()) {
        let mut control: [u8; CONTROL_HEADER_BYTES] = bytes[..CONTROL_HEADER_BYTES].try_into().unwrap();
        let mut lane: [u8; LANE_HEADER_BYTES] = bytes[..LANE_HEADER_BYTES].try_into().unwrap();
        let mut preamble: [u8; LANE_PREAMBLE_BYTES] = bytes.try_into().unwrap();
        if fix {
            control[..4].copy_from_slice(b"LMSA");
            control[10..12].fill(0);
            lane[..4].copy_from_slice(b"LMSP");
            (lane[4], lane[5], lane[7], lane[10], lane[11]) = (lane[4] % 5, 0, 0, 0, 0);
            lane[12] = 0;
            lane[15..20].fill(0);
            lane[44..].fill(0);
            preamble[..4].copy_from_slice(b"LMSL");
            (preamble[6], preamble[7]) = (preamble[6] % 20, 0);
            preamble[64..].fill(0);
        }
        if let Ok(header) = ControlHeader::parse(&control) { prop_assert_eq!(header.emit(), control); }
        if let Ok(header) = LanePreamble::parse(&preamble) { prop_assert_eq!(header.emit(), preamble); }
        if let Ok(header) = LaneHeader::parse(&lane) { prop_assert_eq!(header.emit(), lane); }
    }

    #[test]
    fn tables_of_runs_do_not_panic(table in proptest::collection::vec(any::<u8>(), 0..120), pages in any::<bool>()) {
        let kind = if pages { LaneFrameKind::Pages } else { LaneFrameKind::Zero };
        let runs = u16::try_from(table.len() / 12).unwrap();
        let header = LaneHeader { kind, runs, round: 1, bytes: 4096, migration: MIGRATION, generation: GENERATION };
        if let Ok(runs) = parse_runs(&table, &map(), &header) {
            for run in runs { prop_assert!(map().locate(run).is_some()); }
        }
    }
}
