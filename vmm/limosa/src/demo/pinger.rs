//! Pings the guest from outside every 10 ms and keeps the gaps: what somebody on the network notices of a move.
//! It knows nothing of migrations.

use nix::sched::{CloneFlags, setns};
use serde::Serialize;
use socket2::{Domain, Protocol, Socket, Type};
use std::fs::File;
use std::io::{self, Read as _};
use std::net::{Ipv4Addr, SocketAddr, SocketAddrV4};
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

/// Time between two pings.
pub(crate) const PERIOD: Duration = Duration::from_millis(10);

/// Pings until it is stopped.
pub(crate) struct Pinger {
    stop: Arc<AtomicBool>,
    log: Arc<Mutex<Log>>,
    thread: Option<JoinHandle<io::Result<()>>>,
}

/// When pings left and whether they were answered.
#[derive(Debug, Default)]
struct Log {
    pings: Vec<(Instant, Option<Instant>)>,
}

/// What was seen between two moments.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub(crate) struct Pings {
    /// How many left.
    pub(crate) sent: usize,
    /// How many were never answered.
    pub(crate) lost: usize,
    /// Longest time without an answer, in milliseconds.
    pub(crate) largest_gap_ms: f64,
    /// When it began, in milliseconds after the first moment.
    pub(crate) largest_gap_at_ms: f64,
}

impl Pinger {
    /// Starts to ping `target` from inside the network namespace `namespace`.
    pub(crate) fn start(namespace: &str, target: Ipv4Addr) -> io::Result<Pinger> {
        let namespace = File::open(Path::new("/run/netns").join(namespace))?;
        let stop = Arc::new(AtomicBool::new(false));
        let log = Arc::new(Mutex::new(Log::default()));
        let (stopped, kept) = (Arc::clone(&stop), Arc::clone(&log));
        let run = move || {
            // Only this thread moves into the namespace; it ends there too.
            setns(&namespace, CloneFlags::CLONE_NEWNET)?;
            ping(target, &stopped, &kept)
        };
        let thread = std::thread::Builder::new().name("pinger".into()).spawn(run)?;
        Ok(Pinger { stop, log, thread: Some(thread) })
    }

    /// Whether an answer has come within the last `window`.
    pub(crate) fn answered_within(&self, window: Duration) -> bool {
        let log = self.log.lock().unwrap_or_else(PoisonError::into_inner);
        log.pings.iter().rev().take(1000).any(|(_, answered)| answered.is_some_and(|at| at.elapsed() < window))
    }

    /// Whether the pinger still runs; false means that it failed.
    pub(crate) fn alive(&self) -> bool {
        self.thread.as_ref().is_some_and(|thread| !thread.is_finished())
    }

    /// What was seen since `from`.
    pub(crate) fn since(&self, from: Instant) -> Pings {
        self.log.lock().unwrap_or_else(PoisonError::into_inner).between(from, Instant::now())
    }

    /// Ends the pinging.
    pub(crate) fn stop(mut self) -> io::Result<()> {
        self.stop.store(true, Ordering::Release);
        match self.thread.take().map(JoinHandle::join) {
            Some(Ok(result)) => result,
            _ => Err(io::Error::other("the pinger failed")),
        }
    }
}

impl Drop for Pinger {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Release);
    }
}

impl Log {
    fn between(&self, from: Instant, until: Instant) -> Pings {
        let settled = until.checked_sub(Duration::from_millis(200)).unwrap_or(until);
        // The newest pings may still be on their way; they are not lost yet.
        let inside: Vec<_> = self.pings.iter().filter(|(sent, _)| *sent >= from && *sent <= settled).collect();
        let lost = inside.iter().filter(|(_, answered)| answered.is_none()).count();
        let mut answers: Vec<Instant> = inside.iter().filter_map(|(_, answered)| *answered).collect();
        answers.push(from);
        // After the last answer the guest has been silent until now.
        answers.push(settled.max(from));
        answers.sort();
        let gaps = answers.windows(2).filter_map(|pair| Some((*pair.last()? - *pair.first()?, *pair.first()?)));
        let (largest, began) = gaps.max().unwrap_or((Duration::ZERO, from));
        let ms = |duration: Duration| duration.as_secs_f64() * 1000.0;
        Pings { sent: inside.len(), lost, largest_gap_ms: ms(largest), largest_gap_at_ms: ms(began - from) }
    }
}

