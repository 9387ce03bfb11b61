//! Settings of the QUIC link, and what quinn is told because of them. No socket and no connection is made here.

use quinn::congestion::{BbrConfig, CubicConfig, NewRenoConfig};
use quinn::{AckFrequencyConfig, EndpointConfig, IdleTimeout, MtuDiscoveryConfig, TransportConfig, VarInt};
use std::net::IpAddr;
use std::sync::Arc;
use std::time::Duration;

/// Smallest UDP payload that every QUIC path carries (RFC 9000, 14).
pub(super) const MTU_MIN: u16 = 1200;
/// Largest UDP payload that is ever sent or accepted. quinn encodes some lengths in 14 bits: 16 KiB and more panic.
pub(super) const MTU_MAX: u16 = 16_000;
/// What one destination sends before it has heard of the path. The QUIC default of 333 ms would leave one repetition within
/// the time in which a fall-back to TCP has to be decided.
const RTT_FIRST: Duration = Duration::from_millis(100);
/// The longest that a destination holds an acknowledgement back. With the 25 ms that are usual, a source whose window is still
/// smaller than the packets of one acknowledgement would begin at 2 MB/s.
const ACK_DELAY_MAX: Duration = Duration::from_millis(1);
/// What the source's own receive side needs: control messages and lane answers.
const SOURCE_WINDOW_BYTES: u32 = 4 << 20;
/// What the destination may have under way: control messages.
const DESTINATION_SEND_BYTES: u64 = 4 << 20;
/// The least that a source may have under way, whatever the round trip.
const SEND_BYTES_MIN: u64 = 8 << 20;
/// The most, so that a long path does not become gigabytes.
const SEND_BYTES_MAX: u64 = 128 << 20;
/// Bytes that may be under way before anything was acknowledged.
const FIRST_WINDOW_BYTES_MIN: u64 = 64 << 10;
/// The speed for which the send window is sized: 20 Gbit/s on one connection.
const SEND_BYTES_PER_S: u64 = 2_500_000_000;

/// Who decides how much may be under way.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Congestion {
    /// RFC 9438: what TCP has by default on most hosts.
    #[default]
    Cubic,
    /// Bottleneck bandwidth and round trip; experimental in quinn.
    Bbr,
    /// RFC 9002's own.
    NewReno,
}

impl std::str::FromStr for Congestion {
    type Err = String;
    fn from_str(text: &str) -> Result<Congestion, String> {
        match text {
            "cubic" => Ok(Congestion::Cubic),
            "bbr" => Ok(Congestion::Bbr),
            "newreno" => Ok(Congestion::NewReno),
            other => Err(format!("\"{other}\" is no congestion control of QUIC; \"cubic\", \"bbr\" or \"newreno\" is")),
        }
    }
}

/// Settings of the QUIC link. What is out of range is taken as the nearest that is not.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct QuicSettings {
    /// Connections over which a source spreads its lanes, 1 to 16; control is on the first. Each is one task, which is about
    /// one core, with a socket of its own.
    pub connections: u16,
    /// How long a source tries to get an answer, over all addresses of the destination together.
    pub connect_max: Duration,
    /// The address that a source speaks from; the system's choice where none is given, and then packets follow the routes.
    pub source_address: Option<IpAddr>,
    /// Largest UDP payload in bytes, 1200 to 16000, up to which a source seeks what the path carries. What the kernel
    /// knows about the route bounds it further, mostly the MTU of the interface. Nothing makes QUIC faster than large packets.
    pub mtu_max: u16,
    /// The UDP payload in bytes that the path is known to carry, where it is: used from the first packet on and never
    /// doubted. A path that carries less is then not usable. Loopback is always known.
    pub mtu_known: Option<u16>,
    /// Bytes of one lane that the destination holds until its thread takes them, 64 KiB to 256 MiB.
    pub lane_window_bytes: u32,
    /// Bytes that a source may have written and not acknowledged on one connection; sized by the round trip where none is given.
    pub send_window_bytes: Option<u64>,
    /// Bytes of each socket's two buffers. Beyond `net.core.rmem_max` and `wmem_max` only root may go.
    pub socket_bytes: usize,
    /// Congestion control of the source.
    pub congestion: Congestion,
    /// Packets that a destination may receive before it has to acknowledge.
    pub packets_per_ack: u32,
    /// Whether a destination lets an open connection go on from another address of its peer, which must be on the
    /// allow-list. Where not, such packets are dropped and the migration ends as when the link is cut.
    pub address_change: bool,
}

impl Default for QuicSettings {
    fn default() -> QuicSettings {
        QuicSettings {
            connections: 2,
            connect_max: Duration::from_secs(2),
            source_address: None,
            mtu_max: MTU_MAX,
            mtu_known: None,
            lane_window_bytes: 8 << 20,
            send_window_bytes: None,
            socket_bytes: 16 << 20,
            congestion: Congestion::Cubic,
            packets_per_ack: 32,
            address_change: true,
        }
    }
}

impl QuicSettings {
    pub(super) fn connection_count(&self) -> u16 {
        self.connections.clamp(1, limosa_proto::wire::limits::LANES_MAX)
    }

    fn mtu(value: u16) -> u16 {
        value.clamp(MTU_MIN, MTU_MAX)
    }

    fn lane_window(&self) -> VarInt {
        VarInt::from_u32(self.lane_window_bytes.clamp(64 << 10, 256 << 20))
    }

