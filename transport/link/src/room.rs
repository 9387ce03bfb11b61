//! Who gets how much room: the places of peers that have not said who they are, shares of what a known host may have at once,
//! and lines in the log. One address, or one host, never takes what is meant for all. It knows no socket.

use limosa_proto::identity::HostId;
use std::collections::{HashMap, VecDeque};
use std::net::{IpAddr, Ipv6Addr};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};
use tokio::sync::oneshot;
use tokio::task::JoinHandle;

/// Addresses whose lines in the log are counted apart; then all begin anew.
const LOGGED_MAX: usize = 256;
/// Addresses that are remembered for that; then all begin anew.
const TRYING_MAX: usize = 1024;

/// What counts as one address: whoever has an IPv6 network of a link has all of its addresses.
fn origin(address: IpAddr) -> IpAddr {
    match address.to_canonical() {
        IpAddr::V6(address) => IpAddr::V6(Ipv6Addr::from_bits(address.to_bits() >> 64 << 64)),
        address => address,
    }
}

/// Peers that are being met: so many in all and of one address. Whoever comes is let in; who makes room is the oldest of the
/// same address if that has its share, and else the oldest of the address that has most.
#[derive(Debug)]
pub(crate) struct Waiting {
    in_all_max: usize,
    of_one_max: usize,
    places: VecDeque<Place>,
}

#[derive(Debug)]
struct Place {
    origin: IpAddr,
    task: JoinHandle<()>,
    /// Dropped to have it leave.
    _stay: oneshot::Sender<()>,
}

impl Waiting {
    pub(crate) fn new(in_all_max: usize, of_one_max: usize) -> Waiting {
        Waiting { in_all_max: in_all_max.max(1), of_one_max: of_one_max.max(1), places: VecDeque::new() }
    }

    /// Makes room for one more of `address`; whether another had to leave for it.
    pub(crate) fn make_room(&mut self, address: IpAddr) -> bool {
        self.places.retain(|place| !place.task.is_finished());
        let origin = origin(address);
        let leaves = if self.count(origin) >= self.of_one_max {
            Some(origin)
        } else if self.places.len() >= self.in_all_max {
            // Of those that have most, the one that has waited longest: the first that is found.
            self.places.iter().rev().map(|place| place.origin).max_by_key(|origin| self.count(*origin))
        } else {
            None
        };
        let oldest = leaves.and_then(|leaves| self.places.iter().position(|place| place.origin == leaves));
        oldest.is_some_and(|oldest| self.places.remove(oldest).is_some())
    }

    /// One of `address` that is met by `task`, which leaves when `stay` is dropped.
    pub(crate) fn add(&mut self, address: IpAddr, task: JoinHandle<()>, stay: oneshot::Sender<()>) {
        self.places.push_back(Place { origin: origin(address), task, _stay: stay });
    }

    fn count(&self, origin: IpAddr) -> usize {
        self.places.iter().filter(|place| place.origin == origin).count()
    }
}

/// How many handshakes each address may still begin: one that floods the port is turned away before one costs anything. What came to
/// something is given back, so that whoever is known never runs out.
#[derive(Debug)]
pub(crate) struct Trials {
    at_once: u32,
    each: Duration,
    trying: Mutex<HashMap<IpAddr, Trying>>,
}

/// One address: how many handshakes it has begun in vain, less those that time has taken off, reckoned up to `at`.
#[derive(Debug)]
struct Trying {
    begun: u32,
    at: Instant,
}

impl Trials {
    /// `at_once` of each address, and one more after `each`.
    pub(crate) fn new(at_once: u32, each: Duration) -> Trials {
        Trials { at_once, each, trying: Mutex::default() }
    }

    /// Whether one more of `address` may begin.
    pub(crate) fn begin(&self, address: IpAddr) -> bool {
        self.begin_at(origin(address), Instant::now())
    }

