//! Moves VMs: what jobs and sessions ask for, done by `migration`.
//!
//! Invariant: this file joins a job to a `migration::Site` and says in people's words how it ended;
//! what is left from an earlier life of the agent is settled before anything new begins for that VM.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use longhaul_transport::Session;
use tokio::sync::{mpsc, watch};

use super::Parts;
use super::cancel::CancelToken;
use super::caps::{Caps, JobCaps};
use super::dial::{Dialer, Phone};
use super::hooks::{self, Hooks, Moment, Occasion};
use super::indexing::ImageIndex;
use super::jobs::{Job, Mover};
use super::links::Links;
use super::peers::Peer;
use super::{pulling, verifying};
use crate::control::{Event, Failure, FailureKind, InDoubt, VerifySummary, chain};
use crate::hypervisor::VmSpec;
use crate::hypervisor::qemu::host::QemuHost;
use crate::migration::doubts::Doubts;
use crate::migration::handover::{Choice, Conflict};
use crate::migration::job::{self, Dial as _, MoveOptions, Side, Site};
use crate::migration::journal::{Began, History, JournalDir, Role};
use crate::migration::message::{JobId, Purpose};
use crate::migration::seeds::SeedBook;
use crate::migration::{self, Attempts, Coding, Completed, MigrationError, Progress};

/// Downtime that is borne where the limit cannot be reached, as a multiple of the limit.
const DOWNTIME_STRETCH: f64 = 10.0;
/// Pre-copy that has not converged by then does not converge, if the job has no deadline.
const DEADLINE_DEFAULT: Duration = Duration::from_secs(60 * 60);
/// A seed over a link that was cut, and a move whose peer has lost its memory of it, are tried again
/// after this long, and at most so many times.
const CUT_WAIT: Duration = Duration::from_secs(2);
const CUTS_MAX: u32 = 30;
/// Memory for the pages of one migration, as a share of what the operator allows.
const STAGING_SHARE: u64 = 4;

/// Moves the VMs of one host.
pub struct MigrationMover {
    site: Site,
    attempts: Attempts,
    phone: Phone,
    caps: Arc<Caps>,
    links: Arc<Links>,
    index: Arc<ImageIndex>,
    staging_bytes: u64,
}

/// A mover for this host; it first settles what an earlier life of this agent left.
///
/// # Errors
///
/// The journals cannot be read: nothing may be moved then.
pub fn new(parts: Parts) -> std::io::Result<Arc<dyn Mover>> {
    let state_dir = &parts.config.state_dir;
    let site = Site {
        host: Arc::new(QemuHost::new(
            parts.registry.policy().clone(),
            parts.config.image_tools.clone(),
            parts.registry,
        )),
        journals: JournalDir::open(&state_dir.join("journals"))?,
        seeds: SeedBook::open(&state_dir.join("seeds.json")),
        hooks: Arc::new(OperatorHooks(parts.hooks)),
        scratch: state_dir.join("scratch"),
        index: parts.index.places(),
        link_patience: parts.config.limits.link_patience,
        doubts: Doubts::default(),
        turn: Arc::default(),
        answers: parts.questions,
    };
    let mover = MigrationMover {
        site,
        attempts: Attempts::default(),
        phone: parts.phone,
        caps: parts.caps,
        links: parts.links,
        index: parts.index,
        staging_bytes: parts.config.limits.memory.0 / STAGING_SHARE,
    };
    for history in mover.site.journals.unfinished()? {
        mover.recover(&history);
    }
    Ok(Arc::new(mover))
}

impl MigrationMover {
    fn dialer(&self, peer: &str) -> Dialer {
        self.phone.dialer(peer, self.caps.agent_alone())
    }

    /// The caps of a job, which hold until they are dropped, and who dials under them.
    fn begin(&self, job: &Job) -> (JobCaps, Dialer) {
        let caps = self.caps.begin_job(&job.vm, job.options.rate.clone());
        let dialer = self.phone.dialer(&job.peer.name, caps.rate());
        (caps, dialer.in_background(job.options.background))
    }

    /// Settles an attempt that nobody works on, in the background: it may have to wait for a peer.
    fn recover(&self, history: &History) {
        let Some(began) = history.began().cloned() else {
            tracing::error!(attempt = %history.job, "a journal has no beginning; it is left alone");
            return;
        };
        let dial = self.dialer(&began.peer);
        tokio::spawn(migration::recover(self.site.clone(), &self.attempts, history, began, dial));
    }

