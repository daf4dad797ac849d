//! What commands ask and agents answer.
//!
//! Invariant: these types are the JSON that scripts read, so a field is added, never renamed. They
//! carry plain values; what they mean is decided by the agent.

use std::fmt;

use serde::{Deserialize, Serialize};

use super::failure::Failure;
use super::index::{IndexProgress, IndexRequest, IndexSummary};
use super::limits::{JobLimits, LimitRequest, Limits};
use super::load::{HostLoad, PlanView};
use super::metrics::Metric;
use super::store::{GcRequest, GcSummary};
use super::verify::VerifySummary;
use crate::calendar::{RateCalendar, Windows};
use crate::migration::handover::Choice;
use crate::migration::journal::Role;
use crate::migration::{Completed, Progress};

/// What a command asks.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Request {
    /// Everything worth knowing at a glance.
    Status,
    /// All numbers, for monitoring.
    Metrics,
    /// Who this agent is to others.
    Whoami,
    /// Who answers at an address; nothing is stored.
    Probe {
        /// Host and port.
        address: String,
    },
    /// Trust a peer from now on.
    PairAdd {
        /// Its name here.
        name: String,
        /// Host and port.
        address: String,
        /// Its fingerprint, as it shows it.
        fingerprint: String,
    },
    /// The peers that are trusted.
    PairList,
    /// Trust a peer no longer.
    PairRemove {
        /// Its name here.
        name: String,
    },
    /// Start a VM.
    VmStart(VmSource),
    /// The VMs of this host.
    VmList,
    /// One VM.
    VmShow {
        /// Its name.
        vm: String,
    },
    /// Shut a VM down.
    VmStop {
        /// Its name.
        vm: String,
        /// End its process at once instead of asking the guest.
        force: bool,
    },
    /// Take a VM out of the agent's book; its process and images are left alone.
    VmForget {
        /// Its name.
        vm: String,
    },
    /// Take over a VM that somebody else started.
    VmAdopt {
        /// Its QMP socket.
        qmp: String,
        /// The name that it gets; that of the socket's file if absent.
        name: Option<String>,
    },
    /// Whether a VM could start here, or move to a peer.
    VmCheck {
        /// Which VM.
        vm: VmSource,
        /// The peer.
        to: Option<String>,
    },
    /// Send a VM's disks ahead of time.
    Seed(MoveRequest),
    /// Forget that a VM's disks lie at a peer, and stop tracking what it writes.
    SeedForget {
        /// The VM.
        vm: String,
    },
    /// Move a VM.
    Migrate(MoveRequest),
    /// Follow the job that moves a VM.
    Watch {
        /// The VM.
        vm: String,
    },
    /// Show, build or check the index of images.
    Index(IndexRequest),
    /// Compare an image with its record, however long that takes.
    Verify {
        /// Where it lies.
        image: String,
    },
    /// What lies in the pools and is of no use any more.
    StoreGc(GcRequest),
    /// Change caps, or ask which hold.
    Limit(LimitRequest),
    /// Stop the job that moves a VM; the guest runs on here.
    Cancel {
        /// The VM.
        vm: String,
    },
    /// Decide a hand-over that is in doubt.
    Resolve {
        /// The VM.
        vm: String,
        /// Where it is to run.
        runs: Choice,
        /// Its name once more, typed by whoever takes the risk.
        confirm: String,
    },
    /// Send an image without a VM.
    Push(PushRequest),
    /// Fetch an image from a peer.
    Pull(PullRequest),
    /// A peer's wish: send it an image of this host's pools.
    Fetch(FetchRequest),
    /// A peer's question: how does a job stand that sends to it?
    Job(JobQuestion),
    /// What this host and its VMs have asked for lately.
    Load {
        /// The mean over so many seconds.
        over_s: u64,
    },
    /// What the planner sees and plans.
    Plan,
    /// Empty a host, or show what that would move.
    Drain(DrainRequest),
    /// Empty a site before a deadline, or show what could be saved.
    Evacuate(EvacuateRequest),
}

