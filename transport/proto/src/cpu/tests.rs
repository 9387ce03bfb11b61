//! Profiles made by hand: what is compared, what a limit leaves, what a level is, and that what is left is consistent.
#![allow(clippy::unwrap_used)]

use super::*;

fn leaf(function: u32, index: u32, [eax, ebx, ecx, edx]: [u32; 4]) -> Leaf {
    Leaf { function, index, eax, ebx, ecx, edx }
}

fn words(text: &[u8; 12]) -> [u32; 3] {
    [0, 4, 8].map(|at| u32::from_le_bytes([text[at], text[at + 1], text[at + 2], text[at + 3]]))
}

/// A CPU of the fourth level with AVX-512, PKU, AMX's absence, a performance monitor and speculation MSRs.
fn wide() -> CpuProfile {
    let [b, d, c] = words(b"GenuineIntel");
    let mut cpu = baseline(4, 0).unwrap();
    cpu.leaves.retain(|leaf| !matches!(leaf.function, 0xd | 0x8000_0008));
    cpu.leaves.extend([
        leaf(0, 0, [0x20, b, c, d]),
        leaf(4, 0, [0x121, 7, 7, 0]),
        leaf(0xa, 0, [0x0830_0802, 0, 0, 0x603]),
        leaf(0xd, 0, [0x2e7, 2696, 2696, 0]),
        leaf(0xd, 1, [0xf, 1000, 0, 0]),
        leaf(0xd, 2, [256, 576, 0, 0]),
        leaf(0xd, 5, [64, 1088, 0, 0]),
        leaf(0xd, 6, [512, 1152, 0, 0]),
        leaf(0xd, 7, [1024, 1664, 0, 0]),
        leaf(0xd, 9, [8, 2688, 0, 0]),
        leaf(0x14, 0, [1, 0xf, 7, 0]),
        leaf(0x8000_0002, 0, [0x6b61_6557, 0x0000_2021, 0, 0]),
        leaf(0x8000_0008, 0, [0x302e, 0, 0, 0]),
    ]);
    set(&mut cpu, &["pku", "arch_capabilities", "vaes", "aes", "pclmulqdq", "avx512_vnni", "pdcm"]);
    cpu.leaf_mut(1, 0).unwrap().eax = 0x000c_06f2;
    cpu.msrs = vec![(MSR_ARCH_CAPABILITIES, 0b1011)];
    cpu.tsc_khz = 2_100_000;
    cpu.consistent()
}

fn set(cpu: &mut CpuProfile, names: &[&str]) {
    for feature in names.iter().flat_map(|name| features_named(name).take(1).collect::<Vec<_>>()) {
        let register = feature.register();
        if cpu.leaf(register.function, register.index).is_none() {
            cpu.leaves.push(leaf(register.function, register.index, [0; 4]));
        }
        *cpu.leaf_mut(register.function, register.index).unwrap().slot(register.reg) |= 1 << feature.bit();
    }
}

fn without(cpu: &CpuProfile, names: &[&str]) -> CpuProfile {
    cpu.without(&names.iter().map(|name| (*name).to_owned()).collect::<Vec<_>>())
}

#[test]
fn a_profile_says_who_it_is() {
    let cpu = wide();
    assert_eq!(
        (cpu.vendor().as_str(), cpu.signature(), cpu.brand().as_str()),
        ("GenuineIntel", (6, 0xcf, 2), "Weak! "[..5].trim())
    );
    assert_eq!((cpu.xcr0(), cpu.xsave_bytes(), cpu.physical_bits()), (0x2e7, 2696, 46));
    assert_eq!(cpu.component_names(), ["x87", "sse", "avx", "avx512_opmask", "avx512_zmm_hi256", "avx512_hi16_zmm", "pku"]);
    assert_eq!(CpuProfile::default().vendor(), "");
}

