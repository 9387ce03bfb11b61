//! Devices: listing them, opening one, and what it can do. Ports and addresses for people are in `inventory.rs`.
//!
//! Soundness: a device pointer is used only while the list that it came from is not freed; a context keeps what it needs
//! of its device for itself. The context's own watcher thread uses the raw context, and is joined before that is closed.

use crate::error::NoRdma;
use crate::faults::{Fault, Faults, Watcher};
use crate::inventory;
use crate::library::Library;
use crate::sysfs;
use nix::errno::Errno;
use nix::unistd::{AccessFlags, access};
use rdma_sys::{ibv_context, ibv_device, ibv_device_attr, ibv_device_attr_ex, ibv_transport_type};
use serde::Serialize;
use std::ffi::{CStr, c_int};
use std::io;
use std::mem;
use std::net::IpAddr;
use std::path::{Path, PathBuf};
use std::ptr::{self, NonNull};
use std::sync::Arc;

/// `IBV_ODP_SUPPORT` and `IBV_ODP_SUPPORT_WRITE` of libibverbs.
const ODP_SUPPORT: u64 = 1;
const ODP_SUPPORT_SEND: u32 = 1;
const ODP_SUPPORT_RECEIVE: u32 = 1 << 1;
const ODP_SUPPORT_WRITE: u32 = 1 << 2;

/// What a device can do at most.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct DeviceLimits {
    /// The version of its firmware; empty for a soft device.
    pub firmware: String,
    /// Number of ports.
    pub ports: u8,
    /// Memory regions.
    pub regions_max: u64,
    /// Bytes of one memory region.
    pub region_bytes_max: u64,
    /// Queue pairs.
    pub pairs_max: u64,
    /// Work requests of one direction of a queue pair.
    pub work_requests_max: u64,
    /// Entries of one completion queue.
    pub queue_entries_max: u64,
}

/// On-demand paging: whether memory must be pinned to be registered.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize)]
pub struct OnDemand {
    /// Whether the device has it at all.
    pub supported: bool,
    /// Whether sends, receives and writes of reliable connections may use memory registered so.
    pub reliable: bool,
}

/// A device as it is listed, not opened.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Listed {
    pub(crate) name: String,
    pub(crate) guid: u64,
    /// Its file: `/dev/infiniband/uverbs0`.
    pub(crate) file: PathBuf,
    pub(crate) iwarp: bool,
}

/// An open device, without anything that watches it.
#[derive(Debug)]
pub(crate) struct Opened {
    raw: NonNull<ibv_context>,
    library: &'static Library,
}

// SAFETY: libibverbs may be called from any thread, and the object is destroyed once, by drop.
unsafe impl Send for Opened {}
// SAFETY: as above: no function that takes a context needs it for itself.
unsafe impl Sync for Opened {}

/// An open device. Whatever is made on it keeps it open.
#[derive(Debug)]
pub struct Context {
    // Before `opened`: the watcher uses it, and fields are dropped in this order.
    _watcher: Watcher,
    opened: Opened,
    name: String,
    limits: DeviceLimits,
    on_demand: OnDemand,
    faults: Arc<Faults>,
}

impl Context {
    /// Opens the device of that name, such as `mlx5_0` or `rxe0`.
    ///
    /// # Errors
    /// No RDMA on this host, no such device, or no right to open it.
    pub fn open(name: &str) -> Result<Arc<Context>, NoRdma> {
        let library = Library::load()?;
        let (listed, opened) = open(library, name)?;
        if listed.iwarp {
            return Err(NoRdma::Iwarp(listed.name));
        }
        let (limits, on_demand) = opened.limits().map_err(|error| failed(&listed.name, "ibv_query_device", error))?;
        let faults = Arc::new(Faults::default());
        let watcher = Watcher::start(library, opened.raw, Arc::clone(&faults))
            .map_err(|error| failed(&listed.name, "watching for its events", error))?;
        Ok(Arc::new(Context { _watcher: watcher, opened, name: listed.name, limits, on_demand, faults }))
    }

    /// Opens the device that has `local` among its addresses (GIDs).
    ///
    /// # Errors
    /// As [`Context::open`]; [`NoRdma::NoDeviceFor`].
    pub fn open_for(local: IpAddr) -> Result<Arc<Context>, NoRdma> {
        let library = Library::load()?;
        let devices = list(library)?;
        let has =
            |device: &&Listed| sysfs::gids(Path::new(sysfs::ROOT), &device.name).any(|gid| gid.address() == local.to_canonical());
        match devices.iter().find(has) {
            Some(device) => Context::open(&device.name),
            None => Err(NoRdma::NoDeviceFor(local)),
        }
    }

