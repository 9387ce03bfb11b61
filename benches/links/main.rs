//! Raw lanes: how fast populated guest memory crosses a path on 1 to 8 lanes of each link, against the ceiling of the same path in
//! the same run, interleaved: iperf3 (TCP), quinn's own bulk transfer (QUIC), `ib_write_bw` and async-rdma (RDMA). Source and
//! destination are processes of their own, so CPU time is told apart. What arrived is compared with what was sent.
//!
//! `cargo bench -p rig --bench links -- [--link tcp,quic] [--lanes 1,2] [--mix random] [--gib 2] [--runs 3] [--json FILE]`, as root;
//! `--lab` measures between the two machines of the soft-RoCE lab, `--render FILE` makes the table and the plot of a record.
#![allow(clippy::print_stdout, clippy::print_stderr, reason = "a benchmark prints")]
#![forbid(unsafe_code)]

mod bulk;
#[path = "../common/mod.rs"]
mod common;
mod end;
mod fabric;
mod hosts;
mod measure;
mod memory;
mod options;
mod orders;
mod place;
mod plan;

use anyhow::{Context, Result, bail, ensure};
use clap::Parser as _;
use common::record::{Case, Kind, Run};
use common::render;
use limosa_link::HostKey;
use measure::Path;
use options::{Options, Side};
use orders::{Answer, Begin, Order};
use place::End;
use plan::{Planned, Work};
use rig::roce::{self, Machines, Spec};
use std::process::Command;

fn main() -> Result<()> {
    let options = Options::parse();
    if let Some(side) = options.end {
        return end::serve(side == Side::Source);
    }
    if let Some(path) = &options.render {
        return render::render(path);
    }
    // `cargo test --benches` and listings call without `--bench`: nothing is measured then.
    if !options.bench {
        return Ok(());
    }
    if let Some(words) = missing(&options) {
        println!("skipped: {words}");
        ensure!(std::env::var_os("LIMOSA_DEMAND_ALL").is_none(), "{words}");
        return Ok(());
    }
    let machines = if options.lab { Some(lab()?) } else { None };
    if machines.is_none() && options.destination().is_loopback() {
        namespace()?;
    }
    let run = measure_all(&options, machines.as_ref())?;
    print!("{}", render::print(&run));
    if let Some(path) = &options.json {
        run.save(path)?;
        eprintln!("written: {0} (`cargo bench -p rig --bench links -- --render {0}` makes table and plot)", path.display());
    }
    match machines {
        Some(machines) => machines.end(),
        None => Ok(()),
    }
}

fn missing(options: &Options) -> Option<String> {
    if options.lab {
        return roce::missing();
    }
    (!nix::unistd::geteuid().is_root()).then(|| "the benchmark needs root (a network namespace, large socket buffers)".to_owned())
}

fn lab() -> Result<Machines> {
    eprintln!("booting the lab");
    let spec = Spec { limit_seconds: 3 * 3600, ..Spec::new()? };
    Machines::boot(&spec)
}

/// A namespace with its own loopback, so that nothing outside is touched. Children are in it too.
fn namespace() -> Result<()> {
    nix::sched::unshare(nix::sched::CloneFlags::CLONE_NEWNET).context("a network namespace")?;
    let up = Command::new("ip").args(["link", "set", "lo", "up"]).status().context("ip")?;
    ensure!(up.success(), "loopback cannot be brought up");
    Ok(())
}

/// A key of this run alone, as both ends take it.
fn fresh_key() -> Result<Vec<u8>> {
    let folder = tempfile::tempdir()?;
    let path = folder.path().join("host.key");
    HostKey::generate()?.save(&path)?;
    Ok(std::fs::read(&path)?)
}

