//! The CPU of this host as guests may have it: learnt once from a VMM, since the agent has no KVM; less what is kept back by
//! configuration; and the limit that a guest's `cpu` setting means. What profiles are and how they compare is `limosa_proto`'s.

use crate::agent::Agent;
use crate::api::{ApiError, HostCpuReport};
use crate::hosts::Host;
use crate::links;
use crate::process;
use crate::vm_config::{CpuMode, VmConfig};
use limosa_link::choose::{LinkKind, Wanted, look};
use limosa_link::{AskError, ask_cpu};
use limosa_proto::cpu::{self, CpuProfile, LEVELS};
use limosa_proto::wire::code::Code;
use serde::{Deserialize, Serialize};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

/// What a VMM may print about the CPU, and how long it may take.
const PRINTED_BYTES_MAX: u64 = 256 << 10;
const PRINTED_TIME_MAX: Duration = Duration::from_secs(10);
/// A VMM that could not tell is not asked again for so long.
const ASK_AGAIN: Duration = Duration::from_secs(10);
/// vCPUs of a guest at most, where nobody says how many there may be.
const VCPUS_MAX: u32 = 1024;
/// Bits of a physical address that every server CPU has, and the guest memory that fits below with room for devices.
const PHYSICAL_BITS: u8 = 40;
const PHYSICAL_BITS_MEMORY_MAX: u64 = 512 << 30;

/// What `limosa vmm --print-cpu` prints: the CPU that this host's KVM can give to guests.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct HostCpu {
    /// All of it.
    pub profile: CpuProfile,
    /// The most vCPUs of one guest.
    pub vcpus_max: u32,
    /// More vCPUs than this share physical CPUs.
    pub vcpus_recommended: u32,
}

/// What was learnt, and when.
#[derive(Debug, Default)]
pub(crate) struct Learnt(Mutex<Option<(Instant, Result<HostCpu, String>)>>);

/// The host's CPU. Blocks while a VMM is asked.
///
/// # Errors
/// Why the VMM does not tell, in words.
pub(crate) fn host(agent: &Agent) -> Result<HostCpu, String> {
    let mut learnt = agent.cpu.0.lock().unwrap_or_else(PoisonError::into_inner);
    match &*learnt {
        Some((_, Ok(known))) => return Ok(known.clone()),
        Some((at, Err(words))) if at.elapsed() < ASK_AGAIN => return Err(words.clone()),
        _ => {}
    }
    let told = learn(&agent.config.vmm_command);
    if let Err(words) = &told {
        tracing::warn!("{words}");
    }
    *learnt = Some((Instant::now(), told.clone()));
    told
}

fn learn(command: &[String]) -> Result<HostCpu, String> {
    let failed = |words: String| format!("the VMM of this host does not tell which CPU it gives to guests: {words}");
    let printed = process::output(command, &["--print-cpu".into()], PRINTED_BYTES_MAX, PRINTED_TIME_MAX).map_err(failed)?;
    let told: HostCpu = serde_json::from_slice(&printed).map_err(|e| failed(format!("what it prints is no profile: {e}")))?;
    if told.profile.is_empty() || told.vcpus_max == 0 {
        return Err(failed("what it prints says nothing".into()));
    }
    Ok(told)
}

/// The CPU that this host offers to guests: what it has, less what is kept back. Empty: not known. May block.
pub(crate) fn offered(agent: &Agent) -> CpuProfile {
    host(agent).map(|host| host.profile.without(&agent.config.cpu.hide)).unwrap_or_default()
}

/// The most vCPUs of a guest here. May block.
pub(crate) fn vcpus_max(agent: &Agent) -> u32 {
    let kvm = host(agent).map_or(VCPUS_MAX, |host| host.vcpus_max);
    agent.config.cpu.vcpus_max.unwrap_or(kvm).min(kvm)
}

