//! Protection domains: what may be used together. A migration has one of its own, so that no key of another reaches its memory.

use crate::counters::{Kind, Tally};
use crate::device::Context;
use crate::error::CreateError;
use rdma_sys::ibv_pd;
use std::io;
use std::ptr::NonNull;
use std::sync::Arc;

/// A protection domain of a device. Memory regions and queue pairs are made in it and keep it alive.
#[derive(Debug)]
pub struct ProtectionDomain {
    raw: NonNull<ibv_pd>,
    context: Arc<Context>,
    _tally: Tally,
}

// SAFETY: libibverbs may be called from any thread, and the object is destroyed once, by drop.
unsafe impl Send for ProtectionDomain {}
// SAFETY: as above: no function that takes a protection domain needs it for itself.
unsafe impl Sync for ProtectionDomain {}

impl ProtectionDomain {
    /// Makes one.
    ///
    /// # Errors
    /// [`CreateError::NoMemory`] if the device has no more of them.
    pub fn new(context: &Arc<Context>) -> Result<Arc<ProtectionDomain>, CreateError> {
        // SAFETY: the context is open as long as its handle lives.
        let raw = unsafe { (context.library().verbs.ibv_alloc_pd)(context.raw()) };
        let Some(raw) = NonNull::new(raw) else {
            return Err(CreateError::of(context.name(), "ibv_alloc_pd", io::Error::last_os_error()));
        };
        Ok(Arc::new(ProtectionDomain { raw, context: Arc::clone(context), _tally: Tally::new(Kind::Domain) }))
    }

    /// The device that it is on.
    pub fn context(&self) -> &Arc<Context> {
        &self.context
    }

    pub(crate) fn raw(&self) -> *mut ibv_pd {
        self.raw.as_ptr()
    }
}

impl Drop for ProtectionDomain {
    fn drop(&mut self) {
        // SAFETY: what was made in it kept it alive, so nothing is left in it; it is not used after.
        let code = unsafe { (self.context.library().verbs.ibv_dealloc_pd)(self.raw.as_ptr()) };
        if code != 0 {
            let error = io::Error::from_raw_os_error(code);
            tracing::warn!(device = self.context.name(), %error, "a protection domain cannot be freed");
        }
    }
}
