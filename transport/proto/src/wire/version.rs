//! Versions of the protocol, one line each, and how two hosts agree on one.
//! Not the versions of device records: those belong to the VMMs.

/// The version spoken where nothing else was agreed: in `Hello`, `Refuse`, `VerdictAsk`. Their layout never changes.
pub const VERSION_FIRST: u16 = 1;

/// Every version this build speaks, newest last, and what it brought.
pub const VERSIONS: &[(u16, &str)] = &[(1, "pre-copy over TCP lanes, records, two-sided commit, verdict")];

/// The version numbers to offer, newest last.
#[must_use]
pub fn offer() -> Vec<u16> {
    VERSIONS.iter().map(|(version, _)| *version).collect()
}

/// The newest version that both this build and `offered` have.
#[must_use]
pub fn choose(offered: &[u16]) -> Option<u16> {
    offered.iter().copied().filter(|version| VERSIONS.iter().any(|(ours, _)| ours == version)).max()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_newest_common_version_wins() {
        assert_eq!(choose(&[1, 7, 9]), Some(1));
        assert_eq!(choose(&[2, 65_535]), None);
        assert_eq!(choose(&[]), None);
        assert!(VERSIONS.is_sorted_by_key(|(version, _)| *version));
    }
}
