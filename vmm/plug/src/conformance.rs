//! The kit that any VMM can be tested with: does it keep the rules of the plug?
//! It plays the agent, moves one guest from one process of the VMM to another, and looks at the memory itself. It is
//! no benchmark, and it does not look inside the guest: a guest that writes some memory all the time is what it needs.

use crate::agent_side::{PlugConnection, PlugEvent, PlugListener};
use crate::error::PlugError;
use crate::memfd;
use crate::memory::{GuestMemory, HugePages};
use crate::message::{self as wire, ANSWER, Hello, Kind, MESSAGE_BYTES_MAX, Role, Status, Token, VERSION};
use crate::state::VmState;
use limosa_proto::bitmap::PageSet;
use limosa_proto::memory::{MemoryMap, PAGE_BYTES, PageRange};
use limosa_proto::record::Record;
use limosa_proto::wire::message::VmDescription;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::mpsc::{self, Receiver};
use std::time::{Duration, Instant};

/// How long a VMM has to connect after it was started, or again after its connection was dropped.
const CONNECT_TIME_MAX: Duration = Duration::from_secs(20);
/// How long the memory of a paused guest is watched.
const STILL_TIME: Duration = Duration::from_millis(300);
/// Bytes copied at a time.
const COPY_PAGES: u64 = 256;

/// What the kit has to know.
#[derive(Debug, Clone)]
pub struct Options {
    /// This host's bridge for each network of the guest.
    pub bridges: Vec<(String, String)>,
    /// How long the guest may take to write some memory.
    pub write_time_max: Duration,
    /// Whether an incoming VMM is also started and left alone, which takes a few seconds.
    pub lonely: bool,
}

impl Default for Options {
    fn default() -> Options {
        Options { bridges: Vec::new(), write_time_max: Duration::from_secs(10), lonely: true }
    }
}

/// Tests a VMM. `launch` starts one that connects to `listener`: with [`Role::Running`] one whose guest runs and
/// writes memory, with [`Role::Incoming`] one that waits for a guest, either with the token given. Afterwards all of
/// them have been told to end; `launch`'s owner reaps them. Returns what was checked, a line each.
///
/// # Errors
/// The first rule that was broken, in words, after the checks that passed.
pub fn check(
    listener: &PlugListener,
    launch: &mut dyn FnMut(Role, Token) -> Result<(), String>,
    options: &Options,
) -> Result<Vec<String>, String> {
    let mut kit = Kit { listener, launch, options, passed: Vec::new() };
    kit.all().map_err(|words| format!("{words}\npassed before: {:#?}", kit.passed))?;
    Ok(kit.passed)
}

/// One VMM under test.
struct Subject {
    hello: Hello,
    plug: PlugConnection,
    events: Receiver<PlugEvent>,
}

struct Kit<'a> {
    listener: &'a PlugListener,
    launch: &'a mut dyn FnMut(Role, Token) -> Result<(), String>,
    options: &'a Options,
    passed: Vec<String>,
}

fn ensure(holds: bool, words: impl FnOnce() -> String) -> Result<(), String> {
    if holds { Ok(()) } else { Err(words()) }
}

fn fine<T>(result: Result<T, PlugError>) -> Result<T, String> {
    result.map_err(|error| error.to_string())
}

/// The result must be a refusal of this kind, with words.
fn refused<T>(result: Result<T, PlugError>, expected: Status, what: &str) -> Result<(), String> {
    match result {
        Err(PlugError::Refused { status, words, .. }) if status == expected && !words.trim().is_empty() => Ok(()),
        Err(other) => Err(format!("{what}: expected to be refused as \"{expected}\" in words, not: {other}")),
        Ok(_) => Err(format!("{what}: expected to be refused as \"{expected}\", and was done")),
    }
}

