//! Golden bytes of every message, round trips, and that no bytes at all make the parsers panic or take too much.
#![forbid(unsafe_code)]
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod golden;

use golden::{answers, description, requests};
use limosa_plug::description::Machine;
use limosa_plug::message::{
    ANSWER, Answer, HEADER_BYTES, Header, Hello, Kind, MESSAGE_BYTES_MAX, Malformed, Request, Role, Status, Token, emit,
    tidy_words, words_of,
};
use limosa_plug::state::VmState;
use limosa_proto::cpu::CpuProfile;
use limosa_proto::identity::VmId;
use proptest::prelude::*;
use std::fmt::Write as _;

fn hex(bytes: &[u8]) -> String {
    bytes.iter().fold(String::new(), |mut text, byte| {
        let _ = write!(text, "{byte:02x}");
        text
    })
}

fn body(datagram: &[u8], kind: u16, request: u32) -> String {
    let (header, body) = Header::parse(datagram).unwrap();
    assert_eq!((header.kind, header.status, header.request), (kind, 0, request));
    assert_eq!(datagram.len(), HEADER_BYTES + header.length as usize);
    hex(body)
}

#[test]
fn golden_header_and_hello() {
    let hello = Hello {
        version_min: 1,
        version_max: 2,
        role: Role::Running,
        state: VmState::Paused,
        pid: 0x1234,
        id: VmId([0x22; 16]),
        token: Token([0x33; 16]),
        name: "web".to_owned(),
    };
    let bytes = hello.emit().unwrap();
    let expected = concat!(
        "4c504c47",
        "0100",
        "0000",
        "33000000",
        "00000000",
        "0100",
        "0200",
        "01",
        "02",
        "0300",
        "34120000",
        "00000000",
        "22222222222222222222222222222222",
        "33333333333333333333333333333333",
        "776562",
    );
    assert_eq!(hex(&bytes), expected);
    assert_eq!(Hello::parse(&bytes[HEADER_BYTES..]).unwrap(), hello);
    assert_eq!(format!("{:?}", hello.token), "Token(..)");
    let incoming = Hello { state: VmState::Waiting, ..hello };
    assert!(Hello::parse(&incoming.emit().unwrap()[HEADER_BYTES..]).unwrap_err().why.contains("contradict"));
    assert_eq!(hex(&emit(Kind::Reject as u16, Status::Done, 0, b"no")), "4c504c4703000000020000000000000".to_owned() + "06e6f");
}

#[test]
fn golden_requests() {
    let all = requests();
    assert_eq!(all.iter().map(|(request, ..)| request.kind()).collect::<Vec<_>>(), Kind::REQUESTS);
    for (request, kind, expected) in all {
        let bytes = request.emit(0x0a0b_0c0d).unwrap();
        assert_eq!(body(&bytes, kind, 0x0a0b_0c0d), expected, "{request:?}");
        assert_eq!(Request::parse(request.kind(), &bytes[HEADER_BYTES..]).unwrap(), request);
    }
}

#[test]
fn golden_answers() {
    let all = answers();
    assert_eq!(all.len(), Kind::REQUESTS.len());
    for (answer, kind, expected) in all {
        let bytes = answer.emit(kind, 7).unwrap();
        assert_eq!(body(&bytes, kind as u16 | ANSWER, 7), expected, "{answer:?}");
        assert_eq!(Answer::parse(kind, &bytes[HEADER_BYTES..]).unwrap(), answer);
    }
}