/// The limit that `mode` means on a host that offers `host`, to a guest with `memory` bytes; none where it means no limit, or
/// one that only an agent knows (`common`).
///
/// # Errors
/// The host does not reach the level that is asked for.
pub fn limit_of(mode: &CpuMode, host: &CpuProfile, memory: u64) -> Result<Option<CpuProfile>, String> {
    let bits = if memory <= PHYSICAL_BITS_MEMORY_MAX { PHYSICAL_BITS } else { 0 };
    match mode {
        CpuMode::Host | CpuMode::Common(_) => Ok(None),
        CpuMode::Minimum => Ok(Some(cpu::minimum(bits))),
        CpuMode::Baseline(level) => {
            let lacking = cpu::lacking(host, *level);
            if lacking.is_empty() {
                return Ok(cpu::baseline(*level, bits));
            }
            let names: Vec<String> = lacking.iter().take(16).map(ToString::to_string).collect();
            let reached = cpu::level(host).checked_sub(1).and_then(|level| LEVELS.get(level)).unwrap_or(&"no level");
            let wanted = mode.level_name();
            Err(format!("this host gives its guests a CPU of {reached} and not {wanted}: it lacks {}", names.join(", ")))
        }
    }
}

/// What a new guest's CPU must be held to beside its own setting: what is kept back here, and what other hosts have. To be called
/// where blocking is fine.
///
/// # Errors
/// The setting cannot be had here, or a host that it names cannot be asked.
pub(crate) fn limit_for(agent: &Arc<Agent>, config: &VmConfig) -> Result<Option<CpuProfile>, ApiError> {
    let refused = |words: String| ApiError::refused("cpu", format!("{}: {words}", config.name));
    let hides = !agent.config.cpu.hide.is_empty();
    if config.cpu == CpuMode::Host && !hides {
        return Ok(None);
    }
    let told = host(agent).map_err(|words| refused(format!("cpu = {} cannot be had: {words}", config.cpu)))?;
    let own = told.profile.without(&agent.config.cpu.hide);
    limit_of(&config.cpu, &own, config.memory).map_err(refused)?;
    let CpuMode::Common(names) = &config.cpu else { return Ok(hides.then_some(own)) };
    let mut shared = own.clone();
    for name in names.iter().filter(|name| **name != agent.config.name) {
        let theirs = profile_of(agent, name).map_err(|e| ApiError { words: format!("{}: {}", config.name, e.words), ..e })?;
        shared = cpu::common(&[shared, theirs]).map_err(|(ours, others)| {
            refused(format!("this host has a CPU of {ours} and {name} one of {others}: they have no guest's CPU in common"))
        })?;
    }
    Ok(Some(shared))
}

/// The CPU that the trusted host `name` offers to guests.
fn profile_of(agent: &Arc<Agent>, name: &str) -> Result<CpuProfile, ApiError> {
    let Some(host) = agent.hosts.named(name) else {
        let mut known: Vec<String> = agent.hosts.all().into_iter().map(|host| host.name).collect();
        known.push(agent.config.name.clone());
        let words = format!("cpu = common names the host \"{name}\", which is not known here; known: {}", known.join(", "));
        return Err(ApiError::refused("unknown-host", words));
    };
    let asked = tokio::runtime::Handle::current().block_on(ask(agent, &host));
    let told = asked.map_err(|e| {
        ApiError::refused(e.code().id(), format!("the CPU of {name} is asked for by cpu = common, and is not to be had: {e}"))
    })?;
    if told.is_empty() {
        let words = format!("{name} does not know which CPU it gives to guests; `limosa host cpu` there says why");
        return Err(ApiError::refused("cpu", words));
    }
    Ok(told)
}

/// Asks over TCP, and over QUIC where TCP does not get through.
async fn ask(agent: &Arc<Agent>, host: &Host) -> Result<CpuProfile, AskError> {
    let mut last = None;
    for kind in [LinkKind::Tcp, LinkKind::Quic] {
        let wanted = Wanted::Only(kind);
        let Some(link) = look(&links::reach(agent, host, wanted), wanted).await.link(kind) else { continue };
        match ask_cpu(&*link).await {
            Err(error) if !matches!(error.code(), Code::NotAllowed | Code::UnknownHost) => {
                last.get_or_insert(error);
            }
            told => return told,
        }
    }
    // TCP is always a link, so there is an error of it.
    last.map_or_else(|| Ok(CpuProfile::default()), Err)
}

