//! Carries TCP connections to a port, as fast or as slowly as a test wants, and keeps what was said each way. It understands nothing.
#![allow(dead_code, unreachable_pub, missing_docs, clippy::unwrap_used)]

use std::net::SocketAddr;
use std::sync::{Arc, Mutex};
use std::time::Duration;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;

/// How what a source says is carried.
#[derive(Debug, Clone, Copy)]
pub enum Pace {
    /// As it comes.
    All,
    /// `at_once` bytes as they come, then a byte at a time, and none behind `never_after`.
    Slow { at_once: usize, each: Duration, never_after: usize },
}

type Said = Arc<Mutex<Vec<Vec<u8>>>>;

/// The way to a port. Dropping it ends nothing that is under way.
pub struct Relay {
    pub address: SocketAddr,
    said: Said,
    heard: Said,
    closed: watch::Receiver<bool>,
}

impl Relay {
    pub async fn start(to: SocketAddr, pace: Pace) -> Relay {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let (said, heard, closing) = (Said::default(), Said::default(), watch::Sender::new(false));
        let relay = Relay { address, said: said.clone(), heard: heard.clone(), closed: closing.subscribe() };
        tokio::spawn(async move {
            while let Ok((near, _)) = listener.accept().await {
                let Ok(far) = TcpStream::connect(to).await else { return };
                let number = said.lock().unwrap().len();
                said.lock().unwrap().push(Vec::new());
                heard.lock().unwrap().push(Vec::new());
                let (near_read, near_write) = near.into_split();
                let (far_read, far_write) = far.into_split();
                tokio::spawn(up(near_read, far_write, said.clone(), number, pace));
                tokio::spawn(down(far_read, near_write, heard.clone(), number, closing.clone()));
            }
        });
        relay
    }

    /// What each connection's source has said so far.
    pub fn said(&self) -> Vec<Vec<u8>> {
        self.said.lock().unwrap().clone()
    }

    /// What each connection's source has heard so far.
    pub fn heard(&self) -> Vec<Vec<u8>> {
        self.heard.lock().unwrap().clone()
    }

    /// Waits until the port has closed a connection.
    pub async fn closed(&self) {
        let mut closed = self.closed.clone();
        let _ = closed.wait_for(|closed| *closed).await;
    }
}

async fn up(
    mut from: tokio::net::tcp::OwnedReadHalf,
    mut to: tokio::net::tcp::OwnedWriteHalf,
    said: Said,
    number: usize,
    pace: Pace,
) {
    let (mut bytes, mut carried) = (vec![0; 16 << 10], 0);
    while let Ok(count @ 1..) = from.read(&mut bytes).await {
        said.lock().unwrap()[number].extend_from_slice(&bytes[..count]);
        let Pace::Slow { at_once, each, never_after } = pace else {
            if to.write_all(&bytes[..count]).await.is_err() {
                return;
            }
            continue;
        };
        for byte in &bytes[..count] {
            if carried >= never_after {
                // Keeps the connection open, and says no more.
                return std::future::pending().await;
            }
            if carried >= at_once {
                tokio::time::sleep(each).await;
            }
            if to.write_all(&[*byte]).await.is_err() {
                return;
            }
            carried += 1;
        }
    }
}

async fn down(
    mut from: tokio::net::tcp::OwnedReadHalf,
    mut to: tokio::net::tcp::OwnedWriteHalf,
    heard: Said,
    number: usize,
    closed: watch::Sender<bool>,
) {
    let mut bytes = vec![0; 16 << 10];
    while let Ok(count @ 1..) = from.read(&mut bytes).await {
        heard.lock().unwrap()[number].extend_from_slice(&bytes[..count]);
        if to.write_all(&bytes[..count]).await.is_err() {
            break;
        }
    }
    closed.send_replace(true);
}
