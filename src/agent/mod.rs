//! The daemon of a host: everything that outlives a command.
//!
//! ```text
//! command --> server --> answer --> { peers, registry, jobs --> Mover --> migration }
//! peer    --> incoming ------------------------------------------^
//! ```
//!
//! Invariants: one agent per state folder; what must survive a restart is on disk before anybody is
//! told; stopping aborts jobs safely and leaves guests alone.

pub mod admission;
mod answer;
mod best_time;
pub mod book;
pub mod cancel;
pub mod caps;
mod dial;
mod durable;
mod history;
pub mod hooks;
mod incoming;
pub mod indexing;
pub mod jobs;
pub mod links;
mod load;
mod lock;
mod metrics;
mod monitor;
pub mod mover;
pub mod peers;
mod pulling;
mod questions;
pub mod registry;
mod scheduling;
mod server;
pub mod setup;
mod sweeping;
mod tally;
mod verifying;
mod waiting;

use std::io;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use longhaul_transport::{BindError, Endpoint, Identity, IdentityError, Tuning};
use tokio::signal::unix::{SignalKind, signal};

use crate::config::Config;
use crate::hypervisor::qemu::probe::KvmProbe;
use crate::hypervisor::spec::host::{AccelPreference, HostPolicy};
use answer::Desk;
use book::{Book, BookError};
use cancel::{CancelReason, CancelToken};
use caps::Caps;
use dial::Phone;
use history::History;
use hooks::Hooks;
use indexing::ImageIndex;
use jobs::{Jobs, Mover};
use links::Links;
use lock::{InstanceLock, LockError};
use metrics::http::MetricsSocket;
use monitor::Monitor;
use peers::{PeerBook, PeersError};
use questions::Questions;
use registry::Registry;
use scheduling::Scheduler;
use server::ControlSocket;
use waiting::Waiting;

/// Time that jobs and sessions have to end safely when the agent stops. A service manager must give
/// more (systemd's default is 90 s).
const STOP_WAIT: Duration = Duration::from_secs(60);

