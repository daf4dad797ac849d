//! A fixed number of equal hosts, VMs with recorded loads, and a balancer that may move them.
//!
//! Invariant: a balancer sees samples up to now and nothing else; a migration takes as long as its
//! memory needs, and until it ends the VM runs where it was. Time goes by the minute, a round is each
//! 5 min. The figure is what VMs ask of their host, so a host cannot look cool by giving less.

use std::collections::BTreeMap;

use anyhow::Result;
use serde::{Deserialize, Serialize};

/// Samples come at this distance, in seconds.
pub(super) const INTERVAL_S: i64 = 300;
/// A host is hot above this share of its CPU.
const HOT: f64 = 0.9;
/// MiB a second of a migration: half of 1 Gbit/s.
pub(super) const MIGRATION_MIB_S: f64 = 62.5;
/// CPU that a migration costs the host that it goes to, as a share of the VM's.
const COST_WHILE_ARRIVING: f64 = 0.1;
/// A VM does not go back within this time, in seconds.
const RETURN_S: i64 = 7200;
const MINUTE_S: i64 = 60;
const DAY_S: i64 = 86_400;

/// What is played.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Fleet {
    /// CPU of each host.
    pub(super) cpu: f64,
    /// Memory of each host in MiB.
    pub(super) memory_mib: u64,
    /// How many hosts.
    pub(super) hosts: usize,
    /// The VMs.
    pub(super) vms: Vec<FleetVm>,
    /// Where each VM starts.
    pub(super) start: Vec<usize>,
}

/// One VM of a fleet.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct FleetVm {
    /// Its size.
    pub(super) cpu: f64,
    /// Memory in MiB.
    pub(super) memory_mib: u64,
    /// CPU that it asks for, one sample each 5 min.
    pub(super) asked: Vec<f64>,
}

/// What a balancer sees at a round.
#[derive(Debug)]
pub(super) struct View<'a> {
    pub(super) now_s: i64,
    pub(super) fleet: &'a Fleet,
    /// Where each VM runs.
    pub(super) host_of: &'a [usize],
    /// Whether it is on its way.
    pub(super) is_migrating: &'a [bool],
    /// CPU asked for now by each VM.
    pub(super) asked: &'a [f64],
    /// CPU asked for of each host, oldest first, up to now.
    pub(super) host_asked: &'a [Vec<f64>],
}

/// Who decides what moves.
pub(super) trait Balancer {
    /// VMs with the hosts that they should go to.
    fn round(&mut self, view: &View<'_>) -> Result<Vec<(usize, usize)>>;
}

/// Nobody moves.
#[derive(Debug)]
pub(super) struct Nobody;

impl Balancer for Nobody {
    fn round(&mut self, _: &View<'_>) -> Result<Vec<(usize, usize)>> {
        Ok(Vec::new())
    }
}

/// The figures of one run.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct Figures {
    /// Host-minutes above 90 %.
    pub hot_minutes: u64,
    /// Migrations started.
    pub migrations: u64,
    /// MiB that they moved.
    pub moved_mib: u64,
    /// Most migrations of one VM in a day.
    pub most_per_vm_day: u64,
    /// VMs that went back within 2 h to a host that they left.
    pub returns: u64,
    /// Migrations after the first 30 min.
    pub migrations_after_start: u64,
    /// Share of the asked CPU that hosts did not have.
    pub unmet: f64,
}

