//! What planning costs: one balance decision over many hosts, on one core.
//!
//! Invariant: the state is drawn from a seed, a third of its hosts are hot, and every VM has a forecaster
//! with a day of samples, as in an agent that has run for a day.

use std::path::PathBuf;
use std::time::Instant;

use anyhow::{Result, ensure};
use clap::Args;
use longhaul_scheduler::forecast::{Forecaster, forecast_all};
use longhaul_scheduler::plan;
use longhaul_scheduler::policy::{Goal, Policy};
use longhaul_scheduler::state::{Host, State, Vm};
use rand::rngs::Xoshiro256PlusPlus;
use rand::{RngExt, SeedableRng};
use serde::{Deserialize, Serialize};

use crate::process::peak_rss_bytes;
use crate::row::{self, Made, Revision};

/// Longest that one decision may take, in milliseconds.
const DECISION_MS_MAX: f64 = 100.0;
/// Most memory of this process, in MiB.
const MEMORY_MIB_MAX: u64 = 50;
const RUNS: usize = 21;
const SAMPLES: i64 = 288;
const SAMPLE_S: i64 = 300;
const CORES: f64 = 16.0;

/// How many hosts and VMs.
#[derive(Debug, Args)]
pub struct LightPlan {
    /// Hosts.
    #[arg(long, default_value_t = 100)]
    hosts: usize,
    /// VMs, spread over them.
    #[arg(long, default_value_t = 1000)]
    vms: usize,
    /// Decides what VMs ask for.
    #[arg(long, default_value_t = 1)]
    seed: u64,
    /// Where the row goes; nowhere if absent.
    #[arg(long)]
    results: Option<PathBuf>,
}

/// What it cost.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct LightRow {
    /// When, how, of what and where it was made.
    #[serde(flatten)]
    pub made: Made,
    /// Hosts.
    pub hosts: usize,
    /// VMs.
    pub vms: usize,
    /// Decides what VMs ask for.
    pub seed: u64,
    /// Milliseconds of one decision, forecasts included, median.
    pub decision_ms: f64,
    /// The slowest one.
    pub slowest_ms: f64,
    /// Moves that were decided.
    pub moves: usize,
    /// Microseconds that one sample of one VM costs.
    pub sample_us: f64,
    /// Most memory that this process had, in MiB.
    pub memory_mib: u64,
}

/// Times balance decisions.
///
/// # Errors
///
/// When the median is above 100 ms or the process takes more than 50 MiB; the row is written all the same.
pub fn light(wish: &LightPlan) -> Result<()> {
    let mut lots = Xoshiro256PlusPlus::seed_from_u64(wish.seed);
    let mut draw = move || lots.random::<f64>();
    let mut forecasters = vec![Forecaster::default(); wish.vms];
    let levels: Vec<f64> = (0..wish.vms).map(|vm| level(vm % wish.hosts, &mut draw)).collect();
    let started = Instant::now();
    for step in 0..SAMPLES {
        for (series, level) in forecasters.iter_mut().zip(&levels) {
            series.observe(step * SAMPLE_S, level * (0.9 + 0.2 * draw()));
        }
    }
    let sample_us = started.elapsed().as_secs_f64() * 1e6 / (SAMPLES as f64 * wish.vms as f64);
    let now_s = (SAMPLES - 1) * SAMPLE_S;
    let state = state(wish.hosts, &levels, now_s);
    let (policy, sizes) = (Policy::new(Goal::Balance), vec![4.0; wish.vms]);
    let series: Vec<&Forecaster> = forecasters.iter().collect();
    let (mut took_ms, mut moves) = (Vec::new(), 0);
    for run in 0..RUNS {
        let started = Instant::now();
        let forecasts = forecast_all(&series, &sizes, 0.15);
        let plan = plan(&state, &forecasts, &policy, now_s, run as u64)?;
        took_ms.push(started.elapsed().as_secs_f64() * 1000.0);
        moves = plan.moves().count();
    }
    took_ms.sort_by(f64::total_cmp);
    let (decision_ms, slowest_ms) = (took_ms[RUNS / 2], took_ms[RUNS - 1]);
    let memory_mib = peak_rss_bytes(std::process::id()) >> 20;
    let LightPlan { hosts, vms, seed, .. } = *wish;
    println!(
        "{hosts} hosts, {vms} VMs: a decision in {decision_ms:.1} ms (slowest {slowest_ms:.1}, bound \
         {DECISION_MS_MAX}), {moves} moves; a sample {sample_us:.2} us; {memory_mib} MiB (bound \
         {MEMORY_MIB_MAX})"
    );
    if let Some(results) = &wish.results {
        let made = Made::now(&Revision::current()?)?;
        let row = LightRow {
            made,
            hosts,
            vms,
            seed,
            decision_ms,
            slowest_ms,
            moves,
            sample_us,
            memory_mib,
        };
        row::append(results, &row)?;
    }
    ensure!(decision_ms <= DECISION_MS_MAX, "a decision takes longer than {DECISION_MS_MAX} ms");
    ensure!(memory_mib <= MEMORY_MIB_MAX, "it takes more than {MEMORY_MIB_MAX} MiB");
    Ok(())
}

/// Cores that a VM asks for: those of every third host ask for nearly all of it.
fn level(host: usize, draw: &mut impl FnMut() -> f64) -> f64 {
    let mean = if host.is_multiple_of(3) { 1.5 } else { 0.8 };
    mean * (0.5 + draw())
}

fn state(hosts: usize, levels: &[f64], now_s: i64) -> State {
    let asked = |host: usize| levels.iter().skip(host).step_by(hosts).sum::<f64>();
    State {
        hosts: (0..hosts)
            .map(|host| Host {
                name: format!("host{host}"),
                cpu: CORES,
                cpu_per_vm: CORES,
                memory_mib: 256 << 10,
                watts: (100.0, 200.0),
                is_on: true,
                is_in_maintenance: false,
                is_settling: false,
                sampled_at_s: now_s,
                asked: vec![asked(host); 2],
            })
            .collect(),
        vms: levels
            .iter()
            .enumerate()
            .map(|(vm, level)| Vm {
                name: format!("vm{vm}"),
                host: vm % hosts,
                asked: *level,
                memory_mib: 4096,
                move_mib: 4096,
                is_pinned: false,
                is_migrating: false,
                together: None,
                apart: None,
            })
            .collect(),
        moved: Vec::new(),
        migration_mib_s: 100.0,
    }
}
