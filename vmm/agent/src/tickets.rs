//! Tickets at work: whether a guest may come by one, and the file that remembers which were used. When a ticket is good is
//! `limosa_proto::ticket`'s; whom this host trusts is `operators`'.
//!
//! A ticket is written down as used, durably, before anything is done for its guest. A file that cannot be understood is never
//! guessed at: no ticket is accepted then.

use crate::agent::Agent;
use crate::api::{ApiError, HostInfo, MigrateRequest, Parties};
use crate::checked::Section;
use crate::hosts::Host;
use crate::jobs::unix_ms;
use crate::journal::sync_directory;
use crate::rotation;
use limosa_proto::identity::{HostId, MigrationId, Nonce, VmId};
use limosa_proto::ticket::{
    self, Action, Context, Grant, Operator, SKEW_DEFAULT_S, SKEW_MAX_S, SpentNonces, Ticket, TicketBytes, TicketRefusal, verify,
};
use limosa_proto::wire::code::Code;
use limosa_proto::wire::limits::{WORDS_BYTES_MAX, fit};
use limosa_proto::wire::message::{Reason, Refusal, VmDescription};
use nix::fcntl::{Flock, FlockArg};
use std::fs::{File, OpenOptions};
use std::io::{self, Read as _, Seek as _, SeekFrom, Write as _};
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};

/// Name of the file in the agent's state directory.
pub const FILE_NAME: &str = "tickets";
/// Used tickets that are remembered: 4 MiB of them.
const SPENT_MAX: usize = 65_536;
/// A file with so many lines more than it needs is written anew.
const LINES_SPARE: usize = 4096;
/// A larger file than this can hold nothing right.
const BYTES_MAX: u64 = 64 << 20;

/// How tickets are asked for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Settings {
    /// Whether no guest comes without one.
    pub required: bool,
    /// By how many seconds clocks may differ.
    pub skew_s: u64,
}

impl Default for Settings {
    fn default() -> Settings {
        Settings { required: true, skew_s: SKEW_DEFAULT_S }
    }
}

impl Settings {
    /// Reads `[tickets]`; gives what should be said about it.
    pub(crate) fn read(&mut self, mut section: Section<'_, '_>) -> Option<String> {
        self.required = section.boolean("required").unwrap_or(self.required);
        self.skew_s = section.integer("skew_s", 0..=SKEW_MAX_S).unwrap_or(self.skew_s);
        section.close();
        let words = "tickets.required = false: any trusted host may send any guest here, without an operator's word";
        (!self.required).then(|| words.to_owned())
    }
}

/// The used tickets of this host, or why no ticket is accepted.
#[derive(Debug)]
pub struct Tickets(Mutex<Result<Book, String>>);

#[derive(Debug)]
struct Book {
    path: PathBuf,
    file: Flock<File>,
    /// Of the file, all of it good.
    bytes: u64,
    lines: usize,
    spent: SpentNonces,
}

fn said(path: &Path, doing: &str, error: &dyn std::fmt::Display) -> String {
    format!("the file of used tickets {} cannot be {doing}: {error}", path.display())
}

fn locked(path: &Path, truncate: bool) -> io::Result<Flock<File>> {
    let file = OpenOptions::new().read(true).write(true).create(true).truncate(truncate).open(path)?;
    Flock::lock(file, FlockArg::LockExclusiveNonblock).map_err(|(_, errno)| errno.into())
}

impl Book {
    fn open(directory: &Path, now: u64) -> Result<Book, String> {
        let path = directory.join(FILE_NAME);
        let mut file = locked(&path, false).map_err(|e| said(&path, "opened", &e))?;
        let mut bytes = Vec::new();
        let read = (&mut *file).take(BYTES_MAX + 1).read_to_end(&mut bytes);
        read.map_err(|e| said(&path, "read", &e))?;
        if bytes.len() as u64 > BYTES_MAX {
            return Err(said(&path, "read", &"it is larger than can be right"));
        }
        let (spent, good) = SpentNonces::read(&bytes, SPENT_MAX).map_err(|e| said(&path, "used", &e))?;
        let lines = spent.count();
        let mut book = Book { path, file, bytes: good as u64, lines, spent };
        if good < bytes.len() {
            // A line that a crash has torn: what it was to allow was not done.
            book.cut().map_err(|e| said(&book.path, "mended", &e))?;
        }
        if good == 0 || book.spent.forget(now) > 0 {
            book.write_anew().map_err(|e| said(&book.path, "written", &e))?;
        }
        Ok(book)
    }

