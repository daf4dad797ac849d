//! From what hosts report to what the planner takes: a state, and a forecast for each VM.
//!
//! Invariant: pure, the time is an argument. What is doubtful makes a VM or a host stay as it is, never
//! move: a VM that two hosts report, one that nobody has measured yet, one whose last order failed.

use std::collections::BTreeMap;
use std::time::Duration;

use longhaul_scheduler::forecast::{Forecast, Forecaster, forecast_all};
use longhaul_scheduler::policy::{Goal, Policy};
use longhaul_scheduler::state::{Host, Moved, State, Vm};

use super::store::Memory;
use crate::config::SchedulerConfig;
use crate::control::{HostLoad, OrderOutcome, VmLoad};
use crate::units::MIB;

/// Deviation of VMs of which nothing is known, as a share of their size.
const COLD: f64 = 0.15;
/// Watts idle and full. Balance does not look at them.
const WATTS: (f64, f64) = (100.0, 200.0);
/// VMs suffer a little above the mark at which their host counts as hot.
const COMFORT_PER_ENTER: f64 = 1.1;
/// A VM is judged, and its host with it, once it was seen so often.
const SAMPLES_MIN: u64 = 2;

/// The newest report of a host.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Heard {
    pub(super) load: HostLoad,
    /// When its newest sample was taken, by this host's clock.
    pub(super) sampled_at_s: i64,
}

/// What the planner takes.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Picture {
    pub(super) state: State,
    pub(super) forecasts: Vec<Forecast>,
}

/// The limits that the operator has set.
pub(super) fn policy(config: &SchedulerConfig) -> Policy {
    let seconds = |time: Duration| i64::try_from(time.as_secs()).unwrap_or(i64::MAX);
    let (enter, leave) = config.marks;
    Policy {
        enter,
        leave,
        comfort: enter * COMFORT_PER_ENTER,
        moves_per_hour: config.moves_per_hour,
        cooldown_s: seconds(config.cooldown),
        // Two looks may fail.
        stale_s: seconds(config.interval * 2).max(10),
        ..Policy::new(Goal::Balance)
    }
}

/// What one migration gets of the network, in MiB a second: what links were seen to carry.
pub(super) fn migration_mib_s(heard: &BTreeMap<String, Heard>, config: &SchedulerConfig) -> f64 {
    let links = heard.values().flat_map(|heard| &heard.load.links);
    let best = links.map(|link| link.bytes_s).filter(|rate| rate.is_finite()).fold(0.0, f64::max);
    let prior = config.link.bits_per_second() as f64 / 8.0;
    if best > 0.0 { best / MIB } else { prior / MIB }
}

/// The state at `now_s`, of the hosts that were ever heard.
pub(super) fn picture(
    heard: &BTreeMap<String, Heard>,
    memory: &Memory,
    config: &SchedulerConfig,
    now_s: i64,
) -> Picture {
    let names: Vec<&String> = heard.keys().collect();
    let number = |host: &str| names.binary_search_by(|name| name.as_str().cmp(host)).ok();
    let hosts = heard.iter().map(|(name, heard)| Host {
        name: name.clone(),
        cpu: heard.load.cores,
        cpu_per_vm: heard.load.cores,
        memory_mib: heard.load.memory_mib,
        watts: WATTS,
        is_on: true,
        is_in_maintenance: memory.maintenance.contains(name),
        is_settling: heard.load.vms.iter().any(|vm| vm.runs && is_young(memory, vm)),
        sampled_at_s: heard.sampled_at_s,
        asked: memory
            .hosts
            .get(name)
            .into_iter()
            .flatten()
            .copied()
            .chain([heard.load.cpu])
            .collect(),
    });
    let (mut vms, mut series, mut sizes) = (Vec::new(), Vec::new(), Vec::new());
    let young = Forecaster::default();
    for (vm, (host, is_twice)) in placed(heard) {
        let Some(host) = number(host) else { continue };
        let rules = config.vms.get(&vm.name).cloned().unwrap_or_default();
        let is_under_way =
            memory.orders.iter().any(|order| order.vm == vm.name && order.is_under_way());
        let has_job = heard.values().any(|h| h.load.jobs.iter().any(|job| job.vm == vm.name));
        vms.push(Vm {
            name: vm.name.clone(),
            host,
            asked: vm.cpu.unwrap_or(0.0),
            memory_mib: vm.memory_mib,
            move_mib: move_mib(vm),
            is_pinned: rules.pinned,
            is_migrating: is_twice
                || is_under_way
                || has_job
                || vm.cpu.is_none()
                || failed_lately(memory, config, &vm.name, now_s),
            together: rules.together,
            apart: rules.apart,
        });
        series.push(memory.vms.get(&vm.name).map_or(&young, |known| &known.series));
        sizes.push(f64::from(vm.vcpus.max(1)));
    }
    let moved = memory.moved.iter().filter_map(|past| {
        let (from, to) = (number(&past.from)?, number(&past.to)?);
        Some(Moved { vm: past.vm.clone(), from, to, at_s: past.at_s })
    });
    let forecasts = forecast_all(&series, &sizes, COLD);
    let state = State {
        hosts: hosts.collect(),
        vms,
        moved: moved.collect(),
        migration_mib_s: migration_mib_s(heard, config),
    };
    Picture { state, forecasts }
}

/// Whether too little of it was seen to tell a start from a habit.
fn is_young(memory: &Memory, vm: &VmLoad) -> bool {
    vm.cpu.is_none() || memory.vms.get(&vm.name).is_none_or(|of| of.series.samples() < SAMPLES_MIN)
}

/// What moving it sends, at most: its memory, and its disks unless they lie somewhere already.
pub(super) fn move_mib(vm: &VmLoad) -> u64 {
    let disks = if vm.seeded_at.is_some() { 0 } else { vm.disk_mib };
    (vm.memory_mib + disks).max(1)
}

/// Running VMs by name, each at one host; and whether another host reports it, too.
fn placed(heard: &BTreeMap<String, Heard>) -> Vec<(&VmLoad, (&str, bool))> {
    let mut places: BTreeMap<&str, (&VmLoad, (&str, bool))> = BTreeMap::new();
    for (host, heard) in heard {
        for vm in heard.load.vms.iter().filter(|vm| vm.runs) {
            let place = places.entry(&vm.name);
            place.and_modify(|(_, (_, is_twice))| *is_twice = true).or_insert((vm, (host, false)));
        }
    }
    places.into_values().collect()
}

/// Whether a move of it was tried and failed: it is left alone for as long as one that succeeded.
fn failed_lately(memory: &Memory, config: &SchedulerConfig, vm: &str, now_s: i64) -> bool {
    let last = memory.orders.iter().rev().find(|order| order.vm == vm);
    let wait_s = i64::try_from(config.cooldown.as_secs()).unwrap_or(i64::MAX);
    last.is_some_and(|order| {
        matches!(order.outcome, OrderOutcome::Failed { .. } | OrderOutcome::Lost)
            && now_s.saturating_sub(order.at.as_second()) < wait_s
    })
}

#[cfg(test)]
mod tests;
