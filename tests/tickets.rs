//! Tickets, the operator's key and the allow-list as people and CI meet them: the commands that need no agent.
#![allow(clippy::panic, clippy::unwrap_used, clippy::expect_used, missing_docs, unreachable_pub)]

use limosa_proto::identity::HostId;
use rig::command::{Output, limosa};
use rig::process::limosa_bin;
use rig::{Context, Result, ensure};
use std::io::Write as _;
use std::os::unix::fs::PermissionsExt as _;
use std::process::{Command, Stdio};

const VM: &str = "000102030405060708090a0b0c0d0e0f";

/// An operator with a key of their own, and two hosts.
struct Operator {
    folder: tempfile::TempDir,
    source: String,
    destination: String,
}

impl Operator {
    fn new() -> Result<Operator> {
        let folder = tempfile::tempdir()?;
        Ok(Operator { folder, source: HostId([1; 32]).to_string(), destination: HostId([2; 32]).to_string() })
    }

    fn key(&self) -> String {
        self.folder.path().join("keys/operator.key").to_string_lossy().into_owned()
    }

    fn run(&self, words: &[&str]) -> Result<Output> {
        let key = self.key();
        limosa(&[words, &["--key", &key]].concat())
    }

    fn id(&self) -> Result<String> {
        Ok(self.run(&["operator", "id"])?.expect_code(0)?.stdout.trim().to_owned())
    }

    fn make(&self, more: &[&str]) -> Result<String> {
        let words = ["ticket", "make", "--source", &self.source, "--destination", &self.destination];
        Ok(self.run(&[&words[..], more].concat())?.expect_code(0)?.stdout.trim().to_owned())
    }

    /// Everything is as the ticket says but what `more` says; an option given there replaces the one here.
    fn verify(&self, ticket: &str, more: &[(&str, &str)]) -> Result<Output> {
        let mut options = vec![
            ("--vm", VM),
            ("--source", self.source.as_str()),
            ("--destination", self.destination.as_str()),
            ("--action", "migrate"),
            ("--link", "tcp"),
        ];
        for (name, value) in more.iter().copied() {
            options.retain(|(known, _)| *known != name);
            options.push((name, value));
        }
        let words = options.iter().flat_map(|(name, value)| [*name, *value]);
        self.run(&["--json", "ticket", "verify", ticket].into_iter().chain(words).collect::<Vec<_>>())
    }

    fn refused(&self, ticket: &str, more: &[(&str, &str)], code: &str) -> Result<Output> {
        let output = self.verify(ticket, more)?.expect_code(1)?;
        ensure!(output.json()?["error"]["code"] == code, "{more:?}: no {code} in {output:?}");
        Ok(output)
    }
}

#[test]
fn an_operators_key_is_made_once_and_kept_to_its_owner() -> Result<()> {
    let operator = Operator::new()?;
    let first = operator.run(&["operator", "id"])?.expect_code(0)?.expect_words("a new key was made")?;
    let id = first.stdout.trim();
    ensure!(id.len() == 52 && operator.id()? == id, "{first:?}");
    let mode = std::fs::metadata(operator.key())?.permissions().mode() & 0o777;
    ensure!(mode == 0o600, "mode {mode:o}");
    let json = operator.run(&["--json", "operator", "id"])?.expect_code(0)?.json()?;
    ensure!(json["id"] == id && json["key"] == operator.key(), "{json}");
    std::fs::set_permissions(operator.key(), std::fs::Permissions::from_mode(0o644))?;
    operator.run(&["operator", "id"])?.expect_code(2)?.expect_words("chmod 600")?;
    Ok(())
}

