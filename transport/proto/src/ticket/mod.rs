//! The ticket: an operator's signed word that one host may do one thing with one guest (or guests of a pattern) towards one
//! other host, for a while. `bytes` is how it is written, `verify` who may use it, `spent` that it is used once.
//!
//! No key and no nonce is made here and no time is read: the caller gives them. A ticket is no secret that opens anything by
//! itself: whoever presents it must hold the source's host key too. docs/PROTOCOL.md section 10 has the bytes.
//!
//! ```
//! use limosa_proto::identity::{HostId, Nonce, OperatorId, VmId};
//! use limosa_proto::ticket::{Action, Claims, Context, Guests, Link, Links, Operator, SpentNonces, Ticket, verify};
//! use ring::signature::{Ed25519KeyPair, KeyPair as _};
//!
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! # let key = Ed25519KeyPair::from_seed_unchecked(&[1; 32]).map_err(|_| "no key")?;
//! let issuer = OperatorId(key.public_key().as_ref().try_into()?);
//! let (source, destination, vm) = (HostId([2; 32]), HostId([3; 32]), VmId([4; 16]));
//! let claims = Claims {
//!     action: Action::Migrate, guests: Guests::One(vm), source, destination, links: Links::ALL,
//!     not_before: 1_000, not_after: 1_600, nonce: Nonce([5; 16]), issuer,
//! };
//! let signature = key.sign(&claims.to_sign()).as_ref().try_into()?;
//! let text = Ticket::sealed(claims, signature)?.text();
//!
//! // At the destination, which trusts that operator:
//! let operators = [Operator { id: issuer, name: "ana".into(), actions: vec![Action::Migrate] }];
//! let mut spent = SpentNonces::new(1024);
//! let ticket = Ticket::parse(&text)?;
//! let now = 1_010;
//! let grant = verify(&ticket, &Context {
//!     now, skew: 30, here: destination, source, vm, vm_name: "web", action: Action::Migrate, link: Some(Link::Tcp),
//!     operators: &operators, spent: &spent, migration: None,
//! })?;
//! let line = spent.spend(&grant, None, now)?; // to be durable before the guest is let in
//! assert!(line.is_some() && spent.spend(&grant, None, now).is_err());
//! # Ok(())
//! # }
//! ```

mod bytes;
mod spent;
mod verify;

pub use bytes::{BYTES_MAX, PREFIX, TEXT_BYTES_MAX, TicketBytes, VERSION};
pub use spent::{SpentError, SpentNonces};
pub use verify::{Context, Grant, Operator, STRANGERS_CODE, STRANGERS_WORDS, TicketRefusal, verify};

use crate::identity::{HostId, Nonce, OperatorId, VmId};
use std::fmt;
use std::str::FromStr;

/// How long a ticket is good unless said otherwise, in seconds.
pub const LIFE_DEFAULT_S: u64 = 600;
/// The longest life of a ticket for one guest, in seconds: its nonce is remembered as long.
pub const LIFE_MAX_S: u64 = 7 * 86_400;
/// The longest life of a standing delegation, in seconds.
pub const STANDING_LIFE_MAX_S: u64 = 366 * 86_400;
/// By how much clocks may differ unless said otherwise, in seconds.
pub const SKEW_DEFAULT_S: u64 = 30;
/// The most that can be set, in seconds. Nonces are remembered that much longer than tickets live, whatever is set, so that a
/// larger setting never lets a spent ticket in again.
pub const SKEW_MAX_S: u64 = 3600;
/// Bytes of a pattern of names.
pub const PATTERN_BYTES_MAX: usize = 64;

/// What a ticket allows.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[non_exhaustive]
pub enum Action {
    /// To send the guest.
    Migrate,
    /// To ask whether the guest could be sent.
    Check,
}

/// Which guests a ticket is for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Guests {
    /// This one, once.
    One(VmId),
    /// All whose name fits, as often as the source likes: a standing delegation. The name is what the source says it is.
    Named(NamePattern),
}

/// A pattern of guests' names: letters, digits, `-`, `_`, `.`, and `*` for any characters, also none.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NamePattern(String);

/// What carries the pages.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Link {
    /// TCP.
    Tcp,
    /// QUIC.
    Quic,
    /// RDMA, which encrypts nothing.
    Rdma,
}

/// The links that a ticket is good for: what a destination can hold a source to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Links(u8);

/// What an operator says by a ticket.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Claims {
    /// What may be done.
    pub action: Action,
    /// With which guests.
    pub guests: Guests,
    /// By whom.
    pub source: HostId,
    /// Towards whom.
    pub destination: HostId,
    /// Over which links.
    pub links: Links,
    /// From when on, in seconds since 1970.
    pub not_before: u64,
    /// Until when, this second included.
    pub not_after: u64,
    /// What tells it from every other.
    pub nonce: Nonce,
    /// Who says so.
    pub issuer: OperatorId,
}

/// Claims and the issuer's signature of them, which nobody has looked at yet.
#[derive(Clone, PartialEq, Eq)]
pub struct Ticket {
    pub(crate) claims: Claims,
    pub(crate) signature: [u8; 64],
}

