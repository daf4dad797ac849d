//! What is known of an agent, and the numbers that come of it.

use std::time::Duration;

use longhaul_transport::ClassBytes;

use super::*;
use crate::agent::links::{Carried, Path};
use crate::control::{
    EvacuationView, Failure, HostView, MetricKind, OrderOutcome, OwnIdentity, VmSummary,
    metrics_text,
};
use crate::migration::report::{Downtime, LinkReport, PhaseReport, Saved};
use crate::migration::{Completed, Phase, Progress};

fn at(second: i64) -> Timestamp {
    Timestamp::from_second(second).unwrap()
}

fn limit(cap: &str) -> Limit {
    Limit { set: cap.parse().unwrap(), now: cap.parse().ok(), next: None }
}

/// An agent that has done nothing yet.
fn idle() -> Facts {
    let identity = OwnIdentity {
        name: "paris".into(),
        fingerprint: "LH-0".into(),
        listen: "0.0.0.0:4873".into(),
        reachable: None,
    };
    let status = Status {
        version: "0.1.0".into(),
        identity,
        vms: vec![],
        peers: vec![],
        jobs: vec![],
        in_doubt: vec![],
        recent: vec![],
        waiting: vec![],
    };
    let limits = Limits {
        time_zone: "UTC".into(),
        agent: limit("unlimited"),
        configured: None,
        jobs: vec![],
    };
    Facts {
        started: at(1000),
        status,
        conflicts: [0, 0],
        limits,
        tallies: [JobKind::Seed, JobKind::Migrate].map(Tally::new),
        last_migration: None,
        links: vec![],
        planner: None,
    }
}

#[test]
fn a_planner_tells_what_it_sees_and_what_came_of_its_orders() {
    let host = |name: &str, trouble: Option<&str>| HostView {
        name: name.into(),
        cpu: trouble.is_none().then_some((1.5, 4.0)),
        memory_mib: None,
        vms: vec![],
        is_in_maintenance: false,
        sampled_at_s: Some(900),
        trouble: trouble.map(str::to_owned),
    };
    let evacuation = EvacuationView {
        site: "north".into(),
        to: "south".into(),
        deadline: at(5000),
        is_under_way: true,
        lines: vec![],
        promised: vec!["db1".into(), "db2".into()],
        left_behind: vec![],
        saved: vec!["db1".into()],
        could_save: vec![],
    };
    let glance = Glance {
        hosts: vec![host("lyon", None), host("nice", Some("it does not answer"))],
        moves: Some(2),
        think_s: 0.25,
        orders: vec![OrderOutcome::UnderWay, OrderOutcome::Lost, OrderOutcome::UnderWay],
        evacuation: Some(evacuation),
    };
    assert_lines(
        &Facts { planner: Some(Arc::new(glance)), ..idle() },
        &[
            "longhaul_planner_host_cpu_cores{cores=\"asked\",host=\"lyon\"} 1.5",
            "longhaul_planner_host_heard{host=\"lyon\"} 1",
            "longhaul_planner_host_heard{host=\"nice\"} 0",
            "longhaul_planner_orders{outcome=\"under-way\"} 2",
            "longhaul_planner_orders{outcome=\"failed\"} 0",
            "longhaul_planner_planned_moves 2",
            "longhaul_planner_think_seconds 0.25",
            "longhaul_evacuation_vms{fate=\"saved\",site=\"north\"} 1",
            "longhaul_evacuation_vms{fate=\"promised\",site=\"north\"} 2",
            "longhaul_evacuation_deadline_time_seconds{site=\"north\"} 5000",
        ],
    );
}

fn vm(name: &str, state: &str) -> VmSummary {
    let state = state.to_owned();
    VmSummary { name: name.into(), state, memory_bytes: 1, cpus: 1, disks: 1, adopted: false }
}

