//! Disks of a real QEMU: rounds give an exact copy, and nothing of anybody else's is touched.
//!
//! Needs `LONGHAUL_QEMU_72` and `LONGHAUL_QEMU_100`, each the path of a `qemu-system-x86_64` with
//! its `qemu-img` and `qemu-nbd` beside it; a version that is not named is skipped.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

#[path = "qemu_disk/guest.rs"]
mod guest;

use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use bytes::Bytes;
use guest::{Guest, Qemu, WAIT_MAX, boot_sector, qemus};
use longhaul::hypervisor::qemu::disk::{NAMES_PREFIX, SourceDisks, SourceDisksConfig};
use longhaul::hypervisor::qemu::image::{Access, create_image, open_image};
use longhaul::hypervisor::qemu::nbd::server_greets;
use longhaul::hypervisor::spec::ImageFormat;
use longhaul::hypervisor::{DiskImage, DiskView, HypervisorError, ImageFile};
use serde_json::{Value, json};

const MIB: u64 = 1 << 20;
const DISK_BYTES: u64 = 64 * MIB;

/// A raw disk that boots, and a qcow2 one beside it.
fn two_disks(qemu: &Qemu, dir: &Path) -> (PathBuf, PathBuf) {
    let (raw, qcow2) = (dir.join("a.raw"), dir.join("b.qcow2"));
    std::fs::write(&raw, boot_sector()).unwrap();
    std::fs::File::options().write(true).open(&raw).unwrap().set_len(DISK_BYTES).unwrap();
    qemu.img(&["create", "-q", "-f", "qcow2", qcow2.to_str().unwrap(), "64M"]);
    (raw, qcow2)
}

async fn start(qemu: &Qemu, runs: bool, more: &[&str]) -> Guest {
    let dir = tempfile::tempdir().unwrap();
    let (raw, qcow2) = two_disks(qemu, dir.path());
    let guest = Guest::start(qemu, dir, &[(&raw, "raw"), (&qcow2, "qcow2")], runs, more).await;
    if runs {
        guest.boots().await;
    }
    guest
}

/// Copies what a view covers; gives the bytes of its data and of its zeros.
async fn copy(view: &dyn DiskView, image: &dyn DiskImage) -> (u64, u64) {
    let (mut data, mut zeros) = (0, 0);
    for extent in view.extents().await.unwrap() {
        if extent.zero {
            image.zero(extent.offset, extent.len).await.unwrap();
            zeros += extent.len;
            continue;
        }
        let mut at = extent.offset;
        while at < extent.offset + extent.len {
            let len = (extent.offset + extent.len - at).min(MIB) as u32;
            image.write(at, view.read(at, len).await.unwrap()).await.unwrap();
            at += u64::from(len);
        }
        data += extent.len;
    }
    (data, zeros)
}

/// Copies a round over all disks and closes it.
async fn copy_all(views: Vec<Box<dyn DiskView>>, images: &[Box<dyn DiskImage>]) -> Vec<(u64, u64)> {
    let mut copied = Vec::new();
    for (view, image) in views.into_iter().zip(images) {
        copied.push(copy(&*view, &**image).await);
        view.close().await.unwrap();
    }
    copied
}

/// Target images of both formats, swapped against the source's: raw to qcow2 and back.
async fn targets(qemu: &Qemu, dir: &Path) -> Vec<Box<dyn DiskImage>> {
    let tools = qemu.tools(dir);
    let mut images = Vec::new();
    for (name, format) in [("a.copy", ImageFormat::Qcow2), ("b.copy", ImageFormat::Raw)] {
        let file = ImageFile { path: dir.join(name), format };
        create_image(&tools, &file, DISK_BYTES).await.unwrap();
        images.push(open_image(&tools, &file, Access::Write).await.unwrap());
    }
    images
}

async fn close_all(images: Vec<Box<dyn DiskImage>>) {
    for image in images {
        image.close().await.unwrap();
    }
}

