//! The guest and the VMMs that hold it: memory, dirty tracking, who runs, the lock on its disk. A VMM answers as
//! `vmm/plug` says that one has to; it has no KVM, and a page is one number.

use limosa_proto::bitmap::PageSet;
use limosa_proto::identity::VmId;
use limosa_proto::memory::{Gpa, MemoryMap, PageRange, Region};
use limosa_proto::recovery::Plugged;
use limosa_proto::wire::message::VmDescription;

pub(crate) const VM: VmId = VmId([5; 16]);
/// Pages among which the guest writes begin here: the second region.
const WRITTEN_FROM: u64 = 64;
/// A page that the act of running writes, and one that saving does.
const RAN_PAGE: usize = 0;
const SAVED_PAGE: u64 = 3;

pub(crate) fn map() -> MemoryMap {
    let region = |gpa, pages: u64| Region { gpa: Gpa(gpa), bytes: pages * 4096, page_bytes: 4096 };
    MemoryMap::new(vec![region(0, 40), region(1 << 32, 400)]).unwrap()
}

pub(crate) fn description() -> VmDescription {
    VmDescription {
        id: VM,
        name: "guest".to_owned(),
        vcpus: 1,
        memory: map(),
        nics: vec![],
        disks: vec![],
        vmm: "limosa".to_owned(),
        records: vec![(1, 1)],
        config: vec![],
        cpu: Default::default(),
    }
}

/// A VMM's process.
#[derive(Debug)]
pub(crate) struct Vmm {
    /// On which host.
    pub(crate) host: usize,
    /// Whether its process lives.
    pub(crate) lives: bool,
    pub(crate) state: Plugged,
    /// Whether an operator holds its guest.
    pub(crate) held: bool,
    pub(crate) memory: Vec<u64>,
    pub(crate) tracking: bool,
    dirty: PageSet,
    /// The agent (its incarnation) that it is plugged in at.
    pub(crate) agent: Option<u64>,
}

/// The guest as it is, wherever that is.
#[derive(Debug)]
pub(crate) struct Guest {
    /// Its memory, as its own last write left it.
    pub(crate) truth: Vec<u64>,
    pub(crate) vmms: Vec<Vmm>,
    /// Which VMM has its disk locked; none where it has no disk.
    pub(crate) lock: Option<usize>,
    has_disk: bool,
    written: u64,
    writes_per_ms: u64,
    rest: u64,
    /// Two ran it, or one from old memory: words.
    pub(crate) wrong: Option<String>,
}

fn pages() -> usize {
    usize::try_from(map().numbers()).unwrap()
}

impl Guest {
    pub(crate) fn new(has_disk: bool, writes_per_ms: u64) -> Guest {
        let mut guest = Guest {
            truth: (1..=pages() as u64).collect(),
            vmms: Vec::new(),
            lock: None,
            has_disk,
            written: 1_000_000,
            writes_per_ms,
            rest: 0,
            wrong: None,
        };
        let memory = guest.truth.clone();
        let first = guest.launch(0, Plugged::Paused, memory);
        guest.run(first).unwrap();
        guest
    }

    fn launch(&mut self, host: usize, state: Plugged, memory: Vec<u64>) -> usize {
        let dirty = PageSet::empty(&map());
        self.vmms.push(Vmm { host, lives: true, state, held: false, memory, tracking: false, dirty, agent: None });
        self.vmms.len() - 1
    }

    /// An incoming VMM, its memory still empty.
    pub(crate) fn prepare(&mut self, host: usize) -> usize {
        self.launch(host, Plugged::Incoming, vec![0; pages()])
    }

    /// The VMM that runs the guest.
    pub(crate) fn runner(&self) -> Option<usize> {
        self.vmms.iter().position(|vmm| vmm.lives && vmm.state == Plugged::Running)
    }

    fn take_lock(&mut self, vmm: usize) -> Result<(), String> {
        if self.has_disk {
            if self.lock.is_some_and(|holder| holder != vmm) {
                return Err("the image is locked by another".to_owned());
            }
            self.lock = Some(vmm);
        }
        Ok(())
    }

    /// Lets the guest run in `vmm`: the moment in which all promises are kept or broken.
    pub(crate) fn run(&mut self, vmm: usize) -> Result<(), String> {
        if !matches!(self.vmms[vmm].state, Plugged::Paused | Plugged::Loaded) {
            return Err(format!("Resume needs a paused or loaded guest; this one is {:?}", self.vmms[vmm].state));
        }
        self.take_lock(vmm)?;
        self.look_before_it_runs(vmm);
        self.vmms[vmm].state = Plugged::Running;
        self.vmms[vmm].held = false;
        // To run is to change: an older copy is never taken for this one.
        self.write(vmm, RAN_PAGE as u64);
        Ok(())
    }

