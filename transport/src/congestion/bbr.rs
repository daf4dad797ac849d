//! BBR, version 3: what the path delivers and how long it takes, and how much may be in flight.
//!
//! After draft-ietf-ccwg-bbr (the names are the draft's); where this differs it says so and why.
//! ```text
//!  Startup -> Drain -> ProbeBW: Down -> Cruise -> Refill -> Up -> Down ..
//!                         any state --(lowest round trip too old)--> ProbeRTT -> back
//!                  in the background, ProbeBW --(others need the path)--> Yield -> Startup
//! ```
//! Invariant: once the pipe was full the pacing rate is a gain times the bandwidth of the model, and the
//! window never falls below [`WINDOW_MIN_PACKETS`]; one loss changes neither.

use std::collections::VecDeque;
use std::time::{Duration, Instant};

use super::background::Background;
use super::cycle::{Cycle, Phase};
use super::delivery::{Delivery, Flight, Sample};
use super::full_pipe::FullPipe;
use super::rivals::Rivals;
use super::round_trip::{MIN_RTT_SHARE, STARTUP_QUEUE_SHARE};

/// Least window, in packets. The draft has 4; with so few the receiver's delayed acknowledgements and
/// a busy host's timers, not the path, decide how fast it goes.
const WINDOW_MIN_PACKETS: u64 = 16;
/// Largest window. quinn's pacer counts in 32 bits; no path needs this much.
const WINDOW_MAX: u64 = 1 << 30;
/// 4 ln 2: doubles the delivery rate every round.
const STARTUP_PACING_GAIN: f64 = 2.77;
const STARTUP_WINDOW_GAIN: f64 = 2.0;
const DRAIN_PACING_GAIN: f64 = 0.5;
/// Share of the bandwidth that is left to small errors of the estimate, so that no queue stays.
const PACING_MARGIN: f64 = 0.01;
/// Timers and batches of packets: what may be in flight beyond the model's BDP.
const QUANTUM_TIME: Duration = Duration::from_millis(2);
/// Rounds whose extra acknowledgements are forgotten together.
const EXTRA_ROUNDS: u32 = 5;
/// Share of a flight whose loss says that it was too large.
const LOSS_PERCENT: u64 = 2;
/// Fewer lost packets than this say nothing about a share.
const LOSS_PACKETS: u64 = 12;
/// Rounds in a row that may lose too much without a queue to be seen.
const LOSSY_ROUNDS: u32 = 2;
/// What is kept of a bound that was too high.
pub(super) const BETA_PERCENT: u64 = 70;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum State {
    Startup,
    Drain,
    ProbeBw,
    /// Little is in flight, to see the path without queue.
    ProbeRtt {
        /// When it has been looked at for long enough; not yet known while the queue empties.
        done: Option<Instant>,
        round_done: bool,
        lowest: Option<Duration>,
    },
    /// Next to nothing is sent while others need the path: only in the background.
    Yield,
}

/// The model and what it wants. Sizes in bytes, rates in bytes a second.
#[derive(Debug, Clone)]
pub(super) struct Bbr {
    initial_window: u64,
    /// What the start begins with.
    first_window: u64,
    mtu: u64,
    window: u64,
    pacing_rate: u64,
    pub(super) state: State,
    pub(super) cycle: Cycle,
    delivery: Delivery,
    next_round_delivered: u64,
    pub(super) round_start: bool,
    /// Highest delivery rates of this cycle of probing and of the one before.
    rates: [u64; 2],
    pub(super) min_rtt: Option<Duration>,
    pub(super) min_rtt_at: Instant,
    pub(super) full: FullPipe,
    /// How much more was acknowledged than the bandwidth explains, by [`EXTRA_ROUNDS`] each.
    extra_acked: [u64; 2],
    extra_rounds: u32,
    ack_epoch: (Instant, u64),
    /// Short-term bounds: losses outside of a probe.
    rate_short: Option<u64>,
    flight_short: Option<u64>,
    /// Long-term bound: what a probe has found too much.
    pub(super) flight_long: Option<u64>,
    rate_latest: u64,
    delivered_latest: u64,
    round_lost: u64,
    round_delivered: u64,
    /// The newest round trips, and whether they are longer than the path.
    pub(super) newest_rtts: VecDeque<Duration>,
    /// Rounds in a row that lost too much, and no probe to blame.
    lossy_rounds: u32,
    /// The window has held something back in this round.
    pub(super) window_limited: bool,
    pub(super) prior_window: u64,
    pub(super) background: Background,
    pub(super) rivals: Rivals,
}

