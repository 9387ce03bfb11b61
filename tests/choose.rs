//! Which link carries a guest: what `auto` finds, what is explicitly asked for, what is blocked or switched off, and the fall-back
//! from a link that fails before pages move. Links themselves are tested in `transport/link`, RDMA whole in `lab_links`.
#![allow(clippy::panic, clippy::unwrap_used, clippy::expect_used, missing_docs, unreachable_pub)]

use rig::host::PORT;
use rig::netns::Netns;
use rig::{AgentConfig, Context, GuestSpec, Host, Result, ensure, with_bare_lab, with_lab};
use serde_json::Value;
use std::io::{Read, Write};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

/// What the issue promises: within this time QUIC is given up where UDP is blocked.
const FALL_BACK_MAX: Duration = Duration::from_secs(3);

/// What the report says of a link that was looked at.
fn tried<'a>(report: &'a Value, link: &str) -> Result<&'a Value> {
    let list = report["links_tried"].as_array().with_context(|| format!("no links_tried: {report}"))?;
    list.iter().find(|one| one["link"] == link).with_context(|| format!("{link} is not in {list:?}"))
}

fn words<'a>(value: &'a Value, field: &str) -> Result<&'a str> {
    value[field].as_str().with_context(|| format!("no {field}: {value}"))
}

/// From now on, packets of this kind to the agent of `host` are thrown away there without a word.
fn block(host: &Host, protocol: &str) -> Result<()> {
    // Rules before the one for own addresses see what comes in.
    host.ip("rule add pref 10 lookup local")?;
    host.ip(&format!("rule add pref 5 ipproto {protocol} dport {PORT} blackhole"))?;
    host.ip("rule del pref 0 lookup local")?;
    Ok(())
}

fn unblock(host: &Host) -> Result<()> {
    host.ip("rule del pref 5")?;
    Ok(())
}

#[test]
fn auto_measures_both_and_says_which_it_took() {
    with_lab(AgentConfig::default().link("auto"), |lab| {
        let guest = GuestSpec::new("web", 1).dirty("10M", "16M");
        lab.guest(&guest)?;
        let report = lab.a.migrate_well("web", &lab.b, &[])?;
        let link = words(&report, "link")?;
        ensure!(["tcp", "quic"].contains(&link) && report["encrypted"] == true, "{report}");
        ensure!(words(&report, "link_reason")?.contains("in a short probe"), "{report}");
        for kind in ["tcp", "quic"] {
            let one = tried(&report, kind)?;
            for figure in ["round_trip_us", "probe_bytes_per_s"] {
                ensure!(one[figure].as_f64().is_some_and(|value| value > 0.0), "{kind} without {figure}: {one}");
            }
            let place = if kind == link { "taken: " } else { "in reserve: " };
            ensure!(words(one, "words")?.starts_with(place), "{one}");
        }
        ensure!(words(tried(&report, "rdma")?, "words")?.contains("trusted"), "{report}");
        ensure!(report["page_check"].is_null(), "an encrypted link needs no page check: {report}");
        lab.b.guest_verified("web", 1)?;
        lab.guest_is_on(&guest, &lab.b, &lab.a)
    });
}

#[test]
fn a_guest_goes_by_quic_and_comes_back() {
    with_lab(AgentConfig::default(), |lab| {
        let guest = GuestSpec::new("web", 1).dirty("20M", "32M").memory("192M", "96M");
        lab.guest(&guest)?;
        let before = lab.a.guest_verified("web", 1)?;
        for (turn, lanes) in ["1", "4"].into_iter().enumerate() {
            let (from, to) = if turn == 0 { (&lab.a, &lab.b) } else { (&lab.b, &lab.a) };
            // Plain text would be allowed to TCP; QUIC is encrypted whatever is allowed.
            let report = from.migrate_well("web", to, &["--link", "quic", "--lanes", lanes])?;
            ensure!(report["link"] == "quic" && report["encrypted"] == true, "{report}");
            ensure!(report["lanes"].as_u64() == lanes.parse().ok(), "{report}");
            ensure!(words(&report, "link_reason")?.contains("by name"), "{report}");
            lab.guest_is_on(&guest, to, from)?;
        }
        let after = lab.a.guest_verified("web", 1)?;
        ensure!(after.written > before.written, "it stopped writing");
        Ok(())
    });
}

