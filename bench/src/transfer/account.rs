//! The arithmetic of transfers: goodput, waste, start, shares. Pure.
//!
//! Invariant: one definition for all tools, from the relay's counters. It is that of the virtual
//! path in the transport's tests.
//!
//! - *First* bytes: IP bytes of every packet sent for the first time, payload with its headers.
//! - *Goodput*: first bytes of the payload that arrived in a time, over what the link carries in it.
//! - *Waste*: bytes that need not have been sent over those that had to be: the first ones, one
//!   repeat of each packet that the link itself lost, and what went back (acknowledgements).

use std::time::Duration;

use super::Sample;
use crate::profile::Profile;
use crate::relay::Stats;

/// Bytes of an IPv4 and a TCP header with timestamps, which Linux always sends.
const TCP_HEADERS: u16 = 20 + 20 + 12;
/// Share of the link at which a transfer counts as started.
const STARTED: f64 = 0.9;
/// Least time over which a rate is looked at: below, the receiver's own clock shows.
const WINDOW_MIN: Duration = Duration::from_millis(20);
/// Share of the link at which a flow that is alone again counts as recovered, and the time over which
/// it is looked at.
const RECOVERED: f64 = 0.95;
pub(super) const RATE_WINDOW: Duration = Duration::from_millis(500);

/// IP bytes of this much payload in full TCP packets.
pub(super) fn tcp_wire_bytes(payload: u64, mtu: u16) -> u64 {
    let (whole, mtu) = (u128::from(payload) * u128::from(mtu), u128::from(mtu));
    u64::try_from(whole / (mtu - u128::from(TCP_HEADERS))).unwrap_or(u64::MAX)
}

/// What a transfer from a to b had to send and did send.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) struct Bytes {
    /// See the head of this file.
    pub(super) first: f64,
    /// Lost by the link itself, on the way to the receiver.
    pub(super) lost: f64,
    /// Sent by the receiver.
    pub(super) back: f64,
    /// Sent by the sender; what was under way when the counters were read is left out.
    pub(super) sent: f64,
}

impl Bytes {
    /// From the relay's counters, the payload that arrived, and the number of packets that the
    /// sender repeated if it says so (QUIC does). TCP's headers are known instead: what was
    /// delivered beyond them and the payload came twice.
    pub(super) fn new(wire: &Stats, payload: u64, repeated_packets: Option<u64>) -> Self {
        let way = &wire.a_to_b;
        let sent = (way.delivered_bytes + way.dropped_bytes) as f64;
        let packets = way.delivered_packets
            + way.dropped_queue
            + way.dropped_loss
            + way.dropped_cut
            + way.dropped_overrun;
        let first = match repeated_packets {
            Some(repeated) if packets > 0 => sent * (1.0 - repeated as f64 / packets as f64),
            Some(_) => 0.0,
            None => {
                let headers = way.delivered_packets * u64::from(TCP_HEADERS);
                let inside = way.delivered_bytes.saturating_sub(headers).max(1);
                payload as f64 * way.delivered_bytes as f64 / inside as f64
            }
        };
        let (lost, back) = (way.lost_bytes as f64, wire.b_to_a.sent_bytes as f64);
        Self { first: first.max(0.0), lost, back, sent }
    }

    /// See the head of this file.
    pub(super) fn waste(&self) -> f64 {
        let needless = (self.sent - self.first - self.lost).max(0.0);
        needless / (self.first + self.lost + self.back).max(1.0)
    }
}

/// Bytes at a moment, from samples of a counter; straight between two of them.
pub(super) fn bytes_at(samples: &[Sample], counter: fn(&Sample) -> u64, at_us: u64) -> f64 {
    let next = samples.partition_point(|sample| sample.at_us < at_us);
    match (next.checked_sub(1).and_then(|before| samples.get(before)), samples.get(next)) {
        (Some(before), Some(after)) => {
            let (from, to) = (counter(before) as f64, counter(after) as f64);
            let part = (at_us - before.at_us) as f64 / (after.at_us - before.at_us) as f64;
            from + (to - from) * part
        }
        (Some(last), None) => counter(last) as f64,
        (None, first) => first.map_or(0.0, |first| counter(first) as f64),
    }
}

/// Bytes of everybody.
pub(super) fn of_device(sample: &Sample) -> u64 {
    sample.device_bytes
}

/// Bytes of an own flow.
pub(super) fn of_flow(sample: &Sample) -> u64 {
    sample.flow_bytes
}

