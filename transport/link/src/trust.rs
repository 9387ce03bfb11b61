//! Which keys hosts are known by: the trusted, some of them for a time only, the revoked, and which key came after which. One
//! set, shared, changed while connections come and go. It keeps no file; a revoked key is refused whatever else is said of it.

use limosa_proto::identity::HostId;
use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, PoisonError, RwLock, RwLockReadGuard};
use std::time::{SystemTime, UNIX_EPOCH};

/// The host ids that may talk to us. Clones are the same set.
#[derive(Debug, Clone, Default)]
pub struct TrustedHosts(Arc<RwLock<Trust>>);

/// What there is to know about keys.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Trust {
    /// Trusted keys, each with the second since 1970 after which it is not any more, if there is one.
    pub keys: BTreeMap<HostId, Option<u64>>,
    /// Keys that are refused whatever else is said.
    pub revoked: BTreeSet<HostId>,
    /// The key that came after a key of the same host.
    pub successors: BTreeMap<HostId, HostId>,
}

/// Why a key is not trusted.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Distrust {
    /// Nobody has said that it is.
    Unknown,
    /// It is revoked.
    Revoked,
    /// It was, until this second since 1970.
    Expired(u64),
}

impl TrustedHosts {
    /// A set of `ids`.
    pub fn new(ids: impl IntoIterator<Item = HostId>) -> TrustedHosts {
        let keys = ids.into_iter().map(|id| (id, None)).collect();
        TrustedHosts(Arc::new(RwLock::new(Trust { keys, ..Trust::default() })))
    }

    /// Puts `trust` in place of what was there. Who has open connections looks again by himself.
    pub fn replace(&self, trust: Trust) {
        *self.0.write().unwrap_or_else(PoisonError::into_inner) = trust;
    }

    /// Adds one; false if it was there.
    pub fn insert(&self, id: HostId) -> bool {
        self.0.write().unwrap_or_else(PoisonError::into_inner).keys.insert(id, None).is_none()
    }

    /// Removes one; false if it was not there.
    pub fn remove(&self, id: HostId) -> bool {
        self.0.write().unwrap_or_else(PoisonError::into_inner).keys.remove(&id).is_some()
    }

    /// Revokes one; false if it was revoked.
    pub fn revoke(&self, id: HostId) -> bool {
        self.0.write().unwrap_or_else(PoisonError::into_inner).revoked.insert(id)
    }

    /// Whether `id` is trusted now.
    #[must_use]
    pub fn contains(&self, id: HostId) -> bool {
        self.why_not(id).is_none()
    }

    /// Why `id` is not trusted now; none: it is.
    #[must_use]
    pub fn why_not(&self, id: HostId) -> Option<Distrust> {
        let trust = self.read();
        match trust.keys.get(&id) {
            _ if trust.revoked.contains(&id) => Some(Distrust::Revoked),
            None => Some(Distrust::Unknown),
            Some(Some(until)) if *until < unix_now() => Some(Distrust::Expired(*until)),
            Some(_) => None,
        }
    }

    /// Whether both are keys of the same host: the same one, or one that came after the other.
    #[must_use]
    pub fn same_host(&self, one: HostId, other: HostId) -> bool {
        one == other || {
            let trust = self.read();
            trust.newest(one) == trust.newest(other)
        }
    }

    fn read(&self) -> RwLockReadGuard<'_, Trust> {
        self.0.read().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Trust {
    /// The newest key of the host that had `id`.
    #[must_use]
    pub fn newest(&self, id: HostId) -> HostId {
        let mut now = id;
        // Bounded, for whoever makes a ring of them.
        for _ in 0..=self.successors.len() {
            match self.successors.get(&now) {
                Some(next) => now = *next,
                None => break,
            }
        }
        now
    }
}

/// Seconds since 1970.
pub(crate) fn unix_now() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs()
}

#[cfg(test)]
mod tests {
    use super::*;

    const A: HostId = HostId([1; 32]);
    const B: HostId = HostId([2; 32]);
    const C: HostId = HostId([3; 32]);

    #[test]
    fn revoked_wins_over_trusted_and_time_ends_trust() {
        let trusted = TrustedHosts::new([A]);
        assert_eq!((trusted.why_not(A), trusted.why_not(B)), (None, Some(Distrust::Unknown)));
        assert!(trusted.revoke(A) && !trusted.revoke(A));
        assert_eq!(trusted.why_not(A), Some(Distrust::Revoked));
        assert!(!trusted.insert(A) && !trusted.contains(A), "trusting a revoked key again changes nothing");
        let now = unix_now();
        let keys = BTreeMap::from([(A, Some(now + 100)), (B, Some(now - 1)), (C, None)]);
        trusted.replace(Trust { keys, ..Trust::default() });
        assert_eq!((trusted.why_not(A), trusted.why_not(B), trusted.why_not(C)), (None, Some(Distrust::Expired(now - 1)), None));
    }

    #[test]
    fn keys_of_one_host_are_known_as_such() {
        let trusted = TrustedHosts::default();
        let successors = BTreeMap::from([(A, B), (B, C)]);
        trusted.replace(Trust { successors, ..Trust::default() });
        assert!(trusted.same_host(A, C) && trusted.same_host(C, B) && !trusted.same_host(A, HostId([4; 32])));
        let ring = Trust { successors: BTreeMap::from([(A, B), (B, A)]), ..Trust::default() };
        // It ends, whatever it says.
        let _ = ring.newest(A);
    }
}
