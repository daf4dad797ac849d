//! When to send: one VM at a time, a day to cross a link, the planner beside simple rules and who knows all.
//!
//! Invariant: all send the same VM over the same link from the same moment on; savings are over the trials
//! in which all arrive, and a figure that misses its target ends the command with an error.
//!
//! Reading order: `world` (what comes, what is known, who decides), this file (set-up, figures, targets).

mod world;

use std::path::PathBuf;

use anyhow::{Context, Result, ensure};
use clap::Args;
use rand::rngs::Xoshiro256PlusPlus;
use rand::{RngExt, SeedableRng};
use serde::{Deserialize, Serialize};

use self::world::{DAY, Link, Outcome, SLOT_S, Trial, Who};
use super::traces::{self, BusinessVm};
use crate::row::{self, Made, Revision};

/// Disk that each VM sends, in MiB.
const DISK_MIB: u64 = 20 * 1024;
/// The link's own load takes so much of it when it is highest.
const PEAK: f64 = 0.9;
/// Links in Mbit/s, with what a busy core changes in MiB a second.
const SETS: [(f64, f64); 3] = [(200.0, 6.0), (500.0, 6.0), (200.0, 2.0)];
/// Days of the link's record before the first trial, and of a VM's.
const LINK_DAYS: usize = 21;
const VM_DAYS: usize = 7;
/// The transatlantic record begins on a Tuesday at 06:57, the VMs' on a Sunday at midnight: days from Monday on.
const LINK_FROM_S: f64 = 6.0 * 3600.0 + 57.0 * 60.0;
const LINK_WEEKDAY: usize = 1;
const VM_WEEKDAY: usize = 6;
/// Targets: share of what who knows all saves; points more of missed deadlines than that one.
const SAVED_MIN: f64 = 0.92;
const MISSES_MAX: f64 = 0.005;
/// Resamplings of an interval.
const RESAMPLINGS: usize = 1000;

/// What to play, and where it is.
#[derive(Debug, Args)]
pub struct WindowsPlan {
    /// Folder of the traces: `bitbrains_rnd_2013-09_*` and `wan_transatlantic_isp_2005_5min.csv.zst`.
    data: PathBuf,
    /// VMs and times of each set.
    #[arg(long, default_value_t = 1000)]
    trials: usize,
    /// Decides VMs and times.
    #[arg(long, default_value_t = 1)]
    seed: u64,
    /// What an hour earlier is worth, as a share of all data.
    #[arg(long, default_value_t = 0.0005)]
    haste: f64,
    /// Where rows go; nowhere if absent.
    #[arg(long)]
    results: Option<PathBuf>,
}

/// All trials of one set.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct WindowsRow {
    /// When, how, of what and where it was made.
    #[serde(flatten)]
    pub made: Made,
    /// The link, in Mbit/s.
    pub link_mbit_s: f64,
    /// MiB a second that a busy core changes.
    pub dirty_per_core: f64,
    /// VMs and times.
    pub trials: usize,
    /// Decides them.
    pub seed: u64,
    /// What an hour earlier is worth, as a share of all data.
    pub haste: f64,
    /// Trials in which all arrive: the figures below but for the misses are of these.
    pub all_arrive: usize,
    /// Each rule and planner.
    pub players: Vec<PlayerFigures>,
}

/// What came of one rule or planner.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct PlayerFigures {
    /// `now`, `02:00`, `all-knowing`, ..
    pub name: String,
    /// Share of trials that did not arrive within the day.
    pub missed: f64,
    /// Bytes over those of memory and disk, less one: mean, and nine tenths' quantile.
    pub over: (f64, f64),
    /// Minutes from the first byte to the last: mean, and nine tenths' quantile.
    pub minutes: (f64, f64),
    /// Mean hours from asking to arrival.
    pub arrives_h: f64,
    /// What it saves against "now", as a share of what all-knowing saves; with its 95 % interval.
    pub saved: (f64, f64, f64),
}

const NAMES: [&str; 6] = [
    "now",
    "02:00",
    "all-knowing",
    "forecasts, in one go",
    "forecasts, in parts",
    "truth, in parts",
];
const NOW: usize = 0;
const TWO: usize = 1;
const ALL_KNOWING: usize = 2;
/// Those that are judged.
const JUDGED: [usize; 2] = [3, 4];

type Outcomes = [Option<Outcome>; NAMES.len()];

/// One trial in which all arrive.
#[derive(Debug)]
struct Arrived {
    each: [Outcome; NAMES.len()],
    whole: f64,
}

/// The recorded series.
struct Records {
    vms: Vec<BusinessVm>,
    writes: Vec<Vec<f64>>,
    link: Link,
}

