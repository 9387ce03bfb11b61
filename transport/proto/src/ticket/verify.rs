//! Whether a ticket is good for what is asked with it, here and now; and if not, why not and what helps.
//! It takes no note of anything: that a ticket was used is `spent`'s.

use super::{Action, Claims, Guests, Link, Links, SKEW_MAX_S, SpentNonces, Ticket};
use crate::identity::{HostId, MigrationId, Nonce, OperatorId, VmId};

/// What a peer is told that nobody knows, whatever the reason is.
pub const STRANGERS_WORDS: &str = "the ticket is not accepted";
/// The code beside it.
pub const STRANGERS_CODE: &str = "ticket-refused";

/// An operator whose tickets count on this host.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Operator {
    /// The key.
    pub id: OperatorId,
    /// What the operator is called here.
    pub name: String,
    /// What tickets of this operator may be for.
    pub actions: Vec<Action>,
}

/// What is asked with a ticket, and what is known here.
#[derive(Debug, Clone, Copy)]
pub struct Context<'t> {
    /// This host's clock, in seconds since 1970.
    pub now: u64,
    /// By how many seconds the issuer's clock may differ from it; at most [`SKEW_MAX_S`] count.
    pub skew: u64,
    /// This host: the destination.
    pub here: HostId,
    /// The host that presents the ticket, by the key that it has proved to hold.
    pub source: HostId,
    /// The guest that it is about.
    pub vm: VmId,
    /// What the source calls it.
    pub vm_name: &'t str,
    /// What is to be done.
    pub action: Action,
    /// What carries the pages; none where nothing is carried.
    pub link: Option<Link>,
    /// Whose tickets count.
    pub operators: &'t [Operator],
    /// Which tickets were used.
    pub spent: &'t SpentNonces,
    /// The migration that it is presented for, where there is one: another attempt at the one that used it is no second use.
    pub migration: Option<MigrationId>,
}

/// What a ticket that was found good allows. A ticket for one guest is not used up yet: [`SpentNonces::spend`].
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Grant {
    /// What may be done.
    pub action: Action,
    /// Who allowed it.
    pub issuer: OperatorId,
    /// What that operator is called here.
    pub operator: String,
    /// Over which links it may be done.
    pub links: Links,
    /// Which ticket it was.
    pub nonce: Nonce,
    /// Until when it was good, in seconds since 1970.
    pub not_after: u64,
    /// Whether it is good once only.
    pub single_use: bool,
}

impl Grant {
    /// Until when it has to be known that this ticket was used.
    pub(crate) fn remembered_until(&self) -> u64 {
        remembered_until(self.not_after)
    }
}

fn remembered_until(not_after: u64) -> u64 {
    not_after.saturating_add(SKEW_MAX_S)
}

