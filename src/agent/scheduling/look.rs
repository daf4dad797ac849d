//! One look at all hosts: their reports, the samples taken of them, and how orders went.
//!
//! Invariant: no host waits for another, and none for longer than [`REPORT_WAIT`]; what a host says of
//! itself is believed only in numbers that can be.

use std::collections::BTreeMap;
use std::time::Duration;

use futures_util::future::join_all;
use jiff::Timestamp;
use longhaul_scheduler::policy::Policy;
use tokio::time::Instant;

use super::picture::{Heard, Picture, picture, policy};
use super::{Round, Scheduler};
use crate::agent::answer::Desk;
use crate::agent::questions;
use crate::config::SchedulerConfig;
use crate::control::{
    Failure, HostLoad, JobOutcome, JobRecord, MoveRequest, OrderOutcome, Reply, Request,
};

/// How long a host may take to report.
const REPORT_WAIT: Duration = Duration::from_secs(10);
/// An order whose job is not heard of any more is given up after this time, in seconds.
const LOST_S: i64 = 600;

impl Scheduler {
    /// What each host reports, or why it does not.
    pub(super) async fn ask_all(&self, desk: &Desk) -> BTreeMap<String, Result<HostLoad, String>> {
        let own = &self.config.name;
        let hosts = self.rules().hosts.iter().chain([own]);
        let asked = hosts.map(|host| async move {
            let report = tokio::time::timeout(REPORT_WAIT, self.report(desk, host)).await;
            let late = || Err(format!("it has not answered within {} s", REPORT_WAIT.as_secs()));
            (host.clone(), report.unwrap_or_else(|_| late()))
        });
        join_all(asked).await.into_iter().collect()
    }

    /// What one host reports now.
    pub(super) async fn report(&self, desk: &Desk, host: &str) -> Result<HostLoad, String> {
        let over_s = self.rules().interval.as_secs();
        match self.tell(desk, host, Request::Load { over_s }).await {
            Ok(Reply::Load(load)) if is_possible(&load) => Ok(*load),
            Ok(Reply::Load(_)) => Err("its figures cannot be true".to_owned()),
            Ok(_) => Err("it answers something else than was asked".to_owned()),
            Err(failure) => Err(failure.what),
        }
    }

    /// Tells one host, this one included, what to do.
    pub(super) async fn tell(
        &self,
        desk: &Desk,
        host: &str,
        request: Request,
    ) -> Result<Reply, Failure> {
        if host != self.config.name {
            let dialer = self.phone.dialer(host, self.caps.agent_alone());
            return questions::ask(host, &dialer, &request).await;
        }
        match request {
            Request::Load { over_s } => {
                Ok(Reply::Load(Box::new(desk.load(Duration::from_secs(over_s)))))
            }
            Request::Migrate(wish) => {
                desk.migrate_detached(MoveRequest { detach: true, ..wish }).await
            }
            _ => Err(Failure::refused("a planner does not ask for that", "")),
        }
    }
}

/// Whether the figures can be at all.
fn is_possible(load: &HostLoad) -> bool {
    let is_amount = |value: f64| value.is_finite() && value >= 0.0;
    load.cores.is_finite()
        && load.cores > 0.0
        && is_amount(load.cpu)
        && load.vms.iter().all(|vm| vm.cpu.is_none_or(is_amount) && is_amount(vm.written_bytes_s))
        && load.links.iter().all(|link| is_amount(link.bytes_s) && is_amount(link.rtt_ms))
}

impl Round {
    /// Takes reports in. A host that gave none keeps its last one.
    pub(super) fn hear(&mut self, reports: BTreeMap<String, Result<HostLoad, String>>, now_s: i64) {
        self.trouble.clear();
        for (host, report) in reports {
            match report {
                Ok(load) => {
                    // One that has not sampled yet is heard, and is as old as can be.
                    let age_s = load
                        .age_ms
                        .map_or(i64::MAX, |ms| (ms / 1000).try_into().unwrap_or(i64::MAX));
                    let sampled_at_s = now_s.saturating_sub(age_s);
                    self.heard.insert(host, Heard { load, sampled_at_s });
                }
                Err(why) => {
                    self.trouble.insert(host, why);
                }
            }
        }
        self.looked = Some(Instant::now());
    }

    /// Takes a sample of every host that was heard just now.
    pub(super) fn sample(&mut self, now_s: i64) {
        for (host, heard) in &self.heard {
            if self.trouble.contains_key(host) || heard.load.age_ms.is_none() {
                continue;
            }
            self.memory.observe_host(host, heard.load.cpu);
            for vm in heard.load.vms.iter().filter(|vm| vm.runs) {
                self.memory.observe_vm(&vm.name, host, now_s, vm.cpu);
            }
        }
    }

