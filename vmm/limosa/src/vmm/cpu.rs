//! The guest's CPU: what KVM offers here, held to what its file and its agent allow, or to what it brings from another host. It is
//! CPUID and feature MSRs for the machine, and a profile for everybody else. Profiles themselves are `limosa_proto`'s.

use super::build::words;
use limosa_agent::cpu::{HostCpu, limit_of};
use limosa_agent::vm_config::{CpuMode, VmConfig};
use limosa_machine::{CpuidEntry, StateRecord, host_cpu, saved_cpuid};
use limosa_proto::cpu::{CpuProfile, Leaf, compare};
use std::path::Path;

/// Largest file that a limit is read from, in bytes.
const LIMIT_BYTES_MAX: u64 = 256 << 10;
/// KVM looks at ECX for this leaf (KVM_CPUID_FLAG_SIGNIFCANT_INDEX).
const INDEXED: u32 = 1;

/// What KVM can give to guests here.
#[derive(Debug)]
pub(super) struct Host {
    raw: limosa_machine::HostCpu,
    profile: CpuProfile,
}

/// What a guest gets.
#[derive(Debug, Default)]
pub(super) struct GuestCpu {
    /// As it is described.
    pub(super) profile: CpuProfile,
    /// As the machine is built; none: whatever KVM offers.
    pub(super) cpuid: Option<Vec<CpuidEntry>>,
    /// MSRs that are not as KVM makes them.
    pub(super) msrs: Vec<(u32, u64)>,
}

fn leaves(entries: &[CpuidEntry]) -> Vec<Leaf> {
    let leaf = |e: &CpuidEntry| Leaf { function: e.function, index: e.index, eax: e.eax, ebx: e.ebx, ecx: e.ecx, edx: e.edx };
    entries.iter().map(leaf).collect()
}

impl Host {
    /// Asks KVM.
    pub(super) fn ask() -> Result<Host, String> {
        let raw = host_cpu().map_err(|e| words(&e))?;
        Ok(Host::of(raw))
    }

    fn of(raw: limosa_machine::HostCpu) -> Host {
        let profile =
            CpuProfile { leaves: leaves(&raw.cpuid), msrs: raw.msrs.clone(), tsc_khz: raw.tsc_khz, tsc_scaling: raw.tsc_scaling };
        Host { profile: profile.consistent(), raw }
    }

    /// As the agent asks for it.
    pub(super) fn told(&self) -> HostCpu {
        let (vcpus_max, vcpus_recommended) = (self.raw.vcpus_max, self.raw.vcpus_recommended);
        HostCpu { profile: self.profile.clone(), vcpus_max, vcpus_recommended }
    }

    /// The CPU of a guest that is started here; `limit` is the agent's.
    pub(super) fn starting(&self, config: &VmConfig, limit: Option<&CpuProfile>) -> Result<GuestCpu, String> {
        if matches!(config.cpu, CpuMode::Common(_)) && limit.is_none() {
            return Err(format!("cpu = {} needs an agent, which asks those hosts", config.cpu));
        }
        let own = limit_of(&config.cpu, &self.profile, config.memory)?;
        let nothing = CpuProfile::default();
        let profile = self.profile.limited_to(limit.unwrap_or(&nothing)).limited_to(own.as_ref().unwrap_or(&nothing));
        Ok(self.guest(profile))
    }

    /// The CPU of a guest that comes from another host, which is the one that it had there.
    pub(super) fn arriving(&self, profile: &CpuProfile) -> Result<GuestCpu, String> {
        if profile.is_empty() {
            return Ok(GuestCpu::default());
        }
        let found = compare(profile, &self.profile);
        if found.fits() { Ok(self.guest(profile.clone())) } else { Err(found.words("this host")) }
    }

    /// Refuses saved vCPUs whose CPUID this host cannot give: what a description says is not what is loaded.
    pub(super) fn check_saved(&self, records: &[StateRecord]) -> Result<(), String> {
        // As KVM shows it, not made consistent: a vCPU was saved as KVM showed it, too.
        let shown = CpuProfile { leaves: leaves(&self.raw.cpuid), ..CpuProfile::default() };
        for record in records {
            let Some(cpuid) = saved_cpuid(record).map_err(|e| words(&e))? else { continue };
            let saved = CpuProfile { leaves: leaves(&cpuid), ..CpuProfile::default() };
            let found = compare(&saved, &shown);
            if !found.fits() {
                return Err(format!("vCPU {}: {}", record.instance, found.words("this host")));
            }
        }
        Ok(())
    }

    fn guest(&self, profile: CpuProfile) -> GuestCpu {
        let entry = |leaf: &Leaf| {
            let like = |e: &&CpuidEntry| e.function == leaf.function && (e.index == leaf.index || e.flags & INDEXED != 0);
            let flags = self.raw.cpuid.iter().find(like).map_or(0, |e| e.flags);
            let Leaf { function, index, eax, ebx, ecx, edx } = *leaf;
            CpuidEntry { function, index, flags, eax, ebx, ecx, edx, ..CpuidEntry::default() }
        };
        let cpuid = profile.leaves.iter().map(entry).collect();
        let differs = |(index, value): &&(u32, u64)| self.profile.msr(*index) != Some(*value);
        let msrs = profile.msrs.iter().filter(differs).copied().collect();
        GuestCpu { cpuid: Some(cpuid), msrs, profile }
    }
}

