//! Verbs on a real (or soft) device: both ends are in this process, connected through the device itself. They run in the
//! lab; where there is no device they say so. Unit tests hold what needs none.
#![forbid(unsafe_code)]
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::print_stdout)]

mod kit;

use kit::{BYTES, Device, LONG, Plan, SLOT, bytes_of, completions, knock, on_device, pattern, region, slot, status};
use limosa_verbs::{
    Access, ConnectError, Context, DeregisterError, GidKind, Handshake, Inventory, LinkLayer, Mapping, MemoryRegion, NoRdma,
    PairSettings, Payload, Piece, PortState, PostErrorKind, Receive, RegisterError, RemoteKey, Resolved, Send, Status, Verb,
    WaitError, Work, Write, counters,
};
use nix::fcntl::{FcntlArg, SealFlag, fcntl};
use nix::sys::memfd::{MFdFlags, memfd_create};
use std::os::fd::{AsFd as _, OwnedFd};
use std::process::Command;
use std::sync::Arc;
use std::time::Duration;

fn write<'a>(region: &'a Arc<MemoryRegion>, offset: u64, bytes: u32, to: RemoteKey, id: u64) -> Write<'a> {
    let payload = Payload::Region(Piece { region, offset, bytes });
    Write { payload, to, immediate: None, signalled: true, id }
}

