//! Jobs: seeds, migrations and images that this host sends, and images that it asks for.
//!
//! Invariant: a job belongs to the agent, not to whoever asked for it. Each is one task; it ends by
//! itself, by its [`CancelToken`], or with the agent, and in every case leaves exactly one record.
//! How a VM is moved is a [`Mover`]'s business.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use async_trait::async_trait;
use longhaul_transport::Session;
use tokio::sync::{mpsc, watch};

use super::admission::{Occupied, Wish, admit};
use super::cancel::{CancelReason, CancelToken};
use super::history::History;
use super::peers::Peer;
use super::tally::Tally;
use crate::calendar::RateCalendar;
use crate::control::{
    Event, Failure, FailureKind, FetchRequest, InDoubt, JobKind, JobOutcome, JobRecord, JobStand,
    JobSummary, VerifySummary,
};
use crate::hypervisor::VmSpec;
use crate::migration::handover::{Choice, Conflict};
use crate::migration::job::ImageJob;
use crate::migration::{Completed, Phase, Progress};

/// One job, as it was admitted.
#[derive(Debug, Clone)]
pub struct Job {
    /// Its number, unique at this agent.
    pub id: u64,
    /// What it does.
    pub kind: JobKind,
    /// The VM.
    pub vm: String,
    /// Where to.
    pub peer: Peer,
    /// How.
    pub options: MoveOptions,
}

/// What was asked of a job, with the agent's own limits filled in.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct MoveOptions {
    /// Downtime that it may take.
    pub downtime_limit_ms: u64,
    /// Seconds from its start after which it gives up. The agent cancels it then; a mover may look
    /// at it to decide earlier.
    pub deadline_s: Option<u64>,
    /// Cap for this job, below the agent's own.
    pub rate: Option<RateCalendar>,
    /// It takes only what others leave of the link.
    pub background: bool,
    /// What a push sends where.
    pub image: Option<ImageJob>,
    /// What a pull asks for.
    pub fetch: Option<FetchRequest>,
}

/// Moves VMs. The agent decides who may be moved when, and the mover how.
///
/// A failure of kind `Failed` or `Cancelled` promises that the guest runs on at the source (or is
/// paused, if its owner had paused it); anything else is `InDoubt`.
#[async_trait]
pub trait Mover: Send + Sync {
    /// Sends a VM's disks ahead of time.
    async fn seed(
        &self,
        job: Job,
        progress: watch::Sender<Progress>,
        cancel: CancelToken,
    ) -> Result<Completed, Failure>;

    /// Moves a VM. After the hand-over `cancel` no longer applies.
    async fn migrate(
        &self,
        job: Job,
        progress: watch::Sender<Progress>,
        cancel: CancelToken,
    ) -> Result<Completed, Failure>;

    /// Sends an image without a VM: [`MoveOptions::image`].
    async fn push(
        &self,
        job: Job,
        progress: watch::Sender<Progress>,
        cancel: CancelToken,
    ) -> Result<Completed, Failure>;

    /// Has a peer send an image: [`MoveOptions::fetch`].
    async fn pull(
        &self,
        job: Job,
        progress: watch::Sender<Progress>,
        cancel: CancelToken,
    ) -> Result<Completed, Failure>;

    /// Compares an image of this host with its record. `events` hears how far that is.
    async fn verify(
        &self,
        image: &Path,
        events: mpsc::Sender<Event>,
    ) -> Result<VerifySummary, Failure>;

    /// Serves a session that `peer` opened, until it ends or `cancel` wishes it.
    async fn serve(&self, session: Session, peer: Peer, cancel: CancelToken);

    /// Asks `peer` why it cannot take this VM; empty if it can.
    async fn obstacles_at(&self, spec: &VmSpec, peer: &Peer) -> Result<Vec<String>, Failure>;

    /// Hand-overs that are not settled.
    async fn in_doubt(&self) -> Vec<InDoubt>;

    /// How often this conflict was found in the life of this agent.
    fn conflicts(&self, conflict: Conflict) -> u64;

    /// Decides one as the operator says, where neither side knows better; what came of it.
    async fn resolve(&self, vm: &str, runs: Choice) -> Result<String, Failure>;

    /// Peers at which disks of VMs lie seeded, by VM.
    fn seeded(&self) -> BTreeMap<String, String>;

    /// Forgets that a VM's disks lie at a peer and stops tracking what is written to them; false if
    /// there is no such seed. What lies at the peer stays there.
    async fn forget_seed(&self, vm: &str) -> Result<bool, Failure>;
}

/// All jobs of this agent.
pub(crate) struct Jobs {
    mover: Arc<dyn Mover>,
    table: Mutex<Table>,
    /// Number of running jobs.
    count: watch::Sender<usize>,
}

struct Table {
    stopping: bool,
    next_id: u64,
    running: BTreeMap<u64, Running>,
    history: History,
    tallies: [Tally; 2],
}

struct Running {
    follow: Follow,
    cancel: CancelToken,
}

