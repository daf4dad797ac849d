//! As few hosts on as carry the load: hot hosts are relieved first, then little used ones emptied.
//!
//! Invariant: a host is emptied whole or not at all, and only for power that pays for its moves over
//! the stable time; an off host is opened only for a VM that no open host takes.

use crate::balance::balance;
use crate::decision::{Decision, Why};
use crate::what_if::WhatIf;

/// CPU time that one watt-second is worth, as a share of the host's CPU for its idle power: an idle
/// host switched off is worth so much of its CPU.
const IDLE_WORTH: f64 = 0.1;

/// Relieves hot hosts, on hosts that are switched on for it if need be, then empties hosts.
pub(crate) fn consolidate(what_if: &mut WhatIf<'_>) -> Vec<Decision> {
    let mut decisions = balance(what_if);
    let mut order: Vec<usize> = (0..what_if.state.hosts.len())
        .filter(|&host| what_if.is_on[host] && !what_if.vms[host].is_empty())
        .filter(|&host| !what_if.is_frozen(host) && !what_if.host(host).is_in_maintenance)
        .collect();
    // What is lost by keeping a host: its idle power for each unit of its load.
    let waste = |what_if: &WhatIf<'_>, host: usize| {
        let load = what_if.later[host].high(0.0).max(1.0);
        what_if.host(host).watts.0 / load
    };
    order.sort_by(|&a, &b| {
        waste(what_if, b).total_cmp(&waste(what_if, a)).then(what_if.lot(a).cmp(&what_if.lot(b)))
    });
    for from in order {
        decisions.extend(empty(what_if, from));
    }
    decisions
}

/// Moves all VMs of a host, the largest first, each to the fullest host that takes it.
fn empty(what_if: &mut WhatIf<'_>, from: usize) -> Vec<Decision> {
    let policy = what_if.policy;
    let mut vms = what_if.vms[from].clone();
    let cost: f64 = vms.iter().map(|&vm| what_if.cost(vm)).sum();
    let gain = IDLE_WORTH * what_if.host(from).cpu * policy.stable_s as f64;
    if gain <= policy.gain_per_cost * cost || !what_if.has_budget(vms.len()) {
        return Vec::new();
    }
    if vms.iter().any(|&vm| what_if.stays(from, vm).is_some()) {
        return Vec::new();
    }
    vms.sort_by(|&a, &b| {
        what_if.forecasts[b].later.mean.total_cmp(&what_if.forecasts[a].later.mean)
    });
    let now = what_if.now[from] / what_if.host(from).cpu;
    let mut shifted = Vec::new();
    for vm in vms {
        let Some(to) = fullest(what_if, from, vm) else {
            for (vm, to) in shifted {
                what_if.shift(to, vm, from);
            }
            return Vec::new();
        };
        what_if.shift(from, vm, to);
        shifted.push((vm, to));
    }
    // It all fits: undo the trial and make the moves.
    for &(vm, to) in &shifted {
        what_if.shift(to, vm, from);
    }
    let count = shifted.len() as f64;
    let watts = what_if.host(from).watts.0;
    let made = shifted
        .into_iter()
        .map(|(vm, to)| what_if.make(from, vm, to, gain / count, Why::Emptied { now, watts }))
        .collect();
    what_if.is_on[from] = false;
    made
}

/// The host with the least room that takes the VM and is not wasted on it.
fn fullest(what_if: &WhatIf<'_>, from: usize, vm: usize) -> Option<usize> {
    let forecast = what_if.forecasts[vm].later;
    let room = |to: usize| {
        let then = what_if.later[to].plus(forecast).high(what_if.policy.deviations);
        what_if.policy.comfort * what_if.host(to).cpu - then
    };
    (0..what_if.state.hosts.len())
        .filter(|&to| !what_if.vms[to].is_empty() && what_if.refusal(from, vm, to).is_none())
        .min_by(|&a, &b| room(a).total_cmp(&room(b)).then(what_if.lot(a).cmp(&what_if.lot(b))))
}
