//! Announcements in a real network: a Linux bridge, a Linux neighbour, and an ear on the far side. Needs root.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, unreachable_pub)]

mod lab;

use std::cell::Cell;
use std::net::UdpSocket;
use std::thread;
use std::time::{Duration, Instant};

use lab::{Ear, Lab, Namespace};
use limosa_announce::{Announcer, Hold, Nic, Questions, Reached, Schedule, Sent, Watcher, frames, reach_words, stations};
use std::net::IpAddr;

const MAC: [u8; 6] = [0x52, 0x54, 0x00, 0x12, 0x34, 0x56];
const MAC_WORDS: &str = "52:54:00:12:34:56";
const OLD_WORDS: &str = "52:54:00:99:99:99";
const QUIET: Duration = Duration::from_millis(150);

fn nic() -> Nic {
    let addresses = vec!["10.0.0.5".parse().unwrap(), "fd00::5".parse().unwrap()];
    Nic { mac: MAC, addresses, interface: "br0".into(), port: Some("tap0".into()), ..Nic::default() }
}

fn announce(at: &Namespace, nic: &Nic) -> Sent {
    at.within(|| Announcer::open().unwrap().announce(nic, 0))
}

/// What the peer's neighbour tables say about the guest, old owner first.
fn remember_old_owner(peer: &Namespace, device: &str) {
    for address in ["10.0.0.5", "fd00::5"] {
        peer.ip(&format!("neigh replace {address} lladdr {OLD_WORDS} dev {device} nud stale"));
    }
}

fn assert_neighbours(peer: &Namespace, device: &str, owner: &str) {
    for address in ["10.0.0.5", "fd00::5"] {
        let deadline = Instant::now() + Duration::from_secs(2);
        loop {
            let entry = peer.ip(&format!("neigh show {address} dev {device}"));
            if entry.contains(owner) {
                break;
            }
            assert!(Instant::now() < deadline, "{address} should be at {owner}, but: {entry:?}");
            thread::sleep(Duration::from_millis(10));
        }
    }
}

#[test]
fn far_side_hears_exactly_the_frames_in_order() {
    let Some(lab) = Lab::new() else { return };
    let ear = lab.peer.within(Ear::open);
    let sent = announce(&lab.host, &nic());
    assert_eq!(sent.errors, Vec::<String>::new());
    let expected = frames(&nic());
    assert_eq!(sent.frames, expected.iter().map(|f| f.words.clone()).collect::<Vec<_>>());
    let heard = ear.from(MAC, QUIET);
    assert_eq!(heard, expected.into_iter().map(|f| f.bytes).collect::<Vec<_>>());
}

#[test]
fn neighbours_renew_their_tables() {
    let Some(lab) = Lab::new() else { return };
    remember_old_owner(&lab.peer, "peer0");
    assert_neighbours(&lab.peer, "peer0", OLD_WORDS);
    assert_eq!(announce(&lab.host, &nic()).errors, Vec::<String>::new());
    assert_neighbours(&lab.peer, "peer0", MAC_WORDS);
}

#[test]
fn local_bridge_moves_the_mac_to_the_tap_and_traffic_follows() {
    let Some(lab) = Lab::new() else { return };
    let datagram_reaches_guest = || {
        let ear = lab.guest.within(Ear::open);
        lab.peer.within(|| UdpSocket::bind("10.0.0.9:0").unwrap().send_to(b"where are you?", "10.0.0.5:9").unwrap());
        !ear.to(MAC, QUIET).is_empty()
    };
    lab.peer.ip(&format!("neigh replace 10.0.0.5 lladdr {MAC_WORDS} dev peer0 nud permanent"));
    // The guest spoke at its old place, behind the uplink: the bridge learns that.
    let elsewhere = Nic { interface: "peer0".into(), port: None, ..nic() };
    assert_eq!(announce(&lab.peer, &elsewhere).errors, Vec::<String>::new());
    assert_eq!(lab.host.fdb(MAC_WORDS), [format!("{MAC_WORDS} dev up0 master br0 ")]);
    assert!(!datagram_reaches_guest(), "the bridge should still send it back to where the guest was");

    // Frames alone leave the local bridge in its error: this is why the entry is set.
    announce(&lab.host, &Nic { port: None, ..nic() });
    assert!(!datagram_reaches_guest(), "then setting the entry would not be needed");

    let sent = announce(&lab.host, &nic());
    assert_eq!(sent.bridge.as_deref(), Some("bridge port tap0 has 52:54:00:12:34:56"));
    assert_eq!(lab.host.fdb(MAC_WORDS), [format!("{MAC_WORDS} dev tap0 master br0 ")]);
    assert!(datagram_reaches_guest());

    // The entry is dynamic: the next migration away moves it again, without anybody's help.
    announce(&lab.peer, &elsewhere);
    assert_eq!(lab.host.fdb(MAC_WORDS), [format!("{MAC_WORDS} dev up0 master br0 ")]);
}

