//! Storage that both machines of the lab see: NFS 4.2 from alpha's memory at /srv/vm. What lies there is the caller's affair.

use crate::Result;
use crate::roce::{Machine, Machines};
use std::time::Duration;

/// Where both machines have it.
pub const SHARED: &str = "/srv/vm";
const LIMIT: Duration = Duration::from_secs(60);
const SCRIPT: &str = "/run/lab/share.sh";

/// Serves it from alpha and mounts it on both.
///
/// # Errors
/// A kernel module is missing, or the mount fails: what was said.
pub fn share(machines: &Machines) -> Result<()> {
    let (alpha, beta) = (machines.alpha(), machines.beta());
    let run = |machine: &Machine, words: &str| {
        machine.write_file(SCRIPT, include_bytes!("share.sh"))?;
        machine.shell(&format!("sh {SCRIPT} {words}"), LIMIT)
    };
    run(alpha, &format!("serve {} {}", alpha.ip, beta.ip))?;
    for machine in [alpha, beta] {
        run(machine, &format!("mount {} {}", alpha.ip, machine.ip))?;
    }
    Ok(())
}
