//! Real kills: agents and VMMs killed and stopped, links cut, at every fail point of a migration and at random times. After each
//! harm exactly one host runs the guest (none, if the VMM that had it was killed), it never ran twice, nothing is left, and the
//! next migration works. What the engine does with every order of events is the simulator's; here are real processes and KVM.
#![allow(clippy::panic, clippy::unwrap_used, clippy::expect_used, clippy::print_stderr, missing_docs, unreachable_pub)]

use limosa_link::failpoints::Point;
use nix::sys::signal::Signal;
use rig::command::Running;
use rig::process::{self, wait_for};
use rig::{AgentConfig, Context, GuestSpec, Host, Lab, Result, ensure, points, with_lab};
use std::collections::BTreeMap;
use std::time::{Duration, Instant};

/// How long a peer may be silent, as these tests configure it.
const SILENCE: Duration = Duration::from_millis(1000);
/// How long everything may take to come to rest after a harm: the longest deadline is the agent's for a VMM, 10 s.
const REST_MAX: Duration = Duration::from_secs(40);
/// How long two hosts that talk may be in doubt before a person has to look.
const DOUBT_MAX: Duration = Duration::from_secs(25);

macro_rules! harms {
    ($($name:ident,)*) => {
        /// What is done to whom.
        #[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
        enum Harm {
            $($name,)*
        }

        /// All of them.
        const HARMS: [Harm; 11] = [$(Harm::$name,)*];
    };
}
harms! {
    KillSourceAgent,
    KillDestinationAgent,
    KillSourceVmm,
    KillDestinationVmm,
    StopSourceAgent,
    StopDestinationAgent,
    StopSourceVmm,
    StopDestinationVmm,
    CutBothWays,
    CutFromSource,
    CutToSource,
}

use Harm::*;

/// Where the guest is in the end.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Place {
    Source,
    Destination,
    Nowhere,
}

/// What has to go wrong first, so that a point is on the way.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Way {
    /// Nothing.
    Plain,
    /// The source fails at this point.
    Fails(Point),
    /// An agent is killed at this point and started anew.
    Restarted(Point),
}

fn way_to(point: Point) -> Way {
    use Point::*;
    match point {
        SourceSaysAbort | SourceAbortedUnwritten | SourceAbortedWritten | SourceResuming | SourceResumed => {
            Way::Fails(SourceSaved)
        }
        // Commit is never said, and the destination is asked to give the guest back.
        SourceAsks
        | SourceHearsVerdict
        | DestinationHearsVerdictAsk
        | DestinationDiscardedUnwritten
        | DestinationDiscardedWritten
        | DestinationDiscarding
        | DestinationDiscarded
        | DestinationSaysVerdict => Way::Fails(SourceReleasedUnwritten),
        SourceRecoveryBegins => Way::Restarted(SourceRoundSent),
        SourceRecoveryAsks | SourceRecoveryHears | SourceRecoveryWritten => Way::Restarted(SourceDisksGivenUp),
        DestinationRecoveryPluggedIn => Way::Restarted(DestinationResumed),
        DestinationRecoveryWaits | DestinationRecoveryAsked | DestinationRecoveryTookUp | DestinationRecoveryWritten => {
            Way::Restarted(DestinationHearsCommit)
        }
        DestinationRecoveryAsks | DestinationRecoveryHears | DestinationRecoveryGivesUp | DestinationRecoveryGivenUp => {
            Way::Restarted(DestinationReadyWritten)
        }
        _ => Way::Plain,
    }
}

fn is_source(point: Point) -> bool {
    point.name().starts_with("source")
}

