//! Waiting for completions: a short spin, then an event, blocking on a lane's own thread or in tokio. Nothing is lost between
//! the two: after asking for an event it looks once more.

use crate::completion::{Completion, ended};
use crate::faults::Fault;
use crate::pair::QueuePair;
use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use rdma_sys::rdma_cm_event_type;
use std::io;
use std::os::fd::{AsFd as _, OwnedFd};
use std::time::{Duration, Instant};
use thiserror::Error;
use tokio::io::unix::AsyncFd;

/// Looks before an event is asked for. Asking costs a system call and waiting two; a look costs some ten nanoseconds.
const SPINS: u32 = 100;

/// Why a wait gave no completions.
#[derive(Debug, Error)]
pub enum WaitError {
    /// Nothing came in time.
    #[error("no completion of the RDMA queue pair in {} ms", .0.as_millis())]
    TimedOut(Duration),
    /// A [`crate::Closer`] ended the queue pair.
    #[error("the RDMA queue pair was closed on this side")]
    Closed,
    /// The peer ended the connection.
    #[error("the peer ended the RDMA connection")]
    Disconnected,
    /// The device is gone.
    #[error("the RDMA device was removed")]
    DeviceRemoved,
    /// The device said that the queue pair is broken.
    #[error("the RDMA queue pair is broken: {0}")]
    Fault(Fault),
    /// A call failed.
    #[error("waiting for RDMA completions failed: {0}")]
    Io(#[from] io::Error),
}

/// How the connection ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Ended {
    ByPeer,
    ByDevice,
}

/// What tokio waits on besides the connection's own events.
#[derive(Debug)]
pub(crate) struct Waker {
    pub(crate) queue: AsyncFd<OwnedFd>,
    pub(crate) bell: AsyncFd<OwnedFd>,
}

impl QueuePair {
    /// Takes the completions that are there, at most 32; there may be none. It makes no system call, so that it does not notice
    /// a peer that ended the connection: waits do.
    ///
    /// # Errors
    /// [`WaitError::Io`], and what ended the queue pair once no completion is left.
    pub fn poll(&mut self) -> Result<&[Completion], WaitError> {
        if !self.gather()? {
            self.gather_last()?;
        }
        Ok(&self.found)
    }

    /// Waits for completions on this thread; gives at most 32, and none if work requests that nobody asked for made room.
    ///
    /// # Errors
    /// [`WaitError::TimedOut`], and what ended the queue pair once no completion is left.
    pub fn wait(&mut self, timeout: Duration) -> Result<&[Completion], WaitError> {
        let deadline = Instant::now() + timeout;
        while !self.gather_or_arm()? {
            if self.block(deadline, timeout)? {
                self.hear()?;
            }
            self.queue.take_events()?;
        }
        Ok(&self.found)
    }

    /// Waits for completions in tokio; gives at most 32, and none if work requests that nobody asked for made room. Nothing is lost
    /// if the future is dropped. All waits of one queue pair must be in one runtime.
    ///
    /// # Errors
    /// As [`QueuePair::wait`]; [`WaitError::Io`] outside of a runtime with I/O and time.
    pub async fn completions(&mut self, timeout: Duration) -> Result<&[Completion], WaitError> {
        let deadline = tokio::time::Instant::now() + timeout;
        while !self.gather_or_arm()? {
            self.wake_by()?;
            let Some(waker) = &self.waker else { return Err(WaitError::Io(io::ErrorKind::NotConnected.into())) };
            // Readiness is cleared before looking again: what comes after that makes it ready anew.
            tokio::select! {
                ready = waker.queue.readable() => ready?.clear_ready(),
                ready = waker.bell.readable() => ready?.clear_ready(),
                ready = self.id.channel().readable()?.readable() => {
                    ready?.clear_ready();
                    self.hear()?;
                }
                () = tokio::time::sleep_until(deadline) => return Err(WaitError::TimedOut(timeout)),
            }
            self.queue.take_events()?;
        }
        Ok(&self.found)
    }

    /// Takes completions; whether there were any, also such as the caller need not see but that made room.
    fn gather(&mut self) -> Result<bool, WaitError> {
        self.found.clear();
        let count = self.queue.poll(&mut self.entries)?;
        let (sends, receives) = (&mut self.sends, &mut self.receives);
        self.found.extend(self.entries.iter().take(count).filter_map(|entry| ended(entry, sends, receives)));
        Ok(count > 0)
    }

    /// Takes completions, or asks for an event if there are none for a while.
    fn gather_or_arm(&mut self) -> Result<bool, WaitError> {
        for _ in 0..SPINS {
            if self.gather()? {
                return Ok(true);
            }
            std::hint::spin_loop();
        }
        if self.gather_last()? {
            return Ok(true);
        }
        self.queue.arm()?;
        // What came before the asking makes no event.
        self.gather()
    }

    /// If the queue pair is of no more use, takes the completions that came before that, or says why if there are none.
    fn gather_last(&mut self) -> Result<bool, WaitError> {
        let Err(end) = self.usable() else { return Ok(false) };
        if self.gather()? { Ok(true) } else { Err(end) }
    }

    fn usable(&self) -> Result<(), WaitError> {
        if let Some(fault) = self.notice.fault() {
            return Err(WaitError::Fault(fault));
        }
        if self.notice.is_closed() {
            return Err(WaitError::Closed);
        }
        match self.ended {
            Some(Ended::ByPeer) => Err(WaitError::Disconnected),
            Some(Ended::ByDevice) => Err(WaitError::DeviceRemoved),
            None => Ok(()),
        }
    }

    /// Takes what the connection manager has to say.
    fn hear(&mut self) -> Result<(), WaitError> {
        while self.ended.is_none()
            && let Some(event) = self.id.channel().next()?
        {
            self.ended = match event.kind {
                rdma_cm_event_type::RDMA_CM_EVENT_DISCONNECTED => Some(Ended::ByPeer),
                rdma_cm_event_type::RDMA_CM_EVENT_DEVICE_REMOVAL => Some(Ended::ByDevice),
                // Others say nothing about a connection that is made: an address that changed, the end of a waiting time.
                _ => None,
            };
        }
        Ok(())
    }

    /// Sleeps until there is something to look at; whether the connection manager has something to say.
    fn block(&self, deadline: Instant, timeout: Duration) -> Result<bool, WaitError> {
        let left = deadline.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Err(WaitError::TimedOut(timeout));
        }
        // Rounded up, or the last millisecond would be spent spinning.
        let left = PollTimeout::try_from(left + Duration::from_micros(999)).unwrap_or(PollTimeout::MAX);
        let watch = |fd| PollFd::new(fd, PollFlags::POLLIN);
        let mut all = [self.queue.as_fd(), self.notice.bell.as_fd(), self.id.channel().as_fd()].map(watch);
        match poll(&mut all, left) {
            Ok(_) => Ok(all.last().is_some_and(|manager| manager.any().unwrap_or(true))),
            Err(Errno::EINTR) => Ok(false),
            Err(error) => Err(WaitError::Io(error.into())),
        }
    }
}