#[test]
fn names_are_those_of_cpuinfo_and_each_has_its_bit() {
    let shown = |name: &str| features_named(name).map(|feature| feature.to_string()).collect::<Vec<_>>();
    assert_eq!(shown("avx2"), ["avx2 (CPUID 7.0 EBX bit 5)"]);
    assert_eq!(shown("lm"), ["lm (CPUID 0x80000001 EDX bit 29)"]);
    assert_eq!(shown("xsaves"), ["xsaves (CPUID 0xd.1 EAX bit 3)"]);
    assert_eq!(shown("tsc_deadline_timer"), ["tsc_deadline_timer (CPUID 1 ECX bit 24)"]);
    assert_eq!(shown("hypervisor"), ["hypervisor (CPUID 1 ECX bit 31)"]);
    assert_eq!(shown("avx512vl"), ["avx512vl (CPUID 7.0 EBX bit 31)"]);
    assert_eq!(shown("arch_capabilities"), ["arch_capabilities (CPUID 7.0 EDX bit 29)"]);
    assert_eq!(shown("kvmclock_stable"), ["kvmclock_stable (CPUID 0x40000001 EAX bit 24)"]);
    assert_eq!(shown("srso_no"), ["srso_no (CPUID 0x80000021 EAX bit 29)"]);
    assert_eq!(shown("vnmi"), ["vnmi (CPUID 0x8000000a EDX bit 25)"]);
    assert_eq!(shown("movrs"), ["movrs (CPUID 7.1 EAX bit 31)"]);
    assert_eq!(shown("ibrs").len(), 2, "Intel's and AMD's");
    assert_eq!(shown("avx3"), Vec::<String>::new());
    let unnamed = features().find(|feature| feature.name().is_none()).unwrap();
    assert!(unnamed.to_string().starts_with("CPUID "), "{unnamed}");
    // Topology and what the guest itself switches are no features.
    assert!(["ht", "osxsave", "ospke", "cmp_legacy"].iter().all(|name| features_named(name).next().is_none()));
    assert!(is_needed_by_every_guest("lm") && !is_needed_by_every_guest("avx"));
}

#[test]
fn a_guest_fits_where_it_was_started_and_where_there_is_more() {
    let cpu = wide();
    assert!(compare(&cpu, &cpu).fits());
    assert!(compare(&without(&cpu, &["avx512f", "pku"]), &cpu).fits());
    let nothing = CpuProfile::default();
    assert!(compare(&cpu, &nothing).fits() && compare(&nothing, &cpu).fits(), "what says nothing is not compared");
}

#[test]
fn missing_features_are_named_with_their_bits() {
    let (guest, host) = (wide(), without(&wide(), &["avx2"]));
    let found = compare(&guest, &host);
    assert!(found.features.contains(&"avx2 (CPUID 7.0 EBX bit 5)".to_owned()), "{found:?}");
    assert!(found.features.iter().any(|feature| feature.starts_with("avx512f ")), "{found:?}");
    assert!(found.xsave.contains(&"component 6 (avx512_zmm_hi256) is missing".to_owned()), "{found:?}");
    assert!(found.words("beta").contains("CPU features that beta lacks: "), "{}", found.words("beta"));
    // A long list is cut, with a count.
    let mut bare = wide();
    bare.leaves.retain(|leaf| leaf.function == 0);
    let words = compare(&guest, &bare).words("beta");
    assert!(words.contains(" more") && words.len() < 2000, "{words}");
}

#[test]
fn bits_without_a_name_count_too() {
    let mut guest = wide();
    guest.leaf_mut(7, 0).unwrap().ebx |= 1 << 22;
    assert_eq!(compare(&guest, &wide()).features, ["CPUID 7.0 EBX bit 22"]);
}

#[test]
fn vendors_addresses_counters_and_msrs_are_compared() {
    let (guest, mut host) = (wide(), wide());
    let [b, d, c] = words(b"AuthenticAMD");
    *host.leaf_mut(0, 0).unwrap() = leaf(0, 0, [0x10, b, c, d]);
    assert_eq!(compare(&guest, &host).vendor, Some(("GenuineIntel".into(), "AuthenticAMD".into())));
    let mut host = wide();
    host.leaf_mut(0x8000_0008, 0).unwrap().eax = 0x3027;
    assert_eq!(compare(&guest, &host).features, ["physical addresses of 46 bits, where it has 39 (CPUID 0x80000008 EAX)"]);
    let mut host = wide();
    host.leaf_mut(0xa, 0).unwrap().eax = 0x0830_0402;
    assert_eq!(compare(&guest, &host).features, ["arch_perfmon with the guest's counters (CPUID 0xa)"]);
    let mut host = wide();
    host.msrs = vec![(MSR_ARCH_CAPABILITIES, 0b0010)];
    assert_eq!(compare(&guest, &host).features, ["rdcl_no (MSR 0x10a bit 0)", "skip_l1dfl_vmentry (MSR 0x10a bit 3)"]);
    // RSBA tells of a fault: a host without it is no worse.
    let mut guest = wide();
    guest.msrs = vec![(MSR_ARCH_CAPABILITIES, 0b1111)];
    assert!(compare(&guest, &wide()).fits());
}