#[test]
fn a_ticket_is_made_shown_and_verified() -> Result<()> {
    let operator = Operator::new()?;
    let id = operator.id()?;
    let ticket = operator.make(&["--vm", VM, "--link", "tcp", "--link", "quic"])?;
    ensure!(ticket.starts_with("limosa-ticket-1.") && !ticket.contains(char::is_whitespace), "{ticket}");
    let shown = limosa(&["ticket", "show", &ticket])?.expect_code(0)?;
    for word in [VM, &operator.source, &operator.destination, &id, "migrate, once", "tcp, quic", "whether anybody trusts"] {
        ensure!(shown.stdout.contains(word), "{word} is not in {shown:?}");
    }
    let json = limosa(&["--json", "ticket", "show", &ticket])?.expect_code(0)?.json()?;
    let life =
        json["claims"]["not_after"].as_u64().context("no time")? - json["claims"]["not_before"].as_u64().context("none")?;
    ensure!(life == 600 && json["signature_fits"] == true && json["claims"]["issuer"] == id, "{json}");
    let json = operator.verify(&ticket, &[])?.expect_code(0)?.json()?;
    ensure!(json["ok"] == true && json["not_compared"] == serde_json::json!([]), "{json}");
    // What was not given is named, and words are for people without --json.
    let output = operator.run(&["ticket", "verify", &ticket, "--vm", VM])?.expect_code(0)?;
    output.expect_words("the ticket is good until")?.expect_words("not compared: --source, --destination, --action, --link")?;
    Ok(())
}

#[test]
fn a_ticket_for_anything_else_is_refused_with_its_code() -> Result<()> {
    let operator = Operator::new()?;
    let (ticket, id) = (operator.make(&["--vm", VM, "--link", "tcp"])?, operator.id()?);
    let other = HostId([3; 32]).to_string();
    let another = Operator::new()?.id()?;
    operator.refused(&ticket, &[("--vm", "ff0102030405060708090a0b0c0d0e0f")], "ticket-guest")?.expect_words(VM)?;
    operator.refused(&ticket, &[("--source", &other)], "ticket-source")?.expect_words(&operator.source)?;
    operator.refused(&ticket, &[("--destination", &other)], "ticket-destination")?.expect_words(&other)?;
    operator.refused(&ticket, &[("--action", "check")], "ticket-action")?.expect_words("--action check")?;
    operator.refused(&ticket, &[("--link", "rdma")], "ticket-link")?.expect_words("--link")?;
    operator.refused(&ticket, &[("--operator", &another)], "ticket-issuer")?.expect_words(&id)?;
    operator.refused(&ticket, &[("--at", "2000-01-01T00:00:00Z")], "ticket-not-yet")?.expect_words("timedatectl")?;
    operator.refused(&ticket, &[("--at", "2999-01-01T00:00:00Z")], "ticket-expired")?.expect_words("make another")?;
    operator.verify(&ticket, &[("--operator", &id)])?.expect_code(0)?;
    for (text, code) in [("limosa-ticket-7.AAAA", "ticket-version"), ("ticket", "ticket-malformed")] {
        operator.refused(text, &[], code)?;
    }
    // One character changed: the signature does not fit, and `show` says so.
    let at = ticket.len() - 5;
    let with = if &ticket[at..=at] == "A" { "B" } else { "A" };
    let changed = format!("{}{with}{}", &ticket[..at], &ticket[at + 1..]);
    operator.refused(&changed, &[], "ticket-signature")?;
    limosa(&["ticket", "show", &changed])?.expect_code(1)?.expect_words("IS NOT ITS ISSUER'S")?;
    Ok(())
}

#[test]
fn clocks_may_differ_by_what_is_set() -> Result<()> {
    let operator = Operator::new()?;
    let ticket = operator.make(&["--vm", VM, "--from", "2030-01-01T00:00:00Z", "--until", "2030-01-01T01:00:00Z"])?;
    for (at, skew, good) in [
        ("2029-12-31T23:59:30Z", "30s", true),
        ("2029-12-31T23:59:29Z", "30s", false),
        ("2029-12-31T23:59:29Z", "31s", true),
        ("2030-01-01T01:00:30Z", "30s", true),
        ("2030-01-01T01:00:31Z", "30s", false),
        ("2030-01-01T01:02:00Z", "2m", true),
    ] {
        let output = operator.verify(&ticket, &[("--at", at), ("--skew", skew)])?;
        ensure!(output.code == i32::from(!good), "{at} {skew}: {output:?}");
    }
    Ok(())
}

