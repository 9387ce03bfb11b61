//! What lanes say besides pages, as messages (SENDs): each is sealed with a key of its lane and direction, and numbered, so that
//! none can be forged, changed, replayed or left out unnoticed. They are not secret.
//!
//! Layout, little-endian: kind u8, zero u8, lane u16, length of the body u32, number u64, body, HMAC-SHA-256 of all before.

use ring::hmac;
use std::io;

/// Bytes before the body.
const HEADER_BYTES: usize = 16;
const TAG_BYTES: usize = 32;
/// What a message has besides its body.
pub(super) const SEAL_BYTES: usize = HEADER_BYTES + TAG_BYTES;

/// What a message is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Kind {
    /// Towards the destination: the next bytes of the lane's heads and hashes.
    Heads = 1,
    /// Towards the source: whether the lane was let in (8 bytes), then how many messages may come (u32), each how long (u32).
    Answer = 2,
    /// Towards the source: so many more messages (u32) may come.
    Credits = 3,
    /// Towards the source: every lane has reached the barrier of this round (u32).
    Passed = 4,
}

impl Kind {
    fn parse(number: u8) -> Option<Kind> {
        [Kind::Heads, Kind::Answer, Kind::Credits, Kind::Passed].into_iter().find(|kind| *kind as u8 == number)
    }
}

/// One direction of one lane: seals messages at one end and opens them at the other.
#[derive(Debug)]
pub(super) struct Seal {
    key: hmac::Key,
    lane: u16,
    /// The next message's.
    number: u64,
}

impl Seal {
    pub(super) fn new(key: &[u8; 32], lane: u16) -> Seal {
        Seal { key: hmac::Key::new(hmac::HMAC_SHA256, key), lane, number: 0 }
    }

    /// The next message.
    pub(super) fn seal(&mut self, kind: Kind, body: &[u8]) -> Vec<u8> {
        let mut out = Vec::with_capacity(body.len().saturating_add(SEAL_BYTES));
        out.extend_from_slice(&[kind as u8, 0]);
        out.extend_from_slice(&self.lane.to_le_bytes());
        out.extend_from_slice(&u32::try_from(body.len()).unwrap_or(u32::MAX).to_le_bytes());
        out.extend_from_slice(&self.number.to_le_bytes());
        out.extend_from_slice(body);
        let tag = hmac::sign(&self.key, &out);
        out.extend_from_slice(tag.as_ref());
        self.number = self.number.wrapping_add(1);
        out
    }

    /// Kind and body of the next message.
    ///
    /// # Errors
    /// It is not the next one of this lane, or was changed.
    pub(super) fn open<'a>(&mut self, message: &'a [u8]) -> io::Result<(Kind, &'a [u8])> {
        let wrong = |words: &str| io::Error::new(io::ErrorKind::InvalidData, format!("a message of the lane {words}"));
        let (sealed, tag) = message.split_last_chunk::<TAG_BYTES>().ok_or_else(|| wrong("is too short"))?;
        let (header, body) = sealed.split_first_chunk::<HEADER_BYTES>().ok_or_else(|| wrong("is too short"))?;
        if hmac::verify(&self.key, sealed, tag).is_err() {
            return Err(wrong("was changed on the way, or is not of this migration"));
        }
        let [kind, zero, l0, l1, b0, b1, b2, b3, number @ ..] = *header;
        let length = usize::try_from(u32::from_le_bytes([b0, b1, b2, b3])).unwrap_or(usize::MAX);
        if u16::from_le_bytes([l0, l1]) != self.lane || zero != 0 || length != body.len() {
            return Err(wrong("contradicts itself"));
        }
        if u64::from_le_bytes(number) != self.number {
            return Err(wrong("came out of its turn"));
        }
        self.number = self.number.wrapping_add(1);
        Ok((Kind::parse(kind).ok_or_else(|| wrong("is of no known kind"))?, body))
    }
}

/// The first number of a body, and what follows it.
pub(super) fn number(body: &[u8]) -> io::Result<(u32, &[u8])> {
    let (number, rest) = body
        .split_first_chunk::<4>()
        .ok_or_else(|| io::Error::new(io::ErrorKind::InvalidData, "a message of the lane is too short"))?;
    Ok((u32::from_le_bytes(*number), rest))
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    fn ends() -> (Seal, Seal) {
        (Seal::new(&[1; 32], 2), Seal::new(&[1; 32], 2))
    }

    #[test]
    fn messages_come_as_they_went() {
        let (mut from, mut to) = ends();
        for body in [&b""[..], b"x", &[7; 5000]] {
            let message = from.seal(Kind::Heads, body);
            assert_eq!(message.len(), body.len() + SEAL_BYTES);
            assert_eq!(to.open(&message).unwrap(), (Kind::Heads, body));
        }
    }

    #[test]
    fn changed_replayed_and_left_out_ones_are_noticed() {
        let (mut from, mut to) = ends();
        let first = from.seal(Kind::Passed, &1_u32.to_le_bytes());
        for at in 0..first.len() {
            let mut bent = first.clone();
            bent[at] ^= 0x10;
            assert!(to.open(&bent).is_err(), "byte {at}");
            assert!(to.open(&first[..at]).is_err(), "cut at {at}");
        }
        to.open(&first).unwrap();
        assert!(to.open(&first).unwrap_err().to_string().contains("turn"));
        let _lost = from.seal(Kind::Passed, &2_u32.to_le_bytes());
        assert!(to.open(&from.seal(Kind::Passed, &3_u32.to_le_bytes())).is_err());
    }

    #[test]
    fn another_lane_s_message_is_none_of_ours() {
        let message = Seal::new(&[1; 32], 3).seal(Kind::Heads, b"x");
        assert!(Seal::new(&[1; 32], 2).open(&message).is_err());
    }
}
