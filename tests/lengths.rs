//! Hostile numbers in every place where a peer, a VMM or a file says how long something is. The places are found, not listed:
//! each golden message, header, datagram, ticket, record and section is walked byte by byte, and whatever can be read as a number
//! there (fixed width of either order, varint, decimal text) is replaced by each hostile value. Nothing may panic, and nothing
//! may take more memory than its limit: the allocator counts. Whether what is accepted makes sense is not asked here.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::print_stdout, missing_docs)]

#[path = "../vmm/plug/tests/golden/mod.rs"]
mod golden;

use limosa_plug::message::{Answer, HEADER_BYTES, Header, Hello, Request};
use limosa_proto::commit::{JournalRecord, JournalRecordKind};
use limosa_proto::identity::{Generation, HostId, MigrationId, Nonce, OperatorId, VmId};
use limosa_proto::memory::{Gpa, MemoryMap, Region};
use limosa_proto::snapshot::{HEAD_BYTES, Reader, SECTION_BYTES};
use limosa_proto::ticket::{Action, Claims, Guests, Link, Links, NamePattern, Ticket};
use limosa_proto::wire::frame::{
    CONTROL_HEADER_BYTES, ControlHeader, LANE_HEADER_BYTES, LANE_PREAMBLE_BYTES, LaneFrameKind, LaneHeader, LanePreamble,
    parse_runs,
};
use limosa_proto::wire::limits::MESSAGE_BYTES_MAX;
use limosa_proto::wire::message::Message;
use limosa_proto::{journal, lines};
use peak_alloc::PeakAlloc;
use ring::signature::{Ed25519KeyPair, KeyPair as _};
use std::collections::BTreeSet;
use std::path::Path;

#[global_allocator]
static MEMORY: PeakAlloc = PeakAlloc;

/// What judging a few hundred bytes may take, whatever is in them: lists are begun with at most 64 items.
const TAKEN_MAX: usize = 64 << 10;

fn text_of(path: &str) -> String {
    std::fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join(path)).unwrap()
}

/// Every limit of the wire, as `limits.rs` says them: one that is added there is tried here.
fn caps() -> Vec<u64> {
    let number = |text: &str| text.trim().replace('_', "").parse::<u64>().ok();
    let value = |text: &str| match text.split_once("<<") {
        None => number(text),
        Some((base, shift)) => Some(number(base)? << number(shift)?),
    };
    let text = text_of("transport/proto/src/wire/limits.rs");
    let constants = text.lines().filter_map(|line| line.strip_prefix("pub const ")?.strip_suffix(';')?.split_once('='));
    let mut caps: Vec<u64> = constants.filter_map(|(_, text)| value(text)).collect();
    assert!(caps.len() >= 20, "the limits are not found any more: {caps:?}");
    let plug = limosa_plug::message::MESSAGE_BYTES_MAX as u64;
    caps.extend([MESSAGE_BYTES_MAX as u64, 1 << 20, plug, journal::BYTES_MAX]);
    caps
}

fn values() -> BTreeSet<u64> {
    let fixed = [0, 1, (1 << 31) - 1, 1 << 31, (1 << 32) - 1, 1 << 32, (1 << 63) - 1, 1 << 63, u64::MAX];
    let around = |cap: u64| [cap.saturating_sub(1), cap, cap + 1];
    fixed.into_iter().chain(caps().into_iter().flat_map(around)).collect()
}

fn varint(mut value: u64) -> Vec<u8> {
    let mut bytes = Vec::new();
    while value >= 0x80 {
        bytes.push(value as u8 | 0x80);
        value >>= 7;
    }
    bytes.push(value as u8);
    bytes
}

