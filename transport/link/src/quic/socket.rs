//! The UDP socket under quinn: large buffers, batches that the kernel takes, and at a destination the first gate: what comes
//! from an address that is not on the allow-list reaches no connection. It reads no more of a packet than its outer header.

use super::QuicCounters;
use super::settings::{MTU_MAX, QuicSettings};
use crate::refusals::{self, Port, Why};
use crate::ways::Here;
use limosa_proto::allow::AllowList;
use quinn::udp::{RecvMeta, Transmit};
use quinn::{AsyncUdpSocket, Runtime as _, TokioRuntime, UdpPoller};
use socket2::{Domain, Protocol, Type};
use std::io::{self, IoSliceMut};
use std::net::{IpAddr, SocketAddr, UdpSocket};
use std::pin::Pin;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Once, PoisonError, RwLock};
use std::task::{Context, Poll};

/// Bytes that one call may send as a batch: a UDP datagram's most. More is EMSGSIZE, and quinn takes that for sent.
const BATCH_BYTES_MAX: usize = 65_507;
/// Bytes that the kernel may hand over as one batch.
const RECEIVED_BATCH_BYTES_MAX: usize = 65_535;
/// IPv4 and UDP headers before a payload.
const HEADERS_BYTES: i32 = 28;
/// UDP payload of a frame of 9000 bytes over IPv6.
const JUMBO_BYTES_V6: u16 = 8952;
/// An interface with this MTU or more is the host's own loopback, whose MTU is beyond doubt.
const LOOPBACK_MTU: i32 = 65_535;

/// Opens a UDP socket on `address` with buffers as `settings` ask for, or as near as we are allowed.
pub(super) fn open(address: SocketAddr, settings: &QuicSettings) -> io::Result<UdpSocket> {
    let socket = socket2::Socket::new(Domain::for_address(address), Type::DGRAM, Some(Protocol::UDP))?;
    socket.set_nonblocking(true)?;
    buffers(&socket, settings.socket_bytes);
    socket.bind(&address.into())?;
    Ok(socket.into())
}

fn buffers(socket: &socket2::Socket, bytes: usize) {
    use nix::sys::socket::{setsockopt, sockopt};
    if setsockopt(socket, sockopt::RcvBufForce, &bytes).is_err() {
        let _ = socket.set_recv_buffer_size(bytes);
    }
    if setsockopt(socket, sockopt::SndBufForce, &bytes).is_err() {
        let _ = socket.set_send_buffer_size(bytes);
    }
    // The kernel doubles what it is asked for.
    let given = socket.recv_buffer_size().unwrap_or(0) / 2;
    static SAID: Once = Once::new();
    if given < bytes {
        SAID.call_once(|| {
            let allowed = std::fs::read_to_string("/proc/sys/net/core/rmem_max").unwrap_or_default();
            tracing::warn!(
                wanted = bytes,
                given,
                "QUIC's receive buffer is smaller than asked for, bursts will be lost: `sysctl -w net.core.rmem_max={bytes}` (now {})",
                allowed.trim()
            );
        });
    }
}

/// The UDP payload that the kernel's route to `to` carries, and whether that is beyond doubt. Sends nothing. For IPv6 the
/// kernel's answer cannot be had without unsafe code: a jumbo frame is assumed to be the most, and the path is searched.
pub(super) fn route_mtu(to: SocketAddr) -> (Option<u16>, bool) {
    use nix::sys::socket::{getsockopt, sockopt};
    let mtu = || {
        let socket = UdpSocket::bind((std::net::Ipv4Addr::UNSPECIFIED, 0)).ok()?;
        socket.connect(to).ok()?;
        getsockopt(&socket, sockopt::IpMtu).ok()
    };
    if !to.is_ipv4() {
        return if to.ip().is_loopback() { (None, true) } else { (Some(JUMBO_BYTES_V6), false) };
    }
    match mtu() {
        Some(mtu) => (u16::try_from(mtu - HEADERS_BYTES).ok(), mtu >= LOOPBACK_MTU),
        None => (None, false),
    }
}

/// Who may reach a connection.
#[derive(Debug)]
pub(super) struct Gate {
    pub(super) allow: Arc<RwLock<AllowList>>,
    pub(super) here: Here,
    /// Where the port is; unspecified: on all addresses of this host.
    pub(super) port: SocketAddr,
    pub(super) counters: Arc<QuicCounters>,
}

