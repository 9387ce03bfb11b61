//! Tests of images: formats, their refusals, the lock with QEMU as the other side, and that QEMU finds what we wrote right.
#![allow(clippy::unwrap_used, clippy::panic, clippy::print_stdout)]
use super::*;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

const MIB: u64 = 1 << 20;

fn config(path: &Path, format: Option<DiskFormat>) -> DiskConfig {
    DiskConfig { path: path.into(), format, readonly: false, serial: String::new(), resolved: false }
}

fn raw(dir: &Path, bytes: u64) -> PathBuf {
    let path = dir.join("disk.raw");
    File::create(&path).unwrap().set_len(bytes).unwrap();
    path
}

fn qemu(program: &str, words: &[&str], path: &Path) -> Output {
    Command::new(program).args(words).arg(path).output().unwrap()
}

/// `qemu-img` and `qemu-io`, which are no part of Limosa, may be missing where it is built.
fn has_qemu() -> bool {
    let there = ["qemu-img", "qemu-io"].iter().all(|program| Command::new(program).arg("--version").output().is_ok());
    if !there {
        assert!(std::env::var_os("LIMOSA_DEMAND_ALL").is_none_or(|value| value != "1"), "qemu-img and qemu-io are demanded");
        println!("skipped: no qemu-img or qemu-io here (packaging/setup.sh all)");
    }
    there
}

fn qcow2(dir: &Path, more: &[&str]) -> PathBuf {
    let path = dir.join("disk.qcow2");
    let mut words = vec!["create", "-q", "-f", "qcow2"];
    words.extend(more);
    let output = Command::new("qemu-img").args(&words).arg(&path).arg("64M").output().unwrap();
    assert!(output.status.success(), "{output:?}");
    path
}

fn taken(config: DiskConfig) -> Disk {
    let disk = Disk::open(config).unwrap();
    disk.take(Duration::ZERO).unwrap();
    disk
}

fn refusal(config: DiskConfig) -> String {
    Disk::open(config).unwrap_err().to_string()
}

#[test]
fn a_raw_image_keeps_what_is_written() {
    let dir = tempfile::tempdir().unwrap();
    let path = raw(dir.path(), 4 * MIB);
    let disk = taken(config(&path, Some(DiskFormat::Raw)));
    assert_eq!((disk.info(), disk.sectors()), (DiskInfo { format: DiskFormat::Raw, bytes: 4 * MIB }, 8192));
    disk.write(&[7; 4096], MIB).unwrap();
    disk.flush().unwrap();
    let mut back = [0; 8192];
    disk.read(&mut back, MIB - 4096).unwrap();
    assert_eq!((back[4095], back[4096], back[8191]), (0, 7, 7));
    disk.zero(MIB, 2048, true).unwrap();
    disk.discard(2 * MIB, MIB).unwrap();
    disk.zero(MIB + 3072, 512, false).unwrap();
    disk.read(&mut back[..4096], MIB).unwrap();
    assert_eq!((back[0], back[2047], back[2048], back[3072], back[3584]), (0, 0, 7, 0, 7));
    assert!(disk.write(&[0; 512], 4 * MIB).is_err(), "nothing grows");
    drop(disk);
    assert_eq!(std::fs::read(&path).unwrap()[MIB as usize + 2048], 7);
}

#[test]
fn an_image_without_its_lock_is_not_touched() {
    let dir = tempfile::tempdir().unwrap();
    let path = raw(dir.path(), MIB);
    let disk = Disk::open(config(&path, Some(DiskFormat::Raw))).unwrap();
    assert!(matches!(disk.write(&[1; 512], 0), Err(DiskError::GivenUp(_))));
    disk.take(Duration::ZERO).unwrap();
    disk.write(&[1; 512], 0).unwrap();
    let other = Disk::open(config(&path, Some(DiskFormat::Raw))).unwrap();
    let words = other.take(Duration::ZERO).unwrap_err().to_string();
    assert!(words.contains("disk.raw: it is locked by process"), "{words}");
    disk.give_up().unwrap();
    disk.give_up().unwrap();
    assert!(!disk.is_held() && matches!(disk.read(&mut [0; 512], 0), Err(DiskError::GivenUp(_))));
    other.take(Duration::ZERO).unwrap();
    assert!(matches!(disk.take(Duration::ZERO), Err(DiskError::Locked { .. })));
    other.write(&[2; 512], 0).unwrap();
    other.give_up().unwrap();
    disk.take(Duration::ZERO).unwrap();
    let mut back = [0; 512];
    disk.read(&mut back, 0).unwrap();
    assert_eq!(back, [2; 512]);
    File::options().write(true).open(&path).unwrap().set_len(2 * MIB).unwrap();
    disk.give_up().unwrap();
    assert!(matches!(disk.take(Duration::ZERO), Err(DiskError::Size { .. })));
    other.take(Duration::ZERO).unwrap_err();
    assert_eq!(lock::take(&other.file, false, Duration::ZERO), Ok(true), "after an error nothing is held");
}

