//! The ticket that goes along with an order: the one that was given, or one that the operator's key signs for exactly this.
//! What a ticket is good for is `limosa_proto::ticket`'s; who asks for one is the destination.

use super::{Context, operator, strange, ticket as tickets};
use crate::output;
use limosa_agent::api::{Answer, ApiError, Parties, Request};
use limosa_agent::operator::{OperatorError, OperatorKey, Order};
use limosa_agent::remote;
use limosa_proto::identity::{HostId, VmId};
use limosa_proto::ticket::{Action, Guests, LIFE_DEFAULT_S, Link, Links, Ticket, TicketRefusal};
use std::io::Read as _;
use std::time::SystemTime;

/// What is read of a ticket's file: far more than a ticket has.
const FILE_BYTES_MAX: u64 = 4096;

/// The ticket for an order: `given` as text or as @FILE, or one made with the operator's key. None where there is neither:
/// whether one is needed is the destination's to say.
pub(crate) fn ticket(
    context: &Context,
    (vm, to): (&str, &str),
    action: Action,
    link: Option<&str>,
    given: Option<&str>,
) -> Result<Option<Ticket>, ApiError> {
    if let Some(given) = given {
        return read(given).map(Some);
    }
    let Some(key) = context.operator_key()? else { return Ok(None) };
    let parties = match context.ask(&Request::Parties { vm: vm.to_owned(), to: to.to_owned() })? {
        Answer::Parties(parties) => parties,
        other => return Err(strange(&other)),
    };
    context.check_parties(&parties)?;
    // "auto" is no link of its own.
    let links = link.and_then(|link| link.parse::<Link>().ok()).map_or(Links::ALL, |link| Links::of(&[link]));
    let ticket = signed(&key, &parties, action, links)?;
    if !context.json {
        let (claims, Parties { vm, vm_id, source, destination }) = (ticket.claims(), &*parties);
        output::note(format!(
            "signed by operator {}: {action} {vm} ({vm_id}) from {} to {}, once, until {}; ticket {}",
            claims.issuer,
            source.name,
            destination.name,
            tickets::date(claims.not_after),
            claims.nonce
        ));
    }
    Ok(Some(ticket))
}

/// A ticket for this move, good from now on.
pub(crate) fn signed(key: &OperatorKey, parties: &Parties, action: Action, links: Links) -> Result<Ticket, ApiError> {
    let bad = |words: String| ApiError::refused("agent-strange", format!("the agent's answer makes no sense: {words}"));
    let id = |text: &str| text.parse::<HostId>().map_err(|e| bad(e.to_string()));
    let not_before = tickets::seconds(SystemTime::now());
    let order = Order {
        action,
        guests: Guests::One(parties.vm_id.parse::<VmId>().map_err(|e| bad(e.to_string()))?),
        source: id(&parties.source.id)?,
        destination: id(&parties.destination.id)?,
        links,
        not_before,
        not_after: not_before.saturating_add(LIFE_DEFAULT_S),
    };
    key.ticket(order).map_err(|error| match error {
        OperatorError::Refused(refusal) => refused(&refusal),
        other => ApiError::refused("operator-key", other.to_string()),
    })
}

fn refused(refusal: &TicketRefusal) -> ApiError {
    ApiError::refused(refusal.code(), refusal.to_string())
}

fn read(given: &str) -> Result<Ticket, ApiError> {
    let mut text = given.to_owned();
    if let Some(path) = given.strip_prefix('@') {
        text.clear();
        let opened = std::fs::File::open(path).and_then(|file| file.take(FILE_BYTES_MAX).read_to_string(&mut text));
        opened.map_err(|e| ApiError::usage("ticket", format!("{path}: {e}")))?;
    }
    Ticket::parse(&text).map_err(|refusal| refused(&refusal))
}

impl Context {
    /// Holds what the agent says against what the operator knows, before it is signed: who the agent is, if it is on another
    /// machine, and who the destination is, if the operator knows a host of that name.
    fn check_parties(&self, parties: &Parties) -> Result<(), ApiError> {
        let other = |name: &str, said: &str, known: HostId| {
            let words =
                format!("{name} has the key {said} by the agent's word, and you know it with {known}: nothing was signed");
            ApiError::refused("host-key", words)
        };
        if let Some((remote, _)) = self.remote()?
            && parties.source.id.parse() != Ok(remote.id)
        {
            return Err(other(&remote.name, &parties.source.id, remote.id));
        }
        let Ok(directory) = operator::directory() else { return Ok(()) };
        let (name, said) = (&parties.destination.name, &parties.destination.id);
        match remote::known(&directory)?.named(name).filter(|known| said.parse() != Ok(known.id)) {
            Some(known) => Err(other(name, said, known.id)),
            None => Ok(()),
        }
    }
}
