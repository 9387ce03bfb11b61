//! The levels of the x86-64 psABI as baselines for guests: what a level is, which one a CPU reaches, and the smallest CPU that a
//! guest boots with. How a guest's CPU is cut down to one is in `limit`.

use super::{CpuProfile, Feature, Leaf, Reg, features, features_named};

/// Names of the levels, from 1.
pub const LEVELS: [&str; 4] = ["x86-64-v1", "x86-64-v2", "x86-64-v3", "x86-64-v4"];

/// What each level adds to the one below.
const ADDED: [&[&str]; 4] = [
    &["fpu", "cx8", "cmov", "mmx", "fxsr", "sse", "sse2", "syscall", "lm"],
    &["pni", "ssse3", "sse4_1", "sse4_2", "popcnt", "cx16", "lahf_lm"],
    &["avx", "avx2", "bmi1", "bmi2", "f16c", "fma", "abm", "movbe", "xsave"],
    &["avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl"],
];

/// What every 64-bit kernel takes for granted beside the first level, and what KVM makes by itself on any host: the hypervisor
/// bit, its interrupt controller and its clocks.
const PLATFORM: &[&str] = &[
    "vme",
    "de",
    "pse",
    "tsc",
    "msr",
    "pae",
    "mce",
    "apic",
    "sep",
    "mtrr",
    "pge",
    "mca",
    "pat",
    "pse36",
    "clflush",
    "nx",
    "arat",
    "x2apic",
    "tsc_deadline_timer",
    "hypervisor",
    "kvmclock",
    "kvm_nopiodelay",
    "kvmclock2",
    "kvmclock_stable",
];

/// What KVM makes by itself, and a guest can do without.
const PARAVIRTUAL: &[&str] = &["kvm_steal_time", "kvm_pv_eoi", "kvm_pv_unhalt"];

/// XCR0 of each level: x87 and SSE (of no use without XSAVE), AVX, AVX-512.
const XCR0: [u32; 4] = [0, 0, 0b111, 0b1110_0111];

fn profile(names: impl Iterator<Item = &'static str>, xcr0: u32, physical_bits: u8) -> CpuProfile {
    let mut profile = CpuProfile::default();
    for feature in names.flat_map(features_named) {
        let register = feature.register();
        if profile.leaf(register.function, register.index).is_none() {
            profile.leaves.push(Leaf { function: register.function, index: register.index, ..Leaf::default() });
        }
        if let Some(leaf) = profile.leaf_mut(register.function, register.index) {
            *leaf.slot(register.reg) |= 1 << feature.bit();
        }
    }
    profile.leaves.push(Leaf { function: 0xd, index: 0, eax: xcr0, ..Leaf::default() });
    profile.leaves.push(Leaf { function: 0x8000_0008, eax: physical_bits.into(), ..Leaf::default() });
    profile
}

/// The features of a level (1 to 4) and what a kernel needs beside them, to be used as a limit; none for another number.
/// `physical_bits` is how long the guest's physical addresses may be; 0: as long as the host's.
#[must_use]
pub fn baseline(level: usize, physical_bits: u8) -> Option<CpuProfile> {
    let added = ADDED.get(..level).filter(|added| !added.is_empty())?;
    let names = added.iter().copied().flatten().chain(PLATFORM).chain(PARAVIRTUAL).copied();
    Some(profile(names, XCR0.get(level - 1).copied().unwrap_or(0), physical_bits))
}

/// The smallest CPU that a 64-bit guest boots with, to be used as a limit.
#[must_use]
pub fn minimum(physical_bits: u8) -> CpuProfile {
    profile(ADDED.iter().take(1).copied().flatten().chain(PLATFORM).copied(), 0, physical_bits)
}

/// The features of a level (1 to 4) that `profile` lacks.
#[must_use]
pub fn lacking(profile: &CpuProfile, level: usize) -> Vec<Feature> {
    let wanted = ADDED.get(..level).unwrap_or_default().iter().copied().flatten();
    let lacks = |name: &&&'static str| !profile.has_named(name);
    let mut missing: Vec<Feature> = wanted.filter(lacks).filter_map(|name| features_named(name).next()).collect();
    let xcr0 = level.checked_sub(1).and_then(|level| XCR0.get(level)).copied().unwrap_or(0);
    if missing.is_empty() && u64::from(xcr0) & !profile.xcr0() != 0 {
        // The instructions are there and the registers cannot be switched on: it is as if they were not.
        let name = if level == 4 { "avx512f" } else { "avx" };
        missing.extend(features_named(name).next());
    }
    missing
}

/// The highest level that `profile` reaches; 0: not even the first.
#[must_use]
pub fn level(profile: &CpuProfile) -> usize {
    (1..=LEVELS.len()).take_while(|level| lacking(profile, *level).is_empty()).last().unwrap_or(0)
}

impl CpuProfile {
    /// Takes features away by name, with all that cannot be without them.
    #[must_use]
    pub fn without(&self, names: &[String]) -> CpuProfile {
        let mut less = self.clone();
        for feature in features().filter(|feature| feature.name().is_some_and(|name| names.iter().any(|hidden| hidden == name))) {
            less.clear(feature);
        }
        less.consistent()
    }

    /// The names of the components of extended state that it has.
    #[must_use]
    pub fn component_names(&self) -> Vec<&'static str> {
        let xcr0 = self.xcr0();
        (0..u64::BITS).filter(|bit| xcr0 >> bit & 1 == 1).map(super::component_name).collect()
    }

    pub(super) fn clear(&mut self, feature: Feature) {
        let (register, bit) = (feature.register(), feature.bit());
        if let Some(leaf) = self.leaf_mut(register.function, register.index) {
            *leaf.slot(register.reg) &= !(1 << bit);
        }
    }

    /// The counters of the performance monitor: version, counters, their width, fixed ones, their width. Zeros: none.
    pub(super) fn counters(&self) -> [u32; 5] {
        let (eax, edx) = (self.value(0xa, 0, Reg::Eax), self.value(0xa, 0, Reg::Edx));
        if eax & 0xff == 0 { [0; 5] } else { [eax & 0xff, eax >> 8 & 0xff, eax >> 16 & 0xff, edx & 0x1f, edx >> 5 & 0xff] }
    }
}
