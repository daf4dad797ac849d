//! Moves VMs: what jobs and sessions ask for, done by `migration`.
//!
//! Invariant: this file joins a job to a `migration::Site` and says in people's words how it ended;
//! what is left from an earlier life of the agent is settled before anything new begins for that VM.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use async_trait::async_trait;
use longhaul_transport::{Endpoint, RateLimiter, Session};
use tokio::sync::watch;

use super::Parts;
use super::cancel::CancelToken;
use super::hooks::{Hooks, Moment, Occasion, Role};
use super::jobs::{Job, Mover};
use super::peers::{Peer, PeerBook};
use crate::control::{Failure, FailureKind, InDoubt, chain};
use crate::hypervisor::VmSpec;
use crate::hypervisor::qemu::host::QemuHost;
use crate::migration::job::{self, Dial, MoveOptions, Side, Site};
use crate::migration::journal::{History, JournalDir};
use crate::migration::message::Purpose;
use crate::migration::seeds::SeedBook;
use crate::migration::{self, Attempts, Completed, MigrationError, Progress};

/// Downtime that is borne where the limit cannot be reached, as a multiple of the limit.
const DOWNTIME_STRETCH: f64 = 10.0;
/// Pre-copy that has not converged by then does not converge, if the job has no deadline.
const DEADLINE_DEFAULT: Duration = Duration::from_secs(60 * 60);
/// A seed over a link that was cut is tried again after this long, and at most so many times in a
/// row without progress.
const CUT_WAIT: Duration = Duration::from_secs(2);
const CUTS_MAX: u32 = 30;
/// First wait before an attempt of an earlier life is tried again to be settled, without end; it
/// doubles up to the other.
const SETTLE_WAIT_FIRST: Duration = Duration::from_millis(500);
const SETTLE_WAIT_MAX: Duration = Duration::from_secs(30);
/// Memory for the pages of one migration, as a share of what the operator allows.
const STAGING_SHARE: u64 = 4;

/// Moves the VMs of one host.
pub struct MigrationMover {
    site: Site,
    attempts: Attempts,
    endpoint: Endpoint,
    peers: Arc<PeerBook>,
    rate: RateLimiter,
    staging_bytes: u64,
    /// Hand-overs that wait for the other side's journal.
    doubts: Doubts,
}

type Doubts = Arc<Mutex<BTreeMap<String, InDoubt>>>;

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
    };
    let mover = MigrationMover {
        site,
        attempts: Attempts::default(),
        endpoint: parts.endpoint,
        peers: parts.peers,
        rate: parts.rate,
        staging_bytes: parts.config.limits.memory.0 / STAGING_SHARE,
        doubts: Doubts::default(),
    };
    for history in mover.site.journals.unfinished()? {
        mover.recover(history);
    }
    Ok(Arc::new(mover))
}

impl MigrationMover {
    fn dialer(&self, peer: &str) -> Dialer {
        Dialer {
            endpoint: self.endpoint.clone(),
            peers: Arc::clone(&self.peers),
            peer: peer.to_owned(),
        }
    }

    /// Settles an attempt of an earlier life, in the background: it may have to wait for a peer.
    fn recover(&self, history: History) {
        let Some((role, vm, peer, _)) = history.began() else { return };
        let (vm, peer) = (vm.to_owned(), peer.to_owned());
        let (site, doubts) = (self.site.clone(), Arc::clone(&self.doubts));
        lock(&doubts).insert(
            vm.clone(),
            InDoubt {
                vm: vm.clone(),
                peer: peer.clone(),
                since: None,
                detail: "a move was interrupted when this agent ended: it is being settled".into(),
            },
        );
        let dial = self.dialer(&peer);
        // Entered before the first session is served: a new attempt waits for this one's end.
        let entered = match role {
            migration::journal::Role::Source => None,
            migration::journal::Role::Target => {
                Some(self.attempts.recovering(history.job, &vm, &peer))
            }
        };
        tokio::spawn(async move {
            let mut wait = SETTLE_WAIT_FIRST;
            loop {
                let settled = match role {
                    migration::journal::Role::Source => {
                        migration::recover_source(&site, &history, &dial).await
                    }
                    migration::journal::Role::Target => {
                        migration::recover_target(&site, &history).await
                    }
                };
                match settled {
                    Ok(said) => {
                        tracing::info!(vm, peer, job = %history.job, said, "settled");
                        lock(&doubts).remove(&vm);
                        break;
                    }
                    Err(error) => {
                        let detail = chain(&error);
                        tracing::error!(vm, peer, job = %history.job, detail, "not settled yet");
                        if let Some(doubt) = lock(&doubts).get_mut(&vm) {
                            doubt.detail = detail;
                        }
                    }
                }
                tokio::time::sleep(wait).await;
                wait = (wait * 2).min(SETTLE_WAIT_MAX);
            }
            drop(entered);
        });
    }

