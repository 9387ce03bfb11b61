//! The destination's driver, the mirror of `source.rs`: one incoming migration from its Hello to its end.
//! The control channel may be replaced on the way, by a source in doubt that connects anew.

use crate::control::ControlError;
use crate::direct::{ExposedError, Exposure, Fabric};
use crate::driver::{Cancel, counted, now, until};
use crate::failpoints::{self, Point};
use crate::host::{DestinationHost, Incoming, IncomingProgress, Peer};
use crate::hosted::{Called, Hosted};
use crate::lanes::{LaneCounters, LaneEvent, LaneReceiver, RoundCounts};
use crate::pages::Populate;
use crate::receiving::ReceiveLanes;
use crate::sending::Tag;
use crate::sessions::{Arrival, Place};
use crate::source::{HOST_END_MAX, LANE_GRACE, TICK, receive};
use crate::{Control, HostError};
use limosa_proto::destination::Destination;
use limosa_proto::error::Coded as _;
use limosa_proto::event::{DestinationAction, DestinationEvent, DestinationOutcome, HostTask};
use limosa_proto::memory::PAGE_BYTES;
use limosa_proto::record::Record;
use limosa_proto::state::DestinationState;
use limosa_proto::wire::code::Code;
use limosa_proto::wire::frame::ControlHeader;
use limosa_proto::wire::message::{Hello, Message, Reached, Refusal, VmDescription};
use limosa_proto::wire::offer::Keys;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;
use tokio::sync::{mpsc, oneshot, watch};
use tokio::task::JoinHandle;
use tokio::time::Instant as Moment;

/// What the driver waits for beside messages, lanes and arrivals.
enum Inner {
    Event(DestinationEvent),
    Prepared(ReceiveLanes, u32),
    /// The lanes have ended and the state is loaded.
    Loaded(Option<ReceiveLanes>),
    /// The network was told, and the guest asked.
    Told {
        announcements: Vec<String>,
        reached: Reached,
    },
}

struct Driver {
    engine: Destination,
    place: Place,
    tag: Tag,
    host: Hosted<Box<dyn DestinationHost>>,
    vm: Option<Box<VmDescription>>,
    populate: Populate,
    /// What its lanes come over, and the device that takes the memory in where that link has one.
    link: String,
    fabric: Option<Arc<dyn Fabric>>,
    control: Option<Control>,
    lanes: Option<ReceiveLanes>,
    /// How many lanes must join, once that is agreed.
    wanted: usize,
    ending: Vec<JoinHandle<()>>,
    counters: Arc<LaneCounters>,
    /// Bytes on the lanes when they were last looked at.
    seen: u64,
    rounds: u32,
    cpu_ns: Arc<AtomicU64>,
    inner: mpsc::UnboundedSender<Inner>,
    lane_events: mpsc::UnboundedSender<LaneEvent>,
    held: Option<(Moment, String)>,
    progress: Option<watch::Sender<IncomingProgress>>,
}