/// Where the guest may be after this harm at this point.
fn allowed(point: Point, harm: Harm) -> &'static [Place] {
    use Place::{Destination, Nowhere, Source};
    // The order of the points is that of a migration, on each side.
    let way = way_to(point);
    let provoked = way != Way::Plain;
    let surely_before = provoked
        || (is_source(point) && point < Point::SourceReleasedUnwritten)
        || (!is_source(point) && point < Point::DestinationHearsCommit);
    let surely_runs_there = !provoked
        && (is_source(point) && point >= Point::SourceHearsRunning || !is_source(point) && point >= Point::DestinationResumed);
    match harm {
        KillSourceVmm | KillDestinationVmm if matches!(way, Way::Restarted(_)) => &[Source, Destination, Nowhere],
        _ if matches!(way, Way::Restarted(_)) => &[Source, Destination],
        KillSourceVmm if surely_before => &[Nowhere],
        KillSourceVmm if surely_runs_there => &[Destination],
        KillSourceVmm => &[Nowhere, Destination],
        // Where none has been made yet, there is nothing to kill, and the guest goes.
        KillDestinationVmm if surely_runs_there => &[Nowhere],
        KillDestinationVmm if surely_before => &[Source, Destination],
        KillDestinationVmm => &[Source, Nowhere],
        KillSourceAgent | KillDestinationAgent if surely_before => &[Source],
        _ if surely_runs_there => &[Destination],
        _ => &[Source, Destination],
    }
}

/// A lab in which one guest goes to and fro, and what became of it each time.
struct Course<'a> {
    lab: &'a mut Lab,
    guest: GuestSpec,
    number: u8,
    dirty: &'a str,
    /// Whether it is on the first host.
    on_a: bool,
    /// How long who is stopped stands still, and links are cut.
    stand: Duration,
    came_to: BTreeMap<String, usize>,
}

fn config() -> AgentConfig {
    let config = AgentConfig::default().migration("keepalive_ms", 200).migration("silence_max_ms", SILENCE.as_millis());
    config.migration("ready_ms_max", 2000).migration("announce_schedule_ms", "[50, 100]")
}

/// A guest that writes `dirty` bytes a second.
fn spec(number: u8, dirty: &str) -> GuestSpec {
    GuestSpec::new(&format!("web{number}"), number).memory("64M", "8M").dirty(dirty, "8M")
}

