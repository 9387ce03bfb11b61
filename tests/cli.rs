//! The command as people and scripts meet it: help, errors with file and line, JSON, exit codes, and the demo.
#![allow(clippy::panic, clippy::unwrap_used, clippy::expect_used, missing_docs, unreachable_pub)]

use nix::sys::signal::Signal;
use rig::command::limosa;
use rig::process::{Process, limosa_bin, wait_for};
use rig::{AgentConfig, Context, GuestSpec, Result, ensure, lab, netns, skip, with_lab};
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Duration;

const COMMANDS: &[&[&str]] = &[
    &["agent"],
    &["vmm"],
    &["vm", "start"],
    &["vm", "list"],
    &["vm", "show"],
    &["vm", "stop"],
    &["vm", "pause"],
    &["vm", "resume"],
    &["vm", "save"],
    &["vm", "restore"],
    &["host", "id"],
    &["host", "show"],
    &["host", "cpu"],
    &["host", "trust"],
    &["host", "list"],
    &["host", "remove"],
    &["migrate"],
    &["check"],
    &["jobs"],
    &["job"],
    &["cancel"],
    &["verdict"],
    &["announce"],
    &["allow", "list"],
    &["allow", "test"],
    &["operator", "id"],
    &["operator", "trust"],
    &["operator", "hosts"],
    &["operator", "forget"],
    &["ticket", "make"],
    &["ticket", "show"],
    &["ticket", "verify"],
    &["demo"],
    &["completions"],
    &["man"],
];

#[test]
fn every_command_has_help_and_a_wrong_flag_is_a_usage_error() -> Result<()> {
    let top = limosa(&["--help"])?.expect_code(0)?;
    for words in COMMANDS {
        ensure!(top.stdout.contains(words[0]), "{} is not in the help", words[0]);
        let mut help = words.to_vec();
        help.push("--help");
        let output = limosa(&help)?.expect_code(0)?;
        ensure!(output.stdout.contains("Usage") && output.stdout.lines().count() > 4, "{help:?}: {}", output.stdout);
        let mut wrong = words.to_vec();
        wrong.push("--no-such-flag");
        let output = limosa(&wrong)?.expect_code(2)?;
        ensure!(output.stdout.is_empty() && output.stderr.contains("--no-such-flag"), "{output:?}");
    }
    Ok(())
}

#[test]
fn completions_and_the_man_page_name_the_commands() -> Result<()> {
    for shell in ["bash", "zsh", "fish"] {
        let output = limosa(&["completions", shell])?.expect_code(0)?;
        ensure!(output.stdout.contains("migrate") && output.stdout.contains("announce"), "{shell}");
    }
    let man = limosa(&["man"])?.expect_code(0)?;
    ensure!(man.stdout.contains(".TH") && man.stdout.contains("migrate"), "no man page: {}", man.stdout);
    Ok(())
}

fn config_error(dir: &Path, text: &str, line: usize, words: &[&str]) -> Result<()> {
    let path = dir.join("agent.toml");
    std::fs::write(&path, text)?;
    let name = path.to_string_lossy();
    let output = limosa(&["agent", "--config", &name])?.expect_code(2)?;
    ensure!(output.stderr.contains(&format!("{name}:{line}")), "no {name}:{line} in {}", output.stderr);
    for word in words {
        ensure!(output.stderr.contains(word), "{word:?} is not in {}", output.stderr);
    }
    Ok(())
}

#[test]
fn a_bad_configuration_is_told_whole_with_file_and_line() -> Result<()> {
    let dir = tempfile::tempdir()?;
    let dir = dir.path();
    config_error(dir, "[allow]\npeers = [\"10.0.0.0/33\"]\n", 2, &["10.0.0.0/33"])?;
    config_error(dir, "[agent]\n\n[migration]\ndowntime_target = 3\n", 4, &["downtime_target", "downtime_target_ms"])?;
    config_error(dir, "[agent]\nname = 5\n", 2, &["name"])?;
    config_error(dir, "[migration]\non_no_convergence = \"hope\"\n", 2, &["hope", "longer-downtime", "abort"])?;
    config_error(dir, "[migration]\nlanes = 99\n", 2, &["99", "16"])?;
    config_error(dir, "[agent\n", 1, &[])?;
    // Every problem at once, not the first only.
    let both = "[allow]\npeers = [\"no rule!\"]\n\n[migration]\nlanes = 0\n";
    config_error(dir, both, 2, &["no rule!", "lanes"])?;
    config_error(dir, both, 5, &["no rule!", "lanes"])?;
    let missing = dir.join("not-there.toml").to_string_lossy().into_owned();
    limosa(&["agent", "--config", &missing])?.expect_code(2)?.expect_words(&missing)?;
    Ok(())
}

#[test]
fn without_an_agent_each_command_says_so() -> Result<()> {
    let dir = tempfile::tempdir()?;
    let run_dir = dir.path().to_string_lossy().into_owned();
    for words in [&["vm", "list"][..], &["jobs"], &["migrate", "web", "--to", "b"], &["host", "id"], &["announce", "web"]] {
        let mut args = vec!["--run-dir", run_dir.as_str()];
        args.extend(words);
        let output = limosa(&args)?.expect_code(1)?;
        ensure!(output.stderr.contains("agent") && output.stderr.contains(&run_dir), "{words:?}: {output:?}");
        ensure!(output.stdout.is_empty(), "{output:?}");
    }
    Ok(())
}

