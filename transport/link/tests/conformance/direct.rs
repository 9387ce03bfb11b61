//! A fourth kind of link in one file: lanes that write straight into the destination's memory by keys, as RDMA does, with a
//! device that is a table in this process. It shows what such a link has to do; its speed means nothing.

use crate::subject::{NotApplicable, Subject, Wire};
use crate::toy::{Hold, Sender, Toy, ToySettings};
use crate::wire::{Carrier, StreamWire};
use limosa_link::pair::PairLink;
use limosa_link::sessions::{LANE_ANSWER_BYTES, Sessions, parse_lane_answer};
use limosa_link::{
    Answer, Capabilities, ConnectError, Control, Exposed, ExposedError, Exposure, Fabric, HostError, LaneCloser, LaneMemory,
    LaneReceiver, LaneSender, Link, Pages,
};
use limosa_proto::identity::{Generation, HostId, MigrationId};
use limosa_proto::memory::{PAGE_BYTES, PageRange};
use limosa_proto::wire::frame::{LANE_HEADER_BYTES, LaneFrameKind, LaneHeader, LanePreamble, LaneToken, parse_runs};
use limosa_proto::wire::offer::{MemoryKey, chunks};
use ring::hmac;
use std::collections::HashMap;
use std::io::{self, Read as _, Write as _};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Mutex, Weak};
use std::time::Duration;
use tokio::runtime::Handle;

const NAME: &str = "direct";
/// Bytes of a page's keyed hash.
const HASH_BYTES: usize = 16;
type Hash = [u8; HASH_BYTES];
/// Where the first byte of every chunk is, for whoever has its key.
const CHUNK_ADDRESS: u64 = 0x7000_0000;

fn hash(key: &hmac::Key, page: u64, bytes: &[u8]) -> Hash {
    let mut context = hmac::Context::with_key(key);
    context.update(&page.to_le_bytes());
    context.update(bytes);
    context.sign().as_ref()[..HASH_BYTES].try_into().unwrap()
}

fn hash_key(token: &LaneToken) -> hmac::Key {
    hmac::Key::new(hmac::HMAC_SHA256, &token.0)
}

/// One chunk that may be written.
struct Window {
    pages: Arc<dyn Pages>,
    range: PageRange,
}

#[derive(Default)]
struct Table {
    windows: HashMap<u32, Window>,
    last_key: u32,
    exposed: HashMap<(MigrationId, Generation), Weak<Inner>>,
    opened: u64,
    /// A chunk that cannot be opened.
    refuses: Option<u32>,
    /// A page of which every write goes wrong by one bit.
    flips: Option<u64>,
}

/// The device, at both ends.
#[derive(Clone, Default)]
pub struct Device(Arc<Mutex<Table>>, Arc<Hold>);

impl Device {
    fn table(&self) -> std::sync::MutexGuard<'_, Table> {
        self.0.lock().unwrap()
    }
    pub fn refuse(&self, chunk: Option<u32>) {
        self.table().refuses = chunk;
    }
    pub fn flip(&self, page: Option<u64>) {
        self.table().flips = page;
    }
    /// Lets every opening wait from now on, or go on.
    pub fn stall(&self, stalls: bool) {
        self.1.set(stalls);
    }
    /// How many chunks were ever opened.
    pub fn opened(&self) -> u64 {
        self.table().opened
    }
    /// How many chunks can be written now, and how many guests' memories are exposed.
    pub fn alive(&self) -> (usize, usize) {
        let table = self.table();
        (table.windows.len(), table.exposed.values().filter(|exposed| exposed.strong_count() > 0).count())
    }
    /// What a remote write does.
    pub fn write(&self, rkey: u32, address: u64, bytes: &[u8]) -> io::Result<()> {
        let denied = |words: &str| io::Error::new(io::ErrorKind::PermissionDenied, format!("remote access error: {words}"));
        let (pages, range, offset, flips) = {
            let table = self.table();
            let Window { pages, range } = table.windows.get(&rkey).ok_or_else(|| denied("no such key"))?;
            let offset = address.checked_sub(CHUNK_ADDRESS).ok_or_else(|| denied("before the chunk"))?;
            if offset.saturating_add(bytes.len() as u64) > range.bytes() {
                return Err(denied("behind the chunk"));
            }
            (pages.clone(), *range, offset, table.flips)
        };
        let mut bytes = bytes.to_vec();
        let first = range.first + offset / PAGE_BYTES;
        if let Some(at) = flips.and_then(|page| page.checked_sub(first))
            && let Some(byte) = bytes.get_mut((at * PAGE_BYTES) as usize + 77)
        {
            *byte ^= 4;
        }
        pages.write(range, offset, &bytes);
        Ok(())
    }
}

