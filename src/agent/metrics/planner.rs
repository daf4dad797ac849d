//! Numbers of an agent that plans for others.
//!
//! Invariant: what an agent that plans for nobody serves is not changed by this; the number of series is
//! bounded by the hosts that its operator named.

use crate::agent::scheduling::Glance;
use crate::control::{Metric, OrderOutcome};

/// All that one turn has shown.
pub(super) fn planner(glance: &Glance) -> Vec<Metric> {
    let Glance { hosts, moves, think_s, orders, evacuation } = glance;
    let mut cpu = Metric::gauge(
        "longhaul_planner_host_cpu_cores",
        "Cores asked for, and cores that there are, as a host last said.",
    );
    let mut heard = Metric::gauge(
        "longhaul_planner_host_heard",
        "1: the host could be asked the last time. 0: it is frozen, or soon will be.",
    );
    let mut sampled = Metric::gauge(
        "longhaul_planner_host_sampled_time_seconds",
        "When the newest sample of a host was taken, in Unix time.",
    );
    let mut maintenance =
        Metric::gauge("longhaul_planner_host_maintenance", "1: the host is to be emptied.");
    for host in hosts {
        let name = ("host", host.name.as_str());
        if let Some((asked, there)) = host.cpu {
            cpu.add(&[name, ("cores", "asked")], asked);
            cpu.add(&[name, ("cores", "there")], there);
        }
        heard.add(&[name], f64::from(u8::from(host.trouble.is_none())));
        if let Some(at) = host.sampled_at_s {
            sampled.add(&[name], at as f64);
        }
        maintenance.add(&[name], f64::from(u8::from(host.is_in_maintenance)));
    }
    let mut remembered = Metric::gauge(
        "longhaul_planner_orders",
        "Moves that were ordered and are remembered, by outcome.",
    );
    for known in OUTCOMES {
        let such = orders.iter().filter(|order| outcome(order) == known).count();
        remembered.add(&[("outcome", known)], such as f64);
    }
    let mut planned = Metric::gauge(
        "longhaul_planner_planned_moves",
        "Moves in the newest plan; nothing if none could be made.",
    );
    if let Some(moves) = moves {
        planned.add(&[], *moves as f64);
    }
    let think = Metric::gauge("longhaul_planner_think_seconds", "What the newest plan has taken.")
        .with(&[], *think_s);
    let mut guests = Metric::gauge(
        "longhaul_evacuation_vms",
        "VMs of the evacuation under way: promised in all, arrived, and those that will not make it.",
    );
    let mut deadline = Metric::gauge(
        "longhaul_evacuation_deadline_time_seconds",
        "When the site of the evacuation under way is gone, in Unix time.",
    );
    if let Some(evacuation) = evacuation {
        for (fate, vms) in [
            ("promised", &evacuation.promised),
            ("saved", &evacuation.saved),
            ("left-behind", &evacuation.left_behind),
        ] {
            guests.add(&[("site", &evacuation.site), ("fate", fate)], vms.len() as f64);
        }
        deadline.add(&[("site", &evacuation.site)], super::unix(evacuation.deadline));
    }
    vec![cpu, heard, sampled, maintenance, remembered, planned, think, guests, deadline]
}

/// All outcomes of orders, as they are named in numbers.
const OUTCOMES: [&str; 4] = ["under-way", "done", "failed", "lost"];

fn outcome(order: &OrderOutcome) -> &'static str {
    match order {
        OrderOutcome::UnderWay => OUTCOMES[0],
        OrderOutcome::Done { .. } => OUTCOMES[1],
        OrderOutcome::Failed { .. } => OUTCOMES[2],
        OrderOutcome::Lost => OUTCOMES[3],
    }
}
