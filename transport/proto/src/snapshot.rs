//! The bytes of a snapshot: a guest's description, its device state and its memory as sections, each with a checksum.
//! It opens no file: the agent reads and writes what is made and judged here. docs/PROTOCOL.md section 9 has the layout.
//!
//! A snapshot is as little to be trusted as a peer: every number is held against a limit before it sizes anything.

use crate::error::Misuse;
use crate::memory::{MemoryMap, PAGE_BYTES, PageRange};
use crate::record::{RECORD_BYTES_MAX, RECORDS_MAX, Record, STATE_BYTES_MAX};
use crate::wire::limits::{CONFIG_BYTES_MAX, FRAME_BYTES_MAX, NAME_BYTES_MAX, RUNS_PER_FRAME_MAX, text};
use crate::wire::message::VmDescription;
use serde::{Deserialize, Serialize};

/// First eight bytes of every snapshot.
pub const MAGIC: [u8; 8] = *b"LMSASNAP";
/// Version of the file's layout: of its head and its sections, not of what is in them.
pub const VERSION: u16 = 1;
/// Bytes of the file's head.
pub const HEAD_BYTES: usize = 16;
/// Bytes before each section's body.
pub const SECTION_BYTES: usize = 20;
/// Version of the section with the description. A change of [`VmDescription`] raises it, and the decoder of the one before
/// stays: a snapshot is restored for ever.
pub const GUEST_VERSION: u16 = 1;
/// Bytes before the body of a record.
const RECORD_HEAD_BYTES: usize = 8;
/// Bytes of one run in a section of pages: first page and count.
const RUN_BYTES: usize = 12;
/// Largest section of the description.
const GUEST_BYTES_MAX: usize = 4 * CONFIG_BYTES_MAX;
/// Largest section of pages.
const PAGES_BYTES_MAX: usize = 4 + RUNS_PER_FRAME_MAX * RUN_BYTES + FRAME_BYTES_MAX as usize;
/// Bytes of the last section.
const END_BYTES: usize = 20;
/// Pages that fit into one section.
pub const PAGES_PER_SECTION_MAX: u64 = FRAME_BYTES_MAX / PAGE_BYTES;
/// Runs that fit into one section.
pub const RUNS_PER_SECTION_MAX: usize = RUNS_PER_FRAME_MAX;

/// Why bytes are no snapshot that can be restored.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum SnapshotError {
    /// It does not begin like one.
    #[error("it is no snapshot of limosa: it does not begin with \"LMSASNAP\"")]
    Magic,
    /// Another layout of the file or of a part of it.
    #[error(
        "{what} has version {found}, and this build reads version {known}: restore it with the release that wrote it, or a newer one"
    )]
    Version {
        /// Which part.
        what: &'static str,
        /// Its version.
        found: u16,
        /// What is known here.
        known: u16,
    },
    /// It ends before its end.
    #[error("it is cut off in section {section}: {words}")]
    Truncated {
        /// Which section, from 0.
        section: u32,
        /// What is missing.
        words: String,
    },
    /// A checksum disagrees, or what is there makes no sense.
    #[error("it is damaged in section {section}: {words}")]
    Damaged {
        /// Which section, from 0.
        section: u32,
        /// What is wrong.
        words: String,
    },
}

/// What a section holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u16)]
enum Kind {
    Guest = 1,
    Record = 2,
    Pages = 3,
    End = 4,
}

/// The guest of a snapshot.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct SavedGuest {
    /// The next generation on the host that saved it: an attempt to move the restored guest must carry a higher one.
    pub generation: u64,
    /// When it was saved, in milliseconds since 1970.
    pub saved_unix_ms: u64,
    /// The program that saved it, and its version.
    #[serde(deserialize_with = "text::<_, NAME_BYTES_MAX>")]
    pub build: String,
    /// The guest.
    pub vm: VmDescription,
}

/// The head of a section, judged: its body may be read.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Section {
    kind: Kind,
    version: u16,
    number: u32,
    /// Bytes of its body: at most a little over 4 MiB.
    pub length: usize,
    crc: u32,
}

/// What a section brought.
#[derive(Debug, Clone, PartialEq)]
pub enum Piece {
    /// The guest: the first section.
    Guest(Box<SavedGuest>),
    /// A piece of device state.
    Record(Record),
    /// Pages, and at which byte of the section's body theirs begin; they lie there one behind the other.
    Pages(Vec<PageRange>, usize),
    /// That was all of it. Nothing may follow.
    End,
}