impl Records {
    fn read(plan: &WindowsPlan) -> Result<Self> {
        let vms = traces::bitbrains(&plan.data, "2013-09")?;
        let writes = traces::bitbrains_writes(&plan.data, "2013-09")?;
        ensure!(vms.len() == writes.len(), "{} loads and {} writes", vms.len(), writes.len());
        let samples = traces::transatlantic(&plan.data)?;
        let most = samples.iter().copied().fold(f64::MIN_POSITIVE, f64::max);
        // From the samples' own clock to slots from midnight on; the first day's begin repeats its first sample.
        let sample = |slot: usize| {
            let at_s = slot as f64 * f64::from(SLOT_S) - LINK_FROM_S;
            (at_s / traces::TRANSATLANTIC_SAMPLE_S).max(0.0) as usize
        };
        let load: Vec<f64> = (0..)
            .map_while(|slot| samples.get(sample(slot)))
            .map(|load| PEAK * load / most)
            .collect();
        ensure!(load.len() > (LINK_DAYS + 9) * DAY, "the link's record is too short");
        Ok(Self { vms, writes, link: Link::new(&load, LINK_DAYS * DAY) })
    }

    /// A VM at a random time, and the link at the same time of a day of the same name.
    fn trial(&self, (mbit_s, per_core): (f64, f64), seed: u64, haste: f64) -> Result<Trial<'_>> {
        let mut lots = Xoshiro256PlusPlus::seed_from_u64(seed);
        let on: Vec<usize> = (0..self.vms.len()).filter(|&vm| self.vms[vm].is_on()).collect();
        ensure!(!on.is_empty(), "no VM is on");
        let vm = on[lots.random_range(0..on.len())];
        let (of, written) = (&self.vms[vm], &self.writes[vm]);
        let samples = of.used.len().min(written.len());
        let last = samples.checked_sub(DAY).context("a short month")?;
        ensure!(last > VM_DAYS * DAY, "a short month");
        let from = lots.random_range(VM_DAYS * DAY..last);
        let weekday = (VM_WEEKDAY + from / DAY) % 7;
        let link_days = LINK_DAYS..self.link.slots() / DAY - 2;
        let same: Vec<usize> =
            link_days.filter(|day| (LINK_WEEKDAY + day) % 7 == weekday).collect();
        ensure!(!same.is_empty(), "the link's record is too short");
        let at = same[lots.random_range(0..same.len())] * DAY + from % DAY;
        let dirty = |at: usize| per_core * of.used[at] / of.mhz * of.cores + written[at] / 1024.0;
        Ok(Trial {
            link: &self.link,
            at,
            link_mib_s: mbit_s * 1e6 / 8.0 / 1_048_576.0,
            whole: (of.memory_mib + DISK_MIB) as f64,
            dirty: (0..samples).map(dirty).collect(),
            from,
            haste,
        })
    }
}

/// Plays every set of links and guests under all rules.
///
/// # Errors
///
/// When a trace cannot be read, or when a figure misses its target; the rows are written all the same.
pub fn windows(plan: &WindowsPlan) -> Result<()> {
    let records = Records::read(plan)?;
    let mut missed = Vec::new();
    for set in SETS {
        let outcomes = play(&records, plan, set)?;
        let row = figures(plan, set, &outcomes)?;
        if let Some(results) = &plan.results {
            row::append(results, &row)?;
        }
        missed.extend(judge(&row));
    }
    println!(
        "targets: {SAVED_MIN} of what all-knowing saves, {} points more misses than it, arrival no later than \
         that of 02:00",
        MISSES_MAX * 100.0
    );
    ensure!(missed.is_empty(), "missed: {}", missed.join("; "));
    Ok(())
}

/// All trials of one set, on all cores.
fn play(records: &Records, plan: &WindowsPlan, set: (f64, f64)) -> Result<Vec<(Outcomes, f64)>> {
    let cores = std::thread::available_parallelism().map_or(1, std::num::NonZero::get);
    let part = plan.trials.div_ceil(cores).max(1);
    let one = |trial: usize| -> Result<(Outcomes, f64)> {
        let trial = records.trial(set, plan.seed.wrapping_add(trial as u64), plan.haste)?;
        let outcomes = [
            trial.sent_from(0)?,
            trial.at_two()?,
            trial.all_knowing()?,
            trial.planned(Who::Forecasts { in_parts: false })?,
            trial.planned(Who::Forecasts { in_parts: true })?,
            trial.planned(Who::Truth)?,
        ];
        Ok((outcomes, trial.whole))
    };
    std::thread::scope(|scope| {
        let parts: Vec<_> = (0..plan.trials)
            .step_by(part)
            .map(|from| {
                let to = (from + part).min(plan.trials);
                scope.spawn(move || (from..to).map(one).collect::<Result<Vec<_>>>())
            })
            .collect();
        let mut all = Vec::new();
        for part in parts {
            all.extend(
                part.join()
                    .map_err(|_| anyhow::anyhow!("a thread of the simulator panicked"))??,
            );
        }
        Ok(all)
    })
}

