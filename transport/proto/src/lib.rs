//! The migration protocol, pure: what two hosts say to each other, and when.
//!
//! No socket, no file, no thread, no clock, no randomness, and no guest page: the caller passes time in, carries
//! messages, and moves the pages that the engine names.
#![forbid(unsafe_code)]

pub mod allow;
pub mod bitmap;
pub mod commit;
pub mod compat;
pub mod destination;
pub mod error;
pub mod event;
pub mod identity;
mod keepalive;
pub mod memory;
pub mod precopy;
pub mod progress;
pub mod record;
pub mod report;
pub mod source;
pub mod state;
pub mod time;
pub mod wire;
