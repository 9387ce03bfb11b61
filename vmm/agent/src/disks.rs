//! Disks on storage that two hosts share: the source's mark beside each image, by which the destination sees that it has
//! the same file and not just the same path, and what a destination has against a guest's disks. No image is read as a
//! disk here and no lock is taken: the VMM does both.

use crate::config::Storage;
use limosa_proto::wire::limits::{WORDS_BYTES_MAX, fit};
use limosa_proto::wire::message::{DiskDescription, ImageFormat, Reason, VmDescription};
use nix::fcntl::{AT_FDCWD, FcntlArg, OFlag, OpenHow, ResolveFlag, fcntl, openat2};
use nix::libc;
use ring::rand::SecureRandom as _;
use std::fs::File;
use std::io::{Read as _, Write as _};
use std::os::unix::fs::{FileExt as _, FileTypeExt as _, OpenOptionsExt as _};
use std::path::{Component, Path, PathBuf};
use std::time::{Duration, Instant};

/// How long a mark may take until it is seen through another host's caches, for all disks of a guest together.
const MARK_SEEN_MAX: Duration = Duration::from_secs(2);
const MARK_RETRY: Duration = Duration::from_millis(50);
/// Bytes of the token that name the mark's file; the others are in it.
const NAME_BYTES: usize = 8;
/// Where the agent notes which marks there are, within its state.
const NOTES: &str = "disk-marks";
/// What a qcow2 image begins with.
const QCOW2_MAGIC: [u8; 4] = *b"QFI\xfb";
/// The bytes that locks on images are on: `limosa-machine`'s `disk/lock.rs` says why.
const LOCK_BYTES: (i64, i64) = (100, 200);

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// The file beside `image` that a token names.
fn mark_file(image: &Path, token: &[u8; 32]) -> Option<PathBuf> {
    let (name, _) = token.split_at(NAME_BYTES);
    let image_name = image.file_name()?.to_str()?;
    Some(image.with_file_name(format!(".{image_name}.limosa-{}", hex(name))))
}

fn mark_text(token: &[u8; 32]) -> String {
    let (_, secret) = token.split_at(NAME_BYTES);
    format!("{}\n", hex(secret))
}

/// The source's marks beside the images of one guest; they are removed when this is dropped.
#[derive(Debug, Default)]
pub(crate) struct Marks {
    /// Each mark with the note of it.
    files: Vec<(PathBuf, PathBuf)>,
}

impl Drop for Marks {
    fn drop(&mut self) {
        for (mark, note) in self.files.drain(..) {
            remove(&mark, &note);
        }
    }
}

fn remove(mark: &Path, note: &Path) {
    match std::fs::remove_file(mark) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
            // The note stays, and the next start of the agent tries again.
            tracing::warn!(mark = %mark.display(), %error, "the mark beside an image cannot be removed");
        }
        _ => drop(std::fs::remove_file(note)),
    }
}

/// Writes a mark beside each image of `vm` and puts its token into the description.
///
/// # Errors
/// In words: an image that is gone or no file, or whose folder cannot be written.
pub(crate) fn mark(state_dir: &Path, vm: &mut VmDescription) -> Result<Marks, String> {
    let mut marks = Marks::default();
    for disk in &mut vm.disks {
        let told = |words: &dyn std::fmt::Display| format!("disk {}: {words}", disk.path);
        let image = std::fs::canonicalize(&disk.path).map_err(|e| told(&e))?;
        if !image.is_file() {
            return Err(told(&"it is no file; a guest moves only with images that are files in a folder that both hosts share"));
        }
        let mut token = [0; 32];
        ring::rand::SystemRandom::new().fill(&mut token).map_err(|_| "the system gives no random numbers")?;
        let (name, _) = token.split_at(NAME_BYTES);
        let mark = mark_file(&image, &token).ok_or_else(|| told(&"its name is no UTF-8"))?;
        let note = state_dir.join(NOTES).join(hex(name));
        // The note first: a mark is never without one.
        let noted = std::fs::create_dir_all(state_dir.join(NOTES))
            .and_then(|()| std::fs::write(&note, mark.as_os_str().as_encoded_bytes()));
        noted.map_err(|e| told(&format_args!("its mark cannot be noted in {}: {e}", note.display())))?;
        marks.files.push((mark.clone(), note));
        let written = File::options().write(true).create_new(true).mode(0o600).open(&mark).and_then(|mut file| {
            file.write_all(mark_text(&token).as_bytes())?;
            file.sync_all()
        });
        written.map_err(|e| {
            told(&format_args!(
                "no mark can be written beside it ({}: {e}), so that nobody could prove that the destination has the same file",
                mark.display()
            ))
        })?;
        disk.token = token;
    }
    Ok(marks)
}

