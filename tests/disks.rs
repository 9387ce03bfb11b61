//! Guests with disks on storage that both hosts see: the proof that it is the same file before anything is sent, and who
//! holds the image's lock before, during and after the hand-over. The guest does not use its disk here: what its writes
//! come to is tested on the device (`vmm/machine`) and by Linux in the lab.
#![allow(clippy::panic, clippy::unwrap_used, clippy::expect_used, missing_docs, unreachable_pub)]

use nix::fcntl::{FcntlArg, fcntl};
use nix::libc;
use rig::process::wait_for;
use rig::{AgentConfig, Context, GuestSpec, Host, Lab, Result, ensure, with_bare_lab};
use std::fs::File;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, mpsc};
use std::time::Duration;

const PATIENCE: Duration = Duration::from_secs(10);

/// A folder for images, and a raw image in it.
fn image(lab: &Lab) -> Result<(PathBuf, PathBuf)> {
    let folder = lab.a.file("images");
    std::fs::create_dir_all(&folder)?;
    let image = folder.join("web.raw");
    File::create(&image)?.set_len(4 << 20)?;
    Ok((folder, image))
}

/// Processes that hold a lock on the image, as their fdinfo says.
fn holders(image: &Path, of: &[u32]) -> Vec<u32> {
    let inode = std::fs::metadata(image).map_or(0, |meta| meta.ino());
    let holds = |pid: &u32| {
        let files = std::fs::read_dir(format!("/proc/{pid}/fdinfo")).into_iter().flatten().flatten();
        let infos = files.map(|file| std::fs::read_to_string(file.path()).unwrap_or_default());
        infos.into_iter().any(|info| info.lines().any(|line| line.starts_with("lock:") && line.contains(&format!(":{inode} "))))
    };
    of.iter().copied().filter(holds).collect()
}

/// The one VMM of `host` holds the image, and none of the other host does.
fn held_by(image: &Path, host: &Host, other: &Host) -> Result<()> {
    let vmms = host.vmms(None);
    ensure!(
        vmms.len() == 1 && holders(image, &vmms) == vmms,
        "{}: {:?} of {vmms:?} hold the image",
        host.name,
        holders(image, &vmms)
    );
    let others = other.vmms(None);
    ensure!(holders(image, &others).is_empty(), "{}: {others:?} hold the image too", other.name);
    Ok(())
}

fn lock(file: &File, kind: i32, wait: bool) -> nix::Result<i32> {
    let lock = libc::flock { l_type: kind as i16, l_whence: 0, l_start: 100, l_len: 200, l_pid: 0 };
    fcntl(file, if wait { FcntlArg::F_OFD_SETLKW(&lock) } else { FcntlArg::F_OFD_SETLK(&lock) })
}

/// Nobody at all holds the image.
fn free(image: &Path) -> Result<()> {
    let file = File::options().read(true).write(true).open(image)?;
    wait_for(PATIENCE, "the image to be free", || Ok(lock(&file, libc::F_WRLCK, false).is_ok().then_some(())))
}

/// Nothing but images is in the folder: no mark was left.
fn no_marks(folder: &Path) -> Result<()> {
    wait_for(PATIENCE, "the marks to go", || {
        let names: Vec<_> = std::fs::read_dir(folder)?.flatten().map(|entry| entry.file_name()).collect();
        Ok(names.iter().all(|name| !name.to_string_lossy().starts_with('.')).then_some(()))
    })
}

#[test]
fn a_disk_is_held_by_one_host_at_a_time_there_and_back() {
    with_bare_lab(|lab| {
        let (folder, raw) = image(lab)?;
        lab.start_agents(AgentConfig::default().shares(&folder))?;
        let mut guest = GuestSpec::new("web", 1).dirty("2M", "16M").disk(&raw, "raw");
        let qcow2 = folder.join("data.qcow2");
        let made = Command::new("qemu-img").args(["create", "-q", "-f", "qcow2"]).arg(&qcow2).arg("64M").status();
        let with_qcow2 = made.is_ok_and(|status| status.success());
        if with_qcow2 {
            guest = guest.disk(&qcow2, "qcow2");
        } else {
            println!("no qemu-img: without a qcow2 image");
        }
        lab.guest(&guest)?;
        held_by(&raw, &lab.a, &lab.b)?;
        for (from, to) in [(&lab.a, &lab.b), (&lab.b, &lab.a)] {
            let mut moving = from.start(&["--json", "migrate", "web", "--to", &to.name])?;
            let mut most = 0;
            while !moving.ended()? {
                // The destination first: if it has the image, the source has given it up before.
                let vmms: Vec<u32> = to.vmms(None).into_iter().chain(from.vmms(None)).collect();
                most = most.max(holders(&raw, &vmms).len());
            }
            moving.wait(PATIENCE)?.expect_code(0)?;
            ensure!(most == 1, "{most} held the image at once");
            lab.guest_is_on(&guest, to, from)?;
            held_by(&raw, to, from)?;
            if with_qcow2 {
                held_by(&qcow2, to, from)?;
            }
            no_marks(&folder)?;
        }
        lab.a.limosa(&["vm", "stop", "web"])?.expect_code(0)?;
        free(&raw)
    });
}