#[test]
fn udp_is_blocked() {
    with_lab(AgentConfig::default().link("auto"), |lab| {
        let guest = GuestSpec::new("web", 1);
        lab.guest(&guest)?;
        block(&lab.b, "udp")?;
        let start = Instant::now();
        let report = lab.a.migrate_well("web", &lab.b, &[])?;
        let took = start.elapsed();
        let moving = report["total_ms"].as_f64().context("total_ms")?;
        let choosing = took.saturating_sub(Duration::from_secs_f64(moving / 1e3));
        ensure!(choosing < FALL_BACK_MAX, "choosing a link took {choosing:?}: {report}");
        ensure!(report["link"] == "tcp" && report["encrypted"] == true, "{report}");
        ensure!(words(&report, "link_reason")?.contains("quic is not to be had"), "{report}");
        ensure!(words(tried(&report, "quic")?, "words")?.contains("blocks UDP"), "{report}");
        lab.guest_is_on(&guest, &lab.b, &lab.a)?;
        lab.b.migrate_well("web", &lab.a, &["--link", "tcp"])?;
        lab.guest_is_on(&guest, &lab.a, &lab.b)?;

        // Asked for by name, it is that or nothing.
        let output = lab.a.migrate("web", &lab.b, &["--link", "quic"])?.expect_code(1)?;
        ensure!(output.all().contains("quic was asked for by name") && output.all().contains("blocks UDP"), "{output:?}");
        unblock(&lab.b)?;
        let report = lab.a.migrate_well("web", &lab.b, &["--link", "quic"])?;
        ensure!(report["link"] == "quic", "{report}");
        lab.guest_is_on(&guest, &lab.b, &lab.a)
    });
}

#[test]
fn tcp_is_blocked() {
    with_lab(AgentConfig::default().link("auto"), |lab| {
        let guest = GuestSpec::new("web", 1);
        lab.guest(&guest)?;
        block(&lab.b, "tcp")?;
        let report = lab.a.migrate_well("web", &lab.b, &[])?;
        ensure!(report["link"] == "quic", "{report}");
        ensure!(words(tried(&report, "tcp")?, "words")?.starts_with("not to be had"), "{report}");
        lab.guest_is_on(&guest, &lab.b, &lab.a)?;
        lab.b.guest_verified("web", 1).map(drop)
    });
}

#[test]
fn quic_is_switched_off_on_one_side() {
    with_bare_lab(|lab| {
        lab.start_agents_with(AgentConfig::default().link("auto"), AgentConfig::default().quic("enabled", false))?;
        let guest = GuestSpec::new("web", 1);
        lab.guest(&guest)?;
        let output = lab.a.migrate("web", &lab.b, &["--link", "quic"])?.expect_code(1)?;
        for word in ["link-unavailable", "the destination does not offer it", "quic.enabled"] {
            ensure!(output.all().contains(word), "{word:?} is not in {output:?}");
        }
        lab.guest_is_on(&guest, &lab.a, &lab.b)?;
        let report = lab.a.migrate_well("web", &lab.b, &[])?;
        ensure!(report["link"] == "tcp", "{report}");
        ensure!(words(tried(&report, "quic")?, "words")?.contains("quic.enabled"), "{report}");
        lab.guest_is_on(&guest, &lab.b, &lab.a)?;
        // And from the host that has none.
        let output = lab.b.migrate("web", &lab.a, &["--link", "quic"])?.expect_code(1)?;
        ensure!(output.all().contains("not on this host") && output.all().contains("quic.enabled"), "{output:?}");
        lab.b.migrate_well("web", &lab.a, &["--link", "auto"])?;
        lab.guest_is_on(&guest, &lab.a, &lab.b)
    });
}

