//! The record of plans: each plan that moves something, with everything that it was made of.
//!
//! Invariant: a record replays to the same plan bit for bit (numbers are written so that they read back
//! exactly), and the record has an end: of two files the older is dropped when the newer is full.

use std::fs::OpenOptions;
use std::io::{self, Write};
use std::path::PathBuf;
use std::sync::{Mutex, PoisonError};

use longhaul_scheduler::decision::{Decision, Plan};
use longhaul_scheduler::policy::Policy;

use super::picture::Picture;
use crate::control::PlanRecord;

/// Bytes of one of the two files.
const FILE_BYTES_MAX: u64 = 32 << 20;

/// The record.
pub(super) struct Records {
    file: PathBuf,
    /// The decisions that were written last.
    last: Mutex<Vec<Decision>>,
}

impl Records {
    pub(super) fn new(file: PathBuf) -> Self {
        Self { file, last: Mutex::default() }
    }

    /// Keeps a plan that moves something, unless it says what the last one said.
    pub(super) fn keep(&self, picture: &Picture, policy: &Policy, plan: &Plan) {
        let mut last = self.last.lock().unwrap_or_else(PoisonError::into_inner);
        if plan.moves().next().is_none() || *last == plan.decisions {
            return;
        }
        last.clone_from(&plan.decisions);
        let record = PlanRecord {
            state: picture.state.clone(),
            forecasts: picture.forecasts.clone(),
            policy: policy.clone(),
            plan: plan.clone(),
        };
        if let Err(error) = self.write(&record) {
            tracing::warn!(%error, "a plan could not be recorded");
        }
    }

    fn write(&self, record: &PlanRecord) -> io::Result<()> {
        let mut line = serde_json::to_vec(record)?;
        line.push(b'\n');
        let is_full = std::fs::metadata(&self.file).is_ok_and(|of| of.len() >= FILE_BYTES_MAX);
        if is_full {
            std::fs::rename(&self.file, self.file.with_extension("jsonl.old"))?;
        }
        OpenOptions::new().create(true).append(true).open(&self.file)?.write_all(&line)
    }
}
