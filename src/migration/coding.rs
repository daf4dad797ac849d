//! How hard a job compresses: by the slower of link and core, as it turns out.
//!
//! Invariant: one policy serves a job, so what disk bundles teach is known to memory batches, and what one
//! attempt learnt to the next.

use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use longhaul_dedup::compress::Level;
use longhaul_dedup::level::{Conditions, LevelPolicy};
use longhaul_dedup::lzma::Effort;

use super::coders;

/// Pages are coded while a guest may be waiting for them.
const DENSEST_OF_PAGES: Level = Level::Lzma(Effort::Quick);
/// What one turn weighs in the running averages.
const NEW_WEIGHT: f64 = 0.25;
/// Coders that have nothing to do for more than this share of their time wait for who reads.
const STARVING_ABOVE: f64 = 0.1;

/// A bundle that one of several coders has coded.
#[derive(Debug, Clone, Copy)]
pub(super) struct Turn {
    pub(super) level: Level,
    /// Bytes before.
    pub(super) payload: u64,
    /// Bytes after.
    pub(super) bytes: u64,
    /// How long the coding took.
    pub(super) busy: Duration,
    /// For how long the coder had waited for something to do, before.
    pub(super) starved: Duration,
    /// Since the bundle before it was coded, by any of them.
    pub(super) elapsed: Duration,
}

/// What a job's attempts have learnt of how hard to compress.
#[derive(Debug)]
pub struct Coding {
    state: Mutex<State>,
}

#[derive(Debug)]
struct State {
    policy: LevelPolicy,
    /// Shares of their time in which disk coders were busy or starving lately. At first it is the link
    /// that is not known yet, and no reason to compress harder.
    busy: f64,
    starving: f64,
    /// Bytes a second that they got through lately.
    pace: f64,
}

impl Default for Coding {
    fn default() -> Self {
        let state = State { policy: LevelPolicy::new(), busy: 1.0, starving: 0.0, pace: 0.0 };
        Self { state: Mutex::new(state) }
    }
}

impl Coding {
    /// The level for the next disk bundle of so many bytes, with a link of this rate before which so many
    /// bytes wait, coded.
    pub(super) fn level(&self, link_bytes_per_s: f64, ahead_bytes: u64, batch_bytes: u64) -> Level {
        let mut state = self.lock();
        let supply_bytes_per_s = match state.starving > STARVING_ABOVE {
            true => state.pace,
            false => f64::INFINITY,
        };
        let conditions = Conditions {
            link_bytes_per_s,
            supply_bytes_per_s,
            coders: coders::count() as u32,
            queue_fill: (1.0 - state.busy) as f32,
            ahead_bytes,
            batch_bytes,
        };
        state.policy.choose(&conditions)
    }

    /// What a disk bundle came to.
    pub(super) fn observe(&self, turn: &Turn) {
        let Turn { level, payload, bytes, busy, starved, elapsed } = *turn;
        let mut state = self.lock();
        let elapsed = elapsed.as_secs_f64().max(1e-6);
        let share = |of: Duration| (of.as_secs_f64() / (elapsed * coders::count() as f64)).min(1.0);
        state.busy += NEW_WEIGHT * (share(busy) - state.busy);
        state.starving += NEW_WEIGHT * (share(starved) - state.starving);
        state.pace += NEW_WEIGHT * (payload as f64 / elapsed - state.pace);
        state.policy.observe(level, payload, bytes, busy);
    }

    /// The level for the next batch of pages, which are coded one after the other, with this much of what
    /// may be under way in use (0 to 1).
    pub(super) fn page_level(&self, link_bytes_per_s: f64, queue_fill: f32) -> Level {
        let supply_bytes_per_s = f64::INFINITY;
        let conditions = Conditions {
            link_bytes_per_s,
            supply_bytes_per_s,
            coders: 1,
            queue_fill,
            ahead_bytes: 0,
            batch_bytes: 0,
        };
        self.lock().policy.choose(&conditions).min(DENSEST_OF_PAGES)
    }

    /// What a batch of pages came to.
    pub(super) fn observe_pages(&self, level: Level, content: u64, bytes: u64, busy: Duration) {
        self.lock().policy.observe(level, content, bytes, busy);
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
