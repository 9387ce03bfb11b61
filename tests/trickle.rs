//! A trusted peer that trickles a byte a second, or stops in mid-message, in the middle of a migration: each of the two hosts in turn, on
//! its control channel and on its lanes, before and after the pause. Both hosts are real and mean well; a relay between them is what is
//! slow, from a moment on that the test chooses, so that what each side meets is a peer that does not go on. Each time both give up within
//! their deadlines and hold no more memory, the guest runs on at its source, and the next migration works.
#![allow(clippy::panic, clippy::unwrap_used, clippy::expect_used, clippy::print_stdout, missing_docs, unreachable_pub)]

use rig::process::{memory_kib, wait_for};
use rig::{AgentConfig, Context, GuestSpec, Host, Lab, Result, ensure, points, with_lab};
use std::io::{Read, Write};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::sync::atomic::{AtomicBool, AtomicU8, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

/// Where the relay listens, on the third machine.
const PORT: u16 = 13_561;
/// The silence after which a peer counts as gone, as these tests configure it: what a trickled message is, however long it takes.
const SILENCE: Duration = Duration::from_secs(3);
/// How long a destination that is ready waits for the commit, as these tests configure it.
const READY: Duration = Duration::from_secs(4);
/// How long a round may go on without a whole frame (docs/PROTOCOL.md, `stall`).
const STALL: Duration = Duration::from_secs(30);
/// For cleaning up, and two busy cores.
const SLACK: Duration = Duration::from_secs(12);
/// What an agent may grow by while somebody trickles at it.
const GROWTH_KIB_MAX: u64 = 16 << 10;
/// A connection that carried more than this is a lane.
const LANE_BYTES: u64 = 256 << 10;

/// How what one direction of some connections carries is carried on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Pace {
    Whole,
    /// A byte a second.
    Trickle,
    /// One more byte, and no more.
    Stop,
}

/// Which connections, and which direction of them.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Way {
    /// What the source says.
    ControlUp,
    /// What the destination answers.
    ControlDown,
    /// Pages: to the destination a source that trickles, to the source a destination that takes nothing. Nothing is said down a lane.
    Lanes,
}

/// The pace of each way, shared by all threads of a relay.
#[derive(Debug, Default)]
struct Paces([AtomicU8; 3]);

impl Paces {
    fn set(&self, way: Way, pace: Pace) {
        self.0[way as usize].store(pace as u8, Ordering::SeqCst);
    }
    fn get(&self, way: Way) -> Pace {
        [Pace::Whole, Pace::Trickle, Pace::Stop][usize::from(self.0[way as usize].load(Ordering::SeqCst))]
    }
}

/// Carries TCP from the third machine to a host.
struct Relay {
    paces: Arc<Paces>,
    stop: Arc<AtomicBool>,
    accepting: Option<JoinHandle<()>>,
    carrying: Arc<Mutex<Vec<JoinHandle<()>>>>,
}

impl Relay {
    fn start(lab: &Lab, to: SocketAddr) -> Result<Relay> {
        let listener = lab.watch.within(|| Ok(TcpListener::bind(("10.77.0.9", PORT))?))?;
        listener.set_nonblocking(true)?;
        let (paces, stop, carrying) = (Arc::<Paces>::default(), Arc::<AtomicBool>::default(), Arc::<Mutex<Vec<_>>>::default());
        let (name, ended, threads, pacing) = (lab.watch.name().to_owned(), stop.clone(), carrying.clone(), paces.clone());
        let accepting = std::thread::Builder::new().name("relay".into()).spawn(move || {
            if rig::netns::enter(&name).is_err() {
                return;
            }
            while !ended.load(Ordering::Relaxed) {
                let Ok((near, _)) = listener.accept() else {
                    std::thread::sleep(Duration::from_millis(5));
                    continue;
                };
                let Ok(far) = TcpStream::connect(to) else { continue };
                let _ = near.set_nonblocking(false);
                let carried = Arc::new(AtomicU64::new(0));
                let both = [(near.try_clone(), far.try_clone(), Way::ControlUp), (Ok(far), Ok(near), Way::ControlDown)];
                for (from, into, control) in both {
                    let (Ok(from), Ok(into)) = (from, into) else { continue };
                    let (paces, ended, carried) = (pacing.clone(), ended.clone(), carried.clone());
                    let thread = std::thread::spawn(move || carry(from, into, control, &paces, &carried, &ended));
                    threads.lock().unwrap().push(thread);
                }
            }
        })?;
        Ok(Relay { paces, stop, accepting: Some(accepting), carrying })
    }
}

