//! Guests that come: whether they may, the VMM that is made for them, their first moments here.
//! How a migration goes is decided by `limosa_proto` and carried out by `limosa_link`'s driver.

use crate::agent::Agent;
use crate::announcing;
use crate::api::{Direction, JobInfo, JobProgress, JobState};
use crate::asking;
use crate::audit;
use crate::config::{NAME_WANTS, plain_name};
use crate::cpu;
use crate::cutting::{self, Ends, Other};
use crate::desk;
use crate::disks;
use crate::jobs::Ending;
use crate::links;
use crate::networks;
use crate::noted;
use crate::outgoing::{host_error, resume};
use crate::pages::{GuestPages, huge_pages};
use crate::pausing::hold;
use crate::process::memory_available;
use crate::settle;
use crate::tickets::{self, Arrival};
use crate::vm::{Claim, Vm, VmState};
use limosa_announce::Questions;
use limosa_link::driver::fresh_token;
use limosa_link::failpoints::{self, Point};
use limosa_link::host::IncomingProgress;
use limosa_link::{Caller, Cancel, CommandChannel, DestinationHost, HostError, Hosting, Incoming, Pages, Peer, Reaching};
use limosa_plug::{PlugConnection, VmState as Plugged};
use limosa_proto::commit::{JournalRecord, JournalRecordKind};
use limosa_proto::compat::{self, HostOffer};
use limosa_proto::cpu::CpuProfile;
use limosa_proto::event::{DestinationConfig, DestinationOutcome};
use limosa_proto::identity::{Generation, HostId, MigrationId, Nonce, VmId};
use limosa_proto::record::Record;
use limosa_proto::recovery::Ended;
use limosa_proto::ticket::{Action, TicketBytes};
use limosa_proto::wire::code::Code;
use limosa_proto::wire::frame::ControlHeader;
use limosa_proto::wire::limits::{REASONS_MAX, WORDS_BYTES_MAX, fit};
use limosa_proto::wire::message::{Hello, Reached, Reason, Refusal, ReleasedAnswer, VerdictAnswer, VmDescription};
use limosa_proto::wire::offer::LinkOffer;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, mpsc};
use std::time::{Duration, Instant};
use tokio::sync::{oneshot, watch};

/// How long an incoming VMM may take until it has plugged in; it has no machine yet.
const LAUNCH_MAX: Duration = Duration::from_secs(20);
/// How long it may take to end after it was told to.
const DISCARD_MAX: Duration = Duration::from_millis(500);
/// Memory that stays free for the host itself, in bytes.
const HOST_BYTES: u64 = 128 << 20;

/// Who decides about what comes in.
pub(crate) struct Reception(pub(crate) Arc<Agent>);

impl Hosting for Reception {
    fn admits(&self, peer: &Peer) -> Result<(), Refusal> {
        match cutting::why_not(&self.0, &of(peer), None) {
            Some(words) if self.0.hosts.trusted().contains(peer.id) => Err(Refusal::one(Code::NotAllowed, words)),
            Some(words) => Err(Refusal::one(Code::UnknownHost, words)),
            None => Ok(()),
        }
    }

    fn same_host(&self, one: HostId, other: HostId) -> bool {
        self.0.hosts.trusted().same_host(one, other)
    }

