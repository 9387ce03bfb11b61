//! What a flood of connections costs a migration that is under way. A guest goes there and back between two hosts of this machine, each
//! time in one of three ways, interleaved: in peace; while a third machine floods a port of its own that only accepts and closes
//! (what making the flood costs this machine's cores); while it floods the port of the destination's agent. No plot.
//!
//! `cargo bench -p rig --bench flood -- [--runs 7] [--connections 10000] [--over-ms 4000] [--memory 512M] [--json]` as root.
#![allow(clippy::print_stdout, clippy::print_stderr, reason = "a benchmark prints")]
#![forbid(unsafe_code)]

#[path = "common/mod.rs"]
mod common;
#[path = "../tests/hello/mod.rs"]
mod hello;

use anyhow::{Context, Result, ensure};
use clap::Parser;
use common::{machine, median, spread};
use rig::flood::{Extent, Flood, beginnings};
use rig::process::memory_kib;
use rig::{AgentConfig, GuestSpec, Host, Lab};
use serde_json::json;
use std::collections::BTreeMap;
use std::net::{SocketAddr, TcpListener};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

/// What a flood costs.
#[derive(Debug, Parser)]
#[command(name = "flood")]
struct Options {
    /// Migrations of each way
    #[arg(long, default_value_t = 7)]
    runs: u32,
    /// Connections of a flood
    #[arg(long, default_value_t = 10_000)]
    connections: u64,
    /// Milliseconds over which they are spread
    #[arg(long, default_value_t = 4000)]
    over_ms: u64,
    /// Memory of the guest, half of it in use
    #[arg(long, default_value = "512M")]
    memory: String,
    /// As `limosa migrate --bandwidth`; 0: none
    #[arg(long, default_value = "0")]
    bandwidth: String,
    /// Print every sample as JSON
    #[arg(long)]
    json: bool,
    /// Given by cargo
    #[arg(long, hide = true)]
    bench: bool,
}

/// What happens meanwhile.
const WAYS: [&str; 3] = ["in peace", "a flood elsewhere", "a flood at the agent"];
/// Where the bystander listens, on the third machine.
const BYSTANDER: &str = "10.77.0.9:9";

/// Samples of one way.
#[derive(Debug, Default)]
struct Row {
    total_ms: Vec<f64>,
    downtime_ms: Vec<f64>,
    made: Vec<f64>,
}

/// Accepts and closes, on the third machine, until it is dropped.
struct Bystander(Arc<AtomicBool>);

impl Bystander {
    fn start(lab: &Lab) -> Result<Bystander> {
        let listener = lab.watch.within(|| Ok(TcpListener::bind(BYSTANDER)?))?;
        listener.set_nonblocking(true)?;
        let stop = Arc::new(AtomicBool::new(false));
        let stopped = stop.clone();
        std::thread::spawn(move || {
            while !stopped.load(Ordering::Relaxed) {
                if listener.accept().is_err() {
                    std::thread::sleep(Duration::from_millis(1));
                }
            }
        });
        Ok(Bystander(stop))
    }
}

