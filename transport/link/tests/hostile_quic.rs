//! Peers over QUIC that mean harm, strangers and known hosts: slow ones at every packet and every byte that matters, what was recorded and
//! is said again, an operator's key, commands where there are none. Each time a good migration works right after. The same over TCP is in
//! `hostile` and `refuse`; what garbage does is in `quic`.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::print_stdout)]

mod toy;
mod wire;

use limosa_link::quic::{QuicCounters, QuicLink, QuicSettings};
use limosa_link::{Control, HostKey, Link as _, ListenerSettings, TrustedHosts, ask_cpu, ask_verdict};
use limosa_proto::identity::{Generation, HostId, MigrationId};
use limosa_proto::wire::code::Code;
use limosa_proto::wire::message::Message;
use quinn::crypto::rustls::QuicClientConfig;
use quinn::{ClientConfig, Connection, Endpoint};
use rustls::client::AlwaysResolvesClientRawPublicKeys;
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::pki_types::{CertificateDer, PrivatePkcs8KeyDer, ServerName, UnixTime};
use rustls::{DigitallySignedStruct, SignatureScheme};
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};
use tokio::net::UdpSocket;
use toy::{Guest, Sender, Toy, ToyMemory, ToySettings, assert_moved};
use wire::{Port, Wire};

/// Longer than any peer may take over its handshake and its first message, and a busy machine besides.
const BORNE_MAX: Duration = Duration::from_secs(40);
/// What a stream has for its first words, and again for its first message.
const WORDS_MAX: Duration = Duration::from_secs(5);
const SLACK: Duration = Duration::from_secs(5);

fn sender() -> Sender {
    let memory = ToyMemory::new(512);
    memory.fill(|page| page % 3 == 0);
    Sender::new(Guest::start(memory, Duration::from_millis(1)))
}

fn link(to: SocketAddr, key: &HostKey, toy: &Toy) -> QuicLink {
    let settings = QuicSettings { connections: 1, connect_max: BORNE_MAX, ..QuicSettings::default() };
    QuicLink::new(to.to_string(), toy.key.id(), key.clone(), TrustedHosts::new([toy.key.id()]), BORNE_MAX, settings)
}

async fn good(toy: &Toy, port: &Port) {
    let sender = sender();
    sender.befriend(toy);
    let (outcome, _) = sender.migrate_over(toy, Arc::new(link(port.address, &sender.key, toy))).await;
    assert_moved(&sender, toy, &outcome);
    toy.settle().await;
    toy.saw.running.store(false, Ordering::SeqCst);
}

