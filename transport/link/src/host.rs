//! What the driver asks of the guest's host. The agent answers it over a plug, tests with a toy.
//! Calls may block: each migration has one thread of its own for them, and they come one after the other, in order.

use crate::commands::{Caller, CommandChannel};
use crate::driver::Cancel;
use crate::pages::{Pages, Populate};
use limosa_proto::bitmap::PageSet;
use limosa_proto::commit::JournalRecord;
use limosa_proto::cpu::CpuProfile;
use limosa_proto::event::{DestinationConfig, DestinationOutcome};
use limosa_proto::identity::{Generation, HostId, MigrationId};
use limosa_proto::record::Record;
use limosa_proto::state::DestinationState;
use limosa_proto::ticket::TicketBytes;
use limosa_proto::wire::frame::ControlHeader;
use limosa_proto::wire::message::{Hello, Reached, Reason, Refusal, ReleasedAnswer, VerdictAnswer, VmDescription};
use limosa_proto::wire::offer::LinkOffer;
use std::net::SocketAddr;
use std::sync::Arc;
use tokio::sync::{oneshot, watch};

/// Why a host could not do what it was asked, in words for a person.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{words}")]
pub struct HostError {
    /// What failed, where, and what to do about it.
    pub words: String,
}

impl HostError {
    /// An error of these words.
    pub fn new(words: impl Into<String>) -> HostError {
        HostError { words: words.into() }
    }
}

/// The host of a guest that is being sent away.
pub trait SourceHost: Send + 'static {
    /// The guest's memory. Asked once, first; not a blocking call.
    fn pages(&self) -> Arc<dyn Pages>;
    /// From its return on, no write of the guest is missed by [`SourceHost::fetch_dirty`].
    ///
    /// # Errors
    /// In words.
    fn start_tracking(&mut self) -> Result<(), HostError>;
    /// The pages written since tracking started or since the last call; they count as clean now.
    ///
    /// # Errors
    /// In words.
    fn fetch_dirty(&mut self) -> Result<PageSet, HostError>;
    /// Pauses the guest; when it returns nothing writes its memory.
    ///
    /// # Errors
    /// In words.
    fn pause(&mut self) -> Result<(), HostError>;
    /// The state of the paused guest. May dirty memory.
    ///
    /// # Errors
    /// In words.
    fn save(&mut self) -> Result<Vec<Record>, HostError>;
    /// Lets the paused guest run on here.
    ///
    /// # Errors
    /// In words.
    fn resume(&mut self) -> Result<(), HostError>;
    /// Ends what [`SourceHost::start_tracking`] began.
    ///
    /// # Errors
    /// In words.
    fn stop_tracking(&mut self) -> Result<(), HostError>;
    /// The guest runs elsewhere: ends the VMM without ever running the guest again.
    ///
    /// # Errors
    /// In words.
    fn release(&mut self) -> Result<(), HostError>;
    /// Writes a record; it is durable when this returns `Ok`.
    ///
    /// # Errors
    /// In words. Then it is not known whether the record is there.
    fn journal(&mut self, record: &JournalRecord) -> Result<(), HostError>;
    /// What a person has decided about a guest in doubt, as if the destination had said it. It is durable: asked before the
    /// destination is.
    fn decided(&mut self) -> Option<VerdictAnswer> {
        None
    }
    /// CPU seconds that the VMM spent on this migration, as far as the host can tell.
    fn cpu_seconds(&mut self) -> f64 {
        0.0
    }
}

/// The host of a guest that comes in.
pub trait DestinationHost: Send + 'static {
    /// Whether this guest could run here; nothing is changed.
    ///
    /// # Errors
    /// Every reason why not.
    fn check(&mut self, vm: &VmDescription) -> Result<(), Refusal>;
    /// Makes the VMM; returns its memory, which is fresh: every page reads as zeros. Population is not its business.
    ///
    /// # Errors
    /// In words.
    fn prepare(&mut self, vm: &VmDescription) -> Result<Arc<dyn Pages>, HostError>;
    /// Puts the state into the VMM. All pages are in place, and no lane writes any more.
    ///
    /// # Errors
    /// In words.
    fn load(&mut self, records: Vec<Record>) -> Result<(), HostError>;
    /// Lets the guest run.
    ///
    /// # Errors
    /// In words.
    fn resume(&mut self) -> Result<(), HostError>;
    /// The guest's operator has paused it, and it stays so. Called before [`DestinationHost::load`], to be remembered with the
    /// guest; and again in place of [`DestinationHost::resume`]: from then on it is this host's, and stands still.
    ///
    /// # Errors
    /// In words.
    fn hold(&mut self) -> Result<(), HostError>;
    /// Tells the network where the guest is: returns after the first round, with one line for each frame that left; goes on
    /// by itself with the others. Of a guest that is held nothing is told.
    ///
    /// # Errors
    /// In words.
    fn announce(&mut self) -> Result<Vec<String>, HostError>;
    /// Called after [`DestinationHost::announce`]: what waits until the guest answers the network, for some seconds at most.
    /// That runs on another thread, so that the journal does not wait. None: nobody asks the guest.
    fn reach(&mut self) -> Option<Reaching> {
        None
    }
    /// Kills the VMM and gives back all it had. Also called when nothing was prepared.
    ///
    /// # Errors
    /// In words.
    fn discard(&mut self) -> Result<(), HostError>;
    /// Writes a record; it is durable when this returns `Ok`.
    ///
    /// # Errors
    /// In words. Then it is not known whether the record is there.
    fn journal(&mut self, record: &JournalRecord) -> Result<(), HostError>;
    /// CPU seconds that the VMM spent on this migration, as far as the host can tell.
    fn cpu_seconds(&mut self) -> f64 {
        0.0
    }
}

