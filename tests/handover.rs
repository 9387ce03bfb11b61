//! The hand-over: how long nobody answers, who may end it, and what outlives the agents that did it.
#![allow(clippy::panic, clippy::unwrap_used, clippy::expect_used, missing_docs, unreachable_pub)]

use rig::process::wait_for;
use rig::{AgentConfig, Context, GuestSpec, Result, ensure, with_lab};
use std::time::Duration;

/// How far the gap seen by a third machine may exceed the downtime: 20 ms as the issue wants it, and one period of the probe.
const MARGIN_MS: f64 = 20.0 + 10.0;

#[test]
fn the_gap_seen_from_outside_is_the_downtime_and_20_ms_at_most() {
    with_lab(AgentConfig::default(), |lab| {
        let guest = GuestSpec::new("web", 1).dirty("1M", "16M");
        lab.guest(&guest)?;
        let mut seen = Vec::new();
        // Two busy cores run all of this: three tries, one must hold.
        for (from, to) in [(&lab.a, &lab.b), (&lab.b, &lab.a), (&lab.a, &lab.b)] {
            let probe = lab.probe(&guest)?;
            wait_for(Duration::from_secs(10), "answers", || Ok((probe.received() >= 20).then_some(())))?;
            let report = from.migrate_well("web", to, &[])?;
            std::thread::sleep(Duration::from_millis(500));
            let probed = probe.finish()?;
            let downtime = report["downtime_ms"].as_f64().context("downtime_ms")?;
            let gap = probed.largest_gap.as_secs_f64() * 1e3;
            seen.push(format!(
                "downtime {downtime:.1} ms, gap {gap:.1} ms, {} of {} lost",
                probed.sent - probed.received,
                probed.sent
            ));
            lab.guest_is_on(&guest, to, from)?;
            if gap <= downtime + MARGIN_MS {
                return Ok(());
            }
        }
        rig::bail!("the gap was larger each time: {seen:?}")
    });
}

#[test]
fn a_cancel_after_the_commit_is_refused_with_the_reason() {
    with_lab(AgentConfig::default(), |lab| {
        let guest = GuestSpec::new("web", 1);
        lab.guest(&guest)?;
        lab.a.migrate_well("web", &lab.b, &[])?;
        let jobs = lab.a.jobs()?;
        let id = jobs.first().context("no job")?["id"].to_string();
        let output = lab.a.limosa(&["cancel", &id])?;
        ensure!(output.code == 1 && !output.stderr.trim().is_empty(), "{output:?}");
        lab.guest_is_on(&guest, &lab.b, &lab.a)?;
        // Both ends tell the same of it when asked later.
        for host in [&lab.a, &lab.b] {
            let verdict = host.limosa(&["--json", "verdict", &id])?.expect_code(0)?;
            ensure!(verdict.all().to_lowercase().contains("running"), "{}: {verdict:?}", host.name);
        }
        lab.b.migrate_well("web", &lab.a, &[])?;
        lab.guest_is_on(&guest, &lab.a, &lab.b)
    });
}

#[test]
fn a_guest_outlives_both_agents_and_goes_back() {
    with_lab(AgentConfig::default(), |lab| -> Result<()> {
        let guest = GuestSpec::new("web", 1).dirty("5M", "16M");
        lab.guest(&guest)?;
        lab.a.migrate_well("web", &lab.b, &[])?;
        lab.a.kill_agent()?;
        lab.b.kill_agent()?;
        lab.b.guest_lives("web")?;
        lab.wait_reachable(&guest)?;
        lab.a.restart_agent()?;
        lab.b.restart_agent()?;
        lab.b.wait_knows("web", true)?;
        lab.guest_is_on(&guest, &lab.b, &lab.a)?;
        let jobs = lab.a.jobs()?;
        ensure!(jobs.iter().any(|job| job["vm"] == "web" && job["state"] == "done"), "the finished job is forgotten: {jobs:?}");
        lab.b.migrate_well("web", &lab.a, &[])?;
        lab.guest_is_on(&guest, &lab.a, &lab.b)?;
        lab.a.guest_verified("web", 1)?;
        Ok(())
    });
}

#[test]
fn a_guest_that_stops_itself_leaves_nothing() {
    with_lab(AgentConfig::default(), |lab| {
        let guest = GuestSpec::new("web", 1);
        lab.guest(&guest)?;
        lab.a.migrate_well("web", &lab.b, &[])?;
        lab.b.limosa(&["vm", "stop", "web"])?.expect_code(0)?;
        lab.settled(&lab.b, 0)?;
        lab.b.wait_knows("web", false)?;
        // Another address: the switch believes for minutes that the old one is at b, and a guest that boots says nothing.
        let next = GuestSpec::new("web", 2);
        lab.guest(&next)?;
        lab.good_migration(&next)
    });
}
