//! `limosa vm start|list|show|stop`: guests on this host.

use super::{Context, Ended, absolute, strange};
use crate::args::VmCommand;
use crate::output;
use limosa_agent::api::{Answer, Request, VmInfo, exit};

pub(crate) fn run(context: &Context, command: VmCommand) -> Ended {
    let request = match command {
        VmCommand::Start { config } => Request::VmStart { config: absolute(&config)? },
        VmCommand::List => Request::VmList,
        VmCommand::Show { vm } => Request::VmShow { vm },
        VmCommand::Console { vm } => return super::console::run(context, vm),
        VmCommand::Stop { vm } => return context.ask_done(&Request::VmStop { vm }),
    };
    match context.ask(&request)? {
        Answer::Vm(vm) if context.json => output::json(&vm),
        Answer::Vm(vm) => show(&vm),
        Answer::Vms(vms) if context.json => output::json(&vms),
        Answer::Vms(vms) => list(&vms),
        other => return Err(strange(&other)),
    }
    Ok(exit::DONE)
}

fn show(vm: &VmInfo) {
    let mut rows = vec![
        vec!["name".into(), vm.name.clone()],
        vec!["id".into(), vm.id.clone()],
        vec!["state".into(), vm.state.clone()],
        vec!["memory".into(), output::bytes(vm.memory_bytes)],
        vec!["vCPUs".into(), vm.vcpus.to_string()],
        vec!["process".into(), vm.pid.to_string()],
    ];
    rows.extend(vm.nics.iter().map(|nic| vec!["NIC".into(), nic.clone()]));
    output::table(&rows);
}

fn list(vms: &[VmInfo]) {
    let mut rows = vec![["NAME", "STATE", "MEMORY", "VCPUS", "PROCESS"].map(String::from).to_vec()];
    let row = |vm: &VmInfo| {
        vec![vm.name.clone(), vm.state.clone(), output::bytes(vm.memory_bytes), vm.vcpus.to_string(), vm.pid.to_string()]
    };
    rows.extend(vms.iter().map(row));
    output::table(&rows);
}
