//! Promises kept with Limosa's own guest (tests/guest): both kinds of image, paging, a TAP on a bridge, moves under load.
#![allow(clippy::unwrap_used, clippy::panic, clippy::print_stdout, clippy::indexing_slicing)]

mod rig;

use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use limosa_machine::{BootConfig, Machine, MachineConfig, MemoryConfig, NicConfig, PageSize, Populate, SerialSink, TapConfig};
use rig::{config, fill, has_kvm, memory};

/// A serial port's output, kept.
#[derive(Clone, Default)]
struct Kept(Arc<Mutex<Vec<u8>>>);

impl Write for Kept {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        self.0.lock().unwrap().extend(bytes);
        Ok(bytes.len())
    }
    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

impl Kept {
    fn text(&self) -> String {
        String::from_utf8_lossy(&self.0.lock().unwrap()).into_owned()
    }

    fn wait_for(&self, machine: &Machine, words: &str, times: usize) {
        let deadline = Instant::now() + Duration::from_secs(30);
        while self.text().matches(words).count() < times {
            let text = self.text();
            assert!(!text.contains("ERROR"), "{text}");
            assert!(Instant::now() < deadline, "no {words:?} in {text:?}; {:?}", machine.events().try_recv());
            std::thread::sleep(Duration::from_millis(2));
        }
    }
}

/// Builds the guest; `None`, said aloud, if its sources are not there.
fn images() -> Option<(tempfile::TempDir, PathBuf, PathBuf)> {
    if !has_kvm() {
        return None;
    }
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/guest/build.sh");
    if !script.exists() {
        assert!(std::env::var_os("LIMOSA_DEMAND_ALL").is_none_or(|value| value != "1"), "the guest is demanded");
        println!("skipped: no tests/guest/build.sh");
        return None;
    }
    let dir = tempfile::tempdir().unwrap();
    let output = Command::new("sh").arg(script).arg(dir.path()).output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let (elf, bzimage) = (dir.path().join("limosa-guest.elf"), dir.path().join("limosa-guest.bzimage"));
    Some((dir, elf, bzimage))
}

fn boot(kernel: &Path, cmdline: &str, mut config: MachineConfig) -> (Machine, Kept) {
    let kept = Kept::default();
    config.serial = SerialSink::Writer(Box::new(kept.clone()));
    let machine = Machine::new(config).unwrap();
    machine
        .boot(&BootConfig {
            kernel: kernel.to_owned(),
            initramfs: None,
            cmdline: format!("{cmdline} virtio_mmio.device=4K@0xd0000000:5"),
        })
        .unwrap();
    machine.resume().unwrap();
    (machine, kept)
}

#[test]
fn both_images_boot_and_answer_on_the_serial_port() {
    let Some((_dir, elf, bzimage)) = images() else { return };
    for kernel in [elf, bzimage] {
        let (machine, kept) = boot(&kernel, "ws=1M dirty=1M heartbeat=50", config(1, 64));
        kept.wait_for(&machine, "limosa-guest ready", 1);
        kept.wait_for(&machine, "\n", 4);
        assert_eq!(machine.serial_input(b"q"), 1);
        let event = machine.events().recv_timeout(Duration::from_secs(10));
        assert!(event.is_some(), "the guest ends on q: {}", kept.text());
    }
}

/// The figure `name=` of the last whole heartbeat line.
fn figure(text: &str, name: &str) -> i64 {
    let whole = text.rfind('\n').map_or("", |end| &text[..end]);
    let line = whole.lines().rev().find(|line| line.contains("heartbeat")).unwrap_or_default();
    let field = line.split(' ').find_map(|field| field.strip_prefix(name).and_then(|rest| rest.strip_prefix('=')));
    field.and_then(|value| value.parse().ok()).unwrap_or_else(|| panic!("no {name} in {line:?}"))
}

