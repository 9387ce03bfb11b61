//! The page pass: how fast 2 GiB of incompressible, populated guest memory crosses loopback on 1, 2 and 4 lanes, plaintext and
//! TLS, against `iperf3 -l 1M` in the same run, interleaved, cubic on both sides, in a network namespace of its own.
//! `cargo bench --bench lanes [-- --gib 2 --runs 3]`. It needs root and iperf3; without them it says so.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::print_stdout, missing_docs)]

use limosa_link::driver::fresh_token;
use limosa_link::sessions::Sessions;
use limosa_link::{
    Cancel, DestinationHost, HostError, HostKey, Hosting, Incoming, LaneSettings, Listener, ListenerSettings, Pages, Peer,
    Populate, SourceHost, TcpLink, TrustedHosts, run_source_over,
};
use limosa_plug::memfd;
use limosa_plug::memory::GuestMemory;
use limosa_proto::allow::AllowList;
use limosa_proto::bitmap::PageSet;
use limosa_proto::commit::JournalRecord;
use limosa_proto::event::{DestinationConfig, SourceConfig, SourceOutcome};
use limosa_proto::identity::{Generation, MigrationId, VmId};
use limosa_proto::memory::{Gpa, MemoryMap, PAGE_BYTES, PageRange, Region};
use limosa_proto::progress::Progress;
use limosa_proto::record::Record;
use limosa_proto::report::Report;
use limosa_proto::wire::frame::ControlHeader;
use limosa_proto::wire::message::{Hello, Refusal, VerdictAnswer, VmDescription};
use std::io;
use std::net::SocketAddr;
use std::os::fd::BorrowedFd;
use std::process::{Command, Stdio};
use std::sync::{Arc, RwLock};
use std::time::Duration;

struct Memory(GuestMemory);

impl Pages for Memory {
    fn memory_map(&self) -> &MemoryMap {
        self.0.memory_map()
    }
    fn gather(&self, socket: BorrowedFd<'_>, head: &[u8], runs: &[PageRange], done: u64, more: bool) -> io::Result<usize> {
        self.0.gather(socket, head, runs, done, more)
    }
    fn scatter(&self, socket: BorrowedFd<'_>, runs: &[PageRange], done: u64, tail: &mut [u8]) -> io::Result<usize> {
        self.0.scatter(socket, runs, done, tail)
    }
    fn read(&self, range: PageRange, offset: u64, out: &mut [u8]) {
        self.0.read(range, offset, out);
    }
    fn write(&self, range: PageRange, offset: u64, data: &[u8]) {
        self.0.write(range, offset, data);
    }
    fn scan(&self, range: PageRange, found: &mut dyn FnMut(PageRange, bool)) {
        self.0.scan(range, found);
    }
    fn zero(&self, range: PageRange) {
        self.0.zero(range);
    }
    fn data_extents(&self, range: PageRange) -> Vec<PageRange> {
        self.0.data_extents(range)
    }
    fn populate(&self, range: PageRange) -> io::Result<()> {
        self.0.populate(range)
    }
}

fn memory(map: &MemoryMap) -> Memory {
    let fd = memfd::create("bench", map.bytes()).unwrap();
    Memory(GuestMemory::map(map.clone(), vec![(fd, 0)]).unwrap())
}

fn fill(memory: &Memory) {
    let mut state = 0x1234_5678_9abc_def1_u64;
    let mut chunk = vec![0_u8; 2 << 20];
    let whole = memory.memory_map().region_range(0).unwrap();
    let mut offset = 0;
    while offset < whole.bytes() {
        for word in chunk.chunks_exact_mut(8) {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            word.copy_from_slice(&state.to_le_bytes());
        }
        memory.write(whole, offset, &chunk);
        offset += chunk.len() as u64;
    }
}

struct Source(Arc<Memory>);

impl SourceHost for Source {
    fn pages(&self) -> Arc<dyn Pages> {
        self.0.clone()
    }
    fn start_tracking(&mut self) -> Result<(), HostError> {
        Ok(())
    }
    fn fetch_dirty(&mut self) -> Result<PageSet, HostError> {
        Ok(PageSet::empty(self.0.memory_map()))
    }
    fn pause(&mut self) -> Result<(), HostError> {
        Ok(())
    }
    fn save(&mut self) -> Result<Vec<Record>, HostError> {
        Ok(vec![Record { kind: 1, version: 1, instance: 0, bytes: vec![1; 4096] }])
    }
    fn resume(&mut self) -> Result<(), HostError> {
        Ok(())
    }
    fn stop_tracking(&mut self) -> Result<(), HostError> {
        Ok(())
    }
    fn release(&mut self) -> Result<(), HostError> {
        Ok(())
    }
    fn journal(&mut self, _: &JournalRecord) -> Result<(), HostError> {
        Ok(())
    }
}

