//! What the agent does for each request.
//!
//! Invariant: this is where the parts meet, and nothing is decided here: whether a job may start is
//! `admission`'s, whom to trust `peers`', what a VM is `registry`'s, how it moves the mover's.

use std::net::{SocketAddr, UdpSocket};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use jiff::Timestamp;
use longhaul_transport::{Endpoint, Fingerprint};
use tokio::sync::mpsc;
use tokio::task::JoinHandle;
use tokio::time::Instant;

use super::admission::Wish;
use super::caps::Caps;
use super::indexing::ImageIndex;
use super::jobs::{Follow, Jobs, MoveOptions, Mover};
use super::links::Links;
use super::metrics::{self, Facts};
use super::monitor::Monitor;
use super::peers::{Peer, PeerBook, PeersError, full_address};
use super::registry::Registry;
use super::scheduling::Scheduler;
use super::sweeping;
use super::waiting::Waiting;
use crate::calendar::Windows;
use crate::config::{Config, Problem, valid_downtime_limit};
use crate::control::{
    Checked, Event, Failure, FailureKind, IndexRequest, JobKind, JobOutcome, JobSummary, Metric,
    MoveRequest, OwnIdentity, PeerSummary, PushRequest, Reply, Request, Status, VmSource, chain,
};
use crate::migration::handover::Conflict;
use crate::migration::job::ImageJob;

/// Ended jobs in a status.
pub(super) const RECENT_MAX: usize = 10;
/// For so long what was gathered for one who scrapes is good enough for the next, so that no number
/// of them asks the VMs' monitors more often.
const METRICS_AGE_MAX: Duration = Duration::from_secs(1);
/// Time for a cancelled job to give the guest back.
const CANCEL_WAIT: Duration = Duration::from_secs(120);
/// Time for a peer to answer while it is paired; it may be down, and is then trusted all the same.
const PAIR_PROBE_WAIT: Duration = Duration::from_secs(3);
/// Addresses of one name that are tried.
const ADDRESSES_MAX: usize = 4;
/// A year: a deadline beyond it is none.
const DEADLINE_S_MAX: u64 = 366 * 24 * 3600;

/// Where requests arrive.
pub(crate) struct Desk {
    pub(crate) config: Arc<Config>,
    pub(crate) own: Fingerprint,
    pub(crate) listen: SocketAddr,
    pub(crate) endpoint: Endpoint,
    pub(crate) peers: Arc<PeerBook>,
    pub(crate) registry: Arc<Registry>,
    pub(crate) jobs: Arc<Jobs>,
    pub(crate) mover: Arc<dyn Mover>,
    pub(crate) caps: Arc<Caps>,
    pub(crate) links: Arc<Links>,
    pub(crate) index: Arc<ImageIndex>,
    pub(crate) monitor: Arc<Monitor>,
    /// Moves that wait for a window.
    pub(crate) waiting: Arc<Waiting>,
    /// Plans for other hosts, if this agent is told to.
    pub(crate) scheduler: Option<Arc<Scheduler>>,
    /// When this agent started.
    pub(crate) started: Timestamp,
    pub(crate) last_metrics: tokio::sync::Mutex<Option<(Instant, Arc<Vec<Metric>>)>>,
}

/// What comes of a request.
pub(crate) enum Reaction {
    /// This, at once.
    Answer(Box<Result<Reply, Failure>>),
    /// A job that is worth watching.
    Follow(Follow),
    /// Work that is no job, and tells how far it is.
    Work(Work),
}

/// Work under way.
pub(crate) struct Work {
    /// How far it is; closed when it is done.
    pub(crate) events: mpsc::Receiver<Event>,
    /// What came of it.
    pub(crate) done: JoinHandle<Result<Reply, Failure>>,
}

impl Desk {
    pub(crate) async fn react(&self, request: Request) -> Reaction {
        let followed = match request {
            Request::Seed(wish) => self.start(JobKind::Seed, wish).await,
            Request::Migrate(wish) => self.migrate(wish).await,
            Request::Push(wish) => self.push(wish),
            Request::Pull(wish) => self.pull(wish),
            Request::Watch { vm } => self.jobs.follow(&vm).map(Reaction::Follow),
            Request::Index(wish) => Ok(Reaction::Work(self.index(wish))),
            Request::Verify { image } => Ok(Reaction::Work(self.verify(image.into()))),
            other => Ok(Reaction::Answer(Box::new(self.answer(other).await))),
        };
        followed.unwrap_or_else(|failure| Reaction::Answer(Box::new(Err(failure))))
    }

