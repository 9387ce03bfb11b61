//! What a stock Linux guest boots: the lab's Debian kernel as it is distributed and as the ELF inside it, and an initramfs of busybox,
//! Debian's modules and our program. Made once, kept in the target folder, made again when what goes into it has changed.

use crate::netns::run;
use crate::process;
use crate::roce::kernel::{self, Kernel};
use anyhow::{Context, Result, bail, ensure};
use std::fs::{self, File};
use std::hash::{DefaultHasher, Hash, Hasher};
use std::io::{Read, Seek, SeekFrom, Write};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::OnceLock;

/// Drivers for what our machine has, and the file system for its disks.
const MODULES: [&str; 7] = ["virtio_mmio", "virtio_net", "virtio_blk", "virtio_rng", "virtio_balloon", "crc32c_generic", "ext4"];
/// No kernel's payload is larger.
const PAYLOAD_BYTES_MAX: u64 = 64 << 20;

/// The files to boot.
#[derive(Debug, Clone)]
pub struct Images {
    /// Debian's vmlinuz, a bzImage.
    pub bzimage: PathBuf,
    /// The ELF that it unpacks, with a PVH entry.
    pub pvh: PathBuf,
    /// The initramfs.
    pub initramfs: PathBuf,
    /// The kernel's release, as `uname -r` says it.
    pub release: String,
}

/// Whose kernel a guest boots.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Debian {
    /// The lab machines' own: 6.1.
    Bookworm,
    /// 6.12.
    Trixie,
}

/// The images, made once per test process.
///
/// # Errors
/// There is no kernel, no C compiler, no busybox, or one of them fails.
pub fn images(of: Debian) -> Result<Images> {
    static IMAGES: [OnceLock<Images>; 2] = [const { OnceLock::new() }; 2];
    let [bookworm, trixie] = &IMAGES;
    let made = if of == Debian::Bookworm { bookworm } else { trixie };
    if let Some(images) = made.get() {
        return Ok(images.clone());
    }
    let _lock = process::lock("rig-linux")?;
    let kernel = match of {
        Debian::Bookworm => kernel::prepare(|_| {})?,
        Debian::Trixie => kernel::prepare_debian13(|_| {})?,
    };
    let images = build(&kernel, &process::target_dir()?.join("rig-linux"))?;
    Ok(made.get_or_init(|| images).clone())
}

fn sources() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/guest/linux")
}

/// A name that changes with all that goes into the initramfs.
fn key(kernel: &Kernel) -> Result<String> {
    let mut hasher = DefaultHasher::new();
    let mut files: Vec<PathBuf> = fs::read_dir(sources())?.flatten().map(|entry| entry.path()).collect();
    files.sort();
    for file in files {
        file.hash(&mut hasher);
        fs::read(&file).with_context(|| file.display().to_string())?.hash(&mut hasher);
    }
    (&kernel.release, MODULES).hash(&mut hasher);
    Ok(format!("{:016x}", hasher.finish()))
}

fn build(kernel: &Kernel, folder: &Path) -> Result<Images> {
    fs::create_dir_all(folder)?;
    let pvh = folder.join(format!("vmlinux-{}", kernel.release));
    if !pvh.exists() {
        let fresh = folder.join("new.vmlinux");
        extract_elf(&kernel.image, &fresh)?;
        fs::rename(&fresh, &pvh)?;
    }
    let initramfs = folder.join(format!("guest-{}.cpio", key(kernel)?));
    if !initramfs.exists() {
        write_initramfs(kernel, folder, &initramfs)?;
    }
    Ok(Images { bzimage: kernel.image.clone(), pvh, initramfs, release: kernel.release.clone() })
}

fn write_initramfs(kernel: &Kernel, folder: &Path, to: &Path) -> Result<()> {
    let tree = tempfile::Builder::new().prefix("tree-").tempdir_in(folder)?;
    let root = tree.path();
    for name in ["bin", "modules", "proc", "sys", "dev", "mnt"] {
        fs::create_dir(root.join(name))?;
    }
    kernel::copy_busybox(root)?;
    kernel::copy_modules(kernel, root, &MODULES)?;
    compile(&root.join("bin/inside"))?;
    fs::copy(sources().join("init"), root.join("init"))?;
    fs::set_permissions(root.join("init"), fs::Permissions::from_mode(0o755))?;
    let fresh = folder.join("new.cpio");
    kernel::pack(root, &fresh)?;
    fs::rename(&fresh, to)?;
    Ok(())
}

