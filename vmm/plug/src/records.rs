//! Device state as it crosses the plug: records behind each other in a memfd, each after a header of 16 bytes.
//! A memfd and not a message, since the state of a large guest is larger than a datagram. Bodies are not interpreted.

use crate::memfd;
use crate::message::{Fields, Malformed, RECORD_HEADER_BYTES, STATE_FILE_BYTES_MAX, StateSize};
use limosa_proto::record::{RECORD_BYTES_MAX, RECORDS_MAX, Record, STATE_BYTES_MAX};
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::FileExt;

/// Why device state could not be read from or written to its memfd.
#[derive(Debug, thiserror::Error)]
pub enum RecordsError {
    /// The system refused something, or the descriptor is no sealed memfd.
    #[error("the file of device state: {0}")]
    Io(#[from] io::Error),
    /// The bytes are not what was announced, or break a limit.
    #[error(transparent)]
    Malformed(#[from] Malformed),
}

/// Writes `records` into a new sealed memfd.
///
/// # Errors
/// State over the limits of `limosa_proto::record`, or the system's errors.
pub fn write(records: &[Record]) -> Result<(StateSize, OwnedFd), RecordsError> {
    let bytes = emit(records)?;
    let fd = memfd::create("limosa-state", bytes.len() as u64)?;
    let file = File::from(fd);
    file.write_all_at(&bytes, 0)?;
    Ok((StateSize { count: records.len() as u32, bytes: bytes.len() as u64 }, file.into()))
}

/// Reads `size` of device state out of a memfd of the other side.
///
/// # Errors
/// A descriptor that is no sealed memfd of that size; bytes that are not `size.count` records.
pub fn read(size: StateSize, fd: OwnedFd) -> Result<Vec<Record>, RecordsError> {
    if size.bytes > STATE_FILE_BYTES_MAX {
        return Err(Malformed::new("device state", format!("{} bytes", size.bytes)).into());
    }
    memfd::check(fd.as_fd(), size.bytes)?;
    let mut bytes = vec![0; usize::try_from(size.bytes).unwrap_or(0)];
    File::from(fd).read_exact_at(&mut bytes, 0)?;
    Ok(parse(size.count, &bytes)?)
}

fn emit(records: &[Record]) -> Result<Vec<u8>, Malformed> {
    let total: usize = records.iter().map(|record| record.bytes.len()).sum();
    let largest = records.iter().map(|record| record.bytes.len()).max().unwrap_or(0);
    if records.len() > RECORDS_MAX || total > STATE_BYTES_MAX || largest > RECORD_BYTES_MAX {
        let why = format!("{} records, {total} bytes, the largest {largest}", records.len());
        return Err(Malformed::new("device state is larger than is carried", why));
    }
    let mut out = Vec::with_capacity(total + records.len() * RECORD_HEADER_BYTES);
    for record in records {
        out.extend(record.kind.to_le_bytes());
        out.extend(record.version.to_le_bytes());
        out.extend(record.instance.to_le_bytes());
        out.extend((record.bytes.len() as u32).to_le_bytes());
        out.extend([0; 4]);
        out.extend(&record.bytes);
    }
    Ok(out)
}

fn parse(count: u32, bytes: &[u8]) -> Result<Vec<Record>, Malformed> {
    if count as usize > RECORDS_MAX {
        return Err(Malformed::new("device state", format!("{count} records; at most {RECORDS_MAX} are carried")));
    }
    let mut fields = Fields::new("device state", bytes);
    let mut records = Vec::new();
    for _ in 0..count {
        let (kind, version, instance, length) = (fields.u16()?, fields.u16()?, fields.u32()?, fields.u32()?);
        fields.zeros(4)?;
        if length as usize > RECORD_BYTES_MAX {
            return Err(fields.wrong(format!("a record of {length} bytes; at most {RECORD_BYTES_MAX} are carried")));
        }
        records.push(Record { kind, version, instance, bytes: fields.bytes(length as usize)?.to_vec() });
    }
    fields.end()?;
    Ok(records)
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn record(kind: u16, bytes: &[u8]) -> Record {
        Record { kind, version: 2, instance: 3, bytes: bytes.to_vec() }
    }

    #[test]
    fn golden_bytes() {
        let bytes = emit(&[record(1, b"ab"), record(0x203, b"")]).unwrap();
        let expected =
            [1, 0, 2, 0, 3, 0, 0, 0, 2, 0, 0, 0, 0, 0, 0, 0, b'a', b'b', 3, 2, 2, 0, 3, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0];
        assert_eq!(bytes, expected);
        assert_eq!(parse(2, &bytes).unwrap(), [record(1, b"ab"), record(0x203, b"")]);
        assert!(parse(1, &bytes).unwrap_err().why.contains("too many"));
        assert!(parse(3, &bytes).unwrap_err().why.contains("too short"));
    }

    #[test]
    fn through_a_memfd() {
        let records: Vec<Record> = (0..500).map(|kind| record(kind, &vec![7; usize::from(kind) * 10])).collect();
        let (size, fd) = write(&records).unwrap();
        assert_eq!(read(size, fd.try_clone().unwrap()).unwrap(), records);
        let more = StateSize { bytes: size.bytes + 1, ..size };
        assert!(matches!(read(more, fd), Err(RecordsError::Io(_))));
        assert!(write(&[record(1, &vec![0; RECORD_BYTES_MAX + 1])]).is_err());
    }

    proptest! {
        #[test]
        fn hostile_bytes_never_panic(count in any::<u32>(), bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
            let _ = parse(count, &bytes);
            let _ = parse(count % 4, &bytes);
        }
    }
}
