//! What it costs to move a nearly idle Debian guest of 1 GiB between the two machines of the lab: ours over tcp, and QEMU's own live
//! migration of the same kernel and initramfs in its microvm. Both by their own account, and by pings from outside.
//!
//! `cargo bench -p rig --bench idle -- [--runs 2]` as root, on an otherwise idle machine, after `cargo build --release -p limosa`.
//! Figures compare only with each other: all of it is emulated.
#![allow(clippy::print_stdout, reason = "a benchmark prints")]
#![forbid(unsafe_code)]

#[path = "common/mod.rs"]
mod common;

use anyhow::{Context, Result, bail, ensure};
use clap::Parser;
use common::median;
use rig::linux::outside::Pings;
use rig::linux::{Debian, Images, LinuxGuest, image};
use rig::process::wait_for;
use rig::roce::{Machine, Machines, Running, Spec, Station, shell_quoted};
use serde_json::Value;
use std::net::IpAddr;
use std::time::Duration;

/// Moves of an idle Debian guest, ours beside QEMU's.
#[derive(Debug, Parser)]
struct Options {
    /// How often each guest goes there and back
    #[arg(long, default_value_t = 2)]
    runs: usize,
    /// Given by `cargo bench`
    #[arg(long, hide = true)]
    bench: bool,
}

const LIMIT: Duration = Duration::from_secs(240);
const PORT: u16 = 4444;
/// Before a move, and after it, while pings go on.
const REST: Duration = Duration::from_secs(4);
/// Between two pings, in seconds: how closely the longest silence is known.
const PING_EVERY: f64 = 0.02;
/// QEMU's `downtime-limit`; ours aims at as much by itself.
const DOWNTIME_MS: u64 = 50;

/// Says one thing to the QEMU at /run/limosa-qmp, or has it migrate and waits for the end; prints the last answer.
const QMP: &str = r#"
import json, socket, sys, time
s = socket.socket(socket.AF_UNIX); s.connect("/run/limosa-qmp"); f = s.makefile("rw")
def ask(command, **arguments):
    f.write(json.dumps({"execute": command, "arguments": arguments}) + "\n"); f.flush()
    while True:
        answer = json.loads(f.readline())
        if "error" in answer: sys.exit(str(answer))
        if "return" in answer: return answer["return"]
f.readline(); ask("qmp_capabilities")
if sys.argv[1] == "quit":
    ask("quit"); sys.exit()
ask("migrate-set-parameters", **{"downtime-limit": int(sys.argv[2]), "max-bandwidth": 10**11})
ask("migrate", uri=sys.argv[1])
while True:
    info = ask("query-migrate")
    if info.get("status") in ("completed", "failed", "cancelled"): break
    time.sleep(0.05)
print(json.dumps(info))
"#;

/// One move.
#[derive(Debug, Default)]
struct Move {
    total_ms: f64,
    downtime_ms: f64,
    /// From the pause to the guest's first answer, where the mover says so.
    gap_ms: Option<f64>,
    /// The longest time without an answer to a ping from outside, whoever moves the guest.
    silence_ms: f64,
    slowest_ping_ms: f64,
    lost: usize,
}

fn number(report: &Value, key: &str) -> Result<f64> {
    report[key].as_f64().with_context(|| format!("{key} in {report}"))
}

/// Moves while pings come from outside.
fn pinged(machines: &Machines, guest: &LinuxGuest, go: impl FnOnce() -> Result<Move>) -> Result<Move> {
    let ready = machines.ready();
    let pings = Pings::start_every(PING_EVERY, &ready.name, IpAddr::V4(guest.ip()), &ready.folder)?;
    std::thread::sleep(REST);
    let moved = go()?;
    std::thread::sleep(REST);
    let seen = pings.finish()?;
    ensure!(seen.answered > 0, "the guest never answered");
    let (slowest_ping_ms, silence_ms) = (seen.slowest_ms, seen.silence_ms);
    let moved = Move { slowest_ping_ms, silence_ms, lost: seen.lost.len(), ..moved };
    println!("  {moved:?}");
    Ok(moved)
}

