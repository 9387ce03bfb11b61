//! What the network is told when a guest has moved: frames at the switch, their content and order, and never before the commit.
#![allow(clippy::panic, clippy::unwrap_used, clippy::expect_used, missing_docs, unreachable_pub)]

use rig::capture::Frame;
use rig::process::wait_for;
use rig::{AgentConfig, Context, GuestSpec, Result, ensure, with_lab};
use std::time::{Duration, Instant};

/// The schedule of these tests, in ms after the frame before; the first goes out at once.
const SCHEDULE: &str = "[50, 100, 150]";

fn mac_of(guest: &GuestSpec) -> [u8; 6] {
    [0x52, 0x54, 0, 0x77, 0, guest.number]
}

/// The announcements that came in at a port of the switch, in order.
fn announced(frames: &[Frame], guest: &GuestSpec, port: &str) -> Result<Vec<(Instant, String)>> {
    let found = rig::announced::announced(frames, mac_of(guest), port)?;
    let whole = |one: rig::announced::Announced| {
        ensure!(one.length >= 60, "a frame of {} bytes", one.length);
        Ok((one.at, one.words))
    };
    found.into_iter().map(whole).collect()
}

#[test]
fn the_network_is_told_after_the_commit_and_by_the_schedule() {
    with_lab(AgentConfig::default().migration("announce_schedule_ms", SCHEDULE), |lab| {
        let guest = GuestSpec::new("web", 1);
        lab.guest(&guest)?;
        let probe = lab.probe(&guest)?;
        let capture = lab.capture()?;
        wait_for(Duration::from_secs(10), "answers", || Ok((probe.received() >= 10).then_some(())))?;
        let report = lab.a.migrate_well("web", &lab.b, &["--bandwidth", "30MB/s"])?;
        std::thread::sleep(Duration::from_millis(1000));
        let frames = capture.frames();
        ensure!(announced(&frames, &guest, "p-a")?.is_empty(), "the source announced");
        let seen = announced(&frames, &guest, "p-b")?;
        let round = [
            format!("request {}", guest.ip()),
            format!("reply {}", guest.ip()),
            format!("na {}", guest.ip6()),
            "rarp".to_owned(),
        ];
        let words: Vec<&str> = seen.iter().map(|(_, words)| words.as_str()).collect();
        ensure!(words.len() == 4 * round.len(), "four rounds of {round:?} were wanted: {words:?}");
        for chunk in words.chunks(round.len()) {
            ensure!(round.iter().all(|w| chunk.contains(&w.as_str())), "a round without one of {round:?}: {chunk:?}");
        }
        let starts: Vec<f64> =
            seen.iter().step_by(round.len()).map(|(at, _)| at.duration_since(seen[0].0).as_secs_f64() * 1e3).collect();
        for (start, due) in starts.iter().zip([0.0, 50.0, 150.0, 300.0]) {
            ensure!((due - 5.0..due + 80.0).contains(start), "rounds at {starts:?} ms");
        }
        // Nothing of the guest comes from the source once the destination has spoken for it.
        let from_source = frames.iter().filter(|f| f.interface == "p-a" && !f.outgoing && f.sender() == Some(mac_of(&guest)));
        let last_at_source = from_source.map(|f| f.at).max().context("the guest was never heard at the source")?;
        ensure!(seen[0].0 > last_at_source, "the destination announced {:?} too early", last_at_source - seen[0].0);
        let listed = report["announcements"].to_string();
        for words in ["ARP", "RARP", &guest.ip().to_string(), &guest.ip6()] {
            ensure!(listed.contains(words), "{words} is not in the report: {listed}");
        }
        lab.guest_is_on(&guest, &lab.b, &lab.a)
    });
}

#[test]
fn the_switch_learns_the_new_port() {
    with_lab(AgentConfig::default(), |lab| {
        let guest = GuestSpec::new("web", 1);
        lab.guest(&guest)?;
        ensure!(lab.port_of(&guest)?.as_deref() == Some("p-a"), "before: {:?}", lab.port_of(&guest)?);
        // Nobody talks to the guest: only the announcements can move its address.
        lab.a.migrate_well("web", &lab.b, &[])?;
        let moved = || Ok((lab.port_of(&guest)?.as_deref() == Some("p-b")).then_some(()));
        wait_for(Duration::from_secs(1), "the MAC on p-b", moved)?;
        let tap = lab.b.netns.taps()?;
        let local = rig::net::fdb_port(&lab.b.netns, "br0", &guest.mac())?;
        ensure!(local.as_ref() == tap.first(), "b's own bridge has it on {local:?}, the TAP is {tap:?}");
        lab.guest_is_on(&guest, &lab.b, &lab.a)
    });
}

#[test]
fn a_migration_that_fails_announces_nothing() {
    with_lab(AgentConfig::default(), |lab| {
        let guest = GuestSpec::new("web", 1).dirty("max", "64M");
        lab.guest(&guest)?;
        let capture = lab.capture()?;
        let options = ["--bandwidth", "60MB/s", "--downtime", "10ms", "--on-no-convergence", "abort"];
        lab.a.migrate("web", &lab.b, &options)?.expect_code(3)?;
        std::thread::sleep(Duration::from_millis(600));
        let frames = capture.frames();
        ensure!(announced(&frames, &guest, "p-b")?.is_empty(), "announced at b: {:?}", announced(&frames, &guest, "p-b")?);
        let from_b = frames.iter().filter(|f| f.interface == "p-b" && !f.outgoing && f.sender() == Some(mac_of(&guest)));
        ensure!(from_b.count() == 0, "b sent frames with the guest's address");
        lab.unharmed(&guest)
    });
}

#[test]
fn announce_repeats_it() {
    with_lab(AgentConfig::default(), |lab| {
        let guest = GuestSpec::new("web", 1);
        lab.guest(&guest)?;
        lab.a.migrate_well("web", &lab.b, &[])?;
        std::thread::sleep(Duration::from_millis(1600));
        let capture = lab.capture()?;
        let output = lab.b.limosa(&["--json", "announce", "web"])?.expect_code(0)?;
        ensure!(output.all().contains(&guest.ip().to_string()), "{output:?}");
        let seen = || Ok(announced(&capture.frames(), &guest, "p-b")?.iter().any(|(_, w)| w == "rarp").then_some(()));
        wait_for(Duration::from_secs(3), "the announcement at the switch", seen)?;
        lab.a.limosa(&["announce", "web"])?.expect_code(1)?;
        lab.guest_is_on(&guest, &lab.b, &lab.a)
    });
}
