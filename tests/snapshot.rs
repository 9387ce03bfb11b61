//! Guests that stand still: paused by their operators, moved at once, saved into files and restored from them; and the
//! snapshot of an earlier release, which every later one restores.
#![allow(clippy::panic, clippy::unwrap_used, clippy::expect_used, missing_docs, unreachable_pub)]

use limosa_proto::cpu::CpuProfile;
use limosa_proto::snapshot::{HEAD_BYTES, Piece, Reader, SECTION_BYTES, Writer};
use rig::command::Output;
use rig::process::wait_for;
use rig::{AgentConfig, Context, GuestSpec, Host, Lab, Result, bail, ensure, with_bare_lab, with_lab};
use serde_json::Value;
use std::path::{Path, PathBuf};
use std::time::Duration;

/// The snapshots that `the_committed_snapshots_are_made` writes, each with its guest's `cpu`: of a guest with all of a CPU, which
/// only a host with as much restores, and of one with as little as every host has.
const COMMITTED: [(&str, &str); 2] = [("release-0.1.snapshot", "host"), ("release-0.1-minimum.snapshot", "minimum")];

fn committed(name: &str) -> PathBuf {
    Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/tests/records")).join(name)
}

fn state(host: &Host, guest: &str) -> Result<String> {
    let vm = host.ask(&["vm", "show", guest])?;
    Ok(vm["state"].as_str().context("no state")?.to_owned())
}

/// Fails unless the guest stands still here: it says nothing for a while, and the agent says "paused".
fn stands_still(host: &Host, guest: &str) -> Result<()> {
    ensure!(state(host, guest)? == "paused", "{guest} is {}", state(host, guest)?);
    // What it printed before may still be on its way into the log.
    std::thread::sleep(Duration::from_millis(200));
    let before = host.beats(guest).len();
    std::thread::sleep(Duration::from_millis(500));
    ensure!(host.beats(guest).len() == before, "a paused guest speaks");
    Ok(())
}

fn text(path: &Path) -> String {
    path.to_string_lossy().into_owned()
}

fn save(host: &Host, guest: &str, file: &Path, more: &[&str]) -> Result<Output> {
    let file = text(file);
    let mut words = vec!["--json", "vm", "save", guest, "--to", &file];
    words.extend(more);
    host.limosa(&words)
}

fn restore(host: &Host, file: &Path, more: &[&str]) -> Result<Output> {
    let file = text(file);
    let mut words = vec!["--json", "vm", "restore", &file];
    words.extend(more);
    host.limosa(&words)
}

fn lives_and_answers(lab: &Lab, host: &Host, guest: &GuestSpec) -> Result<()> {
    host.guest_verified(&guest.name, 1)?;
    lab.wait_reachable(guest)
}

#[test]
fn what_an_operator_paused_stays_paused_when_the_agent_is_restarted() {
    with_lab(AgentConfig::default(), |lab| {
        let guest = GuestSpec::new("web", 1);
        lab.guest(&guest)?;
        lab.a.limosa(&["vm", "pause", "web"])?.expect_code(0)?;
        stands_still(&lab.a, "web")?;
        lab.a.limosa(&["vm", "pause", "web"])?.expect_code(0)?.expect_words("already")?;
        lab.a.kill_agent()?;
        lab.a.restart_agent()?;
        lab.a.wait_knows("web", true)?;
        stands_still(&lab.a, "web").context("after the agent was killed")?;
        lab.a.limosa(&["vm", "resume", "web"])?.expect_code(0)?;
        lives_and_answers(lab, &lab.a, &guest)?;
        lab.a.limosa(&["vm", "resume", "web"])?.expect_code(0)?.expect_words("already")?;
        lab.good_migration(&guest)
    });
}

#[test]
fn a_paused_guest_moves_and_stays_paused() {
    with_lab(AgentConfig::default(), |lab| {
        let guest = GuestSpec::new("web", 1).dirty("20M", "16M");
        lab.guest(&guest)?;
        lab.a.limosa(&["vm", "pause", "web"])?.expect_code(0)?;
        let report = lab.a.migrate_well("web", &lab.b, &[])?;
        ensure!(report["paused"] == true && report["downtime_ms"].is_null() && report["guest_runs"] == false, "{report}");
        ensure!(report["rounds"] == 1 && report["announcements"] == serde_json::json!([]), "{report}");
        stands_still(&lab.b, "web")?;
        lab.settled(&lab.a, 0)?;
        lab.settled(&lab.b, 1)?;
        // What its own agent forgets on the way, its VMM does not.
        lab.b.kill_agent()?;
        lab.b.restart_agent()?;
        lab.b.wait_knows("web", true)?;
        stands_still(&lab.b, "web").context("after the destination's agent was killed")?;
        lab.b.limosa(&["vm", "resume", "web"])?.expect_code(0)?;
        lives_and_answers(lab, &lab.b, &guest)?;
        ensure!(lab.port_of(&guest)?.as_deref() == Some("p-b"), "the network was not told: {:?}", lab.port_of(&guest)?);
        lab.b.migrate_well("web", &lab.a, &[])?;
        lab.guest_is_on(&guest, &lab.a, &lab.b)
    });
}