fn figures(
    plan: &WindowsPlan,
    set: (f64, f64),
    outcomes: &[(Outcomes, f64)],
) -> Result<WindowsRow> {
    let all = |(each, whole): &(Outcomes, f64)| {
        let each: Vec<Outcome> = each.iter().copied().flatten().collect();
        Some(Arrived { each: each.try_into().ok()?, whole: *whole })
    };
    let arrived: Vec<Arrived> = outcomes.iter().filter_map(all).collect();
    let player = |at: usize| {
        let mut over: Vec<f64> =
            arrived.iter().map(|one| one.each[at].mib / one.whole - 1.0).collect();
        let mut minutes: Vec<f64> = arrived
            .iter()
            .map(|one| (one.each[at].ends_s - one.each[at].begins_s) / 60.0)
            .collect();
        let arrives = arrived.iter().map(|one| one.each[at].ends_s / 3600.0);
        PlayerFigures {
            name: NAMES[at].to_owned(),
            missed: outcomes.iter().filter(|(each, _)| each[at].is_none()).count() as f64
                / outcomes.len().max(1) as f64,
            over: mean_and_high(&mut over),
            minutes: mean_and_high(&mut minutes),
            arrives_h: arrives.sum::<f64>() / arrived.len().max(1) as f64,
            saved: saved(&arrived, at),
        }
    };
    Ok(WindowsRow {
        made: Made::now(&Revision::current()?)?,
        link_mbit_s: set.0,
        dirty_per_core: set.1,
        trials: plan.trials,
        seed: plan.seed,
        haste: plan.haste,
        all_arrive: arrived.len(),
        players: (0..NAMES.len()).map(player).collect(),
    })
}

fn mean_and_high(values: &mut [f64]) -> (f64, f64) {
    values.sort_by(f64::total_cmp);
    let high = values.get(values.len() * 9 / 10).copied().unwrap_or(0.0);
    (values.iter().sum::<f64>() / values.len().max(1) as f64, high)
}

/// Share of all-knowing's saving, with its 95 % bootstrap interval over trials.
fn saved(arrived: &[Arrived], at: usize) -> (f64, f64, f64) {
    let share = |picked: &mut dyn Iterator<Item = usize>| {
        let (mut ours, mut most) = (0.0, 0.0);
        for trial in picked {
            let each = &arrived[trial].each;
            ours += each[NOW].mib - each[at].mib;
            most += each[NOW].mib - each[ALL_KNOWING].mib;
        }
        if most > 0.0 { ours / most } else { 1.0 }
    };
    let all = share(&mut (0..arrived.len()));
    if arrived.is_empty() {
        return (all, all, all);
    }
    let mut lots = Xoshiro256PlusPlus::seed_from_u64(7);
    let mut shares: Vec<f64> = (0..RESAMPLINGS)
        .map(|_| share(&mut (0..arrived.len()).map(|_| lots.random_range(0..arrived.len()))))
        .collect();
    shares.sort_by(f64::total_cmp);
    (all, shares[RESAMPLINGS / 40], shares[RESAMPLINGS - 1 - RESAMPLINGS / 40])
}

/// Prints what came of one set, and says which targets are missed.
fn judge(row: &WindowsRow) -> Vec<String> {
    println!(
        "{} Mbit/s, {} MiB/s a busy core: {} trials, in {} all arrive",
        row.link_mbit_s, row.dirty_per_core, row.trials, row.all_arrive
    );
    for one in &row.players {
        println!(
            "  {:<21} missed {:>5.2} %   over +{:>5.1} % (p90 {:>5.1})   {:>5.1} min (p90 {:>5.1})   arrives \
             after {:>5.2} h   saves {:.3} [{:.3}, {:.3}]",
            one.name,
            one.missed * 100.0,
            one.over.0 * 100.0,
            one.over.1 * 100.0,
            one.minutes.0,
            one.minutes.1,
            one.arrives_h,
            one.saved.0,
            one.saved.1,
            one.saved.2
        );
    }
    let (two, knowing) = (&row.players[TWO], &row.players[ALL_KNOWING]);
    let mut missed = Vec::new();
    for at in JUDGED {
        let one = &row.players[at];
        let set = format!("{} Mbit/s, {} MiB/s, {}", row.link_mbit_s, row.dirty_per_core, one.name);
        if one.saved.0 < SAVED_MIN {
            missed.push(format!("{set}: saves {:.3}", one.saved.0));
        }
        if one.missed > knowing.missed + MISSES_MAX {
            missed.push(format!("{set}: misses {:.2} %", one.missed * 100.0));
        }
        if one.arrives_h > two.arrives_h {
            missed.push(format!("{set}: arrives after {:.2} h", one.arrives_h));
        }
    }
    missed
}
