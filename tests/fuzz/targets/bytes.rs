//! Every decoder that sees bytes of a peer, a VMM, a file or the network: whatever comes, it says what is wrong or gives a
//! value, and a value that it gives is written as it was read. It opens no socket and no file.

use super::Taken;
use limosa_announce::{LEARNED_MAX, Learned, Way, claim};
use limosa_plug::message::{Answer, Header, Hello, Kind, Request, words_of};
use limosa_proto::allow::AllowList;
use limosa_proto::identity::{HostId, MigrationId, VmId};
use limosa_proto::journal;
use limosa_proto::memory::{Gpa, MemoryMap, Region};
use limosa_proto::snapshot::{HEAD_BYTES, Reader, SECTION_BYTES, Writer};
use limosa_proto::wire::frame::{
    CONTROL_HEADER_BYTES, ControlHeader, LANE_HEADER_BYTES, LANE_PREAMBLE_BYTES, LaneHeader, LanePreamble, parse_runs,
};
use limosa_proto::wire::limits::MESSAGE_BYTES_MAX;
use limosa_proto::wire::message::Message;

/// A stream of control messages, as a link cuts it into frames.
pub(super) fn control(data: &[u8]) {
    let mut rest = data;
    while let Some((head, after)) = rest.split_first_chunk::<CONTROL_HEADER_BYTES>() {
        let Ok(header) = ControlHeader::parse(head) else { return };
        assert!(header.length as usize <= MESSAGE_BYTES_MAX && header.emit() == *head);
        let Some((body, after)) = after.split_at_checked(header.length as usize) else { return };
        if header.check_body(body).is_err() || Message::parse(header.kind, body).is_err() {
            return;
        }
        rest = after;
    }
}

/// One message whose checksum is right: its kind in two bytes, then its body.
pub(super) fn message(data: &[u8]) {
    let Some((kind, body)) = data.split_first_chunk::<2>() else { return };
    let Ok(message) = Message::parse(u16::from_le_bytes(*kind), body) else { return };
    assert_eq!(message.kind(), u16::from_le_bytes(*kind));
    let again = message.emit().expect("what was read can be written");
    assert_eq!(Message::parse(message.kind(), &again).as_ref(), Ok(&message), "{message:?}");
}

/// A lane: its preamble, then frames. Page bytes are left out.
pub(super) fn lane(data: &[u8]) {
    let region = |gpa, pages: u64| Region { gpa: Gpa(gpa), bytes: pages * 4096, page_bytes: 4096 };
    let map = MemoryMap::new(vec![region(0, 100), region(1 << 32, 3000)]).expect("these regions are a memory");
    let Some((head, mut rest)) = data.split_first_chunk::<LANE_PREAMBLE_BYTES>() else { return };
    if let Ok(preamble) = LanePreamble::parse(head) {
        assert_eq!(preamble.emit(), *head);
    }
    while let Some((head, after)) = rest.split_first_chunk::<LANE_HEADER_BYTES>() {
        let Ok(header) = LaneHeader::parse(head) else { return };
        assert_eq!(header.emit(), *head);
        let Some((table, after)) = after.split_at_checked(header.runs_bytes()) else { return };
        let Ok(runs) = parse_runs(table, &map, &header) else { return };
        let mut end = 0;
        for run in runs {
            assert!(run.first >= end && map.locate(run).is_some());
            end = run.end();
        }
        rest = after;
    }
}

/// A journal's file.
pub(super) fn journal(data: &[u8]) {
    let Ok(found) = journal::read(data) else { return };
    assert!(found.good <= data.len());
    // What was good stays good without the tail, and what is written of it is read.
    let good = journal::read(data.get(..found.good).unwrap_or_default()).expect("the good part alone is good");
    assert_eq!(good, found);
    let again = journal::read(&journal::emit(&found.records)).expect("what was read can be written");
    assert_eq!(again.records.len(), found.records.len());
    for (before, after) in found.records.iter().zip(&again.records) {
        assert_eq!((before.kind, before.generation, before.vm), (after.kind, after.generation, after.vm));
    }
}

