//! Names of CPU features, as /proc/cpuinfo of a Linux guest has them, and which registers hold features at all. Registers that
//! are not here say who a CPU is, how its caches are shared, or how much there is of something: they are not sets of features.

use super::{CpuProfile, Reg};
use std::fmt;

/// A CPUID register whose bits are features.
#[derive(Debug, PartialEq, Eq)]
pub struct Register {
    /// What is asked for in EAX.
    pub function: u32,
    /// What is asked for in ECX.
    pub index: u32,
    /// Which register of the answer.
    pub reg: Reg,
    /// Bits that are features. The others change while the guest runs, tell its topology, or are numbers.
    pub mask: u32,
    /// Names of the bits from 0 on, "-" where there is none.
    names: &'static str,
}

/// One feature.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct Feature {
    register: &'static Register,
    bit: u32,
}

const fn register(function: u32, index: u32, reg: Reg, mask: u32, names: &'static str) -> Register {
    Register { function, index, reg, mask, names }
}

const ALL: u32 = u32::MAX;
const OSXSAVE: u32 = 1 << 27;
const HYPERTHREADS: u32 = 1 << 28;
const APIC: u32 = 1 << 9;
const OSPKE: u32 = 1 << 4;
const MPX_WIDTH: u32 = 0x1f << 17;
const CMP_LEGACY: u32 = 1 << 1;

/// Every register of features. APIC (1 EDX bit 9) is switched off and on by the guest, as OSXSAVE and OSPKE are.
static REGISTERS: &[Register] = &[
    register(
        1,
        0,
        Reg::Edx,
        ALL & !HYPERTHREADS & !APIC,
        "fpu vme de pse tsc msr pae mce cx8 apic - sep mtrr pge mca cmov pat pse36 pn clflush - dts acpi mmx fxsr sse sse2 ss ht tm \
         ia64 pbe",
    ),
    register(
        1,
        0,
        Reg::Ecx,
        ALL & !OSXSAVE,
        "pni pclmulqdq dtes64 monitor ds_cpl vmx smx est tm2 ssse3 cid sdbg fma cx16 xtpr pdcm - pcid dca sse4_1 sse4_2 x2apic movbe \
         popcnt tsc_deadline_timer aes xsave osxsave avx f16c rdrand hypervisor",
    ),
    register(6, 0, Reg::Eax, ALL, "dtherm ida arat - pln - pts hwp hwp_notify hwp_act_window hwp_epp hwp_pkg_req"),
    register(
        7,
        0,
        Reg::Ebx,
        ALL,
        "fsgsbase tsc_adjust sgx bmi1 hle avx2 fdp_excptn_only smep bmi2 erms invpcid rtm cqm zero_fcs_fds mpx rdt_a avx512f avx512dq \
         rdseed adx smap avx512ifma - clflushopt clwb intel_pt avx512pf avx512er avx512cd sha_ni avx512bw avx512vl",
    ),
    register(
        7,
        0,
        Reg::Ecx,
        ALL & !OSPKE & !MPX_WIDTH,
        "prefetchwt1 avx512vbmi umip pku ospke waitpkg avx512_vbmi2 shstk gfni vaes vpclmulqdq avx512_vnni avx512_bitalg tme \
         avx512_vpopcntdq - la57 - - - - - rdpid key_locker bus_lock_detect cldemote - movdiri movdir64b enqcmd sgx_lc pks",
    ),
    register(
        7,
        0,
        Reg::Edx,
        ALL,
        "- sgx_keys avx512_4vnniw avx512_4fmaps fsrm uintr - - avx512_vp2intersect srbds_ctrl md_clear rtm_always_abort - \
         tsx_force_abort serialize hybrid_cpu tsxldtrk - pconfig arch_lbr ibt - amx_bf16 avx512_fp16 amx_tile amx_int8 ibrs stibp \
         flush_l1d arch_capabilities core_capabilities ssbd",
    ),
    register(
        7,
        1,
        Reg::Eax,
        ALL,
        "sha512 sm3 sm4 rao_int avx_vnni avx512_bf16 lass cmpccxadd arch_perfmon_ext - fzrm fsrs fsrc - - - - fred lkgs wrmsrns \
         nmi_source amx_fp16 hreset avx_ifma - - lam msrlist - - invd_disable movrs",
    ),
    register(
        7,
        1,
        Reg::Edx,
        ALL,
        "- - - - avx_vnni_int8 avx_ne_convert - - amx_complex - avx_vnni_int16 - - utmr prefetchi user_msr - uiret_uif cet_sss avx10 - \
         apx_f",
    ),
    register(7, 2, Reg::Edx, ALL, "intel_psfd ipred_ctrl rrsba_ctrl ddpd_u bhi_ctrl mcdt_no"),
    register(0xd, 1, Reg::Eax, ALL, "xsaveopt xsavec xgetbv1 xsaves xfd"),
    register(
        0x8000_0001,
        0,
        Reg::Edx,
        ALL & !APIC,
        "fpu vme de pse tsc msr pae mce cx8 apic - syscall mtrr pge mca cmov pat pse36 - mp nx - mmxext mmx fxsr fxsr_opt pdpe1gb \
         rdtscp - lm 3dnowext 3dnow",
    ),
    register(
        0x8000_0001,
        0,
        Reg::Ecx,
        ALL & !CMP_LEGACY,
        "lahf_lm cmp_legacy svm extapic cr8_legacy abm sse4a misalignsse 3dnowprefetch osvw ibs xop skinit wdt - lwp fma4 tce - \
         nodeid_msr - tbm topoext perfctr_core perfctr_nb - bpext ptsc perfctr_llc mwaitx",
    ),
    register(0x8000_0007, 0, Reg::Ebx, ALL, "overflow_recov succor - smca"),
    register(0x8000_0007, 0, Reg::Edx, ALL, "- - - - - - - - nonstop_tsc"),
    register(
        0x8000_0008,
        0,
        Reg::Ebx,
        ALL,
        "clzero irperf xsaveerptr - rdpru - - - mcommit wbnoinvd - - ibpb - ibrs stibp - stibp_always_on - ibrs_same_mode - - - \
         amd_ppin ssbd virt_ssbd amd_ssb_no cppc amd_psfd btc_no ibpb_ret",
    ),
    register(
        0x8000_000a,
        0,
        Reg::Edx,
        ALL,
        "npt lbrv svm_lock nrip_save tsc_scale vmcb_clean flushbyasid decodeassists - - pausefilter - pfthreshold avic - \
         v_vmsave_vmload vgif - - - v_spec_ctrl - - - - vnmi",
    ),
    register(
        0x8000_0021,
        0,
        Reg::Eax,
        ALL,
        "no_nested_data_bp - lfence_rdtsc - - - null_sel_clr_base - autoibrs no_smm_ctl_msr - - - - - - - - - - - - - - - - - sbpb \
         ibpb_brtype srso_no",
    ),
    register(0x8000_0022, 0, Reg::Eax, ALL, "perfmon_v2 amd_lbr_v2"),
    register(0xc000_0001, 0, Reg::Edx, ALL, "- - rng rng_en - - ace ace_en ace2 ace2_en phe phe_en pmm pmm_en"),
    register(
        0x4000_0001,
        0,
        Reg::Eax,
        ALL,
        "kvmclock kvm_nopiodelay kvm_mmu kvmclock2 kvm_asyncpf kvm_steal_time kvm_pv_eoi kvm_pv_unhalt - kvm_pv_tlb_flush \
         kvm_asyncpf_vmexit kvm_pv_ipi kvm_poll_control kvm_pv_sched_yield kvm_asyncpf_int kvm_msi_ext_dest_id kvm_hc_map_gpa_range \
         kvm_migration_control - - - - - - kvmclock_stable",
    ),
];

