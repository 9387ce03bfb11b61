//! The source's driver: `select` waits for whatever comes first, `apply` carries out what the engine decided. It decides nothing
//! itself, but for one thing: a lane that breaks waits a moment, since the peer's reason may be on the control channel.

use crate::control::ControlError;
use crate::direct::{LaneMemory, RemoteKeys};
use crate::driver::{Cancel, ask_verdict, counted, now, until};
use crate::failpoints::{self, Point};
use crate::host::SourceHost;
use crate::hosted::{Called, Hosted};
use crate::lanes::{LaneCounters, LaneEvent, LaneSender, RoundCounts};
use crate::pages::Pages;
use crate::sending::{SendLanes, Tag};
use crate::{ConnectError, Control, LaneSettings, Link};
use limosa_proto::error::Coded as _;
use limosa_proto::event::{HostTask, RoundSent, Side, SourceAction, SourceConfig, SourceEvent, SourceOutcome};
use limosa_proto::progress::Progress;
use limosa_proto::report::{Measured, Report};
use limosa_proto::source::Source;
use limosa_proto::state::SourceState;
use limosa_proto::wire::code::Code;
use limosa_proto::wire::frame::{ControlHeader, LanePreamble, LaneToken};
use limosa_proto::wire::message::{Message, Refusal};
use limosa_proto::wire::offer::KeysAsk;
use limosa_proto::wire::version::VERSION_FIRST;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;
use tokio::sync::{mpsc, oneshot, watch};
use tokio::task::{AbortHandle, JoinHandle};
use tokio::time::Instant as Moment;

/// How long the reason for a broken lane may take to arrive on the control channel.
pub(crate) const LANE_GRACE: Duration = Duration::from_millis(250);
/// How long the host may take to say whether a person has decided.
const DECIDED_MAX: Duration = Duration::from_secs(1);
/// How often progress of the lanes is told.
pub(crate) const TICK: Duration = Duration::from_millis(100);
/// How long a host may take to end what it was asked before the migration ends without it.
pub(crate) const HOST_END_MAX: Duration = Duration::from_secs(10);

/// What the driver waits for beside messages and lanes.
enum Inner {
    Event(SourceEvent),
    Opened(Result<Vec<Box<dyn LaneSender>>, ConnectError>),
}

struct Driver {
    engine: Source,
    tag: Tag,
    version: u16,
    link: Arc<dyn Link>,
    settings: LaneSettings,
    host: Hosted<Box<dyn SourceHost>>,
    pages: Arc<dyn Pages>,
    control: Option<Control>,
    /// Whether Hello was sent: what comes before it waits until it can be an answer.
    said: bool,
    /// Whether the destination ever said anything.
    heard: bool,
    lanes: Option<SendLanes>,
    /// Lanes that are ending, on threads of their own.
    ending: Vec<JoinHandle<()>>,
    opening: Option<AbortHandle>,
    /// The question of a source in doubt.
    asking: Option<AbortHandle>,
    keys: Arc<RemoteKeys>,
    /// Whether pages are checked, where the link can do so.
    page_check: Option<bool>,
    counters: Arc<LaneCounters>,
    /// The counters when the round began.
    base: RoundCounts,
    /// Whether a round is under way.
    moving: bool,
    cpu_ns: Arc<AtomicU64>,
    inner: mpsc::UnboundedSender<Inner>,
    lane_events: mpsc::UnboundedSender<LaneEvent>,
    /// A lane's failure and when to tell it.
    held: Option<(Moment, String)>,
}

impl Drop for Driver {
    /// Whoever drops a migration in its middle waits for the lanes' threads, and those may wait for a key that never comes.
    fn drop(&mut self) {
        self.keys.close();
    }
}

/// A migration that ended before it began.
fn nothing(config: &SourceConfig, link: &dyn Link, outcome: SourceOutcome) -> (SourceOutcome, Report) {
    let measured = Measured {
        link: link.capabilities().name.to_owned(),
        page_check: None,
        source_cpu_seconds: 0.0,
        verified: None,
        network_gap_ms: None,
    };
    let report = Report::new(&Progress::new(config.vm.memory.bytes()), &outcome, measured);
    (outcome, report)
}

