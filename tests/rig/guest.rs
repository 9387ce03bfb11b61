//! The tiny guest of `tests/guest` as a host sees it: building it, its report page, its serial lines, and the proof
//! that its memory is what it last wrote. Not a VMM: who runs the guest passes in the bytes.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail, ensure};

/// Guest physical address of the report page.
pub const REPORT_GPA: u64 = 0x1f_0000;
/// Bytes of the report page, and of every other page here.
pub const PAGE_BYTES: usize = 4096;
/// First byte of the working set.
pub const WORKING_SET_GPA: u64 = 0x100_0000;

const MAGIC: &[u8; 8] = b"LIMOSAG1";
const VERSION: u32 = 1;
const SLOT_BYTES: usize = 512;
const PAGE_U64: u64 = PAGE_BYTES as u64;
/// The tag of page `n` is `n * TAG_STEP`, as in main.c.
const TAG_STEP: u32 = 0x9e37_79b1;
/// `x -> 5x + STRIDE` is the order of random writes, as in main.c.
const STRIDE: u64 = 40_503;
/// No more than the 44 bits of pages a host could have; a report that claims more is not believed.
const PAGES_MAX: u64 = 1 << 32;
/// Offsets in bytes of the words of a page that hold its tag.
const TAG_OFFSETS: [usize; 3] = [4, 0x800, 0xffc];

/// The files that [`build`] makes.
#[derive(Debug, Clone)]
pub struct GuestImages {
    /// PVH: 64-bit ELF with a `PHYS32_ENTRY` note.
    pub elf: PathBuf,
    /// The same program with a Linux setup header.
    pub bzimage: PathBuf,
}

/// Builds the guest into `outdir` (made if absent) by `tests/guest/build.sh`.
///
/// # Errors
/// gcc or binutils are absent or fail; their words are in the error.
pub fn build(outdir: &Path) -> Result<GuestImages> {
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/guest/build.sh");
    let output =
        Command::new("sh").arg(&script).arg(outdir).output().with_context(|| format!("cannot run sh {}", script.display()))?;
    ensure!(
        output.status.success(),
        "{} failed ({}): {}",
        script.display(),
        output.status,
        String::from_utf8_lossy(&output.stderr)
    );
    Ok(GuestImages { elf: outdir.join("limosa-guest.elf"), bzimage: outdir.join("limosa-guest.bzimage") })
}

/// What the guest is doing.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum GuestState {
    /// Reading its command line, calibrating, looking for its network.
    Booting,
    /// Touching the memory that `fill=` and `ws=` ask for.
    Filling,
    /// At work.
    Running,
    /// It gave up, the serial line says why. Errors in memory do not lead here.
    Failed,
}

/// A mismatch that the guest found in its own memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct BadPage {
    /// Address of the word, or of the page for a counter.
    pub gpa: u64,
    /// What the guest's books say.
    pub expected: u32,
    /// What was there.
    pub actual: u32,
}

/// A run of guest pages.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct GuestRange {
    /// Address of the first page.
    pub gpa: u64,
    /// Pages of 4 KiB.
    pub pages: u64,
}

/// The report page, one consistent copy of it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct GuestReport {
    /// How often the guest has published; the slot to read is its lowest bit.
    pub sequence: u32,
    /// What the guest is doing.
    pub state: GuestState,
    /// Mismatches found.
    pub errors: u32,
    /// The first of them.
    pub first_bad: Option<BadPage>,
    /// Heartbeats sent.
    pub heartbeats: u64,
    /// Largest time between two turns of the main loop, by the guest's TSC.
    pub gap_us_max: u64,
    /// Pages of the working set written since the start.
    pub pages_written: u64,
    /// What the counters of the working set add up to: `pages_written` + its pages.
    pub counters_sum: u64,
    /// Complete passes of writing over the working set.
    pub passes: u64,
    /// Complete checks of the working set.
    pub passes_verified: u64,
    /// Pages already written in the pass under way.
    pub position: u32,
    /// So many pages may have been written since this was published, at most.
    pub batch_pages: u32,
    /// Ethernet frames received.
    pub rx_packets: u64,
    /// Ethernet frames sent.
    pub tx_packets: u64,
    /// The working set.
    pub working_set: GuestRange,
    /// Filled pages below 4 GiB.
    pub fill_low: GuestRange,
    /// Filled pages above 4 GiB.
    pub fill_high: GuestRange,
    /// Since calibration.
    pub uptime_us: u64,
    /// kvmclock as last read, 0 without one.
    pub kvmclock_ns: u64,
    /// As calibrated.
    pub tsc_khz: u32,
    /// How often the TSC or kvmclock was seen to go back.
    pub clock_backwards: u32,
    /// Writes go through the working set in order, not pseudo-randomly.
    pub sequential: bool,
    /// The guest's address; 0.0.0.0 without one.
    pub ip: std::net::Ipv4Addr,
    /// The NIC's address, if there is a NIC.
    pub mac: Option<[u8; 6]>,
}

