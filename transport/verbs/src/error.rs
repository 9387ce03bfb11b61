//! Why there is no RDMA here, and what can go wrong while handles are made and connected. Errors of work requests are in
//! `post.rs`, `completion.rs` and `wait.rs`, those of memory in `region.rs`.

use std::io;
use std::net::SocketAddr;
use std::path::PathBuf;
use thiserror::Error;

/// Why this host, or this process, cannot use RDMA. The words say what to do.
#[derive(Debug, Error)]
pub enum NoRdma {
    /// A library could not be loaded.
    #[error("no RDMA: the library {library} cannot be loaded ({said}): install {package} (Debian, Ubuntu) or rdma-core")]
    LibraryMissing {
        /// Its file name.
        library: &'static str,
        /// What the dynamic linker said.
        said: String,
        /// The package to install.
        package: &'static str,
    },
    /// A library is there, but too old.
    #[error("no RDMA: the library {library} has no function {function}: it is too old, install rdma-core 28 or newer")]
    SymbolMissing {
        /// Its file name.
        library: &'static str,
        /// What it lacks.
        function: &'static str,
    },
    /// The kernel has no verbs for user space.
    #[error("no RDMA: this kernel gives no verbs to programs: load the module (modprobe ib_uverbs), if the kernel has it")]
    NotSupported,
    /// There are verbs, and no device.
    #[error(
        "no RDMA: this host has no RDMA device: load its driver, or make a soft one \
         (modprobe rdma_rxe; rdma link add rxe0 type rxe netdev INTERFACE)"
    )]
    NoDevice,
    /// There is no device of that name.
    #[error("no RDMA device is called {name}: this host has {have}")]
    NoSuchDevice {
        /// What was asked for.
        name: String,
        /// What there is.
        have: String,
    },
    /// No device has that address.
    #[error("no RDMA device of this host has the address {0}: `limosa host show` lists the addresses (GIDs) of each device")]
    NoDeviceFor(std::net::IpAddr),
    /// The kernel has no connection manager for user space.
    #[error("no RDMA: /dev/infiniband/rdma_cm is not there: load the connection manager (modprobe rdma_ucm)")]
    NoConnectionManager,
    /// A device file may not be opened.
    #[error(
        "no RDMA: this process may not open {}: run it as a user, or in a group, that may read and write that file \
         (a udev rule such as KERNEL==\"uverbs*\", GROUP=\"rdma\", MODE=\"0660\")",
        path.display()
    )]
    NotPermitted {
        /// The file.
        path: PathBuf,
    },
    /// The device speaks iWARP.
    #[error("the RDMA device {0} speaks iWARP, which is not supported: use a RoCE or InfiniBand device")]
    Iwarp(String),
    /// Anything else.
    #[error("no RDMA: {call} on {device} failed: {error}")]
    Device {
        /// The device, or "this host".
        device: String,
        /// The function that failed.
        call: &'static str,
        /// What it said.
        error: io::Error,
    },
}

/// Why a protection domain, a completion queue or a queue pair could not be made.
#[derive(Debug, Error)]
pub enum CreateError {
    /// More than the device has.
    #[error("{what} of {asked} is more than the device {device} can do ({limit}): set it lower")]
    OverLimit {
        /// The device.
        device: String,
        /// Which setting.
        what: &'static str,
        /// As asked for.
        asked: u64,
        /// As the device says.
        limit: u64,
    },
    /// The device, or the memory that this process may lock, is used up.
    #[error(
        "{call} on {device} failed: {error}: the device has no more of them, or this process may not lock more memory \
         (see `ulimit -l`)"
    )]
    NoMemory {
        /// The device.
        device: String,
        /// The function that failed.
        call: &'static str,
        /// What it said.
        error: io::Error,
    },
    /// Anything else.
    #[error("{call} on {device} failed: {error}")]
    Failed {
        /// The device.
        device: String,
        /// The function that failed.
        call: &'static str,
        /// What it said.
        error: io::Error,
    },
}

impl CreateError {
    pub(crate) fn of(device: &str, call: &'static str, error: io::Error) -> CreateError {
        let device = device.to_owned();
        match error.raw_os_error() {
            Some(libc::ENOMEM | libc::ENOSPC | libc::EAGAIN) => CreateError::NoMemory { device, call, error },
            _ => CreateError::Failed { device, call, error },
        }
    }
}

