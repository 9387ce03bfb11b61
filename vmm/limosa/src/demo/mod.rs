//! `limosa demo`: two hosts on this machine, one live migration, a report. A new user's first minute.
//! Here is the order of things; the hosts are in `lab`, the guest in `guest`, the pings in `pinger`.

mod guest;
mod lab;
mod pinger;

use crate::args::{DemoArgs, LinkKind};
use crate::commands::{Context, Ended, migrate, order, strange};
use crate::output;
use guest::{Guest, Heartbeat};
use lab::{Host, Lab};
use limosa_agent::api::{Answer, ApiError, Exchange, JobInfo, JobState, MigrateRequest, Request, Response, exit};
use limosa_proto::ticket::{Action, Links};
use nix::sys::signal::{SigSet, Signal};
use pinger::{Pinger, Pings};
use std::io;
use std::time::{Duration, Instant};

/// How long the guest may take until it answers pings, and how much longer for each GiB of memory that it fills.
const BOOT_MAX: (Duration, Duration) = (Duration::from_secs(30), Duration::from_secs(30));
/// How long its own check may take after the move.
const CHECK_MAX: Duration = Duration::from_secs(30);

/// Longest value of the table in characters; longer ones take several lines.
const WIDTH_MAX: usize = 100;

/// What the demo found, beside the migration's own report.
struct Findings {
    job: JobInfo,
    pings: Pings,
    port_before: Option<String>,
    port_after: Option<String>,
    verified: bool,
    check: String,
}

pub(crate) fn run(context: &Context, args: &DemoArgs) -> Ended {
    if let Some(error) = missing() {
        return Err(error);
    }
    if args.memory < guest::MEMORY_MIN || !args.memory.is_multiple_of(4096) {
        return Err(ApiError::usage("memory", "--memory should be at least 32M and a multiple of 4 KiB"));
    }
    if args.link == LinkKind::Rdma {
        let words = "the demo's two hosts are network namespaces of this machine, and an RDMA device belongs to one of them only; \
                     `make lab` boots two machines with one each (soft-RoCE), and there `limosa migrate … --link rdma` works";
        return Err(ApiError::refused("link-unavailable", words));
    }
    let lab = Lab::new().map_err(failed)?;
    let cleaner = Cleaner { lab: lab.clone(), keep: args.keep };
    clean_when_interrupted(&lab, args.keep).map_err(failed)?;
    let found = play(&lab, args, context.json);
    let found = found.map_err(|error| with_logs(error, &lab));
    drop(cleaner);
    if args.keep {
        output::note(format!("kept: {}", lab.directory().display()));
    }
    let found = found?;
    show(context, &found);
    match found.job.state {
        JobState::Done if !found.verified => {
            Err(ApiError::refused("not-verified", format!("the guest's own check: {}", found.check)))
        }
        state => Ok(state.exit()),
    }
}

/// The demo from the first namespace to the last ping.
fn play(lab: &Lab, args: &DemoArgs, quiet: bool) -> Result<Findings, ApiError> {
    let step = |words: &str| {
        if !quiet {
            output::note(words)
        }
    };
    step("two hosts, alpha and beta, and a switch between them");
    lab.build_network().map_err(failed)?;
    step("an agent on each; they trust each other");
    let plaintext = args.plaintext && !args.no_plaintext;
    let extra = if plaintext { "plaintext_lanes = true\n" } else { "" };
    lab.start_agents(extra).map_err(failed)?;
    step(&format!(
        "a guest of {} on alpha; it fills its memory and goes on writing {}/s",
        output::bytes(args.memory),
        output::bytes(args.dirty)
    ));
    let guest =
        Guest::write(lab.directory(), &Host::BOTH.map(|host| lab.state(host)), args.memory, args.dirty).map_err(failed)?;
    ask(lab, Host::Alpha, &Request::VmStart { config: guest.config.clone() })?;
    let pinger = Pinger::start(&lab.switch(), guest::ADDRESS).map_err(failed)?;
    wait_for_pings(&pinger, &guest, args.memory)?;
    // A little peace, so that the pings before the move are seen to be answered.
    std::thread::sleep(Duration::from_millis(500));
    let port_before = lab.switch_port_of(guest::MAC);
    step("it is pinged every 10 ms from the switch; now it moves to beta, live");
    let began = Instant::now();
    let job = move_guest(lab, args, plaintext, quiet)?;
    let moved = guest.heartbeat().unwrap_or_default();
    // The last announcement leaves 1.25 s after the move.
    std::thread::sleep(Duration::from_millis(1600));
    let port_after = lab.switch_port_of(guest::MAC);
    let (verified, check) = check(&guest, moved, args.dirty > 0);
    let pings = pinger.since(began);
    pinger.stop().map_err(failed)?;
    let (job, verified, check) = finish(lab, job, verified, check, &pings)?;
    Ok(Findings { job, pings, port_before, port_after, verified, check })
}

