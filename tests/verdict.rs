//! `limosa verdict`: the facts of both sides and, as a last resort, a person's decision about a guest in doubt, with every refusal;
//! verdicts asked by those who have no right to one; and what either side settles by asking the other. What hosts decide by
//! themselves when they are killed is in `kills`.
#![allow(clippy::panic, clippy::unwrap_used, clippy::expect_used, clippy::print_stderr, missing_docs, unreachable_pub)]

use limosa_link::{HostKey, TcpLink, TrustedHosts, ask_released, ask_verdict};
use limosa_proto::identity::{Generation, HostId, MigrationId};
use limosa_proto::wire::message::{ReleasedAnswer, VerdictAnswer};
use nix::sys::signal::Signal;
use rig::command::Running;
use rig::process::wait_for;
use rig::{AgentConfig, Context, GuestSpec, Host, Lab, Result, ensure, points, with_lab};
use serde_json::Value;
use std::time::Duration;

const SOON: Duration = Duration::from_secs(20);
const LOOKED: &str = "--i-have-looked-at-the-other-host";

fn lab(test: impl FnOnce(&mut Lab, &GuestSpec) -> Result<()>) {
    let config = AgentConfig::default().migration("keepalive_ms", 200).migration("silence_max_ms", 1000);
    let binary = rig::lab::missing().is_none().then(|| points::binary().unwrap());
    with_lab(AgentConfig { binary, ..config }, |lab| {
        let guest = GuestSpec::new("web", 1).memory("64M", "8M").dirty("4M", "8M");
        lab.guest(&guest)?;
        test(lab, &guest)
    });
}

/// The job of a host that is in doubt, once there is one.
fn in_doubt(host: &Host) -> Result<String> {
    wait_for(SOON, "a job in doubt", || {
        let jobs = host.jobs()?;
        Ok(jobs.iter().rfind(|job| job["state"] == "in_doubt").map(|job| job["id"].to_string()))
    })
}

/// The destination is killed when it hears Commit, and stays away: the source is in doubt.
fn destination_is_lost(lab: &mut Lab) -> Result<Running> {
    lab.b.arm("destination-hears-commit", "kill")?;
    let running = lab.a.start(&["--json", "migrate", "web", "--to", "b"])?;
    lab.b.wait_agent_ended()?;
    lab.b.disarm()?;
    Ok(running)
}

fn verdict(host: &Host, job: &str, words: &[&str], code: i32) -> Result<Value> {
    let mut args = vec!["--json", "verdict", job];
    args.extend(words);
    let output = host.limosa(&args)?.expect_code(code)?;
    let text = if output.stdout.trim().is_empty() { output.stderr.trim() } else { output.stdout.trim() };
    serde_json::from_str(text).with_context(|| format!("{output:?}"))
}

/// A decision that must be refused with this code, and change nothing.
fn refused(host: &Host, job: &str, words: &[&str], code: &str) -> Result<()> {
    let answer = verdict(host, job, words, 1)?;
    ensure!(answer.to_string().contains(&format!("\"{code}\"")), "{answer}");
    in_doubt(host).map(drop)
}

fn has_record(verdict: &Value, kind: &str, words: &str) -> bool {
    let records = verdict["journal"].as_array().cloned().unwrap_or_default();
    records.iter().filter_map(Value::as_str).any(|line| line.starts_with(kind) && line.contains(words))
}

#[test]
fn a_person_decides_when_the_destination_is_gone_for_ever() {
    lab(|lab, guest| {
        let mut running = destination_is_lost(lab)?;
        // Its VMM is dead too, so it surely does not run there; but who knows that here?
        vmms_die(&lab.b)?;
        let job = in_doubt(&lab.a)?;
        let facts = verdict(&lab.a, &job, &[], 4)?;
        ensure!(facts["state"] == "in_doubt" && has_record(&facts, "Released", ""), "{facts}");
        ensure!(facts["other"].as_str().is_some_and(|words| words.contains("cannot be asked")), "{facts}");
        ensure!(facts["vmm"].as_str().is_some_and(|words| words.contains("paused")), "{facts}");
        refused(&lab.a, &job, &["--decide", "here", "--reason", "b burned down"], "not-known")?;
        refused(&lab.a, &job, &["--decide", "gone", "--reason", "b burned down"], "not-known")?;
        lab.a.limosa(&["verdict", &job, "--decide", "here"])?.expect_code(2)?;
        lab.a.limosa(&["verdict", &job, "--decide", "here", "--reason", " ", LOOKED])?.expect_code(2)?;
        lab.a.limosa(&["verdict", "999"])?.expect_code(1)?;
        let decided = verdict(&lab.a, &job, &["--decide", "here", "--reason", "b burned down", LOOKED], 3)?;
        ensure!(has_record(&decided, "Aborted", "decided by root (user 0): b burned down"), "{decided}");
        running.wait(SOON)?.expect_code(4)?;
        lab.a.guest_lives("web")?;
        // There is nothing to decide any more.
        let again = verdict(&lab.a, &job, &["--decide", "gone", "--reason", "no", LOOKED], 1)?;
        ensure!(again.to_string().contains("not-in-doubt"), "{again}");
        // The other host comes back and does not contradict it.
        lab.b.restart_agent()?;
        given_up_by_itself(&lab.b)?;
        lab.unharmed(guest)
    });
}

