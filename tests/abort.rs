//! What goes wrong in the middle: processes killed, stopped or told to stop, links cut, garbage at the port, a change of mind.
//! Each time the guest runs on at the source within the keepalive time, nothing is left over, and the next migration works.
#![allow(clippy::panic, clippy::unwrap_used, clippy::expect_used, missing_docs, unreachable_pub)]

use nix::sys::signal::Signal;
use rig::command::Running;
use rig::net::Garbage;
use rig::process::{self, wait_for};
use rig::{AgentConfig, Context, GuestSpec, Lab, Result, ensure, with_lab};
use std::time::{Duration, Instant};

/// The silence after which a peer counts as gone, as these tests configure it.
const KEEPALIVE: Duration = Duration::from_secs(3);
/// Time for what follows: cleaning up, on two busy cores.
const SOON: Duration = Duration::from_secs(15);

fn config() -> AgentConfig {
    AgentConfig::default().migration("keepalive_ms", 500).migration("silence_max_ms", KEEPALIVE.as_millis())
}

/// A guest with 64 MiB to carry, which at the 8 MB/s of `start_slow` takes 8 s for the first round alone.
fn slow() -> GuestSpec {
    GuestSpec::new("web", 1).dirty("20M", "32M").memory("128M", "32M")
}

/// Runs `harm` in the middle of pre-copy, and expects the command to end with this code.
fn in_precopy(code: i32, harm: impl FnOnce(&mut Lab, &mut Running) -> Result<()>) {
    with_lab(config(), |lab| {
        let guest = slow();
        lab.guest(&guest)?;
        let mut running = lab.a.start_slow("web", &lab.b, &[])?;
        let start = Instant::now();
        harm(lab, &mut running)?;
        let output = running.wait(KEEPALIVE + SOON)?.expect_code(code)?;
        ensure!(start.elapsed() < KEEPALIVE + SOON, "took {:?}: {output:?}", start.elapsed());
        lab.unharmed(&guest)
    });
}

#[test]
fn the_destination_agent_is_killed() {
    in_precopy(3, |lab, running| {
        lab.b.kill_agent()?;
        lab.a.guest_lives("web")?;
        running.wait(SOON)?;
        lab.settled(&lab.a, 1)?;
        // An incoming VMM whose agent is gone has no guest to save: it ends, at the latest when the agent is back.
        lab.b.restart_agent()?;
        lab.settled(&lab.b, 0)
    });
}

#[test]
fn the_destination_vmm_is_killed() {
    in_precopy(3, |lab, _| {
        let vmms = lab.b.vmms(Some("--incoming"));
        ensure!(vmms.len() == 1, "{vmms:?}");
        process::kill(vmms[0]);
        Ok(())
    });
}

#[test]
fn the_source_agent_is_killed() {
    with_lab(config(), |lab| {
        let guest = slow();
        lab.guest(&guest)?;
        let mut running = lab.a.start_slow("web", &lab.b, &[])?;
        lab.a.kill_agent()?;
        let output = running.wait(SOON)?;
        ensure!(output.code != 0, "the command succeeded without an agent: {output:?}");
        lab.a.guest_lives("web").context("the guest must outlive its agent")?;
        lab.settled(&lab.b, 0).context("the destination must give up a source that died")?;
        lab.a.restart_agent()?;
        lab.a.wait_knows("web", true)?;
        lab.unharmed(&guest)
    });
}

#[test]
fn the_source_vmm_is_killed() {
    with_lab(config(), |lab| {
        let guest = slow();
        lab.guest(&guest)?;
        let mut running = lab.a.start_slow("web", &lab.b, &[])?;
        let vmms = lab.a.vmms(None);
        ensure!(vmms.len() == 1, "{vmms:?}");
        process::kill(vmms[0]);
        let output = running.wait(SOON)?;
        ensure!(output.code != 0 && output.code != 4, "{output:?}");
        lab.settled(&lab.a, 0)?;
        lab.settled(&lab.b, 0)?;
        lab.a.wait_knows("web", false)?;
        lab.b.wait_knows("web", false)?;
        lab.guest(&guest)?;
        lab.good_migration(&guest)
    });
}

#[test]
fn the_command_is_killed_and_the_migration_goes_on() {
    with_lab(config(), |lab| {
        let guest = slow().dirty("1M", "32M");
        lab.guest(&guest)?;
        let mut running = lab.a.start_slow("web", &lab.b, &[])?;
        running.kill()?;
        lab.a.guest_lives("web")?;
        wait_for(Duration::from_secs(60), "the guest to leave", || {
            Ok((!lab.a.guests()?.contains(&"web".to_owned())).then_some(()))
        })?;
        lab.settled(&lab.a, 0)?;
        lab.guest_is_on(&guest, &lab.b, &lab.a)?;
        lab.b.guest_verified("web", 1)?;
        lab.b.migrate_well("web", &lab.a, &[])?;
        lab.guest_is_on(&guest, &lab.a, &lab.b)
    });
}

#[test]
fn the_destination_agent_stops_answering() {
    in_precopy(3, |lab, running| {
        let pid = lab.b.agent_pid()?;
        process::signal(pid, Signal::SIGSTOP);
        let start = Instant::now();
        let output = running.wait(KEEPALIVE + SOON);
        let ended = start.elapsed();
        process::signal(pid, Signal::SIGCONT);
        ensure!(ended < KEEPALIVE + Duration::from_secs(5), "a silent peer was waited for {ended:?}: {output:?}");
        lab.a.guest_lives("web")?;
        lab.settled(&lab.b, 0)
    });
}

