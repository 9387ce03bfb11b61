//! quinn's own bulk transfer: what QUIC can do on a path with nothing of Limosa in it. The source sends one buffer again and again,
//! the destination throws away what it reads. Tuned by hand, or with quinn's stock settings.

use anyhow::{Context as _, Result, ensure};
use bytes::Bytes;
use quinn::udp::{RecvMeta, Transmit};
use quinn::{
    AckFrequencyConfig, AsyncUdpSocket, MtuDiscoveryConfig, Runtime as _, TokioRuntime, TransportConfig, UdpPoller, VarInt,
};
use quinn::{ClientConfig, Endpoint, EndpointConfig, ServerConfig};
use rustls::pki_types::{CertificateDer, PrivatePkcs8KeyDer};
use std::io::{self, IoSliceMut};
use std::net::{IpAddr, SocketAddr, UdpSocket};
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::{Duration, Instant};

/// Name in the certificate.
const NAME: &str = "bulk";
/// Bytes of one buffer.
const BUFFER_BYTES: usize = 1 << 20;
/// Bytes of each socket's buffers.
const SOCKET_BYTES: usize = 16 << 20;
/// Bytes that may be under way.
const WINDOW_BYTES: u32 = 64 << 20;
/// A datagram's most; a larger batch is EMSGSIZE, which quinn takes for sent.
const BATCH_BYTES_MAX: usize = 65_507;

/// How quinn is set: `None` is as it comes.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Tuned {
    /// UDP payload of every packet in bytes; below 16 KiB, which quinn does not bear.
    pub(crate) mtu: u16,
}

/// The destination's end: its address and the certificate that its source must know.
pub(crate) struct Receiving {
    pub(crate) address: SocketAddr,
    pub(crate) certificate: Vec<u8>,
}

fn transport(tuned: Tuned, is_source: bool) -> TransportConfig {
    let mut transport = TransportConfig::default();
    // The destination sends little, and before the source's address is shown to be real it may not send one large packet.
    if is_source {
        let mut discovery = MtuDiscoveryConfig::default();
        discovery.upper_bound(tuned.mtu);
        transport.initial_mtu(tuned.mtu).min_mtu(tuned.mtu).mtu_discovery_config(Some(discovery));
    }
    let mut acknowledgements = AckFrequencyConfig::default();
    acknowledgements.ack_eliciting_threshold(VarInt::from_u32(32)).max_ack_delay(Some(Duration::from_millis(1)));
    transport
        .ack_frequency_config(Some(acknowledgements))
        .stream_receive_window(VarInt::from_u32(WINDOW_BYTES))
        .receive_window(VarInt::from_u32(WINDOW_BYTES))
        .send_window(WINDOW_BYTES.into())
        .send_fairness(false);
    transport
}

fn endpoint(address: SocketAddr, tuned: Option<Tuned>, accept: Option<ServerConfig>) -> Result<Endpoint> {
    let socket = UdpSocket::bind(address)?;
    let Some(tuned) = tuned else {
        return Ok(Endpoint::new(EndpointConfig::default(), accept, socket, Arc::new(TokioRuntime))?);
    };
    use nix::sys::socket::{setsockopt, sockopt};
    setsockopt(&socket, sockopt::RcvBufForce, &SOCKET_BYTES).context("large socket buffers need root")?;
    setsockopt(&socket, sockopt::SndBufForce, &SOCKET_BYTES).context("large socket buffers need root")?;
    let socket =
        Arc::new(Capped { inner: TokioRuntime.wrap_udp_socket(socket)?, segments: BATCH_BYTES_MAX / usize::from(tuned.mtu) });
    let mut config = EndpointConfig::default();
    config.max_udp_payload_size(tuned.mtu)?;
    Ok(Endpoint::new_with_abstract_socket(config, accept, socket, Arc::new(TokioRuntime))?)
}