    /// Opens all devices that can be used. Those that speak iWARP are left out.
    ///
    /// # Errors
    /// As [`Context::open`]; the first device that cannot be opened decides. The list is never empty.
    pub fn open_all() -> Result<Vec<Arc<Context>>, NoRdma> {
        let devices = list(Library::load()?)?;
        let usable: Vec<&Listed> = devices.iter().filter(|device| !device.iwarp).collect();
        match (usable.is_empty(), devices.first()) {
            (true, Some(device)) => Err(NoRdma::Iwarp(device.name.clone())),
            _ => usable.iter().map(|device| Context::open(&device.name)).collect(),
        }
    }

    /// The device's name.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// What it can do at most.
    pub fn limits(&self) -> &DeviceLimits {
        &self.limits
    }

    /// Whether it has on-demand paging.
    pub fn on_demand(&self) -> OnDemand {
        self.on_demand
    }

    /// What happened to the whole device: it then does no work any more.
    pub fn fault(&self) -> Option<Fault> {
        self.faults.of_device()
    }

    /// The bytes of a packet's payload that a port takes, as things are.
    pub(crate) fn port_mtu(&self, port: u8) -> io::Result<u32> {
        inventory::port_mtu(&self.opened, port)
    }

    pub(crate) fn faults(&self) -> &Arc<Faults> {
        &self.faults
    }

    pub(crate) fn library(&self) -> &'static Library {
        self.opened.library
    }

    pub(crate) fn raw(&self) -> *mut ibv_context {
        self.opened.raw.as_ptr()
    }
}

impl Opened {
    pub(crate) fn raw(&self) -> *mut ibv_context {
        self.raw.as_ptr()
    }

    pub(crate) fn library(&self) -> &'static Library {
        self.library
    }

    /// What the device says of itself. The extended question, where the device has it, also tells of on-demand paging.
    pub(crate) fn limits(&self) -> io::Result<(DeviceLimits, OnDemand)> {
        // SAFETY: a plain C struct of numbers and arrays of them, for which zeros are a valid value.
        let mut extended: ibv_device_attr_ex = unsafe { mem::zeroed() };
        let question = self.extended(|operations| operations.query_device_ex);
        let answered = question.is_some_and(|question| {
            let bytes = size_of::<ibv_device_attr_ex>();
            // SAFETY: the context is open, no input is given, and the answer has room for the size that is named.
            let code = unsafe { question(self.raw.as_ptr(), ptr::null(), &raw mut extended, bytes) };
            code == 0
        });
        if !answered {
            // SAFETY: the context is open, and the answer is a live struct of the type that is asked for.
            let code = unsafe { (self.library.verbs.ibv_query_device)(self.raw.as_ptr(), &raw mut extended.orig_attr) };
            if code != 0 {
                return Err(io::Error::from_raw_os_error(code));
            }
        }
        let reliable = extended.odp_caps.per_transport_caps.rc_odp_caps;
        let wanted = ODP_SUPPORT_SEND | ODP_SUPPORT_RECEIVE | ODP_SUPPORT_WRITE;
        let supported = extended.odp_caps.general_caps & ODP_SUPPORT != 0;
        let on_demand = OnDemand { supported, reliable: supported && reliable & wanted == wanted };
        Ok((limits(&extended.orig_attr), on_demand))
    }

    /// One of the operations of a context that newer headers added; `None` if the library that runs is older.
    pub(crate) fn extended<T>(&self, operation: impl Fn(&rdma_sys::verbs_context) -> Option<T>) -> Option<T> {
        // SAFETY: the context is open; the function looks at a marker in it.
        let extended = unsafe { rdma_sys::verbs_get_ctx(self.raw.as_ptr()) }?;
        // SAFETY: the marker says that the context is the tail of a `verbs_context`, which lives as long.
        let size = unsafe { (*extended).sz };
        // New operations are added at the front: one of a smaller size lacks those that these headers know.
        if size < size_of::<rdma_sys::verbs_context>() {
            return None;
        }
        // SAFETY: as above, and it is as large as the type.
        operation(unsafe { &*extended })
    }
}

impl Drop for Opened {
    fn drop(&mut self) {
        // SAFETY: whatever was made on the context kept it open, so nothing is left; it is not used after.
        let code = unsafe { (self.library.verbs.ibv_close_device)(self.raw.as_ptr()) };
        if code != 0 {
            tracing::warn!(error = %io::Error::last_os_error(), "an RDMA device cannot be closed");
        }
    }
}

