//! Peers that mean harm, strangers and known hosts: many of them, slow ones at every byte that matters, what was recorded and is said
//! again, messages that are not due. Each time somebody else's migration works meanwhile or right after. What garbage does is in
//! `refuse`, what a peer costs in `cost`; how long things take is only bounded, never measured.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::print_stdout)]

mod relay;
mod toy;

use limosa_link::pair::PairLink;
use limosa_link::{Control, HostKey, ListenerSettings, TcpLink, TrustedHosts, ask_cpu, ask_verdict};
use limosa_proto::event::SourceOutcome;
use limosa_proto::identity::{Generation, MigrationId};
use limosa_proto::wire::frame::{CONTROL_HEADER_BYTES, ControlHeader};
use limosa_proto::wire::message::Message;
use relay::{Pace, Relay};
use socket2::{Domain, Socket, Type};
use std::collections::VecDeque;
use std::io::{self, ErrorKind, Read as _, Write as _};
use std::net::{SocketAddr, TcpStream};
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;
use toy::{Guest, Sender, Toy, ToyMemory, ToySettings, assert_moved};

/// Longer than any peer may take over its handshake and its first message, and a busy machine besides.
const BORNE_MAX: Duration = Duration::from_secs(40);

fn sender() -> Sender {
    let memory = ToyMemory::new(512);
    memory.fill(|page| page % 3 == 0);
    Sender::new(Guest::start(memory, Duration::from_millis(1)))
}

async fn good(toy: &Toy) {
    let sender = sender();
    sender.befriend(toy);
    let (outcome, _) = sender.migrate(toy).await;
    assert_moved(&sender, toy, &outcome);
    toy.settle().await;
    toy.saw.running.store(false, Ordering::SeqCst);
}

fn connect_from(from: &str, to: SocketAddr) -> TcpStream {
    let socket = Socket::new(Domain::IPV4, Type::STREAM, None).unwrap();
    socket.bind(&format!("{from}:0").parse::<SocketAddr>().unwrap().into()).unwrap();
    socket.connect(&to.into()).unwrap();
    socket.into()
}

fn is_open(stream: &mut TcpStream) -> bool {
    stream.set_nonblocking(true).unwrap();
    matches!(stream.read(&mut [0]), Err(error) if error.kind() == ErrorKind::WouldBlock)
}

