//! Guests that leave: the plan, the job, and the source's host over the plug. Which link is tried and what becomes of it is
//! `leaving`; how a migration goes is decided by `limosa_proto` and carried out by `limosa_link`'s driver.

use crate::agent::Agent;
use crate::announcing;
use crate::api::{ApiError, Direction, HostInfo, JobInfo, MigrateRequest, Plan};
use crate::cutting::{self, Ends, Other};
use crate::disks::{self, Marks};
use crate::hosts::Host;
use crate::leaving;
use crate::pages::{GuestPages, huge_pages};
use crate::settle;
use crate::tickets;
use crate::vm::{Claim, Vm, VmState};
use limosa_announce::Kept;
use limosa_link::choose::Wanted;
use limosa_link::failpoints::{self, Point};
use limosa_link::{HostError, Pages, SourceHost};
use limosa_plug::{PlugError, VmState as Plugged};
use limosa_proto::bitmap::PageSet;
use limosa_proto::commit::{JournalRecord, JournalRecordKind};
use limosa_proto::identity::MigrationId;
use limosa_proto::precopy::NoConvergence;
use limosa_proto::record::Record;
use limosa_proto::ticket::{Action, TicketBytes};
use limosa_proto::wire::message::{VerdictAnswer, VmDescription};
use ring::rand::SecureRandom as _;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

/// How long a paused guest's VMM that has lost its connection may take to come back before it is given up.
const REPLUG_MAX: Duration = Duration::from_secs(3);
/// More lanes than this bring nothing unless they are asked for.
const LANES_CHOSEN_MAX: usize = 4;

/// No host has this name here.
pub(crate) fn unknown_host(name: &str) -> ApiError {
    ApiError::refused("unknown-host", format!("no host is called \"{name}\" here; `limosa host trust` makes one known"))
}

/// What would be done, with everything resolved but the link.
pub(crate) fn resolve(agent: &Agent, request: &MigrateRequest) -> Result<(Plan, Host, Wanted), ApiError> {
    let vm = agent.vms.named(&request.vm)?;
    let host = agent.hosts.named(&request.to).ok_or_else(|| unknown_host(&request.to))?;
    let description =
        vm.description().ok_or_else(|| ApiError::refused("vmm-failed", format!("{} has not described itself", vm.name)))?;
    let set = &agent.config.migration;
    let ms = |duration: Duration| u64::try_from(duration.as_millis()).unwrap_or(u64::MAX);
    let words = |policy| if policy == NoConvergence::Abort { "abort" } else { "longer-downtime" };
    let on_no_convergence = request.on_no_convergence.clone().unwrap_or_else(|| words(set.on_no_convergence).into());
    let lanes = request.lanes.or(set.lanes).unwrap_or_else(chosen_lanes);
    let wanted = request.link.as_deref().map_or(Ok(set.link), str::parse::<Wanted>);
    let wanted = wanted.map_err(|words| ApiError::usage("link", words))?;
    let plan = Plan {
        vm: vm.name.clone(),
        vm_id: vm.id.to_string(),
        memory_bytes: description.memory.bytes(),
        to: HostInfo { name: host.name.clone(), id: host.id.to_string(), address: host.address.clone() },
        link_wanted: wanted.to_string(),
        link: String::new(),
        link_reason: String::new(),
        links: Vec::new(),
        links_tried: Vec::new(),
        plaintext: request.plaintext.or(set.plaintext_lanes.then_some(true)),
        encrypted: true,
        page_check: request.page_check.unwrap_or(set.page_check),
        lanes,
        quick: request.quick.unwrap_or(false),
        paused: vm.state() == VmState::Held,
        downtime_target_ms: request.downtime_target_ms.unwrap_or(ms(set.downtime_target)),
        downtime_ms_max: request
            .downtime_ms_max
            .unwrap_or_else(|| ms(set.downtime_max).max(request.downtime_target_ms.unwrap_or(0))),
        on_no_convergence,
        bandwidth: request.bandwidth.unwrap_or(set.bandwidth),
    };
    if plan.plaintext == Some(true) && !set.plaintext_lanes {
        let words = "lanes without TLS were asked for; this host's settings do not allow them (migration.plaintext_lanes)";
        return Err(ApiError::refused("plaintext-refused", words));
    }
    let bad = |words: &str| Err(ApiError::usage("request", words));
    if !(1..=16).contains(&plan.lanes) {
        return bad("1 to 16 lanes are possible");
    }
    if plan.downtime_target_ms == 0 || plan.downtime_target_ms > plan.downtime_ms_max || plan.downtime_ms_max > 600_000 {
        return bad("the downtime aimed at should be from 1 ms to the longest downtime, and that at most 10 minutes");
    }
    if !["longer-downtime", "abort"].contains(&plan.on_no_convergence.as_str()) {
        return bad("on_no_convergence should be \"longer-downtime\" or \"abort\"");
    }
    Ok((plan, host, wanted))
}

