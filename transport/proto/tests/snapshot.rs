//! A snapshot's bytes: there and back, every truncation and every flipped byte noticed, hostile numbers refused before they
//! size anything. Files are the agent's tests; a snapshot of an earlier release is `tests/snapshot.rs`'s.
#![allow(clippy::unwrap_used, clippy::panic)]

use limosa_proto::identity::VmId;
use limosa_proto::memory::{Gpa, MemoryMap, PAGE_BYTES, PageRange, Region};
use limosa_proto::record::Record;
use limosa_proto::snapshot::{HEAD_BYTES, Piece, Reader, SECTION_BYTES, SavedGuest, SnapshotError, Writer};
use limosa_proto::wire::message::VmDescription;
use proptest::prelude::*;

fn guest() -> SavedGuest {
    let region = |gpa, pages: u64| Region { gpa: Gpa(gpa), bytes: pages * PAGE_BYTES, page_bytes: 4096 };
    let vm = VmDescription {
        id: VmId([5; 16]),
        name: "web".to_owned(),
        vcpus: 2,
        memory: MemoryMap::new(vec![region(0, 100), region(1 << 32, 200)]).unwrap(),
        nics: vec![],
        vmm: "limosa".to_owned(),
        records: vec![(1, 1)],
        disks: vec![],
        cpu: Default::default(),
        config: b"name = \"web\"".to_vec(),
    };
    SavedGuest { generation: 7, saved_unix_ms: 1, build: "limosa 0".to_owned(), vm }
}

fn record(bytes: usize) -> Record {
    Record { kind: 1, version: 1, instance: 3, bytes: vec![9; bytes] }
}

fn run(first: u64, count: u64) -> PageRange {
    PageRange { first, count }
}

fn pages(writer: &mut Writer, runs: &[PageRange]) -> Vec<u8> {
    let mut section = Vec::new();
    writer.pages(&mut section, runs, |run, bytes| bytes.fill(run.first as u8 | 1));
    section
}

fn snapshot() -> Vec<u8> {
    let mut writer = Writer::default();
    let mut all = Writer::head().to_vec();
    all.extend(writer.guest(&guest()).unwrap());
    all.extend(writer.record(&record(10)).unwrap());
    all.extend(writer.record(&record(0)).unwrap());
    all.extend(pages(&mut writer, &[run(3, 2), run(99, 1)]));
    all.extend(pages(&mut writer, &[run(128, 1)]));
    all.extend(writer.end());
    all
}

/// As the agent reads a file.
fn read(bytes: &[u8]) -> Result<Vec<Piece>, SnapshotError> {
    let Some((head, mut rest)) = bytes.split_first_chunk::<HEAD_BYTES>() else { return Err(SnapshotError::Magic) };
    let mut reader = Reader::head(head)?;
    let mut pieces = Vec::new();
    while !reader.has_ended() {
        let Some((head, after)) = rest.split_first_chunk::<SECTION_BYTES>() else {
            return Err(reader.cut_off("the file ends there"));
        };
        let section = reader.section(head, after.len() as u64)?;
        let (body, after) = after.split_at(section.length);
        pieces.push(reader.body(section, body)?);
        rest = after;
    }
    if rest.is_empty() { Ok(pieces) } else { Err(reader.cut_off("bytes after the end")) }
}

#[test]
fn what_was_written_is_read() {
    let pieces = read(&snapshot()).unwrap();
    assert_eq!(pieces.first(), Some(&Piece::Guest(Box::new(guest()))));
    assert_eq!(pieces[1..3], [Piece::Record(record(10)), Piece::Record(record(0))]);
    assert_eq!(pieces[3], Piece::Pages(vec![run(3, 2), run(99, 1)], 4 + 2 * 12));
    assert_eq!(pieces.last(), Some(&Piece::End));
}

#[test]
fn every_truncation_is_noticed() {
    let good = snapshot();
    for length in 0..good.len() {
        assert!(read(&good[..length]).is_err(), "{length} of {} bytes", good.len());
    }
    let mut long = good.clone();
    long.push(0);
    assert!(read(&long).is_err());
    assert!(matches!(read(&good[..good.len() - 1]), Err(SnapshotError::Truncated { section: 5, .. })));
}

#[test]
fn every_flipped_byte_is_noticed() {
    let good = snapshot();
    for at in 0..good.len() {
        let mut bad = good.clone();
        bad[at] ^= 0x10;
        assert!(read(&bad).is_err(), "byte {at}");
    }
}

