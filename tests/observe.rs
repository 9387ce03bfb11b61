//! What an operator sees of it afterwards: the audit log and the metrics of two real agents, after a migration that was refused, one that
//! was aborted and one that was committed; and that every metric which the documentation names is there.
#![allow(clippy::panic, clippy::unwrap_used, clippy::expect_used, clippy::print_stdout, missing_docs, unreachable_pub)]

use rig::process::wait_for;
use rig::{AgentConfig, Context, GuestSpec, Host, Result, bail, ensure, with_lab};
use serde_json::Value;
use std::collections::BTreeMap;
use std::io::{Read, Write};
use std::net::TcpStream;
use std::os::unix::fs::PermissionsExt;
use std::time::Duration;

const SOON: Duration = Duration::from_secs(20);
const METRICS: &str = "127.0.0.1:9713";

fn config() -> AgentConfig {
    AgentConfig::default().metrics(METRICS)
}

/// What the agent answers to one request.
fn http(host: &Host, request: &str) -> Result<String> {
    host.netns.within(|| {
        let mut stream = TcpStream::connect(METRICS)?;
        stream.set_read_timeout(Some(SOON))?;
        stream.write_all(request.as_bytes())?;
        let mut answer = String::new();
        stream.read_to_string(&mut answer)?;
        Ok(answer)
    })
}

fn scrape(host: &Host) -> Result<String> {
    let answer = http(host, "GET /metrics HTTP/1.1\r\nHost: here\r\n\r\n")?;
    let (head, body) = answer.split_once("\r\n\r\n").context("no head")?;
    ensure!(head.starts_with("HTTP/1.1 200") && head.contains("application/openmetrics-text"), "{head}");
    ensure!(body.trim_end().ends_with("# EOF"), "cut off: {body}");
    Ok(body.to_owned())
}

/// Each sample: its name and labels, its value.
fn samples(host: &Host) -> Result<BTreeMap<String, f64>> {
    let text = scrape(host)?;
    let lines = text.lines().filter(|line| !line.starts_with('#'));
    lines
        .map(|line| {
            let (name, value) = line.rsplit_once(' ').context("a sample")?;
            Ok((name.to_owned(), value.parse::<f64>()?))
        })
        .collect()
}

fn value(samples: &BTreeMap<String, f64>, name: &str, labels: &[&str]) -> f64 {
    let fits = |key: &&String| key.split('{').next() == Some(name) && labels.iter().all(|label| key.contains(label));
    samples.iter().filter(|(key, _)| fits(key)).map(|(_, value)| value).sum()
}

fn audit(host: &Host) -> Result<Vec<Value>> {
    let text = std::fs::read_to_string(host.state_dir().join("audit.log"))?;
    text.lines().map(|line| serde_json::from_str(line).with_context(|| line.to_owned())).collect()
}

/// The lines of what has this id.
fn of<'a>(lines: &'a [Value], first: &Value) -> Vec<&'a Value> {
    lines.iter().filter(|line| line["id"] == first["id"]).collect()
}

/// The orders, or the guests that came: for each its first line and its outcome.
fn told<'a>(lines: &'a [Value], event: &str, key: &str, is: &str) -> Result<Vec<(&'a Value, &'a Value)>> {
    let first = lines.iter().filter(|line| line["event"] == event && line[key] == is);
    first
        .map(|first| {
            let outcomes: Vec<&Value> = of(lines, first).into_iter().filter(|line| line["event"] == "outcome").collect();
            ensure!(outcomes.len() == 1, "{} outcomes of {first}", outcomes.len());
            Ok((first, outcomes[0]))
        })
        .collect()
}

/// The names in the table of metrics.
fn documented() -> Vec<String> {
    let text = include_str!("../docs/OPERATING.md");
    let section =
        text.split("## Metrics").nth(1).expect("a section on metrics").split("Alerts worth having").next().unwrap_or_default();
    let rows = section.lines().filter_map(|line| line.strip_prefix("| `limosa_"));
    rows.map(|row| format!("limosa_{}", row.split(['`', '{']).next().unwrap_or_default())).collect()
}

