//! Balancing: the planner on a fixed number of well-filled hosts, beside rivals' rules and no moves.
//!
//! Invariant: planner and rivals see the same samples, hosts and migrations; what counts is what VMs
//! ask of their hosts, by the minute.
//!
//! Reading order: `fleet` (the clock and the figures), `rivals` (others' rules), this file (ours, the
//! traces, the bounds).

mod fleet;
mod rivals;

use std::path::PathBuf;

use anyhow::{Result, ensure};
use clap::Args;
use longhaul_scheduler::forecast::{Forecaster, forecast_all};
use longhaul_scheduler::policy::{Goal, Policy};
use longhaul_scheduler::state::{Host, Moved, State, Vm};
use rand::rngs::Xoshiro256PlusPlus;
use rand::seq::SliceRandom;
use rand::{RngExt, SeedableRng};
use serde::{Deserialize, Serialize};

use self::fleet::{Balancer, Figures, Fleet, FleetVm, MIGRATION_MIB_S, Nobody, View};
use self::rivals::{Gap, Marks, Sandpiper};
use super::machine;
use super::traces::{self, BusinessVm};
use crate::row::{self, Made, Revision};

/// Mean loads of the hosts, as shares of their CPU.
const LOADS: [f64; 3] = [0.6, 0.7, 0.8];
/// What a VM of which nothing was seen may differ from its forecast, as a share of its size.
const COLD: f64 = 0.2;
/// CPU of a host of the PlanetLab fleet in MIPS: 8 of the cores of the consolidation set-up.
const PLANETLAB_HOST_MIPS: f64 = 8.0 * 2660.0;
/// CPU of a host of the Bitbrains fleet in MHz: 24 cores of 2.6 GHz.
const BITBRAINS_HOST_MHZ: f64 = 62_400.0;
/// How much more memory all hosts have than all VMs.
const MEMORY_ROOM: f64 = 1.5;
/// Days of a month of Bitbrains that are played, the first being 0.
const BITBRAINS_DAYS: std::ops::Range<usize> = 1..11;
/// Least part of the hot minutes that must go.
const CUT_MIN: f64 = 0.8;

/// What to play, and where it is.
#[derive(Debug, Args)]
pub struct BalancePlan {
    /// Folder of the traces: `planetlab_DAY.csv.zst` and `bitbrains_rnd_MONTH_*.csv.zst`.
    data: PathBuf,
    /// Days of PlanetLab.
    #[arg(long, value_delimiter = ',', default_values = traces::PLANETLAB_DAYS)]
    days: Vec<String>,
    /// Month of Bitbrains, of which ten days are played; the planner was fitted to August.
    #[arg(long, default_value = "2013-09")]
    month: String,
    /// Decides where VMs start, and the planner's ties.
    #[arg(long, default_value_t = 1)]
    seed: u64,
    /// Where rows go; nowhere if absent.
    #[arg(long)]
    results: Option<PathBuf>,
}

/// One day, load and balancer.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct BalanceRow {
    /// When, how, of what and where it was made.
    #[serde(flatten)]
    pub made: Made,
    /// `planetlab` or `bitbrains`.
    pub set: String,
    /// Which day of it.
    pub day: String,
    /// Mean load of the hosts.
    pub load: f64,
    /// Hosts.
    pub hosts: usize,
    /// VMs.
    pub vms: usize,
    /// Decides where VMs start, and the planner's ties.
    pub seed: u64,
    /// `longhaul`, `nobody` or a rival.
    pub balancer: String,
    /// What came of it.
    pub figures: Figures,
    /// Hot host-minutes that no placement avoids.
    pub unavoidable_minutes: u64,
}

/// The planner as a balancer.
#[derive(Debug)]
struct Longhaul {
    policy: Policy,
    seed: u64,
    sizes: Vec<f64>,
    forecasters: Vec<Forecaster>,
    moved: Vec<Moved>,
    /// Moves whose gain was below their cost.
    dear: u64,
}

impl Longhaul {
    fn new(fleet: &Fleet, seed: u64) -> Self {
        let sizes: Vec<f64> = fleet.vms.iter().map(|vm| vm.cpu).collect();
        let forecasters = vec![Forecaster::default(); sizes.len()];
        let policy = Policy::new(Goal::Balance);
        Self { policy, seed, sizes, forecasters, moved: Vec::new(), dear: 0 }
    }
}

