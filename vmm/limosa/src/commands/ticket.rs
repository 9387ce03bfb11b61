//! `limosa ticket make|show|verify`: tickets without an agent, for people and CI. When a ticket is good is decided in
//! `limosa_proto::ticket`, here and at the destination alike.

use super::operator::path_of;
use super::{Context, Ended};
use crate::args::{TicketCommand, TicketMakeArgs, TicketVerifyArgs};
use crate::output;
use limosa_agent::api::{ApiError, exit};
use limosa_agent::operator::{OperatorError, OperatorKey, Order};
use limosa_proto::identity::{OperatorId, VmId};
use limosa_proto::ticket::{
    self, Action, Claims, Context as Asked, Guests, LIFE_DEFAULT_S, Links, Operator, SKEW_DEFAULT_S, SpentNonces, Ticket,
    TicketRefusal,
};
use std::io::Read as _;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

/// What is read of standard input: far more than a ticket has.
const INPUT_BYTES_MAX: u64 = 4096;

pub(crate) fn run(context: &Context, command: TicketCommand) -> Ended {
    context.here_only("ticket")?;
    match command {
        TicketCommand::Make(args) => make(context, args),
        TicketCommand::Show { ticket } => show(context, &ticket),
        TicketCommand::Verify(args) => verify(context, &args),
    }
}

fn make(context: &Context, args: TicketMakeArgs) -> Ended {
    let not_before = seconds(args.from.unwrap_or_else(SystemTime::now));
    let life = args.life.map_or(LIFE_DEFAULT_S, |life| life.as_secs());
    let order = Order {
        action: args.action,
        guests: match (args.vm, args.vms) {
            (Some(id), _) => Guests::One(id),
            (None, Some(pattern)) => Guests::Named(pattern),
            (None, None) => return Err(ApiError::usage("usage", "either --vm or --vms is needed")),
        },
        source: args.source,
        destination: args.destination,
        links: if args.link.is_empty() { Links::ALL } else { Links::of(&args.link) },
        not_before,
        not_after: args.until.map_or(not_before.saturating_add(life), seconds),
    };
    let key = OperatorKey::open(&path_of(context)?).map_err(|e| ApiError::usage("operator-key", e.to_string()))?;
    let ticket = key.ticket(order).map_err(|error| match error {
        OperatorError::Refused(refusal) => ApiError::usage(refusal.code(), refusal.to_string()),
        other => ApiError::refused("operator-key", other.to_string()),
    })?;
    if context.json {
        output::json(&serde_json::json!({ "ticket": ticket.text(), "claims": as_json(ticket.claims()) }));
    } else {
        // Only the ticket: it is meant to be handed on.
        output::line(ticket.text());
    }
    Ok(exit::DONE)
}

fn show(context: &Context, text: &str) -> Ended {
    let ticket = read(text)?;
    let signature = ticket.check_signature();
    if context.json {
        output::json(&serde_json::json!({ "claims": as_json(ticket.claims()), "signature_fits": signature.is_ok() }));
    } else {
        let mut rows = rows(ticket.claims());
        let words = match &signature {
            Ok(()) => "is its issuer's; whether anybody trusts that key is not looked at",
            Err(_) => "IS NOT ITS ISSUER'S: nothing of the above is to be believed",
        };
        rows.push(vec!["signature".into(), words.into()]);
        output::table(&rows);
    }
    // Shown above already; only the exit code is left to say.
    Ok(if signature.is_ok() { exit::DONE } else { exit::REFUSED })
}

fn verify(context: &Context, args: &TicketVerifyArgs) -> Ended {
    let ticket = read(&args.ticket)?;
    let claims = ticket.claims();
    let trusted = |id: OperatorId| Operator { id, name: id.to_string(), actions: Action::ALL.to_vec() };
    let operators: Vec<Operator> = match args.operator.as_slice() {
        [] => vec![trusted(own_id(context)?)],
        named => named.iter().copied().map(trusted).collect(),
    };
    // What is not given is taken from the ticket itself, and said below.
    let (vm, name) = match &claims.guests {
        Guests::One(id) => (*id, String::new()),
        Guests::Named(pattern) => (VmId([0; 16]), pattern.example()),
    };
    let asked = Asked {
        now: seconds(args.at.unwrap_or_else(SystemTime::now)),
        skew: args.skew.map_or(SKEW_DEFAULT_S, |skew| skew.as_secs()),
        here: args.destination.unwrap_or(claims.destination),
        source: args.source.unwrap_or(claims.source),
        vm: args.vm.unwrap_or(vm),
        vm_name: args.name.as_deref().unwrap_or(&name),
        action: args.action.unwrap_or(claims.action),
        link: args.link,
        operators: &operators,
        spent: &SpentNonces::new(0),
        migration: None,
    };
    let grant = ticket::verify(&ticket, &asked).map_err(refused)?;
    let not_compared = not_compared(args, claims);
    if context.json {
        output::json(&serde_json::json!({ "ok": true, "claims": as_json(claims), "not_compared": not_compared }));
        return Ok(exit::DONE);
    }
    let once = if grant.single_use { "good for one attempt; whether it was used only its destination knows" } else { "standing" };
    output::line(format!("the ticket is good until {}: {once}", date(grant.not_after)));
    if !not_compared.is_empty() {
        output::note(format!("limosa: not compared: {}", not_compared.join(", ")));
    }
    Ok(exit::DONE)
}

