//! How many handles of each kind this process has, and has made: tests hold that nothing is left, and that a refused peer
//! cost nothing. Not statistics of traffic.

use std::sync::atomic::{AtomicU64, Ordering};

/// Numbers of handles.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Counts {
    /// Protection domains.
    pub domains: u64,
    /// Memory regions.
    pub regions: u64,
    /// Completion queues.
    pub queues: u64,
    /// Queue pairs.
    pub pairs: u64,
}

/// Those that exist now.
pub fn alive() -> Counts {
    counts(&ALIVE)
}

/// Those that were made since the process started.
pub fn made() -> Counts {
    counts(&MADE)
}

#[derive(Debug, Clone, Copy)]
pub(crate) enum Kind {
    Domain,
    Region,
    Queue,
    Pair,
}

struct Table {
    domains: AtomicU64,
    regions: AtomicU64,
    queues: AtomicU64,
    pairs: AtomicU64,
}

impl Table {
    const fn new() -> Table {
        Table { domains: AtomicU64::new(0), regions: AtomicU64::new(0), queues: AtomicU64::new(0), pairs: AtomicU64::new(0) }
    }

    fn of(&self, kind: Kind) -> &AtomicU64 {
        match kind {
            Kind::Domain => &self.domains,
            Kind::Region => &self.regions,
            Kind::Queue => &self.queues,
            Kind::Pair => &self.pairs,
        }
    }
}

static ALIVE: Table = Table::new();
static MADE: Table = Table::new();

fn counts(table: &Table) -> Counts {
    let read = |kind| table.of(kind).load(Ordering::SeqCst);
    Counts { domains: read(Kind::Domain), regions: read(Kind::Region), queues: read(Kind::Queue), pairs: read(Kind::Pair) }
}

/// Counts one handle as long as it lives.
#[derive(Debug)]
pub(crate) struct Tally(Kind);

impl Tally {
    pub(crate) fn new(kind: Kind) -> Tally {
        ALIVE.of(kind).fetch_add(1, Ordering::SeqCst);
        MADE.of(kind).fetch_add(1, Ordering::SeqCst);
        Tally(kind)
    }
}

impl Drop for Tally {
    fn drop(&mut self) {
        ALIVE.of(self.0).fetch_sub(1, Ordering::SeqCst);
    }
}
