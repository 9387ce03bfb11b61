//! A virtio network card between a guest and a TAP. Not the registers (`transport.rs`), the rings (`queue.rs`) nor the
//! thread (`worker.rs`).
//!
//! With offloads, frames carry what is left to be done (checksum, segmentation) in their header, and guest and TAP pass it
//! on; a frame may then be 64 KiB. Frames for a guest without buffers wait in the TAP. What waits at a save is read and moves
//! with the guest, as far as there is room: a TAP dies with its host's VMM.

use std::collections::VecDeque;
use std::io::{ErrorKind, Read, Write};
use std::os::fd::{AsRawFd, RawFd};

use serde::{Deserialize, Serialize};

use super::queue::{Chain, Queue, QueueError};
use super::transport::Transport;
use super::worker::{Backend, Model, Shared, Turn};
use crate::memory::GuestRam;
use crate::tap::{Offloads, Tap, VNET_HEADER_BYTES};

const DEVICE_ID: u32 = 1;
const FEATURE_CSUM: u64 = 1;
const FEATURE_GUEST_CSUM: u64 = 1 << 1;
const FEATURE_MTU: u64 = 1 << 3;
const FEATURE_MAC: u64 = 1 << 5;
const FEATURE_GUEST_TSO4: u64 = 1 << 7;
const FEATURE_GUEST_TSO6: u64 = 1 << 8;
const FEATURE_GUEST_ECN: u64 = 1 << 9;
const FEATURE_HOST_TSO4: u64 = 1 << 11;
const FEATURE_HOST_TSO6: u64 = 1 << 12;
const FEATURE_HOST_ECN: u64 = 1 << 13;
const FEATURE_MRG_RXBUF: u64 = 1 << 15;
const FEATURE_STATUS: u64 = 1 << 16;
const FEATURE_CTRL_VQ: u64 = 1 << 17;
const FEATURE_GUEST_ANNOUNCE: u64 = 1 << 21;
const ALWAYS: u64 = FEATURE_MTU | FEATURE_MAC | FEATURE_MRG_RXBUF | FEATURE_STATUS | FEATURE_CTRL_VQ | FEATURE_GUEST_ANNOUNCE;
const OFFLOADS: u64 = FEATURE_CSUM
    | FEATURE_GUEST_CSUM
    | FEATURE_GUEST_TSO4
    | FEATURE_GUEST_TSO6
    | FEATURE_GUEST_ECN
    | FEATURE_HOST_TSO4
    | FEATURE_HOST_TSO6
    | FEATURE_HOST_ECN;

const RECEIVE: usize = 0;
const TRANSMIT: usize = 1;
const CONTROL: usize = 2;
/// The status in the configuration space: two bytes, link up and "announce yourself".
const STATUS_AT: usize = 6;
const STATUS_LINK_UP: u8 = 1;
const STATUS_ANNOUNCE: u8 = 2;
const CONTROL_ANNOUNCE: [u8; 2] = [3, 0];
const CONTROL_OK: u8 = 0;
const CONTROL_ERROR: u8 = 1;
/// Frames moved in each direction before other work, and a pause, have their turn.
const TURN_FRAMES_MAX: usize = 64;
/// The largest frame with its header: 64 KiB of IP packet, Ethernet and VLAN headers.
const FRAME_BYTES_MAX: usize = VNET_HEADER_BYTES + 65_535 + 22;
const FRAME_BYTES_MIN: usize = VNET_HEADER_BYTES + 14;
/// Where the header says how many buffers a frame takes.
const BUFFERS_AT: usize = 10;

/// Frames that a record takes along, and their bytes: a quarter of what a record may have.
const WAITING_MAX: usize = 256;
const WAITING_BYTES_MAX: usize = 256 << 10;

/// What a card has beside its registers; the second part of its record.
#[derive(Debug, Default, Serialize, Deserialize)]
struct Extra {
    /// Frames with their headers that were read from the TAP and have not reached the guest.
    waiting: Vec<Vec<u8>>,
}

/// A network card.
#[derive(Debug)]
pub(crate) struct Net {
    mac: [u8; 6],
    mtu: u16,
    tap: Tap,
    offload: bool,
    tap_usable: bool,
    /// What the driver chose, as the TAP was last told.
    features: u64,
    frame: Vec<u8>,
    /// Frames that were read and wait for buffers of the guest.
    waiting: VecDeque<Vec<u8>>,
}

