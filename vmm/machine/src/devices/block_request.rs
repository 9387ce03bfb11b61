//! What a chain of a virtio block device asks for: where its header, data and status lie, and which command it is. Pure: no
//! memory is read here and no disk; `block.rs` does both. Whatever a guest writes, it gets a command within the disk or a
//! status.

use super::queue::Segment;
use crate::disk::image::SECTOR_BYTES;

/// Most segments of a request, and most bytes of each, as the driver is told: 126 with header and status are half a queue.
pub(crate) const SEGMENTS_MAX: u32 = 126;
pub(crate) const SEGMENT_BYTES_MAX: u32 = 64 << 10;
/// Most data of a request: what a pause may have to wait for.
const DATA_BYTES_MAX: u64 = SEGMENTS_MAX as u64 * SEGMENT_BYTES_MAX as u64;
/// Most ranges in one request to discard, and sectors of each (1 GiB): the file system only marks them.
pub(crate) const DISCARD_RANGES_MAX: u32 = 16;
pub(crate) const DISCARD_SECTORS_MAX: u32 = 1 << 21;
/// Most sectors to zero in one request (32 MiB): where the file system has no better way they are written.
pub(crate) const ZERO_SECTORS_MAX: u32 = 1 << 16;
pub(crate) const HEADER_BYTES: u64 = 16;
const RANGE_BYTES: u64 = 16;
/// Most bytes of a list of ranges.
pub(crate) const RANGES_BYTES_MAX: u64 = DISCARD_RANGES_MAX as u64 * RANGE_BYTES;
/// The length of a serial number.
pub(crate) const ID_BYTES: usize = 20;

const TYPE_IN: u32 = 0;
const TYPE_OUT: u32 = 1;
const TYPE_FLUSH: u32 = 4;
const TYPE_GET_ID: u32 = 8;
const TYPE_DISCARD: u32 = 11;
const TYPE_WRITE_ZEROES: u32 = 13;
const FLAG_UNMAP: u32 = 1;

/// How a request ended, as the driver is told.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub(crate) enum Status {
    Ok = 0,
    /// It failed, or makes no sense for this disk.
    Error = 1,
    /// There is no such request.
    Unsupported = 2,
}

/// A piece of guest memory: address and bytes.
pub(crate) type Piece = (u64, u64);

/// Where the parts of a request lie in guest memory.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Layout {
    /// Together 16 bytes.
    pub(crate) header: Vec<Piece>,
    /// Data from the guest.
    pub(crate) from: Vec<Piece>,
    /// Room for data to the guest.
    pub(crate) into: Vec<Piece>,
    /// The byte for the status.
    pub(crate) status: u64,
}

/// How many bytes the pieces have together.
pub(crate) fn bytes(pieces: &[Piece]) -> u64 {
    // A chain has less than 4 GiB.
    pieces.iter().map(|(_, bytes)| bytes).sum()
}

/// The first `count` bytes of the pieces, and the rest.
fn split(pieces: Vec<Piece>, mut count: u64) -> (Vec<Piece>, Vec<Piece>) {
    let (mut head, mut rest) = (Vec::new(), Vec::new());
    for (address, bytes) in pieces {
        let here = bytes.min(count);
        count -= here;
        if here > 0 {
            head.push((address, here));
        }
        if bytes > here {
            // Within guest memory, as the queue has checked.
            rest.push((address.saturating_add(here), bytes - here));
        }
    }
    (head, rest)
}

/// The first `count` bytes of the pieces, or all of them.
pub(crate) fn first(pieces: &[Piece], count: u64) -> Vec<Piece> {
    split(pieces.to_vec(), count).0
}

/// The pieces in batches of at most `most` bytes (not 0), cut where that is needed.
pub(crate) fn batches(pieces: &[Piece], most: u64) -> Vec<Vec<Piece>> {
    let mut all = Vec::new();
    let mut rest = pieces.to_vec();
    loop {
        let (batch, more) = split(rest, most);
        if batch.is_empty() {
            return all;
        }
        all.push(batch);
        rest = more;
    }
}