fn metrics_are_those_of(a: &Host, b: &Host) -> Result<()> {
    let documented = documented();
    ensure!(documented.len() >= 14, "{documented:?}");
    let (here, there) = (samples(a)?, samples(b)?);
    for name in &documented {
        let is = |samples: &BTreeMap<String, f64>| {
            samples.keys().any(|key| {
                let key = key.split('{').next().unwrap_or_default();
                key == name || key.strip_suffix("_bucket") == Some(name)
            })
        };
        ensure!(is(&here) && is(&there), "{name} is documented and not there");
    }
    for text in [scrape(a)?, scrape(b)?] {
        let types = text.lines().filter_map(|line| line.strip_prefix("# TYPE ")?.split_once(' '));
        for (family, kind) in types {
            let name = match kind {
                "counter" => format!("{family}_total"),
                "info" => format!("{family}_info"),
                _ => family.to_owned(),
            };
            ensure!(documented.contains(&name), "{name} is there and not documented");
        }
    }
    Ok(())
}

#[test]
fn what_was_ordered_and_what_came_of_it_is_on_record_and_counted() {
    with_lab(config(), |lab| {
        let (guest, mut other) = (GuestSpec::new("web", 1).memory("128M", "32M").dirty("4M", "16M"), GuestSpec::new("web", 2));
        other.memory = "64M".into();
        lab.guest(&guest)?;
        lab.b.start_guest(&other)?;
        lab.a.migrate("web", &lab.b, &[])?.expect_code(1)?;
        lab.b.limosa(&["vm", "stop", "web"])?.expect_code(0)?;
        let mut slow = lab.a.start_slow("web", &lab.b, &[])?;
        let during = samples(&lab.a)?;
        ensure!(
            value(&during, "limosa_lanes_open", &[]) >= 1.0 && value(&during, "limosa_jobs_running", &["outgoing"]) == 1.0,
            "{during:?}"
        );
        let during = samples(&lab.b)?;
        ensure!(
            value(&during, "limosa_lanes_open", &[]) >= 1.0 && value(&during, "limosa_sessions_open", &[]) == 1.0,
            "{during:?}"
        );
        let job = lab.a.jobs()?.last().context("no job")?["id"].to_string();
        lab.a.limosa(&["cancel", &job])?.expect_code(0)?;
        slow.wait(SOON)?.expect_code(3)?;
        lab.b.wait_knows("web", false)?;
        lab.settled(&lab.b, 0)?;
        lab.good_migration(&guest)?;

        let sums = |host: &Host, direction: &str| -> Result<Vec<f64>> {
            let all = samples(host)?;
            let count =
                |outcome: &str| value(&all, "limosa_migrations_total", &["link=\"tcp\"", direction, &format!("\"{outcome}\"")]);
            Ok(vec![count("done"), count("refused"), count("aborted"), count("in-doubt")])
        };
        ensure!(sums(&lab.a, "outgoing")? == [1.0, 1.0, 1.0, 0.0], "{}", scrape(&lab.a)?);
        // Its job may end a moment after the source's.
        wait_for(
            SOON,
            "the destination's jobs to end",
            || Ok((sums(&lab.b, "incoming")? == [1.0, 1.0, 1.0, 0.0]).then_some(())),
        )?;
        let (here, there) = (samples(&lab.a)?, samples(&lab.b)?);
        for (what, is) in [
            ("refusals at b", value(&there, "limosa_refusals_total", &["name-taken"]) == 1.0),
            ("bytes that left a", value(&here, "limosa_migration_wire_bytes_total", &["tcp", "outgoing"]) > 32e6),
            ("bytes that came to b", value(&there, "limosa_migration_wire_bytes_total", &["tcp", "incoming"]) > 32e6),
            ("one downtime", value(&here, "limosa_migration_downtime_seconds_count", &[]) == 1.0),
            ("its length", value(&here, "limosa_migration_downtime_seconds_sum", &[]) > 0.0),
            ("one gap", value(&here, "limosa_migration_network_gap_seconds_count", &[]) == 1.0),
            ("records that a wrote", value(&here, "limosa_journal_sync_seconds_count", &[]) >= 4.0),
            ("records that b wrote", value(&there, "limosa_journal_sync_seconds_count", &[]) >= 2.0),
            ("guests", value(&here, "limosa_guests", &[]) == 0.0 && value(&there, "limosa_guests", &[]) == 1.0),
            ("nothing is at work", value(&here, "limosa_lanes_open", &[]) + value(&there, "limosa_sessions_open", &[]) == 0.0),
            ("the version", value(&here, "limosa_build_info", &[&format!("{:?}", env!("CARGO_PKG_VERSION"))]) == 1.0),
        ] {
            ensure!(is, "{what}: {here:#?} {there:#?}");
        }
        metrics_are_those_of(&lab.a, &lab.b)?;
        println!("metrics of a:\n{}", scrape(&lab.a)?);
        on_record(&lab.a, &lab.b)
    });
}