impl Balancer for Longhaul {
    fn round(&mut self, view: &View<'_>) -> Result<Vec<(usize, usize)>> {
        for (forecaster, asked) in self.forecasters.iter_mut().zip(view.asked) {
            forecaster.observe(view.now_s, *asked);
        }
        self.moved.retain(|moved| view.now_s - moved.at_s < 86_400);
        let state = state(view, &self.moved, self.policy.hot_of);
        let forecasters: Vec<_> = self.forecasters.iter().collect();
        let forecasts = forecast_all(&forecasters, &self.sizes, COLD);
        let policy = &self.policy;
        let plan = longhaul_scheduler::plan(&state, &forecasts, policy, view.now_s, self.seed)?;
        let mut moves = Vec::new();
        for one in plan.moves() {
            let (vm, from, to): (usize, usize, usize) =
                (one.vm.parse()?, one.from.parse()?, one.to.parse()?);
            self.dear += u64::from(one.gain <= one.cost);
            self.moved.push(Moved { vm: one.vm.clone(), from, to, at_s: view.now_s });
            moves.push((vm, to));
        }
        Ok(moves)
    }
}

/// What the planner is told. Names are numbers.
fn state(view: &View<'_>, moved: &[Moved], samples: usize) -> State {
    let hosts = view.host_asked.iter().enumerate().map(|(number, asked)| Host {
        name: number.to_string(),
        cpu: view.fleet.cpu,
        cpu_per_vm: view.fleet.cpu,
        memory_mib: view.fleet.memory_mib,
        watts: (100.0, 200.0),
        is_on: true,
        is_in_maintenance: false,
        is_settling: false,
        sampled_at_s: view.now_s,
        asked: asked[asked.len().saturating_sub(samples)..].to_vec(),
    });
    let vms = view.asked.iter().enumerate().map(|(number, &asked)| Vm {
        name: number.to_string(),
        host: view.host_of[number],
        asked,
        memory_mib: view.fleet.vms[number].memory_mib,
        move_mib: view.fleet.vms[number].memory_mib.max(1),
        is_pinned: false,
        is_migrating: view.is_migrating[number],
        together: None,
        apart: None,
    });
    State {
        hosts: hosts.collect(),
        vms: vms.collect(),
        moved: moved.to_vec(),
        migration_mib_s: MIGRATION_MIB_S,
    }
}

/// A fleet of as few hosts as bring the VMs to a mean load, each VM on a random host.
fn fleet(cpu: f64, load: f64, vms: Vec<FleetVm>, seed: u64) -> Fleet {
    let samples = vms.first().map_or(1, |vm| vm.asked.len()).max(1) as f64;
    let mean: f64 = vms.iter().flat_map(|vm| &vm.asked).sum::<f64>() / samples;
    let hosts = ((mean / (cpu * load)).round() as usize).max(2);
    let mut order: Vec<usize> = (0..vms.len()).collect();
    order.shuffle(&mut Xoshiro256PlusPlus::seed_from_u64(seed));
    let mut start = vec![0; vms.len()];
    for (at, vm) in order.into_iter().enumerate() {
        start[vm] = at % hosts;
    }
    // Room beside the mean, and for the uneven start.
    let mut needs = vec![0; hosts];
    for (vm, host) in vms.iter().zip(&start) {
        needs[*host] += vm.memory_mib;
    }
    let mean_mib = needs.iter().sum::<u64>() as f64 / hosts as f64;
    let most_mib = needs.into_iter().max().unwrap_or(0);
    let memory_mib = ((mean_mib * MEMORY_ROOM) as u64).max(most_mib);
    Fleet { cpu, memory_mib, hosts, vms, start }
}

/// The days of one set, by name.
type Days = Vec<(String, Vec<FleetVm>)>;

fn planetlab(plan: &BalancePlan) -> Result<Days> {
    let day = |name: &String| {
        let day = traces::planetlab(&plan.data, name)?;
        let count = day.vms.len();
        let vm = |(number, trace): (usize, Vec<f64>)| {
            let (cpu, memory_mib) = machine::vm_size(number, count);
            FleetVm { cpu, memory_mib, asked: trace.iter().map(|share| share * cpu).collect() }
        };
        Ok((name.clone(), day.vms.into_iter().enumerate().map(vm).collect()))
    };
    plan.days.iter().map(day).collect()
}

