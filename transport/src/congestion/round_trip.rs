//! The round trip of the path without queue: how it is known, and looked at anew.
//!
//! Invariant: the lowest round trip is one that was seen, and is confirmed, or looked for with little
//! in flight, every few seconds.

use std::time::{Duration, Instant};

use super::bbr::{Bbr, State};

/// A round trip this old is measured anew: routes change, and who comes to a path that is queued takes
/// the queue for a part of it.
const PROBE_RTT_INTERVAL: Duration = Duration::from_secs(5);
/// Looking costs two to three round trips. The draft does it every five seconds on any path, which is
/// every eighth round trip where one takes 600 ms: beyond this length, which a queue rarely has, so many
/// times the rest is added.
const LONG_PATH: Duration = Duration::from_millis(200);
const PROBE_RTT_ROUNDS: u32 = 60;
const PROBE_RTT_WINDOW_GAIN: f64 = 0.5;
const PROBE_RTT_TIME: Duration = Duration::from_millis(200);
/// Newest round trips of which the shortest counts (as in HyStart++, RFC 9406).
const RTTS: usize = 8;
/// A round trip no longer than the lowest by this share and [`HOST_DELAY`] confirms it: jitter rarely
/// repeats the exact minimum, and the draft would stop for nothing every five seconds.
pub(super) const MIN_RTT_SHARE: u32 = 16;
/// A queue of one part in so many of the round trip ends the start.
pub(super) const STARTUP_QUEUE_SHARE: u32 = 4;
/// Round trips in a row that say how long the path is, in the background.
const CONFIRMING: usize = 3;
/// What a busy host may add to a round trip.
const HOST_DELAY: Duration = Duration::from_millis(1);

impl Bbr {
    pub(super) fn update_min_rtt(&mut self, now: Instant, rtt: Duration) {
        if self.newest_rtts.len() == RTTS {
            self.newest_rtts.pop_front();
        }
        self.newest_rtts.push_back(rtt);
        let confirms = |min: Duration| rtt <= min + min / MIN_RTT_SHARE + HOST_DELAY;
        if self.min_rtt.is_none_or(confirms) {
            self.min_rtt_at = now;
        }
        self.min_rtt = Some(if self.background.is_on() {
            // One that nobody confirms is a timer's: it would make a queue of the path itself.
            let confirmed = self.newest_rtts.iter().rev().take(CONFIRMING).max();
            self.background.base(now, confirmed.map_or(rtt, |longest| *longest))
        } else {
            self.min_rtt.map_or(rtt, |min| min.min(rtt))
        });
    }

    pub(super) fn check_probe_rtt(&mut self, now: Instant, rtt: Option<Duration>, in_flight: u64) {
        let State::ProbeRtt { done, round_done, lowest } = self.state else {
            // In the background no queue stands that would hide the path, unless it is another's.
            let beyond = self.min_rtt().saturating_sub(LONG_PATH);
            let interval = PROBE_RTT_INTERVAL + PROBE_RTT_ROUNDS * beyond;
            let old = now.saturating_duration_since(self.min_rtt_at) > interval;
            if old && !self.background.is_on() {
                self.prior_window = self.window();
                self.state = State::ProbeRtt { done: None, round_done: false, lowest: None };
            }
            return;
        };
        let Some(done) = done else {
            if in_flight <= self.probe_rtt_window() {
                let done = Some(now + PROBE_RTT_TIME.max(self.min_rtt()));
                self.state = State::ProbeRtt { done, round_done: false, lowest: None };
                self.start_round();
            }
            return;
        };
        let lowest = [lowest, rtt].into_iter().flatten().min();
        let round_done = round_done || self.round_start;
        if round_done && now >= done {
            self.min_rtt = lowest.or(self.min_rtt);
            self.min_rtt_at = now;
            self.leave_probe_rtt(now);
        } else {
            self.state = State::ProbeRtt { done: Some(done), round_done, lowest };
        }
    }

    pub(super) fn probe_rtt_window(&self) -> u64 {
        self.bdp(PROBE_RTT_WINDOW_GAIN)
    }

    /// Whether even the shortest of the newest round trips took longer than the path, by one part in
    /// `share` of it.
    pub(super) fn is_queued(&self, share: u32) -> bool {
        self.is_queued_by(self.min_rtt() / share)
    }

    /// As [`is_queued`](Self::is_queued), by more than `limit`.
    pub(super) fn is_queued_by(&self, limit: Duration) -> bool {
        let shortest = self.newest_rtts.iter().min();
        self.newest_rtts.len() == RTTS
            && shortest.is_some_and(|rtt| *rtt > self.min_rtt() + limit + 2 * HOST_DELAY)
    }
}
