//! One simulated day: the clock, the hosts and VMs, migrations under way, and what it all costs.
//!
//! Invariant: time moves only from event to event: a round each 300 s, and the ends of the migrations
//! that it started. Every VM runs on one host at a time, or has ended and never comes back.
//!
//! As CloudSim 3.0.3 has it: rounds start 0.1 s after midnight; a VM whose use is zero when it is
//! looked at has ended; VMs ask for no memory once they run, so memory binds only where they start.

use std::collections::BTreeMap;

use anyhow::{Result, anyhow};

use super::account::{HostAccount, Outcome, VmAccount, outcome};
use super::machine::{
    HOST_MEMORY_MIB, HOSTS, HostType, MIGRATION_MIB_S, Stay, before_loss, share, vm_size,
};
use super::rivals::{self, HISTORY, HostView, Move, Overload, VmView};
use super::traces::Day;

/// Seconds between rounds, and between samples.
const INTERVAL_S: f64 = 300.0;
/// When the first VM runs: the least time between two of CloudSim's events.
const START_S: f64 = 0.1;
/// When the day ends.
const END_S: f64 = 86_400.0;

#[derive(Debug)]
struct Vm {
    view: VmView,
    trace: Vec<f64>,
    /// Where it runs; nowhere once it has ended.
    host: Option<usize>,
    is_migrating: bool,
    account: VmAccount,
}

#[derive(Debug)]
struct Host {
    kind: HostType,
    /// VMs that run or arrive here, in the order in which they came.
    vms: Vec<usize>,
    arriving: Vec<usize>,
    used_mips: f64,
    used_mips_before: f64,
    account: HostAccount,
}

/// CloudSim's own rounding: what is a hair above 1 is 1.
fn as_share(mips: f64, host: HostType) -> f64 {
    let share = mips / host.mips();
    if share > 1.0 && share < 1.01 { 1.0 } else { share }
}

struct Running {
    vms: Vec<Vm>,
    hosts: Vec<Host>,
    now_s: f64,
    energy_ws: f64,
    migrations: u64,
    moved_mib: u64,
}

/// Who decides what moves, once each round.
pub(super) trait Planner {
    /// What should move now. VMs that no host has have ended.
    fn plan(&mut self, now_s: f64, hosts: &[HostView], vms: &[VmView]) -> Result<Vec<Move>>;
}

impl Planner for Overload {
    fn plan(&mut self, _: f64, hosts: &[HostView], vms: &[VmView]) -> Result<Vec<Move>> {
        Ok(rivals::plan(*self, hosts, vms))
    }
}

/// Plays a day under one rule, which also decides where VMs start.
///
/// # Errors
///
/// When a VM fits on no host at the start.
pub fn play(day: &Day, mut overload: Overload) -> Result<Outcome> {
    play_with(day, overload, &mut overload)
}

/// Plays a day under any planner; VMs start where `first` puts them.
///
/// # Errors
///
/// When a VM fits on no host at the start, or when no plan can be made.
pub(super) fn play_with(day: &Day, first: Overload, planner: &mut dyn Planner) -> Result<Outcome> {
    let mut running = Running::start(day, first)?;
    let mut round_s = START_S + INTERVAL_S;
    while round_s < END_S {
        running.advance(round_s);
        let is_on_the_grid = (round_s - START_S) % INTERVAL_S == 0.0;
        running.round(planner, is_on_the_grid)?;
        round_s += INTERVAL_S;
    }
    Ok(running.outcome())
}

