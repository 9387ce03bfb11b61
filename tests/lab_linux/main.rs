//! Stock Linux guests, Debian's kernel with several vCPUs, disks on shared storage and open TCP connections, move between the two
//! machines of the soft-RoCE lab, whose processors differ; peers outside of both see no more than a blink. One lab serves
//! all steps, for a boot takes its time there. `LIMOSA_LAB_STEPS=boots,moves` runs some of them, `LIMOSA_LAB_TIMES=20` more moves.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::print_stdout, missing_docs)]
#![forbid(unsafe_code)]

mod idle;

use rig::linux::disk::{DiskState, examine};
use rig::linux::outside::{Pings, Transfer, Way, tcp_counter};
use rig::linux::share::{SHARED, share};
use rig::linux::{Debian, KernelFile, LinuxBeat, LinuxGuest};
use rig::process::wait_for;
use rig::roce::{CPU_MODEL, Machines, Spec, Station, with_machines_like};
use rig::{Context, Result, bail, ensure};
use serde_json::Value;
use std::net::IpAddr;
use std::time::{Duration, Instant};

/// How often the guest goes there and back over each link.
const TIMES: usize = 1;
const LINKS: [&str; 2] = ["tcp", "rdma"];
/// What beta's processors lack of alpha's, by their names in /proc/cpuinfo, which are QEMU's too.
const LACKING: [&str; 2] = ["bmi2", "adx"];
/// Bytes a second of each transfer: well below what a nested guest of an emulated machine can do.
const RATE: u64 = 256 << 10;
/// Retransmission time-outs of all connections that one move may cost: the third comes more than a second after the first.
const TIMEOUTS_MAX: u64 = 3;
const SHORT: Duration = Duration::from_secs(60);
/// MiB at the start of the raw disk that the disk writer owns.
const DISK_MIB: usize = 1;

/// One step of the test; it leaves the lab as the next one expects it, or makes what it lacks.
type Step = fn(&Lab<'_>) -> Result<()>;

/// A lab with an agent on each machine and storage that both see.
struct Lab<'a> {
    machines: &'a Machines,
    alpha: Station<'a>,
    beta: Station<'a>,
}

#[test]
fn stock_linux_guests_boot_and_move_and_nobody_notices() {
    let like = |spec| {
        // The machines see the outer machine's files as if nobody wrote to them: so before they boot.
        for debian in [Debian::Bookworm, Debian::Trixie] {
            rig::linux::image::images(debian)?;
        }
        let less = LACKING.iter().fold(CPU_MODEL.to_owned(), |model, feature| format!("{model},-{feature}"));
        Ok(Spec { cpus: 1, cpu_models: [CPU_MODEL.into(), less], limit_seconds: 3600, ..spec })
    };
    with_machines_like(like, |machines| {
        share(machines)?;
        let storage = format!("[storage]\nshared = [\"{SHARED}\"]\n");
        machines.alpha().shell("ip link add br9 type bridge && ip link set br9 up", SHORT)?;
        let more_alpha = format!("[[network]]\nname = \"dmz\"\nbridge = \"br9\"\n{storage}");
        let [alpha, beta] = Station::pair(machines.alpha(), machines.beta(), [&more_alpha, &storage])?;
        let lab = Lab { machines, alpha, beta };
        let steps: [(&str, Step); 7] = [
            ("boots", boots_both_kernel_files),
            ("idle", idle::moves_and_nobody_notices),
            ("refusals", is_refused_with_every_reason),
            ("moves", goes_there_and_back_under_load),
            ("saves", is_saved_and_restored_elsewhere),
            ("kill-destination", outlives_the_destination_vmm),
            ("kill-source", leaves_a_clean_disk_when_killed),
        ];
        let wanted = std::env::var("LIMOSA_LAB_STEPS").ok();
        let wanted = |name: &str| wanted.as_ref().is_none_or(|list| list.split(',').any(|word| word == name));
        for (name, step) in steps.into_iter().filter(|(name, _)| wanted(name)) {
            let start = Instant::now();
            step(&lab).with_context(|| format!("step {name}"))?;
            println!("== {name}: {:.0} s", start.elapsed().as_secs_f64());
        }
        Ok(())
    });
}

