//! RDMA at both ends of a measured path: the link's parts as `limosa_link::rdma` has them, and a fabric that notes how long
//! registering the destination's memory takes.

use anyhow::{Result, anyhow};
use limosa_link::rdma::{self, RdmaLink, RdmaListener, RdmaSettings, RdmaWork};
use limosa_link::sessions::Sessions;
use limosa_link::{Cancel, Exposed, ExposedError, Exposure, Fabric, HostError, Link};
use limosa_proto::allow::AllowList;
use limosa_proto::wire::offer::MemoryKey;
use std::net::SocketAddr;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, RwLock};
use std::time::Instant;

/// Time that a destination spent on registering memory, in nanoseconds.
#[derive(Debug, Clone, Default)]
pub(crate) struct Registering(Arc<AtomicU64>);

impl Registering {
    /// Seconds since the last call, where there were any.
    #[allow(clippy::cast_precision_loss, reason = "nanoseconds of a benchmark")]
    pub(crate) fn take(&self) -> Option<f64> {
        let ns = self.0.swap(0, Ordering::Relaxed);
        (ns > 0).then_some(ns as f64 / 1e9)
    }

    fn time<T>(&self, work: impl FnOnce() -> T) -> T {
        let start = Instant::now();
        let done = work();
        self.0.fetch_add(u64::try_from(start.elapsed().as_nanos()).unwrap_or(u64::MAX), Ordering::Relaxed);
        done
    }
}

/// A destination that takes queue pairs.
pub(crate) struct Listening {
    pub(crate) address: SocketAddr,
    pub(crate) device: Option<(String, u32)>,
    pub(crate) fabric: Arc<dyn Fabric>,
    listener: RdmaListener,
}

impl Listening {
    /// Must be called within a tokio runtime; ends with it.
    pub(crate) fn serve(self, sessions: Sessions) {
        tokio::spawn(self.listener.serve(sessions, Cancel::new()));
    }
}

fn settings(trusted: &[String]) -> Result<RdmaSettings, String> {
    let trusted_fabric = AllowList::new(trusted).map_err(|error| error.to_string())?.0;
    Ok(RdmaSettings { trusted_fabric, ..RdmaSettings::default() })
}

/// Opens the port on `address`, or says why there is no RDMA.
pub(crate) fn listen(
    address: SocketAddr,
    trusted: &[String],
    allow: Arc<RwLock<AllowList>>,
    registering: Registering,
) -> Result<Listening, String> {
    let settings = settings(trusted)?;
    rdma::addresses(&settings)?;
    let listener = RdmaListener::bind(address, settings, allow).map_err(|error| error.to_string())?;
    let fabric: Arc<dyn Fabric> = Arc::new(Timed { fabric: listener.fabric(), registering });
    Ok(Listening { address: listener.local_address(), device: device(address), fabric, listener })
}

/// The source's side, and what its lanes ask of the device.
///
/// # Errors
/// The networks are none.
pub(crate) fn link(control: Arc<dyn Link>, to: SocketAddr, trusted: &[String]) -> Result<(Arc<dyn Link>, Arc<RdmaWork>)> {
    let link = RdmaLink::new(control, to, settings(trusted).map_err(|words| anyhow!(words))?);
    let work = link.work();
    Ok((Arc::new(link), work))
}

/// The device that has `address`, and the index of its RoCE v2 GID: perftest and async-rdma must be told.
fn device(address: SocketAddr) -> Option<(String, u32)> {
    let wanted = match address.ip() {
        std::net::IpAddr::V4(ip) => ip.to_ipv6_mapped(),
        std::net::IpAddr::V6(ip) => ip,
    };
    let names = |path: &str| -> Vec<String> {
        let entries = std::fs::read_dir(path).into_iter().flatten().flatten();
        entries.map(|entry| entry.file_name().to_string_lossy().into_owned()).collect()
    };
    let root = "/sys/class/infiniband";
    for name in names(root) {
        let gids = format!("{root}/{name}/ports/1/gids");
        for index in names(&gids) {
            let read = |path: String| std::fs::read_to_string(path).unwrap_or_default();
            let kind = read(format!("{root}/{name}/ports/1/gid_attrs/types/{index}"));
            let found = read(format!("{gids}/{index}")).trim().parse::<std::net::Ipv6Addr>().is_ok_and(|gid| gid == wanted);
            if let (true, true, Ok(index)) = (found, kind.contains("v2"), index.parse()) {
                return Some((name, index));
            }
        }
    }
    None
}

/// A fabric with a clock.
struct Timed {
    fabric: Arc<dyn Fabric>,
    registering: Registering,
}

impl Fabric for Timed {
    fn link(&self) -> &'static str {
        self.fabric.link()
    }
    fn expose(&self, exposure: Exposure) -> Result<Box<dyn Exposed>, HostError> {
        let exposed = self.registering.time(|| self.fabric.expose(exposure))?;
        Ok(Box::new(TimedMemory { exposed, registering: self.registering.clone() }))
    }
}

struct TimedMemory {
    exposed: Box<dyn Exposed>,
    registering: Registering,
}

impl Exposed for TimedMemory {
    fn open(&self, chunk: u32) -> Result<MemoryKey, HostError> {
        self.registering.time(|| self.exposed.open(chunk))
    }
    fn close(&self) -> Result<(), ExposedError> {
        self.registering.time(|| self.exposed.close())
    }
}