    /// Takes off what is behind the good lines.
    fn cut(&mut self) -> io::Result<()> {
        self.file.set_len(self.bytes)?;
        self.file.sync_all()?;
        self.file.seek(SeekFrom::Start(self.bytes)).map(drop)
    }

    /// The whole file anew, in place of the old one.
    fn write_anew(&mut self) -> io::Result<()> {
        let (beside, bytes) = (self.path.with_extension("new"), self.spent.emit());
        let mut file = locked(&beside, true)?;
        file.write_all(&bytes)?;
        file.sync_all()?;
        std::fs::rename(&beside, &self.path)?;
        sync_directory(self.path.parent().unwrap_or(Path::new("/")))?;
        (self.file, self.bytes, self.lines) = (file, bytes.len() as u64, self.spent.count());
        Ok(())
    }

    /// Makes a line durable. If that fails, nothing of it stays.
    fn append(&mut self, line: &[u8]) -> io::Result<()> {
        self.file.seek(SeekFrom::Start(self.bytes))?;
        self.file.write_all(line)?;
        self.file.sync_all()?;
        self.bytes += line.len() as u64;
        self.lines += 1;
        Ok(())
    }
}

impl Tickets {
    /// Opens the file in `directory`, or begins one. Where it cannot be used, no ticket is accepted, and why is said.
    #[must_use]
    pub fn open(directory: &Path) -> Tickets {
        let book = Book::open(directory, unix_ms() / 1000);
        if let Err(words) = &book {
            tracing::error!(words, "no ticket is accepted");
        }
        Tickets(Mutex::new(book))
    }

    /// Uses a ticket up, durably, if `may` has nothing against it.
    fn spend(
        &self,
        asked: &Asked<'_>,
        ticket: &TicketBytes,
        operators: &[Operator],
        may: impl FnOnce(&Grant) -> Result<(), Refused>,
    ) -> Result<Grant, Refused> {
        let told = |refusal: TicketRefusal| (refusal.code().to_owned(), refusal.to_string());
        let unusable = |words: &String| ("ticket-store".to_owned(), format!("the destination accepts no ticket: {words}"));
        let mut book = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let kept = book.as_mut().map_err(|words| unusable(words))?;
        let context = asked.context(operators, &kept.spent);
        let grant = ticket.parse().and_then(|ticket| verify(&ticket, &context)).map_err(told)?;
        may(&grant)?;
        let Some(line) = kept.spent.spend(&grant, asked.migration, asked.now).map_err(told)? else { return Ok(grant) };
        let written = kept.append(&line);
        if let Err(error) = written {
            let words = said(&kept.path, "written", &error);
            // What is half written must not be taken for a line's beginning by the next one.
            if let Err(error) = kept.cut() {
                *book = Err(said(Path::new(FILE_NAME), "mended", &error));
            }
            return Err(unusable(&words));
        }
        if kept.lines > kept.spent.count() + LINES_SPARE
            && let Err(error) = kept.write_anew()
        {
            tracing::warn!(%error, "the used tickets could not be written anew; the longer file stays");
        }
        Ok(grant)
    }

    /// The migration that used it has come so far that no attempt follows.
    pub(crate) fn close(&self, nonce: Nonce) {
        if let Ok(book) = self.0.lock().unwrap_or_else(PoisonError::into_inner).as_mut() {
            book.spent.close(nonce);
        }
    }
}

/// A code for machines, and words.
type Refused = (String, String);

