//! The source's lane threads: they take runs of pages from one shared queue, leave out zeros, and build frames.
//! The queue is the bitmap of the round and a cursor, so nothing is listed and the last round is spread over all lanes.

use crate::lanes::{
    Cap, CountedOpen, CpuMeter, LaneCloser, LaneCounters, LaneEvent, LaneEvents, LaneSender, RoundCounts, lane_words,
};
use crate::pages::{Pages, by_region, next_runs};
use limosa_proto::bitmap::PageSet;
use limosa_proto::identity::{Generation, MigrationId};
use limosa_proto::memory::{MemoryMap, PAGE_BYTES, PageRange};
use limosa_proto::wire::frame::{LaneFrameKind, LaneHeader, emit_runs};
use limosa_proto::wire::limits::{FRAME_BYTES_MAX, RUNS_PER_FRAME_MAX};
use std::io;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

/// Most pages in one run of zeros: what the frame's field holds, with room to spare.
const ZERO_BITE_PAGES: u64 = 1 << 30;
/// Smallest bite of the queue, so that a small round does not become a fight for the lock.
const BITE_PAGES_MIN: u64 = 8;

/// How long lanes that have nothing more to send may take to say so.
const FINISH_MAX: Duration = Duration::from_secs(1);

/// What all frames of one migration carry.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Tag {
    pub(crate) migration: MigrationId,
    pub(crate) generation: Generation,
}

/// One round's work.
struct Round {
    number: u32,
    set: PageSet,
    cursor: u64,
    /// Pages that nobody ever touched, once the first lane of the first round has asked for them, and a cursor.
    holes: Option<(PageSet, u64)>,
    bite_pages: u64,
    lanes_done: usize,
    counts: RoundCounts,
}

impl Round {
    /// Takes the next bite into `runs`: true for holes, false for pages that must be looked at. Nothing in it is the end.
    fn bite(&mut self, pages: &dyn Pages, runs: &mut Vec<PageRange>) -> bool {
        let (set, bite_pages) = (&mut self.set, self.bite_pages);
        // Only in the first round: a page that is dirty was touched. All at once, since finding the end of a piece of data
        // means walking over it; asking for each bite again would walk over everything each time.
        if self.number == 1 && self.holes.is_none() {
            let mut data = PageSet::empty(pages.memory_map());
            for region in (0..pages.memory_map().regions().len()).filter_map(|index| pages.memory_map().region_range(index)) {
                pages.data_extents(region).into_iter().for_each(|extent| data.insert(extent));
            }
            let mut holes = set.clone();
            holes.subtract(&data);
            set.subtract(&holes);
            self.holes = Some((holes, 0));
        }
        if let Some((holes, cursor)) = &mut self.holes {
            next_runs(holes.words(), cursor, ZERO_BITE_PAGES, RUNS_PER_FRAME_MAX, runs);
            if !runs.is_empty() {
                return true;
            }
        }
        next_runs(set.words(), &mut self.cursor, bite_pages, RUNS_PER_FRAME_MAX, runs);
        false
    }
}

#[derive(Default)]
struct Queue {
    /// Rises with every round that is handed in.
    order: u64,
    round: Option<Round>,
    finish: bool,
}

struct Shared {
    pages: Arc<dyn Pages>,
    tag: Tag,
    frame_pages: u64,
    lanes: usize,
    queue: Mutex<Queue>,
    changed: Condvar,
    stop: AtomicBool,
    cap: Cap,
    counters: Arc<LaneCounters>,
    events: LaneEvents,
}