    fn begin_at(&self, origin: IpAddr, now: Instant) -> bool {
        let mut all = self.trying.lock().unwrap_or_else(PoisonError::into_inner);
        let is_over = |trying: &Trying| now.duration_since(trying.at) >= self.each * trying.begun;
        if all.len() >= TRYING_MAX && !all.contains_key(&origin) {
            all.retain(|_, trying| !is_over(trying));
            if all.len() >= TRYING_MAX {
                all.clear();
            }
        }
        let trying = all.entry(origin).or_insert(Trying { begun: 0, at: now });
        if is_over(trying) {
            *trying = Trying { begun: 0, at: now };
        }
        while trying.begun > 0 && now.duration_since(trying.at) >= self.each {
            trying.begun -= 1;
            trying.at += self.each;
        }
        let may = trying.begun < self.at_once;
        trying.begun += u32::from(may);
        may
    }

    /// One of `address` came to something.
    pub(crate) fn give_back(&self, address: IpAddr) {
        let mut all = self.trying.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(trying) = all.get_mut(&origin(address)) {
            trying.begun = trying.begun.saturating_sub(1);
        }
    }
}

/// Something of which each known host may have so many at once. Clones are the same table.
#[derive(Debug, Clone)]
pub(crate) struct Shares {
    most: usize,
    held: Arc<Mutex<HashMap<HostId, usize>>>,
}

/// One of them; it is given back by dropping it.
#[derive(Debug)]
pub(crate) struct Share {
    shares: Shares,
    host: HostId,
}

impl Shares {
    pub(crate) fn new(most: usize) -> Shares {
        Shares { most, held: Arc::default() }
    }

    /// One for `host`, unless it has all that it may have.
    pub(crate) fn take(&self, host: HostId) -> Option<Share> {
        let mut held = self.held.lock().unwrap_or_else(PoisonError::into_inner);
        let count = held.entry(host).or_default();
        if *count >= self.most {
            return None;
        }
        *count += 1;
        Some(Share { shares: self.clone(), host })
    }
}

impl Drop for Share {
    fn drop(&mut self) {
        let mut held = self.shares.held.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(count) = held.get_mut(&self.host) {
            *count = count.saturating_sub(1);
            if *count == 0 {
                held.remove(&self.host);
            }
        }
    }
}

/// Says something at most once a second, and how often it was not said.
#[derive(Debug, Default)]
pub(crate) struct Sparing {
    last: Option<Instant>,
    unsaid: u64,
}

impl Sparing {
    pub(crate) fn say(&mut self, words: impl FnOnce(u64)) {
        if self.last.is_some_and(|last| last.elapsed() < Duration::from_secs(1)) {
            self.unsaid += 1;
            return;
        }
        words(self.unsaid);
        *self = Sparing { last: Some(Instant::now()), unsaid: 0 };
    }
}

/// The same for each address: a loud one does not hide what is said of another.
#[derive(Debug, Default)]
pub(crate) struct SparingByAddress(Mutex<HashMap<IpAddr, Sparing>>);