/// Text that names nothing.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{text:?} is no {what}: {wants}")]
pub struct NoSuch {
    text: String,
    what: &'static str,
    wants: &'static str,
}

impl Action {
    /// All of them.
    pub const ALL: [Action; 2] = [Action::Migrate, Action::Check];

    /// As commands and configurations call it.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Action::Migrate => "migrate",
            Action::Check => "check",
        }
    }
}

impl Link {
    /// All of them.
    pub const ALL: [Link; 3] = [Link::Tcp, Link::Quic, Link::Rdma];

    /// Its name in Hello and in reports.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Link::Tcp => "tcp",
            Link::Quic => "quic",
            Link::Rdma => "rdma",
        }
    }

    fn bit(self) -> u8 {
        match self {
            Link::Tcp => 1,
            Link::Quic => 2,
            Link::Rdma => 4,
        }
    }
}

macro_rules! named {
    ($name:ident, $what:literal, $wants:literal) => {
        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(self.name())
            }
        }

        impl FromStr for $name {
            type Err = NoSuch;
            fn from_str(text: &str) -> Result<$name, NoSuch> {
                let found = $name::ALL.into_iter().find(|one| one.name() == text);
                found.ok_or_else(|| NoSuch { text: text.chars().take(80).collect(), what: $what, wants: $wants })
            }
        }
    };
}
named!(Action, "action of a ticket", "it should be migrate or check");
named!(Link, "link", "it should be tcp, quic or rdma");

impl Links {
    /// Any link.
    pub const ALL: Links = Links(7);

    /// These links. A ticket needs one at least.
    #[must_use]
    pub fn of(links: &[Link]) -> Links {
        Links(links.iter().fold(0, |bits, link| bits | link.bit()))
    }

    /// Whether it is one of them.
    #[must_use]
    pub fn has(self, link: Link) -> bool {
        self.0 & link.bit() != 0
    }

    /// Their names.
    #[must_use]
    pub fn names(self) -> Vec<&'static str> {
        Link::ALL.into_iter().filter(|link| self.has(*link)).map(Link::name).collect()
    }
}

impl NamePattern {
    /// Whether `name` fits, the whole of it. Costs at most the product of both lengths, whatever either is.
    #[must_use]
    pub fn fits(&self, name: &str) -> bool {
        let Some((first, rest)) = self.0.split_once('*') else { return self.0 == name };
        let Some(mut name) = name.strip_prefix(first) else { return false };
        // What is between two stars is looked for as far left as it can be; the last piece has to be the end.
        let (middle, last) = rest.rsplit_once('*').unwrap_or(("", rest));
        for piece in middle.split('*') {
            let Some(at) = name.find(piece) else { return false };
            name = name.get(at + piece.len()..).unwrap_or_default();
        }
        name.ends_with(last)
    }

    /// As it was written.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// A name that fits, for those who have none to compare.
    #[must_use]
    pub fn example(&self) -> String {
        self.0.replace('*', "")
    }
}

impl FromStr for NamePattern {
    type Err = NoSuch;
    fn from_str(text: &str) -> Result<NamePattern, NoSuch> {
        let fine = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.' | '*');
        if !text.is_empty() && text.len() <= PATTERN_BYTES_MAX && text.chars().all(fine) {
            return Ok(NamePattern(text.to_owned()));
        }
        let wants = "1 to 64 letters, digits, '-', '_', '.', and '*' for any characters are needed, such as web-*";
        Err(NoSuch { text: text.chars().take(80).collect(), what: "pattern of names", wants })
    }
}

impl fmt::Display for Guests {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Guests::One(id) => write!(f, "the guest with id {id}"),
            Guests::Named(pattern) => write!(f, "guests called {}", pattern.as_str()),
        }
    }
}

impl Claims {
    /// Whether it is good once only: it names one guest.
    #[must_use]
    pub fn single_use(&self) -> bool {
        matches!(self.guests, Guests::One(_))
    }

    /// Whether the claims make sense together. Asked when a ticket is made, and again when one is verified.
    ///
    /// # Errors
    /// [`TicketRefusal::Senseless`].
    pub fn check(&self) -> Result<(), TicketRefusal> {
        let senseless = |words: String| Err(TicketRefusal::Senseless { words });
        let most = if self.single_use() { LIFE_MAX_S } else { STANDING_LIFE_MAX_S };
        match self.not_after.checked_sub(self.not_before) {
            None | Some(0) => senseless("it ends before it begins".into()),
            Some(life) if life > most => {
                senseless(format!("it lives {}, at most {} are accepted", verify::span(life), verify::span(most)))
            }
            Some(_) if self.source == self.destination => senseless("source and destination are the same host".into()),
            Some(_) if self.links.names().is_empty() => senseless("it names no link".into()),
            Some(_) => Ok(()),
        }
    }
}

impl Ticket {
    /// What it says. Nothing of it is to be believed before [`verify`].
    #[must_use]
    pub fn claims(&self) -> &Claims {
        &self.claims
    }
}

// Without the signature: whoever sees a log should not see a ticket that can be presented.
impl fmt::Debug for Ticket {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Ticket").field("claims", &self.claims).finish_non_exhaustive()
    }
}
