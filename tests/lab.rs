//! The soft-RoCE lab itself, by its Rust side and by its command: what its two machines have, what commands in them can rely
//! on, and that nothing is left of it, however it ends. What Limosa does in the lab is tested elsewhere.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]
#![forbid(unsafe_code)]

use nix::sys::signal::Signal;
use rig::process::{self, Process, wait_for};
use rig::roce::{self, Machine, Machines, Spec, leftovers, with_machines};
use rig::{Context, Result, ensure};
use std::io::Seek;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

const SHORT: Duration = Duration::from_secs(30);
const BOOT: Duration = Duration::from_secs(120);

#[test]
fn the_machines_have_roce_kvm_and_netem_and_carry_commands_exactly() {
    with_machines(|machines| {
        both_have_an_active_device_with_roce_v2_addresses(machines)?;
        the_ethernet_carries_jumbo_frames_and_rdma(machines)?;
        netem_delays_the_ethernet_and_not_the_tester(machines)?;
        kvm_runs_a_guest(machines.alpha())?;
        commands_keep_their_bytes_streams_and_status(machines.alpha())?;
        commands_run_beside_each_other_and_end_when_told(machines.beta())?;
        what_is_written_stays_inside(machines.alpha())?;
        the_switch_is_seen_from_outside(machines)?;
        a_power_cut_is_noticed_at_once(machines)
    });
}

fn both_have_an_active_device_with_roce_v2_addresses(machines: &Machines) -> Result<()> {
    ensure!(machines.ready().problems.is_empty(), "the set-up complains: {:?}", machines.ready().problems);
    for machine in [machines.alpha(), machines.beta()] {
        let text = machine.run(&["ibv_devinfo", "-v"], SHORT)?.expect_ok()?.text();
        for words in ["hca_id:\trxe0", "PORT_ACTIVE (4)", "active_mtu:\t\t4096 (5)"] {
            ensure!(text.contains(words), "{}: no {words:?} in\n{text}", machine.name);
        }
        for address in [format!("::ffff:{}, RoCE v2", machine.ip), format!("{}, RoCE v2", machine.ip6)] {
            ensure!(text.contains(&address), "{}: no GID {address:?} in\n{text}", machine.name);
        }
        ensure!(machine.shell("hostname", SHORT)?.text() == machine.name);
    }
    Ok(())
}

fn the_ethernet_carries_jumbo_frames_and_rdma(machines: &Machines) -> Result<()> {
    let (alpha, beta) = (machines.alpha(), machines.beta());
    for address in [beta.ip.to_string(), beta.ip6.to_string()] {
        alpha.run(&["ping", "-c", "3", "-i", "0.2", "-M", "do", "-s", "8900", &address], SHORT)?.expect_ok()?;
    }
    let words = ["ib_write_bw", "-d", "rxe0", "-s", "65536", "-n", "100", "--report_gbits"];
    let mut listening = beta.task(&words).limit(SHORT).spawn()?;
    let ready = || Ok(beta.shell("ss -Hltn sport = :18515", SHORT)?.text().contains("LISTEN").then_some(()));
    wait_for(SHORT, "ib_write_bw to listen", ready)?;
    let address = beta.ip.to_string();
    let text = alpha.run(&[&words[..], &[&address]].concat(), SHORT)?.expect_ok()?.text();
    listening.wait(SHORT)?.expect_ok()?;
    let figures = text.lines().find(|line| line.trim().starts_with("65536")).with_context(|| format!("no figures in\n{text}"))?;
    let average: f64 = figures.split_whitespace().nth(3).context("the fourth column")?.parse()?;
    ensure!(average > 0.0, "ib_write_bw found {average} Gbit/s:\n{text}");
    let sent = "cat /sys/class/infiniband/rxe0/ports/1/hw_counters/sent_pkts";
    let packets: u64 = alpha.shell(sent, SHORT)?.text().parse()?;
    ensure!(packets >= 100 * 65536 / 4096, "RDMA was said to move 6.5 MB by {packets} packets");
    Ok(())
}

