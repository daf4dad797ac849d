//! The rivals' rules of balancing, from their published descriptions.
//!
//! Invariant: each rule sees what it would see in its own house, and is given the shortest period that
//! its authors use; marks and gaps are theirs.

use std::collections::BTreeMap;

use anyhow::Result;

use super::fleet::{Balancer, INTERVAL_S, View};

/// Loads and memory in the middle of a round.
struct Trial {
    host_of: Vec<usize>,
    loads: Vec<f64>,
    memory_mib: Vec<u64>,
}

impl Trial {
    fn new(view: &View<'_>) -> Self {
        let fleet = view.fleet;
        let (mut loads, mut memory_mib) = (vec![0.0; fleet.hosts], vec![0; fleet.hosts]);
        for (vm, &host) in view.host_of.iter().enumerate() {
            loads[host] += view.asked[vm];
            memory_mib[host] += fleet.vms[vm].memory_mib;
        }
        Self { host_of: view.host_of.to_vec(), loads, memory_mib }
    }

    fn fits(&self, view: &View<'_>, vm: usize, to: usize) -> bool {
        self.host_of[vm] != to
            && self.memory_mib[to] + view.fleet.vms[vm].memory_mib <= view.fleet.memory_mib
    }

    fn shift(&mut self, view: &View<'_>, vm: usize, to: usize) {
        let (from, mib) = (self.host_of[vm], view.fleet.vms[vm].memory_mib);
        self.loads[from] -= view.asked[vm];
        self.memory_mib[from] -= mib;
        self.loads[to] += view.asked[vm];
        self.memory_mib[to] += mib;
        self.host_of[vm] = to;
    }

    fn by_load(&self) -> Vec<usize> {
        let mut hosts: Vec<_> = (0..self.loads.len()).collect();
        hosts.sort_by(|a, b| self.loads[*a].total_cmp(&self.loads[*b]));
        hosts
    }

    fn vms(&self, view: &View<'_>, host: usize) -> Vec<usize> {
        let all = 0..self.host_of.len();
        all.filter(|&vm| self.host_of[vm] == host && !view.is_migrating[vm]).collect()
    }
}

/// Sandpiper (Wood et al., NSDI 2007): a host is a hotspot when `k` of its last `n` samples and the
/// next one by a first-order autoregression are above the threshold; the VM of the most volume for its
/// memory goes to the host of the least volume that stays under it. Its swaps are left out.
#[derive(Debug)]
pub(super) struct Sandpiper {
    pub(super) threshold: f64,
}

const SANDPIPER_K: usize = 3;
const SANDPIPER_N: usize = 5;

/// The next value of a first-order autoregression around the mean.
fn autoregression(values: &[f64]) -> f64 {
    let mean = values.iter().sum::<f64>() / values.len().max(1) as f64;
    let pairs = values.windows(2);
    let covariance: f64 = pairs.map(|pair| (pair[0] - mean) * (pair[1] - mean)).sum();
    let variance: f64 = values.iter().map(|value| (value - mean).powi(2)).sum();
    let phi = if variance > 0.0 { covariance / variance } else { 0.0 };
    values.last().map_or(0.0, |last| mean + phi * (last - mean))
}

impl Balancer for Sandpiper {
    fn round(&mut self, view: &View<'_>) -> Result<Vec<(usize, usize)>> {
        let limit = self.threshold * view.fleet.cpu;
        let volume = |used: f64| 1.0 / (1.0 - used.min(0.999));
        let mut trial = Trial::new(view);
        let mut hot: Vec<usize> = (0..view.fleet.hosts)
            .filter(|&host| {
                let history = &view.host_asked[host];
                let newest = &history[history.len().saturating_sub(SANDPIPER_N)..];
                newest.iter().filter(|load| **load > limit).count() >= SANDPIPER_K
                    && autoregression(&history[history.len().saturating_sub(30)..]) > limit
            })
            .collect();
        hot.sort_by(|a, b| trial.loads[*b].total_cmp(&trial.loads[*a]));
        let mut moves = Vec::new();
        for from in hot {
            let mut vms = trial.vms(view, from);
            let ratio = |vm: usize| {
                let cpu = volume(view.asked[vm] / view.fleet.cpu);
                cpu / view.fleet.vms[vm].memory_mib.max(1) as f64
            };
            vms.sort_by(|a, b| ratio(*b).total_cmp(&ratio(*a)));
            for vm in vms {
                if trial.loads[from] <= limit {
                    break;
                }
                let fits = |to: &usize| {
                    trial.fits(view, vm, *to) && trial.loads[*to] + view.asked[vm] <= limit
                };
                if let Some(to) = trial.by_load().into_iter().find(fits) {
                    trial.shift(view, vm, to);
                    moves.push((vm, to));
                }
            }
        }
        Ok(moves)
    }
}

