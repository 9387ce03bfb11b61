//! A source without an engine: it says and sends what a check wants, in the order that it wants, over the real link. The
//! destination is the real one.

use crate::subject::{Subject, Trial};
use crate::toy::{ToyMemory, vm};
use limosa_link::{ConnectError, Control, LaneMemory, LaneSender, Link, Pages, RemoteKeys};
use limosa_proto::identity::{Generation, MigrationId};
use limosa_proto::memory::PageRange;
use limosa_proto::record::Record;
use limosa_proto::wire::frame::{LaneFrameKind, LaneHeader, LanePreamble, emit_runs};
use limosa_proto::wire::message::{Accept, Hello, Message};
use limosa_proto::wire::offer::KeysAsk;
use limosa_proto::wire::version::{self, VERSION_FIRST};
use std::io;
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::mpsc;
use tokio::task::AbortHandle;

/// What was said by the destination, or that the channel ended.
type Heard = Result<Message, String>;

/// A source whose Hello was accepted.
pub struct RawSource {
    pub link: Arc<dyn Link>,
    pub migration: MigrationId,
    pub generation: Generation,
    pub accept: Accept,
    keys: Arc<RemoteKeys>,
    say: mpsc::UnboundedSender<Message>,
    heard: mpsc::UnboundedReceiver<Heard>,
    talking: AbortHandle,
}

impl Drop for RawSource {
    fn drop(&mut self) {
        self.keys.close();
        self.talking.abort();
    }
}

/// Carries messages both ways, and keys to where lanes wait for them.
async fn talk(
    mut control: Control,
    name: (MigrationId, Generation),
    keys: Arc<RemoteKeys>,
    mut asks: mpsc::UnboundedReceiver<Vec<u32>>,
    mut saying: mpsc::UnboundedReceiver<Message>,
    into: mpsc::UnboundedSender<Heard>,
) {
    loop {
        tokio::select! {
            received = control.receive() => match received {
                Ok((_, Message::Keys(given))) => keys.insert(&given.keys).unwrap(),
                Ok((_, Message::Keepalive { nonce })) => control.send(name.0, name.1, &Message::KeepaliveAck { nonce }).unwrap(),
                Ok((_, Message::KeepaliveAck { .. })) => {}
                Ok((_, message)) => drop(into.send(Ok(message))),
                Err(error) => {
                    let _ = into.send(Err(error.to_string()));
                    return;
                }
            },
            Some(chunks) = asks.recv() => control.send(name.0, name.1, &Message::KeysAsk(KeysAsk { chunks })).unwrap(),
            Some(message) = saying.recv() => control.send(name.0, name.1, &message).unwrap(),
        }
    }
}

/// A Hello as the engine would say it.
pub fn hello<S: Subject>(trial: &Trial<S>, lanes: u16) -> Hello {
    Hello {
        versions: version::offer(),
        vm: vm(&trial.sender.guest.memory.map),
        lanes,
        plaintext_lanes: !S::ENCRYPTED,
        link: S::NAME.to_owned(),
        page_check: false,
        downtime_target_ms: 50,
        downtime_ms_max: 2000,
        keepalive_ms: 2000,
        source_build: "raw".to_owned(),
    }
}

impl RawSource {
    /// Says Hello over `link` and hears Accept. `name` is the first byte of the migration's identity.
    pub async fn begin<S: Subject>(trial: &Trial<S>, link: Arc<dyn Link>, name: u8, hello: Hello) -> RawSource {
        let (migration, generation) = (MigrationId([name; 16]), Generation(1));
        let control = link.control().await.unwrap();
        let (keys, asks) = RemoteKeys::new(&*trial.sender.guest.memory);
        let keys = Arc::new(keys);
        let (say, saying) = mpsc::unbounded_channel();
        let (into, mut heard) = mpsc::unbounded_channel();
        let talking = tokio::spawn(talk(control, (migration, generation), keys.clone(), asks, saying, into)).abort_handle();
        say.send(Message::Hello(Box::new(hello))).unwrap();
        let accept = match hear(&mut heard).await {
            Ok(Message::Accept(accept)) => accept,
            other => panic!("not accepted: {other:?}"),
        };
        RawSource { link, migration, generation, accept, keys, say, heard, talking }
    }

    /// The same, until the destination is prepared.
    pub async fn prepared<S: Subject>(trial: &Trial<S>, lanes: u16) -> RawSource {
        RawSource::named(trial, lanes, 0xAB).await
    }

