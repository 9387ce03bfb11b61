//! Limosa beside its peers on one machine, in one run, interleaved: iperf3 as the ceiling of the path, QEMU at its best
//! setting with the same guest. Prints medians as a table; asserts nothing.
//!
//! `cargo bench --bench peers -- [--memory 2G] [--runs 3] [--lanes 2]` as root, on an otherwise idle machine.
#![allow(clippy::print_stdout, clippy::print_stderr, reason = "a benchmark prints")]

use anyhow::{Context, Result, bail, ensure};
use rig::process::Process;
use rig::qemu::{self, QemuResult, QemuSetup};
use rig::{AgentConfig, GuestSpec, Lab};
use serde_json::Value;
use std::process::Stdio;
use std::time::Duration;

struct Options {
    memory_mib: u64,
    runs: usize,
    lanes: u32,
    qemu: bool,
}

fn options() -> Result<Options> {
    let mut options = Options { memory_mib: 2048, runs: 3, lanes: 2, qemu: true };
    let mut words = std::env::args().skip(1).filter(|word| word != "--bench");
    while let Some(word) = words.next() {
        let mut value = || words.next().with_context(|| format!("{word} needs a value"));
        match word.as_str() {
            "--memory" => options.memory_mib = mebibytes(&value()?)?,
            "--runs" => options.runs = value()?.parse()?,
            "--lanes" => options.lanes = value()?.parse()?,
            "--no-qemu" => options.qemu = false,
            _ => bail!("unknown option {word}: --memory SIZE, --runs N, --lanes N and --no-qemu are there"),
        }
    }
    Ok(options)
}

fn mebibytes(text: &str) -> Result<u64> {
    let (number, unit) = text.split_at(text.len().saturating_sub(1));
    match unit {
        "G" => Ok(number.parse::<u64>()? << 10),
        "M" => Ok(number.parse()?),
        _ => bail!("\"{text}\" is no size: write 512M or 2G"),
    }
}

/// A lab whose hosts use the same congestion control as every peer. The setting ends with its namespaces.
fn lab() -> Result<Lab> {
    let lab = Lab::two_hosts()?;
    for host in [&lab.a, &lab.b] {
        let mut command = host.netns.command("sh");
        let done = command.args(["-c", "echo cubic > /proc/sys/net/ipv4/tcp_congestion_control"]).status()?;
        ensure!(done.success(), "cubic cannot be set in {}", host.netns.name());
    }
    Ok(lab)
}

/// Bytes per second and CPU seconds per GiB (both ends) of iperf3 on the lab's path with 1 MiB writes.
fn iperf3(lab: &Lab) -> Result<(f64, f64)> {
    let mut command = lab.b.netns.command("iperf3");
    command.args(["-s", "-1"]).stdout(Stdio::null()).stderr(Stdio::null());
    let mut receiver = Process::start("iperf3 (`make setup` installs it)", &mut command)?;
    std::thread::sleep(Duration::from_millis(300));
    let address = lab.b.ip.to_string();
    let mut command = lab.a.netns.command("iperf3");
    let sender = command.args(["-c", &address, "-l", "1M", "-t", "3", "-C", "cubic", "-J"]).output()?;
    receiver.wait(Duration::from_secs(10))?;
    let out: Value = serde_json::from_slice(&sender.stdout).context("iperf3 printed no JSON")?;
    let end = &out["end"];
    let rate = end["sum_received"]["bits_per_second"].as_f64().context("iperf3 gave no rate")? / 8.0;
    let percent = |key: &str| end["cpu_utilization_percent"][key].as_f64().unwrap_or_default();
    let cpu = (percent("host_total") + percent("remote_total")) / 100.0 / (rate / GIB);
    Ok((rate, cpu))
}

const GIB: f64 = 1024.0 * 1024.0 * 1024.0;

/// One measured migration, whoever made it.
#[derive(Clone, Copy, Default)]
struct Row {
    total_ms: f64,
    prepare_ms: f64,
    downtime_ms: f64,
    rate: f64,
    cpu_source: f64,
    cpu_destination: f64,
    /// CPU of every process of the migration, preparing the destination's memory included.
    cpu_whole: f64,
}

#[derive(Clone, Copy)]
struct Case {
    name: &'static str,
    lanes: u32,
    plaintext: bool,
    touched: bool,
}

/// The guest of every row: idle, one dirty page now and then, so much of its memory touched.
fn guest(options: &Options, touched: bool) -> GuestSpec {
    let fill = if touched { format!("{}M", options.memory_mib - 64) } else { "0".into() };
    GuestSpec::new("bench", 1).memory(&format!("{}M", options.memory_mib), &fill).dirty("0", "1M")
}

