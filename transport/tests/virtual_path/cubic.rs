//! TCP's CUBIC (RFC 9438) as Linux has it: HyStart, proportional rate reduction, no pacing.
//!
//! Invariant: one reduction a round trip at most, however many packets it lost.

use std::time::Duration;

use tokio::time::Instant;

use super::tcp::{Ack, Control};

const BETA: f64 = 0.7;
const C: f64 = 0.4;
/// Growth a round trip that keeps up with Reno after reductions by `BETA`.
const RENO: f64 = 3.0 * (1.0 - BETA) / (1.0 + BETA);
/// Samples of a round trip by which HyStart judges it.
const HYSTART_SAMPLES: u32 = 8;

/// A reduction under way.
struct Recovery {
    /// Ends when this packet is accounted for.
    until: u64,
    prior_window: f64,
    delivered: f64,
    sent: f64,
    next: u64,
}

pub(crate) struct Cubic {
    window: f64,
    threshold: f64,
    recovery: Option<Recovery>,
    /// Window before the last reduction, and what the curve began with.
    highest: f64,
    epoch: Option<Instant>,
    origin: f64,
    inflection_s: f64,
    reno: f64,
    min_rtt: Duration,
    /// HyStart: the round ends with this packet; its samples and the lowest of them.
    round_end: u64,
    samples: u32,
    lowest: Duration,
}

impl Cubic {
    pub(crate) fn new() -> Self {
        Self {
            window: 10.0,
            threshold: f64::INFINITY,
            recovery: None,
            highest: 0.0,
            epoch: None,
            origin: 0.0,
            inflection_s: 0.0,
            reno: 0.0,
            min_rtt: Duration::MAX,
            round_end: 0,
            samples: 0,
            lowest: Duration::MAX,
        }
    }

    fn reduce(&mut self) {
        self.epoch = None;
        // Gives way faster to newer flows while it does not come back to where it was.
        let less = self.window < self.highest;
        self.highest = if less { self.window * (1.0 + BETA) / 2.0 } else { self.window };
        self.threshold = (self.window * BETA).max(2.0);
    }

    fn hystart(&mut self, ack: &Ack) {
        if ack.newest >= self.round_end {
            (self.round_end, self.samples, self.lowest) = (ack.next, 0, Duration::MAX);
        }
        self.samples += 1;
        self.lowest = self.lowest.min(ack.rtt);
        let tolerance =
            (self.min_rtt / 8).clamp(Duration::from_millis(4), Duration::from_millis(16));
        if self.samples == HYSTART_SAMPLES && self.lowest > self.min_rtt + tolerance {
            self.threshold = self.window;
        }
    }

    fn avoid(&mut self, ack: &Ack) {
        let window = self.window;
        let epoch = *self.epoch.get_or_insert_with(|| {
            self.reno = window;
            self.origin = self.highest.max(window);
            self.inflection_s = ((self.origin - window) / C).cbrt();
            ack.now
        });
        let acked = ack.acked as f64;
        self.reno += RENO * acked / window;
        let s = (ack.now - epoch + self.min_rtt).as_secs_f64() - self.inflection_s;
        let target = (self.origin + C * s.powi(3)).max(self.reno).min(1.5 * window);
        self.window += ((target - window) / window * acked).max(0.01 * acked / window);
    }

    /// Proportional rate reduction (RFC 6937): the window comes down as packets leave the network.
    fn recover(&mut self, ack: &Ack) {
        let Some(recovery) = &mut self.recovery else { return };
        let in_flight = ack.in_flight as f64;
        recovery.delivered += ack.acked as f64;
        recovery.sent += (ack.next - recovery.next) as f64;
        recovery.next = ack.next;
        let may_send = if in_flight > self.threshold {
            (recovery.delivered * self.threshold / recovery.prior_window).ceil() - recovery.sent
        } else {
            let behind = (recovery.delivered - recovery.sent).max(ack.acked as f64) + 1.0;
            behind.min(self.threshold - in_flight)
        };
        self.window = in_flight + may_send.max(0.0);
    }
}

impl Control for Cubic {
    fn on_ack(&mut self, ack: &Ack) {
        self.min_rtt = self.min_rtt.min(ack.rtt);
        if self.recovery.as_ref().is_some_and(|recovery| ack.newest >= recovery.until) {
            self.recovery = None;
            self.window = self.threshold;
        }
        if ack.lost > 0 && self.recovery.is_none() {
            self.reduce();
            self.recovery = Some(Recovery {
                until: ack.next,
                prior_window: self.window,
                delivered: 0.0,
                sent: 0.0,
                next: ack.next,
            });
        }
        if self.recovery.is_some() {
            self.recover(ack);
        } else if self.window < self.threshold {
            self.hystart(ack);
            self.window = (self.window + ack.acked as f64).min(self.threshold);
        } else {
            self.avoid(ack);
        }
    }

    fn on_timeout(&mut self) {
        self.reduce();
        self.recovery = None;
        self.window = 1.0;
    }

    fn window(&self) -> u64 {
        (self.window as u64).max(1)
    }

    fn pacing_rate(&self) -> Option<f64> {
        None
    }
}
