//! What people and machines see: results on standard output, progress and warnings on standard error.
//! It decides nothing; commands hand it what they have.

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use limosa_agent::api::{ApiError, Direction, JobInfo, JobState};
use limosa_proto::report::{LinkTried, Report};
use serde::Serialize;
use std::io::{IsTerminal as _, Write as _};
use std::time::Duration;

/// A line of a result.
pub(crate) fn line(text: impl AsRef<str>) {
    // A reader that has gone away is no failure of the command.
    let _ = writeln!(std::io::stdout().lock(), "{}", text.as_ref());
}

/// A line that is no result: progress, warnings, advice.
pub(crate) fn note(text: impl AsRef<str>) {
    let _ = writeln!(std::io::stderr().lock(), "{}", text.as_ref());
}

/// A result for machines.
pub(crate) fn json(value: &impl Serialize) {
    match serde_json::to_string_pretty(value) {
        Ok(text) => line(text),
        Err(error) => note(format!("limosa: the result cannot be shown as JSON: {error}")),
    }
}

/// An error: in words, and for machines too if they read.
pub(crate) fn error(as_json: bool, error: &ApiError) {
    if as_json {
        json(&serde_json::json!({ "error": error }));
    }
    note(format!("limosa: {}", error.words));
}

/// Columns, padded; the first row is the head.
pub(crate) fn table(rows: &[Vec<String>]) {
    let columns = rows.iter().map(Vec::len).max().unwrap_or(0);
    let width = |column: usize| rows.iter().filter_map(|row| row.get(column)).map(|cell| cell.chars().count()).max().unwrap_or(0);
    let widths: Vec<usize> = (0..columns).map(width).collect();
    for row in rows {
        let cells = row.iter().zip(&widths).map(|(cell, width)| format!("{cell:<width$}"));
        line(cells.collect::<Vec<_>>().join("  ").trim_end());
    }
}

/// `1.5 GiB`.
pub(crate) fn bytes(count: u64) -> String {
    const UNITS: [&str; 5] = ["B", "KiB", "MiB", "GiB", "TiB"];
    let mut value = count as f64;
    let mut unit = UNITS[0];
    for larger in UNITS.iter().skip(1) {
        if value < 1024.0 {
            break;
        }
        value /= 1024.0;
        unit = larger;
    }
    if unit == "B" { format!("{count} B") } else { format!("{value:.1} {unit}") }
}

/// The progress of a migration: a bar on a terminal, a line per change of phase elsewhere.
pub(crate) struct Progress {
    bar: Option<ProgressBar>,
    last: (String, u32),
    quiet: bool,
}

impl Progress {
    pub(crate) fn new(quiet: bool) -> Progress {
        let on_terminal = std::io::stderr().is_terminal() && !quiet;
        let bar = on_terminal.then(|| {
            let bar = ProgressBar::with_draw_target(Some(1), ProgressDrawTarget::stderr_with_hz(10));
            let style = ProgressStyle::with_template("{spinner} {prefix:<24} [{bar:30}] {msg}")
                .unwrap_or_else(|_| ProgressStyle::default_bar());
            bar.set_style(style.progress_chars("=> "));
            bar.enable_steady_tick(Duration::from_millis(100));
            bar
        });
        Progress { bar, last: (String::new(), 0), quiet }
    }

    pub(crate) fn show(&mut self, job: &JobInfo) {
        let Some(progress) = &job.progress else { return };
        let estimate = progress.estimate_ms.map_or(String::new(), |ms| format!(", about {:.1} s to go", ms as f64 / 1000.0));
        let what = format!(
            "{} left of this round, {}/s, the guest writes {}/s{estimate}",
            bytes(progress.bytes_remaining),
            bytes(progress.rate_bytes_per_s),
            bytes(progress.dirty_bytes_per_s)
        );
        let head = match progress.round {
            0 => progress.phase.clone(),
            round => format!("{}, round {round}", progress.phase),
        };
        if let Some(bar) = &self.bar {
            bar.set_length(progress.memory_bytes.max(1));
            bar.set_position(progress.memory_bytes.saturating_sub(progress.bytes_remaining));
            bar.set_prefix(head);
            bar.set_message(what);
        } else if !self.quiet && progress.round == 0 && progress.phase != self.last.0 {
            self.last = (progress.phase.clone(), 0);
            note(head);
        } else if !self.quiet && (&progress.phase, progress.round) != (&self.last.0, self.last.1) {
            self.last = (progress.phase.clone(), progress.round);
            note(format!("{head}: {what}"));
        }
    }

    pub(crate) fn done(self) {
        if let Some(bar) = self.bar {
            bar.finish_and_clear();
        }
    }
}

