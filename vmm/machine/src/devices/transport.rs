//! virtio-mmio, version 2: the registers of one device. Not what the device does with its queues.

use std::ops::Range;

use serde::{Deserialize, Serialize};

use super::queue::{QUEUE_SIZE_MAX, Queue, QueueError};
use super::worker::Model;
use crate::memory::GuestRam;

/// VIRTIO_F_VERSION_1.
pub(crate) const FEATURE_VERSION_1: u64 = 1 << 32;

pub(crate) const QUEUE_NOTIFY: u64 = 0x50;
const CONFIG_GENERATION: u64 = 0xfc;
const CONFIG: u64 = 0x100;
const STATUS_DRIVER_OK: u32 = 4;
const STATUS_FEATURES_OK: u32 = 8;
const STATUS_NEEDS_RESET: u32 = 64;
const STATUS_BITS: u32 = 0xcf;
pub(crate) const INTERRUPT_USED: u32 = 1;
pub(crate) const INTERRUPT_CONFIG: u32 = 2;

/// Why a saved device does not fit this one.
#[derive(Debug, thiserror::Error)]
pub(crate) enum TransportError {
    #[error("the driver uses features {used:#x}, of which this device offers {offered:#x}")]
    Features { used: u64, offered: u64 },
    #[error("it has {given} queues, this device {needed}")]
    Queues { given: usize, needed: usize },
    #[error("it is another kind of device: {given}, not {here}")]
    Kind { given: u32, here: u32 },
    #[error("its configuration (MAC, MTU, size) is {given:02x?}, this device's {here:02x?}")]
    Config { given: Vec<u8>, here: Vec<u8> },
    #[error("queue {queue}: {source}")]
    Queue { queue: usize, source: QueueError },
    #[error("{0}")]
    Extra(String),
}

/// What a register write asks of the device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Request {
    /// Nothing.
    None,
    /// The driver put chains in this queue.
    Notify(u32),
    /// The device has just been made ready, or reset: look at everything anew.
    Changed,
    /// The device is broken and the driver must be told.
    Broken(&'static str),
}

/// The registers of a device; also the first part of its record.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Transport {
    device_id: u32,
    offered: u64,
    config: Vec<u8>,
    device_features_select: u32,
    driver_features_select: u32,
    driver_features: u64,
    queue_select: u32,
    status: u32,
    interrupt_status: u32,
    config_generation: u32,
    pub(crate) queues: Vec<Queue>,
    #[serde(skip)]
    config_writable: Range<usize>,
    /// How often the driver reset the device: chains from before a reset are nobody's any more.
    #[serde(skip)]
    resets: u64,
}

impl Transport {
    pub(crate) fn new(model: &Model) -> Self {
        Self {
            device_id: model.device_id,
            offered: model.features | FEATURE_VERSION_1,
            config: model.config.clone(),
            device_features_select: 0,
            driver_features_select: 0,
            driver_features: 0,
            queue_select: 0,
            status: 0,
            interrupt_status: 0,
            config_generation: 0,
            queues: vec![Queue::default(); model.queues],
            config_writable: model.config_writable.clone(),
            resets: 0,
        }
    }

    /// The features that the driver chose; of use once the device is live.
    pub(crate) fn driver_features(&self) -> u64 {
        self.driver_features
    }

    /// The configuration space as it is.
    #[cfg(test)]
    pub(crate) fn config(&self) -> &[u8] {
        &self.config
    }

    /// How often the driver reset the device since it was made here.
    pub(crate) fn resets(&self) -> u64 {
        self.resets
    }

    /// Changes bytes of the configuration space.
    pub(crate) fn change_config(&mut self, at: usize, bytes: &[u8]) {
        for (to, from) in self.config.iter_mut().skip(at).zip(bytes) {
            *to = *from;
        }
        self.config_generation = self.config_generation.wrapping_add(1);
    }

    /// What the driver writes where it may, it reads back; all else is ignored.
    fn write_config(&mut self, start: u64, data: &[u8]) -> Request {
        let Ok(start) = usize::try_from(start) else { return Request::None };
        let places = (start..).zip(data).filter(|(at, _)| self.config_writable.contains(at));
        for (at, byte) in places {
            if let Some(to) = self.config.get_mut(at) {
                *to = *byte;
            }
        }
        Request::None
    }