/// Carries one incoming migration to its end.
pub(crate) async fn run(
    place: Place,
    peer: Peer,
    control: Control,
    arrivals: mpsc::UnboundedReceiver<Arrival>,
    incoming: Incoming,
    hello: Box<Hello>,
) {
    let Incoming { host, config, populate, cancel, progress, done } = incoming;
    let tag = Tag { migration: place.migration, generation: place.generation };
    let cpu_ns = Arc::new(AtomicU64::new(0));
    let made = Destination::new(now(), config).map_err(|error| error.to_string()).and_then(|engine| {
        let host = Hosted::start("destination-host", host, cpu_ns.clone())
            .map_err(|error| format!("no thread for the host: {error}"))?;
        Ok((engine, host))
    });
    let (engine, host) = match made {
        Ok(made) => made,
        Err(words) => {
            let refusal = Refusal::one(Code::Internal, words);
            let _ = control.send(tag.migration, tag.generation, &Message::Refuse(refusal.clone()));
            if let Some(done) = done {
                let _ = done.send(DestinationOutcome::Refused(refusal));
            }
            return;
        }
    };
    let (inner, inners) = mpsc::unbounded_channel();
    let (lane_events, lanes) = mpsc::unbounded_channel();
    let link = hello.link.clone();
    let fabric = place.fabric().filter(|fabric| fabric.link() == link);
    let mut driver = Driver {
        engine,
        place,
        tag,
        host,
        vm: None,
        populate,
        link,
        fabric,
        control: Some(control),
        lanes: None,
        wanted: 0,
        ending: Vec::new(),
        counters: Arc::default(),
        seen: 0,
        rounds: 0,
        cpu_ns,
        inner,
        lane_events,
        held: None,
        progress,
    };
    tracing::info!(migration = %tag.migration, peer = %peer.id, vm = %hello.vm.name, "a migration comes in");
    driver.hear(Message::Hello(hello));
    let outcome = driver.drive(inners, lanes, arrivals, &cancel).await;
    tracing::info!(migration = %tag.migration, ?outcome, "an incoming migration ended");
    driver.end().await;
    if let Some(done) = done {
        let _ = done.send(outcome);
    }
}

impl Driver {
    async fn drive(
        &mut self,
        mut inners: mpsc::UnboundedReceiver<Inner>,
        mut lanes: mpsc::UnboundedReceiver<LaneEvent>,
        mut arrivals: mpsc::UnboundedReceiver<Arrival>,
        cancel: &Cancel,
    ) -> DestinationOutcome {
        let cpu_ns = self.cpu_ns.clone();
        let mut cancelled = false;
        loop {
            if let Some(outcome) = counted(&cpu_ns, || self.apply_all()) {
                return outcome;
            }
            self.show();
            let timer = self.engine.timeout();
            let held = self.held.as_ref().map(|(at, _)| *at);
            let receiving = self.lanes.is_some() && self.engine.state() <= DestinationState::Receiving;
            tokio::select! {
                biased;
                Some(inner) = inners.recv() => counted(&cpu_ns, || self.inner(inner)),
                Some(event) = lanes.recv() => self.lane(event),
                received = receive(&mut self.control) => counted(&cpu_ns, || self.message(received)),
                Some(arrival) = arrivals.recv() => self.arrival(arrival),
                words = cancel.cancelled(), if !cancelled => {
                    cancelled = true;
                    self.feed(DestinationEvent::Cancel(words));
                }
                () = tokio::time::sleep_until(held.unwrap_or_else(Moment::now)), if held.is_some() => {
                    if let Some((_, words)) = self.held.take() {
                        self.feed(DestinationEvent::HostFailed { task: HostTask::Pages, words });
                    }
                }
                () = tokio::time::sleep(timer.map_or(Duration::ZERO, until)), if timer.is_some() => self.feed(DestinationEvent::Timer),
                () = tokio::time::sleep(TICK), if receiving => self.tick(),
            }
        }
    }

    /// Waits until no thread touches the guest's memory any more, and until the host has done what it was asked, above all
    /// Discard; then the place is free again.
    async fn end(mut self) {
        self.show();
        self.close();
        for ending in self.ending.drain(..) {
            let _ = ending.await;
        }
        let (say, said) = oneshot::channel();
        self.host.call(
            HostTask::Discard,
            |_| Ok(()),
            |_: Called<()>| {
                let _ = say.send(());
            },
        );
        let _ = tokio::time::timeout(HOST_END_MAX, said).await;
    }

    fn feed(&mut self, event: DestinationEvent) {
        self.engine.handle(now(), event);
    }

    fn hear(&mut self, message: Message) {
        failpoints::pass(failpoints::destination_hears(&message));
        self.feed(DestinationEvent::Message(message));
    }

    fn show(&self) {
        let Some(progress) = &self.progress else { return };
        let (state, rounds, counters) = (self.engine.state(), self.rounds, &self.counters);
        progress.send_replace(IncomingProgress {
            state,
            rounds,
            pages: counters.pages.load(Ordering::Relaxed),
            zero_pages: counters.zero_pages.load(Ordering::Relaxed),
            bytes_on_wire: counters.bytes_on_wire.load(Ordering::Relaxed),
        });
    }

