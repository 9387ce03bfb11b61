//! The RDMA link on a real device (a soft one in the lab): whole migrations, what is refused and what that costs, keys that are
//! not good, pages that change on their way, a queue pair that breaks. Both ends are in this process; the guests are toys, the
//! device and its packets are real. Where there is no device they print `skipped: …`. What every link must do alike is tested
//! elsewhere.
#![cfg(feature = "rdma")]
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::print_stdout)]

#[path = "../../../tests/rig/skip.rs"]
#[allow(dead_code, unreachable_pub, missing_docs)]
mod skip;
mod toy;

use limosa_link::rdma::{RdmaCounters, RdmaError, RdmaLink, RdmaListener, RdmaSettings, addresses, counters};
use limosa_link::{
    Answer, Cancel, Capabilities, ConnectError, Control, Exposed, ExposedError, Exposure, Fabric, HostError, LaneCloser,
    LaneMemory, LaneSender, Link, Pages, RemoteKeys,
};
use limosa_proto::allow::AllowList;
use limosa_proto::event::SourceOutcome;
use limosa_proto::memory::{MemoryMap, PAGE_BYTES, PageRange};
use limosa_proto::report::Report;
use limosa_proto::wire::code::Code;
use limosa_proto::wire::frame::{LanePreamble, LaneToken};
use limosa_proto::wire::offer::{CHUNK_BYTES, MemoryKey};
use limosa_verbs::{Context, Handshake, PairSettings, ProtectionDomain, Resolved};
use std::io;
use std::net::SocketAddr;
use std::os::fd::BorrowedFd;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, RwLock};
use std::time::Duration;
use toy::{Guest, Sender, Toy, ToyMemory, ToySettings, assert_moved, assert_stayed};

/// Two regions of which the second begins in the middle of nowhere, as much as two chunks and a bit.
const PAGES: u64 = 2 * CHUNK_BYTES / PAGE_BYTES + 640;

/// Handles are counted by process, so tests that count take turns.
static TURN: tokio::sync::Mutex<()> = tokio::sync::Mutex::const_new(());

fn settings() -> RdmaSettings {
    let (trusted_fabric, _) = AllowList::new(&["0.0.0.0/0"]).unwrap();
    RdmaSettings { trusted_fabric, ..RdmaSettings::default() }
}

/// The address of a device here; says so where there is none.
fn device() -> Option<SocketAddr> {
    match addresses(&settings()) {
        Ok(addresses) => addresses.first().map(|first| (first.address, 0).into()),
        Err(why) => {
            skip::skip_for_the_lab(&why);
            None
        }
    }
}

/// Changes a page in the destination's memory after it has arrived and before it is looked at.
struct Flipping {
    inner: Arc<dyn Fabric>,
    page: u64,
    armed: Arc<AtomicBool>,
}

struct FlippedPages {
    inner: Arc<dyn Pages>,
    page: u64,
    armed: Arc<AtomicBool>,
}

impl Fabric for Flipping {
    fn link(&self) -> &'static str {
        self.inner.link()
    }
    fn expose(&self, exposure: Exposure) -> Result<Box<dyn Exposed>, HostError> {
        let pages = FlippedPages { inner: exposure.pages.clone(), page: self.page, armed: self.armed.clone() };
        self.inner.expose(Exposure { pages: Arc::new(pages), ..exposure })
    }
}

