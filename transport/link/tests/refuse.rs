//! What is not let in: addresses, keys, plaintext, strangers' lanes, garbage, the slow and the many. And that the next good
//! migration always works.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod toy;

use limosa_link::{HostKey, LaneMemory, ListenerSettings, Pages, RemoteKeys, TcpLink, TrustedHosts, ask_check, ask_cpu};
use limosa_proto::allow::AllowList;
use limosa_proto::event::SourceOutcome;
use limosa_proto::identity::{Generation, MigrationId};
use limosa_proto::wire::code::Code;
use limosa_proto::wire::frame::{LanePreamble, LaneToken};
use limosa_proto::wire::message::{Refusal, VerdictAnswer};
use std::io::{Read as _, Write as _};
use std::net::TcpStream;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};
use toy::{Guest, Sender, Toy, ToyMemory, ToySettings, assert_moved, assert_stayed};

fn sender() -> Sender {
    let memory = ToyMemory::new(512);
    memory.fill(|page| page % 3 == 0);
    Sender::new(Guest::start(memory, Duration::from_millis(1)))
}

fn refusal(outcome: &SourceOutcome) -> Refusal {
    match outcome {
        SourceOutcome::Refused(refusal) => refusal.clone(),
        other => panic!("not refused: {other:?}"),
    }
}