/// What [`GuestReport::check_memory`] saw.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct MemoryCheck {
    /// Pages read and found right.
    pub pages: u64,
    /// The sum of the working set's counters.
    pub counters_sum: u64,
    /// Pages written after the report was last published.
    pub in_flight: u32,
}

impl GuestReport {
    /// Reads the report from the page at [`REPORT_GPA`], `page` being its 4,096 bytes.
    ///
    /// The guest fills the slot that is not current and then flips the sequence, so a page taken while the guest is paused
    /// is always whole. Of a running guest: take the page, and take it again until two copies have the same sequence.
    ///
    /// # Errors
    /// Too short, no guest (magic), another version, or figures that cannot be.
    pub fn parse(page: &[u8]) -> Result<Self> {
        ensure!(page.len() >= PAGE_BYTES, "the report page is {} bytes, expected {PAGE_BYTES}", page.len());
        ensure!(page.starts_with(MAGIC), "no limosa-guest report at {REPORT_GPA:#x}: its magic is absent");
        let header = Fields(page);
        ensure!(header.u32(8)? == VERSION, "the report has version {}, expected {VERSION}", header.u32(8)?);
        let sequence = header.u32(12)?;
        let at = if sequence & 1 == 1 { 2 * SLOT_BYTES } else { SLOT_BYTES };
        let slot = Fields(page.get(at..at + SLOT_BYTES).context("no slot")?);
        let errors = slot.u32(4)?;
        let mut mac = [0; 6];
        mac.copy_from_slice(slot.0.get(176..182).context("no MAC")?);
        let report = Self {
            sequence,
            state: match slot.u32(0)? {
                1 => GuestState::Booting,
                2 => GuestState::Filling,
                3 => GuestState::Running,
                4 => GuestState::Failed,
                other => bail!("the report has the unknown state {other}"),
            },
            errors,
            first_bad: (errors > 0).then_some(BadPage { gpa: slot.u64(64)?, expected: slot.u32(72)?, actual: slot.u32(76)? }),
            heartbeats: slot.u64(8)?,
            gap_us_max: slot.u64(16)?,
            pages_written: slot.u64(24)?,
            counters_sum: slot.u64(32)?,
            passes: slot.u64(40)?,
            passes_verified: slot.u64(48)?,
            position: slot.u32(56)?,
            batch_pages: slot.u32(60)?,
            rx_packets: slot.u64(80)?,
            tx_packets: slot.u64(88)?,
            working_set: slot.range(96)?,
            fill_low: slot.range(112)?,
            fill_high: slot.range(128)?,
            uptime_us: slot.u64(144)?,
            kvmclock_ns: slot.u64(152)?,
            tsc_khz: slot.u32(160)?,
            clock_backwards: slot.u32(164)?,
            sequential: slot.u32(168)? != 0,
            ip: slot.u32(172)?.into(),
            mac: (slot.0.get(182) == Some(&1)).then_some(mac),
        };
        ensure!(
            report.working_set.pages == 0 || u64::from(report.position) < report.working_set.pages,
            "the report's position {} is outside of the working set of {} pages",
            report.position,
            report.working_set.pages
        );
        Ok(report)
    }

