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
pub(crate) mod ticket;
pub(crate) mod trust;
pub(crate) mod vm;

use crate::args::Cli;
use crate::output;
use limosa_agent::api::{Answer, ApiError, Exchange, JobInfo, Request, Response, exit};
use std::path::{Path, PathBuf};

/// What every command needs of the command line.
pub(crate) struct Context {
    /// Whether results are JSON.
    pub(crate) json: bool,
    /// The agent's API socket.
    pub(crate) socket: PathBuf,
}

/// An exit code, or why there is none better.
pub(crate) type Ended = Result<u8, ApiError>;

impl Context {
    pub(crate) fn new(cli: &Cli) -> Context {
        let socket = cli.api.clone().unwrap_or_else(|| cli.run_dir.join("api.sock"));
        Context { json: cli.json && !cli.no_json, socket }
    }

    /// Asks the agent; progress goes to `on_job`, warnings to standard error.
    pub(crate) fn ask_with(&self, request: &Request, mut on_job: impl FnMut(&JobInfo)) -> Result<Answer, ApiError> {
        Exchange::ask(&self.socket, request)?.finish(|response| match response {
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