fn put(to: &mut Vec<u8>, parts: &[&[u8]]) {
    parts.iter().for_each(|part| to.extend_from_slice(part));
}

fn array<const N: usize>(bytes: &[u8], at: usize) -> [u8; N] {
    bytes.get(at..at + N).and_then(|bytes| bytes.try_into().ok()).unwrap_or([0; N])
}

/// Makes the sections of one snapshot, in order.
#[derive(Debug, Default)]
pub struct Writer {
    number: u32,
    records: u32,
    pages: u64,
}

impl Writer {
    /// The first bytes of the file.
    #[must_use]
    pub fn head() -> [u8; HEAD_BYTES] {
        let mut head = Vec::with_capacity(HEAD_BYTES);
        put(&mut head, &[&MAGIC, &VERSION.to_le_bytes(), &[0; 2]]);
        let crc = crc32fast::hash(&head);
        put(&mut head, &[&crc.to_le_bytes()]);
        array(&head, 0)
    }

    /// Puts the head before the body that begins at [`SECTION_BYTES`] of `section`.
    fn seal(&mut self, kind: Kind, version: u16, section: &mut [u8]) {
        let Some((head, body)) = section.split_at_mut_checked(SECTION_BYTES) else { return };
        let length = u32::try_from(body.len()).unwrap_or(u32::MAX);
        let mut made = Vec::with_capacity(SECTION_BYTES);
        put(&mut made, &[&(kind as u16).to_le_bytes(), &version.to_le_bytes(), &self.number.to_le_bytes()]);
        put(&mut made, &[&length.to_le_bytes(), &crc32fast::hash(body).to_le_bytes()]);
        let crc = crc32fast::hash(&made);
        put(&mut made, &[&crc.to_le_bytes()]);
        head.copy_from_slice(&made);
        self.number += 1;
    }

    /// The first section.
    ///
    /// # Errors
    /// A description that is larger than is carried.
    pub fn guest(&mut self, guest: &SavedGuest) -> Result<Vec<u8>, Misuse> {
        let wrong = |words: String| Misuse::Message { what: "the snapshot's description", words };
        let body = postcard::to_stdvec(guest).map_err(|error| wrong(error.to_string()))?;
        if body.len() > GUEST_BYTES_MAX {
            return Err(wrong(format!("{} bytes, at most {GUEST_BYTES_MAX} fit", body.len())));
        }
        let mut section = vec![0; SECTION_BYTES];
        section.extend(body);
        self.seal(Kind::Guest, GUEST_VERSION, &mut section);
        Ok(section)
    }

    /// A section for one record.
    ///
    /// # Errors
    /// It is larger than is carried.
    pub fn record(&mut self, record: &Record) -> Result<Vec<u8>, Misuse> {
        if record.bytes.len() > RECORD_BYTES_MAX {
            let words = format!("{record:?} is larger than {RECORD_BYTES_MAX} bytes");
            return Err(Misuse::Message { what: "a record of the snapshot", words });
        }
        let mut section = vec![0; SECTION_BYTES];
        put(&mut section, &[&record.kind.to_le_bytes(), &record.version.to_le_bytes(), &record.instance.to_le_bytes()]);
        section.extend_from_slice(&record.bytes);
        self.seal(Kind::Record, 1, &mut section);
        self.records += 1;
        Ok(section)
    }

    /// A section of pages into `section`, whose memory is used again; `read` fills in one run's bytes. Runs rise through the
    /// whole file; pages that are all zero are left out.
    pub fn pages(&mut self, section: &mut Vec<u8>, runs: &[PageRange], mut read: impl FnMut(PageRange, &mut [u8])) {
        let pages: u64 = runs.iter().map(|run| run.count).sum();
        debug_assert!(runs.len() <= RUNS_PER_SECTION_MAX && pages <= PAGES_PER_SECTION_MAX);
        section.clear();
        section.resize(SECTION_BYTES, 0);
        put(section, &[&u32::try_from(runs.len()).unwrap_or(u32::MAX).to_le_bytes()]);
        for run in runs {
            put(section, &[&run.first.to_le_bytes(), &u32::try_from(run.count).unwrap_or(u32::MAX).to_le_bytes()]);
        }
        let mut at = section.len();
        section.resize(at + usize::try_from(pages * PAGE_BYTES).unwrap_or(0), 0);
        for run in runs {
            let end = at + usize::try_from(run.bytes()).unwrap_or(0);
            if let Some(bytes) = section.get_mut(at..end) {
                read(*run, bytes);
            }
            at = end;
        }
        self.seal(Kind::Pages, 1, section);
        self.pages += pages;
    }

