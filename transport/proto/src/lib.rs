//! The migration protocol, pure: what two hosts say to each other, and when.
//!
//! No socket, no file, no thread, no clock, no randomness, and no guest page: the caller passes time in, carries
//! messages, and moves the pages that the engine names.
//!
//! # One whole migration in memory
//!
//! The two halves are driven alike: feed events, carry out actions in order. Here the "network" is a function call,
//! every host task succeeds at once, and time stands still.
//!
//! ```
//! use limosa_proto::bitmap::PageSet;
//! use limosa_proto::destination::{Destination, DestinationAction as D, DestinationConfig, DestinationEvent as DE};
//! use limosa_proto::identity::{Generation, HostId, MigrationId, VmId};
//! use limosa_proto::memory::{Gpa, MemoryMap, Region};
//! use limosa_proto::source::{RoundSent, Source, SourceAction as S, SourceConfig, SourceEvent as SE, SourceOutcome};
//! use limosa_proto::time::Instant;
//! use limosa_proto::wire::frame::LaneToken;
//! use limosa_proto::wire::message::{Reached, VmDescription};
//!
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! let memory = MemoryMap::new(vec![Region { gpa: Gpa(0), bytes: 1 << 20, page_bytes: 4096 }])?;
//! let vm = VmDescription {
//!     id: VmId([1; 16]), name: "web".into(), vcpus: 1, memory: memory.clone(), nics: vec![], disks: vec![], vmm: "limosa".into(),
//!     records: vec![], config: vec![], cpu: Default::default(),
//! };
//! let (migration, generation, now) = (MigrationId([2; 16]), Generation(1), Instant::ZERO);
//! let mut source = Source::new(now, SourceConfig::new(migration, generation, HostId([4; 32]), vm))?;
//! let token = LaneToken([5; 32]); // random, in earnest
//! let mut destination = Destination::new(now, DestinationConfig::new(migration, generation, HostId([3; 32]), token))?;
//!
//! let mut outcome = None;
//! while outcome.is_none() {
//!     while let Some(action) = source.poll() {
//!         match action {
//!             S::Send(message) => destination.handle(now, DE::Message(message)),
//!             S::Journal(record) => source.handle(now, SE::Journaled(record.kind)),
//!             S::OpenLanes { .. } => {
//!                 destination.handle(now, DE::LanesJoined);
//!                 source.handle(now, SE::LanesOpen);
//!             }
//!             S::StartTracking => source.handle(now, SE::TrackingStarted),
//!             S::FetchDirty => source.handle(now, SE::Dirty(PageSet::empty(&memory))),
//!             S::SendPages { round, pages, .. } => {
//!                 let (pages, bytes) = (pages.count(), pages.count() * 4096);
//!                 source.handle(now, SE::PagesSent(RoundSent { round, pages, zero_pages: 0, bytes_on_wire: bytes }));
//!                 destination.handle(now, DE::RoundArrived { round, pages, zero_pages: 0, bytes });
//!             }
//!             S::Pause => source.handle(now, SE::Paused),
//!             S::Save => source.handle(now, SE::Saved(vec![])),
//!             S::Done(end) => outcome = Some(end),
//!             _ => {}
//!         }
//!     }
//!     while let Some(action) = destination.poll() {
//!         match action {
//!             D::Send(message) => source.handle(now, SE::Message(message)),
//!             D::Check(_) => destination.handle(now, DE::Admitted),
//!             D::Prepare { .. } => destination.handle(now, DE::Prepared { populated_ms: 0 }),
//!             D::Load { .. } => destination.handle(now, DE::Loaded),
//!             D::Journal(record) => destination.handle(now, DE::Journaled(record.kind)),
//!             D::Resume => destination.handle(now, DE::Resumed),
//!             D::Announce => destination.handle(now, DE::Announced { announcements: vec![], cpu_us: 0, reached: Reached::default() }),
//!             _ => {}
//!         }
//!     }
//! }
//! assert_eq!(outcome, Some(SourceOutcome::Committed));
//! # Ok(())
//! # }
//! ```
#![forbid(unsafe_code)]

pub mod allow;
pub mod bitmap;
pub mod commit;
pub mod compat;
pub mod cpu;
pub mod destination;
pub mod error;
pub mod event;
pub mod here;
pub mod identity;
pub mod journal;
mod keepalive;
pub mod lines;
pub mod memory;
pub mod precopy;
pub mod progress;
pub mod record;
pub mod recovery;
pub mod release;
pub mod report;
pub mod snapshot;
pub mod source;
pub mod state;
pub mod statement;
pub mod ticket;
pub mod time;
pub mod wire;
