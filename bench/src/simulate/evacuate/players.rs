//! Who decides: the planner, with forecasts or with the truth, and simple orders.
//!
//! Invariant: all see the same view; what the planner knows of the time to come is its forecasts', except
//! where it is told the truth, which the figures say.

use anyhow::{Context, Result};
use longhaul_scheduler::evacuate::departure::Departure;
use longhaul_scheduler::evacuate::evacuate;
use longhaul_scheduler::evacuate::need::{Evacuation, Guest, Path, Target, UnderWay};

use super::world::{PAUSE_S, Player, SLOT_S, View, World};

/// Seconds of the link that promises leave free: what a halved link loses in half an hour.
const RESERVE_S: u32 = 900;
/// Slots after which a plan is made anew although all goes by it.
const AGAIN_SLOTS: usize = 6;
/// So much later than planned a migration is before a plan is made anew.
const BEHIND: f64 = 1.2;
/// A link that gives less than this share of what was expected.
const WEAK: f64 = 0.7;

/// The planner.
#[derive(Debug)]
pub(super) struct Longhaul<'a> {
    world: &'a World,
    knows_truth: bool,
    seed: u64,
    plan: Option<Departure>,
    expected: Vec<f64>,
    was_weak: bool,
    /// VMs promised by the first plan.
    pub(super) promised: Vec<usize>,
    /// Plans made.
    pub(super) plans: usize,
    /// Longest that a plan after the first took, in seconds.
    pub(super) again_s: f64,
}

impl<'a> Longhaul<'a> {
    pub(super) fn new(world: &'a World, knows_truth: bool, seed: u64) -> Self {
        Self {
            world,
            knows_truth,
            seed,
            plan: None,
            expected: Vec::new(),
            was_weak: false,
            promised: Vec::new(),
            plans: 0,
            again_s: 0.0,
        }
    }

    /// What it is told.
    fn need(&mut self, view: &View<'_>) -> Evacuation {
        let world = self.world;
        let slot = view.now_s / SLOT_S;
        let seen = (view.now_s > 0).then_some(view.rate);
        let (leftover, cautious) = if self.knows_truth {
            let link = world.true_link()[slot..].to_vec();
            (link.clone(), link)
        } else {
            world.forecast_link(slot, seen)
        };
        self.expected = [vec![0.0; slot], leftover.clone()].concat();
        let guest = |(vm, left): (usize, f64)| {
            let (dirty, high) = if self.knows_truth {
                (world.true_dirty(vm)[slot..].to_vec(), Vec::new())
            } else {
                world.forecast_dirty(vm, slot)
            };
            let of = &world.vms[vm];
            let sent_mib = of.whole - left;
            let is_under_way = view.under_way == Some(vm);
            Guest {
                name: vm.to_string(),
                host: "here".to_owned(),
                site: 0,
                weight: f64::from(of.weight),
                memory_mib: of.memory_mib,
                disk_mib: of.whole as u64 - of.memory_mib,
                cpu: 0.0,
                dirty_mib_s: dirty,
                dirty_high_mib_s: high,
                is_pinned: false,
                under_way: is_under_way.then_some(UnderWay { path: 0, target: 0, sent_mib }),
            }
        };
        let left = view.left.iter().enumerate().filter_map(|(vm, left)| Some((vm, (*left)?)));
        Evacuation {
            guests: left.map(guest).collect(),
            targets: vec![Target {
                name: "there".to_owned(),
                site: 1,
                memory_mib: u64::MAX,
                cpu: 1.0,
            }],
            paths: vec![Path {
                name: "link".to_owned(),
                from: 0,
                to: 1,
                leftover_mib_s: leftover,
                cautious_mib_s: cautious,
                streams: 1,
            }],
            slots_from_s: (slot * SLOT_S) as i64,
            slot_s: SLOT_S as u32,
            deadline_s: world.deadline_s as i64,
            pause_s: PAUSE_S,
            reserve_s: if self.knows_truth { 0 } else { RESERVE_S },
            previous: self.plan.clone().map(Box::new),
        }
    }
}

impl Player for Longhaul<'_> {
    fn next(&mut self, view: &View<'_>) -> Result<Option<usize>> {
        let slot = view.now_s / SLOT_S;
        let expected = self.expected.get(slot).copied().unwrap_or(view.rate);
        // Once told, the plan expects the weak link for a while; it is told of both edges.
        let is_weak = view.rate < WEAK * expected || (self.was_weak && view.rate < 1.3 * expected);
        let first = self.plan.as_ref().and_then(|plan| plan.goes.first());
        let is_behind = first.is_some_and(|goes| {
            let planned = (goes.end_s - goes.start_s) as f64;
            view.now_s as f64 > goes.start_s as f64 + BEHIND * planned
        });
        let is_due = view.now_s % SLOT_S == 10 && slot.is_multiple_of(AGAIN_SLOTS);
        if !view.is_free && !is_due && !is_behind && is_weak == self.was_weak {
            return Ok(view.under_way);
        }
        self.was_weak = is_weak;
        let need = self.need(view);
        let start = std::time::Instant::now();
        let plan = evacuate(&need, view.now_s as i64, self.seed)?;
        if self.plan.is_none() {
            for name in &plan.promised {
                self.promised.push(name.parse()?);
            }
        } else {
            self.again_s = self.again_s.max(start.elapsed().as_secs_f64());
        }
        self.plans += 1;
        let next = plan.goes.first().map(|goes| goes.vm.parse::<usize>());
        self.plan = Some(plan);
        next.transpose().context("a VM's name is its number")
    }
}

/// VMs in a fixed order, one at a time, each until it has arrived.
#[derive(Debug)]
pub(super) struct Order(pub(super) Vec<usize>);

impl Player for Order {
    fn next(&mut self, view: &View<'_>) -> Result<Option<usize>> {
        Ok(self.0.iter().copied().find(|&vm| view.left[vm].is_some()))
    }
}

/// The rivals, by name.
pub(super) fn rivals(world: &World) -> [(&'static str, Order); 4] {
    let sorted = |key: &dyn Fn(usize) -> f64| {
        let mut order: Vec<usize> = (0..world.vms.len()).collect();
        order.sort_by(|&a, &b| key(a).total_cmp(&key(b)).then(a.cmp(&b)));
        Order(order)
    };
    let weight = |vm: usize| f64::from(world.vms[vm].weight);
    let (link, _) = world.forecast_link(0, None);
    let rate = link.iter().sum::<f64>() / link.len().max(1) as f64;
    // D0 and what changes meanwhile, at the mean rates.
    let density = |vm: usize| {
        let (dirty, _) = world.forecast_dirty(vm, 0);
        let dirty = dirty.iter().sum::<f64>() / dirty.len().max(1) as f64;
        weight(vm) * (1.0 - dirty / rate).max(0.0) / world.vms[vm].whole
    };
    [
        ("list order", sorted(&|_| 0.0)),
        ("highest priority", sorted(&|vm| -weight(vm))),
        ("smallest first", sorted(&|vm| world.vms[vm].whole)),
        ("density", sorted(&|vm| -density(vm))),
    ]
}
