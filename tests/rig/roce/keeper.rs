//! The keeper: the one process that makes a lab, holds it, and takes it away whatever happens to those who asked for it.
//!
//! It is started with its standard input as a leash: when the leash's other end is gone (a test that panicked, a terminal
//! that was closed, `kill -9`), the lab ends. If the keeper itself is killed, the machines die with it (the kernel sees to
//! that), and the next lab removes the empty namespace. It speaks one JSON line per event on standard output.

use crate::command::{read_text, tail};
use crate::netns::{self, Netns};
use crate::process::{self, Process};
use crate::roce::kernel::{self, Kernel};
use crate::roce::machine::Machine;
use crate::roce::{CPU_MODEL, Spec, shell_quoted};
use anyhow::{Context, Result, bail, ensure};
use nix::sys::signal::{SigSet, Signal};
use serde::{Deserialize, Serialize};
use std::fs::{self, File};
use std::io::{BufRead, Write};
use std::net::{Ipv4Addr, Ipv6Addr};
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::sync::mpsc::{self, Receiver, RecvTimeoutError};
use std::time::{Duration, Instant, SystemTime};

/// The bridge that joins the machines, in the lab's namespace.
pub const SWITCH: &str = "sw0";
/// The addresses of the outer machine on the lab's Ethernet, in the lab's namespace: a third machine that watches.
pub const WATCHER: &str = "10.77.0.9/24";
/// The bridge that joins the machines' bridges for guests: another Ethernet, so that nothing on it touches the RDMA devices.
pub const GUEST_SWITCH: &str = "sw1";
/// The addresses of the outer machine among the guests.
pub const GUEST_WATCHERS: [&str; 2] = ["10.78.0.9/24", "fd78::9/64"];
/// How long two machines may take to come up on a busy machine.
const BOOT_LIMIT: Duration = Duration::from_secs(180);
/// How many folders of failed labs are kept.
const KEPT_FOLDERS: usize = 5;

/// What the keeper says.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Event {
    /// What it does now.
    Step(String),
    /// The lab is up.
    Ready(Ready),
    /// The lab could not be made; why. The keeper ends.
    Failed(String),
}

/// A lab that is up.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Ready {
    /// The keeper's process id.
    pub keeper: u32,
    /// The lab's name, which is its namespace's too.
    pub name: String,
    /// The folder with the consoles.
    pub folder: PathBuf,
    /// The two machines, alpha first.
    pub machines: Vec<Machine>,
    /// When it came up, in seconds since 1970.
    pub since: u64,
    /// The seconds after which it ends by itself.
    pub limit_seconds: u64,
    /// What the machines' own set-up complained of.
    pub problems: Vec<String>,
}

/// As much of [`Ready`] as ends a lab, also one that another build of this program made.
#[derive(Debug, Clone, Deserialize)]
pub struct Held {
    /// The keeper's process id.
    pub keeper: u32,
    /// The lab's name.
    pub name: String,
}

impl Held {
    /// What a register says; nothing when there is none.
    pub fn read(register: &Path) -> Option<Held> {
        serde_json::from_slice(&fs::read(register).ok()?).ok()
    }

    /// Whether the lab is there. A process id is used again after a time; the namespace bears the keeper's, so both must be.
    pub fn is_up(&self) -> bool {
        process::alive(self.keeper) && netns::named(&self.name).contains(&self.name)
    }
}

/// What the keeper is told: by its leash, one word a line, or by signals.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Word {
    /// The leash's end may go: the lab stays until `lab down`, or the limit.
    Stay,
    /// Whatever happens, keep the logs.
    KeepLogs,
    /// The leash's other end is gone.
    Gone,
    /// A signal asks for the end.
    End,
}

/// Makes and holds a lab; returns when it is gone.
///
/// # Errors
/// Standard input does not begin with a [`Spec`]. Everything else is said by [`Event::Failed`].
pub fn keep() -> Result<()> {
    let mut first = String::new();
    std::io::stdin().read_line(&mut first).context("the lab's specification")?;
    let spec: Spec = serde_json::from_str(&first).context("the lab's specification")?;
    let words = listen()?;
    let mut keeper = Keeper { words, stays: false, keeps_logs: false, ended: false, spec };
    netns::sweep();
    let name = netns::unique_name();
    let folder = keeper.spec.folder.join(&name);
    match keeper.hold(&name, &folder) {
        Ok(()) if !keeper.keeps_logs => {}
        Ok(()) => return Ok(()),
        // Who ended it wants no logs of a half-made lab.
        Err(error) if keeper.ended => say(&Event::Failed(format!("{error:#}"))),
        Err(error) => {
            say(&Event::Failed(format!("{error:#}\n(logs: {})", folder.display())));
            return Ok(());
        }
    }
    fs::remove_dir_all(&folder).with_context(|| format!("removing {}", folder.display()))
}

