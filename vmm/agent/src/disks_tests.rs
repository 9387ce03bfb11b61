//! Tests of the proof that two hosts mean the same file, with two folders as two hosts' storage.
#![allow(clippy::unwrap_used, clippy::panic)]
use super::*;
use limosa_proto::identity::VmId;
use limosa_proto::memory::{Gpa, MemoryMap, Region};

/// A shared folder, and the state of an agent.
struct Place {
    dir: tempfile::TempDir,
    folder: PathBuf,
    image: PathBuf,
}

fn place() -> Place {
    let dir = tempfile::tempdir().unwrap();
    let folder = dir.path().canonicalize().unwrap().join("vm");
    std::fs::create_dir(&folder).unwrap();
    let image = folder.join("web.raw");
    std::fs::write(&image, [0; 4096]).unwrap();
    Place { dir, folder, image }
}

fn storage(folder: &Path) -> Storage {
    Storage { shared: vec![folder.into()], local_locks: true }
}

fn guest(image: &Path) -> VmDescription {
    let disk = DiskDescription {
        path: image.display().to_string(),
        format: ImageFormat::Raw,
        readonly: false,
        bytes: 4096,
        serial: String::new(),
        token: [0; 32],
    };
    VmDescription {
        id: VmId([1; 16]),
        name: "web".into(),
        vcpus: 1,
        memory: MemoryMap::new(vec![Region { gpa: Gpa(0), bytes: 1 << 20, page_bytes: 4096 }]).unwrap(),
        nics: vec![],
        disks: vec![disk],
        vmm: "limosa".into(),
        records: vec![],
        config: vec![],
    }
}

/// The one reason against a guest: its id and words.
fn objection(storage: &Storage, vm: &VmDescription) -> (String, String) {
    let mut reasons = reasons(storage, vm);
    assert_eq!(reasons.len(), 1, "{reasons:?}");
    let reason = reasons.remove(0);
    assert!(reason.words.starts_with(&format!("disk {}: ", vm.disks[0].path)), "{}", reason.words);
    (reason.id, reason.words)
}

fn names(folder: &Path) -> Vec<String> {
    let mut names: Vec<String> =
        std::fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
    names.sort();
    names
}

#[test]
fn the_same_file_is_proven_and_nothing_is_left() {
    let place = place();
    let link = place.dir.path().join("link");
    std::os::unix::fs::symlink(&place.folder, &link).unwrap();
    let mut vm = guest(&place.image);
    let marks = mark(place.dir.path(), &mut vm).unwrap();
    assert_eq!(names(&place.folder).len(), 2);
    assert_eq!(resolve(&storage(&place.folder), &vm), Ok(vec![place.image.display().to_string()]));
    assert_eq!(resolve(&storage(&link), &vm), Ok(vec![place.image.display().to_string()]), "a folder by another name");
    vm.disks[0].path = link.join("web.raw").display().to_string();
    assert_eq!(resolve(&storage(&place.folder), &vm), Ok(vec![place.image.display().to_string()]), "a path by another name");
    drop(marks);
    assert_eq!(names(&place.folder), ["web.raw"]);
    assert_eq!(names(&place.dir.path().join(NOTES)), [""; 0]);
}

#[test]
fn the_same_path_is_not_enough() {
    let (here, there) = (place(), place());
    let mut vm = guest(&here.image);
    assert_eq!(objection(&storage(&here.folder), &vm).0, "disk-not-shared", "without a mark");
    let _marks = mark(here.dir.path(), &mut vm).unwrap();
    // What the destination has at this path is another folder's file, of the same name, size and contents.
    vm.disks[0].path = there.image.display().to_string();
    let (id, words) = objection(&storage(&there.folder), &vm);
    assert!(id == "disk-not-shared" && words.contains("another file than the source's"), "{words}");
    let mark = mark_file(&there.image, &vm.disks[0].token).unwrap();
    std::fs::write(&mark, "guessed\n").unwrap();
    assert_eq!(objection(&storage(&there.folder), &vm).0, "disk-not-shared");
    std::fs::remove_file(&mark).unwrap();
    std::os::unix::fs::symlink(mark_file(&here.image, &vm.disks[0].token).unwrap(), &mark).unwrap();
    assert_eq!(objection(&storage(&there.folder), &vm).0, "disk-not-shared", "a link proves nothing");
}