/// As many lanes as this machine has use for.
fn chosen_lanes() -> u16 {
    let cores = std::thread::available_parallelism().map_or(1, std::num::NonZero::get);
    u16::try_from(cores.min(LANES_CHOSEN_MAX)).unwrap_or(1)
}

/// Everything that a migration needs of the guest.
pub(crate) struct Prepared {
    pub(crate) plan: Plan,
    pub(crate) host: Host,
    pub(crate) wanted: Wanted,
    pub(crate) claim: Claim,
    pub(crate) description: VmDescription,
    pub(crate) pages: Arc<GuestPages>,
    /// Beside the images, for as long as the migration takes.
    pub(crate) marks: Marks,
    /// An operator's word that it may.
    pub(crate) ticket: Option<TicketBytes>,
}

/// Begins to move a guest; gives the job's number.
pub(crate) async fn begin(agent: &Arc<Agent>, request: MigrateRequest) -> Result<u64, ApiError> {
    if agent.is_stopping() {
        return Err(ApiError::refused("shutdown", "the agent is stopping"));
    }
    agent.can_record().map_err(|words| ApiError::refused("journal", words))?;
    let most = agent.config.migration.outgoing_max;
    if agent.jobs.running(Direction::Outgoing) >= most {
        let words = format!("{most} guests are leaving already, and no more may (migration.outgoing_max)");
        return Err(ApiError::refused("busy", words));
    }
    let preparing = Arc::clone(agent);
    let prepared = tokio::task::spawn_blocking(move || {
        prepare(&preparing, &request).map(|prepared| (cutting::addresses(&prepared.host.address), prepared))
    });
    let (to, prepared) = prepared.await.map_err(|e| ApiError::refused("internal", e.to_string()))??;
    let other = Other { id: prepared.host.id, ends: Ends::Outgoing { to } };
    if let Some(words) = cutting::why_not(agent, &other, None) {
        return Err(ApiError::refused("unknown-host", words));
    }
    let mut migration = [0; 16];
    ring::rand::SystemRandom::new()
        .fill(&mut migration)
        .map_err(|_| ApiError::refused("internal", "the system gives no random numbers"))?;
    let migration = MigrationId(migration);
    let generation = agent.journal().next_generation(prepared.description.id);
    let (plan, peer) = (&prepared.plan, prepared.host.name.clone());
    let job = |id| JobInfo::begun(id, Direction::Outgoing, &plan.vm, &plan.vm_id, peer).of(migration, generation);
    let (id, cancel) = agent.jobs.begin(job);
    agent.jobs.with(id, other.clone());
    // As for one that comes: from here on a change finds the job.
    if let Some(words) = cutting::why_not(agent, &other, None) {
        cancel.cancel(words);
    }
    tracing::info!(job = id, vm = prepared.plan.vm, to = prepared.host.name, %migration, "a guest begins to leave");
    tokio::spawn(leaving::carry_out(Arc::clone(agent), id, prepared, (migration, generation), cancel));
    Ok(id)
}

