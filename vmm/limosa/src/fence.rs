//! What the agent may still do, once it knows its configuration and before it starts a thread: fewer capabilities, no new privileges, no
//! core dump, no writing to the system's own folders, no programs but its own, none of the system calls that take a machine over.
//!
//! Fences are inherited by the VMMs that it starts, which are fenced in much closer (`vmm/sandbox.rs`). So seccomp is a list of what is
//! denied here, not of what is allowed; and guests' kernels and images may lie anywhere, so Landlock names where nothing may be written.

use crate::vmm::sandbox;
use caps::{CapSet, Capability, CapsHashSet};
use landlock::{
    ABI, Access as _, AccessFs, CompatLevel, Compatible as _, PathBeneath, PathFd, Ruleset, RulesetAttr as _,
    RulesetCreatedAttr as _, RulesetStatus, Scope,
};
use nix::sys::prctl;
use seccompiler::{SeccompAction, apply_filter_all_threads};
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

/// What an agent needs, each with its reason (docs/SECURITY.md has them in words).
const CAPABILITIES: [Capability; 4] = [
    // TAPs of the VMMs, the bridge's table and VLANs, large send buffers.
    Capability::CAP_NET_ADMIN,
    // Announcements and what is heard at a guest's port.
    Capability::CAP_NET_RAW,
    // Memory that RDMA pins beyond the limit.
    Capability::CAP_IPC_LOCK,
    // Huge pages and limits of the VMMs.
    Capability::CAP_SYS_RESOURCE,
];

/// Where nothing may be written, though everything may be read.
const SYSTEM: [&str; 9] = ["bin", "boot", "etc", "lib", "lib32", "lib64", "sbin", "sys", "usr"];
/// Where programs and their libraries lie; the agent's own folder comes to it.
const PROGRAMS: [&str; 4] = ["/usr", "/lib", "/lib64", "/bin"];
/// The newest Landlock that is asked for; an older kernel gives what it has.
const LANDLOCK: ABI = ABI::V6;

/// What neither an agent nor a VMM ever calls, and what would make most of a break-in.
const DENIED: &[i64] = &[
    // Other file systems, other roots, other namespaces.
    libc::SYS_mount,
    libc::SYS_umount2,
    libc::SYS_pivot_root,
    libc::SYS_chroot,
    libc::SYS_move_mount,
    libc::SYS_open_tree,
    libc::SYS_fsopen,
    libc::SYS_fsmount,
    libc::SYS_fsconfig,
    libc::SYS_mount_setattr,
    libc::SYS_unshare,
    libc::SYS_setns,
    libc::SYS_open_by_handle_at,
    libc::SYS_quotactl,
    libc::SYS_swapon,
    libc::SYS_swapoff,
    // The kernel itself.
    libc::SYS_init_module,
    libc::SYS_finit_module,
    libc::SYS_delete_module,
    libc::SYS_kexec_load,
    libc::SYS_kexec_file_load,
    libc::SYS_bpf,
    libc::SYS_perf_event_open,
    libc::SYS_io_uring_setup,
    libc::SYS_iopl,
    libc::SYS_ioperm,
    libc::SYS_reboot,
    libc::SYS_syslog,
    libc::SYS_acct,
    // The machine's clock and name.
    libc::SYS_settimeofday,
    libc::SYS_clock_settime,
    libc::SYS_adjtimex,
    libc::SYS_clock_adjtime,
    libc::SYS_sethostname,
    libc::SYS_setdomainname,
    // Other processes' memory, keys of the kernel.
    libc::SYS_ptrace,
    libc::SYS_process_vm_readv,
    libc::SYS_process_vm_writev,
    libc::SYS_process_madvise,
    libc::SYS_kcmp,
    libc::SYS_add_key,
    libc::SYS_request_key,
    libc::SYS_keyctl,
    libc::SYS_personality,
    libc::SYS_vhangup,
];

/// Puts all fences up for this process. Says what this machine does not have.
///
/// # Errors
/// In words; what a kernel lacks is no error.
pub(crate) fn restrict(own: &[PathBuf]) -> Result<(), String> {
    no_dump()?;
    prctl::set_no_new_privs().map_err(|error| format!("no_new_privs: {error}"))?;
    let kept = drop_capabilities()?;
    match landlock(own).map_err(|error| format!("Landlock cannot be put up: {error}"))? {
        RulesetStatus::FullyEnforced => tracing::info!("Landlock is up: no writing to the system's folders, no other programs"),
        RulesetStatus::PartiallyEnforced => tracing::info!("Landlock is up, as far as this kernel has it"),
        RulesetStatus::NotEnforced => tracing::warn!("this kernel has no Landlock: files are guarded by their rights alone"),
    }
    let rules = DENIED.iter().map(|call| (*call, Vec::new())).collect::<BTreeMap<_, _>>();
    let program = sandbox::compile(rules, SeccompAction::Allow, sandbox::refusal())?;
    apply_filter_all_threads(&program).map_err(|error| format!("seccomp cannot be put up: {error}"))?;
    tracing::info!(capabilities = kept, "seccomp is up, privileges are dropped");
    Ok(())
}

/// From now on nobody but root reads this process's memory, and no core dump is written of it: keys, tickets and guests' records are in
/// it. `RLIMIT_CORE` would not do, since a handler that core dumps are piped to (systemd-coredump) is not bound by it.
///
/// # Errors
/// In words.
pub(crate) fn no_dump() -> Result<(), String> {
    prctl::set_dumpable(false).map_err(|error| format!("core dumps cannot be switched off: {error}"))
}

