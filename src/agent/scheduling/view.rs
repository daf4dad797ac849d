//! What the planner knows and plans, as a command shows it.
//!
//! Invariant: nothing is computed here that the plan was not made of.

use super::{Round, Scheduler};
use crate::control::{HostView, OrderView, PlanView};

/// Orders that are shown.
const ORDERS_SHOWN: usize = 10;

impl Scheduler {
    /// Everything of this round.
    pub(super) fn shown(&self, round: &Round) -> PlanView {
        let hosts = self.rules().hosts.iter().chain([&self.config.name]);
        let mut hosts: Vec<HostView> = hosts.map(|host| host_view(round, host)).collect();
        hosts.sort_by(|a, b| a.name.cmp(&b.name));
        let orders = round.memory.orders.iter().rev().take(ORDERS_SHOWN).map(|order| OrderView {
            vm: order.vm.clone(),
            from: order.from.clone(),
            to: order.to.clone(),
            at: order.at,
            because: order.because.clone(),
            forecast: (order.mib, order.seconds),
            outcome: order.outcome.clone(),
        });
        PlanView {
            acts: self.rules().acts,
            hosts,
            plan: round.plan.clone(),
            without: round.without.clone(),
            forecasts: round.forecasts.clone(),
            orders: orders.collect(),
            evacuation: self.under_way(round),
        }
    }
}

fn host_view(round: &Round, host: &str) -> HostView {
    let heard = round.heard.get(host);
    let here = || heard.into_iter().flat_map(|heard| heard.load.vms.iter().filter(|vm| vm.runs));
    HostView {
        name: host.to_owned(),
        cpu: heard.map(|heard| (heard.load.cpu, heard.load.cores)),
        memory_mib: heard
            .map(|heard| (here().map(|vm| vm.memory_mib).sum(), heard.load.memory_mib)),
        vms: here().map(|vm| vm.name.clone()).collect(),
        is_in_maintenance: round.memory.maintenance.contains(host),
        sampled_at_s: heard.map(|heard| heard.sampled_at_s),
        trouble: round.trouble.get(host).cloned(),
    }
}