    /// The last section.
    #[must_use]
    pub fn end(mut self) -> Vec<u8> {
        let mut section = vec![0; SECTION_BYTES];
        let sections = self.number + 1;
        put(&mut section, &[&self.records.to_le_bytes(), &self.pages.to_le_bytes(), &sections.to_le_bytes(), &[0; 4]]);
        self.seal(Kind::End, 1, &mut section);
        section
    }
}

/// Judges one snapshot, section by section.
#[derive(Debug, Default)]
pub struct Reader {
    number: u32,
    memory: Option<MemoryMap>,
    records: u32,
    record_bytes: usize,
    pages: u64,
    /// The page after the last one that came.
    next_page: u64,
    ended: bool,
}

impl Reader {
    /// Judges the first bytes of the file.
    ///
    /// # Errors
    /// It is no snapshot, damaged, or of another version.
    pub fn head(head: &[u8; HEAD_BYTES]) -> Result<Reader, SnapshotError> {
        if array::<8>(head, 0) != MAGIC {
            return Err(SnapshotError::Magic);
        }
        let crc = u32::from_le_bytes(array(head, 12));
        if head.get(..12).map(crc32fast::hash) != Some(crc) {
            return Err(SnapshotError::Damaged { section: 0, words: "its head's checksum disagrees".to_owned() });
        }
        match u16::from_le_bytes(array(head, 8)) {
            VERSION => Ok(Reader::default()),
            found => Err(SnapshotError::Version { what: "the snapshot", found, known: VERSION }),
        }
    }

    /// Whether the last section has come.
    #[must_use]
    pub fn has_ended(&self) -> bool {
        self.ended
    }

    /// That the file ended here.
    #[must_use]
    pub fn cut_off(&self, words: impl Into<String>) -> SnapshotError {
        SnapshotError::Truncated { section: self.number, words: words.into() }
    }

    fn damaged(&self, words: impl Into<String>) -> SnapshotError {
        SnapshotError::Damaged { section: self.number, words: words.into() }
    }

    /// Judges the head of the next section; `left` bytes of the file follow it.
    ///
    /// # Errors
    /// It is damaged, out of place, too large, or longer than what is left.
    pub fn section(&self, head: &[u8; SECTION_BYTES], left: u64) -> Result<Section, SnapshotError> {
        if head.get(..16).map(crc32fast::hash) != Some(u32::from_le_bytes(array(head, 16))) {
            return Err(self.damaged("its head's checksum disagrees"));
        }
        let number = u32::from_le_bytes(array(head, 4));
        let (kind, most) = match u16::from_le_bytes(array(head, 0)) {
            1 => (Kind::Guest, GUEST_BYTES_MAX),
            2 => (Kind::Record, RECORD_HEAD_BYTES + RECORD_BYTES_MAX),
            3 => (Kind::Pages, PAGES_BYTES_MAX),
            4 => (Kind::End, END_BYTES),
            other => return Err(self.damaged(format!("there is no kind {other}"))),
        };
        let in_place = if number == 0 { kind == Kind::Guest } else { kind != Kind::Guest };
        // State comes before memory, so that it is judged before a page is put anywhere.
        if number != self.number || !in_place || self.ended || kind == Kind::Record && self.pages > 0 {
            return Err(self.damaged(format!("a section {kind:?} with number {number} has no place there")));
        }
        let length = u32::from_le_bytes(array(head, 8)) as usize;
        if length > most {
            return Err(self.damaged(format!("{length} bytes are more than {kind:?} may have, {most}")));
        }
        if length as u64 > left {
            return Err(self.cut_off(format!("{length} bytes are promised and {left} are there")));
        }
        let version = u16::from_le_bytes(array(head, 2));
        let known = if kind == Kind::Guest { GUEST_VERSION } else { 1 };
        if version != known {
            let what = if kind == Kind::Guest { "the guest's description" } else { "a section" };
            return Err(SnapshotError::Version { what, found: version, known });
        }
        Ok(Section { kind, version, number, length, crc: u32::from_le_bytes(array(head, 12)) })
    }

