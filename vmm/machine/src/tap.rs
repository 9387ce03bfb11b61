//! TAP interfaces: opened, put on a bridge, set up. Not the frames that pass through: that is `devices/net.rs`.
//!
//! Soundness: each ioctl here takes an `ifreq` (or an int) that lives on this stack until the call returns, and a
//! descriptor that is open; the kernel keeps no pointer to it.

use std::fs::{File, OpenOptions};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::OpenOptionsExt;

use nix::sys::socket::{AddressFamily, SockFlag, SockType, socket};

use crate::vlan;

/// The virtio-net header before every frame, in bytes.
pub(crate) const VNET_HEADER_BYTES: usize = 12;

const TUNSETIFF: libc::c_ulong = 0x4004_54ca;
const TUNSETOFFLOAD: libc::c_ulong = 0x4004_54d0;
const TUNSETVNETHDRSZ: libc::c_ulong = 0x4004_54d8;
const TUNGETIFF: libc::c_ulong = 0x8004_54d2;
const TUNATTACHFILTER: libc::c_ulong = 0x4010_54d5;
const IFF_PERSIST: libc::c_int = 0x0800;
/// linux/sockios.h; the libc crate lacks it.
const SIOCBRADDIF: libc::c_ulong = 0x89a2;

/// Why a TAP could not be opened or set up.
#[derive(Debug, thiserror::Error)]
pub enum TapError {
    /// The name is empty, too long, or has characters that interfaces cannot have.
    #[error("interface name {0:?} is refused: 1 to 15 characters, without '/', blanks and NUL")]
    Name(String),
    /// The bridge is not there.
    #[error("TAP {name}: there is no bridge {bridge} on this host; bridges here: {there}")]
    Bridge {
        /// The interface.
        name: String,
        /// The bridge that was wanted.
        bridge: String,
        /// The bridges that are there.
        there: String,
    },
    /// The bridge cannot have it in a VLAN.
    #[error("TAP {name} cannot be in VLAN {vlan}: {words}")]
    Vlan {
        /// The interface.
        name: String,
        /// The VLAN.
        vlan: u16,
        /// Why, and what to do about it.
        words: String,
    },
    /// A step failed.
    #[error("TAP {name}: {what} failed: {source}{hint}")]
    Step {
        /// The interface.
        name: String,
        /// The step.
        what: &'static str,
        /// The error of the kernel.
        source: std::io::Error,
        /// What to do about it.
        hint: &'static str,
    },
}

/// What may be left undone in frames that are read from a TAP: the reader does it, or does without.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Offloads {
    /// Checksums of TCP and UDP.
    pub(crate) checksum: bool,
    /// Segmentation of TCP over IPv4.
    pub(crate) tso4: bool,
    /// Segmentation of TCP over IPv6.
    pub(crate) tso6: bool,
    /// Segmentation of TCP with ECN.
    pub(crate) ecn: bool,
}

/// An open TAP, with virtio-net headers. It is gone when this is dropped, unless it is persistent.
#[derive(Debug)]
pub struct Tap {
    file: File,
    name: String,
    offload: bool,
}

/// An `ifreq`, filled with a name.
fn request(name: &str) -> Result<libc::ifreq, TapError> {
    let bad = name.is_empty() || name.len() >= libc::IFNAMSIZ || name.contains(['/', '\0', ' ', '\t', '\n']);
    if bad || name == "." || name == ".." {
        return Err(TapError::Name(name.to_owned()));
    }
    // SAFETY: `ifreq` is plain data, for which zeroes are valid.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    for (to, from) in request.ifr_name.iter_mut().zip(name.bytes()) {
        *to = from as libc::c_char;
    }
    Ok(request)
}

/// Turns the error of the last system call into ours.
fn step(result: libc::c_int, name: &str, what: &'static str, hint: &'static str) -> Result<(), TapError> {
    if result >= 0 {
        return Ok(());
    }
    Err(TapError::Step { name: name.to_owned(), what, source: std::io::Error::last_os_error(), hint })
}