    fn inner(&mut self, inner: Inner) {
        match inner {
            Inner::Event(event) => self.feed(event),
            Inner::Loaded(lanes) => {
                self.lanes = lanes;
                self.feed(DestinationEvent::Loaded);
            }
            Inner::Told { announcements, reached } => self.account(announcements, reached),
            Inner::Prepared(lanes, populated_ms) => {
                // An engine that has given up meanwhile has sent its Discard behind this.
                self.lanes = Some(lanes);
                self.feed(DestinationEvent::Prepared { populated_ms });
            }
        }
    }

    fn lane(&mut self, event: LaneEvent) {
        match event {
            LaneEvent::Round(RoundCounts { round, pages, zero_pages, .. }) => {
                self.rounds = round;
                failpoints::pass(Some(Point::DestinationRoundArrived));
                self.feed(DestinationEvent::RoundArrived { round, pages, zero_pages, bytes: pages.saturating_mul(PAGE_BYTES) });
            }
            // With everything loaded, only the control channel counts.
            LaneEvent::Failed { words, .. } if self.engine.state() < DestinationState::Loading && self.held.is_none() => {
                self.held = Some((Moment::now() + LANE_GRACE, words));
            }
            LaneEvent::Failed { lane, words } => tracing::debug!(lane, words, "a lane ended"),
            LaneEvent::Opened(Ok(key)) => self.send(&Message::Keys(Keys { keys: vec![key] })),
            LaneEvent::Opened(Err(words)) => self.feed(DestinationEvent::HostFailed { task: HostTask::Pages, words }),
        }
    }

    fn arrival(&mut self, arrival: Arrival) {
        match arrival {
            Arrival::Lane(number, lane) => self.join(number, lane),
            Arrival::Doubt(control, message) => {
                self.control = Some(control);
                self.hear(message);
            }
        }
    }

    fn join(&mut self, number: u16, lane: Box<dyn LaneReceiver>) {
        let joined = match &mut self.lanes {
            None => return,
            Some(lanes) => lanes.join(number, lane).map(|()| lanes.joined()),
        };
        match joined {
            Ok(joined) if joined == self.wanted => {
                failpoints::pass(Some(Point::DestinationLanesJoined));
                self.feed(DestinationEvent::LanesJoined);
            }
            Ok(_) => {}
            Err(error) => self.feed(DestinationEvent::HostFailed { task: HostTask::Lanes, words: error.to_string() }),
        }
    }

    fn message(&mut self, received: Result<(ControlHeader, Message), ControlError>) {
        let wrong = match received {
            Ok((header, message)) => match header.expect(self.tag.migration, self.tag.generation) {
                Ok(()) => match self.opens(&message) {
                    Ok(()) => return self.hear(message),
                    Err(words) => (Code::Violation, words),
                },
                Err(error) => (error.code(), error.to_string()),
            },
            Err(ControlError::Wire(error)) => (error.code(), error.to_string()),
            Err(error) => {
                self.control = None;
                return self.feed(DestinationEvent::LinkLost(error.to_string()));
            }
        };
        let (code, words) = wrong;
        self.send(&Message::Abort { code, words: words.clone() });
        self.control = None;
        self.feed(DestinationEvent::LinkLost(words));
    }

    /// Opens memory to a source that asks for it.
    fn opens(&mut self, message: &Message) -> Result<(), String> {
        match (message, &mut self.lanes) {
            (Message::KeysAsk(ask), Some(lanes)) => lanes.open(&ask.chunks),
            (Message::KeysAsk(_), None) => Err("the source asks for keys of memory that is not there".to_owned()),
            _ => Ok(()),
        }
    }

    fn tick(&mut self) {
        let bytes = self.counters.bytes_on_wire.load(Ordering::Relaxed);
        if bytes != self.seen {
            self.seen = bytes;
            self.feed(DestinationEvent::Arriving);
        }
    }