/// Finds the parts of a chain, however the driver cut it into segments; none without room for header or status.
pub(crate) fn lay_out(segments: &[Segment]) -> Option<Layout> {
    let of = |writable: bool| {
        let those = segments.iter().filter(|segment| segment.writable == writable);
        those.map(|segment| (segment.address, u64::from(segment.bytes))).collect::<Vec<_>>()
    };
    let (header, from) = split(of(false), HEADER_BYTES);
    if bytes(&header) != HEADER_BYTES {
        return None;
    }
    let room = of(true);
    let (into, status) = {
        let all = bytes(&room);
        split(room, all.checked_sub(1)?)
    };
    let (status, _) = *status.first()?;
    Some(Layout { header, from, into, status })
}

/// Bytes of the disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Range {
    pub(crate) offset: u64,
    pub(crate) bytes: u64,
    /// Zeroing may give the space back.
    pub(crate) unmap: bool,
}

/// What a request asks for. All of it lies within the disk.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Command {
    /// Fill the guest's room from this byte of the disk on.
    Read { offset: u64 },
    /// Write the guest's data from this byte of the disk on.
    Write { offset: u64 },
    /// Bring everything to the medium.
    Flush,
    /// The serial number.
    Id,
    /// Give space back; the guest's data is a list of ranges.
    Discard,
    /// Make zero; the guest's data is a list of ranges.
    Zero,
}

/// What a disk can do.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Limits {
    pub(crate) sectors: u64,
    pub(crate) readonly: bool,
}

impl Limits {
    /// The first byte of a run of sectors that lies within the disk.
    fn within(self, sector: u64, sectors: u64) -> Result<u64, Status> {
        let end = sector.checked_add(sectors).ok_or(Status::Error)?;
        if sectors == 0 || end > self.sectors { Err(Status::Error) } else { Ok(sector * SECTOR_BYTES) }
    }

    fn data(self, sector: u64, bytes: u64) -> Result<u64, Status> {
        if !bytes.is_multiple_of(SECTOR_BYTES) || bytes > DATA_BYTES_MAX {
            return Err(Status::Error);
        }
        self.within(sector, bytes / SECTOR_BYTES)
    }

    fn writes(self) -> Result<(), Status> {
        if self.readonly { Err(Status::Error) } else { Ok(()) }
    }
}

/// What the 16 bytes of a header ask for, with so much data from the guest and so much room for data to it.
pub(crate) fn command(header: [u8; HEADER_BYTES as usize], from: u64, into: u64, limits: Limits) -> Result<Command, Status> {
    let [t0, t1, t2, t3, _, _, _, _, s0, s1, s2, s3, s4, s5, s6, s7] = header;
    let sector = u64::from_le_bytes([s0, s1, s2, s3, s4, s5, s6, s7]);
    match u32::from_le_bytes([t0, t1, t2, t3]) {
        TYPE_IN => Ok(Command::Read { offset: limits.data(sector, into)? }),
        TYPE_OUT => {
            limits.writes()?;
            Ok(Command::Write { offset: limits.data(sector, from)? })
        }
        TYPE_FLUSH => Ok(Command::Flush),
        TYPE_GET_ID if into >= ID_BYTES as u64 => Ok(Command::Id),
        TYPE_GET_ID => Err(Status::Error),
        kind @ (TYPE_DISCARD | TYPE_WRITE_ZEROES) => {
            limits.writes()?;
            let most = if kind == TYPE_DISCARD { RANGES_BYTES_MAX } else { RANGE_BYTES };
            if from == 0 || !from.is_multiple_of(RANGE_BYTES) || from > most {
                return Err(Status::Error);
            }
            Ok(if kind == TYPE_DISCARD { Command::Discard } else { Command::Zero })
        }
        _ => Err(Status::Unsupported),
    }
}

