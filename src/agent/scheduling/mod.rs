//! The planner's agent: it asks hosts for their load, has plans made of it, and acts on them.
//!
//! ```text
//! hosts --reports--> look --picture--> longhaul_scheduler::plan --> act --orders--> hosts
//!                     |                        |
//!                   memory (Store)        plans.jsonl (each plan with all that it was made of)
//! ```
//!
//! Invariants: looking changes nothing anywhere; only [`act`] gives orders, and it looks again before
//! each. A host that cannot be heard keeps its last report, which grows old and freezes it. An order is a
//! job at the host that the VM leaves, admitted by that host's own rules: two planners cannot move one
//! VM at a time, and what is under way does not end with the planner.

mod act;
mod evacuation;
mod look;
mod picture;
mod record;
mod store;
mod view;

pub(super) use evacuation::{DIRTY_MIB_S, PAUSE_S};
pub(super) use view::Glance;

use std::collections::BTreeMap;
use std::io;
use std::sync::Arc;
use std::time::Duration;

use jiff::Timestamp;
use longhaul_scheduler::decision::Plan;
use longhaul_scheduler::evacuate::departure::Departure;
use longhaul_scheduler::forecast::Forecast;
use tokio::sync::{Mutex, Notify};
use tokio::time::Instant;

use super::answer::Desk;
use super::caps::Caps;
use super::dial::Phone;
use crate::config::{Config, SchedulerConfig};
use crate::control::{DrainRequest, EvacuateRequest, Failure, PlanView};
use picture::Heard;
use record::Records;
use store::{FileStore, Memory, Store};

/// The planner's memory, in the state folder.
pub(super) const FILE: &str = "scheduler.json";
/// Each plan that moves something, with all that it was made of.
const PLANS_FILE: &str = "plans.jsonl";
/// How often orders under way are looked after.
const FOLLOW_PERIOD: Duration = Duration::from_secs(5);
/// A command is shown what was seen within this time.
const FRESH: Duration = Duration::from_secs(2);

/// Plans for the hosts that the operator named.
pub(super) struct Scheduler {
    config: Arc<Config>,
    phone: Phone,
    caps: Arc<Caps>,
    store: Box<dyn Store>,
    records: Records,
    round: Mutex<Round>,
    /// Somebody wants a look now.
    wake: Notify,
    /// What the last turn has shown.
    glance: std::sync::Mutex<Option<Arc<Glance>>>,
}

/// What was seen, and what came of it.
#[derive(Default)]
struct Round {
    memory: Memory,
    heard: BTreeMap<String, Heard>,
    /// Why a host could not be asked the last time.
    trouble: BTreeMap<String, String>,
    plan: Option<Plan>,
    forecasts: BTreeMap<String, Forecast>,
    /// What is left of the evacuation under way.
    departure: Option<Departure>,
    /// Why there is no plan.
    without: Option<String>,
    looked: Option<Instant>,
}

impl Scheduler {
    /// The planner of this agent, if it is to plan for anybody, with what it remembers.
    ///
    /// # Errors
    /// Its memory cannot be read. One that makes no sense is set aside: hosts are seen anew.
    pub(super) fn open(
        config: &Arc<Config>,
        phone: Phone,
        caps: Arc<Caps>,
    ) -> io::Result<Option<Arc<Self>>> {
        if config.scheduler.hosts.is_empty() {
            return Ok(None);
        }
        let file = config.state_dir.join(FILE);
        let store = Box::new(FileStore(file.clone()));
        let memory = match store.load()?.map(|document| serde_json::from_slice(&document)) {
            None => Memory::default(),
            Some(Ok(memory)) => memory,
            Some(Err(error)) => {
                let aside = file.with_extension("json.damaged");
                tracing::error!(%error, aside = %aside.display(), "the planner's memory is damaged");
                std::fs::rename(&file, &aside)?;
                Memory::default()
            }
        };
        Ok(Some(Arc::new(Self {
            config: Arc::clone(config),
            phone,
            caps,
            store,
            records: Records::new(config.state_dir.join(PLANS_FILE)),
            round: Mutex::new(Round { memory, ..Round::default() }),
            wake: Notify::new(),
            glance: std::sync::Mutex::default(),
        })))
    }

