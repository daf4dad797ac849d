//! The simulator: days of recorded load, played under the rivals' rules on simulated hosts.
//!
//! Invariant: a figure stands beside the reference and the bound that it is held to, and a figure that
//! misses its bound ends the command with an error.
//!
//! Reading order: [`traces`] (what is played), `machine` (hosts, VMs, how a host shares its CPU),
//! [`rivals`] (who moves what where), [`day`] (the clock), [`account`] (what it cost), then what the
//! planner is measured by: [`consolidate`], [`balance`], [`evacuate`],
//! [`windows`] and [`forecasts`].

pub mod account;
pub mod balance;
pub mod consolidate;
pub mod day;
pub mod evacuate;
pub mod forecasts;
pub mod light;
mod machine;
pub mod rivals;
pub mod traces;
pub mod windows;

use std::path::PathBuf;
use std::time::Instant;

use anyhow::{Result, ensure};
use clap::Args;
use serde::{Deserialize, Serialize};

use self::account::Outcome;
use self::rivals::Overload;
use self::traces::Reference;
use crate::row::{self, Made, Revision};

/// How far a figure may be from CloudSim's own, as a share of it.
const ERROR_MAX: f64 = 0.01;
/// Longest that a day may take, in seconds on one core.
const DAY_S_MAX: f64 = 5.0;

/// The rules that CloudSim itself was run with, as its results name them.
const RULES: [(&str, &str, Overload); 2] =
    [("thr", "0.8", Overload::Threshold(0.8)), ("lr", "1.2", Overload::Regression(1.2))];

/// Which days to play, and where they are.
#[derive(Debug, Args)]
pub struct HonestPlan {
    /// Folder of the traces: `planetlab_DAY.csv.zst` and `baseline_cloudsim303_planetlab.csv`.
    data: PathBuf,
    /// Days to play.
    #[arg(long, value_delimiter = ',', default_values = traces::PLANETLAB_DAYS)]
    days: Vec<String>,
    /// Where rows go; nowhere if absent.
    #[arg(long)]
    results: Option<PathBuf>,
}

/// One day under one rule, beside CloudSim's own figures.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct HonestRow {
    /// When, how, of what and where it was made.
    #[serde(flatten)]
    pub made: Made,
    /// `20110303`.
    pub day: String,
    /// `thr-mmt-0.8`.
    pub rule: String,
    /// Decides nothing here: no rule of these draws lots.
    pub seed: u64,
    /// What the simulator found.
    pub outcome: Outcome,
    /// Largest of the four differences from CloudSim's figures, as a share of CloudSim's.
    pub error: f64,
    /// The bound that it is held to.
    pub error_max: f64,
    /// Seconds that the day took, reading it not included.
    pub took_s: f64,
}

/// Plays days under the rules of THR-MMT-0.8 and LR-MMT-1.2 and compares energy, migrations, SLATAH
/// and PDM with what CloudSim 3.0.3 printed for the same day and rule.
///
/// # Errors
///
/// When a trace cannot be read, or when a figure is more than 1 % from its reference or a day takes
/// more than 5 s; the rows are written all the same.
pub fn honest(plan: &HonestPlan) -> Result<()> {
    println!(
        "{:<9} {:<12} {:>18} {:>17} {:>19} {:>21} {:>8} {:>6}",
        "day", "rule", "energy kWh", "migrations", "SLATAH %", "PDM %", "error %", "s"
    );
    let (mut figures, mut missed) = (0, Vec::new());
    for name in &plan.days {
        let day = traces::planetlab(&plan.data, name)?;
        for (rule, parameter, overload) in RULES {
            let reference = traces::reference(&plan.data, name, rule, parameter)?;
            let start = Instant::now();
            let outcome = day::play(&day, overload)?;
            let took_s = start.elapsed().as_secs_f64();
            let error = error(&outcome, &reference);
            let rule = format!("{rule}-mmt-{parameter}");
            println!("{}", line(name, &rule, &outcome, &reference, error, took_s));
            figures += 1;
            if error > ERROR_MAX || took_s > DAY_S_MAX {
                missed.push(format!("{name} {rule}"));
            }
            if let Some(results) = &plan.results {
                let made = Made::now(&Revision::current()?)?;
                let day = name.clone();
                let error_max = ERROR_MAX;
                let row = HonestRow { made, day, rule, seed: 0, outcome, error, error_max, took_s };
                row::append(results, &row)?;
            }
        }
    }
    println!("figure/CloudSim 3.0.3; bound: error 1 % of each figure, 5 s a day");
    ensure!(
        missed.is_empty(),
        "{} of {figures} miss the bound: {}",
        missed.len(),
        missed.join(", ")
    );
    Ok(())
}

/// Largest difference of the four figures, as a share of the reference's.
fn error(outcome: &Outcome, reference: &Reference) -> f64 {
    [
        (outcome.energy_kwh, reference.energy_kwh),
        (outcome.migrations as f64, reference.migrations),
        (outcome.slatah, reference.slatah),
        (outcome.pdm, reference.pdm),
    ]
    .map(|(figure, reference)| ((figure - reference) / reference).abs())
    .into_iter()
    .fold(0.0, f64::max)
}

fn line(
    day: &str,
    rule: &str,
    outcome: &Outcome,
    reference: &Reference,
    error: f64,
    took_s: f64,
) -> String {
    let pair = |figure: f64, reference: f64, digits: usize| {
        format!("{figure:.digits$}/{reference:.digits$}")
    };
    format!(
        "{day:<9} {rule:<12} {:>18} {:>17} {:>19} {:>21} {:>8.2} {took_s:>6.2}",
        pair(outcome.energy_kwh, reference.energy_kwh, 2),
        pair(outcome.migrations as f64, reference.migrations, 0),
        pair(outcome.slatah * 100.0, reference.slatah * 100.0, 2),
        pair(outcome.pdm * 100.0, reference.pdm * 100.0, 4),
        error * 100.0,
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_error_is_that_of_the_worst_figure() {
        let outcome = Outcome {
            energy_kwh: 100.0,
            migrations: 99,
            moved_mib: 0,
            slatah: 0.05,
            pdm: 0.001,
            unmet: 0.0,
            sleeps: 0,
        };
        let reference =
            Reference { energy_kwh: 100.0, migrations: 100.0, slatah: 0.05, pdm: 0.00102 };
        assert!((error(&outcome, &reference) - 0.02 / 1.02).abs() < 1e-9);
    }
}
