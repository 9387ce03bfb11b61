//! Device state as it travels: typed, versioned records that the receiver must consume one by one.
//! What is inside a record is the VMM's business; nothing here interprets it.

use serde::{Deserialize, Serialize};

/// Largest body of one record in bytes. A vCPU's is a few KiB; a large device's a few hundred.
pub const RECORD_BYTES_MAX: usize = 1 << 20;
/// Most records one guest may have: 1,024 vCPUs and every device with room to spare.
pub const RECORDS_MAX: usize = 4096;
/// Most bytes of all records together.
pub const STATE_BYTES_MAX: usize = 64 << 20;

/// State of one vCPU, chip or device.
#[derive(Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Record {
    /// What it is, as the VMM numbers its kinds.
    pub kind: u16,
    /// Version of the body's layout.
    pub version: u16,
    /// Which one of its kind: the vCPU's or the device's number.
    pub instance: u32,
    /// The body.
    pub bytes: Vec<u8>,
}

impl std::fmt::Debug for Record {
    // The body is guest state and stays out of logs.
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Record(kind {} v{} #{}, {} bytes)", self.kind, self.version, self.instance, self.bytes.len())
    }
}