/// What a ticket is to be for.
pub(crate) struct Asked<'a> {
    pub(crate) here: HostId,
    pub(crate) source: HostId,
    pub(crate) vm: VmId,
    pub(crate) vm_name: &'a str,
    pub(crate) action: Action,
    pub(crate) link: Option<ticket::Link>,
    pub(crate) migration: Option<MigrationId>,
    pub(crate) skew: u64,
    pub(crate) now: u64,
}

impl<'a> Asked<'a> {
    fn context(&self, operators: &'a [Operator], spent: &'a SpentNonces) -> Context<'a> {
        let Asked { here, source, vm, vm_name, action, link, migration, skew, now } = *self;
        Context { now, skew, here, source, vm, vm_name, action, link, operators, spent, migration }
    }
}

/// Who would like to do what here with a guest.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Arrival {
    pub(crate) source: HostId,
    pub(crate) action: Action,
    pub(crate) link: Option<ticket::Link>,
    pub(crate) migration: Option<MigrationId>,
}

/// Whether a guest may come, or be asked about, by this ticket. It is used up then. Gives the ticket that it was, for
/// [`Tickets::close`]. May block.
///
/// # Errors
/// Why not, for the source.
pub(crate) fn admit(
    agent: &Agent,
    arrival: Arrival,
    vm: &VmDescription,
    ticket: Option<&TicketBytes>,
) -> Result<Option<Nonce>, Reason> {
    if !agent.config.tickets.required {
        return Ok(None);
    }
    let refused = |(code, words): Refused| {
        let from = agent.hosts.shown(arrival.source);
        tracing::warn!(from, vm = vm.name, code, words, "a ticket was refused");
        // A host that is trusted no more is a stranger.
        let known = agent.hosts.with_id(arrival.source).is_some();
        let (id, words) = if known { (code, words) } else { (ticket::STRANGERS_CODE.into(), ticket::STRANGERS_WORDS.into()) };
        Reason { id, words: fit(&words, WORDS_BYTES_MAX) }
    };
    let here = &agent.config.name;
    let Some(ticket) = ticket else {
        let words = format!(
            "{here} takes no guest without an operator's ticket: run the command with your operator key (`limosa operator id` makes it; its id has to be an [[operator]] in the agent.toml of {here}), or give a ticket by --ticket"
        );
        return Err(refused(("ticket-missing".into(), words)));
    };
    let (source, own) = as_named(agent, arrival.source, ticket);
    let asked = Asked {
        here: own,
        source,
        vm: vm.id,
        vm_name: &vm.name,
        action: arrival.action,
        link: arrival.link,
        migration: arrival.migration,
        skew: agent.config.tickets.skew_s,
        now: unix_ms() / 1000,
    };
    let may = |grant: &Grant| {
        let operators = agent.operators.all();
        if operators.iter().any(|one| one.id == grant.issuer && one.has_guest(&vm.name)) {
            return Ok(());
        }
        let name = vm.name.chars().take(80).collect::<String>();
        let words = format!(
            "tickets of operator {0} are not good for guests called {name} on {here}: add the name to vms of [[operator]] \"{0}\" in its agent.toml",
            grant.operator
        );
        Err(("ticket-not-delegated".to_owned(), words))
    };
    let grant = agent.tickets.spend(&asked, ticket, &agent.operators.issuers(), may).map_err(refused)?;
    let (from, nonce) = (agent.hosts.shown(arrival.source), grant.nonce);
    tracing::info!(operator = grant.operator, from, vm = vm.name, action = %grant.action, %nonce, "a ticket was accepted");
    Ok(grant.single_use.then_some(nonce))
}

/// The source that has proved `shown`, and this host, by the keys that the ticket names them by: a host that gets a new key has two
/// for a while, and is the same host.
fn as_named(agent: &Agent, shown: HostId, ticket: &TicketBytes) -> (HostId, HostId) {
    let own = agent.key.id();
    let Ok(ticket) = ticket.parse() else { return (shown, own) };
    let (source, destination) = (ticket.claims().source, ticket.claims().destination);
    let source = if agent.hosts.trusted().same_host(source, shown) { source } else { shown };
    (source, if rotation::is_next(agent, destination) { destination } else { own })
}

