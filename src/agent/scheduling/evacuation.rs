//! Evacuations: what the planner is told of a site that fails, and its plan carried out.
//!
//! Invariant: a plan is made anew at each look, from what hosts report then, and keeps what was promised;
//! one VM goes at a time, through the same door as any other move. What was thought of a move and what
//! came of it is seen: predictions follow the moves that were made, and the plan says by how much.

use std::collections::BTreeMap;

use jiff::Timestamp;
use longhaul_scheduler::evacuate::departure::Departure;
use longhaul_scheduler::evacuate::evacuate;
use longhaul_scheduler::evacuate::need::{Evacuation, Guest, Path, Target, UnderWay};

use super::act::Intent;
use super::picture::{Heard, move_mib};
use super::store::{Memory, Wish};
use super::{Round, Scheduler};
use crate::agent::answer::Desk;
use crate::config::SchedulerConfig;
use crate::control::{EvacuateRequest, EvacuationView, Failure, OrderOutcome, VmLoad};
use crate::units::MIB;

/// Slots of a plan at most, and their length at most, in seconds.
const SLOTS: u64 = 288;
const SLOT_S_MAX: u64 = 300;
/// What a link is cautiously thought to carry, as a share of what it was last seen to: how much that
/// varies is not measured yet.
const CAUTIOUS: f64 = 0.8;
/// Seconds that a move takes beside its bytes: the target's hypervisor, the journals, the switchover.
const SET_UP_S: f64 = 3.0;
/// A promised VM is to arrive so long before the deadline, in seconds.
const RESERVE_S: u32 = 5;
/// Memory that a guest is thought to change, in MiB a second for each core that it uses, and cautiously.
/// Real guests under a database load change 5 to 8.
pub(in crate::agent) const DIRTY_MIB_S: (f64, f64) = (2.0, 6.0);
/// Longest pause that a plan counts with, in seconds.
pub(in crate::agent) const PAUSE_S: f64 = 0.3;
/// Moves that predictions follow, and how many there must be.
const LEARNED: std::ops::RangeInclusive<usize> = 3..=20;
/// A VM whose move failed is tried again after this time in seconds, and so often.
const AGAIN_S: i64 = 20;
const TRIES_MAX: usize = 3;
/// A year: a deadline beyond it is none.
const DEADLINE_S_MAX: u64 = 366 * 24 * 3600;

impl Scheduler {
    /// Begins one, ends one, or only plans it.
    pub(super) fn evacuation(
        &self,
        round: &mut Round,
        wish: &EvacuateRequest,
    ) -> Result<Option<EvacuationView>, Failure> {
        if wish.stop {
            let of_it = |under_way: &Wish| under_way.site == wish.site && !under_way.is_over;
            if !round.memory.evacuation.as_ref().is_some_and(of_it) {
                let what = format!("no evacuation of {} is under way", wish.site);
                return Err(Failure::refused(what, "`longhaul plan` shows what is"));
            }
            tracing::info!(site = wish.site, "the evacuation is ended");
            round.memory.evacuation = None;
            return Ok(None);
        }
        let EvacuateRequest { site, to, deadline_s, go, .. } = wish;
        self.members(site)?;
        self.members(to)?;
        if site == to {
            return Err(Failure::refused("a site cannot be emptied into itself", "name another"));
        }
        if *deadline_s == 0 || *deadline_s > DEADLINE_S_MAX {
            return Err(Failure::refused("the deadline is now or more than a year away", ""));
        }
        let other = round.memory.evacuation.as_ref().filter(|under_way| !under_way.is_over);
        if let Some(other) = other.filter(|_| *go) {
            let what = format!("an evacuation of {} is under way already", other.site);
            return Err(Failure::refused(
                what,
                format!("`longhaul evacuate {} --stop`", other.site),
            ));
        }
        let now = Timestamp::now();
        let deadline = Timestamp::from_second(now.as_second().saturating_add_unsigned(*deadline_s));
        let deadline = deadline.map_err(|error| Failure::refused(error.to_string(), ""))?;
        let mut wish = Wish {
            site: site.clone(),
            to: to.clone(),
            deadline,
            guests: Vec::new(),
            promised: Vec::new(),
            is_over: false,
        };
        let departure = self.departure(round, &wish, None, now)?;
        let goes = departure.goes.iter().map(|goes| goes.vm.clone());
        wish.guests = goes.chain(departure.stays.iter().map(|stays| stays.vm.clone())).collect();
        wish.promised.clone_from(&departure.promised);
        let view = view(&wish, &departure, round, *go);
        if *go {
            tracing::info!(site, to, %deadline, promised = ?wish.promised, "an evacuation begins");
            round.memory.evacuation = Some(wish);
            round.departure = Some(departure);
        }
        Ok(Some(view))
    }

