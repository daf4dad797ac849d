//! How long large plans take.
//!
//! Invariant: the time is that of the call alone, on one core; what is planned is made by a fixed seed.

use std::path::Path as File;
use std::time::Instant;

use anyhow::Result;
use longhaul_scheduler::evacuate::evacuate;
use longhaul_scheduler::evacuate::need::{Evacuation, Guest, Path, Target};
use rand::rngs::Xoshiro256PlusPlus;
use rand::{RngExt, SeedableRng};
use serde::{Deserialize, Serialize};

use crate::row::{self, Made, Revision};

const VMS: usize = 1000;
const SITES: usize = 10;
const SLOTS: usize = 288;
/// Longest that a plan, and one that follows another, may take.
const PLAN_S_MAX: f64 = 1.0;
const AGAIN_S_MAX: f64 = 0.1;

/// How long plans took.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub(super) struct TimingRow {
    /// When, how, of what and where it was made.
    #[serde(flatten)]
    pub(super) made: Made,
    /// VMs, target sites, and slots.
    pub(super) size: (usize, usize, usize),
    /// Seconds of a first plan.
    pub(super) plan_s: f64,
    /// Seconds of one after all links lost half for half an hour.
    pub(super) again_s: f64,
    /// VMs that go by the first plan.
    pub(super) goes: usize,
}

fn large() -> Evacuation {
    let mut lots = Xoshiro256PlusPlus::seed_from_u64(1);
    let mut series = |mean: f64| -> Vec<f64> {
        (0..SLOTS)
            .map(|slot| {
                let day = 1.0 + 0.6 * (slot as f64 / SLOTS as f64 * std::f64::consts::TAU).sin();
                mean * day * (0.8 + 0.4 * lots.random::<f64>())
            })
            .collect()
    };
    let guest = |number: usize| Guest {
        name: format!("vm{number}"),
        host: format!("rack{}", number % 50),
        site: 0,
        weight: (number * 7 % 8 + 1) as f64,
        memory_mib: 1024 << (number % 6),
        disk_mib: 20 * 1024,
        cpu: 1.0,
        dirty_mib_s: series(0.5 * (number % 13) as f64),
        dirty_high_mib_s: Vec::new(),
        is_pinned: false,
        under_way: None,
    };
    let guests = (0..VMS).map(guest).collect();
    let paths = (1..=SITES).map(|to| Path {
        name: format!("path{to}"),
        from: 0,
        to,
        leftover_mib_s: series(30.0),
        cautious_mib_s: Vec::new(),
        streams: 1,
    });
    let paths = paths.collect();
    let target = |number: usize| Target {
        name: format!("target{number}"),
        site: number % SITES + 1,
        memory_mib: 256 * 1024,
        cpu: 64.0,
    };
    Evacuation {
        guests,
        targets: (0..10 * SITES).map(target).collect(),
        paths,
        slots_from_s: 0,
        slot_s: 300,
        deadline_s: 86_400,
        pause_s: 0.3,
        reserve_s: 900,
        previous: None,
    }
}

/// Takes the time of a large plan and of one that follows it; says which targets are missed.
pub(super) fn measure(results: Option<&File>) -> Result<Vec<String>> {
    let mut need = large();
    let start = Instant::now();
    let plan = evacuate(&need, 0, 1)?;
    let plan_s = start.elapsed().as_secs_f64();
    let goes = plan.goes.len();
    for path in &mut need.paths {
        path.leftover_mib_s[..6].iter_mut().for_each(|rate| *rate /= 2.0);
    }
    need.previous = Some(Box::new(plan));
    let start = Instant::now();
    let again = evacuate(&need, 0, 1)?;
    let again_s = start.elapsed().as_secs_f64();
    println!(
        "{VMS} VMs, {SITES} sites, {SLOTS} slots: {goes} go; a plan takes {plan_s:.3} s (target \
         {PLAN_S_MAX}), the next {again_s:.3} s (target {AGAIN_S_MAX}), {} go",
        again.goes.len()
    );
    if let Some(results) = results {
        let made = Made::now(&Revision::current()?)?;
        let size = (VMS, SITES, SLOTS);
        row::append(results, &TimingRow { made, size, plan_s, again_s, goes })?;
    }
    let figures = [("plan", plan_s, PLAN_S_MAX), ("next plan", again_s, AGAIN_S_MAX)];
    let is_missed = |(_, took_s, most_s): &(&str, f64, f64)| took_s >= most_s;
    let said = |(name, took_s, _)| format!("{name} of {VMS} VMs takes {took_s:.3} s");
    Ok(figures.into_iter().filter(is_missed).map(said).collect())
}