fn limosa(options: &Options, case: Case) -> Result<Row> {
    let mut lab = lab()?;
    // QEMU's destination has its memory before its clock starts, so ours has too. Where nothing was touched, nothing is needed.
    let populate = if case.touched { "\"before\"" } else { "\"no\"" };
    lab.start_agents(AgentConfig::default().migration("populate", populate).migration("plaintext_lanes", case.plaintext))?;
    let spec = guest(options, case.touched);
    lab.a.start_guest(&spec)?;
    let agents = || Ok::<f64, anyhow::Error>(qemu::cpu_seconds(lab.a.agent_pid()?)? + qemu::cpu_seconds(lab.b.agent_pid()?)?);
    let before = agents()?;
    let lanes = case.lanes.to_string();
    let mut words = vec!["--lanes", lanes.as_str()];
    if case.plaintext {
        words.push("--plaintext");
    }
    let report = lab.a.migrate_well(&spec.name, &lab.b, &words)?;
    let incoming: f64 = lab.b.vmms(None).into_iter().filter_map(|pid| qemu::cpu_seconds(pid).ok()).sum();
    let cpu_whole = agents()? - before + incoming;
    lab.b.guest_lives(&spec.name)?;
    lab.end()?;
    let number = |key: &str| report[key].as_f64().with_context(|| format!("the report has no {key}: {report}"));
    Ok(Row {
        total_ms: number("total_ms")? - number("prepare_ms")?,
        prepare_ms: number("prepare_ms")?,
        downtime_ms: number("downtime_ms")?,
        rate: number("goodput_bytes_per_s")?,
        cpu_source: report["cpu_seconds"]["source"].as_f64().unwrap_or(f64::NAN),
        cpu_destination: report["cpu_seconds"]["destination"].as_f64().unwrap_or(f64::NAN),
        cpu_whole,
    })
}

fn in_qemu(lab: &Lab, options: &Options, channels: u32, touched: bool) -> Result<Row> {
    let spec = guest(options, touched);
    let setup = QemuSetup {
        kernel: rig::guest_images()?.elf,
        cmdline: format!("ws={} dirty={} fill={} heartbeat=200", spec.ws, spec.dirty, spec.fill),
        memory_bytes: options.memory_mib << 20,
        preallocate: true,
        multifd_channels: channels,
        downtime_ms: 50,
    };
    let QemuResult { total_ms, downtime_ms, cpu_source, cpu_destination, bytes } =
        qemu::migrate(&setup, &lab.a, &lab.b, "limosa-guest ready")?;
    #[allow(clippy::cast_precision_loss, reason = "a rate for people")]
    let rate = bytes as f64 / (total_ms / 1000.0);
    Ok(Row { total_ms, prepare_ms: f64::NAN, downtime_ms, rate, cpu_source, cpu_destination, cpu_whole: f64::NAN })
}

fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values.get(values.len() / 2).copied().unwrap_or(f64::NAN)
}

fn print_row(name: &str, rows: &[Row], memory_mib: u64) {
    let of = |pick: fn(&Row) -> f64| median(rows.iter().map(pick).collect());
    #[allow(clippy::cast_precision_loss, reason = "a size for people")]
    let gib = memory_mib as f64 / 1024.0;
    println!(
        "| {name} | {:.0} | {:.0} | {:.2} | {:.1} | {:.2} + {:.2} | {:.2} | {:.2} |",
        of(|row| row.total_ms),
        of(|row| row.prepare_ms),
        of(|row| row.rate) / 1e9,
        of(|row| row.downtime_ms),
        of(|row| row.cpu_source),
        of(|row| row.cpu_destination),
        of(|row| row.cpu_source + row.cpu_destination) / gib,
        of(|row| row.cpu_whole) / gib,
    );
}

fn main() -> Result<()> {
    let options = options()?;
    let lab = lab()?;
    let cases = [
        Case { name: "Limosa, plaintext, 1 lane", lanes: 1, plaintext: true, touched: true },
        Case { name: "Limosa, plaintext, several lanes", lanes: options.lanes, plaintext: true, touched: true },
        Case { name: "Limosa, TLS, 1 lane", lanes: 1, plaintext: false, touched: true },
        Case { name: "Limosa, TLS, several lanes", lanes: options.lanes, plaintext: false, touched: true },
        Case { name: "Limosa, TLS, memory never touched", lanes: options.lanes, plaintext: false, touched: false },
    ];
    let peers = [("QEMU, one stream", 0, true), ("QEMU, multifd 2", 2, true), ("QEMU, memory never touched", 0, false)];
    let mut ceilings: Vec<(f64, f64)> = Vec::new();
    let mut ours: Vec<Vec<Row>> = vec![Vec::new(); cases.len()];
    let mut theirs: Vec<Vec<Row>> = vec![Vec::new(); peers.len()];
    for run in 0..options.runs {
        eprintln!("run {} of {}", run + 1, options.runs);
        ceilings.push(iperf3(&lab)?);
        for (case, rows) in cases.iter().zip(&mut ours) {
            rows.push(limosa(&options, *case).with_context(|| case.name)?);
        }
        if options.qemu {
            for ((name, channels, touched), rows) in peers.iter().zip(&mut theirs) {
                rows.push(in_qemu(&lab, &options, *channels, *touched).with_context(|| *name)?);
            }
        }
    }
    let ceiling = median(ceilings.iter().map(|pair| pair.0).collect());
    let cpu = median(ceilings.iter().map(|pair| pair.1).collect());
    println!(
        "{} MiB guest, {} runs, medians; iperf3 -l 1M: {:.2} GB/s, {cpu:.2} CPU s/GiB\n",
        options.memory_mib,
        options.runs,
        ceiling / 1e9
    );
    println!(
        "| who | total ms | prepare ms | page pass GB/s | downtime ms | CPU s source + destination | CPU s/GiB | whole CPU s/GiB |"
    );
    println!("| --- | --- | --- | --- | --- | --- | --- | --- |");
    for (case, rows) in cases.iter().zip(&ours) {
        print_row(case.name, rows, options.memory_mib);
    }
    if options.qemu {
        for ((name, ..), rows) in peers.iter().zip(&theirs) {
            print_row(name, rows, options.memory_mib);
        }
    }
    Ok(())
}