/// A VM by name, or by a description that was typed.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum VmSource {
    /// A VM that the agent knows.
    Name(String),
    /// A description.
    Description {
        /// The file it came from, for error messages.
        origin: String,
        /// The text.
        text: String,
    },
}

/// What a seed or migration should do.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct MoveRequest {
    /// The VM.
    pub vm: String,
    /// The peer's name here.
    pub to: String,
    /// Downtime that it may take; the agent's own limit if absent.
    #[serde(default)]
    pub downtime_limit_ms: Option<u64>,
    /// Seconds after which it gives up; none if absent.
    #[serde(default)]
    pub deadline_s: Option<u64>,
    /// Cap for this job; the agent's own cap holds in any case.
    #[serde(default)]
    pub rate: Option<RateCalendar>,
    /// Take only what others leave of the link; a migration does not.
    #[serde(default)]
    pub background: bool,
    /// Answer as soon as the job is admitted, not when it ended.
    #[serde(default)]
    pub detach: bool,
    /// Only within these windows: a migration that waits for them, and pauses when they close.
    #[serde(default)]
    pub windows: Option<Windows>,
    /// A migration that waits for the hour in which least of it crosses twice; it needs a deadline.
    #[serde(default)]
    pub best_time: bool,
}

/// What a push should do. Its job goes by the image's path.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct PushRequest {
    /// The image here: an absolute path.
    pub image: String,
    /// The peer's name here.
    pub to: String,
    /// The peer's pool that it is for.
    pub pool: String,
    /// Its file name there.
    pub file: String,
    /// Replace an image of that name.
    #[serde(default)]
    pub replace: bool,
    /// Seconds after which it gives up; none if absent.
    #[serde(default)]
    pub deadline_s: Option<u64>,
    /// Cap for this job; the agent's own cap holds in any case.
    #[serde(default)]
    pub rate: Option<RateCalendar>,
    /// Take only what others leave of the link.
    #[serde(default)]
    pub background: bool,
    /// Answer as soon as the job is admitted, not when it ended.
    #[serde(default)]
    pub detach: bool,
}

/// An image in a pool of some host's.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ImageName {
    /// The pool.
    pub pool: String,
    /// The file name in it.
    pub file: String,
}

impl fmt::Display for ImageName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.pool, self.file)
    }
}

/// What a pull should do. Its job goes by the peer's name, a colon and the image's name there.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct PullRequest {
    /// The peer's name here.
    pub from: String,
    /// What is wanted.
    #[serde(flatten)]
    pub fetch: FetchRequest,
    /// Seconds after which it gives up; none if absent.
    #[serde(default)]
    pub deadline_s: Option<u64>,
    /// Answer as soon as the job is admitted, not when it ended.
    #[serde(default)]
    pub detach: bool,
}

/// An image that a host wants of a peer.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct FetchRequest {
    /// The image at the peer.
    pub image: ImageName,
    /// What it is to be at the host that asks.
    pub to: ImageName,
    /// Replace an image of that name.
    #[serde(default)]
    pub replace: bool,
    /// Cap for the job at the peer; the peer's own cap holds in any case.
    #[serde(default)]
    pub rate: Option<RateCalendar>,
    /// Take only what others leave of the link.
    #[serde(default)]
    pub background: bool,
}

/// A question about a job that sends to whoever asks.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct JobQuestion {
    /// Its number.
    pub id: u64,
    /// It is to end.
    #[serde(default)]
    pub cancel: bool,
}

/// What a drain should do.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct DrainRequest {
    /// The host's name at the planner.
    pub host: String,
    /// Do it; otherwise it is only shown.
    #[serde(default)]
    pub go: bool,
    /// The host takes VMs again.
    #[serde(default)]
    pub undo: bool,
}

