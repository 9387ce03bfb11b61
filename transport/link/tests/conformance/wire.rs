//! Harm on the way, for links made of byte streams: everything that goes over a link is carried through here, and can be cut at a
//! byte, frozen and recorded. It understands nothing of what it carries; `datagrams.rs` does the same for UDP.

use crate::subject::{Direction, NotApplicable, Stream, Wire};
use limosa_link::Link;
use std::collections::HashMap;
use std::io;
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Mutex};
use tokio::io::{AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _};
use tokio::runtime::Handle;
use tokio::sync::watch;

/// Bytes carried at once.
const CARRY_BYTES: usize = 64 << 10;

/// How it goes on the way.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Mode {
    /// Everything passes.
    Open,
    /// Nothing passes and nothing is closed: the other side fell silent.
    Frozen,
    /// What is new is closed at once.
    Cut,
}

/// What was carried of one stream one way.
#[derive(Default)]
struct Carried {
    bytes: u64,
    record: Vec<u8>,
}

#[derive(Default)]
struct Notes {
    streams: usize,
    carried: HashMap<(usize, Direction), Carried>,
    cut: Option<(usize, Direction, u64)>,
    recording: bool,
}

/// The way that all streams of one link take. Clones are the same.
#[derive(Clone)]
pub struct Carrier {
    /// Rises with every cut: streams of an earlier age end.
    mode: watch::Sender<(u64, Mode)>,
    notes: Arc<Mutex<Notes>>,
}

/// Streams are known by the order in which they are made: control comes first.
pub fn number(stream: Stream) -> usize {
    match stream {
        Stream::Control => 0,
        Stream::Lane(number) => number + 1,
    }
}

impl Carrier {
    pub fn new() -> Carrier {
        Carrier { mode: watch::Sender::new((0, Mode::Open)), notes: Arc::default() }
    }

    pub fn cut(&self) {
        self.mode.send_modify(|(age, mode)| (*age, *mode) = (*age + 1, Mode::Cut));
        // Whoever was told of it by a fault wants it done, not begun.
        std::thread::sleep(std::time::Duration::from_millis(50));
    }

    pub fn mend(&self) {
        self.mode.send_modify(|(age, mode)| (*age, *mode) = (*age + 1, Mode::Open));
    }

    pub fn freeze(&self) {
        self.mode.send_modify(|(_, mode)| *mode = Mode::Frozen);
    }

    pub fn cut_after(&self, stream: Stream, direction: Direction, bytes: u64) {
        self.notes.lock().unwrap().cut = Some((number(stream), direction, bytes));
    }

    pub fn record(&self) {
        self.notes.lock().unwrap().recording = true;
    }

    pub fn carried(&self, stream: Stream, direction: Direction) -> u64 {
        self.notes.lock().unwrap().carried.get(&(number(stream), direction)).map_or(0, |carried| carried.bytes)
    }

    /// All that was carried: control, then the lanes.
    pub fn recorded(&self) -> (Vec<u8>, Vec<u8>) {
        let notes = self.notes.lock().unwrap();
        let of = |wanted: &dyn Fn(usize) -> bool| {
            let all = notes.carried.iter().filter(|((number, _), _)| wanted(*number));
            all.flat_map(|(_, carried)| carried.record.iter().copied()).collect()
        };
        (of(&|number| number == 0), of(&|number| number > 0))
    }

    /// Notes what comes to be carried, and says how much of it may pass: all, or what is left until the cut.
    pub fn note(&self, number: usize, direction: Direction, bytes: &[u8]) -> Result<(), usize> {
        let mut notes = self.notes.lock().unwrap();
        let (recording, cut) = (notes.recording, notes.cut);
        let carried = notes.carried.entry((number, direction)).or_default();
        let before = carried.bytes;
        carried.bytes += bytes.len() as u64;
        if recording {
            carried.record.extend_from_slice(bytes);
        }
        match cut {
            Some((at, way, limit)) if (at, way) == (number, direction) && carried.bytes > limit => {
                Err(limit.saturating_sub(before) as usize)
            }
            _ => Ok(()),
        }
    }

    /// The number of a stream that is new, and its age; none where nothing new may pass.
    pub fn admit(&self) -> Option<(usize, u64)> {
        let (age, mode) = *self.mode.borrow();
        if mode == Mode::Cut {
            return None;
        }
        let mut notes = self.notes.lock().unwrap();
        notes.streams += 1;
        Some((notes.streams - 1, age))
    }

