//! Both ends against each other and against ends that misbehave: lost peers, connecting again, turning away, deadlines.
#![forbid(unsafe_code)]
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use limosa_plug::message::{ANSWER, Hello, Kind, Role, Status, emit};
use limosa_plug::{
    Ended, EventSender, PlugConnection, PlugError, PlugEvent, PlugListener, ServeError, ServeOptions, Token, VmState, VmmEvent,
    events, serve,
};
use limosa_proto::identity::VmId;
use nix::sys::socket::{AddressFamily, MsgFlags, SockFlag, SockType, UnixAddr, connect, recv, send, socket};
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::mpsc::{self, Receiver};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

#[path = "../examples/scribbler.rs"]
#[allow(dead_code, reason = "an example is used here as a module: its main is not called")]
mod scribbler;
use scribbler::Scribbler;

const SOON: Duration = Duration::from_secs(5);

fn socket_path() -> PathBuf {
    static COUNTER: AtomicU32 = AtomicU32::new(0);
    let number = COUNTER.fetch_add(1, Ordering::Relaxed);
    std::env::temp_dir().join(format!("limosa-plug-ends-{}-{number}.sock", std::process::id()))
}

type Serving = (JoinHandle<Result<Ended, ServeError>>, EventSender);

/// A scribbler on a thread; `change` may alter how it plugs in.
fn vmm(path: &Path, running: bool, change: impl FnOnce(&mut ServeOptions)) -> Serving {
    let mut vmm = Scribbler::new();
    if running {
        vmm.start().unwrap();
    }
    let mut options = vmm.options(path.to_str().unwrap(), Token([1; 16]));
    change(&mut options);
    let (sender, receiver) = events().unwrap();
    let thread = std::thread::spawn(move || {
        let ended = serve(&options, &mut vmm, &receiver);
        limosa_plug::Vmm::shutdown(&mut vmm).unwrap();
        ended
    });
    (thread, sender)
}

fn let_in(listener: &PlugListener) -> (Hello, PlugConnection, Receiver<PlugEvent>) {
    let peer = listener.accept(SOON).unwrap().expect("nobody connected");
    let hello = peer.hello().unwrap();
    let (sender, receiver) = mpsc::channel();
    (hello, peer.welcome(move |event| drop(sender.send(event))).unwrap(), receiver)
}

/// A peer made by hand.
fn raw(path: &Path) -> OwnedFd {
    let fd = socket(AddressFamily::Unix, SockType::SeqPacket, SockFlag::SOCK_CLOEXEC, None).unwrap();
    connect(fd.as_raw_fd(), &UnixAddr::new(path).unwrap()).unwrap();
    fd
}

fn say(fd: &OwnedFd, bytes: &[u8]) {
    send(fd.as_raw_fd(), bytes, MsgFlags::MSG_NOSIGNAL).unwrap();
}

fn hear(fd: &OwnedFd) -> Vec<u8> {
    let mut bytes = vec![0; 4096];
    let length = recv(fd.as_raw_fd(), &mut bytes, MsgFlags::empty()).unwrap();
    bytes.truncate(length);
    bytes
}

fn hello(min: u16, max: u16) -> Vec<u8> {
    let (role, state, id, token) = (Role::Running, VmState::Running, VmId([1; 16]), Token::default());
    let hello = Hello { version_min: min, version_max: max, role, state, pid: 1, id, token, name: "raw".into() };
    hello.emit().unwrap()
}

