//! The hosts as they would be if the plan so far were carried out, and the rules that hold for any move.
//!
//! Invariant: a move enters the picture only through [`WhatIf::make`], after [`WhatIf::refusal`] found
//! nothing against it, so no goal can break a rule that holds for all.

use std::collections::BTreeSet;

use crate::decision::{Decision, Move, Nothing, Refusal, Why};
use crate::forecast::{Band, Forecast};
use crate::policy::Policy;
use crate::state::{Host, Moved, State, Vm};

/// What a VM loses of its CPU while it moves.
const LOST_WHILE_MOVING: f64 = 0.1;
/// Seconds in which `moves_per_hour` may start.
const HOUR_S: i64 = 3600;
/// What a host's samples may differ from those of its VMs before neither is believed, as a share of
/// the host.
const CONTRADICTION: f64 = 0.5;

/// What is expected of a host: means and variances of its VMs, which err independently.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub(crate) struct Load {
    mean: f64,
    variance: f64,
}

impl Load {
    pub(crate) fn plus(self, band: Band) -> Self {
        Self {
            mean: self.mean + band.mean,
            variance: self.variance + band.deviation * band.deviation,
        }
    }

    pub(crate) fn minus(self, band: Band) -> Self {
        Self {
            mean: (self.mean - band.mean).max(0.0),
            variance: (self.variance - band.deviation * band.deviation).max(0.0),
        }
    }

    /// With so many deviations on top.
    pub(crate) fn high(self, deviations: f64) -> f64 {
        self.mean + deviations * self.variance.sqrt()
    }

    /// CPU that is expected above `limit`, of a normal load.
    pub(crate) fn above(self, limit: f64) -> f64 {
        let deviation = self.variance.sqrt();
        if deviation <= f64::EPSILON * limit {
            return (self.mean - limit).max(0.0);
        }
        let z = (self.mean - limit) / deviation;
        deviation * density(z) + (self.mean - limit) * distribution(z)
    }
}

fn density(z: f64) -> f64 {
    (-z * z / 2.0).exp() / std::f64::consts::TAU.sqrt()
}

/// The normal distribution, to 1e-7 (Abramowitz and Stegun, 26.2.17).
fn distribution(z: f64) -> f64 {
    let t = 1.0 / (1.0 + 0.231_641_9 * z.abs());
    let series = t
        * (0.319_381_530
            + t * (-0.356_563_782
                + t * (1.781_477_937 + t * (-1.821_255_978 + t * 1.330_274_429))));
    let upper = density(z) * series;
    if z >= 0.0 { 1.0 - upper } else { upper }
}

/// The hosts in the middle of planning.
pub(crate) struct WhatIf<'a> {
    pub(crate) state: &'a State,
    pub(crate) forecasts: &'a [Forecast],
    pub(crate) policy: &'a Policy,
    pub(crate) now_s: i64,
    seed: u64,
    /// VMs of each host, planned moves made.
    pub(crate) vms: Vec<Vec<usize>>,
    pub(crate) now: Vec<f64>,
    pub(crate) soon: Vec<Load>,
    pub(crate) later: Vec<Load>,
    memory_mib: Vec<u64>,
    frozen: Vec<Option<Nothing>>,
    sends: Vec<usize>,
    receives: Vec<usize>,
    /// VMs that may not move, and why.
    stays: Vec<Option<Refusal>>,
    /// Pairs of VM and host that it may not return to.
    no_return: BTreeSet<(usize, usize)>,
    left_of_hour: usize,
    /// Hosts that this plan switches on or empties.
    pub(crate) is_on: Vec<bool>,
}

impl<'a> WhatIf<'a> {
    pub(crate) fn new(
        state: &'a State,
        forecasts: &'a [Forecast],
        policy: &'a Policy,
        now_s: i64,
        seed: u64,
    ) -> Self {
        let hosts = state.hosts.len();
        let mut what_if = Self {
            state,
            forecasts,
            policy,
            now_s,
            seed,
            vms: vec![Vec::new(); hosts],
            now: vec![0.0; hosts],
            soon: vec![Load::default(); hosts],
            later: vec![Load::default(); hosts],
            memory_mib: vec![0; hosts],
            frozen: vec![None; hosts],
            sends: vec![0; hosts],
            receives: vec![0; hosts],
            stays: vec![None; state.vms.len()],
            no_return: BTreeSet::new(),
            left_of_hour: policy.moves_per_hour,
            is_on: state.hosts.iter().map(|host| host.is_on).collect(),
        };
        for (vm, (of, forecast)) in state.vms.iter().zip(forecasts).enumerate() {
            what_if.add(of.host, vm, forecast);
        }
        for host in 0..hosts {
            what_if.frozen[host] = what_if.distrust(host);
            // What the host itself asks for, beside its VMs.
            let own = state.hosts[host].asked.last().map_or(0.0, |all| all - what_if.now[host]);
            if what_if.frozen[host].is_none() && own > 0.0 {
                let band = Band { mean: own, deviation: 0.0 };
                what_if.now[host] += own;
                what_if.soon[host] = what_if.soon[host].plus(band);
                what_if.later[host] = what_if.later[host].plus(band);
            }
        }
        what_if.remember();
        what_if
    }