impl Running {
    fn start(day: &Day, overload: Overload) -> Result<Self> {
        let mut vms: Vec<_> = (0..)
            .zip(&day.vms)
            .map(|(number, trace)| {
                let (mips, memory_mib) = vm_size(number, day.vms.len());
                let view = VmView { asked: 0.0, mips, memory_mib, history: Vec::new() };
                let account = VmAccount::default();
                Vm { view, trace: trace.clone(), host: None, is_migrating: false, account }
            })
            .collect();
        let views: Vec<_> = vms.iter().map(|vm| vm.view.clone()).collect();
        let placed = rivals::first_placement(overload, HOSTS, HOST_MEMORY_MIB, &views)
            .map_err(|vm| anyhow!("{}: VM {vm} fits on no host at the start", day.name))?;
        let mut hosts: Vec<_> = (0..HOSTS)
            .map(|number| Host {
                kind: HostType::of(number),
                vms: Vec::new(),
                arriving: Vec::new(),
                used_mips: 0.0,
                used_mips_before: 0.0,
                account: HostAccount::default(),
            })
            .collect();
        for (vm, host) in placed.into_iter().enumerate() {
            vms[vm].host = Some(host);
            hosts[host].vms.push(vm);
        }
        Ok(Self { vms, hosts, now_s: 0.0, energy_ws: 0.0, migrations: 0, moved_mib: 0 })
    }

    /// Lets time pass: all VMs ask for what their traces say, energy is used, idle VMs end.
    fn advance(&mut self, to_s: f64) {
        let span_s = to_s - self.now_s;
        self.now_s = to_s;
        for vm in &mut self.vms {
            vm.view.asked = use_at(&vm.trace, to_s) * vm.view.mips;
        }
        for host in 0..self.hosts.len() {
            self.look_at(host);
            let host = &self.hosts[host];
            let before = as_share(host.used_mips_before, host.kind);
            if span_s > 0.0 && before > 0.0 {
                let (from, to) = (
                    host.kind.power_w(before),
                    host.kind.power_w(as_share(host.used_mips, host.kind)),
                );
                self.energy_ws += (from + (to - from) / 2.0) * span_s;
            }
        }
        for number in 0..self.vms.len() {
            let vm = &mut self.vms[number];
            if vm.view.asked == 0.0
                && !vm.is_migrating
                && let Some(host) = vm.host.take()
            {
                self.hosts[host].vms.retain(|other| *other != number);
            }
        }
    }

    /// Shares a host's CPU anew and writes down what each got.
    fn look_at(&mut self, number: usize) {
        let Self { vms, hosts, now_s, .. } = self;
        let host = &mut hosts[number];
        let stay = |vm: usize| match (host.arriving.contains(&vm), vms[vm].is_migrating) {
            (true, _) => Stay::Arriving,
            (false, true) => Stay::Leaving,
            (false, false) => Stay::Settled,
        };
        let asked: Vec<_> = host.vms.iter().map(|&vm| (vms[vm].view.asked, stay(vm))).collect();
        let shares = share(host.kind, &asked);
        let (mut used, mut wanted) = (0.0, 0.0);
        for ((&vm, &(asked, stay)), &given) in host.vms.iter().zip(&asked).zip(&shares.given) {
            if stay != Stay::Arriving {
                vms[vm].account.enter(*now_s, given, asked, stay == Stay::Leaving);
            }
            used += if stay == Stay::Leaving { before_loss(given) } else { given };
            wanted += asked;
        }
        host.used_mips_before = host.used_mips;
        host.used_mips = used;
        host.account.enter(*now_s, used, wanted);
    }

