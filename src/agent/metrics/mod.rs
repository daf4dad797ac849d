//! What the agent knows, as numbers for monitoring.
//!
//! Invariant: counters only grow while the agent lives, and each has its value from the start, 0
//! included. What belongs to one job vanishes with the job; so the number of series has a limit.
//! Units are bytes and seconds. No name is one that node_exporter has, too: its textfile collector
//! would refuse the file (hence no `process_start_time_seconds`).

pub(super) mod http;
mod planner;

use std::sync::Arc;

use jiff::Timestamp;
use longhaul_transport::Class;

use super::links::PeerLinks;
use super::scheduling::Glance;
use super::tally::{OUTCOMES, PHASES, Tally};
use crate::control::{
    InDoubt, JobKind, JobOutcome, JobRecord, JobSummary, Limit, Limits, Metric, Status,
};
use crate::migration::journal::Role;

/// Hand-overs in doubt that are named; all are counted.
const DOUBTS_NAMED_MAX: usize = 100;
/// How VMs stand, as `vm list` says it; whatever else it says is `unknown`.
const VM_STATES: [&str; 7] =
    ["running", "paused", "parked", "incoming", "stopped", "not running", UNKNOWN];
const UNKNOWN: &str = "unknown";

/// What is known.
pub(super) struct Facts {
    /// When the agent started.
    pub(super) started: Timestamp,
    pub(super) status: Status,
    /// Conflicts so far: guests that ran twice, guests that run nowhere.
    pub(super) conflicts: [u64; 2],
    pub(super) limits: Limits,
    pub(super) tallies: [Tally; 2],
    pub(super) last_migration: Option<JobRecord>,
    pub(super) links: Vec<PeerLinks>,
    /// What its planner has seen and done, if it plans.
    pub(super) planner: Option<Arc<Glance>>,
}

/// All numbers.
pub(super) fn metrics(facts: &Facts) -> Vec<Metric> {
    let Facts { started, status, conflicts, limits, tallies, last_migration, links, planner } =
        facts;
    let mut all = vec![
        Metric::gauge("longhaul_build_info", "The agent's version; always 1.")
            .with(&[("version", &status.version)], 1.0),
        Metric::gauge("longhaul_start_time_seconds", "When the agent started, in Unix time.")
            .with(&[], unix(*started)),
        Metric::gauge("longhaul_peers", "Paired peers.").with(&[], status.peers.len() as f64),
        vms(status),
    ];
    all.extend(doubts(&status.in_doubt, *conflicts));
    all.extend(running(&status.jobs));
    all.extend(ended(tallies, last_migration.as_ref()));
    all.extend(caps(limits));
    all.extend(carried(links));
    all.extend(paths(links));
    all.extend(planner.iter().flat_map(|glance| planner::planner(glance)));
    all
}

fn vms(status: &Status) -> Metric {
    let mut metric = Metric::gauge("longhaul_vms", "VMs of this host, by state.");
    let state = |state: &str| VM_STATES.iter().find(|known| **known == state).copied();
    for known in VM_STATES {
        let such = status.vms.iter().filter(|vm| state(&vm.state).unwrap_or(UNKNOWN) == known);
        metric.add(&[("state", known)], such.count() as f64);
    }
    metric
}

