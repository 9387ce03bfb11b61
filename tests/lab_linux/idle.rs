//! A nearly idle guest with Debian 13's kernel, two vCPUs and 1 GiB: what a move costs when nothing is in its way. Its console counts
//! on, no ping is lost, its wall clock follows its host's, and the network is told where it is. Not the loads: those are in `main`.

use super::{Lab, SHORT, times_back_and_forth, up};
use rig::announced::announced;
use rig::capture::Capture;
use rig::linux::outside::{Clock, Pings, clock};
use rig::linux::{Debian, LinuxGuest};
use rig::roce::Station;
use rig::{Context, Result, ensure};
use serde_json::Value;
use std::net::IpAddr;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

/// How far a guest's wall clock may go wrong by a move, where the blackout is shorter.
const CLOCK_MS: f64 = 10.0;
/// Its kernel alone has more than this.
const HUGE_MIB_MIN: u64 = 32;

fn guest() -> LinuxGuest {
    let guest = LinuxGuest::new("idle", 11).debian(Debian::Trixie).vcpus(2);
    LinuxGuest { memory_mib: 1024, words: Vec::new(), ..guest }
        .setting("cpu = { common = [\"alpha\", \"beta\"] }")
        .setting("thp = true")
}

pub(super) fn moves_and_nobody_notices(lab: &Lab<'_>) -> Result<()> {
    let guest = guest();
    let outside = lab.machines.ready().name.as_str();
    let ip = IpAddr::V4(guest.ip());
    for station in [&lab.alpha, &lab.beta] {
        station.machine.shell(rig::linux::HUGE_PAGES_FOR_MEMFDS, SHORT)?;
    }
    let mut beat = up(&lab.alpha, &guest)?;
    println!("the guests' Ethernet is the namespace {outside}; {} is {} and {ip}", guest.name, guest.mac());
    let pings = Pings::start(outside, ip, &lab.machines.ready().folder)?;
    std::thread::sleep(Duration::from_secs(5));
    let (mut moves, mut figures) = (0, Vec::new());
    times_back_and_forth(lab, |round, link, from, to| {
        let capture = Capture::start(outside)?;
        let console = from.serial(&guest.name);
        let before = clock(outside, ip)?;
        let report = from.migrate(&guest.name, to, &["--link", link])?;
        beat = to.linux_lives(&guest.name, &beat)?;
        let after = clock(outside, ip)?;
        let (downtime, gap) = (number(&report, "downtime_ms")?, number(&report, "network_gap_ms")?);
        println!(
            "{round} {} -> {} over {link}: {} ms in all, downtime {downtime} ms {}, network gap {gap} ms, {} bytes, slowest ping so far {} ms",
            from.machine.name,
            to.machine.name,
            report["total_ms"],
            report["downtime_parts_ms"],
            report["bytes_on_wire"],
            pings.so_far()?.slowest_ms
        );
        has_huge_pages(to)?;
        keeps_time([before, after], [host_clock(from)?, host_clock(to)?], downtime)?;
        is_announced(&capture, &guest, &to.machine.guest_port, &from.machine.guest_port)?;
        if moves == 0 {
            show(&console, &to.serial(&guest.name), &report)?;
        }
        moves += 1;
        figures.push((downtime, gap));
        Ok(())
    })?;
    let pings = pings.finish()?;
    let median = |values: Vec<f64>| {
        let mut values = values;
        values.sort_by(f64::total_cmp);
        values.get(values.len() / 2).copied().unwrap_or_default()
    };
    println!(
        "{moves} moves of an idle guest: median downtime {} ms, median network gap {} ms; pings {} sent, {} answered within 1 s, {} later, \
         {} never, slowest {} ms",
        median(figures.iter().map(|(downtime, _)| *downtime).collect()),
        median(figures.iter().map(|(_, gap)| *gap).collect()),
        pings.sent,
        pings.answered,
        pings.late.len(),
        pings.lost.len(),
        pings.slowest_ms
    );
    ensure!(pings.lost.is_empty(), "pings {:?} of {} were never answered", pings.lost, pings.sent);
    lab.alpha.ask(&["vm", "stop", &guest.name])?;
    Ok(())
}

/// What its destination filled is in huge pages, as its file asks for.
fn has_huge_pages(station: &Station<'_>) -> Result<()> {
    let words = ["sed", "-n", r"s/^ShmemHugePages: *\([0-9]*\) kB/\1/p", "/proc/meminfo"];
    let kib: u64 = station.machine.run(&words, SHORT)?.expect_ok()?.text().parse().context("ShmemHugePages")?;
    println!("  {} MiB of it are in huge pages", kib >> 10);
    ensure!(kib >> 10 >= HUGE_MIB_MIN, "only {kib} KiB of the guest's memory are in huge pages");
    Ok(())
}

