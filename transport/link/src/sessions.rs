//! The migrations that come in: which are open, who may join one with a lane, who asks about one. Every kind of link hands
//! what arrives to this table, after it knows who the peer is. It reads no socket.

use crate::commands::{Caller, CommandChannel};
use crate::control::ControlError;
use crate::direct::Fabric;
use crate::host::{Hosting, Peer};
use crate::lanes::LaneReceiver;
use crate::room::{Share, Shares};
use crate::{Control, destination, probe};
use limosa_proto::identity::{Generation, HostId, MigrationId};
use limosa_proto::ticket::TicketBytes;
use limosa_proto::wire::code::Code;
use limosa_proto::wire::frame::{ControlHeader, LanePreamble, LaneToken};
use limosa_proto::wire::limits::REASONS_MAX;
use limosa_proto::wire::message::{Message, Reason, Refusal};
use std::collections::HashMap;
use std::io;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;
use tokio::sync::{mpsc, watch};

/// Bytes of the answer to a lane's preamble: "LMSK", the code (0 is "come in"), two zeros.
pub const LANE_ANSWER_BYTES: usize = 8;
/// Control channels of one host that have begun no migration: it may ask as much at once, so that none holds what others need.
const ASKING_OF_ONE_MAX: usize = 32;
const LANE_ANSWER_MAGIC: [u8; 4] = *b"LMSK";
/// A new control channel must say its first words within this time.
pub(crate) const FIRST_WORDS_MAX: Duration = Duration::from_secs(5);

/// The answer to a lane; `None` lets it in.
#[must_use]
pub fn emit_lane_answer(code: Option<Code>) -> [u8; LANE_ANSWER_BYTES] {
    let [a, b, c, d] = LANE_ANSWER_MAGIC;
    let [low, high] = code.map_or(0, u16::from).to_le_bytes();
    [a, b, c, d, low, high, 0, 0]
}

/// Why a lane was not let in, or `None` if it was.
#[must_use]
pub fn parse_lane_answer(answer: &[u8; LANE_ANSWER_BYTES]) -> Option<Code> {
    let [a, b, c, d, low, high, ..] = *answer;
    if [a, b, c, d] != LANE_ANSWER_MAGIC {
        return Some(Code::Malformed);
    }
    match u16::from_le_bytes([low, high]) {
        0 => None,
        code => Some(code.into()),
    }
}

/// What arrives for a migration that is open.
pub(crate) enum Arrival {
    /// A lane that showed the right token.
    Lane(u16, Box<dyn LaneReceiver>),
    /// A source in doubt on a new control channel.
    Doubt(Control, Message),
}

/// Which lanes a migration waits for.
struct Gate {
    link: String,
    token: LaneToken,
    lanes: u16,
    plaintext: bool,
    joined: u32,
}

struct Entry {
    peer: HostId,
    into: mpsc::UnboundedSender<Arrival>,
    gate: Option<Gate>,
}

struct Inner {
    hosting: Arc<dyn Hosting>,
    fabric: Option<Arc<dyn Fabric>>,
    incoming_max: usize,
    asking: Shares,
    open: Mutex<HashMap<(MigrationId, Generation), Entry>>,
    count: watch::Sender<usize>,
}

/// The table of open incoming migrations. Clones are the same table.
#[derive(Clone)]
pub struct Sessions(Arc<Inner>);

impl std::fmt::Debug for Sessions {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Sessions({} open)", self.open())
    }
}

/// One migration's place in the table; dropping it takes it out.
pub(crate) struct Place {
    sessions: Sessions,
    pub(crate) migration: MigrationId,
    pub(crate) generation: Generation,
}

impl Drop for Place {
    fn drop(&mut self) {
        self.sessions.table().remove(&(self.migration, self.generation));
        self.sessions.0.count.send_modify(|count| *count = count.saturating_sub(1));
    }
}

impl Place {
    /// The device that takes guest memory in, where this host has one.
    pub(crate) fn fabric(&self) -> Option<Arc<dyn Fabric>> {
        self.sessions.0.fabric.clone()
    }

    /// Lets `lanes` lanes in that come over `link` and show `token`.
    pub(crate) fn open_gate(&self, link: &str, token: LaneToken, lanes: u16, plaintext: bool) {
        if let Some(entry) = self.sessions.table().get_mut(&(self.migration, self.generation)) {
            entry.gate = Some(Gate { link: link.to_owned(), token, lanes, plaintext, joined: 0 });
        }
    }
}

impl Sessions {
    /// An empty table: `hosting` decides about what comes, at most `incoming_max` at once.
    #[must_use]
    pub fn new(hosting: Arc<dyn Hosting>, incoming_max: usize) -> Sessions {
        Sessions::with_fabric(hosting, incoming_max, None)
    }

