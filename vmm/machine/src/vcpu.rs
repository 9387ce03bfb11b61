//! vCPU threads: running, pausing and resuming all of them at once. Not their saved state: that is `vcpu_state.rs`.
//!
//! Soundness: `immediate_exit` is one byte of the vCPU's `kvm_run` page, which stays mapped as long as its `VcpuFd`,
//! and both are held by `Vcpu`. Other threads touch only this byte, atomically; kvm-ioctls never touches it in `run`.
//!
//! How a pause cannot be missed: the pauser sets `immediate_exit` and then signals the thread. A vCPU in the guest leaves
//! it for the signal; one about to enter sees the byte; one that handles an exit sees it at its next KVM_RUN, which first
//! completes the pending I/O. So after EINTR no exit is half done and the registers can be read.

use std::sync::atomic::{AtomicBool, AtomicU8, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use kvm_bindings::{Xsave, kvm_xsave2};
use kvm_ioctls::{VcpuExit, VcpuFd};
use vmm_sys_util::signal::{Killable, SIGRTMIN, register_signal_handler};

use crate::bus::{Bus, PioOutcome};
use crate::event::{Events, MachineEvent};

/// A pause that takes longer than this has failed; it takes well under 1 ms when all is well.
const PAUSE_MAX: Duration = Duration::from_secs(5);
/// The XSAVE area before KVM_GET_XSAVE2, in bytes.
const XSAVE_BYTES_MIN: usize = 4096;
const KICK_AGAIN: Duration = Duration::from_millis(50);

/// Why vCPUs could not be started, paused or resumed.
#[derive(Debug, thiserror::Error)]
pub enum RunError {
    /// Some vCPU or device did not stop in time.
    #[error("{what} did not pause within {ms} ms; the machine may still run")]
    Stuck {
        /// Who did not stop.
        what: String,
        /// The time it was given, in milliseconds.
        ms: u64,
    },
    /// A device cannot work here now.
    #[error("the machine cannot run: {device}: {reason}")]
    Device {
        /// The device, as `disk0`.
        device: String,
        /// Why, and what to do.
        reason: String,
    },
    /// The machine was never booted nor loaded.
    #[error("the machine has nothing to run: boot a kernel or load a state first")]
    Empty,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Target {
    Paused,
    Running,
    Quit,
}

#[derive(Debug)]
struct GateState {
    target: Target,
    parked: usize,
}

/// Where vCPU threads wait while the machine is paused.
#[derive(Debug)]
struct Gate {
    state: Mutex<GateState>,
    /// For vCPU threads: what they shall do has changed.
    changed: Condvar,
    /// For who pauses: the last one has parked. A condition of its own, so that 32 vCPUs wake nobody 31 times too often.
    all_parked: Condvar,
    vcpus: usize,
}

impl Gate {
    fn lock(&self) -> MutexGuard<'_, GateState> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// One vCPU: its descriptor, locked by its thread while it runs.
#[derive(Debug)]
pub(crate) struct Vcpu {
    pub(crate) id: u32,
    fd: Mutex<VcpuFd>,
    immediate_exit: *const AtomicU8,
    ended: AtomicBool,
}

// SAFETY: the pointer leads to an atomic in a mapping that is owned by `fd`; everything else is Send and Sync.
unsafe impl Send for Vcpu {}
// SAFETY: as above; the pointee is only used as an atomic.
unsafe impl Sync for Vcpu {}

impl Vcpu {
    pub(crate) fn new(id: u32, mut fd: VcpuFd) -> Self {
        let run: *mut kvm_bindings::kvm_run = fd.get_kvm_run();
        // SAFETY: `run` points to the mapped kvm_run; the byte is in it and AtomicU8 has the layout of u8.
        let immediate_exit = unsafe { std::ptr::addr_of!((*run).immediate_exit) }.cast::<AtomicU8>();
        Self { id, fd: Mutex::new(fd), immediate_exit, ended: AtomicBool::new(false) }
    }

    /// The descriptor; while the machine runs this waits for the next pause.
    pub(crate) fn fd(&self) -> MutexGuard<'_, VcpuFd> {
        self.fd.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn set_immediate_exit(&self, value: u8) {
        // SAFETY: the mapping lives as long as `self.fd`, and the byte is only accessed atomically.
        let byte = unsafe { &*self.immediate_exit };
        byte.store(value, Ordering::SeqCst);
    }

    /// This vCPU reset, shut down or failed, and will not run again.
    pub(crate) fn has_ended(&self) -> bool {
        self.ended.load(Ordering::Acquire)
    }
}

/// All vCPUs of a machine and their threads.
#[derive(Debug)]
pub(crate) struct VcpuSet {
    vcpus: Vec<Arc<Vcpu>>,
    threads: Vec<JoinHandle<()>>,
    gate: Arc<Gate>,
}

extern "C" fn on_kick(_: libc::c_int, _: *mut libc::siginfo_t, _: *mut libc::c_void) {}

/// The signal that takes a thread out of KVM_RUN; its handler does nothing.
fn kick_signal() -> libc::c_int {
    SIGRTMIN()
}

impl VcpuSet {
    /// Starts a thread for each vCPU; all are parked when this returns.
    pub(crate) fn start(vcpus: Vec<Arc<Vcpu>>, bus: &Arc<Bus>, events: &Arc<Events>) -> std::io::Result<Self> {
        register_signal_handler(kick_signal(), on_kick).map_err(std::io::Error::from)?;
        let state = Mutex::new(GateState { target: Target::Paused, parked: 0 });
        let gate = Gate { state, changed: Condvar::new(), all_parked: Condvar::new(), vcpus: vcpus.len() };
        let gate = Arc::new(gate);
        let mut set = Self { vcpus, threads: Vec::new(), gate };
        for vcpu in &set.vcpus {
            let runner =
                Runner { vcpu: Arc::clone(vcpu), gate: Arc::clone(&set.gate), bus: Arc::clone(bus), events: Arc::clone(events) };
            let thread = std::thread::Builder::new().name(format!("vcpu{}", vcpu.id)).spawn(move || runner.run())?;
            set.threads.push(thread);
        }
        let _ = set.wait_parked();
        Ok(set)
    }

    pub(crate) fn vcpus(&self) -> &[Arc<Vcpu>] {
        &self.vcpus
    }

    /// Lets all vCPUs run.
    pub(crate) fn resume(&self) {
        let mut state = self.gate.lock();
        if state.target == Target::Paused {
            state.target = Target::Running;
        }
        // Under the lock: vCPUs that wake wait for it a moment longer, and on a host with few CPUs this thread, which has yet
        // to tell others that the guest runs, gets to go on before they take its CPU.
        self.gate.changed.notify_all();
    }

    /// Kicks all vCPUs out of the guest, then waits until all are parked.
    pub(crate) fn pause(&self) -> Result<(), RunError> {
        {
            let mut state = self.gate.lock();
            if state.target == Target::Running {
                state.target = Target::Paused;
            }
            for vcpu in &self.vcpus {
                vcpu.set_immediate_exit(1);
            }
        }
        self.kick();
        self.wait_parked()
    }

    fn kick(&self) {
        for thread in &self.threads {
            // A thread that has ended cannot be signalled, and need not be.
            let _ = thread.kill(kick_signal());
        }
    }

    fn wait_parked(&self) -> Result<(), RunError> {
        let deadline = Instant::now() + PAUSE_MAX;
        let mut state = self.gate.lock();
        while state.parked < self.threads.len() {
            if Instant::now() >= deadline {
                let missing = self.threads.len() - state.parked;
                return Err(RunError::Stuck { what: format!("{missing} vCPU(s)"), ms: PAUSE_MAX.as_millis() as u64 });
            }
            let (next, waited) = self.gate.all_parked.wait_timeout(state, KICK_AGAIN).unwrap_or_else(PoisonError::into_inner);
            state = next;
            if waited.timed_out() && state.target != Target::Running {
                self.kick();
            }
        }
        Ok(())
    }
}

impl Drop for VcpuSet {
    fn drop(&mut self) {
        {
            let mut state = self.gate.lock();
            state.target = Target::Quit;
            for vcpu in &self.vcpus {
                vcpu.set_immediate_exit(1);
            }
            self.gate.changed.notify_all();
        }
        self.kick();
        for thread in self.threads.drain(..) {
            let _ = thread.join();
        }
    }
}

/// What to do after one exit.
enum Step {
    Again,
    Interrupted,
    Ended(MachineEvent),
}

/// What runs on a vCPU's thread.
struct Runner {
    vcpu: Arc<Vcpu>,
    gate: Arc<Gate>,
    bus: Arc<Bus>,
    events: Arc<Events>,
}

impl Runner {
    fn run(&self) {
        while self.park() {
            let mut fd = self.vcpu.fd();
            loop {
                match self.step(&mut fd) {
                    Step::Again => {}
                    Step::Interrupted if self.may_go_on() => {}
                    Step::Interrupted => break,
                    Step::Ended(event) => {
                        self.vcpu.ended.store(true, Ordering::Release);
                        self.events.push(event);
                        break;
                    }
                }
            }
        }
    }

    /// Waits for leave to run; false when the thread shall end.
    fn park(&self) -> bool {
        let mut state = self.gate.lock();
        state.parked += 1;
        if state.parked == self.gate.vcpus {
            self.gate.all_parked.notify_all();
        }
        loop {
            match state.target {
                Target::Quit => return false,
                Target::Running if !self.vcpu.has_ended() => break,
                _ => state = self.gate.changed.wait(state).unwrap_or_else(PoisonError::into_inner),
            }
        }
        state.parked -= 1;
        // Under the gate's lock, so that a pause that comes now sets it again.
        self.vcpu.set_immediate_exit(0);
        true
    }

    /// After EINTR: a signal that was not a pause's is no reason to stop.
    fn may_go_on(&self) -> bool {
        let state = self.gate.lock();
        if state.target == Target::Running {
            // Under the gate's lock, as in `park`.
            self.vcpu.set_immediate_exit(0);
        }
        state.target == Target::Running
    }

    fn step(&self, fd: &mut VcpuFd) -> Step {
        let vcpu = self.vcpu.id;
        match fd.run() {
            Ok(VcpuExit::IoOut(port, data)) => match self.bus.pio_write(port, data) {
                PioOutcome::Done => Step::Again,
                PioOutcome::Reset => Step::Ended(MachineEvent::Reset { vcpu }),
                PioOutcome::PowerOff => Step::Ended(MachineEvent::Shutdown { vcpu, reason: "it switched itself off".to_owned() }),
            },
            Ok(VcpuExit::IoIn(port, data)) => {
                self.bus.pio_read(port, data);
                Step::Again
            }
            Ok(VcpuExit::MmioRead(address, data)) => {
                self.bus.mmio_read(address, data);
                Step::Again
            }
            Ok(VcpuExit::MmioWrite(address, data)) => {
                self.bus.mmio_write(address, data);
                Step::Again
            }
            Ok(VcpuExit::Hlt) => Step::Ended(MachineEvent::Halted { vcpu }),
            Ok(VcpuExit::Shutdown) => {
                Step::Ended(MachineEvent::Shutdown { vcpu, reason: "KVM_EXIT_SHUTDOWN: triple fault".to_owned() })
            }
            Ok(VcpuExit::SystemEvent(kind, _)) => system_event(vcpu, kind),
            Ok(VcpuExit::Intr | VcpuExit::IrqWindowOpen | VcpuExit::SetTpr | VcpuExit::IoapicEoi(_)) => Step::Again,
            Ok(VcpuExit::InternalError) => Step::Ended(MachineEvent::Failed { vcpu, reason: internal_error(fd) }),
            Ok(VcpuExit::FailEntry(reason, cpu)) => Step::Ended(MachineEvent::Failed {
                vcpu,
                reason: format!("KVM_EXIT_FAIL_ENTRY: hardware reason {reason:#x} on CPU {cpu}"),
            }),
            Ok(exit) => Step::Ended(MachineEvent::Failed { vcpu, reason: format!("unexpected KVM exit: {exit:?}") }),
            Err(error) if error.errno() == libc::EINTR => Step::Interrupted,
            Err(error) if error.errno() == libc::EAGAIN => Step::Again,
            Err(error) => Step::Ended(MachineEvent::Failed { vcpu, reason: format!("KVM_RUN failed: {error}") }),
        }
    }
}

/// The XSAVE area of a paused vCPU in 32-bit words; `bytes` is what KVM said that it needs.
pub(crate) fn xsave(fd: &VcpuFd, xsave2: bool, bytes: u32) -> Result<Vec<u32>, kvm_ioctls::Error> {
    if !xsave2 {
        return Ok(fd.get_xsave()?.region.to_vec());
    }
    let extra = (bytes as usize).saturating_sub(XSAVE_BYTES_MIN).div_ceil(4);
    let mut area = Xsave::new(extra).map_err(|_| kvm_ioctls::Error::new(libc::ENOMEM))?;
    // SAFETY: the area has room for `bytes`, which KVM_CHECK_EXTENSION(KVM_CAP_XSAVE2) gave for this VM.
    unsafe { fd.get_xsave2(&mut area) }?;
    let mut words = area.as_fam_struct_ref().xsave.region.to_vec();
    words.extend_from_slice(area.as_slice());
    Ok(words)
}

/// Sets the XSAVE area. Words beyond what this host knows must be zero; missing ones are.
pub(crate) fn set_xsave(fd: &VcpuFd, words: &[u32], bytes: u32) -> Result<(), kvm_ioctls::Error> {
    let extra = (bytes as usize).saturating_sub(XSAVE_BYTES_MIN).div_ceil(4);
    let known = XSAVE_BYTES_MIN / 4 + extra;
    if words.iter().skip(known).any(|word| *word != 0) {
        return Err(kvm_ioctls::Error::new(libc::E2BIG));
    }
    let mut header = kvm_xsave2 { len: extra, ..Default::default() };
    for (to, from) in header.xsave.region.iter_mut().zip(words) {
        *to = *from;
    }
    let mut area = Xsave::from_header(header).map_err(|_| kvm_ioctls::Error::new(libc::ENOMEM))?;
    for (to, from) in area.as_mut_slice().iter_mut().zip(words.iter().skip(XSAVE_BYTES_MIN / 4)) {
        *to = *from;
    }
    // SAFETY: the area is at least as large as this VM's XSAVE area, which is all that the kernel reads.
    unsafe { fd.set_xsave2(&area) }
}

fn system_event(vcpu: u32, kind: u32) -> Step {
    match kind {
        kvm_bindings::KVM_SYSTEM_EVENT_RESET => Step::Ended(MachineEvent::Reset { vcpu }),
        kvm_bindings::KVM_SYSTEM_EVENT_SHUTDOWN => {
            Step::Ended(MachineEvent::Shutdown { vcpu, reason: "KVM_EXIT_SYSTEM_EVENT: shutdown".to_owned() })
        }
        other => Step::Ended(MachineEvent::Failed { vcpu, reason: format!("KVM_EXIT_SYSTEM_EVENT of kind {other}") }),
    }
}

/// KVM_EXIT_INTERNAL_ERROR in words, with where the guest was.
fn internal_error(fd: &mut VcpuFd) -> String {
    let run = fd.get_kvm_run();
    // SAFETY: the exit reason is KVM_EXIT_INTERNAL_ERROR, for which KVM fills this arm; all bit patterns are valid.
    let suberror = unsafe { run.__bindgen_anon_1.internal.suberror };
    let what = match suberror {
        1 => "an instruction that KVM cannot emulate",
        2 => "simultaneous exceptions",
        3 => "delivery of an event failed",
        4 => "unexpected exit reason",
        _ => "of unknown kind",
    };
    let place = match fd.get_regs() {
        Ok(regs) => format!("RIP {:#x}", regs.rip),
        Err(error) => format!("RIP unknown: {error}"),
    };
    format!("KVM_EXIT_INTERNAL_ERROR {suberror}: {what}, {place}")
}