/// A machine's wall clock against this one's: the quickest of some commands counts.
fn host_clock(station: &Station<'_>) -> Result<Clock> {
    let mut best: Option<Clock> = None;
    for _ in 0..5 {
        let (asked, before) = (Instant::now(), now_ns());
        let said: i128 = station.machine.run(&["date", "+%s%N"], SHORT)?.expect_ok()?.text().parse().context("date")?;
        let unsure_ms = asked.elapsed().as_secs_f64() * 500.0;
        let ahead_ms = (said - (before + now_ns()) / 2) as f64 / 1e6;
        if best.is_none_or(|best| unsure_ms < best.unsure_ms) {
            best = Some(Clock { ahead_ms, unsure_ms });
        }
    }
    best.context("no answer")
}

fn now_ns() -> i128 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_nanos().cast_signed())
}

fn number(report: &Value, key: &str) -> Result<f64> {
    report[key].as_f64().with_context(|| format!("{key} in {report}"))
}

/// The guest's wall clock follows its host's, and never goes back: where the new host's is behind by more than the guest stood still,
/// it goes on from where it was. It is off by the blackout at most.
fn keeps_time([before, after]: [Clock; 2], [from, to]: [Clock; 2], downtime_ms: f64) -> Result<()> {
    let apart = to.ahead_ms - from.ahead_ms;
    let wrong = (after.ahead_ms - before.ahead_ms) - apart.max(-downtime_ms);
    let unsure = before.unsure_ms + after.unsure_ms + from.unsure_ms + to.unsure_ms;
    let allowed = CLOCK_MS.max(downtime_ms) + unsure;
    println!(
        "  its wall clock is wrong by {wrong:.1} ms, read to within {unsure:.1} ms (the hosts' own are {apart:.1} ms apart)"
    );
    ensure!(
        wrong.abs() <= allowed,
        "its wall clock is wrong by {wrong} ms, {allowed} ms may be: {before:?} {after:?} {from:?} {to:?}"
    );
    Ok(())
}

/// Its addresses and its MAC were told at the port of its new host, and not at the old one's.
fn is_announced(capture: &Capture, guest: &LinuxGuest, port: &str, old: &str) -> Result<()> {
    let (frames, mac) = (capture.frames(), guest.mac_bytes());
    let told = announced(&frames, mac, port)?;
    let words: Vec<&str> = told.iter().map(|one| one.words.as_str()).collect();
    let first = told.first().context("nothing was announced")?.at;
    let listed: Vec<String> =
        told.iter().map(|one| format!("+{} ms {}", one.at.duration_since(first).as_millis(), one.words)).collect();
    println!("  announced at {port}: {}", listed.join(", "));
    for wanted in [format!("request {}", guest.ip()), format!("na {}", guest.ip6()), "rarp".into()] {
        ensure!(words.contains(&wanted.as_str()), "{wanted} was not announced: {words:?}");
    }
    ensure!(announced(&frames, mac, old)?.is_empty(), "the old host announced");
    Ok(())
}

/// The console on both sides of a move, and the report.
fn show(source: &str, destination: &str, report: &Value) -> Result<()> {
    let beats = |serial: &str| -> Vec<String> {
        let beats = serial.lines().filter(|line| rig::linux::linux_beat_of(line).is_some());
        beats.map(|line| line.split(" gap_ms_max").next().unwrap_or(line).to_owned()).collect()
    };
    let (there, here) = (beats(source), beats(destination));
    let last = there.len().saturating_sub(3);
    println!("the console at the source:\n  {}", there.get(last..).unwrap_or_default().join("\n  "));
    println!("the console at the destination:\n  {}", here.get(..here.len().min(3)).unwrap_or_default().join("\n  "));
    println!("{}", serde_json::to_string_pretty(report)?);
    let count = |lines: &[String], last: bool| {
        let line = if last { lines.last() } else { lines.first() };
        line.and_then(|line| line.split_once("n=")?.1.split(' ').next()?.parse::<u64>().ok()).unwrap_or_default()
    };
    // The console was read before the move: some seconds of counting may lie between, none twice.
    ensure!(count(&here, false) > count(&there, true), "the console does not count on: {there:?} {here:?}");
    Ok(())
}
