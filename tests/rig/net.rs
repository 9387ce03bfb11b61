//! What is seen of a guest from outside: an echo probe that measures gaps, the forwarding table of a bridge, and bad company
//! that throws garbage at a port. Capturing frames is in `capture`.

use crate::netns::{Netns, run};
use anyhow::{Context, Result};
use serde::Deserialize;
use std::io::{Read, Write};
use std::net::{IpAddr, SocketAddr, TcpStream, UdpSocket};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

/// How often the probe asks.
pub const PROBE_PERIOD: Duration = Duration::from_millis(10);

/// What a probe saw.
#[derive(Debug, Clone, Default)]
pub struct ProbeReport {
    /// Questions sent.
    pub sent: u64,
    /// Answers, each counted once.
    pub received: u64,
    /// The longest time between two answers (or from the last answer to the end).
    pub largest_gap: Duration,
    /// The longest answer time.
    pub slowest: Duration,
}

#[derive(Debug, Default)]
struct ProbeLog {
    sent: u64,
    answers: Vec<Duration>,
    seen_highest: u64,
    duplicates: u64,
    slowest: Duration,
}

/// Asks a guest's UDP echo port every 10 ms from inside a namespace, until it is finished.
#[derive(Debug)]
pub struct GuestProbe {
    stop: Arc<AtomicBool>,
    log: Arc<Mutex<ProbeLog>>,
    start: Instant,
    thread: Option<JoinHandle<Result<()>>>,
}

impl GuestProbe {
    /// Starts to ask.
    pub fn start(netns: &Netns, guest: IpAddr) -> Result<GuestProbe> {
        let (stop, log, start) = (Arc::new(AtomicBool::new(false)), Arc::new(Mutex::default()), Instant::now());
        let (name, stop_seen, log_kept) = (netns.name().to_owned(), stop.clone(), Arc::clone(&log));
        let thread = std::thread::Builder::new().name("probe".into()).spawn(move || {
            crate::netns::enter(&name)?;
            hurry();
            ask(guest, start, &stop_seen, &log_kept)
        })?;
        Ok(GuestProbe { stop, log, start, thread: Some(thread) })
    }

    /// How many answers came so far.
    pub fn received(&self) -> u64 {
        self.log.lock().unwrap_or_else(PoisonError::into_inner).answers.len() as u64
    }

    /// The longest time without an answer since a moment.
    pub fn largest_gap_since(&self, from: Instant) -> Duration {
        let log = self.log.lock().unwrap_or_else(PoisonError::into_inner);
        let from = from.saturating_duration_since(self.start);
        largest_gap(log.answers.iter().copied().filter(|at| *at >= from), self.start.elapsed())
    }

    /// Stops and counts.
    pub fn finish(mut self) -> Result<ProbeReport> {
        self.stop.store(true, Ordering::Relaxed);
        let end = self.start.elapsed();
        if let Some(thread) = self.thread.take() {
            thread.join().map_err(|_| anyhow::anyhow!("the probe panicked"))??;
        }
        let log = self.log.lock().unwrap_or_else(PoisonError::into_inner);
        Ok(ProbeReport {
            sent: log.sent,
            received: log.answers.len() as u64 - log.duplicates,
            largest_gap: largest_gap(log.answers.iter().copied(), end),
            slowest: log.slowest,
        })
    }
}