/// Both files of both Debians' kernels, one vCPU and two, two guests at a time: user space, the virtio drivers, a clean log.
fn boots_both_kernel_files(lab: &Lab<'_>) -> Result<()> {
    let two = LinuxGuest::new("pvh", 2).vcpus(2);
    let newer = LinuxGuest::new("newer", 3).debian(Debian::Trixie).vcpus(2);
    let newer_plain = LinuxGuest::new("newer-plain", 4).debian(Debian::Trixie).kernel(KernelFile::BzImage);
    for pair in [[newer_plain, newer], [plain(), two]] {
        let start = Instant::now();
        let stations = [&lab.alpha, &lab.beta];
        for (station, guest) in stations.iter().zip(&pair) {
            station.start_linux(guest)?;
        }
        for (station, guest) in stations.iter().zip(&pair) {
            has_booted(station, guest, start)?;
        }
        for (station, guest) in stations.iter().zip(&pair).filter(|(_, guest)| guest.name != "plain") {
            station.ask(&["vm", "stop", &guest.name])?;
        }
    }
    Ok(())
}

fn has_booted(station: &Station<'_>, guest: &LinuxGuest, start: Instant) -> Result<()> {
    let beat = station.wait_linux(&guest.name)?;
    let serial = station.serial(&guest.name);
    let release =
        serial.split_once("limosa-linux ready kernel=").and_then(|(_, rest)| rest.split(' ').next()).unwrap_or_default();
    println!(
        "{}, Linux {release} as {:?}, {} vCPUs: user space after {:.0} s of its own time, {:.0} s in all",
        guest.name,
        guest.kernel,
        guest.vcpus,
        beat.get("up_ms") as f64 / 1000.0,
        start.elapsed().as_secs_f64()
    );
    ensure!(release == rig::linux::image::images(guest.debian)?.release, "{release} has booted");
    ensure!(serial.contains(&format!("cpus={}", guest.vcpus)), "{serial}");
    let drivers = serial.lines().find_map(|line| line.split_once("virtio=")).map(|(_, rest)| rest).unwrap_or_default();
    for driver in ["virtio_net", "virtio_rng", "virtio_balloon"] {
        ensure!(drivers.contains(driver), "no driver took a {driver}: {drivers}");
    }
    ensure!(drivers.contains("clocksource=kvm-clock"), "{drivers}");
    station.linux_lives(&guest.name, &beat)?;
    Ok(())
}

/// A guest of alpha's full processor on a network of alpha's own.
fn plain() -> LinuxGuest {
    let guest = LinuxGuest::new("plain", 1).kernel(KernelFile::BzImage);
    LinuxGuest { network: "dmz".into(), ..guest }
}

/// One check names all that is in the way; the migration is refused alike, nothing is made, and the guest runs on.
fn is_refused_with_every_reason(lab: &Lab<'_>) -> Result<()> {
    let beat = up(&lab.alpha, &plain())?;
    for words in [["check", "plain", "--to", "beta"], ["migrate", "plain", "--to", "beta"]] {
        let answer = lab.alpha.limosa(&words)?;
        answer.expect(1, &[LACKING[0], LACKING[1], "dmz", "lan"]).with_context(|| words.join(" "))?;
        println!("limosa {}: {}{}", words.join(" "), answer.text, answer.errors);
    }
    ensure!(lab.beta.vmms("plain")?.is_empty(), "a VMM was made for a refused guest");
    lab.alpha.linux_lives("plain", &beat)?;
    same_mac_twice(lab)?;
    lab.alpha.ask(&["vm", "stop", "plain"])?;
    Ok(())
}

/// A guest whose MAC address another one has: not started beside it, not let in where it is.
fn same_mac_twice(lab: &Lab<'_>) -> Result<()> {
    let guest = LinuxGuest::new("first", 7).setting("cpu = \"minimum\"");
    lab.alpha.start_linux(&guest)?;
    let images = rig::linux::image::images(guest.debian)?;
    let twin = LinuxGuest { name: "second".into(), ..guest.clone() };
    lab.alpha.start_text("second", &twin.text(&images))?.expect(1, &[&guest.mac(), "first"])?;
    ensure!(lab.alpha.vmms("second")?.is_empty(), "a VMM is left of a guest that was refused");
    lab.beta.start_linux(&twin)?;
    for words in [["check", "first", "--to", "beta"], ["migrate", "first", "--to", "beta"]] {
        lab.alpha.limosa(&words)?.expect(1, &[&guest.mac(), "second"])?;
    }
    lab.alpha.ask(&["vm", "stop", "first"])?;
    lab.beta.ask(&["vm", "stop", "second"])?;
    Ok(())
}

