//! What crosses the network: headers of fixed layout, messages, codes, versions and limits.
//! It parses and emits bytes and knows no order of events; [`crate::source`] and [`crate::destination`] do.

pub mod code;
pub mod frame;
pub mod limits;
pub mod message;
pub mod offer;
pub mod version;