fn netem_delays_the_ethernet_and_not_the_tester(machines: &Machines) -> Result<()> {
    let (alpha, beta) = (machines.alpha(), machines.beta());
    let round_trip = || -> Result<f64> {
        let text = alpha.run(&["ping", "-q", "-c", "3", "-i", "0.2", &beta.ip.to_string()], SHORT)?.expect_ok()?.text();
        let times = text.split("= ").nth(1).with_context(|| format!("no times in\n{text}"))?;
        Ok(times.split('/').next().context("the least time")?.parse()?)
    };
    alpha.shell("tc qdisc add dev v0 root netem delay 300ms", SHORT)?;
    let delayed = round_trip()?;
    ensure!(delayed >= 300.0, "with a delay of 300 ms a round trip takes {delayed} ms");
    alpha.shell("tc qdisc replace dev v0 root netem loss 100%", SHORT)?;
    ensure!(!alpha.run(&["ping", "-c", "1", "-W", "1", &beta.ip.to_string()], SHORT)?.ok(), "a ping came through a total loss");
    alpha.shell("tc qdisc del dev v0 root", SHORT)?;
    let usual = round_trip()?;
    ensure!(usual < delayed, "without netem a round trip takes {usual} ms, with it {delayed}");
    Ok(())
}

fn kvm_runs_a_guest(machine: &Machine) -> Result<()> {
    machine.shell("test -c /dev/kvm && grep -q svm /proc/cpuinfo", SHORT)?;
    let images = rig::guest_images()?;
    let elf = images.elf.display().to_string();
    let words = ["-accel", "kvm", "-cpu", "host", "-nodefaults", "-no-user-config", "-display", "none", "-m", "32"];
    let guest = ["-serial", "stdio", "-kernel", &elf, "-append", "ws=1M dirty=100K heartbeat=200"];
    let mut qemu = machine.task(&[&["qemu-system-x86_64"], &words[..], &guest[..]].concat()).limit(BOOT).spawn()?;
    // A line that has a successor is whole.
    qemu.wait_for_words("heartbeat n=6 ", SHORT)?;
    let (said, _) = qemu.printed();
    let beat = said.lines().find(|line| line.contains("heartbeat n=5 ")).context("the fifth heartbeat")?;
    ensure!(beat.contains(" errors=0 ") && !beat.contains(" verified=0 "), "the guest in the lab says {beat}");
    qemu.kill()?;
    Ok(())
}

fn commands_keep_their_bytes_streams_and_status(machine: &Machine) -> Result<()> {
    let bytes: Vec<u8> = (0..3_000_000_u32).map(|n| (n.wrapping_mul(2_654_435_761) >> 24) as u8).collect();
    let echo = machine.task(&["cat"]).limit(SHORT).run_with_input(&bytes)?.expect_ok()?;
    ensure!(echo.stdout == bytes, "cat gave {} other bytes", echo.stdout.len());
    let output = machine.run(&["sh", "-c", "echo out; echo err >&2; exit 7"], SHORT)?;
    ensure!((output.status(), output.text(), output.errors()) == (7, "out".into(), "err".into()), "{output:?}");
    let output = machine.run(&["sh", "-c", "kill -9 $$"], SHORT)?;
    ensure!(output.end.signal == Some(9) && output.status() == 137, "{output:?}");
    let error = machine.run(&["/no/such/program"], SHORT).map(|_| ()).expect_err("it cannot be started");
    ensure!(format!("{error:#}").contains("/no/such/program"), "{error:#}");
    let words = ["printf", "%s|", "a b", "", "$HOME", "ü\n"];
    ensure!(machine.run(&words, SHORT)?.expect_ok()?.stdout == "a b||$HOME|ü\n|".as_bytes());
    let task = machine.task(&["sh", "-c", "echo $COLOUR; pwd"]).env("COLOUR", "grey").folder("/usr/bin").limit(SHORT);
    ensure!(task.run()?.expect_ok()?.text() == "grey\n/usr/bin");
    // What a command leaves in the background does not hold up its end, and lives on.
    let start = Instant::now();
    let pid = machine.shell("sleep 300 & echo $!", SHORT)?.text();
    ensure!(start.elapsed() < Duration::from_secs(20), "the end waited for the background");
    machine.shell(&format!("kill {pid}"), SHORT)?;
    Ok(())
}