impl Gate {
    /// Whether a connection from `peer` may be, to the address `local` of this host where the kernel tells it.
    pub(super) fn decide(&self, peer: SocketAddr, local: Option<IpAddr>) -> Result<(), Why> {
        if !self.allow.read().unwrap_or_else(PoisonError::into_inner).decide_socket(peer).allowed {
            return Err(Why::PeerAddress);
        }
        if self.here.admits(self.local(local)) { Ok(()) } else { Err(Why::OwnAddress) }
    }

    /// The end of a connection here, if it is known.
    pub(super) fn local(&self, told: Option<IpAddr>) -> Option<SocketAddr> {
        let bound = Some(self.port.ip()).filter(|ip| !ip.is_unspecified());
        told.or(bound).map(|ip| SocketAddr::new(ip, self.port.port()))
    }

    /// Whether a received batch may go on to quinn. From strangers only first packets may: they are answered by Retry and
    /// then by a refusal, and cannot move a connection.
    fn admits(&self, (from, to): (SocketAddr, Option<IpAddr>), batch: &[u8], stride: usize) -> bool {
        self.decide(from, to).is_ok() || batch.chunks(stride.max(1)).all(is_first)
    }
}

/// Whether a datagram is one Initial packet of QUIC 1 and nothing else (RFC 9000, 17.2.2).
fn is_first(datagram: &[u8]) -> bool {
    let mut rest = datagram;
    let mut take = |bytes: usize| {
        let (now, after) = rest.split_at_checked(bytes)?;
        rest = after;
        Some(now)
    };
    let mut walk = || {
        let head = take(5)?;
        if !matches!(head, [first, 0, 0, 0, 1] if first & 0xf0 == 0xc0) {
            return None;
        }
        for _ in 0..2 {
            let id = take(1)?.first().copied()?;
            take(id.into())?;
        }
        let token = variable(&mut take)?;
        take(usize::try_from(token).ok()?)?;
        let packet = variable(&mut take)?;
        take(usize::try_from(packet).ok()?)
    };
    walk().is_some() && rest.is_empty()
}

/// A variable-length integer (RFC 9000, 16).
fn variable<'a>(take: &mut impl FnMut(usize) -> Option<&'a [u8]>) -> Option<u64> {
    let first = take(1)?.first().copied()?;
    let more = take((1_usize << (first >> 6)) - 1)?;
    Some(more.iter().fold(u64::from(first & 0x3f), |value, byte| value << 8 | u64::from(*byte)))
}

/// quinn's socket, with what it lacks.
#[derive(Debug)]
pub(super) struct Socket {
    inner: Arc<dyn AsyncUdpSocket>,
    gate: Option<Gate>,
    /// Bytes of the packets that were sent last.
    packet: AtomicUsize,
}

impl Socket {
    /// Must be called within a tokio runtime.
    pub(super) fn new(socket: UdpSocket, gate: Option<Gate>) -> io::Result<Arc<Socket>> {
        let inner = TokioRuntime.wrap_udp_socket(socket)?;
        Ok(Arc::new(Socket { inner, gate, packet: AtomicUsize::new(1) }))
    }

    fn drop_strangers(&self, buffers: &[IoSliceMut<'_>], received: &mut [RecvMeta]) {
        let Some(gate) = &self.gate else { return };
        for (meta, buffer) in received.iter_mut().zip(buffers) {
            let batch = buffer.get(..meta.len).unwrap_or_default();
            if !gate.admits((meta.addr, meta.dst_ip), batch, meta.stride) {
                refusals::count(Port::Quic, Why::Packet);
                gate.counters.dropped_not_allowed.fetch_add(1, Ordering::Relaxed);
                // An empty batch holds no packet.
                meta.len = 0;
            }
        }
    }
}

impl AsyncUdpSocket for Socket {
    fn create_io_poller(self: Arc<Self>) -> Pin<Box<dyn UdpPoller>> {
        self.inner.clone().create_io_poller()
    }

    fn try_send(&self, transmit: &Transmit<'_>) -> io::Result<()> {
        let Some(packet) = transmit.segment_size else { return self.inner.try_send(transmit) };
        self.packet.store(packet, Ordering::Relaxed);
        if transmit.contents.len() <= BATCH_BYTES_MAX {
            return self.inner.try_send(transmit);
        }
        // Packets have just grown. What was sent before a part that has to wait is sent twice, which QUIC bears.
        for part in transmit.contents.chunks((BATCH_BYTES_MAX / packet.max(1)).max(1) * packet.max(1)) {
            let segment_size = (part.len() > packet).then_some(packet);
            self.inner.try_send(&Transmit {
                destination: transmit.destination,
                ecn: transmit.ecn,
                contents: part,
                segment_size,
                src_ip: transmit.src_ip,
            })?;
        }
        Ok(())
    }