#[test]
fn the_guest_verifies_itself_through_10_moves() {
    let Some((_dir, elf, _)) = images() else { return };
    let (mut machine, mut kept) = boot(&elf, "ws=4M dirty=100M fill=16M heartbeat=20", config(1, 64));
    kept.wait_for(&machine, "limosa-guest ready", 1);
    kept.wait_for(&machine, "heartbeat", 2);
    let (start, up_start, clock_start) = (Instant::now(), figure(&kept.text(), "up_us"), figure(&kept.text(), "kvmclock_ns"));
    for _ in 0..10 {
        machine.pause().unwrap();
        let records = machine.save().unwrap();
        kept = Kept::default();
        let sink = SerialSink::Writer(Box::new(kept.clone()));
        let destination = Machine::new(MachineConfig { serial: sink, ..config(1, 64) }).unwrap();
        fill(&destination, &memory(&machine));
        drop(machine);
        std::thread::sleep(Duration::from_millis(150));
        destination.load(records).unwrap();
        destination.resume().unwrap();
        machine = destination;
        // The first line may be the rest of one that the source began.
        kept.wait_for(&machine, "limosa-guest heartbeat", 3);
    }
    let (text, wall_ms) = (kept.text(), start.elapsed().as_millis() as i64);
    let up_ms = (figure(&text, "up_us") - up_start) / 1000;
    let clock_ms = (figure(&text, "kvmclock_ns") - clock_start) / 1_000_000;
    println!("after 10 moves: wall {wall_ms} ms, TSC {up_ms} ms, kvmclock {clock_ms} ms");
    assert_eq!((figure(&text, "errors"), figure(&text, "backwards")), (0, 0), "{text}");
    // Both clocks count the time away. The guest's heartbeats are 20 ms apart, and it gauges its TSC only roughly.
    for (clock, ms) in [("TSC", up_ms), ("kvmclock", clock_ms)] {
        assert!((ms - wall_ms).abs() < 100 + wall_ms / 10, "{clock} went {ms} ms in {wall_ms} ms");
    }
    assert!(figure(&text, "gap_us_max") > 140_000, "the guest sees the gap");
}

/// A network namespace with a bridge, gone when this is dropped. Its name is taken from the process and a counter.
struct Namespace(String);

impl Namespace {
    fn new() -> Option<Self> {
        static COUNTER: AtomicU32 = AtomicU32::new(0);
        let name = format!("lmach{}x{}", std::process::id(), COUNTER.fetch_add(1, Ordering::Relaxed));
        let made = Command::new("ip").args(["netns", "add", &name]).output();
        if !made.is_ok_and(|output| output.status.success()) {
            assert!(std::env::var_os("LIMOSA_DEMAND_ALL").is_none_or(|value| value != "1"), "namespaces are demanded");
            println!("skipped: no network namespaces");
            return None;
        }
        let namespace = Self(name);
        namespace.ip(&["link", "add", "br0", "type", "bridge"]);
        namespace.ip(&["addr", "add", "10.9.8.1/24", "dev", "br0"]);
        namespace.ip(&["link", "set", "br0", "up"]);
        Some(namespace)
    }

    fn ip(&self, args: &[&str]) {
        let output = Command::new("ip").args(["-n", &self.0]).args(args).output().unwrap();
        assert!(output.status.success(), "ip {args:?}: {}", String::from_utf8_lossy(&output.stderr));
    }

    /// Puts this thread, and those that it will start, into the namespace.
    fn enter(&self) {
        let file = std::fs::File::open(format!("/run/netns/{}", self.0)).unwrap();
        nix::sched::setns(file, nix::sched::CloneFlags::CLONE_NEWNET).unwrap();
    }
}

impl Drop for Namespace {
    fn drop(&mut self) {
        let _ = Command::new("ip").args(["netns", "delete", &self.0]).output();
    }
}

fn nic(name: &str) -> NicConfig {
    let tap = TapConfig::Name { name: name.to_owned(), bridge: Some("br0".to_owned()) };
    NicConfig { mac: [2, 0, 0, 9, 8, 2], tap, mtu: 1500, offload: true }
}

/// Sends datagrams to the guest's UDP echo until `wanted` came back, and returns how many were sent.
fn echo(socket: &std::net::UdpSocket, wanted: usize) -> usize {
    let mut back = 0;
    for sent in 1..=200 {
        let payload = [sent as u8; 700];
        socket.send(&payload).unwrap();
        let mut buffer = [0; 2000];
        if let Ok(bytes) = socket.recv(&mut buffer) {
            assert_eq!(bytes, payload.len());
            back += 1;
        }
        if back == wanted {
            return sent;
        }
    }
    panic!("only {back} of {wanted} echoes came back")
}

