//! Tickets as real agents ask for them: what a ticket is worthless for, tried at the destination by a source that presents
//! whatever it likes; clocks, operators, one use, restarts; and how people meet it on a host itself.
#![allow(clippy::panic, clippy::unwrap_used, clippy::expect_used, missing_docs, unreachable_pub)]

use limosa_link::{HostKey, Link as _, TcpLink, TrustedHosts};
use limosa_proto::identity::{Generation, HostId, MigrationId, VmId};
use limosa_proto::memory::{Gpa, MemoryMap, Region};
use limosa_proto::ticket::{Ticket, TicketBytes};
use limosa_proto::wire::code::Code;
use limosa_proto::wire::message::{Hello, Message, VmDescription};
use rig::command::{Output, limosa};
use rig::operator::Operator;
use rig::process::wait_for;
use rig::{AgentConfig, Context, GuestSpec, Host, Lab, Result, bail, ensure, with_bare_lab, with_lab};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

const VM: &str = "000102030405060708090a0b0c0d0e0f";
const OTHER_VM: &str = "ff0102030405060708090a0b0c0d0e0f";

/// A source that obeys nobody: it has a host's key, and presents what it likes.
struct Source<'a> {
    lab: &'a Lab,
    key: HostKey,
    destination: HostId,
}

impl<'a> Source<'a> {
    /// With the key of a host of the lab.
    fn is(lab: &'a Lab, host: &Host) -> Result<Source<'a>> {
        let key = HostKey::load(&host.state_dir().join("host.key"))?;
        Ok(Source { lab, key, destination: lab.b.id()?.parse()? })
    }

    fn link(&self) -> TcpLink {
        let trusted = TrustedHosts::new([self.destination]);
        TcpLink::new(self.lab.b.address().to_string(), self.destination, self.key.clone(), trusted, Duration::from_secs(5))
    }

    /// Presents a ticket (as text, or as bytes that are none) and a guest, in migration `number`. What the destination says.
    fn presents(&self, ticket: Option<TicketBytes>, vm: &str, number: u8) -> Result<Message> {
        // The attempt before it under the same number may be on its way out still.
        wait_for(Duration::from_secs(10), "an answer other than busy", || {
            let said = self.presents_once(ticket.clone(), vm, number)?;
            Ok(Some(said).filter(|said| !matches!(said, Message::Refuse(refusal) if refusal.code == Code::Busy)))
        })
    }

    fn presents_once(&self, ticket: Option<TicketBytes>, vm: &str, number: u8) -> Result<Message> {
        let hello = hello(vm.parse()?)?;
        let (migration, generation) = (MigrationId([number; 16]), Generation(u64::from(number)));
        let link = self.link();
        self.lab.a.netns.within(|| {
            tokio::runtime::Builder::new_current_thread().enable_all().build()?.block_on(async {
                let mut control = link.control().await?;
                if let Some(ticket) = ticket {
                    control.send(migration, generation, &Message::Ticket(ticket))?;
                }
                control.send(migration, generation, &Message::Hello(Box::new(hello)))?;
                Ok(control.receive().await?.1)
            })
        })
    }

    /// It is refused with this code, and says these words to whoever runs the source; the destination's log has them too.
    fn refused(&self, ticket: Option<TicketBytes>, vm: &str, code: &str, words: &[&str]) -> Result<()> {
        let before = self.lab.b.agent_log().len();
        let said = self.presents(ticket, vm, 1)?;
        let Message::Refuse(refusal) = &said else { bail!("{code}: {said:?}") };
        let found = refusal.reasons.first().map(|reason| reason.id.as_str());
        ensure!(refusal.code == Code::Ticket && found == Some(code), "{refusal:?} instead of {code}");
        for word in words {
            ensure!(refusal.words().contains(word), "{word:?} is not in {refusal:?}");
        }
        let log = self.lab.b.agent_log();
        let new = log.get(before..).unwrap_or_default();
        ensure!(new.lines().any(|line| line.contains("a ticket was refused") && line.contains(code)), "{code}: {new}");
        Ok(())
    }

    /// It is let in; the source goes away again at once.
    fn comes(&self, ticket: TicketBytes, number: u8) -> Result<()> {
        let said = self.presents(Some(ticket), VM, number)?;
        ensure!(matches!(said, Message::Accept(_)), "{said:?}");
        self.lab.settled(&self.lab.b, 0)
    }
}

fn hello(id: VmId) -> Result<Hello> {
    let memory = MemoryMap::new(vec![Region { gpa: Gpa(0), bytes: 64 << 20, page_bytes: 4096 }])?;
    let vm = VmDescription {
        id,
        name: "web".into(),
        vcpus: 1,
        memory,
        nics: vec![],
        disks: vec![],
        vmm: "limosa".into(),
        records: vec![],
        config: vec![],
        cpu: Default::default(),
    };
    Ok(Hello {
        versions: limosa_proto::wire::version::offer(),
        vm,
        lanes: 1,
        plaintext_lanes: false,
        link: "tcp".into(),
        page_check: false,
        downtime_target_ms: 50,
        downtime_ms_max: 2000,
        keepalive_ms: 2000,
        source_build: "a test".into(),
    })
}

/// A ticket's maker: the operator's command, with hosts and a guest that can be exchanged.
struct Maker<'a> {
    operator: &'a Operator,
    source: String,
    destination: String,
}

