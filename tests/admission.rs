//! Who may, changed while agents and migrations run: rules of the allow-lists, trust, revocation, the configuration read again.
//! Each cut ends with the guest at its source and a migration that works once it may again. Refusals of what was never allowed
//! are in `allow_list`.
#![allow(clippy::panic, clippy::unwrap_used, clippy::expect_used, clippy::print_stdout, missing_docs, unreachable_pub)]

use nix::fcntl::{FcntlArg, FdFlag, fcntl};
use nix::sys::signal::Signal;
use rig::command::Output;
use rig::process::{self, wait_for};
use rig::{AgentConfig, Context, GuestSpec, Host, Lab, Result, ensure, with_bare_lab, with_lab};
use std::io::Write as _;
use std::process::{Child, Stdio};
use std::time::{Duration, Instant};

/// Time for what is cut to end, on busy cores; far less than the silence after which a peer is lost.
const SOON: Duration = Duration::from_secs(8);

fn config() -> AgentConfig {
    AgentConfig::default().migration("silence_max_ms", 30_000)
}

/// A guest whose first round takes 8 s at the speed of `start_slow`.
fn slow() -> GuestSpec {
    GuestSpec::new("web", 1).dirty("20M", "32M").memory("128M", "32M")
}

/// Prints a command and what it said, for the report.
fn show(output: &Output) {
    println!("$ limosa {}\n{}{}(exit {})", output.words, output.stdout, output.stderr, output.code);
}

/// Takes something back in the middle of pre-copy: the migration is aborted soon, with words, and the guest runs on.
fn cut(lab: &Lab, link: &str, take_back: impl FnOnce() -> Result<Output>, words: &str) -> Result<()> {
    let mut running = lab.a.start_slow("web", &lab.b, &["--link", link])?;
    let start = Instant::now();
    let said = take_back()?.expect_code(0)?;
    show(&said);
    ensure!(said.stdout.contains("is cut"), "nothing is said of the migration that runs: {said:?}");
    let output = running.wait(SOON)?.expect_code(3).with_context(|| format!("{link}: {words}"))?;
    ensure!(start.elapsed() < SOON, "{link}: it took {:?}", start.elapsed());
    ensure!(output.all().contains(words), "{link}: {words:?} is not in {output:?}");
    println!("-> {}", output.stderr.lines().last().unwrap_or_default());
    lab.guest_is_on(&slow(), &lab.a, &lab.b)
}

/// A migration that is refused before anything is sent, with this code.
fn refused(lab: &Lab, link: &str, code: &str) -> Result<()> {
    let output = lab.a.migrate("web", &lab.b, &["--link", link])?.expect_code(1)?;
    ensure!(output.all().contains(code), "{link}: no {code} in {output:?}");
    lab.a.guest_lives("web").map(drop)
}

fn there_and_back(lab: &Lab, link: &str) -> Result<()> {
    lab.a.migrate_well("web", &lab.b, &["--link", link])?;
    lab.guest_is_on(&slow(), &lab.b, &lab.a)?;
    lab.b.migrate_well("web", &lab.a, &["--link", link])?;
    lab.guest_is_on(&slow(), &lab.a, &lab.b)
}

#[test]
fn a_rule_that_is_taken_back_cuts_what_runs_and_works_again_when_it_is_back() {
    with_bare_lab(|lab| {
        lab.start_agents_with(config(), config().peers(&["192.0.2.0/24"]))?;
        lab.guest(&slow())?;
        refused(lab, "tcp", "not-allowed")?;
        show(&lab.b.limosa(&["allow", "add", "10.77.0.0/24"])?.expect_code(0)?);
        show(&lab.b.limosa(&["allow", "list"])?.expect_code(0)?);
        show(&lab.b.limosa(&["allow", "test", "10.77.0.1"])?.expect_code(0)?);
        for link in ["tcp", "quic"] {
            let take_back = || lab.b.limosa(&["allow", "remove", "10.77.0.0/24"]);
            cut(lab, link, take_back, "is not on the allow-list of b any more")?;
            show(&lab.b.limosa(&["allow", "test", "10.77.0.1"])?.expect_code(1)?);
            refused(lab, link, "not-allowed")?;
            lab.b.limosa(&["allow", "add", "10.77.0.0/24"])?.expect_code(0)?;
            there_and_back(lab, link)?;
        }
        // Rules of commands outlive the agent.
        lab.b.stop_agent()?;
        lab.b.restart_agent()?;
        lab.unharmed(&slow())
    });
}