    /// What the past forbids.
    fn remember(&mut self) {
        let hour_ago = self.now_s - HOUR_S;
        let started = self.state.moved.iter().filter(|moved| moved.at_s > hour_ago).count();
        self.left_of_hour = self.policy.moves_per_hour.saturating_sub(started);
        let mut by_name: Vec<(&str, usize)> =
            self.state.vms.iter().enumerate().map(|(at, vm)| (&*vm.name, at)).collect();
        by_name.sort_unstable();
        let mut past: Vec<Vec<&Moved>> = vec![Vec::new(); self.state.vms.len()];
        for moved in &self.state.moved {
            if let Ok(at) = by_name.binary_search_by(|(name, _)| (*name).cmp(&*moved.vm)) {
                past[by_name[at].1].push(moved);
            }
        }
        for (vm, past) in past.iter().enumerate() {
            let of = &self.state.vms[vm];
            let came_back = past.windows(2).filter(|pair| pair[0].from == pair[1].to).count();
            let cooldown_s = self.policy.cooldown_s.saturating_mul(1 << came_back.min(16));
            let is_cooling =
                past.iter().any(|moved| self.now_s.saturating_sub(moved.at_s) < cooldown_s);
            self.stays[vm] = if of.is_pinned {
                Some(Refusal::Pinned)
            } else if of.is_migrating {
                Some(Refusal::Migrating)
            } else {
                is_cooling.then_some(Refusal::Cooldown)
            };
            let no_return_s = self.policy.no_return_s;
            let fresh =
                past.iter().filter(|moved| self.now_s.saturating_sub(moved.at_s) < no_return_s);
            self.no_return.extend(fresh.map(|moved| (vm, moved.from)));
        }
    }

    /// Why a host's samples are not believed.
    fn distrust(&self, number: usize) -> Option<Nothing> {
        let host = &self.state.hosts[number];
        if !host.is_on {
            return None;
        }
        let age_s = self.now_s.saturating_sub(host.sampled_at_s);
        if age_s > self.policy.stale_s || age_s < 0 || host.asked.is_empty() {
            return Some(Nothing::Stale { age_s });
        }
        if host.is_settling {
            return Some(Nothing::Settling);
        }
        let is_number = |value: f64| value.is_finite() && value >= 0.0;
        let vms = || self.vms[number].iter().map(|&vm| (&self.state.vms[vm], &self.forecasts[vm]));
        let numbers = host.asked.iter().all(|asked| is_number(*asked))
            && vms().all(|(vm, forecast)| {
                let bands = [forecast.soon, forecast.later];
                is_number(vm.asked)
                    && bands.iter().all(|band| is_number(band.mean) && is_number(band.deviation))
            });
        let own = host.asked.last().map_or(0.0, |all| all - self.now[number]);
        let agree = own.abs() <= CONTRADICTION * host.cpu;
        (!(numbers && agree)).then_some(Nothing::Untrue)
    }

    fn add(&mut self, host: usize, vm: usize, forecast: &Forecast) {
        self.vms[host].push(vm);
        self.now[host] += self.state.vms[vm].asked;
        self.soon[host] = self.soon[host].plus(forecast.soon);
        self.later[host] = self.later[host].plus(forecast.later);
        self.memory_mib[host] += self.state.vms[vm].memory_mib;
    }

    fn remove(&mut self, host: usize, vm: usize, forecast: &Forecast) {
        self.vms[host].retain(|other| *other != vm);
        self.now[host] = (self.now[host] - self.state.vms[vm].asked).max(0.0);
        self.soon[host] = self.soon[host].minus(forecast.soon);
        self.later[host] = self.later[host].minus(forecast.later);
        self.memory_mib[host] = self.memory_mib[host].saturating_sub(self.state.vms[vm].memory_mib);
    }

    /// One decision for each host that is not believed.
    pub(crate) fn frozen_decisions(&self) -> Vec<Decision> {
        let hosts = self.state.hosts.iter().zip(&self.frozen);
        hosts
            .filter_map(|(host, because)| {
                let because = because.clone()?;
                Some(Decision::Nothing { host: host.name.clone(), because })
            })
            .collect()
    }

