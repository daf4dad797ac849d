//! Consolidation: the planner on the days and hosts on which THR-MMT and LR-MMT were measured.
//!
//! Invariant: the planner sees what the rivals see, samples up to now, and starts from the same
//! placement; its figures are counted by the same accounts.

use std::path::PathBuf;
use std::time::Instant;

use anyhow::{Result, ensure};
use clap::Args;
use longhaul_scheduler::forecast::{Forecaster, forecast_all};
use longhaul_scheduler::policy::{Goal, Policy};
use longhaul_scheduler::state::{Host, Moved, State, Vm};
use serde::{Deserialize, Serialize};

use super::account::Outcome;
use super::day::{self, Planner};
use super::machine::{HostType, MIGRATION_MIB_S};
use super::rivals::{HostView, Move, Overload, VmView};
use super::traces;
use crate::row::{self, Made, Revision};

/// What a VM of which nothing was seen may differ from its forecast, as a share of its size.
const COLD: f64 = 0.2;

/// Which days to play, and where they are.
#[derive(Debug, Args)]
pub struct ConsolidatePlan {
    /// Folder of the traces: `planetlab_DAY.csv.zst`.
    data: PathBuf,
    /// Days to play.
    #[arg(long, value_delimiter = ',', default_values = traces::PLANETLAB_DAYS)]
    days: Vec<String>,
    /// Breaks the planner's ties.
    #[arg(long, default_value_t = 1)]
    seed: u64,
    /// Where rows go; nowhere if absent.
    #[arg(long)]
    results: Option<PathBuf>,
}

/// One day under the planner and under both rivals.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct ConsolidateRow {
    /// When, how, of what and where it was made.
    #[serde(flatten)]
    pub made: Made,
    /// `20110303`.
    pub day: String,
    /// Breaks the planner's ties.
    pub seed: u64,
    /// The planner.
    pub ours: Outcome,
    /// THR-MMT-0.8.
    pub thr: Outcome,
    /// LR-MMT-1.2.
    pub lr: Outcome,
    /// Which bounds the day misses.
    pub missed: Vec<String>,
    /// Seconds that the planner's day took.
    pub took_s: f64,
}

/// The planner in the simulator: its forecasters, and what it moved.
#[derive(Debug)]
struct Longhaul {
    policy: Policy,
    seed: u64,
    forecasters: Vec<Forecaster>,
    asked: Vec<Vec<f64>>,
    moved: Vec<Moved>,
}

impl Longhaul {
    fn new(policy: Policy, seed: u64, vms: usize, hosts: usize) -> Self {
        let forecasters = vec![Forecaster::default(); vms];
        Self { policy, seed, forecasters, asked: vec![Vec::new(); hosts], moved: Vec::new() }
    }
}

impl Planner for Longhaul {
    fn plan(&mut self, now_s: f64, hosts: &[HostView], vms: &[VmView]) -> Result<Vec<Move>> {
        let now_s = now_s as i64;
        let mut state = State { migration_mib_s: MIGRATION_MIB_S, ..State::default() };
        // Their own numbers, as ended VMs are not in the state.
        let mut numbers = Vec::new();
        for (number, view) in hosts.iter().enumerate() {
            for &vm in &view.vms {
                let of = &vms[vm];
                self.forecasters[vm].observe(now_s, of.asked);
                numbers.push(vm);
                state.vms.push(Vm {
                    name: format!("vm{vm}"),
                    host: number,
                    asked: of.asked,
                    // Memory does not bind in this set-up, for anyone.
                    memory_mib: 0,
                    move_mib: of.memory_mib,
                    is_pinned: false,
                    is_migrating: false,
                    together: None,
                    apart: None,
                });
            }
            let asked = &mut self.asked[number];
            asked.push(view.vms.iter().map(|&vm| vms[vm].asked).sum());
            if asked.len() > self.policy.hot_of {
                asked.remove(0);
            }
            state.hosts.push(host(number, view.host, !view.vms.is_empty(), now_s, asked));
        }
        self.moved.retain(|moved| now_s - moved.at_s < self.policy.no_return_s);
        state.moved.clone_from(&self.moved);
        let forecasters: Vec<_> = numbers.iter().map(|&vm| &self.forecasters[vm]).collect();
        let sizes: Vec<_> = numbers.iter().map(|&vm| vms[vm].mips).collect();
        let forecasts = forecast_all(&forecasters, &sizes, COLD);
        let plan = longhaul_scheduler::plan(&state, &forecasts, &self.policy, now_s, self.seed)?;

        let mut moves = Vec::new();
        for one in plan.moves() {
            let at = |name: &str, of: &str| name.trim_start_matches(of).parse::<usize>();
            let (vm, from, to) = (at(&one.vm, "vm")?, at(&one.from, "host")?, at(&one.to, "host")?);
            moves.push(Move { vm, to });
            self.moved.push(Moved { vm: one.vm.clone(), from, to, at_s: now_s });
        }
        Ok(moves)
    }
}

fn host(number: usize, kind: HostType, is_on: bool, now_s: i64, asked: &[f64]) -> Host {
    Host {
        name: format!("host{number}"),
        cpu: kind.mips(),
        cpu_per_vm: kind.core_mips(),
        memory_mib: 0,
        watts: (kind.power_w(0.0), kind.power_w(1.0)),
        is_on,
        is_in_maintenance: false,
        is_settling: false,
        sampled_at_s: now_s,
        asked: asked.to_vec(),
    }
}

