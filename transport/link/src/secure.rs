//! TLS 1.3 records after the handshake, sealed and opened in place: what kTLS does in the kernel, done here.
//!
//! Guest pages are copied once into the record that is sealed, and once out of the record that was opened; rustls's own
//! buffers would copy them two more times each way. The handshake, the keys and every new key are rustls's
//! (its interface for kTLS), the cipher is ring's. This is only the framing of RFC 8446, section 5. It knows no socket.

use ring::aead::{self, Aad, LessSafeKey, Nonce, UnboundKey};
use rustls::ConnectionTrafficSecrets;
use rustls::kernel::KernelConnection;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

/// Bytes of a record's header.
pub(crate) const HEADER_BYTES: usize = 5;
/// Most plaintext in one record.
pub(crate) const PLAIN_BYTES_MAX: usize = 16 << 10;
/// The content type inside the seal, and the tag.
pub(crate) const TRAILER_BYTES: usize = 1 + 16;
/// Largest sealed record that a peer may send, header included (RFC 8446, 5.2: 2^14 + 256).
pub(crate) const RECORD_BYTES_MAX: usize = HEADER_BYTES + PLAIN_BYTES_MAX + 256;
/// Records under one key. AES-GCM is good for 2^24.5 full ones (RFC 8446, 5.5); a new key is taken well before.
const RECORDS_PER_KEY: u64 = 1 << 23;

const ALERT: u8 = 21;
const HANDSHAKE: u8 = 22;
const DATA: u8 = 23;
const NEW_SESSION_TICKET: u8 = 4;
const KEY_UPDATE: u8 = 24;

/// Why a record is not what it should be.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum RecordError {
    /// Its header or its inside is not TLS 1.3.
    #[error("a TLS record is malformed")]
    Malformed,
    /// Its seal is broken: it was changed on the way, or something else is talking.
    #[error("a TLS record is not from the peer, or was changed on the way")]
    Forged,
    /// The peer ends the connection with this alert.
    #[error("the peer ended the connection with TLS alert {0}")]
    Alert(u8),
    /// No key could be made.
    #[error("TLS keys: {0}")]
    Keys(String),
}

impl From<RecordError> for std::io::Error {
    fn from(error: RecordError) -> std::io::Error {
        std::io::Error::new(std::io::ErrorKind::InvalidData, error)
    }
}

impl From<RecordError> for rustls::Error {
    fn from(error: RecordError) -> rustls::Error {
        rustls::Error::General(error.to_string())
    }
}

/// Length of the first whole record in `bytes`, header included; `None` if it is not all there.
pub(crate) fn record_bytes(bytes: &[u8]) -> Option<usize> {
    let whole = match bytes {
        [_, _, _, high, low, ..] => HEADER_BYTES + usize::from(u16::from_be_bytes([*high, *low])),
        _ => return None,
    };
    (bytes.len() >= whole).then_some(whole)
}

/// Whether `header` can begin a sealed record at all; its length is then at most [`RECORD_BYTES_MAX`].
pub(crate) fn plausible(header: &[u8]) -> Result<usize, RecordError> {
    match header {
        [DATA, 3, 3, high, low, ..] => {
            let whole = HEADER_BYTES + usize::from(u16::from_be_bytes([*high, *low]));
            if (HEADER_BYTES + TRAILER_BYTES..=RECORD_BYTES_MAX).contains(&whole) {
                Ok(whole)
            } else {
                Err(RecordError::Malformed)
            }
        }
        _ => Err(RecordError::Malformed),
    }
}

type Secrets = (u64, ConnectionTrafficSecrets);

trait Update: Send {
    fn sending(&mut self) -> Result<Secrets, rustls::Error>;
    fn receiving(&mut self) -> Result<Secrets, rustls::Error>;
}

impl<D: Send> Update for KernelConnection<D> {
    fn sending(&mut self) -> Result<Secrets, rustls::Error> {
        self.update_tx_secret()
    }
    fn receiving(&mut self) -> Result<Secrets, rustls::Error> {
        self.update_rx_secret()
    }
}

/// rustls's key schedule, shared by the two directions of one connection.
#[derive(Clone)]
pub(crate) struct Rekey(Arc<(Mutex<Box<dyn Update>>, AtomicBool)>);

impl Rekey {
    #[allow(private_bounds)]
    pub(crate) fn new<D: Send + 'static>(kernel: Box<KernelConnection<D>>) -> Rekey {
        Rekey(Arc::new((Mutex::new(kernel), AtomicBool::new(false))))
    }

    fn sending(&self) -> Result<Secrets, RecordError> {
        self.0.0.lock().unwrap_or_else(PoisonError::into_inner).sending().map_err(|error| RecordError::Keys(error.to_string()))
    }

    fn receiving(&self) -> Result<Secrets, RecordError> {
        self.0.0.lock().unwrap_or_else(PoisonError::into_inner).receiving().map_err(|error| RecordError::Keys(error.to_string()))
    }
}

