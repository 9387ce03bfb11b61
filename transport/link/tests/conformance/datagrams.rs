//! Harm on the way, for links over UDP: every datagram is carried through here. A connection that is cut is one whose datagrams are
//! lost from then on; nobody is told. It understands nothing of what it carries.

use crate::subject::{Direction, NotApplicable, Stream, Wire};
use crate::wire::Carrier;
use limosa_link::Link;
use std::collections::HashMap;
use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use tokio::net::UdpSocket;
use tokio::task::{AbortHandle, JoinSet};

/// Larger than any datagram.
const DATAGRAM_BYTES: usize = 65_536;
/// Bytes that a socket's buffers hold.
const SOCKET_BYTES: usize = 4 << 20;

/// One source address's way to the destination.
struct Flow {
    back: UdpSocket,
    carrier: Carrier,
    admitted: (usize, u64),
    dead: AtomicBool,
}

impl Flow {
    /// Whether a datagram passes. What crosses the cut ends both directions.
    fn passes(&self, direction: Direction, bytes: &[u8]) -> bool {
        let (number, age) = self.admitted;
        if !self.carrier.passes(age) || self.dead.load(Ordering::SeqCst) {
            return false;
        }
        let whole = self.carrier.note(number, direction, bytes).is_ok();
        self.dead.fetch_or(!whole, Ordering::SeqCst);
        whole
    }
}

async fn socket() -> io::Result<UdpSocket> {
    let socket = UdpSocket::bind("127.0.0.1:0").await?;
    let buffers = socket2::SockRef::from(&socket);
    buffers.set_recv_buffer_size(SOCKET_BYTES)?;
    buffers.set_send_buffer_size(SOCKET_BYTES)?;
    Ok(socket)
}

/// Carries what comes to `front` to the destination and back, until it is aborted.
async fn carry(front: Arc<UdpSocket>, to: SocketAddr, carrier: Carrier) {
    let mut flows: HashMap<SocketAddr, Arc<Flow>> = HashMap::new();
    let mut answering = JoinSet::new();
    let mut buffer = vec![0; DATAGRAM_BYTES];
    loop {
        // A port that nobody listens on any more shows as an error of an earlier datagram.
        let Ok((got, from)) = front.recv_from(&mut buffer).await else { continue };
        let known = flows.get(&from).cloned();
        let flow = match known {
            Some(flow) => flow,
            None => {
                let Some(admitted) = carrier.admit() else { continue };
                let back = socket().await.unwrap();
                back.connect(to).await.unwrap();
                let flow = Arc::new(Flow { back, carrier: carrier.clone(), admitted, dead: AtomicBool::new(false) });
                flows.insert(from, flow.clone());
                answering.spawn(answer(front.clone(), from, flow.clone()));
                flow
            }
        };
        if flow.passes(Direction::ToDestination, &buffer[..got]) {
            let _ = flow.back.send(&buffer[..got]).await;
        }
    }
}

async fn answer(front: Arc<UdpSocket>, to: SocketAddr, flow: Arc<Flow>) {
    let mut buffer = vec![0; DATAGRAM_BYTES];
    loop {
        let Ok(got) = flow.back.recv(&mut buffer).await else { continue };
        if flow.passes(Direction::ToSource, &buffer[..got]) {
            let _ = front.send_to(&buffer[..got], to).await;
        }
    }
}

/// A link over UDP whose datagrams are all carried. The first connection counts as its control channel.
pub struct DatagramWire {
    link: Arc<dyn Link>,
    carrier: Carrier,
    carrying: AbortHandle,
}

impl DatagramWire {
    /// A way to `to`, with the link that `link` makes for the address at which it begins.
    pub async fn new(to: SocketAddr, link: impl FnOnce(SocketAddr) -> Arc<dyn Link>) -> DatagramWire {
        let (front, carrier) = (Arc::new(socket().await.unwrap()), Carrier::new());
        let link = link(front.local_addr().unwrap());
        let carrying = tokio::spawn(carry(front, to, carrier.clone())).abort_handle();
        DatagramWire { link, carrier, carrying }
    }
}

impl Drop for DatagramWire {
    fn drop(&mut self) {
        self.carrying.abort();
    }
}

impl Wire for DatagramWire {
    fn link(&self) -> Arc<dyn Link> {
        self.link.clone()
    }
    fn cut(&self) {
        self.carrier.cut();
    }
    fn freeze(&self) {
        self.carrier.freeze();
    }
    fn mend(&self) {
        self.carrier.mend();
    }
    fn cut_after(&self, stream: Stream, direction: Direction, bytes: u64) -> Result<(), NotApplicable> {
        if stream != Stream::Control {
            return Err(NotApplicable("control and lanes are streams of one connection: the cut of control cuts them all"));
        }
        self.carrier.cut_after(stream, direction, bytes);
        Ok(())
    }
    fn carried(&self, stream: Stream, direction: Direction) -> u64 {
        self.carrier.carried(stream, direction)
    }
    fn record(&self) -> Result<(), NotApplicable> {
        self.carrier.record();
        Ok(())
    }
    fn recorded(&self) -> (Vec<u8>, Vec<u8>) {
        self.carrier.recorded()
    }
}
