//! `limosa vmm`: one guest in this process, plugged into the host's agent or on its own.
//! It has no network socket of its own, its TAPs apart, and knows no other host.

mod build;
mod console;
mod cpu;
mod plugged;
pub(crate) mod sandbox;

use crate::args::VmmArgs;
use crate::commands::Ended as Exit;
use crate::commands::console::Raw;
use crate::output;
use console::Console;
use limosa_agent::api::{ApiError, exit};
use limosa_agent::vm_config::VmConfig;
use limosa_plug::{Ended, EventSender, ServeOptions, Token, VmState, events, serve};
use limosa_proto::identity::VmId;
use nix::sys::resource::{Resource, setrlimit};
use nix::sys::signal::{SigSet, Signal};
use plugged::{Plugged, Running};
use ring::rand::SecureRandom as _;
use std::io::Read as _;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

/// An incoming VMM without an agent is of no use for longer.
const AGENT_WAIT_MAX: Duration = Duration::from_secs(20);

pub(crate) fn run(args: &VmmArgs) -> Exit {
    if args.print_cpu {
        let host = cpu::Host::ask().map_err(|words| ApiError::refused("cpu", words))?;
        output::json(&host.told());
        return Ok(exit::DONE);
    }
    // The agent is not dumpable at all; a VMM stays so, because others on this host look up who holds an image.
    setrlimit(Resource::RLIMIT_CORE, 0, 0)
        .map_err(|error| ApiError::refused("vmm", format!("core dumps cannot be switched off: {error}")))?;
    if args.plug.is_some() {
        outlive_the_agent().map_err(|error| ApiError::refused("vmm", format!("SIGHUP cannot be blocked: {error}")))?;
    }
    let token = token(args.token.as_deref())?;
    let path = args.console.as_deref();
    let console = path.map(|path| {
        let failed = |e| ApiError::refused("console", format!("the console's socket {} cannot be made: {e}", path.display()));
        Console::listen(path).map_err(failed)
    });
    let console = console.transpose()?;
    let ended = run_with(args, token, console);
    if let Some(path) = path {
        // The agent may have been quicker.
        let _ = std::fs::remove_file(path);
    }
    ended
}

/// When an agent dies, the kernel sends SIGHUP to a VMM of it that stands still at that moment (its process group has become an
/// orphaned one with a stopped member), and that would be the guest's end. Blocked before there is another thread: all inherit it.
fn outlive_the_agent() -> nix::Result<()> {
    let mut hangup = SigSet::empty();
    hangup.add(Signal::SIGHUP);
    hangup.thread_block()
}

fn run_with(args: &VmmArgs, token: Token, console: Option<Console>) -> Exit {
    let Some(file) = &args.config else {
        let socket = args.plug.clone().ok_or_else(|| ApiError::usage("plug", "--incoming needs --plug"))?;
        return incoming(socket, token, (console, !args.no_sandbox));
    };
    let (config, text) = VmConfig::load(file).map_err(|e| ApiError::usage("configuration", e.to_string()))?;
    let id = random_id()?;
    let failed = |words: String| ApiError::refused("vmm", format!("guest {}: {words}", config.name));
    build::check_disks(&config).map_err(failed)?;
    let limit = args.cpu_limit.as_deref().map(cpu::read_limit).transpose().map_err(failed)?;
    let guest = cpu::Host::ask().and_then(|host| host.starting(&config, limit.as_ref())).map_err(failed)?;
    let running =
        Running::build(&config, id, &text, &args.bridge, config.populate, guest, (console, !args.no_sandbox)).map_err(failed)?;
    build::boot(&running.machine, &config).map_err(failed)?;
    running.machine.resume().map_err(|e| failed(build::words(&e)))?;
    tracing::info!(vm = config.name, %id, memory = config.memory, vcpus = config.vcpus, "the guest runs");
    match &args.plug {
        None => alone(running),
        Some(socket) => {
            let options = ServeOptions {
                socket: socket.clone(),
                token,
                id,
                name: config.name,
                state: VmState::Running,
                first_contact_time_max: None,
            };
            plug_in(&options, Some(running), (None, false))
        }
    }
}

fn incoming(socket: PathBuf, token: Token, expected: (Option<Console>, bool)) -> Exit {
    let options = ServeOptions {
        socket,
        token,
        id: VmId([0; 16]),
        name: String::new(),
        state: VmState::Waiting,
        first_contact_time_max: Some(AGENT_WAIT_MAX),
    };
    plug_in(&options, None, expected)
}

fn plug_in(options: &ServeOptions, running: Option<Running>, expected: (Option<Console>, bool)) -> Exit {
    let failed = |words: String| ApiError::refused("plug", words);
    let (sender, receiver): (EventSender, _) = events().map_err(|e| failed(e.to_string()))?;
    // Kept until `serve` returns: when every sender is gone it would end.
    let keep = sender.clone();
    let mut plugged = Plugged::new(running, sender, expected);
    let ended = serve(options, &mut plugged, &receiver).map_err(|e| failed(e.to_string()))?;
    drop(keep);
    match ended {
        Ended::Rejected(words) => Err(failed(format!("the agent does not let this guest in: {words}"))),
        Ended::NoAgent(words) => Err(failed(format!("no agent: {words}"))),
        ended => {
            tracing::info!(?ended, "the VMM ends");
            Ok(exit::DONE)
        }
    }
}

/// Runs the guest without an agent until it stops.
fn alone(running: Running) -> Exit {
    let stdin = std::io::stdin();
    // Where the serial line is on this terminal, what is typed here goes to the guest.
    let raw = Raw::begin(&stdin);
    if raw.is_some() {
        let machine = Arc::downgrade(&running.machine);
        std::thread::spawn(move || {
            let mut bytes = [0; 64];
            while let Ok(count @ 1..) = std::io::stdin().read(&mut bytes) {
                let Some(machine) = machine.upgrade() else { return };
                // What a guest that does not read has no room for is lost, as on a serial line.
                machine.serial_input(bytes.get(..count).unwrap_or_default());
            }
        });
    }
    let words = plugged::stopped(&Arc::downgrade(&running.machine)).unwrap_or_default();
    tracing::info!(words, "the guest stopped");
    Ok(exit::DONE)
}

fn random_id() -> Result<VmId, ApiError> {
    let mut id = [0; 16];
    ring::rand::SystemRandom::new()
        .fill(&mut id)
        .map_err(|_| ApiError::refused("random", "the system gives no random numbers"))?;
    Ok(VmId(id))
}

/// The launch token: 32 hexadecimal digits; zeros if there is none.
fn token(text: Option<&str>) -> Result<Token, ApiError> {
    let Some(text) = text else { return Ok(Token::default()) };
    // A VM's id has the same form.
    let id: VmId = text.parse().map_err(|_| ApiError::usage("token", "--token should be 32 hexadecimal digits"))?;
    Ok(Token(id.0))
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn tokens_are_hexadecimal() {
        assert_eq!(token(None).unwrap(), Token([0; 16]));
        assert_eq!(token(Some("0102030405060708090a0b0c0d0e0f10")).unwrap().0[15], 16);
        assert_eq!(token(Some("zz")).unwrap_err().exit, 2);
        assert_ne!(random_id().unwrap(), random_id().unwrap());
    }
}
