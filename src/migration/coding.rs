//! How hard an attempt compresses: by the slower of link and core, as it turns out.
//!
//! Invariant: one policy serves an attempt, so what disk bundles teach is known to memory batches.

use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use longhaul_dedup::compress::Level;
use longhaul_dedup::level::{Conditions, LevelPolicy};

/// Coders that work at once: batches of one attempt are coded one after the other.
const CODERS: u32 = 1;

/// The policy of one attempt.
#[derive(Debug)]
pub(super) struct Coding {
    policy: Mutex<LevelPolicy>,
}

impl Coding {
    pub(super) fn new() -> Self {
        Self { policy: Mutex::new(LevelPolicy::new()) }
    }

    /// The level for the next batch, with a link of this rate and this much of what may be under
    /// way in use (0 to 1).
    pub(super) fn level(&self, link_bytes_per_s: f64, queue_fill: f32) -> Level {
        self.lock().choose(&Conditions { link_bytes_per_s, coders: CODERS, queue_fill })
    }

    /// What a batch came to.
    pub(super) fn observe(&self, level: Level, bytes_in: u64, bytes_out: u64, busy: Duration) {
        self.lock().observe(level, bytes_in, bytes_out, busy);
    }

    fn lock(&self) -> MutexGuard<'_, LevelPolicy> {
        self.policy.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
