//! The migration protocol, pure: what two hosts say to each other, and when.
//!
//! No socket, no file, no thread, no clock, no randomness, and no guest page: the caller passes time in, carries
//! messages, and moves the pages that the engine names.
#![forbid(unsafe_code)]

pub mod bitmap;
pub mod identity;
pub mod memory;
pub mod record;
pub mod time;
