//! A guest's identity on the network: who may have its MAC, the MTU and the VLAN of its networks, addresses that are learned, and
//! how long nobody got an answer. What is announced, and when, is in `announce`.
#![allow(clippy::panic, clippy::unwrap_used, clippy::expect_used, missing_docs, unreachable_pub)]

use rig::netns::run;
use rig::process::wait_for;
use rig::{AgentConfig, Context, GuestSpec, Host, Lab, Result, ensure, with_bare_lab, with_lab};
use serde_json::Value;
use std::time::Duration;

/// The migration is refused with this code and these words.
fn refused(lab: &Lab, guest: &str, code: &str, words: &[&str]) -> Result<()> {
    let output = lab.a.migrate(guest, &lab.b, &[])?.expect_code(1)?;
    for word in words.iter().chain([&code]) {
        ensure!(output.all().contains(word), "{word:?} is not in {output:?}");
    }
    Ok(())
}

/// The start is refused with this code and these words, and leaves nothing.
fn not_started(lab: &Lab, host: &Host, spec: &GuestSpec, guests: usize, words: &[&str]) -> Result<()> {
    let path = host.file(&format!("{}.toml", spec.name));
    std::fs::write(&path, spec.text(&rig::guest_images()?.elf))?;
    let output = host.limosa(&["--json", "vm", "start", &path.to_string_lossy()])?.expect_code(1)?;
    for word in words {
        ensure!(output.all().contains(word), "{word:?} is not in {output:?}");
    }
    lab.settled(host, guests)
}

#[test]
fn a_mac_that_another_guest_has() {
    with_lab(AgentConfig::default(), |lab| {
        let (guest, double) = (GuestSpec::new("web", 1), GuestSpec::new("double", 2).mac_of(1));
        lab.guest(&guest)?;
        not_started(lab, &lab.a, &double, 1, &["mac-taken", "52:54:00:77:00:01", "\"web\"", "double"])?;
        lab.b.start_guest(&double)?;
        refused(lab, "web", "mac-taken", &["52:54:00:77:00:01", "\"double\""])?;
        lab.settled(&lab.b, 1)?;
        lab.b.guest_lives("double")?;
        lab.b.limosa(&["vm", "stop", "double"])?.expect_code(0)?;
        lab.settled(&lab.b, 0)?;
        lab.unharmed(&guest)
    });
}

#[test]
fn a_mac_that_an_interface_of_the_host_has() {
    with_lab(AgentConfig::default(), |lab| {
        let guest = GuestSpec::new("web", 1);
        lab.guest(&guest)?;
        lab.b.ip("link add x0 type veth peer name x1")?;
        lab.b.ip(&format!("link set x0 address {}", guest.mac()))?;
        refused(lab, "web", "mac-taken", &["interface x0"])?;
        not_started(lab, &lab.b, &GuestSpec::new("other", 2).mac_of(1), 0, &["mac-taken", "interface x0"])?;
        lab.b.ip("link del x0")?;
        lab.unharmed(&guest)
    });
}

#[test]
fn a_mac_that_somebody_behind_a_port_of_the_bridge_has() {
    with_lab(AgentConfig::default(), |lab| {
        let guest = GuestSpec::new("web", 1);
        lab.guest(&guest)?;
        // The guest was heard through the uplink, of course: no conflict, as the end of this test shows.
        let asking = rig::net::GuestProbe::start(&lab.b.netns, guest.ip())?;
        let seen = || Ok((rig::net::fdb_port(&lab.b.netns, "br0", &guest.mac())?.as_deref() == Some("up0")).then_some(()));
        wait_for(Duration::from_secs(5), "the guest's MAC on b's uplink", seen)?;
        // What is heard there moves the entry that is made now.
        asking.finish()?;
        lab.b.ip("tuntap add foreign0 mode tap")?;
        lab.b.ip("link set foreign0 master br0")?;
        run("bridge", &["-n", lab.b.netns.name(), "fdb", "replace", &guest.mac(), "dev", "foreign0", "master", "static"])?;
        refused(lab, "web", "mac-taken", &["foreign0"])?;
        lab.b.ip("link del foreign0")?;
        lab.unharmed(&guest)
    });
}

#[test]
fn an_mtu_that_is_too_small_at_the_destination() {
    with_lab(AgentConfig::default().network("mtu", 3000), |lab| {
        for (host, port) in [(&lab.a, "p-a"), (&lab.b, "p-b")] {
            // The agents talk over the same bridges: the whole way must carry what they then send.
            lab.switch.ip(&format!("link set {port} mtu 3000"))?;
            host.ip("link set up0 mtu 3000")?;
            host.ip("link set br0 mtu 3000")?;
        }
        let guest = GuestSpec::new("web", 1).nic("mtu = 2000");
        lab.guest(&guest)?;
        lab.b.ip("link set br0 mtu 1600")?;
        refused(lab, "web", "network-missing", &["2000", "3000", "br0", "1600"])?;
        not_started(lab, &lab.b, &GuestSpec::new("other", 2).nic("mtu = 2000"), 0, &["network-mtu", "this host", "1600"])?;
        lab.b.ip("link set br0 mtu 3000")?;
        lab.unharmed(&guest)
    });
}