#[test]
fn tagged_frames_leave_by_the_uplink_with_their_tag_and_touch_no_other_network() {
    let Some(lab) = Lab::new() else { return };
    remember_old_owner(&lab.peer, "peer0");
    let tagged = Nic { vlan: Some(7), ..nic() };
    // Heard where they leave the host: a receiver's kernel takes the tag out of the bytes.
    let ear = lab.host.within(Ear::open);
    assert_eq!(announce(&lab.host, &tagged).errors, Vec::<String>::new());
    let uplink = lab.host.index("up0");
    let heard: Vec<Vec<u8>> = ear
        .heard(QUIET)
        .into_iter()
        .filter(|(index, bytes)| *index == uplink && bytes[6..12] == MAC)
        .map(|(_, bytes)| bytes)
        .collect();
    assert_eq!(heard, frames(&tagged).into_iter().map(|f| f.bytes).collect::<Vec<_>>());
    thread::sleep(QUIET);
    assert_neighbours(&lab.peer, "peer0", OLD_WORDS);
}

#[test]
fn filtering_bridge_gets_the_entry_in_the_vlan_of_the_port() {
    let Some(lab) = Lab::new() else { return };
    if !lab.host.try_ip("link set br0 type bridge vlan_filtering 1") {
        return lab::lacks("bridge with vlan_filtering (CONFIG_BRIDGE_VLAN_FILTERING)");
    }
    for vlan in ["dev tap0 vid 7 pvid untagged", "dev up0 vid 7", "dev br0 vid 7 self"] {
        lab.host.bridge(&format!("vlan add {vlan}"));
    }
    lab.host.bridge("vlan del dev tap0 vid 1");
    assert_eq!(announce(&lab.host, &Nic { vlan: Some(7), ..nic() }).errors, Vec::<String>::new());
    let table = lab.host.fdb(MAC_WORDS);
    assert!(table.iter().any(|line| line.contains("dev tap0 vlan 7 master br0")), "{table:?}");
}

#[test]
fn what_fails_is_said_and_the_rest_is_done() {
    let Some(lab) = Lab::new() else { return };
    let all = frames(&nic()).len();
    let gone = announce(&lab.host, &Nic { interface: "br9".into(), ..nic() });
    assert_eq!(gone.errors, ["interface \"br9\": there is no such interface on this host"]);
    assert!(gone.bridge.is_some() && gone.frames.is_empty());

    let port = announce(&lab.host, &Nic { port: Some("tap9".into()), ..nic() });
    assert!(port.errors[0].starts_with("bridge of port tap9") && port.errors[0].contains("no such interface"));
    assert_eq!((port.frames.len(), port.bridge), (all, None));

    lab.host.ip("link add free0 type veth peer name free1");
    lab.host.ip("link set free0 up");
    lab.host.ip("link set free1 up");
    let free = announce(&lab.host, &Nic { port: Some("free0".into()), ..nic() });
    assert!(free.errors[0].contains("not a port of a bridge"), "{:?}", free.errors);
    assert_eq!(free.frames.len(), all);

    lab.host.ip("link set tap0 down");
    let down = announce(&lab.host, &nic());
    assert!(down.errors[0].contains("must be up, with carrier and forwarding"), "{:?}", down.errors);
    assert_eq!(down.frames.len(), all);

    lab.host.ip("link set br0 down");
    let bridge = announce(&lab.host, &Nic { port: None, ..nic() });
    assert_eq!((bridge.errors.len(), bridge.frames.len()), (all, 0));
    assert!(bridge.errors[0].ends_with("on interface br0: the interface is down: set it up (ip link set INTERFACE up)"));

    for name in ["", "an-interface-name-that-is-too-long", "zero\0inside", "../br0"] {
        let odd = announce(&lab.host, &Nic { interface: name.into(), port: Some(name.into()), ..nic() });
        assert_eq!((odd.errors.len(), odd.frames.len()), (2, 0), "{name:?}");
    }
}