    pub(crate) fn host(&self, number: usize) -> &'a Host {
        &self.state.hosts[number]
    }

    pub(crate) fn vm(&self, number: usize) -> &'a Vm {
        &self.state.vms[number]
    }

    pub(crate) fn is_frozen(&self, host: usize) -> bool {
        self.frozen[host].is_some()
    }

    /// Whether moves may still start within this hour.
    pub(crate) fn has_budget(&self, moves: usize) -> bool {
        moves <= self.left_of_hour
    }

    /// What decides between equals.
    pub(crate) fn lot(&self, number: usize) -> u64 {
        let mut lot = self.seed ^ (number as u64).wrapping_mul(0x9e37_79b9_7f4a_7c15);
        lot = (lot ^ (lot >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        lot ^ (lot >> 31)
    }

    /// CPU time that moving the VM costs it.
    pub(crate) fn cost(&self, vm: usize) -> f64 {
        let took_s = self.vm(vm).move_mib as f64 / self.state.migration_mib_s;
        LOST_WHILE_MOVING * self.forecasts[vm].soon.mean.max(self.vm(vm).asked) * took_s
    }

    /// Why the VM cannot leave its host.
    pub(crate) fn stays(&self, from: usize, vm: usize) -> Option<Refusal> {
        let for_maintenance = self.host(from).is_in_maintenance;
        let refusal = self.stays[vm].filter(|why| !(for_maintenance && *why == Refusal::Cooldown));
        let is_full = !for_maintenance && self.sends[from] >= self.policy.moves_per_host;
        let is_tied = || {
            let together = self.vm(vm).together.as_ref();
            together.is_some_and(|group| {
                self.vms[from]
                    .iter()
                    .any(|&other| other != vm && self.vm(other).together.as_ref() == Some(group))
            })
        };
        refusal.or_else(|| is_full.then_some(Refusal::Busy)).or_else(|| {
            // A group moves only when its host must be emptied: then one after the other.
            (!for_maintenance && is_tied()).then_some(Refusal::Affinity)
        })
    }

    /// The first rule against the VM's going there.
    pub(crate) fn refusal(&self, from: usize, vm: usize, to: usize) -> Option<Refusal> {
        let (host, of) = (self.host(to), self.vm(vm));
        let is_open = self.is_on[to] && !host.is_in_maintenance && !self.is_frozen(to);
        if from == to || !is_open {
            return Some(Refusal::Closed);
        }
        if self.receives[to] >= self.policy.moves_per_host {
            return Some(Refusal::Busy);
        }
        if self.no_return.contains(&(vm, to)) {
            return Some(Refusal::Return);
        }
        let forecast = &self.forecasts[vm];
        if host.cpu_per_vm < of.asked.max(forecast.later.mean) {
            return Some(Refusal::TooBig);
        }
        if self.memory_mib[to] + of.memory_mib > host.memory_mib {
            return Some(Refusal::Memory);
        }
        // A host is emptied because somebody wants it empty: what is expected must fit, not what could be.
        let (comfort, deviations) = match self.host(from).is_in_maintenance {
            true => (host.cpu, 0.0),
            false => (self.policy.comfort * host.cpu, self.policy.deviations),
        };
        let is_too_much = self.now[to] + of.asked > comfort
            || self.soon[to].plus(forecast.soon).high(deviations) > comfort
            || self.later[to].plus(forecast.later).high(deviations) > comfort;
        if is_too_much {
            return Some(Refusal::Cpu);
        }
        let is_apart = self.vms[to]
            .iter()
            .any(|&other| of.apart.is_some() && self.vm(other).apart == of.apart);
        is_apart.then_some(Refusal::Affinity)
    }

    /// Switches on the host that is cheapest for its CPU of those that are off and fast enough.
    pub(crate) fn open_for(&mut self, cpu_per_vm: f64) -> bool {
        let off = (0..self.state.hosts.len()).filter(|&host| {
            let of = self.host(host);
            !self.is_on[host] && !of.is_in_maintenance && of.cpu_per_vm >= cpu_per_vm
        });
        let price = |&host: &usize| self.host(host).watts.1 / self.host(host).cpu;
        let cheapest =
            off.min_by(|a, b| price(a).total_cmp(&price(b)).then(self.lot(*a).cmp(&self.lot(*b))));
        if let Some(host) = cheapest {
            self.is_on[host] = true;
        }
        cheapest.is_some()
    }

    /// Puts the VM elsewhere, without asking.
    pub(crate) fn shift(&mut self, from: usize, vm: usize, to: usize) {
        let forecast = self.forecasts[vm];
        self.remove(from, vm, &forecast);
        self.add(to, vm, &forecast);
    }

    /// Enters a move into the picture.
    pub(crate) fn make(
        &mut self,
        from: usize,
        vm: usize,
        to: usize,
        gain: f64,
        because: Why,
    ) -> Decision {
        let cost = self.cost(vm);
        self.shift(from, vm, to);
        self.sends[from] += 1;
        self.receives[to] += 1;
        self.left_of_hour = self.left_of_hour.saturating_sub(1);
        // One move of a VM in a plan.
        self.stays[vm] = Some(Refusal::Migrating);
        Decision::Move(Move {
            vm: self.vm(vm).name.clone(),
            from: self.host(from).name.clone(),
            to: self.host(to).name.clone(),
            mib: self.vm(vm).move_mib,
            gain,
            cost,
            because,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_above_a_limit_is_that_of_a_normal_load() {
        let load = Load { mean: 10.0, variance: 4.0 };
        assert!((load.above(10.0) - 2.0 * 0.398_942_28).abs() < 1e-6);
        assert!((load.above(0.0) - 10.0).abs() < 1e-4);
        assert!(load.above(30.0) < 1e-6);
        assert_eq!(Load { mean: 3.0, variance: 0.0 }.above(2.0), 1.0);
    }
}
