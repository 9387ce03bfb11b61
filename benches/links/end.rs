//! One end of a measured path: the source's or the destination's, a process of its own so that its CPU time is its own. It
//! does what it is told (`orders`) and knows nothing of cases, runs and medians.

use crate::bulk::{self, Receiving, Tuned};
use crate::common::machine;
use crate::common::record::Sample;
use crate::fabric;
use crate::hosts::{Arrivals, Meter, Reception, Source, Spent};
use crate::memory::{Memory, Mix};
use crate::orders::{Answer, Begin, Bulk, Migrate, Order, Ready, Way};
use anyhow::{Context, Result, bail, ensure};
use limosa_link::quic::{QuicLink, QuicListener, QuicSettings};
use limosa_link::rdma::RdmaWork;
use limosa_link::sessions::Sessions;
use limosa_link::{Cancel, HostKey, LaneSettings, Link, Listener, ListenerSettings, TcpLink, TrustedHosts, run_source_over};
use limosa_proto::allow::AllowList;
use limosa_proto::event::{SourceConfig, SourceOutcome};
use limosa_proto::identity::{Generation, MigrationId, VmId};
use limosa_proto::progress::Progress;
use limosa_proto::wire::message::VmDescription;
use std::io::{BufRead, Read, Write};
use std::net::SocketAddr;
use std::process::{Child, Command, Stdio};
use std::sync::atomic::Ordering;
use std::sync::{Arc, RwLock};
use std::time::{Duration, Instant};
use tokio::runtime::Runtime;

/// A peer that says nothing for so long is lost. In the lab everything takes longer.
const SILENCE_MAX: Duration = Duration::from_secs(20);

/// Carries out orders from standard input until it ends.
///
/// # Errors
/// Standard input or output is broken. What an order could not do is an answer.
pub(crate) fn serve(is_source: bool) -> Result<()> {
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build()?;
    let mut end = End::new(is_source, runtime);
    for line in std::io::stdin().lock().lines() {
        let order = serde_json::from_str(&line?).context("an order that is none")?;
        let answer = end.carry_out(order).unwrap_or_else(|error| Answer::Failed(format!("{error:#}")));
        let mut out = std::io::stdout().lock();
        writeln!(out, "{}", serde_json::to_string(&answer)?)?;
        out.flush()?;
    }
    Ok(())
}

/// How long a program may take until it listens.
const LISTENS_MAX: Duration = Duration::from_secs(20);

/// Whether anything listens on this TCP port: state 0A in the kernel's tables.
fn listens(port: u16) -> bool {
    let ending = format!(":{port:04X}");
    ["/proc/net/tcp", "/proc/net/tcp6"].iter().filter_map(|path| std::fs::read_to_string(path).ok()).any(|table| {
        table.lines().any(|line| {
            let mut fields = line.split_whitespace().skip(1);
            fields.next().is_some_and(|local| local.ends_with(&ending)) && fields.nth(1) == Some("0A")
        })
    })
}

/// A link, and of RDMA what its lanes ask of the device.
type Watched = (Arc<dyn Link>, Option<Arc<RdmaWork>>);

struct End {
    is_source: bool,
    runtime: Runtime,
    begun: Option<(Begin, HostKey)>,
    memory: Option<Arc<Memory>>,
    meter: Meter,
    arrivals: Arc<Arrivals>,
    registering: fabric::Registering,
    mark: Spent,
    program: Option<Program>,
}

/// A program that was started, with what reads it.
struct Program {
    child: Child,
    stdout: std::thread::JoinHandle<Vec<u8>>,
    stderr: std::thread::JoinHandle<Vec<u8>>,
    before: Spent,
}

impl Drop for Program {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

#[allow(clippy::cast_precision_loss, reason = "nanoseconds of a benchmark")]
fn seconds(ns: u64) -> f64 {
    ns as f64 / 1e9
}

fn drain(mut from: impl Read + Send + 'static) -> std::thread::JoinHandle<Vec<u8>> {
    std::thread::spawn(move || {
        let mut all = Vec::new();
        let _ = from.read_to_end(&mut all);
        all
    })
}

impl End {
    fn new(is_source: bool, runtime: Runtime) -> End {
        End {
            is_source,
            runtime,
            begun: None,
            memory: None,
            meter: Meter::default(),
            arrivals: Arc::default(),
            registering: fabric::Registering::default(),
            mark: Spent::now(),
            program: None,
        }
    }

