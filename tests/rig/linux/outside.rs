//! What peers of a Linux guest see who sit outside of both hosts, in a namespace of the outer machine: pings, ten times a second or more
//! often, and long TCP transfers in both directions whose every byte is proven.

use crate::linux::disk::word_of;
use crate::netns;
use crate::process::Process;
use anyhow::{Context, Result, bail, ensure};
use nix::sys::signal::Signal;
use std::collections::BTreeMap;
use std::fs::File;
use std::io::{Read, Write};
use std::net::{IpAddr, Shutdown, SocketAddr, TcpStream};
use std::path::PathBuf;
use std::process::Command;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

/// Where the program inside listens.
pub const PORT: u16 = 8080;
/// As in server.c.
const STREAM_SEED: u64 = 0x11;
/// A peer that hears nothing for so long gives up.
const SILENCE_MAX: Duration = Duration::from_secs(60);
/// An answer that takes longer counts as none.
const PING_WAIT_MS: f64 = 1000.0;

/// Time between two pings, in seconds.
const PING_EVERY: f64 = 0.1;

/// What `ping -W 1` saw.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct PingReport {
    /// Questions sent.
    pub sent: u64,
    /// Questions answered within a second.
    pub answered: u64,
    /// Questions that never were, those apart that were still under way at the end; their numbers.
    pub lost: Vec<u64>,
    /// Questions that were answered later; their numbers.
    pub late: Vec<u64>,
    /// The longest answer time, in milliseconds.
    pub slowest_ms: f64,
    /// The longest time in which no answer came, in milliseconds: to within the time between two pings.
    pub silence_ms: f64,
}

/// A running ping.
#[derive(Debug)]
pub struct Pings {
    process: Process,
    output: PathBuf,
}

impl Pings {
    /// Starts to ping from inside the namespace `netns`; what it prints goes into `folder`.
    ///
    /// # Errors
    /// ping cannot be started.
    pub fn start(netns: &str, target: IpAddr, folder: &std::path::Path) -> Result<Pings> {
        Pings::start_every(PING_EVERY, netns, target, folder)
    }

    /// The same, with so many seconds between two.
    ///
    /// # Errors
    /// See [`Pings::start`].
    pub fn start_every(seconds: f64, netns: &str, target: IpAddr, folder: &std::path::Path) -> Result<Pings> {
        let output = folder.join(format!("ping-{target}.txt"));
        let mut command = Command::new("ip");
        let (every, target) = (seconds.to_string(), target.to_string());
        command.args(["netns", "exec", netns, "ping", "-n", "-D", "-i", &every, "-W", "1", &target]);
        let file = File::create(&output)?;
        command.stdout(file.try_clone()?).stderr(file);
        Ok(Pings { process: Process::start("ping", &mut command)?, output })
    }

    /// What was seen until now.
    ///
    /// # Errors
    /// ping printed nothing.
    pub fn so_far(&self) -> Result<PingReport> {
        self.process.signal(Signal::SIGQUIT);
        std::thread::sleep(Duration::from_millis(200));
        ping_report(&crate::command::read_text(&self.output))
    }

    /// Ends it and counts.
    ///
    /// # Errors
    /// It cannot be ended, or printed no summary.
    pub fn finish(mut self) -> Result<PingReport> {
        self.process.signal(Signal::SIGINT);
        self.process.wait(Duration::from_secs(5))?;
        ping_report(&crate::command::read_text(&self.output))
    }
}