impl Bbr {
    pub(super) fn new(initial_window: u64, now: Instant, mtu: u64) -> Self {
        Self {
            initial_window,
            first_window: initial_window,
            mtu,
            window: initial_window,
            pacing_rate: 0,
            state: State::Startup,
            cycle: Cycle::new(now),
            delivery: Delivery::new(now),
            next_round_delivered: 0,
            round_start: false,
            rates: [0; 2],
            min_rtt: None,
            min_rtt_at: now,
            full: FullPipe::default(),
            extra_acked: [0; 2],
            extra_rounds: 0,
            ack_epoch: (now, 0),
            rate_short: None,
            flight_short: None,
            flight_long: None,
            rate_latest: 0,
            delivered_latest: 0,
            round_lost: 0,
            round_delivered: 0,
            newest_rtts: VecDeque::new(),
            lossy_rounds: 0,
            window_limited: false,
            prior_window: initial_window,
            background: Background::new(now),
            rivals: Rivals::default(),
        }
    }

    pub(super) fn window(&self) -> u64 {
        self.window
    }

    pub(super) fn initial_window(&self) -> u64 {
        self.initial_window
    }

    pub(super) fn pacing_rate(&self) -> u64 {
        self.pacing_rate
    }

    /// Bytes a second that the path is thought to deliver to us.
    pub(super) fn bandwidth(&self) -> u64 {
        let most = self.max_rate();
        self.rate_short.map_or(most, |short| short.min(most))
    }

    pub(super) fn mtu(&self) -> u64 {
        self.mtu
    }

    pub(super) fn max_rate(&self) -> u64 {
        self.rates[0].max(self.rates[1])
    }

    /// Highest rate of this round.
    pub(super) fn rate_latest(&self) -> u64 {
        self.rate_latest
    }

    /// Highest rate of this cycle of probing.
    pub(super) fn newest_max_rate(&self) -> u64 {
        self.rates[1]
    }

    /// Takes `rate` for what the path delivers, whatever it once did.
    pub(super) fn concede(&mut self, rate: u64) {
        self.rates = [rate, 0];
    }

    pub(super) fn min_rtt(&self) -> Duration {
        self.min_rtt.unwrap_or_default()
    }

    pub(super) fn on_mtu(&mut self, mtu: u64) {
        self.mtu = mtu;
        self.window = self.window.max(self.min_window());
    }

    pub(super) fn on_sent(&mut self, now: Instant, bytes: u64) {
        if self.delivery.in_flight() == 0 {
            self.ack_epoch = (now, 0);
            // Silence says nothing about the path, and is no reason to begin with looking at it.
            self.min_rtt_at = now;
        }
        self.delivery.on_sent(now, bytes);
        self.window_limited |= self.delivery.in_flight() + 2 * self.mtu >= self.window;
    }

    pub(super) fn on_ack(&mut self, now: Instant, sent: Instant, bytes: u64) {
        self.delivery.on_ack(now, sent, bytes);
    }

    /// Ends a batch of acknowledgements.
    pub(super) fn on_acks(
        &mut self,
        now: Instant,
        acked: u64,
        rtt: Option<Duration>,
        in_flight: u64,
        app_limited: bool,
    ) {
        self.round_delivered += acked;
        let sample = self.delivery.sample(now, in_flight, app_limited);
        self.round_start = false;
        if let Some(sample) = sample {
            self.update_round(&sample);
            self.update_rate(&sample);
        }
        self.update_extra_acked(now, acked);
        if let Some(rtt) = rtt {
            self.update_min_rtt(now, rtt);
        }
        if let Some(sample) = sample {
            self.check_full_pipe(&sample);
            self.advance(now, &sample, in_flight, acked);
        }
        self.check_probe_rtt(now, rtt, in_flight);
        self.look_for_others(now);
        if self.round_start {
            self.end_round(now, sample.as_ref());
        }
        self.set_pacing_rate();
        self.set_window(acked);
    }

    fn update_round(&mut self, sample: &Sample) {
        if sample.prior_delivered >= self.next_round_delivered {
            self.next_round_delivered = self.delivery.delivered();
            self.round_start = true;
            self.cycle.rounds += 1;
        }
    }

    fn update_rate(&mut self, sample: &Sample) {
        // A span shorter than the path cannot be told from acknowledgements in a clump.
        if self.min_rtt.is_some_and(|min| sample.span < min) {
            return;
        }
        self.rate_latest = self.rate_latest.max(sample.rate);
        self.delivered_latest = self.delivered_latest.max(sample.delivered);
        if !sample.app_limited || sample.rate >= self.max_rate() {
            self.rates[1] = self.rates[1].max(sample.rate);
        }
    }

    /// Forgets the cycle before the last.
    pub(super) fn next_rate_cycle(&mut self) {
        if self.rates[1] > 0 {
            self.rates = [self.rates[1], 0];
        }
    }

