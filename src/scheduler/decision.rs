//! What a plan says: moves and hosts left alone, each with its reason.
//!
//! Invariant: a decision stands for itself: names instead of indices, and every number that decided.
//! Doing nothing is a decision.

use std::fmt;

use serde::{Deserialize, Serialize};

/// A sample so many seconds old (3,000 years) is none.
const NEVER_S: i64 = 100_000_000_000;

/// What should happen now. Moves are in the order in which they should start.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Plan {
    /// When it was made.
    pub now_s: i64,
    /// What broke its ties.
    pub seed: u64,
    /// All decisions.
    pub decisions: Vec<Decision>,
}

impl Plan {
    /// Its moves, in the order in which they should start.
    pub fn moves(&self) -> impl Iterator<Item = &Move> {
        self.decisions.iter().filter_map(|decision| match decision {
            Decision::Move(one) => Some(one),
            Decision::Nothing { .. } => None,
        })
    }
}

/// One decision.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Decision {
    /// Move a VM.
    Move(Move),
    /// Leave a host as it is.
    Nothing {
        /// The host's name.
        host: String,
        /// Why.
        because: Nothing,
    },
}

/// One VM's way to another host. CPU times are in the state's unit times seconds.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Move {
    /// The VM.
    pub vm: String,
    /// The host that it leaves.
    pub from: String,
    /// The host that it goes to.
    pub to: String,
    /// MiB that it sends.
    pub mib: u64,
    /// What it gains: CPU time that would be short, or that energy is worth.
    pub gain: f64,
    /// What it costs: CPU time lost on the way.
    pub cost: f64,
    /// Why.
    pub because: Why,
}

/// Why a VM moves.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Why {
    /// Its host is hot and is expected to stay so.
    Hot {
        /// Share of the host's CPU asked for now.
        now: f64,
        /// Share expected when the migration would have ended.
        then: f64,
        /// Share expected of the target with the VM on it, deviations included.
        target: f64,
    },
    /// Its host is in maintenance.
    Maintenance,
    /// Its host is being emptied to be switched off.
    Emptied {
        /// Share of the host's CPU asked for now.
        now: f64,
        /// Watts that the host needs when idle.
        watts: f64,
    },
}

/// Why a host is left as it is.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Nothing {
    /// Its last sample is too old.
    Stale {
        /// How old, in seconds.
        age_s: i64,
    },
    /// A VM of it is too young to be judged.
    Settling,
    /// Its samples cannot be true.
    Untrue,
    /// Above its mark, and expected to be under it before a migration would end.
    Passing {
        /// Share expected then.
        then: f64,
    },
    /// Hot, and no move passes. The rule that refused the best of them.
    NoMove {
        /// The rule.
        refused: Refusal,
    },
    /// Hot, and the best move would gain too little.
    TooDear {
        /// The VM of the best move.
        vm: String,
        /// What it would gain.
        gain: f64,
        /// What it would cost.
        cost: f64,
    },
    /// The budget of the hour is used up.
    Budget {
        /// Moves that may start in an hour.
        per_hour: usize,
    },
}

/// The first rule that refuses a VM, or its target.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Refusal {
    /// No VM is there to move.
    NoVm,
    /// The VM is pinned.
    Pinned,
    /// It is on its way already.
    Migrating,
    /// It moved too lately.
    Cooldown,
    /// The target is off, in maintenance, frozen or the VM's own host.
    Closed,
    /// It left the target too lately.
    Return,
    /// One VM cannot get there what it asks for.
    TooBig,
    /// Memory.
    Memory,
    /// CPU, by the what-if.
    Cpu,
    /// Rules of sharing or not sharing a host.
    Affinity,
    /// The host sends or receives as many as it may.
    Busy,
}

impl fmt::Display for Refusal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::NoVm => "no VM on it may be moved",
            Self::Pinned => "its VMs are pinned",
            Self::Migrating => "its VMs are moving already",
            Self::Cooldown => "its VMs moved a short while ago",
            Self::Closed => "no other host is open",
            Self::Return => "the VM left the only host with room a short while ago",
            Self::TooBig => "no other host has cores that are fast enough",
            Self::Memory => "no other host has the memory",
            Self::Cpu => "every other host would be expected to become hot",
            Self::Affinity => "rules keep its VMs together or apart",
            Self::Busy => "enough moves have been planned for the hosts concerned",
        })
    }
}

impl fmt::Display for Decision {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Move(one) => one.fmt(f),
            Self::Nothing { host, because } => write!(f, "leave {host} as it is: {because}"),
        }
    }
}

impl fmt::Display for Move {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { vm, from, to, mib, gain, cost, because } = self;
        write!(f, "move {vm} from {from} to {to} ({mib} MiB): ")?;
        let percent = |share: &f64| share * 100.0;
        match because {
            Why::Hot { now, then, target } => write!(
                f,
                "{:.0} % of {from} is asked for and {:.0} % is expected when the move ends; {to} \
                 would be at {:.0} %; gains {gain:.0} CPU-seconds for {cost:.0}",
                percent(now),
                percent(then),
                percent(target)
            ),
            Why::Maintenance => write!(f, "{from} is in maintenance"),
            Why::Emptied { now, watts } => write!(
                f,
                "{from} is used to {:.0} % and can be switched off, which saves {watts:.0} W",
                percent(now)
            ),
        }
    }
}

impl fmt::Display for Nothing {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Stale { age_s } if *age_s < 0 => {
                write!(f, "its last sample is from {} s in the future", -age_s)
            }
            Self::Stale { age_s } if *age_s > NEVER_S => {
                write!(f, "nothing of it was sampled yet")
            }
            Self::Stale { age_s } => write!(f, "its last sample is {age_s} s old"),
            Self::Settling => write!(f, "a VM there has not been watched for long enough"),
            Self::Untrue => write!(f, "its samples cannot be true"),
            Self::Passing { then } => {
                write!(f, "it is hot, and {:.0} % is expected when a move would end", then * 100.0)
            }
            Self::NoMove { refused } => write!(f, "it is hot, but {refused}"),
            Self::TooDear { vm, gain, cost } => write!(
                f,
                "it is hot, but moving {vm} would gain {gain:.0} CPU-seconds for {cost:.0}"
            ),
            Self::Budget { per_hour } => {
                write!(f, "all {per_hour} moves of this hour are used up")
            }
        }
    }
}
