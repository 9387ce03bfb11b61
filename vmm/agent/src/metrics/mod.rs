//! The agent's metrics, as a Prometheus server scrapes them: what is counted, and the text. What is only a number of now (jobs, lanes,
//! sessions, the ports' counters) is looked up when somebody scrapes. How it is served is in `serve`; docs/OPERATING.md lists them all.

mod serve;

pub(crate) use serve::serve;

use crate::agent::Agent;
use crate::api::{Direction, JobInfo, JobState};
use crate::audit::outcome;
use crate::checked::Section;
use limosa_link::accept::ListenerCounters;
use limosa_link::quic::QuicCounters;
use limosa_link::sessions::Sessions;
use prometheus_client::encoding::text;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::metrics::histogram::{Histogram, exponential_buckets};
use prometheus_client::metrics::info::Info;
use prometheus_client::registry::{Registry, Unit};
use std::collections::HashMap;
use std::net::SocketAddr;
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex, OnceLock, PoisonError};

/// Names and values of labels. Values come from fixed lists: no peer makes a new one.
type Labels = Vec<(&'static str, String)>;

/// The links that are told apart; a peer may name any.
const LINKS: [&str; 3] = ["tcp", "quic", "rdma"];

/// The counters of an open port; what was refused there is counted for the whole process (`limosa_link::refusals`).
#[derive(Debug, Clone)]
pub(crate) enum Door {
    Tcp(Arc<ListenerCounters>),
    Quic(Arc<QuicCounters>),
}

impl Door {
    fn waiting(&self) -> u64 {
        match self {
            Door::Tcp(of) => of.waiting.load(Ordering::Relaxed),
            Door::Quic(of) => of.waiting.load(Ordering::Relaxed),
        }
    }
}

/// All metrics.
#[derive(Debug)]
pub(crate) struct Metrics {
    registry: Registry,
    migrations: Family<Labels, Counter>,
    bytes: Family<Labels, Counter>,
    downtime: Histogram,
    network_gap: Histogram,
    refusals: Family<Labels, Counter>,
    port_refusals: Family<Labels, Counter>,
    journal_sync: Histogram,
    journal_broken: Gauge,
    lanes: Gauge,
    sessions_open: Gauge,
    peers_waiting: Gauge,
    jobs: Family<Labels, Gauge>,
    in_doubt: Gauge,
    guests: Gauge,
    audit_lost: Counter,
    doors: Mutex<Vec<Door>>,
    sessions: OnceLock<Sessions>,
    /// The link of each incoming job at work: its report is the source's.
    links: Mutex<HashMap<u64, &'static str>>,
}

fn named(link: &str) -> &'static str {
    LINKS.iter().find(|known| **known == link).copied().unwrap_or("none")
}

fn direction(of: Direction) -> &'static str {
    match of {
        Direction::Outgoing => "outgoing",
        Direction::Incoming => "incoming",
        Direction::Saving => "saving",
        Direction::Restoring => "restoring",
    }
}

impl Metrics {
    /// All of them, at zero.
    pub(crate) fn new() -> Metrics {
        let milliseconds = || exponential_buckets(0.001, 2.0, 15);
        let made = Metrics {
            registry: Registry::with_prefix("limosa"),
            migrations: Family::default(),
            bytes: Family::default(),
            downtime: Histogram::new(milliseconds()),
            network_gap: Histogram::new(milliseconds()),
            refusals: Family::default(),
            port_refusals: Family::default(),
            journal_sync: Histogram::new(exponential_buckets(0.0001, 2.0, 15)),
            journal_broken: Gauge::default(),
            lanes: Gauge::default(),
            sessions_open: Gauge::default(),
            peers_waiting: Gauge::default(),
            jobs: Family::default(),
            in_doubt: Gauge::default(),
            guests: Gauge::default(),
            audit_lost: Counter::default(),
            doors: Mutex::default(),
            sessions: OnceLock::new(),
            links: Mutex::default(),
        };
        // There from the start: an alert cannot see the first of what was not there before.
        for reason in ["operator", "user"] {
            drop(made.refusals.get_or_create(&vec![("reason", reason.to_owned())]));
        }
        made.registered()
    }

    fn registered(mut self) -> Metrics {
        let to = &mut self.registry;
        to.register("build", "The version of this agent", Info::new(vec![("version", env!("CARGO_PKG_VERSION").to_owned())]));
        to.register("migrations", "Migrations that ended, or came into doubt", self.migrations.clone());
        to.register_with_unit("migration_wire", "Bytes that lanes carried", Unit::Bytes, self.bytes.clone());
        to.register_with_unit("migration_downtime", "How long guests stood still", Unit::Seconds, self.downtime.clone());
        let gap = "From the pause until the guest answered from its new host";
        to.register_with_unit("migration_network_gap", gap, Unit::Seconds, self.network_gap.clone());
        to.register("refusals", "Guests, orders and users that were refused, by reason", self.refusals.clone());
        to.register("port_refusals", "Peers that were not let in, by link and reason", self.port_refusals.clone());
        to.register_with_unit(
            "journal_sync",
            "How long the disk took to make a record durable",
            Unit::Seconds,
            self.journal_sync.clone(),
        );
        to.register("journal_broken", "1: nothing can be written, no migration is begun", self.journal_broken.clone());
        to.register("lanes_open", "Page lanes in both directions", self.lanes.clone());
        to.register("sessions_open", "Incoming migrations at work", self.sessions_open.clone());
        to.register("peers_waiting", "Peers that have not said who they are", self.peers_waiting.clone());
        to.register("jobs_running", "Jobs at work", self.jobs.clone());
        to.register("jobs_in_doubt", "Guests of which nobody knows yet whose they are", self.in_doubt.clone());
        to.register("guests", "Guests of this host", self.guests.clone());
        to.register("audit_lines_lost", "Lines that are not in the audit log", self.audit_lost.clone());
        self
    }

