//! What the tests on a device stand on: one device, two connected ends of it in this process, and that nothing is left at the
//! end. No test is in here.

use limosa_verbs::{
    Access, ConnectError, ConnectRequest, Context, GidKind, Handshake, Inventory, Listener, Mapping, MemoryRegion, NoRdma,
    PairSettings, Piece, PortState, Prepared, ProtectionDomain, QueuePair, Receive, Resolved, Status, counters,
};
use std::net::{IpAddr, SocketAddr};
use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

#[path = "../../../../tests/rig/skip.rs"]
#[allow(unreachable_pub)]
pub(crate) mod skip;

/// Far longer than anything takes, also in an emulated machine.
pub(crate) const LONG: Duration = Duration::from_secs(60);

/// Tests take turns: they count what is alive in this process.
static TURN: Mutex<()> = Mutex::new(());

/// The device under test.
pub(crate) struct Device {
    pub(crate) context: Arc<Context>,
    pub(crate) address: IpAddr,
}

/// Runs a test on this host's device, and holds that it leaves nothing; says so and returns if there is none.
pub(crate) fn on_device(test: impl AsyncFnOnce(&Device)) {
    let _turn = TURN.lock().unwrap_or_else(PoisonError::into_inner);
    let device = match device() {
        Ok(device) => device,
        Err(NoRdma::NotSupported | NoRdma::NoDevice) if !Path::new("/sys/class/infiniband").exists() => {
            return skip::skip_for_the_lab("no RDMA device here");
        }
        Err(error) => return skip::skip(&format!("no RDMA device here: {error}")),
    };
    assert_eq!(counters::alive(), counters::Counts::default(), "left by an earlier test");
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap();
    runtime.block_on(async { tokio::time::timeout(2 * LONG, test(&device)).await.expect("the test hangs") });
    drop(runtime);
    assert_eq!(counters::alive(), counters::Counts::default(), "the test left something");
}

fn device() -> Result<Device, NoRdma> {
    // First, for its error.
    let context = Context::open_all()?;
    drop(context);
    let inventory = Inventory::take();
    let ports = inventory.devices.iter().flat_map(|device| &device.ports);
    let gids = ports.filter(|port| port.state == PortState::Active).flat_map(|port| &port.gids);
    let usable = gids.filter(|gid| gid.kind == GidKind::RoceV2).map(limosa_verbs::GidReport::address);
    let address = usable.into_iter().find(IpAddr::is_ipv4).ok_or(NoRdma::NoDevice)?;
    Ok(Device { context: Context::open_for(address)?, address })
}

/// How two ends are connected.
#[derive(Clone)]
pub(crate) struct Plan {
    pub(crate) source: PairSettings,
    pub(crate) destination: PairSettings,
    pub(crate) connect: Handshake,
    pub(crate) accept: Handshake,
}

impl Default for Plan {
    fn default() -> Plan {
        let destination = PairSettings { remote_write: true, ..PairSettings::default() };
        Plan { source: PairSettings::default(), destination, connect: Handshake::default(), accept: Handshake::default() }
    }
}

/// Two connected ends; the destination has memory to write to and receives posted.
pub(crate) struct Ends {
    pub(crate) source: QueuePair,
    pub(crate) destination: QueuePair,
    /// The source's memory, readable for its device.
    pub(crate) from: Arc<MemoryRegion>,
    /// The destination's memory, writable for the source.
    pub(crate) to: Arc<MemoryRegion>,
    /// The destination's memory for messages.
    pub(crate) inbox: Arc<MemoryRegion>,
}

/// Bytes of each of the three regions.
pub(crate) const BYTES: u64 = 1 << 20;
/// Bytes of one message's place in the inbox.
pub(crate) const SLOT: u32 = 4096;

impl Device {
    pub(crate) fn domain(&self) -> Arc<ProtectionDomain> {
        ProtectionDomain::new(&self.context).unwrap()
    }

    pub(crate) fn listener(&self) -> Listener {
        Listener::bind(SocketAddr::new(self.address, 0), 8).unwrap()
    }

    /// The source's way to a listener.
    pub(crate) async fn resolve(&self, listener: &Listener) -> Resolved {
        let resolved = Resolved::resolve(listener.address(), None, LONG).await.unwrap();
        assert_eq!(resolved.device(), self.context.name());
        resolved
    }

    pub(crate) async fn connect(&self, plan: &Plan, receives: u32) -> Ends {
        let mut listener = self.listener();
        let resolved = self.resolve(&listener).await;
        let (near, far) = (self.domain(), self.domain());
        let from = region(&near, Access::default());
        let to = region(&far, Access { remote_write: true, ..Access::default() });
        let inbox = region(&far, Access { local_write: true, ..Access::default() });
        let prepared = resolved.prepare(&near, &plan.source).unwrap();
        let connecting = tokio::spawn(establish(prepared, plan.connect.clone()));
        let request = listener.next().await.unwrap();
        let mut prepared = request.prepare(&far, &plan.destination).unwrap();
        let receives: Vec<Receive<'_>> = (0..receives).map(|place| slot(&inbox, place)).collect();
        prepared.post_receives(&receives).unwrap();
        let destination = prepared.establish(&plan.accept, LONG).await.unwrap();
        let source = connecting.await.unwrap().unwrap();
        Ends { source, destination, from, to, inbox }
    }
}

pub(crate) async fn establish(prepared: Prepared, handshake: Handshake) -> Result<QueuePair, ConnectError> {
    prepared.establish(&handshake, LONG).await
}

/// Starts to connect to `listener`, and gives its request with the task that connects.
pub(crate) async fn knock(
    device: &Device,
    listener: &mut Listener,
    handshake: Handshake,
) -> (ConnectRequest, tokio::task::JoinHandle<Result<QueuePair, ConnectError>>) {
    let resolved = device.resolve(listener).await;
    let prepared = resolved.prepare(&device.domain(), &PairSettings::default()).unwrap();
    let connecting = tokio::spawn(establish(prepared, handshake));
    (listener.next().await.unwrap(), connecting)
}

pub(crate) fn slot(inbox: &Arc<MemoryRegion>, place: u32) -> Receive<'_> {
    let piece = Piece { region: inbox, offset: u64::from(place) * u64::from(SLOT), bytes: SLOT };
    Receive { into: Some(piece), id: place.into() }
}

/// A region over all of a new mapping.
pub(crate) fn region(domain: &Arc<ProtectionDomain>, access: Access) -> Arc<MemoryRegion> {
    let mapping = Mapping::anonymous(BYTES).unwrap();
    MemoryRegion::register(domain, &mapping, 0..BYTES, access).unwrap()
}

/// Waits for `count` completions of any kind.
pub(crate) async fn completions(pair: &mut QueuePair, count: usize) -> Vec<limosa_verbs::Completion> {
    let mut all = Vec::new();
    while all.len() < count {
        all.extend_from_slice(pair.completions(LONG).await.unwrap());
    }
    all
}

/// Waits for one completion, and gives its status.
pub(crate) async fn status(pair: &mut QueuePair) -> Status {
    completions(pair, 1).await[0].status
}

/// Bytes that differ from place to place.
pub(crate) fn pattern(bytes: usize, salt: u64) -> Vec<u8> {
    (0..bytes as u64).map(|at| (at.wrapping_mul(2_654_435_761).wrapping_add(salt) >> 7) as u8).collect()
}

pub(crate) fn bytes_of(region: &MemoryRegion, offset: u64, bytes: usize) -> Vec<u8> {
    let mut seen = vec![0; bytes];
    region.mapping().read_at(offset, &mut seen).unwrap();
    seen
}