    fn incoming(
        &self,
        peer: &Peer,
        header: &ControlHeader,
        hello: &Hello,
        ticket: Option<TicketBytes>,
    ) -> Result<Incoming, Refusal> {
        let agent = &self.0;
        if agent.is_stopping() {
            return Err(Refusal::one(Code::Shutdown, "the destination's agent is stopping"));
        }
        links::may_come_over(agent, &hello.link)?;
        let token = fresh_token().map_err(|e| Refusal::one(Code::Internal, e.to_string()))?;
        let set = &agent.config.migration;
        let mut config = DestinationConfig::new(header.migration, header.generation, peer.id, token);
        // RDMA only where this host's own address is within the trusted fabric; its port lets in only lanes of peers within it.
        config.plaintext_allowed = set.plaintext_lanes || hello.link == "rdma";
        config.page_check = set.page_check;
        config.keepalive = set.keepalive;
        config.peer_silence_max = set.silence_max;
        config.deadlines.ready = set.ready_max;
        let (job, cancel) = agent.jobs.begin(|id| job(id, agent.hosts.shown(peer.id), header, &hello.vm));
        agent.metrics.incoming(job, &hello.link);
        agent.audit.incoming(Some(job), record(peer, header, hello, ticket.as_ref()));
        agent.jobs.with(job, of(peer));
        // Taken back since it was let in: from here on a change finds the job, before this it is found here.
        if let Some(words) = cutting::why_not(agent, &of(peer), None) {
            cancel.cancel(words);
        }
        tracing::info!(job, vm = hello.vm.name, from = agent.hosts.shown(peer.id), migration = %header.migration, "a guest wants to come");
        let (progress, seen) = watch::channel(IncomingProgress {
            state: limosa_proto::state::DestinationState::Listening,
            rounds: 0,
            pages: 0,
            zero_pages: 0,
            bytes_on_wire: 0,
        });
        let (done, ended) = oneshot::channel();
        let attempt = (hello.vm.id, header.migration, header.generation);
        tokio::spawn(show(Arc::clone(agent), job, attempt, hello.vm.memory.bytes(), seen, ended));
        let receiving = Receiving {
            agent: Arc::clone(agent),
            arrival: Arrival {
                source: peer.id,
                action: Action::Migrate,
                link: hello.link.parse().ok(),
                migration: Some(header.migration),
            },
            ticket,
            used: None,
            job,
            vm: None,
            launched: false,
            runs: None,
            cancel: cancel.clone(),
            announce_end: Arc::default(),
            resumed: Instant::now(),
            questions: None,
            reaching: None,
        };
        Ok(Incoming {
            host: Box::new(receiving),
            config,
            populate: set.populate,
            cancel,
            progress: Some(progress),
            done: Some(done),
        })
    }

    fn refused(&self, peer: &Peer, header: &ControlHeader, hello: &Hello, refusal: &Refusal) {
        let agent = &self.0;
        agent.metrics.refused(refusal.code.id());
        let id = agent.audit.incoming(None, record(peer, header, hello, None));
        agent.audit.refused(&id, refusal.code.id(), &refusal.words());
    }

    fn offers(&self, _peer: &Peer) -> Vec<LinkOffer> {
        links::offers(&self.0)
    }

    fn check(&self, peer: &Peer, vm: &VmDescription, ticket: Option<TicketBytes>) -> Vec<Reason> {
        let arrival = Arrival { source: peer.id, action: Action::Check, link: None, migration: None };
        match tickets::admit(&self.0, arrival, vm, ticket.as_ref()) {
            Ok(_) => reasons(&self.0, vm),
            Err(reason) => vec![reason],
        }
    }

    fn commands(&self, caller: Caller, channel: CommandChannel) {
        desk::receive(&self.0, caller, channel);
    }

    fn cpu(&self, _peer: &Peer) -> CpuProfile {
        cpu::offered(&self.0)
    }

    fn verdict(&self, peer: &Peer, migration: MigrationId, generation: Generation, released: bool) -> VerdictAnswer {
        settle::verdict(&self.0, peer.id, migration, generation, released)
    }

    fn released(&self, peer: &Peer, migration: MigrationId, generation: Generation) -> ReleasedAnswer {
        asking::answer(&self.0, peer.id, migration, generation)
    }
}

/// Who wants to send what, for the record.
fn record(peer: &Peer, header: &ControlHeader, hello: &Hello, ticket: Option<&TicketBytes>) -> audit::Line {
    let ticket = ticket.and_then(|bytes| bytes.parse().ok());
    audit::Line {
        host: Some(peer.id.to_string()),
        from: peer.address.map(|address| address.to_string()),
        link: Some(hello.link.clone()),
        ticket: ticket.as_ref().map(audit::nonce),
        operator: ticket.as_ref().map(|ticket| ticket.claims().issuer.to_string()),
        vm: Some(hello.vm.name.clone()),
        vm_id: Some(hello.vm.id.to_string()),
        migration: Some(header.migration.to_string()),
        generation: Some(header.generation.0),
        ..audit::Line::default()
    }
}

fn of(peer: &Peer) -> Other {
    Other { id: peer.id, ends: Ends::Incoming { peer: peer.address, local: peer.local } }
}

fn job(id: u64, peer: String, header: &ControlHeader, vm: &VmDescription) -> JobInfo {
    let job = JobInfo::begun(id, Direction::Incoming, &vm.name, &vm.id.to_string(), peer);
    job.of(header.migration, header.generation)
}

