//! The QUIC link: whole migrations, what is refused and what that costs, a wire that is cut, an address that changes.
//! The guests are toys, the packets are real and stay on loopback. What every link must do alike is tested elsewhere.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod toy;
mod wire;

use limosa_link::quic::{Congestion, QuicLink, QuicSettings};
use limosa_link::{ConnectError, HostKey, Link, ListenerSettings, TrustedHosts};
use limosa_proto::allow::AllowList;
use limosa_proto::event::SourceOutcome;
use limosa_proto::wire::code::Code;
use limosa_proto::wire::message::Refusal;
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;
use tokio::net::UdpSocket;
use toy::{Guest, Sender, Toy, ToyMemory, ToySettings, assert_moved, assert_stayed};
use wire::{Port, Wire};

const PAGES: u64 = 2048;
/// Silence after which a peer is lost, where a test waits for that.
const SILENCE: Duration = Duration::from_millis(800);

fn link_to(address: SocketAddr, sender: &Sender, toy: &Toy, silence: Duration, settings: QuicSettings) -> Arc<QuicLink> {
    let trusted = TrustedHosts::new([toy.key.id()]);
    Arc::new(QuicLink::new(address.to_string(), toy.key.id(), sender.key.clone(), trusted, silence, settings))
}

fn link(port: &Port, sender: &Sender, toy: &Toy, settings: QuicSettings) -> Arc<QuicLink> {
    link_to(port.address, sender, toy, Duration::from_secs(10), settings)
}

fn sender(pages: u64) -> Sender {
    let memory = ToyMemory::new(pages);
    memory.fill(|page| page % 4 != 0);
    let mut sender = Sender::new(Guest::start(memory, Duration::from_millis(2)));
    sender.tune = Box::new(|config| {
        config.peer_silence_max = 2 * SILENCE;
        config.keepalive = SILENCE / 4;
    });
    sender
}

fn refusal(outcome: &SourceOutcome) -> Refusal {
    match outcome {
        SourceOutcome::Refused(refusal) => refusal.clone(),
        other => panic!("not refused: {other:?}"),
    }
}

/// A migration over a fresh link that must succeed, whatever went before.
async fn next_is_good(sender: &mut Sender, toy: &Toy, port: &Port) {
    toy.settle().await;
    sender.befriend(toy);
    sender.settings.bandwidth_bytes_per_s = 0;
    let (outcome, report) = sender.migrate_over(toy, link(port, sender, toy, QuicSettings::default())).await;
    assert_moved(sender, toy, &outcome);
    assert_eq!(report.link, "quic");
    toy.settle().await;
}

