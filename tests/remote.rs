//! Commands from another machine, and what an operator may have done by them: who answers is checked before anything is said,
//! keys are good for their own role only, and a ticket goes with the order. The operator's machine has a cable to one host and
//! no way to the network on which guests move. What a ticket is worthless for is tried at the destination in `delegation`.
#![allow(clippy::panic, clippy::unwrap_used, clippy::expect_used, clippy::print_stdout, missing_docs, unreachable_pub)]

use limosa_link::{HostKey, Link as _, TcpLink, TrustedHosts};
use limosa_proto::identity::{Generation, HostId, MigrationId};
use limosa_proto::wire::code::Code;
use limosa_proto::wire::message::Message;
use rig::command::Output;
use rig::netns::Netns;
use rig::operator::Operator;
use rig::process::limosa_bin;
use rig::{AgentConfig, Context, GuestSpec, Host, Lab, Result, bail, ensure, with_bare_lab, with_lab};
use std::future::Future;
use std::io::{Read as _, Write as _};
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::Duration;

/// An operator at a machine of her own.
struct Ana {
    machine: Netns,
    folder: PathBuf,
    key: Operator,
}

impl Ana {
    fn sits_at((machine, folder): (Netns, PathBuf)) -> Result<Ana> {
        // Where `limosa operator id` makes it by itself, when XDG_CONFIG_HOME is the folder.
        std::fs::create_dir_all(folder.join("limosa"))?;
        let key = Operator::in_folder(&folder.join("limosa"))?;
        Ok(Ana { machine, folder, key })
    }

    /// Runs a command on her machine.
    fn runs(&self, words: &[&str]) -> Result<Output> {
        let mut command = self.machine.command(limosa_bin()?);
        command.env("XDG_CONFIG_HOME", &self.folder).env_remove("LIMOSA_OPERATOR_KEY").stdin(Stdio::null());
        let output = command.args(words).output()?;
        Ok(Output {
            code: output.status.code().unwrap_or(-1),
            stdout: String::from_utf8_lossy(&output.stdout).into_owned(),
            stderr: String::from_utf8_lossy(&output.stderr).into_owned(),
            words: words.join(" "),
        })
    }

    /// Runs a command, which is printed as people would see it.
    fn shows(&self, words: &[&str]) -> Result<Output> {
        let output = self.runs(words)?;
        println!("ana$ limosa {}\n{}{}[exit {}]\n", words.join(" "), output.stderr, output.stdout, output.code);
        Ok(output)
    }

    /// A refusal: exit 1, this code, these words.
    fn refused(&self, words: &[&str], code: &str, says: &[&str]) -> Result<()> {
        let output = self.runs(&[&["--json"], words].concat())?.expect_code(1)?;
        let found = output.json()?;
        let found = found.pointer("/error/code").or_else(|| found.get("code")).cloned();
        ensure!(found == Some(code.into()), "{words:?}: {found:?} instead of {code}: {output:?}");
        let lacking = says.iter().find(|words| !output.all().contains(**words));
        ensure!(lacking.is_none(), "{lacking:?} is not in {output:?}");
        Ok(())
    }
}

/// What an agent logged since `before`, which must have all of these words in one line.
fn logged(host: &Host, before: usize, words: &[&str]) -> Result<String> {
    let log = host.agent_log();
    let new = log.get(before..).unwrap_or_default();
    let line = new.lines().find(|line| words.iter().all(|word| line.contains(word)));
    Ok(line.with_context(|| format!("no line of {} has {words:?}:\n{new}", host.name))?.to_owned())
}

fn shown(host: &Host, line: &str) {
    println!("log of {}: {}\n", host.name, line.split_once(' ').map_or(line, |(_, rest)| rest.trim()));
}

/// The ticket that `--print-ticket` printed.
fn printed_ticket(output: &Output) -> Result<String> {
    let line = output.stderr.lines().find_map(|line| line.strip_prefix("ticket: "));
    Ok(line.with_context(|| format!("no ticket was printed: {output:?}"))?.to_owned())
}

fn config() -> AgentConfig {
    AgentConfig::default().peers(&["10.77.0.0/24", "10.88.0.0/24"]).listens_everywhere()
}

