//! The tests of `transport/verbs` and of the RDMA link need a device, and the one of VLANs a kernel whose bridges filter them: here
//! they run inside a machine of the soft-RoCE lab, as they are, and every one of them must pass there; a test that skips in the lab
//! fails here.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::print_stdout, missing_docs)]
#![forbid(unsafe_code)]

use rig::roce::{Machine, test_binary, with_machines};
use rig::{Context, Result, ensure};
use std::time::Duration;

const LIMIT: Duration = Duration::from_secs(400);

/// Runs the test program, only tests that have `filter` in their name, and gives how many passed.
fn run(machine: &Machine, package: &str, test: &str, filter: &[&str]) -> Result<usize> {
    let program = test_binary(package, test, &[])?.display().to_string();
    let words = [&[program.as_str(), "--nocapture", "--test-threads", "1"], filter].concat();
    let output = machine.task(&words).env("LIMOSA_IN_LAB", "1").env("LIMOSA_DEMAND_ALL", "1").limit(LIMIT).run()?;
    let (text, errors) = (output.text(), output.errors());
    ensure!(output.ok(), "{package} {test} in the lab ended with {}:\n{text}\n{errors}", output.status());
    ensure!(!text.contains("skipped:") && !errors.contains("skipped:"), "{package} {test} skipped in the lab:\n{text}\n{errors}");
    let passed = text.lines().find_map(|line| line.strip_prefix("test result: ok. ")?.split(' ').next()?.parse().ok());
    let passed: usize = passed.with_context(|| format!("no result in\n{text}"))?;
    println!("{package} {test} {filter:?}: {passed} passed in the lab");
    Ok(passed)
}

#[test]
fn verbs_and_the_rdma_link_pass_their_tests_on_a_device() {
    with_machines(|machines| {
        let alpha = machines.alpha();
        ensure!(run(alpha, "limosa-verbs", "device", &[])? >= 20);
        ensure!(run(alpha, "limosa-link", "rdma", &[])? >= 10);
        ensure!(run(alpha, "limosa-link", "conformance", &["rdma"])? >= 10);
        // Bridges that filter VLANs, which the build machines' kernel has not.
        ensure!(run(alpha, "limosa-machine", "tap", &["a_tap_in_a_vlan"])? == 1);
        ensure!(run(alpha, "limosa-announce", "network", &["filtering_bridge_gets"])? == 1);
        ensure!(run(alpha, "rig", "network", &["a_guest_in_a_vlan"])? == 1);
        Ok(())
    });
}