fn commands_run_beside_each_other_and_end_when_told(machine: &Machine) -> Result<()> {
    let mut first = machine.spawn(&["sh", "-c", "echo ready; read line; echo got $line; exec sleep 300"])?;
    first.wait_for_words("ready", SHORT)?;
    machine.shell("true", SHORT)?;
    first.write(b"this\n")?;
    first.wait_for_words("got this", SHORT)?;
    ensure!(!first.ended());
    first.signal(Signal::SIGTERM)?;
    ensure!(first.wait(SHORT)?.end.signal == Some(15));
    let late = machine.run(&["sh", "-c", "trap '' TERM; sleep 300; sleep 300"], Duration::from_secs(1))?;
    ensure!(late.end.timed_out && late.status() == 124, "{late:?}");
    // A command that reads nothing of a long input still goes with its Running.
    let mut deaf = machine.spawn(&["sh", "-c", "echo $$; exec sleep 300"])?;
    let pid = wait_for(SHORT, "its process id", || Ok(deaf.printed().0.lines().next().map(str::to_owned)))?;
    deaf.write(&vec![0; 1 << 20])?;
    drop(deaf);
    let gone = || Ok((!machine.run(&["test", "-e", &format!("/proc/{pid}")], SHORT)?.ok()).then_some(()));
    wait_for(SHORT, "the end of a command nobody listens to", gone)?;
    let left = machine.shell("pgrep -c sleep || true; ps -eo stat | grep -c ^Z || true", SHORT)?.text();
    ensure!(left == "0\n0", "sleeps and zombies left in the machine: {left:?}");
    Ok(())
}

fn what_is_written_stays_inside(machine: &Machine) -> Result<()> {
    let bytes = b"\x00\xff exact \n\n";
    for path in ["/etc/limosa-lab-test/file", "/tmp/limosa-lab-test", "/usr/bin/limosa-lab-test"] {
        machine.write_file(path, bytes)?;
        ensure!(machine.read_file(path)? == bytes, "{path} came back otherwise");
        ensure!(!Path::new(path).exists(), "{path} was written on the outer machine");
    }
    ensure!(machine.read_file("/no/such/file").is_err());
    ensure!(!machine.run(&["touch", "/run/lab/outer/tmp/limosa-lab-test"], SHORT)?.ok(), "the outer machine can be written");
    // The program of this very test, as it lies on the outer machine.
    let own = std::env::current_exe()?.display().to_string();
    let list = machine.run(&[&own, "--list"], SHORT)?.expect_ok()?.text();
    ensure!(list.contains("the_machines_have_roce_kvm_and_netem"), "{list}");
    Ok(())
}

fn the_switch_is_seen_from_outside(machines: &Machines) -> Result<()> {
    for machine in [machines.alpha(), machines.beta()] {
        let fdb = rig::netns::run("bridge", &["-n", &machines.ready().name, "fdb", "show", "br", roce::keeper::SWITCH])?;
        let found = fdb.lines().any(|line| line.starts_with(&machine.mac) && line.contains(&machine.port));
        ensure!(found, "{} is not on {}:\n{fdb}", machine.mac, machine.port);
    }
    Ok(())
}

fn a_power_cut_is_noticed_at_once(machines: &Machines) -> Result<()> {
    let mut running = machines.beta().spawn(&["sleep", "300"])?;
    machines.beta().crash()?;
    ensure!(!machines.beta().is_on());
    let error = running.wait(SHORT).map(|_| ()).expect_err("its machine is off");
    ensure!(format!("{error:#}").contains("beta is lost"), "{error:#}");
    ensure!(machines.beta().run(&["true"], SHORT).is_err());
    machines.alpha().shell("true", SHORT).map(|_| ())
}

/// The lab's command with these words.
fn lab(words: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_lab"));
    command.args(words).stdin(Stdio::null());
    command
}

/// Runs it to its end: status, standard output, standard error.
fn run(words: &[&str]) -> Result<(i32, String, String)> {
    let output = lab(words).output()?;
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    Ok((output.status.code().unwrap_or(-1), text(&output.stdout), text(&output.stderr)))
}

