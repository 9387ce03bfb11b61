//! What is found out before anything is sent: `limosa check`, the CPU of guests and hosts, and that the check and a migration say
//! the same. Two different hosts are made on one machine by keeping features back on one of them.
#![allow(clippy::panic, clippy::unwrap_used, clippy::expect_used, missing_docs, unreachable_pub)]

use rig::{AgentConfig, Context, GuestSpec, Host, Lab, Result, ensure, with_bare_lab, with_lab};
use serde_json::Value;

/// Features of which this machine's guests have some. First the one that every KVM can hide: PVM shows its guests the CPU's AVX.
const CANDIDATES: &[&str] = &["cx16", "avx2", "sse4_2", "popcnt"];

/// The names of the features that a host gives to guests.
fn features(host: &Host) -> Result<Vec<String>> {
    let report = host.ask(&["host", "cpu"])?;
    let list = report["features"].as_array().with_context(|| format!("{report}"))?;
    Ok(list.iter().filter_map(Value::as_str).map(str::to_owned).collect())
}

/// One of the features that guests have on this machine.
fn some_feature(host: &Host) -> Result<&'static str> {
    let had = features(host)?;
    CANDIDATES.iter().find(|name| had.iter().any(|has| has == *name)).copied().with_context(|| format!("{had:?}"))
}

/// What `limosa check` says of a guest, with its exit code.
fn check(lab: &Lab, guest: &str, code: i32) -> Result<Value> {
    let output = lab.a.limosa(&["--json", "check", guest, "--to", "b"])?.expect_code(code)?;
    output.json()
}

fn ids(report: &Value) -> Vec<&str> {
    report["reasons"].as_array().into_iter().flatten().filter_map(|reason| reason["id"].as_str()).collect()
}

/// Nothing was begun on either host: no job, no VMM but the guests', no TAP but theirs.
fn untouched(lab: &Lab, guest: &GuestSpec) -> Result<()> {
    ensure!(lab.a.jobs()?.is_empty() && lab.b.jobs()?.is_empty(), "a check made a job");
    lab.guest_is_on(guest, &lab.a, &lab.b)
}

#[test]
fn a_guest_that_can_move_is_told_how() {
    with_lab(AgentConfig::default(), |lab| {
        let guest = GuestSpec::new("web", 1);
        lab.guest(&guest)?;
        let report = check(lab, "web", 0)?;
        ensure!(report["ok"] == true && ids(&report).is_empty(), "{report}");
        ensure!(report["plan"]["link"] == "tcp" && report["estimate"]["memory_bytes"] == 128 << 20, "{report}");
        ensure!(report["estimate"]["seconds"].as_f64() > Some(0.0), "{report}");
        let shown = lab.a.limosa(&["check", "web", "--to", "b"])?.expect_code(0)?;
        ensure!(shown.stdout.starts_with("ok") && shown.stdout.contains("tcp") && shown.stdout.contains("50 ms"), "{shown:?}");
        untouched(lab, &guest)?;
        let output = lab.a.limosa(&["--json", "check", "nobody", "--to", "b"])?.expect_code(1)?;
        ensure!(output.all().contains("nobody"), "{output:?}");
        let output = lab.a.limosa(&["--json", "check", "web", "--to", "nowhere"])?.expect_code(1)?;
        ensure!(output.all().contains("limosa host trust"), "{output:?}");
        lab.good_migration(&guest)
    });
}

#[test]
fn every_reason_is_told_before_anything_is_sent() {
    with_bare_lab(|lab| {
        lab.start_agents(AgentConfig::default())?;
        let hidden = some_feature(&lab.a)?;
        let guest = GuestSpec::new("web", 1);
        lab.guest(&guest)?;
        lab.b.stop_agent()?;
        lab.b.start_agent(AgentConfig::default().hide(&[hidden]).networks(&[("storage", "br0")]))?;
        ensure!(!features(&lab.b)?.iter().any(|name| name == hidden), "{hidden} is still offered");
        let report = check(lab, "web", 1)?;
        ensure!(report["ok"] == false && ids(&report).contains(&"network-missing"), "{report}");
        ensure!(ids(&report).contains(&"cpu-feature"), "{report}");
        let text = report.to_string();
        ensure!(text.contains("that b lacks: ") && text.contains(&format!("{hidden} (CPUID ")), "{report}");
        ensure!(text.contains("cpu = { common = [\\\"a\\\", \\\"b\\\"] }"), "{report}");
        untouched(lab, &guest)?;
        // The migration itself is refused by the same reasons, in the same words.
        let output = lab.a.migrate("web", &lab.b, &[])?.expect_code(1)?;
        for reason in report["reasons"].as_array().context("reasons")? {
            let words = reason["words"].as_str().context("words")?;
            ensure!(output.json()?["words"].as_str().is_some_and(|said| said.contains(words)), "{words:?} is not in {output:?}");
        }
        ensure!(output.all().contains("to be able to move it there"), "{output:?}");
        lab.settled(&lab.b, 0)?;
        lab.b.stop_agent()?;
        lab.b.start_agent(AgentConfig::default())?;
        lab.unharmed(&guest)
    });
}

