//! QUIC under test: control and lanes are streams of one connection, always encrypted.

use crate::datagrams::DatagramWire;
use crate::subject::{NotApplicable, Subject, Wire};
use crate::toy::{Sender, Toy, ToySettings};
use limosa_link::quic::{QuicLink, QuicListener, QuicSettings};
use limosa_link::{Cancel, Link, TrustedHosts};
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

pub struct Quic {
    toy: Toy,
    /// Beside the toy's own port, which is TCP's.
    address: SocketAddr,
    silence: Duration,
    stop: Cancel,
}

impl Drop for Quic {
    fn drop(&mut self) {
        self.stop.cancel("over");
    }
}

fn quic_link(sender: &Sender, toy: &Toy, address: SocketAddr, silence: Duration) -> Arc<dyn Link> {
    let (id, trusted) = (toy.key.id(), TrustedHosts::new([toy.key.id()]));
    Arc::new(QuicLink::new(address.to_string(), id, sender.key.clone(), trusted, silence, QuicSettings::default()))
}

impl Subject for Quic {
    const NAME: &'static str = "quic";
    const ENCRYPTED: bool = true;
    const CONTROL_ENCRYPTED: bool = true;
    const LANES_KNOW_PEER: bool = true;
    /// One lane: its window of 8 MiB, and what is counted when it is handed over.
    const UNDER_WAY_MAX: Result<u64, NotApplicable> = Ok(12 << 20);

    async fn start(settings: ToySettings) -> Self {
        let listener = settings.listener.clone();
        let silence = listener.peer_silence_max;
        let toy = Toy::start(settings).await;
        let (key, trusted, allow) = (toy.key.clone(), toy.trusted.clone(), toy.allow.clone());
        let any = "127.0.0.1:0".parse().unwrap();
        let port = QuicListener::bind(any, listener, QuicSettings::default(), key, trusted, allow).unwrap();
        let (address, stop) = (port.local_address().unwrap(), Cancel::new());
        tokio::spawn(port.serve(toy.sessions.clone(), stop.clone()));
        Quic { toy, address, silence, stop }
    }

    fn toy(&self) -> &Toy {
        &self.toy
    }

    fn link(&self, sender: &Sender) -> Arc<dyn Link> {
        quic_link(sender, &self.toy, self.address, self.silence)
    }

    async fn wire(&self, sender: &Sender) -> Arc<dyn Wire> {
        Arc::new(DatagramWire::new(self.address, |at| quic_link(sender, &self.toy, at, self.silence)).await)
    }
}
