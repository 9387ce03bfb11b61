//! A source that is trusted and means harm: real TLS, real lanes, the real protocol, and a device state that is wrong. The destination
//! refuses it each time, its agent and its other guest live, and the next honest migration works. The source is the engine and the link in
//! this very program, on the third machine, with what a real guest's snapshot says of it.
#![allow(clippy::panic, clippy::unwrap_used, clippy::expect_used, clippy::print_stdout, missing_docs, unreachable_pub)]

#[allow(dead_code)]
#[path = "../transport/link/tests/toy/memory.rs"]
mod memory;

use limosa_link::{Cancel, HostError, HostKey, LaneSettings, Pages, SourceHost, TcpLink, TrustedHosts, run_source_over};
use limosa_proto::bitmap::PageSet;
use limosa_proto::commit::JournalRecord;
use limosa_proto::event::{SourceConfig, SourceOutcome};
use limosa_proto::identity::{Generation, HostId, MigrationId};
use limosa_proto::progress::Progress;
use limosa_proto::record::Record;
use limosa_proto::snapshot::{HEAD_BYTES, Piece, Reader, SECTION_BYTES};
use limosa_proto::wire::message::VmDescription;
use memory::ToyMemory;
use rig::{AgentConfig, Context, GuestSpec, Lab, Result, bail, ensure, with_lab};
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::watch;

/// The host of a guest that is nothing but empty memory and the state that it is told to send.
struct Evil {
    memory: Arc<ToyMemory>,
    records: Vec<Record>,
}

impl SourceHost for Evil {
    fn pages(&self) -> Arc<dyn Pages> {
        self.memory.clone()
    }
    fn start_tracking(&mut self) -> Result<(), HostError> {
        Ok(())
    }
    fn fetch_dirty(&mut self) -> Result<PageSet, HostError> {
        Ok(self.memory.take_dirty())
    }
    fn pause(&mut self) -> Result<(), HostError> {
        Ok(())
    }
    fn save(&mut self) -> Result<Vec<Record>, HostError> {
        Ok(self.records.clone())
    }
    fn resume(&mut self) -> Result<(), HostError> {
        Ok(())
    }
    fn stop_tracking(&mut self) -> Result<(), HostError> {
        Ok(())
    }
    fn release(&mut self) -> Result<(), HostError> {
        Ok(())
    }
    fn journal(&mut self, _: &JournalRecord) -> Result<(), HostError> {
        Ok(())
    }
}

/// What a snapshot says of its guest: the description and the device state.
fn saved(file: &Path) -> Result<(VmDescription, Vec<Record>)> {
    let bytes = std::fs::read(file)?;
    let (head, mut rest) = bytes.split_first_chunk::<HEAD_BYTES>().context("no head")?;
    let mut reader = Reader::head(head)?;
    let (mut vm, mut records) = (None, Vec::new());
    while let Some((head, after)) = rest.split_first_chunk::<SECTION_BYTES>() {
        let section = reader.section(head, after.len() as u64)?;
        let (body, after) = after.split_at(section.length);
        match reader.body(section, body)? {
            Piece::Guest(guest) => vm = Some(guest.vm),
            Piece::Record(record) => records.push(record),
            Piece::Pages(..) | Piece::End => {}
        }
        rest = after;
    }
    Ok((vm.context("no guest")?, records))
}