#[test]
fn a_vlan_on_a_bridge_that_filters_none() {
    with_bare_lab(|lab| {
        lab.start_agents_with(AgentConfig::default(), AgentConfig::default().network("vlan", 100))?;
        let guest = GuestSpec::new("web", 1);
        lab.guest(&guest)?;
        refused(lab, "web", "network-missing", &["VLAN 100", "br0", "filter"])?;
        let own = GuestSpec::new("own", 2).nic("vlan = 7");
        not_started(lab, &lab.a, &own, 1, &["network-vlan", "VLAN 7", "br0", "filter"])?;
        lab.b.stop_agent()?;
        lab.b.start_agent(AgentConfig::default())?;
        lab.unharmed(&guest)
    });
}

#[test]
fn a_guest_in_a_vlan_is_seen_there_only_and_moves_with_it() {
    with_bare_lab(|lab| {
        for (netns, bridge) in [(&lab.a.netns, "br0"), (&lab.b.netns, "br0"), (&lab.switch, rig::lab::SWITCH)] {
            if netns.ip(&format!("link set {bridge} type bridge vlan_filtering 1")).is_err() {
                rig::skip::skip_for_the_lab("this kernel has no bridge with vlan_filtering (CONFIG_BRIDGE_VLAN_FILTERING)");
                return Ok(());
            }
        }
        let vlan = |netns: &rig::netns::Netns, words: &str| -> Result<()> {
            let mut all = vec!["-n", netns.name(), "vlan"];
            all.extend(words.split_whitespace());
            run("bridge", &all).map(drop)
        };
        for host in [&lab.a, &lab.b] {
            vlan(&host.netns, "add dev up0 vid 100")?;
        }
        vlan(&lab.switch, "add dev p-a vid 100")?;
        vlan(&lab.switch, "add dev p-b vid 100")?;
        // The third machine is in VLAN 100 and in no other, as the guest is; the agents talk in VLAN 1.
        vlan(&lab.switch, "add dev p-watch vid 100 pvid untagged")?;
        vlan(&lab.switch, "del dev p-watch vid 1")?;
        lab.start_agents(AgentConfig::default().network("vlan", 100))?;
        let guest = GuestSpec::new("web", 1);
        lab.guest(&guest)?;
        let report = lab.a.migrate_well("web", &lab.b, &[])?;
        // Not how long: kernels with VLAN filtering are those of the lab, and it is slow.
        ensure!(report["network_gap_ms"].is_number(), "{report}");
        let by = report["network_gap_by"].as_str().context("network_gap_by")?;
        ensure!(by.contains("ARP probe") && by.contains("VLAN 100"), "measured by {by:?}");
        lab.guest_is_on(&guest, &lab.b, &lab.a)?;
        ensure!(report["announcements"].to_string().contains("vlan 100"), "{report}");
        let moved = || Ok((lab.port_of(&guest)?.as_deref() == Some("p-b")).then_some(()));
        wait_for(Duration::from_secs(1), "the MAC on p-b", moved)?;
        let tap = lab.b.netns.taps()?.first().context("a TAP")?.clone();
        let member = run("bridge", &["-n", lab.b.netns.name(), "-j", "vlan", "show", "dev", &tap])?;
        let member: Value = serde_json::from_str(&member)?;
        let of: Vec<&Value> = member[0]["vlans"].as_array().context("vlans")?.iter().map(|vlan| &vlan["vlan"]).collect();
        ensure!(of == [&Value::from(100)], "the TAP is in {member}");
        // In VLAN 1 nobody is there.
        vlan(&lab.switch, "add dev p-watch vid 1 pvid untagged")?;
        vlan(&lab.switch, "del dev p-watch vid 100")?;
        let probe = lab.probe(&guest)?;
        std::thread::sleep(Duration::from_millis(500));
        let seen = probe.finish()?;
        ensure!(seen.sent > 10 && seen.received == 0, "the guest answers outside of its VLAN: {seen:?}");
        vlan(&lab.switch, "add dev p-watch vid 100 pvid untagged")?;
        vlan(&lab.switch, "del dev p-watch vid 1")?;
        lab.b.migrate_well("web", &lab.a, &[])?;
        lab.guest_is_on(&guest, &lab.a, &lab.b)
    });
}

