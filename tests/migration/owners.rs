//! Guests as their owners left them: idle, paused, with several disks.

use std::process::Command;

use longhaul_bench::guest::bench_folder;
use longhaul_bench::netns::Side;
use serde_json::json;

use super::stage::{Setting, Stage, files};

#[test]
fn an_idle_guest_is_moved() {
    let setting = Setting { rate_mbit: 100, append: "survivor.idle=1", ..Setting::default() };
    let Some(mut stage) = Stage::with_guest("idle", &setting) else { return };
    stage.migrate();
    stage.assert_moved();
    stage.assert_well(Side::B);
}

/// Two disks of different formats; the guest is paused, arrives paused, and goes on when told to.
#[test]
fn a_paused_guest_with_two_disks_arrives_paused() {
    let setting = Setting { rate_mbit: 100, ..Setting::default() };
    let Some(mut stage) = Stage::empty("paused", &setting) else { return };
    let second = stage.pair.images(Side::A).join("second.qcow2");
    let disk = bench_folder().join("guest/disk");
    let made = Command::new(disk).args(["empty", "64", "qcow2"]).arg(&second).status().unwrap();
    assert!(made.success());
    let mut description = stage.description();
    description["disks"].as_array_mut().unwrap().push(json!({
        "id": "disk1",
        "location": {"pool": "default", "file": "second.qcow2"},
        "format": "qcow2",
        "bus": "virtio-blk",
        "discard": true,
    }));
    stage.pair.start_described(&description).unwrap();
    stage.watch.wait_ready(Side::A).unwrap();
    stage.at_monitor(Side::A, |qmp| qmp.execute("stop", json!({})).unwrap());
    assert_eq!(stage.state(Side::A).as_deref(), Some("paused"));

    let report = stage.migrate();
    assert_eq!(stage.state(Side::A), None, "{report:#}");
    assert_eq!(stage.state(Side::B).as_deref(), Some("paused"), "{report:#}");
    let images = files(&stage.pair.images(Side::B));
    assert!(images.contains(&"disk.raw".to_owned()) && images.contains(&"second.qcow2".to_owned()));
    stage.at_monitor(Side::B, |qmp| qmp.execute("cont", json!({})).unwrap());
    stage.assert_moved();
    stage.assert_well(Side::B);
}
