//! The hand-over: which side may run the VM. Two pure state machines, one for each role.
//!
//! Invariant: at most one side is ever in a state that lets its hypervisor run the guest, and a
//! side leaves "may run" only after its journal says so. No I/O, no clock, no async in here: events
//! go in (a peer's message, what the hypervisor or the disk did, the operator's word, a restart),
//! effects come out, and the shell carries them out in order. An event that has no meaning in a
//! state changes nothing and asks for nothing.
//!
//! The decision travels behind the last byte: the source delegates once its hypervisor is parked,
//! and from then on only the target decides. It runs the guest after its acceptance is durable, or
//! refuses; a journal in which no acceptance can ever become durable is a refusal, and nothing else
//! gives the guest back to the source but the operator's word. No timer is an event that starts a
//! guest: [`SourceEvent::Retry`] and [`TargetEvent::Retry`] only ask and write.
//!
//! The transition tables are drawn in `docs/hand-over.md`; a test keeps them equal to this code.

mod source;
mod target;

pub use source::{Source, SourceEffect, SourceEvent, SourceRecord, SourceState};
pub use target::{Target, TargetEffect, TargetEvent, TargetRecord, TargetState};

use serde::{Deserialize, Serialize};

/// What a target says when it is asked.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Verdict {
    /// It owns the guest.
    Runs,
    /// It never will (again).
    Refused,
    /// It has not decided yet.
    Undecided,
}

/// How a source stands that asks.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Standing {
    /// It waits for the target's decision.
    Waits,
    /// Its operator took the guest back without one: a target that runs it must stop.
    TookBack,
}

/// The operator's word for a guest whose hand-over is in doubt, from the side where it is given.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Choice {
    /// It is to run here.
    Here,
    /// It runs, or is to run, at the other side.
    There,
}

/// What two journals that met have found.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Conflict {
    /// The guest was run at both ends: the target's was stopped.
    RanTwice,
    /// Both ends had given it away: it runs nowhere, and the source's disks are the last word.
    RunsNowhere,
}

#[cfg(test)]
mod tests;