#[test]
fn a_paused_guest_whose_migration_fails_stays_paused() {
    with_lab(AgentConfig::default().migration("keepalive_ms", 500).migration("silence_max_ms", 3000), |lab| {
        let guest = GuestSpec::new("web", 1).memory("128M", "64M");
        lab.guest(&guest)?;
        lab.a.limosa(&["vm", "pause", "web"])?.expect_code(0)?;
        let mut running = lab.a.start_slow("web", &lab.b, &[])?;
        let vmms = lab.b.vmms(Some("--incoming"));
        ensure!(vmms.len() == 1, "{vmms:?}");
        rig::process::kill(vmms[0]);
        running.wait(Duration::from_secs(20))?.expect_code(3)?;
        stands_still(&lab.a, "web")?;
        lab.settled(&lab.b, 0)?;
        lab.a.limosa(&["vm", "resume", "web"])?.expect_code(0)?;
        lab.unharmed(&guest)
    });
}

#[test]
fn a_quick_guest_goes_at_once() {
    with_lab(AgentConfig::default(), |lab| {
        // Beyond what pre-copy would let go: it writes, and no downtime is allowed.
        let guest = GuestSpec::new("web", 1).dirty("20M", "16M");
        lab.guest(&guest)?;
        let plan = lab.a.ask(&["migrate", "web", "--to", "b", "--quick", "--print-plan"])?;
        ensure!(plan["quick"] == true && plan["paused"] == false, "{plan}");
        let limits = ["--quick", "--downtime", "1ms", "--downtime-max", "1ms", "--on-no-convergence", "abort"];
        let report = lab.a.migrate_well("web", &lab.b, &limits)?;
        let ms = |key: &str| report[key].as_f64().context(key.to_owned());
        ensure!(report["rounds"] == 1 && report["quick"] == true && ms("downtime_ms")? > 0.0, "{report}");
        ensure!(ms("downtime_ms")? < ms("total_ms")?, "it was paused before the destination was prepared: {report}");
        lab.guest_is_on(&guest, &lab.b, &lab.a)?;
        lab.b.guest_verified("web", 1)?;
        lab.b.migrate_well("web", &lab.a, &["--quick", "--lanes", "4"])?;
        lab.guest_is_on(&guest, &lab.a, &lab.b)
    });
}

#[test]
fn a_guest_is_saved_and_restored_here_and_elsewhere() {
    with_lab(AgentConfig::default(), |lab| {
        let guest = GuestSpec::new("web", 1).dirty("5M", "16M");
        lab.guest(&guest)?;
        lab.a.guest_verified("web", 1)?;
        let file = lab.a.file("web.snapshot");
        let saved = save(&lab.a, "web", &file, &[])?.expect_code(0)?.json()?;
        ensure!(saved["guest"] == "stopped" && saved["memory_bytes"] == 128 << 20, "{saved}");
        let bytes = saved["file_bytes"].as_u64().context("file_bytes")?;
        ensure!(bytes == std::fs::metadata(&file)?.len() && (32 << 20..64 << 20).contains(&bytes), "{saved}");
        lab.settled(&lab.a, 0)?;
        let before = lab.a.beats("web").last().cloned().context("it never spoke")?;
        restore(&lab.a, &file, &[])?.expect_code(0)?;
        let after = lab.a.guest_lives("web")?;
        ensure!(after.n > before.n && after.written >= before.written, "{before:?} {after:?}");
        lives_and_answers(lab, &lab.a, &guest)?;
        // The same guest twice is refused, as is overwriting a file.
        restore(&lab.a, &file, &[])?.expect_code(1)?.expect_words("web")?;
        save(&lab.a, "web", &file, &[])?.expect_code(1)?.expect_words("not overwritten")?;
        // Its newest agent must know whose it is, and it must be able to leave.
        lab.a.kill_agent()?;
        lab.a.restart_agent()?;
        lab.a.wait_knows("web", true)?;
        lab.a.guest_lives("web").context("after its agent was killed")?;
        lab.good_migration(&guest)?;
        // On the other host, where it was before: the journals there know it as gone.
        let second = lab.b.file("second.snapshot");
        save(&lab.b, "web", &second, &[])?.expect_code(0)?;
        let copy = lab.a.file("copied.snapshot");
        std::fs::copy(&second, &copy)?;
        restore(&lab.a, &copy, &["--paused"])?.expect_code(0)?;
        stands_still(&lab.a, "web")?;
        lab.a.kill_agent()?;
        lab.a.restart_agent()?;
        lab.a.wait_knows("web", true)?;
        stands_still(&lab.a, "web").context("restored and held, after its agent was killed")?;
        lab.a.limosa(&["vm", "resume", "web"])?.expect_code(0)?;
        lives_and_answers(lab, &lab.a, &guest)?;
        lab.good_migration(&guest)
    });
}

