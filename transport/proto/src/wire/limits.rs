//! What a peer may ask for at most, each with its reason, and the decoding helpers that hold it to that.
//! Limits of memory and of records live beside their types.

use serde::de::{Error, SeqAccess, Visitor};
use serde::{Deserialize, Deserializer};
use std::fmt;
use std::marker::PhantomData;

/// Largest body of a control message in bytes: one record of 1 MiB and 4 KiB around it.
pub const MESSAGE_BYTES_MAX: usize = crate::record::RECORD_BYTES_MAX + 4096;
/// Runs in one lane frame: 256 runs are 3 KiB of table, small beside the pages they name.
pub const RUNS_PER_FRAME_MAX: usize = 256;
/// Page bytes in one lane frame: large enough that headers cost nothing, small enough that lanes stay in step.
pub const FRAME_BYTES_MAX: u64 = 4 << 20;
/// Lanes of one migration.
pub const LANES_MAX: u16 = 16;
/// Rounds of one migration; a source that needs more is not going to converge.
pub const ROUNDS_MAX: u32 = 10_000;
/// Bytes of words meant for a person.
pub const WORDS_BYTES_MAX: usize = 1024;
/// Bytes of a name: of a guest, a network, a kind of VMM.
pub const NAME_BYTES_MAX: usize = 256;
/// Bytes of the description's opaque part.
pub const CONFIG_BYTES_MAX: usize = 64 << 10;
/// Network interfaces of one guest.
pub const NICS_MAX: usize = 64;
/// Addresses of one network interface.
pub const ADDRESSES_MAX: usize = 64;
/// Disks of one guest.
pub const DISKS_MAX: usize = 8;
/// Bytes of a path of an image.
pub const PATH_BYTES_MAX: usize = 1024;
/// Bytes of a disk's serial number: what virtio-blk has room for.
pub const SERIAL_BYTES_MAX: usize = 20;
/// Virtual CPUs of one guest: the most that KVM offers.
pub const VCPUS_MAX: u32 = 4096;
/// Kinds of record that a description may list.
pub const RECORD_KINDS_MAX: usize = 256;
/// Protocol versions that a peer may offer.
pub const VERSIONS_MAX: usize = 32;
/// Reasons in one refusal.
pub const REASONS_MAX: usize = 64;
/// Chunks that one message may ask for or give keys of: 1024 keys are 16 KiB and open 16 GiB.
pub const KEYS_PER_MESSAGE_MAX: usize = 1024;
/// Links that a host may offer.
pub const LINKS_MAX: usize = 16;
/// Bytes of padding in one probe: one write of the control channel.
pub const PROBE_BYTES_MAX: usize = 256 << 10;
/// Lines about announcements in one report.
pub const ANNOUNCEMENTS_MAX: usize = 512;
/// Leaves of CPUID in one profile: the most that KVM gives.
pub const CPU_LEAVES_MAX: usize = 256;
/// Feature MSRs in one profile.
pub const CPU_MSRS_MAX: usize = 64;

/// Cuts `words` at a character's boundary so that they fit into a message.
#[must_use]
pub fn fit(words: &str, bytes_max: usize) -> String {
    if words.len() <= bytes_max {
        return words.to_owned();
    }
    let mut end = bytes_max.saturating_sub('…'.len_utf8());
    while !words.is_char_boundary(end) {
        end = end.saturating_sub(1);
    }
    let mut cut = words.get(..end).unwrap_or_default().to_owned();
    cut.push('…');
    cut
}

/// Decodes a list of at most `MAX` items; the rest of a longer one is never read.
pub(crate) fn list<'de, D: Deserializer<'de>, T: Deserialize<'de>, const MAX: usize>(from: D) -> Result<Vec<T>, D::Error> {
    struct Items<T, const MAX: usize>(PhantomData<T>);
    impl<'de, T: Deserialize<'de>, const MAX: usize> Visitor<'de> for Items<T, MAX> {
        type Value = Vec<T>;
        fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
            write!(f, "at most {MAX} items")
        }
        fn visit_seq<A: SeqAccess<'de>>(self, mut items: A) -> Result<Vec<T>, A::Error> {
            let promised = items.size_hint().unwrap_or(0);
            if promised > MAX {
                return Err(A::Error::invalid_length(promised, &self));
            }
            let mut all = Vec::with_capacity(promised.min(64));
            while let Some(item) = items.next_element()? {
                if all.len() == MAX {
                    return Err(A::Error::invalid_length(MAX + 1, &self));
                }
                all.push(item);
            }
            Ok(all)
        }
    }
    from.deserialize_seq(Items::<T, MAX>(PhantomData))
}

/// Decodes text of at most `MAX` bytes.
pub(crate) fn text<'de, D: Deserializer<'de>, const MAX: usize>(from: D) -> Result<String, D::Error> {
    struct Text<const MAX: usize>;
    impl<const MAX: usize> Visitor<'_> for Text<MAX> {
        type Value = String;
        fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
            write!(f, "at most {MAX} bytes of text")
        }
        fn visit_str<E: Error>(self, text: &str) -> Result<String, E> {
            if text.len() > MAX { Err(E::invalid_length(text.len(), &self)) } else { Ok(text.to_owned()) }
        }
    }
    from.deserialize_str(Text::<MAX>)
}

/// Decodes at most `MAX` bytes. On the wire they are a list of bytes; taking them as one piece is what makes a
/// record of a mebibyte cheap inside the downtime.
pub(crate) fn bytes<'de, D: Deserializer<'de>, const MAX: usize>(from: D) -> Result<Vec<u8>, D::Error> {
    struct Bytes<const MAX: usize>;
    impl<'de, const MAX: usize> Visitor<'de> for Bytes<MAX> {
        type Value = Vec<u8>;
        fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
            write!(f, "at most {MAX} bytes")
        }
        fn visit_bytes<E: Error>(self, bytes: &[u8]) -> Result<Vec<u8>, E> {
            if bytes.len() > MAX { Err(E::invalid_length(bytes.len(), &self)) } else { Ok(bytes.to_vec()) }
        }
    }
    from.deserialize_bytes(Bytes::<MAX>)
}

/// Encodes bytes as one piece; see [`bytes`].
pub(crate) fn emit_bytes<S: serde::Serializer>(bytes: &[u8], to: S) -> Result<S::Ok, S::Error> {
    to.serialize_bytes(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words_are_cut_between_characters() {
        assert_eq!(fit("short", 16), "short");
        let cut = fit(&"ä".repeat(100), 16);
        assert!(cut.len() <= 16 && cut.ends_with('…'), "{cut}");
    }
}
