//! Who is who: hosts and operators by their public keys, guests, migrations and tickets by random identifiers.
//! No key material that is secret and no signature is made here.

use data_encoding::{BASE32_NOPAD, Encoding};
use serde::{Deserialize, Serialize};
use std::fmt;
use std::str::FromStr;

/// A host's identity: its Ed25519 public key, 32 bytes. Its text is base32 in lower case, 52 characters.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct HostId(pub [u8; 32]);

/// An operator's identity: the Ed25519 public key that tickets are checked with. Its text is like a host's; what is signed by
/// the one is never taken for something signed by the other.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct OperatorId(pub [u8; 32]);

/// A fleet's identity: the Ed25519 public key that statements about its hosts are checked with.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct FleetId(pub [u8; 32]);

/// What tells a ticket from every other: 16 random bytes chosen when it is made.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct Nonce(pub [u8; 16]);

/// A guest's identity, 16 random bytes chosen when it was first started; it never changes.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct VmId(pub [u8; 16]);

/// A migration's identity, 16 random bytes chosen by its source.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct MigrationId(pub [u8; 16]);

/// Which attempt at moving a guest this is: rises by one with every attempt, durably.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default, Serialize, Deserialize)]
pub struct Generation(pub u64);

/// Text that is no identity.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("\"{text}\" is no {what}: {wants}")]
pub struct IdentityError {
    text: String,
    what: &'static str,
    wants: &'static str,
}

const HEX: Encoding = data_encoding::HEXLOWER;

macro_rules! public_key {
    ($name:ident, $what:literal, $wants:literal) => {
        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(&BASE32_NOPAD.encode(&self.0).to_lowercase())
            }
        }

        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, concat!(stringify!($name), "({})"), self)
            }
        }

        impl FromStr for $name {
            type Err = IdentityError;
            fn from_str(text: &str) -> Result<$name, IdentityError> {
                let error = || IdentityError { text: text.chars().take(80).collect(), what: $what, wants: $wants };
                let plain: String = text.trim().chars().filter(|c| *c != '-').collect();
                let bytes = BASE32_NOPAD.decode(plain.to_uppercase().as_bytes()).map_err(|_| error())?;
                Ok($name(bytes.try_into().map_err(|_| error())?))
            }
        }
    };
}
public_key!(HostId, "host id", "52 letters and digits are needed, as `limosa host id` prints them");
public_key!(FleetId, "fleet id", "52 letters and digits are needed, as `limosa fleet id` prints them");
public_key!(OperatorId, "operator id", "52 letters and digits are needed, as `limosa operator id` prints them");

macro_rules! sixteen_bytes {
    ($name:ident, $what:literal) => {
        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(&HEX.encode(&self.0))
            }
        }

        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, concat!(stringify!($name), "({})"), self)
            }
        }

        impl FromStr for $name {
            type Err = IdentityError;
            fn from_str(text: &str) -> Result<$name, IdentityError> {
                let error = || IdentityError {
                    text: text.chars().take(80).collect(),
                    what: $what,
                    wants: "32 hexadecimal digits are needed",
                };
                let bytes = HEX.decode(text.trim().as_bytes()).map_err(|_| error())?;
                Ok($name(bytes.try_into().map_err(|_| error())?))
            }
        }
    };
}
sixteen_bytes!(VmId, "VM id");
sixteen_bytes!(MigrationId, "migration id");
sixteen_bytes!(Nonce, "nonce");

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn text_goes_there_and_back() {
        let id = HostId([7; 32]);
        assert_eq!(id.to_string().len(), 52);
        assert_eq!(id.to_string().parse::<HostId>().unwrap(), id);
        assert_eq!(VmId([9; 16]).to_string().parse::<VmId>().unwrap(), VmId([9; 16]));
        let error = "zz".parse::<MigrationId>().unwrap_err().to_string();
        assert!(error.contains("\"zz\" is no migration id"), "{error}");
    }
}
