//! A secret key: an Ed25519 pair, its file, its public half. A host has one, and an operator has one of the same kind for
//! signing tickets. Nothing here speaks to anybody.

use crate::tls::TlsError;
use limosa_proto::identity::HostId;
use ring::signature::{Ed25519KeyPair, KeyPair};
use rustls::pki_types::{CertificateDer, PrivatePkcs8KeyDer};
use rustls::sign::CertifiedKey;
use std::io::{self, Read as _, Write as _};
use std::os::unix::fs::{OpenOptionsExt as _, PermissionsExt as _};
use std::path::Path;
use std::sync::{Arc, OnceLock, PoisonError, RwLock};
use zeroize::Zeroizing;

/// DER of an Ed25519 SubjectPublicKeyInfo up to the 32 bytes of the key (RFC 8410).
pub(crate) const SPKI_PREFIX: [u8; 12] = [0x30, 0x2a, 0x30, 0x05, 0x06, 0x03, 0x2b, 0x65, 0x70, 0x03, 0x21, 0x00];
/// Largest key file that is read. An Ed25519 PKCS#8 document is 83 bytes.
const KEY_FILE_BYTES_MAX: u64 = 4096;

/// A secret Ed25519 key, of a host, of an operator or of a fleet. Its debug output and its errors never show it, and its bytes
/// are overwritten when the last clone is dropped. Clones are the same key, also after [`HostKey::become_key`].
#[derive(Clone)]
pub struct HostKey(Arc<RwLock<Secret>>);

#[derive(Clone)]
struct Secret {
    pkcs8: Arc<Zeroizing<Vec<u8>>>,
    id: HostId,
    /// As rustls wants it, made when it is first needed: to make it costs as much as a signature, and a copy of the secret.
    certified: Arc<OnceLock<Arc<CertifiedKey>>>,
}

/// Why there is no key.
#[derive(Debug, thiserror::Error)]
pub enum HostKeyError {
    /// The system gave no randomness.
    #[error("no key could be made: the system gives no random numbers")]
    Random,
    /// The bytes are no Ed25519 key.
    #[error("{from} is no Ed25519 key in PKCS#8; move it away and a new one is made")]
    Format {
        /// Which file or input.
        from: String,
    },
    /// Others can read the file.
    #[error("{path} can be read by others (mode {mode:o}); a key needs mode 600: `chmod 600 {path}`")]
    Mode {
        /// Which file.
        path: String,
        /// Its mode.
        mode: u32,
    },
    /// The file cannot be read or written.
    #[error("cannot {doing} key {path}: {error}")]
    Io {
        /// "read" or "write".
        doing: &'static str,
        /// Which file.
        path: String,
        /// What the system said.
        error: io::Error,
    },
}

impl std::fmt::Debug for HostKey {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "HostKey({})", self.id())
    }
}

impl HostKey {
    /// Makes a new key.
    ///
    /// # Errors
    /// [`HostKeyError::Random`].
    pub fn generate() -> Result<HostKey, HostKeyError> {
        let random = ring::rand::SystemRandom::new();
        let document = Ed25519KeyPair::generate_pkcs8(&random).map_err(|_| HostKeyError::Random)?;
        HostKey::parse(document.as_ref(), "the new key")
    }

    /// Takes a PKCS#8 document as [`HostKey::save`] writes it.
    ///
    /// # Errors
    /// [`HostKeyError::Format`].
    pub fn from_pkcs8(bytes: &[u8]) -> Result<HostKey, HostKeyError> {
        HostKey::parse(bytes, "the key given")
    }

    /// Reads `path`, which must be readable by its owner only.
    ///
    /// # Errors
    /// Unreadable, readable by others, or not a key.
    pub fn load(path: &Path) -> Result<HostKey, HostKeyError> {
        let shown = path.display().to_string();
        let io = |error| HostKeyError::Io { doing: "read", path: shown.clone(), error };
        let file = std::fs::File::open(path).map_err(io)?;
        let mode = file.metadata().map_err(io)?.permissions().mode() & 0o777;
        if mode & 0o077 != 0 {
            return Err(HostKeyError::Mode { path: shown, mode });
        }
        let mut bytes = Zeroizing::new(Vec::with_capacity(KEY_FILE_BYTES_MAX as usize));
        file.take(KEY_FILE_BYTES_MAX).read_to_end(&mut bytes).map_err(io)?;
        HostKey::parse(&bytes, &shown)
    }