/// The control channel with which a migration begins, unless it is cancelled before that is there.
async fn first_channel(link: &dyn Link, cancel: &Cancel) -> Result<Control, SourceOutcome> {
    tokio::select! {
        biased;
        words = cancel.cancelled() => {
            Err(SourceOutcome::Aborted { code: Code::Cancelled, words, by: Side::Source, guest_runs: true })
        }
        connected = link.control() => {
            connected.map_err(|error| SourceOutcome::Refused(Refusal::one(error.code(), error.to_string())))
        }
    }
}

pub(crate) async fn run(
    link: Arc<dyn Link>,
    mut config: SourceConfig,
    settings: LaneSettings,
    in_doubt: bool,
    host: Box<dyn SourceHost>,
    cancel: Cancel,
    progress: watch::Sender<Progress>,
) -> (SourceOutcome, Report) {
    let capabilities = link.capabilities();
    capabilities.name.clone_into(&mut config.link);
    config.page_check &= capabilities.page_check;
    // A link that always encrypts does so whatever is asked; the report must not say otherwise.
    config.plaintext_lanes &= capabilities.plaintext_lanes;
    let tag = Tag { migration: config.migration, generation: config.generation };
    let control = if in_doubt {
        None
    } else {
        match first_channel(&*link, &cancel).await {
            Ok(control) => Some(control),
            Err(outcome) => return nothing(&config, &*link, outcome),
        }
    };
    let internal =
        |words: String| SourceOutcome::Aborted { code: Code::Internal, words, by: Side::Source, guest_runs: !in_doubt };
    let made = if in_doubt { Source::in_doubt(now(), config.clone()) } else { Source::new(now(), config.clone()) };
    let engine = match made {
        Ok(engine) => engine,
        Err(error) => return nothing(&config, &*link, internal(error.to_string())),
    };
    let pages = host.pages();
    let cpu_ns = Arc::new(AtomicU64::new(0));
    let host = match Hosted::start("source-host", host, cpu_ns.clone()) {
        Ok(host) => host,
        Err(error) => return nothing(&config, &*link, internal(format!("no thread for the host: {error}"))),
    };
    let (keys, asks) = RemoteKeys::new(&*pages);
    let (inner, inners) = mpsc::unbounded_channel();
    let (lane_events, lanes) = mpsc::unbounded_channel();
    let driver = Driver {
        engine,
        tag,
        version: VERSION_FIRST,
        link,
        settings,
        host,
        pages,
        control,
        said: false,
        heard: false,
        lanes: None,
        ending: Vec::new(),
        opening: None,
        asking: None,
        keys: Arc::new(keys),
        page_check: None,
        counters: Arc::default(),
        base: RoundCounts { round: 0, pages: 0, zero_pages: 0, bytes_on_wire: 0 },
        moving: false,
        cpu_ns,
        inner,
        lane_events,
        held: None,
    };
    driver.drive(inners, lanes, asks, cancel, progress).await
}

impl Driver {
    async fn drive(
        mut self,
        mut inners: mpsc::UnboundedReceiver<Inner>,
        mut lanes: mpsc::UnboundedReceiver<LaneEvent>,
        mut asks: mpsc::UnboundedReceiver<Vec<u32>>,
        cancel: Cancel,
        progress: watch::Sender<Progress>,
    ) -> (SourceOutcome, Report) {
        let cpu_ns = self.cpu_ns.clone();
        let mut cancelled = false;
        loop {
            if let Some(outcome) = counted(&cpu_ns, || self.apply_all()) {
                progress.send_replace(self.engine.progress().clone());
                return self.end(outcome, &progress).await;
            }
            progress.send_replace(self.engine.progress().clone());
            let timer = self.engine.timeout();
            let held = self.held.as_ref().map(|(at, _)| *at);
            tokio::select! {
                biased;
                Some(inner) = inners.recv() => counted(&cpu_ns, || self.inner(inner)),
                Some(event) = lanes.recv() => self.lane(event),
                Some(chunks) = asks.recv() => self.send(&Message::KeysAsk(KeysAsk { chunks })),
                received = receive(&mut self.control), if self.said => counted(&cpu_ns, || self.message(received)),
                words = cancel.cancelled(), if !cancelled => {
                    cancelled = true;
                    self.feed(SourceEvent::Cancel(words));
                }
                () = tokio::time::sleep_until(held.unwrap_or_else(Moment::now)), if held.is_some() => {
                    if let Some((_, words)) = self.held.take() {
                        self.feed(SourceEvent::HostFailed { task: HostTask::Pages, words });
                    }
                }
                () = tokio::time::sleep(timer.map_or(Duration::ZERO, until)), if timer.is_some() => self.feed(SourceEvent::Timer),
                () = tokio::time::sleep(TICK), if self.moving => self.tick(),
            }
        }
    }

