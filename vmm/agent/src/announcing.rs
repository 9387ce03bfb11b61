//! Telling the network where a guest is: which frames for which NIC on which bridge, and when.
//! The frames and sockets are `limosa_announce`'s. It runs after a commit, never before.

use crate::config::Config;
use crate::vm_config::tap_name;
use limosa_announce::{Announcer, Nic, Questions, Schedule, Sent};
use limosa_proto::wire::message::{Reached, VmDescription};
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, mpsc};
use std::time::{Duration, Instant};

/// The NICs of `vm` as they are on this host.
#[must_use]
pub(crate) fn nics(config: &Config, vm: &VmDescription) -> Vec<Nic> {
    let mut nics = Vec::new();
    for (index, nic) in vm.nics.iter().enumerate() {
        let Some(network) = config.network(&nic.network) else { continue };
        let tap = tap_name(vm.id, index);
        // Another VMM than ours may call its TAP otherwise; then the bridge learns from the guest itself.
        let port = Path::new("/sys/class/net").join(&tap).exists().then_some(tap);
        nics.push(Nic {
            mac: nic.mac,
            vlan: nic.vlan.or(network.vlan),
            addresses: nic.addresses.clone(),
            interface: network.bridge.clone(),
            port,
            ..Nic::default()
        });
    }
    nics
}

/// How long a guest is asked whether it answers before that is given up; the source waits for it with its report.
const REACH_MAX: Duration = Duration::from_secs(2);

/// What will be asked of a guest once it runs here, by the first card of which an address is known; or why nothing can be.
pub(crate) fn questions(nics: &[Nic]) -> Result<Questions, String> {
    let nic = nics.iter().find(|nic| !nic.addresses.is_empty());
    nic.ok_or("no address of the guest is known; `addresses` of its NIC names them".to_owned()).and_then(Questions::prepare)
}

/// Begins to ask a guest from this host whether it answers, since it was resumed, on a thread of its own. What is returned gets
/// the first answer, or why there is none, after [`REACH_MAX`] at the latest.
pub(crate) fn ask(questions: Result<Questions, String>, resumed: Instant) -> mpsc::Receiver<Reached> {
    let (sender, answer) = mpsc::channel();
    let run = move || {
        // Gone is who waited when the source's patience ended.
        let _ = sender.send(asked(questions, resumed));
    };
    if let Err(error) = std::thread::Builder::new().name("reach".into()).spawn(run) {
        tracing::warn!(%error, "the guest is not asked whether it answers: no thread");
    }
    answer
}

fn asked(questions: Result<Questions, String>, resumed: Instant) -> Reached {
    let reached = questions.and_then(|questions| {
        let reached = questions.ask(REACH_MAX)?;
        Ok((reached.at, limosa_announce::reach_words(questions.nic(), reached.address)))
    });
    match reached {
        Ok((at, words)) => {
            let after = at.saturating_duration_since(resumed);
            Reached { after_us: Some(u64::try_from(after.as_micros()).unwrap_or(u64::MAX)), words }
        }
        Err(words) => Reached { after_us: None, words },
    }
}

/// What was sent, one line per frame, for reports.
#[must_use]
pub(crate) fn words(sent: &Sent) -> Vec<String> {
    let mut words = Vec::new();
    let after = sent.after.as_millis();
    for frame in &sent.frames {
        words.push(format!("round {} at {after} ms on {}: {frame}", sent.round, sent.interface));
    }
    words.extend(sent.errors.iter().map(|error| format!("round {} on {}: FAILED: {error}", sent.round, sent.interface)));
    words
}

/// A schedule of announcements at work on a thread of its own.
#[derive(Debug)]
pub(crate) struct Announcing {
    lines: mpsc::Receiver<Vec<String>>,
    nics: usize,
}

/// Begins to announce; `on_line` gets every line as it leaves, `cancel` ends it early.
///
/// # Errors
/// The announcer cannot be opened, or the thread not be started: in words.
pub(crate) fn begin(
    nics: Vec<Nic>,
    gaps: &[Duration],
    cancel: Arc<AtomicBool>,
    mut on_lines: impl FnMut(&[String]) + Send + 'static,
) -> Result<Announcing, String> {
    let schedule = Schedule::new(gaps.to_vec()).map_err(|e| e.to_string())?;
    let announcer = Announcer::open().map_err(|e| e.to_string())?;
    let (sender, lines) = mpsc::channel();
    let count = nics.len();
    let run = move || {
        let on_sent = |sent: Sent| {
            let words = words(&sent);
            on_lines(&words);
            // Nobody waits any more: the first round is over.
            let _ = sender.send(words);
        };
        announcer.run(&nics, &schedule, || cancel.load(Ordering::Acquire), on_sent);
    };
    std::thread::Builder::new().name("announcer".into()).spawn(run).map_err(|e| format!("no thread for announcements: {e}"))?;
    Ok(Announcing { lines, nics: count })
}

impl Announcing {
    /// Waits for the first round of every NIC.
    #[must_use]
    pub(crate) fn first_round(self) -> Vec<String> {
        let mut all = Vec::new();
        for _ in 0..self.nics {
            match self.lines.recv_timeout(Duration::from_secs(2)) {
                Ok(words) => all.extend(words),
                Err(_) => break,
            }
        }
        all
    }
}
