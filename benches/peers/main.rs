//! Whole migrations by link, beside peers on one machine, in one run, interleaved: iperf3 as the ceiling of the path, QEMU at its best
//! setting with the same guest. With `--lab` the links alone, RDMA too, between the two machines of the soft-RoCE lab.
//!
//! `cargo bench -p rig --bench peers -- [--memory 2G] [--runs 3] [--lanes 2] [--json FILE]` as root, on an otherwise idle machine.
#![allow(clippy::print_stdout, clippy::print_stderr, reason = "a benchmark prints")]
#![forbid(unsafe_code)]

#[path = "../common/mod.rs"]
mod common;
mod lab;
mod namespaces;

use anyhow::{Context, Result, ensure};
use clap::Parser;
use common::record::{Case, Kind, Run, Sample};
use common::{machine, render};
use serde_json::Value;
use std::path::PathBuf;

/// Whole migrations by link, beside peers.
#[derive(Debug, Clone, Parser)]
#[command(name = "peers")]
pub(crate) struct Options {
    /// Memory of the guest; without it 2G, in the lab 96M
    #[arg(long, value_parser = mebibytes)]
    memory: Option<u64>,
    /// How often everything is measured, interleaved
    #[arg(long, default_value_t = 3)]
    runs: u32,
    /// Lanes of the rows with several
    #[arg(long, default_value_t = 2)]
    lanes: u16,
    /// Leave QEMU out
    #[arg(long)]
    no_qemu: bool,
    /// Measure between the two machines of the soft-RoCE lab
    #[arg(long)]
    lab: bool,
    /// Write every sample, and the machine's description, into this file
    #[arg(long)]
    json: Option<PathBuf>,
    /// Measure nothing: draw the plot of this file and write its table into docs/BENCHMARKS.md
    #[arg(long, conflicts_with_all = ["json", "lab"])]
    render: Option<PathBuf>,
    /// Given by `cargo bench`
    #[arg(long, hide = true)]
    bench: bool,
}

impl Options {
    /// Guest memory in MiB.
    pub(crate) fn memory_mib(&self) -> u64 {
        self.memory.unwrap_or(if self.lab { 96 } else { 2048 })
    }
}

fn mebibytes(text: &str) -> Result<u64, String> {
    let (number, unit) = text.split_at_checked(text.len().saturating_sub(1)).unwrap_or(("", ""));
    let number: u64 = number.parse().map_err(|_| format!("\"{text}\" is no size: write 512M or 2G"))?;
    match unit {
        "G" => Ok(number << 10),
        "M" => Ok(number),
        _ => Err(format!("\"{text}\" is no size: write 512M or 2G")),
    }
}

/// How Limosa moves a guest in one row.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Way {
    pub(crate) name: &'static str,
    pub(crate) link: &'static str,
    pub(crate) lanes: u16,
    pub(crate) plaintext: bool,
    pub(crate) touched: bool,
    /// Only RDMA has the choice.
    pub(crate) page_check: Option<bool>,
}

impl Way {
    /// The row without samples.
    pub(crate) fn case(&self) -> Case {
        Case {
            name: self.name.to_owned(),
            kind: Kind::Migration,
            series: self.name.to_owned(),
            link: Some(self.link.to_owned()),
            lanes: Some(self.lanes),
            mix: None,
            ceiling: None,
            samples: Vec::new(),
        }
    }

    /// The words behind `limosa migrate VM --to HOST`.
    pub(crate) fn words(&self) -> Vec<String> {
        let mut words = vec!["--link".to_owned(), self.link.to_owned(), "--lanes".to_owned(), self.lanes.to_string()];
        words.extend(self.plaintext.then(|| "--plaintext".to_owned()));
        words.extend(self.page_check.map(|check| if check { "--page-check" } else { "--no-page-check" }.to_owned()));
        words
    }
}

/// What a report says.
///
/// # Errors
/// It lacks something that every report has.
pub(crate) fn sample(report: &Value, touched: bool) -> Result<Sample> {
    let number = |key: &str| report[key].as_f64().with_context(|| format!("the report has no {key}: {report}"));
    let bytes = report["memory_bytes"].as_u64().context("the report has no memory_bytes")?;
    let rate = number("goodput_bytes_per_s")?;
    #[allow(clippy::cast_precision_loss, reason = "a size for people")]
    let sending = bytes as f64 / rate.max(1.0);
    Ok(Sample {
        bytes,
        // Memory that was never touched does not move, so it has no rate.
        seconds: if touched { sending } else { 0.0 },
        wire_bytes: report["bytes_on_wire"].as_u64(),
        cpu_source: report["cpu_seconds"]["source"].as_f64(),
        cpu_destination: report["cpu_seconds"]["destination"].as_f64(),
        prepare_ms: Some(number("prepare_ms")?),
        total_ms: Some(number("total_ms")? - number("prepare_ms")?),
        downtime_ms: Some(number("downtime_ms")?),
        ..Sample::default()
    })
}

fn title(options: &Options) -> String {
    let place = if options.lab { "between two lab machines" } else { "between two network namespaces" };
    format!("Whole migrations of an idle guest of {} MiB {place}", options.memory_mib())
}

fn main() -> Result<()> {
    let options = Options::parse();
    if let Some(path) = &options.render {
        return render::render(path);
    }
    // `cargo test --benches` and listings call without `--bench`: nothing is measured then.
    if !options.bench {
        return Ok(());
    }
    let needs = if options.lab { rig::roce::missing() } else { None };
    let root = nix::unistd::geteuid().is_root();
    if let Some(words) = needs.or((!root).then(|| "the benchmark needs root (namespaces, KVM)".to_owned())) {
        println!("skipped: {words}");
        ensure!(std::env::var_os("LIMOSA_DEMAND_ALL").is_none(), "{words}");
        return Ok(());
    }
    let mut run = Run::new(if options.lab { "peers-lab" } else { "peers" }, &title(&options));
    if options.lab {
        lab::measure(&options, &mut run)?;
    } else {
        run.machines.insert(
            "both hosts".into(),
            machine::describe("this machine, two network namespaces joined by veths and a bridge", "lo"),
        );
        namespaces::measure(&options, &mut run)?;
    }
    print!("{}", render::print(&run));
    if let Some(path) = &options.json {
        run.save(path)?;
        eprintln!("written: {0} (`cargo bench -p rig --bench peers -- --render {0}` makes table and plot)", path.display());
    }
    Ok(())
}