/// Keeps the job up to date until the migration has ended.
async fn show(
    agent: Arc<Agent>,
    job: u64,
    (vm, migration, generation): (VmId, MigrationId, Generation),
    memory_bytes: u64,
    mut seen: watch::Receiver<IncomingProgress>,
    ended: oneshot::Receiver<DestinationOutcome>,
) {
    while seen.changed().await.is_ok() {
        let progress = *seen.borrow_and_update();
        let here = progress.pages.saturating_add(progress.zero_pages).saturating_mul(limosa_proto::memory::PAGE_BYTES);
        let shown = JobProgress {
            phase: progress.state.to_string(),
            round: progress.rounds.saturating_add(1),
            bytes_remaining: memory_bytes.saturating_sub(here),
            memory_bytes,
            bytes_on_wire: progress.bytes_on_wire,
            ..JobProgress::default()
        };
        agent.jobs.progress(job, shown);
    }
    let end =
        |state, words: String, code: Option<Code>| Ending { state, words, code: code.map(|code| code.to_string()), report: None };
    let ended = ended.await;
    match &ended {
        Ok(DestinationOutcome::Running) => settle::owe(&agent, migration, generation, Ended::Came),
        Ok(DestinationOutcome::Discarded { left: true, .. }) => settle::decide_again(&agent, job, vm, migration, generation),
        Ok(DestinationOutcome::Discarded { durable: false, .. }) => settle::owe(&agent, migration, generation, Ended::GivenUp),
        _ => {}
    }
    let ending = match ended {
        Ok(DestinationOutcome::Running) => end(JobState::Done, String::new(), None),
        Ok(DestinationOutcome::Refused(refusal)) => {
            let code = tickets::code_of(&refusal);
            agent.metrics.refused(refusal.code.id());
            Ending { code: Some(code), ..end(JobState::Refused, refusal.words(), None) }
        }
        Ok(DestinationOutcome::Discarded { code, words, .. }) => end(JobState::Aborted, words, Some(code)),
        Ok(DestinationOutcome::Stuck { words }) => {
            end(JobState::InDoubt, format!("the guest is this host's, and its VMM could not be brought to run it: {words}"), None)
        }
        Err(_) => end(JobState::Aborted, "the migration's driver has ended".into(), Some(Code::Internal)),
    };
    tracing::info!(job, state = ?ending.state, words = ending.words, "the incoming migration has ended");
    agent.jobs.end(job, ending);
}

/// Every reason for which a guest cannot come: the one check, asked ahead or by a migration. Nothing is changed. May block.
fn reasons(agent: &Agent, vm: &VmDescription) -> Vec<Reason> {
    let mut found = Vec::new();
    if agent.is_stopping() {
        found.push(Reason { id: Code::Shutdown.id().into(), words: "the destination's agent is stopping".into() });
    }
    if let Err(words) = agent.can_record() {
        tracing::error!(words, "no guest is let in");
        found.push(Reason { id: "journal".into(), words: fit(&format!("the destination: {words}"), WORDS_BYTES_MAX) });
    }
    if !plain_name(&vm.name) {
        let words = fit(&format!("the guest's name {:?} is none here: {NAME_WANTS}", vm.name), WORDS_BYTES_MAX);
        found.push(Reason { id: "name".into(), words });
    }
    found.extend(compat::check(vm, &offer(agent)));
    found.extend(disks::reasons(&agent.config.storage, vm));
    found.truncate(REASONS_MAX);
    found
}

/// What this host has to offer to a guest.
pub(crate) fn offer(agent: &Agent) -> HostOffer {
    let (names_taken, ids_taken) = agent.vms.taken();
    let mut macs_taken = agent.vms.macs_taken("");
    macs_taken.extend(networks::mac_holders());
    let huge = std::fs::read_to_string("/sys/kernel/mm/hugepages/hugepages-2048kB/free_hugepages").unwrap_or_default();
    let huge_free = huge.trim().parse::<u64>().unwrap_or(0) > 0;
    HostOffer {
        networks: networks::offers(&agent.config),
        names_taken,
        macs_taken,
        ids_taken,
        memory_bytes_free: memory_available().saturating_sub(HOST_BYTES),
        vcpus_max: cpu::vcpus_max(agent),
        page_bytes: if huge_free { vec![2 << 20] } else { Vec::new() },
        vmms: vec!["limosa".into()],
        records: Vec::new(),
        name: agent.config.name.clone(),
        cpu: cpu::offered(agent),
    }
}