    /// Writes a new file `path` with mode 0600, durably; an existing file is not overwritten.
    ///
    /// # Errors
    /// [`HostKeyError::Io`].
    pub fn save(&self, path: &Path) -> Result<(), HostKeyError> {
        let io = |error| HostKeyError::Io { doing: "write", path: path.display().to_string(), error };
        let mut file = std::fs::OpenOptions::new().write(true).create_new(true).mode(0o600).open(path).map_err(io)?;
        file.write_all(&self.secret().pkcs8).and_then(|()| file.sync_all()).map_err(io)
    }

    /// The public half.
    #[must_use]
    pub fn id(&self) -> HostId {
        self.secret().id
    }

    /// From now on every clone of this is `other`: what is open goes on with the key that it has, what comes meets the new one.
    pub fn become_key(&self, other: &HostKey) {
        let other = other.secret();
        *self.0.write().unwrap_or_else(PoisonError::into_inner) = other;
    }

    fn secret(&self) -> Secret {
        self.0.read().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Reads `path`, or makes a key there if there is nothing: at the first use.
    ///
    /// # Errors
    /// As [`HostKey::load`] and [`HostKey::save`].
    pub fn load_or_make(path: &Path) -> Result<HostKey, HostKeyError> {
        match HostKey::load(path) {
            Err(HostKeyError::Io { error, .. }) if error.kind() == io::ErrorKind::NotFound => {}
            loaded => return loaded,
        }
        let key = HostKey::generate()?;
        match key.save(path) {
            Err(HostKeyError::Io { error, .. }) if error.kind() == io::ErrorKind::AlreadyExists => HostKey::load(path),
            saved => saved.map(|()| key),
        }
    }

    /// Signs `message`, which must begin with words that nothing else signed by this kind of key begins with.
    ///
    /// # Errors
    /// [`HostKeyError::Format`]; not for a key that was made or loaded.
    pub fn sign(&self, message: &[u8]) -> Result<[u8; 64], HostKeyError> {
        let format = || HostKeyError::Format { from: "the key".into() };
        let pair = Ed25519KeyPair::from_pkcs8(&self.secret().pkcs8).map_err(|_| format())?;
        pair.sign(message).as_ref().try_into().map_err(|_| format())
    }

    fn parse(bytes: &[u8], from: &str) -> Result<HostKey, HostKeyError> {
        let format = || HostKeyError::Format { from: from.to_owned() };
        let pair = Ed25519KeyPair::from_pkcs8(bytes).map_err(|_| format())?;
        let id = HostId(pair.public_key().as_ref().try_into().map_err(|_| format())?);
        let pkcs8 = Arc::new(Zeroizing::new(bytes.to_vec()));
        Ok(HostKey(Arc::new(RwLock::new(Secret { pkcs8, id, certified: Arc::default() }))))
    }

    pub(crate) fn certified(&self) -> Result<Arc<CertifiedKey>, TlsError> {
        let secret = self.secret();
        if let Some(made) = secret.certified.get() {
            return Ok(made.clone());
        }
        let der = PrivatePkcs8KeyDer::from(secret.pkcs8.as_slice());
        let key = rustls::crypto::ring::sign::any_eddsa_type(&der)?;
        let public = CertificateDer::from([&SPKI_PREFIX[..], &secret.id.0].concat());
        Ok(secret.certified.get_or_init(|| Arc::new(CertifiedKey::new(vec![public], key))).clone())
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn a_key_is_kept_to_its_owner() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("host.key");
        let key = HostKey::generate().unwrap();
        key.save(&path).unwrap();
        assert_eq!(std::fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
        assert_eq!(HostKey::load(&path).unwrap().id(), key.id());
        assert!(matches!(key.save(&path), Err(HostKeyError::Io { doing: "write", .. })), "an existing key was overwritten");
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o644)).unwrap();
        assert!(HostKey::load(&path).unwrap_err().to_string().contains("chmod 600"));
        assert!(matches!(HostKey::from_pkcs8(b"nonsense"), Err(HostKeyError::Format { .. })));
        assert_eq!(format!("{key:?}"), format!("HostKey({})", key.id()));
    }

    #[test]
    fn a_key_that_becomes_another_does_so_everywhere() {
        let (key, next) = (HostKey::generate().unwrap(), HostKey::generate().unwrap());
        let (clone, old) = (key.clone(), key.id());
        key.become_key(&next);
        assert_eq!((clone.id(), key.id()), (next.id(), next.id()));
        assert_ne!(clone.id(), old);
        let signature = clone.sign(b"words").unwrap();
        let public = ring::signature::UnparsedPublicKey::new(&ring::signature::ED25519, next.id().0);
        assert!(public.verify(b"words", &signature).is_ok());
        // A later change of the other is none of this one.
        next.become_key(&HostKey::generate().unwrap());
        assert_ne!(clone.id(), next.id());
    }
}
