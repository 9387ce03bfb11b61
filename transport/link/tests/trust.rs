//! Who is let in by key and by which address of the host, over TCP and QUIC: unknown, revoked, expired and rotated keys on either
//! side, addresses of the destination that take no migrations, and a host whose trust ends while it is connected.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod toy;

use limosa_link::probe::probe;
use limosa_link::quic::{QuicLink, QuicListener, QuicSettings};
use limosa_link::refusals::{self, Port, Why};
use limosa_link::{Cancel, Here, HostKey, LaneMemory, Link, ListenerSettings, RemoteKeys, TcpLink, Trust, TrustedHosts, ask_key};
use limosa_proto::allow::NoNames;
use limosa_proto::here::HereList;
use limosa_proto::identity::{Generation, HostId, MigrationId};
use limosa_proto::wire::code::Code;
use limosa_proto::wire::message::Message;
use std::collections::BTreeMap;
use std::io::{Read as _, Write as _};
use std::net::{SocketAddr, TcpStream};
use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};
use toy::{Guest, Sender, Toy, ToyMemory, ToySettings, assert_moved, assert_stayed};

const SILENCE: Duration = Duration::from_secs(10);

/// A destination with both ports, and a source.
struct Trial {
    toy: Toy,
    here: Here,
    quic: SocketAddr,
    stop: Cancel,
    sender: Sender,
    /// Whom the source trusts.
    trusted: TrustedHosts,
}

impl Drop for Trial {
    fn drop(&mut self) {
        self.stop.cancel("over");
    }
}

impl Trial {
    async fn start() -> Trial {
        let here = Here::default();
        let listener = ListenerSettings { here: here.clone(), ..ListenerSettings::default() };
        let toy = Toy::start(ToySettings { listener: listener.clone(), ..ToySettings::default() }).await;
        let (key, trusted, allow) = (toy.key.clone(), toy.trusted.clone(), toy.allow.clone());
        let port = QuicListener::bind("127.0.0.1:0".parse().unwrap(), listener, QuicSettings::default(), key, trusted, allow);
        let port = port.unwrap();
        let (quic, stop) = (port.local_address().unwrap(), Cancel::new());
        tokio::spawn(port.serve(toy.sessions.clone(), stop.clone()));
        let memory = ToyMemory::new(256);
        memory.fill(|page| page % 2 == 0);
        let sender = Sender::new(Guest::start(memory, Duration::from_millis(2)));
        let trusted = TrustedHosts::new([toy.key.id()]);
        Trial { toy, here, quic, stop, sender, trusted }
    }

    fn links(&self, expected: HostId) -> [Arc<dyn Link>; 2] {
        let (key, trusted) = (|| self.sender.key.clone(), || self.trusted.clone());
        let tcp = TcpLink::new(self.toy.address.to_string(), expected, key(), trusted(), SILENCE);
        let settings = QuicSettings { connections: 1, ..QuicSettings::default() };
        let quic = QuicLink::new(self.quic.to_string(), expected, key(), trusted(), SILENCE, settings);
        [Arc::new(tcp), Arc::new(quic)]
    }

    /// What a question over each link comes to.
    async fn asked(&self, expected: HostId) -> [Result<(), (Code, String)>; 2] {
        let [tcp, quic] = self.links(expected);
        let ask = async |link: Arc<dyn Link>| probe(&*link, false).await.map(drop).map_err(|e| (e.code(), e.to_string()));
        [ask(tcp).await, ask(quic).await]
    }

    async fn good(&self, expected: HostId, when: &str) {
        for (asked, link) in self.asked(expected).await.into_iter().zip(["tcp", "quic"]) {
            assert!(asked.is_ok(), "{when}, {link}: {asked:?}");
        }
    }

    async fn refused(&self, expected: HostId, words: &str, why: Option<Why>) {
        let before = [Port::Tcp, Port::Quic].map(|port| why.map(|why| refusals::of(port, why)));
        for (asked, link) in self.asked(expected).await.into_iter().zip(["tcp", "quic"]) {
            let (code, said) = asked.expect_err(words);
            assert_eq!(code, Code::UnknownHost, "{link}: {said}");
            assert!(said.contains(words), "{link}: {words:?} is not in {said}");
        }
        // The source hears of it before the destination has counted.
        let counted = async {
            for (port, before) in [Port::Tcp, Port::Quic].into_iter().zip(before) {
                while why.is_some_and(|why| Some(refusals::of(port, why)) <= before) {
                    tokio::time::sleep(Duration::from_millis(5)).await;
                }
            }
        };
        tokio::time::timeout(Duration::from_secs(20), counted).await.expect("a refusal was not counted");
    }
}

