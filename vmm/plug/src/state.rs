//! The states of a plugged VMM, and which request is allowed in which.
//! It carries nothing out; `vmm_side` does.

use crate::message::Kind;

/// What a VMM and its guest are doing, as far as the plug cares.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[repr(u8)]
pub enum VmState {
    /// The guest runs.
    Running = 1,
    /// The guest is stopped for the agent's sake and only the agent's word lets it go on.
    Paused = 2,
    /// Incoming, and no machine has been built yet.
    Waiting = 3,
    /// Incoming: the machine is built, its memory is being filled by the agent.
    Prepared = 4,
    /// Incoming: device state is loaded; it runs when the agent says so.
    Loaded = 5,
}

impl VmState {
    /// The state of this number on the wire.
    #[must_use]
    pub fn from_number(number: u8) -> Option<VmState> {
        match number {
            1 => Some(VmState::Running),
            2 => Some(VmState::Paused),
            3 => Some(VmState::Waiting),
            4 => Some(VmState::Prepared),
            5 => Some(VmState::Loaded),
            _ => None,
        }
    }

    /// Whether the guest has never run in this VMM.
    #[must_use]
    pub fn is_incoming(self) -> bool {
        matches!(self, VmState::Waiting | VmState::Prepared | VmState::Loaded)
    }

    /// The state in words.
    #[must_use]
    pub fn words(self) -> &'static str {
        match self {
            VmState::Running => "running",
            VmState::Paused => "paused",
            VmState::Waiting => "waiting for a guest",
            VmState::Prepared => "prepared, without device state",
            VmState::Loaded => "loaded, not yet running",
        }
    }
}

/// Whether a request of `kind` may be carried out in `state`.
///
/// # Errors
/// Words that say what the request needs and what is.
pub fn permit(kind: Kind, state: VmState, tracking: bool) -> Result<(), String> {
    use VmState::{Loaded, Paused, Prepared, Running};
    let (allowed, needs) = match kind {
        Kind::Describe => (state != VmState::Waiting, "a machine that has been built"),
        Kind::Prepare => (state == VmState::Waiting, "an incoming VMM that has not been prepared"),
        Kind::Track | Kind::Throttle => (matches!(state, Running | Paused), "a guest that runs or is paused"),
        Kind::FetchDirty => (matches!(state, Running | Paused) && tracking, "dirty tracking to be on"),
        Kind::Pause => (state == Running, "a running guest"),
        Kind::Save => (state == Paused, "a paused guest"),
        Kind::Load => (state == Prepared, "an incoming VMM that is prepared and not yet loaded"),
        Kind::Resume => (matches!(state, Paused | Loaded), "a paused or loaded guest"),
        Kind::Release => (state == Paused, "a paused guest, since it must not run on here"),
        Kind::Yield => (state == Paused, "a paused guest, since it goes on without what it gives up"),
        Kind::Discard => (state.is_incoming(), "an incoming VMM whose guest never ran"),
        Kind::Shutdown | Kind::Status => (true, ""),
        Kind::Hello | Kind::Welcome | Kind::Reject | Kind::GuestStopped => (false, "no such request: it is no request"),
    };
    if allowed {
        return Ok(());
    }
    let tracking = if tracking { "on" } else { "off" };
    Err(format!("{} needs {needs}; this VMM is {} with tracking {tracking}", kind.words(), state.words()))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The whole table: for each request, in which states it is allowed (with tracking on).
    #[test]
    fn the_table_of_requests_and_states() {
        let states = [VmState::Running, VmState::Paused, VmState::Waiting, VmState::Prepared, VmState::Loaded];
        let table: Vec<String> = Kind::REQUESTS
            .iter()
            .map(|kind| {
                let row: String =
                    states.iter().map(|state| if permit(*kind, *state, true).is_ok() { '+' } else { '-' }).collect();
                format!("{} {row}", kind.words())
            })
            .collect();
        let expected = [
            "Describe ++-++",
            "Prepare --+--",
            "Track ++---",
            "FetchDirty ++---",
            "Pause +----",
            "Save -+---",
            "Load ---+-",
            "Resume -+--+",
            "Throttle ++---",
            "Release -+---",
            "Discard --+++",
            "Shutdown +++++",
            "Status +++++",
            "Yield -+---",
        ];
        assert_eq!(table, expected);
        let words = permit(Kind::FetchDirty, VmState::Running, false);
        assert_eq!(words, Err("FetchDirty needs dirty tracking to be on; this VMM is running with tracking off".to_owned()));
    }
}
