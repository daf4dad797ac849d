//! Who else is on the path, as far as queue and losses tell, and what a session concedes to them.
//!
//! Invariant: a session that is alone concedes nothing: alone it leaves no queue that stands.
//!
//! Two signs and two answers:
//! - A queue stands although the session sends no more than it saw delivered: others fill the path too,
//!   and what it once saw is more than its share. It falls back to what it gets now, round after round
//!   until the queue is gone, and by the more the more it has beyond half: what probes gain tells how
//!   large a session's share is. So sessions that all do this meet in the middle; so do a session and
//!   CUBIC. It is also how a path that became slower is followed at once.
//! - Round after round loses too much before a standing queue: a rival takes no notice of losses (BBR,
//!   version 1), and each reduction is a gift to it. The session then holds what it has: losses count
//!   only if they are many, and it probes as often as such a rival does, for as long as that gains.
//!
//! Tried and given up: a higher bound of loss for all times (CUBIC starves), reductions that are held up
//! without more probes (who comes second to BBR stays small), longer probes for all (who came first keeps
//! the path), forgetting the highest rate sooner, conceding the same whatever the share (who comes second
//! to BBR starves) or nothing at all below half of the path (it depends on luck which of two sessions
//! concedes), less from a quarter of the path on (BBR again), a queue after a probe that counts only once
//! it no longer shrinks (who came first keeps the path), more the more packets are in flight (no fairer), what
//! comes of sending less after a probe not taken for what there is (less fair).

use super::bbr::{Bbr, State, carried};
use super::cycle::Phase;
use super::round_trip::MIN_RTT_SHARE;

/// A standing queue is longer than one part in so many of the round trip, for that many rounds. As short as
/// jitter allows: what a probe leaves is as long as its session's share is large, and if only that of a large
/// one is seen, only the small ones concede (with 8, who came first kept 62 % of the path).
const STANDING_SHARE: u32 = 20;
const STANDING_ROUNDS: u32 = 2;
/// Rounds after a probe in which a queue is the probe's own; in those up to the last it may still be,
/// unless it is longer than one part in so many of the round trip.
const PROBE_QUEUE_ROUNDS: u64 = 2;
const PROBE_QUEUE_ROUNDS_MAX: u64 = 3;
const PROBE_QUEUE_SHARE: u32 = 5;
/// Share of the path from which on a session concedes as much of its rate as it has more; and the most of
/// it, because who has all of it has met a slower path, not another.
const CONCEDES_FROM: f64 = 0.45;
const CONCEDES_MAX: f64 = 0.3;
/// What the newest probe counts in what is thought of the share, unless there were fewer than that: two
/// that probe at the same time mislead each other, and rarely twice.
const NEWEST_PROBE: f64 = 0.3;
/// What a lossy round counts, against one for a round that is not; from where on losses are a rival's
/// doing, and until when.
const LOSSY: u32 = 8;
const HOLD_FROM: u32 = 32;
const HOLD_UNTIL: u32 = 8;
const SCORE_MAX: u32 = 64;
/// Share of a flight whose loss is too much while holding.
const HOLD_LOSS_PERCENT: u64 = 20;
/// What losses may not take while holding: shares of the rate, and of what the path holds at it.
const HOLD_RATE_PERCENT: u64 = 85;
const HOLD_FLIGHT_PERCENT: u64 = 170;
/// Rounds from one probe to the next while holding, and the growth a round for which a probe goes on.
const HOLD_ROUNDS: u64 = 8;
/// Rounds after a probe for which it sends less, while holding and in other times: twice as many as the
/// queue of a probe needs to go. Sending less for as long as something stands took what jitter adds to a
/// round trip for a queue, and a fifth of a short path.
const HOLD_DOWN_ROUNDS: u64 = 2;
const DOWN_ROUNDS: u64 = 8;
const HOLD_GROWTH: f64 = 1.06;
/// The same in other times, and what one probe must gain for the next to go on: where there is room,
/// or where its session has less than half of the path, a probe by a quarter gains that much.
const LONGER_GROWTH: f64 = 1.12;
/// What a probe by a quarter gains where nobody else wants that much.
const ALL_GROWTH: f64 = 1.2;
/// What a probe has gained before it grows as a start does, and where the path must have become another.
const ROOM_GROWTH: f64 = 1.45;
const ANOTHER_PATH_GROWTH: f64 = 1.8;

/// What was seen of others.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Rivals {
    queued_rounds: u32,
    score: u32,
    holds: bool,
    /// Rates before a probe and in its last round; its rounds, and whether the last has gained.
    before: u64,
    probed: u64,
    /// What came of what was sent just before the probe, and the most that it has sent.
    steady: u64,
    tried: u64,
    pub(super) rounds: u32,
    gains: bool,
    /// The last probe gained so much that the session has less than half of the path, or there is room:
    /// the next may go on for as long as it gains.
    longer: bool,
    /// It gained all that it tried.
    gained_all: bool,
    /// Probes so far; which share of the path the session has by the last of them, and in their mean.
    probes: u32,
    newest_share: f64,
    share: f64,
}

impl Bbr {
    /// Percentage of a flight that may be lost.
    pub(super) fn loss_percent(&self, usual: u64) -> u64 {
        if self.rivals.holds { HOLD_LOSS_PERCENT } else { usual }
    }

    /// Rate and flight below which losses take nothing.
    pub(super) fn held(&self) -> (u64, u64) {
        if !self.rivals.holds {
            return (0, 0);
        }
        let rate = self.max_rate() * HOLD_RATE_PERCENT / 100;
        (rate, carried(self.max_rate(), self.min_rtt()) * HOLD_FLIGHT_PERCENT / 100)
    }

