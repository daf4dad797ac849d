//! Background: a session that takes what others leave.
//!
//! Invariant: a queue that stands and is not of its own probe takes a background session down to its
//! floor at once, and it grows again only when no queue was seen for [`FREE_ROUNDS`].
//!
//! As LEDBAT++ it goes by what round trips take longer than the path, and as there a slow look at the
//! path tells how long that is; the rest is simpler, because the model knows what it sends and when:
//! ```text
//!  ProbeBW --(a queue that is not ours, or losses)--> Yield --(free for a while)--> Startup -> ..
//! ```

use std::time::{Duration, Instant};

use super::bbr::{Bbr, State};
use super::cycle::Phase;

/// A queue of one part in so many of the round trip is one.
const QUEUE_SHARE: u32 = 32;
/// Share of a round trip for which a queue must stand: what is shorter is a burst.
const STANDING_SHARE: u32 = 4;
/// Rounds after a probe in which a queue may be its own.
const OWN_ROUNDS: u32 = 4;
/// What is kept each round of a rate that makes any queue at all.
const CORRECTED_PERCENT: u64 = 97;
/// Without a queue for so many rounds, and at least [`FREE_TIME`], the path is free: longer than the
/// cycle of a BBR flow, which fills the path and shows a queue only while it probes.
const FREE_ROUNDS: u32 = 10;
const FREE_TIME: Duration = Duration::from_millis(500);
/// What a yielding session still sends, as a part of what it had: it has to see the queue go.
const FLOOR_DIVISOR: u64 = 50;
/// At least so many packets a round trip, or else so many bytes a second, so that it sees enough: a
/// receiver acknowledges every second packet, and a queue that it learns of late it yields to late.
const FLOOR_PACKETS: u64 = 16;
const FLOOR_RATE: u64 = 125_000;
/// What a probe of a background session sends, relative to what the path was seen to deliver.
const UP_GAIN: f64 = 1.1;
/// What such a probe gains at least where there is room.
const RISE_GROWTH: f64 = 1.06;
/// How much faster it sends from round to round when it starts, and when it starts again after it has
/// yielded: there others were a moment ago, and what it has sent too much by the time that it sees a queue
/// is half a round trip's worth. The first steps from its floor are large all the same: they are of next to
/// nothing.
const STARTUP_GAIN: f64 = 2.0;
const STARTUP_AGAIN_GAIN: f64 = 1.5;
const LARGE_STEPS_TO: u64 = 32;
/// For how long the lowest round trip counts, at least; at most twice as long. Routes change, and
/// until a longer one is known as such it looks like a queue.
const BASE_TIME: Duration = Duration::from_secs(20);

/// What a background session keeps.
#[derive(Debug, Clone)]
pub(super) struct Background {
    on: bool,
    /// Bytes a second while yielding; 0 before it first did.
    floor: u64,
    /// Since when a queue is seen without a break, and since when none is.
    queued_since: Option<Instant>,
    clear_since: Instant,
    /// Lowest round trips of this span of [`BASE_TIME`] and of the one before.
    bases: [Option<Duration>; 2],
    base_since: Instant,
}

impl Background {
    pub(super) fn new(now: Instant) -> Self {
        Self {
            on: false,
            floor: 0,
            queued_since: None,
            clear_since: now,
            bases: [None; 2],
            base_since: now,
        }
    }

    pub(super) fn is_on(&self) -> bool {
        self.on
    }

    pub(super) fn floor(&self) -> u64 {
        self.floor
    }

    /// How much faster than `rate` it sends when it starts.
    pub(super) fn startup_gain(&self, rate: u64) -> f64 {
        let is_careful = self.floor > 0 && rate > self.floor.saturating_mul(LARGE_STEPS_TO);
        if is_careful { STARTUP_AGAIN_GAIN } else { STARTUP_GAIN }
    }

    /// The lowest round trip of the last while, `rtt` included.
    pub(super) fn base(&mut self, now: Instant, rtt: Duration) -> Duration {
        if now.saturating_duration_since(self.base_since) > BASE_TIME {
            self.base_since = now;
            self.bases = [self.bases[1], None];
        }
        let lowest = self.bases[1].map_or(rtt, |base| base.min(rtt));
        self.bases[1] = Some(lowest);
        self.bases[0].map_or(lowest, |base| base.min(lowest))
    }
}