#[test]
fn what_is_no_image_is_refused_in_words() {
    let dir = tempfile::tempdir().unwrap();
    let path = raw(dir.path(), MIB);
    let none = refusal(config(&path, None));
    assert!(none.contains("format = \"raw\""), "{none}");
    let wrong = refusal(config(&path, Some(DiskFormat::Qcow2)));
    assert!(wrong.contains("it is no qcow2 image that can be used: it does not begin like one"), "{wrong}");
    let missing = refusal(config(&dir.path().join("none"), None));
    assert!(missing.contains("cannot be opened for reading and writing: No such file"), "{missing}");
    assert!(matches!(Disk::open(config(dir.path(), None)), Err(DiskError::Open { .. })));
    let pipe = dir.path().join("pipe");
    nix::unistd::mkfifo(&pipe, nix::sys::stat::Mode::S_IRWXU).unwrap();
    assert!(matches!(Disk::open(config(&pipe, Some(DiskFormat::Raw))), Err(DiskError::Kind(_))));
    let small = dir.path().join("small");
    std::fs::write(&small, [0; 511]).unwrap();
    assert!(matches!(Disk::open(config(&small, Some(DiskFormat::Raw))), Err(DiskError::Empty(_))));
    let serial = DiskConfig { serial: "x".repeat(21), ..config(&path, Some(DiskFormat::Raw)) };
    assert!(refusal(serial).contains("more than 20 bytes"));
    let link = dir.path().join("link");
    std::os::unix::fs::symlink(dir.path(), &link).unwrap();
    let through = DiskConfig { resolved: true, ..config(&link.join("disk.raw"), Some(DiskFormat::Raw)) };
    assert!(refusal(through.clone()).contains("symbolic links"));
    Disk::open(DiskConfig { resolved: false, ..through }).unwrap();
    let real = std::fs::canonicalize(&path).unwrap();
    Disk::open(DiskConfig { resolved: true, ..config(&real, Some(DiskFormat::Raw)) }).unwrap();
}

#[test]
fn readers_share_and_do_not_write() {
    let dir = tempfile::tempdir().unwrap();
    let path = raw(dir.path(), MIB);
    let reader = || DiskConfig { readonly: true, ..config(&path, Some(DiskFormat::Raw)) };
    let (one, other) = (taken(reader()), taken(reader()));
    assert!(one.write(&[1; 512], 0).is_err() && one.zero(0, 512, false).is_err());
    other.read(&mut [0; 512], 0).unwrap();
    let writer = Disk::open(config(&path, Some(DiskFormat::Raw))).unwrap();
    assert!(matches!(writer.take(Duration::ZERO), Err(DiskError::Locked { .. })));
    one.give_up().unwrap();
    other.give_up().unwrap();
    writer.take(Duration::ZERO).unwrap();
}