fn ping_report(text: &str) -> Result<PingReport> {
    let mut answers: BTreeMap<u64, f64> = BTreeMap::new();
    let (mut sent, mut heard, mut silence_s) = (0_u64, None, 0.0_f64);
    for line in text.lines() {
        let figure = |mark: &str| line.split_once(mark)?.1.split_whitespace().next()?.parse::<f64>().ok();
        if let (Some(number), Some(time)) = (figure("icmp_seq="), figure("time=")) {
            answers.entry(number as u64).or_insert(time);
            let at = line.strip_prefix('[').and_then(|rest| rest.split(']').next()?.parse::<f64>().ok());
            silence_s = silence_s.max(at.zip(heard).map_or(0.0, |(at, before)| at - before));
            heard = at;
        }
        // The summary's two forms, of SIGINT and of SIGQUIT.
        if let Some(count) = line.split_once(" packets transmitted").and_then(|(count, _)| count.parse().ok()) {
            sent = count;
        } else if let Some((_, rest)) = line.split_once('/')
            && line.contains(" packets, ")
        {
            sent = rest.split(' ').next().and_then(|count| count.parse().ok()).unwrap_or(sent);
        }
    }
    ensure!(sent > 0, "ping printed no summary:\n{}", crate::command::tail(text, 10));
    // The last ones may be under way.
    let settled = sent.saturating_sub(2).max(answers.keys().next_back().copied().unwrap_or(0));
    let in_time = |number: &u64| answers.get(number).is_some_and(|ms| *ms <= PING_WAIT_MS);
    let (late, lost) = (1..=settled).filter(|number| !in_time(number)).partition(|number| answers.contains_key(number));
    let answered = answers.values().filter(|ms| **ms <= PING_WAIT_MS).count() as u64;
    let slowest_ms = answers.values().copied().fold(0.0, f64::max);
    Ok(PingReport { sent, answered, lost, late, slowest_ms, silence_ms: silence_s * 1000.0 })
}

/// Which way a transfer goes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Way {
    /// The guest sends, the peer outside proves.
    FromGuest,
    /// The peer outside sends, the guest proves.
    ToGuest,
}

/// How a transfer ended.
#[derive(Debug, Clone)]
pub struct TransferReport {
    /// Bytes that arrived, all of them right.
    pub bytes: u64,
    /// The longest time in which nothing moved.
    pub stall: Duration,
}

/// A transfer that runs until it is finished.
#[derive(Debug)]
pub struct Transfer {
    stop: Arc<AtomicBool>,
    bytes: Arc<AtomicU64>,
    stall: Arc<Mutex<Duration>>,
    thread: Option<JoinHandle<Result<u64>>>,
}

impl Transfer {
    /// Starts one from inside the namespace `netns`, at most `rate` bytes a second.
    ///
    /// # Errors
    /// No thread can be made. What happens on the wire is told by [`Transfer::finish`].
    pub fn start(netns: &str, guest: IpAddr, way: Way, rate: u64) -> Result<Transfer> {
        let (stop, bytes, stall) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicU64::new(0)), Arc::default());
        let (name, line) = (netns.to_owned(), Line { stop: stop.clone(), bytes: bytes.clone(), stall: Arc::clone(&stall) });
        let thread = std::thread::Builder::new().name("transfer".into()).spawn(move || {
            netns::enter(&name)?;
            let stream =
                TcpStream::connect_timeout(&SocketAddr::new(guest, PORT), SILENCE_MAX).context("connecting to the guest")?;
            stream.set_read_timeout(Some(Duration::from_millis(100)))?;
            stream.set_write_timeout(Some(SILENCE_MAX))?;
            match way {
                Way::FromGuest => line.receive(stream, rate),
                Way::ToGuest => line.send(stream, rate),
            }
        })?;
        Ok(Transfer { stop, bytes, stall, thread: Some(thread) })
    }

    /// Bytes that moved so far.
    pub fn bytes(&self) -> u64 {
        self.bytes.load(Ordering::Relaxed)
    }

    /// Ends it by the protocol and gives the sum.
    ///
    /// # Errors
    /// A byte was wrong, the connection was reset, or it was silent for a minute.
    pub fn finish(mut self) -> Result<TransferReport> {
        self.stop.store(true, Ordering::Relaxed);
        let thread = self.thread.take().context("the transfer's thread")?;
        let Ok(bytes) = thread.join() else { bail!("the transfer panicked") };
        let stall = *self.stall.lock().unwrap_or_else(PoisonError::into_inner);
        Ok(TransferReport { bytes: bytes.with_context(|| format!("after {} bytes", self.bytes()))?, stall })
    }
}