/// Says something to whoever started the keeper; that nobody listens any more is no error.
fn say(event: &Event) {
    if let Ok(mut line) = serde_json::to_vec(event) {
        line.push(b'\n');
        let mut out = std::io::stdout().lock();
        let _ = out.write_all(&line).and_then(|()| out.flush());
    }
}

fn listen() -> Result<Receiver<Word>> {
    let (tell, words) = mpsc::channel();
    let signals = SigSet::from_iter([Signal::SIGTERM, Signal::SIGINT, Signal::SIGHUP]);
    // Every thread made from here on has them blocked; one waits for them.
    signals.thread_block().context("blocking signals")?;
    let by_signal = tell.clone();
    std::thread::spawn(move || {
        let _ = signals.wait();
        let _ = by_signal.send(Word::End);
    });
    std::thread::spawn(move || {
        for line in std::io::stdin().lock().lines().map_while(Result::ok) {
            let word = match line.trim() {
                "stay" => Word::Stay,
                "keep logs" => Word::KeepLogs,
                _ => continue,
            };
            let _ = tell.send(word);
        }
        let _ = tell.send(Word::Gone);
    });
    Ok(words)
}

struct Keeper {
    words: Receiver<Word>,
    stays: bool,
    keeps_logs: bool,
    /// It was told to end.
    ended: bool,
    spec: Spec,
}

/// One machine as the keeper has it.
struct Kept {
    machine: Machine,
    qemu: Process,
    log: PathBuf,
}

impl Keeper {
    /// Waits so long, or until it is told something; whether the lab goes on.
    fn pause(&mut self, time: Duration) -> bool {
        match self.words.recv_timeout(time) {
            Ok(Word::Stay) => self.stays = true,
            Ok(Word::KeepLogs) => self.keeps_logs = true,
            Ok(Word::Gone) => self.ended |= !self.stays,
            Ok(Word::End) | Err(RecvTimeoutError::Disconnected) => self.ended = true,
            Err(RecvTimeoutError::Timeout) => {}
        }
        !self.ended
    }

