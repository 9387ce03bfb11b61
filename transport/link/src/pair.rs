//! A link within one process: the destination is a [`Sessions`] table at hand. Control is an in-memory stream, lanes are UNIX
//! socket pairs. For tests and for trying the driver; there is no peer to authenticate and nothing to encrypt.

use crate::control::Early;
use crate::host::Peer;
use crate::lanes::LaneSender;
use crate::sessions::{LANE_ANSWER_BYTES, Sessions, parse_lane_answer};
use crate::tcp::{PlainReceiver, PlainSender};
use crate::{Answer, Capabilities, ConnectError, Control, Link};
use limosa_proto::identity::HostId;
use limosa_proto::wire::frame::LanePreamble;
use limosa_proto::wire::limits::LANES_MAX;
use socket2::Socket;
use std::io::{self, Read as _};
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;

/// Bytes that one direction of the control channel holds.
const CONTROL_BYTES: usize = 64 << 10;

/// The source's end of the in-process link.
#[derive(Debug)]
pub struct PairLink {
    sessions: Sessions,
    source: HostId,
    destination: HostId,
}

impl PairLink {
    /// A link from `source` to the host `destination`, whose table is `sessions`.
    #[must_use]
    pub fn new(sessions: Sessions, source: HostId, destination: HostId) -> PairLink {
        PairLink { sessions, source, destination }
    }

    fn open_lane(&self, preamble: &LanePreamble) -> io::Result<(UnixStream, [u8; LANE_ANSWER_BYTES])> {
        let (mut ours, theirs) = UnixStream::pair()?;
        let receiver = PlainReceiver::new(Socket::from(OwnedFd::from(theirs)));
        self.sessions.lane(preamble, Some(self.source), Box::new(receiver))?;
        let mut answer = [0; LANE_ANSWER_BYTES];
        ours.read_exact(&mut answer)?;
        Ok((ours, answer))
    }
}

impl Link for PairLink {
    fn capabilities(&self) -> Capabilities {
        Capabilities { name: "pair", secure_lanes: false, plaintext_lanes: true, lanes_max: LANES_MAX }
    }

    fn destination(&self) -> String {
        "in this process".to_owned()
    }

    fn control(&self) -> Answer<'_, Result<Control, ConnectError>> {
        Box::pin(async {
            let (ours, theirs) = tokio::io::duplex(CONTROL_BYTES);
            let (read, write) = tokio::io::split(theirs);
            let peer = Peer { id: self.source, address: None };
            self.sessions.control(peer, Control::new(self.source, read, write, None, Early::default()));
            let (read, write) = tokio::io::split(ours);
            Ok(Control::new(self.destination, read, write, None, Early::default()))
        })
    }

    fn lane(&self, preamble: LanePreamble, _plaintext: bool) -> Answer<'_, Result<Box<dyn LaneSender>, ConnectError>> {
        Box::pin(async move {
            let destination = self.destination();
            let (socket, answer) = self.open_lane(&preamble).map_err(|error| ConnectError::Io {
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
