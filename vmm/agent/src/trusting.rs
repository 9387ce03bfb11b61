//! What commands change about who may talk to this host: trust, revocation, the rules of the allow-lists. Each change also cuts
//! off whom it no longer allows (`cutting`); who connects next meets it at the links.

use crate::agent::Agent;
use crate::allow_api::{AllowAnswer, AllowRequest};
use crate::api::{Answer, ApiError, HostInfo};
use crate::hosts::{HostsError, with_ports};
use crate::{cutting, reload};
use limosa_link::ask_key;
use limosa_proto::identity::HostId;
use limosa_proto::statement::Statement;
use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

fn refused(error: HostsError) -> ApiError {
    ApiError::refused("host", error.to_string())
}

fn done(agent: &Agent, words: String) -> Result<Answer, ApiError> {
    let cut = cutting::cut(agent, None);
    Ok(Answer::Done(format!("{words}{cut}")))
}

/// Which key whoever answers at `address` shows. Nothing is trusted by asking.
pub(crate) async fn ask(agent: &Arc<Agent>, address: &str) -> Result<Answer, ApiError> {
    let wrong = || ApiError::usage("address", format!("{address:?} is no address: ADDRESS or ADDRESS:PORT is needed"));
    let address = with_ports(address).ok_or_else(wrong)?;
    let id = ask_key(&address, &agent.key, agent.rules.here()).await;
    let id = id.map_err(|e| ApiError::refused(e.code().id(), e.to_string()))?;
    Ok(Answer::Host(HostInfo {
        name: agent.hosts.with_id(id).map(|host| host.name).unwrap_or_default(),
        id: id.to_string(),
        address,
    }))
}

/// No host has this one's own key, or an operator's.
fn not_ourselves(agent: &Agent, all: &[HostInfo]) -> Result<(), ApiError> {
    for info in all {
        let Ok(id) = info.id.parse::<HostId>() else { continue };
        let whose = match agent.operators.with_key(id) {
            Some(operator) => {
                format!("that key is operator {}'s: a host needs a key of its own; run `limosa host id` there", operator.name)
            }
            None if id == agent.key.id() => "that is this host's own id; run `limosa host id` on the other host".to_owned(),
            None => continue,
        };
        return Err(ApiError::refused("host", format!("{}: {whose}", info.name)));
    }
    Ok(())
}

/// Trusts one host.
pub(crate) fn trust(agent: &Agent, info: &[HostInfo]) -> Result<Answer, ApiError> {
    not_ourselves(agent, info)?;
    let [info] = info else { return trust_all(agent, info) };
    let host = agent.hosts.trust(info).map_err(refused)?;
    done(agent, format!("{} at {} is trusted", host.name, host.address))
}

/// Trusts all of these hosts, or none.
pub(crate) fn trust_all(agent: &Agent, all: &[HostInfo]) -> Result<Answer, ApiError> {
    not_ourselves(agent, all)?;
    let count = agent.hosts.trust_all(all).map_err(refused)?;
    done(agent, format!("{count} hosts are trusted"))
}

/// Trusts a host no more.
pub(crate) fn remove(agent: &Agent, name: &str) -> Result<Answer, ApiError> {
    agent.hosts.remove(name).map_err(refused)?;
    done(agent, format!("{name} is not trusted any more"))
}

/// Refuses a key for good, or forgets that.
pub(crate) fn revoke(agent: &Agent, which: &str, undo: bool) -> Result<Answer, ApiError> {
    if undo {
        let id: HostId = which.parse().map_err(|e| ApiError::usage("host", format!("{e}")))?;
        agent.hosts.forget_revocation(id).map_err(refused)?;
        let words =
            if agent.hosts.trusted().contains(id) { "trusted, as before" } else { "not trusted: nobody has said that it is" };
        return Ok(Answer::Done(format!("the key {id} is not revoked any more; it is {words}")));
    }
    let own = agent.key.id();
    if which.parse().is_ok_and(|id: HostId| id == own) {
        return Err(ApiError::refused("host", "that is this host's own key: the others have to revoke it"));
    }
    let id = agent.hosts.revoke(which).map_err(refused)?;
    done(agent, format!("the key {id} is revoked: it is refused from now on, trusted or not"))
}

/// What a statement says of a trusted host's new key.
pub(crate) fn statement(agent: &Agent, text: &str) -> Result<Answer, ApiError> {
    let bad = |words: String| ApiError::refused("statement", words);
    let said = Statement::parse(text, agent.config.trust.fleet).map_err(|e| bad(e.to_string()))?;
    let Statement::Succession(said) = said else {
        let words = "it is a fleet's, and those are read from the file that [trust] statements names: add it there, then `limosa allow reload`";
        return Err(bad(words.into()));
    };
    let name = agent.hosts.succeed(&said).map_err(|e| bad(e.to_string()))?;
    let until = UNIX_EPOCH + Duration::from_secs(said.until);
    let left = until.duration_since(SystemTime::now()).unwrap_or_default().as_secs();
    done(agent, format!("{name} has a new key, {}; its old one is good for {left} s more", said.new))
}

/// What is asked about the lists.
pub(crate) fn allow(agent: &Agent, request: AllowRequest) -> Result<Answer, ApiError> {
    let listen = &agent.config.listen;
    match request {
        AllowRequest::List => Ok(Answer::Allow(Box::new(AllowAnswer::List(agent.rules.lists().report(listen))))),
        AllowRequest::Test { address, here } => agent.rules.test(&address, here).map(|told| Answer::Allow(Box::new(told))),
        AllowRequest::Add { rule, here } => {
            let before = agent.rules.add(&rule, here)?;
            let cut = cutting::cut(agent, Some(&before));
            let closed = here.is_some() && !before.here.is_set();
            let first =
                if closed { "; from now on migrations use no other address of this host than the list names" } else { "" };
            let what = if here.is_some() { "of this host takes migrations" } else { "may connect" };
            Ok(Answer::Done(format!("{rule} {what}{first}{cut}")))
        }
        AllowRequest::Remove { rule, here } => {
            let before = agent.rules.remove(&rule, here)?;
            let cut = cutting::cut(agent, Some(&before));
            let empty = here && agent.rules.lists().here.rules().next().is_none();
            let last = if empty {
                "; it was the last: no address of this host takes migrations now (`limosa allow add --here 0.0.0.0/0` lets all of IPv4)"
            } else {
                ""
            };
            Ok(Answer::Done(format!("the rule {rule} is gone{last}{cut}")))
        }
        AllowRequest::Reload => reload::reload(agent).map(Answer::Done),
    }
}