#[test]
fn the_guest_answers_over_a_tap_before_and_after_a_move() {
    let Some((_dir, elf, _)) = images() else { return };
    let Some(namespace) = Namespace::new() else { return };
    // In a thread of its own, which enters the namespace and ends with it.
    let outcome = std::thread::scope(|scope| {
        let talk = scope.spawn(|| {
            namespace.enter();
            let with_nic = |tap| MachineConfig { nics: vec![nic(tap)], ..config(1, 64) };
            let (machine, kept) = boot(&elf, "ws=1M dirty=0 ip=10.9.8.2 heartbeat=100", with_nic("tapa"));
            kept.wait_for(&machine, "limosa-guest ready", 1);
            let socket = std::net::UdpSocket::bind("10.9.8.1:0").unwrap();
            socket.connect("10.9.8.2:7").unwrap();
            socket.set_read_timeout(Some(Duration::from_millis(200))).unwrap();
            println!("before: 20 echoes of {} datagrams", echo(&socket, 20));
            let destination = Machine::new(with_nic("tapb")).unwrap();
            machine.pause().unwrap();
            let records = machine.save().unwrap();
            fill(&destination, &memory(&machine));
            machine.stop();
            destination.load(records).unwrap();
            destination.resume().unwrap();
            println!("after: 20 echoes of {} datagrams", echo(&socket, 20));
        });
        talk.join()
    });
    assert!(outcome.is_ok());
    let left = Command::new("ip").args(["-n", &namespace.0, "-o", "link"]).output().unwrap();
    let left = String::from_utf8_lossy(&left.stdout).into_owned();
    assert!(!left.contains("tapa") && !left.contains("tapb"), "TAPs are gone with their machines: {left}");
}

/// What a guest of 64 MiB needs.
const HUGE_PAGES: u64 = 32;
const NR_HUGEPAGES: &str = "/proc/sys/vm/nr_hugepages";

fn number_in(path: &str) -> u64 {
    std::fs::read_to_string(path).ok().and_then(|text| text.trim().parse().ok()).unwrap_or(0)
}

fn free_huge_pages() -> u64 {
    number_in("/sys/kernel/mm/hugepages/hugepages-2048kB/free_hugepages")
}

/// Huge pages reserved for one test and given back at its end.
struct Reserved;

impl Reserved {
    fn new() -> Option<Reserved> {
        std::fs::write(NR_HUGEPAGES, (number_in(NR_HUGEPAGES) + HUGE_PAGES).to_string()).ok()?;
        let reserved = Reserved;
        (free_huge_pages() >= HUGE_PAGES).then_some(reserved)
    }
}

impl Drop for Reserved {
    fn drop(&mut self) {
        let _ = std::fs::write(NR_HUGEPAGES, number_in(NR_HUGEPAGES).saturating_sub(HUGE_PAGES).to_string());
    }
}

#[test]
fn a_guest_runs_on_huge_pages_if_there_are_any() {
    let Some((_dir, elf, _)) = images() else { return };
    let memory = MemoryConfig { page_size: PageSize::Huge2M, populate: Populate::Now, ..MemoryConfig::new(64 << 20) };
    if free_huge_pages() < HUGE_PAGES {
        let error = Machine::new(MachineConfig::new(1, memory)).unwrap_err().to_string();
        assert!(error.contains("nr_hugepages"), "{error}");
    }
    let Some(_reserved) = Reserved::new() else {
        assert!(std::env::var_os("LIMOSA_DEMAND_ALL").is_none_or(|value| value != "1"), "huge pages are demanded");
        println!("skipped: {HUGE_PAGES} huge pages cannot be reserved; only the refusal was checked");
        return;
    };
    let (machine, kept) = boot(&elf, "ws=4M dirty=max heartbeat=20", MachineConfig::new(1, memory));
    kept.wait_for(&machine, "limosa-guest ready", 1);
    machine.start_dirty_tracking().unwrap();
    std::thread::sleep(Duration::from_millis(100));
    let mut pages = 0;
    machine.fetch_dirty(&mut |_, _, words| pages = words.iter().map(|word| word.count_ones()).sum()).unwrap();
    assert!((10..4096).contains(&pages), "{pages} pages: tracked in 4 KiB, not in huge pages");
}