#[test]
fn a_path_is_not_enough_and_each_refusal_says_why() {
    with_bare_lab(|lab| {
        let (folder, raw) = image(lab)?;
        let other = lab.b.file("other");
        std::fs::create_dir_all(&other)?;
        let guest = GuestSpec::new("web", 1).disk(&raw, "raw");
        let refused = |lab: &Lab, words: &str| -> Result<()> {
            let output = lab.a.migrate("web", &lab.b, &[])?.expect_code(1)?;
            ensure!(output.all().contains("disk") && output.all().contains(words), "{words:?} is not in {output:?}");
            no_marks(&folder)?;
            held_by(&raw, &lab.a, &lab.b)?;
            lab.settled(&lab.b, 0)
        };
        let shares = || AgentConfig::default().shares(&folder);
        lab.start_agents_with(shares(), AgentConfig::default())?;
        lab.guest(&guest)?;
        refused(lab, "[storage] shared = ")?;
        let again = |lab: &mut Lab, config: AgentConfig| -> Result<()> {
            lab.b.stop_agent()?;
            lab.b.start_agent(config)
        };
        again(lab, shares().sees(&other, &folder))?;
        refused(lab, "it is not at the destination")?;
        // The same path, name, size and contents; but another file.
        std::fs::copy(&raw, other.join("web.raw"))?;
        refused(lab, "another file than the source's")?;
        File::options().write(true).open(other.join("web.raw"))?.set_len(1 << 20)?;
        refused(lab, "another file than the source's")?;
        again(lab, shares())?;
        lab.unharmed(&guest)?;
        held_by(&raw, &lab.b, &lab.a)
    });
}

#[test]
fn an_image_that_somebody_has_is_not_started() {
    with_bare_lab(|lab| {
        let (folder, raw) = image(lab)?;
        lab.start_agents(AgentConfig::default().shares(&folder))?;
        let guest = GuestSpec::new("web", 1).disk(&raw, "raw");
        lab.guest(&guest)?;
        let holder = lab.a.vmms(None);
        let file = lab.b.file("second.toml");
        let mut second = GuestSpec::new("second", 2).disk(&raw, "raw");
        second.memory = "64M".into();
        std::fs::write(&file, second.text(&rig::guest_images()?.elf))?;
        let path = file.to_string_lossy().into_owned();
        let output = lab.b.limosa(&["vm", "start", &path])?.expect_code(1)?;
        // The fence of this agent keeps it from looking at what it did not start; of its own guests it has the number.
        let words = "is locked by a process that cannot be seen from here (`fuser` as root names it)";
        let seen = lab.a.limosa(&["vm", "start", &path])?.expect_code(1)?;
        let number = format!("is locked by process {}", holder.first().context("no VMM")?);
        ensure!(seen.all().contains(&number), "{number:?} is not in {seen:?}");
        ensure!(output.all().contains(words) && output.all().contains("web.raw"), "{words:?} is not in {output:?}");
        lab.settled(&lab.b, 0)?;
        for (text, words) in [
            ("path = \"/no/such\"\nformat = \"raw\"", "cannot be opened for reading and writing: No such file"),
            (&format!("path = {raw:?}"), "format = \"raw\""),
            (&format!("path = {raw:?}\nformat = \"qcow2\""), "no qcow2 image"),
        ] {
            second.sections = format!("[[disk]]\n{text}\n");
            std::fs::write(&file, second.text(&rig::guest_images()?.elf))?;
            let output = lab.b.limosa(&["vm", "start", &path])?.expect_code(1)?;
            ensure!(output.all().contains(words), "{words:?} is not in {output:?}");
            lab.settled(&lab.b, 0)?;
        }
        held_by(&raw, &lab.a, &lab.b)?;
        lab.unharmed(&guest)
    });
}

/// Somebody who waits for an image, and gets it at the moment of a hand-over, if not of the first then of a later one.
struct Thief {
    has: Arc<AtomicBool>,
    give_back: mpsc::Sender<()>,
    thread: std::thread::JoinHandle<nix::Result<()>>,
}

impl Thief {
    fn wait_for(image: &Path) -> Result<Thief> {
        let file = File::options().read(true).write(true).open(image)?;
        let (has, (give_back, told)) = (Arc::new(AtomicBool::new(false)), mpsc::channel());
        let stolen = Arc::clone(&has);
        let steal = move || {
            lock(&file, libc::F_WRLCK, true)?;
            stolen.store(true, Ordering::Release);
            // A test that failed gives back by dropping the other end.
            let _ = told.recv();
            Ok(())
        };
        Ok(Thief { has, give_back, thread: std::thread::spawn(steal) })
    }