#[test]
fn a_schedule_is_run_to_its_end_and_heard() {
    let Some(lab) = Lab::new() else { return };
    let ear = lab.peer.within(Ear::open);
    let gaps = [30, 60, 90].map(Duration::from_millis).to_vec();
    let schedule = Schedule::new(gaps).unwrap();
    let mut reports = Vec::new();
    let nics = [nic(), Nic { mac: [0; 6], ..nic() }];
    let outcome = lab.host.within(|| Announcer::open().unwrap().run(&nics, &schedule, || false, |sent| reports.push(sent)));
    assert_eq!((outcome.rounds, outcome.frames, outcome.errors, outcome.cancelled), (4, 16, 4, false));
    let good: Vec<&Sent> = reports.iter().filter(|sent| sent.mac == MAC).collect();
    assert_eq!(good.iter().map(|sent| sent.round).collect::<Vec<_>>(), [0, 1, 2, 3]);
    for (sent, due_ms) in good.iter().zip([0, 30, 90, 180]) {
        assert!(sent.after >= Duration::from_millis(due_ms), "round {} after {:?}", sent.round, sent.after);
    }
    let round: Vec<Vec<u8>> = frames(&nic()).into_iter().map(|f| f.bytes).collect();
    assert_eq!(ear.from(MAC, QUIET), [&round[..]; 4].concat());
}

#[test]
fn cancelling_stops_between_rounds() {
    let Some(lab) = Lab::new() else { return };
    let schedule = Schedule::new(vec![Duration::from_millis(1), Duration::from_secs(10)]).unwrap();
    let start = Instant::now();
    let outcome = lab.host.within(|| {
        let rounds = Cell::new(0);
        let announcer = Announcer::open().unwrap();
        announcer.run(&[nic()], &schedule, || rounds.get() == 2, |_| rounds.set(rounds.get() + 1))
    });
    assert_eq!((outcome.rounds, outcome.cancelled), (2, true));
    assert!(start.elapsed() < Duration::from_secs(5), "cancelling took {:?}", start.elapsed());
}

/// A Linux guest behind the port, with the MAC and both addresses.
fn settle_guest(lab: &Lab) {
    lab.guest.ip(&format!("link set guest0 address {MAC_WORDS}"));
    lab.guest.ip("addr add 10.0.0.5/24 dev guest0");
    lab.guest.ip("addr add fd00::5/64 dev guest0 nodad");
}

fn reach(nic: &Nic, patience: Duration) -> Result<Reached, String> {
    Questions::prepare(nic)?.ask(patience)
}

#[test]
fn a_linux_guest_is_reached_by_each_of_its_addresses_and_silence_is_bounded() {
    let Some(lab) = Lab::new() else { return };
    settle_guest(&lab);
    for address in ["10.0.0.5", "fd00::5"] {
        let address: IpAddr = address.parse().unwrap();
        for port in [Some("tap0".to_owned()), None] {
            let one = Nic { addresses: vec![address], port, ..nic() };
            let begun = Instant::now();
            let reached = lab.host.within(|| reach(&one, Duration::from_secs(5))).unwrap();
            assert_eq!(reached.address, address);
            assert!(reached.at > begun && begun.elapsed() < Duration::from_secs(1), "{address} took {:?}", begun.elapsed());
        }
    }
    let silent = Nic { addresses: vec!["10.0.0.6".parse().unwrap()], ..nic() };
    let begun = Instant::now();
    let words = lab.host.within(|| reach(&silent, Duration::from_millis(300))).unwrap_err();
    assert!(begun.elapsed() >= Duration::from_millis(300) && begun.elapsed() < Duration::from_secs(2), "{:?}", begun.elapsed());
    assert!(words.contains(&reach_words(&silent, silent.addresses[0])) && words.contains("300 ms"), "{words}");
    let stranger = Nic { mac: [0x52, 0x54, 0, 0, 0, 9], port: None, ..nic() };
    assert!(lab.host.within(|| reach(&stranger, Duration::from_millis(200))).is_err(), "another MAC answered, not the guest");
    let nothing = Nic { addresses: vec![], ..nic() };
    assert!(lab.host.within(|| reach(&nothing, Duration::from_secs(5))).unwrap_err().contains("no address"));
    let gone = Nic { interface: "br9".into(), ..nic() };
    assert!(lab.host.within(|| reach(&gone, Duration::from_secs(5))).unwrap_err().contains("br9"));
}

