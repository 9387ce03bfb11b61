//! A guest's CPU against a host's: everything that the guest uses and the host cannot give it, in words that name it.
//! What a guest only knows its CPU by (brand, topology, caches) is not compared: it keeps that.

use super::features::{Register, registers};
use super::limit::{FAULTS, covers};
use super::{CpuProfile, MSR_ARCH_CAPABILITIES, component_name};

/// How far two clocks may be apart and still count as the same, in parts per million: KVM's own tolerance.
pub const TSC_TOLERANCE_PPM: u64 = 250;

/// Names of the bits of ARCH_CAPABILITIES.
const ARCH_CAPABILITIES: &[(u32, &str)] = &[
    (0, "rdcl_no"),
    (1, "ibrs_all"),
    (3, "skip_l1dfl_vmentry"),
    (4, "ssb_no"),
    (5, "mds_no"),
    (6, "pschange_mc_no"),
    (7, "tsx_ctrl"),
    (8, "taa_no"),
    (13, "sbdr_ssdp_no"),
    (14, "fbsdp_no"),
    (15, "psdp_no"),
    (17, "fb_clear"),
    (18, "fb_clear_ctrl"),
    (20, "bhi_no"),
    (24, "pbrsb_no"),
    (26, "gds_no"),
    (27, "rfds_no"),
    (28, "rfds_clear"),
    (62, "its_no"),
];

/// What a host cannot give to a guest. Empty: it can run it.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Comparison {
    /// Vendors of guest and host, where they differ.
    pub vendor: Option<(String, String)>,
    /// Each missing feature: `avx2 (CPUID 7.0 EBX bit 5)`.
    pub features: Vec<String>,
    /// Each component of extended state that is missing or lies elsewhere.
    pub xsave: Vec<String>,
    /// Frequencies of guest and host in kHz, where they differ and the host cannot change its guests'.
    pub tsc_khz: Option<(u32, u32)>,
}

impl Comparison {
    /// Whether the guest can run on the host.
    #[must_use]
    pub fn fits(&self) -> bool {
        *self == Comparison::default()
    }

    /// Everything in one sentence, for those who have no list of reasons; `host` is what the host is called.
    #[must_use]
    pub fn words(&self, host: &str) -> String {
        let mut parts = Vec::new();
        parts.extend(self.vendor.as_ref().map(|(guest, here)| vendor_words(guest, here, host)));
        if !self.features.is_empty() {
            parts.push(feature_words(&self.features, host));
        }
        if !self.xsave.is_empty() {
            parts.push(xsave_words(&self.xsave, host));
        }
        parts.extend(self.tsc_khz.map(|(guest, here)| tsc_words(guest, here, host)));
        parts.join("; ")
    }
}

pub(crate) fn vendor_words(guest: &str, here: &str, host: &str) -> String {
    format!("the guest was started on a CPU of {guest} and {host} has one of {here}: a running guest cannot change between them")
}

pub(crate) fn feature_words(features: &[String], host: &str) -> String {
    format!("the guest uses CPU features that {host} lacks: {}", cut(features))
}

pub(crate) fn xsave_words(components: &[String], host: &str) -> String {
    format!("the guest's extended registers (XSAVE) do not fit {host}: {}", cut(components))
}

pub(crate) fn tsc_words(guest: u32, here: u32, host: &str) -> String {
    let mhz = |khz: u32| format!("{}.{:03} MHz", khz / 1000, khz % 1000);
    format!(
        "the guest's time stamp counter runs at {} and that of {host} at {}, and its CPU cannot scale it",
        mhz(guest),
        mhz(here)
    )
}

/// A list for people that fits into a reason: cut, with a count.
fn cut(items: &[String]) -> String {
    const SHOWN: usize = 16;
    match items.get(..SHOWN).filter(|_| items.len() > SHOWN) {
        Some(first) => format!("{} and {} more", first.join(", "), items.len() - SHOWN),
        None => items.join(", "),
    }
}

/// What `host` cannot give to a guest that sees `guest`. One that says nothing is not compared.
#[must_use]
pub fn compare(guest: &CpuProfile, host: &CpuProfile) -> Comparison {
    if guest.is_empty() || host.is_empty() {
        return Comparison::default();
    }
    let (ours, theirs) = (guest.vendor(), host.vendor());
    Comparison {
        vendor: (ours != theirs).then_some((ours, theirs)),
        features: missing_features(guest, host),
        xsave: missing_components(guest, host),
        tsc_khz: other_clock(guest, host),
    }
}

fn missing_features(guest: &CpuProfile, host: &CpuProfile) -> Vec<String> {
    // Whole registers first: a destination compares every vCPU that was saved, while the guest stands still.
    let value = |profile: &CpuProfile, one: &Register| profile.value(one.function, one.index, one.reg);
    let lacking = registers().iter().filter(|one| value(guest, one) & !value(host, one) != 0);
    let lacks = |feature: &super::Feature| guest.has(*feature) && !host.has(*feature);
    let mut missing: Vec<String> =
        lacking.flat_map(Register::features).filter(lacks).map(|feature| feature.to_string()).collect();
    let (wants, has) = (guest.physical_bits(), host.physical_bits());
    if wants > has && has != 0 {
        missing.push(format!("physical addresses of {wants} bits, where it has {has} (CPUID 0x80000008 EAX)"));
    }
    if !covers(host.counters(), guest.counters()) {
        missing.push("arch_perfmon with the guest's counters (CPUID 0xa)".to_owned());
    }
    let (wants, has) = (guest.msr(MSR_ARCH_CAPABILITIES).unwrap_or(0), host.msr(MSR_ARCH_CAPABILITIES).unwrap_or(0));
    let lacks = wants & !has & !FAULTS;
    for bit in (0..u64::BITS).filter(|bit| lacks >> bit & 1 == 1) {
        let name = ARCH_CAPABILITIES.iter().find(|(of, _)| *of == bit);
        missing.push(match name {
            Some((_, name)) => format!("{name} (MSR {MSR_ARCH_CAPABILITIES:#x} bit {bit})"),
            None => format!("MSR {MSR_ARCH_CAPABILITIES:#x} bit {bit}"),
        });
    }
    missing
}

fn missing_components(guest: &CpuProfile, host: &CpuProfile) -> Vec<String> {
    let (wants, has) = (guest.xcr0(), host.xcr0());
    let mut found = Vec::new();
    for bit in (0..u64::BITS).filter(|bit| wants >> bit & 1 == 1) {
        let name = component_name(bit);
        if has >> bit & 1 == 0 {
            found.push(format!("component {bit} ({name}) is missing"));
            continue;
        }
        let place = |profile: &CpuProfile| profile.leaf(0xd, bit).map(|leaf| (leaf.eax, leaf.ebx));
        let (Some((bytes, at)), Some((bytes_there, at_there))) = (place(guest), place(host)) else { continue };
        if bit >= 2 && (bytes, at) != (bytes_there, at_there) {
            let words =
                format!("component {bit} ({name}) has {bytes} bytes at {at} in the guest and {bytes_there} at {at_there} there");
            found.push(words);
        }
    }
    found
}

fn other_clock(guest: &CpuProfile, host: &CpuProfile) -> Option<(u32, u32)> {
    let (wants, has) = (guest.tsc_khz, host.tsc_khz);
    if wants == 0 || has == 0 || host.tsc_scaling {
        return None;
    }
    let apart = u64::from(wants.abs_diff(has)) * 1_000_000 > u64::from(wants) * TSC_TOLERANCE_PPM;
    apart.then_some((wants, has))
}
