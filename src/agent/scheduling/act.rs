//! The one door through which a plan becomes moves.
//!
//! Invariant: nothing in here chooses. A move comes from a plan, is looked at again in the moment before
//! it is ordered, and is refused when anything that it rests on has changed. Without `scheduler.act` only
//! what an operator asked for by name goes through: hosts in maintenance, and an evacuation.

use jiff::Timestamp;
use longhaul_scheduler::decision::{Decision, Why};

use super::picture::{migration_mib_s, move_mib};
use super::store::{Order, PastMove};
use super::{Round, Scheduler};
use crate::agent::answer::Desk;
use crate::control::{FailureKind, MoveRequest, OrderOutcome, Reply, Request};

/// A move that is to be made.
pub(super) struct Intent {
    pub(super) vm: String,
    pub(super) from: String,
    pub(super) to: String,
    pub(super) mib: u64,
    pub(super) because: String,
    /// Seconds after which it is of no use any more.
    pub(super) deadline_s: Option<u64>,
}

impl Scheduler {
    /// Orders what the plan says and the operator allows.
    pub(super) async fn act(&self, desk: &Desk, round: &mut Round, may_balance: bool) {
        let may_balance = may_balance && self.rules().acts;
        let Some(plan) = &round.plan else { return };
        let wanted = plan.moves().filter(|one| match one.because {
            Why::Maintenance => true,
            Why::Hot { .. } | Why::Emptied { .. } => may_balance,
        });
        let intents: Vec<Intent> = wanted
            .map(|one| Intent {
                vm: one.vm.clone(),
                from: one.from.clone(),
                to: one.to.clone(),
                mib: one.mib,
                because: Decision::Move(one.clone()).to_string(),
                deadline_s: None,
            })
            .collect();
        for intent in intents {
            self.order(desk, round, intent).await;
        }
    }

    /// Orders one move, if everything is still as it was planned.
    pub(super) async fn order(&self, desk: &Desk, round: &mut Round, intent: Intent) {
        let beyond = match self.door(desk, round, &intent).await {
            Ok(beyond) => beyond,
            Err(why) => {
                tracing::info!(
                    vm = intent.vm,
                    to = intent.to,
                    why,
                    "a planned move is not made now"
                );
                return;
            }
        };
        let Some(target) = self.proven(desk, &intent.to) else { return };
        let Intent { vm, from, to, mib, because, deadline_s } = intent;
        let wish = MoveRequest {
            vm: vm.clone(),
            to: target,
            downtime_limit_ms: None,
            deadline_s,
            rate: None,
            background: false,
            detach: true,
            windows: None,
            best_time: false,
        };
        tracing::info!(vm, from, to, because, "ordering a move");
        let at = Timestamp::now();
        let answer = self.tell(desk, &from, Request::Migrate(wish)).await;
        let (job, outcome) = match answer {
            Ok(Reply::Started(job)) => (Some(job.id), OrderOutcome::UnderWay),
            Ok(_) => (None, OrderOutcome::Lost),
            Err(failure) if failure.kind == FailureKind::Refused => {
                tracing::warn!(vm, from, to, what = failure.what, "a move was refused");
                (None, OrderOutcome::Failed { what: failure.what })
            }
            // It may have been heard all the same: what the host reports tells.
            Err(failure) => {
                tracing::warn!(vm, from, to, what = failure.what, "an order was not answered");
                (None, OrderOutcome::UnderWay)
            }
        };
        if outcome == OrderOutcome::UnderWay {
            let (vm, from, to) = (vm.clone(), from.clone(), to.clone());
            round.memory.note_move(PastMove { vm, from, to, at_s: at.as_second() });
        }
        let seconds = mib as f64 / migration_mib_s(&round.heard, self.rules());
        let whole_mib = whole_mib(round, &vm, mib);
        let order =
            Order { vm, from, to, at, because, mib, whole_mib, seconds, job, beyond, outcome };
        round.memory.note_order(order);
        self.save(&round.memory);
    }

    /// The highest number of a job at the host that the VM leaves, or why the move is not made now.
    async fn door(&self, desk: &Desk, round: &Round, intent: &Intent) -> Result<u64, String> {
        let Intent { vm, from, to, .. } = intent;
        for host in [from, to] {
            if let Some(why) = round.trouble.get(host) {
                return Err(format!("{host} could not be asked: {why}"));
            }
        }
        let under_way = round.memory.orders.iter().filter(|order| order.is_under_way());
        for order in under_way {
            // One after the other at each host: what the first one changes is seen before the second.
            if order.touches(from) || order.touches(to) {
                return Err(format!("{} moves from {} to {}", order.vm, order.from, order.to));
            }
        }
        if round.memory.maintenance.contains(to) {
            return Err(format!("{to} is in maintenance"));
        }
        let report = self.report(desk, from).await?;
        if !report.vms.iter().any(|here| here.name == *vm && here.runs) {
            return Err(format!("{vm} does not run at {from} any more"));
        }
        if let Some(job) = report.jobs.first() {
            return Err(format!("{from} has a job: {} of {}", job.kind.noun(), job.vm));
        }
        Ok(report.recent.iter().map(|job| job.id).max().unwrap_or(0))
    }

    /// The fingerprint of a host, as this agent trusts it: other hosts have other names for it.
    fn proven(&self, desk: &Desk, host: &str) -> Option<String> {
        if host == self.config.name {
            return Some(desk.own.to_string());
        }
        let peer = self.phone.peers.get(host);
        peer.map(|peer| peer.fingerprint.to_string())
            .inspect_err(|problem| tracing::warn!(host, what = problem.what, "no such peer"))
            .ok()
    }
}

/// What the VM holds, which later moves are predicted by.
fn whole_mib(round: &Round, vm: &str, otherwise: u64) -> u64 {
    let all = round.heard.values().flat_map(|heard| &heard.load.vms);
    all.filter(|one| one.name == vm).map(move_mib).next().unwrap_or(otherwise)
}
