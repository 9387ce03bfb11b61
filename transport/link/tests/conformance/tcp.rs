//! TCP under test, its lanes with TLS and without.

use crate::subject::{NotApplicable, Subject, Wire};
use crate::toy::{Sender, Toy, ToySettings};
use crate::wire::{Carrier, StreamWire};
use limosa_link::{Link, TcpLink, TrustedHosts};
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;
use tokio::net::{TcpListener, TcpStream};

/// TCP; its lanes are plaintext if told so.
pub struct Tcp<const PLAINTEXT: bool> {
    toy: Toy,
    silence: Duration,
}

/// A TCP link from `sender` to `address`, at which `toy` is.
pub fn tcp_link(sender: &Sender, toy: &Toy, address: SocketAddr, silence: Duration) -> Arc<dyn Link> {
    let trusted = TrustedHosts::new([toy.key.id()]);
    Arc::new(TcpLink::new(address.to_string(), toy.key.id(), sender.key.clone(), trusted, silence))
}

impl<const PLAINTEXT: bool> Subject for Tcp<PLAINTEXT> {
    const NAME: &'static str = "tcp";
    const ENCRYPTED: bool = !PLAINTEXT;
    const CONTROL_ENCRYPTED: bool = true;
    const LANES_KNOW_PEER: bool = !PLAINTEXT;
    /// One lane: a send buffer of 2 MiB, and the largest receive buffer that Linux gives by itself, 32 MiB where it was raised.
    const UNDER_WAY_MAX: Result<u64, NotApplicable> = Ok(36 << 20);

    async fn start(settings: ToySettings) -> Self {
        let silence = settings.listener.peer_silence_max;
        Tcp { toy: Toy::start(settings).await, silence }
    }

    fn toy(&self) -> &Toy {
        &self.toy
    }

    fn link(&self, sender: &Sender) -> Arc<dyn Link> {
        tcp_link(sender, &self.toy, self.toy.address, self.silence)
    }

    async fn wire(&self, sender: &Sender) -> Arc<dyn Wire> {
        let carrier = Carrier::new();
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let link = tcp_link(sender, &self.toy, listener.local_addr().unwrap(), self.silence);
        let accepting = tokio::spawn(accept(listener, self.toy.address, carrier.clone()));
        Arc::new(StreamWire { link, carrier, accepting: Some(accepting.abort_handle()) })
    }
}

async fn accept(listener: TcpListener, to: SocketAddr, carrier: Carrier) {
    while let Ok((near, _)) = listener.accept().await {
        let Some(admitted) = carrier.admit() else { continue };
        let carrier = carrier.clone();
        tokio::spawn(async move {
            let Ok(far) = TcpStream::connect(to).await else { return };
            carrier.carry(near, far, admitted).await;
        });
    }
}