    /// Settles what an attempt could not carry out or write down, now that it has ended.
    fn recover_left(&self, left: impl Fn(&Began, JobId) -> bool) {
        let unfinished = match self.site.journals.unfinished() {
            Ok(unfinished) => unfinished,
            Err(error) => {
                tracing::error!(%error, "the journals cannot be read");
                return;
            }
        };
        for history in unfinished {
            let is_left = history.began().is_some_and(|began| left(began, history.job));
            if is_left && !self.site.doubts.contains(history.job) {
                self.recover(&history);
            }
        }
    }

    /// One attempt after the other, as long as only the link or the peer's agent fails.
    async fn run(
        &self,
        job: &Job,
        purpose: Purpose,
        progress: &watch::Sender<Progress>,
        cancel: &CancelToken,
    ) -> Result<Completed, Failure> {
        let (_caps, dial) = self.begin(job);
        let limit_ms = job.options.downtime_limit_ms as f64;
        let deadline = job.options.deadline_s.map_or(DEADLINE_DEFAULT, Duration::from_secs);
        let order = job::Job {
            vm: job.vm.clone(),
            peer: job.peer.name.clone(),
            purpose,
            options: MoveOptions {
                downtime_target_ms: limit_ms,
                downtime_max_ms: limit_ms * DOWNTIME_STRETCH,
                deadline_ms: deadline.as_millis() as u64,
                staging_bytes: self.staging_bytes,
            },
        };
        // Nobody waits for a seed: a link that comes back is good enough. And a peer whose agent was
        // started anew is there: the guest runs on here, and what has arrived lies there.
        let is_seed = purpose == Purpose::Seed;
        let worthwhile =
            |error: &MigrationError| error.is_forgotten() || (error.is_cut() && is_seed);
        let coding = Coding::default();
        let attempt = || self.attempt(job, &order, &coding, &dial, progress, cancel);
        let completed = tries(job, progress, cancel, worthwhile, attempt).await?;
        self.index.take_records();
        Ok(completed)
    }

    async fn attempt(
        &self,
        job: &Job,
        order: &job::Job,
        coding: &Coding,
        dial: &Dialer,
        progress: &watch::Sender<Progress>,
        cancel: &CancelToken,
    ) -> Result<Completed, MigrationError> {
        let session = tokio::select! {
            session = dial.dial() => session,
            _ = cancel.cancelled() => return Err(MigrationError::Cancelled),
        };
        let session = session.map_err(|detail| MigrationError::cut(&job.peer.name, detail))?;
        let cancelled = async {
            cancel.cancelled().await;
        };
        let outcome =
            migration::run(&self.site, order, session, coding, dial, progress, cancelled).await;
        // One job moves a VM at a time: what of it has not ended is this one's, or older.
        self.recover_left(|began, _| began.role == Role::Source && began.vm == job.vm);
        outcome
    }
}

impl MigrationMover {
    /// One attempt to push after the other, as long as only the link or the peer's agent fails.
    async fn push_image(
        &self,
        job: &Job,
        progress: &watch::Sender<Progress>,
        cancel: &CancelToken,
    ) -> Result<Completed, Failure> {
        let Some(order) = &job.options.image else {
            return Err(Failure::refused("a push names an image", ""));
        };
        let (_caps, dial) = self.begin(job);
        let coding = Coding::default();
        let attempt = || async {
            let attempt = async {
                let session = dial.dial().await;
                let session =
                    session.map_err(|detail| MigrationError::cut(&job.peer.name, detail))?;
                migration::push(&self.site, order, session, &coding, progress).await
            };
            tokio::select! {
                ended = attempt => ended,
                _ = cancel.cancelled() => Err(MigrationError::Cancelled),
            }
        };
        tries(job, progress, cancel, MigrationError::is_cut, attempt).await
    }
}