    fn has(&self) -> bool {
        self.has.load(Ordering::Acquire)
    }

    fn gives_back(self) -> Result<()> {
        self.give_back.send(())?;
        self.thread.join().unwrap()?;
        Ok(())
    }
}

/// Starts migrations to and fro until the thief has the image in the middle of one: that one, whence and whither.
fn rob<'a>(lab: &'a Lab, guest: &GuestSpec, thief: &Thief) -> Result<(rig::host::Running, &'a Host, &'a Host)> {
    for (from, to) in [(&lab.a, &lab.b), (&lab.b, &lab.a)].into_iter().cycle().take(8) {
        let mut moving = from.start(&["--json", "migrate", &guest.name, "--to", &to.name])?;
        while !thief.has() && !moving.ended()? {
            std::thread::sleep(Duration::from_millis(1));
        }
        if thief.has() {
            return Ok((moving, from, to));
        }
        lab.guest_is_on(guest, to, from)?;
    }
    rig::bail!("in eight hand-overs the image was never free for a moment")
}

fn still(lab: &Lab, guest: &GuestSpec) -> Result<()> {
    let beats = || (lab.a.beats(&guest.name).len(), lab.b.beats(&guest.name).len());
    let before = beats();
    std::thread::sleep(Duration::from_millis(500));
    ensure!(beats() == before, "the guest runs, and another has its disk");
    Ok(())
}

/// A guest leaves, and somebody has taken its image when its destination wants it; it is given back after `kept`. Meanwhile it runs
/// on no host; then at the destination, with its image, whatever of `codes` the command ended with.
fn arrives_without_its_image(kept: Duration, codes: &[i32]) {
    with_bare_lab(|lab| {
        let (folder, raw) = image(lab)?;
        lab.start_agents(AgentConfig::default().shares(&folder))?;
        let guest = GuestSpec::new("web", 1).disk(&raw, "raw");
        lab.guest(&guest)?;
        let thief = Thief::wait_for(&raw)?;
        let (mut moving, from, to) = rob(lab, &guest, &thief)?;
        std::thread::sleep(kept);
        still(lab, &guest)?;
        thief.gives_back()?;
        let output = moving.wait(Duration::from_secs(60))?;
        ensure!(codes.contains(&output.code), "{output:?}");
        lab.guest_is_on(&guest, to, from)?;
        held_by(&raw, to, from)?;
        to.migrate_well("web", from, &[])?;
        held_by(&raw, from, to)
    });
}

#[test]
fn a_destination_without_the_image_waits_for_it_and_does_not_run() {
    arrives_without_its_image(Duration::from_millis(300), &[0]);
}

/// The same, for longer than the 10 s that the destination tries by itself: on no host; then it runs.
#[test]
fn a_guest_whose_image_is_kept_away_is_in_doubt_until_it_is_free() {
    arrives_without_its_image(Duration::from_secs(13), &[0, 4]);
}

#[test]
fn killed_vmms_and_agents_leave_neither_locks_nor_marks() {
    with_bare_lab(|lab| {
        let (folder, raw) = image(lab)?;
        lab.start_agents(AgentConfig::default().shares(&folder))?;
        let guest = GuestSpec::new("web", 1).memory("128M", "48M").disk(&raw, "raw");
        lab.guest(&guest)?;
        let mut moving = lab.a.start_slow("web", &lab.b, &[])?;
        for pid in lab.b.vmms(None) {
            nix::sys::signal::kill(nix::unistd::Pid::from_raw(i32::try_from(pid)?), nix::sys::signal::Signal::SIGKILL)?;
        }
        moving.wait(Duration::from_secs(60))?.expect_code(3)?;
        lab.guest_is_on(&guest, &lab.a, &lab.b)?;
        held_by(&raw, &lab.a, &lab.b)?;
        no_marks(&folder)?;
        let moving = lab.a.start_slow("web", &lab.b, &[])?;
        lab.a.kill_agent()?;
        drop(moving);
        ensure!(std::fs::read_dir(&folder)?.count() == 2, "a mark was expected beside the image of a migration in full swing");
        lab.a.restart_agent()?;
        no_marks(&folder)?;
        lab.guest_is_on(&guest, &lab.a, &lab.b)?;
        held_by(&raw, &lab.a, &lab.b)?;
        lab.good_migration(&guest)?;
        held_by(&raw, &lab.b, &lab.a)?;
        for pid in lab.b.vmms(None) {
            nix::sys::signal::kill(nix::unistd::Pid::from_raw(i32::try_from(pid)?), nix::sys::signal::Signal::SIGKILL)?;
        }
        free(&raw)?;
        // Else the lab's end would ask the agent to stop a guest that it is just about to forget.
        lab.b.wait_knows("web", false)
    });
}