/// Three agents that know each other, and an operator with rules on the first two.
fn three_hosts(lab: &mut Lab) -> Result<(Host, Ana)> {
    let ana = Ana::sits_at(lab.operators_machine(&lab.a)?)?;
    let rules =
        |actions: &[&str]| format!("{}{}", lab.a.operator.rule("rig"), ana.key.rule_for("ana", &["web*"], actions, &["b"]));
    let (at_a, at_b) = (rules(&["show", "migrate", "check", "cancel"]), rules(&["migrate", "check"]));
    lab.start_agents_with(config().operators(at_a), config().operators(at_b))?;
    let mut c = lab.third_host()?;
    c.start_agent(config())?;
    for (here, there) in [(&c, &lab.a), (&c, &lab.b), (&lab.b, &c), (&lab.a, &c)] {
        here.trust(there)?;
    }
    Ok((c, ana))
}

#[test]
fn an_operator_without_the_data_network_moves_a_guest_and_the_ticket_is_good_for_nothing_else() {
    with_bare_lab(|lab| {
        let (mut c, ana) = three_hosts(lab)?;
        let guest = GuestSpec::new("web", 1).memory("64M", "8M");
        lab.guest(&guest)?;
        lab.a.start_guest(&GuestSpec::new("web-2", 2).memory("64M", "8M"))?;
        lab.a.start_guest(&GuestSpec::new("db", 3).memory("64M", "8M"))?;
        c.start_guest(&GuestSpec::new("web-c", 4).memory("64M", "8M"))?;
        let reached = ana.machine.within(|| {
            let address = "10.77.0.2:13560".parse()?;
            Ok(std::net::TcpStream::connect_timeout(&address, Duration::from_secs(1)).is_ok())
        })?;
        ensure!(!reached, "the operator's machine reaches the data network");

        // Whoever answers is shown, and not spoken to.
        let first = ana.shows(&["--host", "10.88.0.1", "vm", "list"])?.expect_code(2)?;
        first.expect_words(&lab.a.id()?)?.expect_words("limosa operator trust")?;
        ana.shows(&["operator", "trust", "a", &lab.a.id()?, "10.88.0.1"])?.expect_code(0)?;
        let list = ana.shows(&["--host", "a", "vm", "list"])?.expect_code(0)?;
        ensure!(list.stdout.contains("web-2") && !list.stdout.contains("db"), "guests of others are shown: {list:?}");

        ana.shows(&["--host", "a", "check", "web", "--to", "b"])?.expect_code(0)?;
        let moved = ana.shows(&["--host", "a", "migrate", "web", "--to", "b", "--print-ticket"])?.expect_code(0)?;
        let ticket = printed_ticket(&moved)?;
        lab.b.guest_verified("web", 1)?;
        lab.b.migrate_well("web", &lab.a, &[])?;

        let again = ["--host", "a", "migrate", "web", "--to", "b", "--ticket", &ticket];
        let (at_a, at_b, at_c) = (lab.a.agent_log().len(), lab.b.agent_log().len(), c.agent_log().len());
        ana.shows(&again)?.expect_code(1)?.expect_words("was used already")?.expect_words("make another")?;
        shown(&lab.b, &logged(&lab.b, at_b, &["a ticket was refused", "ticket-used", "web"])?);
        ana.refused(&again[..], "ticket-used", &[])?;

        let other = ["--host", "a", "migrate", "web-2", "--to", "b", "--ticket", &ticket];
        ana.shows(&other)?.expect_code(1)?.expect_words("web-2")?;
        shown(&lab.a, &logged(&lab.a, at_a, &["ticket was refused", "ticket-guest", "web-2"])?);
        ana.refused(&other[..], "ticket-guest", &[])?;

        let by_c = c.limosa(&["migrate", "web-c", "--to", "b", "--ticket", &ticket])?;
        println!("c# limosa migrate web-c --to b --ticket {ticket}\n{}[exit {}]\n", by_c.stderr, by_c.code);
        by_c.expect_code(1)?.expect_words(&lab.a.id()?)?;
        shown(&c, &logged(&c, at_c, &["ticket was refused", "ticket-source"])?);
        lab.a.guest_lives("web")?;

        c.limosa(&["vm", "stop", "web-c"])?.expect_code(0)?;
        ensure!(c.stop_agent()?.code() == Some(0), "the agent of c did not stop cleanly");
        ana.runs(&["--host", "a", "migrate", "web", "--to", "b"])?.expect_code(0)?;
        lab.b.guest_verified("web", 1)?;
        Ok(())
    });
}

