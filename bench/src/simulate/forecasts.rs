//! How well the load of links is foreseen: each recorded series played sample by sample.
//!
//! Invariant: a forecast is made with the samples up to its moment; figures are of the last two fifths of a
//! series, and the simple rules beside it are judged on the same samples.

use std::path::PathBuf;

use anyhow::{Result, ensure};
use clap::Args;
use longhaul_scheduler::season::Season;
use serde::{Deserialize, Serialize};

use super::traces::{self, LinkLoad};
use crate::row::{self, Made, Revision};

const DAY_S: f64 = 86_400.0;
/// Distances ahead, in seconds: the first is one sample.
const AHEAD_S: [f64; 4] = [1.0, 3600.0, 6.0 * 3600.0, DAY_S];
/// Share of a series from which on it is judged.
const JUDGED_FROM: f64 = 0.6;
/// Largest error a day ahead, as a share of the mean, by series.
const ERROR_MAX: [(&str, f64); 2] = [("transatlantic", 0.08), ("uk", 0.10)];
/// How often the high mark must hold, on the series that are judged by it.
const HELD: std::ops::RangeInclusive<f64> = 0.78..=0.82;
/// Weeks from which on a series is judged by the mark a day ahead: shorter ones have too few days.
const LONG_S: f64 = 28.0 * DAY_S;

/// Which series to play.
#[derive(Debug, Args)]
pub struct ForecastPlan {
    /// Folder of the traces: `wan_*.csv.zst`.
    data: PathBuf,
    /// Where rows go; nowhere if absent.
    #[arg(long)]
    results: Option<PathBuf>,
}

/// One series at one distance.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct ForecastRow {
    /// When, how, of what and where it was made.
    #[serde(flatten)]
    pub made: Made,
    /// `transatlantic`, `uk`, `abilene`, `abilene ATLAM5`, `geant`, ..
    pub series: String,
    /// Seconds ahead.
    pub ahead_s: f64,
    /// Forecasts that were judged.
    pub judged: usize,
    /// Mean absolute error over the mean load.
    pub error: f64,
    /// The same of "as now", "as a day ago" and "as a week ago"; none where there is no such sample.
    pub simple: [Option<f64>; 3],
    /// How often the load stayed below the high mark.
    pub held: f64,
    /// The bound on the error, where there is one.
    pub error_max: Option<f64>,
    /// Whether the mark is judged here.
    pub held_is_judged: bool,
}

/// Plays all series.
///
/// # Errors
///
/// When a trace cannot be read, or a figure misses its bound; the rows are written all the same.
pub fn forecasts(plan: &ForecastPlan) -> Result<()> {
    println!(
        "{:<16} {:>7} {:>8} {:>8} {:>10} {:>10} {:>7}",
        "series", "ahead", "error %", "as now", "yesterday", "last week", "held %"
    );
    let (mut figures, mut missed) = (0, Vec::new());
    for load in traces::links(&plan.data)? {
        for ahead_s in AHEAD_S {
            let Some(judged) = judge(&load, ahead_s) else { continue };
            let is_day = ahead_s >= DAY_S;
            let bound = ERROR_MAX.iter().find(|(name, _)| is_day && *name == load.name);
            let error_max = bound.map(|(_, most)| *most);
            let length_s = load.values.len() as f64 * load.sample_s;
            let held_is_judged = ahead_s <= 3600.0 && !load.is_part || is_day && length_s >= LONG_S;
            let row = ForecastRow {
                made: Made::now(&Revision::current()?)?,
                series: load.name.clone(),
                ahead_s: judged.ahead_s,
                judged: judged.count,
                error: judged.errors[0].unwrap_or_default(),
                simple: [judged.errors[1], judged.errors[2], judged.errors[3]],
                held: judged.held,
                error_max,
                held_is_judged,
            };
            figures += usize::from(error_max.is_some()) + usize::from(held_is_judged);
            if error_max.is_some_and(|most| row.error > most) {
                missed.push(format!("{} {} s: error", row.series, row.ahead_s));
            }
            if held_is_judged && !HELD.contains(&row.held) {
                missed.push(format!("{} {} s: mark", row.series, row.ahead_s));
            }
            println!("{}", line(&row));
            if let Some(results) = &plan.results {
                row::append(results, &row)?;
            }
        }
    }
    println!("bounds: error a day ahead 8 % (transatlantic), 10 % (uk); the mark holds 78 to 82 %");
    ensure!(missed.is_empty(), "{} of {figures} miss: {}", missed.len(), missed.join(", "));
    Ok(())
}

/// What came of the forecasts of one series at one distance.
struct Judged {
    ahead_s: f64,
    count: usize,
    /// Of the forecast and of the three simple rules.
    errors: [Option<f64>; 4],
    held: f64,
}

/// Nothing if the series has no load to judge by.
fn judge(load: &LinkLoad, ahead_s: f64) -> Option<Judged> {
    let at_s = |sample: usize| (sample as f64 * load.sample_s) as i64;
    let samples = |seconds: f64| ((seconds / load.sample_s).round() as usize).max(1);
    let (ahead, day, week) = (samples(ahead_s), samples(DAY_S), samples(7.0 * DAY_S));
    let from = (load.values.len() as f64 * JUDGED_FROM) as usize;
    let mut season = Season::new(load.slot_s);
    let (mut sum, mut count, mut held) = (0.0, 0, 0);
    let mut errors = [Some(0.0); 4];
    for now in 0..load.values.len().saturating_sub(ahead) {
        season.observe(at_s(now), load.values[now]);
        let target = now + ahead;
        if now < from {
            continue;
        }
        let said = season.outlook(at_s(target))?;
        let came = load.values[target];
        let back = |by: usize| {
            let by = by * ahead.div_ceil(by);
            target.checked_sub(by).map(|sample| load.values[sample])
        };
        let each = [Some(said.mean), Some(load.values[now]), back(day), back(week)];
        for (error, said) in errors.iter_mut().zip(each) {
            *error = error.zip(said).map(|(error, said)| error + (came - said).abs());
        }
        sum += came;
        count += 1;
        held += usize::from(came <= said.high);
    }
    (sum > 0.0).then(|| Judged {
        ahead_s: ahead as f64 * load.sample_s,
        count,
        errors: errors.map(|error| error.map(|error| error / sum)),
        held: held as f64 / count as f64,
    })
}

fn line(row: &ForecastRow) -> String {
    let percent = |share: Option<f64>| {
        share.map_or_else(|| "-".to_owned(), |share| format!("{:.1}", share * 100.0))
    };
    let [now, day, week] = row.simple.map(percent);
    format!(
        "{:<16} {:>7.0} {:>8.1} {now:>8} {day:>10} {week:>10} {:>7.1}{}",
        row.series,
        row.ahead_s,
        row.error * 100.0,
        row.held * 100.0,
        if row.held_is_judged { " *" } else { "" }
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_series_that_repeats_is_foreseen_and_one_without_load_is_not_judged() {
        let values = (0..288 * 20).map(|at| if at / 144 % 2 == 0 { 1.0 } else { 3.0 }).collect();
        let mut load = LinkLoad {
            name: "test".to_owned(),
            is_part: false,
            sample_s: 300.0,
            slot_s: 300,
            values,
        };
        let judged = judge(&load, DAY_S).unwrap();
        assert!(judged.errors[0].unwrap() < 0.03, "{:?}", judged.errors);
        assert_eq!(judged.errors[2], Some(0.0));
        load.values.fill(0.0);
        assert!(judge(&load, DAY_S).is_none());
    }
}