/// Why an agent could not run.
#[derive(Debug, thiserror::Error)]
pub enum AgentError {
    /// Another agent uses the state folder.
    #[error(
        "another agent{} uses {} already",
        pid.map(|pid| format!(" (process {pid})")).unwrap_or_default(),
        state_dir.display()
    )]
    Taken {
        /// Its process id, if it is known.
        pid: Option<u32>,
        /// The state folder.
        state_dir: PathBuf,
    },
    /// A file, folder or socket of the agent's own cannot be used.
    #[error("while {doing} {}", path.display())]
    Io {
        /// What was being done.
        doing: &'static str,
        /// To which file.
        path: PathBuf,
        /// Why it failed.
        #[source]
        source: io::Error,
    },
    /// The identity cannot be used.
    #[error(transparent)]
    Identity(#[from] IdentityError),
    /// The list of peers cannot be used.
    #[error(transparent)]
    Peers(#[from] PeersError),
    /// The VMs cannot be found.
    #[error(transparent)]
    Book(#[from] BookError),
    /// The network cannot be used.
    #[error(transparent)]
    Bind(#[from] BindError),
    /// The address for metrics cannot be used.
    #[error("cannot serve metrics at {address} (metrics.listen)")]
    Metrics {
        /// The address.
        address: SocketAddr,
        /// Why not.
        #[source]
        source: io::Error,
    },
}

/// What a mover works with.
#[derive(Clone)]
pub struct Parts {
    /// The configuration.
    pub config: Arc<Config>,
    /// Sessions to peers.
    pub phone: Phone,
    /// The VMs of this host.
    pub registry: Arc<Registry>,
    /// The operator's programs.
    pub hooks: Hooks,
    /// The caps on what is sent.
    pub caps: Arc<Caps>,
    /// What sessions with peers carry.
    pub links: Arc<Links>,
    /// What the images here hold.
    pub index: Arc<ImageIndex>,
    /// Answers what peers ask beside attempts.
    pub questions: Arc<Questions>,
}

/// Runs an agent until SIGTERM or SIGINT. `mover` is made once, when all its parts are there.
///
/// # Errors
/// The agent could not start. Once it runs, failures are answers to commands and log lines.
pub async fn run(
    config: Config,
    mover: impl FnOnce(Parts) -> io::Result<Arc<dyn Mover>>,
) -> Result<(), AgentError> {
    let config = Arc::new(config);
    let started = jiff::Timestamp::now();
    let (state_dir, run_dir) = (&config.state_dir, &config.run_dir);
    for dir in [state_dir, run_dir, &config.image_tools.run_dir] {
        setup::make_dir(dir).map_err(io_error("making", dir))?;
    }
    let lock_file = state_dir.join("agent.lock");
    let _lock = InstanceLock::take(&lock_file).map_err(|error| match error {
        LockError::Taken(pid) => AgentError::Taken { pid, state_dir: state_dir.clone() },
        LockError::Io(source) => io_error("locking", &lock_file)(source),
    })?;

    // Before anything is settled or served: an agent that cannot be watched as it was asked does not run.
    let metrics = config.metrics_listen.map(MetricsSocket::bind).transpose();
    let metrics = metrics.map_err(|(address, source)| AgentError::Metrics { address, source })?;

    let identity = Identity::load_or_create(state_dir)?;
    let own = identity.fingerprint();
    let peers = Arc::new(PeerBook::load(&state_dir.join("peers.toml"), own)?);
    let book = Arc::new(Book::open(state_dir, config.host.pools.clone())?);
    let registry = Arc::new(Registry::new(book, with_kvm_probed(&config.host).await));
    let history_file = state_dir.join("history.jsonl");
    let history = History::load(&history_file).map_err(io_error("reading", &history_file))?;
    let caps = Caps::new(&config.limits);
    let trust = Arc::clone(&peers);
    let endpoint = Endpoint::bind(config.listen, &identity, trust, Tuning::default())?;
    let listen = endpoint.local_addr();
    let links = Arc::new(Links::default());
    let index = ImageIndex::open(&state_dir.join("index"), config.host.pools.clone());
    let phone =
        Phone { endpoint: endpoint.clone(), peers: Arc::clone(&peers), links: Arc::clone(&links) };
    let questions = Arc::new(Questions::default());
    let mover = mover(Parts {
        config: Arc::clone(&config),
        phone: phone.clone(),
        registry: Arc::clone(&registry),
        hooks: Hooks::new(config.hooks.clone()),
        caps: Arc::clone(&caps),
        links: Arc::clone(&links),
        index: Arc::clone(&index),
        questions: Arc::clone(&questions),
    })
    .map_err(io_error("reading the journals in", state_dir))?;
    let jobs = Arc::new(Jobs::new(Arc::clone(&mover), history));
    // Signals are caught before anybody can know that the agent runs.
    let caught = |kind| signal(kind).map_err(io_error("catching signals for", &lock_file));
    let (mut terminate, mut interrupt) =
        (caught(SignalKind::terminate())?, caught(SignalKind::interrupt())?);

    let socket_path = config.control_socket();
    let socket = ControlSocket::bind(&socket_path).map_err(io_error("binding", &socket_path))?;
    let scheduler = Scheduler::open(&config, phone, Arc::clone(&caps))
        .map_err(io_error("reading", &config.state_dir.join(scheduling::FILE)))?;
    let waiting_file = config.state_dir.join(waiting::FILE);
    let waiting = Waiting::open(waiting_file.clone(), config.limits.time_zone.clone());
    let waiting = Arc::new(waiting.map_err(io_error("reading", &waiting_file))?);
    let monitor =
        Arc::new(Monitor::new(sample_period(&config), config.scheduler.cores, &config.state_dir));
    let desk = Arc::new(Desk {
        config: Arc::clone(&config),
        own,
        listen,
        endpoint: endpoint.clone(),
        peers: Arc::clone(&peers),
        registry: Arc::clone(&registry),
        jobs: Arc::clone(&jobs),
        mover: Arc::clone(&mover),
        caps: Arc::clone(&caps),
        links: Arc::clone(&links),
        index,
        monitor: Arc::clone(&monitor),
        scheduler: scheduler.clone(),
        waiting: Arc::clone(&waiting),
        started,
        last_metrics: tokio::sync::Mutex::default(),
    });
    questions.open(&desk);
    let planning = async {
        match &scheduler {
            Some(scheduler) => scheduler.run(&desk).await,
            None => std::future::pending().await,
        }
    };
    let stopping = CancelToken::new();
    let serving =
        tokio::spawn(incoming::serve(endpoint.clone(), peers, mover, stopping.clone(), STOP_WAIT));
    tracing::info!(
        name = config.name, fingerprint = %own, %listen, control = %socket_path.display(),
        version = env!("CARGO_PKG_VERSION"), "agent runs"
    );

    let signal = tokio::select! {
        () = socket.serve(Arc::clone(&desk)) => "none",
        () = metrics::http::serve(metrics.as_ref(), Arc::clone(&desk)) => "none",
        () = monitor.watch(&registry, &jobs, &links) => "none",
        () = planning => "none",
        () = waiting.run(&desk) => "none",
        () = caps.follow_the_clock() => "none",
        _ = terminate.recv() => "SIGTERM",
        _ = interrupt.recv() => "SIGINT",
    };
    tracing::info!(signal, "agent stops: jobs are aborted safely, guests run on");
    drop((socket, metrics));
    stopping.cancel(CancelReason::Stopping);
    let (left, _) = tokio::join!(jobs.stop(STOP_WAIT), serving);
    if left > 0 {
        tracing::error!(jobs = left, "jobs did not end in time: their journals say what holds");
    }
    endpoint.close().await;
    tracing::info!("agent stopped");
    Ok(())
}

/// How often this host and its VMs are looked at: some samples for each plan, and never in a hurry.
fn sample_period(config: &Config) -> Duration {
    const SAMPLE_PERIOD: Duration = Duration::from_secs(15);
    const SAMPLES_PER_PLAN: u32 = 4;
    SAMPLE_PERIOD.min(config.scheduler.interval / SAMPLES_PER_PLAN)
}

/// The policy, with what a probe says of KVM: a device node alone proves nothing.
async fn with_kvm_probed(policy: &HostPolicy) -> HostPolicy {
    let mut policy = policy.clone();
    if policy.accel != AccelPreference::Tcg {
        let answer = KvmProbe::default().answer(&policy.qemu, &policy.run_dir).await.clone();
        policy.kvm_works = answer.works;
    }
    policy
}

fn io_error(doing: &'static str, path: &Path) -> impl FnOnce(io::Error) -> AgentError + use<> {
    let path = path.to_owned();
    move |source| AgentError::Io { doing, path, source }
}
