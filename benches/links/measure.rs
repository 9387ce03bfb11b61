//! One sample of each kind of case: which orders the two ends are given, and what their answers come to.

use crate::common::iperf3;
use crate::common::record::Sample;
use crate::hosts::Spent;
use crate::memory::Mix;
use crate::options::Options;
use crate::orders::{Answer, Migrate, Order, Ready, Way};
use crate::place::End;
use crate::plan::Work;
use anyhow::{Context, Result, bail, ensure};
use serde_json::Value;

/// Ports of the programs that are started beside ours.
const IPERF3_PORT: u16 = 15201;
const PERFTEST_PORT: u16 = 18515;
const ASYNC_RDMA_PORT: u16 = 13561;
/// How long one of them may take.
const PROGRAM_SECONDS: u64 = 240;
/// What an iperf3 test takes.
const IPERF3_SECONDS: u32 = 2;
/// Where `make bench-async-rdma` builds it.
const ASYNC_RDMA: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/target/async-rdma/release/async-rdma-bench");

/// The measured path: two ends and where the destination listens.
pub(crate) struct Path<'a> {
    options: &'a Options,
    source: End,
    destination: End,
    ready: Ready,
    /// What the source's memory holds now, and its sum.
    filled: Option<(Mix, u64)>,
    generation: u64,
}