    /// Proves that the memory of a paused guest, read by `read(gpa, page)`, is what the guest wrote last: every page of the
    /// working set has its tag and the very counter that the order of writes gives it, and every filled page is untouched.
    /// Only the last write, of those made since the report was published, cannot be told from one not made yet: the guest
    /// itself, which knows, finds that page when it comes to it.
    ///
    /// # Errors
    /// The guest is not running, `read` fails, or a page is lost, stale or in the wrong place: the first such is named.
    pub fn check_memory(&self, mut read: impl FnMut(u64, &mut [u8]) -> Result<()>) -> Result<MemoryCheck> {
        ensure!(self.state == GuestState::Running, "the guest is {:?}: its memory cannot be checked", self.state);
        let mut check = MemoryCheck { pages: 0, counters_sum: 0, in_flight: 0 };
        for range in [self.fill_low, self.fill_high] {
            for page in 0..range.pages {
                let gpa = range.gpa + page * PAGE_U64;
                let counter = checked_counter(gpa, &mut read)?;
                ensure!(counter == 1, "filled page {gpa:#x} has counter {counter}, expected 1");
                check.pages += 1;
            }
        }
        let before = u32::try_from(self.passes & 0xffff_ffff)?.wrapping_add(1);
        let after = before.wrapping_add(1);
        let (known, limit) = (u64::from(self.position), u64::from(self.position) + u64::from(self.batch_pages));
        let mut still_writing = true;
        for (order, page) in self.write_order().enumerate() {
            let (order, gpa) = (u64::try_from(order)?, self.working_set.gpa + page * PAGE_U64);
            let counter = checked_counter(gpa, &mut read)?;
            if order < known {
                ensure!(counter == after, "page {gpa:#x} has counter {counter}, expected {after} (write {order} of the pass)");
            } else if counter == after && still_writing && order < limit {
                check.in_flight += 1;
            } else {
                still_writing = false;
                ensure!(counter == before, "page {gpa:#x} has counter {counter}, expected {before} (write {order} of the pass)");
            }
            check.pages += 1;
            check.counters_sum = check.counters_sum.wrapping_add(u64::from(counter));
        }
        let expected = self.counters_sum.wrapping_add(u64::from(check.in_flight));
        ensure!(check.counters_sum == expected, "the counters add up to {}, expected {expected}", check.counters_sum);
        Ok(check)
    }

    /// The pages of the working set, counted from its first, in the order in which a pass writes them: chunks whose sizes
    /// are the powers of two that its size is made of, largest first, each by `x -> 5x + STRIDE` (or `x + 1`).
    fn write_order(&self) -> impl Iterator<Item = u64> + use<> {
        let (pages, sequential) = (self.working_set.pages, self.sequential);
        let bits = (0..u64::BITS).rev().map(|bit| 1_u64 << bit).filter(move |bit| pages & bit != 0);
        bits.scan(0_u64, |done, chunk| {
            let start = *done;
            *done += chunk;
            Some((start, chunk))
        })
        .flat_map(move |(start, chunk)| {
            (0..chunk).scan(0_u64, move |x, _| {
                *x = if sequential { *x + 1 } else { 5 * *x + STRIDE } & (chunk - 1);
                Some(start + *x)
            })
        })
    }
}

/// Reads the page at `gpa`, checks its tags and returns its counter.
fn checked_counter(gpa: u64, read: &mut impl FnMut(u64, &mut [u8]) -> Result<()>) -> Result<u32> {
    let mut bytes = [0; PAGE_BYTES];
    read(gpa, &mut bytes).with_context(|| format!("cannot read guest page {gpa:#x}"))?;
    let (page, number) = (Fields(&bytes), u32::try_from((gpa / PAGE_U64) & 0xffff_ffff)?);
    let expected = number.wrapping_mul(TAG_STEP);
    for at in TAG_OFFSETS {
        let tag = page.u32(at)?;
        ensure!(tag == expected, "page {gpa:#x} has tag {tag:#x} at offset {at:#x}, expected {expected:#x}");
    }
    page.u32(0)
}

/// Little-endian fields at offsets, checked.
struct Fields<'a>(&'a [u8]);