fn prepare(agent: &Agent, request: &MigrateRequest) -> Result<Prepared, ApiError> {
    let (mut plan, host, wanted) = resolve(agent, request)?;
    let vm = agent.vms.named(&request.vm)?;
    let ticket = tickets::of_order(agent, request, (vm.id, &vm.name), &host, Action::Migrate)?;
    let claim = agent.vms.claim(&request.vm, "migrating")?;
    // From here on nobody else pauses or resumes it.
    plan.paused = claim.vm().state() == VmState::Held;
    let failed = |words: String| ApiError::refused("vmm-failed", words);
    settle::before_it_leaves(agent, claim.vm().id).map_err(|error| ApiError::refused("journal", error.to_string()))?;
    let connection = claim.vm().connection_within(REPLUG_MAX).map_err(failed)?;
    let described = connection.describe().map_err(|e| failed(e.to_string()))?;
    let mut description = claim.vm().with_learned(described.description.clone());
    let memory = described.map(huge_pages(&description)).map_err(|e| failed(e.to_string()))?;
    let marked = disks::mark(&agent.config.state_dir, &mut description);
    let marks = marked.map_err(|words| ApiError::refused("disk", words))?;
    Ok(Prepared { plan, host, wanted, claim, description, pages: Arc::new(GuestPages(memory)), marks, ticket })
}

/// The source's host: the guest's VMM behind the plug, and the journal.
pub(crate) struct Sending {
    agent: Arc<Agent>,
    vm: Arc<Vm>,
    pages: Arc<GuestPages>,
    /// CPU seconds of the VMM before the migration.
    began: f64,
    /// CPU seconds of it for the migration, as last seen.
    used: f64,
    kept: KeptFrames,
}

/// What came to the guest's ports since its state was saved.
pub(crate) type KeptFrames = Arc<Mutex<Vec<Kept>>>;

pub(crate) fn host_error(error: PlugError) -> HostError {
    HostError::new(error.to_string())
}

/// Resumes the guest of `vm`; that it runs already is fine.
pub(crate) fn resume(vm: &Vm, patience: Duration) -> Result<(), HostError> {
    let connection = vm.connection_within(patience).map_err(HostError::new)?;
    let resumed = connection.resume();
    if !resumed.as_ref().is_err_and(PlugError::is_undone) {
        vm.set_may_have_run(true);
    }
    match resumed {
        Ok(_) => {}
        // After a lost answer the order may already have been carried out.
        Err(error @ PlugError::Refused { .. }) => match connection.status() {
            Ok(status) if status.state == Plugged::Running => {}
            _ => return Err(host_error(error)),
        },
        Err(error) => return Err(host_error(error)),
    }
    vm.set_state(VmState::Running);
    Ok(())
}

/// Has the paused guest's VMM give up its disks, if it has any. A VMM that has ended holds nothing any more.
pub(crate) fn give_up_disks(vm: &Vm) -> Result<(), HostError> {
    if !vm.may_have_disks() {
        return Ok(());
    }
    let given = vm.connection_within(REPLUG_MAX).map_err(HostError::new).and_then(|connection| {
        let took = connection.give_up().map_err(host_error)?;
        tracing::debug!(vm = vm.name, us = took.as_micros(), "the guest's disks were given up");
        Ok(())
    });
    match given {
        Err(_) if vm.has_ended() => Ok(()),
        given => given,
    }
}

/// The points before and after a source's record is durable.
fn points(kind: JournalRecordKind) -> [Point; 2] {
    match kind {
        JournalRecordKind::Released => [Point::SourceReleasedUnwritten, Point::SourceReleasedWritten],
        JournalRecordKind::Running => [Point::SourceRunningUnwritten, Point::SourceRunningWritten],
        JournalRecordKind::Aborted => [Point::SourceAbortedUnwritten, Point::SourceAbortedWritten],
        _ => [Point::SourceStartedUnwritten, Point::SourceStartedWritten],
    }
}

impl Sending {
    pub(crate) fn new(agent: &Arc<Agent>, vm: &Arc<Vm>, pages: &Arc<GuestPages>, kept: &KeptFrames) -> Sending {
        let (agent, vm, pages, kept) = (Arc::clone(agent), Arc::clone(vm), Arc::clone(pages), Arc::clone(kept));
        Sending { began: vm.cpu_seconds(), agent, vm, pages, used: 0.0, kept }
    }

