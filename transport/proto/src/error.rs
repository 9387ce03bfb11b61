//! Errors by fault: whose they are decides what happens next. `Malformed` and `Violation` are the peer's, `Incompatible`
//! is nobody's, `Misuse` is our caller's. I/O errors are not here: this crate does none.

use crate::wire::code::Code;
use crate::wire::message::{Reason, Refusal};

/// Bytes that are not what they should be.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum Malformed {
    /// The first four bytes are none of ours.
    #[error("{what} begins with {found:#010x}, not with its magic number: the peer does not speak this protocol")]
    Magic {
        /// Which header.
        what: &'static str,
        /// What was there.
        found: u32,
    },
    /// A number beyond its limit.
    #[error("{what} is {found}, allowed is at most {limit}")]
    TooLarge {
        /// Which number.
        what: &'static str,
        /// What was there.
        found: u64,
        /// The limit.
        limit: u64,
    },
    /// A field that has no such value.
    #[error("{what} has the value {found}, which means nothing")]
    Value {
        /// Which field.
        what: &'static str,
        /// What was there.
        found: u64,
    },
    /// The checksum of a body disagrees.
    #[error("the body's checksum is {found:#010x}, its header says {said:#010x}")]
    Checksum {
        /// Computed.
        found: u32,
        /// Promised.
        said: u32,
    },
    /// A body that does not decode.
    #[error("a {what} message does not decode: {words}")]
    Body {
        /// Which message.
        what: &'static str,
        /// The decoder's words.
        words: String,
    },
    /// Fewer or more bytes than were promised.
    #[error("{what} has {found} bytes where {wanted} were promised")]
    Length {
        /// Of what.
        what: &'static str,
        /// How many there are.
        found: u64,
        /// How many there should be.
        wanted: u64,
    },
    /// Runs of pages that are empty, overlap, fall or lie outside the guest's memory.
    #[error("run {index} (page {first}, {count} pages) {words}")]
    Run {
        /// Which run, from zero.
        index: usize,
        /// Its first page.
        first: u64,
        /// How many pages.
        count: u64,
        /// What is wrong with it.
        words: &'static str,
    },
}

/// A peer that speaks the protocol and breaks it.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum Violation {
    /// A message that has no place in this state.
    #[error("{message} has no place in the state {state}")]
    OutOfPlace {
        /// Which message.
        message: &'static str,
        /// Our state.
        state: &'static str,
    },
    /// A frame or message of another migration, or of another generation of this one.
    #[error("{what} belongs to migration {found}, not to {wanted}")]
    Stranger {
        /// What kind of thing.
        what: &'static str,
        /// What it says: migration and generation.
        found: String,
        /// What it should say.
        wanted: String,
    },
    /// A number that disagrees with what was agreed or counted.
    #[error("{what} is {found}, expected was {wanted}")]
    Mismatch {
        /// Of what.
        what: &'static str,
        /// What the peer said.
        found: u64,
        /// What it should have been.
        wanted: u64,
    },
    /// A number beyond what may be asked for.
    #[error("{what} is {found}, allowed is at most {limit}")]
    Excess {
        /// Of what.
        what: &'static str,
        /// What the peer asked for.
        found: u64,
        /// The limit.
        limit: u64,
    },
}

/// What may be wrong with something that came from the wire.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum WireError {
    /// The bytes are wrong.
    #[error(transparent)]
    Malformed(#[from] Malformed),
    /// The bytes are right and the peer is wrong.
    #[error(transparent)]
    Violation(#[from] Violation),
}

/// All is well with the peer, and yet it cannot be done.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{}", words(.reasons))]
pub struct Incompatible {
    /// Every reason that was found, not only the first.
    pub reasons: Vec<Reason>,
}

/// Our own caller asked for something impossible.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum Misuse {
    /// A setting outside of its range.
    #[error("the setting {setting} is {found}; it must be {wants}")]
    Setting {
        /// Which one.
        setting: &'static str,
        /// What it is.
        found: String,
        /// What it should be.
        wants: &'static str,
    },
    /// A message that does not fit its limits.
    #[error("a {what} message is too large to be sent: {words}")]
    Message {
        /// Which message.
        what: &'static str,
        /// Why.
        words: String,
    },
    /// Text that is no network.
    #[error("\"{text}\" is no network: an address or ADDRESS/PREFIX is needed, for example 10.20.0.0/16 ({words})")]
    Network {
        /// What was given.
        text: String,
        /// Why it is none.
        words: String,
    },
    /// Text that is no address.
    #[error("\"{text}\" is no address: one such as 10.20.3.4 or fd00::1 is needed ({words})")]
    Address {
        /// What was given.
        text: String,
        /// Why it is none.
        words: String,
    },
}

/// What every error of this crate becomes on the wire. The one such map.
pub trait Coded: std::error::Error {
    /// The code to be sent to the peer.
    fn code(&self) -> Code;

    /// The words to be sent beside it.
    fn words(&self) -> String {
        self.to_string()
    }
}

impl Coded for Malformed {
    fn code(&self) -> Code {
        Code::Malformed
    }
}

impl Coded for Violation {
    fn code(&self) -> Code {
        Code::Violation
    }
}

impl Coded for WireError {
    fn code(&self) -> Code {
        match self {
            WireError::Malformed(error) => error.code(),
            WireError::Violation(error) => error.code(),
        }
    }
}

impl Coded for Incompatible {
    fn code(&self) -> Code {
        crate::compat::code(&self.reasons)
    }
}

impl Coded for Misuse {
    fn code(&self) -> Code {
        Code::Internal
    }
}

impl From<Incompatible> for Refusal {
    fn from(error: Incompatible) -> Refusal {
        Refusal { code: error.code(), reasons: error.reasons }
    }
}

/// The words of all reasons, joined.
pub(crate) fn words(reasons: &[Reason]) -> String {
    reasons.iter().map(|reason| reason.words.as_str()).collect::<Vec<_>>().join("; ")
}