impl<'a> Course<'a> {
    fn new(lab: &'a mut Lab, stand: Duration, dirty: &'a str) -> Result<Course<'a>> {
        let guest = spec(0, dirty);
        let mut course = Course { lab, guest, number: 0, dirty, on_a: true, stand, came_to: BTreeMap::new() };
        course.new_guest()?;
        Ok(course)
    }

    /// A fresh guest: another name and address, since the switch believes for minutes where the old one was.
    fn new_guest(&mut self) -> Result<()> {
        self.number = self.number % 100 + 1;
        self.guest = spec(self.number, self.dirty);
        self.on_a = true;
        self.lab.guest(&self.guest)
    }

    fn source(&self) -> &Host {
        if self.on_a { &self.lab.a } else { &self.lab.b }
    }

    fn destination(&self) -> &Host {
        if self.on_a { &self.lab.b } else { &self.lab.a }
    }

    fn host(&mut self, source: bool) -> &mut Host {
        if self.on_a == source { &mut self.lab.a } else { &mut self.lab.b }
    }

    fn leave(&self) -> Result<Running> {
        self.source().start(&["--json", "migrate", &self.guest.name, "--to", &self.destination().name])
    }

    /// One migration that comes to harm at a point, and one that does not.
    fn harm_at(&mut self, point: Point, harm: Harm) -> Result<()> {
        self.lab.a.disarm()?;
        self.lab.b.disarm()?;
        let home = is_source(point);
        match way_to(point) {
            Way::Plain => {}
            Way::Fails(first) => self.source().arm(first.name(), "fail")?,
            Way::Restarted(first) => self.host(home).arm(first.name(), "kill")?,
        }
        if !matches!(way_to(point), Way::Restarted(_)) {
            self.host(home).arm(point.name(), "stop")?;
        }
        let mut running = self.leave()?;
        if let Way::Restarted(_) = way_to(point) {
            let host = self.host(home);
            host.wait_agent_ended()?;
            host.disarm()?;
            host.arm(point.name(), "stop")?;
            host.launch_agent(host.agent_config())?;
        }
        self.host(home).wait_stopped(point.name())?;
        let stopped = self.host(home).agent_pid()?;
        self.harm(harm, Some(stopped))?;
        // One that was launched anew may not have answered yet.
        self.host(home).wait_agent()?;
        let place = self.rest(&mut running, harm)?;
        ensure!(allowed(point, harm).contains(&place), "the guest is now: {place:?}; allowed is {:?}", allowed(point, harm));
        self.next(place, harm)
    }

    /// One migration that comes to harm after some time.
    fn harm_after(&mut self, harm: Harm, delay: Duration) -> Result<()> {
        let mut running = self.leave()?;
        std::thread::sleep(delay);
        self.harm(harm, None)?;
        let place = self.rest(&mut running, harm)?;
        ensure!(place != Place::Nowhere || matches!(harm, KillSourceVmm | KillDestinationVmm), "the guest is lost");
        self.next(place, harm)
    }

    /// Does it; an agent that stands still at its point goes on when that has been done.
    fn harm(&mut self, harm: Harm, stopped: Option<u32>) -> Result<()> {
        let go_on = |of: Option<u32>| of.into_iter().for_each(|pid| process::signal(pid, Signal::SIGCONT));
        let stand = self.stand;
        match harm {
            KillSourceAgent | KillDestinationAgent => {
                self.host(harm == KillSourceAgent).kill_agent()?;
                go_on(stopped);
                std::thread::sleep(Duration::from_millis(200));
                self.lab.a.disarm()?;
                self.lab.b.disarm()?;
                self.host(harm == KillSourceAgent).restart_agent()?;
            }
            KillSourceVmm | KillDestinationVmm => {
                let vmms = self.host(harm == KillSourceVmm).vmms(None);
                vmms.iter().for_each(|pid| process::kill(*pid));
                // A process takes a while to die; its socket is open until then.
                wait_for(REST_MAX, "the VMMs' end", || Ok(vmms.iter().all(|pid| process::is_over(*pid)).then_some(())))?;
                go_on(stopped);
            }
            StopSourceAgent | StopDestinationAgent | StopSourceVmm | StopDestinationVmm => {
                let host = self.host(matches!(harm, StopSourceAgent | StopSourceVmm));
                let pids = if matches!(harm, StopSourceAgent | StopDestinationAgent) {
                    vec![host.agent_pid()?]
                } else {
                    host.vmms(None)
                };
                pids.iter().for_each(|pid| process::signal(*pid, Signal::SIGSTOP));
                go_on(stopped.filter(|pid| !pids.contains(pid)));
                std::thread::sleep(stand);
                pids.into_iter().for_each(|pid| go_on(Some(pid)));
            }
            CutBothWays => {
                self.lab.cable("p-b", false)?;
                go_on(stopped);
                std::thread::sleep(stand);
                self.lab.cable("p-b", true)?;
            }
            CutFromSource | CutToSource => {
                let (from, to) = if harm == CutFromSource { (true, false) } else { (false, true) };
                self.one_way(from, to, false)?;
                go_on(stopped);
                std::thread::sleep(stand);
                self.one_way(from, to, true)?;
            }
        }
        Ok(())
    }

    fn one_way(&self, from: bool, to: bool, whole: bool) -> Result<()> {
        let host = |source: bool| if source { self.source() } else { self.destination() };
        self.lab.one_way(host(from), host(to), whole)
    }

    /// Its VMM at the destination died when it may have run there, and no host can know: a person looks and decides.
    fn decide(&mut self) -> Result<()> {
        let last = |host: &Host| host.beats(&self.guest.name).last().map_or(0, |beat| beat.n);
        let ran = last(self.destination()) > last(self.source());
        let host = if ran { self.source() } else { self.destination() };
        let jobs = host.jobs()?;
        let Some(job) = jobs.iter().find(|job| job["state"] == "in_doubt") else { return Ok(()) };
        let (job, reason) = (job["id"].to_string(), if ran { "it ran there and died there" } else { "it never ran there" });
        let decided =
            host.limosa(&["verdict", &job, "--decide", "gone", "--reason", reason, "--i-have-looked-at-the-other-host"])?;
        // It may have been settled just before.
        ensure!(decided.code != 2, "{decided:?}");
        *self.came_to.entry("decided by a person".into()).or_default() += 1;
        Ok(())
    }

    /// Waits until both hosts have settled it: no job is open, and VMMs, TAPs and records are those of one guest or of none.
    fn rest(&mut self, running: &mut Running, harm: Harm) -> Result<Place> {
        let mut seen = String::new();
        let start = Instant::now();
        if harm == KillDestinationVmm {
            let open = |host: &Host| Ok::<bool, rig::Error>(state_of(host)?.ends_with("open []"));
            let settled = || Ok((open(&self.lab.a)? && open(&self.lab.b)?).then_some(()));
            if wait_for(DOUBT_MAX, "both to settle it by themselves", settled).is_err() {
                self.decide()?;
            }
        }
        let rested = wait_for(REST_MAX, "both hosts to settle it", || {
            seen = format!("{} | {}", state_of(&self.lab.a)?, state_of(&self.lab.b)?);
            Ok(match seen.as_str() {
                "1 VMMs 1 TAPs 1 known open [] | 0 VMMs 0 TAPs 0 known open []" => Some(Some(true)),
                "0 VMMs 0 TAPs 0 known open [] | 1 VMMs 1 TAPs 1 known open []" => Some(Some(false)),
                "0 VMMs 0 TAPs 0 known open [] | 0 VMMs 0 TAPs 0 known open []" => Some(None),
                _ => None,
            })
        });
        let rested = rested.with_context(|| format!("they are: {seen}"))?;
        running.wait(REST_MAX).context("the command that asked for it must end too")?;
        self.came_to.entry("longest to rest, ms".into()).and_modify(|most| *most = (*most).max(ms(start))).or_insert(ms(start));
        Ok(match rested {
            None => Place::Nowhere,
            Some(on_a) if on_a == self.on_a => Place::Source,
            Some(_) => Place::Destination,
        })
    }

    /// The guest is whole and ran in one place at a time; then the next migration, which must be good.
    fn next(&mut self, place: Place, harm: Harm) -> Result<()> {
        *self.came_to.entry(format!("{place:?}").to_lowercase()).or_default() += 1;
        if place == Place::Nowhere {
            self.lab.never_two(&self.guest.name)?;
            self.new_guest()?;
        } else {
            self.on_a = self.on_a == (place == Place::Source);
            self.source().guest_lives(&self.guest.name)?;
            // An agent that was killed has told the network, or the next one does. What was said into a cut is lost.
            if matches!(harm, KillSourceAgent | KillDestinationAgent) {
                self.lab.wait_reachable(&self.guest).context("the network was not told where the guest is")?;
            }
        }
        self.source().migrate_well(&self.guest.name, self.destination(), &[]).context("the migration after it")?;
        self.on_a = !self.on_a;
        self.lab.guest_is_on(&self.guest, self.source(), self.destination()).context("after the migration after it")?;
        self.source().guest_verified(&self.guest.name, 1)?;
        self.lab.never_two(&self.guest.name)
    }
}

