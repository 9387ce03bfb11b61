//! Compatibility: whether a guest can run on a host, and every reason why not. Pure: the host says what it has.

use crate::cpu::{self, CpuProfile};
use crate::wire::code::Code;
use crate::wire::limits::{NAME_BYTES_MAX, REASONS_MAX, VCPUS_MAX, WORDS_BYTES_MAX, fit};
use crate::wire::message::{NicDescription, Reason, Refusal, VmDescription};

/// A network that a host is on.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct NetworkOffer {
    /// Its name in the host's configuration.
    pub name: String,
    /// Its MTU in bytes, as the host's configuration has it.
    pub mtu: u16,
    /// The bridge that it is reached through.
    pub bridge: String,
    /// The MTU in bytes that the bridge really has; `None` where nothing says so.
    pub bridge_mtu: Option<u32>,
    /// Whether a NIC of it may be in a VLAN: the bridge filters them.
    pub vlans: bool,
    /// Why it cannot be used now, for example a bridge that is missing; `None` if it can.
    pub broken: Option<String>,
}

/// Who on a host has a MAC address.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct MacHolder {
    /// The address.
    pub mac: [u8; 6],
    /// Who, in words: "the guest \"db\"".
    pub who: String,
}

/// What a host has to offer to an incoming guest.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct HostOffer {
    /// Its networks.
    pub networks: Vec<NetworkOffer>,
    /// Names of guests that are there.
    pub names_taken: Vec<String>,
    /// MAC addresses that are taken there; of several holders of one the first is named.
    pub macs_taken: Vec<MacHolder>,
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
    /// What it is called, for reasons that are read at the other side; empty: "the destination".
    pub name: String,
    /// The CPU that it can give to guests. Empty: it does not know, and the VMM will say.
    pub cpu: CpuProfile,
}

/// Id of each reason and the code that it becomes on the wire.
const IDS: &[(&str, Code)] = &[
    ("name-taken", Code::NameTaken),
    ("id-taken", Code::NameTaken),
    ("network-missing", Code::NetworkMissing),
    ("network-broken", Code::NetworkMissing),
    ("network-mtu", Code::NetworkMissing),
    ("network-vlan", Code::NetworkMissing),
    ("mac-taken", Code::MacTaken),
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
    ("cpu-vendor", Code::Cpu),
    ("cpu-feature", Code::Cpu),
    ("cpu-xsave", Code::Cpu),
    ("tsc-frequency", Code::Cpu),
    ("shutdown", Code::Shutdown),
    ("busy", Code::Busy),
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
    check_nics(&vm.nics, host, THERE, &mut add);
    check_room(vm, host, &mut add);
    check_vmm(vm, host, &mut add);
    check_cpu(vm, host, &mut add);
    reasons.truncate(REASONS_MAX);
    reasons
}

/// How the host is called in reasons that its source is told.
const THERE: &str = "the destination";