/// Keeps the listed ones that it has; gives their names.
fn drop_capabilities() -> Result<String, String> {
    let failed = |error: caps::errors::CapsError| format!("capabilities cannot be dropped: {error}");
    let has = caps::read(None, CapSet::Permitted).map_err(failed)?;
    let wanted: CapsHashSet = CAPABILITIES.into_iter().filter(|one| has.contains(one)).collect();
    // What a VMM can ever have; to take from that needs a capability itself, so it comes first.
    if has.contains(&Capability::CAP_SETPCAP) {
        let bounding = caps::read(None, CapSet::Bounding).map_err(failed)?;
        for other in bounding.difference(&wanted) {
            caps::drop(None, CapSet::Bounding, *other).map_err(failed)?;
        }
    }
    for set in [CapSet::Ambient, CapSet::Inheritable] {
        caps::clear(None, set).map_err(failed)?;
    }
    for set in [CapSet::Effective, CapSet::Permitted] {
        caps::set(None, set, &wanted).map_err(failed)?;
    }
    let mut names: Vec<String> = wanted.iter().map(ToString::to_string).collect();
    names.sort_unstable();
    Ok(if names.is_empty() { "none".into() } else { names.join(" ") })
}

/// Everything may be read; written what does not lie in the system's folders, or is one of the agent's `own`; run what lies where programs
/// lie, and beside this one.
fn landlock(own: &[PathBuf]) -> Result<RulesetStatus, landlock::RulesetError> {
    let (all, read) = (AccessFs::from_all(LANDLOCK), AccessFs::from_read(LANDLOCK) & !AccessFs::Execute);
    let mut rules = Ruleset::default()
        .set_compatibility(CompatLevel::BestEffort)
        .handle_access(all)?
        // Signals are not: VMMs of an agent before this one are ended by it too.
        .scope(Scope::AbstractUnixSocket)?
        .create()?;
    let program = std::env::current_exe().ok().and_then(|path| Some(path.parent()?.to_path_buf()));
    let programs = PROGRAMS.iter().map(PathBuf::from).chain(program).map(|path| (path, read | AccessFs::Execute));
    let writable = top_level().into_iter().chain(own.iter().cloned()).map(|path| (path, all & !AccessFs::Execute));
    let readable = std::iter::once((PathBuf::from("/"), read));
    for (path, access) in readable.chain(programs).chain(writable) {
        // What is not there needs no right.
        let Ok(fd) = PathFd::new(&path) else { continue };
        let access = if path.is_dir() { access } else { access & AccessFs::from_file(LANDLOCK) };
        rules = rules.add_rule(PathBeneath::new(fd, access))?;
    }
    Ok(rules.restrict_self()?.ruleset)
}

/// The folders of the root that are not the system's.
fn top_level() -> Vec<PathBuf> {
    let entries = std::fs::read_dir("/").into_iter().flatten().flatten();
    let is_ours = |path: &Path| path.file_name().is_some_and(|name| !SYSTEM.iter().any(|system| name == *system));
    entries.map(|entry| entry.path()).filter(|path| is_ours(path)).collect()
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::expect_used)]
mod tests {
    use super::*;
    use std::process::Command;

    /// Not the test's own process is fenced in, but this test once more, in a process of its own.
    fn in_a_process(name: &str, inside: impl FnOnce()) {
        if std::env::var_os("LIMOSA_FENCED").is_some() {
            return inside();
        }
        let test = format!("fence::tests::{name}");
        let output = Command::new(std::env::current_exe().unwrap())
            .args(["--exact", &test, "--nocapture"])
            .env("LIMOSA_FENCED", "1")
            .output()
            .unwrap();
        let text = String::from_utf8_lossy(&output.stdout);
        assert!(output.status.success() && text.contains("1 passed"), "{text}\n{}", String::from_utf8_lossy(&output.stderr));
    }

    #[test]
    fn a_fenced_agent_has_few_capabilities_and_writes_nothing_of_the_system() {
        in_a_process("a_fenced_agent_has_few_capabilities_and_writes_nothing_of_the_system", || {
            let dir = tempfile::tempdir().unwrap();
            restrict(&[dir.path().to_path_buf()]).unwrap();
            let allowed: CapsHashSet = CAPABILITIES.into_iter().collect();
            for set in [CapSet::Effective, CapSet::Permitted, CapSet::Bounding] {
                let has = caps::read(None, set).unwrap();
                // Who is not root cannot take from the bounding set, and has nothing by it.
                assert!(
                    has.is_subset(&allowed) || matches!(set, CapSet::Bounding) && !nix::unistd::geteuid().is_root(),
                    "{set:?}: {has:?}"
                );
            }
            assert!(!prctl::get_dumpable().unwrap() && prctl::get_no_new_privs().unwrap());
            std::fs::write(dir.path().join("own"), "mine").unwrap();
            assert!(std::fs::read("/etc/passwd").is_ok());
            let landlocked = std::fs::read_to_string("/sys/kernel/security/lsm").is_ok_and(|lsm| lsm.contains("landlock"));
            if nix::unistd::geteuid().is_root() && landlocked {
                assert!(std::fs::write("/etc/limosa-fence-test", "").is_err(), "it writes to /etc");
                let script = dir.path().join("script");
                std::fs::copy("/bin/true", &script).unwrap();
                assert!(Command::new(&script).status().is_err(), "it runs what it wrote");
            }
            // What it may run is as fenced in as it is.
            let status = Command::new("/bin/cat").arg("/proc/self/status").output().unwrap();
            let text = String::from_utf8(status.stdout).unwrap();
            assert!(text.contains("NoNewPrivs:\t1") && text.contains("Seccomp:\t2"), "{text}");
        });
    }
}