#[test]
fn a_watched_port_tells_the_addresses_of_its_guest_and_forgets_what_another_claims() {
    let Some(lab) = Lab::new() else { return };
    let wait = |what: &str, good: &dyn Fn() -> bool| {
        let deadline = Instant::now() + Duration::from_secs(3);
        while !good() {
            assert!(Instant::now() < deadline, "{what}");
            thread::sleep(Duration::from_millis(5));
        }
    };
    let watcher = Watcher::default();
    let before: IpAddr = "10.0.0.77".parse().unwrap();
    let (watch, other) = lab.host.within(|| {
        (watcher.watch("tap0", MAC, &[before]).unwrap(), watcher.watch("up0", [0x52, 0x54, 0, 0, 0, 9], &[]).unwrap())
    });
    assert_eq!(watch.addresses(), [before]);
    settle_guest(&lab);
    // It asks for the peer, from both of its addresses.
    for (from, to) in [("10.0.0.5:0", "10.0.0.9:9"), ("[fd00::5]:0", "[fd00::9]:9")] {
        lab.guest.within(|| UdpSocket::bind(from).unwrap().send_to(b"hello", to).unwrap());
    }
    let (v4, v6): (IpAddr, IpAddr) = ("10.0.0.5".parse().unwrap(), "fd00::5".parse().unwrap());
    wait("both addresses", &|| watch.addresses().contains(&v4) && watch.addresses().contains(&v6));
    // Now the peer says that it has one of them.
    let usurper = Nic { mac: [0x52, 0x54, 0, 0, 0, 8], addresses: vec![v4], interface: "peer0".into(), ..Nic::default() };
    announce(&lab.peer, &usurper);
    wait("the address to be forgotten", &|| !watch.addresses().contains(&v4));
    assert!(watch.addresses().contains(&v6) && watch.addresses().contains(&before), "{:?}", watch.addresses());
    assert_eq!(other.addresses(), Vec::<IpAddr>::new(), "the other port's card said nothing");
    lab.host.ip("link del tap0");
    thread::sleep(Duration::from_millis(50));
    assert!(watch.addresses().contains(&v6), "what was learned outlives the port until the guest is gone");
    let error = lab.host.within(|| watcher.watch("tap0", MAC, &[]).unwrap_err()).to_string();
    assert!(error.contains("tap0") && error.contains("no such interface"), "{error}");
}

#[test]
fn the_bridge_s_table_is_read() {
    let Some(lab) = Lab::new() else { return };
    lab.host.bridge(&format!("fdb add {OLD_WORDS} dev up0 master static"));
    announce(&lab.host, &nic());
    let (tap, up, bridge) = (lab.host.index("tap0"), lab.host.index("up0"), lab.host.index("br0"));
    let all = lab.host.within(stations).unwrap();
    let found = |mac: [u8; 6]| {
        let one = all.iter().find(|station| station.mac == mac).unwrap_or_else(|| panic!("{mac:?} is not in {all:?}"));
        (one.port as usize, one.bridge as usize, one.hold)
    };
    assert_eq!(found(MAC), (tap, bridge, Hold::Learned));
    assert_eq!(found([0x52, 0x54, 0, 0x99, 0x99, 0x99]), (up, bridge, Hold::Static));
    assert!(all.iter().any(|station| station.port as usize == up && station.hold == Hold::Own), "{all:?}");
}