/// Every change of `bytes` by which a number in it becomes a hostile one.
fn changed(bytes: &[u8], values: &BTreeSet<u64>, mut judge: impl FnMut(&[u8])) {
    let put = |at: usize, taken: usize, new: &[u8]| [&bytes[..at], new, &bytes[at + taken..]].concat();
    for at in 0..bytes.len() {
        let continued = bytes[at..].iter().take_while(|byte| **byte >= 0x80).count();
        let long = (continued + 1).min(bytes.len() - at);
        let digits = bytes[at..].iter().take_while(|byte| byte.is_ascii_digit()).count();
        let begins = digits > 0 && (at == 0 || !bytes[at - 1].is_ascii_digit());
        for value in values {
            judge(&put(at, long, &varint(*value)));
            if begins {
                judge(&put(at, digits, value.to_string().as_bytes()));
            }
            for width in [1, 2, 4, 8] {
                if at + width <= bytes.len() && (width == 8 || value >> (8 * width) == 0) {
                    judge(&put(at, width, &value.to_le_bytes()[..width]));
                    judge(&put(at, width, &value.to_be_bytes()[8 - width..]));
                }
            }
        }
    }
}

/// Judges every change of `bytes`, and says how many there were.
fn try_all(what: &str, bytes: &[u8], values: &BTreeSet<u64>, judge: impl Fn(&[u8])) -> usize {
    let mut count = 0;
    changed(bytes, values, |bad| {
        count += 1;
        let before = MEMORY.current_usage();
        MEMORY.reset_peak_usage();
        judge(bad);
        let taken = MEMORY.peak_usage().saturating_sub(before);
        assert!(taken <= TAKEN_MAX, "{what}: judging {} bytes took {taken}: {bad:02x?}", bad.len());
    });
    count
}

/// The golden bytes of a file of snapshots: the words of the line before, and the bytes.
fn golden_bytes(file: &str) -> Vec<(String, Vec<u8>)> {
    let text = text_of(file);
    let mut found: Vec<(String, Vec<u8>)> = Vec::new();
    for line in text.splitn(3, "---\n").last().unwrap().lines() {
        let bytes: Option<Vec<u8>> =
            line.split(' ').map(|digits| u8::from_str_radix(digits, 16).ok().filter(|_| digits.len() == 2)).collect();
        match (bytes, found.last_mut()) {
            (Some(bytes), Some((_, all))) => all.extend(bytes),
            _ if !line.is_empty() => found.push((line.to_owned(), Vec::new())),
            _ => {}
        }
    }
    found
}

fn memory() -> MemoryMap {
    let region = |gpa, pages: u64| Region { gpa: Gpa(gpa), bytes: pages * 4096, page_bytes: 4096 };
    MemoryMap::new(vec![region(0, 100), region(1 << 32, 300)]).unwrap()
}

fn control_messages(values: &BTreeSet<u64>) -> usize {
    let all = golden_bytes("transport/proto/tests/snapshots/wire__messages.snap");
    let kinds: Vec<u16> = all.iter().map(|(words, _)| words.split(' ').next().unwrap().parse().unwrap()).collect();
    let unknown = (1..).find(|kind| !kinds.contains(kind)).unwrap();
    assert!(
        Message::parse(unknown, &[]).is_err_and(|error| error.to_string().contains("kind")),
        "kind {unknown} has no golden bytes"
    );
    let each = all.iter().zip(kinds).map(|((words, body), kind)| {
        Message::parse(kind, body).unwrap();
        try_all(words, body, values, |bad| drop(Message::parse(kind, bad)))
    });
    each.sum()
}

