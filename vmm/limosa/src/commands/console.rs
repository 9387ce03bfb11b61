//! `limosa vm console VM`: this terminal on the guest's serial line. The line itself is the VMM's (`vmm/console`).

use super::{Context, Ended, strange};
use crate::output;
use limosa_agent::api::{Answer, ApiError, Request, exit};
use nix::sys::termios::{SetArg, Termios, cfmakeraw, tcgetattr, tcsetattr};
use std::io::{IsTerminal as _, Read as _, Stdin, Write as _};
use std::os::unix::net::UnixStream;

/// Ctrl-], as telnet and virsh have it.
const LEAVE: u8 = 0x1d;

pub(crate) fn run(context: &Context, vm: String) -> Ended {
    let path = match context.ask(&Request::VmShow { vm: vm.clone() })? {
        Answer::Vm(info) => info.console,
        other => return Err(strange(&other)),
    };
    let path = path.ok_or_else(|| ApiError::refused("no-console", format!("the VMM of {vm} has no console here")))?;
    let failed = |error: std::io::Error| {
        ApiError::refused("no-console", format!("the console {} cannot be used: {error}", path.display()))
    };
    let line = UnixStream::connect(&path).map_err(failed)?;
    let stdin = std::io::stdin();
    let raw = Raw::begin(&stdin);
    if raw.is_some() {
        output::note(format!("console of {vm}; Ctrl-] leaves it\r"));
    }
    let mut typed = line.try_clone().map_err(failed)?;
    let on_terminal = raw.is_some();
    std::thread::spawn(move || {
        let mut bytes = [0; 256];
        while let Ok(count @ 1..) = std::io::stdin().read(&mut bytes) {
            let typing = bytes.get(..count).unwrap_or_default();
            let leave = typing.iter().position(|byte| on_terminal && *byte == LEAVE);
            let sent = typed.write_all(typing.get(..leave.unwrap_or(count)).unwrap_or_default());
            if leave.is_some() || sent.is_err() {
                let _ = typed.shutdown(std::net::Shutdown::Both);
                return;
            }
        }
    });
    show(&line);
    drop(raw);
    output::note(format!("the console of {vm} is closed: it was left, or the guest left this host or stopped"));
    Ok(exit::DONE)
}

/// Shows what the guest writes until the line is closed.
fn show(line: &UnixStream) {
    let (mut line, mut out) = (line, std::io::stdout());
    let mut bytes = [0; 4096];
    while let Ok(count @ 1..) = line.read(&mut bytes) {
        let shown = out.write_all(bytes.get(..count).unwrap_or_default()).and_then(|()| out.flush());
        if shown.is_err() {
            return;
        }
    }
}

/// The terminal in raw mode, as it was before when this is dropped.
pub(crate) struct Raw(Termios);

impl Raw {
    /// None if standard input is no terminal.
    pub(crate) fn begin(stdin: &Stdin) -> Option<Raw> {
        if !stdin.is_terminal() {
            return None;
        }
        let before = tcgetattr(stdin).ok()?;
        let mut raw = before.clone();
        cfmakeraw(&mut raw);
        tcsetattr(stdin, SetArg::TCSANOW, &raw).ok()?;
        Some(Raw(before))
    }
}

impl Drop for Raw {
    fn drop(&mut self) {
        // The terminal may be gone; then there is nothing to set.
        let _ = tcsetattr(std::io::stdin(), SetArg::TCSANOW, &self.0);
    }
}
