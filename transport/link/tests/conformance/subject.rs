//! What the suite must know of a kind of link to test it, and a trial: one destination, one source, one guest. A new kind of link
//! is a file that implements [`Subject`] and one line in `main.rs`. Nothing here knows a kind of link.

use crate::toy::{Call, Fault, Guest, Sender, Toy, ToyMemory, ToySettings, assert_moved, assert_stayed};
use limosa_link::{Cancel, Link};
use limosa_proto::event::SourceOutcome;
use limosa_proto::report::Report;
use std::future::Future;
use std::sync::Arc;
use std::time::Duration;

/// A stream of a link: control, or the lane that was opened as the n-th from zero.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Stream {
    Control,
    Lane(usize),
}

/// Where bytes go.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Direction {
    ToDestination,
    ToSource,
}

/// Why a check means nothing for a kind of link.
#[derive(Debug, Clone, Copy)]
pub struct NotApplicable(pub &'static str);

/// A way to a destination on which harm can be done.
pub trait Wire: Send + Sync + 'static {
    /// A link that takes this way.
    fn link(&self) -> Arc<dyn Link>;

    /// Ends everything that is under way, and lets nothing new in. Blocks until it is so; may be called from any thread.
    fn cut(&self);

    /// Everything falls silent and nothing is closed, for what is under way and for what is new.
    fn freeze(&self);

    /// What is new passes again; what was under way is lost.
    fn mend(&self);

    /// Cuts `stream` as soon as so many bytes went `direction`. A link whose streams cannot be told apart takes `Control` for all
    /// of them and says so for lanes; a link that moves pages by itself cuts what goes beside them.
    ///
    /// # Errors
    /// Why it cannot be done.
    fn cut_after(&self, stream: Stream, direction: Direction, bytes: u64) -> Result<(), NotApplicable>;

    /// How many bytes of `stream` went `direction` so far.
    fn carried(&self, stream: Stream, direction: Direction) -> u64;

    /// Records from now on.
    ///
    /// # Errors
    /// Why it cannot be done.
    fn record(&self) -> Result<(), NotApplicable>;

    /// What was recorded: on the control channel, on the lanes. Everything in the first where they cannot be told apart.
    fn recorded(&self) -> (Vec<u8>, Vec<u8>);
}

/// A kind of link under test. What it claims here is checked.
pub trait Subject: Send + Sync + Sized + 'static {
    /// What it calls itself in reports.
    const NAME: &'static str;
    /// Whether pages are encrypted on their way.
    const ENCRYPTED: bool;
    /// Whether the control channel is.
    const CONTROL_ENCRYPTED: bool;
    /// Whether a lane's peer is known beyond the token that it shows.
    const LANES_KNOW_PEER: bool;
    /// Whether pages are written into the destination's memory by keys.
    const DIRECT: bool = false;
    /// By how much slower than this machine the machines are on which it can be tested.
    const SLOWNESS: u32 = 1;
    /// Bytes that may be under way on one lane at most while the destination's thread takes none; or why that cannot be.
    const UNDER_WAY_MAX: Result<u64, NotApplicable>;

    /// Why it cannot be tested on this machine, if so.
    fn missing() -> Option<String> {
        None
    }

    /// Opens a destination of its own with these settings; its peers are lost after `settings.listener.peer_silence_max`.
    fn start(settings: ToySettings) -> impl Future<Output = Self> + Send;

    /// The destination.
    fn toy(&self) -> &Toy;

    /// A link from `sender`'s host to the destination.
    fn link(&self, sender: &Sender) -> Arc<dyn Link>;

    /// The same over a way on which harm can be done.
    fn wire(&self, sender: &Sender) -> impl Future<Output = Arc<dyn Wire>> + Send;

    /// Asserts that nothing is left behind at either side once no migration is open: no key, no registration, no device's handle.
    fn assert_clean(&self) {}
}

/// Pages of the guest that most checks move: regions of several sizes, some of which end within a word of the bitmap.
pub const REGIONS: [u64; 4] = [64, 333, 1, 130];

/// Memory of those regions, two thirds of it filled.
pub fn memory() -> Arc<ToyMemory> {
    let memory = ToyMemory::regions(&REGIONS);
    memory.fill(|page| page % 3 != 0);
    memory
}

/// What a trial is like.
pub struct Plan {
    pub memory: Arc<ToyMemory>,
    /// Between two writes of the guest.
    pub pause_between: Duration,
    pub settings: ToySettings,
    /// Silence is noticed soon, doubt is settled soon.
    pub hasty: bool,
}

