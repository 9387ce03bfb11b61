//! The smallest VMM that can be plugged in: no KVM, only memory and threads that scribble counters into it.
//! It shows what a VMM has to do for the plug, and passes the same conformance test as a real one. No guest runs here.
//!
//! ```text
//! scribbler SOCKET TOKEN running|incoming      TOKEN: 32 hexadecimal digits
//! ```
#![forbid(unsafe_code)]
#![allow(clippy::print_stderr)]

use limosa_plug::{DirtyBitmap, Ended, GuestMemory, ServeOptions, Token, VmState, Vmm, VmmDescription, events, memfd, serve};
use limosa_proto::identity::VmId;
use limosa_proto::memory::{Gpa, MemoryMap, PAGE_BYTES, PageRange, Region};
use limosa_proto::record::Record;
use limosa_proto::wire::message::VmDescription;
use std::os::fd::OwnedFd;
use std::process::ExitCode;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, RwLock, RwLockReadGuard, RwLockWriteGuard};
use std::time::Duration;

/// Kind and version of the one record: how far each thread has come.
const RECORD: (u16, u16) = (1, 1);
const THREADS: u64 = 2;

/// What the threads and the plug's thread share.
struct Machine {
    memory: GuestMemory,
    map: MemoryMap,
    /// Like a vCPU's run permission: threads scribble while they hold it for reading and `running` is set.
    gate: RwLock<()>,
    running: AtomicBool,
    ended: AtomicBool,
    tracking: AtomicBool,
    /// What has been written since the last fetch; one bit a page.
    written: Vec<AtomicU64>,
    /// How often each thread has scribbled.
    steps: [AtomicU64; THREADS as usize],
}

impl Machine {
    /// Holding this, no thread is in the middle of a step.
    fn hold(&self) -> RwLockWriteGuard<'_, ()> {
        self.gate.write().unwrap_or_else(std::sync::PoisonError::into_inner)
    }

    fn permission(&self) -> RwLockReadGuard<'_, ()> {
        self.gate.read().unwrap_or_else(std::sync::PoisonError::into_inner)
    }

    /// One step of a thread: a counter goes up in one page of its own half of each region.
    fn scribble(&self, thread: u64, step: u64) {
        let index = usize::try_from(step % self.map.regions().len() as u64).unwrap_or(0);
        let Some(region) = self.map.region_range(index) else { return };
        let half = region.count / THREADS;
        let page = region.first + thread * half + (step.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 32) % half;
        let range = PageRange { first: page, count: 1 };
        let mut counter = [0; 8];
        self.memory.read(range, 64, &mut counter);
        let next = u64::from_le_bytes(counter).wrapping_add(1);
        self.memory.write(range, 64, &next.to_le_bytes());
        // After the write: a bit that is taken before it would be taken too early.
        if self.tracking.load(Ordering::SeqCst)
            && let Some(word) = usize::try_from(page / 64).ok().and_then(|index| self.written.get(index))
        {
            word.fetch_or(1 << (page % 64), Ordering::AcqRel);
        }
    }

    fn thread(&self, thread: u64) {
        let Some(steps) = usize::try_from(thread).ok().and_then(|index| self.steps.get(index)) else { return };
        while !self.ended.load(Ordering::Acquire) {
            {
                let _permission = self.permission();
                if self.running.load(Ordering::Acquire) {
                    for _ in 0..20 {
                        self.scribble(thread, steps.fetch_add(1, Ordering::Relaxed));
                    }
                }
            }
            std::thread::sleep(Duration::from_millis(1));
        }
    }
}

pub(crate) struct Scribbler {
    description: Option<VmDescription>,
    memory: Vec<OwnedFd>,
    machine: Option<Arc<Machine>>,
    threads: Vec<std::thread::JoinHandle<()>>,
}

impl Scribbler {
    /// One that waits for a guest.
    pub(crate) fn new() -> Scribbler {
        Scribbler { description: None, memory: Vec::new(), machine: None, threads: Vec::new() }
    }

    /// Builds a machine of its own and lets it run.
    pub(crate) fn start(&mut self) -> Result<(), String> {
        self.build(description()?)?;
        self.resume()
    }

    /// How it plugs in.
    pub(crate) fn options(&self, socket: &str, token: Token) -> ServeOptions {
        let (id, name, state) = match &self.description {
            Some(description) => (description.id, description.name.clone(), VmState::Running),
            None => (VmId([0; 16]), String::new(), VmState::Waiting),
        };
        ServeOptions { socket: socket.into(), token, id, name, state, first_contact_time_max: Some(Duration::from_secs(10)) }
    }

    /// Makes the memory and the threads, which do not scribble yet.
    fn build(&mut self, description: VmDescription) -> Result<(), String> {
        let map = description.memory.clone();
        let words = |error: std::io::Error| format!("guest memory: {error}");
        let made = map.regions().iter().map(|region| memfd::create("scribbler", region.bytes));
        self.memory = made.collect::<Result<_, _>>().map_err(words)?;
        let fds = self.memory.iter().map(|fd| Ok((fd.try_clone()?, 0))).collect::<Result<_, _>>().map_err(words)?;
        let memory = GuestMemory::map(map.clone(), fds).map_err(|error| error.to_string())?;
        let written = (0..map.numbers() / 64).map(|_| AtomicU64::new(0)).collect();
        let machine = Arc::new(Machine {
            memory,
            map,
            gate: RwLock::new(()),
            running: AtomicBool::new(false),
            ended: AtomicBool::new(false),
            tracking: AtomicBool::new(false),
            written,
            steps: Default::default(),
        });
        for thread in 0..THREADS {
            let machine = Arc::clone(&machine);
            self.threads.push(std::thread::spawn(move || machine.thread(thread)));
        }
        (self.machine, self.description) = (Some(machine), Some(description));
        Ok(())
    }

