//! What is done to a job on purpose while it runs: its link is cut, its target's agent killed.
//!
//! Invariant: a job that was over before its last trouble came is an error, never a figure.

use std::fmt;
use std::str::FromStr;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, ensure};
use serde::{Deserialize, Serialize};

use crate::agent::POLL_PERIOD;
use crate::host::AgentPair;
use crate::interrupt;
use crate::netns::Side;
use crate::wan::Wan;

/// One trouble, and when it comes: once so many MiB have crossed the WAN since the job began.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Trouble {
    /// Nothing passes for so long.
    Cut {
        /// When.
        at_mib: u64,
        /// For how long.
        seconds: f64,
    },
    /// The target's agent ends without a word, and is started again at once.
    Kill {
        /// When.
        at_mib: u64,
    },
}

/// `AT:SECONDS`, a cut as it is written on the command line.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Cut(Trouble);

impl FromStr for Cut {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let cut = text.split_once(':').and_then(|(at, seconds)| {
            let (at_mib, seconds): (u64, f64) = (at.parse().ok()?, seconds.parse().ok()?);
            let is_time = Duration::try_from_secs_f64(seconds).is_ok();
            is_time.then_some(Self(Trouble::Cut { at_mib, seconds }))
        });
        cut.ok_or_else(|| "a cut is MIB:SECONDS, e.g. 300:60".to_owned())
    }
}

impl fmt::Display for Trouble {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Cut { at_mib, seconds } => {
                write!(formatter, "the cut of {seconds} s at {at_mib} MiB")
            }
            Self::Kill { at_mib } => write!(formatter, "the kill at {at_mib} MiB"),
        }
    }
}

impl Trouble {
    /// Cuts and kills in the order in which they come.
    pub fn in_order(cuts: &[Cut], kills: &[u64]) -> Vec<Self> {
        let kills = kills.iter().map(|at_mib| Self::Kill { at_mib: *at_mib });
        let mut all: Vec<Self> = cuts.iter().map(|cut| cut.0).chain(kills).collect();
        all.sort_by_key(|trouble| trouble.at_mib());
        all
    }

    fn at_mib(&self) -> u64 {
        match self {
            Self::Cut { at_mib, .. } | Self::Kill { at_mib } => *at_mib,
        }
    }

    fn happen(&self, wan: &Wan, pair: &mut AgentPair) -> Result<()> {
        match self {
            Self::Cut { seconds, .. } => {
                wan.cut()?;
                let end = Instant::now() + Duration::try_from_secs_f64(*seconds)?;
                while Instant::now() < end && interrupt::check().is_ok() {
                    let left = end.saturating_duration_since(Instant::now());
                    std::thread::sleep(POLL_PERIOD.min(left));
                }
                wan.restore()
            }
            Self::Kill { .. } => {
                pair.kill(Side::B)?;
                pair.restart(wan, Side::B)
            }
        }
    }
}

/// Runs `job` beside its troubles, and gives what it gives.
///
/// # Errors
///
/// The job's own, and when one of the troubles cannot be made or the job is over before it.
pub(crate) fn beset<T: Send>(
    troubles: &[Trouble],
    wan: &Wan,
    pair: &mut AgentPair,
    job: impl FnOnce() -> Result<T> + Send,
) -> Result<T> {
    let before = wan.stats()?.wire_bytes();
    std::thread::scope(|scope| {
        let job = scope.spawn(job);
        for trouble in troubles {
            while wan.stats()?.wire_bytes() - before < trouble.at_mib() << 20 {
                interrupt::check()?;
                ensure!(!job.is_finished(), "it was over before {trouble}");
                std::thread::sleep(POLL_PERIOD);
            }
            eprintln!("now {trouble}");
            trouble.happen(wan, pair).with_context(|| format!("while making {trouble}"))?;
        }
        job.join().map_err(|_| anyhow!("the job has panicked"))?
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn troubles_come_in_order() {
        let cuts: Vec<Cut> = ["300:60", "10:0.5"].map(|text| text.parse().unwrap()).to_vec();
        let order = Trouble::in_order(&cuts, &[20]).iter().map(Trouble::at_mib).collect::<Vec<_>>();
        assert_eq!(order, [10, 20, 300]);
        for bad in ["", "300", "300:", ":60", "300:-1", "300:inf", "-3:1"] {
            assert!(bad.parse::<Cut>().is_err(), "{bad}");
        }
    }
}