impl Kit<'_> {
    fn all(&mut self) -> Result<(), String> {
        let source = self.start(Role::Running, 1)?;
        let described = fine(source.plug.describe())?;
        let vm = described.description.clone();
        let memory = described.map(HugePages::Never).map_err(|error| error.to_string())?;
        ensure(vm.id == source.hello.id && vm.name == source.hello.name, || "Hello and Describe name different guests".into())?;
        self.pass(format!(
            "described: {} vCPUs, {} MiB in {} regions",
            vm.vcpus,
            vm.memory.bytes() >> 20,
            vm.memory.regions().len()
        ));
        self.refusals_while_running(&source.plug, &vm)?;
        self.bad_messages(&source.plug)?;
        self.tracking(&source.plug, &memory)?;
        let source = self.pausing(source, &memory)?;
        let source = self.reconnecting(source, &memory)?;
        if self.options.lonely {
            self.lonely_incoming(&vm)?;
        }
        self.moving(source, &memory, &vm)
    }

    fn pass(&mut self, words: impl Into<String>) {
        self.passed.push(words.into());
    }

    fn start(&mut self, role: Role, number: u8) -> Result<Subject, String> {
        let token = Token([number; 16]);
        (self.launch)(role, token)?;
        let subject = self.connected()?;
        let state = if role == Role::Running { VmState::Running } else { VmState::Waiting };
        ensure(subject.hello.token == token, || "Hello does not bring the token that the VMM was started with".into())?;
        ensure(subject.hello.state == state, || {
            format!("Hello of a VMM in the role {role:?} says \"{}\"", subject.hello.state.words())
        })?;
        ensure(subject.hello.version_min <= VERSION, || "its version of the plug is newer than ours".into())?;
        let article = if role == Role::Running { "a VMM with a guest" } else { "an incoming VMM" };
        self.pass(format!("{article} says Hello with its token and state"));
        Ok(subject)
    }

    fn connected(&self) -> Result<Subject, String> {
        let peer = fine(self.listener.accept(CONNECT_TIME_MAX))?.ok_or("the VMM did not connect within 20 s")?;
        let hello = fine(peer.hello())?;
        let (sender, events) = mpsc::channel();
        // The kit may have stopped listening.
        let plug = fine(peer.welcome(move |event| drop(sender.send(event))))?;
        Ok(Subject { hello, plug, events })
    }

    fn refusals_while_running(&mut self, plug: &PlugConnection, vm: &VmDescription) -> Result<(), String> {
        let wrong = Status::WrongState;
        refused(plug.save(), wrong, "Save while running")?;
        refused(plug.resume(), wrong, "Resume while running")?;
        refused(plug.release(), wrong, "Release while running")?;
        refused(plug.discard(), wrong, "Discard while running")?;
        refused(plug.give_up(), wrong, "Yield while running")?;
        refused(plug.load(&[]), wrong, "Load while running")?;
        refused(plug.prepare(vm, &self.options.bridges), wrong, "Prepare while running")?;
        refused(plug.fetch_dirty(), wrong, "FetchDirty without tracking")?;
        let status = fine(plug.status())?;
        ensure(status.state == VmState::Running && !status.tracking, || format!("after refusals the status is {status:?}"))?;
        self.pass("requests that do not fit a running guest are refused in words and change nothing");
        Ok(())
    }

    /// One datagram that may be anything; the answer must carry its request id, `expected` and words.
    fn bad(
        &self,
        plug: &PlugConnection,
        what: &'static str,
        fds: &[BorrowedFd<'_>],
        expected: Status,
        make: impl Fn(u32) -> Vec<u8>,
    ) -> Result<(), String> {
        let reply = fine(plug.exchange(what, |id| Ok(make(id)), fds, Duration::from_secs(10)))?;
        let words = wire::words_of(&reply.body);
        let result: Result<(), PlugError> = match Status::from_number(reply.header.status) {
            Status::Done => Ok(()),
            status => Err(PlugError::Refused { doing: what, status, words }),
        };
        refused(result, expected, what)?;
        ensure(reply.header.kind & ANSWER != 0, || format!("{what}: the answer's kind has no answer bit"))
    }

    fn bad_messages(&mut self, plug: &PlugConnection) -> Result<(), String> {
        let done = Status::Done;
        let malformed = Status::Malformed;
        self.bad(plug, "a request of an unknown kind", &[], Status::UnknownKind, |id| wire::emit(0x0fff, done, id, b"any"))?;
        self.bad(plug, "an event sent to a VMM", &[], Status::UnknownKind, |id| {
            wire::emit(Kind::GuestStopped as u16, done, id, &[])
        })?;
        self.bad(plug, "a wrong magic", &[], malformed, |id| {
            let good = wire::emit(Kind::Status as u16, done, id, &[]);
            good.iter().enumerate().map(|(index, byte)| if index == 0 { !byte } else { *byte }).collect()
        })?;
        self.bad(plug, "a length that is not true", &[], malformed, |id| {
            let mut long = wire::emit(Kind::Status as u16, done, id, &[]);
            long.push(0);
            long
        })?;
        self.bad(plug, "a body that is too long", &[], malformed, |id| wire::emit(Kind::Pause as u16, done, id, &[0; 8]))?;
        self.bad(plug, "a body that is too short", &[], malformed, |id| wire::emit(Kind::Track as u16, done, id, &[1]))?;
        self.bad(plug, "a throttle of 200 per cent", &[], malformed, |id| {
            wire::emit(Kind::Throttle as u16, done, id, &200_u32.to_le_bytes())
        })?;
        self.bad(plug, "a Prepare of noise", &[], malformed, |id| wire::emit(Kind::Prepare as u16, done, id, &[0xa5; 4096]))?;
        self.bad(plug, "a message over the limit", &[], malformed, |id| {
            wire::emit(Kind::Status as u16, done, id, &vec![0; MESSAGE_BYTES_MAX])
        })?;
        let file = memfd::create("limosa-conformance", 16).map_err(|error| error.to_string())?;
        let fds = [file.as_fd(), file.as_fd()];
        self.bad(plug, "descriptors that nobody asked for", &fds, malformed, |id| {
            wire::emit(Kind::Status as u16, done, id, &[])
        })?;
        self.noise(plug)?;
        let status = fine(plug.status())?;
        ensure(status.state == VmState::Running, || format!("after bad messages the guest is {}", status.state.words()))?;
        self.pass("unknown, malformed, oversized and random messages are answered by errors; the guest runs on");
        Ok(())
    }

    /// Random bodies for every kind of request that asks for one. All of them are malformed, whatever is in them.
    fn noise(&self, plug: &PlugConnection) -> Result<(), String> {
        let mut seed = 0x2545_f491_4f6c_dd1d_u64;
        for round in 0..200_usize {
            let kinds = [Kind::Prepare, Kind::Load, Kind::Track, Kind::Throttle];
            let kind = kinds.get(round % kinds.len()).copied().unwrap_or(Kind::Prepare);
            let body: Vec<u8> = (0..round * 7 + 25)
                .map(|_| {
                    seed ^= seed << 13;
                    seed ^= seed >> 7;
                    seed ^= seed << 17;
                    seed as u8
                })
                .collect();
            self.bad(plug, "a request with a random body", &[], Status::Malformed, |id| {
                wire::emit(kind as u16, Status::Done, id, &body)
            })?;
        }
        Ok(())
    }

    fn tracking(&mut self, plug: &PlugConnection, memory: &GuestMemory) -> Result<(), String> {
        fine(plug.track(true))?;
        let (mut changed, mut named, mut rounds) = (0, 0, 0);
        let end = Instant::now() + self.options.write_time_max;
        while (changed == 0 || rounds < 5) && Instant::now() < end {
            fine(plug.pause())?;
            let _ = fine(plug.fetch_dirty())?;
            let before = hashes(memory);
            fine(plug.resume())?;
            std::thread::sleep(Duration::from_millis(50));
            // Bits may be fetched while the guest writes: what is taken then must not be lost with it.
            let mut dirty = fine(plug.fetch_dirty())?;
            std::thread::sleep(Duration::from_millis(5));
            fine(plug.pause())?;
            dirty.union(&fine(plug.fetch_dirty())?);
            let written = differing(memory.memory_map(), &before, &hashes(memory));
            changed += written.count();
            named += dirty.count();
            let mut missed = written;
            missed.subtract(&dirty);
            let first = missed.runs().next();
            ensure(missed.is_empty(), || {
                format!("{} pages were written and not named as dirty, the first {first:?}", missed.count())
            })?;
            fine(plug.resume())?;
            rounds += 1;
        }
        ensure(changed > 0, || "the guest wrote nothing, so that tracking could not be tested".into())?;
        fine(plug.track(false))?;
        refused(plug.fetch_dirty(), Status::WrongState, "FetchDirty after tracking went off")?;
        self.pass(format!("dirty tracking misses nothing: {changed} pages seen to change, {named} named, {rounds} rounds"));
        Ok(())
    }

    fn pausing(&mut self, source: Subject, memory: &GuestMemory) -> Result<Subject, String> {
        let took = fine(source.plug.pause())?;
        let before = hashes(memory);
        std::thread::sleep(STILL_TIME);
        ensure(hashes(memory) == before, || "memory changed while the guest was paused".into())?;
        refused(source.plug.pause(), Status::WrongState, "Pause while paused")?;
        self.pass(format!("a paused guest writes nothing (the pause took {} us)", took.as_micros()));
        drop(source);
        let again = self.connected()?;
        ensure(again.hello.state == VmState::Paused, || {
            format!("after the agent was lost the guest is {}", again.hello.state.words())
        })?;
        std::thread::sleep(STILL_TIME);
        ensure(hashes(memory) == before, || "a paused guest ran when its agent was lost".into())?;
        let described = fine(again.plug.describe())?;
        ensure(&described.description.memory == memory.memory_map(), || {
            "memory has another shape after connecting again".into()
        })?;
        for _ in 0..2 {
            fine(again.plug.give_up())?;
        }
        refused(again.plug.pause(), Status::WrongState, "Pause after Yield")?;
        ensure(hashes(memory) == before, || "Yield wrote the guest's memory".into())?;
        fine(again.plug.resume())?;
        self.pass("a paused guest stays paused when the agent is lost; its VMM connects again and resumes when told");
        Ok(again)
    }

    fn reconnecting(&mut self, source: Subject, memory: &GuestMemory) -> Result<Subject, String> {
        fine(source.plug.track(true))?;
        drop(source);
        let again = self.connected()?;
        let status = fine(again.plug.status())?;
        ensure(again.hello.state == VmState::Running, || "a running guest was stopped when its agent was lost".into())?;
        ensure(!status.tracking && status.throttle_percent == 0, || format!("a new connection begins with {status:?}"))?;
        self.writes_on(memory, "after its agent was lost")?;
        self.pass("a running guest runs on when the agent is lost; its VMM connects again with tracking off");
        Ok(again)
    }

    fn writes_on(&self, memory: &GuestMemory, when: &str) -> Result<(), String> {
        let before = hashes(memory);
        let end = Instant::now() + self.options.write_time_max;
        while Instant::now() < end {
            std::thread::sleep(Duration::from_millis(50));
            if hashes(memory) != before {
                return Ok(());
            }
        }
        Err(format!("the guest wrote nothing {when}"))
    }

    /// Incoming VMMs that get no guest: one is discarded, one loses its agent.
    fn lonely_incoming(&mut self, vm: &VmDescription) -> Result<(), String> {
        let discarded = self.start(Role::Incoming, 2)?;
        let lost = self.start(Role::Incoming, 3)?;
        fine(discarded.plug.prepare(vm, &self.options.bridges))?;
        fine(discarded.plug.discard())?;
        self.gone(&discarded, "Discard")?;
        drop(lost);
        let back = fine(self.listener.accept(Duration::from_millis(2500)))?;
        ensure(back.is_none(), || "an incoming VMM without a guest came back after its agent was lost; it must end".into())?;
        self.pass("an incoming VMM ends when told to, and by itself when its agent is lost before it has a guest");
        Ok(())
    }

    fn gone(&self, subject: &Subject, what: &str) -> Result<(), String> {
        let lost =
            subject.events.recv_timeout(Duration::from_secs(15)).map_err(|_| format!("the VMM did not end after {what}"))?;
        ensure(matches!(lost, PlugEvent::Lost { expected: true, .. }), || format!("after {what} came {lost:?}"))
    }

    fn incoming(&mut self, vm: &VmDescription) -> Result<(Subject, GuestMemory), String> {
        let incoming = self.start(Role::Incoming, 4)?;
        let plug = &incoming.plug;
        refused(plug.describe(), Status::WrongState, "Describe before Prepare")?;
        refused(plug.load(&[]), Status::WrongState, "Load before Prepare")?;
        refused(plug.resume(), Status::WrongState, "Resume before Prepare")?;
        refused(plug.release(), Status::WrongState, "Release of an incoming VMM")?;
        let described = fine(plug.prepare(vm, &self.options.bridges))?;
        ensure(described.description.records == vm.records, || "both VMMs are one program and list different records".into())?;
        let memory = described.map(HugePages::Never).map_err(|error| error.to_string())?;
        refused(plug.prepare(vm, &self.options.bridges), Status::WrongState, "Prepare after Prepare")?;
        refused(plug.resume(), Status::WrongState, "Resume before Load")?;
        let strange = Record { kind: 0xfffe, version: 0xfffe, instance: 0, bytes: vec![0xa5; 100] };
        refused(plug.load(&[strange]), Status::Failed, "device state of an unknown kind")?;
        refused(plug.load(&[]), Status::Failed, "device state that is missing")?;
        let (pipe, _writer) = nix::unistd::pipe().map_err(|error| error.to_string())?;
        self.bad(plug, "device state in a pipe", &[pipe.as_fd()], Status::Malformed, |id| {
            let size = wire::StateSize { count: 1, bytes: 64 };
            wire::Request::Load(size).emit(id).unwrap_or_default()
        })?;
        let status = fine(plug.status())?;
        ensure(status.state == VmState::Prepared, || format!("after refused state the VMM is {}", status.state.words()))?;
        self.pass("an incoming VMM prepares the same machine, and refuses what it cannot load");
        Ok((incoming, memory))
    }

    fn moving(&mut self, source: Subject, memory: &GuestMemory, vm: &VmDescription) -> Result<(), String> {
        let (destination, arrived) = self.incoming(vm)?;
        fine(source.plug.describe())?;
        fine(source.plug.track(true))?;
        copy(memory, &arrived, &PageSet::full(&vm.memory));
        let round = fine(source.plug.fetch_dirty())?;
        copy(memory, &arrived, &round);
        fine(source.plug.pause())?;
        let state = fine(source.plug.save())?;
        // Saving may write memory, so the last look at the dirty pages comes after it.
        let last = fine(source.plug.fetch_dirty())?;
        copy(memory, &arrived, &last);
        let unlisted = state.iter().find(|record| !vm.records.contains(&(record.kind, record.version)));
        ensure(unlisted.is_none(), || format!("{unlisted:?} is not among the kinds that Describe lists"))?;
        let differs = differing(&vm.memory, &hashes(memory), &hashes(&arrived));
        ensure(differs.is_empty(), || format!("{} pages differ after the last round", differs.count()))?;
        fine(destination.plug.load(&state))?;
        let loaded = hashes(&arrived);
        std::thread::sleep(STILL_TIME);
        ensure(hashes(&arrived) == loaded, || "the loaded guest ran before it was told to".into())?;
        drop(destination);
        let destination = self.connected()?;
        ensure(destination.hello.state == VmState::Loaded, || "a loaded VMM did not stay loaded when its agent was lost".into())?;
        ensure(destination.hello.id == vm.id, || "a loaded VMM says Hello for another guest".into())?;
        fine(source.plug.give_up())?;
        fine(source.plug.release())?;
        self.gone(&source, "Release")?;
        let took = fine(destination.plug.resume())?;
        self.writes_on(&arrived, "after it was moved")?;
        refused(destination.plug.discard(), Status::WrongState, "Discard of a guest that runs")?;
        let (records, bytes) = (state.len(), state.iter().map(|record| record.bytes.len()).sum::<usize>());
        self.pass(format!(
            "moved with {records} records of {bytes} bytes; it runs on at the destination (resume took {} us)",
            took.as_micros()
        ));
        fine(destination.plug.shutdown())?;
        self.gone(&destination, "Shutdown")?;
        self.pass("Release and Shutdown end the VMM");
        Ok(())
    }
}