    fn look_before_it_runs(&mut self, vmm: usize) {
        let host = self.vmms[vmm].host;
        if let Some(other) = self.runner() {
            let there = self.vmms[other].host;
            self.wrong.get_or_insert(format!("two owners: the guest runs on host {there} and is let run on host {host}"));
        }
        let differs = (0..self.truth.len()).find(|page| self.vmms[vmm].memory[*page] != self.truth[*page] && in_memory(*page));
        if let Some(page) = differs {
            self.wrong.get_or_insert(format!("old memory: page {page} on host {host} is not what the guest last wrote"));
        }
    }

    /// The operator's or the agent's Hold: it stands still and is this host's.
    pub(crate) fn hold(&mut self, vmm: usize) -> Result<(), String> {
        match self.vmms[vmm].state {
            Plugged::Loaded => {
                self.take_lock(vmm)?;
                self.look_before_it_runs(vmm);
                self.vmms[vmm].state = Plugged::Paused;
            }
            Plugged::Running => self.vmms[vmm].state = Plugged::Paused,
            Plugged::Paused | Plugged::Incoming => {}
        }
        self.vmms[vmm].held = true;
        Ok(())
    }

    pub(crate) fn pause(&mut self, vmm: usize) -> Result<(), String> {
        if self.vmms[vmm].state != Plugged::Running {
            return Err("Pause needs a running guest".to_owned());
        }
        self.vmms[vmm].state = Plugged::Paused;
        Ok(())
    }

    pub(crate) fn track(&mut self, vmm: usize, on: bool) {
        self.vmms[vmm].tracking = on;
        self.vmms[vmm].dirty = PageSet::empty(&map());
    }

    pub(crate) fn fetch_dirty(&mut self, vmm: usize) -> Result<PageSet, String> {
        if !self.vmms[vmm].tracking {
            return Err("FetchDirty needs dirty tracking to be on".to_owned());
        }
        Ok(self.vmms[vmm].dirty.take())
    }

    /// Saving a device writes guest memory.
    pub(crate) fn save(&mut self, vmm: usize) -> Result<(), String> {
        if self.vmms[vmm].state != Plugged::Paused {
            return Err("Save needs a paused guest".to_owned());
        }
        self.write(vmm, SAVED_PAGE);
        Ok(())
    }

    pub(crate) fn load(&mut self, vmm: usize, paused: bool) -> Result<(), String> {
        if self.vmms[vmm].state != Plugged::Incoming {
            return Err("Load needs a prepared VMM".to_owned());
        }
        self.vmms[vmm].state = Plugged::Loaded;
        self.vmms[vmm].held = paused;
        Ok(())
    }

    /// Gives up the lock on the disk.
    pub(crate) fn give_up(&mut self, vmm: usize) -> Result<(), String> {
        if self.vmms[vmm].state != Plugged::Paused {
            return Err("Yield needs a paused guest".to_owned());
        }
        if self.lock == Some(vmm) {
            self.lock = None;
        }
        Ok(())
    }

    /// The VMM's process ends.
    pub(crate) fn end(&mut self, vmm: usize) {
        self.vmms[vmm].lives = false;
        self.vmms[vmm].agent = None;
        if self.lock == Some(vmm) {
            self.lock = None;
        }
    }

    /// Its agent is gone.
    pub(crate) fn agent_lost(&mut self, vmm: usize) {
        self.vmms[vmm].agent = None;
        self.vmms[vmm].tracking = false;
        if self.vmms[vmm].state == Plugged::Incoming {
            self.end(vmm);
        }
    }

    fn write(&mut self, vmm: usize, page: u64) {
        let index = usize::try_from(page).unwrap();
        self.written += 1;
        self.truth[index] = self.written;
        self.vmms[vmm].memory[index] = self.written;
        if self.vmms[vmm].tracking {
            self.vmms[vmm].dirty.insert(PageRange { first: page, count: 1 });
        }
    }

    /// So much time passes; a guest that runs writes.
    pub(crate) fn pass(&mut self, ns: u64) {
        let Some(vmm) = self.runner() else { return };
        // What it wrote in hours that nobody looks at would be the same pages again.
        self.rest += ns.min(200_000_000) * self.writes_per_ms;
        let writes = self.rest / 1_000_000;
        self.rest %= 1_000_000;
        for _ in 0..writes.min(2000) {
            let page = WRITTEN_FROM + self.written.wrapping_mul(0x9E37_79B9_7F4A_7C15) % 61;
            self.write(vmm, page);
        }
    }
}

/// Whether the number names a page of the guest, and not the gap between two regions.
fn in_memory(page: usize) -> bool {
    !(40..64).contains(&page) && page < 64 + 400
}
