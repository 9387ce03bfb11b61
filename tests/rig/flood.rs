//! A flood of connections to a port: so many, spread over so long, that say one of some beginnings each and then nothing. It bounds
//! itself in count and time, and holds few connections at once. What is flooded is the caller's business.

use crate::netns::{self, Netns};
use anyhow::{Context, Result, ensure};
use std::collections::VecDeque;
use std::io::Write;
use std::net::{SocketAddr, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

/// Connections of one thread that are held open.
const HELD_MAX: usize = 200;
/// How long one connection may take to be made.
const CONNECT_MAX: Duration = Duration::from_secs(2);

/// How many connections, in what time, by how many threads.
#[derive(Debug, Clone, Copy)]
pub struct Extent {
    /// Connections in all.
    pub connections: u64,
    /// Time over which they are spread evenly.
    pub over: Duration,
    /// Threads that make them.
    pub threads: u64,
}

/// A flood under way. Dropping it ends it.
#[derive(Debug)]
pub struct Flood {
    stop: Arc<AtomicBool>,
    made: Arc<AtomicU64>,
    failed: Arc<AtomicU64>,
    threads: Vec<JoinHandle<()>>,
}

impl Flood {
    /// Begins: each connection says the next of `beginnings`.
    pub fn start(netns: &Netns, target: SocketAddr, extent: Extent, beginnings: &[Vec<u8>]) -> Result<Flood> {
        ensure!(!beginnings.is_empty() && extent.threads > 0, "nothing to say, or nobody to say it");
        let mut flood = Flood { stop: Arc::default(), made: Arc::default(), failed: Arc::default(), threads: Vec::new() };
        let begun = Instant::now();
        for number in 0..extent.threads {
            let (stop, made, failed) = (flood.stop.clone(), flood.made.clone(), flood.failed.clone());
            let (name, beginnings) = (netns.name().to_owned(), beginnings.to_vec());
            let thread = std::thread::Builder::new().name(format!("flood-{number}")).spawn(move || {
                if netns::enter(&name).is_err() {
                    return;
                }
                let mut held = VecDeque::new();
                for which in (number..extent.connections).step_by(usize::try_from(extent.threads).unwrap_or(1)) {
                    let due = extent.over.mul_f64(which as f64 / extent.connections as f64);
                    std::thread::sleep(due.saturating_sub(begun.elapsed()));
                    if stop.load(Ordering::Relaxed) {
                        return;
                    }
                    let Ok(mut stream) = TcpStream::connect_timeout(&target, CONNECT_MAX) else {
                        failed.fetch_add(1, Ordering::Relaxed);
                        continue;
                    };
                    made.fetch_add(1, Ordering::Relaxed);
                    let words = usize::try_from(which).ok().and_then(|which| beginnings.get(which % beginnings.len()));
                    // One that was closed already has been answered.
                    let _ = words.map(|words| stream.write_all(words));
                    held.push_back(stream);
                    if held.len() > HELD_MAX {
                        held.pop_front();
                    }
                }
            });
            flood.threads.push(thread.context("a thread of the flood")?);
        }
        Ok(flood)
    }

    /// Connections that were made, and those that could not be.
    pub fn made(&self) -> (u64, u64) {
        (self.made.load(Ordering::Relaxed), self.failed.load(Ordering::Relaxed))
    }

    /// Waits until all have been made.
    pub fn wait(&mut self) -> Result<(u64, u64)> {
        for thread in self.threads.drain(..) {
            ensure!(thread.join().is_ok(), "a thread of the flood has panicked");
        }
        Ok(self.made())
    }
}

impl Drop for Flood {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        for thread in self.threads.drain(..) {
            // What it has to say of a panic it has said.
            let _ = thread.join();
        }
    }
}

/// Beginnings of a peer that means no good: silence, noise, records that end too early, and `hello`, which begins a handshake that is
/// never ended and so costs most.
pub fn beginnings(hello: &[u8]) -> Vec<Vec<u8>> {
    let noise: Vec<u8> = (0..900_u32).map(|number| number.wrapping_mul(2_654_435_761).to_le_bytes()[3]).collect();
    let long = [&[22, 3, 3, 0x40, 0][..], &noise].concat();
    vec![
        Vec::new(),
        noise,
        long,
        hello.to_vec(),
        b"LMSL\x01\x00\x00\x00".to_vec(),
        hello.get(..hello.len() / 2).unwrap_or_default().to_vec(),
    ]
}