/// Waits until a guest answers, and says whether it did.
pub type Reaching = Box<dyn FnOnce() -> Reached + Send>;

/// Who is at the other end of a control channel.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Peer {
    /// Its key.
    pub id: HostId,
    /// Its address, where the link has one.
    pub address: Option<SocketAddr>,
    /// The address of this host that it came to, where the link has one.
    pub local: Option<SocketAddr>,
}

/// What a destination's driver is given for one migration.
pub struct Incoming {
    /// The guest's host.
    pub host: Box<dyn DestinationHost>,
    /// Limits and settings; `DestinationConfig::new(header.migration, header.generation, peer.id, fresh_token()?)` and what
    /// the host's configuration changes of it.
    pub config: DestinationConfig,
    /// When memory is given real pages.
    pub populate: Populate,
    /// Cancels the migration from this side.
    pub cancel: Cancel,
    /// Where to show how it goes.
    pub progress: Option<watch::Sender<IncomingProgress>>,
    /// Told how it ended.
    pub done: Option<oneshot::Sender<DestinationOutcome>>,
}

/// An incoming migration as its destination sees it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct IncomingProgress {
    /// State of the engine.
    pub state: DestinationState,
    /// Rounds that have arrived.
    pub rounds: u32,
    /// Pages whose contents arrived.
    pub pages: u64,
    /// Pages that arrived as "zero".
    pub zero_pages: u64,
    /// Bytes received on the lanes.
    pub bytes_on_wire: u64,
}

/// What a host decides about what comes in, whatever the link. Shared by all its migrations.
pub trait Hosting: Send + Sync + 'static {
    /// Whether a peer that has been let in may still ask for something: what let it in may have been taken back since. Must not
    /// block.
    ///
    /// # Errors
    /// A refusal that is sent as it is.
    fn admits(&self, _peer: &Peer) -> Result<(), Refusal> {
        Ok(())
    }

    /// Whether both keys are of one host, which has a new key since.
    fn same_host(&self, one: HostId, other: HostId) -> bool {
        one == other
    }

    /// A trusted peer would like to send this guest, and shows this ticket for it. Must not block: looking closer, at the ticket
    /// too, is [`DestinationHost::check`]'s.
    ///
    /// # Errors
    /// A refusal that is sent as it is.
    fn incoming(
        &self,
        peer: &Peer,
        header: &ControlHeader,
        hello: &Hello,
        ticket: Option<TicketBytes>,
    ) -> Result<Incoming, Refusal>;

    /// Somebody would like to command this host. Must not block. Without an answer of its own a host obeys nobody.
    fn commands(&self, _caller: Caller, _channel: CommandChannel) {}

    /// A guest was not let in: what [`Hosting::incoming`] refused, or what there was no room for. Must not block.
    fn refused(&self, _peer: &Peer, _header: &ControlHeader, _hello: &Hello, _refusal: &Refusal) {}

    /// Which links this host offers to `peer`, and why not the others. Must not block.
    fn offers(&self, _peer: &Peer) -> Vec<LinkOffer> {
        Vec::new()
    }

    /// Every reason for which this guest could not come here now; none if it could. Nothing is changed. What is asked ahead of a
    /// migration and what a migration itself is checked by are the same. May block.
    fn check(&self, _peer: &Peer, _vm: &VmDescription, _ticket: Option<TicketBytes>) -> Vec<Reason> {
        let words = "the destination does not say ahead whether a guest can come".to_owned();
        vec![Reason { id: "unchecked".to_owned(), words }]
    }

    /// The CPU that this host gives to guests; empty if it cannot tell. May block.
    fn cpu(&self, _peer: &Peer) -> CpuProfile {
        CpuProfile::default()
    }

    /// A source in doubt asks about a migration that no driver here carries any more. `released`: it is as good as Commit;
    /// otherwise the source asks for the guest back. What is answered must be durable. May block.
    fn verdict(&self, peer: &Peer, migration: MigrationId, generation: Generation, released: bool) -> VerdictAnswer;

    /// A destination asks whether an attempt that left this host was ever released. What is answered must be durable, and Never
    /// is for ever. May block.
    fn released(&self, _peer: &Peer, _migration: MigrationId, _generation: Generation) -> ReleasedAnswer {
        ReleasedAnswer::Unknown
    }
}