fn ms(since: Instant) -> usize {
    usize::try_from(since.elapsed().as_millis()).unwrap_or(usize::MAX)
}

/// What a host holds, in words.
fn state_of(host: &Host) -> Result<String> {
    let jobs = host.jobs()?;
    let open: Vec<String> = jobs
        .iter()
        .filter(|job| job["state"] == "running" || job["state"] == "in_doubt")
        .map(|job| format!("{} {}: {}", job["direction"], job["state"], job["words"]))
        .collect();
    let (vmms, taps, known) = (host.vmms(None).len(), host.netns.taps()?.len(), host.guests()?.len());
    Ok(format!("{vmms} VMMs {taps} TAPs {known} known open {open:?}"))
}

/// Each of these harms at each of these points, in one lab.
fn at_points(cases: &[(Point, Harm)], stand: Duration) {
    let binary = match rig::lab::missing() {
        Some(_) => None,
        None => Some(points::binary().unwrap()),
    };
    let config = AgentConfig { binary, ..config() };
    with_lab(config, |lab| {
        let mut course = Course::new(lab, stand, "4M")?;
        for (point, harm) in cases {
            let start = Instant::now();
            let again = || format!("HARM={harm:?} POINT={}, and `one_harm_at_one_point` does it again", point.name());
            course.harm_at(*point, *harm).with_context(again)?;
            eprintln!("{harm:?} at {}: {:.1} s", point.name(), start.elapsed().as_secs_f64());
        }
        eprintln!("{} migrations: {:?}", cases.len(), course.came_to);
        Ok(())
    });
}

