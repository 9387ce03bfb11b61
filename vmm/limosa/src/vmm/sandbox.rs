//! What a VMM may still do once its machine is built: use what it has open, and little else. A guest that breaks out of a
//! device finds no network, no other file, no other program. What the agent may do is not decided here.
//!
//! Two fences. Landlock, where the kernel has it, is put up before the first thread starts, because it holds only for
//! threads that come after: it names the files that may still be opened. Seccomp is put up for all threads when the
//! machine is built and before the guest runs: it names the system calls.

use super::build::words;
use landlock::{
    ABI, Access as _, AccessFs, AccessNet, CompatLevel, Compatible as _, PathBeneath, PathFd, RestrictionStatus, Ruleset,
    RulesetAttr as _, RulesetCreatedAttr as _, RulesetStatus, Scope,
};
use seccompiler::{
    BpfProgram, SeccompAction, SeccompCmpArgLen as Length, SeccompCmpOp as Compare, SeccompCondition as Condition, SeccompFilter,
    SeccompRule, TargetArch,
};
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

/// The newest Landlock that is asked for; an older kernel gives what it has.
const LANDLOCK: ABI = ABI::V6;

/// Files that a VMM may still open, each for reading or for reading and writing.
#[derive(Debug, Default, Clone, PartialEq, Eq)]
pub(super) struct Files {
    /// To be read.
    pub(super) read: Vec<PathBuf>,
    /// To be read and written.
    pub(super) write: Vec<PathBuf>,
}

impl Files {
    /// What every machine opens while it is built.
    pub(super) fn of_a_machine() -> Files {
        let paths = |list: &[&str]| list.iter().map(PathBuf::from).collect();
        Files {
            read: paths(&[
                "/dev/urandom",
                "/sys/devices/system/cpu",
                "/sys/kernel/mm",
                "/sys/class/net",
                "/sys/devices/virtual/net",
            ]),
            write: paths(&["/dev/kvm", "/dev/net/tun", "/dev/null"]),
        }
    }
}

/// From now on this thread, and all that it starts, open no files but these. Says so where the kernel cannot hold it to that.
///
/// # Errors
/// In words. A kernel without Landlock is no error.
pub(super) fn restrict_files(files: &Files) -> Result<(), String> {
    let status = landlock(files).map_err(|error| format!("Landlock cannot be put up: {}", words(&error)))?;
    match status.ruleset {
        RulesetStatus::FullyEnforced => tracing::info!("Landlock is up: the VMM opens its own files only"),
        RulesetStatus::PartiallyEnforced => tracing::info!("Landlock is up, as far as this kernel has it"),
        RulesetStatus::NotEnforced => tracing::warn!("this kernel has no Landlock: only seccomp fences this VMM in"),
    }
    Ok(())
}

fn landlock(files: &Files) -> Result<RestrictionStatus, landlock::RulesetError> {
    let (all, read) = (AccessFs::from_all(LANDLOCK), AccessFs::from_read(LANDLOCK));
    let mut rules = Ruleset::default()
        .set_compatibility(CompatLevel::BestEffort)
        .handle_access(all)?
        .handle_access(AccessNet::from_all(LANDLOCK))?
        .scope(Scope::from_all(LANDLOCK))?
        .create()?;
    let reading = files.read.iter().map(|path| (path, read & !AccessFs::Execute));
    let writing =
        files.write.iter().map(|path| (path, AccessFs::ReadFile | AccessFs::WriteFile | AccessFs::Truncate | AccessFs::IoctlDev));
    for (path, access) in reading.chain(writing) {
        // A file that is not there is missed by whoever opens it, with better words.
        let Ok(fd) = PathFd::new(path) else { continue };
        let access = if path.is_dir() { access } else { access & AccessFs::from_file(LANDLOCK) };
        rules = rules.add_rule(PathBeneath::new(fd, access))?;
    }
    rules.restrict_self()
}

/// From now on no thread of this process makes a system call that a VMM with a built machine does not need.
///
/// # Errors
/// In words.
pub(super) fn restrict_calls() -> Result<(), String> {
    for program in programs(refusal())? {
        seccompiler::apply_filter_all_threads(&program)
            .map_err(|error| format!("seccomp cannot be put up: {}", words(&error)))?;
    }
    tracing::info!("seccomp is up");
    Ok(())
}

