//! `limosa host …`: who this host is, which links and CPU it has, and whom it trusts. How a host is made trusted is in `trust`.

use super::{Context, Ended, strange, trust};
use crate::args_who::HostCommand;
use crate::output;
use limosa_agent::api::{Answer, HostCpuReport, HostInfo, HostReport, RdmaDevice, Request, exit};

pub(crate) fn run(context: &Context, command: HostCommand) -> Ended {
    let request = match command {
        HostCommand::Id => Request::HostId,
        HostCommand::Show => Request::HostShow,
        HostCommand::Cpu => Request::HostCpu,
        HostCommand::List => Request::HostList,
        HostCommand::Trust(args) => return trust::run(context, args),
        HostCommand::Remove { name } => return context.ask_done(&Request::HostRemove { name }),
        HostCommand::Revoke { which, undo, .. } => return context.ask_done(&Request::HostRevoke { which, undo }),
        HostCommand::Revoked => Request::HostRevoked,
        HostCommand::Rotate { finish: true, .. } => return context.ask_done(&Request::HostRotateFinish),
        HostCommand::Rotate { overlap, .. } => {
            output::note("limosa: on each host that trusts this one: `limosa host trust --statement LINE`, with this line");
            Request::HostRotate { overlap: overlap.as_secs() }
        }
    };
    match context.ask(&request)? {
        Answer::Host(host) if context.json => output::json(&host),
        // Only the id: it is meant to be pasted into `limosa host trust`.
        Answer::Host(host) => output::line(&host.id),
        Answer::HostShow(report) if context.json => output::json(&report),
        Answer::HostShow(report) => show(&report),
        Answer::HostCpu(report) if context.json => output::json(&report),
        Answer::HostCpu(report) => show_cpu(&report),
        Answer::Hosts(hosts) if context.json => output::json(&hosts),
        Answer::Hosts(hosts) => table(hosts),
        Answer::Lines(lines) if context.json => output::json(&lines),
        Answer::Lines(lines) => lines.iter().for_each(output::line),
        other => return Err(strange(&other)),
    }
    Ok(exit::DONE)
}

/// Hosts, one a line.
pub(crate) fn table(hosts: Vec<HostInfo>) {
    let mut rows = vec![["NAME", "ADDRESS", "ID"].map(String::from).to_vec()];
    rows.extend(hosts.into_iter().map(|host| vec![host.name, host.address, host.id]));
    output::table(&rows);
}

fn show(report: &HostReport) {
    let mut rows = vec![
        vec!["name".to_string(), report.name.clone()],
        vec!["id".into(), report.id.clone()],
        vec!["listens on".into(), report.addresses.join(", ")],
    ];
    for link in &report.links {
        let mut words = if link.available { format!("yes: {}", link.words) } else { format!("no: {}", link.words) };
        if !link.addresses.is_empty() {
            words = format!("{words}; {}", link.addresses.join(", "));
        }
        rows.push(vec![link.link.clone(), words]);
    }
    rows.extend(report.rdma_devices.iter().flat_map(device_rows));
    output::table(&rows);
}

fn show_cpu(report: &HostCpuReport) {
    let scaling = if report.tsc_scaling { "can be scaled for a guest" } else { "cannot be scaled for a guest" };
    let tsc = match report.tsc_khz {
        0 => "not known".into(),
        khz => format!("{}.{:03} MHz, {scaling}", khz / 1000, khz % 1000),
    };
    let mut rows = vec![
        vec!["host".to_string(), report.name.clone()],
        vec![
            "model".into(),
            format!("{} family {} model {} stepping {}", report.vendor, report.family, report.model, report.stepping),
        ],
        vec!["level".into(), report.level.clone().unwrap_or_else(|| "below x86-64-v1".into())],
        vec!["XSAVE".into(), format!("{} bytes: {}", report.xsave_bytes, report.xsave_components.join(" "))],
        vec!["TSC".into(), tsc],
        vec!["vCPUs".into(), format!("{} at most in a guest; the host has {} CPUs", report.vcpus_max, report.cpus)],
    ];
    if !report.brand.is_empty() {
        rows.insert(1, vec!["CPU".into(), report.brand.clone()]);
    }
    let mut name = "features";
    for line in wrapped(&report.features) {
        rows.push(vec![std::mem::take(&mut name).to_string(), line]);
    }
    let mut name = "kept back";
    for line in wrapped(&report.hidden) {
        rows.push(vec![std::mem::take(&mut name).to_string(), line]);
    }
    output::table(&rows);
}

/// Words in lines of about a hundred characters.
fn wrapped(words: &[String]) -> Vec<String> {
    let mut lines: Vec<String> = Vec::new();
    for word in words {
        match lines.last_mut().filter(|line| line.len() + word.len() < 100) {
            Some(line) => *line = format!("{line} {word}"),
            None => lines.push(word.clone()),
        }
    }
    lines
}

fn device_rows(device: &RdmaDevice) -> Vec<Vec<String>> {
    let paging = if device.on_demand { ", on-demand paging" } else { "" };
    let mut rows = vec![vec!["RDMA device".to_string(), format!("{} ({}{paging})", device.name, device.guid)]];
    for port in &device.ports {
        let words = format!(
            "port {}: {}, {}, MTU {} of at most {}",
            port.number, port.state, port.link_layer, port.mtu_active, port.mtu_max
        );
        rows.push(vec![String::new(), words]);
        for gid in &port.gids {
            let interface = gid.interface.as_deref().unwrap_or("no interface");
            rows.push(vec![String::new(), format!("  GID {}: {}, {}, {interface}", gid.index, gid.gid, gid.kind)]);
        }
    }
    rows
}