    /// The next step of the one that is under way.
    pub(super) async fn evacuate_on(&self, desk: &Desk, round: &mut Round) {
        let Some(mut wish) = round.memory.evacuation.clone().filter(|wish| !wish.is_over) else {
            return;
        };
        let now = Timestamp::now();
        let departure = match self.departure(round, &wish, round.departure.as_ref(), now) {
            Ok(departure) => departure,
            Err(failure) => {
                tracing::warn!(what = failure.what, "the evacuation cannot be planned just now");
                return;
            }
        };
        let is_moving = round.memory.orders.iter().any(super::store::Order::is_under_way);
        let next = departure.goes.iter().find(|goes| !goes.is_under_way).map(|goes| Intent {
            vm: goes.vm.clone(),
            from: goes.from.clone(),
            to: goes.to.clone(),
            mib: goes.mib,
            because: goes.to_string(),
            deadline_s: u64::try_from(wish.deadline.as_second() - now.as_second()).ok(),
        });
        let is_late = now >= wish.deadline;
        // A host that is silent may still have VMs, and one whose move failed is tried again.
        let silent = self.members(&wish.site).unwrap_or_default();
        let silent = silent.iter().any(|host| round.trouble.contains_key(host));
        let again = |vm: &String| is_put_off(&round.memory, vm, now.as_second());
        let may_come = silent || wish.guests.iter().any(again);
        round.departure = Some(departure);
        match next {
            // One after the other: all at once save almost nothing before a tight deadline.
            Some(intent) if !is_moving && !is_late => self.order(desk, round, intent).await,
            None if is_late || !(is_moving || may_come) => {
                wish.is_over = true;
                let saved = saved(&wish, round);
                tracing::info!(site = wish.site, ?saved, promised = ?wish.promised, "evacuation over");
                round.memory.evacuation = Some(wish);
            }
            _ => {}
        }
    }

    /// The one that is under way or was the last, as a command shows it.
    pub(super) fn under_way(&self, round: &Round) -> Option<EvacuationView> {
        let wish = round.memory.evacuation.as_ref()?;
        let nothing = Departure::default();
        let departure = round.departure.as_ref().unwrap_or(&nothing);
        Some(view(wish, departure, round, !wish.is_over))
    }

    fn departure(
        &self,
        round: &Round,
        wish: &Wish,
        previous: Option<&Departure>,
        now: Timestamp,
    ) -> Result<Departure, Failure> {
        let sites = (self.members(&wish.site)?, self.members(&wish.to)?);
        let mut need = need(round, self.rules(), wish, sites, now.as_second());
        need.previous = previous.cloned().map(Box::new);
        let seed = now.as_second().unsigned_abs();
        evacuate(&need, now.as_second(), seed).map_err(|error| {
            Failure::failed(format!("no plan can be made: {error}"), "nothing was changed", "")
        })
    }

    fn members(&self, site: &str) -> Result<&[String], Failure> {
        self.rules().sites.get(site).map(Vec::as_slice).ok_or_else(|| {
            let next = "scheduler.sites in the planner's configuration names them";
            Failure::refused(format!("no site is called `{site}`"), next)
        })
    }
}