impl Maker<'_> {
    fn text(&self, more: &[&str]) -> Result<String> {
        let key = self.operator.key.to_string_lossy();
        let mut words = vec!["ticket", "make", "--key", &key, "--source", &self.source, "--destination", &self.destination];
        if !more.contains(&"--vm") && !more.contains(&"--vms") {
            words.extend(["--vm", VM]);
        }
        words.extend(more);
        Ok(limosa(&words)?.expect_code(0)?.stdout.trim().to_owned())
    }

    fn make(&self, more: &[&str]) -> Result<TicketBytes> {
        Ok((&Ticket::parse(&self.text(more)?)?).into())
    }
}

/// A time so many seconds from now, as the command takes it.
fn at(seconds: i64) -> Result<String> {
    let now = i64::try_from(SystemTime::now().duration_since(UNIX_EPOCH)?.as_secs())? + seconds;
    let (days, rest) = (now.div_euclid(86_400), now.rem_euclid(86_400));
    // Days since 1970 as a date (Howard Hinnant's civil_from_days).
    let z = days + 719_468;
    let era = z.div_euclid(146_097);
    let doe = z.rem_euclid(146_097);
    let yoe = (doe - doe / 1460 + doe / 36_524 - doe / 146_096) / 365;
    let doy = doe - (365 * yoe + yoe / 4 - yoe / 100);
    let mp = (5 * doy + 2) / 153;
    let (day, month) = (doy - (153 * mp + 2) / 5 + 1, if mp < 10 { mp + 3 } else { mp - 9 });
    let year = yoe + era * 400 + i64::from(month <= 2);
    Ok(format!("{year:04}-{month:02}-{day:02}T{:02}:{:02}:{:02}Z", rest / 3600, rest / 60 % 60, rest % 60))
}

