//! What an endpoint is told about its path, and the QUIC settings that follow from it.
//!
//! Invariant: no single stream may hold so many gaps that quinn's receiver gives the connection up
//! (more than 1024 spans in one stream buffer): [`STREAM_WINDOW`] is below what that many full
//! packets with gaps between them would need, and many streams together fill the path.

use std::sync::Arc;
use std::time::Duration;

use quinn::congestion::CubicConfig;
use quinn::{IdleTimeout, MtuDiscoveryConfig, TransportConfig, VarInt};

use crate::bit_rate::BitRate;
use crate::congestion::{INITIAL_WINDOW, PathControllerConfig, carried};
use crate::lanes::LANES_MAX;

/// Receive window of one stream.
pub const STREAM_WINDOW: u32 = 2 * 1024 * 1024;
/// Receive and send window of a connection whose path is not known.
pub const CONNECTION_WINDOW: u64 = 64 * 1024 * 1024;
/// Bounds of the connection windows that follow from the hints.
const CONNECTION_WINDOW_MIN: u64 = 16 * 1024 * 1024;
const CONNECTION_WINDOW_MAX: u64 = 256 * 1024 * 1024;
/// Unidirectional streams that a peer may have open: its batches on the way.
pub const MAX_UNI_STREAMS: u32 = 256;
/// Bidirectional streams that a peer may have open: the control stream and the receipts.
pub(crate) const MAX_BI_STREAMS: u32 = 2;
/// A connection that says nothing says so this often, so that a cut is noticed and NATs keep the
/// path open.
pub const KEEP_ALIVE: Duration = Duration::from_secs(5);
/// Default for [`Tuning::idle_timeout`]: six keep-alives may be lost before a link counts as cut.
pub const IDLE_TIMEOUT: Duration = Duration::from_secs(30);
/// Bounds of [`Tuning::idle_timeout`]: below, keep-alives could not prevent a false alarm; above,
/// a paused guest would wait too long to learn that its target is gone.
pub const IDLE_TIMEOUT_MIN: Duration = Duration::from_secs(20);
/// See [`IDLE_TIMEOUT_MIN`].
pub const IDLE_TIMEOUT_MAX: Duration = Duration::from_secs(60);
/// Size asked for each of the socket's two buffers: what 10 Gbit/s bring in 6 ms.
pub const SOCKET_BUFFER: usize = 8 * 1024 * 1024;
/// UDP payload that a 1500-byte Ethernet carries with IPv6 and UDP headers.
pub const ETHERNET_PAYLOAD: u16 = 1452;
/// UDP payload that every path of QUIC carries (RFC 9000, section 14).
pub const MIN_PAYLOAD: u16 = 1200;
/// Round trip assumed before it is measured, where there is no hint.
const INITIAL_RTT: Duration = Duration::from_millis(200);
/// Share of the hinted BDP that is sent before anything is known, as a divisor: half, because
/// hints come from another day.
const HINT_DIVISOR: u64 = 2;

/// Which congestion controller a connection uses.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Congestion {
    /// The path model of this crate: for long and lossy paths.
    #[default]
    PathModel,
    /// CUBIC (RFC 9438), as quinn has it: for networks where all others use it and loss is rare.
    Cubic,
}

/// Settings of an [`Endpoint`](crate::Endpoint). The default suits a path that nobody has measured.
#[derive(Debug, Clone)]
pub struct Tuning {
    /// What the path is expected to carry, from the operator or the last migration.
    pub rate_hint: Option<BitRate>,
    /// Its expected round trip.
    pub rtt_hint: Option<Duration>,
    /// Largest UDP payload to try, found by probing; raise it where jumbo frames are known to pass
    /// from end to end.
    pub max_payload: u16,
    /// UDP payload that is known to pass. Above 1200 it keeps a burst of loss from being mistaken
    /// for a path that swallows large packets.
    pub min_payload: u16,
    /// Silence after which the link counts as cut; kept between [`IDLE_TIMEOUT_MIN`] and
    /// [`IDLE_TIMEOUT_MAX`].
    pub idle_timeout: Duration,
    /// Bytes asked of the kernel for each socket buffer.
    pub socket_buffer: usize,
    /// The congestion controller.
    pub congestion: Congestion,
    /// Connections that a session which connects from here may open beside its first, where one core is
    /// what limits it; at most [`LANES_MAX`](crate::LANES_MAX).
    pub lanes: usize,
    /// Makes what QUIC draws at random follow from this seed: for simulations, in which a run must be
    /// the same again. Never for a real network.
    pub simulation_seed: Option<u64>,
    /// Version of the agent as told to peers; at most [`MAX_AGENT_VERSION`](crate::MAX_AGENT_VERSION)
    /// bytes of it.
    pub agent_version: String,
    /// What this agent can do beyond the protocol version, as bits that its users define.
    pub capabilities: u64,
}

impl Default for Tuning {
    fn default() -> Self {
        Self {
            rate_hint: None,
            rtt_hint: None,
            max_payload: ETHERNET_PAYLOAD,
            min_payload: MIN_PAYLOAD,
            idle_timeout: IDLE_TIMEOUT,
            socket_buffer: SOCKET_BUFFER,
            congestion: Congestion::default(),
            lanes: LANES_MAX,
            simulation_seed: None,
            agent_version: env!("CARGO_PKG_VERSION").to_owned(),
            capabilities: 0,
        }
    }
}

