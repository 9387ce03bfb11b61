//! Which device answers at which port and address. Not the devices: those are in `devices/`.

use std::sync::Arc;

use crate::devices::serial::{SERIAL_PORT, Serial};
use crate::devices::worker::VirtioDevice;

/// Where the first virtio-mmio device is; each has 4 KiB.
pub(crate) const MMIO_BASE: u64 = 0xd000_0000;
/// Bytes of one virtio-mmio device.
pub(crate) const MMIO_BYTES: u64 = 0x1000;
/// The interrupt of the first virtio-mmio device.
pub(crate) const MMIO_IRQ_BASE: u32 = 5;
/// The IOAPIC has 24 inputs, of which 5 to 23 are free.
pub(crate) const MMIO_DEVICES_MAX: usize = 19;

/// Where the keyboard controller takes commands, and the one that resets the machine.
pub(crate) const KEYBOARD_COMMAND: u16 = 0x64;
pub(crate) const KEYBOARD_RESET: u8 = 0xfe;
const KEYBOARD_PORTS: [u16; 2] = [0x60, 0x64];
const CMOS_PORTS: [u16; 2] = [0x70, 0x71];
/// ACPI's sleep control register: the guest writes its sleep type and this bit to be switched off.
pub(crate) const SLEEP_PORT: u16 = 0x600;
const SLEEP_ENABLE: u8 = 1 << 5;

/// What a write to a port led to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum PioOutcome {
    /// Handled, or ignored where nothing is.
    Done,
    /// The guest asked to be reset.
    Reset,
    /// The guest asked to be switched off.
    PowerOff,
}

/// The devices of a machine by address.
#[derive(Debug)]
pub(crate) struct Bus {
    pub(crate) serial: Arc<Serial>,
    /// By slot: each has its place in MMIO space, and its interrupt, by its number.
    pub(crate) devices: Vec<Arc<VirtioDevice>>,
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
        if port == SLEEP_PORT && data.first().is_some_and(|byte| byte & SLEEP_ENABLE != 0) {
            return PioOutcome::PowerOff;
        }
        PioOutcome::Done
    }

    pub(crate) fn pio_read(&self, port: u16, data: &mut [u8]) {
        match serial_offset(port) {
            Some(offset) => data.iter_mut().for_each(|byte| *byte = self.serial.read(offset)),
            // An idle keyboard controller, and a CMOS whose clock is never "being updated": both keep kernels from waiting.
            None if KEYBOARD_PORTS.contains(&port)
                || CMOS_PORTS.contains(&port)
                || (SLEEP_PORT..SLEEP_PORT + 2).contains(&port) =>
            {
                data.fill(0);
            }
            // As on a bus where nothing answers.
            None => data.fill(0xff),
        }
    }

    fn device(&self, address: u64) -> Option<(&VirtioDevice, u64)> {
        let offset = address.checked_sub(MMIO_BASE)?;
        let slot = usize::try_from(offset / MMIO_BYTES).ok()?;
        self.devices.get(slot).map(|device| (device.as_ref(), offset % MMIO_BYTES))
    }

    pub(crate) fn mmio_read(&self, address: u64, data: &mut [u8]) {
        match self.device(address) {
            Some((device, offset)) => device.mmio_read(offset, data),
            None => data.fill(0xff),
        }
    }

    pub(crate) fn mmio_write(&self, address: u64, data: &[u8]) {
        if let Some((device, offset)) = self.device(address) {
            device.mmio_write(offset, data);
        }
    }
}

fn serial_offset(port: u16) -> Option<u8> {
    let offset = port.checked_sub(SERIAL_PORT)?;
    u8::try_from(offset).ok().filter(|offset| *offset < 8)
}
