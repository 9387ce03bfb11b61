//! The lab machines' kernel: Debian's own, downloaded and checked by apt, unpacked beside and never installed, kept for later
//! runs; and the first file system that finds the way from that kernel to the outer machine's root.

use crate::netns::run;
use anyhow::{Context, Result, bail, ensure};
use nix::fcntl::{Flock, FlockArg};
use std::fs::{self, File};
use std::io::Write;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

/// Where kernels are kept; another folder by this variable.
pub const CACHE_VARIABLE: &str = "LIMOSA_LAB_CACHE";
const CACHE: &str = "/var/cache/limosa-lab";
const UNFINISHED: &str = "new-";
/// Debian's name for "the newest kernel".
const META_PACKAGE: &str = "linux-image-amd64";
/// Debian 13's kernel, as Debian 12's archive of updates has it too. Where there is none, the newest kernel is it.
const META_PACKAGE_13: &str = "linux-image-6.12-amd64";
/// Where it is kept, within the cache.
const CACHE_13: &str = "debian13";
/// What the machine must have to reach the outer root; modprobe knows what these need themselves.
const EARLY_MODULES: [&str; 4] = ["virtio_pci", "9pnet_virtio", "9p", "overlay"];
/// Folders of drivers for hardware that the lab has not: two thirds of the package.
const LEFT_OUT: [&str; 9] = ["gpu", "media", "iio", "isdn", "scsi", "usb", "net/wireless", "staging", "input"];

/// An unpacked kernel.
#[derive(Debug, Clone)]
pub struct Kernel {
    /// Its release, as `uname -r` says it.
    pub release: String,
    /// The bootable file.
    pub image: PathBuf,
    /// The folder that `modprobe -d` takes.
    pub root: PathBuf,
    /// Whether it was there already.
    pub cached: bool,
}

fn cache() -> PathBuf {
    std::env::var_os(CACHE_VARIABLE).map_or_else(|| PathBuf::from(CACHE), PathBuf::from)
}

/// Why there is no kernel here and none can be had, in words; nothing when there is or can.
pub fn missing() -> Option<String> {
    let debian = || fs::read_to_string("/etc/os-release").is_ok_and(|text| text.lines().any(|line| line == "ID=debian"));
    let there = newest(&cache()).ok().flatten().is_some();
    (!there && !debian())
        .then(|| format!("the soft-RoCE lab needs Debian's kernel: this is no Debian, and none is in {}", cache().display()))
}

/// A program that dies with the thread that starts it, whatever signals are blocked here.
fn bound(program: &str) -> Command {
    let mut command = Command::new("setpriv");
    command.args(["--pdeathsig", "KILL", "--", program]).stdin(Stdio::null());
    command
}

/// The kernel: the newest in the cache, without asking the network, else by apt. Tells before it takes time.
///
/// # Errors
/// There is none in the cache and apt cannot get it.
pub fn prepare(tell: impl Fn(&str)) -> Result<Kernel> {
    prepare_in(&cache(), &[META_PACKAGE], &tell)
}

/// Debian 13's kernel, for guests: likewise.
///
/// # Errors
/// As for [`prepare`].
pub fn prepare_debian13(tell: impl Fn(&str)) -> Result<Kernel> {
    prepare_in(&cache().join(CACHE_13), &[META_PACKAGE_13, META_PACKAGE], &tell)
}

