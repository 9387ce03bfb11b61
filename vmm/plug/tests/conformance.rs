//! The scribbler passes the conformance test as a process, and VMMs that break a rule do not.
#![forbid(unsafe_code)]
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::print_stdout)]

use limosa_plug::conformance::{Options, check};
use limosa_plug::{PlugListener, Role, Token};
use std::path::PathBuf;
use std::process::{Child, Command};
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

/// Kills what a test started, also when it fails.
#[derive(Default)]
struct Children(Vec<Child>);

impl Children {
    /// Waits for all to end by themselves.
    fn reap(&mut self) -> Vec<bool> {
        let end = Instant::now() + Duration::from_secs(10);
        while Instant::now() < end && self.0.iter_mut().any(|child| child.try_wait().unwrap().is_none()) {
            std::thread::sleep(Duration::from_millis(20));
        }
        self.0.iter_mut().map(|child| child.try_wait().unwrap().is_some_and(|status| status.success())).collect()
    }
}

impl Drop for Children {
    fn drop(&mut self) {
        for child in &mut self.0 {
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}

fn socket_path() -> PathBuf {
    static COUNTER: AtomicU32 = AtomicU32::new(0);
    let number = COUNTER.fetch_add(1, Ordering::Relaxed);
    std::env::temp_dir().join(format!("limosa-plug-test-{}-{number}.sock", std::process::id()))
}

/// Cargo builds examples beside the tests of the same crate.
fn scribbler() -> PathBuf {
    let deps = std::env::current_exe().unwrap();
    deps.parent().unwrap().parent().unwrap().join("examples/scribbler")
}

#[test]
fn the_scribbler_conforms() {
    let path = socket_path();
    let listener = PlugListener::bind(&path).unwrap();
    let mut children = Children::default();
    let mut launch = |role: Role, token: Token| {
        let hex: String = token.0.iter().map(|byte| format!("{byte:02x}")).collect();
        let role = if role == Role::Running { "running" } else { "incoming" };
        let child = Command::new(scribbler()).arg(&path).arg(hex).arg(role).spawn();
        children.0.push(child.map_err(|error| format!("{}: {error}", scribbler().display()))?);
        Ok(())
    };
    let passed = check(&listener, &mut launch, &Options::default()).unwrap_or_else(|words| panic!("{words}"));
    for line in &passed {
        println!("{line}");
    }
    assert!(passed.len() >= 12, "{passed:#?}");
    assert!(children.reap().into_iter().all(|good| good), "a VMM was told to end and did not, or failed");
    drop(listener);
    assert!(!path.exists());
}