/// Every point once, with one harm after the other; the points of `part` of `parts`.
fn each_point(part: usize, parts: usize) {
    // 11 harms and an offset that has no factor in common with them: each meets points of every kind.
    let harm = |index: usize| HARMS[(index * 4) % HARMS.len()];
    let all = Point::ALL.iter().enumerate().map(|(index, point)| (*point, harm(index)));
    let mine: Vec<_> = all.skip(part).step_by(parts).collect();
    at_points(&mine, SILENCE + Duration::from_millis(700));
}

#[test]
fn a_harm_at_each_point_first_part() {
    each_point(0, 4);
}

#[test]
fn a_harm_at_each_point_second_part() {
    each_point(1, 4);
}

#[test]
fn a_harm_at_each_point_third_part() {
    each_point(2, 4);
}

#[test]
fn a_harm_at_each_point_fourth_part() {
    each_point(3, 4);
}

fn number(name: &str) -> Option<u64> {
    std::env::var(name).ok()?.parse().ok()
}

/// A stream of numbers from a seed (xorshift64*): no good randomness, but the same each time.
struct Numbers(u64);

impl Numbers {
    fn below(&mut self, most: u64) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_F491_4F6C_DD1D) % most.max(1)
    }
}

/// So many harms at random times; gives what came of them.
fn at_random(count: u64, seed: u64, stand: Duration, dirty: &str) {
    eprintln!("seed {seed}, {count} harms, stops and cuts of {} ms", stand.as_millis());
    with_lab(config(), |lab| {
        let mut course = Course::new(lab, stand, dirty)?;
        let mut numbers = Numbers(seed.max(1));
        let began = Instant::now();
        // As long as one takes that comes to no harm.
        let start = Instant::now();
        course.leave()?.wait(REST_MAX)?.expect_code(0)?;
        let usual = u64::try_from(start.elapsed().as_millis())?;
        course.next(Place::Destination, KillSourceAgent)?;
        for index in 0..count {
            let harm = HARMS[usize::try_from(numbers.below(HARMS.len() as u64))?];
            let delay = Duration::from_millis(numbers.below(usual + usual / 4));
            let what = format!("seed {seed}, number {index}: {harm:?} after {} ms", delay.as_millis());
            course.harm_after(harm, delay).with_context(|| what.clone())?;
            *course.came_to.entry(format!("{harm:?}")).or_default() += 1;
            if index % 10 == 9 {
                eprintln!("{} of {count} in {:.0} s: {:?}", index + 1, began.elapsed().as_secs_f64(), course.came_to);
            }
        }
        eprintln!("soak: {count} migrations at seed {seed} in {:.0} s: {:?}", began.elapsed().as_secs_f64(), course.came_to);
        Ok(())
    });
}