/// Why there is no listener, or no longer.
#[derive(Debug, Error)]
pub enum ListenError {
    /// No RDMA on this host.
    #[error(transparent)]
    NoRdma(#[from] NoRdma),
    /// The address cannot be had.
    #[error("cannot listen for RDMA connections on {address}: {call}: {error}{}", bind_words(error))]
    Bind {
        /// The address.
        address: SocketAddr,
        /// The function that failed.
        call: &'static str,
        /// What it said.
        error: io::Error,
    },
    /// The event channel broke.
    #[error("listening for RDMA connections failed: {0}")]
    Io(#[from] io::Error),
}

/// Why a queue pair could not be prepared for a connection.
#[derive(Debug, Error)]
pub enum PrepareError {
    /// The connection goes over another device than the protection domain is on.
    #[error(
        "the connection goes over the RDMA device {connection}, but the memory is registered with {domain}: \
         all lanes of a migration must use one device"
    )]
    OtherDevice {
        /// The connection's device.
        connection: String,
        /// The protection domain's device.
        domain: String,
    },
    /// The queue pair or its completion queue was not made.
    #[error(transparent)]
    Create(#[from] CreateError),
    /// The connection manager refused.
    #[error("preparing an RDMA connection failed: {call}: {error}")]
    Manager {
        /// The function that failed.
        call: &'static str,
        /// What it said.
        error: io::Error,
    },
}

/// Why a connection did not come to be.
#[derive(Debug, Error)]
pub enum ConnectError {
    /// No RDMA on this host.
    #[error(transparent)]
    NoRdma(#[from] NoRdma),
    /// The other side said no.
    #[error("{peer} refused the RDMA connection (with {} bytes that say why)", private_data.len())]
    Rejected {
        /// Who.
        peer: SocketAddr,
        /// What it said; empty if nothing.
        private_data: Vec<u8>,
    },
    /// The other side has no listener on that port.
    #[error("nobody listens for RDMA connections on {0}: is the agent running there, with RDMA?")]
    NobodyListens(SocketAddr),
    /// The connection manager of the other host refused.
    #[error("the connection manager of {peer} refused the RDMA connection: reason {reason}{}", reject_words(*reason))]
    Refused {
        /// Who.
        peer: SocketAddr,
        /// The reason's number in the InfiniBand specification, volume 1, 12.6.7.2; for iWARP and others an errno.
        reason: i32,
    },
    /// No device reaches that address.
    #[error(
        "no RDMA device of this host reaches {peer} ({error}): the interface with the route to it has no RDMA device, or the \
         device is down (see `rdma link` and `ip route get`)"
    )]
    NoDeviceFor {
        /// The address.
        peer: SocketAddr,
        /// What the kernel said.
        error: io::Error,
    },
    /// Nothing came back.
    #[error("{peer} cannot be reached by RDMA: {step}: {error}{}", path_words())]
    Unreachable {
        /// Who.
        peer: SocketAddr,
        /// What was being done.
        step: &'static str,
        /// What the kernel said.
        error: io::Error,
    },
    /// It took too long.
    #[error("no RDMA connection with {peer} in {} ms: {step} took too long{}", waited.as_millis(), path_words())]
    TimedOut {
        /// Who.
        peer: SocketAddr,
        /// What was being done.
        step: &'static str,
        /// How long.
        waited: std::time::Duration,
    },
    /// The other side's packets are longer than this side's port takes.
    #[error(
        "the RDMA connection with {peer} would use packets of {agreed} bytes, but the port here takes {here} only: give the \
         interfaces of both hosts the same MTU (ip link set INTERFACE mtu N)"
    )]
    MtuMismatch {
        /// Who.
        peer: SocketAddr,
        /// Bytes of a packet's payload that the connection managers agreed on.
        agreed: u32,
        /// Bytes of a packet's payload that this side's port takes.
        here: u32,
    },
    /// The peer ended the connection while it was being made.
    #[error("{0} ended the RDMA connection while it was being made")]
    Disconnected(SocketAddr),
    /// The device is gone.
    #[error("the RDMA device by which {0} was reached was removed")]
    DeviceRemoved(SocketAddr),
    /// The caller's data does not fit.
    #[error("{bytes} bytes of private data do not fit into the handshake: at most {max}")]
    TooMuchPrivateData {
        /// As given.
        bytes: usize,
        /// The limit.
        max: usize,
    },
    /// The queue pair could not be brought into a state.
    #[error("the queue pair with {peer} cannot be made {state}: {error}{}", mtu_words(error))]
    State {
        /// Who.
        peer: SocketAddr,
        /// The state.
        state: &'static str,
        /// What the device said.
        error: io::Error,
    },
    /// Anything else.
    #[error("the RDMA connection with {peer} failed: {call}: {error}")]
    Failed {
        /// Who.
        peer: SocketAddr,
        /// The function that failed.
        call: &'static str,
        /// What it said.
        error: io::Error,
    },
}

/// For a port that is taken the kernel says either of two things.
fn bind_words(error: &io::Error) -> &'static str {
    match error.raw_os_error() {
        Some(libc::EADDRINUSE | libc::EADDRNOTAVAIL) => {
            " (is the port in use by another RDMA program on this host, or is the address not one of this host's?)"
        }
        Some(libc::ENODEV) => " (no RDMA device has this address)",
        _ => "",
    }
}

/// The reasons that a person can do something about.
fn reject_words(reason: i32) -> &'static str {
    match reason {
        1..=6 => " (it has no resources left: fewer lanes, or fewer other connections)",
        10 => " (a connection of the same queue pair number is not over yet: try again)",
        12..=19 => " (it does not know this host's address: compare the GIDs of both, `limosa host show`)",
        26 => " (the path MTU does not fit: give both interfaces the same MTU)",
        _ => "",
    }
}

fn path_words() -> &'static str {
    " (is the host up, does the fabric pass RoCE (UDP port 4791), do both hosts have GIDs of the same kind, see `limosa host show`?)"
}

fn mtu_words(error: &io::Error) -> &'static str {
    if error.raw_os_error() == Some(libc::EINVAL) {
        " (the device refuses what the two connection managers agreed on: compare MTU and GID kind of both, `limosa host show`)"
    } else {
        ""
    }
}
