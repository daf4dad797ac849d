//! Who else is on the path, as far as queue and losses tell, and what a session concedes to them.
//!
//! Invariant: a session that is alone concedes nothing: alone it leaves no queue that stands.
//!
//! Two signs and two answers:
//! - A queue stands although the session sends no more than it saw delivered: others fill the path too,
//!   and what it once saw is more than its share. It falls back to what it gets now and a little less,
//!   round after round until the queue is gone, unless its last probe has shown that it has less than
//!   half: the smaller a session's share, the more a probe gains. So sessions that all do this meet in
//!   the middle; so do a session and CUBIC. It is also how a path that became slower is followed at once.
//! - Round after round loses too much before a standing queue: a rival takes no notice of losses (BBR,
//!   version 1), and each reduction is a gift to it. The session then holds what it has: losses count
//!   only if they are many, and it probes as often as such a rival does, for as long as that gains.
//!
//! Tried and given up: a higher bound of loss for all times (CUBIC starves), reductions that are held up
//! without more probes (who comes second to BBR stays small), longer probes for all (who came first keeps
//! the path), forgetting the highest rate sooner, conceding 15 to 30 percent (slower to meet than 10),
//! conceding whatever the share (who comes second to BBR starves), an end of the time after a probe
//! after two to five rounds whoever is there (sessions meet more slowly).

use super::bbr::{Bbr, State, carried};
use super::cycle::Phase;

/// A standing queue is longer than one part in so many of the round trip, for that many rounds.
const STANDING_SHARE: u32 = 8;
const STANDING_ROUNDS: u32 = 2;
/// Rounds after a probe in which the queue may still be the probe's own.
const PROBE_QUEUE_ROUNDS: u64 = 3;
/// What is kept of a rate that makes a queue stand.
const CONCEDED_PERCENT: u64 = 90;
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
/// Rounds after a probe for which it sends less, while holding.
const HOLD_DOWN_ROUNDS: u64 = 2;
const HOLD_GROWTH: f64 = 1.06;
/// The same in other times, and what one probe must gain for the next to go on: where there is room,
/// or where its session has less than half of the path, a probe by a quarter gains that much.
const LONGER_GROWTH: f64 = 1.12;

/// What was seen of others.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Rivals {
    queued_rounds: u32,
    score: u32,
    holds: bool,
    /// Rates before a probe and in its last round; its rounds, and whether the last has gained.
    before: u64,
    probed: u64,
    pub(super) rounds: u32,
    gains: bool,
    /// The last probe gained so much that the session has less than half of the path, or there is room:
    /// the next may go on for as long as it gains, and until then nothing is conceded.
    longer: bool,
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

    /// Whether a probe has had the time for its queue to go: what still stands is the rival's.
    pub(super) fn is_holding_on(&self) -> bool {
        self.rivals.holds && self.cycle.rounds >= HOLD_DOWN_ROUNDS
    }

    /// A probe begins.
    pub(super) fn start_gaining(&mut self) {
        self.rivals.before = self.rate_latest();
        self.rivals.probed = self.rivals.before;
        self.rivals.rounds = 0;
        self.rivals.gains = self.rivals.longer || self.rivals.holds;
    }

    /// A probe is over and has shown `most` bytes a second: whether the next may be longer.
    pub(super) fn end_gaining(&mut self, most: u64) {
        self.rivals.longer = most as f64 >= self.rivals.before as f64 * LONGER_GROWTH;
        self.rise_in_the_background(self.rivals.before, most);
    }

    /// Whether a probe that has filled what it may gains by going on.
    pub(super) fn still_gains(&mut self) -> bool {
        if self.round_start {
            self.rivals.rounds += 1;
            let latest = self.rate_latest();
            let before = std::mem::replace(&mut self.rivals.probed, latest);
            let growth = if self.rivals.holds { HOLD_GROWTH } else { LONGER_GROWTH };
            // What the first round of it has brought is known at the end of the second.
            self.rivals.gains = (self.rivals.rounds < 2 && self.rivals.gains)
                || self.rivals.probed as f64 >= before as f64 * growth;
        }
        self.rivals.gains
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
                Phase::Down => self.cycle.rounds >= PROBE_QUEUE_ROUNDS,
                Phase::Refill | Phase::Up => false,
            };
        rivals.queued_rounds = if is_others && queued { rivals.queued_rounds + 1 } else { 0 };
        let latest = self.rate_latest();
        if self.rivals.queued_rounds >= STANDING_ROUNDS
            && !self.rivals.holds
            && !self.rivals.longer
            && (1..self.bandwidth()).contains(&latest)
        {
            self.concede(latest * CONCEDED_PERCENT / 100);
        }
    }
}