/// A link and the moment at which it came up: what it carries from one moment to another.
#[derive(Debug, Clone, Copy)]
pub(super) struct Carrier<'a> {
    pub(super) profile: &'a Profile,
    pub(super) up_us: u64,
}

impl Carrier<'_> {
    /// IP bytes from one moment of the monotonic clock to another.
    pub(super) fn bytes(&self, from_us: u64, to_us: u64) -> f64 {
        let since = |at: u64| Duration::from_micros(at.saturating_sub(self.up_us));
        self.profile.carried_bytes(since(from_us), since(to_us))
    }

    /// Round trips from the first byte offered until what reached the receiver's device over a round
    /// trip is 90 % of the link; absent if that never was, or there is no round trip.
    pub(super) fn start_round_trips(&self, samples: &[Sample], began_us: u64) -> Option<f64> {
        let rtt = self.profile.rtt();
        let window_us = rtt.max(WINDOW_MIN).as_micros() as u64;
        let one_way_us = self.profile.one_way().as_micros() as u64;
        let started = samples.iter().find(|sample| {
            let (to, from) = (sample.at_us, sample.at_us.saturating_sub(window_us));
            let came = sample.device_bytes as f64 - bytes_at(samples, of_device, from);
            let carried = self.bytes(from - one_way_us.min(from), to - one_way_us.min(to));
            to > began_us && came >= STARTED * carried && carried > 0.0
        })?;
        let took_us = (started.at_us - began_us) as f64;
        (!rtt.is_zero()).then(|| took_us / rtt.as_micros() as f64)
    }

    /// Seconds from the moment at which the others stopped until the flows of these samples took
    /// 95 % of the link over half a second, that half second included; absent if that never was.
    pub(super) fn recovery_s(&self, flows: &[&[Sample]], stopped_us: u64) -> Option<f64> {
        let window_us = RATE_WINDOW.as_micros() as u64;
        let ends = flows.first()?.iter().map(|sample| sample.at_us);
        let recovered = ends.filter(|at| *at >= stopped_us + window_us).find(|to| {
            let from = to - window_us;
            let came: f64 = flows
                .iter()
                .map(|flow| bytes_at(flow, of_flow, *to) - bytes_at(flow, of_flow, from))
                .sum();
            came >= RECOVERED * self.bytes(from, *to)
        })?;
        Some((recovered - stopped_us) as f64 / 1e6)
    }
}

/// Mbit/s of a flow, IP bytes, in every half second from one moment to another.
pub(super) fn rates_mbit(samples: &[Sample], from_us: u64, to_us: u64) -> Vec<f64> {
    let step = RATE_WINDOW.as_micros() as u64;
    let mbit = |from: u64| {
        let bytes = bytes_at(samples, of_flow, from + step) - bytes_at(samples, of_flow, from);
        // Bits a microsecond; two decimals say all that is known.
        (bytes * 8.0 / step as f64 * 100.0).round() / 100.0
    };
    (0..to_us.saturating_sub(from_us) / step).map(|i| mbit(from_us + i * step)).collect()
}

