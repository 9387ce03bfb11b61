//! The main job: a guest moves while it runs, in each shape that is no failure. Rounds and policies are in `precopy`, what is
//! seen from the network in `announce` and `handover`.
#![allow(clippy::panic, clippy::unwrap_used, clippy::expect_used, missing_docs, unreachable_pub)]

use rig::{AgentConfig, Context, GuestSpec, Result, ensure, with_lab};
use serde_json::Value;
use std::time::Duration;

fn number(report: &Value, pointer: &str) -> Result<f64> {
    report.pointer(pointer).and_then(Value::as_f64).with_context(|| format!("{pointer} is missing in {report}"))
}

#[test]
fn an_idle_guest_moves_whole_and_nothing_stays_behind() {
    with_lab(AgentConfig::default(), |lab| {
        let guest = GuestSpec::new("idle", 1).dirty("0", "16M");
        lab.guest(&guest)?;
        let before = lab.a.guest_verified("idle", 1)?;
        let report = lab.a.migrate_well("idle", &lab.b, &[])?;
        lab.guest_is_on(&guest, &lab.b, &lab.a)?;
        let after = lab.b.guest_verified("idle", 2)?;
        ensure!(after.n > before.n && after.sum == before.sum, "an idle guest's counters changed: {before:?} {after:?}");
        ensure!(report["encrypted"] == true && report["link"] == "tcp", "{report}");
        ensure!(number(&report, "/memory_bytes")? == f64::from(128 << 20), "{report}");
        // 16 MiB of fill and 16 MiB of working set have content; the rest was never touched and must cost nothing.
        let wire = number(&report, "/bytes_on_wire")?;
        ensure!((32e6..64e6).contains(&wire), "{wire} bytes for 32 MiB of content");
        for part in ["pause", "last_round", "state", "commit", "resume"] {
            let ms = number(&report, &format!("/downtime_parts_ms/{part}"))?;
            ensure!((0.0..=number(&report, "/downtime_ms")? + 0.1).contains(&ms), "{part} took {ms} ms: {report}");
        }
        for field in
            ["/rounds", "/total_ms", "/prepare_ms", "/goodput_bytes_per_s", "/cpu_seconds/source", "/cpu_seconds/destination"]
        {
            ensure!(number(&report, field)? > 0.0, "{field} is nothing: {report}");
        }
        ensure!(report["announcements"].as_array().is_some_and(|list| !list.is_empty()), "no announcements: {report}");
        Ok(())
    });
}

#[test]
fn a_guest_that_writes_arrives_with_every_page() {
    with_lab(AgentConfig::default(), |lab| {
        let guest = GuestSpec::new("busy", 1).dirty("40M", "32M").memory("192M", "96M");
        lab.guest(&guest)?;
        let before = lab.a.guest_verified("busy", 1)?;
        lab.a.migrate_well("busy", &lab.b, &[])?;
        lab.guest_is_on(&guest, &lab.b, &lab.a)?;
        let after = lab.b.guest_verified("busy", 2)?;
        ensure!(after.written > before.written, "it stopped writing");
        Ok(())
    });
}

#[test]
fn a_guest_goes_there_and_back_ten_times() {
    with_lab(AgentConfig::default(), |lab| {
        let guest = GuestSpec::new("pendulum", 1).dirty("20M", "16M").memory("64M", "16M");
        lab.guest(&guest)?;
        let mut beats = 0;
        for turn in 0..20 {
            let (from, to) = if turn % 2 == 0 { (&lab.a, &lab.b) } else { (&lab.b, &lab.a) };
            from.migrate_well("pendulum", to, &[]).with_context(|| format!("turn {turn}"))?;
            let beat = to.guest_lives("pendulum").with_context(|| format!("turn {turn}"))?;
            ensure!(beat.n > beats, "turn {turn}: heartbeat {} after {beats}", beat.n);
            beats = beat.n;
        }
        lab.guest_is_on(&guest, &lab.a, &lab.b)?;
        lab.a.guest_verified("pendulum", 2)?;
        Ok(())
    });
}

#[test]
fn two_guests_move_at_once_and_two_pass_each_other() {
    with_lab(AgentConfig::default(), |lab| {
        let [one, two] = [1u8, 2].map(|n| GuestSpec::new(&format!("guest{n}"), n).dirty("5M", "16M"));
        lab.guest(&one)?;
        lab.guest(&two)?;
        let limit = Duration::from_secs(60);
        let mut first = lab.a.start(&["--json", "migrate", "guest1", "--to", "b"])?;
        let mut second = lab.a.start(&["--json", "migrate", "guest2", "--to", "b"])?;
        first.wait(limit)?.expect_code(0)?;
        second.wait(limit)?.expect_code(0)?;
        lab.settled(&lab.a, 0)?;
        lab.settled(&lab.b, 2)?;
        lab.b.migrate_well("guest1", &lab.a, &[])?;
        let mut there = lab.a.start(&["--json", "migrate", "guest1", "--to", "b"])?;
        let mut back = lab.b.start(&["--json", "migrate", "guest2", "--to", "a"])?;
        there.wait(limit)?.expect_code(0)?;
        back.wait(limit)?.expect_code(0)?;
        ensure!(lab.b.guests()? == ["guest1"] && lab.a.guests()? == ["guest2"], "{:?} {:?}", lab.a.guests(), lab.b.guests());
        lab.settled(&lab.a, 1)?;
        lab.settled(&lab.b, 1)?;
        lab.b.guest_verified("guest1", 1)?;
        lab.a.guest_verified("guest2", 1)?;
        lab.wait_reachable(&one)?;
        lab.wait_reachable(&two)
    });
}

#[test]
fn a_guest_with_four_vcpus_moves() {
    with_lab(AgentConfig::default(), |lab| {
        let mut guest = GuestSpec::new("four", 1);
        guest.vcpus = 4;
        lab.guest(&guest)?;
        lab.good_migration(&guest)
    });
}

#[test]
fn memory_that_was_never_touched_is_not_sent() {
    with_lab(AgentConfig::default(), |lab| {
        let guest = GuestSpec::new("hollow", 1).memory("1G", "0").dirty("0", "4M");
        lab.guest(&guest)?;
        let report = lab.a.migrate_well("hollow", &lab.b, &[])?;
        let wire = number(&report, "/bytes_on_wire")?;
        ensure!(wire < 16e6, "{wire} bytes on the wire for a guest of 4 MiB content");
        lab.b.guest_verified("hollow", 2)?;
        lab.guest_is_on(&guest, &lab.b, &lab.a)
    });
}
