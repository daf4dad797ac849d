//! How a command talks to the agent of its host: JSON lines over a unix socket.
//!
//! ```text
//! command                                   agent
//!    |-- {"longhaul":1,"body":Request} ------->|
//!    |<------- {"longhaul":1,"body":{"event":Event}} --|   any number, while a job runs
//!    |<------- {"longhaul":1,"body":{"response":..}} --|   exactly one, then both close
//! ```
//!
//! Invariants: one request per connection; every line names the protocol's version before anything
//! else in it is believed; a line has at most [`LINE_BYTES_MAX`] bytes. This is the only language
//! between commands and the agent: what a command can do, a script can do through the socket. The
//! socket has mode 0600, so whoever may open it may do everything; there is no second check.

mod client;
mod failure;
mod index;
mod limits;
mod line;
mod load;
mod message;
mod metrics;
mod store;
mod verify;

pub use crate::migration::chain;
pub use client::{Call, CallError, call};
pub use failure::{Failure, FailureKind};
pub use index::{IndexProgress, IndexRequest, IndexSummary, IndexWork, IndexedImage, IndexedState};
pub use limits::{JobLimits, Limit, LimitChange, LimitRequest, Limits};
pub use line::{LineError, read_line, write_line};
pub use load::{
    EvacuationView, HostLoad, HostView, LinkLoad, OrderOutcome, OrderView, PlanRecord, PlanView,
    VmLoad,
};
pub use longhaul_transport::BitRate;
pub use message::{
    Adopted, Answer, BestTime, Checked, DrainRequest, EvacuateRequest, Event, FetchRequest,
    ImageName, InDoubt, JobKind, JobOutcome, JobQuestion, JobRecord, JobStand, JobSummary,
    MoveRequest, OwnIdentity, PeerSummary, PullRequest, PushRequest, Reply, Request, Response,
    Status, VmDetail, VmSource, VmSummary, WaitView,
};
pub use metrics::{METRICS_MEDIA_TYPE, Metric, MetricKind, Sample, metrics_text};
pub use store::{Garbage, GarbageKind, GcRequest, GcSummary};
pub use verify::VerifySummary;

/// Version of this language; raised when an old command or agent would misread the new one.
pub const VERSION: u16 = 1;

/// Longest line in either direction, its end included. A VM description of a few KiB and a status
/// with all of an agent's VMs and jobs stay far below.
pub const LINE_BYTES_MAX: usize = 1 << 20;