impl Pages for FlippedPages {
    fn memory_map(&self) -> &MemoryMap {
        self.inner.memory_map()
    }
    fn gather(&self, socket: BorrowedFd<'_>, head: &[u8], runs: &[PageRange], done: u64, more: bool) -> io::Result<usize> {
        self.inner.gather(socket, head, runs, done, more)
    }
    fn scatter(&self, socket: BorrowedFd<'_>, runs: &[PageRange], done: u64, tail: &mut [u8]) -> io::Result<usize> {
        self.inner.scatter(socket, runs, done, tail)
    }
    fn read(&self, range: PageRange, offset: u64, out: &mut [u8]) {
        if range.first == self.page && self.armed.swap(false, Ordering::SeqCst) {
            let mut byte = [0];
            self.inner.read(range, 77, &mut byte);
            self.inner.write(range, 77, &[byte[0] ^ 4]);
        }
        self.inner.read(range, offset, out);
    }
    fn write(&self, range: PageRange, offset: u64, data: &[u8]) {
        self.inner.write(range, offset, data);
    }
    fn scan(&self, range: PageRange, found: &mut dyn FnMut(PageRange, bool)) {
        self.inner.scan(range, found);
    }
    fn zero(&self, range: PageRange) {
        self.inner.zero(range);
    }
    fn data_extents(&self, range: PageRange) -> Vec<PageRange> {
        self.inner.data_extents(range)
    }
    fn file(&self, index: usize) -> Option<(BorrowedFd<'_>, u64)> {
        self.inner.file(index)
    }
    fn populate(&self, range: PageRange) -> io::Result<()> {
        self.inner.populate(range)
    }
}

/// A destination with an RDMA port, and a source.
struct Trial {
    toy: Toy,
    sender: Sender,
    address: SocketAddr,
    allow: Arc<RwLock<AllowList>>,
    counters: Arc<RdmaCounters>,
    stop: Cancel,
}

impl Drop for Trial {
    fn drop(&mut self) {
        self.stop.cancel("over");
    }
}

impl Trial {
    async fn new(at: SocketAddr, memory: Arc<ToyMemory>) -> Trial {
        Trial::over(at, memory, |fabric| fabric).await
    }

    /// One whose device is looked at through `wrap`.
    async fn over(at: SocketAddr, memory: Arc<ToyMemory>, wrap: impl FnOnce(Arc<dyn Fabric>) -> Arc<dyn Fabric>) -> Trial {
        let allow = Arc::new(RwLock::new(AllowList::new(&["0.0.0.0/0"]).unwrap().0));
        let listener = RdmaListener::bind(at, settings(), allow.clone()).unwrap();
        let (address, counters, stop) = (listener.local_address(), listener.counters(), Cancel::new());
        let fabric = wrap(listener.fabric());
        let toy = Toy::start(ToySettings { fabric: Some(fabric), ..ToySettings::default() }).await;
        tokio::spawn(listener.serve(toy.sessions.clone(), stop.clone()));
        let mut sender = Sender::new(Guest::start(memory, Duration::from_millis(2)));
        sender.plaintext = true;
        sender.settings.frame_bytes = 1 << 20;
        sender.befriend(&toy);
        Trial { toy, sender, address, allow, counters, stop }
    }

    fn link(&self) -> Arc<RdmaLink> {
        Arc::new(RdmaLink::new(self.sender.link(&self.toy), self.address, settings()))
    }

    async fn migrate_over(&self, link: Arc<dyn Link>) -> (SourceOutcome, Report) {
        self.sender.migrate_over(&self.toy, link).await
    }

