//! Headers of fixed layout, little-endian: before every control message, first on every lane, before every lane frame.
//! They are the only thing that is parsed before its length is known to be sane. Bodies are in [`super::message`].

use super::limits::{FRAME_BYTES_MAX, LANES_MAX, MESSAGE_BYTES_MAX, ROUNDS_MAX, RUNS_PER_FRAME_MAX};
use crate::error::{Malformed, Violation, WireError};
use crate::identity::{Generation, MigrationId};
use crate::memory::{MemoryMap, PAGE_BYTES, PageRange};
use serde::{Deserialize, Serialize};
use std::fmt;
use std::hash::{Hash, Hasher};

/// First four bytes of a control header: "LMSA".
pub const MAGIC: u32 = u32::from_le_bytes(*b"LMSA");
/// First four bytes of a lane: "LMSL".
pub const LANE_MAGIC: u32 = u32::from_le_bytes(*b"LMSL");
/// First four bytes of a lane frame: "LMSP".
pub const FRAME_MAGIC: u32 = u32::from_le_bytes(*b"LMSP");
/// Length of a [`ControlHeader`].
pub const CONTROL_HEADER_BYTES: usize = 40;
/// Length of a [`LanePreamble`].
pub const LANE_PREAMBLE_BYTES: usize = 72;
/// Length of a [`LaneHeader`].
pub const LANE_HEADER_BYTES: usize = 48;
/// Length of one run in a lane frame.
pub const RUN_BYTES: usize = 12;

/// Before every control message.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ControlHeader {
    /// Version of the body's layout.
    pub version: u16,
    /// Kind of the message, see [`super::message::Message::kind`].
    pub kind: u16,
    /// Length of the body in bytes.
    pub length: u32,
    /// CRC-32 (IEEE) of the body.
    pub crc: u32,
    /// Which migration.
    pub migration: MigrationId,
    /// Which attempt.
    pub generation: Generation,
}

/// A secret that ties a lane to its migration; 32 random bytes chosen by the destination.
#[derive(Clone, Copy, Serialize, Deserialize)]
pub struct LaneToken(pub [u8; 32]);

impl fmt::Debug for LaneToken {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("LaneToken(…)")
    }
}

impl PartialEq for LaneToken {
    // Every byte is looked at, so that the time taken says nothing about where a guess went wrong.
    fn eq(&self, other: &LaneToken) -> bool {
        self.0.iter().zip(&other.0).fold(0, |found, (a, b)| found | (a ^ b)) == 0
    }
}

impl Eq for LaneToken {}

impl Hash for LaneToken {
    fn hash<H: Hasher>(&self, state: &mut H) {
        self.0.hash(state);
    }
}

/// The first bytes on a lane; inside TLS where the lane is TLS.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct LanePreamble {
    /// Agreed version of the protocol.
    pub version: u16,
    /// Which lane, from zero.
    pub lane: u16,
    /// Which migration.
    pub migration: MigrationId,
    /// Which attempt.
    pub generation: Generation,
    /// The token of the destination's Accept.
    pub token: LaneToken,
}

/// What a lane frame is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum LaneFrameKind {
    /// Runs, then the bytes of their pages.
    Pages,
    /// Runs of pages that are all zero; no bytes follow.
    Zero,
    /// The round's end on this lane.
    Barrier,
    /// The lane's end; nothing follows.
    End,
}

/// Before every lane frame.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct LaneHeader {
    /// What it is.
    pub kind: LaneFrameKind,
    /// How many runs follow.
    pub runs: u16,
    /// The round it belongs to, from 1.
    pub round: u32,
    /// Page bytes that follow the runs.
    pub bytes: u64,
    /// Which migration.
    pub migration: MigrationId,
    /// Which attempt.
    pub generation: Generation,
}

/// Reads little-endian fields one after the other out of an array whose length was checked by its type.
struct Fields<'a>(&'a [u8]);

impl Fields<'_> {
    fn take<const N: usize>(&mut self) -> [u8; N] {
        match self.0.split_first_chunk::<N>() {
            Some((head, rest)) => {
                self.0 = rest;
                *head
            }
            None => [0; N],
        }
    }
    fn u8(&mut self) -> u8 {
        u8::from_le_bytes(self.take())
    }
    fn u16(&mut self) -> u16 {
        u16::from_le_bytes(self.take())
    }
    fn u32(&mut self) -> u32 {
        u32::from_le_bytes(self.take())
    }
    fn u64(&mut self) -> u64 {
        u64::from_le_bytes(self.take())
    }
}

/// Joins fields to an array; they fill it exactly, which the golden tests hold.
fn join<const N: usize>(fields: &[&[u8]]) -> [u8; N] {
    let mut all = [0; N];
    for (to, from) in all.iter_mut().zip(fields.iter().copied().flatten()) {
        *to = *from;
    }
    all
}

fn magic(what: &'static str, found: u32, wanted: u32) -> Result<(), Malformed> {
    if found == wanted { Ok(()) } else { Err(Malformed::Magic { what, found }) }
}