/// Removes the marks that an agent which crashed has left.
pub(crate) fn sweep(state_dir: &Path) {
    for note in std::fs::read_dir(state_dir.join(NOTES)).into_iter().flatten().flatten().map(|entry| entry.path()) {
        let mark = std::fs::read_to_string(&note).map(PathBuf::from).unwrap_or_default();
        let name = note.file_name().and_then(|name| name.to_str()).unwrap_or_default();
        // Only what a note of ours can name is removed.
        let ours = mark.file_name().and_then(|mark| mark.to_str());
        if ours.is_some_and(|mark| mark.starts_with('.') && mark.ends_with(&format!(".limosa-{name}"))) {
            remove(&mark, &note);
        } else {
            drop(std::fs::remove_file(&note));
        }
    }
}

/// Every reason why the disks of `vm` cannot be used on this host, with `storage` of its configuration.
pub(crate) fn reasons(storage: &Storage, vm: &VmDescription) -> Vec<Reason> {
    resolve(storage, vm).err().unwrap_or_default()
}

/// The real paths of the disks of `vm`, each proven to be in a shared folder and the very file that the source means.
///
/// # Errors
/// Every reason why not.
pub(crate) fn resolve(storage: &Storage, vm: &VmDescription) -> Result<Vec<String>, Vec<Reason>> {
    let until = Instant::now() + MARK_SEEN_MAX;
    let (mut paths, mut reasons) = (Vec::new(), Vec::new());
    for disk in &vm.disks {
        match look(storage, disk, until) {
            Ok(path) => paths.push(path),
            Err((id, words)) => {
                let words = fit(&format!("disk {}: {words}", fit(&disk.path, 256)), WORDS_BYTES_MAX);
                reasons.push(Reason { id: id.to_owned(), words });
            }
        }
    }
    if reasons.is_empty() { Ok(paths) } else { Err(reasons) }
}