impl Drop for Relay {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        if let Some(accepting) = self.accepting.take() {
            let _ = accepting.join();
        }
        let threads = std::mem::take(&mut *self.carrying.lock().unwrap());
        threads.into_iter().for_each(|thread| drop(thread.join()));
    }
}

fn carry(mut from: TcpStream, mut into: TcpStream, control: Way, paces: &Paces, carried: &AtomicU64, ended: &AtomicBool) {
    let way = || if carried.load(Ordering::SeqCst) > LANE_BYTES { Way::Lanes } else { control };
    let mut bytes = vec![0; 64 << 10];
    let _ = from.set_read_timeout(Some(Duration::from_millis(100)));
    'reading: while !ended.load(Ordering::Relaxed) {
        let count = match from.read(&mut bytes) {
            Ok(0) => break,
            Ok(count) => count,
            Err(error) if matches!(error.kind(), std::io::ErrorKind::WouldBlock | std::io::ErrorKind::TimedOut) => continue,
            Err(_) => break,
        };
        carried.fetch_add(count as u64, Ordering::SeqCst);
        let mut left = &bytes[..count];
        while let Some((first, rest)) = left.split_first() {
            match paces.get(way()) {
                Pace::Whole => {
                    if into.write_all(left).is_err() {
                        break 'reading;
                    }
                    break;
                }
                pace => {
                    if into.write_all(&[*first]).is_err() {
                        break 'reading;
                    }
                    left = rest;
                    let begun = Instant::now();
                    // A second, or for as long as it stands still.
                    while paces.get(way()) == pace && (pace == Pace::Stop || begun.elapsed() < Duration::from_secs(1)) {
                        if ended.load(Ordering::Relaxed) || is_closed(&into) {
                            break 'reading;
                        }
                        std::thread::sleep(Duration::from_millis(20));
                    }
                }
            }
        }
    }
    let _ = (into.shutdown(Shutdown::Both), from.shutdown(Shutdown::Both));
}

/// Whether the other end has closed; what it says is left for whoever carries that.
fn is_closed(stream: &TcpStream) -> bool {
    let _ = stream.set_nonblocking(true);
    let seen = stream.peek(&mut [0]);
    let _ = stream.set_nonblocking(false);
    match seen {
        Ok(count) => count == 0,
        Err(error) => error.kind() != std::io::ErrorKind::WouldBlock,
    }
}

fn config() -> AgentConfig {
    AgentConfig::default()
        .migration("keepalive_ms", 500)
        .migration("silence_max_ms", SILENCE.as_millis())
        .migration("ready_ms_max", READY.as_millis())
}

fn own_kib(hosts: [&Host; 2]) -> Result<Vec<u64>> {
    hosts.into_iter().map(|host| memory_kib(host.agent_pid()?, "RssAnon")).collect()
}

/// With a relay before the destination, through which the source reaches it.
fn behind_relay(config: AgentConfig, test: impl FnOnce(&mut Lab, &GuestSpec, &Relay) -> Result<()>) {
    with_lab(config, |lab| {
        let guest = GuestSpec::new("web", 1).memory("128M", "64M").dirty("4M", "16M");
        lab.guest(&guest)?;
        let relay = Relay::start(lab, lab.b.address())?;
        lab.a.limosa(&["host", "remove", "b"])?.expect_code(0)?;
        lab.a.trust_id("b", &lab.b.id()?, &format!("10.77.0.9:{PORT}"))?;
        test(lab, &guest, &relay)?;
        // And the relay harms nobody when it is not slow.
        lab.unharmed(&guest)
    });
}

