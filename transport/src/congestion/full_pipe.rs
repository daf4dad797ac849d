//! Whether the pipe is full: the delivery rate does not grow any more.
//!
//! Invariant: once reached it stays reached, until a start begins anew.

use super::bbr::Bbr;
use super::delivery::Sample;

/// Rounds without growth after which the pipe is full.
const FULL_ROUNDS: u32 = 3;
const FULL_GROWTH: f64 = 1.25;

/// Whether the delivery rate still grows.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct FullPipe {
    rate: u64,
    rounds: u32,
    now: bool,
    pub(super) reached: bool,
}

impl Bbr {
    pub(super) fn check_full_pipe(&mut self, sample: &Sample) {
        if self.full.now || sample.app_limited {
            return;
        }
        let growing = self.rate_latest() as f64 >= self.full.rate as f64 * FULL_GROWTH;
        if growing {
            self.full = FullPipe { rate: self.rate_latest(), rounds: 0, ..self.full };
            return;
        }
        if self.round_start {
            self.full.rounds += 1;
            self.full.now = self.full.rounds >= FULL_ROUNDS;
            self.full.reached |= self.full.now;
        }
    }

    pub(super) fn reset_full_pipe(&mut self) {
        self.full = FullPipe {
            rate: self.rate_latest(),
            reached: self.full.reached,
            ..FullPipe::default()
        };
    }

    pub(super) fn is_pipe_full(&self) -> bool {
        self.full.now
    }
}