#[test]
fn a_hostile_source_gets_nothing_by_a_ticket_for_something_else() {
    with_bare_lab(|lab| {
        let (weak, narrow) = (Operator::in_folder(&lab.a.file("weak"))?, Operator::in_folder(&lab.a.file("narrow"))?);
        let rules = format!(
            "{}{}{}",
            lab.a.operator.rule("rig"),
            weak.rule_for("weak", &["*"], &["show", "check"], &["*"]),
            narrow.rule_for("narrow", &["db*"], &["migrate"], &["*"])
        );
        lab.start_agents_with(AgentConfig::default(), AgentConfig::default().operators(rules))?;
        let guest = GuestSpec::new("real", 1).memory("64M", "8M");
        lab.guest(&guest)?;
        let stranger = Operator::in_folder(&lab.a.file("stranger"))?;
        let (a, b) = (lab.a.id()?, lab.b.id()?);
        let elsewhere = HostId([9; 32]).to_string();
        let rig = Maker { operator: &lab.a.operator, source: a.clone(), destination: b.clone() };
        let by = |operator| Maker { operator, source: a.clone(), destination: b.clone() };
        let source = Source::is(lab, &lab.a)?;

        source.refused(None, VM, "ticket-missing", &["limosa operator id", "[[operator]]", "--ticket"])?;
        source.refused(Some(TicketBytes::of(vec![7; 99])), VM, "ticket-version", &[])?;
        source.refused(Some(TicketBytes::of(vec![1; 99])), VM, "ticket-malformed", &[])?;
        source.refused(Some(rig.make(&[])?), OTHER_VM, "ticket-guest", &[VM, OTHER_VM])?;
        let from_elsewhere = Maker { source: elsewhere.clone(), ..by(&lab.a.operator) };
        source.refused(Some(from_elsewhere.make(&[])?), VM, "ticket-source", &[&elsewhere, &a])?;
        let to_elsewhere = Maker { destination: elsewhere.clone(), ..by(&lab.a.operator) };
        source.refused(Some(to_elsewhere.make(&[])?), VM, "ticket-destination", &[&elsewhere, &b])?;
        source.refused(Some(rig.make(&["--action", "check"])?), VM, "ticket-action", &["check", "migrate"])?;
        source.refused(Some(rig.make(&["--link", "quic"])?), VM, "ticket-link", &["quic", "tcp"])?;
        source.refused(Some(by(&stranger).make(&[])?), VM, "ticket-issuer", &[&stranger.id, &b])?;
        source.refused(Some(by(&weak).make(&[])?), VM, "ticket-not-delegated", &["weak", "migrate"])?;
        source.refused(Some(by(&narrow).make(&[])?), VM, "ticket-not-delegated", &["narrow", "web", "vms"])?;
        source.refused(Some(rig.make(&["--vms", "db-*"])?), VM, "ticket-guest", &["db-*"])?;
        let mut forged = Ticket::parse(&rig.text(&[])?)?.emit();
        let last = forged.len() - 1;
        forged[last] ^= 1;
        source.refused(Some(TicketBytes::of(forged)), VM, "ticket-signature", &[])?;
        // 30 s of difference are allowed for.
        let time = |from: i64, until: i64| rig.make(&["--from", &at(from)?, "--until", &at(until)?]);
        source.refused(Some(time(90, 600)?), VM, "ticket-not-yet", &["timedatectl"])?;
        source.refused(Some(time(-600, -90)?), VM, "ticket-expired", &["make another"])?;
        // A stolen one, by another host that is trusted: worthless to it, and as good as before to the host that it names.
        let (thief, stolen) = (HostKey::generate()?, rig.make(&[])?);
        lab.b.trust_id("thief", &thief.id().to_string(), "10.77.0.9")?;
        let id = thief.id().to_string();
        let thief = Source { lab, key: thief, destination: b.parse()? };
        thief.refused(Some(stolen.clone()), VM, "ticket-source", &[&a, &id])?;
        source.comes(stolen, 4)?;
        // Nothing of all this has used a ticket up, or harmed anybody.
        source.comes(time(15, 600)?, 2)?;
        source.comes(time(-600, -10)?, 3)?;
        lab.settled(&lab.b, 0)?;
        ensure!(lab.b.guests()?.is_empty());
        lab.unharmed(&guest)
    });
}

