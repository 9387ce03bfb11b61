//! The dry run before a migration: every reason that would stop it, on both hosts, and what it is going to cost. Nothing is
//! changed on either side. The destination answers with what it checks a real migration by.

use crate::agent::Agent;
use crate::api::{ApiError, CheckReport, Direction, Estimate, MigrateRequest, Plan};
use crate::leaving::{Planned, planned};
use crate::{disks, links, tickets};
use limosa_link::choose::{LinkKind, Wanted, look};
use limosa_link::probe::probe;
use limosa_link::{Link, ask_check};
use limosa_proto::compat;
use limosa_proto::ticket::Action;
use limosa_proto::wire::code::Code;
use limosa_proto::wire::message::Reason;
use std::sync::Arc;

/// Checks whether the guest of `request` could leave as it asks for.
///
/// # Errors
/// It cannot be checked: no such guest or host, a request that makes no sense.
pub(crate) async fn check(agent: &Arc<Agent>, request: MigrateRequest) -> Result<CheckReport, ApiError> {
    let vm = agent.vms.named(&request.vm)?;
    let order = request.clone();
    let Planned { plan, host, link } = planned(agent, request).await?;
    let ticket = tickets::of_order(agent, &order, (vm.id, &vm.name), &host, Action::Check)?;
    let mut description =
        vm.description().ok_or_else(|| ApiError::refused("vmm-failed", format!("{} has not described itself", vm.name)))?;
    let mut reasons = Vec::new();
    reasons.extend(agent.vms.free(&vm).err().map(|error| Reason { id: error.code, words: error.words }));
    let most = agent.config.migration.outgoing_max;
    if agent.jobs.running(Direction::Outgoing) >= most {
        let words = format!("{most} guests are leaving already, and no more may (migration.outgoing_max)");
        reasons.push(Reason { id: Code::Busy.id().to_owned(), words });
    }
    let chosen = link.as_ref().ok().cloned();
    let unreachable = link.err().map(|none| Reason { id: none.code.id().to_owned(), words: none.words });
    // Where the link that was asked for is not to be had, the destination may have more to say all the same.
    let ask = match &chosen {
        Some(link) => Some(Arc::clone(link)),
        None => look(&links::reach(agent, &host, TCP), TCP).await.link(LinkKind::Tcp),
    };
    // The destination is shown that both see the same images, as for a real migration; the marks go with `_marks`.
    let state_dir = agent.config.state_dir.clone();
    let marked = tokio::task::spawn_blocking(move || disks::mark(&state_dir, &mut description).map(|marks| (marks, description)));
    let marked = marked.await.map_err(|e| ApiError::refused("internal", e.to_string()))?;
    let (_marks, description) = marked.map_err(|words| ApiError::refused("disk", words))?;
    let asked = match &ask {
        Some(link) => Some(ask_check(&**link, &description, ticket).await),
        None => None,
    };
    match asked {
        Some(Ok(theirs)) => reasons.extend(unreachable.into_iter().chain(theirs)),
        Some(Err(error)) if unreachable.is_none() => {
            reasons.push(Reason { id: error.code().id().to_owned(), words: error.to_string() })
        }
        _ => reasons.extend(unreachable),
    }
    let estimate = match &chosen {
        Some(link) if reasons.is_empty() => Some(estimate(&plan, &**link).await),
        _ => None,
    };
    Ok(CheckReport {
        vm: plan.vm.clone(),
        to: plan.to.clone(),
        ok: reasons.is_empty(),
        advice: advice(&reasons, &agent.config.name, &host.name),
        reasons,
        plan: chosen.map(|_| Box::new(plan)),
        estimate,
    })
}

const TCP: Wanted = Wanted::Only(LinkKind::Tcp);

/// What would have helped against `reasons`, where that is known.
pub(crate) fn advice(reasons: &[Reason], own: &str, to: &str) -> Option<String> {
    compat::is_about_cpu(reasons)
        .then(|| format!("start it with cpu = {{ common = [\"{own}\", \"{to}\"] }} to be able to move it there"))
}

/// What the migration is going to take: all memory once, at the speed that a short probe found.
async fn estimate(plan: &Plan, link: &dyn Link) -> Estimate {
    let known = plan.links_tried.iter().find(|one| one.link == plan.link).and_then(|one| one.probe_bytes_per_s);
    let measured = match known {
        Some(rate) => Some(rate),
        // Over RDMA the control channel says nothing of the speed of memory.
        None if plan.link == LinkKind::Rdma.name() => None,
        None => probe(link, true).await.ok().map(|probed| probed.bytes_per_s),
    };
    let capped = |rate: f64| if plan.bandwidth == 0 { rate } else { rate.min(plan.bandwidth as f64) };
    let rate = measured.map(capped).filter(|rate| *rate > 0.0);
    Estimate {
        memory_bytes: plan.memory_bytes,
        bytes_per_s: rate,
        seconds: rate.map(|rate| plan.memory_bytes as f64 / rate),
        downtime_target_ms: plan.downtime_target_ms,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn advice_is_given_where_another_start_would_have_helped() {
        let reason = |id: &str| [Reason { id: id.to_owned(), words: String::new() }];
        let words = advice(&reason("cpu-feature"), "alpha", "beta");
        assert_eq!(words.as_deref(), Some("start it with cpu = { common = [\"alpha\", \"beta\"] } to be able to move it there"));
        assert_eq!(advice(&reason("cpu-vendor"), "alpha", "beta"), None);
        assert_eq!(advice(&reason("tsc-frequency"), "alpha", "beta"), None);
    }
}
