//! Who may come in: addresses, keys. Refusals with other reasons are in `refuse`.
#![allow(clippy::panic, clippy::unwrap_used, clippy::expect_used, missing_docs, unreachable_pub)]

use limosa_proto::identity::HostId;
use rig::host::PORT;
use rig::{AgentConfig, GuestSpec, ensure, with_bare_lab, with_lab};
use std::io::Read;
use std::net::TcpStream;
use std::time::{Duration, Instant};

#[test]
fn an_address_not_on_the_list_is_refused_in_words_on_both_sides() {
    with_bare_lab(|lab| {
        lab.start_agents_with(AgentConfig::default(), AgentConfig::default().peers(&["10.99.0.0/16", "fd00::/8"]))?;
        let guest = GuestSpec::new("web", 1);
        lab.guest(&guest)?;
        let output = lab.a.migrate("web", &lab.b, &[])?.expect_code(1)?;
        ensure!(output.all().contains("not-allowed"), "no code: {output:?}");
        let words = ["destination b does not allow 10.77.0.1", "destination 10.77.0.2:13560 does not allow 10.77.0.1"];
        ensure!(words.iter().any(|words| output.all().contains(words)), "{output:?}");
        ensure!(lab.b.vmms(None).is_empty(), "a VMM was started for a stranger");
        ensure!(
            lab.b.agent_log().contains("10.77.0.1"),
            "the destination's log does not name the address:\n{}",
            lab.b.agent_log()
        );
        lab.a.guest_lives("web")?;

        // The destination lets the address in now; nothing else has changed.
        lab.b.stop_agent()?;
        lab.b.start_agent(AgentConfig::default())?;
        lab.unharmed(&guest)
    });
}

#[test]
fn strangers_are_closed_before_a_byte_and_logged_once_a_second_at_most() {
    with_bare_lab(|lab| {
        lab.start_agents_with(AgentConfig::default(), AgentConfig::default().peers(&["10.77.0.1/32"]))?;
        let before = lab.b.agent_log().lines().filter(|l| l.contains("10.77.0.9")).count();
        let start = Instant::now();
        let closed = lab.watch.within(|| {
            let mut closed = 0;
            for _ in 0..200 {
                let mut stream = TcpStream::connect(("10.77.0.2", PORT))?;
                stream.set_read_timeout(Some(Duration::from_secs(2)))?;
                // Not a byte is sent: closing must not wait for one.
                closed += match stream.read(&mut [0u8; 1]) {
                    Ok(0) => 1,
                    Err(e) if e.kind() == std::io::ErrorKind::ConnectionReset => 1,
                    _ => 0,
                };
            }
            Ok(closed)
        })?;
        ensure!(closed == 200, "only {closed} of 200 were closed");
        std::thread::sleep(Duration::from_millis(1200));
        let seconds = start.elapsed().as_secs() + 2;
        let lines = lab.b.agent_log().lines().filter(|l| l.contains("10.77.0.9")).count() - before;
        ensure!(lines >= 1 && lines as u64 <= seconds, "{lines} log lines in {seconds} s");
        let guest = GuestSpec::new("web", 1);
        lab.guest(&guest)?;
        lab.good_migration(&guest)
    });
}

#[test]
fn a_source_with_an_unknown_key_is_refused_in_words() {
    with_lab(AgentConfig::default(), |lab| {
        let guest = GuestSpec::new("web", 1);
        lab.guest(&guest)?;
        lab.b.limosa(&["host", "remove", "a"])?.expect_code(0)?;
        let output = lab.a.migrate("web", &lab.b, &[])?.expect_code(1)?;
        ensure!(output.all().contains("unknown-host"), "no code: {output:?}");
        output.expect_words("does not trust")?;
        ensure!(lab.b.vmms(None).is_empty(), "a VMM was started for a stranger");
        lab.b.trust(&lab.a)?;
        lab.unharmed(&guest)
    });
}

#[test]
fn a_destination_with_another_key_is_refused_in_words() {
    with_lab(AgentConfig::default(), |lab| {
        let guest = GuestSpec::new("web", 1);
        lab.guest(&guest)?;
        // The source expects a third host's id at b's address: whoever answers there is somebody else.
        lab.a.limosa(&["host", "remove", "b"])?.expect_code(0)?;
        lab.a.trust_id("b", &HostId([7; 32]).to_string(), &lab.b.address().to_string())?;
        let output = lab.a.migrate("web", &lab.b, &[])?.expect_code(1)?;
        ensure!(output.all().contains("unknown-host"), "no code: {output:?}");
        output.expect_words(&lab.b.id()?)?;
        lab.a.limosa(&["host", "remove", "b"])?.expect_code(0)?;
        lab.a.trust(&lab.b)?;
        lab.unharmed(&guest)
    });
}

#[test]
fn a_host_that_nobody_named_is_no_destination() {
    with_lab(AgentConfig::default(), |lab| {
        let guest = GuestSpec::new("web", 1);
        lab.guest(&guest)?;
        let output = lab.a.limosa(&["migrate", "web", "--to", "nowhere"])?.expect_code(1)?;
        ensure!(output.all().contains("nowhere"), "{output:?}");
        lab.unharmed(&guest)
    });
}