#[test]
fn a_guest_of_what_both_hosts_have_goes_there_and_back() {
    with_bare_lab(|lab| {
        lab.start_agents(AgentConfig::default())?;
        let hidden = some_feature(&lab.a)?;
        lab.b.stop_agent()?;
        lab.b.start_agent(AgentConfig::default().hide(&[hidden]))?;
        let guest = GuestSpec::new("web", 1).cpu("{ common = [\"a\", \"b\"] }");
        lab.guest(&guest)?;
        let report = check(lab, "web", 0)?;
        ensure!(report["ok"] == true, "{report}");
        lab.good_migration(&guest)?;
        lab.b.migrate_well("web", &lab.a, &[])?;
        lab.guest_is_on(&guest, &lab.a, &lab.b)?;
        // And so does one of a baseline, and one that sees only the least.
        for (number, cpu) in [(2, "\"baseline:x86-64-v1\""), (3, "\"minimum\"")] {
            let other = GuestSpec::new(&format!("web{number}"), number).cpu(cpu);
            lab.guest(&other)?;
            lab.a.migrate_well(&other.name, &lab.b, &[])?;
            lab.b.guest_verified(&other.name, 1)?;
            lab.b.limosa(&["vm", "stop", &other.name])?.expect_code(0)?;
        }
        let left = std::fs::read_dir(lab.a.state_dir().join("vm"))?.flatten().map(|entry| entry.file_name());
        let left: Vec<_> = left.filter(|name| name.to_string_lossy().ends_with(".cpu.json")).collect();
        ensure!(left.is_empty(), "{left:?}");
        lab.guest_is_on(&guest, &lab.a, &lab.b)
    });
}

/// A guest that cannot be started so, with what is said about it; nothing of it is left.
fn not_started(lab: &Lab, guest: &GuestSpec, code: i32, words: &[&str]) -> Result<()> {
    let path = lab.a.file(&format!("{}.toml", guest.name));
    std::fs::write(&path, guest.text(&rig::guest_images()?.elf))?;
    let output = lab.a.limosa(&["--json", "vm", "start", &path.to_string_lossy()])?.expect_code(code)?;
    for word in words {
        ensure!(output.all().contains(word), "{word:?} is not in {output:?}");
    }
    lab.settled(&lab.a, 0)
}

#[test]
fn a_cpu_that_cannot_be_had_is_refused_at_the_start() {
    with_bare_lab(|lab| {
        lab.start_agents(AgentConfig::default())?;
        lab.a.stop_agent()?;
        let mut config = AgentConfig::default().hide(&["cx16"]);
        config.cpu.insert("vcpus_max".into(), "2".into());
        lab.a.start_agent(config)?;
        let guest = |cpu: &str| GuestSpec::new("web", 1).cpu(cpu);
        not_started(lab, &guest("\"baseline:x86-64-v2\""), 1, &["x86-64-v1 and not x86-64-v2", "cx16 (CPUID 1 ECX bit 13)"])?;
        not_started(lab, &guest("{ common = [\"a\", \"nobody\"] }"), 1, &["nobody", "known: b, a"])?;
        not_started(lab, &guest("\"baseline:x86-64-v7\""), 2, &["web.toml:1: cpu is", "common"])?;
        not_started(lab, &GuestSpec { vcpus: 3, ..guest("\"host\"") }, 1, &["3 vCPUs", "at most 2", "vcpus_max"])?;
        lab.b.stop_agent()?;
        not_started(lab, &guest("{ common = [\"a\", \"b\"] }"), 1, &["10.77.0.2:13560", "common"])?;
        lab.b.restart_agent()?;
        let good = guest("{ common = [\"a\", \"b\"] }");
        lab.guest(&good)?;
        lab.good_migration(&good)
    });
}

#[test]
fn a_host_shows_its_cpu() {
    with_lab(AgentConfig::default(), |lab| {
        let report = lab.a.ask(&["host", "cpu"])?;
        ensure!(report["level"].as_str().is_some_and(|level| level.starts_with("x86-64-v")), "{report}");
        ensure!(report["tsc_khz"].as_u64() > Some(0) && report["vcpus_max"].as_u64() > Some(0), "{report}");
        ensure!(report["profile"]["leaves"].as_array().is_some_and(|leaves| leaves.len() > 5), "{report}");
        let shown = lab.a.limosa(&["host", "cpu"])?.expect_code(0)?;
        for word in ["level", "x86-64-v", "features", "sse2", "TSC", "MHz", "vCPUs"] {
            ensure!(shown.stdout.contains(word), "{word} is not in {}", shown.stdout);
        }
        Ok(())
    });
}