/// The destination's host: the VMM that is made for the guest, and the journal.
struct Receiving {
    agent: Arc<Agent>,
    arrival: Arrival,
    ticket: Option<TicketBytes>,
    /// The ticket for one guest that it came by.
    used: Option<Nonce>,
    job: u64,
    vm: Option<Claim>,
    /// A VMM was made for it, or may have been.
    launched: bool,
    /// The guest once it runs here and is claimed no more.
    runs: Option<Arc<Vm>>,
    cancel: Cancel,
    announce_end: Arc<AtomicBool>,
    /// When the guest was resumed here.
    resumed: Instant,
    /// What it will be asked then; none: it has no card.
    questions: Option<Result<Questions, String>>,
    /// Tells whether the guest has answered since.
    reaching: Option<mpsc::Receiver<Reached>>,
}

/// The points before and after a destination's record is durable.
fn points(kind: JournalRecordKind) -> [Point; 2] {
    match kind {
        JournalRecordKind::Running => [Point::DestinationRunningUnwritten, Point::DestinationRunningWritten],
        JournalRecordKind::Discarded => [Point::DestinationDiscardedUnwritten, Point::DestinationDiscardedWritten],
        _ => [Point::DestinationReadyUnwritten, Point::DestinationReadyWritten],
    }
}

impl Receiving {
    fn vm(&self) -> Result<&Arc<Vm>, HostError> {
        self.vm.as_ref().map(Claim::vm).ok_or_else(|| HostError::new("no guest was let in"))
    }

    fn connection(&self) -> Result<Arc<PlugConnection>, HostError> {
        self.vm()?.connection_within(Duration::ZERO).map_err(HostError::new)
    }
}

impl Drop for Receiving {
    /// A migration that ended while the guest was still being checked is not told to discard what the check has noted.
    fn drop(&mut self) {
        if self.launched {
            return;
        }
        if let Some(claim) = self.vm.take() {
            self.agent.vms.remove(claim.vm().id);
        }
    }
}

impl DestinationHost for Receiving {
    fn check(&mut self, vm: &VmDescription) -> Result<(), Refusal> {
        failpoints::pass(Some(Point::DestinationChecking));
        // Before anything is told or done: nothing of this host is said to a source that may not come.
        self.used = tickets::admit(&self.agent, self.arrival, vm, self.ticket.as_ref()).map_err(tickets::refusal)?;
        noted::await_vmm(&self.agent, vm.id)?;
        if let Some(refusal) = compat::refusal(reasons(&self.agent, vm)) {
            return Err(refusal);
        }
        let guest = Vm::new(vm.id, vm.name.clone(), VmState::Incoming);
        guest.set_description(vm.clone());
        let claim = guest.claim("incoming").map_err(|words| Refusal::one(Code::Busy, words))?;
        self.agent.vms.insert(&guest).map_err(|(code, words)| Refusal::one(code, words))?;
        self.vm = Some(claim);
        Ok(())
    }

    fn prepare(&mut self, vm: &VmDescription) -> Result<Arc<dyn Pages>, HostError> {
        failpoints::at(Point::DestinationPreparing)?;
        let guest = Arc::clone(self.vm()?);
        self.launched = true;
        let launched = self.agent.vms.launch(&self.agent, &vm.name, vec!["--incoming".into()], LAUNCH_MAX);
        let (process, arrived) = launched.map_err(HostError::new)?;
        noted::remember(&self.agent, vm.id, process.pid());
        guest.set_process(process);
        guest.set_console(self.agent.config.console_socket(&vm.name));
        guest.plug(Arc::clone(&arrived.connection), arrived.serial);
        guest.on_lost(Some(self.cancel.clone()));
        failpoints::at(Point::DestinationLaunched)?;
        let mut description = vm.clone();
        // Looked at again: the VMM gets paths without links, and follows none in them.
        disks::put_paths(&self.agent.config.storage, &mut description).map_err(HostError::new)?;
        let described = arrived.connection.prepare(&description, &self.agent.config.bridges()).map_err(host_error)?;
        // Which addresses are configured the VMM knows; the others are what the source has learned.
        let mut own = vm.clone();
        for (nic, configured) in own.nics.iter_mut().zip(&described.description.nics) {
            nic.addresses.clone_from(&configured.addresses);
        }
        guest.set_description(own);
        self.agent.vms.learn(&self.agent.config, &guest, &vm.nics);
        self.questions = guest.description().filter(|guest| !guest.nics.is_empty()).map(|guest| {
            let nics = announcing::nics(&self.agent.config, &guest);
            announcing::questions(&nics)
        });
        let memory = described.map(huge_pages(vm)).map_err(|e| HostError::new(e.to_string()))?;
        failpoints::at(Point::DestinationPrepared)?;
        Ok(Arc::new(GuestPages(memory)))
    }