    /// The driver is up and the device not broken.
    pub(crate) fn is_live(&self) -> bool {
        self.status & (STATUS_DRIVER_OK | STATUS_FEATURES_OK | STATUS_NEEDS_RESET) == STATUS_DRIVER_OK | STATUS_FEATURES_OK
    }

    /// Sets bits of the interrupt status.
    pub(crate) fn set_interrupt(&mut self, bits: u32) {
        self.interrupt_status |= bits;
    }

    /// An interrupt that the driver has not acknowledged.
    pub(crate) fn has_interrupt(&self) -> bool {
        self.interrupt_status != 0
    }

    /// The driver broke the rules: nothing is done until it resets the device.
    pub(crate) fn set_broken(&mut self) {
        self.status |= STATUS_NEEDS_RESET;
        self.interrupt_status |= INTERRUPT_CONFIG;
    }

    fn queue(&self) -> Option<&Queue> {
        self.queues.get(self.queue_select as usize)
    }

    pub(crate) fn read(&self, offset: u64, data: &mut [u8]) {
        if let Some(start) = offset.checked_sub(CONFIG) {
            for (index, byte) in (start..).zip(data) {
                *byte = usize::try_from(index).ok().and_then(|index| self.config.get(index)).copied().unwrap_or(0);
            }
            return;
        }
        let value = match offset {
            0x00 => 0x7472_6976,
            0x04 => 2,
            0x08 => self.device_id,
            0x0c => 0x4f4d_494c,
            0x10 => half(self.offered, self.device_features_select),
            0x34 if self.queue().is_some() => u32::from(QUEUE_SIZE_MAX),
            0x44 => self.queue().map_or(0, |queue| u32::from(queue.ready)),
            0x60 => self.interrupt_status,
            0x70 => self.status,
            CONFIG_GENERATION => self.config_generation,
            _ => 0,
        };
        // Registers are 32 bits wide, and only read so.
        if data.len() == 4 {
            data.copy_from_slice(&value.to_le_bytes());
        } else {
            data.fill(0);
        }
    }

    pub(crate) fn write(&mut self, ram: &GuestRam, offset: u64, data: &[u8]) -> Request {
        if let Some(start) = offset.checked_sub(CONFIG) {
            return self.write_config(start, data);
        }
        let Ok(bytes) = <[u8; 4]>::try_from(data) else { return Request::None };
        let value = u32::from_le_bytes(bytes);
        match offset {
            0x14 => self.device_features_select = value,
            0x20 if self.status & STATUS_FEATURES_OK == 0 => {
                set_half(&mut self.driver_features, self.driver_features_select, value);
            }
            0x24 => self.driver_features_select = value,
            0x30 => self.queue_select = value,
            QUEUE_NOTIFY => return Request::Notify(value),
            0x64 => self.interrupt_status &= !value,
            0x70 => return self.set_status(value),
            0x38 | 0x44 | 0x80..=0xa4 => return self.set_queue(ram, offset, value),
            _ => {}
        }
        Request::None
    }

    fn set_status(&mut self, value: u32) -> Request {
        if value == 0 {
            *self = Self {
                device_features_select: 0,
                driver_features_select: 0,
                driver_features: 0,
                queue_select: 0,
                status: 0,
                interrupt_status: 0,
                queues: vec![Queue::default(); self.queues.len()],
                config: std::mem::take(&mut self.config),
                config_writable: self.config_writable.clone(),
                resets: self.resets.wrapping_add(1),
                ..*self
            };
            return Request::Changed;
        }
        let was_live = self.is_live();
        let mut value = value & STATUS_BITS | self.status & STATUS_NEEDS_RESET;
        let unknown = self.driver_features & !self.offered != 0;
        if unknown || self.driver_features & FEATURE_VERSION_1 == 0 {
            // The driver reads this back and learns that its choice of features is refused.
            value &= !STATUS_FEATURES_OK;
        }
        self.status = value;
        if self.is_live() && !was_live { Request::Changed } else { Request::None }
    }