    fn hold(&mut self, name: &str, folder: &Path) -> Result<()> {
        forget_old_folders(&self.spec.folder);
        fs::create_dir_all(folder).with_context(|| format!("the lab's folder {}", folder.display()))?;
        let kernel = self.kernel()?;
        let netns = Netns::create(name)?;
        let first = kernel::write_initramfs(&kernel, folder, include_str!("first.sh"), &second_script(&kernel)?)?;
        switch(&netns)?;
        let mut kept = Vec::new();
        for (number, host) in (1u8..).zip(["alpha", "beta"]) {
            kept.push(self.start(&netns, &kernel, &first, folder, number, host)?);
        }
        say(&Event::Step("switch made, two machines started".to_owned()));
        let mut problems = Vec::new();
        for kept in &mut kept {
            problems.extend(self.wait_up(kept)?);
            say(&Event::Step(format!("{} is up", kept.machine.name)));
        }
        let _ = fs::remove_file(&first);
        let since = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH)?.as_secs();
        let machines = kept.iter().map(|kept| kept.machine.clone()).collect();
        let ready = Ready {
            keeper: std::process::id(),
            name: name.to_owned(),
            folder: folder.to_owned(),
            machines,
            since,
            limit_seconds: self.spec.limit_seconds,
            problems,
        };
        if let Some(register) = &self.spec.register {
            fs::write(register, serde_json::to_vec(&ready)?)
                .with_context(|| format!("noting the lab in {}", register.display()))?;
        }
        say(&Event::Ready(ready));
        self.stay(&mut kept);
        // Unless another lab has been noted there meanwhile.
        let ours = |path: &&PathBuf| Held::read(path).is_some_and(|held| held.keeper == std::process::id());
        if let Some(register) = self.spec.register.as_ref().filter(ours) {
            let _ = fs::remove_file(register);
        }
        // The machines first: the namespace's end is quick when nobody is in it.
        drop(kept);
        drop(netns);
        Ok(())
    }

    /// The kernel; on the way to it this process still listens.
    fn kernel(&mut self) -> Result<Kernel> {
        let getting = std::thread::spawn(|| kernel::prepare(|text| say(&Event::Step(text.to_owned()))));
        while !getting.is_finished() {
            // What the thread has started dies with it, and it with this process.
            ensure!(self.pause(Duration::from_millis(20)), "the lab was ended while its kernel was being fetched");
        }
        let Ok(kernel) = getting.join() else { bail!("the thread that gets the kernel panicked") };
        let kernel = kernel?;
        let origin = if kernel.cached { "from the cache" } else { "fetched and unpacked" };
        say(&Event::Step(format!("kernel {} ({origin})", kernel.release)));
        Ok(kernel)
    }

    /// Holds the lab until it shall end, its time is over, or no machine is left. A test may well crash one.
    fn stay(&mut self, kept: &mut [Kept]) {
        let until = Instant::now() + Duration::from_secs(self.spec.limit_seconds);
        while self.pause(Duration::from_millis(200)) {
            let alive = kept.iter_mut().any(|kept| matches!(kept.qemu.ended(), Ok(None)));
            if !alive || Instant::now() > until {
                self.keeps_logs = true;
                break;
            }
        }
        // The leash says "keep logs" and then ends: what was said before the end counts.
        while let Ok(word) = self.words.try_recv() {
            self.keeps_logs |= word == Word::KeepLogs;
        }
    }

    /// Starts one QEMU in the lab's namespace. It dies with this process, however this one dies.
    fn start(&self, netns: &Netns, kernel: &Kernel, first: &Path, folder: &Path, number: u8, host: &str) -> Result<Kept> {
        let mut machine = Machine {
            name: host.to_owned(),
            ip: Ipv4Addr::new(10, 77, 0, number),
            ip6: Ipv6Addr::new(0xfd77, 0, 0, 0, 0, 0, 0, u16::from(number)),
            mac: format!("52:54:00:77:00:{number:02x}"),
            port: format!("p-{host}"),
            guest_port: format!("g-{host}"),
            console: folder.join(format!("{host}.console")),
            qemu: 0,
            netns: netns.name().to_owned(),
            control: Ipv4Addr::new(169, 254, number, 2),
        };
        let control_mac = format!("52:54:00:78:00:{number:02x}");
        let control_port = format!("c-{host}");
        let guest_mac = format!("52:54:00:79:00:{number:02x}");
        tap(netns, &machine.port, 9000)?;
        netns.ip(&format!("link set {} master {SWITCH}", machine.port))?;
        tap(netns, &control_port, 1500)?;
        tap(netns, &machine.guest_port, 1500)?;
        netns.ip(&format!("link set {} master {GUEST_SWITCH}", machine.guest_port))?;
        netns.ip(&format!("addr add 169.254.{number}.1/30 dev {control_port}"))?;
        let words = format!(
            "console=ttyS0 loglevel=4 panic=-1 mitigations=off random.trust_cpu=on lab.host={host} lab.ip={} lab.ip6={} \
             lab.mac={} lab.control_mac={control_mac} lab.control={} lab.guest_mac={guest_mac}",
            machine.ip, machine.ip6, machine.mac, machine.control
        );
        let (cpus, memory) = (self.spec.cpus.to_string(), self.spec.memory_mib);
        let cpu = self.spec.cpu_models.get(usize::from(number) - 1).map_or(CPU_MODEL, String::as_str);
        let mut command = netns.command("setpriv");
        command.args(["--pdeathsig", "KILL", "--", "qemu-system-x86_64", "-nodefaults", "-no-user-config", "-display", "none"]);
        command.args(["-machine", "q35,memory-backend=ram", "-accel", "tcg,thread=multi", "-cpu", cpu, "-smp", &cpus]);
        command.args(["-m", &format!("{memory}M"), "-object", &format!("memory-backend-memfd,id=ram,size={memory}M,share=on")]);
        command.arg("-kernel").arg(&kernel.image).arg("-initrd").arg(first).args(["-append", &words, "-no-reboot"]);
        command.args(["-serial", &format!("file:{}", machine.console.display())]);
        command.args(["-fsdev", "local,id=root,path=/,security_model=none,readonly=on,multidevs=remap"]);
        command.args(["-device", "virtio-9p-pci,fsdev=root,mount_tag=root"]);
        let fabric = ",host_mtu=9000,speed=10000,duplex=full";
        let cards =
            [(&machine.port, &machine.mac, fabric), (&control_port, &control_mac, ""), (&machine.guest_port, &guest_mac, "")];
        for (port, mac, more) in cards {
            command.args(["-netdev", &format!("tap,id={port},ifname={port},script=no,downscript=no")]);
            command.args(["-device", &format!("virtio-net-pci,netdev={port},mac={mac},romfile={more}")]);
        }
        let log = folder.join(format!("{host}.qemu"));
        let file = File::create(&log)?;
        command.stdout(Stdio::null()).stderr(file);
        let qemu = Process::start("qemu-system-x86_64 of the lab", &mut command)?;
        machine.qemu = qemu.pid();
        Ok(Kept { machine, qemu, log })
    }

    /// Waits until a machine takes commands; what its set-up complained of.
    fn wait_up(&mut self, kept: &mut Kept) -> Result<Vec<String>> {
        let start = Instant::now();
        let name = kept.machine.name.clone();
        loop {
            if !self.pause(Duration::from_millis(50)) {
                bail!("the lab was ended while {name} was coming up");
            }
            let said = || {
                let console = read_text(&kept.machine.console);
                let own: Vec<&str> = console.lines().filter(|line| line.starts_with("lab: ")).collect();
                format!("it said:\n{}\n{}\nQEMU said: {}", own.join("\n"), tail(&console, 15), read_text(&kept.log))
            };
            if let Some(status) = kept.qemu.ended()? {
                bail!("{name} ended ({status}) instead of coming up; {}", said());
            }
            if start.elapsed() > BOOT_LIMIT {
                bail!("{name} is not up after {} s; {}", BOOT_LIMIT.as_secs(), said());
            }
            // Before that line an attempt to connect would wait for an answer that nobody gives.
            if !read_text(&kept.machine.console).contains("lab: ready") {
                continue;
            }
            if let Ok(output) = kept.machine.run(&["sh", "-c", "cat /run/lab/problems || true"], Duration::from_secs(20)) {
                return Ok(output.text().lines().map(|line| format!("{name}: {line}")).collect());
            }
        }
    }
}