#[test]
fn a_host_that_is_not_trusted_any_more_is_cut_at_either_end() {
    with_lab(config(), |lab| {
        lab.guest(&slow())?;
        for link in ["tcp", "quic"] {
            cut(lab, link, || lab.b.limosa(&["host", "remove", "a"]), "is not trusted on b any more")?;
            refused(lab, link, "unknown-host")?;
            lab.b.trust(&lab.a)?;
            let id = lab.b.id()?;
            cut(lab, link, || lab.a.limosa(&["host", "remove", "b"]), "is not trusted on a any more")?;
            lab.a.trust_id("b", &id, &lab.b.address().to_string())?;
            there_and_back(lab, link)?;
        }
        lab.unharmed(&slow())
    });
}

#[test]
fn a_revoked_key_is_cut_and_stays_out_whatever_is_trusted() {
    with_lab(config(), |lab| {
        lab.guest(&slow())?;
        let (a, b) = (lab.a.id()?, lab.b.id()?);
        for link in ["tcp", "quic"] {
            cut(lab, link, || lab.b.limosa(&["host", "revoke", "a"]), "is revoked on b")?;
            refused(lab, link, "unknown-host")?;
            // Trusting it again does not help, by whatever name, nor does a restart.
            let again = lab.b.limosa(&["host", "trust", "again", &a, "10.77.0.1"])?.expect_code(1)?;
            ensure!(again.stderr.contains("is revoked"), "{again:?}");
            ensure!(lab.b.limosa(&["host", "revoked"])?.expect_code(0)?.stdout.trim() == a, "it is not listed");
            lab.b.stop_agent()?;
            lab.b.restart_agent()?;
            refused(lab, link, "unknown-host")?;
            lab.b.limosa(&["host", "revoke", "--undo", &a])?.expect_code(0)?;
            there_and_back(lab, link)?;
        }
        // By the source, of the destination's key, by its id.
        cut(lab, "tcp", || lab.a.limosa(&["host", "revoke", &b]), "is revoked on a")?;
        let output = lab.a.migrate("web", &lab.b, &[])?.expect_code(1)?;
        ensure!(output.all().contains("is revoked on a"), "{output:?}");
        lab.a.limosa(&["host", "revoke", "--undo", &b])?.expect_code(0)?;
        ensure!(lab.b.agent_log().contains("is revoked here"), "the log of b does not say why");
        lab.unharmed(&slow())
    });
}

#[test]
fn the_configuration_is_read_again_and_a_bad_one_changes_nothing() {
    with_lab(config(), |lab| {
        lab.guest(&slow())?;
        let good = lab.b.agent_config();
        let file = lab.b.file("agent.toml");
        for bad in ["[allow]\npeers = [\"10.0.0.0/99\"]\n", "[allow\n", "[allow]\npeers = [\"limosa-test.invalid\"]\n"] {
            std::fs::write(&file, bad)?;
            let output = lab.b.limosa(&["allow", "reload"])?.expect_code(2)?;
            ensure!(output.stderr.contains("what was read before stays"), "{output:?}");
            show(&output);
        }
        process::signal(lab.b.agent_pid()?, Signal::SIGHUP);
        wait_for(SOON, "SIGHUP's refusal in the log", || {
            Ok(lab
                .b
                .agent_log()
                .contains("SIGHUP: agent.toml")
                .then_some(())
                .or_else(|| lab.b.agent_log().contains("stays").then_some(())))
        })?;
        there_and_back(lab, "tcp")?;
        // A good one that names nobody cuts what runs.
        lab.b.rewrite_config(good.clone().peers(&[]))?;
        cut(lab, "tcp", || lab.b.limosa(&["allow", "reload"]), "is not on the allow-list of b any more")?;
        lab.b.rewrite_config(good.clone().migration("incoming_max", 3))?;
        let output = lab.b.limosa(&["allow", "reload"])?.expect_code(0)?;
        ensure!(output.stdout.contains("other settings have changed too"), "{output:?}");
        lab.b.rewrite_config(good.peers(&[]))?;
        process::signal(lab.b.agent_pid()?, Signal::SIGHUP);
        wait_for(SOON, "SIGHUP's effect", || Ok((lab.b.limosa(&["allow", "test", "10.77.0.1"])?.code == 1).then_some(())))?;
        refused(lab, "tcp", "not-allowed")?;
        lab.b.limosa(&["allow", "add", "10.77.0.1"])?.expect_code(0)?;
        lab.unharmed(&slow())
    });
}