    /// Acknowledgements come in clumps; what comes beyond the bandwidth may be in flight on top.
    fn update_extra_acked(&mut self, now: Instant, acked: u64) {
        if self.round_start && self.full.reached {
            self.extra_rounds += 1;
            if self.extra_rounds >= EXTRA_ROUNDS {
                (self.extra_rounds, self.extra_acked) = (0, [self.extra_acked[1], 0]);
            }
        }
        let (began, sum) = self.ack_epoch;
        let expected = carried(self.bandwidth(), now.saturating_duration_since(began));
        let (began, sum, expected) =
            if sum <= expected { (now, 0, 0) } else { (began, sum, expected) };
        let sum = sum + acked;
        self.ack_epoch = (began, sum);
        let extra = (sum - expected.min(sum)).min(self.window);
        self.extra_acked[1] = self.extra_acked[1].max(extra);
    }

    fn advance(&mut self, now: Instant, sample: &Sample, in_flight: u64, acked: u64) {
        if self.state == State::ProbeBw {
            self.probe_bandwidth(now, sample, in_flight, acked);
        }
        if self.state == State::Startup {
            // The draft waits for three rounds without growth, in which a whole BDP is queued or
            // lost. A queue that is seen says the same sooner.
            self.full.reached |= !sample.app_limited
                && (self.is_queued(STARTUP_QUEUE_SHARE) || self.is_probe_over());
            if self.full.reached {
                self.state = State::Drain;
            }
        }
        if self.state == State::Drain && in_flight <= self.bdp(1.0) {
            self.enter_probe_bw(now);
        }
    }

    fn enter_probe_bw(&mut self, now: Instant) {
        self.state = State::ProbeBw;
        self.start_down(now);
    }

    /// Starts anew on a path that is known, from `rate` bytes a second.
    pub(super) fn restart_from(&mut self, rate: u64) {
        self.state = State::Startup;
        self.full = FullPipe::default();
        self.rates = [0, rate];
        self.pacing_rate = rate;
        (self.first_window, self.flight_long) = (0, None);
        self.reset_short();
    }

    pub(super) fn leave_probe_rtt(&mut self, now: Instant) {
        self.reset_short();
        self.window = self.window.max(self.prior_window);
        if self.full.reached {
            self.enter_probe_bw(now);
            self.start_cruise();
        } else {
            self.state = State::Startup;
        }
    }

    pub(super) fn start_round(&mut self) {
        self.next_round_delivered = self.delivery.delivered();
    }

    pub(super) fn reset_short(&mut self) {
        (self.rate_short, self.flight_short) = (None, None);
    }

    fn end_round(&mut self, now: Instant, sample: Option<&Sample>) {
        let probing =
            self.state == State::ProbeBw && matches!(self.cycle.phase, Phase::Refill | Phase::Up);
        let of = self.round_lost + self.round_delivered;
        self.count_rivals(is_share(self.round_lost, of, LOSS_PERCENT, self.mtu));
        if self.is_too_much(self.round_lost, of) {
            let state = self.state;
            match state {
                // Bursts of loss come alone. What a rival or a policer takes stays away.
                _ if self.lossy_rounds < LOSSY_ROUNDS && !self.is_queued(MIN_RTT_SHARE) => {
                    self.lossy_rounds += 1;
                }
                _ if self.gives_way_to_losses(now) => {}
                State::Startup => {
                    self.full.reached = true;
                    self.flight_long = Some(self.bdp(1.0).max(self.delivered_latest));
                }
                _ if !probing => {
                    let keep = |bound: u64| bound * BETA_PERCENT / 100;
                    let rate = self.rate_short.unwrap_or_else(|| self.max_rate());
                    let flight = self.flight_short.unwrap_or(self.window);
                    let (least_rate, least_flight) = self.held();
                    self.rate_short = Some(self.rate_latest.max(keep(rate)).max(least_rate));
                    let flight = self.delivered_latest.max(keep(flight)).max(least_flight);
                    self.flight_short = Some(flight);
                }
                _ => {}
            }
        } else {
            self.lossy_rounds = 0;
        }
        (self.round_lost, self.round_delivered) = (0, 0);
        self.window_limited = false;
        self.rate_latest = sample.map_or(0, |sample| sample.rate);
        self.delivered_latest = sample.map_or(0, |sample| sample.delivered);
    }

    pub(super) fn is_too_much(&self, lost: u64, of: u64) -> bool {
        is_share(lost, of, self.loss_percent(LOSS_PERCENT), self.mtu)
    }

