//! Toy hosts: guest memory, a thread that writes it, journals in memory, faults on demand.
//! No VMM and nothing on disk; what the driver and the lanes do with them is real.
#![allow(dead_code, unreachable_pub, missing_docs, clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod memory;

pub use memory::{Hold, ToyMemory};

use limosa_link::driver::fresh_token;
use limosa_link::host::IncomingProgress;
use limosa_link::sessions::Sessions;
use limosa_link::{
    Cancel, DestinationHost, Fabric, HostError, HostKey, Hosting, Incoming, LaneSettings, Link, Listener, ListenerSettings,
    Pages, Peer, Populate, SourceHost, TcpLink, TrustedHosts, run_source_over,
};
use limosa_proto::allow::AllowList;
use limosa_proto::bitmap::PageSet;
use limosa_proto::commit::{self, JournalRecord, JournalRecordKind};
use limosa_proto::cpu::CpuProfile;
use limosa_proto::event::{DestinationConfig, DestinationOutcome, SourceConfig, SourceOutcome};
use limosa_proto::identity::{Generation, MigrationId, VmId};
use limosa_proto::memory::{MemoryMap, PAGE_BYTES};
use limosa_proto::progress::Progress;
use limosa_proto::record::Record;
use limosa_proto::report::Report;
use limosa_proto::ticket::TicketBytes;
use limosa_proto::wire::frame::ControlHeader;
use limosa_proto::wire::message::{Hello, Reason, Refusal, VerdictAnswer, VmDescription};
use std::net::SocketAddr;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, RwLock};
use std::time::Duration;
use tokio::sync::{oneshot, watch};

/// A call of a host, to be made slow or to fail.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Call {
    Track,
    Fetch,
    Pause,
    Save,
    Prepare,
    Load,
    Resume,
    Journal(JournalRecordKind),
}

/// What happens at a call.
#[derive(Clone)]
pub enum Fault {
    Fail,
    Panic,
    /// Runs this before the call is answered.
    Then(Arc<dyn Fn() + Send + Sync>),
}

/// Faults, by call.
#[derive(Clone, Default)]
pub struct Faults(pub Arc<Mutex<Vec<(Call, Fault)>>>);

impl Faults {
    pub fn add(&self, call: Call, fault: Fault) {
        self.0.lock().unwrap().push((call, fault));
    }
    fn at(&self, call: Call) -> Result<(), HostError> {
        let fault = self.0.lock().unwrap().iter().find(|(at, _)| *at == call).map(|(_, fault)| fault.clone());
        match fault {
            None => Ok(()),
            Some(Fault::Fail) => Err(HostError::new(format!("{call:?} was told to fail"))),
            Some(Fault::Panic) => panic!("{call:?} was told to panic"),
            Some(Fault::Then(then)) => {
                then();
                Ok(())
            }
        }
    }
}

/// A guest: a thread that writes its memory while it runs.
pub struct Guest {
    pub memory: Arc<ToyMemory>,
    pub running: Arc<AtomicBool>,
    /// Held by the writer for each write: pausing takes it.
    gate: Arc<Mutex<()>>,
    stop: Arc<AtomicBool>,
    thread: Option<std::thread::JoinHandle<()>>,
    pub writes: Arc<AtomicU64>,
}

impl Guest {
    pub fn start(memory: Arc<ToyMemory>, pause_between: Duration) -> Arc<Guest> {
        let (running, gate, stop, writes) = (
            Arc::new(AtomicBool::new(true)),
            Arc::new(Mutex::new(())),
            Arc::new(AtomicBool::new(false)),
            Arc::new(AtomicU64::new(0)),
        );
        let thread = {
            let (memory, running, gate, stop, writes) =
                (memory.clone(), running.clone(), gate.clone(), stop.clone(), writes.clone());
            std::thread::spawn(move || {
                let pages = memory.pages();
                while !stop.load(Ordering::SeqCst) {
                    std::thread::park_timeout(pause_between);
                    {
                        let _held = gate.lock().unwrap();
                        if running.load(Ordering::SeqCst) {
                            let count = writes.fetch_add(1, Ordering::SeqCst) + 1;
                            let page = pages[(count.wrapping_mul(7919) % pages.len() as u64) as usize];
                            // Every so often a page becomes zero again.
                            if count % 11 == 0 {
                                memory.poke_page(page, |_| 0);
                            } else {
                                memory.poke(page, (count % 512) as usize, count);
                            }
                        }
                    }
                }
            })
        };
        Arc::new(Guest { memory, running, gate, stop, thread: Some(thread), writes })
    }
    pub fn set_running(&self, running: bool) {
        let _held = self.gate.lock().unwrap();
        self.running.store(running, Ordering::SeqCst);
    }
    pub fn is_running(&self) -> bool {
        self.running.load(Ordering::SeqCst)
    }
}

