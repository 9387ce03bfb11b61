//! The receiving end of an RDMA lane: reads heads out of messages, and looks at pages that are in place already. With the page
//! check it compares each page with its hash.

use super::buffers::Buffers;
use super::check::{HASH_BYTES, PAGE};
use super::fabric::Migration;
use super::message::{Kind, Seal};
use super::{LOOK_AROUND, posted, waited};
use crate::lanes::{LaneCloser, LaneReceiver};
use crate::pages::Pages;
use crate::sessions::emit_lane_answer;
use limosa_proto::memory::PageRange;
use limosa_proto::wire::frame::{LANE_HEADER_BYTES, LaneFrameKind, LaneHeader, parse_runs};
use limosa_verbs::{Completion, Payload, QueuePair, Receive, Send, Status, Verb, WaitError};
use std::collections::VecDeque;
use std::io;
use std::sync::Arc;
use std::time::{Duration, Instant};

/// How long a lane whose queue pair broke keeps that to itself: the source's device alone was told why, so its words come first.
const SOURCE_FIRST: Duration = Duration::from_millis(600);
/// How often it looks meanwhile whether somebody ends it.
const NAP: Duration = Duration::from_millis(20);
/// How long a refusal may take to leave before the queue pair goes.
const FAREWELL: Duration = Duration::from_millis(200);
/// How long telling the source that a barrier was passed may take.
const PASSING: Duration = Duration::from_millis(300);
/// What a peer that has gone means here.
const GONE: io::ErrorKind = io::ErrorKind::UnexpectedEof;

/// The receiving end of a lane.
pub(super) struct RdmaReceiver {
    pair: QueuePair,
    migration: Arc<Migration>,
    heads: Buffers,
    answers: Buffers,
    into: Seal,
    out: Seal,
    /// Messages that have arrived: slot and length.
    arrived: VecDeque<(u32, u32)>,
    /// Messages that were read since credits were given back.
    read: u32,
    /// Answers under way.
    saying: u32,
    message: Vec<u8>,
    /// What was not read yet of the body of the last message.
    body: Vec<u8>,
    next: usize,
    /// A frame whose runs come next.
    header: Option<LaneHeader>,
    round: u32,
    bytes: u64,
    done: Vec<Completion>,
    page: Box<[u8; PAGE]>,
}

impl RdmaReceiver {
    /// `heads` are posted to `pair` already.
    pub(super) fn new(
        pair: QueuePair,
        migration: Arc<Migration>,
        (heads, answers): (Buffers, Buffers),
        (into, out): (Seal, Seal),
    ) -> RdmaReceiver {
        RdmaReceiver {
            pair,
            migration,
            heads,
            answers,
            into,
            out,
            arrived: VecDeque::new(),
            read: 0,
            saying: 0,
            message: Vec::new(),
            body: Vec::new(),
            next: 0,
            header: None,
            round: 0,
            bytes: 0,
            done: Vec::new(),
            page: Box::new([0; PAGE]),
        }
    }

    /// Waits until something happened, or until `timeout`.
    fn collect(&mut self, timeout: Duration) -> io::Result<()> {
        // Silence alone is no failure: what a stalled migration is, the engine decides.
        match self.pair.wait(timeout) {
            Ok(done) => self.done.extend_from_slice(done),
            Err(WaitError::TimedOut(_)) => {}
            Err(WaitError::Disconnected) => return Err(self.broken()),
            Err(error) => return Err(waited(error, GONE)),
        }
        let mut done = std::mem::take(&mut self.done);
        for completion in done.drain(..) {
            match completion.ok() {
                Ok(()) => {}
                Err(error) if error.status == Status::Flushed => return Err(self.broken()),
                Err(error) => return Err(io::Error::other(error)),
            }
            let slot = u32::try_from(completion.id).unwrap_or(u32::MAX);
            match completion.verb {
                Verb::Receive => self.arrived.push_back((slot, completion.bytes)),
                Verb::Send | Verb::Write | Verb::WriteImmediate => {
                    self.answers.give(slot);
                    self.saying = self.saying.saturating_sub(1);
                }
            }
        }
        self.done = done;
        Ok(())
    }

    /// Gives the source time to say why the queue pair broke, or ended, before it was to.
    fn broken(&mut self) -> io::Error {
        let patience = Instant::now() + SOURCE_FIRST;
        while Instant::now() < patience {
            match self.pair.wait(NAP) {
                Err(WaitError::Closed) => return waited(WaitError::Closed, GONE),
                // A wait for what has ended ends at once.
                Err(_) => std::thread::sleep(NAP),
                Ok(_) => {}
            }
        }
        let ended = self.pair.wait(Duration::ZERO).err().unwrap_or(WaitError::TimedOut(Duration::ZERO));
        match ended {
            WaitError::TimedOut(_) => io::Error::other("its queue pair broke, and only the source's device was told why"),
            error => waited(error, GONE),
        }
    }