/// The guest that moves: two vCPUs, what both processors have, a raw disk and a file system in a qcow2, writers on all of it.
fn worker() -> LinuxGuest {
    LinuxGuest::new("worker", 9)
        .vcpus(2)
        .setting("cpu = { common = [\"alpha\", \"beta\"] }")
        .disk(&format!("{SHARED}/raw.img"), "raw")
        .disk(&format!("{SHARED}/files.qcow2"), "qcow2")
        .word("lt.disk=/dev/vda")
        .word(&format!("lt.disk_mib={DISK_MIB}"))
        .word("lt.disk_rate=20")
        .word("lt.fs=/dev/vdb")
        .word("lt.files=/mnt")
}

fn make_images(lab: &Lab<'_>) -> Result<()> {
    let line = format!(
        "cd {SHARED} && [ -e files.qcow2 ] || {{ truncate -s 8M raw.img && truncate -s 32M files.raw && mkfs.ext4 -q -F files.raw \
         && qemu-img convert -f raw -O qcow2 files.raw files.qcow2 && rm files.raw; }}"
    );
    lab.machines.alpha().shell(&line, SHORT)?;
    Ok(())
}

/// Makes sure that a guest is up on this machine.
fn up(station: &Station<'_>, guest: &LinuxGuest) -> Result<LinuxBeat> {
    if station.vmms(&guest.name)?.is_empty() {
        station.start_linux(guest)?;
    }
    station.wait_linux(&guest.name)
}

/// Over tcp and rdma, with writers in memory and on disks, transfers in both directions and pings from outside.
fn goes_there_and_back_under_load(lab: &Lab<'_>) -> Result<()> {
    make_images(lab)?;
    let guest = worker();
    let mut beat = up(&lab.alpha, &guest)?;
    lab.alpha.limosa(&["check", "worker", "--to", "beta"])?.expect(0, &[])?;
    let outside = lab.machines.ready().name.as_str();
    let ip = IpAddr::V4(guest.ip());
    let timeouts_before = (tcp_counter(outside, "TCPTimeouts")?, beat.get("tcp_timeouts"));
    let pings = Pings::start(outside, ip, &lab.machines.ready().folder)?;
    let transfers = [Way::FromGuest, Way::ToGuest].map(|way| Transfer::start(outside, ip, way, RATE));
    let [from_guest, to_guest] = transfers;
    let (from_guest, to_guest) = (from_guest?, to_guest?);
    wait_for(SHORT, "both transfers to begin", || Ok((from_guest.bytes() > 0 && to_guest.bytes() > 0).then_some(())))?;
    std::thread::sleep(Duration::from_secs(5));
    println!("before the first move: {:?}", pings.so_far()?);
    let mut moves = 0u64;
    times_back_and_forth(lab, |round, link, from, to| {
        let moved = (from_guest.bytes(), to_guest.bytes());
        let report = from.migrate("worker", to, &["--link", link])?;
        ensure!(report["link"] == link, "{report}");
        tell(&format!("{round} {} -> {}", from.machine.name, to.machine.name), &report, pings.so_far()?.slowest_ms);
        beat = to.linux_lives("worker", &beat)?;
        ensure!(from.vmms("worker")?.is_empty(), "the source still has a VMM");
        let on = || Ok((from_guest.bytes() > moved.0 && to_guest.bytes() > moved.1).then_some(()));
        wait_for(SHORT, "both transfers to go on", on)?;
        moves += 1;
        Ok(())
    })?;
    let walks = beat.get("mem_walks");
    beat = verified(&lab.alpha, &beat, walks)?;
    let (out, into, pings) = (from_guest.finish()?, to_guest.finish()?, pings.finish()?);
    let timeouts = (tcp_counter(outside, "TCPTimeouts")? - timeouts_before.0, beat.get("tcp_timeouts") - timeouts_before.1);
    println!(
        "{} moves: pings {} sent, {} answered, {} never ({:?}), {} late, slowest {} ms; from the guest {} bytes, longest stall {} ms; to the guest \
         {} bytes, longest stall {} ms; retransmission time-outs outside {}, inside {}; the guest's longest gap {} ms; {} memory pages, \
         {} disk blocks, {} files written",
        moves,
        pings.sent,
        pings.answered,
        pings.lost.len(),
        pings.lost,
        pings.late.len(),
        pings.slowest_ms,
        out.bytes,
        out.stall.as_millis(),
        into.bytes,
        into.stall.as_millis(),
        timeouts.0,
        timeouts.1,
        beat.get("gap_ms_max"),
        beat.get("mem_written"),
        beat.get("disk_seq"),
        beat.get("files"),
    );
    let most = TIMEOUTS_MAX * moves;
    ensure!(timeouts.0 <= most && timeouts.1 <= most, "retransmission time-outs: {timeouts:?}, at most {most}");
    ensure!(pings.lost.is_empty(), "pings {:?} of {} were never answered", pings.lost, pings.sent);
    // A guest that works as hard as it can under two layers of emulation answers late at times, moved or not: that is printed.
    Ok(())
}

