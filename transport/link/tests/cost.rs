//! What a stranger costs: one task and at most 64 KiB, whatever it sends, and nothing once it has gone. One test in a program of its
//! own, because the allocator counts for the whole process.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::print_stdout)]

mod toy;

use limosa_link::ListenerSettings;
use peak_alloc::PeakAlloc;
use std::io::Write as _;
use std::net::TcpStream;
use std::sync::atomic::Ordering;
use std::time::Duration;
use toy::{Toy, ToySettings};

#[global_allocator]
static MEMORY: PeakAlloc = PeakAlloc;

/// Peers at once.
const PEERS: usize = 32;
/// What one may cost in bytes, the connection's own structures included.
const BYTES_MAX: usize = 64 << 10;

fn tasks() -> usize {
    tokio::runtime::Handle::current().metrics().num_alive_tasks()
}

/// A TLS record of the handshake with `body`.
fn record(body: &[u8]) -> Vec<u8> {
    [&[22, 3, 3][..], &(body.len() as u16).to_be_bytes(), body].concat()
}

/// Beginnings that promise more than they bring, so that what came has to be kept.
fn beginnings() -> Vec<(&'static str, Vec<u8>)> {
    let hello = |said: u32, there: usize| [&[1][..], &said.to_be_bytes()[1..], &vec![0x55; there]].concat();
    let small: Vec<u8> = hello(60_000, 15_000).chunks(100).flat_map(record).collect();
    vec![
        ("silence", Vec::new()),
        ("one byte", vec![22]),
        ("a record of which the end is missing", [&[22, 3, 3, 0x40, 0][..], &[1; 15_000]].concat()),
        ("a message of which the end is missing", record(&hello(0xFF_FFFF, 15_000))),
        ("the same in small records", small),
        ("a short message in very small records", hello(60_000, 3_000).chunks(1).flat_map(record).collect()),
        ("a lane in clear of which the end is missing", b"LMSL\x01\x00\x00\x00".to_vec()),
    ]
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_stranger_costs_one_task_and_little_memory() {
    let listener =
        ListenerSettings { plaintext_lanes: true, handshake_max: Duration::from_secs(60), ..ListenerSettings::default() };
    assert!(PEERS < listener.unauthenticated_of_one_max);
    for (what, bytes) in beginnings() {
        let toy = Toy::start(ToySettings { listener: listener.clone(), ..ToySettings::default() }).await;
        let waiting = || toy.counters.waiting.load(Ordering::SeqCst) as usize;
        let settled = async |peers: usize| {
            // Those that were refused at once cost nothing any more.
            let mut same = 0;
            while same < 20 {
                let before = MEMORY.current_usage();
                tokio::time::sleep(Duration::from_millis(10)).await;
                same = if MEMORY.current_usage() == before && waiting() <= peers { same + 1 } else { 0 };
            }
        };
        settled(0).await;
        let (before, tasks_before) = (MEMORY.current_usage(), tasks());
        MEMORY.reset_peak_usage();
        let mut held = Vec::with_capacity(PEERS);
        for _ in 0..PEERS {
            let mut socket = TcpStream::connect(toy.address).unwrap();
            socket.write_all(&bytes).unwrap();
            held.push(socket);
        }
        settled(PEERS).await;
        let (waiting, peak) = (waiting(), MEMORY.peak_usage().saturating_sub(before));
        let each = peak / PEERS;
        println!("{what}: {waiting} of {PEERS} are met, {} tasks, {each} bytes each at most", tasks() - tasks_before);
        assert!(tasks() - tasks_before <= waiting, "{what}: {} tasks for {waiting}", tasks() - tasks_before);
        assert!(each <= BYTES_MAX, "{what}: {each} bytes for one");
        drop(held);
        settled(0).await;
        assert_eq!(tasks(), tasks_before, "{what}: tasks are left");
        let left = MEMORY.current_usage().saturating_sub(before);
        assert!(left < BYTES_MAX, "{what}: {left} bytes are left of {PEERS}");
    }
}
