//! How pages move in the simulation: a lane reads them at the source at some moment of the round, they arrive in the order
//! of their lane and in no order with other lanes, a barrier ends each lane's part. What is late writes nothing.

use crate::checker::Mutant;
use crate::faults::Step;
use crate::link::Lanes;
use crate::world::{Engine, Item, Told, World};
use limosa_proto::bitmap::PageSet;
use limosa_proto::event::{DestinationEvent, HostTask, RoundSent, Side, SourceEvent};
use limosa_proto::recovery::Plugged;
use limosa_proto::state::{DestinationState, SourceState};
use limosa_proto::wire::frame::LaneToken;
use std::collections::BTreeMap;
use std::time::Duration;

/// Pages of one frame.
const FRAME_PAGES: usize = 64;
/// How long the reason for a broken lane may take to arrive on the control channel.
const GRACE: Duration = Duration::from_millis(250);

impl World {
    pub(crate) fn open_lanes(&mut self, host: usize, number: u64, lanes: u16, token: LaneToken) {
        let incarnation = self.incarnation(host).unwrap();
        let Some(session) = self.session(host, number) else { return };
        let (key, peer) = (session.key, session.peer);
        self.point(Step::OpenLanes, false, host, peer);
        let there = self.session_of(peer, key).filter(|_| self.can_reach(host, peer));
        let gate = there.and_then(|there| self.session(peer, there).and_then(|session| session.gate));
        let (Some(there), true) = (there, gate == Some(token)) else {
            let failed = SourceEvent::HostFailed { task: HostTask::Lanes, words: "a lane was not let in".to_owned() };
            let event = Told::Source(failed);
            return self.after(Duration::from_millis(5), Item::Tell { host, incarnation, session: number, event });
        };
        let (source, destination) = ((host, number), (peer, there));
        let last = vec![self.now; usize::from(lanes)];
        self.net.lanes.push(Lanes { key, token, source, destination, moving: true, last, barriers: BTreeMap::new() });
        let set = self.net.lanes.len() - 1;
        for (at, session) in [source, destination] {
            if let Some(session) = self.session(at, session) {
                session.lanes = Some(set);
            }
        }
        let travel = self.net.travel(host, peer, self.now);
        let event = Told::Source(SourceEvent::LanesOpen);
        self.after(travel * 2, Item::Tell { host, incarnation, session: number, event });
        let late = self.net.travel(host, peer, self.now) * 3;
        // A lane's frames are read when all lanes have joined.
        self.net.lanes[set].last.fill(self.now.after(travel + late));
        let (event, incarnation) = (Told::Destination(DestinationEvent::LanesJoined), self.incarnation(peer).unwrap());
        self.after(travel + late, Item::Tell { host: peer, incarnation, session: there, event });
        self.point(Step::OpenLanes, true, host, peer);
    }

    pub(crate) fn send_round(&mut self, host: usize, number: u64, round: u32, pages: &PageSet, last: bool) {
        let incarnation = self.incarnation(host).unwrap();
        let Some(session) = self.session(host, number) else { return };
        let (lanes, peer) = (session.lanes, session.peer);
        self.point(if last { Step::LastRound } else { Step::Round }, false, host, peer);
        let Some(set) = lanes else {
            let failed = SourceEvent::HostFailed { task: HostTask::Pages, words: "there are no lanes".to_owned() };
            let event = Told::Source(failed);
            return self.after(Duration::ZERO, Item::Tell { host, incarnation, session: number, event });
        };
        let count = self.net.lanes[set].last.len();
        let all: Vec<usize> =
            pages.runs().flat_map(|run| run.first..run.end()).map(|page| usize::try_from(page).unwrap()).collect();
        let skips = self.mutant == Some(Mutant::SkipsWhatWasSent)
            && round == 1
            && self.report.outcomes.keys().any(|outcome| *outcome != "committed");
        let all: Vec<usize> = all.into_iter().filter(|page| !skips || *page > 20).collect();
        let mut took = Duration::from_micros(50);
        for lane in 0..count {
            let own: Vec<usize> = all.iter().copied().filter(|page| page / 8 % count == lane).collect();
            let mut at = Duration::ZERO;
            for frame in own.chunks(FRAME_PAGES) {
                at += Duration::from_micros(frame.len() as u64 * 1000 * count as u64 / self.pages_per_ms);
                let (pages, barrier) = (frame.to_vec(), false);
                self.after(at, Item::LaneRead { lanes: set, lane, round, pages, barrier });
            }
            at += Duration::from_micros(10);
            self.after(at, Item::LaneRead { lanes: set, lane, round, pages: Vec::new(), barrier: true });
            took = took.max(at);
        }
        let pages = all.len() as u64;
        let sent = RoundSent { round, pages, zero_pages: 0, bytes_on_wire: pages * 4096 };
        if self.net.lanes[set].moving {
            let event = Told::Source(SourceEvent::PagesSent(sent));
            self.after(took, Item::Tell { host, incarnation, session: number, event });
        }
        self.point(if last { Step::LastRound } else { Step::Round }, true, host, peer);
    }