/// Skips, or holds the lock that keeps labs of tests apart.
fn with_lock(test: impl FnOnce() -> Result<()>) {
    if let Some(reason) = roce::missing() {
        rig::skip(&reason);
        return;
    }
    let result = process::lock("rig-machines").and_then(|_lock| test());
    if let Err(error) = result {
        panic!("{error:#}");
    }
}

/// The keeper that a lab command has started.
fn keeper_of(command: &Process) -> Result<u32> {
    let parent = |pid: u32| -> Option<u32> {
        let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
        stat.rsplit_once(')')?.1.split_whitespace().nth(1)?.parse().ok()
    };
    let own = |pid: &u32| parent(*pid) == Some(command.pid()) && process::words(*pid).iter().any(|word| word == "keep");
    wait_for(SHORT, "the lab's keeper", || Ok(process::all().into_iter().find(own)))
}

/// The process ids of a lab's two QEMUs, as soon as they are there.
fn qemus(lab: &str) -> Result<Vec<u32>> {
    let found = || Some(roce::qemus(lab)).filter(|found| found.len() == 2);
    wait_for(SHORT, "two machines", || Ok(found()))
}

fn wait_gone(name: &str, keeper: u32) -> Result<()> {
    let gone = wait_for(SHORT, "the lab to go", || Ok(leftovers(name, keeper).is_empty().then_some(())));
    gone.with_context(|| format!("left over: {:?}", leftovers(name, keeper)))
}

/// Takes down the lab that stays and the folder of logs, also when the test fails.
struct Staying(String);

impl Drop for Staying {
    fn drop(&mut self) {
        let _ = run(&["--lab", &self.0, "down"]);
    }
}

#[test]
fn a_lab_that_stays_serves_commands_beside_another_that_is_killed() {
    with_lock(|| {
        let staying = Staying(format!("test-{}", std::process::id()));
        let at = ["--lab", &staying.0];
        let say = |words: &[&str]| run(&[&at[..], words].concat());
        ensure!(say(&["status"])?.0 == 1 && say(&["down"])?.0 == 0);
        let (status, name, errors) = say(&["up"])?;
        ensure!(status == 0, "lab up: {errors}");
        ensure!(say(&["up"])?.1.contains(name.trim()), "a second up shall find the first");
        lines_of_both_say_whose_they_are(&say)?;
        rebuilt_files_are_seen(&say)?;
        let mut other = lab(&["--lab", &staying.0, "run", "--new", "echo here; sleep 600"]);
        let mut other = Process::start("another lab", other.stdout(Stdio::piped()).stderr(Stdio::null()))?;
        let keeper = keeper_of(&other)?;
        let other_name = format!("{}{keeper}-1", rig::netns::PREFIX);
        ensure!(qemus(&other_name)?.len() == 2 && other_name != name.trim());
        let up = || Ok(say(&["run", "ping -c 1 10.77.0.1 >&2; hostname"])?.1.contains("alpha | alpha").then_some(()));
        wait_for(BOOT, "the lab that stays", up)?;
        other.kill()?;
        wait_gone(&other_name, keeper)?;
        up()?.context("the lab that stays went with the other")?;
        let ready: roce::Ready = serde_json::from_slice(&std::fs::read(register(&staying.0)?)?)?;
        ensure!(say(&["down"])?.0 == 0);
        ensure!(leftovers(&ready.name, ready.keeper).is_empty() && !ready.folder.exists() && !register(&staying.0)?.exists());
        Ok(())
    });
}

/// Where labs leave their logs.
fn runs() -> Result<PathBuf> {
    Ok(Path::new(env!("CARGO_BIN_EXE_lab")).parent().context("the folder of the lab's program")?.join("lab-runs"))
}

fn register(lab: &str) -> Result<PathBuf> {
    Ok(runs()?.join(format!("up-{lab}.json")))
}

type Say<'a> = &'a dyn Fn(&[&str]) -> Result<(i32, String, String)>;