fn now_seed() -> u64 {
    std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).map_or(1, |since| since.as_millis() as u64)
}

#[test]
fn harms_at_random_times() {
    at_random(8, number("SEED").unwrap_or_else(now_seed), SILENCE + Duration::from_millis(700), "4M");
}

/// `make soak`: N migrations that come to harm at random times, with a release build, in as many labs at once as WORKERS says: most
/// of the time goes by in waiting for what stands still.
#[test]
#[ignore = "takes an hour: make soak"]
fn soak_at_random_times() {
    let binary = process::limosa_bin().unwrap();
    assert!(binary.display().to_string().contains("release"), "{} is no release build", binary.display());
    assert!(!has_points(&std::fs::read(binary).unwrap()), "a release build has fail points");
    let (count, seed) = (number("N").unwrap_or(300), number("SEED").unwrap_or_else(now_seed));
    let workers = number("WORKERS").unwrap_or(1).clamp(1, count.max(1));
    std::thread::scope(|scope| {
        for worker in 0..workers {
            // Each has a whole share, and together they have at least N.
            scope.spawn(move || at_random(count.div_ceil(workers), seed + worker, stand(), "1M"));
        }
    });
}

/// `make soak`: every harm at every point.
#[test]
#[ignore = "takes hours: make soak"]
fn soak_every_harm_at_every_point() {
    let cases: Vec<_> = Point::ALL.iter().flat_map(|point| HARMS.map(|harm| (*point, harm))).collect();
    at_points(&cases, stand());
}

/// One of them: `HARM=KillDestinationVmm POINT=source-says-commit cargo test --test kills -- --ignored one_harm_at_one_point`.
/// Without HARM every harm, without POINT every point whose name has POINTS in it.
#[test]
#[ignore = "for one case by hand"]
fn one_harm_at_one_point() {
    let (harm, point) = (std::env::var("HARM").ok(), std::env::var("POINT").ok());
    let part = std::env::var("POINTS").unwrap_or_default();
    let points = Point::ALL.iter().filter(|one| point.as_ref().map_or(one.name().contains(&part), |name| one.name() == name));
    let fits = |one: &Harm| harm.as_ref().is_none_or(|name| *name == format!("{one:?}"));
    let cases: Vec<_> = points.flat_map(|point| HARMS.into_iter().filter(fits).map(|harm| (*point, harm))).collect();
    at_points(&cases, SILENCE + Duration::from_millis(700));
}

/// How long `make soak` stops and cuts: 30 s, and STAND_MS says otherwise.
fn stand() -> Duration {
    number("STAND_MS").map_or(Duration::from_secs(30), Duration::from_millis)
}

fn has_points(binary: &[u8]) -> bool {
    let name = Point::SourceReleasedUnwritten.name().as_bytes();
    binary.windows(name.len()).any(|window| window == name)
}

#[test]
fn only_a_test_build_has_fail_points() {
    assert!(has_points(&std::fs::read(points::binary().unwrap()).unwrap()), "this way to look for them finds none");
    assert!(!has_points(&std::fs::read(process::limosa_bin().unwrap()).unwrap()), "the binary under test has them");
    // And a release build cannot be made with them.
    let file = concat!(env!("CARGO_MANIFEST_DIR"), "/transport/link/src/failpoints.rs");
    let compile = |assertions: &str| {
        let mut rustc = std::process::Command::new(std::env::var_os("RUSTC").unwrap_or_else(|| "rustc".into()));
        rustc.args(["--edition", "2024", "--crate-type", "lib", "--emit", "metadata", "-o", "/dev/null"]);
        rustc.args(["--cfg", "feature=\"failpoints\"", "-C", &format!("debug-assertions={assertions}"), file]);
        String::from_utf8_lossy(&rustc.output().expect("rustc").stderr).contains("a release build must not have them")
    };
    assert!(compile("off") && !compile("on"));
}