/// Why a ticket is not accepted, with what helps. The words are for operators and for hosts whose key is trusted;
/// [`TicketRefusal::told`] is for everybody else.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum TicketRefusal {
    /// No ticket at all.
    #[error("this is no ticket: {words}; copy the whole line that `limosa ticket make` printed")]
    Malformed {
        /// What is wrong.
        words: String,
    },
    /// A ticket of another version.
    #[error("the ticket has version {found}, this build reads version {known}: make it with the release that the destination runs", known = super::VERSION)]
    Version {
        /// Its version.
        found: String,
    },
    /// Claims that do not go together, even if they are signed.
    #[error("the ticket makes no sense: {words}; make another")]
    Senseless {
        /// What is wrong.
        words: String,
    },
    /// Nobody trusts its issuer here.
    #[error(
        "the ticket is signed by operator {issuer}, whom {here} does not trust: trust that key there, if `limosa operator id` shows it to the operator whom you mean"
    )]
    Issuer {
        /// Who has signed it, by its own word.
        issuer: OperatorId,
        /// Where.
        here: HostId,
    },
    /// The signature is not the issuer's.
    #[error(
        "the ticket's signature is not that of operator {issuer}: it was changed or damaged; get it again from whoever made it"
    )]
    Signature {
        /// Who should have signed it.
        issuer: OperatorId,
    },
    /// The issuer may not allow this.
    #[error(
        "operator \"{operator}\" ({issuer}) is not trusted with \"{action}\" here: add it to that operator's actions, or have another operator sign"
    )]
    NotDelegated {
        /// The operator's name here.
        operator: String,
        /// The operator's key.
        issuer: OperatorId,
        /// What was to be allowed.
        action: Action,
    },
    /// For something else.
    #[error("the ticket is for \"{named}\", and \"{asked}\" was asked for: make one with --action {asked}")]
    Action {
        /// What it allows.
        named: Action,
        /// What was asked.
        asked: Action,
    },
    /// For another destination.
    #[error("the ticket is for destination {named}, and this host is {here}: make one for this host, or go to the other")]
    Destination {
        /// The host that it names.
        named: HostId,
        /// This host.
        here: HostId,
    },
    /// For another source.
    #[error("the ticket is for source {named}, and was presented by {peer}: only the host that it names can use it")]
    Source {
        /// The host that it names.
        named: HostId,
        /// Who presented it.
        peer: HostId,
    },
    /// For another guest.
    #[error("the ticket is for {named}, and this guest is \"{name}\" with id {vm}: make one for this guest")]
    Guest {
        /// The guests that it names.
        named: String,
        /// The name of this one.
        name: String,
        /// The id of this one.
        vm: VmId,
    },
    /// Not for this link.
    #[error(
        "the ticket is for {links}, and the migration goes over {link}: choose another by --link, or make a ticket that allows it"
    )]
    Link {
        /// What it allows.
        links: String,
        /// What was asked.
        link: Link,
    },
    /// It begins later.
    #[error("the ticket is good only in {}: wait; or if it was made just now, the issuer's clock is ahead of this host's by that much: set the clocks (`timedatectl`), or allow more than {} of skew", span(*early_s), span(*skew_s))]
    NotYet {
        /// Seconds until it begins by this host's clock.
        early_s: u64,
        /// What was allowed for.
        skew_s: u64,
    },
    /// It has ended.
    #[error("the ticket expired {} ago: make another; or if it was made just now, this host's clock is ahead of the issuer's by at least that much: set the clocks (`timedatectl`), or allow more than {} of skew", span(*late_s), span(*skew_s))]
    Expired {
        /// Seconds since its end by this host's clock.
        late_s: u64,
        /// What was allowed for.
        skew_s: u64,
    },
    /// It was used.
    #[error("the ticket ({nonce}) was used already, and it is good for one migration: make another")]
    Used {
        /// Which.
        nonce: Nonce,
    },
    /// Nobody knows any more whether it was used: the clock has gone back.
    #[error(
        "this host has forgotten which tickets of that time were used, since its clock was later before: set its clock (`timedatectl`), then make another ticket"
    )]
    Forgotten,
    /// No room to remember that it was used.
    #[error(
        "this host remembers {count} used tickets and can remember no more: wait until the oldest expire, and make tickets with a shorter life"
    )]
    Full {
        /// How many.
        count: usize,
    },
}

impl TicketRefusal {
    /// Its stable code, for machines.
    #[must_use]
    pub fn code(&self) -> &'static str {
        match self {
            TicketRefusal::Malformed { .. } => "ticket-malformed",
            TicketRefusal::Version { .. } => "ticket-version",
            TicketRefusal::Senseless { .. } => "ticket-senseless",
            TicketRefusal::Issuer { .. } => "ticket-issuer",
            TicketRefusal::Signature { .. } => "ticket-signature",
            TicketRefusal::NotDelegated { .. } => "ticket-not-delegated",
            TicketRefusal::Action { .. } => "ticket-action",
            TicketRefusal::Destination { .. } => "ticket-destination",
            TicketRefusal::Source { .. } => "ticket-source",
            TicketRefusal::Guest { .. } => "ticket-guest",
            TicketRefusal::Link { .. } => "ticket-link",
            TicketRefusal::NotYet { .. } => "ticket-not-yet",
            TicketRefusal::Expired { .. } => "ticket-expired",
            TicketRefusal::Used { .. } => "ticket-used",
            TicketRefusal::Forgotten => "ticket-forgotten",
            TicketRefusal::Full { .. } => "ticket-full",
        }
    }

    /// Code and words for whoever presented it: its own for a host whose key is trusted, for others always the same.
    #[must_use]
    pub fn told(&self, trusted: bool) -> (&'static str, String) {
        if trusted { (self.code(), self.to_string()) } else { (STRANGERS_CODE, STRANGERS_WORDS.to_owned()) }
    }
}