/// ProxLB's default mode: each hour, while the most and the least used host differ by more than the
/// gap, guests in list order go from the first to the second.
#[derive(Debug)]
pub(super) struct Gap {
    pub(super) percent: f64,
}

const GAP_PERIOD_S: i64 = 3600;

impl Balancer for Gap {
    fn round(&mut self, view: &View<'_>) -> Result<Vec<(usize, usize)>> {
        let mut moves = Vec::new();
        if view.now_s % GAP_PERIOD_S != 0 {
            return Ok(moves);
        }
        let mut trial = Trial::new(view);
        for vm in 0..view.host_of.len() {
            let order = trial.by_load();
            let (Some(&least), Some(&most)) = (order.first(), order.last()) else { break };
            let gap = (trial.loads[most] - trial.loads[least]) / view.fleet.cpu * 100.0;
            if gap <= self.percent {
                break;
            }
            let may = trial.host_of[vm] == most && !view.is_migrating[vm];
            if may && trial.fits(view, vm, least) {
                trial.shift(view, vm, least);
                moves.push((vm, least));
            }
        }
        Ok(moves)
    }
}

/// Xen Orchestra's performance mode: 0.75 of now and 0.25 of the last half hour's mean; above 0.85 of
/// the critical 90 % VMs leave, the most CPU first, until 0.65 of it; targets stay under that too. A VM
/// that moved rests for 30 min.
#[derive(Debug, Default)]
pub(super) struct Marks {
    moved_s: BTreeMap<usize, i64>,
}

const CRITICAL: f64 = 0.9;
const MARKS_HIGH: f64 = 0.85;
const MARKS_LOW: f64 = 0.65;
const MARKS_REST_S: i64 = 1800;

impl Balancer for Marks {
    fn round(&mut self, view: &View<'_>) -> Result<Vec<(usize, usize)>> {
        let mut trial = Trial::new(view);
        trial.loads = view.host_asked.iter().map(|history| blend(history)).collect();
        let high = MARKS_HIGH * CRITICAL * view.fleet.cpu;
        let low = MARKS_LOW * CRITICAL * view.fleet.cpu;
        let mut moves = Vec::new();
        let mut hot = trial.by_load();
        hot.retain(|&host| trial.loads[host] > high);
        for from in hot.into_iter().rev() {
            let mut vms = trial.vms(view, from);
            vms.sort_by(|a, b| {
                let memory = |vm: &usize| view.fleet.vms[*vm].memory_mib;
                view.asked[*b].total_cmp(&view.asked[*a]).then(memory(a).cmp(&memory(b)))
            });
            for vm in vms {
                if trial.loads[from] <= low {
                    break;
                }
                let rests =
                    self.moved_s.get(&vm).is_some_and(|at_s| view.now_s - at_s < MARKS_REST_S);
                let fits = |to: &usize| {
                    trial.fits(view, vm, *to) && trial.loads[*to] + view.asked[vm] <= low
                };
                if let Some(to) = trial.by_load().into_iter().find(fits).filter(|_| !rests) {
                    trial.shift(view, vm, to);
                    self.moved_s.insert(vm, view.now_s);
                    moves.push((vm, to));
                }
            }
        }
        Ok(moves)
    }
}

/// Now and the last half hour.
fn blend(history: &[f64]) -> f64 {
    let past = &history[history.len().saturating_sub((MARKS_REST_S / INTERVAL_S) as usize)..];
    let mean = past.iter().sum::<f64>() / past.len().max(1) as f64;
    history.last().map_or(0.0, |now| 0.75 * now + 0.25 * mean)
}

#[cfg(test)]
mod tests {
    use super::super::fleet::{Fleet, FleetVm, play};
    use super::*;

    fn fleet() -> Fleet {
        Fleet {
            cpu: 10.0,
            memory_mib: 1 << 20,
            hosts: 2,
            vms: [(3.0, 1000), (3.2, 100), (3.1, 1000), (0.5, 1000)]
                .map(|(cpu, memory_mib)| FleetVm { cpu, memory_mib, asked: vec![cpu; 40] })
                .to_vec(),
            start: vec![0, 0, 0, 1],
        }
    }

    #[test]
    fn each_rule_cools_a_host_that_is_plainly_hot() {
        for balancer in [
            &mut Sandpiper { threshold: 0.75 } as &mut dyn Balancer,
            &mut Gap { percent: 5.0 },
            &mut Marks::default(),
        ] {
            let figures = play(&fleet(), balancer).unwrap();
            assert!(figures.hot_minutes <= 20 && figures.migrations >= 1, "{figures:?}");
        }
    }

    #[test]
    fn an_autoregression_leans_to_the_mean() {
        assert!((autoregression(&[2.0; 9]) - 2.0).abs() < 1e-9);
        let next = autoregression(&[1.0, 1.0, 1.0, 1.0, 5.0]);
        assert!(next < 5.0, "{next}");
    }
}
