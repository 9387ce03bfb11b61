//! A ticket's bytes and text: a fixed layout with one reading, so that equal claims have equal bytes and nothing is left over.
//! What the claims are good for is `verify`'s.

use super::{Action, Claims, Guests, Links, NamePattern, PATTERN_BYTES_MAX, Ticket, TicketRefusal};
use crate::identity::{HostId, Nonce, OperatorId, VmId};
use crate::wire::limits;
use data_encoding::BASE64URL_NOPAD;
use ring::signature::{ED25519, UnparsedPublicKey};
use serde::{Deserialize, Serialize};

/// Version of the layout, the first byte and part of [`PREFIX`].
pub const VERSION: u8 = 1;
/// What a ticket's text begins with.
pub const PREFIX: &str = "limosa-ticket-1.";
/// What every version's text begins with.
const PREFIX_ANY: &str = "limosa-ticket-";
/// What the signed bytes begin with: no signature over anything else can be taken for a ticket's, not even TLS's.
const DOMAIN: &[u8] = b"limosa ticket, signed by an operator\0";
/// Bytes before the guests.
const HEAD_BYTES: usize = 4 + 32 + 32 + 8 + 8 + 16 + 32 + 1;
const SIGNATURE_BYTES: usize = 64;
/// Bytes of the largest ticket.
pub const BYTES_MAX: usize = HEAD_BYTES + PATTERN_BYTES_MAX + SIGNATURE_BYTES;
/// Bytes of the longest text, which is held against this before it is decoded.
pub const TEXT_BYTES_MAX: usize = PREFIX.len() + (BYTES_MAX * 4).div_ceil(3);

const ONE: u8 = 0;
const NAMED: u8 = 1;

/// The number of an action.
const ACTIONS: [(Action, u8); 2] = [(Action::Migrate, 1), (Action::Check, 2)];

/// A ticket as it is on its way to a destination: bytes that nobody has looked at but for their number. Its debug output does
/// not show them.
#[derive(Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct TicketBytes(
    #[serde(serialize_with = "limits::emit_bytes", deserialize_with = "limits::bytes::<_, BYTES_MAX>")] Vec<u8>,
);

impl std::fmt::Debug for TicketBytes {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "TicketBytes({} bytes)", self.0.len())
    }
}

impl From<&Ticket> for TicketBytes {
    fn from(ticket: &Ticket) -> TicketBytes {
        TicketBytes(ticket.emit())
    }
}

impl TicketBytes {
    /// Bytes of whatever kind, for those who would show a destination something else.
    #[must_use]
    pub fn of(bytes: Vec<u8>) -> TicketBytes {
        TicketBytes(bytes)
    }

    /// The ticket that they are.
    ///
    /// # Errors
    /// They are none, or one of another version.
    pub fn parse(&self) -> Result<Ticket, TicketRefusal> {
        Ticket::decode(&self.0)
    }
}

impl Claims {
    /// What the issuer signs.
    #[must_use]
    pub fn to_sign(&self) -> Vec<u8> {
        let mut signed = DOMAIN.to_vec();
        self.emit(&mut signed);
        signed
    }

    fn emit(&self, to: &mut Vec<u8>) {
        let action = ACTIONS.iter().find(|(action, _)| *action == self.action).map_or(0, |(_, number)| *number);
        let (kind, guests): (u8, &[u8]) = match &self.guests {
            Guests::One(id) => (ONE, &id.0),
            Guests::Named(pattern) => (NAMED, pattern.as_str().as_bytes()),
        };
        to.extend([VERSION, action, self.links.0, kind]);
        to.extend(self.source.0);
        to.extend(self.destination.0);
        to.extend(self.not_before.to_le_bytes());
        to.extend(self.not_after.to_le_bytes());
        to.extend(self.nonce.0);
        to.extend(self.issuer.0);
        // A pattern has at most 64 bytes.
        to.push(u8::try_from(guests.len()).unwrap_or(u8::MAX));
        to.extend(guests);
    }
}

impl Ticket {
    /// The claims with the issuer's signature of [`Claims::to_sign`].
    ///
    /// # Errors
    /// Claims that make no sense together, or a signature that is not the issuer's.
    pub fn sealed(claims: Claims, signature: [u8; 64]) -> Result<Ticket, TicketRefusal> {
        claims.check()?;
        let ticket = Ticket { claims, signature };
        ticket.check_signature()?;
        Ok(ticket)
    }

    /// Whether the issuer that it names has signed it. Not whether that issuer is to be trusted.
    ///
    /// # Errors
    /// [`TicketRefusal::Signature`].
    pub fn check_signature(&self) -> Result<(), TicketRefusal> {
        let key = UnparsedPublicKey::new(&ED25519, self.claims.issuer.0);
        let checked = key.verify(&self.claims.to_sign(), &self.signature);
        checked.map_err(|_| TicketRefusal::Signature { issuer: self.claims.issuer })
    }

