//! The sending end of an RDMA lane: plans writes and messages, hands them to the device in large lists, and waits only when the
//! window, the queue or the credits are used up. It copies no page; with the page check it reads each page once.
//!
//! The order within a list is what makes a lane right: the writes of a frame come before the message with its head, so that
//! whoever has the head has the pages.

use super::buffers::Buffers;
use super::check::{PAGE, PageKey};
use super::memory::{SourceMemory, Way};
use super::message::{Kind, SEAL_BYTES, Seal, number};
use super::work::add;
use super::{LOOK_AROUND, MESSAGE_BYTES, RdmaSettings, WRITE_BYTES_MAX, completed, posted, waited};
use crate::lanes::{LaneCloser, LaneSender};
use crate::pages::Pages;
use limosa_proto::memory::{PAGE_BYTES, PageRange};
use limosa_proto::wire::frame::{LANE_HEADER_BYTES, LaneHeader};
use limosa_verbs::{Completion, MemoryRegion, Payload, Piece, QueuePair, Receive, RemoteKey, Send, Verb, WaitError, Work, Write};
use std::collections::VecDeque;
use std::io;
use std::sync::Arc;
use std::time::{Duration, Instant};

/// What is planned leaves after this time even if it is little: a slow guest or a bandwidth cap must not hold it back.
const PLAN_AGE_MAX: Duration = Duration::from_millis(200);
/// A round's first batch is so much smaller than a full one; each is twice the one before.
const BATCH_FIRST: u64 = 8;
/// Messages in one list at most.
const LIST_MESSAGES_MAX: u32 = 4;
/// How long the last message may take to arrive.
const FINISH_MAX: Duration = Duration::from_secs(1);
/// What a peer that has gone means here.
const GONE: io::ErrorKind = io::ErrorKind::BrokenPipe;

/// A work request that is not posted yet.
enum Planned {
    Write { from: Arc<MemoryRegion>, offset: u64, bytes: u64, to: RemoteKey },
    Message { slot: u32, bytes: u32 },
}

impl Planned {
    fn work<'a>(&'a self, heads: &'a Buffers, signalled: bool, id: u64) -> Work<'a> {
        match *self {
            Planned::Write { ref from, offset, bytes, to } => {
                // At most WRITE_BYTES_MAX, which fits.
                let piece = Piece { region: from, offset, bytes: u32::try_from(bytes).unwrap_or(0) };
                Work::Write(Write { payload: Payload::Region(piece), to, immediate: None, signalled, id })
            }
            Planned::Message { slot, bytes } => {
                Work::Send(Send { payload: Payload::Region(heads.piece(slot, bytes)), immediate: None, signalled, id })
            }
        }
    }
}

/// A list that was posted.
struct Flight {
    id: u64,
    slots: Vec<u32>,
    bytes: u64,
}

/// What both ends of a lane agreed on when it was opened.
pub(super) struct Agreed {
    /// Messages that the destination can take before it has looked at any.
    pub(super) credits: u32,
    /// Bytes of one message.
    pub(super) message_bytes: u32,
}

/// The parts of which a lane is made.
pub(super) struct Parts {
    pub(super) pair: QueuePair,
    pub(super) memory: Arc<SourceMemory>,
    pub(super) page_key: Option<PageKey>,
    pub(super) heads: Buffers,
    pub(super) answers: Buffers,
    pub(super) out: Seal,
    pub(super) into: Seal,
}

/// The sending end of a lane.
pub(super) struct RdmaSender {
    parts: Parts,
    batch_bytes: u64,
    /// The batch that is planned now: a round begins with small ones, so that the device does not wait for the first.
    batch_now: u64,
    window_bytes: u64,
    list_max: usize,
    list: Vec<Planned>,
    list_bytes: u64,
    list_messages: u32,
    list_messages_max: u32,
    /// Since when something is planned.
    since: Option<Instant>,
    /// Heads and hashes that are in no message yet.
    body: Vec<u8>,
    body_max: usize,
    credits: u32,
    credits_max: u32,
    flying: VecDeque<Flight>,
    flying_bytes: u64,
    flights: u64,
    /// The chunk that was used last.
    way: Option<(u32, Way)>,
    /// The round of the last head, and the last one that all of the destination's lanes have passed.
    round: u32,
    passed: u32,
    bytes: u64,
    done: Vec<Completion>,
    answer: Vec<u8>,
    page: Box<[u8; PAGE]>,
}