    /// Nothing of the device is left once no migration is open.
    async fn assert_clean(&self) {
        self.toy.settle().await;
        for _ in 0..500 {
            if counters::alive() == counters::Counts::default() {
                return;
            }
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        panic!("handles of the device are left: {:?}", counters::alive());
    }

    /// Whatever went before: the next migration succeeds.
    async fn next_is_good(&mut self) -> Report {
        self.assert_clean().await;
        self.sender.settings.bandwidth_bytes_per_s = 0;
        self.sender.cancel = Cancel::new();
        let (outcome, report) = self.migrate_over(self.link()).await;
        assert_moved(&self.sender, &self.toy, &outcome);
        self.assert_clean().await;
        report
    }
}

/// Two thirds of it hold something.
fn memory(pages: u64) -> Arc<ToyMemory> {
    let memory = ToyMemory::new(pages);
    memory.fill(|page| page % 3 != 0);
    memory
}

fn words(outcome: &SourceOutcome) -> (Code, String) {
    match outcome {
        SourceOutcome::Aborted { code, words, .. } => (*code, words.clone()),
        SourceOutcome::Refused(refusal) => (refusal.code, refusal.words()),
        other => panic!("{other:?}"),
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_guest_moves_over_one_to_four_lanes() {
    let _turn = TURN.lock().await;
    let Some(at) = device() else { return };
    for lanes in 1..=4 {
        let mut trial = Trial::new(at, memory(PAGES)).await;
        trial.sender.lanes = lanes;
        let link = trial.link();
        let (outcome, report) = trial.migrate_over(link.clone()).await;
        assert_moved(&trial.sender, &trial.toy, &outcome);
        assert_eq!((report.link.as_str(), report.page_check, report.encrypted), ("rdma", Some(true), false));
        assert_eq!(trial.counters.let_in.load(Ordering::SeqCst), u64::from(lanes));
        // What is written is pages that hold something, and nothing for zeros.
        let pages = trial.toy.seen.lock().unwrap().as_ref().unwrap().borrow().pages;
        assert_eq!(link.work().write_bytes.load(Ordering::SeqCst), pages * PAGE_BYTES);
        assert!(report.zero_pages >= PAGES / 4, "{} zero pages", report.zero_pages);
        trial.assert_clean().await;
    }
}

/// A link that may be tampered with: what it does to preambles, to keys, and the closers of its lanes.
struct Tampered {
    inner: Arc<RdmaLink>,
    token: Option<LaneToken>,
    /// Changes each key that the destination gives.
    key: Option<Change>,
    closers: Mutex<Vec<LaneCloser>>,
}

impl Tampered {
    fn new(inner: Arc<RdmaLink>) -> Tampered {
        Tampered { inner, token: None, key: None, closers: Mutex::default() }
    }
}

type Change = Arc<dyn Fn(MemoryKey) -> MemoryKey + Send + Sync>;

/// Passes on what is asked of `keys` to `real`, and what comes back changed.
fn pass_keys(
    mut asks: tokio::sync::mpsc::UnboundedReceiver<Vec<u32>>,
    keys: Arc<RemoteKeys>,
    real: Arc<RemoteKeys>,
    change: Change,
) {
    let keys = Arc::downgrade(&keys);
    std::thread::spawn(move || {
        while let Some(chunks) = asks.blocking_recv() {
            for chunk in chunks {
                let Some(keys) = keys.upgrade() else { return };
                match real.wait(chunk, &[]) {
                    Ok(key) => keys.insert(&[change(key)]).unwrap(),
                    Err(_) => return keys.close(),
                }
            }
        }
    });
}

impl Link for Tampered {
    fn capabilities(&self) -> Capabilities {
        self.inner.capabilities()
    }
    fn destination(&self) -> String {
        self.inner.destination()
    }
    fn control(&self) -> Answer<'_, Result<Control, ConnectError>> {
        self.inner.control()
    }
    fn lane(
        &self,
        preamble: LanePreamble,
        plaintext: bool,
        memory: &LaneMemory,
    ) -> Answer<'_, Result<Box<dyn LaneSender>, ConnectError>> {
        let memory = memory.clone();
        Box::pin(async move {
            let preamble = LanePreamble { token: self.token.unwrap_or(preamble.token), ..preamble };
            let Some(change) = self.key.clone() else {
                let lane = self.inner.lane(preamble, plaintext, &memory).await?;
                self.closers.lock().unwrap().push(lane.closer().unwrap());
                return Ok(lane);
            };
            // The lane is opened first: the destination gives no key before it has one.
            let (keys, asks) = RemoteKeys::new(&*memory.pages);
            let keys = Arc::new(keys);
            let changed = LaneMemory { keys: keys.clone(), ..memory.clone() };
            let lane = self.inner.lane(preamble, plaintext, &changed).await?;
            pass_keys(asks, keys, memory.keys, change);
            Ok(lane)
        })
    }
}

/// Asserts that the migration over `link` failed with such words while the guest runs on, and that the next one is good.
async fn fails_and_mends(trial: &mut Trial, link: Arc<dyn Link>, wanted: &[&str]) {
    let (outcome, _) = trial.migrate_over(link).await;
    assert_stayed(&trial.sender, &trial.toy, &outcome);
    let (code, words) = words(&outcome);
    assert!(wanted.iter().any(|wanted| words.contains(wanted)), "{code}: {words}");
    trial.next_is_good().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_queue_pair_that_breaks_in_mid_round_costs_nothing_but_the_attempt() {
    let _turn = TURN.lock().await;
    let Some(at) = device() else { return };
    let mut trial = Trial::new(at, memory(PAGES)).await;
    trial.sender.settings.bandwidth_bytes_per_s = 8 << 20;
    let link = Arc::new(Tampered::new(trial.link()));
    let (cut, mut progress) = (link.clone(), trial.sender.progress.subscribe());
    let cutting = tokio::spawn(async move {
        progress.wait_for(|progress| progress.rounds.last().is_some_and(|round| round.pages > 500)).await.unwrap();
        cut.closers.lock().unwrap()[1].close();
    });
    let (outcome, _) = trial.migrate_over(link).await;
    cutting.await.unwrap();
    assert_stayed(&trial.sender, &trial.toy, &outcome);
    trial.next_is_good().await;
}

/// A migration whose source uses other keys than it got.
async fn with_keys(at: SocketAddr, change: Change) {
    let mut trial = Trial::new(at, memory(640)).await;
    let link = Arc::new(Tampered { key: Some(change), ..Tampered::new(trial.link()) });
    fails_and_mends(&mut trial, link, &["denied the access"]).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn nothing_can_be_written_outside_of_the_memory_that_was_opened() {
    let _turn = TURN.lock().await;
    let Some(at) = device() else { return };
    with_keys(at, Arc::new(|key| MemoryKey { rkey: key.rkey ^ 0x0001_0000, ..key })).await;
    with_keys(at, Arc::new(|key| MemoryKey { address: key.address - PAGE_BYTES, ..key })).await;
    with_keys(at, Arc::new(|key| MemoryKey { address: key.address + CHUNK_BYTES, ..key })).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_key_is_good_for_nothing_once_its_migration_is_over() {
    let _turn = TURN.lock().await;
    let Some(at) = device() else { return };
    let mut trial = Trial::new(at, memory(640)).await;
    let seen: Arc<Mutex<Option<MemoryKey>>> = Arc::default();
    let note = seen.clone();
    let change: Change = Arc::new(move |key| {
        note.lock().unwrap().get_or_insert(key);
        key
    });
    let link = Arc::new(Tampered { key: Some(change), ..Tampered::new(trial.link()) });
    trial.sender.saw.faults.add(toy::Call::Save, toy::Fault::Fail);
    let (outcome, _) = trial.migrate_over(link).await;
    assert_stayed(&trial.sender, &trial.toy, &outcome);
    trial.assert_clean().await;
    trial.sender.saw.faults.0.lock().unwrap().clear();
    let stale = seen.lock().unwrap().unwrap();
    let change: Change = Arc::new(move |key| MemoryKey { chunk: key.chunk, ..stale });
    let link = Arc::new(Tampered { key: Some(change), ..Tampered::new(trial.link()) });
    fails_and_mends(&mut trial, link, &["denied the access"]).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_page_that_changed_on_its_way_is_noticed_before_the_commit() {
    let _turn = TURN.lock().await;
    let Some(at) = device() else { return };
    let armed = Arc::new(AtomicBool::new(true));
    let wrap = |inner| Arc::new(Flipping { inner, page: 400, armed: armed.clone() }) as Arc<dyn Fabric>;
    let mut trial = Trial::over(at, memory(640), wrap).await;
    // The guest leaves that page alone: it is sent once.
    trial.sender.guest.set_running(false);
    let (outcome, report) = trial.migrate_over(trial.link()).await;
    assert!(!armed.load(Ordering::SeqCst), "the page was never looked at");
    let (code, words) = words(&outcome);
    assert_eq!(code, Code::PageCheck, "{words}");
    assert!(words.contains("1 pages") && words.contains("page 400"), "{words}");
    assert!(!trial.toy.saw.running.load(Ordering::SeqCst) && !trial.sender.saw.released.load(Ordering::SeqCst));
    assert!(!report.ok);
    trial.next_is_good().await;
}

/// Notes which handles there are before and after the memory is closed for the first time.
struct Closing {
    inner: Arc<dyn Fabric>,
    seen: Arc<Mutex<Option<[counters::Counts; 2]>>>,
}

struct ClosingMemory(Box<dyn Exposed>, Arc<Mutex<Option<[counters::Counts; 2]>>>);

impl Fabric for Closing {
    fn link(&self) -> &'static str {
        self.inner.link()
    }
    fn expose(&self, exposure: Exposure) -> Result<Box<dyn Exposed>, HostError> {
        Ok(Box::new(ClosingMemory(self.inner.expose(exposure)?, self.seen.clone())))
    }
}

impl Exposed for ClosingMemory {
    fn open(&self, chunk: u32) -> Result<MemoryKey, HostError> {
        self.0.open(chunk)
    }
    fn close(&self) -> Result<(), ExposedError> {
        let before = counters::alive();
        let closed = self.0.close();
        self.1.lock().unwrap().get_or_insert([before, counters::alive()]);
        closed
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn memory_whose_lanes_are_gone_is_given_back_when_the_guest_runs() {
    let _turn = TURN.lock().await;
    let Some(at) = device() else { return };
    let seen: Arc<Mutex<Option<[counters::Counts; 2]>>> = Arc::default();
    let note = seen.clone();
    let trial = Trial::over(at, memory(640), |inner| Arc::new(Closing { inner, seen: note })).await;
    let (outcome, _) = trial.migrate_over(trial.link()).await;
    assert_moved(&trial.sender, &trial.toy, &outcome);
    let [before, after] = seen.lock().unwrap().unwrap();
    // The source's queue pairs are in this process too, and may go meanwhile; the destination's are gone.
    assert!(before.pairs <= u64::from(trial.sender.lanes), "{before:?}");
    assert!(before.regions > 0 && after.regions > 0, "it was deregistered in the downtime: {before:?} {after:?}");
    trial.assert_clean().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn without_the_page_check_nobody_looks() {
    let _turn = TURN.lock().await;
    let Some(at) = device() else { return };
    let armed = Arc::new(AtomicBool::new(true));
    let wrap = |inner| Arc::new(Flipping { inner, page: 400, armed: armed.clone() }) as Arc<dyn Fabric>;
    let allow = Arc::new(RwLock::new(AllowList::new(&["0.0.0.0/0"]).unwrap().0));
    let listener = RdmaListener::bind(at, settings(), allow.clone()).unwrap();
    let (address, counters, stop) = (listener.local_address(), listener.counters(), Cancel::new());
    let fabric = Some(wrap(listener.fabric()));
    let tune = Arc::new(|config: &mut limosa_proto::event::DestinationConfig| config.page_check = false);
    let toy = Toy::start(ToySettings { fabric, tune, ..ToySettings::default() }).await;
    tokio::spawn(listener.serve(toy.sessions.clone(), stop.clone()));
    let mut sender = Sender::new(Guest::start(memory(640), Duration::from_millis(2)));
    sender.plaintext = true;
    sender.tune = Box::new(|config| config.page_check = false);
    sender.befriend(&toy);
    let trial = Trial { toy, sender, address, allow, counters, stop };
    let (outcome, report) = trial.migrate_over(trial.link()).await;
    assert_moved(&trial.sender, &trial.toy, &outcome);
    assert_eq!(report.page_check, Some(false));
    assert!(armed.load(Ordering::SeqCst), "the page was looked at");
    trial.assert_clean().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_stranger_costs_no_handle() {
    let _turn = TURN.lock().await;
    let Some(at) = device() else { return };
    let trial = Trial::new(at, memory(640)).await;
    // What a stranger knocks with is made in this process too, and counted beside.
    let knock = async |private_data: Vec<u8>| {
        let before = counters::made();
        let resolved = Resolved::resolve(trial.address, None, Duration::from_secs(2)).await.unwrap();
        let domain = ProtectionDomain::new(&Context::open(resolved.device()).unwrap()).unwrap();
        let prepared = resolved.prepare(&domain, &PairSettings::default()).unwrap();
        let refused = prepared.establish(&Handshake { private_data, ..Handshake::default() }, Duration::from_secs(5)).await;
        let words = refused.unwrap_err().to_string();
        let made = counters::made();
        assert_eq!(
            (
                made.domains - before.domains,
                made.pairs - before.pairs,
                made.queues - before.queues,
                made.regions - before.regions
            ),
            (1, 1, 1, 0),
            "{words}"
        );
    };
    let refused = |which: fn(&RdmaCounters) -> &AtomicU64| which(&trial.counters).load(Ordering::SeqCst);
    knock(b"hello".to_vec()).await;
    let mut made_up = b"LMSR\x01\x00".to_vec();
    made_up.extend([7; 48]);
    knock(made_up.clone()).await;
    assert_eq!((refused(|all| &all.refused_unknown), refused(|all| &all.refused_not_allowed)), (2, 0));
    *trial.allow.write().unwrap() = AllowList::default();
    knock(made_up).await;
    assert_eq!((refused(|all| &all.refused_unknown), refused(|all| &all.refused_not_allowed)), (2, 1));
    assert_eq!(refused(|all| &all.let_in), 0);
    trial.assert_clean().await;
}

/// Says at another machine's port what a lane says, with a token that is good for nothing, and prints what it hears.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "run by tests/lab_links.rs, in one machine against another's agent"]
async fn knocks_at_another_machine() {
    let to: SocketAddr = std::env::var("LIMOSA_KNOCK").expect("LIMOSA_KNOCK says where").parse().unwrap();
    let resolved = Resolved::resolve(to, None, Duration::from_secs(5)).await.unwrap();
    let domain = ProtectionDomain::new(&Context::open(resolved.device()).unwrap()).unwrap();
    let prepared = resolved.prepare(&domain, &PairSettings::default()).unwrap();
    let private_data = [&b"LMSR\x01\x00"[..], &[7; 48]].concat();
    let refused = prepared.establish(&Handshake { private_data, ..Handshake::default() }, Duration::from_secs(10)).await;
    match refused.err() {
        Some(limosa_verbs::ConnectError::Rejected { private_data, .. }) => {
            println!("the answer: {}", String::from_utf8_lossy(&private_data).replace(['\0', '\n'], ""));
        }
        other => panic!("not refused by the agent: {other:?}"),
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_address_that_is_not_allowed_is_refused_in_words() {
    let _turn = TURN.lock().await;
    let Some(at) = device() else { return };
    let mut trial = Trial::new(at, memory(640)).await;
    *trial.allow.write().unwrap() = AllowList::new(&["192.0.2.0/24"]).unwrap().0;
    let (outcome, _) = trial.migrate_over(trial.link()).await;
    assert_stayed(&trial.sender, &trial.toy, &outcome);
    let (_, said) = words(&outcome);
    assert!(said.contains("not on the allow-list") && said.contains(&at.ip().to_string()), "{said}");
    *trial.allow.write().unwrap() = AllowList::new(&["0.0.0.0/0"]).unwrap().0;
    trial.next_is_good().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_lane_that_does_not_know_the_token_stays_out() {
    let _turn = TURN.lock().await;
    let Some(at) = device() else { return };
    let mut trial = Trial::new(at, memory(640)).await;
    let link = Arc::new(Tampered { token: Some(LaneToken([9; 32])), ..Tampered::new(trial.link()) });
    fails_and_mends(&mut trial, link, &["no such migration waits for lanes"]).await;
    assert_eq!(trial.counters.refused_unknown.load(Ordering::SeqCst), 2);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn rdma_is_refused_where_the_fabric_is_not_declared_trusted() {
    let _turn = TURN.lock().await;
    let Some(at) = device() else { return };
    let allow = || Arc::new(RwLock::new(AllowList::new(&["0.0.0.0/0"]).unwrap().0));
    let none = RdmaListener::bind(at, RdmaSettings::default(), allow());
    assert!(matches!(none, Err(RdmaError::NoTrustedFabric)), "{none:?}");
    let (elsewhere, _) = AllowList::new(&["192.0.2.0/24"]).unwrap();
    let elsewhere = RdmaSettings { trusted_fabric: elsewhere, ..RdmaSettings::default() };
    let other = RdmaListener::bind(at, elsewhere.clone(), allow());
    assert!(matches!(other, Err(RdmaError::NotTrusted { .. })), "{other:?}");
    let mut trial = Trial::new(at, memory(640)).await;
    let link = Arc::new(RdmaLink::new(trial.sender.link(&trial.toy), trial.address, elsewhere));
    fails_and_mends(&mut trial, link, &["not inside trusted_fabric (192.0.2.0/24)"]).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn many_pages_ring_the_doorbell_seldom() {
    let _turn = TURN.lock().await;
    let Some(at) = device() else { return };
    let memory = ToyMemory::regions(&[(64 << 20) / PAGE_BYTES]);
    memory.fill(|_| true);
    let mut trial = Trial::new(at, memory).await;
    trial.sender.lanes = 1;
    let link = trial.link();
    let (outcome, report) = trial.migrate_over(link.clone()).await;
    assert_moved(&trial.sender, &trial.toy, &outcome);
    let work = link.work();
    let (doorbells, bytes) = (work.doorbells.load(Ordering::SeqCst), work.write_bytes.load(Ordering::SeqCst));
    // Besides what is bulk each round begins with three small batches and has an end, and the lane has one.
    let ends = u64::from(report.rounds) * 4 + 1;
    println!("{doorbells} doorbells for {bytes} bytes in {} writes, {ends} besides bulk", work.writes.load(Ordering::SeqCst));
    assert!(doorbells <= bytes.div_ceil(8 << 20) + ends, "{doorbells} doorbells for {bytes} bytes, {ends} ends");
    trial.assert_clean().await;
}

/// Set in the process that may lock little memory.
const LITTLE: &str = "LIMOSA_TEST_LITTLE_MEMLOCK";

/// What is too much to lock is said with the limit and the line to set; the guest runs on, and a smaller one moves.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn memory_that_may_not_be_locked_is_named_with_the_remedy() {
    let _turn = TURN.lock().await;
    let Some(at) = device() else { return };
    if std::env::var_os(LITTLE).is_none() {
        // Root may lock anything, so the rest is done by a process without that right.
        let mut child = std::process::Command::new("prlimit");
        child.args(["--memlock=24000000", "setpriv", "--bounding-set=-ipc_lock", "--inh-caps=-ipc_lock"]);
        child.arg(std::env::current_exe().unwrap()).env(LITTLE, "1");
        child.args(["--exact", "memory_that_may_not_be_locked_is_named_with_the_remedy", "--nocapture"]);
        let done = child.output().unwrap();
        assert!(done.status.success(), "{}{}", String::from_utf8_lossy(&done.stdout), String::from_utf8_lossy(&done.stderr));
        return;
    }
    let memory_of = |pages: u64| {
        let memory = ToyMemory::regions(&[pages]);
        memory.fill(|_| true);
        memory
    };
    let trial = Trial::new(at, memory_of(3 * CHUNK_BYTES / PAGE_BYTES)).await;
    let (outcome, _) = trial.migrate_over(trial.link()).await;
    assert_stayed(&trial.sender, &trial.toy, &outcome);
    let (_, said) = words(&outcome);
    for wanted in ["of 3 of guest memory could not be registered", "may lock 23438 KiB", "LimitMEMLOCK", "limits.d", "48 MiB"] {
        assert!(said.contains(wanted), "{wanted}: {said}");
    }
    trial.assert_clean().await;
    drop(trial);
    Trial::new(at, memory_of(640)).await.next_is_good().await;
}