/// A snapshot: as it is, or (an odd first byte) sections of which only kind and body are given, so that checksums are right.
pub(super) fn snapshot(data: &[u8]) {
    let mut taken = Taken(data);
    if taken.u8().is_none_or(|mode| mode % 2 == 0) {
        return read_snapshot(taken.0);
    }
    let mut bytes = Writer::head().to_vec();
    let mut number = 0_u32;
    while let Some(kind) = taken.u8() {
        let body = taken.chunk();
        let mut head = [u16::from(kind).to_le_bytes(), 1_u16.to_le_bytes()].concat();
        head.extend(number.to_le_bytes());
        head.extend(u32::try_from(body.len()).unwrap_or(0).to_le_bytes());
        head.extend(crc32fast::hash(body).to_le_bytes());
        head.extend(crc32fast::hash(&head).to_le_bytes());
        bytes.extend(head);
        bytes.extend(body);
        number += 1;
    }
    read_snapshot(&bytes);
}

fn read_snapshot(bytes: &[u8]) {
    let Some((head, mut rest)) = bytes.split_first_chunk::<HEAD_BYTES>() else { return };
    let Ok(mut reader) = Reader::head(head) else { return };
    while !reader.has_ended() {
        let Some((head, after)) = rest.split_first_chunk::<SECTION_BYTES>() else { return };
        let Ok(section) = reader.section(head, after.len() as u64) else { return };
        let (body, after) = after.split_at(section.length);
        if reader.body(section, body).is_err() {
            return;
        }
        rest = after;
    }
}

/// A datagram of the plug: as it is, and as the body of each kind of request and answer.
pub(super) fn plug(data: &[u8]) {
    if let Ok((header, body)) = Header::parse(data) {
        assert_eq!(header.length as usize, body.len());
    }
    let Some((number, body)) = data.split_first() else { return };
    let _ = (Header::request_of(data), words_of(body));
    if let Ok(hello) = Hello::parse(body) {
        hello.emit().expect("what was read can be written");
    }
    let number = if *number == u8::MAX { Kind::GuestStopped as u16 } else { u16::from(*number) };
    let Some(kind) = Kind::from_number(number) else { return };
    if let Ok(request) = Request::parse(kind, body) {
        assert_eq!(request.kind(), kind);
        request.emit(1).expect("what was read can be written");
    }
    if let Ok(answer) = Answer::parse(kind, body) {
        answer.emit(kind, 1).expect("what was read can be written");
    }
}

/// Ethernet frames, from which a guest's addresses are learned.
pub(super) fn learn(data: &[u8]) {
    let mac = [2, 0, 0, 0, 0, 1];
    let mut learned = Learned::new(&[]);
    let mut taken = Taken(data);
    while let Some(way) = taken.u8() {
        let way = if way % 2 == 0 { Way::FromGuest } else { Way::ToGuest };
        let frame = taken.chunk();
        let _ = claim(mac, way, frame);
        learned.frame(mac, way, frame);
        assert!(learned.addresses().len() <= LEARNED_MAX, "{} addresses", learned.addresses().len());
    }
}

/// What people write: allow-lists and identities.
pub(super) fn text(data: &[u8]) {
    let Ok(text) = std::str::from_utf8(data) else { return };
    let lines: Vec<&str> = text.lines().collect();
    if let Ok((list, _)) = AllowList::new(&lines) {
        let default = AllowList::new::<&str>(&[]).expect("nothing is a list").0;
        let address = "192.0.2.1".parse().expect("an address");
        assert!(!default.decide(address).allowed, "nothing is allowed by default");
        let _ = list.decide(address);
    }
    for line in lines {
        same::<HostId>(line);
        same::<VmId>(line);
        same::<MigrationId>(line);
    }
}

/// What is read of `line` is the same when it is written and read again.
fn same<T: std::str::FromStr + std::fmt::Display + PartialEq>(line: &str) {
    let Ok(read) = line.parse::<T>() else { return };
    assert!(read.to_string().parse::<T>().is_ok_and(|again| again == read), "{line} is not written as it is read");
}
