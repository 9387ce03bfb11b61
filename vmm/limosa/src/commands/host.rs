//! `limosa host id|show|trust|list|remove`: who this host is, which links it has, and whom it trusts.

use super::{Context, Ended, strange};
use crate::args::HostCommand;
use crate::output;
use limosa_agent::api::{Answer, HostInfo, HostReport, RdmaDevice, Request, exit};

pub(crate) fn run(context: &Context, command: HostCommand) -> Ended {
    let request = match command {
        HostCommand::Id => Request::HostId,
        HostCommand::Show => Request::HostShow,
        HostCommand::List => Request::HostList,
        HostCommand::Trust { name, id, address } => {
            return context.ask_done(&Request::HostTrust(HostInfo { name, id, address }));
        }
        HostCommand::Remove { name } => return context.ask_done(&Request::HostRemove { name }),
    };
    match context.ask(&request)? {
        Answer::Host(host) if context.json => output::json(&host),
        // Only the id: it is meant to be pasted into `limosa host trust`.
        Answer::Host(host) => output::line(&host.id),
        Answer::HostShow(report) if context.json => output::json(&report),
        Answer::HostShow(report) => show(&report),
        Answer::Hosts(hosts) if context.json => output::json(&hosts),
        Answer::Hosts(hosts) => {
            let mut rows = vec![["NAME", "ADDRESS", "ID"].map(String::from).to_vec()];
            rows.extend(hosts.into_iter().map(|host| vec![host.name, host.address, host.id]));
            output::table(&rows);
        }
        other => return Err(strange(&other)),
    }
    Ok(exit::DONE)
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
