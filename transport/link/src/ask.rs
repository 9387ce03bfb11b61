//! Questions that a host asks another beside a migration, each on a control channel of its own: which CPU it gives to guests,
//! whether a guest could come, and whether a guest that was to come was ever released. A source's question about a guest that it has
//! released is `driver::ask_verdict`; which links a host has is asked by `probe`.

use crate::control::ControlError;
use crate::{ConnectError, Link};
use limosa_proto::cpu::CpuProfile;
use limosa_proto::identity::{Generation, MigrationId};
use limosa_proto::ticket::TicketBytes;
use limosa_proto::wire::code::Code;
use limosa_proto::wire::frame::ControlHeader;
use limosa_proto::wire::message::{Message, Reason, ReleasedAnswer, VmDescription};
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
const RELEASED: &str = "whether it released the guest";

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

/// Whether the source at the other end of `link` has released this attempt: a destination's question.
///
/// # Errors
/// It cannot be reached, or does not answer; that proves nothing.
pub async fn ask_released(link: &dyn Link, migration: MigrationId, generation: Generation) -> Result<ReleasedAnswer, AskError> {
    let (header, answer) = ask_about(link, RELEASED, migration, generation, None, &Message::ReleasedAsk).await?;
    let foreign = |words| AskError::Answer { host: link.destination(), what: RELEASED, words };
    header.expect(migration, generation).map_err(|error| foreign(format!("answered for another: {error}")))?;
    match answer {
        Message::Released(answer) => Ok(answer),
        other => Err(strange(link, RELEASED, &other)),
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
    ask_about(link, what, MigrationId([0; 16]), Generation(0), ticket, question).await.map(|(_, answer)| answer)
}

async fn ask_about(
    link: &dyn Link,
    what: &'static str,
    migration: MigrationId,
    generation: Generation,
    ticket: Option<TicketBytes>,
    question: &Message,
) -> Result<(ControlHeader, Message), AskError> {
    let lost = |error| AskError::Control { host: link.destination(), what, error };
    let mut control = link.control().await?;
    for message in ticket.map(Message::Ticket).iter().chain([question]) {
        control.send(migration, generation, message).map_err(lost)?;
    }
    match tokio::time::timeout(ANSWER_MAX, control.receive()).await {
        Ok(Ok(answered)) => Ok(answered),
        Ok(Err(error)) => Err(lost(error)),
        Err(_) => Err(AskError::Silent { host: link.destination(), what }),
    }
}