impl RdmaSender {
    pub(super) fn new(parts: Parts, settings: &RdmaSettings, agreed: &Agreed) -> RdmaSender {
        let Agreed { credits, message_bytes } = *agreed;
        let depth = usize::try_from(settings.depth()).unwrap_or(16);
        RdmaSender {
            parts,
            batch_bytes: settings.batch_bytes.max(PAGE_BYTES),
            batch_now: settings.batch_bytes / BATCH_FIRST,
            window_bytes: settings.window_bytes.max(settings.batch_bytes),
            // So that a list can be planned while others are under way.
            list_max: depth / 4,
            list: Vec::new(),
            list_bytes: 0,
            list_messages: 0,
            list_messages_max: LIST_MESSAGES_MAX.min(credits),
            since: None,
            body: Vec::new(),
            body_max: (message_bytes.min(MESSAGE_BYTES) as usize).saturating_sub(SEAL_BYTES).max(1),
            credits,
            credits_max: credits,
            flying: VecDeque::new(),
            flying_bytes: 0,
            flights: 0,
            way: None,
            round: 0,
            passed: 0,
            bytes: 0,
            done: Vec::new(),
            answer: Vec::new(),
            page: Box::new([0; PAGE]),
        }
    }

    /// Waits until something happened, or for a moment.
    fn collect(&mut self) -> io::Result<()> {
        // Silence alone is no failure: a dead peer fails what is under way, and ends the control channel in any case.
        match self.parts.pair.wait(LOOK_AROUND) {
            Ok(done) => self.done.extend_from_slice(done),
            Err(WaitError::TimedOut(_)) => {}
            Err(error) => return Err(waited(error, GONE)),
        }
        let mut done = std::mem::take(&mut self.done);
        let handled = done.iter().try_for_each(|completion| {
            completion.ok().map_err(|error| completed(error, GONE))?;
            match completion.verb {
                Verb::Receive => self.answered(completion),
                Verb::Send | Verb::Write | Verb::WriteImmediate => {
                    self.landed(completion.id);
                    Ok(())
                }
            }
        });
        done.clear();
        self.done = done;
        handled
    }

    /// Everything up to flight `id` is over.
    fn landed(&mut self, id: u64) {
        while let Some(flight) = self.flying.pop_front_if(|flight| flight.id <= id) {
            flight.slots.into_iter().for_each(|slot| self.parts.heads.give(slot));
            self.flying_bytes = self.flying_bytes.saturating_sub(flight.bytes);
        }
    }

    /// A message of the destination.
    fn answered(&mut self, completion: &Completion) -> io::Result<()> {
        let wrong = |words| io::Error::new(io::ErrorKind::InvalidData, words);
        let slot = u32::try_from(completion.id).unwrap_or(u32::MAX);
        self.parts.answers.get(slot, completion.bytes, &mut self.answer)?;
        let (kind, body) = self.parts.into.open(&self.answer)?;
        let (value, _) = number(body)?;
        match kind {
            Kind::Credits => {
                self.credits = self.credits.saturating_add(value);
                if self.credits > self.credits_max {
                    return Err(wrong("the destination gave back more credits than it had got"));
                }
            }
            Kind::Passed if value == self.round && value > self.passed => self.passed = value,
            Kind::Passed => return Err(wrong("the destination passed a barrier that was not sent")),
            Kind::Heads | Kind::Answer => return Err(wrong("the destination said what only sources say, or said it twice")),
        }
        let into = Some(self.parts.answers.piece(slot, self.parts.answers.slot_bytes()));
        self.parts.pair.post_receives(&[Receive { into, id: completion.id }]).map_err(posted)
    }

    /// Plans the write of one run of pages.
    fn plan(&mut self, run: PageRange) -> io::Result<()> {
        let mut run = run;
        while run.count > 0 {
            let place = self.parts.memory.place(run.first)?;
            let way = match &self.way {
                Some((chunk, way)) if *chunk == place.chunk => way.clone(),
                _ => {
                    let way = self.parts.memory.way(place.chunk)?;
                    self.way = Some((place.chunk, way.clone()));
                    way
                }
            };
            let bytes = run.bytes().min(place.left).min(WRITE_BYTES_MAX);
            self.plan_write(way, place.offset, bytes);
            if self.list.len() >= self.list_max {
                self.post_list()?;
            }
            let pages = bytes / PAGE_BYTES;
            run = PageRange { first: run.first + pages, count: run.count - pages };
        }
        Ok(())
    }

    /// Plans one write, as one with the last where they touch.
    fn plan_write(&mut self, way: Way, offset: u64, bytes: u64) {
        self.since.get_or_insert_with(Instant::now);
        self.list_bytes = self.list_bytes.saturating_add(bytes);
        if let Some(Planned::Write { from, offset: begin, bytes: before, .. }) = self.list.last_mut()
            && Arc::ptr_eq(from, &way.from)
            && *begin + *before == offset
            && *before + bytes <= WRITE_BYTES_MAX
        {
            *before += bytes;
            return;
        }
        self.list.push(Planned::Write { from: way.from, offset, bytes, to: way.to.at(offset) });
    }

    /// Appends to the stream of heads and hashes.
    fn append(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.since.get_or_insert_with(Instant::now);
        let mut rest = bytes;
        while !rest.is_empty() {
            let room = self.body_max.saturating_sub(self.body.len());
            let (now, later) = rest.split_at(rest.len().min(room));
            self.body.extend_from_slice(now);
            rest = later;
            if self.body.len() >= self.body_max {
                self.close_message()?;
            }
        }
        Ok(())
    }