/// One direction's key, and how many records it has protected.
struct Direction {
    key: LessSafeKey,
    iv: [u8; 12],
    sequence: u64,
}

impl Direction {
    fn new((sequence, secrets): Secrets) -> Result<Direction, RecordError> {
        let (algorithm, key, iv) = match &secrets {
            ConnectionTrafficSecrets::Aes128Gcm { key, iv } => (&aead::AES_128_GCM, key, iv),
            ConnectionTrafficSecrets::Aes256Gcm { key, iv } => (&aead::AES_256_GCM, key, iv),
            ConnectionTrafficSecrets::Chacha20Poly1305 { key, iv } => (&aead::CHACHA20_POLY1305, key, iv),
            _ => return Err(RecordError::Keys("unknown cipher".into())),
        };
        let bad = || RecordError::Keys("bad length".into());
        let key = UnboundKey::new(algorithm, key.as_ref()).map_err(|_| bad())?;
        let iv = iv.as_ref().try_into().map_err(|_| bad())?;
        Ok(Direction { key: LessSafeKey::new(key), iv, sequence })
    }

    fn nonce(&mut self) -> Result<Nonce, RecordError> {
        let mut nonce = self.iv;
        for (byte, of) in nonce.iter_mut().skip(4).zip(self.sequence.to_be_bytes()) {
            *byte ^= of;
        }
        self.sequence = self.sequence.checked_add(1).ok_or(RecordError::Keys("used up".into()))?;
        Ok(Nonce::assume_unique_for_key(nonce))
    }
}

/// Seals outgoing records.
pub(crate) struct Sealer {
    direction: Direction,
    rekey: Rekey,
    records_per_key: u64,
    on_this_key: u64,
}

impl Sealer {
    pub(crate) fn new(secrets: Secrets, rekey: Rekey) -> Result<Sealer, RecordError> {
        Ok(Sealer { direction: Direction::new(secrets)?, rekey, records_per_key: RECORDS_PER_KEY, on_this_key: 0 })
    }

    /// Appends one record to `out`: `fill` writes its `length` bytes of plaintext (at most [`PLAIN_BYTES_MAX`]) in place.
    pub(crate) fn seal(&mut self, out: &mut Vec<u8>, length: usize, fill: impl FnOnce(&mut [u8])) -> Result<(), RecordError> {
        if self.on_this_key >= self.records_per_key || self.rekey.0.1.swap(false, Ordering::Relaxed) {
            self.typed(out, HANDSHAKE, 5, |plain| plain.copy_from_slice(&[KEY_UPDATE, 0, 0, 1, 0]))?;
            self.direction = Direction::new(self.rekey.sending()?)?;
            self.on_this_key = 0;
        }
        self.typed(out, DATA, length, fill)
    }

    /// Appends the record that says that nothing more comes.
    pub(crate) fn close(&mut self, out: &mut Vec<u8>) -> Result<(), RecordError> {
        self.typed(out, ALERT, 2, |plain| plain.copy_from_slice(&[1, 0]))
    }

    fn typed(&mut self, out: &mut Vec<u8>, kind: u8, length: usize, fill: impl FnOnce(&mut [u8])) -> Result<(), RecordError> {
        let sealed = u16::try_from(length + TRAILER_BYTES).map_err(|_| RecordError::Malformed)?;
        let [high, low] = sealed.to_be_bytes();
        let header = [DATA, 3, 3, high, low];
        out.extend_from_slice(&header);
        let from = out.len();
        out.resize(from + length + 1, kind);
        let inside = out.get_mut(from..).unwrap_or_default();
        fill(inside.get_mut(..length).unwrap_or_default());
        let nonce = self.direction.nonce()?;
        let tag = self
            .direction
            .key
            .seal_in_place_separate_tag(nonce, Aad::from(header), inside)
            .map_err(|_| RecordError::Malformed)?;
        out.extend_from_slice(tag.as_ref());
        self.on_this_key += 1;
        Ok(())
    }

    #[cfg(test)]
    pub(crate) fn set_records_per_key(&mut self, records: u64) {
        self.records_per_key = records;
    }
}

/// What an opened record was.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Opened {
    /// Plaintext lies at this range of the record's bytes.
    Data(std::ops::Range<usize>),
    /// Something of TLS itself, dealt with.
    Nothing,
    /// The peer says that nothing more comes.
    End,
}

/// Opens incoming records.
pub(crate) struct Opener {
    direction: Direction,
    rekey: Rekey,
}

impl Opener {
    pub(crate) fn new(secrets: Secrets, rekey: Rekey) -> Result<Opener, RecordError> {
        Ok(Opener { direction: Direction::new(secrets)?, rekey })
    }