    /// Its bytes.
    #[must_use]
    pub fn emit(&self) -> Vec<u8> {
        let mut bytes = Vec::with_capacity(BYTES_MAX);
        self.claims.emit(&mut bytes);
        bytes.extend(self.signature);
        bytes
    }

    /// Its text: one line, for people, files and CI.
    #[must_use]
    pub fn text(&self) -> String {
        format!("{PREFIX}{}", BASE64URL_NOPAD.encode(&self.emit()))
    }

    /// Reads a text; white space around it is not part of it.
    ///
    /// # Errors
    /// No ticket, or one of another version.
    pub fn parse(text: &str) -> Result<Ticket, TicketRefusal> {
        let text = text.trim();
        let malformed = |words: String| TicketRefusal::Malformed { words };
        if text.len() > TEXT_BYTES_MAX {
            return Err(malformed(format!("it has {} characters, at most {TEXT_BYTES_MAX} are possible", text.len())));
        }
        let Some(body) = text.strip_prefix(PREFIX) else {
            let version = text.strip_prefix(PREFIX_ANY).and_then(|rest| rest.split_once('.')).map(|(version, _)| version);
            return Err(match version.filter(|version| version.len() <= 3 && version.bytes().all(|b| b.is_ascii_digit())) {
                Some(found) => TicketRefusal::Version { found: found.to_owned() },
                None => malformed(format!("it does not begin with \"{PREFIX}\"")),
            });
        };
        let bytes = BASE64URL_NOPAD.decode(body.as_bytes()).map_err(|error| {
            malformed(format!("character {} is wrong, or something is missing at its end", PREFIX.len() + error.position + 1))
        })?;
        Ticket::decode(&bytes)
    }

    /// Reads its bytes, all of them.
    ///
    /// # Errors
    /// No ticket, or one of another version.
    pub fn decode(bytes: &[u8]) -> Result<Ticket, TicketRefusal> {
        if let Some(found) = bytes.first().filter(|version| **version != VERSION) {
            return Err(TicketRefusal::Version { found: found.to_string() });
        }
        let mut fields = Fields(bytes);
        let [_, action, links, kind] = fields.take()?;
        let (source, destination) = (HostId(fields.take()?), HostId(fields.take()?));
        let (not_before, not_after) = (u64::from_le_bytes(fields.take()?), u64::from_le_bytes(fields.take()?));
        let (nonce, issuer) = (Nonce(fields.take()?), OperatorId(fields.take()?));
        let [length] = fields.take()?;
        let guests = match (kind, length) {
            (ONE, 16) => Guests::One(VmId(fields.take()?)),
            (NAMED, length) => Guests::Named(fields.pattern(length.into())?),
            _ => return Err(meaningless("the kind of its guests", kind)),
        };
        let signature = fields.take()?;
        if !fields.0.is_empty() {
            let words = format!("{} bytes follow its end", fields.0.len());
            return Err(TicketRefusal::Malformed { words });
        }
        let action = ACTIONS.iter().find(|(_, number)| *number == action).ok_or_else(|| meaningless("its action", action))?.0;
        if links > Links::ALL.0 {
            return Err(meaningless("its links", links));
        }
        let claims = Claims { action, guests, source, destination, links: Links(links), not_before, not_after, nonce, issuer };
        Ok(Ticket { claims, signature })
    }
}

fn meaningless(what: &str, number: u8) -> TicketRefusal {
    TicketRefusal::Malformed { words: format!("{what} has the value {number}, which means nothing to this build") }
}

/// The bytes that are still to be read.
struct Fields<'t>(&'t [u8]);

impl<'t> Fields<'t> {
    fn some(&mut self, length: usize) -> Result<&'t [u8], TicketRefusal> {
        let cut = TicketRefusal::Malformed { words: "it is cut off".into() };
        let (field, rest) = self.0.split_at_checked(length).ok_or(cut)?;
        self.0 = rest;
        Ok(field)
    }

    fn take<const N: usize>(&mut self) -> Result<[u8; N], TicketRefusal> {
        let mut field = [0; N];
        field.copy_from_slice(self.some(N)?);
        Ok(field)
    }

    fn pattern(&mut self, length: usize) -> Result<NamePattern, TicketRefusal> {
        let text = std::str::from_utf8(self.some(length)?).ok().and_then(|text| text.parse().ok());
        text.ok_or_else(|| TicketRefusal::Malformed { words: "its pattern of names is none".into() })
    }
}
