//! A real QEMU with a guest of 512 bytes, for tests.

use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use longhaul::hypervisor::qemu::disk::{DiskNode, SourceDisks, SourceDisksConfig};
use longhaul::hypervisor::qemu::image::ImageTools;
use longhaul::hypervisor::qemu::qmp::Qmp;
use serde_json::{Value, json};
use tempfile::TempDir;

/// Longest wait for something that QEMU does by itself.
pub(crate) const WAIT_MAX: Duration = Duration::from_secs(60);

/// A QEMU to test against.
#[derive(Debug, Clone)]
pub(crate) struct Qemu {
    pub(crate) system: PathBuf,
    pub(crate) img: PathBuf,
    pub(crate) nbd: PathBuf,
    /// False where a client that leaves can end a QEMU whose disk has an I/O thread
    /// (`SourceDisks::check` refuses those).
    serves_threads: bool,
}

/// The QEMUs that the environment names; none skips the test, loudly.
pub(crate) fn qemus() -> Vec<Qemu> {
    let mut found = Vec::new();
    for (name, serves_threads) in [("LONGHAUL_QEMU_72", false), ("LONGHAUL_QEMU_100", true)] {
        let Some(system) = std::env::var_os(name).map(PathBuf::from) else {
            eprintln!("SKIPPED: {name} does not name a qemu-system-x86_64");
            continue;
        };
        let beside = |tool: &str| system.with_file_name(tool);
        let (img, nbd) = (beside("qemu-img"), beside("qemu-nbd"));
        found.push(Qemu { system, img, nbd, serves_threads });
    }
    found
}

impl Qemu {
    pub(crate) fn img(&self, args: &[&str]) {
        let output = Command::new(&self.img).args(args).output().unwrap();
        assert!(
            output.status.success(),
            "qemu-img {args:?}: {}{}",
            String::from_utf8_lossy(&output.stdout),
            String::from_utf8_lossy(&output.stderr)
        );
    }

    /// Fails unless a guest would see the same bytes in both images.
    pub(crate) fn assert_same(&self, a: &Path, a_format: &str, b: &Path, b_format: &str) {
        let (a, b) = (a.to_str().unwrap(), b.to_str().unwrap());
        self.img(&["compare", "-f", a_format, "-F", b_format, a, b]);
    }

    pub(crate) fn tools(&self, run_dir: &Path) -> ImageTools {
        ImageTools {
            qemu_img: self.img.clone(),
            qemu_nbd: self.nbd.clone(),
            run_dir: run_dir.to_owned(),
        }
    }
}

/// A boot sector that writes 4 KiB to scattered places of its first disk, for ever:
/// sector 2048 + (counter * 0x9E3779B1 >> 16), 8 sectors, the counter in the first bytes.
pub(crate) fn boot_sector() -> [u8; 512] {
    let code: &[u8] = &[
        0x31, 0xc0, // xor ax, ax
        0x8e, 0xd8, // mov ds, ax
        0x8e, 0xc0, // mov es, ax
        0x8e, 0xd0, // mov ss, ax
        0xbc, 0x00, 0x7c, // mov sp, 0x7c00
        0xfb, // sti
        // again:
        0x66, 0xff, 0x06, 0x00, 0x80, // inc dword [0x8000]
        0x66, 0xa1, 0x00, 0x80, // mov eax, [0x8000]
        0x66, 0x69, 0xc0, 0xb1, 0x79, 0x37, 0x9e, // imul eax, eax, 0x9e3779b1
        0x66, 0xc1, 0xe8, 0x10, // shr eax, 16
        0x66, 0x05, 0x00, 0x08, 0x00, 0x00, // add eax, 2048
        0x66, 0xa3, 0x48, 0x7c, // mov [packet + 8], eax
        0xbe, 0x40, 0x7c, // mov si, packet
        0xb8, 0x00, 0x43, // mov ax, 0x4300: extended write
        0xcd, 0x13, // int 0x13
        0xeb, 0xd8, // jmp again
    ];
    let mut sector = [0; 512];
    sector[..code.len()].copy_from_slice(code);
    // Packet: 16 bytes, 8 sectors, from 0000:8000, to the sector written above.
    sector[0x40..0x48].copy_from_slice(&[0x10, 0, 8, 0, 0x00, 0x80, 0, 0]);
    sector[510..].copy_from_slice(&[0x55, 0xaa]);
    sector
}

/// A running QEMU; killed and waited for when dropped.
pub(crate) struct Guest {
    pub(crate) qmp: Qmp,
    pub(crate) dir: TempDir,
    pub(crate) disks: Vec<DiskNode>,
    child: Child,
}

