//! What breaks on the way, in every phase: the guest runs on at its source, nothing of ours stays in
//! its QEMU, and the next try goes on where the last one ended.

use std::time::Instant;

use longhaul_bench::netns::Side;
use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;

use super::stage::{IN_FLIGHT_BYTES, LOOK_PERIOD, PATIENCE, Setting, Stage};

/// What breaks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Fault {
    SourceAgent,
    TargetAgent,
    TargetQemu,
    Link,
    Cancelled,
}

/// A phase, and the payload that must have gone in it before something breaks.
const SEED: (&str, u64) = ("seed", 24 << 20);
const SYNC: (&str, u64) = ("sync", 0);
const PRE_COPY: (&str, u64) = ("pre-copy", 24 << 20);

/// How fast the guest writes its disk by default, in bytes a second.
const WRITING: u64 = 256 << 10;
/// Enough for a sync round of some seconds.
const WRITING_MUCH: u64 = 1024 << 10;

fn breaks(test: &str, fault: Fault, phases: &[(&str, u64)]) {
    let (append, writing) = match phases.contains(&SYNC) {
        true => ("survivor.disk_kib_s=1024", WRITING_MUCH),
        false => ("", WRITING),
    };
    let setting = Setting { rate_mbit: 30, append, ..Setting::default() };
    let Some(mut stage) = Stage::with_guest(test, &setting) else { return };
    if [Fault::Link, Fault::TargetAgent].contains(&fault) {
        stage.take_patience();
    }
    let mut sent_bytes = 0;
    let mut last = Instant::now();
    for &(phase, bytes) in phases {
        eprintln!("{test}: {fault:?} in {phase}");
        let job = stage.begin("migrate");
        let progress = stage.until(job, phase, bytes);
        last = Instant::now();
        inject(&mut stage, fault, job);
        stage.assert_untouched();
        if phase == "seed" {
            sent_bytes += progress["wire_bytes"].as_u64().unwrap();
        }
    }
    let report = stage.migrate();
    let written = writing * last.elapsed().as_secs();
    stage.assert_moved();
    let known = report["saved"]["disk_known_bytes"].as_u64().unwrap();
    let in_flight = IN_FLIGHT_BYTES * phases.len() as u64;
    assert!(
        known + in_flight >= sent_bytes,
        "of {sent_bytes} bytes {known} were found: {report:#}"
    );
    if phases.last() == Some(&PRE_COPY) {
        // The disk had arrived whole: only its hashes and what was written since are sent.
        let seed = &report["phases"][0];
        assert_eq!(seed[0], "seed");
        let wire = seed[1]["wire_bytes"].as_u64().unwrap();
        let whole = seed[1]["payload_bytes"].as_u64().unwrap();
        eprintln!("{test}: {wire} of {whole} bytes were sent again");
        assert!(wire < IN_FLIGHT_BYTES + written, "{wire} of {whole} bytes again: {report:#}");
    }
    stage.assert_well(Side::B);
}

fn inject(stage: &mut Stage, fault: Fault, job: u64) {
    match fault {
        Fault::SourceAgent => {
            stage.pair.kill(Side::A).unwrap();
            stage.watch.wait_alive(Side::A).unwrap();
            stage.pair.restart(&stage.wan, Side::A).unwrap();
            stage.until_settled(Side::A);
        }
        Fault::TargetAgent => {
            stage.pair.kill(Side::B).unwrap();
            stage.watch.wait_alive(Side::A).unwrap();
            stage.pair.restart(&stage.wan, Side::B).unwrap();
            failed(stage, job, "failed", &["the link to b was lost", "guest is here as it was"]);
            stage.until_settled(Side::B);
        }
        Fault::TargetQemu => {
            let pid = target_hypervisor(stage);
            kill_process(Pid::from_raw(pid).unwrap(), Signal::KILL).unwrap();
            failed(stage, job, "failed", &["b gave up", "guest is here as it was"]);
        }
        Fault::Link => {
            stage.wan.cut().unwrap();
            stage.watch.wait_alive(Side::A).unwrap();
            failed(stage, job, "failed", &["the link to b was lost", "guest is here as it was"]);
            stage.wan.restore().unwrap();
        }
        Fault::Cancelled => {
            stage.pair.cancel().unwrap();
            failed(stage, job, "cancelled", &["was cancelled", "guest is here as it was"]);
        }
    }
    // Whatever broke: nothing of the attempt may stand at the target for good.
    assert!(stage.pair.wait_vm_gone(Side::B, PATIENCE).is_ok());
}