#[test]
fn migrations_use_the_network_that_is_theirs() {
    with_bare_lab(|lab| {
        for host in [&lab.a, &lab.b] {
            host.ip(&format!("addr add 10.88.0.{}/24 dev br0", host.ip.octets()[3]))?;
        }
        let anywhere =
            || AgentConfig { listen: Some("[\"0.0.0.0:13560\"]".into()), ..config() }.peers(&["10.77.0.0/24", "10.88.0.0/24"]);
        let own = "[{ network = \"10.88.0.0/24\", priority = 1 }]";
        // b takes migrations on its second network only; a has no list yet.
        lab.a.start_agent(anywhere())?;
        lab.b.start_agent(anywhere().allow("here", own))?;
        lab.b.trust(&lab.a)?;
        let id = lab.b.id()?;
        lab.guest(&slow())?;
        for link in ["tcp", "quic"] {
            lab.a.trust_id("b", &id, "10.77.0.2")?;
            refused(lab, link, "not-allowed")?;
            // Both addresses are known; a prefers the way that leaves from 10.88, by its list's numbers.
            lab.a.trust_id("b", &id, "10.77.0.2,10.88.0.2")?;
            lab.a.limosa(&["allow", "add", "--here", "10.88.0.0/24", "--priority", "1"])?.expect_code(0)?;
            lab.a.limosa(&["allow", "add", "--here", "10.77.0.0/24", "--priority", "50"])?.expect_code(0)?;
            show(&lab.a.limosa(&["allow", "list"])?.expect_code(0)?);
            lab.a.migrate_well("web", &lab.b, &["--link", link])?;
            lab.b.limosa(&["host", "trust", "a", &lab.a.id()?, "10.88.0.1"])?.expect_code(0)?;
            lab.b.migrate_well("web", &lab.a, &["--link", link])?;
            // A host that may not leave from there does not try.
            lab.a.limosa(&["allow", "remove", "--here", "10.88.0.0/24"])?.expect_code(0)?;
            lab.a.trust_id("b", &id, "10.88.0.2")?;
            let output = lab.a.migrate("web", &lab.b, &["--link", link])?.expect_code(1)?;
            ensure!(output.all().contains("that address of this host takes no migrations"), "{output:?}");
            lab.a.limosa(&["allow", "add", "--here", "10.88.0.0/24", "--priority", "1"])?.expect_code(0)?;
            // What runs over a network that is taken back is cut.
            cut(lab, link, || lab.a.limosa(&["allow", "remove", "--here", "10.88.0.0/24"]), "takes no migrations any more")?;
            lab.a.limosa(&["allow", "remove", "--here", "10.77.0.0/24"])?.expect_code(0)?;
            let closed = lab.a.limosa(&["allow", "test", "--here", "10.77.0.1"])?.expect_code(1)?;
            ensure!(closed.stdout.contains("the list is empty"), "{closed:?}");
        }
        lab.a.limosa(&["allow", "add", "--here", "10.0.0.0/8"])?.expect_code(0)?;
        lab.unharmed(&slow())
    });
}

#[test]
fn a_host_is_trusted_by_its_address_when_its_key_was_compared() {
    with_bare_lab(|lab| {
        lab.a.start_agent(config())?;
        lab.b.start_agent(config())?;
        let (a, b) = (lab.a.id()?, lab.b.id()?);
        let wrong = lab.a.limosa(&["host", "trust", "10.77.0.2", "--fingerprint", &a])?.expect_code(1)?;
        ensure!(wrong.stderr.contains("another key than the one expected"), "{wrong:?}");
        // Nobody is there to compare: nothing is trusted silently.
        let asked = lab.a.limosa(&["host", "trust", "b", "10.77.0.2"])?.expect_code(1)?;
        show(&asked);
        ensure!(
            asked.stderr.contains("--fingerprint") && lab.a.limosa(&["host", "list"])?.stdout.lines().count() == 1,
            "{asked:?}"
        );
        let grouped: Vec<String> = b.as_bytes().chunks(4).map(|four| String::from_utf8_lossy(four).into_owned()).collect();
        ensure!(asked.stderr.contains(&grouped.join("-")), "the key is not shown: {asked:?}");
        show(&lab.a.limosa(&["host", "trust", "b", "10.77.0.2", "--fingerprint", &grouped.join("-")])?.expect_code(0)?);
        show(&lab.b.limosa(&["host", "trust", "10.77.0.1", "--yes"])?.expect_code(0)?);
        show(&lab.b.limosa(&["host", "list"])?.expect_code(0)?);
        // A file is taken as a whole or not at all.
        let file = lab.a.file("hosts");
        let host = |name: &str, id: &str| format!("[[host]]\nname = \"{name}\"\nid = \"{id}\"\naddress = \"10.77.0.5\"\n");
        let other = limosa_proto::identity::HostId([7; 32]).to_string();
        std::fs::write(&file, format!("{}{}", host("c", &other), host("d", &b)))?;
        let name = file.to_string_lossy().into_owned();
        let refused = lab.a.limosa(&["host", "trust", "--file", &name])?.expect_code(1)?;
        ensure!(
            refused.stderr.contains("nothing was changed") && lab.a.ask(&["host", "list"])?.as_array().map(Vec::len) == Some(1),
            "{refused:?}"
        );
        std::fs::write(&file, host("c", &other))?;
        lab.a.limosa(&["host", "trust", "--file", &name])?.expect_code(0)?;
        ensure!(lab.a.ask(&["host", "list"])?.as_array().map(Vec::len) == Some(2), "c is not there");
        let guest = GuestSpec::new("web", 1);
        lab.guest(&guest)?;
        lab.good_migration(&guest)
    });
}