    fn feed(&mut self, event: SourceEvent) {
        self.engine.handle(now(), event);
    }

    fn inner(&mut self, inner: Inner) {
        match inner {
            Inner::Event(event) => self.feed(event),
            Inner::Opened(opened) => {
                self.opening = None;
                let started = opened.map_err(|error| error.to_string()).and_then(|lanes| {
                    let (pages, events) = (self.pages.clone(), self.lane_events.clone());
                    SendLanes::start(lanes, pages, self.tag, &self.settings, self.counters.clone(), events)
                        .map_err(|error| error.to_string())
                });
                match started {
                    Ok(lanes) => {
                        failpoints::pass(Some(Point::SourceLanesOpen));
                        self.lanes = Some(lanes);
                        self.feed(SourceEvent::LanesOpen);
                    }
                    Err(words) => self.feed(SourceEvent::HostFailed { task: HostTask::Lanes, words }),
                }
            }
        }
    }

    fn lane(&mut self, event: LaneEvent) {
        match event {
            LaneEvent::Round(RoundCounts { round, pages, zero_pages, bytes_on_wire }) => {
                self.moving = false;
                failpoints::pass(Some(Point::SourceRoundSent));
                self.feed(SourceEvent::PagesSent(RoundSent { round, pages, zero_pages, bytes_on_wire }));
            }
            // With everything sent, only the control channel counts.
            LaneEvent::Failed { words, .. } if self.engine.state() < SourceState::Finalizing && self.held.is_none() => {
                self.held = Some((Moment::now() + LANE_GRACE, words));
            }
            LaneEvent::Failed { lane, words } => tracing::debug!(lane, words, "a lane ended"),
            // Only destinations open memory.
            LaneEvent::Opened(_) => {}
        }
    }

    fn message(&mut self, received: Result<(ControlHeader, Message), ControlError>) {
        match received {
            Ok((header, message)) => match header.expect(self.tag.migration, self.tag.generation) {
                Ok(()) => {
                    self.heard = true;
                    failpoints::pass(failpoints::source_hears(&message));
                    match &message {
                        Message::Accept(accept) => self.version = accept.version,
                        Message::Keys(given) => {
                            if let Err(words) = self.keys.insert(&given.keys) {
                                return self.lost(Some((Code::Violation, words)));
                            }
                        }
                        _ => {}
                    }
                    self.feed(SourceEvent::Message(message));
                }
                Err(error) => self.lost(Some((error.code(), error.to_string()))),
            },
            Err(ControlError::KeyRefused) if !self.heard => {
                self.control = None;
                let words = format!(
                    "destination {} does not trust our key: `limosa host trust` it there (`limosa host id` shows it here)",
                    self.link.destination()
                );
                self.feed(SourceEvent::Message(Message::Refuse(Refusal::one(Code::UnknownHost, words))));
            }
            Err(ControlError::Wire(error)) => self.lost(Some((error.code(), error.to_string()))),
            Err(error) => {
                self.control = None;
                self.feed(SourceEvent::LinkLost(error.to_string()));
            }
        }
    }

    /// Gives up the control channel; a peer that spoke nonsense is told so first.
    fn lost(&mut self, why: Option<(Code, String)>) {
        if let Some((code, words)) = why {
            self.send(&Message::Abort { code, words: words.clone() });
            self.control = None;
            self.feed(SourceEvent::HostFailed { task: HostTask::Pages, words });
        }
    }

    fn tick(&mut self) {
        let counters = &self.counters;
        let sent = RoundSent {
            round: self.base.round,
            pages: counters.pages.load(Ordering::Relaxed) - self.base.pages,
            zero_pages: counters.zero_pages.load(Ordering::Relaxed) - self.base.zero_pages,
            bytes_on_wire: counters.bytes_on_wire.load(Ordering::Relaxed) - self.base.bytes_on_wire,
        };
        self.feed(SourceEvent::Moving(sent));
    }