/// What the planner is told. Sites are 0, which is emptied, and 1.
fn need(
    round: &Round,
    config: &SchedulerConfig,
    wish: &Wish,
    (site, to): (&[String], &[String]),
    now_s: i64,
) -> Evacuation {
    let deadline_s = wish.deadline.as_second();
    let left_s = u64::try_from(deadline_s - now_s).unwrap_or(0);
    let slot_s = left_s.div_ceil(SLOTS).clamp(1, SLOT_S_MAX);
    let slots = usize::try_from(left_s.div_ceil(slot_s)).unwrap_or(0);
    let heard = |hosts: &'_ [String]| -> Vec<(String, Heard)> {
        let known = hosts.iter().filter(|host| !round.trouble.contains_key(*host));
        known.filter_map(|host| Some((host.clone(), round.heard.get(host)?.clone()))).collect()
    };
    let (leaves, takes) = (heard(site), heard(to));
    let rate = leftover_mib_s(&leaves, &takes, config);
    let ratio = learned(&round.memory).map_or(1.0, |(ratio, _)| ratio);
    let targets: Vec<Target> = takes
        .iter()
        .filter(|(host, _)| !round.memory.maintenance.contains(host))
        .map(|(host, heard)| {
            let used: u64 =
                heard.load.vms.iter().filter(|vm| vm.runs).map(|vm| vm.memory_mib).sum();
            Target {
                name: host.clone(),
                site: 1,
                memory_mib: heard.load.memory_mib.saturating_sub(used),
                cpu: (heard.load.cores - heard.load.cpu).max(0.0),
            }
        })
        .collect();
    let number = |host: &str| targets.iter().position(|target| target.name == host);
    let guest = |host: &str, heard: &Heard, vm: &VmLoad| {
        let rules = config.vms.get(&vm.name).cloned().unwrap_or_default();
        let order = round.memory.orders.iter().rev().find(|order| order.vm == vm.name);
        let order = order.filter(|order| order.is_under_way());
        let sent = heard.load.jobs.iter().find(|job| job.vm == vm.name);
        let sent = sent.map_or(0, |job| job.progress.wire_bytes) as f64 / MIB;
        let cores = vm.cpu.unwrap_or(0.0);
        let written = vm.written_bytes_s / MIB;
        let all = move_mib(vm) as f64 * ratio + SET_UP_S * rate;
        Guest {
            name: vm.name.clone(),
            host: host.to_owned(),
            site: 0,
            weight: rules.weight,
            memory_mib: vm.memory_mib,
            disk_mib: (all as u64).saturating_sub(vm.memory_mib),
            cpu: cores,
            dirty_mib_s: vec![(DIRTY_MIB_S.0 * cores + written) * ratio],
            dirty_high_mib_s: vec![(DIRTY_MIB_S.1 * cores + written) * ratio],
            is_pinned: rules.pinned,
            under_way: order.and_then(|order| {
                Some(UnderWay { path: 0, target: number(&order.to)?, sent_mib: sent })
            }),
        }
    };
    let guests = leaves.iter().flat_map(|(host, heard)| {
        let running = heard.load.vms.iter().filter(|vm| vm.runs);
        let offered = running.filter(|vm| failure(&round.memory, &vm.name, now_s).is_none());
        offered.map(|vm| guest(host, heard, vm)).collect::<Vec<_>>()
    });
    // A VM that is on its way may be reported by both sides.
    let guests: BTreeMap<String, Guest> = guests.map(|guest| (guest.name.clone(), guest)).collect();
    Evacuation {
        guests: guests.into_values().collect(),
        targets,
        paths: vec![Path {
            name: format!("{} to {}", wish.site, wish.to),
            from: 0,
            to: 1,
            leftover_mib_s: vec![rate; slots],
            cautious_mib_s: vec![rate * CAUTIOUS; slots],
            streams: 1,
        }],
        slots_from_s: now_s,
        slot_s: u32::try_from(slot_s).unwrap_or(u32::MAX),
        deadline_s,
        pause_s: PAUSE_S,
        reserve_s: RESERVE_S,
        previous: None,
    }
}

/// What the way from one site to another carries, in MiB a second: what it was last seen to, else what
/// the operator thinks, and in no case more than the caps at the hosts that send.
fn leftover_mib_s(
    leaves: &[(String, Heard)],
    takes: &[(String, Heard)],
    config: &SchedulerConfig,
) -> f64 {
    let leads_there = |peer: &str| takes.iter().any(|(_, heard)| heard.load.fingerprint == peer);
    let links = leaves.iter().flat_map(|(_, heard)| &heard.load.links);
    let seen = links.filter(|link| leads_there(&link.peer)).map(|link| link.bytes_s);
    let seen = seen.fold(0.0, f64::max);
    let prior = config.link.bits_per_second() as f64 / 8.0;
    let carried = if seen > 0.0 { seen } else { prior };
    let caps = leaves.iter().filter_map(|(_, heard)| heard.load.cap_bytes_s);
    caps.fold(carried, f64::min) / MIB
}

/// What moves have sent of what was thought, as a share, and how many moves say so.
fn learned(memory: &Memory) -> Option<(f64, usize)> {
    let done = memory.orders.iter().rev().filter_map(|order| match order.outcome {
        OrderOutcome::Done { wire_mib, .. } => Some((wire_mib as f64, order.whole_mib as f64)),
        _ => None,
    });
    let done: Vec<(f64, f64)> = done.take(*LEARNED.end()).collect();
    if done.len() < *LEARNED.start() {
        return None;
    }
    let (sent, thought) = done.iter().fold((0.0, 0.0), |sum, one| (sum.0 + one.0, sum.1 + one.1));
    (thought > 0.0).then_some((sent / thought, done.len()))
}

/// Whether its last move failed just now, and not too often.
fn is_put_off(memory: &Memory, vm: &str, now_s: i64) -> bool {
    let later = now_s.saturating_add(AGAIN_S);
    failure(memory, vm, now_s).is_some() && failure(memory, vm, later).is_none()
}

