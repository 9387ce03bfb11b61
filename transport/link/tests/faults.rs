//! Sides that die, stall, fail and cancel, at each phase: the guest runs on exactly one host, both sides end, and the next
//! migration works.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod toy;

use limosa_link::sessions::Sessions;
use limosa_link::{Answer, Capabilities, ConnectError, Control, LaneCloser, LaneSender, Link, Pages};
use limosa_proto::commit::JournalRecordKind as Kind;
use limosa_proto::event::{Side, SourceOutcome};
use limosa_proto::memory::PageRange;
use limosa_proto::state::SourceState;
use limosa_proto::wire::code::Code;
use limosa_proto::wire::frame::LanePreamble;
use std::io;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpListener, TcpStream};
use toy::{Call, Fault, Guest, Sender, Toy, ToyMemory, ToySettings, assert_moved, assert_stayed, kinds};

fn sender() -> Sender {
    let memory = ToyMemory::new(512);
    memory.fill(|page| page % 3 == 0);
    let mut sender = Sender::new(Guest::start(memory, Duration::from_millis(1)));
    sender.tune = Box::new(|config| {
        config.deadlines.retry = Duration::from_millis(100);
        config.deadlines.host = Duration::from_secs(2);
    });
    sender
}

/// A wire that can be cut: every connection to `through` is carried to `to` until it is.
struct Wire {
    address: std::net::SocketAddr,
    cut: Arc<AtomicBool>,
    tasks: Arc<Mutex<Vec<tokio::task::AbortHandle>>>,
}

impl Wire {
    async fn to(toy: &Toy) -> Wire {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let (address, to) = (listener.local_addr().unwrap(), toy.address);
        let cut = Arc::new(AtomicBool::new(false));
        let tasks: Arc<Mutex<Vec<tokio::task::AbortHandle>>> = Arc::default();
        let (is_cut, carrying) = (cut.clone(), tasks.clone());
        tokio::spawn(async move {
            while let Ok((mut near, _)) = listener.accept().await {
                if is_cut.load(Ordering::SeqCst) {
                    continue;
                }
                let carry = tokio::spawn(async move {
                    let Ok(mut far) = TcpStream::connect(to).await else { return };
                    let _ = tokio::io::copy_bidirectional_with_sizes(&mut near, &mut far, 65536, 65536).await;
                    let _ = (near.shutdown().await, far.shutdown().await);
                    let _ = near.read(&mut [0; 1]).await;
                });
                carrying.lock().unwrap().push(carry.abort_handle());
            }
        });
        Wire { address, cut, tasks }
    }
    fn cutter(&self) -> impl Fn() + Send + Sync + 'static {
        let (cut, tasks) = (self.cut.clone(), self.tasks.clone());
        move || {
            cut.store(true, Ordering::SeqCst);
            tasks.lock().unwrap().drain(..).for_each(|task| task.abort());
            // The connections are closed when the runtime drops the tasks.
            std::thread::sleep(Duration::from_millis(50));
        }
    }
    fn mend(&self) {
        self.cut.store(false, Ordering::SeqCst);
    }
    fn link(&self, sender: &Sender, toy: &Toy) -> Arc<dyn Link> {
        let trusted = limosa_link::TrustedHosts::new([toy.key.id()]);
        Arc::new(limosa_link::TcpLink::new(
            self.address.to_string(),
            toy.key.id(),
            sender.key.clone(),
            trusted,
            Duration::from_secs(10),
        ))
    }
}