    /// Whether it is time for a probe because a rival probes as often.
    pub(super) fn is_rivals_turn(&self) -> bool {
        self.rivals.holds && self.cycle.rounds >= HOLD_ROUNDS
    }

    /// Whether a probe has had the time for its queue to go: what still stands is another's, or
    /// no queue at all.
    pub(super) fn is_down_over(&self) -> bool {
        let rounds = if self.rivals.holds { HOLD_DOWN_ROUNDS } else { DOWN_ROUNDS };
        self.cycle.rounds >= rounds
    }

    /// A probe begins.
    pub(super) fn start_gaining(&mut self) {
        self.rivals.before = self.rate_latest();
        self.rivals.probed = self.rivals.before;
        (self.rivals.steady, self.rivals.tried) = (self.rivals.before, 0);
        self.rivals.rounds = 0;
        self.rivals.gains = self.rivals.longer || self.rivals.holds;
    }

    /// A probe is over and has shown `most` bytes a second: whether the next may be longer.
    pub(super) fn end_gaining(&mut self, most: u64) {
        // Who sends g times as much on a full path gets g / (1 + (g - 1) x share) times as much.
        let times = |rate: u64, than: u64| rate as f64 / than.max(1) as f64;
        let tried = times(self.rivals.tried, self.rivals.steady);
        let got = times(most, self.rivals.steady);
        let share = ((tried / got - 1.0) / (tried - 1.0).max(0.01)).clamp(0.0, 1.0);
        self.rivals.probes += 1;
        let weight = NEWEST_PROBE.max(1.0 / f64::from(self.rivals.probes));
        self.rivals.share += weight * (share - self.rivals.share);
        self.rivals.newest_share = share;
        let grown = times(most, self.rivals.before);
        self.rivals.longer = grown >= LONGER_GROWTH;
        self.rivals.gained_all = grown >= ALL_GROWTH;
        self.rise_in_the_background(self.rivals.before, most);
    }

    /// Whether the last probe has brought all that it tried: nobody else wants that much.
    pub(super) fn has_gained_all(&self) -> bool {
        self.rivals.gained_all
    }

    /// A probe goes on after its end: what it gains counts from its beginning.
    pub(super) fn go_on_gaining(&mut self) {
        self.rivals.gains = true;
    }

    /// Whether a probe that has filled what it may gains by going on.
    pub(super) fn still_gains(&mut self) -> bool {
        self.rivals.tried = self.rivals.tried.max(self.pacing_rate());
        if self.round_start {
            self.rivals.rounds += 1;
            let latest = self.rate_latest();
            if self.rivals.rounds == 1 {
                self.rivals.steady = latest;
            }
            let before = std::mem::replace(&mut self.rivals.probed, latest);
            let growth = if self.rivals.holds { HOLD_GROWTH } else { LONGER_GROWTH };
            // What the first round of it has brought is known at the end of the second.
            self.rivals.gains = (self.rivals.rounds < 2 && self.rivals.gains)
                || self.rivals.probed as f64 >= before as f64 * growth;
        }
        self.rivals.gains
    }

    /// Whether a probe has brought all that it tried, twice, and no queue: nobody else wants that much.
    pub(super) fn has_found_room(&self) -> bool {
        !self.is_queued(MIN_RTT_SHARE) && self.has_grown(ROOM_GROWTH)
    }

    /// Whether a probe has brought so much that the path must have become another.
    pub(super) fn is_another_path(&self) -> bool {
        self.has_grown(ANOTHER_PATH_GROWTH)
    }

    fn has_grown(&self, times: f64) -> bool {
        self.rivals.rounds >= 2 && self.rivals.probed as f64 >= self.rivals.before as f64 * times
    }

    /// Takes account of a round; `lossy` if it lost too much by the usual measure.
    pub(super) fn count_rivals(&mut self, lossy: bool) {
        let queued = self.is_queued(STANDING_SHARE);
        // In the background it has yielded before it comes to this.
        let may_hold = !self.background.is_on();
        let rivals = &mut self.rivals;
        rivals.score = if lossy && queued {
            (rivals.score + LOSSY).min(SCORE_MAX)
        } else {
            rivals.score.saturating_sub(1)
        };
        let limit = if rivals.holds { HOLD_UNTIL } else { HOLD_FROM };
        rivals.holds = may_hold && rivals.score >= limit;
        let is_others = self.state == State::ProbeBw
            && match self.cycle.phase {
                Phase::Cruise => true,
                Phase::Down if self.cycle.rounds <= PROBE_QUEUE_ROUNDS_MAX => {
                    self.cycle.rounds >= PROBE_QUEUE_ROUNDS && self.is_queued(PROBE_QUEUE_SHARE)
                }
                Phase::Down => true,
                Phase::Refill | Phase::Up => false,
            };
        let rounds = if is_others && queued { self.rivals.queued_rounds + 1 } else { 0 };
        self.rivals.queued_rounds = rounds;
        self.correct_in_the_background();
        let latest = self.rate_latest();
        if self.rivals.queued_rounds >= STANDING_ROUNDS
            && !self.rivals.holds
            && (1..self.bandwidth()).contains(&latest)
        {
            // The newest alone tells when the path has become slower, the mean whose share is larger.
            let share = self.rivals.share.max(self.rivals.newest_share);
            let conceded = (share - CONCEDES_FROM).clamp(0.0, CONCEDES_MAX);
            self.concede((latest as f64 * (1.0 - conceded)) as u64);
        }
    }
}