/// Plays a fleet to the end of its traces.
pub(super) fn play(fleet: &Fleet, balancer: &mut dyn Balancer) -> Result<Figures> {
    let slots = fleet.vms.iter().map(|vm| vm.asked.len()).min().unwrap_or(0);
    let mut host_of = fleet.start.clone();
    let mut is_migrating = vec![false; host_of.len()];
    let mut arrivals: BTreeMap<i64, Vec<(usize, usize)>> = BTreeMap::new();
    let mut host_asked = vec![Vec::with_capacity(slots); fleet.hosts];
    let mut figures = Figures::default();
    let mut left: BTreeMap<(usize, usize), i64> = BTreeMap::new();
    let mut per_day: BTreeMap<(usize, i64), u64> = BTreeMap::new();
    let (mut all, mut short) = (0.0, 0.0);
    for slot in 0..slots {
        let asked: Vec<f64> = fleet.vms.iter().map(|vm| vm.asked[slot]).collect();
        let start_s = slot as i64 * INTERVAL_S;
        for minute in 0..INTERVAL_S / MINUTE_S {
            let now_s = start_s + minute * MINUTE_S;
            while let Some(entry) = arrivals.first_entry().filter(|entry| *entry.key() <= now_s) {
                for (vm, to) in entry.remove() {
                    host_of[vm] = to;
                    is_migrating[vm] = false;
                }
            }
            let mut loads = vec![0.0; fleet.hosts];
            for (&host, asked) in host_of.iter().zip(&asked) {
                loads[host] += asked;
            }
            if minute == 0 {
                for (history, load) in host_asked.iter_mut().zip(&loads) {
                    history.push(*load);
                }
                let view = View {
                    now_s,
                    fleet,
                    host_of: &host_of,
                    is_migrating: &is_migrating,
                    asked: &asked,
                    host_asked: &host_asked,
                };
                for (vm, to) in balancer.round(&view)? {
                    if is_migrating[vm] || host_of[vm] == to {
                        continue;
                    }
                    let mib = fleet.vms[vm].memory_mib;
                    let took_s = (mib as f64 / MIGRATION_MIB_S).ceil() as i64;
                    arrivals.entry(now_s + took_s).or_default().push((vm, to));
                    is_migrating[vm] = true;
                    figures.migrations += 1;
                    figures.moved_mib += mib;
                    figures.migrations_after_start += u64::from(now_s > 1800);
                    *per_day.entry((vm, now_s / DAY_S)).or_default() += 1;
                    let back = left.get(&(vm, to)).is_some_and(|at_s| now_s - at_s < RETURN_S);
                    figures.returns += u64::from(back);
                    left.insert((vm, host_of[vm]), now_s);
                }
            }
            for &(vm, to) in arrivals.values().flatten() {
                loads[to] += COST_WHILE_ARRIVING * asked[vm];
            }
            for load in loads {
                figures.hot_minutes += u64::from(load > HOT * fleet.cpu);
                short += (load - fleet.cpu).max(0.0);
                all += load;
            }
        }
    }
    figures.most_per_vm_day = per_day.into_values().max().unwrap_or(0);
    figures.unmet = if all > 0.0 { short / all } else { 0.0 };
    Ok(figures)
}

/// Host-minutes above 90 % that no placement avoids: one host is hot while all of them together are
/// asked for more than that.
pub(super) fn unavoidable_minutes(fleet: &Fleet) -> u64 {
    let slots = fleet.vms.iter().map(|vm| vm.asked.len()).min().unwrap_or(0);
    let total = |slot: usize| fleet.vms.iter().map(|vm| vm.asked[slot]).sum::<f64>();
    let full = (0..slots).filter(|&slot| total(slot) > HOT * fleet.cpu * fleet.hosts as f64);
    full.count() as u64 * (INTERVAL_S / MINUTE_S) as u64
}

#[cfg(test)]
mod tests {
    use super::*;

    struct Once;

    impl Balancer for Once {
        fn round(&mut self, view: &View<'_>) -> Result<Vec<(usize, usize)>> {
            Ok(if view.now_s == 0 { vec![(0, 1)] } else { Vec::new() })
        }
    }

    #[test]
    fn a_vm_heats_its_old_host_until_it_has_moved() {
        let fleet = Fleet {
            cpu: 10.0,
            memory_mib: 1 << 20,
            hosts: 2,
            vms: [(5.0, 5000), (4.5, 1000)]
                .map(|(cpu, memory_mib)| FleetVm { cpu, memory_mib, asked: vec![cpu; 2] })
                .to_vec(),
            start: vec![0, 0],
        };
        let still = play(&fleet, &mut Nobody).unwrap();
        assert_eq!((still.hot_minutes, still.migrations), (10, 0));
        // 5000 MiB take 80 s: the second minute is hot still.
        let moved = play(&fleet, &mut Once).unwrap();
        assert_eq!((moved.hot_minutes, moved.migrations, moved.moved_mib), (2, 1, 5000));
        assert_eq!(unavoidable_minutes(&fleet), 0);
    }
}