fn headers(values: &BTreeSet<u64>) -> usize {
    let map = memory();
    let runs_of = |table: &[u8], header: &LaneHeader| drop(parse_runs(table, &map, header));
    let lane = |bytes: &[u8]| {
        let Some(header) = bytes.first_chunk::<LANE_HEADER_BYTES>().and_then(|head| LaneHeader::parse(head).ok()) else { return };
        runs_of(&vec![0; header.runs_bytes()], &header);
    };
    let judge = |words: &str, bytes: &[u8]| match words {
        "control" => {
            let header = bytes.first_chunk::<CONTROL_HEADER_BYTES>().and_then(|head| ControlHeader::parse(head).ok());
            assert!(header.is_none_or(|header| header.length as usize <= MESSAGE_BYTES_MAX), "{bytes:02x?}");
        }
        "preamble" => drop(bytes.first_chunk::<LANE_PREAMBLE_BYTES>().map(LanePreamble::parse)),
        "runs" => {
            let name = (MigrationId([0xA1; 16]), Generation(1));
            for kind in [LaneFrameKind::Pages, LaneFrameKind::Zero] {
                let header = LaneHeader { kind, runs: 2, round: 1, bytes: 5 * 4096, migration: name.0, generation: name.1 };
                if let Ok(runs) = parse_runs(bytes, &map, &header) {
                    assert!(runs.iter().all(|run| map.locate(*run).is_some()), "{runs:?} are not in the memory");
                }
            }
        }
        _ => lane(bytes),
    };
    let all = golden_bytes("transport/proto/tests/snapshots/wire__headers.snap");
    assert_eq!(all.len(), 5, "a new header: say how it is judged");
    all.iter().map(|(words, bytes)| try_all(words, bytes, values, |bad| judge(words, bad))).sum()
}