/// One attempt after the other, as long as another is `worthwhile`.
async fn tries<A: Future<Output = Result<Completed, MigrationError>>>(
    job: &Job,
    progress: &watch::Sender<Progress>,
    cancel: &CancelToken,
    worthwhile: impl Fn(&MigrationError) -> bool,
    attempt: impl Fn() -> A,
) -> Result<Completed, Failure> {
    let mut cuts = 0;
    loop {
        let error = match attempt().await {
            Ok(completed) => return Ok(completed),
            Err(error) => error,
        };
        if !worthwhile(&error) || cuts == CUTS_MAX {
            return Err(failure(&job.vm, &error));
        }
        cuts += 1;
        tracing::info!(of = job.vm, peer = job.peer.name, %error, cuts, "trying again");
        progress.send_modify(|progress| {
            progress.note = Some(format!("{error}; trying again"));
        });
        tokio::select! {
            () = tokio::time::sleep(CUT_WAIT) => {}
            _ = cancel.cancelled() => return Err(failure(&job.vm, &MigrationError::Cancelled)),
        }
    }
}

#[async_trait]
impl Mover for MigrationMover {
    async fn seed(
        &self,
        job: Job,
        progress: watch::Sender<Progress>,
        cancel: CancelToken,
    ) -> Result<Completed, Failure> {
        self.run(&job, Purpose::Seed, &progress, &cancel).await
    }

    async fn migrate(
        &self,
        job: Job,
        progress: watch::Sender<Progress>,
        cancel: CancelToken,
    ) -> Result<Completed, Failure> {
        self.run(&job, Purpose::Migrate, &progress, &cancel).await
    }

    async fn push(
        &self,
        job: Job,
        progress: watch::Sender<Progress>,
        cancel: CancelToken,
    ) -> Result<Completed, Failure> {
        self.push_image(&job, &progress, &cancel).await
    }

    async fn pull(
        &self,
        job: Job,
        progress: watch::Sender<Progress>,
        cancel: CancelToken,
    ) -> Result<Completed, Failure> {
        let Some(wish) = job.options.fetch.clone() else {
            return Err(Failure::refused("a pull names an image", ""));
        };
        pulling::pull(&job.vm, wish, &self.dialer(&job.peer.name), &progress, &cancel).await
    }

    async fn verify(
        &self,
        image: &Path,
        events: mpsc::Sender<Event>,
    ) -> Result<VerifySummary, Failure> {
        // A watcher who is busy with the last event misses this one.
        let tell = |progress| drop(events.try_send(Event::Indexing(progress)));
        verifying::verify(&*self.site.host, image, tell).await
    }

    async fn serve(&self, session: Session, peer: Peer, cancel: CancelToken) {
        // A target sends answers and acknowledgements: a few percent, and they count.
        session.set_rate(self.caps.agent_alone());
        self.links.count(&peer.name, &session);
        let left =
            |began: &Began, attempt| began.role == Role::Target && !self.attempts.contains(attempt);
        let serving = async {
            let (last, served) =
                migration::serve(&self.site, &self.attempts, &peer.name, session.clone()).await;
            if let Err(error) = served {
                tracing::warn!(peer = peer.name, error = chain(&error), "a session ended badly");
                self.recover_left(left);
            }
            self.index.take_records();
            last.hear_out(&self.site, &peer.name).await;
            self.recover_left(left);
        };
        tokio::select! {
            () = serving => {}
            // What was not accepted is refused when the agent runs again.
            _ = cancel.cancelled() => session.refuse("this agent is stopping"),
        }
    }

    async fn obstacles_at(&self, spec: &VmSpec, peer: &Peer) -> Result<Vec<String>, Failure> {
        let dial = self.dialer(&peer.name);
        let unreachable = |detail: String| {
            let what = format!("{} could not be asked: {detail}", peer.name);
            Failure::failed(what, "nothing was changed", "look at the link and at its agent")
        };
        let session = dial.dial().await.map_err(unreachable)?;
        let disks = match self.site.host.source(&spec.name).await {
            Ok(vm) => vm.disks().await.unwrap_or_default(),
            Err(_) => Vec::new(),
        };
        let asked = migration::obstacles(&peer.name, session, spec, disks).await;
        asked.map_err(|error| unreachable(chain(&error)))
    }

    async fn in_doubt(&self) -> Vec<InDoubt> {
        let doubts = self.site.doubts.list().into_iter();
        doubts
            .map(|doubt| InDoubt {
                vm: doubt.vm,
                peer: doubt.peer,
                since: doubt.since.parse().ok(),
                detail: doubt.detail,
                role: doubt.role,
                attempt: doubt.job.to_string(),
                blocks: doubt.blocks,
            })
            .collect()
    }

    fn seeded(&self) -> BTreeMap<String, String> {
        self.site.seeds.all().into_iter().map(|(vm, seed)| (vm, seed.peer)).collect()
    }

