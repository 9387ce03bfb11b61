//! `limosa announce VM`: tells the network once more where a guest is.

use super::{Context, Ended, strange};
use crate::output;
use limosa_agent::api::{Answer, Request, exit};

pub(crate) fn run(context: &Context, vm: String) -> Ended {
    match context.ask(&Request::Announce { vm })? {
        Answer::Announced(sent) if context.json => output::json(&serde_json::json!({ "announcements": sent })),
        Answer::Announced(sent) => sent.iter().for_each(output::line),
        other => return Err(strange(&other)),
    }
    Ok(exit::DONE)
}
