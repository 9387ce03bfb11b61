//! The destination's lane threads: they read frames, put pages where they belong, and meet at each round's barrier.
//! Everything in a header is checked against the map and the round before it sizes or touches anything.

use crate::direct::{Exposed, ExposedError, Opener};
use crate::lanes::{
    CountedOpen, CpuMeter, LaneCloser, LaneCounters, LaneEvent, LaneEvents, LaneReceiver, RoundCounts, lane_words,
};
use crate::pages::{Arrived, Pages, Populate, populate_all};
use crate::sending::Tag;
use limosa_proto::memory::PageRange;
use limosa_proto::wire::frame::{LANE_HEADER_BYTES, LaneFrameKind, LaneHeader, RUN_BYTES, parse_runs};
use std::io;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::Duration;

/// How long lanes that are about to be ended may take to tell their sources that the last barrier was passed.
const TELL_MAX: Duration = Duration::from_secs(1);

/// Where the lanes wait for each other.
struct Barrier {
    /// How many lanes there are; nobody passes before that is known.
    lanes: usize,
    /// The round that is being received.
    round: u32,
    waiting: usize,
    /// Lanes that are through the last barrier and have not told their sources yet.
    telling: usize,
    /// Lanes whose threads may still write guest memory.
    working: usize,
    counts: (u64, u64, u64),
    /// Contents have begun to come: what the source never touched, it has named before them.
    begun: bool,
}

struct Shared {
    pages: Arc<dyn Pages>,
    tag: Tag,
    barrier: Mutex<Barrier>,
    passed: Condvar,
    stop: AtomicBool,
    /// Pages that were written or said to be zero: population leaves them alone.
    known: Arrived,
    /// Pages that may hold something, so that zero has to be written.
    written: Arrived,
    counters: Arc<LaneCounters>,
    events: LaneEvents,
}

impl Shared {
    fn barrier(&self) -> MutexGuard<'_, Barrier> {
        self.barrier.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Returns when contents begin to come, or when all is over. Earlier, population would give real pages to what the source
    /// is about to name as never touched.
    fn wait_begun(&self) {
        let waits = |barrier: &mut Barrier| !barrier.begun && !self.stop.load(Ordering::Relaxed);
        drop(self.passed.wait_while(self.barrier(), waits).unwrap_or_else(PoisonError::into_inner));
    }
}

/// The guest's memory at the destination while it fills: shared by lanes and population.
pub(crate) struct ReceiveLanes {
    shared: Arc<Shared>,
    closers: Vec<LaneCloser>,
    threads: Vec<JoinHandle<()>>,
    populating: Option<JoinHandle<()>>,
    /// Where the source writes memory directly.
    opener: Option<Opener>,
}

impl ReceiveLanes {
    /// For lanes into `pages`, whose memory must be fresh (all zero). Begins to populate it if told so; in
    /// mode `before` this call returns when that is done.
    pub(crate) fn new(
        pages: Arc<dyn Pages>,
        tag: Tag,
        populate: Populate,
        exposed: Option<Arc<dyn Exposed>>,
        counters: Arc<LaneCounters>,
        events: LaneEvents,
    ) -> io::Result<ReceiveLanes> {
        let opener = match exposed {
            None => None,
            Some(exposed) => Some(Opener::start(exposed, &*pages, counters.clone(), events.clone())?),
        };
        // A device that takes memory in gives it real pages too; what it never takes in stays free.
        let populate = if opener.is_some() { Populate::No } else { populate };
        let (known, written) = (Arrived::new(pages.memory_map()), Arrived::new(pages.memory_map()));
        let barrier = Mutex::new(Barrier {
            lanes: usize::MAX,
            round: 1,
            waiting: 0,
            telling: 0,
            working: 0,
            counts: (0, 0, 0),
            begun: false,
        });
        let (passed, stop) = (Condvar::new(), AtomicBool::new(false));
        let shared = Arc::new(Shared { pages, tag, barrier, passed, stop, known, written, counters, events });
        let mut this =
            ReceiveLanes { shared: shared.clone(), closers: Vec::new(), threads: Vec::new(), populating: None, opener };
        match populate {
            Populate::No => {}
            // On the caller's thread, whose time the caller counts.
            Populate::Before => {
                populate_all(&shared.pages, &shared.known, &shared.stop)?;
            }
            Populate::Beside => {
                let populating = std::thread::Builder::new().name("populate".into()).spawn(move || {
                    let _meter = CpuMeter::new(&shared.counters.cpu_ns);
                    shared.wait_begun();
                    // Without it the lanes pay for the first touch themselves: slower, not wrong.
                    if let Err(error) = populate_all(&shared.pages, &shared.known, &shared.stop) {
                        tracing::warn!(%error, "guest memory could not be populated ahead of its pages");
                    }
                })?;
                this.populating = Some(populating);
            }
        }
        Ok(this)
    }

