//! The devices of a machine, one a file; each declares its record. Not where they are: that is `bus.rs`.

pub(crate) mod net;
pub(crate) mod queue;
pub(crate) mod serial;
pub(crate) mod transport;
