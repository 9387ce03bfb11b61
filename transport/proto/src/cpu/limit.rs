//! Cutting a CPU down: to what another one has too, to a baseline, or by features that a host keeps back; and making what is left
//! consistent, so that no feature stays without what it is built on and the XSAVE area has no room for what is gone.

use super::features::registers;
use super::{CpuProfile, Leaf, MSR_ARCH_CAPABILITIES, Reg, features_named};

/// Bits of ARCH_CAPABILITIES that tell of a fault instead of its absence: RSBA and RRSBA. Of two CPUs, one having it is enough.
pub(super) const FAULTS: u64 = 1 << 2 | 1 << 19;

/// A feature and what it cannot be without.
const BUILT_ON: &[(&str, &str)] = &[
    ("ssse3", "pni"),
    ("sse4_1", "ssse3"),
    ("sse4_2", "sse4_1"),
    ("avx", "xsave"),
    ("avx", "sse4_2"),
    ("f16c", "avx"),
    ("fma", "avx"),
    ("fma4", "avx"),
    ("xop", "avx"),
    ("vaes", "avx"),
    ("vaes", "aes"),
    ("vpclmulqdq", "avx"),
    ("vpclmulqdq", "pclmulqdq"),
    ("sm3", "avx"),
    ("avx2", "avx"),
    ("avx_vnni", "avx2"),
    ("avx_ifma", "avx2"),
    ("avx_vnni_int8", "avx2"),
    ("avx_vnni_int16", "avx2"),
    ("avx_ne_convert", "avx2"),
    ("sha512", "avx2"),
    ("sm4", "avx2"),
    ("avx512f", "avx2"),
    ("avx512dq", "avx512f"),
    ("avx512ifma", "avx512f"),
    ("avx512pf", "avx512f"),
    ("avx512er", "avx512f"),
    ("avx512cd", "avx512f"),
    ("avx512bw", "avx512f"),
    ("avx512vl", "avx512f"),
    ("avx512vbmi", "avx512bw"),
    ("avx512_vbmi2", "avx512bw"),
    ("avx512_bitalg", "avx512bw"),
    ("avx512_fp16", "avx512bw"),
    ("avx512_bf16", "avx512bw"),
    ("avx512_vnni", "avx512f"),
    ("avx512_vpopcntdq", "avx512f"),
    ("avx512_4vnniw", "avx512f"),
    ("avx512_4fmaps", "avx512f"),
    ("avx512_vp2intersect", "avx512f"),
    ("avx10", "avx512f"),
    ("xsaveopt", "xsave"),
    ("xsavec", "xsave"),
    ("xgetbv1", "xsave"),
    ("xsaves", "xsavec"),
    ("xfd", "xsave"),
    ("pku", "xsave"),
    ("mpx", "xsave"),
    ("apx_f", "xsave"),
    ("amx_tile", "xsave"),
    ("amx_int8", "amx_tile"),
    ("amx_bf16", "amx_tile"),
    ("amx_fp16", "amx_tile"),
    ("amx_complex", "amx_tile"),
];

/// A component of extended state and the feature that it belongs to: neither is without the other.
const COMPONENTS: &[(u32, &str)] = &[
    (2, "avx"),
    (3, "mpx"),
    (4, "mpx"),
    (5, "avx512f"),
    (6, "avx512f"),
    (7, "avx512f"),
    (9, "pku"),
    (17, "amx_tile"),
    (18, "amx_tile"),
    (19, "apx_f"),
];

/// Leaves that describe one feature, and say nothing without it.
const DESCRIBED: &[(u32, &str)] = &[
    (0x12, "sgx"),
    (0x14, "intel_pt"),
    (0x19, "key_locker"),
    (0x1c, "arch_lbr"),
    (0x1d, "amx_tile"),
    (0x1e, "amx_tile"),
    (0x24, "avx10"),
    (0x8000_000a, "svm"),
    (0x8000_0022, "perfmon_v2"),
];

/// The area that XSAVE fills begins with 512 bytes of x87 and SSE and a header of 64.
const LEGACY_BYTES: u32 = 576;

impl CpuProfile {
    /// What of this CPU `limit` has too. Who it is, its topology, its caches and its clock stay as they are. A limit that says
    /// nothing limits nothing.
    #[must_use]
    pub fn limited_to(&self, limit: &CpuProfile) -> CpuProfile {
        let mut less = self.clone();
        if limit.is_empty() {
            return less;
        }
        for register in registers() {
            let (function, index, reg) = (register.function, register.index, register.reg);
            let kept = limit.value(function, index, reg) | !register.mask;
            if let Some(leaf) = less.leaf_mut(function, index) {
                *leaf.slot(reg) &= kept;
            }
        }
        if let Some(leaf) = less.leaf_mut(0xd, 0) {
            leaf.eax &= limit.value(0xd, 0, Reg::Eax);
            leaf.edx &= limit.value(0xd, 0, Reg::Edx);
        }
        if let Some(leaf) = less.leaf_mut(0xd, 1) {
            leaf.ecx &= limit.value(0xd, 1, Reg::Ecx);
            leaf.edx &= limit.value(0xd, 1, Reg::Edx);
        }
        let bits = limit.physical_bits();
        if let Some(leaf) = less.leaf_mut(0x8000_0008, 0).filter(|leaf| bits != 0 && bits < leaf.eax & 0xff) {
            leaf.eax = leaf.eax & !0xff | bits;
        }
        less.limit_counters(limit);
        less.msrs.retain_mut(|(index, value)| match limit.msr(*index) {
            Some(other) => {
                *value = *value & other & !FAULTS | (*value | other) & FAULTS;
                true
            }
            None => false,
        });
        less.consistent()
    }