#[test]
fn an_area_that_lies_elsewhere_does_not_fit() {
    let mut host = wide();
    *host.leaf_mut(0xd, 9).unwrap() = leaf(0xd, 9, [8, 2432, 0, 0]);
    assert_eq!(compare(&wide(), &host).xsave, ["component 9 (pku) has 8 bytes at 2688 in the guest and 8 at 2432 there"]);
}

#[test]
fn clocks_may_differ_where_they_are_alike_or_can_be_scaled() {
    let guest = wide();
    let at = |tsc_khz, tsc_scaling| compare(&guest, &CpuProfile { tsc_khz, tsc_scaling, ..wide() }).tsc_khz;
    assert_eq!(at(2_100_525, false), None, "250 ppm");
    assert_eq!(at(2_100_526, false), Some((2_100_000, 2_100_526)));
    assert_eq!((at(3_000_000, true), at(0, false)), (None, None));
    let words = compare(&guest, &CpuProfile { tsc_khz: 2_400_000, ..wide() }).words("beta");
    assert!(words.contains("2100.000 MHz") && words.contains("that of beta at 2400.000 MHz"), "{words}");
}

#[test]
fn what_is_hidden_takes_along_what_is_built_on_it() {
    let cpu = without(&wide(), &["avx"]);
    for gone in ["avx", "avx2", "fma", "vaes", "avx512f", "avx512vl", "avx512_vnni"] {
        assert!(!cpu.has_named(gone), "{gone}");
    }
    assert!(cpu.has_named("aes") && cpu.has_named("pku") && cpu.has_named("xsave"));
    assert_eq!((cpu.xcr0(), cpu.xsave_bytes()), (0x203, 2696));
    let indices: Vec<u32> = cpu.leaves.iter().filter(|leaf| leaf.function == 0xd).map(|leaf| leaf.index).collect();
    assert_eq!(indices, [0, 1, 9], "leaves of components that are gone");
    assert_eq!(cpu.value(0xd, 1, Reg::Ebx), 576 + 8, "compacted");
    let cpu = without(&wide(), &["avx512f", "pku"]);
    assert_eq!((cpu.xcr0(), cpu.xsave_bytes()), (0b111, 832));
    let cpu = without(&wide(), &["xsave"]);
    assert_eq!((cpu.xcr0(), cpu.xsave_bytes(), cpu.value(0xd, 0, Reg::Ebx)), (0, 0, 0));
    assert!(!cpu.has_named("xsaveopt") && !cpu.has_named("avx") && cpu.has_named("sse4_2"));
    let cpu = without(&wide(), &["arch_capabilities"]);
    assert_eq!(cpu.msrs, [], "an MSR that no bit announces");
    assert_eq!(wide().value(0x14, 0, Reg::Ebx), 0, "a leaf that describes what is not there");
}