/// The VMMs of a host are killed, and gone when this returns.
fn vmms_die(host: &Host) -> Result<()> {
    let vmms = host.vmms(None);
    vmms.iter().for_each(|pid| rig::process::kill(*pid));
    wait_for(SOON, "the VMMs' end", || Ok(vmms.iter().all(|pid| rig::process::is_over(*pid)).then_some(())))
}

/// A destination that was in doubt has asked its source and given the guest up, without a person.
fn given_up_by_itself(host: &Host) -> Result<()> {
    let job = wait_for(SOON, "the destination to give it up", || {
        let job = host.jobs()?.pop().filter(|job| job["direction"] == "incoming" && job["state"] == "aborted");
        Ok(job.map(|job| job["id"].to_string()))
    })?;
    let facts = verdict(host, &job, &[], 3)?;
    ensure!(has_record(&facts, "Ready", "") && has_record(&facts, "Discarded", "never released"), "{facts}");
    Ok(())
}

#[test]
fn a_destination_that_lost_its_power_asks_the_source_and_gives_up_what_was_never_released() {
    lab(|lab, guest| {
        // Ready is durable and was never said; then everything at the destination is gone.
        lab.b.arm("destination-ready-written", "kill")?;
        let mut running = lab.a.start(&["--json", "migrate", "web", "--to", "b"])?;
        lab.b.wait_agent_ended()?;
        lab.b.disarm()?;
        vmms_die(&lab.b)?;
        // As long as the source's agent is away nobody can say, and a person sees that.
        running.wait(SOON)?.expect_code(3)?;
        lab.a.kill_agent()?;
        lab.b.restart_agent()?;
        let job = in_doubt(&lab.b)?;
        let facts = verdict(&lab.b, &job, &[], 4)?;
        ensure!(facts["other"].as_str().is_some_and(|words| words.contains("the source cannot be asked")), "{facts}");
        refused(&lab.b, &job, &["--decide", "gone", "--reason", "a runs it"], "not-known")?;
        lab.a.restart_agent()?;
        given_up_by_itself(&lab.b)?;
        let log = lab.a.agent_log();
        ensure!(log.contains("a destination asked whether its guest was released"), "{log}");
        lab.unharmed(guest)
    });
}

#[test]
fn a_guest_is_not_let_in_beside_a_vmm_of_it_that_has_not_plugged_in() {
    lab(|lab, guest| {
        // It is loaded at the destination, whose agent dies, and its VMM stands still when the next agent comes.
        lab.b.arm("destination-loaded", "stop")?;
        let mut running = lab.a.start(&["--json", "migrate", "web", "--to", "b"])?;
        lab.b.wait_stopped("destination-loaded")?;
        let vmms = lab.b.vmms(None);
        let all = |signal| vmms.iter().for_each(|pid| rig::process::signal(*pid, signal));
        all(Signal::SIGSTOP);
        lab.b.kill_agent()?;
        lab.b.disarm()?;
        running.wait(SOON)?.expect_code(3)?;
        // The kernel has sent it SIGHUP, and let it go on, since it stood still when its agent died.
        all(Signal::SIGSTOP);
        lab.b.restart_agent()?;
        let refused = lab.a.limosa(&["--json", "migrate", "web", "--to", "b"])?.expect_code(1)?;
        let pid = vmms.first().context("no VMM at the destination")?;
        refused.expect_words(&format!("an earlier VMM of this guest lives at the destination (process {pid})"))?;
        ensure!(lab.b.vmms(None) == vmms, "{:?} is not {vmms:?}", lab.b.vmms(None));
        lab.a.guest_lives("web")?;
        all(Signal::SIGCONT);
        wait_for(SOON, "the earlier VMM to be given up", || Ok(lab.b.vmms(None).is_empty().then_some(())))?;
        lab.unharmed(guest)
    });
}

