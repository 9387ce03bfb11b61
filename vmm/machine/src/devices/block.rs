//! A virtio disk on an image of this host. What a request means is `block_request.rs`'s, what is in the image `disk/`'s.
//!
//! Requests are carried out one after the other, in the order in which they are offered, on the device's thread. So between
//! two turns none is half done: a pause waits for the one in hand, and those not yet begun travel in the ring.

use std::sync::Arc;
use std::time::{Duration, Instant};

use vm_memory::{Bytes, GuestAddress};

use super::block_request::{
    self as request, Command, DISCARD_RANGES_MAX, DISCARD_SECTORS_MAX, HEADER_BYTES, ID_BYTES, Layout, Limits, Piece,
    RANGES_BYTES_MAX, SEGMENT_BYTES_MAX, SEGMENTS_MAX, Status, ZERO_SECTORS_MAX,
};
use super::queue::QueueError;
use super::worker::{Backend, Model, Shared, Turn};
use crate::disk::image::{Disk, SECTOR_BYTES};
use crate::disk::{DiskError, DiskFormat};
use crate::memory::GuestRam;

const DEVICE_ID: u32 = 2;
const FEATURE_SIZE_MAX: u64 = 1 << 1;
const FEATURE_SEG_MAX: u64 = 1 << 2;
const FEATURE_RO: u64 = 1 << 5;
const FEATURE_BLK_SIZE: u64 = 1 << 6;
const FEATURE_FLUSH: u64 = 1 << 9;
const FEATURE_TOPOLOGY: u64 = 1 << 10;
const FEATURE_DISCARD: u64 = 1 << 13;
const FEATURE_WRITE_ZEROES: u64 = 1 << 14;
/// Data carried at a time between image and guest.
const BUFFER_BYTES: usize = 1 << 20;
/// Requests go on being taken for so long in one turn.
const TURN_MAX: Duration = Duration::from_millis(20);
/// How long a lock that another host is about to give up is waited for.
const LOCK_PATIENCE: Duration = Duration::from_secs(3);
/// Trouble with the image is told once in so long.
const TROUBLE_INTERVAL: Duration = Duration::from_secs(1);

/// A disk.
#[derive(Debug)]
pub(crate) struct Block {
    disk: Arc<Disk>,
    buffer: Vec<u8>,
    told: Option<Instant>,
}

/// Why a request was not done: the guest's memory or rings, or the image.
enum Failure {
    Queue(QueueError),
    Disk(DiskError),
    Refused(Status),
}

impl From<QueueError> for Failure {
    fn from(error: QueueError) -> Failure {
        Failure::Queue(error)
    }
}

impl From<DiskError> for Failure {
    fn from(error: DiskError) -> Failure {
        Failure::Disk(error)
    }
}

impl From<Status> for Failure {
    fn from(status: Status) -> Failure {
        Failure::Refused(status)
    }
}

/// Copies guest memory, piece by piece, to the front of `into`.
fn gather(ram: &GuestRam, pieces: &[Piece], into: &mut [u8]) -> Result<(), QueueError> {
    let mut rest = into;
    for (address, bytes) in pieces {
        let bytes = usize::try_from(*bytes).unwrap_or(usize::MAX);
        let (part, more) = rest.split_at_mut_checked(bytes).ok_or(QueueError::Length)?;
        ram.read_slice(part, GuestAddress(*address)).map_err(|_| QueueError::Memory(*address))?;
        rest = more;
    }
    Ok(())
}

/// Copies the front of `from` to guest memory, piece by piece.
fn scatter(ram: &GuestRam, pieces: &[Piece], from: &[u8]) -> Result<(), QueueError> {
    let mut rest = from;
    for (address, bytes) in pieces {
        let bytes = usize::try_from(*bytes).unwrap_or(usize::MAX);
        let (part, more) = rest.split_at_checked(bytes).ok_or(QueueError::Length)?;
        ram.write_slice(part, GuestAddress(*address)).map_err(|_| QueueError::Memory(*address))?;
        rest = more;
    }
    Ok(())
}