/// A view of a job that outlives it.
#[derive(Debug, Clone)]
pub(crate) struct Follow {
    id: u64,
    kind: JobKind,
    vm: String,
    peer: String,
    started: jiff::Timestamp,
    pub(crate) progress: watch::Receiver<Progress>,
    pub(crate) ended: watch::Receiver<Option<JobOutcome>>,
}

impl Follow {
    pub(crate) fn summary(&self) -> JobSummary {
        JobSummary {
            id: self.id,
            kind: self.kind,
            vm: self.vm.clone(),
            peer: self.peer.clone(),
            started: self.started,
            progress: self.progress.borrow().clone(),
            limits: None,
        }
    }

    /// Returns once the job has ended and its record is written.
    pub(crate) async fn outcome(&mut self) -> JobOutcome {
        match self.ended.wait_for(Option::is_some).await.map(|outcome| outcome.clone()) {
            Ok(Some(outcome)) => outcome,
            // The task that ends every job was itself torn down: the runtime is going away.
            _ => JobOutcome::Failed(stopped_short(&self.vm)),
        }
    }
}

impl Jobs {
    pub(crate) fn new(mover: Arc<dyn Mover>, history: History) -> Self {
        let next_id = history.last_id() + 1;
        let tallies = [JobKind::Seed, JobKind::Migrate].map(Tally::new);
        let table = Table { stopping: false, next_id, running: BTreeMap::new(), history, tallies };
        Self { mover, table: Mutex::new(table), count: watch::Sender::new(0) }
    }

    /// Starts a job if it may start now.
    pub(crate) fn start(
        self: &Arc<Self>,
        wish: &Wish,
        peer: Peer,
        options: MoveOptions,
    ) -> Result<Follow, Failure> {
        let mut table = self.table();
        let occupied: Vec<Occupied> = table.running.values().map(Running::occupied).collect();
        admit(table.stopping, &occupied, wish)?;
        let id = table.next_id;
        table.next_id += 1;
        let job = Job { id, kind: wish.kind, vm: wish.vm.clone(), peer, options };
        let (progress, progress_seen) = watch::channel(before_the_first_byte(&job));
        let (ended, ended_seen) = watch::channel(None);
        let follow = Follow {
            id,
            kind: job.kind,
            vm: job.vm.clone(),
            peer: job.peer.name.clone(),
            started: jiff::Timestamp::now(),
            progress: progress_seen,
            ended: ended_seen,
        };
        let cancel = CancelToken::new();
        table.running.insert(id, Running { follow: follow.clone(), cancel: cancel.clone() });
        self.count.send_replace(table.running.len());
        tracing::info!(job = id, kind = %job.kind, vm = %job.vm, peer = %job.peer.name, "job starts");
        let jobs = Arc::clone(self);
        let record = follow.clone();
        tokio::spawn(async move {
            let outcome = carry_out(Arc::clone(&jobs.mover), job, progress, cancel).await;
            jobs.end(record, outcome, &ended);
        });
        Ok(follow)
    }

    /// The job that moves `vm`.
    pub(crate) fn follow(&self, vm: &str) -> Result<Follow, Failure> {
        let table = self.table();
        let job = table.running.values().find(|job| job.follow.vm == vm);
        job.map(|job| job.follow.clone()).ok_or_else(|| no_job(vm))
    }

    /// Wishes that the job that moves `vm` ends.
    pub(crate) fn cancel(&self, vm: &str) -> Result<Follow, Failure> {
        let table = self.table();
        let job =
            table.running.values().find(|job| job.follow.vm == vm).ok_or_else(|| no_job(vm))?;
        job.cancel.cancel(CancelReason::Asked);
        Ok(job.follow.clone())
    }

    /// Admits no more jobs, cancels all and waits up to `wait` for them. Returns how many are left.
    pub(crate) async fn stop(&self, wait: Duration) -> usize {
        {
            let mut table = self.table();
            table.stopping = true;
            table.running.values().for_each(|job| job.cancel.cancel(CancelReason::Stopping));
        }
        let mut count = self.count.subscribe();
        let _ = tokio::time::timeout(wait, count.wait_for(|count| *count == 0)).await;
        *self.count.borrow()
    }

    /// What runs.
    pub(crate) fn summaries(&self) -> Vec<JobSummary> {
        self.table().running.values().map(|job| job.follow.summary()).collect()
    }

    /// What ended lately, newest first.
    pub(crate) fn recent(&self, count: usize) -> Vec<JobRecord> {
        self.table().history.newest(count)
    }

    /// The job of that number, if it runs or is remembered.
    pub(crate) fn stand(&self, id: u64) -> Option<JobStand> {
        let table = self.table();
        match table.running.get(&id) {
            Some(job) => Some(JobStand::Runs(job.follow.summary())),
            None => table.history.find(id).cloned().map(JobStand::Ended),
        }
    }

    /// The newest migration that completed, if the history still has one.
    pub(crate) fn last_migration(&self) -> Option<JobRecord> {
        self.table().history.last_migration().cloned()
    }

    /// What those that ended came to, by kind.
    pub(crate) fn tallies(&self) -> [Tally; 2] {
        self.table().tallies.clone()
    }