    /// Works on the index, to its end even if nobody watches any more.
    fn index(&self, wish: IndexRequest) -> Work {
        let (tell, events) = mpsc::channel(1);
        let index = Arc::clone(&self.index);
        let done = tokio::task::spawn_blocking(move || {
            // A watcher who is busy with the last event misses this one.
            let tell = |progress| drop(tell.try_send(Event::Indexing(progress)));
            index.work(&wish, tell).map(Box::new).map(Reply::Index)
        });
        Work { events, done }
    }

    /// Reads an image, to its end even if nobody watches any more.
    fn verify(&self, image: PathBuf) -> Work {
        let (tell, events) = mpsc::channel(1);
        let mover = Arc::clone(&self.mover);
        let done = tokio::spawn(async move {
            mover.verify(&image, tell).await.map(Box::new).map(Reply::Verified)
        });
        Work { events, done }
    }

    async fn answer(&self, request: Request) -> Result<Reply, Failure> {
        match request {
            Request::Status => Ok(Reply::Status(Box::new(self.status().await))),
            Request::Metrics => Ok(Reply::Metrics(self.metrics().await.to_vec())),
            Request::Whoami => Ok(Reply::Identity(self.identity())),
            Request::Probe { address } => self.probe(&address).await,
            Request::PairAdd { name, address, fingerprint } => {
                self.pair(name, address, &fingerprint).await
            }
            Request::PairList => {
                Ok(Reply::Peers(self.peers.list().into_iter().map(summary).collect()))
            }
            Request::PairRemove { name } => {
                let peer = self.peers.remove(&name).map_err(peers_failure)?;
                tracing::info!(peer = name, fingerprint = %peer.fingerprint, "trusted no longer");
                Ok(Reply::Said(format!("{name} is trusted no longer")))
            }
            Request::VmStart(source) => {
                let name = self.registry.name_of(&source)?;
                self.refuse_while_moving("start", &name).await?;
                self.registry.start(source).await.map(Reply::Said)
            }
            Request::VmList => Ok(Reply::Vms(self.registry.list().await)),
            Request::VmShow { vm } => self.registry.show(&vm).await.map(Reply::Vm),
            Request::VmStop { vm, force } => {
                self.refuse_while_moving("stop", &vm).await?;
                self.registry.stop(&vm, force).await.map(Reply::Said)
            }
            Request::VmForget { vm } => {
                self.refuse_while_moving("forget", &vm).await?;
                self.registry.forget(&vm).await.map(Reply::Said)
            }
            Request::SeedForget { vm } => {
                self.refuse_while_moving("forget the seed of", &vm).await?;
                match self.mover.forget_seed(&vm).await? {
                    true => Ok(Reply::Said(format!("the seed of {vm} is forgotten"))),
                    false => Err(Failure::refused(format!("{vm} is seeded nowhere"), "")),
                }
            }
            Request::VmAdopt { qmp, name } => {
                self.registry.adopt(qmp.as_ref(), name).await.map(Reply::Adopted)
            }
            Request::VmCheck { vm, to } => self.check(vm, to).await,
            Request::StoreGc(wish) => {
                let pools = self.config.host.pools.clone();
                let sweep = move || sweeping::sweep(&pools, wish, std::time::SystemTime::now());
                let swept = tokio::task::spawn_blocking(sweep).await;
                swept
                    .unwrap_or_else(|error| {
                        Err(Failure::failed(error.to_string(), "", "see the agent's log"))
                    })
                    .map(Reply::Garbage)
            }
            Request::Limit(wish) => self.caps.change(wish).map(Box::new).map(Reply::Limits),
            Request::Cancel { vm } => self.cancel(&vm).await,
            Request::Resolve { vm, runs, confirm } => {
                if confirm != vm {
                    let what = format!("the name that was typed is not {vm}: nothing was decided");
                    return Err(Failure::refused(what, "type the VM's name to confirm"));
                }
                tracing::warn!(vm, ?runs, "the operator decides a hand-over in doubt");
                self.mover.resolve(&vm, runs).await.map(Reply::Said)
            }
            Request::Load { over_s } => {
                Ok(Reply::Load(Box::new(self.load(Duration::from_secs(over_s)))))
            }
            Request::Plan => self.scheduler()?.view(self).await.map(Box::new).map(Reply::Plan),
            Request::Drain(wish) => {
                self.scheduler()?.drain(self, &wish).await.map(Box::new).map(Reply::Plan)
            }
            Request::Evacuate(wish) => {
                self.scheduler()?.evacuate(self, &wish).await.map(Box::new).map(Reply::Plan)
            }
            Request::Fetch(_) | Request::Job(_) => {
                Err(Failure::refused("only a peer asks for that", "see `longhaul pull --help`"))
            }
            // Answered by `react`.
            Request::Seed(_)
            | Request::Migrate(_)
            | Request::Push(_)
            | Request::Pull(_)
            | Request::Watch { .. }
            | Request::Index(_)
            | Request::Verify { .. } => {
                Err(Failure::refused("this request starts or follows what takes a while", ""))
            }
        }
    }

