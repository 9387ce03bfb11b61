//! How long Debian's kernels take from the start of the VMM to the first program of their own, in our VMM and in QEMU's microvm: in the
//! lab, where KVM is real and everything is emulated, by turns in one run. Both have transparent huge pages: QEMU's memory gets them by
//! itself there, ours where it is set. Figures compare only with each other.
//!
//! `cargo bench -p rig --bench boot -- [--runs 3]` as root, on an otherwise idle machine, after `cargo build --release -p limosa`.
#![allow(clippy::print_stdout, reason = "a benchmark prints")]
#![forbid(unsafe_code)]

#[path = "common/mod.rs"]
mod common;

use anyhow::{Context, Result};
use clap::Parser;
use common::median;
use rig::linux::{Debian, Images, KernelFile, LinuxGuest, image};
use rig::process::limosa_bin;
use rig::roce::{Machine, Machines, Spec, shell_quoted};
use std::path::Path;
use std::time::Duration;

/// Boots of Debian's kernels, ours beside QEMU's microvm.
#[derive(Debug, Parser)]
struct Options {
    /// How often everything is measured, interleaved
    #[arg(long, default_value_t = 3)]
    runs: usize,
    /// Given by `cargo bench`
    #[arg(long, hide = true)]
    bench: bool,
}

const FOLDER: &str = "/run/limosa-boot";
const LIMIT: Duration = Duration::from_secs(180);

/// Runs a VMM in the machine until its guest's program is up: the time in seconds, by the machine's clock.
fn boot(machine: &Machine, command: &str) -> Result<f64> {
    let line = format!(
        "mkdir -p {FOLDER}; cd {FOLDER}; : >log; a=${{EPOCHREALTIME/./}}; {command} >log 2>&1 </dev/null & p=$!; \
         until grep -qa 'limosa-linux ready' log; do kill -0 $p || {{ cat log; exit 1; }}; sleep 0.05; done; \
         b=${{EPOCHREALTIME/./}}; kill -9 $p; echo $((b - a))"
    );
    let text = machine.shell(&line, LIMIT)?.text();
    let us: f64 = text.lines().last().and_then(|line| line.trim().parse().ok()).with_context(|| text.clone())?;
    Ok(us / 1e6)
}

fn ours(machine: &Machine, guest: &LinuxGuest, images: &Images) -> Result<String> {
    let file = format!("{FOLDER}/{}.toml", guest.name);
    machine.write_file(&file, guest.text(images).as_bytes())?;
    Ok(format!("{} vmm --config {file}", limosa_bin()?.display()))
}

fn microvm(guest: &LinuxGuest, images: &Images) -> String {
    let kernel: &Path = if guest.kernel == KernelFile::Pvh { &images.pvh } else { &images.bzimage };
    let cmdline = guest.cmdline();
    format!(
        "qemu-system-x86_64 -M microvm,rtc=on -accel kvm -cpu host -m {} -smp 1 -nodefaults -no-user-config -display none -serial stdio \
         -kernel {} -initrd {} -append {}",
        guest.memory_mib,
        kernel.display(),
        images.initramfs.display(),
        shell_quoted(&cmdline)
    )
}

fn main() -> Result<()> {
    let options = Options::parse();
    // The machines see the outer machine's files as if nobody wrote to them: so before they boot.
    let debians = [Debian::Bookworm, Debian::Trixie].map(|debian| image::images(debian).map(|images| (debian, images)));
    let debians: Vec<_> = debians.into_iter().collect::<Result<_>>()?;
    let machines = Machines::boot(&Spec { limit_seconds: 3600, ..Spec::new()? })?;
    let alpha = machines.alpha();
    alpha.shell(rig::linux::HUGE_PAGES_FOR_MEMFDS, LIMIT)?;
    println!("{:28} {:>10} {:>14} {:>7}   samples in s", "kernel", "limosa, s", "microvm, s", "ratio");
    for (debian, images) in &debians {
        for kernel in [KernelFile::Pvh, KernelFile::BzImage] {
            let guest = LinuxGuest::new("boot", 1).debian(*debian).kernel(kernel).setting("thp = true");
            let guest = LinuxGuest { network: String::new(), words: Vec::new(), ..guest };
            let commands = [ours(alpha, &guest, images)?, microvm(&guest, images)];
            let mut samples = [Vec::new(), Vec::new()];
            for _ in 0..options.runs {
                for (command, samples) in commands.iter().zip(&mut samples) {
                    samples.push(boot(alpha, command)?);
                }
            }
            let told = format!("{samples:.1?}");
            let [ours, microvm] = samples.map(|samples| median(samples).unwrap_or(f64::NAN));
            let name = format!("{} {kernel:?}", images.release);
            println!("{name:28} {ours:>10.1} {microvm:>14.1} {:>7.2}   {told}", ours / microvm);
        }
    }
    machines.end()
}
