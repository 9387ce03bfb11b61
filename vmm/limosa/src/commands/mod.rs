//! The commands, one file each. Most ask an agent and do nothing themselves; `fleet`, `operator` and `ticket` need none, nor does `allow --config`.

pub(crate) mod agent;
pub(crate) mod allow;
pub(crate) mod announce;
pub(crate) mod check;
pub(crate) mod console;
pub(crate) mod fleet;
pub(crate) mod host;
pub(crate) mod jobs;
pub(crate) mod manual;
pub(crate) mod migrate;
pub(crate) mod operator;
pub(crate) mod order;
pub(crate) mod ticket;
pub(crate) mod trust;
pub(crate) mod vm;

use crate::args::Cli;
use crate::output;
use limosa_agent::api::{Answer, ApiError, Exchange, JobInfo, Request, Response, exit};
use limosa_agent::operator::OperatorKey;
use limosa_agent::remote::Remote;
use limosa_proto::identity::HostId;
use std::path::{Path, PathBuf};

/// What every command needs of the command line.
pub(crate) struct Context {
    /// Whether results are JSON.
    pub(crate) json: bool,
    /// Whom commands go to.
    place: Place,
    /// The operator's key, where one was named.
    key: Option<PathBuf>,
}

/// Whom commands go to.
pub(crate) enum Place {
    /// The agent of this machine, by its API socket.
    Here(PathBuf),
    /// The agent of another one.
    There {
        /// As it was typed.
        host: String,
        /// The key that it must have, if that was typed.
        id: Option<HostId>,
    },
}

/// An exit code, or why there is none better.
pub(crate) type Ended = Result<u8, ApiError>;

impl Context {
    pub(crate) fn new(cli: &Cli) -> Context {
        let here = || Place::Here(cli.api.clone().unwrap_or_else(|| cli.run_dir.join("api.sock")));
        let place = cli.host.clone().map_or_else(here, |host| Place::There { host, id: cli.host_id });
        Context { json: cli.json && !cli.no_json, place, key: cli.key.clone() }
    }

    /// How a further command to the same agent begins.
    pub(crate) fn itself(&self) -> String {
        match &self.place {
            Place::Here(_) => "limosa".into(),
            Place::There { host, .. } => format!("limosa --host {host}"),
        }
    }

    /// Fails if another machine's agent was meant: `what` is done on this one.
    pub(crate) fn here_only(&self, what: &str) -> Result<(), ApiError> {
        match &self.place {
            Place::Here(_) => Ok(()),
            Place::There { host, .. } => {
                let words = format!(
                    "`limosa {what}` works with files or terminals of the machine it runs on: run it on {host}, without --host"
                );
                Err(ApiError::usage("not-remote", words))
            }
        }
    }

    /// The agent of another machine, if one was meant; with the operator's key, which must be there already.
    fn remote(&self) -> Result<Option<(Remote, OperatorKey)>, ApiError> {
        let Place::There { host, id } = &self.place else { return Ok(None) };
        let key = self.operator_key()?.ok_or_else(|| {
            let words = "there is no operator key to show to the agent: `limosa operator id` makes one; its id has to be an [[operator]] in the agent.toml there";
            ApiError::usage("operator-key", words)
        })?;
        let remote = Remote::find(&operator::directory()?, host, *id, &key)?;
        Ok(Some((remote, key)))
    }

    /// The operator's key, if there is one. None is made.
    pub(crate) fn operator_key(&self) -> Result<Option<OperatorKey>, ApiError> {
        let Ok(path) = operator::path_of(self) else { return Ok(None) };
        if !path.exists() {
            return Ok(None);
        }
        let key = OperatorKey::open(&path).map_err(|e| ApiError::usage("operator-key", e.to_string()))?;
        Ok(Some(key))
    }

    fn exchange(&self, request: &Request) -> Result<Exchange, ApiError> {
        match (&self.place, self.remote()?) {
            (_, Some((remote, key))) => remote.ask(&key, request),
            (Place::Here(socket), None) => Exchange::ask(socket, request),
            (Place::There { host, .. }, None) => Err(ApiError::usage("host", format!("{host} is not there"))),
        }
    }

    /// Asks the agent; progress goes to `on_job`, warnings to standard error.
    pub(crate) fn ask_with(&self, request: &Request, mut on_job: impl FnMut(&JobInfo)) -> Result<Answer, ApiError> {
        self.exchange(request)?.finish(|response| match response {
            Response::Progress(job) => on_job(job),
            Response::Warning(words) => output::note(format!("limosa: warning: {words}")),
            Response::Result(_) | Response::Error(_) => {}
        })
    }

    pub(crate) fn ask(&self, request: &Request) -> Result<Answer, ApiError> {
        self.ask_with(request, |_| {})
    }

    /// Asks for something whose answer is shown as words, or as `{"done": words}`.
    pub(crate) fn ask_done(&self, request: &Request) -> Ended {
        match self.ask(request)? {
            Answer::Done(words) if self.json => output::json(&serde_json::json!({ "done": words })),
            Answer::Done(words) => output::line(words),
            other => return Err(strange(&other)),
        }
        Ok(exit::DONE)
    }
}

/// An answer that does not belong to the question: agent and command are of different versions.
pub(crate) fn strange(answer: &Answer) -> ApiError {
    let kind = format!("{answer:?}");
    let kind = kind.split(['(', ' ', '{']).next().unwrap_or_default().to_string();
    ApiError::refused("agent-strange", format!("the agent answered something else ({kind}); is it of another version?"))
}

/// `path` from the root, because the agent has another working directory.
pub(crate) fn absolute(path: &Path) -> Result<PathBuf, ApiError> {
    std::path::absolute(path).map_err(|e| ApiError::usage("path", format!("{}: {e}", path.display())))
}
