//! What the destination cannot take it refuses, with its own words, before anything has changed: networks, room, names, and
//! a destination that is not there. Addresses and keys are in `allow_list`, plaintext lanes in `lanes`.
#![allow(clippy::panic, clippy::unwrap_used, clippy::expect_used, missing_docs, unreachable_pub)]

use rig::{AgentConfig, Context, GuestSpec, Lab, Result, ensure, with_bare_lab, with_lab};

/// The migration is refused with this code and these words, and left nothing behind at the destination.
fn refused(lab: &Lab, guest: &str, code: &str, words: &[&str]) -> Result<()> {
    let output = lab.a.migrate(guest, &lab.b, &[])?.expect_code(1)?;
    ensure!(output.all().contains(code), "no {code} in {output:?}");
    for word in words {
        ensure!(output.all().contains(word), "{word:?} is not in {output:?}");
    }
    ensure!(output.json().is_ok(), "no JSON: {output:?}");
    Ok(())
}

#[test]
fn a_network_that_is_not_there() {
    with_bare_lab(|lab| {
        lab.start_agents_with(AgentConfig::default(), AgentConfig::default().networks(&[("storage", "br0")]))?;
        let guest = GuestSpec::new("web", 1);
        lab.guest(&guest)?;
        refused(lab, "web", "network-missing", &["lan", "storage"])?;
        lab.settled(&lab.b, 0)?;
        lab.b.stop_agent()?;
        lab.b.start_agent(AgentConfig::default())?;
        lab.unharmed(&guest)
    });
}

#[test]
fn a_bridge_that_is_not_there() {
    with_bare_lab(|lab| {
        lab.start_agents_with(AgentConfig::default(), AgentConfig::default().networks(&[("lan", "br7")]))?;
        let guest = GuestSpec::new("web", 1);
        lab.guest(&guest)?;
        refused(lab, "web", "network-missing", &["br7"])?;
        lab.settled(&lab.b, 0)?;
        lab.b.ip("link add br7 type bridge")?;
        lab.b.ip("link del br7")?;
        lab.b.stop_agent()?;
        lab.b.start_agent(AgentConfig::default())?;
        lab.unharmed(&guest)
    });
}

#[test]
fn a_name_that_is_taken() {
    with_lab(AgentConfig::default(), |lab| {
        let (guest, mut other) = (GuestSpec::new("web", 1), GuestSpec::new("web", 2));
        other.memory = "64M".into();
        lab.guest(&guest)?;
        lab.b.start_guest(&other)?;
        refused(lab, "web", "name-taken", &["web"])?;
        lab.a.guest_lives("web")?;
        lab.b.guest_lives("web")?;
        lab.settled(&lab.b, 1)?;
        lab.b.limosa(&["vm", "stop", "web"])?.expect_code(0)?;
        lab.settled(&lab.b, 0)?;
        lab.unharmed(&guest)
    });
}

fn host_memory_gib() -> Result<u64> {
    let text = std::fs::read_to_string("/proc/meminfo")?;
    let kib =
        text.lines().find_map(|l| l.strip_prefix("MemTotal:")).and_then(|l| l.split_whitespace().next()?.parse::<u64>().ok());
    Ok(kib.context("MemTotal")? >> 20)
}

#[test]
fn no_room_for_the_memory() {
    with_lab(AgentConfig::default(), |lab| {
        // Never touched, so it costs nothing here; but the destination has to have room for all of it.
        let more_than_there_is = format!("{}G", host_memory_gib()? + 4);
        let (vast, guest) = (GuestSpec::new("vast", 1).memory(&more_than_there_is, "0"), GuestSpec::new("web", 2));
        lab.guest(&vast)?;
        lab.guest(&guest)?;
        refused(lab, "vast", "no-room", &["memory"])?;
        lab.settled(&lab.b, 0)?;
        lab.a.guest_lives("vast")?;
        lab.a.limosa(&["vm", "stop", "vast"])?.expect_code(0)?;
        lab.unharmed(&guest)
    });
}

#[test]
fn an_agent_that_is_not_there() {
    with_lab(AgentConfig::default(), |lab| {
        let guest = GuestSpec::new("web", 1);
        lab.guest(&guest)?;
        lab.b.stop_agent()?;
        let output = lab.a.migrate("web", &lab.b, &[])?.expect_code(1)?;
        ensure!(output.all().contains("10.77.0.2:13560"), "the words do not say who was not reached: {output:?}");
        lab.b.restart_agent()?;
        lab.unharmed(&guest)
    });
}

#[test]
fn a_guest_that_is_not_there_and_one_that_moves_already() {
    with_lab(AgentConfig::default(), |lab| {
        let guest = GuestSpec::new("web", 1).memory("128M", "48M");
        lab.guest(&guest)?;
        let output = lab.a.limosa(&["migrate", "nobody", "--to", "b"])?.expect_code(1)?;
        ensure!(output.all().contains("nobody"), "{output:?}");
        let mut running = lab.a.start_slow("web", &lab.b, &[])?;
        let output = lab.a.migrate("web", &lab.b, &[])?.expect_code(1)?;
        ensure!(output.all().contains("web"), "{output:?}");
        running.wait(std::time::Duration::from_secs(60))?.expect_code(0)?;
        lab.guest_is_on(&guest, &lab.b, &lab.a)?;
        lab.b.migrate_well("web", &lab.a, &[])?;
        lab.guest_is_on(&guest, &lab.a, &lab.b)
    });
}