#[test]
fn a_standing_delegation_is_for_names_and_lives_long() -> Result<()> {
    let operator = Operator::new()?;
    let ticket = operator.make(&["--vms", "web-*", "--life", "30days"])?;
    let verify = |name: &str| operator.run(&["--json", "ticket", "verify", &ticket, "--name", name]);
    let json = verify("web-7")?.expect_code(0)?.json()?;
    ensure!(json["claims"]["vms"] == "web-*" && json["claims"]["single_use"] == false, "{json}");
    verify("db")?.expect_code(1)?.expect_words("ticket-guest")?;
    // One guest has no such long life, and neither has a pattern for ever.
    let ends = ["ticket", "make", "--source", &operator.source, "--destination", &operator.destination];
    for more in [["--vm", VM, "--life", "8days"], ["--vms", "*", "--life", "2years"], ["--vm", VM, "--life", "0s"]] {
        let output = operator.run(&[&["--json"][..], &ends, &more].concat())?.expect_code(2)?;
        ensure!(output.json()?["error"]["code"] == "ticket-senseless", "{output:?}");
    }
    let same = ["ticket", "make", "--vm", VM, "--source", &operator.source, "--destination", &operator.source];
    operator.run(&same)?.expect_code(2)?.expect_words("the same host")?;
    Ok(())
}

#[test]
fn a_ticket_can_come_by_standard_input_and_nobody_is_trusted_by_default() -> Result<()> {
    let operator = Operator::new()?;
    let ticket = operator.make(&["--vm", VM])?;
    let by_input = |input: &[u8]| -> Result<i32> {
        let mut command = Command::new(limosa_bin()?);
        command.args(["ticket", "show", "-"]).stdin(Stdio::piped()).stdout(Stdio::null()).stderr(Stdio::null());
        let mut child = command.spawn()?;
        // The command may have ended before it was told everything.
        let _ = child.stdin.take().context("no input")?.write_all(input);
        Ok(child.wait()?.code().unwrap_or(-1))
    };
    ensure!(by_input(format!("\n{ticket}\n").as_bytes())? == 0, "a ticket by standard input was refused");
    ensure!(by_input(&vec![b'A'; 10 << 20])? == 1, "ten megabytes were taken for a ticket");
    ensure!(by_input(&[0xff, 0xfe])? == 2, "what is no text is an error of usage");
    let missing = operator.folder.path().join("none").to_string_lossy().into_owned();
    limosa(&["ticket", "verify", &ticket, "--key", &missing])?.expect_code(2)?.expect_words("--operator")?;
    ensure!(!std::path::Path::new(&missing).exists(), "verifying made a key");
    Ok(())
}

#[test]
fn the_allow_list_says_which_rule_decides() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let file = folder.path().join("agent.toml");
    std::fs::write(&file, "[allow]\npeers = [\"192.0.2.7\", \"10.20.3.4/16\", \"fd00::/8\", \"fe80::/10\"]\n")?;
    let file = file.to_string_lossy().into_owned();
    let test = |address: &str| limosa(&["--json", "allow", "test", address, "--config", &file]);
    for (address, rule) in [("10.20.9.9", 2), ("::ffff:10.20.9.9", 2), ("fd00::1", 3), ("fe80::1%eth0", 4), ("192.0.2.7", 1)] {
        let json = test(address)?.expect_code(0)?.json()?;
        ensure!(json["allowed"] == true && json["rule"]["position"] == rule, "{address}: {json}");
    }
    for address in ["10.21.0.1", "192.0.2.8", "::1", "::10.20.9.9"] {
        let json = test(address)?.expect_code(1)?.json()?;
        ensure!(json["allowed"] == false && json["rule"].is_null() && json["rules"] == 4, "{address}: {json}");
    }
    test("hosta")?.expect_code(2)?.expect_words("names are not looked up")?;
    let words = limosa(&["allow", "test", "10.20.9.9", "--config", &file])?.expect_code(0)?;
    words.expect_words("allowed by rule 2, \"10.20.3.4/16\"")?.expect_words("bits beyond its prefix")?;
    let list = limosa(&["allow", "list", "--config", &file])?.expect_code(0)?;
    ensure!(list.stdout.lines().count() == 5 && list.stdout.contains("10.20.0.0/16"), "{list:?}");
    std::fs::write(&file, "")?;
    limosa(&["allow", "list", "--config", &file])?.expect_code(0)?.expect_words("no host may connect")?;
    test("10.20.9.9")?.expect_code(1)?.expect_words("the list is empty")?;
    Ok(())
}
