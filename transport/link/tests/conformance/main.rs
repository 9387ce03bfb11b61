//! One suite for every kind of link: what it checks is promised by all of them alike. A new kind of link is a file that implements
//! [`subject::Subject`], and one line below. What only one kind can promise is tested beside it, not here.
//!
//! A check that means nothing for a link prints `not applicable: …` and why; one that this machine cannot run and the lab can, `skipped: …`.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::indexing_slicing)]
#![allow(unreachable_pub, missing_docs)]

#[path = "../../../../tests/rig/skip.rs"]
#[allow(dead_code, unreachable_pub, missing_docs)]
mod skip;
#[path = "../toy/mod.rs"]
mod toy;

mod raw;
mod subject;
mod wire;

mod door;
mod harm;
mod moving;
mod order;
mod secrecy;

mod datagrams;
mod direct;
mod keys;
mod pair;
mod quic;
#[cfg(feature = "rdma")]
mod rdma;
mod tcp;

/// Makes a module of tests, one for each check, of a kind of link.
macro_rules! conformance {
    ($name:ident: $subject:ty) => {
        conformance! { $name: $subject;
            moving: a_whole_migration, one_to_sixteen_lanes, zeros_cost_nothing, the_cap_holds_and_zeros_replace_data,
                progress_is_told, a_cancel_from_either_side, idle_channels_stay_open, a_source_that_vanishes;
            order: a_lane_keeps_its_order, a_round_never_overtakes, many_rounds_over_many_lanes, a_slow_receiver_is_waited_for,
                an_end_delivers_everything, what_was_queued_is_said;
            door: a_lane_must_show_what_was_agreed, a_lane_out_of_place, a_lane_of_another_host, too_many_lanes,
                frames_are_held_to_their_limits, a_lane_that_just_closes, keys_are_asked_for_once;
            harm: the_way_can_be_harmed, control_is_cut_at_any_byte, lanes_are_cut_at_any_byte, everything_is_cut_in_each_phase,
                everything_is_cut_in_mid_round, cut_at_the_commit_and_mended, cut_at_the_commit_for_too_long,
                cut_when_the_guest_runs_there, a_peer_that_falls_silent;
            secrecy: what_is_said_to_be_encrypted_is;
        }
    };
    ($name:ident: $subject:ty; $($area:ident: $($check:ident),+;)+) => {
        mod $name {
            $($(
                #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
                async fn $check() {
                    match <$subject as crate::subject::Subject>::missing() {
                        None => crate::$area::$check::<$subject>().await,
                        Some(reason) => crate::skip::skip_for_the_lab(&reason),
                    }
                }
            )+)+
        }
    };
}

conformance!(tcp_tls: crate::tcp::Tcp<false>);
conformance!(tcp_plaintext: crate::tcp::Tcp<true>);
conformance!(quic_streams: crate::quic::Quic);
conformance!(in_process: crate::pair::Pair);
conformance!(by_keys: crate::direct::Direct);
#[cfg(feature = "rdma")]
conformance!(rdma_pairs: crate::rdma::Rdma);