#[test]
fn rdma_without_a_device_or_a_trusted_fabric() {
    with_bare_lab(|lab| {
        // The lab's hosts are namespaces: a device of this machine, if it has one, has none of their addresses.
        let trusting = AgentConfig::default().rdma("trusted_fabric", "[\"10.77.0.0/24\"]");
        lab.start_agents_with(trusting, AgentConfig::default())?;
        let guest = GuestSpec::new("web", 1);
        lab.guest(&guest)?;
        for more in [&[][..], &["--no-plaintext"]] {
            let output = lab.a.migrate("web", &lab.b, &[&["--link", "rdma"], more].concat())?.expect_code(1)?;
            for word in ["link-unavailable", "rdma was asked for by name", "not on this host"] {
                ensure!(output.all().contains(word), "{word:?} is not in {output:?}");
            }
        }
        lab.guest_is_on(&guest, &lab.a, &lab.b)?;
        // Nobody said at b that the fabric is trusted: whatever there is, it is not offered.
        let show = lab.b.ask(&["host", "show"])?;
        let rdma = show["links"].as_array().and_then(|links| links.iter().find(|one| one["link"] == "rdma"));
        let rdma = rdma.with_context(|| format!("{show}"))?;
        ensure!(rdma["available"] == false && words(rdma, "words")?.contains("trusted_fabric"), "{show}");
        lab.unharmed(&guest)
    });
}

#[test]
fn a_host_shows_its_links_and_a_plan_the_order() {
    with_lab(AgentConfig::default().link("auto"), |lab| {
        let guest = GuestSpec::new("web", 1);
        lab.guest(&guest)?;
        let show = lab.a.ask(&["host", "show"])?;
        ensure!(show["name"] == "a" && show["id"] == lab.a.id()?.as_str(), "{show}");
        let available = |link: &str| {
            let links = show["links"].as_array().into_iter().flatten();
            links.filter(|one| one["link"] == link).any(|one| one["available"] == true)
        };
        ensure!(available("tcp") && available("quic") && !available("rdma"), "{show}");
        let table = lab.a.limosa(&["host", "show"])?.expect_code(0)?;
        for word in ["tcp", "quic", "rdma", "no: ", "10.77.0.1:13560"] {
            ensure!(table.stdout.contains(word), "{word:?} is not in {table:?}");
        }
        let plan = lab.a.ask(&["migrate", "web", "--to", "b", "--print-plan"])?;
        ensure!(plan["links"].as_array().is_some_and(|links| links.len() == 2), "{plan}");
        ensure!(plan["links"][0] == plan["link"] && plan["link_wanted"] == "auto" && plan["encrypted"] == true, "{plan}");
        ensure!(words(tried(&plan, "rdma")?, "words")?.starts_with("not to be had"), "{plan}");
        let table = lab.a.limosa(&["migrate", "web", "--to", "b", "--print-plan", "--link", "quic"])?.expect_code(0)?;
        ensure!(table.stdout.contains("quic, ") && table.stdout.contains("--link quic"), "{table:?}");
        ensure!(lab.a.jobs()?.is_empty() && lab.b.jobs()?.is_empty(), "a plan or a question made a job");
        lab.guest_is_on(&guest, &lab.a, &lab.b)
    });
}

/// The destination as seen through a box in the middle: of TCP it lets the first `connections` through and closes all others; UDP
/// goes through slowly, so that TCP is the link to begin with.
struct Middlebox {
    stop: Arc<AtomicBool>,
    refused: Arc<AtomicUsize>,
    threads: Vec<JoinHandle<()>>,
}

impl Middlebox {
    fn start(netns: &Netns, to: SocketAddr, connections: usize) -> Result<Middlebox> {
        let (tcp, udp) = netns.within(|| Ok((TcpListener::bind(("0.0.0.0", PORT))?, UdpSocket::bind(("0.0.0.0", PORT))?)))?;
        let out = netns.within(|| Ok(UdpSocket::bind("0.0.0.0:0")?))?;
        let (stop, refused) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicUsize::new(0)));
        tcp.set_nonblocking(true)?;
        for socket in [&udp, &out] {
            socket.set_read_timeout(Some(Duration::from_millis(100)))?;
        }
        out.connect(to)?;
        let mut threads = Vec::new();
        let (ended, count, name) = (stop.clone(), refused.clone(), netns.name().to_owned());
        threads.push(std::thread::spawn(move || {
            let mut left = connections;
            while !ended.load(Ordering::Relaxed) {
                match tcp.accept() {
                    Ok((stream, _)) if left > 0 && rig::netns::enter(&name).is_ok() => {
                        left -= 1;
                        relay(stream, to);
                    }
                    Ok(_) => drop(count.fetch_add(1, Ordering::Relaxed)),
                    Err(_) => std::thread::sleep(Duration::from_millis(5)),
                }
            }
        }));
        // One source only, so one place to send answers to.
        let source = Arc::new(std::sync::Mutex::new(None::<SocketAddr>));
        let (ended, known, sockets) = (stop.clone(), source.clone(), (udp.try_clone()?, out.try_clone()?));
        threads.push(std::thread::spawn(move || {
            let mut bytes = vec![0; 65_536];
            for number in 0_u32.. {
                if ended.load(Ordering::Relaxed) {
                    return;
                }
                if let Ok((count, from)) = sockets.0.recv_from(&mut bytes) {
                    *known.lock().unwrap() = Some(from);
                    if number % 4 == 0 {
                        std::thread::sleep(Duration::from_micros(100));
                    }
                    let _ = sockets.1.send(&bytes[..count]);
                }
            }
        }));
        let ended = stop.clone();
        threads.push(std::thread::spawn(move || {
            let mut bytes = vec![0; 65_536];
            while !ended.load(Ordering::Relaxed) {
                let Ok(count) = out.recv(&mut bytes) else { continue };
                if let Some(to) = *source.lock().unwrap() {
                    let _ = udp.send_to(&bytes[..count], to);
                }
            }
        }));
        Ok(Middlebox { stop, refused, threads })
    }
}