    /// Looks, plans and acts until it is dropped.
    pub(super) async fn run(&self, desk: &Desk) {
        let interval = self.rules().interval;
        tracing::info!(hosts = ?self.rules().hosts, acts = self.rules().acts, "plans for others");
        let mut next = Instant::now() + interval;
        loop {
            let is_busy = {
                let round = self.round.lock().await;
                let memory = &round.memory;
                memory.evacuation.as_ref().is_some_and(|wish| !wish.is_over)
                    || !memory.maintenance.is_empty()
                    || memory.orders.iter().any(store::Order::is_under_way)
            };
            let soon = Instant::now() + FOLLOW_PERIOD.min(interval);
            let until = if is_busy { next.min(soon) } else { next };
            tokio::select! {
                () = tokio::time::sleep_until(until) => {}
                () = self.wake.notified() => {}
            }
            let is_due = Instant::now() >= next;
            if is_due {
                next = Instant::now() + interval;
            }
            self.turn(desk, is_due).await;
        }
    }

    /// One look, one plan, and what follows from it. `is_due`: it is time for a sample, and for
    /// balance.
    async fn turn(&self, desk: &Desk, is_due: bool) {
        let reports = self.ask_all(desk).await;
        let mut round = self.round.lock().await;
        let now = Timestamp::now();
        round.hear(reports, now.as_second());
        if is_due {
            round.sample(now.as_second());
        }
        round.settle(now);
        let began = Instant::now();
        let picture = round.think(self.rules(), now.as_second());
        let think_s = began.elapsed().as_secs_f64();
        if let (Some(picture), Some(plan)) = (picture, &round.plan) {
            self.records.keep(&picture, &picture::policy(self.rules()), plan);
        }
        self.act(desk, &mut round, is_due).await;
        self.evacuate_on(desk, &mut round).await;
        round.memory.forget(now.as_second());
        self.save(&round.memory);
        self.take_glance(&round, think_s);
    }

    /// What is seen and planned, not older than [`FRESH`].
    pub(super) async fn view(&self, desk: &Desk) -> Result<PlanView, Failure> {
        let mut round = self.fresh(desk).await;
        let _ = round.think(self.rules(), Timestamp::now().as_second());
        Ok(self.shown(&round))
    }

    /// Empties a host, or shows what that would move.
    pub(super) async fn drain(
        &self,
        desk: &Desk,
        wish: &DrainRequest,
    ) -> Result<PlanView, Failure> {
        let DrainRequest { host, go, undo } = wish;
        if *host != self.config.name && !self.rules().hosts.contains(host) {
            let what = format!("{host} is no host that this agent plans for");
            return Err(Failure::refused(what, "`longhaul plan` shows them"));
        }
        let mut round = self.fresh(desk).await;
        let before = round.memory.clone();
        match undo {
            true => round.memory.maintenance.remove(host),
            false => round.memory.maintenance.insert(host.clone()),
        };
        let _ = round.think(self.rules(), Timestamp::now().as_second());
        let shown = self.shown(&round);
        if *go || *undo {
            tracing::info!(host, undo, "maintenance");
            self.save(&round.memory);
            self.wake.notify_one();
        } else {
            round.memory = before;
            let _ = round.think(self.rules(), Timestamp::now().as_second());
        }
        Ok(shown)
    }

    /// Empties a site before its deadline, or shows what could be saved.
    pub(super) async fn evacuate(
        &self,
        desk: &Desk,
        wish: &EvacuateRequest,
    ) -> Result<PlanView, Failure> {
        let mut round = self.fresh(desk).await;
        let view = self.evacuation(&mut round, wish)?;
        if wish.go || wish.stop {
            self.save(&round.memory);
            self.wake.notify_one();
        }
        Ok(PlanView { evacuation: view, ..self.shown(&round) })
    }

    /// The round, with what hosts report now.
    async fn fresh(&self, desk: &Desk) -> tokio::sync::MutexGuard<'_, Round> {
        let round = self.round.lock().await;
        if round.looked.is_some_and(|at| at.elapsed() < FRESH) {
            return round;
        }
        drop(round);
        let reports = self.ask_all(desk).await;
        let mut round = self.round.lock().await;
        let now = Timestamp::now();
        round.hear(reports, now.as_second());
        round.settle(now);
        round
    }

    fn rules(&self) -> &SchedulerConfig {
        &self.config.scheduler
    }

    fn save(&self, memory: &Memory) {
        let saved = serde_json::to_vec(memory).map_err(io::Error::other);
        if let Err(error) = saved.and_then(|document| self.store.save(&document)) {
            tracing::error!(%error, "the planner's memory could not be saved");
        }
    }
}
