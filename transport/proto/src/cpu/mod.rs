//! CPU profiles: what a guest sees of a CPU, and what a host can give it. Pure numbers as CPUID and MSRs have them; nothing here
//! executes CPUID or knows KVM. It is in this crate because an agent compares profiles and has no KVM.

mod compare;
mod features;
mod level;
mod limit;

pub use compare::{Comparison, TSC_TOLERANCE_PPM, compare};
pub(crate) use compare::{feature_words, tsc_words, vendor_words, xsave_words};
pub use features::{Feature, Register, features, features_named, is_needed_by_every_guest};
pub use level::{LEVELS, baseline, lacking, level, minimum};
pub use limit::common;

use crate::wire::limits::{CPU_LEAVES_MAX, CPU_MSRS_MAX, list};
use serde::{Deserialize, Serialize};

/// The MSR in which a CPU says which speculation faults it does not have.
pub const MSR_ARCH_CAPABILITIES: u32 = 0x10a;

/// A register of a CPUID leaf.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Reg {
    /// EAX.
    Eax,
    /// EBX.
    Ebx,
    /// ECX.
    Ecx,
    /// EDX.
    Edx,
}

impl Reg {
    /// Its name.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Reg::Eax => "EAX",
            Reg::Ebx => "EBX",
            Reg::Ecx => "ECX",
            Reg::Edx => "EDX",
        }
    }
}

/// One leaf of CPUID.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Leaf {
    /// What is asked for in EAX.
    pub function: u32,
    /// What is asked for in ECX; 0 where that means nothing.
    pub index: u32,
    /// The answer's EAX.
    pub eax: u32,
    /// The answer's EBX.
    pub ebx: u32,
    /// The answer's ECX.
    pub ecx: u32,
    /// The answer's EDX.
    pub edx: u32,
}

impl Leaf {
    /// The value of one register.
    #[must_use]
    pub fn get(&self, reg: Reg) -> u32 {
        match reg {
            Reg::Eax => self.eax,
            Reg::Ebx => self.ebx,
            Reg::Ecx => self.ecx,
            Reg::Edx => self.edx,
        }
    }

    fn slot(&mut self, reg: Reg) -> &mut u32 {
        match reg {
            Reg::Eax => &mut self.eax,
            Reg::Ebx => &mut self.ebx,
            Reg::Ecx => &mut self.ecx,
            Reg::Edx => &mut self.edx,
        }
    }
}

/// A CPU: of a guest, as it sees it, or of a host, as its KVM can give it to guests. Without leaves it says nothing, and nothing is
/// compared with it.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct CpuProfile {
    /// CPUID, as the first virtual CPU sees it.
    #[serde(deserialize_with = "list::<_, _, CPU_LEAVES_MAX>")]
    pub leaves: Vec<Leaf>,
    /// Feature MSRs, each with its value.
    #[serde(deserialize_with = "list::<_, _, CPU_MSRS_MAX>")]
    pub msrs: Vec<(u32, u64)>,
    /// How fast the time stamp counter runs, in kHz; 0: not known.
    pub tsc_khz: u32,
    /// Whether the host can let a guest's counter run at another speed than its own. Means nothing of a guest.
    pub tsc_scaling: bool,
}

