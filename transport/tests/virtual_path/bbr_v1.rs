//! TCP's BBR, version 1, as Linux has it.
//!
//! Invariant: it sends what it has seen delivered, and in one phase of eight a quarter more; losses
//! move its window for a round trip and its rate never.
//!
//! Left out: the detection of policers, and the allowance for acknowledgements in clumps.

use std::collections::VecDeque;
use std::time::Duration;

use tokio::time::Instant;

use super::tcp::{Ack, Control};

const HIGH_GAIN: f64 = 2.885;
const CYCLE: [f64; 8] = [1.25, 0.75, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0];
const WINDOW_GAIN: f64 = 2.0;
/// Linux sends a hundredth less than it has seen.
const MARGIN: f64 = 0.99;
const RATE_ROUNDS: u64 = 10;
const FULL_GROWTH: f64 = 1.25;
const FULL_ROUNDS: u32 = 3;
const MIN_RTT_AGE: Duration = Duration::from_secs(10);
const PROBE_RTT_TIME: Duration = Duration::from_millis(200);
const WINDOW_MIN: f64 = 4.0;
/// Bursts that a window has room for, and the time that fills one.
const BURSTS: f64 = 3.0;
const BURST_S: f64 = 0.001;

#[derive(Clone, Copy, PartialEq)]
enum Mode {
    Startup,
    Drain,
    ProbeBw { phase: usize, since: Instant },
    ProbeRtt { done: Option<(Instant, u64)> },
}

pub(crate) struct BbrV1 {
    mode: Mode,
    window: f64,
    prior_window: f64,
    /// Highest rates of the last rounds, falling: round, packets a second.
    rates: VecDeque<(u64, f64)>,
    rounds: u64,
    round_end: u64,
    min_rtt: Duration,
    min_rtt_at: Option<Instant>,
    full_rate: f64,
    full_rounds: u32,
    /// The packet and the round with which recovery from losses ends.
    recovery: Option<(u64, u64)>,
}

impl BbrV1 {
    pub(crate) fn new() -> Self {
        Self {
            mode: Mode::Startup,
            window: 10.0,
            prior_window: 0.0,
            rates: VecDeque::new(),
            rounds: 0,
            round_end: 0,
            min_rtt: Duration::MAX,
            min_rtt_at: None,
            full_rate: 0.0,
            full_rounds: 0,
            recovery: None,
        }
    }

    fn rate(&self) -> f64 {
        self.rates.front().map_or(0.0, |(_, rate)| *rate)
    }

    fn bdp(&self) -> f64 {
        self.rate() * self.min_rtt.as_secs_f64()
    }

    fn is_full(&self) -> bool {
        self.full_rounds >= FULL_ROUNDS
    }

    fn gains(&self) -> (f64, f64) {
        match self.mode {
            Mode::Startup => (HIGH_GAIN, HIGH_GAIN),
            Mode::Drain => (1.0 / HIGH_GAIN, HIGH_GAIN),
            Mode::ProbeBw { phase, .. } => (CYCLE[phase], WINDOW_GAIN),
            Mode::ProbeRtt { .. } => (1.0, 1.0),
        }
    }

    fn update_rate(&mut self, ack: &Ack) -> bool {
        let round = ack.prior_delivered >= self.round_end;
        if round {
            self.round_end = ack.delivered;
            self.rounds += 1;
        }
        while self.rates.back().is_some_and(|(_, rate)| *rate <= ack.rate) {
            self.rates.pop_back();
        }
        self.rates.push_back((self.rounds, ack.rate));
        while self.rates.front().is_some_and(|(round, _)| round + RATE_ROUNDS <= self.rounds) {
            self.rates.pop_front();
        }
        round
    }

    fn check_full(&mut self) {
        if self.is_full() {
            return;
        }
        if self.rate() >= self.full_rate * FULL_GROWTH {
            (self.full_rate, self.full_rounds) = (self.rate(), 0);
        } else {
            self.full_rounds += 1;
        }
    }