    fn carry_out(&mut self, order: Order) -> Result<Answer> {
        match order {
            Order::Begin(begin) => self.begin(begin),
            Order::Fill { bytes, mix } => self.fill(bytes, mix),
            Order::Migrate(migrate) => self.migrate(&migrate).map(Answer::Moved),
            Order::Bulk { to, streams, bytes } => self.bulk(to, streams, bytes).map(Answer::Moved),
            Order::Look => {
                let memory = self.arrivals.take().context("nothing has arrived")?;
                let (sum, spent) = (memory.sum()?, self.arrivals.meter.spent());
                Ok(Answer::Arrived { sum, spent, registering: self.registering.take() })
            }
            Order::Mark => {
                self.mark = Spent::now();
                Ok(Answer::Done)
            }
            Order::Since => Ok(Answer::Cost(Spent::now().since(self.mark))),
            Order::Start { words, port } => self.start(&words, port),
            Order::Wait { seconds } => self.wait(Duration::from_secs(seconds)),
        }
    }

    fn begin(&mut self, begin: Begin) -> Result<Answer> {
        let key = HostKey::from_pkcs8(&begin.key)?;
        let mut ready = Ready {
            machine: machine::describe(&begin.kind, &begin.interface),
            tcp: None,
            quic: None,
            rdma: Err("not asked for".to_owned()),
            device: None,
            tuned: None,
            stock: None,
        };
        if !self.is_source {
            let runtime = self.runtime.handle().clone();
            let _entered = runtime.enter();
            self.listen(&begin, &key, &mut ready)?;
        }
        self.begun = Some((begin, key));
        Ok(Answer::Ready(Box::new(ready)))
    }

    fn listen(&mut self, begin: &Begin, key: &HostKey, ready: &mut Ready) -> Result<()> {
        let trusted = TrustedHosts::new([key.id()]);
        let allow = Arc::new(RwLock::new(AllowList::new(&["0.0.0.0/0", "::/0"])?.0));
        let settings =
            || ListenerSettings { plaintext_lanes: true, peer_silence_max: SILENCE_MAX, ..ListenerSettings::default() };
        let address = SocketAddr::new(begin.address, 0);
        let mut fabric = None;
        let mut rdma = None;
        if !begin.trusted_fabric.is_empty() {
            match fabric::listen(address, &begin.trusted_fabric, allow.clone(), self.registering.clone()) {
                Ok(listening) => {
                    ready.rdma = Ok(listening.address);
                    ready.device = listening.device.clone();
                    fabric = Some(listening.fabric.clone());
                    rdma = Some(listening);
                }
                Err(words) => ready.rdma = Err(words),
            }
        }
        let sessions = Sessions::with_fabric(Arc::new(Reception(self.arrivals.clone())), 1, fabric);
        if let Some(rdma) = rdma {
            rdma.serve(sessions.clone());
        }
        let tcp = Listener::bind(address, settings(), key.clone(), trusted.clone(), allow.clone())?;
        ready.tcp = Some(tcp.local_address()?);
        tokio::spawn(tcp.serve(sessions.clone(), Cancel::new()));
        let quic = QuicListener::bind(address, settings(), QuicSettings::default(), key.clone(), trusted, allow)?;
        ready.quic = Some(quic.local_address()?);
        tokio::spawn(quic.serve(sessions, Cancel::new()));
        for (place, mtu) in [(&mut ready.tuned, Some(begin.bulk_mtu)), (&mut ready.stock, None)] {
            let receiving = bulk::receive(begin.address, mtu.map(|mtu| Tuned { mtu }))?;
            *place = Some(Bulk { address: receiving.address, certificate: receiving.certificate, mtu });
        }
        Ok(())
    }

    fn fill(&mut self, bytes: u64, mix: Mix) -> Result<Answer> {
        // What was there before is given back first: there may not be room for both.
        self.memory = None;
        let memory = Memory::new(&Memory::shape(bytes)?)?;
        memory.fill(mix)?;
        let sum = memory.sum()?;
        self.memory = Some(Arc::new(memory));
        Ok(Answer::Filled { sum })
    }

    fn link(&self, migrate: &Migrate) -> Result<Watched> {
        let (begin, key) = self.begun.as_ref().context("not begun")?;
        let trusted = TrustedHosts::new([key.id()]);
        let to = migrate.to.to_string();
        let tcp = || {
            let link = TcpLink::new(to.clone(), key.id(), key.clone(), trusted.clone(), SILENCE_MAX);
            Arc::new(link.with_congestion("cubic"))
        };
        let link: Arc<dyn Link> = match migrate.link {
            Way::TcpPlaintext | Way::TcpTls => tcp(),
            Way::Quic => {
                let settings = QuicSettings { connections: migrate.connections, ..QuicSettings::default() };
                Arc::new(QuicLink::new(to.clone(), key.id(), key.clone(), trusted.clone(), SILENCE_MAX, settings))
            }
            Way::Rdma { .. } => {
                let fabric = migrate.fabric.context("the destination has no RDMA")?;
                let (link, work) = fabric::link(tcp(), fabric, &begin.trusted_fabric)?;
                return Ok((link, Some(work)));
            }
        };
        Ok((link, None))
    }

