//! The two hosts of a migration without a guest: they answer at once, and note the CPU time when pages begin and end to move. Preparing
//! the destination's memory is outside of that.

use crate::common::machine;
use crate::memory::Memory;
use limosa_link::driver::fresh_token;
use limosa_link::{Cancel, DestinationHost, HostError, Hosting, Incoming, Pages, Peer, Populate, SourceHost};
use limosa_proto::bitmap::PageSet;
use limosa_proto::commit::JournalRecord;
use limosa_proto::event::DestinationConfig;
use limosa_proto::identity::{Generation, MigrationId};
use limosa_proto::record::Record;
use limosa_proto::ticket::TicketBytes;
use limosa_proto::wire::code::Code;
use limosa_proto::wire::frame::ControlHeader;
use limosa_proto::wire::message::{Hello, Refusal, VerdictAnswer, VmDescription};
use nix::sys::resource::{UsageWho, getrusage};
use nix::sys::time::TimeValLike;
use serde::{Deserialize, Serialize};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// CPU seconds of this process and of its machine.
#[derive(Debug, Clone, Copy, Default, Serialize, Deserialize)]
pub(crate) struct Spent {
    pub(crate) process: Option<f64>,
    pub(crate) machine: Option<f64>,
}

#[allow(clippy::cast_precision_loss, reason = "microseconds of a benchmark")]
fn used(who: UsageWho) -> Option<f64> {
    let usage = getrusage(who).ok()?;
    Some((usage.user_time() + usage.system_time()).num_microseconds() as f64 / 1e6)
}

impl Spent {
    /// Until now, of this process.
    pub(crate) fn now() -> Spent {
        Spent { process: used(UsageWho::RUSAGE_SELF), machine: machine::busy_seconds() }
    }

    /// Until now, of its children that have ended.
    pub(crate) fn by_children() -> Spent {
        Spent { process: used(UsageWho::RUSAGE_CHILDREN), machine: machine::busy_seconds() }
    }

    /// What was spent between `earlier` and this.
    pub(crate) fn since(self, earlier: Spent) -> Spent {
        let minus = |now: Option<f64>, then: Option<f64>| now.zip(then).map(|(now, then)| now - then);
        Spent { process: minus(self.process, earlier.process), machine: minus(self.machine, earlier.machine) }
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// CPU time from the start of the first round to its end.
#[derive(Debug, Clone, Default)]
pub(crate) struct Meter(Arc<Mutex<(Spent, Spent)>>);

impl Meter {
    fn begin(&self) {
        lock(&self.0).0 = Spent::now();
    }
    fn end(&self) {
        let mut held = lock(&self.0);
        held.1 = Spent::now().since(held.0);
    }
    /// What was spent last.
    pub(crate) fn spent(&self) -> Spent {
        lock(&self.0).1
    }
}

/// A source whose guest stands still.
pub(crate) struct Source {
    pub(crate) memory: Arc<Memory>,
    pub(crate) meter: Meter,
}

impl SourceHost for Source {
    fn pages(&self) -> Arc<dyn Pages> {
        self.memory.clone()
    }
    fn start_tracking(&mut self) -> Result<(), HostError> {
        self.meter.begin();
        Ok(())
    }
    fn fetch_dirty(&mut self) -> Result<PageSet, HostError> {
        Ok(PageSet::empty(self.memory.memory_map()))
    }
    fn pause(&mut self) -> Result<(), HostError> {
        self.meter.end();
        Ok(())
    }
    fn save(&mut self) -> Result<Vec<Record>, HostError> {
        Ok(vec![Record { kind: 1, version: 1, instance: 0, bytes: vec![1; 4096] }])
    }
    fn resume(&mut self) -> Result<(), HostError> {
        Ok(())
    }
    fn stop_tracking(&mut self) -> Result<(), HostError> {
        Ok(())
    }
    fn release(&mut self) -> Result<(), HostError> {
        Ok(())
    }
    fn journal(&mut self, _: &JournalRecord) -> Result<(), HostError> {
        Ok(())
    }
}

/// The destination: what arrived last stays until it was looked at.
#[derive(Default)]
pub(crate) struct Arrivals {
    last: Mutex<Option<Arc<Memory>>>,
    pub(crate) meter: Meter,
}

impl Arrivals {
    /// Takes the memory that arrived last.
    pub(crate) fn take(&self) -> Option<Arc<Memory>> {
        lock(&self.last).take()
    }
}

struct Destination(Arc<Arrivals>);

impl DestinationHost for Destination {
    fn check(&mut self, _: &VmDescription) -> Result<(), Refusal> {
        Ok(())
    }
    fn prepare(&mut self, vm: &VmDescription) -> Result<Arc<dyn Pages>, HostError> {
        let made = Memory::new(&vm.memory).and_then(|memory| memory.populate_all().map(|()| Arc::new(memory)));
        let memory = made.map_err(|error| HostError::new(format!("{error:#}")))?;
        *lock(&self.0.last) = Some(memory.clone());
        self.0.meter.begin();
        Ok(memory)
    }
    fn load(&mut self, _: Vec<Record>) -> Result<(), HostError> {
        self.0.meter.end();
        Ok(())
    }
    fn resume(&mut self) -> Result<(), HostError> {
        Ok(())
    }
    fn hold(&mut self) -> Result<(), HostError> {
        Ok(())
    }
    fn announce(&mut self) -> Result<Vec<String>, HostError> {
        Ok(vec![])
    }
    fn discard(&mut self) -> Result<(), HostError> {
        Ok(())
    }
    fn journal(&mut self, _: &JournalRecord) -> Result<(), HostError> {
        Ok(())
    }
}

/// Lets in whoever the links let in.
pub(crate) struct Reception(pub(crate) Arc<Arrivals>);

impl Hosting for Reception {
    fn incoming(&self, peer: &Peer, header: &ControlHeader, _: &Hello, _: Option<TicketBytes>) -> Result<Incoming, Refusal> {
        let token = fresh_token().map_err(|error| Refusal::one(Code::Internal, error.to_string()))?;
        let mut config = DestinationConfig::new(header.migration, header.generation, peer.id, token);
        // Lanes and their check are as the source asks for.
        (config.plaintext_allowed, config.page_check) = (true, false);
        let host = Box::new(Destination(self.0.clone()));
        Ok(Incoming { host, config, populate: Populate::No, cancel: Cancel::new(), progress: None, done: None })
    }
    fn verdict(&self, _: &Peer, _: MigrationId, _: Generation, _: bool) -> VerdictAnswer {
        VerdictAnswer::Unknown
    }
}
