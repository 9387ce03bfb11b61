//! Numbers that say why a migration was refused or aborted. Words for people travel beside them.

use serde::{Deserialize, Serialize};
use std::fmt;

macro_rules! codes {
    ($($(#[doc = $doc:literal])+ $name:ident = $number:literal, $id:literal;)+) => {
        /// Why a host refused or aborted. A number that this build does not know is kept as it is.
        #[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
        #[serde(from = "u16", into = "u16")]
        #[non_exhaustive]
        pub enum Code {
            $($(#[doc = $doc])+ $name,)+
            /// A code of a later version.
            Unknown(u16),
        }

        impl Code {
            /// Every code that this build knows.
            pub const ALL: &'static [Code] = &[$(Code::$name),+];

            /// Its stable id, for machines: lower case with hyphens.
            #[must_use]
            pub fn id(self) -> &'static str {
                match self { $(Code::$name => $id,)+ Code::Unknown(_) => "unknown" }
            }
        }

        impl From<u16> for Code {
            fn from(number: u16) -> Code {
                match number { $($number => Code::$name,)+ other => Code::Unknown(other) }
            }
        }

        impl From<Code> for u16 {
            fn from(code: Code) -> u16 {
                match code { $(Code::$name => $number,)+ Code::Unknown(number) => number }
            }
        }
    };
}

codes! {
    /// The source's address is not on the allow-list.
    NotAllowed = 1, "not-allowed";
    /// The peer's host key is not trusted.
    UnknownHost = 2, "unknown-host";
    /// No version of the protocol in common.
    Version = 3, "version";
    /// The guest's memory does not fit or is laid out as the destination cannot have it.
    Memory = 4, "memory";
    /// A network of the guest is missing.
    NetworkMissing = 5, "network-missing";
    /// A guest of that name or id is there already.
    NameTaken = 6, "name-taken";
    /// No room: memory, CPUs or a limit of the host.
    NoRoom = 7, "no-room";
    /// The host has as many migrations as it may, or has this guest in one already.
    Busy = 8, "busy";
    /// Plaintext lanes were asked for and are not allowed.
    PlaintextRefused = 9, "plaintext-refused";
    /// The VMM failed to do what it was asked.
    VmmFailed = 10, "vmm-failed";
    /// The guest cannot run there for another reason, given in words.
    Incompatible = 11, "incompatible";
    /// A person or program asked for it to be cancelled.
    Cancelled = 12, "cancelled";
    /// Something took longer than its deadline.
    Timeout = 13, "timeout";
    /// The peer sent bytes that are no message.
    Malformed = 14, "malformed";
    /// The peer broke the protocol.
    Violation = 15, "violation";
    /// The link to the peer was lost.
    LinkLost = 16, "link-lost";
    /// A fault of this program.
    Internal = 17, "internal";
    /// The guest writes faster than its memory can be sent.
    NotConverging = 18, "not-converging";
    /// The agent is shutting down.
    Shutdown = 19, "shutdown";
    /// The journal could not be written.
    Journal = 20, "journal";
    /// The link that was asked for is not to be had: no device, no permission, not configured.
    LinkUnavailable = 21, "link-unavailable";
    /// A page that arrived is not the page that was sent.
    PageCheck = 22, "page-check";
    /// Somebody else on the destination has the MAC of one of the guest's NICs.
    MacTaken = 23, "mac-taken";
    /// The guest's CPU is not one that the destination can give it.
    Cpu = 24, "cpu";
    /// A disk of the guest is missing at the destination, is another one, or is not allowed there.
    Disk = 27, "disk";
    /// The ticket is missing, or is not good for this; the reason's id says why.
    Ticket = 28, "ticket";
    /// The peer's key is an operator's, and an operator sends no guest.
    NotAHost = 29, "not-a-host";
}

impl fmt::Display for Code {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Code::Unknown(number) => write!(f, "code {number}"),
            known => f.write_str(known.id()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_go_there_and_back_and_unknown_ones_are_kept() {
        for code in Code::ALL {
            assert_eq!(Code::from(u16::from(*code)), *code);
        }
        assert_eq!(u16::from(Code::from(4711)), 4711);
        assert_eq!(Code::from(4711).to_string(), "code 4711");
        let ids: std::collections::BTreeSet<_> = Code::ALL.iter().map(|code| code.id()).collect();
        assert_eq!(ids.len(), Code::ALL.len());
    }
}