/// What the first of these packages that apt knows stands for.
fn prepare_in(cache: &Path, packages: &[&str], tell: &impl Fn(&str)) -> Result<Kernel> {
    fs::create_dir_all(cache).with_context(|| format!("the lab's cache of kernels {}", cache.display()))?;
    let lock = File::options().create(true).truncate(false).write(true).open(cache.join("lock"))?;
    let _lock = Flock::lock(lock, FlockArg::LockExclusive).map_err(|(_, errno)| errno).context("the lock of the kernel cache")?;
    if let Some(kernel) = newest(cache)? {
        return Ok(kernel);
    }
    // What somebody left who was killed at this point. Nobody else is at work here: we have the lock.
    for entry in fs::read_dir(cache)?.flatten().filter(|entry| entry.file_name().to_string_lossy().starts_with(UNFINISHED)) {
        fs::remove_dir_all(entry.path())?;
    }
    let package = match concrete_package(packages) {
        Ok(package) => package,
        Err(_) => {
            tell("asking apt what kernel there is (once)");
            let output = bound("apt-get").arg("update").output()?;
            ensure!(output.status.success(), "apt-get update: {}", String::from_utf8_lossy(&output.stderr).trim());
            concrete_package(packages)?
        }
    };
    tell(&format!("fetching {package}, about 70 MB (once)"));
    unpack(cache, &package)?;
    let kernel = newest(cache)?.context("the kernel's package has no kernel in it")?;
    Ok(Kernel { cached: false, ..kernel })
}

/// The newest kernel in the cache. A folder is there under its final name only when it is complete.
fn newest(cache: &Path) -> Result<Option<Kernel>> {
    let mut found: Vec<(std::time::SystemTime, String)> = Vec::new();
    for entry in fs::read_dir(cache)? {
        let entry = entry?;
        let name = entry.file_name().to_string_lossy().into_owned();
        if let Some(release) = name.strip_prefix("linux-image-")
            && entry.path().join("boot").is_dir()
        {
            found.push((entry.metadata()?.modified()?, release.to_owned()));
        }
    }
    found.sort();
    Ok(found.pop().map(|(_, release)| {
        let root = cache.join(format!("linux-image-{release}"));
        Kernel { image: root.join("boot").join(format!("vmlinuz-{release}")), release, root, cached: true }
    }))
}

/// The package that one of these names stands for; the first that apt knows.
fn concrete_package(names: &[&str]) -> Result<String> {
    let stands_for = |name: &&str| {
        let text = run("apt-cache", &["depends", "--important", name]).ok()?;
        let mut packages = text.lines().filter_map(|line| line.trim().strip_prefix("Depends: "));
        packages.find(|package| package.starts_with("linux-image-")).map(str::to_owned)
    };
    let found = names.iter().find_map(stands_for);
    found.with_context(|| format!("apt knows none of {names:?}: the lab needs Debian's archive"))
}

/// Downloads (apt checks what arrives against the archive's signature), unpacks and indexes.
fn unpack(cache: &Path, package: &str) -> Result<()> {
    let work = tempfile::Builder::new().prefix(UNFINISHED).tempdir_in(cache).context("a folder in the kernel cache")?;
    let output = bound("apt-get").args(["download", package]).current_dir(work.path()).output()?;
    ensure!(output.status.success(), "apt-get download {package}: {}", String::from_utf8_lossy(&output.stderr).trim());
    let archive =
        fs::read_dir(work.path())?.flatten().map(|entry| entry.path()).find(|p| p.extension().is_some_and(|e| e == "deb"));
    let archive = archive.with_context(|| format!("apt-get download {package} brought no package"))?;
    let root = work.path().join("root");
    fs::create_dir(&root)?;
    let mut reader = bound("dpkg-deb").arg("--fsys-tarfile").arg(&archive).stdout(Stdio::piped()).spawn()?;
    let tar = reader.stdout.take().context("dpkg-deb has no output")?;
    let mut writer = bound("tar");
    writer
        .arg("-x")
        .arg("-C")
        .arg(&root)
        .args(LEFT_OUT.map(|folder| format!("--exclude=./lib/modules/*/kernel/drivers/{folder}")));
    let wrote = writer.stdin(tar).status()?;
    let read = reader.wait()?;
    ensure!(read.success() && wrote.success(), "unpacking {} failed", archive.display());
    let release = package.strip_prefix("linux-image-").context("a kernel's package")?;
    let text = root.display().to_string();
    run("depmod", &["-b", &text, release])?;
    fs::set_permissions(&root, fs::Permissions::from_mode(0o755))?;
    let _ = fs::remove_dir_all(cache.join(package));
    fs::rename(&root, cache.join(package)).context("moving the kernel into the cache")
}

