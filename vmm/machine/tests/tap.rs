//! Opening TAPs: what is in the way is said in words and leaves nothing, and a VLAN makes an access port. Needs root.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, missing_docs, unreachable_pub)]

use limosa_machine::Tap;
use nix::sched::{CloneFlags, unshare};
use std::os::fd::AsFd as _;
use std::process::Command;

#[allow(unreachable_pub, dead_code)]
#[path = "../../../tests/rig/skip.rs"]
mod skip;

/// Runs `work` on a thread in a network namespace of its own.
fn apart(work: impl FnOnce() + Send) {
    if !nix::unistd::geteuid().is_root() {
        return skip::skip("network namespaces need root");
    }
    std::thread::scope(|scope| {
        let thread = scope.spawn(|| {
            // With a view of /sys that is this namespace's.
            unshare(CloneFlags::CLONE_NEWNET | CloneFlags::CLONE_NEWNS).unwrap();
            assert!(run("mount --make-rslave /") && run("mount -t sysfs none /sys"));
            work();
        });
        thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic));
    });
}

fn run(words: &str) -> bool {
    let mut words = words.split(' ');
    Command::new(words.next().unwrap()).args(words).output().is_ok_and(|output| output.status.success())
}

#[test]
fn what_is_in_the_way_is_said_with_the_names_that_are_there() {
    apart(|| {
        let _held = Tap::open("tap0", None, None, 1500).unwrap();
        let busy = Tap::open("tap0", None, None, 1500).unwrap_err().to_string();
        assert!(busy.contains("tap0") && busy.contains("another process has it open"), "{busy}");
        assert!(run("ip link add br0 type bridge") && run("ip link add br1 type bridge"));
        let other = Tap::open("br0", None, None, 1500).unwrap_err().to_string();
        assert!(other.contains("is no TAP"), "{other}");
        let missing = Tap::open("tap1", Some("br9"), None, 1500).unwrap_err().to_string();
        assert_eq!(missing, "TAP tap1: there is no bridge br9 on this host; bridges here: br0, br1");
        assert!(!run("ip link show tap1"), "a TAP is left");
        let plain = Tap::open("tap1", Some("br0"), Some(7), 1500).unwrap_err().to_string();
        assert!(plain.contains("VLAN 7") && plain.contains("br0 does not filter VLANs"), "{plain}");
        assert!(!run("ip link show tap1"), "a TAP is left");
    });
}

/// Who sent the frames that wait in the TAP.
fn senders(tap: &Tap) -> Vec<[u8; 6]> {
    let (mut found, mut frame) = (Vec::new(), [0; 4096]);
    while let Ok(bytes) = nix::unistd::read(tap.as_fd(), &mut frame) {
        // Behind the header of virtio-net and the receiver.
        found.extend(frame[..bytes].get(18..24).and_then(|sender| <[u8; 6]>::try_from(sender).ok()));
    }
    found
}

#[test]
fn frames_of_one_that_is_passed_over_do_not_come() {
    apart(|| {
        let tap = |name| Tap::open(name, Some("br0"), None, 1500).unwrap();
        assert!(run("ip link add br0 type bridge") && run("ip link set br0 up"));
        assert!(run("ip link add v0 type veth peer name v1") && run("ip link set v1 master br0 up"));
        let (deaf, open) = (tap("tap0"), tap("tap1"));
        deaf.pass_over([2, 0, 0, 0, 0, 1]);
        assert!(run("ip addr add 10.9.0.1/24 dev v0"));
        for last in [1, 2] {
            assert!(run(&format!("ip link set v0 down address 02:00:00:00:00:0{last}")) && run("ip link set v0 up"));
            // Nobody answers, but it is asked for.
            run("ping -c 1 -W 1 10.9.0.2");
        }
        let (heard, all) = (senders(&deaf), senders(&open));
        for last in [1, 2] {
            assert!(all.contains(&[2, 0, 0, 0, 0, last]), "{all:x?}");
            assert_eq!(heard.contains(&[2, 0, 0, 0, 0, last]), last == 2, "{heard:x?}");
        }
    });
}

#[test]
fn a_tap_in_a_vlan_is_an_access_port_of_it_and_of_nothing_else() {
    apart(|| {
        if !run("ip link add br0 type bridge vlan_filtering 1") {
            return skip::skip_for_the_lab("this kernel has no bridge with vlan_filtering (CONFIG_BRIDGE_VLAN_FILTERING)");
        }
        let _tap = Tap::open("tap0", Some("br0"), Some(7), 1500).unwrap();
        let _untagged = Tap::open("tap1", Some("br0"), None, 1500).unwrap();
        let of = |device: &str| {
            let output = Command::new("bridge").args(["-j", "vlan", "show", "dev", device]).output().unwrap();
            String::from_utf8(output.stdout).unwrap().replace(char::is_whitespace, "")
        };
        assert!(of("tap0").contains(r#""vlans":[{"vlan":7,"flags":["PVID","EgressUntagged"]}]"#), "{}", of("tap0"));
        assert!(of("tap1").contains(r#""vlans":[{"vlan":1,"#), "{}", of("tap1"));
        assert!(of("br0").contains(r#"{"vlan":7}"#), "{}", of("br0"));
        // The bridge's own VLAN stays as it is.
        let _own = Tap::open("tap2", Some("br0"), Some(1), 1500).unwrap();
        assert!(of("br0").contains(r#"{"vlan":1,"flags":["PVID","EgressUntagged"]}"#), "{}", of("br0"));
    });
}