    fn conflicts(&self, conflict: Conflict) -> u64 {
        self.site.doubts.conflicts(conflict)
    }

    async fn resolve(&self, vm: &str, runs: Choice) -> Result<String, Failure> {
        let resolved = self.site.doubts.resolve(vm, runs).await;
        resolved.map_err(|why| Failure::refused(why, "`longhaul status` tells what is known"))
    }

    async fn forget_seed(&self, vm: &str) -> Result<bool, Failure> {
        let Some(seed) = self.site.seeds.get(vm) else { return Ok(false) };
        let failed = |detail: String| {
            let what =
                format!("the seed of {vm} at {} could not be forgotten: {detail}", seed.peer);
            Failure::failed(what, "the VM runs on as it did", "try again")
        };
        self.site.seeds.remove(vm).map_err(|error| failed(error.to_string()))?;
        if let Ok(source) = self.site.host.source(vm).await {
            source.cleanup(false).await.map_err(|error| failed(chain(&error)))?;
        }
        Ok(true)
    }
}

/// How an attempt ended, in the three parts that every error has.
fn failure(vm: &str, error: &MigrationError) -> Failure {
    let what = chain(error);
    let runs_on = format!("{vm} is here as it was before");
    match error {
        MigrationError::Refused { .. } => Failure::of_kind(
            FailureKind::Refused,
            what,
            runs_on,
            "nothing was sent; mend what is named and try again",
        ),
        MigrationError::Cancelled => Failure::of_kind(
            FailureKind::Cancelled,
            what,
            runs_on,
            "what the target has received stays there for the next try",
        ),
        MigrationError::Cut { .. } => Failure::failed(
            what,
            runs_on,
            "try again when the link is back: what the target has is not sent twice",
        ),
        MigrationError::DoesNotConverge { .. } => Failure::failed(
            what,
            runs_on,
            "try at a quieter hour, or allow more with --downtime-limit",
        ),
        MigrationError::InDoubt { .. } => Failure::of_kind(
            FailureKind::InDoubt,
            what,
            "the guest is paused here",
            "`longhaul status` tells when the other side has answered",
        ),
        MigrationError::Crashed { .. } => Failure::failed(
            what,
            format!("{vm} is this host's and does not run; its disks are here"),
            format!("`longhaul vm start {vm}` starts it from them"),
        ),
        MigrationError::NotGivenBack { .. } => Failure::of_kind(
            FailureKind::InDoubt,
            what,
            format!("{vm} is this host's, and paused"),
            "the agent goes on trying: `longhaul status` tells when it is done",
        ),
        MigrationError::Resolved { here, .. } => Failure::of_kind(
            FailureKind::InDoubt,
            what,
            match here {
                true => format!("{vm} is this host's"),
                false => format!("{vm} does not run here any more"),
            },
            "the agent goes on asking the other side, and `longhaul status` tells what it says",
        ),
        MigrationError::Journal { .. } => Failure::failed(
            what,
            runs_on,
            "is the disk with the agent's state full or read-only? mend it and try again",
        ),
        MigrationError::Peer { .. }
        | MigrationError::Protocol { .. }
        | MigrationError::Hypervisor(_)
        | MigrationError::Io { .. } => {
            Failure::failed(what, runs_on, "the agents' logs on both hosts say more")
        }
    }
}

/// The operator's programs, as a migration wants them.
struct OperatorHooks(Hooks);

impl OperatorHooks {
    async fn run(&self, moment: Moment, vm: &str, peer: &str, side: Side) -> Result<(), String> {
        let role = match side {
            Side::Source => hooks::Role::Source,
            Side::Target => hooks::Role::Target,
        };
        let occasion =
            Occasion { moment, vm: vm.to_owned(), peer: peer.to_owned(), role, report: None };
        self.0.run(&occasion).await.map_err(|error| chain(&error))
    }
}

#[async_trait]
impl job::Hooks for OperatorHooks {
    async fn before_switchover(&self, vm: &str, peer: &str, side: Side) -> Result<(), String> {
        self.run(Moment::BeforeSwitchover, vm, peer, side).await
    }

    async fn after_switchover(&self, vm: &str, peer: &str, side: Side) -> Result<(), String> {
        self.run(Moment::AfterSwitchover, vm, peer, side).await
    }

    async fn fence(&self, vm: &str, peer: &str) -> Result<(), String> {
        self.run(Moment::Fence, vm, peer, Side::Source).await
    }
}