    fn send(&mut self, message: &Message) {
        let Some(control) = &self.control else { return };
        failpoints::pass(failpoints::destination_says(message));
        if let Err(error) = control.send(self.tag.migration, self.tag.generation, message) {
            let _ = self.inner.send(Inner::Event(DestinationEvent::LinkLost(error.to_string())));
        }
    }

    fn apply_all(&mut self) -> Option<DestinationOutcome> {
        while let Some(action) = self.engine.poll() {
            if let DestinationAction::Done(outcome) = action {
                return Some(outcome);
            }
            self.apply(action);
        }
        None
    }

    fn apply(&mut self, action: DestinationAction) {
        match action {
            DestinationAction::Check(vm) => self.check(vm),
            DestinationAction::Send(message) => self.send(&message),
            DestinationAction::Prepare { page_check } => self.prepare(page_check),
            DestinationAction::AcceptLanes { lanes, plaintext, token } => {
                self.wanted = usize::from(lanes);
                if let Some(receiving) = &self.lanes {
                    receiving.expect(self.wanted);
                }
                self.place.open_gate(&self.link, token, lanes, plaintext);
            }
            DestinationAction::Load { records, paused } => self.load(records, paused),
            DestinationAction::Journal(record) => {
                let kind = record.kind;
                self.ask(HostTask::Journal(kind), move |host| host.journal(&record), move |()| DestinationEvent::Journaled(kind));
            }
            DestinationAction::Resume => self.ask(HostTask::Resume, |host| host.resume(), |()| DestinationEvent::Resumed),
            DestinationAction::Hold => self.ask(HostTask::Resume, |host| host.hold(), |()| DestinationEvent::Resumed),
            DestinationAction::Announce => self.announce(),
            DestinationAction::Discard => {
                // First the lanes, then the memory under them.
                let lanes = self.lanes.take();
                let inner = self.inner.clone();
                self.host.call(
                    HostTask::Discard,
                    move |host| {
                        drop(lanes);
                        host.discard()
                    },
                    move |called| {
                        if let Err((task, words)) = called {
                            tracing::warn!(%task, words, "the destination's host failed");
                            let _ = inner.send(Inner::Event(DestinationEvent::HostFailed { task, words }));
                        }
                    },
                );
            }
            DestinationAction::CloseLink => self.close(),
            // Taken out by `apply_all`.
            DestinationAction::Done(_) => {}
        }
    }

    fn load(&mut self, records: Vec<Record>, paused: bool) {
        // No lane may write once the guest's state is in place: it may run at any moment.
        let mut lanes = self.lanes.take();
        let inner = self.inner.clone();
        self.host.call(
            HostTask::Load,
            move |host| {
                if let Some(lanes) = &mut lanes {
                    lanes.end();
                }
                let taken = lanes.as_mut().map_or(Ok(()), ReceiveLanes::take_back);
                if let Err(error) = taken {
                    return Ok(Err(error));
                }
                if paused {
                    host.hold()?;
                }
                // Given back and not dropped here: unmapping guest memory takes time that belongs to the downtime.
                host.load(records).map(|()| Ok(lanes))
            },
            move |called| {
                let _ = inner.send(match called {
                    Ok(Ok(lanes)) => Inner::Loaded(lanes),
                    Ok(Err(error)) => Inner::Event(DestinationEvent::PeerFault {
                        code: if let ExposedError::PageCheck { .. } = error { Code::PageCheck } else { Code::Internal },
                        words: error.to_string(),
                    }),
                    Err((task, words)) => Inner::Event(DestinationEvent::HostFailed { task, words }),
                });
            },
        );
    }

