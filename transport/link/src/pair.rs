//! A link within one process: the destination is a [`Sessions`] table at hand; control and lanes are UNIX socket pairs. For
//! tests and for trying the driver; there is no peer to authenticate and nothing to encrypt.

use crate::control::Early;
use crate::host::Peer;
use crate::lanes::LaneSender;
use crate::sessions::{LANE_ANSWER_BYTES, Sessions, parse_lane_answer};
use crate::tcp::{PlainReceiver, PlainSender};
use crate::{Answer, Capabilities, ConnectError, Control, LaneMemory, Link};
use limosa_proto::identity::HostId;
use limosa_proto::wire::frame::LanePreamble;
use limosa_proto::wire::limits::LANES_MAX;
use socket2::Socket;
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::time::Duration;
use tokio::io::AsyncReadExt as _;

/// How long the destination may take to answer a lane.
const ANSWER_MAX: Duration = Duration::from_secs(5);

/// Makes the two ends of a stream: the source's, the destination's.
type MakeStream = dyn Fn() -> io::Result<(UnixStream, UnixStream)> + Send + Sync;

/// The source's end of the in-process link.
pub struct PairLink {
    sessions: Sessions,
    source: HostId,
    destination: HostId,
    make: Box<MakeStream>,
}

impl std::fmt::Debug for PairLink {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "PairLink({} to {})", self.source, self.destination)
    }
}

impl PairLink {
    /// A link from `source` to the host `destination`, whose table is `sessions`.
    #[must_use]
    pub fn new(sessions: Sessions, source: HostId, destination: HostId) -> PairLink {
        PairLink { sessions, source, destination, make: Box::new(UnixStream::pair) }
    }

    /// The same over streams that `make` makes, one call for each (the source's end, the destination's): tests put something
    /// between the two that cuts, stalls or records.
    #[must_use]
    pub fn with_streams(self, make: impl Fn() -> io::Result<(UnixStream, UnixStream)> + Send + Sync + 'static) -> PairLink {
        PairLink { make: Box::new(make), ..self }
    }

    fn open_control(&self) -> io::Result<Control> {
        let (ours, theirs) = (self.make)()?;
        let split = |stream: UnixStream| {
            stream.set_nonblocking(true)?;
            Ok::<_, io::Error>(tokio::net::UnixStream::from_std(stream)?.into_split())
        };
        let ((our_read, our_write), (read, write)) = (split(ours)?, split(theirs)?);
        let peer = Peer { id: self.source, address: None, local: None };
        self.sessions.control(peer, Control::new(self.source, read, write, None, Early::default()));
        Ok(Control::new(self.destination, our_read, our_write, None, Early::default()))
    }

    async fn open_lane(&self, preamble: &LanePreamble) -> io::Result<(UnixStream, [u8; LANE_ANSWER_BYTES])> {
        let (ours, theirs) = (self.make)()?;
        let receiver = PlainReceiver::new(Socket::from(OwnedFd::from(theirs)));
        self.sessions.lane("pair", preamble, Some(self.source), Box::new(receiver))?;
        ours.set_nonblocking(true)?;
        let mut ours = tokio::net::UnixStream::from_std(ours)?;
        let mut answer = [0; LANE_ANSWER_BYTES];
        tokio::time::timeout(ANSWER_MAX, ours.read_exact(&mut answer)).await??;
        let ours = ours.into_std()?;
        ours.set_nonblocking(false)?;
        Ok((ours, answer))
    }
}

impl Link for PairLink {
    fn capabilities(&self) -> Capabilities {
        Capabilities { name: "pair", secure_lanes: false, plaintext_lanes: true, page_check: false, lanes_max: LANES_MAX }
    }

    fn destination(&self) -> String {
        "in this process".to_owned()
    }

    fn control(&self) -> Answer<'_, Result<Control, ConnectError>> {
        Box::pin(async {
            let doing = "opening the control channel";
            self.open_control().map_err(|error| ConnectError::Io { destination: self.destination(), doing, error })
        })
    }

    fn lane(
        &self,
        preamble: LanePreamble,
        _plaintext: bool,
        _memory: &LaneMemory,
    ) -> Answer<'_, Result<Box<dyn LaneSender>, ConnectError>> {
        Box::pin(async move {
            let destination = self.destination();
            let (socket, answer) = self.open_lane(&preamble).await.map_err(|error| ConnectError::Io {
                destination: destination.clone(),
                doing: "opening a lane",
                error,
            })?;
            match parse_lane_answer(&answer) {
                Some(code) => Err(ConnectError::LaneRefused { destination, lane: preamble.lane, code }),
                None => Ok(Box::new(PlainSender::new(Socket::from(OwnedFd::from(socket)))) as Box<dyn LaneSender>),
            }
        })
    }
}