impl Drop for Guest {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::SeqCst);
        if let Some(thread) = self.thread.take() {
            thread.thread().unpark();
            let _ = thread.join();
        }
    }
}

pub type Journal = Arc<Mutex<Vec<JournalRecord>>>;

pub fn kinds(journal: &Journal) -> Vec<JournalRecordKind> {
    journal.lock().unwrap().iter().map(|record| record.kind).collect()
}

/// What happened to a guest at its source.
#[derive(Clone, Default)]
pub struct SourceSaw {
    pub journal: Journal,
    /// Memory when it was saved.
    pub at_save: Arc<Mutex<Option<Vec<u8>>>>,
    pub released: Arc<AtomicBool>,
    pub faults: Faults,
}

pub struct ToySource {
    pub guest: Arc<Guest>,
    pub saw: SourceSaw,
}

pub const STATE: &[u8] = b"the state of a toy";

impl SourceHost for ToySource {
    fn pages(&self) -> Arc<dyn Pages> {
        self.guest.memory.clone()
    }
    fn start_tracking(&mut self) -> Result<(), HostError> {
        self.saw.faults.at(Call::Track)?;
        self.guest.memory.forget_dirty();
        Ok(())
    }
    fn fetch_dirty(&mut self) -> Result<PageSet, HostError> {
        self.saw.faults.at(Call::Fetch)?;
        Ok(self.guest.memory.take_dirty())
    }
    fn pause(&mut self) -> Result<(), HostError> {
        self.guest.set_running(false);
        self.saw.faults.at(Call::Pause)
    }
    fn save(&mut self) -> Result<Vec<Record>, HostError> {
        self.saw.faults.at(Call::Save)?;
        // Saving dirties memory.
        self.guest.memory.poke(1, 1, 4711);
        *self.saw.at_save.lock().unwrap() = Some(self.guest.memory.snapshot());
        Ok((0..3).map(|instance| Record { kind: 1, version: 1, instance, bytes: STATE.to_vec() }).collect())
    }
    fn resume(&mut self) -> Result<(), HostError> {
        assert!(!self.saw.released.load(Ordering::SeqCst), "resumed after it was released");
        self.saw.faults.at(Call::Resume)?;
        self.guest.set_running(true);
        Ok(())
    }
    fn stop_tracking(&mut self) -> Result<(), HostError> {
        Ok(())
    }
    fn release(&mut self) -> Result<(), HostError> {
        assert!(!self.guest.is_running(), "released while it ran");
        self.saw.released.store(true, Ordering::SeqCst);
        Ok(())
    }
    fn journal(&mut self, record: &JournalRecord) -> Result<(), HostError> {
        self.saw.faults.at(Call::Journal(record.kind))?;
        self.saw.journal.lock().unwrap().push(record.clone());
        Ok(())
    }
}

/// What happened at a destination, over all its migrations.
#[derive(Clone)]
pub struct DestinationSaw {
    pub journal: Journal,
    pub memory: Arc<Mutex<Option<Arc<ToyMemory>>>>,
    pub at_resume: Arc<Mutex<Option<Vec<u8>>>>,
    pub running: Arc<AtomicBool>,
    pub loaded: Arc<AtomicBool>,
    /// What `hold` was called for.
    pub held: Arc<Mutex<Vec<&'static str>>>,
    pub discarded: Arc<AtomicU64>,
    pub announced: Arc<AtomicU64>,
    pub faults: Faults,
    pub refuse: Arc<Mutex<Option<Refusal>>>,
    /// Holds back what is written into incoming guests.
    pub hold: Arc<Hold>,
}

pub struct ToyDestination(pub DestinationSaw);