fn job() -> JobSummary {
    let progress = Progress {
        vm: "db1".into(),
        peer: "lyon".into(),
        phase: Phase::PreCopy,
        round: 1,
        payload_bytes: 70,
        payload_bytes_total: 100,
        wire_bytes: 40,
        rate_bits_per_s: 800,
        elapsed_ms: 1,
        forecast_left_ms: Some(1500),
        note: None,
        link: Some(Box::new(LinkReport { down_ms: 250, ..LinkReport::default() })),
    };
    JobSummary {
        id: 7,
        kind: JobKind::Migrate,
        vm: "db1".into(),
        peer: "lyon".into(),
        started: at(2000),
        progress,
        limits: None,
    }
}

fn assert_lines(facts: &Facts, lines: &[&str]) {
    let text = metrics_text(&metrics(facts));
    for line in lines {
        assert!(text.lines().any(|known| known == *line), "no `{line}` in\n{text}");
    }
}

#[test]
fn names_follow_the_rules_and_counters_are_there_from_the_start() {
    let all = metrics(&idle());
    for metric in &all {
        let Metric { name, kind, help, samples } = metric;
        assert!(name.starts_with("longhaul_") && help.ends_with('.'), "{metric:?}");
        assert_eq!(*kind == MetricKind::Counter, name.ends_with("_total"), "{name}");
        assert_eq!(all.iter().filter(|other| other.name == *name).count(), 1, "{name}");
        let is_of_a_link = name.starts_with("longhaul_link_");
        assert!(*kind == MetricKind::Gauge || is_of_a_link || !samples.is_empty(), "{name}");
    }
}

#[test]
fn what_wants_an_operator_can_be_alerted_on() {
    let mut facts = idle();
    facts.status.vms =
        vec![vm("a", "running"), vm("b", "running"), vm("c", "unknown: its monitor is silent")];
    facts.status.in_doubt = vec![InDoubt {
        vm: "db1".into(),
        peer: "lyon".into(),
        since: Some(at(1500)),
        detail: "d".into(),
        role: Role::Source,
        attempt: "0a".into(),
        blocks: true,
    }];
    facts.conflicts = [1, 0];
    assert_lines(
        &facts,
        &[
            "longhaul_vms{state=\"running\"} 2",
            "longhaul_vms{state=\"unknown\"} 1",
            "longhaul_vms{state=\"not running\"} 0",
            "longhaul_hand_overs_unsettled{blocking=\"yes\",role=\"source\"} 1",
            "longhaul_hand_overs_unsettled{blocking=\"no\",role=\"target\"} 0",
            "longhaul_hand_over_unsettled_since_seconds{attempt=\"0a\",blocking=\"yes\",\
             peer=\"lyon\",role=\"source\",vm=\"db1\"} 1500",
            "longhaul_conflicts_total{conflict=\"ran-twice\"} 1",
        ],
    );
}