/// Everything that can be wrong with a state, and what it is called.
fn wrong(good: &[Record]) -> Vec<(String, Vec<Record>)> {
    let with = |at: usize, change: &dyn Fn(&mut Record)| {
        let mut all = good.to_vec();
        change(&mut all[at]);
        all
    };
    let mut all: Vec<(String, Vec<Record>)> = vec![("no state at all".into(), Vec::new())];
    for (at, record) in good.iter().enumerate() {
        let name = format!("record {at} of kind {}", record.kind);
        // Each record is harmed in one way, the ways in turn.
        match at % 5 {
            0 => all.push((format!("{name} cut in half"), with(at, &|record| record.bytes.truncate(record.bytes.len() / 2)))),
            1 => all.push((format!("{name} of a later version"), with(at, &|record| record.version += 1))),
            2 => all.push((format!("{name} with bytes behind it"), with(at, &|record| record.bytes.extend([0x55; 64])))),
            3 => all.push((format!("{name} of an unknown kind"), with(at, &|record| record.kind = 0xFFF0))),
            _ => all.push((format!("{name} of another instance"), with(at, &|record| record.instance = u32::MAX))),
        }
        let without: Vec<Record> =
            good.iter().enumerate().filter(|(which, _)| *which != at).map(|(_, one)| one.clone()).collect();
        all.push((format!("{name} left out"), without));
    }
    let twice = [good, &good[..1]].concat();
    all.push(("the first record twice".into(), twice));
    let longest = good.iter().enumerate().max_by_key(|(_, record)| record.bytes.len()).map_or(0, |(at, _)| at);
    all.push(("the longest record all ones".into(), with(longest, &|record| record.bytes.fill(0xFF))));
    all
}

/// One attempt from the third machine.
fn attempt(lab: &Lab, key: &HostKey, to: HostId, vm: &VmDescription, records: Vec<Record>, number: u64) -> Result<SourceOutcome> {
    let memory = ToyMemory::of(vm.memory.clone());
    let address = lab.b.address().to_string();
    let config = SourceConfig { lanes: 1, ..SourceConfig::new(MigrationId([0xE1; 16]), Generation(number), to, vm.clone()) };
    lab.watch.within(move || {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        let link = TcpLink::new(address, to, key.clone(), TrustedHosts::new([to]), Duration::from_secs(10));
        let progress = watch::Sender::new(Progress::new(config.vm.memory.bytes()));
        let host = Box::new(Evil { memory, records });
        let run = run_source_over(Arc::new(link), config, LaneSettings::default(), false, host, Cancel::new(), progress);
        let (outcome, _) = runtime.block_on(async { tokio::time::timeout(Duration::from_secs(60), run).await })?;
        Ok(outcome)
    })
}

#[test]
fn a_wrong_device_state_is_refused_and_harms_nobody() {
    with_lab(AgentConfig::default(), |lab| {
        let (guest, mut other) = (GuestSpec::new("web", 1).memory("64M", "8M"), GuestSpec::new("other", 2));
        other.memory = "64M".into();
        lab.guest(&guest)?;
        lab.b.start_guest(&other)?;
        let file = lab.a.file("web.snapshot");
        let path = file.to_string_lossy().into_owned();
        lab.a.limosa(&["vm", "save", "web", "--to", &path, "--keep-running"])?.expect_code(0)?;
        let (vm, records) = saved(&file)?;
        let key = HostKey::generate()?;
        lab.b.trust_id("evil", &key.id().to_string(), "10.77.0.9:13560")?;
        let (to, agent) = (lab.b.id()?.parse::<HostId>().map_err(|e| rig::Error::msg(e.to_string()))?, lab.b.agent_pid()?);
        let harms = wrong(&records);
        println!("{} records, {} wrong states", records.len(), harms.len());
        for (number, (what, records)) in harms.into_iter().enumerate() {
            lab.b.wait_knows("web", false)?;
            let outcome = attempt(lab, &key, to, &vm, records, number as u64 + 1).with_context(|| what.clone())?;
            match &outcome {
                SourceOutcome::Aborted { words, code, .. } => println!("{what}: {code}: {words}"),
                SourceOutcome::Refused(refusal) => println!("{what}: refused: {}", refusal.words()),
                other => bail!("{what}: {other:?}"),
            }
            ensure!(lab.b.agent_pid()? == agent && rig::process::alive(agent), "{what}: the agent has ended");
        }
        lab.b.wait_knows("web", false)?;
        lab.b.guest_lives("other")?;
        ensure!(lab.b.guests()? == ["other"], "{:?}", lab.b.guests()?);
        lab.settled(&lab.b, 1)?;
        lab.b.limosa(&["vm", "stop", "other"])?.expect_code(0)?;
        lab.settled(&lab.b, 0)?;
        lab.unharmed(&guest)
    });
}