fn now() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_secs()
}

fn trust(keys: &[(HostId, Option<u64>)], successor: Option<(HostId, HostId)>) -> Trust {
    Trust {
        keys: keys.iter().copied().collect::<BTreeMap<_, _>>(),
        successors: successor.into_iter().collect(),
        ..Trust::default()
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn keys_at_the_destination() {
    let trial = Trial::start().await;
    let (toy, own, there) = (&trial.toy, trial.sender.key.id(), trial.toy.key.id());
    trial.refused(there, "not trust our", Some(Why::Key)).await;
    toy.trusted.insert(own);
    trial.good(there, "trusted").await;
    toy.trusted.revoke(own);
    trial.refused(there, "not trust our", Some(Why::Revoked)).await;
    toy.trusted.replace(trust(&[(own, Some(now() + 1000))], None));
    trial.good(there, "trusted for a time").await;
    toy.trusted.replace(trust(&[(own, Some(now() - 1))], None));
    trial.refused(there, "not trust our", Some(Why::Expired)).await;
    // The source has a new key. In the overlap the destination takes both, afterwards only the new one.
    let (old, new) = (own, HostKey::generate().unwrap());
    let overlap = |until| trust(&[(old, Some(until)), (new.id(), None)], Some((old, new.id())));
    toy.trusted.replace(overlap(now() + 1000));
    trial.good(there, "the old key in the overlap").await;
    toy.trusted.replace(overlap(now() - 1));
    trial.refused(there, "not trust our", Some(Why::Expired)).await;
    trial.sender.key.become_key(&new);
    trial.good(there, "the new key after the overlap").await;
    toy.trusted.replace(overlap(now() + 1000));
    trial.good(there, "the new key in the overlap").await;
    toy.trusted.revoke(new.id());
    trial.refused(there, "not trust our", Some(Why::Revoked)).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn keys_at_the_source() {
    let trial = Trial::start().await;
    let (own, there) = (trial.sender.key.id(), trial.toy.key.id());
    trial.toy.trusted.insert(own);
    trial.good(there, "trusted").await;
    trial.trusted.revoke(there);
    trial.refused(there, "is revoked here", None).await;
    trial.trusted.replace(trust(&[(there, Some(now() - 1))], None));
    trial.refused(there, "for a time that is over", None).await;
    trial.trusted.replace(Trust::default());
    trial.refused(there, "is not trusted here", None).await;
    // The destination has a new key, which the source knows of: it is the same host, whichever of the two it shows.
    let (old, new, third) = (there, HostKey::generate().unwrap(), HostKey::generate().unwrap());
    let overlap = |until| trust(&[(old, Some(until)), (new.id(), None)], Some((old, new.id())));
    trial.trusted.replace(overlap(now() + 1000));
    trial.good(old, "the old key, asked for by it").await;
    trial.good(new.id(), "the old key in the overlap, asked for by the new one").await;
    trial.trusted.replace(overlap(now() - 1));
    trial.refused(new.id(), "for a time that is over", None).await;
    trial.toy.key.become_key(&new);
    trial.good(old, "the new key, asked for by the old one").await;
    trial.good(new.id(), "the new key").await;
    // Another trusted host is still another host.
    trial.trusted.insert(third.id());
    trial.refused(third.id(), "another host", None).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_is_no_tls_is_told_nothing() {
    let trial = Trial::start().await;
    let before = refusals::of(Port::Tcp, Why::Handshake);
    for words in [&b"GET / HTTP/1.1\r\n\r\n"[..], b"LMSL", &[22, 3, 1, 0, 1, 0]] {
        let mut stream = TcpStream::connect(trial.toy.address).unwrap();
        stream.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
        stream.write_all(words).unwrap();
        stream.shutdown(std::net::Shutdown::Write).unwrap();
        let mut said = Vec::new();
        let _ = stream.read_to_end(&mut said);
        // At most a TLS alert of seven bytes.
        assert!(said.len() <= 7, "{words:?} was answered by {said:?}");
    }
    assert!(refusals::of(Port::Tcp, Why::Handshake) >= before + 3);
    trial.toy.trusted.insert(trial.sender.key.id());
    trial.good(trial.toy.key.id(), "after what was no TLS").await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_address_of_the_destination_that_takes_no_migrations() {
    let trial = Trial::start().await;
    let (own, there) = (trial.sender.key.id(), trial.toy.key.id());
    trial.toy.trusted.insert(own);
    let list = |network: &str| HereList::new(&[(network, 1)], &NoNames).unwrap().0;
    trial.here.replace(list("127.0.0.2"));
    let before = [Port::Tcp, Port::Quic].map(|port| refusals::of(port, Why::OwnAddress));
    for link in trial.links(there) {
        let (outcome, _) = trial.sender.migrate_over(&trial.toy, link).await;
        assert_stayed(&trial.sender, &trial.toy, &outcome);
        let words = format!("{outcome:?}");
        assert!(words.contains("NotAllowed"), "{words}");
    }
    for (port, before) in [Port::Tcp, Port::Quic].into_iter().zip(before) {
        assert!(refusals::of(port, Why::OwnAddress) > before, "{port:?} was not counted");
    }
    trial.here.replace(list("127.0.0.0/24"));
    let [_, quic] = trial.links(there);
    let (outcome, _) = trial.sender.migrate_over(&trial.toy, quic).await;
    assert_moved(&trial.sender, &trial.toy, &outcome);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_address_of_the_source_that_takes_no_migrations() {
    let trial = Trial::start().await;
    let there = trial.toy.key.id();
    trial.toy.trusted.insert(trial.sender.key.id());
    let ours = |network: &str| Here::new(HereList::new(&[(network, 1)], &NoNames).unwrap().0);
    let (key, trusted) = (|| trial.sender.key.clone(), || trial.trusted.clone());
    let tcp = |here| TcpLink::new(trial.toy.address.to_string(), there, key(), trusted(), SILENCE).with_here(here);
    let quic =
        |here| QuicLink::new(trial.quic.to_string(), there, key(), trusted(), SILENCE, QuicSettings::default()).with_here(here);
    for link in [&tcp(ours("10.9.0.0/16")) as &dyn Link, &quic(ours("10.9.0.0/16"))] {
        let error = link.control().await.unwrap_err();
        assert!(error.to_string().contains("that address of this host takes no migrations"), "{error}");
    }
    for link in [&tcp(ours("127.0.0.1")) as &dyn Link, &quic(ours("127.0.0.1"))] {
        probe(link, false).await.unwrap();
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_known_connection_opens_nothing_new_when_its_host_may_not_any_more() {
    let trial = Trial::start().await;
    let (own, there) = (trial.sender.key.id(), trial.toy.key.id());
    trial.toy.trusted.insert(own);
    let [_, quic] = trial.links(there);
    // Open, and kept open by a question that goes on.
    let mut control = quic.control().await.unwrap();
    control.send(MigrationId([0; 16]), Generation(0), &Message::LinksAsk).unwrap();
    control.receive().await.unwrap();
    trial.toy.trusted.remove(own);
    let before = refusals::of(Port::Quic, Why::Withdrawn);
    let preamble = limosa_proto::wire::frame::LanePreamble {
        version: 1,
        lane: 0,
        migration: MigrationId([1; 16]),
        generation: Generation(1),
        token: limosa_proto::wire::frame::LaneToken([1; 32]),
    };
    let pages = trial.sender.guest.memory.clone();
    let (keys, _asks) = RemoteKeys::new(&*pages);
    let memory = LaneMemory { pages, keys: Arc::new(keys), page_check: false };
    let answer = quic.lane(preamble, false, &memory).await;
    assert!(answer.is_err(), "a lane was answered");
    assert!(refusals::of(Port::Quic, Why::Withdrawn) > before);
    drop(control);
    trial.refused(there, "not trust our", Some(Why::Key)).await;
    trial.toy.trusted.insert(own);
    trial.good(there, "trusted again").await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_key_is_asked_for_without_trusting_it() {
    let trial = Trial::start().await;
    let asked = ask_key(&trial.toy.address.to_string(), &trial.sender.key, Here::default()).await;
    assert_eq!(asked.unwrap(), trial.toy.key.id());
    let nobody = ask_key("127.0.0.1:1", &trial.sender.key, Here::default()).await;
    assert!(nobody.unwrap_err().to_string().contains("cannot be reached"));
    *trial.toy.allow.write().unwrap() = limosa_proto::allow::AllowList::default();
    let barred = ask_key(&trial.toy.address.to_string(), &trial.sender.key, Here::default()).await;
    assert_eq!(barred.unwrap_err().code(), Code::NotAllowed);
}
