//! Commands from other machines: whose they are, how many at once, and what of the answers is shown. They came over the port
//! that guests come by, sealed, from a key that was proved. What an operator may do is `operators`'; the rest of it is the same
//! as on the UNIX socket (`serve`).

use crate::agent::Agent;
use crate::api::{ApiError, Request, Response};
use crate::audit::Who;
use crate::operators::Operator;
use crate::serve::{converse, last};
use limosa_link::{Caller, CommandChannel};
use limosa_proto::identity::{HostId, OperatorId};
use std::sync::Arc;

/// An operator who commands from another machine.
pub(crate) struct Remote {
    agent: Arc<Agent>,
    key: HostId,
    from: String,
}

impl Remote {
    /// As it is now: what it may do can change while it is answered.
    fn operator(&self) -> Result<Operator, ApiError> {
        let gone = || ApiError::refused("operator-unknown", "this key is no operator's here any more");
        self.agent.operators.with_key(self.key).ok_or_else(gone)
    }

    /// Whether it may have this done.
    ///
    /// # Errors
    /// Why not.
    pub(crate) fn permits(&self, request: &Request) -> Result<(), ApiError> {
        let operator = self.operator()?;
        let (name, from) = (&operator.name, &self.from);
        let vm_of = |id| self.agent.jobs.get(id).map(|job| job.vm);
        match operator.permits(request, &self.agent.config.name, vm_of) {
            Ok(action) => {
                tracing::info!(operator = name, from, action = action.name(), "a command from another machine");
                Ok(())
            }
            Err(error) => {
                tracing::warn!(operator = name, from, code = error.code, words = error.words, "a command was refused");
                Err(error)
            }
        }
    }

    /// What it is shown of a line of its answer.
    ///
    /// # Errors
    /// It is no operator any more.
    pub(crate) fn shown(&self, response: Response) -> Result<Option<Response>, ApiError> {
        Ok(self.operator()?.shown(response))
    }
}

/// Answers whoever is at the other end, in a task of its own.
pub(crate) fn receive(agent: &Arc<Agent>, caller: Caller, channel: CommandChannel) {
    let agent = Arc::clone(agent);
    tokio::spawn(async move {
        let mut stream = channel.stream;
        if !caller.operator {
            let host = agent.hosts.shown(caller.id);
            tracing::warn!(host, from = %caller.address, "a host's key was used to command, and was refused");
            let words = format!(
                "the key {} is a host's here: a host commands nothing; use an operator's key (`limosa operator id`)",
                caller.id
            );
            return last(&mut stream, Response::Error(ApiError::refused("not-an-operator", words))).await;
        }
        let Ok(_place) = Arc::clone(&agent.operators.sessions).try_acquire_owned() else {
            let words =
                "so many commands from other machines are being answered here that there is no room for another; try again";
            return last(&mut stream, Response::Error(ApiError::refused("busy", words))).await;
        };
        let from = caller.address.to_string();
        let remote = Remote { agent: Arc::clone(&agent), key: caller.id, from: from.clone() };
        let operator = match remote.operator() {
            Ok(operator) => operator,
            Err(error) => return last(&mut stream, Response::Error(error)).await,
        };
        let id = OperatorId(caller.id.0).to_string();
        let who = Who { by: format!("operator {} ({id}) from {from}", operator.name), operator: Some(id), from };
        let (read, write) = tokio::io::split(stream);
        converse(agent, read, write, &who, Some(remote)).await;
    });
}