struct Destination;

impl DestinationHost for Destination {
    fn check(&mut self, _: &VmDescription) -> Result<(), Refusal> {
        Ok(())
    }
    fn prepare(&mut self, vm: &VmDescription) -> Result<Arc<dyn Pages>, HostError> {
        let memory = Arc::new(memory(&vm.memory));
        // On threads of its own: the figures are those of the lanes, and first touch is another cost.
        let whole = vm.memory.region_range(0).unwrap();
        std::thread::scope(|scope| {
            for half in [0, 1] {
                let memory = &memory;
                scope
                    .spawn(move || memory.populate(PageRange { first: half * whole.count / 2, count: whole.count / 2 }).unwrap());
            }
        });
        Ok(memory)
    }
    fn load(&mut self, _: Vec<Record>) -> Result<(), HostError> {
        Ok(())
    }
    fn resume(&mut self) -> Result<(), HostError> {
        Ok(())
    }
    fn announce(&mut self) -> Result<Vec<String>, HostError> {
        Ok(vec![])
    }
    fn discard(&mut self) -> Result<(), HostError> {
        Ok(())
    }
    fn journal(&mut self, _: &JournalRecord) -> Result<(), HostError> {
        Ok(())
    }
}

struct Host(Populate);

impl Hosting for Host {
    fn incoming(&self, peer: &Peer, header: &ControlHeader, _: &Hello) -> Result<Incoming, Refusal> {
        let mut config = DestinationConfig::new(header.migration, header.generation, peer.id, fresh_token().unwrap());
        config.plaintext_allowed = true;
        Ok(Incoming { host: Box::new(Destination), config, populate: self.0, cancel: Cancel::new(), progress: None, done: None })
    }
    fn verdict(&self, _: &Peer, _: MigrationId, _: Generation, _: bool) -> VerdictAnswer {
        VerdictAnswer::Unknown
    }
}

struct Bench {
    source: Arc<Memory>,
    address: SocketAddr,
    key: HostKey,
    trusted: TrustedHosts,
    sessions: Sessions,
    frame_bytes: u64,
}

impl Bench {
    async fn start(source: Arc<Memory>, populate: Populate, frame_bytes: u64) -> Bench {
        let key = HostKey::generate().unwrap();
        let trusted = TrustedHosts::new([key.id()]);
        let allow = Arc::new(RwLock::new(AllowList::new(&["127.0.0.0/8"]).unwrap().0));
        let settings = ListenerSettings { plaintext_lanes: true, ..ListenerSettings::default() };
        let listener = Listener::bind("127.0.0.1:0".parse().unwrap(), settings, key.clone(), trusted.clone(), allow).unwrap();
        let address = listener.local_address().unwrap();
        let sessions = Sessions::new(Arc::new(Host(populate)), 1);
        tokio::spawn(listener.serve(sessions.clone(), Cancel::new()));
        Bench { source, address, key, trusted, sessions, frame_bytes }
    }

    async fn run(&self, lanes: u16, plaintext: bool, generation: u64) -> Report {
        let vm = VmDescription {
            id: VmId([1; 16]),
            name: "bench".into(),
            vcpus: 1,
            memory: self.source.memory_map().clone(),
            nics: vec![],
            vmm: "bench".into(),
            records: vec![],
            config: vec![],
        };
        let mut config = SourceConfig::new(MigrationId([2; 16]), Generation(generation), self.key.id(), vm);
        (config.lanes, config.plaintext_lanes) = (lanes, plaintext);
        let settings = LaneSettings { frame_bytes: self.frame_bytes, ..LaneSettings::default() };
        let (destination, key, trusted) = (self.address.to_string(), self.key.clone(), self.trusted.clone());
        let link = TcpLink::new(destination, key.id(), key, trusted, Duration::from_secs(10)).with_congestion("cubic");
        let progress = tokio::sync::watch::Sender::new(Progress::new(0));
        let (outcome, report) = run_source_over(
            Arc::new(link),
            config,
            settings,
            false,
            Box::new(Source(self.source.clone())),
            Cancel::new(),
            progress,
        )
        .await;
        assert_eq!(outcome, SourceOutcome::Committed);
        self.sessions.idle().await;
        report
    }
}

/// GB/s of one iperf3 stream, and CPU seconds of both ends for each GiB.
fn iperf3() -> (f64, f64) {
    let mut server = Command::new("iperf3").args(["-s", "-1", "-p", "15201"]).stdout(Stdio::null()).spawn().unwrap();
    std::thread::sleep(Duration::from_millis(300));
    let out = Command::new("iperf3")
        .args(["-c", "127.0.0.1", "-p", "15201", "-l", "1M", "-t", "2", "-C", "cubic", "-J"])
        .output()
        .unwrap();
    server.wait().unwrap();
    let result: serde_json::Value = serde_json::from_slice(&out.stdout).unwrap();
    let received = &result["end"]["sum_received"];
    let (bits, bytes, seconds) = (
        received["bits_per_second"].as_f64().unwrap(),
        received["bytes"].as_f64().unwrap(),
        received["seconds"].as_f64().unwrap(),
    );
    let cpu = &result["end"]["cpu_utilization_percent"];
    let percent = cpu["host_total"].as_f64().unwrap() + cpu["remote_total"].as_f64().unwrap();
    (bits / 8e9, percent / 100.0 * seconds / (bytes / f64::from(1 << 30)))
}

fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}

fn argument(name: &str, default: u64) -> u64 {
    let mut arguments = std::env::args();
    arguments.find(|argument| argument == name);
    arguments.next().map_or(default, |value| value.parse().unwrap())
}

/// A namespace with its own loopback and cubic, so that nothing outside is touched.
fn namespace() -> Result<(), String> {
    nix::sched::unshare(nix::sched::CloneFlags::CLONE_NEWNET)
        .map_err(|error| format!("no network namespace (root is needed): {error}"))?;
    let up = Command::new("ip").args(["link", "set", "lo", "up"]).status().map_err(|error| error.to_string())?;
    Command::new("iperf3").arg("--version").stdout(Stdio::null()).status().map_err(|error| format!("no iperf3: {error}"))?;
    if up.success() { Ok(()) } else { Err("loopback cannot be brought up".into()) }
}

fn main() {
    // `cargo test --benches` and listings call without `--bench`: nothing is measured then.
    if !std::env::args().any(|argument| argument == "--bench") {
        return;
    }
    if let Err(words) = namespace() {
        println!("skipped: {words}");
        assert!(std::env::var_os("LIMOSA_DEMAND_ALL").is_none(), "{words}");
        return;
    }
    let (gib, runs, frame) = (argument("--gib", 2), argument("--runs", 3), argument("--frame", 1 << 20));
    let map = MemoryMap::new(vec![Region { gpa: Gpa(0), bytes: gib << 30, page_bytes: PAGE_BYTES }]).unwrap();
    let source = Arc::new(memory(&map));
    fill(&source);
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap();
    let bench = runtime.block_on(Bench::start(source, Populate::No, frame));
    let cases: Vec<(u16, bool)> =
        [true, false].into_iter().flat_map(|plaintext| [1, 2, 4].map(|lanes| (lanes, plaintext))).collect();
    let (mut reports, mut peers): (Vec<Vec<Report>>, Vec<(f64, f64)>) = (vec![Vec::new(); cases.len()], Vec::new());
    let mut generation = 0;
    for _ in 0..runs {
        peers.push(iperf3());
        for (case, (lanes, plaintext)) in cases.iter().enumerate() {
            generation += 1;
            let report = runtime.block_on(bench.run(*lanes, *plaintext, generation));
            if std::env::args().any(|argument| argument == "--verbose") {
                println!("{lanes} {plaintext} {:?} {:?} {:?}", report.round_list, report.downtime_parts_ms, report.cpu_seconds);
            }
            reports[case].push(report);
        }
        peers.push(iperf3());
    }
    let best = median(peers.iter().map(|peer| peer.0).collect());
    // The best of each says what the machine can do when nobody else uses it for a moment.
    let most = |values: Vec<f64>| values.into_iter().fold(0.0, f64::max);
    let best_once = most(peers.iter().map(|peer| peer.0).collect());
    println!(
        "| {gib} GiB, medians of {runs} | GB/s | of iperf3 | best once, of iperf3's best | CPU s/GiB (source + destination) | downtime ms |"
    );
    println!("| --- | --- | --- | --- | --- | --- |");
    println!(
        "| iperf3 -l 1M, one stream | {best:.2} | 1.00 | {best_once:.2}, 1.00 | {:.2} | |",
        median(peers.iter().map(|peer| peer.1).collect())
    );
    for ((lanes, plaintext), reports) in cases.iter().zip(&reports) {
        let rates: Vec<f64> = reports.iter().map(|report| (gib << 30) as f64 / (report.round_list[0].ms / 1e3) / 1e9).collect();
        let (once, rate) = (most(rates.clone()), median(rates));
        let per_gib = |part: fn(&Report) -> f64| median(reports.iter().map(|report| part(report) / gib as f64).collect());
        let downtime = median(reports.iter().map(|report| report.downtime_ms.unwrap()).collect());
        println!(
            "| {lanes} {} | {rate:.2} | {:.2} | {once:.2}, {:.2} | {:.2} + {:.2} | {downtime:.2} |",
            if *plaintext { "plaintext" } else { "TLS" },
            rate / best,
            once / best_once,
            per_gib(|report| report.cpu_seconds.source),
            per_gib(|report| report.cpu_seconds.destination),
        );
    }
}
