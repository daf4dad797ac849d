//! What went wrong, in the three parts that every error of a command has.
//!
//! Invariant: `kind` alone decides the exit code; the texts are for people.

use serde::{Deserialize, Serialize};

/// How bad a failure is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum FailureKind {
    /// It failed, safely: a guest that ran runs on where it was.
    Failed,
    /// It was wrong to begin with and nothing was attempted.
    Refused,
    /// Which side may run the VM has to be found out.
    InDoubt,
    /// Somebody cancelled it; the guest runs on where it was.
    Cancelled,
}

/// What went wrong.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Failure {
    /// How bad.
    pub kind: FailureKind,
    /// What happened.
    pub what: String,
    /// What state the VM or the peer is in now; empty if nothing was touched.
    pub state: String,
    /// What to do.
    pub next: String,
}

impl Failure {
    /// It was wrong to begin with: nothing was attempted.
    pub fn refused(what: impl Into<String>, next: impl Into<String>) -> Self {
        Self::of_kind(FailureKind::Refused, what, "", next)
    }

    /// It failed, safely.
    pub fn failed(
        what: impl Into<String>,
        state: impl Into<String>,
        next: impl Into<String>,
    ) -> Self {
        Self::of_kind(FailureKind::Failed, what, state, next)
    }

    /// A failure of any kind.
    pub fn of_kind(
        kind: FailureKind,
        what: impl Into<String>,
        state: impl Into<String>,
        next: impl Into<String>,
    ) -> Self {
        Self { kind, what: what.into(), state: state.into(), next: next.into() }
    }
}