async fn next_is_good(sender: &mut Sender, toy: &Toy) {
    toy.settle().await;
    sender.saw.faults.0.lock().unwrap().clear();
    toy.saw.faults.0.lock().unwrap().clear();
    sender.cancel = limosa_link::Cancel::new();
    sender.settings.bandwidth_bytes_per_s = 0;
    let (outcome, _) = sender.migrate(toy).await;
    assert_moved(sender, toy, &outcome);
    toy.settle().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_source_host_that_fails_at_each_call() {
    for call in [Call::Track, Call::Fetch, Call::Pause, Call::Save, Call::Journal(Kind::Started)] {
        for fault in [Fault::Fail, Fault::Panic] {
            let toy = Toy::start(ToySettings::default()).await;
            let mut sender = sender();
            sender.befriend(&toy);
            sender.saw.faults.add(call, fault);
            let (outcome, _) = sender.migrate(&toy).await;
            assert_stayed(&sender, &toy, &outcome);
            match outcome {
                SourceOutcome::Aborted { by: Side::Source, guest_runs: true, words, .. } => {
                    assert!(words.contains("told to fail") || words.contains("panicked"), "{words}")
                }
                other => panic!("{call:?}: {other:?}"),
            }
            next_is_good(&mut sender, &toy).await;
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_destination_host_that_fails_at_each_call() {
    for call in [Call::Prepare, Call::Load, Call::Journal(Kind::Ready)] {
        for fault in [Fault::Fail, Fault::Panic] {
            let toy = Toy::start(ToySettings::default()).await;
            let mut sender = sender();
            sender.befriend(&toy);
            toy.saw.faults.add(call, fault);
            let (outcome, _) = sender.migrate(&toy).await;
            assert_stayed(&sender, &toy, &outcome);
            match outcome {
                SourceOutcome::Aborted { by: Side::Destination, words, .. } => {
                    assert!(words.contains("told to fail") || words.contains("panicked"), "{words}");
                }
                other => panic!("{call:?}: {other:?}"),
            }
            toy.settle().await;
            assert_eq!(toy.saw.discarded.load(Ordering::SeqCst), 1, "{call:?}");
            next_is_good(&mut sender, &toy).await;
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_wire_that_is_cut_at_each_phase() {
    let at_source = [Call::Journal(Kind::Started), Call::Track, Call::Fetch, Call::Pause, Call::Save];
    let at_destination = [Call::Prepare, Call::Load, Call::Journal(Kind::Ready)];
    for (call, here) in at_source.iter().map(|call| (*call, true)).chain(at_destination.iter().map(|call| (*call, false))) {
        let toy = Toy::start(ToySettings { ready: Duration::from_millis(300), ..ToySettings::default() }).await;
        let mut sender = sender();
        sender.befriend(&toy);
        let wire = Wire::to(&toy).await;
        let faults = if here { &sender.saw.faults } else { &toy.saw.faults };
        faults.add(call, Fault::Then(Arc::new(wire.cutter())));
        let (outcome, _) = sender.migrate_over(&toy, wire.link(&sender, &toy)).await;
        assert_stayed(&sender, &toy, &outcome);
        match &outcome {
            SourceOutcome::Aborted { code, guest_runs: true, .. } => assert_eq!(*code, Code::LinkLost, "{call:?}: {outcome:?}"),
            other => panic!("{call:?}: {other:?}"),
        }
        next_is_good(&mut sender, &toy).await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn cut_at_commit_and_the_destination_waits() {
    // Cut while `released` is written: Commit never arrives, the source asks, and asking is as good as Commit.
    let toy = Toy::start(ToySettings::default()).await;
    let sender = sender();
    sender.befriend(&toy);
    let wire = Arc::new(Wire::to(&toy).await);
    sender.saw.faults.add(Call::Journal(Kind::Released), Fault::Then(Arc::new(wire.cutter())));
    let mending = {
        let (wire, progress) = (wire.clone(), sender.progress.subscribe());
        tokio::spawn(async move {
            let mut progress = progress;
            progress.wait_for(|progress| progress.state == SourceState::InDoubt && progress.doubt.is_some()).await.unwrap();
            tokio::time::sleep(Duration::from_millis(300)).await;
            wire.mend();
        })
    };
    let (outcome, report) = sender.migrate_over(&toy, wire.link(&sender, &toy)).await;
    mending.await.unwrap();
    assert_moved(&sender, &toy, &outcome);
    assert!(report.ok);
    toy.settle().await;
    assert_eq!(kinds(&sender.saw.journal), [Kind::Started, Kind::Released, Kind::Running]);
    assert_eq!(kinds(&toy.saw.journal), [Kind::Ready, Kind::Running]);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn cut_at_commit_and_the_destination_gives_up() {
    let toy = Toy::start(ToySettings { ready: Duration::from_millis(200), ..ToySettings::default() }).await;
    let mut sender = sender();
    sender.befriend(&toy);
    let wire = Arc::new(Wire::to(&toy).await);
    sender.saw.faults.add(Call::Journal(Kind::Released), Fault::Then(Arc::new(wire.cutter())));
    let mending = {
        let (wire, sessions) = (wire.clone(), toy.sessions.clone());
        let mut progress = sender.progress.subscribe();
        tokio::spawn(async move {
            progress.wait_for(|progress| progress.state == SourceState::InDoubt).await.unwrap();
            sessions.idle().await;
            wire.mend();
        })
    };
    let (outcome, _) = sender.migrate_over(&toy, wire.link(&sender, &toy)).await;
    mending.await.unwrap();
    assert_stayed(&sender, &toy, &outcome);
    assert_eq!(kinds(&toy.saw.journal), [Kind::Ready, Kind::Discarded]);
    assert_eq!(kinds(&sender.saw.journal), [Kind::Started, Kind::Released, Kind::Aborted]);
    next_is_good(&mut sender, &toy).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn cut_when_the_guest_runs_there() {
    // Cut before Running is said: the destination has resumed, the source asks and is told.
    let toy = Toy::start(ToySettings::default()).await;
    let sender = sender();
    sender.befriend(&toy);
    let wire = Arc::new(Wire::to(&toy).await);
    let cut = wire.cutter();
    let again = wire.clone();
    toy.saw.faults.add(
        Call::Resume,
        Fault::Then(Arc::new(move || {
            cut();
            again.mend();
        })),
    );
    let (outcome, _) = sender.migrate_over(&toy, wire.link(&sender, &toy)).await;
    assert_moved(&sender, &toy, &outcome);
    toy.settle().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_cancel_is_answered_in_each_phase() {
    for call in [Call::Track, Call::Fetch, Call::Pause, Call::Save] {
        let toy = Toy::start(ToySettings::default()).await;
        let mut sender = sender();
        sender.befriend(&toy);
        let cancel = sender.cancel.clone();
        sender.saw.faults.add(
            call,
            Fault::Then(Arc::new(move || {
                cancel.cancel("an operator changed his mind");
                std::thread::sleep(Duration::from_millis(50));
            })),
        );
        let (outcome, _) = sender.migrate(&toy).await;
        assert_stayed(&sender, &toy, &outcome);
        assert!(
            matches!(&outcome, SourceOutcome::Aborted { code: Code::Cancelled, words, by: Side::Source, .. } if words.contains("changed his mind")),
            "{outcome:?}"
        );
        next_is_good(&mut sender, &toy).await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_cancel_from_the_destination_arrives_in_words() {
    let toy = Toy::start(ToySettings::default()).await;
    let mut sender = sender();
    sender.befriend(&toy);
    sender.settings.bandwidth_bytes_per_s = 200_000;
    let cancelling = async {
        while toy.seen.lock().unwrap().as_ref().is_none_or(|seen| seen.borrow().bytes_on_wire == 0) {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        toy.cancel.lock().unwrap().cancel("maintenance at the destination");
    };
    let ((outcome, _), ()) = tokio::join!(sender.migrate(&toy), cancelling);
    assert_stayed(&sender, &toy, &outcome);
    assert!(
        matches!(&outcome, SourceOutcome::Aborted { words, by: Side::Destination, .. } if words.contains("maintenance")),
        "{outcome:?}"
    );
    next_is_good(&mut sender, &toy).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_host_that_hangs_does_not_hang_the_migration() {
    let toy = Toy::start(ToySettings::default()).await;
    let sender = sender();
    sender.befriend(&toy);
    sender.saw.faults.add(Call::Fetch, Fault::Then(Arc::new(|| std::thread::sleep(Duration::from_secs(4)))));
    let begun = std::time::Instant::now();
    let (outcome, _) = sender.migrate(&toy).await;
    assert_stayed(&sender, &toy, &outcome);
    assert!(begun.elapsed() < Duration::from_secs(12), "{:?}", begun.elapsed());
    toy.settle().await;
}

/// A lane that does something wrong after a while.
struct BadLane {
    lane: Box<dyn LaneSender>,
    heads: u64,
    wrong: Wrong,
}

#[derive(Clone, Copy, Debug)]
enum Wrong {
    /// One bit of a header is another.
    Bit(usize),
    /// A header of random bytes.
    Garbage,
    /// It ends without End.
    Close,
}

impl BadLane {
    fn head_of(&mut self, head: &[u8]) -> io::Result<Vec<u8>> {
        self.heads += 1;
        let mut head = head.to_vec();
        if self.heads == 3 {
            match self.wrong {
                Wrong::Bit(bit) => head[bit / 8 % 48] ^= 1 << (bit % 8),
                Wrong::Garbage => head.fill(0xa5),
                Wrong::Close => {
                    self.lane.closer()?.close();
                    return Err(io::ErrorKind::BrokenPipe.into());
                }
            }
        }
        Ok(head)
    }
}

impl LaneSender for BadLane {
    fn head(&mut self, head: &[u8]) -> io::Result<()> {
        let head = self.head_of(head)?;
        self.lane.head(&head)
    }
    fn pages(&mut self, head: &[u8], pages: &dyn Pages, runs: &[PageRange]) -> io::Result<()> {
        let head = self.head_of(head)?;
        self.lane.pages(&head, pages, runs)
    }
    fn flush(&mut self) -> io::Result<()> {
        self.lane.flush()
    }
    fn finish(&mut self) -> io::Result<()> {
        self.lane.finish()
    }
    fn closer(&self) -> io::Result<LaneCloser> {
        self.lane.closer()
    }
    fn bytes_on_wire(&self) -> u64 {
        self.lane.bytes_on_wire()
    }
}

struct BadLink {
    link: Arc<dyn Link>,
    wrong: Wrong,
    lanes: AtomicU64,
}

impl Link for BadLink {
    fn capabilities(&self) -> Capabilities {
        self.link.capabilities()
    }
    fn destination(&self) -> String {
        self.link.destination()
    }
    fn control(&self) -> Answer<'_, Result<Control, ConnectError>> {
        self.link.control()
    }
    fn lane(&self, preamble: LanePreamble, plaintext: bool) -> Answer<'_, Result<Box<dyn LaneSender>, ConnectError>> {
        Box::pin(async move {
            let lane = self.link.lane(preamble, plaintext).await?;
            let bad = self.lanes.fetch_add(1, Ordering::SeqCst) == 0;
            Ok(if bad { Box::new(BadLane { lane, heads: 0, wrong: self.wrong }) } else { lane })
        })
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_lane_that_speaks_nonsense() {
    // Bits of the magic, kind, flags, runs, round, bytes, migration, generation, reserved.
    let bits = [3, 33, 41, 55, 64, 130, 170, 350, 376].map(Wrong::Bit);
    for (number, wrong) in bits.into_iter().chain([Wrong::Garbage, Wrong::Close]).enumerate() {
        let toy = Toy::start(ToySettings::default()).await;
        let mut sender = sender();
        sender.plaintext = number % 2 == 0;
        sender.lanes = 1 + number as u16 % 2;
        sender.settings.frame_bytes = 16 << 10;
        sender.befriend(&toy);
        let link = BadLink { link: sender.link(&toy), wrong, lanes: AtomicU64::new(0) };
        let (outcome, _) = sender.migrate_over(&toy, Arc::new(link)).await;
        assert_stayed(&sender, &toy, &outcome);
        assert!(matches!(outcome, SourceOutcome::Aborted { guest_runs: true, .. }), "{wrong:?}: {outcome:?}");
        next_is_good(&mut sender, &toy).await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_source_that_vanishes_leaves_nothing_there() {
    let toy = Toy::start(ToySettings::default()).await;
    let mut sender = sender();
    sender.settings.bandwidth_bytes_per_s = 300_000;
    sender.befriend(&toy);
    let sessions: Sessions = toy.sessions.clone();
    let toy = Arc::new(toy);
    let running = {
        let (toy, link) = (toy.clone(), sender.link(&toy));
        let sender = Arc::new(sender);
        (sender.clone(), tokio::spawn(async move { sender.migrate_over(&toy, link).await.0 }))
    };
    while toy.seen.lock().unwrap().as_ref().is_none_or(|seen| seen.borrow().pages == 0) {
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    assert_eq!(sessions.open(), 1);
    running.1.abort();
    let _ = running.1.await;
    toy.settle().await;
    assert_eq!((toy.saw.discarded.load(Ordering::SeqCst), sessions.open()), (1, 0));
    assert!(running.0.guest.is_running());
    let mut sender = Arc::try_unwrap(running.0).ok().unwrap();
    next_is_good(&mut sender, &toy).await;
}