    fn advance(&mut self, ack: &Ack) {
        match self.mode {
            Mode::Startup if self.is_full() => self.mode = Mode::Drain,
            Mode::Drain if ack.in_flight as f64 <= self.bdp() => {
                self.mode = Mode::ProbeBw { phase: 2, since: ack.now };
            }
            Mode::ProbeBw { phase, since } => {
                let elapsed = ack.now - since > self.min_rtt;
                let in_flight = (ack.in_flight + ack.acked + ack.lost) as f64;
                let next = match phase {
                    0 => elapsed && (ack.lost > 0 || in_flight >= CYCLE[0] * self.bdp()),
                    1 => elapsed || in_flight <= self.bdp(),
                    _ => elapsed,
                };
                if next {
                    self.mode = Mode::ProbeBw { phase: (phase + 1) % 8, since: ack.now };
                }
            }
            _ => {}
        }
    }

    fn update_min_rtt(&mut self, ack: &Ack) {
        let old = self.min_rtt_at.is_some_and(|at| ack.now - at > MIN_RTT_AGE);
        if ack.rtt <= self.min_rtt || old {
            (self.min_rtt, self.min_rtt_at) = (ack.rtt, Some(ack.now));
        }
        match self.mode {
            Mode::ProbeRtt { done: None } if ack.in_flight as f64 <= WINDOW_MIN => {
                self.mode =
                    Mode::ProbeRtt { done: Some((ack.now + PROBE_RTT_TIME, self.rounds + 1)) };
            }
            Mode::ProbeRtt { done: Some((time, round)) }
                if ack.now >= time && self.rounds >= round =>
            {
                self.min_rtt_at = Some(ack.now);
                self.window = self.window.max(self.prior_window);
                self.mode = if self.is_full() {
                    Mode::ProbeBw { phase: 2, since: ack.now }
                } else {
                    Mode::Startup
                };
            }
            Mode::ProbeRtt { .. } => {}
            _ if old => {
                self.prior_window = self.window;
                self.mode = Mode::ProbeRtt { done: None };
            }
            _ => {}
        }
    }

    fn update_window(&mut self, ack: &Ack) {
        let (acked, in_flight) = (ack.acked as f64, ack.in_flight as f64);
        if ack.lost > 0 {
            self.window = (self.window - ack.lost as f64).max(1.0);
            if self.recovery.is_none() {
                self.prior_window = self.window + ack.lost as f64;
                self.recovery = Some((ack.next, self.rounds + 1));
                self.window = in_flight + acked;
            }
        }
        if let Some((until, round)) = self.recovery {
            if ack.newest >= until {
                self.recovery = None;
                self.window = self.window.max(self.prior_window);
            } else if self.rounds <= round {
                self.window = self.window.max(in_flight + acked);
                return;
            }
        }
        let target = self.bdp() * self.gains().1 + BURSTS * (self.rate() * BURST_S).max(2.0);
        if self.is_full() {
            self.window = (self.window + acked).min(target);
        } else if self.window < target || ack.delivered < 10 {
            self.window += acked;
        }
        self.window = self.window.max(WINDOW_MIN);
    }
}

impl Control for BbrV1 {
    fn on_ack(&mut self, ack: &Ack) {
        let round = self.update_rate(ack);
        if round {
            self.check_full();
        }
        self.advance(ack);
        self.update_min_rtt(ack);
        self.update_window(ack);
    }

    fn on_timeout(&mut self) {
        self.prior_window = self.prior_window.max(self.window);
        self.recovery = None;
        self.window = WINDOW_MIN;
    }

    fn window(&self) -> u64 {
        match self.mode {
            Mode::ProbeRtt { .. } => WINDOW_MIN as u64,
            _ => self.window as u64,
        }
    }

    fn pacing_rate(&self) -> Option<f64> {
        (self.rate() > 0.0).then(|| self.rate() * self.gains().0 * MARGIN)
    }
}