fn ours(machines: &Machines, stations: [&Station<'_>; 2], runs: usize) -> Result<Vec<Move>> {
    let guest = LinuxGuest::new("idle", 11).debian(Debian::Trixie).vcpus(2).setting("thp = true");
    let guest = LinuxGuest { memory_mib: 1024, words: Vec::new(), ..guest };
    let [alpha, beta] = stations;
    alpha.start_linux(&guest)?;
    let mut beat = alpha.wait_linux(&guest.name)?;
    let mut moves = Vec::new();
    for (from, to) in [(alpha, beta), (beta, alpha)].repeat(runs) {
        moves.push(pinged(machines, &guest, || {
            let report = from.migrate(&guest.name, to, &["--link", "tcp"])?;
            beat = to.linux_lives(&guest.name, &beat)?;
            let (total_ms, downtime_ms) = (number(&report, "total_ms")?, number(&report, "downtime_ms")?);
            Ok(Move { total_ms, downtime_ms, gap_ms: report["network_gap_ms"].as_f64(), ..Move::default() })
        })?);
    }
    alpha.ask(&["vm", "stop", &guest.name])?;
    Ok(moves)
}

/// A QEMU in the machine, for this guest; it waits for one to come where `more` says so.
fn qemu(machine: &Machine, guest: &LinuxGuest, images: &Images, more: &str) -> Result<Running> {
    let line = format!(
        "ip tuntap del qt0 mode tap 2>/dev/null; ip tuntap add qt0 mode tap && ip link set qt0 master br0 up && rm -f /run/limosa-qmp; \
         exec qemu-system-x86_64 -M microvm,rtc=on -accel kvm -cpu host -m {} -smp {} -nodefaults -no-user-config -display none \
         -serial file:/run/limosa-qemu.log -kernel {} -initrd {} -append {} -netdev tap,id=n0,ifname=qt0,script=no,downscript=no \
         -device virtio-net-device,netdev=n0,mac={} -qmp unix:/run/limosa-qmp,server=on,wait=off {more}",
        guest.memory_mib,
        guest.vcpus,
        images.pvh.display(),
        images.initramfs.display(),
        shell_quoted(&guest.cmdline()),
        guest.mac()
    );
    machine.task(&["sh", "-c", &line]).limit(Duration::from_secs(3600)).spawn()
}

fn qmp(machine: &Machine, words: &[&str]) -> Result<String> {
    let words = [&["/usr/bin/python3", "-c", QMP], words].concat();
    Ok(machine.task(&words).limit(LIMIT).run()?.expect_ok()?.text())
}

fn theirs(machines: &Machines, images: &Images, runs: usize) -> Result<Vec<Move>> {
    let guest = LinuxGuest::new("qemu", 12).debian(Debian::Trixie).vcpus(2);
    let guest = LinuxGuest { memory_mib: 1024, words: Vec::new(), ..guest };
    let (alpha, beta) = (machines.alpha(), machines.beta());
    let mut here = qemu(alpha, &guest, images, "")?;
    wait_for(LIMIT, "the guest's first heartbeat in QEMU", || {
        ensure!(!here.ended(), "QEMU ended: {:?}", here.printed());
        std::thread::sleep(Duration::from_secs(1));
        let log = alpha.read_file("/run/limosa-qemu.log").unwrap_or_default();
        Ok(String::from_utf8_lossy(&log).contains("limosa-linux heartbeat").then_some(()))
    })?;
    let mut moves = Vec::new();
    for (from, to) in [(alpha, beta), (beta, alpha)].repeat(runs) {
        let there = qemu(to, &guest, images, &format!("-incoming tcp:0.0.0.0:{PORT}"))?;
        std::thread::sleep(REST);
        moves.push(pinged(machines, &guest, || {
            let said = qmp(from, &[&format!("tcp:{}:{PORT}", to.ip), &DOWNTIME_MS.to_string()])?;
            let info: Value = serde_json::from_str(&said).with_context(|| said.clone())?;
            if info["status"] != "completed" {
                bail!("QEMU's migration failed: {info}; the other end: {:?}", there.printed());
            }
            let (total_ms, downtime_ms) = (number(&info, "total-time")?, number(&info, "downtime")?);
            Ok(Move { total_ms, downtime_ms, ..Move::default() })
        })?);
        qmp(from, &["quit"])?;
        here = there;
    }
    drop(here);
    Ok(moves)
}

fn main() -> Result<()> {
    let options = Options::parse();
    // The machines see the outer machine's files as if nobody wrote to them: so before they boot.
    let images = image::images(Debian::Trixie)?;
    let machines = Machines::boot(&Spec { cpus: 1, limit_seconds: 3600, ..Spec::new()? })?;
    for machine in [machines.alpha(), machines.beta()] {
        machine.shell(rig::linux::HUGE_PAGES_FOR_MEMFDS, LIMIT)?;
    }
    let stations = Station::pair(machines.alpha(), machines.beta(), ["", ""])?;
    println!("Limosa over tcp");
    let ours = ours(&machines, [&stations[0], &stations[1]], options.runs)?;
    println!("QEMU's microvm");
    let theirs = theirs(&machines, &images, options.runs)?;
    println!(
        "medians: {:22} {:>9} {:>12} {:>15} {:>19} {:>16} {:>10}",
        "", "total, ms", "downtime, ms", "network gap, ms", "longest silence, ms", "slowest ping, ms", "pings lost"
    );
    for (name, moves) in [("Limosa over tcp", ours), ("QEMU's microvm", theirs)] {
        let of = |figure: fn(&Move) -> Option<f64>| {
            median(moves.iter().filter_map(figure)).map_or("-".into(), |ms| format!("{ms:.0}"))
        };
        let (total, downtime) = (of(|one| Some(one.total_ms)), of(|one| Some(one.downtime_ms)));
        let (silence, ping) = (of(|one| Some(one.silence_ms)), of(|one| Some(one.slowest_ping_ms)));
        let lost: usize = moves.iter().map(|one| one.lost).sum();
        println!("{name:31} {total:>9} {downtime:>12} {:>15} {silence:>19} {ping:>16} {lost:>10}", of(|one| one.gap_ms));
    }
    drop(stations);
    machines.end()
}