    /// Waits until bytes may pass; false if the stream of this age has been cut.
    pub async fn pass(&self, age: u64) -> bool {
        let mut mode = self.mode.subscribe();
        match mode.wait_for(|(now, mode)| *now != age || *mode == Mode::Open).await {
            Ok(mode) => mode.0 == age,
            Err(_) => false,
        }
    }

    /// Returns when the streams of this age are cut.
    async fn gone(&self, age: u64) {
        let _ = self.mode.subscribe().wait_for(|(now, _)| *now != age).await;
    }

    /// Whether datagrams of this age may pass now.
    pub fn passes(&self, age: u64) -> bool {
        *self.mode.borrow() == (age, Mode::Open)
    }

    async fn one_way(
        &self,
        mut from: impl AsyncRead + Unpin,
        mut to: impl AsyncWrite + Unpin,
        (number, age): (usize, u64),
        direction: Direction,
    ) -> io::Result<()> {
        let mut buffer = vec![0; CARRY_BYTES];
        let mut spent = self.note(number, direction, &[]).is_err();
        loop {
            let got = if spent { return Err(io::ErrorKind::ConnectionAborted.into()) } else { from.read(&mut buffer).await? };
            if !self.pass(age).await {
                return Err(io::ErrorKind::ConnectionAborted.into());
            }
            if got == 0 {
                return to.shutdown().await;
            }
            let noted = self.note(number, direction, &buffer[..got]);
            to.write_all(&buffer[..noted.err().unwrap_or(got)]).await?;
            spent = noted.is_err();
        }
    }

    /// Carries one stream between its two ends until both have closed it, or until it is cut.
    pub async fn carry<A, B>(self, near: A, far: B, admitted: (usize, u64))
    where
        A: AsyncRead + AsyncWrite,
        B: AsyncRead + AsyncWrite,
    {
        let (near_read, near_write) = tokio::io::split(near);
        let (far_read, far_write) = tokio::io::split(far);
        let (near_read, near_write) = (std::pin::pin!(near_read), std::pin::pin!(near_write));
        let (far_read, far_write) = (std::pin::pin!(far_read), std::pin::pin!(far_write));
        let there = self.one_way(near_read, far_write, admitted, Direction::ToDestination);
        let back = self.one_way(far_read, near_write, admitted, Direction::ToSource);
        tokio::select! {
            _ = async { tokio::try_join!(there, back) } => {}
            () = self.gone(admitted.1) => {}
        }
    }

    /// A stream of the in-process link that is carried. Any thread may ask for one; `runtime` carries it.
    pub fn make_pair(&self, runtime: &Handle) -> io::Result<(UnixStream, UnixStream)> {
        let (near, near_end) = UnixStream::pair()?;
        let (far, far_end) = UnixStream::pair()?;
        let Some(admitted) = self.admit() else { return Err(io::ErrorKind::ConnectionRefused.into()) };
        let _inside = runtime.enter();
        let carried = |stream: UnixStream| {
            stream.set_nonblocking(true)?;
            tokio::net::UnixStream::from_std(stream)
        };
        let (near_end, far_end) = (carried(near_end)?, carried(far_end)?);
        runtime.spawn(self.clone().carry(near_end, far_end, admitted));
        Ok((near, far))
    }
}

/// A link whose streams are all carried.
pub struct StreamWire {
    pub link: Arc<dyn Link>,
    pub carrier: Carrier,
    /// Who takes new streams in, where somebody has to.
    pub accepting: Option<tokio::task::AbortHandle>,
}

impl Drop for StreamWire {
    fn drop(&mut self) {
        if let Some(accepting) = &self.accepting {
            accepting.abort();
        }
    }
}

impl Wire for StreamWire {
    fn link(&self) -> Arc<dyn Link> {
        self.link.clone()
    }
    fn cut(&self) {
        self.carrier.cut();
    }
    fn freeze(&self) {
        self.carrier.freeze();
    }
    fn mend(&self) {
        self.carrier.mend();
    }
    fn cut_after(&self, stream: Stream, direction: Direction, bytes: u64) -> Result<(), NotApplicable> {
        self.carrier.cut_after(stream, direction, bytes);
        Ok(())
    }
    fn carried(&self, stream: Stream, direction: Direction) -> u64 {
        self.carrier.carried(stream, direction)
    }
    fn record(&self) -> Result<(), NotApplicable> {
        self.carrier.record();
        Ok(())
    }
    fn recorded(&self) -> (Vec<u8>, Vec<u8>) {
        self.carrier.recorded()
    }
}