/// What came of a look at the TAP.
enum Heard {
    /// A frame of so many bytes is in the buffer.
    Frame(usize),
    /// Something that is not for the guest.
    Nothing,
    /// Nothing until it wakes the thread.
    Silence,
    /// The TAP is lost.
    End,
}

impl Net {
    /// A card on `tap`; `mtu` is what the guest is told. Offloads are offered if `offload` and the TAP allow it.
    pub(crate) fn new(mac: [u8; 6], mtu: u16, tap: Tap, offload: bool) -> Self {
        let offload = offload && tap.can_offload();
        Self { mac, mtu, tap, offload, tap_usable: true, features: 0, frame: vec![0; FRAME_BYTES_MAX], waiting: VecDeque::new() }
    }

    /// Who sent the frame that was just read.
    fn sender(&self) -> &[u8] {
        self.frame.get(VNET_HEADER_BYTES + 6..VNET_HEADER_BYTES + 12).unwrap_or_default()
    }

    /// Tells the TAP what the driver of this guest can take; a frame must never come in a form that it did not choose.
    fn set_offloads(&mut self, features: u64, shared: &Shared) {
        if features == self.features {
            return;
        }
        self.features = features;
        let chosen = |bit: u64| features & bit != 0;
        let offloads = Offloads {
            checksum: chosen(FEATURE_GUEST_CSUM),
            tso4: chosen(FEATURE_GUEST_TSO4),
            tso6: chosen(FEATURE_GUEST_TSO6),
            ecn: chosen(FEATURE_GUEST_ECN),
        };
        if let Err(error) = self.tap.set_offloads(offloads) {
            self.lose_tap(shared, &error.to_string());
        }
    }

    fn lose_tap(&mut self, shared: &Shared, reason: &str) {
        if self.tap_usable {
            self.tap_usable = false;
            shared.trouble(reason);
        }
    }

    /// Frames of the guest to the TAP. One that the TAP does not take, or that is none, is dropped, as on a wire.
    fn transmit(&mut self, shared: &Shared, transport: &mut Transport, moved: &mut bool) -> Result<Turn, QueueError> {
        let ram = shared.ram();
        let Some(queue) = transport.queues.get_mut(TRANSMIT) else { return Ok(Turn::Idle) };
        for _ in 0..TURN_FRAMES_MAX {
            let Some(chain) = queue.pop(ram)? else { return Ok(Turn::Idle) };
            let bytes = chain.read(ram, &mut self.frame)?.filter(|bytes| *bytes >= FRAME_BYTES_MIN);
            if let Some(frame) = bytes.and_then(|bytes| self.frame.get_mut(..bytes)) {
                // The kernel checks what a header asks for; without offloads the frame is complete whatever it says.
                let believed = if self.features & FEATURE_CSUM != 0 { BUFFERS_AT } else { 0 };
                frame.iter_mut().take(VNET_HEADER_BYTES).skip(believed).for_each(|byte| *byte = 0);
                if let Err(error) = self.tap.file().write(frame) {
                    tracing::trace!(device = shared.name(), %error, "frame dropped");
                }
            }
            queue.push_used(ram, chain.head, 0)?;
            *moved = true;
        }
        Ok(Turn::More)
    }

    /// Reads the TAP.
    fn hear(&mut self, shared: &Shared) -> Heard {
        match self.tap.file().read(&mut self.frame) {
            // What the host announces in the guest's name reaches the guest's port too, and would alarm it. Where the TAP's filter
            // has not dropped it before.
            Ok(bytes) if bytes >= FRAME_BYTES_MIN && self.sender() == self.mac => Heard::Nothing,
            Ok(bytes) if bytes >= FRAME_BYTES_MIN => Heard::Frame(bytes),
            Ok(0) => {
                self.lose_tap(shared, "the other end of its TAP was closed");
                Heard::End
            }
            Ok(_) => Heard::Nothing,
            Err(error) if error.kind() == ErrorKind::Interrupted => Heard::Nothing,
            Err(error) if error.kind() == ErrorKind::WouldBlock => Heard::Silence,
            Err(error) => {
                self.lose_tap(shared, &format!("its TAP cannot be read: {error}"));
                Heard::End
            }
        }
    }

