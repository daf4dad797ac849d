//! How fast bytes arrive at the other end, from what was sent, acknowledged and lost when.
//!
//! Invariant: a rate is measured between two acknowledgements of packets that were sent as far
//! apart as they were delivered, so neither a burst of sending nor a clump of acknowledgements
//! shows as a faster path (draft-cheng-iccrg-delivery-rate-estimation).

use std::collections::VecDeque;
use std::time::{Duration, Instant};

/// Departures that are remembered; the oldest go first, their packets then give no sample.
const MAX_DEPARTURES: usize = 1 << 16;
/// Departures older than the newest acknowledged one by this much cannot give a sample any more.
const MAX_REORDERING: Duration = Duration::from_secs(1);

/// The state of the connection when packets left it.
#[derive(Debug, Clone, Copy)]
struct Departure {
    at: Instant,
    delivered: u64,
    delivered_at: Instant,
    first_sent: Instant,
    app_limited: bool,
    /// Bytes in flight right after it.
    in_flight: u64,
    lost: u64,
}

/// What a departure says once something of it is known to have arrived or to be lost.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Flight {
    /// Bytes that were in flight when it left.
    pub(crate) bytes: u64,
    /// Bytes that were lost since.
    pub(crate) lost: u64,
}

/// One measurement.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Sample {
    /// Bytes a second.
    pub(crate) rate: u64,
    /// Over which time it was measured.
    pub(crate) span: Duration,
    /// True if the sender had nothing more to send: the path may be faster than this.
    pub(crate) app_limited: bool,
    /// Bytes delivered over that time.
    pub(crate) delivered: u64,
    /// Bytes that had been delivered when the newest acknowledged packet left.
    pub(crate) prior_delivered: u64,
    /// Of the newest acknowledged packet.
    pub(crate) flight: Flight,
}

/// Measures the delivery rate.
#[derive(Debug, Clone)]
pub(crate) struct Delivery {
    departures: VecDeque<Departure>,
    delivered: u64,
    delivered_at: Instant,
    first_sent: Instant,
    in_flight: u64,
    lost: u64,
    /// Samples are app-limited until this much is delivered.
    app_limited_until: u64,
    newest: Option<Departure>,
}

impl Delivery {
    pub(crate) fn new(now: Instant) -> Self {
        Self {
            departures: VecDeque::new(),
            delivered: 0,
            delivered_at: now,
            first_sent: now,
            in_flight: 0,
            lost: 0,
            app_limited_until: 0,
            newest: None,
        }
    }

    /// `bytes` left at `now`.
    pub(crate) fn on_sent(&mut self, now: Instant, bytes: u64) {
        if self.in_flight == 0 {
            // The silence before this is not the path's.
            self.first_sent = now;
            self.delivered_at = now;
        }
        self.in_flight += bytes;
        if let Some(last) = self.departures.back_mut().filter(|last| last.at == now) {
            last.in_flight = self.in_flight;
            return;
        }
        if self.departures.len() == MAX_DEPARTURES {
            self.departures.pop_front();
        }
        self.departures.push_back(Departure {
            at: now,
            delivered: self.delivered,
            delivered_at: self.delivered_at,
            first_sent: self.first_sent,
            app_limited: self.delivered < self.app_limited_until,
            in_flight: self.in_flight,
            lost: self.lost,
        });
    }

    /// Bytes delivered so far.
    pub(crate) fn delivered(&self) -> u64 {
        self.delivered
    }

    /// Bytes in flight, as far as acknowledgements tell.
    pub(crate) fn in_flight(&self) -> u64 {
        self.in_flight
    }

    /// `bytes` are taken for lost, of which the last left at `sent`.
    pub(crate) fn on_lost(&mut self, sent: Instant, bytes: u64) -> Option<Flight> {
        self.lost += bytes;
        self.in_flight = self.in_flight.saturating_sub(bytes);
        let departure = self.departed_at(sent)?;
        Some(Flight { bytes: departure.in_flight, lost: self.lost - departure.lost })
    }

    /// The last departure up to `sent`.
    fn departed_at(&self, sent: Instant) -> Option<Departure> {
        let after = self.departures.partition_point(|departure| departure.at <= sent);
        after.checked_sub(1).map(|place| self.departures[place])
    }