    fn set_queue(&mut self, ram: &GuestRam, offset: u64, value: u32) -> Request {
        let Some(queue) = self.queues.get_mut(self.queue_select as usize) else { return Request::None };
        if queue.ready {
            if offset == 0x44 && value == 0 {
                queue.ready = false;
            }
            return Request::None;
        }
        match offset {
            0x38 => queue.size = u16::try_from(value).unwrap_or(0),
            0x44 if value & 1 == 1 => {
                if queue.check(ram).is_err() {
                    self.set_broken();
                    return Request::Broken("a queue whose size or rings are out of bounds");
                }
                queue.ready = true;
            }
            0x80 | 0x84 => set_half(&mut queue.descriptors, u32::from(offset == 0x84), value),
            0x90 | 0x94 => set_half(&mut queue.avail, u32::from(offset == 0x94), value),
            0xa0 | 0xa4 => set_half(&mut queue.used, u32::from(offset == 0xa4), value),
            _ => {}
        }
        Request::None
    }

    /// Takes over a saved device, if it is the same device, and if what it says of its queues is possible.
    ///
    /// `takes` says whether a saved configuration space (second) may stand for this device's own (first).
    pub(crate) fn load(
        &mut self,
        ram: &GuestRam,
        record: Self,
        takes: impl FnOnce(&[u8], &[u8]) -> bool,
    ) -> Result<(), TransportError> {
        if record.device_id != self.device_id {
            return Err(TransportError::Kind { given: record.device_id, here: self.device_id });
        }
        if record.driver_features & !self.offered != 0 {
            return Err(TransportError::Features { used: record.driver_features, offered: self.offered });
        }
        if record.queues.len() != self.queues.len() {
            return Err(TransportError::Queues { given: record.queues.len(), needed: self.queues.len() });
        }
        if record.config.len() != self.config.len() || !takes(&self.config, &record.config) {
            return Err(TransportError::Config { given: record.config, here: self.config.clone() });
        }
        for (queue, state) in record.queues.iter().enumerate().filter(|(_, state)| state.ready) {
            state.check(ram).map_err(|source| TransportError::Queue { queue, source })?;
        }
        let status = record.status & STATUS_BITS;
        let config_writable = std::mem::take(&mut self.config_writable);
        *self = Self { offered: self.offered, status, config_writable, resets: self.resets, ..record };
        Ok(())
    }
}

fn half(value: u64, select: u32) -> u32 {
    match select {
        0 => value as u32,
        1 => (value >> 32) as u32,
        _ => 0,
    }
}

fn set_half(value: &mut u64, select: u32, half: u32) {
    match select {
        0 => *value = *value & !0xffff_ffff | u64::from(half),
        1 => *value = *value & 0xffff_ffff | u64::from(half) << 32,
        _ => {}
    }
}

#[cfg(test)]
pub(crate) mod tests {
    #![allow(clippy::unwrap_used, clippy::panic)]
    use super::*;
    use crate::memory::{MemoryConfig, Ram};

    fn read(transport: &Transport, offset: u64) -> u32 {
        let mut data = [0; 4];
        transport.read(offset, &mut data);
        u32::from_le_bytes(data)
    }

    /// The register writes by which a driver sets a device up, with queue 0 at 0x1000 and queue 1 at 0x5000.
    pub(crate) fn set_up(write: &mut dyn FnMut(u64, u32)) {
        for value in [0, 1, 3] {
            write(0x70, value);
        }
        for (select, value) in [(0, 1 << 5), (1, 1)] {
            write(0x24, select);
            write(0x20, value);
        }
        write(0x70, 11);
        for (queue, base) in [(0, 0x1000), (1, 0x5000)] {
            for (offset, value) in
                [(0x30, queue), (0x38, 8), (0x80, base), (0x90, base + 0x1000), (0xa0, base + 0x2000), (0x44, 1)]
            {
                write(offset, value);
            }
        }
        write(0x70, 15);
    }

    fn device() -> Transport {
        let config = vec![2, 0, 0, 0, 0, 1, 0, 0];
        Transport::new(&Model { device_id: 1, features: 1 << 5 | 1 << 3, config, config_writable: 6..7, queues: 2 })
    }

    fn equal(ours: &[u8], theirs: &[u8]) -> bool {
        ours == theirs
    }