impl<'a> Path<'a> {
    pub(crate) fn new(options: &'a Options, source: End, destination: End, ready: Ready) -> Path<'a> {
        Path { options, source, destination, ready, filled: None, generation: 0 }
    }

    /// What a reader must know of the path.
    pub(crate) fn notes(&self) -> Vec<String> {
        let mut notes = vec![
            "`of its ceiling`: of iperf3 for tcp, of quinn's tuned bulk transfer for quic, of ib_write_bw for rdma; empty for zero pages, which do not travel"
                .to_owned(),
            "the destination's memory is populated before the clock starts; what arrived was compared with what was sent".to_owned(),
        ];
        if let Some((device, _)) = &self.ready.device {
            notes.push(format!("{device}: soft-RoCE of the kernel, whose work is in no process: see the machines' CPU time"));
            notes.push(
                "ib_write_bw polls (it knows no events for writes), which takes time from soft-RoCE where a machine has one processor: async-rdma, which waits for events, is the fairer ceiling there"
                    .to_owned(),
            );
            notes.push("RDMA hardware: not measured".to_owned());
        }
        notes
    }

    /// Takes one sample.
    pub(crate) fn sample(&mut self, work: Work) -> Result<Sample> {
        let sample = self.take(work)?;
        // Where both ends are on one machine, its CPU time says nothing about either.
        let apart = self.options.lab;
        let machine = |seconds: Option<f64>| seconds.filter(|_| apart);
        let (machine_source, machine_destination) = (machine(sample.machine_source), machine(sample.machine_destination));
        Ok(Sample { machine_source, machine_destination, ..sample })
    }

    fn take(&mut self, work: Work) -> Result<Sample> {
        match work {
            Work::Iperf3 => self.iperf3(),
            Work::Quinn { tuned } => self.quinn(tuned),
            Work::IbWriteBw => self.ib_write_bw(),
            Work::AsyncRdma => self.async_rdma(),
            Work::Lanes { way, lanes, mix } => self.lanes(way, lanes, mix),
        }
    }

    fn fill(&mut self, mix: Mix) -> Result<u64> {
        if let Some((filled, sum)) = self.filled
            && filled == mix
        {
            return Ok(sum);
        }
        match self.source.ask(&Order::Fill { bytes: self.options.bytes(), mix })? {
            Answer::Filled { sum } => {
                self.filled = Some((mix, sum));
                Ok(sum)
            }
            other => bail!("the source answered {other:?}"),
        }
    }

    fn lanes(&mut self, link: Way, lanes: u16, mix: Mix) -> Result<Sample> {
        let sent = self.fill(mix)?;
        self.generation += 1;
        let to = if link == Way::Quic { self.ready.quic } else { self.ready.tcp }.context("the destination does not listen")?;
        let fabric = match (link, &self.ready.rdma) {
            (Way::Rdma { .. }, Err(words)) => bail!("no RDMA: {words}"),
            (_, address) => address.as_ref().ok().copied(),
        };
        let migrate = Migrate {
            link,
            lanes,
            generation: self.generation,
            frame_bytes: self.options.message,
            to,
            fabric,
            connections: self.options.connections,
        };
        let Answer::Moved(sample) = self.source.ask(&Order::Migrate(migrate))? else { bail!("the source did not move it") };
        match self.destination.ask(&Order::Look)? {
            Answer::Arrived { sum, spent, registering } => {
                ensure!(sum == sent, "what arrived is not what was sent");
                Ok(Sample { registering_destination: registering, ..at_destination(sample, spent) })
            }
            other => bail!("the destination answered {other:?}"),
        }
    }

    fn quinn(&mut self, tuned: bool) -> Result<Sample> {
        let to = if tuned { &self.ready.tuned } else { &self.ready.stock };
        let to = to.clone().context("the destination does not listen")?;
        self.destination.tell(&Order::Mark)?;
        let order = Order::Bulk { to, streams: self.options.bulk_streams, bytes: self.options.bytes() };
        let Answer::Moved(sample) = self.source.ask(&order)? else { bail!("the source did not move it") };
        match self.destination.ask(&Order::Since)? {
            Answer::Cost(spent) => Ok(at_destination(sample, spent)),
            other => bail!("the destination answered {other:?}"),
        }
    }

    /// Runs one program at the destination and one at the source: what the source's printed, and what both spent.
    fn programs(&mut self, destination: Vec<String>, port: u16, source: Vec<String>) -> Result<(String, Sample)> {
        self.destination.tell(&Order::Start { words: destination, port: Some(port) })?;
        let ran = self.source.tell(&Order::Start { words: source, port: None }).and_then(|()| self.source.ended(PROGRAM_SECONDS));
        // A destination that nobody came to waits for ever.
        let patience = if ran.is_ok() { 10 } else { 0 };
        let there = self.destination.ended(patience);
        let (printed, spent) = ran?;
        let (_, theirs) = there?;
        let sample = Sample { cpu_source: spent.process, machine_source: spent.machine, ..Sample::default() };
        Ok((printed, at_destination(sample, theirs)))
    }

    fn iperf3(&mut self) -> Result<Sample> {
        let address = self.options.destination().to_string();
        let sending = iperf3::sending(&address, IPERF3_PORT, IPERF3_SECONDS);
        let (printed, _) = self.programs(iperf3::receiving(IPERF3_PORT), IPERF3_PORT, sending)?;
        iperf3::sample(printed.as_bytes())
    }

    fn device(&self) -> Result<(String, u32)> {
        if let Err(words) = &self.ready.rdma {
            bail!("no RDMA: {words}");
        }
        self.ready.device.clone().context("no RDMA device has the destination's address")
    }

    fn ib_write_bw(&mut self) -> Result<Sample> {
        let (device, gid) = self.device()?;
        let iterations = (self.options.bytes() / self.options.message.max(1)).max(5);
        let mut words: Vec<String> = ["ib_write_bw", "-F", "-m", "4096", "-d", &device].map(str::to_owned).to_vec();
        let numbers = [
            ("-x", u64::from(gid)),
            ("-s", self.options.message),
            ("-n", iterations),
            ("-t", self.options.depth.into()),
            // It refuses to signal more seldom than its queue is deep.
            ("-Q", u64::from(self.options.depth.min(16))),
            ("-p", PERFTEST_PORT.into()),
        ];
        words.extend(numbers.iter().flat_map(|(name, value)| [(*name).to_owned(), value.to_string()]));
        let source = words.iter().cloned().chain([self.options.destination().to_string()]).collect();
        let (printed, sample) = self.programs(words, PERFTEST_PORT, source)?;
        perftest(&printed, sample)
    }

    fn async_rdma(&mut self) -> Result<Sample> {
        let (device, gid) = self.device()?;
        ensure!(std::path::Path::new(ASYNC_RDMA).exists(), "not built here: `make bench-async-rdma` builds it or says why not");
        let address = std::net::SocketAddr::new(self.options.destination(), ASYNC_RDMA_PORT).to_string();
        let values = [
            ("--address", address),
            ("--bytes", self.options.bytes().to_string()),
            ("--message", self.options.message.to_string()),
            ("--depth", self.options.depth.to_string()),
            ("--device", device),
            ("--gid-index", gid.to_string()),
        ];
        let words = |end: &str| -> Vec<String> {
            let named = values.iter().flat_map(|(name, value)| [(*name).to_owned(), value.clone()]);
            [ASYNC_RDMA.to_owned(), end.to_owned()].into_iter().chain(named).collect()
        };
        let (printed, sample) = self.programs(words("destination"), ASYNC_RDMA_PORT, words("source"))?;
        let said: Value = serde_json::from_str(&printed).with_context(|| format!("it printed {printed:?}"))?;
        let bytes = said["bytes"].as_u64().context("it says nothing of bytes")?;
        let seconds = said["seconds"].as_f64().context("it says nothing of seconds")?;
        Ok(Sample { bytes, seconds, cpu_source: said["cpu_seconds"].as_f64(), ..sample })
    }
}

fn at_destination(sample: Sample, spent: Spent) -> Sample {
    Sample { cpu_destination: spent.process, machine_destination: spent.machine, ..sample }
}

/// The result line of perftest: bytes, iterations, peak and average in MiB a second (it writes MB).
fn perftest(printed: &str, sample: Sample) -> Result<Sample> {
    let fields = |line: &str| line.split_whitespace().map(str::parse).collect::<Result<Vec<f64>, _>>().ok();
    let found = printed.lines().filter_map(fields).find(|fields| fields.len() >= 5).context("perftest printed no result")?;
    let [bytes, iterations, _peak, average, ..] = found.as_slice() else { bail!("perftest printed no result") };
    ensure!(*average > 0.0, "perftest moved nothing");
    let total = bytes * iterations;
    #[allow(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "a whole number of bytes as a float")]
    let bytes = total as u64;
    Ok(Sample { bytes, seconds: total / (average * f64::from(1 << 20)), ..sample })
}