async fn good(sender: &Sender, toy: &Toy) {
    sender.befriend(toy);
    let (outcome, _) = sender.migrate(toy).await;
    assert_moved(sender, toy, &outcome);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_address_that_is_not_on_the_list() {
    let toy = Toy::start(ToySettings::default()).await;
    *toy.allow.write().unwrap() = AllowList::new(&["10.0.0.0/8"]).unwrap().0;
    let sender = sender();
    sender.befriend(&toy);
    for _ in 0..5 {
        let (outcome, report) = sender.migrate(&toy).await;
        assert_stayed(&sender, &toy, &outcome);
        let refusal = refusal(&outcome);
        assert_eq!(refusal.code, Code::NotAllowed, "{}", refusal.words());
        let wants = format!("destination {} does not allow 127.0.0.1 (our address)", toy.address);
        assert!(refusal.words().contains(&wants), "{}", refusal.words());
        assert!(!report.ok && report.words.unwrap().contains(&wants));
    }
    assert_eq!(toy.counters.not_allowed.load(Ordering::SeqCst), 5);
    assert!(toy::kinds(&sender.saw.journal).is_empty(), "something was begun");
    *toy.allow.write().unwrap() = AllowList::new(&["127.0.0.1"]).unwrap().0;
    good(&sender, &toy).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_source_that_is_not_trusted_there() {
    let toy = Toy::start(ToySettings::default()).await;
    let sender = sender();
    for _ in 0..10 {
        let (outcome, _) = sender.migrate(&toy).await;
        assert_stayed(&sender, &toy, &outcome);
        let refusal = refusal(&outcome);
        assert_eq!(refusal.code, Code::UnknownHost);
        assert!(
            refusal.words().contains("does not trust our key") && refusal.words().contains("limosa host trust"),
            "{}",
            refusal.words()
        );
    }
    assert_eq!(toy.counters.not_trusted.load(Ordering::SeqCst), 10);
    good(&sender, &toy).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_destination_that_is_not_trusted_here_or_is_another() {
    let toy = Toy::start(ToySettings::default()).await;
    let sender = sender();
    sender.befriend(&toy);
    let link = |expected, trusted| {
        Arc::new(TcpLink::new(toy.address.to_string(), expected, sender.key.clone(), trusted, Duration::from_secs(10)))
    };
    let (outcome, _) = sender.migrate_over(&toy, link(toy.key.id(), TrustedHosts::default())).await;
    let wants = format!("destination's key {} is not trusted here: `limosa host trust {}`", toy.key.id(), toy.key.id());
    assert!(refusal(&outcome).words().contains(&wants), "{}", refusal(&outcome).words());
    let other = HostKey::generate().unwrap().id();
    let (outcome, _) = sender.migrate_over(&toy, link(other, TrustedHosts::new([other, toy.key.id()]))).await;
    let words = refusal(&outcome).words();
    assert!(
        words.contains(&other.to_string()) && words.contains(&toy.key.id().to_string()) && words.contains("another host"),
        "{words}"
    );
    assert_eq!(refusal(&outcome).code, Code::UnknownHost);
    good(&sender, &toy).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn nobody_listens() {
    let toy = Toy::start(ToySettings::default()).await;
    let sender = sender();
    let trusted = TrustedHosts::new([toy.key.id()]);
    for (at, wants) in [("127.0.0.1:1", "cannot be reached"), ("no-such-host.invalid:13560", "has no address")] {
        let link = TcpLink::new(at.to_owned(), toy.key.id(), sender.key.clone(), trusted.clone(), Duration::from_secs(10));
        let (outcome, _) = sender.migrate_over(&toy, Arc::new(link)).await;
        let words = refusal(&outcome).words();
        assert!(words.contains(at) && words.contains(wants), "{words}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_hosts_own_refusal_arrives_in_its_words() {
    let toy = Toy::start(ToySettings::default()).await;
    let sender = sender();
    sender.befriend(&toy);
    *toy.saw.refuse.lock().unwrap() = Some(Refusal::one(Code::NetworkMissing, "no network \"lan\" here; there is \"dmz\""));
    let (outcome, _) = sender.migrate(&toy).await;
    assert_stayed(&sender, &toy, &outcome);
    assert_eq!(refusal(&outcome).words(), "no network \"lan\" here; there is \"dmz\"");
    toy.settle().await;
    *toy.saw.refuse.lock().unwrap() = None;
    good(&sender, &toy).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn plaintext_where_it_is_off() {
    let listener = ListenerSettings { plaintext_lanes: false, ..ListenerSettings::default() };
    let toy = Toy::start(ToySettings { listener, ..ToySettings::default() }).await;
    let mut sender = sender();
    sender.plaintext = true;
    sender.befriend(&toy);
    let (outcome, _) = sender.migrate(&toy).await;
    assert_stayed(&sender, &toy, &outcome);
    assert_eq!(refusal(&outcome).code, Code::PlaintextRefused);
    toy.settle().await;
    // A plaintext preamble at such a port is closed without an answer.
    let mut socket = TcpStream::connect(toy.address).unwrap();
    socket.write_all(&preamble(0).emit()).unwrap();
    let mut answer = Vec::new();
    let _ = socket.read_to_end(&mut answer);
    assert!(answer.is_empty());
    sender.plaintext = false;
    good(&sender, &toy).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_operators_key_sends_no_guest_and_opens_no_lane() {
    let toy = Toy::start(ToySettings::default()).await;
    let sender = sender();
    toy.operators.insert(sender.key.id());
    let (outcome, _) = sender.migrate(&toy).await;
    assert_stayed(&sender, &toy, &outcome);
    let refusal = refusal(&outcome);
    assert!(refusal.code == Code::NotAHost && refusal.words().contains("an operator's"), "{refusal:?}");
    let pages: Arc<dyn Pages> = sender.guest.memory.clone();
    let (keys, _asks) = RemoteKeys::new(&*pages);
    let memory = LaneMemory { pages, keys: Arc::new(keys), page_check: false };
    let lane = sender.link(&toy).lane(preamble(0), false, &memory).await;
    assert_eq!(lane.err().unwrap().code(), Code::NotAHost);
    assert_eq!((toy.sessions.open(), toy.outcomes.lock().unwrap().len()), (0, 0));
    // A key that is in both sets is a host's: it commands nothing, and may send.
    good(&sender, &toy).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_host_without_commands_says_nothing_to_who_would_command_it() {
    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
    let toy = Toy::start(ToySettings::default()).await;
    let sender = sender();
    toy.operators.insert(sender.key.id());
    let key = sender.key.clone();
    let mut channel = limosa_link::commands::command(toy.address.to_string(), toy.key.id(), key.clone()).await.unwrap();
    channel.stream.write_all(b"{\"vm_list\":null}\n").await.unwrap();
    let mut said = Vec::new();
    channel.stream.read_to_end(&mut said).await.unwrap();
    assert_eq!(said, b"");
    // Who answers is found out without being spoken to, and another one is never spoken to.
    assert_eq!(limosa_link::ask_key(&toy.address.to_string(), &key, limosa_link::Here::default()).await.unwrap(), toy.key.id());
    let error = limosa_link::commands::command(toy.address.to_string(), sender.key.id(), key).await.unwrap_err();
    assert!(error.to_string().contains(&toy.key.id().to_string()), "{error}");
    good(&sender, &toy).await;
}

fn preamble(lane: u16) -> LanePreamble {
    LanePreamble {
        version: 1,
        lane,
        migration: MigrationId(*b"toy-migration-01"),
        generation: Generation(1),
        token: LaneToken([3; 32]),
    }
}

fn garbage(seed: u64, length: usize) -> Vec<u8> {
    let mut state = seed | 1;
    std::iter::repeat_with(|| {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state as u8
    })
    .take(length)
    .collect()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn garbage_at_the_door() {
    let toy = Toy::start(ToySettings::default()).await;
    let address = toy.address;
    tokio::task::spawn_blocking(move || {
        for seed in 0..200_u64 {
            let mut bytes = garbage(seed * 77 + 1, (seed * 37 % 3000) as usize);
            match seed % 4 {
                // Looks like TLS, like a TLS record of the largest length, like a lane.
                0 if bytes.len() > 5 => bytes[..5].copy_from_slice(&[22, 3, 1, 2, 0]),
                1 if bytes.len() > 5 => bytes[..5].copy_from_slice(&[22, 3, 3, 255, 255]),
                2 if bytes.len() > 4 => bytes[..4].copy_from_slice(b"LMSL"),
                _ => {}
            }
            let mut socket = TcpStream::connect(address).unwrap();
            let _ = socket.write_all(&bytes);
            if seed % 3 == 0 {
                socket.set_read_timeout(Some(Duration::from_millis(5))).unwrap();
                let _ = socket.read(&mut [0; 64]);
            }
        }
    })
    .await
    .unwrap();
    assert_eq!(toy.sessions.open(), 0);
    good(&sender(), &toy).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_hundred_that_say_nothing_and_one_that_is_slow() {
    let listener =
        ListenerSettings { plaintext_lanes: true, handshake_max: Duration::from_secs(2), ..ListenerSettings::default() };
    let toy = Toy::start(ToySettings { listener, ..ToySettings::default() }).await;
    let held: Vec<TcpStream> = (0..100).map(|_| TcpStream::connect(toy.address).unwrap()).collect();
    let address = toy.address;
    let slow = tokio::task::spawn_blocking(move || {
        let mut socket = TcpStream::connect(address).unwrap();
        let begun = Instant::now();
        // A byte at a time would last for ever.
        while socket.write_all(&[22]).is_ok() && begun.elapsed() < Duration::from_secs(10) {
            std::thread::sleep(Duration::from_millis(100));
        }
        begun.elapsed()
    });
    let begun = Instant::now();
    good(&sender(), &toy).await;
    assert!(begun.elapsed() < Duration::from_secs(2), "the good one had to wait {:?}", begun.elapsed());
    let took = slow.await.unwrap();
    assert!(took < Duration::from_secs(5), "a slow peer was borne for {took:?}");
    assert!(toy.counters.crowded_out.load(Ordering::SeqCst) >= 36);
    drop(held);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_verdict_is_asked_by_trusted_hosts_only() {
    let toy = Toy::start(ToySettings::default()).await;
    let sender = sender();
    let ask = || async { limosa_link::ask_verdict(&*sender.link(&toy), MigrationId([9; 16]), Generation(1), true).await };
    let error = ask().await.unwrap_err().to_string();
    assert!(error.contains("trust"), "{error}");
    sender.befriend(&toy);
    assert_eq!(ask().await.unwrap(), VerdictAnswer::Unknown);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_question_ahead_tells_the_reasons_and_changes_nothing() {
    let toy = Toy::start(ToySettings { incoming_max: 1, ..ToySettings::default() }).await;
    let sender = sender();
    let link = sender.link(&toy);
    let described = toy::vm(&sender.guest.memory.map);
    let error = ask_check(&*link, &described, None).await.unwrap_err();
    assert_eq!(error.code(), Code::UnknownHost, "{error}");
    sender.befriend(&toy);
    assert_eq!(ask_check(&*link, &described, None).await.unwrap(), []);
    assert_eq!(ask_cpu(&*link).await.unwrap().tsc_khz, 7);
    let refusal = Refusal::one(Code::Memory, "no such pages");
    *toy.saw.refuse.lock().unwrap() = Some(refusal.clone());
    assert_eq!(ask_check(&*link, &described, None).await.unwrap(), refusal.reasons);
    *toy.saw.refuse.lock().unwrap() = None;
    assert_eq!((toy.sessions.open(), toy.outcomes.lock().unwrap().len()), (0, 0));
    assert!(toy.saw.memory.lock().unwrap().is_none(), "a VMM was made");
    // A stranger's answer is bounded too.
    toy.stop.cancel("over");
    let gone =
        TcpLink::new("127.0.0.1:1".to_owned(), toy.key.id(), sender.key.clone(), TrustedHosts::default(), Duration::from_secs(1));
    assert!(ask_cpu(&gone).await.unwrap_err().to_string().contains("127.0.0.1:1"));
    let toy = Toy::start(ToySettings::default()).await;
    good(&sender, &toy).await;
}