fn lines_of_both_say_whose_they_are(say: Say<'_>) -> Result<()> {
    let (status, out, errors) = say(&["run", "echo one; printf two; echo three >&2; test $(hostname) = beta && exit 5"])?;
    let mut lines: Vec<&str> = out.lines().collect();
    lines.sort_unstable();
    ensure!(lines == ["alpha | one", "alpha | two", "beta  | one", "beta  | two"], "{out}");
    ensure!(errors.contains("alpha | three") && errors.contains("beta  | three"), "{errors}");
    ensure!(status == 5, "the worst of 1 and 5 is {status}");
    let (status, out, _) = say(&["run", "--host", "beta", "printf 'a\\nb'; exit 3"])?;
    ensure!((status, out.as_str()) == (3, "a\nb"), "{status} {out:?}");
    let (status, _, errors) = say(&["run", "--host", "gamma", "true"])?;
    ensure!(status == 1 && errors.contains("alpha or beta"), "{status} {errors}");
    let (status, _, errors) = say(&["run", "--limit", "1", "--host", "beta", "sleep 100"])?;
    ensure!(status == 124 && errors.contains("LIMIT"), "{status} {errors}");
    Ok(())
}

fn rebuilt_files_are_seen(say: Say<'_>) -> Result<()> {
    let folder = tempfile::Builder::new().prefix("lab-test-").tempdir_in(env!("CARGO_TARGET_TMPDIR"))?;
    let file = folder.path().join("program");
    for text in ["the first", "the second, which is longer", "third"] {
        std::fs::remove_file(&file).ok();
        std::fs::write(&file, text)?;
        let (status, out, errors) = say(&["run", "--host", "alpha", &format!("cat {}", file.display())])?;
        ensure!(status == 0 && out == text, "after {text:?} was written: {out:?} {errors}");
    }
    Ok(())
}

#[test]
fn a_lab_ends_when_its_time_is_over() {
    with_lock(|| {
        let machines = Machines::boot(&Spec { limit_seconds: 1, ..Spec::new()? })?;
        let ready = machines.ready().clone();
        wait_gone(&ready.name, ready.keeper)?;
        ensure!(machines.alpha().run(&["true"], SHORT).is_err());
        machines.end()?;
        // Its end was not asked for: the consoles are there to be read.
        std::fs::remove_dir_all(&ready.folder).context("the consoles of a lab whose time was over are kept")
    });
}

#[test]
fn a_lab_that_is_interrupted_or_whose_keeper_is_killed_leaves_nothing() {
    with_lock(|| {
        for signal in [Signal::SIGINT, Signal::SIGTERM] {
            let mut command = lab(&["run", "--new", "true"]);
            let mut command = Process::start("a lab", command.stdout(Stdio::null()).stderr(Stdio::null()))?;
            let keeper = keeper_of(&command)?;
            let name = format!("{}{keeper}-1", rig::netns::PREFIX);
            qemus(&name)?;
            command.signal(signal);
            let status = command.wait(SHORT)?;
            ensure!(status.code() == Some(130), "an interrupted lab ends with {status}");
            ensure!(leftovers(&name, keeper).is_empty(), "{:?}", leftovers(&name, keeper));
            ensure!(!runs()?.join(&name).exists(), "the folder of an interrupted lab is left");
        }
        let mut said = tempfile::tempfile()?;
        let mut command = lab(&["run", "--new", "true"]);
        let mut command = Process::start("a lab", command.stdout(Stdio::null()).stderr(said.try_clone()?))?;
        let keeper = keeper_of(&command)?;
        let name = format!("{}{keeper}-1", rig::netns::PREFIX);
        let machines = qemus(&name)?;
        process::kill(keeper);
        let gone = || Ok((!machines.iter().any(|pid| process::alive(*pid))).then_some(()));
        wait_for(SHORT, "the machines to go with their keeper", gone)?;
        ensure!(command.wait(SHORT)?.code() == Some(1));
        said.rewind()?;
        let said = std::io::read_to_string(said)?;
        ensure!(said.contains("keeper ended without a word"), "{said}");
        ensure!(leftovers(&name, keeper).is_empty(), "{:?}", leftovers(&name, keeper));
        std::fs::remove_dir_all(runs()?.join(&name)).context("the consoles of a killed lab are kept")
    });
}