impl Bbr {
    /// Makes it yield to others from now on, or take its share again.
    pub(super) fn set_background(&mut self, now: Instant, on: bool) {
        if self.background.on == on {
            return;
        }
        self.background = Background { on, bases: [None, self.min_rtt], ..Background::new(now) };
        if self.state == State::Yield {
            self.grow_again();
        }
    }

    /// Gain of a phase for what a session of this kind may do.
    pub(super) fn phase_gain(&self) -> f64 {
        let gain = self.cycle.pacing_gain();
        if self.background.on { gain.min(UP_GAIN) } else { gain }
    }

    /// Whether the path has a queue that ends a background session's probe.
    pub(super) fn is_probe_over(&self) -> bool {
        self.background.on && self.is_others_queue()
    }

    /// Looks for others, after each batch of acknowledgements.
    pub(super) fn look_for_others(&mut self, now: Instant) {
        if !self.background.on {
            return;
        }
        if self.is_others_queue() {
            self.background.queued_since.get_or_insert(now);
            self.background.clear_since = now;
        } else {
            self.background.queued_since = None;
        }
        match self.state {
            State::ProbeBw => {
                let stands = self.background.queued_since.is_some_and(|since| {
                    now.saturating_duration_since(since) > self.min_rtt() / STANDING_SHARE
                });
                if stands && !self.is_own_doing(now) {
                    self.give_way(now);
                }
            }
            State::Yield => {
                let free = (FREE_ROUNDS * self.min_rtt()).max(FREE_TIME);
                if now.saturating_duration_since(self.background.clear_since) > free {
                    self.grow_again();
                }
            }
            _ => {}
        }
    }

    /// Corrects a model that is a few percent too high, as a busy host makes it: the queue that comes of it
    /// grows slowly, and the session sends a little less before it would take that queue for others'.
    pub(super) fn correct_in_the_background(&mut self) {
        if self.background.on
            && self.state == State::ProbeBw
            && self.cycle.phase == Phase::Cruise
            && self.is_queued_by(self.turn())
        {
            self.concede(self.bandwidth() * CORRECTED_PERCENT / 100);
        }
    }

    /// Whether what is seen of the path may come of what this session itself has just sent.
    fn is_own_doing(&self, now: Instant) -> bool {
        match self.state {
            State::ProbeBw => {
                let recent = self.cycle.age(now) < OWN_ROUNDS * self.min_rtt();
                recent || self.cycle.phase == Phase::Up
            }
            State::Yield => false,
            State::Startup | State::Drain | State::ProbeRtt { .. } => true,
        }
    }

    /// A round has lost too much: true if that is others' doing and the session has yielded to them.
    pub(super) fn gives_way_to_losses(&mut self, now: Instant) -> bool {
        let gives_way = self.background.on && !self.is_own_doing(now);
        if gives_way {
            self.give_way(now);
        }
        gives_way
    }

    fn is_others_queue(&self) -> bool {
        self.is_queued_by(self.min_rtt() / QUEUE_SHARE + self.turn())
    }

    /// A packet is stamped before it waits for its turn at the pace of this session.
    fn turn(&self) -> Duration {
        let turn = self.mtu() as f64 / self.pacing_rate().max(1) as f64;
        Duration::from_secs_f64(turn.min(1.0))
    }

    fn give_way(&mut self, now: Instant) {
        let rtt_us = u64::try_from(self.min_rtt().as_micros()).unwrap_or(u64::MAX);
        let least = FLOOR_PACKETS * self.mtu() * 1_000_000 / rtt_us.max(1);
        self.background.floor = (self.max_rate() / FLOOR_DIVISOR).max(least.min(FLOOR_RATE));
        self.background.clear_since = now;
        self.state = State::Yield;
    }

    /// A probe has brought the rate from `before` to `most`. One that gains nearly all that it tried, and
    /// makes no queue, has found room for more than a probe: a start that another's passing queue has
    /// ended early would else be made up for in steps of a tenth.
    pub(super) fn rise_in_the_background(&mut self, before: u64, most: u64) {
        let gained = most as f64 >= before as f64 * RISE_GROWTH;
        if self.background.on && gained && before > 0 && !self.is_others_queue() {
            self.restart_from(most);
        }
    }

    fn grow_again(&mut self) {
        self.restart_from(self.background.floor);
    }
}