#[test]
fn a_ticket_is_good_for_one_migration_also_after_a_restart() {
    with_lab(AgentConfig::default(), |lab| {
        let guest = GuestSpec::new("real", 1).memory("64M", "8M");
        lab.guest(&guest)?;
        let rig = Maker { operator: &lab.a.operator, source: lab.a.id()?, destination: lab.b.id()? };
        let (first, second) = (rig.make(&[])?, rig.make(&[])?);
        let source = Source::is(lab, &lab.a)?;
        source.comes(first.clone(), 2)?;
        source.refused(Some(first.clone()), VM, "ticket-used", &["make another"])?;
        // Another attempt at the very migration that used it is no second use.
        source.comes(first.clone(), 2)?;
        let file = lab.b.state_dir().join("tickets");
        let kept = std::fs::read(&file)?;
        lab.b.kill_agent()?;
        lab.b.restart_agent()?;
        let source = Source::is(lab, &lab.a)?;
        source.refused(Some(first.clone()), VM, "ticket-used", &[])?;
        let Message::Refuse(_) = source.presents(Some(first.clone()), VM, 2)? else { bail!("used again after a restart") };
        // A tail that a crash has torn costs nothing; a file that cannot be understood lets nobody in.
        lab.b.stop_agent()?;
        std::fs::write(&file, [&kept[..], b"0bad"].concat())?;
        lab.b.restart_agent()?;
        ensure!(std::fs::read(&file)? == kept, "the torn tail was not cut off");
        Source::is(lab, &lab.a)?.comes(second, 3)?;
        lab.b.stop_agent()?;
        let mut damaged = kept.clone();
        damaged[2] ^= 1;
        std::fs::write(&file, &damaged)?;
        lab.b.restart_agent()?;
        let third = rig_third(lab)?;
        Source::is(lab, &lab.a)?.refused(Some(third), VM, "ticket-store", &["tickets", "restore"])?;
        lab.b.stop_agent()?;
        std::fs::write(&file, &kept)?;
        lab.b.restart_agent()?;
        lab.unharmed(&guest)
    });
}

fn rig_third(lab: &Lab) -> Result<TicketBytes> {
    Maker { operator: &lab.a.operator, source: lab.a.id()?, destination: lab.b.id()? }.make(&[])
}

#[test]
fn clocks_may_differ_by_what_the_destination_has_set() {
    with_bare_lab(|lab| {
        let strict = AgentConfig::default().tickets("skew_s", 0);
        let lenient = AgentConfig::default().tickets("skew_s", 3600);
        lab.start_agents_with(lenient.clone(), strict)?;
        let guest = GuestSpec::new("real", 1).memory("64M", "8M");
        lab.guest(&guest)?;
        let (a, b) = (lab.a.id()?, lab.b.id()?);
        let info = lab.a.ask(&["vm", "show", "real"])?;
        let vm = info["id"].as_str().context("the guest's id")?.to_owned();
        let late = |from: i64, until: i64| {
            let rig = Maker { operator: &lab.a.operator, source: a.clone(), destination: b.clone() };
            rig.text(&["--vm", &vm, "--from", &at(from)?, "--until", &at(until)?])
        };
        let (expired, early) = (late(-1200, -600)?, late(600, 1200)?);
        let code = |output: Output| Ok::<_, rig::Error>(output.expect_code(1)?.json()?["code"].clone());
        let refused = lab.a.migrate("real", &lab.b, &["--ticket", &expired])?;
        ensure!(refused.all().contains("10 min"), "by how much the clocks differ is not said: {refused:?}");
        ensure!(code(refused)? == "ticket-expired");
        ensure!(code(lab.a.migrate("real", &lab.b, &["--ticket", &early])?)? == "ticket-not-yet");
        // The same tickets, where clocks may differ by an hour.
        lab.b.stop_agent()?;
        lab.b.start_agent(lenient)?;
        lab.a.migrate_well("real", &lab.b, &["--ticket", &expired])?;
        lab.b.migrate_well("real", &lab.a, &[])?;
        lab.a.migrate_well("real", &lab.b, &["--ticket", &early])?;
        lab.guest_is_on(&guest, &lab.b, &lab.a)?;
        lab.b.guest_verified("real", 1)?;
        Ok(())
    });
}