fn regions(map: &MemoryMap) -> impl Iterator<Item = PageRange> + '_ {
    (0..map.regions().len()).filter_map(|index| map.region_range(index))
}

/// One number per page; 0 for pages of zeros and those that were never touched.
fn hashes(memory: &GuestMemory) -> Vec<u64> {
    let map = memory.memory_map();
    let mut all = vec![0; usize::try_from(map.numbers()).unwrap_or(0)];
    let mut page_bytes = [0; PAGE_BYTES as usize];
    for page in regions(map).flat_map(|range| memory.data_extents(range)).flat_map(|run| run.first..run.end()) {
        memory.read(PageRange { first: page, count: 1 }, 0, &mut page_bytes);
        let (words, _) = page_bytes.as_chunks::<8>();
        let hash = words
            .iter()
            .fold(0, |hash: u64, word| (hash.rotate_left(5) ^ u64::from_le_bytes(*word)).wrapping_mul(0x517c_c1b7_2722_0a95));
        if let Some(place) = usize::try_from(page).ok().and_then(|index| all.get_mut(index)) {
            *place = hash;
        }
    }
    all
}

fn differing(map: &MemoryMap, one: &[u64], other: &[u64]) -> PageSet {
    let mut set = PageSet::empty(map);
    for (page, _) in one.iter().zip(other).enumerate().filter(|(_, (one, other))| one != other) {
        set.insert(PageRange { first: page as u64, count: 1 });
    }
    set
}

fn copy(from: &GuestMemory, to: &GuestMemory, pages: &PageSet) {
    let mut buffer = vec![0; (COPY_PAGES * PAGE_BYTES) as usize];
    // What has nothing behind it any more reads as zeros, there as here.
    pages.runs().for_each(|run| to.zero(run));
    for run in pages.runs().flat_map(|run| from.data_extents(run)) {
        for first in (run.first..run.end()).step_by(COPY_PAGES as usize) {
            let part = PageRange { first, count: COPY_PAGES.min(run.end() - first) };
            let Some(buffer) = buffer.get_mut(..part.bytes() as usize) else { continue };
            from.read(part, 0, buffer);
            to.write(part, 0, buffer);
        }
    }
}
