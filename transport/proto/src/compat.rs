//! Compatibility: whether a guest can run on a host, and every reason why not. Pure: the host says what it has.

use crate::wire::code::Code;
use crate::wire::limits::{NAME_BYTES_MAX, REASONS_MAX, VCPUS_MAX, WORDS_BYTES_MAX, fit};
use crate::wire::message::{Reason, Refusal, VmDescription};

/// A network that a host is on.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NetworkOffer {
    /// Its name in the host's configuration.
    pub name: String,
    /// Its MTU in bytes.
    pub mtu: u16,
    /// Why it cannot be used now, for example a bridge that is missing; `None` if it can.
    pub broken: Option<String>,
}

/// What a host has to offer to an incoming guest.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct HostOffer {
    /// Its networks.
    pub networks: Vec<NetworkOffer>,
    /// Names of guests that are there.
    pub names_taken: Vec<String>,
    /// Identities of guests that are there.
    pub ids_taken: Vec<crate::identity::VmId>,
    /// Guest memory that there is room for, in bytes.
    pub memory_bytes_free: u64,
    /// The most virtual CPUs that a guest may have.
    pub vcpus_max: u32,
    /// Sizes of backing page that it can give, in bytes; 4096 always can.
    pub page_bytes: Vec<u64>,
    /// Kinds of VMM that it can start.
    pub vmms: Vec<String>,
    /// Kinds of record that its VMM can load, each with the newest version it knows. Empty: the VMM will say.
    pub records: Vec<(u16, u16)>,
}

/// Id of each reason and the code that it becomes on the wire.
const IDS: &[(&str, Code)] = &[
    ("name-taken", Code::NameTaken),
    ("id-taken", Code::NameTaken),
    ("network-missing", Code::NetworkMissing),
    ("network-broken", Code::NetworkMissing),
    ("network-mtu", Code::NetworkMissing),
    ("memory", Code::Memory),
    ("memory-room", Code::NoRoom),
    ("memory-page-size", Code::Memory),
    ("vcpus", Code::NoRoom),
    ("vmm-missing", Code::Incompatible),
    ("record-unknown", Code::Incompatible),
    ("record-newer", Code::Incompatible),
];

/// The code of the first reason.
#[must_use]
pub fn code(reasons: &[Reason]) -> Code {
    let known = |reason: &Reason| IDS.iter().find(|(id, _)| *id == reason.id).map(|(_, code)| *code);
    reasons.first().and_then(known).unwrap_or(Code::Incompatible)
}

/// The refusal that `reasons` make, if there is any reason.
#[must_use]
pub fn refusal(reasons: Vec<Reason>) -> Option<Refusal> {
    (!reasons.is_empty()).then(|| Refusal { code: code(&reasons), reasons })
}

fn mib(bytes: u64) -> u64 {
    bytes >> 20
}

/// Names as a list for people; long lists and long names are cut.
fn names<'a>(names: impl Iterator<Item = &'a str>) -> String {
    let all: Vec<String> = names.map(|name| format!("\"{}\"", fit(name, 40))).collect();
    match all.len() {
        0 => "none".to_owned(),
        1..=8 => all.join(", "),
        more => format!("{} and {} more", all.get(..8).unwrap_or_default().join(", "), more - 8),
    }
}

/// Every reason why `vm` cannot run on a host that offers `host`; none if it can.
#[must_use]
pub fn check(vm: &VmDescription, host: &HostOffer) -> Vec<Reason> {
    let mut reasons = Vec::new();
    let mut add = |id: &str, words: String| {
        reasons.push(Reason { id: fit(id, NAME_BYTES_MAX), words: fit(&words, WORDS_BYTES_MAX) });
    };
    check_name(vm, host, &mut add);
    check_networks(vm, host, &mut add);
    check_room(vm, host, &mut add);
    check_vmm(vm, host, &mut add);
    reasons.truncate(REASONS_MAX);
    reasons
}

fn check_name(vm: &VmDescription, host: &HostOffer, add: &mut impl FnMut(&str, String)) {
    if vm.name.is_empty() || vm.name.len() > NAME_BYTES_MAX || vm.name.chars().any(|c| c.is_control() || c == '/') {
        add("name-taken", "the guest's name is empty, too long, or has characters that no name has".to_owned());
    } else if host.names_taken.contains(&vm.name) {
        add("name-taken", format!("a guest named \"{}\" is on the destination already: rename or remove it", vm.name));
    }
    if host.ids_taken.contains(&vm.id) {
        add("id-taken", format!("the guest with the id {} is on the destination already", vm.id));
    }
}

fn check_networks(vm: &VmDescription, host: &HostOffer, add: &mut impl FnMut(&str, String)) {
    for nic in &vm.nics {
        let Some(offer) = host.networks.iter().find(|offer| offer.name == nic.network) else {
            let there = names(host.networks.iter().map(|offer| offer.name.as_str()));
            let name = &nic.network;
            add("network-missing", format!("the guest is on the network \"{name}\"; the destination has: {there}"));
            continue;
        };
        if let Some(why) = &offer.broken {
            add("network-broken", format!("the network \"{}\" cannot be used at the destination: {why}", offer.name));
        }
        if offer.mtu < nic.mtu {
            let (name, wants, has) = (&offer.name, nic.mtu, offer.mtu);
            add("network-mtu", format!("the guest uses an MTU of {wants} on \"{name}\"; the destination has {has} there"));
        }
    }
}

fn check_room(vm: &VmDescription, host: &HostOffer, add: &mut impl FnMut(&str, String)) {
    let (wants, has) = (vm.memory.bytes(), host.memory_bytes_free);
    if wants > has {
        let words = format!("the guest has {} MiB of memory; the destination has room for {} MiB", mib(wants), mib(has));
        add("memory-room", words);
    }
    for region in vm.memory.regions() {
        if region.page_bytes != 4096 && !host.page_bytes.contains(&region.page_bytes) {
            let has: Vec<String> = host.page_bytes.iter().map(u64::to_string).collect();
            let words = format!("memory is on pages of {} bytes; the destination has: 4096 {}", region.page_bytes, has.join(" "));
            add("memory-page-size", words);
            break;
        }
    }
    let most = host.vcpus_max.min(VCPUS_MAX);
    if vm.vcpus == 0 || vm.vcpus > most {
        add("vcpus", format!("the guest has {} virtual CPUs; the destination runs guests with 1 to {most}", vm.vcpus));
    }
}

fn check_vmm(vm: &VmDescription, host: &HostOffer, add: &mut impl FnMut(&str, String)) {
    if !host.vmms.contains(&vm.vmm) {
        let there = names(host.vmms.iter().map(String::as_str));
        let words = format!("the guest runs in the VMM \"{}\"; the destination can start: {there}", fit(&vm.vmm, 40));
        add("vmm-missing", words);
        return;
    }
    if host.records.is_empty() {
        return;
    }
    for (kind, version) in &vm.records {
        match host.records.iter().find(|(known, _)| known == kind) {
            None => add("record-unknown", format!("its state has records of kind {kind}; the destination's VMM knows none")),
            Some((_, newest)) if newest < version => {
                let words = format!("its state has records of kind {kind} version {version}; the destination's VMM knows up to {newest}");
                add("record-newer", words);
            }
            Some(_) => {}
        }
    }
}