fn limits(attributes: &ibv_device_attr) -> DeviceLimits {
    let firmware = attributes.fw_ver.iter().take_while(|byte| **byte != 0).map(|byte| char::from(byte.to_ne_bytes()[0]));
    let number = |value: c_int| u64::try_from(value).unwrap_or(0);
    DeviceLimits {
        firmware: firmware.collect(),
        ports: attributes.phys_port_cnt,
        regions_max: number(attributes.max_mr),
        region_bytes_max: attributes.max_mr_size,
        pairs_max: number(attributes.max_qp),
        work_requests_max: number(attributes.max_qp_wr),
        queue_entries_max: number(attributes.max_cqe),
    }
}

/// The devices of this host; at least one.
pub(crate) fn list(library: &'static Library) -> Result<Vec<Listed>, NoRdma> {
    let devices: Vec<Listed> = each(library, |_, listed| listed)?;
    if devices.is_empty() { Err(NoRdma::NoDevice) } else { Ok(devices) }
}

/// Opens the device of that name.
pub(crate) fn open(library: &'static Library, name: &str) -> Result<(Listed, Opened), NoRdma> {
    let mut have = Vec::new();
    let opened = each(library, |device, listed| {
        have.push(listed.name.clone());
        if listed.name != name {
            return None;
        }
        // SAFETY: the device's list is not freed before `each` ends.
        let raw = unsafe { (library.verbs.ibv_open_device)(device) };
        Some(match NonNull::new(raw) {
            Some(raw) => Ok((listed, Opened { raw, library })),
            None => Err(not_opened(listed, io::Error::last_os_error())),
        })
    })?;
    match opened.into_iter().flatten().next() {
        Some(result) => result,
        None if have.is_empty() => Err(NoRdma::NoDevice),
        None => Err(NoRdma::NoSuchDevice { name: name.to_owned(), have: have.join(", ") }),
    }
}

/// Calls `look` for each device while the list of them is there.
fn each<T>(library: &'static Library, mut look: impl FnMut(*mut ibv_device, Listed) -> T) -> Result<Vec<T>, NoRdma> {
    let mut count: c_int = 0;
    // SAFETY: the function writes one number and gives a list that is freed below.
    let devices = unsafe { (library.verbs.ibv_get_device_list)(&raw mut count) };
    if devices.is_null() {
        let error = io::Error::last_os_error();
        return Err(match error.raw_os_error() {
            Some(libc::ENOSYS) => NoRdma::NotSupported,
            _ => failed("this host", "ibv_get_device_list", error),
        });
    }
    let mut seen = Vec::new();
    for index in 0..usize::try_from(count).unwrap_or(0) {
        // SAFETY: the list has `count` entries.
        let entry = unsafe { devices.add(index) };
        // SAFETY: the entry is in the list, which is not freed yet.
        let device = unsafe { *entry };
        if device.is_null() {
            break;
        }
        seen.push(look(device, listed(library, device)));
    }
    // SAFETY: the list came from ibv_get_device_list, and no device in it is used after.
    unsafe { (library.verbs.ibv_free_device_list)(devices) };
    Ok(seen)
}

fn listed(library: &'static Library, device: *mut ibv_device) -> Listed {
    // SAFETY: the caller's list is not freed yet.
    let guid = u64::from_be(unsafe { (library.verbs.ibv_get_device_guid)(device) });
    // SAFETY: as above; the field is an array of characters that ends with a zero.
    let file = text(unsafe { (&raw const (*device).dev_name).cast() });
    // SAFETY: as above; the field is a number.
    let transport = unsafe { (*device).transport_type };
    let iwarp = transport == ibv_transport_type::IBV_TRANSPORT_IWARP;
    Listed { name: name(library, device), guid, file: Path::new("/dev/infiniband").join(file), iwarp }
}

/// The name of a device that is listed or open.
pub(crate) fn name(library: &'static Library, device: *mut ibv_device) -> String {
    // SAFETY: the caller's device is listed or open, and the function only reads it.
    text(unsafe { (library.verbs.ibv_get_device_name)(device) })
}

fn text(start: *const std::ffi::c_char) -> String {
    if start.is_null() {
        return String::new();
    }
    // SAFETY: both callers pass text of a living device that ends with a zero.
    unsafe { CStr::from_ptr(start) }.to_string_lossy().into_owned()
}

fn failed(device: &str, call: &'static str, error: io::Error) -> NoRdma {
    NoRdma::Device { device: device.to_owned(), call, error }
}

fn not_opened(listed: Listed, error: io::Error) -> NoRdma {
    if is_denied(&listed.file) {
        return NoRdma::NotPermitted { path: listed.file };
    }
    failed(&listed.name, "ibv_open_device", error)
}

/// Whether the file is there and may not be opened. The libraries look for it elsewhere then, and say that it is not there.
pub(crate) fn is_denied(file: &Path) -> bool {
    matches!(access(file, AccessFlags::R_OK | AccessFlags::W_OK), Err(Errno::EACCES | Errno::EPERM))
}