#[test]
fn only_shared_folders_are_looked_into() {
    let place = place();
    let mut vm = guest(&place.image);
    let _marks = mark(place.dir.path(), &mut vm).unwrap();
    let (id, words) = objection(&Storage::default(), &vm);
    assert!(id == "disk-folder" && words.contains("(it has: none)") && words.contains("[storage] shared = [\""), "{words}");
    let shared = storage(&place.folder);
    let outside = place.dir.path().join("other");
    std::fs::write(&outside, [0; 4096]).unwrap();
    let escape = place.folder.join("escape");
    std::os::unix::fs::symlink(&outside, &escape).unwrap();
    let dotted = place.folder.join("../vm/web.raw");
    for path in [
        outside.as_path(),
        &escape,
        &dotted,
        Path::new("/etc/passwd"),
        Path::new("/no/such"),
        Path::new("web.raw"),
        &place.folder,
    ] {
        vm.disks[0].path = path.display().to_string();
        assert_eq!(objection(&shared, &vm).0, if path == place.folder { "disk-missing" } else { "disk-folder" }, "{path:?}");
    }
    vm.disks[0].path = place.folder.join("gone.raw").display().to_string();
    let (id, words) = objection(&shared, &vm);
    assert!(id == "disk-missing" && words.contains("not at the destination: No such file"), "{words}");
}

#[test]
fn formats_sizes_and_locks_are_compared() {
    let place = place();
    let mut vm = guest(&place.image);
    let _marks = mark(place.dir.path(), &mut vm).unwrap();
    let shared = storage(&place.folder);
    vm.disks[0].bytes = 8192;
    let (id, words) = objection(&shared, &vm);
    assert!(id == "disk-format" && words.contains("8192") && words.contains("4096"), "{words}");
    vm.disks[0].format = ImageFormat::Qcow2;
    assert_eq!(objection(&shared, &vm).0, "disk-format");
    vm.disks[0] = DiskDescription { format: ImageFormat::Raw, bytes: 4096, ..vm.disks[0].clone() };
    let wary = Storage { local_locks: false, ..shared };
    let (id, words) = objection(&wary, &vm);
    assert!(id == "disk-locks" && words.contains("storage.local_locks = true"), "{words}");
    let holder = File::options().read(true).write(true).open(&place.image).unwrap();
    let (l_start, l_len) = LOCK_BYTES;
    let lock = libc::flock { l_type: libc::F_WRLCK as i16, l_whence: libc::SEEK_SET as i16, l_start, l_len, l_pid: 0 };
    fcntl(&holder, FcntlArg::F_OFD_SETLK(&lock)).unwrap();
    assert_eq!(reasons(&wary, &vm), []);
}

#[test]
fn marks_of_a_crash_are_swept_and_nothing_else() {
    let place = place();
    let mut vm = guest(&place.image);
    std::mem::forget(mark(place.dir.path(), &mut vm).unwrap());
    let notes = place.dir.path().join(NOTES);
    std::fs::write(notes.join("0011223344556677"), place.image.display().to_string()).unwrap();
    assert_eq!((names(&place.folder).len(), names(&notes).len()), (2, 2));
    sweep(place.dir.path());
    assert_eq!(names(&place.folder), ["web.raw"], "a note that names no mark removes nothing");
    assert_eq!(names(&notes), [""; 0]);
    vm.disks[0].path = place.folder.join("gone").display().to_string();
    assert!(mark(place.dir.path(), &mut vm).unwrap_err().contains("gone: No such file"));
    vm.disks[0].path = "/dev/null".into();
    assert!(mark(place.dir.path(), &mut vm).unwrap_err().contains("it is no file"));
    assert_eq!(names(&notes), [""; 0]);
}