impl Fabric for Device {
    fn link(&self) -> &'static str {
        NAME
    }
    fn expose(&self, exposure: Exposure) -> Result<Box<dyn Exposed>, HostError> {
        let name = (exposure.migration, exposure.generation);
        let inner = Arc::new(Inner { device: self.clone(), exposure, keys: Mutex::default(), hashes: Mutex::default() });
        self.table().exposed.insert(name, Arc::downgrade(&inner));
        Ok(Box::new(Memory(inner)))
    }
}

struct Inner {
    device: Device,
    exposure: Exposure,
    keys: Mutex<Vec<u32>>,
    /// What the source says that pages are; zero pages are not in here.
    hashes: Mutex<HashMap<u64, Hash>>,
}

impl Inner {
    fn take_back(&self) {
        let mut table = self.device.table();
        self.keys.lock().unwrap().drain(..).for_each(|key| drop(table.windows.remove(&key)));
    }
}

/// A guest's memory that the device has.
struct Memory(Arc<Inner>);

impl Exposed for Memory {
    fn open(&self, chunk: u32) -> Result<MemoryKey, HostError> {
        let Inner { device, exposure, keys, .. } = &*self.0;
        device.1.pass();
        let mut table = device.table();
        if table.refuses == Some(chunk) {
            return Err(HostError::new(format!("the toy device did not take chunk {chunk} in: told to fail")));
        }
        let range = chunks(exposure.pages.memory_map()).nth(chunk as usize).unwrap();
        table.opened += 1;
        table.last_key += 1;
        let rkey = table.last_key;
        table.windows.insert(rkey, Window { pages: exposure.pages.clone(), range });
        keys.lock().unwrap().push(rkey);
        Ok(MemoryKey { chunk, address: CHUNK_ADDRESS, rkey })
    }

    fn close(&self) -> Result<(), ExposedError> {
        self.0.take_back();
        let Exposure { pages, token, .. } = &self.0.exposure;
        let (key, mut page) = (hash_key(token), vec![0; PAGE_BYTES as usize]);
        let mut wrong: Vec<u64> = Vec::new();
        for (number, said) in self.0.hashes.lock().unwrap().drain() {
            pages.read(PageRange { first: number, count: 1 }, 0, &mut page);
            if hash(&key, number, &page) != said {
                wrong.push(number);
            }
        }
        match wrong.iter().min() {
            None => Ok(()),
            Some(first) => Err(ExposedError::PageCheck { pages: wrong.len() as u64, first: *first }),
        }
    }
}

impl Drop for Memory {
    fn drop(&mut self) {
        self.0.take_back();
    }
}

fn closer(stream: &UnixStream) -> io::Result<LaneCloser> {
    let stream = stream.try_clone()?;
    Ok(LaneCloser::new(move || drop(stream.shutdown(Shutdown::Both))))
}

/// The source's end: pages go by the device, frames and hashes beside them.
struct DirectSender {
    stream: UnixStream,
    device: Device,
    memory: LaneMemory,
    chunks: Vec<PageRange>,
    key: hmac::Key,
    bytes: u64,
}

impl DirectSender {
    fn put(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.stream.write_all(bytes)?;
        self.bytes += bytes.len() as u64;
        Ok(())
    }

    /// Writes what of `run` lies in one chunk; returns how many pages that are.
    fn write(&self, run: PageRange, bytes: &[u8]) -> io::Result<u64> {
        let number = self.chunks.partition_point(|chunk| chunk.end() <= run.first);
        let chunk = self.chunks[number];
        let count = run.count.min(chunk.end() - run.first);
        let key = self.memory.keys.wait(number as u32, &[number as u32 + 1])?;
        let address = key.address + (run.first - chunk.first) * PAGE_BYTES;
        self.device.write(key.rkey, address, &bytes[..(count * PAGE_BYTES) as usize])?;
        Ok(count)
    }
}