/// What to do when the TAP was not given to us, by the error of the last system call.
fn hint_of_opening() -> &'static str {
    match std::io::Error::last_os_error().raw_os_error() {
        Some(libc::EBUSY) => {
            "; another process has it open: a VMM of this guest that still runs? `fuser -v /dev/net/tun` names the processes"
        }
        Some(libc::EINVAL) => "; an interface of that name is there and is no TAP: rename or delete it",
        Some(libc::EPERM | libc::EACCES) => "; CAP_NET_ADMIN is needed",
        _ => "",
    }
}

impl Tap {
    /// Makes or opens the TAP `name`, puts it on `bridge` if there is one, there into `vlan` if there is one, gives it `mtu`
    /// (bytes) and sets it up.
    ///
    /// # Errors
    /// When the name is not one, is in use, or when the kernel refuses a step: mostly for lack of CAP_NET_ADMIN, or of the
    /// bridge, or because the bridge does not filter VLANs.
    pub fn open(name: &str, bridge: Option<&str>, vlan: Option<u16>, mtu: u16) -> Result<Self, TapError> {
        let mut ifreq = request(name)?;
        let file =
            OpenOptions::new().read(true).write(true).custom_flags(libc::O_NONBLOCK | libc::O_CLOEXEC).open("/dev/net/tun");
        let failed = |what, hint| move |source| TapError::Step { name: name.to_owned(), what, source, hint };
        let file = file.map_err(failed("opening /dev/net/tun", "; is the tun module loaded?"))?;
        ifreq.ifr_ifru.ifru_flags = (libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR) as libc::c_short;
        // SAFETY: an open descriptor and a complete ifreq.
        let result = unsafe { libc::ioctl(file.as_raw_fd(), TUNSETIFF, &raw mut ifreq) };
        step(result, name, "TUNSETIFF", hint_of_opening())?;
        let tap = Self { file, name: name.to_owned(), offload: true };
        tap.set_frames()?;
        let control = socket(AddressFamily::Inet, SockType::Datagram, SockFlag::SOCK_CLOEXEC, None)
            .map_err(|errno| failed("opening a control socket", "")(errno.into()))?;
        tap.set_up(&control, bridge, vlan, mtu)?;
        Ok(tap)
    }

    /// Takes over an open TAP (made with IFF_TAP, IFF_NO_PI and IFF_VNET_HDR), or anything that carries frames with 12
    /// bytes of virtio-net header, one a read or write. Its interface is left as it is.
    ///
    /// # Errors
    /// When the descriptor cannot be made non-blocking.
    pub fn from_fd(fd: OwnedFd, name: &str) -> Result<Self, TapError> {
        use nix::fcntl::{FcntlArg, OFlag, fcntl};
        let failed =
            |errno: nix::errno::Errno| TapError::Step { name: name.to_owned(), what: "fcntl", source: errno.into(), hint: "" };
        let flags = fcntl(&fd, FcntlArg::F_GETFL).map_err(failed)?;
        fcntl(&fd, FcntlArg::F_SETFL(OFlag::from_bits_truncate(flags) | OFlag::O_NONBLOCK)).map_err(failed)?;
        let mut tap = Self { file: File::from(fd), name: name.to_owned(), offload: false };
        // What is no name is refused, whatever the descriptor is.
        request(name)?;
        if tap.flags().is_some() {
            tap.offload = true;
            tap.set_frames()?;
        }
        Ok(tap)
    }

    /// The header's size, and no offloads until a driver chooses some.
    fn set_frames(&self) -> Result<(), TapError> {
        let bytes = VNET_HEADER_BYTES as libc::c_int;
        // SAFETY: an open descriptor and an int.
        let result = unsafe { libc::ioctl(self.file.as_raw_fd(), TUNSETVNETHDRSZ, &raw const bytes) };
        step(result, &self.name, "TUNSETVNETHDRSZ", "")?;
        self.set_offloads(Offloads::default())
    }

