//! What can go wrong on either side of the plug, in words that say what, where and what to do.
//! Which of these a migration survives is decided by the agent, not here.

use crate::message::{Malformed, Status};
use std::io;

/// Why a request of the agent to a VMM failed, or a VMM could not be let in.
#[derive(Debug, thiserror::Error)]
pub enum PlugError {
    /// The operating system refused something.
    #[error("{doing}: {source}")]
    Io {
        /// What was being done.
        doing: &'static str,
        /// The system's error.
        source: io::Error,
    },
    /// The VMM is gone, or its connection was closed.
    #[error("{doing}: the VMM's connection is lost ({words})")]
    Lost {
        /// What was being done.
        doing: &'static str,
        /// Whether the VMM may have got the request, and done it.
        sent: bool,
        /// How it was noticed.
        words: String,
    },
    /// The VMM did not answer in time. The connection stays usable, and a late answer is ignored.
    #[error("{doing}: the VMM gave no answer within {waited_ms} ms")]
    Deadline {
        /// What was being done.
        doing: &'static str,
        /// How long it had.
        waited_ms: u128,
    },
    /// The VMM answered that it will not or cannot.
    #[error("{doing}: the VMM refused ({status}): {words}")]
    Refused {
        /// What was being done.
        doing: &'static str,
        /// Which kind of refusal.
        status: Status,
        /// The VMM's words.
        words: String,
    },
    /// The VMM sent something that is no message of the plug; its connection should be closed.
    #[error("{doing}: the VMM sent a malformed message: {source}")]
    Malformed {
        /// What was being done.
        doing: &'static str,
        /// What was wrong with it.
        source: Malformed,
    },
    /// Who connected is neither root nor the user that the agent runs as.
    #[error("process {pid} of user {uid} may not plug in: only root and user {own} may")]
    NotAllowed {
        /// Its process.
        pid: i32,
        /// Its user.
        uid: u32,
        /// The agent's user.
        own: u32,
    },
    /// The VMM speaks no version of the plug that this agent speaks.
    #[error("the VMM speaks plug versions {min} to {max}, this agent version {own}")]
    Version {
        /// The VMM's lowest.
        min: u16,
        /// The VMM's highest.
        max: u16,
        /// Ours.
        own: u16,
    },
}

impl PlugError {
    pub(crate) fn io(doing: &'static str) -> impl FnOnce(io::Error) -> PlugError {
        move |source| PlugError::Io { doing, source }
    }

    pub(crate) fn malformed(doing: &'static str) -> impl FnOnce(Malformed) -> PlugError {
        move |source| PlugError::Malformed { doing, source }
    }

    /// Whether the VMM answered that it does not support the request at all.
    #[must_use]
    pub fn is_unsupported(&self) -> bool {
        matches!(self, PlugError::Refused { status: Status::Unsupported | Status::UnknownKind, .. })
    }

    /// Whether the VMM surely has not done what it was asked: it was gone before, or says no.
    #[must_use]
    pub fn is_undone(&self) -> bool {
        matches!(self, PlugError::Lost { sent: false, .. } | PlugError::Refused { .. })
    }

    /// Whether the connection is of no more use.
    #[must_use]
    pub fn is_lost(&self) -> bool {
        matches!(self, PlugError::Lost { .. } | PlugError::Malformed { .. })
    }
}

/// Why a VMM's end of the plug stopped without the agent having said so.
#[derive(Debug, thiserror::Error)]
pub enum ServeError {
    /// What the VMM was started with makes no sense.
    #[error("cannot plug in: {0}")]
    Options(String),
    /// The operating system refused something that trying again does not mend.
    #[error("{doing}: {source}")]
    Io {
        /// What was being done.
        doing: &'static str,
        /// The system's error.
        source: io::Error,
    },
}