    /// A packet of `bytes` that left at `sent` is acknowledged.
    pub(crate) fn on_ack(&mut self, now: Instant, sent: Instant, bytes: u64) {
        self.delivered += bytes;
        self.delivered_at = now;
        let Some(departure) = self.departed_at(sent) else { return };
        if departure.at == sent && self.newest.is_none_or(|newest| departure.at > newest.at) {
            self.newest = Some(departure);
        }
    }

    /// Ends a batch of acknowledgements: what they say about the rate, if anything.
    pub(crate) fn sample(
        &mut self,
        now: Instant,
        in_flight: u64,
        app_limited: bool,
    ) -> Option<Sample> {
        self.in_flight = in_flight;
        if app_limited {
            self.app_limited_until = self.delivered + in_flight.max(1);
        }
        let newest = self.newest.take()?;
        self.first_sent = self.first_sent.max(newest.at);
        while self.departures.front().is_some_and(|oldest| oldest.at + MAX_REORDERING < newest.at) {
            self.departures.pop_front();
        }
        let sending = newest.at.saturating_duration_since(newest.first_sent);
        let acknowledging = now.saturating_duration_since(newest.delivered_at);
        let span = sending.max(acknowledging);
        let delivered = self.delivered - newest.delivered;
        let rate = (u128::from(delivered) * 1_000_000_000).checked_div(span.as_nanos())?;
        Some(Sample {
            rate: u64::try_from(rate).ok()?,
            span,
            app_limited: newest.app_limited,
            delivered,
            prior_delivered: newest.delivered,
            flight: Flight { bytes: newest.in_flight, lost: self.lost - newest.lost },
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const PACKET: u64 = 1000;

    fn millis(millis: u64) -> Duration {
        Duration::from_millis(millis)
    }

    /// Sends a packet a millisecond over a path of 50 ms and returns the samples.
    fn steady(app_limited: bool, clump: u64) -> Vec<Sample> {
        let start = Instant::now();
        let mut delivery = Delivery::new(start);
        let mut samples = Vec::new();
        for tick in 0..400u64 {
            let now = start + millis(tick);
            if tick >= 50 && tick % clump == 0 {
                for sent in (tick - clump + 1).max(50) - 50..=tick - 50 {
                    delivery.on_ack(now, start + millis(sent), PACKET);
                }
                samples.extend(delivery.sample(now, 50 * PACKET, app_limited));
            }
            delivery.on_sent(now, PACKET);
        }
        samples
    }

    #[test]
    fn a_steady_flow_is_measured_right() {
        let samples = steady(false, 1);
        assert!(samples.len() > 300);
        for sample in &samples[60..] {
            assert!((980_000..=1_020_000).contains(&sample.rate), "{sample:?}");
            assert!(!sample.app_limited);
        }
    }

    #[test]
    fn acknowledgements_in_clumps_do_not_look_like_a_faster_path() {
        for sample in &steady(false, 10)[8..] {
            assert!(sample.rate <= 1_050_000, "{sample:?}");
        }
    }

    #[test]
    fn a_sender_with_nothing_to_send_is_known() {
        assert!(steady(true, 1)[60..].iter().all(|sample| sample.app_limited));
    }

    #[test]
    fn silence_is_not_counted() {
        let start = Instant::now();
        let mut delivery = Delivery::new(start);
        delivery.on_sent(start, PACKET);
        delivery.on_ack(start + millis(50), start, PACKET);
        delivery.sample(start + millis(50), 0, true);
        let later = start + Duration::from_secs(3600);
        delivery.on_sent(later, PACKET);
        delivery.on_ack(later + millis(50), later, PACKET);
        let sample = delivery.sample(later + millis(50), 0, false).unwrap();
        assert_eq!(sample.span, millis(50));
    }

    #[test]
    fn memory_is_bounded() {
        let start = Instant::now();
        let mut delivery = Delivery::new(start);
        for tick in 0..(MAX_DEPARTURES as u64 + 1000) {
            delivery.on_sent(start + Duration::from_nanos(tick), PACKET);
        }
        assert_eq!(delivery.departures.len(), MAX_DEPARTURES);
    }
}
