//! A QEMU that somebody started by hand: it is adopted and moved; what its owner has in it is left
//! alone.

use std::path::PathBuf;
use std::process::{Child, Stdio};

use longhaul_bench::host::VM;
use longhaul_bench::netns::Side;
use longhaul_bench::qmp::Qmp;
use longhaul_bench::rival;
use serde_json::{Value, json};

use super::stage::{Setting, Stage, bitmaps};

/// A QEMU of an owner's; ends with this value.
pub(crate) struct ByHand {
    child: Child,
    folder: PathBuf,
}

impl ByHand {
    /// Starts a QEMU at side a with two monitors: one for Longhaul, one for its owner.
    pub(crate) fn start(stage: &Stage, devices: &str) -> Self {
        let folder = stage.scratch.path().to_owned();
        let mut command = stage.wan.command(Side::A, stage.qemu.join("bin/qemu-system-x86_64"));
        command.args(["-name", VM, "-nodefaults", "-no-user-config", "-display", "none"]);
        command.args(["-machine", &format!("{},accel=tcg", rival::MACHINE), "-cpu", rival::CPU]);
        command.args(["-m", &stage.guest.machine.memory_mib.to_string()]);
        for monitor in ["adopt", "owner"] {
            let path = folder.join(monitor);
            command.args(["-qmp", &format!("unix:{},server=on,wait=off", path.display())]);
        }
        command.args(devices.split_whitespace());
        if devices.contains("-kernel") {
            command.args(["-append", &stage.guest.machine.append]);
        }
        let child = command.stdin(Stdio::null()).spawn().unwrap();
        Self { child, folder }
    }

    /// Has the agent adopt it.
    pub(crate) fn adopt(&self, stage: &Stage) -> Value {
        let mut owner = self.owner();
        owner.execute("query-status", json!({})).unwrap();
        let socket = self.folder.join("adopt");
        let arguments = ["vm", "adopt", "--qmp", socket.to_str().unwrap(), "--name", VM];
        stage.pair.ask(Side::A, &arguments).unwrap()
    }

    /// The owner's monitor.
    fn owner(&self) -> Qmp {
        Qmp::connect(&self.folder.join("owner")).unwrap()
    }
}

impl Drop for ByHand {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

#[test]
fn an_adopted_guest_is_moved_and_its_owners_things_are_left_alone() {
    let setting = Setting { rate_mbit: 100, ..Setting::default() };
    let Some(mut stage) = Stage::empty("adopt", &setting) else { return };
    let disk = stage.guest.copy_disk(&stage.pair.images(Side::A)).unwrap();
    // Where the watch looks for a console, as for any VM of this agent.
    let console = stage.pair.console(Side::A);
    std::fs::create_dir_all(console.parent().unwrap()).unwrap();
    let mut devices = format!(
        "-blockdev driver=raw,node-name=owners-node,discard=unmap,file.driver=file,\
         file.filename={} -device virtio-blk-pci,id=disk0,drive=owners-node \
         -chardev socket,id=serial0,path={},server=on,wait=off -device isa-serial,chardev=serial0",
        disk.display(),
        console.display(),
    );
    for (flag, path) in [("kernel", &stage.guest.kernel), ("initrd", &stage.guest.initrd)] {
        devices += &format!(" -{flag} {}", path.display());
    }
    let by_hand = ByHand::start(&stage, &devices);
    let adopted = by_hand.adopt(&stage);
    assert_eq!(
        adopted["adopted"]["not_understood"].as_array().map_or(0, Vec::len),
        0,
        "{adopted:#}"
    );
    stage.watch.wait_ready(Side::A).unwrap();
    assert_eq!(stage.state(Side::A).as_deref(), Some("running"));

    // The owner backs it up: a server, an export, and a bitmap that the export has in use.
    let mut owner = by_hand.owner();
    let mut tell = |command: &str, arguments: Value| owner.execute(command, arguments).unwrap();
    let socket = stage.scratch.path().join("backup");
    let address = json!({"type": "unix", "data": {"path": socket}});
    tell("block-dirty-bitmap-add", json!({"node": "owners-node", "name": "owners-bitmap"}));
    tell("nbd-server-start", json!({"addr": address}));
    tell("block-dirty-bitmap-disable", json!({"node": "owners-node", "name": "owners-bitmap"}));
    tell(
        "block-export-add",
        json!({"type": "nbd", "id": "owners-export", "node-name": "owners-node",
               "bitmaps": ["owners-bitmap"]}),
    );
    stage.pair.seed().unwrap();
    let there: Vec<String> = bitmaps(&mut owner);
    assert!(there.contains(&"owners-bitmap".to_owned()), "{there:?}");
    assert_eq!(there.len(), 2, "the owner's and the tracking: {there:?}");
    stage.pair.ask(Side::A, &["seed", VM, "--forget"]).unwrap();
    assert_eq!(bitmaps(&mut owner), ["owners-bitmap"]);
    let exports = owner.execute("query-block-exports", json!({})).unwrap();
    assert_eq!(exports[0]["id"], "owners-export", "{exports:#}");
    assert_eq!(exports.as_array().unwrap().len(), 1, "{exports:#}");
    assert!(std::os::unix::net::UnixStream::connect(&socket).is_ok(), "the owner's server is gone");
    drop(owner);

    stage.migrate();
    drop(by_hand);
    stage.assert_moved();
    stage.assert_well(Side::B);
}