/// Jain's index of shares: 1 if all are equal, 1/n if one has everything.
pub(super) fn jain(shares: &[f64]) -> f64 {
    let (sum, squares) = shares
        .iter()
        .fold((0.0, 0.0), |(sum, squares), share| (sum + share, squares + share * share));
    if squares > 0.0 { sum * sum / (shares.len() as f64 * squares) } else { 0.0 }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::relay::DirectionStats;

    /// Of `sent` packets of 1500 bytes the link lost some and the queue dropped some.
    fn wire(sent: u64, lost: u64, dropped: u64) -> Stats {
        let way = DirectionStats {
            sent_packets: sent,
            sent_bytes: sent * 1500,
            delivered_packets: sent - lost - dropped,
            delivered_bytes: (sent - lost - dropped) * 1500,
            dropped_queue: dropped,
            dropped_loss: lost,
            dropped_bytes: (lost + dropped) * 1500,
            lost_bytes: lost * 1500,
            ..DirectionStats::default()
        };
        let back = DirectionStats { sent_bytes: 30_000, ..DirectionStats::default() };
        Stats { a_to_b: way, b_to_a: back, ..Stats::default() }
    }

    fn close(a: f64, b: f64) -> bool {
        (a - b).abs() < 1e-9 * b.abs().max(1.0)
    }

    #[test]
    fn a_repeat_of_what_the_link_lost_is_no_waste() {
        // 1000 packets of payload, ten lost and repeated: of both ways to know.
        for repeated in [None, Some(10)] {
            let bytes = Bytes::new(&wire(1010, 10, 0), 1000 * 1448, repeated);
            assert!(close(bytes.first, 1_500_000.0), "{bytes:?}");
            assert!(close(bytes.waste(), 0.0), "{bytes:?}");
        }
    }

    #[test]
    fn what_the_queue_dropped_and_what_came_twice_is_waste() {
        // Ten lost, twenty dropped by the queue, and five repeated although they had arrived.
        let had_to = 1_500_000.0 + 15_000.0 + 30_000.0;
        for repeated in [None, Some(35)] {
            let bytes = Bytes::new(&wire(1035, 10, 20), 1000 * 1448, repeated);
            assert!(close(bytes.waste(), 25.0 * 1500.0 / had_to), "{bytes:?}");
        }
        assert!(close(Bytes::new(&Stats::default(), 0, None).waste(), 0.0));
        assert!(close(Bytes::new(&Stats::default(), 0, Some(0)).waste(), 0.0));
    }

    #[test]
    fn full_packets_of_tcp_have_their_headers() {
        assert_eq!(tcp_wire_bytes(1448 * 3, 1500), 4500);
        assert_eq!(tcp_wire_bytes(0, 1500), 0);
    }

    fn sample(at_ms: u64, bytes: u64) -> Sample {
        Sample { at_us: at_ms * 1000, flow_bytes: bytes, device_bytes: bytes }
    }

    #[test]
    fn between_samples_bytes_grow_evenly() {
        let samples = [sample(10, 100), sample(20, 300)];
        let at = |ms: u64| bytes_at(&samples, of_flow, ms * 1000);
        assert_eq!([at(0), at(10), at(15), at(20), at(30)], [100.0, 100.0, 200.0, 300.0, 300.0]);
        assert_eq!(bytes_at(&[], of_flow, 5), 0.0);
    }

    #[test]
    fn a_start_is_over_when_a_round_trip_was_nearly_full() {
        let profile = Profile::named("continental").unwrap();
        let carrier = Carrier { profile: &profile, up_us: 0 };
        // 25 bytes a microsecond: nothing for 200 ms after the begin at one second, then half of
        // the link, then, from 1.4 s on, all of it.
        let came = |ms: u64| match ms {
            0..1200 => 0,
            1200..1400 => (ms - 1200) * 12_500,
            _ => 200 * 12_500 + (ms - 1400) * 25_000,
        };
        let samples: Vec<_> = (0..200).map(|i| sample(i * 20, came(i * 20))).collect();
        // A window of 80 ms is 90 % full when 64 ms of it are: at 1.464 s, seen at 1.48 s.
        let start = carrier.start_round_trips(&samples, 1_000_000).unwrap();
        assert!(close(start, 6.0), "{start}");
        assert_eq!(carrier.start_round_trips(&samples[..70], 1_000_000), None);
    }

    #[test]
    fn who_is_alone_again_recovers() {
        let profile = Profile::named("continental").unwrap();
        let carrier = Carrier { profile: &profile, up_us: 0 };
        let came =
            |ms: u64| if ms < 2000 { ms * 12_500 } else { 25_000_000 + (ms - 2000) * 25_000 };
        let flow: Vec<_> = (0..200).map(|i| sample(i * 20, came(i * 20))).collect();
        // Others stopped at 1.5 s; the half second to 2.46 s is the first with 95 %.
        let took = carrier.recovery_s(&[&flow], 1_500_000).unwrap();
        assert!(close(took, 0.96), "{took}");
        assert_eq!(carrier.recovery_s(&[&flow[..90]], 1_500_000), None);
        assert_eq!(rates_mbit(&flow, 0, 2_600_000), [100.0, 100.0, 100.0, 100.0, 200.0]);
    }

    #[test]
    fn a_rate_that_changes_is_counted_as_it_was() {
        let profile = Profile::named("changing").unwrap();
        let carrier = Carrier { profile: &profile, up_us: 1_000_000 };
        // Three seconds at 200 Mbit/s and one at 60.
        assert!(close(carrier.bytes(1_000_000, 5_000_000), 82_500_000.0));
    }

    #[test]
    fn jain_tells_fair_from_unfair() {
        assert!(close(jain(&[0.5, 0.5]), 1.0));
        assert!(close(jain(&[1.0, 0.0]), 0.5));
        assert!(close(jain(&[0.75, 0.25]), 0.8));
        assert!(close(jain(&[]), 0.0));
    }
}