/// Waits until neither host has a job that runs, and gives how long each took, from `begun` on.
fn both_gave_up(lab: &Lab, begun: Instant, limit: Duration) -> Result<[Duration; 2]> {
    let mut ended = [None; 2];
    wait_for(limit, "both hosts to give up", || {
        for (host, ended) in [&lab.a, &lab.b].into_iter().zip(&mut ended) {
            if ended.is_none() && host.jobs()?.iter().all(|job| job["state"] != "running") {
                *ended = Some(begun.elapsed());
            }
        }
        let [Some(a), Some(b)] = ended else { return Ok(None) };
        Ok(Some([a, b]))
    })
}

fn in_precopy(lab: &mut Lab, relay: &Relay, way: Way, pace: Pace, limit: Duration) -> Result<()> {
    let what = format!("{way:?}, {pace:?}");
    let before = own_kib([&lab.a, &lab.b])?;
    let mut running = lab.a.start_slow("web", &lab.b, &[])?;
    relay.paces.set(way, pace);
    let took = both_gave_up(lab, Instant::now(), limit).with_context(|| what.clone())?;
    running.wait(SLACK)?.expect_code(3).with_context(|| what.clone())?;
    lab.a.guest_lives("web").with_context(|| what.clone())?;
    let after = own_kib([&lab.a, &lab.b])?;
    println!(
        "{what}: the source gave up after {:?}, the destination after {:?}, of their own {before:?} KiB, now {after:?}",
        took[0], took[1]
    );
    for (before, after) in before.iter().zip(&after) {
        ensure!(*after < before + GROWTH_KIB_MAX, "{what}: {before} KiB before, {after} after");
    }
    relay.paces.set(way, Pace::Whole);
    lab.settled(&lab.b, 0).with_context(|| what)
}

#[test]
fn a_peer_that_trickles_or_stops_in_mid_message_is_given_up_in_precopy() {
    behind_relay(config(), |lab, _, relay| {
        for pace in [Pace::Trickle, Pace::Stop] {
            for way in [Way::ControlUp, Way::ControlDown] {
                in_precopy(lab, relay, way, pace, SILENCE + SLACK)?;
            }
        }
        Ok(())
    });
}

#[test]
fn lanes_that_trickle_are_given_up_though_the_control_channel_is_alive() {
    behind_relay(config(), |lab, _, relay| {
        for pace in [Pace::Trickle, Pace::Stop] {
            in_precopy(lab, relay, Way::Lanes, pace, STALL + SLACK)?;
        }
        Ok(())
    });
}

/// The guest stands still meanwhile: that is what has to be short.
#[test]
fn a_peer_that_trickles_after_the_pause_gives_the_guest_back_in_time() {
    let binary = rig::lab::missing().is_none().then(|| points::binary().unwrap());
    behind_relay(AgentConfig { binary, ..config() }, |lab, _, relay| {
        for (way, pace) in [
            (Way::ControlUp, Pace::Trickle),
            (Way::ControlDown, Pace::Trickle),
            (Way::ControlUp, Pace::Stop),
            (Way::ControlDown, Pace::Stop),
        ] {
            let what = format!("{way:?}, {pace:?} after the pause");
            lab.a.disarm()?;
            lab.a.arm("source-saving", "sleep 300")?;
            let mut running = lab.a.start(&["--json", "migrate", "web", "--to", "b"])?;
            wait_for(SLACK, "the pause", || Ok(lab.a.has_reached("source-saving").then_some(())))?;
            relay.paces.set(way, pace);
            let (begun, beats) = (Instant::now(), lab.a.beats("web").len());
            wait_for(SILENCE + SLACK, "the guest to run on", || Ok((lab.a.beats("web").len() > beats).then_some(())))
                .with_context(|| what.clone())?;
            let stood = begun.elapsed();
            let took = both_gave_up(lab, begun, SILENCE + READY + SLACK).with_context(|| what.clone())?;
            running.wait(SLACK)?.expect_code(3).with_context(|| what.clone())?;
            println!(
                "{what}: the guest stood for {stood:?}, the source gave up after {:?}, the destination after {:?}",
                took[0], took[1]
            );
            relay.paces.set(way, Pace::Whole);
            lab.settled(&lab.b, 0).with_context(|| what.clone())?;
            lab.a.guest_lives("web").with_context(|| what)?;
        }
        Ok(())
    });
}