/// The second script with this lab's paths.
fn second_script(kernel: &Kernel) -> Result<String> {
    let agent = std::env::current_exe().context("this program's own path")?;
    let target = agent.parent().and_then(Path::parent).context("this program lies in target/PROFILE")?;
    let quoted = |path: &Path| shell_quoted(&path.display().to_string());
    let folders = format!("{} {}", shell_quoted(env!("CARGO_MANIFEST_DIR")), quoted(target));
    let text = include_str!("second.sh").replace("@KERNEL_ROOT@", &quoted(&kernel.root)).replace("@FOLDERS@", &folders);
    Ok(text.replace("@RELEASE@", &kernel.release).replace("@AGENT@", &quoted(&agent)))
}

/// The shared Ethernet, and the outer machine as a third one on it.
fn switch(netns: &Netns) -> Result<()> {
    netns.ip(&format!("link add {SWITCH} type bridge stp_state 0 forward_delay 0 mcast_snooping 0"))?;
    netns.ip(&format!("link set {SWITCH} address 02:00:00:77:00:0c mtu 9000 up"))?;
    netns.ip(&format!("addr add {WATCHER} dev {SWITCH}"))?;
    netns.ip(&format!("link add {GUEST_SWITCH} type bridge stp_state 0 forward_delay 0 mcast_snooping 0"))?;
    netns.ip(&format!("link set {GUEST_SWITCH} address 02:00:00:78:00:0c up"))?;
    for address in GUEST_WATCHERS {
        netns.ip(&format!("addr add {address} dev {GUEST_SWITCH}{}", if address.contains(':') { " nodad" } else { "" }))?;
    }
    Ok(())
}

fn tap(netns: &Netns, name: &str, mtu: u32) -> Result<()> {
    netns.ip(&format!("tuntap add {name} mode tap vnet_hdr"))?;
    netns.ip(&format!("link set {name} mtu {mtu} up"))?;
    Ok(())
}

/// Removes the folders of labs that are gone, the newest few apart: somebody may still want to read those.
fn forget_old_folders(parent: &Path) {
    let entries = fs::read_dir(parent).into_iter().flatten().flatten();
    let mut old: Vec<(SystemTime, PathBuf)> = entries
        .filter(|entry| {
            let name = entry.file_name().to_string_lossy().into_owned();
            let pid = name.strip_prefix(netns::PREFIX).and_then(|rest| rest.split('-').next()?.parse::<u32>().ok());
            pid.is_some_and(|pid| !process::alive(pid))
        })
        .filter_map(|entry| Some((entry.metadata().ok()?.modified().ok()?, entry.path())))
        .collect();
    old.sort();
    let surplus = old.len().saturating_sub(KEPT_FOLDERS);
    for (_, path) in old.into_iter().take(surplus) {
        let _ = fs::remove_dir_all(path);
    }
}
