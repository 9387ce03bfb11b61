//! The fixed part of the downtime: a small idle guest goes there and back between two hosts of this machine, over each link in
//! turn, with the journal on. Beside it, in the same run, what one append with fsync costs in the folders of the two journals. With
//! `--writes` the guest is not idle, and the last round is what it costs. No plot.
//!
//! `cargo bench -p rig --bench downtime -- [--runs 21] [--memory 64M] [--writes 200M --working-set 256M] [--json]` as root, on an
//! otherwise idle machine.
#![allow(clippy::print_stdout, clippy::print_stderr, reason = "a benchmark prints")]
#![forbid(unsafe_code)]

#[path = "common/mod.rs"]
mod common;

use anyhow::{Context, Result, ensure};
use clap::Parser;
use common::machine::{self, Machine};
use common::spread;
use rig::{AgentConfig, GuestSpec, Host, Lab};
use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::fs::File;
use std::io::Write as _;
use std::path::Path;
use std::time::Instant;

/// The parts of a downtime as reports name them, in their order.
const PARTS: [&str; 5] = ["pause", "last_round", "state", "commit", "resume"];
/// Bytes of an append: about a record of the journal.
const RECORD_BYTES: usize = 128;

/// The fixed part of the downtime.
#[derive(Debug, Parser)]
#[command(name = "downtime")]
struct Options {
    /// Migrations over each link
    #[arg(long, default_value_t = 21)]
    runs: u32,
    /// Links, interleaved
    #[arg(long, value_delimiter = ',', default_value = "tcp,quic")]
    links: Vec<String>,
    /// Memory of the guest
    #[arg(long, default_value = "64M")]
    memory: String,
    /// What the guest writes in a second
    #[arg(long, default_value = "0")]
    writes: String,
    /// The memory that it writes
    #[arg(long, default_value = "1M")]
    working_set: String,
    /// Print every sample as JSON
    #[arg(long)]
    json: bool,
    /// Given by cargo
    #[arg(long, hide = true)]
    bench: bool,
}

/// Milliseconds, sample by sample.
type Samples = Vec<f64>;

/// Every sample of one link: the whole downtime as "downtime", each of [`PARTS`], and what the guest saw as "own gap".
type Row = BTreeMap<&'static str, Samples>;

/// Milliseconds of appending a record to `file` and bringing it to the disk.
fn append(file: &mut File) -> Result<f64> {
    let start = Instant::now();
    file.write_all(&[0x5a; RECORD_BYTES])?;
    file.sync_all()?;
    Ok(start.elapsed().as_secs_f64() * 1e3)
}

fn record(report: &Value, link: &str, row: &mut Row) -> Result<()> {
    ensure!(report["link"] == link, "it went over another link: {report}");
    let whole = report["downtime_ms"].as_f64().with_context(|| format!("no downtime: {report}"))?;
    row.entry("downtime").or_default().push(whole);
    for part in PARTS {
        let value = report["downtime_parts_ms"][part].as_f64().with_context(|| format!("no part {part}: {report}"))?;
        row.entry(part).or_default().push(value);
    }
    Ok(())
}

/// The largest gap between two turns of the guest's own loop, by its TSC, in the first heartbeat after the move, in milliseconds. A
/// turn of an idle guest ends with a sleep of about one.
fn own_gap(serial: &str, known: usize) -> Result<f64> {
    let fresh = serial.get(known..).unwrap_or(serial);
    let beat = fresh.lines().find(|line| line.starts_with("limosa-guest heartbeat")).context("no heartbeat after the move")?;
    let gap = beat.split_whitespace().find_map(|field| field.strip_prefix("gap_us="));
    Ok(gap.with_context(|| format!("no gap in {beat}"))?.parse::<f64>()? / 1e3)
}

/// A file of the bench's own beside a host's journal.
fn probe(host: &Host) -> Result<File> {
    let path = host.state_dir().join("fsync-probe");
    File::create(&path).with_context(|| format!("{} cannot be made", path.display()))
}

/// There and back, `options.runs` times over each link, and as many appends beside each.
fn measure(options: &Options) -> Result<(BTreeMap<String, Row>, Samples)> {
    let mut lab = Lab::two_hosts()?;
    lab.start_agents(AgentConfig::default())?;
    let spec = GuestSpec::new("bench", 1).memory(&options.memory, "16M").dirty(&options.writes, &options.working_set);
    lab.guest(&spec)?;
    let (mut rows, mut appends) = (BTreeMap::<String, Row>::new(), Samples::new());
    let mut probes = [probe(&lab.a)?, probe(&lab.b)?];
    let (mut from, mut to) = (&lab.a, &lab.b);
    for run in 1..=options.runs {
        eprint!("\rrun {run} of {}", options.runs);
        for link in &options.links {
            for file in &mut probes {
                appends.push(append(file)?);
            }
            let known = to.serial(&spec.name).len();
            let report = from.migrate_well(&spec.name, to, &["--link", link])?;
            lab.guest_is_on(&spec, to, from)?;
            let row = rows.entry(link.clone()).or_default();
            record(&report, link, row)?;
            row.entry("own gap").or_default().push(own_gap(&to.serial(&spec.name), known)?);
            (from, to) = (to, from);
        }
    }
    eprintln!();
    lab.end()?;
    Ok((rows, appends))
}

fn words(machine: &Machine) -> String {
    let or_unknown = |text: &Option<String>| text.clone().unwrap_or_else(|| "unknown".into());
    format!("{}, {} cores, {}", or_unknown(&machine.cpu), machine.cores, or_unknown(&machine.kernel))
}

fn print(options: &Options, rows: &BTreeMap<String, Row>, appends: &[f64], load: Option<f64>, place: &Path) {
    let Options { memory, writes, working_set, runs, .. } = options;
    println!(
        "Downtime of a guest of {memory} that writes {writes} a second of {working_set}, journal on, medians of {runs} (lowest to highest), ms"
    );
    println!("{}, load {}", words(&machine::describe("", "lo")), load.map_or("unknown".into(), |load| load.to_string()));
    println!("journals lie in {}\n", place.display());
    println!("| link | downtime | {} | guest's own gap |\n| --- |{}", PARTS.join(" | "), " --- |".repeat(PARTS.len() + 2));
    for link in &options.links {
        let Some(row) = rows.get(link) else { continue };
        let cell = |name| row.get(name).map_or_else(String::new, |samples| spread(samples, 2).unwrap_or_default());
        println!("| {link} | {} | {} | {} |", cell("downtime"), PARTS.map(cell).join(" | "), cell("own gap"));
    }
    println!(
        "\none append of {RECORD_BYTES} bytes with fsync beside the journals, same run, {} samples: {}",
        appends.len(),
        spread(appends, 2).unwrap_or_default()
    );
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
    let load = machine::describe("", "lo").load;
    let (rows, appends) = measure(&options)?;
    if options.json {
        println!("{}", json!({ "memory": options.memory, "load": load, "links_ms": rows, "append_fsync_ms": appends }));
        return Ok(());
    }
    print(&options, &rows, &appends, load, &std::env::temp_dir());
    Ok(())
}