impl DestinationHost for ToyDestination {
    fn check(&mut self, _: &VmDescription) -> Result<(), Refusal> {
        self.0.refuse.lock().unwrap().clone().map_or(Ok(()), Err)
    }
    fn prepare(&mut self, vm: &VmDescription) -> Result<Arc<dyn Pages>, HostError> {
        self.0.faults.at(Call::Prepare)?;
        let memory = ToyMemory::held(vm.memory.clone(), self.0.hold.clone());
        *self.0.memory.lock().unwrap() = Some(memory.clone());
        Ok(memory)
    }
    fn load(&mut self, records: Vec<Record>) -> Result<(), HostError> {
        self.0.faults.at(Call::Load)?;
        assert!(records.len() == 3 && records.iter().all(|record| record.bytes == STATE), "{records:?}");
        self.0.loaded.store(true, Ordering::SeqCst);
        Ok(())
    }
    fn resume(&mut self) -> Result<(), HostError> {
        self.0.faults.at(Call::Resume)?;
        *self.0.at_resume.lock().unwrap() = Some(self.0.memory.lock().unwrap().as_ref().unwrap().snapshot());
        self.0.running.store(true, Ordering::SeqCst);
        Ok(())
    }
    fn hold(&mut self) -> Result<(), HostError> {
        let loaded = self.0.loaded.load(Ordering::SeqCst);
        if loaded {
            *self.0.at_resume.lock().unwrap() = Some(self.0.memory.lock().unwrap().as_ref().unwrap().snapshot());
        }
        self.0.held.lock().unwrap().push(if loaded { "taken" } else { "told" });
        Ok(())
    }
    fn announce(&mut self) -> Result<Vec<String>, HostError> {
        if !self.0.held.lock().unwrap().is_empty() {
            return Ok(vec![]);
        }
        assert!(self.0.running.load(Ordering::SeqCst), "announced before it ran");
        self.0.announced.fetch_add(1, Ordering::SeqCst);
        Ok(vec!["toy: 1 frame".into()])
    }
    fn discard(&mut self) -> Result<(), HostError> {
        assert!(!self.0.running.load(Ordering::SeqCst), "discarded while it ran");
        self.0.discarded.fetch_add(1, Ordering::SeqCst);
        Ok(())
    }
    fn journal(&mut self, record: &JournalRecord) -> Result<(), HostError> {
        self.0.faults.at(Call::Journal(record.kind))?;
        self.0.journal.lock().unwrap().push(record.clone());
        Ok(())
    }
}

/// A whole destination: key, port, table.
pub struct Toy {
    pub key: HostKey,
    pub trusted: TrustedHosts,
    /// Keys of operators.
    pub operators: TrustedHosts,
    pub allow: Arc<RwLock<AllowList>>,
    pub address: SocketAddr,
    pub sessions: Sessions,
    pub saw: DestinationSaw,
    pub stop: Cancel,
    pub counters: Arc<limosa_link::accept::ListenerCounters>,
    pub outcomes: Arc<Mutex<Vec<DestinationOutcome>>>,
    /// Cancels the migration that came in last.
    pub cancel: Arc<Mutex<Cancel>>,
    pub seen: Arc<Mutex<Option<watch::Receiver<IncomingProgress>>>>,
}

#[derive(Clone)]
pub struct ToySettings {
    pub listener: ListenerSettings,
    pub populate: Populate,
    pub ready: Duration,
    /// How many migrations may come in at once.
    pub incoming_max: usize,
    /// The device of links that write memory directly.
    pub fabric: Option<Arc<dyn Fabric>>,
    /// Changes the engine's settings.
    pub tune: Arc<dyn Fn(&mut DestinationConfig) + Send + Sync>,
}

impl Default for ToySettings {
    fn default() -> ToySettings {
        let listener = ListenerSettings { plaintext_lanes: true, ..ListenerSettings::default() };
        ToySettings {
            listener,
            populate: Populate::Beside,
            ready: Duration::from_secs(5),
            incoming_max: 2,
            fabric: None,
            tune: Arc::new(|_| {}),
        }
    }
}

struct ToyHosting {
    saw: DestinationSaw,
    settings: ToySettings,
    outcomes: Arc<Mutex<Vec<DestinationOutcome>>>,
    cancel: Arc<Mutex<Cancel>>,
    seen: Arc<Mutex<Option<watch::Receiver<IncomingProgress>>>>,
}