    fn migrate(&self, migrate: &Migrate) -> Result<Sample> {
        use limosa_link::Pages as _;
        let memory = self.memory.clone().context("there is no memory: fill it first")?;
        let (_, key) = self.begun.as_ref().context("not begun")?;
        let vm = VmDescription {
            id: VmId([1; 16]),
            name: "bench".into(),
            vcpus: 1,
            memory: memory.memory_map().clone(),
            nics: vec![],
            disks: vec![],
            vmm: "bench".into(),
            records: vec![],
            config: vec![],
        };
        let mut config = SourceConfig::new(MigrationId([2; 16]), Generation(migrate.generation), key.id(), vm);
        config.lanes = migrate.lanes;
        config.peer_silence_max = SILENCE_MAX;
        config.plaintext_lanes = matches!(migrate.link, Way::TcpPlaintext | Way::Rdma { .. });
        config.page_check = migrate.link == Way::Rdma { check: true };
        let lanes = LaneSettings { frame_bytes: migrate.frame_bytes, ..LaneSettings::default() };
        let host = Box::new(Source { memory, meter: self.meter.clone() });
        let progress = tokio::sync::watch::Sender::new(Progress::new(0));
        let (link, work) = self.link(migrate)?;
        let (outcome, report) = self.runtime.block_on(run_source_over(link, config, lanes, false, host, Cancel::new(), progress));
        ensure!(outcome == SourceOutcome::Committed, "the migration ended otherwise: {outcome:?}");
        let [round, ..] = report.round_list.as_slice() else { bail!("the report has no round") };
        let spent = self.meter.spent();
        Ok(Sample {
            bytes: report.memory_bytes,
            seconds: round.ms / 1e3,
            wire_bytes: Some(report.bytes_on_wire),
            cpu_source: spent.process,
            machine_source: spent.machine,
            doorbells: work.as_ref().map(|work| work.doorbells.load(Ordering::Relaxed)),
            rdma_bytes: work.as_ref().map(|work| work.write_bytes.load(Ordering::Relaxed)),
            registering_source: work.as_ref().map(|work| seconds(work.registered.ns.load(Ordering::Relaxed))),
            ..Sample::default()
        })
    }

    fn bulk(&self, to: Bulk, streams: u16, bytes: u64) -> Result<Sample> {
        let before = Spent::now();
        let receiving = Receiving { address: to.address, certificate: to.certificate };
        let sent = bulk::send(&receiving, to.mtu.map(|mtu| Tuned { mtu }), streams, bytes);
        let (bytes, seconds) = self.runtime.block_on(sent)?;
        let spent = Spent::now().since(before);
        Ok(Sample { bytes, seconds, cpu_source: spent.process, machine_source: spent.machine, ..Sample::default() })
    }

    fn start(&mut self, words: &[String], port: Option<u16>) -> Result<Answer> {
        ensure!(self.program.is_none(), "a program runs already");
        let [program, arguments @ ..] = words else { bail!("no program is named") };
        let before = Spent::by_children();
        let mut command = Command::new(program);
        command.args(arguments).stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
        let mut child = command.spawn().with_context(|| format!("{program} cannot be started"))?;
        let stdout = drain(child.stdout.take().context("no standard output")?);
        let stderr = drain(child.stderr.take().context("no standard error")?);
        let program = self.program.insert(Program { child, stdout, stderr, before });
        let until = Instant::now() + LISTENS_MAX;
        // A program that ended already says why when it is waited for.
        while port.is_some_and(|port| !listens(port)) && program.child.try_wait()?.is_none() && Instant::now() < until {
            std::thread::sleep(Duration::from_millis(10));
        }
        Ok(Answer::Done)
    }

    fn wait(&mut self, limit: Duration) -> Result<Answer> {
        let mut program = self.program.take().context("no program runs")?;
        let until = Instant::now() + limit;
        let status = loop {
            if let Some(status) = program.child.try_wait()? {
                break Some(status);
            }
            if Instant::now() > until {
                program.child.kill()?;
                program.child.wait()?;
                break None;
            }
            std::thread::sleep(Duration::from_millis(2));
        };
        let spent = Spent::by_children().since(program.before);
        let empty = || std::thread::spawn(Vec::new);
        let read =
            |thread: std::thread::JoinHandle<Vec<u8>>| String::from_utf8_lossy(&thread.join().unwrap_or_default()).into_owned();
        let stdout = read(std::mem::replace(&mut program.stdout, empty()));
        let stderr = read(std::mem::replace(&mut program.stderr, empty()));
        Ok(Answer::Ended { status: status.and_then(|status| status.code()), stdout, stderr, spent })
    }
}