#[test]
fn a_guest_that_is_saved_may_run_on() {
    with_lab(AgentConfig::default(), |lab| {
        let guest = GuestSpec::new("web", 1);
        lab.guest(&guest)?;
        let file = lab.a.file("web.snapshot");
        let saved = save(&lab.a, "web", &file, &["--keep-running"])?.expect_code(0)?.json()?;
        ensure!(saved["guest"] == "runs" && saved["paused_ms"].as_f64().is_some_and(|ms| ms > 0.0), "{saved}");
        lives_and_answers(lab, &lab.a, &guest)?;
        restore(&lab.a, &file, &[])?.expect_code(1)?.expect_words("web")?;
        // Of a paused guest too, which stays so.
        lab.a.limosa(&["vm", "pause", "web"])?.expect_code(0)?;
        let held = lab.a.file("held.snapshot");
        let saved = save(&lab.a, "web", &held, &["--keep-running"])?.expect_code(0)?.json()?;
        ensure!(saved["guest"] == "paused" && saved["paused_ms"].is_null(), "{saved}");
        stands_still(&lab.a, "web")?;
        lab.a.limosa(&["vm", "resume", "web"])?.expect_code(0)?;
        let jobs = lab.a.jobs()?;
        ensure!(jobs.iter().all(|job| job["direction"] == "saving" && job["state"] == "done"), "{jobs:?}");
        lab.good_migration(&guest)
    });
}

#[test]
fn a_damaged_snapshot_is_refused_and_nothing_is_made() {
    with_lab(AgentConfig::default(), |lab| {
        let guest = GuestSpec::new("web", 1);
        lab.guest(&guest)?;
        let file = lab.a.file("web.snapshot");
        save(&lab.a, "web", &file, &[])?.expect_code(0)?;
        let good = std::fs::read(&file)?;
        let bad = lab.a.file("bad.snapshot");
        let mut flipped = good.clone();
        let middle = flipped.len() / 2;
        flipped[middle] ^= 1;
        let mut newer = good.clone();
        newer[8] = 9;
        let crc = crc_of(&newer[..12]);
        newer[12..16].copy_from_slice(&crc);
        for (bytes, words) in [
            (&good[..good.len() - 1], "cut off"),
            (&good[..good.len() / 2], "cut off"),
            (&good[..10], "no snapshot"),
            (&flipped[..], "damaged"),
            (&newer[..], "version 9"),
            (&b"just a text file, and not a short one"[..], "no snapshot"),
        ] {
            std::fs::write(&bad, bytes)?;
            restore(&lab.a, &bad, &[])?.expect_code(1)?.expect_words(words)?;
            ensure!(lab.a.guests()?.is_empty(), "{words}: {:?}", lab.a.guests()?);
            lab.settled(&lab.a, 0)?;
        }
        restore(&lab.a, &lab.a.file("none"), &[])?.expect_code(1)?.expect_words("no such file")?;
        restore(&lab.a, &file, &[])?.expect_code(0)?;
        lab.good_migration(&guest)
    });
}

/// CRC-32 (IEEE), bit by bit: enough for twelve bytes.
fn crc_of(bytes: &[u8]) -> [u8; 4] {
    let step = |crc: u32, _| if crc & 1 == 1 { crc >> 1 ^ 0xedb8_8320 } else { crc >> 1 };
    let crc = bytes.iter().fold(u32::MAX, |crc, byte| (0..8).fold(crc ^ u32::from(*byte), step));
    (!crc).to_le_bytes()
}

/// A small file system that goes with this value.
struct SmallDisk(PathBuf);

impl SmallDisk {
    fn mount(path: PathBuf, size: &str) -> Result<SmallDisk> {
        std::fs::create_dir_all(&path)?;
        rig::netns::run("mount", &["-t", "tmpfs", "-o", &format!("size={size}"), "tmpfs", &text(&path)])?;
        Ok(SmallDisk(path))
    }
}

impl Drop for SmallDisk {
    fn drop(&mut self) {
        let _ = rig::netns::run("umount", &["-l", &text(&self.0)]);
    }
}

