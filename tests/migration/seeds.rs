//! Disks that are sent ahead of time.

use std::fs::File;
use std::io::Read;

use longhaul_bench::host::VM;
use longhaul_bench::netns::Side;
use serde_json::Value;

use super::stage::{Setting, Stage, bitmaps, files, left_in_qemu};

fn disk_wire(report: &Value) -> u64 {
    let phases = report["phases"].as_array().unwrap();
    let disk = phases.iter().filter(|phase| phase[0] == "seed" || phase[0] == "sync");
    disk.map(|phase| phase[1]["wire_bytes"].as_u64().unwrap()).sum()
}

#[test]
fn a_seed_spares_the_migration_what_it_sent() {
    let setting = Setting { rate_mbit: 100, ..Setting::default() };
    let Some(mut stage) = Stage::with_guest("seed", &setting) else { return };
    let seed = stage.pair.seed().unwrap()["completed"].clone();
    assert!(seed.is_object() && seed["downtime"].is_null(), "{seed:#}");
    // Writes are tracked, and that is all that is left, also by an agent that is started anew.
    let left = stage.at_monitor(Side::A, |qmp| {
        let tracking = bitmaps(qmp);
        (tracking, left_in_qemu(qmp))
    });
    assert_eq!(left.0.len(), 1, "{left:?}");
    assert_eq!(left.0, left.1, "more than the tracking is left");
    let images = files(&stage.pair.images(Side::B));
    assert!(images.contains(&"disk.raw".to_owned()), "{images:?}");
    assert_eq!(stage.state(Side::B), None);

    let report = stage.migrate();
    stage.assert_moved();
    let (first, then) = (disk_wire(&seed), disk_wire(&report));
    assert!(then < first / 4, "{then} bytes after a seed of {first}: {report:#}");
    // What was written since is sent, and nothing is compared.
    assert_eq!(report["saved"]["disk_known_bytes"], 0, "{report:#}");
    stage.assert_well(Side::B);
}

#[test]
fn a_seed_is_forgotten_without_a_trace() {
    let setting = Setting { rate_mbit: 100, append: "survivor.idle=1", ..Setting::default() };
    let Some(mut stage) = Stage::with_guest("forget", &setting) else { return };
    stage.pair.seed().unwrap();
    stage.pair.ask(Side::A, &["seed", VM, "--forget"]).unwrap();
    stage.assert_untouched();
    // A cancelled seed leaves nothing either.
    let job = stage.begin("seed");
    stage.until(job, "seed", 0);
    let _ = stage.pair.cancel();
    stage.outcome(job);
    let _ = stage.pair.ask(Side::A, &["seed", VM, "--forget"]);
    stage.assert_untouched();
    stage.finish(Side::A, None);
}

/// Bytes of a disk of which nothing can be spared.
const RANDOM_BYTES: u64 = 256 << 20;
/// What a fault may cost beside its time, whatever the size: 1 % of a gibibyte.
const FAULT_BYTES: i64 = (1 << 30) / 100;

/// A seed whose target's agent is killed in its middle goes on by itself when that is back, and sends
/// again no more than what had not been written there.
#[test]
fn a_seed_outlives_its_targets_agent() {
    let setting = Setting { rate_mbit: 200, append: "survivor.idle=1", ..Setting::default() };
    let Some(mut stage) = Stage::empty("outlives", &setting) else { return };
    let description = stage.description();
    let mut image = File::options().append(true).open(stage.image(Side::A)).unwrap();
    let mut random = File::open("/dev/urandom").unwrap().take(RANDOM_BYTES);
    std::io::copy(&mut random, &mut image).unwrap();
    stage.pair.start_described(&description).unwrap();
    stage.watch.wait_ready(Side::A).unwrap();

    let job = stage.begin("seed");
    stage.until_sent(job, RANDOM_BYTES / 2);
    stage.pair.kill(Side::B).unwrap();
    stage.until_noted(job, "the link to b is down for");
    let before = stage.until_sent(job, 0)["wire_bytes"].as_u64().unwrap();
    stage.pair.restart(&stage.wan, Side::B).unwrap();
    let outcome = stage.outcome(job);
    assert!(outcome["completed"].is_object(), "{outcome:#}{}", stage.logs());
    let after = disk_wire(&outcome["completed"]);

    // The same without a fault, to a target that has nothing.
    stage.pair.ask(Side::A, &["seed", VM, "--forget"]).unwrap();
    let images = stage.pair.images(Side::B);
    files(&images).iter().for_each(|name| std::fs::remove_file(images.join(name)).unwrap());
    let plain = disk_wire(&stage.pair.seed().unwrap()["completed"]);
    let more = (before + after) as i64 - plain as i64;
    eprintln!("{before} bytes before, {after} after, {plain} without a fault: {more} more");
    assert!(more < FAULT_BYTES, "{outcome:#}{}", stage.logs());
    stage.pair.ask(Side::A, &["seed", VM, "--forget"]).unwrap();
    stage.assert_untouched();
    stage.finish(Side::A, None);
}
