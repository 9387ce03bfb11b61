//! A fleet's key, and what is made with it: statements that a host is a member until a date. It is a person's file, like an
//! operator's key, and no agent needs it; agents are told its public half.

use crate::hosts::with_ports;
use crate::operator::{OperatorError, OperatorKey};
use limosa_proto::identity::{FleetId, HostId};
use limosa_proto::statement::Member;
use std::path::Path;

/// A fleet's secret key. Its debug output does not show it.
#[derive(Debug)]
pub struct FleetKey(OperatorKey);

impl FleetKey {
    /// The key in `path`, made if there is nothing, as an operator's.
    ///
    /// # Errors
    /// As [`OperatorKey::open`].
    pub fn open(path: &Path) -> Result<FleetKey, OperatorError> {
        OperatorKey::open(path).map(FleetKey)
    }

    /// The public half, for `[trust] fleet`.
    #[must_use]
    pub fn id(&self) -> FleetId {
        FleetId(self.0.id().0)
    }

    /// A line that says that this host is a member until `not_after`, in seconds since 1970.
    ///
    /// # Errors
    /// A name or an address that is none, in words.
    pub fn member(&self, name: &str, host: HostId, address: &str, not_after: u64) -> Result<String, String> {
        if !crate::config::plain_name(name) {
            return Err(format!("{name:?} is no name for a host: {}", crate::config::NAME_WANTS));
        }
        let address =
            with_ports(address).ok_or_else(|| format!("{address:?} is no address: ADDRESS or ADDRESS:PORT is needed"))?;
        let member = Member { host, name: name.to_owned(), address, not_after };
        let too_long = || "the name or the addresses are too long for a statement".to_owned();
        let signature = self.0.sign(&member.to_sign().ok_or_else(too_long)?).map_err(|e| e.to_string())?;
        member.text(&signature).ok_or_else(too_long)
    }
}