/// What an evacuation should do.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct EvacuateRequest {
    /// The site that is emptied.
    pub site: String,
    /// The site that its VMs go to.
    pub to: String,
    /// Seconds after which the site is gone.
    pub deadline_s: u64,
    /// Do it; otherwise it is only shown.
    #[serde(default)]
    pub go: bool,
    /// End the one that is under way: what moves, moves on.
    #[serde(default)]
    pub stop: bool,
}

/// One line of an answer.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Answer {
    /// Something on the way.
    Event(Event),
    /// The end.
    Response(Response),
}

/// Something on the way to the response.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Event {
    /// A job was admitted; it goes on whether or not somebody watches.
    Admitted(JobSummary),
    /// Where the job is.
    Progress(Progress),
    /// Where the work on the index is.
    Indexing(IndexProgress),
    /// Something an operator wants to know.
    Note(String),
}

/// The end of an answer.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Response {
    /// It was done.
    Done(Reply),
    /// It was not.
    Failed(Failure),
}

/// What was done or asked for.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Reply {
    /// It was done, in one sentence.
    Said(String),
    /// Who this agent is.
    Identity(OwnIdentity),
    /// A fingerprint that was seen, and nothing more.
    Probed {
        /// Where.
        address: String,
        /// What answered.
        fingerprint: String,
    },
    /// Peers by name.
    Peers(Vec<PeerSummary>),
    /// VMs by name.
    Vms(Vec<VmSummary>),
    /// One VM.
    Vm(VmDetail),
    /// What was found out about a VM.
    Checked(Checked),
    /// A VM that was taken over.
    Adopted(Adopted),
    /// A job that goes on by itself.
    Started(JobSummary),
    /// A job that reached its end.
    Completed(Box<Completed>),
    /// A job, whether or not it has ended.
    Job(Box<JobStand>),
    /// The index of images.
    Index(Box<IndexSummary>),
    /// An image beside its record.
    Verified(Box<VerifySummary>),
    /// What lies in the pools and is of no use any more.
    Garbage(GcSummary),
    /// The caps that hold.
    Limits(Box<Limits>),
    /// All numbers.
    Metrics(Vec<Metric>),
    /// Everything worth knowing.
    Status(Box<Status>),
    /// A host's load.
    Load(Box<HostLoad>),
    /// What the planner sees and plans.
    Plan(Box<PlanView>),
}

/// Who an agent is to others.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct OwnIdentity {
    /// Its name.
    pub name: String,
    /// Its fingerprint.
    pub fingerprint: String,
    /// The address that it listens on.
    pub listen: String,
    /// The address that others probably reach it at, if one is known.
    pub reachable: Option<String>,
}

/// A peer.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct PeerSummary {
    /// Its name here.
    pub name: String,
    /// Host and port.
    pub address: String,
    /// Its fingerprint.
    pub fingerprint: String,
}

/// A VM in one line.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct VmSummary {
    /// Its name.
    pub name: String,
    /// `running`, `paused`, `stopped`, .. or why that is not known.
    pub state: String,
    /// Memory of the guest.
    pub memory_bytes: u64,
    /// Number of processors.
    pub cpus: u32,
    /// Number of disks.
    pub disks: u32,
    /// Whether somebody else started it.
    pub adopted: bool,
}

/// A VM, whole.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct VmDetail {
    /// In one line.
    pub summary: VmSummary,
    /// Its QMP socket.
    pub qmp: Option<String>,
    /// Its description, as a file for `vm start` would have it.
    pub description: String,
}

/// What was found out about a VM.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Checked {
    /// The VM.
    pub vm: String,
    /// The peer that it could move to, if that was asked.
    pub to: Option<String>,
    /// Why it cannot start or move; empty if it can.
    pub obstacles: Vec<String>,
}

/// A VM that was taken over.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Adopted {
    /// The VM.
    pub vm: String,
    /// The file that describes it now.
    pub file: String,
    /// What of the running VM the description does not hold; empty if it is whole.
    pub not_understood: Vec<String>,
    /// What the description leaves out because it concerns this host only.
    #[serde(default)]
    pub notes: Vec<String>,
}

