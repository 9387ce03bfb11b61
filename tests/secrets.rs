//! Where secrets are and are not: a pattern in a guest's memory, a host's secret key and a ticket are looked for in everything that two
//! agents write while the guest moves, and in a core dump of an agent; and which privileges an agent and its VMMs have left.
#![allow(clippy::panic, clippy::unwrap_used, clippy::expect_used, clippy::print_stdout, missing_docs, unreachable_pub)]

use rig::{AgentConfig, Context, GuestSpec, Host, Result, bail, ensure, with_lab};
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::Command;

/// Every file below `folder`.
fn files(folder: &Path, found: &mut Vec<PathBuf>) {
    for entry in std::fs::read_dir(folder).into_iter().flatten().flatten() {
        match entry.file_type() {
            Ok(kind) if kind.is_dir() => files(&entry.path(), found),
            Ok(kind) if kind.is_file() => found.push(entry.path()),
            _ => {}
        }
    }
}

fn contains(bytes: &[u8], secret: &[u8]) -> bool {
    secret.first().is_some_and(|first| {
        let starts = bytes.iter().enumerate().filter(|(_, byte)| *byte == first).map(|(at, _)| at);
        starts.into_iter().any(|at| bytes[at..].starts_with(secret))
    })
}

/// The forms in which a secret could be written: as it is, and in the texts that programs make of bytes.
fn forms(secret: &[u8]) -> Vec<Vec<u8>> {
    let hex: String = secret.iter().map(|byte| format!("{byte:02x}")).collect();
    let list: Vec<String> = secret.iter().map(ToString::to_string).collect();
    vec![
        secret.to_vec(),
        hex.to_uppercase().into_bytes(),
        hex.into_bytes(),
        list.join(", ").into_bytes(),
        list.join(",").into_bytes(),
    ]
}

/// The bytes of a key's file behind its armour, if it has one: what must be nowhere else.
fn secret_of(key: &Path) -> Result<Vec<u8>> {
    let bytes = std::fs::read(key)?;
    ensure!(bytes.len() >= 32, "{} has {} bytes", key.display(), bytes.len());
    Ok(bytes)
}

/// Where the guest's working set begins, in pages: below is its code, of which the agent's program has some too.
const WORKING_SET: u64 = 0x100_0000 / 4096;

/// A page of a guest's memory as its VMM has it: one of the working set, of random content.
fn page_of(pid: u32) -> Result<Vec<u8>> {
    use std::os::unix::fs::FileExt;
    for entry in std::fs::read_dir(format!("/proc/{pid}/fd"))?.flatten() {
        let is_memory = std::fs::read_link(entry.path()).is_ok_and(|name| name.to_string_lossy().contains("memfd:"));
        let Some(file) = is_memory.then(|| std::fs::File::open(entry.path()).ok()).flatten() else { continue };
        let length = file.metadata()?.len();
        let mut page = vec![0; 4096];
        for number in (WORKING_SET..length / 4096).step_by(7) {
            file.read_exact_at(&mut page, number * 4096)?;
            let distinct = page.iter().collect::<std::collections::BTreeSet<_>>().len();
            if distinct > 5 {
                return Ok(page);
            }
        }
    }
    bail!("process {pid} has no page that could be recognised")
}

fn nowhere(what: &str, secret: &[u8], host: &Host, but: &[&str]) -> Result<usize> {
    let mut all = Vec::new();
    files(&host.state_dir(), &mut all);
    files(&host.run_dir(), &mut all);
    all.push(host.file("agent.log"));
    let mut looked = 0;
    for file in all {
        let name = file.file_name().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default();
        if but.contains(&name.as_str()) {
            continue;
        }
        let bytes = std::fs::read(&file).unwrap_or_default();
        for form in forms(secret) {
            ensure!(!contains(&bytes, &form), "{what} is in {}", file.display());
        }
        looked += 1;
    }
    Ok(looked)
}

/// A core dump of a process, by gdb, which is not bound by what the process has said of itself; None where there is no gdb.
fn core_of(pid: u32, to: &Path) -> Result<Option<Vec<u8>>> {
    let Ok(output) = Command::new("gcore").arg("-o").arg(to).arg(pid.to_string()).output() else { return Ok(None) };
    let file = PathBuf::from(format!("{}.{pid}", to.display()));
    ensure!(file.exists(), "gcore: {}", String::from_utf8_lossy(&output.stderr));
    let bytes = std::fs::read(&file)?;
    std::fs::remove_file(&file)?;
    Ok(Some(bytes))
}

