//! RDMA under test: control over TCP, lanes are queue pairs, both ends on this machine's own device. It needs one with an active
//! RoCE or InfiniBand port, which the lab has: `cargo test -p limosa-link --features rdma --test conformance --no-run`, then in one
//! of its machines `conformance-… rdma_pairs`.

use crate::subject::{Direction, NotApplicable, Stream, Subject, Wire};
use crate::tcp::Tcp;
use crate::toy::{Sender, Toy, ToySettings};
use limosa_link::rdma::{RdmaLink, RdmaListener, RdmaSettings, addresses, counters};
use limosa_link::{Cancel, Link};
use limosa_proto::allow::AllowList;
use std::net::SocketAddr;
use std::sync::atomic::{AtomicU16, AtomicUsize, Ordering};
use std::sync::{Arc, RwLock};
use std::time::Duration;

/// The control channel's link.
type Control = Tcp<false>;

/// RDMA has ports of its own; tests in one process each take another, and processes begin apart.
static NEXT_PORT: AtomicU16 = AtomicU16::new(0);
/// Destinations in this process.
static LIVE: AtomicUsize = AtomicUsize::new(0);

pub struct Rdma {
    control: Control,
    address: SocketAddr,
    stop: Cancel,
}

impl Drop for Rdma {
    fn drop(&mut self) {
        self.stop.cancel("over");
        LIVE.fetch_sub(1, Ordering::SeqCst);
    }
}

fn settings() -> RdmaSettings {
    RdmaSettings { trusted_fabric: AllowList::new(&["0.0.0.0/0"]).unwrap().0, ..RdmaSettings::default() }
}

fn listen(allow: &Arc<RwLock<AllowList>>) -> RdmaListener {
    let address = addresses(&settings()).unwrap()[0].address;
    for _ in 0..100 {
        let number = NEXT_PORT.fetch_add(1, Ordering::SeqCst).wrapping_add((std::process::id() % 300) as u16 * 100);
        let port = 20_000 + number % 40_000;
        if let Ok(listener) = RdmaListener::bind(SocketAddr::new(address, port), settings(), allow.clone()) {
            return listener;
        }
    }
    panic!("no free port on {address}");
}

impl Subject for Rdma {
    const NAME: &'static str = "rdma";
    const ENCRYPTED: bool = false;
    const CONTROL_ENCRYPTED: bool = true;
    const LANES_KNOW_PEER: bool = false;
    const DIRECT: bool = true;
    /// The lab's machines are emulated.
    const SLOWNESS: u32 = 4;
    const UNDER_WAY_MAX: Result<u64, NotApplicable> =
        Err(NotApplicable("the device puts pages into memory; no thread of the destination could be slow at it"));

    fn missing() -> Option<String> {
        addresses(&settings()).err()
    }

    async fn start(mut settings: ToySettings) -> Self {
        let allow = Arc::new(RwLock::new(AllowList::new(&["0.0.0.0/0"]).unwrap().0));
        let listener = listen(&allow);
        settings.fabric = Some(listener.fabric());
        let control = Control::start(settings).await;
        let (address, stop) = (listener.local_address(), Cancel::new());
        tokio::spawn(listener.serve(control.toy().sessions.clone(), stop.clone()));
        LIVE.fetch_add(1, Ordering::SeqCst);
        Rdma { control, address, stop }
    }

    fn toy(&self) -> &Toy {
        self.control.toy()
    }

    fn link(&self, sender: &Sender) -> Arc<dyn Link> {
        Arc::new(RdmaLink::new(self.control.link(sender), self.address, settings()))
    }

    async fn wire(&self, sender: &Sender) -> Arc<dyn Wire> {
        let control = self.control.wire(sender).await;
        let link = Arc::new(RdmaLink::new(control.link(), self.address, settings()));
        Arc::new(RdmaWire { link, control })
    }

    fn assert_clean(&self) {
        // The counters are the process's: they say something only while no other trial goes on in it.
        let alone = || LIVE.load(Ordering::SeqCst) == 1;
        for _ in 0..300 {
            if !alone() || counters::alive() == counters::Counts::default() {
                return;
            }
            std::thread::sleep(Duration::from_millis(10));
        }
        assert!(!alone(), "left behind: {:?}", counters::alive());
    }
}

/// Harm is done to the control channel; queue pairs go past every socket, and end with it.
struct RdmaWire {
    link: Arc<dyn Link>,
    control: Arc<dyn Wire>,
}

impl Wire for RdmaWire {
    fn link(&self) -> Arc<dyn Link> {
        self.link.clone()
    }
    fn cut(&self) {
        self.control.cut();
    }
    fn freeze(&self) {
        self.control.freeze();
    }
    fn mend(&self) {
        self.control.mend();
    }
    fn cut_after(&self, stream: Stream, direction: Direction, bytes: u64) -> Result<(), NotApplicable> {
        if stream != Stream::Control {
            return Err(NotApplicable("lanes are queue pairs, which no proxy can stand in; tests/rdma.rs breaks them"));
        }
        self.control.cut_after(stream, direction, bytes)
    }
    fn carried(&self, stream: Stream, direction: Direction) -> u64 {
        self.control.carried(stream, direction)
    }
    fn record(&self) -> Result<(), NotApplicable> {
        self.control.record()
    }
    fn recorded(&self) -> (Vec<u8>, Vec<u8>) {
        self.control.recorded()
    }
}