fn ping(target: Ipv4Addr, stop: &AtomicBool, log: &Mutex<Log>) -> io::Result<()> {
    let mut socket = Socket::new(Domain::IPV4, Type::RAW, Some(Protocol::ICMPV4))?;
    let to: SocketAddr = SocketAddrV4::new(target, 0).into();
    let identifier = u16::try_from(std::process::id() & 0xffff).unwrap_or(1);
    let mut next = Instant::now();
    let mut count = 0_usize;
    let mut buffer = [0_u8; 1500];
    while !stop.load(Ordering::Acquire) {
        let now = Instant::now();
        if now >= next {
            let sequence = u16::try_from(count & 0xffff).unwrap_or(0);
            log.lock().unwrap_or_else(PoisonError::into_inner).pings.push((now, None));
            // While the guest's address cannot be resolved the kernel may refuse: a lost ping, as it should be.
            let _ = socket.send_to(&echo_request(identifier, sequence), &to.into());
            count += 1;
            next += PERIOD;
            continue;
        }
        socket.set_read_timeout(Some((next - now).max(Duration::from_micros(100))))?;
        let Ok(length) = socket.read(&mut buffer) else { continue };
        let answered = buffer.get(..length).and_then(|packet| echo_reply(packet, identifier));
        if let Some(sequence) = answered {
            note(&mut log.lock().unwrap_or_else(PoisonError::into_inner), sequence);
        }
    }
    Ok(())
}

/// Notes the answer to the latest ping with this number.
fn note(log: &mut Log, sequence: u16) {
    let last = log.pings.len().saturating_sub(1);
    let back = (last & 0xffff).wrapping_sub(usize::from(sequence)) & 0xffff;
    let ping = last.checked_sub(back).and_then(|index| log.pings.get_mut(index));
    if let Some((_, answered)) = ping {
        answered.get_or_insert(Instant::now());
    }
}

/// An ICMP echo request without data.
fn echo_request(identifier: u16, sequence: u16) -> [u8; 8] {
    let [id_high, id_low] = identifier.to_be_bytes();
    let [high, low] = sequence.to_be_bytes();
    let mut sum = 0x0800 + u32::from(identifier) + u32::from(sequence);
    sum = (sum & 0xffff) + (sum >> 16);
    sum = (sum & 0xffff) + (sum >> 16);
    let [sum_high, sum_low] = u16::try_from(!sum & 0xffff).unwrap_or(0).to_be_bytes();
    [8, 0, sum_high, sum_low, id_high, id_low, high, low]
}

/// The number of the ping that an IPv4 packet answers, if it is ours.
fn echo_reply(packet: &[u8], identifier: u16) -> Option<u16> {
    let header = usize::from(packet.first()? & 0x0f) * 4;
    let icmp = packet.get(header..)?;
    let word = |at: usize| Some(u16::from_be_bytes([*icmp.get(at)?, *icmp.get(at + 1)?]));
    (icmp.first() == Some(&0) && word(4)? == identifier).then(|| word(6)).flatten()
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn requests_have_a_right_checksum() {
        let request = echo_request(0xfffe, 0x1234);
        let sum: u32 = request.chunks(2).map(|pair| u32::from(u16::from_be_bytes([pair[0], pair[1]]))).sum();
        assert_eq!((sum & 0xffff) + (sum >> 16), 0xffff);
        let mut packet = vec![0x45];
        packet.extend([0; 19]);
        packet.extend([0, 0, 0, 0, 0xff, 0xfe, 0x12, 0x34]);
        assert_eq!(echo_reply(&packet, 0xfffe), Some(0x1234));
        assert_eq!(echo_reply(&packet, 1), None);
        assert_eq!(echo_reply(&[0x4f, 1], 1), None);
    }

    #[test]
    fn gaps_and_losses_are_counted() {
        let start = Instant::now();
        let at = |ms: u64| start + Duration::from_millis(ms);
        let mut log = Log::default();
        for ms in (0..1000).step_by(10) {
            let lost = (300..350).contains(&ms);
            log.pings.push((at(ms), (!lost).then(|| at(ms + 1))));
        }
        let seen = log.between(start, at(1190));
        assert_eq!((seen.sent, seen.lost), (100, 5));
        assert!((seen.largest_gap_ms - 60.0).abs() < 0.01 && (seen.largest_gap_at_ms - 291.0).abs() < 0.01, "{seen:?}");
        let silent = log.between(at(2000), at(5200));
        assert!((silent.largest_gap_ms - 3000.0).abs() < 0.01, "{silent:?}");
    }

    #[test]
    fn an_answer_finds_its_ping_after_the_numbers_wrap() {
        let now = Instant::now();
        let mut log = Log { pings: vec![(now, None); 65_546] };
        note(&mut log, 3);
        assert!(log.pings[65_539].1.is_some() && log.pings[3].1.is_none());
        note(&mut log, 65_535);
        assert!(log.pings[65_535].1.is_some());
    }
}
