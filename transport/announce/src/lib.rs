//! Telling the network where a guest is: gratuitous ARP, unsolicited NA, RARP, and the entry in the local bridge.
//!
//! After a migration the guest has the MAC and the addresses it always had, but it hangs on another port of the
//! network. Nobody knows until the guest happens to send something. So the new host speaks for it, in two ways:
//!
//! 1. Frames with the guest's MAC as their source leave through the bridge ([`frames`]). Every switch on the way
//!    learns the new port from them, and the neighbours renew their ARP and neighbour tables.
//! 2. The *local* bridge does not learn from frames that this host sends by itself, and may still believe that the
//!    MAC is behind its uplink, where the guest used to be. So it is told by netlink that the MAC is on the
//!    guest's TAP, in the way of `bridge fdb replace MAC dev TAP master dynamic`. This is done first.
//!
//! Both are repeated on a [`Schedule`], because a frame can get lost and because a late frame of the old place can
//! undo the entry.
//!
//! ```no_run
//! use limosa_announce::{Announcer, Nic, Schedule};
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! let nic = Nic {
//!     mac: [0x52, 0x54, 0, 0x12, 0x34, 0x56],
//!     addresses: vec!["10.0.0.5".parse()?],
//!     interface: "br0".into(),
//!     port: Some("tap0".into()),
//!     ..Nic::default()
//! };
//! let announcer = Announcer::open()?;
//! announcer.run(&[nic], &Schedule::default(), || false, |sent| println!("{sent}"));
//! # Ok(())
//! # }
//! ```
//!
//! Which addresses a guest has is configured, and learned by watching its port ([`Watcher`], [`Learned`]). Whether it answers
//! in its new place is asked by [`Questions`]. What came to its old place meanwhile is sent on by [`Kept`]. Who holds which MAC on the local bridges is read by [`stations`].
//!
//! Not here: the decision *when* a guest may be announced (only after the commit; that is the agent's).

#![deny(unsafe_code)]

mod announcer;
mod arp;
mod fdb;
mod forward;
mod frame;
mod learn;
mod ndisc;
mod nic;
mod rarp;
mod reach;
mod schedule;
#[allow(unsafe_code)]
mod socket;
mod stations;
mod watch;

pub use announcer::{Announcer, Outcome, Sent};
pub use forward::Kept;
pub use frame::{FRAME_BYTES_MIN, Frame, FrameKind, frames};
pub use learn::{Claim, LEARNED_MAX, Learned, Way, claim};
pub use nic::{ADDRESSES_MAX, Nic, mac_words};
pub use reach::{Questions, Reached, reach_words};
pub use schedule::{Due, GAP_MAX, ROUNDS_MAX, Rounds, Schedule, ScheduleError};
pub use socket::{ListenError, OpenError};
pub use stations::{Hold, Station, StationsError, stations};
pub use watch::{WATCHED_MAX, Watch, WatchError, Watcher};