impl Block {
    /// A device for this disk.
    pub(crate) fn new(disk: Arc<Disk>) -> Block {
        Block { disk, buffer: vec![0; BUFFER_BYTES], told: None }
    }

    fn limits(&self) -> Limits {
        Limits { sectors: self.disk.sectors(), readonly: self.disk.config().readonly }
    }

    /// Carries out one request; how many bytes were written to the guest, the status apart.
    fn serve(&mut self, ram: &GuestRam, layout: &Layout, write_through: bool) -> Result<u32, Failure> {
        let mut header = [0; HEADER_BYTES as usize];
        gather(ram, &layout.header, &mut header)?;
        let (from, into) = (request::bytes(&layout.from), request::bytes(&layout.into));
        let command = request::command(header, from, into, self.limits())?;
        match &command {
            Command::Read { offset } => {
                self.read(ram, &layout.into, *offset)?;
                return Ok(u32::try_from(into).unwrap_or(u32::MAX));
            }
            Command::Id => {
                let mut id = [0; ID_BYTES];
                for (to, byte) in id.iter_mut().zip(self.disk.config().serial.bytes()) {
                    *to = byte;
                }
                scatter(ram, &request::first(&layout.into, ID_BYTES as u64), &id)?;
                return Ok(ID_BYTES as u32);
            }
            Command::Write { offset } => self.write(ram, &layout.from, *offset)?,
            Command::Flush => self.disk.flush()?,
            Command::Discard | Command::Zero => self.ranges(ram, layout, command == Command::Zero)?,
        }
        if write_through && command != Command::Flush {
            // A driver that cannot flush takes what was answered for safe.
            self.disk.flush()?;
        }
        Ok(0)
    }

    fn read(&mut self, ram: &GuestRam, pieces: &[Piece], mut offset: u64) -> Result<(), Failure> {
        for batch in request::batches(pieces, BUFFER_BYTES as u64) {
            let bytes = request::bytes(&batch);
            let part = usize::try_from(bytes).ok().and_then(|bytes| self.buffer.get_mut(..bytes)).ok_or(QueueError::Length)?;
            self.disk.read(part, offset)?;
            scatter(ram, &batch, part)?;
            offset += bytes;
        }
        Ok(())
    }

    fn write(&mut self, ram: &GuestRam, pieces: &[Piece], mut offset: u64) -> Result<(), Failure> {
        for batch in request::batches(pieces, BUFFER_BYTES as u64) {
            let bytes = request::bytes(&batch);
            let part = usize::try_from(bytes).ok().and_then(|bytes| self.buffer.get_mut(..bytes)).ok_or(QueueError::Length)?;
            gather(ram, &batch, part)?;
            self.disk.write(part, offset)?;
            offset += bytes;
        }
        Ok(())
    }

    fn ranges(&mut self, ram: &GuestRam, layout: &Layout, zero: bool) -> Result<(), Failure> {
        let mut list = [0; RANGES_BYTES_MAX as usize];
        let bytes = usize::try_from(request::bytes(&layout.from)).unwrap_or(usize::MAX);
        let list = list.get_mut(..bytes).ok_or(QueueError::Length)?;
        gather(ram, &layout.from, list)?;
        for range in request::ranges(list, zero, self.limits())? {
            if zero {
                self.disk.zero(range.offset, range.bytes, range.unmap)?;
            } else {
                self.disk.discard(range.offset, range.bytes)?;
            }
        }
        Ok(())
    }

    /// Tells the machine's owner, but not of every request.
    fn trouble(&mut self, shared: &Shared, error: &DiskError) {
        if self.told.is_none_or(|told| told.elapsed() >= TROUBLE_INTERVAL) {
            self.told = Some(Instant::now());
            shared.trouble(&format!("a request failed: {error}"));
        }
    }