fn bitbrains(plan: &BalancePlan) -> Result<Days> {
    let vms = traces::bitbrains(&plan.data, &plan.month)?;
    let per_day = traces::SAMPLES_PER_DAY;
    let day = |day: usize| {
        let vm = |vm: &BusinessVm| FleetVm {
            cpu: vm.mhz,
            memory_mib: vm.memory_mib,
            asked: vm.used[day * per_day..(day + 1) * per_day].to_vec(),
        };
        // A VM without size or memory was never on.
        let on = vms.iter().filter(|vm| vm.mhz > 0.0 && vm.memory_mib > 0);
        (format!("{}-{:02}", plan.month, day + 1), on.map(vm).collect())
    };
    Ok(BITBRAINS_DAYS.map(day).collect())
}

/// Plays fixed fleets under the planner and the rivals.
///
/// # Errors
///
/// When a trace cannot be read, or when a bound is missed; the rows are written all the same.
pub fn balance(plan: &BalancePlan) -> Result<()> {
    let mut missed = Vec::new();
    for (set, cpu, days) in [
        ("planetlab", PLANETLAB_HOST_MIPS, planetlab(plan)?),
        ("bitbrains", BITBRAINS_HOST_MHZ, bitbrains(plan)?),
    ] {
        for load in LOADS {
            let sums = play_days(plan, (set, cpu, load), &days)?;
            missed.extend(judge(set, load, &sums));
        }
    }
    let after_start = stationary(plan.seed)?;
    println!("stationary load: {after_start} migrations after 30 min (bound 0)");
    if after_start > 0 {
        missed.push("stationary".to_owned());
    }
    ensure!(missed.is_empty(), "missed: {}", missed.join("; "));
    Ok(())
}

/// What came of all days of one set and load, for one balancer.
#[derive(Debug, Clone, Default)]
struct Sum {
    name: String,
    figures: Figures,
    vm_days: u64,
    unavoidable: u64,
    dear: u64,
}

fn play_days(plan: &BalancePlan, of: (&str, f64, f64), days: &Days) -> Result<Vec<Sum>> {
    let (set, cpu, load) = of;
    let names =
        ["nobody", "longhaul", "sandpiper-0.75", "sandpiper-0.85", "gap-5", "marks-0.85-0.65"];
    let mut sums = names.map(|name| Sum { name: name.to_owned(), ..Sum::default() });
    for (day, vms) in days {
        let fleet = fleet(cpu, load, vms.clone(), plan.seed);
        let unavoidable_minutes = fleet::unavoidable_minutes(&fleet);
        for sum in &mut sums {
            let mut ours = Longhaul::new(&fleet, plan.seed);
            let figures = match &*sum.name {
                "nobody" => fleet::play(&fleet, &mut Nobody)?,
                "longhaul" => fleet::play(&fleet, &mut ours)?,
                "sandpiper-0.75" => fleet::play(&fleet, &mut Sandpiper { threshold: 0.75 })?,
                "sandpiper-0.85" => fleet::play(&fleet, &mut Sandpiper { threshold: 0.85 })?,
                "gap-5" => fleet::play(&fleet, &mut Gap { percent: 5.0 })?,
                _ => fleet::play(&fleet, &mut Marks::default())?,
            };
            sum.add(&figures, fleet.vms.len() as u64, unavoidable_minutes, ours.dear);
            if let Some(results) = &plan.results {
                let row = BalanceRow {
                    made: Made::now(&Revision::current()?)?,
                    set: set.to_owned(),
                    day: day.clone(),
                    load,
                    hosts: fleet.hosts,
                    vms: fleet.vms.len(),
                    seed: plan.seed,
                    balancer: sum.name.clone(),
                    figures,
                    unavoidable_minutes,
                };
                row::append(results, &row)?;
            }
        }
    }
    Ok(sums.to_vec())
}