/// The network gap of a report, measured as these words say, and sane: the downtime and at most 50 ms.
fn gap_of(report: &Value, by: &[&str]) -> Result<f64> {
    let number = |key: &str| report[key].as_f64().with_context(|| format!("{key} in {report}"));
    let (downtime, gap) = (number("downtime_ms")?, number("network_gap_ms")?);
    let words = report["network_gap_by"].as_str().with_context(|| format!("network_gap_by in {report}"))?;
    ensure!(by.iter().all(|by| words.contains(by)), "measured by {words:?}");
    ensure!(gap >= downtime, "a gap of {gap} ms is shorter than the downtime of {downtime} ms");
    ensure!(gap <= downtime + 50.0, "a gap of {gap} ms, and a downtime of {downtime} ms");
    Ok(gap)
}

#[test]
fn the_network_gap_is_measured_from_the_host() {
    with_lab(AgentConfig::default(), |lab| {
        let guest = GuestSpec::new("web", 1);
        lab.guest(&guest)?;
        // Two busy cores run all of this: three tries, one must hold.
        let mut seen = Vec::new();
        for (from, to) in [(&lab.a, &lab.b), (&lab.b, &lab.a), (&lab.a, &lab.b)] {
            let report = from.migrate_well("web", to, &[])?;
            lab.guest_is_on(&guest, to, from)?;
            match gap_of(&report, &["ARP probe", &guest.ip().to_string(), "br0"]) {
                Ok(_) => return Ok(()),
                Err(error) => seen.push(format!("{error:#}")),
            }
        }
        rig::bail!("no gap was as it should be: {seen:?}")
    });
}

#[test]
fn a_guest_that_does_not_answer_costs_a_warning_and_two_seconds() {
    with_lab(AgentConfig::default(), |lab| {
        // Nobody has the address that its file names.
        let silent = GuestSpec::new("web", 1).addresses_unknown().nic("addresses = [\"10.77.0.250\"]");
        lab.a.start_guest(&silent)?;
        let report = lab.a.migrate_well("web", &lab.b, &[])?;
        ensure!(report["network_gap_ms"].is_null() && report["network_gap_by"].is_null(), "{report}");
        ensure!(report["warnings"].to_string().contains("no answer to ARP probe of 10.77.0.250 from br0"), "{report}");
        let total = report["total_ms"].as_f64().context("total_ms")?;
        ensure!(total < 8000.0, "the source waited {total} ms");
        lab.guest_is_on(&silent, &lab.b, &lab.a)?;
        let nameless = GuestSpec::new("db", 2).addresses_unknown();
        lab.a.start_guest(&nameless)?;
        let report = lab.a.migrate_well("db", &lab.b, &[])?;
        ensure!(report["network_gap_ms"].is_null(), "{report}");
        ensure!(report["warnings"].to_string().contains("no address of the guest is known"), "{report}");
        Ok(())
    });
}

/// The line of the guest's NIC in `limosa vm show`.
fn shown(host: &Host, guest: &str) -> Result<String> {
    Ok(host.ask(&["vm", "show", guest])?["nics"][0].as_str().context("a NIC")?.to_owned())
}

#[test]
fn an_address_that_no_file_names_is_learned_announced_and_goes_along() {
    with_lab(AgentConfig::default(), |lab| {
        let guest = GuestSpec::new("web", 1).addresses_unknown();
        lab.guest(&guest)?;
        let ip = guest.ip().to_string();
        let learned = || Ok(shown(&lab.a, "web")?.contains(&ip).then_some(()));
        wait_for(Duration::from_secs(5), "the address in `vm show`", learned)?;
        for (from, to) in [(&lab.a, &lab.b), (&lab.b, &lab.a)] {
            let report = from.migrate_well("web", to, &[])?;
            let announced = report["announcements"].to_string();
            ensure!(announced.contains(&format!("round 0 at 0 ms on br0: gratuitous ARP request {ip}")), "{announced}");
            ensure!(report["network_gap_ms"].is_number(), "{report}");
            ensure!(shown(to, "web")?.contains(&ip), "{} does not know it: {}", to.name, shown(to, "web")?);
            lab.guest_is_on(&guest, to, from)?;
        }
        Ok(())
    });
}

#[test]
fn nothing_is_learned_where_that_is_switched_off() {
    with_lab(AgentConfig::default().network("learn", false), |lab| {
        let guest = GuestSpec::new("web", 1).addresses_unknown();
        lab.guest(&guest)?;
        let report = lab.a.migrate_well("web", &lab.b, &[])?;
        ensure!(!report["announcements"].to_string().contains("gratuitous ARP"), "{report}");
        ensure!(!shown(&lab.b, "web")?.contains(&guest.ip().to_string()), "{}", shown(&lab.b, "web")?);
        lab.guest_is_on(&guest, &lab.b, &lab.a)
    });
}