fn at_most(what: &'static str, found: u64, limit: u64) -> Result<(), Malformed> {
    if found <= limit { Ok(()) } else { Err(Malformed::TooLarge { what, found, limit }) }
}

fn meant(what: &'static str, found: u64, good: bool) -> Result<(), Malformed> {
    if good { Ok(()) } else { Err(Malformed::Value { what, found }) }
}

fn same_migration(
    what: &'static str,
    found: (MigrationId, Generation),
    wanted: (MigrationId, Generation),
) -> Result<(), Violation> {
    if found == wanted {
        return Ok(());
    }
    let text = |(migration, Generation(generation))| format!("{migration} generation {generation}");
    Err(Violation::Stranger { what, found: text(found), wanted: text(wanted) })
}

impl ControlHeader {
    /// Parses a header and checks its length against [`MESSAGE_BYTES_MAX`].
    ///
    /// # Errors
    /// The magic number or the length is wrong.
    pub fn parse(bytes: &[u8; CONTROL_HEADER_BYTES]) -> Result<ControlHeader, Malformed> {
        let mut fields = Fields(bytes);
        magic("a control header", fields.u32(), MAGIC)?;
        let header = ControlHeader {
            version: fields.u16(),
            kind: fields.u16(),
            length: fields.u32(),
            crc: fields.u32(),
            migration: MigrationId(fields.take()),
            generation: Generation(fields.u64()),
        };
        at_most("the length of a control message", header.length.into(), MESSAGE_BYTES_MAX as u64)?;
        meant("the version of a control message", header.version.into(), header.version != 0)?;
        Ok(header)
    }

    /// The header's bytes.
    #[must_use]
    pub fn emit(&self) -> [u8; CONTROL_HEADER_BYTES] {
        join(&[
            &MAGIC.to_le_bytes(),
            &self.version.to_le_bytes(),
            &self.kind.to_le_bytes(),
            &self.length.to_le_bytes(),
            &self.crc.to_le_bytes(),
            &self.migration.0,
            &self.generation.0.to_le_bytes(),
        ])
    }

    /// Checks that the message belongs to this migration and generation.
    ///
    /// # Errors
    /// It belongs to another.
    pub fn expect(&self, migration: MigrationId, generation: Generation) -> Result<(), Violation> {
        same_migration("a control message", (self.migration, self.generation), (migration, generation))
    }

    /// Checks length and checksum of `body`.
    ///
    /// # Errors
    /// Says which of them disagrees.
    pub fn check_body(&self, body: &[u8]) -> Result<(), Malformed> {
        if body.len() as u64 != u64::from(self.length) {
            return Err(Malformed::Length { what: "a control message", found: body.len() as u64, wanted: self.length.into() });
        }
        let found = crc32fast::hash(body);
        if found == self.crc { Ok(()) } else { Err(Malformed::Checksum { found, said: self.crc }) }
    }
}

impl LanePreamble {
    /// Parses a preamble. Whether its token fits is the caller's to check, with `==` of [`LaneToken`].
    ///
    /// # Errors
    /// The magic number, the lane's number or the reserved field is wrong.
    pub fn parse(bytes: &[u8; LANE_PREAMBLE_BYTES]) -> Result<LanePreamble, Malformed> {
        let mut fields = Fields(bytes);
        magic("a lane", fields.u32(), LANE_MAGIC)?;
        let preamble = LanePreamble {
            version: fields.u16(),
            lane: fields.u16(),
            migration: MigrationId(fields.take()),
            generation: Generation(fields.u64()),
            token: LaneToken(fields.take()),
        };
        let reserved = fields.u64();
        at_most("a lane's number", preamble.lane.into(), u64::from(LANES_MAX) - 1)?;
        meant("the version of a lane", preamble.version.into(), preamble.version != 0)?;
        meant("a lane's reserved field", reserved, reserved == 0)?;
        Ok(preamble)
    }

    /// The preamble's bytes.
    #[must_use]
    pub fn emit(&self) -> [u8; LANE_PREAMBLE_BYTES] {
        join(&[
            &LANE_MAGIC.to_le_bytes(),
            &self.version.to_le_bytes(),
            &self.lane.to_le_bytes(),
            &self.migration.0,
            &self.generation.0.to_le_bytes(),
            &self.token.0,
            &[0; 8],
        ])
    }
}

impl LaneFrameKind {
    fn parse(number: u8) -> Result<LaneFrameKind, Malformed> {
        match number {
            1 => Ok(LaneFrameKind::Pages),
            2 => Ok(LaneFrameKind::Zero),
            3 => Ok(LaneFrameKind::Barrier),
            4 => Ok(LaneFrameKind::End),
            other => Err(Malformed::Value { what: "the kind of a lane frame", found: other.into() }),
        }
    }

    fn number(self) -> u8 {
        match self {
            LaneFrameKind::Pages => 1,
            LaneFrameKind::Zero => 2,
            LaneFrameKind::Barrier => 3,
            LaneFrameKind::End => 4,
        }
    }
}