fn plug(values: &BTreeSet<u64>) -> usize {
    let mut count = 0;
    for (request, ..) in golden::requests() {
        let (kind, bytes) = (request.kind(), request.emit(1).unwrap());
        let (head, body) = bytes.split_at(HEADER_BYTES);
        count += try_all("a request's head", head, values, |bad| drop(Header::parse(&[bad, body].concat())));
        count += try_all("a request", body, values, |bad| drop(Request::parse(kind, bad)));
    }
    for (answer, kind, _) in golden::answers() {
        let bytes = answer.emit(kind, 1).unwrap();
        count += try_all("an answer", &bytes[HEADER_BYTES..], values, |bad| drop(Answer::parse(kind, bad)));
    }
    for seed in ["hello", "whole-0"] {
        let bytes = std::fs::read(Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fuzz/corpus/plug").join(seed)).unwrap();
        count += try_all(seed, &bytes, values, |bad| {
            let _ = (Header::parse(bad), Header::request_of(bad), Hello::parse(bad));
        });
    }
    count
}

fn tickets(values: &BTreeSet<u64>) -> usize {
    let key = Ed25519KeyPair::from_seed_unchecked(&[7; 32]).unwrap();
    let one = Claims {
        action: Action::Migrate,
        guests: Guests::One(VmId([0x11; 16])),
        source: HostId([0xaa; 32]),
        destination: HostId([0xbb; 32]),
        links: Links::of(&[Link::Tcp]),
        not_before: 1_800_000_000,
        not_after: 1_800_000_600,
        nonce: Nonce([0x22; 16]),
        issuer: OperatorId(key.public_key().as_ref().try_into().unwrap()),
    };
    let standing = Claims { guests: Guests::Named("web-*".parse::<NamePattern>().unwrap()), ..one.clone() };
    let each = [one, standing].map(|claims| {
        let signature = key.sign(&claims.to_sign()).as_ref().try_into().unwrap();
        let ticket = Ticket::sealed(claims, signature).unwrap();
        let bytes = try_all("a ticket", &ticket.emit(), values, |bad| drop(Ticket::decode(bad)));
        bytes
            + try_all("a ticket's text", ticket.text().as_bytes(), values, |bad| {
                drop(Ticket::parse(&String::from_utf8_lossy(bad)))
            })
    });
    each.iter().sum()
}

fn journals(values: &BTreeSet<u64>) -> usize {
    let record = JournalRecord {
        kind: JournalRecordKind::Ready,
        migration: MigrationId([1; 16]),
        generation: Generation(7),
        vm: VmId([2; 16]),
        peer: HostId([3; 32]),
        words: "why".to_owned(),
    };
    let whole = journal::emit(&[record]);
    let bodies: Vec<String> = lines::read(&whole).unwrap().bodies.into_iter().map(|(_, body)| body.to_owned()).collect();
    let mut count = try_all("a journal", &whole, values, |bad| drop(journal::read(bad)));
    // With checksums that are right, so that what is behind them is reached.
    for (which, body) in bodies.iter().enumerate() {
        count += try_all("a line of the journal", body.as_bytes(), values, |bad| {
            let Ok(bad) = std::str::from_utf8(bad) else { return };
            if bad.contains('\n') {
                return;
            }
            let lines = bodies.iter().enumerate().map(|(at, body)| lines::line_of(if at == which { bad } else { body }));
            drop(journal::read(&lines.collect::<Vec<_>>().concat()));
        });
    }
    count
}

/// A section's head with its checksum, before `body`.
fn sealed(head: &[u8], body: &[u8]) -> Vec<u8> {
    let mut made = head[..8.min(head.len())].to_vec();
    made.extend((body.len() as u32).to_le_bytes());
    made.extend(crc32fast::hash(body).to_le_bytes());
    made.extend(crc32fast::hash(&made).to_le_bytes());
    [made, body.to_vec()].concat()
}

fn read_snapshot(bytes: &[u8]) {
    let Some((head, mut rest)) = bytes.split_first_chunk::<HEAD_BYTES>() else { return };
    let Ok(mut reader) = Reader::head(head) else { return };
    while let Some((head, after)) = rest.split_first_chunk::<SECTION_BYTES>() {
        let Ok(section) = reader.section(head, after.len() as u64) else { return };
        let (body, after) = after.split_at(section.length);
        if reader.body(section, body).is_err() {
            return;
        }
        rest = after;
    }
}

fn snapshots(values: &BTreeSet<u64>) -> usize {
    let whole = std::fs::read(Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fuzz/corpus/snapshot/seed")).unwrap();
    // The corpus keeps a byte before it that says how it is to be taken.
    let whole = &whole[whole.windows(8).position(|bytes| bytes == limosa_proto::snapshot::MAGIC).unwrap()..];
    let mut count = try_all("a snapshot's head", &whole[..HEAD_BYTES], values, read_snapshot);
    let mut at = HEAD_BYTES;
    let mut sections = 0;
    while at < whole.len() {
        let (head, after) = whole[at..].split_at(SECTION_BYTES);
        let length = u32::from_le_bytes(head[8..12].try_into().unwrap()) as usize;
        let body = &after[..length];
        // Page bytes have no lengths in them.
        let (numbers, pages) = body.split_at(length.min(256));
        let made = |head: &[u8], body: &[u8]| [&whole[..at], &sealed(head, body), &after[length..]].concat();
        count += try_all("a section", numbers, values, |bad| read_snapshot(&made(head, &[bad, pages].concat())));
        count += try_all("a section's head", &head[..16], values, |bad| {
            let crc = crc32fast::hash(bad).to_le_bytes();
            read_snapshot(&[&whole[..at], bad, &crc, after].concat());
        });
        if after.len() == length {
            // One of pages where the kept one ends: one run of one page.
            let head = [&3_u16.to_le_bytes()[..], &1_u16.to_le_bytes(), &head[4..8]].concat();
            let runs = [&1_u32.to_le_bytes()[..], &0_u64.to_le_bytes(), &1_u32.to_le_bytes()].concat();
            let made = |runs: &[u8]| [&whole[..at], &sealed(&head, &[runs, &[0x55; 4096]].concat())].concat();
            count += try_all("a section of pages", &runs, values, |bad| read_snapshot(&made(bad)));
        }
        at += SECTION_BYTES + length;
        sections += 1;
    }
    assert!(sections >= 3, "the kept snapshot has {sections} sections");
    count
}

/// One test, because the allocator counts for the whole process.
#[test]
fn hostile_numbers_everywhere() {
    let values = values();
    println!("{} values: {values:?}", values.len());
    let tried = [
        ("control messages", control_messages(&values)),
        ("headers and runs", headers(&values)),
        ("plug", plug(&values)),
        ("tickets", tickets(&values)),
        ("journal", journals(&values)),
        ("snapshot", snapshots(&values)),
    ];
    for (what, count) in tried {
        println!("{what}: {count} hostile inputs");
        assert!(count > 1_000, "{what}: only {count} were tried");
    }
}