impl Drop for Transfer {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
    }
}

/// What the transfer's thread shares with its owner.
struct Line {
    stop: Arc<AtomicBool>,
    bytes: Arc<AtomicU64>,
    stall: Arc<Mutex<Duration>>,
}

impl Line {
    fn moved(&self, bytes: usize, last: &mut Instant) {
        self.bytes.fetch_add(bytes as u64, Ordering::Relaxed);
        let mut stall = self.stall.lock().unwrap_or_else(PoisonError::into_inner);
        *stall = (*stall).max(last.elapsed());
        *last = Instant::now();
    }

    fn receive(&self, mut stream: TcpStream, rate: u64) -> Result<u64> {
        stream.write_all(format!("stream {rate}\n").as_bytes())?;
        let (mut count, mut last, mut told) = (0u64, Instant::now(), false);
        let mut bytes = vec![0u8; 64 << 10];
        loop {
            if !told && self.stop.load(Ordering::Relaxed) {
                stream.write_all(b"stop\n")?;
                told = true;
            }
            match stream.read(&mut bytes) {
                Ok(0) => {
                    ensure!(told, "the guest ended the stream by itself");
                    ensure!(count % 8192 == 0, "the stream ended within a piece, at {count}");
                    return Ok(count);
                }
                Ok(got) => {
                    prove(bytes.get(..got).unwrap_or_default(), count)?;
                    count += got as u64;
                    self.moved(got, &mut last);
                }
                Err(error) if matches!(error.kind(), std::io::ErrorKind::WouldBlock | std::io::ErrorKind::TimedOut) => {
                    ensure!(last.elapsed() < SILENCE_MAX, "the guest sent nothing for {} s", SILENCE_MAX.as_secs());
                }
                Err(error) => return Err(error).context("receiving from the guest"),
            }
        }
    }

    fn send(&self, mut stream: TcpStream, rate: u64) -> Result<u64> {
        stream.write_all(b"sink\n")?;
        let (mut count, mut last, start) = (0u64, Instant::now(), Instant::now());
        let mut due_from = Duration::ZERO;
        while !self.stop.load(Ordering::Relaxed) {
            let words = (count / 8..count / 8 + 1024).map(|index| word_of(STREAM_SEED, index));
            let piece: Vec<u8> = words.flat_map(u64::to_le_bytes).collect();
            stream.write_all(&piece).context("sending to the guest")?;
            count += piece.len() as u64;
            self.moved(piece.len(), &mut last);
            let due = due_from + Duration::from_secs_f64(count as f64 / rate as f64);
            match due.checked_sub(start.elapsed()) {
                Some(early) => std::thread::sleep(early),
                None => due_from += start.elapsed() - due,
            }
        }
        stream.shutdown(Shutdown::Write)?;
        stream.set_read_timeout(Some(SILENCE_MAX))?;
        let mut answer = String::new();
        stream.read_to_string(&mut answer).context("the guest's count")?;
        ensure!(answer == format!("bytes={count} wrong=0\n"), "of {count} bytes the guest says {answer:?}");
        Ok(count)
    }
}

fn prove(bytes: &[u8], at: u64) -> Result<()> {
    for (position, byte) in (at..).zip(bytes) {
        let expected = word_of(STREAM_SEED, position / 8).to_le_bytes();
        let expected = expected.get(usize::try_from(position % 8)?).copied().unwrap_or_default();
        ensure!(*byte == expected, "byte {position} of the stream is {byte:#x} instead of {expected:#x}");
    }
    Ok(())
}

/// A guest's wall clock against this machine's.
#[derive(Debug, Clone, Copy)]
pub struct Clock {
    /// How far it is ahead, in ms.
    pub ahead_ms: f64,
    /// How far off that may be: half of the time that the asking took.
    pub unsure_ms: f64,
}

