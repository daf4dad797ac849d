//! What a command and the agent say about caps.
//!
//! Invariant: as for all [messages](super::message), these types are the JSON that scripts read.

use std::collections::BTreeMap;

use longhaul_transport::BitRate;
use serde::{Deserialize, Serialize};

use crate::calendar::RateCalendar;

/// Caps to be changed; if there are none, those that hold are asked for.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct LimitRequest {
    /// The VM whose job is meant; the agent as a whole if absent.
    #[serde(default)]
    pub vm: Option<String>,
    /// The new cap.
    #[serde(default)]
    pub rate: Option<RateCalendar>,
    /// New caps of classes of a job, by name.
    #[serde(default)]
    pub classes: BTreeMap<String, RateCalendar>,
}

/// The caps that hold.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Limits {
    /// The zone whose clocks they follow.
    pub time_zone: String,
    /// On all that is sent.
    pub agent: Limit,
    /// What the configuration says instead, if a command has changed that.
    pub configured: Option<RateCalendar>,
    /// Of the jobs that run.
    pub jobs: Vec<JobLimits>,
}

/// The caps of a job.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct JobLimits {
    /// The VM that it moves.
    pub vm: String,
    /// On all that it sends.
    pub rate: Limit,
    /// On what it sends of some classes.
    pub classes: BTreeMap<String, Limit>,
}

/// A cap.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Limit {
    /// As it was set.
    pub set: RateCalendar,
    /// What of it holds now; nothing if there is no cap now.
    pub now: Option<BitRate>,
    /// What comes next.
    pub next: Option<LimitChange>,
}

/// A cap that is going to change.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct LimitChange {
    /// When.
    pub at: jiff::Timestamp,
    /// When, as the clocks of the caps' zone show it: `Mon 20:00`.
    pub clock: String,
    /// To what; nothing if there is no cap then.
    pub rate: Option<BitRate>,
}