impl LaneSender for DirectSender {
    fn head(&mut self, head: &[u8]) -> io::Result<()> {
        self.put(head)
    }

    fn pages(&mut self, head: &[u8], pages: &dyn Pages, runs: &[PageRange]) -> io::Result<()> {
        let mut hashes = Vec::new();
        for run in runs {
            let mut bytes = vec![0; run.bytes() as usize];
            pages.read(*run, 0, &mut bytes);
            if self.memory.page_check {
                let each = bytes.chunks(PAGE_BYTES as usize).zip(run.first..);
                each.for_each(|(bytes, page)| hashes.extend(hash(&self.key, page, bytes)));
            }
            let (mut left, mut rest) = (*run, &bytes[..]);
            while left.count > 0 {
                let count = self.write(left, rest)?;
                rest = &rest[(count * PAGE_BYTES) as usize..];
                left = PageRange { first: left.first + count, count: left.count - count };
            }
            self.bytes += run.bytes();
        }
        self.put(head)?;
        self.put(&hashes)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.stream.read_exact(&mut [0; 4])
    }

    fn finish(&mut self) -> io::Result<()> {
        self.stream.shutdown(Shutdown::Write)
    }

    fn closer(&self) -> io::Result<LaneCloser> {
        closer(&self.stream)
    }

    fn bytes_on_wire(&self) -> u64 {
        self.bytes
    }
}

/// The destination's end. It reads along, since a page that became zero has no hash any more.
struct DirectReceiver {
    stream: UnixStream,
    memory: Weak<Inner>,
    header: Option<LaneHeader>,
    bytes: u64,
}

impl DirectReceiver {
    fn memory(&self) -> io::Result<Arc<Inner>> {
        self.memory.upgrade().ok_or_else(|| io::ErrorKind::NotConnected.into())
    }

    fn read_along(&mut self, bytes: &[u8]) -> io::Result<()> {
        match (self.header.take(), <&[u8; LANE_HEADER_BYTES]>::try_from(bytes)) {
            (Some(header), _) if header.kind == LaneFrameKind::Zero => {
                let memory = self.memory()?;
                // What is wrong with it the driver says.
                let runs = parse_runs(bytes, memory.exposure.pages.memory_map(), &header).unwrap_or_default();
                let mut hashes = memory.hashes.lock().unwrap();
                runs.iter().flat_map(|run| run.first..run.end()).for_each(|page| {
                    hashes.remove(&page);
                });
            }
            (None, Ok(head)) => self.header = LaneHeader::parse(head).ok().filter(|header| header.runs > 0),
            _ => {}
        }
        Ok(())
    }
}

impl LaneReceiver for DirectReceiver {
    fn head(&mut self, out: &mut [u8]) -> io::Result<()> {
        self.stream.read_exact(out)?;
        self.bytes += out.len() as u64;
        self.read_along(out)
    }

    fn pages(&mut self, _: &dyn Pages, runs: &[PageRange]) -> io::Result<()> {
        let memory = self.memory()?;
        for page in runs.iter().flat_map(|run| run.first..run.end()) {
            self.bytes += PAGE_BYTES;
            if memory.exposure.page_check {
                let mut said = [0; HASH_BYTES];
                self.stream.read_exact(&mut said)?;
                memory.hashes.lock().unwrap().insert(page, said);
            }
        }
        Ok(())
    }

    fn passed(&mut self, round: u32) -> io::Result<()> {
        self.stream.write_all(&round.to_le_bytes())
    }

    fn acknowledge(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.stream.write_all(bytes)
    }

    fn closer(&self) -> io::Result<LaneCloser> {
        closer(&self.stream)
    }

    fn bytes_on_wire(&self) -> u64 {
        self.bytes
    }
}

type MakeStream = dyn Fn() -> io::Result<(UnixStream, UnixStream)> + Send + Sync;

struct DirectLink {
    control: PairLink,
    sessions: Sessions,
    source: HostId,
    device: Device,
    make: Arc<MakeStream>,
}