impl Register {
    fn name_of(&'static self, bit: u32) -> Option<&'static str> {
        let index = usize::try_from(bit).ok()?;
        self.names.split_ascii_whitespace().nth(index).filter(|name| *name != "-")
    }

    pub(super) fn features(&'static self) -> impl Iterator<Item = Feature> {
        (0..u32::BITS).filter(|bit| self.mask >> bit & 1 == 1).map(move |bit| Feature { register: self, bit })
    }
}

impl Feature {
    /// The register that it is in.
    #[must_use]
    pub fn register(self) -> &'static Register {
        self.register
    }

    /// Its bit.
    #[must_use]
    pub fn bit(self) -> u32 {
        self.bit
    }

    /// Its name, where it has one.
    #[must_use]
    pub fn name(self) -> Option<&'static str> {
        self.register.name_of(self.bit)
    }
}

/// Where it is: `CPUID 7.0 EBX bit 5`.
impl fmt::Debug for Feature {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Register { function, index, reg, .. } = *self.register;
        let (reg, bit) = (reg.name(), self.bit);
        match function {
            7 => write!(f, "CPUID 7.{index} {reg} bit {bit}"),
            0xd => write!(f, "CPUID 0xd.{index} {reg} bit {bit}"),
            0..=9 => write!(f, "CPUID {function} {reg} bit {bit}"),
            _ => write!(f, "CPUID {function:#x} {reg} bit {bit}"),
        }
    }
}

/// Its name and where it is: `avx2 (CPUID 7.0 EBX bit 5)`.
impl fmt::Display for Feature {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.name() {
            Some(name) => write!(f, "{name} ({self:?})"),
            None => fmt::Debug::fmt(self, f),
        }
    }
}

/// Every bit that may be a feature, named or not.
pub fn features() -> impl Iterator<Item = Feature> {
    REGISTERS.iter().flat_map(Register::features)
}

/// The features of this name; some names stand for more than one bit, as AMD's CPUs have Intel's features elsewhere.
pub fn features_named(name: &str) -> impl Iterator<Item = Feature> {
    features().filter(move |feature| feature.name() == Some(name))
}

/// Whether no guest boots without the features of this name.
#[must_use]
pub fn is_needed_by_every_guest(name: &str) -> bool {
    features_named(name).any(|feature| super::minimum(0).has(feature))
}

/// Registers of features, for those who go through them whole.
pub(super) fn registers() -> &'static [Register] {
    REGISTERS
}

impl CpuProfile {
    /// The names of its features, in the order of CPUID; each once. Bits without a name are left out.
    #[must_use]
    pub fn feature_names(&self) -> Vec<&'static str> {
        let mut names: Vec<&'static str> = Vec::new();
        for name in features().filter(|feature| self.has(*feature)).filter_map(Feature::name) {
            if !names.contains(&name) {
                names.push(name);
            }
        }
        names
    }
}