    fn ask<T: 'static>(
        &self,
        task: HostTask,
        call: impl FnOnce(&mut Box<dyn DestinationHost>) -> Result<T, HostError> + Send + 'static,
        event: impl FnOnce(T) -> DestinationEvent + Send + 'static,
    ) {
        let inner = self.inner.clone();
        self.host.call(task, call, move |called: Called<T>| {
            let event = called.map_or_else(|(task, words)| DestinationEvent::HostFailed { task, words }, event);
            let _ = inner.send(Inner::Event(event));
        });
    }

    fn check(&mut self, vm: Box<VmDescription>) {
        self.vm = Some(vm.clone());
        self.ask(
            HostTask::Check,
            move |host| Ok(host.check(&vm)),
            |fits| fits.map_or_else(DestinationEvent::Refuse, |()| DestinationEvent::Admitted),
        );
    }

    fn prepare(&mut self, page_check: bool) {
        let (Some(vm), populate, tag) = (self.vm.clone(), self.populate, self.tag) else { return };
        let (counters, events, inner) = (self.counters.clone(), self.lane_events.clone(), self.inner.clone());
        let (fabric, token, Tag { migration, generation }) = (self.fabric.clone(), self.engine.token(), tag);
        self.host.call(
            HostTask::Prepare,
            move |host| {
                let begun = std::time::Instant::now();
                let pages = host.prepare(&vm)?;
                if *pages.memory_map() != vm.memory {
                    return Err(HostError::new("the VMM made memory of another shape than the guest's"));
                }
                let exposure = Exposure { migration, generation, token, pages: pages.clone(), page_check };
                let exposed = match fabric.map(|fabric| fabric.expose(exposure)).transpose() {
                    Ok(exposed) => exposed.map(Arc::from),
                    // The link's failure and not the VMM's: the source may try another link.
                    Err(error) => return Ok(Err(error.words)),
                };
                let lanes = ReceiveLanes::new(pages, tag, populate, exposed, counters, events)
                    .map_err(|error| HostError::new(format!("guest memory could not be populated: {error}")))?;
                Ok(Ok((lanes, u32::try_from(begun.elapsed().as_millis()).unwrap_or(u32::MAX))))
            },
            move |called| {
                let _ = inner.send(match called {
                    Ok(Ok((lanes, populated_ms))) => Inner::Prepared(lanes, populated_ms),
                    Ok(Err(words)) => Inner::Event(DestinationEvent::HostFailed { task: HostTask::Lanes, words }),
                    Err((task, words)) => Inner::Event(DestinationEvent::HostFailed { task, words }),
                });
            },
        );
    }

    fn announce(&self) {
        let (inner, runtime) = (self.inner.clone(), tokio::runtime::Handle::current());
        self.host.call(
            HostTask::Announce,
            |host| Ok((host.announce()?, host.reach())),
            move |called| {
                let (announcements, reaching) = match called {
                    Ok(told) => told,
                    Err((task, words)) => {
                        let _ = inner.send(Inner::Event(DestinationEvent::HostFailed { task, words }));
                        return;
                    }
                };
                let tell = move |reached| {
                    let _ = inner.send(Inner::Told { announcements, reached });
                };
                match reaching {
                    None => tell(Reached::default()),
                    Some(reaching) => drop(runtime.spawn_blocking(move || tell(reaching()))),
                }
            },
        );
    }

    /// What it all took, summed up when the guest has answered: until then it needs the CPU more.
    fn account(&self, announcements: Vec<String>, reached: Reached) {
        let (cpu_ns, counters) = (self.cpu_ns.clone(), self.counters.clone());
        let event = move |host_seconds: f64| {
            let ours = cpu_ns.load(Ordering::Relaxed) + counters.cpu_ns.load(Ordering::Relaxed);
            let host = Duration::try_from_secs_f64(host_seconds).unwrap_or_default();
            let cpu_us = ours / 1000 + u64::try_from(host.as_micros()).unwrap_or(0);
            DestinationEvent::Announced { announcements, cpu_us, reached }
        };
        self.ask(HostTask::Announce, |host| Ok(host.cpu_seconds()), event);
    }

    fn close(&mut self) {
        (self.control, self.held) = (None, None);
        if let Some(lanes) = self.lanes.take() {
            self.ending.push(tokio::task::spawn_blocking(move || drop(lanes)));
        }
    }
}
