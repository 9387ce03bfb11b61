//! Lanes: how many, and whether they are encrypted; plaintext only where both hosts allow it.
#![allow(clippy::panic, clippy::unwrap_used, clippy::expect_used, missing_docs, unreachable_pub)]

use rig::{AgentConfig, Context, GuestSpec, Result, ensure, with_bare_lab, with_lab};

fn back_and_forth(plaintext: bool) {
    with_lab(AgentConfig::default().migration("plaintext_lanes", true), |lab| {
        let guest = GuestSpec::new("web", 1).dirty("20M", "32M").memory("128M", "48M");
        lab.guest(&guest)?;
        for (turn, lanes) in ["1", "4", "16"].into_iter().enumerate() {
            let (from, to) = if turn % 2 == 0 { (&lab.a, &lab.b) } else { (&lab.b, &lab.a) };
            let options = ["--lanes", lanes, if plaintext { "--plaintext" } else { "--no-plaintext" }];
            let report = from.migrate_well("web", to, &options).with_context(|| format!("{lanes} lanes"))?;
            ensure!(report["encrypted"] == !plaintext, "{report}");
            ensure!(report["lanes"].as_u64() == lanes.parse().ok(), "{report}");
            to.guest_verified("web", 1)?;
            lab.guest_is_on(&guest, to, from)?;
        }
        Ok(())
    });
}

#[test]
fn one_four_and_sixteen_tls_lanes() {
    back_and_forth(false);
}

#[test]
fn one_four_and_sixteen_plaintext_lanes() {
    back_and_forth(true);
}

/// `allowed` says which host's configuration allows plaintext lanes.
fn plaintext_refused(allowed_at_source: bool) {
    with_bare_lab(|lab| {
        let set = |on: bool| AgentConfig::default().migration("plaintext_lanes", on);
        lab.start_agents_with(set(allowed_at_source), set(!allowed_at_source))?;
        let guest = GuestSpec::new("web", 1);
        lab.guest(&guest)?;
        let output = lab.a.migrate("web", &lab.b, &["--plaintext"])?.expect_code(1)?;
        ensure!(output.all().contains("plaintext-refused"), "{output:?}");
        ensure!(lab.b.vmms(None).is_empty(), "a VMM was started for a refused migration");
        lab.guest_is_on(&guest, &lab.a, &lab.b)?;
        let report = lab.a.migrate_well("web", &lab.b, &["--no-plaintext"])?;
        ensure!(report["encrypted"] == true, "{report}");
        lab.guest_is_on(&guest, &lab.b, &lab.a)
    });
}

#[test]
fn plaintext_is_refused_when_only_the_source_allows_it() {
    plaintext_refused(true);
}

#[test]
fn plaintext_is_refused_when_only_the_destination_allows_it() {
    plaintext_refused(false);
}

#[test]
fn silly_numbers_of_lanes_are_refused_before_anything_happens() {
    with_lab(AgentConfig::default(), |lab| -> Result<()> {
        let guest = GuestSpec::new("web", 1);
        lab.guest(&guest)?;
        for lanes in ["0", "17", "-1", "many"] {
            lab.a.migrate("web", &lab.b, &["--lanes", lanes])?.expect_code(2)?;
        }
        lab.unharmed(&guest)
    });
}