impl Sum {
    fn add(&mut self, one: &Figures, vms: u64, unavoidable: u64, dear: u64) {
        let all = &mut self.figures;
        all.hot_minutes += one.hot_minutes;
        all.migrations += one.migrations;
        all.moved_mib += one.moved_mib;
        all.most_per_vm_day = all.most_per_vm_day.max(one.most_per_vm_day);
        all.returns += one.returns;
        all.migrations_after_start += one.migrations_after_start;
        all.unmet += one.unmet;
        self.vm_days += vms;
        self.unavoidable += unavoidable;
        self.dear += dear;
    }
}

/// Prints the sums of one set and load, and says which bounds are missed.
fn judge(set: &str, load: f64, sums: &[Sum]) -> Vec<String> {
    println!(
        "{set}, mean load {:.0} %: {} host-minutes above 90 % that no placement avoids",
        load * 100.0,
        sums[0].unavoidable
    );
    println!(
        "  {:<16} {:>11} {:>7} {:>10} {:>10} {:>8} {:>9} {:>8}",
        "balancer",
        "hot minutes",
        "cut %",
        "migrations",
        "per VM day",
        "most/VM",
        "moved GiB",
        "returns"
    );
    let still = sums[0].figures.hot_minutes.max(1) as f64;
    let cut = |sum: &Sum| 1.0 - sum.figures.hot_minutes as f64 / still;
    for sum in sums {
        println!(
            "  {:<16} {:>11} {:>7.1} {:>10} {:>10.3} {:>8} {:>9} {:>8}",
            sum.name,
            sum.figures.hot_minutes,
            cut(sum) * 100.0,
            sum.figures.migrations,
            sum.figures.migrations as f64 / sum.vm_days.max(1) as f64,
            sum.figures.most_per_vm_day,
            sum.figures.moved_mib / 1024,
            sum.figures.returns,
        );
    }
    let ours = &sums[1];
    let mut missed = Vec::new();
    let mut hold = |is_met: bool, what: String| {
        if !is_met {
            missed.push(format!("{set} {load}: {what}"));
        }
    };
    hold(cut(ours) >= CUT_MIN, format!("hot minutes cut by {:.1} %", cut(ours) * 100.0));
    hold(ours.figures.migrations <= ours.vm_days, "more than one migration a VM and day".into());
    hold(ours.figures.returns == 0, format!("{} returns within 2 h", ours.figures.returns));
    hold(ours.dear == 0, format!("{} moves gained less than they cost", ours.dear));
    for rival in &sums[2..] {
        let is_cooler = ours.figures.hot_minutes <= rival.figures.hot_minutes;
        let is_calmer = ours.figures.migrations * 2 <= rival.figures.migrations;
        hold(is_cooler, format!("hotter than {}", rival.name));
        hold(is_calmer, format!("more than half of {}'s migrations", rival.name));
    }
    missed
}

/// Migrations after 30 min of loads that vary by 5 % around a level, from an uneven start.
fn stationary(seed: u64) -> Result<u64> {
    let mut lots = Xoshiro256PlusPlus::seed_from_u64(seed);
    let mut levels: Vec<f64> = (0..400).map(|vm| 20.0 + f64::from(vm % 17) * 10.0).collect();
    levels.shuffle(&mut lots);
    let vms = levels.iter().map(|level| {
        let noise = |_| level * (0.95 + 0.1 * lots.random::<f64>());
        let asked = (0..traces::SAMPLES_PER_DAY).map(noise).collect();
        FleetVm { cpu: 200.0, memory_mib: 1024, asked }
    });
    let fleet = fleet(2000.0, 0.7, vms.collect(), seed);
    let figures = fleet::play(&fleet, &mut Longhaul::new(&fleet, seed))?;
    Ok(figures.migrations_after_start)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_stationary_load_comes_to_rest() {
        assert_eq!(stationary(1).unwrap(), 0);
    }

    #[test]
    fn fleets_have_the_load_that_was_asked_for() {
        let vm = FleetVm { cpu: 20.0, memory_mib: 100, asked: vec![10.0; 4] };
        let fleet = fleet(100.0, 0.5, vec![vm; 50], 1);
        assert_eq!((fleet.hosts, fleet.memory_mib), (10, 750));
        assert!((0..10).all(|host| fleet.start.iter().filter(|at| **at == host).count() == 5));
    }
}
