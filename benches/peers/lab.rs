//! Whole migrations between the two machines of the soft-RoCE lab, over each link, there and back. Absolute figures are an
//! emulator's; compare within the table.

use crate::common::machine::Machine as Description;
use crate::common::record::{Case, Run};
use crate::{Options, Way, sample};
use anyhow::{Context, Result, ensure};
use rig::GuestSpec;
use rig::process::{limosa_bin, wait_for};
use rig::roce::station::{OPERATOR_KEY, operator_in};
use rig::roce::{Machine, Machines, Running, Spec};
use serde_json::Value;
use std::time::Duration;

const SHORT: Duration = Duration::from_secs(60);
const LONG: Duration = Duration::from_secs(300);
const FOLDER: &str = "/run/limosa-bench";

/// How many MiB of a guest's memory are filled with what is not zero.
fn filled(memory_mib: u64) -> u64 {
    memory_mib.saturating_sub(32)
}

fn ways(lanes: u16) -> Vec<Way> {
    let way = |name, link, plaintext, page_check| Way { name, link, lanes, plaintext, touched: true, page_check };
    vec![
        way("rdma, no page check", "rdma", false, Some(false)),
        way("rdma, page check", "rdma", false, Some(true)),
        way("quic", "quic", false, None),
        way("tcp, TLS", "tcp", false, None),
        way("tcp, plaintext", "tcp", true, None),
    ]
}

/// A lab machine with an agent.
struct Station<'a> {
    machine: &'a Machine,
    _agent: Running,
}