    /// Frames of the TAP to the guest, as long as it offers buffers; others wait in the TAP.
    fn receive(&mut self, shared: &Shared, transport: &mut Transport, moved: &mut bool) -> Result<Turn, QueueError> {
        let ram = shared.ram();
        for _ in 0..TURN_FRAMES_MAX {
            let Some(queue) = transport.queues.get_mut(RECEIVE) else { return Ok(Turn::Idle) };
            if !queue.has_chain(ram)? {
                return Ok(Turn::Idle);
            }
            if let Some(frame) = self.waiting.front_mut() {
                if !deliver(ram, queue, frame, self.features)? {
                    return Ok(Turn::Idle);
                }
                self.waiting.pop_front();
                *moved = true;
                continue;
            }
            if !self.tap_usable {
                return Ok(Turn::Idle);
            }
            let bytes = match self.hear(shared) {
                Heard::Frame(bytes) => bytes,
                Heard::Nothing => continue,
                Heard::Silence => return Ok(Turn::WantsInput),
                Heard::End => return Ok(Turn::Idle),
            };
            let frame = self.frame.get_mut(..bytes).unwrap_or_default();
            if !deliver(ram, queue, frame, self.features)? {
                let frame = frame.to_vec();
                self.waiting.push_back(frame);
                return Ok(Turn::Idle);
            }
            *moved = true;
        }
        Ok(Turn::More)
    }

    /// Takes what waits in the TAP, as far as a record has room for it.
    fn take_waiting(&mut self, shared: &Shared) {
        let mut bytes: usize = self.waiting.iter().map(Vec::len).sum();
        // Each look that is for nothing counts too: a flood must not hold up a save.
        for _ in 0..2 * WAITING_MAX {
            if !self.tap_usable || self.waiting.len() >= WAITING_MAX || bytes + FRAME_BYTES_MAX > WAITING_BYTES_MAX {
                return;
            }
            match self.hear(shared) {
                Heard::Frame(length) => {
                    bytes += length;
                    self.waiting.push_back(self.frame.get(..length).unwrap_or_default().to_vec());
                }
                Heard::Nothing => {}
                Heard::Silence | Heard::End => return,
            }
        }
    }

    /// Commands of the driver; the one that is known says that the guest has announced itself.
    fn control(&mut self, shared: &Shared, transport: &mut Transport, moved: &mut bool) -> Result<(), QueueError> {
        let ram = shared.ram();
        for _ in 0..TURN_FRAMES_MAX {
            let Some(queue) = transport.queues.get_mut(CONTROL) else { return Ok(()) };
            let Some(chain) = queue.pop(ram)? else { return Ok(()) };
            let mut command = [0; 16];
            let known = chain.read(ram, &mut command)?.is_some() && command.starts_with(&CONTROL_ANNOUNCE);
            let written = chain.write(ram, &[if known { CONTROL_OK } else { CONTROL_ERROR }])?;
            queue.push_used(ram, chain.head, u32::try_from(written).unwrap_or(0))?;
            *moved = true;
            if known {
                transport.change_config(STATUS_AT, &[STATUS_LINK_UP]);
            }
        }
        Ok(())
    }
}

/// Gives a frame to the guest in the form that its driver chose; false, and nothing is taken, while it has no room for it.
fn deliver(ram: &GuestRam, queue: &mut Queue, frame: &mut [u8], features: u64) -> Result<bool, QueueError> {
    if features & FEATURE_GUEST_CSUM == 0 {
        // Without offloads the header is plain, whatever the host knows of checksums.
        frame.iter_mut().take(BUFFERS_AT).for_each(|byte| *byte = 0);
    }
    if features & FEATURE_MRG_RXBUF != 0 { deliver_merged(ram, queue, frame) } else { deliver_whole(ram, queue, frame) }
}

/// Writes a frame into one chain. One that does not fit is lost, not cut, and its chain is given back empty.
fn deliver_whole(ram: &GuestRam, queue: &mut Queue, frame: &mut [u8]) -> Result<bool, QueueError> {
    let Some(chain) = queue.pop(ram)? else { return Ok(false) };
    set_buffers(frame, 1);
    let written = if chain.room() < frame.len() { 0 } else { chain.write(ram, frame)? };
    queue.push_used(ram, chain.head, u32::try_from(written).unwrap_or(0))?;
    Ok(true)
}