    /// Plans what was appended as a message.
    fn close_message(&mut self) -> io::Result<()> {
        if self.body.is_empty() {
            return Ok(());
        }
        if self.list_messages >= self.list_messages_max {
            self.post_list()?;
        }
        let slot = loop {
            match self.parts.heads.take() {
                Some(slot) => break slot,
                None if self.flying.is_empty() => self.post_list()?,
                None => self.collect()?,
            }
        };
        let message = self.parts.out.seal(Kind::Heads, &self.body);
        let bytes = self.parts.heads.put(slot, &message)?;
        self.body.clear();
        self.list.push(Planned::Message { slot, bytes });
        self.list_messages += 1;
        Ok(())
    }

    /// Hashes of the pages of `runs`. A private copy is hashed: the guest may write the page meanwhile, which makes it dirty.
    fn append_hashes(&mut self, key: &PageKey, pages: &dyn Pages, runs: &[PageRange]) -> io::Result<()> {
        for page in runs.iter().flat_map(|run| run.first..run.end()) {
            pages.read(PageRange { first: page, count: 1 }, 0, &mut self.page[..]);
            let hash = key.hash(page, self.round, &self.page);
            self.append(&hash)?;
        }
        Ok(())
    }

    /// Posts what is planned if it is much, or old.
    fn post_if_due(&mut self) -> io::Result<()> {
        let old = self.since.is_some_and(|since| since.elapsed() >= PLAN_AGE_MAX);
        if self.list_bytes >= self.batch_now || self.list.len() >= self.list_max || old { self.post() } else { Ok(()) }
    }

    /// Posts all that is planned.
    fn post(&mut self) -> io::Result<()> {
        self.close_message()?;
        self.post_list()?;
        self.since = None;
        self.batch_now = self.batch_now.saturating_mul(2).min(self.batch_bytes);
        Ok(())
    }

    /// Posts the list as it is, with one ring of the doorbell, once there is room for it.
    fn post_list(&mut self) -> io::Result<()> {
        let Some(last) = self.list.len().checked_sub(1) else { return Ok(()) };
        while self.credits < self.list_messages
            || self.parts.pair.room() < self.list.len()
            || (self.flying_bytes > 0 && self.flying_bytes.saturating_add(self.list_bytes) > self.window_bytes)
        {
            self.collect()?;
        }
        let id = self.flights;
        let heads = &self.parts.heads;
        let works: Vec<Work<'_>> =
            self.list.iter().enumerate().map(|(index, planned)| planned.work(heads, index == last, id)).collect();
        self.parts.pair.post(&works).map_err(posted)?;
        drop(works);
        let (mut slots, mut bytes) = (Vec::new(), self.list_bytes);
        for planned in self.list.drain(..) {
            if let Planned::Message { slot, bytes: length } = planned {
                slots.push(slot);
                bytes += u64::from(length);
            }
        }
        let work = self.parts.memory.work();
        add(&work.doorbells, 1);
        add(&work.writes, (last + 1).saturating_sub(slots.len()) as u64);
        add(&work.write_bytes, self.list_bytes);
        add(&work.messages, slots.len() as u64);
        self.flights += 1;
        self.bytes += bytes;
        self.flying_bytes += self.list_bytes;
        self.flying.push_back(Flight { id, slots, bytes: self.list_bytes });
        self.credits -= self.list_messages;
        (self.list_bytes, self.list_messages) = (0, 0);
        Ok(())
    }

    fn note_round(&mut self, head: &[u8]) {
        if let Some(Ok(header)) = head.first_chunk::<LANE_HEADER_BYTES>().map(LaneHeader::parse) {
            self.round = header.round;
        }
    }
}

impl LaneSender for RdmaSender {
    fn head(&mut self, head: &[u8]) -> io::Result<()> {
        self.note_round(head);
        self.append(head)?;
        self.post_if_due()
    }

    fn pages(&mut self, head: &[u8], pages: &dyn Pages, runs: &[PageRange]) -> io::Result<()> {
        self.note_round(head);
        for run in runs {
            self.plan(*run)?;
        }
        self.append(head)?;
        if let Some(key) = self.parts.page_key.clone() {
            self.append_hashes(&key, pages, runs)?;
        }
        self.post_if_due()
    }

    fn flush(&mut self) -> io::Result<()> {
        self.post()?;
        while self.passed < self.round {
            self.collect()?;
        }
        self.batch_now = self.batch_bytes / BATCH_FIRST;
        Ok(())
    }

    fn finish(&mut self) -> io::Result<()> {
        self.post()?;
        let patience = Instant::now() + FINISH_MAX;
        while !self.flying.is_empty() && Instant::now() < patience {
            self.collect()?;
        }
        self.parts.pair.disconnect();
        Ok(())
    }

    fn closer(&self) -> io::Result<LaneCloser> {
        let closer = self.parts.pair.closer();
        Ok(LaneCloser::new(move || closer.close()))
    }

    fn bytes_on_wire(&self) -> u64 {
        self.bytes
    }
}