impl CpuProfile {
    /// Whether it says nothing.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.leaves.is_empty()
    }

    /// One leaf.
    #[must_use]
    pub fn leaf(&self, function: u32, index: u32) -> Option<&Leaf> {
        self.leaves.iter().find(|leaf| leaf.function == function && leaf.index == index)
    }

    /// One register of a leaf; 0 where the leaf is not there, as a CPU answers.
    #[must_use]
    pub fn value(&self, function: u32, index: u32, reg: Reg) -> u32 {
        self.leaf(function, index).map_or(0, |leaf| leaf.get(reg))
    }

    fn leaf_mut(&mut self, function: u32, index: u32) -> Option<&mut Leaf> {
        self.leaves.iter_mut().find(|leaf| leaf.function == function && leaf.index == index)
    }

    /// Whether it has a feature.
    #[must_use]
    pub fn has(&self, feature: Feature) -> bool {
        let register = feature.register();
        self.value(register.function, register.index, register.reg) >> feature.bit() & 1 == 1
    }

    /// Whether it has any feature of this name.
    fn has_named(&self, name: &str) -> bool {
        features_named(name).any(|feature| self.has(feature))
    }

    /// The value of a feature MSR.
    #[must_use]
    pub fn msr(&self, index: u32) -> Option<u64> {
        self.msrs.iter().find(|(of, _)| *of == index).map(|(_, value)| *value)
    }

    /// Who made it: "GenuineIntel", "AuthenticAMD"; characters that are none are replaced by '?'.
    #[must_use]
    pub fn vendor(&self) -> String {
        let leaf = self.leaf(0, 0).copied().unwrap_or_default();
        text(&[leaf.ebx, leaf.edx, leaf.ecx])
    }

    /// Its name for people, as the vendor wrote it; empty where there is none.
    #[must_use]
    pub fn brand(&self) -> String {
        let words: Vec<u32> = (0x8000_0002_u32..=0x8000_0004)
            .filter_map(|function| self.leaf(function, 0))
            .flat_map(|leaf| [leaf.eax, leaf.ebx, leaf.ecx, leaf.edx])
            .collect();
        text(&words).trim().to_owned()
    }

    /// Family, model and stepping.
    #[must_use]
    pub fn signature(&self) -> (u32, u32, u32) {
        let eax = self.value(1, 0, Reg::Eax);
        let (family, model) = (eax >> 8 & 0xf, eax >> 4 & 0xf);
        let more = eax >> 16 & 0xf;
        let whole = if family == 0xf { family + (eax >> 20 & 0xff) } else { family };
        let model = if family == 6 || family == 0xf { more << 4 | model } else { model };
        (whole, model, eax & 0xf)
    }

    /// The components of extended state that may be switched on (XCR0), one bit each; 0 where there is no XSAVE.
    #[must_use]
    pub fn xcr0(&self) -> u64 {
        u64::from(self.value(0xd, 0, Reg::Eax)) | u64::from(self.value(0xd, 0, Reg::Edx)) << 32
    }

    /// Bytes of the area that XSAVE fills with everything switched on; 0 where there is no XSAVE.
    #[must_use]
    pub fn xsave_bytes(&self) -> u32 {
        self.value(0xd, 0, Reg::Ecx)
    }

    /// How many bits a physical address has; 0 where it does not say.
    #[must_use]
    pub fn physical_bits(&self) -> u32 {
        self.value(0x8000_0008, 0, Reg::Eax) & 0xff
    }
}

/// Registers as text.
fn text(words: &[u32]) -> String {
    let bytes = words.iter().flat_map(|word| word.to_le_bytes()).take_while(|byte| *byte != 0);
    bytes.map(|byte| if byte.is_ascii_graphic() || byte == b' ' { char::from(byte) } else { '?' }).collect()
}

/// The name of a component of extended state.
#[must_use]
pub fn component_name(component: u32) -> &'static str {
    const NAMES: [&str; 20] = [
        "x87",
        "sse",
        "avx",
        "mpx_bndregs",
        "mpx_bndcsr",
        "avx512_opmask",
        "avx512_zmm_hi256",
        "avx512_hi16_zmm",
        "pt",
        "pku",
        "pasid",
        "cet_user",
        "cet_supervisor",
        "hdc",
        "uintr",
        "lbr",
        "hwp",
        "amx_tile_config",
        "amx_tile_data",
        "apx",
    ];
    usize::try_from(component).ok().and_then(|component| NAMES.get(component)).copied().unwrap_or("unknown")
}

#[cfg(test)]
mod tests;
