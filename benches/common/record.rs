//! The record of a run: one JSON file with the machine, every case and every single sample. Medians, tables and plots are made
//! of it later. What was not measured is not there: no zero, no NaN stands for it.

use super::machine::Machine;
use super::median;
use anyhow::{Context, Result, ensure};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::path::Path;

/// The form of the file. A reader knows no other.
const FORMAT: u32 = 1;

/// One run of a benchmark.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct Run {
    /// [`FORMAT`].
    pub(crate) format: u32,
    /// Which benchmark: "links", "peers".
    pub(crate) benchmark: String,
    /// One line about it.
    pub(crate) title: String,
    /// Day in UTC.
    pub(crate) date: String,
    /// The options that it was called with.
    pub(crate) options: Vec<String>,
    /// Commit of the sources; "+" behind it: with changes.
    pub(crate) commit: Option<String>,
    /// Where it was measured: the source's end, and the destination's where that is another machine.
    pub(crate) machines: BTreeMap<String, Machine>,
    /// What else a reader must know.
    pub(crate) notes: Vec<String>,
    /// What was measured.
    pub(crate) cases: Vec<Case>,
    /// What could not be measured, and why.
    pub(crate) skipped: Vec<String>,
}

/// What a row is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum Kind {
    /// What the path can do, by a program that does nothing else.
    Ceiling,
    /// Another program, at its best setting or as said.
    Peer,
    /// Raw lanes: the page pass of a migration without a guest.
    Lanes,
    /// A whole migration.
    Migration,
}

/// One way to move bytes.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct Case {
    /// What it is called in the table.
    pub(crate) name: String,
    /// What it is.
    pub(crate) kind: Kind,
    /// The line of the plot that it is a point of.
    pub(crate) series: String,
    /// The link, for lanes and migrations.
    pub(crate) link: Option<String>,
    /// How many lanes, streams or queue pairs.
    pub(crate) lanes: Option<u16>,
    /// What the pages hold.
    pub(crate) mix: Option<String>,
    /// How the names of the ceilings begin with which it is compared: with the best of them.
    pub(crate) ceiling: Option<String>,
    /// Every sample, in the order of the runs.
    pub(crate) samples: Vec<Sample>,
}

/// One measurement. `bytes` are what was to be moved: guest memory, zero pages included, or payload.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub(crate) struct Sample {
    pub(crate) bytes: u64,
    pub(crate) seconds: f64,
    /// Bytes handed to the link.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) wire_bytes: Option<u64>,
    /// CPU seconds of the source's process.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) cpu_source: Option<f64>,
    /// CPU seconds of the destination's process.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) cpu_destination: Option<f64>,
    /// CPU seconds of the source's whole machine, its kernel's threads included.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) machine_source: Option<f64>,
    /// The same of the destination's.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) machine_destination: Option<f64>,
    /// How often a list of work requests was handed to the device (RDMA).
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) doorbells: Option<u64>,
    /// Bytes of guest memory that RDMA wrote.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) rdma_bytes: Option<u64>,
    /// Seconds of registering memory that lanes waited for, at the source (RDMA).
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) registering_source: Option<f64>,
    /// Seconds of registering memory at the destination, beside the lanes (RDMA).
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) registering_destination: Option<f64>,
    /// Of whole migrations: until the destination was prepared, milliseconds.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) prepare_ms: Option<f64>,
    /// From then to the end.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) total_ms: Option<f64>,
    /// How long the guest stood still.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) downtime_ms: Option<f64>,
    /// CPU seconds of all processes of the migration, preparing the destination's memory included.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) cpu_whole: Option<f64>,
}

#[allow(clippy::cast_precision_loss, reason = "sizes and counts for people")]
impl Sample {
    /// Bytes per second.
    pub(crate) fn rate(&self) -> Option<f64> {
        (self.seconds > 0.0).then(|| self.bytes as f64 / self.seconds)
    }

    /// `seconds` for each GiB of `bytes`.
    pub(crate) fn per_gib(&self, seconds: Option<f64>) -> Option<f64> {
        seconds.filter(|_| self.bytes > 0).map(|seconds| seconds / (self.bytes as f64 / super::GIB))
    }

    /// Doorbells for each 8 MiB.
    pub(crate) fn doorbells_per_8_mib(&self) -> Option<f64> {
        self.doorbells.filter(|_| self.bytes > 0).map(|rings| rings as f64 / (self.bytes as f64 / f64::from(8 << 20)))
    }
}

impl Case {
    /// The median of something over the samples that have it.
    pub(crate) fn median(&self, pick: impl Fn(&Sample) -> Option<f64>) -> Option<f64> {
        median(self.samples.iter().filter_map(pick))
    }
}

impl Run {
    /// A run that has measured nothing yet.
    pub(crate) fn new(benchmark: &str, title: &str) -> Run {
        Run {
            format: FORMAT,
            benchmark: benchmark.to_owned(),
            title: title.to_owned(),
            date: super::today::today(),
            options: std::env::args().skip(1).filter(|word| word != "--bench").collect(),
            commit: super::machine::commit(),
            machines: BTreeMap::new(),
            notes: Vec::new(),
            cases: Vec::new(),
            skipped: Vec::new(),
        }
    }

    /// What `case` reached of the best of its ceilings: the ratio of the two medians.
    pub(crate) fn of_ceiling(&self, case: &Case) -> Option<f64> {
        let name = case.ceiling.as_deref()?;
        let ceilings = self.cases.iter().filter(|other| other.kind == Kind::Ceiling && other.name.starts_with(name));
        let best = ceilings.filter_map(|ceiling| ceiling.median(Sample::rate)).reduce(f64::max)?;
        case.median(Sample::rate).map(|rate| rate / best)
    }

    /// Reads a file.
    ///
    /// # Errors
    /// It cannot be read, or is no record of this form.
    pub(crate) fn load(path: &Path) -> Result<Run> {
        let text = std::fs::read_to_string(path).with_context(|| format!("{} cannot be read", path.display()))?;
        let run: Run = serde_json::from_str(&text).with_context(|| format!("{} is no record of a run", path.display()))?;
        ensure!(run.format == FORMAT, "{} has form {}, this program knows {FORMAT}", path.display(), run.format);
        Ok(run)
    }

    /// Writes a file, or writes it anew.
    ///
    /// # Errors
    /// It cannot be written.
    pub(crate) fn save(&self, path: &Path) -> Result<()> {
        if let Some(folder) = path.parent() {
            std::fs::create_dir_all(folder)?;
        }
        let text = serde_json::to_string_pretty(self)? + "\n";
        std::fs::write(path, text).with_context(|| format!("{} cannot be written", path.display()))
    }
}