fn doubts(doubts: &[InDoubt], conflicts: [u64; 2]) -> [Metric; 3] {
    let role = |role| match role {
        Role::Source => "source",
        Role::Target => "target",
    };
    let mut count = Metric::gauge(
        "longhaul_hand_overs_unsettled",
        "Hand-overs that are not settled. Blocking: the VM may not be touched until it is settled.",
    );
    for of in [Role::Source, Role::Target] {
        for blocks in [true, false] {
            let such = doubts.iter().filter(|doubt| doubt.role == of && doubt.blocks == blocks);
            let labels = [("role", role(of)), ("blocking", yes(blocks))];
            count.add(&labels, such.count() as f64);
        }
    }
    let mut since = Metric::gauge(
        "longhaul_hand_over_unsettled_since_seconds",
        "Since when a hand-over is not settled, in Unix time.",
    );
    for doubt in doubts.iter().take(DOUBTS_NAMED_MAX) {
        let labels = [
            ("vm", doubt.vm.as_str()),
            ("peer", &doubt.peer),
            ("attempt", &doubt.attempt),
            ("role", role(doubt.role)),
            ("blocking", yes(doubt.blocks)),
        ];
        if let Some(at) = doubt.since {
            since.add(&labels, unix(at));
        }
    }
    let [ran_twice, runs_nowhere] = conflicts;
    let found = Metric::counter(
        "longhaul_conflicts_total",
        "Conflicts that two journals have shown after an operator's decision.",
    )
    .with(&[("conflict", "ran-twice")], ran_twice as f64)
    .with(&[("conflict", "runs-nowhere")], runs_nowhere as f64);
    [count, since, found]
}

fn running(jobs: &[JobSummary]) -> Vec<Metric> {
    let mut count = Metric::gauge("longhaul_jobs", "Jobs that run, by phase.");
    for kind in [JobKind::Seed, JobKind::Migrate] {
        for phase in PHASES {
            let such = jobs.iter().filter(|job| job.kind == kind && job.progress.phase == phase);
            let labels = [("kind", &*kind.to_string()), ("phase", &phase.to_string())];
            count.add(&labels, such.count() as f64);
        }
    }
    let gauge = |name: &str, help: &str, value: &dyn Fn(&JobSummary) -> Option<f64>| {
        let mut metric = Metric::gauge(name, help);
        for job in jobs {
            let (id, kind) = (job.id.to_string(), job.kind.to_string());
            let labels = [("job", &*id), ("kind", &kind), ("vm", &job.vm), ("peer", &job.peer)];
            if let Some(value) = value(job) {
                metric.add(&labels, value);
            }
        }
        metric
    };
    vec![
        count,
        gauge("longhaul_job_start_time_seconds", "When the job started, in Unix time.", &|job| {
            Some(unix(job.started))
        }),
        gauge(
            "longhaul_job_payload_bytes",
            "Payload that the job has dealt with in its present phase.",
            &|job| Some(job.progress.payload_bytes as f64),
        ),
        gauge(
            "longhaul_job_payload_expected_bytes",
            "Payload of the job's present phase, as far as is known.",
            &|job| Some(job.progress.payload_bytes_total as f64),
        ),
        gauge(
            "longhaul_job_wire_bytes",
            "Bytes on the wire in both directions since the job's attempt began.",
            &|job| Some(job.progress.wire_bytes as f64),
        ),
        gauge(
            "longhaul_job_wire_bytes_per_second",
            "Rate on the wire over the last seconds, in both directions.",
            &|job| Some(job.progress.rate_bits_per_s as f64 / 8.0),
        ),
        gauge(
            "longhaul_job_forecast_left_seconds",
            "Expected time to the job's end, where there is ground for a forecast.",
            &|job| job.progress.forecast_left_ms.map(|ms| ms as f64 / 1000.0),
        ),
        gauge(
            "longhaul_job_link_down_seconds",
            "For how long the job has been waiting for its link; 0 while that is up.",
            &|job| job.progress.link.as_ref().map(|link| link.down_ms as f64 / 1000.0),
        ),
    ]
}

