//! A flood at the port of a destination while a guest comes there: 10,000 connections from an allowed address, none of which ends its
//! handshake. The migration is committed, and the agent's own memory stays bounded. How much slower it is is measured in
//! `benches/flood.rs`, not here.
#![allow(clippy::panic, clippy::unwrap_used, clippy::expect_used, clippy::print_stdout, missing_docs, unreachable_pub)]

mod hello;

use rig::flood::{Extent, Flood, beginnings};
use rig::process::{memory_kib, wait_for};
use rig::{AgentConfig, GuestSpec, ensure, with_lab};
use std::time::Duration;

/// What an agent may hold of its own for a flood: all places full, and what the allocator keeps.
const GROWTH_KIB_MAX: u64 = 32 << 10;
const SOON: Duration = Duration::from_secs(60);

#[test]
fn ten_thousand_connections_stop_no_migration_and_take_no_memory() {
    with_lab(AgentConfig::default(), |lab| {
        let guest = GuestSpec::new("web", 1).memory("256M", "64M").dirty("4M", "16M");
        lab.guest(&guest)?;
        let pid = lab.b.agent_pid()?;
        let own = || memory_kib(pid, "RssAnon");
        let before = own()?;
        let extent = Extent { connections: 10_000, over: Duration::from_secs(6), threads: 4 };
        let mut flood = Flood::start(&lab.watch, lab.b.address(), extent, &beginnings(&hello::hello()?))?;
        wait_for(SOON, "the flood to have begun", || Ok((flood.made().0 > 500).then_some(())))?;
        let report = lab.a.migrate_well("web", &lab.b, &["--bandwidth", "32MB/s"])?;
        let made = flood.made();
        let mut during = own()?;
        wait_for(SOON, "the flood's end", || {
            during = during.max(own()?);
            Ok((flood.made().0 + flood.made().1 == extent.connections).then_some(()))
        })?;
        let (all, failed) = flood.wait()?;
        drop(flood);
        println!(
            "{} of {all} connections were made while the guest moved ({} ms), {failed} could not be made; the agent's own memory: \
             {before} KiB before, {during} during, {} after",
            made.0,
            report["total_ms"],
            own()?
        );
        ensure!(all + failed == extent.connections && all > extent.connections / 2, "{all} were made, {failed} failed");
        ensure!(made.0 > 1_000, "only {} came while the guest moved", made.0);
        ensure!(during < before + GROWTH_KIB_MAX && own()? < before + GROWTH_KIB_MAX, "{before} KiB before, {during} during");
        lab.guest_is_on(&guest, &lab.b, &lab.a)?;
        lab.b.guest_verified("web", 1)?;
        lab.b.migrate_well("web", &lab.a, &[])?;
        lab.guest_is_on(&guest, &lab.a, &lab.b)
    });
}