impl Default for Plan {
    fn default() -> Plan {
        Plan { memory: memory(), pause_between: Duration::from_millis(1), settings: ToySettings::default(), hasty: false }
    }
}

/// Silence that a hasty trial bears; there are eight keepalives in it.
pub fn silence<S: Subject>() -> Duration {
    Duration::from_secs(2) * S::SLOWNESS
}

/// One destination of a kind of link, one source, one guest.
pub struct Trial<S: Subject> {
    pub subject: S,
    pub sender: Sender,
}

impl<S: Subject> Trial<S> {
    pub async fn new(plan: Plan) -> Trial<S> {
        let Plan { memory, pause_between, mut settings, hasty } = plan;
        if hasty {
            settings.listener.peer_silence_max = silence::<S>();
            settings.tune = Arc::new(|config| (config.keepalive, config.peer_silence_max) = (silence::<S>() / 8, silence::<S>()));
        }
        let subject = S::start(settings).await;
        let mut sender = Sender::new(Guest::start(memory, pause_between * S::SLOWNESS));
        sender.plaintext = !S::ENCRYPTED;
        sender.settings.frame_bytes = 64 << 10;
        sender.tune = Box::new(move |config| {
            config.deadlines.retry = Duration::from_millis(100);
            // No check is about speed: many trials share two cores.
            config.policy.downtime_max = Duration::from_secs(10);
            if hasty {
                (config.keepalive, config.peer_silence_max) = (silence::<S>() / 8, silence::<S>());
            }
        });
        sender.befriend(subject.toy());
        Trial { subject, sender }
    }

    /// A trial of a plan of which only haste is special.
    pub async fn hasty() -> Trial<S> {
        Trial::new(Plan { hasty: true, ..Plan::default() }).await
    }

    pub fn toy(&self) -> &Toy {
        self.subject.toy()
    }

    pub fn link(&self) -> Arc<dyn Link> {
        self.subject.link(&self.sender)
    }

    pub async fn wire(&self) -> Arc<dyn Wire> {
        self.subject.wire(&self.sender).await
    }

    /// Lets the destination take as long for loading as any VMM does. A toy is so quick that the guest may run there before the
    /// source's lanes have had a core to say that they are done, and then the report does not have the last round.
    pub fn load_like_a_vmm(&self) {
        let load = || std::thread::sleep(Duration::from_millis(100));
        self.toy().saw.faults.add(Call::Load, Fault::Then(Arc::new(load)));
    }

    /// Moves the guest.
    pub async fn migrate(&self) -> (SourceOutcome, Report) {
        self.migrate_over(self.link()).await
    }

    pub async fn migrate_over(&self, link: Arc<dyn Link>) -> (SourceOutcome, Report) {
        self.sender.migrate_over(self.toy(), link).await
    }

    pub fn assert_moved(&self, outcome: &SourceOutcome) {
        assert_moved(&self.sender, self.toy(), outcome);
    }

    pub fn assert_stayed(&self, outcome: &SourceOutcome) {
        assert_stayed(&self.sender, self.toy(), outcome);
    }

    /// Waits until nobody touches the guest's memory at either side, and looks at what is left.
    pub async fn settle(&self) {
        self.toy().settle().await;
        // The guest's and its own thread's; the toy's.
        let here = || Arc::strong_count(&self.sender.guest.memory) == 2;
        let there = || self.toy().saw.memory.lock().unwrap().as_ref().is_none_or(|memory| Arc::strong_count(memory) == 1);
        for _ in 0..1000 {
            if here() && there() {
                return self.subject.assert_clean();
            }
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        panic!("a thread still has the guest's memory: source done: {}, destination done: {}", here(), there());
    }

    /// Whatever went before: the next migration succeeds.
    pub async fn next_is_good(&mut self) -> Report {
        self.settle().await;
        self.sender.saw.faults.0.lock().unwrap().clear();
        self.toy().saw.faults.0.lock().unwrap().clear();
        self.toy().saw.hold.set(false);
        self.sender.cancel = Cancel::new();
        self.sender.settings.bandwidth_bytes_per_s = 0;
        let (outcome, report) = self.migrate().await;
        self.assert_moved(&outcome);
        self.settle().await;
        report
    }
}

/// Says that a check means nothing for this kind of link, and why.
#[allow(clippy::print_stdout)]
pub fn not_applicable<S: Subject>(check: &str, NotApplicable(reason): NotApplicable) {
    println!("not applicable: {check} over {}: {reason}", S::NAME);
}