/// A command that is killed when the test fails.
struct AtTerminal(Child);

impl Drop for AtTerminal {
    fn drop(&mut self) {
        let _ = (self.0.kill(), self.0.wait());
    }
}

/// Runs `limosa host trust` of b on a at a terminal of its own, types `keys` when it has asked (None: the terminal goes away), and gives
/// the code and what was shown.
fn at_a_terminal(lab: &Lab, keys: Option<&[u8]>) -> Result<(i32, String)> {
    let (terminal, shown) = (nix::pty::openpty(None, None)?, lab.a.file("terminal"));
    // No child may have the other end, or it never goes away.
    fcntl(&terminal.master, FcntlArg::F_SETFD(FdFlag::FD_CLOEXEC))?;
    let mut command = lab.a.netns.command(process::limosa_bin()?);
    command.arg("--run-dir").arg(lab.a.run_dir()).args(["host", "trust", "b", "10.77.0.2"]);
    command.stdin(Stdio::from(terminal.slave)).stdout(Stdio::null()).stderr(std::fs::File::create(&shown)?);
    let mut child = AtTerminal(command.spawn()?);
    // The command's own copy of the terminal would keep it open.
    drop(command);
    let text = || rig::command::read_text(&shown);
    wait_for(SOON, "the question", || Ok(text().contains("(yes/no)").then_some(())))?;
    ensure!(child.0.try_wait()?.is_none() && count(&lab.a)? == 0, "it did not wait for an answer: {}", text());
    let mut master = std::fs::File::from(terminal.master);
    let open = match keys {
        Some(keys) => {
            master.write_all(keys)?;
            Some(master)
        }
        None => {
            drop(master);
            None
        }
    };
    let ended = wait_for(SOON, "the command's end", || Ok(child.0.try_wait()?))?;
    drop(open);
    Ok((ended.code().unwrap_or(-1), text()))
}

fn count(host: &Host) -> Result<usize> {
    Ok(host.ask(&["host", "list"])?.as_array().map_or(0, Vec::len))
}

#[test]
fn a_person_at_a_terminal_says_yes_or_nothing_is_trusted() {
    with_bare_lab(|lab| {
        lab.a.start_agent(config())?;
        lab.b.start_agent(config())?;
        let b = lab.b.id()?;
        let grouped: Vec<String> = b.as_bytes().chunks(4).map(|four| String::from_utf8_lossy(four).into_owned()).collect();
        let long = [&[b'y'; 5000][..], b"\nyes\n"].concat();
        // The last three: end of file (Ctrl-D) at once, behind a word, and the terminal closed.
        let no: [(&str, Option<&[u8]>); 9] = [
            ("no", Some(b"no\n")),
            ("y", Some(b"y\n")),
            ("YES", Some(b"YES\n")),
            ("nothing", Some(b"\n")),
            ("yes and more", Some(b"yes, I think\n")),
            ("a line of 5000 letters", Some(&long)),
            ("end of file", Some(b"\x04")),
            ("no, end of file", Some(b"no\x04\x04")),
            ("the terminal is closed", None),
        ];
        for (what, keys) in no {
            let (code, shown) = at_a_terminal(lab, keys).context(what)?;
            ensure!(code == 1 && shown.contains(&grouped.join("-")), "{what}: exit {code}, {shown}");
            ensure!(count(&lab.a)? == 0, "{what}: trusted");
        }
        // "yes" counts only where a person could have compared: not from a pipe.
        let mut command = lab.a.netns.command(process::limosa_bin()?);
        command.arg("--run-dir").arg(lab.a.run_dir()).args(["host", "trust", "b", "10.77.0.2"]);
        let mut piped = AtTerminal(command.stdin(Stdio::piped()).stderr(Stdio::piped()).stdout(Stdio::null()).spawn()?);
        let _ = piped.0.stdin.take().context("no pipe")?.write_all(b"yes\n");
        let ended = wait_for(SOON, "the command's end", || Ok(piped.0.try_wait()?))?;
        let said = std::io::read_to_string(piped.0.stderr.take().context("no pipe")?)?;
        ensure!(ended.code() == Some(1) && said.contains("nobody is there to compare") && count(&lab.a)? == 0, "{ended}: {said}");
        let (code, shown) = at_a_terminal(lab, Some(b"yes\n"))?;
        ensure!(code == 0 && lab.a.ask(&["host", "list"])?[0]["id"] == b.as_str(), "exit {code}, {shown}");
        lab.b.trust(&lab.a)?;
        let guest = GuestSpec::new("web", 1);
        lab.guest(&guest)?;
        lab.good_migration(&guest)
    });
}