/// The job with all announcements in its report, and the demo's own figures put in.
fn finish(lab: &Lab, job: JobInfo, verified: bool, check: String, pings: &Pings) -> Result<(JobInfo, bool, String), ApiError> {
    let mut job = job;
    if let Answer::Jobs(jobs) = ask(lab, Host::Beta, &Request::Jobs { watch: false })?
        && let Some(incoming) = jobs.into_iter().rfind(|other| other.migration == job.migration)
        && let Some(report) = &mut job.report
        && incoming.announcements.len() > report.announcements.len()
    {
        report.announcements = incoming.announcements;
    }
    if let Some(report) = &mut job.report {
        report.verified = Some(verified && job.state == JobState::Done);
        let period = pinger::PERIOD.as_secs_f64() * 1000.0;
        report.network_gap_ms = Some((pings.largest_gap_ms - period).max(0.0));
        report.network_gap_by = Some(format!("pings from the switch, one each {period:.0} ms"));
    }
    Ok((job, verified, check))
}

fn wait_for_pings(pinger: &Pinger, guest: &Guest, memory: u64) -> Result<(), ApiError> {
    let until = Instant::now() + BOOT_MAX.0 + BOOT_MAX.1.mul_f64(memory as f64 / f64::from(1 << 30));
    while !pinger.answered_within(Duration::from_millis(500)) {
        if let Some(words) = guest.complaint() {
            return Err(ApiError::refused("guest", format!("the guest did not start: {words}")));
        }
        if Instant::now() > until || !pinger.alive() {
            return Err(ApiError::refused("guest", "the guest does not answer pings"));
        }
        std::thread::sleep(Duration::from_millis(20));
    }
    Ok(())
}

fn move_guest(lab: &Lab, args: &DemoArgs, plaintext: bool, quiet: bool) -> Result<JobInfo, ApiError> {
    let order = Request::Parties { vm: guest::NAME.into(), to: Host::Beta.name().into() };
    let ticket = match ask(lab, Host::Alpha, &order)? {
        Answer::Parties(parties) => order::signed(&lab.operator()?, &parties, Action::Migrate, Links::ALL)?.text(),
        other => return Err(strange(&other)),
    };
    let request = MigrateRequest {
        ticket: Some(ticket),
        vm: guest::NAME.into(),
        to: Host::Beta.name().into(),
        link: Some(args.link.name().into()),
        lanes: args.lanes,
        plaintext: plaintext.then_some(true),
        ..MigrateRequest::default()
    };
    let (mut progress, mut words) = (output::Progress::new(quiet), String::new());
    let exchange = Exchange::ask(&lab.api(Host::Alpha), &Request::Migrate(request))?;
    let answer = exchange.finish(|response| {
        if let Response::Progress(job) = response {
            if job.words != words && !quiet {
                words.clone_from(&job.words);
                output::note(&words);
            }
            progress.show(job);
        }
    });
    progress.done();
    match answer? {
        Answer::Job(job) => Ok(*job),
        other => Err(strange(&other)),
    }
}

/// Whether the guest found its memory right after the move: no error, its counters go on, and its whole working set
/// was walked again.
fn check(guest: &Guest, moved: Heartbeat, writes: bool) -> (bool, String) {
    let until = Instant::now() + CHECK_MAX;
    loop {
        let now = guest.heartbeat().unwrap_or_default();
        if now.errors > 0 {
            return (false, guest.complaint().unwrap_or_else(|| format!("{} pages are not as it left them", now.errors)));
        }
        let goes_on = now.number >= moved.number + 3 && (!writes || now.written > moved.written);
        // Two more ends of the walk: one whole walk that began after the move lies between them.
        if goes_on && now.verified >= moved.verified + 2 {
            let pages = now.written - moved.written;
            return (
                true,
                format!(
                    "passed: no page lost or stale, {pages} pages written since, the working set walked {} times",
                    now.verified
                ),
            );
        }
        if Instant::now() > until {
            return (false, format!("it did not finish in {} s: before {moved:?}, now {now:?}", CHECK_MAX.as_secs()));
        }
        std::thread::sleep(Duration::from_millis(50));
    }
}

fn ask(lab: &Lab, host: Host, request: &Request) -> Result<Answer, ApiError> {
    Exchange::ask(&lab.api(host), request)?.finish(|_| {})
}