    /// Where the journal notes how long its disk takes.
    pub(crate) fn journal_sync(&self) -> Histogram {
        self.journal_sync.clone()
    }

    /// A port was opened.
    pub(crate) fn watch(&self, door: Door) {
        self.doors.lock().unwrap_or_else(PoisonError::into_inner).push(door);
    }

    /// The table of incoming migrations.
    pub(crate) fn watch_sessions(&self, sessions: Sessions) {
        // There is one for an agent's life.
        let _ = self.sessions.set(sessions);
    }

    /// An incoming migration began over `link`.
    pub(crate) fn incoming(&self, job: u64, link: &str) {
        self.links.lock().unwrap_or_else(PoisonError::into_inner).insert(job, named(link));
    }

    /// A guest, an order or a user was refused.
    pub(crate) fn refused(&self, reason: &'static str) {
        self.refusals.get_or_create(&vec![("reason", reason.to_owned())]).inc();
    }

    /// A job has ended or is in doubt, after `bytes` on the wire.
    pub(crate) fn ended(&self, job: &JobInfo, bytes: u64) {
        if !matches!(job.direction, Direction::Outgoing | Direction::Incoming) {
            return;
        }
        let known = self.links.lock().unwrap_or_else(PoisonError::into_inner).get(&job.id).copied();
        let link = job.report.as_ref().map_or_else(|| known.unwrap_or("none"), |report| named(&report.link));
        if job.state.ended() {
            self.links.lock().unwrap_or_else(PoisonError::into_inner).remove(&job.id);
        }
        let labels = vec![("link", link.to_owned()), ("direction", direction(job.direction).to_owned())];
        self.bytes.get_or_create(&labels).inc_by(bytes);
        let of_outcome = [labels, vec![("outcome", outcome(job.state).to_owned())]].concat();
        self.migrations.get_or_create(&of_outcome).inc();
        let Some(report) = job.report.as_ref().filter(|report| report.ok && !report.paused) else { return };
        if let Some(downtime) = report.downtime_ms {
            self.downtime.observe(downtime / 1e3);
        }
        if let Some(gap) = report.network_gap_ms {
            self.network_gap.observe(gap / 1e3);
        }
    }

    /// The text of all, as they are now.
    pub(crate) fn text(&self, agent: &Agent) -> String {
        self.look(agent);
        let mut text = String::new();
        // Writing into a string does not fail.
        let _ = text::encode(&mut text, &self.registry);
        text
    }

    fn look(&self, agent: &Agent) {
        let number = |count: usize| i64::try_from(count).unwrap_or(i64::MAX);
        let doors = self.doors.lock().unwrap_or_else(PoisonError::into_inner).clone();
        for (link, reason, count) in limosa_link::refusals::all() {
            let labels = vec![("link", link.to_owned()), ("reason", reason.to_owned())];
            self.port_refusals.get_or_create(&labels).inner().store(count, Ordering::Relaxed);
        }
        let waiting: u64 = doors.iter().map(Door::waiting).sum();
        self.peers_waiting.set(i64::try_from(waiting).unwrap_or(i64::MAX));
        self.lanes.set(number(limosa_link::lanes::open_now()));
        self.sessions_open.set(number(self.sessions.get().map_or(0, Sessions::open)));
        for of in [Direction::Outgoing, Direction::Incoming, Direction::Saving, Direction::Restoring] {
            self.jobs.get_or_create(&vec![("direction", direction(of).to_owned())]).set(number(agent.jobs.running(of)));
        }
        let in_doubt = agent.jobs.all().iter().filter(|job| job.state == JobState::InDoubt).count();
        self.in_doubt.set(number(in_doubt));
        self.guests.set(number(agent.vms.list().len()));
        self.journal_broken.set(i64::from(agent.journal().is_broken()));
        self.audit_lost.inner().store(agent.audit.lost(), Ordering::Relaxed);
    }
}

/// `[metrics]` of the configuration: where they are served; nowhere unless it is said.
pub(crate) fn read(mut section: Section<'_, '_>, warnings: &mut Vec<String>) -> Option<SocketAddr> {
    let listen = section.parsed::<SocketAddr>("listen", "an address with a port, such as \"127.0.0.1:9713\"");
    section.close();
    if let Some(open) = listen.filter(|address| !address.ip().is_loopback()) {
        let words =
            "is not this machine's own: whoever reaches it reads how many guests move, and when; nobody is asked for a key";
        warnings.push(format!("metrics.listen: {open} {words}"));
    }
    listen
}