#[test]
fn a_job_has_numbers_while_it_runs_and_adds_to_the_sums_when_it_has_ended() {
    let mut facts = idle();
    facts.status.jobs = vec![job()];
    assert_lines(
        &facts,
        &[
            "longhaul_jobs{kind=\"migrate\",phase=\"pre-copy\"} 1",
            "longhaul_job_payload_bytes{job=\"7\",kind=\"migrate\",peer=\"lyon\",vm=\"db1\"} 70",
            "longhaul_job_wire_bytes_per_second{job=\"7\",kind=\"migrate\",peer=\"lyon\",\
             vm=\"db1\"} 100",
            "longhaul_job_forecast_left_seconds{job=\"7\",kind=\"migrate\",peer=\"lyon\",\
             vm=\"db1\"} 1.5",
            "longhaul_job_link_down_seconds{job=\"7\",kind=\"migrate\",peer=\"lyon\",\
             vm=\"db1\"} 0.25",
        ],
    );

    facts.status.jobs.clear();
    let phase = PhaseReport { payload_bytes: 4096, wire_bytes: 100, ..PhaseReport::default() };
    let completed = Completed {
        vm: "db1".into(),
        phases: vec![("pre-copy".into(), phase)],
        saved: Saved { memory_zero_bytes: 3000, ..Saved::default() },
        downtime: Some(Downtime { total_ms: 125.0, ..Downtime::default() }),
        ..Completed::default()
    };
    let outcome = JobOutcome::Completed(Box::new(completed));
    facts.tallies[1].add(&outcome);
    facts.tallies[1].add(&outcome);
    facts.tallies[1].add(&JobOutcome::Failed(Failure::refused("x", "y")));
    facts.last_migration = Some(JobRecord {
        id: 7,
        kind: JobKind::Migrate,
        vm: "db1".into(),
        peer: "lyon".into(),
        started: at(2000),
        ended: at(3000),
        outcome,
    });
    assert_lines(
        &facts,
        &[
            "longhaul_jobs_ended_total{kind=\"migrate\",outcome=\"completed\"} 2",
            "longhaul_jobs_ended_total{kind=\"migrate\",outcome=\"refused\"} 1",
            "longhaul_jobs_ended_total{kind=\"seed\",outcome=\"completed\"} 0",
            "longhaul_completed_payload_bytes_total{kind=\"migrate\",phase=\"pre-copy\"} 8192",
            "longhaul_completed_wire_bytes_total{kind=\"migrate\",phase=\"pre-copy\"} 200",
            "longhaul_completed_saved_bytes_total{kind=\"migrate\",means=\"memory-zero\"} 6000",
            "longhaul_migration_downtime_seconds_total 0.25",
            "longhaul_last_migration_downtime_seconds{peer=\"lyon\",vm=\"db1\"} 0.125",
            "longhaul_last_migration_end_time_seconds{peer=\"lyon\",vm=\"db1\"} 3000",
        ],
    );
    assert!(!metrics_text(&metrics(&facts)).contains("longhaul_job_"));
}

#[test]
fn links_and_caps_are_told_by_peer_class_and_scope() {
    let mut facts = idle();
    facts.limits.agent = limit("80M");
    facts.limits.jobs = vec![crate::control::JobLimits {
        vm: "db1".into(),
        rate: limit("unlimited"),
        classes: [("seed".to_owned(), limit("8M"))].into(),
    }];
    let mut carried = Carried { lost_bytes: 5, ..Carried::default() };
    carried.classes[Class::Pages.index()] = ClassBytes { sent: 3, acked: 2, received: 1 };
    let path = Path {
        rtt: Duration::from_millis(80),
        min_rtt: Duration::from_millis(75),
        queueing: Duration::from_millis(5),
        window: 1000,
        pacing: 2000,
        bandwidth: 0,
        connections: 3,
        down: Duration::ZERO,
    };
    let link = PeerLinks { peer: "lyon".into(), living: 1, sessions: 2, carried, path: Some(path) };
    facts.links =
        vec![link.clone(), PeerLinks { peer: "nice".into(), living: 0, path: None, ..link }];
    assert_lines(
        &facts,
        &[
            "longhaul_rate_limit_bytes_per_second{scope=\"agent\"} 10000000",
            "longhaul_rate_limit_info{calendar=\"80M\",scope=\"agent\"} 1",
            "longhaul_rate_limit_bytes_per_second{class=\"seed\",scope=\"class\",vm=\"db1\"} 1000000",
            "longhaul_link_payload_bytes_total{class=\"pages\",direction=\"sent\",peer=\"lyon\"} 3",
            "longhaul_link_payload_bytes_total{class=\"pages\",direction=\"received\",\
             peer=\"lyon\"} 1",
            "longhaul_link_delivered_bytes_total{class=\"pages\",peer=\"lyon\"} 2",
            "longhaul_link_retransmitted_bytes_total{peer=\"nice\"} 5",
            "longhaul_link_queueing_seconds{peer=\"lyon\"} 0.005",
            "longhaul_link_connections{peer=\"lyon\"} 3",
            "longhaul_link_sessions{peer=\"nice\"} 0",
        ],
    );
    let text = metrics_text(&metrics(&facts));
    assert!(!text.contains("longhaul_link_rtt_seconds{peer=\"nice\"}"), "{text}");
    assert!(!text.contains("bytes_per_second{scope=\"job\""), "{text}");
}