#[test]
fn a_destination_does_not_give_up_what_the_source_says_it_released() {
    lab(|lab, guest| {
        // Commit was said and heard, and then the destination is gone, all of it: the guest may have run there.
        let mut running = destination_is_lost(lab)?;
        vmms_die(&lab.b)?;
        lab.b.restart_agent()?;
        let job = in_doubt(&lab.b)?;
        let says =
            |facts: &Value| facts["other"].as_str().is_some_and(|words| words.contains("it released the guest to this host"));
        wait_for(SOON, "the source's word", || Ok(says(&verdict(&lab.b, &job, &[], 4)?).then_some(())))?;
        refused(&lab.b, &job, &["--decide", "gone", "--reason", "no idea"], "not-known")?;
        let other = in_doubt(&lab.a)?;
        // Who was killed is a process of its own until somebody has asked how it ended.
        let may = |facts: &Value| facts["other"].as_str().is_some_and(|words| words.contains("may have run"));
        wait_for(SOON, "the destination's word", || Ok(may(&verdict(&lab.a, &other, &[], 4)?).then_some(())))?;
        // One person's word at one side is enough for both.
        verdict(&lab.a, &other, &["--decide", "here", "--reason", "b lost its power", LOOKED], 3)?;
        running.wait(SOON)?;
        given_up_by_itself(&lab.b)?;
        lab.a.guest_lives("web")?;
        lab.unharmed(guest)
    });
}

#[test]
fn a_person_decides_after_a_restart_and_what_the_destination_says_counts() {
    lab(|lab, guest| {
        // Both agents die; the destination's VMM waits, and may be committed.
        let mut running = destination_is_lost(lab)?;
        in_doubt(&lab.a)?;
        lab.a.kill_agent()?;
        running.wait(SOON)?;
        lab.a.restart_agent()?;
        let job = in_doubt(&lab.a)?;
        refused(&lab.a, &job, &["--decide", "gone", "--reason", "it must be there"], "not-known")?;
        // A person says that it is gone: it is not run here, whatever comes.
        let decided = verdict(&lab.a, &job, &["--decide", "gone", "--reason", "seen there", LOOKED], 0)?;
        ensure!(has_record(&decided, "Running", "decided by root (user 0): seen there"), "{decided}");
        lab.settled(&lab.a, 0)?;
        // And there a person lets it run.
        lab.b.restart_agent()?;
        let job = in_doubt(&lab.b)?;
        lab.b.wait_knows("web", true)?;
        refused(&lab.b, &job, &["--decide", "here", "--reason", "a is told"], "not-known")?;
        let decided = verdict(&lab.b, &job, &["--decide", "here", "--reason", "a is told", LOOKED], 0)?;
        ensure!(has_record(&decided, "Running", "a is told"), "{decided}");
        lab.guest_is_on(guest, &lab.b, &lab.a)?;
        lab.b.migrate_well("web", &lab.a, &[])?;
        lab.guest_is_on(guest, &lab.a, &lab.b)
    });
}

/// What an operator sees on a host, as printed.
fn seen(host: &Host, when: &str) -> Result<String> {
    let output = host.limosa(&["jobs"])?;
    let text = format!("{}{}", output.stdout, output.stderr);
    eprintln!("limosa jobs on {}, {when} (exit code {}):\n{text}", host.name, output.code);
    Ok(text)
}

#[test]
fn a_kill_at_the_commit_is_seen_on_both_sides_and_ends_with_the_restart() {
    lab(|lab, guest| {
        let mut running = destination_is_lost(lab)?;
        in_doubt(&lab.a)?;
        ensure!(seen(&lab.a, "the destination's agent being dead")?.contains("in doubt:"));
        ensure!(seen(&lab.b, "its agent being dead")?.contains("is `limosa agent` running?"));
        // The source's is killed too: what it was in doubt about must be known to the next one.
        lab.a.kill_agent()?;
        running.wait(SOON)?.expect_code(4)?;
        lab.a.restart_agent()?;
        in_doubt(&lab.a)?;
        // The journal knows its id; its VMM, which comes back, its name.
        wait_for(SOON, "the guest's name", || Ok(lab.a.jobs()?.iter().any(|job| job["vm"] == "web").then_some(())))?;
        let after = seen(&lab.a, "restarted before the destination")?;
        ensure!(after.contains("in doubt:") && after.contains("web"), "{after}");
        lab.b.restart_agent()?;
        lab.guest_is_on(guest, &lab.b, &lab.a)?;
        let settled = |host: &Host| Ok(host.jobs()?.iter().all(|job| job["state"] != "in_doubt").then_some(()));
        for host in [&lab.a, &lab.b] {
            wait_for(SOON, "no job in doubt", || settled(host))?;
            ensure!(!seen(host, "both restarted")?.contains("in doubt:"));
        }
        lab.b.migrate_well("web", &lab.a, &[])?;
        lab.guest_is_on(guest, &lab.a, &lab.b)
    });
}

