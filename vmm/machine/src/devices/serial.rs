//! The serial port, a 16550A: registers, interrupt, record. Not the terminal: output goes to a sink of the owner.
//!
//! A sink that blocks must stop neither the guest nor a pause, so a thread of its own writes it from a bounded buffer. A guest
//! gives byte after byte, so that thread waits a moment for more before it writes: it is woken once for a line and not for each byte.

use std::collections::VecDeque;
use std::io::Write;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};
use vmm_sys_util::eventfd::EventFd;

/// The first of the port's eight I/O ports (COM1).
pub(crate) const SERIAL_PORT: u16 = 0x3f8;
/// COM1's interrupt.
pub(crate) const SERIAL_IRQ: u32 = 4;

const INPUT_BYTES_MAX: usize = 256;
const OUTPUT_BYTES_MAX: usize = 256 << 10;
/// How long the first byte waits for others.
const GATHER: Duration = Duration::from_millis(2);
/// How long a stopping machine waits for its output to be written.
const FLUSH_MAX: Duration = Duration::from_millis(200);

const IER_RECEIVED: u8 = 1;
const IER_EMPTY: u8 = 2;
const IER_BITS: u8 = 0x0f;
const LCR_DLAB: u8 = 0x80;
const MCR_LOOP: u8 = 0x10;
const LSR_DATA: u8 = 0x01;
const LSR_EMPTY: u8 = 0x60;
const IIR_NONE: u8 = 0x01;
const IIR_EMPTY: u8 = 0x02;
const IIR_RECEIVED: u8 = 0x04;
const IIR_FIFO: u8 = 0xc0;

/// Where the guest's serial output goes.
pub enum SerialSink {
    /// Nowhere.
    Null,
    /// To a writer, from a thread of its own. Output beyond a buffer of 256 KiB is lost while the writer blocks.
    Writer(Box<dyn Write + Send>),
}

impl std::fmt::Debug for SerialSink {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Null => "Null",
            Self::Writer(_) => "Writer",
        })
    }
}

/// The serial port's record, version 1.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct SerialRecord {
    divisor: u16,
    interrupt_enable: u8,
    line_control: u8,
    modem_control: u8,
    scratch: u8,
    fifo_enabled: bool,
    /// The "transmitter empty" interrupt is due.
    empty_due: bool,
    input: VecDeque<u8>,
}

impl Default for SerialRecord {
    fn default() -> Self {
        Self {
            divisor: 12,
            interrupt_enable: 0,
            line_control: 3,
            modem_control: 0x08,
            scratch: 0,
            fifo_enabled: false,
            empty_due: false,
            input: VecDeque::new(),
        }
    }
}

#[derive(Debug, Default)]
struct Output {
    bytes: VecDeque<u8>,
    writing: bool,
    closed: bool,
    lost: u64,
}

#[derive(Debug, Default)]
struct OutputBuffer {
    state: Mutex<Output>,
    changed: Condvar,
}

impl OutputBuffer {
    fn lock(&self) -> MutexGuard<'_, Output> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn push(&self, byte: u8) {
        let mut output = self.lock();
        if output.closed {
            return;
        }
        // Who writes sleeps only while there is nothing.
        let wakes = output.bytes.is_empty();
        if output.bytes.len() < OUTPUT_BYTES_MAX {
            output.bytes.push_back(byte);
        } else {
            output.lost += 1;
            if output.lost == 1 {
                tracing::warn!("serial output is lost: its writer is too slow");
            }
        }
        if wakes {
            self.changed.notify_all();
        }
    }

    fn write_all_to(&self, mut sink: Box<dyn Write + Send>) {
        loop {
            let bytes: Vec<u8> = {
                let mut output = self.lock();
                output.writing = false;
                self.changed.notify_all();
                while output.bytes.is_empty() && !output.closed {
                    output = self.changed.wait(output).unwrap_or_else(PoisonError::into_inner);
                }
                let gathered = self.changed.wait_timeout_while(output, GATHER, |output| !output.closed);
                output = gathered.unwrap_or_else(PoisonError::into_inner).0;
                output.writing = !output.bytes.is_empty();
                output.bytes.drain(..).collect()
            };
            if bytes.is_empty() {
                return;
            }
            if let Err(error) = sink.write_all(&bytes).and_then(|()| sink.flush()) {
                tracing::warn!(%error, "serial output cannot be written any more");
                let mut output = self.lock();
                output.closed = true;
                output.writing = false;
                output.bytes.clear();
                self.changed.notify_all();
                return;
            }
        }
    }

    /// Waits, but not for long, until all output is written.
    fn close(&self) {
        let deadline = Instant::now() + FLUSH_MAX;
        let mut output = self.lock();
        output.closed = true;
        self.changed.notify_all();
        while !output.bytes.is_empty() || output.writing {
            let Some(left) = deadline.checked_duration_since(Instant::now()) else { return };
            output = self.changed.wait_timeout(output, left).unwrap_or_else(PoisonError::into_inner).0;
        }
    }
}