    /// What a connection's streams may hold together once its peer is known. All of them at once: a lane that waits at a
    /// barrier must never keep the others from being filled.
    pub(super) fn receive_window(&self, streams: u32) -> VarInt {
        VarInt::try_from(self.lane_window().into_inner().saturating_mul(streams.into())).unwrap_or(VarInt::MAX)
    }

    /// The send window for a path of this round trip.
    pub(super) fn send_window(&self, round_trip: Duration) -> u64 {
        let path = u128::from(SEND_BYTES_PER_S) * round_trip.as_micros() / 1_000_000;
        self.send_window_bytes.unwrap_or_else(|| u64::try_from(path).unwrap_or(u64::MAX).clamp(SEND_BYTES_MIN, SEND_BYTES_MAX))
    }

    /// What both sides have in common.
    fn transport(&self, silence_max: Duration) -> TransportConfig {
        let mut transport = TransportConfig::default();
        let keep_alive = silence_max / 4;
        transport
            .max_idle_timeout(IdleTimeout::try_from(silence_max + keep_alive).ok())
            .keep_alive_interval(Some(keep_alive))
            .max_concurrent_uni_streams(VarInt::from_u32(0))
            .max_concurrent_bidi_streams(VarInt::from_u32(0))
            .datagram_receive_buffer_size(None)
            .send_fairness(false)
            .initial_rtt(RTT_FIRST);
        transport
    }

    /// The source's side: it sends much and receives little. `route_mtu` is the UDP payload that the kernel thinks the route
    /// carries, `sure` whether that is beyond doubt.
    pub(super) fn of_source(&self, silence_max: Duration, route_mtu: Option<u16>, sure: bool) -> TransportConfig {
        let mut transport = self.transport(silence_max);
        let upper = QuicSettings::mtu(self.mtu_max.min(route_mtu.unwrap_or(u16::MAX)));
        let mut discovery = MtuDiscoveryConfig::default();
        discovery.upper_bound(upper);
        let mut acknowledgements = AckFrequencyConfig::default();
        acknowledgements
            .ack_eliciting_threshold(VarInt::from_u32(self.packets_per_ack.clamp(1, 256)))
            .max_ack_delay(Some(ACK_DELAY_MAX));
        transport
            .stream_receive_window(VarInt::from_u32(SOURCE_WINDOW_BYTES))
            .receive_window(VarInt::from_u32(SOURCE_WINDOW_BYTES))
            .send_window(self.send_window(Duration::ZERO))
            .ack_frequency_config(Some(acknowledgements))
            .mtu_discovery_config(Some(discovery));
        self.control_congestion(&mut transport, upper);
        if let Some(known) = self.mtu_known.map(QuicSettings::mtu).or(sure.then_some(upper)) {
            transport.initial_mtu(known).min_mtu(known);
        }
        transport
    }

    fn control_congestion(&self, transport: &mut TransportConfig, mtu: u16) {
        // Where one packet is as large as the whole window, quinn sends nothing at all.
        let first = (u64::from(mtu) * 10).max(FIRST_WINDOW_BYTES_MIN);
        match self.congestion {
            Congestion::Cubic => {
                let mut cubic = CubicConfig::default();
                cubic.initial_window(first);
                transport.congestion_controller_factory(Arc::new(cubic))
            }
            Congestion::Bbr => {
                let mut bbr = BbrConfig::default();
                bbr.initial_window(first);
                transport.congestion_controller_factory(Arc::new(bbr))
            }
            Congestion::NewReno => {
                let mut reno = NewRenoConfig::default();
                reno.initial_window(first);
                transport.congestion_controller_factory(Arc::new(reno))
            }
        };
    }

    /// The destination's side. Until its peer is known it gets no stream and not a byte of window, so that nothing beyond the
    /// handshake's own buffers (16 KiB for each of its steps) is held for it.
    pub(super) fn of_destination(&self, silence_max: Duration) -> TransportConfig {
        let mut transport = self.transport(silence_max);
        transport
            .stream_receive_window(self.lane_window())
            .receive_window(VarInt::from_u32(0))
            .send_window(DESTINATION_SEND_BYTES)
            .mtu_discovery_config(None);
        transport
    }
}

/// What an endpoint says of itself.
pub(super) fn endpoint() -> EndpointConfig {
    let mut config = EndpointConfig::default();
    // The value is within the range that is accepted.
    let _ = config.max_udp_payload_size(MTU_MAX);
    config
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn windows_follow_the_path_within_bounds() {
        let settings = QuicSettings::default();
        assert_eq!(settings.send_window(Duration::from_micros(200)), SEND_BYTES_MIN);
        assert_eq!(settings.send_window(Duration::from_millis(20)), 50_000_000);
        assert_eq!(settings.send_window(Duration::from_secs(5)), SEND_BYTES_MAX);
        let fixed = QuicSettings { send_window_bytes: Some(1 << 20), ..settings };
        assert_eq!(fixed.send_window(Duration::from_secs(5)), 1 << 20);
        assert_eq!(settings.receive_window(18).into_inner(), 18 * (8 << 20));
    }

    #[test]
    fn what_is_out_of_range_is_the_nearest_that_is_not() {
        let odd = QuicSettings {
            connections: 0,
            mtu_max: 0,
            mtu_known: Some(u16::MAX),
            lane_window_bytes: 0,
            ..QuicSettings::default()
        };
        assert_eq!((odd.connection_count(), odd.lane_window().into_inner()), (1, 64 << 10));
        // Would panic within quinn if it were taken as it is.
        let _ = odd.of_source(Duration::from_secs(10), Some(0), true);
        assert!("reno".parse::<Congestion>().unwrap_err().contains("newreno"));
    }
}