    fn limit_counters(&mut self, limit: &CpuProfile) {
        if covers(limit.counters(), self.counters()) {
            return;
        }
        let fewer = limit.leaf(0xa, 0).copied().filter(|_| covers(self.counters(), limit.counters()));
        if let Some(leaf) = self.leaf_mut(0xa, 0) {
            *leaf = fewer.unwrap_or(Leaf { function: 0xa, ..Leaf::default() });
        }
    }

    /// The same without what is built on something that it lacks, and with an XSAVE area of just what it has.
    #[must_use]
    pub fn consistent(mut self) -> CpuProfile {
        loop {
            let before = self.clone();
            for (feature, base) in BUILT_ON {
                if !self.has_named(base) {
                    self.clear_named(feature);
                }
            }
            if self.msr(MSR_ARCH_CAPABILITIES).is_none() {
                self.clear_named("arch_capabilities");
            }
            if self.counters() == [0; 5] {
                self.clear_named("pdcm");
            }
            self.match_components();
            if self == before {
                break;
            }
        }
        if !self.has_named("arch_capabilities") {
            self.msrs.retain(|(index, _)| *index != MSR_ARCH_CAPABILITIES);
        }
        for (function, feature) in DESCRIBED {
            if !self.has_named(feature) {
                for leaf in self.leaves.iter_mut().filter(|leaf| leaf.function == *function) {
                    *leaf = Leaf { function: leaf.function, index: leaf.index, ..Leaf::default() };
                }
            }
        }
        self.lay_out_area();
        self
    }

    fn clear_named(&mut self, name: &str) {
        for feature in features_named(name) {
            self.clear(feature);
        }
    }

    /// Drops components without their feature, and features without their component.
    fn match_components(&mut self) {
        let mut xcr0 = if self.has_named("xsave") { self.xcr0() } else { 0 };
        for (component, feature) in COMPONENTS {
            if !self.has_named(feature) {
                xcr0 &= !(1 << component);
            } else if xcr0 >> component & 1 == 0 {
                self.clear_named(feature);
            }
        }
        if xcr0 & 0b11 != 0b11 {
            self.clear_named("xsave");
            xcr0 = 0;
        }
        let cet = self.has_named("shstk") || self.has_named("ibt");
        if let Some(leaf) = self.leaf_mut(0xd, 0) {
            leaf.eax = xcr0 as u32;
            leaf.edx = (xcr0 >> 32) as u32;
        }
        if let Some(leaf) = self.leaf_mut(0xd, 1).filter(|_| !cet) {
            leaf.ecx &= !(0b11 << 11);
        }
    }

    /// Sizes of the XSAVE area by the components that are left; the leaves of those that are gone go too.
    fn lay_out_area(&mut self) {
        let xcr0 = self.xcr0();
        let supervisor = u64::from(self.value(0xd, 1, Reg::Ecx)) | u64::from(self.value(0xd, 1, Reg::Edx)) << 32;
        let compacts = self.has_named("xsavec");
        let all = if self.has_named("xsaves") { xcr0 | supervisor } else { xcr0 };
        let kept = |leaf: &Leaf| leaf.function != 0xd || leaf.index < 2 || (leaf.index < 64 && all >> leaf.index & 1 == 1);
        self.leaves.retain(kept);
        let mut components: Vec<Leaf> =
            self.leaves.iter().filter(|leaf| leaf.function == 0xd && leaf.index >= 2).copied().collect();
        components.sort_by_key(|leaf| leaf.index);
        let (mut whole, mut compact) = (LEGACY_BYTES, LEGACY_BYTES);
        for leaf in &components {
            if xcr0 >> leaf.index & 1 == 1 {
                whole = whole.max(leaf.ebx.saturating_add(leaf.eax));
            }
            let aligned = if leaf.ecx & 0b10 != 0 { compact.checked_next_multiple_of(64).unwrap_or(u32::MAX) } else { compact };
            compact = aligned.saturating_add(leaf.eax);
        }
        if xcr0 == 0 {
            (whole, compact) = (0, 0);
        }
        if let Some(leaf) = self.leaf_mut(0xd, 0) {
            (leaf.ebx, leaf.ecx) = (whole, whole);
        }
        if let Some(leaf) = self.leaf_mut(0xd, 1) {
            leaf.ebx = if compacts { compact } else { 0 };
        }
    }
}

/// What all of `profiles` have, beginning with the first: who it is and its clock are the first one's.
///
/// # Errors
/// The vendors, where they differ.
pub fn common(profiles: &[CpuProfile]) -> Result<CpuProfile, (String, String)> {
    let mut all = profiles.iter().filter(|profile| !profile.is_empty());
    let Some(first) = all.next() else { return Ok(CpuProfile::default()) };
    let mut shared = first.clone();
    for other in all {
        if other.vendor() != first.vendor() {
            return Err((first.vendor(), other.vendor()));
        }
        shared = shared.limited_to(other);
    }
    Ok(shared)
}

/// Whether a performance monitor can stand in for another: at least the same version and counters, of the same width.
pub(super) fn covers(host: [u32; 5], guest: [u32; 5]) -> bool {
    let [version, count, width, fixed, fixed_width] = guest;
    let [host_version, host_count, host_width, host_fixed, host_fixed_width] = host;
    version == 0
        || (host_version >= version
            && host_count >= count
            && host_width == width
            && host_fixed >= fixed
            && (fixed == 0 || host_fixed_width == fixed_width))
}