/// The ranges of a request to discard, or to make zero. All are checked before any is used.
pub(crate) fn ranges(list: &[u8], zero: bool, limits: Limits) -> Result<Vec<Range>, Status> {
    let (list, _) = list.as_chunks::<{ RANGE_BYTES as usize }>();
    let range = |bytes: &[u8; RANGE_BYTES as usize]| {
        let [s0, s1, s2, s3, s4, s5, s6, s7, n0, n1, n2, n3, f0, f1, f2, f3] = *bytes;
        let sectors = u32::from_le_bytes([n0, n1, n2, n3]);
        let flags = u32::from_le_bytes([f0, f1, f2, f3]);
        if flags & !FLAG_UNMAP != 0 || (flags != 0 && !zero) {
            return Err(Status::Unsupported);
        }
        if sectors > if zero { ZERO_SECTORS_MAX } else { DISCARD_SECTORS_MAX } {
            return Err(Status::Error);
        }
        let sector = u64::from_le_bytes([s0, s1, s2, s3, s4, s5, s6, s7]);
        let offset = limits.within(sector, u64::from(sectors))?;
        Ok(Range { offset, bytes: u64::from(sectors) * SECTOR_BYTES, unmap: flags & FLAG_UNMAP != 0 })
    };
    list.iter().map(range).collect()
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::panic)]
    use super::*;
    use proptest::prelude::*;

    const DISK: Limits = Limits { sectors: 100, readonly: false };

    fn header(kind: u32, sector: u64) -> [u8; 16] {
        let mut header = [0; 16];
        header[..4].copy_from_slice(&kind.to_le_bytes());
        header[8..].copy_from_slice(&sector.to_le_bytes());
        header
    }

    fn range(sector: u64, sectors: u32, flags: u32) -> Vec<u8> {
        [&sector.to_le_bytes()[..], &sectors.to_le_bytes()[..], &flags.to_le_bytes()[..]].concat()
    }

    fn segment(address: u64, bytes: u32, writable: bool) -> Segment {
        Segment { address, bytes, writable }
    }

    #[test]
    fn parts_are_found_however_a_chain_is_cut() {
        let usual = [segment(0, 16, false), segment(0x1000, 512, true), segment(0x3000, 1, true)];
        let expected = Layout { header: vec![(0, 16)], from: vec![], into: vec![(0x1000, 512)], status: 0x3000 };
        assert_eq!(lay_out(&usual), Some(expected));
        let odd = [segment(0, 10, false), segment(0x100, 0, false), segment(0x200, 518, false), segment(0x900, 3, true)];
        let expected =
            Layout { header: vec![(0, 10), (0x200, 6)], from: vec![(0x206, 512)], into: vec![(0x900, 2)], status: 0x902 };
        assert_eq!(lay_out(&odd), Some(expected));
        for without in [&usual[..1], &usual[1..], &[segment(0, 15, false), segment(0, 1, true)], &[]] {
            assert_eq!(lay_out(without), None);
        }
    }

    #[test]
    fn data_is_carried_in_batches() {
        let pieces = [(0, 10), (0x100, 25), (0x200, 5)];
        let expected = vec![vec![(0, 10), (0x100, 10)], vec![(0x10a, 15), (0x200, 5)]];
        assert_eq!(batches(&pieces, 20), expected);
        assert_eq!((batches(&[], 20), batches(&[(7, 0)], 20)), (vec![], vec![]));
        assert_eq!((first(&pieces, 12), first(&pieces, 99)), (vec![(0, 10), (0x100, 2)], pieces.to_vec()));
    }

    #[test]
    fn requests_that_make_sense_are_understood() {
        assert_eq!(command(header(0, 3), 0, 1024, DISK), Ok(Command::Read { offset: 1536 }));
        assert_eq!(command(header(1, 99), 512, 0, DISK), Ok(Command::Write { offset: 99 * 512 }));
        assert_eq!(command(header(4, 0), 0, 0, DISK), Ok(Command::Flush));
        assert_eq!(command(header(8, 0), 0, 20, DISK), Ok(Command::Id));
        assert_eq!(command(header(11, 0), 32, 0, DISK), Ok(Command::Discard));
        assert_eq!(command(header(13, 0), 16, 0, DISK), Ok(Command::Zero));
        let list = [range(1, 2, 0), range(50, 50, 0)].concat();
        let expected = [Range { offset: 512, bytes: 1024, unmap: false }, Range { offset: 25_600, bytes: 25_600, unmap: false }];
        assert_eq!(ranges(&list, false, DISK).unwrap(), expected);
        assert!(ranges(&range(1, 2, 1), true, DISK).unwrap()[0].unmap);
    }

    #[test]
    fn requests_that_make_none_get_a_status() {
        let error = Err(Status::Error);
        for (kind, sector, from, into) in [
            (0, 99, 0, 1024),
            (0, 0, 0, 0),
            (0, 0, 0, 511),
            (0, u64::MAX, 0, 512),
            (0, 0, 0, DATA_BYTES_MAX + 512),
            (1, 100, 512, 0),
            (8, 0, 0, 19),
            (11, 0, 0, 0),
            (11, 0, 17, 0),
            (11, 0, 17 * 16, 0),
            (13, 0, 32, 0),
        ] {
            assert_eq!(command(header(kind, sector), from, into, DISK), error, "{kind} {sector} {from} {into}");
        }
        assert_eq!(command(header(2, 0), 0, 0, DISK), Err(Status::Unsupported));
        let readonly = Limits { readonly: true, ..DISK };
        for kind in [1, 11, 13] {
            assert_eq!(command(header(kind, 0), 512, 0, readonly), error);
        }
        command(header(0, 0), 0, 512, readonly).unwrap();
        let large = Limits { sectors: 1 << 40, readonly: false };
        assert_eq!(ranges(&range(0, DISCARD_SECTORS_MAX + 1, 0), false, large), Err(Status::Error));
        assert_eq!(ranges(&range(0, ZERO_SECTORS_MAX + 1, 0), true, large), Err(Status::Error));
        assert_eq!(ranges(&range(0, 1, 1), false, DISK), Err(Status::Unsupported));
        assert_eq!(ranges(&range(0, 1, 2), true, DISK), Err(Status::Unsupported));
        assert_eq!(ranges(&[range(0, 1, 0), range(99, 2, 0)].concat(), false, DISK), Err(Status::Error));
    }

    proptest! {
        #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() })]
        /// Whatever the chain, its parts are within its segments and none of its bytes is in two parts.
        #[test]
        fn any_chain_is_cut_within_its_segments(
            cut in proptest::collection::vec((0_u64..8, 0_u32..2000, any::<bool>()), 0..12),
        ) {
            let segments: Vec<Segment> =
                cut.iter().zip(0..).map(|((page, bytes, writable), n)| segment(n << 20 | page << 12, *bytes, *writable)).collect();
            let Some(layout) = lay_out(&segments) else { return Ok(()) };
            let sum = |writable| segments.iter().filter(|s| s.writable == writable).map(|s| u64::from(s.bytes)).sum::<u64>();
            prop_assert_eq!(bytes(&layout.header), 16);
            prop_assert_eq!(16 + bytes(&layout.from), sum(false));
            prop_assert_eq!(bytes(&layout.into) + 1, sum(true));
            let inside = |(address, bytes): Piece, writable: bool| segments.iter().any(|s| {
                s.writable == writable && address >= s.address && address + bytes <= s.address + u64::from(s.bytes)
            });
            prop_assert!(layout.header.iter().chain(&layout.from).all(|piece| inside(*piece, false)));
            prop_assert!(layout.into.iter().chain([&(layout.status, 1)]).all(|piece| inside(*piece, true)));
        }

        /// Whatever the bytes, what is understood lies within the disk.
        #[test]
        fn any_header_and_list_stay_within_the_disk(
            kind in 0_u32..16,
            sector in prop_oneof![0_u64..120, any::<u64>()],
            data in prop_oneof![0_u64..70_000, any::<u64>()],
            list in proptest::collection::vec((prop_oneof![0_u64..120, any::<u64>()], 0_u32..120, 0_u32..3), 0..20),
        ) {
            match command(header(kind, sector), data, data, DISK) {
                Ok(Command::Read { offset } | Command::Write { offset }) => prop_assert!(offset + data <= 100 * 512),
                Ok(_) | Err(_) => {}
            }
            let list: Vec<u8> = list.into_iter().flat_map(|(sector, sectors, flags)| range(sector, sectors, flags)).collect();
            for zero in [false, true] {
                for range in ranges(&list, zero, DISK).unwrap_or_default() {
                    prop_assert!(range.bytes > 0 && range.offset + range.bytes <= 100 * 512);
                }
            }
        }
    }
}
