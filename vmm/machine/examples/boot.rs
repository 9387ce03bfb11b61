//! Boots a kernel on a machine and, for each line of input, moves it to a fresh machine in this process. Not the product's VMM.
//!
//! `boot KERNEL INITRAMFS|- MIB VCPUS CMDLINE...`: serial output goes to stdout; it ends when the guest resets or shuts down.

use std::error::Error;
use std::io::{BufRead, Write};
use std::sync::mpsc;
use std::time::{Duration, Instant};

use limosa_machine::{BootConfig, Machine, MachineConfig, MemoryConfig, SerialSink};

fn machine(mib: u64, vcpus: u32) -> Result<Machine, Box<dyn Error>> {
    let sink = SerialSink::Writer(Box::new(std::io::stdout()));
    Ok(Machine::new(MachineConfig { serial: sink, ..MachineConfig::new(vcpus, MemoryConfig::new(mib << 20)) })?)
}

/// Moves a running guest to a new machine.
fn moved(source: Machine, destination: Machine) -> Result<Machine, Box<dyn Error>> {
    let start = Instant::now();
    source.pause()?;
    let paused = start.elapsed();
    let records = source.save()?;
    let saved = start.elapsed();
    for region in source.regions() {
        let mut bytes = vec![0; usize::try_from(region.bytes)?];
        source.read_memory(region.gpa, &mut bytes)?;
        destination.write_memory(region.gpa, &bytes)?;
    }
    let copied = start.elapsed();
    destination.load(records)?;
    destination.resume()?;
    let done = start.elapsed();
    writeln!(std::io::stderr(), "moved: paused {paused:?}, saved {saved:?}, copied {copied:?}, running {done:?}")?;
    Ok(destination)
}

fn main() -> Result<(), Box<dyn Error>> {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let [kernel, initramfs, mib, vcpus, cmdline @ ..] = args.as_slice() else {
        return Err("usage: boot KERNEL INITRAMFS|- MIB VCPUS CMDLINE...".into());
    };
    let (mib, vcpus) = (mib.parse()?, vcpus.parse()?);
    let initramfs = (initramfs != "-").then(|| initramfs.into());
    let mut guest = machine(mib, vcpus)?;
    guest.boot(&BootConfig { kernel: kernel.into(), initramfs, cmdline: cmdline.join(" ") })?;
    guest.resume()?;
    let (sender, lines) = mpsc::channel();
    std::thread::spawn(move || std::io::stdin().lock().lines().map_while(Result::ok).try_for_each(|line| sender.send(line)));
    loop {
        if let Some(event) = guest.events().recv_timeout(Duration::from_millis(50)) {
            writeln!(std::io::stderr(), "{event:?}")?;
            return Ok(());
        }
        if lines.try_recv().is_ok() {
            guest = moved(guest, machine(mib, vcpus)?)?;
        }
    }
}