impl Shared {
    fn queue(&self) -> std::sync::MutexGuard<'_, Queue> {
        self.queue.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The lanes of one migration at its source.
pub(crate) struct SendLanes {
    shared: Arc<Shared>,
    closers: Vec<LaneCloser>,
    threads: Vec<JoinHandle<()>>,
}

/// What a lane has to do next.
enum Order {
    Round(u32),
    Finish,
    Stop,
}

impl SendLanes {
    /// Starts a thread for each of `lanes`; they wait for the first round.
    pub(crate) fn start(
        lanes: Vec<Box<dyn LaneSender>>,
        pages: Arc<dyn Pages>,
        tag: Tag,
        settings: &crate::LaneSettings,
        counters: Arc<LaneCounters>,
        events: LaneEvents,
    ) -> io::Result<SendLanes> {
        let closers = lanes.iter().map(|lane| lane.closer()).collect::<io::Result<Vec<_>>>()?;
        let shared = Arc::new(Shared {
            pages,
            tag,
            frame_pages: (settings.frame_bytes / PAGE_BYTES).clamp(1, FRAME_BYTES_MAX / PAGE_BYTES),
            lanes: lanes.len(),
            queue: Mutex::default(),
            changed: Condvar::new(),
            stop: AtomicBool::new(false),
            cap: Cap::new(settings.bandwidth_bytes_per_s),
            counters,
            events,
        });
        let mut started = SendLanes { shared, closers, threads: Vec::new() };
        for (number, lane) in lanes.into_iter().enumerate() {
            let shared = started.shared.clone();
            let number = u16::try_from(number).unwrap_or(u16::MAX);
            let thread = std::thread::Builder::new().name(format!("lane-out-{number}")).spawn(move || {
                let _open = CountedOpen::new();
                Lane::run(lane, number, &shared);
            })?;
            started.threads.push(thread);
        }
        Ok(started)
    }

    /// Sends the pages of `set` as round `number`; the event tells when the last lane is through. One round at a time.
    pub(crate) fn send(&self, number: u32, set: PageSet) -> Result<(), &'static str> {
        let shared = &self.shared;
        let mut queue = shared.queue();
        if queue.round.is_some() {
            return Err("a round was begun before the one before it was sent");
        }
        let share = set.count().div_ceil(shared.lanes.max(1) as u64 * 2);
        let bite_pages = share.clamp(BITE_PAGES_MIN.min(shared.frame_pages), shared.frame_pages);
        let counts = RoundCounts { round: number, pages: 0, zero_pages: 0, bytes_on_wire: 0 };
        queue.round = Some(Round { number, set, cursor: 0, holes: None, bite_pages, lanes_done: 0, counts });
        queue.order += 1;
        drop(queue);
        shared.changed.notify_all();
        Ok(())
    }

    /// Lets every lane end politely after what it has to send.
    pub(crate) fn finish(&self) {
        self.shared.queue().finish = true;
        self.shared.changed.notify_all();
    }
}

impl Drop for SendLanes {
    /// Ends what has not ended yet, and waits for the threads: nobody reads guest memory afterwards. Lanes that were told to
    /// finish get a moment for it.
    fn drop(&mut self) {
        if self.shared.queue().finish {
            let patience = Instant::now() + FINISH_MAX;
            while Instant::now() < patience && !self.threads.iter().all(JoinHandle::is_finished) {
                std::thread::sleep(Duration::from_millis(1));
            }
        }
        {
            let _queue = self.shared.queue();
            self.shared.stop.store(true, Ordering::Relaxed);
        }
        self.shared.changed.notify_all();
        self.closers.iter().for_each(LaneCloser::close);
        for thread in self.threads.drain(..) {
            let _ = thread.join();
        }
    }
}

/// Appends `run` to `runs`, as one with the last where they touch within a region.
fn push(runs: &mut Vec<PageRange>, run: PageRange, map: &MemoryMap) {
    match runs.last_mut() {
        Some(last) if last.end() == run.first && last.count + run.count <= u64::from(u32::MAX) => {
            let whole = PageRange { first: last.first, count: last.count + run.count };
            if map.locate(whole).is_some() {
                *last = whole;
                return;
            }
        }
        _ => {}
    }
    runs.push(run);
}