impl SparingByAddress {
    pub(crate) fn say(&self, address: IpAddr, words: impl FnOnce(u64)) {
        let mut all = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let origin = origin(address);
        if all.len() >= LOGGED_MAX && !all.contains_key(&origin) {
            all.clear();
        }
        all.entry(origin).or_default().say(words);
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    fn of(host: u8) -> IpAddr {
        IpAddr::from([10, 0, 0, host])
    }

    /// Lets one of `address` wait for ever.
    fn come(waiting: &mut Waiting, address: IpAddr) -> bool {
        let made = waiting.make_room(address);
        let (stay, leave) = oneshot::channel();
        let task = tokio::spawn(async move { drop(leave.await) });
        waiting.add(address, task, stay);
        made
    }

    #[tokio::test]
    async fn an_address_makes_room_for_itself_first() {
        let mut waiting = Waiting::new(8, 3);
        assert!(!come(&mut waiting, of(1)));
        for number in 0..20 {
            assert_eq!(come(&mut waiting, of(2)), number >= 3, "{number}");
        }
        assert_eq!((waiting.count(of(1)), waiting.count(of(2))), (1, 3), "another address was crowded out");
        // Mapped and plain are one address, and so are all of an IPv6 network.
        assert_eq!(waiting.count(origin("::ffff:10.0.0.2".parse().unwrap())), 3);
        for last in 1..10 {
            come(&mut waiting, IpAddr::from([0xfd00, 0, 0, 1, 0, 0, 0, last]));
        }
        assert_eq!(waiting.count("fd00:0:0:1::".parse().unwrap()), 3);
    }

    #[tokio::test]
    async fn the_address_that_has_most_makes_room_when_all_is_full() {
        let mut waiting = Waiting::new(6, 4);
        for host in [1, 2, 2, 2, 3, 3] {
            assert!(!come(&mut waiting, of(host)));
        }
        assert!(come(&mut waiting, of(4)));
        assert_eq!([1, 2, 3, 4].map(|host| waiting.count(of(host))), [1, 2, 2, 1]);
        // The longest waiting of those with most.
        assert!(come(&mut waiting, of(5)));
        assert_eq!([1, 2, 3, 4, 5].map(|host| waiting.count(of(host))), [1, 1, 2, 1, 1]);
    }

    #[tokio::test]
    async fn who_has_gone_needs_no_room() {
        let mut waiting = Waiting::new(2, 2);
        come(&mut waiting, of(1));
        come(&mut waiting, of(1));
        waiting.places.iter().for_each(|place| place.task.abort());
        while !waiting.places.iter().all(|place| place.task.is_finished()) {
            tokio::task::yield_now().await;
        }
        assert!(!come(&mut waiting, of(1)));
        assert_eq!(waiting.places.len(), 1);
    }

    #[test]
    fn an_address_begins_so_many_in_vain_and_no_more() {
        const AT_ONCE: u32 = 128;
        let (trials, begun) = (Trials::new(AT_ONCE, Duration::from_millis(10)), Instant::now());
        let tries = |host: u8, count: u32, now: Instant| (0..count).filter(|_| trials.begin_at(of(host), now)).count() as u32;
        assert_eq!((tries(1, 10_000, begun), tries(2, 1, begun)), (AT_ONCE, 1), "another address is not made to pay for it");
        // What comes to something is no trial, however often.
        for _ in 0..10_000 {
            trials.give_back(of(1));
            assert!(trials.begin_at(of(1), begun));
        }
        assert!(!trials.begin_at(of(1), begun));
        // So many each second from then on, however hard it tries, and all of them once it has been quiet.
        let second = Duration::from_secs(1);
        let let_in: u32 = (1..=1000).map(|number| tries(1, 3, begun + second * number / 1000)).sum();
        assert_eq!(let_in, 100);
        assert_eq!(tries(1, 10_000, begun + 10 * second), AT_ONCE);
        for number in 0..10 * TRYING_MAX as u32 {
            trials.begin_at(IpAddr::from(number.to_be_bytes()), begun + 10 * second);
        }
        assert!(trials.trying.lock().unwrap().len() <= TRYING_MAX);
    }

    #[test]
    fn a_host_gets_its_share_and_no_more() {
        let (shares, ours, theirs) = (Shares::new(2), HostId([1; 32]), HostId([2; 32]));
        let held = (shares.take(ours), shares.take(ours));
        assert!(held.0.is_some() && held.1.is_some() && shares.take(ours).is_none());
        let other = shares.take(theirs);
        assert!(other.is_some(), "another host's share is its own");
        drop(held.0);
        let again = shares.take(ours);
        assert!(again.is_some() && shares.take(ours).is_none());
        drop((again, held.1, other));
        assert!(shares.held.lock().unwrap().is_empty());
    }

    #[test]
    fn a_loud_address_does_not_hide_another() {
        let (log, said) = (SparingByAddress::default(), Mutex::new(Vec::new()));
        let say = |host: u8| log.say(of(host), |unsaid| said.lock().unwrap().push((host, unsaid)));
        for _ in 0..100 {
            say(1);
        }
        say(2);
        assert_eq!(*said.lock().unwrap(), [(1, 0), (2, 0)]);
        (0..LOGGED_MAX * 2).for_each(|number| log.say(IpAddr::from((number as u32).to_be_bytes()), |_| ()));
        assert!(log.0.lock().unwrap().len() <= LOGGED_MAX);
    }
}