    fn scheduler(&self) -> Result<&Arc<Scheduler>, Failure> {
        self.scheduler.as_ref().ok_or_else(|| {
            let name = &self.config.name;
            let next = "ask the agent that does, or name scheduler.hosts in its configuration";
            Failure::refused(format!("{name} plans for nobody"), next)
        })
    }

    /// What moves, or may run elsewhere, is not touched by hand.
    async fn refuse_while_moving(&self, deed: &str, vm: &str) -> Result<(), Failure> {
        if let Ok(job) = self.jobs.follow(vm) {
            let JobSummary { kind, peer, .. } = job.summary();
            let what = format!("cannot {deed} {vm}: a job moves it ({kind} to {peer})");
            return Err(Failure::refused(what, format!("`longhaul cancel {vm}` first")));
        }
        if self.is_in_doubt(vm).await {
            let what = format!("cannot {deed} {vm}: its last hand-over is in doubt");
            return Err(Failure::refused(what, "`longhaul status` tells what is known about it"));
        }
        Ok(())
    }

    async fn is_in_doubt(&self, vm: &str) -> bool {
        self.mover.in_doubt().await.iter().any(|doubt| doubt.vm == vm && doubt.blocks)
    }

    pub(super) async fn start(
        &self,
        kind: JobKind,
        wish: MoveRequest,
    ) -> Result<Reaction, Failure> {
        let MoveRequest { vm, to, downtime_limit_ms, deadline_s, rate, background, detach, .. } =
            wish;
        let peer = self.peers.get(&to).map_err(problem_failure)?;
        let default_ms = u64::try_from(self.config.limits.downtime.as_millis());
        let downtime_limit_ms = match downtime_limit_ms {
            Some(ms) => valid_downtime_limit(ms).map_err(problem_failure)?,
            None => default_ms.unwrap_or(u64::MAX),
        };
        let (image, fetch) = (None, None);
        // A guest that moves is waited for.
        let background = background && kind == JobKind::Seed;
        let options = MoveOptions { downtime_limit_ms, deadline_s, rate, background, image, fetch };
        let in_doubt = self.is_in_doubt(&vm).await;
        let vm_known = self.registry.knows(&vm);
        self.start_job(&Wish { kind, vm, vm_known, in_doubt }, peer, options, detach)
    }

    /// Starts a migration, or has it wait for its windows.
    async fn migrate(&self, mut wish: MoveRequest) -> Result<Reaction, Failure> {
        let windows = match wish.windows.take() {
            Some(windows) => windows,
            None if wish.best_time => Windows::always(),
            None => return self.start(JobKind::Migrate, wish).await,
        };
        if wish.best_time && wish.deadline_s.is_none() {
            let next = "give it one: --deadline 24h";
            return Err(Failure::refused("there is no best time without a deadline", next));
        }
        self.peers.get(&wish.to).map_err(problem_failure)?;
        if !self.registry.knows(&wish.vm) {
            let what = format!("no VM of this host is called `{}`", wish.vm);
            return Err(Failure::refused(what, "`longhaul vm list` shows them"));
        }
        let added = self.waiting.add(wish, windows).await?;
        Ok(Reaction::Answer(Box::new(Ok(added))))
    }

    /// Starts a migration that nobody watches.
    pub(super) async fn migrate_detached(&self, wish: MoveRequest) -> Result<Reply, Failure> {
        match self.start(JobKind::Migrate, wish).await? {
            Reaction::Answer(answer) => *answer,
            Reaction::Follow(follow) => Ok(Reply::Started(follow.summary())),
            Reaction::Work(_) => Err(Failure::refused("a migration is a job", "")),
        }
    }

    pub(super) fn start_job(
        &self,
        wish: &Wish,
        peer: Peer,
        options: MoveOptions,
        detach: bool,
    ) -> Result<Reaction, Failure> {
        if options.deadline_s.is_some_and(|s| s > DEADLINE_S_MAX) {
            return Err(Failure::refused("the deadline is more than a year away", "leave it out"));
        }
        let follow = self.jobs.start(wish, peer, options)?;
        if detach {
            return Ok(Reaction::Answer(Box::new(Ok(Reply::Started(follow.summary())))));
        }
        Ok(Reaction::Follow(follow))
    }