    /// Takes one request and answers it; false if none is offered.
    fn one(&mut self, shared: &Shared) -> Result<bool, QueueError> {
        let ram = shared.ram();
        let (chain, resets, features) = {
            let mut transport = shared.transport();
            let (resets, features) = (transport.resets(), transport.driver_features());
            let queue = if transport.is_live() { transport.queues.first_mut() } else { None };
            let Some(chain) = queue.map(|queue| queue.pop(ram)).transpose()?.flatten() else { return Ok(false) };
            (chain, resets, features)
        };
        let layout = request::lay_out(&chain.segments).ok_or(QueueError::Room)?;
        let (status, written) = match self.serve(ram, &layout, features & FEATURE_FLUSH == 0) {
            Ok(written) => (Status::Ok, written),
            Err(Failure::Refused(status)) => (status, 0),
            Err(Failure::Queue(error)) => return Err(error),
            Err(Failure::Disk(error)) => {
                self.trouble(shared, &error);
                (Status::Error, 0)
            }
        };
        let mut transport = shared.transport();
        // After a reset the chain is nobody's, and its memory may be something else by now.
        if transport.resets() == resets {
            ram.write_obj(status as u8, GuestAddress(layout.status)).map_err(|_| QueueError::Memory(layout.status))?;
            let Some(queue) = transport.queues.first_mut() else { return Ok(false) };
            queue.push_used(ram, chain.head, written.saturating_add(1))?;
            shared.interrupt_for_used(&mut transport, 0..1);
        }
        Ok(true)
    }
}

/// The configuration space: the same on every host for the same image.
fn config(disk: &Disk) -> Vec<u8> {
    // Runs of sectors that are best written or discarded as a whole: a page of the host, or a cluster of qcow2.
    let granule: u16 = if disk.info().format == DiskFormat::Raw { 8 } else { 128 };
    let mut config = disk.sectors().to_le_bytes().to_vec();
    config.extend(SEGMENT_BYTES_MAX.to_le_bytes());
    config.extend(SEGMENTS_MAX.to_le_bytes());
    // No cylinders, heads and sectors.
    config.extend([0; 4]);
    config.extend((SECTOR_BYTES as u32).to_le_bytes());
    // A physical block is 2^3 sectors; nothing is shifted; the best size of a request.
    config.extend([3, 0]);
    config.extend(granule.to_le_bytes());
    config.extend(u32::from(granule).to_le_bytes());
    // Write-back; unused; one queue.
    config.extend([1, 0, 1, 0]);
    for number in [DISCARD_SECTORS_MAX, DISCARD_RANGES_MAX, u32::from(granule), ZERO_SECTORS_MAX, 1] {
        config.extend(number.to_le_bytes());
    }
    // Zeroing may unmap.
    config.extend([1, 0, 0, 0]);
    config
}

impl Backend for Block {
    fn model(&self) -> Model {
        let always = FEATURE_SIZE_MAX | FEATURE_SEG_MAX | FEATURE_BLK_SIZE | FEATURE_FLUSH | FEATURE_TOPOLOGY;
        let more = if self.disk.config().readonly { FEATURE_RO } else { FEATURE_DISCARD | FEATURE_WRITE_ZEROES };
        Model { device_id: DEVICE_ID, features: always | more, config: config(&self.disk), config_writable: 0..0, queues: 1 }
    }

    fn turn(&mut self, shared: &Shared) -> Result<Turn, QueueError> {
        let until = Instant::now() + TURN_MAX;
        while self.one(shared)? {
            if Instant::now() >= until {
                return Ok(Turn::More);
            }
        }
        Ok(Turn::Idle)
    }

    fn resuming(&mut self, _shared: &Shared) -> Result<(), String> {
        self.disk.take(LOCK_PATIENCE).map_err(|error| error.to_string())
    }
}

#[cfg(test)]
#[path = "block_tests.rs"]
mod tests;