    /// Looks how the orders under way have gone.
    pub(super) fn settle(&mut self, now: Timestamp) {
        for order in self.memory.orders.iter_mut().filter(|order| order.is_under_way()) {
            let Some(source) = self.heard.get(&order.from) else { continue };
            if self.trouble.contains_key(&order.from) {
                continue;
            }
            let ended =
                source.load.recent.iter().find(|job| order.is_job(job.id, job.kind, &job.vm));
            let running =
                source.load.jobs.iter().find(|job| order.is_job(job.id, job.kind, &job.vm));
            if let Some(ended) = ended {
                order.outcome = outcome(ended);
                let (vm, from, to) = (&order.vm, &order.from, &order.to);
                tracing::info!(vm, from, to, outcome = ?order.outcome, "a move has ended");
            } else if let Some(running) = running {
                order.job = Some(running.id);
            } else if now.as_second().saturating_sub(order.at.as_second()) > LOST_S {
                order.outcome = OrderOutcome::Lost;
            }
        }
    }

    /// Has a plan made of what is known; gives what it was made of.
    pub(super) fn think(&mut self, config: &SchedulerConfig, now_s: i64) -> Option<Picture> {
        let policy: Policy = policy(config);
        let picture = picture(&self.heard, &self.memory, config, now_s);
        // Ties are broken anew in each plan, and the plan says by what.
        let seed = now_s.unsigned_abs();
        let planned =
            longhaul_scheduler::plan(&picture.state, &picture.forecasts, &policy, now_s, seed);
        let names = picture.state.vms.iter().map(|vm| vm.name.clone());
        self.forecasts = names.zip(picture.forecasts.iter().copied()).collect();
        match planned {
            Ok(plan) => (self.plan, self.without) = (Some(plan), None),
            Err(error) => {
                tracing::warn!(%error, "no plan can be made");
                (self.plan, self.without) = (None, Some(error.to_string()));
            }
        }
        self.plan.is_some().then_some(picture)
    }
}

fn outcome(job: &JobRecord) -> OrderOutcome {
    match &job.outcome {
        JobOutcome::Completed(completed) => OrderOutcome::Done {
            wire_mib: completed.wire_bytes >> 20,
            took_s: completed.total_ms as f64 / 1000.0,
            downtime_ms: completed.downtime.as_ref().map_or(0.0, |downtime| downtime.total_ms),
        },
        JobOutcome::Failed(failure) => OrderOutcome::Failed { what: failure.what.clone() },
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::agent::scheduling::store::Order;
    use crate::control::JobKind;

    fn at(second: i64) -> Timestamp {
        Timestamp::from_second(second).unwrap()
    }

    fn ended(id: u64, kind: JobKind, vm: &str) -> JobRecord {
        JobRecord {
            id,
            kind,
            vm: vm.into(),
            peer: "lyon".into(),
            started: at(0),
            ended: at(0),
            outcome: JobOutcome::Failed(Failure::refused("no", "")),
        }
    }

    /// An order whose answer was lost has been heard or not: the host's own jobs tell.
    #[test]
    fn an_order_without_an_answer_is_found_again() {
        let order = Order {
            vm: "db1".into(),
            from: "paris".into(),
            to: "lyon".into(),
            at: at(0),
            because: String::new(),
            mib: 1,
            whole_mib: 1,
            seconds: 1.0,
            job: None,
            beyond: 7,
            outcome: OrderOutcome::UnderWay,
        };
        let after = |recent: Vec<JobRecord>, now_s: i64| {
            let load = HostLoad {
                name: "paris".into(),
                fingerprint: String::new(),
                age_ms: Some(0),
                cores: 1.0,
                cpu: 0.0,
                memory_mib: 1,
                pressure: None,
                network_bytes_s: (0.0, 0.0),
                cap_bytes_s: None,
                vms: vec![],
                links: vec![],
                jobs: vec![],
                recent,
            };
            let mut round = Round::default();
            round.memory.note_order(order.clone());
            round.hear([("paris".to_owned(), Ok(load))].into(), now_s);
            round.settle(at(now_s));
            round.memory.orders[0].outcome.clone()
        };
        // Its last move, somebody else's, and a seed are not this order.
        let others = || {
            vec![
                ended(7, JobKind::Migrate, "db1"),
                ended(8, JobKind::Migrate, "web"),
                ended(9, JobKind::Seed, "db1"),
            ]
        };
        assert_eq!(after(others(), 60), OrderOutcome::UnderWay);
        assert_eq!(after(others(), LOST_S + 1), OrderOutcome::Lost);
        let with_it = [vec![ended(10, JobKind::Migrate, "db1")], others()].concat();
        assert_eq!(after(with_it, LOST_S + 1), OrderOutcome::Failed { what: "no".into() });
    }
}