/// Takes in and throws away whatever comes. Must be called within a tokio runtime; ends with it.
pub(crate) fn receive(at: IpAddr, tuned: Option<Tuned>) -> Result<Receiving> {
    let made = rcgen::generate_simple_self_signed([NAME.to_owned()])?;
    let key = PrivatePkcs8KeyDer::from(made.signing_key.serialize_der());
    let mut config = ServerConfig::with_single_cert(vec![made.cert.der().clone()], key.into())?;
    if let Some(tuned) = tuned {
        config.transport_config(Arc::new(transport(tuned, false)));
    }
    let endpoint = endpoint(SocketAddr::new(at, 0), tuned, Some(config))?;
    let address = endpoint.local_addr()?;
    tokio::spawn(async move {
        while let Some(incoming) = endpoint.accept().await {
            tokio::spawn(async move {
                let Ok(connection) = incoming.await else { return };
                while let Ok((send, receive)) = connection.accept_bi().await {
                    tokio::spawn(swallow(send, receive));
                }
            });
        }
    });
    Ok(Receiving { address, certificate: made.cert.der().to_vec() })
}

/// Reads one stream to its end and says how many bytes came.
async fn swallow(mut send: quinn::SendStream, mut receive: quinn::RecvStream) -> Result<()> {
    let mut pieces = vec![Bytes::new(); 64];
    let mut bytes = 0_u64;
    while let Some(count) = receive.read_chunks(&mut pieces).await? {
        bytes += pieces.iter_mut().take(count).map(|piece| std::mem::take(piece).len() as u64).sum::<u64>();
    }
    send.write_all(&bytes.to_le_bytes()).await?;
    send.finish()?;
    send.stopped().await?;
    Ok(())
}

/// Sends about `bytes` over `streams` streams of one connection. Returns the bytes and the seconds from the first to the
/// destination's word that all have come.
pub(crate) async fn send(to: &Receiving, tuned: Option<Tuned>, streams: u16, bytes: u64) -> Result<(u64, f64)> {
    let mut roots = rustls::RootCertStore::empty();
    roots.add(CertificateDer::from(to.certificate.clone()))?;
    let mut config = ClientConfig::with_root_certificates(Arc::new(roots))?;
    if let Some(tuned) = tuned {
        config.transport_config(Arc::new(transport(tuned, true)));
    }
    let any: IpAddr = if to.address.is_ipv4() { [0; 4].into() } else { [0_u16; 8].into() };
    let endpoint = endpoint(SocketAddr::new(any, 0), tuned, None)?;
    let connection = endpoint.connect_with(config, to.address, NAME)?.await?;
    let buffer = Bytes::from(vec![0x5a; BUFFER_BYTES]);
    let count = (bytes / u64::from(streams.max(1)) / BUFFER_BYTES as u64).max(1);
    let start = Instant::now();
    let mut senders = Vec::new();
    for _ in 0..streams.max(1) {
        let (mut send, mut receive) = connection.open_bi().await?;
        let buffer = buffer.clone();
        senders.push(tokio::spawn(async move {
            for _ in 0..count {
                send.write_chunk(buffer.clone()).await?;
            }
            send.finish()?;
            let mut answer = [0; 8];
            receive.read_exact(&mut answer).await?;
            ensure!(u64::from_le_bytes(answer) == count * BUFFER_BYTES as u64, "the destination counted other bytes");
            Ok(())
        }));
    }
    for sender in senders {
        sender.await??;
    }
    let seconds = start.elapsed().as_secs_f64();
    connection.close(VarInt::from_u32(0), b"done");
    endpoint.wait_idle().await;
    Ok((count * BUFFER_BYTES as u64 * u64::from(streams.max(1)), seconds))
}

/// quinn's socket with batches that the kernel takes.
#[derive(Debug)]
struct Capped {
    inner: Arc<dyn AsyncUdpSocket>,
    segments: usize,
}

impl AsyncUdpSocket for Capped {
    fn create_io_poller(self: Arc<Self>) -> Pin<Box<dyn UdpPoller>> {
        self.inner.clone().create_io_poller()
    }
    fn try_send(&self, transmit: &Transmit<'_>) -> io::Result<()> {
        self.inner.try_send(transmit)
    }
    fn poll_recv(
        &self,
        context: &mut Context<'_>,
        buffers: &mut [IoSliceMut<'_>],
        metas: &mut [RecvMeta],
    ) -> Poll<io::Result<usize>> {
        self.inner.poll_recv(context, buffers, metas)
    }
    fn local_addr(&self) -> io::Result<SocketAddr> {
        self.inner.local_addr()
    }
    fn max_transmit_segments(&self) -> usize {
        self.inner.max_transmit_segments().min(self.segments).max(1)
    }
    fn max_receive_segments(&self) -> usize {
        self.inner.max_receive_segments()
    }
    fn may_fragment(&self) -> bool {
        self.inner.may_fragment()
    }
}