    fn end(&self, job: Follow, outcome: JobOutcome, ended: &watch::Sender<Option<JobOutcome>>) {
        match &outcome {
            JobOutcome::Completed(completed) => tracing::info!(
                job = job.id, kind = %job.kind, vm = %job.vm, peer = %job.peer,
                total_ms = completed.total_ms, payload_bytes = completed.payload_bytes,
                wire_bytes = completed.wire_bytes, "job done"
            ),
            JobOutcome::Failed(failure) => tracing::warn!(
                job = job.id, kind = %job.kind, vm = %job.vm, peer = %job.peer,
                what = failure.what, state = failure.state, "job failed"
            ),
        }
        let mut table = self.table();
        table.tallies.iter_mut().filter(|of| of.kind == job.kind).for_each(|of| of.add(&outcome));
        table.history.add(JobRecord {
            id: job.id,
            kind: job.kind,
            vm: job.vm,
            peer: job.peer,
            started: job.started,
            ended: jiff::Timestamp::now(),
            outcome: outcome.clone(),
        });
        table.running.remove(&job.id);
        // Only now: whoever sees the end may start the next job for this VM at once.
        ended.send_replace(Some(outcome));
        self.count.send_replace(table.running.len());
    }

    fn table(&self) -> MutexGuard<'_, Table> {
        self.table.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Running {
    fn occupied(&self) -> Occupied {
        let Follow { kind, vm, peer, .. } = &self.follow;
        Occupied { kind: *kind, vm: vm.clone(), peer: peer.clone() }
    }
}

/// Runs the mover to its end, whatever that is.
async fn carry_out(
    mover: Arc<dyn Mover>,
    job: Job,
    progress: watch::Sender<Progress>,
    cancel: CancelToken,
) -> JobOutcome {
    let Job { kind, vm, options, .. } = job.clone();
    let deadline = options.deadline_s.map(Duration::from_secs);
    let mut work = tokio::spawn({
        let cancel = cancel.clone();
        // A task of its own: a defect in it must not cost the record.
        async move {
            match job.kind {
                JobKind::Seed => mover.seed(job, progress, cancel).await,
                JobKind::Migrate => mover.migrate(job, progress, cancel).await,
                JobKind::Push => mover.push(job, progress, cancel).await,
                JobKind::Pull => mover.pull(job, progress, cancel).await,
            }
        }
    });
    let late = async {
        match deadline {
            Some(deadline) => tokio::time::sleep(deadline).await,
            None => std::future::pending().await,
        }
    };
    let result = tokio::select! {
        result = &mut work => result,
        () = late => {
            cancel.cancel(CancelReason::Deadline);
            work.await
        }
    };
    match result {
        Ok(Ok(completed)) => JobOutcome::Completed(Box::new(completed)),
        Ok(Err(failure)) => JobOutcome::Failed(explained(failure, cancel.reason(), kind, &vm)),
        Err(error) => {
            tracing::error!(vm, %error, "a job ended by a defect");
            JobOutcome::Failed(stopped_short(&vm))
        }
    }
}

/// Says why a cancelled job was cancelled: the mover only knows that it was.
fn explained(failure: Failure, why: Option<CancelReason>, kind: JobKind, vm: &str) -> Failure {
    if failure.kind != FailureKind::Cancelled {
        return failure;
    }
    let noun = kind.noun();
    let again = "start it again when you like: what has arrived is not sent twice".to_owned();
    match why {
        Some(CancelReason::Deadline) => Failure {
            kind: FailureKind::Failed,
            what: format!("the {noun} of {vm} reached its deadline"),
            next: again,
            ..failure
        },
        Some(CancelReason::Stopping) => Failure {
            what: format!("the {noun} of {vm} was stopped because the agent stops"),
            next: again,
            ..failure
        },
        Some(CancelReason::Asked) | None => {
            Failure { what: format!("the {noun} of {vm} was cancelled"), next: again, ..failure }
        }
    }
}

fn no_job(vm: &str) -> Failure {
    Failure::refused(
        format!("no job moves {vm}"),
        "`longhaul status` shows what runs and what ended",
    )
}

/// The one failure that promises nothing: which side may run the VM is in the journals.
fn stopped_short(vm: &str) -> Failure {
    Failure {
        kind: FailureKind::InDoubt,
        what: format!("the job for {vm} ended by a defect of the agent"),
        state: "what the VM's journal says holds".to_owned(),
        next: "restart the agent: it reads the journal and says where the VM may run".to_owned(),
    }
}

fn before_the_first_byte(job: &Job) -> Progress {
    Progress {
        vm: job.vm.clone(),
        peer: job.peer.name.clone(),
        phase: Phase::Seed,
        round: 1,
        payload_bytes: 0,
        payload_bytes_total: 0,
        wire_bytes: 0,
        rate_bits_per_s: 0,
        elapsed_ms: 0,
        forecast_left_ms: None,
        note: None,
        link: None,
    }
}

#[cfg(test)]
#[path = "jobs_tests.rs"]
mod tests;
