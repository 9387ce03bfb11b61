//! Frames as they pass through a namespace, with the time and the interface, by an AF_PACKET socket.
//! The bulk of a migration is left out by a filter in the kernel. What an announcement says is read by `announced`.

use crate::netns;
use anyhow::{Context, Result};
use nix::errno::Errno;
use nix::sys::socket::{LinkAddr, recvfrom};
use socket2::{Domain, Protocol, SockFilter, Socket, Type};
use std::collections::BTreeMap;
use std::os::fd::AsRawFd;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

/// ETH_P_ALL.
const ALL_PROTOCOLS: u16 = 3;
/// PACKET_OUTGOING of linux/if_packet.h.
const OUTGOING: u8 = 4;

/// One frame.
#[derive(Debug, Clone)]
pub struct Frame {
    /// When this process saw it.
    pub at: Instant,
    /// The interface's name in the namespace.
    pub interface: String,
    /// Whether it left through the interface (else it came in).
    pub outgoing: bool,
    /// From the destination's MAC on.
    pub bytes: Vec<u8>,
}

impl Frame {
    /// The MAC address of the sender, if the frame is that long.
    pub fn sender(&self) -> Option<[u8; 6]> {
        self.bytes.get(6..12)?.try_into().ok()
    }

    /// The EtherType, if the frame is that long.
    pub fn ethertype(&self) -> Option<u16> {
        Some(u16::from_be_bytes(self.bytes.get(12..14)?.try_into().ok()?))
    }
}

/// A running capture.
#[derive(Debug)]
pub struct Capture {
    stop: Arc<AtomicBool>,
    frames: Arc<Mutex<Vec<Frame>>>,
    thread: Option<JoinHandle<()>>,
}

impl Capture {
    /// Starts to keep, on every interface of the namespace of that name, each frame that is no IPv4 or was sent by a guest
    /// (a MAC that begins with 52:54:00:77).
    pub fn start(netns: &str) -> Result<Capture> {
        let names: BTreeMap<u32, String> = netns::links_of(netns)?.into_iter().map(|l| (l.ifindex, l.ifname)).collect();
        let socket = netns::within(netns, open)?;
        let (stop, frames) = (Arc::new(AtomicBool::new(false)), Arc::new(Mutex::default()));
        let (stop_seen, kept) = (stop.clone(), Arc::clone(&frames));
        let thread =
            std::thread::Builder::new().name("capture".into()).spawn(move || listen(&socket, &names, &stop_seen, &kept))?;
        Ok(Capture { stop, frames, thread: Some(thread) })
    }

    /// What was seen until now.
    pub fn frames(&self) -> Vec<Frame> {
        self.frames.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }
}

impl Drop for Capture {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

fn open() -> Result<Socket> {
    let protocol = Protocol::from(i32::from(ALL_PROTOCOLS.to_be()));
    let socket = Socket::new(Domain::PACKET, Type::RAW, Some(protocol)).context("AF_PACKET (needs CAP_NET_RAW)")?;
    // ldh [12]; jeq IPv4, 1, 0 -> accept; ld [6]; jeq guest, accept, drop
    socket.attach_filter(&[
        SockFilter::new(0x28, 0, 0, 12),
        SockFilter::new(0x15, 0, 2, 0x0800),
        SockFilter::new(0x20, 0, 0, 6),
        SockFilter::new(0x15, 0, 1, 0x5254_0077),
        SockFilter::new(0x06, 0, 0, 2048),
        SockFilter::new(0x06, 0, 0, 0),
    ])?;
    socket.set_read_timeout(Some(Duration::from_millis(20)))?;
    let _ = socket.set_recv_buffer_size(8 << 20);
    Ok(socket)
}

fn listen(socket: &Socket, names: &BTreeMap<u32, String>, stop: &AtomicBool, frames: &Mutex<Vec<Frame>>) {
    let mut buffer = [0u8; 2048];
    while !stop.load(Ordering::Relaxed) {
        match recvfrom::<LinkAddr>(socket.as_raw_fd(), &mut buffer) {
            Ok((length, Some(from))) => {
                let index = u32::try_from(from.ifindex()).unwrap_or(0);
                let frame = Frame {
                    at: Instant::now(),
                    interface: names.get(&index).cloned().unwrap_or_else(|| format!("if{index}")),
                    outgoing: from.pkttype() == OUTGOING,
                    bytes: buffer.get(..length).unwrap_or_default().to_vec(),
                };
                frames.lock().unwrap_or_else(PoisonError::into_inner).push(frame);
            }
            Ok(_) | Err(Errno::EAGAIN | Errno::EINTR) => {}
            Err(_) => return,
        }
    }
}
