//! The machine's records: how they are made, taken and used up. Not what is in them: each device declares that.
//!
//! A record is a kind, a version, an instance and bytes (postcard). A load must use up every record exactly once, so
//! nothing that a source saved is silently dropped, and nothing that a destination needs is silently missing.

use serde::Serialize;
use serde::de::DeserializeOwned;

/// One device's saved state.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct StateRecord {
    /// What was saved: one of [`Kind`]'s numbers.
    pub kind: u16,
    /// The version of its layout.
    pub version: u16,
    /// Which one of its kind, from 0.
    pub instance: u32,
    /// The body, in postcard.
    pub bytes: Vec<u8>,
}

/// The kinds of records of this VMM. Numbers are never used again for something else.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u16)]
pub enum Kind {
    /// What the machine is made of; checked before anything is loaded.
    Board = 1,
    /// A vCPU.
    Vcpu = 2,
    /// The two PICs and the IOAPIC.
    Irqchip = 3,
    /// The timer of the PC.
    Pit = 4,
    /// The paravirtual clock.
    Clock = 5,
    /// The serial port.
    Serial = 6,
    /// A virtio network card.
    Net = 7,
    /// A virtio disk.
    Block = 8,
    /// A virtio source of random bytes.
    Rng = 9,
    /// A virtio balloon.
    Balloon = 10,
}

const KINDS: [Kind; 10] = [
    Kind::Board,
    Kind::Vcpu,
    Kind::Irqchip,
    Kind::Pit,
    Kind::Clock,
    Kind::Serial,
    Kind::Net,
    Kind::Block,
    Kind::Rng,
    Kind::Balloon,
];

/// The largest record is a vCPU's: 11 KiB of XSAVE area with AMX, MSRs and CPUID; this is ample.
const RECORD_BYTES_MAX: usize = 1 << 20;
/// KVM has at most 4,096 vCPUs; the rest of the machine is a handful.
const RECORDS_MAX: usize = 4096 + 64;

impl Kind {
    /// The kind with this number.
    pub fn from_number(number: u16) -> Option<Self> {
        KINDS.into_iter().find(|kind| *kind as u16 == number)
    }

    /// The version of its layout that this VMM writes.
    pub fn version(self) -> u16 {
        match self {
            // 2: what each has beside the registers and cards of a virtio device; the virtio devices by kind.
            Self::Board | Self::Net => 2,
            _ => 1,
        }
    }

    /// Every kind with its version, as a destination is asked whether it knows them.
    pub fn all() -> impl Iterator<Item = (u16, u16)> {
        KINDS.into_iter().map(|kind| (kind as u16, kind.version()))
    }

    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Board => "board",
            Self::Vcpu => "vcpu",
            Self::Irqchip => "irqchip",
            Self::Pit => "pit",
            Self::Clock => "clock",
            Self::Serial => "serial",
            Self::Net => "net",
            Self::Block => "disk",
            Self::Rng => "rng",
            Self::Balloon => "balloon",
        }
    }
}

/// Why a set of records was refused.
#[derive(Debug, thiserror::Error)]
pub enum RecordError {
    /// More records, or a larger one, than any machine has.
    #[error("{what} is {given}, over the limit of {limit}")]
    Limit {
        /// What is too much.
        what: &'static str,
        /// How much was given.
        given: usize,
        /// How much is allowed.
        limit: usize,
    },
    /// A kind that this VMM does not know.
    #[error(
        "record of unknown kind {kind} (version {version}, instance {instance}): the source has a device that this VMM lacks"
    )]
    UnknownKind {
        /// Its kind.
        kind: u16,
        /// Its version.
        version: u16,
        /// Its instance.
        instance: u32,
    },
    /// A version that this VMM does not know.
    #[error("record {kind}{instance} has version {version}, but this VMM knows {known}: update the older of the two hosts")]
    UnknownVersion {
        /// Its kind in words.
        kind: &'static str,
        /// Its instance.
        instance: u32,
        /// Its version.
        version: u16,
        /// The version known here.
        known: u16,
    },
    /// Two records of the same thing.
    #[error("record {kind}{instance} is there twice")]
    Twice {
        /// Its kind in words.
        kind: &'static str,
        /// Its instance.
        instance: u32,
    },
    /// A record that this machine needs is not there.
    #[error("record {kind}{instance} is missing: the source has fewer devices than this machine")]
    Missing {
        /// Its kind in words.
        kind: &'static str,
        /// Its instance.
        instance: u32,
    },
    /// Records that nothing on this machine took.
    #[error("record(s) left over: {0}; the source has devices that this machine lacks")]
    LeftOver(String),
    /// The body is not what its kind and version say.
    #[error("record {kind}{instance} cannot be {what}: {reason}")]
    Body {
        /// Its kind in words.
        kind: &'static str,
        /// Its instance.
        instance: u32,
        /// "read" or "written".
        what: &'static str,
        /// Why.
        reason: String,
    },
}