    fn poll_recv(
        &self,
        context: &mut Context<'_>,
        buffers: &mut [IoSliceMut<'_>],
        received: &mut [RecvMeta],
    ) -> Poll<io::Result<usize>> {
        let polled = self.inner.poll_recv(context, buffers, received);
        if let Poll::Ready(Ok(batches)) = polled {
            self.drop_strangers(buffers, received.get_mut(..batches).unwrap_or_default());
        }
        polled
    }

    fn local_addr(&self) -> io::Result<SocketAddr> {
        self.inner.local_addr()
    }

    fn max_transmit_segments(&self) -> usize {
        let fit = BATCH_BYTES_MAX / self.packet.load(Ordering::Relaxed).max(1);
        self.inner.max_transmit_segments().min(fit).max(1)
    }

    fn max_receive_segments(&self) -> usize {
        // quinn keeps this many times MTU_MAX for each batch; the default of 64 would be 32 MiB of mostly unused buffer.
        self.inner.max_receive_segments().min(RECEIVED_BATCH_BYTES_MAX.div_ceil(usize::from(MTU_MAX)))
    }

    fn may_fragment(&self) -> bool {
        self.inner.may_fragment()
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use limosa_proto::allow::NoNames;
    use limosa_proto::here::HereList;

    fn initial(token: usize, payload: usize) -> Vec<u8> {
        let mut packet = vec![0xc3, 0, 0, 0, 1, 8];
        packet.extend([7; 8]);
        packet.extend([0, u8::try_from(token).unwrap()]);
        packet.extend(vec![5; token]);
        packet.extend((0x4000 | u16::try_from(payload).unwrap()).to_be_bytes());
        packet.extend(vec![9; payload]);
        packet
    }

    #[test]
    fn only_a_lone_first_packet_is_one() {
        assert!(is_first(&initial(0, 1180)) && is_first(&initial(40, 1100)));
        let good = initial(3, 300);
        for length in 0..good.len() {
            assert!(!is_first(good.get(..length).unwrap()), "cut at {length}");
        }
        // Another packet behind it, which could belong to a connection.
        assert!(!is_first(&[good.clone(), vec![0x40; 30]].concat()));
        for (at, wrong) in [(0, 0x43), (0, 0xe3), (0, 0xd3), (0, 0xf3), (4, 2), (5, 0xff), (14, 0xff)] {
            let mut bad = good.clone();
            *bad.get_mut(at).unwrap() = wrong;
            assert!(!is_first(&bad), "byte {at} as {wrong:#x}");
        }
        assert!(!is_first(&[0xff; 1500]));
    }

    #[test]
    fn a_batch_of_strangers_goes_on_only_if_all_of_it_may() {
        let allow = Arc::new(RwLock::new(AllowList::new(&["10.0.0.0/8"]).unwrap().0));
        let port = "0.0.0.0:5".parse().unwrap();
        let gate = Gate { allow, here: Here::default(), port, counters: Arc::default() };
        let from = |text: &str| (text.parse().unwrap(), Some("10.9.9.9".parse().unwrap()));
        let (known, stranger) = (from("[::ffff:10.1.2.3]:7"), from("192.0.2.1:7"));
        let (first, other) = (initial(0, 1000), vec![0x40; initial(0, 1000).len()]);
        let both = [first.clone(), other.clone()].concat();
        assert!(gate.admits(known, &other, other.len()));
        assert!(gate.admits(stranger, &first, first.len()));
        assert!(!gate.admits(stranger, &other, other.len()));
        assert!(!gate.admits(stranger, &both, first.len()));
        assert!(!gate.admits(stranger, &first, 0));
        // To an address of this host that takes no migrations, a known one is a stranger.
        let (list, _) = HereList::new(&[("10.8.0.0/16", 1)], &NoNames).unwrap();
        gate.here.replace(list);
        assert!(!gate.admits(known, &other, other.len()) && gate.admits(known, &first, first.len()));
        assert!(gate.admits((known.0, Some("10.8.0.1".parse().unwrap())), &other, other.len()));
        assert!(!gate.admits((known.0, None), &other, other.len()), "an address that is not known is not on a list");
        assert_eq!(gate.decide(known.0, known.1), Err(Why::OwnAddress));
    }
}