/// The limit that an agent left in `file`.
pub(super) fn read_limit(file: &Path) -> Result<CpuProfile, String> {
    let failed = |words: String| format!("the limit of the guest's CPU, {}: {words}", file.display());
    let size = std::fs::metadata(file).map_err(|e| failed(e.to_string()))?.len();
    if size > LIMIT_BYTES_MAX {
        return Err(failed(format!("it has {size} bytes, and at most {LIMIT_BYTES_MAX} are read")));
    }
    let text = std::fs::read(file).map_err(|e| failed(e.to_string()))?;
    let limit: CpuProfile = serde_json::from_slice(&text).map_err(|e| failed(e.to_string()))?;
    // An empty one would limit nothing, and whoever passed it wanted a limit.
    if limit.is_empty() { Err(failed("it says nothing".into())) } else { Ok(limit) }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use limosa_proto::cpu::{Reg, baseline, level};

    fn host(number: usize) -> Host {
        let profile = baseline(number, 46).unwrap();
        let entry = |leaf: &Leaf| {
            let flags = if matches!(leaf.function, 7 | 0xd) { INDEXED } else { 0 };
            let Leaf { function, index, eax, ebx, ecx, edx } = *leaf;
            CpuidEntry { function, index, flags, eax, ebx, ecx, edx, ..CpuidEntry::default() }
        };
        let cpuid = profile.leaves.iter().map(entry).collect();
        let (msrs, tsc_khz) = (vec![(0x10a, 0b11)], 2_000_000);
        Host::of(limosa_machine::HostCpu { cpuid, msrs, tsc_khz, tsc_scaling: false, vcpus_max: 8, vcpus_recommended: 2 })
    }

    fn config(cpu: &str) -> VmConfig {
        let text = format!("name = \"web\"\nmemory = \"64M\"\nkernel = \"/x\"\ncpu = {cpu}\n");
        VmConfig::parse(Path::new("web.toml"), &text).unwrap()
    }

    #[test]
    fn a_guest_gets_what_its_file_and_its_agent_allow() {
        let host = host(3);
        let whole = host.starting(&config("\"host\""), None).unwrap();
        assert_eq!((level(&whole.profile), whole.msrs.as_slice()), (3, &[][..]));
        assert_eq!(whole.profile, host.profile);
        let less = host.starting(&config("\"baseline:x86-64-v2\""), None).unwrap();
        assert_eq!((level(&less.profile), less.profile.physical_bits(), less.profile.xcr0()), (2, 40, 0));
        let cpuid = less.cpuid.unwrap();
        let entry = |function: u32| cpuid.iter().find(|e| e.function == function && e.index == 0).unwrap();
        assert_eq!((entry(7).flags, entry(1).flags, entry(7).ebx & 1 << 5), (INDEXED, 0, 0));
        let limited = host.starting(&config("\"host\""), Some(&baseline(1, 0).unwrap())).unwrap();
        assert_eq!(level(&limited.profile), 1);
        let error = host.starting(&config("\"baseline:x86-64-v4\""), None).unwrap_err();
        assert!(error.contains("x86-64-v3 and not x86-64-v4"), "{error}");
        let error = host.starting(&config("{ common = [\"a\", \"b\"] }"), None).unwrap_err();
        assert!(error.contains("needs an agent"), "{error}");
    }

    #[test]
    fn a_guest_that_comes_keeps_its_cpu_or_does_not_come() {
        let (small, large) = (host(2), host(3));
        let guest = small.starting(&config("\"host\""), None).unwrap().profile;
        let arrived = large.arriving(&guest).unwrap();
        assert_eq!((arrived.profile.value(7, 0, Reg::Ebx), &arrived.profile), (0, &guest));
        let error = small.arriving(&large.profile).unwrap_err();
        assert!(error.contains("lacks") && error.contains("avx2 (CPUID 7.0 EBX bit 5)"), "{error}");
        assert!(small.arriving(&CpuProfile::default()).unwrap().cpuid.is_none(), "one that says nothing");
    }

    #[test]
    fn a_limit_is_read_whole_or_not_at_all() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("limit");
        assert!(read_limit(&file).unwrap_err().contains("limit"));
        for bad in ["", "{}", "[]", "{\"leaves\":[],\"msrs\":[],\"tsc_khz\":0,\"tsc_scaling\":false}"] {
            std::fs::write(&file, bad).unwrap();
            assert!(read_limit(&file).is_err(), "{bad}");
        }
        let limit = baseline(2, 40).unwrap();
        std::fs::write(&file, serde_json::to_vec(&limit).unwrap()).unwrap();
        assert_eq!(read_limit(&file), Ok(limit));
    }
}
