//! BBR's cycle of probing for bandwidth: less, as much, fill, more.
//!
//! Invariant: only `Up` sends more than the path was seen to deliver, and a flight that lost too much
//! ends it and bounds what comes after.

use std::time::{Duration, Instant};

use super::bbr::{BETA_PERCENT, Bbr};
use super::delivery::Sample;
use super::round_trip::MIN_RTT_SHARE;

/// Share of the long-term bound that is left to others while not probing.
const HEADROOM_PERCENT: u64 = 15;
/// Time from one probe to the next after one that lost too much, and after one that did not; up to a
/// quarter of it more. The draft waits two to three seconds in any case, for the sake of rivals that
/// only losses tell: a probe that lost nothing has cost them nothing.
const PROBE_WAIT: Duration = Duration::from_secs(2);
const PROBE_WAIT_CLEAN: Duration = Duration::from_millis(700);
/// The same on a path that has become a faster one, for so long.
const PROBE_WAIT_UNSTEADY: Duration = Duration::from_millis(400);
const UNSTEADY_TIME: Duration = Duration::from_secs(10);
/// Rounds from one probe to the next at least: its queue has to go first.
const PROBE_ROUNDS_MIN: u64 = 3;
/// Rounds from one probe to the next at most, as a Reno flow of that size would take to probe.
const PROBE_ROUNDS_MAX: u64 = 63;
/// In flight relative to the BDP at which a probe has filled what it may.
const UP_FLIGHT: f64 = 1.25;
/// Probes in a row that may lose too much without a queue to be seen.
const SUSPICIONS: u32 = 1;

/// What a probe that has found room sends, relative to what the path was seen to deliver.
const UP_FAST_GAIN: f64 = 2.0;

/// Where in the cycle.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Phase {
    Down,
    Cruise,
    Refill,
    Up,
}

impl Phase {
    pub(super) fn pacing_gain(self) -> f64 {
        match self {
            Self::Down => 0.9,
            Self::Cruise | Self::Refill => 1.0,
            Self::Up => 1.25,
        }
    }

    pub(super) fn window_gain(self) -> f64 {
        match self {
            Self::Up => 2.25,
            _ => 2.0,
        }
    }
}

/// The cycle's own state.
#[derive(Debug, Clone)]
pub(super) struct Cycle {
    pub(super) phase: Phase,
    /// Rounds since the last probe.
    pub(super) rounds: u64,
    since: Instant,
    wait: Duration,
    /// The acknowledgements of this round are still of the probe that has ended.
    ends_probe: bool,
    up_rounds: u32,
    up_acks: u64,
    up_count: u64,
    /// The long-term bound may be changed by what is seen now.
    samples: bool,
    /// The last probe lost too much.
    was_too_much: bool,
    /// Probes in a row that lost too much with no queue to be seen.
    suspicions: u32,
    /// The probe has found room.
    fast: bool,
    /// When the path was last seen to have become another.
    changed: Option<Instant>,
}

impl Cycle {
    pub(super) fn new(now: Instant) -> Self {
        Self {
            phase: Phase::Down,
            rounds: 0,
            since: now,
            wait: PROBE_WAIT,
            ends_probe: false,
            up_rounds: 0,
            up_acks: 0,
            up_count: u64::MAX,
            samples: false,
            was_too_much: false,
            suspicions: 0,
            fast: false,
            changed: None,
        }
    }

    /// What is sent now, relative to what the path was seen to deliver.
    pub(super) fn pacing_gain(&self) -> f64 {
        if self.phase == Phase::Up && self.fast { UP_FAST_GAIN } else { self.phase.pacing_gain() }
    }

    /// How long ago the probe began or ended, whichever came last.
    pub(super) fn age(&self, now: Instant) -> Duration {
        now.saturating_duration_since(self.since)
    }
}

impl Bbr {
    pub(super) fn start_down(&mut self, now: Instant) {
        self.cycle.up_count = u64::MAX;
        // As good as a die, and the same in each run of a test.
        let die = (self.max_rate() / 7 % 500) as u32;
        let changed = self.cycle.changed.map(|at| now.saturating_duration_since(at));
        let wait = if self.cycle.was_too_much || self.background.is_on() {
            PROBE_WAIT
        } else if changed.is_some_and(|age| age < UNSTEADY_TIME) {
            PROBE_WAIT_UNSTEADY
        } else {
            PROBE_WAIT_CLEAN
        };
        self.cycle.wait = wait + wait * die / 2_000;
        self.cycle.rounds = 0;
        self.cycle.since = now;
        self.cycle.ends_probe = true;
        self.cycle.phase = Phase::Down;
        self.start_round();
    }

    pub(super) fn start_cruise(&mut self) {
        self.cycle.phase = Phase::Cruise;
    }

    fn start_refill(&mut self) {
        self.reset_short();
        self.cycle.was_too_much = false;
        self.cycle.up_rounds = 0;
        self.cycle.up_acks = 0;
        self.cycle.ends_probe = false;
        self.cycle.phase = Phase::Refill;
        self.start_round();
    }

    fn start_up(&mut self, now: Instant) {
        self.cycle.fast = false;
        self.start_gaining();
        self.go_up(now);
    }

    /// Whether the last acknowledgements of a probe that has ended tell that there is room: it has ended
    /// before they could, and the next would come to where this one is only after a whole wait.
    fn was_too_short(&self) -> bool {
        matches!(self.cycle.phase, Phase::Down | Phase::Cruise)
            && !self.cycle.was_too_much
            && self.has_gained_all()
            && !self.is_queued(MIN_RTT_SHARE)
    }

