//! Signed statements about hosts' keys, one line of text each: that a key came after another one of the same host, and that a
//! fleet's key vouches for a host until a date. They are no secrets and may come by any way; what they say is believed for
//! whose signature they have. Nothing is signed here, and no clock is read.

use crate::identity::{FleetId, HostId};
use data_encoding::BASE64URL_NOPAD;
use ring::signature::{ED25519, UnparsedPublicKey};
use std::fmt;

/// What the text of a succession begins with.
pub const SUCCESSION_PREFIX: &str = "limosa-succession-1.";
/// What the text of a member begins with.
pub const MEMBER_PREFIX: &str = "limosa-member-1.";
/// What the signed bytes begin with: no signature over anything else can be taken for one of these, not even TLS's.
const SUCCESSION_DOMAIN: &[u8] = b"limosa succession of a host key\0";
const MEMBER_DOMAIN: &[u8] = b"limosa member of a fleet\0";
/// Longest name of a host, and longest list of its addresses, in bytes.
const NAME_BYTES_MAX: usize = 63;
const ADDRESS_BYTES_MAX: usize = 255;
/// Bytes of the largest statement, and of its text, which is held against this before it is decoded.
const BYTES_MAX: usize = 32 + 8 + 2 + NAME_BYTES_MAX + ADDRESS_BYTES_MAX + 64;
const TEXT_BYTES_MAX: usize = SUCCESSION_PREFIX.len() + (BYTES_MAX * 4).div_ceil(3);

/// A host has a new key; its old one is good beside it until a date. Both keys have signed it: the old one says who comes after
/// it, the new one that it wants to, so that nobody is made another's successor.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Succession {
    /// The key until now.
    pub old: HostId,
    /// The key from now on.
    pub new: HostId,
    /// The last second since 1970 in which the old key is good.
    pub until: u64,
}

/// A fleet vouches for a host.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Member {
    /// Its key.
    pub host: HostId,
    /// What it is called.
    pub name: String,
    /// Where its agent listens, as for a trusted host.
    pub address: String,
    /// The last second since 1970 in which that holds.
    pub not_after: u64,
}

/// Either of them, with its signatures checked.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Statement {
    /// Believed by whoever trusts the old key.
    Succession(Succession),
    /// Believed by whoever trusts the fleet.
    Member(Member),
}

/// Why a text is no statement.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum StatementError {
    /// It is none.
    #[error("that is no statement about a host: {0}")]
    Malformed(String),
    /// It is not signed by whom it should be.
    #[error("the statement is not signed by {0}")]
    Signature(String),
    /// It is a fleet's, and no fleet is trusted.
    #[error("it is a statement of a fleet, and this host trusts no fleet ([trust] fleet)")]
    NoFleet,
}

fn malformed(words: impl Into<String>) -> StatementError {
    StatementError::Malformed(words.into())
}

impl Succession {
    /// What both keys sign.
    #[must_use]
    pub fn to_sign(&self) -> Vec<u8> {
        [SUCCESSION_DOMAIN, &self.body()].concat()
    }

    fn body(&self) -> Vec<u8> {
        [&self.old.0[..], &self.new.0, &self.until.to_le_bytes()].concat()
    }

    /// Its text, of the signatures of the old and the new key.
    #[must_use]
    pub fn text(&self, old: &[u8; 64], new: &[u8; 64]) -> String {
        let bytes = [&self.body()[..], old, new].concat();
        format!("{SUCCESSION_PREFIX}{}", BASE64URL_NOPAD.encode(&bytes))
    }

    fn read(bytes: &[u8]) -> Result<Succession, StatementError> {
        let mut fields = Fields(bytes);
        let (old, new) = (HostId(fields.take()?), HostId(fields.take()?));
        let succession = Succession { old, new, until: u64::from_le_bytes(fields.take()?) };
        let (by_old, by_new): ([u8; 64], [u8; 64]) = (fields.take()?, fields.take()?);
        fields.end()?;
        if old == new {
            return Err(malformed("a key does not come after itself"));
        }
        signed(&old.0, &succession.to_sign(), &by_old, || format!("the old key {old}"))?;
        signed(&new.0, &succession.to_sign(), &by_new, || format!("the new key {new}"))?;
        Ok(succession)
    }
}

impl Member {
    /// What the fleet's key signs; none if its name or address is too long for a statement.
    #[must_use]
    pub fn to_sign(&self) -> Option<Vec<u8>> {
        Some([MEMBER_DOMAIN, &self.body()?].concat())
    }