impl Drop for Bystander {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

/// Kibibytes of an agent: its own, and with the guest's that it maps.
fn memory(host: &Host) -> Result<(u64, u64)> {
    let pid = host.agent_pid()?;
    Ok((memory_kib(pid, "RssAnon")?, memory_kib(pid, "VmRSS")?))
}

/// Seconds of processor time that a host's agent has used, all of its threads together.
fn cpu_seconds(host: &Host) -> Result<f64> {
    let mut all = 0;
    for thread in std::fs::read_dir(format!("/proc/{}/task", host.agent_pid()?))? {
        let text = std::fs::read_to_string(thread?.path().join("schedstat")).unwrap_or_default();
        all += text.split(' ').next().and_then(|ns| ns.parse::<u64>().ok()).unwrap_or(0);
    }
    Ok(all as f64 / 1e9)
}

/// What a flood alone, while nothing moves, costs the agent at which it is aimed: microseconds of processor time a connection.
fn alone(options: &Options, lab: &Lab, words: &[Vec<u8>]) -> Result<f64> {
    let extent = Extent { connections: options.connections, over: Duration::from_millis(options.over_ms), threads: 2 };
    let before = cpu_seconds(&lab.b)?;
    let (made, _) = Flood::start(&lab.watch, lab.b.address(), extent, words)?.wait()?;
    std::thread::sleep(Duration::from_millis(500));
    Ok((cpu_seconds(&lab.b)? - before) * 1e6 / made.max(1) as f64)
}

/// One migration in one way.
fn migrate(
    options: &Options,
    way: &str,
    lab: &Lab,
    hosts: (&Host, &Host),
    row: &mut Row,
    words: &[Vec<u8>],
) -> Result<[(u64, u64); 3]> {
    let (from, to) = hosts;
    let extent = Extent { connections: options.connections, over: Duration::from_millis(options.over_ms), threads: 2 };
    let before = memory(to)?;
    let target: Option<SocketAddr> = match way {
        "a flood elsewhere" => Some(BYSTANDER.parse()?),
        "a flood at the agent" => Some(to.address()),
        _ => None,
    };
    let flood = target.map(|target| Flood::start(&lab.watch, target, extent, words)).transpose()?;
    std::thread::sleep(Duration::from_millis(300));
    let report = from.migrate_well("bench", to, &["--link", "tcp", "--bandwidth", &options.bandwidth])?;
    let during = memory(to)?;
    if let Some(mut flood) = flood {
        row.made.push(flood.made().0 as f64);
        let (made, failed) = flood.wait()?;
        ensure!(made + failed == options.connections && failed < options.connections / 10, "{made} were made, {failed} failed");
    }
    let number = |name: &str| report[name].as_f64().with_context(|| format!("no {name}: {report}"));
    row.total_ms.push(number("total_ms")?);
    row.downtime_ms.push(number("downtime_ms")?);
    std::thread::sleep(Duration::from_millis(500));
    Ok([before, during, memory(to)?])
}

fn cell(samples: &[f64]) -> String {
    spread(samples, 1).unwrap_or_else(|| "-".into())
}

fn main() -> Result<()> {
    let options = Options::parse();
    // `cargo test --benches` and listings call without `--bench`: nothing is measured then.
    if !options.bench {
        return Ok(());
    }
    if let Some(lacks) = rig::lab::missing() {
        println!("skipped: {lacks}");
        ensure!(std::env::var_os("LIMOSA_DEMAND_ALL").is_none(), "{lacks}");
        return Ok(());
    }
    let (words, load) = (beginnings(&hello::hello()?), machine::describe("", "lo").load);
    let mut lab = Lab::two_hosts()?;
    lab.start_agents(AgentConfig::default())?;
    let spec = GuestSpec::new("bench", 1).memory(&options.memory, "256M").dirty("0", "1M");
    lab.guest(&spec)?;
    let bystander = Bystander::start(&lab)?;
    let mut rows: BTreeMap<&str, Row> = BTreeMap::new();
    let mut floods = Vec::new();
    let (mut from, mut to) = (&lab.a, &lab.b);
    for run in 1..=options.runs {
        eprint!("\rrun {run} of {}", options.runs);
        for way in WAYS {
            let seen = migrate(&options, way, &lab, (from, to), rows.entry(way).or_default(), &words)?;
            if way == "a flood at the agent" {
                floods.push(seen);
            }
            lab.guest_is_on(&spec, to, from)?;
            (from, to) = (to, from);
        }
    }
    eprintln!();
    let alone = (0..3).map(|_| alone(&options, &lab, &words)).collect::<Result<Vec<f64>>>()?;
    drop(bystander);
    lab.end()?;
    let times = |way: &str| rows.get(way).map_or(&[][..], |row| &row.total_ms);
    if options.json {
        let samples: BTreeMap<&str, &[f64]> = WAYS.into_iter().map(|way| (way, times(way))).collect();
        println!("{}", json!({ "load": load, "total_ms": samples, "memory_kib": floods, "alone_us": alone }));
        return Ok(());
    }
    println!(
        "A guest of {} with 256M in use, TCP with TLS, {} connections in {} ms, medians of {} (lowest to highest), load {}\n",
        options.memory,
        options.connections,
        options.over_ms,
        options.runs,
        load.map_or("unknown".into(), |load| load.to_string())
    );
    println!(
        "| meanwhile | total ms | downtime ms | connections during the migration | against peace | against a flood elsewhere |\n|{}",
        " --- |".repeat(6)
    );
    // Pairs of one run, so that what drifts falls out.
    let against =
        |way: &str, other: &str| median(times(way).iter().zip(times(other)).map(|(here, there)| (here / there - 1.0) * 100.0));
    for way in WAYS {
        let Some(row) = rows.get(way) else { continue };
        let percent = |other| against(way, other).map_or_else(String::new, |percent| format!("{percent:+.1} %"));
        let columns = [cell(&row.total_ms), cell(&row.downtime_ms), cell(&row.made), percent(WAYS[0]), percent(WAYS[1])];
        println!("| {way} | {} |", columns.join(" | "));
    }
    println!("\na flood while nothing moves: {} microseconds of the agent's processor time a connection", cell(&alone));
    println!("\nmemory of the flooded agent in KiB, its own (with the guest's that it maps): before, during, after");
    for [before, during, after] in floods {
        println!("{} ({}), {} ({}), {} ({})", before.0, before.1, during.0, during.1, after.0, after.1);
    }
    Ok(())
}