/// Writes the first file system: busybox, the early modules in the order that they are loaded, and the two scripts.
///
/// # Errors
/// busybox is missing or not static, or the kernel lacks a module.
pub fn write_initramfs(kernel: &Kernel, folder: &Path, first: &str, second: &str) -> Result<PathBuf> {
    let tree = folder.join("initramfs");
    for name in ["bin", "modules", "proc", "sys", "dev", "host", "upper", "root"] {
        fs::create_dir_all(tree.join(name))?;
    }
    copy_busybox(&tree)?;
    copy_modules(kernel, &tree, &EARLY_MODULES)?;
    for (name, text) in [("init", first), ("second", second)] {
        fs::write(tree.join(name), text)?;
        fs::set_permissions(tree.join(name), fs::Permissions::from_mode(0o755))?;
    }
    let archive = folder.join("initramfs.cpio");
    pack(&tree, &archive)?;
    fs::remove_dir_all(&tree)?;
    Ok(archive)
}

/// Copies busybox into `bin` of a first file system.
pub(crate) fn copy_busybox(tree: &Path) -> Result<()> {
    let busybox = static_busybox()?;
    fs::copy(&busybox, tree.join("bin/busybox")).with_context(|| format!("copying {}", busybox.display()))?;
    Ok(())
}

/// Copies modules, and those that they need, into `modules` of a first file system; `modules/order` names them as they are to be
/// loaded. Modules that only newer processors take are left out.
pub(crate) fn copy_modules(kernel: &Kernel, tree: &Path, modules: &[&str]) -> Result<()> {
    let mut order = String::new();
    for module in modules {
        let root = kernel.root.display().to_string();
        let needs = run("modprobe", &["-d", &root, "-S", &kernel.release, "--show-depends", module])?;
        for path in needs.lines().filter_map(|line| line.trim().strip_prefix("insmod ")) {
            let path = Path::new(path.trim());
            let name = path.file_name().context("a module's name")?.to_string_lossy().into_owned();
            if !order.lines().any(|known| known == name) && !name.ends_with("-intel.ko") {
                fs::copy(path, tree.join("modules").join(&name)).with_context(|| format!("copying {}", path.display()))?;
                order.push_str(&format!("{name}\n"));
            }
        }
    }
    fs::write(tree.join("modules/order"), order)?;
    Ok(())
}

fn static_busybox() -> Result<PathBuf> {
    let places = ["/bin/busybox", "/usr/bin/busybox"].map(PathBuf::from);
    let Some(path) = places.into_iter().find(|path| path.exists()) else {
        bail!("busybox is missing (apt-get install busybox-static)");
    };
    let text = fs::read(&path)?;
    // A dynamic program names its loader.
    let dynamic = text.windows(10).take(8192).any(|bytes| bytes == b"/ld-linux-" || bytes == b"/lib64/ld-");
    ensure!(!dynamic, "{} is not static (apt-get install busybox-static)", path.display());
    Ok(path)
}

/// Packs a folder as an initramfs.
pub(crate) fn pack(tree: &Path, archive: &Path) -> Result<()> {
    let names = run("find", &[&tree.display().to_string(), "-mindepth", "1", "-printf", "%P\n"])?;
    let mut cpio = Command::new("cpio");
    cpio.args(["-o", "-H", "newc", "--quiet", "-R", "0:0"]).current_dir(tree).stdin(Stdio::piped());
    let mut child = cpio.stdout(File::create(archive)?).spawn().context("cannot start cpio (apt-get install cpio)")?;
    child.stdin.take().context("cpio's input")?.write_all(names.as_bytes())?;
    ensure!(child.wait()?.success(), "cpio failed");
    Ok(())
}
