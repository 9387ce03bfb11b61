//! `limosa cancel` in each state of a migration while the other host hangs: before the commit the guest runs on at the source
//! within a second; after it, the refusal says why. What a cancel does with a well link is in `abort` and `handover`.
#![allow(clippy::panic, clippy::unwrap_used, clippy::expect_used, missing_docs, unreachable_pub)]

use nix::sys::signal::Signal;
use rig::process::{self, wait_for};
use rig::{AgentConfig, Context, GuestSpec, Lab, Result, ensure, points, with_lab};
use std::time::{Duration, Instant};

/// The destination hangs here, before the commit: in each state of the source from Hello to Finalizing.
const BEFORE: [&str; 8] = [
    "destination-hears-hello",
    "destination-checking",
    "destination-preparing",
    "destination-prepared",
    "destination-round-arrived",
    "destination-loading",
    "destination-ready-unwritten",
    "destination-says-ready",
];

fn lab(test: impl FnOnce(&mut Lab, &GuestSpec) -> Result<()>) {
    // A silence that no cancel needs.
    let config = AgentConfig::default().migration("keepalive_ms", 500).migration("silence_max_ms", 20_000);
    let config = config.migration("ready_ms_max", 2000);
    let binary = rig::lab::missing().is_none().then(|| points::binary().unwrap());
    with_lab(AgentConfig { binary, ..config }, |lab| {
        let guest = GuestSpec::new("web", 1).memory("64M", "8M").dirty("4M", "8M");
        lab.guest(&guest)?;
        test(lab, &guest)
    });
}

fn job(lab: &Lab) -> Result<String> {
    Ok(lab.a.jobs()?.last().context("no job")?["id"].to_string())
}

#[test]
fn a_cancel_before_the_commit_takes_effect_within_a_second_though_the_destination_hangs() {
    lab(|lab, guest| {
        for point in BEFORE {
            lab.b.disarm()?;
            lab.b.arm(point, "stop")?;
            let mut running = lab.a.start(&["--json", "migrate", "web", "--to", "b"])?;
            lab.b.wait_stopped(point)?;
            let (job, before) = (job(lab)?, lab.a.beats("web").len());
            let start = Instant::now();
            let cancelled = lab.a.limosa(&["cancel", &job])?.expect_code(0).context(point)?;
            let answered = start.elapsed();
            ensure!(cancelled.stdout.contains("is cancelled"), "{point}: {cancelled:?}");
            wait_for(Duration::from_secs(5), "the guest to run on", || Ok((lab.a.beats("web").len() > before).then_some(())))?;
            let runs = start.elapsed();
            // The second is for the guest; two busy cores start the command meanwhile.
            ensure!(
                answered < Duration::from_millis(1500) && runs < Duration::from_millis(1800),
                "{point}: {answered:?}, {runs:?}"
            );
            running.wait(Duration::from_secs(5))?.expect_code(3).context(point)?;
            process::signal(lab.b.agent_pid()?, Signal::SIGCONT);
            // It may be about to make its VMM: not before its job has ended is anything settled there.
            wait_for(Duration::from_secs(20), "the destination's job to end", || {
                Ok((lab.b.jobs()?.iter().all(|job| job["state"] != "running") && lab.b.guests()?.is_empty()).then_some(()))
            })?;
            lab.settled(&lab.b, 0).context(point)?;
        }
        lab.unharmed(guest)
    });
}

#[test]
fn a_cancel_before_the_commit_takes_effect_though_the_cable_is_pulled() {
    lab(|lab, guest| {
        lab.a.arm("source-saved", "stop")?;
        let mut running = lab.a.start(&["--json", "migrate", "web", "--to", "b"])?;
        lab.a.wait_stopped("source-saved")?;
        lab.cable("p-b", false)?;
        process::signal(lab.a.agent_pid()?, Signal::SIGCONT);
        let start = Instant::now();
        let cancelled = lab.a.limosa(&["cancel", &job(lab)?])?.expect_code(0)?;
        ensure!(start.elapsed() < Duration::from_millis(1500), "{:?}: {cancelled:?}", start.elapsed());
        running.wait(Duration::from_secs(5))?.expect_code(3)?;
        lab.a.guest_lives("web")?;
        lab.cable("p-b", true)?;
        lab.settled(&lab.b, 0)?;
        lab.unharmed(guest)
    });
}

#[test]
fn a_cancel_at_the_commit_is_refused_with_the_reason() {
    lab(|lab, guest| {
        lab.b.arm("destination-hears-commit", "stop")?;
        let mut running = lab.a.start(&["--json", "migrate", "web", "--to", "b"])?;
        lab.b.wait_stopped("destination-hears-commit")?;
        let job = job(lab)?;
        // At the commit, and then, when the answer has not come, in doubt.
        let start = Instant::now();
        let refused = lab.a.limosa(&["cancel", &job])?.expect_code(1)?;
        ensure!(refused.stderr.contains("commit"), "{refused:?}");
        ensure!(start.elapsed() < Duration::from_secs(3), "a refusal took {:?}", start.elapsed());
        wait_for(Duration::from_secs(20), "the doubt", || {
            Ok(lab.a.jobs()?.iter().any(|job| job["state"] == "in_doubt").then_some(()))
        })?;
        let refused = lab.a.limosa(&["cancel", &job])?.expect_code(1)?;
        ensure!(refused.stderr.contains("in doubt"), "{refused:?}");
        process::signal(lab.b.agent_pid()?, Signal::SIGCONT);
        running.wait(Duration::from_secs(20))?;
        lab.guest_is_on(guest, &lab.b, &lab.a)?;
        lab.b.migrate_well("web", &lab.a, &[])?;
        lab.guest_is_on(guest, &lab.a, &lab.b)
    });
}