/// Writes a frame into as many chains as it takes; false, and nothing is taken, while too few are there.
fn deliver_merged(ram: &GuestRam, queue: &mut Queue, frame: &mut [u8]) -> Result<bool, QueueError> {
    let mut chains: Vec<Chain> = Vec::new();
    let mut room = 0_usize;
    while room < frame.len() {
        let Some(chain) = queue.pop(ram)? else { break };
        room = room.saturating_add(chain.room());
        chains.push(chain);
    }
    let count = u16::try_from(chains.len()).unwrap_or(u16::MAX);
    let first = chains.first().map_or(0, Chain::room);
    if room < frame.len() && count < queue.size {
        queue.put_back(count);
        return Ok(false);
    }
    if room < frame.len() || first < VNET_HEADER_BYTES {
        // All buffers of the queue together are too small, or the header would be cut: the frame is lost.
        let empty: Vec<(u16, u32)> = chains.iter().map(|chain| (chain.head, 0)).collect();
        queue.push_all_used(ram, &empty)?;
        return Ok(true);
    }
    set_buffers(frame, count);
    let mut rest: &[u8] = frame;
    let mut used = Vec::with_capacity(chains.len());
    for chain in &chains {
        let written = chain.write(ram, rest)?;
        rest = rest.get(written..).unwrap_or_default();
        used.push((chain.head, u32::try_from(written).unwrap_or(0)));
    }
    queue.push_all_used(ram, &used)?;
    Ok(true)
}

fn set_buffers(frame: &mut [u8], count: u16) {
    for (to, from) in frame.iter_mut().skip(BUFFERS_AT).zip(count.to_le_bytes()) {
        *to = from;
    }
}

impl Backend for Net {
    fn model(&self) -> Model {
        let mut config = self.mac.to_vec();
        // Link up; one pair of queues; the MTU.
        config.extend([STATUS_LINK_UP, 0, 1, 0]);
        config.extend(self.mtu.to_le_bytes());
        let features = if self.offload { ALWAYS | OFFLOADS } else { ALWAYS };
        Model { device_id: DEVICE_ID, features, config, config_writable: 0..0, queues: 3 }
    }

    fn turn(&mut self, shared: &Shared) -> Result<Turn, QueueError> {
        let mut transport = shared.transport();
        self.set_offloads(transport.driver_features(), shared);
        let mut moved = false;
        let done = self.transmit(shared, &mut transport, &mut moved).and_then(|transmit| {
            let receive = self.receive(shared, &mut transport, &mut moved)?;
            self.control(shared, &mut transport, &mut moved)?;
            Ok(if transmit == Turn::More { transmit } else { receive })
        });
        if moved {
            shared.interrupt_for_used(&mut transport, RECEIVE..CONTROL + 1);
        }
        done
    }

    fn input(&self) -> Option<RawFd> {
        self.tap_usable.then(|| self.tap.file().as_raw_fd())
    }

    fn input_lost(&mut self, shared: &Shared, reason: &str) {
        self.lose_tap(shared, &format!("its TAP: {reason}"));
    }

    fn arrived(&mut self, shared: &Shared) {
        let (live, features) = {
            let transport = shared.transport();
            (transport.is_live(), transport.driver_features())
        };
        if live && features & FEATURE_GUEST_ANNOUNCE != 0 {
            shared.change_config(STATUS_AT, &[STATUS_LINK_UP | STATUS_ANNOUNCE]);
        }
    }

    fn save(&mut self, shared: &Shared) -> Vec<u8> {
        self.take_waiting(shared);
        let waiting = self.waiting.iter().cloned().collect();
        // Plain bytes in vectors: this cannot fail, and without them some frames are lost.
        postcard::to_allocvec(&Extra { waiting }).unwrap_or_default()
    }

    fn load(&mut self, bytes: &[u8]) -> Result<(), String> {
        let extra: Extra = postcard::from_bytes(bytes).map_err(|error| format!("its waiting frames cannot be read: {error}"))?;
        let (frames, all): (usize, usize) = (extra.waiting.len(), extra.waiting.iter().map(Vec::len).sum());
        let good = |frame: &Vec<u8>| (FRAME_BYTES_MIN..=FRAME_BYTES_MAX).contains(&frame.len());
        if frames > WAITING_MAX + 1 || all > WAITING_BYTES_MAX + FRAME_BYTES_MAX || !extra.waiting.iter().all(good) {
            return Err(format!(
                "it has {frames} waiting frames of {all} bytes in all: too many, or of a size that no frame has"
            ));
        }
        self.waiting = extra.waiting.into();
        Ok(())
    }

    fn takes_config(&self, ours: &[u8], theirs: &[u8]) -> bool {
        let fixed = |config: &[u8]| {
            let (mac, rest) = config.split_at(STATUS_AT.min(config.len()));
            (mac.to_vec(), rest.get(2..).unwrap_or_default().to_vec())
        };
        fixed(ours) == fixed(theirs)
    }
}

#[cfg(test)]
#[path = "net_tests.rs"]
mod tests;