fn ended(tallies: &[Tally], last: Option<&JobRecord>) -> Vec<Metric> {
    let mut count =
        Metric::counter("longhaul_jobs_ended_total", "Jobs that have ended, by how they ended.");
    let mut payload = Metric::counter(
        "longhaul_completed_payload_bytes_total",
        "Payload of completed jobs, before anything made it smaller.",
    );
    let mut wire = Metric::counter(
        "longhaul_completed_wire_bytes_total",
        "What completed jobs have put on the wire, in both directions.",
    );
    let mut saved = Metric::counter(
        "longhaul_completed_saved_bytes_total",
        "Payload of completed jobs that did not have to be sent as it is, by the reason.",
    );
    let mut downtime = Metric::counter(
        "longhaul_migration_downtime_seconds_total",
        "Downtime of all completed migrations.",
    );
    for tally in tallies {
        let kind = tally.kind.to_string();
        for (outcome, ended) in OUTCOMES.iter().zip(tally.outcomes) {
            count.add(&[("kind", &kind), ("outcome", outcome)], ended as f64);
        }
        for (phase, (payload_bytes, wire_bytes)) in PHASES.iter().zip(tally.phases) {
            let labels = [("kind", &*kind), ("phase", &phase.to_string())];
            payload.add(&labels, payload_bytes as f64);
            wire.add(&labels, wire_bytes as f64);
        }
        for (means, bytes) in [
            ("disk-zero", tally.saved.disk_zero_bytes),
            ("disk-known", tally.saved.disk_known_bytes),
            ("disk-compressed", tally.saved.disk_compressed_bytes),
            ("memory-zero", tally.saved.memory_zero_bytes),
            ("memory-repeated", tally.saved.memory_repeated_bytes),
            ("memory-on-disk", tally.saved.memory_on_disk_bytes),
            ("memory-superseded", tally.saved.memory_superseded_bytes),
            ("memory-delta", tally.saved.memory_delta_bytes),
            ("memory-compressed", tally.saved.memory_compressed_bytes),
        ] {
            saved.add(&[("kind", &kind), ("means", means)], bytes as f64);
        }
        if tally.kind == JobKind::Migrate {
            downtime.add(&[], tally.downtime_ms / 1000.0);
        }
    }
    let mut last_end = Metric::gauge(
        "longhaul_last_migration_end_time_seconds",
        "When the last completed migration ended, in Unix time; kept over restarts.",
    );
    let mut last_downtime = Metric::gauge(
        "longhaul_last_migration_downtime_seconds",
        "Downtime of the last completed migration.",
    );
    if let Some(JobRecord { vm, peer, ended, outcome: JobOutcome::Completed(completed), .. }) = last
    {
        let labels = [("vm", vm.as_str()), ("peer", peer)];
        last_end.add(&labels, unix(*ended));
        if let Some(downtime) = &completed.downtime {
            last_downtime.add(&labels, downtime.total_ms / 1000.0);
        }
    }
    vec![count, payload, wire, saved, downtime, last_end, last_downtime]
}

fn caps(limits: &Limits) -> [Metric; 3] {
    let mut now = Metric::gauge(
        "longhaul_rate_limit_bytes_per_second",
        "The cap that holds now; absent where there is none now.",
    );
    let mut next = Metric::gauge(
        "longhaul_rate_limit_change_time_seconds",
        "When the calendar changes the cap next, in Unix time; absent if it never does.",
    );
    let mut set = Metric::gauge("longhaul_rate_limit_info", "The cap as it was set; always 1.");
    let mut add = |labels: &[(&str, &str)], limit: &Limit| {
        if let Some(rate) = limit.now {
            now.add(labels, rate.bits_per_second() as f64 / 8.0);
        }
        if let Some(change) = &limit.next {
            next.add(labels, unix(change.at));
        }
        set.add(&[labels, &[("calendar", &*limit.set.to_string())]].concat(), 1.0);
    };
    add(&[("scope", "agent")], &limits.agent);
    for job in &limits.jobs {
        add(&[("scope", "job"), ("vm", &job.vm)], &job.rate);
        for (class, limit) in &job.classes {
            add(&[("scope", "class"), ("vm", &job.vm), ("class", class)], limit);
        }
    }
    [now, next, set]
}

