//! From a record to what people read: the table in docs/BENCHMARKS.md, between two markers, and the plot beside the record. Nothing
//! is in either that is not in the record; what was not measured is an empty cell.

use super::machine::Machine;
use super::plot;
use super::record::{Case, Kind, Run, Sample};
use anyhow::{Context, Result};
use std::fmt::Write as _;
use std::path::Path;

/// The page with all tables, from the root of the repository.
const PAGE: &str = "docs/BENCHMARKS.md";
/// Below this many bytes per second the unit is MB/s.
const GIGABYTES_FROM: f64 = 5e8;

/// How rates of one run are shown.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Unit {
    pub(crate) name: &'static str,
    pub(crate) bytes_per_s: f64,
    decimals: usize,
}

impl Unit {
    /// The unit in which the run's rates read best.
    pub(crate) fn of(run: &Run) -> Unit {
        // Zero pages do not travel: their rate is another matter.
        let travel = run.cases.iter().filter(|case| case.mix.as_deref() != Some("zero"));
        let most = travel.filter_map(|case| case.median(Sample::rate)).fold(0.0, f64::max);
        if most < GIGABYTES_FROM {
            Unit { name: "MB/s", bytes_per_s: 1e6, decimals: 1 }
        } else {
            Unit { name: "GB/s", bytes_per_s: 1e9, decimals: 2 }
        }
    }

    pub(crate) fn show(self, rate: f64) -> String {
        format!("{:.*}", self.decimals, rate / self.bytes_per_s)
    }
}

/// What a case has to say in a column.
type Cell = dyn Fn(&Case) -> Option<String>;

/// A column of the table.
struct Column {
    heading: String,
    cell: Box<Cell>,
}

fn column(heading: impl Into<String>, cell: impl Fn(&Case) -> Option<String> + 'static) -> Column {
    Column { heading: heading.into(), cell: Box::new(cell) }
}

/// A column of the median of one number.
fn number(heading: &str, decimals: usize, pick: impl Fn(&Sample) -> Option<f64> + 'static) -> Column {
    column(heading, move |case| Some(format!("{:.decimals$}", case.median(&pick)?)))
}

/// "source + destination", each where it was measured.
fn both(heading: &str, source: fn(&Sample) -> Option<f64>, destination: fn(&Sample) -> Option<f64>) -> Column {
    column(heading, move |case| {
        let per_gib = |pick: fn(&Sample) -> Option<f64>| case.median(|sample| sample.per_gib(pick(sample)));
        match (per_gib(source), per_gib(destination)) {
            (None, None) => None,
            (source, destination) => {
                let show = |value: Option<f64>| value.map_or_else(|| "?".to_owned(), |value| format!("{value:.2}"));
                Some(format!("{} + {}", show(source), show(destination)))
            }
        }
    })
}

fn share(part: Option<f64>, sample: &Sample) -> Option<f64> {
    part.filter(|_| sample.seconds > 0.0).map(|part| 100.0 * part / sample.seconds)
}

#[allow(clippy::cast_precision_loss, reason = "a share for people")]
fn of_memory(sample: &Sample, part: Option<u64>) -> Option<f64> {
    part.filter(|_| sample.bytes > 0).map(|part| part as f64 / sample.bytes as f64)
}

fn columns(run: &Run) -> Vec<Column> {
    let unit = Unit::of(run);
    let spread = move |case: &Case| {
        let rates = || case.samples.iter().filter_map(Sample::rate);
        let (low, high) = (rates().fold(f64::INFINITY, f64::min), rates().fold(0.0, f64::max));
        (rates().count() > 1).then(|| format!("{} to {}", unit.show(low), unit.show(high)))
    };
    let ratios = run.clone();
    vec![
        column("what", |case| Some(case.name.clone())),
        column("lanes", |case| case.lanes.map(|lanes| lanes.to_string())),
        column("pages", |case| case.mix.clone()),
        column(unit.name, move |case| case.median(Sample::rate).map(|rate| unit.show(rate))),
        column("lowest to highest", spread),
        column("of its ceiling", move |case| ratios.of_ceiling(case).map(|ratio| format!("{ratio:.2}"))),
        number("total ms", 0, |sample| sample.total_ms),
        number("prepare ms", 0, |sample| sample.prepare_ms),
        number("downtime ms", 1, |sample| sample.downtime_ms),
        both("CPU s/GiB, source + destination", |sample| sample.cpu_source, |sample| sample.cpu_destination),
        both("CPU s/GiB of the machines", |sample| sample.machine_source, |sample| sample.machine_destination),
        number("whole CPU s/GiB", 2, |sample| sample.per_gib(sample.cpu_whole)),
        number("wire bytes / memory", 3, |sample| of_memory(sample, sample.wire_bytes)),
        number("RDMA bytes / memory", 3, |sample| of_memory(sample, sample.rdma_bytes)),
        number("doorbells / 8 MiB", 2, Sample::doorbells_per_8_mib),
        number("lanes wait for registration, %", 1, |sample| share(sample.registering_source, sample)),
        number("destination registers, %", 1, |sample| share(sample.registering_destination, sample)),
    ]
}

