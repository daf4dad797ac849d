//! A move where nothing breaks.

use std::os::unix::fs::MetadataExt;

use longhaul_bench::host::VM;
use longhaul_bench::netns::Side;
use serde_json::{Value, json};

use super::stage::{Setting, Stage, files};

/// Disk payload that is left to a guest's journal and chain while the disk's copy is looked at.
const SLACK_BYTES: u64 = 16 << 20;
/// How many times less of its disk a guest that was idle sends when it comes back.
const BACK_SHARE: u64 = 10;

#[test]
fn a_running_guest_is_moved_and_well() {
    let setting = Setting { rate_mbit: 100, append: "survivor.discard=1", ..Setting::default() };
    let Some(mut stage) = Stage::with_guest("whole", &setting) else { return };
    let report = stage.migrate();
    stage.assert_moved();

    assert_eq!(report["vm"], VM);
    assert_eq!(report["peer"], "b");
    assert_eq!(report["notes"], json!([]));
    let downtime = report["downtime"].as_object().unwrap();
    let total = downtime["total_ms"].as_f64().unwrap();
    let parts: f64 = downtime
        .iter()
        .filter(|(name, _)| !["total_ms", "hand_over_ms"].contains(&name.as_str()))
        .map(|(_, ms)| ms.as_f64().unwrap())
        .sum();
    assert!((total - parts).abs() < 1.0, "parts {parts} of {total} ms: {report:#}");
    assert!(total > 20.0, "faster than the round trip: {total} ms");
    let hand_over = downtime["hand_over_ms"].as_f64().unwrap();
    assert!(hand_over > 10.0 && hand_over < total, "{report:#}");
    let phases: Vec<&str> = report["phases"]
        .as_array()
        .unwrap()
        .iter()
        .map(|phase| phase[0].as_str().unwrap())
        .collect();
    assert_eq!(phases, ["seed", "sync", "pre-copy", "switchover"]);
    let sum: u64 = report["phases"]
        .as_array()
        .unwrap()
        .iter()
        .map(|phase| phase[1]["wire_bytes"].as_u64().unwrap())
        .sum();
    let wire = report["wire_bytes"].as_u64().unwrap();
    assert!(sum <= wire && wire < report["payload_bytes"].as_u64().unwrap(), "{report:#}");
    // What the agent counts as UDP payload the relay sees with headers, and with what came after.
    assert!(wire <= stage.wan.stats().unwrap().wire_bytes(), "{report:#}");

    let [source, target] = Side::BOTH.map(|side| stage.image(side).metadata().unwrap());
    assert_eq!(source.len(), target.len());
    let [source, target] = [source, target].map(|image| image.blocks() * 512);
    assert!(target <= source + SLACK_BYTES, "{target} of {source} bytes: holes were filled");
    assert_eq!(files(&stage.pair.images(Side::B)), ["disk.raw", "disk.raw.longhaul-recipe"]);
    let status = stage.pair.status(Side::A).unwrap();
    assert_eq!((&status["jobs"], &status["in_doubt"]), (&json!([]), &json!([])));
    stage.assert_well(Side::B);
}

/// There and back again, onto the image that was left behind: what it holds is not sent again.
#[test]
fn a_guest_comes_back_to_where_it_was() {
    let setting = Setting { rate_mbit: 100, append: "survivor.idle=1", ..Setting::default() };
    let Some(mut stage) = Stage::with_guest("back", &setting) else { return };
    let there = stage.migrate();
    stage.watch.wait_alive(Side::B).unwrap();
    let back = stage.pair.ask(Side::B, &["migrate", VM, "--to", "a"]).unwrap();
    let back = &back["completed"];
    assert!(back.is_object(), "{back:#}{}", stage.logs());
    stage.watch.wait_alive(Side::A).unwrap();
    assert_eq!(stage.state(Side::B), None);
    let seed_bytes = |report: &Value| report["phases"][0][1]["wire_bytes"].as_u64().unwrap();
    let (first, again) = (seed_bytes(&there), seed_bytes(back));
    eprintln!("back: {first} bytes of disk there, {again} back");
    assert!(again * BACK_SHARE < first, "{again} of {first} bytes again: {back:#}");
    stage.watch.prove(Side::A).unwrap();
    stage.assert_well(Side::A);
}