fn send(payload: Payload<'_>, id: u64) -> Send<'_> {
    Send { payload, immediate: None, signalled: true, id }
}

fn memfd(bytes: u64) -> OwnedFd {
    let fd = memfd_create("limosa-test", MFdFlags::MFD_CLOEXEC | MFdFlags::MFD_ALLOW_SEALING).unwrap();
    nix::unistd::ftruncate(&fd, i64::try_from(bytes).unwrap()).unwrap();
    fcntl(&fd, FcntlArg::F_ADD_SEALS(SealFlag::F_SEAL_SHRINK)).unwrap();
    fd
}

#[test]
fn the_inventory_names_device_port_and_address() {
    on_device(async |device| {
        let inventory = Inventory::take();
        assert!(inventory.problems.is_empty(), "{:?}", inventory.problems);
        let named = inventory.devices.iter().find(|one| one.name == device.context.name()).unwrap();
        let port = named.ports.iter().find(|port| port.state == PortState::Active).unwrap();
        assert!(port.mtu_active >= 256 && port.mtu_max >= port.mtu_active, "{port:?}");
        let gid = port.gids.iter().find(|gid| gid.address() == device.address).unwrap();
        assert!(gid.interface.is_some(), "{gid:?}");
        assert_eq!((gid.kind, port.link_layer), (GidKind::RoceV2, LinkLayer::Ethernet));
        assert!(named.limits.regions_max > 0 && named.limits.work_requests_max > 0, "{named:?}");
        println!("{inventory:#?}");
    });
}

#[test]
fn a_chain_of_unsignalled_writes_between_memory_files_is_one_doorbell_and_one_completion() {
    on_device(async |device| {
        let mut ends = device.connect(&Plan::default(), 0).await;
        let (near, far) = (memfd(BYTES), memfd(BYTES));
        let text = pattern(BYTES as usize, 1);
        nix::sys::uio::pwrite(&near, &text, 0).unwrap();
        let (from, to) = (Mapping::of_file(near.as_fd(), 0, BYTES).unwrap(), Mapping::of_file(far.as_fd(), 0, BYTES).unwrap());
        let from = MemoryRegion::register(ends.source.domain(), &from, 0..BYTES, Access::default()).unwrap();
        let remote = Access { remote_write: true, ..Access::default() };
        let to = MemoryRegion::register(ends.destination.domain(), &to, 0..BYTES, remote).unwrap();
        let part = (BYTES / 16) as u32;
        // Each part goes to the place of its opposite.
        let writes: Vec<Write<'_>> = (0..16_u64)
            .map(|at| {
                let there = to.remote().at((15 - at) * u64::from(part));
                Write { signalled: at == 15, ..write(&from, at * u64::from(part), part, there, 100 + at) }
            })
            .collect();
        ends.source.post_writes(&writes).unwrap();
        let done = completions(&mut ends.source, 1).await;
        assert_eq!((done[0].id, done[0].verb, done[0].status), (115, Verb::Write, Status::Success));
        let posted = ends.source.posted();
        assert_eq!((posted.doorbells, posted.writes, posted.bytes), (1, 16, BYTES));
        assert_eq!(ends.source.room(), 256, "the completion ended those before it");
        let mut seen = vec![0; BYTES as usize];
        assert_eq!(nix::sys::uio::pread(&far, &mut seen, 0).unwrap(), seen.len());
        for (mine, theirs) in text.chunks(part as usize).zip(seen.chunks(part as usize).rev()) {
            assert!(mine == theirs, "a part did not arrive where it should");
        }
    });
}

#[test]
fn immediate_data_comes_after_the_write_that_carries_it() {
    on_device(async |device| {
        let mut ends = device.connect(&Plan::default(), 2).await;
        let text = pattern(5000, 2);
        ends.from.mapping().write_at(0, &text).unwrap();
        let writes = [
            Write { signalled: false, ..write(&ends.from, 0, 2500, ends.to.remote(), 1) },
            Write { immediate: Some(0xabcd_0001), ..write(&ends.from, 2500, 2500, ends.to.remote().at(2500), 2) },
        ];
        ends.source.post_writes(&writes).unwrap();
        let arrived = completions(&mut ends.destination, 1).await[0];
        assert_eq!((arrived.verb, arrived.immediate, arrived.bytes), (Verb::Receive, Some(0xabcd_0001), 2500));
        assert_eq!(bytes_of(&ends.to, 0, 5000), text);
        assert_eq!(completions(&mut ends.source, 1).await[0].verb, Verb::WriteImmediate);
    });
}

#[test]
fn a_mixed_list_arrives_in_order_with_one_doorbell() {
    on_device(async |device| {
        let mut ends = device.connect(&Plan::default(), 4).await;
        ends.from.mapping().write_at(0, &pattern(4096, 3)).unwrap();
        let far = ends.to.remote();
        let works = [
            Work::Write(Write { signalled: false, ..write(&ends.from, 0, 4096, far, 1) }),
            Work::Send(Send { signalled: false, ..send(Payload::Inline(b"head one"), 2) }),
            Work::Write(Write { payload: Payload::Inline(b"few bytes"), ..write(&ends.from, 0, 0, far.at(8192), 3) }),
            Work::Send(Send { immediate: Some(9), ..send(Payload::Nothing, 4) }),
        ];
        ends.source.post(&works).unwrap();
        let arrived = completions(&mut ends.destination, 2).await;
        assert_eq!((arrived[0].bytes, arrived[0].immediate), (8, None));
        assert_eq!((arrived[1].bytes, arrived[1].immediate), (0, Some(9)));
        assert_eq!(bytes_of(&ends.inbox, 0, 8), b"head one");
        assert_eq!(bytes_of(&ends.to, 0, 4096), pattern(4096, 3));
        assert_eq!(bytes_of(&ends.to, 8192, 9), b"few bytes");
        let done: Vec<u64> = completions(&mut ends.source, 2).await.iter().map(|one| one.id).collect();
        assert_eq!(done, [3, 4]);
        assert_eq!(ends.source.posted().doorbells, 1);
    });
}

#[test]
fn messages_go_both_ways() {
    on_device(async |device| {
        let mut ends = device.connect(&Plan::default(), 2).await;
        let near = region(ends.source.domain(), Access { local_write: true, ..Access::default() });
        ends.source.post_receives(&[slot(&near, 7)]).unwrap();
        ends.from.mapping().write_at(64, b"there").unwrap();
        ends.source.post_send(&send(Payload::Region(Piece { region: &ends.from, offset: 64, bytes: 5 }), 1)).unwrap();
        assert_eq!(completions(&mut ends.destination, 1).await[0].bytes, 5);
        assert_eq!(bytes_of(&ends.inbox, 0, 5), b"there");
        ends.destination.post_send(&send(Payload::Inline(b"and back"), 2)).unwrap();
        let both = completions(&mut ends.source, 2).await;
        let back = both.iter().find(|one| one.verb == Verb::Receive).unwrap();
        assert_eq!((back.id, back.bytes), (7, 8));
        assert_eq!(bytes_of(&near, 7 * u64::from(SLOT), 8), b"and back");
    });
}

/// Writes with a key that must not work, and holds that the destination's memory did not change.
async fn denied(device: &Device, plan: &Plan, spoil: impl FnOnce(&mut kit::Ends) -> RemoteKey) -> Status {
    let mut ends = device.connect(plan, 0).await;
    let to = spoil(&mut ends);
    ends.from.mapping().write_at(0, &[0xee; 4096]).unwrap();
    ends.source.post_writes(&[write(&ends.from, 0, 4096, to, 1)]).unwrap();
    let status = status(&mut ends.source).await;
    assert!(bytes_of(ends.to.as_ref(), 0, BYTES as usize).iter().all(|byte| *byte == 0), "bytes arrived");
    status
}

#[test]
fn a_write_outside_of_the_region_is_denied() {
    on_device(async |device| {
        let end = denied(device, &Plan::default(), |ends| ends.to.remote().at(BYTES - 4095)).await;
        assert_eq!(end, Status::RemoteAccess);
        let before = denied(device, &Plan::default(), |ends| ends.to.remote().at(0_u64.wrapping_sub(4096))).await;
        assert_eq!(before, Status::RemoteAccess);
    });
}

#[test]
fn a_key_that_was_never_given_is_denied() {
    on_device(async |device| {
        let wrong = |ends: &mut kit::Ends| RemoteKey { rkey: ends.to.remote().rkey ^ 0x1, ..ends.to.remote() };
        assert_eq!(denied(device, &Plan::default(), wrong).await, Status::RemoteAccess);
    });
}

#[test]
fn a_write_to_memory_that_is_not_for_the_peer_is_denied() {
    on_device(async |device| {
        assert_eq!(denied(device, &Plan::default(), |ends| ends.inbox.remote()).await, Status::RemoteAccess);
        let closed = Plan { destination: PairSettings::default(), ..Plan::default() };
        let status = denied(device, &closed, |ends| ends.to.remote()).await;
        assert!(matches!(status, Status::RemoteInvalidRequest | Status::RemoteAccess), "{status:?}");
    });
}

#[test]
fn a_write_after_deregistration_is_denied_and_the_next_connection_works() {
    on_device(async |device| {
        let mut ends = device.connect(&Plan::default(), 0).await;
        let mapping = Mapping::anonymous(BYTES).unwrap();
        let remote = Access { remote_write: true, ..Access::default() };
        let gone = MemoryRegion::register(ends.destination.domain(), &mapping, 0..BYTES, remote).unwrap();
        let key = gone.remote();
        ends.from.mapping().write_at(0, b"once").unwrap();
        ends.source.post_writes(&[write(&ends.from, 0, 4, key, 1)]).unwrap();
        assert_eq!(status(&mut ends.source).await, Status::Success);
        MemoryRegion::deregister(gone).unwrap();
        ends.from.mapping().write_at(0, b"more").unwrap();
        ends.source.post_writes(&[write(&ends.from, 0, 4, key, 2)]).unwrap();
        assert_eq!(status(&mut ends.source).await, Status::RemoteAccess);
        let mut seen = [0; 4];
        mapping.read_at(0, &mut seen).unwrap();
        assert_eq!(&seen, b"once");
        drop(ends);
        let mut ends = device.connect(&Plan::default(), 0).await;
        ends.source.post_writes(&[write(&ends.from, 0, 4, ends.to.remote(), 1)]).unwrap();
        assert_eq!(status(&mut ends.source).await, Status::Success);
    });
}

/// What a destination relies on that closes memory by letting no queue pair live in its domain.
#[test]
fn a_key_is_good_for_queue_pairs_of_its_own_domain_and_each_holds_it() {
    on_device(async |device| {
        let ends = device.connect(&Plan::default(), 0).await;
        let mut other = device.connect(&Plan::default(), 0).await;
        other.from.mapping().write_at(0, b"from elsewhere").unwrap();
        other.source.post_writes(&[write(&other.from, 0, 4, ends.to.remote(), 1)]).unwrap();
        assert_eq!(status(&mut other.source).await, Status::RemoteAccess);
        let mut seen = [1; 4];
        ends.to.mapping().read_at(0, &mut seen).unwrap();
        assert_eq!(seen, [0; 4]);
        let domain = Arc::clone(ends.destination.domain());
        let kit::Ends { destination, to, inbox, .. } = ends;
        assert!(Arc::strong_count(&domain) > 3, "the queue pair does not hold its domain");
        drop(destination);
        // This handle, and the two regions.
        assert_eq!(Arc::strong_count(&domain), 3);
        drop((to, inbox));
        assert_eq!(Arc::strong_count(&domain), 1);
    });
}

#[test]
fn an_error_in_the_middle_of_a_list_flushes_the_rest_and_names_the_first() {
    on_device(async |device| {
        let mut ends = device.connect(&Plan::default(), 0).await;
        let key = |at: u64| if at == 3 { ends.to.remote().at(BYTES) } else { ends.to.remote() };
        // Unsignalled ones too: a failure is always told.
        let writes: Vec<Write<'_>> =
            (0..8).map(|at| Write { signalled: at < 3, ..write(&ends.from, 0, 64, key(at), at) }).collect();
        ends.source.post_writes(&writes).unwrap();
        let all = completions(&mut ends.source, 8).await;
        let statuses: Vec<Status> = all.iter().map(|one| one.status).collect();
        assert_eq!(all.iter().map(|one| one.id).collect::<Vec<_>>(), (0..8).collect::<Vec<_>>());
        assert_eq!(statuses[..4], [Status::Success, Status::Success, Status::Success, Status::RemoteAccess]);
        assert!(statuses[4..].iter().all(|status| *status == Status::Flushed), "{statuses:?}");
    });
}

#[test]
fn a_message_for_which_nothing_was_posted_is_a_named_error() {
    on_device(async |device| {
        let destination = PairSettings { minimal_rnr_timer: 1, ..PairSettings::default() };
        let connect = Handshake { rnr_retry_count: 1, ..Handshake::default() };
        let mut ends = device.connect(&Plan { destination, connect, ..Plan::default() }, 0).await;
        ends.source.post_send(&send(Payload::Inline(b"anybody?"), 1)).unwrap();
        let completion = completions(&mut ends.source, 1).await[0];
        assert_eq!(completion.status, Status::ReceiverNotReady);
        let words = completion.ok().unwrap_err().to_string();
        assert!(words.contains("send") && words.contains("RNR"), "{words}");
    });
}

#[test]
fn a_peer_that_went_silent_is_a_named_error() {
    on_device(async |device| {
        let connect = Handshake { retry_count: 1, ack_timeout: Some(14), ..Handshake::default() };
        let mut ends = device.connect(&Plan { connect, ..Plan::default() }, 0).await;
        // In the error state a queue pair answers nothing.
        ends.destination.closer().close();
        ends.source.post_writes(&[write(&ends.from, 0, 64, ends.to.remote(), 1)]).unwrap();
        assert_eq!(status(&mut ends.source).await, Status::RetryExceeded);
    });
}

#[test]
fn an_event_wakes_a_future_and_a_thread() {
    on_device(async |device| {
        let mut ends = device.connect(&Plan::default(), 2).await;
        // Nothing is there: both waits sleep until their time is over.
        let soon = Duration::from_millis(20);
        assert!(matches!(ends.destination.completions(soon).await, Err(WaitError::TimedOut(_))));
        let mut destination = ends.destination;
        let waiting = tokio::spawn(async move {
            let bytes = destination.completions(LONG).await.unwrap()[0].bytes;
            (destination, bytes)
        });
        tokio::time::sleep(soon).await;
        ends.source.post_send(&send(Payload::Inline(b"wake up"), 1)).unwrap();
        let (mut destination, bytes) = waiting.await.unwrap();
        assert_eq!(bytes, 7);
        // Likewise on a thread: first nothing comes, then something.
        let slept = tokio::task::spawn_blocking(move || {
            assert!(matches!(destination.wait(soon), Err(WaitError::TimedOut(_))));
            destination
        });
        let mut destination = slept.await.unwrap();
        let waiting = tokio::task::spawn_blocking(move || destination.wait(LONG).unwrap()[0].bytes);
        tokio::time::sleep(soon).await;
        ends.source.post_send(&send(Payload::Inline(b"you too"), 2)).unwrap();
        assert_eq!(waiting.await.unwrap(), 7);
    });
}

#[test]
fn work_requests_that_nobody_asks_for_make_room_by_themselves() {
    on_device(async |device| {
        let source = PairSettings { send_depth: 8, ..PairSettings::default() };
        let mut ends = device.connect(&Plan { source, ..Plan::default() }, 0).await;
        let quiet = Write { signalled: false, ..write(&ends.from, 0, 64, ends.to.remote(), 1) };
        for _ in 0..50 {
            while ends.source.room() == 0 {
                assert!(ends.source.wait(LONG).unwrap().is_empty(), "nobody asked");
            }
            ends.source.post_writes(&[quiet]).unwrap();
        }
        assert_eq!(ends.source.posted().writes, 50);
    });
}

#[test]
fn a_closer_ends_waits_and_flushes_what_is_under_way() {
    on_device(async |device| {
        let mut ends = device.connect(&Plan::default(), 1).await;
        let closer = ends.destination.closer();
        let mut destination = ends.destination;
        let waiting = tokio::task::spawn_blocking(move || {
            // The receive that was posted may be told to be flushed, before the end is.
            loop {
                match destination.wait(LONG) {
                    Ok(all) => assert!(all.iter().all(|one| one.status == Status::Flushed), "{all:?}"),
                    Err(error) => return error,
                }
            }
        });
        tokio::time::sleep(Duration::from_millis(50)).await;
        closer.close();
        assert!(matches!(waiting.await.unwrap(), WaitError::Closed));
        // Of a queue pair that is gone it asks nothing.
        closer.close();
        ends.source.closer().close();
        assert!(matches!(ends.source.completions(LONG).await, Err(WaitError::Closed)));
    });
}

#[test]
fn the_end_of_the_connection_is_seen_after_what_came_before_it() {
    on_device(async |device| {
        for blocking in [false, true] {
            let mut ends = device.connect(&Plan::default(), 2).await;
            ends.source.post_send(&send(Payload::Inline(b"the last words"), 1)).unwrap();
            assert_eq!(status(&mut ends.source).await, Status::Success);
            drop(ends.source);
            let mut destination = ends.destination;
            if blocking {
                let (bytes, end) = tokio::task::spawn_blocking(move || {
                    let bytes = destination.wait(LONG).unwrap()[0].bytes;
                    (bytes, destination.wait(LONG).unwrap_err())
                })
                .await
                .unwrap();
                assert!(bytes == 14 && matches!(end, WaitError::Disconnected), "{bytes}: {end}");
            } else {
                assert_eq!(destination.completions(LONG).await.unwrap()[0].bytes, 14);
                assert!(matches!(destination.completions(LONG).await, Err(WaitError::Disconnected)));
            }
        }
    });
}

#[test]
fn both_sides_hear_what_the_other_says_while_connecting() {
    on_device(async |device| {
        let mut listener = device.listener();
        let handshake = Handshake { private_data: vec![7; limosa_verbs::PRIVATE_DATA_CONNECT_MAX], ..Handshake::default() };
        let (request, connecting) = knock(device, &mut listener, handshake.clone()).await;
        assert_eq!(request.private_data(), &handshake.private_data[..]);
        assert_eq!((request.peer().ip(), request.device()), (device.address, device.context.name()));
        let accept = Handshake { private_data: vec![8; limosa_verbs::PRIVATE_DATA_ACCEPT_MAX], ..Handshake::default() };
        let prepared = request.prepare(&device.domain(), &PairSettings::default()).unwrap();
        let destination = prepared.establish(&accept, LONG).await.unwrap();
        let source = connecting.await.unwrap().unwrap();
        assert_eq!(source.peer_data(), &accept.private_data[..]);
        assert!(source.path_mtu() >= 256 && source.path_mtu() == destination.path_mtu(), "{}", source.path_mtu());
        assert_eq!(source.gid().unwrap().kind, GidKind::RoceV2);
        assert_ne!(source.number(), destination.number());
    });
}

#[test]
fn a_refused_peer_costs_nothing_and_hears_why() {
    on_device(async |device| {
        let mut listener = device.listener();
        let (request, connecting) = knock(device, &mut listener, Handshake::default()).await;
        let before = counters::made();
        request.reject(b"not on the allow-list");
        let error = connecting.await.unwrap().unwrap_err();
        let ConnectError::Rejected { private_data, .. } = &error else { panic!("{error}") };
        assert_eq!(private_data, b"not on the allow-list");
        // Not even words: a request that is dropped.
        let (request, connecting) = knock(device, &mut listener, Handshake::default()).await;
        assert_eq!(counters::made().regions, before.regions);
        drop(request);
        let error = connecting.await.unwrap().unwrap_err();
        assert!(matches!(error, ConnectError::Rejected { .. } | ConnectError::Refused { .. }), "{error}");
        // What was made since is the second source's own: one domain, one queue pair, one queue; nothing for a destination.
        let after = counters::made();
        let more = (after.domains - before.domains, after.pairs - before.pairs, after.queues - before.queues);
        assert_eq!((more, after.regions), ((1, 1, 1), before.regions));
    });
}

#[test]
fn nobody_listening_and_no_way_have_their_words() {
    on_device(async |device| {
        let listener = device.listener();
        let to = listener.address();
        drop(listener);
        let resolved = Resolved::resolve(to, Some(device.address), LONG).await.unwrap();
        let prepared = resolved.prepare(&device.domain(), &PairSettings::default()).unwrap();
        let error = prepared.establish(&Handshake::default(), LONG).await.unwrap_err();
        assert!(matches!(error, ConnectError::NobodyListens(_)), "{error}");
        let short = Duration::from_secs(3);
        let error = Resolved::resolve("192.0.2.1:13560".parse().unwrap(), None, short).await.unwrap_err();
        let known =
            matches!(error, ConnectError::NoDeviceFor { .. } | ConnectError::Unreachable { .. } | ConnectError::TimedOut { .. });
        assert!(known && error.to_string().contains("192.0.2.1:13560"), "{error}");
    });
}

#[test]
fn a_listener_on_no_address_hears_all_devices_and_its_port_is_taken() {
    on_device(async |device| {
        let mut all = limosa_verbs::Listener::bind("0.0.0.0:0".parse().unwrap(), 8).unwrap();
        let port = all.address().port();
        assert_ne!(port, 0);
        let error = limosa_verbs::Listener::bind(format!("0.0.0.0:{port}").parse().unwrap(), 8).unwrap_err().to_string();
        assert!(error.contains(&port.to_string()) && error.contains("port in use"), "{error}");
        let resolved = Resolved::resolve(format!("{}:{port}", device.address).parse().unwrap(), None, LONG).await.unwrap();
        let prepared = resolved.prepare(&device.domain(), &PairSettings::default()).unwrap();
        let connecting = tokio::spawn(kit::establish(prepared, Handshake::default()));
        assert_eq!(all.next().await.unwrap().peer().ip(), device.address);
        assert!(connecting.await.unwrap().is_err());
    });
}

#[test]
fn wrong_requests_are_refused_before_the_device_sees_them() {
    on_device(async |device| {
        let source = PairSettings { send_depth: 4, receive_depth: 2, ..PairSettings::default() };
        let mut ends = device.connect(&Plan { source, ..Plan::default() }, 0).await;
        let far = ends.to.remote();
        let good = write(&ends.from, 0, 64, far, 1);
        let outside = write(&ends.from, BYTES - 63, 64, far, 2);
        let error = ends.source.post_writes(&[good, outside]).unwrap_err();
        assert!(matches!(error.kind, PostErrorKind::OutOfBounds(_)) && error.index == 1 && error.posted == 0, "{error}");
        let error = ends.source.post_writes(&[good; 5]).unwrap_err();
        assert!(matches!(error.kind, PostErrorKind::Full { room: 4 }), "{error}");
        let error = ends.source.post_writes(&[write(&ends.to, 0, 64, far, 1)]).unwrap_err();
        assert!(matches!(error.kind, PostErrorKind::ForeignRegion), "{error}");
        let long = vec![0; ends.source.inline_max() as usize + 1];
        let error = ends.source.post_send(&send(Payload::Inline(&long), 1)).unwrap_err();
        assert!(matches!(error.kind, PostErrorKind::InlineTooLong { .. }), "{error}");
        let error = ends.source.post_receives(&[slot(&ends.from, 0)]).unwrap_err();
        assert!(matches!(error.kind, PostErrorKind::NotWritable), "{error}");
        let error = ends.source.post_receives(&[Receive { into: None, id: 0 }; 3]).unwrap_err();
        assert!(matches!(error.kind, PostErrorKind::Full { room: 2 }), "{error}");
        assert_eq!(ends.source.posted(), limosa_verbs::Posted::default());
        ends.source.post_writes(&[good; 4]).unwrap();
        assert_eq!(completions(&mut ends.source, 4).await.len(), 4);
    });
}

#[test]
fn a_region_is_held_by_requests_under_way_and_by_nothing_else() {
    on_device(async |device| {
        let ends = device.connect(&Plan::default(), 1).await;
        let kit::Ends { source, destination, inbox, to, .. } = ends;
        let error = MemoryRegion::deregister(Arc::clone(&inbox)).unwrap_err();
        assert!(matches!(error, DeregisterError::InUse(2)), "{error}");
        // The peer's key of this one is out, which holds nothing.
        MemoryRegion::deregister(to).unwrap();
        drop((source, destination));
        MemoryRegion::deregister(inbox).unwrap();
        assert_eq!(counters::alive().pairs, 0);
    });
}

#[test]
fn what_a_device_cannot_do_is_refused_in_words() {
    on_device(async |device| {
        let domain = device.domain();
        let mapping = Mapping::anonymous(4096).unwrap();
        if !device.context.on_demand().reliable {
            let paged = Access { on_demand: true, ..Access::default() };
            let error = MemoryRegion::register(&domain, &mapping, 0..4096, paged).unwrap_err();
            assert!(matches!(error, RegisterError::OnDemandUnsupported(_)), "{error}");
        }
        let loose = Access { relaxed_ordering: true, ..Access::default() };
        MemoryRegion::register(&domain, &mapping, 0..4096, loose).unwrap();
        let error = MemoryRegion::register(&domain, &mapping, 4000..4097, Access::default()).unwrap_err();
        assert!(matches!(error, RegisterError::OutOfBounds(_)), "{error}");
        let listener = device.listener();
        let resolved = Resolved::resolve(listener.address(), None, LONG).await.unwrap();
        let deep = PairSettings { send_depth: u32::MAX, ..PairSettings::default() };
        let error = resolved.prepare(&domain, &deep).unwrap_err().to_string();
        assert!(error.contains("send depth") && error.contains(device.context.name()), "{error}");
        let error = Context::open("no-such-device").unwrap_err().to_string();
        assert!(error.contains(device.context.name()), "{error}");
    });
}

/// Runs one of this file's tests again, under a wrapper, and gives what it printed.
fn again(test: &str, wrapper: &[&str]) -> (bool, String) {
    let (program, arguments) = wrapper.split_first().unwrap();
    let me = std::env::current_exe().unwrap();
    let mut command = Command::new(program);
    let output = command.args(arguments).arg(me).args(["--exact", test, "--nocapture"]).env(INNER, "1").output().unwrap();
    let text = format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    (output.status.success(), text)
}

const INNER: &str = "LIMOSA_VERBS_TEST_INNER";

fn is_inner() -> bool {
    std::env::var_os(INNER).is_some()
}

#[test]
fn too_little_lockable_memory_is_said_with_the_line_to_set() {
    if is_inner() {
        return on_device(async |device| {
            let mapping = Mapping::anonymous(16 << 20).unwrap();
            let error = MemoryRegion::register(&device.domain(), &mapping, 0..16 << 20, Access::default()).unwrap_err();
            assert!(matches!(error, RegisterError::MemlockTooLow { limit: 1_048_576, needed: 16_777_216, .. }), "{error}");
            println!("refused: {error}");
        });
    }
    on_device(async |_| {});
    let Ok(context) = Context::open_all() else { return };
    drop(context);
    let wrapper = ["prlimit", "--memlock=1048576", "setpriv", "--bounding-set=-ipc_lock", "--inh-caps=-ipc_lock"];
    let (passed, printed) = again("too_little_lockable_memory_is_said_with_the_line_to_set", &wrapper);
    assert!(passed && printed.contains("refused: ") && printed.contains("LimitMEMLOCK"), "{printed}");
}

#[test]
fn missing_rights_are_said_with_the_file() {
    if is_inner() {
        let error = Context::open_all().unwrap_err();
        assert!(matches!(error, NoRdma::NotPermitted { .. }), "{error}");
        println!("refused: {error}");
        let error = limosa_verbs::Listener::bind("0.0.0.0:0".parse().unwrap(), 8).unwrap_err();
        println!("refused: {error}");
        return;
    }
    on_device(async |device| {
        use std::os::unix::fs::PermissionsExt as _;
        struct Restore(std::path::PathBuf, u32);
        impl Drop for Restore {
            fn drop(&mut self) {
                let _ = std::fs::set_permissions(&self.0, std::fs::Permissions::from_mode(self.1));
            }
        }
        let files = std::fs::read_dir("/dev/infiniband").unwrap().map(|entry| entry.unwrap().path());
        let files: Vec<_> = files.filter(|path| path.metadata().unwrap().permissions().mode() & 0o6 != 0).collect();
        let restore: Vec<Restore> =
            files.iter().map(|path| Restore(path.clone(), path.metadata().unwrap().permissions().mode())).collect();
        for path in &files {
            std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o600)).unwrap();
        }
        let (passed, printed) = again("missing_rights_are_said_with_the_file", &["setpriv", "--reuid=65534", "--clear-groups"]);
        drop(restore);
        assert!(passed && printed.contains("may not open /dev/infiniband/uverbs"), "{printed}");
        assert!(printed.contains("may not open /dev/infiniband/rdma_cm"), "{printed}");
        assert!(Context::open(device.context.name()).is_ok());
    });
}
