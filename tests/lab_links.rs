//! Whole migrations of a KVM guest from one machine of the soft-RoCE lab to the other: over rdma, quic and tcp, each with the
//! guest's own check of every page; under loss, delay and reordering; with the RDMA link cut in the middle. The machines are
//! real kernels with nested KVM and rxe; `tests/lab.rs` tests the machines themselves.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::print_stdout, missing_docs)]
#![forbid(unsafe_code)]

use rig::process::{limosa_bin, wait_for};
use rig::roce::station::{OPERATOR_KEY, operator_in};
use rig::roce::{Machine, Machines, Running, shell_quoted, with_machines};
use rig::spec::{Beat, beat_of};
use rig::{Context, GuestSpec, Result, ensure};
use serde_json::Value;
use std::cell::RefCell;
use std::time::Duration;

const SHORT: Duration = Duration::from_secs(30);
/// A migration in the lab: 32 MiB of content at 10 to 60 MB/s, with everything else emulated beside it.
const MIGRATION: Duration = Duration::from_secs(120);
const RUN: &str = "/run/limosa-test";
/// The network of the lab's machines.
const LAB_NETWORK: &str = "10.77.0.0/24";

/// An agent in a lab machine.
struct Station<'a> {
    machine: &'a Machine,
    _agent: RefCell<Running>,
}