impl Fields<'_> {
    fn bytes<const N: usize>(&self, at: usize) -> Result<[u8; N]> {
        let field = self.0.get(at..).and_then(|rest| rest.first_chunk());
        field.copied().with_context(|| format!("no {N} bytes at offset {at}"))
    }

    fn u32(&self, at: usize) -> Result<u32> {
        Ok(u32::from_le_bytes(self.bytes(at)?))
    }

    fn u64(&self, at: usize) -> Result<u64> {
        Ok(u64::from_le_bytes(self.bytes(at)?))
    }

    fn range(&self, at: usize) -> Result<GuestRange> {
        let range = GuestRange { gpa: self.u64(at)?, pages: self.u64(at + 8)? };
        let end = range.pages.checked_mul(PAGE_U64).and_then(|bytes| range.gpa.checked_add(bytes));
        ensure!(
            range.gpa.is_multiple_of(PAGE_U64) && range.pages <= PAGES_MAX && end.is_some(),
            "the report has an impossible range: {} pages at {:#x}",
            range.pages,
            range.gpa
        );
        Ok(range)
    }
}

/// One line of the guest's serial output.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum SerialLine {
    /// Filled and at work; `key=value` pairs as in tests/guest/README.md.
    Ready(SerialFields),
    /// The periodic figures.
    Heartbeat(SerialFields),
    /// A bad page.
    Error(SerialFields),
    /// The guest gave up, for the reason given.
    Failed(String),
    /// It was asked to power off.
    PowerOff,
}

/// The `key=value` pairs of a serial line.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct SerialFields(BTreeMap<String, String>);

impl SerialFields {
    /// The value as it is written.
    #[must_use]
    pub fn text(&self, key: &str) -> Option<&str> {
        self.0.get(key).map(String::as_str)
    }

    /// The value as a number, decimal or 0x-prefixed.
    #[must_use]
    pub fn number(&self, key: &str) -> Option<u64> {
        let text = self.text(key)?;
        match text.strip_prefix("0x") {
            Some(hex) => u64::from_str_radix(hex, 16).ok(),
            None => text.parse().ok(),
        }
    }
}

