//! Keys of hosts over time: a new key with an overlap, and a fleet that vouches for its hosts, on real hosts with real guests.
//! Which key the TLS of each link takes is in `transport/link/tests/trust.rs`.
#![allow(clippy::panic, clippy::unwrap_used, clippy::expect_used, clippy::print_stdout, missing_docs, unreachable_pub)]

use rig::command::limosa;
use rig::process::wait_for;
use rig::{AgentConfig, GuestSpec, Host, Lab, Result, ensure, with_bare_lab, with_lab};
use std::time::Duration;

const SOON: Duration = Duration::from_secs(20);

fn guest() -> GuestSpec {
    GuestSpec::new("web", 1)
}

fn there_and_back(lab: &Lab, link: &str) -> Result<()> {
    lab.a.migrate_well("web", &lab.b, &["--link", link])?;
    lab.guest_is_on(&guest(), &lab.b, &lab.a)?;
    lab.b.migrate_well("web", &lab.a, &["--link", link])?;
    lab.guest_is_on(&guest(), &lab.a, &lab.b)
}

fn rotate(host: &Host, overlap: &str) -> Result<String> {
    let output = host.limosa(&["host", "rotate", "--overlap", overlap])?.expect_code(0)?;
    println!("$ limosa {}\n{}{}", output.words, output.stdout, output.stderr);
    Ok(output.stdout.trim().to_owned())
}

#[test]
fn a_host_gets_a_new_key_while_its_old_one_still_works() {
    with_lab(AgentConfig::default(), |lab| {
        lab.guest(&guest())?;
        let old = lab.a.id()?;
        let statement = rotate(&lab.a, "1d")?;
        ensure!(rotate(&lab.a, "1d")? == statement, "asked again, it is another one");
        // Nobody has heard of it: all is as before.
        ensure!(lab.a.id()? == old, "the key changed at once");
        there_and_back(lab, "tcp")?;
        let changed = statement
            .replace("limosa-succession-1.A", "limosa-succession-1.B")
            .replace("limosa-succession-1.a", "limosa-succession-1.b");
        for bad in ["nonsense", &statement[..statement.len() - 4], &format!("{changed}A")] {
            lab.b.limosa(&["host", "trust", "--statement", bad])?.expect_code(1)?;
        }
        let told = lab.b.limosa(&["host", "trust", "--statement", &statement])?.expect_code(0)?;
        println!("{}", told.stdout);
        ensure!(told.stdout.contains("a has a new key"), "{told:?}");
        // The old key in the overlap, over both links; b asks for the new one and gets the old one of the same host.
        for link in ["tcp", "quic"] {
            there_and_back(lab, link)?;
        }
        lab.b.stop_agent()?;
        lab.b.restart_agent()?;
        lab.a.stop_agent()?;
        lab.a.restart_agent()?;
        lab.a.wait_knows("web", true)?;
        there_and_back(lab, "tcp")?;
        println!("{}", lab.a.limosa(&["host", "rotate", "--finish"])?.expect_code(0)?.stdout);
        let new = lab.a.id()?;
        ensure!(new != old, "the key is the old one");
        for link in ["tcp", "quic"] {
            there_and_back(lab, link)?;
        }
        lab.a.limosa(&["host", "rotate", "--finish"])?.expect_code(1)?;
        lab.a.stop_agent()?;
        lab.a.restart_agent()?;
        ensure!(lab.a.id()? == new, "a restart brought the old key back");
        lab.unharmed(&guest())
    });
}

#[test]
fn the_new_key_is_taken_when_the_overlap_ends_and_who_was_not_told_refuses_it() {
    with_lab(AgentConfig::default(), |lab| {
        lab.guest(&guest())?;
        let old = lab.a.id()?;
        let statement = rotate(&lab.a, "2s")?;
        wait_for(SOON, "the new key", || Ok((lab.a.id()? != old).then_some(())))?;
        let output = lab.a.migrate("web", &lab.b, &[])?.expect_code(1)?;
        ensure!(output.all().contains("unknown-host"), "{output:?}");
        lab.a.guest_lives("web")?;
        // Told late, it is not too late: the old key's word counts for as long as the old key is trusted.
        lab.b.limosa(&["host", "trust", "--statement", &statement])?.expect_code(0)?;
        there_and_back(lab, "tcp")?;
        // A revoked key says nothing, and neither does one that nobody trusts.
        let next = rotate(&lab.a, "1d")?;
        lab.b.limosa(&["host", "revoke", &lab.a.id()?])?.expect_code(0)?;
        let output = lab.b.limosa(&["host", "trust", "--statement", &next])?.expect_code(1)?;
        ensure!(output.stderr.contains("is revoked here"), "{output:?}");
        lab.b.limosa(&["host", "revoke", "--undo", &lab.a.id()?])?.expect_code(0)?;
        lab.unharmed(&guest())
    });
}