    fn body(&self) -> Option<Vec<u8>> {
        let length = |text: &str, most: usize| u8::try_from(text.len()).ok().filter(|_| (1..=most).contains(&text.len()));
        let name = [length(&self.name, NAME_BYTES_MAX)?];
        let address = [length(&self.address, ADDRESS_BYTES_MAX)?];
        let parts =
            [&self.host.0[..], &self.not_after.to_le_bytes(), &name, self.name.as_bytes(), &address, self.address.as_bytes()];
        Some(parts.concat())
    }

    /// Its text, of the fleet's signature; none as for [`Member::to_sign`].
    #[must_use]
    pub fn text(&self, signature: &[u8; 64]) -> Option<String> {
        let bytes = [&self.body()?[..], signature].concat();
        Some(format!("{MEMBER_PREFIX}{}", BASE64URL_NOPAD.encode(&bytes)))
    }

    fn read(bytes: &[u8], fleet: Option<FleetId>) -> Result<Member, StatementError> {
        let mut fields = Fields(bytes);
        let (host, not_after) = (HostId(fields.take()?), u64::from_le_bytes(fields.take()?));
        let (name, address) = (fields.text()?, fields.text()?);
        let signature: [u8; 64] = fields.take()?;
        fields.end()?;
        let member = Member { host, name, address, not_after };
        let fleet = fleet.ok_or(StatementError::NoFleet)?;
        let to_sign = member.to_sign().ok_or_else(|| malformed("its name or address is too long"))?;
        signed(&fleet.0, &to_sign, &signature, || format!("the fleet {fleet}"))?;
        Ok(member)
    }
}

fn signed(key: &[u8; 32], message: &[u8], signature: &[u8; 64], whom: impl FnOnce() -> String) -> Result<(), StatementError> {
    UnparsedPublicKey::new(&ED25519, key).verify(message, signature).map_err(|_| StatementError::Signature(whom()))
}

impl Statement {
    /// Reads one line and checks who has signed it; white space around it is not part of it. That whoever signed it is trusted,
    /// and that the time has not passed, is looked at elsewhere: of a member `fleet` is the one that counts.
    ///
    /// # Errors
    /// It is none, or it is not signed.
    pub fn parse(text: &str, fleet: Option<FleetId>) -> Result<Statement, StatementError> {
        let text = text.trim();
        if text.len() > TEXT_BYTES_MAX {
            return Err(malformed(format!("it has {} characters, at most {TEXT_BYTES_MAX} are possible", text.len())));
        }
        let decode = |body: &str| BASE64URL_NOPAD.decode(body.as_bytes()).map_err(|error| malformed(error.to_string()));
        if let Some(body) = text.strip_prefix(SUCCESSION_PREFIX) {
            return Succession::read(&decode(body)?).map(Statement::Succession);
        }
        match text.strip_prefix(MEMBER_PREFIX) {
            Some(body) => Member::read(&decode(body)?, fleet).map(Statement::Member),
            None => Err(malformed(format!("it begins neither with \"{SUCCESSION_PREFIX}\" nor with \"{MEMBER_PREFIX}\""))),
        }
    }
}

impl fmt::Display for Member {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} at {} has the key {}", self.name, self.address, self.host)
    }
}

/// The bytes that are still to be read.
struct Fields<'t>(&'t [u8]);

impl<'t> Fields<'t> {
    fn some(&mut self, length: usize) -> Result<&'t [u8], StatementError> {
        let (field, rest) = self.0.split_at_checked(length).ok_or_else(|| malformed("it is cut off"))?;
        self.0 = rest;
        Ok(field)
    }

    fn take<const N: usize>(&mut self) -> Result<[u8; N], StatementError> {
        let mut field = [0; N];
        field.copy_from_slice(self.some(N)?);
        Ok(field)
    }

    fn text(&mut self) -> Result<String, StatementError> {
        let [length] = self.take()?;
        let text = std::str::from_utf8(self.some(length.into())?).map_err(|_| malformed("a text in it is none"))?;
        let plain = !text.is_empty() && text.chars().all(|c| c.is_ascii_graphic() && !matches!(c, '"' | '\\'));
        if plain { Ok(text.to_owned()) } else { Err(malformed("a name or address in it is none")) }
    }

    fn end(&self) -> Result<(), StatementError> {
        if self.0.is_empty() { Ok(()) } else { Err(malformed(format!("{} bytes follow its end", self.0.len()))) }
    }
}