fn show(context: &Context, found: &Findings) {
    if context.json {
        let mut value = migrate::flat(&found.job);
        if let Some(object) = value.as_object_mut() {
            object.insert("pings".into(), serde_json::to_value(&found.pings).unwrap_or_default());
            object.insert("lost_pings".into(), found.pings.lost.into());
            object.insert("largest_ping_gap_ms".into(), found.pings.largest_gap_ms.into());
            object.insert("mac".into(), guest::MAC.into());
            object.insert("switch_port_before".into(), found.port_before.clone().into());
            object.insert("switch_port_after".into(), found.port_after.clone().into());
            object.insert("guest_check".into(), found.check.clone().into());
        }
        output::json(&value);
        return;
    }
    let port = |port: &Option<String>| port.clone().unwrap_or_else(|| "unknown".into());
    let mut rows = vec![
        ("result".to_string(), output::ending(&found.job)),
        ("guest's check".into(), found.check.clone()),
        (
            "pings".into(),
            format!("{} sent, {} lost, largest gap {:.1} ms", found.pings.sent, found.pings.lost, found.pings.largest_gap_ms),
        ),
        (
            "MAC on switch".into(),
            format!("{} at port {} before, {} after", guest::MAC, port(&found.port_before), port(&found.port_after)),
        ),
    ];
    rows.extend(found.job.report.iter().flat_map(output::report_rows));
    let width = rows.iter().map(|(_, value)| value.chars().count()).max().unwrap_or(0).min(WIDTH_MAX);
    output::line(format!("┌{}┐", "─".repeat(width + 19)));
    for (name, value) in rows {
        for (index, part) in wrapped(&value, width).into_iter().enumerate() {
            let name = if index == 0 { name.as_str() } else { "" };
            output::line(format!("│ {name:<15}  {part:<width$} │"));
        }
    }
    output::line(format!("└{}┘", "─".repeat(width + 19)));
}

/// `text` in lines of at most `width` characters, where its spaces allow that.
fn wrapped(text: &str, width: usize) -> Vec<String> {
    let mut lines = vec![String::new()];
    for word in text.split(' ') {
        let Some(last) = lines.last_mut() else { break };
        if last.is_empty() {
            last.push_str(word);
        } else if last.chars().count() + 1 + word.chars().count() <= width {
            last.push(' ');
            last.push_str(word);
        } else {
            lines.push(word.to_owned());
        }
    }
    lines
}

/// What this machine lacks for the demo, and what can be done without it.
fn missing() -> Option<ApiError> {
    let mut lacks = Vec::new();
    if !nix::unistd::geteuid().is_root() {
        lacks.push("root is needed for network namespaces (try `sudo limosa demo`)".to_string());
    }
    if let Err(error) = std::fs::OpenOptions::new().read(true).write(true).open("/dev/kvm") {
        lacks.push(format!("/dev/kvm cannot be opened ({error}); the guest needs KVM"));
    }
    for program in ["ip", "bridge"] {
        let path = std::env::var_os("PATH").unwrap_or_default();
        if !std::env::split_paths(&path).any(|directory| directory.join(program).is_file()) {
            lacks.push(format!("`{program}` is missing (package iproute2)"));
        }
    }
    let instead = "Without them this machine can still check a configuration (`limosa agent --check --config FILE`), show what a \
                   migration would do on another host's agent (`limosa migrate VM --to HOST --print-plan`), and run the tests that need \
                   neither (`make test` says which it skips).";
    (!lacks.is_empty())
        .then(|| ApiError::refused("missing", format!("the demo cannot run here: {}.\n{instead}", lacks.join("; "))))
}

/// Takes the lab down however the demo ends.
struct Cleaner {
    lab: Lab,
    keep: bool,
}

impl Drop for Cleaner {
    fn drop(&mut self) {
        self.lab.clean(self.keep);
    }
}

/// Ctrl-C, a hang-up and a polite kill take the lab down too.
fn clean_when_interrupted(lab: &Lab, keep: bool) -> io::Result<()> {
    let mut signals = SigSet::empty();
    [Signal::SIGINT, Signal::SIGTERM, Signal::SIGHUP].into_iter().for_each(|signal| signals.add(signal));
    // Blocked here, before any other thread exists, so that only the thread below gets them.
    signals.thread_block()?;
    let lab = lab.clone();
    let wait = move || {
        let Ok(signal) = signals.wait() else { return };
        output::note("limosa: interrupted, cleaning up");
        lab.clean(keep);
        std::process::exit(128 + signal as i32);
    };
    std::thread::Builder::new().name("signals".into()).spawn(wait)?;
    Ok(())
}

fn failed(error: io::Error) -> ApiError {
    ApiError::refused("demo", format!("the demo failed: {error}"))
}

/// The error with the last words of both agents, because their logs are gone in a moment.
fn with_logs(mut error: ApiError, lab: &Lab) -> ApiError {
    for host in Host::BOTH {
        let tail = lab.log_tail(host);
        if !tail.is_empty() {
            error.words.push_str(&format!("\n-- {}'s log ends with:\n{tail}", host.name()));
        }
    }
    for (what, suffix) in [("the guest's VMM", "vmm.log"), ("the guest's serial line", "log")] {
        let log = lab.state(Host::Alpha).join("vm").join(format!("{}.{suffix}", guest::NAME));
        let text = std::fs::read(log).map(|bytes| String::from_utf8_lossy(&bytes).into_owned()).unwrap_or_default();
        let tail: Vec<&str> = text.lines().rev().take(4).collect();
        if !tail.is_empty() {
            error.words.push_str(&format!("\n-- {what} ends with:\n{}", tail.into_iter().rev().collect::<Vec<_>>().join("\n")));
        }
    }
    // Exit codes of the agent's refusals stay as they are.
    error.exit = if error.exit == exit::DONE { exit::REFUSED } else { error.exit };
    error
}