#[test]
fn a_fleet_vouches_for_its_hosts_until_a_date() {
    with_bare_lab(|lab| {
        let key = lab.a.file("fleet.key").to_string_lossy().into_owned();
        let statements = lab.a.file("fleet");
        let fleet = limosa(&["fleet", "id", "--key", &key])?.expect_code(0)?.stdout.trim().to_owned();
        let config =
            || AgentConfig::default().trust("fleet", format!("{fleet:?}")).trust("statements", format!("{statements:?}"));
        std::fs::write(&statements, "# nobody yet\n")?;
        lab.a.start_agent(config())?;
        lab.b.start_agent(config())?;
        lab.guest(&guest())?;
        let sign = |host: &Host, life: &str| -> Result<String> {
            let words = ["fleet", "sign", &host.name, &host.id()?, &host.address().to_string(), "--life", life, "--key", &key];
            Ok(limosa(&words)?.expect_code(0)?.stdout)
        };
        let reload = |code| -> Result<String> {
            let said = lab.b.limosa(&["allow", "reload"])?.expect_code(code)?.all();
            lab.a.limosa(&["allow", "reload"])?.expect_code(code)?;
            Ok(said)
        };
        let unknown = lab.a.limosa(&["migrate", "web", "--to", "b"])?.expect_code(1)?;
        ensure!(unknown.all().contains("no host is called"), "{unknown:?}");
        std::fs::write(&statements, format!("{}{}", sign(&lab.a, "1d")?, sign(&lab.b, "1d")?))?;
        reload(0)?;
        println!("{}", lab.a.limosa(&["host", "list"])?.stdout);
        for link in ["tcp", "quic"] {
            there_and_back(lab, link)?;
        }
        // A line that is none, or another fleet's, changes nothing.
        let good = std::fs::read_to_string(&statements)?;
        let other = lab.a.file("other.key").to_string_lossy().into_owned();
        limosa(&["fleet", "id", "--key", &other])?.expect_code(0)?;
        let foreign = limosa(&["fleet", "sign", "c", &lab.a.id()?, "10.77.0.7", "--key", &other])?.expect_code(0)?.stdout;
        for bad in ["nonsense\n", &foreign] {
            std::fs::write(&statements, format!("{good}{bad}"))?;
            let said = reload(2)?;
            ensure!(said.contains(":3:") && said.contains("what was read before stays"), "{said}");
        }
        there_and_back(lab, "tcp")?;
        // Statements that have expired are worth nothing, nor does a restart help.
        std::fs::write(&statements, format!("{}{}", sign(&lab.a, "1s")?, sign(&lab.b, "1d")?))?;
        reload(0)?;
        wait_for(SOON, "the end of the statement", || {
            let output = lab.a.limosa(&["check", "web", "--to", "b"])?;
            Ok((output.code == 1 && output.all().contains("unknown-host")).then_some(()))
        })?;
        lab.a.migrate("web", &lab.b, &[])?.expect_code(1)?;
        lab.a.guest_lives("web")?;
        ensure!(lab.b.agent_log().contains("for a time that is over"), "b does not say why");
        // A revoked member is none.
        std::fs::write(&statements, &good)?;
        reload(0)?;
        lab.b.limosa(&["host", "revoke", "a"])?.expect_code(0)?;
        lab.a.migrate("web", &lab.b, &[])?.expect_code(1)?;
        lab.b.limosa(&["host", "revoke", "--undo", &lab.a.id()?])?.expect_code(0)?;
        lab.unharmed(&guest())
    });
}
