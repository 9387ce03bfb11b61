//! The agent of a host: it owns the network side of live migration, and everything that must be remembered.
//!
//! [`run`] is the process; [`api`] is how commands talk to it, shared by both ends. Guests are run by VMMs that plug in
//! ([`limosa_plug`]); pages go over [`limosa_link`]; what two hosts say to each other is decided in [`limosa_proto`].
//!
//! It has no KVM and no unsafe code.
#![forbid(unsafe_code)]

mod actions;
mod agent;
pub mod allow_api;
mod announcing;
pub mod api;
mod asking;
mod audit;
mod check;
pub mod checked;
pub mod config;
pub mod cpu;
mod cutting;
mod desk;
mod disks;
mod durable;
pub mod fleet;
pub mod hosts;
mod incoming;
pub mod jobs;
pub mod journal;
mod leaving;
mod links;
mod metrics;
mod networks;
mod noted;
pub mod operator;
pub mod operators;
mod outgoing;
mod pages;
mod pausing;
pub mod process;
mod reload;
pub mod remote;
mod rotation;
pub mod rules;
mod run;
mod serve;
mod settle;
mod snapshot;
pub mod tickets;
mod trusting;
mod verdict;
mod vm;
pub mod vm_config;
mod vms;

pub use run::run;