    fn machine(&self) -> Result<&Machine, String> {
        self.machine.as_deref().ok_or_else(|| "no machine has been built".to_owned())
    }

    fn end(&mut self) -> Result<(), String> {
        if let Some(machine) = &self.machine {
            machine.ended.store(true, Ordering::Release);
        }
        let panicked = self.threads.drain(..).filter_map(|thread| thread.join().err()).count();
        if panicked == 0 { Ok(()) } else { Err(format!("{panicked} threads panicked")) }
    }
}

impl Vmm for Scribbler {
    fn describe(&mut self) -> Result<VmmDescription, String> {
        let description = self.description.clone().ok_or("no machine has been built")?;
        let fds = self.memory.iter().map(|fd| Ok((fd.try_clone()?, 0))).collect::<std::io::Result<_>>();
        Ok(VmmDescription { description, memory: fds.map_err(|error| error.to_string())? })
    }

    fn prepare(&mut self, description: &VmDescription, _bridges: &[(String, String)]) -> Result<VmmDescription, String> {
        if description.vmm != "scribbler" {
            return Err(format!("a guest of the VMM {} cannot run in a scribbler", description.vmm));
        }
        self.build(description.clone())?;
        self.describe()
    }

    fn track(&mut self, on: bool) -> Result<(), String> {
        let machine = self.machine()?;
        let _held = machine.hold();
        machine.tracking.store(on, Ordering::SeqCst);
        machine.written.iter().for_each(|word| word.store(0, Ordering::Release));
        Ok(())
    }

    fn fetch_dirty(&mut self, into: &DirtyBitmap) -> Result<(), String> {
        let written = &self.machine()?.written;
        written.iter().enumerate().for_each(|(index, word)| into.or(index, word.swap(0, Ordering::AcqRel)));
        Ok(())
    }

    fn pause(&mut self) -> Result<(), String> {
        let machine = self.machine()?;
        let _held = machine.hold();
        machine.running.store(false, Ordering::Release);
        Ok(())
    }

    fn save(&mut self) -> Result<Vec<Record>, String> {
        let steps = &self.machine()?.steps;
        let bytes = steps.iter().flat_map(|steps| steps.load(Ordering::Acquire).to_le_bytes()).collect();
        Ok(vec![Record { kind: RECORD.0, version: RECORD.1, instance: 0, bytes }])
    }

    fn load(&mut self, state: Vec<Record>) -> Result<(), String> {
        let [record] = state.as_slice() else { return Err(format!("one record is needed, and {} came", state.len())) };
        let (numbers, rest) = record.bytes.as_chunks::<8>();
        let machine = self.machine()?;
        if (record.kind, record.version) != RECORD || numbers.len() != machine.steps.len() || !rest.is_empty() {
            return Err(format!("{record:?} is not a scribbler's"));
        }
        machine.steps.iter().zip(numbers).for_each(|(steps, number)| steps.store(u64::from_le_bytes(*number), Ordering::Release));
        Ok(())
    }

    fn resume(&mut self) -> Result<(), String> {
        self.machine()?.running.store(true, Ordering::Release);
        Ok(())
    }

    fn throttle(&mut self, _percent: u8) -> Result<(), String> {
        Err("a scribbler cannot be throttled".to_owned())
    }

    fn release(&mut self) -> Result<(), String> {
        self.end()
    }

    fn discard(&mut self) -> Result<(), String> {
        self.end()
    }

    fn shutdown(&mut self) -> Result<(), String> {
        self.end()
    }
}

fn description() -> Result<VmDescription, String> {
    let region = |gpa, bytes| Region { gpa: Gpa(gpa), bytes, page_bytes: PAGE_BYTES };
    // The first region does not end on a whole word of the bitmap.
    let memory = MemoryMap::new(vec![region(0, (8 << 20) + 5 * PAGE_BYTES), region(1 << 32, 4 << 20)]);
    Ok(VmDescription {
        id: VmId([0x5c; 16]),
        name: "scribbler".to_owned(),
        vcpus: 2,
        memory: memory.map_err(|error| error.to_string())?,
        nics: Vec::new(),
        disks: Vec::new(),
        vmm: "scribbler".to_owned(),
        records: vec![RECORD],
        config: Vec::new(),
    })
}

fn run() -> Result<Ended, String> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let [socket, token, role] = arguments.as_slice() else {
        return Err("usage: scribbler SOCKET TOKEN running|incoming".to_owned());
    };
    let token = u128::from_str_radix(token, 16).map_err(|error| format!("TOKEN: {error}"))?;
    let mut vmm = Scribbler::new();
    if role == "running" {
        vmm.start()?;
    }
    let options = vmm.options(socket, Token(token.to_be_bytes()));
    // Nothing stops this guest by itself, so nobody sends events.
    let (_sender, events) = events().map_err(|error| error.to_string())?;
    serve(&options, &mut vmm, &events).map_err(|error| error.to_string())
}

fn main() -> ExitCode {
    match run() {
        Ok(ended) => {
            eprintln!("scribbler: {ended:?}");
            ExitCode::SUCCESS
        }
        Err(words) => {
            eprintln!("scribbler: {words}");
            ExitCode::FAILURE
        }
    }
}