/// The serial port.
#[derive(Debug)]
pub(crate) struct Serial {
    registers: Mutex<SerialRecord>,
    interrupt: EventFd,
    output: Option<Arc<OutputBuffer>>,
}

impl Serial {
    /// A port whose output goes to `sink`; `interrupt` is bound to its IRQ.
    pub(crate) fn new(sink: SerialSink, interrupt: EventFd) -> std::io::Result<Self> {
        let output = match sink {
            SerialSink::Null => None,
            SerialSink::Writer(writer) => {
                let buffer = Arc::new(OutputBuffer::default());
                let writing = Arc::clone(&buffer);
                std::thread::Builder::new().name("serial".to_owned()).spawn(move || writing.write_all_to(writer))?;
                Some(buffer)
            }
        };
        Ok(Self { registers: Mutex::default(), interrupt, output })
    }

    fn lock(&self) -> MutexGuard<'_, SerialRecord> {
        self.registers.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn raise_if_due(&self, registers: &SerialRecord) {
        if registers.interrupt_id() != IIR_NONE {
            // The counter of an eventfd does not fill up: irqfd takes it at once.
            let _ = self.interrupt.write(1);
        }
    }

    pub(crate) fn write(&self, offset: u8, value: u8) {
        let mut registers = self.lock();
        let divisor = registers.line_control & LCR_DLAB != 0;
        match offset {
            0 if divisor => registers.divisor = registers.divisor & 0xff00 | u16::from(value),
            1 if divisor => registers.divisor = registers.divisor & 0x00ff | u16::from(value) << 8,
            0 if registers.modem_control & MCR_LOOP != 0 => registers.take_input(&[value]),
            0 => {
                if let Some(output) = &self.output {
                    output.push(value);
                }
                registers.empty_due = true;
            }
            1 => {
                let newly = value & !registers.interrupt_enable;
                registers.interrupt_enable = value & IER_BITS;
                // The transmitter is always empty, so whoever starts listening hears of it.
                registers.empty_due |= newly & IER_EMPTY != 0;
            }
            2 => {
                registers.fifo_enabled = value & 1 != 0;
                if value & 2 != 0 {
                    registers.input.clear();
                }
            }
            3 => registers.line_control = value,
            4 => registers.modem_control = value & 0x1f,
            7 => registers.scratch = value,
            _ => {}
        }
        if offset <= 1 {
            self.raise_if_due(&registers);
        }
    }

    pub(crate) fn read(&self, offset: u8) -> u8 {
        let mut registers = self.lock();
        let divisor = registers.line_control & LCR_DLAB != 0;
        match offset {
            0 if divisor => registers.divisor.to_le_bytes()[0],
            1 if divisor => registers.divisor.to_le_bytes()[1],
            0 => {
                let byte = registers.input.pop_front().unwrap_or(0);
                self.raise_if_due(&registers);
                byte
            }
            1 => registers.interrupt_enable,
            2 => {
                let id = registers.interrupt_id();
                if id == IIR_EMPTY {
                    registers.empty_due = false;
                }
                id | if registers.fifo_enabled { IIR_FIFO } else { 0 }
            }
            3 => registers.line_control,
            4 => registers.modem_control,
            5 => LSR_EMPTY | if registers.input.is_empty() { 0 } else { LSR_DATA },
            6 => registers.modem_status(),
            7 => registers.scratch,
            _ => 0xff,
        }
    }

    /// Bytes for the guest to read; returns how many had room.
    pub(crate) fn input(&self, bytes: &[u8]) -> usize {
        let mut registers = self.lock();
        let room = INPUT_BYTES_MAX - registers.input.len().min(INPUT_BYTES_MAX);
        let taken = bytes.get(..room.min(bytes.len())).unwrap_or(&[]);
        registers.take_input(taken);
        self.raise_if_due(&registers);
        taken.len()
    }

