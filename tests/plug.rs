//! The plug's conformance kit on real VMMs: `limosa vmm` on KVM, and the example VMM that has no KVM.
#![allow(clippy::panic, clippy::unwrap_used, clippy::expect_used, missing_docs, unreachable_pub)]

use limosa_plug::conformance::{self, Options};
use limosa_plug::{PlugListener, Role, Token};
use rig::process::{Process, cargo_build, limosa_bin};
use rig::{Context, GuestSpec, Result, ensure, guest_images, with_bare_lab};
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Duration;

fn hex(token: &Token) -> String {
    token.0.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// Runs the kit; `vmm` makes the command that starts a VMM in a role. Afterwards every VMM has ended by itself.
fn conforms(socket: &Path, options: &Options, mut vmm: impl FnMut(Role, &Token) -> Result<Command>) -> Result<()> {
    let listener = PlugListener::bind(socket).map_err(|e| rig::Error::msg(e.to_string()))?;
    let mut started = Vec::new();
    let mut launch = |role: Role, token: Token| -> Result<(), String> {
        let mut command = vmm(role, &token).map_err(|e| format!("{e:#}"))?;
        let process = Process::start("a VMM", command.stdout(Stdio::null())).map_err(|e| format!("{e:#}"))?;
        started.push(process);
        Ok(())
    };
    let passed = conformance::check(&listener, &mut launch, options).map_err(rig::Error::msg)?;
    ensure!(passed.len() >= 10, "the kit checked too little: {passed:#?}");
    for process in &mut started {
        process.wait(Duration::from_secs(20)).context("a VMM that was told to end")?;
    }
    Ok(())
}

#[test]
fn limosa_vmm_conforms() {
    with_bare_lab(|lab| {
        let guest = GuestSpec::new("tested", 1).dirty("20M", "16M").memory("64M", "8M");
        let config = lab.a.file("tested.toml");
        std::fs::write(&config, guest.text(&guest_images()?.elf))?;
        let socket = lab.a.file("plug.sock");
        let options = Options { bridges: vec![("lan".into(), "br0".into())], ..Options::default() };
        conforms(&socket, &options, |role, token| {
            // Each on a host of its own: the name of a TAP is made from the guest's id.
            let host = if role == Role::Incoming { &lab.b } else { &lab.a };
            let mut command = host.netns.command(limosa_bin()?);
            command.arg("vmm").arg("--plug").arg(&socket).args(["--token", &hex(token)]);
            match role {
                Role::Running => command.arg("--config").arg(&config).args(["--bridge", "lan=br0"]),
                Role::Incoming => command.arg("--incoming"),
            };
            Ok(command)
        })?;
        lab.settled(&lab.a, 0)?;
        lab.settled(&lab.b, 0)
    });
}

#[test]
fn the_scribbler_conforms() -> Result<()> {
    let dir = tempfile::tempdir()?;
    let socket = dir.path().join("plug.sock");
    let binary = cargo_build(&["-p", "limosa-plug", "--example", "scribbler"], "examples/scribbler")?;
    conforms(&socket, &Options::default(), |role, token| {
        let mut command = Command::new(&binary);
        command.arg(&socket).arg(hex(token)).arg(if role == Role::Incoming { "incoming" } else { "running" });
        Ok(command)
    })
}