/// Whether a guest may have so many vCPUs here; what should be said about it, where it may.
///
/// # Errors
/// It has more than KVM or the configuration allows.
pub(crate) fn admit_vcpus(agent: &Agent, config: &VmConfig) -> Result<Option<String>, ApiError> {
    let (name, wants, most) = (&config.name, config.vcpus, vcpus_max(agent));
    if wants > most {
        let whose = if agent.config.cpu.vcpus_max == Some(most) { "cpu.vcpus_max in its configuration" } else { "KVM's maximum" };
        let words = format!("{name} has {wants} vCPUs, and this host runs guests with at most {most} ({whose})");
        return Err(ApiError::refused("vcpus", words));
    }
    let here = host(agent).map_or(u32::MAX, |host| host.vcpus_recommended);
    Ok((wants > here).then(|| format!("{name} has {wants} vCPUs, more than the {here} CPUs of this host: they take turns")))
}

/// This host's CPU for `limosa host cpu`. May block.
///
/// # Errors
/// Why it is not known.
pub(crate) fn report(agent: &Agent) -> Result<HostCpuReport, ApiError> {
    let host = host(agent).map_err(|words| ApiError::refused("cpu", words))?;
    let profile = host.profile.without(&agent.config.cpu.hide);
    let (family, model, stepping) = profile.signature();
    let level = cpu::level(&profile).checked_sub(1).and_then(|level| LEVELS.get(level));
    let had = host.profile.feature_names();
    let names = |list: &[&str]| list.iter().map(|name| (*name).to_owned()).collect::<Vec<_>>();
    let offered = profile.feature_names();
    let hidden: Vec<&str> = had.into_iter().filter(|name| !offered.contains(name)).collect();
    Ok(HostCpuReport {
        name: agent.config.name.clone(),
        brand: profile.brand(),
        vendor: profile.vendor(),
        family,
        model,
        stepping,
        level: level.map(|level| (*level).to_owned()),
        features: names(&offered),
        hidden: names(&hidden),
        xsave_bytes: profile.xsave_bytes(),
        xsave_components: names(&profile.component_names()),
        tsc_khz: profile.tsc_khz,
        tsc_scaling: profile.tsc_scaling,
        vcpus_max: vcpus_max(agent),
        cpus: host.vcpus_recommended,
        profile,
    })
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn a_vmm_that_tells_nothing_is_told_apart() {
        let shell = |script: &str| learn(&["sh".into(), "-c".into(), script.into()]);
        let words = |script: &str| shell(script).unwrap_err();
        assert!(words("echo no kvm >&2; exit 3").contains("no kvm"), "{}", words("echo no kvm >&2; exit 3"));
        assert!(words("echo '{}'").contains("no profile"));
        assert!(words("yes").contains("more than"), "{}", words("yes"));
        let empty = HostCpu { profile: CpuProfile::default(), vcpus_max: 1, vcpus_recommended: 1 };
        let text = serde_json::to_string(&empty).unwrap();
        assert!(words(&format!("echo '{text}'")).contains("says nothing"));
        let good = HostCpu { profile: cpu::baseline(1, 0).unwrap(), ..empty };
        assert_eq!(shell(&format!("echo '{}'", serde_json::to_string(&good).unwrap())), Ok(good));
    }

    #[test]
    fn a_level_that_is_not_reached_is_refused_with_what_is_missing() {
        let host = cpu::baseline(2, 0).unwrap();
        assert_eq!(limit_of(&CpuMode::Host, &host, 1 << 30), Ok(None));
        let limit = limit_of(&CpuMode::Baseline(2), &host, 1 << 30).unwrap().unwrap();
        assert_eq!((cpu::level(&limit), limit.physical_bits()), (2, 40));
        assert_eq!(limit_of(&CpuMode::Minimum, &host, 1 << 40).unwrap().unwrap().physical_bits(), 0, "a guest that needs more");
        let words = limit_of(&CpuMode::Baseline(3), &host, 1 << 30).unwrap_err();
        assert!(words.contains("x86-64-v2 and not x86-64-v3") && words.contains("avx2 (CPUID 7.0 EBX bit 5)"), "{words}");
    }
}
