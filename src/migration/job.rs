//! What an attempt is given: the job, and the host around it.
//!
//! Invariant: values only. Nothing in here was read from a configuration or a command line by this
//! module, and nothing in here is changed by an attempt.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use longhaul_dedup::places::Places;
use longhaul_transport::Session;
use tokio::sync::Mutex;

use super::doubts::Doubts;
use super::journal::JournalDir;
use super::message::Purpose;
use super::question::Answers;
use super::seeds::SeedBook;
use crate::hypervisor::Host;

/// What an operator asked for.
#[derive(Debug, Clone, PartialEq)]
pub struct Job {
    /// The VM.
    pub vm: String,
    /// The peer's name at this host.
    pub peer: String,
    /// Seed or migrate.
    pub purpose: Purpose,
    /// How.
    pub options: MoveOptions,
}

/// An image that an operator wants sent without a VM.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ImageJob {
    /// The image here.
    pub image: PathBuf,
    /// The peer's name at this host.
    pub peer: String,
    /// The peer's pool that it is for.
    pub pool: String,
    /// Its file name there.
    pub file: String,
    /// An image of that name may be replaced.
    pub replace: bool,
}

/// How to move.
#[derive(Debug, Clone, PartialEq)]
pub struct MoveOptions {
    /// Downtime asked for, in milliseconds.
    pub downtime_target_ms: f64,
    /// Downtime that is borne if the target cannot be reached, in milliseconds.
    pub downtime_max_ms: f64,
    /// Milliseconds after which pre-copy must have converged.
    pub deadline_ms: u64,
    /// Memory for pages that wait for the link, in bytes.
    pub staging_bytes: u64,
}

impl Default for MoveOptions {
    fn default() -> Self {
        Self {
            downtime_target_ms: 300.0,
            downtime_max_ms: 3_000.0,
            deadline_ms: 30 * 60 * 1000,
            staging_bytes: 256 << 20,
        }
    }
}

/// This host, as an attempt sees it.
#[derive(Clone)]
pub struct Site {
    /// Its VMs and images.
    pub host: Arc<dyn Host>,
    /// Its journals.
    pub journals: JournalDir,
    /// Its seeds that lie at peers.
    pub seeds: SeedBook,
    /// What its operator wants run around a switchover.
    pub hooks: Arc<dyn Hooks>,
    /// A folder for files without a name.
    pub scratch: PathBuf,
    /// What its images hold, if that can be kept.
    pub index: Option<Arc<Places>>,
    /// How long an attempt waits for a link that is down, before the hand-over.
    pub link_patience: Duration,
    /// Its hand-overs that are not settled.
    pub doubts: Doubts,
    /// Held by whoever acts upon what a target's journal says.
    pub turn: Arc<Mutex<()>>,
    /// Who answers what peers ask beside attempts.
    pub answers: Arc<dyn Answers>,
}

/// Which side of a switchover a hook runs at.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Side {
    /// Where the VM leaves.
    Source,
    /// Where it arrives.
    Target,
}

/// The operator's own steps around a switchover, such as moving an address.
#[async_trait]
pub trait Hooks: Send + Sync {
    /// Before the guest is paused at the source. A failure ends the attempt; the guest runs on.
    async fn before_switchover(&self, vm: &str, peer: &str, side: Side) -> Result<(), String>;
    /// After the guest runs at the target. A failure is reported and changes nothing.
    async fn after_switchover(&self, vm: &str, peer: &str, side: Side) -> Result<(), String>;
    /// Before a guest is taken back without the target's word: makes sure that it does not run
    /// there. A failure leaves everything as it is.
    async fn fence(&self, vm: &str, peer: &str) -> Result<(), String>;
}

/// Makes sessions with one peer.
#[async_trait]
pub trait Dial: Send + Sync {
    /// A new session, or why there is none.
    async fn dial(&self) -> Result<Session, String>;
}
