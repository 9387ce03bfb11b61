//! The destination's side of guest memory: which migrations may be written to, their memory registered chunk by chunk with keys
//! for remote writes and nothing else, and closed to all of them before the guest runs. Lanes come in through `accept.rs`.
//!
//! To close it, its memory need not be deregistered, which takes time for each page that the device has and would all lie in the
//! downtime: a key is good only for queue pairs of its own protection domain. So where no lane is let in any more and nobody but the
//! migration holds its domain, which every queue pair does until the device has destroyed it, nobody can write; the memory is
//! given back when the guest runs. Where somebody is left, it is given back first.

use super::check::{PageKey, Suspects};
use super::memory::{map_region, register_words};
use super::request::{LaneRequest, derive};
use super::{NAME, RdmaCounters, RdmaSettings};
use crate::HostError;
use crate::direct::{Exposed, ExposedError, Exposure, Fabric};
use crate::pages::Pages;
use limosa_proto::identity::{Generation, MigrationId};
use limosa_proto::wire::code::Code;
use limosa_proto::wire::frame::LaneToken;
use limosa_proto::wire::limits::LANES_MAX;
use limosa_proto::wire::offer::{MemoryKey, chunks};
use limosa_verbs::{Access, Context, Mapping, MemoryRegion, ProtectionDomain};
use std::num::NonZeroUsize;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

/// Threads that take memory back at most, and how many chunks are worth one.
const DEREGISTER_THREADS_MAX: usize = 4;
const DEREGISTER_EACH_MIN: usize = 8;

/// The migrations that come in by RDMA. Clones are the same table.
#[derive(Debug, Clone)]
pub(super) struct RdmaFabric {
    open: Arc<Mutex<Vec<Arc<Migration>>>>,
    on_demand: bool,
    counters: Arc<RdmaCounters>,
}

/// What the device has of one migration.
#[derive(Debug, Default)]
struct Held {
    domain: Option<Arc<ProtectionDomain>>,
    /// By region of guest memory, once needed.
    mappings: Vec<Option<Arc<Mapping>>>,
    regions: Vec<Arc<MemoryRegion>>,
    /// One bit for each lane that came.
    lanes: u32,
    closed: bool,
}

/// One migration that comes in.
pub(super) struct Migration {
    exposure: Exposure,
    page_key: PageKey,
    suspects: Suspects,
    on_demand: bool,
    counters: Arc<RdmaCounters>,
    held: Mutex<Held>,
}

impl std::fmt::Debug for Migration {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Migration({})", self.exposure.migration)
    }
}

/// The key of the page check.
pub(super) fn page_key(token: &LaneToken, migration: MigrationId, generation: Generation) -> PageKey {
    PageKey::new(&derive(token, "limosa page check 1", (migration, generation), 0))
}

impl RdmaFabric {
    pub(super) fn new(settings: &RdmaSettings, counters: Arc<RdmaCounters>) -> RdmaFabric {
        RdmaFabric { open: Arc::default(), on_demand: settings.on_demand, counters }
    }

    fn open(&self) -> MutexGuard<'_, Vec<Arc<Migration>>> {
        self.open.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// No lane of `migration` finds it any more.
    fn forget(&self, migration: &Arc<Migration>) {
        self.open().retain(|one| !Arc::ptr_eq(one, migration));
    }

    /// The migration that `request` is for, if it knows its token.
    pub(super) fn find(&self, request: &LaneRequest) -> Option<Arc<Migration>> {
        let asked = |one: &&Arc<Migration>| {
            let Exposure { migration, generation, token, .. } = &one.exposure;
            *migration == request.migration && request.knows(token, *generation)
        };
        self.open().iter().find(asked).cloned()
    }
}

impl Fabric for RdmaFabric {
    fn link(&self) -> &'static str {
        NAME
    }

    fn expose(&self, exposure: Exposure) -> Result<Box<dyn Exposed>, HostError> {
        let map = exposure.pages.memory_map();
        for index in 0..map.regions().len() {
            // Said now, before the source does anything for it.
            map_region(&*exposure.pages, index).map_err(HostError::new)?;
        }
        let held = Held { mappings: vec![None; map.regions().len()], ..Held::default() };
        let migration = Arc::new(Migration {
            page_key: page_key(&exposure.token, exposure.migration, exposure.generation),
            suspects: Suspects::new(map),
            on_demand: self.on_demand,
            counters: self.counters.clone(),
            held: Mutex::new(held),
            exposure,
        });
        self.open().push(migration.clone());
        Ok(Box::new(Open { fabric: self.clone(), migration }))
    }
}

impl Migration {
    pub(super) fn exposure(&self) -> &Exposure {
        &self.exposure
    }

    pub(super) fn pages(&self) -> &dyn Pages {
        &*self.exposure.pages
    }

    pub(super) fn page_check(&self) -> bool {
        self.exposure.page_check
    }

    pub(super) fn page_key(&self) -> &PageKey {
        &self.page_key
    }

    pub(super) fn suspects(&self) -> &Suspects {
        &self.suspects
    }