impl<'a> Station<'a> {
    /// A bridge for guests and an agent that trusts the lab's Ethernet as a fabric.
    fn new(machine: &'a Machine) -> Result<Station<'a>> {
        machine.shell("ip link show br0 >/dev/null 2>&1 || { ip link add br0 type bridge && ip link set br0 up; }", SHORT)?;
        machine.shell(&format!("mkdir -p {RUN}"), SHORT)?;
        let config = format!(
            "[agent]\nname = \"{name}\"\nlisten = [\"{ip}:13560\"]\nstate_dir = \"{RUN}/state\"\nrun_dir = \"{RUN}/run\"\n\
             [allow]\npeers = [\"192.0.2.0/24\"]\n[rdma]\ntrusted_fabric = [\"10.77.0.0/24\"]\n\
             [[network]]\nname = \"lan\"\nbridge = \"br0\"\n{rule}",
            rule = operator_in(machine)?.rule("rig"),
            name = machine.name,
            ip = machine.ip,
        );
        machine.write_file(&format!("{RUN}/agent.toml"), config.as_bytes())?;
        let line = format!("exec {} agent --config {RUN}/agent.toml >{RUN}/agent.log 2>&1", limosa_bin()?.display());
        let agent = machine.task(&["sh", "-c", &line]).limit(Duration::from_secs(900)).spawn()?;
        let station = Station { machine, _agent: RefCell::new(agent) };
        let answers = wait_for(SHORT, "the agent's first answer", || {
            Ok(station.run(&["--json", "vm", "list"]).is_ok_and(|(code, _)| code == 0).then_some(()))
        });
        answers.with_context(|| format!("log of {}:\n{}", machine.name, station.log()))?;
        // By a command, so that a test can take it back.
        station.well(&["allow", "add", LAB_NETWORK])?;
        Ok(station)
    }

    fn log(&self) -> String {
        self.read(&format!("{RUN}/agent.log"))
    }

    fn read(&self, path: &str) -> String {
        self.machine.read_file(path).map(|bytes| String::from_utf8_lossy(&bytes).into_owned()).unwrap_or_default()
    }

    /// Runs a command of limosa; its exit code and what it printed.
    fn run(&self, words: &[&str]) -> Result<(i32, String)> {
        let binary = limosa_bin()?.display().to_string();
        let words = [&[binary.as_str(), "--run-dir", "/run/limosa-test/run", "--key", OPERATOR_KEY], words].concat();
        let output = self.machine.task(&words).limit(MIGRATION).run()?;
        Ok((output.status(), if output.ok() { output.text() } else { format!("{}\n{}", output.text(), output.errors()) }))
    }

    /// Runs a command that must succeed.
    fn well(&self, words: &[&str]) -> Result<()> {
        let (code, printed) = self.run(words)?;
        ensure!(code == 0, "{} {words:?} ended with {code}: {printed}\n{}", self.machine.name, tail(&self.log()));
        Ok(())
    }

    fn ask(&self, words: &[&str]) -> Result<Value> {
        let (code, printed) = self.run(&[&["--json"], words].concat())?;
        ensure!(code == 0, "{} {words:?} ended with {code}: {printed}\n{}", self.machine.name, tail(&self.log()));
        Ok(serde_json::from_str(&printed)?)
    }

    fn trust(&self, other: &Station<'_>) -> Result<()> {
        let id = other.ask(&["host", "id"])?;
        let id = id["id"].as_str().context("the host's id")?;
        let (code, printed) = self.run(&["host", "trust", &other.machine.name, id, &format!("{}:13560", other.machine.ip)])?;
        ensure!(code == 0, "{printed}");
        Ok(())
    }

    fn start_guest(&self, spec: &GuestSpec) -> Result<()> {
        let path = format!("{RUN}/{}.toml", spec.name);
        self.machine.write_file(&path, spec.text(&rig::guest_images()?.elf).as_bytes())?;
        let (code, printed) = self.run(&["vm", "start", &path])?;
        ensure!(code == 0, "{printed}\n{}", tail(&self.log()));
        wait_for(SHORT, "the guest's ready line", || Ok(self.serial(&spec.name).contains("limosa-guest ready").then_some(())))
    }

    fn serial(&self, guest: &str) -> String {
        self.read(&format!("{RUN}/state/vm/{guest}.log"))
    }

    fn beat(&self, guest: &str) -> Beat {
        let text = self.serial(guest);
        let whole = text.rfind('\n').and_then(|end| text.get(..end)).unwrap_or_default();
        whole.lines().filter_map(|line| beat_of(line.trim_end())).next_back().unwrap_or_default()
    }

    /// Waits until the guest, running here, has walked over its whole working set once more and found nothing.
    fn verified(&self, guest: &str) -> Result<Beat> {
        let first = wait_for(SHORT, "a heartbeat", || Ok(Some(self.beat(guest)).filter(|beat| beat.n > 0)))
            .with_context(|| format!("{guest} on {}: {}", self.machine.name, tail(&self.log())))?;
        wait_for(MIGRATION, "a whole walk over the working set", || {
            let last = self.beat(guest);
            ensure!(last.errors == 0 && last.backwards == 0, "{last:?}: {}", tail(&self.serial(guest)));
            Ok((last.verified > first.verified).then_some(last))
        })
    }

    /// The RDMA device's counter of that name.
    fn counter(&self, name: &str) -> Result<u64> {
        let path = format!("/sys/class/infiniband/rxe0/ports/1/hw_counters/{name}");
        self.read(&path).trim().parse().with_context(|| format!("{path} on {}", self.machine.name))
    }

    /// How many protection domains, completion queues, queue pairs and memory regions exist in the machine, from the kernel's
    /// own list; it keeps one of the first three itself. The agent's open device ("ctx") may stay.
    fn rdma_things(&self) -> Result<String> {
        let line = r"rdma res show | grep -oE '(pd|cq|qp|mr) [0-9]+' | tr '\n' ' '";
        let things = self.machine.shell(line, SHORT)?.text();
        ensure!(things.contains("qp ") && things.contains("mr "), "rdma res show: {things:?}");
        Ok(things)
    }

    fn netem(&self, words: &str) -> Result<()> {
        let line = if words.is_empty() {
            "tc qdisc del dev v0 root".to_owned()
        } else {
            format!("tc qdisc replace dev v0 root netem {words}")
        };
        self.machine.shell(&line, SHORT)?;
        Ok(())
    }
}

fn tail(text: &str) -> String {
    let lines: Vec<&str> = text.lines().collect();
    lines.get(lines.len().saturating_sub(25)..).unwrap_or_default().join("\n")
}

/// Both stations, trusting each other.
fn stations(machines: &Machines) -> Result<(Station<'_>, Station<'_>)> {
    let (alpha, beta) = (Station::new(machines.alpha())?, Station::new(machines.beta())?);
    alpha.trust(&beta)?;
    beta.trust(&alpha)?;
    Ok((alpha, beta))
}

fn small(name: &str, number: u8) -> GuestSpec {
    GuestSpec::new(name, number).memory("64M", "8M").dirty("200K", "4M")
}

/// Moves `guest` and gives the report, which must be good.
fn migrate(guest: &str, from: &Station<'_>, to: &Station<'_>, more: &[&str]) -> Result<Value> {
    let words = [&["migrate", guest, "--to", to.machine.name.as_str()], more].concat();
    let answer = from.ask(&words).with_context(|| format!("log of {}:\n{}", to.machine.name, tail(&to.log())))?;
    let report = answer.get("report").cloned().unwrap_or(answer);
    ensure!(report["ok"] == true, "{report}");
    to.verified(guest)?;
    Ok(report)
}

/// There and back over `link`; the report of the way there.
fn there_and_back(guest: &str, alpha: &Station<'_>, beta: &Station<'_>, link: &str) -> Result<Value> {
    let report = migrate(guest, alpha, beta, &["--link", link])?;
    ensure!(report["link"] == link, "{report}");
    let back = migrate(guest, beta, alpha, &["--link", link])?;
    ensure!(back["link"] == link, "{back}");
    println!(
        "{link}: {} ms in all, downtime {} ms, {} bytes in {} rounds",
        report["total_ms"], report["downtime_ms"], report["bytes_on_wire"], report["rounds"]
    );
    Ok(report)
}

#[test]
fn a_guest_moves_over_every_link_and_through_a_bad_network() {
    with_machines(|machines| {
        let (alpha, beta) = stations(machines)?;
        // Not 1 or 2: those MAC addresses are the machines' own.
        let guest = small("rover", 11);
        alpha.start_guest(&guest)?;
        alpha.verified("rover")?;
        rdma_moves_pages_and_nothing_stays_open(&alpha, &beta)?;
        rdma_is_chosen_first_where_both_have_it(&alpha, &beta)?;
        a_cut_of_the_fabric_leaves_the_guest_here(&alpha, &beta)?;
        for link in ["quic", "tcp"] {
            let report = there_and_back("rover", &alpha, &beta, link)?;
            ensure!(report["encrypted"] == true && report["page_check"].is_null(), "{report}");
        }
        for (words, most) in [("loss 1%", "loss"), ("delay 20ms", "delay"), ("delay 5ms reorder 25% 50%", "reordering")] {
            for station in [&alpha, &beta] {
                station.netem(words)?;
            }
            for link in ["quic", "tcp"] {
                there_and_back("rover", &alpha, &beta, link).with_context(|| format!("{link} with {most}"))?;
            }
            for station in [&alpha, &beta] {
                station.netem("")?;
            }
        }
        Ok(())
    });
}

/// What the agent of alpha answers to an RDMA connect request of beta, which comes before TCP or any key.
fn knock(alpha: &Station<'_>, beta: &Station<'_>, wants: &str) -> Result<()> {
    let program = rig::roce::test_binary("limosa-link", "rdma", &[])?.display().to_string();
    let words = [program.as_str(), "--ignored", "--nocapture", "--exact", "knocks_at_another_machine"];
    let to = format!("{}:13560", alpha.machine.ip);
    let things = alpha.rdma_things()?;
    let output = beta.machine.task(&words).env("LIMOSA_KNOCK", &to).limit(SHORT).run()?;
    let said = format!("{}{}", output.text(), output.errors());
    ensure!(output.ok() && said.contains("1 passed"), "{said}");
    let answer = said.lines().find_map(|line| line.split_once("the answer: ")).map(|(_, answer)| answer.to_owned());
    println!("beta knocks at alpha by RDMA: {answer:?}");
    ensure!(answer.as_deref().is_some_and(|answer| answer.contains(wants)), "{wants:?} is not in {said}");
    ensure!(alpha.rdma_things()? == things, "something was made for it: {} instead of {things}", alpha.rdma_things()?);
    Ok(())
}

/// A connect request from an address that is not on the list of peers, and one to an address of the host that takes no migrations, are
/// refused before anything is made for them; the same request is judged by its token where both lists allow it.
#[test]
fn an_rdma_request_is_let_in_by_both_allow_lists_and_not_else() {
    with_machines(|machines| {
        let (alpha, beta) = stations(machines)?;
        let (allowed, elsewhere) = ("no such migration waits for lanes", "192.0.2.7");
        knock(&alpha, &beta, allowed)?;
        alpha.well(&["allow", "remove", LAB_NETWORK])?;
        knock(&alpha, &beta, &format!("{} is not on the allow-list", beta.machine.ip))?;
        alpha.well(&["allow", "add", LAB_NETWORK])?;
        alpha.well(&["allow", "add", "--here", elsewhere])?;
        knock(&alpha, &beta, &format!("{} of the destination takes no migrations", alpha.machine.ip))?;
        alpha.well(&["allow", "add", "--here", &alpha.machine.ip.to_string()])?;
        knock(&alpha, &beta, allowed)?;
        let guest = small("rover", 11);
        alpha.start_guest(&guest)?;
        there_and_back("rover", &alpha, &beta, "rdma").map(drop)
    });
}

/// The device's own counters show that pages went by RDMA, and the kernel's lists that nothing of it is left.
fn rdma_moves_pages_and_nothing_stays_open(alpha: &Station<'_>, beta: &Station<'_>) -> Result<()> {
    let before = (alpha.counter("sent_pkts")?, alpha.rdma_things()?, beta.rdma_things()?);
    let report = migrate("rover", alpha, beta, &["--link", "rdma"])?;
    let packets = alpha.counter("sent_pkts")? - before.0;
    ensure!(report["link"] == "rdma" && report["encrypted"] == false && report["page_check"] == true, "{report}");
    let bytes = report["bytes_on_wire"].as_u64().context("bytes_on_wire")?;
    // The guest has 12 MiB of content and more; the path MTU is 4096.
    ensure!(bytes > 12 << 20 && packets > (12 << 20) / 4096, "{packets} packets for {bytes} bytes");
    println!(
        "rdma: {bytes} bytes by {packets} packets of the device, {} ms, downtime {} ms",
        report["total_ms"], report["downtime_ms"]
    );
    let idle = || Ok(((alpha.rdma_things()?, beta.rdma_things()?) == (before.1.clone(), before.2.clone())).then_some(()));
    wait_for(SHORT, "the devices to be as before", idle)
        .with_context(|| format!("before: {before:?}\nnow: {:?} {:?}", alpha.rdma_things(), beta.rdma_things()))?;
    let back = migrate("rover", beta, alpha, &["--link", "rdma", "--no-page-check"])?;
    ensure!(back["page_check"] == true, "the destination still demands it: {back}");
    Ok(())
}

fn rdma_is_chosen_first_where_both_have_it(alpha: &Station<'_>, beta: &Station<'_>) -> Result<()> {
    let report = migrate("rover", alpha, beta, &[])?;
    ensure!(report["link"] == "rdma" && report["link_reason"].as_str().is_some_and(|words| !words.is_empty()), "{report}");
    ensure!(report["links_tried"].as_array().is_some_and(|tried| tried.len() >= 3), "{report}");
    migrate("rover", beta, alpha, &["--link", "tcp"])?;
    Ok(())
}

/// The fabric is cut in mid-round: the guest runs on at the source, and the next migration is whole.
fn a_cut_of_the_fabric_leaves_the_guest_here(alpha: &Station<'_>, beta: &Station<'_>) -> Result<()> {
    let binary = limosa_bin()?.display().to_string();
    let line = format!(
        "{} --run-dir {RUN}/run --key {OPERATOR_KEY} --json migrate rover --to beta --link rdma --bandwidth 2MB/s",
        shell_quoted(&binary)
    );
    let mut moving = alpha.machine.task(&["sh", "-c", &line]).limit(MIGRATION).spawn()?;
    let before = alpha.counter("sent_pkts")?;
    wait_for(SHORT, "pages by RDMA", || Ok((alpha.counter("sent_pkts")? > before + 200).then_some(())))?;
    // RoCE packets alone: the control channel lives, and tells the destination why.
    let drop_roce = "tc qdisc replace dev v0 root handle 1: prio && tc qdisc add dev v0 parent 1:3 netem loss 100% && \
                     tc filter add dev v0 parent 1: protocol ip u32 match ip dport 4791 0xffff flowid 1:3";
    alpha.machine.shell(drop_roce, SHORT)?;
    let ended = moving.wait(MIGRATION)?;
    ensure!(ended.status() == 3, "exit {}: {} {}", ended.status(), ended.text(), ended.errors());
    alpha.verified("rover")?;
    println!("the fabric was cut: {}", tail(&ended.text()));
    alpha.netem("")?;
    let report = migrate("rover", alpha, beta, &["--link", "rdma"]).context("after the cut")?;
    ensure!(report["link"] == "rdma", "{report}");
    migrate("rover", beta, alpha, &["--link", "tcp"])?;
    Ok(())
}