    fn send(&mut self, message: &Message) {
        let Some(control) = &self.control else { return };
        self.said = true;
        failpoints::pass(failpoints::source_says(message));
        if let Err(error) = control.send(self.tag.migration, self.tag.generation, message) {
            // The engine hears of it as of any other loss, after what it is doing now.
            let _ = self.inner.send(Inner::Event(SourceEvent::LinkLost(error.to_string())));
        }
        failpoints::pass(matches!(message, Message::Commit).then_some(Point::SourceSaidCommit));
    }

    fn apply_all(&mut self) -> Option<SourceOutcome> {
        while let Some(action) = self.engine.poll() {
            if let SourceAction::Done(outcome) = action {
                return Some(outcome);
            }
            self.apply(action);
        }
        None
    }

    fn apply(&mut self, action: SourceAction) {
        match action {
            SourceAction::Send(message) => self.send(&message),
            SourceAction::OpenLanes { lanes, plaintext, page_check, token } => {
                let checks = self.link.capabilities().page_check;
                self.page_check = checks.then_some(page_check);
                self.open_lanes(lanes, plaintext, checks && page_check, token);
            }
            SourceAction::StartTracking => {
                self.ask(HostTask::Tracking, |host| host.start_tracking(), |()| SourceEvent::TrackingStarted)
            }
            SourceAction::FetchDirty => self.ask(HostTask::FetchDirty, |host| host.fetch_dirty(), SourceEvent::Dirty),
            SourceAction::SendPages { round, pages, last } => self.send_pages(round, pages, last),
            SourceAction::Pause => self.ask(HostTask::Pause, |host| host.pause(), |()| SourceEvent::Paused),
            SourceAction::Save => self.ask(HostTask::Save, |host| host.save(), SourceEvent::Saved),
            SourceAction::Journal(record) => {
                let kind = record.kind;
                self.ask(HostTask::Journal(kind), move |host| host.journal(&record), move |()| SourceEvent::Journaled(kind));
            }
            SourceAction::Resume => self.ask(HostTask::Resume, |host| host.resume(), |()| SourceEvent::Resumed),
            SourceAction::StopTracking => self.tell(HostTask::Tracking, |host| host.stop_tracking()),
            SourceAction::Release => self.tell(HostTask::Release, |host| host.release()),
            SourceAction::Settle { released } => self.settle(released),
            SourceAction::CloseLink => self.close(),
            // Taken out by `apply_all`.
            SourceAction::Done(_) => {}
        }
    }