    #[test]
    fn a_driver_sets_a_device_up_and_it_can_be_moved() {
        let ram = Ram::new(&MemoryConfig::new(4 << 20)).unwrap();
        let mut transport = device();
        assert_eq!((read(&transport, 0), read(&transport, 4), read(&transport, 8)), (0x7472_6976, 2, 1));
        let mut last = Request::None;
        set_up(&mut |offset, value| last = transport.write(ram.guest(), offset, &value.to_le_bytes()));
        assert_eq!(last, Request::Changed);
        assert!(transport.is_live());
        assert_eq!((read(&transport, 0x70), read(&transport, 0x34), read(&transport, 0x44)), (15, 256, 1));
        assert_eq!(transport.write(ram.guest(), 0x50, &1_u32.to_le_bytes()), Request::Notify(1));
        transport.set_interrupt(INTERRUPT_USED);
        let bytes = postcard::to_allocvec(&transport).unwrap();
        let mut moved = device();
        moved.load(ram.guest(), postcard::from_bytes(&bytes).unwrap(), equal).unwrap();
        assert_eq!(moved, Transport { resets: 0, ..transport });
        moved.write(ram.guest(), 0x64, &1_u32.to_le_bytes());
        assert!(!moved.has_interrupt());
        moved.write(ram.guest(), 0x70, &0_u32.to_le_bytes());
        assert_eq!(moved, Transport { resets: 1, ..device() });
    }

    #[test]
    fn a_record_that_does_not_fit_is_refused() {
        let ram = Ram::new(&MemoryConfig::new(4 << 20)).unwrap();
        let mut saved = device();
        set_up(&mut |offset, value| {
            saved.write(ram.guest(), offset, &value.to_le_bytes());
        });
        let mut other_mac = device();
        other_mac.config[5] = 9;
        assert!(matches!(other_mac.load(ram.guest(), saved.clone(), equal), Err(TransportError::Config { .. })));
        let mut poorer = Transport { offered: FEATURE_VERSION_1, ..device() };
        assert!(matches!(poorer.load(ram.guest(), saved.clone(), equal), Err(TransportError::Features { .. })));
        saved.queues[1].used = 1 << 40;
        assert!(matches!(device().load(ram.guest(), saved.clone(), equal), Err(TransportError::Queue { queue: 1, .. })));
        saved.queues.pop();
        assert!(matches!(device().load(ram.guest(), saved, equal), Err(TransportError::Queues { .. })));
    }

    #[test]
    fn features_that_are_not_offered_and_bad_queues_are_refused() {
        let ram = Ram::new(&MemoryConfig::new(4 << 20)).unwrap();
        let mut transport = device();
        transport.write(ram.guest(), 0x20, &(1_u32 << 15).to_le_bytes());
        transport.write(ram.guest(), 0x70, &11_u32.to_le_bytes());
        assert_eq!(read(&transport, 0x70) & STATUS_FEATURES_OK, 0);
        transport.write(ram.guest(), 0x38, &7_u32.to_le_bytes());
        assert!(matches!(transport.write(ram.guest(), 0x44, &1_u32.to_le_bytes()), Request::Broken(_)));
        assert_eq!(read(&transport, 0x70) & STATUS_NEEDS_RESET, STATUS_NEEDS_RESET);
        transport.read(0xfff, &mut [0; 8]);
        transport.write(ram.guest(), 0x30, &u32::MAX.to_le_bytes());
        assert_eq!((read(&transport, 0x34), read(&transport, 0x44)), (0, 0));
    }

    #[test]
    fn the_driver_writes_only_where_it_may_and_is_told_of_changes() {
        let ram = Ram::new(&MemoryConfig::new(4 << 20)).unwrap();
        let mut transport = device();
        for offset in [0x104, 0x106, 0x108, 0x1_0000_0000, u64::MAX] {
            transport.write(ram.guest(), offset, &[9; 4]);
        }
        assert_eq!(transport.config(), [2, 0, 0, 0, 0, 1, 9, 0]);
        let before = read(&transport, 0xfc);
        transport.change_config(7, &[5, 6]);
        assert_eq!((transport.config()[7], read(&transport, 0xfc)), (5, before + 1));
    }
}