#[test]
fn the_cable_is_pulled() {
    in_precopy(3, |lab, running| {
        lab.cable("p-b", false)?;
        let start = Instant::now();
        let output = running.wait(KEEPALIVE + SOON);
        let ended = start.elapsed();
        lab.a.guest_lives("web")?;
        lab.settled(&lab.b, 0).context("the destination must give up a source that it does not hear")?;
        lab.cable("p-b", true)?;
        ensure!(ended < KEEPALIVE + Duration::from_secs(5), "a dead link was waited for {ended:?}: {output:?}");
        Ok(())
    });
}

#[test]
fn the_source_agent_is_told_to_stop() {
    with_lab(config(), |lab| {
        let guest = slow();
        lab.guest(&guest)?;
        let mut running = lab.a.start_slow("web", &lab.b, &[])?;
        ensure!(lab.a.stop_agent()?.code() == Some(0), "no clean stop:\n{}", lab.a.agent_log());
        let output = running.wait(SOON)?;
        ensure!(output.code != 0, "{output:?}");
        lab.a.guest_lives("web")?;
        lab.settled(&lab.b, 0)?;
        lab.a.restart_agent()?;
        lab.a.wait_knows("web", true)?;
        lab.unharmed(&guest)
    });
}

#[test]
fn the_destination_agent_is_told_to_stop() {
    in_precopy(3, |lab, _| {
        ensure!(lab.b.stop_agent()?.code() == Some(0), "no clean stop:\n{}", lab.b.agent_log());
        lab.b.restart_agent()?;
        lab.settled(&lab.b, 0)
    });
}

fn job_of(lab: &Lab) -> Result<String> {
    let jobs = lab.a.jobs()?;
    let job = jobs.iter().rfind(|job| job["vm"] == "web").context("no job")?;
    Ok(job["id"].to_string())
}

#[test]
fn a_cancel_in_precopy() {
    in_precopy(3, |lab, running| {
        let start = Instant::now();
        lab.a.limosa(&["cancel", &job_of(lab)?])?.expect_code(0)?;
        let output = running.wait(SOON)?;
        ensure!(start.elapsed() < Duration::from_secs(3), "a cancel took {:?}", start.elapsed());
        ensure!(output.all().contains("cancelled"), "{output:?}");
        Ok(())
    });
}

#[test]
fn a_cancel_before_the_first_round() {
    // The destination populates 512 MiB first, which takes it half a second at least.
    with_lab(config().migration("populate", "\"before\""), |lab| {
        let guest = slow().memory("512M", "32M");
        lab.guest(&guest)?;
        let mut running = lab.a.start(&["--json", "migrate", "web", "--to", "b"])?;
        let job = wait_for(SOON, "the job", || Ok(job_of(lab).ok()))?;
        lab.a.limosa(&["cancel", &job])?.expect_code(0)?;
        let output = running.wait(SOON)?.expect_code(3)?;
        ensure!(output.all().contains("cancelled"), "{output:?}");
        lab.unharmed(&guest)
    });
}

#[test]
fn an_interrupt_of_the_command_cancels_nothing_by_accident() {
    // Ctrl-C at the command: either the migration is cancelled, or it goes on; never anything in between.
    with_lab(config(), |lab| {
        let guest = slow().dirty("1M", "32M");
        lab.guest(&guest)?;
        let mut running = lab.a.start_slow("web", &lab.b, &[])?;
        running.signal(Signal::SIGINT);
        running.wait(SOON)?;
        let state = wait_for(Duration::from_secs(60), "the job's end", || {
            let jobs = lab.a.jobs()?;
            let state = jobs.first().context("no job")?["state"].as_str().unwrap_or_default().to_owned();
            Ok((state != "running").then_some(state))
        })?;
        match state.as_str() {
            "aborted" => lab.unharmed(&guest),
            "done" => {
                lab.guest_is_on(&guest, &lab.b, &lab.a)?;
                lab.b.migrate_well("web", &lab.a, &[])?;
                lab.guest_is_on(&guest, &lab.a, &lab.b)
            }
            other => rig::bail!("the job ended as {other}"),
        }
    });
}

#[test]
fn garbage_at_the_port_harms_no_phase() {
    with_lab(config(), |lab| {
        let guest = slow().dirty("5M", "16M").memory("128M", "16M");
        lab.guest(&guest)?;
        let from_stranger = Garbage::start(&lab.watch, lab.b.address())?;
        let from_source = Garbage::start(&lab.a.netns, lab.b.address())?;
        let at_source = Garbage::start(&lab.b.netns, lab.a.address())?;
        let mut running = lab.a.start_slow("web", &lab.b, &[])?;
        running.wait(Duration::from_secs(60))?.expect_code(0)?;
        for garbage in [&from_stranger, &from_source, &at_source] {
            ensure!(garbage.thrown() > 20, "only {} connections", garbage.thrown());
        }
        lab.guest_is_on(&guest, &lab.b, &lab.a)?;
        for (from, to) in [(&lab.b, &lab.a), (&lab.a, &lab.b)] {
            from.migrate_well("web", to, &[])?;
            lab.guest_is_on(&guest, to, from)?;
        }
        drop((from_stranger, from_source, at_source));
        lab.b.guest_verified("web", 1)?;
        Ok(())
    });
}