    pub(super) fn on_lost(&mut self, now: Instant, sent: Instant, bytes: u64) {
        self.round_lost += bytes;
        if let Some(Flight { bytes, lost }) = self.delivery.on_lost(sent, bytes)
            && self.state == State::ProbeBw
            && self.is_too_much(lost, bytes)
        {
            self.probe_was_too_much(now, bytes);
        }
        self.set_window(0);
        self.set_pacing_rate();
    }

    /// A router has marked packets instead of dropping them.
    pub(super) fn on_mark(&mut self) {
        self.round_lost += self.round_delivered / 20 + LOSS_PACKETS * self.mtu;
    }

    /// For several timeouts nothing came through: what was known of the path is void.
    pub(super) fn on_dead_path(&mut self, now: Instant) {
        let delivery = self.delivery.clone();
        let on = self.background.is_on();
        *self = Self { delivery, ..Self::new(super::INITIAL_WINDOW, now, self.mtu) };
        self.set_background(now, on);
        self.start_round();
    }

    fn min_window(&self) -> u64 {
        WINDOW_MIN_PACKETS * self.mtu
    }

    /// Bytes that the path holds, times `gain`.
    pub(super) fn bdp(&self, gain: f64) -> u64 {
        match self.min_rtt {
            Some(rtt) if self.max_rate() > 0 => {
                let bdp = (carried(self.bandwidth(), rtt) as f64 * gain) as u64;
                bdp.max(self.min_window())
            }
            _ => self.initial_window,
        }
    }

    fn set_pacing_rate(&mut self) {
        let rate = self.bandwidth() as f64 * (1.0 - PACING_MARGIN);
        let gain = match self.state {
            State::Startup if self.background.is_on() => {
                self.background.startup_gain(self.bandwidth())
            }
            State::Startup => STARTUP_PACING_GAIN,
            State::Drain => DRAIN_PACING_GAIN,
            State::ProbeBw => self.phase_gain(),
            State::ProbeRtt { .. } => 1.0,
            State::Yield => {
                self.pacing_rate = self.background.floor();
                return;
            }
        };
        let wanted = (rate * gain) as u64;
        if self.full.reached {
            self.pacing_rate = wanted.max(1);
            return;
        }
        // The first samples are of a handshake: the path bears the first window in a round trip.
        let first = self.min_rtt.map_or(0.0, |rtt| self.first_window as f64 / rtt.as_secs_f64());
        let first = (first * STARTUP_PACING_GAIN) as u64;
        self.pacing_rate = self.pacing_rate.max(wanted).max(first);
    }

    fn set_window(&mut self, acked: u64) {
        let gain = match self.state {
            State::Startup | State::Drain => STARTUP_WINDOW_GAIN,
            State::ProbeBw => self.cycle.phase.window_gain(),
            State::ProbeRtt { .. } => 1.0,
            State::Yield => {
                let some = carried(self.background.floor(), 2 * self.min_rtt());
                self.window = some.max(self.min_window());
                return;
            }
        };
        let extra =
            if self.full.reached { self.extra_acked[0].max(self.extra_acked[1]) } else { 0 };
        let quantum = carried(self.pacing_rate, QUANTUM_TIME).max(2 * self.mtu);
        let most = self.bdp(gain) + extra + quantum;
        let mut window = if self.full.reached {
            (self.window + acked).min(most)
        } else if self.window < most || self.delivery.delivered() < self.initial_window {
            self.window + acked
        } else {
            self.window
        };
        if self.full.reached {
            window = window.min(self.flight_bound());
        }
        if matches!(self.state, State::ProbeRtt { .. }) {
            window = window.min(self.probe_rtt_window());
        }
        self.window = window.clamp(self.min_window(), WINDOW_MAX);
    }

    /// What losses have shown to be the most that the path bears.
    fn flight_bound(&self) -> u64 {
        let long = match (self.state, self.cycle.phase) {
            (State::ProbeBw, Phase::Refill | Phase::Up | Phase::Down) => self.flight_long,
            _ => self.flight_with_headroom(),
        };
        long.unwrap_or(WINDOW_MAX).min(self.flight_short.unwrap_or(WINDOW_MAX))
    }
}

/// Whether `lost` bytes are more than `percent` of `of`, and enough to say so.
fn is_share(lost: u64, of: u64, percent: u64, mtu: u64) -> bool {
    lost >= LOSS_PACKETS * mtu && lost * 100 > of.saturating_mul(percent)
}

/// Bytes that `rate` bytes a second are in `span`.
pub(crate) fn carried(rate: u64, span: Duration) -> u64 {
    let bytes = u128::from(rate) * span.as_nanos() / 1_000_000_000;
    u64::try_from(bytes).unwrap_or(WINDOW_MAX)
}
