//! The journal: what this side knows of one migration attempt, and what follows from it.
//!
//! Invariant: a history says what its records say, in their order, and nothing else: who may act upon
//! it reads it with [`JournalDir::sure`].

mod dir;

pub use dir::{AppendError, BeginError, JournalDir};

use serde::{Deserialize, Serialize};

use super::handover::{SourceRecord, TargetRecord};
use super::message::JobId;
use crate::hypervisor::VmSpec;

/// What this program writes; it reads no newer one.
const FORMAT: u32 = 1;
/// Longest reason that is written down.
const REASON_CHARS_MAX: usize = 600;

/// Which half of a migration this host plays.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Role {
    /// The VM leaves this host.
    Source,
    /// It arrives here.
    Target,
}

/// What a journal can say.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", tag = "record")]
pub enum Record {
    /// The attempt began; always the first record.
    Began(Box<Began>),
    /// A source's step of the hand-over.
    Source {
        /// The step.
        step: SourceRecord,
        /// Wall-clock time in RFC 3339, for people.
        at: String,
    },
    /// A target's step of the hand-over.
    Target {
        /// The step.
        step: TargetRecord,
        /// Why, for a refusal.
        reason: Option<String>,
        /// Whether the guest is to run here; `false` if its owner had paused it.
        run: bool,
        /// Wall-clock time in RFC 3339, for people.
        at: String,
    },
    /// Everything that follows from the last step was done; nothing is left to recover.
    Ended,
}

/// The first record.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Began {
    /// The format of all that follows.
    pub format: u32,
    /// Which half we play.
    pub role: Role,
    /// The VM.
    pub vm: String,
    /// The peer's name at this host.
    pub peer: String,
    /// Whether the guest ran when the attempt began; it is given back like that.
    pub was_running: bool,
    /// At its target: what the VM is, so that it can be started from its disks if need be.
    pub spec: Option<VmSpec>,
    /// Wall-clock time in RFC 3339, for people.
    pub at: String,
}

impl Record {
    /// The first record of an attempt at its source.
    pub fn leaving(vm: &str, peer: &str, was_running: bool) -> Self {
        Self::began(Role::Source, vm, peer, was_running, None)
    }

    /// The first record of an attempt at its target.
    pub fn arriving(spec: &VmSpec, peer: &str) -> Self {
        Self::began(Role::Target, &spec.name, peer, false, Some(spec.clone()))
    }

    fn began(role: Role, vm: &str, peer: &str, was_running: bool, spec: Option<VmSpec>) -> Self {
        let (vm, peer, at) = (vm.to_owned(), peer.to_owned(), now());
        Self::Began(Box::new(Began { format: FORMAT, role, vm, peer, was_running, spec, at }))
    }

    /// A source's step.
    pub fn source(step: SourceRecord) -> Self {
        Self::Source { step, at: now() }
    }

    /// A target's step.
    pub fn target(step: TargetRecord, reason: Option<&str>, run: bool) -> Self {
        let cut = |reason: &str| reason.chars().take(REASON_CHARS_MAX).collect();
        Self::Target { step, reason: reason.map(cut), run, at: now() }
    }
}

fn now() -> String {
    jiff::Timestamp::now().to_string()
}

/// What a journal file says, read back.
#[derive(Debug, Clone, PartialEq)]
pub struct History {
    /// The attempt.
    pub job: JobId,
    /// Its records, oldest first.
    pub records: Vec<Record>,
}

impl History {
    /// The last step of the source's hand-over.
    pub fn source_step(&self) -> Option<SourceRecord> {
        self.records.iter().rev().find_map(|record| match record {
            Record::Source { step, .. } => Some(*step),
            _ => None,
        })
    }

    /// The last step of the target's hand-over.
    pub fn target_step(&self) -> Option<TargetRecord> {
        self.records.iter().rev().find_map(|record| match record {
            Record::Target { step, .. } => Some(*step),
            _ => None,
        })
    }

    /// Whether the guest is to run at its target, as it accepted it.
    pub fn runs_at_target(&self) -> bool {
        let accepted = |record: &Record| {
            matches!(record, Record::Target { step: TargetRecord::Accepted, run: true, .. })
        };
        self.records.iter().any(accepted)
    }

    /// The last reason that was written down.
    pub fn reason(&self) -> Option<String> {
        self.records.iter().rev().find_map(|record| match record {
            Record::Target { reason, .. } => reason.clone(),
            _ => None,
        })
    }

    /// When its last step was written, in RFC 3339.
    pub fn since(&self) -> Option<&str> {
        self.records.iter().rev().find_map(|record| match record {
            Record::Began(began) => Some(began.at.as_str()),
            Record::Source { at, .. } | Record::Target { at, .. } => Some(at),
            Record::Ended => None,
        })
    }

    /// Whether nothing is left to do. A step behind the end opens an attempt again: a target that
    /// hears late that it was overruled.
    pub fn ended(&self) -> bool {
        self.records.last() == Some(&Record::Ended)
    }

    /// The first record, without which a journal says nothing.
    pub fn began(&self) -> Option<&Began> {
        match self.records.first() {
            Some(Record::Began(began)) => Some(began),
            _ => None,
        }
    }

    /// Whether a restart would still do something to the VM because of this attempt. Until it would
    /// not, nothing else may be begun with that VM.
    pub fn acts(&self) -> bool {
        let tells_only = matches!(
            (self.source_step(), self.target_step()),
            (Some(SourceRecord::Returned | SourceRecord::Left), _)
                | (_, Some(TargetRecord::Settled | TargetRecord::Yielded))
        );
        !self.ended() && !tells_only
    }
}
