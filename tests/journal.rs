//! Journals that cannot be trusted or written: of another version, torn, damaged, on a full or read-only disk. The agent says so
//! with the file and what to do, begins nothing and lets nothing in that it could not write down, and never guesses.
#![allow(clippy::panic, clippy::unwrap_used, clippy::expect_used, missing_docs, unreachable_pub)]

use rig::netns::run;
use rig::{AgentConfig, Context, GuestSpec, Lab, Result, ensure, with_bare_lab, with_lab};
use std::path::{Path, PathBuf};

/// Starts the first host's agent, which must end by itself with this code; what it said.
fn ends(lab: &mut Lab, code: i32) -> Result<String> {
    let log = lab.a.agent_log().len();
    lab.a.launch_agent(lab.a.agent_config())?;
    let status = lab.a.wait_agent_ended()?;
    let said = lab.a.agent_log().get(log..).unwrap_or_default().to_owned();
    ensure!(status.code() == Some(code), "{status}: {said}");
    Ok(said)
}

#[test]
fn a_journal_that_cannot_be_understood_stops_the_agent_in_words() {
    with_lab(AgentConfig::default(), |lab| {
        let guest = GuestSpec::new("web", 1).memory("64M", "8M");
        lab.guest(&guest)?;
        lab.a.migrate_well("web", &lab.b, &[])?;
        lab.b.migrate_well("web", &lab.a, &[])?;
        lab.guest_is_on(&guest, &lab.a, &lab.b)?;
        ensure!(lab.a.stop_agent()?.code() == Some(0));
        let file = lab.a.state_dir().join("journal");
        let good = std::fs::read(&file)?;
        let lines: Vec<&[u8]> = good.split_inclusive(|byte| *byte == b'\n').collect();
        ensure!(lines.len() > 4, "{} lines", lines.len());
        let mut flipped = good.clone();
        flipped[lines[0].len() + 30] ^= 1;
        let version = "{\"limosa_journal\":2}";
        let other = format!("{:08x} {version}\n", crc32(version.as_bytes()));
        let other = [other.as_bytes(), &good[lines[0].len()..]].concat();
        for (bytes, words) in [
            (&flipped, "its checksum is wrong"),
            (&other, "its format is 2, this agent knows 1"),
            (&b"something else\n".to_vec(), "no line of it is a journal's"),
        ] {
            std::fs::write(&file, bytes)?;
            let said = ends(lab, 1)?;
            ensure!(said.contains(words) && said.contains(&file.display().to_string()) && said.contains("restore"), "{said}");
            ensure!(std::fs::read(&file)? == *bytes, "the file was changed");
            lab.a.guest_lives("web").context("the guest goes on without its agent")?;
        }
        // Cut in the middle of its last line, as a crash leaves it: said, and gone on.
        std::fs::write(&file, &good[..good.len() - 5])?;
        let log = lab.a.agent_log().len();
        lab.a.restart_agent()?;
        let said = lab.a.agent_log().get(log..).unwrap_or_default().to_owned();
        ensure!(said.contains("torn by a crash") && said.contains(&file.display().to_string()), "{said}");
        lab.a.wait_knows("web", true)?;
        lab.unharmed(&guest)
    });
}

/// CRC-32 (IEEE), bit by bit: the journal's own is not ours to call.
fn crc32(bytes: &[u8]) -> u32 {
    let step = |crc: u32| if crc & 1 == 1 { crc >> 1 ^ 0xedb8_8320 } else { crc >> 1 };
    !bytes.iter().fold(!0, |crc, byte| (0..8).fold(crc ^ u32::from(*byte), |crc, _| step(crc)))
}

/// A small file system at a host's state folder, unmounted when dropped.
struct Small(PathBuf);

impl Small {
    fn at(folder: &Path) -> Result<Small> {
        std::fs::create_dir_all(folder)?;
        run("mount", &["-t", "tmpfs", "-o", "size=4m", "limosa-test", &folder.display().to_string()])?;
        Ok(Small(folder.to_owned()))
    }

    fn remount(&self, how: &str) -> Result<()> {
        run("mount", &["-o", &format!("remount,{how}"), &self.0.display().to_string()]).map(drop)
    }

    /// Leaves no byte free.
    fn fill(&self) -> Result<PathBuf> {
        use std::io::Write as _;
        let path = self.0.join("filler");
        let mut file = std::fs::File::create(&path)?;
        for size in [1 << 20, 1 << 16, 1 << 12] {
            while file.write_all(&vec![1; size]).is_ok() {}
        }
        Ok(path)
    }
}

impl Drop for Small {
    fn drop(&mut self) {
        let _ = run("umount", &["-l", &self.0.display().to_string()]);
    }
}

/// In both directions nothing is begun that could not be written down; the guest goes on at the first host.
fn nothing_is_begun(lab: &Lab, why: &str, sick_is_source: bool) -> Result<()> {
    let jobs = lab.a.jobs()?.len();
    let output = lab.a.migrate("web", &lab.b, &[])?.expect_code(1)?;
    ensure!(output.all().contains(why) && output.all().contains("journal"), "{output:?}");
    if sick_is_source {
        ensure!(lab.a.jobs()?.len() == jobs, "a job was begun");
    }
    lab.settled(&lab.b, 0)
}

fn on_a_sick_disk(sick_is_source: bool) {
    with_bare_lab(|lab| {
        let sick = if sick_is_source { lab.a.state_dir() } else { lab.b.state_dir() };
        let small = Small::at(&sick)?;
        let result = (|| {
            lab.start_agents(AgentConfig::default())?;
            let guest = GuestSpec::new("web", 1).memory("64M", "8M");
            lab.guest(&guest)?;
            let filler = small.fill()?;
            nothing_is_begun(lab, "disk is full", sick_is_source)?;
            // The guest's serial line is on that disk too: room again before it is looked at.
            std::fs::remove_file(filler)?;
            lab.a.guest_lives("web").context("a full disk harms no guest")?;
            lab.unharmed(&guest)?;
            for guest in lab.b.guests()? {
                lab.b.limosa(&["vm", "stop", &guest])?.expect_code(0)?;
            }
            // An agent that finds its journal on a read-only disk does not start.
            if sick_is_source {
                ensure!(lab.a.stop_agent()?.code() == Some(0));
                small.remount("ro")?;
                let said = ends(lab, 1)?;
                ensure!(said.contains("journal") && said.contains("read-only"), "{said}");
                small.remount("rw")?;
                lab.a.restart_agent()?;
            }
            Ok(())
        })();
        // Agents hold files there.
        for host in [&mut lab.a, &mut lab.b] {
            if host.agent_pid().is_ok() {
                host.stop_agent()?;
            }
        }
        drop(small);
        result
    });
}

#[test]
fn a_source_that_cannot_write_begins_nothing() {
    on_a_sick_disk(true);
}

#[test]
fn a_destination_that_cannot_write_lets_nothing_in() {
    on_a_sick_disk(false);
}