    /// Opens one whole record, header included, in place.
    pub(crate) fn open(&mut self, record: &mut [u8]) -> Result<Opened, RecordError> {
        plausible(record)?;
        let (header, sealed) = record.split_at_mut_checked(HEADER_BYTES).ok_or(RecordError::Malformed)?;
        let header: [u8; HEADER_BYTES] = (&*header).try_into().map_err(|_| RecordError::Malformed)?;
        let nonce = self.direction.nonce()?;
        let plain = self.direction.key.open_in_place(nonce, Aad::from(header), sealed).map_err(|_| RecordError::Forged)?;
        let kind_at = plain.iter().rposition(|byte| *byte != 0).ok_or(RecordError::Malformed)?;
        let inside = plain.get(..kind_at).unwrap_or_default();
        match plain.get(kind_at) {
            Some(&DATA) if inside.len() <= PLAIN_BYTES_MAX => Ok(Opened::Data(HEADER_BYTES..HEADER_BYTES + kind_at)),
            Some(&ALERT) => match inside {
                [_, 0] => Ok(Opened::End),
                [_, alert] => Err(RecordError::Alert(*alert)),
                _ => Err(RecordError::Malformed),
            },
            Some(&HANDSHAKE) => match inside {
                [KEY_UPDATE, 0, 0, 1, asks @ (0 | 1)] => {
                    self.rekey.0.1.fetch_or(*asks == 1, Ordering::Relaxed);
                    self.direction = Direction::new(self.rekey.receiving()?)?;
                    Ok(Opened::Nothing)
                }
                // Nothing is ever resumed here, so a ticket is of no use.
                [NEW_SESSION_TICKET, ..] => Ok(Opened::Nothing),
                _ => Err(RecordError::Malformed),
            },
            _ => Err(RecordError::Malformed),
        }
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use crate::key::HostKey;
    use crate::tls::{self, Secured, TrustedHosts};

    async fn two() -> (Secured, Secured) {
        let (ours, theirs) = (HostKey::generate().unwrap(), HostKey::generate().unwrap());
        let (mut near, mut far) = tokio::io::duplex(16 << 10);
        let (trusts_them, trusts_us) = (TrustedHosts::new([theirs.id()]), TrustedHosts::new([ours.id()]));
        let ours_alone = [&trusts_us];
        let (source, destination) =
            tokio::join!(tls::connect(&mut near, &ours, &trusts_them, theirs.id()), tls::accept(&mut far, &theirs, &ours_alone));
        let (source, destination) = (source.unwrap(), destination.unwrap());
        assert_eq!((source.peer, destination.peer), (theirs.id(), ours.id()));
        (source, destination)
    }

    fn sealed(sealer: &mut Sealer, plain: &[u8]) -> Vec<u8> {
        let mut out = Vec::new();
        sealer.seal(&mut out, plain.len(), |inside| inside.copy_from_slice(plain)).unwrap();
        out
    }

    #[tokio::test]
    async fn keys_are_renewed_both_ways_and_nothing_is_lost() {
        let (mut source, mut destination) = two().await;
        source.sealer.set_records_per_key(3);
        for number in 0..20_u8 {
            let mut bytes = sealed(&mut source.sealer, &[number; 100]);
            let mut at = 0;
            let mut got = Vec::new();
            while let Some(whole) = record_bytes(&bytes[at..]) {
                let record = &mut bytes[at..at + whole];
                if let Opened::Data(inside) = destination.opener.open(record).unwrap() {
                    got.extend_from_slice(&record[inside]);
                }
                at += whole;
            }
            assert_eq!(got, [number; 100]);
        }
        // The peer may ask for a new key of ours as well.
        destination
            .sealer
            .typed(&mut Vec::new(), HANDSHAKE, 5, |plain| plain.copy_from_slice(&[KEY_UPDATE, 0, 0, 1, 1]))
            .unwrap();
    }

    #[tokio::test]
    async fn a_changed_record_is_noticed_and_nothing_panics() {
        let (mut source, mut destination) = two().await;
        let good = sealed(&mut source.sealer, b"page");
        for bit in 0..good.len() * 8 {
            let mut bad = good.clone();
            bad[bit / 8] ^= 1 << (bit % 8);
            // Each try uses up a number, so the keys are made anew: only the first counts for the seal.
            assert!(destination.opener.open(&mut bad).is_err(), "bit {bit}");
            destination.opener.direction.sequence = 0;
        }
        let mut good = good;
        assert!(matches!(destination.opener.open(&mut good), Ok(Opened::Data(_))));
        assert_eq!(destination.opener.open(&mut []), Err(RecordError::Malformed));
    }

    #[tokio::test]
    async fn the_end_and_alerts_are_told_apart() {
        let (mut source, mut destination) = two().await;
        let mut out = Vec::new();
        source.sealer.close(&mut out).unwrap();
        assert_eq!(destination.opener.open(&mut out), Ok(Opened::End));
        let mut out = Vec::new();
        source.sealer.typed(&mut out, ALERT, 2, |plain| plain.copy_from_slice(&[2, 49])).unwrap();
        assert_eq!(destination.opener.open(&mut out), Err(RecordError::Alert(49)));
        let mut out = Vec::new();
        source.sealer.typed(&mut out, 99, 2, |plain| plain.fill(1)).unwrap();
        assert_eq!(destination.opener.open(&mut out), Err(RecordError::Malformed));
    }
}
