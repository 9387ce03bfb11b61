//! Which process each guest's VMM is, noted in a file, so that a restarted agent can tell whether it lives though it has not plugged
//! in: of such a guest nothing is decided, and it is not let in beside that VMM. What is decided is `limosa_proto::recovery`'s.

use crate::agent::Agent;
use crate::process::{birth, is_alive};
use limosa_proto::identity::VmId;
use limosa_proto::recovery;
use limosa_proto::wire::code::Code;
use limosa_proto::wire::message::Refusal;
use std::path::PathBuf;

/// Waits until a VMM that was here when this agent started had time to plug in: its guest is not let in beside it, and not either
/// as long as a VMM of it lives that does not plug in.
pub(crate) fn await_vmm(agent: &Agent, vm: VmId) -> Result<(), Refusal> {
    if agent.vms.with_id(vm).is_some() {
        return Ok(());
    }
    let records = agent.journal().of_guest(vm);
    std::thread::sleep(recovery::wait_before_admitting(&records, lives(agent, vm), agent.since_start()));
    let silent = agent.vms.with_id(vm).is_none();
    match process_of(agent, vm).filter(|(pid, born)| silent && is_alive(*pid, *born)) {
        None => Ok(()),
        Some((pid, _)) => {
            let words = format!(
                "an earlier VMM of this guest lives at the destination (process {pid}) and has not plugged in to its agent: \
                 the guest is not let in beside it; try again when it has, or when that process has ended"
            );
            Err(Refusal::one(Code::Busy, words))
        }
    }
}

fn file_of(agent: &Agent, vm: VmId) -> PathBuf {
    agent.config.state_dir.join("vm").join(format!("{vm}.process"))
}

/// Remembers which process a guest's VMM is, so that a restarted agent can tell whether it lives.
pub(crate) fn remember(agent: &Agent, vm: VmId, pid: u32) {
    let written = std::fs::write(file_of(agent, vm), format!("{pid} {}", birth(pid).unwrap_or(0)));
    if let Err(error) = written {
        tracing::warn!(%vm, %error, "the VMM's process cannot be noted");
    }
}

/// The guest is settled: a process that has ended need not be remembered. One that lives is: its guest is not let in beside it.
pub(crate) fn forget(agent: &Agent, vm: VmId) {
    if !lives(agent, vm) {
        // It may never have been noted.
        let _ = std::fs::remove_file(file_of(agent, vm));
    }
}

/// Forgets what was noted of VMMs that have ended, in this agent's time or before.
pub(crate) fn forget_ended(agent: &Agent) {
    let noted = std::fs::read_dir(agent.config.state_dir.join("vm")).into_iter().flatten().flatten();
    for path in noted.map(|entry| entry.path()).filter(|path| path.extension().is_some_and(|is| is == "process")) {
        if let Some(vm) = path.file_stem().and_then(|stem| stem.to_str()?.parse().ok()) {
            forget(agent, vm);
        }
    }
}

/// The process that was noted for a guest's VMM, and its birth.
fn process_of(agent: &Agent, vm: VmId) -> Option<(u32, u64)> {
    let text = std::fs::read_to_string(file_of(agent, vm)).unwrap_or_default();
    let mut fields = text.split_whitespace().map(str::parse::<u64>);
    let (Some(Ok(pid)), Some(Ok(born))) = (fields.next(), fields.next()) else { return None };
    Some((u32::try_from(pid).ok()?, born))
}

pub(crate) fn lives(agent: &Agent, vm: VmId) -> bool {
    process_of(agent, vm).is_some_and(|(pid, born)| is_alive(pid, born))
}