impl Hosting for ToyHosting {
    fn incoming(&self, peer: &Peer, header: &ControlHeader, _: &Hello, _: Option<TicketBytes>) -> Result<Incoming, Refusal> {
        let mut config = DestinationConfig::new(header.migration, header.generation, peer.id, fresh_token().unwrap());
        config.plaintext_allowed = self.settings.listener.plaintext_lanes;
        config.deadlines.ready = self.settings.ready;
        (self.settings.tune)(&mut config);
        let (done, ended) = oneshot::channel();
        let outcomes = self.outcomes.clone();
        tokio::spawn(async move {
            if let Ok(outcome) = ended.await {
                outcomes.lock().unwrap().push(outcome);
            }
        });
        let cancel = Cancel::new();
        *self.cancel.lock().unwrap() = cancel.clone();
        let progress = watch::Sender::new(IncomingProgress {
            state: limosa_proto::state::DestinationState::Listening,
            rounds: 0,
            pages: 0,
            zero_pages: 0,
            bytes_on_wire: 0,
        });
        *self.seen.lock().unwrap() = Some(progress.subscribe());
        Ok(Incoming {
            host: Box::new(ToyDestination(self.saw.clone())),
            config,
            populate: self.settings.populate,
            cancel,
            progress: Some(progress),
            done: Some(done),
        })
    }
    fn check(&self, _: &Peer, vm: &VmDescription, _: Option<TicketBytes>) -> Vec<Reason> {
        assert_eq!(vm.name, "toy");
        self.saw.refuse.lock().unwrap().clone().map_or_else(Vec::new, |refusal| refusal.reasons)
    }
    fn cpu(&self, _: &Peer) -> CpuProfile {
        CpuProfile { tsc_khz: 7, ..CpuProfile::default() }
    }
    fn verdict(&self, _: &Peer, migration: MigrationId, generation: Generation, _: bool) -> VerdictAnswer {
        commit::answer(&self.saw.journal.lock().unwrap(), migration, generation)
    }
}

impl Toy {
    pub async fn start(settings: ToySettings) -> Toy {
        let (key, trusted) = (HostKey::generate().unwrap(), TrustedHosts::default());
        let allow = Arc::new(RwLock::new(AllowList::new(&["127.0.0.0/8"]).unwrap().0));
        let saw = DestinationSaw {
            journal: Journal::default(),
            memory: Arc::default(),
            at_resume: Arc::default(),
            running: Arc::default(),
            loaded: Arc::default(),
            held: Arc::default(),
            discarded: Arc::default(),
            announced: Arc::default(),
            faults: Faults::default(),
            refuse: Arc::default(),
            hold: Arc::default(),
        };
        let (outcomes, cancel, seen): (Arc<Mutex<Vec<_>>>, Arc<Mutex<Cancel>>, Arc<Mutex<_>>) = Default::default();
        let hosting = ToyHosting {
            saw: saw.clone(),
            settings: settings.clone(),
            outcomes: outcomes.clone(),
            cancel: cancel.clone(),
            seen: seen.clone(),
        };
        let listener =
            Listener::bind("127.0.0.1:0".parse().unwrap(), settings.listener, key.clone(), trusted.clone(), allow.clone())
                .unwrap();
        let operators = TrustedHosts::default();
        let listener = listener.with_operators(operators.clone());
        let (address, counters, stop) = (listener.local_address().unwrap(), listener.counters(), Cancel::new());
        let sessions = Sessions::with_fabric(Arc::new(hosting), settings.incoming_max, settings.fabric);
        tokio::spawn(listener.serve(sessions.clone(), stop.clone()));
        Toy { key, trusted, operators, allow, address, sessions, saw, stop, counters, outcomes, cancel, seen }
    }

    /// Waits until no migration is open there, and forgets what the last one left.
    pub async fn settle(&self) {
        tokio::time::timeout(Duration::from_secs(20), self.sessions.idle())
            .await
            .expect("a migration never ended at the destination");
    }
}

impl Drop for Toy {
    fn drop(&mut self) {
        self.stop.cancel("over");
    }
}

