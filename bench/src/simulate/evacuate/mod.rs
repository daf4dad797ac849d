//! Evacuation: sixty VMs, one link, a deadline; the planner beside simple orders and a proven bound.
//!
//! Invariant: every share is of a bound that no order over the link exceeds, found with the truth; a
//! figure that misses its target ends the command with an error.
//!
//! Reading order: `world` (what happens, and what is known before), `players` (who decides), `bound`,
//! this file (set-up, figures, targets).

mod bound;
mod players;
mod timing;
mod world;

use std::path::PathBuf;

use anyhow::{Context, Result, ensure};
use clap::Args;
use rand::rngs::Xoshiro256PlusPlus;
use rand::seq::SliceRandom;
use rand::{RngExt, SeedableRng};
use serde::{Deserialize, Serialize};

use self::players::Longhaul;
use self::world::{Truth, World};
use super::traces::{self, BusinessVm};
use crate::row::{self, Made, Revision, median};

/// VMs of a trial.
const VMS: usize = 60;
/// Weights are from 1 to this.
const WEIGHT_MAX: u32 = 8;
/// Disk that each VM sends, in MiB.
const DISK_MIB: u64 = 20 * 1024;
/// 500 Mbit/s in MiB a second.
const LINK_MIB_S: f64 = 500e6 / 8.0 / 1_048_576.0;
/// The link's own load takes so much of it when it is highest.
const PEAK: f64 = 0.9;
/// Shares of all bytes that the link carries by the deadline.
const TIGHT: [f64; 4] = [0.3, 0.5, 0.7, 0.9];
/// MiB a second that a busy core changes.
const DIRTY_PER_CORE: [f64; 2] = [6.0, 2.0];
/// Samples of a day.
const DAY: usize = traces::SAMPLES_PER_DAY;
/// Samples of the link that forecasts may need before the start, and that a trial may need after.
const BEFORE: usize = 6500;
const AFTER: usize = 3 * DAY;
/// Seconds of a shock.
const SHOCK_S: usize = 1800;
/// Targets, as shares of the bound, and of the promised VMs.
const FORECAST_MIN: f64 = 0.97;
const TRUTH_MIN: f64 = 0.99;
const SHOCK_MIN: f64 = 0.9;
const PROMISED_MIN: f64 = 0.99;

/// What to play, and where it is.
#[derive(Debug, Args)]
pub struct EvacuatePlan {
    /// Folder of the traces: `bitbrains_rnd_2013-09_*` and `wan_transatlantic_isp_2005_5min.csv.zst`.
    data: PathBuf,
    /// Trials of each tightness.
    #[arg(long, default_value_t = 25)]
    trials: u64,
    /// Decides VMs, weights and times.
    #[arg(long, default_value_t = 1)]
    seed: u64,
    /// Where rows go; nowhere if absent.
    #[arg(long)]
    results: Option<PathBuf>,
}

/// One trial at one tightness.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct EvacuateRow {
    /// When, how, of what and where it was made.
    #[serde(flatten)]
    pub made: Made,
    /// MiB a second that a busy core changes.
    pub dirty_per_core: f64,
    /// Share of all bytes that the link carries by the deadline.
    pub tight: f64,
    /// Decides VMs, weights, times and the planner's ties.
    pub seed: u64,
    /// Seconds to the deadline.
    pub deadline_s: usize,
    /// Weight of all VMs.
    pub weight: u32,
    /// No order saves more.
    pub bound: u32,
    /// Saved by the planner, which saw forecasts.
    pub forecast: u32,
    /// Saved by the planner, which was told the truth.
    pub truth: u32,
    /// Weight saved by each rival.
    pub rivals: Vec<(String, u32)>,
    /// Promised by the first plan, and those of them that arrived.
    pub promised: (usize, usize),
    /// The same with a link that halves for half an hour at a random time.
    pub shock: Shock,
    /// Plans made with forecasts.
    pub plans: usize,
    /// Longest that one after the first took, in seconds.
    pub again_s: f64,
}

/// What came of a trial with a shock.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Shock {
    /// When it began, in seconds.
    pub at_s: usize,
    /// No order that knows the shock saves more.
    pub bound: u32,
    /// Saved by the planner, which did not know it.
    pub forecast: u32,
    /// Promised by the first plan, and those of them that arrived.
    pub promised: (usize, usize),
}

/// The recorded series.
#[derive(Debug)]
struct Records {
    vms: Vec<BusinessVm>,
    writes: Vec<Vec<f64>>,
    leftover: Vec<f64>,
}

