//! Tests of what the benchmarks make of their samples: medians, ratios, tables, plots. No measurement is made here.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, missing_docs)]
#![forbid(unsafe_code)]

#[path = "mod.rs"]
mod common;

use common::record::{Case, Kind, Run, Sample};
use common::{iperf3, median, plot, render, today};

fn sample(bytes: u64, seconds: f64) -> Sample {
    Sample { bytes, seconds, ..Sample::default() }
}

fn case(name: &str, kind: Kind, lanes: u16, mix: &str, samples: Vec<Sample>) -> Case {
    let (link, mix) = ((kind == Kind::Lanes).then(|| "tcp".to_owned()), Some(mix.to_owned()));
    let ceiling = (kind == Kind::Lanes && mix.as_deref() != Some("zero")).then(|| "iperf3".to_owned());
    Case { name: name.into(), kind, series: name.into(), link, lanes: Some(lanes), mix, ceiling, samples }
}

/// A ceiling of 4 GB/s in the median, lanes at 1, 3 and nothing.
fn run() -> Run {
    let mut run = Run::new("links", "A run");
    let gigabytes = |rates: &[u64]| rates.iter().map(|rate| sample(rate * 1_000_000_000, 1.0)).collect::<Vec<_>>();
    run.cases = vec![
        case("iperf3 -l 1M", Kind::Ceiling, 1, "", gigabytes(&[4, 5, 3])),
        case("lanes", Kind::Lanes, 1, "random", gigabytes(&[1, 1])),
        case("lanes", Kind::Lanes, 2, "random", gigabytes(&[3, 2, 9])),
        case("lanes", Kind::Lanes, 2, "zero", gigabytes(&[40])),
        case("never measured", Kind::Peer, 1, "random", vec![]),
    ];
    run.skipped.push("another program: it is not here".into());
    run
}

#[test]
fn medians_and_ratios_leave_out_what_is_not_there() {
    assert_eq!(median([3.0, 1.0, f64::NAN, 2.0]), Some(2.0));
    assert_eq!(median([4.0, 1.0]), Some(2.5));
    assert_eq!(median([]), None);
    let run = run();
    let ratios: Vec<Option<f64>> = run.cases.iter().map(|case| run.of_ceiling(case)).collect();
    assert_eq!(ratios, [None, Some(0.25), Some(0.75), None, None]);
    assert_eq!(sample(5, 0.0).rate(), None, "no time, no rate");
    assert_eq!(sample(0, 1.0).per_gib(Some(1.0)), None);
}

#[test]
fn a_table_has_only_what_was_measured() {
    let table = render::print(&run());
    assert!(table.contains("not measured: another program: it is not here"), "{table}");
    assert!(table.contains("| lanes | 2 | random | 3.00 | 2.00 to 9.00 | 0.75 |"), "{table}");
    assert!(table.contains("| lanes | 2 | zero | 40.00 |  |  |"), "{table}");
    for absent in ["NaN", "inf", "never measured", "doorbells", "downtime", "0.00 + "] {
        assert!(!table.contains(absent), "{absent} in\n{table}");
    }
    // Below half a GB/s the unit changes; zero pages have no say in it.
    let mut slow = run();
    for case in slow.cases.iter_mut().filter(|case| case.mix.as_deref() != Some("zero")) {
        case.samples.iter_mut().for_each(|sample| sample.bytes /= 100);
    }
    assert!(render::print(&slow).contains("| lanes | 2 | random | 30.0 |"), "{}", render::print(&slow));
}

#[test]
fn a_record_is_read_as_it_was_written_and_drawn() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("deep/run.json");
    let written = run();
    written.save(&path).unwrap();
    let text = std::fs::read_to_string(&path).unwrap();
    assert!(!text.contains("cpu_source") && !text.contains("NaN"), "what was not measured is not there: {text}");
    assert_eq!(render::print(&Run::load(&path).unwrap()), render::print(&written));
    let svg = path.with_extension("svg");
    plot::draw(&written, &svg).unwrap();
    let drawn = std::fs::read_to_string(&svg).unwrap();
    assert!(drawn.starts_with("<svg") && drawn.contains("iperf3 -l 1M") && !drawn.contains("NaN"), "{drawn}");
    std::fs::write(&path, text.replace("\"format\": 1", "\"format\": 99")).unwrap();
    assert!(Run::load(&path).unwrap_err().to_string().contains("99"));
}

#[test]
fn only_the_named_block_of_a_page_is_replaced() {
    let page = "before\n<!-- begin links -->\nold\n<!-- end links -->\nbetween\n<!-- begin links-lab -->\nkept\n<!-- end links-lab -->\n";
    let new = render::replace_block(page, "links", "new\n").unwrap();
    assert_eq!(new, page.replace("old", "new"));
    assert!(render::replace_block(page, "peers", "new\n").is_none());
}

#[test]
fn iperf3_is_understood() {
    let good = r#"{"end": {"sum_received": {"bytes": 8, "seconds": 2.0}, "cpu_utilization_percent": {"host_total": 50.0}}}"#;
    let sample = iperf3::sample(good.as_bytes()).unwrap();
    assert_eq!((sample.rate(), sample.cpu_source, sample.cpu_destination), (Some(4.0), Some(1.0), None));
    assert!(iperf3::sample(br#"{"error": "refused"}"#).unwrap_err().to_string().contains("refused"));
    assert!(iperf3::sample(b"").is_err());
}

#[test]
fn dates_are_the_calendars() {
    for (days, date) in
        [(0, "1970-01-01"), (11_016, "2000-02-29"), (20_780, "2026-11-23"), (19_782, "2024-02-29"), (-1, "1969-12-31")]
    {
        assert_eq!(today::date(days), date);
    }
}
