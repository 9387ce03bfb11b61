//! Which device answers at which port and address. Not the devices: those are in `devices/`.

use std::sync::Arc;

use crate::devices::net::NetDevice;
use crate::devices::serial::{SERIAL_PORT, Serial};

/// Where the first virtio-mmio device is; each has 4 KiB.
pub(crate) const MMIO_BASE: u64 = 0xd000_0000;
/// Bytes of one virtio-mmio device.
pub(crate) const MMIO_BYTES: u64 = 0x1000;
/// The interrupt of the first virtio-mmio device.
pub(crate) const MMIO_IRQ_BASE: u32 = 5;
/// The IOAPIC has 24 inputs, of which 5 to 23 are free.
pub(crate) const MMIO_DEVICES_MAX: usize = 19;

const KEYBOARD_COMMAND: u16 = 0x64;
const KEYBOARD_RESET: u8 = 0xfe;
const KEYBOARD_PORTS: [u16; 2] = [0x60, 0x64];
const CMOS_PORTS: [u16; 2] = [0x70, 0x71];

/// What a write to a port led to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum PioOutcome {
    /// Handled, or ignored where nothing is.
    Done,
    /// The guest asked to be reset.
    Reset,
}

/// The devices of a machine by address.
#[derive(Debug)]
pub(crate) struct Bus {
    pub(crate) serial: Arc<Serial>,
    pub(crate) nics: Vec<Arc<NetDevice>>,
}

impl Bus {
    pub(crate) fn pio_write(&self, port: u16, data: &[u8]) -> PioOutcome {
        if let Some(offset) = serial_offset(port) {
            // A string instruction may bring many bytes, all for this one port.
            for byte in data {
                self.serial.write(offset, *byte);
            }
        }
        if port == KEYBOARD_COMMAND && data.first() == Some(&KEYBOARD_RESET) {
            return PioOutcome::Reset;
        }
        PioOutcome::Done
    }

    pub(crate) fn pio_read(&self, port: u16, data: &mut [u8]) {
        match serial_offset(port) {
            Some(offset) => data.iter_mut().for_each(|byte| *byte = self.serial.read(offset)),
            // An idle keyboard controller, and a CMOS whose clock is never "being updated": both keep kernels from waiting.
            None if KEYBOARD_PORTS.contains(&port) || CMOS_PORTS.contains(&port) => data.fill(0),
            // As on a bus where nothing answers.
            None => data.fill(0xff),
        }
    }

    fn nic(&self, address: u64) -> Option<(&NetDevice, u64)> {
        let offset = address.checked_sub(MMIO_BASE)?;
        let index = usize::try_from(offset / MMIO_BYTES).ok()?;
        self.nics.get(index).map(|nic| (nic.as_ref(), offset % MMIO_BYTES))
    }

    pub(crate) fn mmio_read(&self, address: u64, data: &mut [u8]) {
        match self.nic(address) {
            Some((nic, offset)) => nic.mmio_read(offset, data),
            None => data.fill(0xff),
        }
    }

    pub(crate) fn mmio_write(&self, address: u64, data: &[u8]) {
        if let Some((nic, offset)) = self.nic(address) {
            nic.mmio_write(offset, data);
        }
    }
}

fn serial_offset(port: u16) -> Option<u8> {
    let offset = port.checked_sub(SERIAL_PORT)?;
    u8::try_from(offset).ok().filter(|offset| *offset < 8)
}