/// Compiles the program inside, with all of the C library in it.
fn compile(to: &Path) -> Result<()> {
    let mut files: Vec<PathBuf> = fs::read_dir(sources())?.flatten().map(|entry| entry.path()).collect();
    files.retain(|path| path.extension().is_some_and(|end| end == "c"));
    files.sort();
    let mut cc = Command::new("cc");
    cc.args(["-std=gnu11", "-D_GNU_SOURCE", "-static", "-O2", "-pthread", "-Wall", "-Wextra", "-Werror", "-o"]).arg(to);
    let output = cc.args(files).output().context("cannot start cc (apt-get install gcc libc6-dev)")?;
    ensure!(output.status.success(), "tests/guest/linux does not compile: {}", String::from_utf8_lossy(&output.stderr));
    Ok(())
}

/// Writes the ELF that a bzImage carries: found by its setup header, unpacked by the program that its first bytes ask for.
fn extract_elf(bzimage: &Path, to: &Path) -> Result<()> {
    let mut file = File::open(bzimage).with_context(|| bzimage.display().to_string())?;
    let mut head = [0u8; 0x250];
    file.read_exact(&mut head)?;
    ensure!(head.get(0x202..0x206) == Some(b"HdrS"), "{} is no bzImage", bzimage.display());
    let word = |at: usize| -> u64 {
        head.get(at..at + 4).and_then(|bytes| bytes.try_into().ok()).map_or(0, |bytes| u64::from(u32::from_le_bytes(bytes)))
    };
    let setup_sectors = head.get(0x1f1).copied().unwrap_or(0).max(1);
    let (offset, length) = (word(0x248), word(0x24c));
    ensure!(length > 4 && length < PAYLOAD_BYTES_MAX, "{}: a payload of {length} bytes", bzimage.display());
    file.seek(SeekFrom::Start((u64::from(setup_sectors) + 1) * 512 + offset))?;
    let mut payload = vec![0u8; usize::try_from(length)?];
    file.read_exact(&mut payload)?;
    // The last four bytes are the length of what is unpacked, where the format does not say it by itself.
    let packed = payload.get(..payload.len() - 4).unwrap_or_default();
    let (program, bytes) = match payload.as_slice() {
        [0xfd, b'7', b'z', ..] => ("xz", packed),
        [0x28, 0xb5, 0x2f, 0xfd, ..] => ("zstd", packed),
        [0x02, 0x21, 0x4c, 0x18, ..] => ("lz4", packed),
        [0x1f, 0x8b, ..] => ("gzip", payload.as_slice()),
        _ => bail!("{}: a payload of an unknown format", bzimage.display()),
    };
    let mut unpack = Command::new(program);
    unpack.arg("-dc").stdin(Stdio::piped()).stdout(File::create(to)?).stderr(Stdio::null());
    let mut child = unpack.spawn().with_context(|| format!("cannot start {program}"))?;
    child.stdin.take().context("its input")?.write_all(bytes)?;
    ensure!(child.wait()?.success(), "{program} cannot unpack the payload of {}", bzimage.display());
    let notes = run("readelf", &["-n", &to.display().to_string()])?;
    ensure!(notes.contains("Xen"), "the ELF of {} has no PVH entry", bzimage.display());
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_kernel_that_is_none_is_refused_in_words() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("vmlinuz");
        fs::write(&file, [0u8; 4096]).unwrap();
        let error = extract_elf(&file, &dir.path().join("elf")).unwrap_err().to_string();
        assert!(error.ends_with("is no bzImage"), "{error}");
    }

    #[test]
    fn the_program_inside_compiles_without_a_warning() {
        let dir = tempfile::tempdir().unwrap();
        compile(&dir.path().join("inside")).unwrap();
    }
}