    pub(crate) fn save(&self) -> SerialRecord {
        self.lock().clone()
    }

    pub(crate) fn load(&self, mut record: SerialRecord) {
        record.input.truncate(INPUT_BYTES_MAX);
        *self.lock() = record;
    }

    /// After a load: an interrupt that was on its way at the save is raised again; one too many does no harm.
    pub(crate) fn raise_again(&self) {
        self.raise_if_due(&self.lock());
    }
}

impl SerialRecord {
    fn interrupt_id(&self) -> u8 {
        if self.interrupt_enable & IER_RECEIVED != 0 && !self.input.is_empty() {
            IIR_RECEIVED
        } else if self.interrupt_enable & IER_EMPTY != 0 && self.empty_due {
            IIR_EMPTY
        } else {
            IIR_NONE
        }
    }

    fn take_input(&mut self, bytes: &[u8]) {
        let room = INPUT_BYTES_MAX.saturating_sub(self.input.len());
        self.input.extend(bytes.iter().take(room));
    }

    /// Carrier, ready to send, ready; in loopback the port's own outputs, which drivers use to find a port.
    fn modem_status(&self) -> u8 {
        if self.modem_control & MCR_LOOP == 0 {
            return 0xb0;
        }
        let control = self.modem_control;
        (control & 2) << 3 | (control & 1) << 5 | (control & 4) << 4 | (control & 8) << 4
    }
}

impl Drop for Serial {
    fn drop(&mut self) {
        if let Some(output) = &self.output {
            output.close();
        }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::panic)]
    use super::*;
    use std::sync::mpsc;

    struct Channel(mpsc::Sender<Vec<u8>>);

    impl Write for Channel {
        fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
            self.0.send(bytes.to_vec()).map_err(|_| std::io::ErrorKind::BrokenPipe)?;
            Ok(bytes.len())
        }
        fn flush(&mut self) -> std::io::Result<()> {
            Ok(())
        }
    }

    fn port() -> (Serial, EventFd, mpsc::Receiver<Vec<u8>>) {
        let interrupt = EventFd::new(libc::EFD_NONBLOCK).unwrap();
        let (sender, receiver) = mpsc::channel();
        let serial = Serial::new(SerialSink::Writer(Box::new(Channel(sender))), interrupt.try_clone().unwrap()).unwrap();
        (serial, interrupt, receiver)
    }

    #[test]
    fn output_reaches_the_sink() {
        let (serial, _, receiver) = port();
        b"hello".iter().for_each(|byte| serial.write(0, *byte));
        drop(serial);
        let all: Vec<u8> = receiver.iter().flatten().collect();
        assert_eq!(all, b"hello");
    }

    #[test]
    fn input_interrupts_and_is_bounded() {
        let (serial, interrupt, _receiver) = port();
        assert_eq!(serial.input(b"x"), 1);
        assert!(interrupt.read().is_err(), "no interrupt while it is not enabled");
        serial.write(1, IER_RECEIVED);
        assert!(interrupt.read().is_ok());
        assert_eq!(serial.read(2) & 0x0f, IIR_RECEIVED);
        assert_eq!((serial.read(5) & LSR_DATA, serial.read(0), serial.read(5) & LSR_DATA), (1, b'x', 0));
        assert_eq!(serial.input(&[1; 1000]), INPUT_BYTES_MAX);
    }

    #[test]
    fn registers_survive_a_move() {
        let (serial, _, _receiver) = port();
        for (offset, value) in [(3, 0x83), (0, 0x34), (1, 0x12), (3, 0x03), (1, 0x03), (2, 0x01), (4, 0x0b), (7, 0x5a)] {
            serial.write(offset, value);
        }
        serial.input(b"ab");
        let saved = serial.save();
        let bytes = postcard::to_allocvec(&saved).unwrap();
        assert_eq!(bytes, [0xb4, 0x24, 3, 3, 0x0b, 0x5a, 1, 1, 2, b'a', b'b'], "golden bytes of version 1");
        let (other, interrupt, _receiver) = port();
        other.load(postcard::from_bytes(&bytes).unwrap());
        assert_eq!(other.save(), saved);
        other.raise_again();
        assert!(interrupt.read().is_ok(), "a pending interrupt is raised again");
        assert_eq!((other.read(0), other.read(0), other.read(7), other.read(6)), (b'a', b'b', 0x5a, 0xb0));
    }
}
