//! What the tests and benchmarks of Limosa stand on: labs of network namespaces with hosts, agents and guests, probes,
//! captures, processes. It starts binaries and looks at them from outside; it links none of Limosa but the protocol's types.
#![forbid(unsafe_code)]

pub mod announced;
pub mod capture;
pub mod command;
pub mod flood;
pub mod guest;
pub mod host;
pub mod lab;
pub mod linux;
pub mod net;
pub mod netns;
pub mod operator;
pub mod points;
pub mod process;
pub mod qemu;
pub mod roce;
pub mod skip;
pub mod spec;

pub use anyhow::{Context, Error, Result, bail, ensure};
pub use host::{AgentConfig, Host};
pub use lab::{Lab, with_bare_lab, with_lab};
pub use skip::skip;
pub use spec::GuestSpec;

use guest::GuestImages;
use std::sync::OnceLock;

/// The guest's images, built once per test process into the target folder.
pub fn guest_images() -> Result<GuestImages> {
    static IMAGES: OnceLock<GuestImages> = OnceLock::new();
    if let Some(images) = IMAGES.get() {
        return Ok(images.clone());
    }
    let _lock = process::lock("rig-guest")?;
    let images = guest::build(&process::target_dir()?.join("rig-guest"))?;
    Ok(IMAGES.get_or_init(|| images).clone())
}