#[test]
fn limits_hold_in_both_directions() {
    let mut vm = description();
    vm.config = vec![0; 64 * 1024];
    vm.cpu.leaves = vec![vm.cpu.leaves[0]; 256];
    vm.cpu.msrs = vec![vm.cpu.msrs[0]; 64];
    let largest = Request::Prepare(Box::new(vm.clone()), vec![]).emit(1).unwrap();
    assert!(largest.len() <= MESSAGE_BYTES_MAX);
    vm.config.push(0);
    assert!(Request::Prepare(Box::new(vm.clone()), vec![]).emit(1).unwrap_err().why.contains("65537"));
    vm.config.clear();
    vm.cpu.msrs.push((1, 1));
    assert!(Request::Prepare(Box::new(vm.clone()), vec![]).emit(1).unwrap_err().why.contains("65; at most 64"));
    vm.cpu = CpuProfile::default();
    let silent = Request::Prepare(Box::new(vm.clone()), vec![]);
    let bytes = silent.emit(1).unwrap();
    assert_eq!(Request::parse(Kind::Prepare, &bytes[HEADER_BYTES..]).unwrap(), silent, "a VMM that says nothing of its CPU");
    vm.name = "n".repeat(257);
    assert!(Request::Prepare(Box::new(vm.clone()), vec![]).emit(1).is_err());
    vm.name = "x".to_owned();
    vm.disks = vec![vm.disks[0].clone(); 9];
    assert!(Request::Prepare(Box::new(vm.clone()), vec![]).emit(1).unwrap_err().why.contains("at most 8"));
    vm.disks.truncate(1);
    vm.disks[0].path = "x".repeat(1025);
    assert!(Request::Prepare(Box::new(vm.clone()), vec![]).emit(1).unwrap_err().why.contains("at most 1024"));
    vm.disks.clear();
    vm.name = "two\nlines".to_owned();
    let bytes = Request::Prepare(Box::new(vm), vec![]).emit(1).unwrap();
    let error = Request::parse(Kind::Prepare, &bytes[HEADER_BYTES..]).unwrap_err();
    assert!(error.why.contains("control"), "{error}");
    let over = |count: u32, bytes: u64| {
        let mut body = count.to_le_bytes().to_vec();
        body.extend([0; 4]);
        body.extend(bytes.to_le_bytes());
        Request::parse(Kind::Load, &body)
    };
    assert!(over(4097, 0).is_err() && over(0, 1 << 40).is_err() && over(4096, 64 << 20).is_ok());
    assert!(Request::parse(Kind::Throttle, &100_u32.to_le_bytes()).is_err());
    assert!(Request::parse(Kind::Welcome, &[]).is_err());
}

#[test]
fn each_byte_cut_off_is_noticed() {
    for (request, ..) in requests() {
        let bytes = request.emit(1).unwrap();
        for end in HEADER_BYTES..bytes.len() {
            assert!(Request::parse(request.kind(), &bytes[HEADER_BYTES..end]).is_err(), "{request:?} cut at {end}");
            assert!(Header::parse(&bytes[..end]).is_err());
        }
    }
}

#[test]
fn words_are_made_fit_to_be_read() {
    assert_eq!(words_of(b"a\x1b[31mb\xff\n"), "a [31mb\u{fffd} ");
    assert_eq!(tidy_words(&"é".repeat(2000)).len(), 1024);
}

proptest! {
    #[test]
    fn no_bytes_make_a_parser_panic(bytes in proptest::collection::vec(any::<u8>(), 0..400)) {
        let _ = Header::parse(&bytes);
        let _ = Hello::parse(&bytes);
        let _ = Header::request_of(&bytes);
        let _ = words_of(&bytes);
        for kind in Kind::REQUESTS {
            let _ = Request::parse(kind, &bytes);
            let _ = Answer::parse(kind, &bytes);
        }
    }

    /// A valid message with some bytes changed: deeper into the parsers than noise gets.
    #[test]
    fn changed_messages_never_panic(changes in proptest::collection::vec((0_usize..400, any::<u8>()), 1..6)) {
        let machine = Answer::Machine(Box::new(Machine { description: description(), offsets: vec![0, 0] }));
        let mut answer = machine.emit(Kind::Describe, 1).unwrap();
        let mut request = Request::Prepare(Box::new(description()), vec![("a".into(), "b".into())]).emit(1).unwrap();
        for (at, byte) in changes {
            for bytes in [&mut answer, &mut request] {
                let length = bytes.len() - HEADER_BYTES;
                bytes[HEADER_BYTES + at % length] = byte;
            }
        }
        let parsed: Result<Request, Malformed> = Request::parse(Kind::Prepare, &request[HEADER_BYTES..]);
        if let Ok(parsed) = parsed {
            // What is understood means the same when it is said again.
            let again = parsed.emit(1).unwrap();
            prop_assert_eq!(Request::parse(Kind::Prepare, &again[HEADER_BYTES..]).unwrap(), parsed);
        }
        let _ = Answer::parse(Kind::Describe, &answer[HEADER_BYTES..]);
    }
}
