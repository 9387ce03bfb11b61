//! A descriptor that another thread makes readable, to end a wait. It carries no data: who hears it looks what is new.

use nix::errno::Errno;
use nix::sys::eventfd::{EfdFlags, EventFd};
use std::io;
use std::os::fd::{AsFd, BorrowedFd};

#[derive(Debug)]
pub(crate) struct Bell(EventFd);

impl Bell {
    pub(crate) fn new() -> io::Result<Bell> {
        Ok(Bell(EventFd::from_flags(EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK)?))
    }

    /// Makes the descriptor readable; it stays so, since what rings it (closing, a fault) does not pass.
    pub(crate) fn ring(&self) {
        match self.0.write(1) {
            // A counter at its maximum is readable already; nothing else can fail on a descriptor that is open.
            Ok(_) | Err(Errno::EAGAIN) => {}
            Err(error) => tracing::warn!(%error, "an eventfd cannot be written to"),
        }
    }
}

impl AsFd for Bell {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}
