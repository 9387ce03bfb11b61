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
    // Found by the host, which has the files.
    ("disk-folder", Code::Disk),
    ("disk-missing", Code::Disk),
    ("disk-not-shared", Code::Disk),
    ("disk-format", Code::Disk),
    ("disk-locks", Code::Disk),
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
                let words =
                    format!("its state has records of kind {kind} version {version}; the destination's VMM knows up to {newest}");
                add("record-newer", words);
            }
            Some(_) => {}
        }
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use crate::identity::VmId;
    use crate::memory::{Gpa, MemoryMap, Region};
    use crate::wire::message::NicDescription;

    fn vm() -> VmDescription {
        let region = Region { gpa: Gpa(0), bytes: 1 << 30, page_bytes: 4096 };
        VmDescription {
            id: VmId([5; 16]),
            name: "web".to_owned(),
            vcpus: 2,
            memory: MemoryMap::new(vec![region]).unwrap(),
            nics: vec![NicDescription {
                mac: [2, 0, 0, 0, 0, 1],
                network: "lan".to_owned(),
                mtu: 1500,
                vlan: None,
                addresses: vec![],
            }],
            disks: vec![],
            vmm: "limosa".to_owned(),
            records: vec![(1, 1), (2, 3)],
            config: vec![],
        }
    }

    fn host() -> HostOffer {
        HostOffer {
            networks: vec![NetworkOffer { name: "lan".to_owned(), mtu: 1500, broken: None }],
            memory_bytes_free: 1 << 30,
            vcpus_max: 2,
            vmms: vec!["limosa".to_owned()],
            records: vec![(1, 1), (2, 3)],
            ..HostOffer::default()
        }
    }

    fn found(vm: &VmDescription, host: &HostOffer) -> Vec<(String, String)> {
        check(vm, host).into_iter().map(|reason| (reason.id, reason.words)).collect()
    }

    fn one(change: impl FnOnce(&mut VmDescription, &mut HostOffer)) -> (String, String) {
        let (mut vm, mut host) = (vm(), host());
        change(&mut vm, &mut host);
        let mut all = found(&vm, &host);
        assert_eq!(all.len(), 1, "{all:?}");
        all.remove(0)
    }

    #[test]
    fn a_guest_that_fits_has_no_reason() {
        assert_eq!(found(&vm(), &host()), []);
        assert_eq!(refusal(check(&vm(), &host())), None);
        let unsaid = HostOffer { records: vec![], ..host() };
        assert_eq!(found(&vm(), &unsaid), [], "a VMM that says nothing of records is asked later");
    }

    #[test]
    fn each_reason_has_its_id_and_says_what_is_there() {
        let (id, words) = one(|vm, _| vm.nics[0].network = "dmz".to_owned());
        assert_eq!(
            (id.as_str(), words.as_str()),
            ("network-missing", "the guest is on the network \"dmz\"; the destination has: \"lan\"")
        );
        let (id, words) = one(|_, host| host.networks[0].broken = Some("bridge br0 is missing".to_owned()));
        assert!(id == "network-broken" && words.contains("bridge br0 is missing"), "{words}");
        let (id, words) = one(|vm, _| vm.nics[0].mtu = 9000);
        assert!(id == "network-mtu" && words.contains("9000") && words.contains("1500"), "{words}");
        let (id, words) = one(|_, host| host.names_taken.push("web".to_owned()));
        assert!(id == "name-taken" && words.contains("\"web\""), "{words}");
        assert_eq!(one(|_, host| host.ids_taken.push(VmId([5; 16]))).0, "id-taken");
        let (id, words) = one(|_, host| host.memory_bytes_free = 1 << 29);
        assert!(id == "memory-room" && words.contains("1024 MiB") && words.contains("512 MiB"), "{words}");
        let (id, words) = one(|vm, _| vm.vcpus = 3);
        assert!(id == "vcpus" && words.contains("1 to 2"), "{words}");
        assert_eq!(one(|vm, _| vm.vcpus = 0).0, "vcpus");
        let (id, words) = one(|vm, _| vm.vmm = "qemu".to_owned());
        assert!(id == "vmm-missing" && words.contains("\"limosa\""), "{words}");
        assert_eq!(one(|vm, _| vm.records.push((9, 1))).0, "record-unknown");
        let (id, words) = one(|vm, _| vm.records[1] = (2, 4));
        assert!(id == "record-newer" && words.contains("version 4") && words.contains("up to 3"), "{words}");
        let huge = Region { gpa: Gpa(0), bytes: 1 << 30, page_bytes: 2 << 20 };
        let map = MemoryMap::new(vec![huge]).unwrap();
        assert_eq!(one(|vm, _| vm.memory = map).0, "memory-page-size");
        assert_eq!(one(|vm, _| vm.name = "../etc".to_owned()).0, "name-taken");
    }

    #[test]
    fn every_reason_is_found_and_the_first_one_gives_the_code() {
        let host = HostOffer::default();
        let ids: Vec<String> = check(&vm(), &host).into_iter().map(|reason| reason.id).collect();
        assert_eq!(ids, ["network-missing", "memory-room", "vcpus", "vmm-missing"]);
        let refusal = refusal(check(&vm(), &host)).unwrap();
        assert_eq!((refusal.code, refusal.reasons.len()), (Code::NetworkMissing, 4));
        assert!(refusal.words().contains("; "));
    }

    #[test]
    fn words_stay_within_the_limits_of_a_message() {
        let mut vm = vm();
        vm.nics = vec![vm.nics[0].clone(); 64];
        vm.nics.iter_mut().for_each(|nic| nic.network = "x".repeat(256));
        let networks = (0..1000).map(|n| NetworkOffer { name: format!("{n}").repeat(60), mtu: 1, broken: None }).collect();
        let reasons = check(&vm, &HostOffer { networks, ..HostOffer::default() });
        assert!(reasons.len() <= REASONS_MAX && reasons.iter().all(|reason| reason.words.len() <= WORDS_BYTES_MAX));
    }
}
