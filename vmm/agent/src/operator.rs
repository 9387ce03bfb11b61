//! An operator's key, and what is made with it: tickets. It is a person's file and not a host's, and no agent needs it; what a
//! ticket is and when it is good is `limosa_proto::ticket`'s.

use limosa_link::{HostKey, HostKeyError};
use limosa_proto::identity::{HostId, Nonce, OperatorId};
use limosa_proto::ticket::{Action, Claims, Guests, Links, Ticket, TicketRefusal};
use ring::rand::{SecureRandom as _, SystemRandom};
use std::os::unix::fs::DirBuilderExt as _;
use std::path::{Path, PathBuf};

/// An operator's secret key. Its debug output does not show it.
#[derive(Debug)]
pub struct OperatorKey(HostKey);

/// What a ticket is to say; the key adds who says so.
#[derive(Debug, Clone)]
pub struct Order {
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
    /// Until when.
    pub not_after: u64,
}

/// Why there is no key, or no ticket.
#[derive(Debug, thiserror::Error)]
pub enum OperatorError {
    /// The key's file.
    #[error(transparent)]
    Key(#[from] HostKeyError),
    /// The directory for it.
    #[error("{directory}: no directory for the key: {cause}", directory = directory.display())]
    Directory {
        /// Which.
        directory: PathBuf,
        /// What the system said.
        cause: std::io::Error,
    },
    /// No randomness for the nonce.
    #[error("no ticket could be made: the system gives no random numbers")]
    Random,
    /// What was ordered makes no sense.
    #[error(transparent)]
    Refused(#[from] TicketRefusal),
}

impl OperatorKey {
    /// The key in `path`. It is made if there is nothing, with mode 0600, and its directory with mode 0700.
    ///
    /// # Errors
    /// The file cannot be read or written, is readable by others, or is no key.
    pub fn open(path: &Path) -> Result<OperatorKey, OperatorError> {
        if let Some(directory) = path.parent().filter(|directory| !directory.as_os_str().is_empty()) {
            let made = std::fs::DirBuilder::new().recursive(true).mode(0o700).create(directory);
            made.map_err(|cause| OperatorError::Directory { directory: directory.to_owned(), cause })?;
        }
        Ok(OperatorKey(HostKey::load_or_make(path)?))
    }

    /// The public half, which hosts are told to trust.
    #[must_use]
    pub fn id(&self) -> OperatorId {
        OperatorId(self.0.id().0)
    }

    /// The key itself, to be shown to agents that are commanded.
    pub(crate) fn key(&self) -> &HostKey {
        &self.0
    }

    /// Signs `message`, as [`HostKey::sign`].
    pub(crate) fn sign(&self, message: &[u8]) -> Result<[u8; 64], HostKeyError> {
        self.0.sign(message)
    }

    /// Makes a ticket with a new nonce.
    ///
    /// # Errors
    /// What is ordered makes no sense, or there is no randomness.
    pub fn ticket(&self, order: Order) -> Result<Ticket, OperatorError> {
        let mut nonce = [0; 16];
        SystemRandom::new().fill(&mut nonce).map_err(|_| OperatorError::Random)?;
        let Order { action, guests, source, destination, links, not_before, not_after } = order;
        let issuer = self.id();
        let nonce = Nonce(nonce);
        let claims = Claims { action, guests, source, destination, links, not_before, not_after, nonce, issuer };
        // Before signing, so that what is wrong is told rather than signed.
        claims.check()?;
        let signature = self.0.sign(&claims.to_sign())?;
        Ok(Ticket::sealed(claims, signature)?)
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use limosa_proto::identity::VmId;
    use limosa_proto::ticket::Link;
    use std::os::unix::fs::PermissionsExt as _;

    fn order() -> Order {
        Order {
            action: Action::Migrate,
            guests: Guests::One(VmId([1; 16])),
            source: HostId([2; 32]),
            destination: HostId([3; 32]),
            links: Links::of(&[Link::Tcp]),
            not_before: 1000,
            not_after: 1600,
        }
    }

    #[test]
    fn the_key_is_made_at_first_use_and_kept_to_its_owner() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("limosa/operator.key");
        let key = OperatorKey::open(&path).unwrap();
        let mode = |path: &Path| std::fs::metadata(path).unwrap().permissions().mode() & 0o777;
        assert_eq!((mode(&path), mode(path.parent().unwrap())), (0o600, 0o700));
        assert_eq!(OperatorKey::open(&path).unwrap().id(), key.id());
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o640)).unwrap();
        assert!(OperatorKey::open(&path).unwrap_err().to_string().contains("chmod 600"));
        // What is no key is not replaced by one.
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o600)).unwrap();
        std::fs::write(&path, "nonsense").unwrap();
        assert!(OperatorKey::open(&path).unwrap_err().to_string().contains("no Ed25519 key"));
        assert_eq!(std::fs::read(&path).unwrap(), b"nonsense");
    }

    #[test]
    fn tickets_are_signed_and_no_two_have_the_same_nonce() {
        let folder = tempfile::tempdir().unwrap();
        let key = OperatorKey::open(&folder.path().join("key")).unwrap();
        let (first, second) = (key.ticket(order()).unwrap(), key.ticket(order()).unwrap());
        assert_eq!((first.check_signature(), first.claims().issuer), (Ok(()), key.id()));
        assert_ne!(first.claims().nonce, second.claims().nonce);
        let error = key.ticket(Order { not_after: 999, ..order() }).unwrap_err();
        assert!(matches!(error, OperatorError::Refused(TicketRefusal::Senseless { .. })), "{error}");
    }
}
