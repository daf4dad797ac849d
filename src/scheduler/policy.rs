//! What the planner may do: its goal, its marks, and how much it may move.
//!
//! Invariant: every limit of the planner is here, so a record of a plan with its policy says all.

use serde::{Deserialize, Serialize};

use crate::state::InvalidState;

/// What the planner is after.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Goal {
    /// No host short of CPU, with as few moves as that takes.
    Balance,
    /// As few hosts on as carry the load.
    Consolidate,
}

/// Limits and prices. Shares are of a host's CPU.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Policy {
    /// What the planner is after.
    pub goal: Goal,
    /// A host is hot while more than this is asked of it.
    pub enter: f64,
    /// A hot host is relieved until less than this is expected of it.
    pub leave: f64,
    /// Of the last `hot_of` samples so many must be above `enter`.
    pub hot_samples: usize,
    /// See `hot_samples`.
    pub hot_of: usize,
    /// VMs suffer from here on: gain is expected CPU above it.
    pub comfort: f64,
    /// A host takes VMs while what is expected of it, with so many deviations, is under `comfort`.
    pub deviations: f64,
    /// How long a move's gain is counted, in seconds.
    pub stable_s: i64,
    /// A move's gain must be more than its cost, so many times.
    pub gain_per_cost: f64,
    /// A VM that moved stays for so long, in seconds; twice as long after each move back.
    pub cooldown_s: i64,
    /// A VM does not go back to a host that it left within so many seconds.
    pub no_return_s: i64,
    /// Moves that may start within an hour.
    pub moves_per_hour: usize,
    /// Moves that one host may send, and receive, in one plan.
    pub moves_per_host: usize,
    /// A host whose last sample is older is frozen, in seconds.
    pub stale_s: i64,
}

impl Policy {
    /// Defaults for samples each 5 min.
    pub fn new(goal: Goal) -> Self {
        let balance = Self {
            goal,
            enter: 0.8,
            leave: 0.75,
            hot_samples: 1,
            hot_of: 2,
            comfort: 0.88,
            deviations: 1.0,
            stable_s: 3600,
            gain_per_cost: 2.0,
            cooldown_s: 3600,
            no_return_s: 7200,
            moves_per_hour: 100,
            moves_per_host: 2,
            stale_s: 600,
        };
        match goal {
            Goal::Balance => balance,
            Goal::Consolidate => Self {
                enter: 0.85,
                leave: 0.8,
                hot_samples: 1,
                hot_of: 1,
                comfort: 0.85,
                deviations: 3.0,
                moves_per_hour: 5_000,
                moves_per_host: 100,
                ..balance
            },
        }
    }

    /// Whether it contradicts itself.
    pub(crate) fn check(&self) -> Result<(), InvalidState> {
        let shares = [self.enter, self.leave, self.comfort];
        let wrong = if !shares.iter().all(|share| share.is_finite() && *share > 0.0) {
            "marks must be numbers above zero"
        } else if self.leave >= self.enter {
            "leave mark must be below its enter mark, or a host would be hot and cool at once"
        } else if self.hot_samples == 0 || self.hot_samples > self.hot_of {
            "hot samples must be at least one and at most those looked at"
        } else if !(self.gain_per_cost.is_finite() && self.gain_per_cost >= 1.0) {
            "gain per cost must be at least 1, or moves would cost more than they gain"
        } else if !(self.deviations.is_finite() && self.deviations >= 0.0) {
            "deviations must be a number, zero or more"
        } else if [self.stable_s, self.cooldown_s, self.no_return_s, self.stale_s]
            .iter()
            .any(|seconds| !(0..=i64::from(u32::MAX)).contains(seconds))
        {
            "times must be between 0 and 2^32 seconds"
        } else {
            return Ok(());
        };
        Err(InvalidState::Policy(wrong))
    }
}
