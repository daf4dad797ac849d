//! Relief of hot hosts, and hosts in maintenance.
//!
//! Invariant: a VM leaves a hot host only when the CPU that is expected to be short falls by more than
//! the move costs, both hosts counted together, as often as the policy asks. A move whose mirror image
//! is as good gains nothing by that measure, so none is ever made.

use crate::decision::{Decision, Nothing, Refusal, Why};
use crate::policy::Goal;
use crate::what_if::{Load, WhatIf};

/// Moves everything off hosts in maintenance, each VM to where it adds least.
pub(crate) fn drain(what_if: &mut WhatIf<'_>) -> Vec<Decision> {
    let mut decisions = Vec::new();
    for from in 0..what_if.state.hosts.len() {
        if !what_if.host(from).is_in_maintenance || what_if.is_frozen(from) {
            continue;
        }
        let mut refused = None;
        for vm in what_if.vms[from].clone() {
            let found = what_if
                .stays(from, vm)
                .map_or_else(|| targets(what_if, from, vm), Err)
                .map(|targets| targets.into_iter().min_by(|a, b| b.1.total_cmp(&a.1)));
            match found {
                Ok(Some((to, gain))) => {
                    decisions.push(what_if.make(from, vm, to, gain, Why::Maintenance));
                }
                Ok(None) => refused = Some(Refusal::Closed),
                Err(why) => refused = Some(why),
            }
        }
        if let Some(refused) = refused {
            let host = what_if.host(from).name.clone();
            decisions.push(Decision::Nothing { host, because: Nothing::NoMove { refused } });
        }
    }
    decisions
}

/// Relieves hot hosts, the hottest first.
pub(crate) fn balance(what_if: &mut WhatIf<'_>) -> Vec<Decision> {
    let mut decisions = Vec::new();
    let mut hot = Vec::new();
    for host in 0..what_if.state.hosts.len() {
        if let Some(then) = hot_share(what_if, host) {
            if then > what_if.policy.enter {
                hot.push((then, host));
            } else {
                let because = Nothing::Passing { then };
                decisions
                    .push(Decision::Nothing { host: what_if.host(host).name.clone(), because });
            }
        }
    }
    hot.sort_by(|a, b| b.0.total_cmp(&a.0).then(what_if.lot(a.1).cmp(&what_if.lot(b.1))));
    for (then, host) in hot {
        decisions.extend(relieve(what_if, host, then));
    }
    decisions
}

/// What share is expected of a host whose samples are hot, when a move would have ended.
fn hot_share(what_if: &WhatIf<'_>, number: usize) -> Option<f64> {
    let (host, policy) = (what_if.host(number), what_if.policy);
    if !host.is_on || host.is_in_maintenance || what_if.is_frozen(number) {
        return None;
    }
    let newest = host.asked.iter().rev().take(policy.hot_of);
    let above = newest.filter(|asked| **asked > policy.enter * host.cpu).count();
    (above >= policy.hot_samples).then(|| what_if.soon[number].high(0.0) / host.cpu)
}

/// Moves VMs off one host until it is expected to be under its leave mark.
fn relieve(what_if: &mut WhatIf<'_>, from: usize, then: f64) -> Vec<Decision> {
    let (host, policy) = (what_if.host(from), what_if.policy);
    let mut decisions = Vec::new();
    let may_open = policy.goal == Goal::Consolidate;
    while what_if.soon[from].high(0.0) > policy.leave * host.cpu {
        let because = if what_if.has_budget(1) {
            match best_move(what_if, from) {
                Ok(Best { vm, to, gain, cost }) if gain > policy.gain_per_cost * cost => {
                    let forecast = what_if.forecasts[vm].later;
                    let target = what_if.later[to].plus(forecast).high(policy.deviations);
                    let because = Why::Hot {
                        now: what_if.now[from] / host.cpu,
                        then,
                        target: target / what_if.host(to).cpu,
                    };
                    decisions.push(what_if.make(from, vm, to, gain, because));
                    continue;
                }
                Ok(Best { vm, gain, cost, .. }) => {
                    Nothing::TooDear { vm: what_if.vm(vm).name.clone(), gain, cost }
                }
                Err(Refusal::NoVm) => Nothing::NoMove { refused: Refusal::NoVm },
                // Any of its VMs can run there.
                Err(_) if may_open && what_if.open_for(host.cpu_per_vm) => continue,
                Err(refused) => Nothing::NoMove { refused },
            }
        } else {
            Nothing::Budget { per_hour: policy.moves_per_hour }
        };
        decisions.push(Decision::Nothing { host: host.name.clone(), because });
        break;
    }
    decisions
}

/// A move with what it gains and costs.
#[derive(Debug, Clone, Copy)]
struct Best {
    vm: usize,
    to: usize,
    gain: f64,
    cost: f64,
}

/// The move off a host with the most gain, less what it costs, for each byte that it sends.
fn best_move(what_if: &WhatIf<'_>, from: usize) -> Result<Best, Refusal> {
    let mut best: Option<(f64, Best)> = None;
    let mut refused = Refusal::NoVm;
    for &vm in &what_if.vms[from] {
        let targets = what_if.stays(from, vm).map_or_else(|| targets(what_if, from, vm), Err);
        let targets = match targets {
            Ok(targets) => targets,
            Err(why) => {
                refused = refused.max(why);
                continue;
            }
        };
        let cost = what_if.cost(vm);
        for (to, gain) in targets {
            let net = gain - what_if.policy.gain_per_cost * cost;
            let score = net / what_if.vm(vm).move_mib as f64;
            let is_better = best.is_none_or(|(most, one)| {
                score > most || (score == most && what_if.lot(to) < what_if.lot(one.to))
            });
            if is_better {
                best = Some((score, Best { vm, to, gain, cost }));
            }
        }
    }
    best.map(|(_, best)| best).ok_or(refused)
}

/// Hosts that would take the VM, each with what the move gains; or the rule that came nearest.
fn targets(what_if: &WhatIf<'_>, from: usize, vm: usize) -> Result<Vec<(usize, f64)>, Refusal> {
    let mut found = Vec::new();
    let mut refused = Refusal::Closed;
    let forecast = what_if.forecasts[vm].later;
    let short =
        |host: usize, load: Load| load.above(what_if.policy.comfort * what_if.host(host).cpu);
    let (with, without) = (what_if.later[from], what_if.later[from].minus(forecast));
    let relief = short(from, with) - short(from, without);
    for to in 0..what_if.state.hosts.len() {
        if let Some(why) = what_if.refusal(from, vm, to) {
            refused = refused.max(why);
            continue;
        }
        let added = short(to, what_if.later[to].plus(forecast)) - short(to, what_if.later[to]);
        found.push((to, (relief - added) * what_if.policy.stable_s as f64));
    }
    if found.is_empty() { Err(refused) } else { Ok(found) }
}
