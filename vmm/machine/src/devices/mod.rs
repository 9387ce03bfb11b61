//! The devices of the machine, one a file, and what virtio devices share.

pub(crate) mod balloon;
pub(crate) mod block;
pub(crate) mod block_request;
pub(crate) mod net;
pub(crate) mod queue;
pub(crate) mod rng;
pub(crate) mod serial;
pub(crate) mod transport;
pub(crate) mod worker;

#[cfg(test)]
mod hostile_tests;