#[test]
fn json_is_json_everywhere() {
    with_lab(AgentConfig::default(), |lab| {
        let guest = GuestSpec::new("web", 1);
        lab.guest(&guest)?;
        lab.a.migrate_well("web", &lab.b, &[])?;
        for words in
            [&["vm", "list"][..], &["vm", "show", "web"], &["host", "id"], &["host", "list"], &["jobs"], &["announce", "web"]]
        {
            lab.b.ask(words).with_context(|| format!("{words:?}"))?;
        }
        let jobs = lab.a.jobs()?;
        let id = jobs.first().context("no job")?["id"].to_string();
        lab.a.ask(&["job", &id])?;
        // Refusals too.
        for words in [&["vm", "show", "nobody"][..], &["job", "999"], &["cancel", "999"], &["migrate", "nobody", "--to", "b"]] {
            let mut args = vec!["--json"];
            args.extend(words);
            let output = lab.a.limosa(&args)?.expect_code(1)?;
            output.json().with_context(|| format!("{words:?}"))?;
        }
        // Without --json the same is for people: a table or words, and no JSON.
        let output = lab.b.limosa(&["vm", "list"])?.expect_code(0)?;
        ensure!(output.stdout.contains("web") && output.json().is_err(), "{output:?}");
        let back = lab.b.limosa(&["migrate", "web", "--to", "a"])?.expect_code(0)?;
        ensure!(back.stdout.contains("downtime"), "{back:?}");
        lab.guest_is_on(&guest, &lab.a, &lab.b)
    });
}

#[test]
fn the_plan_is_printed_and_nothing_moves() {
    with_lab(AgentConfig::default(), |lab| {
        let guest = GuestSpec::new("web", 1);
        lab.guest(&guest)?;
        let output = lab.a.limosa(&["migrate", "web", "--to", "b", "--lanes", "3", "--print-plan"])?.expect_code(0)?;
        ensure!(output.stdout.contains('3') && output.stdout.contains("10.77.0.2"), "{output:?}");
        lab.guest_is_on(&guest, &lab.a, &lab.b)?;
        ensure!(lab.a.jobs()?.is_empty(), "a plan made a job");
        lab.good_migration(&guest)
    });
}

fn demo_leftovers(pid: u32) -> Vec<String> {
    let mut found = netns::named(&format!("limosa-demo-{pid}"));
    for dir in ["/run", "/dev/shm", "/tmp"] {
        let entries = std::fs::read_dir(dir).into_iter().flatten().flatten();
        let ours = entries.filter(|e| e.file_name().to_string_lossy().contains(&format!("limosa-demo-{pid}")));
        found.extend(ours.map(|e| e.path().display().to_string()));
    }
    let mark = format!("limosa-demo-{pid}");
    let running = rig::process::all().into_iter().filter(|p| rig::process::words(*p).iter().any(|w| w.contains(&mark)));
    found.extend(running.map(|p| format!("process {p}: {:?}", rig::process::words(p))));
    found
}

fn demo(words: &[&str]) -> Result<(Process, tempfile::TempDir)> {
    let dir = tempfile::tempdir()?;
    let mut command = Command::new(limosa_bin()?);
    command.arg("demo").args(words).stdin(Stdio::null());
    command.stdout(std::fs::File::create(dir.path().join("out"))?).stderr(std::fs::File::create(dir.path().join("err"))?);
    Ok((Process::start("limosa demo", &mut command)?, dir))
}

#[test]
fn the_demo_is_verified_and_leaves_nothing() -> Result<()> {
    if let Some(reason) = lab::missing() {
        skip(&reason);
        return Ok(());
    }
    let (mut process, dir) = demo(&["--json", "--memory", "128M"])?;
    let pid = process.pid();
    let status = process.wait(Duration::from_secs(90))?;
    let text = rig::command::read_text(&dir.path().join("out"));
    ensure!(status.code() == Some(0), "{status}: {text}\n{}", rig::command::read_text(&dir.path().join("err")));
    let report: serde_json::Value = serde_json::from_str(&text).context(text)?;
    ensure!(report["ok"] == true && report["verified"] == true, "{report}");
    let gap = report["network_gap_ms"].as_f64().context("network_gap_ms")?;
    ensure!(gap > 0.0 && gap < 5000.0, "{report}");
    ensure!(demo_leftovers(pid).is_empty(), "{:?}", demo_leftovers(pid));
    Ok(())
}

#[test]
fn an_interrupted_demo_cleans_up() -> Result<()> {
    if let Some(reason) = lab::missing() {
        skip(&reason);
        return Ok(());
    }
    // At each moment of its life: while it builds the lab, while the guest starts, while it migrates.
    for after_ms in [30, 400, 1200, 2500] {
        let (mut process, dir) = demo(&["--json", "--memory", "256M", "--dirty", "50MB/s"])?;
        let pid = process.pid();
        std::thread::sleep(Duration::from_millis(after_ms));
        process.signal(Signal::SIGINT);
        let status = process.wait(Duration::from_secs(30))?;
        let printed = rig::command::read_text(&dir.path().join("err"));
        let gone = wait_for(Duration::from_secs(10), "the demo's leftovers", || Ok(demo_leftovers(pid).is_empty().then_some(())));
        ensure!(gone.is_ok(), "after {after_ms} ms, {status}: {:?}\n{printed}", demo_leftovers(pid));
    }
    Ok(())
}
