//! What is taken back when it is too late to cut: a key revoked, or a rule of the allow-list removed, by either host, at or past the
//! commit of a migration that runs. The commit's rules decide then: exactly one host runs the guest, what is said of it is true, and
//! what stays open is settled when the hosts may talk again. Before the commit is in `admission`; a cancel in `cancel`.
#![allow(clippy::panic, clippy::unwrap_used, clippy::expect_used, clippy::print_stdout, missing_docs, unreachable_pub)]

use rig::process::wait_for;
use rig::{AgentConfig, Context, GuestSpec, Host, Lab, Result, bail, ensure, points, with_lab};
use std::time::Duration;

/// For what is open to be settled once the hosts may talk.
const REST_MAX: Duration = Duration::from_secs(40);
/// For the command to say what came of it.
const SAID_MAX: Duration = Duration::from_secs(30);
/// The network of both hosts, by a rule that can be taken back.
const NETWORK: &str = "10.77.0.0/24";

/// Where the migration is when something is taken back, and on which host that is seen: from the last moment before the commit on.
const POINTS: [(&str, bool); 6] = [
    ("destination-ready-written", false),
    ("source-released-written", true),
    ("source-said-commit", true),
    ("destination-hears-commit", false),
    ("destination-resumed", false),
    ("destination-says-running", false),
];

#[derive(Debug, Clone, Copy)]
enum Means {
    Revoke,
    Rule,
}

fn take_back(means: Means, by: &Host, other: &Host, id: &str) -> Result<()> {
    let said = match means {
        Means::Revoke => by.limosa(&["host", "revoke", &other.name])?,
        Means::Rule => by.limosa(&["allow", "remove", NETWORK])?,
    };
    said.expect_code(0).with_context(|| format!("{means:?} of {id}")).map(drop)
}

fn give_back(means: Means, by: &Host, id: &str) -> Result<()> {
    let said = match means {
        Means::Revoke => by.limosa(&["host", "revoke", "--undo", id])?,
        Means::Rule => by.limosa(&["allow", "add", NETWORK])?,
    };
    said.expect_code(0).map(drop)
}

/// Whether a host has nothing open, and the guest or nothing at all.
fn rests(host: &Host) -> Result<Option<bool>> {
    let open = host.jobs()?.iter().any(|job| job["state"] == "running" || job["state"] == "in_doubt");
    Ok(match (open, host.vmms(None).len(), host.guests()?.len()) {
        (false, 1, 1) => Some(true),
        (false, 0, 0) => Some(false),
        _ => None,
    })
}

/// Takes something back at a point, and settles what came of it: whether the guest is at the destination.
fn once(lab: &Lab, means: Means, point: &str, at_source: bool, by_source: bool) -> Result<bool> {
    lab.a.disarm()?;
    lab.b.disarm()?;
    let reached = if at_source { &lab.a } else { &lab.b };
    // Long enough for a command, and not so long that the other host gives up.
    reached.arm(point, "sleep 1200")?;
    let mut running = lab.a.start(&["--json", "migrate", "web", "--to", "b"])?;
    wait_for(SAID_MAX, "the point", || Ok(reached.has_reached(point).then_some(())))?;
    let (by, other) = if by_source { (&lab.a, &lab.b) } else { (&lab.b, &lab.a) };
    let id = other.id()?;
    take_back(means, by, other, &id)?;
    // Whatever is not settled by then is in doubt, and that is said.
    let told = wait_for(SAID_MAX, "the migration to be over, or in doubt", || {
        let in_doubt = [&lab.a, &lab.b].into_iter().map(|host| host.jobs()).collect::<Result<Vec<_>>>()?;
        let in_doubt = in_doubt.iter().flatten().any(|job| job["state"] == "in_doubt");
        Ok((running.ended()? || in_doubt).then_some(in_doubt))
    })?;
    std::thread::sleep(Duration::from_millis(500));
    lab.never_two("web")?;
    give_back(means, by, &id)?;
    let mut seen = String::new();
    let there = wait_for(REST_MAX, "both hosts to settle it", || {
        let both = (rests(&lab.a)?, rests(&lab.b)?);
        seen = format!("{both:?} {:?} {:?}", lab.a.jobs()?, lab.b.jobs()?);
        Ok(match both {
            (Some(true), Some(false)) => Some(false),
            (Some(false), Some(true)) => Some(true),
            _ => None,
        })
    });
    let there = there.with_context(|| seen)?;
    let output = running.wait(SAID_MAX)?;
    match output.code {
        0 => ensure!(there, "it was said to have moved: {output:?}"),
        3 => ensure!(!there, "it was said to run on at its source: {output:?}"),
        // In doubt: nobody says where it is before that is settled.
        4 => {}
        _ => bail!("{output:?}"),
    }
    let (owner, other) = if there { (&lab.b, &lab.a) } else { (&lab.a, &lab.b) };
    owner.guest_lives("web")?;
    ensure!(other.vmms(None).is_empty());
    lab.never_two("web")?;
    println!(
        "{means:?} by the {} at {point}: exit {}, in doubt {told}, the guest is on {}",
        if by_source { "source" } else { "destination" },
        output.code,
        owner.name
    );
    Ok(there)
}

fn at_each_point(means: Means) {
    let binary = rig::lab::missing().is_none().then(|| points::binary().unwrap());
    let config = AgentConfig::default().migration("keepalive_ms", 500).migration("silence_max_ms", 4000);
    let config = config.migration("ready_ms_max", 4000).peers(&["192.0.2.0/24"]);
    with_lab(AgentConfig { binary, ..config }, |lab| {
        let guest = GuestSpec::new("web", 1).memory("64M", "8M").dirty("4M", "8M");
        for host in [&lab.a, &lab.b] {
            host.limosa(&["allow", "add", NETWORK])?.expect_code(0)?;
        }
        lab.guest(&guest)?;
        for by_source in [false, true] {
            for (point, at_source) in POINTS {
                let what = || format!("{means:?} at {point}, by the source: {by_source}");
                if once(lab, means, point, at_source, by_source).with_context(what)? {
                    lab.b.migrate_well("web", &lab.a, &[]).with_context(what)?;
                    lab.guest_is_on(&guest, &lab.a, &lab.b)?;
                }
            }
        }
        lab.unharmed(&guest)
    });
}

#[test]
fn a_key_that_is_revoked_past_the_commit_leaves_the_guest_on_one_host() {
    at_each_point(Means::Revoke);
}

#[test]
fn a_rule_that_is_taken_back_past_the_commit_leaves_the_guest_on_one_host() {
    at_each_point(Means::Rule);
}