fn assert_copies(qemu: &Qemu, dir: &Path) {
    qemu.assert_same(&dir.join("a.raw"), "raw", &dir.join("a.copy"), "qcow2");
    qemu.assert_same(&dir.join("b.qcow2"), "qcow2", &dir.join("b.copy"), "raw");
}

/// Waits until the guest has written.
async fn guest_writes(source: &SourceDisks, bytes: u64) {
    let started = Instant::now();
    while source.disk_delta_bytes().await.unwrap() < bytes {
        assert!(started.elapsed() < WAIT_MAX, "the guest does not write");
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}

async fn assert_clean(guest: &Guest) {
    assert_eq!(guest.exports().await, Vec::<String>::new());
    for node in ["disk0", "disk1"] {
        assert_eq!(guest.bitmaps(node).await, []);
    }
    let sockets = std::fs::read_dir(guest.dir.path()).unwrap();
    let ours = sockets
        .filter(|s| s.as_ref().unwrap().file_name().to_str().unwrap().starts_with(NAMES_PREFIX));
    assert_eq!(ours.count(), 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn rounds_over_a_writing_guest_give_exact_copies() {
    for qemu in qemus() {
        let guest = start(&qemu, true, &[]).await;
        guest.io("disk1", "write -P 0x11 1M 3M").await;
        let images = targets(&qemu, guest.dir.path()).await;
        let source = guest.source("seed-1");
        assert!(!source.is_tracking().await.unwrap());
        let infos = source.disks().await.unwrap();
        assert_eq!(infos.iter().map(|i| i.bytes).collect::<Vec<_>>(), [DISK_BYTES; 2]);

        let full = source.disk_full().await.unwrap();
        assert!(source.is_tracking().await.unwrap());
        copy_all(full, &images).await;
        for round in 0..3 {
            guest_writes(&source, 64 << 10).await;
            // Both disks change, and both are flipped at once.
            guest.io("disk1", &format!("write -P 0x2{round} {}k 100k", 777 * (round + 1))).await;
            let copied = copy_all(source.disk_delta().await.unwrap(), &images).await;
            assert!(copied[0].0 >= 4096 && copied[0].0 < DISK_BYTES / 2, "{copied:?}");
            assert!(copied[1].0 >= 100 << 10 && copied[1].0 <= 108 << 10, "{copied:?}");
        }
        guest.run("stop", Value::Null).await;
        copy_all(source.disk_delta().await.unwrap(), &images).await;
        assert_eq!(source.disk_delta_bytes().await.unwrap(), 0);
        close_all(images).await;

        source.cleanup(true).await.unwrap();
        assert!(source.is_tracking().await.unwrap());
        source.cleanup(false).await.unwrap();
        source.cleanup(false).await.unwrap();
        assert_clean(&guest).await;
        let dir = guest.quit().await;
        assert_copies(&qemu, dir.path());
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn the_last_round_is_read_while_the_guest_leaves() {
    for qemu in qemus() {
        let guest = start(&qemu, true, &[]).await;
        let images = targets(&qemu, guest.dir.path()).await;
        let source = guest.source("seed-1");
        copy_all(source.disk_full().await.unwrap(), &images).await;
        guest_writes(&source, 64 << 10).await;

        let socket = guest.path("memory.sock");
        let listener = tokio::net::UnixListener::bind(&socket).unwrap();
        let drain = tokio::spawn(async move {
            let (mut memory, _) = listener.accept().await.unwrap();
            tokio::io::copy(&mut memory, &mut tokio::io::sink()).await.unwrap();
        });
        let pause = json!([{ "capability": "pause-before-switchover", "state": true },
                           { "capability": "events", "state": true }]);
        guest.run("migrate-set-capabilities", json!({ "capabilities": pause })).await;
        let uri = format!("unix:{}", socket.display());
        let mut events = guest.qmp.events();
        guest.run("migrate", json!({ "uri": uri })).await;
        let reached = |status: &'static str| {
            move |e: &longhaul::hypervisor::qemu::qmp::QmpEvent| {
                e.name == "MIGRATION" && e.data["status"] == status
            }
        };
        guest.qmp.wait_event(&mut events, reached("pre-switchover"), WAIT_MAX).await.unwrap();
        // The images are given up between this round's extents and its reads.
        let last = source.disk_delta().await.unwrap();
        guest.run("migrate-continue", json!({ "state": "pre-switchover" })).await;
        guest.qmp.wait_event(&mut events, reached("completed"), WAIT_MAX).await.unwrap();
        let copied = copy_all(last, &images).await;
        assert!(copied[0].0 >= 64 << 10, "{copied:?}");
        close_all(images).await;
        drain.await.unwrap();
        source.cleanup(false).await.unwrap();
        assert_clean(&guest).await;
        let dir = guest.quit().await;
        assert_copies(&qemu, dir.path());
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn holes_stay_holes_and_dirty_zeros_come_as_zeros() {
    for qemu in qemus() {
        let guest = start(&qemu, false, &[]).await;
        for node in ["disk0", "disk1"] {
            guest.io(node, "write -P 0x5a 8M 8M").await;
        }
        let images = targets(&qemu, guest.dir.path()).await;
        let source = guest.source("seed-1");
        let copied = copy_all(source.disk_full().await.unwrap(), &images).await;
        for (data, zeros) in copied {
            assert!(data <= 9 * MIB && data + zeros == DISK_BYTES, "{data} {zeros}");
        }
        for node in ["disk0", "disk1"] {
            // Half of the data is given up, and one block of what was a hole is written.
            guest.io(node, "write -z -u 8M 4M").await;
            guest.io(node, "write -P 0x77 40M 4k").await;
        }
        let dirty = source.disk_delta_bytes().await.unwrap();
        assert_eq!(dirty, 2 * (4 * MIB + 4096));
        for (data, zeros) in copy_all(source.disk_delta().await.unwrap(), &images).await {
            assert!(zeros >= 4 * MIB - (64 << 10), "{data} {zeros}");
            assert!((4096..=128 << 10).contains(&data), "{data} {zeros}");
        }
        close_all(images).await;
        source.cleanup(false).await.unwrap();
        let dir = guest.quit().await;
        assert_copies(&qemu, dir.path());
        for copy in ["a.copy", "b.copy"] {
            let used = std::fs::metadata(dir.path().join(copy)).unwrap().blocks() * 512;
            assert!(used < 6 * MIB, "{copy} takes {used} bytes");
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn the_owners_server_bitmaps_and_debugger_stay_as_they_are() {
    for qemu in qemus() {
        for tcp in [false, true] {
            let dir = tempfile::tempdir().unwrap();
            let (raw, qcow2) = two_disks(&qemu, dir.path());
            let debugger = format!(
                "socket,id=debugger,path={},server=on,wait=off",
                dir.path().join("gdb.sock").display()
            );
            let more = ["-chardev", &debugger, "-gdb", "chardev:debugger"];
            let disks = [(&*raw, "raw"), (&*qcow2, "qcow2")];
            let guest = Guest::start(&qemu, dir, &disks, true, &more).await;
            guest.boots().await;
            let theirs = guest.path("theirs.sock");
            let addr = if tcp {
                let free = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
                let port = free.local_addr().unwrap().port().to_string();
                json!({ "type": "inet", "data": { "host": "127.0.0.1", "port": port } })
            } else {
                json!({ "type": "unix", "data": { "path": theirs } })
            };
            guest.run("nbd-server-start", json!({ "addr": addr })).await;
            for (name, disabled) in [("backup", false), ("old", true)] {
                let add = json!({ "node": "disk0", "name": name, "disabled": disabled });
                guest.run("block-dirty-bitmap-add", add).await;
            }
            // The disabled one is in use by an export of theirs.
            let export = json!({ "type": "nbd", "id": "theirs", "node-name": "disk0",
                                 "name": "theirs", "bitmaps": ["old"] });
            guest.run("block-export-add", export).await;

            let images = targets(&qemu, guest.dir.path()).await;
            let source = guest.source("seed-1");
            copy_all(source.disk_full().await.unwrap(), &images).await;
            guest.io("disk0", "write -P 0x33 50M 1M").await;
            copy_all(source.disk_delta().await.unwrap(), &images).await;
            // A crashed attempt of ours leaves things; the next one removes them and only them.
            drop(source.disk_delta().await.unwrap());
            let source = guest.source("seed-2");
            guest.run("stop", Value::Null).await;
            copy_all(source.disk_full().await.unwrap(), &images).await;
            close_all(images).await;
            source.cleanup(false).await.unwrap();

            let expected = [("backup".to_owned(), true), ("old".to_owned(), false)];
            assert_eq!(guest.bitmaps("disk0").await, expected);
            assert_eq!(guest.bitmaps("disk1").await, []);
            assert_eq!(guest.exports().await, ["theirs"]);
            if !tcp {
                assert!(server_greets(&theirs).await);
            }
            let dir = guest.quit().await;
            assert_copies(&qemu, dir.path());
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_search_for_the_owners_server_does_not_pause_the_guest() {
    for qemu in qemus() {
        let dir = tempfile::tempdir().unwrap();
        let (raw, _) = two_disks(&qemu, dir.path());
        let debugger = format!(
            "socket,id=dbg,path={},server=on,wait=off",
            dir.path().join("g.sock").display()
        );
        let more = ["-chardev", &debugger, "-gdb", "chardev:dbg"];
        let guest = Guest::start(&qemu, dir, &[(&raw, "raw")], true, &more).await;
        guest.boots().await;
        let addr = json!({ "type": "unix", "data": { "path": guest.path("theirs.sock") } });
        guest.run("nbd-server-start", json!({ "addr": addr })).await;
        let source = guest.source("s");
        drop(source.disk_full().await.unwrap());
        source.cleanup(false).await.unwrap();
        assert_eq!(guest.status().await, "running");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_later_process_goes_on_where_the_earlier_one_ended() {
    for qemu in qemus() {
        let guest = start(&qemu, false, &[]).await;
        let images = targets(&qemu, guest.dir.path()).await;
        let first = guest.source("seed-1");
        copy_all(first.disk_full().await.unwrap(), &images).await;
        guest.io("disk0", "write -P 0x41 10M 64k").await;
        copy_all(first.disk_delta().await.unwrap(), &images).await;
        guest.io("disk0", "write -P 0x42 20M 64k").await;
        guest.io("disk1", "write -P 0x43 30M 64k").await;
        // One disk of this round arrives, the other does not; then the process ends.
        let mut views = first.disk_delta().await.unwrap();
        views.truncate(1);
        copy_all(views, &images).await;
        guest.io("disk1", "write -P 0x44 40M 64k").await;
        drop(first);

        assert!(!guest.source("seed-2").is_tracking().await.unwrap());
        let second = guest.source("seed-1");
        assert!(second.is_tracking().await.unwrap());
        assert_eq!(second.disk_delta_bytes().await.unwrap(), 128 << 10);
        let copied = copy_all(second.disk_delta().await.unwrap(), &images).await;
        assert_eq!(copied, [(0, 0), (128 << 10, 0)]);

        // Left without a view open, but still tracking: another process again.
        second.cleanup(true).await.unwrap();
        assert_eq!(guest.exports().await, Vec::<String>::new());
        drop(second);
        guest.io("disk0", "write -P 0x45 50M 64k").await;
        let third = guest.source("seed-1");
        let copied = copy_all(third.disk_delta().await.unwrap(), &images).await;
        assert_eq!(copied, [(64 << 10, 0), (0, 0)]);
        close_all(images).await;
        third.cleanup(false).await.unwrap();
        assert_clean(&guest).await;
        let dir = guest.quit().await;
        assert_copies(&qemu, dir.path());
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_full_view_that_never_arrived_is_no_base_for_deltas() {
    for qemu in qemus() {
        let guest = start(&qemu, false, &[]).await;
        let first = guest.source("seed-1");
        let views = first.disk_full().await.unwrap();
        assert!(first.is_tracking().await.unwrap());
        drop(views);
        assert!(!first.is_tracking().await.unwrap());
        assert!(!guest.source("seed-1").is_tracking().await.unwrap());
        let error = first.disk_delta().await.err().unwrap().to_string();
        assert!(error.contains("seed it anew"), "{error}");
        for view in first.disk_full().await.unwrap() {
            view.close().await.unwrap();
        }
        assert!(guest.source("seed-1").is_tracking().await.unwrap());
        first.cleanup(false).await.unwrap();
        assert_clean(&guest).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn views_of_several_rounds_stay_open_side_by_side() {
    for qemu in qemus() {
        let guest = start(&qemu, false, &[]).await;
        let images = targets(&qemu, guest.dir.path()).await;
        let source = guest.source("seed-1");
        let full = source.disk_full().await.unwrap();
        guest.io("disk0", "write -P 0x51 10M 64k").await;
        let first = source.disk_delta().await.unwrap();
        guest.io("disk0", "write -P 0x52 20M 64k").await;
        let second = source.disk_delta().await.unwrap();
        guest.io("disk0", "write -P 0x53 30M 64k").await;
        copy_all(full, &images).await;
        assert_eq!(copy_all(first, &images).await[0], (64 << 10, 0));
        // The second was dropped: the third has its bytes too.
        drop(second);
        assert_eq!(source.disk_delta_bytes().await.unwrap(), 128 << 10);
        let third = source.disk_delta().await.unwrap();
        assert_eq!(copy_all(third, &images).await[0], (128 << 10, 0));
        close_all(images).await;
        source.cleanup(false).await.unwrap();
        assert_clean(&guest).await;
        let dir = guest.quit().await;
        assert_copies(&qemu, dir.path());
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_disk_that_changed_its_shape_is_not_synced() {
    for qemu in qemus() {
        let guest = start(&qemu, false, &[]).await;
        let source = guest.source("seed-1");
        for view in source.disk_full().await.unwrap() {
            view.close().await.unwrap();
        }
        let resize = json!({ "node-name": "disk1", "size": DISK_BYTES + MIB });
        guest.run("block_resize", resize).await;
        let error = source.disk_delta().await.err().unwrap().to_string();
        assert!(error.contains("disk vd1 was resized"), "{error}");

        let snapshot = json!({ "node-name": "disk0", "snapshot-node-name": "over",
                               "snapshot-file": guest.path("over.qcow2"), "format": "qcow2" });
        for view in source.disk_full().await.unwrap() {
            view.close().await.unwrap();
        }
        guest.run("blockdev-snapshot-sync", snapshot).await;
        let error = source.disk_delta().await.err().unwrap().to_string();
        assert!(error.contains("writes to block node over"), "{error}");
        source.cleanup(false).await.unwrap();
        assert_clean(&guest).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn io_threads_of_an_old_qemu_are_named_as_a_danger() {
    for qemu in qemus() {
        let guest = start(&qemu, false, &[]).await;
        let source = guest.source("seed-1");
        let reasons = source.check().await.unwrap();
        assert_eq!(!reasons.is_empty(), guest.qmp.version() < (8, 2, 3), "{reasons:?}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_full_view_that_fails_leaves_no_tracking_behind() {
    for qemu in qemus() {
        let guest = start(&qemu, false, &[]).await;
        let config = SourceDisksConfig {
            disks: guest.disks.clone(),
            run_dir: guest.path(&"long".repeat(30)),
            tracking: "seed-1".to_owned(),
            pid: None,
        };
        let source = SourceDisks::new(guest.qmp.clone(), config).unwrap();
        let error = source.disk_full().await.err().unwrap().to_string();
        assert!(error.contains("longer than 107 bytes"), "{error}");
        assert!(!source.is_tracking().await.unwrap());
        assert_clean(&guest).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_hypervisor_that_dies_under_a_read_is_told_in_words() {
    for qemu in qemus() {
        let mut guest = start(&qemu, false, &[]).await;
        guest.io("disk0", "write -P 0x61 0 60M").await;
        let source = guest.source("seed-1");
        let mut views = source.disk_full().await.unwrap();
        let view = views.remove(0);
        let reading = tokio::spawn(async move {
            loop {
                for at in 0..15 {
                    if let Err(error) = view.read(at * 4 * MIB, 4 << 20).await {
                        return error;
                    }
                }
            }
        });
        guest.kill();
        let error = tokio::time::timeout(WAIT_MAX, reading).await.unwrap().unwrap();
        let said = error.to_string();
        assert!(matches!(error, HypervisorError::Gone { .. }), "{said}");
        assert!(said.starts_with("test-vm: ") && said.contains("reading disk vd0"), "{said}");
        source.cleanup(false).await.unwrap();
        assert!(matches!(source.disk_delta().await, Err(HypervisorError::Gone { .. })));
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_server_of_ours_that_others_use_is_left_to_them() {
    for qemu in qemus() {
        let guest = start(&qemu, false, &[]).await;
        let source = guest.source("seed-1");
        drop(source.disk_full().await.unwrap());
        let export =
            json!({ "type": "nbd", "id": "theirs", "node-name": "disk0", "name": "theirs" });
        guest.run("block-export-add", export).await;
        source.cleanup(false).await.unwrap();
        assert_eq!(guest.exports().await, ["theirs"]);
        let socket = guest.path(&format!("{NAMES_PREFIX}nbd-{}.sock", guest.pid()));
        assert!(server_greets(&socket).await);
        // It serves us again, and goes once they have gone.
        drop(guest.source("seed-1").disk_full().await.unwrap());
        guest.run("block-export-del", json!({ "id": "theirs", "mode": "hard" })).await;
        let source = guest.source("seed-1");
        source.cleanup(false).await.unwrap();
        assert!(!server_greets(&socket).await);
        assert_clean(&guest).await;
    }
}

fn file(dir: &Path, name: &str, format: ImageFormat) -> ImageFile {
    ImageFile { path: dir.join(name), format }
}

#[tokio::test(flavor = "multi_thread")]
async fn images_of_both_formats_keep_what_is_written_at_any_place() {
    for qemu in qemus() {
        let dir = tempfile::tempdir().unwrap();
        let tools = qemu.tools(dir.path());
        let mut expected = vec![0u8; 4 << 20];
        for format in [ImageFormat::Raw, ImageFormat::Qcow2] {
            let file = file(dir.path(), &format!("{format:?}"), format);
            create_image(&tools, &file, 4 * MIB).await.unwrap();
            let again = create_image(&tools, &file, 4 * MIB).await.unwrap_err();
            assert!(matches!(again, HypervisorError::Io { .. }), "{again}");

            let image = open_image(&tools, &file, Access::Write).await.unwrap();
            assert_eq!(image.bytes(), 4 * MIB);
            expected.fill(0);
            // Chunks begin and end anywhere.
            for (at, len, byte) in
                [(1, 70_000, 1u8), (999_999, 1, 2), (1_000_000, 131_072, 3), (4_194_303, 1, 4)]
            {
                expected[at..at + len].fill(byte);
                image.write(at as u64, Bytes::from(vec![byte; len])).await.unwrap();
            }
            image.zero(1_000_001, 100_000).await.unwrap();
            expected[1_000_001..1_100_001].fill(0);
            image.zero(2 * MIB, MIB).await.unwrap();
            image.flush().await.unwrap();
            for (at, len) in [(0, 4 << 20), (999_998, 12_345), (4_194_300, 4)] {
                let found = image.read(at as u64, len as u32).await.unwrap();
                assert!(found == expected[at..at + len], "{format:?} {at}+{len}");
            }
            let extents = image.extents().await.unwrap();
            assert_eq!(extents.iter().map(|e| e.len).sum::<u64>(), 4 * MIB);
            let data: u64 = extents.iter().filter(|e| !e.zero).map(|e| e.len).sum();
            assert!(data <= 512 << 10, "{extents:?}");
            for e in extents.iter().filter(|e| e.zero) {
                let range = e.offset as usize..(e.offset + e.len) as usize;
                assert!(expected[range].iter().all(|b| *b == 0), "{e:?} is no hole");
            }
            assert!(image.write(4 * MIB - 1, Bytes::from_static(b"ab")).await.is_err());
            assert!(image.read(4 * MIB, 1).await.is_err());
            assert!(image.zero(u64::MAX, 2).await.is_err());
            image.close().await.unwrap();

            let image = open_image(&tools, &file, Access::Read).await.unwrap();
            assert!(image.read(0, 4 << 20).await.unwrap() == expected);
            assert!(image.write(0, Bytes::from_static(b"a")).await.is_err());
            image.close().await.unwrap();
        }
        let (raw, qcow2) = (dir.path().join("Raw"), dir.path().join("Qcow2"));
        qemu.assert_same(&raw, "raw", &qcow2, "qcow2");
        let sockets = std::fs::read_dir(dir.path()).unwrap().count();
        assert_eq!(sockets, 2, "something was left beside the images");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn an_image_that_somebody_uses_is_not_written() {
    for qemu in qemus() {
        let guest = start(&qemu, false, &[]).await;
        let tools = qemu.tools(guest.dir.path());
        for (name, format) in [("a.raw", ImageFormat::Raw), ("b.qcow2", ImageFormat::Qcow2)] {
            let file = file(guest.dir.path(), name, format);
            let refused = open_image(&tools, &file, Access::Write).await.err().unwrap();
            assert!(refused.to_string().contains("the image is in use by"), "{refused}");
        }
        let dir = guest.quit().await;
        let tools = qemu.tools(dir.path());
        for (name, format) in [("a.raw", ImageFormat::Raw), ("b.qcow2", ImageFormat::Qcow2)] {
            let file = file(dir.path(), name, format);
            let first = open_image(&tools, &file, Access::Write).await.unwrap();
            let refused = open_image(&tools, &file, Access::Write).await.err().unwrap();
            assert!(refused.to_string().contains("the image is in use by"), "{refused}");
            // Dropped in the middle of work, it is free for others a moment later.
            first.write(0, Bytes::from(vec![7; 4096])).await.unwrap();
            drop(first);
            let started = Instant::now();
            while let Err(error) = open_image(&tools, &file, Access::Write).await {
                assert!(started.elapsed() < WAIT_MAX, "{error}");
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_no_image_is_refused_in_words() {
    for qemu in qemus() {
        let dir = tempfile::tempdir().unwrap();
        let tools = qemu.tools(dir.path());
        let missing = file(dir.path(), "missing", ImageFormat::Qcow2);
        let error = open_image(&tools, &missing, Access::Read).await.err().unwrap().to_string();
        assert!(error.contains("No such file"), "{error}");
        let text = file(dir.path(), "text", ImageFormat::Qcow2);
        std::fs::write(&text.path, vec![b'x'; 4096]).unwrap();
        let error = open_image(&tools, &text, Access::Read).await.err().unwrap().to_string();
        assert!(error.contains("not in qcow2 format"), "{error}");
        let relative = ImageFile { path: "nbd:localhost".into(), format: ImageFormat::Qcow2 };
        assert!(open_image(&tools, &relative, Access::Read).await.is_err());
        let odd = file(dir.path(), "odd", ImageFormat::Raw);
        assert!(create_image(&tools, &odd, 1000).await.is_err());
        assert!(!odd.path.exists());
        let nowhere = file(&dir.path().join("none"), "x", ImageFormat::Qcow2);
        assert!(create_image(&tools, &nowhere, MIB).await.is_err());
        let broken = longhaul::hypervisor::qemu::image::ImageTools {
            qemu_img: dir.path().join("no-such-tool"),
            ..tools
        };
        let left = file(dir.path(), "left", ImageFormat::Qcow2);
        assert!(create_image(&broken, &left, MIB).await.is_err());
        assert!(!left.path.exists(), "an image that was not made was left behind");
    }
}