    /// As [`Sessions::new`], for a host whose `fabric` lets sources write guest memory directly.
    #[must_use]
    pub fn with_fabric(hosting: Arc<dyn Hosting>, incoming_max: usize, fabric: Option<Arc<dyn Fabric>>) -> Sessions {
        let (asking, open, count) = (Shares::new(ASKING_OF_ONE_MAX), Mutex::default(), watch::Sender::new(0));
        Sessions(Arc::new(Inner { hosting, fabric, incoming_max, asking, open, count }))
    }

    /// How many migrations are open.
    #[must_use]
    pub fn open(&self) -> usize {
        *self.0.count.borrow()
    }

    /// Waits until none is open.
    pub async fn idle(&self) {
        let mut count = self.0.count.subscribe();
        // The sender lives in this very table, so waiting cannot fail.
        let _ = count.wait_for(|count| *count == 0).await;
    }

    fn table(&self) -> std::sync::MutexGuard<'_, HashMap<(MigrationId, Generation), Entry>> {
        self.0.open.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes a lane of `link` whose preamble was read; `peer` is who showed it, where the lane is sealed. Answers it.
    ///
    /// # Errors
    /// The answer could not be sent. A lane that is not let in is no error.
    pub fn lane(
        &self,
        link: &str,
        preamble: &LanePreamble,
        peer: Option<HostId>,
        mut lane: Box<dyn LaneReceiver>,
    ) -> io::Result<()> {
        let mut table = self.table();
        let decision = match table.get_mut(&(preamble.migration, preamble.generation)) {
            None => Err(Code::Violation),
            Some(entry) => admit(entry, link, preamble, peer),
        };
        match decision {
            Ok(into) => {
                lane.acknowledge(&emit_lane_answer(None))?;
                // A driver that ended meanwhile drops the lane.
                let _ = into.send(Arrival::Lane(preamble.lane, lane));
                Ok(())
            }
            Err(code) => {
                tracing::info!(migration = %preamble.migration, lane = preamble.lane, %code, "lane refused");
                lane.acknowledge(&emit_lane_answer(Some(code)))
            }
        }
    }

    /// Takes a new control channel, waits for its first message and does what that asks for, in a task of its own.
    pub fn control(&self, peer: Peer, mut control: Control) {
        let sessions = self.clone();
        let Some(share) = self.0.asking.take(peer.id) else {
            return tracing::warn!(peer = %peer.id, "a control channel was closed: this host has {ASKING_OF_ONE_MAX} already");
        };
        tokio::spawn(async move {
            let (ticket, header, message) = match tokio::time::timeout(FIRST_WORDS_MAX, first_words(&mut control)).await {
                Ok(Ok(first)) => first,
                Ok(Err(error)) => {
                    return tracing::info!(peer = %peer.id, %error, "a control channel ended before its first message");
                }
                Err(_) => return tracing::info!(peer = %peer.id, "a control channel said nothing"),
            };
            if let Err(refusal) = sessions.0.hosting.admits(&peer) {
                tracing::warn!(peer = %peer.id, words = refusal.words(), "a host was let in and is not any more");
                let answer = match message {
                    Message::Hello(_) => Message::Refuse(refusal),
                    _ => Message::Abort { code: refusal.code, words: refusal.words() },
                };
                return say(&control, header.migration, header.generation, &answer);
            }
            sessions.first(peer, control, share, (header, message), ticket).await;
        });
    }