async fn until(what: &str, mut is: impl FnMut() -> bool) {
    let waiting = async {
        while !is() {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    };
    tokio::time::timeout(BORNE_MAX, waiting).await.unwrap_or_else(|_| panic!("waited in vain: {what}"));
}

/// A handshake of a second, and a connection on which nothing goes on for two is closed.
fn impatient() -> ListenerSettings {
    let (handshake_max, peer_silence_max) = (Duration::from_secs(1), Duration::from_secs(2));
    ListenerSettings { handshake_max, peer_silence_max, ..ListenerSettings::default() }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn who_is_slow_over_quic_at_any_packet_holds_no_place_known_or_not() {
    let toy = Toy::start(ToySettings::default()).await;
    let port = Port::with(&toy, impatient(), QuicSettings::default());
    let (known, stranger) = (sender(), sender());
    known.befriend(&toy);
    let wire = Wire::to(port.address).await;
    ask_cpu(&link(wire.address, &known.key, &toy)).await.unwrap();
    let packets = wire.said().len() as u64;
    // First packet, the same with the token, the proof of the key, the first message: whatever is put together in one packet.
    assert!(packets >= 3, "{packets} packets");
    drop(wire);
    until("nobody is met", || port.count(|all| &all.waiting) == 0).await;
    let tasks = || tokio::runtime::Handle::current().metrics().num_alive_tasks();
    let before = tasks();
    let mut slow = tokio::task::JoinSet::new();
    for at_once in 1..packets {
        for key in [&known.key, &stranger.key] {
            let wire = Wire::to(port.address).await;
            wire.left.store(at_once, Ordering::SeqCst);
            let link = link(wire.address, key, &toy);
            let is_known = key.id() == known.key.id();
            // It asks for as long as it is let. The last packets of a known host only end what was answered.
            slow.spawn(async move {
                let told = tokio::time::timeout(BORNE_MAX, ask_cpu(&link)).await;
                let early = at_once < 3 || !is_known;
                assert!(
                    !early || !matches!(told, Ok(Ok(_))),
                    "one that stopped after {at_once} of {packets} packets was answered"
                );
                drop(wire);
            });
        }
    }
    // And some that get through, a packet in two seconds.
    for key in [&known.key, &stranger.key] {
        let wire = Wire::to(port.address).await;
        wire.each_ms.store(2000, Ordering::SeqCst);
        let link = link(wire.address, key, &toy);
        slow.spawn(async move {
            assert!(ask_cpu(&link).await.is_err(), "one that takes two seconds for a packet was answered");
            drop(wire);
        });
    }
    good(&toy, &port).await;
    until("nobody who is slow is met any more", || port.count(|all| &all.waiting) == 0).await;
    assert!(port.count(|all| &all.too_slow) >= 2, "{:?}", port.counters);
    slow.abort_all();
    while let Some(ended) = slow.join_next().await {
        assert!(ended.as_ref().err().is_none_or(tokio::task::JoinError::is_cancelled), "{ended:?}");
    }
    // Neither is a connection kept whose peer says nothing more.
    until("no task is left of them", || tasks() <= before).await;
    assert_eq!(toy.sessions.open(), 0);
    println!("stopped after 1 to {} packets of {packets}: {:?}", packets - 1, port.counters);
    good(&toy, &port).await;
}

/// Takes any key: these tests are not about who the destination is.
#[derive(Debug)]
struct Anybody;

impl ServerCertVerifier for Anybody {
    fn verify_server_cert(
        &self,
        _: &CertificateDer<'_>,
        _: &[CertificateDer<'_>],
        _: &ServerName<'_>,
        _: &[u8],
        _: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        Ok(ServerCertVerified::assertion())
    }
    fn verify_tls12_signature(
        &self,
        _: &[u8],
        _: &CertificateDer<'_>,
        _: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        Ok(HandshakeSignatureValid::assertion())
    }
    fn verify_tls13_signature(
        &self,
        _: &[u8],
        _: &CertificateDer<'_>,
        _: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        Ok(HandshakeSignatureValid::assertion())
    }
    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        vec![SignatureScheme::ED25519]
    }
    fn requires_raw_public_keys(&self) -> bool {
        true
    }
}

/// DER of an Ed25519 SubjectPublicKeyInfo up to the 32 bytes of the key (RFC 8410).
const SPKI_PREFIX: [u8; 12] = [0x30, 0x2a, 0x30, 0x05, 0x06, 0x03, 0x2b, 0x65, 0x70, 0x03, 0x21, 0x00];

/// A bare QUIC connection with this key, for whoever wants to say something else than the link does.
async fn bare(to: SocketAddr, key: &HostKey) -> Result<(Endpoint, Connection), quinn::ConnectionError> {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("key");
    key.save(&path).unwrap();
    let HostId(id) = key.id();
    let secret = PrivatePkcs8KeyDer::from(std::fs::read(&path).unwrap());
    let secret = rustls::crypto::ring::sign::any_eddsa_type(&secret).unwrap();
    let public = CertificateDer::from([&SPKI_PREFIX[..], &id].concat());
    let certified = Arc::new(rustls::sign::CertifiedKey::new(vec![public], secret));
    let mut config = rustls::ClientConfig::builder_with_provider(Arc::new(rustls::crypto::ring::default_provider()))
        .with_protocol_versions(&[&rustls::version::TLS13])
        .unwrap()
        .dangerous()
        .with_custom_certificate_verifier(Arc::new(Anybody))
        .with_client_cert_resolver(Arc::new(AlwaysResolvesClientRawPublicKeys::new(certified)));
    config.alpn_protocols = vec![b"limosa/1".to_vec()];
    let config = ClientConfig::new(Arc::new(QuicClientConfig::try_from(config).unwrap()));
    let endpoint = Endpoint::client("127.0.0.1:0".parse().unwrap()).unwrap();
    let connection = endpoint.connect_with(config, to, "limosa").unwrap().await?;
    Ok((endpoint, connection))
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_known_host_that_trickles_its_first_words_loses_its_stream() {
    let toy = Toy::start(ToySettings::default()).await;
    let port = Port::with(&toy, impatient(), QuicSettings::default());
    let known = sender();
    known.befriend(&toy);
    let words = Message::CpuAsk.frame(MigrationId([1; 16]), Generation(1)).unwrap();
    let lane = [&b"LMSL"[..], &[1; 68]].concat();
    let (_endpoint, connection) = bare(port.address, &known.key).await.unwrap();
    let mut slow = tokio::task::JoinSet::new();
    // Within the first four bytes, behind them, and before the last.
    for (bytes, at_once) in [(&words, 0), (&words, 3), (&words, 4), (&words, 8), (&lane, 2), (&lane, 20)] {
        let (bytes, connection) = (bytes.clone(), connection.clone());
        slow.spawn(async move {
            let (mut send, mut receive) = connection.open_bi().await.unwrap();
            let begun = Instant::now();
            let trickles = async {
                let _ = send.write_all(&bytes[..at_once]).await;
                for byte in &bytes[at_once..bytes.len() - 1] {
                    tokio::time::sleep(Duration::from_secs(1)).await;
                    if send.write_all(&[*byte]).await.is_err() {
                        return;
                    }
                }
                std::future::pending::<()>().await;
            };
            let heard = async { receive.read_to_end(1 << 16).await.unwrap_or_default() };
            tokio::select! {
                heard = heard => assert!(heard.is_empty(), "{at_once}: {heard:?}"),
                () = trickles => {}
                () = tokio::time::sleep(BORNE_MAX) => panic!("one that trickles from byte {at_once} on was borne"),
            }
            begun.elapsed()
        });
    }
    let mut took = Vec::new();
    while let Some(ended) = slow.join_next().await {
        took.push(ended.unwrap());
    }
    println!("borne for {took:?}");
    assert!(took.iter().all(|took| *took < 2 * WORDS_MAX + SLACK), "{took:?}");
    assert_eq!(toy.sessions.open(), 0);
    good(&toy, &port).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn strangers_that_try_again_and_again_are_not_answered_and_a_known_host_is() {
    let toy = Toy::start(ToySettings::default()).await;
    let listener = ListenerSettings { trials_at_once: 4, trial_each: Duration::from_secs(2), ..ListenerSettings::default() };
    let port = Port::with(&toy, listener, QuicSettings::default());
    let stranger = HostKey::generate().unwrap();
    let attempt = async || tokio::time::timeout(Duration::from_millis(700), bare(port.address, &stranger)).await;
    for number in 0..4 {
        let told = attempt().await;
        assert!(told.is_ok(), "number {number} was not told that it is not trusted");
    }
    until("four were refused for their key", || port.count(|all| &all.not_trusted) + port.count(|all| &all.broken) == 4).await;
    let begun = port.count(|all| &all.handshakes_begun);
    assert!(attempt().await.is_err(), "a fifth was answered");
    assert_eq!(port.count(|all| &all.handshakes_begun), begun, "a handshake was begun for it");
    assert!(port.count(|all| &all.crowded_out) > 0);
    // One that is known comes from the same address: it says its first packet again until it is answered, and then does not count.
    for _ in 0..3 {
        good(&toy, &port).await;
    }
    println!("{:?}", port.counters);
}

/// Sends packets as they were sent before, and waits until nothing of it is met any more.
async fn say_again(port: &Port, from: SocketAddr, packets: &[Vec<u8>]) {
    // The wire's own socket may take a moment to close.
    let bound = async {
        loop {
            match UdpSocket::bind(from).await {
                Ok(socket) => return socket,
                Err(_) => tokio::time::sleep(Duration::from_millis(2)).await,
            }
        }
    };
    let socket = tokio::time::timeout(BORNE_MAX, bound).await.expect("the address of the recording is in use");
    for packet in packets {
        socket.send_to(packet, port.address).await.unwrap();
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
    tokio::time::sleep(Duration::from_millis(200)).await;
    until("nobody is met", || port.count(|all| &all.waiting) == 0).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_recorded_session_over_quic_is_worthless() {
    let toy = Toy::start(ToySettings::default()).await;
    let port = Port::with(&toy, ListenerSettings::default(), QuicSettings::default());
    let sender = sender();
    sender.befriend(&toy);
    let wire = Wire::to(port.address).await;
    let (outcome, _) = sender.migrate_over(&toy, Arc::new(link(wire.address, &sender.key, &toy))).await;
    assert_moved(&sender, &toy, &outcome);
    toy.settle().await;
    ask_verdict(&link(wire.address, &sender.key, &toy), MigrationId(*b"toy-migration-01"), Generation(1), true).await.unwrap();
    let (said, from) = (wire.said(), wire.from);
    assert!(said.len() > 20 && said.iter().map(Vec::len).sum::<usize>() > 512 / 3 * 4096, "{} packets", said.len());
    drop(wire);
    let journal = toy::kinds(&toy.saw.journal);
    let memory = toy.saw.memory.lock().unwrap().clone().unwrap();
    let before = memory.snapshot();
    let begun = port.count(|all| &all.handshakes_begun);
    // From the very address, whose token is still good, while the port may know the connections; then later; then from another one.
    say_again(&port, from, &said).await;
    say_again(&port, from, &said).await;
    say_again(&port, "127.0.0.1:0".parse().unwrap(), &said).await;
    let again = port.count(|all| &all.handshakes_begun) - begun;
    println!("{} packets said three times: {again} handshakes begun, none ended: {:?}", said.len(), port.counters);
    assert!(again > 0, "nothing was even tried: the test shows nothing");
    assert_eq!((toy.sessions.open(), toy.outcomes.lock().unwrap().len()), (0, 1));
    assert_eq!((toy::kinds(&toy.saw.journal), memory.snapshot() == before), (journal, true));
    good(&toy, &port).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_operators_key_is_nobodys_over_quic_and_there_are_no_commands() {
    let toy = Toy::start(ToySettings::default()).await;
    let port = Port::with(&toy, impatient(), QuicSettings::default());
    let operator = sender();
    toy.operators.insert(operator.key.id());
    let count = |which: fn(&QuicCounters) -> &AtomicU64| port.count(which);
    // It sends no guest and asks nothing: to this port its key is a stranger's.
    let error = link(port.address, &operator.key, &toy).control().await.map(|_: Control| ()).unwrap_err();
    assert_eq!(error.code(), Code::UnknownHost, "{error}");
    assert!(error.to_string().contains("does not trust our key"), "{error}");
    let (outcome, _) = operator.migrate_over(&toy, Arc::new(link(port.address, &operator.key, &toy))).await;
    toy::assert_stayed(&operator, &toy, &outcome);
    until("it was refused for its key", || count(|all| &all.not_trusted) == 2).await;
    // Nor does it get a stream for a command: the connection ends with TLS's alert.
    if let Ok((_endpoint, connection)) = bare(port.address, &operator.key).await {
        let ended = tokio::time::timeout(BORNE_MAX, connection.closed()).await.expect("an operator's connection stays open");
        assert!(matches!(ended, quinn::ConnectionError::ConnectionClosed(_)), "{ended:?}");
    }
    // Whoever is let in, a host, finds no commands either: what begins like one is no message, and ends unanswered.
    let known = sender();
    known.befriend(&toy);
    let (_endpoint, connection) = bare(port.address, &known.key).await.unwrap();
    for command in [
        &b"\"vm_list\"\n"[..],
        b"{\"vm_stop\":{\"vm\":\"web\"}}\n",
        b"{\"migrate\":{\"vm\":\"web\",\"to\":\"b\"}}\n0123456789012345678901234567890123456789",
    ] {
        let (mut send, mut receive) = connection.open_bi().await.unwrap();
        send.write_all(command).await.unwrap();
        let _ = send.finish();
        let heard = tokio::time::timeout(BORNE_MAX, receive.read_to_end(1 << 16)).await.expect("a command is borne");
        let heard = heard.unwrap_or_default();
        assert!(!String::from_utf8_lossy(&heard).contains("result"), "{heard:?}");
        assert!(heard.is_empty(), "a command over QUIC was answered: {heard:?}");
    }
    assert_eq!((toy.sessions.open(), toy.outcomes.lock().unwrap().len()), (0, 0));
    good(&toy, &port).await;
}