/// Makes the record of one device.
pub(crate) fn record<T: Serialize>(kind: Kind, instance: u32, body: &T) -> Result<StateRecord, RecordError> {
    let unwritable =
        |error: postcard::Error| RecordError::Body { kind: kind.name(), instance, what: "written", reason: error.to_string() };
    let bytes = postcard::to_allocvec(body).map_err(unwritable)?;
    Ok(StateRecord { kind: kind as u16, version: kind.version(), instance, bytes })
}

/// Records to be used up.
#[derive(Debug)]
pub(crate) struct Records {
    left: Vec<(Kind, StateRecord)>,
}

impl Records {
    /// Checks kinds, versions, sizes and doubles; bodies are looked at when they are taken.
    pub(crate) fn new(records: Vec<StateRecord>) -> Result<Self, RecordError> {
        if records.len() > RECORDS_MAX {
            return Err(RecordError::Limit { what: "the number of records", given: records.len(), limit: RECORDS_MAX });
        }
        let mut seen = std::collections::HashSet::new();
        let mut left = Vec::with_capacity(records.len());
        for record in records {
            let StateRecord { kind: number, version, instance, ref bytes } = record;
            let kind = Kind::from_number(number).ok_or(RecordError::UnknownKind { kind: number, version, instance })?;
            let known = kind.version();
            if version != known {
                return Err(RecordError::UnknownVersion { kind: kind.name(), instance, version, known });
            }
            if bytes.len() > RECORD_BYTES_MAX {
                return Err(RecordError::Limit { what: "the size of a record", given: bytes.len(), limit: RECORD_BYTES_MAX });
            }
            if !seen.insert((number, instance)) {
                return Err(RecordError::Twice { kind: kind.name(), instance });
            }
            left.push((kind, record));
        }
        Ok(Self { left })
    }

    /// Takes the one record of this kind and instance.
    pub(crate) fn take<T: DeserializeOwned>(&mut self, kind: Kind, instance: u32) -> Result<T, RecordError> {
        let found = self.left.iter().position(|(k, record)| *k == kind && record.instance == instance);
        let index = found.ok_or(RecordError::Missing { kind: kind.name(), instance })?;
        let (_, record) = self.left.swap_remove(index);
        let unreadable = |reason: String| RecordError::Body { kind: kind.name(), instance, what: "read", reason };
        let (body, rest) = postcard::take_from_bytes(&record.bytes).map_err(|error| unreadable(error.to_string()))?;
        if !rest.is_empty() {
            return Err(unreadable(format!("{} bytes too many", rest.len())));
        }
        Ok(body)
    }

    /// Nothing may be left.
    pub(crate) fn finish(self) -> Result<(), RecordError> {
        if self.left.is_empty() {
            return Ok(());
        }
        let names: Vec<_> = self.left.iter().map(|(kind, record)| format!("{}{}", kind.name(), record.instance)).collect();
        Err(RecordError::LeftOver(names.join(", ")))
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::panic)]
    use super::*;

    #[test]
    fn golden_bytes() {
        let made = record(Kind::Serial, 3, &(300_u32, vec![1_u8, 2], Some(7_u8))).unwrap();
        assert_eq!((made.kind, made.version, made.instance), (6, 1, 3));
        assert_eq!(made.bytes, [0xac, 0x02, 2, 1, 2, 1, 7]);
    }

    #[test]
    fn every_record_is_used_up_once() {
        let a = record(Kind::Pit, 0, &5_u32).unwrap();
        let b = record(Kind::Net, 1, &6_u32).unwrap();
        let mut records = Records::new(vec![a.clone(), b.clone()]).unwrap();
        assert_eq!(records.take::<u32>(Kind::Net, 1).unwrap(), 6);
        assert!(matches!(records.take::<u32>(Kind::Net, 1), Err(RecordError::Missing { kind: "net", instance: 1 })));
        let error = records.finish().unwrap_err().to_string();
        assert!(error.contains("pit0"), "{error}");
        assert!(matches!(Records::new(vec![a.clone(), a.clone()]), Err(RecordError::Twice { .. })));
        let unknown = StateRecord { kind: 99, ..a.clone() };
        assert!(matches!(Records::new(vec![unknown]), Err(RecordError::UnknownKind { kind: 99, .. })));
        let newer = StateRecord { version: 2, ..a.clone() };
        assert!(matches!(Records::new(vec![newer]), Err(RecordError::UnknownVersion { version: 2, .. })));
        let longer = StateRecord { bytes: vec![5, 0], ..a.clone() };
        let mut records = Records::new(vec![longer]).unwrap();
        assert!(matches!(records.take::<u32>(Kind::Pit, 0), Err(RecordError::Body { .. })));
        let shorter = StateRecord { bytes: vec![0x80], ..a };
        assert!(Records::new(vec![shorter]).unwrap().take::<u32>(Kind::Pit, 0).is_err());
        let huge = StateRecord { bytes: vec![0; RECORD_BYTES_MAX + 1], ..b };
        assert!(matches!(Records::new(vec![huge]), Err(RecordError::Limit { .. })));
    }
}