impl Guest {
    /// Starts a QEMU with disks `disk0`, `disk1`, .. of these paths and formats. Its CPUs run only
    /// if `runs`.
    pub(crate) async fn start(
        qemu: &Qemu,
        dir: TempDir,
        disks: &[(&Path, &str)],
        runs: bool,
        more: &[&str],
    ) -> Self {
        let socket = dir.path().join("qmp.sock");
        let mut command = Command::new(&qemu.system);
        command
            .args(["-accel", "tcg", "-machine", "q35", "-m", "64", "-nodefaults"])
            .args(["-display", "none", "-object", "iothread,id=io0", "-qmp"])
            .arg(format!("unix:{},server=on,wait=off", socket.display()))
            .args(more);
        if !runs {
            command.arg("-S");
        }
        let mut nodes = Vec::new();
        for (index, (path, format)) in disks.iter().enumerate() {
            let path = path.display();
            command.arg("-blockdev").arg(format!(
                "driver={format},node-name=disk{index},discard=unmap,file.driver=file,\
                 file.filename={path},file.discard=unmap"
            ));
            // The first disk is served by the main thread, the others by one of their own.
            let thread = if index > 0 && qemu.serves_threads { ",iothread=io0" } else { "" };
            command.arg("-device").arg(format!(
                "virtio-blk-pci,id=vd{index},drive=disk{index},bootindex={index}{thread}"
            ));
            nodes.push(DiskNode { id: format!("vd{index}"), node: format!("disk{index}") });
        }
        let child = command.stdin(Stdio::null()).stdout(Stdio::null()).spawn().unwrap();
        let qmp = connect(&socket).await;
        Self { qmp, dir, disks: nodes, child }
    }

    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    pub(crate) fn pid(&self) -> u32 {
        self.child.id()
    }

    /// A fresh look at the disks, as a process would have that was just started.
    pub(crate) fn source(&self, tracking: &str) -> SourceDisks {
        let config = SourceDisksConfig {
            disks: self.disks.clone(),
            run_dir: self.dir.path().to_owned(),
            tracking: tracking.to_owned(),
            pid: None,
        };
        SourceDisks::new(self.qmp.clone(), config).unwrap()
    }

    pub(crate) async fn run(&self, command: &str, arguments: Value) -> Value {
        self.qmp.execute(command, arguments).await.unwrap()
    }

    /// Writes to a disk as its guest would: through the device's own end of QEMU's block layer.
    pub(crate) async fn io(&self, node: &str, command: &str) {
        let number = node.strip_prefix("disk").unwrap();
        let device = format!("/machine/peripheral/vd{number}/virtio-backend");
        let line = format!("qemu-io -d {device} \"{command}\"");
        let said = self.run("human-monitor-command", json!({ "command-line": line })).await;
        let said = said.as_str().unwrap_or_default();
        // What it did goes to QEMU's standard output; only refusals are said here.
        assert!(said.is_empty(), "{line}: {said}");
    }

    /// Waits until the guest writes. Before, while its firmware looks at the disks, they move
    /// between QEMU's threads, and QEMU 10.0 may fail an assertion of its own if a client connects
    /// in that instant (`blk_aio_attached` in `nbd/server.c`).
    pub(crate) async fn boots(&self) {
        let started = Instant::now();
        loop {
            let stats = self.run("query-blockstats", Value::Null).await;
            if stats[0]["stats"]["wr_operations"].as_u64().unwrap() > 0 {
                return;
            }
            assert!(started.elapsed() < WAIT_MAX, "the guest does not boot");
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    }

    /// Names of the bitmaps on a node, with whether they record.
    pub(crate) async fn bitmaps(&self, node: &str) -> Vec<(String, bool)> {
        let nodes = self.run("query-named-block-nodes", json!({ "flat": true })).await;
        let node = nodes.as_array().unwrap().iter().find(|n| n["node-name"] == node).unwrap();
        let bitmaps = node["dirty-bitmaps"].as_array().cloned().unwrap_or_default();
        let mut names: Vec<(String, bool)> = bitmaps
            .iter()
            .map(|b| (b["name"].as_str().unwrap().to_owned(), b["recording"] == true))
            .collect();
        names.sort();
        names
    }

    pub(crate) async fn exports(&self) -> Vec<String> {
        let exports = self.run("query-block-exports", Value::Null).await;
        let exports = exports.as_array().unwrap().iter();
        exports.map(|e| e["id"].as_str().unwrap().to_owned()).collect()
    }

    pub(crate) async fn status(&self) -> String {
        self.run("query-status", Value::Null).await["status"].as_str().unwrap().to_owned()
    }

    /// Ends the process at once, as a crash would.
    pub(crate) fn kill(&mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
    }

    /// Ends QEMU in order and gives the folder back.
    pub(crate) async fn quit(mut self) -> TempDir {
        let _ = self.qmp.execute("quit", Value::Null).await;
        let started = Instant::now();
        while self.child.try_wait().unwrap().is_none() {
            assert!(started.elapsed() < WAIT_MAX, "QEMU does not quit");
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        let elsewhere = tempfile::tempdir().unwrap();
        std::mem::replace(&mut self.dir, elsewhere)
    }
}

impl Drop for Guest {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

async fn connect(socket: &Path) -> Qmp {
    let started = Instant::now();
    loop {
        match Qmp::connect(socket, "test-vm").await {
            Ok(qmp) => return qmp,
            Err(error) => assert!(started.elapsed() < WAIT_MAX, "no monitor: {error}"),
        }
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}