    /// Has the kernel drop what comes with `sender` as its source, which nobody here wants to read: for such a frame alone it would
    /// wake the reader. A TAP that stays behind without us is left as it is: what it filters would stay, too.
    pub fn pass_over(&self, sender: [u8; 6]) {
        let stays = self.flags().is_none_or(|flags| flags & IFF_PERSIST != 0);
        if stays {
            return;
        }
        let [a, b, c, d, e, f] = sender;
        let instruction = |code: u32, k: u32, jt, jf| libc::sock_filter { code: code as u16, jt, jf, k };
        let filter = [
            instruction(libc::BPF_LD | libc::BPF_W | libc::BPF_ABS, 6, 0, 0),
            instruction(libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K, u32::from_be_bytes([a, b, c, d]), 0, 3),
            instruction(libc::BPF_LD | libc::BPF_H | libc::BPF_ABS, 10, 0, 0),
            instruction(libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K, u32::from(u16::from_be_bytes([e, f])), 0, 1),
            instruction(libc::BPF_RET | libc::BPF_K, 0, 0, 0),
            instruction(libc::BPF_RET | libc::BPF_K, u32::MAX, 0, 0),
        ];
        let program = libc::sock_fprog { len: filter.len() as u16, filter: filter.as_ptr().cast_mut() };
        // SAFETY: an open descriptor, and a program that names the filter with its length; the kernel copies it.
        let result = unsafe { libc::ioctl(self.file.as_raw_fd(), TUNATTACHFILTER, &raw const program) };
        if result < 0 {
            let error = std::io::Error::last_os_error();
            tracing::debug!(tap = self.name, %error, "frames that the guest is not given wake its card's thread");
        }
    }

    /// The interface's flags, where this is a TAP of the kernel's.
    fn flags(&self) -> Option<libc::c_int> {
        let mut ifreq = request(&self.name).ok()?;
        // SAFETY: an open descriptor and a complete ifreq, which the kernel fills.
        let result = unsafe { libc::ioctl(self.file.as_raw_fd(), TUNGETIFF, &raw mut ifreq) };
        // SAFETY: TUNGETIFF filled this arm.
        (result >= 0).then(|| libc::c_int::from(unsafe { ifreq.ifr_ifru.ifru_flags }))
    }

    /// Whether frames may be left unfinished: a TAP of the kernel's can, another descriptor cannot.
    pub(crate) fn can_offload(&self) -> bool {
        self.offload
    }

    /// What frames that are read from now on may leave undone. Nothing to be done where nothing can be offloaded.
    pub(crate) fn set_offloads(&self, offloads: Offloads) -> Result<(), TapError> {
        if !self.offload {
            return Ok(());
        }
        let Offloads { checksum, tso4, tso6, ecn } = offloads;
        // linux/if_tun.h: TUN_F_CSUM, TUN_F_TSO4, TUN_F_TSO6, TUN_F_TSO_ECN; the last three need the first.
        let flags = libc::c_ulong::from(checksum)
            | libc::c_ulong::from(checksum && tso4) << 1
            | libc::c_ulong::from(checksum && tso6) << 2
            | libc::c_ulong::from(checksum && ecn && (tso4 || tso6)) << 3;
        // SAFETY: an open descriptor; the argument is a number.
        let result = unsafe { libc::ioctl(self.file.as_raw_fd(), TUNSETOFFLOAD, flags) };
        step(result, &self.name, "TUNSETOFFLOAD", "")
    }

