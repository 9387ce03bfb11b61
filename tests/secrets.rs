//! Where secrets are and are not: a pattern in a guest's memory, a host's secret key and a ticket are looked for in everything that two
//! agents write while the guest moves, and in a core dump of an agent; and which privileges an agent and its VMMs have left.
#![allow(clippy::panic, clippy::unwrap_used, clippy::expect_used, clippy::print_stdout, missing_docs, unreachable_pub)]

use limosa_proto::ticket::Ticket;
use rig::command::limosa;
use rig::process::{self, wait_for};
use rig::{AgentConfig, Context, GuestSpec, Host, Lab, Result, bail, ensure, with_lab};
use std::collections::BTreeMap;
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

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

/// A ticket for a guest of a, for b: its text, and what makes it worth something, the signature at its end. Its number is no secret.
fn ticket_for(lab: &Lab, vm: &str) -> Result<(String, Vec<u8>)> {
    let key = lab.a.operator.key.to_string_lossy();
    let (a, b) = (lab.a.id()?, lab.b.id()?);
    let words = ["ticket", "make", "--key", &key, "--source", &a, "--destination", &b, "--vm", vm];
    let text = limosa(&words)?.expect_code(0)?.stdout.trim().to_owned();
    let bytes = Ticket::parse(&text)?.emit();
    let signature = bytes.len().checked_sub(64).and_then(|from| bytes.get(from..)).context("a ticket without a signature")?;
    Ok((text, signature.to_vec()))
}

/// Tickets that were used, refused and found to be none: neither what is printed nor any file has one.
fn tickets_are_nowhere(lab: &Lab, tickets: &[(String, Vec<u8>)], printed: &[String]) -> Result<()> {
    for (text, signature) in tickets {
        // From the middle on: how each begins is the same, and is said in words about it.
        let secret = text.get(text.len() / 2..).context("a short ticket")?;
        for host in [&lab.a, &lab.b] {
            nowhere("a ticket", secret.as_bytes(), host, &[])?;
            nowhere("the signature of a ticket", signature, host, &[])?;
        }
        for said in printed {
            ensure!(!said.contains(secret), "a ticket was printed: {said}");
        }
    }
    Ok(())
}

#[test]
fn guest_memory_and_keys_are_in_no_file_and_guest_memory_in_no_core_dump() {
    with_lab(AgentConfig::default(), |lab| {
        let guest = GuestSpec::new("web", 1).memory("128M", "48M").dirty("2M", "8M");
        lab.guest(&guest)?;
        let vmm = lab.a.vmms(None).first().copied().context("no VMM")?;
        let page = page_of(vmm)?;
        let (ours, theirs) = (secret_of(&lab.a.state_dir().join("host.key"))?, secret_of(&lab.b.state_dir().join("host.key"))?);
        let vm = lab.a.ask(&["vm", "show", "web"])?;
        let vm = vm["id"].as_str().with_context(|| format!("vm show: {vm}"))?;
        let (used, other, broken) =
            (ticket_for(lab, vm)?, ticket_for(lab, "ff0102030405060708090a0b0c0d0e0f")?, ticket_for(lab, vm)?);
        let changed = broken.0.chars().rev().enumerate().map(|(at, letter)| if at == 9 { '!' } else { letter });
        let changed: String = changed.collect::<Vec<_>>().into_iter().rev().collect();
        let mut printed = Vec::new();
        for bad in [&other.0, &changed] {
            let refused = lab.a.migrate("web", &lab.b, &["--ticket", bad])?;
            ensure!(refused.code != 0, "{refused:?}");
            printed.push(refused.all());
        }
        let mut running = lab.a.start_slow("web", &lab.b, &["--ticket", &used.0])?;
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
        printed.push(running.wait(Duration::from_secs(60))?.expect_code(0)?.all());
        lab.guest_is_on(&guest, &lab.b, &lab.a)?;
        let again = lab.b.migrate_well("web", &lab.a, &[]).and_then(|_| lab.a.migrate("web", &lab.b, &["--ticket", &used.0]))?;
        printed.push(again.expect_code(1)?.expect_words("used already")?.all());
        tickets_are_nowhere(lab, &[used, other, broken], &printed)?;
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

/// Ends a process as a failed assertion would (SIGSEGV is caught by Rust's own handler), where core dumps are allowed without a limit: whether the kernel made one.
fn dumps_core(pid: u32, wait: impl FnOnce() -> Result<std::process::ExitStatus>) -> Result<bool> {
    let allowed = Command::new("prlimit").args(["--pid", &pid.to_string(), "--core=unlimited:unlimited"]).status()?;
    ensure!(allowed.success(), "prlimit: {allowed}");
    process::signal(pid, nix::sys::signal::Signal::SIGABRT);
    Ok(wait()?.core_dumped())
}

#[test]
fn an_agent_that_crashes_leaves_no_core_dump_with_keys_and_tickets() {
    with_lab(AgentConfig::default(), |lab| {
        let guest = GuestSpec::new("web", 1).memory("64M", "8M").dirty("2M", "4M");
        lab.guest(&guest)?;
        // Anybody else's crash leaves one here, or nothing is shown by there being none.
        let folder = lab.a.file("crash");
        std::fs::create_dir_all(&folder)?;
        let mut other = Command::new("sleep").arg("60").current_dir(&folder).stdin(Stdio::null()).spawn()?;
        let dumps = dumps_core(other.id(), || Ok(other.wait()?))?;
        std::fs::remove_dir_all(&folder)?;
        if !dumps {
            rig::skip("the kernel makes no core dumps here (kernel.core_pattern)");
            return Ok(());
        }
        // Both in the middle of a migration, when tickets and keys are in use.
        for source in [false, true] {
            let mut running = lab.a.start_slow("web", &lab.b, &[])?;
            let host = if source { &mut lab.a } else { &mut lab.b };
            let pid = host.agent_pid()?;
            ensure!(!dumps_core(pid, || host.wait_agent_ended())?, "a core dump of the agent of {} was made", host.name);
            running.wait(Duration::from_secs(60))?;
            let host = if source { &mut lab.a } else { &mut lab.b };
            host.restart_agent()?;
            lab.a.wait_knows("web", true)?;
            wait_for(Duration::from_secs(30), "both to have settled it", || {
                let open = |host: &Host| Ok::<bool, rig::Error>(host.jobs()?.iter().any(|job| job["state"] == "running"));
                Ok((!open(&lab.a)? && !open(&lab.b)?).then_some(()))
            })?;
            lab.settled(&lab.b, 0)?;
        }
        lab.unharmed(&guest)
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