#[test]
fn on_a_host_itself_the_callers_key_signs_or_a_ticket_is_given() {
    with_lab(AgentConfig::default(), |lab| {
        let guest = GuestSpec::new("web", 1).memory("64M", "8M");
        lab.guest(&guest)?;
        // Without a key and without a ticket.
        let none = lab.a.file("no.key").to_string_lossy().into_owned();
        let without = lab.a.migrate("web", &lab.b, &["--key", &none])?.expect_code(1)?;
        ensure!(without.json()?["code"] == "ticket-missing", "{without:?}");
        ensure!(without.all().contains("limosa operator id"), "{without:?}");
        ensure!(!std::path::Path::new(&none).exists(), "a key was made without being asked for");
        let check = lab.a.limosa(&["check", "web", "--to", "b", "--key", &none])?.expect_code(1)?;
        check.expect_words("ticket-missing")?;
        // A key that nobody knows.
        let stranger = Operator::in_folder(&lab.a.file("stranger"))?;
        let key = stranger.key.to_string_lossy().into_owned();
        let unknown = lab.a.migrate("web", &lab.b, &["--key", &key])?.expect_code(1)?;
        ensure!(unknown.json()?["code"] == "ticket-issuer" && unknown.all().contains(&stranger.id), "{unknown:?}");
        // A standing delegation, out of a file, as often as needed.
        let standing = |source: &Host, to: &Host| -> Result<String> {
            let maker = Maker { operator: &lab.a.operator, source: source.id()?, destination: to.id()? };
            let path = source.file("standing.ticket");
            std::fs::write(&path, format!("{}\n", maker.text(&["--vms", "web*", "--life", "30days"])?))?;
            Ok(format!("@{}", path.display()))
        };
        let (there, back) = (standing(&lab.a, &lab.b)?, standing(&lab.b, &lab.a)?);
        for _ in 0..2 {
            lab.a.migrate_well("web", &lab.b, &["--key", &none, "--ticket", &there])?;
            lab.b.migrate_well("web", &lab.a, &["--key", &none, "--ticket", &back])?;
        }
        let wrong = lab.a.migrate("web", &lab.b, &["--ticket", &back])?.expect_code(1)?;
        ensure!(wrong.json()?["error"]["code"] == "ticket-destination", "{wrong:?}");
        let noise = lab.a.migrate("web", &lab.b, &["--ticket", "noise"])?.expect_code(1)?;
        ensure!(noise.json()?["error"]["code"] == "ticket-malformed", "{noise:?}");
        lab.unharmed(&guest)
    });
}

#[test]
fn a_host_that_asks_for_no_tickets_says_so() {
    with_bare_lab(|lab| {
        let loose = AgentConfig::default().tickets("required", false).operators("");
        lab.start_agents_with(AgentConfig::default(), loose)?;
        let warned = lab.b.agent_log();
        ensure!(warned.contains("tickets.required = false") && warned.contains("any trusted host"), "{warned}");
        let guest = GuestSpec::new("web", 1).memory("64M", "8M");
        lab.guest(&guest)?;
        let none = lab.a.file("no.key").to_string_lossy().into_owned();
        lab.a.migrate_well("web", &lab.b, &["--key", &none])?;
        // The way back is guarded.
        let back = lab.b.migrate("web", &lab.a, &["--key", &none])?.expect_code(1)?;
        ensure!(back.json()?["code"] == "ticket-missing", "{back:?}");
        lab.b.migrate_well("web", &lab.a, &[])?;
        lab.unharmed(&guest)
    });
}

#[test]
fn where_no_operator_is_named_no_guest_comes() {
    with_bare_lab(|lab| {
        lab.start_agents_with(AgentConfig::default(), AgentConfig::default().operators(""))?;
        ensure!(lab.b.agent_log().contains("no [[operator]] is named"), "{}", lab.b.agent_log());
        let guest = GuestSpec::new("web", 1).memory("64M", "8M");
        lab.guest(&guest)?;
        let refused = lab.a.migrate("web", &lab.b, &[])?.expect_code(1)?;
        ensure!(refused.json()?["code"] == "ticket-issuer", "{refused:?}");
        lab.b.stop_agent()?;
        lab.b.start_agent(AgentConfig::default())?;
        lab.unharmed(&guest)
    });
}