/// There and back over each link, as often as is asked for.
fn times_back_and_forth(lab: &Lab<'_>, mut go: impl FnMut(usize, &str, &Station<'_>, &Station<'_>) -> Result<()>) -> Result<()> {
    let times = std::env::var("LIMOSA_LAB_TIMES").ok().and_then(|text| text.parse().ok()).unwrap_or(TIMES);
    for round in 1..=times {
        for link in LINKS {
            for (from, to) in [(&lab.alpha, &lab.beta), (&lab.beta, &lab.alpha)] {
                go(round, link, from, to)?;
            }
        }
    }
    Ok(())
}

fn tell(what: &str, report: &Value, slowest_ms: f64) {
    println!(
        "{what} over {}: {} ms in all, downtime {} ms, network gap {} ms, {} bytes, rounds {}; slowest ping so far {slowest_ms} ms",
        report["link"],
        report["total_ms"],
        report["downtime_ms"],
        report["network_gap_ms"],
        report["bytes_on_wire"],
        report["rounds"]
    );
}

/// Waits until the guest's writers have been over all that is theirs once more.
fn verified(station: &Station<'_>, before: &LinuxBeat, walks: u64) -> Result<LinuxBeat> {
    let mut beat = before.clone();
    for _ in 0..60 {
        beat = station.linux_lives("worker", &beat)?;
        if beat.get("mem_walks") > walks && beat.get("disk_walks") > before.get("disk_walks") {
            return Ok(beat);
        }
    }
    bail!("the guest's writers do not get round: {beat:?}")
}

/// A snapshot made on alpha goes on on beta, with its memory, its disks and its clock.
fn is_saved_and_restored_elsewhere(lab: &Lab<'_>) -> Result<()> {
    make_images(lab)?;
    let before = up(&lab.alpha, &worker())?;
    let file = format!("{SHARED}/worker.snapshot");
    lab.alpha.ask(&["vm", "save", "worker", "--to", &file])?;
    wait_for(SHORT, "the saved guest's VMM to end", || Ok(lab.alpha.vmms("worker")?.is_empty().then_some(())))?;
    lab.beta.ask(&["vm", "restore", &file])?;
    let after = lab.beta.linux_lives("worker", &before)?;
    println!("saved and restored: heartbeat {} on alpha, {} on beta", before.n(), after.n());
    lab.beta.migrate("worker", &lab.alpha, &["--link", "tcp"])?;
    lab.alpha.linux_lives("worker", &after)?;
    Ok(())
}