/// What a job does.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum JobKind {
    /// Sends disks ahead of time.
    Seed,
    /// Moves a VM.
    Migrate,
    /// Sends an image without a VM.
    Push,
    /// Has a peer send one.
    Pull,
}

impl JobKind {
    /// The thing rather than the deed: `migration` for `migrate`.
    pub fn noun(self) -> &'static str {
        match self {
            Self::Seed => "seed",
            Self::Migrate => "migration",
            Self::Push => "push",
            Self::Pull => "pull",
        }
    }

    /// The word before the peer's name.
    pub fn preposition(self) -> &'static str {
        if self == Self::Pull { "from" } else { "to" }
    }
}

impl fmt::Display for JobKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Seed => "seed",
            Self::Migrate => "migrate",
            Self::Push => "push",
            Self::Pull => "pull",
        })
    }
}

/// A job that runs.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct JobSummary {
    /// Its number, unique at this agent.
    pub id: u64,
    /// What it does.
    pub kind: JobKind,
    /// The VM.
    pub vm: String,
    /// The peer's name here.
    pub peer: String,
    /// When it started.
    pub started: jiff::Timestamp,
    /// Where it is.
    pub progress: Progress,
    /// Its own caps, if it has any.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub limits: Option<Box<JobLimits>>,
}

/// A job that ended.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct JobRecord {
    /// Its number.
    pub id: u64,
    /// What it did.
    pub kind: JobKind,
    /// The VM.
    pub vm: String,
    /// The peer's name here.
    pub peer: String,
    /// When it started.
    pub started: jiff::Timestamp,
    /// When it ended.
    pub ended: jiff::Timestamp,
    /// How it ended.
    pub outcome: JobOutcome,
}

/// A job, whether or not it has ended.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum JobStand {
    /// It runs.
    Runs(JobSummary),
    /// It has ended.
    Ended(JobRecord),
}

/// How a job ended.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum JobOutcome {
    /// As it should.
    Completed(Box<Completed>),
    /// Otherwise.
    Failed(Failure),
}

/// A hand-over that is not settled.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct InDoubt {
    /// The VM.
    pub vm: String,
    /// The other side's name here.
    pub peer: String,
    /// Since when.
    pub since: Option<jiff::Timestamp>,
    /// What is known, in a sentence.
    pub detail: String,
    /// Which half this host plays.
    pub role: Role,
    /// The attempt, as the journals of both sides name it.
    pub attempt: String,
    /// Whether nothing else may be done with the VM here until it is settled; if not, only the other
    /// side has still to hear of it.
    pub blocks: bool,
}

/// Everything worth knowing at a glance.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Status {
    /// Version of the agent's program.
    pub version: String,
    /// Who it is.
    pub identity: OwnIdentity,
    /// Its VMs.
    pub vms: Vec<VmSummary>,
    /// Its peers.
    pub peers: Vec<PeerSummary>,
    /// What runs.
    pub jobs: Vec<JobSummary>,
    /// What an operator must look at.
    pub in_doubt: Vec<InDoubt>,
    /// What ended lately, newest first.
    pub recent: Vec<JobRecord>,
    /// Moves that wait for a window.
    #[serde(default)]
    pub waiting: Vec<WaitView>,
}

/// A move that waits for a window.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct WaitView {
    /// The VM.
    pub vm: String,
    /// The peer's name here.
    pub to: String,
    /// Its windows, as they were typed.
    pub windows: String,
    /// One of them is now.
    pub is_open: bool,
    /// When that changes.
    pub until: Option<jiff::Timestamp>,
    /// When it is given up.
    pub deadline: Option<jiff::Timestamp>,
    /// Its disks have gone ahead.
    pub seeded: bool,
    /// How its last job ended, if that was not as it should.
    pub trouble: Option<String>,
    /// What is thought of its best time; nothing if it waits for none, or too little is known.
    #[serde(default)]
    pub best_time: Option<BestTime>,
}