#[test]
fn the_socket_is_private_and_one_agent_owns_it() {
    let path = socket_path();
    let listener = PlugListener::bind(&path).unwrap();
    assert_eq!(std::fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
    assert!(listener.accept(Duration::from_millis(30)).unwrap().is_none());
    let second = PlugListener::bind(&path).unwrap_err().to_string();
    assert!(second.contains("another agent listens"), "{second}");
    assert!(path.exists());
    // An agent that was killed leaves its socket behind; the next one takes its place.
    std::mem::forget(listener);
    let stale = socket_path();
    drop(std::os::unix::net::UnixListener::bind(&stale).unwrap());
    let fresh = PlugListener::bind(&stale).unwrap();
    drop(fresh);
    assert!(!stale.exists());
    std::fs::remove_file(&path).unwrap();
}

#[test]
fn a_vmm_waits_for_an_agent_that_comes_later_and_reports_how_its_guest_ended() {
    let path = socket_path();
    let (thread, sender) = vmm(&path, true, |_| {});
    std::thread::sleep(Duration::from_millis(200));
    let listener = PlugListener::bind(&path).unwrap();
    let (hello, plug, events) = let_in(&listener);
    assert_eq!((hello.state, hello.token, hello.name.as_str()), (VmState::Running, Token([1; 16]), "scribbler"));
    let refusal = plug.throttle(20).unwrap_err();
    assert!(refusal.is_unsupported() && refusal.to_string().contains("cannot be throttled"), "{refusal}");
    sender.send(VmmEvent::GuestStopped("it was switched off\n".into()));
    assert_eq!(events.recv_timeout(SOON).unwrap(), PlugEvent::GuestStopped("it was switched off ".into()));
    assert!(matches!(events.recv_timeout(SOON).unwrap(), PlugEvent::Lost { expected: false, .. }));
    assert!(matches!(thread.join().unwrap().unwrap(), Ended::GuestStopped(_)));
    assert!(plug.is_lost() && plug.status().is_err_and(|error| error.is_undone()));
}

#[test]
fn a_vmm_without_an_agent_gives_up_only_if_it_was_told_to() {
    let path = socket_path();
    let (thread, _sender) = vmm(&path, true, |options| options.first_contact_time_max = Some(Duration::from_millis(100)));
    assert!(matches!(thread.join().unwrap().unwrap(), Ended::NoAgent(_)));
    let (thread, sender) = vmm(&path, true, |options| options.first_contact_time_max = None);
    std::thread::sleep(Duration::from_millis(300));
    assert!(!thread.is_finished());
    sender.send(VmmEvent::Leave);
    assert_eq!(thread.join().unwrap().unwrap(), Ended::Left);
    let (thread, _sender) = vmm(&path, true, |options| options.state = VmState::Loaded);
    assert!(matches!(thread.join().unwrap(), Err(ServeError::Options(_))));
}

#[test]
fn a_vmm_that_is_turned_away_ends_at_first_and_tries_again_later() {
    let path = socket_path();
    let listener = PlugListener::bind(&path).unwrap();
    let (thread, _sender) = vmm(&path, true, |_| {});
    let peer = listener.accept(SOON).unwrap().unwrap();
    peer.hello().unwrap();
    peer.reject("the name scribbler is taken");
    assert_eq!(thread.join().unwrap().unwrap(), Ended::Rejected("the name scribbler is taken".into()));

    let (thread, _sender) = vmm(&path, true, |_| {});
    let (_, plug, _events) = let_in(&listener);
    drop(plug);
    let peer = listener.accept(SOON).unwrap().unwrap();
    peer.hello().unwrap();
    peer.reject("still tidying up");
    let (_, plug, events) = let_in(&listener);
    plug.shutdown().unwrap();
    assert!(matches!(events.recv_timeout(SOON).unwrap(), PlugEvent::Lost { expected: true, .. }));
    assert_eq!(thread.join().unwrap().unwrap(), Ended::Shutdown);
}

#[test]
fn strangers_are_told_why_they_are_turned_away() {
    let path = socket_path();
    let listener = PlugListener::bind(&path).unwrap();
    for (words, expected) in [
        (emit(Kind::Hello as u16, Status::Done, 0, b"sho"), "Hello: it is too short"),
        (emit(Kind::Hello as u16, Status::Done, 0, &[9; 48]), "there is no role 9"),
        (emit(Kind::Status as u16, Status::Done, 0, b""), "the first message has kind 0x001c"),
        (b"GET / HTTP/1.1\r\n\r\n".to_vec(), "it does not begin with LPLG"),
        (hello(2, 3), "plug versions 2 to 3"),
        (vec![0; 200 * 1024], "larger than 192 KiB"),
    ] {
        let fd = raw(&path);
        say(&fd, &words);
        let error = listener.accept(SOON).unwrap().unwrap().hello().unwrap_err().to_string();
        assert!(error.contains(expected), "{error}");
        let answer = String::from_utf8_lossy(&hear(&fd)[16..]).into_owned();
        assert!(answer.contains(expected), "{answer}");
    }
    let fd = raw(&path);
    let peer = listener.accept(SOON).unwrap().unwrap();
    assert_eq!(u32::try_from(peer.pid()).unwrap(), std::process::id());
    drop(fd);
    assert!(matches!(peer.hello(), Err(PlugError::Lost { .. })));
    let fd = raw(&path);
    say(&fd, &hello(1, 9));
    let peer = listener.accept(SOON).unwrap().unwrap();
    assert_eq!(peer.hello().unwrap().version_max, 9);
}

/// Lets a VMM made by hand in.
fn by_hand() -> (OwnedFd, PlugConnection, Receiver<PlugEvent>) {
    let path = socket_path();
    let listener = PlugListener::bind(&path).unwrap();
    let fd = raw(&path);
    say(&fd, &hello(1, 1));
    let (_, plug, events) = let_in(&listener);
    assert_eq!(hear(&fd)[4..6], 2_u16.to_le_bytes());
    (fd, plug, events)
}

fn lost_words(events: &Receiver<PlugEvent>) -> String {
    match events.recv_timeout(SOON).unwrap() {
        PlugEvent::Lost { expected: false, words } => words,
        other => panic!("{other:?}"),
    }
}

#[test]
fn a_vmm_that_dies_in_the_middle_of_a_request_is_noticed_at_once() {
    let (fd, plug, events) = by_hand();
    let begun = Instant::now();
    std::thread::scope(|scope| {
        let pause = scope.spawn(|| plug.pause());
        hear(&fd);
        drop(fd);
        assert!(pause.join().unwrap().is_err_and(|error| error.is_lost() && !error.is_undone()), "it may have paused");
    });
    assert!(begun.elapsed() < Duration::from_secs(2));
    assert!(lost_words(&events).contains("closed"));
}

#[test]
fn answers_that_are_not_right_are_errors_in_words() {
    let (fd, plug, _events) = by_hand();
    let answer = |request: &[u8], kind: u16, status: Status, body: &[u8]| {
        let id = u32::from_le_bytes(request[12..16].try_into().unwrap());
        say(&fd, &emit(kind, status, id, body));
    };
    let plug_here = &plug;
    std::thread::scope(|scope| {
        let asked = |ask: fn(&PlugConnection) -> Result<(), PlugError>, kind: u16, status, body: &[u8]| {
            let asking = scope.spawn(move || ask(plug_here));
            let request = hear(&fd);
            // An answer to another request comes first and is passed over.
            say(&fd, &emit(kind, Status::Done, 0xdead, b""));
            answer(&request, kind, status, body);
            asking.join().unwrap().unwrap_err().to_string()
        };
        let pause = |plug: &PlugConnection| plug.pause().map(drop);
        let failed = asked(pause, Kind::Pause as u16 | ANSWER, Status::Failed, b"vCPU 3 does not stop");
        assert_eq!(failed, "pausing the guest: the VMM refused (failed): vCPU 3 does not stop");
        assert!(asked(pause, Kind::Save as u16 | ANSWER, Status::Done, &[0; 16]).contains("not the answer to this request"));
        assert!(asked(pause, Kind::Pause as u16 | ANSWER, Status::Done, b"short").contains("too short"));
        assert!(asked(pause, 0xffff, Status::Done, b"").contains("refused"));
        let describe = |plug: &PlugConnection| plug.describe().map(drop);
        assert!(asked(describe, Kind::Describe as u16 | ANSWER, Status::Done, &[0; 48]).contains("vCPUs"));
        let save = |plug: &PlugConnection| plug.save().map(drop);
        assert!(asked(save, Kind::Save as u16 | ANSWER, Status::Done, &[0; 16]).contains("malformed"), "no descriptor came");
    });
    assert!(plug.fetch_dirty().unwrap_err().to_string().contains("not described"));
    assert!(!plug.is_lost());
}

#[test]
fn a_vmm_that_breaks_the_protocol_is_cut_off() {
    for garbage in [b"garbage".to_vec(), emit(0x4fff, Status::Done, 0, b""), vec![7; 200 * 1024]] {
        let (fd, plug, events) = by_hand();
        say(&fd, &garbage);
        assert!(!lost_words(&events).is_empty());
        assert!(plug.is_lost());
        assert!(hear(&fd).is_empty(), "the connection is closed for the VMM too");
    }
}

#[test]
fn a_dropped_connection_reports_no_loss() {
    let (fd, plug, events) = by_hand();
    drop(plug);
    assert!(hear(&fd).is_empty());
    assert!(events.recv_timeout(SOON).is_err(), "the channel closes without an event");
}