impl Tuning {
    /// What the hints say the path holds, in bytes.
    fn hinted_bdp(&self) -> Option<u64> {
        Some(self.rate_hint?.bytes_in(self.rtt_hint?))
    }

    /// Receive and send window of a connection, in bytes.
    pub(crate) fn connection_window(&self) -> u64 {
        self.hinted_bdp().map_or(CONNECTION_WINDOW, |bdp| {
            bdp.saturating_mul(2).clamp(CONNECTION_WINDOW_MIN, CONNECTION_WINDOW_MAX)
        })
    }

    /// Silence after which the link counts as cut.
    pub(crate) fn idle_limit(&self) -> Duration {
        self.idle_timeout.clamp(IDLE_TIMEOUT_MIN, IDLE_TIMEOUT_MAX)
    }

    /// Largest UDP payload, within what QUIC and UDP allow.
    pub(crate) fn payload_limit(&self) -> u16 {
        self.max_payload.clamp(MIN_PAYLOAD, crate::socket::MAX_UDP_PAYLOAD)
    }

    /// The QUIC settings for a session that goes on where a path was seen to deliver `bandwidth` bytes
    /// a second (0: not known) in a round trip of `rtt`.
    pub(crate) fn transport_after(&self, bandwidth: u64, rtt: Duration) -> TransportConfig {
        match bandwidth {
            0 => self.transport(),
            _ => self.settings(Some(carried(bandwidth, rtt)), Some(rtt)),
        }
    }

    /// The QUIC settings.
    pub(crate) fn transport(&self) -> TransportConfig {
        self.settings(self.hinted_bdp(), self.rtt_hint)
    }

    /// The QUIC settings for a path that is thought to hold `bdp` bytes.
    fn settings(&self, bdp: Option<u64>, rtt: Option<Duration>) -> TransportConfig {
        let window = self.connection_window();
        let max_payload = self.payload_limit();
        let min_payload = self.min_payload.clamp(MIN_PAYLOAD, max_payload);
        let idle = IdleTimeout::try_from(self.idle_limit())
            .expect("the clamp keeps the timeout far below 2^62 ms");
        let mut discovery = MtuDiscoveryConfig::default();
        discovery.upper_bound(max_payload);

        let mut config = TransportConfig::default();
        config
            .stream_receive_window(VarInt::from_u32(STREAM_WINDOW))
            .receive_window(
                VarInt::from_u64(window).expect("the clamp keeps the window below 2^62 bytes"),
            )
            .send_window(window)
            .send_fairness(true)
            .max_concurrent_uni_streams(VarInt::from_u32(MAX_UNI_STREAMS))
            .max_concurrent_bidi_streams(VarInt::from_u32(MAX_BI_STREAMS))
            .datagram_receive_buffer_size(None)
            .keep_alive_interval(Some(KEEP_ALIVE))
            .max_idle_timeout(Some(idle))
            .initial_rtt(rtt.unwrap_or(INITIAL_RTT))
            .initial_mtu(min_payload)
            .min_mtu(min_payload)
            .mtu_discovery_config(Some(discovery));
        match self.congestion {
            Congestion::PathModel => {
                let first = bdp.map_or(0, |bdp| bdp / HINT_DIVISOR);
                let initial_window = first.clamp(INITIAL_WINDOW, CONNECTION_WINDOW_MAX);
                config.congestion_controller_factory(Arc::new(PathControllerConfig {
                    initial_window,
                }));
            }
            Congestion::Cubic => {
                config.congestion_controller_factory(Arc::new(CubicConfig::default()));
            }
        }
        config
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn windows_follow_the_path() {
        let path = |rate: &str, rtt| Tuning {
            rate_hint: Some(rate.parse().unwrap()),
            rtt_hint: Some(Duration::from_millis(rtt)),
            ..Tuning::default()
        };
        assert_eq!(Tuning::default().connection_window(), CONNECTION_WINDOW);
        assert_eq!(path("20M", 10).connection_window(), CONNECTION_WINDOW_MIN);
        assert_eq!(path("1G", 100).connection_window(), 25_000_000);
        assert_eq!(path("100G", 300).connection_window(), CONNECTION_WINDOW_MAX);
    }

    #[test]
    fn extreme_settings_are_brought_into_bounds() {
        for idle_timeout in [Duration::ZERO, Duration::MAX] {
            for payload in [0, u16::MAX] {
                let tuning = Tuning {
                    idle_timeout,
                    max_payload: payload,
                    min_payload: payload,
                    ..Tuning::default()
                };
                let _ = tuning.transport();
                assert!((MIN_PAYLOAD..=65_507).contains(&tuning.payload_limit()));
            }
        }
    }

    #[test]
    fn one_stream_cannot_hold_too_many_gaps() {
        // Every second packet lost: a gap each two packets.
        let gaps = STREAM_WINDOW / (2 * u32::from(MIN_PAYLOAD - 100));
        assert!(gaps < 1024, "{gaps}");
    }
}