    /// Plans, and plays the migrations to their ends.
    fn round(&mut self, planner: &mut dyn Planner, is_on_the_grid: bool) -> Result<()> {
        if is_on_the_grid {
            for vm in &mut self.vms {
                vm.view.history.insert(0, use_at(&vm.trace, self.now_s));
                vm.view.history.truncate(HISTORY);
            }
        }
        let views: Vec<_> = self.vms.iter().map(|vm| vm.view.clone()).collect();
        let view = |host: &Host| HostView {
            host: host.kind,
            vms: host.vms.clone(),
            used: as_share(host.used_mips, host.kind),
        };
        let hosts: Vec<_> = self.hosts.iter().map(view).collect();
        let moves = planner.plan(self.now_s, &hosts, &views)?;

        // Migrations end in the order of their length, so of the VMs' memory.
        let mut ends: BTreeMap<u64, Vec<Move>> = BTreeMap::new();
        for &one in &moves {
            self.depart(one);
            ends.entry(self.vms[one.vm].view.memory_mib).or_default().push(one);
        }
        let started_s = self.now_s;
        for (memory_mib, moves) in ends {
            self.advance(started_s + memory_mib as f64 / MIGRATION_MIB_S);
            for one in moves {
                self.arrive(one);
            }
            self.advance(self.now_s);
        }
        Ok(())
    }

    fn depart(&mut self, Move { vm, to }: Move) {
        self.migrations += 1;
        self.moved_mib += self.vms[vm].view.memory_mib;
        self.vms[vm].is_migrating = true;
        self.hosts[to].arriving.push(vm);
        self.hosts[to].vms.push(vm);
        self.look_at(to);
        if let Some(from) = self.vms[vm].host {
            self.look_at(from);
        }
    }

    /// Ends a migration. A VM that was sent to two hosts arrives at both, one after the other.
    fn arrive(&mut self, Move { vm, to }: Move) {
        if let Some(from) = self.vms[vm].host.take() {
            self.hosts[from].vms.retain(|other| *other != vm);
        }
        let host = &mut self.hosts[to];
        host.arriving.retain(|other| *other != vm);
        host.vms.retain(|other| *other != vm);
        host.vms.push(vm);
        self.vms[vm].host = Some(to);
        self.vms[vm].is_migrating = false;
    }

    fn outcome(self) -> Outcome {
        outcome(
            self.energy_ws,
            self.migrations,
            self.moved_mib,
            self.hosts.iter().map(|host| &host.account),
            self.vms.iter().map(|vm| &vm.account),
        )
    }
}

/// A VM's use at a time: linear between its samples; after the last one it stays.
fn use_at(trace: &[f64], at_s: f64) -> f64 {
    let sample = |at: f64| trace.get(at as usize).or_else(|| trace.last()).copied().unwrap_or(0.0);
    let (low, high) = ((at_s / INTERVAL_S).floor(), (at_s / INTERVAL_S).ceil());
    if low == high {
        return sample(low);
    }
    let slope = (sample(high) - sample(low)) / INTERVAL_S;
    sample(low) + slope * (at_s - low * INTERVAL_S)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::simulate::traces::SAMPLES_PER_DAY;

    #[test]
    fn use_is_linear_between_samples_and_stays_after_the_last() {
        let trace = [0.0, 0.5, 0.2];
        assert_eq!(use_at(&trace, 300.0), 0.5);
        assert!((use_at(&trace, 150.0) - 0.25).abs() < 1e-12);
        assert_eq!(use_at(&trace, 1000.0), 0.2);
    }

    #[test]
    fn the_same_day_ends_the_same_and_idle_vms_end() {
        let vms = (0..40_u32)
            .map(|vm| {
                (0..SAMPLES_PER_DAY).map(move |at| f64::from((vm * 7 + at as u32 / 9) % 60) / 100.0)
            })
            .map(Iterator::collect)
            .collect();
        let day = Day { name: "made up".to_owned(), vms };
        let once = play(&day, Overload::Threshold(0.8)).unwrap();
        assert_eq!(once, play(&day, Overload::Threshold(0.8)).unwrap());
        assert!(once.migrations > 0 && once.energy_kwh > 0.0 && once.unmet >= 0.0, "{once:?}");

        let idle = Day { name: "idle".to_owned(), vms: vec![vec![0.0; SAMPLES_PER_DAY]; 8] };
        let idle = play(&idle, Overload::Regression(1.2)).unwrap();
        assert_eq!((idle.migrations, idle.energy_kwh), (0, 0.0));
    }
}
