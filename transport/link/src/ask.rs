//! Questions that a host asks another beside a migration, each on a control channel of its own: which CPU it gives to guests, and
//! whether a guest could come. Nothing is changed by them. Which links a host has is asked by `probe`.

use crate::control::ControlError;
use crate::{ConnectError, Link};
use limosa_proto::cpu::CpuProfile;
use limosa_proto::identity::{Generation, MigrationId};
use limosa_proto::ticket::TicketBytes;
use limosa_proto::wire::code::Code;
use limosa_proto::wire::message::{Message, Reason, VmDescription};
use std::time::Duration;

/// A host that answers slower than this does not answer. It may have to start a VMM first, to learn what its CPU is.
const ANSWER_MAX: Duration = Duration::from_secs(15);

/// Why a host gave no answer.
#[derive(Debug, thiserror::Error)]
pub enum AskError {
    /// It could not be reached.
    #[error(transparent)]
    Connect(#[from] ConnectError),
    /// The channel ended.
    #[error("{host}, asked {what}: {error}")]
    Control {
        /// Whom we asked.
        host: String,
        /// What.
        what: &'static str,
        /// Why there was no answer.
        error: ControlError,
    },
    /// It said something else.
    #[error("{host}, asked {what}, {words}")]
    Answer {
        /// Whom we asked.
        host: String,
        /// What.
        what: &'static str,
        /// What it did.
        words: String,
    },
    /// It said nothing in time.
    #[error("{host}, asked {what}, did not answer within {} s", ANSWER_MAX.as_secs())]
    Silent {
        /// Whom we asked.
        host: String,
        /// What.
        what: &'static str,
    },
}

impl AskError {
    /// The code of it.
    #[must_use]
    pub fn code(&self) -> Code {
        match self {
            AskError::Connect(error) => error.code(),
            AskError::Control { error: ControlError::KeyRefused, .. } => Code::UnknownHost,
            AskError::Control { .. } => Code::LinkLost,
            AskError::Answer { .. } => Code::Violation,
            AskError::Silent { .. } => Code::Timeout,
        }
    }
}

const CPU: &str = "which CPU it gives to guests";
const CHECK: &str = "whether the guest could come";

/// The CPU that the host at the other end of `link` can give to guests; empty if it cannot tell.
///
/// # Errors
/// It cannot be reached, or does not answer.
pub async fn ask_cpu(link: &dyn Link) -> Result<CpuProfile, AskError> {
    match ask(link, CPU, None, &Message::CpuAsk).await? {
        Message::Cpu(profile) => Ok(profile),
        other => Err(strange(link, CPU, &other)),
    }
}

/// Every reason for which the guest could not come to the host at the other end of `link`; none if it could. `ticket` is shown
/// first.
///
/// # Errors
/// It cannot be reached, or does not answer.
pub async fn ask_check(link: &dyn Link, vm: &VmDescription, ticket: Option<TicketBytes>) -> Result<Vec<Reason>, AskError> {
    match ask(link, CHECK, ticket, &Message::CheckAsk(Box::new(vm.clone()))).await? {
        Message::Checked(reasons) => Ok(reasons),
        other => Err(strange(link, CHECK, &other)),
    }
}

fn strange(link: &dyn Link, what: &'static str, answer: &Message) -> AskError {
    let words = match answer {
        Message::Abort { words, .. } => format!("said: {words}"),
        other => format!("answered {}", other.name()),
    };
    AskError::Answer { host: link.destination(), what, words }
}

async fn ask(link: &dyn Link, what: &'static str, ticket: Option<TicketBytes>, question: &Message) -> Result<Message, AskError> {
    let lost = |error| AskError::Control { host: link.destination(), what, error };
    let mut control = link.control().await?;
    for message in ticket.map(Message::Ticket).iter().chain([question]) {
        control.send(MigrationId([0; 16]), Generation(0), message).map_err(lost)?;
    }
    match tokio::time::timeout(ANSWER_MAX, control.receive()).await {
        Ok(Ok((_, answer))) => Ok(answer),
        Ok(Err(error)) => Err(lost(error)),
        Err(_) => Err(AskError::Silent { host: link.destination(), what }),
    }
}