/// The audit logs of that.
fn on_record(a: &Host, b: &Host) -> Result<()> {
    let (here, there) = (audit(a)?, audit(b)?);
    let mode = std::fs::metadata(a.state_dir().join("audit.log"))?.permissions().mode();
    ensure!(mode & 0o777 == 0o600, "mode {mode:o}");
    let orders = told(&here, "order", "order", "migrate")?;
    let outcomes: Vec<&str> = orders.iter().filter_map(|(_, outcome)| outcome["outcome"].as_str()).collect();
    ensure!(outcomes == ["refused", "aborted", "done"], "{here:#?}");
    for (order, outcome) in &orders {
        let lines = of(&here, order);
        ensure!(lines.len() == 3 && lines[1]["event"] == "begun", "{lines:#?}");
        let is = |line: &Value, key: &str, is: &str| line[key].as_str().is_some_and(|text| text.contains(is));
        ensure!(
            is(order, "by", "user 0") && is(order, "from", "api.sock") && is(order, "vm", "web") && is(order, "to", "b"),
            "{order}"
        );
        ensure!(outcome["vm_id"].is_string() && outcome["migration"].is_string() && outcome["job"].is_u64(), "{outcome}");
        // The same migration at the other host, by whom and from where.
        let came = there.iter().find(|line| line["event"] == "incoming" && line["migration"] == outcome["migration"]);
        let came = came.with_context(|| format!("{outcome} is not on record at b"))?;
        let ended = of(&there, came).into_iter().find(|line| line["event"] == "outcome").context("no outcome at b")?;
        ensure!(came["host"] == a.id()?.as_str() && is(came, "from", "10.77.0.1:") && came["link"] == "tcp", "{came}");
        ensure!(ended["outcome"] == outcome["outcome"] && came["vm_id"] == outcome["vm_id"], "{ended}");
    }
    ensure!(
        told(&here, "order", "order", "cancel")?.len() == 1 && told(&here, "order", "order", "vm-start")?.len() == 1,
        "{here:#?}"
    );
    ensure!(
        told(&here, "order", "order", "host-trust")?.len() == 1 && told(&there, "order", "order", "vm-stop")?.len() == 1,
        "{there:#?}"
    );
    let text = |host: &Host| std::fs::read_to_string(host.state_dir().join("audit.log"));
    println!("audit log of a:\n{}\naudit log of b:\n{}", text(a)?, text(b)?);
    Ok(())
}

#[test]
fn metrics_answer_nothing_else_and_bear_no_slow_ones() {
    with_lab(config(), |lab| {
        for request in [
            "GET / HTTP/1.1\r\n\r\n",
            "POST /metrics HTTP/1.1\r\nContent-Length: 0\r\n\r\n",
            "GET /metrics/../x HTTP/1.1\r\n\r\n",
        ] {
            let answer = http(&lab.a, request)?;
            ensure!(answer.starts_with("HTTP/1.1 404"), "{request}: {answer}");
        }
        // More than there are places for, that say nothing, and one that says more than a head.
        let held = lab.a.netns.within(|| {
            let mut held = (0..20).map(|_| TcpStream::connect(METRICS)).collect::<std::io::Result<Vec<_>>>()?;
            let _ = held[0].write_all(&vec![b'x'; 64 << 10]);
            Ok(held)
        })?;
        wait_for(SOON, "a scrape among the silent", || match scrape(&lab.a) {
            Ok(_) => Ok(Some(())),
            Err(error) if error.to_string().contains("temporarily unavailable") => Ok(None),
            Err(error) => bail!(error),
        })?;
        drop(held);
        // Off unless it is said.
        lab.b.stop_agent()?;
        lab.b.start_agent(AgentConfig::default())?;
        let refused = lab.b.netns.within(|| Ok(TcpStream::connect(METRICS).is_err()))?;
        ensure!(refused, "metrics are served where nobody said so");
        let guest = GuestSpec::new("web", 1);
        lab.guest(&guest)?;
        lab.good_migration(&guest)
    });
}