/// What becomes of a call that is not on the list. Where it is tested it ends the process, so that a missing one is noticed; an
/// operator's guest must not die of one, and is as well fenced in by a refusal.
pub(crate) fn refusal() -> SeccompAction {
    if cfg!(debug_assertions) { SeccompAction::KillProcess } else { SeccompAction::Errno(libc::EPERM as u32) }
}

fn failed(error: seccompiler::BackendError) -> String {
    format!("the seccomp filter is wrong: {error}")
}

/// A filter that does `listed` with the calls of `rules`, and `otherwise` with all others.
///
/// # Errors
/// In words.
pub(crate) fn compile(
    rules: BTreeMap<i64, Vec<SeccompRule>>,
    otherwise: SeccompAction,
    listed: SeccompAction,
) -> Result<BpfProgram, String> {
    let filter = SeccompFilter::new(rules, otherwise, listed, TargetArch::x86_64).map_err(failed)?;
    BpfProgram::try_from(filter).map_err(failed)
}

fn programs(refusal: SeccompAction) -> Result<Vec<BpfProgram>, String> {
    // The flags of clone3 are in memory, where a filter cannot see them: without it libc takes clone.
    let clone3 = BTreeMap::from([(libc::SYS_clone3, Vec::new())]);
    let unknown = SeccompAction::Errno(libc::ENOSYS as u32);
    Ok(vec![compile(clone3, SeccompAction::Allow, unknown)?, compile(allowed().map_err(failed)?, refusal, SeccompAction::Allow)?])
}

/// The calls that are allowed whatever their arguments.
const CALLS: &[i64] = &[
    // Data of what is open.
    libc::SYS_read,
    libc::SYS_write,
    libc::SYS_readv,
    libc::SYS_writev,
    libc::SYS_pread64,
    libc::SYS_pwrite64,
    libc::SYS_preadv,
    libc::SYS_pwritev,
    libc::SYS_preadv2,
    libc::SYS_pwritev2,
    libc::SYS_lseek,
    libc::SYS_fsync,
    libc::SYS_fdatasync,
    libc::SYS_fallocate,
    libc::SYS_ftruncate,
    libc::SYS_sync_file_range,
    // Files: which ones is Landlock's to say.
    libc::SYS_openat,
    libc::SYS_close,
    libc::SYS_fstat,
    libc::SYS_newfstatat,
    libc::SYS_statx,
    libc::SYS_fcntl,
    libc::SYS_flock,
    libc::SYS_dup,
    libc::SYS_unlink,
    libc::SYS_unlinkat,
    libc::SYS_readlink,
    libc::SYS_readlinkat,
    libc::SYS_getcwd,
    libc::SYS_getdents64,
    libc::SYS_fstatfs,
    libc::SYS_statfs,
    libc::SYS_memfd_create,
    // The plug and the console: UNIX sockets (see below), with descriptors.
    libc::SYS_connect,
    libc::SYS_accept4,
    libc::SYS_sendto,
    libc::SYS_recvfrom,
    libc::SYS_sendmsg,
    libc::SYS_recvmsg,
    libc::SYS_shutdown,
    libc::SYS_getsockopt,
    libc::SYS_setsockopt,
    libc::SYS_getsockname,
    libc::SYS_getpeername,
    // Waiting.
    libc::SYS_poll,
    libc::SYS_ppoll,
    libc::SYS_epoll_create1,
    libc::SYS_epoll_ctl,
    libc::SYS_epoll_wait,
    libc::SYS_epoll_pwait,
    libc::SYS_eventfd2,
    libc::SYS_pipe2,
    libc::SYS_futex,
    libc::SYS_nanosleep,
    libc::SYS_clock_nanosleep,
    libc::SYS_clock_gettime,
    libc::SYS_clock_getres,
    libc::SYS_gettimeofday,
    libc::SYS_restart_syscall,
    // Memory; what may be run is below.
    libc::SYS_munmap,
    libc::SYS_mremap,
    libc::SYS_madvise,
    libc::SYS_brk,
    libc::SYS_membarrier,
    // Threads and their signals. Clone3 is refused by the other filter, which must have the last word on it.
    libc::SYS_clone3,
    libc::SYS_gettid,
    libc::SYS_getpid,
    libc::SYS_tgkill,
    libc::SYS_rt_sigaction,
    libc::SYS_rt_sigprocmask,
    libc::SYS_rt_sigreturn,
    libc::SYS_sigaltstack,
    libc::SYS_set_robust_list,
    libc::SYS_rseq,
    libc::SYS_sched_yield,
    libc::SYS_sched_getaffinity,
    libc::SYS_prctl,
    libc::SYS_getrandom,
    libc::SYS_exit,
    libc::SYS_exit_group,
];