/// A migration's report as rows of name and value.
pub(crate) fn report_rows(report: &Report) -> Vec<(String, String)> {
    let mut rows = vec![];
    if report.paused {
        rows.push(("downtime".into(), "none: it was paused all along, and still is".into()));
    }
    if let Some(downtime) = report.downtime_ms {
        let quick = if report.quick { ", as quick as could be: paused first, then sent at once" } else { "" };
        rows.push(("downtime".into(), format!("{downtime:.1} ms{quick}")));
    }
    if let Some(parts) = &report.downtime_parts_ms {
        let words = format!(
            "pause {:.1}, last round {:.1}, state {:.1}, commit {:.1}, resume {:.1} ms",
            parts.pause, parts.last_round, parts.state, parts.commit, parts.resume
        );
        rows.push(("  of it".into(), words));
    }
    if let Some(gap) = report.network_gap_ms {
        let by = report.network_gap_by.as_ref().map_or(String::new(), |by| format!(", by {by}"));
        rows.push(("network gap".into(), format!("{gap:.1} ms{by}")));
    }
    let prepare = report.prepare_ms.map_or(String::new(), |ms| format!(", of it {ms:.0} ms until the destination was prepared"));
    rows.extend([
        ("total".into(), format!("{:.0} ms{prepare}", report.total_ms)),
        ("rounds".into(), report.rounds.to_string()),
        ("memory".into(), bytes(report.memory_bytes)),
        ("on the wire".into(), format!("{} at {}/s", bytes(report.bytes_on_wire), bytes(report.goodput_bytes_per_s as u64))),
        ("zero pages".into(), report.zero_pages.to_string()),
    ]);
    rows.extend(link_rows(report));
    let cpu = &report.cpu_seconds;
    rows.push((
        "CPU".into(),
        format!("source {:.2} s, destination {:.2} s, {:.2} s a GiB", cpu.source, cpu.destination, report.cpu_seconds_per_gib),
    ));
    let first = |words: &&String| words.starts_with("round 0 ");
    let shown: Vec<&String> = report.announcements.iter().filter(first).collect();
    for (index, words) in shown.iter().enumerate() {
        rows.push((if index == 0 { "announced".into() } else { String::new() }, (*words).clone()));
    }
    if let more @ 1.. = report.announcements.len() - shown.len() {
        rows.push((String::new(), format!("and {more} more in the rounds after it")));
    }
    rows
}

/// Which link it was, why, and what else was looked at.
fn link_rows(report: &Report) -> Vec<(String, String)> {
    let plural = if report.lanes == 1 { "" } else { "s" };
    let protection = protection(&report.link, report.encrypted);
    let mut rows = vec![("link".into(), format!("{}, {} lane{plural}, {protection}", report.link, report.lanes))];
    if !report.link_reason.is_empty() {
        rows.push(("  why".into(), report.link_reason.clone()));
    }
    // The one that was taken has its reason above, and few hosts have RDMA: it is told where it was near.
    let near = |one: &&LinkTried| one.link != report.link && !(one.link == "rdma" && one.words.contains("not on this host"));
    for one in report.links_tried.iter().filter(near) {
        rows.push(("  beside it".into(), tried(one)));
    }
    match report.page_check {
        Some(true) => {
            rows.push(("page check".into(), "every page that arrived has the keyed hash of the one that was sent".into()))
        }
        Some(false) => rows.push(("page check".into(), "OFF: what arrived was not compared with what was sent".into())),
        None => {}
    }
    rows
}

/// How guest memory is protected on a link.
pub(crate) fn protection(link: &str, encrypted: bool) -> &'static str {
    match (encrypted, link) {
        (true, _) => "encrypted (TLS 1.3)",
        (false, "rdma") => "NOT ENCRYPTED, within a trusted fabric",
        (false, _) => "PLAIN TEXT",
    }
}

/// What was learnt of a link, in one line.
pub(crate) fn tried(one: &LinkTried) -> String {
    let mut measured = Vec::new();
    measured.extend(one.round_trip_us.map(|us| format!("round trip {us:.0} µs")));
    // Where links were compared, the words have the figures.
    let rate = one.probe_bytes_per_s.filter(|_| !one.words.contains("MB/s"));
    measured.extend(rate.map(|rate| format!("probe {}/s", bytes(rate as u64))));
    let measured = if measured.is_empty() { String::new() } else { format!(" ({})", measured.join(", ")) };
    format!("{}: {}{measured}", one.link, one.words)
}

/// What a job came to (an object, or nothing), with the job's own fields and `more` beside it, as machines get it.
pub(crate) fn with_job(
    came_to: &impl Serialize,
    job: &JobInfo,
    more: impl IntoIterator<Item = (&'static str, serde_json::Value)>,
) -> serde_json::Value {
    let came_to = serde_json::to_value(came_to).unwrap_or_default();
    let mut fields = if let serde_json::Value::Object(fields) = came_to { fields } else { serde_json::Map::new() };
    fields.extend(more.into_iter().map(|(key, value)| (key.to_owned(), value)));
    fields.insert("job".into(), job.id.into());
    fields.insert("vm".into(), job.vm.clone().into());
    fields.insert("state".into(), serde_json::to_value(job.state).unwrap_or_default());
    fields.insert("exit".into(), job.state.exit().into());
    if job.state != JobState::Done {
        fields.insert("words".into(), job.words.clone().into());
        fields.insert("code".into(), job.code.clone().into());
    }
    fields.into()
}

/// How a job ended, in one line.
pub(crate) fn ending(job: &JobInfo) -> String {
    let what = match job.state {
        JobState::Running => "at work",
        JobState::Done => "done",
        JobState::Refused => "refused, nothing was changed",
        JobState::Aborted if job.report.as_ref().is_some_and(|report| report.paused) => {
            "aborted, the guest stays at the source, paused"
        }
        JobState::Aborted if job.direction == Direction::Saving => "aborted, the guest is as it was before",
        JobState::Aborted => "aborted, the guest runs on at the source",
        JobState::InDoubt => "in doubt",
    };
    if job.words.is_empty() { what.to_string() } else { format!("{what}: {}", job.words) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_link_is_one_line() {
        let one = LinkTried {
            link: "quic".into(),
            words: "in reserve".into(),
            round_trip_us: Some(99.6),
            probe_bytes_per_s: Some(2097152.0),
        };
        assert_eq!(tried(&one), "quic: in reserve (round trip 100 µs, probe 2.0 MiB/s)");
        assert_eq!(tried(&LinkTried { round_trip_us: None, probe_bytes_per_s: None, ..one }), "quic: in reserve");
    }

    #[test]
    fn bytes_are_short() {
        assert_eq!([bytes(0), bytes(1023), bytes(1536), bytes(2 << 30)], ["0 B", "1023 B", "1.5 KiB", "2.0 GiB"]);
    }
}