    fn load(&mut self, records: Vec<Record>) -> Result<(), HostError> {
        failpoints::at(Point::DestinationLoading)?;
        if let Some(used) = self.used.take() {
            // From here on the guest may be committed, and what follows that is another migration.
            self.agent.tickets.close(used);
        }
        self.connection()?.load(&records).map(drop).map_err(host_error)?;
        failpoints::at(Point::DestinationLoaded)
    }

    fn resume(&mut self) -> Result<(), HostError> {
        failpoints::at(Point::DestinationResuming)?;
        resume(self.vm()?, Duration::ZERO)?;
        self.resumed = Instant::now();
        failpoints::at(Point::DestinationResumed)
    }

    fn hold(&mut self) -> Result<(), HostError> {
        hold(self.vm()?, Duration::ZERO)?;
        let taken = self.connection()?.status().map_err(host_error)?.state == Plugged::Paused;
        // Asked before the guest is loaded, it is only to be remembered.
        self.vm()?.set_may_have_run(taken);
        if taken {
            self.vm()?.set_state(VmState::Held);
        }
        Ok(())
    }

    fn announce(&mut self) -> Result<Vec<String>, HostError> {
        failpoints::at(Point::DestinationAnnouncing)?;
        let guest = Arc::clone(self.vm()?);
        // It runs here now: whoever wants it next may have it.
        guest.on_lost(None);
        self.runs = Some(Arc::clone(&guest));
        self.vm = None;
        if guest.state() == VmState::Held {
            return Ok(Vec::new());
        }
        let Some(description) = guest.description() else { return Ok(Vec::new()) };
        guest.announces(Arc::clone(&self.announce_end));
        self.reaching = self.questions.take().map(|questions| announcing::ask(questions, self.resumed));
        let (agent, job) = (Arc::clone(&self.agent), self.job);
        let keep = move |lines: &[String]| agent.jobs.update(job, |info| info.announcements.extend_from_slice(lines));
        let told = announce(&self.agent, &description, Arc::clone(&self.announce_end), keep)?;
        failpoints::at(Point::DestinationAnnounced)?;
        Ok(told)
    }

    fn reach(&mut self) -> Option<Reaching> {
        let reaching = self.reaching.take()?;
        Some(Box::new(move || reaching.recv().unwrap_or_default()))
    }

    fn discard(&mut self) -> Result<(), HostError> {
        failpoints::at(Point::DestinationDiscarding)?;
        self.announce_end.store(true, Ordering::Release);
        let Some(claim) = self.vm.take() else { return Ok(()) };
        let guest = claim.vm();
        guest.on_lost(None);
        if let Some(connection) = guest.connection()
            && let Err(error) = connection.discard()
        {
            tracing::debug!(vm = guest.name, %error, "the incoming VMM did not take the order to end; it is ended");
        }
        guest.end_within(DISCARD_MAX);
        self.agent.vms.remove(guest.id);
        noted::forget(&self.agent, guest.id);
        failpoints::at(Point::DestinationDiscarded)
    }

    fn journal(&mut self, record: &JournalRecord) -> Result<(), HostError> {
        let [unwritten, written] = points(record.kind);
        failpoints::at(unwritten)?;
        self.agent.write(record).map_err(|e| HostError::new(e.to_string()))?;
        failpoints::at(written)
    }

    fn cpu_seconds(&mut self) -> f64 {
        self.vm.as_ref().map(Claim::vm).or(self.runs.as_ref()).map_or(0.0, |vm| vm.cpu_seconds())
    }
}

/// Announces a guest that has come; returns after the first round.
pub(crate) fn announce(
    agent: &Agent,
    vm: &VmDescription,
    end: Arc<AtomicBool>,
    keep: impl FnMut(&[String]) + Send + 'static,
) -> Result<Vec<String>, HostError> {
    let nics = announcing::nics(&agent.config, vm);
    if nics.is_empty() {
        return Ok(Vec::new());
    }
    let announcing = announcing::begin(nics, &agent.config.migration.announce_schedule, end, keep).map_err(HostError::new)?;
    Ok(announcing.first_round())
}
