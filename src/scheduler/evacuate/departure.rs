//! What the plan of an evacuation says: who goes, in which order, who stays, and who is promised.
//!
//! Invariant: every VM of the input is in it once, as one that goes or one that stays, with a reason
//! that prints as a sentence; whoever is promised goes.

use std::fmt;

use serde::{Deserialize, Serialize};

/// The plan of an evacuation.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct Departure {
    /// When it was made.
    pub now_s: i64,
    /// When the site must be empty.
    pub deadline_s: i64,
    /// What broke its ties.
    pub seed: u64,
    /// Who goes, path by path, in the order of their going.
    pub goes: Vec<Goes>,
    /// Who is not saved, the weightiest first.
    pub stays: Vec<Stays>,
    /// Weight of those that go.
    pub saved_weight: f64,
    /// Weight of all.
    pub weight: f64,
    /// Those that also make it over the cautious link with the reserve kept, the weightiest first.
    pub promised: Vec<String>,
    /// Those that were promised before and are not any more, the weightiest first.
    pub broken: Vec<String>,
    /// What this order would have saved by earlier deadlines, the earliest first.
    pub curve: Vec<SavedBy>,
}

/// What is saved by a time.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct SavedBy {
    /// The time.
    pub at_s: i64,
    /// Weight of those that have arrived by then.
    pub weight: f64,
    /// Weight of the promised ones of them.
    pub promised: f64,
}

/// One VM's way out.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Goes {
    /// The VM.
    pub vm: String,
    /// The host that it leaves.
    pub from: String,
    /// The host that it goes to.
    pub to: String,
    /// The path that it takes.
    pub path: String,
    /// Which of the path's streams, the first being 0.
    pub stream: usize,
    /// Share of the path that the stream has.
    pub share: f64,
    /// When it starts.
    pub start_s: i64,
    /// When it is expected to have arrived.
    pub end_s: i64,
    /// MiB that it is expected to send.
    pub mib: u64,
    /// Its weight.
    pub weight: f64,
    /// Whether it is promised.
    pub is_promised: bool,
    /// Seconds that are left between its arrival and the deadline.
    pub spare_s: i64,
    /// Whether it is on its way already.
    pub is_under_way: bool,
}

/// A VM that is not saved.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Stays {
    /// The VM.
    pub vm: String,
    /// Its host.
    pub host: String,
    /// Its weight.
    pub weight: f64,
    /// Why.
    pub because: Left,
}

/// Why a VM is not saved.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Left {
    /// It is pinned.
    Pinned,
    /// The deadline is not in the future.
    Late,
    /// No path leads away from its site.
    NoPath,
    /// No host at the end of a path ever had room for it.
    NoHost,
    /// It changes faster than any link could send, in every slot.
    NeverQuiet {
        /// Least MiB a second that it changes in a slot.
        dirty_mib_s: f64,
        /// Most MiB a second that it gets of a path in a slot.
        leftover_mib_s: f64,
    },
    /// It would not arrive in time if it went first.
    TooBig {
        /// Its size in MiB.
        mib: u64,
        /// Seconds to the deadline.
        left_s: i64,
    },
    /// Others save more weight in the time or in the room at the targets.
    Outweighed {
        /// Seconds that it would take alone, from now on.
        needs_s: i64,
        /// Most seconds that are left on a path behind those that go.
        left_s: i64,
    },
}

impl fmt::Display for Goes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { vm, from, to, path, mib, weight, spare_s, .. } = self;
        let verb = if self.is_under_way { "go on sending" } else { "send" };
        write!(f, "{verb} {vm} from {from} to {to} over {path} ({mib} MiB")?;
        if self.share < 1.0 {
            write!(f, ", {:.0} % of the path", self.share * 100.0)?;
        }
        let per_gib = weight / (*mib as f64 / 1024.0).max(f64::MIN_POSITIVE);
        write!(
            f,
            "): it weighs {weight}, {per_gib:.3} for each GiB, and arrives {spare_s} s before the \
             deadline; "
        )?;
        f.write_str(if self.is_promised {
            "promised: it does so over the cautious link too"
        } else {
            "not promised: over the cautious link it would be late"
        })
    }
}

impl fmt::Display for Stays {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "leave {} on {}: {}", self.vm, self.host, self.because)
    }
}

impl fmt::Display for Left {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Pinned => write!(f, "it is pinned"),
            Self::Late => write!(f, "the deadline is not in the future"),
            Self::NoPath => write!(f, "no path leads away from its site"),
            Self::NoHost => write!(f, "no host that a path leads to has room for it"),
            Self::NeverQuiet { dirty_mib_s, leftover_mib_s } => write!(
                f,
                "it changes {dirty_mib_s:.1} MiB/s even when it is quiet, and no path has more than \
                 {leftover_mib_s:.1} MiB/s for it"
            ),
            Self::TooBig { mib, left_s } => write!(
                f,
                "it would not arrive if it went first: {mib} MiB and what changes meanwhile do not \
                 fit in {left_s} s"
            ),
            Self::Outweighed { needs_s, left_s } => write!(
                f,
                "it needs {needs_s} s and at most {left_s} s are left behind those that save more \
                 weight"
            ),
        }
    }
}

impl fmt::Display for Departure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { goes, stays, saved_weight, weight, promised, .. } = self;
        let (go, stay, sure) = (goes.len(), stays.len(), promised.len());
        write!(
            f,
            "{go} VMs go, {sure} of them promised, and {stay} stay: {saved_weight} of {weight} by \
             weight"
        )
    }
}