/// Why a VM is not offered now: its moves have failed too often, or just now.
fn failure<'a>(memory: &'a Memory, vm: &str, now_s: i64) -> Option<&'a str> {
    let of_it = memory.orders.iter().rev().filter(|order| order.vm == vm);
    let failed = of_it.map_while(|order| match &order.outcome {
        OrderOutcome::Failed { what } => Some((order.at, what)),
        _ => None,
    });
    let failed: Vec<_> = failed.take(TRIES_MAX).collect();
    let (at, what) = failed.first()?;
    let is_fresh = now_s.saturating_sub(at.as_second()) < AGAIN_S;
    (failed.len() == TRIES_MAX || is_fresh).then_some(what)
}

/// Those that have left and run at the other site.
fn saved(wish: &Wish, round: &Round) -> Vec<String> {
    let arrived = |vm: &&String| {
        let mut done = round.memory.orders.iter().rev().filter(|order| order.vm == **vm);
        done.next().is_some_and(|order| matches!(order.outcome, OrderOutcome::Done { .. }))
    };
    wish.guests.iter().filter(arrived).cloned().collect()
}

fn view(wish: &Wish, departure: &Departure, round: &Round, is_under_way: bool) -> EvacuationView {
    let goes = departure.goes.iter().map(ToString::to_string);
    let stays = departure.stays.iter().map(ToString::to_string);
    let said = learned(&round.memory).map(|(ratio, moves)| {
        let percent = ratio * 100.0;
        format!(
            "the last {moves} moves sent {percent:.0} % of what VMs hold, which is counted with"
        )
    });
    let failed = wish.guests.iter().filter_map(|vm| {
        let what = failure(&round.memory, vm, departure.now_s)?;
        Some(format!("leave {vm} where it is for now: its last move failed: {what}"))
    });
    let from = departure.now_s;
    EvacuationView {
        site: wish.site.clone(),
        to: wish.to.clone(),
        deadline: wish.deadline,
        is_under_way,
        lines: goes.chain(stays).chain(failed).chain(said).collect(),
        promised: if is_under_way || wish.is_over { &wish.promised } else { &departure.promised }
            .clone(),
        left_behind: departure.stays.iter().map(|stays| stays.vm.clone()).collect(),
        saved: saved(wish, round),
        could_save: departure.curve.iter().map(|by| (by.at_s - from, by.weight)).collect(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::agent::scheduling::store::Order;

    fn order(vm: &str, at_s: i64, outcome: OrderOutcome) -> Order {
        Order {
            vm: vm.into(),
            from: "paris".into(),
            to: "nice".into(),
            at: Timestamp::from_second(at_s).unwrap(),
            because: String::new(),
            mib: 100,
            whole_mib: 100,
            seconds: 1.0,
            job: Some(1),
            beyond: 0,
            outcome,
        }
    }

    fn failed() -> OrderOutcome {
        OrderOutcome::Failed { what: "no room".into() }
    }

    fn done(wire_mib: u64) -> OrderOutcome {
        OrderOutcome::Done { wire_mib, took_s: 1.0, downtime_ms: 100.0 }
    }

    #[test]
    fn a_move_that_failed_is_tried_again_a_few_times() {
        let mut memory = Memory::default();
        let asked = |memory: &Memory, now_s| {
            (failure(memory, "db1", now_s).is_some(), is_put_off(memory, "db1", now_s))
        };
        assert_eq!(asked(&memory, 1000), (false, false));
        memory.note_order(order("db1", 1000, failed()));
        memory.note_order(order("web", 1000, done(1)));
        assert_eq!(asked(&memory, 1001), (true, true));
        assert_eq!(asked(&memory, 1000 + AGAIN_S), (false, false));
        memory.note_order(order("db1", 1100, failed()));
        memory.note_order(order("db1", 1200, failed()));
        assert_eq!(failure(&memory, "db1", 9000), Some("no room"));
        assert!(!is_put_off(&memory, "db1", 1201), "it is given up");
        memory.note_order(order("db1", 1300, done(1)));
        assert_eq!(asked(&memory, 1300), (false, false));
    }

    #[test]
    fn predictions_follow_what_moves_sent() {
        let mut memory = Memory::default();
        for sent in [20, 30] {
            memory.note_order(order("db1", 1000, done(sent)));
        }
        assert_eq!(learned(&memory), None, "two moves say nothing");
        memory.note_order(order("db1", 1000, failed()));
        memory.note_order(order("db1", 1000, done(40)));
        assert_eq!(learned(&memory), Some((0.3, 3)));
    }
}