/// The process that waits for the guest at its target; it is started while the rounds of sync go.
fn target_hypervisor(stage: &Stage) -> i32 {
    let file = stage.run_file(Side::B, "qemu.pid");
    let deadline = Instant::now() + PATIENCE;
    loop {
        let pid = std::fs::read_to_string(&file).ok();
        if let Some(pid) = pid.and_then(|text| text.trim().parse().ok()) {
            return pid;
        }
        assert!(Instant::now() < deadline, "no hypervisor at the target{}", stage.logs());
        std::thread::sleep(LOOK_PERIOD);
    }
}

fn failed(stage: &Stage, job: u64, kind: &str, words: &[&str]) {
    let outcome = stage.outcome(job);
    let failure: &Value = &outcome["failed"];
    assert_eq!(failure["kind"], kind, "{outcome:#}");
    let said = failure.to_string();
    assert!(words.iter().all(|words| said.contains(words)), "not {words:?}: {said}");
}

#[test]
fn the_source_agent_is_killed() {
    breaks("src-agent", Fault::SourceAgent, &[SEED, SYNC, PRE_COPY]);
}

#[test]
fn the_target_agent_is_killed() {
    breaks("dst-agent", Fault::TargetAgent, &[SEED, SYNC, PRE_COPY]);
}

#[test]
fn the_target_hypervisor_is_killed() {
    // While the disk is seeded there is none yet.
    breaks("dst-qemu", Fault::TargetQemu, &[SYNC, PRE_COPY]);
}

#[test]
fn the_link_is_cut() {
    breaks("cut", Fault::Link, &[SEED, SYNC, PRE_COPY]);
}

/// A cut that ends is no failure: the same job goes on.
#[test]
fn a_link_that_comes_back_is_waited_for() {
    let setting = Setting { rate_mbit: 30, ..Setting::default() };
    let Some(mut stage) = Stage::with_guest("waits", &setting) else { return };
    let job = stage.begin("migrate");
    for (phase, bytes) in [SEED, PRE_COPY] {
        stage.until(job, phase, bytes);
        stage.wan.cut().unwrap();
        stage.until_noted(job, "the link to b is down for");
        stage.watch.wait_alive(Side::A).unwrap();
        stage.wan.restore().unwrap();
    }
    let outcome = stage.outcome(job);
    assert!(outcome["completed"].is_object(), "{outcome:#}{}", stage.logs());
    stage.assert_moved();
    stage.assert_well(Side::B);
}

/// A target whose agent is killed and started again has lost its memory of the job, and nothing that had
/// arrived: the same job goes on.
#[test]
fn a_target_agent_that_is_started_again_is_gone_on_with() {
    let setting = Setting { rate_mbit: 30, ..Setting::default() };
    let Some(mut stage) = Stage::with_guest("again", &setting) else { return };
    let job = stage.begin("migrate");
    let mut sent_bytes = 0;
    let mut last = Instant::now();
    for (phase, bytes) in [SEED, PRE_COPY] {
        let progress = stage.until(job, phase, bytes);
        if phase == "seed" {
            sent_bytes = progress["wire_bytes"].as_u64().unwrap();
        }
        last = Instant::now();
        stage.pair.kill(Side::B).unwrap();
        stage.until_noted(job, "the link to b is down for");
        stage.watch.wait_alive(Side::A).unwrap();
        stage.pair.restart(&stage.wan, Side::B).unwrap();
        stage.until_logged(Side::A, "trying again");
    }
    let outcome = stage.outcome(job);
    let report = &outcome["completed"];
    assert!(report.is_object(), "{outcome:#}{}", stage.logs());
    let written = WRITING * last.elapsed().as_secs();
    stage.assert_moved();
    let known = report["saved"]["disk_known_bytes"].as_u64().unwrap();
    assert!(known + IN_FLIGHT_BYTES >= sent_bytes, "of {sent_bytes} {known} were found");
    // The disk had arrived whole when the guest's memory was on its way.
    let seed = &report["phases"][0];
    let wire = seed[1]["wire_bytes"].as_u64().unwrap();
    eprintln!("{wire} of {} bytes were sent again", seed[1]["payload_bytes"]);
    assert!(wire < IN_FLIGHT_BYTES + written, "{wire} bytes again: {report:#}");
    stage.assert_well(Side::B);
}

#[test]
fn the_operator_cancels() {
    breaks("cancel", Fault::Cancelled, &[SEED, SYNC, PRE_COPY]);
}