    /// Starts the thread of one lane.
    pub(crate) fn join(&mut self, number: u16, lane: Box<dyn LaneReceiver>) -> io::Result<()> {
        self.closers.push(lane.closer()?);
        let working = Working::new(&self.shared);
        let thread = std::thread::Builder::new().name(format!("lane-in-{number}")).spawn(move || {
            // Dropped last, after the lane.
            let working = working;
            let shared = &working.0;
            let _open = CountedOpen::new();
            let mut lane = Lane { lane, shared, round: 1, runs: Vec::new(), counts: (0, 0), bytes: 0, begun: false };
            if let Err(error) = lane.work()
                && !shared.stop.load(Ordering::Relaxed)
            {
                let _ =
                    shared.events.send(LaneEvent::Failed { lane: number, words: lane_words(number, "receiving pages", &error) });
            }
        })?;
        self.threads.push(thread);
        Ok(())
    }

    /// Opens these chunks of memory to the source, who asks for them; keys come as events.
    ///
    /// # Errors
    /// It asks for what it may not.
    pub(crate) fn open(&mut self, chunks: &[u32]) -> Result<(), String> {
        match &mut self.opener {
            None => Err("the source asks for keys of memory on a link that needs none".to_owned()),
            Some(opener) => opener.open(chunks),
        }
    }

    /// After [`ReceiveLanes::end`]: takes the memory back from the device, where one had it.
    ///
    /// # Errors
    /// Pages are not what the source sent, or the device does not let go.
    pub(crate) fn take_back(&mut self) -> Result<(), ExposedError> {
        self.opener.as_mut().map_or(Ok(()), Opener::close)
    }

    /// Says how many lanes there will be.
    pub(crate) fn expect(&self, lanes: usize) {
        self.shared.barrier().lanes = lanes;
    }

    /// How many lanes have joined.
    pub(crate) fn joined(&self) -> usize {
        self.closers.len()
    }

    /// Ends every lane and waits until each is dropped: no lane writes guest memory afterwards. That its thread ends, too, takes
    /// time that belongs to the downtime and is not waited for. Population, which changes no contents, is only told to stop.
    pub(crate) fn end(&mut self) {
        {
            let barrier = self.shared.barrier();
            let told = self.shared.passed.wait_timeout_while(barrier, TELL_MAX, |barrier| barrier.telling > 0);
            let _barrier = told.unwrap_or_else(PoisonError::into_inner);
            self.shared.stop.store(true, Ordering::Relaxed);
        }
        self.shared.passed.notify_all();
        self.closers.iter().for_each(LaneCloser::close);
        let works = |barrier: &mut Barrier| barrier.working > 0;
        drop(self.shared.passed.wait_while(self.shared.barrier(), works).unwrap_or_else(PoisonError::into_inner));
    }
}

impl Drop for ReceiveLanes {
    fn drop(&mut self) {
        self.end();
        for thread in self.threads.drain(..) {
            let _ = thread.join();
        }
        // Nobody is left whom its word could help.
        let _ = self.take_back();
        if let Some(populating) = self.populating.take() {
            let _ = populating.join();
        }
    }
}

/// A lane's thread may write guest memory for as long as this lives, however it ends.
struct Working(Arc<Shared>);

impl Working {
    fn new(shared: &Arc<Shared>) -> Working {
        shared.barrier().working += 1;
        Working(shared.clone())
    }
}

impl Drop for Working {
    fn drop(&mut self) {
        let mut barrier = self.0.barrier();
        barrier.working = barrier.working.saturating_sub(1);
        drop(barrier);
        self.0.passed.notify_all();
    }
}

fn violation(words: impl Into<String>) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, words.into())
}

struct Lane<'a> {
    lane: Box<dyn LaneReceiver>,
    shared: &'a Shared,
    round: u32,
    runs: Vec<u8>,
    /// Pages and zero pages of this round.
    counts: (u64, u64),
    /// Bytes on the wire that were reported.
    bytes: u64,
    /// Whether it has said that contents come.
    begun: bool,
}