fn begin(options: &Options) -> Result<Begin> {
    let address = options.destination();
    let (kind, interface) = if options.lab {
        ("a machine of the lab under QEMU TCG, soft-RoCE: figures compare only with each other", "v0")
    } else if address.is_loopback() {
        ("this machine, loopback in a network namespace", "lo")
    } else {
        ("this machine", "lo")
    };
    let trusted_fabric = if options.lab {
        vec!["10.77.0.0/24".to_owned()]
    } else if options.links().contains(&options::LinkName::Rdma) {
        vec![address.to_string()]
    } else {
        Vec::new()
    };
    let (kind, interface) = (kind.to_owned(), interface.to_owned());
    Ok(Begin { key: fresh_key()?, address, kind, interface, trusted_fabric, bulk_mtu: options.bulk_mtu })
}

fn ready(end: &mut End, begin: &Begin) -> Result<orders::Ready> {
    match end.ask(&Order::Begin(begin.clone()))? {
        Answer::Ready(ready) => Ok(*ready),
        other => bail!("an end answered {other:?}"),
    }
}

fn title(options: &Options) -> String {
    let place = if options.lab { "between two lab machines" } else { "on one machine" };
    format!("The page pass of each link, {} MiB of populated memory, {place}", options.bytes() >> 20)
}

fn measure_all(options: &Options, machines: Option<&Machines>) -> Result<Run> {
    let start = |is_source| machines.map_or_else(|| End::here(is_source), |machines| End::there(machines, is_source));
    let (mut source, mut destination) = (start(true)?, start(false)?);
    let begin = begin(options)?;
    let mut run = Run::new(if options.lab { "links-lab" } else { "links" }, &title(options));
    let (ours, theirs) = (ready(&mut source, &begin)?, ready(&mut destination, &begin)?);
    run.machines.insert("source".into(), ours.machine);
    if options.lab {
        run.machines.insert("destination".into(), theirs.machine.clone());
    }
    let mut path = Path::new(options, source, destination, theirs);
    let mut planned = plan::plan(options);
    if !options.links().contains(&options::LinkName::Rdma) {
        run.skipped.push("RDMA: asked for in the lab only (`--lab`); this machine has no device".into());
    }
    run.notes.extend(path.notes());
    for number in 1..=options.runs {
        eprintln!("run {number} of {}", options.runs);
        measure_once(&mut path, &mut planned, &mut run.skipped)?;
    }
    run.cases = planned.into_iter().map(|planned| planned.case).collect();
    Ok(run)
}

/// Each case once; what others can do before and after.
fn measure_once(path: &mut Path<'_>, planned: &mut [Planned], skipped: &mut Vec<String>) -> Result<()> {
    let others: Vec<usize> =
        (0..planned.len()).filter(|at| planned.get(*at).is_some_and(|planned| !is_lanes(planned.work))).collect();
    let lanes: Vec<usize> = (0..planned.len()).filter(|at| !others.contains(at)).collect();
    for at in others.iter().chain(&lanes).chain(&others) {
        let Some(Planned { case, work }) = planned.get_mut(*at) else { continue };
        if skipped.iter().any(|words| words.starts_with(&case.name)) {
            continue;
        }
        eprint!("  {}", words(case));
        match path.sample(*work) {
            Ok(sample) => {
                eprintln!(": {:.3} GB/s", sample.rate().unwrap_or_default() / 1e9);
                case.samples.push(sample);
            }
            // Another program may be missing; our lanes may not fail.
            Err(error) if case.kind != Kind::Lanes => {
                eprintln!(": {error:#}");
                skipped.push(format!("{}: {error:#}", case.name));
            }
            Err(error) => return Err(error.context(words(case))),
        }
    }
    Ok(())
}

fn is_lanes(work: Work) -> bool {
    matches!(work, Work::Lanes { .. })
}

fn words(case: &Case) -> String {
    let lanes = case.lanes.map(|lanes| format!(", {lanes} lanes")).unwrap_or_default();
    let mix = case.mix.as_ref().map(|mix| format!(", {mix}")).unwrap_or_default();
    format!("{}{lanes}{mix}", case.name)
}