    /// One attempt after the other, as long as only the link fails and something moves.
    async fn run(
        &self,
        job: &Job,
        purpose: Purpose,
        progress: &watch::Sender<Progress>,
        cancel: &CancelToken,
    ) -> Result<Completed, Failure> {
        let dial = self.dialer(&job.peer.name);
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
        let mut cuts = 0;
        loop {
            let error = match self.attempt(job, &order, &dial, progress, cancel).await {
                Ok(completed) => return Ok(completed),
                Err(error) => error,
            };
            // Nobody waits for a seed: a link that comes back is good enough.
            let again = error.is_cut() && purpose == Purpose::Seed && cuts < CUTS_MAX;
            if !again {
                return Err(failure(&job.vm, &error));
            }
            cuts += 1;
            tracing::info!(vm = job.vm, peer = job.peer.name, %error, cuts, "trying again");
            progress.send_modify(|progress| {
                progress.note = Some(format!("{error}; trying again"));
            });
            tokio::select! {
                () = tokio::time::sleep(CUT_WAIT) => {}
                _ = cancel.cancelled() => {
                    return Err(failure(&job.vm, &MigrationError::Cancelled));
                }
            }
        }
    }

    async fn attempt(
        &self,
        job: &Job,
        order: &job::Job,
        dial: &Dialer,
        progress: &watch::Sender<Progress>,
        cancel: &CancelToken,
    ) -> Result<Completed, MigrationError> {
        let session = tokio::select! {
            session = dial.dial() => session,
            _ = cancel.cancelled() => return Err(MigrationError::Cancelled),
        };
        let session = session
            .map_err(|detail| MigrationError::Cut { peer: job.peer.name.clone(), detail })?;
        let rate = self.rate.job();
        rate.set_job(job.options.rate);
        session.set_rate(rate);
        let cancelled = async {
            cancel.cancelled().await;
        };
        migration::run(&self.site, order, session, dial, progress, cancelled).await
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

    async fn serve(&self, session: Session, peer: Peer, cancel: CancelToken) {
        let serving = migration::serve(&self.site, &self.attempts, &peer.name, session.clone());
        let served = tokio::select! {
            served = serving => served,
            _ = cancel.cancelled() => {
                // What was not accepted is refused when the agent runs again.
                session.refuse("this agent is stopping");
                return;
            }
        };
        if let Err(error) = served {
            tracing::warn!(peer = peer.name, error = chain(&error), "a session ended badly");
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
        lock(&self.doubts).values().cloned().collect()
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

fn lock(doubts: &Doubts) -> MutexGuard<'_, BTreeMap<String, InDoubt>> {
    doubts.lock().unwrap_or_else(PoisonError::into_inner)
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
        MigrationError::Peer { .. }
        | MigrationError::Protocol { .. }
        | MigrationError::Hypervisor(_)
        | MigrationError::Io { .. } => {
            Failure::failed(what, runs_on, "the agents' logs on both hosts say more")
        }
    }
}

/// Reaches one peer, wherever the book says that it is now.
struct Dialer {
    endpoint: Endpoint,
    peers: Arc<PeerBook>,
    peer: String,
}

#[async_trait]
impl Dial for Dialer {
    async fn dial(&self) -> Result<Session, String> {
        let peer = self.peers.get(&self.peer).map_err(|problem| problem.what)?;
        let mut last = format!("{} has no address", peer.address);
        let found = tokio::net::lookup_host(&peer.address).await;
        for address in found.map_err(|error| format!("{}: {error}", peer.address))? {
            match self.endpoint.connect(address, peer.fingerprint).await {
                Ok(session) => return Ok(session),
                Err(error) => last = chain(&error),
            }
        }
        Err(last)
    }
}

/// The operator's programs, as a migration wants them.
struct OperatorHooks(Hooks);

impl OperatorHooks {
    async fn run(&self, moment: Moment, vm: &str, peer: &str, side: Side) -> Result<(), String> {
        let role = match side {
            Side::Source => Role::Source,
            Side::Target => Role::Target,
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
}