impl<'a> Station<'a> {
    fn start(machine: &'a Machine) -> Result<Station<'a>> {
        machine.shell(&format!("ip link add br0 type bridge && ip link set br0 up && mkdir -p {FOLDER}"), SHORT)?;
        let config = format!(
            "[agent]\nname = \"{}\"\nlisten = [\"{}:13560\"]\nstate_dir = \"{FOLDER}/state\"\nrun_dir = \"{FOLDER}/run\"\n\
             [allow]\npeers = [\"10.77.0.0/24\"]\n[rdma]\ntrusted_fabric = [\"10.77.0.0/24\"]\n\
             [migration]\nplaintext_lanes = true\npage_check = false\npopulate = \"before\"\n\
             [[network]]\nname = \"lan\"\nbridge = \"br0\"\n{}",
            machine.name,
            machine.ip,
            operator_in(machine)?.rule("bench")
        );
        machine.write_file(&format!("{FOLDER}/agent.toml"), config.as_bytes())?;
        let line = format!("exec {} agent --config {FOLDER}/agent.toml >{FOLDER}/agent.log 2>&1", limosa_bin()?.display());
        let agent = machine.task(&["sh", "-c", &line]).limit(Duration::from_secs(3 * 3600)).spawn()?;
        let station = Station { machine, _agent: agent };
        wait_for(SHORT, "the agent's first answer", || Ok(station.ask(&["vm", "list"]).ok())).with_context(|| station.log())?;
        Ok(station)
    }

    fn log(&self) -> String {
        let log = self.machine.read_file(&format!("{FOLDER}/agent.log")).unwrap_or_default();
        format!("log of {}:\n{}", self.machine.name, String::from_utf8_lossy(&log))
    }

    fn ask(&self, words: &[&str]) -> Result<Value> {
        let binary = limosa_bin()?.display().to_string();
        let folder = format!("{FOLDER}/run");
        let words = [&[binary.as_str(), "--run-dir", &folder, "--key", OPERATOR_KEY, "--json"], words].concat();
        let text = self.machine.task(&words).limit(LONG).run()?.expect_ok()?.text();
        if text.is_empty() { Ok(Value::Null) } else { Ok(serde_json::from_str(&text)?) }
    }

    fn trust(&self, other: &Station<'_>) -> Result<()> {
        let answer = other.ask(&["host", "id"])?;
        let id = answer["id"].as_str().context("the host's id")?;
        self.ask(&["host", "trust", &other.machine.name, id, &format!("{}:13560", other.machine.ip)]).map(|_| ())
    }

    fn start_guest(&self, spec: &GuestSpec) -> Result<()> {
        let path = format!("{FOLDER}/{}.toml", spec.name);
        self.machine.write_file(&path, spec.text(&rig::guest_images()?.elf).as_bytes())?;
        self.ask(&["vm", "start", &path]).with_context(|| self.log())?;
        let serial = format!("{FOLDER}/state/vm/{}.log", spec.name);
        wait_for(LONG, "the guest's ready line", || {
            let text = self.machine.read_file(&serial).unwrap_or_default();
            Ok(String::from_utf8_lossy(&text).contains("limosa-guest ready").then_some(()))
        })
    }
}

/// A machine's description: the lab's own, read in it.
fn describe(machine: &Machine) -> Result<Description> {
    let read = |line: &str| Ok::<String, anyhow::Error>(machine.shell(line, SHORT)?.text());
    let number = |text: String| text.parse::<u64>().ok();
    Ok(Description {
        kind: "a machine of the lab under QEMU TCG, soft-RoCE: figures compare only with each other".into(),
        cpu: Some(read("sed -n 's/^model name[^:]*: //p' /proc/cpuinfo | head -n 1")?),
        cores: read("nproc")?.parse()?,
        kernel: Some(read("uname -srm")?),
        memory_bytes: number(read("sed -n 's/^MemTotal: *\\([0-9]*\\).*/\\1/p' /proc/meminfo")?).map(|kib| kib << 10),
        congestion_control: Some(read("cat /proc/sys/net/ipv4/tcp_congestion_control")?),
        mtu: read("cat /sys/class/net/v0/mtu")?.parse().ok(),
        huge_pages: None,
        rdma_devices: vec!["rxe0".into()],
        load: crate::common::machine::describe("", "lo").load,
        optimised: !cfg!(debug_assertions),
    })
}

/// Measures every way `options.runs` times each, there and back.
pub(crate) fn measure(options: &Options, run: &mut Run) -> Result<()> {
    eprintln!("booting the lab");
    let machines = Machines::boot(&Spec { limit_seconds: 3 * 3600, ..Spec::new()? })?;
    run.machines.insert("both hosts".into(), describe(machines.alpha())?);
    run.cases = migrations(options, &machines)?;
    run.notes.push(format!(
        "{} MiB of the guest's memory are filled, the rest is zero; `load` is the outer machine's",
        filled(options.memory_mib())
    ));
    run.notes.push("RDMA hardware: not measured".into());
    machines.end()
}

fn migrations(options: &Options, machines: &Machines) -> Result<Vec<Case>> {
    let (alpha, beta) = (Station::start(machines.alpha())?, Station::start(machines.beta())?);
    alpha.trust(&beta)?;
    beta.trust(&alpha)?;
    let memory = options.memory_mib();
    let spec =
        GuestSpec::new("bench", 1).memory(&format!("{memory}M"), &format!("{}M", memory.saturating_sub(64))).dirty("0", "1M");
    alpha.start_guest(&spec)?;
    let ways = ways(options.lanes);
    let mut cases: Vec<Case> = ways.iter().map(Way::case).collect();
    for number in 1..=options.runs {
        eprintln!("run {number} of {}", options.runs);
        for (way, case) in ways.iter().zip(&mut cases) {
            for (from, to) in [(&alpha, &beta), (&beta, &alpha)] {
                let more = way.words();
                let mut words = vec!["migrate", spec.name.as_str(), "--to", &to.machine.name];
                words.extend(more.iter().map(String::as_str));
                let answer = from.ask(&words).with_context(|| format!("{}\n{}\n{}", way.name, from.log(), to.log()))?;
                let report = answer.get("report").unwrap_or(&answer);
                ensure!(report["ok"] == true && report["link"] == way.link, "{}: {report}", way.name);
                ensure!(way.page_check.is_none_or(|check| report["page_check"] == check), "{}: {report}", way.name);
                eprintln!("  {}: {} ms", way.name, report["total_ms"]);
                case.samples.push(sample(report, true)?);
            }
        }
    }
    Ok(cases)
}
