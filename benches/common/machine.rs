//! The description of a machine, read from /proc and /sys: figures belong to the machine that they were measured on. What it does
//! not say is left out.

use serde::{Deserialize, Serialize};
use std::path::Path;
use std::process::Command;

/// A machine, as far as it matters to throughput.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub(crate) struct Machine {
    /// "this machine", "lab machine under QEMU TCG".
    pub(crate) kind: String,
    /// The processor's own name.
    pub(crate) cpu: Option<String>,
    /// Processors that may be used.
    pub(crate) cores: usize,
    /// "Linux 6.1.0 x86_64".
    pub(crate) kernel: Option<String>,
    /// Bytes of memory.
    pub(crate) memory_bytes: Option<u64>,
    /// Of TCP, as benchmarks set it on their sockets.
    pub(crate) congestion_control: Option<String>,
    /// MTU of the interface that is measured.
    pub(crate) mtu: Option<u32>,
    /// Transparent huge pages: the kernel's setting for shared memory and for the rest.
    pub(crate) huge_pages: Option<String>,
    /// RDMA devices.
    pub(crate) rdma_devices: Vec<String>,
    /// Load average of the last minute when the run began: an idle machine's is near 0.
    pub(crate) load: Option<f64>,
    /// Whether this program was built with optimisation.
    pub(crate) optimised: bool,
}

fn line(path: impl AsRef<Path>) -> Option<String> {
    let text = std::fs::read_to_string(path).ok()?;
    Some(text.trim().to_owned()).filter(|text| !text.is_empty())
}

fn field(path: &str, name: &str) -> Option<String> {
    let text = std::fs::read_to_string(path).ok()?;
    let found = text.lines().find_map(|line| line.strip_prefix(name)?.trim_start().strip_prefix(':'))?;
    Some(found.trim().to_owned())
}

/// The setting in brackets: "always [madvise] never".
fn chosen(path: &str) -> Option<String> {
    Some(line(path)?.split_once('[')?.1.split_once(']')?.0.to_owned())
}

/// This machine; `interface` is the one that is measured.
pub(crate) fn describe(kind: &str, interface: &str) -> Machine {
    let kernel = ["ostype", "osrelease"].map(|name| line(format!("/proc/sys/kernel/{name}")).unwrap_or_default()).join(" ");
    let memory = field("/proc/meminfo", "MemTotal").and_then(|text| text.trim_end_matches(" kB").parse::<u64>().ok());
    let huge = "/sys/kernel/mm/transparent_hugepage";
    let (shared, rest) = (chosen(&format!("{huge}/shmem_enabled")), chosen(&format!("{huge}/enabled")));
    let devices = std::fs::read_dir("/sys/class/infiniband").into_iter().flatten().flatten();
    Machine {
        kind: kind.to_owned(),
        cpu: field("/proc/cpuinfo", "model name"),
        cores: std::thread::available_parallelism().map_or(1, usize::from),
        kernel: Some(format!("{kernel} {}", std::env::consts::ARCH)),
        memory_bytes: memory.map(|kib| kib << 10),
        congestion_control: Some("cubic".to_owned()),
        mtu: line(format!("/sys/class/net/{interface}/mtu")).and_then(|text| text.parse().ok()),
        huge_pages: shared.zip(rest).map(|(shared, rest)| format!("shared memory {shared}, other {rest}")),
        rdma_devices: devices.map(|entry| entry.file_name().to_string_lossy().into_owned()).collect(),
        load: line("/proc/loadavg").and_then(|text| text.split(' ').next()?.parse().ok()),
        optimised: !cfg!(debug_assertions),
    }
}

/// CPU seconds that all processors of this machine have spent so far on anything but waiting.
pub(crate) fn busy_seconds() -> Option<f64> {
    let text = std::fs::read_to_string("/proc/stat").ok()?;
    let fields: Vec<f64> = text.lines().next()?.split_whitespace().skip(1).map_while(|word| word.parse().ok()).collect();
    // user, nice, system, then idle and waiting for a disk, then interrupts of both kinds, and what the hypervisor took.
    let busy = [0, 1, 2, 5, 6].iter().filter_map(|at| fields.get(*at)).sum::<f64>();
    Some(busy / 100.0)
}

/// The commit of these sources, short; "+" behind it where they were changed since.
pub(crate) fn commit() -> Option<String> {
    let git = |words: &[&str]| {
        let done = Command::new("git").args(["-C", env!("CARGO_MANIFEST_DIR")]).args(words).output().ok()?;
        done.status.success().then(|| String::from_utf8_lossy(&done.stdout).trim().to_owned())
    };
    let commit = git(&["rev-parse", "--short=10", "HEAD"])?;
    let changed = git(&["status", "--porcelain", "--untracked-files=no"]).is_some_and(|text| !text.is_empty());
    Some(if changed { commit + "+" } else { commit })
}
