//! Both ends of the plug against an other end that sends any datagrams and then goes: the agent's end against a VMM (an even
//! first byte), a VMM's end against an agent. Nobody hangs, and nothing is taken that does not fit.

use super::Taken;
use super::source::vm;
use limosa_plug::message::{ANSWER, Hello, Kind, Role, Status, emit};
use limosa_plug::{DirtyBitmap, PlugListener, ServeOptions, Token, VmState, Vmm, VmmDescription, VmmEvent, events, memfd, serve};
use limosa_proto::identity::VmId;
use limosa_proto::record::Record;
use limosa_proto::wire::message::VmDescription;
use socket2::{Domain, SockAddr, Socket, Type};
use std::os::fd::AsFd as _;
use std::path::Path;
use std::time::Duration;

/// Far longer than a process here takes to be scheduled.
const SOON: Duration = Duration::from_secs(5);

pub(super) fn ends(data: &[u8]) {
    let mut taken = Taken(data);
    let Some(which) = taken.u8() else { return };
    let folder = tempfile::tempdir().expect("a folder for a socket");
    let path = folder.path().join("plug");
    if which % 2 == 0 { agents_end(&path, taken) } else { vmms_end(&path, which, taken) }
}

fn peer() -> Socket {
    Socket::new(Domain::UNIX, Type::SEQPACKET, None).expect("a socket")
}

/// Sends what `taken` has: each datagram is a number and bytes. An odd number: they are the datagram; else they are the body of
/// an answer or request of that kind.
fn say_all(socket: &Socket, mut taken: Taken<'_>, flag: u16) {
    // A full buffer ends it: the other end need not read.
    let _ = socket.set_nonblocking(true);
    let mut request = 1;
    while let Some(number) = taken.u8() {
        let bytes = taken.chunk();
        let datagram =
            if number % 2 == 1 { bytes.to_vec() } else { emit(u16::from(number / 2) | flag, Status::Done, request, bytes) };
        request += 1;
        if socket.send(&datagram).is_err() {
            return;
        }
    }
}

fn agents_end(path: &Path, taken: Taken<'_>) {
    let listener = PlugListener::bind(path).expect("a socket of its own");
    let vmm = peer();
    vmm.connect(&SockAddr::unix(path).expect("a short path")).expect("somebody listens");
    let (role, state, token) = (Role::Running, VmState::Running, Token::default());
    let hello = Hello { version_min: 1, version_max: 1, role, state, pid: 1, id: VmId([1; 16]), token, name: "raw".into() };
    vmm.send(&hello.emit().expect("a Hello")).expect("an empty buffer");
    let peer = listener.accept(SOON).expect("our own process").expect("it has connected");
    peer.hello().expect("a good Hello");
    // The thread that reads may see the first datagrams before anything is asked: then they are answers to nothing.
    let connection = peer.welcome(|_| {}).expect("it is still there");
    say_all(&vmm, taken, ANSWER);
    drop(vmm);
    let _ = connection.status();
    if let Ok(described) = connection.describe() {
        let _ = described.map(limosa_plug::HugePages::Never);
    }
    let _ = (connection.pause(), connection.fetch_dirty(), connection.save(), connection.resume());
    assert!(connection.release().is_err(), "it has gone");
}

/// A VMM that does what it is asked, with no guest.
struct Obedient;

impl Obedient {
    fn described() -> Result<VmmDescription, String> {
        let description = vm();
        let fd = memfd::create("fuzz", description.memory.bytes()).map_err(|error| error.to_string())?;
        memfd::seal(fd.as_fd()).map_err(|error| error.to_string())?;
        Ok(VmmDescription { description, memory: vec![(fd, 0)] })
    }
}

impl Vmm for Obedient {
    fn describe(&mut self) -> Result<VmmDescription, String> {
        Obedient::described()
    }
    fn prepare(&mut self, _: &VmDescription, _: &[(String, String)]) -> Result<VmmDescription, String> {
        Obedient::described()
    }
    fn track(&mut self, _: bool) -> Result<(), String> {
        Ok(())
    }
    fn fetch_dirty(&mut self, into: &DirtyBitmap) -> Result<(), String> {
        into.set(3);
        Ok(())
    }
    fn pause(&mut self) -> Result<(), String> {
        Ok(())
    }
    fn save(&mut self) -> Result<Vec<Record>, String> {
        Ok(vec![])
    }
    fn load(&mut self, _: Vec<Record>) -> Result<(), String> {
        Ok(())
    }
    fn resume(&mut self) -> Result<(), String> {
        Ok(())
    }
    fn throttle(&mut self, _: u8) -> Result<(), String> {
        Ok(())
    }
    fn release(&mut self) -> Result<(), String> {
        Ok(())
    }
    fn discard(&mut self) -> Result<(), String> {
        Ok(())
    }
    fn shutdown(&mut self) -> Result<(), String> {
        Ok(())
    }
}

fn vmms_end(path: &Path, which: u8, taken: Taken<'_>) {
    let listener = peer();
    listener.bind(&SockAddr::unix(path).expect("a short path")).expect("a socket of its own");
    listener.listen(1).expect("it listens");
    let states = [VmState::Running, VmState::Paused, VmState::Waiting];
    let state = states.get(usize::from(which / 2 % 3)).copied().unwrap_or(VmState::Waiting);
    let (id, name) = if state == VmState::Waiting { (VmId([0; 16]), String::new()) } else { (VmId([1; 16]), "raw".to_owned()) };
    let (socket, token) = (path.to_owned(), Token::default());
    let options = ServeOptions { socket, token, id, name, state, first_contact_time_max: Some(SOON) };
    let (sender, receiver) = events().expect("an eventfd");
    std::thread::scope(|scope| {
        scope.spawn(move || {
            let (agent, _) = listener.accept().expect("the VMM connects");
            let welcome = [1_u16.to_le_bytes().as_slice(), &[0; 6]].concat();
            let _ = agent.send(&emit(Kind::Welcome as u16, Status::Done, 0, &welcome));
            say_all(&agent, taken, 0);
            drop((agent, listener));
            sender.send(VmmEvent::Leave);
        });
        serve(&options, &mut Obedient, &receiver).expect("the options are good");
    });
}