fn carried(links: &[PeerLinks]) -> Vec<Metric> {
    let counter = |name: &str, help: &str, value: &dyn Fn(&PeerLinks) -> u64| {
        let mut metric = Metric::counter(name, help);
        for link in links {
            metric.add(&[("peer", &link.peer)], value(link) as f64);
        }
        metric
    };
    let mut wire = Metric::counter(
        "longhaul_link_wire_bytes_total",
        "Bytes on the wire, with all headers down to IP's and repetitions.",
    );
    let mut payload = Metric::counter(
        "longhaul_link_payload_bytes_total",
        "Payload handed to the link or received from it, each byte once.",
    );
    let mut delivered = Metric::counter(
        "longhaul_link_delivered_bytes_total",
        "Payload sent that is known to be at the peer: its rate is the goodput.",
    );
    for PeerLinks { peer, carried, .. } in links {
        wire.add(&[("peer", peer), ("direction", "sent")], carried.wire_bytes_sent as f64);
        wire.add(&[("peer", peer), ("direction", "received")], carried.wire_bytes_received as f64);
        for (class, bytes) in Class::ALL.into_iter().zip(carried.classes) {
            let of =
                |direction| [("peer", &**peer), ("class", class.name()), ("direction", direction)];
            payload.add(&of("sent"), bytes.sent as f64);
            payload.add(&of("received"), bytes.received as f64);
            delivered.add(&[("peer", peer), ("class", class.name())], bytes.acked as f64);
        }
    }
    vec![
        counter("longhaul_link_sessions_total", "Sessions, whoever opened them.", &|link| {
            link.sessions
        }),
        wire,
        payload,
        delivered,
        counter(
            "longhaul_link_retransmitted_bytes_total",
            "Bytes of packets that were taken for lost; their content was sent again.",
            &|link| link.carried.lost_bytes,
        ),
        counter("longhaul_link_sent_packets_total", "Packets sent.", &|link| {
            link.carried.sent_packets
        }),
        counter("longhaul_link_lost_packets_total", "Packets taken for lost.", &|link| {
            link.carried.lost_packets
        }),
        counter(
            "longhaul_link_reconnects_total",
            "How often a session has gone on over another connection.",
            &|link| link.carried.reconnects,
        ),
    ]
}

fn paths(links: &[PeerLinks]) -> Vec<Metric> {
    let mut living = Metric::gauge("longhaul_link_sessions", "Sessions that are open.");
    let names = [
        ("longhaul_link_rtt_seconds", "Smoothed round trip; the longest of the open sessions."),
        ("longhaul_link_min_rtt_seconds", "Lowest round trip that an open session has seen."),
        (
            "longhaul_link_queueing_seconds",
            "What a packet waits beyond the lowest round trip: the queue, ours and that of others.",
        ),
        ("longhaul_link_window_bytes", "Congestion window, over the open sessions."),
        (
            "longhaul_link_pacing_bytes_per_second",
            "Rate at which packets leave at most; 0 if that is not known.",
        ),
        (
            "longhaul_link_bandwidth_bytes_per_second",
            "What the path is thought to deliver; 0 if that is not known.",
        ),
        (
            "longhaul_link_connections",
            "Connections of the open sessions: more than one each where a core is the limit.",
        ),
        ("longhaul_link_down_seconds", "For how long the link has been down; 0 if it is up."),
    ];
    let mut metrics = names.map(|(name, help)| Metric::gauge(name, help));
    for link in links {
        let labels = [("peer", link.peer.as_str())];
        living.add(&labels, link.living as f64);
        let Some(path) = &link.path else { continue };
        let values = [
            path.rtt.as_secs_f64(),
            path.min_rtt.as_secs_f64(),
            path.queueing.as_secs_f64(),
            path.window as f64,
            path.pacing as f64,
            path.bandwidth as f64,
            f64::from(path.connections),
            path.down.as_secs_f64(),
        ];
        for (metric, value) in metrics.iter_mut().zip(values) {
            metric.add(&labels, value);
        }
    }
    [living].into_iter().chain(metrics).collect()
}

fn unix(at: Timestamp) -> f64 {
    at.as_millisecond() as f64 / 1000.0
}

fn yes(is: bool) -> &'static str {
    if is { "yes" } else { "no" }
}

#[cfg(test)]
mod tests;
