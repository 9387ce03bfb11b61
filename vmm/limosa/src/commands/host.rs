//! `limosa host id|trust|list|remove`: who this host is and whom it trusts.

use super::{Context, Ended, strange};
use crate::args::HostCommand;
use crate::output;
use limosa_agent::api::{Answer, HostInfo, Request, exit};

pub(crate) fn run(context: &Context, command: HostCommand) -> Ended {
    let request = match command {
        HostCommand::Id => Request::HostId,
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