impl Drop for GuestProbe {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

fn largest_gap(times: impl Iterator<Item = Duration>, end: Duration) -> Duration {
    let mut last: Option<Duration> = None;
    let mut largest = Duration::ZERO;
    for at in times {
        if let Some(before) = last {
            largest = largest.max(at.saturating_sub(before));
        }
        last = Some(at);
    }
    match last {
        Some(last) => largest.max(end.saturating_sub(last)),
        None => end,
    }
}

/// Asks the scheduler to run this thread first: it sleeps nearly always, and measures other processes.
fn hurry() {
    let tid = nix::unistd::gettid().to_string();
    let _ = run("chrt", &["-f", "-p", "20", &tid]);
}

fn ask(guest: IpAddr, start: Instant, stop: &AtomicBool, log: &Mutex<ProbeLog>) -> Result<()> {
    let any = if guest.is_ipv4() { "0.0.0.0:0" } else { "[::]:0" };
    let socket = UdpSocket::bind(any).context("the probe's socket")?;
    let mut next = start.elapsed();
    let mut number: u64 = 0;
    let mut sent_at: Vec<Duration> = Vec::new();
    while !stop.load(Ordering::Relaxed) {
        let now = start.elapsed();
        if now >= next {
            sent_at.push(now);
            // Unreachable for a moment is what is measured here, no error.
            let _ = socket.send_to(&number.to_le_bytes(), SocketAddr::new(guest, 7));
            number += 1;
            next = (next + PROBE_PERIOD).max(now);
            log.lock().unwrap_or_else(PoisonError::into_inner).sent = number;
        }
        let rest = next.saturating_sub(start.elapsed()).max(Duration::from_micros(100));
        socket.set_read_timeout(Some(rest))?;
        let mut answer = [0u8; 64];
        let Ok((8, _)) = socket.recv_from(&mut answer) else {
            continue;
        };
        let at = start.elapsed();
        let which = u64::from_le_bytes(answer[..8].try_into().unwrap_or_default());
        let mut log = log.lock().unwrap_or_else(PoisonError::into_inner);
        let Some(asked) = usize::try_from(which).ok().and_then(|w| sent_at.get(w)) else {
            continue;
        };
        log.duplicates += u64::from(which < log.seen_highest);
        log.seen_highest = log.seen_highest.max(which + 1);
        log.slowest = log.slowest.max(at.saturating_sub(*asked));
        log.answers.push(at);
    }
    Ok(())
}

#[derive(Debug, Deserialize)]
struct FdbEntry {
    mac: String,
    ifname: String,
}

/// The port on which a bridge has learnt a MAC address, as `bridge fdb` shows it.
pub fn fdb_port(netns: &Netns, bridge: &str, mac: &str) -> Result<Option<String>> {
    let text = run("bridge", &["-n", netns.name(), "-j", "fdb", "show", "br", bridge])?;
    let entries: Vec<FdbEntry> = serde_json::from_str(&text).context("bridge -j fdb")?;
    Ok(entries.into_iter().find(|e| e.mac.eq_ignore_ascii_case(mac)).map(|e| e.ifname))
}

/// Throws garbage at a port from inside a namespace, one connection after the other, until it is dropped.
#[derive(Debug)]
pub struct Garbage {
    stop: Arc<AtomicBool>,
    count: Arc<AtomicU64>,
    thread: Option<JoinHandle<()>>,
}

impl Garbage {
    /// Starts throwing, a connection every few milliseconds; some wait without a word, some talk like TLS.
    pub fn start(netns: &Netns, target: SocketAddr) -> Result<Garbage> {
        let (stop, count) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicU64::new(0)));
        let (name, stop_seen, counted) = (netns.name().to_owned(), stop.clone(), count.clone());
        let thread = std::thread::Builder::new().name("garbage".into()).spawn(move || {
            if crate::netns::enter(&name).is_err() {
                return;
            }
            let mut seed = 0x9e37_79b9_7f4a_7c15u64 ^ u64::from(std::process::id());
            let mut open = Vec::new();
            while !stop_seen.load(Ordering::Relaxed) {
                if let Some(stream) = throw(target, &mut seed) {
                    counted.fetch_add(1, Ordering::Relaxed);
                    open.push(stream);
                }
                if open.len() > 32 {
                    open.clear();
                }
                std::thread::sleep(Duration::from_millis(3));
            }
        })?;
        Ok(Garbage { stop, count, thread: Some(thread) })
    }

    /// How many connections were made.
    pub fn thrown(&self) -> u64 {
        self.count.load(Ordering::Relaxed)
    }
}

impl Drop for Garbage {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

fn next_random(seed: &mut u64) -> u64 {
    *seed ^= *seed << 13;
    *seed ^= *seed >> 7;
    *seed ^= *seed << 17;
    *seed
}

/// One connection: magic numbers and TLS records that begin well and go on badly, or noise, or nothing.
fn throw(target: SocketAddr, seed: &mut u64) -> Option<TcpStream> {
    let mut stream = TcpStream::connect_timeout(&target, Duration::from_millis(200)).ok()?;
    stream.set_write_timeout(Some(Duration::from_millis(50))).ok()?;
    stream.set_read_timeout(Some(Duration::from_millis(1))).ok()?;
    let mut bytes: Vec<u8> = match next_random(seed) % 6 {
        0 => return Some(stream),
        1 => b"LMSL\x01\x00\x00\x00".to_vec(),
        2 => b"LMSA\x01\x00\x01\x00\xff\xff\xff\xff".to_vec(),
        3 => vec![0x16, 3, 1, 0xff, 0xff, 1],
        4 => b"LMSP\x01\x00\xff\xff".to_vec(),
        _ => Vec::new(),
    };
    for _ in 0..next_random(seed) % 300 {
        bytes.extend_from_slice(&next_random(seed).to_le_bytes());
    }
    let _ = stream.write_all(&bytes);
    let _ = stream.read(&mut [0u8; 16]);
    Some(stream)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_largest_gap_counts_the_end_and_silence() {
        let ms = Duration::from_millis;
        assert_eq!(largest_gap([ms(10), ms(20), ms(70), ms(80)].into_iter(), ms(85)), ms(50));
        assert_eq!(largest_gap([ms(10), ms(20)].into_iter(), ms(100)), ms(80));
        assert_eq!(largest_gap(std::iter::empty(), ms(100)), ms(100));
    }
}
