//! What the planner knows and plans, as a command shows it.
//!
//! Invariant: nothing is computed here that the plan was not made of.

use std::sync::{Arc, PoisonError};

use super::{Round, Scheduler};
use crate::control::{EvacuationView, HostView, OrderOutcome, OrderView, PlanView};

/// Orders that are shown.
const ORDERS_SHOWN: usize = 10;

/// What monitoring is told of a turn.
#[derive(Debug)]
pub(in crate::agent) struct Glance {
    pub(in crate::agent) hosts: Vec<HostView>,
    /// Moves of the newest plan, if there is one.
    pub(in crate::agent) moves: Option<usize>,
    /// Seconds that it took.
    pub(in crate::agent) think_s: f64,
    /// How the orders went that are remembered.
    pub(in crate::agent) orders: Vec<OrderOutcome>,
    /// The evacuation under way.
    pub(in crate::agent) evacuation: Option<EvacuationView>,
}

impl Scheduler {
    /// What the last turn has shown. Never waits: a turn may ask hosts that are slow to answer.
    pub(in crate::agent) fn glance(&self) -> Option<Arc<Glance>> {
        self.glance.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Keeps what this turn has shown.
    pub(super) fn take_glance(&self, round: &Round, think_s: f64) {
        let glance = Glance {
            hosts: self.hosts(round),
            moves: round.plan.as_ref().map(|plan| plan.moves().count()),
            think_s,
            orders: round.memory.orders.iter().map(|order| order.outcome.clone()).collect(),
            evacuation: self.under_way(round),
        };
        *self.glance.lock().unwrap_or_else(PoisonError::into_inner) = Some(Arc::new(glance));
    }

    fn hosts(&self, round: &Round) -> Vec<HostView> {
        let hosts = self.rules().hosts.iter().chain([&self.config.name]);
        let mut hosts: Vec<HostView> = hosts.map(|host| host_view(round, host)).collect();
        hosts.sort_by(|a, b| a.name.cmp(&b.name));
        hosts
    }

    /// Everything of this round.
    pub(super) fn shown(&self, round: &Round) -> PlanView {
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
            hosts: self.hosts(round),
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