impl Drop for Middlebox {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        self.threads.drain(..).for_each(|thread| drop(thread.join()));
    }
}

/// Carries bytes both ways until one side closes.
fn relay(stream: TcpStream, to: SocketAddr) {
    let Ok(other) = TcpStream::connect(to) else { return };
    let _ = stream.set_nonblocking(false);
    for (from, into) in [(stream.try_clone(), other.try_clone()), (Ok(other), Ok(stream))] {
        let (Ok(mut from), Ok(mut into)) = (from, into) else { return };
        std::thread::spawn(move || {
            let mut bytes = vec![0; 256 << 10];
            while let Ok(count @ 1..) = from.read(&mut bytes) {
                if into.write_all(&bytes[..count]).is_err() {
                    break;
                }
            }
            let _ = into.shutdown(Shutdown::Both);
            let _ = from.shutdown(Shutdown::Both);
        });
    }
}

#[test]
fn lanes_that_cannot_be_opened_are_opened_on_the_next_link() {
    with_lab(AgentConfig::default().link("auto"), |lab| {
        let guest = GuestSpec::new("web", 1).memory("64M", "16M");
        lab.guest(&guest)?;
        // Two TCP connections: the question which links there are, and the control channel of the first attempt.
        let middle = Middlebox::start(&lab.watch, lab.b.address(), 2)?;
        lab.a.limosa(&["host", "remove", "b"])?.expect_code(0)?;
        lab.a.trust_id("b", &lab.b.id()?, &format!("10.77.0.9:{PORT}"))?;
        let report = lab.a.migrate_well("web", &lab.b, &[])?;
        ensure!(middle.refused.load(Ordering::Relaxed) > 0, "no lane was refused: {report}");
        ensure!(report["link"] == "quic" && report["encrypted"] == true, "{report}");
        ensure!(words(&report, "link_reason")?.starts_with("tcp failed before the first round"), "{report}");
        ensure!(words(tried(&report, "tcp")?, "words")?.starts_with("failed before the first round"), "{report}");
        // It was another attempt to both hosts; one more for each time that b still had to clear the first one away.
        let job = lab.a.jobs()?.into_iter().next().context("a job")?;
        ensure!(job["generation"].as_u64() >= Some(2), "{job}");
        lab.guest_is_on(&guest, &lab.b, &lab.a)?;
        lab.b.guest_verified("web", 1)?;

        // A link that was asked for by name is not replaced.
        lab.b.migrate_well("web", &lab.a, &["--link", "tcp"])?;
        drop(middle);
        let middle = Middlebox::start(&lab.watch, lab.b.address(), 1)?;
        let output = lab.a.migrate("web", &lab.b, &["--link", "tcp"])?.expect_code(3)?;
        ensure!(middle.refused.load(Ordering::Relaxed) > 0, "no lane was refused: {output:?}");
        drop(middle);
        lab.a.limosa(&["host", "remove", "b"])?.expect_code(0)?;
        lab.a.trust(&lab.b)?;
        lab.unharmed(&guest)
    });
}