/// Whether `ticket` is good for what is asked.
///
/// # Errors
/// The first thing that is wrong. Nothing that it says is looked at before its issuer is known and the signature fits.
pub fn verify(ticket: &Ticket, context: &Context<'_>) -> Result<Grant, TicketRefusal> {
    let claims = &ticket.claims;
    let issuer = claims.issuer;
    let Some(operator) = context.operators.iter().find(|operator| operator.id == issuer) else {
        return Err(TicketRefusal::Issuer { issuer, here: context.here });
    };
    ticket.check_signature()?;
    claims.check()?;
    if !operator.actions.contains(&claims.action) {
        return Err(TicketRefusal::NotDelegated { operator: operator.name.clone(), issuer, action: claims.action });
    }
    fits_what_is_asked(claims, context)?;
    fits_the_time(claims, context)?;
    let grant = Grant {
        action: claims.action,
        issuer,
        operator: operator.name.clone(),
        links: claims.links,
        nonce: claims.nonce,
        not_after: claims.not_after,
        single_use: claims.single_use(),
    };
    context.spent.is_new(&grant, context.migration)?;
    Ok(grant)
}

fn fits_what_is_asked(claims: &Claims, context: &Context<'_>) -> Result<(), TicketRefusal> {
    if claims.destination != context.here {
        return Err(TicketRefusal::Destination { named: claims.destination, here: context.here });
    }
    if claims.source != context.source {
        return Err(TicketRefusal::Source { named: claims.source, peer: context.source });
    }
    if claims.action != context.action {
        return Err(TicketRefusal::Action { named: claims.action, asked: context.action });
    }
    let fits = match &claims.guests {
        Guests::One(id) => *id == context.vm,
        Guests::Named(pattern) => pattern.fits(context.vm_name),
    };
    if !fits {
        // The name is the source's word: it is cut before it is shown.
        let name = context.vm_name.chars().take(80).collect();
        return Err(TicketRefusal::Guest { named: claims.guests.to_string(), name, vm: context.vm });
    }
    match context.link.filter(|link| !claims.links.has(*link)) {
        Some(link) => Err(TicketRefusal::Link { links: claims.links.names().join(", "), link }),
        None => Ok(()),
    }
}

fn fits_the_time(claims: &Claims, context: &Context<'_>) -> Result<(), TicketRefusal> {
    let skew_s = context.skew.min(SKEW_MAX_S);
    let early_s = claims.not_before.saturating_sub(context.now);
    let late_s = context.now.saturating_sub(claims.not_after);
    if early_s > skew_s {
        return Err(TicketRefusal::NotYet { early_s, skew_s });
    }
    if late_s > skew_s {
        return Err(TicketRefusal::Expired { late_s, skew_s });
    }
    Ok(())
}

/// Seconds as people say them, in two units at most.
pub(crate) fn span(seconds: u64) -> String {
    const UNITS: [(u64, &str); 4] = [(86_400, "days"), (3_600, "h"), (60, "min"), (1, "s")];
    let large = UNITS.iter().position(|(unit, _)| seconds >= *unit).unwrap_or(UNITS.len() - 1);
    let mut left = seconds;
    let mut parts = Vec::new();
    for (unit, name) in UNITS.iter().skip(large).take(2) {
        if left >= *unit || (parts.is_empty() && *unit == 1) {
            parts.push(format!("{} {name}", left / unit));
        }
        left %= unit;
    }
    parts.join(" ")
}
