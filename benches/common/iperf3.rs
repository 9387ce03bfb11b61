//! iperf3 as the ceiling of a TCP path: the words it is called with, and what its JSON says. Starting it is the caller's.

use super::record::Sample;
use anyhow::{Context, Result, ensure};
use serde_json::Value;

/// The destination's words: one test, then it ends.
pub(crate) fn receiving(port: u16) -> Vec<String> {
    ["iperf3", "-s", "-1", "-p", &port.to_string()].map(str::to_owned).to_vec()
}

/// The source's words: one stream of 1 MiB writes for so many seconds, cubic.
pub(crate) fn sending(address: &str, port: u16, seconds: u32) -> Vec<String> {
    let (port, seconds) = (port.to_string(), seconds.to_string());
    ["iperf3", "-c", address, "-p", &port, "-l", "1M", "-t", &seconds, "-C", "cubic", "-J"].map(str::to_owned).to_vec()
}

/// What the source's end printed.
///
/// # Errors
/// It is no result.
pub(crate) fn sample(printed: &[u8]) -> Result<Sample> {
    let out: Value = serde_json::from_slice(printed).context("iperf3 printed no JSON")?;
    if let Some(words) = out["error"].as_str() {
        anyhow::bail!("iperf3: {words}");
    }
    let end = &out["end"];
    let received = &end["sum_received"];
    let bytes = received["bytes"].as_u64().context("iperf3 says nothing of bytes")?;
    let seconds = received["seconds"].as_f64().context("iperf3 says nothing of seconds")?;
    ensure!(bytes > 0 && seconds > 0.0, "iperf3 moved nothing");
    let cpu = |key: &str| end["cpu_utilization_percent"][key].as_f64().map(|percent| percent / 100.0 * seconds);
    let (cpu_source, cpu_destination) = (cpu("host_total"), cpu("remote_total"));
    Ok(Sample { bytes, seconds, cpu_source, cpu_destination, ..Sample::default() })
}