#[test]
fn guest_memory_and_keys_are_in_no_file_and_guest_memory_in_no_core_dump() {
    with_lab(AgentConfig::default(), |lab| {
        let guest = GuestSpec::new("web", 1).memory("128M", "48M").dirty("2M", "8M");
        lab.guest(&guest)?;
        let vmm = lab.a.vmms(None).first().copied().context("no VMM")?;
        let page = page_of(vmm)?;
        let (ours, theirs) = (secret_of(&lab.a.state_dir().join("host.key"))?, secret_of(&lab.b.state_dir().join("host.key"))?);
        let mut running = lab.a.start_slow("web", &lab.b, &[])?;
        // Both agents map the guest now: a dump of either has nothing of it.
        let mut dumped = Vec::new();
        for host in [&lab.a, &lab.b] {
            if let Some(core) = core_of(host.agent_pid()?, &host.file("core"))? {
                ensure!(core.len() > 100_000, "a core dump of {} bytes", core.len());
                let found = core.windows(256).position(|bytes| bytes == &page[..256]);
                ensure!(
                    found.is_none(),
                    "a page of the guest is in a core dump of the agent of {}, at byte {found:?}: {:02x?}",
                    host.name,
                    &page[..64]
                );
                dumped.push(core.len());
            }
        }
        println!("core dumps of both agents in the middle of a round: {dumped:?} bytes, no page of the guest in them");
        if dumped.is_empty() {
            rig::skip("there is no gcore: core dumps are judged by the kernel's flags alone");
        }
        for host in [&lab.a, &lab.b] {
            let pid = host.agent_pid()?;
            let maps = std::fs::read_to_string(format!("/proc/{pid}/smaps"))?;
            let flags = maps.split("VmFlags:").zip(maps.split("VmFlags:").skip(1));
            for (map, flags) in flags {
                let flags = flags.lines().next().unwrap_or_default();
                let names_memory = map.lines().any(|line| line.contains("/memfd:") && line.contains('-'));
                let last = map.lines().rfind(|line| line.contains(" r") && line.contains('-')).unwrap_or_default();
                ensure!(!(names_memory && last.contains("/memfd:")) || flags.contains(" dd"), "{last} may be dumped: {flags}");
            }
        }
        running.wait(std::time::Duration::from_secs(60))?.expect_code(0)?;
        lab.guest_is_on(&guest, &lab.b, &lab.a)?;
        let mut looked = BTreeMap::new();
        for host in [&lab.a, &lab.b] {
            let count = nowhere("a page of the guest", &page[..64], host, &[])?;
            looked.insert(host.name.clone(), count);
            for (which, secret) in [("a's", &ours), ("b's", &theirs)] {
                nowhere(&format!("{which} secret key"), secret, host, &["host.key"])?;
                // Also without what is the same in every such file.
                nowhere(&format!("the end of {which} secret key"), &secret[secret.len() - 32..], host, &["host.key"])?;
            }
        }
        println!("looked into {looked:?} files");
        ensure!(looked.values().all(|count| *count >= 4), "{looked:?}");
        Ok(())
    });
}

/// A line of /proc/PID/status.
fn status(pid: u32, field: &str) -> Result<String> {
    let text = std::fs::read_to_string(format!("/proc/{pid}/status"))?;
    let line = text.lines().find_map(|line| line.strip_prefix(field)?.strip_prefix(':'));
    Ok(line.with_context(|| format!("{field} of {pid}"))?.trim().to_owned())
}

#[test]
fn an_agent_and_its_vmms_have_few_privileges_and_no_core_dumps() {
    with_lab(AgentConfig::default(), |lab| {
        let guest = GuestSpec::new("web", 1);
        lab.guest(&guest)?;
        let (agent, vmm) = (lab.a.agent_pid()?, lab.a.vmms(None).first().copied().context("no VMM")?);
        // CAP_NET_ADMIN 12, CAP_NET_RAW 13, CAP_IPC_LOCK 14, CAP_SYS_RESOURCE 24.
        let most = (1_u64 << 12) | (1 << 13) | (1 << 14) | (1 << 24);
        for pid in [agent, vmm] {
            for field in ["CapEff", "CapPrm", "CapBnd", "CapInh", "CapAmb"] {
                let has = u64::from_str_radix(&status(pid, field)?, 16)?;
                ensure!(has & !most == 0, "{field} of {pid} is {has:x}");
            }
            ensure!(status(pid, "NoNewPrivs")? == "1" && status(pid, "Seccomp")? == "2", "{pid}");
        }
        // The VMM has its own filters, the agent's and no more of its life without them.
        ensure!(
            status(vmm, "Seccomp_filters")?.parse::<u32>()? > status(agent, "Seccomp_filters")?.parse::<u32>()?,
            "one filter"
        );
        let limits = std::fs::read_to_string(format!("/proc/{vmm}/limits"))?;
        let core = limits.lines().find(|line| line.starts_with("Max core file size")).context("no limit")?;
        ensure!(core.split_whitespace().nth(4) == Some("0"), "{core}");
        println!("agent: CapEff {}, VMM: CapEff {}", status(agent, "CapEff")?, status(vmm, "CapEff")?);
        lab.good_migration(&guest)
    });
}