pub fn vm(memory: &MemoryMap) -> VmDescription {
    VmDescription {
        id: VmId([7; 16]),
        name: "toy".into(),
        vcpus: 1,
        memory: memory.clone(),
        nics: vec![],
        disks: vec![],
        vmm: "toy".into(),
        records: vec![(1, 1)],
        config: vec![],
        cpu: Default::default(),
    }
}

/// A source host with one guest.
pub struct Sender {
    pub key: HostKey,
    pub guest: Arc<Guest>,
    pub saw: SourceSaw,
    pub lanes: u16,
    pub plaintext: bool,
    pub settings: LaneSettings,
    pub cancel: Cancel,
    pub generation: AtomicU64,
    pub progress: watch::Sender<Progress>,
    /// Changes the engine's settings.
    pub tune: Box<dyn Fn(&mut SourceConfig) + Send + Sync>,
}

impl Sender {
    pub fn new(guest: Arc<Guest>) -> Sender {
        let progress = watch::Sender::new(Progress::new(guest.memory.map.bytes()));
        Sender {
            key: HostKey::generate().unwrap(),
            guest,
            saw: SourceSaw::default(),
            lanes: 2,
            plaintext: false,
            settings: LaneSettings { frame_bytes: 256 << 10, bandwidth_bytes_per_s: 0 },
            cancel: Cancel::new(),
            generation: AtomicU64::new(0),
            progress,
            tune: Box::new(|_| {}),
        }
    }

    /// Sender and destination that trust each other.
    pub fn befriend(&self, toy: &Toy) {
        toy.trusted.insert(self.key.id());
    }

    pub fn link(&self, toy: &Toy) -> Arc<dyn Link> {
        let trusted = TrustedHosts::new([toy.key.id()]);
        Arc::new(TcpLink::new(toy.address.to_string(), toy.key.id(), self.key.clone(), trusted, Duration::from_secs(10)))
    }

    pub async fn migrate(&self, toy: &Toy) -> (SourceOutcome, Report) {
        self.migrate_over(toy, self.link(toy)).await
    }

    pub async fn migrate_over(&self, toy: &Toy, link: Arc<dyn Link>) -> (SourceOutcome, Report) {
        let generation = Generation(self.generation.fetch_add(1, Ordering::SeqCst) + 1);
        let mut config =
            SourceConfig::new(MigrationId(*b"toy-migration-01"), generation, toy.key.id(), vm(&self.guest.memory.map));
        config.lanes = self.lanes;
        config.plaintext_lanes = self.plaintext;
        (self.tune)(&mut config);
        let host = Box::new(ToySource { guest: self.guest.clone(), saw: self.saw.clone() });
        let run = run_source_over(link, config, self.settings, false, host, self.cancel.clone(), self.progress.clone());
        tokio::time::timeout(Duration::from_secs(60), run).await.expect("a migration never ended at the source")
    }
}

/// A migration that was good: committed, memory equal, the guest at the destination and nowhere else.
pub fn assert_moved(sender: &Sender, toy: &Toy, outcome: &SourceOutcome) {
    assert_eq!(*outcome, SourceOutcome::Committed);
    assert!(!sender.guest.is_running() && toy.saw.running.load(Ordering::SeqCst));
    assert!(sender.saw.released.load(Ordering::SeqCst));
    let saved = sender.saw.at_save.lock().unwrap().clone().unwrap();
    let resumed = toy.saw.at_resume.lock().unwrap().clone().unwrap();
    assert_eq!(saved.len(), resumed.len());
    let pages = || saved.chunks(PAGE_BYTES as usize).zip(resumed.chunks(PAGE_BYTES as usize)).enumerate();
    let wrong: Vec<usize> = pages().filter(|(_, (ours, theirs))| ours != theirs).map(|(page, _)| page).take(20).collect();
    assert!(wrong.is_empty(), "pages differ, the first are {wrong:?}");
}

/// A migration that did not happen: the guest runs here and nowhere else.
pub fn assert_stayed(sender: &Sender, toy: &Toy, outcome: &SourceOutcome) {
    assert!(!matches!(outcome, SourceOutcome::Committed | SourceOutcome::InDoubt { .. }), "{outcome:?}");
    assert!(sender.guest.is_running() && !toy.saw.running.load(Ordering::SeqCst), "{outcome:?}");
    assert!(!sender.saw.released.load(Ordering::SeqCst));
}