#[test]
fn qemu_finds_a_qcow2_image_right_after_us_and_we_after_qemu() {
    if !has_qemu() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let path = qcow2(dir.path(), &[]);
    let disk = taken(config(&path, None));
    assert_eq!(disk.info(), DiskInfo { format: DiskFormat::Qcow2, bytes: 64 * MIB });
    for at in 0..40 {
        disk.write(&vec![at as u8 + 1; 70_000], at * 1_500_000 / 512 * 512).unwrap();
    }
    disk.discard(10 * MIB, 8 * MIB).unwrap();
    disk.zero(20 * MIB + 512, 4 * MIB, true).unwrap();
    disk.zero(30 * MIB, 3 * MIB + 512, false).unwrap();
    disk.write(&[0xaa; 65536], 32 * MIB).unwrap();
    disk.give_up().unwrap();
    let check = qemu("qemu-img", &["check", "-q"], &path);
    assert!(check.status.success(), "{check:?}");
    for pattern in ["read -P 0xaa 32M 64k", "read -P 0 30M 2M", "read -P 1 0 70000", "write -P 0x55 50M 1M"] {
        let done = qemu("qemu-io", &["-f", "qcow2", "-c", pattern], &path);
        let said = String::from_utf8_lossy(&done.stdout).into_owned();
        assert!(done.status.success() && !said.contains("failed"), "{pattern}: {done:?}");
    }
    // What QEMU wrote meanwhile is seen: nothing of before is remembered.
    disk.take(Duration::ZERO).unwrap();
    let mut back = vec![0; MIB as usize];
    disk.read(&mut back, 50 * MIB).unwrap();
    assert!(back.iter().all(|byte| *byte == 0x55));
    disk.write(&[3; 512], 51 * MIB).unwrap();
    drop(disk);
    assert!(qemu("qemu-img", &["check", "-q"], &path).status.success());
}

#[test]
fn qemu_and_we_respect_each_others_locks() {
    if !has_qemu() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let path = qcow2(dir.path(), &[]);
    let disk = taken(config(&path, None));
    for words in [&["info"][..], &["check"][..], &["resize", "-q"][..]] {
        let refused = qemu("qemu-img", words, &path);
        let said = String::from_utf8_lossy(&refused.stderr).into_owned();
        assert!(!refused.status.success(), "{words:?}");
        assert!(words[0] == "resize" || said.contains("lock"), "{words:?}: {said}");
    }
    disk.give_up().unwrap();
    assert!(qemu("qemu-img", &["info"], &path).status.success());
    // A qemu-io that waits on its standard input holds the image like a running guest.
    let holding = |flags: &[&str]| {
        let mut child = Command::new("qemu-io")
            .args(flags)
            .arg(&path)
            .stdin(std::process::Stdio::piped())
            .stdout(std::process::Stdio::null())
            .spawn()
            .unwrap();
        let mut waited = 0;
        while !lock::holder(&disk.file).contains(&format!("process {} (qemu-io)", child.id())) {
            waited += 1;
            assert!(waited < 500 && child.try_wait().unwrap().is_none(), "qemu-io does not lock the image");
            std::thread::sleep(Duration::from_millis(20));
        }
        child
    };
    let end = |mut child: std::process::Child| {
        drop(child.stdin.take());
        child.wait().unwrap();
    };
    let writer = holding(&["-f", "qcow2"]);
    let words = disk.take(Duration::ZERO).unwrap_err().to_string();
    assert!(words.contains("(qemu-io)"), "{words}");
    let reader = Disk::open(DiskConfig { readonly: true, ..config(&path, None) }).unwrap();
    assert!(matches!(reader.take(Duration::ZERO), Err(DiskError::Locked { .. })));
    end(writer);
    let beside = holding(&["-f", "qcow2", "-r"]);
    assert!(matches!(disk.take(Duration::ZERO), Err(DiskError::Locked { .. })));
    reader.take(Duration::ZERO).unwrap();
    end(beside);
    reader.give_up().unwrap();
    disk.take(Duration::ZERO).unwrap();
}

#[test]
fn images_that_name_other_files_are_refused() {
    if !has_qemu() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let secret = raw(dir.path(), 64 * MIB);
    let backed = qcow2(dir.path(), &["-b", secret.to_str().unwrap(), "-F", "raw"]);
    let words = refusal(config(&backed, None));
    assert!(words.contains("backing file"), "{words}");
    let data = format!("data_file={}", dir.path().join("data").display());
    let external = qcow2(dir.path(), &["-o", &data]);
    let words = refusal(config(&external, None));
    assert!(words.contains("external data file"), "{words}");
    let encrypted = dir.path().join("luks.qcow2");
    let output = Command::new("qemu-img")
        .args([
            "create",
            "-q",
            "-f",
            "qcow2",
            "--object",
            "secret,id=s,data=abc",
            "-o",
            "encrypt.format=luks,encrypt.key-secret=s",
        ])
        .args(["-o", "encrypt.iter-time=10"])
        .arg(&encrypted)
        .arg("8M")
        .output()
        .unwrap();
    assert!(output.status.success(), "{output:?}");
    assert!(refusal(config(&encrypted, None)).contains("encrypted"));
}