/// Plays days under the planner, THR-MMT-0.8 and LR-MMT-1.2.
///
/// # Errors
///
/// When a trace cannot be read, or when a median misses its bound; the rows are written all the same.
pub fn consolidate(plan: &ConsolidatePlan) -> Result<()> {
    println!(
        "{:<9} {:>23} {:>19} {:>20} {:>23} {:>20} {:>6}",
        "day", "energy kWh", "migrations", "SLATAH %", "unmet %", "moved GiB", "s"
    );
    let mut rows = Vec::new();
    for name in &plan.days {
        let day = traces::planetlab(&plan.data, name)?;
        let (first, lr) = (Overload::Threshold(0.8), Overload::Regression(1.2));
        let thr = day::play(&day, first)?;
        let lr = day::play(&day, lr)?;
        let start = Instant::now();
        let policy = Policy::new(Goal::Consolidate);
        let mut planner = Longhaul::new(policy, plan.seed, day.vms.len(), super::machine::HOSTS);
        let ours = day::play_with(&day, first, &mut planner)?;
        let took_s = start.elapsed().as_secs_f64();
        println!("{}", line(name, &[&ours, &thr, &lr], took_s));
        if let Some(results) = &plan.results {
            let made = Made::now(&Revision::current()?)?;
            let missed = missed(&ours, &thr, &lr);
            let (day, ours, thr, lr) = (name.clone(), ours.clone(), thr.clone(), lr.clone());
            let row = ConsolidateRow { made, day, seed: plan.seed, ours, thr, lr, missed, took_s };
            row::append(results, &row)?;
        }
        rows.push([ours, thr, lr]);
    }
    let [ours, thr, lr] = [0, 1, 2].map(|who| median(rows.iter().map(|row| &row[who])));
    println!("{}", line("median", &[&ours, &thr, &lr], 0.0));
    println!(
        "Longhaul/THR-MMT-0.8/LR-MMT-1.2; bounds: energy that of LR; SLATAH and unmet half of THR's; \
         migrations and moved a tenth of both"
    );
    let missed = missed(&ours, &thr, &lr);
    ensure!(missed.is_empty(), "the median misses its bound in {}", missed.join(", "));
    Ok(())
}

/// Which bounds a day misses.
fn missed(ours: &Outcome, thr: &Outcome, lr: &Outcome) -> Vec<String> {
    let tenth = |of: fn(&Outcome) -> u64| of(ours) as f64 <= of(thr).min(of(lr)) as f64 / 10.0;
    [
        ("energy", ours.energy_kwh <= lr.energy_kwh),
        ("SLATAH", ours.slatah <= thr.slatah / 2.0),
        ("unmet", ours.unmet <= thr.unmet / 2.0),
        ("migrations", tenth(|outcome| outcome.migrations)),
        ("moved", tenth(|outcome| outcome.moved_mib)),
    ]
    .into_iter()
    .filter(|(_, is_met)| !is_met)
    .map(|(name, _)| name.to_owned())
    .collect()
}

/// The median of each figure.
fn median<'a>(of: impl Iterator<Item = &'a Outcome> + Clone) -> Outcome {
    let middle = |figure: fn(&Outcome) -> f64| {
        let mut figures: Vec<f64> = of.clone().map(figure).collect();
        figures.sort_by(f64::total_cmp);
        let at = figures.len() / 2;
        let low = at.saturating_sub(usize::from(figures.len().is_multiple_of(2)));
        figures.get(at).map_or(0.0, |high| f64::midpoint(figures[low], *high))
    };
    Outcome {
        energy_kwh: middle(|one| one.energy_kwh),
        migrations: middle(|one| one.migrations as f64) as u64,
        moved_mib: middle(|one| one.moved_mib as f64) as u64,
        slatah: middle(|one| one.slatah),
        pdm: middle(|one| one.pdm),
        unmet: middle(|one| one.unmet),
        sleeps: middle(|one| one.sleeps as f64) as u64,
    }
}

fn line(day: &str, of: &[&Outcome; 3], took_s: f64) -> String {
    let three = |figure: fn(&Outcome) -> f64, digits: usize| {
        of.map(|outcome| format!("{:.digits$}", figure(outcome))).join("/")
    };
    format!(
        "{day:<9} {:>23} {:>19} {:>20} {:>23} {:>20} {took_s:>6.2}",
        three(|one| one.energy_kwh, 1),
        three(|one| one.migrations as f64, 0),
        three(|one| one.slatah * 100.0, 2),
        three(|one| one.unmet * 100.0, 4),
        three(|one| one.moved_mib as f64 / 1024.0, 0),
    )
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::simulate::traces::{Day, SAMPLES_PER_DAY};

    #[test]
    fn a_level_load_is_packed_once_and_then_left_alone() {
        let day = Day { name: "level".to_owned(), vms: vec![vec![0.2; SAMPLES_PER_DAY]; 40] };
        let play = || {
            let policy = Policy::new(Goal::Consolidate);
            let mut planner = Longhaul::new(policy, 1, day.vms.len(), super::super::machine::HOSTS);
            day::play_with(&day, Overload::Threshold(0.8), &mut planner).unwrap()
        };
        let ours = play();
        assert_eq!(ours, play());
        assert!(ours.migrations > 0 && ours.migrations <= 80, "{ours:?}");
        let rival = day::play(&day, Overload::Threshold(0.8)).unwrap();
        assert!(ours.energy_kwh < rival.energy_kwh * 1.1, "{ours:?} {rival:?}");
    }
}