#[test]
fn an_operator_may_do_what_its_rules_say_and_nothing_else() {
    with_bare_lab(|lab| {
        let (mut c, ana) = three_hosts(lab)?;
        c.stop_agent()?;
        let guest = GuestSpec::new("web", 1).memory("64M", "8M");
        lab.guest(&guest)?;
        lab.a.start_guest(&GuestSpec::new("db", 2).memory("64M", "8M"))?;
        let a = ["--host", "10.88.0.1", "--host-id", &lab.a.id()?];
        let on_a = |words: &[&'static str]| [&a[..], words].concat();
        let before = lab.a.agent_log().len();
        ana.refused(&on_a(&["migrate", "db", "--to", "b"]), "operator-vm", &["ana", "db", "web*"])?;
        ana.refused(&on_a(&["migrate", "web", "--to", "c"]), "operator-destination", &["ana", "c", "destinations"])?;
        ana.refused(&on_a(&["vm", "stop", "web"]), "operator-action", &["ana", "stop", "actions"])?;
        ana.refused(&on_a(&["vm", "show", "db"]), "operator-vm", &["db"])?;
        ana.refused(&on_a(&["host", "remove", "b"]), "operator-action", &["trust"])?;
        ana.refused(&on_a(&["cancel", "77"]), "no-job", &["77"])?;
        ana.refused(&on_a(&["announce", "web"]), "operator-action", &["announce"])?;
        logged(&lab.a, before, &["a command was refused", "operator-vm", "db", "10.88.0.9"])?;
        for local in [&["vm", "start", "x.toml"][..], &["vm", "console", "web"], &["vm", "restore", "x"], &["allow", "list"]] {
            ana.runs(&[&a[..], local].concat())?.expect_code(2)?.expect_words("run it on")?;
        }
        // What is left is everything that the commands do on the host itself.
        for words in [&["vm", "show", "web"][..], &["jobs"], &["host", "id"], &["host", "show"], &["host", "list"]] {
            ana.runs(&[&a[..], words].concat())?.expect_code(0)?;
        }
        let plan = ana.runs(&[&a[..], &["migrate", "web", "--to", "b", "--print-plan"]].concat())?.expect_code(0)?;
        ensure!(plan.stdout.contains("web"), "{plan:?}");
        let report = ana.runs(&[&["--json"], &a[..], &["migrate", "web", "--to", "b"]].concat())?.expect_code(0)?.json()?;
        let job = report["job"].to_string();
        ana.runs(&[&a[..], &["job", &job, "--watch"]].concat())?.expect_code(0)?.expect_words("done")?;
        ana.runs(&[&a[..], &["verdict", &job]].concat())?.expect_code(0)?;
        ana.refused(&[&a[..], &["cancel", &job]].concat(), "cancel", &["has already ended"])?;
        lab.b.guest_verified("web", 1)?;
        Ok(())
    });
}

#[test]
fn who_answers_is_checked_and_an_unknown_key_is_told_what_to_do() {
    with_bare_lab(|lab| {
        let ana = Ana::sits_at(lab.operators_machine(&lab.a)?)?;
        lab.start_agents(config())?;
        let guest = GuestSpec::new("web", 1).memory("64M", "8M");
        lab.guest(&guest)?;
        let (id, other) = (lab.a.id()?, lab.b.id()?);
        let list = |id: &str| ana.runs(&["--json", "--host", "10.88.0.1", "--host-id", id, "vm", "list"]);
        let code = |output: Output| Ok::<_, rig::Error>(output.expect_code(1)?.json()?["error"]["code"].clone());
        let wrong = list(&other)?;
        ensure!(wrong.all().contains(&id) && wrong.all().contains(&other), "both keys are named: {wrong:?}");
        ensure!(code(wrong)? == "host-key");
        let unknown = list(&id)?;
        ensure!(unknown.all().contains(&ana.key.id) && unknown.all().contains("[[operator]]"), "{unknown:?}");
        ensure!(code(unknown)? == "operator-unknown");
        // An address that is not on the allow-list is closed unread, an operator's too.
        ana.machine.ip("addr add 10.89.0.9/24 dev eth0")?;
        lab.a.ip("addr add 10.89.0.1/24 dev admin")?;
        let output = ana.runs(&["--json", "--host", "10.89.0.1", "--host-id", &id, "vm", "list"])?;
        ensure!(output.all().contains("10.89.0.9"), "our address is named: {output:?}");
        ensure!(code(output)? == "not-allowed");
        let nobody = ana.runs(&["--json", "--host", "10.88.0.7", "--host-id", &id, "vm", "list"])?;
        ensure!(code(nobody)? == "no-agent");
        // A host's key is no operator's name, and an operator is never trusted as a host.
        lab.a.limosa(&["host", "trust", "ana", &lab.a.operator.id, "10.88.0.9"])?.expect_code(1)?.expect_words("operator")?;
        lab.a.stop_agent()?;
        let rules = format!("{}{}", lab.a.operator.rule("rig"), ana.key.rule("ana"));
        lab.a.start_agent(config().operators(rules))?;
        lab.a.wait_knows("web", true)?;
        list(&id)?.expect_code(0)?.expect_words("web")?;
        lab.unharmed(&guest)
    });
}

/// Runs what needs a runtime, inside a namespace.
fn inside<T: Send>(netns: &Netns, work: impl Future<Output = Result<T>> + Send) -> Result<T> {
    netns.within(|| tokio::runtime::Builder::new_current_thread().enable_all().build()?.block_on(work))
}

fn link(to: &Host, id: HostId, key: &HostKey) -> TcpLink {
    TcpLink::new(to.address().to_string(), id, key.clone(), TrustedHosts::new([id]), Duration::from_secs(5))
}

fn key(path: &Path) -> Result<HostKey> {
    Ok(HostKey::load(path)?)
}

#[test]
fn a_key_is_good_for_its_own_role_only() {
    with_lab(AgentConfig::default(), |lab| {
        let guest = GuestSpec::new("web", 1).memory("64M", "8M");
        lab.guest(&guest)?;
        let b: HostId = lab.b.id()?.parse()?;
        let (operator, host) = (key(&lab.a.operator.key)?, key(&lab.a.state_dir().join("host.key"))?);
        let stranger = HostKey::generate()?;
        let before = lab.b.agent_log().len();
        // An operator sends no guest, asks no host's questions, and opens no lane.
        let as_host = link(&lab.b, b, &operator);
        let answer = inside(&lab.a.netns, async {
            let mut control = as_host.control().await?;
            control.send(MigrationId([1; 16]), Generation(1), &Message::CpuAsk)?;
            Ok(control.receive().await?.1)
        })?;
        let Message::Refuse(refusal) = &answer else { bail!("{answer:?}") };
        ensure!(refusal.code == Code::NotAHost && refusal.words().contains("operator"), "{refusal:?}");
        logged(&lab.b, before, &["an operator's key was used to send a guest"])?;
        // A host commands nothing.
        let ask = |key: &HostKey| {
            let (address, key) = (lab.b.address().to_string(), key.clone());
            inside(&lab.a.netns, async move {
                use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
                let mut channel = limosa_link::commands::command(address, b, key).await?;
                channel.stream.write_all(b"\"vm_list\"\n").await?;
                let mut said = String::new();
                channel.stream.read_to_string(&mut said).await?;
                Ok(said)
            })
        };
        let said = ask(&host)?;
        ensure!(said.contains("not-an-operator") && said.contains("a host commands nothing"), "{said}");
        logged(&lab.b, before, &["a host's key was used to command"])?;
        ensure!(ask(&operator)?.contains("\"result\""), "an operator is obeyed");
        ensure!(ask(&stranger)?.is_empty(), "a stranger is told something");
        let error = inside(&lab.a.netns, async {
            let mut control = link(&lab.b, b, &stranger).control().await?;
            control.send(MigrationId([1; 16]), Generation(1), &Message::CpuAsk)?;
            Ok(control.receive().await.err())
        })?;
        let error = error.context("a stranger was answered")?.to_string();
        ensure!(error.contains("does not trust our host key"), "{error}");
        // Neither is anybody who does not speak TLS at all.
        let silent = lab.a.netns.within(|| {
            let mut plain = std::net::TcpStream::connect(lab.b.address())?;
            plain.set_read_timeout(Some(Duration::from_secs(10)))?;
            plain.write_all(b"{\"vm_stop\":{\"vm\":\"web\"}}\n")?;
            let mut said = Vec::new();
            plain.read_to_end(&mut said)?;
            Ok(said)
        })?;
        ensure!(silent.is_empty(), "{silent:?}");
        lab.unharmed(&guest)
    });
}
