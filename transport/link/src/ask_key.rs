//! Which key a host shows, asked before anybody trusts it: for a person who compares it. Nothing is said to the host but the
//! beginning of a handshake, and nothing it shows is believed: that it *has* the key is proved only to who trusts it later.

use crate::Link as _;
use crate::connect::{ConnectError, TcpLink};
use crate::key::HostKey;
use crate::tls::{TlsError, TrustedHosts};
use crate::ways::Here;
use limosa_proto::identity::HostId;
use std::time::Duration;

/// How long it may be silent.
const SILENCE_MAX: Duration = Duration::from_secs(5);

/// The key that whoever answers at `destination` ("host:port") shows. It must allow our address.
///
/// # Errors
/// Nobody answers there, our address is not allowed there, or no key is shown.
pub async fn ask_key(destination: &str, key: &HostKey, here: Here) -> Result<HostId, ConnectError> {
    // No host has this key, and nobody is trusted: the handshake ends when the other has shown its own.
    let nobody = HostId([0; 32]);
    let link = TcpLink::new(destination.to_owned(), nobody, key.clone(), TrustedHosts::default(), SILENCE_MAX).with_here(here);
    match link.control().await {
        Err(ConnectError::Tls {
            error: TlsError::DestinationOther { found, .. } | TlsError::DestinationUntrusted(found),
            ..
        }) => Ok(found),
        Err(error) => Err(error),
        Ok(_) => Err(ConnectError::Tls { destination: destination.to_owned(), error: TlsError::NoHostKey }),
    }
}