    /// Asks the host; the engine gets the answer.
    fn ask<T: 'static>(
        &self,
        task: HostTask,
        call: impl FnOnce(&mut Box<dyn SourceHost>) -> Result<T, crate::HostError> + Send + 'static,
        event: impl FnOnce(T) -> SourceEvent + Send + 'static,
    ) {
        let inner = self.inner.clone();
        self.host.call(task, call, move |called: Called<T>| {
            let event = called.map_or_else(|(task, words)| SourceEvent::HostFailed { task, words }, event);
            let _ = inner.send(Inner::Event(event));
        });
    }

    /// Asks the host; the engine hears only of a failure.
    fn tell(&self, task: HostTask, call: impl FnOnce(&mut Box<dyn SourceHost>) -> Result<(), crate::HostError> + Send + 'static) {
        let inner = self.inner.clone();
        self.host.call(task, call, move |called: Called<()>| {
            if let Err((task, words)) = called {
                tracing::warn!(%task, words, "the source's host failed");
                let _ = inner.send(Inner::Event(SourceEvent::HostFailed { task, words }));
            }
        });
    }

    fn open_lanes(&mut self, lanes: u16, plaintext: bool, page_check: bool, token: LaneToken) {
        let memory = LaneMemory { pages: self.pages.clone(), keys: self.keys.clone(), page_check };
        let (link, inner, tag, version) = (self.link.clone(), self.inner.clone(), self.tag, self.version);
        let task = tokio::spawn(async move {
            let opening: Vec<_> = (0..lanes)
                .map(|lane| {
                    let (link, memory) = (link.clone(), memory.clone());
                    let preamble = LanePreamble { version, lane, migration: tag.migration, generation: tag.generation, token };
                    AbortOnDrop(tokio::spawn(async move { link.lane(preamble, plaintext, &memory).await }))
                })
                .collect();
            let mut opened = Vec::new();
            let mut failed = None;
            for mut lane in opening {
                match (&mut lane.0).await {
                    Ok(Ok(lane)) => opened.push(lane),
                    Ok(Err(error)) => failed = failed.or(Some(error)),
                    Err(_) => return,
                }
            }
            let _ = inner.send(Inner::Opened(failed.map_or(Ok(opened), Err)));
        });
        self.opening = Some(task.abort_handle());
    }

    fn send_pages(&mut self, round: u32, pages: limosa_proto::bitmap::PageSet, last: bool) {
        let counters = &self.counters;
        self.base = RoundCounts {
            round,
            pages: counters.pages.load(Ordering::Relaxed),
            zero_pages: counters.zero_pages.load(Ordering::Relaxed),
            bytes_on_wire: counters.bytes_on_wire.load(Ordering::Relaxed),
        };
        let sent = match &self.lanes {
            None => Err("there are no lanes"),
            Some(lanes) => lanes.send(round, pages).inspect(|()| {
                if last {
                    lanes.finish();
                }
            }),
        };
        match sent {
            Ok(()) => self.moving = true,
            Err(words) => {
                let failed = SourceEvent::HostFailed { task: HostTask::Pages, words: words.to_owned() };
                let _ = self.inner.send(Inner::Event(failed));
            }
        }
    }

    fn settle(&mut self, released: bool) {
        self.control = None;
        let (link, inner, tag) = (self.link.clone(), self.inner.clone(), self.tag);
        let (say, said) = oneshot::channel();
        self.host.call(
            HostTask::Guest,
            |host| Ok(host.decided()),
            |decided| {
                let _ = say.send(decided.ok().flatten());
            },
        );
        // An older question must not arrive after a decision.
        let asking = tokio::spawn(async move {
            // A host that hangs has decided nothing.
            let decided = tokio::time::timeout(DECIDED_MAX, said).await.ok().and_then(Result::ok).flatten();
            failpoints::pass(Some(Point::SourceAsks));
            let event = match decided {
                Some(answer) => SourceEvent::Verdict(answer),
                None => match ask_verdict(&*link, tag.migration, tag.generation, released).await {
                    Ok(answer) => SourceEvent::Verdict(answer),
                    Err(error) => SourceEvent::LinkLost(error.to_string()),
                },
            };
            failpoints::pass(matches!(event, SourceEvent::Verdict(_)).then_some(Point::SourceHearsVerdict));
            let _ = inner.send(Inner::Event(event));
        });
        if let Some(older) = self.asking.replace(asking.abort_handle()) {
            older.abort();
        }
    }

    fn close(&mut self) {
        if let Some(opening) = self.opening.take() {
            opening.abort();
        }
        (self.control, self.held, self.moving) = (None, None, false);
        self.keys.close();
        if let Some(lanes) = self.lanes.take() {
            self.ending.push(tokio::task::spawn_blocking(move || drop(lanes)));
        }
    }

    /// Waits until no thread touches the guest any more, and makes the report.
    async fn end(mut self, outcome: SourceOutcome, progress: &watch::Sender<Progress>) -> (SourceOutcome, Report) {
        self.close();
        for ending in self.ending.drain(..) {
            let _ = ending.await;
        }
        let (say, said) = oneshot::channel();
        self.host.call(
            HostTask::Release,
            |host| Ok(host.cpu_seconds()),
            |called| {
                let _ = say.send(called.unwrap_or_default());
            },
        );
        let host = tokio::time::timeout(HOST_END_MAX, said).await.ok().and_then(Result::ok).unwrap_or_default();
        let ours = self.cpu_ns.load(Ordering::Relaxed) + self.counters.cpu_ns.load(Ordering::Relaxed);
        let measured = Measured {
            link: self.link.capabilities().name.to_owned(),
            page_check: self.page_check,
            source_cpu_seconds: host + ours as f64 / 1e9,
            verified: None,
            network_gap_ms: None,
        };
        let last = self.engine.progress().clone();
        let report = Report::new(&last, &outcome, measured);
        progress.send_replace(last);
        (outcome, report)
    }
}

/// The next message, or never where there is no channel.
pub(crate) async fn receive(control: &mut Option<Control>) -> Result<(ControlHeader, Message), ControlError> {
    match control {
        Some(control) => control.receive().await,
        None => std::future::pending().await,
    }
}

/// A task that ends with its owner.
struct AbortOnDrop<T>(JoinHandle<T>);

impl<T> Drop for AbortOnDrop<T> {
    fn drop(&mut self) {
        self.0.abort();
    }
}