    fn set_up(&self, control: &OwnedFd, bridge: Option<&str>, vlan: Option<u16>, mtu: u16) -> Result<(), TapError> {
        let name = &self.name;
        let mut ifreq = request(name)?;
        ifreq.ifr_ifru.ifru_mtu = i32::from(mtu);
        // SAFETY: an open socket and a complete ifreq.
        let result = unsafe { libc::ioctl(control.as_raw_fd(), libc::SIOCSIFMTU as _, &raw mut ifreq) };
        step(result, name, "setting the MTU", "")?;
        if let Some(bridge) = bridge {
            self.raise_address(control)?;
            let mut index = request(name)?;
            // SAFETY: an open socket and a complete ifreq, which the kernel fills.
            let result = unsafe { libc::ioctl(control.as_raw_fd(), libc::SIOCGIFINDEX as _, &raw mut index) };
            step(result, name, "asking for the index", "")?;
            let mut ifreq = request(bridge)?;
            // SAFETY: SIOCGIFINDEX filled this arm.
            ifreq.ifr_ifru.ifru_ifindex = unsafe { index.ifr_ifru.ifru_ifindex };
            // SAFETY: an open socket and a complete ifreq.
            let result = unsafe { libc::ioctl(control.as_raw_fd(), SIOCBRADDIF, &raw mut ifreq) };
            if result < 0 {
                return Err(self.no_bridge(bridge));
            }
            if let Some(vlan) = vlan {
                // SAFETY: SIOCGIFINDEX filled this arm.
                let port = unsafe { index.ifr_ifru.ifru_ifindex };
                vlan::join(bridge, port, vlan).map_err(|words| TapError::Vlan { name: name.clone(), vlan, words })?;
            }
        }
        let mut ifreq = request(name)?;
        // SAFETY: an open socket and a complete ifreq, which the kernel fills.
        let result = unsafe { libc::ioctl(control.as_raw_fd(), libc::SIOCGIFFLAGS as _, &raw mut ifreq) };
        step(result, name, "asking for flags", "")?;
        // SAFETY: SIOCGIFFLAGS filled this arm.
        let flags = unsafe { ifreq.ifr_ifru.ifru_flags };
        ifreq.ifr_ifru.ifru_flags = flags | libc::IFF_UP as libc::c_short;
        // SAFETY: an open socket and a complete ifreq.
        let result = unsafe { libc::ioctl(control.as_raw_fd(), libc::SIOCSIFFLAGS as _, &raw mut ifreq) };
        step(result, name, "setting it up", "")
    }

    /// Why it did not join the bridge, from the last system call's error and from what bridges there are.
    fn no_bridge(&self, bridge: &str) -> TapError {
        let (name, source) = (self.name.clone(), std::io::Error::last_os_error());
        let all = std::fs::read_dir("/sys/class/net").into_iter().flatten().flatten();
        let bridges = all.filter(|one| one.path().join("bridge").is_dir());
        let mut bridges: Vec<String> = bridges.map(|one| one.file_name().to_string_lossy().into_owned()).collect();
        bridges.sort();
        if bridges.iter().any(|one| one == bridge) {
            return TapError::Step { name, what: "joining the bridge", source, hint: "" };
        }
        let there = if bridges.is_empty() { "none".to_owned() } else { bridges.join(", ") };
        TapError::Bridge { name, bridge: bridge.to_owned(), there }
    }

    /// Gives the interface (not the guest) an address that begins with fe. A bridge without an address of its own takes the
    /// lowest of its ports: if that were ours, the host's address would change when a guest comes or goes, and its
    /// neighbours would not find the host until they ask anew.
    fn raise_address(&self, control: &OwnedFd) -> Result<(), TapError> {
        let name = &self.name;
        let mut ifreq = request(name)?;
        // SAFETY: an open socket and a complete ifreq, which the kernel fills.
        let result = unsafe { libc::ioctl(control.as_raw_fd(), libc::SIOCGIFHWADDR as _, &raw mut ifreq) };
        step(result, name, "asking for the address", "")?;
        // SAFETY: SIOCGIFHWADDR filled this arm.
        let mut address = unsafe { ifreq.ifr_ifru.ifru_hwaddr };
        if let Some(first) = address.sa_data.first_mut() {
            *first = 0xfe_u8 as libc::c_char;
        }
        ifreq.ifr_ifru.ifru_hwaddr = address;
        // SAFETY: an open socket and a complete ifreq.
        let result = unsafe { libc::ioctl(control.as_raw_fd(), libc::SIOCSIFHWADDR as _, &raw mut ifreq) };
        step(result, name, "setting the address", "")
    }

    /// The interface's name.
    pub fn name(&self) -> &str {
        &self.name
    }

    pub(crate) fn file(&self) -> &File {
        &self.file
    }
}

impl AsFd for Tap {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }
}
