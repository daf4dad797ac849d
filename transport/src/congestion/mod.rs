//! Congestion control for long, lossy paths: a model of the path instead of a reaction to losses.
//!
//! ```text
//!  Startup --(rate stops growing, queue or loss seen)--> Drain --(in flight <= BDP)--> Cruise
//!     ^                                                                                |   ^
//!     +----------------- persistent congestion (from anywhere) ------------------      v   |
//!                                                              (min RTT 10 s old)  ProbeRtt-+
//! ```
//!
//! The model is two numbers: the bottleneck's rate (the highest delivery rate of the last rounds)
//! and the path's delay without queue (the lowest round trip of the last seconds). Their product
//! is what the path holds (BDP), and the window is that times a gain of the phase. The idea and
//! the delivery-rate estimate are BBR's (draft-cardwell-iccrg-bbr-congestion-control and
//! draft-cheng-iccrg-delivery-rate-estimation); the window is the only actuator, because quinn
//! 0.11 paces at 1.25 x window / smoothed RTT whatever a controller says.
//!
//! Invariant: a single loss never changes the window. Only a round in which more than
//! [`LOSS_PERCENT`] of the bytes were lost does, by a ceiling that recovers.

use std::any::Any;
use std::sync::Arc;
use std::time::{Duration, Instant};

use quinn::congestion::{Controller, ControllerFactory};
use quinn_proto::RttEstimator;

use crate::delivery::{Delivery, MaxFilter};

/// Window before anything is known, in packets of the base size.
pub(crate) const INITIAL_WINDOW: u64 = 32 * 1200;
/// Smallest window in packets. With few packets in flight the round trip that counts is longer than
/// the lowest one (acknowledgements wait for more, a busy host for its turn), so rate times lowest
/// round trip is less than the window that gave the rate: from a small window a flow would never
/// grow again, whatever the path has to give.
const MIN_WINDOW_PACKETS: u64 = 32;
/// Largest window. quinn's pacer counts in 32 bits; no path needs this much.
const MAX_WINDOW: u64 = 1 << 30;
/// A round trip this old is measured anew: routes change.
const MIN_RTT_AGE: Duration = Duration::from_secs(10);
/// Time spent at half the BDP to see the path without queue.
const PROBE_RTT_TIME: Duration = Duration::from_millis(100);
/// Timers and pacer work in milliseconds: in flight beyond the BDP that no path may run dry of.
const TIMER_GRAIN: Duration = Duration::from_millis(2);
/// A round trip that is longer than the lowest one by no more than this share of it, and
/// [`HOST_DELAY`], is not held against the path: on a busy host acknowledgements wait for their turn.
/// Without it the rate that a window gives is always less than the window was made for, and the
/// window shrinks round by round with nothing lost. The price is that much of queue.
const DELAY_SHARE: u32 = 4;
/// See [`DELAY_SHARE`]; for paths so short that a host's delays are as long as they.
const HOST_DELAY: Duration = Duration::from_millis(4);
/// Share of lost bytes in a round from which on the loss is taken for congestion.
const LOSS_PERCENT: u64 = 3;
/// Fewer lost packets than this say nothing about a share.
const LOSS_PACKETS: u64 = 12;
/// Window after a congested round, in percent of the window that caused it.
const CUT_PERCENT: u64 = 85;
/// By how much the ceiling recovers in a round without congestion, in percent.
const RECOVERY_PERCENT: u64 = 105;
/// In Startup the window is twice the BDP estimate: it doubles every round while the estimate
/// follows, and stands still at one BDP of queue where the estimate does not.
const STARTUP_PERCENT: u64 = 200;
/// Startup ends after this many rounds in which the rate grew by less than a quarter.
const STARTUP_STALLS: u32 = 3;
/// Window while the queue of the start-up empties, in percent of the BDP.
const DRAIN_PERCENT: u64 = 75;
/// Window in ProbeRtt, in percent of the BDP.
const PROBE_RTT_PERCENT: u64 = 50;
/// Window in percent of the BDP, round by round in Cruise: ask for more, give the queue back,
/// then stay. 105 and not 100, because acknowledgements come in clumps.
const CRUISE_PERCENT: [u64; 8] = [125, 90, 105, 105, 105, 105, 105, 105];