    /// Starts a push; the image is this host's operator's to name.
    fn push(&self, wish: PushRequest) -> Result<Reaction, Failure> {
        let PushRequest { image, to, pool, file, replace, deadline_s, rate, background, detach } =
            wish;
        let peer = self.peers.get(&to).map_err(problem_failure)?;
        let path = PathBuf::from(&image);
        if !path.is_absolute() || !path.exists() {
            let what = format!("there is no image {image}");
            return Err(Failure::refused(what, "give the path of a raw image or of a .qcow2"));
        }
        let image_job = ImageJob { image: path, peer: to, pool, file, replace };
        let options = MoveOptions {
            downtime_limit_ms: 0,
            deadline_s,
            rate,
            background,
            image: Some(image_job),
            fetch: None,
        };
        let wish = Wish { kind: JobKind::Push, vm: image, vm_known: true, in_doubt: false };
        self.start_job(&wish, peer, options, detach)
    }

    async fn cancel(&self, vm: &str) -> Result<Reply, Failure> {
        let waited = self.waiting.remove(vm).await;
        let mut follow = match self.jobs.cancel(vm) {
            Err(_) if waited => {
                return Ok(Reply::Said(format!(
                    "{vm} waits for no window any more; it stays here"
                )));
            }
            job => job?,
        };
        let noun = follow.summary().kind.noun();
        let Ok(outcome) = tokio::time::timeout(CANCEL_WAIT, follow.outcome()).await else {
            let what = format!("the {noun} of {vm} has not ended yet");
            let state = "it will end as soon as it can".to_owned();
            return Err(Failure::failed(what, state, format!("`longhaul watch {vm}` follows it")));
        };
        match outcome {
            JobOutcome::Failed(failure) if failure.kind == FailureKind::Cancelled => {
                let parts = [format!("the {noun} of {vm} is cancelled"), failure.state];
                let said = parts.iter().filter(|part| !part.is_empty()).map(String::as_str);
                Ok(Reply::Said(said.collect::<Vec<_>>().join("; ")))
            }
            JobOutcome::Failed(failure) => Err(failure),
            JobOutcome::Completed(_) => {
                let what = format!("the {noun} of {vm} was done before it could be cancelled");
                Err(Failure::refused(what, "`longhaul status` shows its report"))
            }
        }
    }

    async fn check(&self, source: VmSource, to: Option<String>) -> Result<Reply, Failure> {
        let peer = to.as_deref().map(|name| self.peers.get(name)).transpose();
        let peer = peer.map_err(problem_failure)?;
        let (spec, mut obstacles) = self.registry.check(source, peer.is_some()).await?;
        if let Some(peer) = &peer
            && obstacles.is_empty()
        {
            obstacles = self.mover.obstacles_at(&spec, peer).await?;
        }
        Ok(Reply::Checked(Checked { vm: spec.name, to, obstacles }))
    }

    async fn probe(&self, address: &str) -> Result<Reply, Failure> {
        let address = full_address(address).map_err(problem_failure)?;
        match self.who_answers(&address).await {
            Ok(fingerprint) => Ok(Reply::Probed { address, fingerprint: fingerprint.to_string() }),
            Err(why) => {
                let next = "is its agent running, and is its UDP port open on the way?";
                Err(Failure::failed(format!("nobody was found at {address}: {why}"), "", next))
            }
        }
    }

    /// The fingerprint of the agent at `address` (host and port), or why there is none.
    async fn who_answers(&self, address: &str) -> Result<Fingerprint, String> {
        let resolved = tokio::net::lookup_host(address).await.map_err(|error| error.to_string())?;
        let mut why = "the name has no address".to_owned();
        for candidate in resolved.take(ADDRESSES_MAX) {
            match self.endpoint.probe(candidate).await {
                Ok(fingerprint) => return Ok(fingerprint),
                Err(error) => why = chain(&error),
            }
        }
        Err(why)
    }