    pub(crate) fn lane_read(&mut self, lanes: usize, lane: usize, round: u32, pages: &[usize], barrier: bool) {
        let (host, session) = self.net.lanes[lanes].source;
        let Some(session) = self.session(host, session) else { return };
        if session.lanes != Some(lanes) {
            return;
        }
        let Some(vmm) = session.vmm.filter(|vmm| self.guest.vmms[*vmm].lives) else { return };
        let values = pages.iter().map(|page| (*page, self.guest.vmms[vmm].memory[*page])).collect();
        let at = self.net.lane_arrival(lanes, lane, self.now);
        self.at(at, Item::LaneWrite { lanes, lane, round, values, barrier });
    }

    pub(crate) fn lane_write(&mut self, lanes: usize, lane: usize, round: u32, values: &[(usize, u64)], barrier: bool) {
        let Lanes { key, token, destination: (host, number), moving, .. } = self.net.lanes[lanes].clone();
        if self.mutant == Some(Mutant::AcceptsOldLanes) && self.session(host, number).is_none() && !self.quiet {
            return self.old_lane_write(lanes, lane, round, values);
        }
        if !moving {
            return;
        }
        let Some(session) = self.session(host, number) else { return };
        if session.lanes != Some(lanes) || session.key != key || session.gate != Some(token) {
            return;
        }
        let vmm = session.vmm;
        self.fill(vmm, values);
        if !barrier {
            return;
        }
        let all = (1 << self.net.lanes[lanes].last.len()) - 1;
        let here = self.net.lanes[lanes].barriers.entry(round).or_default();
        *here |= 1 << lane;
        let whole = if self.mutant == Some(Mutant::FirstLaneIsTheRound) { here.count_ones() == 1 } else { *here == all };
        if whole {
            let event = DestinationEvent::RoundArrived { round, pages: 0, zero_pages: 0, bytes: 0 };
            self.tell(host, number, Told::Destination(event));
        }
    }

    /// A planted fault: what an old lane has sent waits in its socket for whoever receives next.
    fn old_lane_write(&mut self, lanes: usize, lane: usize, round: u32, values: &[(usize, u64)]) {
        let host = self.net.lanes[lanes].destination.0;
        let vmm = self.hosts[host].agent.as_ref().and_then(|agent| agent.entry.as_ref()).and_then(|entry| entry.plugged);
        match vmm.filter(|vmm| self.guest.vmms[*vmm].state == Plugged::Incoming && self.random.percent(20)) {
            Some(vmm) => self.fill(Some(vmm), values),
            None => {
                let values = values.to_vec();
                self.after(Duration::from_millis(5), Item::LaneWrite { lanes, lane, round, values, barrier: false });
            }
        }
    }

    fn fill(&mut self, vmm: Option<usize>, values: &[(usize, u64)]) {
        let Some(vmm) = vmm.map(|vmm| &mut self.guest.vmms[vmm]) else { return };
        // The driver ends its lanes before the state is loaded.
        if vmm.lives && vmm.state == Plugged::Incoming {
            values.iter().for_each(|(page, value)| vmm.memory[*page] = *value);
        }
    }

    /// The lanes between two hosts break, or stand still for good.
    pub(crate) fn hurt_lanes(&mut self, here: usize, there: usize, breaks: bool) {
        for lanes in 0..self.net.lanes.len() {
            let set = &mut self.net.lanes[lanes];
            let (source, destination) = (set.source, set.destination);
            let hosts = [source.0, destination.0];
            if !hosts.contains(&here) || !hosts.contains(&there) || !std::mem::replace(&mut set.moving, false) || !breaks {
                continue;
            }
            self.lane_breaks_at(source.0, source.1);
            self.lane_breaks_at(destination.0, destination.1);
        }
    }

    /// A lane has ended at one of its ends: the driver tells it after a moment, if that end still needs it.
    pub(crate) fn lane_breaks_at(&mut self, host: usize, session: u64) {
        if let Some(incarnation) = self.incarnation(host) {
            self.after(GRACE, Item::LaneFailed { host, incarnation, session });
        }
    }

    pub(crate) fn lane_failed(&mut self, host: usize, incarnation: u64, number: u64) {
        if self.incarnation(host) != Some(incarnation) {
            return;
        }
        let Some(session) = self.session(host, number) else { return };
        let needed = match &session.engine {
            Engine::Source(source) => source.state() < SourceState::Finalizing,
            Engine::Destination(destination) => destination.state() < DestinationState::Loading,
        };
        if !needed {
            return;
        }
        let (task, words) = (HostTask::Pages, "a lane broke".to_owned());
        let event = match session.side() {
            Side::Source => Told::Source(SourceEvent::HostFailed { task, words }),
            Side::Destination => Told::Destination(DestinationEvent::HostFailed { task, words }),
        };
        self.tell(host, number, event);
    }
}