impl DirectLink {
    fn new(direct: &Direct, sender: &Sender, make: Arc<MakeStream>) -> DirectLink {
        let (sessions, source, make_control) = (direct.toy.sessions.clone(), sender.key.id(), make.clone());
        let control = PairLink::new(sessions.clone(), source, direct.toy.key.id()).with_streams(move || make_control());
        DirectLink { control, sessions, source, device: direct.device.clone(), make }
    }

    fn open(&self, preamble: LanePreamble) -> io::Result<UnixStream> {
        let (ours, theirs) = (self.make)()?;
        let name = (preamble.migration, preamble.generation);
        let memory = self.device.table().exposed.get(&name).cloned().unwrap_or_default();
        let receiver = DirectReceiver { stream: theirs, memory, header: None, bytes: 0 };
        self.sessions.lane(NAME, &preamble, Some(self.source), Box::new(receiver))?;
        Ok(ours)
    }
}

/// Reads the answer, within a bound.
fn answer(mut stream: UnixStream) -> io::Result<(UnixStream, [u8; LANE_ANSWER_BYTES])> {
    let mut answer = [0; LANE_ANSWER_BYTES];
    stream.set_read_timeout(Some(Duration::from_secs(5)))?;
    stream.read_exact(&mut answer)?;
    stream.set_read_timeout(None)?;
    Ok((stream, answer))
}

impl Link for DirectLink {
    fn capabilities(&self) -> Capabilities {
        Capabilities { name: NAME, page_check: true, ..self.control.capabilities() }
    }

    fn destination(&self) -> String {
        self.control.destination()
    }

    fn control(&self) -> Answer<'_, Result<Control, ConnectError>> {
        self.control.control()
    }

    fn lane(
        &self,
        preamble: LanePreamble,
        _plaintext: bool,
        memory: &LaneMemory,
    ) -> Answer<'_, Result<Box<dyn LaneSender>, ConnectError>> {
        let memory = memory.clone();
        Box::pin(async move {
            let destination = self.destination();
            let failed = |error| ConnectError::Io { destination: self.destination(), doing: "opening a lane", error };
            let stream = self.open(preamble).map_err(failed)?;
            let answered = tokio::task::spawn_blocking(move || answer(stream)).await.unwrap();
            let (stream, answer) = answered.map_err(failed)?;
            if let Some(code) = parse_lane_answer(&answer) {
                return Err(ConnectError::LaneRefused { destination, lane: preamble.lane, code });
            }
            let chunks = chunks(memory.pages.memory_map()).collect();
            let (device, key) = (self.device.clone(), hash_key(&preamble.token));
            Ok(Box::new(DirectSender { stream, device, memory, chunks, key, bytes: 0 }) as Box<dyn LaneSender>)
        })
    }
}

/// The subject.
pub struct Direct {
    toy: Toy,
    pub device: Device,
}

impl Subject for Direct {
    const NAME: &'static str = NAME;
    const ENCRYPTED: bool = false;
    const CONTROL_ENCRYPTED: bool = false;
    const LANES_KNOW_PEER: bool = true;
    const DIRECT: bool = true;
    const UNDER_WAY_MAX: Result<u64, NotApplicable> = Ok(1 << 20);

    async fn start(mut settings: ToySettings) -> Self {
        let device = Device::default();
        settings.fabric = Some(Arc::new(device.clone()));
        Direct { toy: Toy::start(settings).await, device }
    }

    fn toy(&self) -> &Toy {
        &self.toy
    }

    fn link(&self, sender: &Sender) -> Arc<dyn Link> {
        Arc::new(DirectLink::new(self, sender, Arc::new(UnixStream::pair)))
    }

    async fn wire(&self, sender: &Sender) -> Arc<dyn Wire> {
        let (carrier, runtime) = (Carrier::new(), Handle::current());
        let between = carrier.clone();
        let link = Arc::new(DirectLink::new(self, sender, Arc::new(move || between.make_pair(&runtime))));
        Arc::new(StreamWire { link, carrier, accepting: None })
    }

    fn assert_clean(&self) {
        assert_eq!(self.device.alive(), (0, 0), "keys and exposed memory after the end");
    }
}