/// Asks a guest's program from inside the namespace for its wall clock, some times; the quickest answer counts.
///
/// # Errors
/// It does not answer, or not by the clock.
pub fn clock(netns: &str, guest: IpAddr) -> Result<Clock> {
    netns::within(netns, || {
        let mut best: Option<Clock> = None;
        for _ in 0..10 {
            let mut stream = TcpStream::connect_timeout(&SocketAddr::new(guest, PORT), SILENCE_MAX)?;
            stream.set_nodelay(true)?;
            stream.set_read_timeout(Some(SILENCE_MAX))?;
            let (asked, before) = (Instant::now(), SystemTime::now());
            stream.write_all(b"time\n")?;
            let mut answer = String::new();
            stream.read_to_string(&mut answer).context("the guest's clock")?;
            let unsure = asked.elapsed() / 2;
            let said = answer.trim().split_once("realtime_ns=").and_then(|(_, ns)| ns.parse::<u64>().ok());
            let said = said.with_context(|| format!("the guest's clock: {answer:?}"))?;
            let middle = before.duration_since(UNIX_EPOCH)? + unsure;
            let ahead_ms = (said as f64 - middle.as_nanos() as f64) / 1e6;
            let seen = Clock { ahead_ms, unsure_ms: unsure.as_secs_f64() * 1e3 };
            if best.is_none_or(|best| seen.unsure_ms < best.unsure_ms) {
                best = Some(seen);
            }
        }
        best.context("no answer")
    })
}

/// A counter of `/proc/net/netstat` in the namespace, such as `TCPTimeouts` of `TcpExt`.
///
/// # Errors
/// The kernel has no such counter.
pub fn tcp_counter(netns: &str, name: &str) -> Result<u64> {
    let text = netns::within(netns, || Ok(std::fs::read_to_string("/proc/thread-self/net/netstat")?))?;
    let lines: Vec<&str> = text.lines().filter(|line| line.starts_with("TcpExt:")).collect();
    let [names, values] = lines.as_slice() else { bail!("/proc/net/netstat has {} lines of TcpExt", lines.len()) };
    let place = names.split(' ').position(|word| word == name).with_context(|| format!("no counter {name}"))?;
    Ok(values.split(' ').nth(place).context("no value")?.parse()?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lost_and_late_answers_are_counted_and_the_last_may_be_under_way() {
        let line =
            |n: u64, ms: &str| format!("[1764345600.{n}00000] 64 bytes from 10.78.0.101: icmp_seq={n} ttl=64 time={ms} ms\n");
        let mut text: String = [1, 2, 4, 5].into_iter().map(|n| line(n, "1.5")).collect();
        text += &line(6, "1200");
        text += "\n--- 10.78.0.101 ping statistics ---\n8 packets transmitted, 5 received, 37.5% packet loss, time 700ms\n";
        let report = ping_report(&text).unwrap();
        assert_eq!((report.sent, report.answered, report.lost, report.slowest_ms), (8, 4, vec![3], 1200.0));
        assert_eq!(report.late, [6]);
        assert!((report.silence_ms - 200.0).abs() < 0.1, "{}", report.silence_ms);
        let quit = format!("{}\r1/1 packets, 0% loss, min/avg/ewma/max = 1.5/1.5/1.5/1.5 ms\n", line(1, "1.5"));
        assert_eq!(ping_report(&quit).unwrap().sent, 1);
        assert!(ping_report("ping: connect: Network is unreachable").is_err());
    }

    #[test]
    fn a_wrong_byte_is_named() {
        let right: Vec<u8> = (0..4).flat_map(|index| word_of(STREAM_SEED, index).to_le_bytes()).collect();
        prove(&right[3..], 3).unwrap();
        let mut wrong = right;
        wrong[9] ^= 0x80;
        assert!(prove(&wrong, 0).unwrap_err().to_string().starts_with("byte 9 of the stream"));
    }
}