#[test]
fn sections_keep_their_places() {
    // Left out, twice, or out of order: each piece is right by itself.
    let mut writer = Writer::default();
    let parts =
        [writer.guest(&guest()).unwrap(), writer.record(&record(1)).unwrap(), pages(&mut writer, &[run(3, 1)]), writer.end()];
    let of = |order: &[usize]| {
        let mut all = Writer::head().to_vec();
        order.iter().for_each(|at| all.extend(&parts[*at]));
        read(&all)
    };
    assert!(of(&[0, 1, 2, 3]).is_ok());
    for order in [&[0, 2, 3][..], &[0, 1, 1, 2, 3], &[0, 2, 1, 3], &[1, 2, 3], &[0, 1, 3], &[0, 1, 2], &[3]] {
        assert!(of(order).is_err(), "{order:?}");
    }
}

/// A section with this kind, number and body whose checksums are right.
fn forged(kind: u16, version: u16, number: u32, length: u32, body: &[u8]) -> Vec<u8> {
    let mut head = Vec::new();
    head.extend(kind.to_le_bytes());
    head.extend(version.to_le_bytes());
    head.extend(number.to_le_bytes());
    head.extend(length.to_le_bytes());
    head.extend(crc32fast::hash(body).to_le_bytes());
    head.extend(crc32fast::hash(&head).to_le_bytes());
    head.extend(body);
    head
}

fn hostile(kind: u16, body: &[u8]) -> SnapshotError {
    let mut all = Writer::head().to_vec();
    all.extend(Writer::default().guest(&guest()).unwrap());
    all.extend(forged(kind, 1, 1, body.len() as u32, body));
    read(&all).unwrap_err()
}

#[test]
fn hostile_numbers_are_refused() {
    let mut huge = Writer::head().to_vec();
    huge.extend(Writer::default().guest(&guest()).unwrap());
    huge.extend(forged(3, 1, 1, u32::MAX, &[]));
    assert!(read(&huge).unwrap_err().to_string().contains("more than Pages may have"), "before anything is allocated");
    let table = |runs: &[(u64, u32)], bytes: usize| {
        let mut body = (runs.len() as u32).to_le_bytes().to_vec();
        for (first, count) in runs {
            body.extend(first.to_le_bytes());
            body.extend(count.to_le_bytes());
        }
        body.resize(body.len() + bytes, 0);
        body
    };
    for body in [
        table(&[], 0),
        table(&[(0, 0)], 0),
        table(&[(0, 2)], 4096),
        table(&[(99, 2)], 8192),
        table(&[(100, 1)], 4096),
        table(&[(u64::MAX, u32::MAX)], 0),
        table(&[(5, 1), (5, 1)], 8192),
        table(&[(5, 1), (4, 1)], 8192),
        vec![0xff; 8],
        vec![],
    ] {
        assert!(matches!(hostile(3, &body), SnapshotError::Damaged { section: 1, .. }), "{body:?}");
    }
    assert!(matches!(hostile(1, &[]), SnapshotError::Damaged { .. }), "a second guest");
    assert!(matches!(hostile(2, &[1, 2]), SnapshotError::Damaged { .. }));
    assert!(matches!(hostile(9, &[]), SnapshotError::Damaged { .. }));
    assert!(matches!(hostile(4, &[0; 20]), SnapshotError::Damaged { .. }));
}

#[test]
fn another_version_is_said_to_be_one() {
    let mut other = snapshot();
    other[8] = 2;
    let crc = crc32fast::hash(&other[..12]);
    other[12..16].copy_from_slice(&crc.to_le_bytes());
    assert!(matches!(read(&other), Err(SnapshotError::Version { found: 2, known: 1, .. })), "{:?}", read(&other));
    let mut other = Writer::head().to_vec();
    other.extend(forged(1, 9, 0, 3, b"new"));
    let words = read(&other).unwrap_err().to_string();
    assert!(words.contains("the guest's description has version 9, and this build reads version 1"), "{words}");
}

proptest! {
    #[test]
    fn no_bytes_panic(bytes in proptest::collection::vec(any::<u8>(), 0..300), from in 0usize..5000) {
        let _ = read(&bytes);
        let good = snapshot();
        let from = from % good.len();
        let _ = read(&[&good[..from], &bytes].concat());
    }

    #[test]
    fn any_harm_is_noticed(at in any::<prop::sample::Index>(), bits in 1u8.., cut in any::<prop::sample::Index>()) {
        let good = snapshot();
        let mut bad = good.clone();
        bad[at.index(good.len())] ^= bits;
        prop_assert!(read(&bad).is_err());
        bad.truncate(cut.index(good.len()));
        prop_assert!(read(&bad).is_err());
    }

    #[test]
    fn a_body_may_be_anything(kind in 0u16..6, body in proptest::collection::vec(any::<u8>(), 0..400)) {
        let mut all = Writer::head().to_vec();
        all.extend(Writer::default().guest(&guest()).unwrap());
        all.extend(forged(kind, 1, 1, body.len() as u32, &body));
        prop_assert!(read(&all).is_err());
        let _ = read(&[Writer::head().to_vec(), forged(1, 1, 0, body.len() as u32, &body)].concat());
    }
}