    /// Sends a message to the source.
    fn say(&mut self, kind: Kind, body: &[u8]) -> io::Result<()> {
        let slot = loop {
            match self.answers.take() {
                Some(slot) => break slot,
                None => self.collect(LOOK_AROUND)?,
            }
        };
        let bytes = self.answers.put(slot, &self.out.seal(kind, body))?;
        let payload = Payload::Region(self.answers.piece(slot, bytes));
        self.pair.post_send(&Send { payload, immediate: None, signalled: true, id: slot.into() }).map_err(posted)?;
        self.saying += 1;
        Ok(())
    }

    /// Waits until the source's device has all that was said.
    fn until_said(&mut self, at_most: Duration) -> io::Result<()> {
        let patience = Instant::now() + at_most;
        while self.saying > 0 && Instant::now() < patience {
            self.collect(at_most)?;
        }
        Ok(())
    }

    /// Takes the next message in, whose body then is what is read.
    fn next_message(&mut self) -> io::Result<()> {
        let (slot, bytes) = loop {
            match self.arrived.pop_front() {
                Some(arrived) => break arrived,
                None => self.collect(LOOK_AROUND)?,
            }
        };
        self.heads.get(slot, bytes, &mut self.message)?;
        let (kind, body) = self.into.open(&self.message)?;
        if kind != Kind::Heads {
            return Err(io::Error::new(io::ErrorKind::InvalidData, "the source said what only destinations say"));
        }
        self.body.clear();
        self.body.extend_from_slice(body);
        self.next = 0;
        self.bytes += u64::from(bytes);
        let into = Some(self.heads.piece(slot, self.heads.slot_bytes()));
        self.pair.post_receives(&[Receive { into, id: slot.into() }]).map_err(posted)?;
        self.read += 1;
        // In halves: seldom enough to cost nothing, soon enough that the source never waits for a destination that is not behind.
        if self.read >= self.heads.count() / 2 {
            let read = std::mem::take(&mut self.read);
            self.say(Kind::Credits, &read.to_le_bytes())?;
        }
        Ok(())
    }

    fn fill(&mut self, out: &mut [u8]) -> io::Result<()> {
        let mut out = out;
        while !out.is_empty() {
            let left = self.body.get(self.next..).unwrap_or_default();
            if left.is_empty() {
                self.next_message()?;
                continue;
            }
            let here = left.len().min(out.len());
            let (now, rest) = std::mem::take(&mut out).split_at_mut(here);
            now.iter_mut().zip(left).for_each(|(to, from)| *to = *from);
            self.next += here;
            out = rest;
        }
        Ok(())
    }

    /// Follows the frames: so that hashes can be found and zero pages are suspect no more.
    fn follow(&mut self, bytes: &[u8]) {
        match self.header.take() {
            None => {
                let header = bytes.first_chunk::<LANE_HEADER_BYTES>().and_then(|bytes| LaneHeader::parse(bytes).ok());
                self.round = header.map_or(self.round, |header| header.round);
                self.header = header.filter(|header| header.runs > 0);
            }
            Some(header) if header.kind == LaneFrameKind::Zero && self.migration.page_check() => {
                let map = self.migration.pages().memory_map();
                // The driver parses them too, and ends the lane where they are wrong.
                for run in parse_runs(bytes, map, &header).into_iter().flatten() {
                    self.migration.suspects().clear(run);
                }
            }
            Some(_) => {}
        }
    }

    fn compare(&mut self, runs: &[PageRange]) -> io::Result<()> {
        let migration = self.migration.clone();
        for page in runs.iter().flat_map(|run| run.first..run.end()) {
            let mut told = [0; HASH_BYTES];
            self.fill(&mut told)?;
            migration.pages().read(PageRange { first: page, count: 1 }, 0, &mut self.page[..]);
            let good = migration.page_key().hash(page, self.round, &self.page) == told;
            migration.suspects().note(page, good);
        }
        Ok(())
    }
}

impl LaneReceiver for RdmaReceiver {
    fn head(&mut self, out: &mut [u8]) -> io::Result<()> {
        self.fill(out)?;
        self.follow(out);
        Ok(())
    }

    fn pages(&mut self, _pages: &dyn Pages, runs: &[PageRange]) -> io::Result<()> {
        self.bytes += runs.iter().map(|run| run.bytes()).sum::<u64>();
        if self.migration.page_check() { self.compare(runs) } else { Ok(()) }
    }

    fn passed(&mut self, round: u32) -> io::Result<()> {
        self.say(Kind::Passed, &round.to_le_bytes())?;
        // An end waits for this call (`receiving.rs`), so that the source hears it even if the migration ends now.
        self.until_said(PASSING)
    }

    fn acknowledge(&mut self, bytes: &[u8]) -> io::Result<()> {
        let mut body = bytes.to_vec();
        body.extend_from_slice(&self.heads.count().to_le_bytes());
        body.extend_from_slice(&self.heads.slot_bytes().to_le_bytes());
        self.say(Kind::Answer, &body)?;
        if bytes != emit_lane_answer(None) {
            // The lane is dropped next, and an answer that has not left by then is lost.
            self.until_said(FAREWELL)?;
        }
        Ok(())
    }

    fn closer(&self) -> io::Result<LaneCloser> {
        let closer = self.pair.closer();
        Ok(LaneCloser::new(move || closer.close()))
    }

    fn bytes_on_wire(&self) -> u64 {
        self.bytes
    }
}
