//! Safe handles over libibverbs and librdmacm: the RDMA unsafe of Limosa and nothing else.
//!
//! It knows no pages, rounds or guests: memory regions, queue pairs and connections only. Both libraries are loaded at run
//! time, so that a program built with this crate starts on a host that has neither; [`NoRdma`] then says what is missing.
//!
//! - [`Context`] is an open device, [`ProtectionDomain`] and [`MemoryRegion`] are made from it, over a [`Mapping`].
//! - [`Listener`] and [`Resolved`] connect; both give a [`Prepared`] and that a [`QueuePair`], which posts and completes.
//! - [`Inventory`] says what this host has, [`counters`] how many handles are alive.
//!
//! Soundness, once for the crate. A handle owns the C object it was made with, is the only one to destroy it, and keeps alive
//! what the object was made from; so a pointer in a living handle points to a living object. libibverbs and librdmacm may be
//! called from any thread, so handles are `Send`, and `Sync` where no call of theirs needs `&mut`. Memory that a device may
//! write or read is a [`Mapping`]: it is never borrowed as a slice, is unmapped only after every region over it was
//! deregistered, and a region lives until the work requests that name it have completed or their queue pair is destroyed.
//!
//! RoCE and InfiniBand; iWARP is not supported, since its queue pairs are connected in another way.

mod bell;
mod channel;
mod completion;
pub mod counters;
mod device;
mod domain;
mod error;
mod faults;
mod inventory;
mod library;
mod manager;
mod pair;
mod post;
mod queue;
mod region;
mod sysfs;
mod wait;

pub use completion::{Completion, CompletionError, Status, Verb};
pub use device::{Context, DeviceLimits, OnDemand};
pub use domain::ProtectionDomain;
pub use error::{ConnectError, CreateError, ListenError, NoRdma, PrepareError};
pub use faults::Fault;
pub use inventory::{DeviceReport, GidKind, GidReport, Inventory, LinkLayer, PortReport, PortState};
pub use library::Library;
pub use manager::{
    ConnectRequest, Handshake, Listener, PRIVATE_DATA_ACCEPT_MAX, PRIVATE_DATA_CONNECT_MAX, PRIVATE_DATA_REJECT_MAX, Prepared,
    Resolved,
};
pub use pair::{Closer, PairSettings, Posted, QueuePair};
pub use post::{Payload, Piece, PostError, PostErrorKind, Receive, Send, Work, Write};
pub use region::{Access, DeregisterError, MapError, Mapping, MemoryRegion, OutOfBounds, RegisterError, RemoteKey};
pub use wait::WaitError;