/// A refusal for this reason.
pub(crate) fn refusal(reason: Reason) -> Refusal {
    Refusal { code: Code::Ticket, reasons: vec![reason] }
}

/// The word for machines: of a ticket's refusal the reason's own.
pub(crate) fn code_of(refusal: &Refusal) -> String {
    let reason = refusal.reasons.first().filter(|_| refusal.code == Code::Ticket);
    reason.map_or_else(|| refusal.code.to_string(), |reason| reason.id.clone())
}

/// The ticket of an order, checked as far as the source can: who may sign it only the destination knows, and whether it was used.
///
/// # Errors
/// It is no ticket, or not for this.
pub(crate) fn of_order(
    agent: &Agent,
    request: &MigrateRequest,
    (vm, vm_name): (VmId, &str),
    to: &Host,
    action: Action,
) -> Result<Option<TicketBytes>, ApiError> {
    let Some(text) = &request.ticket else { return Ok(None) };
    let refused = |refusal: TicketRefusal| {
        let (code, words) = (refusal.code(), refusal.to_string());
        tracing::warn!(vm = vm_name, to = to.name, code, words, "an order's ticket was refused");
        ApiError::refused(code, words)
    };
    let ticket = Ticket::parse(text).map_err(refused)?;
    let issuer = Operator { id: ticket.claims().issuer, name: String::new(), actions: Action::ALL.to_vec() };
    let skew = agent.config.tickets.skew_s;
    let asked = Asked {
        here: to.id,
        source: agent.key.id(),
        vm,
        vm_name,
        action,
        link: None,
        migration: None,
        skew,
        now: unix_ms() / 1000,
    };
    verify(&ticket, &asked.context(&[issuer], &SpentNonces::new(0))).map_err(refused)?;
    Ok(Some((&ticket).into()))
}

/// Whom a ticket for this move has to name.
///
/// # Errors
/// There is no such guest or host.
pub(crate) fn parties(agent: &Agent, vm: &str, to: &str) -> Result<Parties, ApiError> {
    let vm = agent.vms.named(vm)?;
    let host = agent.hosts.named(to).ok_or_else(|| crate::outgoing::unknown_host(to))?;
    let (name, id) = (agent.config.name.clone(), agent.key.id().to_string());
    Ok(Parties {
        vm: vm.name.clone(),
        vm_id: vm.id.to_string(),
        source: HostInfo { name, id, address: String::new() },
        destination: HostInfo { name: host.name, id: host.id.to_string(), address: host.address },
    })
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::expect_used)]
mod tests {
    use super::*;
    use crate::operator::{OperatorKey, Order};
    use limosa_proto::ticket::{Guests, Links};

    const SOURCE: HostId = HostId([2; 32]);
    const HERE: HostId = HostId([3; 32]);
    const VM: VmId = VmId([1; 16]);

