//! Whole migrations between two hosts in network namespaces of this machine, with iperf3 and QEMU beside them. No RDMA: soft-RoCE
//! has devices in the machine's own namespace only.

use crate::common::iperf3;
use crate::common::record::{Case, Kind, Run, Sample};
use crate::{Options, Way, sample};
use anyhow::{Context, Result, ensure};
use rig::process::Process;
use rig::qemu::{self, QemuResult, QemuSetup};
use rig::{AgentConfig, GuestSpec, Lab};
use std::process::Stdio;
use std::time::Duration;

/// iperf3's port and the seconds of its test.
const IPERF3: (u16, u32) = (5201, 3);

/// Ways of the rows, in their order.
fn ways(lanes: u16) -> Vec<Way> {
    let way = |name, link, lanes, plaintext| Way { name, link, lanes, plaintext, touched: true, page_check: None };
    vec![
        way("Limosa, tcp, plaintext", "tcp", 1, true),
        way("Limosa, tcp, plaintext", "tcp", lanes, true),
        way("Limosa, tcp, TLS", "tcp", 1, false),
        way("Limosa, tcp, TLS", "tcp", lanes, false),
        way("Limosa, quic", "quic", 1, false),
        way("Limosa, quic", "quic", lanes, false),
        Way { touched: false, ..way("Limosa, tcp, TLS, memory never touched", "tcp", lanes, false) },
    ]
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

fn ceiling(lab: &Lab) -> Result<Sample> {
    let (port, seconds) = IPERF3;
    let (receiving, sending) = (iperf3::receiving(port), iperf3::sending(&lab.b.ip.to_string(), port, seconds));
    let mut command = lab.b.netns.command("iperf3");
    command.args(receiving.iter().skip(1)).stdout(Stdio::null()).stderr(Stdio::null());
    let mut receiver = Process::start("iperf3 (`make setup` installs it)", &mut command)?;
    std::thread::sleep(Duration::from_millis(300));
    let sender = lab.a.netns.command("iperf3").args(sending.iter().skip(1)).output()?;
    receiver.wait(Duration::from_secs(10))?;
    iperf3::sample(&sender.stdout)
}

/// The guest of every row: idle, one dirty page now and then, so much of its memory touched.
fn guest(options: &Options, touched: bool) -> GuestSpec {
    let fill = if touched { format!("{}M", options.memory_mib().saturating_sub(64)) } else { "0".into() };
    GuestSpec::new("bench", 1).memory(&format!("{}M", options.memory_mib()), &fill).dirty("0", "1M")
}

fn limosa(options: &Options, way: &Way) -> Result<Sample> {
    let mut lab = lab()?;
    // QEMU's destination has its memory before its clock starts, so ours has too. Where nothing was touched, nothing is needed.
    let populate = if way.touched { "\"before\"" } else { "\"no\"" };
    lab.start_agents(AgentConfig::default().migration("populate", populate).migration("plaintext_lanes", way.plaintext))?;
    let spec = guest(options, way.touched);
    lab.a.start_guest(&spec)?;
    let agents = || Ok::<f64, anyhow::Error>(qemu::cpu_seconds(lab.a.agent_pid()?)? + qemu::cpu_seconds(lab.b.agent_pid()?)?);
    let before = agents()?;
    let words = way.words();
    let report = lab.a.migrate_well(&spec.name, &lab.b, &words.iter().map(String::as_str).collect::<Vec<_>>())?;
    let incoming: f64 = lab.b.vmms(None).into_iter().filter_map(|pid| qemu::cpu_seconds(pid).ok()).sum();
    let cpu_whole = agents()? - before + incoming;
    ensure!(report["link"] == way.link, "it went over another link: {report}");
    lab.b.guest_lives(&spec.name)?;
    lab.end()?;
    Ok(Sample { cpu_whole: Some(cpu_whole), ..sample(&report, way.touched)? })
}

fn in_qemu(lab: &Lab, options: &Options, channels: u32, touched: bool) -> Result<Sample> {
    let spec = guest(options, touched);
    let setup = QemuSetup {
        kernel: rig::guest_images()?.elf,
        cmdline: format!("ws={} dirty={} fill={} heartbeat=200", spec.ws, spec.dirty, spec.fill),
        memory_bytes: options.memory_mib() << 20,
        preallocate: true,
        multifd_channels: channels,
        downtime_ms: 50,
    };
    let QemuResult { total_ms, downtime_ms, cpu_source, cpu_destination, bytes } =
        qemu::migrate(&setup, &lab.a, &lab.b, "limosa-guest ready")?;
    Ok(Sample {
        bytes: options.memory_mib() << 20,
        seconds: if touched { total_ms / 1000.0 } else { 0.0 },
        wire_bytes: Some(bytes),
        cpu_source: Some(cpu_source),
        cpu_destination: Some(cpu_destination),
        total_ms: Some(total_ms),
        downtime_ms: Some(downtime_ms),
        ..Sample::default()
    })
}

fn row(name: &str, kind: Kind, lanes: Option<u16>) -> Case {
    let name = name.to_owned();
    Case { series: name.clone(), name, kind, link: None, lanes, mix: None, ceiling: None, samples: Vec::new() }
}

/// Measures everything `options.runs` times, interleaved.
pub(crate) fn measure(options: &Options, run: &mut Run) -> Result<()> {
    let lab = lab()?;
    let ways = ways(options.lanes);
    let others = [("QEMU, one stream", 0_u16, true), ("QEMU, multifd 2", 2, true), ("QEMU, memory never touched", 0, false)];
    let others = if options.no_qemu { &others[..0] } else { &others[..] };
    let mut path = row("iperf3 -l 1M, one stream", Kind::Ceiling, Some(1));
    let mut ours: Vec<Case> = ways.iter().map(Way::case).collect();
    let mut theirs: Vec<Case> =
        others.iter().map(|(name, channels, _)| row(name, Kind::Peer, Some((*channels).max(1)))).collect();
    for number in 1..=options.runs {
        eprintln!("run {number} of {}", options.runs);
        path.samples.push(ceiling(&lab)?);
        for (way, case) in ways.iter().zip(&mut ours) {
            case.samples.push(limosa(options, way).with_context(|| way.name)?);
        }
        for ((name, channels, touched), case) in others.iter().zip(&mut theirs) {
            case.samples.push(in_qemu(&lab, options, (*channels).into(), *touched).with_context(|| *name)?);
        }
    }
    run.cases = std::iter::once(path).chain(ours).chain(theirs).collect();
    run.notes.push(
        "`total ms` begins when the destination has its memory, on both sides: QEMU's is preallocated, ours is populated before"
            .into(),
    );
    run.skipped.push("RDMA: in the lab only (`--lab`); this machine has no device".into());
    Ok(())
}