    pub async fn named<S: Subject>(trial: &Trial<S>, lanes: u16, name: u8) -> RawSource {
        let mut raw = RawSource::begin(trial, trial.link(), name, hello(trial, lanes)).await;
        raw.wait_prepared().await;
        raw
    }

    pub async fn wait_prepared(&mut self) {
        let message = self.next().await;
        assert!(matches!(message, Ok(Message::Prepared { .. })), "{message:?}");
    }

    pub fn say(&self, message: Message) {
        let _ = self.say.send(message);
    }

    /// What the destination says next; keys and keepalives are not told.
    pub async fn next(&mut self) -> Heard {
        hear(&mut self.heard).await
    }

    /// Waits until the destination says that it gives up, or closes; its words.
    pub async fn end(&mut self) -> String {
        loop {
            match self.next().await {
                Ok(Message::Abort { words, .. }) | Err(words) => return words,
                Ok(_) => {}
            }
        }
    }

    pub fn preamble(&self, lane: u16) -> LanePreamble {
        let (migration, generation, token) = (self.migration, self.generation, self.accept.token);
        LanePreamble { version: VERSION_FIRST, lane, migration, generation, token }
    }

    pub async fn show(&self, preamble: LanePreamble, pages: Arc<ToyMemory>) -> Result<Box<dyn LaneSender>, ConnectError> {
        let page_check = self.accept.page_check && self.link.capabilities().page_check;
        let memory = LaneMemory { pages, keys: self.keys.clone(), page_check };
        self.link.lane(preamble, self.accept.plaintext_lanes, &memory).await
    }

    /// Opens lane `number`, which reads `pages`.
    pub async fn lane(&self, number: u16, pages: &Arc<ToyMemory>) -> RawLane {
        let lane = self.show(self.preamble(number), pages.clone()).await.unwrap();
        let (pages, migration, generation) = (pages.clone(), self.migration, self.generation);
        RawLane { lane, pages, migration, generation }
    }

    /// Says that there are no records and that `last_round` was the last.
    pub fn say_records(&self, records: Vec<Record>, last_round: u32) {
        let (count, bytes) = (records.len() as u32, records.iter().map(|record| record.bytes.len() as u64).sum());
        records.into_iter().for_each(|record| self.say(Message::Record(record)));
        self.say(Message::RecordsEnd { count, bytes, last_round, paused: false });
    }
}

async fn hear(heard: &mut mpsc::UnboundedReceiver<Heard>) -> Heard {
    tokio::time::timeout(Duration::from_secs(20), heard.recv())
        .await
        .expect("the destination says nothing")
        .unwrap_or_else(|| Err("nothing more".to_owned()))
}

/// One lane, to be used on a thread that may block.
pub struct RawLane {
    pub lane: Box<dyn LaneSender>,
    pub pages: Arc<ToyMemory>,
    migration: MigrationId,
    generation: Generation,
}

impl RawLane {
    pub fn header(&self, kind: LaneFrameKind, round: u32, runs: &[PageRange]) -> LaneHeader {
        let bytes = if kind == LaneFrameKind::Pages { runs.iter().map(|run| run.bytes()).sum() } else { 0 };
        let (migration, generation) = (self.migration, self.generation);
        LaneHeader { kind, runs: runs.len() as u16, round, bytes, migration, generation }
    }

    /// The bytes of a frame's head.
    pub fn head(&self, kind: LaneFrameKind, round: u32, runs: &[PageRange]) -> Vec<u8> {
        let mut head = self.header(kind, round, runs).emit().to_vec();
        emit_runs(runs, &mut head);
        head
    }

    pub fn send(&mut self, round: u32, runs: &[PageRange]) -> io::Result<()> {
        let head = self.head(LaneFrameKind::Pages, round, runs);
        self.lane.pages(&head, &*self.pages.clone() as &dyn Pages, runs)
    }

    pub fn zero(&mut self, round: u32, runs: &[PageRange]) -> io::Result<()> {
        let head = self.head(LaneFrameKind::Zero, round, runs);
        self.lane.head(&head)
    }

    pub fn barrier(&mut self, round: u32) -> io::Result<()> {
        let head = self.head(LaneFrameKind::Barrier, round, &[]);
        self.lane.head(&head)?;
        self.lane.flush()
    }

    pub fn finish(mut self, round: u32) -> io::Result<()> {
        let head = self.head(LaneFrameKind::End, round, &[]);
        self.lane.head(&head)?;
        self.lane.finish()
    }
}

/// One page.
pub fn page(first: u64) -> PageRange {
    PageRange { first, count: 1 }
}