/// One lane's thread.
struct Lane<'a> {
    lane: Box<dyn LaneSender>,
    shared: &'a Shared,
    round: u32,
    /// Runs waiting to be sent, and how many pages they are.
    data: Vec<PageRange>,
    data_pages: u64,
    zero: Vec<PageRange>,
    head: Vec<u8>,
    counts: RoundCounts,
    /// Bytes on the wire that were counted.
    bytes: u64,
}

impl<'a> Lane<'a> {
    fn run(lane: Box<dyn LaneSender>, number: u16, shared: &'a Shared) {
        let counts = RoundCounts { round: 0, pages: 0, zero_pages: 0, bytes_on_wire: 0 };
        let mut this = Lane {
            lane,
            shared,
            round: 0,
            data: Vec::new(),
            data_pages: 0,
            zero: Vec::new(),
            head: Vec::new(),
            counts,
            bytes: 0,
        };
        if let Err(error) = this.work()
            && !shared.stop.load(Ordering::Relaxed)
        {
            let _ = shared.events.send(LaneEvent::Failed { lane: number, words: lane_words(number, "sending pages", &error) });
        }
    }

    fn work(&mut self) -> io::Result<()> {
        let mut meter = CpuMeter::new(&self.shared.counters.cpu_ns);
        let mut order = 0;
        loop {
            match self.next_order(&mut order) {
                Order::Stop => return Ok(()),
                Order::Finish => {
                    // Everything has been sent; a destination that has it all may close first.
                    let _ = self.frame(LaneFrameKind::End, &[]).and_then(|()| self.lane.finish());
                    return Ok(());
                }
                Order::Round(number) => {
                    self.round = number;
                    self.counts = RoundCounts { round: number, pages: 0, zero_pages: 0, bytes_on_wire: 0 };
                    if !self.send_round()? {
                        return Ok(());
                    }
                    meter.count();
                    self.round_done();
                }
            }
        }
    }

    fn next_order(&self, order: &mut u64) -> Order {
        let mut queue = self.shared.queue();
        loop {
            if self.shared.stop.load(Ordering::Relaxed) {
                return Order::Stop;
            }
            if queue.order > *order {
                *order = queue.order;
                if let Some(round) = &queue.round {
                    return Order::Round(round.number);
                }
            }
            if queue.finish {
                return Order::Finish;
            }
            queue = self.shared.changed.wait(queue).unwrap_or_else(PoisonError::into_inner);
        }
    }

    /// Sends this lane's share of the round and the barrier; false if it was told to stop.
    fn send_round(&mut self) -> io::Result<bool> {
        let shared = self.shared;
        let mut runs = Vec::new();
        loop {
            let holes = match &mut shared.queue().round {
                Some(round) => round.bite(&*shared.pages, &mut runs),
                None => break,
            };
            if runs.is_empty() {
                break;
            }
            if shared.stop.load(Ordering::Relaxed) {
                return Ok(false);
            }
            for run in &runs {
                let mut result = Ok(());
                by_region(shared.pages.memory_map(), *run, |part| {
                    if result.is_ok() {
                        result = if holes { self.push_zero(part) } else { self.scan(&*shared.pages, part) };
                    }
                });
                result?;
            }
            if holes {
                // At once: the destination gives memory to whatever it has not heard of when contents begin to come.
                self.flush_zero()?;
            }
        }
        self.flush_data()?;
        self.flush_zero()?;
        self.frame(LaneFrameKind::Barrier, &[])?;
        self.lane.flush()?;
        self.count_bytes();
        Ok(!shared.stop.load(Ordering::Relaxed))
    }

    /// Tells zeros from contents.
    fn scan(&mut self, pages: &dyn Pages, run: PageRange) -> io::Result<()> {
        let mut result = Ok(());
        pages.scan(run, &mut |found, zero| {
            if result.is_ok() {
                result = if zero { self.push_zero(found) } else { self.push_data(found) };
            }
        });
        result
    }