    async fn pair(
        &self,
        name: String,
        address: String,
        fingerprint: &str,
    ) -> Result<Reply, Failure> {
        let fingerprint = fingerprint.parse().map_err(|error| {
            Failure::refused(
                format!("this is not a fingerprint: {error}"),
                format!("`longhaul pair` on {name} shows it"),
            )
        })?;
        let address = full_address(&address).map_err(problem_failure)?;
        // The other host may be down just now; but if somebody answers, it should be the right one.
        let answer = tokio::time::timeout(PAIR_PROBE_WAIT, self.who_answers(&address)).await;
        if let Ok(Ok(other)) = answer
            && other != fingerprint
        {
            tracing::warn!(peer = name, address, typed = %fingerprint, answered = %other,
                "another identity than the typed one answers");
            return Err(Failure::refused(
                format!("the agent at {address} is {other}, not {fingerprint}"),
                format!("compare with what `longhaul pair` on {name} shows; nobody new is trusted"),
            ));
        }
        let reached = matches!(answer, Ok(Ok(_)));
        let peer = self.peers.add(Peer { name, address, fingerprint }).map_err(peers_failure)?;
        let Peer { name, address, fingerprint } = peer;
        tracing::info!(peer = name, address, %fingerprint, "trusted from now on");
        let remark = match reached {
            true => "it must trust this host too",
            false => "nobody answers there yet; it must trust this host too",
        };
        Ok(Reply::Said(format!("{name} ({address}) is trusted; {remark}")))
    }

    async fn status(&self) -> Status {
        Status {
            version: env!("CARGO_PKG_VERSION").to_owned(),
            identity: self.identity(),
            vms: self.registry.list().await,
            peers: self.peers.list().into_iter().map(summary).collect(),
            jobs: self.jobs.summaries().into_iter().map(|job| self.with_limits(job)).collect(),
            in_doubt: self.mover.in_doubt().await,
            recent: self.jobs.recent(RECENT_MAX),
            waiting: self.waiting.views().await,
        }
    }

    /// All numbers, not older than [`METRICS_AGE_MAX`]. Whoever asks meanwhile waits for the first.
    pub(crate) async fn metrics(&self) -> Arc<Vec<Metric>> {
        let mut last = self.last_metrics.lock().await;
        if let Some((at, metrics)) = &*last
            && at.elapsed() < METRICS_AGE_MAX
        {
            return Arc::clone(metrics);
        }
        let facts = Facts {
            started: self.started,
            status: self.status().await,
            conflicts: [Conflict::RanTwice, Conflict::RunsNowhere]
                .map(|conflict| self.mover.conflicts(conflict)),
            limits: self.caps.limits(Timestamp::now()),
            tallies: self.jobs.tallies(),
            last_migration: self.jobs.last_migration(),
            links: self.links.all(),
            planner: self.scheduler.as_ref().and_then(|scheduler| scheduler.glance()),
        };
        let metrics = Arc::new(metrics::metrics(&facts));
        *last = Some((Instant::now(), Arc::clone(&metrics)));
        metrics
    }

    fn with_limits(&self, job: JobSummary) -> JobSummary {
        JobSummary { limits: self.caps.of_job(&job.vm).map(Box::new), ..job }
    }

    fn identity(&self) -> OwnIdentity {
        OwnIdentity {
            name: self.config.name.clone(),
            fingerprint: self.own.to_string(),
            listen: self.listen.to_string(),
            reachable: reachable(self.listen).map(|address| address.to_string()),
        }
    }
}

/// The address that peers probably reach this host at: the listening one, or the one that the
/// system would send from. Nothing is sent: connecting a UDP socket only asks the routing table.
fn reachable(listen: SocketAddr) -> Option<SocketAddr> {
    if !listen.ip().is_unspecified() {
        return Some(listen);
    }
    // Documentation addresses (RFC 5737, RFC 3849): any that take the default route would do.
    let (from, to) = match listen {
        SocketAddr::V4(_) => ("0.0.0.0:0", "198.51.100.1:9"),
        SocketAddr::V6(_) => ("[::]:0", "[2001:db8::1]:9"),
    };
    let socket = UdpSocket::bind(from).ok()?;
    socket.connect(to).ok()?;
    Some(SocketAddr::new(socket.local_addr().ok()?.ip(), listen.port()))
}

fn summary(peer: Peer) -> PeerSummary {
    let Peer { name, address, fingerprint } = peer;
    PeerSummary { name, address, fingerprint: fingerprint.to_string() }
}

pub(super) fn problem_failure(problem: Problem) -> Failure {
    Failure::refused(problem.what, problem.remedy)
}

fn peers_failure(error: PeersError) -> Failure {
    match error {
        PeersError::Refused(problem) => problem_failure(problem),
        other => Failure::failed(chain(&other), "nothing was changed", "see the agent's log"),
    }
}