impl Records {
    fn read(plan: &EvacuatePlan) -> Result<Self> {
        let vms = traces::bitbrains(&plan.data, "2013-09")?;
        let writes = traces::bitbrains_writes(&plan.data, "2013-09")?;
        ensure!(vms.len() == writes.len(), "{} loads and {} writes", vms.len(), writes.len());
        let load = traces::transatlantic(&plan.data)?;
        ensure!(load.len() > BEFORE + AFTER, "the link's record is too short");
        let most = load.iter().copied().fold(f64::MIN_POSITIVE, f64::max);
        let leftover = load.iter().map(|load| LINK_MIB_S * (1.0 - PEAK * load / most)).collect();
        Ok(Self { vms, writes, leftover })
    }

    /// A trial before its deadline is set.
    fn world(&self, seed: u64, dirty_per_core: f64) -> Result<World> {
        let mut lots = Xoshiro256PlusPlus::seed_from_u64(seed);
        let mut chosen: Vec<usize> =
            (0..self.vms.len()).filter(|&vm| self.vms[vm].is_on()).collect();
        chosen.shuffle(&mut lots);
        let start = lots.random_range(BEFORE..self.leftover.len() - AFTER);
        let samples = self.vms.iter().map(|vm| vm.used.len()).min().unwrap_or(0);
        let samples = samples.min(self.writes.iter().map(Vec::len).min().unwrap_or(0));
        let length = 7 * DAY + AFTER;
        let from = lots.random_range(0..samples.checked_sub(length).context("a short month")?);
        let mut vms = Vec::new();
        for vm in chosen.into_iter().take(VMS) {
            let (of, written) = (&self.vms[vm], &self.writes[vm]);
            let cores = |at: usize| of.used[at] / of.mhz * of.cores;
            let dirty = |at: usize| dirty_per_core * cores(at) + written[at] / 1024.0;
            vms.push(Truth {
                weight: lots.random_range(1..=WEIGHT_MAX),
                memory_mib: of.memory_mib,
                whole: (of.memory_mib + DISK_MIB) as f64,
                dirty: (from..from + length).map(dirty).collect(),
            });
        }
        Ok(World { vms, link: self.leftover.clone(), start, deadline_s: 0, shock: None })
    }
}

/// The second by which the link has carried a share of all bytes.
fn deadline(world: &World, tight: f64) -> Result<usize> {
    let wanted = world.vms.iter().map(|vm| vm.whole).sum::<f64>() * tight;
    let (mut carried, mut at) = (0.0, 0);
    while carried < wanted {
        ensure!(at < AFTER * world::SLOT_S, "the link does not carry that in three days");
        carried += world.rate(at);
        at += 1;
    }
    Ok(at)
}

/// Plays trials of every tightness under the planner, the rivals and the bound; then takes the time of
/// large plans.
///
/// # Errors
///
/// When a trace cannot be read, or when a figure misses its target; the rows are written all the same.
pub fn evacuate(plan: &EvacuatePlan) -> Result<()> {
    let records = Records::read(plan)?;
    let mut missed = Vec::new();
    for dirty_per_core in DIRTY_PER_CORE {
        for tight in TIGHT {
            let mut rows = Vec::new();
            for trial in 0..plan.trials {
                let row = trial_row(&records, (dirty_per_core, tight), plan.seed + trial)?;
                if let Some(results) = &plan.results {
                    row::append(results, &row)?;
                }
                rows.push(row);
            }
            missed.extend(judge(&rows));
        }
    }
    missed.extend(timing::measure(plan.results.as_deref())?);
    println!(
        "targets: {FORECAST_MIN} of the bound with forecasts, {TRUTH_MIN} with the truth, {SHOCK_MIN} \
         of the bound that knows the shock, {PROMISED_MIN} of the promised arrive"
    );
    ensure!(missed.is_empty(), "missed: {}", missed.join("; "));
    Ok(())
}

fn trial_row(records: &Records, (dirty, tight): (f64, f64), seed: u64) -> Result<EvacuateRow> {
    let mut world = records.world(seed, dirty)?;
    world.deadline_s = deadline(&world, tight)?;
    let mut ours = Longhaul::new(&world, false, seed);
    let arrived = world.play(&mut ours)?;
    let forecast = world.weight(&arrived);
    let promised = kept(&ours.promised, &arrived);
    let (plans, again_s) = (ours.plans, ours.again_s);
    let truth = world.weight(&world.play(&mut Longhaul::new(&world, true, seed))?);
    let mut saved = vec![("all at once".to_owned(), world.weight(&world.play_all_at_once()))];
    for (name, mut order) in players::rivals(&world) {
        saved.push((name.to_owned(), world.weight(&world.play(&mut order)?)));
    }
    let found = saved.iter().map(|(_, weight)| *weight).fold(forecast.max(truth), u32::max);
    let bound = bound::bound(&world, found);
    let (deadline_s, weight) = (world.deadline_s, world.vms.iter().map(|vm| vm.weight).sum());
    Ok(EvacuateRow {
        made: Made::now(&Revision::current()?)?,
        dirty_per_core: dirty,
        tight,
        seed,
        deadline_s,
        weight,
        bound,
        forecast,
        truth,
        rivals: saved,
        promised,
        shock: shock(&world, seed)?,
        plans,
        again_s,
    })
}