async fn until(what: &str, mut is: impl FnMut() -> bool) {
    let waiting = async {
        while !is() {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    };
    tokio::time::timeout(BORNE_MAX, waiting).await.unwrap_or_else(|_| panic!("waited in vain: {what}"));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn one_address_does_not_crowd_out_another() {
    let listener = ListenerSettings {
        plaintext_lanes: true,
        unauthenticated_max: 12,
        unauthenticated_of_one_max: 4,
        handshake_max: BORNE_MAX,
        ..ListenerSettings::default()
    };
    let toy = Toy::start(ToySettings { listener, ..ToySettings::default() }).await;
    let count = |counter: &std::sync::atomic::AtomicU64| counter.load(Ordering::SeqCst);
    let mut honest = connect_from("127.0.0.3", toy.address);
    until("the honest one is met", || count(&toy.counters.waiting) == 1).await;
    let mut flood: Vec<TcpStream> = (0..60).map(|_| connect_from("127.0.0.2", toy.address)).collect();
    until("the flood makes room for itself", || count(&toy.counters.crowded_out) == 56).await;
    until("no more than its share waits", || count(&toy.counters.waiting) == 5).await;
    assert!(is_open(&mut honest), "one address crowded out another");
    good(&toy).await;
    // Many addresses fill all the room: then the one that has most makes room, and who came alone stays.
    let mut many: Vec<TcpStream> = (10..18)
        .flat_map(|host| (0..4).map(move |_| host))
        .map(|host| connect_from(&format!("127.0.0.{host}"), toy.address))
        .collect();
    until("all the room is taken", || count(&toy.counters.waiting) == 12).await;
    assert!(is_open(&mut honest), "many addresses crowded out one that came alone");
    good(&toy).await;
    let open = |all: &mut Vec<TcpStream>| all.iter_mut().filter_map(|stream| is_open(stream).then_some(())).count();
    assert!(open(&mut flood) + open(&mut many) <= 11, "{} + {}", open(&mut flood), open(&mut many));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_known_host_gets_in_while_its_own_address_floods() {
    let toy = Toy::start(ToySettings::default()).await;
    let (stop, begun, to) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicU64::new(0)), toy.address);
    let (ended, count) = (stop.clone(), begun.clone());
    // From the address from which the good one comes, too: more in a second than may begin, and all in vain.
    let flood = std::thread::spawn(move || {
        let mut held = VecDeque::new();
        while !ended.load(Ordering::Relaxed) {
            if let Ok(mut stream) = TcpStream::connect(to) {
                let _ = stream.write_all(&[22, 3, 1, 0, 200]);
                held.push_back(stream);
                count.fetch_add(1, Ordering::Relaxed);
            }
            if held.len() > 200 {
                held.pop_front();
            }
            std::thread::sleep(Duration::from_millis(2));
        }
    });
    until("the address has used up what it may begin", || begun.load(Ordering::Relaxed) > 400).await;
    let at_first = begun.load(Ordering::Relaxed);
    for _ in 0..3 {
        good(&toy).await;
    }
    let (meanwhile, refused) = (begun.load(Ordering::Relaxed) - at_first, toy.counters.crowded_out.load(Ordering::SeqCst));
    stop.store(true, Ordering::Relaxed);
    flood.join().unwrap();
    println!("{at_first} before and {meanwhile} during three migrations, {refused} crowded out");
    assert!(refused > 100, "nobody was turned away: the test shows nothing");
    // And at once when it is over.
    until("all who flooded are gone", || toy.counters.waiting.load(Ordering::SeqCst) == 0).await;
    good(&toy).await;
}

/// Where TLS records begin in what a source says.
fn records(bytes: &[u8]) -> Vec<usize> {
    let (mut at, mut starts) = (0, Vec::new());
    while let Some(head) = bytes.get(at..at + 5) {
        starts.push(at);
        at += 5 + usize::from(u16::from_be_bytes([head[3], head[4]]));
    }
    starts
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn who_is_slow_at_any_stage_holds_no_place_known_or_not() {
    let listener = ListenerSettings { handshake_max: Duration::from_secs(1), ..ListenerSettings::default() };
    let toy = Arc::new(Toy::start(ToySettings { listener, ..ToySettings::default() }).await);
    let (known, stranger) = (sender(), sender());
    known.befriend(&toy);
    let ask = async |sender: &Sender, relay: &Relay| {
        let trusted = TrustedHosts::new([toy.key.id()]);
        let link = TcpLink::new(relay.address.to_string(), toy.key.id(), sender.key.clone(), trusted, 3 * BORNE_MAX);
        ask_cpu(&link).await
    };
    let relay = Relay::start(toy.address, Pace::All).await;
    ask(&known, &relay).await.unwrap();
    let said = relay.said().remove(0);
    let starts = records(&said);
    // Hello, and behind it the proof of the key and the first message: sealed records.
    assert!(starts.len() >= 3, "{starts:?} of {}", said.len());
    let mut stages: Vec<usize> = starts.iter().flat_map(|start| [*start, start + 1, start + 5, start + 6]).collect();
    stages.extend([said.len() - 1, said.len() / 2]);
    stages.sort_unstable();
    stages.dedup();
    let mut slow = tokio::task::JoinSet::new();
    for stage in &stages {
        for key in [known.key.clone(), stranger.key.clone()] {
            let (toy, stage, whole) = (toy.clone(), *stage, said.len());
            slow.spawn(async move {
                let pace = Pace::Slow { at_once: stage, each: Duration::from_secs(1), never_after: whole - 1 };
                let relay = Relay::start(toy.address, pace).await;
                let trusted = TrustedHosts::new([toy.key.id()]);
                let link = TcpLink::new(relay.address.to_string(), toy.key.id(), key, trusted, 3 * BORNE_MAX);
                // It asks for as long as it is let.
                let _asking = tokio::spawn(async move { ask_cpu(&link).await.map(drop) });
                let closed = tokio::time::timeout(BORNE_MAX, relay.closed()).await;
                assert!(closed.is_ok(), "one that stopped at byte {stage} of {whole} was borne");
            });
        }
    }
    let trials = stages.len() * 2;
    good(&toy).await;
    while let Some(ended) = slow.join_next().await {
        ended.unwrap();
    }
    println!("{trials} slow peers, at the bytes {stages:?} of {}", said.len());
    until("nobody holds a place", || toy.counters.waiting.load(Ordering::SeqCst) == 0).await;
    assert!(toy.counters.too_slow.load(Ordering::SeqCst) > stages.len() as u64 / 2);
    assert_eq!(toy.sessions.open(), 0);
    good(&toy).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_known_host_gets_its_share_of_channels_and_no_more() {
    let toy = Toy::start(ToySettings::default()).await;
    let (greedy, other) = (sender(), sender());
    greedy.befriend(&toy);
    other.befriend(&toy);
    let link = greedy.link(&toy);
    let mut held: Vec<Control> = Vec::new();
    for _ in 0..40 {
        let control = link.control().await.unwrap();
        control.send(MigrationId([0; 16]), Generation(0), &Message::LinksAsk).unwrap();
        held.push(control);
    }
    // Those beyond its share are closed; what it may have is its own for some seconds, if it says nothing more.
    let mut closed = 0;
    for control in &mut held {
        let ended = tokio::time::timeout(BORNE_MAX, control.receive()).await.expect("neither answered nor closed");
        closed += usize::from(ended.is_err());
    }
    assert!(closed >= 8, "{closed} of 40 were closed");
    assert_eq!(ask_cpu(&*other.link(&toy)).await.unwrap().tsc_khz, 7, "another host has its own share");
    drop(held);
    let again = async { while ask_cpu(&*link).await.is_err() {} };
    tokio::time::timeout(BORNE_MAX, again).await.expect("its places are given back");
    good(&toy).await;
}

/// Says `bytes` to the port, as the source did: in pieces, or all at once. What is answered.
fn say_again(to: SocketAddr, bytes: &[u8], pieces: bool) -> Vec<u8> {
    let mut socket = TcpStream::connect(to).unwrap();
    socket.set_read_timeout(Some(Duration::from_secs(3))).unwrap();
    let mut answer = Vec::new();
    let ends: Vec<usize> =
        if pieces { records(bytes).into_iter().skip(1).chain([bytes.len()]).collect() } else { vec![bytes.len()] };
    let mut from = 0;
    for end in ends {
        let _ = socket.write_all(bytes.get(from..end).unwrap_or_default());
        from = end;
        if pieces {
            let mut some = [0; 4096];
            answer.extend(socket.read(&mut some).map_or(&[][..], |count| &some[..count]));
        }
    }
    let _ = socket.read_to_end(&mut answer);
    answer
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_recorded_session_is_worthless() {
    for plaintext in [false, true] {
        let toy = Toy::start(ToySettings::default()).await;
        let mut sender = sender();
        sender.plaintext = plaintext;
        sender.befriend(&toy);
        let relay = Relay::start(toy.address, Pace::All).await;
        let trusted = TrustedHosts::new([toy.key.id()]);
        let link = |to: SocketAddr| {
            Arc::new(TcpLink::new(to.to_string(), toy.key.id(), sender.key.clone(), trusted.clone(), Duration::from_secs(10)))
        };
        let (outcome, _) = sender.migrate_over(&toy, link(relay.address)).await;
        assert_moved(&sender, &toy, &outcome);
        toy.settle().await;
        ask_verdict(&*link(relay.address), MigrationId(*b"toy-migration-01"), Generation(1), true).await.unwrap();
        let said = relay.said();
        assert_eq!(said.len(), 4, "control, two lanes and a question");
        let journal = toy::kinds(&toy.saw.journal);
        let (memory, broken) = (toy.saw.memory.lock().unwrap().clone().unwrap(), toy.counters.broken.load(Ordering::SeqCst));
        let before = memory.snapshot();
        for bytes in said {
            for pieces in [false, true] {
                let (to, bytes) = (toy.address, bytes.clone());
                tokio::task::spawn_blocking(move || say_again(to, &bytes, pieces)).await.unwrap();
            }
        }
        // TLS asks anew for the proof of the key; a plaintext lane shows a token of a migration that is over.
        let refused = toy.counters.broken.load(Ordering::SeqCst) - broken;
        assert!(refused >= if plaintext { 4 } else { 8 }, "{refused} were refused by TLS");
        assert_eq!((toy.sessions.open(), toy.outcomes.lock().unwrap().len()), (0, 1));
        assert_eq!((toy::kinds(&toy.saw.journal), memory.snapshot() == before), (journal, true));
    }
}

/// Every message of the protocol, by its golden bytes: kind, name, body.
fn every_message() -> Vec<(u16, String, Vec<u8>)> {
    let text = include_str!("../../proto/tests/snapshots/wire__messages.snap");
    let mut all: Vec<(u16, String, Vec<u8>)> = Vec::new();
    for line in text.splitn(3, "---\n").last().unwrap().lines().filter(|line| !line.is_empty()) {
        let bytes: Option<Vec<u8>> =
            line.split(' ').map(|digits| u8::from_str_radix(digits, 16).ok().filter(|_| digits.len() == 2)).collect();
        match (bytes, line.split_once(' ')) {
            (Some(bytes), _) => all.last_mut().unwrap().2.extend(bytes),
            (None, Some((kind, name))) => all.push((kind.parse().unwrap(), name.to_owned(), Vec::new())),
            other => panic!("{other:?}"),
        }
    }
    assert!(all.len() >= 26);
    all
}

/// Carries frames from one end to the other, and says `forged` as one of the same migration behind the frame number `after`.
fn carry(mut from: UnixStream, mut to: UnixStream, forged: Option<(u16, Vec<u8>, usize)>, said: Arc<AtomicBool>) {
    std::thread::spawn(move || {
        let mut number = 0;
        let mut head = [0; CONTROL_HEADER_BYTES];
        while from.read_exact(&mut head).is_ok() {
            let header = ControlHeader::parse(&head).unwrap();
            let mut body = vec![0; header.length as usize];
            if from.read_exact(&mut body).is_err() || to.write_all(&[&head[..], &body].concat()).is_err() {
                break;
            }
            if let Some((kind, body, after)) = &forged
                && *after == number
            {
                let (length, crc) = (body.len() as u32, crc32fast::hash(body));
                let forged = ControlHeader { kind: *kind, length, crc, ..header };
                // Before it is heard: all may be over right after.
                said.store(true, Ordering::SeqCst);
                let _ = to.write_all(&[&forged.emit()[..], body].concat());
            }
            number += 1;
        }
        let _ = (to.shutdown(std::net::Shutdown::Write), from.shutdown(std::net::Shutdown::Read));
    });
}

/// A migration in which one end says a message more than its engine does, behind its frame number `after`.
async fn with_a_word_too_many(by_destination: bool, (kind, name, body): (u16, String, Vec<u8>), after: usize) -> bool {
    let toy = Toy::start(ToySettings::default()).await;
    let sender = sender();
    let (said, controls) = (Arc::new(AtomicBool::new(false)), AtomicBool::new(false));
    let forging = said.clone();
    let forged = (kind, body, after);
    let make = move || -> io::Result<(UnixStream, UnixStream)> {
        if controls.swap(true, Ordering::SeqCst) {
            return UnixStream::pair();
        }
        let ((source, ours), (theirs, destination)) = (UnixStream::pair()?, UnixStream::pair()?);
        let (up, down) = if by_destination { (None, Some(forged.clone())) } else { (Some(forged.clone()), None) };
        carry(ours.try_clone()?, theirs.try_clone()?, up, forging.clone());
        carry(theirs, ours, down, forging.clone());
        Ok((source, destination))
    };
    let link = PairLink::new(toy.sessions.clone(), sender.key.id(), toy.key.id()).with_streams(make);
    let mut sender = sender;
    sender.plaintext = true;
    let (outcome, _) = sender.migrate_over(&toy, Arc::new(link)).await;
    toy.settle().await;
    let (here, there) = (sender.guest.is_running(), toy.saw.running.load(Ordering::SeqCst));
    let what = format!("{name} behind frame {after}, by the {}", if by_destination { "destination" } else { "source" });
    assert!(said.load(Ordering::SeqCst), "{what}: was not said");
    assert!(!(here && there), "{what}: the guest runs twice");
    match outcome {
        SourceOutcome::Committed => assert!(there && !here, "{what}"),
        // A lie in the very moment of the commit: nobody may know, and nobody runs it twice.
        SourceOutcome::InDoubt { .. } => assert!(!here, "{what}"),
        ref aborted => assert!(here && !there, "{what}: {aborted:?}, runs here {here}, there {there}"),
    }
    outcome == SourceOutcome::Committed
}

/// What may come at any time, or is due just there, and does no harm.
const HARMLESS: [&str; 3] = ["Keepalive", "KeepaliveAck", "Prepared"];

async fn words_too_many(by_destination: bool) {
    for message in every_message() {
        let name = message.1.clone();
        // Behind Accept or Hello, when pages are about to move.
        let committed = with_a_word_too_many(by_destination, message, 0).await;
        assert!(!committed || HARMLESS.contains(&name.as_str()), "{name} was taken as if it had been due");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_destination_that_asks_for_what_it_may_not_does_not_get_the_guest() {
    words_too_many(true).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_source_that_says_what_is_not_due_harms_nothing() {
    words_too_many(false).await;
}

/// What a stranger hears in clear: nothing, a TLS record of the handshake, or an alert of two bytes.
fn assert_tells_nothing(what: &str, heard: &[u8]) {
    let mut rest = heard;
    while let Some((head, after)) = rest.split_first_chunk::<5>() {
        let length = usize::from(u16::from_be_bytes([head[3], head[4]]));
        assert!(matches!(head[0], 20..=23) && head[1] == 3, "{what}: {heard:02x?}");
        assert!(head[0] != 21 || length == 2, "{what}: an alert of {length} bytes");
        rest = after.get(length..).unwrap_or_default();
    }
    assert!(rest.is_empty(), "{what}: {heard:02x?}");
    let text = String::from_utf8_lossy(heard).to_lowercase();
    for word in ["limosa", "allow", "trust", "version", "host"] {
        assert!(!text.contains(word), "{what} heard of {word:?}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_stranger_is_told_nothing() {
    let listener =
        ListenerSettings { handshake_max: Duration::from_secs(1), plaintext_lanes: false, ..ListenerSettings::default() };
    let toy = Toy::start(ToySettings { listener, ..ToySettings::default() }).await;
    let (known, stranger) = (sender(), sender());
    known.befriend(&toy);
    let relay = Relay::start(toy.address, Pace::All).await;
    let trusted = TrustedHosts::new([toy.key.id()]);
    for key in [&known.key, &stranger.key, &HostKey::generate().unwrap()] {
        let link = TcpLink::new(relay.address.to_string(), toy.key.id(), key.clone(), trusted.clone(), Duration::from_secs(10));
        let _ = ask_cpu(&link).await;
    }
    let hello = relay.said().remove(0);
    let flipped = |at: usize| hello.iter().enumerate().map(|(which, byte)| byte ^ u8::from(which == at)).collect::<Vec<u8>>();
    let mut words: Vec<(String, Vec<u8>)> = vec![
        ("silence".into(), Vec::new()),
        ("HTTP".into(), b"GET / HTTP/1.1\r\nHost: limosa\r\n\r\n".to_vec()),
        ("a lane in clear".into(), [&b"LMSL"[..], &[1; 68]].concat()),
        ("a control message in clear".into(), [&b"LMSA"[..], &[1; 36]].concat()),
        ("SSLv3".into(), vec![22, 3, 0, 0, 4, 1, 0, 0, 0]),
        ("an alert".into(), vec![21, 3, 3, 0, 2, 2, 40]),
        ("the largest record".into(), [&[22, 3, 3, 255, 255][..], &[0; 3000]].concat()),
        ("half a hello".into(), hello[..hello.len() / 2].to_vec()),
    ];
    words.extend((0..120).map(|at| (format!("a hello with byte {at} changed"), flipped(at))));
    let to = toy.address;
    let heard = tokio::task::spawn_blocking(move || {
        words.into_iter().map(|(what, said)| (what, say_again(to, &said, false))).collect::<Vec<_>>()
    });
    for (what, heard) in heard.await.unwrap() {
        assert_tells_nothing(&what, &heard);
    }
    for heard in relay.heard() {
        assert_tells_nothing("one with another key", &heard);
    }
}