/// Requests of ioctl beside KVM's, whole: offloads of a TAP, blocking mode, a terminal's settings, what a block device is.
const REQUESTS: &[u64] = &[0x4004_54d0, 0x5421, 0x5401, 0x5402, 0x1277, 0x127d, 0x127f, 0x1268, 0x127b, 0x8008_1272];
/// The type of KVM's ioctls, in the request's second byte.
const KVM_TYPE: u64 = 0xae00;

fn allowed() -> Result<BTreeMap<i64, Vec<SeccompRule>>, seccompiler::BackendError> {
    let when = |index, length, compare, value| SeccompRule::new(vec![Condition::new(index, length, compare, value)?]);
    let mut rules: BTreeMap<i64, Vec<SeccompRule>> = CALLS.iter().map(|call| (*call, Vec::new())).collect();
    let unix = libc::AF_UNIX as u64;
    rules.insert(libc::SYS_socket, vec![when(0, Length::Dword, Compare::Eq, unix)?]);
    rules.insert(libc::SYS_socketpair, vec![when(0, Length::Dword, Compare::Eq, unix)?]);
    let mut requests = vec![when(1, Length::Dword, Compare::MaskedEq(0xff00), KVM_TYPE)?];
    for request in REQUESTS {
        requests.push(when(1, Length::Dword, Compare::Eq, *request)?);
    }
    rules.insert(libc::SYS_ioctl, requests);
    let executable = libc::PROT_EXEC as u64;
    for call in [libc::SYS_mmap, libc::SYS_mprotect] {
        rules.insert(call, vec![when(2, Length::Dword, Compare::MaskedEq(executable), 0)?]);
    }
    let thread = libc::CLONE_THREAD as u64;
    rules.insert(libc::SYS_clone, vec![when(0, Length::Qword, Compare::MaskedEq(thread), thread)?]);
    Ok(rules)
}

/// `path` made sure to be there, so that a rule can name it.
pub(super) fn touched(path: &Path) -> Result<PathBuf, String> {
    let opened = std::fs::OpenOptions::new().append(true).create(true).open(path);
    opened.map(|_| path.to_path_buf()).map_err(|error| format!("{} cannot be opened: {error}", path.display()))
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use std::fs::File;
    use std::io::Write as _;
    use std::net::{TcpListener, UdpSocket};
    use std::os::unix::net::UnixDatagram;

    #[test]
    fn a_fenced_thread_has_its_own_files_and_no_network() {
        let dir = tempfile::tempdir().unwrap();
        let (own, other) = (dir.path().join("own"), dir.path().join("other"));
        std::fs::write(&other, "secret").unwrap();
        let files = Files { read: Vec::new(), write: vec![touched(&own).unwrap()] };
        // Both fences of this thread alone, and refusals that can be looked at.
        let fenced = std::thread::spawn(move || {
            let landlocked = landlock(&files).unwrap().ruleset != RulesetStatus::NotEnforced;
            for program in programs(SeccompAction::Errno(libc::EPERM as u32)).unwrap() {
                seccompiler::apply_filter(&program).unwrap();
            }
            File::options().append(true).open(&own).unwrap().write_all(b"mine").unwrap();
            std::thread::spawn(|| {}).join().unwrap();
            assert!(UnixDatagram::unbound().is_ok());
            let denied = |error: std::io::Error| error.raw_os_error() == Some(libc::EPERM);
            assert!(denied(TcpListener::bind("127.0.0.1:0").unwrap_err()));
            assert!(denied(UdpSocket::bind("[::1]:0").unwrap_err()));
            assert!(std::process::Command::new("/bin/true").spawn().is_err(), "no other program");
            (landlocked, File::open(&other).is_err(), File::create(dir.path().join("new")).is_err())
        });
        let (landlocked, other, new) = fenced.join().unwrap();
        assert_eq!((other, new), (landlocked, landlocked), "no other file, where there is Landlock");
        assert!(File::open("/etc/passwd").is_ok(), "other threads are not fenced in");
    }
}