/// The options that were left out and would have been compared.
fn not_compared(args: &TicketVerifyArgs, claims: &Claims) -> Vec<&'static str> {
    let guest = if claims.single_use() { ("--vm", args.vm.is_some()) } else { ("--name", args.name.is_some()) };
    let all = [
        guest,
        ("--source", args.source.is_some()),
        ("--destination", args.destination.is_some()),
        ("--action", args.action.is_some()),
        ("--link", args.link.is_some()),
    ];
    all.into_iter().filter(|(_, given)| !given).map(|(option, _)| option).collect()
}

/// The operator who asks; no key is made for that.
fn own_id(context: &Context) -> Result<OperatorId, ApiError> {
    let path = path_of(context)?;
    if !path.exists() {
        let words = format!("{} is not there, so you trust nobody: name an operator by --operator ID", path.display());
        return Err(ApiError::usage("operator-key", words));
    }
    Ok(OperatorKey::open(&path).map_err(|e| ApiError::usage("operator-key", e.to_string()))?.id())
}

fn read(text: &str) -> Result<Ticket, ApiError> {
    if text != "-" {
        return Ticket::parse(text).map_err(refused);
    }
    let mut input = String::new();
    let read = std::io::stdin().lock().take(INPUT_BYTES_MAX).read_to_string(&mut input);
    read.map_err(|e| ApiError::usage("input", format!("standard input: {e}")))?;
    Ticket::parse(&input).map_err(refused)
}

fn refused(refusal: TicketRefusal) -> ApiError {
    ApiError::refused(refusal.code(), refusal.to_string())
}

pub(crate) fn seconds(time: SystemTime) -> u64 {
    time.duration_since(UNIX_EPOCH).unwrap_or_default().as_secs()
}

/// A date in UTC; the number of seconds where it is beyond any calendar.
pub(crate) fn date(seconds: u64) -> String {
    // The last second of the year 9999: `humantime` formats no later one.
    const LAST: u64 = 253_402_300_799;
    let time = UNIX_EPOCH.checked_add(Duration::from_secs(seconds)).filter(|_| seconds <= LAST);
    time.map_or(format!("second {seconds}"), |time| humantime::format_rfc3339_seconds(time).to_string())
}

fn as_json(claims: &Claims) -> serde_json::Value {
    let (vm, vms) = match &claims.guests {
        Guests::One(id) => (Some(id.to_string()), None),
        Guests::Named(pattern) => (None, Some(pattern.as_str())),
    };
    serde_json::json!({
        "action": claims.action.name(),
        "vm": vm,
        "vms": vms,
        "source": claims.source.to_string(),
        "destination": claims.destination.to_string(),
        "links": claims.links.names(),
        "not_before": claims.not_before,
        "not_after": claims.not_after,
        "nonce": claims.nonce.to_string(),
        "issuer": claims.issuer.to_string(),
        "single_use": claims.single_use(),
    })
}

fn rows(claims: &Claims) -> Vec<Vec<String>> {
    let once = if claims.single_use() { ", once" } else { ", as often as needed" };
    let pairs = [
        ("allows", format!("{}{once}", claims.action)),
        ("of", claims.guests.to_string()),
        ("from", claims.source.to_string()),
        ("to", claims.destination.to_string()),
        ("over", claims.links.names().join(", ")),
        ("good from", date(claims.not_before)),
        ("until", date(claims.not_after)),
        ("nonce", claims.nonce.to_string()),
        ("issuer", claims.issuer.to_string()),
    ];
    pairs.into_iter().map(|(name, value)| vec![name.to_owned(), value]).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn dates_are_utc_and_have_an_end() {
        assert_eq!(date(1_800_000_000), "2027-01-15T08:00:00Z");
        assert_eq!(date(253_402_300_799), "9999-12-31T23:59:59Z");
        assert_eq!(date(u64::MAX), format!("second {}", u64::MAX));
        assert_eq!(seconds(UNIX_EPOCH - Duration::from_secs(1)), 0);
    }
}
