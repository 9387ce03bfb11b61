//! The scribbler passes the conformance test as a process, and VMMs that break a rule do not.
#![forbid(unsafe_code)]
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::print_stdout)]

use limosa_plug::conformance::{Options, check};
use limosa_plug::{DirtyBitmap, Ended, PlugError, PlugListener, Role, Token, Vmm, VmmDescription, VmmEvent, events, serve};
use limosa_proto::record::Record;
use limosa_proto::wire::message::VmDescription;
use std::os::unix::fs::PermissionsExt as _;
use std::os::unix::process::CommandExt as _;
use std::path::PathBuf;
use std::process::{Child, Command};
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

#[path = "../../../tests/rig/skip.rs"]
#[allow(unreachable_pub)]
mod skip;

#[path = "../examples/scribbler.rs"]
#[allow(dead_code, reason = "an example is used here as a module: its main is not called")]
mod scribbler;
use scribbler::Scribbler;

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
fn program() -> PathBuf {
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
        let child = Command::new(program()).arg(&path).arg(hex).arg(role).spawn();
        children.0.push(child.map_err(|error| format!("{}: {error}", program().display()))?);
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

/// Rules that a VMM may break.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Fault {
    None,
    ForgetsDirtyPages,
    RunsOnWhenPaused,
    LoadsAnything,
    StaysEmpty,
    RunsBeforeItIsTold,
    ListsOtherRecords,
}

/// A scribbler that breaks one of them.
struct Faulty {
    inner: Scribbler,
    fault: Fault,
    fetches: u32,
}

impl Vmm for Faulty {
    fn describe(&mut self) -> Result<VmmDescription, String> {
        let mut described = self.inner.describe()?;
        if self.fault == Fault::ListsOtherRecords {
            described.description.records = vec![(9, 9)];
        }
        Ok(described)
    }
    fn prepare(&mut self, description: &VmDescription, bridges: &[(String, String)]) -> Result<VmmDescription, String> {
        self.inner.prepare(description, bridges)
    }
    fn track(&mut self, on: bool) -> Result<(), String> {
        self.inner.track(on)
    }
    fn fetch_dirty(&mut self, into: &DirtyBitmap) -> Result<(), String> {
        self.inner.fetch_dirty(into)?;
        self.fetches += 1;
        if self.fault == Fault::ForgetsDirtyPages && self.fetches.is_multiple_of(2) {
            into.clear();
        }
        Ok(())
    }
    fn pause(&mut self) -> Result<(), String> {
        if self.fault == Fault::RunsOnWhenPaused { Ok(()) } else { self.inner.pause() }
    }
    fn save(&mut self) -> Result<Vec<Record>, String> {
        self.inner.save()
    }
    fn load(&mut self, state: Vec<Record>) -> Result<(), String> {
        if self.fault == Fault::RunsBeforeItIsTold && state.len() == 1 && state[0].kind == 1 {
            self.inner.load(state)?;
            return self.inner.resume();
        }
        if self.fault == Fault::LoadsAnything { Ok(()) } else { self.inner.load(state) }
    }
    fn resume(&mut self) -> Result<(), String> {
        if self.fault == Fault::StaysEmpty { Ok(()) } else { self.inner.resume() }
    }
    fn throttle(&mut self, percent: u8) -> Result<(), String> {
        self.inner.throttle(percent)
    }
    fn release(&mut self) -> Result<(), String> {
        self.inner.release()
    }
    fn discard(&mut self) -> Result<(), String> {
        self.inner.discard()
    }
    fn shutdown(&mut self) -> Result<(), String> {
        self.inner.shutdown()
    }
}

/// Runs the kit against faulty scribblers on threads of this process.
fn check_faulty(fault: Fault) -> Result<Vec<String>, String> {
    let path = socket_path();
    let listener = PlugListener::bind(&path).unwrap();
    let (mut threads, mut senders) = (Vec::new(), Vec::new());
    let mut launch = |role: Role, token: Token| {
        let mut inner = Scribbler::new();
        if role == Role::Running {
            inner.start()?;
        }
        let options = inner.options(path.to_str().unwrap(), token);
        let (sender, receiver) = events().unwrap();
        senders.push(sender);
        threads.push(std::thread::spawn(move || {
            let mut vmm = Faulty { inner, fault, fetches: 0 };
            let ended = serve(&options, &mut vmm, &receiver);
            vmm.shutdown().unwrap();
            ended
        }));
        Ok(())
    };
    let options = Options { write_time_max: Duration::from_millis(1500), lonely: false, ..Options::default() };
    let result = check(&listener, &mut launch, &options);
    senders.iter().for_each(|sender| sender.send(VmmEvent::Leave));
    for thread in threads {
        let ended = thread.join().unwrap().unwrap();
        if result.is_ok() {
            assert!(matches!(ended, Ended::Released | Ended::Shutdown), "{ended:?}");
        }
    }
    result
}

#[test]
fn a_vmm_that_breaks_a_rule_is_found_out() {
    check_faulty(Fault::None).unwrap();
    // One that runs on is caught by the first look that catches it in the act: at the dirty pages or at the pause.
    let faults = [
        (Fault::ForgetsDirtyPages, "were written and not named as dirty"),
        (Fault::RunsOnWhenPaused, ""),
        (Fault::LoadsAnything, "device state of an unknown kind"),
        (Fault::StaysEmpty, "the guest wrote nothing"),
        (Fault::RunsBeforeItIsTold, "the loaded guest ran before it was told to"),
        (Fault::ListsOtherRecords, "is not among the kinds that Describe lists"),
    ];
    std::thread::scope(|scope| {
        for (fault, expected) in faults {
            scope.spawn(move || {
                let words = check_faulty(fault).expect_err("a fault was not found");
                let runs_on = fault == Fault::RunsOnWhenPaused
                    && (words.contains("not named as dirty") || words.contains("memory changed while the guest was paused"));
                assert!(runs_on || !expected.is_empty() && words.contains(expected), "{fault:?} was found out as: {words}");
            });
        }
    });
}

/// Needs root, to become somebody else.
#[test]
fn another_user_is_not_let_in() {
    if !nix::unistd::geteuid().is_root() {
        return skip::skip("becoming another user needs root");
    }
    let path = socket_path();
    let listener = PlugListener::bind(&path).unwrap();
    // The mode alone keeps others out; here it is opened, so that the second bar is what is tested.
    std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o666)).unwrap();
    // A copy, since the build's folder need not be open to others.
    let copy = path.with_extension("exe");
    std::fs::copy(program(), &copy).unwrap();
    let child = Command::new(&copy).arg(&path).arg("00").arg("running").uid(65534).gid(65534).spawn();
    let mut children = Children(vec![child.unwrap()]);
    let error = listener.accept(Duration::from_secs(5)).unwrap_err();
    assert!(matches!(error, PlugError::NotAllowed { uid: 65534, .. }), "{error}");
    children.0[0].kill().unwrap();
    std::fs::remove_file(copy).unwrap();
}