impl Lane<'_> {
    fn work(&mut self) -> io::Result<()> {
        let mut meter = CpuMeter::new(&self.shared.counters.cpu_ns);
        let mut head = [0; LANE_HEADER_BYTES];
        loop {
            self.lane.head(&mut head)?;
            let header = LaneHeader::parse(&head).map_err(|error| violation(error.to_string()))?;
            self.check(&header)?;
            if header.kind != LaneFrameKind::Zero && !self.begun {
                self.begun = true;
                self.shared.barrier().begun = true;
                self.shared.passed.notify_all();
            }
            match header.kind {
                LaneFrameKind::Pages => self.pages(&header)?,
                LaneFrameKind::Zero => self.zero(&header)?,
                LaneFrameKind::Barrier => {
                    self.count_bytes();
                    meter.count();
                    let round = self.round;
                    if !self.meet() {
                        return Ok(());
                    }
                    self.tell(round)?;
                }
                LaneFrameKind::End => {
                    self.count_bytes();
                    return Ok(());
                }
            }
        }
    }

    fn check(&self, header: &LaneHeader) -> io::Result<()> {
        let Tag { migration, generation } = self.shared.tag;
        if header.migration != migration || header.generation != generation {
            return Err(violation("a frame of another migration"));
        }
        // After the last barrier the End frame still names the round that it ended.
        let ends = header.kind == LaneFrameKind::End;
        if header.round != self.round && !ends {
            return Err(violation(format!("a frame of round {} in round {}", header.round, self.round)));
        }
        Ok(())
    }

    fn read_runs(&mut self, header: &LaneHeader) -> io::Result<Vec<PageRange>> {
        let mut bytes = std::mem::take(&mut self.runs);
        bytes.resize(usize::from(header.runs) * RUN_BYTES, 0);
        self.lane.head(&mut bytes)?;
        let runs = parse_runs(&bytes, self.shared.pages.memory_map(), header).map_err(|error| violation(error.to_string()));
        self.runs = bytes;
        Ok(runs?.into_iter().collect())
    }

    fn pages(&mut self, header: &LaneHeader) -> io::Result<()> {
        let runs = self.read_runs(header)?;
        let shared = self.shared;
        for run in &runs {
            // Before the bytes, so that a page half written when the lane dies counts as written.
            shared.written.insert(*run);
            shared.known.insert(*run);
        }
        self.lane.pages(&*shared.pages, &runs)?;
        let count = runs.iter().map(|run| run.count).sum::<u64>();
        self.counts.0 += count;
        shared.counters.pages.fetch_add(count, Ordering::Relaxed);
        self.count_bytes();
        Ok(())
    }

    fn zero(&mut self, header: &LaneHeader) -> io::Result<()> {
        let shared = self.shared;
        for run in self.read_runs(header)? {
            shared.known.insert(run);
            shared.written.within(run, |dirty| shared.pages.zero(dirty));
            self.counts.1 += run.count;
            shared.counters.zero_pages.fetch_add(run.count, Ordering::Relaxed);
        }
        Ok(())
    }

    fn count_bytes(&mut self) {
        let bytes = self.lane.bytes_on_wire();
        self.shared.counters.bytes_on_wire.fetch_add(bytes - self.bytes, Ordering::Relaxed);
        self.bytes = bytes;
    }

    /// Waits until every lane has all of this round; false if the migration ended meanwhile.
    fn meet(&mut self) -> bool {
        let shared = self.shared;
        let mut barrier = shared.barrier();
        barrier.counts.0 += self.counts.0;
        barrier.counts.1 += self.counts.1;
        self.counts = (0, 0);
        barrier.waiting += 1;
        if barrier.waiting == barrier.lanes {
            let bytes = shared.counters.bytes_on_wire.load(Ordering::Relaxed);
            let counts = RoundCounts {
                round: barrier.round,
                pages: barrier.counts.0,
                zero_pages: barrier.counts.1,
                bytes_on_wire: bytes - barrier.counts.2,
            };
            let (lanes, round, working) = (barrier.lanes, barrier.round.saturating_add(1), barrier.working);
            *barrier = Barrier { lanes, round, waiting: 0, telling: lanes, working, counts: (0, 0, bytes), begun: true };
            let _ = shared.events.send(LaneEvent::Round(counts));
            shared.passed.notify_all();
        }
        while barrier.round == self.round {
            if shared.stop.load(Ordering::Relaxed) {
                return false;
            }
            barrier = shared.passed.wait(barrier).unwrap_or_else(PoisonError::into_inner);
        }
        self.round = barrier.round;
        true
    }

    /// Tells the source that every lane has reached the barrier of `round`, even if that was the last one and the lanes are about
    /// to be ended: a source whose lane waits for it would take the end for a loss.
    fn tell(&mut self, round: u32) -> io::Result<()> {
        let told = self.lane.passed(round);
        let mut barrier = self.shared.barrier();
        barrier.telling = barrier.telling.saturating_sub(1);
        drop(barrier);
        self.shared.passed.notify_all();
        told
    }
}