    fn asked(migration: u8) -> Asked<'static> {
        Asked {
            here: HERE,
            source: SOURCE,
            vm: VM,
            vm_name: "web",
            action: Action::Migrate,
            link: None,
            migration: Some(MigrationId([migration; 16])),
            skew: 0,
            now: 1000,
        }
    }

    fn world(folder: &Path) -> (OperatorKey, Vec<Operator>) {
        let key = OperatorKey::open(&folder.join("key")).unwrap();
        let operators = vec![Operator { id: key.id(), name: "ana".into(), actions: vec![Action::Migrate] }];
        (key, operators)
    }

    fn ticket(key: &OperatorKey) -> TicketBytes {
        let (not_before, not_after) = (1000, unix_ms() / 1000 + 600);
        let order = Order {
            action: Action::Migrate,
            guests: Guests::One(VM),
            source: SOURCE,
            destination: HERE,
            links: Links::ALL,
            // As long as it may live, up to after now: what is forgotten goes by the real clock.
            not_before: not_before.max(not_after - limosa_proto::ticket::LIFE_MAX_S),
            not_after,
        };
        (&key.ticket(order).unwrap()).into()
    }

    fn at(migration: u8) -> Asked<'static> {
        Asked { now: unix_ms() / 1000, ..asked(migration) }
    }

    #[test]
    fn a_ticket_is_used_once_and_that_is_on_the_disk_first() {
        let folder = tempfile::tempdir().unwrap();
        let (key, operators) = world(folder.path());
        let (first, second) = (ticket(&key), ticket(&key));
        let tickets = Tickets::open(folder.path());
        let code = |tickets: &Tickets, which: &TicketBytes, by| {
            tickets.spend(&at(by), which, &operators, |_| Ok(())).err().map(|(code, _)| code)
        };
        let before = std::fs::metadata(folder.path().join(FILE_NAME)).unwrap().len();
        let grant = tickets.spend(&at(1), &first, &operators, |_| Ok(())).unwrap();
        assert!(std::fs::metadata(folder.path().join(FILE_NAME)).unwrap().len() > before);
        assert_eq!(code(&tickets, &first, 2).as_deref(), Some("ticket-used"));
        assert_eq!(code(&tickets, &first, 1), None, "another attempt at the same migration");
        tickets.close(grant.nonce);
        assert_eq!(code(&tickets, &first, 1).as_deref(), Some("ticket-used"));
        // Another agent cannot use the file meanwhile, and afterwards remembers.
        assert_eq!(code(&Tickets::open(folder.path()), &second, 3).as_deref(), Some("ticket-store"));
        drop(tickets);
        let tickets = Tickets::open(folder.path());
        assert_eq!(code(&tickets, &first, 1).as_deref(), Some("ticket-used"));
        assert_eq!(code(&tickets, &second, 3), None);
    }

    #[test]
    fn a_torn_tail_is_cut_off_and_damage_lets_no_ticket_in() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join(FILE_NAME);
        let (key, operators) = world(folder.path());
        let (first, second, third) = (ticket(&key), ticket(&key), ticket(&key));
        let spend = |which: &TicketBytes, by| {
            let spent = Tickets::open(folder.path()).spend(&at(by), which, &operators, |_| Ok(()));
            spent.map(drop).map_err(|(code, words)| format!("{code}: {words}"))
        };
        spend(&first, 1).unwrap();
        let whole = std::fs::read(&path).unwrap();
        for torn in [b"0".as_slice(), b"0123abcd 00", b"\xff\xfe"] {
            std::fs::write(&path, [&whole, torn].concat()).unwrap();
            assert!(spend(&first, 2).unwrap_err().starts_with("ticket-used"));
            assert_eq!(std::fs::read(&path).unwrap(), whole, "the tail was cut off");
        }
        spend(&second, 3).unwrap();
        assert!(spend(&second, 4).unwrap_err().starts_with("ticket-used"));
        let mut bytes = std::fs::read(&path).unwrap();
        bytes[3] ^= 1;
        std::fs::write(&path, &bytes).unwrap();
        let error = spend(&third, 5).unwrap_err();
        assert!(error.starts_with("ticket-store") && error.contains(FILE_NAME) && error.contains("damaged"), "{error}");
        assert_eq!(std::fs::read(&path).unwrap(), bytes, "what cannot be understood is not touched");
    }

    #[test]
    fn settings_are_read_and_the_loose_one_is_warned_about() {
        let parse = |text: &str| crate::config::Config::parse(Path::new("agent.toml"), text);
        let usual = parse("").unwrap();
        assert_eq!((usual.tickets.required, usual.tickets.skew_s), (true, 30));
        let loose = parse("[tickets]\nrequired = false\nskew_s = 5\n").unwrap();
        assert_eq!((loose.tickets.required, loose.tickets.skew_s), (false, 5));
        assert!(loose.warnings.iter().any(|words| words.contains("tickets.required")), "{:?}", loose.warnings);
        assert!(parse("[tickets]\nskew_s = 3601\n").unwrap_err().to_string().contains("3600"));
    }
}