#[test]
fn a_decision_against_what_the_destination_says_is_refused() {
    lab(|lab, guest| {
        // The destination runs the guest, and its answer comes late: it is stopped when it has resumed.
        lab.b.arm("destination-resumed", "stop")?;
        let mut running = lab.a.start(&["--json", "migrate", "web", "--to", "b"])?;
        lab.b.wait_stopped("destination-resumed")?;
        let job = in_doubt(&lab.a)?;
        refused(&lab.a, &job, &["--decide", "here", "--reason", "in a hurry"], "not-known")?;
        // Now it can answer: the decision is refused because of what it says, or came too late because it is settled.
        rig::process::signal(lab.b.agent_pid()?, nix::sys::signal::Signal::SIGCONT);
        let late = verdict(&lab.a, &job, &["--decide", "here", "--reason", "in a hurry", LOOKED], 1)?.to_string();
        ensure!(late.contains("contradicts") || late.contains("not-in-doubt"), "{late}");
        running.wait(SOON)?;
        lab.guest_is_on(guest, &lab.b, &lab.a)?;
        let facts = verdict(&lab.a, &job, &[], 0)?;
        ensure!(has_record(&facts, "Running", "") && !facts.to_string().contains("decided"), "{facts}");
        lab.b.migrate_well("web", &lab.a, &[])?;
        lab.guest_is_on(guest, &lab.a, &lab.b)
    });
}

#[test]
fn a_verdict_is_for_those_who_took_part() {
    lab(|lab, guest| {
        lab.a.migrate_well("web", &lab.b, &[])?;
        let job = lab.a.jobs()?.pop().context("no job")?;
        let migration: MigrationId = job["migration"].as_str().and_then(|text| text.parse().ok()).context("its migration")?;
        let generation = Generation(job["generation"].as_u64().context("its generation")?);
        let (stranger, known) = (HostKey::generate()?, HostKey::generate()?);
        lab.b.trust_id("c", &known.id().to_string(), "10.77.0.9:13560")?;
        let (address, b) = (lab.b.address().to_string(), lab.b.id()?.parse()?);
        let ask = |key: &HostKey, migration, generation| {
            let trusted = TrustedHosts::new([b]);
            let link = TcpLink::new(address.clone(), b, key.clone(), trusted, Duration::from_secs(3));
            lab.watch.within(|| {
                let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
                Ok(runtime.block_on(ask_verdict(&link, migration, generation, false)).map_err(|error| error.to_string()))
            })
        };
        // Not trusted: not heard at all.
        let refused = ask(&stranger, migration, generation)?;
        ensure!(refused.is_err(), "{refused:?}");
        // Trusted, and none of its business; another generation; another migration.
        let others = [(migration, generation), (migration, Generation(generation.0 + 1)), (MigrationId([9; 16]), generation)];
        for (migration, generation) in others {
            ensure!(ask(&known, migration, generation)? == Ok(VerdictAnswer::Unknown));
        }
        // The other question, to the source: refused in the same way. Only the destination of the attempt is told.
        let (at_a, a): (String, HostId) = (lab.a.address().to_string(), lab.a.id()?.parse()?);
        lab.a.trust_id("c", &known.id().to_string(), "10.77.0.9:13560")?;
        let ask_source = |key: &HostKey, migration, generation| {
            let link = TcpLink::new(at_a.clone(), a, key.clone(), TrustedHosts::new([a]), Duration::from_secs(3));
            lab.watch.within(|| {
                let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
                Ok(runtime.block_on(ask_released(&link, migration, generation)).map_err(|error| error.to_string()))
            })
        };
        let refused = ask_source(&stranger, migration, generation)?;
        ensure!(refused.is_err(), "{refused:?}");
        for (migration, generation) in others {
            ensure!(ask_source(&known, migration, generation)? == Ok(ReleasedAnswer::Unknown));
        }
        let log = lab.a.agent_log();
        ensure!(log.matches("asked whether a guest was released by an attempt of which nothing is known").count() == 3, "{log}");
        ensure!(log.contains("a connection was refused"), "the stranger is not in the log: {log}");
        let log = lab.b.agent_log();
        ensure!(log.matches("asked for a verdict on an attempt of which nothing is known").count() == 3, "{log}");
        ensure!(log.contains("a connection was refused"), "the stranger is not in the log: {log}");
        lab.guest_is_on(guest, &lab.b, &lab.a)?;
        lab.b.migrate_well("web", &lab.a, &[])?;
        lab.guest_is_on(guest, &lab.a, &lab.b)
    });
}
