//! What a source shows when it asks for a lane, what a refusal says, and the keys that both ends make of the lane's token. The
//! token itself never travels here: the fabric can be overheard.

use super::VERSION;
use crate::sessions::{LANE_ANSWER_BYTES, emit_lane_answer, parse_lane_answer};
use limosa_proto::identity::{Generation, MigrationId};
use limosa_proto::wire::code::Code;
use limosa_proto::wire::frame::{LanePreamble, LaneToken};
use limosa_proto::wire::limits::fit;
use limosa_verbs::PRIVATE_DATA_REJECT_MAX;
use ring::hmac;

/// First four bytes of a request: "LMSR".
const MAGIC: [u8; 4] = *b"LMSR";
/// Length of a request; the handshake carries one byte more.
const REQUEST_BYTES: usize = 54;

/// Which lane of which migration asks to come in, and the proof that it may.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct LaneRequest {
    pub(super) version: u8,
    pub(super) lane: u16,
    pub(super) migration: MigrationId,
    proof: [u8; 32],
}

impl LaneRequest {
    pub(super) fn new(preamble: &LanePreamble) -> LaneRequest {
        let LanePreamble { lane, migration, generation, token, .. } = *preamble;
        let made = hmac::sign(&key(&token), &proven(VERSION, lane, migration, generation));
        let mut proof = [0; 32];
        proof.iter_mut().zip(made.as_ref()).for_each(|(to, from)| *to = *from);
        LaneRequest { version: VERSION, lane, migration, proof }
    }

    /// Whether it knows `token`. Takes as long for any wrong proof.
    pub(super) fn knows(&self, token: &LaneToken, generation: Generation) -> bool {
        hmac::verify(&key(token), &proven(self.version, self.lane, self.migration, generation), &self.proof).is_ok()
    }

    pub(super) fn emit(&self) -> Vec<u8> {
        let mut out = Vec::with_capacity(REQUEST_BYTES);
        out.extend_from_slice(&MAGIC);
        // Lanes are few, see LANES_MAX; one that did not fit would prove nothing.
        out.extend_from_slice(&[self.version, u8::try_from(self.lane).unwrap_or(u8::MAX)]);
        out.extend_from_slice(&self.migration.0);
        out.extend_from_slice(&self.proof);
        out
    }

    /// `None` if it is no such request.
    pub(super) fn parse(bytes: &[u8]) -> Option<LaneRequest> {
        let ([magic @ .., version, lane], rest) = bytes.split_first_chunk::<6>()?;
        let (migration, rest) = rest.split_first_chunk::<16>()?;
        let proof = <[u8; 32]>::try_from(rest).ok()?;
        (*magic == MAGIC).then_some(LaneRequest {
            version: *version,
            lane: u16::from(*lane),
            migration: MigrationId(*migration),
            proof,
        })
    }
}

fn key(token: &LaneToken) -> hmac::Key {
    hmac::Key::new(hmac::HMAC_SHA256, &token.0)
}

fn proven(version: u8, lane: u16, migration: MigrationId, generation: Generation) -> Vec<u8> {
    let mut all = b"limosa rdma lane".to_vec();
    all.push(version);
    all.extend_from_slice(&lane.to_le_bytes());
    all.extend_from_slice(&migration.0);
    all.extend_from_slice(&generation.0.to_le_bytes());
    all
}

/// A key of its own for each `purpose` of one attempt of one migration.
pub(super) fn derive(token: &LaneToken, purpose: &str, preamble: (MigrationId, Generation), lane: u16) -> [u8; 32] {
    let mut all = purpose.as_bytes().to_vec();
    all.push(0);
    all.extend_from_slice(&lane.to_le_bytes());
    all.extend_from_slice(&preamble.0.0);
    all.extend_from_slice(&preamble.1.0.to_le_bytes());
    let made = hmac::sign(&key(token), &all);
    let mut out = [0; 32];
    out.iter_mut().zip(made.as_ref()).for_each(|(to, from)| *to = *from);
    out
}

/// A refusal: the code and as many words as the handshake carries.
pub(super) fn emit_refusal(code: Code, words: &str) -> Vec<u8> {
    let mut out = emit_lane_answer(Some(code)).to_vec();
    out.extend_from_slice(fit(words, PRIVATE_DATA_REJECT_MAX.saturating_sub(LANE_ANSWER_BYTES)).as_bytes());
    out
}

/// The code and the words of a refusal; [`Code::Malformed`] if it is none of ours.
pub(super) fn parse_refusal(bytes: &[u8]) -> (Code, String) {
    let Some((answer, words)) = bytes.split_first_chunk::<LANE_ANSWER_BYTES>() else { return (Code::Malformed, String::new()) };
    // Padded with zeros; what is not printed would only confuse.
    let words = String::from_utf8_lossy(words).chars().filter(|character| !character.is_control()).collect();
    (parse_lane_answer(answer).unwrap_or(Code::Malformed), words)
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    fn preamble() -> LanePreamble {
        LanePreamble {
            version: 1,
            lane: 3,
            migration: MigrationId([9; 16]),
            generation: Generation(4),
            token: LaneToken([7; 32]),
        }
    }

    #[test]
    fn a_request_goes_there_and_back_and_is_bound_to_all_that_it_names() {
        let request = LaneRequest::new(&preamble());
        let bytes = request.emit();
        assert_eq!(bytes.len(), REQUEST_BYTES);
        assert!(!bytes.windows(8).any(|part| part == [7; 8]), "the token travels");
        let parsed = LaneRequest::parse(&bytes).unwrap();
        assert_eq!(parsed, request);
        assert!(parsed.knows(&LaneToken([7; 32]), Generation(4)));
        assert!(!parsed.knows(&LaneToken([8; 32]), Generation(4)));
        assert!(!parsed.knows(&LaneToken([7; 32]), Generation(5)));
        for at in 4..REQUEST_BYTES {
            let mut bent = bytes.clone();
            bent[at] ^= 1;
            assert!(!LaneRequest::parse(&bent).unwrap().knows(&LaneToken([7; 32]), Generation(4)), "byte {at}");
        }
    }

    #[test]
    fn short_or_foreign_bytes_are_no_request() {
        let bytes = LaneRequest::new(&preamble()).emit();
        assert!((0..REQUEST_BYTES).all(|cut| LaneRequest::parse(&bytes[..cut]).is_none()));
        assert!(LaneRequest::parse(&[0; REQUEST_BYTES]).is_none());
    }

    #[test]
    fn a_refusal_keeps_its_code_and_what_fits_of_its_words() {
        let mut bytes = emit_refusal(Code::NotAllowed, &"too long ".repeat(100));
        assert!(bytes.len() <= PRIVATE_DATA_REJECT_MAX);
        bytes.resize(PRIVATE_DATA_REJECT_MAX, 0);
        let (code, words) = parse_refusal(&bytes);
        assert_eq!(code, Code::NotAllowed);
        assert!(words.starts_with("too long") && !words.contains('\0'));
        assert_eq!(parse_refusal(b"").0, Code::Malformed);
    }

    #[test]
    fn keys_differ_by_purpose_and_lane() {
        let of = |purpose, lane| derive(&LaneToken([7; 32]), purpose, (MigrationId([9; 16]), Generation(4)), lane);
        assert_ne!(of("a", 0), of("b", 0));
        assert_ne!(of("a", 0), of("a", 1));
        assert_eq!(of("a", 0), of("a", 0));
    }
}