/// The same trial with a link that halves.
fn shock(world: &World, seed: u64) -> Result<Shock> {
    let mut lots = Xoshiro256PlusPlus::seed_from_u64(seed ^ 0x5A0C);
    let at_s = lots.random_range(0..world.deadline_s.saturating_sub(SHOCK_S).max(1));
    let shocked = World { shock: Some((at_s, at_s + SHOCK_S)), ..world.clone() };
    let mut ours = Longhaul::new(&shocked, false, seed);
    let arrived = shocked.play(&mut ours)?;
    let forecast = shocked.weight(&arrived);
    let bound = bound::bound(&shocked, forecast);
    Ok(Shock { at_s, bound, forecast, promised: kept(&ours.promised, &arrived) })
}

fn kept(promised: &[usize], arrived: &[bool]) -> (usize, usize) {
    (promised.len(), promised.iter().filter(|&&vm| arrived[vm]).count())
}

/// Prints what came of one tightness, and says which targets are missed.
fn judge(rows: &[EvacuateRow]) -> Vec<String> {
    let Some(first) = rows.first() else { return Vec::new() };
    let (dirty, tight) = (first.dirty_per_core, first.tight);
    println!(
        "{dirty} MiB/s a busy core, the link carries {:.0} % of all bytes: {} trials, {:.1} h, bound \
         {:.3} of all weight",
        tight * 100.0,
        rows.len(),
        median(rows.iter().map(|row| row.deadline_s as f64)) / 3600.0,
        median(rows.iter().map(|row| f64::from(row.bound) / f64::from(row.weight))),
    );
    let mut missed = Vec::new();
    let mut figure = |name: &str, shares: Vec<f64>, least: Option<f64>| {
        let (low, high) = interval(&shares);
        let middle = median(shares.iter().copied());
        let target = least.map(|least| format!(" (target {least})")).unwrap_or_default();
        println!("  {name:<34} {middle:.3} [{low:.3}, {high:.3}]{target}");
        if least.is_some_and(|least| middle < least) {
            missed.push(format!("{dirty} MiB/s, {tight}: {name} {middle:.3}"));
        }
    };
    let share = |saved: u32, bound: u32| f64::from(saved) / f64::from(bound.max(1));
    for (at, (name, _)) in first.rivals.iter().enumerate() {
        figure(name, rows.iter().map(|row| share(row.rivals[at].1, row.bound)).collect(), None);
    }
    let of = |saved: fn(&EvacuateRow) -> (u32, u32)| {
        rows.iter().map(saved).map(|(saved, bound)| share(saved, bound)).collect::<Vec<_>>()
    };
    figure("Longhaul, forecasts", of(|row| (row.forecast, row.bound)), Some(FORECAST_MIN));
    figure("Longhaul, the truth", of(|row| (row.truth, row.bound)), Some(TRUTH_MIN));
    figure("Longhaul, shock", of(|row| (row.shock.forecast, row.shock.bound)), Some(SHOCK_MIN));
    for (name, of) in [
        ("promised", (|row| row.promised) as fn(&EvacuateRow) -> (usize, usize)),
        ("promised, shock", |row| row.shock.promised),
    ] {
        let sum = |part: fn((usize, usize)) -> usize| rows.iter().map(of).map(part).sum::<usize>();
        let (made, arrived) = (sum(|both| both.0), sum(|both| both.1));
        let kept = arrived as f64 / made.max(1) as f64;
        println!("  {name:<34} {arrived} of {made} arrive (target {PROMISED_MIN})");
        if kept < PROMISED_MIN {
            missed.push(format!("{dirty} MiB/s, {tight}: {name} {kept:.3}"));
        }
    }
    missed
}

/// The 95 % bootstrap interval of the median.
fn interval(values: &[f64]) -> (f64, f64) {
    let mut lots = Xoshiro256PlusPlus::seed_from_u64(7);
    let mut medians: Vec<f64> = (0..2000)
        .map(|_| median((0..values.len()).map(|_| values[lots.random_range(0..values.len())])))
        .collect();
    medians.sort_by(f64::total_cmp);
    (medians[50], medians[1949])
}

#[cfg(test)]
mod tests {
    use super::world::tests::quiet;
    use super::*;

    #[test]
    fn the_planner_that_knows_all_meets_the_bound_of_quiet_guests() {
        let world = quiet(&[5000.0, 4800.0, 5300.0, 900.0], 1100);
        let mut ours = Longhaul::new(&world, true, 1);
        let saved = world.weight(&world.play(&mut ours).unwrap());
        assert_eq!(saved, bound::bound(&world, 0));
        assert_eq!(saved, 3);
    }

    #[test]
    fn the_interval_of_a_constant_is_that() {
        assert_eq!(interval(&[0.5; 5]), (0.5, 0.5));
    }
}