    async fn first(
        &self,
        peer: Peer,
        control: Control,
        share: Share,
        (header, message): (ControlHeader, Message),
        ticket: Option<TicketBytes>,
    ) {
        let (migration, generation) = (header.migration, header.generation);
        match message {
            Message::Hello(hello) => {
                let begun = self.place(peer.id, migration, generation).and_then(|(place, arrivals)| {
                    let incoming = self.0.hosting.incoming(&peer, &header, &hello, ticket)?;
                    Ok((place, arrivals, incoming))
                });
                match begun {
                    Ok((place, arrivals, incoming)) => {
                        // From here on it is one of the migrations that may come in.
                        drop(share);
                        destination::run(place, peer, control, arrivals, incoming, hello).await;
                    }
                    Err(refusal) => {
                        self.0.hosting.refused(&peer, &header, &hello, &refusal);
                        say(&control, migration, generation, &Message::Refuse(refusal));
                    }
                }
            }
            Message::VerdictAsk { released } => {
                let into = match self.table().get(&(migration, generation)) {
                    Some(entry) if self.0.hosting.same_host(entry.peer, peer.id) => Some(entry.into.clone()),
                    _ => None,
                };
                if let Some(into) = into {
                    let _ = into.send(Arrival::Doubt(control, message));
                    return;
                }
                let hosting = self.0.hosting.clone();
                let asked = tokio::task::spawn_blocking(move || hosting.verdict(&peer, migration, generation, released)).await;
                answer(&control, &header, asked.map(Message::Verdict));
            }
            Message::LinksAsk => {
                let offers = self.0.hosting.offers(&peer);
                probe::answer(control, migration, generation, offers).await;
            }
            Message::CpuAsk => {
                let hosting = self.0.hosting.clone();
                let asked = tokio::task::spawn_blocking(move || hosting.cpu(&peer)).await;
                answer(&control, &header, asked.map(Message::Cpu));
            }
            Message::CheckAsk(vm) => {
                let (hosting, full) = (self.0.hosting.clone(), self.full(self.open()));
                let asked = tokio::task::spawn_blocking(move || hosting.check(&peer, &vm, ticket)).await;
                answer(&control, &header, asked.map(|reasons| Message::Checked(with(reasons, full))));
            }
            Message::ReleasedAsk => {
                let hosting = self.0.hosting.clone();
                let asked = tokio::task::spawn_blocking(move || hosting.released(&peer, migration, generation)).await;
                answer(&control, &header, asked.map(Message::Released));
            }
            other => {
                let name = other.name();
                let words = format!("a control channel begins with Hello or a question, not with {name}");
                say(&control, migration, generation, &Message::Abort { code: Code::Violation, words });
            }
        }
    }

    /// Takes the channel of somebody who would like to command this host.
    pub(crate) fn commands(&self, caller: Caller, channel: CommandChannel) {
        self.0.hosting.commands(caller, channel);
    }

    /// Why no further migration may come in where so many are `open`.
    fn full(&self, open: usize) -> Option<Refusal> {
        let most = self.0.incoming_max;
        let words = || format!("{open} migrations come in here already, and no more than {most} may");
        (open >= most).then(|| Refusal::one(Code::Busy, words()))
    }

    fn place(
        &self,
        peer: HostId,
        migration: MigrationId,
        generation: Generation,
    ) -> Result<(Place, mpsc::UnboundedReceiver<Arrival>), Refusal> {
        let mut table = self.table();
        if let Some(refusal) = self.full(table.len()) {
            return Err(refusal);
        }
        if table.contains_key(&(migration, generation)) {
            return Err(Refusal::one(Code::Busy, "this very migration is coming in already"));
        }
        let (into, arrivals) = mpsc::unbounded_channel();
        table.insert((migration, generation), Entry { peer, into, gate: None });
        self.0.count.send_modify(|count| *count += 1);
        Ok((Place { sessions: self.clone(), migration, generation }, arrivals))
    }
}

fn admit(
    entry: &mut Entry,
    link: &str,
    preamble: &LanePreamble,
    peer: Option<HostId>,
) -> Result<mpsc::UnboundedSender<Arrival>, Code> {
    let gate = entry.gate.as_mut().ok_or(Code::Violation)?;
    match peer {
        Some(peer) if peer != entry.peer => return Err(Code::UnknownHost),
        None if !gate.plaintext => return Err(Code::PlaintextRefused),
        _ if link != gate.link => return Err(Code::Violation),
        _ => {}
    }
    let bit = 1_u32.checked_shl(preamble.lane.into()).unwrap_or(0);
    if preamble.token != gate.token || preamble.lane >= gate.lanes || bit == 0 || gate.joined & bit != 0 {
        return Err(Code::Violation);
    }
    gate.joined |= bit;
    Ok(entry.into.clone())
}

/// The first message, and the ticket that may come before it.
async fn first_words(control: &mut Control) -> Result<(Option<TicketBytes>, ControlHeader, Message), ControlError> {
    match control.receive().await? {
        (_, Message::Ticket(ticket)) => control.receive().await.map(|(header, message)| (Some(ticket), header, message)),
        (header, message) => Ok((None, header, message)),
    }
}

/// `reasons` and the reasons of a refusal, as many as a message holds.
fn with(mut reasons: Vec<Reason>, refusal: Option<Refusal>) -> Vec<Reason> {
    reasons.extend(refusal.into_iter().flat_map(|refusal| refusal.reasons));
    reasons.truncate(REASONS_MAX);
    reasons
}

/// Sends what a question came to.
fn answer(control: &Control, header: &ControlHeader, asked: Result<Message, tokio::task::JoinError>) {
    match asked {
        Ok(message) => say(control, header.migration, header.generation, &message),
        Err(error) => tracing::error!(%error, "a question of another host could not be answered"),
    }
}

pub(crate) fn say(control: &Control, migration: MigrationId, generation: Generation, message: &Message) {
    if let Err(error) = control.send(migration, generation, message) {
        tracing::warn!(%error, message = message.name(), "an answer could not be sent");
    }
}