    /// Judges the body of `section`.
    ///
    /// # Errors
    /// It is damaged, or says what cannot be.
    pub fn body(&mut self, section: Section, body: &[u8]) -> Result<Piece, SnapshotError> {
        if body.len() != section.length || section.number != self.number {
            return Err(self.damaged("another section's body"));
        }
        if crc32fast::hash(body) != section.crc {
            return Err(self.damaged("its checksum disagrees"));
        }
        let piece = match section.kind {
            Kind::Guest => self.guest(body),
            Kind::Record => self.record(body),
            Kind::Pages => self.runs(body),
            Kind::End => self.end(body),
        }?;
        self.number = self.number.saturating_add(1);
        Ok(piece)
    }

    fn guest(&mut self, body: &[u8]) -> Result<Piece, SnapshotError> {
        let (guest, rest): (SavedGuest, _) = postcard::take_from_bytes(body).map_err(|error| self.damaged(error.to_string()))?;
        if !rest.is_empty() {
            return Err(self.damaged(format!("{} bytes too many", rest.len())));
        }
        self.memory = Some(guest.vm.memory.clone());
        Ok(Piece::Guest(Box::new(guest)))
    }

    fn record(&mut self, body: &[u8]) -> Result<Piece, SnapshotError> {
        let Some((head, bytes)) = body.split_at_checked(RECORD_HEAD_BYTES) else {
            return Err(self.damaged("a record without a head"));
        };
        self.records = self.records.saturating_add(1);
        self.record_bytes = self.record_bytes.saturating_add(bytes.len());
        if self.records as usize > RECORDS_MAX || self.record_bytes > STATE_BYTES_MAX {
            return Err(self.damaged(format!("more than {RECORDS_MAX} records or {STATE_BYTES_MAX} bytes of state")));
        }
        let (kind, version) = (u16::from_le_bytes(array(head, 0)), u16::from_le_bytes(array(head, 2)));
        Ok(Piece::Record(Record { kind, version, instance: u32::from_le_bytes(array(head, 4)), bytes: bytes.to_vec() }))
    }

    fn runs(&mut self, body: &[u8]) -> Result<Piece, SnapshotError> {
        let memory = self.memory.as_ref().ok_or_else(|| self.damaged("pages of an unknown guest"))?;
        let count = u32::from_le_bytes(array(body, 0)) as usize;
        let data = 4 + count.min(RUNS_PER_SECTION_MAX) * RUN_BYTES;
        if !(1..=RUNS_PER_SECTION_MAX).contains(&count) || body.len() < data {
            return Err(self.damaged(format!("{count} runs in {} bytes", body.len())));
        }
        let (mut runs, mut next, mut pages) = (Vec::with_capacity(count), self.next_page, 0);
        for at in (4..data).step_by(RUN_BYTES) {
            let run = PageRange {
                first: u64::from_le_bytes(array(body, at)),
                count: u64::from(u32::from_le_bytes(array(body, at + 8))),
            };
            if run.count == 0 || run.first < next || memory.locate(run).is_none() {
                return Err(self.damaged(format!("pages {} to {} are no next pages of this guest", run.first, run.end())));
            }
            next = run.end();
            pages += run.count;
            runs.push(run);
        }
        if pages.checked_mul(PAGE_BYTES) != Some((body.len() - data) as u64) {
            return Err(self.damaged(format!("{} bytes for {pages} pages", body.len() - data)));
        }
        (self.next_page, self.pages) = (next, self.pages.saturating_add(pages));
        Ok(Piece::Pages(runs, data))
    }

    fn end(&mut self, body: &[u8]) -> Result<Piece, SnapshotError> {
        let said = (u32::from_le_bytes(array(body, 0)), u64::from_le_bytes(array(body, 4)), u32::from_le_bytes(array(body, 12)));
        let came = (self.records, self.pages, self.number.saturating_add(1));
        if body.len() != END_BYTES || said != came || array::<4>(body, 16) != [0; 4] {
            return Err(self.damaged(format!("{came:?} records, pages and sections came, and {said:?} were written")));
        }
        self.ended = true;
        Ok(Piece::End)
    }
}