    /// Goes on with the probe that has just ended.
    fn go_on_up(&mut self, now: Instant) {
        self.cycle.samples = true;
        self.go_on_gaining();
        self.go_up(now);
    }

    fn go_up(&mut self, now: Instant) {
        self.cycle.since = now;
        self.cycle.phase = Phase::Up;
        self.start_round();
        self.reset_full_pipe();
        self.raise_slope();
    }

    /// Takes the cycle on, with what an acknowledgement has shown.
    pub(super) fn probe_bandwidth(
        &mut self,
        now: Instant,
        sample: &Sample,
        in_flight: u64,
        acked: u64,
    ) {
        self.adapt_long(now, sample, acked);
        match self.cycle.phase {
            Phase::Down => {
                let bound = self.flight_with_headroom().unwrap_or(u64::MAX);
                if self.is_time_to_probe(now) {
                    self.start_refill();
                } else if (in_flight <= bound && in_flight <= self.bdp(1.0)) || self.is_down_over()
                {
                    self.start_cruise();
                }
            }
            Phase::Cruise if self.is_time_to_probe(now) => self.start_refill(),
            Phase::Cruise => {}
            Phase::Refill if self.round_start => {
                self.cycle.samples = true;
                self.start_up(now);
            }
            Phase::Refill => {}
            Phase::Up => {
                let bounded = self
                    .flight_long
                    .is_some_and(|long| self.window_limited && self.window() >= long);
                if bounded {
                    self.reset_full_pipe();
                }
                // The draft goes on until the rate has not grown for three rounds, a quarter of a
                // BDP more in the queue each. One such quarter with nothing gained tells as much.
                let gains = self.still_gains();
                if self.round_start {
                    self.cycle.fast = self.has_found_room();
                    if self.cycle.fast && self.is_another_path() {
                        self.cycle.changed = Some(now);
                    }
                }
                let filled = self.rivals.rounds >= 1 && in_flight >= self.bdp(UP_FLIGHT) && !gains;
                if self.is_pipe_full() || filled || self.is_probe_over() {
                    self.cycle.suspicions = 0;
                    self.start_down(now);
                }
            }
        }
    }

    fn adapt_long(&mut self, now: Instant, sample: &Sample, acked: u64) {
        if self.round_start && std::mem::take(&mut self.cycle.ends_probe) && !sample.app_limited {
            self.end_gaining(self.newest_max_rate());
            self.next_rate_cycle();
            if self.was_too_short() {
                self.go_on_up(now);
            }
        }
        let flight = sample.flight;
        let Some(long) = self.flight_long else { return };
        if self.is_too_much(flight.lost, flight.bytes) {
            return;
        }
        if flight.bytes > long {
            self.flight_long = Some(flight.bytes);
        }
        if self.cycle.phase == Phase::Up {
            self.raise_long(acked);
        }
    }

    /// Grows the long-term bound while a probe meets it: slowly, then ever faster.
    fn raise_long(&mut self, acked: u64) {
        let Some(long) = self.flight_long else { return };
        if !self.window_limited || self.window() < long {
            return;
        }
        self.cycle.up_acks += acked;
        if self.cycle.up_acks >= self.cycle.up_count {
            let delta = self.cycle.up_acks / self.cycle.up_count;
            self.cycle.up_acks -= delta * self.cycle.up_count;
            self.flight_long = Some(long + delta * self.mtu());
        }
        if self.round_start {
            self.raise_slope();
        }
    }

    fn raise_slope(&mut self) {
        let growth = self.mtu() << self.cycle.up_rounds.min(20);
        self.cycle.up_rounds = (self.cycle.up_rounds + 1).min(30);
        let count = self.window() * self.mtu() / growth.max(1);
        self.cycle.up_count = count.max(self.mtu());
    }

    /// A flight of that many bytes lost too much.
    pub(super) fn probe_was_too_much(&mut self, now: Instant, flight: u64) {
        if !self.cycle.samples {
            return;
        }
        self.cycle.samples = false;
        self.cycle.was_too_much = true;
        // A burst of loss that has nothing to do with us looks like this, and rarely comes twice.
        if !self.is_queued(MIN_RTT_SHARE) && self.cycle.suspicions < SUSPICIONS {
            self.cycle.suspicions += 1;
        } else {
            let least = self.bdp(1.0).min(self.window()) * BETA_PERCENT / 100;
            self.flight_long = Some(flight.max(least).max(self.held().1));
        }
        if self.cycle.phase == Phase::Up {
            self.start_down(now);
        }
    }

    pub(super) fn flight_with_headroom(&self) -> Option<u64> {
        let long = self.flight_long?;
        let headroom = (long * HEADROOM_PERCENT / 100).max(self.mtu());
        Some(long.saturating_sub(headroom))
    }

    /// After a probe that lost too much the number of rounds says nothing: on a short path they are
    /// over in no time.
    fn is_time_to_probe(&self, now: Instant) -> bool {
        let reno = (self.bdp(1.0).min(self.window()) / self.mtu()).min(PROBE_ROUNDS_MAX);
        (now.saturating_duration_since(self.cycle.since) > self.cycle.wait
            && self.cycle.rounds >= PROBE_ROUNDS_MIN)
            || self.is_rivals_turn()
            || (self.cycle.rounds >= reno && !self.cycle.was_too_much)
    }
}