/// Reads a line of serial output, without or with its line end; `None` for a line that is not the guest's (firmware).
#[must_use]
pub fn parse_serial_line(line: &str) -> Option<SerialLine> {
    // Firmware may leave control sequences before the first line.
    let (_, rest) = line.trim_end().split_once("limosa-guest ")?;
    let (word, rest) = rest.split_once(' ').unwrap_or((rest, ""));
    let pairs = rest.split(' ').filter_map(|pair| pair.split_once('='));
    let fields = || SerialFields(pairs.map(|(key, value)| (key.to_owned(), value.to_owned())).collect());
    match word {
        "ready" => Some(SerialLine::Ready(fields())),
        "heartbeat" => Some(SerialLine::Heartbeat(fields())),
        "ERROR" => Some(SerialLine::Error(fields())),
        "FAILED" => Some(SerialLine::Failed(rest.to_owned())),
        "poweroff" => Some(SerialLine::PowerOff),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

    use std::fs::File;
    use std::io::{BufRead, BufReader, Write};
    use std::os::unix::fs::FileExt;
    use std::process::{Child, ChildStdin, Stdio};
    use std::time::{Duration, Instant};

    use super::*;
    use crate::skip::skip;

    const MEMORY_BYTES: u64 = 96 << 20;

    /// A guest in QEMU whose memory is a file; its process and files go with it.
    struct Guest {
        qemu: Child,
        monitor: ChildStdin,
        answers: BufReader<std::process::ChildStdout>,
        memory: File,
        dir: tempfile::TempDir,
    }

    impl Drop for Guest {
        fn drop(&mut self) {
            let _ = self.qemu.kill();
            let _ = self.qemu.wait();
        }
    }

    impl Guest {
        fn start(accel: &str, cmdline: &str) -> Option<Self> {
            let dir = tempfile::tempdir().unwrap();
            let images = build(dir.path()).unwrap();
            let memory_path = dir.path().join("memory");
            let qemu = Command::new("qemu-system-x86_64")
                .args(["-nodefaults", "-no-user-config", "-display", "none", "-monitor", "stdio", "-machine"])
                .arg(format!("pc,accel={accel},memory-backend=m"))
                .arg("-object")
                .arg(format!("memory-backend-file,id=m,size={MEMORY_BYTES},share=on,mem-path={}", memory_path.display()))
                .args(["-m", "96M", "-append", cmdline, "-kernel"])
                .arg(&images.elf)
                .arg("-serial")
                .arg(format!("file:{}", dir.path().join("serial").display()))
                .stdin(Stdio::piped())
                .stdout(Stdio::piped())
                .stderr(Stdio::null())
                .spawn();
            let mut qemu = match qemu {
                Ok(qemu) => qemu,
                Err(error) => {
                    skip(&format!("qemu-system-x86_64 does not start: {error}"));
                    return None;
                }
            };
            let (monitor, stdout) = (qemu.stdin.take().unwrap(), qemu.stdout.take().unwrap());
            let deadline = Instant::now() + Duration::from_secs(20);
            let memory = loop {
                match File::options().read(true).write(true).open(&memory_path) {
                    Ok(file) => break file,
                    Err(_) if Instant::now() < deadline => std::thread::sleep(Duration::from_millis(20)),
                    Err(error) => panic!("no guest memory: {error}"),
                }
            };
            Some(Self { qemu, monitor, answers: BufReader::new(stdout), memory, dir })
        }

        /// Waits for a line of serial output that `wanted` accepts.
        fn wait_for(&self, wanted: impl Fn(&SerialLine) -> bool) -> SerialLine {
            let deadline = Instant::now() + Duration::from_secs(60);
            loop {
                let text =
                    String::from_utf8_lossy(&std::fs::read(self.dir.path().join("serial")).unwrap_or_default()).into_owned();
                if let Some(line) =
                    text.split_inclusive('\n').filter(|l| l.ends_with('\n')).filter_map(parse_serial_line).find(&wanted)
                {
                    return line;
                }
                assert!(Instant::now() < deadline, "no such line in: {text}");
                std::thread::sleep(Duration::from_millis(50));
            }
        }

        fn tell(&mut self, command: &str, status: &str) {
            write!(self.monitor, "{command}\ninfo status\n").unwrap();
            let mut line = String::new();
            while !line.contains(&format!("VM status: {status}")) {
                line.clear();
                assert!(self.answers.read_line(&mut line).unwrap() > 0, "QEMU ended");
            }
        }

        fn report(&self) -> GuestReport {
            let mut page = [0; PAGE_BYTES];
            self.memory.read_exact_at(&mut page, REPORT_GPA).unwrap();
            GuestReport::parse(&page).unwrap()
        }

        fn check(&self) -> Result<MemoryCheck> {
            self.report().check_memory(|gpa, page| Ok(self.memory.read_exact_at(page, gpa)?))
        }
    }

    /// Pauses the guest several times at whatever instant and checks all of its memory; then makes one page stale, and
    /// both the host and the guest must see it.
    fn proves_its_memory(accel: &str, cmdline: &str) {
        let Some(mut guest) = Guest::start(accel, cmdline) else { return };
        let SerialLine::Ready(ready) = guest.wait_for(|line| matches!(line, SerialLine::Ready(_))) else { panic!() };
        assert_eq!(ready.number("ws_base"), Some(WORKING_SET_GPA));
        let mut written = 0;
        for _ in 0..5 {
            std::thread::sleep(Duration::from_millis(130));
            guest.tell("stop", "paused");
            let (report, check) = (guest.report(), guest.check().unwrap());
            assert_eq!((report.errors, report.state), (0, GuestState::Running));
            assert_eq!(Some(report.working_set.pages), ready.number("ws_pages"));
            assert_eq!(check.pages, report.working_set.pages + report.fill_low.pages);
            assert!(report.pages_written > written, "the guest does not write");
            written = report.pages_written;
            guest.tell("cont", "running");
        }
        guest.wait_for(
            |line| matches!(line, SerialLine::Heartbeat(f) if f.number("written") > Some(0) && f.number("errors") == Some(0)),
        );

        guest.tell("stop", "paused");
        // One write is lost: the page's counter is one behind. Half a pass away from the writes in flight, see check_memory.
        let report = guest.report();
        let pages = usize::try_from(report.working_set.pages).unwrap();
        let order = (usize::try_from(report.position).unwrap() + pages / 2) % pages;
        let gpa = WORKING_SET_GPA + report.write_order().nth(order).unwrap() * PAGE_U64;
        let mut counter = [0; 4];
        guest.memory.read_exact_at(&mut counter, gpa).unwrap();
        let stale = u32::from_le_bytes(counter) - 1;
        guest.memory.write_all_at(&stale.to_le_bytes(), gpa).unwrap();
        let told = guest.check().unwrap_err().to_string();
        assert!(told.contains(&format!("{gpa:#x}")), "{told}");
        guest.tell("cont", "running");
        let SerialLine::Error(error) = guest.wait_for(|line| matches!(line, SerialLine::Error(_))) else { panic!() };
        assert_eq!(error.number("gpa"), Some(gpa));
        assert_eq!(error.number("actual"), Some(u64::from(stale)));
        guest.tell("stop", "paused");
        assert_eq!(guest.report().first_bad.map(|bad| bad.gpa), Some(gpa));
    }

    #[test]
    fn under_tcg_at_full_speed() {
        proves_its_memory("tcg", "ws=9M dirty=max fill=8M heartbeat=200");
    }

    #[test]
    fn under_tcg_at_a_rate_in_order() {
        proves_its_memory("tcg", "ws=8212K pattern=sequential dirty=20M heartbeat=200");
    }

    #[test]
    fn under_kvm_at_full_speed() {
        if File::options().read(true).write(true).open("/dev/kvm").is_err() {
            return skip("/dev/kvm cannot be opened");
        }
        proves_its_memory("kvm", "ws=9M dirty=max fill=8M heartbeat=200");
    }

    #[test]
    fn a_filled_page_that_is_lost_is_found() {
        let Some(mut guest) = Guest::start("tcg", "ws=1M fill=1M heartbeat=200") else { return };
        guest.wait_for(|line| matches!(line, SerialLine::Ready(_)));
        guest.tell("stop", "paused");
        guest.check().unwrap();
        let gpa = WORKING_SET_GPA + (1 << 20) + 3 * PAGE_U64;
        guest.memory.write_all_at(&[0; PAGE_BYTES], gpa).unwrap();
        assert!(guest.check().is_err());
        guest.tell("cont", "running");
        let SerialLine::Error(error) = guest.wait_for(|line| matches!(line, SerialLine::Error(_))) else { panic!() };
        assert_eq!((error.number("gpa"), error.number("actual")), (Some(gpa), Some(0)));
    }

    #[test]
    fn hostile_reports_are_refused() {
        let mut page = vec![0; PAGE_BYTES];
        assert!(GuestReport::parse(&page).is_err(), "no magic");
        page[..8].copy_from_slice(MAGIC);
        page[8] = 1;
        assert!(GuestReport::parse(&page).is_err(), "state 0");
        page[SLOT_BYTES] = 3;
        GuestReport::parse(&page).unwrap();
        assert!(GuestReport::parse(&page[..PAGE_BYTES - 1]).is_err(), "short");
        for field in [96, 112, 128] {
            let mut hostile = page.clone();
            hostile[SLOT_BYTES + field + 8..SLOT_BYTES + field + 16].fill(0xff);
            assert!(GuestReport::parse(&hostile).is_err(), "pages at {field}");
        }
        let mut hostile = page.clone();
        hostile[SLOT_BYTES + 104] = 4;
        hostile[SLOT_BYTES + 56] = 4;
        assert!(GuestReport::parse(&hostile).is_err(), "position past the end");
    }

    #[test]
    fn serial_lines_are_read() {
        let line = "\u{1b}[2Jlimosa-guest heartbeat n=3 up_us=12 bad=0x10\r\n";
        let Some(SerialLine::Heartbeat(fields)) = parse_serial_line(line) else { panic!() };
        assert_eq!((fields.number("n"), fields.number("bad"), fields.number("x")), (Some(3), Some(16), None));
        assert_eq!(parse_serial_line("SeaBIOS"), None);
        assert_eq!(parse_serial_line("limosa-guest poweroff"), Some(SerialLine::PowerOff));
        assert_eq!(parse_serial_line("limosa-guest FAILED why 0x1"), Some(SerialLine::Failed("why 0x1".to_owned())));
    }
}