#[test]
fn two_hosts_share_what_both_have() {
    let (alpha, mut beta) = (without(&wide(), &["vaes"]), without(&wide(), &["avx512f", "pku"]));
    beta.msrs = vec![(MSR_ARCH_CAPABILITIES, 0b0110)];
    beta.leaf_mut(0x8000_0008, 0).unwrap().eax = 0x3027;
    beta.leaf_mut(0xa, 0).unwrap().eax = 0x0830_0402;
    beta.tsc_khz = 2_500_000;
    beta.leaf_mut(1, 0).unwrap().eax = 0x0005_0654;
    let shared = common(&[alpha.clone(), beta.clone()]).unwrap();
    assert!(!shared.has_named("vaes") && !shared.has_named("avx512f") && shared.has_named("avx2"));
    assert_eq!((shared.xcr0(), shared.physical_bits()), (0b111, 39));
    assert_eq!((shared.signature().1, shared.tsc_khz), (0xcf, 2_100_000), "who it is, is the first one's");
    assert_eq!(shared.msr(MSR_ARCH_CAPABILITIES), Some(0b0110), "RSBA of one is enough");
    assert_eq!(shared.counters(), beta.counters());
    let scaled = |cpu: &CpuProfile| CpuProfile { tsc_scaling: true, ..cpu.clone() };
    assert!(compare(&shared, &scaled(&alpha)).fits(), "{:?}", compare(&shared, &scaled(&alpha)));
    assert!(compare(&shared, &scaled(&beta)).fits(), "{:?}", compare(&shared, &scaled(&beta)));
    assert!(!compare(&alpha, &scaled(&beta)).fits() && !compare(&scaled(&beta), &alpha).fits());
    let mut other = wide();
    let [b, d, c] = words(b"AuthenticAMD");
    *other.leaf_mut(0, 0).unwrap() = leaf(0, 0, [0x10, b, c, d]);
    assert_eq!(common(&[alpha.clone(), other]), Err(("GenuineIntel".into(), "AuthenticAMD".into())));
    assert_eq!(common(&[alpha.clone(), CpuProfile::default()]), Ok(alpha), "one that says nothing limits nothing");
}

#[test]
fn levels_are_those_of_the_psabi() {
    let cpu = wide();
    assert_eq!(level(&cpu), 4);
    assert_eq!(level(&without(&cpu, &["avx512dq"])), 3);
    assert_eq!(level(&without(&cpu, &["bmi2"])), 2);
    assert_eq!(level(&without(&cpu, &["popcnt"])), 1);
    assert_eq!(level(&CpuProfile::default()), 0);
    let missing: Vec<String> = lacking(&without(&cpu, &["bmi2"]), 3).iter().map(ToString::to_string).collect();
    assert_eq!(missing, ["bmi2 (CPUID 7.0 EBX bit 8)"]);
    assert!(baseline(0, 0).is_none() && baseline(5, 0).is_none());
    let mut off = cpu.clone();
    off.leaf_mut(0xd, 0).unwrap().eax = 0b11;
    assert_eq!(level(&off), 2, "instructions whose registers cannot be switched on");
    for number in 1..=4 {
        let guest = cpu.limited_to(&baseline(number, 40).unwrap());
        assert_eq!(level(&guest), number);
        assert!(compare(&guest, &cpu).fits());
        assert_eq!((guest.physical_bits(), guest.counters(), guest.msrs.len()), (40, [0; 5], 0));
        assert_eq!(guest.xcr0(), [0, 0, 0b111, 0xe7][number - 1]);
        assert!(!guest.has_named("pku") && !guest.has_named("aes") && guest.has_named("nx"));
    }
    let least = cpu.limited_to(&minimum(40));
    assert_eq!((level(&least), least.xcr0(), least.vendor().as_str()), (1, 0, "GenuineIntel"));
    assert_eq!(least.brand(), cpu.brand());
    assert!(compare(&least, &cpu.limited_to(&baseline(2, 40).unwrap())).fits());
}

#[test]
fn nonsense_from_a_peer_is_taken_without_harm() {
    // Sizes that overflow, indices out of range, the same leaf twice.
    let mut cpu = wide();
    cpu.leaves.extend([
        leaf(0xd, 9, [u32::MAX; 4]),
        leaf(0xd, 63, [u32::MAX; 4]),
        leaf(0xd, u32::MAX, [u32::MAX; 4]),
        leaf(0, 0, [u32::MAX; 4]),
    ]);
    cpu.leaf_mut(0xd, 0).unwrap().edx = u32::MAX;
    let less = cpu.clone().consistent().limited_to(&cpu);
    let _ = (compare(&cpu, &wide()), compare(&wide(), &cpu), level(&less), less.feature_names(), less.brand());
    assert_eq!(leaf(0, 0, [1, 2, 3, 4]).get(Reg::Edx), 4);
    let noise: Vec<Leaf> = (0..256).map(|n| leaf(n, n, [u32::MAX; 4])).collect();
    let noise = CpuProfile { leaves: noise, msrs: vec![(1, u64::MAX); 64], tsc_khz: u32::MAX, tsc_scaling: false };
    assert!(!compare(&noise, &wide()).fits());
    assert!(noise.vendor().chars().all(|c| c.is_ascii_graphic()));
}