/// The destination's VMM is killed in mid-round: the guest runs on where it is, with its disks; the next migration works.
fn outlives_the_destination_vmm(lab: &Lab<'_>) -> Result<()> {
    make_images(lab)?;
    let before = up(&lab.alpha, &worker())?;
    let mut moving = lab.alpha.migrate_slowly("worker", &lab.beta, "tcp")?;
    lab.beta.kill_vmm("worker")?;
    let ended = moving.wait(SHORT)?;
    ensure!(ended.status() == 3, "exit {}: {}\n{}", ended.status(), ended.text(), ended.errors());
    let beat = lab.alpha.linux_lives("worker", &before)?;
    images_are_locked_for(lab)?;
    lab.alpha.migrate("worker", &lab.beta, &["--link", "rdma"])?;
    let beat = lab.beta.linux_lives("worker", &beat)?;
    images_are_locked_for(lab)?;
    lab.beta.migrate("worker", &lab.alpha, &["--link", "tcp"])?;
    lab.alpha.linux_lives("worker", &beat)?;
    Ok(())
}

/// On both machines QEMU, which knows the same locks, may not have the images.
fn images_are_locked_for(lab: &Lab<'_>) -> Result<()> {
    for station in [&lab.alpha, &lab.beta] {
        for (image, format) in [("raw.img", "raw"), ("files.qcow2", "qcow2")] {
            // `qemu-img info` reads nothing of a raw image, and so asks for no lock.
            let words = ["qemu-io", "-r", "-f", format, "-c", "read 0 512", &format!("{SHARED}/{image}")];
            let output = station.machine.run(&words, SHORT)?;
            ensure!(
                !output.ok() && output.errors().contains("lock"),
                "{image} is not locked: {} {}",
                output.text(),
                output.errors()
            );
        }
    }
    Ok(())
}

/// The source's VMM is killed in mid-round while the disks are written: nobody runs, nobody holds the images, they are whole, all that
/// the guest was told is written is there, and the guest starts from them on the other machine.
fn leaves_a_clean_disk_when_killed(lab: &Lab<'_>) -> Result<()> {
    make_images(lab)?;
    let before = up(&lab.alpha, &worker())?;
    let mut moving = lab.alpha.migrate_slowly("worker", &lab.beta, "tcp")?;
    let told = lab.alpha.linux_lives("worker", &before)?.get("disk_seq");
    lab.alpha.kill_vmm("worker")?;
    let ended = moving.wait(SHORT)?;
    ensure!(!ended.ok(), "a migration without a source went well: {}", ended.text());
    let nobody = || Ok((lab.alpha.vmms("worker")?.is_empty() && lab.beta.vmms("worker")?.is_empty()).then_some(()));
    wait_for(SHORT, "no VMM of the guest anywhere", nobody)?;
    let state = examine_images(lab)?;
    println!("killed in mid-round: the guest had been told of writing {told}, the disk has {state:?}");
    ensure!(state.seq >= told && state.torn <= 1, "the guest was told of writing {told}, the disk has {state:?}");
    lab.beta.start_linux(&worker())?;
    // The console still has what the guest said here before: only what follows its look at the disk is the new guest's.
    let looked = || {
        let serial = lab.beta.serial("worker");
        let since =
            serial.rsplit_once(&format!("seq={}\n", state.seq)).or_else(|| serial.rsplit_once(&format!("seq={}\r", state.seq)));
        Ok(since.filter(|(_, after)| after.contains("heartbeat n=")).map(drop))
    };
    wait_for(Duration::from_secs(240), "the guest to find on its disk what is there", looked)
        .with_context(|| format!("{state:?}: {}", lab.beta.serial("worker")))?;
    let beat = lab.beta.wait_linux("worker")?;
    lab.beta.linux_lives("worker", &beat)?;
    lab.beta.ask(&["vm", "stop", "worker"])?;
    examine_images(lab)?;
    Ok(())
}

/// The images as somebody finds them who may have them: the qcow2's tables, the file system after its journal, the blocks.
fn examine_images(lab: &Lab<'_>) -> Result<DiskState> {
    let line = format!(
        "cd {SHARED} && qemu-img check files.qcow2 && qemu-img convert -O raw files.qcow2 /tmp/files.raw && \
         e2fsck -E journal_only -p /tmp/files.raw; [ $? -le 1 ] && e2fsck -fn /tmp/files.raw && rm /tmp/files.raw"
    );
    lab.machines.beta().shell(&line, SHORT)?;
    let disk = lab.machines.beta().run(&["head", "-c", &(DISK_MIB << 20).to_string(), &format!("{SHARED}/raw.img")], SHORT)?;
    examine(&disk.expect_ok()?.stdout, DISK_MIB)
}