/// Every reason why these NICs cannot be on a host that offers `host`, which the reasons call `place`.
#[must_use]
pub fn nic_reasons(nics: &[NicDescription], host: &HostOffer, place: &str) -> Vec<Reason> {
    let mut reasons = Vec::new();
    check_nics(nics, host, place, &mut |id, words| {
        reasons.push(Reason { id: fit(id, NAME_BYTES_MAX), words: fit(&words, WORDS_BYTES_MAX) });
    });
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

fn check_nics(nics: &[NicDescription], host: &HostOffer, place: &str, add: &mut impl FnMut(&str, String)) {
    for nic in nics {
        check_mac(nic, host, place, add);
        let Some(offer) = host.networks.iter().find(|offer| offer.name == nic.network) else {
            let there = names(host.networks.iter().map(|offer| offer.name.as_str()));
            let name = &nic.network;
            add("network-missing", format!("the guest is on the network \"{name}\"; {place} has: {there}"));
            continue;
        };
        if let Some(why) = &offer.broken {
            add("network-broken", format!("the network \"{}\" cannot be used at {place}: {why}", offer.name));
            continue;
        }
        if let Some(vlan) = nic.vlan.filter(|_| !offer.vlans) {
            let (name, bridge) = (&offer.name, &offer.bridge);
            let words =
                format!("the guest is in VLAN {vlan} of \"{name}\"; the bridge {bridge} of {place} does not filter VLANs");
            add("network-vlan", words);
        }
        check_mtu(nic, offer, place, add);
    }
}

/// Larger is no harm: a guest sends what its own MTU allows, and receives what others on its network send.
fn check_mtu(nic: &NicDescription, offer: &NetworkOffer, place: &str, add: &mut impl FnMut(&str, String)) {
    let (name, wants, set, bridge) = (&offer.name, nic.mtu, offer.mtu, &offer.bridge);
    let small = offer.bridge_mtu.filter(|real| *real < u32::from(wants));
    if set >= wants && small.is_none() {
        return;
    }
    let real = offer.bridge_mtu.map_or(String::new(), |real| format!(", and its bridge {bridge} has {real}"));
    add("network-mtu", format!("the guest uses an MTU of {wants} on \"{name}\"; {place} is configured for {set} there{real}"));
}

/// Two holders of one MAC on one network take each other's frames.
fn check_mac(nic: &NicDescription, host: &HostOffer, place: &str, add: &mut impl FnMut(&str, String)) {
    if let Some(holder) = host.macs_taken.iter().find(|holder| holder.mac == nic.mac) {
        let mac = nic.mac.map(|byte| format!("{byte:02x}")).join(":");
        let who = fit(&holder.who, 200);
        add(
            "mac-taken",
            format!("the MAC address {mac} of the guest is taken at {place}, by {who}; every NIC needs one of its own"),
        );
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

fn check_cpu(vm: &VmDescription, host: &HostOffer, add: &mut impl FnMut(&str, String)) {
    let found = cpu::compare(&vm.cpu, &host.cpu);
    let name = if host.name.is_empty() { "the destination".to_owned() } else { fit(&host.name, 40) };
    if let Some((guest, here)) = &found.vendor {
        add("cpu-vendor", cpu::vendor_words(guest, here, &name));
    }
    if !found.features.is_empty() {
        add("cpu-feature", cpu::feature_words(&found.features, &name));
    }
    if !found.xsave.is_empty() {
        add("cpu-xsave", cpu::xsave_words(&found.xsave, &name));
    }
    if let Some((guest, here)) = found.tsc_khz {
        add("tsc-frequency", cpu::tsc_words(guest, here, &name));
    }
}

/// Whether `reasons` are about the guest's CPU, so that another choice of it at its start would have helped.
#[must_use]
pub fn is_about_cpu(reasons: &[Reason]) -> bool {
    reasons.iter().any(|reason| matches!(reason.id.as_str(), "cpu-feature" | "cpu-xsave"))
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
            cpu: CpuProfile::default(),
        }
    }

    fn host() -> HostOffer {
        HostOffer {
            networks: vec![NetworkOffer {
                name: "lan".to_owned(),
                mtu: 1500,
                bridge: "br0".to_owned(),
                ..NetworkOffer::default()
            }],
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
        let (id, words) = one(|_, host| host.networks[0].bridge_mtu = Some(1400));
        assert!(id == "network-mtu" && ["1500", "br0", "1400"].iter().all(|part| words.contains(part)), "{words}");
        let larger = HostOffer {
            networks: vec![NetworkOffer { name: "lan".to_owned(), mtu: 9000, bridge_mtu: Some(9000), ..NetworkOffer::default() }],
            ..host()
        };
        assert_eq!(found(&vm(), &larger), [], "what is larger is no harm");
        let (id, words) = one(|vm, _| vm.nics[0].vlan = Some(7));
        assert!(id == "network-vlan" && words.contains("VLAN 7") && words.contains("br0"), "{words}");
        let holder = |mac| MacHolder { mac, who: "the guest \"db\"".to_owned() };
        let (id, words) = one(|_, host| host.macs_taken = vec![holder([2, 0, 0, 0, 0, 2]), holder([2, 0, 0, 0, 0, 1])]);
        assert!(id == "mac-taken" && words.contains("02:00:00:00:00:01") && words.contains("\"db\""), "{words}");
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
    fn each_difference_of_the_cpu_has_its_id() {
        use crate::cpu::Leaf;
        let cpu = |ebx, vendor| CpuProfile {
            leaves: vec![
                Leaf { function: 0, ebx: vendor, ..Leaf::default() },
                Leaf { function: 7, ebx, ..Leaf::default() },
                Leaf { function: 0xd, eax: ebx & 0b100 | 0b11, ..Leaf::default() },
            ],
            tsc_khz: 2_000_000,
            ..CpuProfile::default()
        };
        let (id, words) = one(|vm, host| {
            (vm.cpu, host.cpu) = (cpu(1 << 5 | 1 << 3, 0x756e_6547), cpu(1 << 3, 0x756e_6547));
            host.name = "beta".to_owned();
        });
        let said = "the guest uses CPU features that beta lacks: avx2 (CPUID 7.0 EBX bit 5)";
        assert_eq!((id.as_str(), words.as_str()), ("cpu-feature", said));
        let (id, words) = one(|vm, host| (vm.cpu, host.cpu) = (cpu(0, 0x756e_6547), cpu(0, 0x6874_7541)));
        assert!(id == "cpu-vendor" && words.contains("Genu") && words.contains("Auth") && words.contains("the destination"));
        let (id, words) = one(|vm, host| {
            (vm.cpu, host.cpu) = (cpu(0, 1), cpu(0, 1));
            vm.cpu.leaves[2].eax = 0b111;
        });
        assert!(id == "cpu-xsave" && words.contains("component 2 (avx) is missing"), "{words}");
        let (id, words) = one(|vm, host| {
            (vm.cpu, host.cpu) = (cpu(0, 1), cpu(0, 1));
            host.cpu.tsc_khz = 2_500_000;
        });
        assert!(id == "tsc-frequency" && words.contains("2000.000 MHz") && words.contains("2500.000 MHz"), "{words}");
        let reasons = |id: &str| vec![Reason { id: id.to_owned(), words: String::new() }];
        assert_eq!(code(&reasons("cpu-xsave")), Code::Cpu);
        assert!(is_about_cpu(&reasons("cpu-feature")) && !is_about_cpu(&reasons("vcpus")));
        let (mut silent, mut told) = (vm(), host());
        told.cpu = cpu(0, 1);
        assert_eq!(found(&silent, &told), [], "a guest whose VMM says nothing of its CPU");
        silent.cpu = told.cpu;
        assert_eq!(found(&silent, &host()), [], "a host that does not know its own: the VMM will say");
    }

    #[test]
    fn words_stay_within_the_limits_of_a_message() {
        let mut vm = vm();
        vm.nics = vec![vm.nics[0].clone(); 64];
        vm.nics.iter_mut().for_each(|nic| nic.network = "x".repeat(256));
        let networks =
            (0..1000).map(|n| NetworkOffer { name: format!("{n}").repeat(60), mtu: 1, ..NetworkOffer::default() }).collect();
        let reasons = check(&vm, &HostOffer { networks, ..HostOffer::default() });
        assert!(reasons.len() <= REASONS_MAX && reasons.iter().all(|reason| reason.words.len() <= WORDS_BYTES_MAX));
    }
}
