//! What the jobs that ended in the life of this agent came to, in sum.
//!
//! Invariant: sums only grow, and a job is in them once: in the moment in which its record is
//! written. The history on disk is older than this and is not counted.

use crate::control::{FailureKind, JobKind, JobOutcome};
use crate::migration::report::Saved;
use crate::migration::{Completed, Phase};

/// All ways in which a job ends, as they are named in numbers.
pub(crate) const OUTCOMES: [&str; 5] = ["completed", "failed", "refused", "in-doubt", "cancelled"];
/// All phases, in their order.
pub(crate) const PHASES: [Phase; 4] = [Phase::Seed, Phase::Sync, Phase::PreCopy, Phase::Switchover];

/// What jobs of one kind came to.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Tally {
    pub(crate) kind: JobKind,
    /// How many ended how; in the order of [`OUTCOMES`].
    pub(crate) outcomes: [u64; OUTCOMES.len()],
    /// Payload and wire bytes of those that completed; in the order of [`PHASES`].
    pub(crate) phases: [(u64, u64); PHASES.len()],
    /// What those that completed did not have to send.
    pub(crate) saved: Saved,
    /// Downtime of those that completed, in milliseconds.
    pub(crate) downtime_ms: f64,
}

impl Tally {
    pub(crate) fn new(kind: JobKind) -> Self {
        Self {
            kind,
            outcomes: [0; OUTCOMES.len()],
            phases: [(0, 0); PHASES.len()],
            saved: Saved::default(),
            downtime_ms: 0.0,
        }
    }

    /// A job of this kind has ended.
    pub(crate) fn add(&mut self, outcome: &JobOutcome) {
        let place = match outcome {
            JobOutcome::Completed(completed) => {
                self.add_completed(completed);
                0
            }
            JobOutcome::Failed(failure) => match failure.kind {
                FailureKind::Failed => 1,
                FailureKind::Refused => 2,
                FailureKind::InDoubt => 3,
                FailureKind::Cancelled => 4,
            },
        };
        self.outcomes[place] += 1;
    }

    fn add_completed(&mut self, completed: &Completed) {
        for (phase, (payload, wire)) in PHASES.iter().zip(&mut self.phases) {
            let phase = phase.to_string();
            for (_, report) in completed.phases.iter().filter(|(name, _)| *name == phase) {
                *payload += report.payload_bytes;
                *wire += report.wire_bytes;
            }
        }
        let (sum, more) = (&mut self.saved, &completed.saved);
        sum.disk_zero_bytes += more.disk_zero_bytes;
        sum.disk_known_bytes += more.disk_known_bytes;
        sum.disk_compressed_bytes += more.disk_compressed_bytes;
        sum.memory_zero_bytes += more.memory_zero_bytes;
        sum.memory_repeated_bytes += more.memory_repeated_bytes;
        sum.memory_on_disk_bytes += more.memory_on_disk_bytes;
        sum.memory_superseded_bytes += more.memory_superseded_bytes;
        sum.memory_delta_bytes += more.memory_delta_bytes;
        sum.memory_compressed_bytes += more.memory_compressed_bytes;
        self.downtime_ms += completed.downtime.as_ref().map_or(0.0, |downtime| downtime.total_ms);
    }
}
