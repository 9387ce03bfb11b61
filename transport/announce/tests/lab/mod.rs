//! Three network namespaces for the tests of this crate: a host with a bridge, a guest behind its port `tap0`, and a
//! peer behind its port `up0`. Everything goes with the value, also when a test panics.

use std::fs::File;
use std::os::fd::{AsRawFd, OwnedFd};
use std::process::Command;
use std::sync::atomic::{AtomicU32, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use nix::sched::{CloneFlags, setns};
use nix::sys::socket::{AddressFamily, LinkAddr, SockFlag, SockProtocol, SockType, recvfrom, setsockopt, socket, sockopt};
use nix::sys::time::{TimeVal, TimeValLike};

#[path = "../../../../tests/rig/skip.rs"]
mod skip;

/// Says that this machine's kernel lacks something that a machine of the lab has, where the test runs too.
pub fn lacks(what: &str) {
    skip::skip_for_the_lab(&format!("this kernel has no {what}"));
}

/// A namespace that this process made.
pub struct Namespace(String);

impl Namespace {
    fn new(role: &str) -> Namespace {
        static COUNTER: AtomicU32 = AtomicU32::new(0);
        let name = format!("ann{}-{}-{role}", std::process::id(), COUNTER.fetch_add(1, Ordering::Relaxed));
        command("ip", &["netns", "add", &name]);
        let namespace = Namespace(name);
        namespace.ip("link set lo up");
        namespace
    }

    /// Runs `ip ARGS` inside.
    pub fn ip(&self, args: &str) -> String {
        let words: Vec<&str> = ["-n", &self.0].into_iter().chain(args.split(' ')).collect();
        command("ip", &words)
    }

    /// The same, and whether it worked.
    pub fn try_ip(&self, args: &str) -> bool {
        let mut command = Command::new("ip");
        command.args(["-n", &self.0]).args(args.split(' '));
        command.output().is_ok_and(|output| output.status.success())
    }

    /// Runs `bridge ARGS` inside.
    pub fn bridge(&self, args: &str) -> String {
        let words: Vec<&str> = ["-n", &self.0].into_iter().chain(args.split(' ')).collect();
        command("bridge", &words)
    }

    /// Runs `work` on a thread of this namespace.
    pub fn within<T: Send>(&self, work: impl FnOnce() -> T + Send) -> T {
        let file = File::open(format!("/run/netns/{}", self.0)).unwrap();
        thread::scope(|scope| {
            let thread = scope.spawn(|| {
                setns(file, CloneFlags::CLONE_NEWNET).unwrap();
                work()
            });
            thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
        })
    }

    /// The index of an interface.
    pub fn index(&self, name: &str) -> usize {
        self.within(|| nix::net::if_::if_nametoindex(name).unwrap()) as usize
    }

    /// The line of a MAC in the table of the bridge, on the port it is on now and dynamic: none if it is not known.
    pub fn fdb(&self, mac: &str) -> Vec<String> {
        let table = self.bridge("fdb show br br0");
        table.lines().filter(|line| line.starts_with(mac)).map(str::to_owned).collect()
    }
}

impl Drop for Namespace {
    fn drop(&mut self) {
        let _ = Command::new("ip").args(["netns", "del", &self.0]).status();
    }
}

fn command(program: &str, args: &[&str]) -> String {
    let output = Command::new(program).args(args).output().unwrap();
    let (out, err) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    assert!(output.status.success(), "{program} {}: {err}", args.join(" "));
    out.into_owned()
}

/// The three namespaces.
pub struct Lab {
    pub host: Namespace,
    pub guest: Namespace,
    pub peer: Namespace,
}

impl Lab {
    /// `None`, said as a skip, where no namespaces can be made.
    pub fn new() -> Option<Lab> {
        if !nix::unistd::geteuid().is_root() {
            skip::skip("network namespaces need root");
            return None;
        }
        if Command::new("bridge").arg("-V").output().is_err() {
            skip::skip("the tests need `ip` and `bridge` of iproute2");
            return None;
        }
        let lab = Lab { host: Namespace::new("host"), guest: Namespace::new("guest"), peer: Namespace::new("peer") };
        let Lab { host, guest, peer } = &lab;
        host.ip("link add br0 type bridge stp_state 0 mcast_snooping 0");
        for (port, far, namespace) in [("tap0", "guest0", guest), ("up0", "peer0", peer)] {
            host.ip(&format!("link add {port} type veth peer name {far} netns {}", namespace.0));
            host.ip(&format!("link set {port} master br0 up"));
            namespace.ip(&format!("link set {far} up"));
        }
        host.ip("link set br0 up");
        peer.ip("addr add 10.0.0.9/24 dev peer0");
        peer.ip("addr add fd00::9/64 dev peer0 nodad");
        lab.wait_until_forwarding();
        Some(lab)
    }

    fn wait_until_forwarding(&self) {
        let deadline = Instant::now() + Duration::from_secs(10);
        while self.host.bridge("link show").matches("state forwarding").count() < 2 {
            assert!(Instant::now() < deadline, "the bridge's ports do not come up");
            thread::sleep(Duration::from_millis(5));
        }
    }
}

/// Hears every frame that an interface of its namespace receives or sends.
pub struct Ear(OwnedFd);

impl Ear {
    /// Opened on a thread of the namespace to hear.
    pub fn open() -> Ear {
        let flags = SockFlag::SOCK_CLOEXEC;
        let fd = socket(AddressFamily::Packet, SockType::Raw, flags, SockProtocol::EthAll).unwrap();
        setsockopt(&fd, sockopt::RcvBuf, &(4 << 20)).unwrap();
        setsockopt(&fd, sockopt::ReceiveTimeout, &TimeVal::milliseconds(20)).unwrap();
        Ear(fd)
    }

    /// The frames from `mac` heard until now and for `quiet` longer without one.
    pub fn from(&self, mac: [u8; 6], quiet: Duration) -> Vec<Vec<u8>> {
        self.heard(quiet).into_iter().map(|(_, frame)| frame).filter(|frame| frame.get(6..12) == Some(&mac)).collect()
    }

    /// The frames to `mac`, likewise.
    pub fn to(&self, mac: [u8; 6], quiet: Duration) -> Vec<Vec<u8>> {
        self.heard(quiet).into_iter().map(|(_, frame)| frame).filter(|frame| frame.get(..6) == Some(&mac)).collect()
    }

    /// All frames heard until now and for `quiet` longer without one, each with its interface's index.
    pub fn heard(&self, quiet: Duration) -> Vec<(usize, Vec<u8>)> {
        let (mut heard, mut last) = (Vec::new(), Instant::now());
        let start = last;
        let mut buffer = [0; 2048];
        while last.elapsed() < quiet && start.elapsed() < Duration::from_secs(10) {
            if let Ok((bytes, from)) = recvfrom::<LinkAddr>(self.0.as_raw_fd(), &mut buffer) {
                heard.push((from.unwrap().ifindex(), buffer[..bytes].to_vec()));
                last = Instant::now();
            }
        }
        heard
    }
}