#[test]
fn a_full_disk_leaves_the_guest_running_and_no_file() {
    with_bare_lab(|lab| {
        // Before the agent starts: it has mounts of its own.
        let disk = SmallDisk::mount(lab.a.file("small"), "8M")?;
        lab.start_agents(AgentConfig::default())?;
        let guest = GuestSpec::new("web", 1);
        lab.guest(&guest)?;
        let output = save(&lab.a, "web", &disk.0.join("web.snapshot"), &[])?.expect_code(3)?;
        output.expect_words("disk is full")?;
        let left = std::fs::read_dir(&disk.0)?.count();
        ensure!(left == 0, "{left} files are left on the full disk");
        lives_and_answers(lab, &lab.a, &guest)?;
        ensure!(state(&lab.a, "web")? == "running", "{}", state(&lab.a, "web")?);
        for (file, words) in [("/proc/web.snapshot", "creating"), ("/no/such/folder/web", "no such file or folder")] {
            save(&lab.a, "web", Path::new(file), &[])?.expect_code(1)?.expect_words(words)?;
        }
        lab.a.guest_lives("web")?;
        lab.good_migration(&guest)
    });
}

/// The guest of the committed snapshot: as little memory as it can live in.
fn small() -> GuestSpec {
    GuestSpec::new("release", 7).dirty("64K", "64K").memory("20M", "0")
}

/// The snapshot with a description that says nothing of the guest's CPU: the build machines are not all alike, not in the speed of
/// their counters either, and here it is the records that are to be read for ever. What they say of the CPU, the VMM checks.
fn without_profile(bytes: &[u8]) -> Result<Vec<u8>> {
    let head = bytes.first_chunk::<HEAD_BYTES>().context("no head")?;
    let section_head = bytes[HEAD_BYTES..].first_chunk::<SECTION_BYTES>().context("no section")?;
    let (mut reader, from) = (Reader::head(head)?, HEAD_BYTES + SECTION_BYTES);
    let section = reader.section(section_head, (bytes.len() - from) as u64)?;
    let (body, rest) = bytes[from..].split_at_checked(section.length).context("no description")?;
    let Piece::Guest(mut guest) = reader.body(section, body)? else { bail!("the first section is no guest's") };
    ensure!(!guest.vm.cpu.leaves.is_empty(), "the committed snapshot tells nothing of its CPU");
    guest.vm.cpu = CpuProfile::default();
    Ok([&Writer::head()[..], &Writer::default().guest(&guest)?, rest].concat())
}

#[test]
fn the_snapshots_of_an_earlier_release_are_restored() {
    with_lab(AgentConfig::default(), |lab| {
        let mut restored = 0;
        for (name, cpu) in COMMITTED {
            let (file, bytes) = (lab.a.file(name), std::fs::read(committed(name)).context(name)?);
            std::fs::write(&file, without_profile(&bytes)?)?;
            let output = restore(&lab.a, &file, &[])?;
            if cpu == "host" && output.code == 1 {
                // This host has less than the one that made it. The records were understood, and nothing is left of it.
                output.expect_words("the guest uses CPU features that this host lacks")?;
                ensure!(lab.a.guests()?.is_empty(), "something is left of a snapshot that was refused");
                continue;
            }
            output.expect_code(0).context(name)?;
            lives_and_answers(lab, &lab.a, &small())?;
            lab.good_migration(&small())?;
            lab.b.limosa(&["vm", "stop", "release"])?.expect_code(0)?;
            restored += 1;
        }
        ensure!(restored > 0, "none was restored");
        Ok(())
    });
}

/// Makes the committed snapshots: `cargo test --test snapshot -- --ignored the_committed_snapshots_are_made`. Once a release, those
/// that are not there yet.
#[test]
#[ignore = "writes into tests/records; run once a release, see docs/TESTING.md"]
fn the_committed_snapshots_are_made() {
    with_lab(AgentConfig::default(), |lab| {
        for (name, cpu) in COMMITTED.into_iter().filter(|(name, _)| !committed(name).exists()) {
            lab.guest(&small().cpu(&format!("{cpu:?}")))?;
            lab.a.guest_verified("release", 1)?;
            let file = lab.a.file(name);
            let saved: Value = save(&lab.a, "release", &file, &[])?.expect_code(0)?.json()?;
            let bytes = saved["file_bytes"].as_u64().context("file_bytes")?;
            ensure!(bytes < 1 << 20, "{bytes} bytes are too many for a repository: {saved}");
            std::fs::copy(&file, committed(name))?;
            wait_for(Duration::from_secs(5), "the saved guest to go", || Ok(lab.a.guests()?.is_empty().then_some(())))?;
        }
        Ok(())
    });
}
