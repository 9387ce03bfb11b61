//! Pre-copy under load: rounds, the goal for the downtime, and what happens when a guest writes faster than the link carries.
#![allow(clippy::panic, clippy::unwrap_used, clippy::expect_used, missing_docs, unreachable_pub)]

use rig::{AgentConfig, Context, GuestSpec, ensure, with_lab};
use serde_json::Value;
use std::time::{Duration, Instant};

/// A guest whose 64 MiB of working set are all dirty again long before 40 MB/s have carried them.
fn restless() -> GuestSpec {
    GuestSpec::new("restless", 1).dirty("max", "64M").memory("128M", "16M")
}

#[test]
fn a_dirty_rate_below_the_link_takes_several_rounds() {
    with_lab(AgentConfig::default(), |lab| {
        let guest = GuestSpec::new("web", 1).dirty("20M", "64M").memory("128M", "16M");
        lab.guest(&guest)?;
        let report = lab.a.migrate_well("web", &lab.b, &["--bandwidth", "60MB/s", "--downtime", "100ms"])?;
        let rounds = report["rounds"].as_u64().context("rounds")?;
        ensure!(rounds >= 3, "at least two rounds and the last one are needed to converge: {report}");
        let list = report["round_list"].as_array().context("round_list")?;
        let pages = list.iter().map(|r| r["pages"].as_u64().context("pages")).collect::<rig::Result<Vec<_>>>()?;
        ensure!(pages.len() as u64 == rounds, "{report}");
        // The proof that a second pass moved what was written during the first, and less each time.
        ensure!(pages[0] >= 80 << 8 && pages[1] > 0 && pages[1] < pages[0] && pages[pages.len() - 1] < pages[1], "{pages:?}");
        lab.b.guest_verified("web", 2)?;
        lab.guest_is_on(&guest, &lab.b, &lab.a)
    });
}

#[test]
fn what_cannot_converge_ends_with_a_longer_downtime_when_that_is_the_policy() {
    with_lab(AgentConfig::default(), |lab| {
        let guest = restless();
        lab.guest(&guest)?;
        let start = Instant::now();
        let options =
            ["--bandwidth", "40MB/s", "--downtime", "20ms", "--downtime-max", "10s", "--on-no-convergence", "longer-downtime"];
        let report = lab.a.migrate_well("restless", &lab.b, &options)?;
        ensure!(start.elapsed() < Duration::from_secs(40), "took {:?}", start.elapsed());
        let downtime = report["downtime_ms"].as_f64().context("downtime_ms")?;
        ensure!((300.0..10_000.0).contains(&downtime), "64 MiB at 40 MB/s cannot take {downtime} ms: {report}");
        lab.guest_is_on(&guest, &lab.b, &lab.a)?;
        lab.b.guest_verified("restless", 2)?;
        Ok(())
    });
}

#[test]
fn what_cannot_converge_is_given_up_when_that_is_the_policy() {
    with_lab(AgentConfig::default(), |lab| {
        let guest = restless();
        lab.guest(&guest)?;
        let start = Instant::now();
        let options = ["--bandwidth", "40MB/s", "--downtime", "20ms", "--on-no-convergence", "abort"];
        let output = lab.a.migrate("restless", &lab.b, &options)?.expect_code(3)?;
        ensure!(start.elapsed() < Duration::from_secs(60), "took {:?}", start.elapsed());
        ensure!(output.all().contains("not-converging"), "{output:?}");
        lab.unharmed(&guest)
    });
}

#[test]
fn a_downtime_beyond_the_maximum_is_not_forced_on_the_guest() {
    with_lab(AgentConfig::default(), |lab| {
        let guest = restless();
        lab.guest(&guest)?;
        let options =
            ["--bandwidth", "40MB/s", "--downtime", "20ms", "--downtime-max", "300ms", "--on-no-convergence", "longer-downtime"];
        let output = lab.a.migrate("restless", &lab.b, &options)?.expect_code(3)?;
        ensure!(output.all().contains("not-converging"), "{output:?}");
        lab.unharmed(&guest)
    });
}

#[test]
fn the_bandwidth_cap_holds() {
    with_lab(AgentConfig::default(), |lab| {
        let guest = GuestSpec::new("capped", 1).dirty("0", "16M").memory("128M", "64M");
        lab.guest(&guest)?;
        let report = lab.a.migrate_well("capped", &lab.b, &["--bandwidth", "30MB/s"])?;
        let wire = report["bytes_on_wire"].as_f64().context("bytes_on_wire")?;
        let seconds = report["total_ms"].as_f64().context("total_ms")? / 1e3;
        ensure!((15e6..33e6).contains(&(wire / seconds)), "{wire} bytes in {seconds} s: {report}");
        Ok(())
    });
}

#[test]
fn progress_is_seen_while_it_runs() {
    with_lab(AgentConfig::default(), |lab| {
        let guest = GuestSpec::new("seen", 1).memory("128M", "48M");
        lab.guest(&guest)?;
        let mut running = lab.a.start_slow("seen", &lab.b, &[])?;
        let remaining = |job: &Value| job.to_string();
        let first = lab.a.jobs()?.first().map(remaining).context("no job while a migration runs")?;
        std::thread::sleep(Duration::from_millis(700));
        let second = lab.a.jobs()?.first().map(remaining).context("no job while a migration runs")?;
        ensure!(first != second, "progress stands still: {first}");
        ensure!(lab.b.jobs()?.iter().any(|job| job.to_string().contains("seen")), "the destination shows no job");
        lab.wait_reachable(&guest)?;
        running.wait(Duration::from_secs(60))?.expect_code(0)?;
        lab.guest_is_on(&guest, &lab.b, &lab.a)
    });
}