/// When a VM is thought to go best, and what that saves.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct BestTime {
    /// When it is thought to start.
    pub starts: Option<jiff::Timestamp>,
    /// When it is thought to have arrived; nothing if that is thought to be too late.
    pub ends: Option<jiff::Timestamp>,
    /// MiB that it is thought to send then, with a little for the wait.
    pub cost_mib: u64,
    /// MiB that it would send now; nothing if it may not.
    pub now_mib: Option<u64>,
    /// In how many of a hundred courses that its last days suggest it would arrive in time.
    pub in_time_percent: u8,
}

#[cfg(test)]
mod tests {
    use serde_json::{from_value, json, to_value};

    use super::*;

    /// The JSON that scripts write and read; what is here may get more fields and loses none.
    #[test]
    fn the_language_keeps_its_spelling() {
        let requests = [
            (json!("status"), Request::Status),
            (json!("plan"), Request::Plan),
            (json!({"load": {"over_s": 60}}), Request::Load { over_s: 60 }),
            (
                json!({"drain": {"host": "lyon", "go": true}}),
                Request::Drain(DrainRequest { host: "lyon".into(), go: true, undo: false }),
            ),
            (json!({"watch": {"vm": "db1"}}), Request::Watch { vm: "db1".into() }),
            (json!({"vm-start": {"name": "db1"}}), Request::VmStart(VmSource::Name("db1".into()))),
            (
                json!({"migrate": {"vm": "db1", "to": "lyon", "rate": "20M"}}),
                Request::Migrate(MoveRequest {
                    vm: "db1".into(),
                    to: "lyon".into(),
                    downtime_limit_ms: None,
                    deadline_s: None,
                    rate: "20M".parse().ok(),
                    background: false,
                    detach: false,
                    windows: None,
                    best_time: false,
                }),
            ),
            (
                json!({"pull": {"from": "lyon", "image": {"pool": "default", "file": "a.raw"},
                    "to": {"pool": "fast", "file": "b.raw"}}}),
                Request::Pull(PullRequest {
                    from: "lyon".into(),
                    fetch: FetchRequest {
                        image: ImageName { pool: "default".into(), file: "a.raw".into() },
                        to: ImageName { pool: "fast".into(), file: "b.raw".into() },
                        replace: false,
                        rate: None,
                        background: false,
                    },
                    deadline_s: None,
                    detach: false,
                }),
            ),
            (
                json!({"limit": {"vm": "db1", "classes": {"seed": "08:00-20:00=1M, else=2M"}}}),
                Request::Limit(LimitRequest {
                    vm: Some("db1".into()),
                    classes: [("seed".into(), "08:00-20:00=1M, else=2M".parse().unwrap())].into(),
                    ..LimitRequest::default()
                }),
            ),
        ];
        for (written, meant) in requests {
            assert_eq!(from_value::<Request>(written).unwrap(), meant);
            let read_back = from_value::<Request>(to_value(&meant).unwrap()).unwrap();
            assert_eq!(read_back, meant);
        }
        let failed = Answer::Response(Response::Failed(Failure::refused("no", "ask again")));
        let failed_json = json!({"response": {"failed":
            {"kind": "refused", "what": "no", "state": "", "next": "ask again"}}});
        assert_eq!(to_value(&failed).unwrap(), failed_json);
        let note = Answer::Event(Event::Note("link down".into()));
        assert_eq!(to_value(&note).unwrap(), json!({"event": {"note": "link down"}}));
        let completed = Completed { vm: "db1".into(), ..Completed::default() };
        let done = Answer::Response(Response::Done(Reply::Completed(Box::new(completed))));
        assert_eq!(to_value(&done).unwrap()["response"]["done"]["completed"]["vm"], "db1");
    }

    #[test]
    fn a_newer_answer_with_more_fields_is_understood() {
        let peer = json!({"name": "lyon", "address": "a:1", "fingerprint": "LH", "colour": "red"});
        assert_eq!(from_value::<PeerSummary>(peer).unwrap().name, "lyon");
    }
}