    fn held(&self) -> MutexGuard<'_, Held> {
        self.held.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Notes that `lane` comes, by `device`, which from then on is the migration's: the domain in which its queue pair is made.
    ///
    /// # Errors
    /// It may not come, or the device fails: for the source, in words.
    pub(super) fn let_in(&self, lane: u16, device: &str) -> Result<Arc<ProtectionDomain>, (Code, String)> {
        let mut held = self.held();
        let bit = 1_u32.checked_shl(lane.into()).filter(|_| lane < LANES_MAX).unwrap_or(0);
        if held.closed || bit == 0 || held.lanes & bit != 0 {
            return Err((Code::Violation, format!("lane {lane} is there already, or one too many")));
        }
        let domain = match &held.domain {
            Some(domain) => domain.clone(),
            None => {
                let unavailable = |words: String| (Code::LinkUnavailable, words);
                let context = Context::open(device).map_err(|error| unavailable(error.to_string()))?;
                ProtectionDomain::new(&context).map_err(|error| unavailable(error.to_string()))?
            }
        };
        held.domain = Some(domain.clone());
        held.lanes |= bit;
        Ok(domain)
    }

    fn register(&self, chunk: u32) -> Result<MemoryKey, String> {
        let map = self.pages().memory_map();
        let wanted = usize::try_from(chunk).unwrap_or(usize::MAX);
        let range = chunks(map).nth(wanted).ok_or_else(|| format!("there is no chunk {chunk} of guest memory"))?;
        let (index, begin) = map.locate(range).ok_or_else(|| format!("chunk {chunk} is not in one region"))?;
        let mut held = self.held();
        let Some(domain) = held.domain.clone().filter(|_| !held.closed) else {
            return Err("the source asks for keys of memory before it has a lane, or after the end".to_owned());
        };
        let known = held.mappings.get(index).cloned().flatten();
        let mapping = known.map_or_else(|| map_region(self.pages(), index), Ok)?;
        if let Some(place) = held.mappings.get_mut(index) {
            *place = Some(mapping.clone());
        }
        let on_demand = self.on_demand && domain.context().on_demand().reliable;
        let access = Access { local_write: true, remote_write: true, on_demand, relaxed_ordering: false };
        let begun = Instant::now();
        let region = MemoryRegion::register(&domain, &mapping, begin..begin + range.bytes(), access)
            .map_err(|error| register_words(chunk, chunks(map).count(), map.bytes(), &error))?;
        self.counters.registered.count(range.bytes(), begun);
        let key = region.remote();
        held.regions.push(region);
        Ok(MemoryKey { chunk, address: key.address, rkey: key.rkey })
    }

    /// Closes the memory to its source.
    fn close(&self) -> Result<(), String> {
        if self.lock_out() {
            return Ok(());
        }
        tracing::warn!(migration = %self.exposure.migration, "a lane is not gone from its device: memory is given back first");
        self.give_back()
    }

    /// Lets no lane in any more; whether none is left. Nobody comes to hold the domain who did not when this returns.
    fn lock_out(&self) -> bool {
        let mut held = self.held();
        held.closed = true;
        let own = held.regions.len() + 1;
        held.domain.as_ref().is_none_or(|domain| Arc::strong_count(domain) == own)
    }

    /// Gives all memory back to the device's host; it is opened to nobody any more.
    fn give_back(&self) -> Result<(), String> {
        let mut held = self.held();
        held.closed = true;
        let regions = std::mem::take(&mut held.regions);
        held.mappings.clear();
        held.domain = None;
        drop(held);
        let failed = deregister(regions);
        match failed.first() {
            None => Ok(()),
            Some(first) => Err(format!("{} chunks of guest memory are still open to the source: {first}", failed.len())),
        }
    }
}

/// Takes regions back on several threads: each page has to be let go. What failed, in words.
fn deregister(regions: Vec<Arc<MemoryRegion>>) -> Vec<String> {
    let threads = std::thread::available_parallelism().map_or(1, NonZeroUsize::get).min(DEREGISTER_THREADS_MAX);
    let each = regions.len().div_ceil(threads).max(DEREGISTER_EACH_MIN);
    let mut regions = regions;
    let work = |some: Vec<Arc<MemoryRegion>>| -> Vec<String> {
        some.into_iter().filter_map(|region| MemoryRegion::deregister(region).err()).map(|error| error.to_string()).collect()
    };
    std::thread::scope(|scope| {
        let mut others = Vec::new();
        while regions.len() > each {
            let some = regions.split_off(regions.len() - each);
            others.push(scope.spawn(move || work(some)));
        }
        let mut failed = work(regions);
        for other in others {
            failed.extend(other.join().unwrap_or_else(|_| vec!["a thread that took memory back died".to_owned()]));
        }
        failed
    })
}

/// The memory of one guest, open to its source until dropped.
struct Open {
    fabric: RdmaFabric,
    migration: Arc<Migration>,
}

impl Exposed for Open {
    fn open(&self, chunk: u32) -> Result<MemoryKey, HostError> {
        self.migration.register(chunk).map_err(HostError::new)
    }

    fn close(&self) -> Result<(), ExposedError> {
        self.fabric.forget(&self.migration);
        self.migration.close().map_err(ExposedError::Device)?;
        match self.migration.suspects.found() {
            Some((pages, first)) if self.migration.page_check() => Err(ExposedError::PageCheck { pages, first }),
            _ => Ok(()),
        }
    }
}

impl Drop for Open {
    fn drop(&mut self) {
        self.fabric.forget(&self.migration);
        if let Err(error) = self.migration.give_back() {
            tracing::error!(error, migration = %self.migration.exposure.migration, "guest memory was not taken back");
        }
    }
}