type Objection = (&'static str, String);

fn look(storage: &Storage, disk: &DiskDescription, until: Instant) -> Result<String, Objection> {
    let path = in_shared_folder(storage, &disk.path)?;
    let file = open(disk, &path)?;
    proven(disk, &path, until)?;
    check_format(disk, &file)?;
    if !storage.local_locks && !is_locked(&file) {
        let words = "the lock that the source holds on it is not seen here: its file system keeps locks on each host for itself, or \
                     the source's VMM takes none; storage.local_locks = true on the destination takes the guest all the same";
        return Err(("disk-locks", words.into()));
    }
    path.into_os_string().into_string().map_err(|_| ("disk-missing", "its real path here is no UTF-8".into()))
}

/// The real path of an image, which lies in a shared folder. Of what lies elsewhere a peer does not even learn whether it is
/// there.
fn in_shared_folder(storage: &Storage, path: &str) -> Result<PathBuf, Objection> {
    let given = Path::new(path);
    let plain = given.is_absolute() && given.components().all(|part| matches!(part, Component::RootDir | Component::Normal(_)));
    let folders: Vec<PathBuf> =
        storage.shared.iter().map(|folder| std::fs::canonicalize(folder).unwrap_or_else(|_| folder.clone())).collect();
    let inside = |path: &Path| folders.iter().chain(&storage.shared).any(|folder| path.starts_with(folder) && path != folder);
    let real = std::fs::canonicalize(given);
    match real {
        Ok(real) if plain && folders.iter().any(|folder| real.starts_with(folder)) => Ok(real),
        Err(error) if plain && inside(given) => Err(("disk-missing", format!("it is not at the destination: {error}"))),
        _ => {
            let parent = given.parent().filter(|_| plain).unwrap_or(Path::new("/srv/vm"));
            let has: Vec<String> = storage.shared.iter().map(|folder| folder.display().to_string()).collect();
            let has = if has.is_empty() { "none".into() } else { has.join(", ") };
            let words = format!(
                "it is in no folder from which the destination takes images (it has: {has}); add it there: [storage] shared = [{parent:?}]"
            );
            Err(("disk-folder", words))
        }
    }
}

fn open(disk: &DiskDescription, path: &Path) -> Result<File, Objection> {
    let purpose = if disk.readonly { "reading" } else { "writing" };
    let missing =
        |error: std::io::Error| ("disk-missing", format!("it cannot be opened for {purpose} at the destination: {error}"));
    let access = if disk.readonly { OFlag::O_RDONLY } else { OFlag::O_RDWR };
    let file = open_real(path, access).map_err(missing)?;
    let kind = file.metadata().map_err(missing)?.file_type();
    if kind.is_file() {
        return Ok(file);
    }
    let kind = if kind.is_block_device() { "a block device" } else { "no file" };
    Err(("disk-not-shared", format!("it is {kind} at the destination; only of files it can be proven that they are the same")))
}

/// Opens a path that has no symbolic link in it: who may write in the folder must not lead elsewhere meanwhile.
fn open_real(path: &Path, access: OFlag) -> std::io::Result<File> {
    let how = OpenHow::new().flags(access | OFlag::O_NONBLOCK | OFlag::O_CLOEXEC).resolve(ResolveFlag::RESOLVE_NO_SYMLINKS);
    Ok(File::from(openat2(AT_FDCWD, path, how)?))
}

/// The source's mark is seen beside the image: folder and name are the source's, and so is the file.
fn proven(disk: &DiskDescription, path: &Path, until: Instant) -> Result<(), Objection> {
    let words = "it is there, but it is another file than the source's, whose mark beside it is not seen: is its folder the same \
                 storage on both hosts?";
    let other = || ("disk-not-shared", words.to_owned());
    if disk.token == [0; 32] {
        return Err(("disk-not-shared", "the source has left no mark beside it to prove that it is the same file".into()));
    }
    let mark = mark_file(path, &disk.token).ok_or_else(other)?;
    loop {
        let read = open_real(&mark, OFlag::O_RDONLY).and_then(|file| {
            let mut text = String::new();
            file.take(128).read_to_string(&mut text).map(|_| text)
        });
        if read.is_ok_and(|text| text == mark_text(&disk.token)) {
            return Ok(());
        }
        if Instant::now() >= until {
            return Err(other());
        }
        // A network file system may still remember that there was no such file.
        std::thread::sleep(MARK_RETRY);
    }
}

fn check_format(disk: &DiskDescription, file: &File) -> Result<(), Objection> {
    let wrong = |words: String| Err(("disk-format", words));
    let mut magic = [0; 4];
    let is_qcow2 = file.read_exact_at(&mut magic, 0).is_ok() && magic == QCOW2_MAGIC;
    match disk.format {
        ImageFormat::Qcow2 if !is_qcow2 => wrong("it is a qcow2 image by its description, and does not begin like one".into()),
        ImageFormat::Raw => {
            let bytes = file.metadata().map_or(0, |meta| meta.len());
            if bytes == disk.bytes {
                return Ok(());
            }
            wrong(format!("it has {} bytes by its description, and {bytes} at the destination", disk.bytes))
        }
        ImageFormat::Qcow2 => Ok(()),
    }
}

/// Whether somebody holds a lock on the image, in whatever way.
fn is_locked(file: &File) -> bool {
    let (l_start, l_len) = LOCK_BYTES;
    let mut lock = libc::flock { l_type: libc::F_WRLCK as i16, l_whence: libc::SEEK_SET as i16, l_start, l_len, l_pid: 0 };
    fcntl(file, FcntlArg::F_OFD_GETLK(&mut lock)).is_ok() && i32::from(lock.l_type) != libc::F_UNLCK
}

#[cfg(test)]
#[path = "disks_tests.rs"]
mod tests;