    /// Keeps what comes to the guest's ports from now on. What waits there already is in the state that is saved next; what
    /// comes in between is in both, and arrives twice, which does less harm than never.
    fn keep_frames(&self) {
        let Some(description) = self.vm.description() else { return };
        let mut kept = Vec::new();
        for nic in announcing::nics(&self.agent.config, &description) {
            match Kept::begin(&nic) {
                Ok(port) => kept.extend(port),
                Err(error) => tracing::warn!(vm = self.vm.name, %error, "frames that come in the pause will be lost"),
            }
        }
        *self.kept.lock().unwrap_or_else(PoisonError::into_inner) = kept;
    }

    fn connection(&self) -> Result<Arc<limosa_plug::PlugConnection>, HostError> {
        self.vm.connection_within(Duration::ZERO).map_err(HostError::new)
    }
}

impl SourceHost for Sending {
    fn pages(&self) -> Arc<dyn Pages> {
        Arc::clone(&self.pages) as Arc<dyn Pages>
    }

    fn start_tracking(&mut self) -> Result<(), HostError> {
        failpoints::at(Point::SourceTracking)?;
        self.connection()?.track(true).map_err(host_error)
    }

    fn fetch_dirty(&mut self) -> Result<PageSet, HostError> {
        failpoints::at(Point::SourceFetching)?;
        self.connection()?.fetch_dirty().map_err(host_error)
    }

    fn pause(&mut self) -> Result<(), HostError> {
        failpoints::at(Point::SourcePausing)?;
        self.connection()?.pause().map(drop).map_err(host_error)?;
        failpoints::at(Point::SourcePaused)
    }

    fn save(&mut self) -> Result<Vec<Record>, HostError> {
        failpoints::at(Point::SourceSaving)?;
        self.keep_frames();
        let records = self.connection()?.save().map_err(host_error)?;
        failpoints::at(Point::SourceSaved)?;
        Ok(records)
    }

    fn resume(&mut self) -> Result<(), HostError> {
        // They are in the guest's own queue.
        self.kept.lock().unwrap_or_else(PoisonError::into_inner).clear();
        failpoints::at(Point::SourceResuming)?;
        resume(&self.vm, REPLUG_MAX)?;
        failpoints::at(Point::SourceResumed)
    }

    fn stop_tracking(&mut self) -> Result<(), HostError> {
        self.connection()?.track(false).map_err(host_error)
    }

    fn release(&mut self) -> Result<(), HostError> {
        failpoints::at(Point::SourceReleasing)?;
        self.used = self.vm.cpu_seconds() - self.began;
        // Its end is expected from here on. It is told to end when the network knows where the guest is: until then frames
        // for the guest come to the TAP that ends with it (`leaving`).
        self.vm.on_lost(None);
        Ok(())
    }

    fn journal(&mut self, record: &JournalRecord) -> Result<(), HostError> {
        let decided = match self.vm.decided() {
            Some((VerdictAnswer::Discarded, _)) => Some(JournalRecordKind::Aborted),
            Some(_) => Some(JournalRecordKind::Running),
            None => None,
        };
        if decided == Some(record.kind) {
            // It is written already, with who decided it and why. What the destination says against it is a fact, and is written.
            return Ok(());
        }
        let [unwritten, written] = points(record.kind);
        failpoints::at(unwritten)?;
        self.agent.write(record).map_err(|e| HostError::new(e.to_string()))?;
        failpoints::at(written)?;
        if record.kind == JournalRecordKind::Released {
            // Commit is said after this returns: the destination finds the images free, and what is in them whole.
            give_up_disks(&self.vm)?;
            failpoints::at(Point::SourceDisksGivenUp)?;
        }
        Ok(())
    }

    fn decided(&mut self) -> Option<VerdictAnswer> {
        self.vm.decided().map(|(answer, _)| answer)
    }

    fn cpu_seconds(&mut self) -> f64 {
        self.used = self.used.max(self.vm.cpu_seconds() - self.began);
        self.used
    }
}
