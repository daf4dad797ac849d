//! What a host says of its load, and what the planner says of many.
//!
//! Invariant: as for all messages: plain values, and a field is added, never renamed. A report says how
//! old its newest sample is instead of when that was: no two hosts' clocks are compared.

use std::collections::BTreeMap;

use longhaul_scheduler::decision::Plan;
use longhaul_scheduler::forecast::Forecast;
use longhaul_scheduler::policy::Policy;
use longhaul_scheduler::state::State;
use serde::{Deserialize, Serialize};

use super::message::{JobRecord, JobSummary};

/// A host and what is asked of it.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct HostLoad {
    /// Its own name.
    pub name: String,
    /// Its fingerprint.
    pub fingerprint: String,
    /// Milliseconds since the newest sample; none if there is none yet.
    pub age_ms: Option<u64>,
    /// Cores that its VMs may use.
    pub cores: f64,
    /// Cores asked for: used and waited for, of the host and its VMs, over the last while.
    pub cpu: f64,
    /// Memory that its VMs may use, in MiB.
    pub memory_mib: u64,
    /// Share of the last ten seconds in which something waited for a CPU, where the kernel tells
    /// (`/proc/pressure/cpu`, avg10).
    #[serde(default)]
    pub pressure: Option<f64>,
    /// Bytes a second received and sent by all its interfaces but loopback.
    #[serde(default)]
    pub network_bytes_s: (f64, f64),
    /// Bytes a second that it may send now, if its operator has set a cap.
    #[serde(default)]
    pub cap_bytes_s: Option<f64>,
    /// Its VMs.
    pub vms: Vec<VmLoad>,
    /// Links that have carried something.
    pub links: Vec<LinkLoad>,
    /// Jobs that run.
    pub jobs: Vec<JobSummary>,
    /// Jobs that ended lately, newest first.
    pub recent: Vec<JobRecord>,
}

/// A VM and what it asks for.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct VmLoad {
    /// Its name.
    pub name: String,
    /// Its process runs.
    pub runs: bool,
    /// Cores used and waited for over the last while; none as long as that cannot be said.
    #[serde(default)]
    pub cpu: Option<f64>,
    /// Its processors.
    pub vcpus: u32,
    /// Memory of the guest, in MiB.
    pub memory_mib: u64,
    /// What its images hold, in MiB, as far as that can be seen.
    pub disk_mib: u64,
    /// Bytes a second written to its disks.
    #[serde(default)]
    pub written_bytes_s: f64,
    /// Where its disks were seeded to, by fingerprint.
    #[serde(default)]
    pub seeded_at: Option<String>,
}

/// What is known of the way to a peer.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct LinkLoad {
    /// The peer's fingerprint.
    pub peer: String,
    /// Lowest round trip seen, in milliseconds.
    pub rtt_ms: f64,
    /// Bytes a second that the path was last seen to deliver.
    pub bytes_s: f64,
}

/// What `longhaul plan` shows.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct PlanView {
    /// Moves that balance or consolidate are made, not only planned.
    pub acts: bool,
    /// What is known of each host.
    pub hosts: Vec<HostView>,
    /// The plan; none before the first one.
    pub plan: Option<Plan>,
    /// Why there is none.
    #[serde(default)]
    pub without: Option<String>,
    /// What each VM is expected to ask for.
    #[serde(default)]
    pub forecasts: BTreeMap<String, Forecast>,
    /// Moves that were ordered, newest first.
    pub orders: Vec<OrderView>,
    /// The evacuation that is under way, or planned if only that was asked.
    #[serde(default)]
    pub evacuation: Option<EvacuationView>,
}

/// A host, as the planner sees it.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct HostView {
    /// Its name here.
    pub name: String,
    /// Cores asked for and cores that there are; none if it was never heard.
    pub cpu: Option<(f64, f64)>,
    /// MiB of memory that VMs have, and that there are.
    pub memory_mib: Option<(u64, u64)>,
    /// Its VMs.
    pub vms: Vec<String>,
    /// It is to be emptied.
    pub is_in_maintenance: bool,
    /// When its newest sample was taken, in Unix time.
    pub sampled_at_s: Option<i64>,
    /// Why it could not be asked the last time.
    pub trouble: Option<String>,
}

/// A move that was ordered.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct OrderView {
    /// The VM.
    pub vm: String,
    /// The host that it leaves.
    pub from: String,
    /// The host that it goes to.
    pub to: String,
    /// When it was ordered.
    pub at: jiff::Timestamp,
    /// Why, in a sentence.
    pub because: String,
    /// MiB that it was thought to send, and seconds that it was thought to take.
    pub forecast: (u64, f64),
    /// How it went.
    pub outcome: OrderOutcome,
}

/// How an order went.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum OrderOutcome {
    /// It is under way.
    UnderWay,
    /// The VM arrived: MiB on the wire, seconds, and milliseconds of downtime.
    Done {
        /// MiB on the wire.
        wire_mib: u64,
        /// Seconds.
        took_s: f64,
        /// Milliseconds in which the guest stood still.
        downtime_ms: f64,
    },
    /// It did not.
    Failed {
        /// Why.
        what: String,
    },
    /// Nobody knows: the host that was told to forgot it, or is not heard.
    Lost,
}

/// An evacuation.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct EvacuationView {
    /// The site that is emptied.
    pub site: String,
    /// Where to.
    pub to: String,
    /// When the site is gone.
    pub deadline: jiff::Timestamp,
    /// It is carried out; otherwise it is only a plan.
    pub is_under_way: bool,
    /// What the planner says, line by line.
    pub lines: Vec<String>,
    /// VMs that are promised, in order.
    pub promised: Vec<String>,
    /// VMs that will not make it.
    pub left_behind: Vec<String>,
    /// VMs that have arrived.
    pub saved: Vec<String>,
    /// Weight that could be saved by so many seconds from now.
    pub could_save: Vec<(i64, f64)>,
}

/// A plan with everything that it was made of: one line of `plans.jsonl` in the planner's state folder.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct PlanRecord {
    /// What was known.
    pub state: State,
    /// What was expected of each of the state's VMs.
    pub forecasts: Vec<Forecast>,
    /// What was allowed.
    pub policy: Policy,
    /// What came of it; it has the time and the seed.
    pub plan: Plan,
}
