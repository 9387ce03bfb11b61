//! The plug: the socket between a VMM and the agent of its host, in the spirit of vhost-user.
//!
//! A VMM connects to the agent's UNIX socket (SOCK_SEQPACKET), hands over the memfds of its guest's memory and one of a
//! shared dirty bitmap, and answers what the agent asks: describe, track, fetch dirty, pause, save, load, resume. The
//! agent moves the pages by itself, so a VMM needs neither network nor keys. The wire format is in `docs/PLUG.md`.
//!
//! No KVM, no network protocol and no policy is in here: it says what a VMM is asked, never when.
//!
//! - [`vmm_side`]: for authors of VMMs: implement [`Vmm`], call [`serve`].
//! - [`agent_side`]: [`PlugListener`] and [`PlugConnection`].
//! - [`memory`]: [`GuestMemory`], the guest's pages as the agent maps them; [`dirty`]: the shared bitmap.
//! - [`conformance`]: the kit that any VMM can be tested with.

pub mod agent_side;
pub mod conformance;
pub mod description;
pub mod dirty;
pub mod error;
mod mapping;
pub mod memfd;
pub mod memory;
pub mod message;
pub mod records;
mod socket;
pub mod state;
pub mod vmm_side;

pub use agent_side::{Described, PlugConnection, PlugEvent, PlugListener, PlugPeer};
pub use dirty::DirtyBitmap;
pub use error::{PlugError, ServeError};
pub use memory::{GuestMemory, HugePages};
pub use message::{Hello, Role, Token, VmStatus};
pub use state::VmState;
pub use vmm_side::{Ended, EventReceiver, EventSender, ServeOptions, Vmm, VmmDescription, VmmEvent, events, serve};