/// The table of a run. Columns in which nothing is are left out.
fn table(run: &Run) -> String {
    let rows: Vec<&Case> = run.cases.iter().filter(|case| !case.samples.is_empty()).collect();
    let columns: Vec<Column> =
        columns(run).into_iter().filter(|column| rows.iter().any(|case| (column.cell)(case).is_some())).collect();
    let line = |cells: Vec<String>| format!("| {} |\n", cells.join(" | "));
    let mut text = line(columns.iter().map(|column| column.heading.clone()).collect());
    text += &line(columns.iter().map(|_| "---".to_owned()).collect());
    for case in rows {
        text += &line(columns.iter().map(|column| (column.cell)(case).unwrap_or_default()).collect());
    }
    text
}

#[allow(clippy::cast_precision_loss, reason = "a size for people")]
fn machine_words(name: &str, machine: &Machine) -> String {
    let mut words = vec![machine.kind.clone()];
    words.extend(machine.cpu.clone());
    words.push(format!("{} cores", machine.cores));
    words.extend(machine.memory_bytes.map(|bytes| format!("{:.0} GiB", bytes as f64 / super::GIB)));
    words.extend(machine.kernel.clone());
    words.extend(machine.congestion_control.as_ref().map(|name| format!("TCP {name}")));
    words.extend(machine.mtu.map(|mtu| format!("MTU {mtu}")));
    words.extend(machine.huge_pages.as_ref().map(|setting| format!("huge pages: {setting}")));
    words.extend(machine.load.map(|load| format!("load {load:.2} at the start")));
    if !machine.optimised {
        words.push("**not optimised: no figures**".to_owned());
    }
    format!("{name}: {}", words.join(", "))
}

/// All that stands between the markers.
fn block(run: &Run, record: &str, plot: &str) -> String {
    let samples = run.cases.iter().map(|case| case.samples.len()).max().unwrap_or(0);
    let commit = run.commit.as_deref().unwrap_or("unknown");
    let mut text =
        format!("{} ({}, commit {commit}, medians of up to {samples} samples, [record]({record})).\n\n", run.title, run.date);
    for (name, machine) in &run.machines {
        let _ = writeln!(text, "- {}", machine_words(name, machine));
    }
    for note in &run.notes {
        let _ = writeln!(text, "- {note}");
    }
    for words in &run.skipped {
        let _ = writeln!(text, "- not measured: {words}");
    }
    let _ = write!(text, "\n{}\n![{}]({plot})\n", table(run), run.title);
    text
}

pub(crate) fn replace_block(page: &str, name: &str, block: &str) -> Option<String> {
    let (begin, end) = (format!("<!-- begin {name} -->\n"), format!("<!-- end {name} -->"));
    let (before, rest) = page.split_once(&begin)?;
    let (_, after) = rest.split_once(&end)?;
    Some(format!("{before}{begin}{block}{end}{after}"))
}

/// Draws the plot of the record `path` beside it and writes its table into docs/BENCHMARKS.md.
///
/// # Errors
/// The record is none, the page has no place for it, or something cannot be written.
pub(crate) fn render(path: &Path) -> Result<()> {
    let run = Run::load(path)?;
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let svg = path.with_extension("svg");
    plot::draw(&run, &svg)?;
    let page_path = root.join(PAGE);
    let page = std::fs::read_to_string(&page_path).with_context(|| format!("{} cannot be read", page_path.display()))?;
    let link = |path: &Path| {
        let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
        format!("benchmarks/{name}")
    };
    let written = replace_block(&page, &run.benchmark, &block(&run, &link(path), &link(&svg))).with_context(|| {
        format!("{PAGE} has no place for it: write the lines \"<!-- begin {0} -->\" and \"<!-- end {0} -->\"", run.benchmark)
    })?;
    std::fs::write(&page_path, written).with_context(|| format!("{} cannot be written", page_path.display()))
}

/// Whether a case belongs into a plot of rates by lanes.
pub(crate) fn is_point(case: &Case) -> bool {
    case.kind == Kind::Lanes && case.lanes.is_some()
}

/// The table alone, for the terminal.
pub(crate) fn print(run: &Run) -> String {
    let mut text = format!("{}\n", run.title);
    for words in &run.skipped {
        let _ = writeln!(text, "not measured: {words}");
    }
    text + &table(run)
}