async fn whole(lanes: u16, settings: QuicSettings) {
    let toy = Toy::start(ToySettings::default()).await;
    let port = Port::plain(&toy);
    let mut sender = sender(PAGES);
    sender.lanes = lanes;
    sender.befriend(&toy);
    let link = link(&port, &sender, &toy, settings);
    let (outcome, report) = sender.migrate_over(&toy, link.clone()).await;
    assert_moved(&sender, &toy, &outcome);
    toy.settle().await;
    assert!(report.ok && report.encrypted && report.link == "quic" && report.lanes == lanes && report.rounds >= 2, "{report:?}");
    assert!(report.zero_pages >= PAGES / 4 - 200, "{} zero pages", report.zero_pages);
    let moved = report.round_list.iter().map(|round| round.pages).sum::<u64>() * 4096;
    assert!(
        report.bytes_on_wire > moved && report.bytes_on_wire < moved + moved / 20 + 10_000,
        "{} for {moved}",
        report.bytes_on_wire
    );
    // The pages went where they were said to go, and no connection more than needed was made.
    let paths = link.paths().await;
    let sent = paths.iter().map(|path| path.sent_bytes).sum::<u64>();
    assert!(sent > moved, "{sent} bytes of UDP for {moved} bytes of pages");
    assert_eq!(paths.len(), usize::from(settings.connections.min(lanes)));
    assert_eq!(port.count(|counters| &counters.handshakes_begun), paths.len() as u64);
    assert_eq!(port.count(|counters| &counters.not_trusted), 0);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn one_lane() {
    whole(1, QuicSettings::default()).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn eight_lanes_on_one_connection() {
    whole(8, QuicSettings { connections: 1, ..QuicSettings::default() }).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn four_lanes_on_three_connections() {
    whole(4, QuicSettings { connections: 3, ..QuicSettings::default() }).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn two_lanes_with_small_packets_and_windows() {
    let settings = QuicSettings { mtu_known: Some(1200), socket_bytes: 1 << 20, ..QuicSettings::default() };
    whole(2, QuicSettings { lane_window_bytes: 64 << 10, send_window_bytes: Some(64 << 10), ..settings }).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_largest_packets_and_each_congestion_control() {
    for congestion in [Congestion::Cubic, Congestion::Bbr, Congestion::NewReno] {
        whole(2, QuicSettings { mtu_max: u16::MAX, congestion, ..QuicSettings::default() }).await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_address_that_is_not_allowed_costs_no_handshake() {
    let toy = Toy::start(ToySettings::default()).await;
    let port = Port::plain(&toy);
    *toy.allow.write().unwrap() = AllowList::new(&["10.0.0.0/8"]).unwrap().0;
    let mut sender = sender(512);
    sender.befriend(&toy);
    for _ in 0..5 {
        let (outcome, _) = sender.migrate_over(&toy, link(&port, &sender, &toy, QuicSettings::default())).await;
        assert_stayed(&sender, &toy, &outcome);
        let refusal = refusal(&outcome);
        assert_eq!(refusal.code, Code::NotAllowed, "{}", refusal.words());
        let wants = format!("destination {} does not allow 127.0.0.1 (our address)", port.address);
        assert!(refusal.words().contains(&wants), "{}", refusal.words());
    }
    assert_eq!(port.count(|counters| &counters.retried), 5);
    assert_eq!(port.count(|counters| &counters.refused_not_allowed), 5);
    assert_eq!(port.count(|counters| &counters.handshakes_begun), 0);
    *toy.allow.write().unwrap() = AllowList::new(&["127.0.0.1"]).unwrap().0;
    next_is_good(&mut sender, &toy, &port).await;
    assert_eq!(port.count(|counters| &counters.handshakes_begun), 2);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_source_that_is_not_trusted_there() {
    let toy = Toy::start(ToySettings::default()).await;
    let port = Port::plain(&toy);
    let mut sender = sender(512);
    for _ in 0..5 {
        let (outcome, _) = sender.migrate_over(&toy, link(&port, &sender, &toy, QuicSettings::default())).await;
        assert_stayed(&sender, &toy, &outcome);
        let refusal = refusal(&outcome);
        assert_eq!(refusal.code, Code::UnknownHost, "{}", refusal.words());
        assert!(refusal.words().contains("does not trust our key"), "{}", refusal.words());
    }
    // A source hears of it before the destination has counted.
    let counted = async {
        while port.count(|counters| &counters.not_trusted) < 5 {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    };
    tokio::time::timeout(Duration::from_secs(20), counted).await.expect("a refusal was not counted");
    assert_eq!(toy.sessions.open(), 0);
    next_is_good(&mut sender, &toy, &port).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_destination_that_is_not_trusted_here_or_is_another() {
    let toy = Toy::start(ToySettings::default()).await;
    let port = Port::plain(&toy);
    let mut sender = sender(512);
    sender.befriend(&toy);
    let link = |expected, trusted| {
        let (address, key) = (port.address.to_string(), sender.key.clone());
        Arc::new(QuicLink::new(address, expected, key, trusted, SILENCE, QuicSettings::default()))
    };
    let (outcome, _) = sender.migrate_over(&toy, link(toy.key.id(), TrustedHosts::default())).await;
    let wants = format!("destination's key {} is not trusted here", toy.key.id());
    assert!(refusal(&outcome).words().contains(&wants), "{}", refusal(&outcome).words());
    let other = HostKey::generate().unwrap().id();
    let (outcome, _) = sender.migrate_over(&toy, link(other, TrustedHosts::new([other, toy.key.id()]))).await;
    let words = refusal(&outcome).words();
    assert!(words.contains(&other.to_string()) && words.contains("another host"), "{words}");
    assert_eq!(refusal(&outcome).code, Code::UnknownHost);
    next_is_good(&mut sender, &toy, &port).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn where_udp_goes_nowhere_that_is_said_in_time() {
    let toy = Toy::start(ToySettings::default()).await;
    let sender = sender(512);
    // A socket that takes everything and answers nothing, as a firewall does.
    let hole = UdpSocket::bind("127.0.0.1:0").await.unwrap();
    let settings = QuicSettings { connect_max: Duration::from_millis(300), ..QuicSettings::default() };
    let link = link_to(hole.local_addr().unwrap(), &sender, &toy, SILENCE, settings);
    match tokio::time::timeout(Duration::from_secs(20), link.control()).await.unwrap() {
        Err(ConnectError::Timeout { after, .. }) => assert_eq!(after, settings.connect_max),
        other => panic!("{other:?}"),
    }
    let nowhere = link_to("127.0.0.1:1".parse().unwrap(), &sender, &toy, SILENCE, settings);
    let error = tokio::time::timeout(Duration::from_secs(20), nowhere.control()).await.unwrap().unwrap_err();
    assert!(matches!(error, ConnectError::Timeout { .. } | ConnectError::Unreachable { .. }), "{error}");
}

/// Runs a slow migration over `link`, does `then` in the middle of its first round, and waits for the end.
async fn in_mid_round(sender: &mut Sender, toy: &Toy, link: Arc<QuicLink>, then: impl AsyncFnOnce()) -> SourceOutcome {
    sender.settings.bandwidth_bytes_per_s = 4_000_000;
    sender.befriend(toy);
    let middle = async {
        // A quarter of the pages that hold something.
        let mut progress = sender.progress.subscribe();
        progress.wait_for(|progress| progress.bytes_on_wire > PAGES * 4096 * 3 / 16).await.unwrap();
        then().await;
    };
    let ((outcome, _), ()) = tokio::join!(sender.migrate_over(toy, link), middle);
    outcome
}

async fn cut(up: bool, down: bool) {
    let toy = Toy::start(ToySettings::default()).await;
    let port = Port::open(&toy, SILENCE, QuicSettings::default());
    let wire = Wire::to(port.address).await;
    let mut sender = sender(PAGES);
    let link = link_to(wire.address, &sender, &toy, SILENCE, QuicSettings { connections: 2, ..QuicSettings::default() });
    let outcome = in_mid_round(&mut sender, &toy, link, async || {
        wire.up.store(!up, Ordering::SeqCst);
        wire.down.store(!down, Ordering::SeqCst);
    })
    .await;
    assert_stayed(&sender, &toy, &outcome);
    assert!(matches!(outcome, SourceOutcome::Aborted { guest_runs: true, .. }), "{outcome:?}");
    next_is_good(&mut sender, &toy, &port).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_wire_that_is_cut_in_mid_round() {
    cut(true, true).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_peer_that_hears_but_is_not_heard() {
    cut(false, true).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_peer_that_is_heard_but_does_not_hear() {
    cut(true, false).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn one_that_does_not_finish_its_handshake_makes_room() {
    let toy = Toy::start(ToySettings::default()).await;
    let listener = ListenerSettings { unauthenticated_max: 1, ..ListenerSettings::default() };
    let port = Port::with(&toy, listener, QuicSettings::default());
    let wire = Wire::to(port.address).await;
    let mut sender = sender(512);
    sender.befriend(&toy);
    // The first packet, and again with the token of the Retry; never the key.
    wire.left.store(2, Ordering::SeqCst);
    let settings = QuicSettings { connect_max: Duration::from_secs(15), ..QuicSettings::default() };
    let stuck = link_to(wire.address, &sender, &toy, Duration::from_secs(15), settings);
    let stuck = tokio::spawn(async move { stuck.control().await.map(|_| ()) });
    while port.count(|counters| &counters.handshakes_begun) == 0 {
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    next_is_good(&mut sender, &toy, &port).await;
    let told = stuck.await.unwrap();
    assert!(matches!(told, Err(ConnectError::Crowded { .. })), "{told:?}");
    assert_eq!(port.count(|counters| &counters.crowded_out), 1);
}

/// The source moves from 127.0.0.2 to `to` in the middle of the first round.
async fn moves(to: &str, allow: &[&str], address_change: bool) -> (Toy, Port, Sender, SourceOutcome) {
    let toy = Toy::start(ToySettings::default()).await;
    *toy.allow.write().unwrap() = AllowList::new(allow).unwrap().0;
    let port = Port::open(&toy, SILENCE, QuicSettings { address_change, ..QuicSettings::default() });
    let mut sender = sender(PAGES);
    let from = Some("127.0.0.2".parse().unwrap());
    let settings = QuicSettings { source_address: from, connections: 2, ..QuicSettings::default() };
    let link = link_to(port.address, &sender, &toy, SILENCE, settings);
    let to: IpAddr = to.parse().unwrap();
    let moving = link.clone();
    let outcome = in_mid_round(&mut sender, &toy, link, async || moving.rebind(to).await.unwrap()).await;
    (toy, port, sender, outcome)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_source_that_moves_to_an_allowed_address_goes_on() {
    let (toy, port, sender, outcome) = moves("127.0.0.3", &["127.0.0.2", "127.0.0.3"], true).await;
    assert_moved(&sender, &toy, &outcome);
    assert_eq!(port.count(|counters| &counters.address_changes), 2, "each of the two connections has moved");
    assert_eq!(port.count(|counters| &counters.handshakes_begun), 2);
    assert_eq!(port.count(|counters| &counters.dropped_not_allowed), 0);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_source_that_moves_to_another_address_is_lost() {
    let (toy, port, mut sender, outcome) = moves("127.0.0.3", &["127.0.0.1", "127.0.0.2"], true).await;
    assert_stayed(&sender, &toy, &outcome);
    assert!(matches!(outcome, SourceOutcome::Aborted { guest_runs: true, .. }), "{outcome:?}");
    assert_eq!(port.count(|counters| &counters.address_changes), 0);
    assert!(port.count(|counters| &counters.dropped_not_allowed) > 0);
    next_is_good(&mut sender, &toy, &port).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn where_addresses_may_not_change_none_does() {
    let (toy, port, mut sender, outcome) = moves("127.0.0.3", &["127.0.0.0/8"], false).await;
    assert_stayed(&sender, &toy, &outcome);
    assert!(matches!(outcome, SourceOutcome::Aborted { guest_runs: true, .. }), "{outcome:?}");
    assert_eq!(port.count(|counters| &counters.address_changes), 0);
    next_is_good(&mut sender, &toy, &port).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn garbage_at_the_port() {
    let toy = Toy::start(ToySettings::default()).await;
    *toy.allow.write().unwrap() = AllowList::new(&["127.0.0.1"]).unwrap().0;
    let port = Port::plain(&toy);
    let mut state = 1_u64;
    let mut dropped = 0;
    for (number, from) in ["127.0.0.1:0", "127.0.0.9:0"].into_iter().enumerate() {
        let socket = UdpSocket::bind(from).await.unwrap();
        for kind in 0..400_u64 {
            let mut bytes: Vec<u8> = std::iter::repeat_with(|| {
                state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
                (state >> 56) as u8
            })
            .take(((kind * 37) % 2000) as usize + 5)
            .collect();
            match kind % 4 {
                // Looks like an established connection, a first packet, a handshake.
                0 => bytes[0] = bytes[0] & 0x3f | 0x40,
                1 => bytes[..5].copy_from_slice(&[0xc3, 0, 0, 0, 1]),
                2 => bytes[..5].copy_from_slice(&[0xe3, 0, 0, 0, 1]),
                _ => {}
            }
            socket.send_to(&bytes, port.address).await.unwrap();
            dropped += number as u64;
        }
    }
    let mut sender = sender(512);
    next_is_good(&mut sender, &toy, &port).await;
    let counted = port.count(|counters| &counters.dropped_not_allowed);
    assert!(counted > 0 && counted <= dropped, "{counted} of {dropped} were dropped");
    assert_eq!(port.count(|counters| &counters.handshakes_begun), 2);
}
