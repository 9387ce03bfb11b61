//! A toy's UDP port, and a wire for packets on the way to it, which a test can cut, slow down and record. It understands nothing.
#![allow(dead_code, unreachable_pub, missing_docs, clippy::unwrap_used)]

use crate::toy::Toy;
use limosa_link::quic::{QuicCounters, QuicListener, QuicSettings};
use limosa_link::{Cancel, ListenerSettings};
use std::net::SocketAddr;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;
use tokio::net::UdpSocket;

/// A toy's UDP port, beside its TCP port.
pub struct Port {
    pub address: SocketAddr,
    pub counters: Arc<QuicCounters>,
    stop: Cancel,
}

impl Port {
    pub fn open(toy: &Toy, silence: Duration, quic: QuicSettings) -> Port {
        Port::with(toy, ListenerSettings { peer_silence_max: silence, ..ListenerSettings::default() }, quic)
    }

    pub fn with(toy: &Toy, settings: ListenerSettings, quic: QuicSettings) -> Port {
        let (key, trusted, allow) = (toy.key.clone(), toy.trusted.clone(), toy.allow.clone());
        let listener = QuicListener::bind("127.0.0.1:0".parse().unwrap(), settings, quic, key, trusted, allow).unwrap();
        let (address, counters, stop) = (listener.local_address().unwrap(), listener.counters(), Cancel::new());
        tokio::spawn(listener.serve(toy.sessions.clone(), stop.clone()));
        Port { address, counters, stop }
    }

    pub fn plain(toy: &Toy) -> Port {
        Port::open(toy, Duration::from_secs(10), QuicSettings::default())
    }

    pub fn count(&self, which: impl Fn(&QuicCounters) -> &AtomicU64) -> u64 {
        which(&self.counters).load(Ordering::SeqCst)
    }
}

impl Drop for Port {
    fn drop(&mut self) {
        self.stop.cancel("over");
    }
}

/// A wire for packets, with a switch for each way. It keeps what went up.
pub struct Wire {
    pub address: SocketAddr,
    pub up: Arc<AtomicBool>,
    pub down: Arc<AtomicBool>,
    /// How many packets may still go up.
    pub left: Arc<AtomicU64>,
    /// How long each packet that goes up takes in milliseconds; those behind it wait.
    pub each_ms: Arc<AtomicU64>,
    said: Arc<Mutex<Vec<Vec<u8>>>>,
    /// Its address towards the port.
    pub from: SocketAddr,
    task: tokio::task::JoinHandle<()>,
}

impl Wire {
    pub async fn to(to: SocketAddr) -> Wire {
        let (near, far) = (UdpSocket::bind("127.0.0.1:0").await.unwrap(), UdpSocket::bind("127.0.0.1:0").await.unwrap());
        far.connect(to).await.unwrap();
        let (address, from) = (near.local_addr().unwrap(), far.local_addr().unwrap());
        let (up, down) = (Arc::new(AtomicBool::new(true)), Arc::new(AtomicBool::new(true)));
        let (left, each_ms) = (Arc::new(AtomicU64::new(u64::MAX)), Arc::new(AtomicU64::new(0)));
        let said = Arc::<Mutex<Vec<Vec<u8>>>>::default();
        let (open_up, open_down, may, each, kept) = (up.clone(), down.clone(), left.clone(), each_ms.clone(), said.clone());
        let task = tokio::spawn(async move {
            let (mut there, mut back) = (vec![0; 65536], vec![0; 65536]);
            let mut source = None;
            loop {
                tokio::select! {
                    Ok((bytes, from)) = near.recv_from(&mut there) => {
                        source = Some(from);
                        kept.lock().unwrap().push(there[..bytes].to_vec());
                        if open_up.load(Ordering::SeqCst) && may.load(Ordering::SeqCst) > 0 {
                            tokio::time::sleep(Duration::from_millis(each.load(Ordering::SeqCst))).await;
                            may.fetch_sub(1, Ordering::SeqCst);
                            let _ = far.send(&there[..bytes]).await;
                        }
                    }
                    Ok(bytes) = far.recv(&mut back) => {
                        if let (Some(source), true) = (source, open_down.load(Ordering::SeqCst)) {
                            let _ = near.send_to(&back[..bytes], source).await;
                        }
                    }
                }
            }
        });
        Wire { address, up, down, left, each_ms, said, from, task }
    }

    /// Every packet that the source has sent, in order.
    pub fn said(&self) -> Vec<Vec<u8>> {
        self.said.lock().unwrap().clone()
    }
}

impl Drop for Wire {
    fn drop(&mut self) {
        self.task.abort();
    }
}
