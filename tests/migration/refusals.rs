//! What cannot be moved is refused with its reason, before anything is sent.

use std::fs;

use longhaul_bench::host::VM;
use longhaul_bench::netns::Side;
use serde_json::{Value, json};

use super::adopted::ByHand;
use super::stage::{Mounts, Setting, Stage, files, mount};

/// Questions and their answers, with handshakes; any disk is larger by far.
const TALK_BYTES_MAX: u64 = 256 << 10;
/// Room in the target's pool.
const ROOM: &str = "size=64m";

/// A VM without an operating system: its BIOS looks for one for ever.
fn nobody(stage: &Stage, machine: &str, cpu: &str, disk_mib: u64) -> Value {
    let disk = fs::File::create(stage.image(Side::A)).unwrap();
    disk.set_len(disk_mib << 20).unwrap();
    json!({
        "name": VM,
        "machine": machine,
        "cpu": {"model": cpu},
        "vcpus": 1,
        "memory_mib": 64,
        "disks": [{
            "id": "disk0",
            "location": {"pool": "default", "file": "disk.raw"},
            "format": "raw",
            "bus": "virtio-blk",
        }],
    })
}

/// The VM that runs is refused, for that reason; nothing was sent and nothing changed.
fn assert_refused(stage: &Stage, words: &str) {
    let before = (stage.wan.stats().unwrap().wire_bytes(), files(&stage.pair.images(Side::B)));
    let refused = stage.pair.migrate().unwrap_err().to_string();
    assert!(refused.contains(words), "no {words:?} in {refused}");
    assert!(refused.contains("\"refused\""), "{refused}");
    let sent = stage.wan.stats().unwrap().wire_bytes() - before.0;
    assert!(sent < TALK_BYTES_MAX, "{sent} bytes were sent before {words:?}");
    assert_eq!(files(&stage.pair.images(Side::B)), before.1);
    assert_eq!(stage.state(Side::A).as_deref(), Some("running"));
    stage.pair.ask(Side::A, &["vm", "stop", VM, "--force"]).unwrap();
}

#[test]
fn what_cannot_be_moved_is_refused_with_its_reason() {
    let setting = Setting {
        older_target: true,
        before: |[_, b]| mount(&b.join("images"), ROOM),
        ..Setting::default()
    };
    let Some(stage) = Stage::empty("refused", &setting) else { return };
    let mounted = Mounts(vec![stage.pair.images(Side::B)]);
    let start = |description: Value| stage.pair.start_described(&description).unwrap();

    start(nobody(&stage, "pc-q35-10.0", "qemu64", 16));
    assert_refused(&stage, "no machine type pc-q35-10.0");
    start(nobody(&stage, "pc-q35-7.2", "SierraForest", 16));
    assert_refused(&stage, "no CPU model SierraForest");
    start(nobody(&stage, "pc-q35-7.2", "qemu64", 512));
    assert_refused(&stage, "its disks may grow by 512 MiB");
    let there = stage.pair.images(Side::B).join("disk.raw");
    fs::write(&there, "somebody's").unwrap();
    start(nobody(&stage, "pc-q35-7.2", "qemu64", 16));
    assert_refused(&stage, "disk.raw is there already");
    assert_eq!(fs::read(&there).unwrap(), b"somebody's");
    fs::remove_file(there).unwrap();

    nobody(&stage, "pc-q35-7.2", "qemu64", 16);
    stage.pair.ask(Side::A, &["vm", "forget", VM]).unwrap();
    let image = stage.image(Side::A);
    let devices = format!(
        "-blockdev driver=raw,node-name=n0,file.driver=file,file.filename={} \
         -device nvme,id=disk0,drive=n0,serial=1",
        image.display()
    );
    let by_hand = ByHand::start(&stage, &devices);
    by_hand.adopt(&stage);
    assert_refused(&stage, "nvme");
    drop(by_hand);
    drop(mounted);
    stage.finish(Side::A, None);
}
