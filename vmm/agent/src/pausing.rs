//! Guests that their operators pause and let run on, and guests brought to what their operators want.
//! Whether an operator holds a guest is remembered by its VMM alone, which outlives agents. Whose a guest is, is `settle`'s.

use crate::agent::Agent;
use crate::api::ApiError;
use crate::incoming;
use crate::outgoing::{host_error, resume};
use crate::vm::{Vm, VmState};
use limosa_link::HostError;
use limosa_plug::{PlugError, VmState as Plugged};
use std::sync::Arc;
use std::time::Duration;

/// How long a VMM that has lost its connection may take to come back before the command is given up.
const REPLUG_MAX: Duration = Duration::from_secs(3);

/// Holds the guest of `vm`: it stands still until its operator says otherwise. One that is loaded is this host's then.
pub(crate) fn hold(vm: &Vm, patience: Duration) -> Result<(), HostError> {
    let connection = vm.connection_within(patience).map_err(HostError::new)?;
    let held = connection.hold();
    if !held.as_ref().is_err_and(PlugError::is_undone) {
        vm.set_may_have_run(true);
    }
    match held {
        Ok(_) => {}
        Err(error @ PlugError::Refused { .. }) => return Err(host_error(error)),
        // After a lost answer the order may already have been carried out.
        Err(error) => match connection.status() {
            Ok(status) if status.state == Plugged::Paused && status.held => {}
            _ => return Err(host_error(error)),
        },
    }
    Ok(())
}

/// Lets a guest that is this host's be as its operator wants it: running, or held.
pub(crate) fn take_up(vm: &Vm, patience: Duration) -> Result<(), HostError> {
    let status = vm.connection_within(patience).map_err(HostError::new)?.status().map_err(host_error)?;
    if !status.held {
        return resume(vm, patience);
    }
    hold(vm, patience)?;
    vm.set_state(VmState::Held);
    Ok(())
}

/// `limosa vm pause`: gives what was done, in words.
pub(crate) fn pause(agent: &Agent, name: &str) -> Result<String, ApiError> {
    let claim = agent.vms.claim(name, "pausing")?;
    let vm = claim.vm();
    if vm.state() == VmState::Held {
        return Ok(format!("{name} is paused already"));
    }
    hold(vm, REPLUG_MAX).map_err(|error| ApiError::refused("vmm-failed", format!("{name} cannot be paused: {error}")))?;
    vm.set_state(VmState::Held);
    tracing::info!(vm = name, "paused by its operator");
    Ok(format!("{name} is paused; `limosa vm resume {name}` lets it run on"))
}

/// `limosa vm resume`: gives what was done, in words.
pub(crate) fn run_on(agent: &Agent, name: &str) -> Result<String, ApiError> {
    let claim = agent.vms.claim(name, "resuming")?;
    let vm = claim.vm();
    if vm.state() == VmState::Running {
        return Ok(format!("{name} runs already"));
    }
    resume(vm, REPLUG_MAX).map_err(|error| ApiError::refused("vmm-failed", format!("{name} cannot be resumed: {error}")))?;
    tracing::info!(vm = name, "resumed by its operator");
    // It may have come here while it stood still, and then nobody was told.
    tell(agent, vm);
    Ok(format!("{name} runs"))
}

/// Tells the network where a guest is that has begun to run here.
pub(crate) fn tell(agent: &Agent, vm: &Vm) -> Vec<String> {
    let Some(description) = vm.description() else { return Vec::new() };
    incoming::announce(agent, &description, Arc::default(), |_| {}).unwrap_or_else(|error| {
        tracing::warn!(vm = vm.name, %error, "the guest could not be announced; `limosa announce` repeats it");
        Vec::new()
    })
}