    fn push_zero(&mut self, run: PageRange) -> io::Result<()> {
        if run.count == 0 {
            return Ok(());
        }
        // Runs of a frame rise; pages never touched are named before all others, so what is found zero later may lie below.
        if self.zero.last().is_some_and(|last| run.first < last.end()) {
            self.flush_zero()?;
        }
        push(&mut self.zero, run, self.shared.pages.memory_map());
        self.counts.zero_pages += run.count;
        self.shared.counters.zero_pages.fetch_add(run.count, Ordering::Relaxed);
        if self.zero.len() >= RUNS_PER_FRAME_MAX { self.flush_zero() } else { Ok(()) }
    }

    fn push_data(&mut self, mut run: PageRange) -> io::Result<()> {
        while run.count > 0 {
            let here = run.count.min(self.shared.frame_pages - self.data_pages);
            push(&mut self.data, PageRange { first: run.first, count: here }, self.shared.pages.memory_map());
            self.data_pages += here;
            run = PageRange { first: run.first + here, count: run.count - here };
            if self.data_pages >= self.shared.frame_pages || self.data.len() >= RUNS_PER_FRAME_MAX {
                self.flush_data()?;
            }
        }
        Ok(())
    }

    fn flush_data(&mut self) -> io::Result<()> {
        if self.data.is_empty() {
            return Ok(());
        }
        let runs = std::mem::take(&mut self.data);
        let sent = self.frame(LaneFrameKind::Pages, &runs);
        self.counts.pages += self.data_pages;
        self.shared.counters.pages.fetch_add(self.data_pages, Ordering::Relaxed);
        self.data_pages = 0;
        self.data = runs;
        self.data.clear();
        sent
    }

    fn flush_zero(&mut self) -> io::Result<()> {
        if self.zero.is_empty() {
            return Ok(());
        }
        let runs = std::mem::take(&mut self.zero);
        let sent = self.frame(LaneFrameKind::Zero, &runs);
        self.zero = runs;
        self.zero.clear();
        sent
    }

    fn frame(&mut self, kind: LaneFrameKind, runs: &[PageRange]) -> io::Result<()> {
        let bytes = if kind == LaneFrameKind::Pages { runs.iter().map(|run| run.bytes()).sum() } else { 0 };
        let Tag { migration, generation } = self.shared.tag;
        let header = LaneHeader {
            kind,
            runs: u16::try_from(runs.len()).unwrap_or(u16::MAX),
            round: self.round,
            bytes,
            migration,
            generation,
        };
        self.head.clear();
        self.head.extend_from_slice(&header.emit());
        emit_runs(runs, &mut self.head);
        if !self.shared.cap.wait(self.head.len() as u64 + bytes, &self.shared.stop) {
            return Err(io::ErrorKind::Interrupted.into());
        }
        if kind == LaneFrameKind::Pages {
            self.lane.pages(&self.head, &*self.shared.pages, runs)?;
        } else {
            self.lane.head(&self.head)?;
        }
        self.count_bytes();
        Ok(())
    }

    fn count_bytes(&mut self) {
        let all = self.lane.bytes_on_wire();
        let sent = all - self.bytes;
        self.bytes = all;
        self.counts.bytes_on_wire += sent;
        self.shared.counters.bytes_on_wire.fetch_add(sent, Ordering::Relaxed);
    }

    fn round_done(&mut self) {
        let mut queue = self.shared.queue();
        let Some(round) = &mut queue.round else { return };
        round.lanes_done += 1;
        round.counts.pages += self.counts.pages;
        round.counts.zero_pages += self.counts.zero_pages;
        round.counts.bytes_on_wire += self.counts.bytes_on_wire;
        if round.lanes_done == self.shared.lanes {
            let counts = round.counts;
            queue.round = None;
            drop(queue);
            let _ = self.shared.events.send(LaneEvent::Round(counts));
        }
    }
}