impl LaneHeader {
    /// Parses a header; after this, `runs` and `bytes` are within their limits and agree with the kind.
    ///
    /// # Errors
    /// Says which field is wrong.
    pub fn parse(bytes: &[u8; LANE_HEADER_BYTES]) -> Result<LaneHeader, Malformed> {
        let mut fields = Fields(bytes);
        magic("a lane frame", fields.u32(), FRAME_MAGIC)?;
        let kind = LaneFrameKind::parse(fields.u8())?;
        let flags = fields.u8();
        meant("the flags of a lane frame", flags.into(), flags == 0)?;
        let header = LaneHeader {
            kind,
            runs: fields.u16(),
            round: fields.u32(),
            bytes: fields.u64(),
            migration: MigrationId(fields.take()),
            generation: Generation(fields.u64()),
        };
        let reserved = fields.u32();
        meant("a lane frame's reserved field", reserved.into(), reserved == 0)?;
        at_most("the runs of a lane frame", header.runs.into(), RUNS_PER_FRAME_MAX as u64)?;
        at_most("the bytes of a lane frame", header.bytes, FRAME_BYTES_MAX)?;
        at_most("the round of a lane frame", header.round.into(), ROUNDS_MAX.into())?;
        meant("the round of a lane frame", header.round.into(), header.round != 0)?;
        let has_runs = matches!(kind, LaneFrameKind::Pages | LaneFrameKind::Zero);
        meant("the runs of a lane frame", header.runs.into(), has_runs == (header.runs > 0))?;
        let has_bytes = kind == LaneFrameKind::Pages;
        meant(
            "the bytes of a lane frame",
            header.bytes,
            has_bytes == (header.bytes > 0) && header.bytes.is_multiple_of(PAGE_BYTES),
        )?;
        Ok(header)
    }

    /// The header's bytes.
    #[must_use]
    pub fn emit(&self) -> [u8; LANE_HEADER_BYTES] {
        join(&[
            &FRAME_MAGIC.to_le_bytes(),
            &[self.kind.number(), 0],
            &self.runs.to_le_bytes(),
            &self.round.to_le_bytes(),
            &self.bytes.to_le_bytes(),
            &self.migration.0,
            &self.generation.0.to_le_bytes(),
            &[0; 4],
        ])
    }

    /// Checks that the frame belongs to this migration, generation and round.
    ///
    /// # Errors
    /// Says to what it belongs instead.
    pub fn expect(&self, migration: MigrationId, generation: Generation, round: u32) -> Result<(), Violation> {
        same_migration("a lane frame", (self.migration, self.generation), (migration, generation))?;
        if self.round == round || self.kind == LaneFrameKind::End {
            return Ok(());
        }
        Err(Violation::Mismatch { what: "the round of a lane frame", found: self.round.into(), wanted: round.into() })
    }

    /// Bytes of the table of runs that follows.
    #[must_use]
    pub fn runs_bytes(&self) -> usize {
        usize::from(self.runs) * RUN_BYTES
    }
}

/// Appends the table of `runs` to `out`.
///
/// A run of more than `u32::MAX` pages does not fit and must have been cut by the caller; it is cut short here.
pub fn emit_runs(runs: &[PageRange], out: &mut Vec<u8>) {
    for run in runs {
        out.extend_from_slice(&run.first.to_le_bytes());
        out.extend_from_slice(&u32::try_from(run.count).unwrap_or(u32::MAX).to_le_bytes());
    }
}

/// Parses the table of runs that follows `header`. Every run lies in one region of `map`, they rise and do not
/// overlap, and for `Pages` they add up to the header's bytes.
///
/// # Errors
/// Says which run breaks which rule.
pub fn parse_runs(bytes: &[u8], map: &MemoryMap, header: &LaneHeader) -> Result<Vec<PageRange>, WireError> {
    if bytes.len() != header.runs_bytes() {
        let (found, wanted) = (bytes.len() as u64, header.runs_bytes() as u64);
        return Err(Malformed::Length { what: "a table of runs", found, wanted }.into());
    }
    let mut runs = Vec::with_capacity(usize::from(header.runs).min(RUNS_PER_FRAME_MAX));
    let (mut end, mut sum) = (0_u64, 0_u64);
    for (index, run) in bytes.chunks_exact(RUN_BYTES).enumerate() {
        let mut fields = Fields(run);
        let range = PageRange { first: fields.u64(), count: u64::from(fields.u32()) };
        let wrong = |words| Malformed::Run { index, first: range.first, count: range.count, words };
        if range.count == 0 {
            return Err(wrong("has no page").into());
        }
        if range.first < end {
            return Err(wrong("begins before the end of the one before it").into());
        }
        if map.locate(range).is_none() {
            return Err(wrong("does not lie in one region of the guest's memory").into());
        }
        end = range.end();
        sum = sum.saturating_add(range.bytes());
        runs.push(range);
    }
    if header.kind == LaneFrameKind::Pages && sum != header.bytes {
        return Err(Violation::Mismatch { what: "the bytes of a lane frame", found: header.bytes, wanted: sum }.into());
    }
    Ok(runs)
}