/// Builds a [`PathModel`] for every path.
#[derive(Debug, Clone)]
pub(crate) struct PathModelConfig {
    /// Bytes in flight before anything is known of the path.
    pub(crate) initial_window: u64,
}

impl ControllerFactory for PathModelConfig {
    fn build(self: Arc<Self>, now: Instant, current_mtu: u16) -> Box<dyn Controller> {
        Box::new(PathModel::new(self.initial_window, now, current_mtu))
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Phase {
    Startup { best: u64, stalls: u32 },
    Drain,
    Cruise { step: usize },
    ProbeRtt { until: Instant, lowest: Duration },
}

const STARTUP: Phase = Phase::Startup { best: 0, stalls: 0 };

/// What one round trip has shown so far.
#[derive(Debug, Clone, Copy, Default)]
struct Round {
    delivered: u64,
    lost: u64,
    marked: bool,
    app_limited: bool,
    lowest_rtt: Option<Duration>,
}

/// The controller. See the module's documentation.
#[derive(Debug, Clone)]
struct PathModel {
    initial_window: u64,
    mtu: u64,
    window: u64,
    phase: Phase,
    delivery: Delivery,
    /// Highest delivery rates, bytes a second.
    rates: MaxFilter,
    min_rtt: Option<Duration>,
    min_rtt_at: Instant,
    smoothed_rtt: Duration,
    /// Packet number whose acknowledgement ends the round.
    round_end: u64,
    last_sent: u64,
    round: Round,
    /// Upper bound on the window after congestion.
    ceiling: Option<u64>,
    /// The round after a cut still shows the losses of before.
    cut_last_round: bool,
    newest_acked: Option<Instant>,
    acked_now: u64,
}

impl PathModel {
    fn new(initial_window: u64, now: Instant, mtu: u16) -> Self {
        let initial_window = initial_window.clamp(INITIAL_WINDOW, MAX_WINDOW);
        Self {
            initial_window,
            mtu: u64::from(mtu),
            window: initial_window,
            phase: STARTUP,
            delivery: Delivery::new(now),
            rates: MaxFilter::default(),
            min_rtt: None,
            min_rtt_at: now,
            smoothed_rtt: Duration::ZERO,
            round_end: 0,
            last_sent: 0,
            round: Round::default(),
            ceiling: None,
            cut_last_round: false,
            newest_acked: None,
            acked_now: 0,
        }
    }

    fn min_window(&self) -> u64 {
        MIN_WINDOW_PACKETS * self.mtu
    }

    /// Bytes that the path carries in `span`; zero while nothing is known.
    fn carried_in(&self, span: Duration) -> u64 {
        let bytes = u128::from(self.rates.max()) * span.as_nanos() / 1_000_000_000;
        u64::try_from(bytes).unwrap_or(MAX_WINDOW).min(MAX_WINDOW)
    }

    fn bdp(&self) -> u64 {
        self.min_rtt.map_or(0, |rtt| self.carried_in(rtt))
    }

    fn on_rtt_sample(&mut self, now: Instant, sample: Duration) {
        let lowest = &mut self.round.lowest_rtt;
        *lowest = Some(lowest.map_or(sample, |lowest| lowest.min(sample)));
        if let Phase::ProbeRtt { lowest, .. } = &mut self.phase {
            *lowest = sample.min(*lowest);
        }
        match self.min_rtt {
            Some(min) if sample >= min => {
                // Jitter rarely repeats the exact minimum; near it is proof enough that no queue
                // hides it.
                if sample <= min + min / 16 + Duration::from_millis(1) {
                    self.min_rtt_at = now;
                }
            }
            _ => {
                self.min_rtt = Some(sample);
                self.min_rtt_at = now;
            }
        }
    }

    fn end_round(&mut self) {
        let round = std::mem::take(&mut self.round);
        self.round_end = self.last_sent;
        self.rates.next_round();
        let seen = round.delivered + round.lost;
        let lossy = round.lost >= LOSS_PACKETS * self.mtu
            && round.lost * 100 > seen.saturating_mul(LOSS_PERCENT);
        let congested = (lossy || round.marked) && !self.cut_last_round;
        let rate = self.rates.max();
        match self.phase {
            Phase::Startup { best, stalls } => {
                let grown = rate * 4 >= best * 5;
                let stalls = match (grown, round.app_limited) {
                    (true, _) => 0,
                    (false, true) => stalls,
                    (false, false) => stalls + 1,
                };
                let queued = match (round.lowest_rtt, self.min_rtt) {
                    (Some(now), Some(min)) => now > min + min / 2 + 2 * TIMER_GRAIN,
                    _ => false,
                };
                self.phase = if stalls >= STARTUP_STALLS || queued || congested {
                    Phase::Drain
                } else {
                    Phase::Startup { best: if grown { rate } else { best }, stalls }
                };
            }
            Phase::Cruise { step } => {
                if congested {
                    let cut = self.window * CUT_PERCENT / 100;
                    self.ceiling = Some(cut.max(self.bdp() / 2));
                } else if let Some(ceiling) = self.ceiling {
                    let recovered = ceiling * RECOVERY_PERCENT / 100;
                    self.ceiling = Some(recovered).filter(|&ceiling| ceiling < 2 * self.bdp());
                }
                // A rate that grew by a tenth in a round says that the path has more to give:
                // go on asking, a quarter more each round, instead of once in eight.
                let climbing = !congested && rate * 10 >= self.rates.previous() * 11;
                let next = if climbing { 0 } else { (step + 1) % CRUISE_PERCENT.len() };
                self.phase = Phase::Cruise { step: next };
            }
            Phase::Drain | Phase::ProbeRtt { .. } => {}
        }
        self.cut_last_round = congested;
        self.rates.remember();
    }

    fn advance_phase(&mut self, now: Instant, in_flight: u64) {
        match self.phase {
            Phase::Drain if in_flight <= self.bdp() => {
                self.phase = Phase::Cruise { step: 2 };
            }
            Phase::Cruise { .. }
                if now.saturating_duration_since(self.min_rtt_at) > MIN_RTT_AGE =>
            {
                // One round trip to empty the queue, and the named time to look.
                let lowest = self.min_rtt.unwrap_or_default();
                let until = now + 2 * lowest + PROBE_RTT_TIME;
                self.phase = Phase::ProbeRtt { until, lowest: Duration::MAX };
            }
            Phase::ProbeRtt { until, lowest } if now >= until => {
                if lowest < Duration::MAX {
                    self.min_rtt = Some(lowest);
                }
                self.min_rtt_at = now;
                self.phase = Phase::Cruise { step: 2 };
            }
            _ => {}
        }
    }

    fn delay_not_held_against_the_path(&self) -> Duration {
        let Some(min) = self.min_rtt else { return Duration::ZERO };
        self.smoothed_rtt.saturating_sub(min).min(min / DELAY_SHARE + HOST_DELAY)
    }

    fn set_window(&mut self, acked: u64) {
        let bdp = self.bdp();
        let percent = match self.phase {
            Phase::Startup { .. } => STARTUP_PERCENT,
            Phase::Drain => DRAIN_PERCENT,
            Phase::Cruise { step } => CRUISE_PERCENT[step % CRUISE_PERCENT.len()],
            Phase::ProbeRtt { .. } => PROBE_RTT_PERCENT,
        };
        let slack = match self.phase {
            Phase::Cruise { .. } => TIMER_GRAIN.max(self.delay_not_held_against_the_path()),
            _ => TIMER_GRAIN,
        };
        let target = bdp * percent / 100 + self.carried_in(slack);
        let window = match self.phase {
            // As in slow start at most doubled in a round trip, and never below the start.
            Phase::Startup { .. } => {
                target.min(self.window + acked).max(self.window).max(self.initial_window)
            }
            _ => target.min(self.ceiling.unwrap_or(MAX_WINDOW)),
        };
        self.window = window.clamp(self.min_window(), MAX_WINDOW);
    }
}

impl Controller for PathModel {
    fn on_sent(&mut self, now: Instant, bytes: u64, last_packet_number: u64) {
        self.last_sent = last_packet_number;
        self.delivery.on_sent(now, bytes);
    }

    fn on_ack(
        &mut self,
        now: Instant,
        sent: Instant,
        bytes: u64,
        _app_limited: bool,
        rtt: &RttEstimator,
    ) {
        self.smoothed_rtt = rtt.get();
        self.delivery.on_ack(now, sent, bytes);
        self.newest_acked = self.newest_acked.max(Some(sent));
        self.acked_now += bytes;
    }

    fn on_end_acks(
        &mut self,
        now: Instant,
        in_flight: u64,
        app_limited: bool,
        largest_packet_num_acked: Option<u64>,
    ) {
        let acked = std::mem::take(&mut self.acked_now);
        self.round.delivered += acked;
        self.round.app_limited |= app_limited;
        if let Some(sent) = self.newest_acked.take() {
            self.on_rtt_sample(now, now.saturating_duration_since(sent));
        }
        if let Some(sample) = self.delivery.sample(now, in_flight, app_limited) {
            // A span shorter than the path cannot be told from acknowledgements in a clump.
            let long_enough = self.min_rtt.is_none_or(|min| sample.span >= min);
            if long_enough && (!sample.app_limited || sample.rate > self.rates.max()) {
                self.rates.insert(sample.rate);
            }
        }
        if largest_packet_num_acked.is_some_and(|largest| largest >= self.round_end) {
            self.end_round();
        }
        self.advance_phase(now, in_flight);
        self.set_window(acked);
    }

    fn on_congestion_event(
        &mut self,
        _now: Instant,
        _sent: Instant,
        is_persistent_congestion: bool,
        lost_bytes: u64,
    ) {
        self.round.lost += lost_bytes;
        self.round.marked |= lost_bytes == 0;
        if is_persistent_congestion {
            // For several timeouts nothing came through: what was known of the path is void.
            self.rates = MaxFilter::default();
            self.ceiling = None;
            self.phase = STARTUP;
            self.window = INITIAL_WINDOW.max(self.min_window());
            self.initial_window = self.window;
        }
    }

    fn on_mtu_update(&mut self, new_mtu: u16) {
        self.mtu = u64::from(new_mtu);
        self.window = self.window.max(self.min_window());
    }

    fn window(&self) -> u64 {
        self.window
    }

    fn clone_box(&self) -> Box<dyn Controller> {
        Box::new(self.clone())
    }

    fn initial_window(&self) -> u64 {
        self.initial_window
    }

    fn into_any(self: Box<Self>) -> Box<dyn Any> {
        self
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_loss_changes_nothing_and_a_dead_path_starts_anew() {
        let now = Instant::now();
        let mut model = PathModel::new(1 << 20, now, 1200);
        model.on_sent(now, 1200, 1);
        model.on_congestion_event(now, now, false, 1200);
        assert_eq!(model.window(), 1 << 20);
        model.on_congestion_event(now, now, true, 1200);
        assert_eq!(model.window(), INITIAL_WINDOW);
    }

    #[test]
    fn a_lossy_round_lowers_the_ceiling_once_and_it_recovers() {
        let now = Instant::now();
        let mut model = PathModel::new(0, now, 1200);
        model.min_rtt = Some(Duration::from_millis(100));
        model.rates.insert(10_000_000);
        model.phase = Phase::Cruise { step: 2 };
        model.set_window(0);
        let before = model.window();
        let lossy = Round { delivered: 900_000, lost: 100_000, ..Round::default() };
        model.round = lossy;
        model.end_round();
        model.set_window(0);
        let cut = model.window();
        assert_eq!(cut, before * CUT_PERCENT / 100);
        // The same losses, seen in the round after the cut.
        model.round = lossy;
        model.end_round();
        model.set_window(0);
        assert!(model.window() >= cut);
        for _ in 0..20 {
            model.round = Round { delivered: 1_000_000, ..Round::default() };
            model.end_round();
            model.set_window(0);
        }
        assert_eq!(model.ceiling, None);
        assert!(model.window() >= before * 85 / 100);
    }

    #[test]
    fn loss_below_the_threshold_is_the_paths_nature() {
        let mut model = PathModel::new(0, Instant::now(), 1200);
        model.phase = Phase::Cruise { step: 2 };
        model.round = Round { delivered: 980_000, lost: 20_000, ..Round::default() };
        model.end_round();
        assert_eq!(model.ceiling, None);
    }
}
